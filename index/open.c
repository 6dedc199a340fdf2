// Scoring: blocks of head and tail with 8-bit codes, rows of cells with 5-bit codes.
//
// Thread ownership: that of the search context. No allocation.
#include "index/search.h"

#include <math.h>
#include <string.h>

// Cells ahead whose node, and whose codes, are asked for while one is scored.
#define NODES_AHEAD 12u
#define CODES_AHEAD 3u

// Positions ahead, likewise, where sinks and window lie in the tree.
#define ONES_AHEAD 4u

// How many deviations the sieve allows for (three times as many with all care, see struct part), and the largest one
// that it takes the mean of exponentials of.
#define SIEVE_MARGIN 1.0f
#define DOUBT_MOST   4.0f

uint32_t dci_scored_position(const struct index_search *search, const struct scored *scored, uint32_t lane)
{
    if (scored->cell == SEARCH_LOOSE) {
        return SEARCH_ROOM(search, struct loose, ROOM_LOOSE)[scored->number].positions[lane];
    }
    const struct part *part = &search->parts[scored->part];
    uint32_t own = scored->place + lane;
    if (scored->cell != TREE_NONE) {
        own = dci_rows(part->index, dci_node(part->index, scored->cell), scored->number)->positions[lane];
    } else if (lane < scored->begin || lane >= scored->end) {
        return TREE_NONE;
    }
    return own < part->count ? part->first + own : TREE_NONE;
}

uint32_t dci_scored_part(const struct index_search *search, const struct scored *scored, uint32_t lane)
{
    return scored->cell == SEARCH_LOOSE ? SEARCH_ROOM(search, struct loose, ROOM_LOOSE)[scored->number].parts[lane]
                                        : scored->part;
}

struct index_place dci_scored_place(const struct index_search *search, const struct scored *scored, uint32_t lane)
{
    if (scored->cell == TREE_NONE) {
        return dci_place_of(search->parts[scored->part].index, scored->place + lane);
    }
    if (scored->cell == SEARCH_LOOSE) {
        const struct loose *loose = &SEARCH_ROOM(search, struct loose, ROOM_LOOSE)[scored->number];
        return (struct index_place){loose->pages[lane], loose->rows[lane]};
    }
    return (struct index_place){scored->page, scored->number % search->index->page_blocks * DCI_LANES + lane};
}

const float *dci_block_centers(struct index_search *search, uint32_t block)
{
    if (block < search->center_blocks) {
        return SEARCH_ROOM(search, float, ROOM_CENTERS) + (size_t)block * search->views * DCI_LANES;
    }
    float *centers = SEARCH_ROOM(search, float, ROOM_ANCHORS);
    const struct cell_block *cells = dci_cell_block(search, block);
    search->index->kernel->centers16(dci_part_views(search, cells->part), cells->block, centers);
    return centers;
}

// Hides lanes that do not count, and what a view does not see.
static void hide(const struct index_search *search, const struct scored *scored, float *scores)
{
    const struct index_query *query = &search->query;
    for (uint32_t lane = 0; lane < DCI_LANES; lane++) {
        const uint32_t position = dci_scored_position(search, scored, lane);
        for (uint32_t v = 0; v < search->views; v++) {
            if (position > query->first_position + v / query->head_count) { // also where there is none
                scores[(size_t)v * DCI_LANES + lane] = DCI_HIDDEN;
            }
        }
    }
}

static void raise_tops(struct index_search *search, const float *scores)
{
    float *tops = SEARCH_ROOM(search, float, ROOM_TOPS);
    for (size_t i = 0; i < (size_t)search->views * DCI_LANES; i++) {
        tops[i] = scores[i] > tops[i] ? scores[i] : tops[i];
    }
}

static void score_neighbours(struct index_search *search, const struct scored *scored, float *scores)
{
    const struct part *part = &search->parts[scored->part];
    search->index->kernel->centers16(&search->plain, dci_tail_block(part->index, scored->place), scores);
    if (scored->begin > 0 || scored->end < DCI_LANES ||
        part->first + scored->place + DCI_LANES - 1 > search->query.first_position) {
        hide(search, scored, scores);
    }
    raise_tops(search, scores);
}

// Does every view see all that may be selected?
static bool all_is_seen(const struct index_search *search)
{
    return search->high <= search->query.first_position + 1;
}

