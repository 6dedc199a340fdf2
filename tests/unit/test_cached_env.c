// The real table of outside effects: blocks, sealed memory, the lock, the control socket and the data bus.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "cached/env_linux.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>
#include <zmq.h>

// ZeroMQ is not built with the sanitizer, which cannot see that it hands memory from thread to thread by atomics.
__attribute__((visibility("default"))) const char *__tsan_default_suppressions(void);
const char *__tsan_default_suppressions(void)
{
    return "called_from_lib:libzmq.so\nrace:libzmq.so\nrace:libstdc++.so\nrace:read_peer\n";
}

static struct env env;
static char folder[64], path[96];

static int setup(void **state)
{
    (void)state;
    env_linux_init(&env);
    strcpy(folder, "/tmp/icecache-env-XXXXXX");
    if (!mkdtemp(folder))
        return -1;
    snprintf(path, sizeof path, "%s/file", folder);
    return 0;
}

static int teardown(void **state)
{
    (void)state;
    unlink(path);
    return rmdir(folder);
}

static void test_memory(void **state)
{
    (void)state;
    for (size_t bytes = 1; bytes < 5000; bytes += 37) {
        uint8_t *memory = env.acquire(&env, bytes);
        assert_non_null(memory);
        assert_int_equal((uintptr_t)memory % 64, 0);
        memset(memory, 1, bytes);
        env.release(&env, memory, bytes);
    }
    env.release(&env, NULL, 0);
    uint8_t a[16] = {0}, b[16] = {0};
    assert_int_equal(env.random(&env, a, sizeof a) | env.random(&env, b, sizeof b), 0);
    assert_memory_not_equal(a, b, sizeof a);
}

static void test_shared(void **state)
{
    (void)state;
    int fd = -1;
    void *memory;
    assert_int_equal(env.memfd_create(&env, "test", 8192, &fd), 0);
    assert_int_equal(ftruncate(fd, 4096), -1);
    assert_int_equal(ftruncate(fd, 16384), -1);
    assert_int_equal(fcntl(fd, F_ADD_SEALS, F_SEAL_FUTURE_WRITE), -1); // nobody can take writing from the daemon
    assert_true(fcntl(fd, F_GETFD) & FD_CLOEXEC);
    assert_int_equal(env.map_shared(&env, fd, 8192, &memory), 0);
    uint8_t *worker = mmap(NULL, 8192, PROT_READ, MAP_SHARED, fd, 0);
    assert_true(worker != MAP_FAILED);
    assert_int_equal(((uint8_t *)memory)[8191], 0);
    ((uint8_t *)memory)[8191] = 7;
    assert_int_equal(worker[8191], 7);
    env.unmap_shared(&env, memory, 8192);
    assert_int_equal(worker[8191], 7); // the worker's stays
    munmap(worker, 8192);
    env.close_fd(&env, fd);
    env.close_fd(&env, -1);
    assert_true(env.memfd_create(&env, "test", UINT64_MAX, &fd) < 0);
    assert_true(env.map_shared(&env, -1, 4096, &memory) < 0);
}

static void test_files(void **state)
{
    (void)state;
    assert_int_equal(env.make_directory(&env, folder), 0); // it is there and ours
    char below[160];
    snprintf(below, sizeof below, "%s/none/none", folder);
    assert_int_equal(env.make_directory(&env, below), -ENOENT);
    assert_int_equal(env.unlink(&env, path), 0); // nothing there
    assert_true(env.unlink(&env, folder) < 0);
    FILE *file = fopen(path, "w");
    assert_non_null(file);
    fputs("precious", file);
    fclose(file);
    assert_int_equal(env.make_directory(&env, path), -ENOTDIR);
    // A link in the lock's place is not followed, what it names not emptied.
    struct stat before;
    int fd = -1;
    pid_t holder;
    snprintf(below, sizeof below, "%s/link", folder);
    assert_int_equal(symlink(path, below), 0);
    assert_int_equal(env.lock_file(&env, below, &fd, &holder), -ELOOP);
    assert_int_equal(stat(path, &before), 0);
    assert_int_equal(before.st_size, 8);
    unlink(below);
}

static void test_lock(void **state)
{
    (void)state;
    int ready[2], fd = -1;
    pid_t holder = 0;
    char byte;
    assert_int_equal(pipe(ready), 0);
    pid_t child = fork();
    if (child == 0) {
        int mine, rc = env.lock_file(&env, path, &mine, &holder);
        if (write(ready[1], rc == 0 ? "y" : "n", 1) == 1)
            pause();
        _exit(0);
    }
    assert_int_equal(read(ready[0], &byte, 1), 1);
    assert_int_equal(byte, 'y');
    assert_int_equal(env.lock_file(&env, path, &fd, &holder), -EWOULDBLOCK);
    assert_int_equal(holder, child);
    kill(child, SIGKILL);
    assert_int_equal(waitpid(child, NULL, 0), child);
    assert_int_equal(env.lock_file(&env, path, &fd, &holder), 0); // a dead holder's lock is free
    env.close_fd(&env, fd);
    close(ready[0]);
    close(ready[1]);
}

