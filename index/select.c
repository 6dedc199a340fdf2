// The end of a search: masses from scores, and the best tokens or pages.
//
// The mass of a token is the mean over the views of exp(score - log-sum-exp). The best are found by a selection, ties
// by the lower position; only what is handed out is sorted. Thread ownership: that of the search context. No
// allocation.
#include "index/search.h"

#include <string.h>

void dci_search_fix_inverse(struct index_search *search)
{
    const float *total = SEARCH_ROOM(search, float, ROOM_TOTAL), *rest = SEARCH_ROOM(search, float, ROOM_REST);
    float *inverse = SEARCH_ROOM(search, float, ROOM_INVERSE);
    const float share = dci_rank_waiting_share(search);
    for (uint32_t v = 0; v < search->views; v++) {
        const float sum = total[v] + share * rest[v];
        inverse[v] = sum > 0.0f ? 1.0f / (sum * (float)search->views) : 0.0f;
    }
}

void dci_search_settle(struct index_search *search, uint32_t block)
{
    const float *scores = dci_search_block_scores(search, block);
    search->index->kernel->weigh16(scores, search->views, SEARCH_ROOM(search, float, ROOM_TOP),
                                   SEARCH_ROOM(search, float, ROOM_INVERSE),
                                   SEARCH_ROOM(search, float, ROOM_MASSES) + (size_t)block * DCI_LANES);
    search->settled = block + 1;
}

// A search that was cut short: masses over what was scored, of the blocks whose scores are at hand.
static void settle_partial(struct index_search *search)
{
    if (search->phase < SEARCH_SETTLE) {
        float *rest = SEARCH_ROOM(search, float, ROOM_REST);
        memset(rest, 0, search->views * sizeof rest[0]);
        dci_search_fix_inverse(search);
    }
    uint32_t blocks = search->scored / DCI_LANES;
    blocks = blocks < search->score_blocks ? blocks : search->score_blocks;
    while (search->settled < blocks) {
        dci_search_settle(search, search->settled);
    }
}

static bool is_better(const struct candidate *a, const struct candidate *b)
{
    return a->mass > b->mass || (a->mass == b->mass && a->position < b->position);
}

static void swap(struct candidate *a, struct candidate *b)
{
    const struct candidate t = *a;
    *a = *b;
    *b = t;
}

// Brings the best `count` to the front.
static void select_best(struct candidate *items, uint32_t n, uint32_t count)
{
    uint32_t low = 0, high = n;
    for (uint64_t round = 0; high - low > 1 && count > low && count < high; round++) {
        const uint32_t pick = low + (uint32_t)(dci_mix(round ^ ((uint64_t)low << 32)) % (high - low));
        swap(&items[pick], &items[high - 1]);
        uint32_t store = low;
        for (uint32_t i = low; i + 1 < high; i++) {
            if (is_better(&items[i], &items[high - 1])) {
                swap(&items[i], &items[store++]);
            }
        }
        swap(&items[store], &items[high - 1]);
        if (count <= store) {
            high = store;
        } else {
            low = store + 1;
        }
    }
}

// Moves the root of a heap (worst on top) of n items down to where it belongs.
static void sift(struct candidate *items, uint32_t at, uint32_t n)
{
    const struct candidate moving = items[at];
    for (uint32_t child; (child = 2 * at + 1) < n; at = child) {
        if (child + 1 < n && is_better(&items[child], &items[child + 1])) {
            child++;
        }
        if (!is_better(&moving, &items[child])) {
            break;
        }
        items[at] = items[child];
    }
    items[at] = moving;
}

static void sort_best_first(struct candidate *items, uint32_t n)
{
    for (uint32_t i = n / 2; i > 0; i--) {
        sift(items, i - 1, n);
    }
    for (uint32_t left = n; left > 1; left--) {
        swap(&items[0], &items[left - 1]);
        sift(items, 0, left - 1);
    }
}

static uint32_t page_of(const struct index *index, uint32_t position)
{
    return dci_token(index, position)->page[index->column];
}

// Candidates from the settled entries: tokens, or page-wise one per run of entries of a page.
static uint32_t collect(struct index_search *search)
{
    const struct index *index = search->index;
    const uint32_t *positions = SEARCH_ROOM(search, uint32_t, ROOM_POSITIONS);
    const float *masses = SEARCH_ROOM(search, float, ROOM_MASSES);
    struct candidate *candidates = SEARCH_ROOM(search, struct candidate, ROOM_CANDIDATES);
    const uint32_t begin = search->phase == SEARCH_ENDS ? search->entry_count : search->ends_count;
    const uint32_t end = search->settled * DCI_LANES;
    uint32_t count = 0, page = TREE_NONE;
    for (uint32_t e = begin; e < end; e++) {
        const uint32_t position = positions[e];
        if (position == TREE_NONE) {
            continue;
        }
        if (!search->query.page_wise) {
            candidates[count++] = (struct candidate){masses[e], position, e};
            continue;
        }
        if (page_of(index, position) == page) {
            struct candidate *last = &candidates[count - 1];
            last->mass += masses[e];
            last->position = position < last->position ? position : last->position;
            continue;
        }
        page = page_of(index, position);
        candidates[count++] = (struct candidate){masses[e], position, e};
    }
    return count;
}

