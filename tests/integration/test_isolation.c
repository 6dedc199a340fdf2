// Nothing crosses a namespace or a session: handles that are guessed, requests that are replayed, prefixes of others;
// and what a namespace may have is all that it gets.
#include "worker.h"

#include "raw.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static const struct shape shape = {2, 2, 4, 64, ICE_BF16};

enum { BLOCKS = 32, SEALED = BLOCKS * 16 };

#define SMALL "--pool-bytes", "4m", "--index-bytes", "64m", "--shared-bytes", "64m", "--shards", "2"
#define DISK  SMALL, "--spill-dir", DAEMON_SPILL_FOLDER, "--spill-bytes", "128m", "--hibernate-ms", "0"

static const char *const with_disk[] = {DISK, NULL};
static const char *const with_quotas[] = {SMALL,         "--quota", "tests:sequences=2;small:ram=1m", "--quota-default",
                                          "sequences=1", NULL};
static const char *const with_namespace_limit[] = {SMALL, "--namespaces-max", "2", NULL};
static const char *const with_ram_quota[] = {DISK, "--quota", "tests:ram=2m", NULL};
static const char *const with_disk_quota[] = {DISK, "--quota", "tests:disk=4m", NULL};
static const char *const with_ttl[] = {DISK, "--prefix-ttl-s", "1", NULL};

static void make_hashes(uint8_t hashes[BLOCKS][ICE_HASH_BYTES], uint32_t seed)
{
    static uint32_t tokens[SEALED];
    for (uint32_t i = 0; i < SEALED; i++)
        tokens[i] = i * 7919 + seed;
    assert_ok(ice_block_hashes(tokens, SEALED, 16, NULL, 0, hashes));
}

static ice_sequence *open_in(ice_client *client, const char *name_space, uint32_t tp_rank, uint32_t tp_size)
{
    struct ice_sequence_options options = sequence_options(&shape);
    ice_sequence *sequence = NULL;
    options.name_space = name_space;
    options.tp_rank = tp_rank;
    options.tp_size = tp_size;
    assert_ok(ice_sequence_open(client, &options, 0, &sequence));
    return sequence;
}

// A sequence in the namespace with the history's beginning, sealed as the hashes of the seed; closed again.
static uint64_t seal_in(const struct daemon *daemon, const char *name_space, uint32_t seed, uint32_t blocks,
                        uint32_t tp_rank, uint32_t tp_size)
{
    struct worker worker = {.shape = shape};
    struct history history;
    struct ice_seal_result sealed;
    uint8_t hashes[BLOCKS][ICE_HASH_BYTES];
    history_create(&history, &shape, SEALED, seed);
    make_hashes(hashes, seed);
    worker.client = client_connect(daemon->sockets, TEST_DEADLINE_US, 4u << 20);
    worker.sequence = open_in(worker.client, name_space, tp_rank, tp_size);
    worker_append(&worker, &history, 0, SEALED);
    worker_wait_idle(&worker);
    assert_ok(ice_sequence_seal(worker.sequence, hashes, blocks, 0, &sealed));
    ice_client_close(worker.client);
    history_destroy(&history);
    return sealed.prefix_id;
}

static json_t *ctl_json(const struct daemon *daemon, const char *command)
{
    static char output[1 << 18];
    const char *const arguments[] = {command, "--json", NULL};
    json_error_t error;
    assert_int_equal(daemon_ctl(daemon, arguments, output, sizeof output), 0);
    json_t *root = json_loads(output, 0, &error);
    if (!root)
        fail_msg("%s in %s", error.text, output);
    return root;
}

// A number of `icecachectl namespaces` by its key, UINT64_MAX where the namespace is not listed.
static uint64_t of_namespace(const struct daemon *daemon, const char *name_space, const char *key)
{
    json_t *root = ctl_json(daemon, "namespaces"), *row;
    uint64_t value = UINT64_MAX;
    size_t i;
    json_array_foreach(json_object_get(root, "namespace"), i, row)
    {
        if (strcmp(json_string_value(json_object_get(row, "name")), name_space) == 0) {
            assert_true(json_is_integer(json_object_get(row, key)));
            value = (uint64_t)json_integer_value(json_object_get(row, key));
        }
    }
    json_decref(root);
    return value;
}

static void wait_for(const struct daemon *daemon, const char *name_space, const char *key, uint64_t most)
{
    uint64_t value = 0;
    for (uint64_t until = now_us() + TEST_DEADLINE_US; (value = of_namespace(daemon, name_space, key)) > most;
         sleep_us(10000)) {
        if (now_us() > until)
            fail_msg("%s of %s is %llu", key, name_space, (unsigned long long)value);
    }
}

