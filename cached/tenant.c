// The table of namespaces and their quotas, see tenant.h. Reactor only.
//
// Growth: a bucket of a hash for each open, lookup and attach; nothing is looked up on an append.
#include "cached/tenant.h"

#define XXH_INLINE_ALL
#include <xxhash.h>

#include <assert.h>
#include <stdio.h>
#include <string.h>

static struct tenant **bucket_of(struct tenants *tenants, const char *name)
{
    return &tenants->buckets[XXH3_64bits(name, strlen(name)) % TENANT_BUCKETS];
}

static const struct config_quota *quota_of(const struct config *config, const char *name)
{
    for (uint32_t i = 0; i < config->quota_count; i++) {
        if (strcmp(config->quotas[i].name_space, name) == 0)
            return &config->quotas[i];
    }
    return &config->quota_default;
}

struct tenant *tenant_find(struct tenants *tenants, const char *name)
{
    struct tenant *tenant = *bucket_of(tenants, name);
    while (tenant && strcmp(tenant->name, name) != 0)
        tenant = tenant->next;
    return tenant;
}

struct tenant *tenant_take(struct tenants *tenants, struct env *env, const struct config *config, const char *name,
                           bool forced, ice_status *status)
{
    struct tenant *tenant = tenant_find(tenants, name);
    *status = ICE_OK;
    if (tenant)
        return tenant;
    if (!forced && tenants->count >= config->namespaces_max) {
        *status = ICE_LIMIT;
        return NULL;
    }
    tenant = env_acquire_zeroed(env, sizeof *tenant);
    if (!tenant) {
        *status = ICE_NO_MEMORY;
        return NULL;
    }
    strncpy(tenant->name, name, sizeof tenant->name - 1);
    tenant->quota = quota_of(config, tenant->name);
    tenant->pinned = tenant->quota != &config->quota_default;
    tenant->all = tenants;
    struct tenant **bucket = bucket_of(tenants, tenant->name);
    tenant->next = *bucket;
    *bucket = tenant;
    tenants->count++;
    return tenant;
}

void tenant_drop_empty(struct tenants *tenants, struct env *env, struct tenant *tenant)
{
    if (tenant->sequences > 0 || tenant->prefixes > 0 || tenant->pinned)
        return;
    assert(atomic_load(&tenant->ram_bytes) == 0 && atomic_load(&tenant->index_bytes) == 0);
    assert(atomic_load(&tenant->disk_bytes) == 0 && tenant->ram_promised == 0 && tenant->disk_promised == 0);
    struct tenant **link = bucket_of(tenants, tenant->name);
    while (*link != tenant)
        link = &(*link)->next;
    *link = tenant->next;
    tenants->count--;
    env->release(env, tenant, sizeof *tenant);
}

bool tenants_init(struct tenants *tenants, struct env *env, const struct config *config)
{
    ice_status status = ICE_OK;
    for (uint32_t i = 0; i < config->quota_count && status == ICE_OK; i++)
        (void)tenant_take(tenants, env, config, config->quotas[i].name_space, true, &status);
    return status == ICE_OK;
}

void tenants_fini(struct tenants *tenants, struct env *env)
{
    for (uint32_t bucket = 0; bucket < TENANT_BUCKETS; bucket++) {
        for (struct tenant *each; (each = tenants->buckets[bucket]) != NULL;) {
            tenants->buckets[bucket] = each->next;
            env->release(env, each, sizeof *each);
        }
    }
    tenants->count = 0;
}

// ---- quotas ----

ice_status tenant_may_open(struct tenant *tenant, char *text)
{
    const uint64_t quota = tenant->quota->sequences;
    if (quota == 0 || tenant->sequences < quota)
        return ICE_OK;
    snprintf(text, TENANT_TEXT_BYTES,
             "namespace '%s' has %u sequences open, its quota is sequences=%llu; close some or raise --quota",
             tenant->name, tenant->sequences, (unsigned long long)quota);
    return ICE_QUOTA;
}

static ice_status refuse(struct tenant *tenant, const char *what, uint64_t need, uint64_t used, uint64_t quota,
                         const char *advice, char *text)
{
    tenant->all->refused = tenant;
    snprintf(text, TENANT_TEXT_BYTES,
             "namespace '%s' has %llu bytes of %s in use or promised and needs %llu more, its quota is %llu; %s",
             tenant->name, (unsigned long long)used, what, (unsigned long long)need, (unsigned long long)quota, advice);
    return ICE_QUOTA;
}

static bool exceeds(uint64_t used, uint64_t need, uint64_t quota)
{
    return quota > 0 && need > 0 && (used > quota || need > quota - used);
}

ice_status tenant_may_take(struct tenant *tenant, struct tenant_promise *promise, const struct tenant_need *need,
                           bool has_disk, char *text)
{
    static const struct tenant_promise none;
    const struct tenant_promise *held = promise ? promise : &none;
    const uint64_t ram_quota = tenant->quota->ram_bytes, disk_quota = tenant->quota->disk_bytes;
    // With a disk pages leave memory, and what stays are trees.
    const uint64_t ram_need = need->index_bytes + (has_disk ? 0 : need->pool_bytes);
    const uint64_t ram_used =
        atomic_load_explicit(has_disk ? &tenant->index_bytes : &tenant->ram_bytes, memory_order_relaxed) +
        tenant->ram_promised - held->ram_bytes;
    const uint64_t disk_used =
        atomic_load_explicit(&tenant->disk_bytes, memory_order_relaxed) + tenant->disk_promised - held->disk_bytes;
    const bool lacks_disk = has_disk && exceeds(disk_used, need->disk_bytes, disk_quota);
    tenant->all->refused_for_disk = false;
    if (exceeds(ram_used, ram_need, ram_quota))
        return refuse(tenant, has_disk ? "trees in memory" : "memory", ram_need, ram_used, ram_quota,
                      "close sequences or raise ram= of its --quota", text);
    tenant->all->refused_for_disk = lacks_disk;
    if (lacks_disk)
        return refuse(tenant, "disk", need->disk_bytes, disk_used, disk_quota,
                      "close sequences, remove sealed prefixes or raise disk= of its --quota", text);
    if (promise) {
        tenant->ram_promised += ram_need - promise->ram_bytes;
        tenant->disk_promised += need->disk_bytes - promise->disk_bytes;
        *promise = (struct tenant_promise){ram_need, need->disk_bytes};
    }
    return ICE_OK;
}

void tenant_unpromise(struct tenant *tenant, struct tenant_promise *promise)
{
    if (!tenant)
        return;
    tenant->ram_promised -= promise->ram_bytes;
    tenant->disk_promised -= promise->disk_bytes;
    *promise = (struct tenant_promise){0};
}
