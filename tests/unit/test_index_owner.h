// What the index's owner does, simulated for the tests: it keeps the key bytes of every page row, carries out plans by
// copying them, and checks every promise about pages on the way. Also: seeded random numbers, keys of several kinds,
// and an allocator that counts and refuses.
#ifndef ICECACHE_TEST_INDEX_OWNER_H
#define ICECACHE_TEST_INDEX_OWNER_H

// clang-format off
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
// clang-format on
#include "index/index.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// ---- random numbers ----
struct rng {
    uint64_t state;
};
static inline uint64_t rng_next(struct rng *rng)
{
    uint64_t x = (rng->state += 0x9e3779b97f4a7c15u);
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}
static inline uint32_t rng_below(struct rng *rng, uint32_t bound)
{
    return (uint32_t)(rng_next(rng) % bound);
}
static inline float rng_normal(struct rng *rng)
{
    float sum = 0.0f;
    for (int i = 0; i < 12; i++) {
        sum += (float)rng_below(rng, 1u << 20) / (float)(1u << 20);
    }
    return sum - 6.0f;
}
// The seed of a randomised test: printed, and taken from ICECACHE_TEST_SEED where set.
static inline struct rng rng_begin(uint64_t seed)
{
    const char *text = getenv("ICECACHE_TEST_SEED");
    seed = text != NULL ? strtoull(text, NULL, 0) : seed;
    printf("seed %llu\n", (unsigned long long)seed);
    return (struct rng){seed};
}

// ---- allocator ----
struct heap {
    uint64_t bytes, blocks, acquired;
    uint64_t refuse_at;    // the acquisition of this number is refused; 0: none
    bool refuse_after_too; // and all that follow
    bool refused;
};
static inline void *heap_acquire(void *owner, size_t bytes)
{
    struct heap *heap = owner;
    heap->acquired++;
    if (heap->refuse_at != 0 &&
        (heap->acquired == heap->refuse_at || (heap->refuse_after_too && heap->acquired > heap->refuse_at))) {
        heap->refused = true;
        return NULL;
    }
    // Exact size behind a 64-byte header, so that the sanitizer sees an access past the end.
    unsigned char *block = aligned_alloc(64, (bytes + 64 + 63) / 64 * 64);
    assert_non_null(block);
    memcpy(block, &bytes, sizeof bytes);
    memset(block + 64, 0xa5, bytes);
    heap->bytes += bytes;
    heap->blocks++;
    return block + 64;
}
static inline void heap_release(void *owner, void *memory, size_t bytes)
{
    struct heap *heap = owner;
    if (memory == NULL) {
        return;
    }
    unsigned char *block = (unsigned char *)memory - 64;
    size_t had;
    memcpy(&had, block, sizeof had);
    assert_int_equal(had, bytes);
    heap->bytes -= bytes;
    heap->blocks--;
    free(block);
}
static inline struct index_allocator heap_allocator(struct heap *heap)
{
    return (struct index_allocator){heap_acquire, heap_release, heap};
}

// ---- key rows ----
static inline size_t dtype_size(enum index_dtype dtype)
{
    return dtype == INDEX_FP32 ? 4 : 2;
}
static inline float half_to_float(uint16_t half)
{
    const int exponent = (half >> 10) & 31, fraction = half & 1023;
    const float sign = (half & 0x8000) != 0 ? -1.0f : 1.0f;
    if (exponent == 31) {
        return fraction != 0 ? NAN : sign * INFINITY;
    }
    return sign * (exponent == 0 ? ldexpf((float)fraction, -24) : ldexpf((float)(fraction + 1024), exponent - 25));
}
static inline uint16_t float_to_half(float x) // towards zero, enough for test data
{
    int exponent;
    const float fraction = frexpf(fabsf(x), &exponent);
    const uint16_t sign = x < 0.0f ? 0x8000 : 0;
    if (x == 0.0f || exponent < -13) {
        return (uint16_t)(sign | (uint16_t)ldexpf(fabsf(x), 24));
    }
    if (exponent > 16) {
        return (uint16_t)(sign | 0x7bff);
    }
    return (uint16_t)(sign | ((unsigned)(exponent + 14) << 10) | ((unsigned)(fraction * 2048.0f) & 1023u));
}
static inline void element_store(enum index_dtype dtype, void *out, float x)
{
    if (dtype == INDEX_FP32) {
        memcpy(out, &x, 4);
        return;
    }
    uint32_t bits;
    memcpy(&bits, &x, 4);
    const uint16_t narrow = dtype == INDEX_BF16 ? (uint16_t)(bits >> 16) : float_to_half(x);
    memcpy(out, &narrow, 2);
}
static inline float element_load(enum index_dtype dtype, const void *in)
{
    float x;
    if (dtype == INDEX_FP32) {
        memcpy(&x, in, 4);
        return x;
    }
    uint16_t narrow;
    memcpy(&narrow, in, 2);
    if (dtype == INDEX_FP16) {
        return half_to_float(narrow);
    }
    const uint32_t bits = (uint32_t)narrow << 16;
    memcpy(&x, &bits, 4);
    return x;
}

