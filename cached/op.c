// Operations on the reactor: making them from requests, the order on each sequence, the checks that depend on state,
// and the end. What happens on the shards is in op_lane.c.
//
// Order: a request enters the queues of all its sequences at once and starts when it is admitted by each; so a retrieve
// that comes after an append sees it, and two requests never wait for each other in a circle.
#include "cached/op.h"

#include "cached/log.h"
#include "cached/quota.h"
#include "cached/server.h"
#include "proto/dtype.h"

#include <assert.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

// ---- admission ----

static bool admit(struct sequence *sequence, const struct admission *admission)
{
    switch (admission->mode) {
    case ADMIT_READ:
        if (sequence->writer)
            return false;
        sequence->readers++;
        return true;
    case ADMIT_HINT:
        if (sequence->is_alone)
            return false;
        sequence->hints++;
        return true;
    default:
        if (sequence->writer || sequence->readers > 0 || (admission->mode == ADMIT_ALONE && sequence->hints > 0))
            return false;
        sequence->writer = true;
        sequence->is_alone = admission->mode == ADMIT_ALONE;
        return true;
    }
}

static void op_begin(struct op *op);

// Whoever comes is waited for no longer than the slice that runs.
static void cancel_sleep(const struct sequence *sequence)
{
    for (uint32_t i = 0; sequence->own && i <= sequence->chain_count; i++) {
        struct op *sleep = sequence_stem(sequence, i)->sleep_op;
        if (sleep)
            atomic_store_explicit(&sleep->cancelled, true, memory_order_relaxed);
    }
}

static void admission_enter(struct admission *admission)
{
    struct sequence *sequence = admission->sequence;
    admission->next = NULL;
    cancel_sleep(sequence);
    if (!sequence->waiting && admit(sequence, admission))
        return;
    if (sequence->waiting)
        sequence->waiting_tail->next = admission;
    else
        sequence->waiting = admission;
    sequence->waiting_tail = admission;
    admission->op->admissions_missing++;
}

static void admission_leave(struct admission *admission)
{
    struct sequence *sequence = admission->sequence;
    switch (admission->mode) {
    case ADMIT_READ:
        sequence->readers--;
        return;
    case ADMIT_HINT:
        sequence->hints--;
        return;
    default:
        sequence->writer = sequence->is_alone = false;
        return;
    }
}

// Starts what may start now that something has left the sequence.
static void admit_waiting(struct sequence *sequence)
{
    while (sequence->waiting && admit(sequence, sequence->waiting)) {
        struct admission *admitted = sequence->waiting;
        sequence->waiting = admitted->next;
        if (--admitted->op->admissions_missing == 0)
            op_begin(admitted->op);
    }
}

void op_submit(struct op *op)
{
    op->server->ops++;
    // Counted up first, so that the op cannot begin before it stands in every queue.
    op->admissions_missing = 1;
    for (uint32_t i = 0; i < op->sequence_count; i++)
        admission_enter(&op->admissions[i]);
    if (--op->admissions_missing == 0)
        op_begin(op);
}

// ---- checks that depend on the sequences' state; an empty text means the status' own ----

#define TEXT_BYTES TENANT_TEXT_BYTES

static ice_status refuse(char *text, ice_status status, const char *format, ...) __attribute__((format(printf, 3, 4)));

static ice_status refuse(char *text, ice_status status, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text, TEXT_BYTES, format, arguments);
    va_end(arguments);
    return status;
}

static ice_status check_append(const struct sequence *sequence, uint32_t layer, uint32_t layers, uint64_t first,
                               uint64_t tokens, char *text)
{
    uint64_t length = sequence_length(sequence, layer, layers);
    if (first + tokens > sequence->tokens_max)
        return refuse(text, ICE_TOO_LARGE,
                      "the append ends at %llu tokens, the sequence may have %llu (its max_tokens, or --tokens-max)",
                      (unsigned long long)(first + tokens), (unsigned long long)sequence->tokens_max);
    if (first > length)
        return refuse(text, ICE_POSITION_GAP,
                      "the append starts at position %llu, the length is %llu; append the missing positions first",
                      (unsigned long long)first, (unsigned long long)length);
    return ICE_OK;
}

