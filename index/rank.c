// What is worth opening: estimates of nodes and pages from their means and radii, the queue, and when to stop.
//
// A page's or node's scores for one view are taken as spread around q . mean with a deviation proportional to
// |q| * radius / sqrt(head_dim). The factor is measured anew by every search, per view, on a sample of tokens: keys
// vary most in few directions and queries favour some of them, so it lies anywhere between 1 and 3, differs between the
// heads of a group and from step to step, and no constant serves two models. From the deviation follow a page's
// estimated mass (the sum of exp of n such scores, which for a large deviation is carried by the largest few, as in the
// random energy model) and the hoped-for mass of its best token. The queue is ordered by the latter, so that the search
// goes down the tree wherever a heavy token may still be, and it ends when none of the waiting ones may hold a token
// better than the worst of the best found so far. Thread ownership: that of the search context. No allocation.
#include "index/search.h"

#include <math.h>

// How many measured deviations above the expected best token of a page are still hoped for, times that distance. The
// measurement's own error (9 % with 64 tokens) and heavier tails than a normal distribution's are in it.
#define HOPE_DEVIATION 1.25f
// The same for the key that lies farthest from the mean, which a radius over many hides: a key that is unlike all
// others is often the one that is looked for.
#define FARTHEST_DEVIATION 2.0f
#define SPREAD_MIN         0.5f
#define SPREAD_MAX         8.0f
#define EXPONENT_MAX       80.0f

struct summary {
    const float *mean;
    float radius, farthest;
    uint32_t weight, tie, rows;
};

static struct summary summary_of(const struct index *index, uint32_t level, uint32_t number)
{
    if (level > 0) {
        struct node *node = dci_node(index->tree, level, number);
        const uint32_t rows = node->weight < index->page_tokens ? node->weight : index->page_tokens;
        return (struct summary){
            dci_node_mean(index, node), node->radius, node->farthest, node->weight, node->token, rows};
    }
    struct page *page = dci_page(index, number);
    struct summary summary = {
        dci_page_mean(index, page), page->radius, page->farthest, page->rows, TREE_NONE, page->rows};
    for (uint32_t r = 0; r < index->page_tokens; r++) {
        summary.tie = page->tokens[r] < summary.tie ? page->tokens[r] : summary.tie;
    }
    return summary;
}

static float at_most(float x, float limit)
{
    return x < limit ? x : limit;
}

// One token of the sample, the sample being spread evenly over the indexed positions: adds the square of how far its
// score lies from its page's mean, in units of the isotropic deviation.
void dci_rank_measure(struct index_search *search, uint32_t sample)
{
    const struct index *index = search->index;
    const float *norms = SEARCH_ROOM(search, float, ROOM_NORMS);
    float *sums = SEARCH_ROOM(search, float, ROOM_SCRATCH), *key = SEARCH_ROOM(search, float, ROOM_ROWS);
    const uint64_t n = index_indexed(index);
    const uint32_t position = (uint32_t)((sample * n + n / 2) / SEARCH_SAMPLE);
    struct page *page = dci_page(index, dci_token(index, position)->page[index->column]);
    if (!(page->radius > 0.0f)) {
        return;
    }
    search->measured++;
    dci_key_widen(index, position, key);
    const float unit = page->radius * index->inverse_root_dim;
    for (uint32_t v = 0; v < search->views; v++) {
        const float *query = search->query.queries + (size_t)v * index->head_dim;
        const float score = index->kernel->dot(query, key, index->head_dim);
        const float center = index->kernel->dot(query, dci_page_mean(index, page), index->head_dim);
        const float off = norms[v] > 0.0f ? search->query.scale * (score - center) / (norms[v] * unit) : 0.0f;
        sums[v] += at_most(off * off, SPREAD_MAX * SPREAD_MAX * SEARCH_SAMPLE);
    }
}

void dci_rank_fix_spread(struct index_search *search)
{
    float *norms = SEARCH_ROOM(search, float, ROOM_NORMS);
    const float *sums = SEARCH_ROOM(search, float, ROOM_SCRATCH);
    for (uint32_t v = 0; search->measured > 0 && v < search->views; v++) {
        const float spread = at_most(sqrtf(sums[v] / (float)search->measured), SPREAD_MAX);
        norms[v] *= spread > SPREAD_MIN ? spread : SPREAD_MIN;
    }
}

