// Workers that flood, do not read, send garbage, hang up in the middle or never free: each is bounded, named in the log
// and counted, the others' retrieves keep their latency, and nothing of theirs stays.
//
// Latencies are compared with what the same worker has in the same run: alone, and beside processes that only use the
// CPU; the bound is a multiple of the worse of them, and what a queue without turns would give is many times more.
#include "worker.h" // the public header first: status.h then checks against it

#include "raw.h"

#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include <zmq.h>

static const struct shape shape = {1, 2, 4, 64, ICE_BF16};
enum { LENGTH = 4000, SINKS = 4, WINDOW = 16, BUDGET = 64, SLOTS = SINKS + WINDOW + BUDGET, ROWS = 256 };
enum { RETRIEVES = 300, TIMES_WORSE = 4, SLACK_US = 50000, SPINNERS = 3, SHARED = 400 };
#if defined(__OPTIMIZE__) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
enum { QUERIES = 64 }; // of a heavy retrieve: 256 of them are many times the slack
#else
enum { QUERIES = 16 };
#endif
#define GIVEN_BACK_US (5u * 1000000u)

// ---- hostile workers: roles, which begin at once and go on until their input ends ----

static bool input_ended(void)
{
    struct pollfd input = {.fd = 0, .events = POLLIN};
    return poll(&input, 1, 0) != 0;
}

static void say_begun(void)
{
    printf("begun\n");
    fflush(stdout);
}

// A raw session with a sequence of LENGTH tokens and a landing of ROWS rows.
struct hostile {
    struct raw raw;
    uint64_t sequence;
    uint32_t landing;
    uint8_t queries[QUERIES * 4 * 64 * 2];
    uint64_t served, refused;
};

static void hostile_open(struct hostile *hostile, const char *sockets, uint32_t tokens)
{
    struct daemon daemon = {0};
    uint8_t *staging;
    raw_request request;
    Icecache__Wire__Append append = ICECACHE__WIRE__APPEND__INIT;
    memset(hostile, 0, sizeof *hostile);
    assert_true(strlen(sockets) < sizeof daemon.sockets);
    strcpy(daemon.sockets, sockets);
    raw_open(&hostile->raw, &daemon);
    raw_staging_open(&hostile->raw, 4u << 20, &staging);
    for (uint32_t i = 0; i < 2u << 20; i++) // bf16 around 1, every row another
        ((uint16_t *)staging)[i] = (uint16_t)(0x3f80u ^ (i * 2654435761u >> 26));
    hostile->sequence = raw_sequence_open(&hostile->raw, 1, 2, 4, 64, DTYPE_BF16);
    hostile->landing = raw_landing_open(&hostile->raw, ROWS, SLOTS, 2, 64, DTYPE_BF16);
    append.sequence_id = hostile->sequence;
    append.layers = 1;
    append.tokens = tokens;
    raw_request_init(&hostile->raw, &request);
    request.body_case = ICECACHE__WIRE__REQUEST__BODY_APPEND;
    request.append = &append;
    raw_expect(raw_call(&hostile->raw, &request, NULL, 0), ICE_OK, "");
}

static void send_retrieve(struct hostile *hostile, uint32_t row, uint32_t queries, uint32_t deadline_us)
{
    raw_request request;
    Icecache__Wire__Retrieve retrieve = ICECACHE__WIRE__RETRIEVE__INIT;
    uint64_t first = LENGTH - queries;
    retrieve.landing_id = hostile->landing;
    retrieve.sequence_ids = &hostile->sequence;
    retrieve.first_queries = &first;
    retrieve.rows = &row;
    retrieve.n_sequence_ids = retrieve.n_first_queries = retrieve.n_rows = 1;
    retrieve.queries = queries;
    retrieve.query_dtype = DTYPE_BF16;
    retrieve.budget = BUDGET;
    retrieve.sinks = SINKS;
    retrieve.window = WINDOW;
    retrieve.deadline_us = deadline_us;
    retrieve.want_positions = true;
    raw_request_init(&hostile->raw, &request);
    request.request_id = row + 1; // so that a reply names its row
    request.body_case = ICECACHE__WIRE__REQUEST__BODY_RETRIEVE;
    request.retrieve = &retrieve;
    raw_send(&hostile->raw, &request, hostile->queries, (size_t)queries * 4 * 64 * 2);
}

