// Which cells are worth opening.
//
// First those whose best token is hoped to have the most mass, enough to fill the budget a few times. Their scores show
// how far tokens lie from their anchors (queries favour the directions in which keys vary, differently for each head
// and step) and how much mass a token must have to be selected. Then every other cell's merit is the mass that its
// tokens above this bound are expected to have, and all are opened but those that together promise next to nothing.
// Cells are chosen by bounds on buckets, never by order, so a choice does not depend on where a cell lies in memory.
// Thread ownership: that of the search context. No allocation.
#include "index/search.h"

#include <math.h>
#include <string.h>

// Tokens that are scored before merits are known: this many for each to select, and some.
#define SCOUT_PER_BUDGET 4u
#define SCOUT_TOKENS     256u
#define SCOUT_COVERAGE   1024u // at most, with a coverage target, whose budget is but a bound

// With effort 0, cells are left unopened that together promise less than this share of all mass. (A share of what is
// selected was no better: it opens most where there is least to find.)
#define LOSS_SHARE 0.002f
// Page-wise: those whose best page may not have this share of the worst selected one. Of p pages the best has between
// the mean and all of their mass; the geometric mean is taken.
#define PAGE_SHARE 0.03f

// Hopes are logs of masses. Cells within the depth of the best are looked at; a deeper look if that is not enough.
#define HOPE_DEPTH        4.0f
#define HOPE_DEPTH_GROWTH 8.0f
#define HOPE_DEPTH_MAX    1.0e4f

// The part of a reference that must be explained; its inverse is how much may be.
#define BALANCE_LEAST 0.5f

// A coverage target is taken to be reached with this to spare, as masses settle at the end only.
#define COVERAGE_MARGIN 1.005f

// Masses may change between weighing and the end, as the shares of the views do: a token below this share of the worst
// selected one's mass is taken to be out; half of it with an effort of 1.
#define BAR_SHARE 0.6f

// Blocks of anchors that are asked for ahead.
#define BLOCKS_AHEAD 3u

// A block of cells with no hope within this of the worst selected token's log mass is not looked at more closely.
#define HOPELESS 3.0f

// The least merit that is looked at, in shares of what counts; a lower one if that is not enough.
#define MERIT_STEP 0x1p-8f

uint32_t dci_bucket(float positive)
{
    uint32_t bits;
    memcpy(&bits, &positive, sizeof bits);
    const uint32_t bucket = bits >> SEARCH_BUCKET_SHIFT;
    return bucket < SEARCH_BUCKET_FIRST                    ? 0
           : bucket < SEARCH_BUCKET_FIRST + SEARCH_BUCKETS ? bucket - SEARCH_BUCKET_FIRST
                                                           : SEARCH_BUCKETS - 1;
}

static const struct dci_block *cell_block(const struct index_search *search, uint32_t block)
{
    return dci_cell_block(search, block)->block;
}

static float *promises_of(struct index_search *search, uint32_t block)
{
    if (block >= search->center_blocks) {
        return SEARCH_ROOM(search, float, ROOM_BLOCK);
    }
    return SEARCH_ROOM(search, float, ROOM_PROMISES) + (size_t)block * search->views * DCI_LANES;
}

void dci_rank_centers(struct index_search *search, uint32_t block)
{
    if (block + BLOCKS_AHEAD < search->cell_blocks) {
        dci_prefetch(cell_block(search, block + BLOCKS_AHEAD), dci_block_bytes(search->index));
    }
    const bool is_kept = block < search->center_blocks;
    float *centers = is_kept ? SEARCH_ROOM(search, float, ROOM_CENTERS) + (size_t)block * search->views * DCI_LANES
                             : SEARCH_ROOM(search, float, ROOM_ANCHORS);
    search->index->kernel->promise16(dci_part_views(search, dci_cell_block(search, block)->part),
                                     cell_block(search, block), centers, SEARCH_ROOM(search, float, ROOM_SPREADS));
}

