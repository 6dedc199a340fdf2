// What a sequence costs the daemon while nobody asks it anything: many are opened, then a few tokens are appended to
// each. What they cost beyond pages and index is what the daemon's own memory has grown by, less what its statistics
// say that pages and index have grown by. (The pool is taken at start and shared memory is not the daemon's own, so
// neither counts; what its allocator has freed and keeps does.)
#include "serve_parts.h"

#include "client/icecache.h"
#include "commands.h"
#include "serve.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define LAYERS         32u
#define KV_HEADS       8u // 256 lanes
#define HEAD_DIM       16u
#define TOKENS         16u
#define ROW_BYTES      (HEAD_DIM * 2u)
#define DEADLINE_US    (60ull * 1000000u)
#define PAGE_BYTES     (16u * 2u * ROW_BYTES) // of 16 tokens, the daemon's default
#define INDEX_BYTES    65536u                 // of a lane, at most
#define SEQUENCE_BYTES (4u << 20)             // about what one takes
#define MEMORY_SHARE   4u                     // of what is free, at most
#define SPARE_BYTES    (64ull << 20)

struct idle_job {
    char sockets[SERVE_PATH_ROOM];
    uint32_t sequences;
};
// After each order (a byte): opening, then appending.
struct idle_answer {
    double p50_us, p99_us;
};

// ---- the child ----

static bool failed(const char *what, ice_status status)
{
    (void)fprintf(stderr, "icecache-bench: serve: idle: %s: %s: %s\n", what, ice_status_name(status), ice_last_error());
    return false;
}

static bool open_one(ice_client *client, ice_sequence **out)
{
    const struct ice_sequence_options options = {.name_space = "bench",
                                                 .model_digest = "idle",
                                                 .model_digest_bytes = 4,
                                                 .layers = LAYERS,
                                                 .kv_heads = KV_HEADS,
                                                 .query_heads = KV_HEADS,
                                                 .head_dim = HEAD_DIM,
                                                 .dtype = ICE_FP16};
    const ice_status status = ice_sequence_open(client, &options, DEADLINE_US, out);
    return status == ICE_OK || failed("open", status);
}

static bool append_one(ice_sequence *sequence)
{
    static const uint8_t rows[LAYERS * KV_HEADS * TOKENS * ROW_BYTES]; // zeros are numbers, too
    const struct ice_kv_source source = {.keys = rows,
                                         .values = rows,
                                         .keys_bytes = sizeof rows,
                                         .values_bytes = sizeof rows,
                                         .layer_stride = KV_HEADS * TOKENS * ROW_BYTES,
                                         .head_stride = TOKENS * ROW_BYTES,
                                         .token_stride = ROW_BYTES};
    const ice_status status = ice_append(sequence, ICE_ALL_LAYERS, 0, TOKENS, &source, DEADLINE_US, NULL);
    return status == ICE_OK || failed("append", status);
}

static bool run_orders(ice_client *client, ice_sequence **sequences, double *us, uint32_t count)
{
    char order;
    for (uint32_t round = 0; round < 2; round++) {
        if (!parent_read(&order, 1)) {
            return false;
        }
        for (uint32_t i = 0; i < count; i++) {
            const uint64_t begun_ns = measure_ns();
            if (!(round == 0 ? open_one(client, &sequences[i]) : append_one(sequences[i]))) {
                return false;
            }
            us[i] = (double)(measure_ns() - begun_ns) / 1000;
        }
        const struct idle_answer answer = {quantile(us, count, 0.5), quantile(us, count, 0.99)};
        if (!parent_write(&answer, sizeof answer)) {
            return false;
        }
    }
    return true;
}

int serve_idle_worker(void)
{
    struct idle_job job;
    const char ready = 1;
    char end;
    if (!parent_read(&job, sizeof job)) {
        return 1;
    }
    const struct ice_client_options options = {.socket_directory = job.sockets, .name = "bench-idle"};
    ice_client *client = NULL;
    ice_sequence **sequences = calloc(job.sequences, sizeof(ice_sequence *));
    double *us = calloc(job.sequences, sizeof *us);
    bool good = sequences != NULL && us != NULL;
    const ice_status status = good ? ice_client_connect(&options, &client) : ICE_NO_MEMORY;
    good = status == ICE_OK || failed("connect", status);
    good = good && parent_write(&ready, 1) && run_orders(client, sequences, us, job.sequences);
    if (good) {
        (void)parent_read(&end, 1); // until the input ends: the sequences are there as long as they are measured
    }
    ice_client_close(client);
    free(sequences);
    free(us);
    return good ? 0 : 1;
}

// ---- the parent ----

struct idle_run {
    const struct options *options;
    uint32_t sequences; // as many as were asked for, fewer where that is the default and memory is short
    char work[SERVE_PATH_ROOM], disk[SERVE_PATH_ROOM];
    struct serve_daemon daemon;
    struct process worker;
};

struct memory { // of the daemon
    double own, index, pages;
};

