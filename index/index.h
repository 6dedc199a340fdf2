// The DCI-tree of one lane: which tokens do these queries attend to?
//
// Method: IceCache (arXiv 2604.10539) over Prioritized DCI (arXiv 1703.00440): a tree whose leaves are pages of similar
// tokens, grown by insertion, searched by the queries of a decode step. Two policies build it, see index_policy.
//
// The index is pure: no I/O, no clock, no threads, no logging; memory only through the allocator it is given, none in
// search. It keeps short codes of the keys (5 bits a coordinate), not the keys: K and V rows are the owner's. It moves
// no bytes: it says where a row belongs (page and row), and a change of place is a plan that the owner carries out and
// commits, or drops. Where it needs K rows again, to cluster tokens, it names their pages, see index_rows_get.
// Pages are numbered by the index (dense u32, reused after release); the owner maps them to memory. Tokens are named by
// position towards the outside.
//
// Determinism: the tree is a function of the seed and of the appended keys in order, not of how the appends were cut
// or when the work was done. Equal tree and query give the same selection, ties broken by the lower position.
//
// A lane's tokens may lie in several indexes, one behind the other, so that lanes with a common beginning share its
// indexes: one search runs over all of them, see index_part.
//
// Thread-safety: an index belongs to one thread; distinct indexes are independent. A search context may be used with
// any index, one search at a time.
#ifndef ICECACHE_INDEX_INDEX_H
#define ICECACHE_INDEX_INDEX_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define INDEX_HEAD_DIM_MAX    256u
#define INDEX_HEAD_DIM_STEP   16u
#define INDEX_PAGE_TOKENS_MAX 256u
#define INDEX_GROUP_MAX       64u  // query heads per KV head
#define INDEX_QUERIES_MAX     256u // query positions of one search
#define INDEX_TOKENS_MAX      (1u << 24)
#define INDEX_PARTS_MAX       64u // indexes of one search
#define INDEX_MUST_CHECK      __attribute__((warn_unused_result))

enum index_status {
    INDEX_OK = 0,
    INDEX_NO_MEMORY,  // the allocator refused; nothing changed
    INDEX_NOT_FINITE, // a key or query is NaN, infinite or too large (squared norm above 2^116, or scores above 1e30)
    INDEX_INVALID,    // a parameter is out of range; nothing changed
    INDEX_FULL,       // INDEX_TOKENS_MAX reached; nothing changed
};

enum index_dtype { INDEX_BF16 = 1, INDEX_FP16 = 2, INDEX_FP32 = 3 };

// Memory of the index. Sizes are passed back on release so that the owner can count bytes.
struct index_allocator {
    void *(*acquire)(void *owner, size_t bytes);              // 64-byte aligned, NULL when refused
    void (*release)(void *owner, void *memory, size_t bytes); // accepts NULL
    void *owner;
};

// How a node that has grown too large is divided; a new token goes to the nearest cell in either case.
enum index_policy {
    INDEX_MEANS = 0, // by 2-means on the keys; the default, the best that was measured
    // As in the papers: a seeded choice of its entries is promoted, the others hang under the nearest promoted one in
    // the space of T_K(k) = [k/c, sqrt(1 - |k|^2/c^2)], T_Q(q) = [q/|q|, 0] (section 3.1), c the largest key norm,
    // where the nearest neighbour is the largest inner product. Each level holds about r times the nodes of the one
    // below.
    INDEX_PROMOTION = 1,
};

struct index_params {
    uint32_t head_dim;      // multiple of 16, at most 256
    enum index_dtype dtype; // of the keys handed to index_append
    uint32_t page_tokens;   // rows of a page, at most 256; 0: 16
    enum index_policy policy;
    float promotion_ratio; // r: n_l = r * n_(l-1), 1/64 to 1/8, with INDEX_PROMOTION; 0: the default, 1/32
    uint64_t seed;
    bool is_continuation; // does not begin at the lane's first token: the first page of tokens is clustered as well
};

struct index;

INDEX_MUST_CHECK enum index_status index_create(const struct index_params *params,
                                                const struct index_allocator *allocator, struct index **out);
void index_destroy(struct index *index); // accepts NULL

