// Operations from phase to phase: each phase runs once per lane, on the lane's shard, as often as it has to wait or is
// cut. The one that finishes a phase last decides what comes next; the queue's lock (push after write, pop before read)
// orders phases between shards.
#include "cached/op.h"

#include "cached/server.h"

#include <stdio.h>
#include <string.h>

static void op_done(struct completion *completion, struct server *server)
{
    (void)server;
    struct op *op = (struct op *)((char *)completion - offsetof(struct op, completion));
    ice_status status = (ice_status)atomic_load_explicit(&op->failure, memory_order_acquire);
    char text[256] = "";
    if (op->copy_text[0])
        snprintf(text, sizeof text, "%s", op->copy_text);
    else if (op->failed)
        snprintf(text, sizeof text, "layer %u, KV head %u: %s", op->failed->lane->layer, op->failed->lane->kv_head,
                 status_text((int)status));
    if (op->kind == OP_SEAL)
        op_sealed_lanes(op, status, text);
    else
        op_finish(op, status, text);
}

void op_done_without_lanes(struct op *op)
{
    op_done(&op->completion, op->server);
}

static void next_phase(struct op *op)
{
    if (op->phase == PHASE_PREPARE) {
        bool failed = atomic_load_explicit(&op->failure, memory_order_acquire) != ICE_OK;
        op_start_phase(op, failed ? PHASE_DROP : PHASE_COMMIT);
        return;
    }
    op->completion.done = op_done;
    bool failed = atomic_load_explicit(&op->failure, memory_order_acquire) != ICE_OK;
    if (op->kind == OP_RETRIEVE && op->landing->gpu && !failed) {
        copier_push(op->landing->gpu->copier, op); // there since the landing was opened
        return;
    }
    op_signal(op); // here, so that a GPU need not wait for the reactor
    completion_post(&op->server->completions, &op->completion);
}

static enum task_class class_of(const struct op *op)
{
    return op->kind == OP_RETRIEVE ? TASK_DECODE : TASK_BULK;
}

// Each shard gets all of its lanes at once: it is woken once, and does not meet us at its queue's lock.
void op_start_phase(struct op *op, enum op_phase phase)
{
    struct server *server = op->server;
    op->phase = phase;
    atomic_store_explicit(&op->lanes_left, op->lane_count, memory_order_release);
    const enum task_class class = class_of(op);
    struct chain {
        struct task *head, *tail;
    } chains[CONFIG_SHARDS_MAX];
    const uint32_t shards = server->shard_count;
    memset(chains, 0, shards * sizeof *chains);
    for (uint32_t i = 0; i < op->lane_count; i++) {
        struct chain *chain = &chains[op->lanes[i].lane->shard];
        struct task *task = &op->lanes[i].task;
        if (chain->head)
            chain->tail->node.next = &task->node;
        else
            chain->head = task;
        chain->tail = task;
    }
    for (uint32_t i = 0; i < shards; i++) { // the op may be gone with the last one
        if (chains[i].head)
            task_queue_push_chain(&server->shards[i].queue, class, chains[i].head, chains[i].tail);
    }
}

// A part that was cut goes on when other sessions have had their turn, before what else its session has waiting.
static void queue_again(struct op_lane *part, struct shard *shard)
{
    task_queue_push_front(&shard->queue, class_of(part->op), &part->task);
}

static void finish(struct op_lane *part, ice_status status)
{
    struct op *op = part->op;
    uint32_t none = ICE_OK;
    part->parked_until_ns = 0;
    if (status != ICE_OK && atomic_compare_exchange_strong_explicit(&op->failure, &none, status, memory_order_acq_rel,
                                                                    memory_order_relaxed))
        op->failed = part; // read when all lanes are done
    if (atomic_fetch_sub_explicit(&op->lanes_left, 1, memory_order_acq_rel) == 1)
        next_phase(op);
}

// A lane that others share may have been asked for meanwhile: whoever did has cancelled the sleep before.
static ice_status fall_asleep(struct op_lane *part, struct shard *shard)
{
    struct image *image = part->image;
    part->image = NULL;
    if (atomic_load_explicit(&part->op->cancelled, memory_order_relaxed) || part->lane->gathers > 0) {
        image_destroy(shard->server, image);
        return ICE_BUSY;
    }
    if (image) // NULL: it slept already
        lane_fall_asleep(part->lane, shard, image);
    return ICE_OK;
}

void op_lane_finish(struct op_lane *part, struct shard *shard, ice_status status)
{
    if (status == ICE_OK && part->op->kind == OP_RETRIEVE) {
        op_lane_end_copy(part, &part->fetch_ns); // nearly all of it was waiting
    } else if (status == ICE_OK && part->op->kind == OP_SLEEP) {
        status = fall_asleep(part, shard);
    }
    shard->stalled = false; // a plan may have waited for the gather's memory
    finish(part, status);
}

