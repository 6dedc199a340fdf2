// The state of a search. Private to search.c, rank.c and select.c.
//
// A view is one query vector: query position x query head. Tokens to score are lined up as entries and scored in blocks
// of 16. Eligible are the positions low .. high-1, outside sinks and window: only they can be selected.
#ifndef ICECACHE_INDEX_SEARCH_H
#define ICECACHE_INDEX_SEARCH_H

#include "index/tree.h"

// Tokens whose scores are compared with their pages' means before anything is ranked.
#define SEARCH_SAMPLE 64u

// Scores kept between scoring and settling, in elements; what does not fit is scored again.
#define SEARCH_SCORES_MAX (1u << 20)
// The same for the estimated scores of pages' means.
#define SEARCH_CENTERS_MAX (1u << 20)

// Pages taken from the queue before they are opened, so that their memory can be asked for early; of so many of them
// the key rows too.
#define SEARCH_AHEAD      16u
#define SEARCH_ROWS_AHEAD 4u

// The merit of a page that does not wait any more.
#define SEARCH_TAKEN (-1.0f)

enum search_phase {
    SEARCH_ENDS,    // sinks and window
    SEARCH_TAIL,    // tokens that are not indexed
    SEARCH_CENTERS, // estimated scores of the means of all leaf pages
    SEARCH_MEASURE, // how far scores spread around their pages' means, per view
    SEARCH_SURVEY,  // estimated mass of every leaf page, per view
    SEARCH_PREVIEW, // the tail's tokens enter the running best
    SEARCH_SEED,    // blocks of pages enter the queue
    SEARCH_OPEN,    // best first: a page's tokens are scored
    SEARCH_REST,    // estimated mass of what was not opened, per view
    SEARCH_SETTLE,  // mass of every scored token
    SEARCH_DONE,
};

// The best page of a block that still waits to be opened.
struct front {
    float merit;  // hoped-for mass of its best token (page-wise: of the page)
    uint32_t tie; // lowest position
    uint32_t slot;
};

struct candidate {
    float mass;
    uint32_t position; // page-wise: the lowest one
    uint32_t entry;    // page-wise: the first one of the page
};

// Blocks of memory and their sizes, grown by reserve only.
struct room {
    void *block;
    size_t bytes;
};
enum room_name {
    ROOM_NORMS,     // per view: scale * |q|, from the measuring on times the measured spread
    ROOM_TOP,       // per view: largest score so far
    ROOM_TOTAL,     // per view: sum of exp(score - top)
    ROOM_REFERENCE, // per view: estimated log-sum-exp, fixed after the survey
    ROOM_INVERSE,   // per view: final 1 / (total + rest)
    ROOM_REST,      // per view: estimated sum of exp(score - top) of what was not opened
    ROOM_SCRATCH,   // per view: sums of the measurement
    ROOM_ZEROS,     // per view: dci_views
    ROOM_STEPS,
    ROOM_BASES,
    ROOM_CODES,
    ROOM_BLOCK,       // one block's scores
    ROOM_ROWS,        // one block's keys
    ROOM_SCORES,      // scores of the first blocks
    ROOM_POSITIONS,   // per entry
    ROOM_MASSES,      // per entry
    ROOM_CENTERS,     // estimated scores of the means of the first blocks of pages
    ROOM_MERITS,      // per slot; SEARCH_TAKEN once it is taken from the queue
    ROOM_PAGE_MASSES, // per slot, with a coverage target only
    ROOM_QUEUE,       // one front per block of pages
    ROOM_BEST,        // the best previews so far, worst on top
    ROOM_CANDIDATES,
    ROOM_SELECTED,
    ROOM_SORTED,
    ROOM_COUNT,
};

struct index_search {
    struct dci_memory memory;
    struct room rooms[ROOM_COUNT];

    // One search.
    const struct index *index;
    struct index_query query;
    enum search_phase phase;
    uint32_t views, visible, low, high, sinks_end;
    uint32_t tail_begin, cursor;
    uint32_t entry_count, scored; // entries lined up, and how many of them are scored
    uint32_t ends_count;          // entries of sinks and window, padding included
    uint32_t settled;
    uint32_t eligible_scored, tokens_scored;
    uint32_t measured; // tokens of the sample that counted
    uint32_t pages_opened, pages_max;
    uint32_t queue_count, best_count, best_room;
    uint64_t waiting_tokens;          // in what waits
    uint32_t score_blocks;            // blocks that fit in ROOM_SCORES
    uint32_t center_blocks;           // and in ROOM_CENTERS
    struct front ahead[SEARCH_AHEAD]; // a ring: taken from the queue, to be opened next
    uint32_t ahead_first, ahead_count;
    double best_sum, ends_preview, scored_preview, waiting_mass;
    bool begun;
};

#define SEARCH_ROOM(search, type, name) ((type *)(search)->rooms[name].block)

// ---- search.c ----
void dci_search_line_up(struct index_search *search, uint32_t position);
// Scores of a block of entries: kept ones, else computed into ROOM_BLOCK.
const float *dci_search_block_scores(struct index_search *search, uint32_t block);

// ---- rank.c ----
// Estimates are made from the sketches of pages and the measured spread.
void dci_rank_encode(struct index_search *search, uint32_t view); // with a tree only
void dci_rank_center(struct index_search *search, uint32_t block);
void dci_rank_measure(struct index_search *search, uint32_t sample); // one token of the sample
void dci_rank_fix_spread(struct index_search *search);
void dci_rank_survey(struct index_search *search, uint32_t block);
void dci_rank_fix_reference(struct index_search *search);
void dci_rank_push(struct index_search *search, uint32_t block);
void dci_rank_look_ahead(struct index_search *search);         // fills the ring from the queue
const struct page *dci_rank_take(struct index_search *search); // the next page of the ring
void dci_rank_give_back(struct index_search *search);          // what the ring holds waits again
void dci_rank_rest(struct index_search *search, uint32_t block);
void dci_rank_offer(struct index_search *search, float preview); // to the running best
float dci_rank_waiting_share(const struct index_search *search);
bool dci_rank_is_enough(const struct index_search *search); // nothing that waits is worth opening

// ---- select.c ----
void dci_search_settle(struct index_search *search, uint32_t block);
void dci_search_fix_inverse(struct index_search *search);

#endif
