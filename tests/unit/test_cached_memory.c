// Regions of the real table: the ladder of page sizes, what is said where a rung gives nothing, populating in parallel,
// and that it can be stopped.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "cached/env_linux.h"

#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define MIB ((uint64_t)1 << 20)

static struct env env;
static struct env_region region;

static int map(uint64_t bytes, uint32_t rungs, const struct env_watch *watch)
{
    const struct env_region_request request = {.bytes = bytes, .rungs = rungs, .node = ENV_NODE_ANY, .watch = watch};
    return env.map_region(&env, &request, &region);
}

static int setup(void **state)
{
    (void)state;
    env_linux_init(&env);
    return 0;
}

static uint64_t number_in(const char *path)
{
    unsigned long long number = 0;
    FILE *file = fopen(path, "re");
    if (file && fscanf(file, "%llu", &number) != 1)
        number = 0;
    if (file)
        fclose(file);
    return number;
}

static void expect_reason(const char *part)
{
    if (!strstr(region.reasons, part))
        fail_msg("'%s' is not in '%s'", part, region.reasons);
}

static void expect_zero_and_there(void)
{
    const uint64_t pages = region.bytes / 4096;
    unsigned char *resident = malloc(pages);
    assert_non_null(resident);
    assert_int_equal(mincore(region.base, region.bytes, resident), 0);
    for (uint64_t i = 0; i < pages; i++) {
        assert_true(resident[i] & 1);
        assert_int_equal(((uint8_t *)region.base)[i * 4096 + 4095], 0);
    }
    free(resident);
}

static void test_best(void **state)
{
    (void)state;
    const uint64_t bytes = 200 * MIB;
    assert_int_equal(map(bytes, ENV_RUNGS_ALL, NULL), 0);
    assert_int_equal(region.bytes, bytes);
    assert_int_equal((uintptr_t)region.base % (2 * MIB), 0);
    assert_true((region.kind == ENV_HUGE_NONE) == (region.huge_bytes == 0));
    assert_true(region.huge_bytes <= bytes);
    if (region.kind > ENV_HUGE_HUGETLB_1G)
        expect_reason("1 GiB pages: 200 MiB are no whole number of them");
    expect_zero_and_there();
    memset(region.base, 1, bytes);
    env.unmap_region(&env, &region);
    assert_null(region.base);
    env.unmap_region(&env, &region);
}

static void test_too_much(void **state)
{
    (void)state;
    assert_true(map((uint64_t)1 << 60, ENV_RUNGS_ALL, NULL) < 0);
    assert_null(region.base);
    assert_true(map(~(2 * MIB - 1), ENV_RUNGS_ALL, NULL) < 0);
    assert_null(region.base);
}

static void test_small_pages(void **state)
{
    (void)state;
    assert_int_equal(map(8 * MIB, ENV_RUNG(ENV_HUGE_NONE), NULL), 0);
    assert_int_equal(region.kind, ENV_HUGE_NONE);
    assert_int_equal(region.huge_bytes, 0);
    assert_int_equal((uintptr_t)region.base % (2 * MIB), 0);
    assert_string_equal(region.reasons, "");
    expect_zero_and_there();
    env.unmap_region(&env, &region);
}

// Reserved pages only: all of it or nothing, and the reason has numbers.
static void test_reserved(void **state)
{
    (void)state;
    const char *folder = "/sys/kernel/mm/hugepages/hugepages-2048kB";
    char path[128];
    snprintf(path, sizeof path, "%s/free_hugepages", folder);
    uint64_t free_pages = number_in(path);
    snprintf(path, sizeof path, "%s/resv_hugepages", folder);
    free_pages -= number_in(path);
    if (map(8 * MIB, ENV_RUNGS_RESERVED, NULL) == 0) {
        assert_int_equal(region.kind, ENV_HUGE_HUGETLB_2M);
        assert_int_equal(region.huge_bytes, 8 * MIB);
        expect_zero_and_there();
        env.unmap_region(&env, &region);
    } else {
        assert_null(region.base);
        assert_true(free_pages < 4);
    }
    // More than there can be.
    char expected[64];
    assert_true(map((uint64_t)1 << 46, ENV_RUNGS_RESERVED, NULL) < 0);
    assert_null(region.base);
    snprintf(expected, sizeof expected, "%llu of 33554432 2 MiB pages free", (unsigned long long)free_pages);
    expect_reason(expected);
    expect_reason("of 65536 1 GiB pages free; ");
}