static void clear_lanes(struct index_search *search, enum room_name room)
{
    memset(SEARCH_ROOM(search, float, room), 0, search->views * DCI_LANES * sizeof(float));
}

void dci_rank_begin_survey(struct index_search *search)
{
    const float *promised = SEARCH_ROOM(search, float, ROOM_SPREADS), *tops = SEARCH_ROOM(search, float, ROOM_TOPS);
    for (uint32_t v = 0; v < search->views; v++) {
        const float tree = dci_max_lanes(promised + (size_t)v * DCI_LANES);
        const float scored = dci_max_lanes(tops + (size_t)v * DCI_LANES);
        SEARCH_ROOM(search, float, ROOM_REFERENCE)[v] = scored > tree ? scored : tree;
    }
    clear_lanes(search, ROOM_LANES);
}

void dci_rank_survey(struct index_search *search, uint32_t block)
{
    search->index->kernel->survey16(&search->seen, cell_block(search, block), dci_block_centers(search, block),
                                    SEARCH_ROOM(search, float, ROOM_REFERENCE), SEARCH_ROOM(search, float, ROOM_LANES),
                                    promises_of(search, block));
}

// The log-sum-exp of sinks, window, head and tail as scored, and of the tree as estimated.
void dci_rank_fix_reference(struct index_search *search)
{
    float *reference = SEARCH_ROOM(search, float, ROOM_REFERENCE), *lanes = SEARCH_ROOM(search, float, ROOM_LANES);
    for (uint32_t block = 0; block < search->block_count; block++) {
        search->index->kernel->exps16(dci_block_scores(search, block), search->views, reference,
                                      SEARCH_ROOM(search, float, ROOM_TERMS), lanes);
    }
    for (uint32_t v = 0; v < search->views; v++) {
        const float sum = dci_sum_lanes(lanes + (size_t)v * DCI_LANES);
        SEARCH_ROOM(search, float, ROOM_SHIFTS)[v] = reference[v];
        reference[v] += sum > 0.0f ? dci_log(sum) : 0.0f;
    }
    search->highest_hope = DCI_HIDDEN;
}

void dci_rank_hopes(struct index_search *search, uint32_t block)
{
    float *hopes = SEARCH_ROOM(search, float, ROOM_MERITS) + (size_t)block * DCI_LANES;
    search->index->kernel->hopes16(&search->seen, cell_block(search, block), dci_block_centers(search, block),
                                   SEARCH_ROOM(search, float, ROOM_REFERENCE), hopes);
    const float highest = dci_max_lanes(hopes);
    search->highest_hope = highest > search->highest_hope ? highest : search->highest_hope;
}

static uint64_t effort_tokens(const struct index_search *search)
{
    const double share = search->query.effort == 0.0f ? 1.0 : (double)search->query.effort;
    return (uint64_t)ceil(share * (double)search->tree_tokens);
}

// Tokens that must be scored in the tree to fill the budget; with a coverage target it need not be filled.
static uint64_t tokens_missing(const struct index_search *search)
{
    const uint32_t budget = search->query.coverage > 0.0f ? 0 : search->query.budget;
    return budget > search->eligible_scored ? budget - search->eligible_scored : 0;
}

// Lines up the cells whose value is at least `bound` and that are not taken, until they hold so many tokens. Returns
// how many they hold.
static uint64_t line_up_from(struct index_search *search, float bound, uint64_t most)
{
    float *values = SEARCH_ROOM(search, float, ROOM_MERITS);
    uint32_t *slots = SEARCH_ROOM(search, uint32_t, ROOM_TO_OPEN);
    uint64_t tokens = 0;
    for (uint32_t block = 0; block < search->cell_blocks && tokens < most; block++) {
        float *lanes = values + (size_t)block * DCI_LANES;
        const float *rows = cell_block(search, block)->rows;
        uint32_t found = search->index->kernel->above16(lanes, bound);
        for (; found != 0 && tokens < most; found &= found - 1) {
            const uint32_t lane = (uint32_t)__builtin_ctz(found);
            slots[search->to_open++] = block * DCI_LANES + lane;
            lanes[lane] = DCI_TAKEN;
            tokens += (uint64_t)rows[lane];
        }
    }
    return tokens;
}

