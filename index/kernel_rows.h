// Scores of tokens from their codes: included by kernel_lanes.h once per instruction set, with its macros. All sums of
// products are exact in integers. No include guard, on purpose.
//
// A coordinate's code is 16 b + low - 15.5 with a top bit b and low = 0 .. 15. The top bits of 16 rows lie together, 4
// coordinates to a table's index, and are scored for all of them at once; the low bits of a row lie in one piece.

// out[view][lane] = sum over the coordinates of (2 b - 1) * query, for up to four views.
#if KERNEL_DOTS == DOTS_PORTABLE
LOCAL void NAME(sign_dots)(const uint8_t *signs, const struct dci_views *views, uint32_t first, uint32_t count,
                           int16_t *out)
{
    const uint32_t steps = views->head_dim / 16;
    for (uint32_t v = 0; v < count; v++, out += DCI_LANES) {
        const uint8_t *table = views->tables + (size_t)(first + v) * steps * 64;
        int32_t sum[DCI_LANES] = {0};
        for (uint32_t j = 0; j < steps; j++, table += 64) {
            for (uint32_t lane = 0; lane < DCI_LANES; lane++) {
                const uint8_t a = signs[j * 32 + lane], b = signs[j * 32 + DCI_LANES + lane];
                sum[lane] += table[a & 15] + table[16 + (b & 15)] + table[32 + (a >> 4)] + table[48 + (b >> 4)];
            }
        }
        for (uint32_t lane = 0; lane < DCI_LANES; lane++) {
            out[lane] = (int16_t)(2 * sum[lane] - views->table_zeros[first + v]);
        }
    }
}
#else
LOCAL void NAME(sign_dots)(const uint8_t *signs, const struct dci_views *views, uint32_t first, uint32_t count,
                           int16_t *out)
{
    const __m256i low = _mm256_set1_epi8(15);
    const uint32_t steps = views->head_dim / 16;
    const uint8_t *tables = views->tables + (size_t)first * steps * 64;
    // Two table entries add up to at most 254. Their sums are gathered in 16 bits: bytes with odd numbers in `odd`,
    // those with even numbers in `all`, plus 256 times the former.
    __m256i all[DOTS_VIEWS], odd[DOTS_VIEWS];
    for (uint32_t v = 0; v < DOTS_VIEWS; v++) {
        all[v] = odd[v] = _mm256_setzero_si256();
    }
    for (uint32_t j = 0; j < steps; j++) {
        const __m256i both = _mm256_loadu_si256((const __m256i *)(const void *)(signs + (size_t)j * 32));
        const __m256i a = _mm256_and_si256(both, low), b = _mm256_and_si256(_mm256_srli_epi16(both, 4), low);
        for (uint32_t v = 0; v < count; v++) {
            const __m256i *table = (const __m256i *)(const void *)(tables + ((size_t)v * steps + j) * 64);
            const __m256i x = _mm256_shuffle_epi8(_mm256_loadu_si256(table), a);
            const __m256i y = _mm256_shuffle_epi8(_mm256_loadu_si256(table + 1), b);
            const __m256i sum = _mm256_add_epi8(x, y);
            all[v] = _mm256_add_epi16(all[v], sum);
            odd[v] = _mm256_add_epi16(odd[v], _mm256_srli_epi16(sum, 8));
        }
    }
    for (uint32_t v = 0; v < count; v++, out += DCI_LANES) {
        const __m256i even = _mm256_sub_epi16(all[v], _mm256_slli_epi16(odd[v], 8));
        const __m128i e = _mm_add_epi16(_mm256_castsi256_si128(even), _mm256_extracti128_si256(even, 1));
        const __m128i o = _mm_add_epi16(_mm256_castsi256_si128(odd[v]), _mm256_extracti128_si256(odd[v], 1));
        const __m128i zero = _mm_set1_epi16((int16_t)views->table_zeros[first + v]);
        const __m128i x = _mm_unpacklo_epi16(e, o), y = _mm_unpackhi_epi16(e, o);
        _mm_storeu_si128((__m128i *)(void *)out, _mm_sub_epi16(_mm_add_epi16(x, x), zero));
        _mm_storeu_si128((__m128i *)(void *)(out + 8), _mm_sub_epi16(_mm_add_epi16(y, y), zero));
    }
}
#endif

