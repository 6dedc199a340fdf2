// A manifest as bytes, little-endian:
//
//   "ICESEAL2", u64 bytes of all of it, u64 id, u64 seed, identity (its fields in order: namespace NUL-padded, digest
//   zero-padded, one byte of its length and two of nothing, nine u32), u32 blocks, lanes, parts, the hashes, for each
//   part u64 first and end, then for each lane of each part u64 bytes, tokens, indexed, frame_bytes, u32 pieces, u32
//   pages, pieces as (u64 checksum, u32 extent), pages' u32 extents; at the end a u64 XXH3 of all before it.
//
// A manifest that a crash has cut or a disk has damaged fails its checksum, and counts as missing.
#include "cached/prefix_file.h"

#include "cached/log.h"
#include "cached/server.h"

#define XXH_INLINE_ALL
#include <xxhash.h>

#include <assert.h>
#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <sys/uio.h>

enum { LANE_HEAD_BYTES = 40, PIECE_BYTES = 12, SUM_BYTES = 8 };
#define IDENTITY_BYTES (WIRE_NAME_BYTES_MAX + 1 + WIRE_DIGEST_BYTES_MAX + 3 + 9 * 4)
#define HEAD_BYTES     (8 + 3 * 8 + IDENTITY_BYTES + 3 * 4)
#define PART_BYTES     16

static_assert(sizeof(struct prefix_identity) == IDENTITY_BYTES, "the identity has no bytes but its fields'");

// ---- a cursor over the bytes ----

struct cursor {
    uint8_t *at, *end;
    bool short_of; // something did not fit
};

static uint8_t *advance(struct cursor *cursor, size_t bytes)
{
    if (cursor->short_of || bytes > (size_t)(cursor->end - cursor->at)) {
        cursor->short_of = true;
        return NULL;
    }
    uint8_t *at = cursor->at;
    cursor->at += bytes;
    return at;
}

static void put(struct cursor *cursor, const void *from, size_t bytes)
{
    uint8_t *to = advance(cursor, bytes);
    if (to && bytes > 0)
        memcpy(to, from, bytes);
}

static void put32(struct cursor *cursor, uint32_t value)
{
    put(cursor, &value, sizeof value);
}

static void put64(struct cursor *cursor, uint64_t value)
{
    put(cursor, &value, sizeof value);
}

// Zeros where the bytes have run out.
static void get(struct cursor *cursor, void *to, size_t bytes)
{
    const uint8_t *from = advance(cursor, bytes);
    if (bytes == 0)
        return;
    if (from)
        memcpy(to, from, bytes);
    else
        memset(to, 0, bytes);
}

static uint32_t get32(struct cursor *cursor)
{
    uint32_t value;
    get(cursor, &value, sizeof value);
    return value;
}

static uint64_t get64(struct cursor *cursor)
{
    uint64_t value;
    get(cursor, &value, sizeof value);
    return value;
}

// ---- writing ----

static uint64_t bytes_of(const struct prefix *prefix)
{
    uint64_t bytes = HEAD_BYTES + (uint64_t)prefix->block_count * PREFIX_BLOCK_BYTES +
                     (uint64_t)prefix->part_count * PART_BYTES + SUM_BYTES;
    for (uint32_t i = 0; i < prefix_image_count(prefix); i++) {
        const struct image *image = prefix->images[i];
        bytes += LANE_HEAD_BYTES + (uint64_t)image->piece_count * PIECE_BYTES + (uint64_t)image->page_count * 4;
    }
    return bytes;
}

static void put_image(struct cursor *cursor, const struct image *image)
{
    put64(cursor, image->bytes);
    put64(cursor, image->tokens);
    put64(cursor, image->indexed);
    put64(cursor, image->frame_bytes);
    put32(cursor, image->piece_count);
    put32(cursor, image->page_count);
    for (uint32_t i = 0; i < image->piece_count; i++) {
        put64(cursor, image->pieces[i].checksum);
        put32(cursor, image->pieces[i].extent);
    }
    put(cursor, image->page_extents, image->page_count * sizeof *image->page_extents);
}

