// Requests whose turn it is (intake.h): which module answers them. Reactor only.
#include "cached/log.h"
#include "cached/server.h"

#include <stdio.h>

void sequence_limit_text(const struct server *server, char *text, size_t capacity)
{
    if (server->sequence_count >= server->config->sequences_max)
        snprintf(text, capacity, "%u sequences are open, as many as --sequences-max allows", server->sequence_count);
    else
        snprintf(text, capacity,
                 "the sequence is a chain of %u forks, as many as there can be; open a sequence and append its tokens",
                 SEQUENCE_STEMS_MAX);
}

static void open_sequence(struct server *server, struct session *session, const Icecache__Wire__Request *request,
                          const struct env_message *message)
{
    struct sequence *sequence;
    char text[128] = "";
    ice_status status = sequence_open(server, session, request->sequence_open, &sequence);
    if (status == ICE_OK) {
        log_debug("sequence opened id=%llu session=%llu layers=%u kv_heads=%u head_dim=%u",
                  (unsigned long long)sequence->id, (unsigned long long)session->id, sequence->shape.layers,
                  sequence->shape.kv_heads, sequence->shape.head_dim);
        reply_sequence_open(server, session, message, request->request_id, sequence->id);
        return;
    }
    if (status == ICE_LIMIT)
        sequence_limit_text(server, text, sizeof text);
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
        report_prefixes(server, session, message, request->request_id, request->prefix_list->from);
        return true;
    default:
        return false;
    }
}

// The reason why this session may not make this request now, or ICE_OK.
static ice_status admissible(const struct server *server, const struct session *session,
                             const Icecache__Wire__Request *request)
{
    bool stats = request->body_case == ICECACHE__WIRE__REQUEST__BODY_STATS;
    bool admin = stats || request->body_case == ICECACHE__WIRE__REQUEST__BODY_PREFIX_LIST ||
                 request->body_case == ICECACHE__WIRE__REQUEST__BODY_PREFIX_REMOVE;
    if (session->admin && !admin)
        return ICE_PERMISSION;
    if (server->stopping && !stats && request->body_case != ICECACHE__WIRE__REQUEST__BODY_SEQUENCE_CLOSE)
        return ICE_SHUTTING_DOWN;
    return ICE_OK;
}

void dispatch_request(struct server *server, struct session *session, const Icecache__Wire__Request *request,
                      struct env_message *message)
{
    ice_status status = admissible(server, session, request);
    if (status != ICE_OK) {
        server->stats.errors++;
        op_signal_refused(session, request);
        reply_error(server, session, message, request->request_id, status,
                    status == ICE_PERMISSION
                        ? "an admin session can only ask for statistics and for sealed prefixes, and remove these"
                        : NULL);
        server->env->bus_release(server->env, message);
        return;
    }
    if (dispatch_simple(server, session, request, message)) {
        server->env->bus_release(server->env, message);
        return;
    }
    struct op *op = op_create(server, session, request, message);
    if (op)
        op_submit(op);
}
