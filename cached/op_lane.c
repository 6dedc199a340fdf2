// What an operation does with one lane in each of its phases, on the lane's shard (op_phase.c).
//
// Memory that a worker can write (staging) is read exactly once per byte that matters: rows are copied into frames and
// into the index first and judged there.
#include "cached/op.h"

#include "cached/gather.h"
#include "cached/keep.h"
#include "cached/server.h"
#include "gpu/store.h"
#include "proto/dtype.h"

#include <assert.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

// ---- the phases of one lane ----

void op_lane_hold(const struct op_lane *part)
{
    const struct sequence *sequence = part->admission->sequence;
    for (uint32_t i = 0; i <= sequence->chain_count; i++)
        op_lane_in(part, sequence_stem(sequence, i))->gathers++;
}

void op_lane_release(const struct op_lane *part)
{
    const struct sequence *sequence = part->admission->sequence;
    for (uint32_t i = 0; i <= sequence->chain_count; i++)
        op_lane_in(part, sequence_stem(sequence, i))->gathers--;
}

void op_lane_hold_cut(const struct op_lane *part)
{
    const struct sequence *sequence = part->admission->sequence;
    op_lane_hold(part);
    for (uint32_t i = 0; i <= sequence->chain_count; i++)
        op_lane_in(part, sequence_stem(sequence, i))->cuts++;
}

void op_lane_release_cut(const struct op_lane *part, struct shard *shard)
{
    const struct sequence *sequence = part->admission->sequence;
    op_lane_release(part);
    for (uint32_t i = 0; i <= sequence->chain_count; i++) {
        struct lane *lane = op_lane_in(part, sequence_stem(sequence, i));
        if (--lane->cuts == 0 && lane->commit_since_ns != 0)
            shard_commit_soon(shard, lane);
    }
}

// Has a plan waited for long for the end of cut searches of what this one looks at? Then no other is cut.
static bool a_commit_waits(const struct op_lane *part, uint64_t now_ns)
{
    const struct sequence *sequence = part->admission->sequence;
    bool waits = false;
    for (uint32_t i = 0; i <= sequence->chain_count; i++) {
        const uint64_t since_ns = op_lane_in(part, sequence_stem(sequence, i))->commit_since_ns;
        waits |= since_ns != 0 && now_ns >= since_ns + SERVER_COMMIT_PATIENCE_NS;
    }
    return waits;
}

// The step's K and V behind the queries, [sequence][query][kv_head][head_dim] each.
static struct lane_input riding_input(const struct op_lane *part)
{
    const struct op *op = part->op;
    const struct sequence *sequence = part->admission->sequence;
    const struct wire_shape *shape = &sequence->shape;
    size_t stride = shape->kv_heads * sequence->row_bytes;
    size_t side = (size_t)op->sequence_count * op->queries * stride;
    size_t queries = op->follows ? 0
                                 : (size_t)op->sequence_count * op->queries * shape->query_heads * shape->head_dim *
                                       dtype_bytes((enum dtype)op->query_dtype);
    size_t offset = part->sequence_index * op->queries * stride + part->lane->kv_head * sequence->row_bytes;
    const uint8_t *keys = (const uint8_t *)op->message.vectors + queries + offset;
    return (struct lane_input){keys, keys + side, stride, op->first_queries[part->sequence_index], op->queries, 0};
}

// Where this lane's first row lies in the staging, K [layer][kv_head][token][head_dim], or
// [layer][token][kv_head][head_dim], then V. *stride_bytes: from one token's row to the next.
static uint8_t *staging_rows(const struct op_lane *part, uint64_t *side_bytes, size_t *stride_bytes)
{
    const struct op *op = part->op;
    const struct sequence *sequence = part->admission->sequence;
    *side_bytes = staging_side_bytes(op->layers, sequence->shape.kv_heads, op->tokens, sequence->row_bytes);
    uint64_t heads = sequence->shape.kv_heads, head = part->lane->kv_head;
    uint64_t before = part->layer_index * heads * op->tokens + head * (op->token_major ? 1 : op->tokens); // rows
    *stride_bytes = sequence->row_bytes * (op->token_major ? heads : 1);
    return op->session->staging.base + op->staging_offset + before * sequence->row_bytes;
}

