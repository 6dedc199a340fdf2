// icecached in a thread of the test, from its start to its end, as main.c runs it.
#ifndef ICECACHE_TESTS_FAULT_DAEMON_H
#define ICECACHE_TESTS_FAULT_DAEMON_H

#include "faulty.h"

#include "cached/server.h"

#include <pthread.h>

struct daemon {
    struct faulty faulty;
    struct config config;
    struct server server; // the daemon's thread only
    pthread_t thread;
    bool thread_runs;
    char folder[64]; // temporary
    char sockets[96];
    uint32_t fds_before;
    _Atomic int state; // enum daemon_state
};
enum daemon_state { DAEMON_STARTING, DAEMON_SERVING, DAEMON_FAILED, DAEMON_STOPPED };

// Makes the folder and reads the options (NULL-terminated, may be NULL); nothing runs yet. Call once per process before
// any thread: daemon_block_signals.
void daemon_block_signals(void);
struct daemon *daemon_create(const char *const *options);
// True where it serves, false where it has given up; then nothing of it may be left.
bool daemon_start(struct daemon *daemon);
void daemon_stop(struct daemon *daemon); // SIGTERM to the process; nothing of it may be left
void daemon_destroy(struct daemon *daemon);
int daemon_teardown(void **state); // cmocka's: ends the daemon of a test that has failed
#define DAEMON_TEST(function) cmocka_unit_test_teardown(function, daemon_teardown)
// Fails the test where memory, mappings, descriptors or sockets of a daemon that is gone are still there.
void daemon_expect_clean(const struct daemon *daemon);

#endif