enum keys_kind {
    KEYS_CLUSTERED,
    KEYS_GAUSSIAN,
    KEYS_EQUAL,
    KEYS_ZERO,
    KEYS_FEW_DISTINCT,
    KEYS_GROWING_NORMS,
    KEYS_HUGE,
    KEYS_KINDS
};
static inline float key_element(enum keys_kind kind, struct rng *rng, uint32_t position, uint32_t cluster, uint32_t j)
{
    struct rng center = {(uint64_t)cluster * 1000003u + j};
    switch (kind) {
    case KEYS_CLUSTERED:
        return 2.0f * rng_normal(&center) + 0.5f * rng_normal(rng);
    case KEYS_EQUAL:
        return 0.25f * (float)(j % 7) - 0.5f;
    case KEYS_ZERO:
        return 0.0f;
    case KEYS_FEW_DISTINCT:
        return rng_normal(&center);
    case KEYS_GROWING_NORMS:
        return rng_normal(rng) * (0.01f + (float)position * 0.01f);
    case KEYS_HUGE:
        return rng_normal(rng) * 3000.0f;
    default:
        return rng_normal(rng);
    }
}
static inline unsigned char *keys_make(enum keys_kind kind, enum index_dtype dtype, uint32_t head_dim, uint32_t n,
                                       struct rng *rng)
{
    const size_t size = dtype_size(dtype);
    unsigned char *keys = malloc((size_t)n * head_dim * size + 1);
    assert_non_null(keys);
    for (uint32_t p = 0; p < n; p++) {
        const uint32_t cluster = rng_below(rng, kind == KEYS_FEW_DISTINCT ? 3 : 20);
        for (uint32_t j = 0; j < head_dim; j++) {
            element_store(dtype, keys + ((size_t)p * head_dim + j) * size, key_element(kind, rng, p, cluster, j));
        }
    }
    return keys;
}

// ---- owner ----
struct owner {
    struct index *index;
    struct index_params params;
    size_t row_bytes;
    uint32_t page_room;
    unsigned char *rows; // page_room * page_tokens rows
    bool *present;       // per page
    const unsigned char *keys;
    uint32_t length;
};

