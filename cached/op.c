// Operations on the reactor: making them from requests, the order on each sequence, the checks that depend on state,
// and the end. What happens on the shards is in op_lane.c.
//
// Order: a request enters the queues of all its sequences at once and starts when it is admitted by each; so a retrieve
// that comes after an append sees it, and two requests never wait for each other in a circle.
#include "cached/op.h"

#include "cached/log.h"
#include "cached/server.h"
#include "proto/dtype.h"

#include <assert.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

// ---- admission ----

static bool admit(struct sequence *sequence, const struct admission *admission)
{
    if (sequence->writer || (admission->exclusive && sequence->readers > 0))
        return false;
    if (admission->exclusive)
        sequence->writer = true;
    else
        sequence->readers++;
    return true;
}

static void op_begin(struct op *op);

static void admission_enter(struct admission *admission)
{
    struct sequence *sequence = admission->sequence;
    admission->next = NULL;
    if (sequence->sleep_op) // whoever comes is waited for no longer than the slice that runs
        atomic_store_explicit(&sequence->sleep_op->cancelled, true, memory_order_relaxed);
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
    if (admission->exclusive)
        sequence->writer = false;
    else
        sequence->readers--;
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

#define TEXT_BYTES 192

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
    const uint32_t anchor = sequence->lanes[(uint64_t)op->layer * sequence->shape.kv_heads].anchor;
    for (uint32_t head = 0; head < sequence->shape.kv_heads; head++) {
        const struct record_cell *cell = landing->ops->record(landing->memory, row, anchor, head);
        if (landing->rows[row].sequence_id != sequence->id || !cell->is_known)
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
static ice_status reserve_append(struct op *op, struct sequence *sequence)
{
    struct server *server = op->server;
    uint64_t lanes = (uint64_t)op->layers * sequence->shape.kv_heads;
    uint64_t length = sequence_length(sequence, op->layer, op->layers), end = op->first + op->reserve_tokens;
    uint64_t tokens = op->reserve_tokens > op->tokens && end > length ? end - length : 0;
    if (tokens == 0)
        return ICE_OK;
    uint64_t pages = lanes * lane_promise_pages(sequence, tokens);
    uint64_t bytes = lanes * lane_promise_bytes(sequence, length, tokens);
    ice_status status = sequence_reserve_pages(sequence, pages);
    if (status == ICE_OK && !budget_reserve(&server->index_budget, &sequence->index_promised, bytes))
        status = ICE_INDEX_FULL;
    if (status != ICE_OK)
        sequence_unreserve(sequence);
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
                    .task = {.run = op_lane_run},
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

// Binds the landing's rows to the op's sequences; a row that held another sequence is emptied first.
static void bind_rows(struct op *op)
{
    struct landing *landing = op->landing;
    for (uint32_t i = 0; i < op->sequence_count; i++) {
        struct landing_row *row = &landing->rows[op->rows[i]];
        uint64_t id = op->admissions[i].sequence->id;
        if (row->sequence_id != id && row->sequence_id != 0)
            landing->ops->clear_row(landing->memory, op->rows[i]);
        row->sequence_id = id;
    }
}

static ice_status check_begin(struct op *op, char *text)
{
    struct sequence *sequence = op->admissions[0].sequence;
    switch (op->kind) {
    case OP_APPEND: {
        ice_status status = check_append(sequence, op->layer, op->layers, op->first,
                                         op->reserve_tokens > op->tokens ? op->reserve_tokens : op->tokens, text);
        return status == ICE_OK ? reserve_append(op, sequence) : status;
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

// The spill file is full: a sealed prefix that nobody uses goes, and the op begins again when it is gone. False: none.
static bool makes_room(struct op *op)
{
    struct server *server = op->server;
    if (server->prefixes.removing == 0 && !(server->config->prefix_evict && prefix_evict(server)))
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
    for (uint32_t i = 0; i < op->sequence_count; i++) {
        struct sequence *sequence = op->admissions[i].sequence;
        if (sequence->asleep) {
            sequence->asleep = false;
            op_wake_sequence(op->server, sequence);
        }
    }
}

static enum op_phase first_phase(const struct op *op)
{
    switch (op->kind) {
    case OP_APPEND:
        return PHASE_PREPARE;
    case OP_READ:
        return PHASE_READ;
    case OP_SEAL:
    case OP_SLEEP:
        return PHASE_SAVE;
    case OP_WAKE:
        return PHASE_WAKE;
    default:
        return op->append ? PHASE_PREPARE : PHASE_SEARCH;
    }
}

static void op_begin(struct op *op)
{
    if (op->kind == OP_CLOSE) {
        sequence_destroy_lanes(op->admissions[0].sequence);
        return;
    }
    if (op->session->dead) {
        op_finish(op, ICE_UNKNOWN_SESSION, NULL);
        return;
    }
    char text[TEXT_BYTES] = "";
    ice_status status = check_begin(op, text);
    if (status == ICE_SPILL_FULL && makes_room(op))
        return;
    if (status != ICE_OK) {
        op_finish(op, status, text);
        return;
    }
    if (op->kind == OP_SEAL && op_seal_is_known(op)) {
        op_finish(op, ICE_OK, NULL);
        return;
    }
    if (op->kind == OP_RETRIEVE)
        bind_rows(op);
    if (op->kind == OP_SLEEP)
        op->admissions[0].sequence->sleep_op = op;
    fill_lanes(op);
    wake_the_rest(op);
    op_start_phase(op, first_phase(op));
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
        struct sequence *sequence = part->lane->sequence;
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
        totals.bytes_moved += (uint64_t)part->moved * 2 * part->lane->sequence->row_bytes;
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

static void note_stats(struct op *op, ice_status status)
{
    struct server_stats *stats = &op->server->stats;
    uint64_t now = env_now_ns(op->server->env);
    if (op->kind == OP_SLEEP || op->kind == OP_WAKE)
        return; // nobody asked for them
    for (uint32_t i = 0; i < op->sequence_count; i++) {
        op->admissions[i].sequence->used_ns = now;
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
    if (op->kind == OP_SEAL)
        return;
    const struct op_totals totals = op_totals(op);
    stats->retrieves++;
    stats->retrieves_partial += totals.partial;
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
    env->release(env, op, op->bytes);
}

static void finish_close(struct op *op)
{
    struct server *server = op->server;
    if (op->route_bytes > 0 && !op->session->dead)
        reply_op(op, ICE_OK, NULL);
    server->ops--;
    op_detach(op);
}

static void end_sleep(struct op *op, ice_status status)
{
    struct sequence *sequence = op->admissions[0].sequence;
    sequence->sleep_op = NULL;
    sequence->asleep = status == ICE_OK;
    if (status != ICE_OK)
        sequence->used_ns = env_now_ns(op->server->env); // not again at once
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
    if (op->phase == PHASE_COMMIT) // also where the search behind it failed: the tokens are there
        note_lengths(op);
    if (op->kind == OP_APPEND && (status != ICE_OK || op->reserve_tokens <= op->tokens))
        sequence_unreserve(op->admissions[0].sequence);
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
