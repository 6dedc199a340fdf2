// Hashes of blocks of tokens, which name sealed prefixes. Pure: no client, no state, any thread.
//
// The chain is part of what is stored: a daemon finds a prefix by it years later, so neither the function, its seed,
// the order of bytes nor what is hashed may change.
#include "client/error.h"
#include "client/icecache.h"

#include "proto/limits.h"

#include <string.h>

#define XXH_INLINE_ALL
#include <xxhash.h>

_Static_assert(ICE_HASH_BYTES == WIRE_HASH_BYTES && sizeof(XXH128_canonical_t) == WIRE_HASH_BYTES,
               "a hash is what goes into frame 2");
_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "token ids are hashed as they lie in memory");

ice_status ice_block_hashes(const uint32_t *token_ids, size_t n, uint32_t block_tokens, const void *salt,
                            size_t salt_bytes, uint8_t (*hashes)[ICE_HASH_BYTES])
{
    error_clear();
    const size_t block = block_tokens != 0 ? block_tokens : WIRE_BLOCK_TOKENS_DEFAULT;
    if (block > WIRE_BLOCK_TOKENS_MAX) {
        return error_set(ICE_TOO_LARGE, "block_tokens is %u, the limit is %u", block_tokens, WIRE_BLOCK_TOKENS_MAX);
    }
    if (salt == NULL && salt_bytes != 0) {
        return error_set(ICE_INVALID_ARGUMENT, "salt is NULL, but salt_bytes is %zu", salt_bytes);
    }
    if (n >= block && (token_ids == NULL || hashes == NULL)) {
        return error_set(ICE_INVALID_ARGUMENT, "%s is NULL", token_ids == NULL ? "token_ids" : "hashes");
    }
    XXH128_canonical_t parent;
    XXH128_canonicalFromHash(&parent, XXH3_128bits(salt, salt_bytes));
    for (size_t i = 0; i < n / block; i++) {
        XXH3_state_t state;
        (void)XXH3_128bits_reset(&state);
        (void)XXH3_128bits_update(&state, &parent, sizeof parent);
        (void)XXH3_128bits_update(&state, token_ids + i * block, block * sizeof token_ids[0]);
        XXH128_canonicalFromHash(&parent, XXH3_128bits_digest(&state));
        memcpy(hashes[i], parent.digest, ICE_HASH_BYTES);
    }
    return ICE_OK;
}
