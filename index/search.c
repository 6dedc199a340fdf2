// A search: sinks, window and tail exactly, then the tree best first, then the mass of everything that was scored.
//
// Each phase works in items (16 tokens, a page, the sketches of 16 pages against all queries), and an item is never
// cut, so a search gives the same result however it is sliced. Log-sum-exps are kept per view over everything scored;
// an estimate for what was not opened joins at the end. All leaf pages are ranked by their sketches, in one pass over
// dense blocks. Thread ownership: that of the search context. Only create and reserve allocate.
#include "index/search.h"

#include <math.h>
#include <string.h>

#define ROOM_BYTES_MIN 64u

enum index_status index_search_create(const struct index_allocator *allocator, struct index_search **out)
{
    struct index_search *search = allocator->acquire(allocator->owner, sizeof *search);
    if (search == NULL) {
        return INDEX_NO_MEMORY;
    }
    memset(search, 0, sizeof *search);
    search->memory = (struct dci_memory){*allocator, sizeof *search};
    *out = search;
    return INDEX_OK;
}

void index_search_destroy(struct index_search *search)
{
    if (search == NULL) {
        return;
    }
    for (uint32_t i = 0; i < ROOM_COUNT; i++) {
        dci_memory_release(&search->memory, search->rooms[i].block, search->rooms[i].bytes);
    }
    assert(search->memory.bytes == sizeof *search);
    const struct index_allocator allocator = search->memory.allocator;
    allocator.release(allocator.owner, search, sizeof *search);
}

static bool query_is_valid(const struct index *index, const struct index_query *query)
{
    return query->queries != NULL && query->query_count >= 1 && query->query_count <= INDEX_QUERIES_MAX &&
           query->head_count >= 1 && query->head_count <= INDEX_GROUP_MAX &&
           query->first_position <= INDEX_TOKENS_MAX && isfinite(query->scale) && query->scale > 0.0f &&
           query->coverage >= 0.0f && query->coverage <= 1.0f && query->effort >= 0.0f && query->effort <= 1.0f &&
           index != NULL;
}

static size_t round_up16(size_t n)
{
    return (n + DCI_LANES - 1) / DCI_LANES * DCI_LANES;
}

static size_t blocks_max(size_t elements_max, size_t views)
{
    const size_t blocks = elements_max / (views * DCI_LANES);
    return blocks < 1 ? 1 : blocks;
}

// Pages of a page-wise selection.
static uint32_t budget_pages(const struct index *index, uint32_t budget)
{
    const uint32_t pages = budget / index->page_tokens;
    return budget > 0 && pages == 0 ? 1 : pages;
}

static void room_sizes(const struct index *index, const struct index_query *query, size_t sizes[ROOM_COUNT])
{
    const size_t views = (size_t)query->query_count * query->head_count, n = index->length;
    const uint32_t leaf_pages = index->tree == NULL ? 0 : index->tree->pages;
    const size_t pages = leaf_pages + (n - index_indexed(index) + index->page_tokens - 1) / index->page_tokens;
    const size_t page_blocks = dci_sketch_blocks(leaf_pages);
    size_t entries = n + 4 * DCI_LANES;
    if (query->page_wise) {
        entries += pages * round_up16(index->page_tokens);
    }
    const size_t blocks = entries / DCI_LANES + 1;
    const size_t scores_max = blocks_max(SEARCH_SCORES_MAX, views), centers_max = blocks_max(SEARCH_CENTERS_MAX, views);
    const size_t kept = blocks < scores_max ? blocks : scores_max;
    const size_t kept_centers = page_blocks < centers_max ? page_blocks : centers_max;
    size_t selected = query->budget > index->page_tokens ? query->budget : index->page_tokens;
    selected = selected < n ? selected : n;
    for (enum room_name i = ROOM_NORMS; i <= ROOM_BASES; i++) {
        sizes[i] = views * sizeof(float);
    }
    sizes[ROOM_BLOCK] = views * DCI_LANES * sizeof(float);
    sizes[ROOM_ROWS] = DCI_LANES * index->head_dim * sizeof(float);
    sizes[ROOM_SCORES] = kept * views * DCI_LANES * sizeof(float);
    sizes[ROOM_POSITIONS] = round_up16(entries) * sizeof(uint32_t);
    sizes[ROOM_MASSES] = round_up16(entries) * sizeof(float);
    sizes[ROOM_CODES] = views * index->head_dim;
    sizes[ROOM_CENTERS] = kept_centers * views * SKETCH_LANES * sizeof(float);
    sizes[ROOM_MERITS] = page_blocks * SKETCH_LANES * sizeof(float);
    sizes[ROOM_PAGE_MASSES] = query->coverage > 0.0f ? sizes[ROOM_MERITS] : 0;
    sizes[ROOM_QUEUE] = page_blocks * sizeof(struct front);
    sizes[ROOM_BEST] = selected * sizeof(float);
    sizes[ROOM_CANDIDATES] = entries * sizeof(struct candidate);
    sizes[ROOM_SELECTED] = sizes[ROOM_SORTED] = selected * sizeof(struct index_selected);
}

