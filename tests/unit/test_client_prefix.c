// Sealed prefixes through a scripted daemon: what goes into frame 2, what is refused before anything is sent, answers
// that contradict the question, and attached sequences that nobody waited for.
#include "client_setup.h"

#include <sched.h>

#define HOLD(kind) (1u << ICECACHE__WIRE__REQUEST__BODY_##kind)

enum { BLOCK_TOKENS = 16, BLOCKS = 5 };

static uint8_t hashes[BLOCKS][ICE_HASH_BYTES];

static void fill_hashes(void)
{
    for (size_t i = 0; i < sizeof hashes; i++) {
        hashes[i / ICE_HASH_BYTES][i % ICE_HASH_BYTES] = (uint8_t)(i * 7 + 1);
    }
}

static void check_frame(struct fake *fake, size_t count)
{
    assert_int_equal(FAKE_GET(fake, vectors_bytes), count * ICE_HASH_BYTES);
    assert_memory_equal(fake->vectors, hashes, count * ICE_HASH_BYTES);
}

static void seal_sends_the_hashes(void **state)
{
    (void)state;
    struct setup setup = set_up(0, 0);
    struct ice_seal_result result = {0};
    FAKE_SET(setup.fake, prefix_tokens, 3 * BLOCK_TOKENS);
    assert_int_equal(ice_sequence_seal(setup.sequence, hashes, 3, 0, &result), ICE_OK);
    assert_string_equal(ice_last_error(), "");
    assert_int_equal(result.prefix_id, 900);
    assert_int_equal(result.tokens, 48);
    assert_true(result.known);
    check_frame(setup.fake, 3);
    assert_int_equal(FAKE_GET(setup.fake, sealed_sequence), 100); // the first one that was opened
    FAKE_SET(setup.fake, prefix_tokens, BLOCK_TOKENS);
    assert_int_equal(ice_sequence_seal(setup.sequence, hashes, 1, 0, NULL), ICE_OK);
    check_frame(setup.fake, 1);
    tear_down(&setup);
}

static void lookup_says_how_many_tokens(void **state)
{
    (void)state;
    struct setup setup = set_up(0, 0);
    struct ice_sequence_options options = sequence_options();
    uint64_t tokens = 7;
    assert_int_equal(ice_prefix_lookup(setup.client, &options, hashes, BLOCKS, 0, &tokens), ICE_OK);
    assert_int_equal(tokens, 0);
    check_frame(setup.fake, BLOCKS);
    assert_int_equal(FAKE_GET(setup.fake, block_tokens), BLOCK_TOKENS);
    options.block_tokens = 64;
    FAKE_SET(setup.fake, prefix_tokens, 4 * 64);
    assert_int_equal(ice_prefix_lookup(setup.client, &options, hashes, BLOCKS, 0, &tokens), ICE_OK);
    assert_int_equal(tokens, 256);
    assert_int_equal(FAKE_GET(setup.fake, block_tokens), 64);
    tear_down(&setup);
}

static char *last_name_space(struct fake *fake, char name_space[32])
{
    fake_get_text(fake, fake->name_space, name_space, 32);
    return name_space;
}

// Of a whole group, and in which namespace: the options', the client's, or the default.
static void lookup_of_a_group(void **state)
{
    (void)state;
    char name_space[32];
    struct setup setup = set_up(0, 0);
    struct ice_sequence_options options = sequence_options();
    uint64_t tokens = 7;
    FAKE_SET(setup.fake, prefix_tokens, 2 * BLOCK_TOKENS);
    options.name_space = NULL;
    assert_int_equal(ice_prefix_lookup_group(setup.client, &options, hashes, BLOCKS, 0, &tokens), ICE_OK);
    assert_int_equal(tokens, 32);
    assert_true(FAKE_GET(setup.fake, all_ranks));
    assert_string_equal(last_name_space(setup.fake, name_space), "default");
    options.name_space = "tenant";
    assert_int_equal(ice_prefix_lookup(setup.client, &options, hashes, BLOCKS, 0, &tokens), ICE_OK);
    assert_false(FAKE_GET(setup.fake, all_ranks));
    assert_string_equal(last_name_space(setup.fake, name_space), "tenant");
    assert_int_equal(ice_prefix_remove_from(setup.client, "other", 5, 0), ICE_OK);
    assert_string_equal(last_name_space(setup.fake, name_space), "other");
    assert_int_equal(ice_prefix_remove(setup.client, 5, 0), ICE_OK);
    assert_string_equal(last_name_space(setup.fake, name_space), "default");
    assert_int_equal(ice_prefix_remove_from(setup.client, "", 5, 0), ICE_INVALID_ARGUMENT);
    tear_down(&setup);
}

