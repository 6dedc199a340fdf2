// How good the selections were: full attention over the trace, compared with what the landing held.
#include "attention.h"
#include "replay.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

// Memory and sums for one lane (layer, KV head) at a time.
struct lane {
    uint32_t layer, kv_head;
    float *keys, *values; // [token, head_dim]
    float *weights;       // [token]
    float *mass;          // [token], softmax mass summed over the query heads of the KV head
    float *best;          // the largest masses outside sinks and window, at most the largest budget
};

// Per budget, over all lanes and steps.
struct totals {
    double mass, chosen, best, error;
};

static int compare_descending(const void *a, const void *b)
{
    float x = *(const float *)a;
    float y = *(const float *)b;
    return (x < y) - (x > y);
}

static int compare_ascending(const void *a, const void *b)
{
    return compare_descending(b, a);
}

// Restores the heap (smallest on top) below `at`.
static void sift_down(float *heap, size_t count, size_t at)
{
    for (;;) {
        size_t child = 2 * at + 1;
        if (child >= count) {
            return;
        }
        if (child + 1 < count && heap[child + 1] < heap[child]) {
            child++;
        }
        if (heap[at] <= heap[child]) {
            return;
        }
        float moved = heap[at];
        heap[at] = heap[child];
        heap[child] = moved;
        at = child;
    }
}

// The `most` largest of values[count] into best, descending; returns how many there are.
static size_t largest(float *best, size_t most, const float *values, size_t count)
{
    size_t held = count < most ? count : most;
    if (held == 0) {
        return 0;
    }
    memcpy(best, values, held * sizeof(*best));
    for (size_t i = held / 2; i-- > 0;) {
        sift_down(best, held, i);
    }
    for (size_t i = held; i < count; i++) {
        if (values[i] > best[0]) {
            best[0] = values[i];
            sift_down(best, held, 0);
        }
    }
    qsort(best, held, sizeof(*best), compare_descending);
    return held;
}

static double relative_error(const float *output, const float *full, uint32_t head_dim)
{
    double difference = 0;
    double norm = 0;
    for (uint32_t i = 0; i < head_dim; i++) {
        double d = (double)output[i] - (double)full[i];
        difference += d * d;
        norm += (double)full[i] * (double)full[i];
    }
    return norm > 0 ? sqrt(difference / norm) : 0;
}

// Full attention of the lane's query heads at one step: fills lane->mass, adds each budget's output error.
static void attend_fully(const struct replay *replay, const struct lane *lane, uint32_t step, struct totals *totals)
{
    const struct trace *trace = &replay->trace;
    size_t count = trace->first_query + step + 1;
    uint32_t group = trace->query_heads / trace->kv_heads;
    memset(lane->mass, 0, count * sizeof(*lane->mass));
    for (uint32_t head = lane->kv_head * group; head < (lane->kv_head + 1) * group; head++) {
        float query[256];
        float full[256];
        attention_to_float(query, trace_query(trace, lane->layer, head, step), trace->head_dim, trace->dtype);
        attention_weights(lane->weights, query, lane->keys, count, trace->head_dim, replay->scale);
        attention_output(full, lane->weights, lane->values, count, trace->head_dim);
        for (size_t i = 0; i < count; i++) {
            lane->mass[i] += lane->weights[i];
        }
        for (uint32_t i = 0; i < replay->options->budget_count; i++) {
            size_t cell = replay_cell(replay, step, lane->layer, i);
            const float *output = replay->outputs + (cell * trace->query_heads + head) * trace->head_dim;
            totals[i].error += relative_error(output, full, trace->head_dim);
        }
    }
}

