// The `serve` command: end-to-end latency and throughput of retrieves, with a real daemon and real workers, beside what
// the messages and the copies cost without it.
//
// A stage is a daemon with its workers. Without --ram-cap there is one, whose pool holds everything; with it there is
// one for each share, all alive at the same time, and rounds go from one to the next. Processes that have no order wait
// and take no time from the others.
#include "serve.h"
#include "commands.h"
#include "serve_rows.h"

#include "trace.h"

#include <errno.h>
#include <math.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#define STAGES_MAX   (OPTIONS_LIST_MAX + 1u)
#define SETS_MAX     (2u * PLACES * OPTIONS_LIST_MAX + 1u)
#define BASE_REPEATS 200u
#define DEVICE_TRIES 64u
#define POOL_STEP    (2ull << 20) // the least pool, and its unit
#define PAGES_LEAST  0.5          // read by a retrieve, on average: below it the device is not compared with
#define SHARED_SPARE (64ull << 20)
#define INDEX_BYTES  512u // of a key, at most

struct stage {
    struct serve_daemon daemon;
    struct process workers[SERVE_WORKERS_MAX], builder;
    uint32_t worker_count;
    double cap;              // 0: none
    uint32_t places[PLACES]; // of the workers' landings, as they are
    double ready_s;          // from the first append until no clustering was due, the slowest worker's
};

struct serve {
    const struct options *options;
    struct serve_job job;
    char data[128];
    char work[SERVE_PATH_ROOM], disk[SERVE_PATH_ROOM]; // folders
    uint32_t workers_max;
    struct stage stages[STAGES_MAX];
    uint32_t stage_count;
    uint64_t all_bytes; // of the pool, where every page is in memory
    struct serve_bases *bases;
    struct serve_device *device; // NULL: not asked for
    struct serve_set base_sets[SERVE_BASES];
    struct serve_set sets[SETS_MAX];
    uint32_t set_count;
    struct serve_answer answers[SERVE_WORKERS_MAX];
    struct serve_record *records;
};

static bool is_capped(const struct serve *serve)
{
    return serve->options->ram_caps.count > 0;
}

// ---- stages ----

static struct serve_room room_of(const struct serve *serve, uint32_t sequences, double cap)
{
    const struct serve_job *job = &serve->job;
    const uint64_t bytes = serve_bytes(job) * sequences;
    const uint64_t keys = (uint64_t)job->layers * job->kv_heads * (job->tokens + job->steps) * sequences;
    const uint64_t landing = (uint64_t)job->layers * job->kv_heads * serve_slots(job) * 3 * serve_row_bytes(job);
    const uint64_t pool = cap > 0 && cap < 1 ? (uint64_t)(cap * (double)serve->all_bytes) : 2 * bytes + (16u << 20);
    return (struct serve_room){
        .pool_bytes = pool < POOL_STEP ? POOL_STEP : (pool + POOL_STEP / 2) / POOL_STEP * POOL_STEP,
        .index_bytes = keys * INDEX_BYTES + (64u << 20),
        .shared_bytes = (sequences + 1) * (landing * job->place_count + SHARED_SPARE),
        .spill_bytes = 4 * bytes + (64u << 20),
        .sessions = sequences + 1,
    };
}

static bool start_worker(struct serve *serve, struct stage *stage, struct process *process, uint32_t number,
                         bool builds)
{
    struct serve_job job = serve->job;
    job.builds = builds;
    job.seed += number;
    (void)snprintf(job.sockets, sizeof job.sockets, "%s", stage->daemon.sockets);
    return process_start_role(process, "worker", NULL) && process_write(process, &job, sizeof job);
}

static bool wait_worker(const struct process *process, bool builds, struct stage *stage)
{
    struct serve_answer answer;
    if (!process_read(process, &answer, sizeof answer)) {
        return false;
    }
    if (!builds && !answer.is_idle) {
        (void)fprintf(stderr, "icecache-bench: serve: share %g: clustering has not ended, up to token %u it has\n",
                      stage->cap, answer.indexed);
    }
    const double s = 1e-9 * (double)(answer.ended_ns - answer.begun_ns);
    if (!builds) {
        memcpy(stage->places, answer.places, sizeof stage->places);
    }
    stage->ready_s = s > stage->ready_s ? s : stage->ready_s;
    return true;
}

