// From a decoded request to an operation: finds what the request names, checks shapes and bounds that do not depend on
// what is queued before it, and takes hold of all it needs. Reactor only.
#include "cached/op.h"

#include "cached/server.h"
#include "proto/dtype.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

struct refusal {
    ice_status status;
    char text[256];
};

static bool refuse(struct refusal *refusal, ice_status status, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

static bool refuse(struct refusal *refusal, ice_status status, const char *format, ...)
{
    refusal->status = status;
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(refusal->text, sizeof refusal->text, format, arguments);
    va_end(arguments);
    return false;
}

static struct op *allocate(struct server *server, enum op_kind kind, uint32_t sequences, uint32_t lanes)
{
    size_t head = env_align(sizeof(struct op));
    size_t admissions = env_align(sequences * sizeof(struct admission));
    size_t firsts = env_align(sequences * sizeof(uint64_t));
    size_t rows = env_align(sequences * sizeof(uint32_t));
    size_t bytes = head + admissions + firsts + rows + lanes * sizeof(struct op_lane);
    uint8_t *memory = env_acquire_zeroed(server->env, bytes);
    if (!memory)
        return NULL;
    struct op *op = (struct op *)memory;
    op->kind = kind;
    op->server = server;
    op->bytes = bytes;
    op->sequence_count = sequences;
    op->lane_count = lanes;
    op->admissions = (struct admission *)(memory + head);
    op->first_queries = (uint64_t *)(memory + head + admissions);
    op->rows = (uint32_t *)(memory + head + admissions + firsts);
    op->lanes = (struct op_lane *)(memory + head + admissions + firsts + rows);
    return op;
}

static struct sequence *find_sequence(struct server *server, struct session *session, uint64_t id,
                                      struct refusal *refusal)
{
    struct sequence *sequence = sequence_find(server, session, id);
    if (!sequence)
        refuse(refusal, ICE_UNKNOWN_SEQUENCE, "sequence %llu is not open in this session", (unsigned long long)id);
    return sequence;
}

static bool check_layers(const struct sequence *sequence, uint32_t layer, uint32_t layers, struct refusal *refusal)
{
    if (layers == 0 || layer >= sequence->shape.layers || layers > sequence->shape.layers - layer)
        return refuse(refusal, ICE_UNKNOWN_LAYER, "layers %u..%llu: the sequence has layers 0..%u", layer,
                      (unsigned long long)layer + layers - 1, sequence->shape.layers - 1);
    return true;
}

static bool check_staging(const struct session *session, const struct sequence *sequence, uint32_t layers,
                          uint32_t tokens, uint64_t offset, struct refusal *refusal)
{
    uint64_t bytes = 2 * staging_side_bytes(layers, sequence->shape.kv_heads, tokens, sequence->row_bytes);
    if (!session->staging.base)
        return refuse(refusal, ICE_OUT_OF_BOUNDS, "no staging area is open; open one on the control socket first");
    if (offset > session->staging.bytes || bytes > session->staging.bytes - offset)
        return refuse(refusal, ICE_OUT_OF_BOUNDS, "%llu bytes at offset %llu do not fit the staging area of %llu bytes",
                      (unsigned long long)bytes, (unsigned long long)offset,
                      (unsigned long long)session->staging.bytes);
    return true;
}

// Append and read: one sequence, a range of layers and positions, the staging.
static struct op *create_ranged(struct server *server, struct session *session, enum op_kind kind, uint64_t id,
                                uint32_t layer, uint32_t layers, uint32_t tokens, uint64_t offset,
                                struct refusal *refusal)
{
    struct sequence *sequence = find_sequence(server, session, id, refusal);
    if (!sequence || !check_layers(sequence, layer, layers, refusal) ||
        !check_staging(session, sequence, layers, tokens, offset, refusal))
        return NULL;
    struct op *op = allocate(server, kind, 1, layers * sequence->shape.kv_heads);
    if (!op) {
        refuse(refusal, ICE_NO_MEMORY, "no memory for the request");
        return NULL;
    }
    op->admissions[0] =
        (struct admission){.op = op, .sequence = sequence, .mode = kind == OP_APPEND ? ADMIT_APPEND : ADMIT_READ};
    op->layer = layer;
    op->layers = layers;
    op->tokens = tokens;
    op->staging_offset = offset;
    session->staging.users++;
    return op;
}

static struct op *create_append(struct server *server, struct session *session, const Icecache__Wire__Append *message,
                                struct refusal *refusal)
{
    struct op *op = create_ranged(server, session, OP_APPEND, message->sequence_id, message->layer, message->layers,
                                  message->tokens, message->staging_offset, refusal);
    if (op) {
        op->first = message->first;
        op->reserve_tokens = message->reserve_tokens;
        op->token_major = message->token_major;
    }
    return op;
}

static struct op *create_read(struct server *server, struct session *session, const Icecache__Wire__Read *message,
                              struct refusal *refusal)
{
    struct op *op = create_ranged(server, session, OP_READ, message->sequence_id, message->layer, message->layers,
                                  message->tokens, message->staging_offset, refusal);
    if (op)
        op->first = message->first;
    return op;
}

static struct op *create_seal(struct server *server, struct session *session, const Icecache__Wire__Seal *message,
                              const struct env_message *frames, struct refusal *refusal)
{
    struct sequence *sequence = find_sequence(server, session, message->sequence_id, refusal);
    struct wire_error error = {0};
    uint32_t blocks = 0;
    if (!sequence)
        return NULL;
    if (!tier_serves(server)) {
        refuse(refusal, ICE_DISK_FAILED, "%s", prefix_disk_text(server));
        return NULL;
    }
    ice_status status = wire_hashes_check(frames->vectors_bytes, sequence->identity.block_tokens, &blocks, &error);
    if (status != ICE_OK) {
        refuse(refusal, status, "%s", error.text);
        return NULL;
    }
    struct op *op = allocate(server, OP_SEAL, 1, 0);
    if (!op) {
        refuse(refusal, ICE_NO_MEMORY, "no memory for the request");
        return NULL;
    }
    op->admissions[0] = (struct admission){.op = op, .sequence = sequence, .mode = ADMIT_ALONE};
    op->layers = sequence->shape.layers;
    op->blocks = blocks;
    return op;
}

// A fork, or a truncation: `tokens` are what is left.
static struct op *create_cut(struct server *server, struct session *session, enum op_kind kind, uint64_t id,
                             uint64_t tokens, struct refusal *refusal)
{
    struct sequence *sequence = find_sequence(server, session, id, refusal);
    if (!sequence)
        return NULL;
    struct op *op = allocate(server, kind, 1, kind == OP_TRUNCATE ? sequence->own->lane_count : 0);
    if (!op) {
        refuse(refusal, ICE_NO_MEMORY, "no memory for the request");
        return NULL;
    }
    op->admissions[0] = (struct admission){.op = op, .sequence = sequence, .mode = ADMIT_ALONE};
    op->layers = sequence->shape.layers;
    op->first = tokens;
    return op;
}

// The most slots that a head may need. Page-wise at least one whole page is taken, however small the budget is.
static uint64_t slots_needed(const struct server *server, const Icecache__Wire__Retrieve *message)
{
    uint64_t page = message->page_wise ? server->config->page_tokens : 0;
    uint64_t ends = message->worker_holds_ends ? 0 : (uint64_t)message->sinks + message->window;
    return (message->budget > page ? message->budget : page) + ends;
}

static bool check_landing(const struct server *server, const struct landing *landing, const struct sequence *sequence,
                          const Icecache__Wire__Retrieve *message, struct refusal *refusal)
{
    const struct landing_shape *shape = &landing->shape;
    if (message->layer >= shape->layers)
        return refuse(refusal, ICE_UNKNOWN_LAYER, "layer %u: the landing has layers 0..%u", message->layer,
                      shape->layers - 1);
    if (shape->head_dim != sequence->shape.head_dim || shape->kv_heads != sequence->shape.kv_heads ||
        shape->dtype != sequence->shape.dtype)
        return refuse(refusal, ICE_SHAPE_MISMATCH,
                      "landing (%u KV heads, head_dim %u, %s) and sequence (%u KV heads, head_dim %u, %s) differ",
                      shape->kv_heads, shape->head_dim, dtype_name((enum dtype)shape->dtype), sequence->shape.kv_heads,
                      sequence->shape.head_dim, dtype_name((enum dtype)sequence->shape.dtype));
    uint64_t slots = slots_needed(server, message);
    if (slots > shape->slots)
        return refuse(refusal, ICE_TOO_LARGE, "sinks + window + budget%s need %llu slots, the landing has %u",
                      message->page_wise ? " (at least a page)" : "", (unsigned long long)slots, shape->slots);
    return true;
}

static bool check_row(const struct landing *landing, uint32_t row, struct refusal *refusal)
{
    if (row >= landing->shape.rows)
        return refuse(refusal, ICE_OUT_OF_BOUNDS, "row %u: the landing has rows 0..%u", row, landing->shape.rows - 1);
    if (landing->rows[row].busy)
        return refuse(refusal, ICE_BUSY, "landing row %u still belongs to an earlier request; wait for its reply", row);
    return true;
}

// All sequences of a retrieve, equal in shape, each with a free row of the landing.
static bool check_sequences(struct server *server, struct session *session, const struct landing *landing,
                            const Icecache__Wire__Retrieve *message, struct sequence **sequences,
                            struct refusal *refusal)
{
    for (size_t i = 0; i < message->n_sequence_ids; i++) {
        struct sequence *sequence = find_sequence(server, session, message->sequence_ids[i], refusal);
        if (!sequence || !check_layers(sequence, message->layer, 1, refusal) ||
            !check_landing(server, landing, sequence, message, refusal) ||
            !check_row(landing, message->rows[i], refusal))
            return false;
        if (i > 0 && sequence->shape.query_heads != sequences[0]->shape.query_heads)
            return refuse(refusal, ICE_SHAPE_MISMATCH, "the sequences of one retrieve differ in query heads");
        if (sequence_follows(sequence, message->layer) != (bool)message->follows)
            return refuse(refusal, ICE_SHAPE_MISMATCH, "layer %u %s: %s", message->layer,
                          message->follows ? "follows no other" : "follows an anchor layer",
                          message->follows ? "ask with queries" : "ask without queries");
        sequences[i] = sequence;
    }
    return true;
}

static bool check_vectors(uint64_t bytes, const struct env_message *frames, struct refusal *refusal)
{
    if (bytes != frames->vectors_bytes)
        return refuse(
            refusal, ICE_SHAPE_MISMATCH,
            "frame 2 has %zu bytes; these sequences, queries and heads make %llu (head counts or dtype differ?)",
            frames->vectors_bytes, (unsigned long long)bytes);
    return true;
}

static void fill_retrieve(struct op *op, const Icecache__Wire__Retrieve *message, struct sequence *const *sequences,
                          struct landing *landing)
{
    op->landing = landing;
    landing->users++;
    op->layer = message->layer;
    op->layers = 1;
    op->queries = message->queries;
    op->query_dtype = message->query_dtype;
    op->budget = message->budget;
    op->keep = message->keep;
    op->sinks = message->sinks;
    op->window = message->window;
    op->holds_ends = message->worker_holds_ends;
    op->append = message->append;
    op->page_wise = message->page_wise;
    op->follows = message->follows;
    op->resend = message->resend || op->landing->gpu; // a push copies whole blocks
    op->coverage = message->coverage;
    op->signal = message->signal;
    for (uint32_t i = 0; i < op->sequence_count; i++) {
        op->admissions[i] =
            (struct admission){.op = op, .sequence = sequences[i], .mode = message->append ? ADMIT_APPEND : ADMIT_READ};
        op->rows[i] = message->rows[i];
        op->first_queries[i] = message->first_queries[i];
        landing->rows[op->rows[i]].busy = true;
    }
    op->rows_taken = true;
}

// Room for the positions in the reply, where the worker asked for them.
static bool allocate_positions(struct op *op, const Icecache__Wire__Retrieve *message, struct refusal *refusal)
{
    uint64_t slots = slots_needed(op->server, message);
    uint64_t bytes = op->lane_count * slots * sizeof(uint32_t);
    if (!message->want_positions)
        return true;
    if (bytes > WIRE_REPLY_BYTES_MAX / 2)
        return refuse(refusal, ICE_TOO_LARGE, "%llu bytes of positions do not fit a reply; read them from the landing",
                      (unsigned long long)bytes);
    op->positions = op->server->env->acquire(op->server->env, bytes);
    if (!op->positions)
        return refuse(refusal, ICE_NO_MEMORY, "no memory for the positions");
    op->positions_bytes = bytes;
    op->slots_max = (uint32_t)slots;
    return true;
}

static struct op *create_retrieve(struct server *server, struct session *session,
                                  const Icecache__Wire__Retrieve *message, const struct env_message *frames,
                                  struct refusal *refusal)
{
    struct sequence *sequences[WIRE_SEQUENCES_PER_RETRIEVE_MAX];
    struct landing *landing = landing_find(session, message->landing_id);
    if (!landing) {
        refuse(refusal, ICE_UNKNOWN_LANDING, "landing %u is not open in this session", message->landing_id);
        return NULL;
    }
    if (!check_sequences(server, session, landing, message, sequences, refusal) ||
        !check_vectors(wire_retrieve_vectors_bytes(message, &sequences[0]->shape), frames, refusal))
        return NULL;
    uint32_t count = (uint32_t)message->n_sequence_ids;
    struct op *op = allocate(server, OP_RETRIEVE, count, count * sequences[0]->shape.kv_heads);
    if (!op || !allocate_positions(op, message, refusal)) {
        if (op)
            server->env->release(server->env, op, op->bytes);
        else
            refuse(refusal, ICE_NO_MEMORY, "no memory for the request");
        return NULL;
    }
    fill_retrieve(op, message, sequences, landing);
    return op;
}

// All sequences of a hint, equal in shape.
static bool check_hinted(struct server *server, struct session *session, const Icecache__Wire__Hint *message,
                         struct sequence **sequences, struct refusal *refusal)
{
    for (size_t i = 0; i < message->n_sequence_ids; i++) {
        struct sequence *sequence = find_sequence(server, session, message->sequence_ids[i], refusal);
        if (!sequence || !check_layers(sequence, message->layer, 1, refusal))
            return false;
        sequences[i] = sequence;
        if (memcmp(&sequence->shape, &sequences[0]->shape, sizeof sequence->shape) != 0)
            return refuse(refusal, ICE_SHAPE_MISMATCH, "the sequences of one hint differ in shape");
        if (sequence_follows(sequence, message->layer))
            return refuse(refusal, ICE_SHAPE_MISMATCH, "layer %u follows an anchor layer: hint at that one",
                          message->layer);
    }
    return true;
}

static struct op *create_hint(struct server *server, struct session *session, const Icecache__Wire__Hint *message,
                              const struct env_message *frames, struct refusal *refusal)
{
    struct sequence *sequences[WIRE_SEQUENCES_PER_RETRIEVE_MAX];
    if (!check_hinted(server, session, message, sequences, refusal) ||
        !check_vectors(wire_hint_vectors_bytes(message, &sequences[0]->shape), frames, refusal))
        return NULL;
    const uint32_t count = (uint32_t)message->n_sequence_ids;
    struct op *op = allocate(server, OP_HINT, count, count * sequences[0]->shape.kv_heads);
    if (!op) {
        refuse(refusal, ICE_NO_MEMORY, "no memory for the request");
        return NULL;
    }
    op->layer = message->layer;
    op->layers = 1;
    op->queries = message->queries;
    op->query_dtype = message->query_dtype;
    const uint64_t most = TIER_WISHES_MAX * server->config->page_tokens; // more pages cannot be wished for
    op->budget = message->budget < most ? message->budget : (uint32_t)most;
    op->sinks = message->sinks;
    op->window = message->window;
    for (uint32_t i = 0; i < count; i++)
        op->admissions[i] = (struct admission){.op = op, .sequence = sequences[i], .mode = ADMIT_HINT};
    return op;
}

// A row that another request has is left alone: its word is that request's.
void op_signal_refused(struct session *session, const Icecache__Wire__Request *request)
{
    if (request->body_case != ICECACHE__WIRE__REQUEST__BODY_RETRIEVE || request->retrieve->signal == 0)
        return;
    const Icecache__Wire__Retrieve *message = request->retrieve;
    struct landing *landing = landing_find(session, message->landing_id);
    if (!landing || !landing->ops->signal)
        return;
    for (size_t i = 0; i < message->n_rows; i++) {
        if (message->rows[i] < landing->shape.rows && !landing->rows[message->rows[i]].busy)
            landing->ops->signal(landing->memory, &message->rows[i], 1, message->signal);
    }
}

static void set_sender(struct op *op, struct session *session, uint64_t request_id, const struct env_message *message)
{
    op_attach(op, session);
    op->request_id = request_id;
    memcpy(op->route, message->route, message->route_bytes);
    op->route_bytes = message->route_bytes;
    op->received_ns = message->received_ns;
}

// Is there room for it among what is in flight? An op that is refused is gone.
static bool is_admitted(struct op *op, struct session *session, struct refusal *refusal)
{
    op->session = session;
    refusal->status = admission_check(op->server, op, env_now_ns(op->server->env), refusal->text, sizeof refusal->text);
    if (refusal->status == ICE_OK)
        return true;
    op_discard(op);
    return false;
}

struct op *op_create(struct server *server, struct session *session, const Icecache__Wire__Request *request,
                     struct env_message *message)
{
    struct refusal refusal = {0};
    struct op *op = NULL;
    uint64_t deadline_us = server->config->retrieve_deadline_ms * 1000;
    if (request->body_case == ICECACHE__WIRE__REQUEST__BODY_APPEND) {
        op = create_append(server, session, request->append, &refusal);
    } else if (request->body_case == ICECACHE__WIRE__REQUEST__BODY_READ) {
        op = create_read(server, session, request->read, &refusal);
    } else if (request->body_case == ICECACHE__WIRE__REQUEST__BODY_SEAL) {
        op = create_seal(server, session, request->seal, message, &refusal);
    } else if (request->body_case == ICECACHE__WIRE__REQUEST__BODY_SEQUENCE_FORK) {
        op = create_cut(server, session, OP_FORK, request->sequence_fork->sequence_id, request->sequence_fork->tokens,
                        &refusal);
    } else if (request->body_case == ICECACHE__WIRE__REQUEST__BODY_SEQUENCE_TRUNCATE) {
        op = create_cut(server, session, OP_TRUNCATE, request->sequence_truncate->sequence_id,
                        request->sequence_truncate->tokens, &refusal);
    } else if (request->body_case == ICECACHE__WIRE__REQUEST__BODY_HINT) {
        op = create_hint(server, session, request->hint, message, &refusal);
        deadline_us = request->hint->deadline_us ? request->hint->deadline_us : deadline_us;
    } else {
        op = create_retrieve(server, session, request->retrieve, message, &refusal);
        deadline_us = request->retrieve->deadline_us ? request->retrieve->deadline_us : deadline_us;
    }
    if (op)
        op->deadline_ns = message->received_ns + deadline_us * 1000;
    if (!op || !is_admitted(op, session, &refusal)) {
        server->stats.errors++;
        op_signal_refused(session, request);
        reply_error(server, session, message, request->request_id, refusal.status, refusal.text);
        rings_release(server, message);
        return NULL;
    }
    op->held_bytes = op->bytes + op->positions_bytes + message->vectors_bytes;
    set_sender(op, session, request->request_id, message);
    op->message = *message; // vectors stay where they are until the op ends
    return op;
}

void op_close_sequence(struct server *server, struct sequence *sequence, const Icecache__Wire__Request *request,
                       const struct env_message *message)
{
    struct op *op = sequence->close_op; // made with the sequence: closing needs no memory
    sequence->closing = true;
    op->kind = OP_CLOSE;
    op->server = server;
    op->sequence_count = 1;
    op->admissions[0] = (struct admission){.op = op, .sequence = sequence, .mode = ADMIT_ALONE};
    if (request) {
        set_sender(op, sequence->session, request->request_id, message);
    } else {
        op_attach(op, sequence->session);
    }
    op_submit(op);
}

// An operation that nobody has asked for. False: no memory.
static bool submit_own(struct server *server, struct sequence *sequence, enum op_kind kind, uint64_t idle_ns)
{
    struct op *op = allocate(server, kind, 1, 0);
    if (!op)
        return false;
    op->admissions[0] =
        (struct admission){.op = op, .sequence = sequence, .mode = kind == OP_SLEEP ? ADMIT_ALONE : ADMIT_READ};
    op->layers = sequence->shape.layers;
    op->held_bytes = op->bytes;
    op->idle_ns = idle_ns;
    op_attach(op, sequence->session);
    op->received_ns = env_now_ns(server->env);
    op_submit(op);
    return true;
}

void op_sleep_sequence(struct server *server, struct sequence *sequence, uint64_t idle_ns)
{
    if (!submit_own(server, sequence, OP_SLEEP, idle_ns))
        sequence->own->used_ns = env_now_ns(server->env); // later, perhaps
}

void op_wake_sequence(struct server *server, struct sequence *sequence)
{
    bool sleeps = false;
    for (uint32_t i = 0; i <= sequence->chain_count; i++) {
        sleeps |= sequence_stem(sequence, i)->asleep;
        sequence_stem(sequence, i)->asleep = false;
    }
    if (sleeps)
        (void)submit_own(server, sequence, OP_WAKE, 0); // otherwise each lane wakes when it is asked for
}
