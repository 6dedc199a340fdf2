// See world.h. One thread.
#include "world.h"

#include <stdlib.h>
#include <string.h>

uint64_t world_now_ns;

static uint64_t sim_now(struct env *env)
{
    (void)env;
    return world_now_ns;
}

// ---- the world ----

static void take_hogs(struct world *world)
{
    const uint64_t row = world->shape.head_dims[0] * dtype_bytes(DTYPE_BF16);
    const uint64_t bytes = server_frame_bytes(&world->server, row), frames = POOL_SLAB_BYTES / bytes;
    if (world->shape.frames == 0 || world->shape.frames >= frames)
        return;
    assert_true(frames - world->shape.frames <= WORLD_HOGS);
    while (world->hog_count < frames - world->shape.frames) {
        void *hog = pool_acquire(world->server.pool, NULL, bytes);
        assert_non_null(hog);
        world->hogs[world->hog_count++] = hog;
    }
}

static void make_memory(struct world *world)
{
    const size_t bytes = (size_t)WORLD_HEADS * WORLD_TOKENS * 256; // rows of the largest head_dim
    for (uint32_t i = 0; i < WORLD_SEQUENCES; i++) {
        world->members[i].keys = malloc(bytes);
        world->members[i].values = malloc(bytes);
    }
    for (uint32_t i = 0; i < WORLD_SEALS; i++) {
        world->seals[i].keys = malloc(bytes);
        world->seals[i].values = malloc(bytes);
    }
    for (uint32_t i = 0; i < WORLD_OPS; i++) {
        world->works[i].staging = malloc(2 * bytes + 4096 * sizeof(float));
        world->works[i].slots = malloc(2 * bytes);
        world->works[i].positions = malloc(WORLD_HEADS * WORLD_TOKENS * sizeof(uint32_t));
        const struct landing_shape landing = {1, 1, WORLD_HEADS, WORLD_TOKENS, 16, DTYPE_BF16};
        assert_int_equal(records_init(&world->works[i].records, &landing), ICE_OK);
    }
}

void world_init(struct world *world, const struct world_shape *shape, uint64_t seed)
{
    *world = (struct world){.shape = *shape,
                            .rng = {seed},
                            .config = {.page_tokens = shape->page_tokens,
                                       .seed = 1,
                                       .sequences_max = WORLD_SEQUENCES,
                                       .tokens_max = WORLD_TOKENS,
                                       .namespaces_max = 1}};
    struct server *server = &world->server;
    world_now_ns = 1000000000u;
    env_linux_init(&world->env);
    world->env.now_ns = sim_now;
    server->env = &world->env;
    server->config = &world->config;
    budget_init(&server->index_budget, shape->index_bytes);
    assert_int_equal(completion_list_init(&server->completions), 0);
    sim_disk_init(&world->disk, shape->spill_bytes);
    server->disk = sim_disk_as_disk(&world->disk);
    assert_int_equal(extents_create(&world->env, shape->spill_bytes, &server->extents), 0);
    struct pool_regions regions;
    const struct pool_wish wish = {.capacity_bytes = shape->slabs * POOL_SLAB_BYTES, .rungs = ENV_RUNG(ENV_HUGE_NONE)};
    assert_int_equal(pool_regions_map(&world->env, &wish, &regions), 0);
    assert_int_equal(pool_create(&world->env, &regions, &server->pool), 0);
    const size_t books = pool_capacity_bytes(server->pool) / EXTENT_UNIT * sizeof *server->books;
    server->books = env_acquire_zeroed(&world->env, books);
    server->shards = world->shards;
    server->shard_count = shape->shards;
    for (uint32_t i = 0; i < shape->shards; i++)
        assert_int_equal(shard_init(server, &world->shards[i], i), 0);
    world->session.holds = 1;
    take_hogs(world);
    make_memory(world);
}

static void free_memory(struct world *world)
{
    for (uint32_t i = 0; i < WORLD_SEQUENCES; i++) {
        free(world->members[i].keys);
        free(world->members[i].values);
    }
    for (uint32_t i = 0; i < WORLD_SEALS; i++) {
        free(world->seals[i].keys);
        free(world->seals[i].values);
    }
    for (uint32_t i = 0; i < WORLD_OPS; i++) {
        free(world->works[i].staging);
        free(world->works[i].slots);
        free(world->works[i].positions);
        records_fini(&world->works[i].records);
    }
}