// Judged before the step's K and V are stored, so that a refused retrieve has no effect.
static ice_status check_queries(struct op_lane *part, struct shard *shard)
{
    const struct op *op = part->op;
    const struct wire_shape *shape = &part->lane->stem->shape;
    const float *queries = op_lane_queries(part, shard);
    if (!queries)
        return ICE_NO_MEMORY;
    uint32_t rows = op->queries * (shape->query_heads / shape->kv_heads);
    for (uint32_t row = 0; row < rows; row++) {
        float norm = 0;
        for (uint32_t i = 0; i < shape->head_dim; i++)
            norm += queries[row * shape->head_dim + i] * queries[row * shape->head_dim + i];
        if (!isfinite(norm))
            return ICE_NOT_FINITE;
    }
    return ICE_OK;
}

// What the append repeats of tokens before the own stem must be equal to them.
static ice_status compare_shared(struct op_lane *part, struct shard *shard, const struct lane_input *input)
{
    const struct sequence *sequence = part->admission->sequence;
    const uint64_t own = sequence->own->first, all = input->first + input->tokens, end = all < own ? all : own;
    while (input->first + part->compared < end) {
        const uint64_t at = input->first + part->compared;
        const uint32_t i = sequence_stem_number(sequence, at);
        const struct stem *stem = sequence_stem(sequence, i);
        const uint64_t until = sequence_stem_end(sequence, i) < end ? sequence_stem_end(sequence, i) : end;
        const size_t offset = part->compared * input->stride_bytes;
        struct lane_input some = {.keys = input->keys + offset,
                                  .values = input->values + offset,
                                  .stride_bytes = input->stride_bytes,
                                  .first = at - stem->first,
                                  .tokens = (uint32_t)(until - at)};
        const ice_status status = lane_compare(op_lane_in(part, stem), shard, &some, some.tokens);
        part->compared += some.compared;
        if (status != ICE_OK)
            return status;
    }
    return ICE_OK;
}

// The part of an append that is the own stem's, in its positions.
static struct lane_input own_input(const struct op_lane *part, const struct lane_input *input)
{
    const uint64_t first = part->lane->stem->first;
    const uint64_t before = input->first < first ? first - input->first : 0;
    const uint32_t skip = before < input->tokens ? (uint32_t)before : input->tokens;
    return (struct lane_input){.keys = input->keys + skip * input->stride_bytes,
                               .values = input->values + skip * input->stride_bytes,
                               .stride_bytes = input->stride_bytes,
                               .first = input->first + skip > first ? input->first + skip - first : 0,
                               .tokens = input->tokens - skip,
                               .compared = part->compared > skip ? part->compared - skip : 0};
}

static ice_status store_input(struct op_lane *part, struct shard *shard, const struct lane_input *input)
{
    ice_status status = compare_shared(part, shard, input);
    if (status != ICE_OK)
        return status;
    struct lane_input own = own_input(part, input);
    const uint32_t skip = input->tokens - own.tokens;
    status = lane_prepare(part->lane, shard, &own);
    part->compared = skip + own.compared;
    part->prepared = status == ICE_OK;
    return status;
}

static ice_status run_prepare(struct op_lane *part, struct shard *shard)
{
    const struct op *op = part->op;
    struct lane_input input;
    if (op->kind == OP_TRUNCATE)
        return lane_truncate_prepare(part->lane, shard);
    if (op->kind == OP_RETRIEVE && !op->follows) {
        ice_status refused = check_queries(part, shard);
        if (refused != ICE_OK)
            return refused;
    }
    if (op->kind == OP_APPEND) {
        uint64_t side;
        size_t stride;
        const uint8_t *keys = staging_rows(part, &side, &stride);
        input = (struct lane_input){keys, keys + side, stride, op->first, op->tokens, 0};
    } else {
        input = riding_input(part);
    }
    return store_input(part, shard, &input);
}