// dots[view][lane] = sum over the coordinates of low * query, for up to four views.
#if KERNEL_DOTS == DOTS_PORTABLE
LOCAL void NAME(low_dots)(const uint8_t *const *rows, const struct dci_views *views, uint32_t first, uint32_t count,
                          int32_t *dots)
{
    const uint32_t half = views->row_bytes;
    for (uint32_t v = 0; v < count; v++, dots += DCI_LANES) {
        const int8_t *query = views->fine + (size_t)(first + v) * 2 * half;
        for (uint32_t lane = 0; lane < DCI_LANES; lane++) {
            int32_t sum = 0;
            for (uint32_t j = 0; j < half; j++) {
                sum += (rows[lane][j] & 15) * query[j] + (rows[lane][j] >> 4) * query[half + j];
            }
            dots[lane] = sum;
        }
    }
}
#else
#if KERNEL_DOTS == DOTS_VNNI
// One row against up to four views: sums in 8 lanes.
LOCAL void NAME(low_row)(const uint8_t *row, const int8_t *query, uint32_t half, uint32_t count, __m256i *sums)
{
    const __m512i low = _mm512_set1_epi8(15);
    __m512i sum[DOTS_VIEWS];
    for (uint32_t v = 0; v < count; v++) {
        sum[v] = _mm512_setzero_si512();
    }
    for (uint32_t j = 0; j < half; j += 64) {
        const __mmask64 mask = half - j >= 64 ? ~(__mmask64)0 : ((__mmask64)1 << (half - j)) - 1;
        const __m512i both = _mm512_maskz_loadu_epi8(mask, row + j);
        const __m512i a = _mm512_and_si512(both, low), b = _mm512_and_si512(_mm512_srli_epi16(both, 4), low);
        for (uint32_t v = 0; v < count; v++) {
            const int8_t *x = query + (size_t)v * 2 * half + j;
            sum[v] = _mm512_dpbusd_epi32(sum[v], a, _mm512_maskz_loadu_epi8(mask, x));
            sum[v] = _mm512_dpbusd_epi32(sum[v], b, _mm512_maskz_loadu_epi8(mask, x + half));
        }
    }
    for (uint32_t v = 0; v < count; v++) {
        sums[v] = _mm256_add_epi32(_mm512_castsi512_si256(sum[v]), _mm512_extracti64x4_epi64(sum[v], 1));
    }
}
#else
LOCAL __m256i NAME(low_pairs)(const __m256i *both, const int8_t *query, uint32_t half, uint32_t bytes)
{
    const __m256i low = _mm256_set1_epi8(15);
    const __m256i a = _mm256_and_si256(*both, low), b = _mm256_and_si256(_mm256_srli_epi16(*both, 4), low);
    __m256i x, y;
    if (bytes == 32) {
        x = _mm256_loadu_si256((const __m256i *)(const void *)query);
        y = _mm256_loadu_si256((const __m256i *)(const void *)(query + half));
    } else {
        x = _mm256_zextsi128_si256(_mm_loadu_si128((const __m128i *)(const void *)query));
        y = _mm256_zextsi128_si256(_mm_loadu_si128((const __m128i *)(const void *)(query + half)));
    }
    return _mm256_add_epi16(_mm256_maddubs_epi16(a, x), _mm256_maddubs_epi16(b, y));
}

