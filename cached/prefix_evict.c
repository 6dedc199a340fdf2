// Which sealed prefixes go, and what they count for their namespaces. Reactor only.
//
// What makes room is one that no sequence is attached to, and of these the one with the highest score:
//
//   time since it was used  x  bytes on the disk  /  cost of computing it again
//
// so a prefix that is cold, large for what it saves, or short goes before one that is warm or long. The cost is that of
// a transformer's layers: for n tokens and a width d of query heads x head_dim, 12 d^2 multiplications a token for the
// projections and the feed-forward part, and n d for attention (n / 2 keys on average, twice). A long prefix is dearer
// by its tokens' square, so of two that are equally cold the shorter one goes. Equal scores: the smaller id.
//
// Growth: one pass over all prefixes for each that goes, and one each SERVER_IDLE_LOOK_NS for those that expire.
#include "cached/log.h"
#include "cached/prefix.h"
#include "cached/server.h"

double prefix_rebuild_cost(const struct prefix_identity *identity, uint64_t tokens)
{
    const double width = (double)identity->query_heads * (double)identity->head_dim, count = (double)tokens;
    return (double)identity->layers * count * width * (12 * width + count);
}

double prefix_evict_score(const struct prefix *prefix, uint64_t now_ns)
{
    const double idle_ns = (double)(now_ns - prefix->used_ns) + 1;
    return idle_ns * (double)prefix->counted_disk_bytes / prefix_rebuild_cost(&prefix->identity, prefix_tokens(prefix));
}

static bool goes_before(const struct prefix *a, const struct prefix *b, uint64_t now_ns)
{
    const double score_a = prefix_evict_score(a, now_ns), score_b = prefix_evict_score(b, now_ns);
    return score_a > score_b || (!(score_a < score_b) && a->id < b->id);
}

bool prefix_evict(struct server *server, const struct tenant *tenant)
{
    const uint64_t now_ns = env_now_ns(server->env);
    struct prefix *first = NULL;
    for (uint32_t bucket = 0; bucket < PREFIX_BUCKETS; bucket++) {
        for (struct prefix *each = server->prefixes.buckets[bucket]; each; each = each->next) {
            if (each->attached == 0 && (!tenant || each->tenant == tenant) &&
                (!first || goes_before(each, first, now_ns)))
                first = each;
        }
    }
    if (!first)
        return false;
    log_info("sealed prefix %016llx of namespace '%s' (%llu tokens, unused for %llu s) makes room",
             (unsigned long long)first->id, first->identity.name_space, (unsigned long long)prefix_tokens(first),
             (unsigned long long)((now_ns - first->used_ns) / 1000000000u));
    server->prefixes.evicted++;
    prefix_remove(first);
    return true;
}

void prefix_expire(struct server *server, uint64_t now_ns)
{
    const uint64_t ttl_ns = server->config->prefix_ttl_s * 1000000000u;
    for (uint32_t bucket = 0; ttl_ns > 0 && bucket < PREFIX_BUCKETS; bucket++) {
        for (struct prefix *each = server->prefixes.buckets[bucket], *next; each; each = next) {
            next = each->next;
            if (each->attached > 0 || each->used_ns + ttl_ns > now_ns)
                continue;
            log_info("sealed prefix %016llx of namespace '%s' has been unused for --prefix-ttl-s: removed",
                     (unsigned long long)each->id, each->identity.name_space);
            server->prefixes.expired++;
            prefix_remove(each);
        }
    }
}

void prefix_touch(struct prefix *prefix)
{
    prefix->used_ns = env_now_ns(prefix->server->env);
}

void prefix_count(struct prefix *prefix)
{
    struct server *server = prefix->server;
    ice_status status;
    // What is on the disk is there whatever the limits say; without memory for its namespace it is not counted.
    prefix->tenant =
        tenant_take(&server->tenants, server->env, server->config, prefix->identity.name_space, true, &status);
    prefix->counted_disk_bytes = prefix_disk_bytes(prefix);
    prefix->counted_index_bytes = prefix->memory_bytes;
    for (uint32_t i = 0; i < prefix_image_count(prefix); i++)
        prefix->counted_index_bytes += prefix->images[i]->memory_bytes;
    tenant_add_index(prefix->tenant, (int64_t)prefix->counted_index_bytes);
    tenant_add_disk(prefix->tenant, (int64_t)prefix->counted_disk_bytes);
    if (prefix->tenant)
        prefix->tenant->prefixes++;
}

void prefix_uncount(struct prefix *prefix)
{
    struct server *server = prefix->server;
    struct tenant *tenant = prefix->tenant;
    if (!tenant)
        return;
    prefix->tenant = NULL;
    tenant_add_index(tenant, -(int64_t)prefix->counted_index_bytes);
    tenant_add_disk(tenant, -(int64_t)prefix->counted_disk_bytes);
    tenant->prefixes--;
    tenant_drop_empty(&server->tenants, server->env, tenant);
}
