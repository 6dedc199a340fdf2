// A worker of the serve command, in a process of its own: appends its prompt, waits until that is clustered, then runs
// decode steps as it is told, each layer by one retrieve that brings the step's K and V along. Or one that builds: it
// appends and clusters a sequence again and again until it is told to end.
#include "serve.h"

#include "client/icecache.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define CALL_DEADLINE_US  (60ull * 1000000u)
#define BUILD_DEADLINE_NS (300ull * 1000000000u)
#define STAGING_BYTES     (16ull << 20)

struct worker {
    struct serve_job job;
    struct serve_source source;
    ice_client *client;
    struct serve_landing *landings[PLACES], *landing; // all; that of the order
    ice_sequence *sequence;
    uint32_t step;                    // next
    uint8_t *step_keys, *step_values; // [KV head], of one token
    uint32_t *seen;                   // [layer][KV head][token]: the step, from 1 on, that selected the token last
    struct serve_record *records;
    struct serve_answer answer;
};

static bool failed(const char *what, ice_status status)
{
    (void)fprintf(stderr, "icecache-bench: serve: %s: %s: %s\n", what, ice_status_name(status), ice_last_error());
    return false;
}

static bool open_sequence(struct worker *worker)
{
    const struct serve_job *job = &worker->job;
    const struct ice_sequence_options options = {
        .name_space = "bench",
        .model_digest = "serve",
        .model_digest_bytes = 5,
        .layers = job->layers,
        .kv_heads = job->kv_heads,
        .query_heads = job->query_heads,
        .head_dim = job->head_dim,
        .dtype = (ice_dtype)job->dtype,
    };
    const ice_status status = ice_sequence_open(worker->client, &options, CALL_DEADLINE_US, &worker->sequence);
    return status == ICE_OK || failed("open sequence", status);
}

static bool open_all(struct worker *worker)
{
    const struct serve_job *job = &worker->job;
    const uint32_t places = job->builds ? 0 : job->place_count;
    const struct ice_client_options options = {.socket_directory = job->sockets,
                                               .name = job->builds ? "bench-builder" : "bench-worker",
                                               .staging_bytes = STAGING_BYTES,
                                               .transport = (ice_transport)job->transport};
    const ice_status status = ice_client_connect(&options, &worker->client);
    if (status != ICE_OK) {
        return failed("connect", status);
    }
    for (uint32_t i = 0; i < places; i++) {
        worker->landings[i] = serve_landing_create(worker->client, job, (enum option_place)job->places[i]);
        if (worker->landings[i] == NULL) {
            return false;
        }
    }
    return true;
}

static bool append_prompt(struct worker *worker)
{
    const struct serve_job *job = &worker->job;
    const size_t row = worker->source.row_bytes, head = worker->source.tokens * row;
    const struct ice_kv_source source = {
        .keys = worker->source.keys,
        .values = worker->source.values,
        .keys_bytes = job->layers * job->kv_heads * head,
        .values_bytes = job->layers * job->kv_heads * head,
        .layer_stride = job->kv_heads * head,
        .head_stride = head,
        .token_stride = row,
    };
    const ice_status status =
        ice_append(worker->sequence, ICE_ALL_LAYERS, 0, job->tokens, &source, 2 * CALL_DEADLINE_US, NULL);
    return status == ICE_OK || failed("append", status);
}

// Until no clustering is due, or the parent wants something, where it may interrupt.
static bool wait_idle(struct worker *worker, bool may_interrupt)
{
    const uint64_t until_ns = measure_ns() + BUILD_DEADLINE_NS;
    struct ice_sequence_info info = {0};
    while (!info.idle && measure_ns() < until_ns && !(may_interrupt && parent_is_waiting())) {
        const struct timespec pause = {.tv_nsec = 2000000};
        (void)nanosleep(&pause, NULL);
        const ice_status status = ice_sequence_info(worker->sequence, CALL_DEADLINE_US, &info);
        if (status != ICE_OK) {
            return failed("ask for the sequence's state", status);
        }
    }
    worker->answer.is_idle = info.idle;
    worker->answer.indexed = (uint32_t)info.indexed_min;
    return true;
}

