// The mixed load's parent: a daemon with a disk, its workers, and a row for each class of requests.
#include "client/icecache.h"
#include "serve_mix.h"

#include "commands.h"
#include "serve_parts.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define CHUNK_TOKENS   512u
#define STEPS_DRAWN    256u
#define LIMIT_NS       (60ull * 1000000000u)
#define BEGIN_AHEAD_NS 2000000u
#define INDEX_BYTES    768u // of a key, at most: trees are built anew as sequences come
#define SPARE_BYTES    (64ull << 20)
#define WORKERS_MAX    OPTIONS_MIX_WORKERS_MAX

_Static_assert(OPTIONS_MIX_SEQUENCES_MAX <= PLAN_SEQUENCES_MAX, "a plan has room for what the option allows");

struct mix_run {
    const struct options *options;
    struct serve_mix_job job;
    char work[SERVE_PATH_ROOM], disk[SERVE_PATH_ROOM];
    struct serve_daemon daemon;
    struct process workers[WORKERS_MAX];
    struct serve_mix_answer answers[WORKERS_MAX];
    struct serve_mix_record *records[WORKERS_MAX];
    uint32_t started;
    struct serve_stats before, after;
    double seconds; // from the common begin until the last worker has ended
    double *values; // of all records
};

// ---- what is run ----

static void plan_job(struct mix_run *run)
{
    const struct options *options = run->options;
    const struct options_shape *shape = options_shape(options);
    const uint32_t tokens = options->tokens.values[0], steps = options->mix_steps;
    run->job = (struct serve_mix_job){
        .job = {.layers = shape->layers,
                .kv_heads = shape->kv_heads,
                .query_heads = shape->kv_heads * shape->query_heads,
                .head_dim = shape->head_dim,
                .dtype = ICE_FP16,
                .tokens = tokens,
                .steps = STEPS_DRAWN,
                .budget = options->budgets.values[0],
                .sinks = options->sinks,
                .window = options->window,
                .seed = options->seed},
        .plan = {.seed = options->seed,
                 .sequences = options->mix_sequences,
                 .steps = steps,
                 .prompt_least = tokens / 8,
                 .prompt_most = tokens / 2,
                 .chunk = CHUNK_TOKENS,
                 .decode_least = steps / 8 + 1,
                 .decode_most = steps / 2 + 1},
        .limit_ns = LIMIT_NS,
    };
}

static struct serve_room room_of(const struct mix_run *run)
{
    const struct serve_job *job = &run->job.job;
    const uint32_t sequences = run->options->mix_workers * run->options->mix_sequences;
    const uint64_t lanes = (uint64_t)job->layers * job->kv_heads;
    const uint64_t keys = lanes * plan_length_most(&run->job.plan) * sequences;
    const uint64_t bytes = keys * 2 * serve_row_bytes(job);
    const uint64_t landing = lanes * serve_slots(job) * 3 * serve_row_bytes(job) * run->options->mix_sequences;
    return (struct serve_room){.pool_bytes = 2 * bytes + SPARE_BYTES,
                               .index_bytes = keys * INDEX_BYTES + SPARE_BYTES,
                               .shared_bytes = (run->options->mix_workers + 1) * (landing + SPARE_BYTES),
                               .spill_bytes = 8 * bytes + SPARE_BYTES,
                               .sessions = run->options->mix_workers + 1};
}

static bool start_all(struct mix_run *run)
{
    const struct serve_room room = room_of(run);
    char ready;
    bool good = serve_daemon_start(&run->daemon, run->options->daemon, run->work, run->disk, 1, &room);
    for (uint32_t w = 0; good && w < run->options->mix_workers; w++) {
        struct serve_mix_job job = run->job;
        job.job.seed += w;
        job.plan.seed += w;
        (void)snprintf(job.job.sockets, sizeof job.job.sockets, "%s", run->daemon.sockets);
        good = process_start_role(&run->workers[w], "mix", NULL);
        run->started += good;
        good = good && process_write(&run->workers[w], &job, sizeof job);
    }
    for (uint32_t w = 0; good && w < run->started; w++) {
        good = process_read(&run->workers[w], &ready, sizeof ready);
    }
    return good;
}

static bool read_worker(struct mix_run *run, uint32_t w)
{
    struct serve_mix_answer *answer = &run->answers[w];
    if (!process_read(&run->workers[w], answer, sizeof *answer)) {
        return false;
    }
    const size_t bytes = answer->record_count * sizeof *run->records[w];
    run->records[w] = malloc(bytes + 1);
    return run->records[w] != NULL && process_read(&run->workers[w], run->records[w], bytes);
}

