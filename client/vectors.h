// Queries, and the K and V that ride along, from GPU memory: on their way into a request.
#ifndef ICECACHE_CLIENT_VECTORS_H
#define ICECACHE_CLIENT_VECTORS_H

#include "client/exchange.h"

#define VECTORS_PIECES_MAX 3u

struct vectors_piece {
    const char *name; // of the option, for errors
    const void *from; // GPU memory
    size_t bytes;
};

// Copies the pieces, one behind the other, to `to`: in the stream (NULL: the default one), behind what is issued there.
// Without the lock; returns when they are there, or with ICE_TIMEOUT. landing: the GPU that they must be on, where it
// is on one.
ICE_MUST_CHECK ice_status vectors_fetch(ice_landing *landing, const struct vectors_piece *pieces, uint32_t count,
                                        void *stream, uint64_t until_us, uint8_t *to);
// At the client's end: no call may be under way.
void vectors_close(ice_client *client);

#endif
