// Estimates of what cells hold, and masses from scores: included by kernel_lanes.h once per instruction set, with its
// macros. No include guard, on purpose.
ENTRY uint32_t NAME(above16)(const float *x, float bound)
{
#if KERNEL_WIDTH == 16
    return _mm512_cmp_ps_mask(_mm512_loadu_ps(x), _mm512_set1_ps(bound), _CMP_GE_OQ);
#elif KERNEL_WIDTH == 8
    const __m256 least = _mm256_set1_ps(bound);
    const int low = _mm256_movemask_ps(_mm256_cmp_ps(_mm256_loadu_ps(x), least, _CMP_GE_OQ));
    const int high = _mm256_movemask_ps(_mm256_cmp_ps(_mm256_loadu_ps(x + 8), least, _CMP_GE_OQ));
    return (uint32_t)low | (uint32_t)high << 8;
#else
    uint32_t bits = 0;
    for (uint32_t i = 0; i < DCI_LANES; i++) {
        bits |= x[i] >= bound ? 1u << i : 0;
    }
    return bits;
#endif
}

ENTRY uint32_t NAME(below16)(const float *x, float bound)
{
#if KERNEL_WIDTH == 16
    return _mm512_cmp_ps_mask(_mm512_loadu_ps(x), _mm512_set1_ps(bound), _CMP_LT_OQ);
#elif KERNEL_WIDTH == 8
    const __m256 most = _mm256_set1_ps(bound);
    const int low = _mm256_movemask_ps(_mm256_cmp_ps(_mm256_loadu_ps(x), most, _CMP_LT_OQ));
    const int high = _mm256_movemask_ps(_mm256_cmp_ps(_mm256_loadu_ps(x + 8), most, _CMP_LT_OQ));
    return (uint32_t)low | (uint32_t)high << 8;
#else
    uint32_t bits = 0;
    for (uint32_t i = 0; i < DCI_LANES; i++) {
        bits |= x[i] < bound ? 1u << i : 0;
    }
    return bits;
#endif
}

// Deviation of the scores of an entry's tokens, limited so that its square stays in bounds.
LOCAL void NAME(deviations)(const float *unit, float norm, uint32_t part, NAME(floats) * out)
{
    const NAME(floats) zero = {0};
    const NAME(floats) limit = zero + DEVIATION_MAX;
    NAME(load_lanes)(unit, part, out);
    *out = *out * norm;
    NAME(least)(out, &limit, out);
}

// Log of the mean of exp of n scores of deviation s around 0: s^2/2 while the many carry it; where the largest few
// would have to, beyond the reach of n tokens, its tangent there.
LOCAL void NAME(log_means)(const struct dci_block *block, const NAME(floats) * deviation, uint32_t part,
                           NAME(floats) * out)
{
    NAME(floats) reach;
    NAME(load_lanes)(block->reach, part, &reach);
    NAME(least)(&reach, deviation, &reach);
    *out = reach * *deviation - 0.5f * reach * reach;
}

// The bits of a float, read as an integer, are nearly its logarithm to base 2 (Schraudolph, 1999); the offset makes the
// mean error zero. `x` is in units of those bits. Not more than exp(80).
LOCAL void NAME(rough_exp)(const NAME(floats) * x, NAME(floats) * out)
{
    const NAME(floats) zero = {0}, limit = zero + (EXPONENT_MAX * DCI_ROUGH_SLOPE + DCI_ROUGH_OFFSET);
    NAME(floats) bits;
    NAME(most)(x, &zero, &bits);
    NAME(least)(&bits, &limit, &bits);
    *out = (NAME(floats)) __builtin_convertvector(bits, NAME(ints));
}

// exp of at most EXPONENT_MAX.
LOCAL void NAME(exp_limited)(const NAME(floats) * in, NAME(floats) * out)
{
    const NAME(floats) zero = {0};
    const NAME(floats) limit = zero + EXPONENT_MAX;
    NAME(floats) x;
    NAME(least)(in, &limit, &x);
    NAME(exp_lanes)(&x, out);
}

