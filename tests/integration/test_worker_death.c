// kill -9 of a worker at random moments: what it held is gone within a second, and another worker notices nothing.
#include "worker.h"

#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define GIVEN_BACK_US 1000000u

static const struct shape shape = {2, 2, 4, 64, ICE_BF16};
enum { LENGTH = 1200, SLOTS = 400 };

// ---- the victim ----

static void do_append(struct worker *worker, const struct history *history, uint64_t *state)
{
    ice_sequence *sequence = sequence_open(worker->client, &shape);
    for (uint64_t first = 0; first < LENGTH;) {
        uint64_t n = 1 + random_below(state, 400);
        n = n < LENGTH - first ? n : LENGTH - first;
        const struct ice_kv_source source = history_source(history, ICE_ALL_LAYERS, first);
        assert_ok(ice_append(sequence, ICE_ALL_LAYERS, first, n, &source, 0, NULL));
        first += n;
    }
    if (random_below(state, 4) > 0) // else it stays open
        ice_sequence_close(sequence);
}

static void do_retrieve(struct worker *worker, const struct history *history, uint64_t *state)
{
    struct retrieve retrieve;
    ice_ticket *tickets[4];
    for (uint32_t i = 0; i < 4; i++) {
        retrieve_init(&retrieve, worker, history, i % 2, LENGTH - 1 - random_below(state, 100), 1);
        retrieve.row = i;
        assert_ok(ice_retrieve_submit(worker->client, &retrieve.options, &tickets[i]));
        retrieve_fini(&retrieve);
    }
    for (uint32_t i = 0; i < 4; i++) {
        assert_ok(ice_retrieve_wait(tickets[i], 0, NULL));
        ice_ticket_close(tickets[i]);
    }
}

static void do_read(struct worker *worker, const struct history *history, uint64_t *state)
{
    (void)state;
    uint8_t *keys = malloc(history->side_bytes), *values = malloc(history->side_bytes);
    const struct ice_kv_source source = history_source(history, ICE_ALL_LAYERS, 0);
    const struct ice_kv_target target = {
        .keys = keys,
        .values = values,
        .keys_bytes = source.keys_bytes,
        .values_bytes = source.values_bytes,
        .layer_stride = source.layer_stride,
        .token_stride = source.token_stride,
        .head_stride = source.head_stride,
    };
    assert_ok(ice_read(worker->sequence, ICE_ALL_LAYERS, 0, LENGTH, &target, 0));
    assert_memory_equal(keys, history->keys, history->side_bytes);
    free(keys);
    free(values);
}

static void do_landing(struct worker *worker, const struct history *history, uint64_t *state)
{
    (void)history;
    ice_landing *landing = landing_open(worker->client, &shape, 2, 64 + (uint32_t)random_below(state, 2000));
    ice_landing_close(landing);
}

static void do_nothing(struct worker *worker, const struct history *history, uint64_t *state)
{
    (void)worker;
    (void)history;
    sleep_us(random_below(state, 2000));
}

static void (*const deeds[])(struct worker *, const struct history *, uint64_t *) = {do_append, do_retrieve, do_read,
                                                                                     do_landing, do_nothing};
enum { DEEDS = sizeof deeds / sizeof *deeds };

// victim SOCKETS SEED DEED: does one thing, or everything (DEED = DEEDS), until it is killed.
static int run_victim(int argc, char **argv)
{
    assert_int_equal(argc, 4);
    struct history history;
    struct worker worker;
    uint64_t state = strtoull(argv[2], NULL, 10), deed = strtoull(argv[3], NULL, 10);
    history_create(&history, &shape, LENGTH, 41);
    printf("begun\n");
    fflush(stdout);
    worker_open(&worker, argv[1], &shape, 4, SLOTS);
    worker_append(&worker, &history, 0, LENGTH);
    while (getppid() != 1)
        deeds[deed < DEEDS ? deed : random_below(&state, DEEDS)](&worker, &history, &state);
    return 1;
}

// ---- the survivor ----

// survivor SOCKETS: retrieves and checks until its input ends; says how many.
static int run_survivor(int argc, char **argv)
{
    assert_int_equal(argc, 2);
    struct history history;
    struct worker worker;
    history_create(&history, &shape, LENGTH, 43);
    worker_open(&worker, argv[1], &shape, 1, LENGTH);
    worker_append(&worker, &history, 0, LENGTH);
    worker_wait_idle(&worker);
    printf("ready\n");
    fflush(stdout);
    uint64_t count = 0;
    for (bool more = true; more; count++) {
        struct pollfd input = {.fd = 0, .events = POLLIN};
        struct retrieve retrieve;
        retrieve_init(&retrieve, &worker, &history, count % 2, LENGTH - 1, 1);
        assert_ok(ice_retrieve(worker.client, &retrieve.options, NULL));
        landing_check_all(worker.landing, 0, count % 2, &history, LENGTH);
        retrieve_fini(&retrieve);
        more = poll(&input, 1, 1) == 0;
    }
    printf("%llu\n", (unsigned long long)count);
    fflush(stdout);
    worker_close(&worker);
    history_destroy(&history);
    return 0;
}

static void survivor_start(struct child *survivor, const struct daemon *daemon)
{
    const char *arguments[] = {"survivor", daemon->sockets, NULL};
    char line[64];
    child_start_role(survivor, arguments);
    assert_true(child_read_line(survivor, line, sizeof line));
    assert_string_equal(line, "ready");
}

