// Test data and reference attention. No state; any thread.
#include "history.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { KIND_KEY = 1, KIND_VALUE, KIND_QUERY, CLUSTERS = 24 };

// ---- elements ----

static uint16_t to_half(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    uint16_t sign = (uint16_t)(bits >> 16 & 0x8000u);
    float size = fabsf(value);
    if (size < 0x1p-14f) // a subnormal half: counts of 2^-24
        return (uint16_t)(sign | (uint16_t)lrintf(size * 0x1p24f));
    memcpy(&bits, &size, sizeof bits);
    bits += 0xfffu + (bits >> 13 & 1); // round to nearest, ties to even
    return (uint16_t)(sign | (uint16_t)((bits >> 13) - (112u << 10)));
}

static float of_half(uint16_t half)
{
    uint32_t exponent = half >> 10 & 31u, fraction = half & 0x3ffu;
    float size = exponent == 0 ? (float)fraction * 0x1p-24f : ldexpf((float)(fraction | 0x400u), (int)exponent - 25);
    return half & 0x8000u ? -size : size;
}

void vector_encode(const float *in, uint32_t count, ice_dtype dtype, void *out)
{
    for (uint32_t i = 0; i < count; i++) {
        if (dtype == ICE_FP32) {
            memcpy((uint8_t *)out + 4 * (size_t)i, &in[i], 4);
            continue;
        }
        uint32_t bits;
        memcpy(&bits, &in[i], sizeof bits);
        uint16_t element = dtype == ICE_FP16 ? to_half(in[i]) : (uint16_t)((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
        memcpy((uint8_t *)out + 2 * (size_t)i, &element, 2);
    }
}

void vector_decode(const void *in, uint32_t count, ice_dtype dtype, float *out)
{
    for (uint32_t i = 0; i < count; i++) {
        uint16_t element;
        if (dtype == ICE_FP32) {
            memcpy(&out[i], (const uint8_t *)in + 4 * (size_t)i, 4);
            continue;
        }
        memcpy(&element, (const uint8_t *)in + 2 * (size_t)i, 2);
        uint32_t bits = (uint32_t)element << 16;
        if (dtype == ICE_FP16)
            out[i] = of_half(element);
        else
            memcpy(&out[i], &bits, sizeof bits);
    }
}

// About normal: the sum of two uniform numbers.
static float number_of(uint64_t *state)
{
    uint64_t bits = random_next(state);
    return (float)((double)(bits >> 32) + (double)(bits & 0xffffffffu)) * 0x1p-32f * 2.0f - 2.0f;
}

void vector_make(float *out, uint32_t head_dim, uint64_t seed, uint64_t lane, uint64_t cluster, uint64_t number)
{
    uint64_t centre = seed * 0x100000001b3u + lane * 0x10001u + cluster * 0x9e3779b1u;
    uint64_t noise = centre ^ (number + 1) * 0xd6e8feb86659fd93u;
    for (uint32_t i = 0; i < head_dim; i++)
        out[i] = 0.9f * number_of(&centre) + 0.5f * number_of(&noise);
}

static uint64_t cluster_of(uint64_t seed, uint64_t lane, uint64_t position)
{
    uint64_t state = seed ^ lane << 40 ^ position / 5; // neighbours often share one
    return random_below(&state, CLUSTERS);
}

// ---- shapes and histories ----

size_t shape_row_bytes(const struct shape *shape)
{
    return shape->head_dim * (shape->dtype == ICE_FP32 ? sizeof(float) : sizeof(uint16_t));
}

uint32_t shape_group(const struct shape *shape)
{
    return shape->query_heads / shape->kv_heads;
}

const char *shape_text(const struct shape *shape)
{
    static char text[128];
    snprintf(text, sizeof text, "%s head_dim %u, %u layers, %u KV heads, %u query heads",
             shape->dtype == ICE_BF16   ? "bf16"
             : shape->dtype == ICE_FP16 ? "fp16"
                                        : "fp32",
             shape->head_dim, shape->layers, shape->kv_heads, shape->query_heads);
    return text;
}

static size_t row_index(const struct history *history, uint32_t layer, uint32_t head, uint64_t position)
{
    assert_true(layer < history->shape.layers && head < history->shape.kv_heads && position < history->length);
    return ((size_t)layer * history->shape.kv_heads + head) * history->length + position;
}

uint8_t *history_key(const struct history *history, uint32_t layer, uint32_t head, uint64_t position)
{
    return history->keys + row_index(history, layer, head, position) * shape_row_bytes(&history->shape);
}

uint8_t *history_value(const struct history *history, uint32_t layer, uint32_t head, uint64_t position)
{
    return history->values + row_index(history, layer, head, position) * shape_row_bytes(&history->shape);
}

void history_create(struct history *history, const struct shape *shape, uint64_t length, uint64_t seed)
{
    float vector[256];
    *history = (struct history){.shape = *shape, .length = length, .seed = seed};
    history->side_bytes = shape->layers * shape->kv_heads * length * shape_row_bytes(shape);
    history->keys = malloc(history->side_bytes);
    history->values = malloc(history->side_bytes);
    assert_non_null(history->keys);
    assert_non_null(history->values);
    for (uint32_t layer = 0; layer < shape->layers; layer++) {
        for (uint32_t head = 0; head < shape->kv_heads; head++) {
            uint64_t lane = (uint64_t)layer * 1000 + head;
            for (uint64_t position = 0; position < length; position++) {
                uint64_t cluster = cluster_of(seed, lane, position);
                vector_make(vector, shape->head_dim, seed + KIND_KEY, lane, cluster, position);
                vector_encode(vector, shape->head_dim, shape->dtype, history_key(history, layer, head, position));
                vector_make(vector, shape->head_dim, seed + KIND_VALUE, lane, position, position);
                vector_encode(vector, shape->head_dim, shape->dtype, history_value(history, layer, head, position));
            }
        }
    }
}

void history_destroy(struct history *history)
{
    free(history->keys);
    free(history->values);
    *history = (struct history){0};
}

struct ice_kv_source history_source(const struct history *history, uint32_t layer, uint64_t first)
{
    size_t row = shape_row_bytes(&history->shape), head = history->length * row;
    size_t offset = (layer == ICE_ALL_LAYERS ? 0 : layer) * history->shape.kv_heads * head + first * row;
    return (struct ice_kv_source){
        .keys = history->keys + offset,
        .values = history->values + offset,
        .keys_bytes = history->side_bytes - offset,
        .values_bytes = history->side_bytes - offset,
        .layer_stride = history->shape.kv_heads * head,
        .token_stride = row,
        .head_stride = head,
    };
}

void history_riding(const struct history *history, uint32_t layer, uint64_t first, uint32_t n, uint8_t *keys,
                    uint8_t *values)
{
    size_t row = shape_row_bytes(&history->shape);
    for (uint32_t i = 0; i < n; i++) {
        for (uint32_t head = 0; head < history->shape.kv_heads; head++, keys += row, values += row) {
            memcpy(keys, history_key(history, layer, head, first + i), row);
            memcpy(values, history_value(history, layer, head, first + i), row);
        }
    }
}

void history_queries(const struct history *history, uint32_t layer, uint64_t first, uint32_t n, uint8_t *queries)
{
    const struct shape *shape = &history->shape;
    float vector[256];
    for (uint32_t i = 0; i < n; i++) {
        for (uint32_t head = 0; head < shape->query_heads; head++, queries += shape_row_bytes(shape)) {
            uint64_t lane = (uint64_t)layer * 1000 + head / shape_group(shape);
            uint64_t cluster = cluster_of(history->seed + KIND_QUERY, lane, (first + i) * 5);
            // A centre of the keys, as the keys' own noise is drawn from other numbers.
            vector_make(vector, shape->head_dim, history->seed + KIND_KEY, lane, cluster,
                        (1u << 30) + (first + i) * 64 + head);
            vector_encode(vector, shape->head_dim, shape->dtype, queries);
        }
    }
}

// ---- attention ----

static float dot(const float *a, const float *b, uint32_t count)
{
    float sum = 0;
    for (uint32_t i = 0; i < count; i++)
        sum += a[i] * b[i];
    return sum;
}

void attention(const struct shape *shape, const float *query, const void *keys, const void *values, uint64_t count,
               float *out)
{
    float vector[256], scale = 1.0f / sqrtf((float)shape->head_dim), top = -INFINITY, total = 0;
    float *scores = malloc(count * sizeof *scores);
    size_t row = shape_row_bytes(shape);
    assert_non_null(scores);
    for (uint64_t i = 0; i < count; i++) {
        vector_decode((const uint8_t *)keys + i * row, shape->head_dim, shape->dtype, vector);
        scores[i] = dot(query, vector, shape->head_dim) * scale;
        top = scores[i] > top ? scores[i] : top;
    }
    memset(out, 0, shape->head_dim * sizeof *out);
    for (uint64_t i = 0; i < count; i++) {
        float weight = expf(scores[i] - top);
        total += weight;
        vector_decode((const uint8_t *)values + i * row, shape->head_dim, shape->dtype, vector);
        for (uint32_t j = 0; j < shape->head_dim; j++)
            out[j] += weight * vector[j];
    }
    for (uint32_t j = 0; j < shape->head_dim; j++)
        out[j] /= total;
    free(scores);
}

static void add_masses(const struct history *history, uint32_t layer, uint32_t kv_head, const float *query,
                       uint64_t visible, double *scores, double *masses)
{
    const struct shape *shape = &history->shape;
    float vector[256];
    double top = -INFINITY, total = 0;
    for (uint64_t i = 0; i < visible; i++) {
        vector_decode(history_key(history, layer, kv_head, i), shape->head_dim, shape->dtype, vector);
        scores[i] = dot(query, vector, shape->head_dim) / sqrt(shape->head_dim);
        top = scores[i] > top ? scores[i] : top;
    }
    for (uint64_t i = 0; i < visible; i++)
        total += scores[i] = exp(scores[i] - top);
    for (uint64_t i = 0; i < visible; i++)
        masses[i] += scores[i] / total;
}

void attention_masses(const struct history *history, uint32_t layer, uint32_t kv_head, const uint8_t *queries,
                      uint64_t first, uint32_t n, double *masses)
{
    const struct shape *shape = &history->shape;
    uint32_t group = shape_group(shape);
    float query[256];
    double *scores = malloc((first + n) * sizeof *scores);
    assert_non_null(scores);
    memset(masses, 0, (first + n) * sizeof *masses);
    for (uint32_t i = 0; i < n; i++) {
        for (uint32_t head = 0; head < group; head++) {
            size_t row = (size_t)i * shape->query_heads + kv_head * group + head;
            vector_decode(queries + row * shape_row_bytes(shape), shape->head_dim, shape->dtype, query);
            add_masses(history, layer, kv_head, query, first + i + 1, scores, masses);
        }
    }
    for (uint64_t i = 0; i < first + n; i++)
        masses[i] /= (double)n * group;
    free(scores);
}

uint32_t masses_best(const double *masses, uint64_t from, uint64_t until, uint32_t budget, uint32_t *positions)
{
    bool *taken = calloc(until + 1, sizeof *taken);
    assert_non_null(taken);
    uint32_t count = 0;
    for (; count < budget && from + count < until; count++) {
        uint64_t best = until;
        for (uint64_t i = from; i < until; i++) {
            if (!taken[i] && (best == until || masses[i] > masses[best]))
                best = i;
        }
        taken[best] = true;
    }
    for (uint64_t i = from, n = 0; i < until; i++) {
        if (taken[i])
            positions[n++] = (uint32_t)i;
    }
    free(taken);
    return count;
}
