// Requests whose turn it is (intake.h): which module answers them. Reactor only.
#include "cached/log.h"
#include "cached/server.h"

#include <string.h>

static void open_sequence(struct server *server, struct session *session, const Icecache__Wire__Request *request,
                          const struct env_message *message)
{
    struct sequence *sequence;
    char text[TENANT_TEXT_BYTES] = "";
    ice_status status = sequence_open(server, session, request->sequence_open, text, &sequence);
    if (status == ICE_OK) {
        log_debug("sequence opened id=%llu session=%llu layers=%u kv_heads=%u head_dim=%u",
                  (unsigned long long)sequence->id, (unsigned long long)session->id, sequence->shape.layers,
                  sequence->shape.kv_heads, sequence->shape.head_dim);
        reply_sequence_open(server, session, message, request->request_id, sequence->id);
        return;
    }
    server->stats.errors++;
    reply_error(server, session, message, request->request_id, status, text);
}

static void with_sequence(struct server *server, struct session *session, const Icecache__Wire__Request *request,
                          const struct env_message *message, uint64_t id)
{
    struct sequence *sequence = sequence_find(server, session, id);
    if (!sequence) {
        server->stats.errors++;
        reply_error(server, session, message, request->request_id, ICE_UNKNOWN_SEQUENCE, NULL);
    } else if (request->body_case == ICECACHE__WIRE__REQUEST__BODY_SEQUENCE_CLOSE) {
        op_close_sequence(server, sequence, request, message);
    } else {
        reply_sequence_info(server, session, message, request->request_id, sequence);
    }
}

// Requests that are answered by the reactor itself; true when it was one.
static bool dispatch_simple(struct server *server, struct session *session, const Icecache__Wire__Request *request,
                            const struct env_message *message)
{
    switch (request->body_case) {
    case ICECACHE__WIRE__REQUEST__BODY_STATS:
        report_stats(server, session, message, request->request_id, request->stats->sequences_from);
        return true;
    case ICECACHE__WIRE__REQUEST__BODY_SEQUENCE_OPEN:
        open_sequence(server, session, request, message);
        return true;
    case ICECACHE__WIRE__REQUEST__BODY_SEQUENCE_CLOSE:
        with_sequence(server, session, request, message, request->sequence_close->sequence_id);
        return true;
    case ICECACHE__WIRE__REQUEST__BODY_SEQUENCE_INFO:
        with_sequence(server, session, request, message, request->sequence_info->sequence_id);
        return true;
    case ICECACHE__WIRE__REQUEST__BODY_LOOKUP:
        lookup_prefix(server, session, request, message);
        return true;
    case ICECACHE__WIRE__REQUEST__BODY_ATTACH:
        attach_prefix(server, session, request, message);
        return true;
    case ICECACHE__WIRE__REQUEST__BODY_PREFIX_REMOVE:
        remove_prefix(server, session, request, message);
        return true;
    case ICECACHE__WIRE__REQUEST__BODY_PREFIX_LIST:
        report_prefixes(server, session, message, request->request_id, request->prefix_list);
        return true;
    case ICECACHE__WIRE__REQUEST__BODY_LEASE_LIST:
        report_leases(server, session, message, request->request_id, request->lease_list->from);
        return true;
    case ICECACHE__WIRE__REQUEST__BODY_NAMESPACE_LIST:
        report_namespaces(server, session, message, request->request_id, request->namespace_list->from);
        return true;
    default:
        return false;
    }
}

// The namespace that a request speaks of; NULL: none. What names a sequence needs none: the session holds that.
static const char *name_space_of(const struct session *session, const Icecache__Wire__Request *request)
{
    switch (request->body_case) {
    case ICECACHE__WIRE__REQUEST__BODY_SEQUENCE_OPEN:
        return request->sequence_open->name_space;
    case ICECACHE__WIRE__REQUEST__BODY_LOOKUP:
        return request->lookup->identity->name_space;
    case ICECACHE__WIRE__REQUEST__BODY_ATTACH:
        return request->attach->open->name_space;
    case ICECACHE__WIRE__REQUEST__BODY_PREFIX_REMOVE:
        return named_space(session, request->prefix_remove->name_space);
    case ICECACHE__WIRE__REQUEST__BODY_PREFIX_LIST:
        return named_space(session, request->prefix_list->name_space);
    default:
        return NULL;
    }
}

// Who may ask for what: an admin session holds nothing, a worker sees what is its own, and where its hello has named a
// namespace, nothing of another. NULL: it may.
static const char *not_permitted(const struct session *session, const Icecache__Wire__Request *request)
{
    const bool own = request->body_case == ICECACHE__WIRE__REQUEST__BODY_LEASE_LIST ||
                     request->body_case == ICECACHE__WIRE__REQUEST__BODY_NAMESPACE_LIST;
    const bool admin = own || request->body_case == ICECACHE__WIRE__REQUEST__BODY_STATS ||
                       request->body_case == ICECACHE__WIRE__REQUEST__BODY_PREFIX_LIST ||
                       request->body_case == ICECACHE__WIRE__REQUEST__BODY_PREFIX_REMOVE;
    if (session->admin && !admin)
        return "an admin session can only ask for statistics and for sealed prefixes, and remove these";
    if (own && !session->admin)
        return "only an admin session sees what others hold; use icecachectl";
    const char *name_space = name_space_of(session, request);
    if (session->name_space[0] != '\0' && name_space && strcmp(name_space, session->name_space) != 0)
        return "the session's hello has bound it to another namespace; name that one, or connect without one";
    return NULL;
}

// The reason why this session may not make this request now, or ICE_OK.
static ice_status admissible(const struct server *server, const struct session *session,
                             const Icecache__Wire__Request *request, const char **text)
{
    bool stats = request->body_case == ICECACHE__WIRE__REQUEST__BODY_STATS;
    *text = not_permitted(session, request);
    if (*text)
        return ICE_PERMISSION;
    if (server->stopping && !stats && request->body_case != ICECACHE__WIRE__REQUEST__BODY_SEQUENCE_CLOSE)
        return ICE_SHUTTING_DOWN;
    return ICE_OK;
}

void dispatch_request(struct server *server, struct session *session, const Icecache__Wire__Request *request,
                      struct env_message *message)
{
    const char *text;
    session->used_ns = env_now_ns(server->env);
    ice_status status = admissible(server, session, request, &text);
    if (status != ICE_OK) {
        server->stats.errors++;
        op_signal_refused(session, request);
        reply_error(server, session, message, request->request_id, status, text);
        rings_release(server, message);
        return;
    }
    if (dispatch_simple(server, session, request, message)) {
        rings_release(server, message);
        return;
    }
    struct op *op = op_create(server, session, request, message);
    if (op)
        op_submit(op);
}
