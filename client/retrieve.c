// Retrieve: submit, wait, and the tickets in between.
//
// A ticket owns its request's record; the reply's arrays are handed out as they were decoded and live as long as the
// ticket (ice_retrieve: until the thread's next one, kept in thread-specific storage, which is freed at thread exit).
// Locks: the client's, for the records and the landing's rows.
#include "client/error.h"
#include "client/exchange.h"
#include "client/handles.h"
#include "client/vectors.h"

#include "proto/dtype.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

// ---- checks ----

static ice_status keep_check(const struct ice_retrieve_options *options)
{
    if (options->keep > options->budget) {
        return error_set(ICE_INVALID_ARGUMENT, "options.keep is %u, more than options.budget, %u tokens", options->keep,
                         options->budget);
    }
    if (options->keep > 0 && options->granularity == ICE_PAGE_WISE) {
        return error_set(ICE_NOT_SUPPORTED, "options.keep is of tokens; it cannot be had with ICE_PAGE_WISE");
    }
    return ICE_OK;
}

ice_status selection_check(const struct selection_numbers *asked)
{
    if (asked->sequence_count == 0 || asked->sequence_count > WIRE_SEQUENCES_PER_RETRIEVE_MAX) {
        return error_set(asked->sequence_count == 0 ? ICE_INVALID_ARGUMENT : ICE_TOO_LARGE,
                         "options.sequence_count is %u, it must be 1 to %u", asked->sequence_count,
                         WIRE_SEQUENCES_PER_RETRIEVE_MAX);
    }
    if (asked->queries > WIRE_QUERIES_MAX) {
        return error_set(ICE_TOO_LARGE, "options.queries is %u, the limit is %u", asked->queries, WIRE_QUERIES_MAX);
    }
    if (!dtype_is_valid((uint32_t)asked->query_dtype)) {
        return error_set(ICE_INVALID_ARGUMENT, "options.query_dtype %d is none of ICE_BF16, ICE_FP16, ICE_FP32",
                         (int)asked->query_dtype);
    }
    if (asked->budget == 0) {
        return error_set(ICE_INVALID_ARGUMENT, "options.budget is 0; it must be at least 1 token");
    }
    if (asked->budget > WIRE_TOKENS_MAX || asked->sinks > WIRE_TOKENS_MAX || asked->window > WIRE_TOKENS_MAX) {
        return error_set(ICE_TOO_LARGE, "options.budget %u, sinks %u or window %u is above %u tokens", asked->budget,
                         asked->sinks, asked->window, WIRE_TOKENS_MAX);
    }
    return ICE_OK;
}

static ice_status numbers_check(const struct ice_retrieve_options *options, uint32_t queries)
{
    const struct selection_numbers asked = {
        .sequence_count = options->sequence_count,
        .queries = queries,
        .query_dtype = options->query_dtype,
        .budget = options->budget,
        .sinks = options->sinks,
        .window = options->window,
    };
    ice_status status = selection_check(&asked);
    if (status != ICE_OK) {
        return status;
    }
    if (!(options->coverage >= 0.0f && options->coverage <= 1.0f)) {
        return error_set(ICE_INVALID_ARGUMENT, "options.coverage is not between 0 and 1");
    }
    if (options->granularity != ICE_TOKEN_WISE && options->granularity != ICE_PAGE_WISE) {
        return error_set(ICE_INVALID_ARGUMENT, "options.granularity %d is unknown", (int)options->granularity);
    }
    return keep_check(options);
}

static ice_status pointers_check(const struct ice_retrieve_options *options)
{
    const struct {
        const char *name;
        const void *value;
    } fields[] = {
        {"landing", options->landing},
        {"sequences", options->sequences},
        {"rows", options->rows},
        {"first_queries", options->first_queries},
    };
    for (size_t i = 0; i < sizeof fields / sizeof fields[0]; i++) {
        if (fields[i].value == NULL) {
            return error_set(ICE_INVALID_ARGUMENT, "options.%s is NULL", fields[i].name);
        }
    }
    if ((options->keys == NULL) != (options->values == NULL)) {
        return error_set(ICE_INVALID_ARGUMENT, "options.keys and options.values: give both or none");
    }
    return ICE_OK;
}

static bool shape_equal(const struct wire_shape *a, const struct wire_shape *b)
{
    return a->layers == b->layers && a->kv_heads == b->kv_heads && a->query_heads == b->query_heads &&
           a->head_dim == b->head_dim && a->dtype == b->dtype;
}

static bool follows(const ice_sequence *sequence, uint32_t layer)
{
    return sequence->anchors[layer] != layer;
}

