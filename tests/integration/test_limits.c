// Caps on bytes and counts: a clear refusal before anything is taken, nothing half-done, and the service goes on.
#include "worker.h"

#include <signal.h>
#include <stdlib.h>
#include <string.h>

static const struct shape shape = {2, 2, 4, 64, ICE_BF16};

#define OPTIONS(...)                                                                                                   \
    (const char *const[])                                                                                              \
    {                                                                                                                  \
        "--shards", "2", "--log-level", "debug", __VA_ARGS__, NULL                                                     \
    }

static ice_status append_some(ice_sequence *sequence, const struct history *history, uint64_t first, uint64_t n,
                              uint64_t *length)
{
    const struct ice_kv_source source = history_source(history, ICE_ALL_LAYERS, first);
    return ice_append(sequence, ICE_ALL_LAYERS, first, n, &source, 0, length);
}

// Clustering may wait for memory here, so nobody waits for it.
static void check_length(ice_sequence *sequence, uint64_t length)
{
    struct ice_sequence_info info;
    assert_ok(ice_sequence_info(sequence, 0, &info));
    assert_int_equal(info.length, length);
    assert_int_equal(info.length_min, length);
    assert_true((info.pages == 0) == (length == 0));
    assert_true((info.pool_bytes == 0) == (length == 0));
}

// Appends parts of `step` until the daemon refuses; answers the length reached.
static uint64_t fill(ice_sequence *sequence, const struct history *history, uint64_t step, ice_status expected,
                     const char *text)
{
    for (uint64_t first = 0;; first += step) {
        uint64_t length = 0;
        assert_true(first + step <= history->length);
        ice_status status = append_some(sequence, history, first, step, &length);
        if (status == ICE_OK)
            continue;
        assert_refused(status, expected, text);
        assert_int_equal(length, first);
        check_length(sequence, first);
        return first;
    }
}

// What a full pool or index must not disturb, and what must work again when another sequence is closed.
static void check_full(const struct daemon *daemon, ice_status expected, const char *text)
{
    struct history history;
    struct worker worker;
    struct retrieve retrieve;
    struct stats_held empty;
    uint64_t length = 0;
    history_create(&history, &shape, 12000, 79);
    worker_open(&worker, daemon->sockets, &shape, 1, 300);
    worker_append(&worker, &history, 0, 10); // opens the staging area
    ice_sequence_close(worker.sequence);
    stats_held(daemon, &empty);
    worker.sequence = sequence_open(worker.client, &shape);
    ice_sequence *other = sequence_open(worker.client, &shape);
    // Its first part would fit, but not the whole: refused before anything is appended.
    assert_refused(append_some(other, &history, 0, 12000, &length), expected, text);
    assert_int_equal(length, 0);
    check_length(other, 0);
    uint64_t held = fill(worker.sequence, &history, 100, expected, text);
    assert_true(held >= 300);
    assert_refused(append_some(other, &history, 0, 2000, &length), expected, text);
    assert_int_equal(length, 0);
    check_length(other, 0);
    // What is there is served; an equal append again is accepted.
    retrieve_init(&retrieve, &worker, &history, 1, held - 1, 1);
    assert_ok(ice_retrieve(worker.client, &retrieve.options, NULL));
    landing_check(worker.landing, 0, 1, &history, 300, held);
    retrieve_fini(&retrieve);
    assert_ok(append_some(worker.sequence, &history, 0, held, &length));
    assert_int_equal(length, held);
    // Closing gives back: the other one gets on. (Not as far at once: a token takes more until it is clustered.)
    ice_sequence_close(worker.sequence);
    worker.sequence = other;
    assert_ok(append_some(other, &history, 0, held / 8, &length));
    retrieve_init(&retrieve, &worker, &history, 0, held / 8 - 1, 1);
    assert_ok(ice_retrieve(worker.client, &retrieve.options, NULL));
    retrieve_fini(&retrieve);
    ice_sequence_close(worker.sequence);
    worker.sequence = NULL;
    stats_wait(daemon, &empty, 1000000);
    worker_close(&worker);
    history_destroy(&history);
}