// Everything has been closed: all must be back.
void world_fini(struct world *world)
{
    struct server *server = &world->server;
    struct extents_usage extents;
    while (world->disk.held_count > 0)
        sim_disk_answer(&world->disk, 0, SIM_WELL);
    for (uint32_t i = 0; i < world->shape.shards; i++)
        shard_fini(&world->shards[i]);
    for (uint32_t i = 0; i < world->hog_count; i++)
        pool_release(server->pool, world->hogs[i]);
    extents_usage(server->extents, &extents);
    assert_int_equal(world->stem_count, 0);
    assert_int_equal(world->session.holds, 1);
    assert_int_equal(extents.used_extents, 0);
    assert_int_equal(budget_used(&server->index_budget), 0);
    assert_int_equal(budget_committed(&server->index_budget), 0);
    assert_int_equal(pool_free_bytes(server->pool), pool_capacity_bytes(server->pool));
    assert_int_equal(atomic_load(&server->tier_stats.resident), 0);
    assert_int_equal(atomic_load(&server->tier_stats.asleep), 0);
    world->env.release(&world->env, server->books,
                       pool_capacity_bytes(server->pool) / EXTENT_UNIT * sizeof *server->books);
    pool_destroy(server->pool);
    extents_destroy(server->extents);
    sim_disk_fini(&world->disk);
    completion_list_fini(&server->completions);
    budget_fini(&server->index_budget);
    free_memory(world);
}

// ---- sequences ----

// Small enough in bf16, some clusters of keys, and V of any bits.
static void make_content(struct world *world, struct member *member, uint64_t from)
{
    struct rng rng = {++world->next_content};
    const uint32_t dim = member->sequence->shape.head_dim;
    for (uint32_t head = 0; head < WORLD_HEADS; head++) {
        for (uint64_t position = from; position < WORLD_TOKENS; position++) {
            uint8_t *key = model_row(member->keys, member, head, position);
            uint8_t *value = model_row(member->values, member, head, position);
            const uint32_t cluster = rng_below(&rng, 7);
            for (uint32_t i = 0; i < dim; i++) {
                const uint64_t x = rng_next(&rng);
                const uint16_t k =
                    (uint16_t)(0x3f00u | (((cluster * 37 + i * 11) & 31u) << 11 & 0x8000u) | (x & 0x3fu));
                const uint16_t v = (uint16_t)(x >> 32);
                memcpy(key + 2 * i, &k, 2);
                memcpy(value + 2 * i, &v, 2);
            }
        }
    }
}

static void note_stem(struct world *world, struct stem *stem)
{
    for (uint32_t i = 0; i < world->stem_count; i++)
        if (world->stems[i] == stem)
            return;
    assert_true(world->stem_count < WORLD_STEMS);
    world->stems[world->stem_count++] = stem;
}

// Stems that the sequence has got.
static void note_stems(struct world *world, const struct sequence *sequence)
{
    for (uint32_t i = 0; i <= sequence->chain_count; i++)
        note_stem(world, sequence_stem(sequence, i));
}

static void copy_content(const struct member *member, uint8_t *keys, uint8_t *values, const uint8_t *from_keys,
                         const uint8_t *from_values, uint64_t tokens)
{
    for (uint32_t head = 0; head < WORLD_HEADS; head++) {
        const size_t at = (size_t)head * WORLD_TOKENS * member_row_bytes(member);
        memcpy(keys + at, from_keys + at, tokens * member_row_bytes(member));
        memcpy(values + at, from_values + at, tokens * member_row_bytes(member));
    }
}

static bool is_full(ice_status status)
{
    return status == ICE_INDEX_FULL || status == ICE_LIMIT; // a world may be short of it
}

