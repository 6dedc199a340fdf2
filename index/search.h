// The state of a search. Private to search.c, view.c, open.c, rank.c and select.c.
//
// A view is one query vector: query position x query head. Tokens are scored in blocks of 16 lanes: rows of a page of
// the tree, or neighbours of head and tail. A cell is named by its slot, the number of its entry over all blocks of
// cells of all parts, those of a part following each other. Eligible are the positions low .. high-1, outside sinks and
// window: only they can be selected.
//
// Positions are the lane's, except where they are said to be a part's own: those count from its first token on, as its
// index does. What depends on the part is looked up in struct part; what all indexes of a search have in common
// (kernel, sizes of codes, tokens of a page) is asked of the first one.
#ifndef ICECACHE_INDEX_SEARCH_H
#define ICECACHE_INDEX_SEARCH_H

#include "index/tree.h"

// Scores kept between scoring and settling, in elements; what does not fit is scored again. The same for the scores of
// anchors.
#define SEARCH_SCORES_MAX  (1u << 20)
#define SEARCH_CENTERS_MAX (1u << 20)

// Deviation of scores around their anchor before it has been measured, in units of the isotropic one.
#define SEARCH_SPREAD_PRIOR 1.5f
#define SEARCH_SPREAD_LEAST 0.5f
#define SEARCH_SPREAD_MOST  4.0f

// Buckets of a histogram of positive floats: eight to an octave, the first one for all below 2^-112, the last one for
// all from 2^15.875 on.
#define SEARCH_BUCKETS      1024u
#define SEARCH_BUCKET_SHIFT 20u
#define SEARCH_BUCKET_FIRST (15u << 3) // of 2^-112, without the others below it

enum search_phase {
    SEARCH_CENTERS, // scores of all anchors, and the largest that they promise
    SEARCH_ENDS,    // sinks and window
    SEARCH_TAIL,    // head and tail
    SEARCH_SURVEY,  // estimated mass of the tree, per view
    SEARCH_HOPES,   // the most that a cell's best token may have; the best cells are opened to begin with
    SEARCH_OPEN,    // cells' tokens are scored
    SEARCH_WEIGH,   // masses so far, and how far scores spread around anchors
    SEARCH_MERITS,  // mass that unopened cells may add to the selection; the best are opened
    SEARCH_TOTALS,  // exponentials of all scores
    SEARCH_REST,    // estimated mass of what was not opened, per view
    SEARCH_MASSES,  // mass of every scored token
    SEARCH_DONE,
};

// A part as a search sees it. Its own positions all.
struct part {
    const struct index *index;
    uint32_t first, count;             // the lane's position of its first token; how many tokens it has
    uint32_t low, high;                // eligible
    uint32_t visible;                  // tokens up to the last query
    uint32_t cell_begin, cell_end;     // its blocks of cells among those of all parts
    uint32_t tokens_scored;            // of all its tokens
    uint32_t tree_tokens, tree_opened; // tokens of its cells, and of those of them that were opened
    float care;                        // of the sieve with its cells, 0 to 1
};

struct cell_block {
    const struct dci_block *block;
    uint32_t part;
};

// A block of scored lanes.
struct scored {
    uint32_t page;      // of the tree
    uint32_t cell;      // TREE_NONE: of head or tail; SEARCH_LOOSE: loose rows
    uint32_t place;     // head and tail: the part's own position of lane 0; rows of one cell: its slot
    uint8_t begin, end; // head and tail: the lanes that count
    uint8_t part;       // but for loose rows
    bool counted;       // its exponentials are part of the sums
    uint32_t number;    // which block of the cell's run; which loose block
    uint32_t only;      // the one position of the part's own that counts (sinks and window in the tree); TREE_NONE: all
                        // eligible ones
};
static_assert(INDEX_PARTS_MAX <= UINT8_MAX, "the number of a part fits");

// 16 rows that passed the sieve, each of any cell.
struct loose {
    uint32_t positions[DCI_LANES], pages[DCI_LANES];
    uint16_t rows[DCI_LANES];
    uint8_t parts[DCI_LANES];
};

// A loose block on its way: it is scored when the next one is full, so that its rows have had time to arrive.
struct waiting {
    struct dci_lanes lanes;
    uint32_t loose, count;
};

struct candidate {
    float mass;
    uint32_t position; // page-wise: the lowest one
    uint32_t block;    // page-wise: the page's first block
    uint32_t lane;
};

#define SEARCH_LOOSE (TREE_NONE - 1)

// Blocks of loose rows that may wait. What passes the sieve must be kept, so there is no sieve without room for them.
#define SEARCH_LOOSE_MOST 3u