// Buckets by the distance from the highest hope, those of cells within `depth` of it. Returns their tokens.
static uint64_t count_hopes(struct index_search *search, float depth)
{
    const float *hopes = SEARCH_ROOM(search, float, ROOM_MERITS), highest = search->highest_hope;
    uint64_t tokens = 0;
    memset(search->counts, 0, sizeof search->counts);
    for (uint32_t block = 0; block < search->cell_blocks; block++) {
        const float *lanes = hopes + (size_t)block * DCI_LANES, *rows = cell_block(search, block)->rows;
        uint32_t found = search->index->kernel->above16(lanes, highest - depth);
        for (; found != 0; found &= found - 1) {
            const uint32_t lane = (uint32_t)__builtin_ctz(found);
            const float steps = (highest - lanes[lane]) * ((float)SEARCH_BUCKETS / depth);
            const bool is_inside = steps >= 0.0f && steps < (float)(SEARCH_BUCKETS - 1);
            const uint32_t bucket = is_inside ? (uint32_t)steps : steps < 0.0f ? 0 : SEARCH_BUCKETS - 1;
            search->counts[bucket] += (uint32_t)rows[lane];
            tokens += (uint32_t)rows[lane];
        }
    }
    return tokens;
}

void dci_rank_open_best(struct index_search *search)
{
    uint64_t wanted = (uint64_t)SCOUT_PER_BUDGET * search->query.budget + SCOUT_TOKENS;
    if (search->query.coverage > 0.0f && wanted > SCOUT_COVERAGE) {
        wanted = SCOUT_COVERAGE;
    }
    const uint64_t most = effort_tokens(search), least = tokens_missing(search);
    wanted = wanted > most ? most : wanted;
    wanted = wanted < least ? least : wanted;
    float depth = HOPE_DEPTH;
    search->to_open = 0;
    if (!search->everything) {
        while (count_hopes(search, depth) < wanted && depth < HOPE_DEPTH_MAX) {
            depth *= HOPE_DEPTH_GROWTH;
        }
    }
    if (search->everything || depth >= HOPE_DEPTH_MAX) {
        (void)line_up_from(search, 0.5f * DCI_HIDDEN, UINT64_MAX);
        return;
    }
    uint32_t bucket = 0;
    for (uint64_t tokens = search->counts[0]; tokens < wanted;) {
        tokens += search->counts[++bucket];
    }
    (void)line_up_from(search, search->highest_hope - (float)(bucket + 1) * (depth / (float)SEARCH_BUCKETS),
                       UINT64_MAX);
}

// The first time, references are not below what was scored, and become the origins.
static void place_origins(struct index_search *search)
{
    const float *tops = SEARCH_ROOM(search, float, ROOM_TOPS);
    float *reference = SEARCH_ROOM(search, float, ROOM_REFERENCE);
    for (uint32_t v = 0; v < search->views; v++) {
        const float top = dci_max_lanes(tops + (size_t)v * DCI_LANES);
        float *shift = &SEARCH_ROOM(search, float, ROOM_SHIFTS)[v];
        reference[v] = top > reference[v] ? top : reference[v];
        *shift = dci_exp(*shift - reference[v]);
    }
    memcpy(SEARCH_ROOM(search, float, ROOM_ORIGINS), reference, search->views * sizeof reference[0]);
    clear_lanes(search, ROOM_LANES);
    clear_lanes(search, ROOM_SPREADS);
    memset(SEARCH_ROOM(search, float, ROOM_SEEN), 0, search->views * sizeof(float));
    search->placed = true;
}

// Do sums of masses matter, or just what the worst selected token has?
static bool needs_sums(const struct index_search *search)
{
    return search->query.page_wise || search->query.coverage > 0.0f;
}

