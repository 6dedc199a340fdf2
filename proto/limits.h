// Limits of the protocol. What exceeds one is refused with ICE_TOO_LARGE or ICE_LIMIT and the limit's name.
#ifndef ICECACHE_PROTO_LIMITS_H
#define ICECACHE_PROTO_LIMITS_H

// Counted up when a message of a released version would be taken for another. A body that a daemon does not know is
// refused by name (ICE_BAD_MESSAGE) whatever the version.
#define WIRE_PROTOCOL_VERSION           1u

#define WIRE_HEADER_BYTES_MAX           (64u << 10)  // frame 1 of a request
#define WIRE_REPLY_BYTES_MAX            (16u << 20)  // frame 1 of a reply
#define WIRE_VECTORS_BYTES_MAX          (16u << 20)  // frame 2
#define WIRE_ARENA_BYTES_MAX            (256u << 10) // memory for decoding one request
#define WIRE_CONTROL_BYTES_MAX          (4u << 10)   // one packet on the control socket
#define WIRE_DESCRIPTORS_MAX            128u         // beside one packet: pieces of a worker's GPU memory
#define WIRE_FRAMES_MAX                 2u           // frames of a message, routing id not counted
#define WIRE_SHARED_BYTES_MAX           (1ull << 46) // one landing or staging area, and offsets into it

#define WIRE_LAYERS_MAX                 512u
#define WIRE_KV_HEADS_MAX               256u
#define WIRE_QUERY_HEADS_MAX            1024u
#define WIRE_LANES_MAX                  16384u // layers x KV heads of a sequence
#define WIRE_GROUP_MAX                  64u    // query heads per KV head
#define WIRE_HEAD_DIM_MAX               256u   // a multiple of 16
#define WIRE_HEAD_DIM_STEP              16u
#define WIRE_TOKENS_MAX                 (1u << 24) // positions of a sequence
#define WIRE_BLOCK_TOKENS_MAX           4096u
#define WIRE_BLOCK_TOKENS_DEFAULT       16u
#define WIRE_RANKS_MAX                  1024u      // tp_size of a lookup for all ranks
#define WIRE_HASH_BYTES                 16u        // of one block of a prefix
#define WIRE_BLOCKS_MAX                 (1u << 20) // hashes in one message; they fill frame 2
#define WIRE_SEQUENCES_PER_RETRIEVE_MAX 256u
#define WIRE_QUERIES_MAX                256u       // query positions per sequence of a retrieve
#define WIRE_ENDS_MAX                   (1u << 14) // sinks and window together, where no landing bounds them
#define WIRE_SLOTS_MAX                  (1u << 24) // slots of a landing per row, layer and head
#define WIRE_ROWS_MAX                   4096u
#define WIRE_SESSION_TOKEN_BYTES        16u
#define WIRE_NAME_BYTES_MAX             128u // client names, namespaces
#define WIRE_NAME_SPACE_DEFAULT         "default"
#define WIRE_DIGEST_BYTES_MAX           64u
#define WIRE_GPU_UUID_BYTES             16u
#define WIRE_GPU_HANDLE_BYTES           64u
#define WIRE_GPU_PROBE_BYTES            128u
#define WIRE_DEADLINE_US_MAX            (600u * 1000u * 1000u)
#define WIRE_TEXT_BYTES_MAX             512u // error text in a reply
#define WIRE_STATS_SEQUENCES_MAX        256u // sequences listed per stats reply
#define WIRE_STATS_GPUS_MAX             16u  // GPUs
#define WIRE_STATS_COUNTS_MAX           64u  // counters
#define WIRE_PREFIXES_LISTED_MAX        256u // prefixes per reply to a PrefixList
#define WIRE_LEASES_LISTED_MAX          256u // leases per reply to a LeaseList
#define WIRE_NAMESPACES_LISTED_MAX      256u // namespaces per reply to a NamespaceList

#endif