// Blocks of memory and their sizes, grown by reserve only.
struct room {
    void *block;
    size_t bytes;
};
enum room_name {
    ROOM_NORMS,           // per view: scale * |q|, times the spread
    ROOM_STEPS,           // per view: dci_views
    ROOM_SUMS,            // per view: dci_views
    ROOM_ORIGINS,         // per view: what exponentials are relative to
    ROOM_UNITS,           // per view: exp of the origin less the reference
    ROOM_ZEROS,           // per view: 0, the base of the tail
    ROOM_REFERENCE,       // per view: estimated log-sum-exp
    ROOM_ZEROS_OF_TABLES, // per view: dci_views
    ROOM_STEPS_OF_TABLES, // per view: dci_views
    ROOM_SCALES_OF_SIGNS, // per view: what turns a sum of signs, times a row's scale, into the bits of a term
    ROOM_FACTORS,         // per view: dci_sieve
    ROOM_OFFSETS,         // per view: dci_sieve
    ROOM_WEIGHTS,         // per view: dci_sieve; before, while references are judged, exp of the largest score
    ROOM_NOISES,          // per view: deviation of what the top bits say, for an isotropic deviation of 1 of the keys
    ROOM_DOUBTS,          // per view: the deviation that is left when it is known how scores spread around anchors
    ROOM_SHIFTS,          // per view: reference of the survey, then exp of it less the final one
    ROOM_SEEN,            // per query position: tokens whose spread was measured
    ROOM_REST,            // per view: estimated sum of exp(score - reference) of what was not opened
    ROOM_INVERSE, // per view: 1 / sum of all exp(score - origin), over the number of views; before, the largest score
    ROOM_TOPS,    // per view and lane: largest score so far
    ROOM_LANES,   // per view and lane: sums of exponentials
    ROOM_ROUGH,   // per view and lane: rough sums of exp(score - reference) of blocks that were dropped
    ROOM_SPREADS, // per view and lane: promised tops, then sums of squared deviations, at last of what was not opened
                  // of a part
    ROOM_UNSEEN,  // per view and lane: largest scores with those that the view does not see; nobody asks for them
    ROOM_ANCHORS, // per view and lane: scores of one block's anchors
    ROOM_BLOCK,   // per view and lane: scores of one block
    ROOM_TERMS, // per view and lane: dci_kernel.sift16; exponentials that are not kept; sums that references are judged
                // by
    ROOM_ANCHORS_OF_LANES, // per view and lane: dci_lanes, of one block; then of the two that wait
    ROOM_SIGNS_OF_LANES,   // likewise
    ROOM_BASES,            // per part and view: dci_views
    ROOM_CODES,            // per view: codes of the rotated query
    ROOM_FINE,             // per view: dci_views
    ROOM_TABLES,           // per view: dci_views
    ROOM_CELL_BLOCKS,      // struct cell_block
    ROOM_SCORED,           // struct scored, per block
    ROOM_LOOSE,            // struct loose, per block
    ROOM_SCORES,           // scores of the first blocks
    ROOM_EXPS,             // exponentials of them
    ROOM_MASSES,           // per block and lane
    ROOM_CENTERS,          // scores of the first blocks of anchors
    ROOM_PROMISES,         // expected masses of the first blocks of anchors
    ROOM_MERITS,           // per slot: hope, then merit
    ROOM_TO_OPEN,          // slots
    ROOM_CANDIDATES,
    ROOM_SELECTED,
    ROOM_SORTED,
    ROOM_COUNT,
};

struct index_search {
    struct dci_memory memory;
    struct room rooms[ROOM_COUNT];

    // One search.
    const struct index *index; // the first part's
    struct index_query query;
    struct dci_views seen, plain; // the queries as codes see them, but for the bases; without base, as the tail does
    enum search_phase phase;
    uint32_t views, visible, low, high, sinks_end;
    uint32_t select_max; // tokens or pages
    uint32_t cursor;
    uint32_t part_count, at_part;         // the part that the cursor over sinks, window, head and tail is in
    uint32_t block_count, ends_blocks;    // scored; those of sinks and window come first
    uint32_t settled;                     // blocks whose masses are known
    uint32_t score_blocks, center_blocks; // how many fit
    uint32_t sieve_blocks;                // the same, for loose rows; tests that want no sieve set it to 0
    uint32_t to_open, rounds;
    uint64_t tree_tokens, opened_tokens; // of the trees; of cells that were opened
    uint32_t eligible_scored, tokens_scored;
    uint32_t cell_blocks;
    uint32_t loose_count;
    struct waiting waiting[2];
    uint32_t filling;                         // which of them
    uint32_t bar_bucket, above_bar;           // of the worst token that may be selected; how many are in higher ones
    float bar;                                // a token of less mass cannot be selected
    float least, log_least;                   // mass of the worst selected token (page-wise: page) so far, and its log
    double selected_sum;                      // masses of the best so far, in units of the reference
    double ends_sum, scored_sum, waiting_sum; // likewise: of sinks and window, of all that is scored, of the rest
    float highest_hope;
    float least_selected; // mass; after finish
    const struct index_selected *sorted;
    bool begun, everything, barred, weighed; // merits and promises are known
    bool balanced;                           // the references are worth something
    bool placed;                             // the origins are known
    float weights[SEARCH_BUCKETS];           // a histogram: sum of merits
    uint32_t counts[SEARCH_BUCKETS];
    uint32_t tokens_of[SEARCH_BUCKETS]; // of scored tokens, while the sieve works
    struct part parts[INDEX_PARTS_MAX];
};

