// Cutting a cell into pages: 2-means bisection, balanced so that n tokens fill ceil(n / page_tokens) pages evenly.
//
// A segment goes through passes over its tokens, one token at a time so that a slice may end anywhere: its mean; the
// token farthest from it; the token farthest from that one; two rounds of 2-means from these two; the projection on the
// line between the two means. The half with the largest projections is cut off by a selection, not a sort.
// Thread ownership: the index's.
#include "index/tree.h"

#include <string.h>

enum { PASS_MEAN, PASS_FAR_A, PASS_FAR_B, PASS_MEANS_1, PASS_MEANS_2, PASS_PROJECT, PASS_COUNT };

static uint32_t pages_for(const struct index *index, uint32_t tokens)
{
    return (tokens + index->page_tokens - 1) / index->page_tokens;
}

static void segment_begin(struct dci_cut *cut)
{
    cut->pass = PASS_MEAN;
    cut->cursor = cut->stack[cut->depth - 1].begin;
    cut->count_a = cut->count_b = 0;
    cut->far_distance = -1.0f;
    memset(cut->sum_a, 0, sizeof cut->sum_a);
    memset(cut->sum_b, 0, sizeof cut->sum_b);
}

void dci_cut_init(struct dci_cut *cut, const struct index *index, uint32_t *tokens, float *projection, uint32_t begin,
                  uint32_t end)
{
    cut->tokens = tokens;
    cut->projection = projection;
    cut->depth = 1;
    cut->stack[0] = (struct dci_segment){begin, end, pages_for(index, end - begin)};
    segment_begin(cut);
}

static bool before(float projection_a, uint32_t token_a, float projection_b, uint32_t token_b)
{
    return projection_a > projection_b || (projection_a == projection_b && token_a < token_b);
}

static void swap(uint32_t *tokens, float *projection, uint32_t i, uint32_t j)
{
    const uint32_t token = tokens[i];
    const float value = projection[i];
    tokens[i] = tokens[j];
    projection[i] = projection[j];
    tokens[j] = token;
    projection[j] = value;
}

void dci_cut_select(uint32_t *tokens, float *projection, uint32_t n, uint32_t left)
{
    uint32_t low = 0, high = n; // the boundary lies in [low, high]
    for (uint64_t round = 0; high - low > 1 && left > low && left < high; round++) {
        const uint32_t pick = low + (uint32_t)(dci_mix(round ^ ((uint64_t)low << 32)) % (high - low));
        swap(tokens, projection, pick, high - 1);
        const float value = projection[high - 1];
        const uint32_t token = tokens[high - 1];
        uint32_t store = low;
        for (uint32_t i = low; i + 1 < high; i++) {
            if (before(projection[i], tokens[i], value, token)) {
                swap(tokens, projection, i, store++);
            }
        }
        swap(tokens, projection, store, high - 1);
        if (left <= store) {
            high = store;
        } else {
            low = store + 1;
        }
    }
}

static void sort_by_position(uint32_t *tokens, uint32_t n)
{
    for (uint32_t i = 1; i < n; i++) {
        const uint32_t token = tokens[i];
        uint32_t at = i;
        for (; at > 0 && tokens[at - 1] > token; at--) {
            tokens[at] = tokens[at - 1];
        }
        tokens[at] = token;
    }
}

static void visit(struct dci_cut *cut, const struct index *index)
{
    const uint32_t dim = index->head_dim, token = cut->tokens[cut->cursor];
    float key[INDEX_HEAD_DIM_MAX];
    dci_key_widen(index, token, key);
    float *sum = cut->sum_a;
    switch (cut->pass) {
    case PASS_FAR_A:
    case PASS_FAR_B: {
        const float distance = index->kernel->distance2(key, cut->a, dim);
        if (distance > cut->far_distance || (distance == cut->far_distance && token < cut->far_token)) {
            cut->far_distance = distance;
            cut->far_token = token;
        }
        return;
    }
    case PASS_PROJECT:
        cut->projection[cut->cursor] =
            index->kernel->distance2(key, cut->b, dim) - index->kernel->distance2(key, cut->a, dim);
        return;
    case PASS_MEANS_1:
    case PASS_MEANS_2:
        if (index->kernel->distance2(key, cut->b, dim) < index->kernel->distance2(key, cut->a, dim)) {
            sum = cut->sum_b;
            cut->count_b++;
            break;
        }
        // fall through
    default:
        cut->count_a++;
        break;
    }
    for (uint32_t j = 0; j < dim; j++) {
        sum[j] += key[j];
    }
}

static void take_mean(float *mean, float *sum, uint32_t *count, uint32_t dim)
{
    for (uint32_t j = 0; j<dim && * count> 0; j++) {
        mean[j] = sum[j] / (float)*count;
    }
    memset(sum, 0, dim * sizeof sum[0]);
    *count = 0;
}

static void pass_end(struct dci_cut *cut, const struct index *index)
{
    const uint32_t dim = index->head_dim;
    struct dci_segment *segment = &cut->stack[cut->depth - 1];
    switch (cut->pass) {
    case PASS_FAR_A:
        dci_key_widen(index, cut->far_token, cut->a);
        cut->far_distance = -1.0f;
        break;
    case PASS_FAR_B:
        dci_key_widen(index, cut->far_token, cut->b);
        break;
    case PASS_PROJECT:
        break;
    default: // the means
        take_mean(cut->a, cut->sum_a, &cut->count_a, dim);
        take_mean(cut->b, cut->sum_b, &cut->count_b, dim);
        break;
    }
    cut->cursor = segment->begin;
    if (++cut->pass < PASS_COUNT) {
        return;
    }
    const uint32_t n = segment->end - segment->begin, left_pages = segment->pages / 2;
    const uint32_t left = (uint32_t)((uint64_t)n * left_pages / segment->pages);
    dci_cut_select(cut->tokens + segment->begin, cut->projection + segment->begin, n, left);
    const struct dci_segment first = {segment->begin, segment->begin + left, left_pages};
    *segment = (struct dci_segment){segment->begin + left, segment->end, segment->pages - left_pages};
    cut->stack[cut->depth++] = first;
    assert(cut->depth < sizeof cut->stack / sizeof cut->stack[0]);
    segment_begin(cut);
}

enum dci_cut_state dci_cut_step(struct dci_cut *cut, const struct index *index, struct dci_work *work,
                                struct dci_segment *page)
{
    while (cut->depth > 0) {
        const struct dci_segment *segment = &cut->stack[cut->depth - 1];
        if (segment->pages <= 1) {
            *page = *segment;
            sort_by_position(cut->tokens + page->begin, page->end - page->begin);
            if (--cut->depth > 0) {
                segment_begin(cut);
            }
            return CUT_PAGE;
        }
        if (work->left <= 0) {
            return CUT_MORE;
        }
        visit(cut, index);
        dci_work_spend(work, index, 2);
        if (++cut->cursor == segment->end) {
            pass_end(cut, index);
        }
    }
    return CUT_DONE;
}
