// The scans' arithmetic over 16 lanes, included by scan_<instruction set>.c, which defines the lane types and
// operations:
//   vf, vi, vk        16 floats, 16 int32, 16 x 4 int8 codes as loaded
//   VK_BIAS           what the int8 dot product of one code adds to the signed one
//   vk_load, vi_dot   codes; accumulator + dot of four codes with four of the query
//   vf_* , vi_*       as named
// All sums are in one order, so that every instruction set gives the same integers. No include guard: the including
// file gives it its meaning.
#include "scan.h"

#include <math.h>

// clang unrolls loops with constant bounds by itself.
#if defined(__clang__)
#define UNROLL
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif
#define INLINE static inline __attribute__((always_inline))

// `heads` accumulators for each of `parts` interleaved quarters of the coordinates, so that additions do not wait for
// each other; both are constants after inlining. The block is read in address order. Out of cache, two blocks
// at once took three times as long, prefetching by hand 1.3 to 2.5 times: the machine reads ahead best by itself. In
// cache, four heads are bound by the dot products.
INLINE void score_i8_tile(const struct scan_keys *keys, const struct scan_query *query, uint32_t first_head,
                          const uint8_t *codes, const uint32_t heads, const uint32_t parts, int32_t *scores)
{
    const uint32_t words = keys->head_dim / 4;
    const int32_t *word = query->words + (size_t)first_head * words;
    vi sums[8];
    UNROLL
    for (uint32_t h = 0; h < heads; h++) {
        sums[h] = vi_set1(-VK_BIAS * query->sum[first_head + h]);
        UNROLL
        for (uint32_t p = 1; p < parts; p++) {
            sums[p * heads + h] = vi_set1(0);
        }
    }
    for (uint32_t j = 0; j < words; j += parts) {
        UNROLL
        for (uint32_t p = 0; p < parts; p++) {
            const uint8_t *row = codes + (size_t)(j + p) * 64;
            const vk loaded = vk_load(row);
            UNROLL
            for (uint32_t h = 0; h < heads; h++) {
                sums[p * heads + h] = vi_dot(sums[p * heads + h], loaded, word[h * words + j + p]);
            }
        }
    }
    UNROLL
    for (uint32_t h = 0; h < heads; h++) {
        UNROLL
        for (uint32_t p = 1; p < parts; p++) {
            sums[h] = vi_add(sums[h], sums[p * heads + h]);
        }
        vi_store(scores + (size_t)(first_head + h) * SCAN_LANES, sums[h]);
    }
}

static void score_i8(const struct scan_keys *keys, const struct scan_query *query, uint32_t first_block,
                     uint32_t block_count, void *out)
{
    const uint32_t heads = query->heads;
    for (uint32_t b = 0; b < block_count; b++) {
        const uint8_t *codes = keys->blocks + (size_t)(first_block + b) * keys->block_bytes;
        int32_t *scores = (int32_t *)out + (size_t)b * heads * SCAN_LANES;
        uint32_t h = 0;
        for (; h + 8 <= heads; h += 8) {
            score_i8_tile(keys, query, h, codes, 8, 1, scores);
        }
        for (; h + 4 <= heads; h += 4) {
            score_i8_tile(keys, query, h, codes, 4, 1, scores);
        }
        for (; h + 2 <= heads; h += 2) {
            score_i8_tile(keys, query, h, codes, 2, 2, scores);
        }
        for (; h < heads; h++) {
            score_i8_tile(keys, query, h, codes, 1, 4, scores);
        }
    }
}

// Float formats: rows of 64 bytes hold one coordinate (f32) or two (bf16) of 16 keys.
INLINE void score_float_tile(const struct scan_query *query, uint32_t first_head, const uint8_t *block, bool is_bf16,
                             const uint32_t heads, float *scores)
{
    const uint32_t dim = query->head_dim;
    const float *value = query->values + (size_t)first_head * dim;
    vf even[4], odd[4];
    UNROLL
    for (uint32_t h = 0; h < heads; h++) {
        even[h] = odd[h] = vf_set1(0);
    }
    for (uint32_t j = 0; j < dim; j += 2) {
        const uint8_t *row = block + (size_t)j * (is_bf16 ? 32 : 64);
        vf a, b;
        if (is_bf16) {
            vf_load_bf16(row, &a, &b);
        } else {
            a = vf_load((const float *)(const void *)row);
            b = vf_load((const float *)(const void *)(row + 64));
        }
        UNROLL
        for (uint32_t h = 0; h < heads; h++) {
            even[h] = vf_fma(a, vf_set1(value[h * dim + j]), even[h]);
            odd[h] = vf_fma(b, vf_set1(value[h * dim + j + 1]), odd[h]);
        }
    }
    UNROLL
    for (uint32_t h = 0; h < heads; h++) {
        vf_store(scores + (size_t)(first_head + h) * SCAN_LANES, vf_add(even[h], odd[h]));
    }
}

