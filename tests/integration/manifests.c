// Manifests of sealed prefixes as bytes, read without the daemon's code: the layout is in cached/prefix_file.c.
#include "load.h"

#include "proto/limits.h"

#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { PIECE_BYTES = 65536, UNIT_BYTES = 4096, HASH_BYTES = 16, HEAD_BYTES = 8 + 3 * 8 };
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

static void enter(struct places *places, uint32_t extent, uint64_t bytes)
{
    assert_true(extent < sizeof places->units / sizeof *places->units);
    places->units[extent] = (uint32_t)((bytes + UNIT_BYTES - 1) / UNIT_BYTES);
}

static void enter_manifest(struct places *places, const uint8_t *bytes, size_t count)
{
    const uint8_t *at = bytes + HEAD_BYTES + IDENTITY_BYTES, *end = bytes + count;
    const uint32_t blocks = get32(&at), lanes = get32(&at);
    at += (size_t)blocks * HASH_BYTES;
    for (uint32_t lane = 0; lane < lanes; lane++) {
        assert_true(end - at > 40);
        at += 3 * sizeof(uint64_t);
        const uint64_t frame_bytes = get64(&at);
        const uint32_t pieces = get32(&at), pages = get32(&at);
        assert_true((uint64_t)(end - at) >= pieces * 12ull + pages * 4ull);
        for (uint32_t i = 0; i < pieces; i++) {
            at += sizeof(uint64_t);
            enter(places, get32(&at), PIECE_BYTES);
        }
        for (uint32_t i = 0; i < pages; i++)
            enter(places, get32(&at), frame_bytes);
    }
    assert_int_equal(end - at, sizeof(uint64_t)); // the checksum
}

uint64_t manifests_bytes(const char *folder, uint32_t *count)
{
    struct places *places = calloc(1, sizeof *places);
    DIR *listing = opendir(folder);
    assert_true(places && listing);
    *count = 0;
    for (const struct dirent *each; (each = readdir(listing)) != NULL;) {
        static uint8_t bytes[1 << 20];
        char path[512];
        const char *dot = strrchr(each->d_name, '.');
        if (!dot || strcmp(dot, ".seal") != 0)
            continue;
        snprintf(path, sizeof path, "%s/%s", folder, each->d_name);
        FILE *file = fopen(path, "re");
        assert_non_null(file);
        const size_t size = fread(bytes, 1, sizeof bytes, file);
        fclose(file);
        enter_manifest(places, bytes, size);
        (*count)++;
    }
    closedir(listing);
    uint64_t units = 0;
    for (size_t i = 0; i < sizeof places->units / sizeof *places->units; i++)
        units += places->units[i];
    free(places);
    return units * UNIT_BYTES;
}
