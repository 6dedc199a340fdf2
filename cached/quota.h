// What a stem takes, counted for itself and for its namespace, and what a sequence may take. The counting is for any
// thread that owns what it counts, the rest is the reactor's. All counting of pages and trees is done here: what
// several sequences share is counted once.
#ifndef ICECACHE_CACHED_QUOTA_H
#define ICECACHE_CACHED_QUOTA_H

#include "cached/image.h"
#include "cached/sequence.h"

// Memory of trees, taken or, below 0, given back.
static inline void quota_count_index(struct stem *stem, int64_t bytes)
{
    atomic_fetch_add_explicit(&stem->index_bytes, (uint64_t)bytes, memory_order_relaxed);
    tenant_add_index(stem->tenant, bytes);
}

// Pages, wherever they are. Those that came with a sealed prefix count too.
void quota_count_pages(struct stem *stem, int64_t pages);

// Pages in memory.
static inline void quota_count_resident(struct stem *stem, int64_t pages)
{
    atomic_fetch_add_explicit(&stem->resident, (uint64_t)pages, memory_order_relaxed);
    tenant_add_ram(stem->tenant, pages * (int64_t)stem->frame_bytes);
}

// The image that a lane sleeps in, with what it has beside its pages: sign 1, or -1 when it goes.
void quota_count_image(struct stem *stem, const struct image *image, int sign);

// May the sequence have so many more tokens in so many layers? ICE_QUOTA and its text (TENANT_TEXT_BYTES) where not.
// promise: room for them is kept until stem_unreserve.
ICE_MUST_CHECK ice_status quota_may_append(struct sequence *sequence, uint32_t layers, uint64_t tokens, bool promise,
                                           char *text);
// May its first tokens be sealed?
ICE_MUST_CHECK ice_status quota_may_seal(struct sequence *sequence, uint64_t tokens, char *text);
// May a sequence of this namespace be attached to so many tokens of the prefix?
ICE_MUST_CHECK ice_status quota_may_attach(struct server *server, const struct prefix *prefix, uint64_t tokens,
                                           char *text);
// The namespace whose quota of disk has just refused an op; NULL: none has.
struct tenant *quota_lacking_disk(const struct op *op);
void quota_note_refused(const struct op *op); // counts a refusal

#endif