// Log of the sum of exp of n scores around 0.
static float log_mass(float deviation, float reach, float log_n)
{
    return deviation < reach ? log_n + 0.5f * deviation * deviation : reach * deviation;
}

// exponents[view] = log of the estimated mass; hopes[view] = log of the hoped-for best one. Both absolute.
static void estimate(const struct index_search *search, const struct summary *summary, float *exponents, float *hopes)
{
    const struct index *index = search->index;
    const float *norms = SEARCH_ROOM(search, float, ROOM_NORMS);
    const float log_n = dci_log((float)summary->weight), reach = sqrtf(2.0f * log_n);
    const float spread = summary->radius * index->inverse_root_dim;
    for (uint32_t v = 0; v < search->views; v++) {
        const float *query = search->query.queries + (size_t)v * index->head_dim;
        const float center = search->query.scale * index->kernel->dot(query, summary->mean, index->head_dim);
        const float deviation = norms[v] * spread;
        exponents[v] = center + log_mass(deviation, reach, log_n);
        const float alone = FARTHEST_DEVIATION * norms[v] * summary->farthest * index->inverse_root_dim;
        const float together = HOPE_DEVIATION * reach * deviation;
        hopes[v] = center + (alone > together ? alone : together);
    }
}

// The survey's estimates join what was scored exactly.
void dci_rank_survey(struct index_search *search, uint32_t level, uint32_t number)
{
    const struct summary summary = summary_of(search->index, level, number);
    float *exponents = SEARCH_ROOM(search, float, ROOM_SCRATCH), *hopes = SEARCH_ROOM(search, float, ROOM_HOPES);
    float *reference = SEARCH_ROOM(search, float, ROOM_REFERENCE), *rest = SEARCH_ROOM(search, float, ROOM_REST);
    estimate(search, &summary, exponents, hopes);
    // A running log-sum-exp per view: largest exponent in `reference`, sum relative to it in `rest`.
    for (uint32_t v = 0; v < search->views; v++) {
        if (exponents[v] > reference[v]) {
            rest[v] *= dci_exp(reference[v] - exponents[v]);
            reference[v] = exponents[v];
        }
        rest[v] += dci_exp(exponents[v] - reference[v]);
    }
}

void dci_rank_fix_reference(struct index_search *search)
{
    float *reference = SEARCH_ROOM(search, float, ROOM_REFERENCE), *rest = SEARCH_ROOM(search, float, ROOM_REST);
    const float *top = SEARCH_ROOM(search, float, ROOM_TOP), *total = SEARCH_ROOM(search, float, ROOM_TOTAL);
    for (uint32_t v = 0; v < search->views; v++) {
        const float highest = top[v] > reference[v] ? top[v] : reference[v];
        const float sum = total[v] * dci_exp(top[v] - highest) + rest[v] * dci_exp(reference[v] - highest);
        reference[v] = highest + (sum > 0.0f ? dci_log(sum) : 0.0f);
        rest[v] = 0.0f;
    }
}

static bool is_before(const struct waiting *a, const struct waiting *b)
{
    if (a->merit != b->merit) {
        return a->merit > b->merit;
    }
    return a->tie != b->tie ? a->tie < b->tie : a->level > b->level;
}

void dci_rank_push(struct index_search *search, uint32_t level, uint32_t number)
{
    const struct summary summary = summary_of(search->index, level, number);
    const uint32_t views = search->views;
    float *exponents = SEARCH_ROOM(search, float, ROOM_SCRATCH), *hopes = SEARCH_ROOM(search, float, ROOM_HOPES);
    const float *reference = SEARCH_ROOM(search, float, ROOM_REFERENCE);
    estimate(search, &summary, exponents, hopes);
    for (uint32_t v = 0; v < views; v++) {
        exponents[v] = at_most(exponents[v] - reference[v], EXPONENT_MAX);
        hopes[v] = at_most(hopes[v] - reference[v], EXPONENT_MAX);
    }
    struct waiting item = {.tie = summary.tie, .number = number, .level = level};
    item.weight = summary.weight;
    search->waiting_tokens += summary.weight;
    item.mass = search->index->kernel->exp_sum(exponents, views) / (float)views;
    item.merit = search->index->kernel->exp_sum(hopes, views) / (float)views;
    if (search->query.page_wise) {
        item.merit *= (float)summary.rows;
    }
    search->waiting_mass += (double)item.mass;

    struct waiting *queue = SEARCH_ROOM(search, struct waiting, ROOM_QUEUE);
    uint32_t at = search->queue_count++;
    assert(search->queue_count * sizeof queue[0] <= search->rooms[ROOM_QUEUE].bytes);
    for (; at > 0 && is_before(&item, &queue[(at - 1) / 2]); at = (at - 1) / 2) {
        queue[at] = queue[(at - 1) / 2];
    }
    queue[at] = item;
}

