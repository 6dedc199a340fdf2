// The scans with AVX-512 and VNNI. Compiled with those instructions allowed; called only where the machine has them.
#if defined(__x86_64__)
#include <immintrin.h>
#include <stdint.h>

typedef __m512 vf;
typedef __m512i vi;
typedef __m512i vk;

#define VK_BIAS                  128 // codes are offset by 128
#define vf_set1(v)               _mm512_set1_ps(v)
#define vf_load(p)               _mm512_loadu_ps(p)
#define vf_store(p, a)           _mm512_storeu_ps(p, a)
#define vf_add(a, b)             _mm512_add_ps(a, b)
#define vf_sub(a, b)             _mm512_sub_ps(a, b)
#define vf_mul(a, b)             _mm512_mul_ps(a, b)
#define vf_fma(a, b, c)          _mm512_fmadd_ps(a, b, c)
#define vf_min(a, b)             _mm512_min_ps(a, b)
#define vf_max(a, b)             _mm512_max_ps(a, b)
#define vf_of(a)                 _mm512_cvtepi32_ps(a)
#define vf_of_bits(a)            _mm512_castsi512_ps(a)
#define vf_only(a, lanes)        _mm512_maskz_mov_ps((__mmask16)(lanes), a)
#define vi_set1(v)               _mm512_set1_epi32(v)
#define vi_load(p)               _mm512_loadu_si512(p)
#define vi_store(p, a)           _mm512_storeu_si512(p, a)
#define vi_add(a, b)             _mm512_add_epi32(a, b)
#define vi_of(a)                 _mm512_cvtps_epi32(a)
#define vi_bits_of(a)            _mm512_castps_si512(a)
#define vi_shift23(a)            _mm512_slli_epi32(a, 23)
#define vk_load(p)               _mm512_loadu_si512(p)
#define vi_dot(sum, codes, word) _mm512_dpbusd_epi32(sum, codes, _mm512_set1_epi32(word))

static inline uint32_t vf_mask_above(vf a, float bar)
{
    return _mm512_cmp_ps_mask(a, _mm512_set1_ps(bar), _CMP_GT_OQ);
}
static inline vi vi_count_from(uint32_t first)
{
    const vi lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return _mm512_add_epi32(_mm512_set1_epi32((int)first), lane);
}
// Compress to a register, then store: compressing to memory is microcoded on some machines.
static inline void vi_pack(uint32_t *to, vi a, uint32_t lanes)
{
    _mm512_storeu_si512(to, _mm512_maskz_compress_epi32((__mmask16)lanes, a));
}
static inline void vf_pack(float *to, vf a, uint32_t lanes)
{
    _mm512_storeu_ps(to, _mm512_maskz_compress_ps((__mmask16)lanes, a));
}
static inline void vf_load_bf16(const uint8_t *row, vf *even, vf *odd)
{
    const __m512i pairs = _mm512_loadu_si512(row);
    *even = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
    *odd = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32((int)0xffff0000u)));
}

#include "scan_lanes.h"

const struct scan_ops scan_ops_avx512vnni = {
    .name = "avx512vnni",
    .score = {[SCAN_F32] = score_f32, [SCAN_BF16] = score_bf16, [SCAN_I8] = score_i8},
    .filter = filter,
    .masses = masses,
    .keep = keep,
    .read = read_all,
};
#else
typedef int nothing_here;
#endif
