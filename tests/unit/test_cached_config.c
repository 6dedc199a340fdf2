// Options: defaults, environment, arguments in that order, what is refused and how, and that the help knows them all.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "cached/config.h"

#include <stdlib.h>
#include <string.h>

static struct config config;
static char text[256];

static enum config_outcome read_options(const char *const *options)
{
    const char *arguments[16] = {"icecached"};
    int count = 1;
    while (options && *options)
        arguments[count++] = *options++;
    text[0] = '\0';
    return config_read(&config, count, (char *const *)(uintptr_t)arguments, text, sizeof text);
}
#define READ(...) read_options((const char *const[]){__VA_ARGS__, NULL})

static void test_sizes(void **state)
{
    (void)state;
    static const struct {
        const char *text;
        uint64_t bytes;
    } good[] = {{"0", 0},
                {"7", 7},
                {"1k", 1024},
                {"3K", 3072},
                {"2m", 2u << 20},
                {"2MiB", 2u << 20},
                {"1g", 1u << 30},
                {"1gb", 1u << 30},
                {"4t", 4ull << 40},
                {"16777215t", 16777215ull << 40},
                {"18446744073709551615", UINT64_MAX}};
    static const char *const bad[] = {
        "", "k", "-1", " 1", "1x", "1kk", "1.5g", "1k ", "16777216t", "1kib1", "0x", "+1", "18446744073709551616"};
    uint64_t bytes;
    for (unsigned i = 0; i < sizeof good / sizeof *good; i++) {
        assert_true(config_parse_size(good[i].text, &bytes));
        assert_true(bytes == good[i].bytes);
    }
    for (unsigned i = 0; i < sizeof bad / sizeof *bad; i++)
        assert_false(config_parse_size(bad[i], &bytes));
}

static void test_defaults(void **state)
{
    (void)state;
    assert_int_equal(read_options(NULL), CONFIG_RUN);
#define EXPECT_DEFAULT(field, flag, type, initial, min, max, help) assert_true(config.field == (initial));
    CONFIG_NUMBERS(EXPECT_DEFAULT)
#undef EXPECT_DEFAULT
    assert_string_equal(config.log_level, "info");
    assert_true(config.socket_directory[0] == '/');
}

// The flag wins over the environment, which wins over the default; also for the options that are texts.
static void test_order(void **state)
{
    (void)state;
    setenv("ICECACHE_POOL_BYTES", "32m", 1);
    setenv("ICECACHE_LOG_LEVEL", "warn", 1);
    setenv("ICECACHE_SOCKET_DIR", "/tmp/from-environment", 1);
    assert_int_equal(read_options(NULL), CONFIG_RUN);
    assert_int_equal(config.pool_bytes, 32 << 20);
    assert_string_equal(config.log_level, "warn");
    assert_string_equal(config.socket_directory, "/tmp/from-environment");
    assert_int_equal(READ("--pool-bytes", "64m", "--log-level=debug", "--socket-dir", "/tmp/x"), CONFIG_RUN);
    assert_int_equal(config.pool_bytes, 64 << 20);
    assert_string_equal(config.log_level, "debug");
    assert_string_equal(config.socket_directory, "/tmp/x");
    setenv("ICECACHE_POOL_BYTES", "many", 1);
    assert_int_equal(read_options(NULL), CONFIG_ERROR);
    assert_non_null(strstr(text, "--pool-bytes"));
    assert_non_null(strstr(text, "many"));
    assert_non_null(strstr(text, "ICECACHE_POOL_BYTES"));
    unsetenv("ICECACHE_POOL_BYTES");
    unsetenv("ICECACHE_LOG_LEVEL");
    unsetenv("ICECACHE_SOCKET_DIR");
}

// Every option by its flag and its variable, at both ends of its range and beyond.
static void expect_range(const char *flag, size_t offset, uint64_t min, uint64_t max, bool octal)
{
    char option[64], value[64], name[64] = "ICECACHE_";
    snprintf(option, sizeof option, "--%s", flag);
    for (size_t i = 0; i <= strlen(flag); i++)
        name[9 + i] = flag[i] == '-' ? '_' : flag[i] >= 'a' && flag[i] <= 'z' ? (char)(flag[i] - 32) : flag[i];
    const uint64_t good[] = {min, max};
    for (int i = 0; i < 2; i++) {
        uint64_t got;
        snprintf(value, sizeof value, octal ? "%lo" : "%lu", good[i]);
        assert_int_equal(READ(option, value), CONFIG_RUN);
        memcpy(&got, (char *)&config + offset, sizeof got);
        assert_true(got == good[i]);
        setenv(name, value, 1);
        assert_int_equal(read_options(NULL), CONFIG_RUN);
        memcpy(&got, (char *)&config + offset, sizeof got);
        assert_true(got == good[i]);
        unsetenv(name);
    }
    snprintf(value, sizeof value, octal ? "%lo" : "%lu", max + 1);
    assert_int_equal(READ(option, value), CONFIG_ERROR);
    assert_non_null(strstr(text, option));
    assert_non_null(strstr(text, value));
    if (min > 0) {
        snprintf(value, sizeof value, octal ? "%lo" : "%lu", min - 1);
        assert_int_equal(READ(option, value), CONFIG_ERROR);
    }
    assert_int_equal(READ(option, "-1"), CONFIG_ERROR);
    assert_int_equal(READ(option, ""), CONFIG_ERROR);
    assert_int_equal(READ(option, "1z"), CONFIG_ERROR);
    assert_int_equal(READ(option), CONFIG_ERROR);
    assert_non_null(strstr(text, "needs a value"));
}