// How many of the best candidates reach the coverage asked for together with sinks and window.
static uint32_t trim_to_coverage(const struct index_search *search, struct candidate *candidates, uint32_t count,
                                 float ends_mass)
{
    const float coverage = search->query.coverage;
    if (coverage == 0.0f) {
        return count;
    }
    sort_best_first(candidates, count);
    double sum = (double)ends_mass;
    uint32_t needed = 0;
    while (needed < count && sum < (double)coverage) {
        sum += (double)candidates[needed++].mass;
    }
    return needed;
}

static uint32_t emit(struct index_search *search, const struct candidate *candidates, uint32_t count)
{
    const struct index *index = search->index;
    const uint32_t *positions = SEARCH_ROOM(search, uint32_t, ROOM_POSITIONS);
    const float *masses = SEARCH_ROOM(search, float, ROOM_MASSES);
    struct index_selected *out = SEARCH_ROOM(search, struct index_selected, ROOM_SELECTED);
    const uint32_t end = search->settled * DCI_LANES;
    uint32_t emitted = 0;
    for (uint32_t i = 0; i < count; i++) {
        __builtin_prefetch(dci_token(index, positions[candidates[i].entry]));
    }
    for (uint32_t i = 0; i < count; i++) {
        const uint32_t page = page_of(index, positions[candidates[i].entry]);
        for (uint32_t e = candidates[i].entry; e < end; e++) {
            const uint32_t position = positions[e];
            if (position == TREE_NONE || page_of(index, position) != page) {
                if (position != TREE_NONE) {
                    break;
                }
                continue;
            }
            const struct token *token = dci_token(index, position);
            out[emitted++] = (struct index_selected){position, masses[e], {page, token->row[index->column]}};
            if (!search->query.page_wise) {
                break;
            }
        }
    }
    return emitted;
}

// By position: radix sort over its three bytes.
static void sort_by_position(struct index_search *search, uint32_t n)
{
    struct index_selected *from = SEARCH_ROOM(search, struct index_selected, ROOM_SELECTED);
    struct index_selected *to = SEARCH_ROOM(search, struct index_selected, ROOM_SORTED);
    for (uint32_t shift = 0; shift < 32; shift += 8) { // an even number of passes ends where it began
        uint32_t starts[257] = {0};
        for (uint32_t i = 0; i < n; i++) {
            starts[((from[i].position >> shift) & 0xffu) + 1]++;
        }
        for (uint32_t b = 0; b < 256; b++) {
            starts[b + 1] += starts[b];
        }
        for (uint32_t i = 0; i < n; i++) {
            to[starts[(from[i].position >> shift) & 0xffu]++] = from[i];
        }
        struct index_selected *swapped = from;
        from = to;
        to = swapped;
    }
}

void index_search_finish(struct index_search *search, struct index_selection *selection,
                         const struct index_selected **tokens)
{
    assert(search->begun);
    search->begun = false;
    *selection = (struct index_selection){.partial = search->phase != SEARCH_DONE};
    if (selection->partial) {
        settle_partial(search);
    }
    const float *masses = SEARCH_ROOM(search, float, ROOM_MASSES);
    const uint32_t settled = search->settled * DCI_LANES;
    const uint32_t ends = search->phase == SEARCH_ENDS ? settled : search->ends_count;
    double ends_mass = 0.0, selected_mass = 0.0;
    for (uint32_t e = 0; e < ends && e < settled; e++) {
        ends_mass += (double)masses[e];
    }
    struct candidate *candidates = SEARCH_ROOM(search, struct candidate, ROOM_CANDIDATES);
    const uint32_t found = collect(search);
    uint32_t count = found < search->best_room ? found : search->best_room;
    select_best(candidates, found, count);
    count = trim_to_coverage(search, candidates, count, (float)ends_mass);
    count = emit(search, candidates, count);
    sort_by_position(search, count);
    struct index_selected *selected = SEARCH_ROOM(search, struct index_selected, ROOM_SELECTED);
    for (uint32_t i = 0; i < count; i++) {
        selected_mass += (double)selected[i].mass;
    }
    selection->count = count;
    selection->selected_mass = (float)selected_mass;
    selection->ends_mass = (float)ends_mass;
    selection->scanned = search->tokens_scored;
    *tokens = selected;
}
