// The end of a search: masses from scores, and the best tokens or pages.
//
// The mass of a token is the mean over the views of exp(score - log-sum-exp). The best are found by a histogram and a
// selection among those at its edge, ties by the lower position; only what is handed out is sorted. Thread ownership:
// that of the search context. No allocation.
#include "index/search.h"

#include <string.h>

#define RUN 8u // sorted by insertion

float *dci_search_exps(struct index_search *search, uint32_t block)
{
    struct scored *scored = dci_scored(search, block);
    const bool is_kept = dci_search_is_kept(search, block);
    const size_t lanes = (size_t)search->views * DCI_LANES;
    float *exps =
        is_kept ? SEARCH_ROOM(search, float, ROOM_EXPS) + block * lanes : SEARCH_ROOM(search, float, ROOM_TERMS);
    if (!is_kept || !scored->counted) {
        search->index->kernel->exps16(dci_block_scores(search, block), search->views,
                                      SEARCH_ROOM(search, float, ROOM_ORIGINS), exps,
                                      scored->counted ? NULL : SEARCH_ROOM(search, float, ROOM_LANES));
        scored->counted = true;
    }
    return exps;
}

void dci_search_masses(struct index_search *search, uint32_t block)
{
    search->index->kernel->mix16(dci_search_exps(search, block), search->views,
                                 SEARCH_ROOM(search, float, ROOM_INVERSE),
                                 SEARCH_ROOM(search, float, ROOM_MASSES) + (size_t)block * DCI_LANES);
    search->settled = block + 1;
}

void dci_search_fix_inverse(struct index_search *search)
{
    const float *lanes = SEARCH_ROOM(search, float, ROOM_LANES), *rest = SEARCH_ROOM(search, float, ROOM_REST);
    const float *origins = SEARCH_ROOM(search, float, ROOM_ORIGINS);
    const float *reference = SEARCH_ROOM(search, float, ROOM_REFERENCE);
    float *inverse = SEARCH_ROOM(search, float, ROOM_INVERSE);
    const float *rough = SEARCH_ROOM(search, float, ROOM_ROUGH);
    for (uint32_t v = 0; v < search->views; v++) {
        // These sums are in units of the reference, which is not above the origin by more than exp can say.
        const float unit = dci_exp(reference[v] - origins[v]);
        const float waiting = search->weighed ? rest[v] : 0.0f;
        const float dropped = search->barred ? dci_sum_lanes(rough + (size_t)v * DCI_LANES) : 0.0f;
        const float sum = dci_sum_lanes(lanes + (size_t)v * DCI_LANES) + unit * (waiting + dropped);
        inverse[v] = sum > 0.0f ? 1.0f / (sum * (float)search->views) : 0.0f;
    }
}