ENTRY void NAME(promise16)(const struct dci_views *views, const struct dci_block *block, float *centers, float *tops)
{
    NAME(centers16)(views, block, centers);
    for (uint32_t v = 0; v < views->count; v++, centers += DCI_LANES, tops += DCI_LANES) {
        for (uint32_t part = 0; part < KERNEL_PARTS; part++) {
            NAME(floats) center, deviation, top, mean;
            NAME(load_lanes)(centers, part, &center);
            NAME(load_lanes)(tops, part, &top);
            NAME(deviations)(block->unit, views->norms[v], part, &deviation);
            NAME(log_means)(block, &deviation, part, &mean);
            center += mean;
            NAME(most)(&top, &center, &top);
            NAME(store_lanes)(tops, part, &top);
        }
    }
}

ENTRY void NAME(survey16)(const struct dci_views *views, const struct dci_block *block, const float *centers,
                          const float *top, float *totals, float *masses)
{
    for (uint32_t v = 0; v < views->count; v++, centers += DCI_LANES, totals += DCI_LANES, masses += DCI_LANES) {
        for (uint32_t part = 0; part < KERNEL_PARTS; part++) {
            NAME(floats) center, deviation, rows, total, weight, mean;
            NAME(load_lanes)(centers, part, &center);
            NAME(load_lanes)(block->rows, part, &rows);
            NAME(load_lanes)(totals, part, &total);
            NAME(deviations)(block->unit, views->norms[v], part, &deviation);
            NAME(log_means)(block, &deviation, part, &mean);
            center = ((center - top[v]) + mean) * DCI_ROUGH_SLOPE + DCI_ROUGH_OFFSET;
            NAME(rough_exp)(&center, &weight);
            weight *= rows;
            total += weight;
            NAME(store_lanes)(totals, part, &total);
            NAME(store_lanes)(masses, part, &weight);
        }
    }
}

ENTRY void NAME(hopes16)(const struct dci_views *views, const struct dci_block *block, const float *centers,
                         const float *reference, float *hopes)
{
    const NAME(floats) zero = {0};
    for (uint32_t part = 0; part < KERNEL_PARTS; part++) {
        NAME(floats) best = zero + DCI_HIDDEN, unit, far, reach;
        NAME(load_lanes)(block->unit, part, &unit);
        NAME(load_lanes)(block->far, part, &far);
        unit = unit * HOPE_DEVIATIONS;
        far = far * FAR_DEVIATIONS;
        NAME(most)(&unit, &far, &reach);
        for (uint32_t v = 0; v < views->count; v++) {
            NAME(floats) center;
            NAME(load_lanes)(centers + (size_t)v * DCI_LANES, part, &center);
            const NAME(floats) hope = (center - reference[v]) + reach * views->norms[v];
            NAME(most)(&best, &hope, &best);
        }
        NAME(store_lanes)(hopes, part, &best);
    }
}

// Of n tokens with scores of deviation s around mu (all in units of log mass): the mass of all is n exp(mu + s^2/2),
// and that of the tokens above the threshold is this times Phi((mu + s^2 - threshold) / s). Phi(z) is taken as min(1,
// exp(1.702 z)): at most twice too much, and one exponential less.
ENTRY void NAME(merits16)(const struct dci_views *views, const struct dci_block *block, const float *centers,
                          const float *reference, float log_least, float *merits, float *masses)
{
    const NAME(floats) zero = {0}, taken = zero + DCI_TAKEN;
    for (uint32_t part = 0; part < KERNEL_PARTS; part++) {
        NAME(floats) merit = {0}, rows, unit, before;
        NAME(load_lanes)(block->rows, part, &rows);
        NAME(load_lanes)(block->unit, part, &unit);
        const NAME(floats) inverse = (PHI_SLOPE / TAIL_MARGIN) / (unit + UNIT_LEAST);
        for (uint32_t v = 0; v < views->count; v++) {
            NAME(floats) center, deviation, all, above, mean, wide_mean;
            const float inverse_norm = 1.0f / (views->norms[v] + UNIT_LEAST);
            NAME(load_lanes)(centers + (size_t)v * DCI_LANES, part, &center);
            NAME(deviations)(block->unit, views->norms[v], part, &deviation);
            const NAME(floats) mu = center - reference[v], wide = deviation * TAIL_MARGIN;
            NAME(log_means)(block, &deviation, part, &mean);
            NAME(log_means)(block, &wide, part, &wide_mean);
            const NAME(floats) exponent = (mu + mean) * DCI_ROUGH_SLOPE + DCI_ROUGH_OFFSET;
            NAME(floats) reach = ((mu - log_least) + wide * wide) * (inverse * inverse_norm);
            NAME(least)(&reach, &zero, &reach);
            reach = ((mu + wide_mean) + reach) * DCI_ROUGH_SLOPE + DCI_ROUGH_OFFSET;
            NAME(rough_exp)(&exponent, &all);
            NAME(rough_exp)(&reach, &above);
            all *= rows;
            merit += above;
            NAME(store_lanes)(masses + (size_t)v * DCI_LANES, part, &all);
        }
        merit *= rows;
        NAME(load_lanes)(merits, part, &before);
        const NAME(ints) waits = (rows > zero) & (before > taken);
        NAME(choose)(&waits, &merit, &taken, &merit);
        NAME(store_lanes)(merits, part, &merit);
    }
}

