// How long a retrieve takes as a worker in C sees it: into host memory, by pull and by push, one layer of 8 KV heads
// with 4 query heads each, head_dim 128. Starts a daemon of its own.
//
//     retrieve_times [TOKENS [STEPS]]
#include "memory.h"

#include <stdio.h>
#include <stdlib.h>

static const struct shape shape = {1, 8, 32, 128, ICE_BF16};
static const char *const options[] = {"--pool-bytes", "1g", "--index-bytes", "1g", "--shards", "8", NULL};
static const uint32_t budgets[] = {64, 256};
enum { BUDGETS = sizeof budgets / sizeof *budgets, ROUNDS = 8, STEPS_MAX = 8000, QUERIES = 200 };

// One kind of landing at one budget.
struct kind {
    const char *name;
    uint32_t budget, slots;
    ice_landing *landing;
    uint32_t count;
    double us[STEPS_MAX], search_us[STEPS_MAX], copy_us[STEPS_MAX];
};

static int ascending(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double quantile(double *values, uint32_t count, double q)
{
    qsort(values, count, sizeof *values, ascending);
    return values[(uint32_t)(q * (count - 1))];
}

static void open_kind(struct kind *kind, const char *name, uint32_t budget, ice_client *client)
{
    kind->name = name;
    kind->budget = budget;
    kind->slots = ICE_DEFAULT_SINKS + ICE_DEFAULT_WINDOW + budget;
    const struct ice_landing_shape wanted = landing_shape(&shape, 1, kind->slots);
    if (name[0] == 'h') {
        assert_ok(ice_landing_open(client, &wanted, 0, &kind->landing));
    } else {
        const struct ice_gpu_options gpu = {.mode = name[2] == 's' ? ICE_GPU_PUSH : ICE_GPU_PULL};
        assert_ok(ice_landing_open_gpu(client, &wanted, &gpu, 0, &kind->landing));
    }
}

static void measure(struct kind *kind, const struct worker *worker, const struct history *history, uint32_t steps)
{
    struct worker view = *worker;
    view.landing = kind->landing;
    view.slots = kind->slots;
    for (uint32_t i = 0; i < steps && kind->count < STEPS_MAX; i++) {
        struct retrieve retrieve;
        struct ice_retrieve_result result;
        retrieve_init(&retrieve, &view, history, 0, history->length - 1 - i % QUERIES, 1);
        uint64_t begun = now_us();
        assert_ok(ice_retrieve(worker->client, &retrieve.options, &result));
        kind->us[kind->count] = (double)(now_us() - begun);
        kind->search_us[kind->count] = result.search_us;
        kind->copy_us[kind->count++] = result.copy_us;
        retrieve_fini(&retrieve);
    }
}

static void run(const struct daemon *daemon, const struct history *history, uint32_t steps)
{
    static const char *const names[] = {"host", "pull", "push"};
    static struct kind kinds[3 * BUDGETS];
    struct worker worker = {.shape = shape, .rows = 1};
    worker.client = client_connect(daemon->sockets, TEST_DEADLINE_US, 16u << 20);
    worker.sequence = sequence_open(worker.client, &shape);
    worker_append(&worker, history, 0, history->length);
    worker_wait_idle(&worker);
    for (uint32_t i = 0; i < 3 * BUDGETS; i++)
        open_kind(&kinds[i], names[i % 3], budgets[i / 3], worker.client);
    for (uint32_t round = 0; round < ROUNDS; round++) { // in turn, so that what drifts is the same for each
        for (uint32_t i = 0; i < 3 * BUDGETS; i++)
            measure(&kinds[i], &worker, history, (steps + ROUNDS - 1) / ROUNDS);
    }
    printf("%llu tokens; one layer, 8 KV heads; microseconds, %u retrieves each\n", (unsigned long long)history->length,
           kinds[0].count);
    printf("%-8s %6s %6s %6s %7s %6s\n", "landing", "budget", "p50", "p99", "search", "copy");
    for (uint32_t i = 0; i < 3 * BUDGETS; i++) {
        struct kind *kind = &kinds[i];
        printf("%-8s %6u %6.0f %6.0f %7.0f %6.0f\n", kind->name, kind->budget, quantile(kind->us, kind->count, 0.5),
               quantile(kind->us, kind->count, 0.99), quantile(kind->search_us, kind->count, 0.5),
               quantile(kind->copy_us, kind->count, 0.5));
        ice_landing_close(kind->landing);
    }
    ice_sequence_close(worker.sequence);
    ice_client_close(worker.client);
}

static uint32_t tokens = 36000, wanted_steps = 2000;

static void retrieve_times(void **state)
{
    struct history history;
    history_create(&history, &shape, tokens, 83);
    run(*state, &history, wanted_steps);
    history_destroy(&history);
}

int main(int argc, char **argv)
{
    if (!memory_choose_driver())
        return 77;
    if (argc > 1)
        tokens = (uint32_t)strtoul(argv[1], NULL, 10);
    if (argc > 2)
        wanted_steps = (uint32_t)strtoul(argv[2], NULL, 10);
    if (tokens < 400 || tokens > 1u << 20 || wanted_steps < 1 || wanted_steps > STEPS_MAX) {
        fprintf(stderr, "usage: retrieve_times [TOKENS [STEPS]]: 400 to 1048576 tokens, 1 to %d steps\n", STEPS_MAX);
        return 2;
    }
    const struct CMUnitTest tests[] = {DAEMON_TEST_WITH(retrieve_times, options)};
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    memory_forget_folder();
    return failed;
}