uint8_t *prefix_encode(const struct prefix *prefix, size_t *bytes_out)
{
    const size_t bytes = *bytes_out = bytes_of(prefix);
    struct env *env = prefix->server->env;
    uint8_t *memory = env->acquire(env, bytes);
    if (!memory)
        return NULL;
    struct cursor cursor = {memory, memory + bytes, false};
    put(&cursor, "ICESEAL2", 8);
    put64(&cursor, bytes);
    put64(&cursor, prefix->id);
    put64(&cursor, prefix->seed);
    put(&cursor, &prefix->identity, IDENTITY_BYTES);
    put32(&cursor, prefix->block_count);
    put32(&cursor, prefix->lane_count);
    put32(&cursor, prefix->part_count);
    put(&cursor, prefix->hashes, (size_t)prefix->block_count * PREFIX_BLOCK_BYTES);
    for (uint32_t i = 0; i < prefix->part_count; i++) {
        put64(&cursor, prefix->parts[i].first);
        put64(&cursor, prefix->parts[i].end);
    }
    for (uint32_t i = 0; i < prefix_image_count(prefix); i++)
        put_image(&cursor, prefix->images[i]);
    put64(&cursor, XXH3_64bits(memory, bytes - SUM_BYTES));
    assert(!cursor.short_of && cursor.at == cursor.end);
    return memory;
}

static void name_of(const struct prefix *prefix, char name[PREFIX_NAME_BYTES])
{
    snprintf(name, PREFIX_NAME_BYTES, "%016" PRIx64 PREFIX_SUFFIX, prefix->id);
}

static int open_folder(struct server *server, int *fd_out)
{
    return server->env->open_directory(server->env, server->config->spill_directory, fd_out);
}

ice_status prefix_file_write(const struct prefix *prefix)
{
    struct server *server = prefix->server;
    struct env *env = server->env;
    char name[PREFIX_NAME_BYTES];
    size_t bytes;
    if (bytes_of(prefix) > PREFIX_FILE_BYTES_MAX)
        return ICE_TOO_LARGE;
    uint8_t *memory = prefix_encode(prefix, &bytes);
    if (!memory)
        return ICE_NO_MEMORY;
    name_of(prefix, name);
    const struct iovec piece = {memory, bytes};
    int folder, error = open_folder(server, &folder);
    if (!error) {
        error = env->write_file(env, folder, name, &piece, 1);
        env->close_fd(env, folder);
    }
    env->release(env, memory, bytes);
    if (error)
        log_error("the manifest of a sealed prefix cannot be written to %s: %s", server->config->spill_directory,
                  strerror(-error));
    return error ? ICE_DISK_FAILED : ICE_OK;
}

ice_status prefix_file_unlink(const struct prefix *prefix)
{
    struct server *server = prefix->server;
    struct env *env = server->env;
    char name[PREFIX_NAME_BYTES];
    name_of(prefix, name);
    int folder, error = open_folder(server, &folder);
    if (!error) {
        error = env->unlink_file(env, folder, name);
        env->close_fd(env, folder);
    }
    return error ? ICE_DISK_FAILED : ICE_OK;
}

// ---- reading ----

static bool identity_is_sound(const struct prefix_identity *identity, uint32_t lanes)
{
    return identity->name_space[WIRE_NAME_BYTES_MAX] == '\0' && identity->model_digest_bytes <= WIRE_DIGEST_BYTES_MAX &&
           identity->block_tokens > 0 && identity->block_tokens <= WIRE_BLOCK_TOKENS_MAX && identity->layers > 0 &&
           identity->layers <= WIRE_LAYERS_MAX && identity->kv_heads > 0 && identity->kv_heads <= WIRE_KV_HEADS_MAX &&
           (uint64_t)identity->layers * identity->kv_heads == lanes;
}

