// What the two files of the fake driver share. The lock guards everything in both.
#ifndef ICECACHE_TESTS_FAKE_CUDA_H
#define ICECACHE_TESTS_FAKE_CUDA_H

#include "gpu/driver.h"

#include <stdbool.h>

#define EXPORT __attribute__((visibility("default")))

struct cuda_context {
    int device;
    unsigned retains;
};

// Takes the lock; answers what the call must answer at once, or 0 with the lock held.
int fake_enter(const char *entry, bool needs_context);
cuda_result fake_leave(cuda_result result);
struct cuda_context *fake_current(void);
// Where the content of a GPU address is, and how many bytes follow it there (at most *bytes); NULL: nothing that copies
// may touch. Memory that is mapped in pieces goes on behind them.
uint8_t *fake_content(cuda_address address, size_t *bytes);

#define ENTER(entry, needs_context)                                                                                    \
    do {                                                                                                               \
        int code = fake_enter(entry, needs_context);                                                                   \
        if (code != 0)                                                                                                 \
            return code;                                                                                               \
    } while (0)

#endif