// What a layer that follows takes: there must be a selection of its anchor in the row, and no more of it than asked
// for.
static ice_status check_anchor(const struct op *op, uint32_t i, char *text)
{
    struct landing *landing = op->landing;
    const struct sequence *sequence = op->admissions[i].sequence;
    const uint32_t row = op->rows[i];
    const uint32_t anchor = sequence_lane(sequence, op->layer, 0)->anchor;
    for (uint32_t head = 0; head < sequence->shape.kv_heads; head++) {
        const struct record_cell *cell = landing->ops->record(landing->memory, row, anchor, head);
        if (landing->rows[row].binding != sequence->binding || !cell->is_known)
            return refuse(text, ICE_INVALID_ARGUMENT,
                          "layer %u follows layer %u, of which row %u holds no selection; retrieve that one first",
                          op->layer, anchor, row);
        const uint32_t count = op_follow(op, i, cell).count;
        if (count > op->budget)
            return refuse(
                text, ICE_TOO_LARGE,
                "layer %u follows layer %u, of which %u tokens are selected beside sinks and window; the budget "
                "is %u",
                op->layer, anchor, count, op->budget);
    }
    return ICE_OK;
}

static ice_status check_retrieve(const struct op *op, char *text)
{
    for (uint32_t i = 0; i < op->sequence_count; i++) {
        const struct sequence *sequence = op->admissions[i].sequence;
        uint64_t end = op->first_queries[i] + op->queries, length = sequence->lengths[op->layer];
        if (op->append) {
            ice_status status = check_append(sequence, op->layer, 1, op->first_queries[i], op->queries, text);
            if (status == ICE_OK)
                status = quota_may_append(op->admissions[i].sequence, 1, end > length ? end - length : 0, false, text);
            if (status != ICE_OK)
                return status;
        } else if (end > length) {
            return refuse(text, ICE_POSITION_GAP,
                          "the last query stands at position %llu, layer %u has %llu tokens; append its K and V first",
                          (unsigned long long)(end - 1), op->layer, (unsigned long long)length);
        }
        if (op->follows) {
            ice_status status = check_anchor(op, i, text);
            if (status != ICE_OK)
                return status;
        }
    }
    return ICE_OK;
}

static ice_status check_read(const struct op *op, const struct sequence *sequence, char *text)
{
    uint64_t length = sequence_length(sequence, op->layer, op->layers);
    if (op->first + op->tokens > length)
        return refuse(text, ICE_OUT_OF_BOUNDS, "the read ends at position %llu, the length is %llu",
                      (unsigned long long)(op->first + op->tokens), (unsigned long long)length);
    return ICE_OK;
}

// Room for the whole append before its first part is stored: for what is not there already, so that an equal append
// again needs none. A last part leaves nothing promised.
static ice_status reserve_append(struct op *op, struct sequence *sequence, char *text)
{
    struct server *server = op->server;
    struct stem *own = sequence->own;
    uint64_t lanes = (uint64_t)op->layers * sequence->shape.kv_heads;
    uint64_t length = sequence_length(sequence, op->layer, op->layers), end = op->first + op->reserve_tokens;
    uint64_t tokens = op->reserve_tokens > op->tokens && end > length ? end - length : 0;
    const uint64_t whole_end = op->reserve_tokens > op->tokens ? end : op->first + op->tokens;
    const uint64_t whole = whole_end > length ? whole_end - length : 0;
    ice_status status = quota_may_append(sequence, op->layers, whole, true, text);
    if (tokens == 0 || status != ICE_OK)
        return status;
    uint64_t pages = lanes * lane_promise_pages(own, tokens);
    uint64_t bytes = lanes * lane_promise_bytes(own, length - own->first, tokens);
    status = stem_reserve_pages(own, pages);
    if (status == ICE_OK && !budget_reserve(&server->index_budget, &own->index_promised, bytes))
        status = ICE_INDEX_FULL;
    if (status != ICE_OK)
        stem_unreserve(own);
    return status;
}