// Takes replies until none is there, without looking at them.
static void drain(struct raw *raw)
{
    zmq_msg_t message;
    zmq_msg_init(&message);
    while (zmq_msg_recv(&message, raw->socket, ZMQ_DONTWAIT) >= 0)
        ;
    zmq_msg_close(&message);
}

// flood SOCKETS: retrieves without waiting for anything, for as long as it may, and beyond.
static int run_flood(int argc, char **argv)
{
    struct hostile hostile;
    assert_int_equal(argc, 2);
    hostile_open(&hostile, argv[1], LENGTH);
    say_begun();
    for (uint32_t row = 0; !input_ended(); row++) {
        for (uint32_t i = 0; i < 64; i++)
            send_retrieve(&hostile, (row * 64 + i) % ROWS, 1, 0);
        drain(&hostile.raw);
    }
    raw_close(&hostile.raw);
    return 0;
}

// greedy SOCKETS INFLIGHT DEADLINE_US: keeps so many heavy retrieves in flight; says how many were served and refused.
static int run_greedy(int argc, char **argv)
{
    struct hostile hostile;
    assert_int_equal(argc, 4);
    const uint32_t inflight = (uint32_t)atoi(argv[2]), deadline_us = (uint32_t)atoi(argv[3]);
    hostile_open(&hostile, argv[1], LENGTH);
    for (uint32_t row = 0; row < inflight; row++)
        send_retrieve(&hostile, row, QUERIES, deadline_us);
    say_begun();
    while (!input_ended()) {
        raw_reply *reply = raw_receive_try(&hostile.raw, 100);
        if (!reply)
            continue;
        const uint32_t row = (uint32_t)reply->request_id - 1;
        hostile.served += reply->status == ICE_OK;
        hostile.refused += reply->status == ICE_OVERLOADED;
        assert_true(reply->status == ICE_OK || reply->status == ICE_OVERLOADED);
        if (reply->status == ICE_OVERLOADED)
            assert_true(strstr(reply->text, "in flight") != NULL);
        if (reply->status == ICE_OVERLOADED)
            sleep_us(1000); // it would be answered at once, again and again
        raw_free(reply);
        send_retrieve(&hostile, row, QUERIES, deadline_us);
    }
    printf("%llu %llu\n", (unsigned long long)hostile.served, (unsigned long long)hostile.refused);
    fflush(stdout);
    raw_close(&hostile.raw);
    return 0;
}

static void admin_open(struct raw *admin, const char *sockets)
{
    struct daemon daemon = {0};
    strcpy(daemon.sockets, sockets);
    raw_connect(admin, &daemon);
    raw_control_reply *reply = raw_hello(admin, WIRE_PROTOCOL_VERSION, "admin", true);
    admin->session_id = reply->hello->session_id;
    admin->boot_token = reply->hello->boot_token;
    memcpy(admin->token, reply->hello->session_token.data, sizeof admin->token);
    strcpy(admin->endpoint, reply->hello->endpoint);
    raw_control_free(reply);
    raw_data_connect(admin);
}

static void send_stats(struct raw *raw)
{
    raw_request request;
    Icecache__Wire__Stats stats = ICECACHE__WIRE__STATS__INIT;
    raw_request_init(raw, &request);
    request.body_case = ICECACHE__WIRE__REQUEST__BODY_STATS;
    request.stats = &stats;
    raw_send(raw, &request, NULL, 0);
}

// admin_flood SOCKETS: keeps 200 requests for statistics in flight.
static int run_admin_flood(int argc, char **argv)
{
    struct raw admin;
    assert_int_equal(argc, 2);
    admin_open(&admin, argv[1]);
    for (uint32_t i = 0; i < 200; i++)
        send_stats(&admin);
    say_begun();
    uint64_t served = 0;
    while (!input_ended()) {
        raw_reply *reply = raw_receive_try(&admin, 1000);
        if (!reply)
            continue;
        served += reply->status == ICE_OK;
        raw_free(reply);
        send_stats(&admin);
    }
    printf("%llu\n", (unsigned long long)served);
    fflush(stdout);
    raw_close(&admin);
    return 0;
}

// deaf SOCKETS: asks and never reads.
static int run_deaf(int argc, char **argv)
{
    struct hostile hostile;
    assert_int_equal(argc, 2);
    hostile_open(&hostile, argv[1], LENGTH);
    say_begun();
    for (uint32_t i = 0; !input_ended(); i++) {
        if (i < 20000)
            send_stats(&hostile.raw);
        sleep_us(1000); // not so fast that it would be a flood, also where all are refused
    }
    raw_close(&hostile.raw);
    return 0;
}

