// What is worth opening: estimates of the leaf pages from their sketches, the queue, and when to stop.
//
// A page's scores for one view are taken as spread around q . mean with a deviation proportional to
// |q| * radius / sqrt(head_dim). The factor is measured anew by every search, per view, on a sample of tokens: keys
// vary most in few directions and queries favour some of them, so it lies anywhere between 1 and 3, differs between the
// heads of a group and from step to step, and no constant serves two models. From the deviation follow a page's
// estimated mass (the sum of exp of n such scores, which for a large deviation is carried by the largest few, as in the
// random energy model) and the hoped-for mass of its best token. Pages are opened in the order of the latter, and the
// search ends when none of the waiting ones may hold a token better than the worst of the best found so far.
//
// Means are compared in int8, where every instruction set gets the same integers. The queue is a heap over blocks of
// 16 pages, each with the best page that still waits in it. The order is fixed before the first page is opened, so the
// next few are taken out early and their memory is asked for. Thread ownership: that of the search context. No
// allocation.
#include "index/search.h"

#include <math.h>

#define SPREAD_MIN 0.5f
#define SPREAD_MAX 8.0f

// Memory is asked for some steps before its use: of the sample, its tokens, then their pages and keys; of a page about
// to be opened, the beginnings of its key rows.
#define SAMPLE_TOKENS_AHEAD 12u
#define SAMPLE_PAGES_AHEAD  4u
#define PREFETCH_ROW_BYTES  256u
#define CENTERS_AHEAD       2u // blocks of sketches

static float at_most(float x, float limit)
{
    return x < limit ? x : limit;
}

static void prefetch(const void *memory, size_t bytes)
{
    for (size_t at = 0; at < bytes; at += 64) {
        __builtin_prefetch((const unsigned char *)memory + at);
    }
}

static struct dci_views views_of(const struct index_search *search)
{
    return (struct dci_views){
        .count = search->views,
        .head_dim = search->index->head_dim,
        .codes = SEARCH_ROOM(search, int8_t, ROOM_CODES),
        .zeros = SEARCH_ROOM(search, int32_t, ROOM_ZEROS),
        .steps = SEARCH_ROOM(search, float, ROOM_STEPS),
        .bases = SEARCH_ROOM(search, float, ROOM_BASES),
        .norms = SEARCH_ROOM(search, float, ROOM_NORMS),
    };
}

// What sketches are compared with, per view.
void dci_rank_encode(struct index_search *search, uint32_t view)
{
    const struct index *index = search->index;
    const uint32_t dim = index->head_dim;
    const float *query = search->query.queries + (size_t)view * dim;
    int8_t *codes = SEARCH_ROOM(search, int8_t, ROOM_CODES) + (size_t)view * dim;
    const float step = dci_encode(query, dim, codes);
    int32_t sum = 0;
    for (uint32_t i = 0; i < dim; i++) {
        sum += codes[i];
    }
    SEARCH_ROOM(search, int32_t, ROOM_ZEROS)[view] = SKETCH_CODE_ZERO * sum;
    SEARCH_ROOM(search, float, ROOM_STEPS)[view] = search->query.scale * step;
    SEARCH_ROOM(search, float, ROOM_BASES)
    [view] = search->query.scale * index->kernel->dot(query, index->tree->base, dim);
}

// Estimated scores of the means of a block of pages: kept ones, else computed again.
static const float *block_centers(struct index_search *search, const struct dci_views *views, uint32_t block,
                                  bool are_kept)
{
    const bool has_room = block < search->center_blocks;
    float *centers = has_room ? SEARCH_ROOM(search, float, ROOM_CENTERS) + (size_t)block * search->views * SKETCH_LANES
                              : SEARCH_ROOM(search, float, ROOM_BLOCK);
    if (!has_room || !are_kept) {
        search->index->kernel->centers16(views, dci_sketch_at(search->index->tree, block), centers);
    }
    return centers;
}

void dci_rank_center(struct index_search *search, uint32_t block)
{
    const struct tree *tree = search->index->tree;
    const struct dci_views views = views_of(search);
    if (block >= search->center_blocks) {
        return; // computed where it is needed
    }
    if (block + CENTERS_AHEAD < dci_sketch_blocks(tree->pages)) {
        prefetch(dci_sketch_at(tree, block + CENTERS_AHEAD), tree->sketches.stride);
    }
    block_centers(search, &views, block, false);
}

static uint32_t sample_position(uint64_t n, uint32_t sample)
{
    return (uint32_t)((sample * n + n / 2) / SEARCH_SAMPLE);
}

