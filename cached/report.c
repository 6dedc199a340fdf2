// Statistics for operators. Reactor only; what shards count is read through atomics, so a figure may be a moment old.
#include "cached/server.h"

#include <string.h>

#define PHASES 7u

struct phase_rows {
    Icecache__Wire__PhaseStats rows[PHASES];
    Icecache__Wire__PhaseStats *pointers[PHASES];
};

struct sequence_rows {
    Icecache__Wire__SequenceStats rows[WIRE_STATS_SEQUENCES_MAX];
    Icecache__Wire__SequenceStats *pointers[WIRE_STATS_SEQUENCES_MAX];
    uint32_t count;
    uint32_t next; // 0: no more
};

static void fill_phases(const struct server_stats *stats, struct phase_rows *phases)
{
    const struct {
        const char *name;
        const struct histogram *histogram;
    } all[PHASES] = {
        {"queue", &stats->queue}, {"search", &stats->search}, {"fetch", &stats->fetch}, {"copy", &stats->copy},
        {"total", &stats->total}, {"append", &stats->append}, {"read", &stats->read},
    };
    for (uint32_t i = 0; i < PHASES; i++) {
        Icecache__Wire__PhaseStats *row = &phases->rows[i];
        icecache__wire__phase_stats__init(row);
        row->name = (char *)all[i].name;
        row->count = all[i].histogram->count;
        row->p50_us = (double)histogram_quantile(all[i].histogram, 0.5) / 1000;
        row->p99_us = (double)histogram_quantile(all[i].histogram, 0.99) / 1000;
        row->p999_us = (double)histogram_quantile(all[i].histogram, 0.999) / 1000;
        row->max_us = (double)all[i].histogram->max / 1000;
        phases->pointers[i] = row;
    }
}

static const char *phase_of(const struct sequence *sequence, const struct sequence_usage *usage)
{
    if (sequence->writer)
        return "appending";
    if (sequence->readers > 0)
        return "retrieving";
    return usage->lanes_due > 0 ? "clustering" : "idle";
}

static void fill_sequence(const struct sequence *sequence, Icecache__Wire__SequenceStats *row)
{
    struct sequence_usage usage;
    sequence_usage(sequence, &usage);
    icecache__wire__sequence_stats__init(row);
    row->sequence_id = sequence->id;
    row->session_id = sequence->session->id;
    row->pid = (uint32_t)sequence->session->pid;
    row->client_name = (char *)sequence->session->name;
    row->name_space = (char *)sequence->identity.name_space;
    row->indexed = UINT64_MAX;
    for (uint32_t layer = 0; layer < sequence->shape.layers; layer++) {
        uint64_t indexed = sequence_indexed(sequence, layer);
        row->tokens = sequence->lengths[layer] > row->tokens ? sequence->lengths[layer] : row->tokens;
        row->indexed = indexed < row->indexed ? indexed : row->indexed;
    }
    row->pages = usage.pages;
    row->pool_bytes = usage.pool_bytes;
    row->index_bytes = usage.index_bytes;
    row->shared_tokens = usage.shared_tokens;
    row->retrieves = sequence->retrieves;
    row->appended_tokens = sequence->appended_tokens;
    row->phase = (char *)phase_of(sequence, &usage);
}

// All sequences are counted; those that the asking session may see, its own where it is a worker's, are listed from
// `from` on as far as they fit.
static void fill_sequences(const struct server *server, const struct session *asking, uint32_t from,
                           struct sequence_rows *list, Icecache__Wire__StatsReply *body)
{
    uint32_t at = 0;
    for (const struct session *session = server->sessions; session; session = session->next) {
        for (const struct sequence *sequence = session->sequences; sequence; sequence = sequence->session_next) {
            uint64_t tokens = 0;

            for (uint32_t layer = 0; layer < sequence->shape.layers; layer++)
                tokens = sequence->lengths[layer] > tokens ? sequence->lengths[layer] : tokens;
            body->tokens += tokens;
            if ((!asking->admin && session != asking) || at++ < from)
                continue;
            if (list->count == WIRE_STATS_SEQUENCES_MAX) {
                list->next = list->next ? list->next : at - 1;
                continue;
            }
            fill_sequence(sequence, &list->rows[list->count]);
            list->pointers[list->count] = &list->rows[list->count];
            list->count++;
        }
    }
}

