// Output of icecachectl. Single thread. Strings come from workers (names, namespaces), so JSON escapes them.
#include "cached/ctl_print.h"

#include <inttypes.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>

static const char *size_text(uint64_t bytes, char *text, size_t capacity)
{
    static const char *const units[] = {"B", "KiB", "MiB", "GiB", "TiB"};
    double value = (double)bytes;
    unsigned unit = 0;
    while (value >= 1024 && unit < 4) {
        value /= 1024;
        unit++;
    }
    snprintf(text, capacity, unit == 0 ? "%.0f %s" : "%.1f %s", value, units[unit]);
    return text;
}

static void print_usage_row(const char *name, uint64_t used, uint64_t capacity)
{
    char a[32], b[32];
    printf("  %-8s %12s of %-12s %5.1f %%\n", name, size_text(used, a, sizeof a), size_text(capacity, b, sizeof b),
           capacity ? 100.0 * (double)used / (double)capacity : 0.0);
}

static void print_spill(const Icecache__Wire__SpillStats *spill)
{
    printf("spill    %s%s", spill->engine, spill->direct ? ", past the page cache" : "");
    if (spill->reason[0])
        printf(" (%s)", spill->reason);
    printf("%s\n", spill->off ? ", OFF: the disk has failed" : "");
    print_usage_row("disk", spill->bytes, spill->capacity_bytes);
    printf("  pages    read %" PRIu64 "  written %" PRIu64 "  evicted %" PRIu64 "  lost %" PRIu64
           "  write errors %" PRIu64 "\n",
           spill->pages_read, spill->pages_written, spill->pages_evicted, spill->pages_lost, spill->write_errors);
    printf("  in flight %u  waiting %u  prefixes %u  lanes hibernated %" PRIu64 "\n", spill->in_flight, spill->waiting,
           spill->prefixes, spill->hibernated);
    printf("  prefixes that made room %" PRIu64 "  expired %" PRIu64 "\n", spill->prefixes_evicted,
           spill->prefixes_expired);
    printf("  ahead    read %" PRIu64 "  used %" PRIu64 "  wasted %" PRIu64 "\n", spill->ahead, spill->ahead_used,
           spill->ahead_wasted);
    const uint64_t known = spill->hinted_used + spill->hinted_wasted;
    printf("  hinted   read %" PRIu64 "  used %" PRIu64 "  wasted %" PRIu64 "  late %" PRIu64 "  dropped %" PRIu64,
           spill->hinted, spill->hinted_used, spill->hinted_wasted, spill->hinted_late, spill->hinted_dropped);
    if (known > 0)
        printf("  (%.1f %% useful)", 100.0 * (double)spill->hinted_used / (double)known);
    printf("\n");
}

static void print_gpu(const Icecache__Wire__GpuStats *gpu)
{
    char bytes[32];
    printf("gpu      %s  %s", gpu->name[0] ? gpu->name : "not open", gpu->uuid);
    printf("%s%s\n", gpu->broken[0] ? "  NOT IN USE: " : "", gpu->broken);
    printf("  landings %u  copies %" PRIu64 "  copied %s%s%s\n", gpu->landings, gpu->copies,
           size_text(gpu->bytes_copied, bytes, sizeof bytes), gpu->copy_way[0] ? "  rows by " : "", gpu->copy_way);
    printf("  the daemon's memory there %s (%s)\n",
           gpu->vram_known ? size_text(gpu->vram_bytes, bytes, sizeof bytes) : "unknown", gpu->vram_source);
}

// Those that are not 0: an operator looks for what is wrong.
static void print_service(const Icecache__Wire__StatsReply *stats)
{
    printf("service ");
    bool any = false;
    for (size_t i = 0; i < stats->n_service; i++) {
        if (stats->service[i]->count == 0)
            continue;
        printf(" %s %" PRIu64, stats->service[i]->name, stats->service[i]->count);
        any = true;
    }
    printf("%s\n", any ? "" : " nothing refused, late or ended");
}

