// Selections that keep some of the last one: the load knob of step reuse. The best tokens of a cell's last selection
// stay, the rest of the budget goes to the best others of a new search.
//
// Threads: those of the cell and of the scratch. No allocation; time linear in the tokens, but for the ordering of
// what was chosen among equals (a selection by halving, linear on average).
#ifndef ICECACHE_CACHED_KEEP_H
#define ICECACHE_CACHED_KEEP_H

#include "gpu/record.h"
#include "index/index.h"

struct keep_wish {
    uint32_t keep, budget; // keep is at most the budget
    uint32_t slots;        // of the landing: neither selection has more tokens
    uint64_t from, until;  // what can be selected: positions between sinks and window
    float coverage;        // 0, or the selection may be smaller than the budget
};

struct keep {
    struct index_selected *tokens; // [count], ascending by position, in the scratch; places are the caller's to set
    uint32_t count, slots;
    bool is_whole;                // they are the selection: no search is needed
    struct index_selected *spare; // scratch behind them
};

// There is a last selection, something of it is wanted, and not all tokens are selected anyway.
bool keep_applies(const struct record_cell *cell, const struct keep_wish *wish);
// Entries of scratch for a landing of so many slots.
size_t keep_scratch_count(uint32_t slots);
// The best wish->keep of the cell's last selection, without those outside of what can be selected. scratch: the
// caller's, for as long as the kept and the merged are used.
void keep_choose(struct keep *keep, const struct record_cell *cell, const struct keep_wish *wish,
                 struct index_selected *scratch);
// The kept, and the best of a search's tokens that are not among them, `room` in all (not fewer than are kept, nor
// more than the slots of the landing). In `selection` count and selected_mass become the merged one's: a kept token
// that the search has found has its new mass, another at most the smallest that was found. Ascending, in the scratch.
const struct index_selected *keep_merge(const struct keep *keep, struct index_selection *selection,
                                        const struct index_selected *found, uint32_t room);

#endif
