// Dividing a set of vectors in two.
//
// Means: 2-means from two far vectors, a few rounds over all of them, then every vector goes to the nearer mean.
// Promotion: two seeded vectors are promoted and lead their parts; every vector goes to the nearer one in the space of
// T_K. Either way neither part gets less than a third, so that nodes stay filled. Ties go to the lower number.
// Pure functions.
#include "index/tree.h"

#include <math.h>
#include <string.h>

#define ROUNDS      4u
#define PAGE_ROUNDS 2u // for the order of pages in a cell
#define LEAST_SHARE 3u

static const float *vector_at(const struct dci_division *division, uint32_t i)
{
    return division->vectors[division->order[i]];
}

static uint32_t farthest_from(const struct dci_division *division, uint32_t begin, uint32_t n, const float *from)
{
    const struct index *index = division->index;
    float largest = -1.0f;
    uint32_t found = begin;
    for (uint32_t i = begin; i < begin + n; i++) {
        const float distance = index->kernel->distance2(from, vector_at(division, i), index->head_dim);
        if (distance > largest) {
            largest = distance;
            found = i;
        }
    }
    return found;
}

// values[i] <= 0: nearer to a.
static uint32_t value_all(const struct dci_division *division, uint32_t begin, uint32_t n, const float *a,
                          const float *b)
{
    const struct index *index = division->index;
    const uint32_t dim = index->head_dim;
    float direction[INDEX_HEAD_DIM_MAX];
    for (uint32_t i = 0; i < dim; i++) {
        direction[i] = b[i] - a[i];
    }
    const float a2 = index->kernel->dot(a, a, dim), b2 = index->kernel->dot(b, b, dim);
    float threshold = 0.5f * (b2 - a2), slack = 0.0f;
    const float c2 = index->tree_norm2_max;
    if (index->policy == INDEX_PROMOTION) { // the last coordinate of T_K
        slack = sqrtf(b2 < c2 ? c2 - b2 : 0.0f) - sqrtf(a2 < c2 ? c2 - a2 : 0.0f);
        threshold = 0.0f;
    }
    uint32_t near_a = 0;
    for (uint32_t i = begin; i < begin + n; i++) {
        const float *x = vector_at(division, i);
        float value = index->kernel->dot(direction, x, dim) - threshold;
        if (slack != 0.0f) {
            const float x2 = index->kernel->dot(x, x, dim);
            value += slack * sqrtf(x2 < c2 ? c2 - x2 : 0.0f);
        }
        division->values[i] = value;
        near_a += value <= 0.0f ? 1 : 0;
    }
    return near_a;
}

static void means(const struct dci_division *division, uint32_t begin, uint32_t n, uint32_t near_a, float *a, float *b)
{
    const struct index *index = division->index;
    const uint32_t dim = index->head_dim;
    memset(a, 0, dim * sizeof a[0]);
    memset(b, 0, dim * sizeof b[0]);
    for (uint32_t i = begin; i < begin + n; i++) {
        index->kernel->add(division->values[i] <= 0.0f ? a : b, vector_at(division, i), dim);
    }
    for (uint32_t i = 0; i < dim; i++) {
        a[i] /= (float)near_a;
        b[i] /= (float)(n - near_a);
    }
}

static bool is_before(const struct dci_division *division, uint32_t i, uint32_t j)
{
    const float *values = division->values;
    return values[i] < values[j] || (values[i] == values[j] && division->order[i] < division->order[j]);
}

static void swap(const struct dci_division *division, uint32_t i, uint32_t j)
{
    const uint32_t order = division->order[i];
    const float value = division->values[i];
    division->order[i] = division->order[j];
    division->values[i] = division->values[j];
    division->order[j] = order;
    division->values[j] = value;
}

// Brings the `left` smallest values to the front.
static void select_left(const struct dci_division *division, uint32_t begin, uint32_t n, uint32_t left)
{
    uint32_t low = begin, high = begin + n;
    const uint32_t cut = begin + left;
    while (high - low > 1 && cut > low && cut < high) {
        swap(division, low + (high - low) / 2, high - 1);
        uint32_t store = low;
        for (uint32_t i = low; i + 1 < high; i++) {
            if (is_before(division, i, high - 1)) {
                swap(division, i, store++);
            }
        }
        swap(division, store, high - 1);
        if (cut <= store) {
            high = store;
        } else {
            low = store + 1;
        }
    }
}

// The vectors that lead: copies of two far ones, or of two seeded ones.
static void choose_leads(const struct dci_division *division, uint32_t begin, uint32_t n, float *a, float *b)
{
    const struct index *index = division->index;
    const size_t bytes = index->head_dim * sizeof a[0];
    if (index->policy == INDEX_PROMOTION) {
        const uint32_t first = (uint32_t)(dci_mix(index->seed ^ division->seed) % n);
        const uint32_t second = (uint32_t)(dci_mix(index->seed ^ division->seed ^ 1) % (n - 1));
        memcpy(a, vector_at(division, begin + first), bytes);
        memcpy(b, vector_at(division, begin + (second >= first ? second + 1 : second)), bytes);
        return;
    }
    memcpy(a, vector_at(division, farthest_from(division, begin, n, vector_at(division, begin))), bytes);
    memcpy(b, vector_at(division, farthest_from(division, begin, n, a)), bytes);
}

// Brings the promoted vectors to the front of their parts (any vector equal to them will do).
static void lead(const struct dci_division *division, uint32_t begin, uint32_t n, const float *vector)
{
    for (uint32_t i = begin; i < begin + n; i++) {
        if (memcmp(vector_at(division, i), vector, division->index->head_dim * sizeof vector[0]) == 0) {
            swap(division, begin, i);
            return;
        }
    }
}

static uint32_t divide(const struct dci_division *division, uint32_t begin, uint32_t n, uint32_t rounds, float *a,
                       float *b)
{
    choose_leads(division, begin, n, a, b);
    uint32_t near_a = value_all(division, begin, n, a, b);
    for (uint32_t round = 1; division->index->policy == INDEX_MEANS && round < rounds; round++) {
        if (near_a == 0 || near_a == n) {
            break;
        }
        means(division, begin, n, near_a, a, b);
        near_a = value_all(division, begin, n, a, b);
    }
    return near_a;
}

uint32_t dci_divide(const struct dci_division *division, uint32_t begin, uint32_t n)
{
    float a[INDEX_HEAD_DIM_MAX], b[INDEX_HEAD_DIM_MAX];
    uint32_t left = divide(division, begin, n, ROUNDS, a, b);
    const uint32_t least = n / LEAST_SHARE > 1 ? n / LEAST_SHARE : 1;
    left = left < least ? least : left > n - least ? n - least : left;
    select_left(division, begin, n, left);
    if (division->index->policy == INDEX_PROMOTION) {
        lead(division, begin, left, a);
        lead(division, begin + left, n - left, b);
    }
    return left;
}

void dci_divide_at(const struct dci_division *division, uint32_t begin, uint32_t n, uint32_t left)
{
    float a[INDEX_HEAD_DIM_MAX], b[INDEX_HEAD_DIM_MAX];
    (void)divide(division, begin, n, PAGE_ROUNDS, a, b);
    select_left(division, begin, n, left);
}
