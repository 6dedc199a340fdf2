// Hashes of blocks: the chain as the header defines it, and values that must never change, because prefixes on disk are
// found by them.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "client/icecache.h"

#include <stdlib.h>
#include <string.h>

#define XXH_INLINE_ALL
#include <xxhash.h>

enum { TOKENS = 4096 * 3 + 5, BLOCK_MAX = 4096 };

static uint32_t ids[TOKENS];
static uint8_t hashes[TOKENS + 1][ICE_HASH_BYTES];

// The definition, in one piece of memory and byte by byte.
static void expect_chain(size_t n, size_t block, const void *salt, size_t salt_bytes)
{
    static uint8_t bytes[ICE_HASH_BYTES + 4 * BLOCK_MAX];
    XXH128_canonical_t parent;
    XXH128_canonicalFromHash(&parent, XXH128(salt, salt_bytes, 0));
    for (size_t i = 0; i < n / block; i++) {
        memcpy(bytes, parent.digest, ICE_HASH_BYTES);
        for (size_t j = 0; j < block; j++) {
            for (size_t b = 0; b < 4; b++) {
                bytes[ICE_HASH_BYTES + 4 * j + b] = (uint8_t)(ids[i * block + j] >> (8 * b));
            }
        }
        XXH128_canonicalFromHash(&parent, XXH128(bytes, ICE_HASH_BYTES + 4 * block, 0));
        assert_memory_equal(hashes[i], parent.digest, ICE_HASH_BYTES);
    }
}

static void chain_is_as_defined(void **state)
{
    (void)state;
    const struct {
        size_t n;
        uint32_t block;
    } cases[] = {{0, 16}, {15, 16}, {16, 16}, {1000, 16}, {33, 1}, {TOKENS, 4096}, {777, 64}, {100, 0}};
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        const size_t block = cases[i].block != 0 ? cases[i].block : 16, count = cases[i].n / block;
        memset(hashes, 0xee, sizeof hashes);
        assert_int_equal(ice_block_hashes(ids, cases[i].n, cases[i].block, "salt", 4, hashes), ICE_OK);
        assert_string_equal(ice_last_error(), "");
        expect_chain(cases[i].n, block, "salt", 4);
        for (size_t b = 0; b < ICE_HASH_BYTES; b++) {
            assert_int_equal(hashes[count][b], 0xee); // nothing behind the whole blocks
        }
        assert_int_equal(ice_block_hashes(ids, cases[i].n, cases[i].block, NULL, 0, hashes), ICE_OK);
        expect_chain(cases[i].n, block, NULL, 0);
    }
}

static void values_never_change(void **state)
{
    (void)state;
    static const uint8_t first[] = {0x7a, 0x3b, 0x20, 0xd2, 0xe8, 0xbb, 0xce, 0xf6,
                                    0x6f, 0xf5, 0xbb, 0xb8, 0x08, 0xc3, 0x79, 0x8c},
                         second[] = {0xb0, 0x01, 0x95, 0x0d, 0xad, 0xd2, 0xd8, 0x28,
                                     0xd6, 0xd4, 0x0d, 0x63, 0xa4, 0xdb, 0xbb, 0xcb},
                         salted[] = {0x36, 0x40, 0xab, 0xcf, 0x21, 0x70, 0x87, 0x74,
                                     0xe7, 0xf3, 0xed, 0xd0, 0x35, 0x8e, 0xf0, 0xa7};
    assert_int_equal(ice_block_hashes(ids, 32, 16, NULL, 0, hashes), ICE_OK);
    assert_memory_equal(hashes[0], first, sizeof first);
    assert_memory_equal(hashes[1], second, sizeof second);
    assert_int_equal(ice_block_hashes(ids, 16, 16, "adapter", 7, hashes), ICE_OK);
    assert_memory_equal(hashes[0], salted, sizeof salted);
}

static void a_hash_stands_for_all_before_it(void **state)
{
    (void)state;
    uint8_t before[4][ICE_HASH_BYTES];
    assert_int_equal(ice_block_hashes(ids, 64, 16, NULL, 0, before), ICE_OK);
    ids[20]++; // in the second block
    assert_int_equal(ice_block_hashes(ids, 64, 16, NULL, 0, hashes), ICE_OK);
    ids[20]--;
    assert_memory_equal(hashes[0], before[0], ICE_HASH_BYTES);
    for (size_t i = 1; i < 4; i++) {
        assert_memory_not_equal(hashes[i], before[i], ICE_HASH_BYTES);
    }
    // The same ids in the same block elsewhere have another hash.
    memcpy(ids + 32, ids, 32 * sizeof ids[0]);
    assert_int_equal(ice_block_hashes(ids, 64, 32, NULL, 0, hashes), ICE_OK);
    assert_memory_not_equal(hashes[0], hashes[1], ICE_HASH_BYTES);
}

static void arguments_are_checked(void **state)
{
    (void)state;
    assert_int_equal(ice_block_hashes(NULL, 16, 16, NULL, 0, hashes), ICE_INVALID_ARGUMENT);
    assert_non_null(strstr(ice_last_error(), "token_ids"));
    assert_int_equal(ice_block_hashes(ids, 16, 16, NULL, 0, NULL), ICE_INVALID_ARGUMENT);
    assert_non_null(strstr(ice_last_error(), "hashes"));
    assert_int_equal(ice_block_hashes(ids, 16, 16, NULL, 1, hashes), ICE_INVALID_ARGUMENT);
    assert_non_null(strstr(ice_last_error(), "salt"));
    assert_int_equal(ice_block_hashes(ids, 16, 4097, NULL, 0, hashes), ICE_TOO_LARGE);
    assert_non_null(strstr(ice_last_error(), "block_tokens"));
    assert_int_equal(ice_block_hashes(NULL, 15, 16, NULL, 0, NULL), ICE_OK); // no whole block
    assert_string_equal(ice_last_error(), "");
}

int main(void)
{
    for (uint32_t i = 0; i < TOKENS; i++) {
        ids[i] = i * 2654435761u;
    }
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(chain_is_as_defined),
        cmocka_unit_test(values_never_change),
        cmocka_unit_test(a_hash_stands_for_all_before_it),
        cmocka_unit_test(arguments_are_checked),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