uint64_t index_length(const struct index *index); // tokens appended
// Positions 0 .. indexed-1 need no clustering any more. The first page of tokens is never clustered: the first tokens
// are unlike all others (but for a continuation, which does not have them). It and the tokens from `indexed` on, the
// tail, are scanned by every search.
uint64_t index_indexed(const struct index *index);
// A digest of the tree. Same seed, keys, indexed count and history of forgetting: same version, same tree. 0 while
// nothing is indexed. Page ids are not part of it: they depend on when appends and commits happened.
uint64_t index_version(const struct index *index);
uint64_t index_bytes(const struct index *index);                    // memory held
uint32_t index_page_bound(const struct index *index);               // every page id in use is below it
uint32_t index_page_rows(const struct index *index, uint32_t page); // rows in use; 0: the page is not in use

// Where a token's K and V row lies. A token that was erased has page UINT32_MAX.
struct index_place {
    uint32_t page;
    uint32_t row;
};

// ---- append ----
// Two steps, so that an append over many lanes is all or nothing. prepare copies n keys behind the tail, checks them,
// and names the place of each new token; a page that was not in use before (index_page_rows is 0) is the owner's to
// provide before it commits. Until commit nothing of it can be seen; drop forgets it. One append may
// be prepared at a time. Appends and searches may happen at any point of a build, also while a plan is pending.
// keys: n rows of head_dim elements, stride_bytes apart (borrowed during the call; may change under the call without
// harm to the index). places: room for n entries, written on success only. INDEX_INVALID also when one is prepared.
INDEX_MUST_CHECK enum index_status index_append_prepare(struct index *index, const void *keys, size_t stride_bytes,
                                                        uint32_t n, struct index_place *places);
// Adds n tokens behind those that are prepared, so that a long append can be prepared in slices. On failure what was
// prepared before stays so. INDEX_INVALID where nothing is.
INDEX_MUST_CHECK enum index_status index_append_more(struct index *index, const void *keys, size_t stride_bytes,
                                                     uint32_t n);
// Where n of the prepared tokens lie, from the one at position `first` on.
void index_append_places(const struct index *index, uint64_t first, uint32_t n, struct index_place *places);
void index_append_commit(struct index *index);
void index_append_drop(struct index *index);

// No append will come any more: preparing one is INDEX_INVALID from now on. The build then clusters all whole pages of
// the tail, without holding back the newest tokens; a first tree may be made of INDEX_SEALED_FIRST tokens, fewer stay
// in the tail. The batches are a function of the keys and of the length now, not of when the build ran. Forgetting
// stays possible and lifts nothing. No append may be prepared. No effect when it is sealed already.
#define INDEX_SEALED_FIRST 64u
void index_seal(struct index *index);
bool index_is_sealed(const struct index *index);

// Where positions first .. first+n-1 lie (committed ones only; n of them must exist).
void index_locate(const struct index *index, uint64_t first, uint32_t n, struct index_place *places);
// Positions of the rows of a page, in row order, UINT32_MAX for a row that is not in use. Returns rows in use.
uint32_t index_page_positions(const struct index *index, uint32_t page, uint32_t *positions /* page_tokens */);

// ---- forget ----
// Both take effect at once and void a running build, with the rows given to it. A pending plan is void too: the pages
// it named as new are free again, and memory provided for them is the owner's to take back (they are not in
// `released`). released: room for index_page_bound entries; gets the ids of pages whose memory may go, *released_count
// how many. No append may be prepared.
//
// Forgets positions length .. index_length-1. The next append continues at `length`.
void index_truncate(struct index *index, uint64_t length, uint32_t *released, uint32_t *released_count);
// Forgets one token; its position stays empty. No effect when it is empty already.
void index_erase(struct index *index, uint64_t position, uint32_t *released, uint32_t *released_count);

// ---- build: clustering of the tail ----
// Work is done in slices, with no clock: each call does about work_units units (one unit: one key scored against one
// query or node at head_dim 128, roughly 5-20 ns) and returns. The cuts are at fixed token counts. The newest tokens
// stay in the tail: a batch is clustered when INDEX_RECENT more tokens have come after it, or the index is sealed.
#define INDEX_RECENT 64u

enum index_build_state {
    INDEX_BUILD_IDLE,     // nothing to do until more tokens are appended
    INDEX_BUILD_MORE,     // call again
    INDEX_BUILD_ROWS,     // K rows are needed: index_rows_get, index_rows_give, call again
    INDEX_BUILD_PLAN,     // a plan is pending: carry it out and commit it, or drop it
    INDEX_BUILD_NO_MEMORY // the allocator refused; the build's memory was given back; a later call begins it anew
};