// ---- sessions ----

static void expect_foreign(struct raw *raw, uint64_t sequence_id)
{
    raw_request request;
    Icecache__Wire__SequenceInfo info = ICECACHE__WIRE__SEQUENCE_INFO__INIT;
    Icecache__Wire__SequenceClose close = ICECACHE__WIRE__SEQUENCE_CLOSE__INIT;
    Icecache__Wire__Append append = ICECACHE__WIRE__APPEND__INIT;
    Icecache__Wire__Read read = ICECACHE__WIRE__READ__INIT;
    Icecache__Wire__Seal seal = ICECACHE__WIRE__SEAL__INIT;
    Icecache__Wire__Hint hint = ICECACHE__WIRE__HINT__INIT;
    static const uint8_t queries[4 * 64 * 2];
    info.sequence_id = close.sequence_id = append.sequence_id = read.sequence_id = seal.sequence_id = sequence_id;
    append.layers = append.tokens = read.layers = read.tokens = 1;
    raw_request_init(raw, &request);
    request.body_case = ICECACHE__WIRE__REQUEST__BODY_SEQUENCE_INFO;
    request.sequence_info = &info;
    raw_expect(raw_call(raw, &request, NULL, 0), ICE_UNKNOWN_SEQUENCE, "in this session");
    request.body_case = ICECACHE__WIRE__REQUEST__BODY_SEQUENCE_CLOSE;
    request.sequence_close = &close;
    raw_expect(raw_call(raw, &request, NULL, 0), ICE_UNKNOWN_SEQUENCE, "in this session");
    request.body_case = ICECACHE__WIRE__REQUEST__BODY_APPEND;
    request.append = &append;
    raw_expect(raw_call(raw, &request, NULL, 0), ICE_UNKNOWN_SEQUENCE, "in this session");
    request.body_case = ICECACHE__WIRE__REQUEST__BODY_READ;
    request.read = &read;
    raw_expect(raw_call(raw, &request, NULL, 0), ICE_UNKNOWN_SEQUENCE, "in this session");
    request.body_case = ICECACHE__WIRE__REQUEST__BODY_SEAL;
    request.seal = &seal;
    raw_expect(raw_call(raw, &request, "0123456789abcdef", 16), ICE_UNKNOWN_SEQUENCE, "in this session");
    hint.n_sequence_ids = 1;
    hint.sequence_ids = &sequence_id;
    hint.queries = 1;
    hint.query_dtype = ICE_BF16;
    hint.budget = 16;
    request.body_case = ICECACHE__WIRE__REQUEST__BODY_HINT;
    request.hint = &hint;
    raw_expect(raw_call(raw, &request, queries, sizeof queries), ICE_UNKNOWN_SEQUENCE, "in this session");
}

static void expect_landing_unknown(struct raw *raw, uint32_t landing_id, uint64_t sequence_id)
{
    raw_request request;
    raw_control_request control = ICECACHE__WIRE__CONTROL_REQUEST__INIT;
    Icecache__Wire__LandingClose close = ICECACHE__WIRE__LANDING_CLOSE__INIT;
    Icecache__Wire__Retrieve retrieve = ICECACHE__WIRE__RETRIEVE__INIT;
    uint32_t row = 0;
    uint64_t first = 0;
    static const uint8_t queries[4 * 64 * 2];
    close.landing_id = retrieve.landing_id = landing_id;
    retrieve.n_sequence_ids = retrieve.n_rows = retrieve.n_first_queries = 1;
    retrieve.sequence_ids = &sequence_id;
    retrieve.rows = &row;
    retrieve.first_queries = &first;
    retrieve.queries = 1;
    retrieve.query_dtype = ICE_BF16;
    retrieve.budget = 16;
    raw_request_init(raw, &request);
    request.body_case = ICECACHE__WIRE__REQUEST__BODY_RETRIEVE;
    request.retrieve = &retrieve;
    raw_expect(raw_call(raw, &request, queries, sizeof queries), ICE_UNKNOWN_LANDING, "");
    control.body_case = ICECACHE__WIRE__CONTROL_REQUEST__BODY_LANDING_CLOSE;
    control.landing_close = &close;
    raw_control_expect(raw_control(raw, &control, NULL), ICE_UNKNOWN_LANDING, "");
}

