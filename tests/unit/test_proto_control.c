// The control socket over real sockets: packets, descriptors, deadlines, the peer's end, and names of the meeting
// place.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "proto/control.h"
#include "proto/limits.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

static int open_descriptors(void)
{
    DIR *directory = opendir("/proc/self/fd");
    assert_non_null(directory);
    int count = 0;
    while (readdir(directory)) {
        count++;
    }
    closedir(directory);
    return count;
}

static int64_t now_ms(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

// Every test leaves as many descriptors open as it found.
struct pair {
    int ends[2];
    int descriptors;
};

static int setup(void **state)
{
    struct pair *pair = malloc(sizeof(*pair));
    if (!pair) {
        return -1;
    }
    pair->descriptors = open_descriptors();
    *state = pair;
    return socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0, pair->ends);
}

static int teardown(void **state)
{
    struct pair *pair = *state;
    for (int i = 0; i < 2; i++) {
        if (pair->ends[i] >= 0) {
            close(pair->ends[i]);
        }
    }
    const int left = open_descriptors() - pair->descriptors;
    free(pair);
    return left == 0 ? 0 : -1;
}

static void drop_end(struct pair *pair, int end)
{
    close(pair->ends[end]);
    pair->ends[end] = -1;
}

static void receive_refused(int socket, size_t capacity, int deadline_ms, ice_status expected)
{
    uint8_t bytes[WIRE_CONTROL_BYTES_MAX];
    size_t size = 99;
    int fd = 99;
    assert_int_equal(control_receive(socket, bytes, capacity, &size, &fd, deadline_ms), expected);
    assert_int_equal(size, 0);
    assert_int_equal(fd, -1);
}

static void packets_keep_their_bounds(void **state)
{
    struct pair *pair = *state;
    uint8_t sent[WIRE_CONTROL_BYTES_MAX], seen[WIRE_CONTROL_BYTES_MAX];
    static const size_t sizes[] = {1, 17, WIRE_CONTROL_BYTES_MAX};
    for (size_t i = 0; i < 3; i++) {
        memset(sent, (int)i + 1, sizes[i]);
        assert_int_equal(control_send(pair->ends[0], sent, sizes[i], -1, 0), ICE_OK);
    }
    for (size_t i = 0; i < 3; i++) {
        size_t size = 0;
        int fd = 0;
        assert_int_equal(control_receive(pair->ends[1], seen, sizeof(seen), &size, &fd, 0), ICE_OK);
        assert_int_equal(size, sizes[i]);
        assert_int_equal(fd, -1);
        memset(sent, (int)i + 1, sizes[i]);
        assert_memory_equal(seen, sent, size);
    }
    receive_refused(pair->ends[1], sizeof(seen), 0, ICE_TIMEOUT);
}

static void bad_sizes_are_not_sent(void **state)
{
    struct pair *pair = *state;
    static const uint8_t bytes[WIRE_CONTROL_BYTES_MAX + 1];
    assert_int_equal(control_send(pair->ends[0], bytes, 0, -1, 0), ICE_INVALID_ARGUMENT);
    assert_int_equal(control_send(pair->ends[0], bytes, sizeof(bytes), -1, 0), ICE_TOO_LARGE);
    receive_refused(pair->ends[1], 16, 0, ICE_TIMEOUT);
}

static void a_descriptor_travels(void **state)
{
    struct pair *pair = *state;
    const int memfd = memfd_create("test", MFD_CLOEXEC);
    assert_true(memfd >= 0);
    assert_int_equal(write(memfd, "hello", 5), 5);
    assert_int_equal(control_send(pair->ends[0], "x", 1, memfd, 0), ICE_OK);
    assert_int_equal(fcntl(memfd, F_GETFD), FD_CLOEXEC); // borrowed: still open
    char byte, content[5];
    size_t size = 0;
    int fd = -1;
    assert_int_equal(control_receive(pair->ends[1], &byte, 1, &size, &fd, 0), ICE_OK);
    assert_int_equal(size, 1);
    assert_true(fd >= 0 && fd != memfd);
    assert_int_equal(fcntl(fd, F_GETFD), FD_CLOEXEC);
    assert_int_equal(pread(fd, content, sizeof(content), 0), 5);
    assert_memory_equal(content, "hello", 5);
    close(fd);
    close(memfd);
}

