// Processes for the tests. Single thread per call; forks only to exec at once.
#include "child.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define ROLE_FLAG "--role"

// ---- time and numbers ----

uint64_t now_us(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000u + (uint64_t)now.tv_nsec / 1000u;
}

void sleep_us(uint64_t us)
{
    struct timespec left = {(time_t)(us / 1000000u), (long)(us % 1000000u) * 1000};
    while (nanosleep(&left, &left) != 0 && errno == EINTR)
        ;
}

uint32_t scaled_count(uint32_t scaled, uint32_t full)
{
    const char *wanted = getenv("ICECACHE_TEST_FULL");
    return wanted && strcmp(wanted, "1") == 0 ? full : scaled;
}

#if defined(__SANITIZE_THREAD__)
#define THREAD_SANITIZED true
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define THREAD_SANITIZED true
#endif
#endif
#ifndef THREAD_SANITIZED
#define THREAD_SANITIZED false
#endif

uint32_t scaled_rounds(uint32_t scaled, uint32_t full)
{
    return scaled_count(THREAD_SANITIZED ? (scaled + 1) / 2 : scaled, full);
}

uint64_t random_next(uint64_t *state)
{
    uint64_t x = *state += 0x9e3779b97f4a7c15u;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    return x ^ x >> 31;
}

uint64_t random_below(uint64_t *state, uint64_t bound)
{
    return random_next(state) % bound;
}

uint64_t random_seed(const char *test)
{
    const char *given = getenv("ICECACHE_TEST_SEED");
    uint64_t seed = given ? strtoull(given, NULL, 10) : now_us();
    print_message("%s: ICECACHE_TEST_SEED=%llu\n", test, (unsigned long long)seed);
    return seed;
}

// ---- start ----

// In the child, between fork and exec: only calls that are safe there. Does not return.
static void become(const char *const *arguments, int input, int output, int error, pid_t parent)
{
    sigset_t none;
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    if (prctl(PR_SET_PDEATHSIG, SIGKILL) != 0 || getppid() != parent)
        _exit(126);
    if (dup2(input, STDIN_FILENO) < 0 || dup2(output, STDOUT_FILENO) < 0 ||
        (error >= 0 && dup2(error, STDERR_FILENO) < 0))
        _exit(126);
    execv(arguments[0], (char *const *)(uintptr_t)arguments);
    _exit(127);
}

// error: -1 keeps ours.
static void start(struct child *child, const char *const *arguments, int error)
{
    int input[2], output[2];
    assert_int_equal(pipe2(input, O_CLOEXEC), 0);
    assert_int_equal(pipe2(output, O_CLOEXEC), 0);
    pid_t parent = getpid();
    pid_t pid = fork();
    assert_true(pid >= 0);
    if (pid == 0)
        become(arguments, input[0], output[1], error == STDOUT_FILENO ? output[1] : error, parent);
    close(input[0]);
    close(output[1]);
    *child = (struct child){pid, input[1], output[0]};
}

void child_start(struct child *child, const char *const *arguments, const char *log_path)
{
    int log = -1;
    if (log_path) {
        log = open(log_path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
        assert_true(log >= 0);
    }
    start(child, arguments, log);
    if (log >= 0)
        close(log);
}

size_t child_role_arguments(const char *role, const char **arguments)
{
    arguments[0] = "/proc/self/exe";
    arguments[1] = ROLE_FLAG;
    arguments[2] = role;
    return 3;
}

void child_start_role(struct child *child, const char *const *arguments)
{
    const char *all[CHILD_ARGUMENTS_MAX + 3] = {NULL};
    size_t count = child_role_arguments(arguments[0], all);
    for (arguments++; *arguments; arguments++) {
        assert_true(count < CHILD_ARGUMENTS_MAX);
        all[count++] = *arguments;
    }
    start(child, all, -1);
}

bool role_run(int argc, char **argv, const struct role *roles, size_t count, int *exit_status)
{
    if (argc < 3 || strcmp(argv[1], ROLE_FLAG) != 0)
        return false;
    *exit_status = 125;
    for (size_t i = 0; i < count; i++) {
        if (strcmp(roles[i].name, argv[2]) == 0)
            *exit_status = roles[i].run(argc - 2, argv + 2);
    }
    return true;
}

// ---- output ----

static bool wait_readable(int fd, uint64_t until_us)
{
    for (;;) {
        uint64_t now = now_us();
        if (now >= until_us)
            return false;
        struct pollfd polled = {.fd = fd, .events = POLLIN};
        if (poll(&polled, 1, (int)((until_us - now) / 1000u + 1)) > 0)
            return true;
    }
}

bool child_read_line(struct child *child, char *line, size_t capacity)
{
    uint64_t until = now_us() + TEST_DEADLINE_US;
    size_t used = 0;
    for (;;) {
        char c;
        if (!wait_readable(child->output, until))
            fail_msg("no line from the child within the deadline; so far: %.*s", (int)used, line);
        ssize_t got = read(child->output, &c, 1);
        if (got == 0)
            return false;
        if (got < 0 && errno == EINTR)
            continue;
        assert_int_equal(got, 1);
        if (c == '\n')
            break;
        assert_true(used + 1 < capacity);
        line[used++] = c;
    }
    line[used] = '\0';
    return true;
}

void child_close_input(struct child *child)
{
    if (child->input >= 0)
        close(child->input);
    child->input = -1;
}

// ---- end ----

static void forget(struct child *child)
{
    child_close_input(child);
    if (child->output >= 0)
        close(child->output);
    *child = (struct child){0, -1, -1};
}

void child_kill(struct child *child)
{
    if (child->pid == 0)
        return;
    kill(child->pid, SIGKILL);
    while (waitpid(child->pid, NULL, 0) < 0 && errno == EINTR)
        ;
    forget(child);
}

int child_wait(struct child *child, uint64_t deadline_us)
{
    uint64_t until = now_us() + deadline_us;
    int status = 0;
    for (;;) {
        pid_t ended = waitpid(child->pid, &status, WNOHANG);
        if (ended == child->pid)
            break;
        if (now_us() >= until) {
            pid_t pid = child->pid;
            child_kill(child);
            fail_msg("process %d did not end within %.1f s", (int)pid, (double)deadline_us / 1e6);
        }
        sleep_us(1000);
    }
    forget(child);
    return status;
}

void child_expect_exit(struct child *child, int exit_status)
{
    int status = child_wait(child, TEST_DEADLINE_US);
    if (!WIFEXITED(status) || WEXITSTATUS(status) != exit_status)
        fail_msg("the child ended with wait status 0x%x, expected exit status %d", (unsigned)status, exit_status);
}

int child_run(const char *const *arguments, char *output, size_t capacity)
{
    struct child child;
    start(&child, arguments, STDOUT_FILENO);
    child_close_input(&child);
    uint64_t until = now_us() + TEST_DEADLINE_US;
    size_t used = 0;
    for (;;) {
        char surplus[512];
        bool room = used + 1 < capacity;
        if (!wait_readable(child.output, until)) {
            child_kill(&child);
            fail_msg("%s did not end within the deadline", arguments[0]);
        }
        ssize_t got = read(child.output, room ? output + used : surplus, room ? capacity - 1 - used : sizeof surplus);
        if (got == 0)
            break;
        used += room && got > 0 ? (size_t)got : 0;
    }
    output[used] = '\0';
    int status = child_wait(&child, TEST_DEADLINE_US);
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}
