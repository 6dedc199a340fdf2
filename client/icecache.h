// libicecache: the client library of icecached, the node's service for long KV caches.
//
// A worker connects, opens a landing (the buffer that selections are written to) and sequences, appends K and V as it
// produces them, and at each layer of a decode step retrieves the tokens that its queries attend to.
//
// Thread-safety: every call may be made from any thread, also on the same handle, except *_close, which no other call
// on that handle may overlap. No call aborts, prints or exits, and none but the first ice_ticket_stream_wait of a
// client starts a thread, which ends with the client and takes no signals. After fork() the child's calls answer
// ICE_FORKED. Deadlines are durations in microseconds; 0 takes the client's default. Handles of a client are invalid
// after ice_client_close. When the daemon dies, pending and later calls answer ICE_DISCONNECTED; ice_client_reconnect
// starts a new session: landings and sequences of the old one must be closed and opened again.
#ifndef ICECACHE_H
#define ICECACHE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define ICE_API     __attribute__((visibility("default")))
#define ICE_CHECKED ICE_API __attribute__((warn_unused_result))

typedef enum ice_status {
    ICE_OK = 0,
    // Only the request is lost.
    ICE_INVALID_ARGUMENT = 1,
    ICE_BAD_MESSAGE = 2,
    ICE_TOO_LARGE = 3,
    ICE_NOT_SUPPORTED = 5,
    ICE_UNKNOWN_SEQUENCE = 6,
    ICE_UNKNOWN_LANDING = 7,
    ICE_UNKNOWN_LAYER = 8,
    ICE_SHAPE_MISMATCH = 9,
    ICE_POSITION_GAP = 10,
    ICE_CONFLICT = 11,
    ICE_OUT_OF_BOUNDS = 12,
    ICE_NOT_FINITE = 13,
    ICE_POOL_FULL = 14,
    ICE_INDEX_FULL = 15,
    ICE_SHARED_FULL = 16,
    ICE_LIMIT = 17,
    ICE_BUSY = 18,
    ICE_QUEUE_FULL = 19,
    ICE_TIMEOUT = 20,
    ICE_NO_MEMORY = 21,
    ICE_SYSTEM = 28,
    ICE_SPILL_FULL = 30,
    ICE_PAGE_LOST = 31,
    ICE_UNKNOWN_PREFIX = 32,
    ICE_DISK_FAILED = 33,
    ICE_OVERLOADED = 34,
    ICE_QUOTA = 35,
    // The session is lost: reconnect.
    ICE_VERSION_MISMATCH = 4,
    ICE_SHUTTING_DOWN = 22,
    ICE_UNKNOWN_SESSION = 23,
    ICE_DISCONNECTED = 24,
    ICE_FORKED = 26,
    ICE_PERMISSION = 27,
    // The daemon is not there, or has a defect.
    ICE_NO_DAEMON = 25,
    ICE_INTERNAL = 29,
} ice_status;

typedef enum ice_dtype { ICE_BF16 = 1, ICE_FP16 = 2, ICE_FP32 = 3 } ice_dtype;

typedef struct ice_client ice_client;
typedef struct ice_landing ice_landing;
typedef struct ice_sequence ice_sequence;
typedef struct ice_ticket ice_ticket;

// "ICE_POOL_FULL", and what it means and what to do. Never NULL, also for unknown values.
ICE_API const char *ice_status_name(ice_status status);
ICE_API const char *ice_status_text(ice_status status);
// The last error's own text on this thread (names the field, limit or path), "" after a success. Valid until the
// thread's next call of this library.
ICE_API const char *ice_last_error(void);
ICE_API const char *ice_version(void);

// ---- client ----

// How requests and replies travel. Rings are shared memory with wake-ups by eventfd, for which the daemon must have
// room (icecached --ring-bytes); they are an order of magnitude faster.
typedef enum ice_transport {
    ICE_TRANSPORT_AUTO = 0, // $ICECACHE_TRANSPORT (auto, zmq or ring); else rings where they are to be had, else ZeroMQ
    ICE_TRANSPORT_ZMQ = 1,
    ICE_TRANSPORT_RING = 2, // or no connection
} ice_transport;

