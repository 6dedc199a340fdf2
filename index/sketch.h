// Sketches of the leaf pages: what ranks a page, dense and in the order of one pass. Private to index/.
//
// A tree's leaf pages have the slots 0 .. pages-1. Slot s is lane s % 16 of block s / 16. A slot is a function of the
// tree's history, never of page ids, so that sums over slots are the same for equal trees.
#ifndef ICECACHE_INDEX_SKETCH_H
#define ICECACHE_INDEX_SKETCH_H

#include "index/kernel.h"
#include "index/store.h"

#define SKETCH_LANES     DCI_LANES
#define SKETCH_CODE_ZERO 128 // the code of the base

// Behind the numbers of a block lie the codes: [head_dim / 4][16 pages][4], 128 + (mean - base) / scale. A lane that is
// not in use has no rows, no page, DCI_HIDDEN as the logarithm of its rows and a reach above its unit, so that it has
// no mass.
struct sketch {
    float scale[SKETCH_LANES];    // of the codes
    float unit[SKETCH_LANES];     // isotropic deviation of the keys along a direction: radius / sqrt(head_dim)
    float hope[SKETCH_LANES];     // how far the best key may lie from the mean along a query, in the same unit
    float log_rows[SKETCH_LANES]; // ln of the rows in use
    float reach[SKETCH_LANES];    // sqrt(2 ln rows): the expected best of as many scores, in deviations
    uint32_t rows[SKETCH_LANES];
    uint32_t tie[SKETCH_LANES]; // lowest position
    uint32_t page[SKETCH_LANES];
    uint8_t codes[];
};

struct index;
struct tree;

void dci_sketch_init(struct tree *tree, uint32_t head_dim);
INDEX_MUST_CHECK bool dci_sketch_reserve(struct index *index, struct tree *tree, uint32_t pages);
static inline uint32_t dci_sketch_blocks(uint32_t pages)
{
    return (pages + SKETCH_LANES - 1) / SKETCH_LANES;
}
struct sketch *dci_sketch_at(const struct tree *tree, uint32_t block);
// What the codes are relative to: the mean of the tree's keys, from the summaries of its top level.
void dci_sketch_base(const struct index *index, struct tree *tree);
// Writes a page's sketch into a slot, which becomes the page's. Room for it must be reserved.
void dci_sketch_write(const struct index *index, struct tree *tree, uint32_t slot, uint32_t page);
// Clears the lanes behind the first `slots`.
void dci_sketch_clear_from(const struct index *index, struct tree *tree, uint32_t slots);
// Takes a page out of the first `slots`: the last one moves to its place.
void dci_sketch_remove(const struct index *index, struct tree *tree, uint32_t page, uint32_t slots);
// Lane `lane` of `sketch` is what the page's keys say.
bool dci_sketch_agrees(const struct index *index, const struct tree *tree, uint32_t page);

#endif