static bool stage_open(struct serve *serve, struct stage *stage, double cap)
{
    const bool builds = !is_capped(serve);
    const struct serve_room room = room_of(serve, serve->workers_max + builds, cap);
    *stage = (struct stage){.cap = cap};
    serve->stage_count++;
    (void)fprintf(stderr, "icecache-bench: serve: %s: a daemon with a pool of %llu MiB\n", serve->data,
                  (unsigned long long)room.pool_bytes >> 20);
    bool good =
        serve_daemon_start(&stage->daemon, serve->options->daemon, serve->work, serve->disk, serve->stage_count, &room);
    for (uint32_t w = 0; good && w < serve->workers_max; w++) {
        good = start_worker(serve, stage, &stage->workers[w], w, false);
        stage->worker_count += good;
    }
    good = good && (!builds || start_worker(serve, stage, &stage->builder, serve->workers_max, true));
    for (uint32_t w = 0; good && w < serve->workers_max; w++) {
        good = wait_worker(&stage->workers[w], false, stage);
    }
    return good && (!builds || wait_worker(&stage->builder, true, stage));
}

static bool stage_close(struct stage *stage)
{
    bool good = true;
    for (uint32_t w = 0; w < stage->worker_count; w++) {
        good = process_end(&stage->workers[w], 0) && good;
    }
    if (stage->builder.pid > 0) {
        good = process_end(&stage->builder, 0) && good;
    }
    return serve_daemon_stop(&stage->daemon) && good;
}

// ---- rounds ----

// The first `count` workers run the steps. What they answer goes to serve->answers and serve->records.
static bool run_workers(struct serve *serve, struct stage *stage, uint32_t count, uint32_t place,
                        struct serve_round *out)
{
    const struct serve_order order = {.steps = serve->options->steps, .place = place};
    const uint32_t per_worker = order.steps * serve->job.layers;
    bool good = serve_daemon_stats(&stage->daemon, &out->before);
    for (uint32_t w = 0; good && w < count; w++) {
        good = process_write(&stage->workers[w], &order, sizeof order);
    }
    for (uint32_t w = 0; good && w < count; w++) {
        good = process_read(&stage->workers[w], &serve->answers[w], sizeof serve->answers[w]) &&
               serve->answers[w].record_count == per_worker &&
               process_read(&stage->workers[w], serve->records + (size_t)w * per_worker,
                            per_worker * sizeof *serve->records);
    }
    out->answers = serve->answers;
    out->records = serve->records;
    out->workers = count;
    out->per_worker = per_worker;
    return good && serve_daemon_stats(&stage->daemon, &out->after);
}

static bool tell_builder(struct stage *stage)
{
    const struct serve_order order = {0};
    struct serve_answer answer;
    return process_write(&stage->builder, &order, sizeof order) &&
           process_read(&stage->builder, &answer, sizeof answer);
}

static bool run_set(struct serve *serve, struct stage *stage, struct serve_set *set)
{
    struct serve_round round = {0};
    double device_us[DEVICE_TRIES];
    if ((set->builds && !tell_builder(stage)) || !run_workers(serve, stage, set->workers, set->order, &round) ||
        (set->builds && !tell_builder(stage))) {
        return false;
    }
    if (serve->device != NULL && serve_pages_read(&round) >= PAGES_LEAST) {
        round.device_us = device_us;
        round.device_count = DEVICE_TRIES;
        if (!serve_device_measure(serve->device, (uint32_t)lround(serve_pages_read(&round)), device_us, DEVICE_TRIES)) {
            return false;
        }
    }
    set->ready_s = stage->ready_s;
    set->place = (enum option_place)stage->places[set->order];
    samples_add(&set->resident,
                (double)round.after.pool_bytes / (double)(round.after.pages * serve_frame_bytes(&serve->job)));
    return serve_set_add(set, &round);
}

static bool run_bases(struct serve *serve)
{
    for (enum serve_base base = SERVE_ZMQ; base < SERVE_BASES; base++) {
        double us[BASE_REPEATS];
        if (!serve_bases_measure(serve->bases, base, us, BASE_REPEATS)) {
            return false;
        }
        serve_base_add(&serve->base_sets[base], us, BASE_REPEATS);
    }
    return true;
}

static struct stage *stage_of(struct serve *serve, uint32_t set)
{
    return &serve->stages[is_capped(serve) ? set : 0];
}