static void pool_full(void **state)
{
    check_full(*state, ICE_POOL_FULL, "raise --pool-bytes");
}

static void index_full(void **state)
{
    check_full(*state, ICE_INDEX_FULL, "raise --index-bytes");
}

// A step that rides along is refused as a whole too, and the token is not half there.
static void riding_step_at_the_cap(void **state)
{
    const struct daemon *daemon = *state;
    struct history history;
    struct worker worker;
    history_create(&history, &shape, 12000, 83);
    worker_open(&worker, daemon->sockets, &shape, 1, 300);
    uint64_t length = fill(worker.sequence, &history, 16, ICE_POOL_FULL, "--pool-bytes");
    uint64_t positions[] = {length, length};
    ice_status status = ICE_OK;
    while (status == ICE_OK) {
        for (uint32_t layer = 0; layer < shape.layers && status == ICE_OK; layer++) {
            struct retrieve retrieve;
            retrieve_init(&retrieve, &worker, &history, layer, positions[layer], 1);
            retrieve_ride(&retrieve, &history);
            status = ice_retrieve(worker.client, &retrieve.options, NULL);
            positions[layer] += status == ICE_OK;
            retrieve_fini(&retrieve);
        }
    }
    assert_status(status, ICE_POOL_FULL);
    struct ice_sequence_info info;
    assert_ok(ice_sequence_info(worker.sequence, 0, &info));
    assert_int_equal(info.length, positions[0]);
    assert_int_equal(info.length_min, positions[1]);
    worker_close(&worker);
    history_destroy(&history);
}

// ---- shared memory ----

static void shared_full(void **state)
{
    const struct daemon *daemon = *state;
    ice_client *client = client_connect(daemon->sockets, 0, 2u << 20);
    const struct ice_landing_shape large = landing_shape(&shape, 64, 4096);
    ice_landing *landing = NULL, *landings[64];
    assert_refused(ice_landing_open(client, &large, 0, &landing), ICE_SHARED_FULL, "raise --shared-bytes");
    assert_null(landing);
    uint32_t count = 0;
    const struct ice_landing_shape small = landing_shape(&shape, 4, 256); // 1 MiB and some
    ice_status status;
    while ((status = ice_landing_open(client, &small, 0, &landings[count])) == ICE_OK)
        assert_true(++count < 64);
    assert_refused(status, ICE_SHARED_FULL, "raise --shared-bytes");
    assert_true(count >= 4 && count <= 8);
    // The staging area does not fit either; where a landing goes, it does.
    struct history history;
    history_create(&history, &shape, 100, 89);
    ice_sequence *sequence = sequence_open(client, &shape);
    assert_refused(append_some(sequence, &history, 0, 100, NULL), ICE_SHARED_FULL, "staging");
    ice_landing_close(landings[--count]);
    ice_landing_close(landings[--count]);
    assert_ok(append_some(sequence, &history, 0, 100, NULL));
    while (count > 0)
        ice_landing_close(landings[--count]);
    ice_client_close(client);
    history_destroy(&history);
}

static void staging_too_large(void **state)
{
    const struct daemon *daemon = *state;
    struct history history;
    history_create(&history, &shape, 100, 89);
    ice_client *client = client_connect(daemon->sockets, 0, 4u << 20);
    ice_sequence *sequence = sequence_open(client, &shape);
    assert_refused(append_some(sequence, &history, 0, 100, NULL), ICE_TOO_LARGE, "--staging-bytes-max");
    ice_client_close(client);
    client = client_connect(daemon->sockets, 0, 1u << 20);
    sequence = sequence_open(client, &shape);
    assert_ok(append_some(sequence, &history, 0, 100, NULL));
    ice_client_close(client);
    history_destroy(&history);
}

