// What a worker appends and asks: generated, with queries that resemble each other as consecutive decode steps' do, or
// a trace's last steps.
#include "serve.h"

#include "data.h"
#include "rows.h"
#include "trace.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define PAGE_TOKENS 16u   // the daemon's default
#define FRAME_ALIGN 4096u // where there is a spill file

size_t serve_row_bytes(const struct serve_job *job)
{
    return (size_t)job->head_dim * (job->dtype == ICE_FP32 ? sizeof(float) : sizeof(uint16_t));
}

uint32_t serve_slots(const struct serve_job *job)
{
    return job->sinks + job->window + job->budget;
}

uint32_t serve_frame_bytes(const struct serve_job *job)
{
    const uint32_t bytes = PAGE_TOKENS * 2 * (uint32_t)serve_row_bytes(job);
    return (bytes + FRAME_ALIGN - 1) / FRAME_ALIGN * FRAME_ALIGN;
}

uint64_t serve_bytes(const struct serve_job *job)
{
    return 2ull * job->layers * job->kv_heads * (job->tokens + job->step_room) * serve_row_bytes(job);
}

const uint8_t *serve_source_row(const struct serve_source *source, const struct serve_job *job, const uint8_t *side,
                                uint32_t layer, uint32_t head, uint32_t token)
{
    return side +
           (((size_t)layer * job->kv_heads + head) * source->tokens + token % source->tokens) * source->row_bytes;
}

static uint8_t *query_row(const struct serve_source *source, const struct serve_job *job, uint32_t layer, uint32_t step,
                          uint32_t head)
{
    const size_t row = ((size_t)layer * job->steps + step) * job->query_heads + head;
    return source->queries + row * source->row_bytes;
}

const uint8_t *serve_source_queries(const struct serve_source *source, const struct serve_job *job, uint32_t layer,
                                    uint32_t step)
{
    return query_row(source, job, layer, step % job->steps, 0);
}

static void to_halves(const float *values, size_t count, uint8_t *out)
{
    for (size_t i = 0; i < count; i++) {
        const uint16_t half = data_half_of(values[i]);
        memcpy(out + i * sizeof half, &half, sizeof half);
    }
}

static bool generate_lane(struct serve_source *source, const struct serve_job *job, uint32_t layer, uint32_t head)
{
    const uint32_t group = job->query_heads / job->kv_heads, dim = job->head_dim;
    const struct generator_shape shape = {source->tokens, dim, group, job->steps, true};
    float *keys = malloc((size_t)shape.tokens * dim * sizeof *keys);
    float *queries = malloc((size_t)job->steps * group * dim * sizeof *queries);
    const uint64_t seed = job->seed * 1000003 + (uint64_t)layer * job->kv_heads + head;
    const bool drawn = keys != NULL && queries != NULL && generate_attention(&shape, seed, keys, queries);
    if (drawn) {
        const size_t first = ((size_t)layer * job->kv_heads + head) * source->tokens * source->row_bytes;
        to_halves(keys, (size_t)shape.tokens * dim, source->keys + first);
        for (size_t i = 0; i < shape.tokens * source->row_bytes; i++) {
            source->values[first + i] = source->keys[first + i] ^ ROWS_VALUE_BITS;
        }
        for (uint32_t step = 0; step < job->steps; step++) {
            to_halves(queries + (size_t)step * group * dim, (size_t)group * dim,
                      query_row(source, job, layer, step, head * group));
        }
    }
    free(keys);
    free(queries);
    return drawn;
}

static bool generate(struct serve_source *source, const struct serve_job *job)
{
    bool drawn = true;
    for (uint32_t layer = 0; drawn && layer < job->layers; layer++) {
        for (uint32_t head = 0; drawn && head < job->kv_heads; head++) {
            drawn = generate_lane(source, job, layer, head);
        }
    }
    return drawn;
}

// The steps are the trace's last ones; the job's tokens end where they begin.
static bool read_trace(struct serve_source *source, const struct serve_job *job)
{
    struct trace trace;
    char error[512];
    if (!trace_open(job->trace, &trace, error, sizeof error)) {
        (void)fprintf(stderr, "icecache-bench: serve: %s\n", error);
        return false;
    }
    for (uint32_t layer = 0; layer < job->layers; layer++) {
        for (uint32_t head = 0; head < job->kv_heads; head++) {
            const size_t first = ((size_t)layer * job->kv_heads + head) * source->tokens * source->row_bytes;
            for (uint32_t token = 0; token < source->tokens; token++) {
                memcpy(source->keys + first + token * source->row_bytes, trace_key(&trace, layer, head, token),
                       source->row_bytes);
                memcpy(source->values + first + token * source->row_bytes, trace_value(&trace, layer, head, token),
                       source->row_bytes);
            }
        }
        for (uint32_t step = 0; step < job->steps; step++) {
            for (uint32_t head = 0; head < job->query_heads; head++) {
                memcpy(query_row(source, job, layer, step, head),
                       trace_query(&trace, layer, head, trace.steps - job->steps + step), source->row_bytes);
            }
        }
    }
    trace_close(&trace);
    return true;
}

bool serve_source_init(struct serve_source *source, const struct serve_job *job)
{
    *source = (struct serve_source){.tokens = job->tokens + job->steps, .row_bytes = serve_row_bytes(job)};
    const size_t bytes = (size_t)job->layers * job->kv_heads * source->tokens * source->row_bytes;
    source->keys = malloc(bytes);
    source->values = malloc(bytes);
    source->queries = malloc((size_t)job->layers * job->steps * job->query_heads * source->row_bytes);
    bool there = source->keys != NULL && source->values != NULL && source->queries != NULL;
    if (!there) {
        (void)fputs("icecache-bench: serve: no memory for a worker's data\n", stderr);
    } else {
        there = job->trace[0] != '\0' ? read_trace(source, job) : generate(source, job);
    }
    if (!there) {
        serve_source_fini(source);
    }
    return there;
}

void serve_source_fini(struct serve_source *source)
{
    free(source->keys);
    free(source->values);
    free(source->queries);
    *source = (struct serve_source){0};
}
