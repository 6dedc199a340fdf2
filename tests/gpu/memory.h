// GPU memory as a worker of the tests has it, through the driver that the library uses too: the fake one, or the real
// one where ICECACHE_TEST_GPU=real.
#ifndef ICECACHE_TESTS_GPU_MEMORY_H
#define ICECACHE_TESTS_GPU_MEMORY_H

#include "worker.h" // first: icecache.h has its own status codes

#include "gpu/driver.h"

// Before anything else in main: chooses the driver for this process and its children. false: there is no GPU (say so
// and exit 77).
bool memory_choose_driver(void);
bool memory_is_fake(void);
const char *memory_library(void); // ICECACHE_CUDA_LIBRARY, or NULL
// The fake driver: PROGRAM ENTRY CODE [DEVICE] to do wrong from now on in all processes; NULL: nothing.
void memory_fail(const char *line);
// How many mappings of another process's memory there are, by all processes of the fake driver.
uint32_t memory_foreign_mappings(void);
void memory_forget_mappings(void); // of processes that ended without closing them
void memory_forget_folder(void);   // the fake driver's, at the end

// The driver with its primary context current, once per process.
const struct cuda_driver *memory_driver(void);
cuda_address memory_alloc(uint64_t bytes); // as cudaMalloc
void memory_free(cuda_address address);

// Memory that is mapped in pieces of equal size, as PyTorch's expandable segments are. shareable: with handles for
// other processes.
struct mapped {
    cuda_address address;
    uint64_t bytes, piece_bytes;
};
void mapped_create(struct mapped *mapped, uint32_t pieces, bool shareable);
void mapped_destroy(struct mapped *mapped);

// The fake driver: begins or ends a capture of the stream into a graph, which is empty.
void memory_capture(cuda_stream stream, bool begin);
void memory_read(void *to, cuda_address from, uint64_t bytes);
void memory_fill(cuda_address to, int value, uint64_t bytes);

// A landing on the GPU of a worker's shape; takes the place of its host landing.
void worker_open_gpu(struct worker *worker, const char *sockets, const struct shape *shape, uint32_t rows,
                     uint32_t slots, const struct ice_gpu_options *options);
// As landing_check of a landing in host memory: bit for bit, from the GPU's memory.
void gpu_check(const struct worker *worker, uint32_t row, uint32_t layer, const struct history *history, uint32_t count,
               uint64_t visible);
// All counts of the (row, layer) are this.
void gpu_check_counts(const struct worker *worker, uint32_t row, uint32_t layer, uint32_t count);

// All of the worker's sequence, which is the history, into a row; answers the status. check: on success the bytes are
// right.
ice_status gpu_retrieve_all(const struct worker *worker, const struct history *history, uint32_t row, uint32_t layer,
                            bool check);
// A landing in host memory and another one on the GPU work, whatever has happened to others.
void gpu_expect_service(const struct daemon *daemon, const struct history *history, enum ice_gpu_mode mode);

#endif