// A staging area in which not even one token of all layers fits.
static void staging_too_small(void **state)
{
    const struct daemon *daemon = *state;
    struct history history;
    history_create(&history, &shape, 10, 89);
    ice_client *client = client_connect(daemon->sockets, 0, 1024);
    ice_sequence *sequence = sequence_open(client, &shape);
    assert_refused(append_some(sequence, &history, 0, 10, NULL), ICE_TOO_LARGE, "raise the client's staging_bytes");
    const struct ice_kv_source source = history_source(&history, 0, 0);
    assert_ok(ice_append(sequence, 0, 0, 10, &source, 0, NULL)); // one layer fits, token by token
    ice_client_close(client);
    history_destroy(&history);
}

// ---- counts ----

static void sessions_max(void **state)
{
    const struct daemon *daemon = *state;
    const struct ice_client_options options = {.socket_directory = daemon->sockets};
    ice_client *clients[2], *third = NULL;
    clients[0] = client_connect(daemon->sockets, 0, 0);
    clients[1] = client_connect(daemon->sockets, 0, 0);
    assert_refused(ice_client_connect(&options, &third), ICE_LIMIT, "--sessions-max");
    assert_null(third);
    ice_client_close(clients[1]);
    uint64_t until = now_us() + 1000000;
    ice_status status;
    while ((status = ice_client_connect(&options, &clients[1])) == ICE_LIMIT && now_us() < until)
        sleep_us(1000);
    assert_ok(status);
    ice_client_close(clients[0]);
    ice_client_close(clients[1]);
}

static void sequences_max(void **state)
{
    const struct daemon *daemon = *state;
    const struct ice_sequence_options options = sequence_options(&shape);
    ice_client *client = client_connect(daemon->sockets, 0, 0);
    ice_sequence *sequences[3], *fourth = NULL;
    for (uint32_t i = 0; i < 3; i++)
        sequences[i] = sequence_open(client, &shape);
    assert_refused(ice_sequence_open(client, &options, 0, &fourth), ICE_LIMIT, "--sequences-max");
    assert_null(fourth);
    ice_sequence_close(sequences[1]);
    assert_ok(ice_sequence_open(client, &options, 0, &fourth));
    ice_client_close(client);
}

static void landings_max(void **state)
{
    const struct daemon *daemon = *state;
    const struct ice_landing_shape options = landing_shape(&shape, 1, 64);
    ice_client *client = client_connect(daemon->sockets, 0, 0);
    ice_landing *landings[2], *third = NULL;
    landings[0] = landing_open(client, &shape, 1, 64);
    landings[1] = landing_open(client, &shape, 1, 64);
    assert_refused(ice_landing_open(client, &options, 0, &third), ICE_LIMIT, "--landings-max");
    ice_landing_close(landings[0]);
    assert_ok(ice_landing_open(client, &options, 0, &third));
    ice_client_close(client);
}

static void inflight_max(void **state)
{
    const struct daemon *daemon = *state;
    struct history history;
    struct worker worker;
    ice_ticket *tickets[8];
    uint32_t refused = 0, served = 0;
    history_create(&history, &shape, 6000, 97);
    worker_open(&worker, daemon->sockets, &shape, 8, 300);
    worker_append(&worker, &history, 0, 6000);
    daemon_signal(daemon, SIGSTOP); // all eight are there before the first can be served
    for (uint32_t i = 0; i < 8; i++) {
        struct retrieve retrieve;
        retrieve_init(&retrieve, &worker, &history, 0, 5900, 100);
        retrieve.row = i;
        assert_ok(ice_retrieve_submit(worker.client, &retrieve.options, &tickets[i]));
        retrieve_fini(&retrieve);
    }
    daemon_signal(daemon, SIGCONT);
    for (uint32_t i = 0; i < 8; i++) {
        ice_status status = ice_retrieve_wait(tickets[i], 0, NULL);
        refused += status == ICE_QUEUE_FULL;
        served += status == ICE_OK;
        if (status == ICE_QUEUE_FULL)
            assert_text(ice_last_error(), "wait for replies");
        ice_ticket_close(tickets[i]);
    }
    assert_int_equal(refused + served, 8);
    assert_true(refused > 0 && served >= 4);
    worker_close(&worker);
    history_destroy(&history);
}