static void print_totals(const Icecache__Wire__StatsReply *stats)
{
    char text[32], whole[32];
    printf("icecached %s, up %.1f s, %u shards, huge pages %s (%s of %s)\n", stats->version,
           (double)stats->uptime_us / 1e6, stats->shards, stats->huge_pages,
           size_text(stats->huge_page_bytes, text, sizeof text),
           size_text(stats->pool_capacity_bytes, whole, sizeof whole));
    printf("sessions %u (%u by rings)  sequences %u  tokens %" PRIu64 "  pages %" PRIu64 "\n", stats->sessions,
           stats->ring_sessions, stats->sequences, stats->tokens, stats->pages);
    printf("retrieves %" PRIu64 " (%" PRIu64 " partial)  appends %" PRIu64 "  reads %" PRIu64 "  hints %" PRIu64
           "  errors %" PRIu64 "  moved %s\n",
           stats->retrieves, stats->retrieves_partial, stats->appends, stats->reads, stats->hints, stats->errors,
           size_text(stats->bytes_moved, text, sizeof text));
    print_service(stats);
    printf("memory\n");
    print_usage_row("pool", stats->pool_bytes, stats->pool_capacity_bytes);
    print_usage_row("index", stats->index_bytes, stats->index_capacity_bytes);
    print_usage_row("shared", stats->shared_bytes, stats->shared_capacity_bytes);
    if (stats->spill)
        print_spill(stats->spill);
    for (size_t i = 0; i < stats->n_gpu; i++)
        print_gpu(stats->gpu[i]);
    printf("phase        count      p50 us      p99 us    p99.9 us      max us\n");
    for (size_t i = 0; i < stats->n_phases; i++) {
        const Icecache__Wire__PhaseStats *phase = stats->phases[i];
        printf("  %-8s %7" PRIu64 " %11.1f %11.1f %11.1f %11.1f\n", phase->name, phase->count, phase->p50_us,
               phase->p99_us, phase->p999_us, phase->max_us);
    }
}

void ctl_print_table(Icecache__Wire__Reply *const *pages, size_t count)
{
    char pool[32], index[32];
    print_totals(pages[0]->stats);
    printf("sequence       pid  worker           namespace         tokens   indexed     pages       pool      index  "
           "retrieves  phase\n");
    for (size_t page = 0; page < count; page++) {
        for (size_t i = 0; i < pages[page]->stats->n_sequence; i++) {
            const Icecache__Wire__SequenceStats *row = pages[page]->stats->sequence[i];
            printf("%8" PRIu64 "  %8u  %-15.15s  %-15.15s %8" PRIu64 "  %8" PRIu64 "  %8" PRIu64 " %10s %10s %10" PRIu64
                   "  %s\n",
                   row->sequence_id, row->pid, row->client_name, row->name_space, row->tokens, row->indexed, row->pages,
                   size_text(row->pool_bytes, pool, sizeof pool), size_text(row->index_bytes, index, sizeof index),
                   row->retrieves, row->phase);
        }
    }
}

static void json_text(const char *value)
{
    putchar('"');
    for (const unsigned char *c = (const unsigned char *)value; *c; c++) {
        if (*c == '"' || *c == '\\')
            printf("\\%c", *c);
        else if (*c < 0x20 || *c >= 0x7f)
            printf("\\u%04x", *c);
        else
            putchar(*c);
    }
    putchar('"');
}

static void json_key(const char *name)
{
    json_text(name);
    putchar(':');
}

static void json_string(const char *name, const char *value)
{
    json_key(name);
    json_text(value);
}

