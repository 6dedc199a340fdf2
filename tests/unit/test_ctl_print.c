// What icecachectl prints for replies that no test daemon gives: a disk in every state, lists in several parts.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "cached/ctl_print.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define TEXT(words) ((char *)(uintptr_t)(words)) // the generated fields are not const

// What a printer writes to stdout; the caller frees it.
static char *printed(void (*print)(Icecache__Wire__Reply *const *, size_t), Icecache__Wire__Reply *const *parts,
                     size_t count)
{
    char *text = NULL;
    size_t bytes;
    FILE *screen = stdout;
    stdout = open_memstream(&text, &bytes);
    assert_non_null(stdout);
    print(parts, count);
    assert_int_equal(fclose(stdout), 0);
    stdout = screen;
    return text;
}

static void expect(char *text, const char *words)
{
    if (!strstr(text, words))
        fail_msg("no \"%s\" in: %s", words, text);
}

static void statistics_show_the_disk(void **state)
{
    (void)state;
    Icecache__Wire__Reply reply = ICECACHE__WIRE__REPLY__INIT, *const parts[] = {&reply};
    Icecache__Wire__StatsReply stats = ICECACHE__WIRE__STATS_REPLY__INIT;
    Icecache__Wire__SpillStats spill = ICECACHE__WIRE__SPILL_STATS__INIT;
    reply.body_case = ICECACHE__WIRE__REPLY__BODY_STATS;
    reply.stats = &stats;
    char *text = printed(ctl_print_table, parts, 1);
    assert_null(strstr(text, "spill"));
    free(text);
    text = printed(ctl_print_json, parts, 1);
    assert_null(strstr(text, "spill"));
    free(text);

    stats.spill = &spill;
    spill.engine = TEXT("io_uring");
    spill.direct = 1;
    spill.bytes = 3u << 20;
    spill.capacity_bytes = 12u << 20;
    spill.pages_read = 11;
    spill.pages_written = 12;
    spill.pages_evicted = 13;
    spill.pages_lost = 14;
    spill.write_errors = 15;
    spill.in_flight = 16;
    spill.waiting = 17;
    spill.prefixes = 18;
    spill.hibernated = 19;
    spill.ahead = 20;
    spill.ahead_used = 21;
    spill.ahead_wasted = 22;
    spill.prefixes_evicted = 23;
    spill.prefixes_expired = 24;
    spill.hinted = 25;
    text = printed(ctl_print_table, parts, 1);
    expect(text, "spill    io_uring, past the page cache\n");
    expect(text, "  disk          3.0 MiB of 12.0 MiB      25.0 %\n");
    expect(text, "  pages    read 11  written 12  evicted 13  lost 14  write errors 15\n");
    expect(text, "  in flight 16  waiting 17  prefixes 18  lanes hibernated 19\n");
    expect(text, "  prefixes that made room 23  expired 24\n");
    expect(text, "  ahead    read 20  used 21  wasted 22\n");
    expect(text, "  hinted   read 25  used 0  wasted 0  late 0  dropped 0\n");
    free(text);
    spill.hinted_used = 26;
    spill.hinted_wasted = 78;
    spill.hinted_late = 28;
    spill.hinted_dropped = 29;
    spill.engine = TEXT("threads");
    spill.reason = TEXT("io_uring_setup: \"not permitted\"");
    spill.direct = 0;
    spill.off = 1;
    text = printed(ctl_print_table, parts, 1);
    expect(text, "spill    threads (io_uring_setup: \"not permitted\"), OFF: the disk has failed\n");
    expect(text, "  hinted   read 25  used 26  wasted 78  late 28  dropped 29  (25.0 % useful)\n");
    free(text);
    text = printed(ctl_print_json, parts, 1);
    expect(text,
           ",\"spill\":{\"engine\":\"threads\",\"reason\":\"io_uring_setup: \\\"not permitted\\\"\",\"direct\":false,"
           "\"off\":true,\"bytes\":3145728,\"capacity_bytes\":12582912,\"pages_read\":11,\"pages_written\":12,"
           "\"pages_evicted\":13,\"pages_lost\":14,\"write_errors\":15,\"in_flight\":16,\"waiting\":17,"
           "\"prefixes\":18,\"hibernated\":19,\"ahead\":20,\"ahead_used\":21,\"ahead_wasted\":22,"
           "\"hinted\":25,\"hinted_used\":26,\"hinted_wasted\":78,\"hinted_late\":28,\"hinted_dropped\":29,"
           "\"prefixes_evicted\":23,\"prefixes_expired\":24},\"sequence\":[]}\n");
    free(text);
}