struct ice_client_options {
    const char *socket_directory; // NULL: $ICECACHE_SOCKET_DIR, /run/icecache for root, else the user's runtime folder
    const char *name;             // shown in logs and statistics; NULL: the program's name
    uint64_t deadline_us;         // default of every call; 0: 5 s
    uint64_t staging_bytes;       // shared memory for appends and reads, made at first use; 0: 64 MiB
    // NULL: the client may use any namespace. Else its sequences and prefixes are of this one where their options name
    // none, and the daemon refuses it any other (ICE_PERMISSION): for programs whose requests come from elsewhere.
    const char *name_space;
    ice_transport transport;
    // With rings, how long a call that waits looks at memory before it sleeps. That saves a wake-up where a core is to
    // spare. 0: not at all; at most 1000.
    uint32_t ring_spin_us;
};

// options may be NULL. *out is owned by the caller, written on success only.
ICE_CHECKED ice_status ice_client_connect(const struct ice_client_options *options, ice_client **out);
// Ends the session: everything it holds is freed by the daemon, and the client's landings, sequences and tickets that
// are still open are closed here. Accepts NULL.
ICE_API void ice_client_close(ice_client *client);
// A new session on the same sockets, after ICE_DISCONNECTED or ICE_UNKNOWN_SESSION. Pending tickets answer
// ICE_DISCONNECTED, sequences and landings of the old session ICE_UNKNOWN_SESSION (close them).
ICE_CHECKED ice_status ice_client_reconnect(ice_client *client);
// Random per daemon start: a change says that the daemon has been restarted. 0 when not connected.
ICE_API uint64_t ice_client_boot_token(const ice_client *client);

// ---- landing ----

// [row, layer, KV head, {K, V}, slot, head_dim]. slots: at least sinks + window + budget of any retrieve (the budget
// alone where the worker holds the ends; page-wise a budget counts as at least one page of the daemon's).
struct ice_landing_shape {
    uint32_t rows, layers, kv_heads, slots, head_dim;
    ice_dtype dtype;
};

ICE_CHECKED ice_status ice_landing_open(ice_client *client, const struct ice_landing_shape *shape, uint64_t deadline_us,
                                        ice_landing **out);
// Waits for requests in flight on its rows at most one default deadline; then frees. Accepts NULL. (Streams that wait:
// see ice_ticket_stream_wait.)
ICE_API void ice_landing_close(ice_landing *landing);

// What a retrieve left for one (row, layer, KV head). Borrowed: valid until the row's next submit or the close.
struct ice_landing_view {
    const void *keys;          // [count, head_dim], dtype of the landing
    const void *values;        // [count, head_dim]
    const uint32_t *positions; // [count]
    uint32_t count;
};
// ICE_BUSY while the row belongs to a request in flight. After the session's end the call fails, but what was borrowed
// before stays readable until the close.
ICE_CHECKED ice_status ice_landing_view(ice_landing *landing, uint32_t row, uint32_t layer, uint32_t kv_head,
                                        struct ice_landing_view *out);

// ---- landings in GPU memory ----

// The same layout as in host memory, at an address on a GPU: one block for each (row, layer), layer_bytes from one to
// the next, rows outermost. In a block: the data [KV head, {K, V}, slot, head_dim], at positions_offset uint32
// positions [KV head, slot], at counts_offset uint32 counts [KV head]. When a retrieve has been waited for, all of it
// is there for whatever is issued then, on any stream.
//
// push: the daemon copies into the memory, which the CUDA driver shares with it. pull: the daemon leaves a selection in
// shared host memory, and the library copies it in ice_retrieve_wait, or in the stream of ice_ticket_stream_wait; a
// ticket that is closed without having been waited for by either lands nothing. In both, between submit and the end of
// the wait the row's cells of this layer may hold anything.
//
// How a pulled selection gets to the GPU: blocks, a copy of all that the retrieve has selected; changed, a small kernel
// of the library that reads what has changed out of host memory (step reuse, see ice_retrieve_options). What each takes
// is measured when the landing is opened, some ms, and each retrieve goes the way that is expected to be the faster
// one, by how much the last selections have changed. Push sends blocks.
enum ice_gpu_mode {
    ICE_GPU_ANY = 0, // push where possible, else pull; ice_landing_gpu says why
    ICE_GPU_PUSH = 1,
    ICE_GPU_PULL = 2,
};

