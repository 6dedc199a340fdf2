// A lane in several indexes, one behind the other, for the tests of searches over parts.
#ifndef ICECACHE_TEST_INDEX_CHAIN_H
#define ICECACHE_TEST_INDEX_CHAIN_H

#include "test_index_lane.h"

#define EXTRA_MAX 400u // tokens that an index has beyond its part, at most

// Indexes that hold a lane's tokens, and the lane as brute force sees it, which has no index.
struct chain {
    struct heap heap;
    struct owner parts[INDEX_PARTS_MAX];
    unsigned char *part_keys[INDEX_PARTS_MAX];
    struct index_part list[INDEX_PARTS_MAX];
    uint32_t count;
    struct owner lane;
    struct index_search *search;
    double *masses;
    float *queries;
};

struct chain_shape {
    const unsigned char *keys; // of the lane
    uint32_t n;
    const uint32_t *ends; // of the parts
    uint32_t count, views_max;
    bool has_extra, erases;
    bool seals;         // all but the last
    uint32_t keep_tail; // tokens of the last part that are appended when all is built, at most
};

static inline int by_number(const void *a, const void *b)
{
    const uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return x < y ? -1 : x > y;
}

// Random ends of `count` parts of n tokens; some parts have none.
static inline void ends_random(uint32_t *ends, uint32_t count, uint32_t n, struct rng *rng)
{
    for (uint32_t p = 0; p < count; p++) {
        ends[p] = rng_below(rng, n + 1);
        if (p > 0 && rng_below(rng, 8) == 0) {
            ends[p] = ends[p - 1];
        }
    }
    ends[count - 1] = n;
    qsort(ends, count, sizeof ends[0], by_number);
}

// The keys of a part, and behind them copies of the lane's keys: as attractive as those, so that counting one shows.
static inline unsigned char *part_keys(const struct chain_shape *shape, uint32_t first, uint32_t count, uint32_t extra,
                                       size_t row_bytes, struct rng *rng)
{
    unsigned char *keys = malloc((size_t)(count + extra) * row_bytes + 1);
    assert_non_null(keys);
    if (count > 0) {
        memcpy(keys, shape->keys + first * row_bytes, count * row_bytes);
    }
    for (uint32_t i = 0; i < extra && shape->n > 0; i++) {
        memcpy(keys + (count + i) * row_bytes, shape->keys + rng_below(rng, shape->n) * row_bytes, row_bytes);
    }
    return keys;
}

// Appends in pieces and builds in slices, both of any size.
static inline void fill(struct owner *owner, uint32_t n, struct rng *rng)
{
    while (owner->length < n) {
        const uint32_t left = n - owner->length, some = 1 + rng_below(rng, 500);
        assert_int_equal(owner_append(owner, some < left ? some : left), INDEX_OK);
        if (rng_below(rng, 2) == 0) {
            owner_build(owner, 1 + rng_below(rng, 100000));
        }
    }
}

static inline void part_begin(struct chain *chain, const struct index_params *params, const struct chain_shape *shape,
                              uint32_t p, struct rng *rng)
{
    const uint32_t first = p == 0 ? 0 : shape->ends[p - 1], count = shape->ends[p] - first;
    const bool is_last = p + 1 == shape->count;
    const uint32_t extra = shape->has_extra && shape->n > 0 ? rng_below(rng, EXTRA_MAX) : 0;
    struct owner *part = &chain->parts[p];
    struct index_params own = *params;
    own.is_continuation = p > 0;
    chain->part_keys[p] = part_keys(shape, first, count, extra, chain->lane.row_bytes, rng);
    *part = owner_begin(&own, &chain->heap, chain->part_keys[p]);
    const uint32_t tail = is_last && shape->keep_tail < count ? shape->keep_tail : is_last ? count : 0;
    fill(part, count + extra - tail, rng);
    owner_build(part, 100000);
    assert_int_equal(owner_append(part, tail), INDEX_OK);
    if (shape->seals && !is_last) {
        index_seal(part->index);
        owner_build(part, 1 + rng_below(rng, 100000));
    }
    for (uint32_t i = 0; shape->erases && count > 0 && i < 5; i++) {
        const uint32_t position = rng_below(rng, count);
        owner_erase(part, position);
        chain->lane.erased[first + position] = true;
    }
    owner_verify(part);
    chain->list[p] = (struct index_part){part->index, first, shape->ends[p]};
}

