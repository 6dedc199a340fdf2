// What a page costs on its way to a file system and back: the daemon's own disk, by io_uring and by threads, and fio
// with the same pattern, on the same file in turn. As many pages as the depth says are in flight all the time; where
// one ends, the next one, at random, begins.
//
// Thread-safety: a runner belongs to the I/O thread that answers it; the main thread looks at it when all have ended.
#include "spill.h"

#include "commands.h"
#include "measure.h"
#include "random.h"

#include "cached/disk.h"
#include "cached/histogram.h"

#include <errno.h>
#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

#define FILL_BYTES  ((uint32_t)1 << 20)
#define ENGINES     3
#define FIO         2
#define OPS         2
#define FOLDER_ROOM 256

static const char *const engine_names[ENGINES] = {"io_uring", "pread", "fio"};
static const enum disk_engine engine_kinds[FIO] = {DISK_ENGINE_URING, DISK_ENGINE_THREADS};
static const char *const op_names[OPS] = {"read", "write"};

// ---- one measurement ----

struct run {
    struct disk *disk;
    uint32_t pages, page_bytes;
    _Atomic bool is_over;
    _Atomic int error;
    pthread_mutex_t lock;
    pthread_cond_t ended;
    uint32_t running; // guarded by lock
};

// One of the pages in flight.
struct runner {
    struct disk_request request; // first
    struct run *run;
    struct random random;
    struct histogram ns;
};

static void next_page(struct runner *runner)
{
    runner->request.offset = (uint64_t)random_below(&runner->random, runner->run->pages) * runner->run->page_bytes;
    disk_submit(runner->run->disk, &runner->request);
}

static void page_done(struct disk_request *request)
{
    struct runner *runner = (struct runner *)request;
    struct run *run = runner->run;
    histogram_add(&runner->ns, measure_ns() - request->submitted_ns);
    if (request->result != 0) {
        atomic_store(&run->error, request->result);
    } else if (!atomic_load_explicit(&run->is_over, memory_order_relaxed)) {
        next_page(runner);
        return;
    }
    pthread_mutex_lock(&run->lock);
    if (--run->running == 0) {
        pthread_cond_signal(&run->ended);
    }
    pthread_mutex_unlock(&run->lock);
}

static double cpu_us(void)
{
    struct rusage usage;
    (void)getrusage(RUSAGE_SELF, &usage);
    return 1e6 * (double)(usage.ru_utime.tv_sec + usage.ru_stime.tv_sec) +
           (double)(usage.ru_utime.tv_usec + usage.ru_stime.tv_usec);
}

static void sleep_for(double seconds)
{
    struct timespec rest = {.tv_sec = (time_t)seconds, .tv_nsec = (long)(1e9 * fmod(seconds, 1))};
    while (nanosleep(&rest, &rest) != 0 && errno == EINTR) {
    }
}

static void sum_up(const struct runner *runners, uint32_t count, double ns, double us, struct spill_figures *out)
{
    struct histogram all = {0};
    for (uint32_t i = 0; i < count; i++) {
        all.count += runners[i].ns.count;
        all.max = runners[i].ns.max > all.max ? runners[i].ns.max : all.max;
        for (uint32_t b = 0; b < HISTOGRAM_BUCKETS; b++) {
            all.buckets[b] += runners[i].ns.buckets[b];
        }
    }
    *out = (struct spill_figures){
        .pages_per_s = 1e9 * (double)all.count / ns,
        .cpu_us_per_page = us / (double)all.count,
        .p50_us = (double)histogram_quantile(&all, 0.5) / 1000,
        .p99_us = (double)histogram_quantile(&all, 0.99) / 1000,
    };
}