// State INDEX_BUILD_ROWS only: the pages whose K rows are needed. *pages is borrowed until rows_give.
void index_rows_get(const struct index *index, const uint32_t **pages, uint32_t *page_count);
// keys[i]: the K row of row 0 of pages[i]; the page's rows lie stride_bytes apart. The array is borrowed during the
// call, the rows until the plan that follows is committed, or the index is truncated, erased from or destroyed. (A plan
// that is dropped keeps what it has worked out and does not look at the rows again.)
void index_rows_give(struct index *index, const void *const *keys, size_t stride_bytes);

// Copies of K and V rows that the owner makes. Sources stay valid and searchable until commit; targets are rows that
// are not in use, so the copies may be made in any order and in slices, with searches in between.
struct index_move {
    struct index_place from, to;
};
struct index_plan {
    const struct index_move *moves; // borrowed until commit or drop
    uint32_t move_count;
    const uint32_t *new_pages; // page ids that need memory before the first move
    uint32_t new_page_count;
    const uint32_t *released_pages; // page ids whose memory may go after commit (not before)
    uint32_t released_page_count;
};

// index_build_step would do something (false while a plan or rows are pending: it waits for the owner).
bool index_build_is_due(const struct index *index);
enum index_build_state index_build_step(struct index *index, uint64_t work_units);
void index_plan_get(const struct index *index, struct index_plan *plan); // state INDEX_BUILD_PLAN only
void index_plan_commit(struct index *index);
// The tree stays as it was. The plan stays worked out, its new pages' ids stay taken, and the next step returns it
// again.
void index_plan_drop(struct index *index);

// ---- search ----
// A run of a lane's tokens in an index of its own: the index's tokens 0 .. end-first-1 stand at positions first ..
// end-1 of the lane. Tokens that the index has beyond them are not seen: they are neither selected nor counted in
// masses of tokens, but estimates of cells that are not opened are made as if all of a cell's tokens were seen, and are
// then cut down to the share of the part's tokens that are.
struct index_part {
    const struct index *index;
    uint64_t first, end;
};
// All of an index as the only part of a lane.
static inline struct index_part index_part_whole(const struct index *index)
{
    return (struct index_part){index, 0, index_length(index)};
}

// Positions are of the lane.
struct index_query {
    const float *queries;    // [query][head][head_dim], after RoPE, unscaled; borrowed until search_finish
    uint32_t query_count;    // query positions, their masses are summed
    uint32_t head_count;     // query heads that share this KV head
    uint64_t first_position; // query i stands at first_position + i and sees positions 0 .. first_position + i
    float scale;             // softmax scale, above 0
    uint32_t budget;         // tokens to select outside sinks and window
    uint32_t sinks, window;  // positions < sinks, and the last `window` up to the last query; never selected
    bool page_wise; // whole pages of the tree, at most budget / page_tokens of them (at least one, so that up to
                    // page_tokens tokens may come back for a smaller budget); open pages of the tail count as pages
    float coverage; // in (0, 1]: stop as soon as the estimated mass of sinks, window and selection reaches it, and
                    // select no more than reaches it; 0: spend the budget
    float effort;   // share of the clustered tokens to look at, (0, 1]; the higher, the more carefully what cannot be
                    // selected is left out. 0: the default, as many as still promise mass
    // that counts. Enough are always scored to fill the budget (without coverage); a budget of all tokens
    // outside sinks and window selects them all, page-wise too
};

struct index_selected {
    uint32_t position;
    float mass;               // estimated share of the attention, mean over heads and queries
    struct index_place place; // in the index of the part that the position lies in
};
struct index_selection {
    uint32_t count;      // selected tokens, ascending by position
    float selected_mass; // sum of their masses
    float ends_mass;     // mass of sinks and window
    uint32_t scanned;    // tokens looked at: scored, or left out by the top bits of their codes
    bool partial;        // finished before the search was complete
};

struct index_search;

// A context for searches. It grows in index_search_reserve only.
INDEX_MUST_CHECK enum index_status index_search_create(const struct index_allocator *allocator,
                                                       struct index_search **out);
void index_search_destroy(struct index_search *search); // accepts NULL
// Makes room for a search with this query over these parts of a lane: at least one, INDEX_PARTS_MAX at most, from
// position 0 on, each beginning where the one before ends. A part may be without tokens. All their indexes have the
// same head_dim, dtype, page_tokens and seed. The only call that may allocate. The
// array is borrowed during the call.
INDEX_MUST_CHECK enum index_status index_search_reserve(struct index_search *search, const struct index_part *parts,
                                                        uint32_t part_count, const struct index_query *query);