static void measure_step(const struct replay *replay, const struct lane *lane, uint32_t step, struct totals *totals)
{
    const struct trace *trace = &replay->trace;
    const struct replay_options *options = replay->options;
    attend_fully(replay, lane, step, totals);
    uint64_t count = trace->first_query + step + 1;
    uint64_t window_first = count > options->window ? count - options->window : 0;
    uint64_t middle_first = options->sinks < window_first ? options->sinks : window_first;
    size_t best_count = largest(lane->best, options->budgets[options->budget_count - 1], lane->mass + middle_first,
                                window_first - middle_first);
    size_t next = 0;
    double best = 0;
    for (uint32_t i = 0; i < options->budget_count; i++) {
        for (; next < best_count && next < options->budgets[i]; next++) {
            best += (double)lane->best[next];
        }
        totals[i].best += best;
        size_t index = replay_cell(replay, step, lane->layer, i) * trace->kv_heads + lane->kv_head;
        const uint32_t *positions = replay->positions + index * replay->slots;
        for (uint32_t slot = 0; slot < replay->counts[index]; slot++) {
            double mass = (double)lane->mass[positions[slot]];
            bool is_chosen = positions[slot] >= middle_first && positions[slot] < window_first;
            totals[i].mass += mass;
            totals[i].chosen += is_chosen ? mass : 0;
        }
    }
}

static int measure_lanes(const struct replay *replay, struct lane *lane, struct totals *totals)
{
    const struct trace *trace = &replay->trace;
    size_t elements = trace->tokens * trace->head_dim;
    for (lane->layer = 0; lane->layer < trace->layers; lane->layer++) {
        replay_progress(replay, "full attention of layer %u of %u, to compare with", lane->layer + 1, trace->layers);
        for (lane->kv_head = 0; lane->kv_head < trace->kv_heads; lane->kv_head++) {
            attention_to_float(lane->keys, trace_key(trace, lane->layer, lane->kv_head, 0), elements, trace->dtype);
            attention_to_float(lane->values, trace_value(trace, lane->layer, lane->kv_head, 0), elements, trace->dtype);
            for (uint32_t step = 0; step < replay->steps; step++) {
                measure_step(replay, lane, step, totals);
            }
        }
    }
    return REPLAY_OK;
}

static void fill_rows(struct replay *replay, const struct totals *totals)
{
    const struct trace *trace = &replay->trace;
    size_t calls = (size_t)replay->steps * trace->layers;
    double heads = (double)calls * trace->query_heads;
    for (uint32_t i = 0; i < replay->options->budget_count; i++) {
        struct replay_row *row = &replay->rows[i];
        float *latencies_us = replay->latencies_us + i * calls;
        qsort(latencies_us, calls, sizeof(*latencies_us), compare_ascending);
        row->budget = replay->options->budgets[i];
        row->p50_us = (double)latencies_us[calls / 2];
        row->p99_us = (double)latencies_us[calls * 99 / 100];
        row->mass = totals[i].mass / heads;
        row->share = totals[i].best > 0 ? totals[i].chosen / totals[i].best : 1;
        row->output_error = totals[i].error / heads;
    }
}

int replay_measure(struct replay *replay)
{
    const struct trace *trace = &replay->trace;
    size_t elements = trace->tokens * trace->head_dim;
    size_t best_most = replay->options->budgets[replay->options->budget_count - 1];
    struct lane lane = {
        .keys = malloc(elements * sizeof(float)),
        .values = malloc(elements * sizeof(float)),
        .weights = malloc(trace->tokens * sizeof(float)),
        .mass = malloc(trace->tokens * sizeof(float)),
        .best = malloc(best_most * sizeof(float)),
    };
    struct totals totals[REPLAY_BUDGETS_MAX] = {{0}};
    int result;
    if (lane.keys == NULL || lane.values == NULL || lane.weights == NULL || lane.mass == NULL || lane.best == NULL) {
        result = replay_fail(replay, "full attention's memory", ICE_NO_MEMORY);
    } else {
        result = measure_lanes(replay, &lane, totals);
        fill_rows(replay, totals);
    }
    free(lane.keys);
    free(lane.values);
    free(lane.weights);
    free(lane.mass);
    free(lane.best);
    return result;
}