static inline void chain_begin(struct chain *chain, const struct index_params *params, const struct chain_shape *shape,
                               struct rng *rng)
{
    memset(chain, 0, sizeof *chain);
    chain->lane = (struct owner){.params = *params, .keys = shape->keys};
    chain->lane.row_bytes = params->head_dim * dtype_size(params->dtype);
    owner_note_length(&chain->lane, shape->n);
    chain->count = shape->count;
    for (uint32_t p = 0; p < shape->count; p++) {
        part_begin(chain, params, shape, p, rng);
    }
    chain->masses = calloc(shape->n + 1, sizeof *chain->masses);
    chain->queries = calloc((size_t)shape->views_max * params->head_dim, sizeof(float));
    assert_true(chain->masses != NULL && chain->queries != NULL);
    const struct index_allocator allocator = heap_allocator(&chain->heap);
    assert_int_equal(index_search_create(&allocator, &chain->search), INDEX_OK);
}

static inline void chain_end(struct chain *chain)
{
    index_search_destroy(chain->search);
    for (uint32_t p = 0; p < chain->count; p++) {
        owner_end(&chain->parts[p]);
        free(chain->part_keys[p]);
    }
    assert_int_equal(chain->heap.blocks, 0);
    free(chain->lane.erased);
    free(chain->masses);
    free(chain->queries);
}

static inline uint32_t part_of(const struct chain *chain, uint32_t position)
{
    uint32_t p = 0;
    while (position >= chain->list[p].end) {
        p++;
    }
    return p;
}

// Queries near keys of the lane: two of three views look for a token.
static inline void chain_queries(struct chain *chain, uint32_t views, struct rng *rng)
{
    const uint32_t dim = chain->lane.params.head_dim, n = chain->lane.length;
    const size_t size = dtype_size(chain->lane.params.dtype);
    for (uint32_t v = 0; v < views; v++) {
        const uint32_t p = n == 0 || rng_below(rng, 3) == 0 ? UINT32_MAX : rng_below(rng, n);
        for (uint32_t j = 0; j < dim; j++) {
            const float like = p == UINT32_MAX ? 0.0f
                                               : element_load(chain->lane.params.dtype,
                                                              chain->lane.keys + ((size_t)p * dim + j) * size);
            chain->queries[v * dim + j] = 0.7f * like + rng_normal(rng);
        }
    }
}

static inline void chain_verify(const struct chain *chain, const struct index_query *query, const struct answer *answer)
{
    selection_verify_tokens(&chain->lane, query, answer);
    for (uint32_t i = 0; i < answer->selection.count; i++) {
        const uint32_t position = answer->tokens[i].position, p = part_of(chain, position);
        struct index_place place;
        index_locate(chain->parts[p].index, position - chain->list[p].first, 1, &place);
        assert_true(place.page == answer->tokens[i].place.page && place.row == answer->tokens[i].place.row);
        assert_memory_equal(owner_row(&chain->parts[p], place), chain->lane.keys + position * chain->lane.row_bytes,
                            chain->lane.row_bytes);
    }
}

static inline struct answer chain_search(struct chain *chain, const struct index_query *query, uint64_t work_units)
{
    const struct answer answer = search_parts(chain->search, chain->list, chain->count, query, work_units, UINT32_MAX);
    chain_verify(chain, query, &answer);
    assert_false(answer.selection.partial);
    return answer;
}

// The same but for page ids, which depend on when builds ran.
static inline void assert_alike(const struct answer *a, const struct answer *b)
{
    assert_int_equal(a->selection.count, b->selection.count);
    assert_int_equal(a->selection.scanned, b->selection.scanned);
    assert_memory_equal(&a->selection.selected_mass, &b->selection.selected_mass, sizeof(float));
    assert_memory_equal(&a->selection.ends_mass, &b->selection.ends_mass, sizeof(float));
    for (uint32_t i = 0; i < a->selection.count; i++) {
        assert_int_equal(a->tokens[i].position, b->tokens[i].position);
        assert_memory_equal(&a->tokens[i].mass, &b->tokens[i].mass, sizeof(float));
    }
}

#endif