static void test_ranges(void **state)
{
    (void)state;
#define EXPECT_RANGE(field, flag, type, initial, min, max, help)                                                       \
    expect_range(flag, offsetof(struct config, field), min, max, strcmp(#type, "OCTAL") == 0);
    CONFIG_NUMBERS(EXPECT_RANGE)
#undef EXPECT_RANGE
}

static void test_choices(void **state)
{
    (void)state;
    assert_int_equal(read_options(NULL), CONFIG_RUN);
    assert_int_equal(config.huge_pages, CONFIG_HUGE_PREFER);
    assert_int_equal(READ("--huge-pages", "require"), CONFIG_RUN);
    assert_int_equal(config.huge_pages, CONFIG_HUGE_REQUIRE);
    assert_int_equal(READ("--huge-pages=prefer"), CONFIG_RUN);
    assert_int_equal(config.huge_pages, CONFIG_HUGE_PREFER);
    setenv("ICECACHE_HUGE_PAGES", "require", 1);
    assert_int_equal(READ("--huge-pages", "off"), CONFIG_RUN); // the flag wins
    assert_int_equal(config.huge_pages, CONFIG_HUGE_OFF);
    assert_int_equal(read_options(NULL), CONFIG_RUN);
    assert_int_equal(config.huge_pages, CONFIG_HUGE_REQUIRE);
    setenv("ICECACHE_HUGE_PAGES", "yes", 1);
    assert_int_equal(read_options(NULL), CONFIG_ERROR);
    assert_non_null(strstr(text, "ICECACHE_HUGE_PAGES"));
    unsetenv("ICECACHE_HUGE_PAGES");
    static const char *const bad[] = {"", "req", "requires", "prefer|off", "|", "Off", "1"};
    for (unsigned i = 0; i < sizeof bad / sizeof *bad; i++) {
        assert_int_equal(READ("--huge-pages", bad[i]), CONFIG_ERROR);
        assert_non_null(strstr(text, "is none of require|prefer|off"));
    }
    assert_int_equal(READ("--huge-pages"), CONFIG_ERROR);
    assert_non_null(strstr(text, "needs a value"));
}

// Who asks must know a value that was named from a default that happens to be equal.
static void test_given(void **state)
{
    (void)state;
    assert_int_equal(read_options(NULL), CONFIG_RUN);
    assert_false(config.given.pool_bytes || config.given.index_bytes);
    setenv("ICECACHE_INDEX_BYTES", "1g", 1);
    assert_int_equal(READ("--pool-bytes", "1g"), CONFIG_RUN);
    assert_true(config.given.pool_bytes && config.given.index_bytes);
    assert_false(config.given.shared_bytes);
    unsetenv("ICECACHE_INDEX_BYTES");
}

static void test_refusals(void **state)
{
    (void)state;
    char longest[200];
    memset(longest, 'x', sizeof longest);
    longest[sizeof longest - 1] = '\0';
    assert_int_equal(READ("--nonsense", "1"), CONFIG_ERROR);
    assert_non_null(strstr(text, "--nonsense"));
    assert_int_equal(READ("--shards", "1k"), CONFIG_ERROR);
    assert_null(strstr(text, "k, m, g")); // a count is no size
    assert_int_equal(READ("stray"), CONFIG_ERROR);
    assert_non_null(strstr(text, "stray"));
    assert_int_equal(READ("--socket-dir", longest), CONFIG_ERROR);
    assert_int_equal(READ("--log-level", longest), CONFIG_ERROR);
    assert_int_equal(READ("--help"), CONFIG_HELP);
    assert_int_equal(READ("-h"), CONFIG_HELP);
    assert_int_equal(READ("--version"), CONFIG_VERSION);
}

static void expect_quota(const struct config_quota *quota, const char *name, uint64_t ram, uint64_t disk,
                         uint64_t sequences)
{
    assert_string_equal(quota->name_space, name);
    assert_true(quota->ram_bytes == ram && quota->disk_bytes == disk && quota->sequences == sequences);
}

static void test_quotas(void **state)
{
    (void)state;
    assert_int_equal(read_options(NULL), CONFIG_RUN);
    assert_int_equal(config.quota_count, 0);
    expect_quota(&config.quota_default, "", 0, 0, 0);
    setenv("ICECACHE_QUOTA", "a:ram=1g;b:disk=2m", 1);
    assert_int_equal(READ("--quota", "c:d:ram=3k,disk=4t,sequences=5", "--quota", "a:sequences=7"), CONFIG_RUN);
    assert_int_equal(config.quota_count, 3);
    expect_quota(&config.quotas[0], "a", 0, 0, 7); // the later one, whole
    expect_quota(&config.quotas[1], "b", 0, 2u << 20, 0);
    expect_quota(&config.quotas[2], "c:d", 3u << 10, 4ull << 40, 5);
    setenv("ICECACHE_QUOTA", "a:", 1);
    assert_int_equal(read_options(NULL), CONFIG_ERROR);
    assert_non_null(strstr(text, "ICECACHE_QUOTA"));
    unsetenv("ICECACHE_QUOTA");
    setenv("ICECACHE_QUOTA_DEFAULT", "sequences=3", 1);
    assert_int_equal(read_options(NULL), CONFIG_RUN);
    expect_quota(&config.quota_default, "", 0, 0, 3);
    assert_int_equal(READ("--quota-default", "ram=1m"), CONFIG_RUN);
    expect_quota(&config.quota_default, "", 1u << 20, 0, 0);
    unsetenv("ICECACHE_QUOTA_DEFAULT");
}

static void test_bad_quotas(void **state)
{
    (void)state;
    static const char *const bad[] = {"",
                                      "a",
                                      ":ram=1",
                                      "a:",
                                      "a:ram",
                                      "a:ram=",
                                      "a:ram=0",
                                      "a:ram=-1",
                                      "a:ram=x",
                                      "a:rams=1",
                                      "a:ram=1,",
                                      "a:,ram=1",
                                      "a:ram=1;",
                                      "a:ram=1 ",
                                      "a:ram=1,cpu=2",
                                      "ram=1",
                                      "a:sequences=1048577",
                                      "a:ram=65t",
                                      "a:ram=99999999999999999999999999999999"};
    for (unsigned i = 0; i < sizeof bad / sizeof *bad; i++) {
        assert_int_equal(READ("--quota", bad[i]), CONFIG_ERROR);
        assert_non_null(strstr(text, "--quota"));
    }
    assert_int_equal(READ("--quota-default", "a:ram=1"), CONFIG_ERROR);
    assert_non_null(strstr(text, "--quota-default: 'a:ram=1' is no part of a quota"));
    assert_int_equal(READ("--quota"), CONFIG_ERROR);
    assert_non_null(strstr(text, "needs a value"));
    char longest[200];
    memset(longest, 'x', sizeof longest);
    strcpy(longest + 128, ":ram=1");
    assert_int_equal(READ("--quota", longest), CONFIG_RUN);
    memset(longest, 'x', 129);
    strcpy(longest + 129, ":ram=1");
    assert_int_equal(READ("--quota", longest), CONFIG_ERROR);
    assert_non_null(strstr(text, "more than 128 bytes"));
    char many[65 * 16] = "";
    for (int i = 0; i < 65; i++)
        snprintf(many + strlen(many), sizeof many - strlen(many), "%sn%d:ram=1", i ? ";" : "", i);
    assert_int_equal(READ("--quota", many), CONFIG_ERROR);
    assert_non_null(strstr(text, "more than 64 namespaces; use --quota-default"));
    *strrchr(many, ';') = '\0';
    assert_int_equal(READ("--quota", many), CONFIG_RUN);
    assert_int_equal(config.quota_count, CONFIG_QUOTAS_MAX);
}

static void test_help(void **state)
{
    (void)state;
    char *help = NULL;
    size_t bytes;
    FILE *file = open_memstream(&help, &bytes);
    assert_non_null(file);
    config_print_help(file);
    fclose(file);
#define EXPECT_HELP(field, flag, type, initial, min, max, text) assert_non_null(strstr(help, "  --" flag " "));
    CONFIG_NUMBERS(EXPECT_HELP)
#undef EXPECT_HELP
    assert_non_null(strstr(help, "  --huge-pages "));
    assert_non_null(strstr(help, "(default prefer)"));
    assert_non_null(strstr(help, "--socket-dir"));
    assert_non_null(strstr(help, "--log-level"));
    assert_non_null(strstr(help, "--quota NAME:"));
    assert_non_null(strstr(help, "--quota-default "));
    assert_non_null(strstr(help, "--version"));
    free(help);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_sizes),    cmocka_unit_test(test_defaults), cmocka_unit_test(test_order),
        cmocka_unit_test(test_ranges),   cmocka_unit_test(test_choices),  cmocka_unit_test(test_given),
        cmocka_unit_test(test_refusals), cmocka_unit_test(test_quotas),   cmocka_unit_test(test_bad_quotas),
        cmocka_unit_test(test_help),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
