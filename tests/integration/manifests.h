// Manifests of sealed prefixes as bytes, read without the daemon's code: the layout is in cached/prefix_file.c.
#ifndef ICECACHE_TESTS_MANIFESTS_H
#define ICECACHE_TESTS_MANIFESTS_H

#include "child.h"

#define MANIFEST_UNIT_BYTES  4096u // an extent's number is its place in this unit
#define MANIFEST_PIECE_BYTES 65536u
#define MANIFEST_LANES_MAX   64u

struct manifest_lane {
    uint64_t frame_bytes; // of a page
    uint32_t piece_count, page_count;
    uint32_t *pieces, *pages; // extents
};

struct manifest {
    uint32_t lane_count; // [part][layer][kv_head]
    struct manifest_lane lanes[MANIFEST_LANES_MAX];
};

void manifest_read(struct manifest *manifest, const char *folder, uint64_t id);
void manifest_free(struct manifest *manifest);

// Bytes of the spill file that the manifests in a folder name, each place once, and how many manifests there are.
uint64_t manifests_bytes(const char *folder, uint32_t *count);

#endif