static ice_status landing_check(const struct ice_retrieve_options *options, const ice_sequence *sequence)
{
    const struct landing_shape *landing = &options->landing->shape;
    const struct wire_shape *shape = &sequence->shape;
    if (landing->kv_heads != shape->kv_heads || landing->head_dim != shape->head_dim ||
        landing->dtype != shape->dtype) {
        return error_set(ICE_SHAPE_MISMATCH,
                         "the landing has %u KV heads, head_dim %u, %s; the sequence has %u, %u, %s", landing->kv_heads,
                         landing->head_dim, dtype_name((enum dtype)landing->dtype), shape->kv_heads, shape->head_dim,
                         dtype_name((enum dtype)shape->dtype));
    }
    if (options->layer >= shape->layers || options->layer >= landing->layers) {
        return error_set(ICE_UNKNOWN_LAYER, "layer %u: the sequence has %u layers, the landing %u", options->layer,
                         shape->layers, landing->layers);
    }
    return ICE_OK;
}

// A layer that follows another one takes no queries; the others need them.
static ice_status queries_check(const struct ice_retrieve_options *options)
{
    const bool first_follows = follows(options->sequences[0], options->layer);
    for (uint32_t i = 1; i < options->sequence_count; i++) {
        if (follows(options->sequences[i], options->layer) != first_follows) {
            return error_set(ICE_SHAPE_MISMATCH,
                             "layer %u of options.sequences[%u] %s an anchor layer, unlike that of the first",
                             options->layer, i, first_follows ? "does not follow" : "follows");
        }
    }
    if (!first_follows && options->query_vectors == NULL) {
        return error_set(ICE_INVALID_ARGUMENT, "options.query_vectors is NULL");
    }
    return ICE_OK;
}

static ice_status sequences_check(const ice_client *client, const struct ice_retrieve_options *options,
                                  uint32_t queries)
{
    const ice_landing *landing = options->landing;
    if (landing->client != client) {
        return error_set(ICE_INVALID_ARGUMENT, "options.landing belongs to another client");
    }
    for (uint32_t i = 0; i < options->sequence_count; i++) {
        const ice_sequence *sequence = options->sequences[i];
        if (sequence == NULL || sequence->client != client) {
            return error_set(ICE_INVALID_ARGUMENT, "options.sequences[%u] %s", i,
                             sequence == NULL ? "is NULL" : "belongs to another client");
        }
        if (sequence->generation != landing->generation) {
            return error_set(ICE_UNKNOWN_SESSION,
                             "options.sequences[%u] or the landing was made before ice_client_reconnect; close it", i);
        }
        if (!shape_equal(&sequence->shape, &options->sequences[0]->shape)) {
            return error_set(ICE_SHAPE_MISMATCH, "options.sequences[%u] has another shape than the first", i);
        }
        if (options->rows[i] >= landing->shape.rows) {
            return error_set(ICE_INVALID_ARGUMENT, "options.rows[%u] is %u, the landing has %u rows", i,
                             options->rows[i], landing->shape.rows);
        }
        if (options->first_queries[i] > WIRE_TOKENS_MAX - queries) {
            return error_set(ICE_TOO_LARGE, "options.first_queries[%u] is %llu: a sequence holds at most %u tokens", i,
                             (unsigned long long)options->first_queries[i], WIRE_TOKENS_MAX);
        }
    }
    ice_status status = landing_check(options, options->sequences[0]);
    return status == ICE_OK ? queries_check(options) : status;
}

static ice_status options_check(const ice_client *client, const struct ice_retrieve_options *options, uint32_t queries)
{
    ice_status status = numbers_check(options, queries);
    if (status == ICE_OK) {
        status = pointers_check(options);
    }
    return status == ICE_OK ? sequences_check(client, options, queries) : status;
}

// ---- submit ----

// Where a request's vectors are: in this process's memory, or on a GPU, whose stream makes them.
struct origin {
    bool on_gpu;
    void *stream;
};

static ice_status vectors_fill(const struct ice_retrieve_options *options, const struct origin *origin,
                               size_t query_bytes, size_t side_bytes, uint64_t until_us, uint8_t *to)
{
    if (origin->on_gpu) {
        const struct vectors_piece pieces[VECTORS_PIECES_MAX] = {
            {"query_vectors", options->query_vectors, query_bytes},
            {"keys", options->keys, side_bytes},
            {"values", options->values, side_bytes},
        };
        const uint32_t first = query_bytes > 0 ? 0 : 1, behind = options->keys != NULL ? 3 : 1;
        return first == behind
                   ? ICE_OK
                   : vectors_fetch(options->landing, pieces + first, behind - first, origin->stream, until_us, to);
    }
    if (query_bytes > 0) {
        memcpy(to, options->query_vectors, query_bytes);
    }
    if (options->keys != NULL) {
        memcpy(to + query_bytes, options->keys, side_bytes);
        memcpy(to + query_bytes + side_bytes, options->values, side_bytes);
    }
    return ICE_OK;
}