static void statistics_show_gpus(void **state)
{
    (void)state;
    Icecache__Wire__Reply reply = ICECACHE__WIRE__REPLY__INIT, *const parts[] = {&reply};
    Icecache__Wire__StatsReply stats = ICECACHE__WIRE__STATS_REPLY__INIT;
    Icecache__Wire__GpuStats known = ICECACHE__WIRE__GPU_STATS__INIT, unknown = known;
    Icecache__Wire__GpuStats *rows[] = {&known, &unknown};
    reply.body_case = ICECACHE__WIRE__REPLY__BODY_STATS;
    reply.stats = &stats;
    char *text = printed(ctl_print_json, parts, 1);
    expect(text, ",\"gpu\":[],\"sequence\":[]}\n");
    free(text);
    stats.gpu = rows;
    stats.n_gpu = 2;
    known.name = TEXT("NVIDIA H200");
    known.uuid = TEXT("GPU-1");
    known.landings = 3;
    known.copies = 4;
    known.bytes_copied = 5u << 20;
    known.vram_bytes = 600u << 20;
    known.vram_known = 1;
    known.vram_source = TEXT("NVML");
    known.copy_way = TEXT("batch from 8 rows on");
    unknown.uuid = TEXT("GPU-2");
    unknown.vram_source = TEXT("no NVML");
    unknown.broken = TEXT("it does not answer");
    text = printed(ctl_print_table, parts, 1);
    expect(text, "gpu      NVIDIA H200  GPU-1\n  landings 3  copies 4  copied 5.0 MiB  rows by batch from 8 rows on\n"
                 "  the daemon's memory there 600.0 MiB (NVML)\n"
                 "gpu      not open  GPU-2  NOT IN USE: it does not answer\n  landings 0  copies 0  copied 0 B\n"
                 "  the daemon's memory there unknown (no NVML)\n");
    free(text);
    text = printed(ctl_print_json, parts, 1);
    expect(text, ",\"gpu\":[{\"name\":\"NVIDIA H200\",\"uuid\":\"GPU-1\",\"landings\":3,\"copies\":4,"
                 "\"bytes_copied\":5242880,\"vram_bytes\":629145600,\"vram_source\":\"NVML\",\"copy_way\":\"batch from "
                 "8 rows on\",\"broken\":\"\"},"
                 "{\"name\":\"\",\"uuid\":\"GPU-2\",\"landings\":0,\"copies\":0,\"bytes_copied\":0,"
                 "\"vram_bytes\":null,\"vram_source\":\"no NVML\",\"copy_way\":\"\",\"broken\":\"it does not "
                 "answer\"}],\"sequence\":[]}");
    free(text);
}

static void prefixes_are_listed(void **state)
{
    (void)state;
    Icecache__Wire__PrefixStats first = ICECACHE__WIRE__PREFIX_STATS__INIT, second = first;
    first.prefix_id = UINT64_C(0xfedcba9876543210);
    first.name_space = TEXT("ten\"ant");
    first.tokens = 131072;
    first.layers = 32;
    first.kv_heads = 8;
    first.head_dim = 128;
    first.attached = 3;
    second.prefix_id = 7;
    second.name_space = TEXT("default");
    Icecache__Wire__PrefixStats *rows[] = {&first, &second};
    Icecache__Wire__PrefixListReply lists[2] = {ICECACHE__WIRE__PREFIX_LIST_REPLY__INIT,
                                                ICECACHE__WIRE__PREFIX_LIST_REPLY__INIT};
    Icecache__Wire__Reply replies[2] = {ICECACHE__WIRE__REPLY__INIT, ICECACHE__WIRE__REPLY__INIT};
    Icecache__Wire__Reply *const parts[] = {&replies[0], &replies[1]};
    for (int i = 0; i < 2; i++) {
        lists[i].prefix = &rows[i];
        lists[i].n_prefix = 1;
        replies[i].body_case = ICECACHE__WIRE__REPLY__BODY_PREFIX_LIST;
        replies[i].prefix_list = &lists[i];
    }
    first.bytes = UINT64_C(17) << 29;
    char *text = printed(ctl_print_prefixes_table, parts, 2);
    expect(text, "\nfedcba9876543210  ten\"ant            131072      32      8       128     8.5 GiB         3\n");
    expect(text, "\n0000000000000007  default ");
    free(text);
    text = printed(ctl_print_prefixes_json, parts, 2);
    assert_string_equal(text,
                        "{\"prefix\":[{\"id\":\"fedcba9876543210\",\"namespace\":\"ten\\\"ant\",\"tokens\":131072,"
                        "\"layers\":32,\"kv_heads\":8,\"head_dim\":128,\"bytes\":9126805504,\"attached\":3},"
                        "{\"id\":\"0000000000000007\",\"namespace\":\"default\",\"tokens\":0,\"layers\":0,"
                        "\"kv_heads\":0,\"head_dim\":0,\"bytes\":0,\"attached\":0}]}\n");
    free(text);
    lists[0].n_prefix = 0;
    text = printed(ctl_print_prefixes_json, parts, 1);
    assert_string_equal(text, "{\"prefix\":[]}\n");
    free(text);
}