void dci_rank_begin_weighing(struct index_search *search)
{
    if (!search->placed) {
        place_origins(search);
    }
    for (uint32_t v = 0; v < search->views; v++) {
        SEARCH_ROOM(search, float, ROOM_UNITS)
        [v] = dci_exp(SEARCH_ROOM(search, float, ROOM_ORIGINS)[v] - SEARCH_ROOM(search, float, ROOM_REFERENCE)[v]);
    }
    if (needs_sums(search)) {
        memset(search->counts, 0, sizeof search->counts);
        memset(search->weights, 0, sizeof search->weights);
    } else {
        memset(search->tokens_of, 0, sizeof search->tokens_of);
    }
    search->bar_bucket = search->above_bar = 0;
    search->ends_sum = 0.0;
}

static void measure_spread(struct index_search *search, const struct scored *scored, const float *scores)
{
    const uint32_t block = scored->place / DCI_LANES, lane = scored->place % DCI_LANES;
    const float unit = cell_block(search, block)->unit[lane];
    if (!(unit > 0x1p-40f)) {
        return;
    }
    const float weight = 1.0f / unit * (1.0f / unit);
    search->index->kernel->spread16(search->views, scores, dci_block_centers(search, block) + lane, weight,
                                    SEARCH_ROOM(search, float, ROOM_SPREADS));
    const size_t heads = search->query.head_count;
    float *seen = SEARCH_ROOM(search, float, ROOM_SEEN);
    for (uint32_t q = 0; q < search->query.query_count; q++) { // heads of a query position see the same
        const uint32_t lanes = search->index->kernel->above16(scores + q * heads * DCI_LANES, 0.5f * DCI_HIDDEN);
        seen[q] += (float)__builtin_popcount(lanes);
    }
}

void dci_rank_weigh(struct index_search *search, uint32_t block)
{
    const struct scored *scored = dci_scored(search, block);
    const bool is_new = !scored->counted;
    float *masses = SEARCH_ROOM(search, float, ROOM_MASSES) + (size_t)block * DCI_LANES;
    search->index->kernel->mix16(dci_search_exps(search, block), search->views, SEARCH_ROOM(search, float, ROOM_UNITS),
                                 masses);
    if (block < search->ends_blocks) {
        search->ends_sum += (double)dci_sum_lanes(masses);
        return;
    }
    if (is_new && scored->cell < SEARCH_LOOSE && !search->barred) { // what passes the sieve is not like all
        measure_spread(search, scored, dci_block_scores(search, block));
    }
    if (!needs_sums(search)) {
        dci_rank_raise_bar(search, masses);
    }
    for (uint32_t lane = 0; needs_sums(search) && !search->query.page_wise && lane < DCI_LANES; lane++) {
        const uint32_t bucket = dci_bucket(masses[lane]);
        search->counts[bucket]++;
        search->weights[bucket] += masses[lane];
    }
}

static void count_page(struct index_search *search, float mass)
{
    search->counts[dci_bucket(mass)]++;
    search->weights[dci_bucket(mass)] += mass;
}

// Masses of whole pages into the histogram. Lanes of a page follow each other.
static void count_pages(struct index_search *search)
{
    const float *masses = SEARCH_ROOM(search, float, ROOM_MASSES);
    uint32_t page = TREE_NONE, part = 0;
    float sum = 0.0f;
    for (uint32_t block = search->ends_blocks; block < search->block_count; block++) {
        const struct scored *scored = dci_scored(search, block);
        for (uint32_t lane = 0; lane < DCI_LANES; lane++) {
            const float mass = masses[(size_t)block * DCI_LANES + lane];
            if (!(mass > 0.0f)) { // does not count
                continue;
            }
            const uint32_t own = dci_scored_place(search, scored, lane).page;
            const bool is_same = own == page && scored->part == part;
            if (!is_same && page != TREE_NONE) {
                count_page(search, sum);
            }
            sum = is_same ? sum + mass : mass;
            page = own;
            part = scored->part;
        }
    }
    if (page != TREE_NONE) {
        count_page(search, sum);
    }
}

