// What the index's owner does, simulated for the tests: it keeps the key bytes of every page row, lends them to a
// build, carries out plans by copying them, and checks every promise about pages on the way. What the index may not
// look at is garbage: rows not in use, pages that were given back, and lent rows after their time. Also: seeded random
// numbers, keys of several kinds, and an allocator that counts and refuses.
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

// A count that is large with ICECACHE_TEST_FULL=1, and small under a sanitizer.
static inline uint32_t rounds_of(uint32_t usual)
{
    const char *full = getenv("ICECACHE_TEST_FULL");
    if (full != NULL && strcmp(full, "1") == 0) {
        return 5 * usual;
    }
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
    return (usual + 3) / 4;
#else
    return usual;
#endif
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
    KEYS_LARGEST, // norms next to what is refused
    KEYS_MIXED,   // from next to nothing to huge, a factor of 16 from one cluster to the next
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
    case KEYS_LARGEST:
        return rng_normal(rng) * 0x1p53f;
    case KEYS_MIXED:
        return ldexpf(rng_normal(rng), 4 * ((int)cluster - 10));
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
    uint32_t length, erased_room;
    bool *erased; // per position
    // Rows lent to a build, a block for each page, and pages provided for a plan that is not committed.
    unsigned char **lent;
    size_t *lent_bytes, stride;
    uint32_t lent_count, planned_count;
    uint32_t *planned;
    bool is_void; // the plan under way was voided
};