static void test_listen(void **state)
{
    (void)state;
    int fd, peer;
    struct stat socket;
    assert_int_equal(env.listen(&env, path, 0640, &fd), 0);
    assert_int_equal(stat(path, &socket), 0);
    assert_int_equal(socket.st_mode & 0777, 0640);
    assert_int_equal(env.accept(&env, fd, &peer), -EAGAIN);
    assert_int_equal(env.listen(&env, path, 0600, &peer), -EADDRINUSE);
    env.close_fd(&env, fd);
    char longest[200];
    memset(longest, 'x', sizeof longest);
    longest[sizeof longest - 1] = '\0';
    assert_int_equal(env.listen(&env, longest, 0600, &fd), -ENAMETOOLONG);
}

struct bus_test {
    struct env_bus *bus;
    void *context, *dealer;
};

static void bus_setup(struct bus_test *test)
{
    char endpoint[128];
    int none = 0, small = 1;
    assert_int_equal(env.bus_open(&env, path, 0600, &test->bus), 0);
    snprintf(endpoint, sizeof endpoint, "ipc://%s", path);
    test->context = zmq_ctx_new();
    test->dealer = zmq_socket(test->context, ZMQ_DEALER);
    assert_non_null(test->dealer);
    zmq_setsockopt(test->dealer, ZMQ_LINGER, &none, sizeof none);
    zmq_setsockopt(test->dealer, ZMQ_RCVHWM, &small, sizeof small);
    assert_int_equal(zmq_connect(test->dealer, endpoint), 0);
}

static void bus_end(struct bus_test *test)
{
    if (test->dealer)
        zmq_close(test->dealer);
    zmq_ctx_term(test->context);
    env.bus_close(&env, test->bus);
}

static void receive(struct bus_test *test, struct env_message *message)
{
    int error;
    struct pollfd ready = {.fd = env.bus_fd(&env, test->bus), .events = POLLIN};
    while ((error = env.bus_receive(&env, test->bus, message)) == -EAGAIN)
        assert_int_equal(poll(&ready, 1, 10000), 1);
    assert_int_equal(error, 0);
}

static void test_bus_frames(void **state)
{
    (void)state;
    struct bus_test test;
    struct env_message message;
    bus_setup(&test);
    for (int frames = 1; frames <= 5; frames++) {
        for (int i = 0; i < frames; i++)
            assert_int_equal(zmq_send(test.dealer, "frame", 4 + (size_t)(i == 1), i + 1 < frames ? ZMQ_SNDMORE : 0),
                             4 + (i == 1));
        receive(&test, &message);
        assert_int_equal(message.header_bytes, 4);
        assert_int_equal(message.vectors_bytes, frames > 1 ? 5 : 0);
        assert_int_equal(message.surplus_frames, frames > 2 ? frames - 2 : 0);
        assert_int_equal(message.peer_pid, getpid());
        assert_int_equal(message.peer_uid, geteuid());
        env.bus_release(&env, &message);
        env.bus_release(&env, &message); // idempotent
    }
    bus_end(&test);
}

static void test_bus_send(void **state)
{
    (void)state;
    struct bus_test test;
    struct env_message message;
    static uint8_t bytes[64 << 10];
    bus_setup(&test);
    assert_int_equal(env.bus_send(&env, test.bus, (const uint8_t *)"nobody", 6, bytes, 4), -EHOSTUNREACH);
    assert_int_equal(zmq_send(test.dealer, "hello", 5, 0), 5);
    receive(&test, &message);
    env.bus_release(&env, &message);
    uint8_t route[sizeof message.route];
    size_t route_bytes = message.route_bytes;
    memcpy(route, message.route, sizeof route);
    assert_int_equal(env.bus_send(&env, test.bus, route, route_bytes, "reply", 5), 0);
    assert_int_equal(zmq_recv(test.dealer, bytes, sizeof bytes, 0), 5);
    // A peer that does not read: its queue runs full, and nothing waits.
    int error = 0;
    for (int i = 0; i < 100000 && error == 0; i++)
        error = env.bus_send(&env, test.bus, route, route_bytes, bytes, sizeof bytes);
    assert_int_equal(error, -EAGAIN);
    zmq_close(test.dealer);
    test.dealer = NULL;
    for (int ms = 0; ms < 10000 && error != -EHOSTUNREACH; ms++, usleep(1000)) {
        assert_int_equal(env.bus_receive(&env, test.bus, &message), -EAGAIN); // hears of the peer's end
        error = env.bus_send(&env, test.bus, route, route_bytes, bytes, 4);
    }
    assert_int_equal(error, -EHOSTUNREACH);
    bus_end(&test);
}

#define ENV_TEST(function) cmocka_unit_test_setup_teardown(function, setup, teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        ENV_TEST(test_memory), ENV_TEST(test_shared),     ENV_TEST(test_files),    ENV_TEST(test_lock),
        ENV_TEST(test_listen), ENV_TEST(test_bus_frames), ENV_TEST(test_bus_send),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