// A round that is not counted warms the pools up, then each round goes through all sets, none always the first.
static bool run_rounds(struct serve *serve)
{
    (void)fprintf(stderr, "icecache-bench: serve: %s: everything is clustered, %u rounds\n", serve->data,
                  serve->options->rounds);
    for (uint32_t s = 0; s < serve->stage_count; s++) {
        struct serve_round round = {0};
        for (uint32_t place = 0; place < serve->job.place_count; place++) {
            if (!run_workers(serve, &serve->stages[s], serve->workers_max, place, &round)) {
                return false;
            }
        }
    }
    for (uint32_t round = 0; round < serve->options->rounds; round++) {
        for (uint32_t i = 0; i < serve->set_count; i++) {
            const uint32_t set = (i + round) % serve->set_count;
            if (!run_set(serve, stage_of(serve, set), &serve->sets[set])) {
                return false;
            }
        }
        if (!run_bases(serve)) {
            return false;
        }
    }
    return true;
}

// ---- rows and ratios ----

static void set_ratio(json_t *ratios, const char *key, double value)
{
    (void)json_object_set_new(ratios, key, isfinite(value) ? json_real(value) : json_null());
}

// What a retrieve takes beside search, fetch and copy, over a message there and back.
static double overhead(const struct serve *serve, const struct serve_set *set, enum serve_base base)
{
    struct samples beside = {0};
    for (uint32_t i = 0; i < set->wire.count; i++) {
        samples_add(&beside, set->wire.values[i] + set->queue.values[i]);
    }
    return serve_median_ratio(&beside, &serve->base_sets[base].p50);
}

static void add_cap_ratios(const struct serve *serve, json_t *ratios)
{
    for (uint32_t i = 1; i < serve->set_count; i++) {
        const struct serve_set *set = &serve->sets[i];
        char key[32];
        json_t *of = json_object();
        set_ratio(of, "retrieve_over_resident", serve_median_ratio(&set->p50, &serve->sets[0].p50));
        if (set->device_p50.count > 0) {
            set_ratio(of, "retrieve_over_device", samples_median(&set->over_device));
            set_ratio(of, "retrieve_over_device_mean", samples_median(&set->mean_over_device));
        }
        (void)snprintf(key, sizeof key, "ram_cap=%g", set->ram_cap);
        (void)json_object_set_new(ratios, key, of);
    }
}

// The first number of workers in a place, alone.
static const struct serve_set *first_set(const struct serve *serve, uint32_t order)
{
    return &serve->sets[is_capped(serve) ? 0 : 2 * order];
}

static void add_worker_ratios(const struct serve *serve, uint32_t order, json_t *ratios)
{
    double one = NAN, sixteen = NAN;
    for (uint32_t i = 0; i < serve->set_count; i++) {
        const struct serve_set *set = &serve->sets[i];
        if (!set->builds && set->order == order) {
            one = set->workers == 1 ? samples_median(&set->per_s) : one;
            sixteen = set->workers == 16 ? samples_median(&set->per_s) : sixteen;
        }
    }
    const struct serve_set *alone = first_set(serve, order);
    set_ratio(ratios, "p99_building_over_unloaded", serve_median_ratio(&alone[1].p99, &alone->p99));
    if (isfinite(sixteen / one)) {
        set_ratio(ratios, "scaling_16", sixteen / one);
    }
    for (uint32_t other = 0; other < serve->job.place_count; other++) {
        const struct serve_set *host = first_set(serve, other);
        if (host->place == PLACE_HOST && alone->place != PLACE_HOST) {
            set_ratio(ratios, "retrieve_over_host", serve_median_ratio(&alone->p50, &host->p50));
        }
    }
}

static void report_place(const struct serve *serve, uint32_t order, json_t *ratios)
{
    char key[256];
    json_t *of = json_object();
    const uint32_t transport = serve->job.transport;
    const enum option_place place = first_set(serve, order)->place;
    set_ratio(of, "overhead_over_raw_zmq", overhead(serve, first_set(serve, order), SERVE_ZMQ));
    set_ratio(of, "overhead_over_ring", overhead(serve, first_set(serve, order), SERVE_RING));
    if (is_capped(serve)) {
        add_cap_ratios(serve, of);
    } else {
        add_worker_ratios(serve, order, of);
    }
    (void)snprintf(key, sizeof key, "data=%s,tokens=%u,budget=%u%s%s%s%s", serve->data, serve->job.tokens,
                   serve->job.budget, place != PLACE_HOST ? ",place=" : "",
                   place != PLACE_HOST ? option_place_names[place] : "",
                   transport != TRANSPORT_AUTO ? ",transport=" : "",
                   transport != TRANSPORT_AUTO ? option_transport_names[transport] : "");
    (void)json_object_set_new(ratios, key, of);
}