// Anonymous memory of a process; false where the kernel does not say.
static bool own_bytes(pid_t pid, double *out)
{
    char path[64], line[256];
    unsigned long long kib = 0;
    (void)snprintf(path, sizeof path, "/proc/%d/smaps_rollup", (int)pid);
    FILE *file = fopen(path, "re");
    bool found = false;
    while (file != NULL && !found && fgets(line, sizeof line, file) != NULL) {
        found = sscanf(line, "Anonymous: %llu kB", &kib) == 1;
    }
    if (file != NULL) {
        (void)fclose(file);
    }
    *out = 1024 * (double)kib;
    return found;
}

static bool look(struct idle_run *run, struct memory *out)
{
    struct serve_stats stats;
    serve_daemon_settle(&run->daemon);
    if (!serve_daemon_stats(&run->daemon, &stats) || !own_bytes(run->daemon.process.pid, &out->own)) {
        (void)fputs("icecache-bench: serve: idle: the daemon's memory is unknown\n", stderr);
        return false;
    }
    out->index = (double)stats.index_bytes;
    out->pages = (double)stats.all_pool_bytes;
    return true;
}

static json_t *row_of(const struct idle_run *run, const struct memory *from, const struct memory *to,
                      const struct idle_answer *answer, uint32_t tokens)
{
    const double count = run->sequences, own = (to->own - from->own) / count, index = (to->index - from->index) / count,
                 pages = (to->pages - from->pages) / count;
    return json_pack("{s:s, s:I, s:I, s:I, s:s, s:s, s:f, s:f, s:f, s:f, s:{s:f, s:f}}", "method", "idle", "sequences",
                     (json_int_t)run->sequences, "lanes", (json_int_t)LAYERS * KV_HEADS, "tokens", (json_int_t)tokens,
                     "class", "admin", "memory_of", "Anonymous of /proc/PID/smaps_rollup", "own_bytes_each", own,
                     "index_bytes_each", index, "page_bytes_each", pages, "beyond_bytes_each", own - index,
                     tokens == 0 ? "open_us" : "append_us", "p50", answer->p50_us, "p99", answer->p99_us);
}

static bool start(struct idle_run *run)
{
    const uint64_t lanes = (uint64_t)LAYERS * KV_HEADS * run->sequences;
    const struct serve_room room = {.pool_bytes = 2 * lanes * PAGE_BYTES + SPARE_BYTES,
                                    .index_bytes = lanes * INDEX_BYTES + SPARE_BYTES,
                                    .shared_bytes = 8 * SPARE_BYTES,
                                    .sequences = run->sequences + 1,
                                    .sessions = 2};
    struct idle_job job = {.sequences = run->sequences};
    char ready;
    if (!serve_daemon_start(&run->daemon, run->options->daemon, run->work, run->disk, 1, &room)) {
        return false;
    }
    (void)snprintf(job.sockets, sizeof job.sockets, "%s", run->daemon.sockets);
    return process_start_role(&run->worker, "idle", NULL) && process_write(&run->worker, &job, sizeof job) &&
           process_read(&run->worker, &ready, 1);
}

static bool measure(struct idle_run *run, json_t *rows, json_t *ratios)
{
    const char order = 1;
    struct memory before, after;
    struct idle_answer answer;
    json_t *of = json_object();
    bool good = look(run, &before);
    for (uint32_t tokens = 0; good && tokens <= TOKENS; tokens += TOKENS) {
        good = process_write(&run->worker, &order, 1) && process_read(&run->worker, &answer, sizeof answer) &&
               look(run, &after);
        if (good) {
            json_t *row = row_of(run, &before, &after, &answer, tokens);
            (void)json_object_set(of, tokens == 0 ? "beyond_bytes_empty" : "beyond_bytes_each",
                                  json_object_get(row, "beyond_bytes_each"));
            (void)json_array_append_new(rows, row);
        }
    }
    char key[48];
    (void)snprintf(key, sizeof key, "idle=%u", run->sequences);
    (void)json_object_set_new(ratios, key, of);
    return good;
}

int serve_idle_run(const struct options *options, json_t *rows, json_t *ratios)
{
    struct idle_run run = {.options = options, .sequences = options->idle};
    int code = EXIT_MISSING;
    while (!options->idle_given && run.sequences > 1 &&
           run.sequences * (uint64_t)SEQUENCE_BYTES > measure_free_bytes() / MEMORY_SHARE) {
        run.sequences /= 2;
    }
    (void)fprintf(stderr, "icecache-bench: serve: idle: %u sequences of %u lanes\n", run.sequences, LAYERS * KV_HEADS);
    if (serve_folders_make(options, run.work, run.disk) && start(&run)) {
        code = measure(&run, rows, ratios) ? 0 : EXIT_CHECK;
    }
    const bool started = run.worker.pid > 0, ended = started && process_end(&run.worker, 0);
    const bool stopped = serve_daemon_stop(&run.daemon);
    code = code == 0 && (!ended || !stopped) ? EXIT_CHECK : code;
    folder_remove(run.work);
    folder_remove(run.disk);
    return code;
}
