// Sequences that nobody has used for long fall asleep: all of them goes to the disk, and they wake with the next
// request. Reactor only.
//
// Asleep sooner where the memory for trees runs short: then whoever has been idle for longest, from SERVER_IDLE_MIN_NS
// on. Growth: one pass over the sequences each SERVER_IDLE_LOOK_NS.
#include "cached/server.h"

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
        (void)prefix_evict(server);
}

static bool memory_is_short(struct server *server)
{
    return budget_used(&server->index_budget) > server->index_budget.cap_bytes / 8 * 7;
}

uint64_t idle_look(struct server *server, uint64_t now_ns)
{
    const uint64_t after_ns = server->config->hibernate_ms * 1000000u;
    if (!tier_serves(server) || server->stopping)
        return UINT64_MAX;
    if (now_ns < server->idle_look_ns)
        return server->idle_look_ns;
    server->idle_look_ns = now_ns + SERVER_IDLE_LOOK_NS;
    keep_disk_room(server);
    const bool short_of = memory_is_short(server);
    struct sequence *longest = NULL;
    for (struct session *session = server->sessions; session; session = session->next) {
        for (struct sequence *each = session->sequences; each; each = each->session_next) {
            if (!may_sleep(each))
                continue;
            if (after_ns > 0 && now_ns - each->used_ns >= after_ns) {
                op_sleep_sequence(server, each);
                return now_ns; // the lists may have changed: one at a time
            }
            if (!longest || each->used_ns < longest->used_ns)
                longest = each;
        }
    }
    if (short_of && longest && now_ns - longest->used_ns >= SERVER_IDLE_MIN_NS)
        op_sleep_sequence(server, longest);
    return server->idle_look_ns;
}