// What a peer that does not use control_send may do.
static void send_descriptors(int socket, const void *bytes, size_t size, int fd, size_t count)
{
    union {
        struct cmsghdr align;
        char bytes[CMSG_SPACE(16 * sizeof(int))];
    } ancillary = {.bytes = {0}};
    struct iovec part = {.iov_base = (void *)(uintptr_t)bytes, .iov_len = size};
    struct msghdr message = {.msg_iov = &part,
                             .msg_iovlen = 1,
                             .msg_control = ancillary.bytes,
                             .msg_controllen = CMSG_SPACE(count * sizeof(int))};
    struct cmsghdr *header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(count * sizeof(int));
    for (size_t i = 0; i < count; i++) {
        memcpy(CMSG_DATA(header) + i * sizeof(int), &fd, sizeof(fd));
    }
    assert_int_equal(sendmsg(socket, &message, 0), size);
}

static void surplus_descriptors_are_closed(void **state)
{
    struct pair *pair = *state;
    const int null = open("/dev/null", O_RDWR | O_CLOEXEC);
    assert_true(null >= 0);
    for (size_t count = 1; count <= 16; count++) {
        const int before = open_descriptors();
        send_descriptors(pair->ends[0], "abc", 3, null, count);
        char bytes[8];
        size_t size = 0;
        int fd = -1;
        assert_int_equal(control_receive(pair->ends[1], bytes, sizeof(bytes), &size, &fd, 0), ICE_OK);
        assert_int_equal(size, 3);
        assert_true(fd >= 0);
        assert_int_equal(open_descriptors(), before + 1);
        close(fd);
    }
    close(null);
}

static void several_descriptors_arrive_in_order(void **state)
{
    struct pair *pair = *state;
    int sent[WIRE_DESCRIPTORS_MAX + 1];
    for (uint32_t i = 0; i <= WIRE_DESCRIPTORS_MAX; i++) {
        sent[i] = open("/dev/null", O_RDWR | O_CLOEXEC);
        assert_true(sent[i] >= 0);
    }
    const int before = open_descriptors();
    static const uint32_t counts[] = {0, 1, 2, WIRE_DESCRIPTORS_MAX};
    for (size_t i = 0; i < sizeof(counts) / sizeof(counts[0]); i++) {
        assert_int_equal(control_send_all(pair->ends[0], "abc", 3, sent, counts[i], 0), ICE_OK);
        char bytes[8];
        size_t size = 0;
        struct control_descriptors got;
        assert_int_equal(control_receive_all(pair->ends[1], bytes, sizeof(bytes), &size, &got, 0), ICE_OK);
        assert_int_equal(size, 3);
        assert_int_equal(got.count, counts[i]);
        assert_int_equal(open_descriptors(), before + (int)counts[i]);
        for (uint32_t j = 1; j < got.count; j++) {
            assert_true(got.fds[j] > got.fds[j - 1]);
        }
        control_descriptors_close(&got);
        assert_int_equal(got.count, 0);
        assert_int_equal(open_descriptors(), before);
    }
    assert_int_equal(control_send_all(pair->ends[0], "abc", 3, sent, WIRE_DESCRIPTORS_MAX + 1, 0), ICE_TOO_LARGE);
    // More than wanted, from a peer that does not keep to that: as many as fit, and none left over.
    struct control_descriptors got;
    char byte;
    size_t size;
    send_descriptors(pair->ends[0], "x", 1, sent[0], 16);
    assert_int_equal(control_receive_all(pair->ends[1], &byte, 1, &size, &got, 0), ICE_OK);
    assert_int_equal(got.count, 16);
    control_descriptors_close(&got);
    send_descriptors(pair->ends[0], "xyz", 3, sent[0], 16);
    assert_int_equal(control_receive_all(pair->ends[1], &byte, 1, &size, &got, 0), ICE_BAD_MESSAGE);
    assert_int_equal(got.count, 0);
    assert_int_equal(open_descriptors(), before);
    for (uint32_t i = 0; i <= WIRE_DESCRIPTORS_MAX; i++) {
        close(sent[i]);
    }
}

