// The byte budget at start: what fits, what is doubtful, what is refused and in which words, and that only defaults
// shrink.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "cached/memory_check.h"

#include <string.h>

#define MIB ((uint64_t)1 << 20)
#define GIB ((uint64_t)1 << 30)

static struct memory_limits limits;
static struct config config;
static char text[MEMORY_TEXT_BYTES];

static enum memory_verdict judge(void)
{
    return memory_judge(&limits, &config, text, sizeof text);
}

static void expect_text(const char *part)
{
    if (!strstr(text, part))
        fail_msg("'%s' is not in '%s'", part, text);
}

// A machine with all its memory free and no cgroup; 1 GiB for each share, as by default.
static int setup(void **state)
{
    (void)state;
    limits = (struct memory_limits){.ram_bytes = 8 * GIB, .available_bytes = 8 * GIB, .cgroup_bytes = MEMORY_UNKNOWN};
    config =
        (struct config){.pool_bytes = GIB, .index_bytes = GIB, .shared_bytes = GIB, .huge_pages = CONFIG_HUGE_PREFER};
    return 0;
}

static void give_all(void)
{
    config.given.pool_bytes = config.given.index_bytes = config.given.shared_bytes = true;
}

static void expect_shares(uint64_t pool, uint64_t index, uint64_t shared)
{
    assert_int_equal(config.pool_bytes, pool);
    assert_int_equal(config.index_bytes, index);
    assert_int_equal(config.shared_bytes, shared);
}

static void test_fits(void **state)
{
    (void)state;
    for (int given = 0; given < 2; given++) {
        assert_int_equal(judge(), MEMORY_FITS);
        assert_string_equal(text, "");
        expect_shares(GIB, GIB, GIB);
        give_all();
    }
    // To the byte.
    limits.ram_bytes = limits.available_bytes = 3 * GIB + MEMORY_FIXED_BYTES;
    assert_int_equal(judge(), MEMORY_FITS);
    limits.ram_bytes--;
    assert_int_equal(judge(), MEMORY_REFUSED);
    // Where nothing is known nothing is refused.
    limits.ram_bytes = limits.available_bytes = MEMORY_UNKNOWN;
    config.pool_bytes = config.index_bytes = config.shared_bytes = (uint64_t)1 << 46;
    assert_int_equal(judge(), MEMORY_FITS);
}

static void test_defaults_shrink(void **state)
{
    (void)state;
    limits.available_bytes = 2 * GIB;
    assert_int_equal(judge(), MEMORY_FITS);
    expect_shares(490 * MIB, 490 * MIB, 490 * MIB); // (3/4 of 2 GiB less 64 MiB) / 3, whole 2 MiB
    expect_text("less memory than the defaults take");
    expect_text("--pool-bytes 490 MiB");
    // What was named stays, the rest shares what is left.
    setup(state);
    limits.cgroup_bytes = GIB;
    strcpy(limits.cgroup_file, "/sys/fs/cgroup/memory.max");
    config.pool_bytes = 512 * MIB;
    config.given.pool_bytes = true;
    assert_int_equal(judge(), MEMORY_FITS);
    expect_shares(512 * MIB, 224 * MIB, 224 * MIB);
    // Too little to share.
    setup(state);
    limits.cgroup_bytes = 100 * MIB;
    assert_int_equal(judge(), MEMORY_REFUSED);
    expect_shares(GIB, GIB, GIB);
}

static void test_cgroup(void **state)
{
    (void)state;
    give_all();
    limits.cgroup_bytes = 2 * GIB;
    strcpy(limits.cgroup_file, "/sys/fs/cgroup/pod/memory.max");
    assert_int_equal(judge(), MEMORY_REFUSED);
    expect_shares(GIB, GIB, GIB);
    expect_text(
        "--pool-bytes 1024 MiB, --index-bytes 1024 MiB, --shared-bytes 1024 MiB and 64 MiB for the daemon itself "
        "are 3136 MiB; /sys/fs/cgroup/pod/memory.max has 2048 MiB");
    expect_text("Lower one of them");
    expect_text("--memory-check warn");
}

// Index and shared memory may grow into memory that others free; the pool is taken at once.
static void test_available(void **state)
{
    (void)state;
    give_all();
    limits.available_bytes = 2 * GIB;
    assert_int_equal(judge(), MEMORY_DOUBTFUL);
    expect_text("only 2048 MiB are available");
    limits.available_bytes = GIB - 1;
    assert_int_equal(judge(), MEMORY_REFUSED);
    expect_text("MemAvailable");
    limits.ram_bytes = 2 * GIB;
    assert_int_equal(judge(), MEMORY_REFUSED);
    expect_text("MemTotal less reserved huge pages) has 2048 MiB");
}

// A pool in reserved pages is neither in what is available nor charged to the cgroup.
static void test_reserved(void **state)
{
    (void)state;
    give_all();
    config.pool_bytes = 6 * GIB;
    limits.ram_bytes = limits.available_bytes = 3 * GIB;
    assert_int_equal(judge(), MEMORY_REFUSED);
    expect_text("reserve huge pages for the pool");
    limits.reserved_bytes = 6 * GIB - 1;
    assert_int_equal(judge(), MEMORY_REFUSED);
    limits.reserved_bytes = 6 * GIB;
    assert_int_equal(judge(), MEMORY_FITS);
    assert_int_equal(config.huge_pages, CONFIG_HUGE_REQUIRE); // or it would not fit
    expect_text("--huge-pages require");
    config.huge_pages = CONFIG_HUGE_OFF;
    assert_int_equal(judge(), MEMORY_REFUSED);
    // In pages of 1 GiB only as a whole number of them.
    config.huge_pages = CONFIG_HUGE_PREFER;
    limits.reserved_bytes = 0;
    limits.reserved_1g_bytes = 6 * GIB;
    assert_int_equal(judge(), MEMORY_FITS);
    config.huge_pages = CONFIG_HUGE_PREFER;
    config.pool_bytes -= 2 * MIB;
    assert_int_equal(judge(), MEMORY_REFUSED);
    // Where it fits either way, it may be either.
    config.pool_bytes = GIB;
    limits = (struct memory_limits){
        .ram_bytes = 4 * GIB, .available_bytes = 4 * GIB, .cgroup_bytes = MEMORY_UNKNOWN, .reserved_bytes = GIB};
    assert_int_equal(judge(), MEMORY_FITS);
    assert_int_equal(config.huge_pages, CONFIG_HUGE_PREFER);
    // Required pages are the pool's start to ask for; the rest must fit all the same.
    config.huge_pages = CONFIG_HUGE_REQUIRE;
    limits.reserved_bytes = 0;
    limits.ram_bytes = limits.available_bytes = 2 * GIB + MEMORY_FIXED_BYTES;
    assert_int_equal(judge(), MEMORY_FITS);
    limits.ram_bytes--;
    assert_int_equal(judge(), MEMORY_REFUSED);
    expect_text("(in reserved huge pages, not counted)");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup(test_fits, setup),     cmocka_unit_test_setup(test_defaults_shrink, setup),
        cmocka_unit_test_setup(test_cgroup, setup),   cmocka_unit_test_setup(test_available, setup),
        cmocka_unit_test_setup(test_reserved, setup),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