static void send_noise(struct hostile *hostile, uint64_t *random)
{
    uint8_t noise[256];
    for (size_t i = 0; i < sizeof noise; i++)
        noise[i] = (uint8_t)random_next(random);
    const void *const frames[] = {noise, noise, noise};
    const size_t sizes[] = {random_below(random, sizeof noise), random_below(random, sizeof noise), 3};
    raw_send_frames(&hostile->raw, frames, sizes, 1 + random_below(random, 3));
}

// An append that leaves a gap, one that overwrites, a close of what is not open.
static void send_out_of_order(struct hostile *hostile, uint64_t *random)
{
    raw_request request;
    Icecache__Wire__Append append = ICECACHE__WIRE__APPEND__INIT;
    Icecache__Wire__SequenceClose closing = ICECACHE__WIRE__SEQUENCE_CLOSE__INIT;
    append.sequence_id = hostile->sequence;
    append.layers = 1;
    append.tokens = 1 + (uint32_t)random_below(random, 50);
    append.first = random_below(random, 2) ? LENGTH + 1 + random_below(random, 1000) : random_below(random, LENGTH);
    append.staging_offset = random_below(random, 2) ? 0 : 4096 * random_below(random, 2000);
    closing.sequence_id = hostile->sequence + 1 + random_below(random, 1000);
    raw_request_init(&hostile->raw, &request);
    request.body_case = ICECACHE__WIRE__REQUEST__BODY_APPEND;
    request.append = &append;
    if (random_below(random, 4) == 0) {
        request.body_case = ICECACHE__WIRE__REQUEST__BODY_SEQUENCE_CLOSE;
        request.sequence_close = &closing;
    }
    raw_send(&hostile->raw, &request, NULL, 0);
}

// garbage SOCKETS SEED: noise, what is out of order, and the same retrieve again and again.
static int run_garbage(int argc, char **argv)
{
    struct hostile hostile;
    assert_int_equal(argc, 3);
    uint64_t random = strtoull(argv[2], NULL, 10);
    hostile_open(&hostile, argv[1], LENGTH);
    say_begun();
    while (!input_ended()) {
        for (uint32_t i = 0; i < 16; i++) {
            send_noise(&hostile, &random);
            send_out_of_order(&hostile, &random);
            send_retrieve(&hostile, 3, 1, 0);
        }
        drain(&hostile.raw);
        sleep_us(500);
    }
    raw_close(&hostile.raw);
    return 0;
}

// vanish SOCKETS: opens, appends, asks, and is gone before the answer; again and again.
static int run_vanish(int argc, char **argv)
{
    assert_int_equal(argc, 2);
    say_begun();
    while (!input_ended()) {
        struct hostile hostile;
        hostile_open(&hostile, argv[1], LENGTH);
        for (uint32_t row = 0; row < 16; row++)
            send_retrieve(&hostile, row, QUERIES, 0);
        sleep_us(2000); // until the daemon has them
        raw_close(&hostile.raw);
    }
    return 0;
}

// hoard SOCKETS: opens sequences and landings until it gets no more, and keeps them.
static int run_hoard(int argc, char **argv)
{
    struct hostile hostile;
    assert_int_equal(argc, 2);
    hostile_open(&hostile, argv[1], LENGTH);
    ice_client *client = client_connect(argv[1], 0, 0);
    const struct ice_sequence_options sequences = sequence_options(&shape);
    const struct ice_landing_shape landings = landing_shape(&shape, 1, 16);
    ice_sequence *sequence;
    ice_landing *landing;
    ice_status status;
    uint32_t count = 0;
    while ((status = ice_sequence_open(client, &sequences, 0, &sequence)) == ICE_OK)
        assert_true(++count < 1000);
    assert_refused(status, ICE_LIMIT, "--sequences-max");
    while ((status = ice_landing_open(client, &landings, 0, &landing)) == ICE_OK)
        assert_true(++count < 2000);
    assert_refused(status, ICE_LIMIT, "--landings-max");
    say_begun();
    while (!input_ended())
        sleep_us(1000);
    _exit(0); // without closing anything
}

