// The daemon that serve measures: started in folders of its own, asked for its statistics by an admin session, stopped
// by SIGTERM.
#include "serve.h"

#include "cached/ctl_connection.h"

#include <inttypes.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define READY_WAIT_NS     (60ull * 1000000000u)
#define TIMEOUT_MS        20000
#define SETTLE_WAIT_NS    (5ull * 1000000000u)
#define SEQUENCES_DEFAULT 4096u // the daemon's
#define SETTLE_MS         10
#define SETTLED_NS        500000u // of CPU time in SETTLE_MS, at most

// Where this program was built, the daemon is two folders up; where it was installed, beside it.
static bool find_program(const char *given, char *out, size_t room)
{
    static const char *const places[] = {"icecached", "../../cached/icecached"};
    char self[SERVE_PATH_ROOM];
    if (given != NULL) {
        (void)snprintf(out, room, "%s", given);
        return access(out, X_OK) == 0;
    }
    const ssize_t n = readlink("/proc/self/exe", self, sizeof self - 1);
    self[n > 0 ? n : 0] = '\0';
    char *slash = strrchr(self, '/');
    if (slash == NULL) {
        return false;
    }
    *slash = '\0';
    for (size_t i = 0; i < sizeof places / sizeof places[0]; i++) {
        (void)snprintf(out, room, "%s/%s", self, places[i]);
        if (access(out, X_OK) == 0) {
            return true;
        }
    }
    return false;
}

static void print_log(const struct serve_daemon *daemon)
{
    char line[512];
    FILE *file = fopen(daemon->log, "re");
    while (file != NULL && fgets(line, sizeof line, file) != NULL) {
        (void)fputs(line, stderr);
    }
    if (file != NULL) {
        (void)fclose(file);
    }
}

static bool wait_ready(struct serve_daemon *daemon)
{
    struct ctl_connection *connection = calloc(1, sizeof *connection);
    for (const uint64_t until_ns = measure_ns() + READY_WAIT_NS; connection != NULL && measure_ns() < until_ns;) {
        if (process_has_ended(&daemon->process)) {
            break;
        }
        if (ctl_connect(connection, daemon->sockets, TIMEOUT_MS) == ICE_OK) {
            daemon->connection = connection;
            return true;
        }
        ctl_close(connection);
        (void)poll(NULL, 0, 5);
    }
    free(connection);
    (void)fputs("icecache-bench: serve: the daemon does not get ready; its log:\n", stderr);
    print_log(daemon);
    return false;
}

bool serve_daemon_start(struct serve_daemon *daemon, const char *program, const char *work, const char *disk,
                        uint32_t number, const struct serve_room *room)
{
    char path[2 * SERVE_PATH_ROOM], pool[24], index[24], shared[24], spill[24], sessions[16], sequences[16];
    *daemon = (struct serve_daemon){0};
    if (!find_program(program, path, sizeof path)) {
        (void)fprintf(stderr, "icecache-bench: serve: %s cannot be run; --daemon names the daemon\n",
                      program != NULL ? program : "icecached beside this program");
        return false;
    }
    (void)snprintf(daemon->sockets, sizeof daemon->sockets, "%.200s/s%u", work, number);
    (void)snprintf(daemon->log, sizeof daemon->log, "%.200s/log%u", work, number);
    (void)snprintf(daemon->spill, sizeof daemon->spill, "%.200s/%u", disk, number);
    (void)snprintf(pool, sizeof pool, "%" PRIu64, room->pool_bytes);
    (void)snprintf(index, sizeof index, "%" PRIu64, room->index_bytes);
    (void)snprintf(shared, sizeof shared, "%" PRIu64, room->shared_bytes);
    (void)snprintf(spill, sizeof spill, "%" PRIu64, room->spill_bytes);
    (void)snprintf(sessions, sizeof sessions, "%u", room->sessions);
    (void)snprintf(sequences, sizeof sequences, "%u", room->sequences > 0 ? room->sequences : SEQUENCES_DEFAULT);
    const char *const arguments[] = {
        path,          "--socket-dir",   daemon->sockets, "--pool-bytes",
        pool,          "--index-bytes",  index,           "--shared-bytes",
        shared,        "--sessions-max", sessions,        "--sequences-max",
        sequences,     "--memory-check", "warn",          room->spill_bytes > 0 ? "--spill-dir" : NULL,
        daemon->spill, "--spill-bytes",  spill,           NULL};
    if (mkdir(daemon->spill, 0700) != 0) {
        (void)fprintf(stderr, "icecache-bench: serve: %s cannot be made\n", daemon->spill);
        return false;
    }
    return process_start(&daemon->process, arguments, daemon->log) && wait_ready(daemon);
}

// 0 where the kernel does not say.
static uint64_t cpu_ns_of(pid_t pid)
{
    clockid_t clock;
    struct timespec time = {0};
    if (clock_getcpuclockid(pid, &clock) == 0) {
        (void)clock_gettime(clock, &time);
    }
    return (uint64_t)time.tv_sec * 1000000000u + (uint64_t)time.tv_nsec;
}

bool serve_daemon_stats(struct serve_daemon *daemon, struct serve_stats *out)
{
    Icecache__Wire__Reply *reply;
    if (ctl_stats(daemon->connection, 0, &reply) != ICE_OK) {
        (void)fprintf(stderr, "icecache-bench: serve: statistics: %s\n", daemon->connection->error);
        return false;
    }
    const Icecache__Wire__StatsReply *stats = reply->stats;
    *out = (struct serve_stats){
        .cpu_ns = cpu_ns_of(daemon->process.pid),
        .retrieves = stats->retrieves,
        .all_pool_bytes = stats->pool_bytes,
        .index_bytes = stats->index_bytes,
        .pages_read = stats->spill != NULL ? stats->spill->pages_read : 0,
        .hinted = stats->spill != NULL ? stats->spill->hinted : 0,
        .hinted_used = stats->spill != NULL ? stats->spill->hinted_used : 0,
        .direct = stats->spill != NULL && stats->spill->direct,
    };
    for (size_t i = 0; i < stats->n_sequence; i++) { // there are fewer than a reply has room for
        out->pages += stats->sequence[i]->pages;
        out->pool_bytes += stats->sequence[i]->pool_bytes;
    }
    icecache__wire__reply__free_unpacked(reply, NULL);
    return true;
}

void serve_daemon_settle(const struct serve_daemon *daemon)
{
    const uint64_t until_ns = measure_ns() + SETTLE_WAIT_NS;
    uint64_t before_ns = cpu_ns_of(daemon->process.pid), after_ns = UINT64_MAX;
    do {
        (void)poll(NULL, 0, SETTLE_MS);
        before_ns = after_ns != UINT64_MAX ? after_ns : before_ns;
        after_ns = cpu_ns_of(daemon->process.pid);
    } while (after_ns - before_ns > SETTLED_NS && measure_ns() < until_ns);
}

bool serve_daemon_stop(struct serve_daemon *daemon)
{
    if (daemon->connection != NULL) {
        ctl_close(daemon->connection);
        free(daemon->connection);
        daemon->connection = NULL;
    }
    if (daemon->process.pid == 0) {
        return true;
    }
    const bool good = process_end(&daemon->process, SIGTERM);
    if (!good) {
        (void)fputs("icecache-bench: serve: the daemon did not end well; its log:\n", stderr);
        print_log(daemon);
    }
    return good;
}
