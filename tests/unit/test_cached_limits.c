// What memory there is: /proc and /sys of machines and containers that this one is not.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "cached/memory_limits.h"

#include <ftw.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define MIB ((uint64_t)1 << 20)
#define GIB ((uint64_t)1 << 30)
#define V2  "/sys/fs/cgroup"
#define V1  "/sys/fs/cgroup/memory"

static struct env env;
static char root[64];
static struct memory_limits limits;

static int setup(void **state)
{
    (void)state;
    env_linux_init(&env);
    strcpy(root, "/tmp/icecache-limits-XXXXXX");
    env.system_root = mkdtemp(root);
    return env.system_root ? 0 : -1;
}

static int remove_one(const char *path, const struct stat *stat_of, int type, struct FTW *walk)
{
    (void)stat_of;
    (void)type;
    (void)walk;
    return remove(path);
}

static int teardown(void **state)
{
    (void)state;
    return nftw(root, remove_one, 8, FTW_DEPTH | FTW_PHYS);
}

static void put(const char *path, const char *text)
{
    char whole[512];
    snprintf(whole, sizeof whole, "%s%s", root, path);
    for (char *slash = strchr(whole + strlen(root) + 1, '/'); slash; slash = strchr(slash + 1, '/')) {
        *slash = '\0';
        mkdir(whole, 0700);
        *slash = '/';
    }
    FILE *file = fopen(whole, "we");
    assert_non_null(file);
    fputs(text, file);
    fclose(file);
}

static void expect_cgroup(uint64_t bytes, const char *file)
{
    memory_limits_read(&env, &limits);
    assert_true(limits.cgroup_bytes == bytes);
    assert_string_equal(limits.cgroup_file, file);
}

#define MEMINFO                                                                                                        \
    "MemTotal:       1048576 kB\nMemFree:         10 kB\nMemAvailable:    524288 kB\nHugePages_Total:     64\n"        \
    "Hugetlb:          131072 kB\n"
#define MOUNT_V2     "31 23 0:28 / " V2 " rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n"
#define MOUNT_OTHERS "22 1 8:1 / / rw - ext4 /dev/sda rw\n30 22 0:27 / /sys rw shared:7 - sysfs sysfs rw\n"
#define MOUNTS_HYBRID                                                                                                  \
    "32 31 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu,cpuacct\n"                                              \
    "35 31 0:32 / " V1 " rw,relatime - cgroup cgroup rw,memory\n"                                                      \
    "36 31 0:33 / /sys/fs/cgroup/hugetlb rw shared:3 master:1 - cgroup cgroup rw,hugetlb\n"                            \
    "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n"

static void test_nothing(void **state)
{
    (void)state;
    expect_cgroup(MEMORY_UNKNOWN, "");
    assert_true(limits.ram_bytes == MEMORY_UNKNOWN && limits.available_bytes == MEMORY_UNKNOWN);
    assert_int_equal(limits.reserved_bytes, 0);
    assert_int_equal(limits.reserved_1g_bytes, 0);
    // Files with other things in them than they should have.
    put("/proc/meminfo", "\n\nMemTotal\n:::");
    put("/proc/self/cgroup", "garbage\n0::");
    put("/proc/self/mountinfo", "a b c - d\n - \n1 2 3 4 5 6 - cgroup2\n");
    expect_cgroup(MEMORY_UNKNOWN, "");
    put("/proc/self/cgroup", "");
    expect_cgroup(MEMORY_UNKNOWN, "");
}

static void test_machine(void **state)
{
    (void)state;
    put("/proc/meminfo", MEMINFO);
    put("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages", "50\n");
    put("/sys/kernel/mm/hugepages/hugepages-2048kB/resv_hugepages", "10\n");
    put("/sys/kernel/mm/hugepages/hugepages-1048576kB/free_hugepages", "3\n");
    put("/sys/kernel/mm/hugepages/hugepages-1048576kB/resv_hugepages", "4\n"); // as if it changed in between
    memory_limits_read(&env, &limits);
    assert_int_equal(limits.ram_bytes, GIB - 128 * MIB);
    assert_int_equal(limits.available_bytes, 512 * MIB);
    assert_int_equal(limits.reserved_bytes, 80 * MIB);
    assert_int_equal(limits.reserved_1g_bytes, 0);
}

