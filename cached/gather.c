// Gathers that wait for pages, see gather.h. Belongs to the shard of the lane. A gather's memory is the shard's
// arena's, counted as the index's.
//
// Invariant: while a lane has gathers it does not fall asleep, and the sequence's admission keeps appends away. Plans
// of its tree may be committed, behind which tokens lie elsewhere: places are looked up again whenever a gather goes
// on.
#include "cached/gather.h"

#include "cached/server.h"
#include "gpu/store.h"

#include <assert.h>
#include <string.h>

struct gather {
    struct gather *next;
    struct op_lane *part;
    size_t bytes;
    uint64_t deadline_ns;
    bool has_waited; // since places were found
    struct gather_plan plan;
    uint32_t next_number; // of the first token that has not been looked at
    uint32_t waiting_count, waiting_capacity;
    struct gather_token *waiting;     // [waiting_capacity], behind the selected
    struct index_selected selected[]; // the plan's
};

static uint32_t slots_of(const struct gather_plan *plan)
{
    return plan->sinks + plan->selected_count + plan->window;
}

// The tokens of up to `n` numbers from `number` on, of one part of the plan; returns how many. Their slots are not set.
static uint32_t resolve(const struct op_lane *part, const struct gather_plan *plan, uint32_t number, uint32_t n,
                        struct gather_token *tokens)
{
    struct index_place places[64];
    const uint32_t window = plan->sinks + plan->selected_count;
    uint64_t position = number < plan->sinks ? number : plan->window_from + number - window;
    uint32_t until = number < plan->sinks ? plan->sinks : number < window ? window : window + plan->window;
    n = n < until - number ? n : until - number;
    n = n < 64 ? n : 64;
    if (number >= plan->sinks && number < window) {
        for (uint32_t i = 0; i < n; i++) {
            const struct index_selected *selected = &plan->selected[number + i - plan->sinks];
            tokens[i] = (struct gather_token){
                .position = selected->position, .lane = op_lane_at(part, selected->position), .place = selected->place};
        }
        return n;
    }
    const struct sequence *sequence = part->admission->sequence;
    const uint32_t stem = sequence_stem_number(sequence, position);
    struct lane *lane = op_lane_in(part, sequence_stem(sequence, stem));
    const uint64_t in_stem = sequence_stem_end(sequence, stem) - position;
    n = n < in_stem ? n : (uint32_t)in_stem;
    index_locate(lane->index, position - lane->stem->first, n, places);
    for (uint32_t i = 0; i < n; i++)
        tokens[i] = (struct gather_token){.position = (uint32_t)(position + i), .lane = lane, .place = places[i]};
    return n;
}

static bool is_kept(const struct gather_plan *plan, uint32_t number)
{
    return plan->cell && plan->cell->entries[number].is_kept;
}

static uint32_t slot_of(const struct gather_plan *plan, uint32_t number)
{
    return plan->cell ? plan->cell->entries[number].slot : number;
}

uint32_t gather_next(const struct op_lane *part, const struct gather_plan *plan, uint32_t *number, uint32_t n,
                     struct gather_token *tokens)
{
    const uint32_t slots = slots_of(plan);
    uint32_t count = 0;
    while (count < n && *number < slots) {
        if (is_kept(plan, *number)) {
            ++*number;
            continue;
        }
        struct gather_token *some = tokens + count;
        const uint32_t resolved = resolve(part, plan, *number, n - count, some);
        for (uint32_t i = 0; i < resolved; i++, ++*number) {
            if (is_kept(plan, *number))
                continue;
            tokens[count] = some[i];
            tokens[count++].slot = slot_of(plan, *number);
        }
    }
    return count;
}

bool gather_is_resident(const struct op_lane *part, const struct gather_plan *plan)
{
    struct gather_token tokens[64];
    for (uint32_t number = 0, n; (n = gather_next(part, plan, &number, 64, tokens)) > 0;) {
        for (uint32_t i = 0; i < n; i++) {
            if (!tokens[i].lane->pages[tokens[i].place.page].memory)
                return false;
        }
    }
    return true;
}

// A plan may have moved it since it was looked at last.
static void look_up(struct gather_token *token)
{
    index_locate(token->lane->index, token->position - token->lane->stem->first, 1, &token->place);
}

// Copies a token whose page is in memory, and keeps it otherwise. ICE_PAGE_LOST where it will never come. What a page
// was read for does not count as a use of it: only who comes again does, else a page that is needed once would stay as
// long as one that is needed always.
static ice_status take(struct gather *gather, struct gather_token token, bool waited)
{
    if (gather->has_waited)
        look_up(&token);
    struct page *page = &token.lane->pages[token.place.page];
    const uint8_t visited = page->visited;
    const uint8_t *row = gather_row(&token, 2 * token.lane->stem->row_bytes);
    if (row && waited)
        page->visited = visited;
    if (row)
        gather_put(gather->part, &token, row);
    else if (lane_page_is_lost(token.lane, token.place.page))
        return ICE_PAGE_LOST;
    else
        gather->waiting[gather->waiting_count++] = token;
    return ICE_OK;
}

// Copies what is in memory. Asks for nothing: that could push out what another gather is about to copy.
static ice_status copy_resident(struct gather *gather)
{
    const uint32_t waiting = gather->waiting_count;
    gather->waiting_count = 0;
    for (uint32_t i = 0; i < waiting; i++) {
        const ice_status status = take(gather, gather->waiting[i], true);
        if (status != ICE_OK)
            return status;
    }
    while (gather->waiting_count < gather->waiting_capacity) {
        struct gather_token tokens[64];
        const uint32_t room = gather->waiting_capacity - gather->waiting_count;
        const uint32_t n =
            gather_next(gather->part, &gather->plan, &gather->next_number, room < 64 ? room : 64, tokens);
        if (n == 0)
            break;
        for (uint32_t i = 0; i < n; i++) {
            const ice_status status = take(gather, tokens[i], false);
            if (status != ICE_OK)
                return status;
        }
    }
    return gather->waiting_count > 0 ? LANE_WAITS : ICE_OK;
}

