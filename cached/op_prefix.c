// Requests about sealed prefixes, on the reactor: sealing, which is an operation on all lanes of a sequence, and those
// that are answered at once.
//
//   seal: admitted alone -> images of all lanes (shards) -> sync of the spill file (I/O thread) -> manifest (keeper)
//   -> listed and answered (reactor)
#include "cached/log.h"
#include "cached/prefix.h"
#include "cached/quota.h"
#include "cached/server.h"

#include <stdio.h>
#include <string.h>

typedef const uint8_t (*hashes_t)[PREFIX_BLOCK_BYTES];

// The hashes in frame 2.
static ice_status hashes_of(const struct env_message *message, uint32_t block_tokens, hashes_t *hashes, uint32_t *count,
                            struct wire_error *error)
{
    *hashes = (hashes_t)message->vectors;
    return wire_hashes_check(message->vectors_bytes, block_tokens, count, error);
}

static ice_status need_disk(const struct server *server, struct wire_error *error)
{
    if (tier_serves(server))
        return ICE_OK;
    wire_error_set(error, ICE_DISK_FAILED, "%s", prefix_disk_text(server));
    return ICE_DISK_FAILED;
}

const char *prefix_disk_text(const struct server *server)
{
    struct disk_usage usage;
    if (!server->disk)
        return "the daemon has no disk; start icecached with --spill-dir";
    if (disk_is_off(server->disk))
        return "the daemon's disk has failed and is switched off; see its log, mend the disk, restart icecached";
    disk_usage(server->disk, &usage);
    return usage.sync_failed ? "a sync of the daemon's spill file has failed, so that nothing can be made stable any "
                               "more; see its log, mend the disk, restart icecached"
                             : "the daemon's disk failed; see its log";
}

static void answer_error(struct server *server, struct session *session, const struct env_message *to,
                         uint64_t request_id, ice_status status, const char *text)
{
    server->stats.errors++;
    reply_error(server, session, to, request_id, status, text);
}

// ---- seal ----

// Sealed already, with exactly these blocks?
static struct prefix *known_prefix(const struct op *op)
{
    struct server *server = op->server;
    uint32_t blocks;
    struct prefix *prefix =
        prefix_find(server, &op->admissions[0].sequence->identity, (hashes_t)op->message.vectors, op->blocks, &blocks);
    return prefix && blocks == op->blocks && prefix->block_count == op->blocks ? prefix : NULL;
}

ice_status op_check_seal(struct op *op, char *text, size_t capacity)
{
    const struct sequence *sequence = op->admissions[0].sequence;
    const uint64_t length = sequence_length(sequence, 0, sequence->shape.layers);
    const uint64_t tokens = (uint64_t)op->blocks * sequence->identity.block_tokens;
    if (tokens <= length)
        return known_prefix(op) ? ICE_OK : quota_may_seal(op->admissions[0].sequence, tokens, text);
    snprintf(text, capacity, "%u blocks are %llu tokens, the shortest layer has %llu; seal whole blocks that are there",
             op->blocks, (unsigned long long)tokens, (unsigned long long)length);
    return ICE_POSITION_GAP;
}

bool op_seal_is_known(struct op *op)
{
    struct prefix *prefix = known_prefix(op);
    if (!prefix)
        return false;
    prefix_touch(prefix);
    op->prefix_id = prefix->id;
    op->prefix_known = true;
    return true;
}

static void destroy_images(struct op *op)
{
    for (uint32_t i = 0; i < op->lane_count; i++) {
        image_destroy(op->server, op->lanes[i].image);
        op->lanes[i].image = NULL;
    }
}

static uint64_t sealed_tokens(const struct op *op)
{
    return (uint64_t)op->blocks * op->admissions[0].sequence->identity.block_tokens;
}

// Images of a stem that a sealed prefix has; NULL: none has.
static struct image *const *known_images(const struct stem *stem)
{
    return stem->sources ? stem->sources->images : stem->images;
}

bool op_seal_concerns(const struct op *op, const struct stem *stem)
{
    return stem->first < sealed_tokens(op);
}

// Held from the beginning: the prefix that has them may be removed meanwhile.
struct image *op_seal_known(const struct stem *stem, uint32_t lane)
{
    struct image *const *known = known_images(stem);
    if (!known)
        return NULL;
    image_hold(known[lane]);
    return known[lane];
}

static uint32_t sealed_stems(const struct op *op)
{
    const struct sequence *sequence = op->admissions[0].sequence;
    uint32_t count = 0;
    while (count <= sequence->chain_count && sequence_stem(sequence, count)->first < sealed_tokens(op))
        count++;
    return count;
}

