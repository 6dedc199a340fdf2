// Sequences that nobody has used for long fall asleep: all of them goes to the disk, and they wake with the next
// request. Reactor only.
//
// Asleep sooner where the memory for trees runs short, or their namespace is over its quota: then whoever has been idle
// for longest, from SERVER_IDLE_MIN_NS on. Sealed prefixes that nobody has used for long are removed here, too. Growth:
// one pass over the sequences each SERVER_IDLE_LOOK_NS.
#include "cached/log.h"
#include "cached/server.h"

#include <string.h>

static bool may_sleep(const struct sequence *sequence)
{
    return !sequence->closing && !sequence->writer && sequence->readers == 0 && !sequence->waiting &&
           !sequence->session->dead && !sequence->asleep && sequence->lengths[0] > 0;
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
    for (struct session *session = server->sessions; session; session = session->next) {
        for (struct sequence *each = session->sequences; each; each = each->session_next) {
            if (!may_sleep(each))
                continue;
            if (after_ns > 0 && now_ns - each->used_ns >= after_ns) {
                op_sleep_sequence(server, each);
                return server->idle_look_ns; // the lists may have changed: one at a look
            }
            if ((short_of || tenant_is_over_ram(each->tenant)) && (!longest || each->used_ns < longest->used_ns))
                longest = each;
        }
    }
    if (longest && now_ns - longest->used_ns >= SERVER_IDLE_MIN_NS)
        op_sleep_sequence(server, longest);
    return server->idle_look_ns;
}