static void read_rows(const struct op_lane *part, uint64_t first, uint32_t tokens, uint8_t *keys, uint8_t *values)
{
    const struct sequence *sequence = part->admission->sequence;
    const uint64_t end = first + tokens;
    for (uint64_t at = first, until; at < end; at = until) {
        const uint32_t i = sequence_stem_number(sequence, at);
        const struct stem *stem = sequence_stem(sequence, i);
        const size_t offset = (at - first) * stem->row_bytes;
        until = sequence_stem_end(sequence, i) < end ? sequence_stem_end(sequence, i) : end;
        lane_read(op_lane_in(part, stem), at - stem->first, (uint32_t)(until - at), keys + offset, values + offset);
    }
}

// A slice of a read. Where a page of it is missing, a gather reads the whole again, and ends the part.
static ice_status run_read(struct op_lane *part, struct shard *shard)
{
    const struct op *op = part->op;
    const size_t row_bytes = part->lane->stem->row_bytes;
    const uint32_t slice = SERVER_APPEND_SLICE_BYTES / (uint32_t)(2 * row_bytes), from = part->read;
    const uint32_t n = op->tokens - from < slice ? op->tokens - from : slice;
    const struct gather_plan whole = {.window_from = op->first, .window = op->tokens};
    const struct gather_plan plan = {.window_from = op->first + from, .window = n};
    if (op->server->disk && !gather_is_resident(part, &plan)) {
        const ice_status status = gather_start(part, shard, &whole);
        return status == ICE_OK ? LANE_WAITS : status;
    }
    uint64_t side;
    size_t stride; // packed: a read's staging is head by head
    uint8_t *keys = staging_rows(part, &side, &stride) + from * row_bytes;
    read_rows(part, op->first + from, n, keys, keys + side);
    part->read += n;
    return part->read < op->tokens ? LANE_CUT : ICE_OK;
}

static struct index_query make_query(const struct op_lane *part, const float *queries, uint64_t first_query)
{
    const struct op *op = part->op;
    const struct sequence *sequence = part->admission->sequence;
    return (struct index_query){
        .queries = queries,
        .query_count = op->queries,
        .head_count = sequence->shape.query_heads / sequence->shape.kv_heads,
        .first_position = first_query,
        .scale = sequence->scale,
        .budget = op->budget,
        .sinks = op->sinks,
        .window = op->window,
        .page_wise = op->page_wise,
        .coverage = op->coverage,
    };
}

static void put_in_slot(const struct op_lane *part, const struct gpu_target *target, const struct gather_token *token,
                        const uint8_t *row)
{
    size_t bytes = part->lane->stem->row_bytes;
    target->store(target->keys + token->slot * bytes, row, bytes);
    target->store(target->values + token->slot * bytes, row + bytes, bytes);
    target->positions[token->slot] = token->position;
}

static void target_of(const struct op_lane *part, struct gpu_target *target)
{
    const struct op *op = part->op;
    const uint32_t row = op->rows[part->sequence_index];
    op->landing->ops->target(op->landing->memory, row, op->layer, part->lane->kv_head, target);
}

void gather_put(const struct op_lane *part, const struct gather_token *token, const uint8_t *row)
{
    if (part->op->kind == OP_RETRIEVE) {
        struct gpu_target target;
        target_of(part, &target);
        put_in_slot(part, &target, token, row);
        return;
    }
    const size_t bytes = part->lane->stem->row_bytes;
    uint64_t side;
    size_t stride;
    uint8_t *keys = staging_rows(part, &side, &stride) + token->slot * bytes;
    memcpy(keys, row, bytes);
    memcpy(keys + side, row + bytes, bytes);
}

static struct record_cell *cell_of(const struct op_lane *part, uint32_t layer)
{
    const struct op *op = part->op;
    const uint32_t row = op->rows[part->sequence_index];
    return op->landing->ops->record(op->landing->memory, row, layer, part->lane->kv_head);
}