static void fill_lanes(struct op *op)
{
    uint32_t n = 0;
    for (uint32_t i = 0; i < op->sequence_count; i++) {
        struct sequence *sequence = op->admissions[i].sequence;
        for (uint32_t layer = 0; layer < op->layers; layer++) {
            for (uint32_t head = 0; head < sequence->shape.kv_heads; head++, n++) {
                op->lanes[n] = (struct op_lane){
                    .task = {.run = op_lane_run, .flow = op->session->slot},
                    .op = op,
                    .lane = sequence_lane(sequence, op->layer + layer, head),
                    .admission = &op->admissions[i],
                    .sequence_index = i,
                    .layer_index = layer,
                    .positions = op->positions ? op->positions + (size_t)n * op->slots_max : NULL,
                };
            }
        }
    }
    assert(n == op->lane_count);
}

// Binds the landing's rows to the op's sequences; a row that held another sequence, or what has been truncated, is
// emptied first.
static void bind_rows(struct op *op)
{
    struct landing *landing = op->landing;
    for (uint32_t i = 0; i < op->sequence_count; i++) {
        struct landing_row *row = &landing->rows[op->rows[i]];
        const uint64_t binding = op->admissions[i].sequence->binding;
        if (row->binding != binding && row->binding != 0)
            landing->ops->clear_row(landing->memory, op->rows[i]);
        row->binding = binding;
    }
}

// ---- forks and truncation ----

static ice_status check_fork(const struct op *op, const struct sequence *sequence, char *text)
{
    const uint64_t length = sequence_length(sequence, 0, sequence->shape.layers);
    if (op->first > length)
        return refuse(text, ICE_OUT_OF_BOUNDS, "a fork at %llu tokens, the shortest layer has %llu",
                      (unsigned long long)op->first, (unsigned long long)length);
    if (op->first > sequence->own->first && !sequence_is_even(sequence))
        return refuse(text, ICE_CONFLICT, "the layers are not equally long: append to all of them, then fork");
    return ICE_OK;
}

static void run_fork(struct op *op)
{
    struct sequence *child, *parent = op->admissions[0].sequence;
    char text[TEXT_BYTES] = "";
    if (op->first == UINT64_MAX)
        op->first = sequence_length(parent, 0, parent->shape.layers);
    ice_status status = check_fork(op, parent, text);
    if (status == ICE_OK)
        status = sequence_fork(parent, op->first, text, &child);
    if (status == ICE_OK)
        op->forked_id = child->id;
    op_finish(op, status, text);
}

static uint64_t longest_layer(const struct sequence *sequence)
{
    uint64_t length = 0;
    for (uint32_t layer = 0; layer < sequence->shape.layers; layer++)
        length = sequence->lengths[layer] > length ? sequence->lengths[layer] : length;
    return length;
}

// True where the op goes on to the lanes.
static bool begin_truncate(struct op *op)
{
    struct sequence *sequence = op->admissions[0].sequence;
    const uint64_t length = longest_layer(sequence);
    char text[TEXT_BYTES] = "";
    ice_status status = ICE_OK;
    if (op->first > length)
        status = refuse(text, ICE_OUT_OF_BOUNDS, "truncation to %llu tokens, the longest layer has %llu",
                        (unsigned long long)op->first, (unsigned long long)length);
    if (status == ICE_OK && op->first < length) {
        if (op->first >= sequence->own->first)
            return true;
        status = sequence_cut(sequence, op->first);
        if (status == ICE_OK)
            sequence->binding = ++op->server->next_id;
    }
    op_finish(op, status, text);
    return false;
}

static void note_truncation(const struct op *op)
{
    struct sequence *sequence = op->admissions[0].sequence;
    stem_unreserve(sequence->own);
    sequence->binding = ++op->server->next_id; // landings may hold what is no more
    for (uint32_t layer = 0; layer < sequence->shape.layers; layer++) {
        if (sequence->lengths[layer] > op->first)
            sequence->lengths[layer] = op->first;
    }
}