static void report(const struct serve *serve, json_t *rows, json_t *ratios)
{
    for (uint32_t i = 0; i < serve->set_count; i++) {
        (void)json_array_append_new(rows, serve_set_row(&serve->sets[i]));
    }
    for (enum serve_base base = SERVE_ZMQ; base < SERVE_BASES; base++) {
        (void)json_array_append_new(
            rows, serve_base_row(base, &serve->base_sets[base], serve_bases_bytes(serve->bases, base)));
    }
    for (uint32_t order = 0; order < serve->job.place_count; order++) {
        report_place(serve, order, ratios);
    }
}

// ---- the command ----

static void plan_sets(struct serve *serve)
{
    const struct options *options = serve->options;
    const uint32_t places = serve->job.place_count;
    const uint32_t count = is_capped(serve) ? options->ram_caps.count : 2 * places * options->workers.count;
    for (uint32_t i = 0; i < count; i++) {
        struct serve_set *set = &serve->sets[serve->set_count++];
        *set = (struct serve_set){.tokens = serve->job.tokens, .workers = serve->workers_max};
        (void)snprintf(set->data, sizeof set->data, "%s", serve->data);
        if (is_capped(serve)) {
            set->ram_cap = options->ram_caps.values[i];
        } else {
            set->workers = options->workers.values[i / 2 / places];
            set->order = i / 2 % places;
            set->builds = i % 2 == 1;
        }
    }
    for (enum serve_base base = SERVE_ZMQ; base < SERVE_BASES; base++) {
        (void)snprintf(serve->base_sets[base].data, sizeof serve->base_sets[base].data, "%s", serve->data);
    }
}

// Steps that one worker may be asked for.
static uint32_t steps_of(const struct options *options)
{
    const uint32_t places = options->places.count;
    const uint32_t sets = options->ram_caps.count > 0 ? 1 : 2 * places * options->workers.count;
    return options->steps * (places + sets * options->rounds);
}

static bool open_stages(struct serve *serve)
{
    const struct options *options = serve->options;
    struct serve_stats stats;
    if (!is_capped(serve)) {
        return stage_open(serve, &serve->stages[0], 0);
    }
    // The first one's share is 1: what all pages take is known then.
    if (!stage_open(serve, &serve->stages[0], options->ram_caps.values[0]) ||
        !serve_daemon_stats(&serve->stages[0].daemon, &stats)) {
        return false;
    }
    if (!stats.direct) {
        (void)fputs(
            "icecache-bench: serve: this file system has no direct transfers; memory is measured, choose another "
            "by --dir\n",
            stderr);
    }
    serve->all_bytes = stats.pages * serve_frame_bytes(&serve->job);
    for (uint32_t i = 1; i < options->ram_caps.count; i++) {
        if (!stage_open(serve, &serve->stages[i], options->ram_caps.values[i])) {
            return false;
        }
    }
    serve->device = serve_device_create(serve->disk, serve->all_bytes, serve_frame_bytes(&serve->job), options->seed);
    return serve->device != NULL;
}

static int run_all(struct serve *serve, json_t *rows, json_t *ratios)
{
    plan_sets(serve);
    serve->records =
        calloc((size_t)serve->workers_max * serve->options->steps * serve->job.layers, sizeof *serve->records);
    serve->bases = serve->records != NULL ? serve_bases_create(&serve->job, serve->work) : NULL;
    if (serve->bases == NULL || !open_stages(serve)) {
        return EXIT_MISSING;
    }
    if (!run_rounds(serve)) {
        return EXIT_CHECK;
    }
    report(serve, rows, ratios);
    uint64_t wrong = 0;
    for (uint32_t i = 0; i < serve->set_count; i++) {
        wrong += serve->sets[i].wrong_rows;
    }
    if (wrong > 0) {
        (void)fprintf(stderr, "icecache-bench: serve: %llu rows of landings are not what was appended\n",
                      (unsigned long long)wrong);
    }
    return wrong > 0 ? EXIT_CHECK : 0;
}

static bool make_folder(const char *under, char *out)
{
    const int length = snprintf(out, SERVE_PATH_ROOM, "%s/icecache-serve-XXXXXX", under);
    if (length < (int)SERVE_PATH_ROOM && mkdtemp(out) != NULL) {
        return true;
    }
    (void)fprintf(stderr, "icecache-bench: serve: no folder can be made in %s: %s\n", under, strerror(errno));
    out[0] = '\0';
    return false;
}