// spin SOCKETS: uses a CPU.
static int run_spin(int argc, char **argv)
{
    (void)argc;
    (void)argv;
    say_begun();
    while (!input_ended())
        for (volatile uint32_t i = 0; i < 100000; i++)
            ;
    return 0;
}

static void start(struct child *child, const struct daemon *daemon, const char *role, const char *first,
                  const char *second)
{
    const char *arguments[] = {role, daemon->sockets, first, second, NULL};
    char line[64];
    child_start_role(child, arguments);
    assert_true(child_read_line(child, line, sizeof line));
    assert_string_equal(line, "begun");
}

static void end(struct child *child)
{
    child_close_input(child);
    child_expect_exit(child, 0);
}

// ---- the worker that behaves ----

struct good {
    struct history history;
    struct worker worker;
    uint64_t alone_us, contended_us; // p99
    struct stats_held held;
};

static int compare(const void *a, const void *b)
{
    const uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return x < y ? -1 : x > y;
}

static uint64_t p99_us(struct good *good)
{
    static uint64_t times[RETRIEVES];
    for (uint32_t i = 0; i < RETRIEVES; i++) {
        struct retrieve retrieve;
        struct ice_retrieve_result result;
        retrieve_init(&retrieve, &good->worker, &good->history, 0, LENGTH - 1, 1);
        retrieve_ends(&retrieve, BUDGET, SINKS, WINDOW);
        const uint64_t from = now_us();
        assert_ok(ice_retrieve(good->worker.client, &retrieve.options, &result));
        times[i] = now_us() - from;
        assert_false(result.partial);
        retrieve_fini(&retrieve);
        sleep_us(500); // as a model's step would
    }
    landing_check(good->worker.landing, 0, 0, &good->history, SLOTS, LENGTH);
    qsort(times, RETRIEVES, sizeof *times, compare);
    return times[RETRIEVES * 99 / 100];
}

static void good_open(struct good *good, const struct daemon *daemon)
{
    struct child spin[SPINNERS]; // as many as the daemon's shards and the hostile worker use
    history_create(&good->history, &shape, LENGTH, 71);
    worker_open(&good->worker, daemon->sockets, &shape, 1, SLOTS);
    worker_append(&good->worker, &good->history, 0, LENGTH);
    worker_wait_idle(&good->worker);
    good->alone_us = p99_us(good);
    stats_held(daemon, &good->held);
    for (uint32_t i = 0; i < SPINNERS; i++)
        start(&spin[i], daemon, "spin", NULL, NULL);
    good->contended_us = p99_us(good);
    for (uint32_t i = 0; i < SPINNERS; i++)
        end(&spin[i]);
}

static void good_close(struct good *good)
{
    worker_close(&good->worker);
    history_destroy(&good->history);
}

static void expect_served(struct good *good, const char *beside)
{
    const uint64_t base = good->alone_us > good->contended_us ? good->alone_us : good->contended_us;
    const uint64_t us = p99_us(good), most = TIMES_WORSE * base + SLACK_US;
    print_message("p99 of retrieves: alone %llu us, beside a busy CPU %llu us, beside %s %llu us\n",
                  (unsigned long long)good->alone_us, (unsigned long long)good->contended_us, beside,
                  (unsigned long long)us);
    if (us > most)
        fail_msg("beside %s the p99 is %llu us, more than %llu", beside, (unsigned long long)us,
                 (unsigned long long)most);
}

static uint64_t count_of(const struct daemon *daemon, const char *name)
{
    char path[64];
    snprintf(path, sizeof path, "service.%s", name);
    json_t *stats = stats_read(daemon);
    const uint64_t count = stats_number(stats, path);
    json_decref(stats);
    return count;
}

static void expect_logged(const struct daemon *daemon, const char *text)
{
    static char log[1 << 20];
    daemon_read_log(daemon, log, sizeof log);
    assert_text(log, text);
}

// ---- the tests ----

static void a_flood_of_retrieves(void **state)
{
    const struct daemon *daemon = *state;
    struct child child;
    struct good good;
    good_open(&good, daemon);
    start(&child, daemon, "flood", NULL, NULL);
    expect_served(&good, "a flood");
    const uint64_t until = now_us() + TEST_DEADLINE_US;
    while (count_of(daemon, "ended_flood") == 0) // it is not yet, where the machine is slow
        assert_true(now_us() < until);
    assert_true(count_of(daemon, "refused_inflight") > 0);
    expect_logged(daemon, "keeps sending requests beyond --inflight-max");
    expect_served(&good, "a flood of no session");
    assert_true(count_of(daemon, "refused_strangers") > 0);
    stats_wait(daemon, &good.held, GIVEN_BACK_US); // although its process goes on
    end(&child);
    good_close(&good);
}