enum index_status index_search_reserve(struct index_search *search, const struct index *index,
                                       const struct index_query *query)
{
    if (!query_is_valid(index, query)) {
        return INDEX_INVALID;
    }
    size_t sizes[ROOM_COUNT];
    room_sizes(index, query, sizes);
    for (uint32_t i = 0; i < ROOM_COUNT; i++) {
        struct room *room = &search->rooms[i];
        if (room->block != NULL && room->bytes >= sizes[i]) {
            continue;
        }
        // A quarter more than needed, so that a growing sequence does not come back at every step.
        const size_t bytes = sizes[i] + sizes[i] / 4 + ROOM_BYTES_MIN;
        void *block = dci_memory_acquire(&search->memory, bytes);
        if (block == NULL) {
            return INDEX_NO_MEMORY;
        }
        dci_memory_release(&search->memory, room->block, room->bytes);
        *room = (struct room){block, bytes};
    }
    return INDEX_OK;
}

// Norms of the queries; false when one is not finite, or so large that scores would not be.
static bool views_init(struct index_search *search)
{
    const struct index *index = search->index;
    const struct index_query *query = &search->query;
    float *norms = SEARCH_ROOM(search, float, ROOM_NORMS);
    const float key_norm_max = sqrtf(index->norm2_max);
    for (uint32_t v = 0; v < search->views; v++) {
        const float *vector = query->queries + (size_t)v * index->head_dim;
        const float norm2 = index->kernel->dot(vector, vector, index->head_dim);
        norms[v] = query->scale * sqrtf(norm2);
        if (!(norm2 <= TREE_NORM2_MAX) || !(norms[v] <= DCI_SCORE_MAX) || !(norms[v] * key_norm_max <= DCI_SCORE_MAX)) {
            return false;
        }
        SEARCH_ROOM(search, float, ROOM_TOP)[v] = DCI_HIDDEN;
        SEARCH_ROOM(search, float, ROOM_TOTAL)[v] = 0.0f;
        SEARCH_ROOM(search, float, ROOM_REFERENCE)[v] = DCI_HIDDEN;
        SEARCH_ROOM(search, float, ROOM_REST)[v] = 0.0f;
        SEARCH_ROOM(search, float, ROOM_SCRATCH)[v] = 0.0f;
        SEARCH_ROOM(search, float, ROOM_INVERSE)[v] = 1.0f / (float)search->views;
        if (index->tree != NULL) {
            dci_rank_encode(search, v);
        }
    }
    return true;
}

static void bounds_init(struct index_search *search)
{
    const struct index *index = search->index;
    struct index_query *query = &search->query;
    const uint64_t end = query->first_position + query->query_count;
    search->visible = (uint32_t)(end < index->length ? end : index->length);
    const uint64_t window_begin = end > query->window ? end - query->window : 0;
    search->sinks_end = query->sinks < search->visible ? query->sinks : search->visible;
    search->low = search->sinks_end;
    search->high = window_begin < search->visible ? (uint32_t)window_begin : search->visible;
    if (search->high < search->low) {
        search->high = search->low;
    }
    const uint32_t eligible = search->high - search->low;
    if (eligible <= query->budget) {
        query->budget = eligible; // everything
        search->best_room = eligible;
        query->coverage = query->coverage == 1.0f ? 0.0f : query->coverage;
    } else {
        search->best_room = query->page_wise ? budget_pages(index, query->budget) : query->budget;
    }
    const uint32_t indexed = (uint32_t)index_indexed(index);
    search->tail_begin = indexed > search->low ? indexed : search->low;
    search->pages_max = 0;
    if (index->tree != NULL) {
        const struct tree *tree = index->tree;
        const double share = query->effort == 0.0f ? 1.0 : (double)query->effort;
        search->pages_max = (uint32_t)ceil(share * tree->pages);
        search->waiting_tokens = tree->tokens;
    }
}