static void ask_for_missing(struct gather *gather, struct shard *shard)
{
    bool room = true; // where there is none what comes makes some
    shard->tier.urgent = gather->part->op->kind == OP_RETRIEVE;
    for (uint32_t i = 0; i < gather->waiting_count && room; i++)
        room = tier_read(shard, gather->waiting[i].lane, gather->waiting[i].place.page);
    shard->tier.urgent = false;
}

// A selected token's share of the attention; 0 for those at the ends, of which only the sum is known.
static float mass_of(const struct gather_plan *plan, uint32_t number)
{
    const bool selected = number >= plan->sinks && number < plan->sinks + plan->selected_count;
    return selected ? plan->selected[number - plan->sinks].mass : 0;
}

// The deadline has passed: what is in the landing or in memory now, in slots of its own.
static void cut_short(struct gather *gather, struct shard *shard)
{
    const struct gather_plan *plan = &gather->plan;
    struct op_lane *part = gather->part;
    const uint32_t slots = slots_of(plan);
    struct gather_token token;
    bool *have_row = (bool *)shard->record; // it was large enough for the plan, which no longer needs it
    uint32_t *scratch = shard->record + slots;
    for (uint32_t i = 0; i < slots; i++) {
        (void)resolve(part, plan, i, 1, &token);
        look_up(&token);
        have_row[i] = token.lane->pages[token.place.page].memory;
    }
    record_cut(plan->cell, have_row, scratch);
    part->count = 0;
    for (uint32_t i = 0; i < slots; i++) {
        if (slot_of(plan, i) == RECORD_NO_SLOT) {
            part->mass -= mass_of(plan, i);
            continue;
        }
        part->count++;
        if (is_kept(plan, i))
            continue;
        (void)resolve(part, plan, i, 1, &token);
        look_up(&token);
        token.slot = slot_of(plan, i);
        gather_put(part, &token, gather_row(&token, 2 * token.lane->stem->row_bytes));
    }
    part->partial = true;
}

// True where the gather is over; its part is finished and its memory given back then.
static bool run(struct gather *gather, struct shard *shard, uint64_t now_ns)
{
    struct op_lane *part = gather->part;
    struct lane *lane = part->lane;
    const bool cancelled = atomic_load_explicit(&part->op->cancelled, memory_order_relaxed);
    ice_status status = cancelled ? ICE_UNKNOWN_SESSION : copy_resident(gather);
    if (status == LANE_WAITS && now_ns < gather->deadline_ns)
        return false;
    if (status == LANE_WAITS && part->op->kind == OP_RETRIEVE) {
        cut_short(gather, shard);
        ask_for_missing(gather, shard); // whoever asks again finds more
        status = ICE_OK;
    } else if (status == LANE_WAITS) {
        status = ICE_TIMEOUT;
    }
    const size_t bytes = gather->bytes;
    op_lane_release(part);
    lane_release_memory(lane, gather, bytes);
    op_lane_finish(part, shard, status);
    return true;
}

static void queue_push(struct shard *shard, struct gather *gather)
{
    gather->has_waited = true;
    gather->next = NULL;
    if (shard->gathers)
        shard->gathers_tail->next = gather;
    else
        shard->gathers = gather;
    shard->gathers_tail = gather;
}

ice_status gather_start(struct op_lane *part, struct shard *shard, const struct gather_plan *plan)
{
    const uint32_t slots = slots_of(plan), capacity = slots < GATHER_BATCH ? slots : GATHER_BATCH;
    const size_t bytes =
        sizeof(struct gather) + plan->selected_count * sizeof *plan->selected + capacity * sizeof(struct gather_token);
    struct gather *gather = lane_acquire_memory(part->lane, bytes);
    if (!gather)
        return ICE_INDEX_FULL;
    const uint64_t now_ns = env_now_ns(shard->server->env);
    *gather = (struct gather){.part = part, .bytes = bytes, .plan = *plan, .waiting_capacity = capacity};
    if (plan->selected_count > 0)
        memcpy(gather->selected, plan->selected, plan->selected_count * sizeof *plan->selected);
    gather->plan.selected = gather->selected;
    gather->waiting = (struct gather_token *)(gather->selected + plan->selected_count);
    gather->deadline_ns = part->op->kind == OP_RETRIEVE ? part->op->deadline_ns : now_ns + SERVER_ROOM_WAIT_NS;
    part->count = slots;
    op_lane_hold(part);
    if (run(gather, shard, now_ns))
        return ICE_OK;
    ask_for_missing(gather, shard);
    queue_push(shard, gather);
    shard_look_again(shard, gather->deadline_ns);
    return ICE_OK;
}

uint64_t gather_all(struct shard *shard, uint64_t now_ns)
{
    uint64_t next_ns = UINT64_MAX;
    struct gather *gather = shard->gathers;
    shard->gathers = NULL; // what ends may start others
    while (gather) {
        struct gather *next = gather->next;
        if (!run(gather, shard, now_ns)) {
            next_ns = gather->deadline_ns < next_ns ? gather->deadline_ns : next_ns;
            queue_push(shard, gather);
        }
        gather = next;
    }
    for (gather = shard->gathers; gather; gather = gather->next)
        ask_for_missing(gather, shard);
    return next_ns;
}
