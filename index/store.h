// Memory of the index: counted blocks from the caller's allocator, and stores that grow by chunks.
#ifndef ICECACHE_INDEX_STORE_H
#define ICECACHE_INDEX_STORE_H

#include "index/index.h"

#include <string.h>

// An allocator and the bytes taken from it. Every block is released with the size it was acquired with.
struct dci_memory {
    struct index_allocator allocator;
    uint64_t bytes;
};

void *dci_memory_acquire(struct dci_memory *memory, size_t bytes); // NULL when refused
void dci_memory_release(struct dci_memory *memory, void *block, size_t bytes);

// An array of equal elements in chunks: growing it never moves an element, so that a long append costs no long copy.
struct dci_store {
    unsigned char **chunks;
    uint32_t chunk_count, chunk_room;
    uint32_t forgotten; // chunks below it have been given back, but for those kept at the beginning
    uint32_t shift;     // a chunk holds 1 << shift elements
    size_t stride;      // bytes of an element
};

void dci_store_init(struct dci_store *store, size_t stride, uint32_t shift);
void dci_store_fini(struct dci_store *store, struct dci_memory *memory);
// Room for `count` elements; false, with the store as it was, when refused.
INDEX_MUST_CHECK bool dci_store_reserve(struct dci_store *store, struct dci_memory *memory, uint64_t count);
// The same for a store without chunks, but those that hold nothing but elements kept .. first-1 are left out.
INDEX_MUST_CHECK bool dci_store_reserve_around(struct dci_store *store, struct dci_memory *memory, uint64_t kept,
                                               uint64_t first, uint64_t count);
// Gives back the chunks that `count` elements do not need.
void dci_store_trim(struct dci_store *store, struct dci_memory *memory, uint64_t count);

// Gives back the chunks that hold nothing but elements first .. end-1; nobody may look at these elements any more.
void dci_store_forget(struct dci_store *store, struct dci_memory *memory, uint64_t first, uint64_t end);

static inline void *dci_store_at(const struct dci_store *store, uint32_t element)
{
    const uint32_t mask = (1u << store->shift) - 1;
    return store->chunks[element >> store->shift] + (element & mask) * store->stride;
}

// A store of elements that are acquired and released one by one, the last released first.
struct dci_slab {
    struct dci_store store;
    uint32_t bound, free; // ids below bound have been in use; the first free one (its next is in its first bytes)
    uint32_t used;
};

void dci_slab_init(struct dci_slab *slab, size_t stride, uint32_t shift);
void dci_slab_fini(struct dci_slab *slab, struct dci_memory *memory);
// Room for n more elements: acquiring them will not fail.
INDEX_MUST_CHECK bool dci_slab_reserve(struct dci_slab *slab, struct dci_memory *memory, uint32_t n);
// Gives back room that no element has been in.
void dci_slab_trim(struct dci_slab *slab, struct dci_memory *memory);
INDEX_MUST_CHECK bool dci_slab_acquire(struct dci_slab *slab, struct dci_memory *memory, uint32_t *out);
void dci_slab_release(struct dci_slab *slab, uint32_t id);

static inline void *dci_slab_at(const struct dci_slab *slab, uint32_t id)
{
    return dci_store_at(&slab->store, id);
}
// What follows a free element on the list of free ones.
static inline uint32_t dci_slab_next_free(const struct dci_slab *slab, uint32_t id)
{
    uint32_t next;
    memcpy(&next, dci_slab_at(slab, id), sizeof next);
    return next;
}
static inline void dci_slab_link_free(const struct dci_slab *slab, uint32_t id, uint32_t next)
{
    memcpy(dci_slab_at(slab, id), &next, sizeof next);
}

// A growing list of numbers.
struct dci_list {
    uint32_t *items;
    uint32_t count, room;
};

INDEX_MUST_CHECK bool dci_list_reserve(struct dci_list *list, struct dci_memory *memory, uint32_t room);
INDEX_MUST_CHECK bool dci_list_push(struct dci_list *list, struct dci_memory *memory, uint32_t item);
void dci_list_fini(struct dci_list *list, struct dci_memory *memory);

#endif
