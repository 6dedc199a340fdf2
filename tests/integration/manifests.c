// See manifests.h.
#include "manifests.h"

#include "proto/limits.h"

#include <dirent.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { HASH_BYTES = 16, HEAD_BYTES = 8 + 3 * 8 };
enum { IDENTITY_BYTES = WIRE_NAME_BYTES_MAX + 1 + WIRE_DIGEST_BYTES_MAX + 3 + 9 * 4 };

struct places {
    uint32_t units[1 << 16]; // of each place that begins there; the spill files of the tests are small
};

static uint32_t get32(const uint8_t **at)
{
    uint32_t value;
    memcpy(&value, *at, sizeof value);
    *at += sizeof value;
    return value;
}

static uint64_t get64(const uint8_t **at)
{
    uint64_t value;
    memcpy(&value, *at, sizeof value);
    *at += sizeof value;
    return value;
}

static uint32_t *numbers(uint32_t count)
{
    uint32_t *memory = calloc(count + 1u, sizeof *memory);
    assert_non_null(memory);
    return memory;
}

static void parse(struct manifest *manifest, const uint8_t *bytes, size_t count)
{
    const uint8_t *at = bytes + HEAD_BYTES + IDENTITY_BYTES, *end = bytes + count;
    assert_true(end - at > 8);
    const uint32_t blocks = get32(&at);
    manifest->lane_count = get32(&at);
    const uint32_t parts = get32(&at);
    assert_true(parts > 0 && parts <= MANIFEST_LANES_MAX && manifest->lane_count <= MANIFEST_LANES_MAX / parts);
    manifest->lane_count *= parts;
    at += (size_t)blocks * HASH_BYTES + (size_t)parts * 2 * sizeof(uint64_t);
    for (uint32_t i = 0; i < manifest->lane_count; i++) {
        struct manifest_lane *lane = &manifest->lanes[i];
        assert_true(end - at > 40);
        at += 3 * sizeof(uint64_t);
        lane->frame_bytes = get64(&at);
        lane->piece_count = get32(&at);
        lane->page_count = get32(&at);
        assert_true((uint64_t)(end - at) >= lane->piece_count * 12ull + lane->page_count * 4ull);
        lane->pieces = numbers(lane->piece_count);
        lane->pages = numbers(lane->page_count);
        for (uint32_t piece = 0; piece < lane->piece_count; piece++) {
            at += sizeof(uint64_t);
            lane->pieces[piece] = get32(&at);
        }
        for (uint32_t page = 0; page < lane->page_count; page++)
            lane->pages[page] = get32(&at);
    }
    assert_int_equal(end - at, sizeof(uint64_t)); // the checksum
}

static void read_path(struct manifest *manifest, const char *path)
{
    static uint8_t bytes[1 << 20];
    FILE *file = fopen(path, "re");
    assert_non_null(file);
    const size_t size = fread(bytes, 1, sizeof bytes, file);
    fclose(file);
    parse(manifest, bytes, size);
}

void manifest_read(struct manifest *manifest, const char *folder, uint64_t id)
{
    char path[512];
    snprintf(path, sizeof path, "%s/%016" PRIx64 ".seal", folder, id);
    read_path(manifest, path);
}

void manifest_free(struct manifest *manifest)
{
    for (uint32_t i = 0; i < manifest->lane_count; i++) {
        free(manifest->lanes[i].pieces);
        free(manifest->lanes[i].pages);
    }
}

static void enter(struct places *places, const uint32_t *extents, uint32_t count, uint64_t bytes)
{
    for (uint32_t i = 0; i < count; i++) {
        assert_true(extents[i] < sizeof places->units / sizeof *places->units);
        places->units[extents[i]] = (uint32_t)((bytes + MANIFEST_UNIT_BYTES - 1) / MANIFEST_UNIT_BYTES);
    }
}

uint64_t manifests_bytes(const char *folder, uint32_t *count)
{
    struct places *places = calloc(1, sizeof *places);
    DIR *listing = opendir(folder);
    assert_true(places && listing);
    *count = 0;
    for (const struct dirent *each; (each = readdir(listing)) != NULL;) {
        struct manifest manifest;
        char path[512];
        const char *dot = strrchr(each->d_name, '.');
        if (!dot || strcmp(dot, ".seal") != 0)
            continue;
        snprintf(path, sizeof path, "%s/%s", folder, each->d_name);
        read_path(&manifest, path);
        for (uint32_t i = 0; i < manifest.lane_count; i++) {
            const struct manifest_lane *lane = &manifest.lanes[i];
            enter(places, lane->pieces, lane->piece_count, MANIFEST_PIECE_BYTES);
            enter(places, lane->pages, lane->page_count, lane->frame_bytes);
        }
        manifest_free(&manifest);
        (*count)++;
    }
    closedir(listing);
    uint64_t units = 0;
    for (size_t i = 0; i < sizeof places->units / sizeof *places->units; i++)
        units += places->units[i];
    free(places);
    return units * MANIFEST_UNIT_BYTES;
}