enum ice_gpu_copy {
    ICE_COPY_ANY = 0,    // what is faster
    ICE_COPY_BLOCKS = 1, // never what has changed alone
    // What has changed, wherever the GPU has the selection before. Means pull (with ICE_GPU_PUSH:
    // ICE_INVALID_ARGUMENT); ICE_NOT_SUPPORTED where there is no kernel.
    ICE_COPY_CHANGED = 2,
    // Blocks; where a retrieve has several rows, a call of the driver for each, or one for all, which takes CUDA 12.8.
    ICE_COPY_LOOP = 3,
    ICE_COPY_BATCH = 4,
};

struct ice_gpu_options {
    uint64_t address; // in this process's GPU memory (a tensor's data_ptr()), a multiple of 16; 0: made by the library
    uint64_t bytes;   // from address on, at least those of ice_landing_bytes
    int device;       // where address is 0: the GPU's number in this process
    enum ice_gpu_mode mode;
    enum ice_gpu_copy copy; // pull; for push it is the daemon's --gpu-copy
};

// Bytes of a landing of this shape, in host or GPU memory.
ICE_CHECKED ice_status ice_landing_bytes(const struct ice_landing_shape *shape, uint64_t *bytes_out);
// As ice_landing_open; what was in the memory is lost. It is borrowed until ice_landing_close: it must neither be freed
// nor moved before, nor its CUDA context be destroyed. The CUDA driver is loaded from $ICECACHE_CUDA_LIBRARY or
// libcuda.so.1. With push, a call that ends with ICE_TIMEOUT, and a close after the session was lost, leave open
// whether the daemon still writes to the memory: not longer than a second after it has noticed, unless
// its driver hangs. ICE_NOT_SUPPORTED,
// ICE_INVALID_ARGUMENT, ICE_OUT_OF_BOUNDS: the memory cannot be used, and ice_last_error says why.
ICE_CHECKED ice_status ice_landing_open_gpu(ice_client *client, const struct ice_landing_shape *shape,
                                            const struct ice_gpu_options *options, uint64_t deadline_us,
                                            ice_landing **out);

struct ice_gpu_landing {
    uint64_t address, bytes; // bytes: those of the landing
    uint64_t layer_bytes, positions_offset, counts_offset;
    enum ice_gpu_mode mode;  // ICE_GPU_PUSH or ICE_GPU_PULL
    const char *pull_reason; // why it is not push; "" where push was not asked for. Valid until the close
    const char *device_name;
    // Blocks of several rows: "loop", "batch", or "batch from 8 rows on"; a pull: as it is now, push: as it was at the
    // opening. Valid as the reason is.
    const char *copy_way;
    bool copies_changed;     // a pull that has the kernel
    const char *copy_reason; // why not; "" otherwise. Valid until the close
    // A pull: what one row takes until it has landed, us: a block, no slot changed, all slots changed.
    float block_us, changed_none_us, changed_all_us;
};
// ICE_INVALID_ARGUMENT for a landing in host memory. (ice_landing_view is for those.)
ICE_CHECKED ice_status ice_landing_gpu(const ice_landing *landing, struct ice_gpu_landing *out);

// ---- sequence ----

struct ice_sequence_options {
    const char *name_space;   // tenant; NULL: the client's, or "default"
    const void *model_digest; // identity of weights and RoPE settings; 1 to 64 bytes
    size_t model_digest_bytes;
    uint32_t tp_rank, tp_size;                        // tensor parallelism; tp_size 0: 1
    uint32_t layers, kv_heads, query_heads, head_dim; // of this rank; head_dim a multiple of 16 up to 256
    ice_dtype dtype;
    float softmax_scale;   // 0: 1/sqrt(head_dim)
    uint32_t block_tokens; // block size of prefix hashes; 0: 16
    // NULL, or per layer an earlier one whose selections it takes (itself: none), see ice_retrieve_options.
    const uint32_t *anchor_layers;
    uint64_t max_tokens; // 0: the daemon's limit
};

// ICE_QUOTA, here and from seal, attach, append and a retrieve that appends: a quota of the namespace is used up, and
// nothing has changed; ice_last_error says which quota, what is used and what to do.
ICE_CHECKED ice_status ice_sequence_open(ice_client *client, const struct ice_sequence_options *options,
                                         uint64_t deadline_us, ice_sequence **out);
// Frees all that the sequence holds, here and in the daemon; what forks share lives on. Accepts NULL.
ICE_API void ice_sequence_close(ice_sequence *sequence);

#define ICE_ALL_TOKENS UINT64_MAX

