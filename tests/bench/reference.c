// Exact masses with the fp32 scan.
#include "reference.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static const float *masses_of(const struct reference *reference, uint32_t query)
{
    return reference->masses + (size_t)query * reference->data->tokens;
}

static int ascending(const void *a, const void *b)
{
    const uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return (x > y) - (x < y);
}

struct work {
    float *logits;   // [head][token]
    float *values;   // [token]
    uint32_t *order; // [token]
};

static void score_all(const struct scan_keys *keys, const struct scan_ops *ops, const struct scan_query *query,
                      float *logits)
{
    float chunk[SCAN_LANES * SCAN_HEADS_MAX];
    const uint32_t blocks = (keys->tokens + SCAN_LANES - 1) / SCAN_LANES;
    for (uint32_t block = 0; block < blocks; block++) {
        ops->score[SCAN_F32](keys, query, block, 1, chunk);
        const uint32_t first = block * SCAN_LANES;
        const uint32_t n = keys->tokens - first < SCAN_LANES ? keys->tokens - first : SCAN_LANES;
        for (uint32_t h = 0; h < query->heads; h++) {
            memcpy(logits + (size_t)h * keys->tokens + first, chunk + (size_t)h * SCAN_LANES, n * sizeof(float));
        }
    }
}

static void add_masses(const float *logits, uint32_t visible, uint32_t heads, float *masses)
{
    float top = logits[0];
    for (uint32_t i = 1; i < visible; i++) {
        top = logits[i] > top ? logits[i] : top;
    }
    double sum = 0;
    for (uint32_t i = 0; i < visible; i++) {
        sum += (double)expf(logits[i] - top);
    }
    const float factor = (float)(1 / (sum * heads));
    for (uint32_t i = 0; i < visible; i++) {
        masses[i] += expf(logits[i] - top) * factor;
    }
}

static void fill_query(struct reference *reference, const struct scan_keys *keys, const struct scan_ops *ops,
                       const struct work *work, struct scan_query *prepared, uint32_t query)
{
    const struct data *data = reference->data;
    const struct data_lane *lane = reference->lane;
    const uint32_t heads = data->query_heads, visible = lane->stands[query] + 1;
    uint32_t first, end;
    data_range(data, lane, query, &first, &end);
    scan_query_init(prepared, SCAN_F32, lane->queries + (size_t)query * heads * data->head_dim, heads, data->head_dim,
                    data->scale);
    score_all(keys, ops, prepared, work->logits);
    float *masses = reference->masses + (size_t)query * data->tokens;
    for (uint32_t h = 0; h < heads; h++) {
        add_masses(work->logits + (size_t)h * data->tokens, visible, heads, masses);
    }
    for (uint32_t i = 0; i < visible; i++) {
        reference->ends[query] += i < first || i >= end ? (double)masses[i] : 0;
    }
    uint32_t *alone = reference->alone + (size_t)query * REFERENCE_ALONE;
    const uint32_t eligible = end - first, taken = eligible < REFERENCE_ALONE ? eligible : REFERENCE_ALONE;
    for (uint32_t i = 0; i < eligible; i++) {
        work->order[i] = first + i;
    }
    memcpy(work->values, work->logits + (size_t)(query % heads) * data->tokens + first, eligible * sizeof(float));
    scan_partition(work->values, work->order, eligible, taken);
    memset(alone, 0xff, REFERENCE_ALONE * sizeof *alone);
    memcpy(alone, work->order, taken * sizeof *alone);
    qsort(alone, taken, sizeof *alone, ascending);
}

bool reference_create(struct reference *reference, const struct data *data, const struct data_lane *lane,
                      const struct scan_keys *keys, const struct scan_ops *ops)
{
    *reference = (struct reference){.data = data, .lane = lane};
    reference->masses = calloc((size_t)data->query_count * data->tokens, sizeof(float));
    reference->alone = calloc((size_t)data->query_count * REFERENCE_ALONE, sizeof(uint32_t));
    reference->ends = calloc(data->query_count, sizeof(double));
    struct work work = {
        .logits = malloc((size_t)data->query_heads * data->tokens * sizeof(float)),
        .values = malloc(data->tokens * sizeof(float)),
        .order = malloc(data->tokens * sizeof(uint32_t)),
    };
    struct scan_query *prepared = malloc(sizeof *prepared);
    const bool complete = reference->masses != NULL && reference->alone != NULL && reference->ends != NULL &&
                          work.logits != NULL && work.values != NULL && work.order != NULL && prepared != NULL;
    for (uint32_t q = 0; complete && q < data->query_count; q++) {
        fill_query(reference, keys, ops, &work, prepared, q);
    }
    free(work.logits);
    free(work.values);
    free(work.order);
    free(prepared);
    if (!complete) {
        reference_fini(reference);
    }
    return complete;
}

