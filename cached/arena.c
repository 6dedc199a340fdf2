// Blocks of few sizes in spans, spans in chunks. Invariants: a span holds blocks of one class; it is in its class's
// list while it has free ones, and back in its chunk when all are free. A chunk is in the arena's list while it has
// free spans, and at most one that is all free is kept. A chunk's book is in its first span, before the blocks.
#include "cached/arena.h"

#include <assert.h>
#include <string.h>

#define CHUNK_BYTES ((size_t)2 << 20)
#define SPAN_BYTES  ((size_t)256 << 10)
#define SPANS       (CHUNK_BYTES / SPAN_BYTES)
#define BLOCK_MAX   ((size_t)64 << 10)
#define BLOCK_MIN   ((size_t)512)

struct arena_span {
    uint32_t used, class_index; // blocks in use; 0: the span is free
    uint8_t *fresh, *end;       // blocks never in use begin here
    void *free_blocks;          // linked through their first bytes
    struct arena_span *previous, *next;
};

struct arena_chunk {
    _Alignas(64) struct arena_span spans[SPANS];
    uint32_t used; // spans
    struct arena_chunk *previous, *next;
};

// The class of a size, and the size of its blocks: 1/8 more than was asked for at most.
static uint32_t class_of(size_t bytes, size_t *block_bytes)
{
    *block_bytes = BLOCK_MIN;
    if (bytes <= BLOCK_MIN)
        return 0;
    const uint32_t power = 63 - (uint32_t)__builtin_clzll(bytes - 1), step = power - 3;
    const size_t steps = (bytes + ((size_t)1 << step) - 1) >> step;
    *block_bytes = steps << step;
    return (power - 9) * 8 + (uint32_t)steps - 8;
}

// Doubly linked lists of spans and of chunks.
#define LIST_PUSH(head, item)                                                                                          \
    do {                                                                                                               \
        (item)->previous = NULL;                                                                                       \
        (item)->next = (head);                                                                                         \
        if (head)                                                                                                      \
            (head)->previous = (item);                                                                                 \
        (head) = (item);                                                                                               \
    } while (0)
#define LIST_REMOVE(head, item)                                                                                        \
    do {                                                                                                               \
        if ((item)->previous)                                                                                          \
            (item)->previous->next = (item)->next;                                                                     \
        else                                                                                                           \
            (head) = (item)->next;                                                                                     \
        if ((item)->next)                                                                                              \
            (item)->next->previous = (item)->previous;                                                                 \
    } while (0)

static struct arena_chunk *chunk_of(const void *memory)
{
    return (struct arena_chunk *)((uintptr_t)memory & ~(uintptr_t)(CHUNK_BYTES - 1));
}

static struct arena_span *span_take(struct arena *arena, uint32_t class_index)
{
    struct arena_chunk *chunk = arena->chunks;
    if (!chunk) {
        chunk = arena->env->acquire_chunk(arena->env, CHUNK_BYTES);
        if (!chunk)
            return NULL;
        memset(chunk, 0, sizeof *chunk);
        atomic_fetch_add_explicit(&arena->chunk_bytes, CHUNK_BYTES, memory_order_relaxed);
        LIST_PUSH(arena->chunks, chunk);
    }
    uint32_t i = 0;
    while (chunk->spans[i].end)
        i++;
    if (++chunk->used == SPANS)
        LIST_REMOVE(arena->chunks, chunk);
    uint8_t *base = (uint8_t *)chunk + i * SPAN_BYTES;
    struct arena_span *span = &chunk->spans[i];
    *span = (struct arena_span){
        .class_index = class_index, .fresh = i == 0 ? base + sizeof *chunk : base, .end = base + SPAN_BYTES};
    LIST_PUSH(arena->partial[class_index], span);
    return span;
}

static void span_give(struct arena *arena, struct arena_chunk *chunk, struct arena_span *span)
{
    LIST_REMOVE(arena->partial[span->class_index], span);
    *span = (struct arena_span){0};
    if (chunk->used-- == SPANS)
        LIST_PUSH(arena->chunks, chunk);
    if (chunk->used == 0 && (chunk->next || chunk->previous)) {
        LIST_REMOVE(arena->chunks, chunk);
        arena->env->release_chunk(arena->env, chunk, CHUNK_BYTES);
        atomic_fetch_sub_explicit(&arena->chunk_bytes, CHUNK_BYTES, memory_order_relaxed);
    }
}

static bool is_full(const struct arena_span *span, size_t block_bytes)
{
    return !span->free_blocks && (size_t)(span->end - span->fresh) < block_bytes;
}

void arena_init(struct arena *arena, struct env *env)
{
    *arena = (struct arena){.env = env};
}

void arena_fini(struct arena *arena)
{
    struct arena_chunk *chunk = arena->chunks;
    assert(!chunk || (chunk->used == 0 && !chunk->next));
    if (chunk)
        arena->env->release_chunk(arena->env, chunk, CHUNK_BYTES);
    arena->chunks = NULL;
}

size_t arena_block_bytes(const struct arena *arena, size_t bytes)
{
    size_t block_bytes;
    if (bytes > BLOCK_MAX || !arena->env->acquire_chunk)
        return bytes;
    class_of(bytes, &block_bytes);
    return SPAN_BYTES / (SPAN_BYTES / block_bytes);
}

bool arena_grows(const struct arena *arena, size_t bytes)
{
    size_t block_bytes;
    if (bytes > BLOCK_MAX || !arena->env->acquire_chunk)
        return false;
    return !arena->chunks && !arena->partial[class_of(bytes, &block_bytes)];
}

void *arena_acquire(struct arena *arena, size_t bytes)
{
    size_t block_bytes;
    if (bytes > BLOCK_MAX || !arena->env->acquire_chunk)
        return arena->env->acquire(arena->env, bytes);
    const uint32_t class_index = class_of(bytes, &block_bytes);
    struct arena_span *span = arena->partial[class_index];
    if (!span && !(span = span_take(arena, class_index)))
        return NULL;
    void *block = span->free_blocks;
    if (block) {
        memcpy(&span->free_blocks, block, sizeof block);
    } else {
        block = span->fresh;
        span->fresh += block_bytes;
    }
    span->used++;
    atomic_fetch_add_explicit(&arena->used_bytes, arena_block_bytes(arena, bytes), memory_order_relaxed);
    if (is_full(span, block_bytes))
        LIST_REMOVE(arena->partial[class_index], span);
    return block;
}

void arena_release(struct arena *arena, void *memory, size_t bytes)
{
    size_t block_bytes;
    if (!memory)
        return;
    if (bytes > BLOCK_MAX || !arena->env->acquire_chunk) {
        arena->env->release(arena->env, memory, bytes);
        return;
    }
    const uint32_t class_index = class_of(bytes, &block_bytes);
    struct arena_chunk *chunk = chunk_of(memory);
    struct arena_span *span = &chunk->spans[((uintptr_t)memory - (uintptr_t)chunk) / SPAN_BYTES];
    assert(span->used > 0 && span->class_index == class_index);
    if (is_full(span, block_bytes))
        LIST_PUSH(arena->partial[class_index], span);
    memcpy(memory, &span->free_blocks, sizeof memory);
    span->free_blocks = memory;
    atomic_fetch_sub_explicit(&arena->used_bytes, arena_block_bytes(arena, bytes), memory_order_relaxed);
    if (--span->used == 0)
        span_give(arena, chunk, span);
}