// Opens a sequence that begins with the first `tokens` of this one (ICE_ALL_TOKENS: all that every layer has), with the
// same options. Nothing is copied: pages, tree and room on the disk of these tokens are shared until the last sequence
// that has them is closed; from then on each sequence is appended to, truncated, sealed and closed for itself, and none
// sees another's tokens. It takes effect behind what this sequence was asked before, and costs memory for the record of
// layers x kv_heads only. ICE_OUT_OF_BOUNDS: the shortest layer has fewer tokens. ICE_CONFLICT: the layers are not
// equally long (in the middle of a step). ICE_LIMIT: --sequences-max, or a fork of a fork 63 deep, where each was
// appended to. *out is the caller's until ice_sequence_close, written on success only.
ICE_CHECKED ice_status ice_sequence_fork(ice_sequence *sequence, uint64_t tokens, uint64_t deadline_us,
                                         ice_sequence **out);
// Forgets what lies behind the first `tokens`, in the sequence only (not in forks): the next append goes on there. A
// layer that is shorter stays as it is, so a step that was broken off is undone on all layers. Again is a no-op.
// What landing rows hold of the sequence counts no more: retrieve again. ICE_OUT_OF_BOUNDS: no layer has so many.
ICE_CHECKED ice_status ice_sequence_truncate(ice_sequence *sequence, uint64_t tokens, uint64_t deadline_us);

// Clustering goes in batches and leaves the newest tokens out: indexed_min ends before the length for good, by 64
// tokens and less than a batch (64 tokens; in a long sequence more, at most 512), and is 0 below about 320 tokens and a
// page. What is not clustered is scanned, so it is found all the same. To wait until nothing is left to do, wait for
// `idle`.
struct ice_sequence_info {
    uint64_t length;      // of the longest layer
    uint64_t length_min;  // of the shortest
    uint64_t indexed_min; // positions below it need no clustering any more; smallest over layers and heads
    uint64_t pages, pool_bytes, index_bytes;
    uint64_t build_us; // time that the daemon spent clustering it, summed over lanes
    bool idle;         // no clustering is waiting or running
    // The first ones, which forks and others attached to the same prefix may share; pages and bytes count them as well.
    // Behind them clustering begins anew: with the first 320 tokens.
    uint64_t shared_tokens;
};
ICE_CHECKED ice_status ice_sequence_info(ice_sequence *sequence, uint64_t deadline_us, struct ice_sequence_info *out);

#define ICE_ALL_LAYERS UINT32_MAX

// K and V in host memory. Element (layer i, token t, KV head h) starts at keys + i*layer + t*token + h*head bytes and
// has head_dim contiguous elements of the sequence's dtype. Every element must lie inside [keys, keys + keys_bytes),
// else ICE_OUT_OF_BOUNDS. Strides are in bytes, the same for keys and values.
struct ice_kv_source {
    const void *keys, *values; // borrowed during the call
    size_t keys_bytes, values_bytes;
    size_t layer_stride, token_stride, head_stride;
};

// Appends tokens first .. first+n-1 of one layer or of all (keys as attention uses them, after RoPE). Contiguous: a
// first beyond the length is ICE_POSITION_GAP; an equal range again has no effect and is ok; a different one over old
// positions is ICE_CONFLICT. Large appends are split; each part is all or nothing over all lanes. *length_out (may be
// NULL) is the length that was reached, also on error. ICE_POOL_FULL and ICE_INDEX_FULL come before anything is
// appended.
ICE_CHECKED ice_status ice_append(ice_sequence *sequence, uint32_t layer, uint64_t first, uint64_t n,
                                  const struct ice_kv_source *source, uint64_t deadline_us, uint64_t *length_out);

// The same from GPU memory: keys and values of the source are GPU addresses of this process (a tensor's data_ptr()).
// Either a token's heads lie side by side (head_stride is that of one row: [layer, token, KV head, head_dim]), or a
// head's tokens do (token_stride is: [layer, KV head, token, head_dim]); anything else is ICE_NOT_SUPPORTED. The
// library copies on `stream` (a CUstream or cudaStream_t of the memory's context; NULL: the default stream), so behind
// whatever has been issued there, and returns when K and V have been stored. A client appends from one GPU, with at
// most 256 MiB of staging_bytes. Where the stream does not end within the deadline, that half of the client's staging
// is not used again until ice_client_reconnect; without both halves appends and reads end with ICE_TIMEOUT.
ICE_CHECKED ice_status ice_append_gpu(ice_sequence *sequence, uint32_t layer, uint64_t first, uint64_t n,
                                      const struct ice_kv_source *source, void *stream, uint64_t deadline_us,
                                      uint64_t *length_out);

