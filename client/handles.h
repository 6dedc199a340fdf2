// What is behind the public handles of landings, sequences and tickets.
#ifndef ICECACHE_CLIENT_HANDLES_H
#define ICECACHE_CLIENT_HANDLES_H

#include "client/exchange.h"

#include "gpu/buffer.h"
#include "proto/shm.h"

struct ice_landing {
    struct handle handle;
    ice_client *client;  // borrowed
    uint64_t generation; // constant, like all but row_owners and signals
    uint32_t id;
    struct landing_shape shape;
    struct landing_layout layout;
    enum landing_place place;
    uint8_t *base; // the mapping of what is held in host memory; NULL: none
    uint64_t base_bytes;
    _Atomic uint64_t *words; // timeline words in the mapping, [rows]; NULL: none
    uint64_t signals;        // values of them that requests have been given; guarded by the client's lock, as are
    uint64_t *row_owners;    // [rows] id of the request that a row belongs to; 0: ours. Guarded by the client's lock
    struct gpu_landing_side *gpu; // of a landing in GPU memory, owned; NULL: none
};

// The GPU's side of a landing.
struct gpu_landing_side {
    struct gpu_buffer buffer;          // constant after open, but for the path's way to copy
    char copy_way[32];                 // push: how the daemon copies rows
    char pull_reason[CUDA_TEXT_BYTES]; // why the daemon does not push; "" where that was not asked for
    enum ice_gpu_copy copy;
    struct streams *streams; // after the first wait in a stream (stream.c), owned. Guarded by the lock
    // Of a pull, guarded by the client's lock.
    uint64_t *row_sequences; // [rows] whose counts the GPU has; 0: nobody's
    uint64_t *cells;         // [rows][layers] whose last selection the GPU has whole; 0, or a request's mark: nobody's
    float turnover;          // share of the slots that change from one retrieve to the next, lately
};

struct ice_sequence {
    struct handle handle;
    ice_client *client;  // borrowed
    uint64_t generation; // constant, like all but lengths
    uint64_t id;
    struct wire_shape shape;
    uint32_t block_tokens; // of prefix hashes
    uint32_t *anchors;     // [layers] whose selection each follows; itself: none
    uint64_t *lengths;     // [layers] as last heard. Guarded by the client's lock
};

struct ice_ticket {
    struct handle handle;
    ice_client *client; // borrowed
    uint64_t generation;
    struct pending *pending; // owned
    uint32_t head_count;
    uint32_t layer;           // of a pull, like the next
    uint64_t *sequence_ids;   // [rows of the record], owned
    bool whole;               // all of the selection is staged, not what has changed only
    uint64_t signal;          // what the rows' timeline words have when it is over; 0: there are none
    uint64_t until_us;        // its deadline
    struct stream_wait *wait; // in a stream, the landing's; NULL: none
    bool streamed;            // there has been one
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

// Landings of any place (landing.c). A record without memory behind it, or NULL and why; asks the daemon (lock held;
// the descriptors are borrowed); tells it to close, and waits: ICE_TIMEOUT where it may still use the memory.
ICE_MUST_CHECK ice_landing *landing_create(ice_client *client, const struct ice_landing_shape *shape,
                                           ice_status *status);
ICE_MUST_CHECK struct pending *landing_request(ice_landing *landing, Icecache__Wire__GpuMemory *memory, const int *fds,
                                               uint32_t count, uint64_t until_us, ice_status *status);
ICE_MUST_CHECK ice_status landing_map(ice_landing *landing, const struct pending *pending);
ice_status landing_request_close(ice_client *client, uint64_t generation, uint32_t id, uint64_t until_us);

// Closes the landings that the daemon writes to by itself, while the session lives: GPU memory must not be freed before
// the daemon has closed it (gpu.c).
void gpu_close_pushed(ice_client *client);

// Pulls (pull.c), with the lock held, which is released while copies run. Copies what the ticket's reply has staged and
// gives the rows back; again where a deadline has cut it short.
ICE_MUST_CHECK ice_status pull_finish(ice_ticket *ticket, uint64_t until_us);
// Gives the rows of a ticket back that is not waited for any more; not while copies run.
void pull_abandon(ice_ticket *ticket, uint64_t until_us);
// The same for all tickets of a landing, which forget it.
void pull_forget(ice_landing *landing, uint64_t until_us);
// Must the daemon stage all of the selection? Asked before the submit; told when it has succeeded.
bool pull_wants_whole(const ice_ticket *ticket);
void pull_submitted(ice_ticket *ticket);
// The GPU has, or will have before whatever is issued there next, what the ticket has selected.
void pull_landed(ice_ticket *ticket);

// Waits in streams (stream.c), with the lock held, which is released while a stream runs. Of a ticket that has one and
// whose reply, of this status, is here: until its copies, where the library makes them, have ended; then whether the
// stream has waited for the selection.
ICE_MUST_CHECK ice_status stream_finish(ice_ticket *ticket, ice_status replied, uint64_t until_us);
// The ticket goes; its wait stays until the stream has passed.
void stream_leave(ice_ticket *ticket);
// Gives rows back whose streams have passed and whose replies are here.
void stream_reap(ice_landing *landing);
// At the landing's close: its tickets forget their waits. Then: lets all streams go on and waits until they have passed
// the landing's work. False: one has not within the deadline, and what it uses must stay where it is.
void stream_detach(const ice_landing *landing);
ICE_MUST_CHECK bool stream_close(ice_landing *landing, uint64_t until_us);

// Opening a sequence, plain or attached (sequence.c). The options' ranges, with a text; the request's fields, borrowed
// from the options; a handle that no daemon knows yet, of the client's session (NULL: no memory, the error is set).
ICE_MUST_CHECK ice_status sequence_options_check(const struct ice_sequence_options *options);
void sequence_options_fill(Icecache__Wire__SequenceOpen *open, const ice_client *client,
                           const struct ice_sequence_options *options);
ICE_MUST_CHECK ice_sequence *sequence_create(ice_client *client, const struct ice_sequence_options *options);
// The daemon has opened it: it is among the client's handles from now on.
void sequence_link(ice_sequence *sequence);

// What a retrieve or a hint asks for (retrieve.c); the ranges, with a text.
struct selection_numbers {
    uint32_t sequence_count, queries;
    ice_dtype query_dtype;
    uint32_t budget, sinks, window;
};
ICE_MUST_CHECK ice_status selection_check(const struct selection_numbers *asked);

// Layers of a call: one, or all with ICE_ALL_LAYERS.
struct layer_range {
    uint32_t first, count;
};
ICE_MUST_CHECK ice_status sequence_layers(const ice_sequence *sequence, uint32_t layer, struct layer_range *out);
// With the lock held: the shortest length last heard of over these layers, and a newly heard one.
uint64_t sequence_length(const ice_sequence *sequence, struct layer_range range);
void sequence_length_set(ice_sequence *sequence, struct layer_range range, uint64_t length);

#endif
