// fio with the pattern of the spill command: random pages of the same file past the page cache, as many in flight, by
// io_uring, for as long. Its own report says what it did.
#include "spill.h"

#include "cached/disk.h"

#include <errno.h>
#include <fcntl.h>
#include <jansson.h>
#include <spawn.h>
#include <stdio.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#define TEXT_BYTES ((size_t)1 << 20)

extern char **environ;

// Runs fio with its output in `text`. Its exit status, -1: it could not be run.
static int run(char *const arguments[], char *text, size_t capacity)
{
    int ends[2];
    if (pipe2(ends, O_CLOEXEC) != 0) {
        return -1;
    }
    posix_spawn_file_actions_t actions;
    (void)posix_spawn_file_actions_init(&actions);
    (void)posix_spawn_file_actions_adddup2(&actions, ends[1], STDOUT_FILENO);
    pid_t pid;
    const int error = posix_spawnp(&pid, arguments[0], &actions, NULL, arguments, environ);
    (void)posix_spawn_file_actions_destroy(&actions);
    (void)close(ends[1]);
    size_t at = 0;
    while (error == 0 && at + 1 < capacity) {
        const ssize_t got = read(ends[0], text + at, capacity - 1 - at);
        if (got == 0 || (got < 0 && errno != EINTR)) {
            break;
        }
        at += got > 0 ? (size_t)got : 0;
    }
    text[at] = '\0';
    (void)close(ends[0]);
    int status = -1;
    while (error == 0 && waitpid(pid, &status, 0) < 0 && errno == EINTR) {
    }
    return error == 0 && WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

bool spill_fio_is_there(void)
{
    char text[256];
    char *const arguments[] = {"fio", "--version", NULL};
    if (run(arguments, text, sizeof text) == 0) {
        return true;
    }
    (void)fputs("icecache-bench: spill: no fio to compare with; `apt-get install fio`\n", stderr);
    return false;
}

static double number(const json_t *object, const char *key)
{
    return json_number_value(json_object_get(object, key));
}

static bool take_figures(const json_t *report, bool is_write, struct spill_figures *out)
{
    const json_t *job = json_array_get(json_object_get(report, "jobs"), 0);
    const json_t *of = json_object_get(job, is_write ? "write" : "read");
    const json_t *times = json_object_get(json_object_get(of, "lat_ns"), "percentile");
    const double pages = number(of, "total_ios"), runtime_us = 1000 * number(of, "runtime");
    if (number(job, "error") != 0 || !(pages > 0) || !(runtime_us > 0)) {
        return false;
    }
    *out = (struct spill_figures){
        .pages_per_s = 1e6 * pages / runtime_us,
        // Shares of the job's time, in percent.
        .cpu_us_per_page =
            (number(job, "usr_cpu") + number(job, "sys_cpu")) / 100 * 1000 * number(job, "job_runtime") / pages,
        .p50_us = number(times, "50.000000") / 1000,
        .p99_us = number(times, "99.000000") / 1000,
    };
    return true;
}

bool spill_fio_run(const struct spill_load *load, struct spill_figures *out)
{
    static char text[TEXT_BYTES];
    char file[512], size[48], page[32], depth[32], runtime[32], seed[48];
    (void)snprintf(file, sizeof file, "--filename=%s/" DISK_FILE, load->folder);
    (void)snprintf(size, sizeof size, "--size=%llu", (unsigned long long)load->bytes);
    (void)snprintf(page, sizeof page, "--bs=%u", load->page_bytes);
    (void)snprintf(depth, sizeof depth, "--iodepth=%u", load->depth);
    (void)snprintf(runtime, sizeof runtime, "--runtime=%ums", (unsigned)(1000 * load->seconds));
    (void)snprintf(seed, sizeof seed, "--randseed=%llu", (unsigned long long)load->seed);
    char *const arguments[] = {"fio",
                               "--name=spill",
                               file,
                               size,
                               page,
                               depth,
                               runtime,
                               seed,
                               load->is_write ? "--rw=randwrite" : "--rw=randread",
                               "--ioengine=io_uring",
                               "--direct=1",
                               "--norandommap=1",
                               "--time_based=1",
                               "--thread=1",
                               "--lat_percentiles=1",
                               "--clat_percentiles=0",
                               "--output-format=json",
                               NULL};
    const int status = run(arguments, text, sizeof text);
    // A note may stand before the report.
    json_t *report = status == 0 && strchr(text, '{') ? json_loads(strchr(text, '{'), 0, NULL) : NULL;
    const bool is_right = take_figures(report, load->is_write, out);
    if (!is_right) {
        (void)fprintf(stderr, "icecache-bench: spill: fio ended with status %d and no figures\n", status);
    }
    json_decref(report);
    return is_right;
}