static void a_refused_packet_leaves_no_descriptor(void **state)
{
    struct pair *pair = *state;
    const int null = open("/dev/null", O_RDWR | O_CLOEXEC);
    assert_true(null >= 0);
    const int before = open_descriptors();
    send_descriptors(pair->ends[0], "abcdefgh", 8, null, 1);
    receive_refused(pair->ends[1], 7, 0, ICE_BAD_MESSAGE); // truncated
    send_descriptors(pair->ends[0], "", 0, null, 1);
    receive_refused(pair->ends[1], 7, 0, ICE_DISCONNECTED); // empty: no valid peer sends it
    assert_int_equal(open_descriptors(), before);
    close(null);
}

static void a_full_descriptor_table_is_told(void **state)
{
    struct pair *pair = *state;
    struct rlimit limit, low;
    assert_int_equal(getrlimit(RLIMIT_NOFILE, &limit), 0);
    const int null = open("/dev/null", O_RDWR | O_CLOEXEC);
    assert_true(null >= 0);
    send_descriptors(pair->ends[0], "abc", 3, null, 1);
    low = limit;
    low.rlim_cur = 3; // everything open is above: none can be added
    assert_int_equal(setrlimit(RLIMIT_NOFILE, &low), 0);
    char bytes[8];
    size_t size = 99;
    int fd = 99;
    const ice_status status = control_receive(pair->ends[1], bytes, sizeof(bytes), &size, &fd, 0);
    assert_int_equal(setrlimit(RLIMIT_NOFILE, &limit), 0);
    assert_int_equal(status, ICE_SYSTEM);
    assert_int_equal(fd, -1);
    close(null);
}

static void the_end_of_the_peer_is_seen(void **state)
{
    struct pair *pair = *state;
    assert_int_equal(control_send(pair->ends[0], "last", 4, -1, 0), ICE_OK);
    drop_end(pair, 0);
    char bytes[8];
    size_t size = 0;
    int fd = -1;
    assert_int_equal(control_receive(pair->ends[1], bytes, sizeof(bytes), &size, &fd, 1000), ICE_OK);
    assert_int_equal(size, 4); // what was sent before the end still arrives
    receive_refused(pair->ends[1], 8, 1000, ICE_DISCONNECTED);
    assert_int_equal(control_send(pair->ends[1], "x", 1, -1, 1000), ICE_DISCONNECTED); // and no SIGPIPE
}

static void a_reset_is_the_end_too(void **state)
{
    struct pair *pair = *state;
    assert_int_equal(control_send(pair->ends[1], "unread", 6, -1, 0), ICE_OK);
    drop_end(pair, 0); // with data unread
    receive_refused(pair->ends[1], 8, 0, ICE_DISCONNECTED);
}

static void fill(int socket)
{
    static const uint8_t bytes[1024];
    ice_status status;
    int packets = 0;
    do {
        status = control_send(socket, bytes, sizeof(bytes), -1, 0);
        packets++;
    } while (status == ICE_OK && packets < 100000);
    assert_int_equal(status, ICE_TIMEOUT);
}

static void a_full_buffer_times_out(void **state)
{
    struct pair *pair = *state;
    fill(pair->ends[0]);
    assert_int_equal(control_send(pair->ends[0], "x", 1, -1, -5), ICE_TIMEOUT);
    const int64_t start = now_ms();
    assert_int_equal(control_send(pair->ends[0], "x", 1, -1, 50), ICE_TIMEOUT);
    assert_true(now_ms() - start >= 49);
    const int64_t waited = now_ms();
    receive_refused(pair->ends[0], 8, 50, ICE_TIMEOUT); // this end has got nothing
    assert_true(now_ms() - waited >= 49);
}

static void *drain(void *argument)
{
    const int socket = *(const int *)argument;
    uint8_t bytes[1024];
    size_t size;
    int fd;
    while (control_receive(socket, bytes, sizeof(bytes), &size, &fd, 10000) == ICE_OK && size != 1) {
    }
    return NULL;
}

static void a_send_waits_for_room(void **state)
{
    struct pair *pair = *state;
    fill(pair->ends[0]);
    pthread_t thread;
    assert_int_equal(pthread_create(&thread, NULL, drain, &pair->ends[1]), 0);
    assert_int_equal(control_send(pair->ends[0], "x", 1, -1, 10000), ICE_OK);
    assert_int_equal(pthread_join(thread, NULL), 0);
}

static void on_alarm(int signal)
{
    (void)signal;
}