// Ids of sequences and landings are small numbers, and mean nothing outside of their session.
static void handles_of_others(void **state)
{
    const struct daemon *daemon = *state;
    struct raw owner, other;
    raw_request request;
    Icecache__Wire__SequenceInfo info = ICECACHE__WIRE__SEQUENCE_INFO__INIT;
    raw_open(&owner, daemon);
    raw_open(&other, daemon);
    const uint64_t sequence = raw_sequence_open(&owner, 2, 2, 4, 64, ICE_BF16);
    const uint32_t landing = raw_landing_open(&owner, 1, 128, 2, 64, ICE_BF16);
    for (uint64_t id = 0; id < sequence + 20; id++)
        expect_foreign(&other, id);
    const uint64_t own = raw_sequence_open(&other, 2, 2, 4, 64, ICE_BF16);
    for (uint32_t id = 0; id < landing + 20; id++)
        expect_landing_unknown(&other, id, own);
    expect_foreign(&other, sequence);
    info.sequence_id = sequence;
    raw_request_init(&owner, &request);
    request.body_case = ICECACHE__WIRE__REQUEST__BODY_SEQUENCE_INFO;
    request.sequence_info = &info;
    raw_expect(raw_call(&owner, &request, NULL, 0), ICE_OK, "");
    raw_close(&owner);
    raw_close(&other);
}

// Another session's id with one's own token, and the other way round.
static void mixed_tokens(void **state)
{
    const struct daemon *daemon = *state;
    struct raw owner, other;
    raw_request request;
    Icecache__Wire__Stats stats = ICECACHE__WIRE__STATS__INIT;
    raw_open(&owner, daemon);
    raw_open(&other, daemon);
    raw_request_init(&other, &request);
    request.body_case = ICECACHE__WIRE__REQUEST__BODY_STATS;
    request.stats = &stats;
    request.session_id = owner.session_id;
    raw_expect(raw_call(&other, &request, NULL, 0), ICE_UNKNOWN_SESSION, "connect again");
    request.session_id = other.session_id;
    request.session_token.data = owner.token;
    raw_expect(raw_call(&other, &request, NULL, 0), ICE_UNKNOWN_SESSION, "connect again");
    for (unsigned bit = 0; bit < 8 * sizeof other.token; bit += 7) {
        uint8_t token[sizeof other.token];
        memcpy(token, other.token, sizeof token);
        token[bit / 8] = (uint8_t)(token[bit / 8] ^ 1u << bit % 8);
        request.session_token.data = token;
        raw_expect(raw_call(&other, &request, NULL, 0), ICE_UNKNOWN_SESSION, "connect again");
    }
    raw_close(&owner);
    raw_close(&other);
}

// What was a session before the daemon died is none of the next one's, nor is one whose socket has closed.
static void replayed_after_the_end(void **state)
{
    struct daemon *daemon = *state;
    struct raw before, after;
    raw_request request;
    Icecache__Wire__SequenceInfo info = ICECACHE__WIRE__SEQUENCE_INFO__INIT;
    raw_open(&before, daemon);
    info.sequence_id = raw_sequence_open(&before, 2, 2, 4, 64, ICE_BF16);
    raw_open(&after, daemon);
    close(before.control_fd);
    before.control_fd = -1;
    struct stats_held held;
    for (uint64_t until = now_us() + TEST_DEADLINE_US; stats_held(daemon, &held), held.sessions > 1; sleep_us(2000))
        assert_true(now_us() < until);
    raw_request_init(&before, &request);
    request.body_case = ICECACHE__WIRE__REQUEST__BODY_SEQUENCE_INFO;
    request.sequence_info = &info;
    raw_expect(raw_call(&after, &request, NULL, 0), ICE_UNKNOWN_SESSION, "connect again");
    struct raw old = after;
    daemon_kill(daemon);
    daemon_start(daemon);
    raw_open(&after, daemon);
    assert_true(after.boot_token != old.boot_token);
    assert_true(after.session_id != old.session_id);
    raw_request_init(&old, &request);
    request.body_case = ICECACHE__WIRE__REQUEST__BODY_SEQUENCE_INFO;
    request.sequence_info = &info;
    raw_expect(raw_call(&after, &request, NULL, 0), ICE_UNKNOWN_SESSION, "connect again");
    raw_close(&before);
    raw_close(&old);
    raw_close(&after);
}

// ---- namespaces ----

static size_t listed(struct raw *raw, const char *name_space, ice_status expected)
{
    raw_request request;
    Icecache__Wire__PrefixList list = ICECACHE__WIRE__PREFIX_LIST__INIT;
    list.name_space = (char *)(uintptr_t)name_space;
    raw_request_init(raw, &request);
    request.body_case = ICECACHE__WIRE__REQUEST__BODY_PREFIX_LIST;
    request.prefix_list = &list;
    raw_reply *reply = raw_call(raw, &request, NULL, 0);
    assert_int_equal(reply->status, expected);
    const size_t count = expected == ICE_OK ? reply->prefix_list->n_prefix : 0;
    raw_free(reply);
    return count;
}

