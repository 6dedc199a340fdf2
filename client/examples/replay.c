// icecache-replay: a worker that plays a trace, from start to end.
#include "replay.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

static bool allocate_records(struct replay *replay)
{
    const struct trace *trace = &replay->trace;
    size_t calls = (size_t)replay->steps * trace->layers * replay->options->budget_count;
    replay->counts = calloc(calls * trace->kv_heads, sizeof(*replay->counts));
    replay->positions = calloc(calls * trace->kv_heads * replay->slots, sizeof(*replay->positions));
    replay->outputs = calloc(calls * trace->query_heads * trace->head_dim, sizeof(*replay->outputs));
    replay->latencies_us = calloc(calls, sizeof(*replay->latencies_us));
    return replay->counts != NULL && replay->positions != NULL && replay->outputs != NULL &&
           replay->latencies_us != NULL;
}

static int play(struct replay *replay)
{
    int result = replay_connect(replay);
    if (result == REPLAY_OK) {
        result = replay_prefill(replay);
    }
    if (result != REPLAY_OK) {
        return result;
    }
    if (replay->options->exact) {
        return replay_exact(replay);
    }
    if (!allocate_records(replay)) {
        return replay_fail(replay, "memory for what is retrieved", ICE_NO_MEMORY);
    }
    result = replay_decode(replay);
    if (result == REPLAY_OK) {
        result = replay_measure(replay);
    }
    if (result == REPLAY_OK && replay->wrong_rows > 0) {
        (void)fprintf(stderr, "icecache-replay: %s: %llu rows of the landing differ from the trace\n",
                      replay->options->name, (unsigned long long)replay->wrong_rows);
        result = REPLAY_FAILED;
    }
    return result;
}

static void report(const struct replay *replay)
{
    if (replay->options->json) {
        replay_print_json(replay);
    } else if (replay->options->exact) {
        (void)printf("%s: exact over %u steps, %u layers, up to %llu tokens\n", replay->options->name, replay->steps,
                     replay->trace.layers, (unsigned long long)(replay->trace.first_query + replay->steps));
    } else {
        replay_print_table(replay);
    }
}

int main(int argc, char **argv)
{
    struct replay_options options;
    int result = replay_options_parse(&options, argc, argv);
    if (result != -1) {
        return result;
    }
    struct replay replay = {.options = &options};
    char error[4608];
    if (!trace_open(options.trace_folder, &replay.trace, error, sizeof(error))) {
        (void)fprintf(stderr, "icecache-replay: %s\n", error);
        return REPLAY_USAGE;
    }
    replay.steps = options.steps != 0 && options.steps < replay.trace.steps ? options.steps : replay.trace.steps;
    replay.scale = 1.0f / sqrtf((float)replay.trace.head_dim);
    if (options.exact) {
        options.budgets[0] = (uint32_t)(replay.trace.first_query + replay.steps);
        options.budget_count = 1;
    }
    replay.slots = options.sinks + options.window + options.budgets[options.budget_count - 1];
    result = play(&replay);
    if (result == REPLAY_OK || replay.wrong_rows > 0) {
        report(&replay);
    }
    ice_sequence_close(replay.sequence);
    ice_landing_close(replay.landing);
    ice_client_close(replay.client);
    free(replay.counts);
    free(replay.positions);
    free(replay.outputs);
    free(replay.latencies_us);
    trace_close(&replay.trace);
    return result;
}
