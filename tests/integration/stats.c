// Statistics as an operator gets them. Single thread.
#include "daemon.h"

#include <stdlib.h>
#include <string.h>

json_t *stats_read(const struct daemon *daemon)
{
    static char text[1 << 20];
    const char *arguments[] = {"stats", "--json", NULL};
    int status = daemon_ctl(daemon, arguments, text, sizeof text);
    if (status != 0)
        fail_msg("icecachectl stats --json exits %d: %s", status, text);
    json_error_t error;
    json_t *stats = json_loads(text, JSON_REJECT_DUPLICATES, &error);
    if (!stats)
        fail_msg("not JSON (%s at %d): %s", error.text, error.position, text);
    return stats;
}

uint64_t stats_number(const json_t *stats, const char *path)
{
    char copy[128];
    assert_true(strlen(path) < sizeof copy);
    strcpy(copy, path);
    const json_t *at = stats;
    char *rest = NULL;
    for (char *name = strtok_r(copy, ".", &rest); name && at; name = strtok_r(NULL, ".", &rest))
        at = json_object_get(at, name);
    if (!json_is_number(at))
        fail_msg("the statistics have no number %s", path);
    return (uint64_t)json_number_value(at);
}

void stats_held(const struct daemon *daemon, struct stats_held *held)
{
    json_t *stats = stats_read(daemon);
    *held = (struct stats_held){
        .sessions = stats_number(stats, "sessions"),
        .sequences = stats_number(stats, "sequences"),
        .tokens = stats_number(stats, "tokens"),
        .pages = stats_number(stats, "pages"),
        .pool_bytes = stats_number(stats, "bytes.pool"),
        .index_bytes = stats_number(stats, "bytes.index"),
        .shared_bytes = stats_number(stats, "bytes.shared"),
    };
    json_decref(stats);
}

static void print_held(const char *what, const struct stats_held *held)
{
    print_error("%s: sessions %llu sequences %llu tokens %llu pages %llu pool %llu index %llu shared %llu\n", what,
                (unsigned long long)held->sessions, (unsigned long long)held->sequences,
                (unsigned long long)held->tokens, (unsigned long long)held->pages, (unsigned long long)held->pool_bytes,
                (unsigned long long)held->index_bytes, (unsigned long long)held->shared_bytes);
}

uint64_t stats_wait(const struct daemon *daemon, const struct stats_held *expected, uint64_t deadline_us)
{
    uint64_t from = now_us();
#ifdef __SANITIZE_THREAD__
    deadline_us *= 4; // the daemon is 10 to 20 times slower under the thread sanitizer
#endif
    for (;;) {
        struct stats_held held;
        uint64_t asked = now_us(); // what counts is the moment of asking, not how long the answer took
        stats_held(daemon, &held);
        if (memcmp(&held, expected, sizeof held) == 0)
            return asked - from;
        if (asked - from >= deadline_us) {
            print_held("expected", expected);
            print_held("held    ", &held);
            fail_msg("not given back within %.1f s", (double)deadline_us / 1e6);
        }
        sleep_us(5000);
    }
}