// Returns how many tokens of the tree count.
static uint32_t score_block(struct index_search *search, const struct scored *scored, float *scores)
{
    const struct part *part = &search->parts[scored->part];
    const struct index *index = part->index;
    if (scored->cell == TREE_NONE) {
        score_neighbours(search, scored, scores);
        return 0;
    }
    const struct node *cell = dci_node(index, scored->cell);
    const bool is_one = scored->only != TREE_NONE;
    struct dci_target target = {.low = is_one ? scored->only : part->low,
                                .span = is_one ? 1 : part->high - part->low,
                                .anchors =
                                    dci_block_centers(search, scored->place / DCI_LANES) + scored->place % DCI_LANES};
    const bool is_seen = (uint64_t)part->first + target.low + target.span <= search->query.first_position + 1;
    target.tops = SEARCH_ROOM(search, float, is_seen ? ROOM_TOPS : ROOM_UNSEEN);
    const uint32_t count = index->kernel->tokens16(&search->seen, dci_rows(index, cell, scored->number),
                                                   dci_lows(index, cell, scored->number), &target,
                                                   SEARCH_ROOM(search, int16_t, ROOM_SIGNS_OF_LANES), scores);
    if (!is_seen) {
        hide(search, scored, scores);
        raise_tops(search, scores);
    }
    return count;
}

static float *room_for(struct index_search *search, uint32_t block)
{
    if (!dci_search_is_kept(search, block)) {
        return SEARCH_ROOM(search, float, ROOM_BLOCK);
    }
    return SEARCH_ROOM(search, float, ROOM_SCORES) + (size_t)block * search->views * DCI_LANES;
}

float *dci_block_scores(struct index_search *search, uint32_t block)
{
    float *scores = room_for(search, block);
    if (!dci_search_is_kept(search, block)) {
        (void)score_block(search, dci_scored(search, block), scores);
    }
    return scores;
}

static uint32_t add(struct index_search *search, const struct scored *scored)
{
    if (search->block_count + SEARCH_LOOSE_MOST >= search->sieve_blocks) {
        dci_open_flush(search); // while what waits is sure to be kept: it cannot be scored again
    }
    const uint32_t count = score_block(search, scored, room_for(search, search->block_count));
    *dci_scored(search, search->block_count++) = *scored;
    return count;
}

// ---- the sieve ----

// Scores a loose block that has waited.
static void settle(struct index_search *search, struct waiting *waiting)
{
    if (waiting->count == 0) {
        return;
    }
    for (uint32_t lane = waiting->count; lane < DCI_LANES; lane++) {
        waiting->lanes.rows[lane] = waiting->lanes.rows[0];
        waiting->lanes.live[lane] = 0.0f;
        SEARCH_ROOM(search, struct loose, ROOM_LOOSE)[waiting->loose].positions[lane] = TREE_NONE;
    }
    const struct dci_kernel *kernel = search->index->kernel;
    const uint32_t block = search->block_count++;
    kernel->score16(&search->seen, &waiting->lanes, room_for(search, block), SEARCH_ROOM(search, float, ROOM_TOPS));
    *dci_scored(search, block) =
        (struct scored){.page = TREE_NONE, .cell = SEARCH_LOOSE, .number = waiting->loose, .only = TREE_NONE};
    if (search->barred) {
        float masses[DCI_LANES];
        kernel->mix16(dci_search_exps(search, block), search->views, SEARCH_ROOM(search, float, ROOM_UNITS), masses);
        dci_rank_raise_bar(search, masses);
    }
    waiting->count = 0;
}

void dci_open_flush(struct index_search *search)
{
    settle(search, &search->waiting[1 - search->filling]);
    settle(search, &search->waiting[search->filling]);
}

// A block of rows under the sieve.
struct source {
    const struct dci_rows *rows;
    const uint8_t *lows;
    const float *anchors; // [view][16]: the first lane's
    const struct part *part;
    uint32_t page, first; // its first row in the page
};

static void source_init(const struct node *cell, uint32_t number, struct source *source)
{
    const struct index *index = source->part->index;
    source->rows = dci_rows(index, cell, number);
    source->lows = dci_lows(index, cell, number);
    source->page = cell->parts[number / index->page_blocks];
    source->first = number % index->page_blocks * DCI_LANES;
}

