// Starting and stopping icecached. Single thread.
#include "daemon.h"

#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#define PRINTED_BYTES ((size_t)8 << 10)

const char *const daemon_default_options[] = {
    "--pool-bytes", "64m", "--index-bytes", "64m", "--shared-bytes", "64m", "--shards", "2", "--log-level",
    "debug",        NULL,
};

const char *daemon_path(void)
{
    const char *path = getenv("ICECACHE_TEST_DAEMON"); // where the test does not lie beside its build
    return path ? path : ICECACHED_PATH;
}

const char *daemon_ctl_path(void)
{
    const char *path = getenv("ICECACHE_TEST_CTL");
    return path ? path : ICECACHECTL_PATH;
}

// ---- the log ----

void daemon_read_log(const struct daemon *daemon, char *text, size_t capacity)
{
    FILE *file = fopen(daemon->log, "re");
    size_t used = file ? fread(text, 1, capacity - 1, file) : 0;
    text[used] = '\0';
    if (file)
        fclose(file);
}

static bool log_is_clean(const struct daemon *daemon)
{
    static char text[1 << 20];
    daemon_read_log(daemon, text, sizeof text);
    static const char *const reports[] = {"Sanitizer", "runtime error:", "Assertion"};
    for (size_t i = 0; i < sizeof reports / sizeof *reports; i++) {
        if (strstr(text, reports[i]))
            return false;
    }
    return true;
}

static void print_log(const struct daemon *daemon)
{
    static char text[1 << 20];
    daemon_read_log(daemon, text, sizeof text);
    const size_t bytes = strlen(text), shown = bytes < PRINTED_BYTES ? bytes : PRINTED_BYTES;
    // In parts: there is a limit to what one call prints.
    print_error("---- log of icecached%s ----\n", shown < bytes ? ", its end" : "");
    for (size_t at = bytes - shown; at < bytes; at += 500)
        print_error("%.500s", text + at);
    print_error("---- end ----\n");
}

// ---- start ----

// Its log says so once more than after the start before. (A connection to find out would count as a session.)
static bool is_ready(const struct daemon *daemon)
{
    static char text[1 << 20];
    uint32_t count = 0;
    daemon_read_log(daemon, text, sizeof text);
    for (const char *at = text; (at = strstr(at, "ready: version=")) != NULL; at++)
        count++;
    return count == daemon->starts;
}

void daemon_arguments(const struct daemon *daemon, const char *arguments[DAEMON_ARGUMENTS_MAX])
{
    size_t count = daemon->launcher ? child_role_arguments(daemon->launcher, arguments) : 0;
    arguments[count++] = daemon->program ? daemon->program : daemon_path();
    arguments[count++] = "--socket-dir";
    arguments[count++] = daemon->sockets;
    for (const char *const *option = daemon->options; *option; option++) {
        assert_true(count + 1 < DAEMON_ARGUMENTS_MAX);
        arguments[count++] = strcmp(*option, DAEMON_SPILL_FOLDER) == 0 ? daemon->spill : *option;
    }
    arguments[count] = NULL;
}

void daemon_start(struct daemon *daemon)
{
    const char *arguments[DAEMON_ARGUMENTS_MAX];
    daemon_arguments(daemon, arguments);
    assert_int_equal(daemon->child.pid, 0);
    daemon->starts++;
    child_start(&daemon->child, arguments, daemon->log);
    uint64_t until = now_us() + TEST_DEADLINE_US;
    while (!is_ready(daemon)) {
        int status;
        if (waitpid(daemon->child.pid, &status, WNOHANG) == daemon->child.pid || now_us() >= until) {
            print_log(daemon);
            fail_msg("icecached does not get ready");
        }
        sleep_us(2000);
    }
}

// ---- stop ----

void daemon_signal(const struct daemon *daemon, int signal)
{
    assert_true(daemon->child.pid > 0);
    assert_int_equal(kill(daemon->child.pid, signal), 0);
}

void daemon_kill(struct daemon *daemon)
{
    child_kill(&daemon->child);
    if (!log_is_clean(daemon)) {
        print_log(daemon);
        fail_msg("icecached had a defect before it was killed");
    }
}

void daemon_stop(struct daemon *daemon)
{
    daemon_signal(daemon, SIGTERM);
    int status = child_wait(&daemon->child, TEST_DEADLINE_US);
    if (!WIFEXITED(status) || WEXITSTATUS(status) != 0 || !log_is_clean(daemon)) {
        print_log(daemon);
        fail_msg("icecached ended with wait status 0x%x, or reported a defect", (unsigned)status);
    }
}

// ---- set-up and tear-down ----

int daemon_setup_stopped(void **state)
{
    struct daemon *daemon = calloc(1, sizeof *daemon);
    assert_non_null(daemon);
    daemon->child = (struct child){0, -1, -1};
    daemon->options = *state;
    snprintf(daemon->folder, sizeof daemon->folder, "/tmp/icecache-test-XXXXXX");
    assert_non_null(mkdtemp(daemon->folder));
    snprintf(daemon->sockets, sizeof daemon->sockets, "%s/s", daemon->folder);
    snprintf(daemon->log, sizeof daemon->log, "%s/log", daemon->folder);
    snprintf(daemon->spill, sizeof daemon->spill, "%s/spill", daemon->folder);
    assert_int_equal(mkdir(daemon->spill, 0700), 0);
    *state = daemon;
    return 0;
}

int daemon_setup(void **state)
{
    daemon_setup_stopped(state);
    daemon_start(*state);
    return 0;
}

// Not through daemon_stop: a failed assertion must not keep the folder from being removed.
static bool end_well(struct daemon *daemon)
{
    if (daemon->child.pid == 0)
        return log_is_clean(daemon);
    int status = 0;
    kill(daemon->child.pid, SIGCONT);
    kill(daemon->child.pid, SIGTERM);
    uint64_t until = now_us() + TEST_DEADLINE_US;
    pid_t ended = 0;
    while ((ended = waitpid(daemon->child.pid, &status, WNOHANG)) == 0 && now_us() < until)
        sleep_us(1000);
    if (ended == 0)
        child_kill(&daemon->child);
    return ended != 0 && WIFEXITED(status) && WEXITSTATUS(status) == 0 && log_is_clean(daemon);
}

int daemon_teardown(void **state)
{
    struct daemon *daemon = *state;
    bool well = end_well(daemon);
    if (!well)
        print_log(daemon);
    const char *remove[] = {"/bin/rm", "-rf", daemon->folder, NULL};
    char output[256];
    int removed = child_run(remove, output, sizeof output);
    free(daemon);
    if (!well)
        print_error("icecached did not end well\n");
    return well && removed == 0 ? 0 : -1;
}

// ---- icecachectl ----

int daemon_ctl(const struct daemon *daemon, const char *const *arguments, char *output, size_t capacity)
{
    const char *all[CHILD_ARGUMENTS_MAX + 4] = {daemon_ctl_path(), "--socket-dir", daemon->sockets};
    size_t count = 3;
    for (; *arguments; arguments++) {
        assert_true(count < CHILD_ARGUMENTS_MAX);
        all[count++] = *arguments;
    }
    return child_run(all, output, capacity);
}