// Begins a search (checks the queries); INDEX_NO_MEMORY where reserve did not make room for this query and these parts,
// or a plan was committed in between. The array is borrowed during the call, the indexes until finish: they must not be
// appended to or committed on until then; build steps may go on. A selection from several parts is that of one lane:
// all tokens are ranked together, and their masses have one sum.
INDEX_MUST_CHECK enum index_status index_search_begin(struct index_search *search, const struct index_part *parts,
                                                      uint32_t part_count, const struct index_query *query);
// Does about work_units units, at least one item: at most 128 keys, a cell, or the anchors of 128 cells, against all
// queries.
// True when complete.
bool index_search_step(struct index_search *search, uint64_t work_units);
// Selects from what has been scored so far. *tokens is borrowed from the context until its next begin or reserve.
void index_search_finish(struct index_search *search, struct index_selection *selection,
                         const struct index_selected **tokens);

// A page of one of a search's parts.
struct index_part_page {
    uint32_t part; // number in the array that the search began with
    uint32_t page; // of that part's index
};
// After finish, while the indexes have not changed since begin: the pages of those tokens that came next, which a
// budget of `more` tokens above the one that was asked for would have selected too. Some are likely to be selected by
// the next query. pages: room for `more` entries; a page may come twice. Returns how many. 0 for whole pages.
uint32_t index_search_near(struct index_search *search, uint32_t more, struct index_part_page *pages);

// ---- image: an index as bytes ----
// A saved index, made again from its bytes, behaves as the one it was saved from: version, places, page ids, searches,
// whether it is sealed, and all that comes after, but for index_bytes. Nothing is clustered anew. The image is what was
// committed: a running build or a pending plan is not in it, with the page ids that these have taken; the loaded index
// begins that build anew and comes to the same tree. Equal indexes have equal images.
//
// The save's state, in the caller's storage, where it stays until the save is over; all of it is private to index/.
struct index_save {
    const struct index *index;
    uint64_t left, digest;
    uint32_t section, item, piece, link;
    const unsigned char *from;
    size_t from_bytes;
    uint32_t scratch[64];
};

// Bytes of the image that a save begun now gives. No append may be prepared.
uint64_t index_image_bytes(const struct index *index);
// Until the save is over the index must not be appended to, sealed, built, committed on or made to forget; searches may
// go on.
// A save may be left unfinished.
void index_save_begin(const struct index *index, struct index_save *save);
// Writes the next bytes of the image to `out`, as many as there is room for. Returns how many; 0: that was all.
size_t index_save_step(struct index_save *save, void *out, size_t room);

struct index_load;

// Begins to make an index of these parameters from an image of so many bytes. No image, whatever its bytes, does harm:
// a load takes no more memory than about eight times image_bytes, and ends with INDEX_INVALID where the bytes are no
// image of such an index. INDEX_NO_MEMORY, INDEX_INVALID: nothing was begun. allocator: also the loaded index's.
INDEX_MUST_CHECK enum index_status index_load_begin(const struct index_params *params,
                                                    const struct index_allocator *allocator, uint64_t image_bytes,
                                                    struct index_load **out);
// The next n bytes of the image, cut anywhere (borrowed during the call). What was once refused stays refused.
INDEX_MUST_CHECK enum index_status index_load_feed(struct index_load *load, const void *bytes, size_t n);
// Ends the load: hands over the index, or gives all memory back and says why there is none (INDEX_INVALID also where
// bytes are missing).
INDEX_MUST_CHECK enum index_status index_load_finish(struct index_load *load, struct index **out);
void index_load_drop(struct index_load *load); // accepts NULL

// ---- check ----
// Full walk over the invariants: every token in exactly one page row, positions and places agree, counts, anchors and
// radii agree with what lies below them, no node is larger than allowed. Writes the first violation to `text`.
bool index_check(const struct index *index, char *text, size_t capacity);

// Shape of the tree, for tests and statistics.
struct index_shape {
    uint32_t levels; // including level 0, the tokens; level 1 are cells
    uint32_t level_counts[16];
    uint32_t pages; // in use, open ones included
    uint32_t leaf_pages;
    double fill; // tokens per leaf page
};
void index_shape(const struct index *index, struct index_shape *shape);

#endif