// ---- decode steps ----

static void count_kept(struct worker *worker, uint32_t layer, uint32_t head, const struct serve_view *view,
                       uint32_t position, uint32_t *kept, uint32_t *selected)
{
    const struct serve_job *job = &worker->job;
    uint32_t *seen = worker->seen + ((size_t)layer * job->kv_heads + head) * worker->source.tokens;
    for (uint32_t i = 0; i < view->count; i++) {
        const uint32_t at = view->positions[i];
        if (at >= job->sinks && at + job->window <= position) {
            ++*selected;
            *kept += worker->step > 0 && seen[at] == worker->step;
            seen[at] = worker->step + 1;
        }
    }
}

static uint32_t wrong_rows(const struct worker *worker, uint32_t layer, uint32_t head, const struct serve_view *view)
{
    const struct serve_source *source = &worker->source;
    const size_t bytes = source->row_bytes;
    uint32_t wrong = view->count == serve_slots(&worker->job) ? 0 : 1;
    for (uint32_t i = 0; i < view->count; i++) {
        const uint32_t at = view->positions[i];
        wrong += at >= source->tokens ||
                 memcmp(view->keys + i * bytes, serve_source_row(source, &worker->job, source->keys, layer, head, at),
                        bytes) != 0 ||
                 memcmp(view->values + i * bytes,
                        serve_source_row(source, &worker->job, source->values, layer, head, at), bytes) != 0;
    }
    return wrong;
}

// Outside what is timed.
static bool look_at_landing(struct worker *worker, uint32_t layer, bool compares, struct serve_record *record)
{
    uint32_t kept = 0, selected = 0;
    if (!serve_landing_fetch(worker->landing, layer, compares)) {
        return false;
    }
    for (uint32_t head = 0; head < worker->job.kv_heads; head++) {
        struct serve_view view;
        if (!serve_landing_view(worker->landing, layer, head, &view)) {
            return false;
        }
        count_kept(worker, layer, head, &view, worker->job.tokens + worker->step, &kept, &selected);
        if (compares && !record->partial) {
            worker->answer.wrong_rows += wrong_rows(worker, layer, head, &view);
        }
    }
    record->kept = selected > 0 ? (float)kept / (float)selected : 0;
    return true;
}

static bool retrieve(struct worker *worker, uint32_t layer, struct serve_record *record)
{
    const struct serve_job *job = &worker->job;
    const struct serve_source *source = &worker->source;
    const uint32_t row = 0, position = job->tokens + worker->step;
    const uint64_t first_query = position;
    for (uint32_t head = 0; head < job->kv_heads; head++) {
        memcpy(worker->step_keys + head * source->row_bytes,
               serve_source_row(source, job, source->keys, layer, head, position), source->row_bytes);
        memcpy(worker->step_values + head * source->row_bytes,
               serve_source_row(source, job, source->values, layer, head, position), source->row_bytes);
    }
    const struct ice_retrieve_options options = {
        .landing = serve_landing_handle(worker->landing),
        .layer = layer,
        .sequence_count = 1,
        .sequences = &worker->sequence,
        .rows = &row,
        .first_queries = &first_query,
        .query_vectors =
            source->queries + ((size_t)layer * job->steps + worker->step) * job->query_heads * source->row_bytes,
        .query_dtype = (ice_dtype)job->dtype,
        .keys = worker->step_keys,
        .values = worker->step_values,
        .budget = job->budget,
        .sinks = job->sinks,
        .window = job->window,
    };
    struct ice_retrieve_result result;
    const uint64_t begun_ns = measure_ns();
    const ice_status status = ice_retrieve(worker->client, &options, &result);
    const uint64_t ended_ns = measure_ns();
    if (status != ICE_OK) {
        return failed("retrieve", status);
    }
    *record = (struct serve_record){
        .total_us = (float)(ended_ns - begun_ns) / 1000,
        .queue_us = (float)result.queue_us,
        .search_us = (float)result.search_us,
        .fetch_us = (float)result.fetch_us,
        .copy_us = (float)result.copy_us,
        .bytes = (uint32_t)result.bytes_moved,
        .partial = result.partial,
    };
    return true;
}

