// What the daemon counts of refusals, of deadlines and of sessions' ends: one list, which statistics show by these
// names. Reactor only.
#ifndef ICECACHE_CACHED_COUNTS_H
#define ICECACHE_CACHED_COUNTS_H

#include <stdint.h>

#define COUNTS(X)                                                                                                      \
    X(refused_inflight)   /* requests beyond --inflight-max of their session, or beyond what its requests may hold */  \
    X(refused_overload)   /* beyond --decode-queue-max or --bulk-queue-max */                                          \
    X(refused_deadline)   /* retrieves whose turn would have come after their deadline */                              \
    X(refused_messages)   /* that could not be decoded, or exceeded a limit of the protocol */                         \
    X(refused_strangers)  /* messages of no session */                                                                 \
    X(dropped_messages)   /* of those two kinds, beyond INTAKE_STRANGERS_PER_S: not answered */                        \
    X(dropped_replies)    /* to those two kinds, which nobody took */                                                  \
    X(retrieves_late)     /* answered without a search, their deadline had passed when their turn came */              \
    X(hints_late)         /* given up, their deadline had passed when their turn came */                               \
    X(deadlines_missed)   /* retrieves answered after their deadline */                                                \
    X(requests_abandoned) /* in flight or queued when their session ended */                                           \
    X(ended_closed)       /* sessions that their workers closed with nothing in flight, or that died so */             \
    X(ended_mid_request)  /* likewise, with requests in flight */                                                      \
    X(ended_no_hello)                                                                                                  \
    X(ended_deaf)         /* did not read their replies */                                                             \
    X(ended_deaf_control) /* did not read their control socket */                                                      \
    X(ended_flood)        /* had INTAKE_REFUSALS_PER_S requests refused within a second */                             \
    X(ended_bad_control)  /* sent a packet on the control socket that cannot be received */                            \
    X(ended_spoilt_ring)  /* wrote what cannot be into its ring */                                                     \
    X(ended_no_memory)    /* there was none for a message from or to their ring */

struct counts {
#define COUNT_FIELD(name) uint64_t name;
    COUNTS(COUNT_FIELD)
#undef COUNT_FIELD
};

#endif