// Writes K and V of positions first .. first+n-1 in position order into memory laid out like ice_kv_source.
struct ice_kv_target {
    void *keys, *values;
    size_t keys_bytes, values_bytes;
    size_t layer_stride, token_stride, head_stride;
};
ICE_CHECKED ice_status ice_read(ice_sequence *sequence, uint32_t layer, uint64_t first, uint64_t n,
                                const struct ice_kv_target *target, uint64_t deadline_us);

// ---- sealed prefixes ----

// The first tokens of a sequence can be sealed: the daemon puts their K, V and tree on stable storage, where another
// sequence of the same namespace, model digest, tensor-parallel rank and size, shape and block_tokens finds them, also
// after a restart of the daemon, and begins with them. Only whole blocks of block_tokens tokens are sealed. They are
// named by hashes of ICE_HASH_BYTES bytes, one for each block, each of which stands for its block and all before it:
// those of ice_block_hashes, or the engine's own.
#define ICE_HASH_BYTES 16

// Hashes of the n / block_tokens whole blocks of token_ids[n]; tokens behind the last whole block count for nothing.
// A block's hash is XXH3_128 (seed 0, canonical) over the 16 bytes of the hash before it and the block's token ids, 4
// bytes each, little-endian; before the first block it is XXH3_128 of the salt. The salt holds whatever else makes K
// and V differ that the sequence's options do not name: an adapter, an image's digest. block_tokens 0: 16. salt may be
// NULL with salt_bytes 0. hashes[n / block_tokens] is the caller's. Needs no client.
ICE_CHECKED ice_status ice_block_hashes(const uint32_t *token_ids, size_t n, uint32_t block_tokens, const void *salt,
                                        size_t salt_bytes, uint8_t (*hashes)[ICE_HASH_BYTES]);

struct ice_seal_result {
    uint64_t prefix_id; // for ice_prefix_remove, also after a restart of the daemon
    uint64_t tokens;    // sealed: count x block_tokens
    bool known;         // it had been sealed before, by whatever sequence: nothing was written
};

// Seals the first count blocks of the sequence, named by hashes[count][ICE_HASH_BYTES] (copied), and returns when a
// power failure cannot take them away any more. The prefix outlives the sequence and the session; the sequence goes on
// as before and may be appended to. Sealing takes seconds where the prefix is long: deadline_us 0 is the client's
// default, but at least 10 minutes (a daemon that dies ends the call at once); after ICE_TIMEOUT the prefix may still
// become sealed, and sealing it again is safe. ICE_POSITION_GAP: a layer has fewer tokens than the hashes name.
// ICE_DISK_FAILED: the daemon has no disk, or it failed. ICE_SPILL_FULL: no room for the prefix on it. ICE_PAGE_LOST:
// the disk has lost a part of the sequence. ICE_TOO_LARGE: more hashes, or tokens, than a sequence can have. result
// may be NULL.
ICE_CHECKED ice_status ice_sequence_seal(ice_sequence *sequence, const void *hashes, size_t count, uint64_t deadline_us,
                                         struct ice_seal_result *result);

// How many tokens a sequence of these options that begins with the blocks hashes[count][ICE_HASH_BYTES] (copied) could
// be attached to now: *tokens_out is a multiple of block_tokens, 0 where no sealed prefix begins like this. Holds
// nothing: the prefix may be removed before the attach. Of the options, softmax_scale, anchor_layers and max_tokens do
// not count, but must be valid. Where the daemon has no disk, ICE_DISK_FAILED.
ICE_CHECKED ice_status ice_prefix_lookup(ice_client *client, const struct ice_sequence_options *options,
                                         const void *hashes, size_t count, uint64_t deadline_us, uint64_t *tokens_out);

// The same for a group of options->tp_size tensor-parallel ranks of one shape: how many tokens every rank could be
// attached to now. options->tp_rank does not count, so any one rank may ask for all. The ranks then attach with
// *tokens_out as tokens_max, so that all of them go on from the same position. At most 1024 ranks.
ICE_CHECKED ice_status ice_prefix_lookup_group(ice_client *client, const struct ice_sequence_options *options,
                                               const void *hashes, size_t count, uint64_t deadline_us,
                                               uint64_t *tokens_out);

