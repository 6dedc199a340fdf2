// The host backend with a real memfd, seen through a worker's mapping, and with system calls that fail.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "gpu/driver.h"
#include "gpu/landing.h"
#include "gpu/store.h"
#include "proto/dtype.h"
#include "proto/limits.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

// Counts what is open, and fails the call that it is told to.
struct system_state {
    int fail_memfd, fail_map; // -errno, 0: succeed
    int fds, maps;
    uint64_t bytes;
};

static int real_memfd(void *owner, const char *name, uint64_t bytes, int *fd_out)
{
    struct system_state *state = owner;
    if (state->fail_memfd) {
        return state->fail_memfd;
    }
    const int fd = memfd_create(name, MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (fd < 0) {
        return -errno;
    }
    if (ftruncate(fd, (off_t)bytes) < 0 || fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) < 0) {
        const int error = -errno;
        close(fd);
        return error;
    }
    state->fds++;
    *fd_out = fd;
    return 0;
}

static int real_map(void *owner, int fd, uint64_t bytes, void **out)
{
    struct system_state *state = owner;
    if (state->fail_map) {
        return state->fail_map;
    }
    void *memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, 0);
    if (memory == MAP_FAILED) {
        return -errno;
    }
    state->maps++;
    state->bytes = bytes;
    *out = memory;
    return 0;
}

static void real_unmap(void *owner, void *memory, uint64_t bytes)
{
    struct system_state *state = owner;
    assert_int_equal(bytes, state->bytes);
    assert_int_equal(munmap(memory, bytes), 0);
    state->maps--;
}

static void real_close(void *owner, int fd)
{
    struct system_state *state = owner;
    assert_int_equal(close(fd), 0);
    state->fds--;
}

static struct gpu_system system_of(struct system_state *state)
{
    return (struct gpu_system){.memfd_create = real_memfd,
                               .map_shared = real_map,
                               .unmap = real_unmap,
                               .close_fd = real_close,
                               .owner = state};
}

static char text[CUDA_TEXT_BYTES]; // of a failed open

static const struct landing_shape shape = {
    .rows = 3, .layers = 2, .kv_heads = 4, .slots = 5, .head_dim = 16, .dtype = DTYPE_BF16};

// Cells are numbered row by row: 2 layers of 4 heads.
static const uint8_t *block_at(const struct landing_layout *layout, const uint8_t *seen, uint32_t cell)
{
    return seen + landing_block(layout, &shape, cell / 8, cell / 4 % 2);
}

static const uint32_t *counts_at(const struct landing_layout *layout, const uint8_t *seen, uint32_t cell)
{
    return (const void *)(block_at(layout, seen, cell) + layout->counts_offset);
}

static void selection_reaches_the_worker(void **unused)
{
    (void)unused;
    struct system_state state = {0};
    struct gpu_system system = system_of(&state);
    struct gpu_landing *landing = NULL;
    int fd = -1;
    assert_int_equal(gpu_host_ops.open(&system, &shape, NULL, &landing, &fd, text), ICE_OK);
    memset(&system, 0, sizeof(system)); // the landing keeps its own copy
    const struct landing_layout *layout = gpu_landing_layout(landing);
    assert_memory_equal(gpu_landing_shape(landing), &shape, sizeof(shape));
    const uint8_t *seen = mmap(NULL, layout->total_bytes, PROT_READ, MAP_SHARED, fd, 0);
    assert_ptr_not_equal(seen, MAP_FAILED);

    for (uint32_t cell = 0; cell < 24; cell++) {
        const uint32_t row = cell / 8, layer = cell / 4 % 2, head = cell % 4, count = cell % (shape.slots + 1);
        assert_int_equal(counts_at(layout, seen, cell)[head], 0);
        struct gpu_target target;
        gpu_host_ops.target(landing, row, layer, head, &target);
        memset(target.keys, (int)(cell + 1), layout->side_bytes);
        memset(target.values, (int)(cell + 101), layout->side_bytes);
        for (uint32_t slot = 0; slot < shape.slots; slot++) {
            target.positions[slot] = cell * 100 + slot;
        }
        gpu_host_ops.submit(landing, row, layer, head, count);
    }
    for (uint32_t cell = 0; cell < 24; cell++) { // no cell has written over another
        const uint32_t number = cell % 4;
        const uint8_t *block = block_at(layout, seen, cell), *head = block + number * layout->head_bytes;
        const uint32_t *positions = (const void *)(block + layout->positions_offset);
        assert_int_equal(counts_at(layout, seen, cell)[number], cell % (shape.slots + 1));
        for (uint64_t i = 0; i < layout->side_bytes; i++) {
            assert_int_equal(head[i], cell + 1);
            assert_int_equal(head[layout->side_bytes + i], cell + 101);
        }
        for (uint32_t slot = 0; slot < shape.slots; slot++) {
            assert_int_equal(positions[number * shape.slots + slot], cell * 100 + slot);
        }
    }

    assert_int_equal(munmap((void *)(uintptr_t)seen, layout->total_bytes), 0);
    gpu_host_ops.close(landing);
    assert_int_equal(state.maps, 0);
    assert_int_equal(state.fds, 1); // passed on: the caller's
    real_close(&state, fd);
}