static void prefixes_of_others(void **state)
{
    const struct daemon *daemon = *state;
    uint8_t hashes[BLOCKS][ICE_HASH_BYTES];
    struct ice_sequence_options options = sequence_options(&shape);
    ice_sequence *sequence = NULL;
    uint64_t tokens = 1;
    struct raw raw;
    const uint64_t id = seal_in(daemon, "tests", 1, BLOCKS, 0, 1);
    make_hashes(hashes, 1);
    ice_client *client = client_connect(daemon->sockets, TEST_DEADLINE_US, 0);
    static const char *const others[] = {NULL, "other", "test", "testsx", "Tests", "tests "};
    for (size_t i = 0; i < sizeof others / sizeof *others; i++) {
        options.name_space = others[i];
        assert_ok(ice_prefix_lookup(client, &options, hashes, BLOCKS, 0, &tokens));
        assert_int_equal(tokens, 0);
        assert_ok(ice_prefix_lookup_group(client, &options, hashes, BLOCKS, 0, &tokens));
        assert_int_equal(tokens, 0);
        assert_status(ice_sequence_attach(client, &options, hashes, BLOCKS, 0, 0, &sequence, &tokens),
                      ICE_UNKNOWN_PREFIX);
        assert_refused(ice_prefix_remove_from(client, others[i], id, 0), ICE_UNKNOWN_PREFIX, "of this namespace");
    }
    assert_status(ice_prefix_remove(client, id, 0), ICE_UNKNOWN_PREFIX);
    raw_open(&raw, daemon);
    assert_int_equal(listed(&raw, "", ICE_OK), 0);
    assert_int_equal(listed(&raw, "other", ICE_OK), 0);
    assert_int_equal(listed(&raw, "tests", ICE_OK), 1);
    raw_close(&raw);
    options.name_space = "tests";
    assert_ok(ice_prefix_lookup(client, &options, hashes, BLOCKS, 0, &tokens));
    assert_int_equal(tokens, SEALED);
    assert_ok(ice_prefix_remove_from(client, "tests", id, 0));
    ice_client_close(client);
}

// A worker sees its own sequences among the statistics, and nothing of what others hold.
static void what_a_worker_sees(void **state)
{
    const struct daemon *daemon = *state;
    struct raw raw;
    raw_request request;
    Icecache__Wire__Stats stats = ICECACHE__WIRE__STATS__INIT;
    Icecache__Wire__LeaseList leases = ICECACHE__WIRE__LEASE_LIST__INIT;
    Icecache__Wire__NamespaceList namespaces = ICECACHE__WIRE__NAMESPACE_LIST__INIT;
    ice_client *client = client_connect(daemon->sockets, 0, 0);
    for (int i = 0; i < 5; i++)
        open_in(client, "secret", 0, 1);
    raw_open(&raw, daemon);
    const uint64_t own = raw_sequence_open(&raw, 2, 2, 4, 64, ICE_BF16);
    raw_request_init(&raw, &request);
    request.body_case = ICECACHE__WIRE__REQUEST__BODY_STATS;
    request.stats = &stats;
    raw_reply *reply = raw_call(&raw, &request, NULL, 0);
    assert_int_equal(reply->status, ICE_OK);
    assert_int_equal(reply->stats->sequences, 6);
    assert_int_equal(reply->stats->n_sequence, 1);
    assert_true(reply->stats->sequence[0]->sequence_id == own);
    raw_free(reply);
    request.body_case = ICECACHE__WIRE__REQUEST__BODY_LEASE_LIST;
    request.lease_list = &leases;
    raw_expect(raw_call(&raw, &request, NULL, 0), ICE_PERMISSION, "only an admin session");
    request.body_case = ICECACHE__WIRE__REQUEST__BODY_NAMESPACE_LIST;
    request.namespace_list = &namespaces;
    raw_expect(raw_call(&raw, &request, NULL, 0), ICE_PERMISSION, "only an admin session");
    raw_close(&raw);
    ice_client_close(client);
}