// Opens a sequence that begins with the longest sealed prefix that matches the blocks hashes[count][ICE_HASH_BYTES]
// (copied), or with the part of it that tokens_max tokens allow, rounded down to whole blocks (0: no limit). From then
// on it is a sequence as ice_sequence_open makes them: all its layers have *tokens_out tokens (may be NULL), which can
// be retrieved and read, and it goes on with ice_append at position *tokens_out. What is appended stays its own; the
// prefix is not copied and lives, removed or not, until no sequence is attached to it. deadline_us 0 is the client's
// default, but at least a minute. ICE_UNKNOWN_PREFIX: no sealed prefix begins like this; open a sequence and append the
// tokens instead. ICE_DISK_FAILED: the daemon has no disk, or it has failed. ICE_INDEX_FULL: no memory for the
// sequence. Its trees are read behind the call: what the disk has lost of them, or has no memory, is told to the
// request that needs it (ICE_PAGE_LOST, ICE_INDEX_FULL). *out is the caller's until ice_sequence_close, written on
// success only.
ICE_CHECKED ice_status ice_sequence_attach(ice_client *client, const struct ice_sequence_options *options,
                                           const void *hashes, size_t count, uint64_t tokens_max, uint64_t deadline_us,
                                           ice_sequence **out, uint64_t *tokens_out);

// Forgets a sealed prefix, and returns when neither a crash nor a power failure can bring it back. Its room on the disk
// is free again when no sequence is attached to it any more. After ICE_TIMEOUT it is still on its way out.
// ICE_UNKNOWN_PREFIX: there is none of this id. ICE_DISK_FAILED: the disk does not let it go; it is not found any more,
// but may be back after a restart. Removing it again tries again. The prefix must be of the client's namespace, or of
// "default" where the client has none; ice_prefix_remove_from is for prefixes of another one (NULL: the same).
ICE_CHECKED ice_status ice_prefix_remove(ice_client *client, uint64_t prefix_id, uint64_t deadline_us);
ICE_CHECKED ice_status ice_prefix_remove_from(ice_client *client, const char *name_space, uint64_t prefix_id,
                                              uint64_t deadline_us);

// ---- retrieve ----

enum ice_granularity { ICE_TOKEN_WISE = 0, ICE_PAGE_WISE = 1 };

// One layer of one or several sequences of one client and one shape.
struct ice_retrieve_options {
    ice_landing *landing;
    uint32_t layer;
    uint32_t sequence_count;
    ice_sequence *const *sequences; // [sequence_count]
    const uint32_t *rows;           // [sequence_count] landing row of each
    const uint64_t *first_queries;  // [sequence_count] position of the first query
    uint32_t queries;               // consecutive query positions per sequence; 0: 1
    const void *query_vectors;      // [sequence, query, query_head, head_dim], contiguous, after RoPE, unscaled;
                                    // not looked at where the layer follows another
    ice_dtype query_dtype;
    const void *keys, *values; // NULL, or [sequence, query, kv_head, head_dim] in the sequence's dtype: appended first
    uint32_t budget;           // tokens per KV head, at least 1
    uint32_t keep;             // of them, so many of the last selection stay selected: see below; 0: none
    uint32_t sinks, window;    // ICE_DEFAULT_SINKS / ICE_DEFAULT_WINDOW are the usual choice; 0: none
    bool worker_holds_ends;    // sinks and window are not sent; together at most 16384 then (ICE_TOO_LARGE)
    bool resend;               // send all again, in ascending order of positions: see below
    float coverage;            // 0, or stop once this share of the attention mass is reached
    enum ice_granularity granularity;
    uint64_t deadline_us;
};
#define ICE_DEFAULT_SINKS  16u
#define ICE_DEFAULT_WINDOW 64u

struct ice_retrieve_result {
    bool partial;             // the deadline cut the search short, or came before it (masses are 0 then)
    uint32_t head_count;      // sequence_count x kv_heads, the length of the arrays below, sequences outermost
    const uint32_t *counts;   // slots filled
    const uint32_t *changed;  // of them, those whose token was in none of the cell's slots before: the turnover
    const float *masses;      // estimated share of the attention that is covered
    const uint64_t *indexed;  // as ice_sequence_info says it, at the time
    const uint64_t *versions; // tree versions
    uint64_t bytes_moved;
    // Spent in the daemon; fetch_us: waiting for pages from its disk.
    uint32_t queue_us, search_us, fetch_us, copy_us;
};

