// Levels of the tree: promotion, nodes and their lists of children, summaries, and the search for the nearest node.
//
// Promotion (S_l, n_l = r * n_(l-1)): of every 1/r consecutive nodes of a level one, chosen by the seed, is promoted.
// So level counts are tight at any length, levels are nested, and a node's number gives its position by arithmetic.
// Invariants: a promoted node is its own parent; lists of children are ordered by the decisions that made them, never
// by page id. Thread ownership: the index's.
#include "index/tree.h"

#include <string.h>

#define NODES_SHIFT 5u

// Which of the block's nodes of level - 1 is promoted to `level`.
static uint32_t chosen(const struct index *index, uint32_t level, uint32_t block)
{
    const uint64_t name = ((uint64_t)level << 32) | block;
    return (uint32_t)(dci_mix(index->seed ^ dci_mix(name)) % index->fanout);
}

uint32_t dci_level_count(const struct index *index, uint32_t level, uint32_t n)
{
    for (uint32_t l = 1; l <= level; l++) {
        const uint32_t blocks = n / index->fanout;
        n = blocks + (chosen(index, l, blocks) < n % index->fanout ? 1 : 0);
    }
    return n;
}

uint32_t dci_level_token(const struct index *index, uint32_t level, uint32_t node)
{
    for (uint32_t l = level; l >= 1; l--) {
        node = node * index->fanout + chosen(index, l, node);
    }
    return node;
}

uint32_t dci_level_promoted(const struct index *index, uint32_t level, uint32_t node)
{
    const uint32_t block = node / index->fanout;
    return chosen(index, level + 1, block) == node % index->fanout ? block : TREE_NONE;
}

uint32_t dci_level_top(const struct index *index, uint32_t n)
{
    uint32_t top = 1;
    while (top + 1 < TREE_LEVELS_MAX && dci_level_count(index, top + 1, n) >= TREE_TOP_MIN) {
        top++;
    }
    return top;
}

struct tree *dci_tree_create(struct index *index, uint32_t n)
{
    struct tree *tree = dci_memory_acquire(&index->memory, sizeof *tree);
    if (tree == NULL) {
        return NULL;
    }
    memset(tree, 0, sizeof *tree);
    tree->top = dci_level_top(index, n);
    for (uint32_t level = 1; level <= tree->top; level++) {
        dci_store_init(&tree->levels[level].nodes, sizeof(struct node) + 2 * index->head_dim * sizeof(float),
                       NODES_SHIFT);
    }
    dci_sketch_init(tree, index->head_dim);
    return tree;
}

void dci_tree_destroy(struct index *index, struct tree *tree)
{
    if (tree == NULL) {
        return;
    }
    for (uint32_t level = 1; level <= tree->top; level++) {
        dci_store_fini(&tree->levels[level].nodes, &index->memory);
    }
    dci_store_fini(&tree->sketches, &index->memory);
    dci_memory_release(&index->memory, tree, sizeof *tree);
}

void dci_node_init(const struct index *index, struct tree *tree, uint32_t level, uint32_t number)
{
    struct node *node = dci_node(tree, level, number);
    memset(node, 0, sizeof *node);
    node->token = dci_level_token(index, level, number);
    node->parent = node->first = node->next = TREE_NONE;
    node->norm2 = dci_token(index, node->token)->norm2;
    dci_key_widen(index, node->token, node->vectors);
    memcpy(dci_node_mean(index, node), node->vectors, index->head_dim * sizeof(float));
}

void dci_node_link(struct tree *tree, uint32_t level, uint32_t number, uint32_t parent)
{
    struct node *node = dci_node(tree, level, number), *above = dci_node(tree, level + 1, parent);
    node->parent = parent;
    node->next = above->first;
    above->first = number;
}

void dci_node_unlink(struct tree *tree, uint32_t level, uint32_t number)
{
    struct node *node = dci_node(tree, level, number);
    uint32_t *link = &dci_node(tree, level + 1, node->parent)->first;
    while (*link != number) {
        link = &dci_node(tree, level, *link)->next;
    }
    *link = node->next;
    node->parent = node->next = TREE_NONE;
}

void dci_page_link(struct index *index, struct tree *tree, uint32_t id, uint32_t cell)
{
    struct page *page = dci_page(index, id);
    struct node *node = dci_node(tree, 1, cell);
    page->owner = cell;
    page->next = node->first;
    node->first = id;
}

