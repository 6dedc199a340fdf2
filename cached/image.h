// A lane's image on the disk: its tree, as index.h saves it, and where its pages are, in pieces of the spill file. An
// idle lane sleeps as an image and costs no memory but the image's list; a sealed prefix is the images of its lanes.
//
// Images are written and read in slices on the lane's shard, between other work; the pieces go through a few buffers of
// the shard.
//
// Layout, little-endian: "ICELANE1", u64 bytes of the tree, u64 pages, u64 tokens; the tree; then for each page in the
// order of their numbers u32 number, u32 extent, u64 checksum. Cut into pieces of IMAGE_PIECE_BYTES, the last one
// padded by zeros; each piece has a checksum.
#ifndef ICECACHE_CACHED_IMAGE_H
#define ICECACHE_CACHED_IMAGE_H

#include "cached/disk.h"
#include "cached/task_queue.h"
#include "index/index.h"
#include "proto/status.h"

#include <stdbool.h>
#include <stdint.h>

#define IMAGE_PIECE_BYTES 65536u
// Of the header, and of an entry of the table.
enum { IMAGE_HEADER_BYTES = 32, IMAGE_ENTRY_BYTES = 16 };
static const uint8_t image_magic[8] = {'I', 'C', 'E', 'L', 'A', 'N', 'E', '1'};

#define IMAGE_BUFFERS 4u // pieces on their way at once, of a shard and direction

struct lane;
struct op_lane;
struct server;
struct shard;

struct image_piece {
    uint64_t checksum;
    uint32_t extent;
};

// What is kept in memory of an image. Holds its pieces' extents and its pages' extents once each.
struct image {
    uint32_t holds; // sealed prefixes, and stems made of them: reactor only. One that a lane sleeps as is the lane's
    uint64_t bytes; // of the image
    uint64_t tokens, indexed;
    uint32_t piece_count, page_count;     // whose extents are held
    uint32_t claims_pieces, claims_pages; // of a manifest just read: so many are to be taken
    uint64_t frame_bytes;
    struct image_piece *pieces;
    uint32_t *page_extents;
    size_t memory_bytes; // of this allocation
};

// Counted against the index's budget. NULL: none.
struct image *image_create(struct server *server, uint32_t pieces, uint32_t pages);
void image_hold(struct image *image);
// One holder less; the last one gives up the extents that it holds, and its memory. Accepts NULL.
void image_destroy(struct server *server, struct image *image);
uint64_t image_disk_bytes(const struct image *image); // of pieces and pages

struct image_buffer {
    struct disk_request request;
    struct task task;
    struct shard *shard;
    uint32_t piece;
    bool busy; // on its way, or read and not looked at
    bool read; // there is something in it
};

// A lane whose image is being written.
struct image_save {
    struct op_lane *part; // NULL: none
    struct image *image;  // NULL: pages are still being written
    uint32_t page;        // pages below are clean
    bool settles;         // a lane of the same request has waited for its clustering already
    uint64_t settle_until_ns;
    uint64_t at; // bytes of the image that are in pieces
    uint64_t tree_bytes;
    struct index_save tree;
    uint32_t table_page; // next page of the table
    uint32_t next_piece, flying;
    ice_status status;
    struct image_buffer buffers[IMAGE_BUFFERS];
};

// A lane that wakes.
struct image_load {
    struct lane *lane; // NULL: none, or it was destroyed meanwhile
    bool runs;
    const struct image *image;
    struct index_load *tree;
    uint64_t at; // bytes that have been looked at
    uint64_t tree_bytes, page_count, pages_done;
    uint32_t next_read, next_feed, flying;
    uint8_t rest[32]; // of a header or an entry of the table that lies across two pieces
    uint32_t rest_bytes;
    ice_status status;
    struct image_buffer buffers[IMAGE_BUFFERS];
};

struct images {
    struct image_save save;
    struct image_load load;
    struct op_lane *saves, *saves_tail; // waiting
    struct lane *wakes, *wakes_tail;    // waiting
    uint8_t *memory;                    // of all buffers
};

// 0 or -errno. Nothing without a disk.
ICE_MUST_CHECK int images_init(struct shard *shard);
void images_fini(struct shard *shard); // after the disk has been closed
// The part's lane is to be written (a sealing or a falling asleep): ends the part by op_lane_finish, with the image in
// part->image. The lane must not be appended to meanwhile; its clustering stops.
void images_save(struct shard *shard, struct op_lane *part);
// The lane is to be made from its image. Whoever waits for it is woken (shard_wake).
void images_wake(struct shard *shard, struct lane *lane);
// The lane goes while it waits to wake, or wakes.
void images_forget(struct shard *shard, struct lane *lane);
// One slice. True where there is more to do at once.
bool images_step(struct shard *shard);
bool image_save_step(struct shard *shard);
bool image_load_step(struct shard *shard);

#endif