static void bound_client_names_its_namespace(void **state)
{
    (void)state;
    char name_space[32];
    uint64_t tokens = 7;
    struct fake *fake = fake_start();
    struct ice_sequence_options options = sequence_options();
    struct ice_client_options bound = {.socket_directory = fake->directory, .name_space = "mine"};
    ice_client *client = NULL;
    assert_int_equal(ice_client_connect(&bound, &client), ICE_OK);
    fake_get_text(fake, fake->hello_name_space, name_space, sizeof name_space);
    assert_string_equal(name_space, "mine");
    assert_int_equal(ice_prefix_remove(client, 5, 0), ICE_OK);
    assert_string_equal(last_name_space(fake, name_space), "mine");
    options.name_space = NULL;
    assert_int_equal(ice_prefix_lookup(client, &options, hashes, BLOCKS, 0, &tokens), ICE_OK);
    assert_string_equal(last_name_space(fake, name_space), "mine");
    ice_client_close(client);
    fake_stop(fake);
}

static void attached_sequence_goes_on_at_the_prefix(void **state)
{
    (void)state;
    struct setup setup = set_up(0, 0);
    struct ice_sequence_options options = sequence_options();
    ice_sequence *sequence = NULL;
    uint64_t tokens = 0, length = 0;
    FAKE_SET(setup.fake, prefix_tokens, 2 * BLOCK_TOKENS);
    assert_int_equal(ice_sequence_attach(setup.client, &options, hashes, BLOCKS, 40, 0, &sequence, &tokens), ICE_OK);
    assert_int_equal(tokens, 32);
    assert_int_equal(FAKE_GET(setup.fake, tokens_max), 40);
    check_frame(setup.fake, BLOCKS);
    // A refusal by the library tells the length last heard: that of the prefix, in every layer.
    struct ice_kv_source none = {0};
    assert_int_equal(ice_append(sequence, ICE_ALL_LAYERS, 32, 0, &none, 0, &length), ICE_INVALID_ARGUMENT);
    assert_int_equal(length, 32);
    static const uint8_t rows[LAYERS * KV_HEADS * ROW_BYTES];
    struct ice_kv_source one = {rows, rows, sizeof rows, sizeof rows, KV_HEADS * ROW_BYTES, 0, ROW_BYTES};
    assert_int_equal(ice_append(sequence, ICE_ALL_LAYERS, 32, 1, &one, 0, &length), ICE_OK);
    assert_int_equal(length, 33);
    assert_int_equal(FAKE_GET(setup.fake, appends[0].first), 32);
    struct ice_sequence_info info;
    assert_int_equal(ice_sequence_info(sequence, 0, &info), ICE_OK);
    ice_sequence_close(sequence);
    assert_int_equal(FAKE_GET(setup.fake, sequences_closed), 1);
    assert_int_equal(ice_sequence_attach(setup.client, &options, hashes, 2, 0, 0, &sequence, NULL), ICE_OK);
    tear_down(&setup); // the client closes what is still open
}

static void remove_names_the_prefix(void **state)
{
    (void)state;
    struct setup setup = set_up(0, 0);
    assert_int_equal(ice_prefix_remove(setup.client, UINT64_C(0xfedcba9876543210), 0), ICE_OK);
    assert_true(FAKE_GET(setup.fake, prefix_removed) == UINT64_C(0xfedcba9876543210));
    tear_down(&setup);
}

static void refusals_of_the_daemon_come_through(void **state)
{
    (void)state;
    struct setup setup = set_up(0, 0);
    struct ice_sequence_options options = sequence_options();
    struct ice_seal_result result = {.prefix_id = 4};
    ice_sequence *sequence = NULL;
    uint64_t tokens = 7;
    const ice_status statuses[] = {ICE_UNKNOWN_PREFIX, ICE_DISK_FAILED, ICE_SPILL_FULL, ICE_POSITION_GAP};
    for (size_t i = 0; i < sizeof statuses / sizeof statuses[0]; i++) {
        FAKE_SET(setup.fake, prefix_status, statuses[i]);
        assert_int_equal(ice_sequence_seal(setup.sequence, hashes, 1, 0, &result), statuses[i]);
        assert_string_equal(ice_last_error(), "the disk is not well");
        assert_int_equal(ice_prefix_lookup(setup.client, &options, hashes, 1, 0, &tokens), statuses[i]);
        assert_int_equal(ice_sequence_attach(setup.client, &options, hashes, 1, 0, 0, &sequence, &tokens), statuses[i]);
        assert_int_equal(ice_prefix_remove(setup.client, 5, 0), statuses[i]);
    }
    assert_int_equal(result.prefix_id, 4); // written on success only
    assert_int_equal(tokens, 7);
    assert_null(sequence);
    tear_down(&setup);
}