// A row that passed: its low bits are asked for, and it waits.
static void keep(struct index_search *search, const struct source *source, uint32_t lane)
{
    const size_t views_lanes = (size_t)search->views * DCI_LANES;
    struct waiting *waiting = &search->waiting[search->filling];
    float *anchors = SEARCH_ROOM(search, float, ROOM_ANCHORS_OF_LANES) + (1 + search->filling) * views_lanes;
    int16_t *signs = SEARCH_ROOM(search, int16_t, ROOM_SIGNS_OF_LANES);
    const int16_t *from = signs + lane;
    signs += (1 + search->filling) * views_lanes;
    if (waiting->count == 0) {
        waiting->loose = search->loose_count++;
        waiting->lanes.anchors = anchors;
        waiting->lanes.signs = signs;
    }
    const uint8_t *low = source->lows + (size_t)lane * search->index->code_row_bytes;
    dci_prefetch(low, search->index->code_row_bytes);
    const uint32_t at = waiting->count++;
    for (size_t v = 0; v < views_lanes; v += DCI_LANES) {
        anchors[v + at] = source->anchors[v];
        signs[v + at] = from[v];
    }
    waiting->lanes.rows[at] = low;
    waiting->lanes.scales[at] = dci_scale_widen(source->rows->scales[lane]);
    waiting->lanes.live[at] = 1.0f;
    struct loose *loose = &SEARCH_ROOM(search, struct loose, ROOM_LOOSE)[waiting->loose];
    loose->positions[at] = source->part->first + source->rows->positions[lane];
    loose->parts[at] = (uint8_t)(source->part - search->parts);
    loose->pages[at] = source->page;
    loose->rows[at] = (uint16_t)(source->first + lane);
    if (waiting->count == DCI_LANES) {
        search->filling = 1 - search->filling;
        settle(search, &search->waiting[search->filling]);
    }
}

// As the kernel's terms are.
static float rough_exp(float x)
{
    const float bits = x * DCI_ROUGH_SLOPE + DCI_ROUGH_OFFSET;
    const int32_t word = bits > 0.0f ? (int32_t)bits : 0;
    float value;
    memcpy(&value, &word, sizeof value);
    return value;
}

// What the top bits say of a score, e, is the score t and an error. Around an anchor, t is spread with a deviation that
// the search has measured, so that t given e is w e on average, with w the spread's part of the variance of e, and is
// left with the deviation sqrt(w) of the error's.
void dci_open_begin_sieve(struct index_search *search)
{
    const float *norms = SEARCH_ROOM(search, float, ROOM_NORMS), *noises = SEARCH_ROOM(search, float, ROOM_NOISES);
    const float *scales = SEARCH_ROOM(search, float, ROOM_SCALES_OF_SIGNS);
    for (uint32_t v = 0; v < search->views; v++) {
        const float ratio = norms[v] > 0.0f ? noises[v] / norms[v] : 0.0f; // of the deviations; no square overflows
        const float share = norms[v] > 0.0f ? 1.0f / (1.0f + ratio * ratio) : 0.0f;
        SEARCH_ROOM(search, float, ROOM_FACTORS)[v] = share * scales[v];
        SEARCH_ROOM(search, float, ROOM_DOUBTS)[v] = sqrtf(share) * noises[v];
    }
}

static void sieve_init(struct index_search *search, uint32_t slot, const struct source *source, struct dci_sieve *sieve)
{
    const struct dci_block *block = dci_cell_block(search, slot / DCI_LANES)->block;
    const float *centers = source->anchors;
    const float *doubts = SEARCH_ROOM(search, float, ROOM_DOUBTS),
                *reference = SEARCH_ROOM(search, float, ROOM_REFERENCE);
    float *offsets = SEARCH_ROOM(search, float, ROOM_OFFSETS), *weights = SEARCH_ROOM(search, float, ROOM_WEIGHTS);
    const float unit = block->unit[slot % DCI_LANES];
    for (uint32_t v = 0; v < search->views; v++) {
        const float doubt = doubts[v] * unit, limited = doubt < DOUBT_MOST ? doubt : DOUBT_MOST;
        const float margin = SIEVE_MARGIN * (1.0f + 2.0f * source->part->care) * doubt;
        offsets[v] = ((centers[(size_t)v * DCI_LANES] - reference[v]) + margin) * DCI_ROUGH_SLOPE + DCI_ROUGH_OFFSET;
        weights[v] = rough_exp(0.5f * limited * limited - margin);
    }
    *sieve = (struct dci_sieve){.low = source->part->low,
                                .span = source->part->high - source->part->low,
                                .factors = SEARCH_ROOM(search, float, ROOM_FACTORS),
                                .offsets = offsets,
                                .weights = weights};
}