static void fix_spread(struct index_search *search)
{
    const struct index_query *query = &search->query;
    const struct index *index = search->index;
    float *norms = SEARCH_ROOM(search, float, ROOM_NORMS);
    const float *spreads = SEARCH_ROOM(search, float, ROOM_SPREADS);
    for (uint32_t v = 0; v < search->views; v++) {
        const float seen = SEARCH_ROOM(search, float, ROOM_SEEN)[v / query->head_count];
        if (!(seen > 0.0f)) {
            continue;
        }
        const float *vector = query->queries + (size_t)v * index->head_dim;
        const float norm = query->scale * sqrtf(index->kernel->dot(vector, vector, index->head_dim));
        const float mean = dci_sum_lanes(spreads + (size_t)v * DCI_LANES) / seen;
        float factor = norm > 0.0f ? sqrtf(mean) / norm : SEARCH_SPREAD_PRIOR;
        factor = factor < SEARCH_SPREAD_LEAST ? SEARCH_SPREAD_LEAST : factor;
        factor = factor > SEARCH_SPREAD_MOST ? SEARCH_SPREAD_MOST : factor;
        norms[v] = norm * factor;
    }
}

// The smallest float of a bucket.
float dci_bucket_least(uint32_t bucket)
{
    const uint32_t bits = bucket == 0 ? 0 : (bucket + SEARCH_BUCKET_FIRST) << SEARCH_BUCKET_SHIFT;
    float least;
    memcpy(&least, &bits, sizeof least);
    return least;
}

// The bucket of the worst of the best so far: of as many as are to be selected, or as reach the coverage target (the
// reference makes all masses of a view add up to 1).
static uint32_t worst_bucket(const struct index_search *search)
{
    const double target = (double)search->query.coverage * search->views - search->ends_sum;
    uint32_t bucket = SEARCH_BUCKETS, count = 0;
    double sum = 0.0;
    while (bucket > 0 && count < search->select_max && (search->query.coverage == 0.0f || sum < target)) {
        bucket--;
        count += search->counts[bucket];
        sum += (double)search->weights[bucket];
    }
    return bucket < SEARCH_BUCKETS ? bucket : SEARCH_BUCKETS - 1;
}

// What a coverage target is judged by: masses of the best so far, and of all that was scored.
static void sum_up(struct index_search *search)
{
    search->selected_sum = 0.0;
    uint32_t left = search->select_max;
    for (uint32_t b = SEARCH_BUCKETS; b > search->bar_bucket && left > 0;
         b--) { // of the last one only what is selected
        const uint32_t count = search->counts[b - 1], taken = count < left ? count : left;
        search->selected_sum += count == 0 ? 0.0 : (double)search->weights[b - 1] * taken / count;
        left -= taken;
    }
    search->scored_sum = search->waiting_sum = 0.0;
    const float *lanes = SEARCH_ROOM(search, float, ROOM_LANES), *rough = SEARCH_ROOM(search, float, ROOM_ROUGH);
    for (uint32_t v = 0; v < search->views; v++) {
        const double unit = (double)SEARCH_ROOM(search, float, ROOM_UNITS)[v];
        search->scored_sum += unit * (double)dci_sum_lanes(lanes + (size_t)v * DCI_LANES);
        search->scored_sum += search->barred ? (double)dci_sum_lanes(rough + (size_t)v * DCI_LANES) : 0.0;
    }
}

// The mass of the worst of the best so far, to a bucket.
void dci_rank_fix_weights(struct index_search *search)
{
    if (!search->barred) {
        fix_spread(search);
    }
    if (search->query.page_wise) {
        count_pages(search);
    }
    if (needs_sums(search)) {
        memcpy(search->tokens_of, search->counts, sizeof search->counts);
        search->bar_bucket = worst_bucket(search);
        for (uint32_t b = search->bar_bucket + 1; b < SEARCH_BUCKETS; b++) {
            search->above_bar += search->counts[b];
        }
    }
    search->least = dci_bucket_least(search->bar_bucket);
    search->log_least = dci_log(search->least > 0x1p-100f ? search->least : 0x1p-100f);
    if (needs_sums(search)) {
        sum_up(search);
    }
}