static inline void owner_check(const struct owner *owner)
{
    char text[256] = "";
    if (!index_check(owner->index, text, sizeof text)) {
        fail_msg("index_check: %s", text);
    }
}
static inline size_t owner_page_bytes(const struct owner *owner)
{
    return owner->params.page_tokens * owner->row_bytes;
}
static inline void owner_provide(struct owner *owner, uint32_t page)
{
    assert_true(page < index_page_bound(owner->index));
    assert_int_equal(index_page_rows(owner->index, page), 0);
    if (page >= owner->page_room) {
        const uint32_t room = 2 * page + 8;
        owner->rows = realloc(owner->rows, room * owner_page_bytes(owner));
        owner->present = realloc(owner->present, room * sizeof owner->present[0]);
        assert_true(owner->rows != NULL && owner->present != NULL);
        memset(owner->present + owner->page_room, 0, (room - owner->page_room) * sizeof owner->present[0]);
        owner->page_room = room;
    }
    assert_false(owner->present[page]);
    owner->present[page] = true;
    memset(owner->rows + page * owner_page_bytes(owner), 0xff, owner_page_bytes(owner)); // NaN in every type
}
static inline void owner_take_back(struct owner *owner, uint32_t page)
{
    assert_true(page < owner->page_room && owner->present[page]);
    owner->present[page] = false;
    memset(owner->rows + page * owner_page_bytes(owner), 0xff, owner_page_bytes(owner));
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
// Ends the time of the rows lent: what is read of them afterwards is NaN, or found by the sanitizer.
static inline void owner_unlend(struct owner *owner)
{
    for (uint32_t i = 0; i < owner->lent_count; i++) {
        memset(owner->lent[i], 0xff, owner->lent_bytes[i]);
        free(owner->lent[i]);
    }
    owner->lent_count = 0;
}
// The new pages of a plan that will not be committed.
static inline void owner_unplan(struct owner *owner)
{
    for (uint32_t i = 0; i < owner->planned_count; i++) {
        owner_take_back(owner, owner->planned[i]);
    }
    owner->planned_count = 0;
}
static inline void owner_end(struct owner *owner)
{
    index_destroy(owner->index);
    owner_unlend(owner);
    free(owner->lent);
    free(owner->lent_bytes);
    free(owner->planned);
    free(owner->erased);
    free(owner->rows);
    free(owner->present);
}
static inline void owner_note_length(struct owner *owner, uint32_t length)
{
    if (length > owner->erased_room) {
        const uint32_t room = 2 * length;
        owner->erased = realloc(owner->erased, room * sizeof owner->erased[0]);
        assert_non_null(owner->erased);
        owner->erased_room = room;
    }
    for (uint32_t p = owner->length; p < length; p++) {
        owner->erased[p] = false;
    }
    owner->length = length;
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
        owner_note_length(owner, owner->length + n);
        assert_int_equal(index_length(owner->index), owner->length);
    }
    return status;
}
// Every token lies where the index says, bit for bit, and page lists agree with places.
static inline void owner_verify(const struct owner *owner)
{
    const uint32_t n = owner->length, step = owner->params.page_tokens;
    struct index_place *places = calloc(n + 1, sizeof *places);
    uint32_t positions[INDEX_PAGE_TOKENS_MAX], live = 0;
    assert_int_equal(index_length(owner->index), n);
    index_locate(owner->index, 0, n, places);
    for (uint32_t p = 0; p < n; p++) {
        assert_int_equal(places[p].page == UINT32_MAX, owner->erased[p]);
        if (!owner->erased[p]) {
            assert_memory_equal(owner_row(owner, places[p]), owner->keys + p * owner->row_bytes, owner->row_bytes);
            live++;
        }
    }
    uint32_t rows = 0;
    for (uint32_t page = 0; page < index_page_bound(owner->index); page++) {
        const uint32_t count = index_page_positions(owner->index, page, positions);
        assert_int_equal(count, index_page_rows(owner->index, page));
        bool is_planned = false;
        for (uint32_t i = 0; i < owner->planned_count; i++) {
            is_planned = is_planned || owner->planned[i] == page;
        }
        assert_int_equal(page < owner->page_room && owner->present[page], count != 0 || is_planned);
        rows += count;
        for (uint32_t r = 0; r < step; r++) {
            if (positions[r] != UINT32_MAX) {
                assert_true(positions[r] < n);
                assert_true(places[positions[r]].page == page && places[positions[r]].row == r);
            }
        }
    }
    assert_int_equal(rows, live);
    free(places);
    owner_check(owner);
}
// Lends the rows of the pages that the build asks for: copies in blocks of their own, at another stride, with garbage
// in rows that are not in use.
static inline void owner_lend(struct owner *owner)
{
    const uint32_t *pages;
    uint32_t count, positions[INDEX_PAGE_TOKENS_MAX];
    const uint32_t step = owner->params.page_tokens;
    index_rows_get(owner->index, &pages, &count);
    assert_true(count > 0);
    owner->stride = owner->stride == 0 ? owner->row_bytes + 3 * dtype_size(owner->params.dtype) : owner->stride;
    owner->lent = realloc(owner->lent, (owner->lent_count + count) * sizeof owner->lent[0]);
    owner->lent_bytes = realloc(owner->lent_bytes, (owner->lent_count + count) * sizeof owner->lent_bytes[0]);
    const void **keys = malloc(count * sizeof *keys);
    assert_true(owner->lent != NULL && owner->lent_bytes != NULL && keys != NULL);
    for (uint32_t i = 0; i < count; i++) {
        const size_t bytes = (step - 1) * owner->stride + owner->row_bytes;
        unsigned char *block = malloc(bytes);
        assert_non_null(block);
        memset(block, 0xff, bytes);
        assert_true(index_page_positions(owner->index, pages[i], positions) > 0);
        for (uint32_t row = 0; row < step; row++) {
            if (positions[row] != UINT32_MAX) {
                memcpy(block + row * owner->stride, owner_row(owner, (struct index_place){pages[i], row}),
                       owner->row_bytes);
            }
        }
        keys[i] = block;
        owner->lent_bytes[owner->lent_count] = bytes;
        owner->lent[owner->lent_count++] = block;
    }
    index_rows_give(owner->index, keys, owner->stride);
    free(keys);
}
// One slice of the build; rows it asks for are lent.
static inline enum index_build_state owner_step(struct owner *owner, uint64_t work_units)
{
    const bool was_due = index_build_is_due(owner->index);
    const enum index_build_state state = index_build_step(owner->index, work_units);
    assert_true(was_due || state == INDEX_BUILD_IDLE || state == INDEX_BUILD_PLAN);
    switch (state) {
    case INDEX_BUILD_ROWS:
        assert_false(index_build_is_due(owner->index));
        assert_int_equal(index_build_step(owner->index, work_units), INDEX_BUILD_ROWS); // it waits
        owner_lend(owner);
        assert_true(index_build_is_due(owner->index));
        break;
    case INDEX_BUILD_NO_MEMORY:
        owner_unlend(owner);
        break;
    case INDEX_BUILD_MORE:
        assert_true(index_build_is_due(owner->index));
        break;
    default:
        assert_false(index_build_is_due(owner->index));
    }
    return state;
}
static inline void owner_drop_plan(struct owner *owner)
{
    index_plan_drop(owner->index);
    owner_unlend(owner); // it does not look at the rows again
    owner_unplan(owner);
    assert_true(index_build_is_due(owner->index));
}
// Copies in two slices around `between`, which may void the plan; the owner's pages change only as the plan allows.
static inline void owner_carry_out(struct owner *owner, void (*between)(void *), void *argument)
{
    struct index_plan plan;
    uint32_t positions[INDEX_PAGE_TOKENS_MAX];
    index_plan_get(owner->index, &plan);
    owner->is_void = false;
    owner->planned = realloc(owner->planned, (plan.new_page_count + 1) * sizeof owner->planned[0]);
    assert_non_null(owner->planned);
    for (uint32_t i = 0; i < plan.new_page_count; i++) {
        owner_provide(owner, plan.new_pages[i]);
        owner->planned[owner->planned_count++] = plan.new_pages[i];
    }
    for (uint32_t i = 0; i <= plan.move_count; i++) {
        if (i == plan.move_count / 2 && between != NULL) {
            between(argument);
            if (owner->is_void) {
                return;
            }
        }
        if (i == plan.move_count) {
            break;
        }
        const struct index_move *move = &plan.moves[i];
        index_page_positions(owner->index, move->from.page, positions);
        assert_true(positions[move->from.row] != UINT32_MAX); // the source is in use
        if (index_page_rows(owner->index, move->to.page) > 0) {
            index_page_positions(owner->index, move->to.page, positions);
            assert_true(positions[move->to.row] == UINT32_MAX); // the target is not
        }
        memcpy(owner_row(owner, move->to), owner_row(owner, move->from), owner->row_bytes);
    }
    for (uint32_t i = 0; i < plan.released_page_count; i++) {
        assert_true(index_page_rows(owner->index, plan.released_pages[i]) != 0);
        owner_take_back(owner, plan.released_pages[i]);
    }
    owner->planned_count = 0;
    index_plan_commit(owner->index);
    owner_unlend(owner);
}
// Builds until nothing is due.
static inline void owner_build(struct owner *owner, uint64_t work_units)
{
    for (;;) {
        const enum index_build_state state = owner_step(owner, work_units);
        assert_true(state != INDEX_BUILD_NO_MEMORY);
        if (state == INDEX_BUILD_IDLE) {
            return;
        }
        if (state == INDEX_BUILD_PLAN) {
            owner_carry_out(owner, NULL, NULL);
        }
    }
}
// Builds until a plan is pending.
static inline void owner_build_plan(struct owner *owner, uint64_t work_units)
{
    enum index_build_state state = INDEX_BUILD_MORE;
    while (state != INDEX_BUILD_PLAN) {
        assert_true(state == INDEX_BUILD_MORE || state == INDEX_BUILD_ROWS);
        state = owner_step(owner, work_units);
    }
}