static void leases_are_listed(void **state)
{
    (void)state;
    Icecache__Wire__Lease first = ICECACHE__WIRE__LEASE__INIT, second = ICECACHE__WIRE__LEASE__INIT;
    Icecache__Wire__LeaseListReply list = ICECACHE__WIRE__LEASE_LIST_REPLY__INIT;
    Icecache__Wire__Reply reply = ICECACHE__WIRE__REPLY__INIT, *const parts[] = {&reply, &reply};
    Icecache__Wire__Lease *rows[] = {&first, &second};
    first.kind = TEXT("sequence");
    first.id = 17;
    first.session_id = 0xabc;
    first.pid = 4711;
    first.client_name = TEXT("eng\"ine");
    first.name_space = TEXT("tenant");
    first.age_us = 61500000;
    first.idle_us = 1500000;
    first.bytes = 3u << 20;
    second.kind = TEXT("prefix");
    second.id = 0x17;
    second.attached = 2;
    list.lease = rows;
    list.n_lease = 2;
    reply.body_case = ICECACHE__WIRE__REPLY__BODY_LEASE_LIST;
    reply.lease_list = &list;
    char *text = printed(ctl_print_leases_table, parts, 1);
    expect(text,
           "\nsequence  17                    4711  eng\"ine          tenant                61.5          1.5     "
           "3.0 MiB         0\n");
    expect(text, "\nprefix    0000000000000017 ");
    free(text);
    text = printed(ctl_print_leases_json, parts, 1);
    assert_string_equal(text, "{\"lease\":[{\"kind\":\"sequence\",\"id\":\"17\",\"session\":\"0000000000000abc\","
                              "\"pid\":4711,\"worker\":\"eng\\\"ine\",\"namespace\":\"tenant\",\"age_seconds\":61.500,"
                              "\"unused_seconds\":1.500,\"bytes\":3145728,\"attached\":0},{\"kind\":\"prefix\","
                              "\"id\":\"0000000000000017\",\"session\":\"0000000000000000\",\"pid\":0,\"worker\":\"\","
                              "\"namespace\":\"\",\"age_seconds\":0.000,\"unused_seconds\":0.000,\"bytes\":0,"
                              "\"attached\":2}]}\n");
    free(text);
    list.n_lease = 1;
    text = printed(ctl_print_leases_json, parts, 2); // in two parts
    expect(text, "},{\"kind\":\"sequence\"");
    free(text);
}

static void namespaces_are_listed(void **state)
{
    (void)state;
    Icecache__Wire__NamespaceStats first = ICECACHE__WIRE__NAMESPACE_STATS__INIT;
    Icecache__Wire__NamespaceStats second = ICECACHE__WIRE__NAMESPACE_STATS__INIT;
    Icecache__Wire__NamespaceListReply list = ICECACHE__WIRE__NAMESPACE_LIST_REPLY__INIT;
    Icecache__Wire__Reply reply = ICECACHE__WIRE__REPLY__INIT, *const parts[] = {&reply, &reply};
    Icecache__Wire__NamespaceStats *rows[] = {&first, &second};
    first.name = TEXT("tenant");
    first.sequences = 3;
    first.prefixes = 4;
    first.pool_bytes = 1u << 20;
    first.index_bytes = 2u << 10;
    first.disk_bytes = 5u << 20;
    first.ram_quota_bytes = 1u << 30;
    first.disk_quota_bytes = UINT64_C(1) << 40;
    first.sequences_quota = 12;
    first.refused = 6;
    second.name = TEXT("default");
    list.name_space = rows;
    list.n_name_space = 2;
    reply.body_case = ICECACHE__WIRE__REPLY__BODY_NAMESPACE_LIST;
    reply.namespace_list = &list;
    char *text = printed(ctl_print_namespaces_table, parts, 1);
    expect(text,
           "\ntenant                   3        12     1.0 MiB     2.0 KiB     1.0 GiB     5.0 MiB     1.0 TiB    "
           "     4        6\n");
    expect(text,
           "\ndefault                  0         -         0 B         0 B           -         0 B           -    "
           "     0        0\n");
    free(text);
    text = printed(ctl_print_namespaces_json, parts, 1);
    expect(text, "{\"namespace\":[{\"name\":\"tenant\",\"sequences\":3,\"prefixes\":4,\"pool_bytes\":1048576,"
                 "\"index_bytes\":2048,\"disk_bytes\":5242880,\"quota\":{\"ram_bytes\":1073741824,"
                 "\"disk_bytes\":1099511627776,\"sequences\":12},\"refused\":6},{\"name\":\"default\"");
    free(text);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(statistics_show_the_disk), cmocka_unit_test(statistics_show_gpus),
        cmocka_unit_test(prefixes_are_listed),      cmocka_unit_test(leases_are_listed),
        cmocka_unit_test(namespaces_are_listed),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
