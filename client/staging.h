// The shared memory through which appends and reads pass: two halves, each used by one part of one call at a time.
#ifndef ICECACHE_CLIENT_STAGING_H
#define ICECACHE_CLIENT_STAGING_H

#include "client/exchange.h"

#define STAGING_HALVES 2u

// Guarded by the client's lock, except the bytes of a half, which belong to whoever acquired it.
struct staging {
    uint32_t references; // of the client, and one per acquired half: the mapping outlives a lost session until then
    uint8_t *base;
    uint64_t mapped_bytes, half_bytes;
    bool busy[STAGING_HALVES];
    struct gpu_fetch *fetch; // the way from a GPU's memory, after the first append from there; owned (fetch.c)
};

// All with the lock held.

// Opens the staging area where there is none yet and waits for a free half.
ICE_MUST_CHECK ice_status staging_acquire(ice_client *client, uint64_t generation, uint64_t until_us,
                                          struct staging **staging, uint32_t *half);
// The other half, if it is free at once.
bool staging_try_acquire(ice_client *client, struct staging **staging, uint32_t *half);
void staging_release(ice_client *client, struct staging *staging, uint32_t half);
// Gives a half up that something may still write to: it is never free again.
void staging_lose(struct staging *staging);
// The reply to the request that opens it has come: maps the memory or stores why not.
void staging_adopt(ice_client *client, struct pending *pending);
// The session has ended.
void staging_forget(ice_client *client);

// Appends from GPU memory (fetch.c). The way from the GPU that the address is on to the staging area, made where there
// is none: a client appends from one GPU. Without the lock: the caller holds a half.
ICE_MUST_CHECK ice_status staging_fetch_open(ice_client *client, struct staging *staging, uint64_t address);
void staging_fetch_close(struct staging *staging); // before the memory goes

static inline uint64_t staging_offset(const struct staging *staging, uint32_t half)
{
    return half * staging->half_bytes;
}

#endif
