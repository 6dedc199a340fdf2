// The daemon's memory: what pages the pool gets, what is refused at start, and that what it uses stays within what it
// was given.
#include "worker.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static uint64_t free_pages(void)
{
    unsigned long long number[2] = {0, 0};
    static const char *const names[] = {"free", "resv"};
    for (int i = 0; i < 2; i++) {
        char path[128];
        snprintf(path, sizeof path, "/sys/kernel/mm/hugepages/hugepages-2048kB/%s_hugepages", names[i]);
        FILE *file = fopen(path, "re");
        if (file && fscanf(file, "%llu", &number[i]) != 1)
            number[i] = 0;
        if (file)
            fclose(file);
    }
    return number[0] - number[1];
}

static void expect_start_refused(const struct daemon *daemon, const char *const *options, const char *const *texts)
{
    const char *arguments[CHILD_ARGUMENTS_MAX] = {daemon_path(), "--socket-dir", daemon->sockets};
    char output[8192];
    for (size_t i = 0; options[i]; i++)
        arguments[i + 3] = options[i];
    int status = child_run(arguments, output, sizeof output);
    if (status != 1)
        fail_msg("icecached %s exits with %d: %s", options[0], status, output);
    for (; *texts; texts++)
        assert_text(output, *texts);
}

#define LIST(...)                                                                                                      \
    (const char *const[])                                                                                              \
    {                                                                                                                  \
        __VA_ARGS__, NULL                                                                                              \
    }

// ---- huge pages ----

static void expect_kind(const struct daemon *daemon, const char *kind, uint64_t huge_bytes)
{
    json_t *stats = stats_read(daemon);
    assert_string_equal(json_string_value(json_object_get(stats, "huge_pages")), kind);
    assert_int_equal(stats_number(stats, "bytes.pool_huge"), huge_bytes);
    json_decref(stats);
}

static void huge_pages_off(void **state)
{
    struct daemon *daemon = *state;
    char text[8192];
    daemon->options =
        LIST("--pool-bytes", "64m", "--index-bytes", "16m", "--shared-bytes", "16m", "--huge-pages", "off");
    daemon_start(daemon);
    expect_kind(daemon, "none", 0);
    assert_int_equal(daemon_ctl(daemon, LIST("stats"), text, sizeof text), 0);
    assert_text(text, "huge pages none (0 B of 64.0 MiB)");
    daemon_read_log(daemon, text, sizeof text);
    assert_text(text, "pool: 64 MiB, huge pages: none (0/64 MiB)");
    assert_null(strstr(text, "vm.nr_hugepages")); // as it was wanted, nobody is told how to change it
}

static void huge_pages_preferred(void **state)
{
    struct daemon *daemon = *state;
    char text[8192];
    daemon->options = LIST("--pool-bytes", "64m", "--index-bytes", "16m", "--shared-bytes", "16m");
    daemon_start(daemon);
    json_t *stats = stats_read(daemon);
    const char *kind = json_string_value(json_object_get(stats, "huge_pages"));
    daemon_read_log(daemon, text, sizeof text);
    assert_text(text, kind); // the log names the same
    if (strcmp(kind, "hugetlb-2m") != 0)
        assert_text(text, "sysctl vm.nr_hugepages=");
    json_decref(stats);
}

static void huge_pages_required(void **state)
{
    struct daemon *daemon = *state;
    const char *const *options =
        LIST("--huge-pages", "require", "--pool-bytes", "64m", "--index-bytes", "16m", "--shared-bytes", "16m");
    if (free_pages() < 32) {
        expect_start_refused(daemon, options,
                             LIST("--huge-pages require: no reserved huge pages for --pool-bytes 67108864",
                                  "of 32 2 MiB pages free", "needed: 32 pages of 2 MiB; free: node0 ",
                                  "sysctl vm.nr_hugepages=", "--huge-pages prefer"));
    } else {
        daemon->options = options;
        daemon_start(daemon);
        expect_kind(daemon, "hugetlb-2m", 64u << 20);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        FOLDER_TEST(huge_pages_off),
        FOLDER_TEST(huge_pages_preferred),
        FOLDER_TEST(huge_pages_required),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