static void signals_do_not_shorten_or_extend_a_wait(void **state)
{
    struct pair *pair = *state;
    struct sigaction action = {.sa_handler = on_alarm}, before;
    assert_int_equal(sigaction(SIGALRM, &action, &before), 0);
    timer_t timer;
    struct sigevent event = {.sigev_notify = SIGEV_SIGNAL, .sigev_signo = SIGALRM};
    assert_int_equal(timer_create(CLOCK_MONOTONIC, &event, &timer), 0);
    const struct itimerspec every = {.it_value = {.tv_nsec = 3000000}, .it_interval = {.tv_nsec = 3000000}};
    assert_int_equal(timer_settime(timer, 0, &every, NULL), 0);
    const int64_t start = now_ms();
    receive_refused(pair->ends[0], 8, 100, ICE_TIMEOUT);
    const int64_t took = now_ms() - start;
    assert_int_equal(timer_delete(timer), 0);
    assert_int_equal(sigaction(SIGALRM, &before, NULL), 0);
    assert_true(took >= 99);
    assert_true(took < 5000); // generous for a loaded machine; a wait begun anew at each signal never ends
}

static void a_bad_socket_is_an_error(void **state)
{
    (void)state;
    pid_t pid;
    uid_t uid;
    gid_t gid;
    assert_int_equal(control_send(-1, "x", 1, -1, 10), ICE_SYSTEM);
    receive_refused(-1, 8, 10, ICE_SYSTEM);
    assert_int_equal(control_peer(-1, &pid, &uid, &gid), ICE_SYSTEM);
}

static void the_kernel_names_the_peer(void **state)
{
    struct pair *pair = *state;
    pid_t pid = 0;
    uid_t uid = 1;
    gid_t gid = 1;
    assert_int_equal(control_peer(pair->ends[0], &pid, &uid, &gid), ICE_OK);
    assert_int_equal(pid, getpid());
    assert_int_equal(uid, getuid());
    assert_int_equal(gid, getgid());
}

// ---- connecting ----

static int listen_at(const char *path, int type, int backlog)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    snprintf(address.sun_path, sizeof(address.sun_path), "%s", path);
    const int fd = socket(AF_UNIX, type | SOCK_CLOEXEC, 0);
    assert_true(fd >= 0);
    assert_int_equal(bind(fd, (const struct sockaddr *)&address, sizeof(address)), 0);
    assert_int_equal(listen(fd, backlog), 0);
    return fd;
}

static void connects_and_says_why_not(void **state)
{
    (void)state;
    char directory[] = "/tmp/icecache-test-XXXXXX", path[108];
    assert_non_null(mkdtemp(directory));
    assert_int_equal(control_path(path, sizeof(path), directory, CONTROL_SOCKET_NAME), ICE_OK);
    int fd = -7;
    assert_int_equal(control_connect(path, &fd), ICE_NO_DAEMON); // nothing there

    const int listener = listen_at(path, SOCK_SEQPACKET, 1);
    assert_int_equal(control_connect(path, &fd), ICE_OK);
    assert_int_equal(fcntl(fd, F_GETFD), FD_CLOEXEC);
    assert_int_equal(fcntl(fd, F_GETFL) & O_NONBLOCK, O_NONBLOCK);
    const int accepted = accept(listener, NULL, NULL);
    assert_true(accepted >= 0);
    assert_int_equal(control_send(accepted, "hi", 2, -1, 1000), ICE_OK);
    char bytes[4];
    size_t size = 0;
    int passed = -1;
    assert_int_equal(control_receive(fd, bytes, sizeof(bytes), &size, &passed, 1000), ICE_OK);
    assert_int_equal(size, 2);
    close(accepted);
    close(fd);

    int waiting[64], count = 0; // nobody accepts
    ice_status status = ICE_OK;
    while (count < 64 && (status = control_connect(path, &waiting[count])) == ICE_OK) {
        count++;
    }
    assert_int_equal(status, ICE_TIMEOUT);
    while (count > 0) {
        close(waiting[--count]);
    }
    close(listener);
    fd = -7;
    assert_int_equal(control_connect(path, &fd), ICE_NO_DAEMON); // a socket that a dead daemon left
    assert_int_equal(unlink(path), 0);

    const int stream = listen_at(path, SOCK_STREAM, 1);
    assert_int_equal(control_connect(path, &fd), ICE_NO_DAEMON); // another program's socket
    if (geteuid() != 0) {                                        // root may do anything
        assert_int_equal(chmod(path, 0), 0);
        assert_int_equal(control_connect(path, &fd), ICE_PERMISSION);
    }
    assert_int_equal(fd, -7);
    close(stream);
    assert_int_equal(unlink(path), 0);
    assert_int_equal(rmdir(directory), 0);
}