static void prefetch_sample(const struct index_search *search, uint64_t n, uint32_t sample)
{
    const struct index *index = search->index;
    for (uint32_t i = sample == 0 ? 0 : SAMPLE_TOKENS_AHEAD; i <= SAMPLE_TOKENS_AHEAD; i++) {
        if (sample + i < SEARCH_SAMPLE) {
            prefetch(dci_token(index, sample_position(n, sample + i)), 1);
        }
    }
    for (uint32_t i = sample == 0 ? 0 : SAMPLE_PAGES_AHEAD; i <= SAMPLE_PAGES_AHEAD; i++) {
        if (sample + i < SEARCH_SAMPLE) {
            const struct token *token = dci_token(index, sample_position(n, sample + i));
            const struct page *page = dci_page(index, token->page[index->column]);
            prefetch(page, 1);
            prefetch(dci_store_at(&index->keys, sample_position(n, sample + i)), index->row_bytes);
        }
    }
}

// One token of the sample, the sample being spread evenly over the indexed positions: adds the square of how far its
// score lies from its page's mean, in units of the isotropic deviation.
void dci_rank_measure(struct index_search *search, uint32_t sample)
{
    const struct index *index = search->index;
    const float *norms = SEARCH_ROOM(search, float, ROOM_NORMS);
    float *sums = SEARCH_ROOM(search, float, ROOM_SCRATCH), *key = SEARCH_ROOM(search, float, ROOM_ROWS);
    const uint64_t n = index_indexed(index);
    const uint32_t position = sample_position(n, sample);
    prefetch_sample(search, n, sample);
    const uint32_t slot = dci_page(index, dci_token(index, position)->page[index->column])->slot;
    const uint32_t block = slot / SKETCH_LANES, lane = slot % SKETCH_LANES;
    const float unit = dci_sketch_at(index->tree, block)->unit[lane];
    if (!(unit > 0.0f)) {
        return;
    }
    search->measured++;
    dci_key_widen(index, position, key);
    const struct dci_views views = views_of(search);
    const float *centers = block_centers(search, &views, block, true);
    for (uint32_t v = 0; v < search->views; v++) {
        const float *query = search->query.queries + (size_t)v * index->head_dim;
        const float score = search->query.scale * index->kernel->dot(query, key, index->head_dim);
        const float off = norms[v] > 0.0f ? (score - centers[v * SKETCH_LANES + lane]) / (norms[v] * unit) : 0.0f;
        sums[v] += at_most(off * off, SPREAD_MAX * SPREAD_MAX * SEARCH_SAMPLE);
    }
}

void dci_rank_fix_spread(struct index_search *search)
{
    float *norms = SEARCH_ROOM(search, float, ROOM_NORMS);
    const float *sums = SEARCH_ROOM(search, float, ROOM_SCRATCH);
    for (uint32_t v = 0; search->measured > 0 && v < search->views; v++) {
        const float spread = at_most(sqrtf(sums[v] / (float)search->measured), SPREAD_MAX);
        norms[v] *= spread > SPREAD_MIN ? spread : SPREAD_MIN;
    }
}

// The estimates of a block of pages join what was scored exactly: a running log-sum-exp per view, its largest exponent
// in ROOM_REFERENCE, the sum relative to it in ROOM_REST.
void dci_rank_survey(struct index_search *search, uint32_t block)
{
    const struct dci_views views = views_of(search);
    const float *centers = block_centers(search, &views, block, true);
    search->index->kernel->survey16(&views, dci_sketch_at(search->index->tree, block), centers,
                                    SEARCH_ROOM(search, float, ROOM_REFERENCE), SEARCH_ROOM(search, float, ROOM_REST));
}

void dci_rank_fix_reference(struct index_search *search)
{
    float *reference = SEARCH_ROOM(search, float, ROOM_REFERENCE), *rest = SEARCH_ROOM(search, float, ROOM_REST);
    const float *top = SEARCH_ROOM(search, float, ROOM_TOP), *total = SEARCH_ROOM(search, float, ROOM_TOTAL);
    for (uint32_t v = 0; v < search->views; v++) {
        const float highest = top[v] > reference[v] ? top[v] : reference[v];
        const float sum = total[v] * dci_exp(top[v] - highest) + rest[v] * dci_exp(reference[v] - highest);
        reference[v] = highest + (sum > 0.0f ? dci_log(sum) : 0.0f);
        rest[v] = 0.0f;
    }
}

static bool is_before(const struct front *a, const struct front *b)
{
    return a->merit != b->merit ? a->merit > b->merit : a->tie < b->tie;
}

