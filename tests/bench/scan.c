// Packing of keys and queries, and the stream's selection. The arithmetic is in scan_lanes.h, compiled once for each
// instruction set.
#include "scan.h"

#include <assert.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#define CODE_MAX 127.0f
// Candidates before the bar is raised: for a budget.
#define CAPACITY(budget) (4 * (budget) + 256)

static uint32_t block_count(uint32_t tokens)
{
    return (tokens + SCAN_LANES - 1) / SCAN_LANES;
}

static size_t block_bytes(enum scan_format format, uint32_t head_dim)
{
    const size_t coordinates = (size_t)SCAN_LANES * head_dim;
    switch (format) {
    case SCAN_I8:
        return coordinates + SCAN_LANES * sizeof(float);
    case SCAN_BF16:
        return coordinates * sizeof(uint16_t);
    default:
        return coordinates * sizeof(float);
    }
}

size_t scan_keys_bytes(enum scan_format format, uint32_t tokens, uint32_t head_dim)
{
    return block_count(tokens) * block_bytes(format, head_dim);
}

static uint16_t bf16_of(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

static float largest(const float *values, uint32_t n)
{
    float most = 1e-9f;
    for (uint32_t i = 0; i < n; i++) {
        const float size = fabsf(values[i]);
        most = size > most ? size : most;
    }
    return most;
}

static void pack_i8(const struct scan_keys *keys, uint8_t *block, uint32_t lane, const float *row)
{
    float centred[SCAN_DIM_MAX];
    for (uint32_t j = 0; j < keys->head_dim; j++) {
        centred[j] = row[j] - keys->mean[j];
    }
    const float step = largest(centred, keys->head_dim) / CODE_MAX;
    for (uint32_t j = 0; j < keys->head_dim; j++) {
        // Offset by 128: the dot product of VNNI is unsigned times signed.
        block[j / 4 * 64 + lane * 4 + j % 4] = (uint8_t)(lrintf(centred[j] / step) + 128);
    }
    memcpy(block + (size_t)SCAN_LANES * keys->head_dim + lane * sizeof step, &step, sizeof step);
}

static void pack_row(const struct scan_keys *keys, uint8_t *block, uint32_t lane, const float *row)
{
    switch (keys->format) {
    case SCAN_I8:
        pack_i8(keys, block, lane, row);
        break;
    case SCAN_BF16:
        for (uint32_t j = 0; j < keys->head_dim; j++) {
            ((uint16_t *)(void *)block)[j / 2 * 32 + lane * 2 + j % 2] = bf16_of(row[j]);
        }
        break;
    default:
        for (uint32_t j = 0; j < keys->head_dim; j++) {
            ((float *)(void *)block)[j * SCAN_LANES + lane] = row[j];
        }
    }
}

void scan_keys_pack(struct scan_keys *keys, enum scan_format format, const float *rows, uint32_t tokens,
                    uint32_t head_dim, void *memory)
{
    assert(head_dim % 16 == 0 && head_dim <= SCAN_DIM_MAX && tokens > 0);
    *keys = (struct scan_keys){.format = format, .tokens = tokens, .head_dim = head_dim, .blocks = memory};
    keys->block_bytes = block_bytes(format, head_dim);
    double sums[SCAN_DIM_MAX] = {0};
    for (uint32_t i = 0; i < tokens; i++) {
        for (uint32_t j = 0; j < head_dim; j++) {
            sums[j] += (double)rows[(size_t)i * head_dim + j];
        }
    }
    for (uint32_t j = 0; j < head_dim; j++) {
        keys->mean[j] = (float)(sums[j] / tokens);
    }
    // What is behind the last token is its repetition; it is never selected and never counted.
    for (uint32_t i = 0; i < block_count(tokens) * SCAN_LANES; i++) {
        const float *row = rows + (size_t)(i < tokens ? i : tokens - 1) * head_dim;
        pack_row(keys, keys->blocks + i / SCAN_LANES * keys->block_bytes, i % SCAN_LANES, row);
    }
}

void scan_query_init(struct scan_query *query, enum scan_format format, const float *heads, uint32_t head_count,
                     uint32_t head_dim, float scale)
{
    assert(head_count > 0 && head_count <= SCAN_HEADS_MAX);
    query->heads = head_count;
    query->head_dim = head_dim;
    for (uint32_t h = 0; h < head_count; h++) {
        const float *row = heads + (size_t)h * head_dim;
        if (format != SCAN_I8) {
            for (uint32_t j = 0; j < head_dim; j++) {
                query->values[h * head_dim + j] = row[j] * scale;
            }
            continue;
        }
        const float step = largest(row, head_dim) / CODE_MAX;
        int8_t *codes = (int8_t *)&query->words[h * head_dim / 4];
        query->factor[h] = step * scale;
        query->sum[h] = 0;
        for (uint32_t j = 0; j < head_dim; j++) {
            codes[j] = (int8_t)lrintf(row[j] / step);
            query->sum[h] += codes[j];
        }
    }
}

const struct scan_ops *scan_ops_named(const char *name)
{
#if defined(__x86_64__)
    if (strcmp(name, scan_ops_avx512vnni.name) == 0) {
        const bool runs = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                          __builtin_cpu_supports("avx512vnni");
        return runs ? &scan_ops_avx512vnni : NULL;
    }
    if (strcmp(name, scan_ops_avx2.name) == 0) {
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? &scan_ops_avx2 : NULL;
    }
#endif
    return strcmp(name, scan_ops_portable.name) == 0 ? &scan_ops_portable : NULL;
}

const struct scan_ops *scan_ops_best(void)
{
    static const char *const names[] = {"avx512vnni", "avx2"};
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
        const struct scan_ops *ops = scan_ops_named(names[i]);
        if (ops != NULL) {
            return ops;
        }
    }
    return &scan_ops_portable;
}

