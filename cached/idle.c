// Stems that nobody has used for long fall asleep: all of them goes to the disk, and they wake with the next request on
// a sequence that has them. Reactor only.
//
// Asleep sooner where the memory for trees runs short, or their namespace is over its quota: then whoever has been idle
// for longest, from SERVER_IDLE_MIN_NS on. Sealed prefixes that nobody has used for long are removed here, too. Growth:
// one pass over the sequences each SERVER_IDLE_LOOK_NS.
#include "cached/log.h"
#include "cached/server.h"

#include <string.h>

bool idle_stem(const struct stem *stem, uint64_t now_ns, uint64_t idle_ns)
{
    return !stem->asleep && !stem->sleep_op && stem->users == 0 && now_ns - stem->used_ns >= idle_ns &&
           atomic_load_explicit(&stem->page_count, memory_order_relaxed) > 0;
}

// For how long its stem has been idle that has been so for longest; 0: none can sleep.
static uint64_t idle_time(const struct sequence *sequence, uint64_t now_ns)
{
    uint64_t longest = 0;
    if (sequence->closing || sequence->writer || sequence->readers > 0 || sequence->waiting || sequence->session->dead)
        return 0;
    for (uint32_t i = 0; i <= sequence->chain_count; i++) {
        const struct stem *stem = sequence_stem(sequence, i);
        if (idle_stem(stem, now_ns, 1) && now_ns - stem->used_ns > longest)
            longest = now_ns - stem->used_ns;
    }
    return longest;
}

// Requests that make few pages are not told beforehand how much room there is: some is kept for them.
static void keep_disk_room(struct server *server)
{
    struct extents_usage usage;
    extents_usage(server->extents, &usage);
    if (server->config->prefix_evict && server->prefixes.removing == 0 &&
        usage.used_bytes > usage.capacity_bytes - usage.capacity_bytes / 32)
        (void)prefix_evict(server, NULL);
}

static bool memory_is_short(struct server *server)
{
    return budget_used(&server->index_budget) > server->index_budget.cap_bytes / 8 * 7;
}

static void say_disk_is_off(struct server *server)
{
    struct disk_usage usage;
    if (server->disk_off_said || !server->disk || !disk_is_off(server->disk))
        return;
    server->disk_off_said = true;
    disk_usage(server->disk, &usage);
    log_error("the disk of %s is switched off: %s; pages that are only there are lost, all else goes on in memory",
              server->config->spill_directory, strerror(-usage.off_error));
}

uint64_t idle_look(struct server *server, uint64_t now_ns)
{
    const uint64_t after_ns = server->config->hibernate_ms * 1000000u;
    say_disk_is_off(server);
    if (!tier_serves(server) || server->stopping)
        return UINT64_MAX;
    if (now_ns < server->idle_look_ns)
        return server->idle_look_ns;
    server->idle_look_ns = now_ns + SERVER_IDLE_LOOK_NS;
    keep_disk_room(server);
    prefix_expire(server, now_ns);
    if (tenants_are_over_ram(&server->tenants))
        tier_relieve(server);
    const bool short_of = memory_is_short(server);
    struct sequence *longest = NULL;
    uint64_t longest_ns = 0;
    for (struct session *session = server->sessions; session; session = session->next) {
        for (struct sequence *each = session->sequences; each; each = each->session_next) {
            const uint64_t idle_ns = idle_time(each, now_ns);
            if (after_ns > 0 && idle_ns >= after_ns) {
                op_sleep_sequence(server, each, after_ns);
                return server->idle_look_ns; // the lists may have changed: one at a look
            }
            if ((short_of || tenant_is_over_ram(each->tenant)) && idle_ns > longest_ns) {
                longest_ns = idle_ns;
                longest = each;
            }
        }
    }
    if (longest_ns >= SERVER_IDLE_MIN_NS)
        op_sleep_sequence(server, longest, SERVER_IDLE_MIN_NS);
    return server->idle_look_ns;
}
