// The way of a key down the tree to its nearest cell.
//
// From the root the nearest few nodes of each level are kept, if they are not much farther than the first. Distances
// are between codes, so they are the same on every instruction set; of equal ones the first met counts. Pure functions
// of the index.
#include "index/tree.h"

#include <float.h>
#include <string.h>

// Nodes that are more than 1.12 times as far (squared) as the nearest one of their level lead to no nearer cell, as
// good as never.
#define BEAM_DISTANCE2 1.25f

static void probe_init(const struct index *index, const float *key, int8_t *codes, struct dci_probe *probe)
{
    float off[INDEX_HEAD_DIM_MAX];
    for (uint32_t i = 0; i < index->head_dim; i++) {
        off[i] = key[i] - index->base[i];
    }
    *probe = (struct dci_probe){.codes = codes};
    probe->step = index->kernel->encode6(off, index->head_dim, codes, &probe->sum);
    probe->norm2 = index->kernel->dot(off, off, index->head_dim);
    probe->norm2_max = index->policy == INDEX_PROMOTION ? index->tree_norm2_max : 0.0f;
}

static void keep_nearest(struct dci_near *list, uint32_t *count, float distance, uint32_t node)
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
    list[at] = (struct dci_near){distance, node};
}

// A cell whose tokens fill no whole number of pages has a free row; of others only the node knows.
static bool has_room(const struct index *index, uint32_t count, uint32_t id)
{
    return count % index->page_tokens != 0 || count < dci_node(index, id)->part_count * index->page_tokens;
}

static void consider_cell(const struct index *index, float distance, const struct dci_block *block, uint32_t lane,
                          struct dci_route *route)
{
    const uint32_t id = block->child[lane];
    if (distance < route->nearest.distance) {
        route->nearest = (struct dci_near){distance, id};
    }
    if (distance < route->roomy.distance && has_room(index, (uint32_t)block->rows[lane], id)) {
        route->roomy = (struct dci_near){distance, id};
    }
}

// A cell beyond this distance is of no interest any more.
static float cell_bound(const struct dci_route *route)
{
    const float spill = SPILL_DISTANCE2 * route->nearest.distance;
    const float bound = route->roomy.distance < spill ? route->roomy.distance : spill;
    return bound > route->nearest.distance ? bound : route->nearest.distance; // estimates may be below 0
}

// Leaves out of a level's nearest nodes those that are much farther than the first.
static uint32_t keep_near(const struct dci_near *list, uint32_t count)
{
    while (count > 1 && list[count - 1].distance > BEAM_DISTANCE2 * list[0].distance) {
        count--;
    }
    return count;
}

void dci_route(const struct index *index, const float *key, uint32_t avoid, struct dci_route *route,
               struct dci_work *work)
{
    int8_t codes[INDEX_HEAD_DIM_MAX];
    struct dci_probe probe;
    struct dci_near list[TREE_BEAM] = {{0.0f, index->root}};
    uint32_t count = 1;
    route->nearest = route->roomy = (struct dci_near){FLT_MAX, TREE_NONE};
    if (index->root == TREE_NONE) {
        return;
    }
    probe_init(index, key, codes, &probe);
    for (uint32_t level = dci_node(index, index->root)->level; level >= 2; level--) {
        struct dci_near next[TREE_BEAM];
        uint32_t next_count = 0;
        for (uint32_t i = 0; i < count; i++) {
            const struct node *node = dci_node(index, list[i].node);
            for (uint32_t part = 0; part < node->part_count; part++) {
                const struct dci_block *block = dci_block(index, level, node->parts[part]);
                float distances[DCI_LANES];
                index->kernel->near16(&probe, block, index->head_dim, distances);
                // Only what is nearer than all that are kept; unused lanes are farther than anything.
                const float bound = level == 2               ? cell_bound(route)
                                    : next_count < TREE_BEAM ? FLT_MAX
                                                             : next[TREE_BEAM - 1].distance;
                uint32_t lanes = index->kernel->below16(distances, bound);
                for (; lanes != 0; lanes &= lanes - 1) {
                    const uint32_t lane = (uint32_t)__builtin_ctz(lanes);
                    if (level > 2) {
                        keep_nearest(next, &next_count, distances[lane], block->child[lane]);
                    } else if (block->child[lane] != avoid) {
                        consider_cell(index, distances[lane], block, lane, route);
                    }
                }
                dci_work_spend(work, index, DCI_LANES);
            }
        }
        memcpy(list, next, next_count * sizeof next[0]);
        // A promoted anchor says less of what lies below it, and the nearest node may hold nothing but what to avoid.
        count = index->policy == INDEX_MEANS && avoid == TREE_NONE ? keep_near(list, next_count) : next_count;
    }
}