static bool kernel_collapses(void)
{
    const uint64_t bytes = 4 * MIB;
    uint8_t *raw = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    assert_true(raw != MAP_FAILED);
    uint8_t *aligned = raw + (2 * MIB - (uintptr_t)raw % (2 * MIB)) % (2 * MIB);
    memset(aligned, 1, 2 * MIB);
    bool does = madvise(aligned, 2 * MIB, 25) == 0;
    munmap(raw, bytes);
    return does;
}

static void test_collapsed(void **state)
{
    (void)state;
    if (!kernel_collapses()) {
        print_message("skipped: this kernel has no MADV_COLLAPSE, or no free huge page\n");
        skip();
    }
    assert_int_equal(map(16 * MIB, ENV_RUNG(ENV_HUGE_COLLAPSED) | ENV_RUNG(ENV_HUGE_NONE), NULL), 0);
    assert_true(region.huge_bytes > 0);
    assert_true(region.kind == ENV_HUGE_COLLAPSED || region.kind == ENV_HUGE_TRANSPARENT); // that where it is "always"
    expect_zero_and_there();
    env.unmap_region(&env, &region);
}

// Not inherited, not dumped; an overrun on either side is caught.
static void test_private(void **state)
{
    (void)state;
    char line[256], flags[256] = "";
    unsigned long long from, to;
    bool inside = false;
    int pipes[2];
    assert_int_equal(map(4 * MIB, ENV_RUNGS_ALL & ~ENV_RUNGS_RESERVED, NULL), 0);
    FILE *file = fopen("/proc/self/smaps", "re");
    assert_non_null(file);
    while (fgets(line, sizeof line, file)) {
        if (sscanf(line, "%llx-%llx ", &from, &to) == 2)
            inside = (uintptr_t)from == (uintptr_t)region.base;
        if (inside && strncmp(line, "VmFlags:", 8) == 0)
            strcpy(flags, line);
    }
    fclose(file);
    assert_non_null(strstr(flags, " dc")); // not copied into a child
    assert_non_null(strstr(flags, " dd"));
    assert_int_equal(pipe2(pipes, O_CLOEXEC), 0);
    const uint8_t *base = region.base;
    assert_int_equal(write(pipes[1], base + region.bytes - 1, 1), 1);
    assert_int_equal(write(pipes[1], base + region.bytes, 1), -1);
    assert_int_equal(errno, EFAULT);
    assert_int_equal(write(pipes[1], base - 1, 1), -1);
    close(pipes[0]);
    close(pipes[1]);
    env.unmap_region(&env, &region);
}

// Node 0 is there on every machine, another one with this number on none.
static void test_nodes(void **state)
{
    (void)state;
    int ids[ENV_NODES_MAX];
    const uint32_t count = env.nodes(&env, ids, ENV_NODES_MAX);
    assert_true(count <= ENV_NODES_MAX);
    struct env_region_request request = {.bytes = 200 * MIB, .rungs = ENV_RUNGS_ALL};
    for (uint32_t i = 0; i < count; i++) {
        request.node = ids[i];
        assert_int_equal(env.map_region(&env, &request, &region), 0);
        assert_int_equal(region.node, ids[i]);
        assert_int_equal(region.node_bytes, request.bytes); // as numa_maps has it
        assert_null(strstr(region.reasons, "not placed"));
        expect_zero_and_there();
        env.unmap_region(&env, &region);
    }
    request.node = 1000;
    assert_int_equal(env.map_region(&env, &request, &region), 0);
    expect_reason("not placed on node1000");
    assert_int_equal(region.node_bytes, 0);
    expect_zero_and_there();
    env.unmap_region(&env, &region);
}

