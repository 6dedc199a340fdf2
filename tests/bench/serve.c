// The `serve` command: end-to-end latency and throughput of retrieves, with a real daemon and real workers, beside what
// the messages and the copies cost without it.
//
// A stage is a daemon with its workers. Without --ram-cap there is one, whose pool holds everything; with it there is
// one for each share, all alive at the same time, and rounds go from one to the next. Processes that have no order wait
// and take no time from the others.
#include "serve.h"
#include "commands.h"
#include "serve_mix.h"
#include "serve_parts.h"
#include "serve_rows.h"

#include "trace.h"

#include <errno.h>
#include <math.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#define STAGES_MAX       (OPTIONS_LIST_MAX + 1u)
#define SETS_MAX         (2u * PLACES * OPTIONS_LIST_MAX + 1u)
#define BASE_REPEATS     1000u
#define BASE_SAMPLES_MAX (64u * BASE_REPEATS)
#define DEVICE_TRIES     64u
#define BEGIN_AHEAD_NS   2000000u     // workers are told when to begin so long before
#define POOL_STEP        (2ull << 20) // the least pool, and its unit
#define PAGES_LEAST      0.5          // read by a retrieve, on average: below it the device is not compared with
#define SHARED_SPARE     (64ull << 20)
#define INDEX_BYTES      512u // of a key, at most
// By the clock: steps that have data of their own, what a worker is taken to do in a second at most, and how many
// measurements a sequence lasts before a new one takes its place.
#define STEPS_DRAWN     256u
#define RETRIEVES_PER_S 16000u
#define ORDERS_LAST     2u
// A builder's sequence, of one layer.
#define BUILD_TOKENS       131072u
#define BUILD_TOKENS_LEAST 512u
#define BUILD_MEMORY_SHARE 8u // of what is free, at most

struct stage {
    struct serve_daemon daemon;
    struct process workers[SERVE_WORKERS_MAX], builder;
    uint32_t worker_count;
    double cap;              // 0: none
    uint32_t hint;           // enum option_hint
    uint32_t places[PLACES]; // of the workers' landings, as they are
    double ready_s;          // from the first append until no clustering was due, the slowest worker's
};

struct serve {
    const struct options *options;
    struct serve_job job, build_job;
    uint32_t order_steps; // of one order, at most
    uint64_t order_ns;    // 0: all of them, however long that takes
    char data[128];
    char work[SERVE_PATH_ROOM], disk[SERVE_PATH_ROOM]; // folders
    uint32_t workers_max;
    struct stage stages[STAGES_MAX];
    uint32_t stage_count;
    uint64_t all_bytes; // of the pool, where every page is in memory
    struct serve_bases *bases;
    struct serve_device *device;                           // NULL: not asked for
    struct serve_set base_sets[SERVE_BASES], zmq_building; // the last: beside a worker that builds
    struct serve_set sets[SETS_MAX];
    uint32_t set_count;
    struct serve_set zmq_working;   // the far side computes before it answers,
    uint32_t working_us;            // so long
    struct samples zmq_beside_work; // p50 less that
    double base_us[BASE_SAMPLES_MAX];
    struct serve_answer answers[SERVE_WORKERS_MAX];
    struct serve_record *records;
};

static bool is_capped(const struct serve *serve)
{
    return serve->options->ram_caps.count > 0;
}

// ---- stages ----

static uint64_t keys_of(const struct serve_job *job)
{
    return (uint64_t)job->layers * job->kv_heads * (job->tokens + job->step_room);
}

