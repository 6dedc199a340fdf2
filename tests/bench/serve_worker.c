// A worker of the serve command, in a process of its own: appends its prompt, waits until that is clustered, then runs
// decode steps as it is told, each layer by one retrieve that brings the step's K and V along. A sequence that gets too
// long by them is replaced by a new one between two orders. Or one that builds: it appends and clusters a sequence
// again and again until it is told to end.
#include "serve.h"

#include "client/icecache.h"

#include <errno.h>
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
    size_t lane_room;                 // positions
    uint32_t *seen;                   // [layer][KV head][position]: the step, from 1 on, that selected it last
    uint32_t *held[PLACES];           // the same of each landing: the step that had it in a slot last
    uint32_t held_step[PLACES];       // [place]: the landing's last, from 1 on
    uint32_t place;                   // which of the job's
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
        const struct timespec pause = {.tv_nsec = may_interrupt ? 10000000 : 2000000};
        (void)nanosleep(&pause, NULL);
        const ice_status status = ice_sequence_info(worker->sequence, CALL_DEADLINE_US, &info);
        if (status != ICE_OK) {
            return failed("ask for the sequence's state", status);
        }
    }
    worker->answer.is_idle = info.idle;
    worker->answer.indexed = (uint32_t)info.indexed_min;
    worker->answer.build_s = 1e-6 * (double)info.build_us;
    return true;
}

// ---- decode steps ----

struct counts {
    uint32_t selected, kept; // outside sinks and window; of them, selected by the step before
    uint32_t fresh;          // slots whose token was in none before
};

static void count_slots(struct worker *worker, uint32_t layer, uint32_t head, const struct serve_view *view,
                        uint32_t position, struct counts *counts)
{
    const struct serve_job *job = &worker->job;
    const size_t lane = ((size_t)layer * job->kv_heads + head) * worker->lane_room;
    uint32_t *seen = worker->seen + lane, *held = worker->held[worker->place] + lane;
    const uint32_t before = worker->held_step[worker->place];
    for (uint32_t i = 0; i < view->count; i++) {
        const uint32_t at = view->positions[i];
        if (at > position) {
            continue; // wrong_rows counts it
        }
        counts->fresh += before == 0 || held[at] != before;
        held[at] = worker->step + 1;
        if (at >= job->sinks && at + job->window <= position) {
            counts->selected++;
            counts->kept += worker->step > 0 && seen[at] == worker->step;
            seen[at] = worker->step + 1;
        }
    }
}

static uint32_t wrong_rows(const struct worker *worker, uint32_t layer, uint32_t head, const struct serve_view *view)
{
    const struct serve_source *source = &worker->source;
    const size_t bytes = source->row_bytes;
    uint32_t wrong = view->count == serve_slots(&worker->job) ? 0 : 1;
    const uint32_t end = worker->job.tokens + worker->step; // the landing is the step's before
    for (uint32_t i = 0; i < view->count; i++) {
        const uint32_t at = view->positions[i];
        wrong += at >= end ||
                 memcmp(view->keys + i * bytes, serve_source_row(source, &worker->job, source->keys, layer, head, at),
                        bytes) != 0 ||
                 memcmp(view->values + i * bytes,
                        serve_source_row(source, &worker->job, source->values, layer, head, at), bytes) != 0;
    }
    return wrong;
}

// Outside what is timed.
static bool look_at_landing(struct worker *worker, uint32_t layer, struct serve_record *record)
{
    const struct serve_job *job = &worker->job;
    struct counts counts = {0};
    if (!serve_landing_fetch(worker->landing, layer, false)) {
        return false;
    }
    for (uint32_t head = 0; head < job->kv_heads; head++) {
        struct serve_view view;
        if (!serve_landing_view(worker->landing, layer, head, &view)) {
            return false;
        }
        count_slots(worker, layer, head, &view, job->tokens + worker->step, &counts);
    }
    record->kept = counts.selected > 0 ? (float)counts.kept / (float)counts.selected : 0;
    record->turnover_bytes = counts.fresh * 2 * (uint32_t)worker->source.row_bytes;
    return true;
}