static ice_status check_begin(struct op *op, char *text)
{
    struct sequence *sequence = op->admissions[0].sequence;
    switch (op->kind) {
    case OP_APPEND: {
        ice_status status = check_append(sequence, op->layer, op->layers, op->first,
                                         op->reserve_tokens > op->tokens ? op->reserve_tokens : op->tokens, text);
        return status == ICE_OK ? reserve_append(op, sequence, text) : status;
    }
    case OP_RETRIEVE:
        return check_retrieve(op, text);
    case OP_READ:
        return check_read(op, sequence, text);
    case OP_SEAL:
        return op_check_seal(op, text, TEXT_BYTES);
    default:
        return ICE_OK;
    }
}

// The spill file is full, or the namespace's quota of it is used up: a sealed prefix that nobody uses goes, one of the
// namespace then, and the op begins again when it is gone. False: none.
static bool makes_room(struct op *op, ice_status status)
{
    struct server *server = op->server;
    struct tenant *tenant = status == ICE_QUOTA ? quota_lacking_disk(op) : NULL;
    if (status != ICE_SPILL_FULL && !tenant)
        return false;
    if (server->prefixes.removing == 0 && !(server->config->prefix_evict && prefix_evict(server, tenant)))
        return false;
    op->room_next = server->room_waiting;
    server->room_waiting = op;
    return true;
}

void op_retry_waiting(struct server *server)
{
    struct op *op = server->room_waiting;
    server->room_waiting = NULL;
    while (op) {
        struct op *next = op->room_next; // op may wait again, or end
        op_begin(op);
        op = next;
    }
}

// The first request on sequences that slept.
static void wake_the_rest(struct op *op)
{
    if (op->kind == OP_SLEEP || op->kind == OP_WAKE)
        return;
    for (uint32_t i = 0; i < op->sequence_count; i++)
        op_wake_sequence(op->server, op->admissions[i].sequence);
}

// ---- requests on whole stems ----

// Is the stem among those that the op is about?
static bool concerns(const struct op *op, const struct stem *stem)
{
    switch (op->kind) {
    case OP_SEAL:
        return op_seal_concerns(op, stem);
    case OP_SLEEP:
        return idle_stem(stem, op->received_ns, op->idle_ns);
    default:
        return true;
    }
}

// All lanes of the stems that the op is about, layer by layer: whoever has asked for one will ask for those behind it.
// False: no memory.
static bool take_stems(struct op *op)
{
    const struct sequence *sequence = op->admissions[0].sequence;
    struct env *env = op->server->env;
    uint32_t count = 0;
    for (uint32_t i = 0; i <= sequence->chain_count; i++)
        count += concerns(op, sequence_stem(sequence, i)) ? sequence->own->lane_count : 0;
    if (count == 0)
        return true;
    op->lanes = env_acquire_zeroed(env, count * sizeof *op->lanes);
    if (!op->lanes)
        return false;
    op->lanes_bytes = count * sizeof *op->lanes;
    for (uint32_t i = 0; i <= sequence->chain_count; i++) {
        struct stem *stem = sequence_stem(sequence, i);
        if (!concerns(op, stem))
            continue;
        for (uint32_t lane = 0; lane < stem->lane_count; lane++) {
            struct image *known = op->kind == OP_SEAL ? op_seal_known(stem, lane) : NULL;
            op->lanes[op->lane_count++] = (struct op_lane){.task = {.run = op_lane_run, .flow = op->session->slot},
                                                           .op = op,
                                                           .lane = &stem->lanes[lane],
                                                           .admission = &op->admissions[0],
                                                           .known = known != NULL,
                                                           .image = known};
        }
    }
    for (uint32_t i = 0; op->kind == OP_SLEEP && i < op->lane_count; i++)
        op->lanes[i].lane->stem->sleep_op = op;
    return true;
}

static bool is_of_stems(const struct op *op)
{
    return op->kind == OP_SEAL || op->kind == OP_SLEEP || op->kind == OP_WAKE;
}

