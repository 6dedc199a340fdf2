#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "daemon.h"

#include "cached/env_linux.h"
#include "cached/log.h"
#include "cached/memory_check.h"

#include <dirent.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define START_DEADLINE_MS 30000

// The thread sanitizer opens descriptors of its own while tests run.
#if defined(__SANITIZE_THREAD__)
#define THREAD_SANITIZER 1
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define THREAD_SANITIZER 1
#endif
#endif
#ifndef THREAD_SANITIZER
#define THREAD_SANITIZER 0
#endif

// ZeroMQ is not built with the sanitizer, which cannot see that it hands memory from thread to thread by atomics.
__attribute__((visibility("default"))) const char *__tsan_default_suppressions(void);
const char *__tsan_default_suppressions(void)
{
    return "called_from_lib:libzmq.so\nrace:libzmq.so\nrace:libstdc++.so\nrace:read_peer\n";
}

// A failed test leaves its daemon to the tear-down: two in one process would take each other's signals.
static struct daemon *current;

void daemon_block_signals(void)
{
    sigset_t signals;
    sigemptyset(&signals);
    sigaddset(&signals, SIGTERM);
    sigaddset(&signals, SIGINT);
    pthread_sigmask(SIG_BLOCK, &signals, NULL);
    signal(SIGPIPE, SIG_IGN);
    log_set_level(LOG_LEVEL_ERROR);
}

static uint32_t open_fds(void)
{
    uint32_t count = 0;
    DIR *folder = opendir("/proc/self/fd");
    assert_non_null(folder);
    while (readdir(folder))
        count++;
    closedir(folder);
    return count;
}

struct daemon *daemon_create(const char *const *options)
{
    struct daemon *daemon = calloc(1, sizeof *daemon);
    assert_non_null(daemon);
    strcpy(daemon->folder, "/tmp/icecache-fault-XXXXXX");
    assert_non_null(mkdtemp(daemon->folder));
    snprintf(daemon->sockets, sizeof daemon->sockets, "%s/sockets", daemon->folder);
    const char *arguments[40] = {
        "icecached", "--socket-dir",   daemon->sockets, "--pool-bytes",   "8m", "--shards",   "2",   "--index-bytes",
        "64m",       "--shared-bytes", "16m",           "--sessions-max", "8",  "--drain-ms", "2000"};
    int count = 15;
    for (uint32_t i = 0; options && options[i]; i++)
        arguments[count++] = options[i];
    char error[256];
    assert_int_equal(config_read(&daemon->config, count, (char *const *)(uintptr_t)arguments, error, sizeof error),
                     CONFIG_RUN);
    current = daemon;
    return daemon;
}

static void *daemon_main(void *argument)
{
    struct daemon *daemon = argument;
    struct server *server = &daemon->server;
    int outcome = DAEMON_FAILED;
    if (memory_fits(&daemon->faulty.env, &daemon->config) &&
        server_init(server, &daemon->faulty.env, &daemon->config)) {
        if (server_take_directory(server) && server_take_pool(server) && server_start_threads(server) &&
            reactor_init(server) == 0) {
            atomic_store(&daemon->state, DAEMON_SERVING);
            reactor_run(server);
            outcome = DAEMON_STOPPED;
        } else if (server->stopped_early) {
            outcome = DAEMON_STOPPED;
        }
        server_stop_threads(server);
        reactor_fini(server);
        server_fini(server);
    }
    atomic_store(&daemon->state, outcome);
    return NULL;
}

void daemon_expect_clean(const struct daemon *daemon)
{
    char path[160];
    assert_int_equal(atomic_load(&daemon->faulty.bytes), 0);
    assert_int_equal(atomic_load(&daemon->faulty.regions), 0);
    // ZeroMQ's I/O threads are joined when the bus is closed, and their descriptors with them.
    if (!THREAD_SANITIZER)
        assert_int_equal(open_fds(), daemon->fds_before);
    snprintf(path, sizeof path, "%s/control.sock", daemon->sockets);
    assert_int_not_equal(access(path, F_OK), 0);
    snprintf(path, sizeof path, "%s/data.sock", daemon->sockets);
    assert_int_not_equal(access(path, F_OK), 0);
}

static void join(struct daemon *daemon)
{
    pthread_join(daemon->thread, NULL);
    daemon->thread_runs = false;
    daemon_expect_clean(daemon);
}

bool daemon_start(struct daemon *daemon)
{
    daemon->fds_before = open_fds();
    atomic_store(&daemon->state, DAEMON_STARTING);
    assert_int_equal(pthread_create(&daemon->thread, NULL, daemon_main, daemon), 0);
    daemon->thread_runs = true;
    for (int ms = 0; atomic_load(&daemon->state) == DAEMON_STARTING; ms++) {
        assert_true(ms < START_DEADLINE_MS);
        usleep(1000);
    }
    if (atomic_load(&daemon->state) == DAEMON_SERVING)
        return true;
    join(daemon);
    return false;
}

void daemon_stop(struct daemon *daemon)
{
    kill(getpid(), SIGTERM); // blocked in every thread: the reactor's descriptor gets it
    join(daemon);
    assert_int_equal(atomic_load(&daemon->state), DAEMON_STOPPED);
}

void daemon_destroy(struct daemon *daemon)
{
    char path[160];
    assert_false(daemon->thread_runs);
    snprintf(path, sizeof path, "%s/icecached.lock", daemon->sockets);
    unlink(path);
    rmdir(daemon->sockets);
    assert_int_equal(rmdir(daemon->folder), 0);
    current = NULL;
    free(daemon);
}

int daemon_teardown(void **state)
{
    (void)state;
    if (!current)
        return 0;
    faulty_disarm(&current->faulty);
    if (current->thread_runs)
        daemon_stop(current);
    daemon_destroy(current);
    return 0;
}