static void fill_spill(struct server *server, Icecache__Wire__SpillStats *body)
{
    const struct tier_stats *stats = &server->tier_stats;
    struct disk_usage disk;
    struct extents_usage extents;
    disk_usage(server->disk, &disk);
    extents_usage(server->extents, &extents);
    body->engine = (char *)disk.engine;
    body->reason = (char *)(disk.off ? strerrordesc_np(-disk.off_error) : disk.because);
    body->direct = disk.direct;
    body->off = disk.off;
    body->bytes = extents.used_bytes;
    body->capacity_bytes = extents.capacity_bytes;
    body->pages_read = atomic_load_explicit(&stats->pages_read, memory_order_relaxed);
    body->pages_written = atomic_load_explicit(&stats->pages_written, memory_order_relaxed);
    body->pages_evicted = atomic_load_explicit(&stats->pages_evicted, memory_order_relaxed);
    body->pages_lost = atomic_load_explicit(&stats->pages_lost, memory_order_relaxed);
    body->write_errors = atomic_load_explicit(&stats->write_errors, memory_order_relaxed);
    body->in_flight = disk.in_flight;
    body->waiting = disk.waiting;
    body->prefixes = server->prefixes.count;
    body->prefixes_evicted = server->prefixes.evicted;
    body->prefixes_expired = server->prefixes.expired;
    body->ahead = atomic_load_explicit(&stats->ahead, memory_order_relaxed);
    body->ahead_used = atomic_load_explicit(&stats->ahead_used, memory_order_relaxed);
    body->ahead_wasted = atomic_load_explicit(&stats->ahead_wasted, memory_order_relaxed);
    body->hinted = atomic_load_explicit(&stats->hinted, memory_order_relaxed);
    body->hinted_used = atomic_load_explicit(&stats->hinted_used, memory_order_relaxed);
    body->hinted_wasted = atomic_load_explicit(&stats->hinted_wasted, memory_order_relaxed);
    body->hinted_late = atomic_load_explicit(&stats->hinted_late, memory_order_relaxed);
    body->hinted_dropped = atomic_load_explicit(&stats->hinted_dropped, memory_order_relaxed);
    body->hibernated = atomic_load_explicit(&stats->asleep, memory_order_relaxed);
}

struct gpu_rows {
    Icecache__Wire__GpuStats rows[GPUS_MAX], *pointers[GPUS_MAX];
    char uuids[GPUS_MAX][CUDA_TEXT_BYTES], broken[GPUS_MAX][CUDA_TEXT_BYTES];
    struct gpu_vram vram[GPUS_MAX];
};

// Of the landings on a GPU, which may differ by their shapes.
static const char *way_of(const struct server *server, const struct gpu *gpu)
{
    const char *found = "";
    for (const struct session *session = server->sessions; session; session = session->next) {
        for (const struct landing *landing = session->landings; landing; landing = landing->next) {
            if (landing->gpu != gpu || landing->closing)
                continue;
            const char *way = gpu_landing_copy_way(landing->memory);
            if (found[0] && strcmp(found, way) != 0)
                return "differs by landing";
            found = way;
        }
    }
    return found;
}

