// Softmax attention of one query head. Vectors of four floats, which every x86-64 has and other machines emulate.
#include "attention.h"

#include <assert.h>
#include <math.h>
#include <string.h>

typedef float float4 __attribute__((vector_size(16)));

static float4 load4(const float *from)
{
    float4 v;
    memcpy(&v, from, sizeof(v));
    return v;
}

static float from_bits(uint32_t bits)
{
    float f;
    memcpy(&f, &bits, sizeof(f));
    return f;
}

// Exact for every half, also subnormal ones: shift the fields into place, then mend the exponent's bias by 2^112.
static float half_to_float(uint16_t half)
{
    uint32_t sign = (uint32_t)(half & 0x8000u) << 16;
    uint32_t magnitude = (uint32_t)(half & 0x7fffu) << 13;
    float f = from_bits(magnitude) * 0x1p112f;
    uint32_t bits;
    memcpy(&bits, &f, sizeof(bits));
    uint32_t special = (half & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0;
    return from_bits(sign | bits | special);
}

void attention_to_float(float *out, const void *in, size_t count, ice_dtype dtype)
{
    if (dtype == ICE_FP32) {
        memcpy(out, in, count * sizeof(*out));
        return;
    }
    const uint8_t *bytes = in;
    for (size_t i = 0; i < count; i++) {
        uint16_t element;
        memcpy(&element, bytes + 2 * i, sizeof(element));
        out[i] = dtype == ICE_BF16 ? from_bits((uint32_t)element << 16) : half_to_float(element);
    }
}

static float dot(const float *a, const float *b, uint32_t count)
{
    float4 sums[4] = {{0}};
    for (uint32_t i = 0; i < count; i += 16) {
        for (uint32_t j = 0; j < 4; j++) {
            sums[j] += load4(a + i + 4 * j) * load4(b + i + 4 * j);
        }
    }
    float4 sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

void attention_weights(float *weights, const float *query, const float *keys, size_t count, uint32_t head_dim,
                       float scale)
{
    assert(count > 0 && head_dim % 16 == 0);
    float largest = -INFINITY;
    for (size_t i = 0; i < count; i++) {
        weights[i] = scale * dot(query, keys + i * head_dim, head_dim);
        largest = weights[i] > largest ? weights[i] : largest;
    }
    double total = 0;
    for (size_t i = 0; i < count; i++) {
        weights[i] = expf(weights[i] - largest);
        total += (double)weights[i];
    }
    float inverse = (float)(1 / total);
    for (size_t i = 0; i < count; i++) {
        weights[i] *= inverse;
    }
}

void attention_output(float *out, const float *weights, const float *values, size_t count, uint32_t head_dim)
{
    // Blocks of 16 coordinates stay in registers over all rows.
    for (uint32_t base = 0; base < head_dim; base += 16) {
        float4 sums[4] = {{0}};
        for (size_t i = 0; i < count; i++) {
            float4 weight = {weights[i], weights[i], weights[i], weights[i]};
            const float *row = values + i * head_dim + base;
            for (uint32_t j = 0; j < 4; j++) {
                sums[j] += weight * load4(row + 4 * j);
            }
        }
        memcpy(out + base, sums, sizeof(sums));
    }
}