static float bar_share(const struct index_search *search)
{
    return BAR_SHARE * (1.0f - 0.5f * search->query.effort);
}

void dci_rank_raise_bar(struct index_search *search, const float *masses)
{
    uint32_t lanes = search->index->kernel->above16(masses, dci_bucket_least(search->bar_bucket));
    for (; lanes != 0; lanes &= lanes - 1) {
        const uint32_t bucket = dci_bucket(masses[__builtin_ctz(lanes)]);
        search->tokens_of[bucket]++;
        search->above_bar += bucket > search->bar_bucket ? 1 : 0;
    }
    while (search->above_bar >= search->select_max && search->above_bar > 0) {
        search->above_bar -= search->tokens_of[++search->bar_bucket];
    }
    search->bar = bar_share(search) * dci_bucket_least(search->bar_bucket);
}

static void work_out(struct index_search *search, uint32_t block, float *merits)
{
    search->index->kernel->merits16(&search->seen, cell_block(search, block), dci_block_centers(search, block),
                                    SEARCH_ROOM(search, float, ROOM_REFERENCE), search->log_least, merits,
                                    promises_of(search, block));
}

// What is promised of blocks that is not kept.
static void promise_again(struct index_search *search, uint32_t block)
{
    float unused[DCI_LANES] = {0};
    if (block >= search->center_blocks) {
        work_out(search, block, unused);
    }
}

// A block without hope: its cells' merits are nothing, and what the survey promised of them is good enough.
static bool skips(struct index_search *search, uint32_t block)
{
    float *kept = SEARCH_ROOM(search, float, ROOM_MERITS) + (size_t)block * DCI_LANES;
    if (search->rounds > 1 || search->balanced || search->query.page_wise || block >= search->center_blocks ||
        search->index->kernel->above16(kept, search->log_least - HOPELESS) != 0) {
        return false;
    }
    const float *shifts = SEARCH_ROOM(search, float, ROOM_SHIFTS);
    float *promises = promises_of(search, block);
    for (uint32_t v = 0; v < search->views; v++, promises += DCI_LANES) {
        for (uint32_t lane = 0; lane < DCI_LANES; lane++) {
            promises[lane] *= shifts[v];
        }
    }
    for (uint32_t lane = 0; lane < DCI_LANES; lane++) {
        kept[lane] = kept[lane] == DCI_TAKEN || !(cell_block(search, block)->rows[lane] > 0.0f) ? DCI_TAKEN : 0.0f;
    }
    return true;
}

static void note_waiting(struct index_search *search, const float *masses, const float *merits)
{
    for (uint32_t lane = 0; lane < DCI_LANES; lane++) {
        search->waiting_sum += merits[lane] >= 0.0f ? (double)masses[lane] : 0.0;
    }
}

// Page-wise: mass of the best page.
static void spread_over_pages(const struct index_search *search, uint32_t block, const float *masses, float *merits)
{
    const float *rows = cell_block(search, block)->rows;
    for (uint32_t lane = 0; lane < DCI_LANES; lane++) {
        if (merits[lane] != DCI_TAKEN) {
            merits[lane] = masses[lane] / sqrtf(ceilf(rows[lane] / (float)search->index->page_tokens));
        }
    }
}

void dci_rank_merits(struct index_search *search, uint32_t block)
{
    float *merits = SEARCH_ROOM(search, float, ROOM_MERITS) + (size_t)block * DCI_LANES;
    if (!skips(search, block)) {
        work_out(search, block, merits);
    }
    if (search->query.coverage == 0.0f && !search->query.page_wise) {
        return;
    }
    const float *promises = promises_of(search, block);
    float masses[DCI_LANES] = {0};
    for (uint32_t v = 0; v < search->views; v++, promises += DCI_LANES) {
        search->index->kernel->add(masses, promises, DCI_LANES);
    }
    if (search->query.page_wise) {
        spread_over_pages(search, block, masses, merits);
    }
    note_waiting(search, masses, merits);
}

