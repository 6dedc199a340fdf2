// Child processes with deadlines: programs whose output is captured, and this test program started again in a role.
#ifndef ICECACHE_TESTS_CHILD_H
#define ICECACHE_TESTS_CHILD_H

#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include <cmocka.h>

#define CHILD_ARGUMENTS_MAX 24

uint64_t now_us(void); // monotonic
void sleep_us(uint64_t us);
// ICECACHE_TEST_FULL=1 is set: full ? `full` : `scaled`.
uint32_t scaled_count(uint32_t scaled, uint32_t full);
// The same, but half of `scaled` under the thread sanitizer, by which everything takes many times as long. For rounds
// that are all alike.
uint32_t scaled_rounds(uint32_t scaled, uint32_t full);
// Deadlines of the tests themselves: generous, because machines are slow, but every wait has an end.
#define TEST_DEADLINE_US (30u * 1000000u)

// Deterministic numbers (splitmix64).
uint64_t random_next(uint64_t *state);
uint64_t random_below(uint64_t *state, uint64_t bound);
// ICECACHE_TEST_SEED, or one from the clock; printed.
uint64_t random_seed(const char *test);

struct child {
    pid_t pid;  // 0: none
    int input;  // its standard input; -1: closed
    int output; // its standard output; -1: none
};

// Starts a program. Its standard error goes to the log file, or where ours goes (NULL). Dies with this process.
void child_start(struct child *child, const char *const *arguments, const char *log_path);
// The beginning of arguments that start this program in a role; answers how many they are. The role's own follow.
size_t child_role_arguments(const char *role, const char **arguments);
// This program in the role named by arguments[0].
void child_start_role(struct child *child, const char *const *arguments);
// Waits for one line of its output; false at end of file. Fails the test at the deadline.
bool child_read_line(struct child *child, char *line, size_t capacity);
void child_close_input(struct child *child);
// Waits for its end and answers the wait status; kills it and fails the test at the deadline.
int child_wait(struct child *child, uint64_t deadline_us);
void child_expect_exit(struct child *child, int exit_status);
void child_kill(struct child *child); // SIGKILL, and waits

// Runs a program to its end; its standard output and error, cut at capacity, go to `output`. Answers its exit status.
int child_run(const char *const *arguments, char *output, size_t capacity);

struct role {
    const char *name;
    int (*run)(int argc, char **argv); // argv[0] is the role's name
};
// True where this process was started in a role, which has run then.
bool role_run(int argc, char **argv, const struct role *roles, size_t count, int *exit_status);

#endif
