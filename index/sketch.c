// Sketches of the leaf pages.
//
// Invariant: after a commit every leaf page has one slot below the tree's page count, the slot names the page, and
// what it holds is a function of the page's tokens and of the tree's base; the lanes behind the last slot are cleared.
// A bulk build writes the sketches of its own tree; an insertion reserves room before its plan is handed out and
// writes at commit only, so that a commit cannot fail. Thread ownership: the index's.
#include "index/sketch.h"

#include "index/tree.h"

#include <math.h>
#include <string.h>

#define BLOCKS_SHIFT 2u

// How many measured deviations above the expected best token of a page are still hoped for, times that distance. The
// measurement's own error (9 % with 64 tokens) and heavier tails than a normal distribution's are in it.
#define HOPE_DEVIATION 1.25f
// The same for the key that lies farthest from the mean, which a radius over many hides: a key that is unlike all
// others is often the one that is looked for.
#define FARTHEST_DEVIATION 2.0f

void dci_sketch_init(struct tree *tree, uint32_t head_dim)
{
    dci_store_init(&tree->sketches, sizeof(struct sketch) + (size_t)SKETCH_LANES * head_dim, BLOCKS_SHIFT);
}

bool dci_sketch_reserve(struct index *index, struct tree *tree, uint32_t pages)
{
    return dci_store_reserve(&tree->sketches, &index->memory, dci_sketch_blocks(pages));
}

struct sketch *dci_sketch_at(const struct tree *tree, uint32_t block)
{
    return dci_store_at(&tree->sketches, block);
}

void dci_sketch_base(const struct index *index, struct tree *tree)
{
    const uint32_t count = tree->levels[tree->top].count;
    memset(tree->base, 0, sizeof tree->base);
    for (uint32_t i = 0; i < count; i++) {
        struct node *node = dci_node(tree, tree->top, i);
        const float *mean = dci_node_mean(index, node);
        const float share = (float)node->weight / (float)tree->tokens;
        for (uint32_t j = 0; j < index->head_dim; j++) {
            tree->base[j] += share * mean[j];
        }
    }
}

static uint8_t *code_at(struct sketch *sketch, uint32_t lane, uint32_t element)
{
    return sketch->codes + (size_t)(element / 4) * 4 * SKETCH_LANES + (size_t)lane * 4 + element % 4;
}

static void clear_lane(const struct index *index, struct sketch *sketch, uint32_t lane)
{
    sketch->scale[lane] = sketch->unit[lane] = sketch->hope[lane] = 0.0f;
    sketch->reach[lane] = 1.0f;
    sketch->log_rows[lane] = DCI_HIDDEN;
    sketch->rows[lane] = 0;
    sketch->tie[lane] = sketch->page[lane] = TREE_NONE;
    for (uint32_t j = 0; j < index->head_dim; j++) {
        *code_at(sketch, lane, j) = SKETCH_CODE_ZERO;
    }
}

static void encode(const struct index *index, const struct tree *tree, uint32_t id, struct sketch *sketch,
                   uint32_t lane)
{
    struct page *page = dci_page(index, id);
    const float *mean = dci_page_mean(index, page);
    int8_t codes[INDEX_HEAD_DIM_MAX];
    float off[INDEX_HEAD_DIM_MAX];
    for (uint32_t j = 0; j < index->head_dim; j++) {
        off[j] = mean[j] - tree->base[j];
    }
    sketch->scale[lane] = dci_encode(off, index->head_dim, codes);
    for (uint32_t j = 0; j < index->head_dim; j++) {
        *code_at(sketch, lane, j) = (uint8_t)(codes[j] + SKETCH_CODE_ZERO);
    }
    const float log_rows = dci_log((float)page->rows), reach = sqrtf(2.0f * log_rows);
    const float unit = page->radius * index->inverse_root_dim;
    const float together = HOPE_DEVIATION * reach * unit;
    const float alone = FARTHEST_DEVIATION * page->farthest * index->inverse_root_dim;
    sketch->unit[lane] = unit;
    sketch->hope[lane] = alone > together ? alone : together;
    sketch->log_rows[lane] = log_rows;
    sketch->reach[lane] = reach;
    sketch->rows[lane] = page->rows;
    sketch->page[lane] = id;
    sketch->tie[lane] = TREE_NONE;
    for (uint32_t r = 0; r < index->page_tokens; r++) {
        sketch->tie[lane] = page->tokens[r] < sketch->tie[lane] ? page->tokens[r] : sketch->tie[lane];
    }
}

void dci_sketch_write(const struct index *index, struct tree *tree, uint32_t slot, uint32_t page)
{
    struct sketch *sketch = dci_sketch_at(tree, slot / SKETCH_LANES);
    encode(index, tree, page, sketch, slot % SKETCH_LANES);
    dci_page(index, page)->slot = slot;
}

void dci_sketch_clear_from(const struct index *index, struct tree *tree, uint32_t slots)
{
    for (uint32_t s = slots; s % SKETCH_LANES != 0; s++) {
        clear_lane(index, dci_sketch_at(tree, s / SKETCH_LANES), s % SKETCH_LANES);
    }
}

void dci_sketch_remove(const struct index *index, struct tree *tree, uint32_t page, uint32_t slots)
{
    const uint32_t slot = dci_page(index, page)->slot, last = slots - 1;
    struct sketch *to = dci_sketch_at(tree, slot / SKETCH_LANES), *from = dci_sketch_at(tree, last / SKETCH_LANES);
    const uint32_t a = slot % SKETCH_LANES, b = last % SKETCH_LANES;
    if (slot != last) {
        to->scale[a] = from->scale[b];
        to->unit[a] = from->unit[b];
        to->hope[a] = from->hope[b];
        to->log_rows[a] = from->log_rows[b];
        to->reach[a] = from->reach[b];
        to->rows[a] = from->rows[b];
        to->tie[a] = from->tie[b];
        to->page[a] = from->page[b];
        for (uint32_t j = 0; j < index->head_dim; j += 4) {
            memcpy(code_at(to, a, j), code_at(from, b, j), 4);
        }
        dci_page(index, to->page[a])->slot = slot;
    }
    clear_lane(index, from, b);
}

bool dci_sketch_agrees(const struct index *index, const struct tree *tree, uint32_t id)
{
    // One block with only this page's lane filled, and the page's real lane.
    _Alignas(struct sketch) unsigned char room[sizeof(struct sketch) + SKETCH_LANES * INDEX_HEAD_DIM_MAX];
    struct sketch *expected = (struct sketch *)(void *)room;
    const uint32_t slot = dci_page(index, id)->slot, lane = slot % SKETCH_LANES;
    if (slot >= tree->pages) {
        return false;
    }
    struct sketch *found = dci_sketch_at(tree, slot / SKETCH_LANES);
    encode(index, tree, id, expected, lane);
    for (uint32_t j = 0; j < index->head_dim; j += 4) {
        if (memcmp(code_at(expected, lane, j), code_at(found, lane, j), 4) != 0) {
            return false;
        }
    }
    return expected->scale[lane] == found->scale[lane] && expected->unit[lane] == found->unit[lane] &&
           expected->hope[lane] == found->hope[lane] && expected->log_rows[lane] == found->log_rows[lane] &&
           expected->reach[lane] == found->reach[lane] && expected->rows[lane] == found->rows[lane] &&
           expected->tie[lane] == found->tie[lane] && found->page[lane] == id;
}