void world_open(struct world *world, struct member *member, struct seal *seal, uint64_t tokens)
{
    const uint32_t dim = seal ? seal->head_dim : world->shape.head_dims[rng_below(&world->rng, 2)];
    uint8_t digest = (uint8_t)dim;
    Icecache__Wire__SequenceOpen message = ICECACHE__WIRE__SEQUENCE_OPEN__INIT;
    message.name_space = "sim";
    message.model_digest.data = &digest;
    message.model_digest.len = 1;
    message.tp_size = message.layers = message.block_tokens = 1;
    message.kv_heads = message.query_heads = WORLD_HEADS;
    message.head_dim = dim;
    message.dtype = DTYPE_BF16;
    message.softmax_scale = 0.1f;
    struct sequence *sequence;
    char text[TENANT_TEXT_BYTES];
    const ice_status status =
        seal ? sequence_attach(&world->server, &world->session, &message, seal->prefix, tokens, text, &sequence)
             : sequence_open(&world->server, &world->session, &message, text, &sequence);
    assert_true(status == ICE_OK || is_full(status));
    if (status != ICE_OK)
        return;
    *member = (struct member){.open = true, .keys = member->keys, .values = member->values, .sequence = sequence};
    note_stems(world, sequence);
    make_content(world, member, tokens);
    if (seal)
        copy_content(member, member->keys, member->values, seal->keys, seal->values, tokens);
}

void member_give_up_promise(struct member *member)
{
    stem_unreserve(member->sequence->own);
    member->promised_to = 0;
}

static bool is_free(const struct member *member)
{
    return member->open && !member->closing && !member->writer && member->readers + member->hints == 0;
}

void world_fork(struct world *world, struct member *parent, struct member *child, uint64_t tokens)
{
    struct sequence *sequence;
    char text[TENANT_TEXT_BYTES];
    if (!is_free(parent) || parent->sequence->chain_count + 1 >= WORLD_CHAIN)
        return;
    const ice_status status = sequence_fork(parent->sequence, tokens, text, &sequence);
    assert_true(status == ICE_OK || is_full(status));
    note_stems(world, parent->sequence);
    if (parent->sequence->own->first == member_length(parent))
        parent->promised_to = 0; // what was promised was the old stem's
    if (status != ICE_OK)
        return;
    *child = (struct member){.open = true, .keys = child->keys, .values = child->values, .sequence = sequence};
    note_stems(world, sequence);
    make_content(world, child, tokens);
    copy_content(child, child->keys, child->values, parent->keys, parent->values, tokens);
    world->kinds[OP_FORK]++;
}

// The caller has seen to it that no request is on the sequence.
void world_close(struct world *world, struct member *member)
{
    assert_true(is_free(member));
    member->closing = true;
    member_give_up_promise(member);
    op_close_sequence(&world->server, member->sequence, NULL, NULL);
}

// A stem goes for good; the last one of a sequence takes that along.
static void stem_ends(struct world *world, uint32_t number)
{
    const struct stem *stem = world->stems[number];
    assert_int_equal(atomic_load(&stem->page_count), 0);
    assert_int_equal(atomic_load(&stem->resident), 0);
    assert_int_equal(atomic_load(&stem->index_bytes), stem->bytes);
    assert_int_equal(atomic_load(&stem->lanes_due), 0);
    world->stems[number] = world->stems[--world->stem_count];
}

static void note_closed(struct world *world)
{
    for (uint32_t i = 0; i < WORLD_SEQUENCES; i++) {
        struct member *member = &world->members[i];
        bool is_there = false;
        for (const struct sequence *each = world->session.sequences; each; each = each->session_next)
            is_there |= each == member->sequence;
        if (member->closing && !is_there)
            member->open = member->closing = false;
    }
}

void world_unseal(struct world *world, struct seal *seal)
{
    (void)world;
    assert_true(seal->prefix && seal->prefix->attached == 0);
    prefix_destroy(seal->prefix);
    seal->prefix = NULL;
}

// ---- requests ----

static struct work *free_work(struct world *world)
{
    for (uint32_t i = 0; i < WORLD_OPS; i++)
        if (!world->works[i].used)
            return &world->works[i];
    return NULL;
}

static enum op_phase first_phase(const struct op *op)
{
    if (op->kind == OP_APPEND || op->kind == OP_TRUNCATE || op->append)
        return PHASE_PREPARE;
    return op->kind == OP_READ       ? PHASE_READ
           : op->kind == OP_RETRIEVE ? PHASE_SEARCH
           : op->kind == OP_HINT     ? PHASE_HINT
                                     : PHASE_SAVE;
}

static void use_stems(struct work *work, int change)
{
    const struct sequence *sequence = work->member->sequence;
    for (uint32_t i = 0; i <= sequence->chain_count; i++)
        sequence_stem(sequence, i)->users += (uint32_t)change;
}

