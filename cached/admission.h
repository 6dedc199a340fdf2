// Whether the daemon takes on one more request: what cannot be served in time is refused at once, in words, instead of
// waiting until its deadline. Reactor only.
//
// Of each class a bounded number of requests is in flight. The bound is shared: who is below an equal share of it is
// never refused, so that a session that takes all it can has its own requests refused and nobody else's.
#ifndef ICECACHE_CACHED_ADMISSION_H
#define ICECACHE_CACHED_ADMISSION_H

#include "proto/status.h"

#include <stddef.h>
#include <stdint.h>

// A queue that is shorter is no overload: what comes too late for its deadline is answered with what can be had.
#define ADMISSION_WAIT_NS (10ull * 1000000u)

enum admission_class { ADMISSION_DECODE, ADMISSION_BULK, ADMISSION_CLASSES };

// What is in flight, of a session or of all of them.
struct admission_load {
    uint32_t requests[ADMISSION_CLASSES];
    uint64_t lanes; // of retrieves
};

struct admission_state {
    struct admission_load all;
    uint32_t sessions[ADMISSION_CLASSES]; // that have something in flight
    uint64_t lane_ns; // what a lane of a retrieve takes on its shard, averaged over about 16 retrieves
};

struct op;
struct server;

// ICE_OK, or ICE_OVERLOADED and a text. The op has not been attached to its session.
ICE_MUST_CHECK ice_status admission_check(struct server *server, const struct op *op, uint64_t now_ns, char *text,
                                          size_t capacity);
void admission_enter_load(struct op *op); // it is attached
void admission_leave_load(struct op *op);
// A retrieve has been searched: what its lanes have taken.
void admission_learn(struct server *server, const struct op *op);

#endif
