// A worker of the mixed load, in a process of its own: does what its plan says, one request after the other. All its
// sequences take their tokens from the same data, each from a place of its own; a fork has its origin's tokens and goes
// on elsewhere, so that what is in the landing says whose it is.
#include "serve_mix.h"

#include "client/icecache.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define DEADLINE_US   (60ull * 1000000u)
#define STAGING_BYTES (16ull << 20)
#define SPANS_MAX     16u // a fork of a fork ...: longer chains begin a new span in the last one's place
#define COMPARE_EACH  8u  // decode steps: one layer is compared

const char *const serve_class_names[SERVE_CLASSES] = {"decode", "bulk", "admin"};
const char *const plan_kind_names[PLAN_KINDS] = {"open", "fork", "append", "retrieve", "info", "close"};

// Tokens from position `first` on are those of the data from `offset` on.
struct span {
    uint32_t first, offset;
};

struct member { // a sequence and which tokens it has
    ice_sequence *sequence;
    uint32_t length, span_count;
    struct span spans[SPANS_MAX];
};

struct mix {
    struct serve_mix_job job;
    struct serve_source source;
    struct plan plan;
    struct random random; // offsets
    ice_client *client;
    ice_landing *landing;
    struct ice_sequence_options options;
    struct member members[PLAN_SEQUENCES_MAX];
    // Of a request: of all sequences a step's K, V and queries; of one its chunk or its token ids.
    uint8_t *keys, *values, *queries;
    uint64_t retrieves; // steps, by all
    struct serve_mix_record *records;
    uint32_t record_room;
    struct serve_mix_answer answer;
};

enum serve_class serve_class_of(enum plan_kind kind)
{
    return kind == PLAN_RETRIEVE ? SERVE_DECODE : kind == PLAN_APPEND ? SERVE_BULK : SERVE_ADMIN;
}

static bool failed(const char *what, ice_status status)
{
    (void)fprintf(stderr, "icecache-bench: serve: mix: %s: %s: %s\n", what, ice_status_name(status), ice_last_error());
    return false;
}

// ---- tokens ----

static uint32_t token_at(const struct mix *mix, const struct member *member, uint32_t position)
{
    uint32_t at = member->span_count - 1;
    while (member->spans[at].first > position) {
        at--;
    }
    return (member->spans[at].offset + position) % mix->source.tokens;
}

// From its present length on the member has tokens of its own.
static void begin_span(struct mix *mix, struct member *member)
{
    member->span_count -= member->span_count == SPANS_MAX;
    if (member->span_count > 0 && member->spans[member->span_count - 1].first == member->length) {
        member->span_count--;
    }
    member->spans[member->span_count++] = (struct span){member->length, random_below(&mix->random, mix->source.tokens)};
}

static const uint8_t *row_of(const struct mix *mix, const uint8_t *side, uint32_t layer, uint32_t head, uint32_t token)
{
    return serve_source_row(&mix->source, &mix->job.job, side, layer, head, token);
}

// ---- requests ----

static struct serve_mix_record *next_record(struct mix *mix)
{
    if (mix->answer.record_count == mix->record_room) {
        const uint32_t room = mix->record_room + mix->record_room / 2 + 1024;
        struct serve_mix_record *records = realloc(mix->records, room * sizeof *records);
        if (records == NULL) {
            (void)fputs("icecache-bench: serve: mix: no memory\n", stderr);
            return NULL;
        }
        mix->records = records;
        mix->record_room = room;
    }
    return memset(&mix->records[mix->answer.record_count++], 0, sizeof *mix->records);
}

static bool note(struct mix *mix, enum plan_kind kind, uint64_t begun_ns, uint32_t tokens)
{
    const float us = (float)(measure_ns() - begun_ns) / 1000;
    struct serve_mix_record *record = next_record(mix);
    if (record != NULL) {
        record->kind = kind;
        record->total_us = us;
        record->tokens = tokens;
    }
    return record != NULL;
}

