// Attention-like and isotropic keys and queries.
//
// attention: keys are Zipf-weighted clusters inside super-clusters under a power-law spectrum, with a few massive mean
// channels, log-normal norms and cluster ids that stick for some tokens; the query heads of a group share one to three
// target clusters and are about half of the time focused, else diffuse. Queries are independent, or those of
// consecutive decode steps: then targets stay for some steps, and so does a part of each head's own direction.
#include "data.h"
#include "random.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#define DIM_MAX        INDEX_HEAD_DIM_MAX
#define MASSIVE        6u
#define SUPER_CLUSTERS 20u // clusters in one of them, on average

// Between decode steps: how probably the target stays, and how much of a head's own direction does. As in the real
// trace under tests/data, a quarter of the best 64 tokens is that of the step before.
#define STEP_STAYS 0.25
#define STEP_KEEPS 0.5f

struct attention {
    struct random random;
    uint32_t dim, clusters;
    float spectrum[DIM_MAX];
    float *rotation; // [dim][dim], orthogonal
    float *centres;  // [cluster][dim]
    double *weights; // cumulative
    double gain;     // towards the target of the query
    float target[DIM_MAX];
};

// An orthogonal matrix, uniformly drawn: Gram-Schmidt over normal rows, twice against rounding.
static void draw_rotation(struct attention *a)
{
    const uint32_t dim = a->dim;
    for (uint32_t i = 0; i < dim; i++) {
        float *row = a->rotation + (size_t)i * dim;
        for (uint32_t j = 0; j < dim; j++) {
            row[j] = (float)random_normal(&a->random);
        }
        for (uint32_t pass = 0; pass < 2; pass++) {
            for (uint32_t k = 0; k < i; k++) {
                const float *other = a->rotation + (size_t)k * dim;
                double dot = 0;
                for (uint32_t j = 0; j < dim; j++) {
                    dot += (double)row[j] * (double)other[j];
                }
                for (uint32_t j = 0; j < dim; j++) {
                    row[j] -= (float)dot * other[j];
                }
            }
        }
        double square = 0;
        for (uint32_t j = 0; j < dim; j++) {
            square += (double)row[j] * (double)row[j];
        }
        for (uint32_t j = 0; j < dim; j++) {
            row[j] = (float)((double)row[j] / sqrt(square));
        }
    }
}

// A power law over the coordinates, mean square 1.
static void set_spectrum(struct attention *a)
{
    double square = 0;
    for (uint32_t j = 0; j < a->dim; j++) {
        square += 1.0 / (j + 1);
    }
    for (uint32_t j = 0; j < a->dim; j++) {
        a->spectrum[j] = (float)(1 / sqrt(j + 1.0) / sqrt(square / a->dim));
    }
}

// out += factor * a draw from the rotated spectrum.
static void add_draw(struct attention *a, double factor, float *out)
{
    const uint32_t dim = a->dim;
    for (uint32_t i = 0; i < dim; i++) {
        const float value = (float)(factor * random_normal(&a->random)) * a->spectrum[i];
        const float *row = a->rotation + (size_t)i * dim;
        for (uint32_t j = 0; j < dim; j++) {
            out[j] += value * row[j];
        }
    }
}

static uint32_t draw_cluster(struct attention *a)
{
    const double at = random_unit(&a->random) * a->weights[a->clusters - 1];
    uint32_t low = 0, high = a->clusters - 1;
    while (low < high) {
        const uint32_t middle = (low + high) / 2;
        if (a->weights[middle] > at) {
            high = middle;
        } else {
            low = middle + 1;
        }
    }
    return low;
}

static bool draw_centres(struct attention *a)
{
    const uint32_t dim = a->dim;
    const uint32_t supers = a->clusters / SUPER_CLUSTERS > 8 ? a->clusters / SUPER_CLUSTERS : 8;
    float *super = calloc((size_t)supers * dim, sizeof *super);
    if (super == NULL) {
        return false;
    }
    for (uint32_t s = 0; s < supers; s++) {
        add_draw(a, 1, super + (size_t)s * dim);
    }
    double sum = 0;
    for (uint32_t c = 0; c < a->clusters; c++) {
        const float *from = super + (size_t)random_below(&a->random, supers) * dim;
        float *centre = a->centres + (size_t)c * dim;
        for (uint32_t j = 0; j < dim; j++) {
            centre[j] = 0.68f * from[j];
        }
        add_draw(a, 0.72, centre);
        sum += pow(c + 1.0, -0.85);
        a->weights[c] = sum;
    }
    free(super);
    return true;
}

static double sign(struct attention *a)
{
    return random_bits(&a->random) >> 63 != 0 ? 1 : -1;
}

static bool draw_keys(struct attention *a, uint32_t tokens, const float *mean, float *keys)
{
    const uint32_t dim = a->dim;
    float *spread = malloc(a->clusters * sizeof *spread);
    if (spread == NULL) {
        return false;
    }
    for (uint32_t c = 0; c < a->clusters; c++) {
        spread[c] = (float)exp(0.3 * random_normal(&a->random));
    }
    uint32_t cluster = 0;
    for (uint32_t i = 0; i < tokens; i++) {
        if (i == 0 || random_unit(&a->random) < 0.3) {
            cluster = draw_cluster(a);
        }
        float *key = keys + (size_t)i * dim;
        for (uint32_t j = 0; j < dim; j++) {
            key[j] = a->centres[(size_t)cluster * dim + j] + mean[j];
        }
        add_draw(a, 0.58 * (double)spread[cluster], key);
        const float norm = (float)exp(0.12 * random_normal(&a->random));
        for (uint32_t j = 0; j < dim; j++) {
            key[j] *= norm;
        }
    }
    free(spread);
    return true;
}