static uint32_t blocks_kept(const struct index_search *search, enum room_name room, size_t elements_max)
{
    const size_t held = search->rooms[room].bytes / (search->views * DCI_LANES * sizeof(float));
    const size_t limit = blocks_max(elements_max, search->views);
    return (uint32_t)(held < limit ? held : limit);
}

enum index_status index_search_begin(struct index_search *search, const struct index *index,
                                     const struct index_query *query)
{
    if (!query_is_valid(index, query)) {
        return INDEX_INVALID;
    }
    size_t sizes[ROOM_COUNT];
    room_sizes(index, query, sizes);
    for (uint32_t i = 0; i < ROOM_COUNT; i++) {
        if (search->rooms[i].block == NULL || search->rooms[i].bytes < sizes[i]) {
            return INDEX_NO_MEMORY;
        }
    }
    const struct dci_memory memory = search->memory;
    struct room rooms[ROOM_COUNT];
    memcpy(rooms, search->rooms, sizeof rooms);
    memset(search, 0, sizeof *search);
    search->memory = memory;
    memcpy(search->rooms, rooms, sizeof rooms);
    search->index = index;
    search->query = *query;
    search->views = query->query_count * query->head_count;
    search->score_blocks = blocks_kept(search, ROOM_SCORES, SEARCH_SCORES_MAX);
    search->center_blocks = blocks_kept(search, ROOM_CENTERS, SEARCH_CENTERS_MAX);
    if (!views_init(search)) {
        return INDEX_NOT_FINITE;
    }
    bounds_init(search);
    search->begun = true;
    return INDEX_OK;
}

void dci_search_line_up(struct index_search *search, uint32_t position)
{
    SEARCH_ROOM(search, uint32_t, ROOM_POSITIONS)[search->entry_count++] = position;
}

// Scores a block into `scores`: hidden where an entry is padding or lies behind the query.
static void score_block(struct index_search *search, uint32_t block, float *scores)
{
    const struct index *index = search->index;
    const struct index_query *query = &search->query;
    const uint32_t dim = index->head_dim;
    const uint32_t *positions = SEARCH_ROOM(search, uint32_t, ROOM_POSITIONS) + (size_t)block * DCI_LANES;
    float *rows = SEARCH_ROOM(search, float, ROOM_ROWS);
    uint32_t last = 0;
    bool has_padding = false;
    for (uint32_t i = 0; i < DCI_LANES; i++) {
        if (positions[i] == TREE_NONE) {
            memset(rows + (size_t)i * dim, 0, dim * sizeof rows[0]);
            has_padding = true;
            continue;
        }
        dci_key_widen(index, positions[i], rows + (size_t)i * dim);
        last = positions[i] > last ? positions[i] : last;
    }
    index->kernel->score16(query->queries, search->views, rows, dim, query->scale, scores);
    for (uint32_t v = 0; (has_padding || last > query->first_position) && v < search->views; v++) {
        const uint64_t limit = query->first_position + v / query->head_count;
        for (uint32_t i = 0; i < DCI_LANES; i++) {
            if (positions[i] > limit) { // padding is above every limit
                scores[v * DCI_LANES + i] = DCI_HIDDEN;
            }
        }
    }
}

static float *kept_scores(struct index_search *search, uint32_t block)
{
    return SEARCH_ROOM(search, float, ROOM_SCORES) + (size_t)block * search->views * DCI_LANES;
}

const float *dci_search_block_scores(struct index_search *search, uint32_t block)
{
    if (block < search->score_blocks) {
        return kept_scores(search, block);
    }
    float *scores = SEARCH_ROOM(search, float, ROOM_BLOCK);
    score_block(search, block, scores);
    return scores;
}

static void spend_block(const struct index_search *search, struct dci_work *work)
{
    dci_work_spend(work, search->index, (uint64_t)DCI_LANES * (search->views + 1));
}

