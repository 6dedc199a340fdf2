// What is behind the public handles of landings, sequences and tickets.
#ifndef ICECACHE_CLIENT_HANDLES_H
#define ICECACHE_CLIENT_HANDLES_H

#include "client/exchange.h"

#include "proto/shm.h"

struct ice_landing {
    struct handle handle;
    ice_client *client;  // borrowed
    uint64_t generation; // constant, like all but row_owners
    uint32_t id;
    struct landing_shape shape;
    struct landing_layout layout;
    uint8_t *base;        // the mapping, layout.total_bytes
    uint64_t *row_owners; // [rows] id of the request that a row belongs to; 0: ours. Guarded by the client's lock
};

struct ice_sequence {
    struct handle handle;
    ice_client *client;  // borrowed
    uint64_t generation; // constant, like all but lengths
    uint64_t id;
    struct wire_shape shape;
    uint64_t *lengths; // [layers] as last heard. Guarded by the client's lock
};

struct ice_ticket {
    struct handle handle;
    ice_client *client; // borrowed
    uint64_t generation;
    struct pending *pending; // owned
    uint32_t head_count;
};

// Frees a handle's local part; called with no lock needed.
void landing_free(ice_landing *landing);
void sequence_free(ice_sequence *sequence);
void ticket_free(ice_ticket *ticket);

// With the lock held. Rows of a record: does an earlier request own one of them? Take them all (ICE_BUSY, or
// ICE_INVALID_ARGUMENT for a row named twice; landing_rows_release undoes a part). Give back those that are taken.
bool landing_rows_busy(const struct pending *pending);
ICE_MUST_CHECK ice_status landing_rows_acquire(const struct pending *pending);
void landing_rows_release(const struct pending *pending);

// Layers of a call: one, or all with ICE_ALL_LAYERS.
struct layer_range {
    uint32_t first, count;
};
ICE_MUST_CHECK ice_status sequence_layers(const ice_sequence *sequence, uint32_t layer, struct layer_range *out);
// With the lock held: the shortest length last heard of over these layers, and a newly heard one.
uint64_t sequence_length(const ice_sequence *sequence, struct layer_range range);
void sequence_length_set(ice_sequence *sequence, struct layer_range range, uint64_t length);

#endif