static inline void owner_check(const struct owner *owner)
{
    char text[256] = "";
    if (!index_check(owner->index, text, sizeof text)) {
        fail_msg("index_check: %s", text);
    }
}
static inline void owner_provide(struct owner *owner, uint32_t page)
{
    assert_true(page < index_page_bound(owner->index));
    assert_int_equal(index_page_rows(owner->index, page), 0);
    if (page >= owner->page_room) {
        const uint32_t room = 2 * page + 8;
        owner->rows = realloc(owner->rows, (size_t)room * owner->params.page_tokens * owner->row_bytes);
        owner->present = realloc(owner->present, room * sizeof owner->present[0]);
        assert_true(owner->rows != NULL && owner->present != NULL);
        memset(owner->present + owner->page_room, 0, (room - owner->page_room) * sizeof owner->present[0]);
        owner->page_room = room;
    }
    assert_false(owner->present[page]);
    owner->present[page] = true;
}
static inline unsigned char *owner_row(const struct owner *owner, struct index_place place)
{
    assert_true(place.page < owner->page_room && owner->present[place.page]);
    assert_true(place.row < owner->params.page_tokens);
    return owner->rows + ((size_t)place.page * owner->params.page_tokens + place.row) * owner->row_bytes;
}
static inline struct owner owner_begin(const struct index_params *params, struct heap *heap, const unsigned char *keys)
{
    struct owner owner = {.params = *params, .keys = keys};
    const struct index_allocator allocator = heap_allocator(heap);
    owner.params.page_tokens = params->page_tokens == 0 ? 16 : params->page_tokens;
    owner.row_bytes = params->head_dim * dtype_size(params->dtype);
    assert_int_equal(index_create(params, &allocator, &owner.index), INDEX_OK);
    return owner;
}
static inline void owner_end(struct owner *owner)
{
    index_destroy(owner->index);
    free(owner->rows);
    free(owner->present);
}
static inline enum index_status owner_append(struct owner *owner, uint32_t n)
{
    struct index_place *places = calloc(n + 1, sizeof *places);
    const unsigned char *from = owner->keys + (size_t)owner->length * owner->row_bytes;
    const enum index_status status = index_append_prepare(owner->index, from, owner->row_bytes, n, places);
    for (uint32_t i = 0; status == INDEX_OK && i < n; i++) {
        const uint32_t page = places[i].page;
        if (index_page_rows(owner->index, page) == 0 && (page >= owner->page_room || !owner->present[page])) {
            owner_provide(owner, page);
        }
        memcpy(owner_row(owner, places[i]), from + i * owner->row_bytes, owner->row_bytes);
    }
    free(places);
    if (status == INDEX_OK) {
        index_append_commit(owner->index);
        owner->length += n;
        assert_int_equal(index_length(owner->index), owner->length);
    }
    return status;
}
// Every token lies where the index says, bit for bit, and page lists agree with places.
static inline void owner_verify(const struct owner *owner)
{
    const uint32_t n = owner->length, step = owner->params.page_tokens;
    struct index_place *places = calloc(n + 1, sizeof *places);
    uint32_t positions[INDEX_PAGE_TOKENS_MAX];
    index_locate(owner->index, 0, n, places);
    for (uint32_t p = 0; p < n; p++) {
        assert_memory_equal(owner_row(owner, places[p]), owner->keys + p * owner->row_bytes, owner->row_bytes);
    }
    uint32_t rows = 0;
    for (uint32_t page = 0; page < index_page_bound(owner->index); page++) {
        const uint32_t count = index_page_positions(owner->index, page, positions);
        assert_int_equal(count, index_page_rows(owner->index, page));
        assert_int_equal(page < owner->page_room && owner->present[page], count != 0);
        rows += count;
        for (uint32_t r = 0; r < step; r++) {
            if (positions[r] != UINT32_MAX) {
                assert_true(positions[r] < n);
                assert_true(places[positions[r]].page == page && places[positions[r]].row == r);
            }
        }
    }
    assert_int_equal(rows, n);
    free(places);
    owner_check(owner);
}
// Copies in two slices around `between`; the owner's pages change only as the plan allows.
static inline void owner_carry_out(struct owner *owner, void (*between)(void *), void *argument)
{
    struct index_plan plan;
    uint32_t positions[INDEX_PAGE_TOKENS_MAX];
    index_plan_get(owner->index, &plan);
    for (uint32_t i = 0; i < plan.new_page_count; i++) {
        owner_provide(owner, plan.new_pages[i]);
    }
    for (uint32_t i = 0; i < plan.move_count; i++) {
        const struct index_move *move = &plan.moves[i];
        index_page_positions(owner->index, move->from.page, positions);
        assert_true(positions[move->from.row] != UINT32_MAX); // the source is in use
        index_page_positions(owner->index, move->to.page, positions);
        assert_true(positions[move->to.row] == UINT32_MAX); // the target is not
        if (i == plan.move_count / 2 && between != NULL) {
            between(argument);
        }
        memcpy(owner_row(owner, move->to), owner_row(owner, move->from), owner->row_bytes);
    }
    for (uint32_t i = 0; i < plan.released_page_count; i++) {
        assert_true(index_page_rows(owner->index, plan.released_pages[i]) != 0);
        assert_true(owner->present[plan.released_pages[i]]);
        owner->present[plan.released_pages[i]] = false;
    }
    index_plan_commit(owner->index);
}
// Builds until nothing is due.
static inline void owner_build(struct owner *owner, uint64_t work_units)
{
    for (;;) {
        switch (index_build_step(owner->index, work_units)) {
        case INDEX_BUILD_IDLE:
            assert_false(index_build_is_due(owner->index));
            return;
        case INDEX_BUILD_PLAN:
            assert_false(index_build_is_due(owner->index));
            owner_carry_out(owner, NULL, NULL);
            break;
        case INDEX_BUILD_MORE:
            assert_true(index_build_is_due(owner->index));
            break;
        default:
            fail_msg("no memory");
        }
    }
}

