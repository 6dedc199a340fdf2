// A step of the plan goes through the sequences one by one: one that has decoded enough goes, a free place may be
// taken, one that is being prefilled gets its next chunk. Then all that are decoding do a step together.
#include "serve_plan.h"

#define ARRIVE_ONE_IN 6u  // steps of a free place
#define FORK_ONE_IN   3u  // arrivals, where there is something to fork
#define INFO_ONE_IN   16u // steps of a sequence

uint32_t plan_length_most(const struct plan_params *params)
{
    // A fork has its origin's length, and its own steps: bounded, because what is longer is not forked.
    return params->prompt_most + 2 * params->decode_most;
}

void plan_init(struct plan *plan, const struct plan_params *params)
{
    *plan = (struct plan){.params = *params};
    random_init(&plan->random, params->seed);
}

static uint32_t between(struct plan *plan, uint32_t least, uint32_t most)
{
    return least + random_below(&plan->random, most - least + 1);
}

// A sequence that decodes and is not too long yet, drawn; PLAN_SEQUENCES_MAX: none.
static uint32_t draw_origin(struct plan *plan)
{
    uint32_t count = 0;
    for (uint32_t i = 0; i < plan->params.sequences; i++) {
        const struct plan_sequence *sequence = &plan->sequences[i];
        if (sequence->state == PLAN_DECODING && sequence->length >= PLAN_BLOCK &&
            sequence->length <= plan->params.prompt_most + plan->params.decode_most) {
            plan->list[count++] = i;
        }
    }
    return count > 0 ? plan->list[random_below(&plan->random, count)] : PLAN_SEQUENCES_MAX;
}

static void arrive(struct plan *plan, uint32_t at, struct plan_op *op)
{
    const struct plan_params *params = &plan->params;
    struct plan_sequence *sequence = &plan->sequences[at];
    const uint32_t from = draw_origin(plan);
    sequence->left = between(plan, params->decode_least, params->decode_most);
    if (from < PLAN_SEQUENCES_MAX && random_below(&plan->random, FORK_ONE_IN) == 0) {
        sequence->length = plan->sequences[from].length / PLAN_BLOCK * PLAN_BLOCK;
        sequence->prompt = sequence->length;
        sequence->state = PLAN_DECODING;
        *op = (struct plan_op){.kind = PLAN_FORK, .sequence = at, .from = from, .count = sequence->length};
        return;
    }
    sequence->length = 0;
    sequence->prompt = between(plan, params->prompt_least, params->prompt_most);
    sequence->state = PLAN_PREFILLING;
    *op = (struct plan_op){.kind = PLAN_OPEN, .sequence = at};
}

static void leave(struct plan *plan, uint32_t at, struct plan_op *op)
{
    plan->sequences[at].state = PLAN_ABSENT;
    *op = (struct plan_op){.kind = PLAN_CLOSE, .sequence = at};
}

static void prefill(struct plan *plan, uint32_t at, struct plan_op *op)
{
    struct plan_sequence *sequence = &plan->sequences[at];
    const uint32_t rest = sequence->prompt - sequence->length;
    const uint32_t count = rest < plan->params.chunk ? rest : plan->params.chunk;
    *op = (struct plan_op){.kind = PLAN_APPEND, .sequence = at, .first = sequence->length, .count = count};
    sequence->length += count;
    sequence->state = sequence->length == sequence->prompt ? PLAN_DECODING : PLAN_PREFILLING;
}

// One sequence's part of a step. False: it has none.
static bool advance(struct plan *plan, uint32_t at, struct plan_op *op)
{
    struct plan_sequence *sequence = &plan->sequences[at];
    switch (sequence->state) {
    case PLAN_ABSENT:
        if (random_below(&plan->random, ARRIVE_ONE_IN) != 0) {
            return false;
        }
        arrive(plan, at, op);
        return true;
    case PLAN_PREFILLING:
        prefill(plan, at, op);
        return true;
    case PLAN_DECODING:
        if (sequence->left == 0) {
            leave(plan, at, op);
            return true;
        }
        *op = (struct plan_op){.kind = PLAN_INFO, .sequence = at};
        return random_below(&plan->random, INFO_ONE_IN) == 0;
    }
    return false;
}

static bool decode(struct plan *plan, struct plan_op *op)
{
    uint32_t count = 0;
    for (uint32_t i = 0; i < plan->params.sequences; i++) {
        struct plan_sequence *sequence = &plan->sequences[i];
        if (sequence->state == PLAN_DECODING && sequence->left > 0) {
            sequence->left--;
            sequence->length++;
            plan->list[count++] = i;
        }
    }
    *op = (struct plan_op){.kind = PLAN_RETRIEVE, .count = count, .list = plan->list};
    return count > 0;
}

bool plan_next(struct plan *plan, struct plan_op *op)
{
    while (plan->step < plan->params.steps) {
        while (plan->at < plan->params.sequences) {
            if (advance(plan, plan->at++, op)) {
                return true;
            }
        }
        plan->at = 0;
        plan->step++;
        if (decode(plan, op)) {
            return true;
        }
    }
    for (; plan->at < plan->params.sequences; plan->at++) {
        if (plan->sequences[plan->at].state != PLAN_ABSENT) {
            leave(plan, plan->at++, op);
            return true;
        }
    }
    return false;
}