void reference_fini(struct reference *reference)
{
    free(reference->masses);
    free(reference->alone);
    free(reference->ends);
    *reference = (struct reference){0};
}

// Sum of the `count` largest; reorders the values.
static double sum_of_largest(float *values, uint32_t n, uint32_t count)
{
    uint32_t *companions = malloc((n + 1) * sizeof *companions);
    if (companions == NULL) {
        abort();
    }
    memset(companions, 0, (n + 1) * sizeof *companions);
    count = count < n ? count : n;
    scan_partition(values, companions, n, count);
    free(companions);
    double sum = 0;
    for (uint32_t i = 0; i < count; i++) {
        sum += (double)values[i];
    }
    return sum;
}

double reference_best(const struct reference *reference, uint32_t query, uint32_t budget)
{
    uint32_t first, end;
    data_range(reference->data, reference->lane, query, &first, &end);
    float *values = malloc((end - first + 1) * sizeof *values);
    if (values == NULL) {
        abort();
    }
    memcpy(values, masses_of(reference, query) + first, (end - first) * sizeof *values);
    const double sum = sum_of_largest(values, end - first, budget);
    free(values);
    return reference->ends[query] + sum;
}

static int descending(const void *a, const void *b)
{
    const float x = *(const float *)a, y = *(const float *)b;
    return (x < y) - (x > y);
}

uint32_t reference_needed(const struct reference *reference, uint32_t query, double mass, uint32_t most)
{
    uint32_t first, end;
    data_range(reference->data, reference->lane, query, &first, &end);
    const uint32_t eligible = end - first, taken = most < eligible ? most : eligible;
    float *values = malloc((eligible + 1) * sizeof *values);
    if (values == NULL) {
        abort();
    }
    memcpy(values, masses_of(reference, query) + first, eligible * sizeof *values);
    (void)sum_of_largest(values, eligible, taken);
    qsort(values, taken, sizeof *values, descending);
    double sum = reference->ends[query];
    uint32_t needed = 0;
    while (needed < taken && sum < mass) {
        sum += (double)values[needed++];
    }
    free(values);
    return sum >= mass ? needed : UINT32_MAX;
}

double reference_best_pages(const struct reference *reference, uint32_t query, const uint32_t *page_of,
                            uint32_t page_bound, uint32_t page_tokens, uint32_t pages)
{
    uint32_t first, end;
    data_range(reference->data, reference->lane, query, &first, &end);
    const uint32_t bound = page_of == NULL ? reference->data->tokens / page_tokens + 1 : page_bound;
    float *values = calloc(bound, sizeof *values);
    if (values == NULL) {
        abort();
    }
    const float *masses = masses_of(reference, query);
    for (uint32_t i = first; i < end; i++) {
        values[page_of == NULL ? i / page_tokens : page_of[i]] += masses[i];
    }
    const double sum = sum_of_largest(values, bound, pages);
    free(values);
    return reference->ends[query] + sum;
}

double reference_mass(const struct reference *reference, uint32_t query, const uint32_t *positions, uint32_t count)
{
    double sum = reference->ends[query];
    for (uint32_t i = 0; i < count; i++) {
        sum += (double)masses_of(reference, query)[positions[i]];
    }
    return sum;
}

double reference_recall(const struct reference *reference, uint32_t query, const uint32_t *positions, uint32_t count)
{
    const uint32_t *alone = reference->alone + (size_t)query * REFERENCE_ALONE;
    uint32_t found = 0, wanted = 0;
    while (wanted < REFERENCE_ALONE && alone[wanted] != UINT32_MAX) {
        wanted++;
    }
    for (uint32_t i = 0; i < count; i++) {
        found += bsearch(&positions[i], alone, wanted, sizeof *alone, ascending) != NULL;
    }
    return wanted == 0 ? 1 : (double)found / wanted;
}