// ---- searches ----
struct answer {
    enum index_status status;
    struct index_selection selection;
    const struct index_selected *tokens;
};
static inline struct answer search_run(struct index_search *search, const struct index *index,
                                       const struct index_query *query, uint64_t work_units, uint32_t steps_max)
{
    struct answer answer = {.status = index_search_reserve(search, index, query)};
    if (answer.status == INDEX_OK) {
        answer.status = index_search_begin(search, index, query);
    }
    if (answer.status != INDEX_OK) {
        return answer;
    }
    for (uint32_t i = 0; i < steps_max && !index_search_step(search, work_units); i++) {
    }
    index_search_finish(search, &answer.selection, &answer.tokens);
    return answer;
}

// Masses of all tokens by the book, in double precision.
static inline void masses_exact(const struct owner *owner, const struct index_query *query, double *masses)
{
    const uint32_t dim = owner->params.head_dim, n = owner->length;
    const size_t size = dtype_size(owner->params.dtype);
    const uint32_t views = query->query_count * query->head_count;
    double *scores = calloc(n + 1, sizeof *scores);
    memset(masses, 0, n * sizeof *masses);
    for (uint32_t v = 0; v < views; v++) {
        const float *vector = query->queries + (size_t)v * dim;
        const uint64_t end = query->first_position + v / query->head_count + 1;
        const uint32_t visible = (uint32_t)(end < n ? end : n);
        double top = -INFINITY, total = 0.0;
        for (uint32_t p = 0; p < visible; p++) {
            double dot = 0.0;
            for (uint32_t j = 0; j < dim; j++) {
                const unsigned char *at = owner->keys + ((size_t)p * dim + j) * size;
                dot += (double)vector[j] * (double)element_load(owner->params.dtype, at);
            }
            scores[p] = dot * (double)query->scale;
            top = scores[p] > top ? scores[p] : top;
        }
        for (uint32_t p = 0; p < visible; p++) {
            total += exp(scores[p] - top);
        }
        for (uint32_t p = 0; p < visible; p++) {
            masses[p] += exp(scores[p] - top) / total / views;
        }
    }
    free(scores);
}

struct bounds {
    uint32_t low, high, visible;
};
static inline struct bounds bounds_of(const struct owner *owner, const struct index_query *query)
{
    const uint64_t end = query->first_position + query->query_count;
    struct bounds b = {.visible = (uint32_t)(end < owner->length ? end : owner->length)};
    const uint64_t window = end > query->window ? end - query->window : 0;
    b.low = query->sinks < b.visible ? query->sinks : b.visible;
    b.high = window < b.visible ? (uint32_t)window : b.visible;
    b.high = b.high < b.low ? b.low : b.high;
    return b;
}

// What holds for every selection, complete or not.
static inline void selection_verify(const struct owner *owner, const struct index_query *query,
                                    const struct answer *answer)
{
    const struct bounds b = bounds_of(owner, query);
    double sum = 0.0;
    for (uint32_t i = 0; i < answer->selection.count; i++) {
        const struct index_selected *token = &answer->tokens[i];
        struct index_place place;
        assert_true(token->position >= b.low && token->position < b.high);
        assert_true(i == 0 || token[-1].position < token->position);
        assert_true(token->mass >= 0.0f && token->mass <= 1.001f);
        index_locate(owner->index, token->position, 1, &place);
        assert_true(place.page == token->place.page && place.row == token->place.row);
        sum += (double)token->mass;
    }
    assert_true(fabs(sum - (double)answer->selection.selected_mass) < 1e-3);
    assert_true(answer->selection.ends_mass >= 0.0f && sum + (double)answer->selection.ends_mass < 1.001);
}

#endif
