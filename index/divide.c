// Dividing a set of vectors in two.
//
// Means: 2-means from two far vectors, a few rounds over all of them, then every vector goes to the nearer mean.
// Promotion: two seeded vectors are promoted and lead their parts; every vector goes to the nearer one in the space of
// T_K. Either way neither part gets less than a third, so that nodes stay filled. Ties go to the lower number.
//
// The vectors are looked at in codes of 7 bits, the directions between two of them or of their means in 6 bits: what a
// part is coded against is worked out from the keys themselves afterwards. Pure functions.
#include "index/tree.h"

#include <float.h>
#include <math.h>
#include <string.h>

#define ROUNDS          4u
#define PAGE_ROUNDS     2u // for the order of pages in a cell
#define LEAST_SHARE     3u
#define CODE_MOST       63.0f
#define MEMBERS_AT_ONCE 256u
#define SIZE_LEAST      0x1p-100f // of the largest coordinate of all vectors; what is smaller counts as 0

static const float nothing[INDEX_HEAD_DIM_MAX];

void dci_members_code(const struct index *index, const float *const *vectors, uint32_t n, const float *center,
                      struct dci_members *members)
{
    const float *from = index->policy == INDEX_PROMOTION ? nothing : center;
    float lanes[DCI_LANES] = {0};
    for (uint32_t i = 0; i < n; i++) {
        index->kernel->largest16(vectors[i], from, index->head_dim, lanes);
    }
    const float largest = dci_max_lanes(lanes);
    const float inverse = largest > SIZE_LEAST ? CODE_MOST / largest : 0.0f;
    members->step = largest / CODE_MOST;
    for (uint32_t i = 0; i < n; i++) {
        members->norms2[i] = index->kernel->encode7(vectors[i], from, inverse, index->head_dim,
                                                    members->codes + (size_t)i * index->head_dim);
    }
}

// A member in steps of its codes.
static void member_read(const struct dci_division *division, uint32_t i, float *out)
{
    const uint32_t dim = division->index->head_dim;
    const uint8_t *codes = division->members->codes + (size_t)division->order[i] * dim;
    for (uint32_t j = 0; j < dim; j++) {
        out[j] = (float)(codes[j] - DCI_MEMBER_ZERO);
    }
}

// values[i] = inner product with b - a.
static void project(const struct dci_division *division, uint32_t begin, uint32_t n, const float *a, const float *b)
{
    const struct index *index = division->index;
    int8_t codes[INDEX_HEAD_DIM_MAX];
    struct dci_probe probe;
    index->kernel->probe(b, a, index->head_dim, codes, &probe);
    index->kernel->dots7(division->members->codes, index->head_dim, division->order + begin, n, &probe,
                         division->values + begin);
}

static uint32_t farthest_from(const struct dci_division *division, uint32_t begin, uint32_t n, const float *from)
{
    float largest = -FLT_MAX;
    uint32_t found = begin;
    project(division, begin, n, nothing, from);
    for (uint32_t i = begin; i < begin + n; i++) {
        const float distance = (float)division->members->norms2[division->order[i]] - 2.0f * division->values[i];
        if (distance > largest) {
            largest = distance;
            found = i;
        }
    }
    return found;
}

// The last coordinate of a member's T_K, or of what is as long.
static float last_coordinate(const struct dci_division *division, float norm2)
{
    const float c2 = division->index->tree_norm2_max, x2 = norm2 * division->members->step * division->members->step;
    return sqrtf(x2 < c2 ? c2 - x2 : 0.0f);
}

// values[i] <= 0: nearer to a.
static uint32_t value_all(const struct dci_division *division, uint32_t begin, uint32_t n, const float *a,
                          const float *b)
{
    const struct index *index = division->index;
    const struct dci_members *members = division->members;
    const float a2 = index->kernel->dot(a, a, index->head_dim), b2 = index->kernel->dot(b, b, index->head_dim);
    const bool is_promoted = index->policy == INDEX_PROMOTION;
    const float threshold = is_promoted ? 0.0f : 0.5f * (b2 - a2), scale = members->step * members->step;
    const float slack = is_promoted ? last_coordinate(division, b2) - last_coordinate(division, a2) : 0.0f;
    uint32_t near_a = 0;
    project(division, begin, n, a, b);
    for (uint32_t i = begin; i < begin + n; i++) {
        float value = division->values[i] - threshold;
        if (slack != 0.0f) {
            value = value * scale + slack * last_coordinate(division, (float)members->norms2[division->order[i]]);
        }
        division->values[i] = value;
        near_a += value <= 0.0f ? 1 : 0;
    }
    return near_a;
}

