// The lanes of the `step` command: built, filled, searched and gathered.
//
// Threads: a pass cuts the lanes into one range for each worker; everything else is done by the main thread.
#include "step.h"

#include "measure.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define INSERTS      64u               // steps of one token in every lane
#define GATHER_AHEAD 8u                // rows
#define ALWAYS_COLD  ((size_t)1 << 30) // bytes that no cache holds

static bool build_all(struct step *step, enum index_policy policy)
{
    const struct tree_memory memory = {
        .index = &step->tree_arena, .rows = &step->row_arena, .with_values = step->options->pages};
    const uint32_t tokens = step->data.tokens;
    const uint32_t inserts = tokens / 16 < INSERTS ? tokens / 16 : INSERTS;
    for (uint32_t l = 0; l < step->lane_count; l++) {
        struct step_lane *lane = &step->lanes[l];
        if (!tree_create(&lane->tree, &memory, &step->data, policy, step->options->seed * 1000003 + l) ||
            !tree_build(&lane->tree, &step->data, lane->data, tokens - inserts, &step->costs)) {
            return false;
        }
        if (l % 32 == 31) {
            (void)fprintf(stderr, "%s: built %u of %u lanes\n", tree_methods[policy], l + 1, step->lane_count);
        }
    }
    // As in decoding: one token in every lane, then the next.
    for (uint32_t i = tokens - inserts; i < tokens; i++) {
        for (uint32_t l = 0; l < step->lane_count; l++) {
            if (!tree_insert(&step->lanes[l].tree, &step->data, step->lanes[l].data, i, &step->costs, NULL)) {
                return false;
            }
        }
    }
    for (uint32_t l = 0; l < step->lane_count; l++) {
        if (!tree_drain(&step->lanes[l].tree, &step->costs)) {
            return false;
        }
        if (!step->options->pages) {
            tree_release_rows(&step->lanes[l].tree);
        }
    }
    if (!step->options->pages) {
        arena_fini(&step->row_arena);
    }
    return true;
}

static bool pack_scans(struct step *step)
{
    const struct data *data = &step->data;
    const size_t bytes = scan_keys_bytes(SCAN_I8, data->tokens, data->head_dim);
    for (uint32_t l = 0; l < step->lane_count; l++) {
        struct step_lane *lane = &step->lanes[l];
        void *memory = arena_acquire(&step->scan_arena, bytes);
        if (memory == NULL) {
            return false;
        }
        if (l >= data->lane_count) { // a copy of the first lane with these keys
            lane->keys = step->lanes[l % data->lane_count].keys;
            lane->keys.blocks = memcpy(memory, lane->keys.blocks, bytes);
        } else {
            scan_keys_pack(&lane->keys, SCAN_I8, lane->data->keys, data->tokens, data->head_dim, memory);
        }
    }
    return true;
}

static bool make_references(struct step *step)
{
    const struct data *data = &step->data;
    step->references = calloc(data->lane_count, sizeof *step->references);
    bool complete = step->references != NULL;
    for (uint32_t l = 0; complete && l < data->lane_count; l++) {
        struct arena arena = {0};
        struct scan_keys keys;
        void *memory = arena_acquire(&arena, scan_keys_bytes(SCAN_F32, data->tokens, data->head_dim));
        complete = memory != NULL;
        if (complete) {
            scan_keys_pack(&keys, SCAN_F32, data->lanes[l].keys, data->tokens, data->head_dim, memory);
            complete = reference_create(&step->references[l], data, &data->lanes[l], &keys, scan_ops_best());
        }
        arena_fini(&arena);
    }
    return complete;
}

static bool make_lanes(struct step *step)
{
    step->lanes = calloc(step->lane_count, sizeof *step->lanes);
    for (uint32_t l = 0; step->lanes != NULL && l < step->lane_count; l++) {
        struct step_lane *lane = &step->lanes[l];
        const uint32_t source = l % step->data.lane_count;
        lane->data = &step->data.lanes[source];
        lane->reference = &step->references[source];
        lane->query = l / step->data.lane_count % step->data.query_count;
        lane->positions = calloc(step->budget_max, sizeof *lane->positions);
        lane->places = calloc(step->budget_max, sizeof *lane->places);
        if (lane->positions == NULL || lane->places == NULL) {
            return false;
        }
    }
    return step->lanes != NULL;
}

static struct index_query query_of(const struct step *step, const struct step_lane *lane, uint32_t budget,
                                   double effort)
{
    const struct tree_question question = {
        .query = lane->query, .heads = step->data.query_heads, .budget = budget, .effort = (float)effort};
    struct index_query query;
    tree_query(&step->data, lane->data, &question, &query);
    return query;
}