static bool run_pages(struct disk *disk, const struct spill_load *load, struct spill_figures *out)
{
    struct run run = {.disk = disk,
                      .pages = (uint32_t)(load->bytes / load->page_bytes),
                      .page_bytes = load->page_bytes,
                      .lock = PTHREAD_MUTEX_INITIALIZER,
                      .ended = PTHREAD_COND_INITIALIZER,
                      .running = load->depth};
    struct runner *runners = calloc(load->depth, sizeof *runners);
    uint8_t *memory = aligned_alloc(DISK_ALIGN, (size_t)load->depth * load->page_bytes);
    if (runners == NULL || memory == NULL) {
        (void)fputs("icecache-bench: spill: no memory\n", stderr);
        free(memory);
        free(runners);
        return false;
    }
    memset(memory, 0x5a, (size_t)load->depth * load->page_bytes);
    for (uint32_t i = 0; i < load->depth; i++) {
        runners[i].run = &run;
        runners[i].request = (struct disk_request){.op = load->is_write ? DISK_WRITE : DISK_READ,
                                                   .memory = memory + (size_t)i * load->page_bytes,
                                                   .bytes = load->page_bytes,
                                                   .done = page_done};
        random_init(&runners[i].random, load->seed * DISK_DEPTH_MAX + i);
    }
    const double cpu = cpu_us();
    const uint64_t begun = measure_ns();
    for (uint32_t i = 0; i < load->depth; i++) {
        next_page(&runners[i]);
    }
    sleep_for(load->seconds);
    atomic_store(&run.is_over, true);
    pthread_mutex_lock(&run.lock);
    while (run.running > 0) {
        pthread_cond_wait(&run.ended, &run.lock);
    }
    pthread_mutex_unlock(&run.lock);
    sum_up(runners, load->depth, (double)(measure_ns() - begun), cpu_us() - cpu, out);
    if (run.error != 0) {
        (void)fprintf(stderr, "icecache-bench: spill: %s\n", strerror(-run.error));
    }
    free(memory);
    free(runners);
    return run.error == 0;
}

static struct disk *open_disk(struct env *env, const struct spill_load *load, enum disk_engine engine)
{
    char text[256];
    struct disk *disk = NULL;
    const struct disk_params params = {
        .directory = load->folder, .bytes = load->bytes, .engine = engine, .depth = load->depth};
    if (disk_open(env, &params, &disk, text, sizeof text) != 0) {
        (void)fprintf(stderr, "icecache-bench: spill: %s\n", text);
        return NULL;
    }
    return disk;
}

static bool measure(struct env *env, int engine, const struct spill_load *load, struct spill_figures *out)
{
    if (engine == FIO) {
        return spill_fio_run(load, out);
    }
    struct disk *disk = open_disk(env, load, engine_kinds[engine]);
    const bool measured = disk != NULL && run_pages(disk, load, out);
    return disk_close(disk) == 0 && measured;
}

// ---- the file ----

struct fill {
    struct disk_request request; // first
    pthread_mutex_t lock;
    pthread_cond_t ended;
    bool is_done;
};

static void fill_done(struct disk_request *request)
{
    struct fill *fill = (struct fill *)request;
    pthread_mutex_lock(&fill->lock);
    fill->is_done = true;
    pthread_cond_signal(&fill->ended);
    pthread_mutex_unlock(&fill->lock);
}

static int do_one(struct disk *disk, struct disk_request request)
{
    struct fill fill = {.request = request, .lock = PTHREAD_MUTEX_INITIALIZER, .ended = PTHREAD_COND_INITIALIZER};
    fill.request.done = fill_done;
    disk_submit(disk, &fill.request);
    pthread_mutex_lock(&fill.lock);
    while (!fill.is_done) {
        pthread_cond_wait(&fill.ended, &fill.lock);
    }
    pthread_mutex_unlock(&fill.lock);
    return fill.request.result;
}

// Written once, because the first write to a place costs more, and what was never written is read without the device.
static bool write_file(struct env *env, const struct spill_load *load)
{
    struct disk *disk = open_disk(env, load, DISK_ENGINE_AUTO);
    uint8_t *memory = aligned_alloc(DISK_ALIGN, FILL_BYTES);
    bool written = disk != NULL && memory != NULL;
    if (written) {
        struct random random;
        random_init(&random, load->seed);
        for (uint32_t i = 0; i < FILL_BYTES; i += 8) {
            const uint64_t bits = random_bits(&random);
            memcpy(memory + i, &bits, sizeof bits);
        }
    }
    for (uint64_t at = 0; written && at < load->bytes; at += FILL_BYTES) {
        const uint64_t rest = load->bytes - at;
        const int error = do_one(disk, (struct disk_request){.op = DISK_WRITE,
                                                             .offset = at,
                                                             .memory = memory,
                                                             .bytes = rest < FILL_BYTES ? (uint32_t)rest : FILL_BYTES});
        written = error == 0;
    }
    written = written && do_one(disk, (struct disk_request){.op = DISK_SYNC}) == 0;
    if (disk != NULL && !written) {
        (void)fputs("icecache-bench: spill: the file cannot be written\n", stderr);
    }
    free(memory);
    return disk_close(disk) == 0 && written;
}