static void use_stems(struct op *op, int change)
{
    for (uint32_t i = 0; i < op->sequence_count; i++) {
        const struct sequence *sequence = op->admissions[i].sequence;
        for (uint32_t k = 0; k <= sequence->chain_count; k++) {
            struct stem *stem = sequence_stem(sequence, k);
            stem->users = (uint32_t)((int64_t)stem->users + change);
        }
    }
}

void op_leave_stems(struct op *op)
{
    if (op->on_stems)
        use_stems(op, -1);
    op->on_stems = false;
}

static enum op_phase first_phase(const struct op *op)
{
    switch (op->kind) {
    case OP_APPEND:
    case OP_TRUNCATE:
        return PHASE_PREPARE;
    case OP_READ:
        return PHASE_READ;
    case OP_SEAL:
    case OP_SLEEP:
        return PHASE_SAVE;
    case OP_WAKE:
        return PHASE_WAKE;
    case OP_HINT:
        return PHASE_HINT;
    default:
        return op->append ? PHASE_PREPARE : PHASE_SEARCH;
    }
}

static void op_begin(struct op *op)
{
    if (op->kind == OP_CLOSE) {
        sequence_leave_stems(op->admissions[0].sequence);
        return;
    }
    if (op->session->dead) {
        op_finish(op, ICE_UNKNOWN_SESSION, NULL);
        return;
    }
    if (op->kind == OP_FORK) {
        run_fork(op);
        return;
    }
    if (op->kind == OP_TRUNCATE && !begin_truncate(op))
        return;
    char text[TEXT_BYTES] = "";
    ice_status status = check_begin(op, text);
    if (makes_room(op, status))
        return;
    if (status == ICE_QUOTA)
        quota_note_refused(op);
    if (status != ICE_OK) {
        op_finish(op, status, text);
        return;
    }
    if (op->kind == OP_HINT && !tier_serves(op->server)) {
        op_finish(op, ICE_OK, NULL); // all that there is is in memory
        return;
    }
    if (op->kind == OP_SEAL && op_seal_is_known(op)) {
        op_finish(op, ICE_OK, NULL);
        return;
    }
    if (op->kind == OP_RETRIEVE)
        bind_rows(op);
    if (!is_of_stems(op)) {
        fill_lanes(op);
    } else if (!take_stems(op)) {
        op_finish(op, ICE_NO_MEMORY, NULL);
        return;
    }
    op->on_stems = true;
    use_stems(op, 1);
    wake_the_rest(op);
    if (op->lane_count > 0)
        op_start_phase(op, first_phase(op));
    else
        op_done_without_lanes(op);
}

// ---- the end ----

void op_attach(struct op *op, struct session *session)
{
    op->session = session;
    op->session_next = session->ops;
    if (session->ops)
        session->ops->session_previous = op;
    session->ops = op;
    session->inflight++;
    session->inflight_bytes += op->held_bytes;
    admission_enter_load(op);
    session_hold(session);
}

void op_detach(struct op *op)
{
    struct session *session = op->session;
    if (op->session_previous)
        op->session_previous->session_next = op->session_next;
    else
        session->ops = op->session_next;
    if (op->session_next)
        op->session_next->session_previous = op->session_previous;
    admission_leave_load(op);
    session->inflight--;
    session->inflight_bytes -= op->held_bytes;
    session_release(op->server, session);
}

void op_cancel_all(struct session *session)
{
    for (struct op *op = session->ops; op; op = op->session_next)
        atomic_store_explicit(&op->cancelled, true, memory_order_relaxed);
}

static void note_lengths(struct op *op)
{
    for (uint32_t i = 0; i < op->lane_count; i++) {
        struct op_lane *part = &op->lanes[i];
        struct sequence *sequence = part->admission->sequence;
        uint64_t first = op->kind == OP_APPEND ? op->first : op->first_queries[part->sequence_index];
        uint64_t length = first + (op->kind == OP_APPEND ? op->tokens : op->queries);
        uint64_t *held = &sequence->lengths[op->layer + part->layer_index];
        if (length > *held) {
            if (op->layer + part->layer_index == 0)
                sequence->appended_tokens += length - *held;
            *held = length;
        }
    }
}