// Merits of at least `floor` by bucket: their sums and their cells' tokens. Returns the tokens.
static uint64_t count_merits(struct index_search *search, float floor)
{
    const float *merits = SEARCH_ROOM(search, float, ROOM_MERITS);
    uint64_t tokens = 0;
    memset(search->counts, 0, sizeof search->counts);
    memset(search->weights, 0, sizeof search->weights);
    for (uint32_t block = 0; block < search->cell_blocks; block++) {
        const float *lanes = merits + (size_t)block * DCI_LANES, *rows = cell_block(search, block)->rows;
        uint32_t found = search->index->kernel->above16(lanes, floor);
        for (; found != 0; found &= found - 1) {
            const uint32_t lane = (uint32_t)__builtin_ctz(found);
            search->weights[dci_bucket(lanes[lane])] += lanes[lane];
            search->counts[dci_bucket(lanes[lane])] += (uint32_t)rows[lane];
            tokens += (uint32_t)rows[lane];
        }
    }
    return tokens;
}

// The lowest bucket whose cells are opened when nothing but their promise counts.
static uint32_t bound_by_promise(const struct index_search *search)
{
    if (search->query.page_wise) {
        const uint32_t bound = dci_bucket(PAGE_SHARE * search->least);
        return bound < SEARCH_BUCKETS ? bound : SEARCH_BUCKETS - 1;
    }
    const double loss = (double)LOSS_SHARE * search->views;
    double sum = 0.0;
    uint32_t bound = 0;
    while (bound < SEARCH_BUCKETS && (sum += (double)search->weights[bound]) <= loss) {
        bound++;
    }
    return bound;
}

// The highest bucket from which on at least this many tokens are opened.
static uint32_t bound_by_tokens(const struct index_search *search, uint64_t tokens)
{
    uint32_t bound = SEARCH_BUCKETS;
    for (uint64_t sum = 0; bound > 0 && sum < tokens;) {
        sum += search->counts[--bound];
    }
    return bound;
}

static bool covers_enough(const struct index_search *search)
{
    const double coverage = (double)(COVERAGE_MARGIN * search->query.coverage);
    return coverage > 0.0 && tokens_missing(search) == 0 &&
           search->ends_sum + search->selected_sum >= coverage * (search->scored_sum + search->waiting_sum);
}

// Do masses in units of the references say which tokens have a chance? A view's reference is right when what was
// scored, and what unopened cells can add to it without tokens better than the best so far, make up 1. Where a
// reference is far off (its promises were too high), its view's tokens count for more or less in the end than they seem
// to; it is put right.
static bool balance(struct index_search *search)
{
    const float *top = SEARCH_ROOM(search, float, ROOM_TOPS);
    const float *scored = SEARCH_ROOM(search, float, ROOM_LANES), *merits = SEARCH_ROOM(search, float, ROOM_MERITS);
    float *reference = SEARCH_ROOM(search, float, ROOM_REFERENCE), *best = SEARCH_ROOM(search, float, ROOM_WEIGHTS);
    float *sums = SEARCH_ROOM(search, float, ROOM_TERMS);
    bool is_right = true;
    for (uint32_t v = 0; v < search->views; v++) {
        best[v] = dci_exp(dci_max_lanes(top + (size_t)v * DCI_LANES) - reference[v]);
    }
    memcpy(sums, scored, search->views * DCI_LANES * sizeof sums[0]);
    for (uint32_t block = 0; block < search->cell_blocks; block++) {
        promise_again(search, block);
        search->index->kernel->balance16(search->views, promises_of(search, block), merits + (size_t)block * DCI_LANES,
                                         cell_block(search, block)->rows, best, sums);
    }
    for (uint32_t v = 0; v < search->views; v++) {
        const float sum = dci_sum_lanes(sums + (size_t)v * DCI_LANES);
        is_right = is_right && !(sum > 0.0f && (sum < BALANCE_LEAST || sum > 1.0f / BALANCE_LEAST));
    }
    for (uint32_t v = 0; !is_right && v < search->views; v++) {
        const float sum = dci_sum_lanes(sums + (size_t)v * DCI_LANES);
        reference[v] += sum > 0.0f ? dci_log(sum) : 0.0f;
    }
    return is_right;
}