// Layer reuse: a layer that follows an anchor layer has no tree and is not searched. Its retrieve, without
// query_vectors but with all else, puts this layer's K and V of the tokens into the row that the row's last retrieve of
// the anchor has selected there, and its own sinks and window. ICE_INVALID_ARGUMENT where there was none of this
// sequence, ICE_TOO_LARGE where those are more than the budget.
//
// Step reuse: a token that its row's last retrieve of this layer has put into a slot stays there, and only the others
// are copied (to a GPU all of them, where whole blocks are sent); bytes_moved counts what is. So the slots of a cell
// are in no order (but where all tokens of the sequence are asked for, slot i holds position i), and a worker must not
// write to a landing. One that has done so says `resend`.
//
// keep: so many tokens of the cell's last selection of this sequence, those of the highest mass then, stay selected,
// but for those that sinks and window cover by now; the rest of the budget goes to the best others. So a step moves at
// most budget - keep tokens of each head beside what enters the window. keep = budget keeps the whole selection, and
// where that fills the budget nothing is searched: search_us is near 0, masses, indexed and versions are those of the
// last search, and what leaves the window is dropped. Where the budget holds all tokens, all are selected. Not with
// ICE_PAGE_WISE (ICE_NOT_SUPPORTED), not above the budget (ICE_INVALID_ARGUMENT); a layer that follows an anchor takes
// the anchor's selection, whatever its own keep.
//
// After an error the cells of this layer in the rows named are
// undefined (other layers' are not touched). Blocking: submit and wait. result (may be NULL) is filled on success; its
// arrays are borrowed until this thread's next call of ice_retrieve.
ICE_CHECKED ice_status ice_retrieve(ice_client *client, const struct ice_retrieve_options *options,
                                    struct ice_retrieve_result *result);

// The same with query_vectors, keys and values in GPU memory, all on the GPU of the landing (of one GPU where the
// landing is in host memory). The library copies them on `stream` (a CUstream or cudaStream_t of the memory's context;
// NULL: the default stream), so behind whatever has been issued there, waits for the copies (spinning at first), and
// sends the request: the memory may be used again when the call, also ice_retrieve_submit_gpu, returns. The copies and
// their wait are within the deadline: ICE_TIMEOUT where the stream does not get there, and nothing was sent.
// ICE_NOT_SUPPORTED: the stream is being captured into a CUDA graph. ICE_INVALID_ARGUMENT names the address that is not
// on the GPU.
ICE_CHECKED ice_status ice_retrieve_gpu(ice_client *client, const struct ice_retrieve_options *options, void *stream,
                                        struct ice_retrieve_result *result);
ICE_CHECKED ice_status ice_retrieve_submit_gpu(ice_client *client, const struct ice_retrieve_options *options,
                                               void *stream, ice_ticket **out);

// The rows belong to the daemon from submit until the reply has come (by pull: until the copies have ended, too), also
// after a time-out: until then submits to them
// answer ICE_BUSY. All memory in options is copied. *out is owned by the caller until ice_ticket_close. A client has at
// most 256 requests in flight, fewer where the daemon's --inflight-max is smaller; more answer ICE_QUEUE_FULL.
// Returns when the request is sent, so that it needs no further call to reach the daemon. A request larger than the
// session's ring (--ring-bytes) is sent as the daemon takes it; where it takes nothing for a second, or the deadline
// passes first, the ticket is there all the same, and the rest is sent in later calls of the client, such as
// ice_retrieve_wait.
ICE_CHECKED ice_status ice_retrieve_submit(ice_client *client, const struct ice_retrieve_options *options,
                                           ice_ticket **out);
