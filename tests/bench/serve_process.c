// Children of the serve command, and the pipes to them. Forks only to exec at once: other threads may run.
#include "serve.h"

#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#define READ_WAIT_MS (10 * 60 * 1000)
#define END_WAIT_NS  (20ull * 1000000000u)

static bool complain(const char *what)
{
    (void)fprintf(stderr, "icecache-bench: serve: %s: %s\n", what, strerror(errno));
    return false;
}

// Between fork and exec: only calls that are safe there.
static void become(const char *const *arguments, int input, int output, int error, pid_t parent)
{
    if (prctl(PR_SET_PDEATHSIG, SIGKILL) != 0 || getppid() != parent || dup2(input, STDIN_FILENO) < 0 ||
        dup2(output, STDOUT_FILENO) < 0 || (error >= 0 && dup2(error, STDERR_FILENO) < 0)) {
        _exit(126);
    }
    (void)execv(arguments[0], (char *const *)(uintptr_t)arguments);
    _exit(127);
}

bool process_start(struct process *process, const char *const *arguments, const char *log)
{
    int input[2], output[2];
    const int error = log != NULL ? open(log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600) : -1;
    *process = (struct process){0};
    if ((log != NULL && error < 0) || pipe2(input, O_CLOEXEC) != 0) {
        return complain(arguments[0]);
    }
    if (pipe2(output, O_CLOEXEC) != 0) {
        (void)close(input[0]);
        (void)close(input[1]);
        return complain(arguments[0]);
    }
    const pid_t parent = getpid(), pid = fork();
    if (pid == 0) {
        become(arguments, input[0], output[1], error, parent);
    }
    (void)close(input[0]);
    (void)close(output[1]);
    if (error >= 0) {
        (void)close(error);
    }
    if (pid < 0) {
        (void)close(input[1]);
        (void)close(output[0]);
        return complain(arguments[0]);
    }
    *process = (struct process){pid, input[1], output[0]};
    return true;
}

bool process_start_role(struct process *process, const char *role, const char *argument)
{
    const char *const arguments[] = {"/proc/self/exe", SERVE_ROLE_FLAG, role, argument, NULL};
    return process_start(process, arguments, NULL);
}

static bool write_all(int fd, const void *bytes, size_t n)
{
    for (const char *at = bytes; n > 0;) {
        const ssize_t done = write(fd, at, n);
        if (done < 0 && errno == EINTR) {
            continue;
        }
        if (done <= 0) {
            return false;
        }
        at += done;
        n -= (size_t)done;
    }
    return true;
}

static bool read_all(int fd, void *bytes, size_t n, int wait_ms)
{
    for (char *at = bytes; n > 0;) {
        struct pollfd polled = {.fd = fd, .events = POLLIN};
        const int ready = poll(&polled, 1, wait_ms);
        if (ready < 0 && errno == EINTR) {
            continue;
        }
        const ssize_t done = ready > 0 ? read(fd, at, n) : -1;
        if (done < 0 && ready > 0 && errno == EINTR) {
            continue;
        }
        if (done <= 0) {
            return false;
        }
        at += done;
        n -= (size_t)done;
    }
    return true;
}

bool process_write(const struct process *process, const void *bytes, size_t n)
{
    return write_all(process->input, bytes, n) || complain("a child process takes no orders");
}

bool process_read(const struct process *process, void *bytes, size_t n)
{
    if (read_all(process->output, bytes, n, READ_WAIT_MS)) {
        return true;
    }
    (void)fputs("icecache-bench: serve: a child process has ended, or does not answer\n", stderr);
    return false;
}

bool process_has_ended(struct process *process)
{
    if (process->pid > 0 && waitpid(process->pid, NULL, WNOHANG) == process->pid) {
        process->pid = 0;
    }
    return process->pid == 0;
}

bool process_end(struct process *process, int signal)
{
    int status = 0;
    pid_t ended = 0;
    if (process->pid <= 0) {
        return false;
    }
    (void)close(process->input);
    if (signal != 0) {
        (void)kill(process->pid, signal);
    }
    for (const uint64_t until = measure_ns() + END_WAIT_NS; ended == 0 && measure_ns() < until;) {
        ended = waitpid(process->pid, &status, WNOHANG);
        (void)poll(NULL, 0, ended == 0 ? 2 : 0);
    }
    if (ended == 0) {
        (void)kill(process->pid, SIGKILL);
        (void)waitpid(process->pid, &status, 0);
    }
    (void)close(process->output);
    *process = (struct process){0};
    return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

bool parent_read(void *bytes, size_t n)
{
    return read_all(STDIN_FILENO, bytes, n, -1);
}

bool parent_write(const void *bytes, size_t n)
{
    return write_all(STDOUT_FILENO, bytes, n);
}

bool parent_is_waiting(void)
{
    struct pollfd polled = {.fd = STDIN_FILENO, .events = POLLIN};
    return poll(&polled, 1, 0) > 0;
}

static int remove_one(const char *path, const struct stat *stat, int flag, struct FTW *place)
{
    (void)stat;
    (void)flag;
    (void)place;
    return remove(path);
}

void folder_remove(const char *folder)
{
    if (folder[0] != '\0') {
        (void)nftw(folder, remove_one, 8, FTW_DEPTH | FTW_PHYS);
    }
}