static struct serve_room room_of(const struct serve *serve, double cap)
{
    const struct serve_job *job = &serve->job, *build = &serve->build_job;
    const uint32_t sequences = serve->workers_max;
    const bool builds = !is_capped(serve);
    const uint64_t bytes = serve_bytes(job) * sequences + (builds ? serve_bytes(build) : 0);
    const uint64_t keys = keys_of(job) * sequences + (builds ? keys_of(build) : 0);
    const uint64_t landing = (uint64_t)job->layers * job->kv_heads * serve_slots(job) * 3 * serve_row_bytes(job);
    const uint64_t pool = cap > 0 && cap < 1 ? (uint64_t)(cap * (double)serve->all_bytes) : 2 * bytes + (16u << 20);
    return (struct serve_room){
        .pool_bytes = pool < POOL_STEP ? POOL_STEP : (pool + POOL_STEP / 2) / POOL_STEP * POOL_STEP,
        .index_bytes = keys * INDEX_BYTES + (64u << 20),
        .shared_bytes = (sequences + 2) * (landing * job->place_count + SHARED_SPARE),
        .spill_bytes = is_capped(serve) ? 4 * bytes + (64u << 20) : 0,
        .sessions = sequences + 2,
    };
}

static bool start_worker(const struct serve_job *of, const struct stage *stage, struct process *process,
                         uint32_t number)
{
    struct serve_job job = *of;
    job.seed += number;
    job.hint = stage->hint;
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

static bool stage_open(struct serve *serve, struct stage *stage, double cap, uint32_t hint)
{
    const bool builds = !is_capped(serve);
    const struct serve_room room = room_of(serve, cap);
    *stage = (struct stage){.cap = cap, .hint = hint};
    serve->stage_count++;
    (void)fprintf(stderr, "icecache-bench: serve: %s: a daemon with a pool of %llu MiB\n", serve->data,
                  (unsigned long long)room.pool_bytes >> 20);
    bool good =
        serve_daemon_start(&stage->daemon, serve->options->daemon, serve->work, serve->disk, serve->stage_count, &room);
    for (uint32_t w = 0; good && w < serve->workers_max; w++) {
        good = start_worker(&serve->job, stage, &stage->workers[w], w);
        stage->worker_count += good;
    }
    good = good && (!builds || start_worker(&serve->build_job, stage, &stage->builder, serve->workers_max));
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

// Tells the first `count` workers what to do, and lets them begin together when all are ready.
static bool begin_workers(const struct serve *serve, struct stage *stage, uint32_t count, uint32_t place)
{
    const struct serve_order order = {.steps = serve->order_steps, .place = place};
    struct serve_go go = {0};
    char ready;
    bool good = true;
    for (uint32_t w = 0; good && w < count; w++) {
        good = process_write(&stage->workers[w], &order, sizeof order);
    }
    for (uint32_t w = 0; good && w < count; w++) {
        good = process_read(&stage->workers[w], &ready, sizeof ready);
    }
    go.begin_ns = measure_ns() + BEGIN_AHEAD_NS;
    go.end_ns = serve->order_ns > 0 ? go.begin_ns + serve->order_ns : 0;
    for (uint32_t w = 0; good && w < count; w++) {
        good = process_write(&stage->workers[w], &go, sizeof go);
    }
    return good;
}

// What they answer goes to serve->answers and serve->records.
static bool run_workers(struct serve *serve, struct stage *stage, uint32_t count, uint32_t place,
                        struct serve_round *out)
{
    const uint32_t most = serve->order_steps * serve->job.layers;
    bool good = serve_daemon_stats(&stage->daemon, &out->before) && begin_workers(serve, stage, count, place);
    out->record_count = 0;
    for (uint32_t w = 0; good && w < count; w++) {
        struct serve_answer *answer = &serve->answers[w];
        good = process_read(&stage->workers[w], answer, sizeof *answer) && answer->record_count <= most &&
               process_read(&stage->workers[w], serve->records + out->record_count,
                            answer->record_count * sizeof *serve->records);
        out->record_count += good ? answer->record_count : 0;
    }
    out->answers = serve->answers;
    out->records = serve->records;
    out->workers = count;
    return good && serve_daemon_stats(&stage->daemon, &out->after);
}

static bool tell_builder(struct stage *stage, struct serve_answer *answer)
{
    const struct serve_order order = {0};
    return process_write(&stage->builder, &order, sizeof order) &&
           process_read(&stage->builder, answer, sizeof *answer);
}

// A set beside a worker that builds: from when all of a sequence is appended until the workers have ended.
static bool run_building(struct serve *serve, struct stage *stage, const struct serve_set *set, struct serve_round *out)
{
    struct serve_answer answer;
    if (!tell_builder(stage, &answer) || !run_workers(serve, stage, set->workers, set->order, out) ||
        !tell_builder(stage, &answer)) {
        return false;
    }
    out->builds = answer.builds;
    out->build_s = answer.build_s;
    return true;
}

static bool run_set(struct serve *serve, struct stage *stage, struct serve_set *set)
{
    struct serve_round round = {0};
    double device_us[DEVICE_TRIES];
    serve_daemon_settle(&stage->daemon);
    if (!(set->building ? run_building(serve, stage, set, &round)
                        : run_workers(serve, stage, set->workers, set->order, &round))) {
        return false;
    }
    // With hints it reads more than what it waits for.
    if (serve->device != NULL && set->hint == HINT_NONE && serve_pages_read(&round) >= PAGES_LEAST) {
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

// BASE_REPEATS times; ZeroMQ for as long as the workers are measured, because what else the machine does comes in
// bursts.
static bool run_base(struct serve *serve, enum serve_base base, struct serve_set *set)
{
    const uint64_t until_ns = base == SERVE_ZMQ ? measure_ns() + serve->order_ns : 0;
    uint32_t count = 0;
    do {
        if (!serve_bases_measure(serve->bases, base, serve->base_us + count, BASE_REPEATS)) {
            return false;
        }
        count += BASE_REPEATS;
    } while (count + BASE_REPEATS <= BASE_SAMPLES_MAX && measure_ns() < until_ns);
    serve_base_add(set, serve->base_us, count);
    return true;
}

// The far side computes as long before it answers as the daemon searches and copies for a retrieve: threads fall asleep
// meanwhile, and what it takes to wake them is in both.
static bool run_working(struct serve *serve)
{
    const struct serve_set *set = &serve->sets[0];
    serve->working_us = (uint32_t)(samples_median(&set->search) + samples_median(&set->copy));
    serve_bases_work(serve->bases, serve->working_us);
    const bool good = run_base(serve, SERVE_ZMQ, &serve->zmq_working);
    serve_bases_work(serve->bases, 0);
    if (good) {
        samples_add(&serve->zmq_beside_work,
                    serve->zmq_working.p50.values[serve->zmq_working.p50.count - 1] - serve->working_us);
    }
    return good;
}

static bool run_bases(struct serve *serve)
{
    struct stage *stage = &serve->stages[0];
    struct serve_answer answer;
    serve_daemon_settle(&stage->daemon);
    for (enum serve_base base = SERVE_ZMQ; base < SERVE_BASES; base++) {
        if (!run_base(serve, base, &serve->base_sets[base])) {
            return false;
        }
    }
    if (!run_working(serve)) {
        return false;
    }
    return is_capped(serve) || (tell_builder(stage, &answer) && run_base(serve, SERVE_ZMQ, &serve->zmq_building) &&
                                tell_builder(stage, &answer));
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
static double overhead(const struct serve_set *set, const struct samples *raw)
{
    struct samples beside = {0};
    for (uint32_t i = 0; i < set->wire.count; i++) {
        samples_add(&beside, set->wire.values[i] + set->queue.values[i]);
    }
    return serve_median_ratio(&beside, raw);
}

// The set of the same share without hints; NULL: none.
static const struct serve_set *without_hints(const struct serve *serve, const struct serve_set *set)
{
    for (uint32_t i = 1; i < serve->set_count && set->hint != HINT_NONE; i++) {
        if (serve->sets[i].hint == HINT_NONE && serve->sets[i].ram_cap == set->ram_cap) {
            return &serve->sets[i];
        }
    }
    return NULL;
}

static void add_cap_ratios(const struct serve *serve, json_t *ratios)
{
    for (uint32_t i = 1; i < serve->set_count; i++) {
        const struct serve_set *set = &serve->sets[i], *without = without_hints(serve, set);
        char key[48];
        json_t *of = json_object();
        if (without != NULL) {
            set_ratio(of, "retrieve_over_unhinted", serve_median_ratio(&set->p50, &without->p50));
            set_ratio(of, "mean_over_unhinted", serve_median_ratio(&set->mean, &without->mean));
            set_ratio(of, "fetch_over_unhinted", serve_median_ratio(&set->fetch, &without->fetch));
            set_ratio(of, "daemon_cpu_over_unhinted", serve_median_ratio(&set->cpu_us, &without->cpu_us));
        }
        set_ratio(of, "retrieve_over_resident", serve_median_ratio(&set->p50, &serve->sets[0].p50));
        if (set->device_p50.count > 0) {
            set_ratio(of, "retrieve_over_device", samples_median(&set->over_device));
            set_ratio(of, "retrieve_over_device_mean", samples_median(&set->mean_over_device));
        }
        (void)snprintf(key, sizeof key, "ram_cap=%g%s%s", set->ram_cap, set->hint != HINT_NONE ? ",hint=" : "",
                       set->hint != HINT_NONE ? option_hint_names[set->hint] : "");
        (void)json_object_set_new(ratios, key, of);
    }
}

// The first number of workers in a place, alone.
static const struct serve_set *first_set(const struct serve *serve, uint32_t order)
{
    return &serve->sets[is_capped(serve) ? 0 : 2 * order];
}

static const struct serve_set *set_of(const struct serve *serve, uint32_t workers, uint32_t order)
{
    for (uint32_t i = 0; i < serve->set_count; i++) {
        const struct serve_set *set = &serve->sets[i];
        if (!set->building && set->order == order && set->workers == workers) {
            return set;
        }
    }
    return NULL;
}

// Against the best that fewer workers reach, in each round.
static void add_scaling(const struct serve *serve, uint32_t order, json_t *ratios)
{
    static const uint32_t fewer[] = {1, 2, 4};
    const struct serve_set *sixteen = set_of(serve, 16, order);
    struct samples best = {0};
    for (size_t i = 0; sixteen != NULL && i < sizeof fewer / sizeof *fewer; i++) {
        const struct serve_set *set = set_of(serve, fewer[i], order);
        for (uint32_t round = 0; set != NULL && round < set->per_s.count; round++) {
            if (round == best.count) {
                samples_add(&best, set->per_s.values[round]);
            }
            best.values[round] = fmax(best.values[round], set->per_s.values[round]);
        }
    }
    if (best.count > 0) {
        set_ratio(ratios, "scaling_16", serve_median_ratio(&sixteen->per_s, &best));
        set_ratio(ratios, "slowest_over_mean_16", samples_median(&sixteen->slowest));
    }
}

static void add_worker_ratios(const struct serve *serve, uint32_t order, json_t *ratios)
{
    const struct serve_set *alone = first_set(serve, order), *zmq = &serve->base_sets[SERVE_ZMQ];
    set_ratio(ratios, "p99_building_over_unloaded", serve_median_ratio(&alone[1].p99, &alone->p99));
    set_ratio(ratios, "p99_building_over_raw_zmq", serve_median_ratio(&alone[1].p99, &serve->zmq_building.p99));
    set_ratio(ratios, "raw_zmq_p99_building_over_unloaded", serve_median_ratio(&serve->zmq_building.p99, &zmq->p99));
    add_scaling(serve, order, ratios);
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
    set_ratio(of, "overhead_over_raw_zmq", overhead(first_set(serve, order), &serve->base_sets[SERVE_ZMQ].p50));
    set_ratio(of, "overhead_over_ring", overhead(first_set(serve, order), &serve->base_sets[SERVE_RING].p50));
    set_ratio(of, "overhead_over_raw_zmq_working", overhead(first_set(serve, order), &serve->zmq_beside_work));
    set_ratio(of, "moved_over_turnover", samples_median(&first_set(serve, order)->moved_over_turnover));
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
    json_t *working = serve_base_row(SERVE_ZMQ, &serve->zmq_working, serve_bases_bytes(serve->bases, SERVE_ZMQ));
    (void)json_object_set_new(working, "working_us", json_integer(serve->working_us));
    (void)json_array_append_new(rows, working);
    if (!is_capped(serve)) {
        (void)json_array_append_new(
            rows, serve_base_row(SERVE_ZMQ, &serve->zmq_building, serve_bases_bytes(serve->bases, SERVE_ZMQ)));
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
    const uint32_t hints = options->hints.count;
    const uint32_t count =
        is_capped(serve) ? 1 + (options->ram_caps.count - 1) * hints : 2 * places * options->workers.count;
    for (uint32_t i = 0; i < count; i++) {
        struct serve_set *set = &serve->sets[serve->set_count++];
        *set = (struct serve_set){.tokens = serve->job.tokens, .workers = serve->workers_max};
        (void)snprintf(set->data, sizeof set->data, "%s", serve->data);
        if (is_capped(serve)) {
            // The first one's share is 1, and hints would be of no use.
            set->ram_cap = options->ram_caps.values[i == 0 ? 0 : 1 + (i - 1) / hints];
            set->hint = i == 0 ? HINT_NONE : options->hints.values[(i - 1) % hints];
        } else {
            set->workers = options->workers.values[i / 2 / places];
            set->order = i / 2 % places;
            set->building = i % 2 == 1;
            set->build_tokens = serve->build_job.tokens;
            set->build_lanes = serve->build_job.layers * serve->build_job.kv_heads;
        }
    }
    for (enum serve_base base = SERVE_ZMQ; base < SERVE_BASES; base++) {
        (void)snprintf(serve->base_sets[base].data, sizeof serve->base_sets[base].data, "%s", serve->data);
    }
    serve->zmq_building = serve->base_sets[SERVE_ZMQ];
    serve->zmq_building.building = true;
    serve->zmq_working = serve->base_sets[SERVE_ZMQ];
}

// Steps that one worker may be asked for.
static uint32_t steps_of(const struct options *options)
{
    const uint32_t places = options->places.count;
    const uint32_t sets = options->ram_caps.count > 0 ? 1 : 2 * places * options->workers.count;
    return options->steps * (places + sets * options->rounds);
}

// By count, or by the clock.
static void plan_steps(struct serve *serve)
{
    const struct options *options = serve->options;
    struct serve_job *job = &serve->job;
    if (options->steps > 0) {
        serve->order_steps = options->steps;
        job->step_room = job->steps;
        return;
    }
    const double steps = options->seconds * RETRIEVES_PER_S / job->layers;
    serve->order_ns = (uint64_t)(1e9 * options->seconds);
    serve->order_steps = steps < 1 ? 1 : (uint32_t)steps;
    job->step_room = ORDERS_LAST * serve->order_steps;
}

// One layer of what the workers have, longer: the clustering of one layer's heads is all that the threads can do at
// once on a small machine, and it fits into memory.
static void plan_build(struct serve *serve)
{
    struct serve_job *job = &serve->build_job;
    const uint32_t given = serve->options->build_tokens;
    *job = serve->job;
    job->trace[0] = '\0';
    job->dtype = ICE_FP16;
    job->builds = true;
    job->layers = 1;
    job->steps = job->step_room = 1;
    job->tokens = given > 0 ? given : BUILD_TOKENS;
    while (given == 0 && job->tokens > BUILD_TOKENS_LEAST &&
           serve_bytes(job) > measure_free_bytes() / BUILD_MEMORY_SHARE) {
        job->tokens /= 2;
    }
}

static bool open_stages(struct serve *serve)
{
    const struct options *options = serve->options;
    struct serve_stats stats;
    if (!is_capped(serve)) {
        return stage_open(serve, &serve->stages[0], 0, HINT_NONE);
    }
    // The first one's share is 1: what all pages take is known then.
    if (!stage_open(serve, &serve->stages[0], serve->sets[0].ram_cap, HINT_NONE) ||
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
    for (uint32_t i = 1; i < serve->set_count; i++) {
        if (!stage_open(serve, &serve->stages[i], serve->sets[i].ram_cap, serve->sets[i].hint)) {
            return false;
        }
    }
    serve->device = serve_device_create(serve->disk, serve->all_bytes, serve_frame_bytes(&serve->job), options->seed);
    return serve->device != NULL;
}

static int run_all(struct serve *serve, json_t *rows, json_t *ratios)
{
    plan_steps(serve);
    plan_build(serve);
    plan_sets(serve);
    serve->records =
        calloc((size_t)serve->workers_max * serve->order_steps * serve->job.layers, sizeof *serve->records);
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

bool serve_folders_make(const struct options *options, char *work, char *disk)
{
    const char *under = options->folder != NULL ? options->folder : getenv("TMPDIR") ? getenv("TMPDIR") : "/tmp";
    work[0] = disk[0] = '\0';
    // Sockets lie under /tmp, because their paths must be short.
    return make_folder("/tmp", work) && make_folder(under, disk);
}

// One source of data: everything is started for it, and ended.
static int run_data(const struct options *options, const struct serve_job *job, const char *name, json_t *rows,
                    json_t *ratios)
{
    struct serve *serve = calloc(1, sizeof *serve);
    int code = EXIT_MISSING;
    if (serve == NULL) {
        return code;
    }
    serve->options = options;
    serve->job = *job;
    serve->job.place_count = options->places.count;
    serve->job.transport = options->transport;
    serve->job.think_us = options->think_us;
    memcpy(serve->job.places, options->places.values, options->places.count * sizeof *serve->job.places);
    (void)snprintf(serve->data, sizeof serve->data, "%s", name);
    for (uint32_t i = 0; i < options->workers.count; i++) {
        const uint32_t workers = options->workers.values[i];
        serve->workers_max = workers > serve->workers_max ? workers : serve->workers_max;
    }
    if (serve_folders_make(options, serve->work, serve->disk)) {
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
    const bool by_clock = options->steps == 0;
    struct serve_job job = {.steps = by_clock ? STEPS_DRAWN : steps_of(options),
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
    job.steps = by_clock && job.steps > trace.steps ? trace.steps : job.steps;
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

// By data: retrieves.
static int run_retrieves(const struct options *options, json_t *rows, json_t *ratios)
{
    const struct options_shape *shape = options_shape(options);
    const struct serve_job job = {
        .layers = shape->layers,
        .kv_heads = shape->kv_heads,
        .query_heads = shape->kv_heads * shape->query_heads,
        .head_dim = shape->head_dim,
        .dtype = ICE_FP16,
        .tokens = options->tokens.values[0],
        .steps = options->steps == 0 ? STEPS_DRAWN : steps_of(options),
        .budget = options->budgets.values[0],
        .sinks = options->sinks,
        .window = options->window,
        .seed = options->seed,
    };
    if (options->trace_count == 0) {
        return run_data(options, &job, "attention", rows, ratios);
    }
    int code = 0;
    for (uint32_t i = 0; i < options->trace_count && code == 0; i++) {
        code = run_trace(options, options->traces[i], rows, ratios);
    }
    return code;
}

int command_serve(const struct options *options, json_t *rows, json_t *ratios)
{
    (void)signal(SIGPIPE, SIG_IGN);
    int code = run_retrieves(options, rows, ratios);
    if (code == 0 && options->mix_workers > 0) {
        code = serve_mix_run(options, rows);
    }
    if (code == 0 && options->idle > 0) {
        code = serve_idle_run(options, rows, ratios);
    }
    return code;
}

int serve_role(int argc, char **argv)
{
    const char *role = argc > 2 ? argv[2] : "", *argument = argc > 3 ? argv[3] : "";
    return strcmp(role, "worker") == 0 ? serve_worker()
           : strcmp(role, "mix") == 0  ? serve_mix_worker()
           : strcmp(role, "idle") == 0 ? serve_idle_worker()
           : strcmp(role, "echo") == 0 ? serve_echo(argument)
           : strcmp(role, "ring") == 0 ? serve_ring(argument)
                                       : EXIT_USAGE;
}