// A search that was cut short: masses over what was scored, of the blocks whose scores are at hand.
static void settle_partial(struct index_search *search)
{
    uint32_t blocks = search->block_count;
    blocks = blocks < search->score_blocks ? blocks : search->score_blocks;
    if (search->phase < SEARCH_TOTALS) {
        dci_search_begin_totals(search);
    }
    for (uint32_t block = 0; search->phase <= SEARCH_TOTALS && block < blocks; block++) {
        (void)dci_search_exps(search, block);
    }
    if (search->phase < SEARCH_MASSES) {
        search->weighed = false; // what was not opened is left out
        dci_search_fix_inverse(search);
    }
    while (search->settled < blocks) {
        dci_search_masses(search, search->settled);
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

static bool is_eligible(const struct index_search *search, const struct scored *scored, uint32_t position)
{
    const struct part *part = &search->parts[scored->part];
    return position >= search->low && position < search->high &&
           (scored->cell != TREE_NONE || *dci_place(part->index, position - part->first) != TREE_NONE);
}

// A mass that is certainly reached by as many tokens as are to be selected: the one that was, when tokens were weighed
// last, in the final units.
static float known_floor(const struct index_search *search)
{
    const float *origins = SEARCH_ROOM(search, float, ROOM_ORIGINS);
    const float *reference = SEARCH_ROOM(search, float, ROOM_REFERENCE);
    const float *inverse = SEARCH_ROOM(search, float, ROOM_INVERSE);
    float least = 0.0f;
    for (uint32_t v = 0; v < search->views; v++) {
        const float unit = dci_exp(reference[v] - origins[v]) * inverse[v];
        least = v == 0 || unit < least ? unit : least;
    }
    const float rounding = 0.99f;
    return search->weighed && search->phase == SEARCH_DONE ? rounding * least * search->least : 0.0f;
}

// Histogram of the masses of tokens, to find which can be among the best `count`: all in buckets from the result on.
static uint32_t bound_of_best(struct index_search *search, uint32_t begin, uint32_t end, uint32_t count, float floor)
{
    const float *masses = SEARCH_ROOM(search, float, ROOM_MASSES);
    memset(search->counts, 0, sizeof search->counts);
    for (uint32_t block = begin; block < end; block++) {
        const float *mass = masses + (size_t)block * DCI_LANES;
        uint32_t lanes = search->index->kernel->above16(mass, floor);
        for (; lanes != 0; lanes &= lanes - 1) {
            search->counts[dci_bucket(mass[__builtin_ctz(lanes)])]++;
        }
    }
    uint32_t bound = SEARCH_BUCKETS;
    for (uint32_t sum = 0; bound > 0 && sum < count;) {
        sum += search->counts[--bound];
    }
    return bound;
}

// Candidates from settled blocks: tokens.
static uint32_t collect_tokens(struct index_search *search, uint32_t begin, uint32_t end)
{
    const float *masses = SEARCH_ROOM(search, float, ROOM_MASSES);
    struct candidate *candidates = SEARCH_ROOM(search, struct candidate, ROOM_CANDIDATES);
    const float least = dci_bucket_least(bound_of_best(search, begin, end, search->select_max, known_floor(search)));
    uint32_t count = 0;
    for (uint32_t block = begin; block < end; block++) {
        const float *mass = masses + (size_t)block * DCI_LANES;
        uint32_t lanes = search->index->kernel->above16(mass, least);
        const struct scored *scored = dci_scored(search, block);
        for (; lanes != 0; lanes &= lanes - 1) {
            const uint32_t lane = (uint32_t)__builtin_ctz(lanes);
            const uint32_t position = dci_scored_position(search, scored, lane);
            if (is_eligible(search, scored, position)) {
                candidates[count++] = (struct candidate){mass[lane], position, block, lane};
            }
        }
    }
    return count;
}

static struct index_part_page page_at(const struct index_search *search, uint32_t block, uint32_t lane)
{
    const struct scored *scored = dci_scored(search, block);
    return (struct index_part_page){dci_scored_part(search, scored, lane), dci_scored_place(search, scored, lane).page};
}

static bool is_same_page(struct index_part_page a, struct index_part_page b)
{
    return a.page == b.page && a.part == b.part;
}

// The same: one per page, of consecutive lanes.
static uint32_t collect_pages(struct index_search *search, uint32_t begin, uint32_t end)
{
    const float *masses = SEARCH_ROOM(search, float, ROOM_MASSES);
    struct candidate *candidates = SEARCH_ROOM(search, struct candidate, ROOM_CANDIDATES);
    uint32_t count = 0;
    for (uint32_t block = begin; block < end; block++) {
        const struct scored *scored = dci_scored(search, block);
        for (uint32_t lane = 0; lane < DCI_LANES; lane++) {
            const uint32_t position = dci_scored_position(search, scored, lane);
            if (!is_eligible(search, scored, position)) {
                continue;
            }
            const float mass = masses[(size_t)block * DCI_LANES + lane];
            struct candidate *last = &candidates[count == 0 ? 0 : count - 1];
            if (count > 0 && is_same_page(page_at(search, last->block, last->lane), page_at(search, block, lane))) {
                last->mass += mass;
                last->position = position < last->position ? position : last->position;
            } else {
                candidates[count++] = (struct candidate){mass, position, block, lane};
            }
        }
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

static void emit_lane(struct index_search *search, uint32_t block, uint32_t lane, uint32_t *emitted)
{
    const struct scored *scored = dci_scored(search, block);
    SEARCH_ROOM(search, struct index_selected, ROOM_SELECTED)
    [(*emitted)++] = (struct index_selected){
        dci_scored_position(search, scored, lane),
        SEARCH_ROOM(search, float, ROOM_MASSES)[(size_t)block * DCI_LANES + lane],
        dci_scored_place(search, scored, lane),
    };
}

// All of a page's tokens, from its first candidate on.
static void emit_page(struct index_search *search, const struct candidate *first, uint32_t *emitted)
{
    const struct index_part_page page = page_at(search, first->block, first->lane);
    const uint32_t step = search->index->page_tokens, own = first->position - search->parts[page.part].first;
    for (uint32_t block = first->block; block < search->settled; block++) {
        const struct scored *scored = dci_scored(search, block);
        if (scored->part != page.part ||
            (scored->cell != TREE_NONE ? scored->page != page.page : scored->place / step > own / step)) {
            break;
        }
        for (uint32_t lane = 0; lane < DCI_LANES; lane++) {
            if (is_eligible(search, scored, dci_scored_position(search, scored, lane)) &&
                is_same_page(page_at(search, block, lane), page)) {
                emit_lane(search, block, lane, emitted);
            }
        }
    }
}

static uint32_t emit(struct index_search *search, const struct candidate *candidates, uint32_t count)
{
    uint32_t emitted = 0;
    for (uint32_t i = 0; i < count; i++) {
        if (search->query.page_wise) {
            emit_page(search, &candidates[i], &emitted);
        } else {
            emit_lane(search, candidates[i].block, candidates[i].lane, &emitted);
        }
    }
    return emitted;
}

// By position: runs sorted by insertion, then merged.
static void sort_by_position(struct index_search *search, uint32_t n)
{
    struct index_selected *from = SEARCH_ROOM(search, struct index_selected, ROOM_SELECTED);
    struct index_selected *to = SEARCH_ROOM(search, struct index_selected, ROOM_SORTED);
    for (uint32_t low = 0; low < n; low += RUN) {
        const uint32_t high = low + RUN < n ? low + RUN : n;
        for (uint32_t i = low + 1; i < high; i++) {
            const struct index_selected moving = from[i];
            uint32_t at = i;
            for (; at > low && from[at - 1].position > moving.position; at--) {
                from[at] = from[at - 1];
            }
            from[at] = moving;
        }
    }
    for (uint32_t width = RUN; width < n; width *= 2) {
        for (uint32_t low = 0; low < n; low += 2 * width) {
            const uint32_t middle = low + width < n ? low + width : n, high = low + 2 * width < n ? low + 2 * width : n;
            uint32_t a = low, b = middle;
            for (uint32_t i = low; i < high; i++) {
                const bool left = b == high || (a < middle && from[a].position <= from[b].position);
                to[i] = left ? from[a++] : from[b++];
            }
        }
        struct index_selected *swapped = from;
        from = to;
        to = swapped;
    }
    search->sorted = from;
}

void index_search_finish(struct index_search *search, struct index_selection *selection,
                         const struct index_selected **tokens)
{
    assert(search->begun);
    search->begun = false;
    *selection = (struct index_selection){.partial = search->phase != SEARCH_DONE};
    if (selection->partial) {
        dci_open_flush(search);
        settle_partial(search);
    }
    const uint32_t begin = search->phase == SEARCH_ENDS ? search->block_count : search->ends_blocks;
    const uint32_t ends = begin < search->settled ? begin : search->settled;
    const float *masses = SEARCH_ROOM(search, float, ROOM_MASSES);
    double ends_mass = 0.0, selected_mass = 0.0;
    for (size_t i = 0; i < (size_t)ends * DCI_LANES; i++) {
        ends_mass += (double)masses[i];
    }
    struct candidate *candidates = SEARCH_ROOM(search, struct candidate, ROOM_CANDIDATES);
    const uint32_t found = search->query.page_wise ? collect_pages(search, ends, search->settled)
                                                   : collect_tokens(search, ends, search->settled);
    uint32_t count = found < search->select_max ? found : search->select_max;
    select_best(candidates, found, count);
    count = trim_to_coverage(search, candidates, count, (float)ends_mass);
    count = emit(search, candidates, count);
    sort_by_position(search, count);
    const struct index_selected *selected = search->sorted;
    search->least_selected = count > 0 ? selected[0].mass : 0.0f;
    for (uint32_t i = 0; i < count; i++) {
        selected_mass += (double)selected[i].mass;
        search->least_selected = selected[i].mass < search->least_selected ? selected[i].mass : search->least_selected;
    }
    selection->count = count;
    selection->selected_mass = (float)selected_mass;
    selection->ends_mass = (float)ends_mass;
    selection->scanned = search->tokens_scored;
    *tokens = selected;
}

uint32_t index_search_near(struct index_search *search, uint32_t more, struct index_part_page *pages)
{
    const float *masses = SEARCH_ROOM(search, float, ROOM_MASSES);
    const uint32_t begin = search->ends_blocks < search->settled ? search->ends_blocks : search->settled;
    uint32_t count = 0;
    if (search->query.page_wise || search->least_selected == 0.0f) {
        return 0;
    }
    const uint32_t wanted = search->select_max + more;
    const float least = dci_bucket_least(bound_of_best(search, begin, search->settled, wanted, 0.0f));
    for (uint32_t block = begin; block < search->settled; block++) {
        const float *mass = masses + (size_t)block * DCI_LANES;
        const struct scored *scored = dci_scored(search, block);
        for (uint32_t lanes = search->index->kernel->above16(mass, least); lanes != 0; lanes &= lanes - 1) {
            const uint32_t lane = (uint32_t)__builtin_ctz(lanes);
            const bool is_near = mass[lane] > 0.0f && mass[lane] < search->least_selected;
            if (!is_near || !is_eligible(search, scored, dci_scored_position(search, scored, lane))) {
                continue;
            }
            const struct index_part_page page = page_at(search, block, lane);
            if (count == 0 || !is_same_page(pages[count - 1], page)) {
                pages[count++] = page;
            }
            if (count == more) {
                return count;
            }
        }
    }
    return count;
}