// A prepare that has to wait does so until its pages are there, or room is; not for ever.
static void park(struct op_lane *part, struct shard *shard, uint64_t now_ns)
{
    const struct op *op = part->op;
    if (part->parked_until_ns == 0)
        part->parked_until_ns = op->kind == OP_RETRIEVE && op->deadline_ns > now_ns ? op->deadline_ns
                                : op->kind == OP_SEAL                               ? now_ns + SERVER_SEAL_WAIT_NS
                                                                                    : now_ns + SERVER_ROOM_WAIT_NS;
    part->parked_next = NULL;
    if (shard->parked)
        shard->parked_tail->parked_next = part;
    else
        shard->parked = part;
    shard->parked_tail = part;
    shard_look_again(shard, part->parked_until_ns);
}

// Positions that the part looks at, beside the lane that it is of.
static void range_of(const struct op_lane *part, uint64_t *from, uint64_t *until)
{
    const struct op *op = part->op;
    *from = op->kind == OP_APPEND || op->kind == OP_READ ? op->first : 0;
    *until = op->kind == OP_RETRIEVE || op->kind == OP_HINT ? UINT64_MAX
             : op->kind == OP_APPEND || op->kind == OP_READ ? op->first + op->tokens
                                                            : 0;
}

// Is all awake that the part looks at? What sleeps is woken at the same time.
static ice_status need_lanes(struct op_lane *part, struct shard *shard)
{
    const struct sequence *sequence = part->admission->sequence;
    uint64_t from, until;
    ice_status all = lane_need(part->lane, shard);
    part->awaited = part->lane;
    range_of(part, &from, &until);
    for (uint32_t i = 0; i < sequence->chain_count && sequence->chain[i].stem->first < until; i++) {
        struct lane *lane = op_lane_in(part, sequence->chain[i].stem);
        const ice_status status = sequence->chain[i].end > from ? lane_need(lane, shard) : ICE_OK;
        if (status == ICE_OK || (all != ICE_OK && all != LANE_WAITS))
            continue;
        all = status;
        part->awaited = lane;
    }
    return all;
}

static void run_part(struct op_lane *part, struct shard *shard, uint64_t now_ns)
{
    const enum op_phase phase = part->op->phase; // a gather may have finished the part, and the op, within the call
    const bool wakes =
        phase != PHASE_DROP && !part->known && !(part->op->kind == OP_SLEEP && part->lane->state != LANE_AWAKE);
    ice_status status = wakes ? need_lanes(part, shard) : ICE_OK;
    const bool awake = status == ICE_OK;
    if (awake)
        status = op_lane_phase(part, shard);
    if (status == LANE_WAITS && awake && phase != PHASE_PREPARE)
        return;
    if (status == LANE_CUT) {
        queue_again(part, shard);
        return;
    }
    if (phase == PHASE_WAKE || (phase == PHASE_HINT && status == LANE_WAITS))
        status = ICE_OK; // it has begun to wake: that was all
    const bool cancelled = atomic_load_explicit(&part->op->cancelled, memory_order_relaxed);
    if (status == LANE_WAITS && !cancelled && (part->parked_until_ns == 0 || now_ns < part->parked_until_ns)) {
        park(part, shard, now_ns);
        return;
    }
    if (phase == PHASE_PREPARE && awake && status != ICE_OK)
        lane_drop(part->lane, shard); // as far as a prepare that waited had come
    if (status == LANE_WAITS)
        status = cancelled ? ICE_UNKNOWN_SESSION : awake && part->lane->lacks_room ? ICE_POOL_FULL : ICE_TIMEOUT;
    finish(part, status);
}

void op_lane_run(struct task *task, void *thread)
{
    struct op_lane *part = (struct op_lane *)task;
    struct shard *shard = thread;
    run_part(part, shard, env_now_ns(part->op->server->env));
}

// Puts a list of parts that have waited before those that wait since.
static void park_first(struct shard *shard, struct op_lane *first, struct op_lane *last)
{
    last->parked_next = shard->parked;
    if (!shard->parked)
        shard->parked_tail = last;
    shard->parked = first;
}

uint64_t op_lane_run_parked(struct shard *shard, uint64_t now_ns)
{
    struct op_lane *part = shard->parked, *last = shard->parked_tail;
    uint64_t next_ns = UINT64_MAX;
    shard->parked = NULL;
    while (part) {
        struct op_lane *next = part->parked_next;
        run_part(part, shard, now_ns);
        part = next;
        if (part && env_now_ns(shard->server->env) >= now_ns + SERVER_WAITING_SLICE_NS) {
            park_first(shard, part, last);
            shard->woken = true; // the next round goes on with them
            return now_ns;
        }
    }
    for (part = shard->parked; part; part = part->parked_next)
        next_ns = part->parked_until_ns < next_ns ? part->parked_until_ns : next_ns;
    return next_ns;
}
