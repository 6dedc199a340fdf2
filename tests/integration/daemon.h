// icecached on a private socket folder, and what it says of itself.
#ifndef ICECACHE_TESTS_DAEMON_H
#define ICECACHE_TESTS_DAEMON_H

#include "child.h"

#include <jansson.h>

struct daemon {
    struct child child;
    const char *program;        // NULL: daemon_path()
    const char *launcher;       // a role of this program that restricts itself and becomes the daemon; NULL: none
    const char *const *options; // NULL-terminated, behind --socket-dir; they leave --log-level at info or below
    uint32_t starts;
    char folder[64];  // temporary, removed at the end
    char sockets[96]; // --socket-dir
    char log[96];
    char spill[96]; // a folder for the spill file, on the disk that holds the temporary files
};

// Small shares, two shards.
extern const char *const daemon_default_options[];
#define DAEMON_SPILL_FOLDER "SPILL" // stands for the folder in a list of options
// The options of a small daemon with a disk, for such a list.
#define DAEMON_WITH_DISK(pool_bytes, spill_bytes)                                                                      \
    "--pool-bytes", pool_bytes, "--index-bytes", "64m", "--shared-bytes", "64m", "--shards", "2", "--spill-dir",       \
        DAEMON_SPILL_FOLDER, "--spill-bytes", spill_bytes

// cmocka's set-up and tear-down: *state holds the options before, the running struct daemon after. The tear-down stops
// it by SIGTERM where it still runs, and fails where it does not end well or a sanitizer has reported something.
int daemon_setup(void **state);
int daemon_setup_stopped(void **state); // folder only, nothing is started
int daemon_teardown(void **state);
#define DAEMON_TEST(function) DAEMON_TEST_WITH(function, daemon_default_options)
#define DAEMON_TEST_WITH(function, options)                                                                            \
    cmocka_unit_test_prestate_setup_teardown(function, daemon_setup, daemon_teardown, (void *)(uintptr_t)(options))
#define FOLDER_TEST(function) FOLDER_TEST_WITH(function, daemon_default_options)
#define FOLDER_TEST_WITH(function, options)                                                                            \
    cmocka_unit_test_prestate_setup_teardown(function, daemon_setup_stopped, daemon_teardown,                          \
                                             (void *)(uintptr_t)(options))

#define DAEMON_ARGUMENTS_MAX (CHILD_ARGUMENTS_MAX + 8)
// What it is started by, NULL-terminated.
void daemon_arguments(const struct daemon *daemon, const char *arguments[DAEMON_ARGUMENTS_MAX]);
void daemon_start(struct daemon *daemon); // until its log says that it is ready
void daemon_stop(struct daemon *daemon);  // SIGTERM; it must exit 0, its log free of sanitizer reports
void daemon_signal(const struct daemon *daemon, int signal);
void daemon_kill(struct daemon *daemon); // SIGKILL
// The log's text, cut at capacity.
void daemon_read_log(const struct daemon *daemon, char *text, size_t capacity);
const char *daemon_path(void);
const char *daemon_ctl_path(void);
// icecachectl with this daemon's folder; arguments NULL-terminated. Answers its exit status.
int daemon_ctl(const struct daemon *daemon, const char *const *arguments, char *output, size_t capacity);

// ---- statistics (stats.c) ----

// `icecachectl stats --json`, parsed; free with json_decref.
json_t *stats_read(const struct daemon *daemon);
// A number by its path: "bytes.pool".
uint64_t stats_number(const json_t *stats, const char *path);

// What a worker's death must give back.
struct stats_held {
    uint64_t sessions, sequences, tokens, pages, pool_bytes, index_bytes, shared_bytes;
};
void stats_held(const struct daemon *daemon, struct stats_held *held);
// Polls until the daemon holds exactly this; fails the test after deadline_us. Answers how long it took.
uint64_t stats_wait(const struct daemon *daemon, const struct stats_held *expected, uint64_t deadline_us);

#endif