static bool run_all(struct mix_run *run)
{
    struct serve_go go = {0};
    uint64_t ended_ns = 0, records = 0;
    bool good = serve_daemon_stats(&run->daemon, &run->before);
    go.begin_ns = measure_ns() + BEGIN_AHEAD_NS;
    for (uint32_t w = 0; good && w < run->started; w++) {
        good = process_write(&run->workers[w], &go, sizeof go);
    }
    for (uint32_t w = 0; good && w < run->started; w++) {
        good = read_worker(run, w);
        ended_ns = run->answers[w].ended_ns > ended_ns ? run->answers[w].ended_ns : ended_ns;
        records += run->answers[w].record_count;
    }
    run->seconds = 1e-9 * (double)(ended_ns - go.begin_ns);
    run->values = good ? malloc((records + 1) * sizeof *run->values) : NULL;
    return run->values != NULL && serve_daemon_stats(&run->daemon, &run->after);
}

// ---- rows ----

enum figure { TOTAL, QUEUE, SEARCH, FETCH, COPY, WIRE };

static double figure_of(const struct serve_mix_record *record, enum figure figure)
{
    const float known = record->queue_us + record->search_us + record->fetch_us + record->copy_us;
    const float values[] = {record->total_us, record->queue_us, record->search_us,
                            record->fetch_us, record->copy_us,  fmaxf(record->total_us - known, 0)};
    return (double)values[figure];
}

// Those of a class, or (kind below PLAN_KINDS) of one kind, to run->values. Returns how many.
static uint32_t collect(struct mix_run *run, enum serve_class class, enum plan_kind kind, enum figure figure)
{
    uint32_t count = 0;
    for (uint32_t w = 0; w < run->started; w++) {
        for (uint32_t i = 0; i < run->answers[w].record_count; i++) {
            const struct serve_mix_record *record = &run->records[w][i];
            if (kind == PLAN_KINDS ? serve_class_of(record->kind) == class : record->kind == kind) {
                run->values[count++] = figure_of(record, figure);
            }
        }
    }
    return count;
}

static json_t *number(double value)
{
    return isfinite(value) ? json_real(value) : json_null();
}

static json_t *times_of(struct mix_run *run, enum serve_class class, enum plan_kind kind)
{
    const uint32_t count = collect(run, class, kind, TOTAL);
    double sum = 0;
    for (uint32_t i = 0; i < count; i++) {
        sum += run->values[i];
    }
    return json_pack("{s:o, s:o, s:o, s:o}", "p50", number(quantile(run->values, count, 0.5)), "p99",
                     number(quantile(run->values, count, 0.99)), "p999", number(quantile(run->values, count, 0.999)),
                     "mean", number(sum / count));
}

static json_t *phases_of(struct mix_run *run)
{
    static const char *const names[] = {"queue", "search", "fetch", "copy", "wire"};
    json_t *phases = json_object();
    for (enum figure figure = QUEUE; figure <= WIRE; figure++) {
        const uint32_t count = collect(run, SERVE_DECODE, PLAN_KINDS, figure);
        const json_t *of =
            json_pack("{s:o, s:o, s:o}", "p50", number(quantile(run->values, count, 0.5)), "p99",
                      number(quantile(run->values, count, 0.99)), "p999", number(quantile(run->values, count, 0.999)));
        (void)json_object_set_new(phases, names[figure - QUEUE], (json_t *)(uintptr_t)of);
    }
    return phases;
}

struct sums {
    uint64_t requests, kinds[PLAN_KINDS], tokens, lanes, bytes, partial;
    double slowest_over_mean;
};

// The slowest worker's requests per second of waiting, over the mean worker's.
static struct sums sums_of(const struct mix_run *run, enum serve_class class)
{
    struct sums sums = {0};
    double slowest = INFINITY, all = 0;
    uint32_t workers = 0;
    for (uint32_t w = 0; w < run->started; w++) {
        double us = 0;
        uint32_t count = 0;
        for (uint32_t i = 0; i < run->answers[w].record_count; i++) {
            const struct serve_mix_record *record = &run->records[w][i];
            if (serve_class_of(record->kind) == class) {
                us += (double)record->total_us;
                count++;
                sums.kinds[record->kind]++;
                sums.tokens += record->tokens;
                sums.lanes += record->lanes;
                sums.bytes += record->bytes;
                sums.partial += record->partial;
            }
        }
        sums.requests += count;
        if (count > 0) {
            slowest = fmin(slowest, count / us);
            all += count / us;
            workers++;
        }
    }
    sums.slowest_over_mean = slowest / (all / workers);
    return sums;
}

static json_t *kinds_of(struct mix_run *run, enum serve_class class, const struct sums *sums)
{
    json_t *kinds = json_object();
    for (enum plan_kind kind = 0; kind < PLAN_KINDS; kind++) {
        if (serve_class_of(kind) == class) {
            json_t *of = times_of(run, class, kind);
            (void)json_object_set_new(of, "count", json_integer((json_int_t)sums->kinds[kind]));
            (void)json_object_set_new(kinds, plan_kind_names[kind], of);
        }
    }
    return kinds;
}