static void json_totals(const Icecache__Wire__StatsReply *stats)
{
    json_string("version", stats->version);
    printf(",\"uptime_seconds\":%.3f,\"shards\":%u,", (double)stats->uptime_us / 1e6, stats->shards);
    json_string("huge_pages", stats->huge_pages);
    printf(",\"sessions\":%u,\"ring_sessions\":%u,\"sequences\":%u,\"tokens\":%" PRIu64 ",\"pages\":%" PRIu64,
           stats->sessions, stats->ring_sessions, stats->sequences, stats->tokens, stats->pages);
    printf(",\"retrieves\":%" PRIu64 ",\"retrieves_partial\":%" PRIu64 ",\"appends\":%" PRIu64 ",\"reads\":%" PRIu64
           ",\"hints\":%" PRIu64 ",\"errors\":%" PRIu64 ",\"sessions_reclaimed\":%" PRIu64,
           stats->retrieves, stats->retrieves_partial, stats->appends, stats->reads, stats->hints, stats->errors,
           stats->sessions_reclaimed);
    printf(",\"bytes\":{\"moved\":%" PRIu64 ",\"pool\":%" PRIu64 ",\"pool_capacity\":%" PRIu64 ",\"pool_huge\":%" PRIu64
           ",\"index\":%" PRIu64 ",\"index_capacity\":%" PRIu64 ",\"shared\":%" PRIu64 ",\"shared_capacity\":%" PRIu64
           "}",
           stats->bytes_moved, stats->pool_bytes, stats->pool_capacity_bytes, stats->huge_page_bytes,
           stats->index_bytes, stats->index_capacity_bytes, stats->shared_bytes, stats->shared_capacity_bytes);
    printf(",\"phases\":{");
    for (size_t i = 0; i < stats->n_phases; i++) {
        const Icecache__Wire__PhaseStats *phase = stats->phases[i];
        printf("%s\"%s\":{\"count\":%" PRIu64 ",\"p50_us\":%.3f,\"p99_us\":%.3f,\"p999_us\":%.3f,\"max_us\":%.3f}",
               i ? "," : "", phase->name, phase->count, phase->p50_us, phase->p99_us, phase->p999_us, phase->max_us);
    }
    printf("}");
}

static void json_service(const Icecache__Wire__StatsReply *stats)
{
    printf(",\"service\":{");
    for (size_t i = 0; i < stats->n_service; i++) {
        printf("%s", i ? "," : "");
        json_key(stats->service[i]->name);
        printf("%" PRIu64, stats->service[i]->count);
    }
    printf("}");
}

static void json_spill(const Icecache__Wire__SpillStats *spill)
{
    printf(",\"spill\":{");
    json_string("engine", spill->engine);
    printf(",");
    json_string("reason", spill->reason);
    printf(",\"direct\":%s,\"off\":%s,\"bytes\":%" PRIu64 ",\"capacity_bytes\":%" PRIu64,
           spill->direct ? "true" : "false", spill->off ? "true" : "false", spill->bytes, spill->capacity_bytes);
    printf(",\"pages_read\":%" PRIu64 ",\"pages_written\":%" PRIu64 ",\"pages_evicted\":%" PRIu64
           ",\"pages_lost\":%" PRIu64 ",\"write_errors\":%" PRIu64,
           spill->pages_read, spill->pages_written, spill->pages_evicted, spill->pages_lost, spill->write_errors);
    printf(",\"in_flight\":%u,\"waiting\":%u,\"prefixes\":%u,\"hibernated\":%" PRIu64 ",\"ahead\":%" PRIu64
           ",\"ahead_used\":%" PRIu64 ",\"ahead_wasted\":%" PRIu64,
           spill->in_flight, spill->waiting, spill->prefixes, spill->hibernated, spill->ahead, spill->ahead_used,
           spill->ahead_wasted);
    printf(",\"hinted\":%" PRIu64 ",\"hinted_used\":%" PRIu64 ",\"hinted_wasted\":%" PRIu64 ",\"hinted_late\":%" PRIu64
           ",\"hinted_dropped\":%" PRIu64,
           spill->hinted, spill->hinted_used, spill->hinted_wasted, spill->hinted_late, spill->hinted_dropped);
    printf(",\"prefixes_evicted\":%" PRIu64 ",\"prefixes_expired\":%" PRIu64 "}", spill->prefixes_evicted,
           spill->prefixes_expired);
}

// All GPUs that the daemon copies to: none where workers fetch.
static void json_gpus(const Icecache__Wire__StatsReply *stats)
{
    printf(",\"gpu\":[");
    for (size_t i = 0; i < stats->n_gpu; i++) {
        const Icecache__Wire__GpuStats *gpu = stats->gpu[i];
        printf("%s{", i ? "," : "");
        json_string("name", gpu->name);
        printf(",");
        json_string("uuid", gpu->uuid);
        printf(",\"landings\":%u,\"copies\":%" PRIu64 ",\"bytes_copied\":%" PRIu64 ",\"vram_bytes\":", gpu->landings,
               gpu->copies, gpu->bytes_copied);
        if (gpu->vram_known)
            printf("%" PRIu64 ",", gpu->vram_bytes);
        else
            printf("null,");
        json_string("vram_source", gpu->vram_source);
        printf(",");
        json_string("copy_way", gpu->copy_way);
        printf(",");
        json_string("broken", gpu->broken);
        printf("}");
    }
    printf("]");
}