// The positions of a plan's tokens, ascending.
static void list_positions(const struct gather_plan *plan, uint32_t *positions)
{
    for (uint32_t i = 0; i < plan->sinks; i++)
        *positions++ = i;
    for (uint32_t i = 0; i < plan->selected_count; i++)
        *positions++ = plan->selected[i].position;
    for (uint32_t i = 0; i < plan->window; i++)
        *positions++ = (uint32_t)(plan->window_from + i);
}

// What is always attended to of the positions below `visible`: those below sinks, and those from window on.
struct ends {
    uint64_t visible, sinks, window;
};

static struct ends ends_below(const struct op *op, uint64_t visible)
{
    struct ends ends = {.visible = visible};
    ends.sinks = op->sinks < ends.visible ? op->sinks : ends.visible;
    ends.window = op->window < ends.visible ? ends.visible - op->window : 0;
    ends.window = ends.window > ends.sinks ? ends.window : ends.sinks;
    return ends;
}

static struct ends ends_of(const struct op *op, uint32_t i)
{
    return ends_below(op, op->first_queries[i] + op->queries);
}

// What goes to the landing: sinks, selection and window, each to a slot of its own.
static ice_status plan_landing(struct op_lane *part, struct shard *shard, uint32_t count,
                               const struct index_selected *tokens, struct gather_plan *plan)
{
    const struct op *op = part->op;
    const struct ends ends = ends_of(op, part->sequence_index);
    *plan = (struct gather_plan){
        .sinks = op->holds_ends ? 0 : (uint32_t)ends.sinks,
        .selected_count = count,
        .selected = tokens,
        .window_from = ends.window,
        .window = op->holds_ends ? 0 : (uint32_t)(ends.visible - ends.window),
        .cell = cell_of(part, op->layer),
    };
    const uint32_t all = plan->sinks + plan->selected_count + plan->window;
    const uint32_t slots = op->landing->shape.slots;
    uint32_t *scratch = shard_scratch(shard, (void **)&shard->record, &shard->record_bytes,
                                      (slots + record_scratch_count(slots)) * sizeof *scratch);
    if (!scratch)
        return ICE_NO_MEMORY;
    list_positions(plan, scratch);
    const struct record_wish wish = {scratch, all, all == ends.visible, op->resend};
    part->changed = record_plan(plan->cell, &wish, scratch + all);
    for (uint32_t i = 0; i < count; i++)
        plan->cell->entries[plan->sinks + i].mass = tokens[i].mass;
    return ICE_OK;
}