// One source of data: everything is started for it, and ended.
static int run_data(const struct options *options, const struct serve_job *job, const char *name, json_t *rows,
                    json_t *ratios)
{
    const char *under = options->folder != NULL ? options->folder : getenv("TMPDIR") ? getenv("TMPDIR") : "/tmp";
    struct serve *serve = calloc(1, sizeof *serve);
    int code = EXIT_MISSING;
    if (serve == NULL) {
        return code;
    }
    serve->options = options;
    serve->job = *job;
    serve->job.place_count = options->places.count;
    serve->job.transport = options->transport;
    memcpy(serve->job.places, options->places.values, options->places.count * sizeof *serve->job.places);
    (void)snprintf(serve->data, sizeof serve->data, "%s", name);
    for (uint32_t i = 0; i < options->workers.count; i++) {
        const uint32_t workers = options->workers.values[i];
        serve->workers_max = workers > serve->workers_max ? workers : serve->workers_max;
    }
    // Sockets lie under /tmp, because their paths must be short.
    if (make_folder("/tmp", serve->work) && make_folder(under, serve->disk)) {
        code = run_all(serve, rows, ratios);
    }
    for (uint32_t s = 0; s < serve->stage_count; s++) {
        if (!stage_close(&serve->stages[s]) && code == 0) {
            code = EXIT_CHECK;
        }
    }
    serve_device_destroy(serve->device);
    serve_bases_destroy(serve->bases);
    folder_remove(serve->work);
    folder_remove(serve->disk);
    free(serve->records);
    free(serve);
    return code;
}

static int run_trace(const struct options *options, const char *folder, json_t *rows, json_t *ratios)
{
    struct serve_job job = {.steps = steps_of(options),
                            .budget = options->budgets.values[0],
                            .sinks = options->sinks,
                            .window = options->window,
                            .seed = options->seed};
    struct trace trace;
    char error[512], name[128];
    if (strlen(folder) >= sizeof job.trace || !trace_open(folder, &trace, error, sizeof error)) {
        (void)fprintf(stderr, "icecache-bench: serve: %s\n", strlen(folder) >= sizeof job.trace ? folder : error);
        return EXIT_MISSING;
    }
    (void)snprintf(job.trace, sizeof job.trace, "%s", folder);
    (void)snprintf(name, sizeof name, "%s", trace.name);
    job.layers = trace.layers;
    job.kv_heads = trace.kv_heads;
    job.query_heads = trace.query_heads;
    job.head_dim = trace.head_dim;
    job.dtype = trace.dtype;
    const bool fits = job.steps <= trace.steps;
    job.tokens = (uint32_t)trace.first_query + trace.steps - (fits ? job.steps : 0);
    const uint32_t steps = trace.steps;
    trace_close(&trace);
    if (!fits) {
        (void)fprintf(stderr, "icecache-bench: serve: %s has %u steps, %u are needed: fewer --steps or --rounds\n",
                      folder, steps, job.steps);
        return EXIT_USAGE;
    }
    return run_data(options, &job, name, rows, ratios);
}

int command_serve(const struct options *options, json_t *rows, json_t *ratios)
{
    const struct options_shape *shape = options_shape(options);
    const struct serve_job job = {
        .layers = shape->layers,
        .kv_heads = shape->kv_heads,
        .query_heads = shape->kv_heads * shape->query_heads,
        .head_dim = shape->head_dim,
        .dtype = ICE_FP16,
        .tokens = options->tokens.values[0],
        .steps = steps_of(options),
        .budget = options->budgets.values[0],
        .sinks = options->sinks,
        .window = options->window,
        .seed = options->seed,
    };
    (void)signal(SIGPIPE, SIG_IGN);
    if (options->trace_count == 0) {
        return run_data(options, &job, "attention", rows, ratios);
    }
    int code = 0;
    for (uint32_t i = 0; i < options->trace_count && code == 0; i++) {
        code = run_trace(options, options->traces[i], rows, ratios);
    }
    return code;
}

int serve_role(int argc, char **argv)
{
    const char *role = argc > 2 ? argv[2] : "", *argument = argc > 3 ? argv[3] : "";
    return strcmp(role, "worker") == 0 ? serve_worker()
           : strcmp(role, "echo") == 0 ? serve_echo(argument)
           : strcmp(role, "ring") == 0 ? serve_ring(argument)
                                       : EXIT_USAGE;
}