void dci_page_unlink(struct index *index, struct tree *tree, uint32_t id)
{
    struct page *page = dci_page(index, id);
    uint32_t *link = &dci_node(tree, 1, page->owner)->first;
    while (*link != id) {
        link = &dci_page(index, *link)->next;
    }
    *link = page->next;
    page->next = TREE_NONE;
}

struct child {
    uint32_t weight, next;
    const float *mean;
};

static struct child child_get(const struct index *index, const struct tree *tree, uint32_t level, uint32_t number)
{
    if (level == 0) {
        struct page *page = dci_page(index, number);
        return (struct child){page->rows, page->next, dci_page_mean(index, page)};
    }
    struct node *node = dci_node(tree, level, number);
    return (struct child){node->weight, node->next, dci_node_mean(index, node)};
}

void dci_node_summarise(const struct index *index, struct tree *tree, uint32_t level, uint32_t number)
{
    const uint32_t dim = index->head_dim;
    struct node *node = dci_node(tree, level, number);
    float *mean = dci_node_mean(index, node);
    node->marked = false;
    node->weight = 0;
    struct child child;
    for (uint32_t c = node->first; c != TREE_NONE; c = child.next) {
        child = child_get(index, tree, level - 1, c);
        node->weight += child.weight;
    }
    assert(node->weight > 0); // its own token at least lies below it
    memset(mean, 0, dim * sizeof mean[0]);
    for (uint32_t c = node->first; c != TREE_NONE; c = child.next) {
        child = child_get(index, tree, level - 1, c);
        const float share = (float)child.weight / (float)node->weight;
        for (uint32_t j = 0; j < dim; j++) {
            mean[j] += share * child.mean[j];
        }
    }
}

static uint32_t tie_of(uint32_t position, uint32_t pivot)
{
    return pivot <= position ? position - pivot : INDEX_TOKENS_MAX + pivot;
}

void dci_near_add(struct dci_near *list, uint32_t *count, uint32_t room, const struct index *index,
                  const struct tree *tree, uint32_t level, uint32_t number, const struct dci_probe *probe)
{
    const struct node *node = dci_node(tree, level, number);
    const float dot = index->kernel->dot(probe->key, node->vectors, index->head_dim);
    const struct dci_near candidate = {
        .affinity = dci_affinity(dot, probe->slack, dci_slack(node->norm2, probe->norm2_max)),
        .tie = tie_of(probe->position, node->token),
        .node = number,
    };
    uint32_t at = *count;
    while (at > 0 && (candidate.affinity > list[at - 1].affinity ||
                      (candidate.affinity == list[at - 1].affinity && candidate.tie < list[at - 1].tie))) {
        at--;
    }
    if (at == room) {
        return;
    }
    const uint32_t last = *count < room ? *count : room - 1;
    memmove(&list[at + 1], &list[at], (last - at) * sizeof list[0]);
    list[at] = candidate;
    *count = last + 1;
}

uint32_t dci_tree_nearest(const struct index *index, const struct tree *tree, uint32_t level,
                          const struct dci_probe *probe, struct dci_near *list, uint32_t room, struct dci_work *work)
{
    uint32_t start = level;
    while (start < tree->top && tree->levels[start].count > TREE_EXACT_MAX) {
        start++;
    }
    struct dci_near above[TREE_BEAM];
    uint32_t above_count = 0;
    for (uint32_t l = start; l >= level; l--) {
        struct dci_near *kept = l == level ? list : (struct dci_near[TREE_BEAM]){{0}};
        const uint32_t kept_room = l == level ? room : TREE_BEAM;
        uint32_t kept_count = 0;
        if (l == start) {
            for (uint32_t i = 0; i < tree->levels[l].count; i++) {
                dci_near_add(kept, &kept_count, kept_room, index, tree, l, i, probe);
            }
            dci_work_spend(work, index, tree->levels[l].count);
        }
        for (uint32_t a = 0; l < start && a < above_count; a++) {
            uint32_t seen = 0;
            for (uint32_t c = dci_node(tree, l + 1, above[a].node)->first; c != TREE_NONE; seen++) {
                dci_near_add(kept, &kept_count, kept_room, index, tree, l, c, probe);
                c = dci_node(tree, l, c)->next;
            }
            dci_work_spend(work, index, seen);
        }
        if (l == level) {
            return kept_count;
        }
        memcpy(above, kept, kept_count * sizeof above[0]);
        above_count = kept_count;
    }
    return 0;
}