// Is what the last step has left in the landing what was appended? `records`: of the step, one for each layer.
static bool compare_landing(struct worker *worker, const struct serve_record *records)
{
    for (uint32_t layer = 0; layer < worker->job.layers; layer++) {
        if (records[layer].partial) {
            continue;
        }
        if (!serve_landing_fetch(worker->landing, layer, true)) {
            return false;
        }
        for (uint32_t head = 0; head < worker->job.kv_heads; head++) {
            struct serve_view view;
            if (!serve_landing_view(worker->landing, layer, head, &view)) {
                return false;
            }
            worker->answer.wrong_rows += wrong_rows(worker, layer, head, &view);
        }
    }
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
        .query_vectors = serve_source_queries(source, job, layer, worker->step),
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

static void wait_until(uint64_t ns)
{
    const struct timespec time = {(time_t)(ns / 1000000000u), (long)(ns % 1000000000u)};
    while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &time, NULL) == EINTR) {
    }
}

// Of the retrieve that comes next: what the job says is known of its queries now. The answer is not waited for.
static bool hint_at_next(const struct worker *worker, uint32_t layer)
{
    const struct serve_job *job = &worker->job;
    const uint32_t next = (layer + 1) % job->layers, step = worker->step + (next == 0);
    const uint32_t of_layer = job->hint == HINT_LAYER ? layer : next;
    const uint32_t of_step = job->hint == HINT_LAYER              ? worker->step
                             : job->hint == HINT_STEP && step > 0 ? step - 1
                                                                  : step;
    const struct ice_hint_options options = {
        .layer = next,
        .sequence_count = 1,
        .sequences = &worker->sequence,
        .query_vectors = serve_source_queries(&worker->source, job, of_layer, of_step),
        .query_dtype = (ice_dtype)job->dtype,
        .budget = job->budget,
        .sinks = job->sinks,
        .window = job->window,
    };
    const ice_status status = job->hint == HINT_NONE ? ICE_OK : ice_hint(worker->client, &options, NULL);
    return status == ICE_OK || failed("hint", status);
}

// What an engine computes between two retrieves.
static void think(const struct serve_job *job)
{
    if (job->think_us > 0) {
        wait_until(measure_ns() + job->think_us * 1000ull);
    }
}

static bool run_step(struct worker *worker, struct serve_record *records)
{
    for (uint32_t layer = 0; layer < worker->job.layers; layer++) {
        think(&worker->job);
        if (!retrieve(worker, layer, &records[layer]) || !hint_at_next(worker, layer) ||
            !look_at_landing(worker, layer, &records[layer])) {
            return false;
        }
    }
    worker->step++;
    worker->held_step[worker->place] = worker->step;
    return true;
}

static bool run_steps(struct worker *worker, uint32_t steps, const struct serve_go *go)
{
    const uint32_t layers = worker->job.layers;
    uint32_t done = 0;
    wait_until(go->begin_ns);
    worker->answer = (struct serve_answer){.begun_ns = measure_ns()};
    while (done < steps && (done == 0 || go->end_ns == 0 || measure_ns() < go->end_ns)) {
        if (!run_step(worker, worker->records + (size_t)done * layers)) {
            return false;
        }
        done++;
    }
    worker->answer.ended_ns = measure_ns();
    worker->answer.record_count = done * layers;
    return compare_landing(worker, worker->records + (size_t)(done - 1) * layers) &&
           parent_write(&worker->answer, sizeof worker->answer) &&
           parent_write(worker->records, (size_t)done * layers * sizeof *worker->records);
}

// The same prompt again, in a sequence without steps.
static bool begin_again(struct worker *worker)
{
    const size_t lanes = (size_t)worker->job.layers * worker->job.kv_heads;
    ice_sequence_close(worker->sequence);
    worker->sequence = NULL;
    worker->step = 0;
    memset(worker->seen, 0, lanes * worker->lane_room * sizeof *worker->seen);
    for (uint32_t i = 0; i < worker->job.place_count; i++) {
        memset(worker->held[i], 0, lanes * worker->lane_room * sizeof *worker->held[i]);
        worker->held_step[i] = 0;
    }
    return open_sequence(worker) && append_prompt(worker) && wait_idle(worker, false);
}