// The first entry at this position or behind it.
static uint32_t entry_from(const struct record_cell *cell, uint64_t position)
{
    uint32_t low = 0, high = cell->count;
    while (low < high) {
        const uint32_t middle = low + (high - low) / 2;
        if (cell->entries[middle].position < position)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

struct op_followed op_follow(const struct op *op, uint32_t i, const struct record_cell *anchor)
{
    const struct ends ends = ends_of(op, i);
    const uint32_t first = entry_from(anchor, ends.sinks);
    return (struct op_followed){anchor->entries + first, entry_from(anchor, ends.window) - first};
}

// Where a token lies in its stem.
static void locate(const struct op_lane *part, struct index_selected *token)
{
    const struct lane *lane = op_lane_at(part, token->position);
    index_locate(lane->index, token->position - lane->stem->first, 1, &token->place);
}

// The anchor layer's selection, of this layer's K and V. No other request works on the row meanwhile.
static ice_status follow(struct op_lane *part, struct shard *shard, struct gather_plan *plan)
{
    const struct op *op = part->op;
    const struct record_cell *anchor = cell_of(part, part->lane->anchor);
    const struct op_followed followed = op_follow(op, part->sequence_index, anchor);
    struct index_selected *tokens =
        shard_scratch(shard, (void **)&shard->followed, &shard->followed_bytes, (followed.count + 1) * sizeof *tokens);
    if (!tokens)
        return ICE_NO_MEMORY;
    for (uint32_t i = 0; i < followed.count; i++) {
        tokens[i] = (struct index_selected){.position = followed.entries[i].position};
        locate(part, &tokens[i]);
    }
    part->mass = anchor->mass;
    part->indexed = part->admission->sequence->lengths[op->layer]; // nobody else changes it while the request runs
    part->searched_ns = env_now_ns(op->server->env);
    return plan_landing(part, shard, followed.count, tokens, plan);
}

// The trees that the sequence sees, and up to where.
static uint32_t parts_of(const struct op_lane *part, struct index_part *parts)
{
    const struct sequence *sequence = part->admission->sequence;
    uint32_t count = 0;
    for (uint32_t i = 0; i <= sequence->chain_count; i++) {
        const struct stem *stem = sequence_stem(sequence, i);
        const struct index *index = op_lane_in(part, stem)->index;
        if (!index)
            continue; // nothing has been appended to the own stem
        const uint64_t length = stem->first + index_length(index), end = sequence_stem_end(sequence, i);
        parts[count++] = (struct index_part){index, stem->first, length < end ? length : end};
    }
    return count;
}

// What the reply says of the trees that were searched.
static void note_trees(struct op_lane *part)
{
    struct index_part parts[INDEX_PARTS_MAX];
    const uint32_t count = parts_of(part, parts);
    part->indexed = part->version = 0;
    for (uint32_t i = 0; i < count; i++) {
        const uint64_t indexed = index_indexed(parts[i].index), end = parts[i].first + indexed;
        if (indexed > 0)
            part->indexed = end < parts[i].end ? end : parts[i].end;
        // One tree's version is its own; of several it is a digest.
        part->version = part->version * 0x9e3779b97f4a7c15u + index_version(parts[i].index);
    }
}

// The deadline had passed when the retrieve's turn came: sinks, window, and what is still to be had of the row's last
// selection, most of which lies in the landing. Nothing is known of its mass for these queries.
static ice_status give_last(struct op_lane *part, struct shard *shard, struct gather_plan *plan)
{
    const struct op *op = part->op;
    const struct record_cell *cell = cell_of(part, op->layer);
    struct op_followed last = {0};
    if (cell->is_known)
        last = op_follow(op, part->sequence_index, cell);
    last.count = last.count < op->budget ? last.count : op->budget;
    struct index_selected *tokens =
        shard_scratch(shard, (void **)&shard->followed, &shard->followed_bytes, (last.count + 1) * sizeof *tokens);
    if (!tokens)
        return ICE_NO_MEMORY;
    for (uint32_t i = 0; i < last.count; i++) {
        tokens[i] = (struct index_selected){.position = last.entries[i].position};
        locate(part, &tokens[i]);
    }
    part->late = part->partial = true;
    note_trees(part);
    part->searched_ns = env_now_ns(op->server->env);
    return plan_landing(part, shard, last.count, tokens, plan);
}

static void copy_selection(struct op_lane *part, const struct gather_plan *plan)
{
    const size_t bytes = 2 * part->lane->stem->row_bytes;
    struct gather_token tokens[256];
    struct gpu_target target;
    target_of(part, &target);
    for (uint32_t number = 0, n; (n = gather_next(part, plan, &number, 256, tokens)) > 0;) {
        for (uint32_t i = 0; i < n; i++) {
            if (i + STORE_ROWS_AHEAD < n)
                store_ask(gather_row(&tokens[i + STORE_ROWS_AHEAD], bytes), bytes);
            put_in_slot(part, &target, &tokens[i], gather_row(&tokens[i], bytes));
        }
    }
    part->count = plan->cell->count;
}

void op_lane_end_copy(struct op_lane *part, uint64_t *spent_ns)
{
    const struct op *op = part->op;
    const uint32_t row = op->rows[part->sequence_index];
    struct record_cell *cell = cell_of(part, op->layer);
    record_settle(cell);
    cell->mass = part->mass;
    cell->indexed = part->indexed;
    cell->version = part->version;
    part->changed = part->changed < part->count ? part->changed : part->count; // where a deadline has cut it short
    for (uint32_t i = 0; i < cell->count; i++) {
        part->moved += !cell->entries[i].is_kept;
        if (part->positions)
            part->positions[cell->entries[i].slot] = cell->entries[i].position;
    }
    op->landing->ops->submit(op->landing->memory, row, op->layer, part->lane->kv_head, part->count);
    *spent_ns = env_now_ns(op->server->env) - part->searched_ns;
}

static bool out_of_time(const struct op *op, uint64_t now_ns)
{
    return atomic_load_explicit(&op->cancelled, memory_order_relaxed) || now_ns >= op->deadline_ns;
}

static ice_status begin_search(struct op_lane *part, struct shard *shard, uint64_t first_query)
{
    const float *queries = op_lane_queries(part, shard);
    if (!queries)
        return ICE_NO_MEMORY;
    struct index_part parts[INDEX_PARTS_MAX];
    const uint32_t count = parts_of(part, parts);
    struct index_query query = make_query(part, queries, first_query);
    enum index_status status = index_search_reserve(shard->now.search, parts, count, &query);
    if (status == INDEX_OK)
        status = index_search_begin(shard->now.search, parts, count, &query);
    switch (status) {
    case INDEX_OK:
        return ICE_OK;
    case INDEX_NOT_FINITE:
        return ICE_NOT_FINITE;
    case INDEX_NO_MEMORY:
        return ICE_NO_MEMORY;
    default:
        return ICE_INTERNAL;
    }
}

// What of the cell's last selection stays selected. ICE_NO_MEMORY: no scratch.
static ice_status keep_last(const struct op_lane *part, struct shard *shard, struct keep *keep)
{
    const struct op *op = part->op;
    const struct ends ends = ends_of(op, part->sequence_index);
    const uint32_t slots = op->landing->shape.slots;
    const struct keep_wish wish = {.keep = op->keep,
                                   .budget = op->budget,
                                   .slots = slots,
                                   .from = ends.sinks,
                                   .until = ends.window,
                                   .coverage = op->coverage};
    const struct record_cell *cell = cell_of(part, op->layer);
    *keep = (struct keep){0};
    if (!keep_applies(cell, &wish))
        return ICE_OK;
    struct index_selected *scratch =
        shard_scratch(shard, (void **)&shard->kept, &shard->kept_bytes, keep_scratch_count(slots) * sizeof *scratch);
    if (!scratch)
        return ICE_NO_MEMORY;
    keep_choose(keep, cell, &wish, scratch);
    for (uint32_t i = 0; i < keep->count; i++)
        locate(part, &keep->tokens[i]);
    return ICE_OK;
}

// The last selection as it is, without a search: what is said of it is what was said when there was one.
static ice_status take_last(struct op_lane *part, struct shard *shard, const struct keep *keep,
                            struct gather_plan *plan)
{
    const struct record_cell *cell = cell_of(part, part->op->layer);
    part->mass = cell->mass;
    part->indexed = cell->indexed;
    part->version = cell->version;
    part->searched_ns = env_now_ns(part->op->server->env);
    return plan_landing(part, shard, keep->count, keep->tokens, plan);
}

// Searches until all is seen or the time is up. LANE_CUT: others wait and have not had their turn for long.
static ice_status run_steps(struct op_lane *part, struct shard *shard)
{
    struct env *env = part->op->server->env;
    const uint64_t cut_ns = env_now_ns(env) + SERVER_SEARCH_SLICE_NS;
    for (bool first = true;; first = false) { // each turn gets on, however slow the machine is
        const uint64_t now_ns = env_now_ns(env);
        if (out_of_time(part->op, now_ns))
            return ICE_OK;
        if (!first && now_ns >= cut_ns && !task_queue_is_empty(&shard->queue) && !a_commit_waits(part, now_ns) &&
            shard_search_cut(shard, part))
            return LANE_CUT;
        if (index_search_step(shard->now.search, SERVER_SEARCH_UNITS))
            return ICE_OK;
    }
}

// Ranks the lane's tokens, and plans what goes to the landing.
static ice_status search(struct op_lane *part, struct shard *shard, struct gather_plan *plan)
{
    struct op *op = part->op;
    struct keep keep;
    ice_status status = keep_last(part, shard, &keep);
    if (status == ICE_OK && keep.is_whole)
        return take_last(part, shard, &keep, plan);
    if (status == ICE_OK && part->cut.search)
        shard_search_resume(shard, part);
    else if (status == ICE_OK)
        status = begin_search(part, shard, op->first_queries[part->sequence_index]);
    if (status == ICE_OK)
        status = run_steps(part, shard);
    if (status != ICE_OK)
        return status;
    part->searched = true;
    struct index_selection selection;
    const struct index_selected *tokens;
    index_search_finish(shard->now.search, &selection, &tokens);
    if (keep.count > 0)
        tokens = keep_merge(&keep, &selection, tokens, op->coverage > 0 ? selection.count : op->budget);
    part->searched_ns = env_now_ns(op->server->env);
    part->partial = selection.partial;
    part->mass = selection.selected_mass + selection.ends_mass;
    note_trees(part);
    part->search_ns = part->searched_ns - part->begun_ns;
    return plan_landing(part, shard, selection.count, tokens, plan);
}

// Pages that the next query is likely to ask for, lane by lane.
struct ahead {
    struct lane *lanes[TIER_AHEAD_MAX];
    uint32_t pages[TIER_AHEAD_MAX];
    uint32_t count;
};

static void look_ahead(const struct op_lane *part, struct shard *shard, struct ahead *ahead)
{
    const struct sequence *sequence = part->admission->sequence;
    struct index_part_page near[TIER_AHEAD_MAX];
    ahead->count = !part->searched ? 0 : index_search_near(shard->now.search, TIER_AHEAD_MAX, near);
    for (uint32_t i = 0; i < ahead->count; i++) {
        ahead->lanes[i] = op_lane_in(part, sequence_stem(sequence, near[i].part));
        ahead->pages[i] = near[i].page;
    }
}

static void read_ahead(struct shard *shard, const struct ahead *ahead)
{
    for (uint32_t i = 0, n; i < ahead->count; i += n) {
        for (n = 1; i + n < ahead->count && ahead->lanes[i + n] == ahead->lanes[i];)
            n++;
        tier_read_ahead(shard, ahead->lanes[i], ahead->pages + i, n);
    }
}

// Some pages are on the disk.
static ice_status fetch(struct op_lane *part, struct shard *shard, const struct gather_plan *plan)
{
    struct ahead ahead; // part and op may be gone after the gather's start
    look_ahead(part, shard, &ahead);
    const ice_status status = gather_start(part, shard, plan);
    if (status != ICE_OK)
        return status;
    read_ahead(shard, &ahead);
    return LANE_WAITS;
}

static ice_status run_search(struct op_lane *part, struct shard *shard)
{
    const struct op *op = part->op;
    struct gather_plan plan;
    if (!part->cut.search)
        part->begun_ns = env_now_ns(op->server->env);
    const bool is_late = !part->cut.search && part->begun_ns >= op->deadline_ns;
    const ice_status status = op->follows ? follow(part, shard, &plan)
                              : is_late   ? give_last(part, shard, &plan)
                                          : search(part, shard, &plan);
    if (status != ICE_OK)
        return status;
    if (op->server->disk && !gather_is_resident(part, &plan))
        return fetch(part, shard, &plan);
    copy_selection(part, &plan);
    op_lane_end_copy(part, &part->copy_ns);
    return ICE_OK;
}

// ---- hints ----

// Is something of what the part looks at on the disk, of a lane where hints pay?
static bool hint_is_worth_it(const struct op_lane *part)
{
    const struct sequence *sequence = part->admission->sequence;
    for (uint32_t i = 0; i <= sequence->chain_count; i++) {
        struct lane *lane = op_lane_in(part, sequence_stem(sequence, i));
        if (lane->absent > 0 && tier_hints_pay(lane))
            return true;
    }
    return false;
}

// Searches until all is seen, decode work has waited for a slice, or the time is up. It is not cut: the lane's tokens
// may be others when its turn comes again.
static void hint_steps(const struct op_lane *part, struct shard *shard)
{
    struct env *env = part->op->server->env;
    const uint64_t begun_ns = env_now_ns(env);
    for (;;) {
        const uint64_t now_ns = env_now_ns(env), spent_ns = now_ns - begun_ns;
        if (out_of_time(part->op, now_ns) || spent_ns >= SERVER_HINT_NS ||
            (spent_ns >= SERVER_SEARCH_SLICE_NS && task_queue_has(&shard->queue, TASK_DECODE)))
            return;
        if (index_search_step(shard->now.search, SERVER_SEARCH_UNITS))
            return;
    }
}

static void wish_for(struct op_lane *part, struct shard *shard, const struct gather_plan *plan)
{
    struct gather_token tokens[64];
    uint32_t number = 0, n;
    while (shard->tier.wish_count < TIER_WISHES_MAX && (n = gather_next(part, plan, &number, 64, tokens)) > 0)
        for (uint32_t i = 0; i < n; i++)
            part->wished += tier_wish(shard, tokens[i].lane, tokens[i].place.page);
    tier_grant(shard);
}

// Names the pages of what the queries would select, and waits for none of them.
static ice_status run_hint(struct op_lane *part, struct shard *shard)
{
    const struct op *op = part->op;
    struct index_part parts[INDEX_PARTS_MAX];
    const uint32_t count = parts_of(part, parts);
    const uint64_t visible = count > 0 ? parts[count - 1].end : 0;
    part->late = env_now_ns(op->server->env) >= op->deadline_ns;
    if (visible < op->queries || part->late || !hint_is_worth_it(part))
        return ICE_OK;
    const ice_status status = begin_search(part, shard, visible - op->queries);
    if (status != ICE_OK)
        return status;
    hint_steps(part, shard);
    struct index_selection selection;
    const struct index_selected *tokens;
    index_search_finish(shard->now.search, &selection, &tokens);
    const struct ends ends = ends_below(op, visible);
    const struct gather_plan plan = {.sinks = (uint32_t)ends.sinks,
                                     .selected_count = selection.count,
                                     .selected = tokens,
                                     .window_from = ends.window,
                                     .window = (uint32_t)(visible - ends.window)};
    part->searched = true;
    wish_for(part, shard, &plan);
    return ICE_OK;
}

ice_status op_lane_phase(struct op_lane *part, struct shard *shard)
{
    bool cancelled = atomic_load_explicit(&part->op->cancelled, memory_order_relaxed);
    if (cancelled && part->cut.search)
        shard_search_resume(shard, part); // and forgets it
    if (cancelled && part->op->phase != PHASE_COMMIT && part->op->phase != PHASE_DROP)
        return ICE_UNKNOWN_SESSION;
    switch (part->op->phase) {
    case PHASE_PREPARE:
        return run_prepare(part, shard);
    case PHASE_COMMIT:
        if (part->op->kind == OP_TRUNCATE) {
            lane_truncate(part->lane, shard, part->op->first - part->lane->stem->first);
            return ICE_OK;
        }
        lane_commit(part->lane, shard);
        if (cancelled)
            return ICE_UNKNOWN_SESSION;
        return part->op->kind == OP_RETRIEVE ? run_search(part, shard) : ICE_OK;
    case PHASE_DROP:
        if (part->op->kind == OP_TRUNCATE)
            lane_truncate_drop(part->lane, shard);
        if (part->prepared)
            lane_drop(part->lane, shard);
        return ICE_OK;
    case PHASE_SEARCH:
        return run_search(part, shard);
    case PHASE_HINT:
        return run_hint(part, shard);
    case PHASE_WAKE:
        return ICE_OK;
    case PHASE_SAVE:
        if (part->known)
            return lane_is_whole(part->lane) ? ICE_OK : ICE_PAGE_LOST;
        if (part->lane->state != LANE_AWAKE)
            return ICE_OK; // falls asleep, and is
        images_save(shard, part);
        return LANE_WAITS;
    default:
        return run_read(part, shard);
    }
}