static bool run_steps(struct worker *worker, uint32_t steps)
{
    const uint32_t layers = worker->job.layers, until = worker->step + steps;
    struct serve_record *record = worker->records;
    worker->answer = (struct serve_answer){.record_count = steps * layers, .begun_ns = measure_ns()};
    for (; worker->step < until; worker->step++) {
        for (uint32_t layer = 0; layer < layers; layer++, record++) {
            if (!retrieve(worker, layer, record) ||
                !look_at_landing(worker, layer, worker->step + 1 == until, record)) {
                return false;
            }
        }
    }
    worker->answer.ended_ns = measure_ns();
    return parent_write(&worker->answer, sizeof worker->answer) &&
           parent_write(worker->records, (size_t)steps * layers * sizeof *worker->records);
}

static bool serve_steps(struct worker *worker)
{
    struct serve_order order;
    worker->answer.begun_ns = measure_ns();
    if (!open_sequence(worker) || !append_prompt(worker) || !wait_idle(worker, false)) {
        return false;
    }
    worker->answer.ended_ns = measure_ns();
    for (uint32_t i = 0; i < worker->job.place_count; i++) {
        worker->answer.places[i] = serve_landing_place(worker->landings[i]);
    }
    if (!parent_write(&worker->answer, sizeof worker->answer)) {
        return false;
    }
    while (parent_read(&order, sizeof order)) {
        if (order.place >= worker->job.place_count) {
            return false;
        }
        worker->landing = worker->landings[order.place];
        if (order.steps > worker->job.steps - worker->step || !run_steps(worker, order.steps)) {
            return false;
        }
    }
    return true;
}

// ---- building ----

static bool build_until_told(struct worker *worker)
{
    bool good = true;
    while (good && !parent_is_waiting()) {
        good = open_sequence(worker) && append_prompt(worker) && wait_idle(worker, true);
        ice_sequence_close(worker->sequence);
        worker->sequence = NULL;
    }
    return good;
}

// One order begins it and the next one ends it; each is answered.
static bool serve_building(struct worker *worker)
{
    struct serve_order order;
    if (!parent_write(&worker->answer, sizeof worker->answer)) {
        return false;
    }
    while (parent_read(&order, sizeof order)) {
        if (!parent_write(&worker->answer, sizeof worker->answer) || !build_until_told(worker) ||
            !parent_read(&order, sizeof order) || !parent_write(&worker->answer, sizeof worker->answer)) {
            return false;
        }
    }
    return true;
}

static void close_all(struct worker *worker)
{
    ice_sequence_close(worker->sequence);
    for (uint32_t i = 0; i < worker->job.place_count; i++) {
        serve_landing_destroy(worker->landings[i]);
    }
    ice_client_close(worker->client);
}

int serve_worker(void)
{
    struct worker worker = {0};
    if (!parent_read(&worker.job, sizeof worker.job)) {
        return 1;
    }
    // The landings first: where one cannot be had, nothing has been waited for.
    const struct serve_job *job = &worker.job;
    const bool opened = open_all(&worker);
    if (!opened || !serve_source_init(&worker.source, job)) {
        close_all(&worker);
        return 1;
    }
    const size_t step_bytes = job->kv_heads * worker.source.row_bytes;
    worker.step_keys = malloc(step_bytes);
    worker.step_values = malloc(step_bytes);
    worker.seen = calloc((size_t)job->layers * job->kv_heads * worker.source.tokens, sizeof *worker.seen);
    worker.records = calloc((size_t)job->layers * job->steps, sizeof *worker.records);
    bool good = worker.step_keys != NULL && worker.step_values != NULL && worker.seen != NULL && worker.records != NULL;
    good = good && (job->builds ? serve_building(&worker) : serve_steps(&worker));
    close_all(&worker);
    free(worker.step_keys);
    free(worker.step_values);
    free(worker.seen);
    free(worker.records);
    serve_source_fini(&worker.source);
    return good ? 0 : 1;
}
