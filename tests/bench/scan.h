// Exact scans over a lane's keys: what a user could do without a tree, as fast as we can make it. One thread.
//
// Keys lie in blocks of 16, coordinate by coordinate, so that a block is scored without horizontal sums and all query
// heads share each load. int8 keys are the difference to the lane's mean (a constant per query, which changes no
// attention), with one scale per key behind the codes of their block: one stream of memory. The stream is scored in
// chunks; what could still be among the best is kept as a candidate, the rest is forgotten.
//
// Thread-safety: keys are read-only once built; a stream belongs to one thread.
#ifndef ICECACHE_BENCH_SCAN_H
#define ICECACHE_BENCH_SCAN_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define SCAN_LANES        16u
#define SCAN_CHUNK_BLOCKS 4u // scores wait in the first-level cache; long chunks would stall the stream of memory
#define SCAN_HEADS_MAX    64u
#define SCAN_DIM_MAX      256u

enum scan_format { SCAN_F32, SCAN_BF16, SCAN_I8, SCAN_FORMATS };

struct scan_keys {
    enum scan_format format;
    uint32_t tokens, head_dim;
    size_t block_bytes;
    uint8_t *blocks; // borrowed: scan_keys_bytes() bytes, 64-byte aligned
    float mean[SCAN_DIM_MAX];
};

// Bytes of memory for `tokens` keys.
size_t scan_keys_bytes(enum scan_format format, uint32_t tokens, uint32_t head_dim);
// Packs keys [token][head_dim] into memory, which stays the caller's.
void scan_keys_pack(struct scan_keys *keys, enum scan_format format, const float *rows, uint32_t tokens,
                    uint32_t head_dim, void *memory);

// Query heads, prepared for one format.
struct scan_query {
    uint32_t heads, head_dim;
    float factor[SCAN_HEADS_MAX];                     // int8: sum * key scale * factor is the logit
    int32_t sum[SCAN_HEADS_MAX];                      // int8: of the codes
    int32_t words[SCAN_HEADS_MAX * SCAN_DIM_MAX / 4]; // int8: [head][head_dim / 4], four codes each
    float values[SCAN_HEADS_MAX * SCAN_DIM_MAX];      // float formats: [head][head_dim], times the softmax scale
};
void scan_query_init(struct scan_query *query, enum scan_format format, const float *heads, uint32_t head_count,
                     uint32_t head_dim, float scale);

struct scan_stream;

// One instruction set's kernels. Scores are [block][head][16]: int32 sums for int8, logits otherwise.
struct scan_ops {
    const char *name;
    void (*score[SCAN_FORMATS])(const struct scan_keys *keys, const struct scan_query *query, uint32_t first_block,
                                uint32_t block_count, void *scores);
    // Adds a chunk's scores to the stream's sums and keeps its candidates.
    void (*filter)(struct scan_stream *stream, uint32_t first_block, uint32_t block_count);
    // masses[i] = sum over heads of exp(score[head][i] - base[head])
    void (*masses)(const struct scan_stream *stream, const float *base, float *masses);
    // Keeps the candidates whose rank is at least `bar`.
    void (*keep)(struct scan_stream *stream, float bar);
    // Reads bytes (a multiple of 256) as fast as it can and returns a number that depends on them: memory's bandwidth.
    uint32_t (*read)(const void *memory, size_t bytes);
};

// The fastest one that this machine can run, or the one named "portable", "avx2" or "avx512vnni" (NULL where the
// machine cannot run it).
const struct scan_ops *scan_ops_best(void);
const struct scan_ops *scan_ops_named(const char *name);

// Private to scan.c and the kernels.
struct scan_stream {
    const struct scan_ops *ops;
    const struct scan_keys *keys;
    const struct scan_query *query;
    uint32_t visible, low, high; // tokens that count; of them, which may be selected
    uint32_t budget, keep;
    uint32_t count, capacity, room;
    uint32_t *positions;       // [room]
    float *scores;             // [head][room]
    float *ranks;              // [room]
    uint32_t *order;           // [room]
    void *chunk;               // scores of one chunk
    float *totals;             // [head][16]: sums of exp(score - reference)
    float *references, *above; // [head]; a candidate has a head with a score above `above`
};

struct scan_selected {
    uint32_t position;
    float mass; // summed normalised mass; one head: relative to its best token
};

// Room for selections of at most `budget` tokens for at most `heads` query heads. NULL when there is no memory.
struct scan_stream *scan_stream_create(const struct scan_ops *ops, uint32_t budget, uint32_t heads);
void scan_stream_destroy(struct scan_stream *stream); // accepts NULL
// Selects the best `budget` of the tokens low .. high-1, masses being shares of the tokens 0 .. visible-1. One head:
// the largest scores; several: the largest summed normalised mass. Returns how many; best first is not promised.
uint32_t scan_select(struct scan_stream *stream, const struct scan_keys *keys, const struct scan_query *query,
                     uint32_t visible, uint32_t low, uint32_t high, uint32_t budget, struct scan_selected *out);

// Moves the `count` largest of values[0..n) to the front, with their companions.
void scan_partition(float *values, uint32_t *companions, uint32_t n, uint32_t count);

extern const struct scan_ops scan_ops_portable;
#if defined(__x86_64__)
extern const struct scan_ops scan_ops_avx2;
extern const struct scan_ops scan_ops_avx512vnni;
#endif

#endif