static void test_v2(void **state)
{
    (void)state;
    put("/proc/self/cgroup", "0::/system.slice/icecached.service\n");
    put("/proc/self/mountinfo", MOUNT_OTHERS MOUNT_V2);
    expect_cgroup(MEMORY_UNKNOWN, "");
    put(V2 "/system.slice/icecached.service/memory.max", "max\n");
    expect_cgroup(MEMORY_UNKNOWN, "");
    put(V2 "/system.slice/icecached.service/memory.max", "1073741824\n");
    expect_cgroup(GIB, V2 "/system.slice/icecached.service/memory.max");
    put(V2 "/system.slice/memory.max", "536870912\n"); // the level above is tighter
    expect_cgroup(512 * MIB, V2 "/system.slice/memory.max");
    put(V2 "/memory.max", "268435456\n"); // as in a container, whose root has a limit
    expect_cgroup(256 * MIB, V2 "/memory.max");
    put("/proc/self/cgroup", "0::/\n");
    expect_cgroup(256 * MIB, V2 "/memory.max");
    put("/proc/self/cgroup", "0::/../other\n"); // outside of what is mounted here
    expect_cgroup(256 * MIB, V2 "/memory.max");
}

// The mount shows a part of the hierarchy only.
static void test_container(void **state)
{
    (void)state;
    put("/proc/self/mountinfo", MOUNT_OTHERS "31 23 0:28 /docker/abc " V2 " ro - cgroup2 cgroup rw\n");
    put("/proc/self/cgroup", "0::/docker/abc/worker\n");
    put(V2 "/worker/memory.max", "4194304\n");
    put(V2 "/memory.max", "8388608\n");
    expect_cgroup(4 * MIB, V2 "/worker/memory.max");
    put("/proc/self/cgroup", "0::/docker/abc\n");
    expect_cgroup(8 * MIB, V2 "/memory.max");
    put("/proc/self/cgroup", "0::/docker/abcdef/worker\n"); // another one's, whose name begins alike
    expect_cgroup(8 * MIB, V2 "/memory.max");
}

static void test_v1(void **state)
{
    (void)state;
    put("/proc/self/mountinfo", MOUNT_OTHERS MOUNTS_HYBRID);
    put("/proc/self/cgroup", "9:name=systemd:/\n5:cpu,cpuacct:/x\n4:memory:/a/b\n3:hugetlb:/h\n0::/\n");
    put(V1 "/a/b/memory.limit_in_bytes", "9223372036854771712\n");
    put(V1 "/memory.limit_in_bytes", "9223372036854771712\n");
    expect_cgroup(MEMORY_UNKNOWN, "");
    put(V1 "/a/memory.limit_in_bytes", "2147483648\n");
    expect_cgroup(2 * GIB, V1 "/a/memory.limit_in_bytes");
    put("/sys/fs/cgroup/unified/memory.max", "1048576\n"); // both are looked at
    expect_cgroup(MIB, "/sys/fs/cgroup/unified/memory.max");
    // Controllers are whole words.
    put("/proc/self/cgroup", "4:memoryx,xmemory:/a/b\n");
    expect_cgroup(MEMORY_UNKNOWN, "");
}

// Free reserved pages that the cgroup does not let us have are none.
static void test_reserved(void **state)
{
    (void)state;
    put("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages", "1024\n");
    put("/sys/kernel/mm/hugepages/hugepages-1048576kB/free_hugepages", "4\n");
    put("/proc/self/cgroup", "3:hugetlb:/h\n0::/x\n");
    put("/proc/self/mountinfo", MOUNT_OTHERS MOUNT_V2);
    memory_limits_read(&env, &limits);
    assert_int_equal(limits.reserved_bytes, 2 * GIB);
    put(V2 "/x/hugetlb.2MB.max", "1073741824\n");
    put(V2 "/x/hugetlb.2MB.current", "104857600\n");
    put(V2 "/x/hugetlb.1GB.max", "0\n");
    memory_limits_read(&env, &limits);
    assert_int_equal(limits.reserved_bytes, GIB - 100 * MIB);
    assert_int_equal(limits.reserved_1g_bytes, 0);
    put(V2 "/hugetlb.2MB.rsvd.max", "209715200\n");
    memory_limits_read(&env, &limits);
    assert_int_equal(limits.reserved_bytes, 200 * MIB);
    put("/proc/self/mountinfo", MOUNT_OTHERS MOUNTS_HYBRID);
    put("/sys/fs/cgroup/hugetlb/h/hugetlb.2MB.limit_in_bytes", "2097152\n");
    put("/sys/fs/cgroup/hugetlb/h/hugetlb.2MB.usage_in_bytes", "4194304\n");
    memory_limits_read(&env, &limits);
    assert_int_equal(limits.reserved_bytes, 0);
}

#define LIMITS_TEST(function) cmocka_unit_test_setup_teardown(function, setup, teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        LIMITS_TEST(test_nothing),   LIMITS_TEST(test_machine), LIMITS_TEST(test_v2),
        LIMITS_TEST(test_container), LIMITS_TEST(test_v1),      LIMITS_TEST(test_reserved),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
