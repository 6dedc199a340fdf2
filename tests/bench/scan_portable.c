// The scans in portable C: the reference for the others.
#include <stdint.h>
#include <string.h>

typedef struct {
    float x[16];
} vf;
typedef struct {
    int32_t x[16];
} vi;
typedef struct {
    uint8_t x[64];
} vk;

#define VK_BIAS 0
#define EACH    for (int i = 0; i < 16; i++)

static inline vf vf_set1(float value)
{
    vf r;
    EACH r.x[i] = value;
    return r;
}
static inline vf vf_load(const float *from)
{
    vf r;
    memcpy(&r, from, sizeof r);
    return r;
}
static inline void vf_store(float *to, vf a)
{
    memcpy(to, &a, sizeof a);
}
static inline vf vf_add(vf a, vf b)
{
    EACH a.x[i] += b.x[i];
    return a;
}
static inline vf vf_sub(vf a, vf b)
{
    EACH a.x[i] -= b.x[i];
    return a;
}
static inline vf vf_mul(vf a, vf b)
{
    EACH a.x[i] *= b.x[i];
    return a;
}
static inline vf vf_fma(vf a, vf b, vf c)
{
    EACH a.x[i] = a.x[i] * b.x[i] + c.x[i];
    return a;
}
static inline vf vf_min(vf a, vf b)
{
    EACH a.x[i] = a.x[i] < b.x[i] ? a.x[i] : b.x[i];
    return a;
}
static inline vf vf_max(vf a, vf b)
{
    EACH a.x[i] = a.x[i] > b.x[i] ? a.x[i] : b.x[i];
    return a;
}
static inline uint32_t vf_mask_above(vf a, float bar)
{
    uint32_t mask = 0;
    EACH mask |= (uint32_t)(a.x[i] > bar) << i;
    return mask;
}
static inline vf vf_only(vf a, uint32_t lanes)
{
    EACH a.x[i] = (lanes >> i & 1u) != 0 ? a.x[i] : 0.0f;
    return a;
}
static inline vi vi_set1(int32_t value)
{
    vi r;
    EACH r.x[i] = value;
    return r;
}
static inline vi vi_load(const int32_t *from)
{
    vi r;
    memcpy(&r, from, sizeof r);
    return r;
}
static inline void vi_store(int32_t *to, vi a)
{
    memcpy(to, &a, sizeof a);
}
static inline vi vi_add(vi a, vi b)
{
    EACH a.x[i] = (int32_t)((uint32_t)a.x[i] + (uint32_t)b.x[i]);
    return a;
}
static inline vi vi_shift23(vi a)
{
    EACH a.x[i] = (int32_t)((uint32_t)a.x[i] << 23);
    return a;
}
// Nearest whole number: 2^23 + 2^22 leaves no bits behind the point. Large ones (exponent bits) have none anyway.
static inline vi vi_of(vf a)
{
    vi r;
    EACH r.x[i] = (int32_t)(a.x[i] + (a.x[i] < 0 ? -0.5f : 0.5f));
    return r;
}
static inline vf vf_of(vi a)
{
    vf r;
    EACH r.x[i] = (float)a.x[i];
    return r;
}
static inline vf vf_of_bits(vi a)
{
    vf r;
    memcpy(&r, &a, sizeof r);
    return r;
}
static inline vi vi_bits_of(vf a)
{
    vi r;
    memcpy(&r, &a, sizeof r);
    return r;
}
static inline vi vi_count_from(uint32_t first)
{
    vi r;
    EACH r.x[i] = (int32_t)first + i;
    return r;
}
static inline void vi_pack(uint32_t *to, vi a, uint32_t lanes)
{
    EACH if ((lanes >> i & 1u) != 0)
    {
        *to++ = (uint32_t)a.x[i];
    }
}
static inline void vf_pack(float *to, vf a, uint32_t lanes)
{
    EACH if ((lanes >> i & 1u) != 0)
    {
        *to++ = a.x[i];
    }
}
static inline void vf_load_bf16(const uint8_t *row, vf *even, vf *odd)
{
    uint32_t pairs[16], low[16], high[16];
    memcpy(pairs, row, sizeof pairs);
    EACH low[i] = pairs[i] << 16;
    EACH high[i] = pairs[i] & 0xffff0000u;
    memcpy(even, low, sizeof *even);
    memcpy(odd, high, sizeof *odd);
}
static inline vk vk_load(const uint8_t *from)
{
    vk r;
    memcpy(&r, from, sizeof r);
    return r;
}
static inline vi vi_dot(vi sum, vk codes, int32_t word)
{
    int8_t query[4];
    memcpy(query, &word, sizeof query);
    EACH for (int j = 0; j < 4; j++)
    {
        sum.x[i] += (codes.x[4 * i + j] - 128) * query[j];
    }
    return sum;
}

#include "scan_lanes.h"

const struct scan_ops scan_ops_portable = {
    .name = "portable",
    .score = {[SCAN_F32] = score_f32, [SCAN_BF16] = score_bf16, [SCAN_I8] = score_i8},
    .filter = filter,
    .masses = masses,
    .keep = keep,
    .read = read_all,
};