static void fill_gpu(const struct server *server, struct gpu *gpu, struct gpu_rows *list, uint32_t at)
{
    Icecache__Wire__GpuStats *row = &list->rows[at];
    struct copier *copier = atomic_load_explicit(&gpu->copier, memory_order_acquire);
    struct copier_usage usage = {0};
    if (copier)
        copier_usage(copier, &usage);
    cuda_uuid_format(gpu->uuid, list->uuids[at]);
    if (gpu_check(gpu, list->broken[at]) == ICE_OK)
        list->broken[at][0] = '\0';
    gpu_vram(gpu, &list->vram[at]);
    icecache__wire__gpu_stats__init(row);
    row->name = copier ? gpu->device.name : row->name;
    row->uuid = list->uuids[at];
    row->landings = gpu->landings;
    row->copies = usage.copies;
    row->bytes_copied = usage.bytes;
    row->vram_bytes = list->vram[at].bytes;
    row->vram_known = list->vram[at].source != NVML_UNKNOWN;
    row->vram_source = list->vram[at].text;
    row->broken = list->broken[at];
    row->copy_way = (char *)way_of(server, gpu);
    list->pointers[at] = row;
}

static void fill_gpus(const struct server *server, struct gpu_rows *list, Icecache__Wire__StatsReply *body)
{
    const struct gpus *gpus = &server->gpus;
    const uint32_t count = atomic_load_explicit(&gpus->count, memory_order_acquire);
    for (uint32_t i = 0; i < count; i++)
        fill_gpu(server, gpus->list[i], list, i);
    body->n_gpu = count;
    body->gpu = list->pointers;
}

#define COUNT_ONE(name) +1
#define COUNT_ROWS      (0 COUNTS(COUNT_ONE))
_Static_assert(COUNT_ROWS <= WIRE_STATS_COUNTS_MAX, "a reply has room for all counters");

struct count_rows {
    Icecache__Wire__CountStats rows[COUNT_ROWS], *pointers[COUNT_ROWS];
};

static void fill_counts(const struct counts *counts, struct count_rows *list, Icecache__Wire__StatsReply *body)
{
    const struct {
        const char *name;
        uint64_t count;
    } all[COUNT_ROWS] = {
#define COUNT_ROW(name) {#name, counts->name},
        COUNTS(COUNT_ROW)
#undef COUNT_ROW
    };
    for (uint32_t i = 0; i < COUNT_ROWS; i++) {
        icecache__wire__count_stats__init(&list->rows[i]);
        list->rows[i].name = (char *)(uintptr_t)all[i].name; // packing only reads it
        list->rows[i].count = all[i].count;
        list->pointers[i] = &list->rows[i];
    }
    body->n_service = COUNT_ROWS;
    body->service = list->pointers;
}

static void fill_totals(struct server *server, Icecache__Wire__StatsReply *body)
{
    const struct server_stats *stats = &server->stats;
    struct pool_usage pool;
    pool_usage(server->pool, &pool);
    body->version = (char *)ICECACHE_VERSION;
    body->uptime_us = (env_now_ns(server->env) - server->started_ns) / 1000;
    for (const struct session *session = server->sessions; session; session = session->next) {
        body->sessions += session->greeted && !session->admin && !session->dead;
        body->ring_sessions += session->ring.open;
    }
    body->sequences = server->sequence_count;
    body->pages = pool.used_frames;
    body->pool_bytes = pool.used_bytes;
    body->pool_capacity_bytes = pool.capacity_bytes;
    body->index_bytes = budget_used(&server->index_budget);
    body->index_capacity_bytes = server->index_budget.cap_bytes;
    body->shared_bytes = budget_used(&server->shared_budget);
    body->shared_capacity_bytes = server->shared_budget.cap_bytes;
    body->retrieves = stats->retrieves;
    body->retrieves_partial = stats->retrieves_partial;
    body->appends = stats->appends;
    body->reads = stats->reads;
    body->hints = stats->hints;
    body->errors = stats->errors;
    body->bytes_moved = stats->bytes_moved;
    body->huge_pages = (char *)pool_huge_name(pool.kind);
    body->huge_page_bytes = pool.huge_bytes;
    body->shards = server->shard_count;
    body->sessions_reclaimed = stats->sessions_reclaimed;
}