static void *room_for(size_t bytes)
{
    return aligned_alloc(64, (bytes + 63) / 64 * 64);
}

struct scan_stream *scan_stream_create(const struct scan_ops *ops, uint32_t budget, uint32_t heads)
{
    assert(heads > 0 && heads <= SCAN_HEADS_MAX && budget > 0);
    struct scan_stream *stream = calloc(1, sizeof *stream);
    if (stream == NULL) {
        return NULL;
    }
    const size_t chunk_tokens = (size_t)SCAN_CHUNK_BLOCKS * SCAN_LANES;
    stream->ops = ops;
    stream->capacity = CAPACITY(budget);
    // A chunk may pass as a whole, and kernels store whole registers.
    stream->room = stream->capacity + (uint32_t)chunk_tokens + SCAN_LANES;
    const size_t room = stream->room;
    stream->positions = room_for(room * sizeof(uint32_t));
    stream->scores = room_for(room * heads * sizeof(float));
    stream->ranks = room_for(room * sizeof(float));
    stream->order = room_for(room * sizeof(uint32_t));
    stream->chunk = room_for(chunk_tokens * heads * sizeof(float));
    stream->totals = room_for((size_t)heads * SCAN_LANES * sizeof(float));
    stream->references = room_for(heads * sizeof(float));
    stream->above = room_for(heads * sizeof(float));
    if (stream->positions == NULL || stream->scores == NULL || stream->ranks == NULL || stream->order == NULL ||
        stream->chunk == NULL || stream->totals == NULL || stream->references == NULL || stream->above == NULL) {
        scan_stream_destroy(stream);
        return NULL;
    }
    return stream;
}

void scan_stream_destroy(struct scan_stream *stream)
{
    if (stream == NULL) {
        return;
    }
    free(stream->positions);
    free(stream->scores);
    free(stream->ranks);
    free(stream->order);
    free(stream->chunk);
    free(stream->totals);
    free(stream->references);
    free(stream->above);
    free(stream);
}

void scan_partition(float *values, uint32_t *companions, uint32_t n, uint32_t count)
{
    if (count == 0 || count >= n) {
        return;
    }
    // Hoare's selection, largest first.
    int64_t left = 0, right = (int64_t)n - 1;
    const int64_t wanted = (int64_t)count - 1;
    while (left < right) {
        const float pivot = values[(left + right) / 2];
        int64_t i = left, j = right;
        while (i <= j) {
            while (values[i] > pivot) {
                i++;
            }
            while (values[j] < pivot) {
                j--;
            }
            if (i <= j) {
                const float value = values[i];
                const uint32_t companion = companions[i];
                values[i] = values[j];
                companions[i++] = companions[j];
                values[j] = value;
                companions[j--] = companion;
            }
        }
        if (wanted <= j) {
            right = j;
        } else if (wanted >= i) {
            left = i;
        } else {
            return;
        }
    }
}

// Log-sum-exp of everything seen so far becomes each head's reference.
static void rebase(struct scan_stream *stream)
{
    for (uint32_t h = 0; h < stream->query->heads; h++) {
        float *totals = stream->totals + (size_t)h * SCAN_LANES;
        double sum = 0;
        for (uint32_t i = 0; i < SCAN_LANES; i++) {
            sum += (double)totals[i];
        }
        stream->references[h] += (float)log(sum);
        for (uint32_t i = 0; i < SCAN_LANES; i++) {
            totals[i] = (float)((double)totals[i] / sum);
        }
    }
}

static int ascending(const void *a, const void *b)
{
    const uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return (x > y) - (x < y);
}