static bool open_one(struct mix *mix, const struct plan_op *op)
{
    struct member *member = &mix->members[op->sequence];
    const uint64_t begun_ns = measure_ns();
    const ice_status status = ice_sequence_open(mix->client, &mix->options, DEADLINE_US, &member->sequence);
    if (status != ICE_OK) {
        return failed("open", status);
    }
    member->length = member->span_count = 0;
    begin_span(mix, member);
    return note(mix, PLAN_OPEN, begun_ns, 0);
}

static bool fork_one(struct mix *mix, const struct plan_op *op)
{
    struct member *member = &mix->members[op->sequence];
    const struct member *from = &mix->members[op->from];
    const uint64_t begun_ns = measure_ns();
    ice_sequence *sequence = NULL;
    const ice_status status = ice_sequence_fork(from->sequence, op->count, DEADLINE_US, &sequence);
    if (status != ICE_OK) {
        return failed("fork", status);
    }
    *member = *from;
    member->sequence = sequence;
    member->length = op->count;
    while (member->span_count > 1 && member->spans[member->span_count - 1].first >= op->count) {
        member->span_count--;
    }
    begin_span(mix, member);
    return note(mix, PLAN_FORK, begun_ns, op->count);
}

// Strides of a request's buffers: [layer][KV head][token].
static bool append_one(struct mix *mix, const struct plan_op *op)
{
    const struct serve_job *job = &mix->job.job;
    struct member *member = &mix->members[op->sequence];
    const size_t row = mix->source.row_bytes, head_bytes = op->count * row, layer_bytes = job->kv_heads * head_bytes;
    for (uint32_t layer = 0; layer < job->layers; layer++) {
        for (uint32_t head = 0; head < job->kv_heads; head++) {
            for (uint32_t i = 0; i < op->count; i++) {
                const size_t at = layer * layer_bytes + head * head_bytes + i * row;
                const uint32_t token = token_at(mix, member, op->first + i);
                memcpy(mix->keys + at, row_of(mix, mix->source.keys, layer, head, token), row);
                memcpy(mix->values + at, row_of(mix, mix->source.values, layer, head, token), row);
            }
        }
    }
    const struct ice_kv_source source = {
        mix->keys, mix->values, job->layers * layer_bytes, job->layers * layer_bytes, layer_bytes, row, head_bytes};
    const uint64_t begun_ns = measure_ns();
    const ice_status status =
        ice_append(member->sequence, ICE_ALL_LAYERS, op->first, op->count, &source, DEADLINE_US, NULL);
    if (status != ICE_OK) {
        return failed("append", status);
    }
    member->length += op->count;
    return note(mix, PLAN_APPEND, begun_ns, op->count);
}

static bool info_one(struct mix *mix, const struct plan_op *op)
{
    struct ice_sequence_info info;
    const uint64_t begun_ns = measure_ns();
    const ice_status status = ice_sequence_info(mix->members[op->sequence].sequence, DEADLINE_US, &info);
    return status == ICE_OK ? note(mix, PLAN_INFO, begun_ns, 0) : failed("info", status);
}

static bool close_one(struct mix *mix, const struct plan_op *op)
{
    struct member *member = &mix->members[op->sequence];
    const uint64_t begun_ns = measure_ns();
    ice_sequence_close(member->sequence);
    member->sequence = NULL;
    return note(mix, PLAN_CLOSE, begun_ns, 0);
}

// ---- decode steps ----