void op_share_stems(struct op *op, struct prefix *prefix)
{
    struct sequence *sequence = op->admissions[0].sequence;
    const uint32_t own = sequence->chain_count;
    for (uint32_t i = 0; i < prefix->part_count; i++) {
        struct stem *stem = sequence_stem(sequence, i);
        if (i == own && (!sequence_is_even(sequence) || sequence_share_own(sequence) != ICE_OK))
            return; // then the prefix is a copy of what the sequence had
        prefix_know_stem(&prefix->parts[i], stem);
    }
}

// Reactor, when the keeper has written the manifest, or something has failed.
static void sealed(struct completion *completion, struct server *server)
{
    struct prefix *prefix = (struct prefix *)((char *)completion - offsetof(struct prefix, completion));
    struct op *op = prefix->op;
    const ice_status status = prefix->status;
    prefix->op = NULL;
    if (status == ICE_OK) {
        op->prefix_id = prefix->id;
        prefix_list_add(prefix);
        op_leave_stems(op);
        op_share_stems(op, prefix);
        log_debug("prefix sealed id=%016llx tokens=%llu bytes=%llu", (unsigned long long)prefix->id,
                  (unsigned long long)prefix_tokens(prefix), (unsigned long long)prefix_disk_bytes(prefix));
    } else if (status == ICE_DISK_FAILED) {
        prefix_abandon(prefix); // perhaps its manifest is there
    } else {
        prefix_destroy(prefix);
    }
    op_finish(op, status, status == ICE_DISK_FAILED ? prefix_disk_text(server) : NULL);
}

void op_fill_parts(struct op *op, struct prefix *prefix)
{
    const struct sequence *sequence = op->admissions[0].sequence;
    const uint64_t tokens = sealed_tokens(op);
    uint32_t number = 0;
    for (uint32_t i = 0; i < prefix->part_count; i++) {
        const struct stem *stem = sequence_stem(sequence, i);
        struct prefix_part *part = &prefix->parts[i];
        const uint64_t end = sequence_stem_end(sequence, i);
        part->first = stem->first;
        part->end = end < tokens ? end : tokens;
        for (uint32_t lane = 0; lane < stem->lane_count; lane++, number++) {
            part->images[lane] = op->lanes[number].image;
            op->lanes[number].image = NULL;
        }
    }
}

void op_sealed_lanes(struct op *op, ice_status status, const char *text)
{
    struct server *server = op->server;
    const struct sequence *sequence = op->admissions[0].sequence;
    if (status != ICE_OK) {
        destroy_images(op);
        op_finish(op, status, status == ICE_DISK_FAILED ? prefix_disk_text(server) : text);
        return;
    }
    struct prefix *prefix =
        prefix_create(server, &sequence->identity, sequence->own->lane_count, sealed_stems(op), op->blocks);
    if (!prefix || server->env->random(server->env, &prefix->id, sizeof prefix->id) != 0) {
        if (prefix)
            prefix_destroy(prefix);
        destroy_images(op);
        op_finish(op, ICE_INDEX_FULL, NULL);
        return;
    }
    prefix->seed = sequence->own->seed;
    prefix->root = sequence->own->root;
    memcpy(prefix->hashes, op->message.vectors, (size_t)op->blocks * PREFIX_BLOCK_BYTES);
    op_fill_parts(op, prefix);
    prefix->owner_id = op->session->id;
    prefix->owner_pid = op->session->pid;
    memcpy(prefix->owner, op->session->name, sizeof prefix->owner);
    prefix->op = op;
    prefix->completion.done = sealed;
    prefix_write(prefix);
}

// ---- answered at once ----

// A prefix can be attached to as far as one likes, so what every rank has is what the one that has least has.
static uint32_t find_for_all_ranks(struct server *server, struct prefix_identity *identity, hashes_t hashes,
                                   uint32_t count)
{
    for (identity->tp_rank = 0; identity->tp_rank < identity->tp_size && count > 0; identity->tp_rank++)
        prefix_find(server, identity, hashes, count, &count);
    return count;
}

void lookup_prefix(struct server *server, struct session *session, const Icecache__Wire__Request *request,
                   const struct env_message *message)
{
    const Icecache__Wire__SequenceOpen *open = request->lookup->identity;
    struct wire_error error = {0};
    struct prefix_identity identity;
    hashes_t hashes;
    uint32_t count, blocks;
    ice_status status = need_disk(server, &error);
    if (status == ICE_OK)
        status = hashes_of(message, open->block_tokens, &hashes, &count, &error);
    if (status != ICE_OK) {
        answer_error(server, session, message, request->request_id, status, error.text);
        return;
    }
    prefix_identity_of(server, open, &identity);
    if (request->lookup->all_ranks)
        blocks = find_for_all_ranks(server, &identity, hashes, count);
    else
        prefix_find(server, &identity, hashes, count, &blocks);
    reply_lookup(server, session, message, request->request_id, (uint64_t)blocks * open->block_tokens);
}