// Whoever comes is waited for no longer than the slice that runs.
static void cancel_sleep(const struct sequence *sequence)
{
    for (uint32_t i = 0; i <= sequence->chain_count; i++) {
        struct op *sleep = sequence_stem(sequence, i)->sleep_op;
        if (sleep)
            atomic_store(&sleep->cancelled, true);
    }
}

static bool concerns(const struct op *op, const struct sequence *sequence, const struct stem *stem)
{
    switch (op->kind) {
    case OP_SEAL:
        return op_seal_concerns(op, stem);
    case OP_SLEEP:
        return idle_stem(stem, UINT64_MAX, 0);
    default:
        return stem == sequence->own;
    }
}

static void take_lanes(struct work *work)
{
    const struct sequence *sequence = work->member->sequence;
    struct op *op = &work->op;
    op->lanes = work->lanes;
    for (uint32_t i = 0; i <= sequence->chain_count; i++) {
        struct stem *stem = sequence_stem(sequence, i);
        if (!concerns(op, sequence, stem))
            continue;
        if (op->kind == OP_SLEEP)
            stem->sleep_op = op;
        for (uint32_t head = 0; head < WORLD_HEADS; head++) {
            struct image *known = op->kind == OP_SEAL ? op_seal_known(stem, head) : NULL;
            op->lanes[op->lane_count++] = (struct op_lane){.task = {.run = op_lane_run},
                                                           .op = op,
                                                           .lane = &stem->lanes[head],
                                                           .admission = &work->admission,
                                                           .known = known != NULL,
                                                           .image = known};
        }
    }
}

// Cuts the chain at once where the own stem has nothing of what is left.
static bool cuts_chain(struct world *world, struct member *member, const struct op *op)
{
    if (op->kind != OP_TRUNCATE || op->first >= member->sequence->own->first)
        return false;
    member_give_up_promise(member);
    const ice_status status = sequence_cut(member->sequence, op->first);
    assert_true(status == ICE_OK || is_full(status));
    note_stems(world, member->sequence);
    if (status == ICE_OK) {
        member->sequence->binding = ++world->server.next_id;
        make_content(world, member, op->first);
        world->kinds[OP_TRUNCATE]++;
    }
    return true;
}

static void end_work(struct world *world, struct work *work);

static enum admission_mode mode_of(const struct op *op)
{
    switch (op->kind) {
    case OP_HINT:
        return ADMIT_HINT;
    case OP_APPEND:
        return ADMIT_APPEND;
    case OP_READ:
    case OP_RETRIEVE:
        return op->append ? ADMIT_APPEND : ADMIT_READ;
    default:
        return ADMIT_ALONE;
    }
}

// As the reactor does it, but that nobody waits.
static bool admit(struct member *member, enum admission_mode mode)
{
    const bool writes = mode == ADMIT_APPEND || mode == ADMIT_ALONE;
    if (writes && (member->readers > 0 || (mode == ADMIT_ALONE && member->hints > 0)))
        return false;
    member->hints += mode == ADMIT_HINT;
    member->readers += mode == ADMIT_READ;
    member->writer |= writes;
    member->is_alone |= mode == ADMIT_ALONE;
    return true;
}

static void leave(struct member *member, enum admission_mode mode)
{
    const bool writes = mode == ADMIT_APPEND || mode == ADMIT_ALONE;
    member->hints -= mode == ADMIT_HINT;
    member->readers -= mode == ADMIT_READ;
    member->writer &= !writes;
    member->is_alone &= mode != ADMIT_ALONE;
}

void world_request(struct world *world, struct member *member, enum op_kind kind)
{
    struct work *work = free_work(world);
    if (!work || !member->open || member->closing)
        return;
    cancel_sleep(member->sequence);
    if (kind == OP_HINT ? member->is_alone : member->writer)
        return;
    work->op = (struct op){.kind = kind, .server = &world->server, .session = &work->session, .layers = 1};
    work->member = member;
    work->session.staging.base = work->staging;
    work->length = member_length(member);
    if (!request_fill(world, work, kind))
        return;
    struct op *op = &work->op;
    const enum admission_mode mode = mode_of(op);
    if (!admit(member, mode))
        return;
    if (cuts_chain(world, member, op)) {
        leave(member, mode);
        return;
    }
    work->used = true;
    op->received_ns = world_now_ns;
    op->sequence_count = 1;
    op->admissions = &work->admission;
    work->admission = (struct admission){.op = op, .sequence = member->sequence, .mode = mode};
    take_lanes(work);
    use_stems(work, 1);
    if (op->lane_count > 0)
        op_start_phase(op, first_phase(op));
    else
        end_work(world, work);
}