INLINE void score_float(const struct scan_keys *keys, const struct scan_query *query, uint32_t first_block,
                        uint32_t block_count, bool is_bf16, float *out)
{
    const uint32_t heads = query->heads;
    for (uint32_t b = 0; b < block_count; b++) {
        const uint8_t *block = keys->blocks + (size_t)(first_block + b) * keys->block_bytes;
        float *scores = out + (size_t)b * heads * SCAN_LANES;
        uint32_t h = 0;
        for (; h + 4 <= heads; h += 4) {
            score_float_tile(query, h, block, is_bf16, 4, scores);
        }
        for (; h + 2 <= heads; h += 2) {
            score_float_tile(query, h, block, is_bf16, 2, scores);
        }
        for (; h < heads; h++) {
            score_float_tile(query, h, block, is_bf16, 1, scores);
        }
    }
}

static void score_f32(const struct scan_keys *keys, const struct scan_query *query, uint32_t first_block,
                      uint32_t block_count, void *out)
{
    score_float(keys, query, first_block, block_count, false, out);
}

static void score_bf16(const struct scan_keys *keys, const struct scan_query *query, uint32_t first_block,
                       uint32_t block_count, void *out)
{
    score_float(keys, query, first_block, block_count, true, out);
}

// exp to within 3 %, right on average: the exponent's bits are the logarithm. Enough for a sum over thousands.
INLINE vf rough_exp(vf x)
{
    const vf bits = vf_fma(vf_min(x, vf_set1(80.0f)), vf_set1(12102203.0f), vf_set1(1064866805.0f));
    return vf_of_bits(vi_of(vf_max(bits, vf_set1(0))));
}

// exp to within 1e-6, relative: 2^n times a polynomial of the rest.
INLINE vf fine_exp(vf x)
{
    const vf clamped = vf_max(vf_min(x, vf_set1(80.0f)), vf_set1(-80.0f));
    const vf scaled = vf_mul(clamped, vf_set1(1.44269504f));
    const vi whole = vi_of(scaled);
    const vf rest = vf_sub(scaled, vf_of(whole));
    vf sum = vf_set1(0.0013333558f);
    sum = vf_fma(sum, rest, vf_set1(0.0096181291f));
    sum = vf_fma(sum, rest, vf_set1(0.0555041087f));
    sum = vf_fma(sum, rest, vf_set1(0.2402265070f));
    sum = vf_fma(sum, rest, vf_set1(0.6931471806f));
    sum = vf_fma(sum, rest, vf_set1(1.0f));
    return vf_of_bits(vi_add(vi_bits_of(sum), vi_shift23(whole)));
}

// Lanes of a block whose position is in low .. high-1.
INLINE uint32_t lanes_between(uint32_t first, uint32_t low, uint32_t high)
{
    const uint32_t begin = low > first ? low - first : 0, end = high > first ? high - first : 0;
    const uint32_t below_end = end >= SCAN_LANES ? 0xffffu : (1u << end) - 1;
    return begin >= SCAN_LANES ? 0 : below_end & ~((1u << begin) - 1);
}

INLINE float largest_lane(vf values, uint32_t lanes)
{
    float all[SCAN_LANES], most = -INFINITY;
    vf_store(all, values);
    for (uint32_t i = 0; i < SCAN_LANES; i++) {
        most = (lanes >> i & 1u) != 0 && all[i] > most ? all[i] : most;
    }
    return most;
}

// Logits of one block and head, from integers and their keys' steps where the format has them.
INLINE vf logits(const void *scores, const uint8_t *steps, float factor)
{
    if (steps == NULL) {
        return vf_load((const float *)scores);
    }
    const vf sums = vf_of(vi_load((const int32_t *)scores));
    return vf_mul(vf_mul(sums, vf_load((const float *)(const void *)steps)), vf_set1(factor));
}

static void set_references(struct scan_stream *stream, uint32_t block, uint32_t heads, const uint8_t *steps)
{
    const uint32_t seen = lanes_between(block * SCAN_LANES, 0, stream->visible);
    const float *scores = stream->chunk;
    for (uint32_t h = 0; h < heads; h++) {
        const vf first = logits(scores + (size_t)h * SCAN_LANES, steps, stream->query->factor[h]);
        stream->references[h] = largest_lane(first, seen);
    }
}

INLINE void keep_passing(struct scan_stream *stream, uint32_t first, uint32_t passing, const vf *all, uint32_t heads)
{
    vi_pack(stream->positions + stream->count, vi_count_from(first), passing);
    for (uint32_t h = 0; h < heads; h++) {
        vf_pack(stream->scores + (size_t)h * stream->room + stream->count, all[h], passing);
    }
    stream->count += (uint32_t)__builtin_popcount(passing);
}