// A daemon that answers something else than what was asked.
static void answers_that_do_not_fit_are_refused(void **state)
{
    (void)state;
    struct setup setup = set_up(0, 0);
    struct ice_sequence_options options = sequence_options();
    ice_sequence *sequence = NULL;
    uint64_t tokens = 7;
    const uint64_t wrong[] = {BLOCK_TOKENS + 1, 3 * BLOCK_TOKENS, WIRE_TOKENS_MAX + 16};
    for (size_t i = 0; i < sizeof wrong / sizeof wrong[0]; i++) {
        FAKE_SET(setup.fake, prefix_tokens, wrong[i]);
        assert_int_equal(ice_sequence_seal(setup.sequence, hashes, 2, 0, NULL), ICE_BAD_MESSAGE);
        assert_int_equal(ice_prefix_lookup(setup.client, &options, hashes, 2, 0, &tokens), ICE_BAD_MESSAGE);
        assert_int_equal(ice_sequence_attach(setup.client, &options, hashes, 2, 0, 0, &sequence, &tokens),
                         ICE_BAD_MESSAGE);
        assert_true(ice_last_error()[0] != '\0');
    }
    FAKE_SET(setup.fake, prefix_tokens, 0);
    assert_int_equal(ice_sequence_seal(setup.sequence, hashes, 2, 0, NULL), ICE_BAD_MESSAGE);
    assert_int_equal(ice_sequence_attach(setup.client, &options, hashes, 2, 0, 0, &sequence, &tokens), ICE_BAD_MESSAGE);
    // What had been opened is given back (one answer did not even decode).
    assert_int_equal(FAKE_GET(setup.fake, sequences_opened), 1 + 4);
    assert_int_equal(FAKE_GET(setup.fake, sequences_closed), 3);
    FAKE_SET(setup.fake, no_body, true);
    assert_int_equal(ice_sequence_seal(setup.sequence, hashes, 2, 0, NULL), ICE_BAD_MESSAGE);
    assert_int_equal(ice_prefix_lookup(setup.client, &options, hashes, 2, 0, &tokens), ICE_BAD_MESSAGE);
    assert_int_equal(ice_sequence_attach(setup.client, &options, hashes, 2, 0, 0, &sequence, &tokens), ICE_BAD_MESSAGE);
    assert_int_equal(tokens, 7);
    assert_null(sequence);
    tear_down(&setup);
}

#define REFUSED(call, expected, word)                                                                                  \
    do {                                                                                                               \
        assert_int_equal(call, expected);                                                                              \
        assert_non_null(strstr(ice_last_error(), word));                                                               \
    } while (0)

static void arguments_are_checked_first(void **state)
{
    (void)state;
    struct setup setup = set_up(0, 0);
    struct ice_sequence_options options = sequence_options(), bad = options;
    bad.model_digest_bytes = 0;
    ice_client *client = setup.client;
    ice_sequence *sequence = NULL;
    uint64_t tokens = 7;
    REFUSED(ice_sequence_seal(NULL, hashes, 1, 0, NULL), ICE_INVALID_ARGUMENT, "sequence");
    REFUSED(ice_sequence_seal(setup.sequence, NULL, 1, 0, NULL), ICE_INVALID_ARGUMENT, "hashes is NULL");
    REFUSED(ice_sequence_seal(setup.sequence, hashes, 0, 0, NULL), ICE_INVALID_ARGUMENT, "count is 0");
    // This daemon takes a frame of 1 MiB.
    REFUSED(ice_sequence_seal(setup.sequence, hashes, 65537, 0, NULL), ICE_TOO_LARGE, "the limit is 65536");
    REFUSED(ice_sequence_seal(setup.sequence, hashes, SIZE_MAX, 0, NULL), ICE_TOO_LARGE, "the limit is 65536");
    REFUSED(ice_prefix_lookup(NULL, &options, hashes, 1, 0, &tokens), ICE_INVALID_ARGUMENT, "client");
    REFUSED(ice_prefix_lookup(client, NULL, hashes, 1, 0, &tokens), ICE_INVALID_ARGUMENT, "options is NULL");
    REFUSED(ice_prefix_lookup(client, &bad, hashes, 1, 0, &tokens), ICE_INVALID_ARGUMENT, "model_digest");
    REFUSED(ice_prefix_lookup(client, &options, NULL, 1, 0, &tokens), ICE_INVALID_ARGUMENT, "hashes is NULL");
    REFUSED(ice_prefix_lookup(client, &options, hashes, 0, 0, &tokens), ICE_INVALID_ARGUMENT, "count is 0");
    REFUSED(ice_prefix_lookup(client, &options, hashes, 1, 0, NULL), ICE_INVALID_ARGUMENT, "tokens_out is NULL");
    REFUSED(ice_sequence_attach(NULL, &options, hashes, 1, 0, 0, &sequence, NULL), ICE_INVALID_ARGUMENT, "client");
    REFUSED(ice_sequence_attach(client, NULL, hashes, 1, 0, 0, &sequence, NULL), ICE_INVALID_ARGUMENT, "options");
    REFUSED(ice_sequence_attach(client, &bad, hashes, 1, 0, 0, &sequence, NULL), ICE_INVALID_ARGUMENT, "model_digest");
    REFUSED(ice_sequence_attach(client, &options, hashes, 0, 0, 0, &sequence, NULL), ICE_INVALID_ARGUMENT, "count");
    REFUSED(ice_sequence_attach(client, &options, hashes, 1, 0, 0, NULL, NULL), ICE_INVALID_ARGUMENT, "out is NULL");
    REFUSED(ice_sequence_attach(client, &options, hashes, 1, WIRE_TOKENS_MAX + 1, 0, &sequence, NULL), ICE_TOO_LARGE,
            "tokens_max");
    options.block_tokens = WIRE_BLOCK_TOKENS_MAX; // 4096 of them fill a sequence
    REFUSED(ice_sequence_attach(client, &options, hashes, 4097, 0, 0, &sequence, NULL), ICE_TOO_LARGE,
            "blocks of 4096 tokens");
    REFUSED(ice_prefix_remove(NULL, 1, 0), ICE_INVALID_ARGUMENT, "client");
    assert_null(sequence);
    assert_int_equal(tokens, 7);
    assert_int_equal(FAKE_GET(setup.fake, vectors_bytes), 0); // nothing of it was sent
    assert_int_equal(FAKE_GET(setup.fake, sequences_opened), 1);
    tear_down(&setup);
}