// Looks at the top bits of a cell's blocks, and keeps the rows that may be selected; a rough sum of exponentials is all
// that is needed of the others. Returns how many count.
static uint32_t sift(struct index_search *search, struct source *source, struct dci_sieve *sieve)
{
    sieve->bar = search->bar;
    const uint32_t lanes = search->index->kernel->sift16(
        &search->seen, source->rows, sieve, SEARCH_ROOM(search, int16_t, ROOM_SIGNS_OF_LANES),
        SEARCH_ROOM(search, float, ROOM_TERMS), SEARCH_ROOM(search, float, ROOM_ROUGH));
    for (uint32_t passed = lanes & ((1u << DCI_LANES) - 1); passed != 0; passed &= passed - 1) {
        keep(search, source, (uint32_t)__builtin_ctz(passed));
    }
    return lanes >> DCI_LANES;
}

void dci_open_neighbours(struct index_search *search, uint32_t part, uint32_t first, uint32_t end)
{
    struct part *in = &search->parts[part];
    for (uint32_t p = first - first % DCI_LANES; p < end; p += DCI_LANES) {
        const uint32_t lane = p < first ? first - p : 0, lane_end = end - p < DCI_LANES ? end - p : DCI_LANES;
        (void)add(search, &(struct scored){.page = TREE_NONE,
                                           .cell = TREE_NONE,
                                           .place = p,
                                           .begin = (uint8_t)lane,
                                           .end = (uint8_t)lane_end,
                                           .part = (uint8_t)part,
                                           .only = TREE_NONE});
        uint32_t live = 0;
        for (uint32_t i = lane; i < lane_end; i++) {
            live += dci_tail_block(in->index, p)->rows[i] > 0.0f ? 1 : 0;
        }
        search->tokens_scored += live;
        in->tokens_scored += live;
        search->eligible_scored += search->phase == SEARCH_TAIL ? live : 0;
    }
}

static uint32_t slot_of(const struct part *part, const struct node *cell)
{
    const uint32_t block = dci_node(part->index, cell->parent)->parts[cell->lane / DCI_LANES];
    return (part->cell_begin + block) * DCI_LANES + cell->lane % DCI_LANES;
}

// Asks for what dci_open_one will read of positions to come: their pages, then their cells, then their codes.
static void ahead_of_one(const struct index *index, uint32_t position)
{
    const uint32_t pages = position + 3 * ONES_AHEAD, cells = position + 2 * ONES_AHEAD, codes = position + ONES_AHEAD;
    if (pages >= index->indexed) {
        return;
    }
    const uint32_t page = dci_place_of(index, pages).page, owned = dci_place_of(index, cells).page;
    const struct index_place place = dci_place_of(index, codes);
    if (page != TREE_NONE) {
        dci_prefetch(dci_page(index, page), sizeof(struct page));
    }
    if (owned != TREE_NONE) {
        dci_prefetch(dci_node(index, dci_page(index, owned)->owner), sizeof(struct node));
    }
    if (place.page != TREE_NONE) {
        const struct page *leaf = dci_page(index, place.page);
        dci_prefetch(dci_rows_of(index, dci_node(index, leaf->owner), leaf->part, place.row), index->rows_stride);
    }
}

void dci_open_one(struct index_search *search, uint32_t part, uint32_t position)
{
    struct part *in = &search->parts[part];
    const struct index *index = in->index;
    ahead_of_one(index, position);
    const struct index_place place = dci_place_of(index, position);
    if (place.page == TREE_NONE) {
        return;
    }
    const struct page *page = dci_page(index, place.page);
    const struct node *cell = dci_node(index, page->owner);
    const uint32_t number = page->part * index->page_blocks + place.row / DCI_LANES, slot = slot_of(in, cell);
    search->tokens_scored++;
    in->tokens_scored++;
    if (search->query.query_count > 1 || search->block_count + SEARCH_LOOSE_MOST >= search->sieve_blocks) {
        (void)add(search, &(struct scored){.page = place.page,
                                           .cell = page->owner,
                                           .place = slot,
                                           .part = (uint8_t)part,
                                           .number = number,
                                           .only = position});
        return;
    }
    struct source source = {.anchors = dci_block_centers(search, slot / DCI_LANES) + slot % DCI_LANES, .part = in};
    source_init(cell, number, &source);
    index->kernel->signs16(&search->seen, source.rows, SEARCH_ROOM(search, int16_t, ROOM_SIGNS_OF_LANES));
    keep(search, &source, place.row % DCI_LANES);
}

