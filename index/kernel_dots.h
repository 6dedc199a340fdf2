// Inner products of 16 8-bit codes with int8 queries of up to four views, exact in integers: included by kernel_lanes.h
// once per instruction set, with its macros. No include guard, on purpose.
#define DOTS_VIEWS 4u

// What NAME(dots) takes the offset of a code for: it is part of the products, or left out of them already.
#if KERNEL_DOTS == DOTS_AVX2
#define DOTS_ZERO 0
#else
#define DOTS_ZERO DCI_CODE_ZERO
#endif

#if KERNEL_DOTS == DOTS_VNNI
LOCAL __m512i NAME(word16)(const int8_t *query)
{
    int32_t word;
    memcpy(&word, query, sizeof word);
    return _mm512_set1_epi32(word);
}

// Written out for 4, 2 and 1 views, so that all sums stay in registers.
LOCAL void NAME(dots_4)(const uint8_t *codes, const int8_t *query, uint32_t n, int32_t *dots)
{
    __m512i a0 = _mm512_setzero_si512(), b0 = a0, a1 = a0, b1 = a0, a2 = a0, b2 = a0, a3 = a0, b3 = a0;
    for (uint32_t i = 0; i < n; i += 8) {
        const __m512i x0 = _mm512_loadu_si512(codes + (size_t)i * DCI_LANES);
        const __m512i y0 = _mm512_loadu_si512(codes + (size_t)(i + 4) * DCI_LANES);
        a0 = _mm512_dpbusd_epi32(a0, x0, NAME(word16)(query + i));
        b0 = _mm512_dpbusd_epi32(b0, y0, NAME(word16)(query + i + 4));
        a1 = _mm512_dpbusd_epi32(a1, x0, NAME(word16)(query + (size_t)n + i));
        b1 = _mm512_dpbusd_epi32(b1, y0, NAME(word16)(query + (size_t)n + i + 4));
        a2 = _mm512_dpbusd_epi32(a2, x0, NAME(word16)(query + (size_t)2 * n + i));
        b2 = _mm512_dpbusd_epi32(b2, y0, NAME(word16)(query + (size_t)2 * n + i + 4));
        a3 = _mm512_dpbusd_epi32(a3, x0, NAME(word16)(query + (size_t)3 * n + i));
        b3 = _mm512_dpbusd_epi32(b3, y0, NAME(word16)(query + (size_t)3 * n + i + 4));
    }
    _mm512_storeu_si512(dots, _mm512_add_epi32(a0, b0));
    _mm512_storeu_si512(dots + 16, _mm512_add_epi32(a1, b1));
    _mm512_storeu_si512(dots + 32, _mm512_add_epi32(a2, b2));
    _mm512_storeu_si512(dots + 48, _mm512_add_epi32(a3, b3));
}

LOCAL void NAME(dots_2)(const uint8_t *codes, const int8_t *query, uint32_t n, int32_t *dots)
{
    __m512i a0 = _mm512_setzero_si512(), b0 = a0, a1 = a0, b1 = a0;
    for (uint32_t i = 0; i < n; i += 8) {
        const __m512i x0 = _mm512_loadu_si512(codes + (size_t)i * DCI_LANES);
        const __m512i y0 = _mm512_loadu_si512(codes + (size_t)(i + 4) * DCI_LANES);
        a0 = _mm512_dpbusd_epi32(a0, x0, NAME(word16)(query + i));
        b0 = _mm512_dpbusd_epi32(b0, y0, NAME(word16)(query + i + 4));
        a1 = _mm512_dpbusd_epi32(a1, x0, NAME(word16)(query + (size_t)n + i));
        b1 = _mm512_dpbusd_epi32(b1, y0, NAME(word16)(query + (size_t)n + i + 4));
    }
    _mm512_storeu_si512(dots, _mm512_add_epi32(a0, b0));
    _mm512_storeu_si512(dots + 16, _mm512_add_epi32(a1, b1));
}