// Waits until the reply or the time-out. ICE_TIMEOUT: the ticket stays open and may be waited for again; a reply that
// is here is found with any deadline. result's arrays are borrowed until ice_ticket_close.
ICE_CHECKED ice_status ice_retrieve_wait(ice_ticket *ticket, uint64_t deadline_us, struct ice_retrieve_result *result);
// Waiting on the GPU's side, for landings in GPU memory: what is issued in `stream` (a CUstream or cudaStream_t of the
// landing's context; NULL: the default stream) after this call begins when the selection is in the landing. The CPU
// does not wait: submit, this call, the kernels that read the landing, in any number of rows and layers.
//
// pull: the library issues the copies of the ticket's rows in the stream, behind the wait; they are the landing's from
// there on in stream order, for other streams behind an event or ice_retrieve_wait. The rows are free for the next
// submit (ICE_BUSY before) when the stream has passed the copies and the daemon has answered, whether or not the ticket
// is still open. push: the rows are free when the daemon has answered.
//
// A stream never waits for longer than the ticket's deadline (that of its submit), nor for a request that has failed,
// nor for a daemon that has died: then it goes on, and what it finds in the ticket's cells is not the selection. So
// ice_retrieve_wait must be called before results of that work are trusted, at the latest when they are used; it is ok
// only where the stream has waited for the selection. It gives the request's error where that failed, ICE_TIMEOUT where
// the deadline passed first (for good, also where the selection has come since), ICE_DISCONNECTED where the session
// ended. For a pull it returns when the stream has passed the copies.
//
// Once for a ticket, in one stream; ICE_INVALID_ARGUMENT otherwise. Where the selection has been waited for already,
// nothing is issued; where ice_retrieve_wait has begun to copy, ICE_BUSY; where the deadline has passed, ICE_TIMEOUT.
// An error of the call leaves the stream and the ticket as they were, but for ICE_SYSTEM behind a driver's call that
// failed half-way: then ice_retrieve_wait fails too. ICE_NOT_SUPPORTED: the driver or the GPU cannot
// (cuStreamWaitValue64), the stream is being captured into a CUDA graph, or the landing is in host memory. A request
// that has been refused answers with its own error. Before ice_landing_close the streams that wait should have passed:
// it lets them go on without their selections, and waits for them another default deadline; the memory that a stream
// needs which has still not passed is never unmapped.
//
// CUDA graphs: a landing's address, and with it the addresses of all data, counts and positions, is the same for its
// life. So kernels that read counts, positions and slots can be captured once and replayed for each step, outside of
// the capture: submit, ice_ticket_stream_wait(ticket, stream), launch the graph in that stream.
ICE_CHECKED ice_status ice_ticket_stream_wait(ice_ticket *ticket, void *stream);

// Forgets the ticket (the rows stay busy until the daemon has answered, and what a stream copies has ended). Accepts
// NULL.
ICE_API void ice_ticket_close(ice_ticket *ticket);

// ---- hints ----

// Predicted queries of a retrieve to come: of a later layer, or of a sequence's next step.
struct ice_hint_options {
    uint32_t layer; // not one that follows an anchor layer (ICE_SHAPE_MISMATCH)
    uint32_t sequence_count;
    ice_sequence *const *sequences; // [sequence_count], of one shape
    uint32_t queries;               // query positions per sequence; 0: 1
    const void *query_vectors;      // [sequence, query, query_head, head_dim], contiguous, in host memory
    ice_dtype query_dtype;
    uint32_t budget, sinks, window; // as the retrieve will have them; sinks + window at most 16384
    uint64_t deadline_us;           // behind it the hint is of no use any more
};

struct ice_hint_result {
    uint64_t pages; // asked for: they were neither in memory nor on their way
    uint32_t lanes; // of sequence_count x kv_heads, that were searched: something of them is on the disk
};

// Brings what a retrieve with these queries would select now from the daemon's disk into its memory, so that the
// retrieve need not wait for it. It selects nothing, moves nothing to a landing and changes no answer. Where all of a
// lane is in memory, which is always so without a spill folder, nothing is searched. A sequence that sleeps begins to
// wake, and that is all.
//
// A hint gives way: it keeps no retrieve or append of its sequences waiting and is served behind decode work; its pages
// are read while the disk is not busy, and bring about that others leave memory. Of each lane the daemon counts how
// many of the pages that hints brought were asked for before they left again; below one in four it follows one hint in
// sixteen there, until it is more (icecachectl stats: hinted, hinted_used).
//
// result NULL: returns when the hint is sent (as ice_retrieve_submit says it), and whatever the daemon answers is
// dropped; it is in flight until then (ICE_QUEUE_FULL). Otherwise waits for the answer, which comes when the reads have
// been asked for, not when they have ended.
// Hints have no order with other requests of the client.
ICE_CHECKED ice_status ice_hint(ice_client *client, const struct ice_hint_options *options,
                                struct ice_hint_result *result);

#ifdef __cplusplus
}
#endif

#endif