// Keeps exactly the best `keep`: for masses that do not differ, as of equal keys.
static void keep_best(struct scan_stream *stream)
{
    if (stream->count <= stream->keep) {
        return;
    }
    for (uint32_t i = 0; i < stream->count; i++) {
        stream->order[i] = i;
    }
    scan_partition(stream->ranks, stream->order, stream->count, stream->keep);
    qsort(stream->order, stream->keep, sizeof stream->order[0], ascending);
    for (uint32_t i = 0; i < stream->keep; i++) {
        const uint32_t from = stream->order[i];
        stream->positions[i] = stream->positions[from];
        for (uint32_t h = 0; h < stream->query->heads; h++) {
            stream->scores[(size_t)h * stream->room + i] = stream->scores[(size_t)h * stream->room + from];
        }
    }
    stream->count = stream->keep;
}

// One head: masses relative to the best candidate. Several: shares of each head's sum so far.
static void rank(struct scan_stream *stream)
{
    if (stream->query->heads > 1) {
        rebase(stream);
    } else {
        stream->references[0] = stream->scores[0];
        for (uint32_t i = 1; i < stream->count; i++) {
            const float score = stream->scores[i];
            stream->references[0] = score > stream->references[0] ? score : stream->references[0];
        }
    }
    stream->ops->masses(stream, stream->references, stream->ranks);
}

// Masses fall into bins by their leading bits, an eighth to a quarter of an octave wide.
static uint32_t bin_of(float mass)
{
    uint32_t bits;
    memcpy(&bits, &mass, sizeof bits);
    return bits >> 20;
}

static float bin_floor(uint32_t bin)
{
    const uint32_t bits = bin << 20;
    float mass;
    memcpy(&mass, &bits, sizeof mass);
    return mass;
}

// Drops candidates behind the best `keep`, or a few more, and raises the bar to what the best `budget` have.
static void refill(struct scan_stream *stream)
{
    enum { BINS = 0x7f8 }; // of the positive floats
    uint32_t bins[BINS] = {0};
    rank(stream);
    for (uint32_t i = 0; i < stream->count; i++) {
        bins[bin_of(stream->ranks[i])]++;
    }
    uint32_t bin = BINS, sum = 0;
    while (bin > 0 && sum < stream->budget) {
        sum += bins[--bin];
    }
    const float least = bin_floor(bin);
    for (uint32_t h = 0; h < stream->query->heads; h++) {
        // A token of the best has half of its mass in one head, or nearly so; `keep` allows for the rest.
        stream->above[h] = stream->references[h] + logf(stream->query->heads == 1 ? least : 0.5f * least);
    }
    while (bin > 0 && sum < stream->keep) {
        sum += bins[--bin];
    }
    if (sum < stream->count && sum <= stream->capacity / 2) {
        stream->ops->keep(stream, bin_floor(bin));
    } else {
        keep_best(stream);
    }
}

static void stream_begin(struct scan_stream *stream)
{
    stream->count = 0;
    for (uint32_t h = 0; h < stream->query->heads; h++) {
        stream->references[h] = -INFINITY; // set by the first block
        stream->above[h] = -INFINITY;
    }
    memset(stream->totals, 0, stream->query->heads * SCAN_LANES * sizeof stream->totals[0]);
}

uint32_t scan_select(struct scan_stream *stream, const struct scan_keys *keys, const struct scan_query *query,
                     uint32_t visible, uint32_t low, uint32_t high, uint32_t budget, struct scan_selected *out)
{
    assert(visible <= keys->tokens && high <= visible && CAPACITY(budget) <= stream->capacity);
    stream->keys = keys;
    stream->query = query;
    stream->visible = visible;
    stream->low = low;
    stream->high = high;
    stream->budget = budget;
    stream->keep = query->heads == 1 ? budget : 2 * budget;
    stream_begin(stream);
    const uint32_t blocks = block_count(visible);
    for (uint32_t block = 0; block < blocks; block += SCAN_CHUNK_BLOCKS) {
        const uint32_t n = blocks - block < SCAN_CHUNK_BLOCKS ? blocks - block : SCAN_CHUNK_BLOCKS;
        stream->ops->score[keys->format](keys, query, block, n, stream->chunk);
        stream->ops->filter(stream, block, n);
        // The first bar is set early, from few tokens: it saves most of the candidates.
        const bool first = stream->above[0] == -INFINITY && stream->count >= 2 * stream->keep + SCAN_LANES;
        if (first || stream->count > stream->capacity) {
            refill(stream);
        }
    }
    if (stream->count > 2 * stream->keep) {
        refill(stream);
    }
    rank(stream);
    const uint32_t taken = stream->count < budget ? stream->count : budget;
    for (uint32_t i = 0; i < stream->count; i++) {
        stream->order[i] = i;
    }
    scan_partition(stream->ranks, stream->order, stream->count, taken);
    for (uint32_t i = 0; i < taken; i++) {
        out[i] = (struct scan_selected){stream->positions[stream->order[i]], stream->ranks[i]};
    }
    return taken;
}