// total: sums of all members' codes.
static void means(const struct dci_division *division, uint32_t begin, uint32_t n, const int32_t *total, float *a,
                  float *b)
{
    const struct index *index = division->index;
    const uint32_t dim = index->head_dim;
    int32_t sums[INDEX_HEAD_DIM_MAX];
    uint32_t near[MEMBERS_AT_ONCE], count = 0, near_a = 0;
    memset(a, 0, dim * sizeof a[0]);
    for (uint32_t i = begin; i < begin + n; i++) {
        near[count] = division->order[i];
        count += division->values[i] <= 0.0f ? 1 : 0;
        if (count == MEMBERS_AT_ONCE || i + 1 == begin + n) {
            index->kernel->sums7(division->members->codes, dim, near, count, sums);
            for (uint32_t j = 0; j < dim; j++) {
                a[j] += (float)sums[j]; // exact
            }
            near_a += count;
            count = 0;
        }
    }
    const float of_a = 1.0f / (float)near_a, of_b = 1.0f / (float)(n - near_a);
    for (uint32_t j = 0; j < dim; j++) {
        b[j] = ((float)total[j] - a[j]) * of_b - DCI_MEMBER_ZERO;
        a[j] = a[j] * of_a - DCI_MEMBER_ZERO;
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

// The members that lead: two far ones, or two seeded ones.
static void choose_leads(const struct dci_division *division, uint32_t begin, uint32_t n, uint32_t *leads, float *a,
                         float *b)
{
    const struct index *index = division->index;
    if (index->policy == INDEX_PROMOTION) {
        const uint32_t first = (uint32_t)(dci_mix(index->seed ^ division->seed) % n);
        const uint32_t second = (uint32_t)(dci_mix(index->seed ^ division->seed ^ 1) % (n - 1));
        leads[0] = begin + first;
        leads[1] = begin + (second >= first ? second + 1 : second);
    } else {
        member_read(division, begin, a);
        leads[0] = farthest_from(division, begin, n, a);
        member_read(division, leads[0], a);
        leads[1] = farthest_from(division, begin, n, a);
    }
    member_read(division, leads[0], a);
    member_read(division, leads[1], b);
}

// Brings a promoted member to the front of its part.
static void lead(const struct dci_division *division, uint32_t begin, uint32_t n, float value)
{
    for (uint32_t i = begin; i < begin + n; i++) {
        if (division->values[i] == value) {
            swap(division, begin, i);
            return;
        }
    }
}

// Values of the members: below 0 in the first part.
static uint32_t divide(const struct dci_division *division, uint32_t begin, uint32_t n, uint32_t rounds)
{
    const struct index *index = division->index;
    float a[INDEX_HEAD_DIM_MAX], b[INDEX_HEAD_DIM_MAX];
    int32_t total[INDEX_HEAD_DIM_MAX];
    uint32_t leads[2];
    choose_leads(division, begin, n, leads, a, b);
    uint32_t near_a = value_all(division, begin, n, a, b);
    if (index->policy == INDEX_PROMOTION) { // they stay in their parts wherever the cut is
        division->values[leads[0]] = -INFINITY;
        division->values[leads[1]] = INFINITY;
        return near_a;
    }
    index->kernel->sums7(division->members->codes, index->head_dim, division->order + begin, n, total);
    for (uint32_t round = 1; round < rounds && near_a > 0 && near_a < n; round++) {
        means(division, begin, n, total, a, b);
        near_a = value_all(division, begin, n, a, b);
    }
    return near_a;
}

uint32_t dci_divide(const struct dci_division *division, uint32_t begin, uint32_t n)
{
    uint32_t left = divide(division, begin, n, ROUNDS);
    const uint32_t least = n / LEAST_SHARE;
    left = left < least ? least : left > n - least ? n - least : left;
    select_left(division, begin, n, left);
    if (division->index->policy == INDEX_PROMOTION) {
        lead(division, begin, left, -INFINITY);
        lead(division, begin + left, n - left, INFINITY);
    }
    return left;
}

void dci_divide_at(const struct dci_division *division, uint32_t begin, uint32_t n, uint32_t left)
{
    (void)divide(division, begin, n, PAGE_ROUNDS);
    select_left(division, begin, n, left);
}
