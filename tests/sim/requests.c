// What the requests of the simulated world ask for, drawn by chance, and the landing that they fill.
#include "world.h"

#include <string.h>

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
    struct stem *own = member->sequence->own;
    struct rng *rng = &world->rng;
    const uint64_t room = WORLD_TOKENS - member_length(member);
    const uint32_t most = rng_chance(rng, 4) ? 600 : rng_chance(rng, 2) ? 100 : 5;
    const uint64_t back = rng_chance(rng, 3) ? rng_below(rng, 40) : 0;
    op->first = member_length(member) - (back < member_length(member) ? back : 0);
    if (room == 0)
        return false;
    op->tokens = 1 + rng_below(rng, most);
    if (op->first + op->tokens > WORLD_TOKENS)
        op->tokens = (uint32_t)(WORLD_TOKENS - op->first);
    if (member->promised_to == 0 && rng_chance(rng, 4) && op->first + op->tokens > member_length(member)) {
        const uint64_t more = rng_below(rng, 400), end = op->first + op->tokens + more;
        const uint64_t until = end < WORLD_TOKENS ? end : WORLD_TOKENS, tokens = until - member_length(member);
        const uint64_t bytes = WORLD_HEADS * lane_promise_bytes(own, member_length(member) - own->first, tokens);
        if (stem_reserve_pages(own, WORLD_HEADS * lane_promise_pages(own, tokens)) != ICE_OK ||
            !budget_reserve(&world->server.index_budget, &own->index_promised, bytes)) {
            member_give_up_promise(member);
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

// Random queries at the beginning of the staging. Returns how many numbers these are.
static uint32_t put_queries(struct world *world, const struct work *work)
{
    const uint32_t floats = work->op.queries * WORLD_HEADS * work->member->sequence->shape.head_dim;
    for (uint32_t i = 0; i < floats; i++) {
        const float x = (float)rng_below(&world->rng, 2000) / 1000.0f - 1.0f;
        memcpy(work->staging + i * sizeof x, &x, sizeof x);
    }
    return floats;
}

static bool fill_retrieve(struct world *world, struct work *work)
{
    struct member *member = work->member;
    struct op *op = &work->op;
    struct rng *rng = &world->rng;
    op->append = rng_chance(rng, 3) && member->promised_to == 0;
    op->queries = 1 + rng_below(rng, 3);
    if (op->append ? member_length(member) + op->queries > WORLD_TOKENS : member_length(member) < op->queries)
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
    if (work->records_of != member->sequence->binding)
        records_forget_row(&work->records, 0); // as a row that is bound to another sequence
    work->records_of = member->sequence->binding;
    op->resend = rng_chance(rng, 8);
    op->keep = op->page_wise || rng_chance(rng, 2) ? 0 : rng_below(rng, op->budget + 1);
    op->rows = work->rows;
    op->first_queries = work->first_queries;
    work->first_queries[0] = op->append ? member_length(member) : member_length(member) - op->queries;
    op->deadline_ns = world_now_ns + (rng_chance(rng, 8) ? 0 : 1000000ull << rng_below(rng, 12));
    const uint32_t floats = put_queries(world, work);
    uint8_t *keys = work->staging + floats * sizeof(float);
    const size_t side = (size_t)WORLD_HEADS * op->queries * member_row_bytes(member);
    if (op->append)
        put_rows(member, keys, keys + side, member_length(member), op->queries, true);
    op->message.vectors = work->staging;
    return true;
}

static bool fill_hint(struct world *world, struct work *work)
{
    struct rng *rng = &world->rng;
    struct op *op = &work->op;
    op->queries = 1 + rng_below(rng, 2);
    op->query_dtype = DTYPE_FP32;
    op->budget = 1 + rng_below(rng, 200);
    op->sinks = rng_below(rng, 20);
    op->window = rng_below(rng, 100);
    op->deadline_ns = world_now_ns + (1000000ull << rng_below(rng, 12));
    op->message.vectors = work->staging;
    (void)put_queries(world, work);
    return member_length(work->member) > 0;
}

static bool fill_read(struct world *world, struct work *work)
{
    struct op *op = &work->op;
    const uint64_t length = member_length(work->member);
    if (length == 0)
        return false;
    op->first = rng_below(&world->rng, (uint32_t)length);
    op->tokens = 1 + rng_below(&world->rng, (uint32_t)(length - op->first));
    return true;
}

struct seal *seal_free(struct world *world)
{
    for (uint32_t i = 0; i < WORLD_SEALS; i++)
        if (!world->seals[i].prefix)
            return &world->seals[i];
    return NULL;
}

bool request_fill(struct world *world, struct work *work, enum op_kind kind)
{
    switch (kind) {
    case OP_APPEND:
        return fill_append(world, work);
    case OP_RETRIEVE:
        return fill_retrieve(world, work);
    case OP_READ:
        return fill_read(world, work);
    case OP_HINT:
        return fill_hint(world, work);
    case OP_SEAL:
        work->op.blocks = (uint32_t)member_length(work->member); // of one token
        return member_length(work->member) > 0 && seal_free(world);
    case OP_TRUNCATE:
        work->op.first = rng_below(&world->rng, (uint32_t)member_length(work->member) + 1);
        return true;
    default:
        return member_length(work->member) > 0;
    }
}