// ---- forgetting ----
static inline void owner_forgotten(struct owner *owner, uint32_t page_bound, const uint32_t *pages, uint32_t count)
{
    assert_true(count <= page_bound);
    for (uint32_t i = 0; i < count; i++) {
        assert_int_equal(index_page_rows(owner->index, pages[i]), 0);
        owner_take_back(owner, pages[i]); // each once
    }
    owner_unlend(owner);
    owner_unplan(owner);
    owner->is_void = true;
}
static inline void owner_truncate(struct owner *owner, uint32_t length)
{
    const uint32_t bound = index_page_bound(owner->index);
    uint32_t *pages = malloc(bound * sizeof *pages), count = UINT32_MAX; // exactly what is promised to suffice
    index_truncate(owner->index, length, pages, &count);
    if (length < owner->length) {
        owner->length = length;
        owner_forgotten(owner, bound, pages, count);
    }
    assert_int_equal(index_length(owner->index), owner->length);
    free(pages);
}
static inline void owner_erase(struct owner *owner, uint32_t position)
{
    const uint32_t bound = index_page_bound(owner->index);
    uint32_t *pages = malloc(bound * sizeof *pages), count = UINT32_MAX;
    index_erase(owner->index, position, pages, &count);
    owner->erased[position] = true;
    owner_forgotten(owner, bound, pages, count);
    free(pages);
}

// ---- searches ----
struct answer {
    enum index_status status;
    struct index_selection selection;
    const struct index_selected *tokens;
};
// Over an index that is all of its lane.
static inline enum index_status search_reserve(struct index_search *search, const struct index *index,
                                               const struct index_query *query)
{
    const struct index_part whole = index_part_whole(index);
    return index_search_reserve(search, &whole, 1, query);
}
static inline enum index_status search_begin(struct index_search *search, const struct index *index,
                                             const struct index_query *query)
{
    const struct index_part whole = index_part_whole(index);
    return index_search_begin(search, &whole, 1, query);
}

static inline struct answer search_parts(struct index_search *search, const struct index_part *parts,
                                         uint32_t part_count, const struct index_query *query, uint64_t work_units,
                                         uint32_t steps_max)
{
    struct answer answer = {.status = index_search_reserve(search, parts, part_count, query)};
    if (answer.status == INDEX_OK) {
        answer.status = index_search_begin(search, parts, part_count, query);
    }
    if (answer.status != INDEX_OK) {
        return answer;
    }
    for (uint32_t i = 0; i < steps_max && !index_search_step(search, work_units); i++) {
    }
    index_search_finish(search, &answer.selection, &answer.tokens);
    return answer;
}