static bool make_workers(struct step *step)
{
    step->workers = calloc(step->cores_max, sizeof *step->workers);
    for (uint32_t w = 0; step->workers != NULL && w < step->cores_max; w++) {
        struct step_worker *worker = &step->workers[w];
        const struct index_allocator allocator = arena_allocator(&worker->arena);
        worker->stream = scan_stream_create(scan_ops_best(), step->budget_max, step->data.query_heads);
        worker->prepared = malloc(sizeof *worker->prepared);
        if (worker->stream == NULL || worker->prepared == NULL ||
            index_search_create(&allocator, &worker->context) != INDEX_OK) {
            return false;
        }
    }
    return step->workers != NULL;
}

static bool reserve(struct step *step)
{
    for (uint32_t w = 0; w < step->cores_max; w++) {
        for (uint32_t l = 0; l < step->lane_count; l++) {
            const struct index_query query = query_of(step, &step->lanes[l], step->budget_max, 0);
            const struct index_part whole = index_part_whole(step->lanes[l].tree.index);
            if (index_search_reserve(step->workers[w].context, &whole, 1, &query) != INDEX_OK) {
                return false;
            }
        }
    }
    return true;
}

static int no_memory(void)
{
    (void)fputs("icecache-bench: no memory\n", stderr);
    return EXIT_MISSING;
}

int step_prepare(struct step *step)
{
    const size_t landing_bytes = (size_t)step->lane_count * 2 * step->budget_max * data_row_bytes(&step->data);
    if (!make_references(step) || !make_lanes(step) || !pack_scans(step) || !make_workers(step) ||
        !bandwidth_init(&step->bandwidth)) {
        return no_memory();
    }
    step->landing = arena_acquire(&step->landing_arena, landing_bytes);
    if (step->landing == NULL) {
        return no_memory();
    }
    memset(step->landing, 0, landing_bytes);
    return 0;
}

int step_build(struct step *step, enum index_policy policy)
{
    step->costs = (struct tree_costs){0};
    return build_all(step, policy) && reserve(step) ? 0 : no_memory();
}

void step_clear(struct step *step)
{
    for (uint32_t l = 0; step->lanes != NULL && l < step->lane_count; l++) {
        tree_destroy(&step->lanes[l].tree);
    }
    arena_fini(&step->tree_arena);
    arena_fini(&step->row_arena);
}

void step_release(struct step *step)
{
    step_clear(step);
    for (uint32_t w = 0; step->workers != NULL && w < step->cores_max; w++) {
        index_search_destroy(step->workers[w].context);
        scan_stream_destroy(step->workers[w].stream);
        free(step->workers[w].prepared);
        arena_fini(&step->workers[w].arena);
    }
    free(step->workers);
    for (uint32_t l = 0; step->lanes != NULL && l < step->lane_count; l++) {
        free(step->lanes[l].positions);
        free(step->lanes[l].places);
    }
    free(step->lanes);
    for (uint32_t l = 0; step->references != NULL && l < step->data.lane_count; l++) {
        reference_fini(&step->references[l]);
    }
    free(step->references);
    arena_fini(&step->scan_arena);
    arena_fini(&step->landing_arena);
    bandwidth_fini(&step->bandwidth);
}

static bool search_tree(const struct step *step, struct step_worker *worker, struct step_lane *lane,
                        const struct step_pass *pass)
{
    const struct index_query query = query_of(step, lane, pass->budget, pass->effort);
    struct index_selection selection;
    const struct index_selected *tokens;
    if (!tree_search(worker->context, &lane->tree, &query, &selection, &tokens)) {
        return false;
    }
    lane->count = selection.count;
    lane->scanned = (double)selection.scanned / (lane->data->stands[lane->query] + 1);
    for (uint32_t i = 0; i < selection.count; i++) {
        lane->positions[i] = tokens[i].position;
        lane->places[i] = tokens[i].place;
    }
    return true;
}

static void search_scan(const struct step *step, struct step_worker *worker, struct step_lane *lane,
                        const struct step_pass *pass)
{
    const struct data *data = &step->data;
    struct scan_selected selected[4096];
    uint32_t first, end;
    data_range(data, lane->data, lane->query, &first, &end);
    scan_query_init(worker->prepared, SCAN_I8,
                    lane->data->queries + (size_t)lane->query * data->query_heads * data->head_dim, data->query_heads,
                    data->head_dim, data->scale);
    lane->count = scan_select(worker->stream, &lane->keys, worker->prepared, lane->data->stands[lane->query] + 1, first,
                              end, pass->budget, selected);
    lane->scanned = 1;
    for (uint32_t i = 0; i < lane->count; i++) {
        lane->positions[i] = selected[i].position;
    }
}