static bool compare(struct mix *mix, const struct plan_op *op, uint32_t layer)
{
    const struct serve_job *job = &mix->job.job;
    const size_t bytes = mix->source.row_bytes;
    for (uint32_t i = 0; i < op->count; i++) {
        const struct member *member = &mix->members[op->list[i]];
        for (uint32_t head = 0; head < job->kv_heads; head++) {
            struct ice_landing_view view;
            const ice_status status = ice_landing_view(mix->landing, op->list[i], layer, head, &view);
            if (status != ICE_OK) {
                return failed("look at the landing", status);
            }
            const uint32_t wanted = serve_slots(job) < member->length ? serve_slots(job) : member->length;
            mix->answer.wrong_rows += view.count != wanted;
            for (uint32_t slot = 0; slot < view.count; slot++) {
                const uint32_t at = view.positions[slot];
                const uint32_t token = at < member->length ? token_at(mix, member, at) : 0;
                const uint8_t *key = row_of(mix, mix->source.keys, layer, head, token);
                const uint8_t *value = row_of(mix, mix->source.values, layer, head, token);
                mix->answer.wrong_rows += at >= member->length ||
                                          memcmp((const uint8_t *)view.keys + slot * bytes, key, bytes) != 0 ||
                                          memcmp((const uint8_t *)view.values + slot * bytes, value, bytes) != 0;
            }
        }
    }
    return true;
}

static void fill_step(struct mix *mix, const struct plan_op *op, uint32_t layer)
{
    const struct serve_job *job = &mix->job.job;
    const size_t row = mix->source.row_bytes, query_bytes = job->query_heads * row;
    for (uint32_t i = 0; i < op->count; i++) {
        const struct member *member = &mix->members[op->list[i]];
        const uint32_t token = token_at(mix, member, member->length);
        for (uint32_t head = 0; head < job->kv_heads; head++) {
            const size_t at = ((size_t)i * job->kv_heads + head) * row;
            memcpy(mix->keys + at, row_of(mix, mix->source.keys, layer, head, token), row);
            memcpy(mix->values + at, row_of(mix, mix->source.values, layer, head, token), row);
        }
        memcpy(mix->queries + i * query_bytes,
               serve_source_queries(&mix->source, job, layer, (uint32_t)mix->retrieves + op->list[i]), query_bytes);
    }
}

static bool retrieve_layer(struct mix *mix, const struct plan_op *op, uint32_t layer, bool *partial)
{
    const struct serve_job *job = &mix->job.job;
    ice_sequence *sequences[PLAN_SEQUENCES_MAX];
    uint64_t positions[PLAN_SEQUENCES_MAX];
    for (uint32_t i = 0; i < op->count; i++) {
        sequences[i] = mix->members[op->list[i]].sequence;
        positions[i] = mix->members[op->list[i]].length;
    }
    const struct ice_retrieve_options options = {
        .landing = mix->landing,
        .layer = layer,
        .sequence_count = op->count,
        .sequences = sequences,
        .rows = op->list,
        .first_queries = positions,
        .query_vectors = mix->queries,
        .query_dtype = (ice_dtype)job->dtype,
        .keys = mix->keys,
        .values = mix->values,
        .budget = job->budget,
        .sinks = job->sinks,
        .window = job->window,
    };
    struct ice_retrieve_result result;
    fill_step(mix, op, layer);
    const uint64_t begun_ns = measure_ns();
    const ice_status status = ice_retrieve(mix->client, &options, &result);
    if (status != ICE_OK) {
        return failed("retrieve", status);
    }
    if (!note(mix, PLAN_RETRIEVE, begun_ns, op->count)) {
        return false;
    }
    struct serve_mix_record *record = &mix->records[mix->answer.record_count - 1];
    record->queue_us = (float)result.queue_us;
    record->search_us = (float)result.search_us;
    record->fetch_us = (float)result.fetch_us;
    record->copy_us = (float)result.copy_us;
    record->bytes = (uint32_t)result.bytes_moved;
    record->lanes = op->count;
    record->partial = *partial = result.partial;
    return true;
}

static bool decode(struct mix *mix, const struct plan_op *op)
{
    const uint32_t layers = mix->job.job.layers;
    const uint32_t compared = (uint32_t)(mix->retrieves / COMPARE_EACH % layers);
    bool partial[2] = {false, false}; // of the layer that is compared; of another
    for (uint32_t layer = 0; layer < layers; layer++) {
        if (!retrieve_layer(mix, op, layer, &partial[layer != compared])) {
            return false;
        }
    }
    for (uint32_t i = 0; i < op->count; i++) {
        mix->members[op->list[i]].length++;
    }
    return mix->retrieves++ % COMPARE_EACH != 0 || partial[0] || compare(mix, op, compared);
}