LOCAL void NAME(dots_1)(const uint8_t *codes, const int8_t *query, uint32_t n, int32_t *dots)
{
    __m512i a0 = _mm512_setzero_si512(), b0 = a0, c0 = a0, d0 = a0;
    for (uint32_t i = 0; i < n; i += 16) {
        const __m512i x0 = _mm512_loadu_si512(codes + (size_t)i * DCI_LANES);
        const __m512i y0 = _mm512_loadu_si512(codes + (size_t)(i + 4) * DCI_LANES);
        a0 = _mm512_dpbusd_epi32(a0, x0, NAME(word16)(query + i));
        b0 = _mm512_dpbusd_epi32(b0, y0, NAME(word16)(query + i + 4));
        const __m512i x1 = _mm512_loadu_si512(codes + (size_t)(i + 8) * DCI_LANES);
        const __m512i y1 = _mm512_loadu_si512(codes + (size_t)(i + 12) * DCI_LANES);
        c0 = _mm512_dpbusd_epi32(c0, x1, NAME(word16)(query + i + 8));
        d0 = _mm512_dpbusd_epi32(d0, y1, NAME(word16)(query + i + 12));
    }
    a0 = _mm512_add_epi32(a0, c0);
    b0 = _mm512_add_epi32(b0, d0);
    _mm512_storeu_si512(dots, _mm512_add_epi32(a0, b0));
}

LOCAL void NAME(dots)(const uint8_t *codes, const int8_t *query, uint32_t n, uint32_t count, int32_t *dots)
{
    if (count == 4) {
        NAME(dots_4)(codes, query, n, dots);
    } else if (count == 2) {
        NAME(dots_2)(codes, query, n, dots);
    } else {
        NAME(dots_1)(codes, query, n, dots);
    }
}
#elif KERNEL_DOTS == DOTS_AVX2
// Sums of two products must fit in 16 bits: the codes lose their offset and go in as size and sign, the query's bytes
// take the sign (127 * 127 * 2 fits).
LOCAL void NAME(dots)(const uint8_t *codes, const int8_t *query, uint32_t n, uint32_t count, int32_t *dots)
{
    const __m256i zero_code = _mm256_set1_epi8((char)0x80), ones = _mm256_set1_epi16(1);
    __m256i sum[2][DOTS_VIEWS];
    for (uint32_t v = 0; v < DOTS_VIEWS; v++) {
        sum[0][v] = sum[1][v] = _mm256_setzero_si256();
    }
    for (uint32_t i = 0; i < n; i += 4) {
        for (uint32_t half = 0; half < 2; half++) {
            const uint8_t *at = codes + (size_t)i * DCI_LANES + (size_t)half * 32;
            const __m256i code = _mm256_xor_si256(_mm256_loadu_si256((const __m256i *)(const void *)at), zero_code);
            const __m256i size = _mm256_abs_epi8(code);
            for (uint32_t v = 0; v < count; v++) {
                int32_t word;
                memcpy(&word, query + (size_t)v * n + i, sizeof word);
                const __m256i pairs = _mm256_maddubs_epi16(size, _mm256_sign_epi8(_mm256_set1_epi32(word), code));
                sum[half][v] = _mm256_add_epi32(sum[half][v], _mm256_madd_epi16(pairs, ones));
            }
        }
    }
    for (uint32_t v = 0; v < count; v++) {
        for (uint32_t half = 0; half < 2; half++) {
            _mm256_storeu_si256((__m256i *)(void *)(dots + v * DCI_LANES + half * 8), sum[half][v]);
        }
    }
}
#else
LOCAL void NAME(dots)(const uint8_t *codes, const int8_t *query, uint32_t n, uint32_t count, int32_t *dots)
{
    for (uint32_t v = 0; v < count; v++) {
        int32_t sum[DCI_LANES] = {0};
        for (uint32_t i = 0; i < n; i += 4) {
            const uint8_t *code = codes + (size_t)i * DCI_LANES;
            const int8_t *q = query + (size_t)v * n + i;
            for (uint32_t lane = 0; lane < DCI_LANES; lane++) {
                sum[lane] += code[4 * lane] * q[0] + code[4 * lane + 1] * q[1] + code[4 * lane + 2] * q[2] +
                             code[4 * lane + 3] * q[3];
            }
        }
        memcpy(dots + v * DCI_LANES, sum, sizeof sum);
    }
}
#endif
