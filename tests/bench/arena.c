// Bump allocation from large chunks; released memory waits in lists by size, eight sizes to an octave.
#include "arena.h"

#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#if defined(__x86_64__)
#include <emmintrin.h>
#endif

#define LINE        64u
#define HUGE_BYTES  ((size_t)2 << 20)
#define CHUNK_BYTES ((size_t)32 << 20)

// The size class, and the class's size in *bytes.
static uint32_t class_of(size_t *bytes)
{
    size_t lines = (*bytes + LINE - 1) / LINE;
    lines = lines == 0 ? 1 : lines;
    uint32_t shift = 0;
    while (lines > 15) {
        lines = (lines + 1) / 2;
        shift++;
    }
    *bytes = (lines << shift) * LINE;
    return shift * 16 + (uint32_t)lines;
}

static bool add_chunk(struct arena *arena, size_t bytes)
{
    struct arena_chunk *chunk = calloc(1, sizeof *chunk);
    size_t wanted = arena->chunks == NULL ? HUGE_BYTES : CHUNK_BYTES;
    while (wanted < bytes) {
        wanted += HUGE_BYTES;
    }
    // Room to align: the kernel gives huge pages only to aligned ranges.
    void *memory = mmap(NULL, wanted + HUGE_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (chunk == NULL || memory == MAP_FAILED) {
        free(chunk);
        if (memory != MAP_FAILED) {
            (void)munmap(memory, wanted + HUGE_BYTES);
        }
        return false;
    }
    uint8_t *aligned = (uint8_t *)memory + (HUGE_BYTES - (uintptr_t)memory % HUGE_BYTES) % HUGE_BYTES;
    if (aligned != memory) {
        (void)munmap(memory, (size_t)(aligned - (uint8_t *)memory));
    }
    if ((uint8_t *)memory + HUGE_BYTES != aligned) {
        (void)munmap(aligned + wanted, (size_t)((uint8_t *)memory + HUGE_BYTES - aligned));
    }
    (void)madvise(aligned, wanted, MADV_HUGEPAGE);
    *chunk = (struct arena_chunk){.next = arena->chunks, .memory = aligned, .bytes = wanted};
    arena->chunks = chunk;
    return true;
}

void *arena_acquire(struct arena *arena, size_t bytes)
{
    const uint32_t class = class_of(&bytes);
    void *found = arena->released[class];
    if (found != NULL) {
        memcpy(&arena->released[class], found, sizeof found);
    } else {
        if (arena->chunks == NULL || arena->chunks->bytes - arena->chunks->used < bytes) {
            if (!add_chunk(arena, bytes)) {
                return NULL;
            }
        }
        found = arena->chunks->memory + arena->chunks->used;
        arena->chunks->used += bytes;
    }
    arena->live_bytes += bytes;
    return found;
}

void arena_release(struct arena *arena, void *memory, size_t bytes)
{
    if (memory == NULL) {
        return;
    }
    const uint32_t class = class_of(&bytes);
    memcpy(memory, &arena->released[class], sizeof(void *));
    arena->released[class] = memory;
    arena->live_bytes -= bytes;
}

void arena_fini(struct arena *arena)
{
    for (struct arena_chunk *chunk = arena->chunks, *next; chunk != NULL; chunk = next) {
        next = chunk->next;
        (void)munmap(chunk->memory, chunk->bytes);
        free(chunk);
    }
    *arena = (struct arena){0};
}

size_t arena_bytes(const struct arena *arena)
{
    size_t sum = 0;
    for (const struct arena_chunk *chunk = arena->chunks; chunk != NULL; chunk = chunk->next) {
        sum += chunk->used;
    }
    return sum;
}

void arena_flush(const struct arena *arena)
{
#if defined(__x86_64__)
    for (const struct arena_chunk *chunk = arena->chunks; chunk != NULL; chunk = chunk->next) {
        for (size_t i = 0; i < chunk->used; i += LINE) {
            _mm_clflush(chunk->memory + i);
        }
    }
    _mm_mfence();
#else
    (void)arena;
#endif
}

static void *acquire(void *owner, size_t bytes)
{
    return arena_acquire(owner, bytes);
}

static void release(void *owner, void *memory, size_t bytes)
{
    arena_release(owner, memory, bytes);
}

struct index_allocator arena_allocator(struct arena *arena)
{
    return (struct index_allocator){.acquire = acquire, .release = release, .owner = arena};
}