// A client that is bound to a namespace cannot name another one.
static void bound(void **state)
{
    const struct daemon *daemon = *state;
    uint8_t hashes[BLOCKS][ICE_HASH_BYTES];
    const struct ice_client_options binding = {.socket_directory = daemon->sockets, .name_space = "other"};
    struct ice_sequence_options options = sequence_options(&shape);
    ice_sequence *sequence = NULL;
    ice_client *client = NULL;
    uint64_t tokens = 1;
    const uint64_t id = seal_in(daemon, "tests", 1, BLOCKS, 0, 1);
    make_hashes(hashes, 1);
    assert_ok(ice_client_connect(&binding, &client));
    assert_refused(ice_sequence_open(client, &options, 0, &sequence), ICE_PERMISSION, "bound it to another namespace");
    assert_refused(ice_prefix_lookup(client, &options, hashes, BLOCKS, 0, &tokens), ICE_PERMISSION, "bound");
    assert_refused(ice_sequence_attach(client, &options, hashes, BLOCKS, 0, 0, &sequence, NULL), ICE_PERMISSION,
                   "bound");
    assert_refused(ice_prefix_remove_from(client, "tests", id, 0), ICE_PERMISSION, "bound");
    assert_status(ice_prefix_remove(client, id, 0), ICE_UNKNOWN_PREFIX);
    options.name_space = NULL; // the client's
    assert_ok(ice_sequence_open(client, &options, 0, &sequence));
    assert_int_equal(of_namespace(daemon, "other", "sequences"), 1);
    assert_int_equal(of_namespace(daemon, "default", "sequences"), UINT64_MAX);
    assert_ok(ice_prefix_lookup(client, &options, hashes, BLOCKS, 0, &tokens));
    assert_int_equal(tokens, 0);
    daemon_kill((struct daemon *)(uintptr_t)daemon);
    daemon_start((struct daemon *)(uintptr_t)daemon);
    ice_sequence_close(sequence);
    for (uint64_t until = now_us() + TEST_DEADLINE_US; ice_client_reconnect(client) != ICE_OK; sleep_us(10000))
        assert_true(now_us() < until);
    options.name_space = "tests"; // bound again
    assert_refused(ice_sequence_open(client, &options, 0, &sequence), ICE_PERMISSION, "bound");
    ice_client_close(client);
    const struct ice_client_options empty = {.socket_directory = daemon->sockets, .name_space = ""};
    assert_refused(ice_client_connect(&empty, &client), ICE_INVALID_ARGUMENT, "name_space is empty");
}

// What all ranks of a group have: the least of them, and nothing where one has nothing.
static void all_ranks(void **state)
{
    const struct daemon *daemon = *state;
    uint8_t hashes[BLOCKS][ICE_HASH_BYTES];
    struct ice_sequence_options options = sequence_options(&shape);
    ice_client *client = client_connect(daemon->sockets, TEST_DEADLINE_US, 4u << 20);
    static const uint32_t blocks[3] = {BLOCKS, 20, 27};
    uint64_t tokens = 1;
    make_hashes(hashes, 1);
    options.tp_size = 3;
    for (uint32_t rank = 0; rank < 3; rank++) {
        options.tp_rank = rank;
        assert_ok(ice_prefix_lookup_group(client, &options, hashes, BLOCKS, 0, &tokens));
        assert_int_equal(tokens, 0);
        seal_in(daemon, "tests", 1, blocks[rank], rank, 3);
    }
    for (uint32_t rank = 0; rank < 3; rank++) {
        ice_sequence *sequence;
        options.tp_rank = rank; // whoever asks
        assert_ok(ice_prefix_lookup(client, &options, hashes, BLOCKS, 0, &tokens));
        assert_int_equal(tokens, 16 * blocks[rank]);
        assert_ok(ice_prefix_lookup_group(client, &options, hashes, BLOCKS, 0, &tokens));
        assert_int_equal(tokens, 16 * 20);
        assert_ok(ice_prefix_lookup_group(client, &options, hashes, 7, 0, &tokens));
        assert_int_equal(tokens, 16 * 7);
        assert_ok(ice_sequence_attach(client, &options, hashes, BLOCKS, 16 * 20, 0, &sequence, &tokens));
        assert_int_equal(tokens, 16 * 20);
    }
    options.tp_size = 1025;
    assert_refused(ice_prefix_lookup_group(client, &options, hashes, BLOCKS, 0, &tokens), ICE_TOO_LARGE,
                   "WIRE_RANKS_MAX = 1024");
    ice_client_close(client);
}

// ---- quotas ----