static void clear_row_empties_that_row_only(void **unused)
{
    (void)unused;
    struct system_state state = {0};
    const struct gpu_system system = system_of(&state);
    struct gpu_landing *landing = NULL;
    int fd = -1;
    assert_int_equal(gpu_host_ops.open(&system, &shape, NULL, &landing, &fd, text), ICE_OK);
    const uint64_t bytes = gpu_landing_layout(landing)->total_bytes;
    const uint8_t *seen = mmap(NULL, bytes, PROT_READ, MAP_SHARED, fd, 0);
    assert_ptr_not_equal(seen, MAP_FAILED);
    const struct landing_layout *layout = gpu_landing_layout(landing);
    for (uint32_t cell = 0; cell < 24; cell++) {
        gpu_host_ops.submit(landing, cell / 8, cell / 4 % 2, cell % 4, shape.slots);
    }
    gpu_host_ops.clear_row(landing, 1);
    for (uint32_t cell = 0; cell < 24; cell++) {
        assert_int_equal(counts_at(layout, seen, cell)[cell % 4], cell / 8 == 1 ? 0 : shape.slots);
    }
    assert_int_equal(munmap((void *)(uintptr_t)seen, bytes), 0);
    gpu_host_ops.close(landing);
    real_close(&state, fd);
}

// Pull: a row has one block, for whichever layer its last retrieve was of.
static void a_staging_has_one_block_a_row(void **unused)
{
    (void)unused;
    struct system_state state = {0};
    const struct gpu_system system = system_of(&state);
    struct gpu_landing *landing = NULL;
    int fd = -1;
    assert_int_equal(gpu_pull_ops.open(&system, &shape, NULL, &landing, &fd, text), ICE_OK);
    const struct landing_layout *layout = gpu_landing_layout(landing);
    assert_int_equal(layout->total_bytes, 12288); // 6 blocks of 1536
    assert_int_equal(state.bytes, 8192 + 4096);   // 3 of them, and the timeline words
    uint8_t *places[3][2];
    for (uint32_t row = 0; row < 3; row++) {
        for (uint32_t layer = 0; layer < 2; layer++) {
            struct gpu_target target;
            gpu_pull_ops.target(landing, row, layer, 0, &target);
            places[row][layer] = target.keys;
            assert_true(target.store == store_streaming);
        }
        assert_ptr_equal(places[row][0], places[row][1]);
        assert_ptr_equal(places[row][0], places[0][0] + row * layout->block_bytes);
    }
    assert_null(gpu_pull_ops.copy);
    assert_null(gpu_host_ops.copy);
    assert_null(gpu_host_ops.signal);
    const uint64_t *words = mmap(NULL, 4096, PROT_READ, MAP_SHARED, fd, 8192);
    assert_true(words != MAP_FAILED);
    gpu_pull_ops.signal(landing, (const uint32_t[]){2, 0}, 2, 77);
    assert_int_equal(words[0], 77);
    assert_int_equal(words[1], 0);
    assert_int_equal(words[2], 77);
    assert_int_equal(munmap((void *)(uintptr_t)words, 4096), 0);
    gpu_pull_ops.close(landing);
    assert_int_equal(state.maps, 0);
    real_close(&state, fd);
}

// Rows of every size that a slot may have, to every place in the caches' lines that a slot may begin at.
static void stores_are_copies(void **unused)
{
    (void)unused;
    static _Alignas(64) uint8_t to[4096];
    static uint8_t from[2048];
    for (size_t i = 0; i < sizeof(from); i++) {
        from[i] = (uint8_t)(i * 7 + i / 256);
    }
    for (size_t bytes = 32; bytes <= 1024; bytes += 32) {
        for (size_t at = 0; at < 128; at += 32) {
            for (size_t odd = 0; odd < 3; odd++) {
                memset(to, 0xee, sizeof(to));
                store_streaming(to + 64 + at, from + odd, bytes);
                store_fence();
                assert_memory_equal(to + 64 + at, from + odd, bytes);
                assert_int_equal(to[64 + at - 1], 0xee);
                assert_int_equal(to[64 + at + bytes], 0xee);
            }
        }
    }
    memset(to, 0, sizeof(to));
    store_cached(to, from, 96);
    assert_memory_equal(to, from, 96);
}

