// The daemon's shards without threads: real lanes, trees, pool, extents, images and operations, over a clock and a disk
// that the test moves. The test is the reactor: it admits requests, takes their ends, and knows what every sequence
// must hold.
#ifndef ICECACHE_TEST_SIM_WORLD_H
#define ICECACHE_TEST_SIM_WORLD_H

// clang-format off
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <cmocka.h>
// clang-format on
#include "cached/gather.h"
#include "cached/server.h"
#include "gpu/store.h"
#include "proto/dtype.h"
#include "sim_disk.h"

#define WORLD_SEQUENCES 6u
#define WORLD_HEADS     2u // KV heads of the one layer: lanes of a sequence
#define WORLD_SHARDS    2u
#define WORLD_SEALS     3u
#define WORLD_OPS       12u
#define WORLD_CHAIN     8u // stems of a sequence that is forked
#define WORLD_STEMS     256u
#define WORLD_TOKENS    1600u
#define WORLD_HOGS      1024u

struct rng {
    uint64_t state;
};

static inline uint64_t rng_next(struct rng *rng)
{
    uint64_t x = (rng->state += 0x9e3779b97f4a7c15u);
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

static inline uint32_t rng_below(struct rng *rng, uint32_t bound)
{
    return (uint32_t)(rng_next(rng) % bound);
}

static inline bool rng_chance(struct rng *rng, uint32_t in)
{
    return rng_below(rng, in) == 0;
}

struct seal {
    struct prefix *prefix; // NULL: not in use
    uint32_t head_dim;
    uint64_t tokens;
    uint8_t *keys, *values; // [head][WORLD_TOKENS] rows
};

struct member { // a sequence
    bool open, closing, writer, is_alone;
    uint32_t readers, hints;
    struct sequence *sequence;
    uint64_t promised_to; // of an append in parts under way: its end; 0: none
    uint8_t *keys, *values;
};

struct work { // an operation
    bool used;
    struct op op;
    struct admission admission;
    struct op_lane lanes[WORLD_HEADS * (WORLD_CHAIN + 1)];
    struct member *member;
    struct session session; // its staging
    struct landing landing;
    uint32_t rows[1];
    uint64_t first_queries[1];
    uint8_t *staging, *slots; // slots: [head][K, V][WORLD_TOKENS] rows
    uint32_t *positions;      // [head][WORLD_TOKENS]
    uint32_t counts[WORLD_HEADS];
    struct records records; // of what the slots hold
    uint64_t records_of;    // binding of the sequence
    uint64_t length;        // what the sequence held when it began
};

struct world_shape {
    uint32_t shards, page_tokens, slabs;
    uint32_t frames; // of the smaller size, that are left of the first slab; 0: all
    uint64_t spill_bytes, index_bytes;
    uint32_t head_dims[2];              // of sequences; equal: one size of pages
    uint32_t read_faults, write_faults; // one in so many; 0: none
    bool patient;                       // the clock makes no leaps: no deadline of an append or a read may pass
};

// What the schedules have come to, in states between two steps.
struct seen {
    uint64_t plans_reading;    // a page of a lane is read whose plan is carried out
    uint64_t plans_spilling;   // a page is being written that a plan has changed
    uint64_t appends_spilling; // that an append has changed
    uint64_t gathers_spilling; // that belongs to a lane of which a selection waits
    uint64_t drops_reading;    // a page was dropped while it was read
    uint64_t drops_writing;
    uint64_t slabs_given_up;
    uint64_t shared_building; // a stem of several sequences has a plan carried out
    uint64_t shared_asleep;
};

struct world {
    struct world_shape shape;
    struct rng rng;
    struct env env;
    struct config config;
    struct server server;
    struct shard shards[WORLD_SHARDS];
    struct sim_disk disk;
    struct member members[WORLD_SEQUENCES];
    struct seal seals[WORLD_SEALS];
    struct work works[WORLD_OPS];
    struct session session;          // of all sequences
    struct stem *stems[WORLD_STEMS]; // all that there are
    uint32_t stem_count;
    void *hogs[WORLD_HOGS];
    uint32_t hog_count;
    struct seen seen;
    uint64_t steps, ended, failed, partial, lost, next_content;
    uint64_t kinds[OP_HINT + 1]; // ended well
};

extern uint64_t world_now_ns;

void world_init(struct world *world, const struct world_shape *shape, uint64_t seed);
void world_fini(struct world *world);
// seal: NULL, or what it is attached to with so many tokens.
void world_open(struct world *world, struct member *member, struct seal *seal, uint64_t tokens);
// Where the parent admits it.
void world_fork(struct world *world, struct member *parent, struct member *child, uint64_t tokens);
void world_close(struct world *world, struct member *member);
void world_unseal(struct world *world, struct seal *seal);
// Begins a request where the member admits it. The kinds choose their arguments at random.
void world_request(struct world *world, struct member *member, enum op_kind kind);
// Its arguments (requests.c). False: there is nothing that it could ask for.
bool request_fill(struct world *world, struct work *work, enum op_kind kind);
struct seal *seal_free(struct world *world); // NULL: none
void member_give_up_promise(struct member *member);
void world_take_ends(struct world *world);
bool world_is_idle(const struct world *world); // no request, no closing
// Looks at every invariant (check.c).
void world_check(struct world *world);

static inline size_t member_row_bytes(const struct member *member)
{
    return member->sequence->row_bytes;
}

// Where a row of the model lies in one of the arrays [head][WORLD_TOKENS].
static inline uint8_t *model_row(uint8_t *rows, const struct member *member, uint32_t head, uint64_t position)
{
    return rows + ((uint64_t)head * WORLD_TOKENS + position) * member_row_bytes(member);
}

static inline uint64_t member_length(const struct member *member)
{
    return member->sequence->lengths[0];
}

#endif