static const struct node *lined_up(const struct index_search *search, uint32_t at)
{
    const uint32_t slot = SEARCH_ROOM(search, uint32_t, ROOM_TO_OPEN)[at];
    const struct cell_block *cells = dci_cell_block(search, slot / DCI_LANES);
    return dci_node(search->parts[cells->part].index, cells->block->child[slot % DCI_LANES]);
}

static void prefetch_codes(const struct index_search *search, uint32_t at)
{
    const struct index *index = search->index;
    const struct node *cell = lined_up(search, at);
    const uint32_t blocks = cell->part_count * index->page_blocks;
    dci_prefetch(dci_rows(index, cell, 0), blocks * index->rows_stride);
    if (!search->barred) {
        dci_prefetch(dci_lows(index, cell, 0), (size_t)blocks * DCI_LANES * index->code_row_bytes);
    }
}

static void look_ahead(const struct index_search *search, uint32_t at)
{
    for (uint32_t i = 0; at == 0 && i < NODES_AHEAD && i < search->to_open; i++) {
        dci_prefetch(lined_up(search, i), sizeof(struct node));
    }
    for (uint32_t i = 0; at == 0 && i < CODES_AHEAD && i < search->to_open; i++) {
        prefetch_codes(search, i);
    }
    if (at + NODES_AHEAD < search->to_open) {
        dci_prefetch(lined_up(search, at + NODES_AHEAD), sizeof(struct node));
    }
}

uint32_t dci_open_cell(struct index_search *search, uint32_t at)
{
    const uint32_t slot = SEARCH_ROOM(search, uint32_t, ROOM_TO_OPEN)[at];
    const struct cell_block *cells = dci_cell_block(search, slot / DCI_LANES);
    struct part *part = &search->parts[cells->part];
    const struct index *index = part->index;
    const uint32_t id = cells->block->child[slot % DCI_LANES];
    const struct node *cell = dci_node(index, id);
    const uint32_t blocks = cell->part_count * index->page_blocks;
    look_ahead(search, at);
    // A later cell's codes are asked for piece by piece between the blocks of this one: all at once they would keep the
    // processor's queue of misses full, and this cell's own reads would wait behind them.
    const struct node *later = at + CODES_AHEAD < search->to_open ? lined_up(search, at + CODES_AHEAD) : NULL;
    const uint32_t later_blocks = later == NULL ? 0 : later->part_count * index->page_blocks;
    uint32_t asked = 0, eligible = 0;
    const bool sifts = search->barred && all_is_seen(search) &&
                       search->block_count + blocks + SEARCH_LOOSE_MOST < search->sieve_blocks;
    struct dci_sieve sieve;
    struct source source = {.anchors = dci_block_centers(search, slot / DCI_LANES) + slot % DCI_LANES, .part = part};
    if (sifts) {
        sieve_init(search, slot, &source, &sieve);
    }
    for (uint32_t block = 0; block < blocks; block++) {
        for (; asked * blocks < (block + 1) * later_blocks; asked++) {
            dci_prefetch(dci_rows(index, later, asked), index->rows_stride);
            if (!sifts) {
                dci_prefetch(dci_lows(index, later, asked), (size_t)DCI_LANES * index->code_row_bytes);
            }
        }
        if (sifts) {
            source_init(cell, block, &source);
            eligible += sift(search, &source, &sieve);
        } else {
            eligible += add(search, &(struct scored){.page = cell->parts[block / index->page_blocks],
                                                     .cell = id,
                                                     .place = slot,
                                                     .part = (uint8_t)cells->part,
                                                     .number = block,
                                                     .only = TREE_NONE});
        }
    }
    search->eligible_scored += eligible;
    search->tokens_scored += eligible;
    part->tokens_scored += eligible;
    search->opened_tokens += cell->count;
    part->tree_opened += cell->count;
    return blocks;
}
