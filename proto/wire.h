// Encoding and decoding of messages: caps first, then protobuf into a bounded arena, then every field's range.
// What wire_*_decode accepts needs no further check of sizes or enums; only what depends on the daemon's state
// (does the sequence exist, do the shapes match) is left to the caller.
#ifndef ICECACHE_PROTO_WIRE_H
#define ICECACHE_PROTO_WIRE_H

#include "proto/icecache.pb-c.h"
#include "proto/status.h"

#include <stddef.h>
#include <stdint.h>

// Bump allocator for one request; refuses (NULL) beyond its size. The memory is the caller's.
struct wire_arena {
    uint8_t *memory;
    size_t capacity_bytes, used_bytes;
};
void wire_arena_init(struct wire_arena *arena, void *memory, size_t bytes);
void wire_arena_reset(struct wire_arena *arena);

// Why a message was refused. text is empty or says which field is wrong and what to do.
struct wire_error {
    ice_status status;
    char text[256];
};
void wire_error_set(struct wire_error *error, ice_status status, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

// Decodes and validates frame 1 of a request. *out lives in the arena (borrowed until its reset). A wrong protocol
// version, a missing body, an unknown enum, a count over its limit: each has its status and text. request_id_out gets
// the request's id also when the rest is refused (0 where it cannot be read), so that the reply finds its caller. In a
// SequenceOpen, also that of a Lookup or an Attach (never NULL then), the defaults are filled in: name_space "default",
// tp_size 1, block_tokens 16 (softmax_scale stays 0).
ICE_MUST_CHECK ice_status wire_request_decode(const void *bytes, size_t size, struct wire_arena *arena,
                                              Icecache__Wire__Request **out, uint64_t *request_id_out,
                                              struct wire_error *error);
ICE_MUST_CHECK ice_status wire_control_request_decode(const void *bytes, size_t size, struct wire_arena *arena,
                                                      Icecache__Wire__ControlRequest **out, uint64_t *request_id_out,
                                                      struct wire_error *error);

// For clients: replies come from the daemon, which is trusted, but a truncated or garbled one must not crash either.
// *out is heap memory: free with icecache__wire__reply__free_unpacked(x, NULL). Checks that parallel arrays agree
// and that tokens and lists are within their limits.
ICE_MUST_CHECK ice_status wire_reply_decode(const void *bytes, size_t size, Icecache__Wire__Reply **out);
ICE_MUST_CHECK ice_status wire_control_reply_decode(const void *bytes, size_t size, Icecache__Wire__ControlReply **out);

// Bytes of frame 2 that a valid Retrieve or Hint asks for, given the sequence's shape. 0 is never a valid answer:
// something is out of range. The answer may exceed WIRE_VECTORS_BYTES_MAX; frame 2 itself never does.
struct wire_shape {
    uint32_t layers, kv_heads, query_heads, head_dim;
    uint32_t dtype;
};
uint64_t wire_retrieve_query_bytes(const Icecache__Wire__Retrieve *retrieve, const struct wire_shape *shape);
uint64_t wire_retrieve_vectors_bytes(const Icecache__Wire__Retrieve *retrieve, const struct wire_shape *shape);
uint64_t wire_hint_vectors_bytes(const Icecache__Wire__Hint *hint, const struct wire_shape *shape);

// Frame 2 of a Seal, Lookup or Attach (0 bytes where there is none): how many hashes of blocks of block_tokens tokens
// it holds. They are 1 to WIRE_BLOCKS_MAX, and their tokens at most WIRE_TOKENS_MAX.
ICE_MUST_CHECK ice_status wire_hashes_check(size_t bytes, uint32_t block_tokens, uint32_t *count_out,
                                            struct wire_error *error);

#endif