static ice_status vectors_create(ice_client *client, const struct ice_retrieve_options *options,
                                 const struct origin *origin, const Icecache__Wire__Retrieve *retrieve,
                                 uint64_t until_us, zmq_msg_t *vectors)
{
    const struct wire_shape *shape = &options->sequences[0]->shape;
    uint64_t bytes = wire_retrieve_vectors_bytes(retrieve, shape);
    uint64_t query_bytes = wire_retrieve_query_bytes(retrieve, shape);
    uint64_t most = client_vectors_bytes_max(client);
    if (query_bytes > bytes || bytes > most) {
        return error_set(ICE_TOO_LARGE,
                         "queries, keys and values take %llu bytes, the limit (vectors_bytes_max) is %llu; use fewer "
                         "sequences or query positions per call",
                         (unsigned long long)bytes, (unsigned long long)most);
    }
    if (zmq_msg_init_size(vectors, (size_t)bytes) != 0) {
        return error_set(ICE_NO_MEMORY, "no memory for %llu bytes of vectors", (unsigned long long)bytes);
    }
    const size_t side_bytes = (size_t)((bytes - query_bytes) / 2);
    ice_status status = vectors_fill(options, origin, (size_t)query_bytes, side_bytes, until_us, zmq_msg_data(vectors));
    if (status != ICE_OK) {
        (void)zmq_msg_close(vectors);
    }
    return status;
}

// The daemon's deadline: 7/8 of what is left, so that it ends before ours.
static uint32_t daemon_deadline_us(uint64_t until_us)
{
    uint64_t now_us = clock_us();
    uint64_t left_us = until_us > now_us ? until_us - now_us : 0;
    left_us = left_us / 8 * 7 + left_us % 8 * 7 / 8;
    left_us = left_us < WIRE_DEADLINE_US_MAX ? left_us : WIRE_DEADLINE_US_MAX;
    return left_us > 0 ? (uint32_t)left_us : 1;
}

static void request_fill(Icecache__Wire__Retrieve *retrieve, const struct ice_retrieve_options *options,
                         uint32_t queries, uint64_t *sequence_ids)
{
    retrieve->landing_id = options->landing->id;
    retrieve->layer = options->layer;
    retrieve->sequence_ids = sequence_ids;
    retrieve->n_sequence_ids = options->sequence_count;
    // The generated fields are not const, but packing only reads them.
    retrieve->rows = (uint32_t *)(uintptr_t)options->rows;
    retrieve->n_rows = options->sequence_count;
    retrieve->first_queries = (uint64_t *)(uintptr_t)options->first_queries;
    retrieve->n_first_queries = options->sequence_count;
    retrieve->queries = queries;
    retrieve->query_dtype = (uint32_t)options->query_dtype;
    retrieve->budget = options->budget;
    retrieve->keep = options->keep;
    retrieve->sinks = options->sinks;
    retrieve->window = options->window;
    retrieve->worker_holds_ends = options->worker_holds_ends;
    retrieve->resend = options->resend;
    retrieve->follows = follows(options->sequences[0], options->layer);
    retrieve->append = options->keys != NULL;
    retrieve->coverage = options->coverage;
    retrieve->page_wise = options->granularity == ICE_PAGE_WISE;
}

static ice_ticket *ticket_create(ice_client *client, const struct ice_retrieve_options *options, uint64_t until_us)
{
    ice_ticket *ticket = calloc(1, sizeof *ticket);
    struct pending *pending = pending_create();
    uint32_t *rows = malloc(options->sequence_count * sizeof *rows);
    uint64_t *sequence_ids = malloc(options->sequence_count * sizeof *sequence_ids);
    if (ticket == NULL || pending == NULL || rows == NULL || sequence_ids == NULL) {
        free(ticket);
        pending_destroy(pending);
        free(rows);
        free(sequence_ids);
        (void)error_set(ICE_NO_MEMORY, "no memory for a ticket");
        return NULL;
    }
    memcpy(rows, options->rows, options->sequence_count * sizeof *rows);
    for (uint32_t i = 0; i < options->sequence_count; i++) {
        sequence_ids[i] = options->sequences[i]->id;
    }
    pending->rows = rows;
    pending->row_count = options->sequence_count;
    pending->landing = options->landing;
    pending->pull = options->landing->place == LANDING_PULL ? PULL_DUE : PULL_NONE;
    ticket->client = client;
    ticket->layer = options->layer;
    ticket->sequence_ids = sequence_ids;
    ticket->generation = options->landing->generation;
    ticket->pending = pending;
    ticket->until_us = until_us;
    ticket->head_count = options->sequence_count * options->landing->shape.kv_heads;
    return ticket;
}