#define SEARCH_ROOM(search, type, name) ((type *)(search)->rooms[name].block)

// Asks for memory that will be read soon.
static inline void dci_prefetch(const void *memory, size_t bytes)
{
    const size_t line = 64;
    for (size_t i = 0; i < bytes; i += line) {
        __builtin_prefetch((const unsigned char *)memory + i, 0, 2);
    }
}
static inline struct scored *dci_scored(const struct index_search *search, uint32_t block)
{
    return SEARCH_ROOM(search, struct scored, ROOM_SCORED) + block;
}
static inline const struct cell_block *dci_cell_block(const struct index_search *search, uint32_t block)
{
    return SEARCH_ROOM(search, struct cell_block, ROOM_CELL_BLOCKS) + block;
}
static inline const struct part *dci_part_of_slot(const struct index_search *search, uint32_t slot)
{
    return &search->parts[dci_cell_block(search, slot / DCI_LANES)->part];
}
// The queries as the anchors of a part see them.
static inline const struct dci_views *dci_part_views(struct index_search *search, uint32_t part)
{
    search->seen.bases = SEARCH_ROOM(search, float, ROOM_BASES) + (size_t)part * search->views;
    return &search->seen;
}
static inline bool dci_search_is_kept(const struct index_search *search, uint32_t block)
{
    return block < search->score_blocks;
}

// ---- view.c ----
// The queries as codes see them. False when one is not finite, or so large that scores would not be.
bool dci_views_init(struct index_search *search);

// ---- search.c ----
void dci_search_begin_totals(struct index_search *search);

// ---- open.c: scoring ----
// Adds blocks of neighbours of head or tail, and scores them: a part's own positions first .. end-1.
void dci_open_neighbours(struct index_search *search, uint32_t part, uint32_t first, uint32_t end);
void dci_open_one(struct index_search *search, uint32_t part, uint32_t position); // a token of sinks or window
// Opens number `at` of the cells that are lined up. Returns blocks scored.
uint32_t dci_open_cell(struct index_search *search, uint32_t at);
void dci_open_begin_sieve(struct index_search *search); // when the bar and the spread are known
void dci_open_flush(struct index_search *search);       // scores what waits
// Scores of a block: kept ones, else computed into ROOM_BLOCK.
float *dci_block_scores(struct index_search *search, uint32_t block);
// TREE_NONE: none that the search sees.
uint32_t dci_scored_position(const struct index_search *search, const struct scored *scored, uint32_t lane);
uint32_t dci_scored_part(const struct index_search *search, const struct scored *scored, uint32_t lane);
struct index_place dci_scored_place(const struct index_search *search, const struct scored *scored, uint32_t lane);
// Scores of the anchors of a block of cells.
const float *dci_block_centers(struct index_search *search, uint32_t block);

// ---- rank.c: which cells ----
void dci_rank_centers(struct index_search *search, uint32_t block);
void dci_rank_begin_survey(struct index_search *search);
void dci_rank_survey(struct index_search *search, uint32_t block);
void dci_rank_fix_reference(struct index_search *search);
void dci_rank_hopes(struct index_search *search, uint32_t block);
void dci_rank_open_best(struct index_search *search); // by hope
void dci_rank_begin_weighing(struct index_search *search);
void dci_rank_weigh(struct index_search *search, uint32_t block);
void dci_rank_fix_weights(struct index_search *search);
void dci_rank_merits(struct index_search *search, uint32_t block);
// Lines up the cells worth opening.
enum dci_pick { PICK_NONE, PICK_SOME, PICK_AGAIN }; // again: the references were wrong; weigh once more
enum dci_pick dci_rank_pick(struct index_search *search);
// More tokens have been scored, with these masses: the worst that may be selected has at least that of the bar.
void dci_rank_raise_bar(struct index_search *search, const float *masses /* of 16 lanes */);
float dci_bucket_least(uint32_t bucket); // the smallest float of a bucket
void dci_rank_rest(struct index_search *search, uint32_t block);
uint32_t dci_bucket(float positive);

// ---- select.c ----
// Exponentials of a block's scores over the origins: kept ones, else computed into ROOM_TERMS. Their sums are counted
// once.
float *dci_search_exps(struct index_search *search, uint32_t block);
void dci_search_fix_inverse(struct index_search *search);
void dci_search_masses(struct index_search *search, uint32_t block);

#endif
