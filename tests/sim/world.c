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
    *world = (struct world){.shape = *shape, .rng = {seed}, .config = {.page_tokens = shape->page_tokens, .seed = 1}};
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
    const uint32_t dim = member->sequence.shape.head_dim;
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

void world_open(struct world *world, struct member *member, struct seal *seal, uint64_t tokens)
{
    static uint64_t next_id;
    const uint32_t dim = seal ? seal->head_dim : world->shape.head_dims[rng_below(&world->rng, 2)];
    uint8_t *keys = member->keys, *values = member->values;
    *member = (struct member){.open = true, .keys = keys, .values = values, .seal = seal, .length = tokens};
    struct sequence *sequence = &member->sequence;
    sequence->id = ++next_id;
    sequence->server = &world->server;
    sequence->shape = (struct wire_shape){1, WORLD_HEADS, WORLD_HEADS, dim, DTYPE_BF16};
    sequence->scale = 0.1f;
    sequence->seed = 1;
    sequence->row_bytes = dim * dtype_bytes(DTYPE_BF16);
    sequence->frame_bytes = server_frame_bytes(&world->server, sequence->row_bytes);
    sequence->lane_count = WORLD_HEADS;
    sequence->lanes = member->lanes;
    sequence->lengths = &member->length;
    sequence->session = &world->session;
    sequence->reapers = member->reapers;
    sequence->attached_tokens = tokens;
    for (uint32_t head = 0; head < WORLD_HEADS; head++) {
        member->lanes[head].sequence = sequence;
        member->lanes[head].kv_head = head;
        member->lanes[head].shard = (uint32_t)((sequence->id + head) % world->shape.shards);
    }
    make_content(world, member, tokens);
    if (!seal)
        return;
    seal->attached++;
    for (uint32_t head = 0; head < WORLD_HEADS; head++) {
        memcpy(model_row(member->keys, member, head, 0), model_row(seal->keys, member, head, 0),
               tokens * sequence->row_bytes);
        memcpy(model_row(member->values, member, head, 0), model_row(seal->values, member, head, 0),
               tokens * sequence->row_bytes);
        lane_attach(&member->lanes[head], seal->images[head]);
    }
}

static void give_up_promise(struct member *member)
{
    sequence_unreserve(&member->sequence);
    member->promised_to = 0;
}

// The caller has seen to it that no request is on the sequence.
void world_close(struct world *world, struct member *member)
{
    (void)world;
    assert_true(member->open && !member->closing && !member->writer && member->readers == 0);
    member->closing = true;
    give_up_promise(member);
    sequence_destroy_lanes(&member->sequence);
}

static void closed(struct member *member)
{
    const struct sequence *sequence = &member->sequence;
    assert_int_equal(atomic_load(&sequence->page_count), 0);
    assert_int_equal(atomic_load(&sequence->resident), 0);
    assert_int_equal(atomic_load(&sequence->index_bytes), 0);
    assert_int_equal(atomic_load(&sequence->lanes_due), 0);
    if (member->seal)
        member->seal->attached--;
    member->open = member->closing = false;
}

void world_unseal(struct world *world, struct seal *seal)
{
    assert_true(seal->used && seal->attached == 0);
    for (uint32_t head = 0; head < WORLD_HEADS; head++)
        image_destroy(&world->server, seal->images[head]);
    seal->used = false;
}

// ---- requests ----

static void landing_target(struct gpu_landing *landing, uint32_t row, uint32_t layer, uint32_t kv_head,
                           struct gpu_target *out)
{
    struct work *work = (struct work *)landing;
    const size_t side = WORLD_TOKENS * member_row_bytes(work->member);
    (void)row, (void)layer;
    *out = (struct gpu_target){.keys = work->slots + 2 * kv_head * side,
                               .values = work->slots + (2 * kv_head + 1) * side,
                               .positions = work->positions + (size_t)kv_head * WORLD_TOKENS,
                               .store = store_cached};
}

static struct record_cell *landing_record(struct gpu_landing *landing, uint32_t row, uint32_t layer, uint32_t kv_head)
{
    return records_cell(&((struct work *)landing)->records, row, layer, kv_head);
}

static void landing_submit(struct gpu_landing *landing, uint32_t row, uint32_t layer, uint32_t kv_head, uint32_t count)
{
    (void)row, (void)layer;
    ((struct work *)landing)->counts[kv_head] = count;
}

static const struct gpu_landing_ops landing_ops = {
    .target = landing_target, .record = landing_record, .submit = landing_submit};

static void put_rows(struct member *member, uint8_t *keys, uint8_t *values, uint64_t first, uint32_t tokens,
                     bool token_major)
{
    const size_t bytes = member_row_bytes(member);
    for (uint32_t head = 0; head < WORLD_HEADS; head++) {
        for (uint32_t i = 0; i < tokens; i++) {
            const size_t row = token_major ? (size_t)i * WORLD_HEADS + head : (size_t)head * tokens + i;
            memcpy(keys + row * bytes, model_row(member->keys, member, head, first + i), bytes);
            memcpy(values + row * bytes, model_row(member->values, member, head, first + i), bytes);
        }
    }
}