// ---- a kernel that takes far too long ----

static _Atomic uint64_t fake_ns;

static uint64_t slow_clock(struct env *owner)
{
    (void)owner;
    return atomic_fetch_add(&fake_ns, 10000000000u); // ten seconds between two looks
}

static void test_slow(void **state)
{
    (void)state;
    const uint32_t rungs = ENV_RUNGS_ALL & ~ENV_RUNGS_RESERVED;
    env.now_ns = slow_clock;
    assert_int_equal(map(192 * MIB, rungs, NULL), 0);
    expect_reason("transparent pages were given up");
    assert_null(strstr(region.reasons, "collapsing")); // not tried any more
    assert_true(region.huge_bytes <= 64 * MIB);        // the first step's
    expect_zero_and_there();
    env.unmap_region(&env, &region);
    // Collapsing is given up in the same way, what is there stays.
    assert_int_equal(map(192 * MIB, rungs & ~ENV_RUNG(ENV_HUGE_TRANSPARENT), NULL), 0);
    if (region.huge_bytes < region.bytes)
        expect_reason("collapsing was given up");
    expect_zero_and_there();
    env.unmap_region(&env, &region);
}

// ---- stopping ----

struct count {
    uint32_t calls, calls_max;
    uint64_t done;
};

static bool count_down(void *owner, uint64_t done_bytes)
{
    struct count *count = owner;
    if (count->calls > 0 && done_bytes < count->done)
        return false;
    count->done = done_bytes;
    return ++count->calls < count->calls_max;
}

static void test_watch(void **state)
{
    (void)state;
    struct count count = {.calls_max = UINT32_MAX};
    const struct env_watch watch = {count_down, &count};
    assert_int_equal(map(200 * MIB, ENV_RUNG(ENV_HUGE_NONE), &watch), 0);
    assert_true(count.calls >= 2);
    assert_true(count.done >= 64 * MIB);
    env.unmap_region(&env, &region);
    for (uint32_t calls = 1; calls <= 2; calls++) {
        count = (struct count){.calls_max = calls};
        assert_int_equal(map(200 * MIB, ENV_RUNGS_ALL, &watch), -ECANCELED);
        assert_null(region.base);
        assert_int_equal(count.calls, calls);
        assert_true(count.done <= 64 * MIB);
    }
}

// A page that cannot be had is an error, not a signal, whichever thread meets it.
static void test_hole(void **state)
{
    (void)state;
    const uint64_t bytes = 320 * MIB;
    bool slow;
    uint8_t *base = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    assert_true(base != MAP_FAILED);
    const uint64_t holes[] = {0, 300 * MIB};
    for (int i = 0; i < 2; i++) {
        assert_int_equal(mprotect(base + holes[i], 4096, PROT_NONE), 0);
        const struct populate what = {&env, base, bytes, 4096, ENV_NODE_ANY, POPULATE_PLAIN, NULL};
        assert_true(populate_run(&what, &slow) < 0);
        assert_int_equal(mprotect(base + holes[i], 4096, PROT_READ | PROT_WRITE), 0);
    }
    const struct populate what = {&env, base, bytes, 4096, ENV_NODE_ANY, POPULATE_PLAIN, NULL};
    assert_int_equal(populate_run(&what, &slow), 0);
    munmap(base, bytes);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup(test_best, setup),        cmocka_unit_test_setup(test_too_much, setup),
        cmocka_unit_test_setup(test_small_pages, setup), cmocka_unit_test_setup(test_reserved, setup),
        cmocka_unit_test_setup(test_collapsed, setup),   cmocka_unit_test_setup(test_private, setup),
        cmocka_unit_test_setup(test_slow, setup),        cmocka_unit_test_setup(test_watch, setup),
        cmocka_unit_test_setup(test_hole, setup),        cmocka_unit_test_setup(test_nodes, setup),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