ENTRY void NAME(rest16)(uint32_t views, const float *masses, const float *merits, float *totals)
{
    const NAME(floats) zero = {0};
    for (uint32_t v = 0; v < views; v++, masses += DCI_LANES, totals += DCI_LANES) {
        for (uint32_t part = 0; part < KERNEL_PARTS; part++) {
            NAME(floats) mass, merit, total;
            NAME(load_lanes)(masses, part, &mass);
            NAME(load_lanes)(merits, part, &merit);
            NAME(load_lanes)(totals, part, &total);
            const NAME(ints) waits = merit >= zero;
            NAME(choose)(&waits, &mass, &zero, &mass);
            total += mass;
            NAME(store_lanes)(totals, part, &total);
        }
    }
}

ENTRY void NAME(balance16)(uint32_t views, const float *masses, const float *merits, const float *rows,
                           const float *best, float *totals)
{
    const NAME(floats) zero = {0};
    for (uint32_t v = 0; v < views; v++, masses += DCI_LANES, totals += DCI_LANES) {
        for (uint32_t part = 0; part < KERNEL_PARTS; part++) {
            NAME(floats) mass, merit, total, most;
            NAME(load_lanes)(masses, part, &mass);
            NAME(load_lanes)(merits, part, &merit);
            NAME(load_lanes)(rows, part, &most);
            NAME(load_lanes)(totals, part, &total);
            most = most * best[v];
            NAME(least)(&mass, &most, &mass);
            const NAME(ints) waits = merit >= zero;
            NAME(choose)(&waits, &mass, &zero, &mass);
            total += mass;
            NAME(store_lanes)(totals, part, &total);
        }
    }
}

ENTRY void NAME(spread16)(uint32_t views, const float *scores, const float *anchors, float weight, float *sums)
{
    const NAME(floats) zero = {0};
    for (uint32_t v = 0; v < views; v++, scores += DCI_LANES, sums += DCI_LANES, anchors += DCI_LANES) {
        for (uint32_t part = 0; part < KERNEL_PARTS; part++) {
            NAME(floats) score, sum;
            NAME(load_lanes)(scores, part, &score);
            NAME(load_lanes)(sums, part, &sum);
            const NAME(ints) counts = score > zero + DCI_HIDDEN;
            NAME(floats) off = score - *anchors;
            NAME(choose)(&counts, &off, &zero, &off);
            sum += off * off * weight;
            NAME(store_lanes)(sums, part, &sum);
        }
    }
}

ENTRY void NAME(exps16)(const float *scores, uint32_t views, const float *origins, float *exps, float *totals)
{
    for (uint32_t v = 0; v < views; v++, scores += DCI_LANES, exps += DCI_LANES) {
        for (uint32_t part = 0; part < KERNEL_PARTS; part++) {
            NAME(floats) x, total;
            NAME(load_lanes)(scores, part, &x);
            x = x - origins[v];
            NAME(exp_limited)(&x, &x);
            NAME(store_lanes)(exps, part, &x);
            if (totals != NULL) {
                NAME(load_lanes)(totals + (size_t)v * DCI_LANES, part, &total);
                total += x;
                NAME(store_lanes)(totals + (size_t)v * DCI_LANES, part, &total);
            }
        }
    }
}

ENTRY void NAME(mix16)(const float *exps, uint32_t views, const float *units, float *masses)
{
    NAME(floats) sum[KERNEL_PARTS] = {{0}};
    for (uint32_t v = 0; v < views; v++, exps += DCI_LANES) {
        for (uint32_t part = 0; part < KERNEL_PARTS; part++) {
            NAME(floats) mass;
            NAME(load_lanes)(exps, part, &mass);
            sum[part] += mass * units[v];
        }
    }
    memcpy(masses, sum, sizeof sum);
}
