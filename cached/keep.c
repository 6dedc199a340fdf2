// Selections that keep some of the last one, see keep.h.
//
// Scratch: [0, slots) the kept, [slots, 2 slots) what is ordered to find them, then what else the search has found,
// [2 slots, 3 slots) that ordered to find the best of it, then the merged.
#include "cached/keep.h"

#include <string.h>

bool keep_applies(const struct record_cell *cell, const struct keep_wish *wish)
{
    return wish->keep > 0 && cell->is_known && wish->budget < wish->until - wish->from;
}

size_t keep_scratch_count(uint32_t slots)
{
    return 3 * (size_t)slots;
}

static bool is_better(const struct index_selected *a, const struct index_selected *b)
{
    return a->mass > b->mass || (a->mass == b->mass && a->position < b->position);
}

static void swap(struct index_selected *a, struct index_selected *b)
{
    const struct index_selected t = *a;
    *a = *b;
    *b = t;
}

// The worst of the best `count` of n items, 0 < count <= n, which it leaves in another order. The total order makes it
// say for each item whether it is among them.
static struct index_selected worst_of_best(struct index_selected *items, uint32_t n, uint32_t count)
{
    uint32_t low = 0, high = n;
    while (high - low > 1) {
        swap(&items[low + (high - low) / 2], &items[high - 1]);
        uint32_t store = low;
        for (uint32_t i = low; i + 1 < high; i++) {
            if (is_better(&items[i], &items[high - 1]))
                swap(&items[i], &items[store++]);
        }
        swap(&items[store], &items[high - 1]);
        if (store == count - 1)
            return items[store];
        if (store < count)
            low = store + 1;
        else
            high = store;
    }
    return items[low];
}

void keep_choose(struct keep *keep, const struct record_cell *cell, const struct keep_wish *wish,
                 struct index_selected *scratch)
{
    uint32_t last = 0, count = 0;
    for (uint32_t i = 0; i < cell->count; i++) { // in the scratch's beginning, which the chosen overwrite in order
        if (cell->entries[i].mass >= 0)
            scratch[last++] =
                (struct index_selected){.position = cell->entries[i].position, .mass = cell->entries[i].mass};
    }
    struct index_selected *spare = scratch + wish->slots, worst = {0};
    const bool is_part = wish->keep < last;
    if (is_part) {
        memcpy(spare, scratch, last * sizeof *scratch);
        worst = worst_of_best(spare, last, wish->keep);
    }
    for (uint32_t i = 0; i < last; i++) {
        const bool is_chosen = !is_part || !is_better(&worst, &scratch[i]);
        if (is_chosen && scratch[i].position >= wish->from && scratch[i].position < wish->until)
            scratch[count++] = scratch[i];
    }
    *keep = (struct keep){.tokens = scratch, .count = count, .slots = wish->slots, .spare = spare};
    keep->is_whole = wish->coverage <= 0 && count == wish->budget;
}

// Both ascend: the found that are not kept go to `others`, and what is kept and found has its new mass. `lowest`: of
// what was found.
static uint32_t find_others(const struct keep *keep, const struct index_selection *selection,
                            const struct index_selected *found, struct index_selected *others)
{
    uint32_t count = 0, at = 0;
    float lowest = 1;
    for (uint32_t i = 0; i < selection->count; i++)
        lowest = found[i].mass < lowest ? found[i].mass : lowest;
    for (uint32_t i = 0; i < keep->count; i++) {
        struct index_selected *token = &keep->tokens[i];
        while (at < selection->count && found[at].position < token->position)
            others[count++] = found[at++];
        if (at < selection->count && found[at].position == token->position)
            *token = found[at++];
        else
            token->mass = token->mass < lowest ? token->mass : lowest;
    }
    while (at < selection->count)
        others[count++] = found[at++];
    return count;
}

const struct index_selected *keep_merge(const struct keep *keep, struct index_selection *selection,
                                        const struct index_selected *found, uint32_t room)
{
    struct index_selected *others = keep->spare, *merged = keep->spare + keep->slots, worst = {0};
    const uint32_t other_count = find_others(keep, selection, found, others);
    const uint32_t left = room > keep->count ? room - keep->count : 0;
    if (left > 0 && left < other_count) {
        memcpy(merged, others, other_count * sizeof *others);
        worst = worst_of_best(merged, other_count, left);
    }
    uint32_t count = 0, at = 0;
    selection->selected_mass = 0;
    for (uint32_t i = 0; i <= other_count; i++) {
        while (at < keep->count && (i == other_count || keep->tokens[at].position < others[i].position))
            merged[count++] = keep->tokens[at++];
        if (i < other_count && (left >= other_count || (left > 0 && !is_better(&worst, &others[i]))))
            merged[count++] = others[i];
    }
    for (uint32_t i = 0; i < count; i++)
        selection->selected_mass += merged[i].mass;
    selection->count = count;
    return merged;
}