// The best page of a block that still waits; merit SEARCH_TAKEN if none does.
static struct front block_front(const struct index_search *search, uint32_t block)
{
    const struct sketch *sketch = dci_sketch_at(search->index->tree, block);
    const float *merits = SEARCH_ROOM(search, float, ROOM_MERITS) + (size_t)block * SKETCH_LANES;
    struct front best = {SEARCH_TAKEN, TREE_NONE, block * SKETCH_LANES};
    for (uint32_t lane = 0; lane < SKETCH_LANES; lane++) {
        const struct front front = {merits[lane], sketch->tie[lane], block * SKETCH_LANES + lane};
        best = is_before(&front, &best) ? front : best;
    }
    return best;
}

// Moves the front on top of the queue down to where it belongs.
static void sift(struct index_search *search, struct front front)
{
    struct front *queue = SEARCH_ROOM(search, struct front, ROOM_QUEUE);
    uint32_t at = 0;
    for (uint32_t child = 1; child < search->queue_count; child = 2 * at + 1) {
        if (child + 1 < search->queue_count && is_before(&queue[child + 1], &queue[child])) {
            child++;
        }
        if (!is_before(&queue[child], &front)) {
            break;
        }
        queue[at] = queue[child];
        at = child;
    }
    queue[at] = front;
}

void dci_rank_push(struct index_search *search, uint32_t block)
{
    const struct dci_views views = views_of(search);
    const struct sketch *sketch = dci_sketch_at(search->index->tree, block);
    const float *centers = block_centers(search, &views, block, true);
    float *merits = SEARCH_ROOM(search, float, ROOM_MERITS) + (size_t)block * SKETCH_LANES, masses[SKETCH_LANES];
    const bool needs_masses = search->query.coverage > 0.0f;
    search->index->kernel->merits16(&views, sketch, centers, SEARCH_ROOM(search, float, ROOM_REFERENCE), merits,
                                    needs_masses ? masses : NULL);
    for (uint32_t lane = 0; lane < SKETCH_LANES; lane++) {
        if (search->query.page_wise) {
            merits[lane] *= (float)sketch->rows[lane];
        }
        if (sketch->rows[lane] == 0) {
            merits[lane] = SEARCH_TAKEN;
        } else if (needs_masses) {
            SEARCH_ROOM(search, float, ROOM_PAGE_MASSES)[block * SKETCH_LANES + lane] = masses[lane];
            search->waiting_mass += (double)masses[lane];
        }
    }
    const struct front front = block_front(search, block);
    struct front *queue = SEARCH_ROOM(search, struct front, ROOM_QUEUE);
    uint32_t at = search->queue_count++;
    for (; at > 0 && is_before(&front, &queue[(at - 1) / 2]); at = (at - 1) / 2) {
        queue[at] = queue[(at - 1) / 2];
    }
    queue[at] = front;
}

// Takes the best page out of the queue of blocks.
static struct front pop(struct index_search *search)
{
    struct front *queue = SEARCH_ROOM(search, struct front, ROOM_QUEUE);
    const struct front first = queue[0];
    const uint32_t block = first.slot / SKETCH_LANES;
    SEARCH_ROOM(search, float, ROOM_MERITS)[first.slot] = SEARCH_TAKEN;
    const struct front next = block_front(search, block);
    if (next.merit == SEARCH_TAKEN) {
        search->queue_count--;
        if (search->queue_count > 0) {
            sift(search, queue[search->queue_count]);
        }
    } else {
        sift(search, next);
    }
    return first;
}

static const struct page *front_page(const struct index_search *search, const struct front *front)
{
    const struct sketch *sketch = dci_sketch_at(search->index->tree, front->slot / SKETCH_LANES);
    return dci_page(search->index, sketch->page[front->slot % SKETCH_LANES]);
}

static struct front *ahead_at(struct index_search *search, uint32_t number)
{
    return &search->ahead[(search->ahead_first + number) % SEARCH_AHEAD];
}

static void prefetch_rows(const struct index_search *search, const struct front *front)
{
    const struct index *index = search->index;
    const struct page *page = front_page(search, front);
    const size_t bytes = index->row_bytes < PREFETCH_ROW_BYTES ? index->row_bytes : PREFETCH_ROW_BYTES;
    for (uint32_t r = 0; r < index->page_tokens; r++) {
        if (page->tokens[r] != TREE_NONE) {
            prefetch(dci_store_at(&index->keys, page->tokens[r]), bytes);
        }
    }
}

