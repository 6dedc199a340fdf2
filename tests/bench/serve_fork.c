// By a sealed prefix: the origin's tokens are sealed, where they have not been, and another sequence is attached to
// them. It needs the daemon's disk.
#include "serve_fork.h"

#include <stdlib.h>

#define BLOCK_TOKENS 16u // the library's default

const char *const serve_fork_way = "seal and attach";

ice_status serve_fork(const struct serve_fork_source *source, uint64_t deadline_us, ice_sequence **out)
{
    const size_t blocks = source->tokens / BLOCK_TOKENS;
    uint64_t tokens = 0;
    uint8_t(*hashes)[ICE_HASH_BYTES] = malloc(blocks * sizeof *hashes);
    if (hashes == NULL) {
        return ICE_NO_MEMORY;
    }
    ice_status status = ice_block_hashes(source->token_ids, source->tokens, BLOCK_TOKENS, NULL, 0, hashes);
    if (status == ICE_OK) {
        status = ice_sequence_seal(source->sequence, hashes, blocks, deadline_us, NULL);
    }
    if (status == ICE_OK) {
        status = ice_sequence_attach(source->client, source->options, hashes, blocks, 0, deadline_us, out, &tokens);
    }
    free(hashes);
    if (status == ICE_OK && tokens != source->tokens) {
        ice_sequence_close(*out);
        *out = NULL;
        return ICE_UNKNOWN_PREFIX;
    }
    return status;
}