static void late_attach_is_given_back(void **state)
{
    (void)state;
    struct setup setup = set_up(0, 0);
    struct ice_sequence_options options = sequence_options();
    ice_sequence *sequence = NULL;
    FAKE_SET(setup.fake, prefix_tokens, BLOCK_TOKENS);
    FAKE_SET(setup.fake, hold, HOLD(ATTACH));
    assert_int_equal(ice_sequence_attach(setup.client, &options, hashes, 1, 0, 20000, &sequence, NULL), ICE_TIMEOUT);
    assert_null(sequence);
    fake_wait_held(setup.fake, 1);
    fake_do(setup.fake, FAKE_ANSWER, 0);
    FAKE_SET(setup.fake, hold, 0);
    uint64_t tokens;
    while (FAKE_GET(setup.fake, sequences_closed) == 0) { // any call takes in what has arrived
        assert_int_equal(ice_prefix_lookup(setup.client, &options, hashes, 1, 0, &tokens), ICE_OK);
        sched_yield();
    }
    assert_int_equal(FAKE_GET(setup.fake, sequences_closed), 1);
    tear_down(&setup);
}

// Answers the third held request, four default deadlines after it came.
static void *answer_late(void *argument)
{
    struct fake *fake = argument;
    fake_wait_held(fake, 3);
    (void)usleep(120000);
    fake_do(fake, FAKE_ANSWER, 2);
    return NULL;
}

// Sealing is slower than anything else: the client's default deadline is not its own.
static void seal_outlives_the_default_deadline(void **state)
{
    (void)state;
    struct setup setup = set_up(30000, 0);
    FAKE_SET(setup.fake, prefix_tokens, BLOCK_TOKENS);
    FAKE_SET(setup.fake, hold, HOLD(SEAL) | HOLD(PREFIX_REMOVE));
    assert_int_equal(ice_prefix_remove(setup.client, 1, 0), ICE_TIMEOUT); // this one is
    const uint64_t begin_us = now_us();
    assert_int_equal(ice_sequence_seal(setup.sequence, hashes, 1, 50000, NULL), ICE_TIMEOUT);
    assert_true(now_us() - begin_us >= 50000);
    pthread_t thread;
    assert_int_equal(pthread_create(&thread, NULL, answer_late, setup.fake), 0);
    assert_int_equal(ice_sequence_seal(setup.sequence, hashes, 1, 0, NULL), ICE_OK);
    assert_int_equal(pthread_join(thread, NULL), 0);
    FAKE_SET(setup.fake, hold, 0);
    tear_down(&setup);
}

int main(void)
{
    fill_hashes();
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(seal_sends_the_hashes),
        cmocka_unit_test(lookup_says_how_many_tokens),
        cmocka_unit_test(lookup_of_a_group),
        cmocka_unit_test(bound_client_names_its_namespace),
        cmocka_unit_test(attached_sequence_goes_on_at_the_prefix),
        cmocka_unit_test(remove_names_the_prefix),
        cmocka_unit_test(refusals_of_the_daemon_come_through),
        cmocka_unit_test(answers_that_do_not_fit_are_refused),
        cmocka_unit_test(arguments_are_checked_first),
        cmocka_unit_test(late_attach_is_given_back),
        cmocka_unit_test(seal_outlives_the_default_deadline),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
