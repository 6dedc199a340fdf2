// A sequence: identity, shape, its chain of stems, and the order of the requests on it.
//
// The reactor owns all of it; shards read the chain while a request is on it. Requests on a sequence are admitted in
// the order in which they came; beside whom each may work its mode says.
#ifndef ICECACHE_CACHED_SEQUENCE_H
#define ICECACHE_CACHED_SEQUENCE_H

#include "cached/completion.h"
#include "cached/prefix.h"
#include "cached/stem.h"
#include "cached/tenant.h"
#include "index/index.h"
#include "proto/limits.h"
#include "proto/wire.h"

// Stems of a chain, the sequence's own included: so many parts has a search at most.
#define SEQUENCE_STEMS_MAX INDEX_PARTS_MAX

struct op;
struct server;
struct session;

// Beside whom an operation may work on a sequence. A hint looks at the lanes within one task of their shards and at no
// lengths, so it minds neither readers nor appends.
enum admission_mode {
    ADMIT_READ,   // others that read, and hints
    ADMIT_APPEND, // hints
    ADMIT_ALONE,  // nobody: the chain of stems, or where its lanes are, changes
    ADMIT_HINT,   // all but those that must be alone
};

// One request's place in a sequence's order.
struct admission {
    struct op *op;
    struct sequence *sequence;
    struct admission *next; // among the waiting
    enum admission_mode mode;
};

// What a sequence sees of a stem: positions stem->first .. end-1.
struct sequence_part {
    struct stem *stem;
    uint64_t end;
};

struct sequence {
    // Immutable.
    uint64_t id;
    struct server *server;
    struct session *session;
    struct tenant *tenant;           // its namespace, which counts what it takes
    struct prefix_identity identity; // namespace, model, ranks, shape as a sealed prefix has them
    struct wire_shape shape;
    float scale;
    uint64_t tokens_max;
    size_t row_bytes; // one K or V row
    size_t bytes;     // of this allocation

    // The reactor changes them while no other request is on the sequence.
    struct sequence_part chain[SEQUENCE_STEMS_MAX - 1]; // contiguous, from position 0 on
    uint32_t chain_count;
    struct stem *own; // behind them

    // Reactor only.
    uint64_t *lengths; // per layer, what has been committed
    uint64_t binding;  // what landings' rows are bound to: another one after a truncation
    bool closing;
    uint32_t leaving;        // stems that are being destroyed for it
    uint32_t readers, hints; // at work, as the next two
    bool writer;             // an append, or who is
    bool is_alone;
    struct admission *waiting, *waiting_tail;
    uint64_t retrieves, appended_tokens;
    struct sequence *hash_next, *session_next;
    struct prefix *prefix; // that it was attached to; NULL: none
    struct op *close_op;   // made with the sequence, so that closing never needs memory
    uint64_t opened_ns;
};

// The stems of the chain one by one, the own one last.
static inline struct stem *sequence_stem(const struct sequence *sequence, uint32_t i)
{
    return i < sequence->chain_count ? sequence->chain[i].stem : sequence->own;
}

// Where what the sequence sees of stem i ends.
static inline uint64_t sequence_stem_end(const struct sequence *sequence, uint32_t i)
{
    return i < sequence->chain_count ? sequence->chain[i].end : UINT64_MAX;
}

// Which stem a position lies in. From the end on: most are in the last ones.
static inline uint32_t sequence_stem_number(const struct sequence *sequence, uint64_t position)
{
    uint32_t i = sequence->chain_count;
    while (sequence_stem(sequence, i)->first > position)
        i--;
    return i;
}

static inline struct stem *sequence_stem_at(const struct sequence *sequence, uint64_t position)
{
    return sequence_stem(sequence, sequence_stem_number(sequence, position));
}

// The lane that is appended to.
static inline struct lane *sequence_lane(const struct sequence *sequence, uint32_t layer, uint32_t kv_head)
{
    return stem_lane(sequence->own, layer, kv_head);
}

// Does the layer take the selections of another one?
static inline bool sequence_follows(const struct sequence *sequence, uint32_t layer)
{
    return stem_lane(sequence->own, layer, 0)->anchor != layer;
}

// Makes a sequence for a validated message and links it to the session and the server. ICE_LIMIT, ICE_QUOTA,
// ICE_INDEX_FULL, ICE_NO_MEMORY; text (TENANT_TEXT_BYTES) says more, or is left as it is.
ICE_MUST_CHECK ice_status sequence_open(struct server *server, struct session *session,
                                        const Icecache__Wire__SequenceOpen *message, char *text, struct sequence **out);
// The same, beginning with the first `tokens` of a sealed prefix.
ICE_MUST_CHECK ice_status sequence_attach(struct server *server, struct session *session,
                                          const Icecache__Wire__SequenceOpen *message, struct prefix *prefix,
                                          uint64_t tokens, char *text, struct sequence **out);
// A sequence that begins with the first `tokens` of another one, on which no other request is; they are not more than
// the shortest layer has, and where the other one's own stem has some of them, its layers are equally long. ICE_LIMIT
// also where the chain is too long.
ICE_MUST_CHECK ice_status sequence_fork(struct sequence *parent, uint64_t tokens, char *text, struct sequence **out);
// What lies behind the first `tokens`, which begin before the own stem, goes. ICE_INDEX_FULL, ICE_NO_MEMORY: nothing
// has changed.
ICE_MUST_CHECK ice_status sequence_cut(struct sequence *sequence, uint64_t tokens);
// The own stem, which has tokens, becomes one that others can share; behind it there is a new one. All layers are
// equally long. ICE_LIMIT: the chain is too long; ICE_INDEX_FULL, ICE_NO_MEMORY; nothing has changed then.
ICE_MUST_CHECK ice_status sequence_share_own(struct sequence *sequence);
// NULL where the session has no such sequence, or it is being closed.
struct sequence *sequence_find(struct server *server, const struct session *session, uint64_t id);
// Lets go of all its stems; the sequence frees itself when those that nobody else holds are gone, then calls back.
void sequence_leave_stems(struct sequence *sequence);
void sequence_stem_gone(struct sequence *sequence); // one of them is

uint64_t sequence_length(const struct sequence *sequence, uint32_t layer, uint32_t layers); // shortest of the layers
bool sequence_is_even(const struct sequence *sequence);                                     // all layers equally long
// Positions below it need no clustering any more (smallest over the heads), but for a page at the end of each stem.
uint64_t sequence_indexed(const struct sequence *sequence, uint32_t layer);

// What all its stems have.
struct sequence_usage {
    uint64_t pages, pool_bytes, index_bytes, build_ns;
    uint64_t shared_tokens; // before the own stem
    uint32_t lanes_due;
};
void sequence_usage(const struct sequence *sequence, struct sequence_usage *out);

#endif