// ---- rows ----

struct cell { // of one engine, operation and depth
    struct samples pages_per_s, cpu_us, p50_us, p99_us;
};

struct spill {
    struct env env;
    const struct options *options;
    bool has[ENGINES];
    struct cell cells[OPTIONS_LIST_MAX][OPS][ENGINES];
};

static struct cell *cell_of(struct spill *spill, uint32_t depth, int op, int engine)
{
    return &spill->cells[depth][op][engine];
}

static bool measure_round(struct spill *spill, struct spill_load *load, uint32_t round)
{
    for (uint32_t d = 0; d < spill->options->depths.count; d++) {
        for (int op = 0; op < OPS; op++) {
            for (int i = 0; i < ENGINES; i++) {
                const int engine = (i + (int)round) % ENGINES; // none is always the first
                struct spill_figures figures;
                load->depth = spill->options->depths.values[d];
                load->is_write = op == 1;
                load->seed++;
                if (!spill->has[engine]) {
                    continue;
                }
                if (!measure(&spill->env, engine, load, &figures)) {
                    return false;
                }
                struct cell *cell = cell_of(spill, d, op, engine);
                samples_add(&cell->pages_per_s, figures.pages_per_s);
                samples_add(&cell->cpu_us, figures.cpu_us_per_page);
                samples_add(&cell->p50_us, figures.p50_us);
                samples_add(&cell->p99_us, figures.p99_us);
            }
        }
    }
    return true;
}

static void add_row(struct spill *spill, uint32_t d, int op, int engine, json_t *rows)
{
    const struct cell *cell = cell_of(spill, d, op, engine);
    json_t *row = json_pack(
        "{s:s, s:s, s:I, s:I, s:f, s:f, s:f, s:f, s:f, s:f, s:f, s:f}", "engine", engine_names[engine], "op",
        op_names[op], "depth", (json_int_t)spill->options->depths.values[d], "page_bytes",
        (json_int_t)spill->options->page_bytes, "pages_per_s", samples_median(&cell->pages_per_s), "pages_per_s_min",
        samples_min(&cell->pages_per_s), "pages_per_s_max", samples_max(&cell->pages_per_s), "cpu_us_per_page",
        samples_median(&cell->cpu_us), "cpu_us_per_page_min", samples_min(&cell->cpu_us), "cpu_us_per_page_max",
        samples_max(&cell->cpu_us), "p50_us", samples_median(&cell->p50_us), "p99_us", samples_median(&cell->p99_us));
    (void)json_array_append_new(rows, row);
}

// The median of what the rounds give, because the device's pace changes between them.
static double median_ratio(const struct samples *ours, const struct samples *theirs)
{
    struct samples ratios = {0};
    for (uint32_t i = 0; i < ours->count && i < theirs->count; i++) {
        samples_add(&ratios, ours->values[i] / theirs->values[i]);
    }
    return samples_median(&ratios);
}