// Scores the entries lined up in whole blocks (`flush`: pads and scores all). Sums the previews into *preview.
static void score_lined_up(struct index_search *search, bool flush, double *preview, struct dci_work *work)
{
    const struct dci_kernel *kernel = search->index->kernel;
    while (flush && search->entry_count % DCI_LANES != 0) {
        dci_search_line_up(search, TREE_NONE);
    }
    for (; search->entry_count - search->scored >= DCI_LANES; search->scored += DCI_LANES) {
        const uint32_t block = search->scored / DCI_LANES;
        const uint32_t *positions = SEARCH_ROOM(search, uint32_t, ROOM_POSITIONS) + (size_t)block * DCI_LANES;
        float *scores =
            block < search->score_blocks ? kept_scores(search, block) : SEARCH_ROOM(search, float, ROOM_BLOCK);
        float previews[DCI_LANES];
        score_block(search, block, scores);
        kernel->fold16(scores, search->views, SEARCH_ROOM(search, float, ROOM_REFERENCE),
                       SEARCH_ROOM(search, float, ROOM_TOP), SEARCH_ROOM(search, float, ROOM_TOTAL), previews);
        for (uint32_t i = 0; i < DCI_LANES; i++) {
            if (positions[i] == TREE_NONE) {
                continue;
            }
            search->tokens_scored++;
            if (search->phase == SEARCH_OPEN) {
                const float share = previews[i] / (float)search->views;
                *preview += (double)share;
                if (!search->query.page_wise) {
                    dci_rank_offer(search, share);
                }
            }
        }
        spend_block(search, work);
    }
}

static void enter(struct index_search *search, enum search_phase phase)
{
    search->phase = phase;
    search->cursor = 0;
}

static void ends_item(struct index_search *search, struct dci_work *work)
{
    const uint32_t window_begin = search->high > search->sinks_end ? search->high : search->sinks_end;
    const uint32_t count = search->sinks_end + (search->visible - window_begin);
    double ignored = 0.0;
    for (uint32_t i = 0; i < DCI_LANES && search->cursor < count; i++, search->cursor++) {
        const uint32_t c = search->cursor;
        dci_search_line_up(search, c < search->sinks_end ? c : window_begin + (c - search->sinks_end));
    }
    score_lined_up(search, search->cursor == count, &ignored, work);
    if (search->cursor == count) {
        search->ends_count = search->entry_count;
        enter(search, SEARCH_TAIL);
        search->cursor = search->tail_begin;
    }
}

static void tail_item(struct index_search *search, struct dci_work *work)
{
    const uint32_t step = search->query.page_wise ? search->index->page_tokens : DCI_LANES;
    double ignored = 0.0;
    if (search->cursor >= search->high) {
        score_lined_up(search, true, &ignored, work);
        enter(search, SEARCH_CENTERS);
        return;
    }
    uint32_t end = (search->cursor / step + 1) * step;
    end = end < search->high ? end : search->high;
    for (; search->cursor < end; search->cursor++) {
        dci_search_line_up(search, search->cursor);
        search->eligible_scored++;
    }
    score_lined_up(search, search->query.page_wise, &ignored, work);
}

static uint32_t page_blocks(const struct index_search *search)
{
    return search->index->tree == NULL ? 0 : dci_sketch_blocks(search->index->tree->pages);
}

// A block of pages costs a quarter of as many keys: bytes instead of fp32.
static void spend_sketch(const struct index_search *search, struct dci_work *work)
{
    dci_work_spend(work, search->index, (uint64_t)SKETCH_LANES * (search->views + 3) / 4);
}

static void measure_item(struct index_search *search, struct dci_work *work)
{
    if (search->cursor == SEARCH_SAMPLE || index_indexed(search->index) < SEARCH_SAMPLE) {
        dci_rank_fix_spread(search);
        enter(search, SEARCH_SURVEY);
        return;
    }
    dci_rank_measure(search, search->cursor++);
    dci_work_spend(work, search->index, search->views);
}

static void survey_item(struct index_search *search, struct dci_work *work)
{
    if (search->cursor == page_blocks(search)) {
        dci_rank_fix_reference(search);
        enter(search, SEARCH_PREVIEW);
        return;
    }
    dci_rank_survey(search, search->cursor++);
    spend_sketch(search, work);
}