static void refused_leaves_nothing(void **state)
{
    const struct daemon *daemon = *state;
    struct worker worker = {.shape = shape};
    struct history history;
    struct stats_held before, after;
    struct ice_sequence_options options = sequence_options(&shape);
    ice_sequence *second, *third = NULL;
    history_create(&history, &shape, 3000, 5);
    worker.client = client_connect(daemon->sockets, TEST_DEADLINE_US, 4u << 20);
    ice_sequence *first = open_in(worker.client, "tests", 0, 1);
    second = open_in(worker.client, "tests", 0, 1);
    open_in(worker.client, "unnamed", 0, 1);
    stats_held(daemon, &before);
    for (int i = 0; i < 3; i++)
        assert_refused(ice_sequence_open(worker.client, &options, 0, &third), ICE_QUOTA,
                       "namespace 'tests' has 2 sequences open, its quota is sequences=2");
    options.name_space = "unnamed"; // --quota-default
    assert_refused(ice_sequence_open(worker.client, &options, 0, &third), ICE_QUOTA, "'unnamed' has 1 sequences open");
    stats_held(daemon, &after);
    assert_memory_equal(&before, &after, sizeof before);
    assert_int_equal(of_namespace(daemon, "tests", "refused"), 3);
    ice_sequence_close(second);
    second = open_in(worker.client, "tests", 0, 1);
    ice_sequence_close(first);
    ice_sequence_close(second);

    worker.sequence = open_in(worker.client, "small", 0, 1);
    worker_append(&worker, &history, 0, 500);
    worker_wait_idle(&worker);
    stats_held(daemon, &before);
    const struct kv_check {
        uint64_t pool, index;
    } used = {of_namespace(daemon, "small", "pool_bytes"), of_namespace(daemon, "small", "index_bytes")};
    assert_true(used.pool >= 500 * 4 * 256 && used.index > 0);
    struct ice_kv_source source = history_source(&history, ICE_ALL_LAYERS, 500);
    assert_refused(ice_append(worker.sequence, ICE_ALL_LAYERS, 500, 2500, &source, 0, NULL), ICE_QUOTA,
                   "namespace 'small' has");
    assert_text(ice_last_error(), "raise ram= of its --quota");
    stats_held(daemon, &after);
    assert_memory_equal(&before, &after, sizeof before);
    worker_check_content(&worker, &history, 0, 500);
    worker_append(&worker, &history, 500, 16); // it goes on with what there is room for
    worker_check_content(&worker, &history, 0, 516);
    uint64_t length = 516;
    ice_status status = ICE_OK;
    for (; status == ICE_OK; length += status == ICE_OK) { // token by token up to the quota
        source = history_source(&history, ICE_ALL_LAYERS, length);
        status = ice_append(worker.sequence, ICE_ALL_LAYERS, length, 1, &source, 0, NULL);
        assert_true(length < 1000);
    }
    assert_int_equal(status, ICE_QUOTA);
    worker_check_content(&worker, &history, 0, length);
    assert_true(of_namespace(daemon, "small", "pool_bytes") + of_namespace(daemon, "small", "index_bytes") < 1300000);
    ice_client_close(worker.client);
    wait_for(daemon, "small", "pool_bytes", 0);
    wait_for(daemon, "small", "index_bytes", 0);
    history_destroy(&history);
}

static void as_many_namespaces(void **state)
{
    const struct daemon *daemon = *state;
    struct ice_sequence_options options = sequence_options(&shape);
    ice_client *client = client_connect(daemon->sockets, 0, 0);
    ice_sequence *second, *third = NULL;
    open_in(client, "first", 0, 1);
    second = open_in(client, "second", 0, 1);
    options.name_space = "third";
    assert_refused(ice_sequence_open(client, &options, 0, &third), ICE_LIMIT,
                   "2 namespaces are in use, as many as --namespaces-max allows");
    open_in(client, "first", 0, 1);
    ice_sequence_close(second);
    assert_ok(ice_sequence_open(client, &options, 0, &third)); // an empty one makes room
    ice_client_close(client);
}

// With a disk, pages of a namespace over its quota leave memory, those of another do not.
static void over_ram_goes_to_the_disk(void **state)
{
    const struct daemon *daemon = *state;
    struct worker worker = {.shape = shape}, other = {.shape = shape};
    struct history history;
    history_create(&history, &shape, 3000, 6);
    other.client = worker.client = client_connect(daemon->sockets, TEST_DEADLINE_US, 4u << 20);
    other.sequence = open_in(worker.client, "other", 0, 1);
    worker_append(&other, &history, 0, 600);
    worker_wait_idle(&other);
    const uint64_t kept = of_namespace(daemon, "other", "pool_bytes");
    worker.sequence = open_in(worker.client, "tests", 0, 1);
    worker_append(&worker, &history, 0, 2400);
    worker_wait_idle(&worker);
    assert_true(of_namespace(daemon, "tests", "disk_bytes") >= 2400 * 4 * 256);
    const uint64_t trees = of_namespace(daemon, "tests", "index_bytes");
    assert_true(trees < 1 << 20);
    wait_for(daemon, "tests", "pool_bytes", (2 << 20) - trees);
    assert_int_equal(of_namespace(daemon, "other", "pool_bytes"), kept);
    worker_check_content(&worker, &history, 0, 2400);
    ice_client_close(worker.client);
    wait_for(daemon, "tests", "disk_bytes", 0);
    history_destroy(&history);
}