// As many heavy retrieves as a session may have in flight: they wait for each other, not the other session for them.
static void a_greedy_session(void **state)
{
    const struct daemon *daemon = *state;
    struct child child;
    struct good good;
    good_open(&good, daemon);
    start(&child, daemon, "greedy", "256", "600000000");
    expect_served(&good, "256 heavy retrieves in flight");
    child_close_input(&child);
    char line[64];
    assert_true(child_read_line(&child, line, sizeof line));
    assert_true(strtoull(line, NULL, 10) > 0); // it is served, too
    child_expect_exit(&child, 0);
    stats_wait(daemon, &good.held, GIVEN_BACK_US);
    good_close(&good);
}

// Two sessions that ask for more than there is get as much as each other, whatever they have in flight.
static void equal_shares(void **state)
{
    const struct daemon *daemon = *state;
    struct child few, many;
    unsigned long long served[2];
    start(&many, daemon, "greedy", "64", "600000000");
    start(&few, daemon, "greedy", "4", "600000000");
    const uint64_t until = now_us() + 2 * TEST_DEADLINE_US;
    for (uint64_t retrieves = 0; retrieves < SHARED; sleep_us(100000)) {
        json_t *stats = stats_read(daemon);
        retrieves = stats_number(stats, "retrieves");
        json_decref(stats);
        assert_true(now_us() < until);
    }
    child_close_input(&few);
    child_close_input(&many);
    char line[64];
    assert_true(child_read_line(&few, line, sizeof line));
    served[0] = strtoull(line, NULL, 10);
    assert_true(child_read_line(&many, line, sizeof line));
    served[1] = strtoull(line, NULL, 10);
    child_expect_exit(&few, 0);
    child_expect_exit(&many, 0);
    print_message("served with 4 in flight: %llu, with 64: %llu\n", served[0], served[1]);
    assert_true(2 * served[0] + 64 >= served[1]); // in order of arrival: a sixteenth; the many were there first
}

static void a_flood_of_statistics(void **state)
{
    const struct daemon *daemon = *state;
    struct child child;
    struct good good;
    good_open(&good, daemon);
    start(&child, daemon, "admin_flood", NULL, NULL);
    expect_served(&good, "a flood of statistics");
    child_close_input(&child);
    char line[64];
    assert_true(child_read_line(&child, line, sizeof line));
    assert_true(strtoull(line, NULL, 10) > 0);
    child_expect_exit(&child, 0);
    good_close(&good);
}

static void a_deaf_worker(void **state)
{
    const struct daemon *daemon = *state;
    struct child child;
    struct good good;
    good_open(&good, daemon);
    start(&child, daemon, "deaf", NULL, NULL);
    expect_served(&good, "a worker that does not read");
    const uint64_t until = now_us() + TEST_DEADLINE_US;
    for (; count_of(daemon, "ended_deaf") == 0; sleep_us(20000))
        assert_true(now_us() < until);
    expect_logged(daemon, "does not read its replies");
    stats_wait(daemon, &good.held, GIVEN_BACK_US);
    end(&child);
    good_close(&good);
}

static void garbage(void **state)
{
    const struct daemon *daemon = *state;
    struct child child;
    struct good good;
    char seed[32];
    snprintf(seed, sizeof seed, "%llu", (unsigned long long)random_seed("garbage"));
    good_open(&good, daemon);
    start(&child, daemon, "garbage", seed, NULL);
    expect_served(&good, "garbage");
    assert_true(count_of(daemon, "refused_messages") > 0);
    end(&child);
    stats_wait(daemon, &good.held, GIVEN_BACK_US);
    good_close(&good);
}

static void gone_in_the_middle(void **state)
{
    const struct daemon *daemon = *state;
    struct child child;
    struct good good;
    good_open(&good, daemon);
    start(&child, daemon, "vanish", NULL, NULL);
    expect_served(&good, "workers that hang up");
    end(&child);
    stats_wait(daemon, &good.held, GIVEN_BACK_US);
    assert_true(count_of(daemon, "ended_mid_request") > 0);
    assert_true(count_of(daemon, "requests_abandoned") > 0);
    good_close(&good);
}

