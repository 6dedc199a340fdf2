// The scans with AVX2 and FMA. Compiled with those instructions allowed; called only where the machine has them.
#if defined(__x86_64__)
#include <immintrin.h>
#include <stdint.h>

typedef struct {
    __m256 a, b;
} vf;
typedef struct {
    __m256i a, b;
} vi;
// Signed codes and their absolute values.
typedef struct {
    __m256i a, b, size_a, size_b;
} vk;

#define VK_BIAS 0
#define BOTH(type, a_, b_)                                                                                             \
    (type)                                                                                                             \
    {                                                                                                                  \
        (a_), (b_)                                                                                                     \
    }
#define LANE inline __attribute__((always_inline))

static LANE vf vf_set1(float value)
{
    return BOTH(vf, _mm256_set1_ps(value), _mm256_set1_ps(value));
}
static LANE vf vf_load(const float *from)
{
    return BOTH(vf, _mm256_loadu_ps(from), _mm256_loadu_ps(from + 8));
}
static LANE void vf_store(float *to, vf x)
{
    _mm256_storeu_ps(to, x.a);
    _mm256_storeu_ps(to + 8, x.b);
}
static LANE vf vf_add(vf x, vf y)
{
    return BOTH(vf, _mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b));
}
static LANE vf vf_sub(vf x, vf y)
{
    return BOTH(vf, _mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b));
}
static LANE vf vf_mul(vf x, vf y)
{
    return BOTH(vf, _mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b));
}
static LANE vf vf_fma(vf x, vf y, vf z)
{
    return BOTH(vf, _mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b));
}
static LANE vf vf_min(vf x, vf y)
{
    return BOTH(vf, _mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b));
}
static LANE vf vf_max(vf x, vf y)
{
    return BOTH(vf, _mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b));
}
static LANE uint32_t vf_mask_above(vf x, float bar)
{
    const __m256 all = _mm256_set1_ps(bar);
    return (uint32_t)_mm256_movemask_ps(_mm256_cmp_ps(x.a, all, _CMP_GT_OQ)) |
           (uint32_t)_mm256_movemask_ps(_mm256_cmp_ps(x.b, all, _CMP_GT_OQ)) << 8;
}
static LANE vf vf_only(vf x, uint32_t lanes)
{
    const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i a = _mm256_and_si256(_mm256_set1_epi32((int)lanes), bit);
    const __m256i b = _mm256_and_si256(_mm256_set1_epi32((int)(lanes >> 8)), bit);
    return BOTH(vf, _mm256_and_ps(x.a, _mm256_castsi256_ps(_mm256_cmpeq_epi32(a, bit))),
                _mm256_and_ps(x.b, _mm256_castsi256_ps(_mm256_cmpeq_epi32(b, bit))));
}
static LANE vi vi_set1(int32_t value)
{
    return BOTH(vi, _mm256_set1_epi32(value), _mm256_set1_epi32(value));
}
static LANE __m256i half_load(const void *from)
{
    return _mm256_loadu_si256((const __m256i *)from);
}
static LANE vi vi_load(const int32_t *from)
{
    return BOTH(vi, half_load(from), half_load(from + 8));
}
static LANE void vi_store(void *to, vi x)
{
    _mm256_storeu_si256((__m256i *)to, x.a);
    _mm256_storeu_si256((__m256i *)to + 1, x.b);
}
static LANE vi vi_add(vi x, vi y)
{
    return BOTH(vi, _mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b));
}
static LANE vi vi_shift23(vi x)
{
    return BOTH(vi, _mm256_slli_epi32(x.a, 23), _mm256_slli_epi32(x.b, 23));
}
static LANE vi vi_of(vf x)
{
    return BOTH(vi, _mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b));
}
static LANE vf vf_of(vi x)
{
    return BOTH(vf, _mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b));
}
static LANE vf vf_of_bits(vi x)
{
    return BOTH(vf, _mm256_castsi256_ps(x.a), _mm256_castsi256_ps(x.b));
}
static LANE vi vi_bits_of(vf x)
{
    return BOTH(vi, _mm256_castps_si256(x.a), _mm256_castps_si256(x.b));
}
static LANE vi vi_count_from(uint32_t first)
{
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), base = _mm256_set1_epi32((int)first);
    return BOTH(vi, _mm256_add_epi32(base, lane), _mm256_add_epi32(base, _mm256_add_epi32(lane, _mm256_set1_epi32(8))));
}
// Few pass, so one by one.
static LANE void vi_pack(uint32_t *to, vi x, uint32_t lanes)
{
    uint32_t all[16];
    vi_store(all, x);
    for (; lanes != 0; lanes &= lanes - 1) {
        *to++ = all[__builtin_ctz(lanes)];
    }
}
static LANE void vf_pack(float *to, vf x, uint32_t lanes)
{
    float all[16];
    vf_store(all, x);
    for (; lanes != 0; lanes &= lanes - 1) {
        *to++ = all[__builtin_ctz(lanes)];
    }
}
static LANE void vf_load_bf16(const uint8_t *row, vf *even, vf *odd)
{
    const __m256i a = half_load(row), b = half_load(row + 32), high = _mm256_set1_epi32((int)0xffff0000u);
    *even = BOTH(vf, _mm256_castsi256_ps(_mm256_slli_epi32(a, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(b, 16)));
    *odd = BOTH(vf, _mm256_castsi256_ps(_mm256_and_si256(a, high)), _mm256_castsi256_ps(_mm256_and_si256(b, high)));
}
static LANE vk vk_load(const uint8_t *from)
{
    const __m256i flip = _mm256_set1_epi8((char)0x80);
    const __m256i a = _mm256_xor_si256(half_load(from), flip), b = _mm256_xor_si256(half_load(from + 32), flip);
    return (vk){a, b, _mm256_abs_epi8(a), _mm256_abs_epi8(b)};
}
// |code| times sign(code) * query: two products of 127 * 127 fit into 16 bits, so nothing saturates.
static LANE __m256i half_dot(__m256i sum, __m256i code, __m256i size, __m256i query)
{
    const __m256i pairs = _mm256_maddubs_epi16(size, _mm256_sign_epi8(query, code));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
static LANE vi vi_dot(vi sum, vk codes, int32_t word)
{
    const __m256i query = _mm256_set1_epi32(word);
    return BOTH(vi, half_dot(sum.a, codes.a, codes.size_a, query), half_dot(sum.b, codes.b, codes.size_b, query));
}

#include "scan_lanes.h"

const struct scan_ops scan_ops_avx2 = {
    .name = "avx2",
    .score = {[SCAN_F32] = score_f32, [SCAN_BF16] = score_bf16, [SCAN_I8] = score_i8},
    .filter = filter,
    .masses = masses,
    .keep = keep,
    .read = read_all,
};
#else
typedef int nothing_here;
#endif
