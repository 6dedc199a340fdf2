// Blocks of every size from an arena: aligned, apart from each other, and all memory goes back.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "cached/arena.h"

#include <string.h>

#define BLOCKS 3000u

static struct env real, counting;
static int chunks, chunks_left;

static void *acquire_chunk(struct env *env, size_t bytes)
{
    (void)env;
    if (chunks_left == 0)
        return NULL;
    chunks_left--;
    chunks++;
    return real.acquire_chunk(&real, bytes);
}

static void release_chunk(struct env *env, void *memory, size_t bytes)
{
    (void)env;
    chunks--;
    real.release_chunk(&real, memory, bytes);
}

static int group_setup(void **state)
{
    (void)state;
    env_linux_init(&real);
    counting = real;
    if (!real.acquire_chunk)
        return 0;
    counting.acquire_chunk = acquire_chunk;
    counting.release_chunk = release_chunk;
    return 0;
}

struct block {
    uint8_t *memory;
    size_t bytes;
    uint8_t mark;
};

static void block_check(const struct block *block)
{
    assert_int_equal(block->memory[0], block->mark);
    assert_int_equal(block->memory[block->bytes - 1], block->mark);
    assert_int_equal(block->memory[block->bytes / 2], block->mark);
}

// Sizes around every class' edges, taken and given back in a random order.
static void test_blocks(void **state)
{
    (void)state;
    static struct block blocks[BLOCKS];
    struct arena arena;
    uint64_t random = 1;
    chunks_left = 10000;
    arena_init(&arena, &counting);
    for (uint32_t i = 0; i < 200000; i++) {
        random = random * 6364136223846793005u + 1442695040888963407u;
        struct block *block = &blocks[(random >> 33) % BLOCKS];
        if (block->memory) {
            block_check(block);
            arena_release(&arena, block->memory, block->bytes);
            block->memory = NULL;
            continue;
        }
        block->bytes = ((size_t)64 << (random >> 20) % 12) + (random >> 40) % 130;
        block->mark = (uint8_t)(random >> 50);
        block->memory = arena_acquire(&arena, block->bytes);
        assert_non_null(block->memory);
        assert_int_equal((uintptr_t)block->memory % 64, 0);
        memset(block->memory, block->mark, block->bytes);
    }
    for (uint32_t i = 0; i < BLOCKS; i++) {
        if (blocks[i].memory)
            block_check(&blocks[i]);
        arena_release(&arena, blocks[i].memory, blocks[i].bytes);
    }
    assert_true(chunks <= 1); // a spare one
    arena_fini(&arena);
    assert_int_equal(chunks, 0);
}

// A refused chunk refuses the block and nothing else.
// What is counted for blocks is what they take: chunks hold no more than that, but for their books, which may cost a
// block each, and for what is partly filled.
static void test_counted(void **state)
{
    (void)state;
    static const size_t sizes[] = {100, 513, 9000, 9216, 37000, 45000, 53000, 65536};
    static void *blocks[1 << 17];
    struct arena arena;
    arena_init(&arena, &counting);
    if (!counting.acquire_chunk) {
        assert_int_equal(arena_block_bytes(&arena, 100), 100);
        skip();
    }
    for (unsigned i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        const uint64_t counted = arena_block_bytes(&arena, sizes[i]), count = (48u << 20) / counted;
        assert_true(counted >= sizes[i] && (counted <= sizes[i] + sizes[i] / 3 || counted == 512));
        chunks = 0;
        chunks_left = 1000;
        for (uint64_t n = 0; n < count; n++)
            assert_non_null(blocks[n] = arena_acquire(&arena, sizes[i]));
        const uint64_t taken = (uint64_t)chunks << 21;
        if (taken + (2u << 20) < count * sizes[i] || taken > count * counted / 24 * 25 + (2u << 20))
            fail_msg("%zu bytes: counted %lu, taken %lu", sizes[i], count * counted, taken);
        for (uint64_t n = 0; n < count; n++)
            arena_release(&arena, blocks[n], sizes[i]);
        arena_fini(&arena);
    }
    assert_int_equal(arena_block_bytes(&arena, 65537), 65537);
}

static void test_refused(void **state)
{
    (void)state;
    struct arena arena;
    void *blocks[64] = {0};
    uint32_t count = 0;
    if (!counting.acquire_chunk)
        skip();
    chunks_left = 1;
    arena_init(&arena, &counting);
    while (count < 64 && (blocks[count] = arena_acquire(&arena, 65536)))
        count++;
    assert_int_equal(count, 8 * 4 - 1); // the chunk's book takes a block's room
    arena_release(&arena, blocks[5], 65536);
    blocks[5] = arena_acquire(&arena, 65000);
    assert_non_null(blocks[5]);
    for (uint32_t i = 0; i < count; i++)
        arena_release(&arena, blocks[i], i == 5 ? 65000 : 65536);
    arena_fini(&arena);
    assert_int_equal(chunks, 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_blocks), cmocka_unit_test(test_counted),
                                       cmocka_unit_test(test_refused)};
    return cmocka_run_group_tests(tests, group_setup, NULL);
}