// Copies the K and V rows of the last selection, slot by slot.
static void gather(const struct step *step, const struct step_lane *lane)
{
    const size_t row_bytes = data_row_bytes(&step->data);
    uint8_t *keys = step->landing + (size_t)(lane - step->lanes) * 2 * step->budget_max * row_bytes;
    uint8_t *values = keys + step->budget_max * row_bytes;
    for (uint32_t i = 0; i < lane->count; i++) {
        if (i + GATHER_AHEAD < lane->count) {
            const uint8_t *next = rows_at(&lane->tree.rows, lane->places[i + GATHER_AHEAD]);
            for (size_t j = 0; j < 2 * row_bytes; j += 64) {
                __builtin_prefetch(next + j);
            }
        }
        const uint8_t *row = rows_at(&lane->tree.rows, lane->places[i]);
        memcpy(keys + i * row_bytes, row, row_bytes);
        memcpy(values + i * row_bytes, row + row_bytes, row_bytes);
    }
}

static bool do_lane(struct step *step, struct step_worker *worker, struct step_lane *lane, const struct step_pass *pass)
{
    switch (pass->job) {
    case STEP_TREE:
        return search_tree(step, worker, lane, pass);
    case STEP_SCAN:
        search_scan(step, worker, lane, pass);
        return true;
    default:
        gather(step, lane);
        return true;
    }
}

struct range {
    struct step *step;
    struct step_worker *worker;
    const struct step_pass *pass;
    pthread_barrier_t *barrier;
    uint32_t first, end;
    uint64_t ns;
    bool done;
};

static void *do_range(void *argument)
{
    struct range *range = argument;
    (void)pthread_barrier_wait(range->barrier);
    const uint64_t begin = measure_ns();
    uint64_t lanes_ns = 0;
    range->done = true;
    for (uint32_t l = range->first; l < range->end && range->done; l++) {
        struct step_lane *lane = &range->step->lanes[l];
        range->done = do_lane(range->step, range->worker, lane, range->pass);
        if (range->pass->warm && range->done) {
            const uint64_t again = measure_ns();
            range->done = do_lane(range->step, range->worker, lane, range->pass);
            lanes_ns += measure_ns() - again;
        }
    }
    range->ns = range->pass->warm ? lanes_ns : measure_ns() - begin;
    return NULL;
}

// Small shapes would stay in cache from one pass to the next.
static void make_cold(const struct step *step, enum step_job job)
{
    const struct arena *arena = job == STEP_TREE   ? &step->tree_arena
                                : job == STEP_SCAN ? &step->scan_arena
                                                   : &step->row_arena;
    if (arena_bytes(arena) < ALWAYS_COLD) {
        arena_flush(arena);
    }
}

bool step_run(struct step *step, const struct step_pass *pass, double *ms)
{
    enum { CORES_MAX = 256 };
    struct range ranges[CORES_MAX];
    pthread_t threads[CORES_MAX];
    pthread_barrier_t barrier;
    const uint32_t cores = pass->cores;
    if (pthread_barrier_init(&barrier, NULL, cores) != 0) {
        return false;
    }
    make_cold(step, pass->job);
    for (uint32_t c = 0; c < cores; c++) {
        ranges[c] = (struct range){
            .step = step,
            .worker = &step->workers[c],
            .pass = pass,
            .barrier = &barrier,
            .first = (uint32_t)((uint64_t)step->lane_count * c / cores),
            .end = (uint32_t)((uint64_t)step->lane_count * (c + 1) / cores),
        };
        if (c > 0 && pthread_create(&threads[c], NULL, do_range, &ranges[c]) != 0) {
            (void)fputs("icecache-bench: cannot start a thread\n", stderr);
            exit(EXIT_MISSING);
        }
    }
    (void)do_range(&ranges[0]);
    uint64_t slowest = ranges[0].ns;
    bool done = ranges[0].done;
    for (uint32_t c = 1; c < cores; c++) {
        (void)pthread_join(threads[c], NULL);
        slowest = ranges[c].ns > slowest ? ranges[c].ns : slowest;
        done = done && ranges[c].done;
    }
    (void)pthread_barrier_destroy(&barrier);
    *ms = (double)slowest / 1e6;
    return done;
}

bool step_landing_is_right(const struct step *step)
{
    const size_t row_bytes = data_row_bytes(&step->data);
    for (uint32_t l = 0; l < step->lane_count; l++) {
        const struct step_lane *lane = &step->lanes[l];
        const uint8_t *keys = step->landing + (size_t)l * 2 * step->budget_max * row_bytes;
        const uint8_t *values = keys + step->budget_max * row_bytes;
        for (uint32_t i = 0; i < lane->count; i++) {
            const uint8_t *wanted = (const uint8_t *)lane->data->rows + lane->positions[i] * row_bytes;
            if (!rows_is_right(keys + i * row_bytes, values + i * row_bytes, wanted, row_bytes)) {
                return false;
            }
        }
    }
    return true;
}
