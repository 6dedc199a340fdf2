// One lane with a search context, for the tests of searches: brute force, and how far from it an answer may be.
#ifndef ICECACHE_TEST_INDEX_LANE_H
#define ICECACHE_TEST_INDEX_LANE_H

#include "test_index_owner.h"

struct lane {
    struct heap heap;
    struct owner owner;
    struct index_search *search;
    unsigned char *keys;
    double *masses;
    float *queries;
};

static inline void lane_begin(struct lane *lane, const struct index_params *params, enum keys_kind kind, uint32_t n,
                              uint32_t views_max, struct rng *rng)
{
    memset(lane, 0, sizeof *lane);
    lane->keys = keys_make(kind, params->dtype, params->head_dim, n, rng);
    lane->owner = owner_begin(params, &lane->heap, lane->keys);
    lane->masses = calloc(n + 1, sizeof *lane->masses);
    lane->queries = calloc((size_t)views_max * params->head_dim, sizeof(float));
    const struct index_allocator allocator = heap_allocator(&lane->heap);
    assert_int_equal(index_search_create(&allocator, &lane->search), INDEX_OK);
}

static inline void lane_end(struct lane *lane)
{
    index_search_destroy(lane->search);
    owner_end(&lane->owner);
    assert_int_equal(lane->heap.blocks, 0);
    free(lane->keys);
    free(lane->masses);
    free(lane->queries);
}

static inline void lane_queries(struct lane *lane, uint32_t views, float strength, struct rng *rng)
{
    for (uint32_t i = 0; i < views * lane->owner.params.head_dim; i++) {
        lane->queries[i] = strength * rng_normal(rng);
    }
}

static inline int by_mass(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return x < y ? 1 : x > y ? -1 : 0;
}

// Mass of the exact best selection of `count` tokens.
static inline double best_mass(const double *masses, struct bounds b, uint32_t count)
{
    const uint32_t n = b.high - b.low;
    double *sorted = malloc((n + 1) * sizeof *sorted), sum = 0.0;
    memcpy(sorted, masses + b.low, n * sizeof *sorted);
    qsort(sorted, n, sizeof *sorted, by_mass);
    for (uint32_t i = 0; i < count && i < n; i++) {
        sum += sorted[i];
    }
    free(sorted);
    return sum;
}

static inline double mass_of(const double *masses, const struct answer *answer)
{
    double sum = 0.0;
    for (uint32_t i = 0; i < answer->selection.count; i++) {
        sum += masses[answer->tokens[i].position];
    }
    return sum;
}

static inline double mass_range(const double *masses, uint32_t begin, uint32_t end)
{
    double sum = 0.0;
    for (uint32_t p = begin; p < end; p++) {
        sum += masses[p];
    }
    return sum;
}

static inline void assert_near(double x, double y, double tolerance)
{
    if (!(fabs(x - y) <= tolerance)) {
        fail_msg("%.9g is not %.9g", x, y);
    }
}

static inline struct answer lane_search(struct lane *lane, const struct index_query *query, uint64_t work_units)
{
    const struct answer answer = search_run(lane->search, lane->owner.index, query, work_units, UINT32_MAX);
    selection_verify(&lane->owner, query, &answer);
    assert_false(answer.selection.partial);
    return answer;
}

static inline void lane_fill(struct lane *lane, uint32_t n)
{
    assert_int_equal(owner_append(&lane->owner, n), INDEX_OK);
    owner_build(&lane->owner, 100000);
}

// ---- real attention ----

// The 16-bit elements of a .npy file of the small trace.
static inline uint16_t *trace_load(const char *name, size_t elements)
{
    char path[1024] = __FILE__;
    char *slash = strrchr(path, '/');
    snprintf(slash == NULL ? path : slash + 1, 256, "%s../data/own8k/%s", slash == NULL ? "tests/unit/" : "", name);
    FILE *file = fopen(path, "rb");
    if (file == NULL) {
        fail_msg("cannot open %s", path);
    }
    unsigned char head[10];
    assert_int_equal(fread(head, 1, sizeof head, file), sizeof head);
    assert_memory_equal(head, "\x93NUMPY\x01\x00", 8);
    assert_int_equal(fseek(file, 10 + head[8] + 256 * head[9], SEEK_SET), 0);
    uint16_t *data = malloc(elements * sizeof *data);
    assert_int_equal(fread(data, sizeof *data, elements, file), elements);
    fclose(file);
    return data;
}

enum { TRACE_TOKENS = 8192, TRACE_DIM = 64, TRACE_FIRST = 7680, TRACE_STEP = 64 };

#endif
