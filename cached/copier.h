// The thread that copies selections to one GPU, and the look at it from outside: a driver call may never return.
#ifndef ICECACHE_CACHED_COPIER_H
#define ICECACHE_CACHED_COPIER_H

#include "gpu/device.h"

#define COPIER_DEADLINE_NS (10ull * 1000000000u) // a copy, or a call, that takes longer never ends
#define COPIER_SPIN_NS     200000u               // how long the end of a copy is asked for without a pause
#define COPIER_PAUSE_NS    20000u

struct copier;
struct op;
struct server;

struct copier_usage {
    uint64_t copies, bytes; // those that have ended, a copy being a retrieve's
    bool broken;
    char broken_text[CUDA_TEXT_BYTES];
};

// Starts it over a device, which is borrowed until copier_stop. 0 or -errno.
int copier_start(struct server *server, const struct gpu_device *device, uint32_t number, struct copier **out);
// What is queued is issued and ends first. Waits for ever where the driver does.
void copier_stop(struct copier *copier);

// Any thread: the copies of a retrieve whose selections are staged. The op is completed when they have ended, or at
// once where the GPU has been given up.
void copier_push(struct copier *copier, struct op *op);
// Any thread. The broken text is there where the copier is broken.
void copier_usage(struct copier *copier, struct copier_usage *out);
// Reactor, now and then: gives up a GPU whose driver does not return, and fails what waits there.
void copier_look(struct copier *copier, uint64_t now_ns);

#endif