// An append: a part of a promised one, or a new one, which may overlap what is there.
static bool fill_append(struct world *world, struct work *work)
{
    struct member *member = work->member;
    struct op *op = &work->op;
    struct rng *rng = &world->rng;
    const uint64_t room = WORLD_TOKENS - member->length;
    const uint32_t most = rng_chance(rng, 4) ? 600 : rng_chance(rng, 2) ? 100 : 5;
    const uint64_t back = rng_chance(rng, 3) ? rng_below(rng, 40) : 0;
    op->first = member->length - (back < member->length ? back : 0);
    if (room == 0)
        return false;
    op->tokens = 1 + rng_below(rng, most);
    if (op->first + op->tokens > WORLD_TOKENS)
        op->tokens = (uint32_t)(WORLD_TOKENS - op->first);
    if (member->promised_to == 0 && rng_chance(rng, 4) && op->first + op->tokens > member->length) {
        const uint64_t more = rng_below(rng, 400), end = op->first + op->tokens + more;
        const uint64_t until = end < WORLD_TOKENS ? end : WORLD_TOKENS, tokens = until - member->length;
        const uint64_t bytes = WORLD_HEADS * lane_promise_bytes(&member->sequence, member->length, tokens);
        if (sequence_reserve_pages(&member->sequence, WORLD_HEADS * lane_promise_pages(&member->sequence, tokens)) !=
                ICE_OK ||
            !budget_reserve(&world->server.index_budget, &member->sequence.index_promised, bytes)) {
            give_up_promise(member);
            return false;
        }
        member->promised_to = until;
    }
    if (member->promised_to && op->first + op->tokens > member->promised_to)
        op->tokens = (uint32_t)(member->promised_to - op->first);
    if (op->tokens == 0)
        return false;
    op->token_major = rng_chance(rng, 2);
    const size_t side = (size_t)WORLD_HEADS * op->tokens * member_row_bytes(member);
    put_rows(member, work->staging, work->staging + side, op->first, op->tokens, op->token_major);
    return true;
}

static bool fill_retrieve(struct world *world, struct work *work)
{
    struct member *member = work->member;
    struct op *op = &work->op;
    struct rng *rng = &world->rng;
    op->append = rng_chance(rng, 3) && member->promised_to == 0;
    op->queries = 1 + rng_below(rng, 3);
    if (op->append ? member->length + op->queries > WORLD_TOKENS : member->length < op->queries)
        return false;
    op->query_dtype = DTYPE_FP32;
    op->budget = rng_chance(rng, 4) ? WORLD_TOKENS : 1 + rng_below(rng, 100);
    op->sinks = rng_below(rng, 20);
    op->window = rng_below(rng, 80);
    op->holds_ends = rng_chance(rng, 4);
    op->page_wise = rng_chance(rng, 4);
    op->landing = &work->landing;
    work->landing =
        (struct landing){.ops = &landing_ops, .memory = (struct gpu_landing *)work, .shape = work->records.shape};
    if (work->records_of != member->sequence.id)
        records_forget_row(&work->records, 0); // as a row that is bound to another sequence
    work->records_of = member->sequence.id;
    op->resend = rng_chance(rng, 8);
    op->rows = work->rows;
    op->first_queries = work->first_queries;
    work->first_queries[0] = op->append ? member->length : member->length - op->queries;
    op->deadline_ns = world_now_ns + (rng_chance(rng, 8) ? 0 : 1000000ull << rng_below(rng, 12));
    const uint32_t floats = op->queries * WORLD_HEADS * member->sequence.shape.head_dim;
    for (uint32_t i = 0; i < floats; i++) {
        const float x = (float)rng_below(rng, 2000) / 1000.0f - 1.0f;
        memcpy(work->staging + i * sizeof x, &x, sizeof x);
    }
    uint8_t *keys = work->staging + floats * sizeof(float);
    const size_t side = (size_t)WORLD_HEADS * op->queries * member_row_bytes(member);
    if (op->append)
        put_rows(member, keys, keys + side, member->length, op->queries, true);
    op->message.vectors = work->staging;
    return true;
}

static bool fill_read(struct world *world, struct work *work)
{
    struct op *op = &work->op;
    const uint64_t length = work->member->length;
    if (length == 0)
        return false;
    op->first = rng_below(&world->rng, (uint32_t)length);
    op->tokens = 1 + rng_below(&world->rng, (uint32_t)(length - op->first));
    return true;
}

static struct seal *free_seal(struct world *world)
{
    for (uint32_t i = 0; i < WORLD_SEALS; i++)
        if (!world->seals[i].used)
            return &world->seals[i];
    return NULL;
}