// ---- the worker ----

static bool run_plan(struct mix *mix, const struct serve_go *go)
{
    bool (*const calls[PLAN_KINDS])(struct mix *, const struct plan_op *) = {
        [PLAN_OPEN] = open_one,   [PLAN_FORK] = fork_one, [PLAN_APPEND] = append_one,
        [PLAN_RETRIEVE] = decode, [PLAN_INFO] = info_one, [PLAN_CLOSE] = close_one};
    struct plan_op op;
    const struct timespec begin = {(time_t)(go->begin_ns / 1000000000u), (long)(go->begin_ns % 1000000000u)};
    while (clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &begin, NULL) == EINTR) {
    }
    mix->answer.begun_ns = measure_ns();
    while (!mix->answer.is_cut && plan_next(&mix->plan, &op)) {
        if (!calls[op.kind](mix, &op)) {
            return false;
        }
        mix->answer.is_cut = measure_ns() > go->begin_ns + mix->job.limit_ns;
    }
    mix->answer.ended_ns = measure_ns();
    return true;
}

static bool open_all(struct mix *mix)
{
    const struct serve_job *job = &mix->job.job;
    const struct ice_client_options options = {
        .socket_directory = job->sockets, .name = "bench-mix", .staging_bytes = STAGING_BYTES};
    const struct ice_landing_shape shape = {.rows = mix->job.plan.sequences,
                                            .layers = job->layers,
                                            .kv_heads = job->kv_heads,
                                            .slots = serve_slots(job),
                                            .head_dim = job->head_dim,
                                            .dtype = (ice_dtype)job->dtype};
    mix->options = (struct ice_sequence_options){.name_space = "bench",
                                                 .model_digest = "serve",
                                                 .model_digest_bytes = 5,
                                                 .layers = job->layers,
                                                 .kv_heads = job->kv_heads,
                                                 .query_heads = job->query_heads,
                                                 .head_dim = job->head_dim,
                                                 .dtype = (ice_dtype)job->dtype};
    ice_status status = ice_client_connect(&options, &mix->client);
    if (status == ICE_OK) {
        status = ice_landing_open(mix->client, &shape, DEADLINE_US, &mix->landing);
    }
    return status == ICE_OK || failed("connect", status);
}

static bool reserve(struct mix *mix)
{
    const struct serve_job *job = &mix->job.job;
    const struct plan_params *plan = &mix->job.plan;
    const size_t row = mix->source.row_bytes, chunk = (size_t)job->layers * job->kv_heads * plan->chunk * row,
                 step = (size_t)plan->sequences * job->kv_heads * row, bytes = chunk > step ? chunk : step;
    mix->keys = malloc(bytes);
    mix->values = malloc(bytes);
    mix->queries = malloc((size_t)plan->sequences * job->query_heads * row);
    plan_init(&mix->plan, plan);
    random_init(&mix->random, ~plan->seed);
    return mix->keys != NULL && mix->values != NULL && mix->queries != NULL;
}

static bool serve_mix(struct mix *mix)
{
    const char ready = 1;
    struct serve_go go;
    return open_all(mix) && serve_source_init(&mix->source, &mix->job.job) && reserve(mix) && parent_write(&ready, 1) &&
           parent_read(&go, sizeof go) && run_plan(mix, &go) && parent_write(&mix->answer, sizeof mix->answer) &&
           parent_write(mix->records, mix->answer.record_count * sizeof *mix->records);
}

int serve_mix_worker(void)
{
    struct mix *mix = calloc(1, sizeof *mix);
    if (mix == NULL || !parent_read(&mix->job, sizeof mix->job)) {
        free(mix);
        return 1;
    }
    const bool good = serve_mix(mix);
    ice_landing_close(mix->landing);
    ice_client_close(mix->client);
    serve_source_fini(&mix->source);
    free(mix->keys);
    free(mix->values);
    free(mix->queries);
    free(mix->records);
    free(mix);
    return good ? 0 : 1;
}