static void a_worker_that_scribbles_harms_nobody(void **unused)
{
    (void)unused;
    struct system_state state = {0};
    const struct gpu_system system = system_of(&state);
    struct gpu_landing *landing = NULL;
    int fd = -1;
    assert_int_equal(gpu_host_ops.open(&system, &shape, NULL, &landing, &fd, text), ICE_OK);
    const uint64_t bytes = gpu_landing_layout(landing)->total_bytes;
    uint8_t *worker = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    assert_ptr_not_equal(worker, MAP_FAILED);
    struct gpu_target before, after;
    gpu_host_ops.target(landing, 2, 1, 3, &before);
    memset(worker, 0xff, bytes);
    gpu_host_ops.target(landing, 2, 1, 3, &after);
    assert_memory_equal(&before, &after, sizeof(before));
    gpu_host_ops.submit(landing, 2, 1, 3, 1);
    assert_int_equal(ftruncate(fd, 0), -1); // sealed: the daemon's stores cannot fault
    assert_int_equal(munmap(worker, bytes), 0);
    gpu_host_ops.close(landing);
    real_close(&state, fd);
}

static void failures_unwind(void **unused)
{
    (void)unused;
    static const struct {
        int memfd, map;
        ice_status status;
    } cases[] = {
        {-ENOMEM, 0, ICE_SHARED_FULL}, {-ENOSPC, 0, ICE_SHARED_FULL}, {-EMFILE, 0, ICE_SYSTEM},
        {0, -ENOMEM, ICE_SHARED_FULL}, {0, -ENOSPC, ICE_SHARED_FULL}, {0, -EPERM, ICE_SYSTEM},
    };
    for (size_t i = 0; i < sizeof(cases) / sizeof(cases[0]); i++) {
        struct system_state state = {.fail_memfd = cases[i].memfd, .fail_map = cases[i].map};
        const struct gpu_system system = system_of(&state);
        struct gpu_landing *landing = NULL;
        int fd = -7;
        assert_int_equal(gpu_host_ops.open(&system, &shape, NULL, &landing, &fd, text), cases[i].status);
        assert_null(landing);
        assert_int_equal(fd, -7);
        assert_int_equal(state.fds, 0);
        assert_int_equal(state.maps, 0);
    }
}

static void bad_shapes_make_no_call(void **unused)
{
    (void)unused;
    const struct gpu_system system = {0}; // any call would crash
    struct gpu_landing *landing = NULL;
    int fd = -7;
    struct landing_shape bad = shape;
    bad.slots = WIRE_SLOTS_MAX + 1;
    assert_int_equal(gpu_host_ops.open(&system, &bad, NULL, &landing, &fd, text), ICE_TOO_LARGE);
    assert_null(landing);
    assert_int_equal(fd, -7);
}

static void close_accepts_null(void **unused)
{
    (void)unused;
    gpu_host_ops.close(NULL);
}

// Our own bugs end the process, in release builds too.
static void a_cell_outside_the_shape_aborts(void **unused)
{
    (void)unused;
    struct system_state state = {0};
    const struct gpu_system system = system_of(&state);
    struct gpu_landing *landing = NULL;
    int fd = -1;
    assert_int_equal(gpu_host_ops.open(&system, &shape, NULL, &landing, &fd, text), ICE_OK);
    for (int i = 0; i < 5; i++) {
        const pid_t child = fork();
        assert_true(child >= 0);
        if (child == 0) {
            const struct rlimit no_core = {0};
            (void)setrlimit(RLIMIT_CORE, &no_core);
            (void)signal(SIGABRT, SIG_DFL);
            close(STDERR_FILENO);
            struct gpu_target target;
            switch (i) {
            case 0:
                gpu_host_ops.target(landing, shape.rows, 0, 0, &target);
                break;
            case 1:
                gpu_host_ops.target(landing, 0, shape.layers, 0, &target);
                break;
            case 2:
                gpu_host_ops.target(landing, 0, 0, shape.kv_heads, &target);
                break;
            case 3:
                gpu_host_ops.submit(landing, 0, 0, 0, shape.slots + 1);
                break;
            default:
                gpu_host_ops.clear_row(landing, shape.rows);
            }
            _exit(0);
        }
        int status = 0;
        assert_int_equal(waitpid(child, &status, 0), child);
        assert_true(WIFSIGNALED(status));
        assert_int_equal(WTERMSIG(status), SIGABRT);
    }
    gpu_host_ops.close(landing);
    real_close(&state, fd);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(selection_reaches_the_worker),
        cmocka_unit_test(clear_row_empties_that_row_only),
        cmocka_unit_test(a_staging_has_one_block_a_row),
        cmocka_unit_test(stores_are_copies),
        cmocka_unit_test(a_worker_that_scribbles_harms_nobody),
        cmocka_unit_test(failures_unwind),
        cmocka_unit_test(bad_shapes_make_no_call),
        cmocka_unit_test(close_accepts_null),
        cmocka_unit_test(a_cell_outside_the_shape_aborts),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