static void draw_target(struct attention *a)
{
    a->gain = random_unit(&a->random) < 0.5 ? 1.45 : 0.45;
    memset(a->target, 0, sizeof a->target);
    const uint32_t targets = 1 + random_below(&a->random, 3);
    for (uint32_t t = 0; t < targets; t++) {
        const float *centre = a->centres + (size_t)draw_cluster(a) * a->dim;
        for (uint32_t j = 0; j < a->dim; j++) {
            a->target[j] += centre[j] / (float)targets;
        }
    }
}

static void draw_query(struct attention *a, uint32_t heads, const float *bias, float *queries)
{
    const uint32_t dim = a->dim;
    draw_target(a);
    for (uint32_t h = 0; h < heads; h++) {
        float *query = queries + (size_t)h * dim;
        const double head_gain = a->gain * exp(0.2 * random_normal(&a->random));
        for (uint32_t j = 0; j < dim; j++) {
            query[j] = (float)((double)bias[j] + head_gain * (double)a->target[j] + 0.35 * random_normal(&a->random));
        }
        add_draw(a, 0.55, query);
    }
}

// The query of the next step: of the same target, or of another one; `own` holds the heads' own directions.
static void draw_next_query(struct attention *a, uint32_t heads, const float *bias, bool is_first, float *own,
                            float *queries)
{
    const uint32_t dim = a->dim;
    const float kept = is_first ? 0 : STEP_KEEPS, fresh = sqrtf(1 - kept * kept);
    if (is_first || random_unit(&a->random) >= STEP_STAYS) {
        draw_target(a);
    }
    for (uint32_t h = 0; h < heads; h++) {
        float *mine = own + (size_t)h * dim, *query = queries + (size_t)h * dim;
        const double head_gain = a->gain * exp(0.2 * random_normal(&a->random));
        for (uint32_t j = 0; j < dim; j++) {
            mine[j] = kept * mine[j] + fresh * (float)(0.35 * random_normal(&a->random));
        }
        add_draw(a, 0.55 * (double)fresh, mine);
        for (uint32_t j = 0; j < dim; j++) {
            query[j] = bias[j] + (float)(head_gain * (double)a->target[j]) + mine[j];
        }
    }
}

static bool draw_queries(struct attention *a, const struct generator_shape *shape, const float *bias, float *queries)
{
    const size_t block = (size_t)shape->query_heads * a->dim;
    float *own = calloc(block, sizeof *own);
    for (uint32_t q = 0; own != NULL && q < shape->query_count; q++) {
        if (shape->steps) {
            draw_next_query(a, shape->query_heads, bias, q == 0, own, queries + q * block);
        } else {
            draw_query(a, shape->query_heads, bias, queries + q * block);
        }
    }
    free(own);
    return own != NULL;
}

static bool draw_attention(struct attention *a, const struct generator_shape *shape, float *keys, float *queries)
{
    float mean[DIM_MAX] = {0}, bias[DIM_MAX] = {0};
    uint32_t massive[MASSIVE], more[MASSIVE];
    set_spectrum(a);
    draw_rotation(a);
    if (!draw_centres(a)) {
        return false;
    }
    random_choose(&a->random, a->dim, MASSIVE, massive);
    random_choose(&a->random, a->dim, MASSIVE, more);
    for (uint32_t i = 0; i < MASSIVE; i++) {
        mean[massive[i]] = (float)(sign(a) * (4 + 5 * random_unit(&a->random)));
        bias[massive[i]] = (float)(2 * random_normal(&a->random));
    }
    for (uint32_t i = 0; i < MASSIVE; i++) {
        bias[more[i]] += (float)(3 * sign(a));
    }
    return draw_keys(a, shape->tokens, mean, keys) && draw_queries(a, shape, bias, queries);
}

bool generate_attention(const struct generator_shape *shape, uint64_t seed, float *keys, float *queries)
{
    struct attention a = {.dim = shape->head_dim};
    a.clusters = shape->tokens / 40 > 64 ? shape->tokens / 40 : 64;
    random_init(&a.random, seed);
    a.rotation = calloc((size_t)a.dim * a.dim, sizeof *a.rotation);
    a.centres = calloc((size_t)a.clusters * a.dim, sizeof *a.centres);
    a.weights = calloc(a.clusters, sizeof *a.weights);
    const bool drawn =
        a.rotation != NULL && a.centres != NULL && a.weights != NULL && draw_attention(&a, shape, keys, queries);
    free(a.rotation);
    free(a.centres);
    free(a.weights);
    return drawn;
}

void generate_gauss(const struct generator_shape *shape, uint64_t seed, float *keys, float *queries)
{
    struct random random;
    random_init(&random, seed);
    const size_t key_count = (size_t)shape->tokens * shape->head_dim;
    const size_t query_count = (size_t)shape->query_count * shape->query_heads * shape->head_dim;
    for (size_t i = 0; i < key_count; i++) {
        keys[i] = (float)random_normal(&random);
    }
    for (size_t i = 0; i < query_count; i++) {
        queries[i] = (float)random_normal(&random);
    }
}