// One row against up to four views: sums in 8 lanes. 16 bits hold the 16 products of at most 15 * 127 that meet in one
// of them at head_dim 256.
LOCAL void NAME(low_row)(const uint8_t *row, const int8_t *query, uint32_t half, uint32_t count, __m256i *sums)
{
    __m256i pairs[DOTS_VIEWS];
    for (uint32_t v = 0; v < count; v++) {
        pairs[v] = _mm256_setzero_si256();
    }
    uint32_t j = 0;
    for (; j + 32 <= half; j += 32) {
        const __m256i both = _mm256_loadu_si256((const __m256i *)(const void *)(row + j));
        for (uint32_t v = 0; v < count; v++) {
            pairs[v] = _mm256_add_epi16(pairs[v], NAME(low_pairs)(&both, query + (size_t)v * 2 * half + j, half, 32));
        }
    }
    if (j < half) {
        const __m256i both = _mm256_zextsi128_si256(_mm_loadu_si128((const __m128i *)(const void *)(row + j)));
        for (uint32_t v = 0; v < count; v++) {
            pairs[v] = _mm256_add_epi16(pairs[v], NAME(low_pairs)(&both, query + (size_t)v * 2 * half + j, half, 16));
        }
    }
    for (uint32_t v = 0; v < count; v++) {
        sums[v] = _mm256_madd_epi16(pairs[v], _mm256_set1_epi16(1));
    }
}
#endif