// ---- names ----

static void paths_fit_a_socket_address(void **state)
{
    (void)state;
    char directory[200], path[300];
    memset(directory, 'd', sizeof(directory));
    directory[0] = '/';
    directory[107 - strlen("/" CONTROL_SOCKET_NAME)] = '\0';
    assert_int_equal(control_path(path, sizeof(path), directory, CONTROL_SOCKET_NAME), ICE_OK);
    assert_int_equal(strlen(path), 107);
    assert_int_equal(control_path(path, 108, directory, CONTROL_SOCKET_NAME), ICE_OK);
    assert_int_equal(control_path(path, 107, directory, CONTROL_SOCKET_NAME), ICE_TOO_LARGE);
    int fd = -7;
    assert_int_equal(control_connect(path, &fd), ICE_NO_DAEMON);
    assert_int_equal(control_path(path, sizeof(path), directory, CONTROL_SOCKET_NAME "x"), ICE_TOO_LARGE);
    memset(path, 'p', 108);
    path[108] = '\0';
    assert_int_equal(control_connect(path, &fd), ICE_TOO_LARGE);
    assert_int_equal(fd, -7);
}

static void the_default_directory_follows_the_environment(void **state)
{
    (void)state;
    char path[108], expected[108];
    assert_int_equal(setenv("ICECACHE_SOCKET_DIR", "/srv/ice", 1), 0);
    assert_int_equal(control_default_directory(path, sizeof(path)), ICE_OK);
    assert_string_equal(path, "/srv/ice");
    assert_int_equal(control_default_directory(path, 8), ICE_TOO_LARGE);
    assert_int_equal(control_default_directory(path, 9), ICE_OK);

    assert_int_equal(setenv("XDG_RUNTIME_DIR", "/run/user/7", 1), 0);
    assert_int_equal(setenv("ICECACHE_SOCKET_DIR", "", 1), 0); // empty counts as not set
    assert_int_equal(control_default_directory(path, sizeof(path)), ICE_OK);
    assert_string_equal(path, geteuid() == 0 ? "/run/icecache" : "/run/user/7/icecache");

    assert_int_equal(setenv("XDG_RUNTIME_DIR", "", 1), 0); // so does this one
    snprintf(expected, sizeof(expected), "/tmp/icecache-%lu", (unsigned long)geteuid());
    assert_int_equal(control_default_directory(path, sizeof(path)), ICE_OK);
    assert_string_equal(path, geteuid() == 0 ? "/run/icecache" : expected);

    assert_int_equal(unsetenv("XDG_RUNTIME_DIR"), 0);
    assert_int_equal(unsetenv("ICECACHE_SOCKET_DIR"), 0);
    assert_int_equal(control_default_directory(path, sizeof(path)), ICE_OK);
    assert_string_equal(path, geteuid() == 0 ? "/run/icecache" : expected);
}

#define TEST(name) cmocka_unit_test_setup_teardown(name, setup, teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        TEST(packets_keep_their_bounds),
        TEST(bad_sizes_are_not_sent),
        TEST(a_descriptor_travels),
        TEST(surplus_descriptors_are_closed),
        TEST(several_descriptors_arrive_in_order),
        TEST(a_refused_packet_leaves_no_descriptor),
        TEST(a_full_descriptor_table_is_told),
        TEST(the_end_of_the_peer_is_seen),
        TEST(a_reset_is_the_end_too),
        TEST(a_full_buffer_times_out),
        TEST(a_send_waits_for_room),
        TEST(signals_do_not_shorten_or_extend_a_wait),
        TEST(a_bad_socket_is_an_error),
        TEST(the_kernel_names_the_peer),
        TEST(connects_and_says_why_not),
        TEST(paths_fit_a_socket_address),
        TEST(the_default_directory_follows_the_environment),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