void dci_rank_look_ahead(struct index_search *search)
{
    while (search->ahead_count < SEARCH_AHEAD && search->queue_count > 0) {
        struct front *front = ahead_at(search, search->ahead_count++);
        *front = pop(search);
        const struct page *page = front_page(search, front);
        prefetch(page, sizeof *page + search->index->page_tokens * sizeof page->tokens[0]);
    }
    for (uint32_t i = 0; search->pages_opened == 0 && i < SEARCH_ROWS_AHEAD && i < search->ahead_count; i++) {
        prefetch_rows(search, ahead_at(search, i)); // the first ones
    }
}

const struct page *dci_rank_take(struct index_search *search)
{
    assert(search->ahead_count > 0);
    const struct front front = *ahead_at(search, 0);
    if (search->ahead_count > SEARCH_ROWS_AHEAD) {
        prefetch_rows(search, ahead_at(search, SEARCH_ROWS_AHEAD));
    }
    search->ahead_first = (search->ahead_first + 1) % SEARCH_AHEAD;
    search->ahead_count--;
    const struct page *page = front_page(search, &front);
    if (search->query.coverage > 0.0f) {
        search->waiting_mass -= (double)SEARCH_ROOM(search, float, ROOM_PAGE_MASSES)[front.slot];
    }
    search->waiting_tokens -= page->rows;
    return page;
}

void dci_rank_give_back(struct index_search *search)
{
    for (; search->ahead_count > 0; search->ahead_count--) {
        const struct front *front = ahead_at(search, search->ahead_count - 1);
        SEARCH_ROOM(search, float, ROOM_MERITS)[front->slot] = front->merit;
    }
}

void dci_rank_rest(struct index_search *search, uint32_t block)
{
    const struct dci_views views = views_of(search);
    const float *merits = SEARCH_ROOM(search, float, ROOM_MERITS) + (size_t)block * SKETCH_LANES;
    const float *centers = block_centers(search, &views, block, true);
    float weights[SKETCH_LANES];
    for (uint32_t lane = 0; lane < SKETCH_LANES; lane++) {
        weights[lane] = merits[lane] == SEARCH_TAKEN ? 0.0f : 1.0f;
    }
    // What was left unopened holds no token above the best that was found.
    search->index->kernel->rest16(&views, dci_sketch_at(search->index->tree, block), centers,
                                  SEARCH_ROOM(search, float, ROOM_TOP), weights, SEARCH_ROOM(search, float, ROOM_REST));
}

void dci_rank_offer(struct index_search *search, float preview)
{
    float *best = SEARCH_ROOM(search, float, ROOM_BEST);
    uint32_t at;
    if (search->best_count < search->best_room) {
        at = search->best_count++;
        for (; at > 0 && best[(at - 1) / 2] > preview; at = (at - 1) / 2) {
            best[at] = best[(at - 1) / 2];
        }
    } else if (search->best_room > 0 && preview > best[0]) {
        search->best_sum -= (double)best[0];
        at = 0;
        for (uint32_t child = 1; child < search->best_room; child = 2 * at + 1) {
            child += child + 1 < search->best_room && best[child + 1] < best[child] ? 1 : 0;
            if (best[child] >= preview) {
                break;
            }
            best[at] = best[child];
            at = child;
        }
    } else {
        return;
    }
    best[at] = preview;
    search->best_sum += (double)preview;
}

// What waits holds tokens of sinks and window too, and tokens behind the query: the share that counts.
float dci_rank_waiting_share(const struct index_search *search)
{
    const uint32_t left = search->visible - search->tokens_scored;
    return left < search->waiting_tokens ? (float)left / (float)search->waiting_tokens : 1.0f;
}

bool dci_rank_is_enough(const struct index_search *search)
{
    const struct index_query *query = &search->query;
    if (search->ahead_count == 0 || search->eligible_scored == search->high - search->low) {
        return true;
    }
    if (query->coverage > 0.0f) {
        const double waiting = search->waiting_mass > 0.0 ? search->waiting_mass : 0.0;
        const double all = search->scored_preview + waiting * (double)dci_rank_waiting_share(search);
        if (search->ends_preview + search->best_sum >= (double)query->coverage * all) {
            return true;
        }
    }
    if (search->eligible_scored < query->budget) {
        return false;
    }
    if (search->pages_opened >= search->pages_max) {
        return true;
    }
    const float *best = SEARCH_ROOM(search, float, ROOM_BEST);
    const bool is_full = search->best_count == search->best_room;
    return query->effort == 0.0f && is_full &&
           (search->best_room == 0 || search->ahead[search->ahead_first].merit < best[0]);
}