static void json_sequence(const Icecache__Wire__SequenceStats *row)
{
    printf("{\"id\":%" PRIu64 ",\"session\":\"%016" PRIx64 "\",\"pid\":%u,", row->sequence_id, row->session_id,
           row->pid);
    json_string("worker", row->client_name);
    printf(",");
    json_string("namespace", row->name_space);
    printf(",\"tokens\":%" PRIu64 ",\"indexed\":%" PRIu64 ",\"pages\":%" PRIu64 ",\"pool_bytes\":%" PRIu64
           ",\"index_bytes\":%" PRIu64 ",\"retrieves\":%" PRIu64 ",\"appended_tokens\":%" PRIu64
           ",\"shared_tokens\":%" PRIu64 ",",
           row->tokens, row->indexed, row->pages, row->pool_bytes, row->index_bytes, row->retrieves,
           row->appended_tokens, row->shared_tokens);
    json_string("phase", row->phase);
    printf("}");
}

void ctl_print_json(Icecache__Wire__Reply *const *pages, size_t count)
{
    printf("{");
    json_totals(pages[0]->stats);
    json_service(pages[0]->stats);
    json_gpus(pages[0]->stats);
    if (pages[0]->stats->spill)
        json_spill(pages[0]->stats->spill);
    printf(",\"sequence\":[");
    bool first = true;
    for (size_t page = 0; page < count; page++) {
        for (size_t i = 0; i < pages[page]->stats->n_sequence; i++) {
            printf("%s", first ? "" : ",");
            first = false;
            json_sequence(pages[page]->stats->sequence[i]);
        }
    }
    printf("]}\n");
}

// ---- prefixes ----

void ctl_print_prefixes_table(Icecache__Wire__Reply *const *pages, size_t count)
{
    char bytes[32];
    printf("prefix            namespace          tokens  layers  heads  head_dim        disk  attached\n");
    for (size_t page = 0; page < count; page++) {
        for (size_t i = 0; i < pages[page]->prefix_list->n_prefix; i++) {
            const Icecache__Wire__PrefixStats *row = pages[page]->prefix_list->prefix[i];
            printf("%016" PRIx64 "  %-15.15s %9" PRIu64 "  %6u  %5u  %8u  %10s  %8u\n", row->prefix_id, row->name_space,
                   row->tokens, row->layers, row->kv_heads, row->head_dim, size_text(row->bytes, bytes, sizeof bytes),
                   row->attached);
        }
    }
}

void ctl_print_prefixes_json(Icecache__Wire__Reply *const *pages, size_t count)
{
    bool first = true;
    printf("{\"prefix\":[");
    for (size_t page = 0; page < count; page++) {
        for (size_t i = 0; i < pages[page]->prefix_list->n_prefix; i++) {
            const Icecache__Wire__PrefixStats *row = pages[page]->prefix_list->prefix[i];
            printf("%s{\"id\":\"%016" PRIx64 "\",", first ? "" : ",", row->prefix_id);
            first = false;
            json_string("namespace", row->name_space);
            printf(",\"tokens\":%" PRIu64 ",\"layers\":%u,\"kv_heads\":%u,\"head_dim\":%u,\"bytes\":%" PRIu64
                   ",\"attached\":%u}",
                   row->tokens, row->layers, row->kv_heads, row->head_dim, row->bytes, row->attached);
        }
    }
    printf("]}\n");
}

// ---- leases ----

// A sequence's and a landing's id are counted, the others are random.
static void id_text(const Icecache__Wire__Lease *row, char text[20])
{
    const bool counted = strcmp(row->kind, "sequence") == 0 || strcmp(row->kind, "landing") == 0;
    snprintf(text, 20, counted ? "%" PRIu64 : "%016" PRIx64, row->id);
}