// A shard searches and copies one lane after the other, so what the op has taken is the sum over the lanes of the shard
// that was at it longest.
static void add_work(const struct op *op, struct op_totals *totals)
{
    struct work {
        uint64_t search_ns, copy_ns;
    } works[CONFIG_SHARDS_MAX];
    const uint32_t shards = op->server->shard_count;
    memset(works, 0, shards * sizeof *works);
    for (uint32_t i = 0; i < op->lane_count; i++) {
        struct work *work = &works[op->lanes[i].lane->shard];
        work->search_ns += op->lanes[i].search_ns;
        work->copy_ns += op->lanes[i].copy_ns;
    }
    for (uint32_t i = 0; i < shards; i++) {
        if (works[i].search_ns + works[i].copy_ns > totals->search_ns + totals->copy_ns) {
            totals->search_ns = works[i].search_ns;
            totals->copy_ns = works[i].copy_ns;
        }
    }
}

struct op_totals op_totals(const struct op *op)
{
    struct op_totals totals = {0};
    uint64_t begun_ns = UINT64_MAX, ended_ns = 0;
    for (uint32_t i = 0; i < op->lane_count; i++) {
        const struct op_lane *part = &op->lanes[i];
        const uint64_t end_ns = part->searched_ns + part->copy_ns + part->fetch_ns; // it has one of the two
        begun_ns = part->begun_ns < begun_ns ? part->begun_ns : begun_ns;
        ended_ns = end_ns > ended_ns ? end_ns : ended_ns;
        totals.fetch_ns = part->fetch_ns > totals.fetch_ns ? part->fetch_ns : totals.fetch_ns;
        totals.partial |= part->partial;
        totals.bytes_moved += (uint64_t)part->moved * 2 * part->lane->stem->row_bytes;
    }
    add_work(op, &totals);
    // While a lane waits for pages its shard is at others: that is not counted twice.
    const uint64_t worked_ns = totals.search_ns + totals.copy_ns;
    const uint64_t rest_ns = ended_ns > begun_ns + worked_ns ? ended_ns - begun_ns - worked_ns : 0;
    totals.fetch_ns = totals.fetch_ns < rest_ns ? totals.fetch_ns : rest_ns;
    totals.queue_ns = begun_ns - op->received_ns;
    totals.copy_ns += op->push_ns;
    return totals;
}

// Whether it was kept; and what it took, where there was a search.
static void note_deadline(struct op *op, uint64_t now_ns)
{
    struct counts *counts = &op->server->counts;
    bool late = false;
    for (uint32_t i = 0; i < op->lane_count; i++)
        late |= op->lanes[i].late;
    counts->retrieves_late += late;
    counts->deadlines_missed += now_ns > op->deadline_ns;
    if (!late)
        admission_learn(op->server, op);
}

static void note_hint(const struct op *op)
{
    bool late = false;
    for (uint32_t i = 0; i < op->lane_count; i++)
        late |= op->lanes[i].late;
    op->server->stats.hints++;
    op->server->counts.hints_late += late;
}