LOCAL void NAME(low_dots)(const uint8_t *const *rows, const struct dci_views *views, uint32_t first, uint32_t count,
                          int32_t *dots)
{
    const int8_t *query = views->fine + (size_t)first * 2 * views->row_bytes;
    for (uint32_t lane = 0; lane < DCI_LANES; lane += 4) {
        __m256i sums[4][DOTS_VIEWS];
        for (uint32_t i = 0; i < 4; i++) {
            NAME(low_row)(rows[lane + i], query, views->row_bytes, count, sums[i]);
        }
        for (uint32_t v = 0; v < count; v++) {
            const __m256i pairs =
                _mm256_hadd_epi32(_mm256_hadd_epi32(sums[0][v], sums[1][v]), _mm256_hadd_epi32(sums[2][v], sums[3][v]));
            const __m128i four = _mm_add_epi32(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
            _mm_storeu_si128((__m128i *)(void *)(dots + v * DCI_LANES + lane), four);
        }
    }
}
#endif

LOCAL void NAME(sign_dots_of)(const uint8_t *signs, const struct dci_views *views, uint32_t first, uint32_t count,
                              int16_t *out)
{
    if (count == DOTS_VIEWS) { // a constant, so that the sums stay in registers
        NAME(sign_dots)(signs, views, first, DOTS_VIEWS, out);
    } else if (count == 2) {
        NAME(sign_dots)(signs, views, first, 2, out);
    } else {
        NAME(sign_dots)(signs, views, first, 1, out);
    }
}

LOCAL void NAME(low_dots_of)(const uint8_t *const *rows, const struct dci_views *views, uint32_t first, uint32_t count,
                             int32_t *dots)
{
    if (count == DOTS_VIEWS) {
        NAME(low_dots)(rows, views, first, DOTS_VIEWS, dots);
    } else if (count == 2) {
        NAME(low_dots)(rows, views, first, 2, dots);
    } else {
        NAME(low_dots)(rows, views, first, 1, dots);
    }
}

ENTRY void NAME(signs16)(const struct dci_views *views, const struct dci_rows *rows, int16_t *signs)
{
    uint32_t count;
    for (uint32_t first = 0; first < views->count; first += count) {
        count = NAME(group_of)(views->count - first);
        NAME(sign_dots_of)(rows->signs, views, first, count, signs + (size_t)first * DCI_LANES);
    }
}

LOCAL void NAME(load_signs)(const int16_t *from, uint32_t part, NAME(floats) * out)
{
    NAME(shorts) narrow;
    memcpy(&narrow, from + part * KERNEL_WIDTH, sizeof narrow);
    *out = __builtin_convertvector(__builtin_convertvector(narrow, NAME(ints)), NAME(floats));
}

// Bit i: lane i of the mask is set.
LOCAL uint32_t NAME(bits_of)(const NAME(ints) * mask)
{
#if KERNEL_WIDTH == 16
    return _mm512_movepi32_mask((__m512i)*mask);
#elif KERNEL_WIDTH == 8
    return (uint32_t)_mm256_movemask_ps((__m256)*mask);
#else
    uint32_t bits = 0;
    for (uint32_t i = 0; i < KERNEL_WIDTH; i++) {
        bits |= (*mask)[i] != 0 ? 1u << i : 0;
    }
    return bits;
#endif
}

// Of 16; no instruction for it is sure to be there.
LOCAL uint32_t NAME(count_bits)(uint32_t bits)
{
    bits = bits - ((bits >> 1) & 0x5555u);
    bits = (bits & 0x3333u) + ((bits >> 2) & 0x3333u);
    bits = (bits + (bits >> 4)) & 0x0f0fu;
    return (bits + (bits >> 8)) & 0x1fu;
}

// anchor_step: 1 where each lane has its own anchor, else 0.
LOCAL void NAME(score_lanes)(const struct dci_views *views, const struct dci_lanes *lanes, uint32_t anchor_step,
                             float *scores, float *tops)
{
    const NAME(floats) zero = {0};
    const NAME(floats) hidden = zero + DCI_HIDDEN;
    uint32_t count;
    for (uint32_t first = 0; first < views->count; first += count) {
        int32_t dots[DOTS_VIEWS * DCI_LANES];
        count = NAME(group_of)(views->count - first);
        NAME(low_dots_of)(lanes->rows, views, first, count, dots);
        for (uint32_t part = 0; part < KERNEL_PARTS; part++) {
            NAME(floats) scale, live;
            NAME(load_lanes)(lanes->scales, part, &scale);
            NAME(load_lanes)(lanes->live, part, &live);
            const NAME(ints) counts = live > zero;
            for (uint32_t v = 0; v < count; v++) {
                const size_t at = (size_t)(first + v) * DCI_LANES;
                NAME(ints) dot;
                NAME(floats) top, sign, score;
                memcpy(&dot, dots + v * DCI_LANES + part * KERNEL_WIDTH, sizeof dot);
                const NAME(floats) low = __builtin_convertvector(2 * dot - 15 * views->sums[first + v], NAME(floats));
                NAME(load_signs)(lanes->signs + at, part, &sign);
                if (anchor_step == 1) {
                    NAME(load_lanes)(lanes->anchors + at, part, &score);
                } else {
                    score = zero + lanes->anchors[at];
                }
                score +=
                    (sign * (8.0f * views->table_steps[first + v]) + low * (0.5f * views->steps[first + v])) * scale;
                NAME(choose)(&counts, &score, &hidden, &score);
                NAME(store_lanes)(scores + at, part, &score);
                NAME(load_lanes)(tops + at, part, &top);
                NAME(most)(&top, &score, &top);
                NAME(store_lanes)(tops + at, part, &top);
            }
        }
    }
}

ENTRY void NAME(score16)(const struct dci_views *views, const struct dci_lanes *lanes, float *scores, float *tops)
{
    NAME(score_lanes)(views, lanes, 1, scores, tops);
}

LOCAL void NAME(load_scales)(const struct dci_rows *rows, uint32_t part, NAME(floats) * out)
{
    NAME(halves) narrow;
    memcpy(&narrow, rows->scales + part * KERNEL_WIDTH, sizeof narrow);
    *out = (NAME(floats))(__builtin_convertvector(narrow, NAME(words)) << 16);
}

// Which rows have positions low .. low + span - 1.
LOCAL void NAME(load_counts)(const struct dci_rows *rows, uint32_t low, uint32_t span, uint32_t part, NAME(ints) * out)
{
    NAME(words) position;
    memcpy(&position, rows->positions + part * KERNEL_WIDTH, sizeof position);
    *out = (NAME(ints))(position - low < span);
}

ENTRY uint32_t NAME(tokens16)(const struct dci_views *views, const struct dci_rows *rows, const uint8_t *lows,
                              const struct dci_target *target, int16_t *signs, float *scores)
{
    const NAME(floats) zero = {0}, one = zero + 1.0f;
    struct dci_lanes lanes = {.signs = signs, .anchors = target->anchors};
    uint32_t counted = 0;
    for (uint32_t part = 0; part < KERNEL_PARTS; part++) {
        NAME(floats) scale, live;
        NAME(ints) counts;
        NAME(load_scales)(rows, part, &scale);
        NAME(store_lanes)(lanes.scales, part, &scale);
        NAME(load_counts)(rows, target->low, target->span, part, &counts);
        NAME(choose)(&counts, &one, &zero, &live);
        NAME(store_lanes)(lanes.live, part, &live);
        counted |= NAME(bits_of)(&counts) << (part * KERNEL_WIDTH);
    }
    for (uint32_t lane = 0; lane < DCI_LANES; lane++) {
        lanes.rows[lane] = lows + (size_t)lane * views->row_bytes;
    }
    NAME(signs16)(views, rows, signs);
    NAME(score_lanes)(views, &lanes, 0, scores, target->tops);
    return NAME(count_bits)(counted);
}

ENTRY uint32_t NAME(sift16)(const struct dci_views *views, const struct dci_rows *rows, const struct dci_sieve *sieve,
                            int16_t *signs, float *terms, float *totals)
{
    const NAME(floats) zero = {0};
    const NAME(floats) none = zero - 1.0f;
    NAME(floats) sum[KERNEL_PARTS] = {{0}}, scale[KERNEL_PARTS];
    for (uint32_t part = 0; part < KERNEL_PARTS; part++) {
        NAME(load_scales)(rows, part, &scale[part]);
    }
    NAME(signs16)(views, rows, signs);
    for (uint32_t v = 0; v < views->count; v++) {
        const size_t at = (size_t)v * DCI_LANES;
        for (uint32_t part = 0; part < KERNEL_PARTS; part++) {
            NAME(floats) x, term;
            NAME(load_signs)(signs + at, part, &x);
            x = x * (scale[part] * sieve->factors[v]) + sieve->offsets[v];
            NAME(rough_exp)(&x, &term);
            sum[part] += term;
            NAME(store_lanes)(terms + at, part, &term);
        }
    }
    float masses[DCI_LANES];
    NAME(ints) counts[KERNEL_PARTS];
    uint32_t eligible = 0;
    for (uint32_t part = 0; part < KERNEL_PARTS; part++) {
        NAME(load_counts)(rows, sieve->low, sieve->span, part, &counts[part]);
        eligible |= NAME(bits_of)(&counts[part]) << (part * KERNEL_WIDTH);
        NAME(choose)(&counts[part], &sum[part], &none, &sum[part]);
        counts[part] &= sum[part] < zero + sieve->bar;
    }
    memcpy(masses, sum, sizeof masses);
    for (uint32_t v = 0; v < views->count; v++) {
        const size_t at = (size_t)v * DCI_LANES;
        for (uint32_t part = 0; part < KERNEL_PARTS; part++) {
            NAME(floats) term, total;
            NAME(load_lanes)(terms + at, part, &term);
            NAME(load_lanes)(totals + at, part, &total);
            NAME(choose)(&counts[part], &term, &zero, &term);
            total += term * sieve->weights[v];
            NAME(store_lanes)(totals + at, part, &total);
        }
    }
    return NAME(above16)(masses, sieve->bar) | NAME(count_bits)(eligible) << DCI_LANES;
}
