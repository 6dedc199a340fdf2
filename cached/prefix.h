// Sealed prefixes: the first tokens of a sequence, whole blocks of them, on stable storage with their trees. They are
// listed after a restart, a crash or a power failure, and a new sequence can begin attached to one, without clustering.
//
// A prefix is the images of its lanes (image.h) and a manifest, a small file in the spill folder, which is written
// last, synced and renamed into its place: what has a manifest is whole. What the manifest names in the spill file is
// not written to again until the manifest is gone, and that has been synced too.
//
// Named by the chain of its blocks' hashes within namespace, model, ranks and shape. All of it belongs to the reactor;
// the keeper writes and removes manifests.
#ifndef ICECACHE_CACHED_PREFIX_H
#define ICECACHE_CACHED_PREFIX_H

#include "cached/completion.h"
#include "cached/disk.h"
#include "cached/image.h"
#include "cached/task_queue.h"
#include "proto/limits.h"
#include "proto/wire.h"

#define PREFIX_BUCKETS     1024u
#define PREFIX_SUFFIX      ".seal"
#define PREFIX_NAME_BYTES  32u
#define PREFIX_BLOCK_BYTES 16u // of a hash

struct op;
struct prefix_waiter; // who asked for a prefix to be removed (op_prefix.c)
struct sequence;
struct server;
struct stem;
struct tenant;

// What two sequences must have in common. All bytes are defined, so that it can be compared and hashed as bytes.
struct prefix_identity {
    char name_space[WIRE_NAME_BYTES_MAX + 1];
    uint8_t model_digest[WIRE_DIGEST_BYTES_MAX];
    uint8_t model_digest_bytes, padding[2];
    uint32_t tp_rank, tp_size, block_tokens;
    uint32_t layers, kv_heads, query_heads, head_dim, dtype;
    uint32_t page_tokens;
};

// Tokens of a prefix that lie in stems of their own.
struct prefix_part {
    uint64_t first, end;
    struct image **images;         // [layer][kv_head], held; they may have more tokens than are sealed
    struct stem *stem;             // that is these tokens in memory, while somebody has it; NULL: none
    struct prefix_part *next_same; // another one that this stem is
};

struct prefix {
    uint64_t id;
    struct prefix_identity identity;
    uint64_t seed;                         // of its trees
    uint64_t root;                         // of stems made of it
    uint32_t block_count;                  // tokens: block_count x identity.block_tokens
    uint8_t (*hashes)[PREFIX_BLOCK_BYTES]; // [block_count]
    uint32_t lane_count;
    uint32_t part_count;
    struct prefix_part *parts;   // contiguous, from position 0 on
    struct image **images;       // of all parts
    size_t memory_bytes;         // of this allocation, without the images
    uint32_t attached;           // sequences, and their forks
    bool listed;                 // in the registry
    bool removing;               // its manifest is on its way out
    bool unlinked;               // its manifest is gone for good
    uint64_t listed_ns, used_ns; // since when it is found; when a sequence last began with it, or left it
    struct tenant *tenant;       // its namespace, while it is counted there
    uint64_t counted_index_bytes, counted_disk_bytes;
    uint64_t owner_id; // the session that sealed it, 0: found at the start
    pid_t owner_pid;
    char owner[WIRE_NAME_BYTES_MAX + 1];
    struct prefix *next; // in its bucket, or among the unlisted
    struct prefix_waiter *waiters;
    struct server *server;
    struct op *op;     // the sealing that made it, until it is answered
    ice_status status; // of the keeper's work
    struct disk_request sync;
    struct task task;
    struct completion completion;
};

struct prefixes {
    struct prefix *buckets[PREFIX_BUCKETS]; // by identity and first hash
    struct prefix *unlisted;                // nobody finds them, but their manifest, or who is attached, is still there
    uint32_t count;
    uint32_t removing; // whose manifest is on its way out
    uint64_t evicted, expired;
};

// Start-up: finds what was sealed, takes its extents, removes manifests that are not whole. False: no memory, logged.
ICE_MUST_CHECK bool prefixes_load(struct server *server);
void prefixes_fini(struct server *server);

void prefix_identity_of(struct server *server, const Icecache__Wire__SequenceOpen *message,
                        struct prefix_identity *out);
// The prefix that shares most blocks with the hashes, and how many; NULL: none shares one.
struct prefix *prefix_find(struct server *server, const struct prefix_identity *identity,
                           const uint8_t (*hashes)[PREFIX_BLOCK_BYTES], uint32_t count, uint32_t *blocks);
// Also one that is not listed any more and whose manifest is not known to be gone.
struct prefix *prefix_by_id(struct server *server, uint64_t id);
uint64_t prefix_tokens(const struct prefix *prefix);
uint64_t prefix_disk_bytes(const struct prefix *prefix);

// Room for a prefix that a sealing will fill. NULL: none.
struct prefix *prefix_create(struct server *server, const struct prefix_identity *identity, uint32_t lane_count,
                             uint32_t part_count, uint32_t block_count);
static inline uint32_t prefix_image_count(const struct prefix *prefix)
{
    return prefix->part_count * prefix->lane_count;
}
// Gives back what it holds, the images too. Not while it has a manifest.
void prefix_destroy(struct prefix *prefix);
// Its manifest may or may not be there: removes it, then all of it.
void prefix_abandon(struct prefix *prefix);
// Syncs the spill file, writes the manifest, then calls `completion` with status set.
void prefix_write(struct prefix *prefix);
void prefix_list_add(struct prefix *prefix);
// Not found any more from now on; the manifest goes, then, when no sequence is attached, all of it. Where that has
// failed before it is tried again. When the manifest is gone for good, or cannot be removed, prefix_removed is called.
void prefix_remove(struct prefix *prefix);
void prefix_removed(struct prefix *prefix, ice_status status); // op_prefix.c: answers the waiters
// Why nothing can be sealed or attached to; static.
const char *prefix_disk_text(const struct server *server);
void prefix_attach(struct prefix *prefix, struct sequence *sequence);
// From now on whoever is attached to the part shares the stem, until it goes.
void prefix_know_stem(struct prefix_part *part, struct stem *stem);
void prefix_forget_stem(struct stem *stem);
void prefix_detach(struct prefix *prefix);

// Eviction, expiry and the count of a namespace (prefix_evict.c).
// Removes one that no sequence is attached to, of this namespace (NULL: of any): the one that costs most room for what
// it saves. False: none.
bool prefix_evict(struct server *server, const struct tenant *tenant);
// Removes those that nobody has used for --prefix-ttl-s.
void prefix_expire(struct server *server, uint64_t now_ns);
void prefix_touch(struct prefix *prefix); // it is used
void prefix_count(struct prefix *prefix); // in its namespace; it holds all that it will hold
void prefix_uncount(struct prefix *prefix);
// What it costs to compute such a prefix again, in multiplications of the model's layers on this rank.
double prefix_rebuild_cost(const struct prefix_identity *identity, uint64_t tokens);
// The higher, the sooner it goes.
double prefix_evict_score(const struct prefix *prefix, uint64_t now_ns);

#endif
