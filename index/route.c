// The way of a key down the tree to its nearest cell.
//
// From the root the nearest few nodes of each level are kept, if they are not much farther than the first. Distances
// are between codes, so they are the same on every instruction set; of equal ones the first met counts. Pure functions
// of the index.
#include "index/tree.h"

#include <float.h>

// Nodes that are more than 1.12 times as far (squared) as the nearest one of their level lead to no nearer cell, as
// good as never.
#define BEAM_DISTANCE2 1.25f

// A token whose cell is full goes to a cell with a free row that is at most 1.05 times as far (squared): it keeps pages
// fuller and costs nothing that could be measured.
#define SPILL_DISTANCE2 1.1025f

#define ASK_BYTES       512u // of the next block

struct near {
    float distance;
    uint32_t node;
};

struct way {
    const struct index *index;
    struct dci_probe probe;
    uint32_t avoid;                                             // a cell that does not count, or TREE_NONE
    const struct dci_block *blocks[TREE_BEAM * TREE_PARTS_MAX]; // of the nearest nodes
    float distances[TREE_BEAM * TREE_PARTS_MAX][DCI_LANES];     // to their entries, once looked at
    uint32_t count;
    struct dci_work *work;
};

static void enter(struct way *way, const struct near *list, uint32_t count)
{
    way->count = 0;
    for (uint32_t i = 0; i < count; i++) {
        const struct node *node = dci_node(way->index, list[i].node);
        for (uint32_t part = 0; part < node->part_count; part++) {
            way->blocks[way->count++] = dci_block(way->index, node->level, node->parts[part]);
        }
    }
}

// Finds the distances to the entries of block i; the next block is asked for meanwhile. Returns the nearest lane.
static uint32_t look(struct way *way, uint32_t i)
{
    const struct index *index = way->index;
    if (i + 1 < way->count) {
        dci_ask_for(way->blocks[i + 1], ASK_BYTES); // the rest follows by itself
    }
    dci_work_spend(way->work, index, DCI_LANES);
    return index->kernel->near16(&way->probe, way->blocks[i], index->head_dim, way->distances[i]);
}

static void keep_nearest(struct near *list, uint32_t *count, float distance, uint32_t node)
{
    uint32_t at = *count;
    if (at < TREE_BEAM) {
        (*count)++;
    } else if (distance >= list[at - 1].distance) {
        return;
    } else {
        at--;
    }
    for (; at > 0 && list[at - 1].distance > distance; at--) {
        list[at] = list[at - 1];
    }
    list[at] = (struct near){distance, node};
}

// A promoted anchor says less of what lies below it, and the nearest node may hold nothing but what to avoid.
static float beam_bound(const struct way *way, const struct near *list, uint32_t count)
{
    if (count == 0 || way->index->policy == INDEX_PROMOTION || way->avoid != TREE_NONE) {
        return count < TREE_BEAM ? FLT_MAX : list[TREE_BEAM - 1].distance;
    }
    const float bound = BEAM_DISTANCE2 * list[0].distance;
    return count < TREE_BEAM || bound < list[TREE_BEAM - 1].distance ? bound : list[TREE_BEAM - 1].distance;
}

// From nodes of a level above 2 to the nearest ones among their entries.
static void descend(struct way *way)
{
    const struct index *index = way->index;
    struct near next[TREE_BEAM];
    uint32_t count = 0;
    for (uint32_t i = 0; i < way->count; i++) {
        const struct dci_block *block = way->blocks[i];
        const float *distances = way->distances[i];
        const uint32_t nearest = look(way, i);
        keep_nearest(next, &count, distances[nearest], block->child[nearest]);
        // Unused lanes are farther than anything.
        uint32_t lanes = index->kernel->below16(distances, beam_bound(way, next, count)) & ~(1u << nearest);
        for (; lanes != 0; lanes &= lanes - 1) {
            const uint32_t lane = (uint32_t)__builtin_ctz(lanes);
            keep_nearest(next, &count, distances[lane], block->child[lane]);
        }
    }
    const float bound = beam_bound(way, next, count);
    while (count > 1 && next[count - 1].distance > bound) {
        count--;
    }
    enter(way, next, count);
}

// The nearest of the cells below the nodes that are left.
static struct near nearest_cell(struct way *way)
{
    struct near found = {FLT_MAX, TREE_NONE};
    for (uint32_t i = 0; i < way->count; i++) {
        float *distances = way->distances[i];
        uint32_t lane = look(way, i);
        if (way->blocks[i]->child[lane] == way->avoid) {
            distances[lane] = FLT_MAX;
            for (uint32_t other = 0; other < DCI_LANES; other++) {
                lane = distances[other] < distances[lane] ? other : lane;
            }
        }
        if (distances[lane] < found.distance) {
            found = (struct near){distances[lane], way->blocks[i]->child[lane]};
        }
    }
    return found;
}

static bool has_room(const struct index *index, const struct node *cell)
{
    return cell->count < cell->part_count * index->page_tokens;
}

// A cell with a free row instead of a full one, where there is one nearly as near.
static uint32_t spill(const struct way *way, const struct near *full)
{
    const struct index *index = way->index;
    struct near found = {SPILL_DISTANCE2 * full->distance, full->node};
    for (uint32_t i = 0; i < way->count; i++) {
        const float *distances = way->distances[i];
        uint32_t lanes = index->kernel->below16(distances, found.distance);
        for (; lanes != 0; lanes &= lanes - 1) {
            const uint32_t lane = (uint32_t)__builtin_ctz(lanes), cell = way->blocks[i]->child[lane];
            if (distances[lane] < found.distance && cell != way->avoid && has_room(index, dci_node(index, cell))) {
                found = (struct near){distances[lane], cell};
            }
        }
    }
    return found.node;
}

uint32_t dci_route(const struct index *index, const float *key, uint32_t avoid, struct dci_work *work)
{
    int8_t codes[INDEX_HEAD_DIM_MAX];
    struct way way; // its distances are written before they are read
    way.index = index;
    way.avoid = avoid;
    way.work = work;
    if (index->root == TREE_NONE) {
        return TREE_NONE;
    }
    enter(&way, &(struct near){0.0f, index->root}, 1);
    index->kernel->probe(key, index->base, index->head_dim, codes, &way.probe);
    way.probe.norm2_max = index->policy == INDEX_PROMOTION ? index->tree_norm2_max : 0.0f;
    for (uint32_t level = dci_node(index, index->root)->level; level > 2; level--) {
        descend(&way);
    }
    const struct near nearest = nearest_cell(&way);
    const bool is_full = nearest.node != TREE_NONE && !has_room(index, dci_node(index, nearest.node));
    return is_full ? spill(&way, &nearest) : nearest.node;
}