static void survivor_finish(struct child *survivor)
{
    char line[64];
    child_close_input(survivor);
    assert_true(child_read_line(survivor, line, sizeof line)); // false: it has ended with an error
    print_message("the other worker made %s retrieves\n", line);
    assert_true(strtoull(line, NULL, 10) > 0);
    child_expect_exit(survivor, 0);
}

// ---- the tests ----

static void victim_start(struct child *victim, const struct daemon *daemon, uint64_t *state, uint64_t deed)
{
    char seed[32], number[32], line[64];
    snprintf(seed, sizeof seed, "%llu", (unsigned long long)random_next(state));
    snprintf(number, sizeof number, "%llu", (unsigned long long)deed);
    const char *arguments[] = {"victim", daemon->sockets, seed, number, NULL};
    child_start_role(victim, arguments);
    assert_true(child_read_line(victim, line, sizeof line));
}

static void killed_at_any_moment(void **state)
{
    const struct daemon *daemon = *state;
    uint64_t seed = random_seed("killed_at_any_moment");
    const uint32_t rounds = scaled_rounds(20, 100);
    uint64_t slowest = 0;
    struct child survivor;
    struct stats_held before;
    survivor_start(&survivor, daemon);
    stats_held(daemon, &before);
    assert_int_equal(before.sessions, 1);
    assert_true(before.pool_bytes > 0 && before.index_bytes > 0 && before.shared_bytes > 0);
    for (uint32_t round = 0; round < rounds; round++) {
        struct child victims[2];
        uint32_t count = 1 + (uint32_t)random_below(&seed, 2);
        for (uint32_t i = 0; i < count; i++)
            victim_start(&victims[i], daemon, &seed, (round + i) % (DEEDS + 1));
        sleep_us(random_below(&seed, 200000)); // anywhere between its connecting and its work
        for (uint32_t i = 0; i < count; i++)
            child_kill(&victims[i]);
        uint64_t took = stats_wait(daemon, &before, GIVEN_BACK_US);
        slowest = took > slowest ? took : slowest;
    }
    print_message("everything given back after at most %.3f s\n", (double)slowest / 1e6);
    survivor_finish(&survivor);
}

// Requests of the dead are cut short, too: here a search over many tokens and an append that is being clustered.
static void killed_with_much_in_flight(void **state)
{
    const struct daemon *daemon = *state;
    const struct shape wide = {1, 4, 16, 128, ICE_BF16};
    struct stats_held before;
    stats_held(daemon, &before);
    struct child victim;
    const char *arguments[] = {"flood", daemon->sockets, NULL};
    char line[64];
    child_start_role(&victim, arguments);
    assert_true(child_read_line(&victim, line, sizeof line));
    assert_string_equal(line, "flooding");
    sleep_us(20000);
    child_kill(&victim);
    stats_wait(daemon, &before, GIVEN_BACK_US);
    // The daemon serves the next one.
    struct history history;
    struct worker worker;
    history_create(&history, &wide, 100, 3);
    worker_open(&worker, daemon->sockets, &wide, 1, 100);
    worker_append(&worker, &history, 0, 100);
    worker_close(&worker);
    history_destroy(&history);
}

// flood SOCKETS: many slow retrieves in flight.
static int run_flood(int argc, char **argv)
{
    assert_int_equal(argc, 2);
    const struct shape wide = {1, 4, 16, 128, ICE_BF16};
    const uint64_t length = 8000;
    struct history history;
    struct worker worker;
    history_create(&history, &wide, length, 47);
    worker_open(&worker, argv[1], &wide, 64, 200);
    worker_append(&worker, &history, 0, length);
    for (uint32_t row = 0; row < 64; row++) {
        struct retrieve retrieve;
        ice_ticket *ticket;
        retrieve_init(&retrieve, &worker, &history, 0, length - 64, 64);
        retrieve.row = row;
        assert_ok(ice_retrieve_submit(worker.client, &retrieve.options, &ticket));
        retrieve_fini(&retrieve);
    }
    printf("flooding\n");
    fflush(stdout);
    while (getppid() != 1)
        sleep_us(100000);
    return 1;
}

// A worker that closes its handles, or only its client, leaves as little behind as one that dies.
static void orderly_end_gives_back(void **state)
{
    const struct daemon *daemon = *state;
    struct stats_held before;
    struct history history;
    struct worker worker;
    stats_held(daemon, &before);
    history_create(&history, &shape, LENGTH, 53);
    worker_open(&worker, daemon->sockets, &shape, 1, SLOTS);
    worker_append(&worker, &history, 0, LENGTH);
    worker_close(&worker);
    stats_wait(daemon, &before, GIVEN_BACK_US);
    worker_open(&worker, daemon->sockets, &shape, 1, SLOTS);
    worker_append(&worker, &history, 0, LENGTH);
    ice_client_close(worker.client);
    stats_wait(daemon, &before, GIVEN_BACK_US);
    history_destroy(&history);
}

int main(int argc, char **argv)
{
    static const struct role roles[] = {{"victim", run_victim}, {"survivor", run_survivor}, {"flood", run_flood}};
    int status;
    if (role_run(argc, argv, roles, sizeof roles / sizeof *roles, &status))
        return status;
    const struct CMUnitTest tests[] = {
        DAEMON_TEST(killed_at_any_moment),
        DAEMON_TEST(killed_with_much_in_flight),
        DAEMON_TEST(orderly_end_gives_back),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
