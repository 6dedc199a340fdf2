// Memory of the index: counted blocks, stores that grow by chunks, lists of numbers.
//
// Invariant: `bytes` is the sum of the sizes of all blocks held; a refused allocation changes nothing but the size of
// a chunk table. Thread ownership: that of the index or search context the memory belongs to.
#include "index/store.h"

#include <string.h>

#define TABLE_ROOM_MIN 8u
#define LIST_ROOM_MIN  16u

void *dci_memory_acquire(struct dci_memory *memory, size_t bytes)
{
    void *block = memory->allocator.acquire(memory->allocator.owner, bytes);
    if (block != NULL) {
        memory->bytes += bytes;
    }
    return block;
}

void dci_memory_release(struct dci_memory *memory, void *block, size_t bytes)
{
    if (block == NULL) {
        return;
    }
    memory->bytes -= bytes;
    memory->allocator.release(memory->allocator.owner, block, bytes);
}

void dci_store_init(struct dci_store *store, size_t stride, uint32_t shift)
{
    *store = (struct dci_store){.shift = shift, .stride = stride};
}

static size_t chunk_bytes(const struct dci_store *store)
{
    return store->stride << store->shift;
}

void dci_store_fini(struct dci_store *store, struct dci_memory *memory)
{
    dci_store_trim(store, memory, 0);
    dci_memory_release(memory, store->chunks, store->chunk_room * sizeof store->chunks[0]);
    store->chunks = NULL;
    store->chunk_room = 0;
}

static bool table_grow(struct dci_store *store, struct dci_memory *memory, uint32_t need)
{
    if (need <= store->chunk_room) {
        return true;
    }
    uint32_t room = store->chunk_room < TABLE_ROOM_MIN ? TABLE_ROOM_MIN : 2 * store->chunk_room;
    if (room < need) {
        room = need;
    }
    unsigned char **chunks = dci_memory_acquire(memory, room * sizeof chunks[0]);
    if (chunks == NULL) {
        return false;
    }
    if (store->chunk_count > 0) {
        memcpy(chunks, store->chunks, store->chunk_count * sizeof chunks[0]);
    }
    dci_memory_release(memory, store->chunks, store->chunk_room * sizeof chunks[0]);
    store->chunks = chunks;
    store->chunk_room = room;
    return true;
}

static uint32_t chunks_for(const struct dci_store *store, uint64_t count)
{
    const uint64_t chunk = 1u << store->shift;
    return (uint32_t)((count + chunk - 1) >> store->shift);
}

bool dci_store_reserve(struct dci_store *store, struct dci_memory *memory, uint64_t count)
{
    const uint32_t need = chunks_for(store, count);
    if (!table_grow(store, memory, need)) {
        return false;
    }
    const uint32_t before = store->chunk_count;
    while (store->chunk_count < need) {
        unsigned char *chunk = dci_memory_acquire(memory, chunk_bytes(store));
        if (chunk == NULL) {
            dci_store_trim(store, memory, (uint64_t)before << store->shift);
            return false;
        }
        store->chunks[store->chunk_count++] = chunk;
    }
    return true;
}

bool dci_store_reserve_around(struct dci_store *store, struct dci_memory *memory, uint64_t kept, uint64_t first,
                              uint64_t count)
{
    const uint64_t gap_end = first >> store->shift;
    if (!dci_store_reserve(store, memory, kept)) {
        return false;
    }
    if (store->chunk_count < gap_end) {
        if (!table_grow(store, memory, (uint32_t)gap_end)) {
            return false;
        }
        while (store->chunk_count < gap_end) {
            store->chunks[store->chunk_count++] = NULL;
        }
        store->forgotten = store->chunk_count;
    }
    return dci_store_reserve(store, memory, count);
}

void dci_store_trim(struct dci_store *store, struct dci_memory *memory, uint64_t count)
{
    const uint32_t need = chunks_for(store, count);
    while (store->chunk_count > need) {
        dci_memory_release(memory, store->chunks[--store->chunk_count], chunk_bytes(store));
    }
    store->forgotten = store->forgotten < store->chunk_count ? store->forgotten : store->chunk_count;
}

void dci_store_forget(struct dci_store *store, struct dci_memory *memory, uint64_t first, uint64_t end)
{
    const uint64_t chunk = 1u << store->shift;
    uint64_t c = (first + chunk - 1) >> store->shift, last = end >> store->shift;
    last = last < store->chunk_count ? last : store->chunk_count;
    for (c = c > store->forgotten ? c : store->forgotten; c < last; c++) {
        dci_memory_release(memory, store->chunks[c], chunk_bytes(store));
        store->chunks[c] = NULL;
        store->forgotten = (uint32_t)c + 1;
    }
}

void dci_slab_init(struct dci_slab *slab, size_t stride, uint32_t shift)
{
    *slab = (struct dci_slab){.free = UINT32_MAX};
    dci_store_init(&slab->store, stride, shift);
}

void dci_slab_fini(struct dci_slab *slab, struct dci_memory *memory)
{
    dci_store_fini(&slab->store, memory);
    slab->bound = slab->used = 0;
    slab->free = UINT32_MAX;
}

bool dci_slab_reserve(struct dci_slab *slab, struct dci_memory *memory, uint32_t n)
{
    return dci_store_reserve(&slab->store, memory, (uint64_t)slab->used + n);
}

void dci_slab_trim(struct dci_slab *slab, struct dci_memory *memory)
{
    dci_store_trim(&slab->store, memory, slab->bound);
}

bool dci_slab_acquire(struct dci_slab *slab, struct dci_memory *memory, uint32_t *out)
{
    if (slab->free != UINT32_MAX) {
        *out = slab->free;
        slab->free = dci_slab_next_free(slab, *out);
    } else {
        if (!dci_store_reserve(&slab->store, memory, (uint64_t)slab->bound + 1)) {
            return false;
        }
        *out = slab->bound++;
    }
    slab->used++;
    return true;
}

void dci_slab_release(struct dci_slab *slab, uint32_t id)
{
    dci_slab_link_free(slab, id, slab->free);
    slab->free = id;
    slab->used--;
}

bool dci_list_reserve(struct dci_list *list, struct dci_memory *memory, uint32_t room)
{
    if (room <= list->room) {
        return true;
    }
    uint32_t grown = list->room < LIST_ROOM_MIN ? LIST_ROOM_MIN : list->room + list->room / 2;
    if (grown < room) {
        grown = room;
    }
    uint32_t *items = dci_memory_acquire(memory, grown * sizeof items[0]);
    if (items == NULL) {
        return false;
    }
    if (list->count > 0) {
        memcpy(items, list->items, list->count * sizeof items[0]);
    }
    dci_memory_release(memory, list->items, list->room * sizeof items[0]);
    list->items = items;
    list->room = grown;
    return true;
}

bool dci_list_push(struct dci_list *list, struct dci_memory *memory, uint32_t item)
{
    if (list->count == list->room && !dci_list_reserve(list, memory, list->count + 1)) {
        return false;
    }
    list->items[list->count++] = item;
    return true;
}

void dci_list_fini(struct dci_list *list, struct dci_memory *memory)
{
    dci_memory_release(memory, list->items, list->room * sizeof list->items[0]);
    *list = (struct dci_list){0};
}