void ticket_free(ice_ticket *ticket)
{
    pending_destroy(ticket->pending);
    free(ticket->sequence_ids);
    free(ticket);
}

static ice_status ticket_submit(ice_ticket *ticket, const struct ice_retrieve_options *options,
                                const struct origin *origin, uint64_t until_us)
{
    ice_client *client = ticket->client;
    uint32_t queries = options->queries != 0 ? options->queries : 1;
    Icecache__Wire__Retrieve retrieve = ICECACHE__WIRE__RETRIEVE__INIT;
    request_fill(&retrieve, options, queries, ticket->sequence_ids);
    Icecache__Wire__Request request = ICECACHE__WIRE__REQUEST__INIT;
    request.body_case = ICECACHE__WIRE__REQUEST__BODY_RETRIEVE;
    request.retrieve = &retrieve;
    zmq_msg_t vectors;
    ice_status status = vectors_create(client, options, origin, &retrieve, until_us, &vectors);
    if (status != ICE_OK) {
        return status;
    }
    retrieve.deadline_us = daemon_deadline_us(until_us); // of what is left now
    (void)pthread_mutex_lock(&client->lock);
    if (ticket->pending->pull != PULL_NONE) {
        retrieve.resend = retrieve.resend || pull_wants_whole(ticket);
        ticket->whole = retrieve.resend != 0;
    }
    if (options->landing->words != NULL) {
        // Rows are taken in the order of these values: nothing releases the lock before exchange_submit has them.
        ticket->signal = retrieve.signal = ++options->landing->signals;
    }
    status = exchange_submit(client, ticket->generation, &request, &vectors, ticket->pending, until_us);
    if (status == ICE_OK && ticket->pending->pull != PULL_NONE) {
        pull_submitted(ticket);
    }
    if (status == ICE_OK) {
        handle_link(&client->tickets, &ticket->handle);
    }
    (void)pthread_mutex_unlock(&client->lock);
    if (status != ICE_OK) {
        (void)zmq_msg_close(&vectors);
    }
    return status;
}

static ice_status retrieve_submit(ice_client *client, const struct ice_retrieve_options *options,
                                  const struct origin *origin, ice_ticket **out, uint64_t *until_us)
{
    ice_status status = client_check(client);
    if (status != ICE_OK) {
        return status;
    }
    if (options == NULL || out == NULL) {
        return error_set(ICE_INVALID_ARGUMENT, "%s is NULL", options == NULL ? "options" : "out");
    }
    *until_us = client_until(client, options->deadline_us);
    status = options_check(client, options, options->queries != 0 ? options->queries : 1);
    if (status != ICE_OK) {
        return status;
    }
    ice_ticket *ticket = ticket_create(client, options, *until_us);
    if (ticket == NULL) {
        return ICE_NO_MEMORY;
    }
    status = ticket_submit(ticket, options, origin, *until_us);
    if (status != ICE_OK) {
        ticket_free(ticket);
        return status;
    }
    *out = ticket;
    return ICE_OK;
}

static const struct origin host_memory;

ice_status ice_retrieve_submit(ice_client *client, const struct ice_retrieve_options *options, ice_ticket **out)
{
    error_clear();
    uint64_t until_us;
    return retrieve_submit(client, options, &host_memory, out, &until_us);
}

ice_status ice_retrieve_submit_gpu(ice_client *client, const struct ice_retrieve_options *options, void *stream,
                                   ice_ticket **out)
{
    error_clear();
    uint64_t until_us;
    return retrieve_submit(client, options, &(struct origin){true, stream}, out, &until_us);
}

// ---- wait ----

