// The scatter kernel's argument and what it does, in the C that both compilers understand: nvcc makes gpu/scatter.ptx
// of it (gpu/scatter.cu), and the tests' fake driver carries it out as it is.
//
// For each row and KV head it copies the slots that a staged block names as changed (proto/shm.h) from the staging,
// which the GPU reads where it is, in host memory, to the same slots of the landing: K, V and positions, and the count.
// It asks nothing of the CPU: how many have changed it reads itself.
#ifndef ICECACHE_GPU_SCATTER_JOB_H
#define ICECACHE_GPU_SCATTER_JOB_H

#include <stdint.h>

#define SCATTER_ROWS_MAX 256u // of one launch
#define SCATTER_BYTES    16u  // copied at a time; slots are a multiple of it

struct scatter_job {
    uint64_t from, to;               // the staging's first block; the landing's first block of the layer
    uint64_t from_stride, to_stride; // from one row's block to the next one's
    uint64_t side_bytes;             // of K, or V, of one KV head
    uint64_t positions_offset, counts_offset, changed_offset, changed_counts_offset; // in a block
    uint32_t kv_heads, slots, slot_bytes;
    uint32_t row_count, rows[SCATTER_ROWS_MAX];
};

#ifdef __CUDACC__
#define SCATTER_INLINE         static __device__ __forceinline__
#define SCATTER_LOAD(from)     __ldcv((const uint32_t *)(from)) // past the caches: the daemon writes there
#define SCATTER_COPY(to, from) (*(uint4 *)(to) = __ldcv((const uint4 *)(from)))
#else
#include <string.h>
#define SCATTER_INLINE         static inline
#define SCATTER_LOAD(from)     (*(const volatile uint32_t *)(uintptr_t)(from))
#define SCATTER_COPY(to, from) memcpy((void *)(uintptr_t)(to), (const void *)(uintptr_t)(from), SCATTER_BYTES)
#endif

// The part of worker `worker` of `workers`, `lanes` of which do lane `lane`, in one head of the row of number `index`.
SCATTER_INLINE void scatter_cell(const struct scatter_job *job, uint32_t index, uint32_t head, uint32_t worker,
                                 uint32_t workers, uint32_t lane, uint32_t lanes)
{
    const uint64_t from = job->from + job->rows[index] * job->from_stride;
    const uint64_t to = job->to + job->rows[index] * job->to_stride;
    const uint64_t words = (uint64_t)head * job->slots; // of the head, in positions and changed
    const uint32_t vectors = job->slot_bytes / SCATTER_BYTES;
    const uint32_t named = SCATTER_LOAD(from + job->changed_counts_offset + 4u * head);
    const uint32_t changed = named < job->slots ? named : job->slots;
    for (uint32_t i = worker; i < changed; i += workers) {
        const uint32_t slot = SCATTER_LOAD(from + job->changed_offset + 4u * (words + i));
        if (slot >= job->slots) {
            continue; // not the daemon's: nothing is written outside the landing
        }
        const uint64_t key = (2u * (uint64_t)head) * job->side_bytes + (uint64_t)slot * job->slot_bytes;
        for (uint32_t v = lane; v < 2u * vectors; v += lanes) {
            const uint64_t at = key + (v < vectors ? 0 : job->side_bytes) + (uint64_t)(v % vectors) * SCATTER_BYTES;
            SCATTER_COPY(to + at, from + at);
        }
        if (lane == 0) {
            const uint64_t at = job->positions_offset + 4u * (words + slot);
            *(uint32_t *)(uintptr_t)(to + at) = SCATTER_LOAD(from + at);
        }
    }
    if (worker == 0 && lane == 0) {
        const uint64_t at = job->counts_offset + 4u * (uint64_t)head;
        *(uint32_t *)(uintptr_t)(to + at) = SCATTER_LOAD(from + at);
    }
}

#endif