// ---- their ends ----

static void expect_slots(struct world *world, struct work *work, uint32_t head)
{
    struct member *member = work->member;
    const struct op *op = &work->op;
    const uint64_t visible = work->first_queries[0] + op->queries;
    const size_t bytes = member_row_bytes(member), side = WORLD_TOKENS * bytes;
    const uint32_t *positions = work->positions + (size_t)head * WORLD_TOKENS;
    const uint32_t count = work->counts[head];
    bool seen[WORLD_TOKENS] = {false};
    for (uint32_t slot = 0; slot < count; slot++) {
        const uint32_t position = positions[slot];
        assert_true(position < visible && !seen[position]);
        seen[position] = true;
        const uint8_t *row = work->slots + 2 * head * side + slot * bytes;
        assert_memory_equal(row, model_row(member->keys, member, head, position), bytes);
        assert_memory_equal(row + side, model_row(member->values, member, head, position), bytes);
    }
    if (op->budget >= visible && !op->holds_ends && !work->lanes[head].partial)
        assert_int_equal(count, visible);
    world->partial += work->lanes[head].partial;
}

static void expect_read(struct work *work)
{
    struct member *member = work->member;
    const struct op *op = &work->op;
    const size_t bytes = op->tokens * member_row_bytes(member);
    for (uint32_t head = 0; head < WORLD_HEADS; head++) {
        assert_memory_equal(work->staging + head * bytes, model_row(member->keys, member, head, op->first), bytes);
        assert_memory_equal(work->staging + (WORLD_HEADS + head) * bytes,
                            model_row(member->values, member, head, op->first), bytes);
    }
}

static void destroy_images(struct world *world, struct work *work)
{
    for (uint32_t i = 0; i < work->op.lane_count; i++) {
        image_destroy(&world->server, work->lanes[i].image);
        work->lanes[i].image = NULL;
    }
}

// As a manifest on the disk would make it known; whoever is attached to it shares the stems, the own one as well at
// times.
static void seal_made(struct world *world, struct work *work)
{
    struct seal *seal = seal_free(world);
    struct member *member = work->member;
    struct sequence *sequence = member->sequence;
    const uint64_t length = member_length(member);
    const uint32_t parts = sequence->chain_count + (sequence->own->first < length);
    struct prefix *prefix = seal ? prefix_create(&world->server, &sequence->identity, WORLD_HEADS, parts, 1) : NULL;
    if (!prefix) { // another has been faster, or there is no memory
        destroy_images(world, work);
        return;
    }
    *seal = (struct seal){prefix, sequence->shape.head_dim, length, seal->keys, seal->values};
    prefix->seed = sequence->own->seed;
    prefix->root = sequence->own->root;
    op_fill_parts(&work->op, prefix);
    for (uint32_t i = 0; i < parts; i++)
        for (uint32_t head = 0; head < WORLD_HEADS; head++)
            assert_true(prefix->parts[i].images[head]->tokens >= prefix->parts[i].end - prefix->parts[i].first);
    copy_content(member, seal->keys, seal->values, member->keys, member->values, length);
    if (sequence->chain_count + 1 < WORLD_CHAIN && member->promised_to == 0 && rng_chance(&world->rng, 2)) {
        op_share_stems(&work->op, prefix);
        note_stems(world, sequence);
    }
}

static void ended_well(struct world *world, struct work *work)
{
    const struct op *op = &work->op;
    world->kinds[op->kind]++;
    if (op->kind == OP_READ)
        expect_read(work);
    for (uint32_t head = 0; op->kind == OP_RETRIEVE && head < WORLD_HEADS; head++)
        expect_slots(world, work, head);
    if (op->kind == OP_SEAL)
        seal_made(world, work);
}