static void a_hoard(void **state)
{
    const struct daemon *daemon = *state;
    struct child child;
    struct good good;
    good_open(&good, daemon);
    start(&child, daemon, "hoard", NULL, NULL);
    expect_served(&good, "a worker that frees nothing");
    end(&child);
    stats_wait(daemon, &good.held, GIVEN_BACK_US);
    good_close(&good);
}

// ---- admission ----

// A session with more than its share of what may be in flight is refused, in words and at once; another never.
static void a_full_queue(void **state)
{
    const struct daemon *daemon = *state;
    struct child child;
    struct good good;
    good_open(&good, daemon);
    start(&child, daemon, "greedy", "64", "600000000"); // it sends again what is refused
    expect_served(&good, "a full queue");               // and is never refused
    assert_true(count_of(daemon, "refused_overload") > 0);
    end(&child);
    stats_wait(daemon, &good.held, GIVEN_BACK_US);
    good_close(&good);
}

// What would wait for longer than its deadline is refused when it comes, and what is taken on is served.
static void no_time(void **state)
{
    const struct daemon *daemon = *state;
    struct child child;
    start(&child, daemon, "greedy", "256", "40000");
    const uint64_t until = now_us() + TEST_DEADLINE_US;
    while (count_of(daemon, "refused_deadline") == 0)
        assert_true(now_us() < until);
    child_close_input(&child);
    char line[64];
    assert_true(child_read_line(&child, line, sizeof line));
    char *rest;
    assert_true(strtoull(line, &rest, 10) > 0 && strtoull(rest, NULL, 10) > 0); // served, refused
    child_expect_exit(&child, 0);
}

// ---- deadlines ----

static int compare_positions(const void *a, const void *b)
{
    const uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return x < y ? -1 : x > y;
}

// Sinks and window are among the positions of each head, and nothing twice.
static void expect_ends(const Icecache__Wire__RetrieveReply *reply)
{
    const uint32_t *positions = reply->positions;
    for (size_t head = 0; head < reply->n_counts; positions += reply->counts[head++]) {
        uint32_t sorted[SLOTS], count = reply->counts[head];
        assert_in_range(count, SINKS + WINDOW, SLOTS);
        memcpy(sorted, positions, count * sizeof *sorted);
        qsort(sorted, count, sizeof *sorted, compare_positions);
        for (uint32_t i = 1; i < count; i++)
            assert_true(sorted[i - 1] < sorted[i]);
        for (uint32_t i = 0; i < SINKS; i++)
            assert_int_equal(sorted[i], i);
        for (uint32_t i = 0; i < WINDOW; i++)
            assert_int_equal(sorted[count - 1 - i], LENGTH - 1 - i);
    }
}

// A deadline that no search can keep: at once sinks and window, and what the row has.
static void far_too_short(void **state)
{
    const struct daemon *daemon = *state;
    struct hostile hostile;
    hostile_open(&hostile, daemon->sockets, LENGTH);
    const uint64_t from = now_us();
    for (uint32_t i = 0; i < 100; i++) {
        send_retrieve(&hostile, i, 1, 1); // a row that has nothing
        raw_reply *reply = raw_receive(&hostile.raw);
        assert_int_equal(reply->status, ICE_OK);
        assert_true(reply->retrieve->partial);
        expect_ends(reply->retrieve);
        for (size_t head = 0; head < reply->retrieve->n_counts; head++)
            assert_int_equal(reply->retrieve->counts[head], SINKS + WINDOW);
        raw_free(reply);
    }
    assert_true(now_us() - from < 5000000);
    assert_int_equal(count_of(daemon, "retrieves_late"), 100);
    assert_int_equal(count_of(daemon, "deadlines_missed"), 100);

    send_retrieve(&hostile, 200, 1, 0); // a selection, and the same row without time
    raw_reply *whole = raw_receive(&hostile.raw);
    assert_int_equal(whole->status, ICE_OK);
    assert_false(whole->retrieve->partial);
    send_retrieve(&hostile, 200, 1, 1);
    raw_reply *again = raw_receive(&hostile.raw);
    assert_true(again->status == ICE_OK && again->retrieve->partial);
    expect_ends(again->retrieve);
    assert_int_equal(again->retrieve->bytes_moved, 0); // it was all there
    assert_int_equal(again->retrieve->n_positions, whole->retrieve->n_positions);
    assert_memory_equal(again->retrieve->positions, whole->retrieve->positions,
                        whole->retrieve->n_positions * sizeof *whole->retrieve->positions);
    raw_free(whole);
    raw_free(again);
    raw_close(&hostile.raw);
}