static void note_stats(struct op *op, ice_status status)
{
    struct server_stats *stats = &op->server->stats;
    uint64_t now = env_now_ns(op->server->env);
    if (op->kind == OP_SLEEP || op->kind == OP_WAKE)
        return; // nobody asked for them
    for (uint32_t i = 0; i < op->sequence_count; i++) {
        const struct sequence *sequence = op->admissions[i].sequence;
        for (uint32_t k = 0; k <= sequence->chain_count; k++)
            sequence_stem(sequence, k)->used_ns = now;
    }
    if (status != ICE_OK) {
        stats->errors += !op->session->dead; // what a dead session left unfinished is no error of anybody
        return;
    }
    if (op->kind == OP_APPEND) {
        stats->appends++;
        histogram_add(&stats->append, now - op->received_ns);
        return;
    }
    if (op->kind == OP_READ) {
        stats->reads++;
        histogram_add(&stats->read, now - op->received_ns);
        return;
    }
    if (op->kind == OP_HINT)
        note_hint(op);
    if (op->kind != OP_RETRIEVE)
        return;
    const struct op_totals totals = op_totals(op);
    stats->retrieves++;
    stats->retrieves_partial += totals.partial;
    note_deadline(op, now);
    stats->bytes_moved += totals.bytes_moved;
    histogram_add(&stats->queue, totals.queue_ns);
    histogram_add(&stats->search, totals.search_ns);
    histogram_add(&stats->fetch, totals.fetch_ns);
    histogram_add(&stats->copy, totals.copy_ns);
    histogram_add(&stats->total, now - op->received_ns);
    for (uint32_t i = 0; i < op->sequence_count; i++)
        op->admissions[i].sequence->retrieves++;
}

static void release_memory(struct op *op)
{
    struct server *server = op->server;
    if (op->rows_taken) {
        for (uint32_t i = 0; i < op->sequence_count; i++)
            op->landing->rows[op->rows[i]].busy = false;
    }
    if (op->landing)
        landing_release(server, op->landing);
    if (op->kind == OP_APPEND || op->kind == OP_READ)
        staging_release(server, op->session);
    rings_release(server, &op->message);
}

static void op_free(struct op *op)
{
    struct env *env = op->server->env;
    env->release(env, op->positions, op->positions_bytes);
    if (op->lanes_bytes > 0)
        env->release(env, op->lanes, op->lanes_bytes);
    env->release(env, op, op->bytes);
}

void op_discard(struct op *op)
{
    release_memory(op); // the message is not the op's yet
    op_free(op);
}

static void finish_close(struct op *op)
{
    struct server *server = op->server;
    if (op->route_bytes > 0 && !op->session->dead)
        reply_op(op, ICE_OK, NULL);
    server->ops--;
    op_detach(op);
}

static void end_sleep(const struct op *op, ice_status status)
{
    const struct sequence *sequence = op->admissions[0].sequence;
    for (uint32_t i = 0; i <= sequence->chain_count; i++) {
        struct stem *stem = sequence_stem(sequence, i);
        if (stem->sleep_op != op)
            continue;
        stem->sleep_op = NULL;
        stem->asleep = status == ICE_OK;
        if (status != ICE_OK)
            stem->used_ns = env_now_ns(op->server->env); // not again at once
    }
}

void op_signal(const struct op *op)
{
    const struct landing *landing = op->landing;
    if (op->signal != 0 && landing->ops->signal)
        landing->ops->signal(landing->memory, op->rows, op->sequence_count, op->signal);
}

void op_finish(struct op *op, ice_status status, const char *text)
{
    struct server *server = op->server;
    struct session *session = op->session;
    if (op->kind == OP_CLOSE) {
        finish_close(op);
        return;
    }
    if (op->kind == OP_SLEEP)
        end_sleep(op, status);
    op_leave_stems(op);
    if (op->phase == PHASE_COMMIT && op->kind == OP_TRUNCATE)
        note_truncation(op);
    else if (op->phase == PHASE_COMMIT) // also where the search behind it failed: the tokens are there
        note_lengths(op);
    if (op->kind == OP_APPEND && (status != ICE_OK || op->reserve_tokens <= op->tokens))
        stem_unreserve(op->admissions[0].sequence->own);
    note_stats(op, status);
    op_signal(op); // also of what failed before it came to a shard
    // The rows are the worker's again before it can read the reply.
    release_memory(op);
    if (!session->dead && op->kind != OP_SLEEP && op->kind != OP_WAKE)
        reply_op(op, status, text);
    server->ops--;
    for (uint32_t i = 0; i < op->sequence_count; i++)
        admission_leave(&op->admissions[i]);
    // What starts now may end at once and free itself, but never this op.
    for (uint32_t i = 0; i < op->sequence_count; i++)
        admit_waiting(op->admissions[i].sequence);
    op_detach(op);
    op_free(op);
}