struct waiting dci_rank_pop(struct index_search *search)
{
    struct waiting *queue = SEARCH_ROOM(search, struct waiting, ROOM_QUEUE);
    const struct waiting first = queue[0], last = queue[--search->queue_count];
    uint32_t at = 0;
    for (uint32_t child = 1; child < search->queue_count; child = 2 * at + 1) {
        if (child + 1 < search->queue_count && is_before(&queue[child + 1], &queue[child])) {
            child++;
        }
        if (!is_before(&queue[child], &last)) {
            break;
        }
        queue[at] = queue[child];
        at = child;
    }
    queue[at] = last;
    search->waiting_mass -= (double)first.mass;
    search->waiting_tokens -= first.weight;
    return first;
}

void dci_rank_rest(struct index_search *search, const struct waiting *waiting)
{
    const struct summary summary = summary_of(search->index, waiting->level, waiting->number);
    float *exponents = SEARCH_ROOM(search, float, ROOM_SCRATCH), *hopes = SEARCH_ROOM(search, float, ROOM_HOPES);
    float *rest = SEARCH_ROOM(search, float, ROOM_REST);
    const float *top = SEARCH_ROOM(search, float, ROOM_TOP);
    const float log_n = dci_log((float)summary.weight);
    estimate(search, &summary, exponents, hopes);
    for (uint32_t v = 0; v < search->views; v++) {
        // What was left unopened holds no token above the best that was found.
        rest[v] += dci_exp(at_most(exponents[v] - top[v], log_n));
    }
}

void dci_rank_offer(struct index_search *search, float preview)
{
    float *best = SEARCH_ROOM(search, float, ROOM_BEST);
    uint32_t at;
    if (search->best_count < search->best_room) {
        at = search->best_count++;
        for (; at > 0 && best[(at - 1) / 2] > preview; at = (at - 1) / 2) {
            best[at] = best[(at - 1) / 2];
        }
    } else if (search->best_room > 0 && preview > best[0]) {
        search->best_sum -= (double)best[0];
        at = 0;
        for (uint32_t child = 1; child < search->best_room; child = 2 * at + 1) {
            child += child + 1 < search->best_room && best[child + 1] < best[child] ? 1 : 0;
            if (best[child] >= preview) {
                break;
            }
            best[at] = best[child];
            at = child;
        }
    } else {
        return;
    }
    best[at] = preview;
    search->best_sum += (double)preview;
}

// What waits holds tokens of sinks and window too, and tokens behind the query: the share that counts.
float dci_rank_waiting_share(const struct index_search *search)
{
    const uint32_t left = search->visible - search->tokens_scored;
    return left < search->waiting_tokens ? (float)left / (float)search->waiting_tokens : 1.0f;
}

bool dci_rank_is_enough(const struct index_search *search)
{
    const struct index_query *query = &search->query;
    if (search->queue_count == 0 || search->eligible_scored == search->high - search->low) {
        return true;
    }
    if (query->coverage > 0.0f) {
        const double waiting = search->waiting_mass > 0.0 ? search->waiting_mass : 0.0;
        const double all = search->scored_preview + waiting * (double)dci_rank_waiting_share(search);
        if (search->ends_preview + search->best_sum >= (double)query->coverage * all) {
            return true;
        }
    }
    if (search->eligible_scored < query->budget) {
        return false;
    }
    if (search->pages_opened >= search->pages_max) {
        return true;
    }
    const struct waiting *queue = SEARCH_ROOM(search, struct waiting, ROOM_QUEUE);
    const float *best = SEARCH_ROOM(search, float, ROOM_BEST);
    const bool is_full = search->best_count == search->best_room;
    return query->effort == 0.0f && is_full && (search->best_room == 0 || queue[0].merit < best[0]);
}