// A namespace's own prefixes make room for it, those of others do not; then it is refused.
static void over_disk_is_refused(void **state)
{
    const struct daemon *daemon = *state;
    struct worker worker = {.shape = shape};
    struct history history;
    uint8_t hashes[BLOCKS][ICE_HASH_BYTES];
    struct ice_sequence_options options = sequence_options(&shape);
    uint64_t tokens;
    history_create(&history, &shape, 4000, 7);
    seal_in(daemon, "other", 1, BLOCKS, 0, 1);
    seal_in(daemon, "tests", 1, BLOCKS, 0, 1);
    assert_true(of_namespace(daemon, "tests", "disk_bytes") >= SEALED * 4 * 256);
    worker.client = client_connect(daemon->sockets, TEST_DEADLINE_US, 4u << 20);
    worker.sequence = open_in(worker.client, "tests", 0, 1);
    struct ice_kv_source source = history_source(&history, ICE_ALL_LAYERS, 0);
    make_hashes(hashes, 1);
    // 4000 tokens take 4 MB: with the prefix that is too much, and without it too, but that goes for it.
    assert_ok(ice_prefix_lookup(worker.client, &options, hashes, BLOCKS, 0, &tokens));
    assert_int_equal(tokens, SEALED);
    worker_append(&worker, &history, 0, 3400);
    assert_ok(ice_prefix_lookup(worker.client, &options, hashes, BLOCKS, 0, &tokens));
    assert_int_equal(tokens, 0);
    assert_int_equal(of_namespace(daemon, "tests", "prefixes"), 0);
    assert_int_equal(of_namespace(daemon, "other", "prefixes"), 1);
    source = history_source(&history, ICE_ALL_LAYERS, 3400);
    worker_wait_idle(&worker);
    assert_refused(ice_append(worker.sequence, ICE_ALL_LAYERS, 3400, 600, &source, 0, NULL), ICE_QUOTA,
                   "bytes of disk in use or promised");
    assert_refused(ice_sequence_seal(worker.sequence, hashes, BLOCKS, 0, NULL), ICE_QUOTA, "remove sealed prefixes");
    assert_int_equal(of_namespace(daemon, "other", "prefixes"), 1);
    worker_check_content(&worker, &history, 0, 3400);
    ice_client_close(worker.client);
    history_destroy(&history);
}

// ---- age ----

static void detached_prefixes_expire(void **state)
{
    const struct daemon *daemon = *state;
    uint8_t hashes[BLOCKS][ICE_HASH_BYTES];
    struct ice_sequence_options options = sequence_options(&shape);
    ice_sequence *sequence;
    uint64_t tokens;
    make_hashes(hashes, 1);
    seal_in(daemon, "tests", 1, BLOCKS, 0, 1);
    ice_client *client = client_connect(daemon->sockets, TEST_DEADLINE_US, 4u << 20);
    assert_ok(ice_sequence_attach(client, &options, hashes, BLOCKS, 0, 0, &sequence, &tokens));
    sleep_us(2200000); // attached: it stays
    assert_ok(ice_prefix_lookup(client, &options, hashes, BLOCKS, 0, &tokens));
    assert_int_equal(tokens, SEALED);
    ice_sequence_close(sequence);
    const uint64_t from = now_us();
    for (tokens = SEALED; tokens > 0; sleep_us(20000)) {
        assert_ok(ice_prefix_lookup(client, &options, hashes, BLOCKS, 0, &tokens));
        assert_true(now_us() < from + TEST_DEADLINE_US);
    }
    assert_true(now_us() - from > 900000);
    json_t *stats = stats_read(daemon);
    assert_int_equal(stats_number(stats, "spill.prefixes_expired"), 1);
    assert_int_equal(stats_number(stats, "spill.prefixes_evicted"), 0);
    json_decref(stats);
    ice_client_close(client);
    for (; of_namespace(daemon, "tests", "disk_bytes") != UINT64_MAX; sleep_us(10000)) // it goes with what was in it
        assert_true(now_us() < from + TEST_DEADLINE_US);
}