static inline struct answer search_run(struct index_search *search, const struct index *index,
                                       const struct index_query *query, uint64_t work_units, uint32_t steps_max)
{
    const struct index_part whole = index_part_whole(index);
    return search_parts(search, &whole, 1, query, work_units, steps_max);
}

// Masses of all tokens by the book, in double precision.
static inline void masses_exact(const struct owner *owner, const struct index_query *query, double *masses)
{
    const uint32_t dim = owner->params.head_dim, n = owner->length;
    const size_t size = dtype_size(owner->params.dtype);
    const uint32_t views = query->query_count * query->head_count;
    double *scores = calloc(n + 1, sizeof *scores);
    float *keys = malloc(((size_t)n * dim + 1) * sizeof *keys);
    for (size_t i = 0; i < (size_t)n * dim; i++) {
        keys[i] = element_load(owner->params.dtype, owner->keys + i * size);
    }
    memset(masses, 0, n * sizeof *masses);
    for (uint32_t v = 0; v < views; v++) {
        const float *vector = query->queries + (size_t)v * dim;
        const uint64_t end = query->first_position + v / query->head_count + 1;
        const uint32_t visible = (uint32_t)(end < n ? end : n);
        double top = -INFINITY, total = 0.0;
        for (uint32_t p = 0; p < visible; p++) {
            double dot = 0.0;
            for (uint32_t j = 0; j < dim; j++) {
                dot += (double)vector[j] * (double)keys[(size_t)p * dim + j];
            }
            scores[p] = owner->erased[p] ? -INFINITY : dot * (double)query->scale;
            top = scores[p] > top ? scores[p] : top;
        }
        for (uint32_t p = 0; p < visible; p++) {
            total += owner->erased[p] ? 0.0 : exp(scores[p] - top);
        }
        for (uint32_t p = 0; p < visible; p++) {
            masses[p] += owner->erased[p] ? 0.0 : exp(scores[p] - top) / total / views;
        }
    }
    free(scores);
    free(keys);
}

struct bounds {
    uint32_t low, high, visible;
    uint32_t eligible; // tokens between low and high
};
static inline struct bounds bounds_of(const struct owner *owner, const struct index_query *query)
{
    const uint64_t end = query->first_position + query->query_count;
    struct bounds b = {.visible = (uint32_t)(end < owner->length ? end : owner->length)};
    const uint64_t window = end > query->window ? end - query->window : 0;
    b.low = query->sinks < b.visible ? query->sinks : b.visible;
    b.high = window < b.visible ? (uint32_t)window : b.visible;
    b.high = b.high < b.low ? b.low : b.high;
    for (uint32_t p = b.low; p < b.high; p++) {
        b.eligible += owner->erased[p] ? 0 : 1;
    }
    return b;
}

// What holds for every selection, complete or not, wherever the tokens lie.
static inline void selection_verify_tokens(const struct owner *owner, const struct index_query *query,
                                           const struct answer *answer)
{
    const struct bounds b = bounds_of(owner, query);
    double sum = 0.0;
    assert_int_equal(answer->status, INDEX_OK);
    for (uint32_t i = 0; i < answer->selection.count; i++) {
        const struct index_selected *token = &answer->tokens[i];
        assert_true(token->position >= b.low && token->position < b.high);
        assert_false(owner->erased[token->position]);
        assert_true(i == 0 || token[-1].position < token->position);
        assert_true(token->mass >= 0.0f && token->mass <= 1.001f);
        sum += (double)token->mass;
    }
    assert_true(answer->selection.scanned <= b.visible);
    assert_true(fabs(sum - (double)answer->selection.selected_mass) < 1e-3);
    assert_true(answer->selection.ends_mass >= 0.0f && sum + (double)answer->selection.ends_mass < 1.001);
    if (answer->selection.partial) {
        return;
    }
    // The budget is filled where enough tokens exist, unless a coverage is asked for. Whole pages may leave some of it.
    const uint32_t all = query->page_wise ? b.high - b.low : b.eligible;
    if (all <= query->budget && query->coverage == 0.0f) {
        assert_int_equal(answer->selection.count, b.eligible);
    } else if (!query->page_wise && query->coverage == 0.0f) {
        assert_int_equal(answer->selection.count, query->budget);
    } else if (!query->page_wise) {
        assert_true(answer->selection.count <= query->budget);
    }
}

// The same of an index that is all of its lane.
static inline void selection_verify(const struct owner *owner, const struct index_query *query,
                                    const struct answer *answer)
{
    selection_verify_tokens(owner, query, answer);
    for (uint32_t i = 0; i < answer->selection.count; i++) {
        struct index_place place;
        index_locate(owner->index, answer->tokens[i].position, 1, &place);
        assert_true(place.page == answer->tokens[i].place.page && place.row == answer->tokens[i].place.row);
    }
}

#endif