void ctl_print_leases_table(Icecache__Wire__Reply *const *pages, size_t count)
{
    char bytes[32], id[20];
    printf(
        "kind      id                     pid  worker           namespace             age s     unused s       bytes  "
        "attached\n");
    for (size_t page = 0; page < count; page++) {
        for (size_t i = 0; i < pages[page]->lease_list->n_lease; i++) {
            const Icecache__Wire__Lease *row = pages[page]->lease_list->lease[i];
            id_text(row, id);
            printf("%-8.8s  %-16s  %8u  %-15.15s  %-15.15s %10.1f   %10.1f  %10s  %8u\n", row->kind, id, row->pid,
                   row->client_name, row->name_space, (double)row->age_us / 1e6, (double)row->idle_us / 1e6,
                   size_text(row->bytes, bytes, sizeof bytes), row->attached);
        }
    }
}

void ctl_print_leases_json(Icecache__Wire__Reply *const *pages, size_t count)
{
    bool first = true;
    char id[20];
    printf("{\"lease\":[");
    for (size_t page = 0; page < count; page++) {
        for (size_t i = 0; i < pages[page]->lease_list->n_lease; i++) {
            const Icecache__Wire__Lease *row = pages[page]->lease_list->lease[i];
            printf("%s{", first ? "" : ",");
            first = false;
            json_string("kind", row->kind);
            id_text(row, id);
            printf(",\"id\":\"%s\",\"session\":\"%016" PRIx64 "\",\"pid\":%u,", id, row->session_id, row->pid);
            json_string("worker", row->client_name);
            printf(",");
            json_string("namespace", row->name_space);
            printf(",\"age_seconds\":%.3f,\"unused_seconds\":%.3f,\"bytes\":%" PRIu64 ",\"attached\":%u}",
                   (double)row->age_us / 1e6, (double)row->idle_us / 1e6, row->bytes, row->attached);
        }
    }
    printf("]}\n");
}

// ---- namespaces ----

static const char *quota_text(uint64_t bytes, char *text, size_t capacity)
{
    return bytes > 0 ? size_text(bytes, text, capacity) : "-";
}

void ctl_print_namespaces_table(Icecache__Wire__Reply *const *pages, size_t count)
{
    char pool[32], index[32], ram[32], disk[32], most[32], sequences[16];
    printf(
        "namespace        sequences     quota        pool       index   ram quota        disk  disk quota  prefixes  "
        "refused\n");
    for (size_t page = 0; page < count; page++) {
        for (size_t i = 0; i < pages[page]->namespace_list->n_name_space; i++) {
            const Icecache__Wire__NamespaceStats *row = pages[page]->namespace_list->name_space[i];
            snprintf(sequences, sizeof sequences, row->sequences_quota ? "%u" : "-", row->sequences_quota);
            printf("%-15.15s  %9u  %8s  %10s  %10s  %10s", row->name, row->sequences, sequences,
                   size_text(row->pool_bytes, pool, sizeof pool), size_text(row->index_bytes, index, sizeof index),
                   quota_text(row->ram_quota_bytes, ram, sizeof ram));
            printf("  %10s  %10s  %8u  %7" PRIu64 "\n", size_text(row->disk_bytes, disk, sizeof disk),
                   quota_text(row->disk_quota_bytes, most, sizeof most), row->prefixes, row->refused);
        }
    }
}

void ctl_print_namespaces_json(Icecache__Wire__Reply *const *pages, size_t count)
{
    bool first = true;
    printf("{\"namespace\":[");
    for (size_t page = 0; page < count; page++) {
        for (size_t i = 0; i < pages[page]->namespace_list->n_name_space; i++) {
            const Icecache__Wire__NamespaceStats *row = pages[page]->namespace_list->name_space[i];
            printf("%s{", first ? "" : ",");
            first = false;
            json_string("name", row->name);
            printf(",\"sequences\":%u,\"prefixes\":%u,\"pool_bytes\":%" PRIu64 ",\"index_bytes\":%" PRIu64
                   ",\"disk_bytes\":%" PRIu64,
                   row->sequences, row->prefixes, row->pool_bytes, row->index_bytes, row->disk_bytes);
            printf(",\"quota\":{\"ram_bytes\":%" PRIu64 ",\"disk_bytes\":%" PRIu64
                   ",\"sequences\":%u},\"refused\":%" PRIu64 "}",
                   row->ram_quota_bytes, row->disk_quota_bytes, row->sequences_quota, row->refused);
        }
    }
    printf("]}\n");
}