static const char *text_of(const json_t *row, const char *key)
{
    return json_string_value(json_object_get(row, key));
}

static void leases_name_their_owners(void **state)
{
    const struct daemon *daemon = *state;
    struct worker worker;
    struct history history;
    unsigned sessions = 0, stagings = 0, landings = 0, sequences = 0, prefixes = 0;
    seal_in(daemon, "tests", 1, BLOCKS, 0, 1);
    history_create(&history, &shape, 100, 8);
    worker_open(&worker, daemon->sockets, &shape, 1, 128);
    worker_append(&worker, &history, 0, 100);
    sleep_us(300000);
    json_t *root = ctl_json(daemon, "leases"), *row;
    size_t i;
    json_array_foreach(json_object_get(root, "lease"), i, row)
    {
        const char *kind = text_of(row, "kind");
        const double age = json_real_value(json_object_get(row, "age_seconds"));
        const double unused = json_real_value(json_object_get(row, "unused_seconds"));
        assert_int_equal(json_integer_value(json_object_get(row, "pid")), getpid());
        assert_string_equal(text_of(row, "worker"), "test");
        assert_true(age >= 0.3 && unused >= 0.3 && unused <= age && age < 60);
        sessions += strcmp(kind, "session") == 0;
        stagings += strcmp(kind, "staging") == 0;
        landings += strcmp(kind, "landing") == 0;
        sequences += strcmp(kind, "sequence") == 0;
        prefixes += strcmp(kind, "prefix") == 0;
        const bool named = strcmp(kind, "sequence") == 0 || strcmp(kind, "prefix") == 0;
        assert_string_equal(text_of(row, "namespace"), named ? "tests" : "");
        assert_true((json_integer_value(json_object_get(row, "bytes")) > 0) == (strcmp(kind, "session") != 0));
    }
    json_decref(root);
    assert_int_equal(sessions, 1);
    assert_int_equal(stagings, 1);
    assert_int_equal(landings, 1);
    assert_int_equal(sequences, 1);
    assert_int_equal(prefixes, 1);
    worker_close(&worker);
    history_destroy(&history);
}

// Lists in several parts: each entry once.
static void long_lists(void **state)
{
    const struct daemon *daemon = *state;
    enum { COUNT = 600 };
    bool seen[COUNT] = {false};
    ice_client *client = client_connect(daemon->sockets, TEST_DEADLINE_US, 0);
    for (int i = 0; i < COUNT; i++) {
        char name[16];
        snprintf(name, sizeof name, "n%d", i);
        open_in(client, name, 0, 1);
    }
    json_t *root = ctl_json(daemon, "namespaces"), *row;
    size_t i;
    assert_int_equal(json_array_size(json_object_get(root, "namespace")), COUNT);
    json_array_foreach(json_object_get(root, "namespace"), i, row)
    {
        const unsigned number = (unsigned)strtoul(text_of(row, "name") + 1, NULL, 10);
        assert_true(number < COUNT && !seen[number]);
        seen[number] = true;
    }
    json_decref(root);
    memset(seen, 0, sizeof seen);
    root = ctl_json(daemon, "leases");
    assert_int_equal(json_array_size(json_object_get(root, "lease")), COUNT + 1); // and the session
    json_array_foreach(json_object_get(root, "lease"), i, row)
    {
        if (strcmp(text_of(row, "kind"), "sequence") != 0)
            continue;
        const unsigned number = (unsigned)strtoul(text_of(row, "namespace") + 1, NULL, 10);
        assert_true(number < COUNT && !seen[number]);
        seen[number] = true;
    }
    json_decref(root);
    ice_client_close(client);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        DAEMON_TEST(handles_of_others),
        DAEMON_TEST(mixed_tokens),
        DAEMON_TEST(replayed_after_the_end),
        DAEMON_TEST_WITH(prefixes_of_others, with_disk),
        DAEMON_TEST(what_a_worker_sees),
        DAEMON_TEST_WITH(bound, with_disk),
        DAEMON_TEST_WITH(all_ranks, with_disk),
        DAEMON_TEST_WITH(refused_leaves_nothing, with_quotas),
        DAEMON_TEST_WITH(as_many_namespaces, with_namespace_limit),
        DAEMON_TEST_WITH(over_ram_goes_to_the_disk, with_ram_quota),
        DAEMON_TEST_WITH(over_disk_is_refused, with_disk_quota),
        DAEMON_TEST_WITH(detached_prefixes_expire, with_ttl),
        DAEMON_TEST_WITH(leases_name_their_owners, with_disk),
        DAEMON_TEST(long_lists),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