// With the lock held, because several threads may wait for one ticket.
static ice_status result_fill(const ice_ticket *ticket, struct ice_retrieve_result *result)
{
    const Icecache__Wire__Reply *reply = ticket->pending->reply;
    const Icecache__Wire__RetrieveReply *found =
        reply != NULL && reply->body_case == ICECACHE__WIRE__REPLY__BODY_RETRIEVE ? reply->retrieve : NULL;
    uint32_t heads = ticket->head_count;
    // The arrays' lengths agree: wire_reply_decode has checked that.
    if (found == NULL || found->n_counts != heads) {
        return error_set(ICE_BAD_MESSAGE, "the daemon's answer does not describe %u heads", heads);
    }
    if (result != NULL) {
        *result = (struct ice_retrieve_result){
            .partial = found->partial != 0,
            .head_count = heads,
            .counts = found->counts,
            .changed = found->changed,
            .masses = found->masses,
            .indexed = found->indexed,
            .versions = found->versions,
            .bytes_moved = found->bytes_moved,
            .queue_us = found->queue_us,
            .search_us = found->search_us,
            .fetch_us = found->fetch_us,
            .copy_us = found->copy_us,
        };
    }
    return ICE_OK;
}

static ice_status ticket_wait(ice_ticket *ticket, uint64_t until_us, struct ice_retrieve_result *result)
{
    ice_client *client = ticket->client;
    (void)pthread_mutex_lock(&client->lock);
    ice_status status = exchange_wait(client, ticket->generation, ticket->pending, until_us);
    if (ticket->streamed && ticket->pending->done) {
        status = stream_finish(ticket, status, until_us);
    } else if (status == ICE_OK && ticket->pending->pull != PULL_NONE) {
        status = pull_finish(ticket, until_us);
    }
    if (status == ICE_OK) {
        status = result_fill(ticket, result);
    }
    (void)pthread_mutex_unlock(&client->lock);
    return status;
}

ice_status ice_retrieve_wait(ice_ticket *ticket, uint64_t deadline_us, struct ice_retrieve_result *result)
{
    error_clear();
    if (ticket == NULL) {
        return error_set(ICE_INVALID_ARGUMENT, "ticket is NULL");
    }
    ice_status status = client_check(ticket->client);
    return status == ICE_OK ? ticket_wait(ticket, client_until(ticket->client, deadline_us), result) : status;
}

void ice_ticket_close(ice_ticket *ticket)
{
    if (ticket == NULL) {
        return;
    }
    ice_client *client = ticket->client;
    if (client_is_forked(client)) {
        ticket_free(ticket);
        return;
    }
    (void)pthread_mutex_lock(&client->lock);
    pull_abandon(ticket, client_until(client, 0));
    stream_leave(ticket);
    handle_unlink(&ticket->handle);
    exchange_abandon(client, ticket->pending);
    (void)pthread_mutex_unlock(&client->lock);
    free(ticket->sequence_ids);
    free(ticket);
}

// ---- blocking ----

static pthread_once_t kept_once = PTHREAD_ONCE_INIT;
static pthread_key_t kept_key;
static int kept_error;

static void kept_free(void *reply)
{
    if (reply != NULL) {
        icecache__wire__reply__free_unpacked(reply, NULL);
    }
}

static void kept_init(void)
{
    kept_error = pthread_key_create(&kept_key, kept_free);
}

// Keeps the reply's arrays until this thread's next ice_retrieve; NULL frees what was kept.
static ice_status keep(Icecache__Wire__Reply *reply)
{
    (void)pthread_once(&kept_once, kept_init);
    if (kept_error == 0) {
        kept_free(pthread_getspecific(kept_key));
        if (pthread_setspecific(kept_key, reply) == 0) {
            return ICE_OK;
        }
        (void)pthread_setspecific(kept_key, NULL);
    }
    kept_free(reply);
    return error_set(ICE_NO_MEMORY, "no room for this thread's result");
}

static ice_status retrieve(ice_client *client, const struct ice_retrieve_options *options, const struct origin *origin,
                           struct ice_retrieve_result *result)
{
    ice_ticket *ticket = NULL;
    uint64_t until_us;
    ice_status status = retrieve_submit(client, options, origin, &ticket, &until_us);
    if (status != ICE_OK) {
        return status;
    }
    struct ice_retrieve_result found;
    status = ticket_wait(ticket, until_us, &found);
    if (status == ICE_OK && result != NULL) {
        status = keep(ticket->pending->reply);
        ticket->pending->reply = NULL;
        if (status == ICE_OK) {
            *result = found;
        }
    }
    ice_ticket_close(ticket);
    return status;
}

ice_status ice_retrieve(ice_client *client, const struct ice_retrieve_options *options,
                        struct ice_retrieve_result *result)
{
    error_clear();
    return retrieve(client, options, &host_memory, result);
}

ice_status ice_retrieve_gpu(ice_client *client, const struct ice_retrieve_options *options, void *stream,
                            struct ice_retrieve_result *result)
{
    error_clear();
    return retrieve(client, options, &(struct origin){true, stream}, result);
}
