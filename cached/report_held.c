// What is held, by whom and since when, and what each namespace has: for operators. Reactor only; what shards count is
// read through atomics, so a figure may be a moment old.
#include "cached/server.h"

#include <string.h>

// ---- leases ----

struct lease_rows {
    Icecache__Wire__Lease rows[WIRE_LEASES_LISTED_MAX], *pointers[WIRE_LEASES_LISTED_MAX];
    uint32_t from, at, count;
    uint32_t next; // 0: no more
    uint64_t now_ns;
};

// The next row, to be filled in, with what all kinds have; NULL: it is not in this part of the list.
static Icecache__Wire__Lease *add_lease(struct lease_rows *list, const char *kind, uint64_t id, uint64_t opened_ns,
                                        uint64_t used_ns)
{
    const uint32_t at = list->at++;
    if (at < list->from)
        return NULL;
    if (list->count == WIRE_LEASES_LISTED_MAX) {
        list->next = list->next ? list->next : at;
        return NULL;
    }
    Icecache__Wire__Lease *row = &list->rows[list->count];
    list->pointers[list->count++] = row;
    icecache__wire__lease__init(row);
    row->kind = (char *)(uintptr_t)kind;
    row->id = id;
    row->age_us = (list->now_ns - opened_ns) / 1000;
    row->idle_us = (list->now_ns - used_ns) / 1000;
    return row;
}

static void set_owner(Icecache__Wire__Lease *row, const struct session *session, const char *name_space, uint64_t bytes)
{
    row->session_id = session->id;
    row->pid = (uint32_t)session->pid;
    row->client_name = (char *)session->name;
    row->name_space = (char *)name_space;
    row->bytes = bytes;
}

static void add_session(struct lease_rows *list, const struct session *session)
{
    Icecache__Wire__Lease *row = add_lease(list, "session", session->id, session->since_ns, session->used_ns);
    if (row)
        set_owner(row, session, session->name_space, 0);
    const struct staging *staging = &session->staging;
    row = staging->base ? add_lease(list, "staging", session->id, staging->opened_ns, staging->used_ns) : NULL;
    if (row)
        set_owner(row, session, session->name_space, staging->bytes);
    for (const struct landing *each = session->landings; each; each = each->next) {
        row = add_lease(list, "landing", each->id, each->opened_ns, each->used_ns);
        if (row)
            set_owner(row, session, session->name_space, each->held_bytes);
    }
    for (const struct sequence *each = session->sequences; each; each = each->session_next) {
        const uint64_t used_ns = each->own ? each->own->used_ns : each->opened_ns; // no stem: it is going
        row = add_lease(list, "sequence", each->id, each->opened_ns, used_ns);
        if (!row)
            continue;
        struct sequence_usage usage;
        sequence_usage(each, &usage);
        set_owner(row, session, each->identity.name_space, usage.pool_bytes + usage.index_bytes);
    }
}

static void add_prefix(struct lease_rows *list, const struct prefix *prefix)
{
    Icecache__Wire__Lease *row = add_lease(list, "prefix", prefix->id, prefix->listed_ns, prefix->used_ns);
    if (!row)
        return;
    row->session_id = prefix->owner_id;
    row->pid = (uint32_t)prefix->owner_pid;
    row->client_name = (char *)prefix->owner;
    row->name_space = (char *)prefix->identity.name_space;
    row->bytes = prefix->counted_disk_bytes;
    row->attached = prefix->attached;
}

void report_leases(struct server *server, struct session *session, const struct env_message *to, uint64_t request_id,
                   uint32_t from)
{
    struct env *env = server->env;
    struct lease_rows *list = env->acquire(env, sizeof *list);
    if (!list) {
        reply_error(server, session, to, request_id, ICE_NO_MEMORY, "no memory for the list");
        return;
    }
    list->from = from;
    list->at = list->count = list->next = 0;
    list->now_ns = env_now_ns(env);
    for (const struct session *each = server->sessions; each; each = each->next) {
        if (each->greeted && !each->admin) // those that have ended too, while they hold something
            add_session(list, each);
    }
    for (uint32_t bucket = 0; bucket < PREFIX_BUCKETS; bucket++) {
        for (const struct prefix *each = server->prefixes.buckets[bucket]; each; each = each->next)
            add_prefix(list, each);
    }
    Icecache__Wire__Reply reply = ICECACHE__WIRE__REPLY__INIT;
    Icecache__Wire__LeaseListReply body = ICECACHE__WIRE__LEASE_LIST_REPLY__INIT;
    body.n_lease = list->count;
    body.lease = list->pointers;
    body.next = list->next;
    reply.request_id = request_id;
    reply.body_case = ICECACHE__WIRE__REPLY__BODY_LEASE_LIST;
    reply.lease_list = &body;
    reply_send(server, session, to->route, to->route_bytes, &reply);
    env->release(env, list, sizeof *list);
}

// ---- namespaces ----

struct namespace_rows {
    Icecache__Wire__NamespaceStats rows[WIRE_NAMESPACES_LISTED_MAX], *pointers[WIRE_NAMESPACES_LISTED_MAX];
    uint32_t count, next;
};

static void fill_namespace(const struct tenant *tenant, Icecache__Wire__NamespaceStats *row)
{
    const uint64_t ram_bytes = atomic_load_explicit(&tenant->ram_bytes, memory_order_relaxed);
    icecache__wire__namespace_stats__init(row);
    row->name = (char *)tenant->name;
    row->sequences = tenant->sequences;
    row->prefixes = tenant->prefixes;
    row->index_bytes = atomic_load_explicit(&tenant->index_bytes, memory_order_relaxed);
    row->pool_bytes = ram_bytes > row->index_bytes ? ram_bytes - row->index_bytes : 0; // read at two moments
    row->disk_bytes = atomic_load_explicit(&tenant->disk_bytes, memory_order_relaxed);
    row->ram_quota_bytes = tenant->quota->ram_bytes;
    row->disk_quota_bytes = tenant->quota->disk_bytes;
    row->sequences_quota = (uint32_t)tenant->quota->sequences;
    row->refused = tenant->refused;
}

void report_namespaces(struct server *server, struct session *session, const struct env_message *to,
                       uint64_t request_id, uint32_t from)
{
    struct env *env = server->env;
    struct namespace_rows *list = env->acquire(env, sizeof *list);
    if (!list) {
        reply_error(server, session, to, request_id, ICE_NO_MEMORY, "no memory for the list");
        return;
    }
    list->count = list->next = 0;
    uint32_t at = 0;
    for (uint32_t bucket = 0; bucket < TENANT_BUCKETS; bucket++) {
        for (const struct tenant *each = server->tenants.buckets[bucket]; each; each = each->next, at++) {
            if (at < from)
                continue;
            if (list->count == WIRE_NAMESPACES_LISTED_MAX) {
                list->next = list->next ? list->next : at;
                continue;
            }
            fill_namespace(each, &list->rows[list->count]);
            list->pointers[list->count] = &list->rows[list->count];
            list->count++;
        }
    }
    Icecache__Wire__Reply reply = ICECACHE__WIRE__REPLY__INIT;
    Icecache__Wire__NamespaceListReply body = ICECACHE__WIRE__NAMESPACE_LIST_REPLY__INIT;
    body.n_name_space = list->count;
    body.name_space = list->pointers;
    body.next = list->next;
    reply.request_id = request_id;
    reply.body_case = ICECACHE__WIRE__REPLY__BODY_NAMESPACE_LIST;
    reply.namespace_list = &body;
    reply_send(server, session, to->route, to->route_bytes, &reply);
    env->release(env, list, sizeof *list);
}