// `heads` is at most 8 and a constant after inlining, except in the general case.
INLINE void filter_blocks(struct scan_stream *stream, uint32_t first_block, uint32_t block_count, const bool is_i8,
                          const uint32_t heads, const bool sums)
{
    const size_t block_bytes = stream->keys->block_bytes;
    const uint8_t *steps = stream->keys->blocks + (size_t)(first_block + 1) * block_bytes - SCAN_LANES * sizeof(float);
    const float *chunk = stream->chunk;
    vf totals[SCAN_HEADS_MAX];
    if (sums && stream->references[0] == -INFINITY) {
        set_references(stream, first_block, heads, is_i8 ? steps : NULL);
    }
    for (uint32_t h = 0; sums && h < heads; h++) {
        totals[h] = vf_load(stream->totals + (size_t)h * SCAN_LANES);
    }
    for (uint32_t b = 0; b < block_count; b++, steps += block_bytes) {
        const uint32_t first = (first_block + b) * SCAN_LANES;
        const uint32_t seen = lanes_between(first, 0, stream->visible);
        vf all[SCAN_HEADS_MAX];
        uint32_t passing = 0;
        UNROLL
        for (uint32_t h = 0; h < heads; h++) {
            all[h] =
                logits(chunk + ((size_t)b * heads + h) * SCAN_LANES, is_i8 ? steps : NULL, stream->query->factor[h]);
            passing |= vf_mask_above(all[h], stream->above[h]);
            if (sums) {
                const vf part = rough_exp(vf_sub(all[h], vf_set1(stream->references[h])));
                totals[h] = vf_add(totals[h], __builtin_expect(seen == 0xffffu, 1) ? part : vf_only(part, seen));
            }
        }
        passing &= lanes_between(first, stream->low, stream->high);
        if (__builtin_expect(passing != 0, 0)) {
            keep_passing(stream, first, passing, all, heads);
        }
    }
    for (uint32_t h = 0; sums && h < heads; h++) {
        vf_store(stream->totals + (size_t)h * SCAN_LANES, totals[h]);
    }
}

static void filter(struct scan_stream *stream, uint32_t first_block, uint32_t block_count)
{
    const bool is_i8 = stream->keys->format == SCAN_I8;
    const uint32_t heads = stream->query->heads;
    if (is_i8 && heads == 1) {
        filter_blocks(stream, first_block, block_count, true, 1, false);
    } else if (is_i8 && heads == 2) {
        filter_blocks(stream, first_block, block_count, true, 2, true);
    } else if (is_i8 && heads == 4) {
        filter_blocks(stream, first_block, block_count, true, 4, true);
    } else if (is_i8 && heads == 8) {
        filter_blocks(stream, first_block, block_count, true, 8, true);
    } else {
        filter_blocks(stream, first_block, block_count, is_i8, heads, heads > 1);
    }
}

static void masses(const struct scan_stream *stream, const float *base, float *out)
{
    for (uint32_t i = 0; i < stream->count; i += SCAN_LANES) {
        vf sum = vf_set1(0);
        for (uint32_t h = 0; h < stream->query->heads; h++) {
            const vf score = vf_load(stream->scores + (size_t)h * stream->room + i);
            sum = vf_add(sum, fine_exp(vf_sub(score, vf_set1(base[h]))));
        }
        vf_store(out + i, sum);
    }
}

static void keep(struct scan_stream *stream, float bar)
{
    uint32_t kept = 0;
    for (uint32_t i = 0; i < stream->count; i += SCAN_LANES) {
        // Above or equal, as "not below": a mass is never NaN.
        const uint32_t lanes =
            ~vf_mask_above(vf_sub(vf_set1(bar), vf_load(stream->ranks + i)), 0.0f) & lanes_between(i, 0, stream->count);
        if (lanes == 0) {
            continue;
        }
        const vi positions = vi_load((const int32_t *)stream->positions + i);
        vi_pack(stream->positions + kept, positions, lanes);
        for (uint32_t h = 0; h < stream->query->heads; h++) {
            float *scores = stream->scores + (size_t)h * stream->room;
            const vf moved = vf_load(scores + i);
            vf_pack(scores + kept, moved, lanes);
        }
        kept += (uint32_t)__builtin_popcount(lanes);
    }
    stream->count = kept;
}

static uint32_t read_all(const void *memory, size_t bytes)
{
    const int32_t *words = memory;
    vi sums[4] = {vi_set1(0), vi_set1(0), vi_set1(0), vi_set1(0)};
    for (size_t i = 0; i < bytes / sizeof *words; i += 64) {
        UNROLL
        for (size_t j = 0; j < 4; j++) {
            sums[j] = vi_add(sums[j], vi_load(words + i + 16 * j));
        }
    }
    int32_t lanes[SCAN_LANES];
    vi_store(lanes, vi_add(vi_add(sums[0], sums[1]), vi_add(sums[2], sums[3])));
    uint32_t sum = 0;
    for (uint32_t i = 0; i < SCAN_LANES; i++) {
        sum += (uint32_t)lanes[i];
    }
    return sum;
}