void report_stats(struct server *server, struct session *session, const struct env_message *to, uint64_t request_id,
                  uint32_t sequences_from)
{
    struct env *env = server->env;
    struct sequence_rows *list = env->acquire(env, sizeof *list);
    if (!list) {
        reply_error(server, session, to, request_id, ICE_NO_MEMORY, "no memory for the statistics");
        return;
    }
    list->count = list->next = 0;
    struct phase_rows phases;
    Icecache__Wire__Reply reply = ICECACHE__WIRE__REPLY__INIT;
    Icecache__Wire__StatsReply body = ICECACHE__WIRE__STATS_REPLY__INIT;
    fill_phases(&server->stats, &phases);
    fill_totals(server, &body);
    fill_sequences(server, session, sequences_from, list, &body);
    Icecache__Wire__SpillStats spill = ICECACHE__WIRE__SPILL_STATS__INIT;
    if (server->disk) {
        fill_spill(server, &spill);
        body.spill = &spill;
    }
    struct gpu_rows gpus;
    fill_gpus(server, &gpus, &body);
    struct count_rows counts;
    fill_counts(&server->counts, &counts, &body);
    body.n_phases = PHASES;
    body.phases = phases.pointers;
    body.n_sequence = list->count;
    body.sequence = list->pointers;
    body.sequences_next = list->next;
    reply.request_id = request_id;
    reply.body_case = ICECACHE__WIRE__REPLY__BODY_STATS;
    reply.stats = &body;
    reply_send(server, session, to->route, to->route_bytes, &reply);
    env->release(env, list, sizeof *list);
}

// ---- sealed prefixes ----

struct prefix_rows {
    Icecache__Wire__PrefixStats rows[WIRE_PREFIXES_LISTED_MAX], *pointers[WIRE_PREFIXES_LISTED_MAX];
    uint32_t count, next;
};

static void fill_prefix(const struct prefix *prefix, Icecache__Wire__PrefixStats *row)
{
    icecache__wire__prefix_stats__init(row);
    row->prefix_id = prefix->id;
    row->name_space = (char *)prefix->identity.name_space;
    row->tokens = prefix_tokens(prefix);
    row->layers = prefix->identity.layers;
    row->kv_heads = prefix->identity.kv_heads;
    row->head_dim = prefix->identity.head_dim;
    row->bytes = prefix_disk_bytes(prefix);
    row->attached = prefix->attached;
}

void report_prefixes(struct server *server, struct session *session, const struct env_message *to, uint64_t request_id,
                     const Icecache__Wire__PrefixList *request)
{
    const char *name_space = named_space(session, request->name_space);
    struct env *env = server->env;
    struct prefix_rows *list = env->acquire(env, sizeof *list);
    if (!list) {
        reply_error(server, session, to, request_id, ICE_NO_MEMORY, "no memory for the list");
        return;
    }
    list->count = list->next = 0;
    uint32_t at = 0;
    for (uint32_t bucket = 0; bucket < PREFIX_BUCKETS; bucket++) {
        for (const struct prefix *each = server->prefixes.buckets[bucket]; each; each = each->next) {
            if ((name_space && strcmp(each->identity.name_space, name_space) != 0) || at++ < request->from)
                continue;
            if (list->count == WIRE_PREFIXES_LISTED_MAX) {
                list->next = list->next ? list->next : at - 1;
                continue;
            }
            fill_prefix(each, &list->rows[list->count]);
            list->pointers[list->count] = &list->rows[list->count];
            list->count++;
        }
    }
    Icecache__Wire__Reply reply = ICECACHE__WIRE__REPLY__INIT;
    Icecache__Wire__PrefixListReply body = ICECACHE__WIRE__PREFIX_LIST_REPLY__INIT;
    body.n_prefix = list->count;
    body.prefix = list->pointers;
    body.next = list->next;
    reply.request_id = request_id;
    reply.body_case = ICECACHE__WIRE__REPLY__BODY_PREFIX_LIST;
    reply.prefix_list = &body;
    reply_send(server, session, to->route, to->route_bytes, &reply);
    env->release(env, list, sizeof *list);
}
