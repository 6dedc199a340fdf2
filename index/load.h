// A load under way, and what is made of its pieces. Private to load.c and accept.c.
#ifndef ICECACHE_INDEX_LOAD_H
#define ICECACHE_INDEX_LOAD_H

#include "index/image.h"

#define LOAD_IDS_AT_ONCE 32u

// What codes stand for may be longer than the keys, whose norms squared are M at most. An anchor lies within 2 |M| of
// the base and 6% beside what was coded; a token's code is at most half as long again as what it codes. With room to
// spare: an index that was saved must come back.
#define LOAD_BASE_MOST   1.1f
#define LOAD_TAIL_MOST   1.5f
#define LOAD_ANCHOR_MOST 8.0f
#define LOAD_TOKEN_MOST  32.0f
#define LOAD_NORM2_LEAST 1.0e-30f // rounding near 0

struct index_load {
    struct index *index;
    enum index_status status;
    uint64_t left;
    enum image_section section;
    uint32_t item, piece;
    unsigned char *into; // the piece under way
    size_t bytes, got;
    struct image_header header;

    uint32_t open_page, open_block;   // the open page met last, and whose it is
    uint32_t open_pages, live_places; // met so far: open pages; places of clustered tokens
    uint32_t leaf_pages, used_nodes, children, used_blocks[2];
    uint32_t tokens; // clustered, met in runs
    uint32_t last;   // of a list of ids
    union {
        uint32_t ids[LOAD_IDS_AT_ONCE];
        struct image_node node;
        struct image_block block;
        float steps[DCI_LANES];
    } staged;
};

static inline bool dci_is_size(float x, float most)
{
    return x >= 0.0f && x <= most; // not when it is NaN
}

static inline bool dci_is_nothing(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits == 0; // neither next to it nor -0
}

static inline float dci_norm2_most(const struct index_load *load, float factor)
{
    return factor * load->header.norm2_max + LOAD_NORM2_LEAST;
}

// ---- accept.c ----
// Each judges the piece that has come, makes of it what it is, and names the item that comes next.
enum index_status dci_accept_places(struct index_load *load);
enum index_status dci_accept_free_pages(struct index_load *load);
enum index_status dci_accept_node(struct index_load *load);
enum index_status dci_accept_free_ids(struct index_load *load);
enum index_status dci_accept_block(struct index_load *load);
enum index_status dci_accept_run(struct index_load *load);
enum index_status dci_accept_tail(struct index_load *load);
// Of all nodes, of a list of free ids, of all blocks: do they fit together?
bool dci_nodes_are_right(const struct index_load *load);
bool dci_free_ids_are_right(const struct index_load *load);
bool dci_tree_is_right(const struct index_load *load);

#endif