static void tokens_max(void **state)
{
    const struct daemon *daemon = *state;
    struct history history;
    struct retrieve retrieve;
    struct worker worker;
    uint64_t length = 0;
    history_create(&history, &shape, 1100, 101);
    worker_open(&worker, daemon->sockets, &shape, 1, 300);
    struct ice_sequence_options options = sequence_options(&shape);
    options.max_tokens = 500;
    ice_sequence *bounded = NULL;
    assert_ok(ice_sequence_open(worker.client, &options, 0, &bounded));
    assert_refused(append_some(bounded, &history, 0, 501, &length), ICE_TOO_LARGE, "the sequence may have 500");
    assert_int_equal(length, 0);
    assert_ok(append_some(bounded, &history, 0, 500, &length));
    assert_refused(append_some(bounded, &history, 500, 1, &length), ICE_TOO_LARGE, "ends at 501 tokens");
    assert_int_equal(length, 500);
    assert_refused(append_some(worker.sequence, &history, 0, 1001, &length), ICE_TOO_LARGE, "--tokens-max");
    assert_ok(append_some(worker.sequence, &history, 0, 1000, &length));
    retrieve_init(&retrieve, &worker, &history, 0, 1000, 1);
    retrieve_ride(&retrieve, &history);
    assert_refused(ice_retrieve(worker.client, &retrieve.options, NULL), ICE_TOO_LARGE, "--tokens-max");
    retrieve_fini(&retrieve);
    check_length(worker.sequence, 1000);
    ice_sequence_close(bounded);
    worker_close(&worker);
    history_destroy(&history);
}

int main(void)
{
    const char *const *const small_pool =
        OPTIONS("--pool-bytes", "4m", "--index-bytes", "64m", "--shared-bytes", "64m");
    const char *const *const small_index =
        OPTIONS("--pool-bytes", "64m", "--index-bytes", "2m", "--shared-bytes", "64m");
    const char *const *const small_shared =
        OPTIONS("--pool-bytes", "16m", "--index-bytes", "16m", "--shared-bytes", "9m");
    const char *const *const few =
        OPTIONS("--pool-bytes", "64m", "--index-bytes", "64m", "--shared-bytes", "64m", "--sessions-max", "2",
                "--sequences-max", "3", "--landings-max", "2", "--inflight-max", "4", "--tokens-max", "1000");
    const char *const *const few_inflight =
        OPTIONS("--pool-bytes", "64m", "--index-bytes", "64m", "--shared-bytes", "64m", "--inflight-max", "4");
    const char *const *const small_staging =
        OPTIONS("--pool-bytes", "16m", "--index-bytes", "16m", "--shared-bytes", "16m", "--staging-bytes-max", "2m");
    const struct CMUnitTest tests[] = {
        DAEMON_TEST_WITH(pool_full, small_pool),
        DAEMON_TEST_WITH(index_full, small_index),
        DAEMON_TEST_WITH(riding_step_at_the_cap, small_pool),
        DAEMON_TEST_WITH(shared_full, small_shared),
        DAEMON_TEST_WITH(staging_too_large, small_staging),
        DAEMON_TEST(staging_too_small),
        DAEMON_TEST_WITH(sessions_max, few),
        DAEMON_TEST_WITH(sequences_max, few),
        DAEMON_TEST_WITH(landings_max, few),
        DAEMON_TEST_WITH(inflight_max, few_inflight),
        DAEMON_TEST_WITH(tokens_max, few),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