// The daemon stands still while retrieves wait: those whose deadline passes are answered with what can be had, bit for
// bit that of its positions.
static void late_by_a_pause(void **state)
{
    const struct daemon *daemon = *state;
    struct good good;
    ice_ticket *tickets[8];
    bool late = false;
    history_create(&good.history, &shape, LENGTH, 73);
    worker_open(&good.worker, daemon->sockets, &shape, 8, SLOTS);
    worker_append(&good.worker, &good.history, 0, LENGTH);
    worker_wait_idle(&good.worker);
    for (uint32_t round = 0; round < 200 && !late; round++) {
        for (uint32_t i = 0; i < 8; i++) {
            struct retrieve retrieve;
            retrieve_init(&retrieve, &good.worker, &good.history, 0, LENGTH - QUERIES, QUERIES);
            retrieve_ends(&retrieve, BUDGET, SINKS, WINDOW);
            retrieve.row = i;
            retrieve.options.deadline_us = 40000;
            assert_ok(ice_retrieve_submit(good.worker.client, &retrieve.options, &tickets[i]));
            retrieve_fini(&retrieve);
        }
        sleep_us(random_below(&(uint64_t){round}, 1500));
        daemon_signal(daemon, SIGSTOP);
        sleep_us(60000);
        daemon_signal(daemon, SIGCONT);
        for (uint32_t i = 0; i < 8; i++) {
            struct ice_retrieve_result result;
            struct ice_landing_view view;
            ice_status status = ice_retrieve_wait(tickets[i], TEST_DEADLINE_US, &result);
            if (status == ICE_OVERLOADED) { // the daemon has become careful, and says so in time
                ice_ticket_close(tickets[i]);
                continue;
            }
            assert_ok(status);
            late |= result.partial;
            assert_ok(ice_landing_view(good.worker.landing, i, 0, 0, &view));
            assert_true(view.count >= SINKS + WINDOW && (result.partial || view.count == SLOTS));
            assert_int_equal(result.counts[0], view.count);
            if (result.counts[1] == view.count)
                landing_check(good.worker.landing, i, 0, &good.history, view.count, LENGTH);
            ice_ticket_close(tickets[i]);
        }
    }
    assert_true(late);
    assert_true(count_of(daemon, "deadlines_missed") > 0);
    worker_close(&good.worker);
    history_destroy(&good.history);
}

#define OPTIONS(...)                                                                                                   \
    (const char *const[])                                                                                              \
    {                                                                                                                  \
        "--pool-bytes", "128m", "--index-bytes", "128m", "--shared-bytes", "256m", "--shards", "2", __VA_ARGS__, NULL  \
    }

int main(int argc, char **argv)
{
    static const struct role roles[] = {
        {"flood", run_flood}, {"greedy", run_greedy},   {"admin_flood", run_admin_flood},
        {"deaf", run_deaf},   {"garbage", run_garbage}, {"vanish", run_vanish},
        {"hoard", run_hoard}, {"spin", run_spin},
    };
    int status;
    if (role_run(argc, argv, roles, sizeof roles / sizeof *roles, &status))
        return status;
    const char *const *const plain = OPTIONS("--landings-max", "8", "--sequences-max", "64");
    const char *const *const short_queue = OPTIONS("--decode-queue-max", "4");
    const struct CMUnitTest tests[] = {
        DAEMON_TEST_WITH(a_flood_of_retrieves, plain), DAEMON_TEST_WITH(a_greedy_session, plain),
        DAEMON_TEST_WITH(equal_shares, plain),         DAEMON_TEST_WITH(a_flood_of_statistics, plain),
        DAEMON_TEST_WITH(a_deaf_worker, plain),        DAEMON_TEST_WITH(garbage, plain),
        DAEMON_TEST_WITH(gone_in_the_middle, plain),   DAEMON_TEST_WITH(a_hoard, plain),
        DAEMON_TEST_WITH(a_full_queue, short_queue),   DAEMON_TEST_WITH(no_time, plain),
        DAEMON_TEST_WITH(far_too_short, plain),        DAEMON_TEST_WITH(late_by_a_pause, plain),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