// At each depth, and the worst of all depths.
static void add_ratios(struct spill *spill, json_t *ratios)
{
    const int ours = spill->has[0] ? 0 : 1;
    double least[OPS] = {INFINITY, INFINITY}, most_cpu = 0;
    for (uint32_t d = 0; d < spill->options->depths.count; d++) {
        char key[32];
        json_t *of = json_object();
        double cpu = 0;
        for (int op = 0; op < OPS; op++) {
            const struct cell *mine = cell_of(spill, d, op, ours), *fio = cell_of(spill, d, op, FIO);
            const double pages = median_ratio(&mine->pages_per_s, &fio->pages_per_s);
            const double us = median_ratio(&mine->cpu_us, &fio->cpu_us);
            (void)snprintf(key, sizeof key, "%s_over_fio", op_names[op]);
            (void)json_object_set_new(of, key, json_real(pages));
            (void)snprintf(key, sizeof key, "%s_cpu_over_fio", op_names[op]);
            (void)json_object_set_new(of, key, json_real(us));
            least[op] = pages < least[op] ? pages : least[op];
            cpu = us > cpu ? us : cpu;
        }
        most_cpu = cpu > most_cpu ? cpu : most_cpu;
        (void)snprintf(key, sizeof key, "depth=%u", spill->options->depths.values[d]);
        (void)json_object_set_new(ratios, key, of);
    }
    (void)json_object_set_new(ratios, "read_over_fio_min", json_real(least[0]));
    (void)json_object_set_new(ratios, "write_over_fio_min", json_real(least[1]));
    (void)json_object_set_new(ratios, "cpu_over_fio_max", json_real(most_cpu));
}

// ---- the command ----

// Which engines there are here. False where not even threads can use the folder.
static bool look_around(struct spill *spill, const struct spill_load *load)
{
    struct disk_usage usage;
    struct disk *disk = open_disk(&spill->env, load, DISK_ENGINE_AUTO);
    if (disk == NULL) {
        return false;
    }
    disk_usage(disk, &usage);
    spill->has[0] = strcmp(usage.engine, "io_uring") == 0;
    spill->has[1] = true;
    if (!spill->has[0]) {
        (void)fprintf(stderr, "icecache-bench: spill: no io_uring: %s\n", usage.because);
    }
    if (!usage.direct) {
        (void)fputs("icecache-bench: spill: this file system has no direct transfers; memory is measured, choose "
                    "another by --dir\n",
                    stderr);
    }
    spill->has[FIO] = spill->has[0] && spill_fio_is_there();
    return disk_close(disk) == 0;
}

static int run_all(struct spill *spill, struct spill_load *load, json_t *rows, json_t *ratios)
{
    load->depth = DISK_DEPTH_DEFAULT;
    if (!look_around(spill, load) || !write_file(&spill->env, load)) {
        return EXIT_MISSING;
    }
    for (uint32_t round = 0; round < spill->options->rounds; round++) {
        if (!measure_round(spill, load, round)) {
            return EXIT_CHECK;
        }
    }
    for (int engine = 0; engine < ENGINES; engine++) {
        for (int op = 0; op < OPS; op++) {
            for (uint32_t d = 0; d < spill->options->depths.count && spill->has[engine]; d++) {
                add_row(spill, d, op, engine, rows);
            }
        }
    }
    if (spill->has[FIO]) {
        add_ratios(spill, ratios);
    }
    return 0;
}

int command_spill(const struct options *options, json_t *rows, json_t *ratios)
{
    char folder[FOLDER_ROOM], path[FOLDER_ROOM + 16];
    const char *under = options->folder != NULL ? options->folder : getenv("TMPDIR") ? getenv("TMPDIR") : ".";
    struct spill *spill = calloc(1, sizeof *spill);
    if (spill == NULL) {
        (void)fputs("icecache-bench: spill: no memory\n", stderr);
        return EXIT_MISSING;
    }
    const int length = snprintf(folder, sizeof folder, "%s/icecache-spill-XXXXXX", under);
    if (length >= (int)sizeof folder || mkdtemp(folder) == NULL) {
        (void)fprintf(stderr, "icecache-bench: spill: no folder can be made in %s: %s\n", under, strerror(errno));
        free(spill);
        return EXIT_MISSING;
    }
    spill->options = options;
    env_linux_init(&spill->env);
    struct spill_load load = {.folder = folder,
                              .bytes = options->bytes / options->page_bytes * options->page_bytes,
                              .page_bytes = options->page_bytes,
                              .seconds = options->seconds,
                              .seed = options->seed};
    const int code = run_all(spill, &load, rows, ratios);
    (void)snprintf(path, sizeof path, "%s/" DISK_FILE, folder);
    (void)unlink(path);
    (void)rmdir(folder);
    free(spill);
    return code;
}