enum dci_pick dci_rank_pick(struct index_search *search)
{
    search->to_open = 0;
    search->weighed = true;
    if (!search->balanced) {
        search->balanced = true;
        if (!balance(search)) {
            return PICK_AGAIN;
        }
    }
    if (!search->barred) {
        clear_lanes(search, ROOM_ROUGH);
    }
    if (!search->barred && !search->query.page_wise && tokens_missing(search) == 0) {
        search->barred = true;
        search->bar = bar_share(search) * search->least;
        dci_open_begin_sieve(search);
    }
    if ((search->rounds > 1 && covers_enough(search)) ||
        (search->rounds > 1 && search->query.coverage == 0.0f && tokens_missing(search) == 0)) {
        return PICK_NONE;
    }
    // What is missing, and as much again where tokens that do not count lie among them.
    uint64_t wanted = tokens_missing(search);
    wanted += wanted == 0 ? 0 : search->opened_tokens;
    const uint64_t most = effort_tokens(search);
    if (search->query.effort > 0.0f && most > search->opened_tokens && most - search->opened_tokens > wanted) {
        wanted = most - search->opened_tokens;
        if (search->query.coverage > 0.0f && wanted > search->opened_tokens + SCOUT_TOKENS) {
            wanted = search->opened_tokens + SCOUT_TOKENS; // then look whether it is enough
        }
    }
    // Merits below the floor are not looked at: together they are next to nothing.
    const float cells = (float)(search->cell_blocks * DCI_LANES);
    float floor = MERIT_STEP * LOSS_SHARE / cells;
    while (count_merits(search, floor) < wanted && floor > 0.0f) {
        floor = floor > 0x1p-100f ? floor * MERIT_STEP : 0.0f;
    }
    uint32_t bound = search->query.effort > 0.0f ? SEARCH_BUCKETS : bound_by_promise(search);
    const uint32_t needed = bound_by_tokens(search, wanted);
    bound = needed < bound ? needed : bound;
    if (bound < SEARCH_BUCKETS) {
        const uint64_t tokens = line_up_from(search, dci_bucket_least(bound == 0 ? 1 : bound), UINT64_MAX);
        if (bound == 0 && tokens < wanted) { // next to nothing, all of them: any will do, the first ones do
            (void)line_up_from(search, 0.0f, wanted - tokens);
        }
    }
    return search->to_open > 0 ? PICK_SOME : PICK_NONE;
}

// What was not opened holds tokens of sinks and window too, and tokens that are not seen: the share that counts.
static float waiting_share(const struct part *part)
{
    const uint32_t waiting = part->tree_tokens - part->tree_opened;
    const uint32_t left = part->visible > part->tokens_scored ? part->visible - part->tokens_scored : 0;
    return left < waiting ? (float)left / (float)waiting : 1.0f;
}

void dci_rank_rest(struct index_search *search, uint32_t block)
{
    const struct part *part = &search->parts[dci_cell_block(search, block)->part];
    const float *lanes = SEARCH_ROOM(search, float, ROOM_SPREADS);
    promise_again(search, block);
    search->index->kernel->rest16(search->views, promises_of(search, block),
                                  SEARCH_ROOM(search, float, ROOM_MERITS) + (size_t)block * DCI_LANES,
                                  SEARCH_ROOM(search, float, ROOM_SPREADS));
    if (block + 1 < part->cell_end) {
        return;
    }
    const float share = waiting_share(part);
    for (uint32_t v = 0; v < search->views; v++) {
        SEARCH_ROOM(search, float, ROOM_REST)[v] += share * dci_sum_lanes(lanes + (size_t)v * DCI_LANES);
    }
    clear_lanes(search, ROOM_SPREADS);
}