static bool fill(struct world *world, struct work *work, enum op_kind kind)
{
    switch (kind) {
    case OP_APPEND:
        return fill_append(world, work);
    case OP_RETRIEVE:
        return fill_retrieve(world, work);
    case OP_READ:
        return fill_read(world, work);
    case OP_SEAL:
        return work->member->length > 0 && free_seal(world);
    default:
        return work->member->length > 0;
    }
}

static struct work *free_work(struct world *world)
{
    for (uint32_t i = 0; i < WORLD_OPS; i++)
        if (!world->works[i].used)
            return &world->works[i];
    return NULL;
}

static enum op_phase first_phase(const struct op *op)
{
    if (op->kind == OP_APPEND || op->append)
        return PHASE_PREPARE;
    return op->kind == OP_READ ? PHASE_READ : op->kind == OP_RETRIEVE ? PHASE_SEARCH : PHASE_SAVE;
}

void world_request(struct world *world, struct member *member, enum op_kind kind)
{
    struct work *work = free_work(world);
    if (!work || !member->open || member->closing)
        return;
    if (member->sleep) // whoever comes is waited for no longer than the slice that runs
        atomic_store(&member->sleep->op.cancelled, true);
    if (member->writer)
        return;
    work->op = (struct op){.kind = kind, .server = &world->server, .session = &work->session, .layers = 1};
    work->member = member;
    work->session.staging.base = work->staging;
    work->length = member->length;
    if (!fill(world, work, kind))
        return;
    struct op *op = &work->op;
    const bool exclusive = (kind != OP_READ && kind != OP_RETRIEVE) || op->append;
    if (exclusive && member->readers > 0)
        return;
    work->used = true;
    member->writer = exclusive;
    member->readers += !exclusive;
    member->sleep = kind == OP_SLEEP ? work : NULL;
    op->received_ns = world_now_ns;
    op->lanes = work->lanes;
    op->lane_count = WORLD_HEADS;
    op->sequence_count = 1;
    for (uint32_t head = 0; head < WORLD_HEADS; head++)
        work->lanes[head] = (struct op_lane){.task = {.run = op_lane_run}, .op = op, .lane = &member->lanes[head]};
    op_start_phase(op, first_phase(op));
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

static void seal_made(struct world *world, struct work *work)
{
    struct seal *seal = free_seal(world);
    struct member *member = work->member;
    if (!seal) { // another has been faster
        for (uint32_t head = 0; head < WORLD_HEADS; head++)
            image_destroy(&world->server, work->lanes[head].image);
        return;
    }
    seal->used = true;
    seal->attached = 0;
    seal->head_dim = member->sequence.shape.head_dim;
    seal->tokens = member->length;
    for (uint32_t head = 0; head < WORLD_HEADS; head++) {
        const size_t bytes = member->length * member_row_bytes(member);
        seal->images[head] = work->lanes[head].image;
        assert_int_equal(seal->images[head]->tokens, member->length);
        memcpy(model_row(seal->keys, member, head, 0), model_row(member->keys, member, head, 0), bytes);
        memcpy(model_row(seal->values, member, head, 0), model_row(member->values, member, head, 0), bytes);
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

static void note_length(struct work *work)
{
    const struct op *op = &work->op;
    const bool appends = op->kind == OP_APPEND || op->append;
    const uint64_t end = op->kind == OP_APPEND ? op->first + op->tokens : work->first_queries[0] + op->queries;
    if (appends && op->phase == PHASE_COMMIT && end > work->member->length)
        work->member->length = end;
}

static void work_ended(struct world *world, struct work *work)
{
    struct op *op = &work->op;
    struct member *member = work->member;
    const ice_status status = (ice_status)atomic_load(&op->failure);
    const bool appends = op->kind == OP_APPEND || op->append;
    if (appends || op->kind == OP_RETRIEVE) {
        if (op->kind == OP_APPEND || op->append)
            note_length(work);
    }
    if (status == ICE_OK) {
        ended_well(world, work);
    } else {
        if (!may_end(world, work, status))
            fail_msg("step %llu: a request of kind %d ends with %s", (unsigned long long)world->steps, (int)op->kind,
                     status_name((int)status));
        world->failed++;
        world->lost += status == ICE_PAGE_LOST;
        for (uint32_t head = 0; op->kind == OP_SEAL && head < WORLD_HEADS; head++)
            image_destroy(&world->server, work->lanes[head].image);
    }
    if (op->kind == OP_APPEND && (status != ICE_OK || member->length >= member->promised_to))
        give_up_promise(member);
    const bool exclusive = (op->kind != OP_READ && op->kind != OP_RETRIEVE) || op->append;
    member->writer = exclusive ? false : member->writer;
    member->readers -= !exclusive;
    member->sleep = op->kind == OP_SLEEP ? NULL : member->sleep;
    work->used = false;
    world->ended++;
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
        for (uint32_t i = 0; i < WORLD_OPS; i++)
            if (completion == &world->works[i].op.completion)
                work_ended(world, &world->works[i]);
        for (uint32_t i = 0; i < WORLD_SEQUENCES; i++)
            if (completion == &world->members[i].sequence.closed)
                closed(&world->members[i]);
    }
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