// As many whole blocks of what matches as are wanted.
static uint32_t wanted_blocks(const Icecache__Wire__Attach *attach, uint32_t blocks)
{
    const uint64_t most = attach->tokens_max / attach->open->block_tokens;
    return attach->tokens_max == 0 || most >= blocks ? blocks : (uint32_t)most;
}

void attach_prefix(struct server *server, struct session *session, const Icecache__Wire__Request *request,
                   const struct env_message *message)
{
    const Icecache__Wire__SequenceOpen *open = request->attach->open;
    struct wire_error error = {0};
    struct prefix_identity identity;
    struct prefix *prefix = NULL;
    struct sequence *sequence;
    hashes_t hashes;
    uint32_t count, blocks = 0;
    char text[TENANT_TEXT_BYTES] = "";
    ice_status status = need_disk(server, &error);
    if (status == ICE_OK)
        status = hashes_of(message, open->block_tokens, &hashes, &count, &error);
    memcpy(text, error.text, sizeof error.text);
    if (status == ICE_OK) {
        prefix_identity_of(server, open, &identity);
        prefix = prefix_find(server, &identity, hashes, count, &blocks);
        blocks = prefix ? wanted_blocks(request->attach, blocks) : 0;
        status = blocks > 0 ? ICE_OK : ICE_UNKNOWN_PREFIX;
    }
    const uint64_t tokens = (uint64_t)blocks * open->block_tokens;
    if (status == ICE_OK)
        status = quota_may_attach(server, prefix, tokens, text);
    if (status == ICE_OK)
        status = sequence_attach(server, session, open, prefix, tokens, text, &sequence);
    if (status != ICE_OK) {
        answer_error(server, session, message, request->request_id, status, text);
        return;
    }
    reply_attach(server, session, message, request->request_id, sequence->id, tokens);
    op_wake_sequence(server, sequence);
}

// ---- remove: answered when the manifest is gone for good ----

const char *named_space(const struct session *session, const char *name_space)
{
    if (name_space[0] != '\0')
        return name_space;
    return session->admin ? NULL : WIRE_NAME_SPACE_DEFAULT;
}

struct prefix_waiter {
    struct prefix_waiter *next;
    struct session *session; // held
    uint64_t request_id;
    struct env_message to; // its route only
};

void remove_prefix(struct server *server, struct session *session, const Icecache__Wire__Request *request,
                   const struct env_message *message)
{
    struct wire_error error = {0};
    struct prefix *prefix = prefix_by_id(server, request->prefix_remove->prefix_id);
    // In another namespace than the one that is named there is no such prefix; an admin session need name none.
    const char *name_space = named_space(session, request->prefix_remove->name_space);
    if (prefix && name_space && strcmp(prefix->identity.name_space, name_space) != 0)
        prefix = NULL;
    struct prefix_waiter *waiter = prefix ? env_acquire_zeroed(server->env, sizeof *waiter) : NULL;
    if (!waiter) {
        const ice_status status = prefix ? ICE_NO_MEMORY : ICE_UNKNOWN_PREFIX;
        wire_error_set(&error, status, "%s", prefix ? "no memory" : "no sealed prefix of this namespace has this id");
        answer_error(server, session, message, request->request_id, status, error.text);
        return;
    }
    waiter->session = session;
    waiter->request_id = request->request_id;
    memcpy(waiter->to.route, message->route, message->route_bytes);
    waiter->to.route_bytes = message->route_bytes;
    waiter->next = prefix->waiters;
    prefix->waiters = waiter;
    session_hold(session);
    session->inflight++; // as an op: it is waited for at a stop, and a session has so many
    server->ops++;
    prefix_remove(prefix);
}

void prefix_removed(struct prefix *prefix, ice_status status)
{
    struct server *server = prefix->server;
    struct wire_error error = {0};
    if (status != ICE_OK)
        wire_error_set(
            &error, status, "%s",
            "the manifest cannot be removed, see the daemon's log; the prefix is not found any more, but may "
            "be back after a restart; remove it again");
    for (struct prefix_waiter *waiter = prefix->waiters, *next; waiter; waiter = next) {
        struct session *session = waiter->session;
        next = waiter->next;
        server->ops--;
        session->inflight--;
        server->stats.errors += status != ICE_OK && !session->dead;
        if (!session->dead)
            reply_error(server, session, &waiter->to, waiter->request_id, status, error.text);
        session_release(server, session);
        server->env->release(server->env, waiter, sizeof *waiter);
    }
    prefix->waiters = NULL;
}