// One scored page or, token-wise, one block: its tokens enter the running best, now that there is a reference.
static void preview_item(struct index_search *search, struct dci_work *work)
{
    const struct index *index = search->index;
    const uint32_t *positions = SEARCH_ROOM(search, uint32_t, ROOM_POSITIONS);
    const bool is_page = search->query.page_wise && search->cursor * DCI_LANES >= search->ends_count;
    const uint32_t page = positions[search->cursor * DCI_LANES] / index->page_tokens;
    double sum = 0.0;
    do {
        const uint32_t block = search->cursor++;
        const float *scores = dci_search_block_scores(search, block);
        float previews[DCI_LANES];
        index->kernel->weigh16(scores, search->views, SEARCH_ROOM(search, float, ROOM_REFERENCE),
                               SEARCH_ROOM(search, float, ROOM_INVERSE), previews);
        for (uint32_t i = 0; i < DCI_LANES; i++) {
            sum += (double)previews[i];
            if (!search->query.page_wise && block * DCI_LANES >= search->ends_count &&
                positions[block * DCI_LANES + i] != TREE_NONE) {
                dci_rank_offer(search, previews[i]);
            }
        }
        spend_block(search, work);
    } while (is_page && search->cursor * DCI_LANES < search->scored &&
             positions[search->cursor * DCI_LANES] / index->page_tokens == page);
    search->scored_preview += sum;
    if (is_page) {
        dci_rank_offer(search, (float)sum);
    } else if (search->cursor * DCI_LANES <= search->ends_count) {
        search->ends_preview += sum;
    }
}

static void open_page(struct index_search *search, const struct page *page, struct dci_work *work)
{
    double preview = 0.0;
    search->pages_opened++;
    for (uint32_t r = 0; r < search->index->page_tokens; r++) {
        const uint32_t position = page->tokens[r];
        if (position != TREE_NONE && position >= search->low && position < search->high) {
            dci_search_line_up(search, position);
            search->eligible_scored++;
        }
    }
    score_lined_up(search, search->query.page_wise, &preview, work);
    search->scored_preview += preview;
    if (search->query.page_wise) {
        dci_rank_offer(search, (float)preview);
    }
}

static void open_item(struct index_search *search, struct dci_work *work)
{
    dci_rank_look_ahead(search);
    if (dci_rank_is_enough(search)) {
        double preview = 0.0;
        score_lined_up(search, true, &preview, work);
        dci_rank_give_back(search);
        enter(search, SEARCH_REST);
        return;
    }
    open_page(search, dci_rank_take(search), work);
}

// One item of the current phase.
static void item(struct index_search *search, struct dci_work *work)
{
    switch (search->phase) {
    case SEARCH_ENDS:
        ends_item(search, work);
        break;
    case SEARCH_TAIL:
        tail_item(search, work);
        break;
    case SEARCH_CENTERS:
        if (search->cursor == page_blocks(search)) {
            enter(search, SEARCH_MEASURE);
            break;
        }
        dci_rank_center(search, search->cursor++);
        spend_sketch(search, work);
        break;
    case SEARCH_MEASURE:
        measure_item(search, work);
        break;
    case SEARCH_SURVEY:
        survey_item(search, work);
        break;
    case SEARCH_PREVIEW:
        if (search->cursor * DCI_LANES == search->scored) {
            enter(search, SEARCH_SEED);
        } else {
            preview_item(search, work);
        }
        break;
    case SEARCH_SEED:
        if (search->cursor == page_blocks(search)) {
            enter(search, SEARCH_OPEN);
            break;
        }
        dci_rank_push(search, search->cursor++);
        spend_sketch(search, work);
        break;
    case SEARCH_OPEN:
        open_item(search, work);
        break;
    case SEARCH_REST:
        if (search->cursor == page_blocks(search)) {
            dci_search_fix_inverse(search);
            enter(search, SEARCH_SETTLE);
            break;
        }
        dci_rank_rest(search, search->cursor++);
        spend_sketch(search, work);
        break;
    case SEARCH_SETTLE:
        if (search->settled * DCI_LANES == search->scored) {
            enter(search, SEARCH_DONE);
            break;
        }
        dci_search_settle(search, search->settled);
        spend_block(search, work);
        break;
    case SEARCH_DONE:
        break;
    }
}

bool index_search_step(struct index_search *search, uint64_t work_units)
{
    assert(search->begun);
    const uint64_t units = work_units < 1 ? 1 : work_units > UINT32_MAX ? UINT32_MAX : work_units;
    struct dci_work work = {(int64_t)(units * DCI_UNIT_ELEMENTS)};
    while (search->phase != SEARCH_DONE && work.left > 0) {
        item(search, &work);
        work.left--;
    }
    return search->phase == SEARCH_DONE;
}
