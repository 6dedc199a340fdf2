// See admission.h. The wait of a retrieve is estimated from the lanes that are ahead of it and from what a lane has
// taken lately. Shards take sessions in turn, so ahead of it is what its own session has waiting, and as much of each
// other session at most.
#include "cached/admission.h"

#include "cached/server.h"

#include <stdio.h>

static bool is_counted(const struct op *op)
{
    return op->kind == OP_RETRIEVE || op->kind == OP_APPEND || op->kind == OP_READ || op->kind == OP_SEAL ||
           op->kind == OP_HINT;
}

static enum admission_class class_of(const struct op *op)
{
    return op->kind == OP_RETRIEVE ? ADMISSION_DECODE : ADMISSION_BULK;
}

void admission_enter_load(struct op *op)
{
    struct admission_state *state = &op->server->admission;
    struct admission_load *own = &op->session->load;
    const enum admission_class class = class_of(op);
    if (!is_counted(op))
        return;
    state->sessions[class] += own->requests[class]++ == 0;
    state->all.requests[class]++;
    if (class == ADMISSION_DECODE) {
        own->lanes += op->lane_count;
        state->all.lanes += op->lane_count;
    }
}

void admission_leave_load(struct op *op)
{
    struct admission_state *state = &op->server->admission;
    struct admission_load *own = &op->session->load;
    const enum admission_class class = class_of(op);
    if (!is_counted(op))
        return;
    state->sessions[class] -= --own->requests[class] == 0;
    state->all.requests[class]--;
    if (class == ADMISSION_DECODE) {
        own->lanes -= op->lane_count;
        state->all.lanes -= op->lane_count;
    }
}

void admission_learn(struct server *server, const struct op *op)
{
    uint64_t ns = 0;
    for (uint32_t i = 0; i < op->lane_count; i++)
        ns += op->lanes[i].search_ns + op->lanes[i].copy_ns;
    ns /= op->lane_count;
    const uint64_t before = server->admission.lane_ns;
    if (before > 0 && ns > 4 * before)
        ns = 4 * before; // a moment in which the machine stood still says little of the next one
    server->admission.lane_ns = before == 0 ? ns : before - before / 16 + ns / 16;
}

static uint64_t estimated_wait_ns(const struct server *server, const struct op *op)
{
    const struct admission_state *state = &server->admission;
    const struct admission_load *own = &op->session->load;
    const uint64_t sessions = state->sessions[ADMISSION_DECODE] + (own->requests[ADMISSION_DECODE] == 0);
    const uint64_t in_turns = (own->lanes + op->lane_count) * sessions;
    const uint64_t ahead = state->all.lanes < in_turns ? state->all.lanes : in_turns;
    return ahead * state->lane_ns / server->shard_count;
}

ice_status admission_check(struct server *server, const struct op *op, uint64_t now_ns, char *text, size_t capacity)
{
    const struct admission_state *state = &server->admission;
    const enum admission_class class = class_of(op);
    const bool decode = class == ADMISSION_DECODE;
    const uint64_t most = decode ? server->config->decode_queue_max : server->config->bulk_queue_max;
    const uint32_t own = op->session->load.requests[class], sessions = state->sessions[class] + (own == 0);
    if (!is_counted(op))
        return ICE_OK;
    if (state->all.requests[class] >= most && own >= 1 && own >= most / sessions) {
        server->counts.refused_overload++;
        snprintf(text, capacity,
                 "%u %s requests are in flight, %u of this session: more than its share of --%s-queue-max (%llu); wait "
                 "for replies",
                 state->all.requests[class], decode ? "decode" : "bulk", own, decode ? "decode" : "bulk",
                 (unsigned long long)most);
        return ICE_OVERLOADED;
    }
    const uint64_t wait_ns = decode ? estimated_wait_ns(server, op) : 0;
    if (wait_ns < ADMISSION_WAIT_NS || now_ns + wait_ns < op->deadline_ns)
        return ICE_OK;
    server->counts.refused_deadline++;
    snprintf(text, capacity,
             "about %llu ms of retrieves are ahead of this one, its deadline is %llu ms away; keep fewer in flight, or "
             "give it longer",
             (unsigned long long)(wait_ns / 1000000u),
             (unsigned long long)(op->deadline_ns > now_ns ? (op->deadline_ns - now_ns) / 1000000u : 0));
    return ICE_OVERLOADED;
}