// May a request end like this? What the world is not short of, no request may fail for.
static bool may_end(const struct world *world, const struct work *work, ice_status status)
{
    const struct op *op = &work->op;
    const bool promised = op->kind == OP_APPEND && work->member->promised_to > 0;
    switch (status) {
    case ICE_UNKNOWN_SESSION:
        return atomic_load(&op->cancelled);
    case ICE_BUSY: // somebody has asked for what was about to sleep
        return op->kind == OP_SLEEP;
    case ICE_PAGE_LOST:
        return world->disk.failed_reads > 0;
    case ICE_DISK_FAILED:
        return world->disk.failed_writes > 0 && (op->kind == OP_SEAL || op->kind == OP_SLEEP);
    case ICE_SPILL_FULL:
        return !promised && world->shape.spill_bytes <= 8u << 20;
    case ICE_INDEX_FULL:
        return !promised && world->shape.index_bytes <= 4u << 20;
    case ICE_POOL_FULL:
    case ICE_TIMEOUT: // a retrieve has the deadline that it came with
        return !world->shape.patient || op->kind == OP_RETRIEVE || world->disk.failed_writes > 0 ||
               world->shape.spill_bytes <= 8u << 20;
    default:
        return false;
    }
}

static void note_length(struct world *world, struct work *work)
{
    const struct op *op = &work->op;
    const bool appends = op->kind == OP_APPEND || op->append;
    const uint64_t end = op->kind == OP_APPEND ? op->first + op->tokens : work->first_queries[0] + op->queries;
    struct member *member = work->member;
    if (op->phase != PHASE_COMMIT)
        return;
    if (appends && end > member_length(member))
        member->sequence->lengths[0] = end;
    if (op->kind == OP_TRUNCATE && op->first < member_length(member)) {
        member_give_up_promise(member);
        member->sequence->lengths[0] = op->first;
        member->sequence->binding = ++world->server.next_id;
        make_content(world, member, op->first);
    }
}

static void end_sleep(const struct work *work, ice_status status)
{
    const struct sequence *sequence = work->member->sequence;
    for (uint32_t i = 0; i <= sequence->chain_count; i++) {
        struct stem *stem = sequence_stem(sequence, i);
        if (stem->sleep_op == &work->op) {
            stem->sleep_op = NULL;
            stem->asleep = status == ICE_OK;
        }
    }
}

static void end_work(struct world *world, struct work *work)
{
    struct op *op = &work->op;
    struct member *member = work->member;
    const ice_status status = (ice_status)atomic_load(&op->failure);
    use_stems(work, -1);
    note_length(world, work);
    if (op->kind == OP_SLEEP)
        end_sleep(work, status);
    if (status == ICE_OK) {
        ended_well(world, work);
    } else {
        if (!may_end(world, work, status))
            fail_msg("step %llu: a request of kind %d ends with %s", (unsigned long long)world->steps, (int)op->kind,
                     status_name((int)status));
        world->failed++;
        world->lost += status == ICE_PAGE_LOST;
        if (op->kind == OP_SEAL)
            destroy_images(world, work);
    }
    if (op->kind == OP_APPEND && (status != ICE_OK || member_length(member) >= member->promised_to))
        member_give_up_promise(member);
    leave(member, mode_of(op));
    work->used = false;
    world->ended++;
}

// A stem's end may free its sequence, and does what the reactor does then.
static bool is_stem_end(struct world *world, struct completion *completion)
{
    for (uint32_t i = 0; i < world->stem_count; i++) {
        if (completion != &world->stems[i]->gone)
            continue;
        stem_ends(world, i);
        completion->done(completion, &world->server);
        return true;
    }
    return false;
}

// What was posted, by hand: the reactor's own ends need sockets.
void world_take_ends(struct world *world)
{
    struct completion_list *list = &world->server.completions;
    struct completion *next = list->head;
    list->head = list->tail = NULL;
    while (next) {
        struct completion *completion = next;
        next = completion->next;
        if (is_stem_end(world, completion))
            continue;
        for (uint32_t i = 0; i < WORLD_OPS; i++)
            if (completion == &world->works[i].op.completion)
                end_work(world, &world->works[i]);
    }
    note_closed(world);
}

bool world_is_idle(const struct world *world)
{
    for (uint32_t i = 0; i < WORLD_OPS; i++)
        if (world->works[i].used)
            return false;
    for (uint32_t i = 0; i < WORLD_SEQUENCES; i++)
        if (world->members[i].closing)
            return false;
    return true;
}