static bool obey(struct worker *worker, const struct serve_order *order)
{
    const char ready = 1;
    struct serve_go go;
    if (order->place >= worker->job.place_count || order->steps == 0 || order->steps > worker->job.step_room) {
        return false;
    }
    worker->place = order->place;
    worker->landing = worker->landings[order->place];
    if (order->steps > worker->job.step_room - worker->step && !begin_again(worker)) {
        return false;
    }
    return parent_write(&ready, 1) && parent_read(&go, sizeof go) && run_steps(worker, order->steps, &go);
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
        if (!obey(worker, &order)) {
            return false;
        }
    }
    return true;
}

// ---- building ----

static bool begin_build(struct worker *worker)
{
    return open_sequence(worker) && append_prompt(worker);
}

static void end_build(struct worker *worker)
{
    ice_sequence_close(worker->sequence);
    worker->sequence = NULL;
}

static bool build_until_told(struct worker *worker)
{
    worker->answer.builds = 0;
    while (wait_idle(worker, true)) {
        if (parent_is_waiting()) {
            end_build(worker);
            return true;
        }
        worker->answer.builds++;
        end_build(worker);
        if (!begin_build(worker)) {
            break;
        }
    }
    return false;
}

// One order begins it and the next one ends it; each is answered. The first answer comes when a sequence has been
// appended, so that what is measured from then on is beside its clustering.
static bool serve_building(struct worker *worker)
{
    struct serve_order order;
    if (!parent_write(&worker->answer, sizeof worker->answer)) {
        return false;
    }
    while (parent_read(&order, sizeof order)) {
        if (!begin_build(worker) || !parent_write(&worker->answer, sizeof worker->answer) ||
            !build_until_told(worker) || !parent_read(&order, sizeof order) ||
            !parent_write(&worker->answer, sizeof worker->answer)) {
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

// For decode steps; a builder needs none of it.
static bool reserve(struct worker *worker)
{
    const struct serve_job *job = &worker->job;
    const size_t step_bytes = job->kv_heads * worker->source.row_bytes, lanes = (size_t)job->layers * job->kv_heads;
    worker->lane_room = job->tokens + job->step_room;
    worker->step_keys = malloc(step_bytes);
    worker->step_values = malloc(step_bytes);
    worker->seen = calloc(lanes * worker->lane_room, sizeof *worker->seen);
    worker->records = calloc((size_t)job->layers * job->step_room, sizeof *worker->records);
    bool good =
        worker->step_keys != NULL && worker->step_values != NULL && worker->seen != NULL && worker->records != NULL;
    for (uint32_t i = 0; i < job->place_count; i++) {
        worker->held[i] = calloc(lanes * worker->lane_room, sizeof *worker->held[i]);
        good = good && worker->held[i] != NULL;
    }
    return good;
}

static void release(struct worker *worker)
{
    free(worker->step_keys);
    free(worker->step_values);
    free(worker->seen);
    free(worker->records);
    for (uint32_t i = 0; i < PLACES; i++) {
        free(worker->held[i]);
    }
}

int serve_worker(void)
{
    struct worker worker = {0};
    if (!parent_read(&worker.job, sizeof worker.job)) {
        return 1;
    }
    // The landings first: where one cannot be had, nothing has been waited for.
    const bool opened = open_all(&worker);
    if (!opened || !serve_source_init(&worker.source, &worker.job)) {
        close_all(&worker);
        return 1;
    }
    const bool good = worker.job.builds ? serve_building(&worker) : reserve(&worker) && serve_steps(&worker);
    close_all(&worker);
    release(&worker);
    serve_source_fini(&worker.source);
    return good ? 0 : 1;
}