static json_t *row_of(struct mix_run *run, enum serve_class class)
{
    const struct sums sums = sums_of(run, class);
    const uint64_t retrieves = run->after.retrieves - run->before.retrieves;
    uint64_t wrong = 0;
    bool is_cut = false;
    for (uint32_t w = 0; w < run->started; w++) {
        wrong += run->answers[w].wrong_rows;
        is_cut = is_cut || run->answers[w].is_cut;
    }
    json_t *row = json_pack(
        "{s:s, s:s, s:I, s:I, s:I, s:s, s:o, s:o, s:o, s:o, s:o, s:I, s:b}", "method", "mix", "data", "attention",
        "tokens", (json_int_t)run->job.job.tokens, "workers", (json_int_t)run->started, "sequences",
        (json_int_t)run->started * run->options->mix_sequences, "class", serve_class_names[class], "retrieve_us",
        times_of(run, class, PLAN_KINDS), "requests", kinds_of(run, class, &sums), "per_s",
        number((double)sums.requests / run->seconds), "slowest_over_mean", number(sums.slowest_over_mean), "seconds",
        number(run->seconds), "steps", (json_int_t)run->job.plan.steps, "cut", (int)is_cut);
    if (class == SERVE_DECODE) {
        (void)json_object_set_new(row, "phase_us", phases_of(run));
        (void)json_object_set_new(row, "batch", number((double)sums.lanes / (double)sums.requests));
        (void)json_object_set_new(row, "tokens_per_s", number((double)sums.lanes / run->job.job.layers / run->seconds));
        (void)json_object_set_new(row, "bytes_moved", number((double)sums.bytes / (double)sums.requests));
        (void)json_object_set_new(row, "partial", json_integer((json_int_t)sums.partial));
        (void)json_object_set_new(row, "wrong_rows", json_integer((json_int_t)wrong));
        (void)json_object_set_new(row, "daemon_cpu_us",
                                  number((double)(run->after.cpu_ns - run->before.cpu_ns) / 1000 / (double)retrieves));
    } else if (class == SERVE_BULK) {
        (void)json_object_set_new(row, "tokens_per_s", number((double)sums.tokens / run->seconds));
    } else {
        (void)json_object_set_new(row, "arrivals",
                                  json_integer((json_int_t)(sums.kinds[PLAN_OPEN] + sums.kinds[PLAN_FORK])));
        (void)json_object_set_new(row, "forks", json_integer((json_int_t)sums.kinds[PLAN_FORK]));
        (void)json_object_set_new(row, "departures", json_integer((json_int_t)sums.kinds[PLAN_CLOSE]));
    }
    return row;
}

static int report(struct mix_run *run, json_t *rows)
{
    int code = 0;
    for (enum serve_class class = SERVE_DECODE; class < SERVE_CLASSES; class ++) {
        (void)json_array_append_new(rows, row_of(run, class));
    }
    for (uint32_t w = 0; w < run->started; w++) {
        if (run->answers[w].is_cut) {
            (void)fprintf(stderr,
                          "icecache-bench: serve: mix: ended after %g s, before all of its steps: fewer "
                          "--mix-steps, or a smaller --mix\n",
                          1e-9 * (double)LIMIT_NS);
        }
        if (run->answers[w].wrong_rows > 0) {
            (void)fprintf(stderr, "icecache-bench: serve: mix: %u rows of landings are not what was appended\n",
                          run->answers[w].wrong_rows);
            code = EXIT_CHECK;
        }
    }
    return code;
}

int serve_mix_run(const struct options *options, json_t *rows)
{
    struct mix_run *run = calloc(1, sizeof *run);
    int code = EXIT_MISSING;
    if (run == NULL) {
        return code;
    }
    run->options = options;
    plan_job(run);
    (void)fprintf(stderr, "icecache-bench: serve: mix: %u workers with %u sequences, %u steps\n", options->mix_workers,
                  options->mix_sequences, options->mix_steps);
    if (serve_folders_make(options, run->work, run->disk) && start_all(run)) {
        code = run_all(run) ? report(run, rows) : EXIT_CHECK;
    }
    for (uint32_t w = 0; w < run->started; w++) {
        const bool good = process_end(&run->workers[w], 0);
        code = code == 0 && !good ? EXIT_CHECK : code;
        free(run->records[w]);
    }
    code = !serve_daemon_stop(&run->daemon) && code == 0 ? EXIT_CHECK : code;
    folder_remove(run->work);
    folder_remove(run->disk);
    free(run->values);
    free(run);
    return code;
}
