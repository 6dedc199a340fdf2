// Element types of K, V and queries on the wire and in memory.
#ifndef ICECACHE_PROTO_DTYPE_H
#define ICECACHE_PROTO_DTYPE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

// Values are part of the wire protocol.
enum dtype { DTYPE_BF16 = 1, DTYPE_FP16 = 2, DTYPE_FP32 = 3 };

static inline bool dtype_is_valid(uint32_t dtype)
{
    return dtype >= DTYPE_BF16 && dtype <= DTYPE_FP32;
}
static inline size_t dtype_bytes(enum dtype dtype)
{
    return dtype == DTYPE_FP32 ? 4 : 2;
}
static inline const char *dtype_name(enum dtype dtype)
{
    return dtype == DTYPE_BF16 ? "bf16" : dtype == DTYPE_FP16 ? "fp16" : dtype == DTYPE_FP32 ? "fp32" : "unknown";
}

#endif