static ice_status get_image(struct server *server, struct cursor *cursor, struct image **out)
{
    struct image head = {.bytes = get64(cursor)};
    head.tokens = get64(cursor);
    head.indexed = get64(cursor);
    head.frame_bytes = get64(cursor);
    const uint32_t pieces = get32(cursor), pages = get32(cursor);
    const uint64_t rest = (uint64_t)(cursor->end - cursor->at);
    if (cursor->short_of || (uint64_t)pieces * PIECE_BYTES + (uint64_t)pages * 4 > rest ||
        head.bytes > (uint64_t)pieces * IMAGE_PIECE_BYTES)
        return ICE_INVALID_ARGUMENT;
    struct image *image = image_create(server, pieces, pages);
    if (!image)
        return ICE_NO_MEMORY;
    image->bytes = head.bytes;
    image->tokens = head.tokens;
    image->indexed = head.indexed;
    image->frame_bytes = head.frame_bytes;
    for (uint32_t i = 0; i < pieces; i++) {
        image->pieces[i].checksum = get64(cursor);
        image->pieces[i].extent = get32(cursor);
    }
    get(cursor, image->page_extents, pages * sizeof *image->page_extents);
    // The counts stay 0 until the extents are taken: image_destroy gives up as many.
    image->claims_pieces = pieces;
    image->claims_pages = pages;
    *out = image;
    return ICE_OK;
}

// They lie one behind the other, and are all that is sealed.
static bool get_parts(struct cursor *cursor, struct prefix *prefix)
{
    uint64_t end = 0;
    for (uint32_t i = 0; i < prefix->part_count; i++) {
        struct prefix_part *part = &prefix->parts[i];
        part->first = get64(cursor);
        part->end = get64(cursor);
        if (part->first != end || part->end <= part->first)
            return false;
        end = part->end;
    }
    return !cursor->short_of && end == prefix_tokens(prefix);
}

static bool sum_is_right(const uint8_t *bytes, size_t count)
{
    uint64_t said, sum;
    if (count < HEAD_BYTES + SUM_BYTES || memcmp(bytes, "ICESEAL2", 8) != 0)
        return false;
    memcpy(&said, bytes + 8, sizeof said);
    memcpy(&sum, bytes + count - SUM_BYTES, sizeof sum);
    return said == count && XXH3_64bits(bytes, count - SUM_BYTES) == sum;
}

struct prefix *prefix_decode(struct server *server, const uint8_t *bytes, size_t count, ice_status *status)
{
    *status = ICE_INVALID_ARGUMENT;
    if (!sum_is_right(bytes, count))
        return NULL;
    struct cursor cursor = {(uint8_t *)bytes + 16, (uint8_t *)bytes + count - SUM_BYTES, false};
    struct prefix_identity identity;
    const uint64_t id = get64(&cursor), seed = get64(&cursor);
    get(&cursor, &identity, IDENTITY_BYTES);
    const uint32_t blocks = get32(&cursor), lanes = get32(&cursor), parts = get32(&cursor);
    const uint64_t rest = (uint64_t)(cursor.end - cursor.at);
    if (blocks == 0 || parts == 0 || parts >= SEQUENCE_STEMS_MAX || !identity_is_sound(&identity, lanes) ||
        (uint64_t)blocks * PREFIX_BLOCK_BYTES + (uint64_t)parts * PART_BYTES > rest)
        return NULL;
    struct prefix *prefix = prefix_create(server, &identity, lanes, parts, blocks);
    if (!prefix) {
        *status = ICE_NO_MEMORY;
        return NULL;
    }
    prefix->id = prefix->root = id;
    prefix->seed = seed;
    get(&cursor, prefix->hashes, (size_t)blocks * PREFIX_BLOCK_BYTES);
    *status = get_parts(&cursor, prefix) ? ICE_OK : ICE_INVALID_ARGUMENT;
    for (uint32_t i = 0; i < prefix_image_count(prefix) && *status == ICE_OK; i++) {
        const struct prefix_part *part = &prefix->parts[i / lanes];
        *status = get_image(server, &cursor, &prefix->images[i]);
        if (*status == ICE_OK && prefix->images[i]->tokens < part->end - part->first)
            *status = ICE_INVALID_ARGUMENT;
    }
    if (*status == ICE_OK && (cursor.short_of || cursor.at != cursor.end))
        *status = ICE_INVALID_ARGUMENT;
    if (*status == ICE_OK)
        return prefix;
    prefix_destroy(prefix);
    return NULL;
}
