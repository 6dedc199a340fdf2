// Kernels: what they compute, and that every instruction set computes the same bits.
#include "test_index_owner.h"

#include "index/tree.h"

#include <float.h>

#define VIEWS_MAX 9u

// One of everything that kernels work on.
struct scene {
    struct dci_views views;
    struct dci_block *block;
    struct dci_rows *rows;
    int8_t codes[VIEWS_MAX * INDEX_HEAD_DIM_MAX];
    int32_t sums[VIEWS_MAX];
    float steps[VIEWS_MAX], bases[VIEWS_MAX], norms[VIEWS_MAX], reference[VIEWS_MAX];
    _Alignas(64) unsigned char block_room[sizeof(struct dci_block) + DCI_LANES * INDEX_HEAD_DIM_MAX];
    _Alignas(64) unsigned char rows_room[sizeof(struct dci_rows) + DCI_LANES * INDEX_HEAD_DIM_MAX / 8];
    uint8_t lows[DCI_LANES * INDEX_HEAD_DIM_MAX / 2];
    int8_t fine[VIEWS_MAX * INDEX_HEAD_DIM_MAX];
    int32_t table_codes[VIEWS_MAX * INDEX_HEAD_DIM_MAX], table_sums[VIEWS_MAX], table_zeros[VIEWS_MAX];
    uint8_t tables[VIEWS_MAX * INDEX_HEAD_DIM_MAX * 4];
    float table_steps[VIEWS_MAX];
};

static int32_t block_code(const struct scene *scene, uint32_t lane, uint32_t element)
{
    return (int32_t)scene->block->codes[(element / 4 * DCI_LANES + lane) * 4 + element % 4] - DCI_CODE_ZERO;
}

static uint32_t top_bit(const struct scene *scene, uint32_t lane, uint32_t element)
{
    return scene->rows->signs[element / 8 * DCI_LANES + lane] >> (element % 8) & 1;
}

static uint32_t low_bits(const struct scene *scene, uint32_t lane, uint32_t element)
{
    const uint32_t half = scene->views.row_bytes;
    const uint8_t byte = scene->lows[lane * half + element % half];
    return element < half ? byte & 15 : byte >> 4;
}

// The lanes of the scene's rows, as one cell's.
static void lanes_init(const struct scene *scene, const int16_t *signs, const float *anchors, struct dci_lanes *lanes)
{
    for (uint32_t lane = 0; lane < DCI_LANES; lane++) {
        lanes->rows[lane] = scene->lows + (size_t)lane * scene->views.row_bytes;
        lanes->scales[lane] = dci_scale_widen(scene->rows->scales[lane]);
        lanes->live[lane] = lane == 7 || lane == 9 ? 0.0f : 1.0f;
    }
    lanes->signs = signs;
    lanes->anchors = anchors;
}

// A query of whole numbers, whose table codes are itself: some group reaches the largest sum.
static void tables_init(struct scene *scene, uint32_t v, uint32_t dim, struct rng *rng)
{
    float x[INDEX_HEAD_DIM_MAX];
    int32_t *codes = scene->table_codes + (size_t)v * dim;
    scene->table_sums[v] = 0;
    for (uint32_t i = 0; i < dim; i++) {
        codes[i] = (int32_t)rng_below(rng, 63) - 31;
        if (i < 4) {
            codes[i] = i == 0 ? -32 : v % 2 == 0 ? 31 : -31;
        }
        x[i] = (float)codes[i];
        scene->table_sums[v] += codes[i];
    }
    const float step = dci_tables_make(x, dim, scene->tables + (size_t)v * dim * 4, &scene->table_zeros[v]);
    assert_true(step == 1.0f);
    scene->table_steps[v] = 1e-6f * (1.0f + (float)rng_below(rng, 10));
}

// Codes at their limits in some lanes and views, random ones in the others; lane 7 is not in use.
static void scene_init(struct scene *scene, uint32_t views, uint32_t dim, struct rng *rng)
{
    struct dci_block *block = scene->block = (struct dci_block *)(void *)scene->block_room;
    struct dci_rows *rows = scene->rows = (struct dci_rows *)(void *)scene->rows_room;
    for (uint32_t i = 0; i < DCI_LANES * dim; i++) {
        const uint32_t lane = i / 4 % DCI_LANES;
        block->codes[i] = (uint8_t)(lane == 0 ? 255 : lane == 1 ? 1 : lane == 2 ? 128 : 1 + rng_below(rng, 255));
    }
    const uint32_t half = dci_row_bytes(dim);
    for (uint32_t i = 0; i < DCI_LANES * dim / 8; i++) {
        const uint32_t lane = i % DCI_LANES;
        rows->signs[i] = (uint8_t)(lane == 0 ? 255 : lane == 1 ? 0 : rng_below(rng, 256));
    }
    for (uint32_t i = 0; i < DCI_LANES * half; i++) {
        const uint32_t lane = i / half, unused = i % half + half >= dim ? 15 : 255; // bits of no coordinate are 0
        const uint32_t byte = lane == 0 ? 255 : lane == 1 ? 0 : lane == 2 ? 0xf0 : rng_below(rng, 256);
        scene->lows[i] = (uint8_t)(byte & unused);
    }
    for (uint32_t lane = 0; lane < DCI_LANES; lane++) {
        const bool is_used = lane != 7;
        block->rows[lane] = is_used ? (float)(1 + rng_below(rng, 64)) : 0.0f;
        block->step[lane] = 0.01f + (float)rng_below(rng, 100) / 100.0f;
        block->norm2[lane] = (float)rng_below(rng, 100000) / 10.0f;
        block->unit[lane] = (float)rng_below(rng, 300) / 100.0f;
        block->reach[lane] = is_used ? sqrtf(2.0f * logf(block->rows[lane])) : 0.0f;
        block->far[lane] = block->unit[lane] * (1.0f + (float)rng_below(rng, 100) / 50.0f);
        block->child[lane] = is_used ? lane : TREE_NONE;
        rows->positions[lane] = is_used ? rng_below(rng, 1000) : TREE_NONE;
        rows->scales[lane] = dci_scale_narrow((float)rng_below(rng, 100) / 100.0f);
    }
    for (uint32_t v = 0; v < views; v++) {
        scene->sums[v] = 0;
        for (uint32_t i = 0; i < dim; i++) {
            const int32_t random = (int32_t)rng_below(rng, 255) - 127;
            scene->codes[v * dim + i] = (int8_t)(v == 0 ? 127 : v == 1 ? -127 : random);
            scene->sums[v] += scene->codes[v * dim + i];
        }
        memset(scene->fine + (size_t)v * 2 * half, 0, 2 * half);
        memcpy(scene->fine + (size_t)v * 2 * half, scene->codes + v * dim, dim);
        tables_init(scene, v, dim, rng);
        scene->steps[v] = 1e-6f * (1.0f + (float)rng_below(rng, 10));
        scene->bases[v] = rng_normal(rng);
        scene->norms[v] = (float)rng_below(rng, 300) / 100.0f;
        scene->reference[v] = 3.0f + rng_normal(rng);
    }
    scene->views = (struct dci_views){.count = views,
                                      .head_dim = dim,
                                      .codes = scene->codes,
                                      .sums = scene->sums,
                                      .steps = scene->steps,
                                      .bases = scene->bases,
                                      .norms = scene->norms,
                                      .row_bytes = half,
                                      .fine = scene->fine,
                                      .tables = scene->tables,
                                      .table_zeros = scene->table_zeros,
                                      .table_steps = scene->table_steps};
}

static int64_t block_dot(const struct scene *scene, uint32_t v, uint32_t lane)
{
    int64_t sum = 0;
    for (uint32_t i = 0; i < scene->views.head_dim; i++) {
        sum += (int64_t)block_code(scene, lane, i) * scene->codes[v * scene->views.head_dim + i];
    }
    return sum;
}

// ---- conversions ----

static void fp16_is_exact(void **state)
{
    (void)state;
    uint16_t halves[16];
    float out[16];
    for (uint32_t k = 0; dci_kernel_at(k) != NULL; k++) {
        for (uint32_t base = 0; base < 65536; base += 16) {
            for (uint32_t i = 0; i < 16; i++) {
                halves[i] = (uint16_t)(base + i);
            }
            dci_kernel_at(k)->widen(INDEX_FP16, halves, 16, out);
            for (uint32_t i = 0; i < 16; i++) {
                const float expected = half_to_float(halves[i]);
                if (isnan(expected)) {
                    assert_true(isnan(out[i]));
                } else {
                    assert_memory_equal(&out[i], &expected, sizeof expected);
                }
            }
        }
    }
}

static void bf16_and_fp32_are_exact(void **state)
{
    (void)state;
    uint16_t halves[16];
    uint32_t out[16], wide[16];
    for (uint32_t k = 0; dci_kernel_at(k) != NULL; k++) {
        for (uint32_t base = 0; base < 65536; base += 16) {
            for (uint32_t i = 0; i < 16; i++) {
                halves[i] = (uint16_t)(base + i);
            }
            dci_kernel_at(k)->widen(INDEX_BF16, halves, 16, (float *)out);
            for (uint32_t i = 0; i < 16; i++) {
                assert_int_equal(out[i], (base + i) << 16);
            }
            dci_kernel_at(k)->widen(INDEX_FP32, out, 16, (float *)wide);
            assert_memory_equal(out, wide, sizeof out);
        }
    }
}

// ---- every instruction set against the portable kernels, bit for bit ----

#define SUMS    9
#define MEMBERS 5

struct results {
    float dot, one, encoded, spread2, added[INDEX_HEAD_DIM_MAX], rotated[INDEX_HEAD_DIM_MAX];
    uint8_t code[INDEX_HEAD_DIM_MAX];
    float step, decoded[INDEX_HEAD_DIM_MAX];
    int8_t code8[2][INDEX_HEAD_DIM_MAX];
    int32_t code_sum;
    struct dci_probe probe;
    uint32_t nearest[2];
    float largest[DCI_LANES], projections[MEMBERS];
    uint8_t members[MEMBERS * INDEX_HEAD_DIM_MAX];
    int32_t norms2[MEMBERS], sums7[INDEX_HEAD_DIM_MAX];
    float near[2][DCI_LANES], hopes[DCI_LANES], merits[DCI_LANES], mass[DCI_LANES];
    float centers[VIEWS_MAX * DCI_LANES], promised[VIEWS_MAX * DCI_LANES], promises[VIEWS_MAX * DCI_LANES];
    float scores[VIEWS_MAX * DCI_LANES], weights[VIEWS_MAX * DCI_LANES], estimated[VIEWS_MAX * DCI_LANES];
    float sums[SUMS][VIEWS_MAX * DCI_LANES];
    int16_t signs[3][VIEWS_MAX * DCI_LANES];
    float terms[VIEWS_MAX * DCI_LANES], tokens[VIEWS_MAX * DCI_LANES];
    uint32_t count;
    uint32_t above[2], below, passed;
};

struct vectors {
    float a[INDEX_HEAD_DIM_MAX], b[INDEX_HEAD_DIM_MAX], signs[INDEX_HEAD_DIM_MAX];
    float start[VIEWS_MAX * DCI_LANES]; // what sums and tops begin with
    int8_t probe_codes[INDEX_HEAD_DIM_MAX];
    struct dci_probe probes[2];
    struct dci_sieve sieve;
    float offsets[VIEWS_MAX], factors[VIEWS_MAX], weights[VIEWS_MAX];
};

static uint32_t power_below(uint32_t n)
{
    uint32_t power = 16;
    while (2 * power <= n) {
        power *= 2;
    }
    return power;
}

static void run_all(const struct dci_kernel *kernel, const struct scene *scene, const struct vectors *in,
                    struct results *out)
{
    const uint32_t n = scene->views.head_dim, views = scene->views.count;
    memset(out, 0, sizeof *out);
    out->dot = kernel->dot(in->a, in->b, n);
    out->one = kernel->exp_one(in->a[0]);
    memcpy(out->added, in->a, n * sizeof in->a[0]);
    kernel->add(out->added, in->b, n);
    memcpy(out->rotated, in->a, n * sizeof in->a[0]);
    kernel->hadamard(out->rotated, power_below(n), in->signs);
    out->encoded = kernel->encode5(in->a, in->b, n, out->code, &out->spread2);
    out->step = kernel->encode8(in->b, n, out->code8[0], &out->code_sum);
    kernel->decode8(out->code8[0], out->step, in->a, n, out->decoded);
    kernel->probe(in->a, in->b, n, out->code8[1], &out->probe);
    out->probe.codes = NULL;
    static const uint32_t order[MEMBERS] = {3, 0, 4, 1, 2};
    kernel->largest16(in->a, in->b, n, out->largest);
    for (uint32_t i = 0; i < MEMBERS; i++) {
        const float inverse = 63.0f / dci_max_lanes(out->largest) / (float)(i + 1);
        out->norms2[i] = kernel->encode7(in->a, in->b, inverse, n, out->members + (size_t)i * n);
    }
    kernel->dots7(out->members, n, order, MEMBERS, &in->probes[0], out->projections);
    kernel->sums7(out->members, n, order, MEMBERS - 1, out->sums7);
    for (uint32_t i = 0; i < 2; i++) {
        out->nearest[i] = kernel->near16(&in->probes[i], scene->block, n, out->near[i]);
    }
    kernel->centers16(&scene->views, scene->block, out->centers);
    for (uint32_t i = 0; i < SUMS; i++) {
        memcpy(out->sums[i], in->start, views * DCI_LANES * sizeof in->start[0]);
    }
    kernel->promise16(&scene->views, scene->block, out->promised, out->sums[0]);
    struct dci_lanes lanes;
    kernel->signs16(&scene->views, scene->rows, out->signs[0]);
    lanes_init(scene, out->signs[0], out->centers, &lanes);
    kernel->score16(&scene->views, &lanes, out->scores, out->sums[1]);
    struct dci_sieve sieve = in->sieve;
    sieve.offsets = in->offsets;
    sieve.factors = in->factors;
    sieve.weights = in->weights;
    out->passed = kernel->sift16(&scene->views, scene->rows, &sieve, out->signs[1], out->terms, out->sums[6]);
    const struct dci_target target = {in->sieve.low, in->sieve.span, out->centers + 3, out->sums[8]};
    out->count = kernel->tokens16(&scene->views, scene->rows, scene->lows, &target, out->signs[2], out->tokens);
    kernel->survey16(&scene->views, scene->block, out->centers, scene->reference, out->sums[2], out->estimated);
    kernel->hopes16(&scene->views, scene->block, out->centers, scene->reference, out->hopes);
    kernel->merits16(&scene->views, scene->block, out->centers, scene->reference, -2.0f, out->merits, out->promises);
    out->merits[4] = -1.0f;
    kernel->rest16(views, out->promises, out->merits, out->sums[3]);
    kernel->spread16(views, out->scores, out->centers + 3, 0.7f, out->sums[4]);
    kernel->exps16(out->scores, views, scene->reference, out->weights, out->sums[5]);
    kernel->exps16(out->scores, views, scene->reference, out->weights, NULL);
    kernel->mix16(out->weights, views, scene->steps, out->mass);
    out->above[0] = kernel->above16(out->hopes, out->hopes[5]);
    out->above[1] = kernel->above16(out->hopes, 0.5f * DCI_HIDDEN);
    out->below = kernel->below16(out->hopes, out->hopes[5]);
    kernel->balance16(views, out->promises, out->merits, scene->block->rows, in->weights, out->sums[7]);
}

static void vectors_init(struct vectors *in, const struct scene *scene, float size, struct rng *rng)
{
    for (uint32_t i = 0; i < INDEX_HEAD_DIM_MAX; i++) {
        in->a[i] = size * rng_normal(rng);
        in->b[i] = size * rng_normal(rng);
        in->signs[i] = rng_below(rng, 2) == 0 ? 1.0f : -1.0f;
    }
    for (uint32_t i = 0; i < VIEWS_MAX * DCI_LANES; i++) {
        in->start[i] = rng_below(rng, 8) == 0 ? 0.0f : (float)rng_below(rng, 1000) / 100.0f;
    }
    in->probes[0] = (struct dci_probe){.codes = in->probe_codes, .step = 0.02f, .norm2 = 1000.0f};
    const uint32_t kind = rng_below(rng, 4); // at their limits, or random
    for (uint32_t i = 0; i < scene->views.head_dim; i++) {
        const int32_t random = (int32_t)rng_below(rng, 2 * DCI_PROBE_MOST + 1) - DCI_PROBE_MOST;
        in->probe_codes[i] = (int8_t)(kind == 0 ? DCI_PROBE_MOST : kind == 1 ? -DCI_PROBE_MOST : random);
        in->probes[0].sum += in->probe_codes[i];
    }
    in->probes[1] = in->probes[0];
    in->probes[1].norm2_max = 5000.0f + (float)rng_below(rng, 5000); // below some norms
    in->sieve =
        (struct dci_sieve){.low = rng_below(rng, 900), .span = rng_below(rng, 500), .bar = (float)rng_below(rng, 100)};
    for (uint32_t v = 0; v < VIEWS_MAX; v++) {
        in->offsets[v] = DCI_ROUGH_OFFSET + 2.0f * DCI_ROUGH_SLOPE * rng_normal(rng);
        in->factors[v] = 2e-4f * DCI_ROUGH_SLOPE * (float)rng_below(rng, 5);
        in->weights[v] = 0.01f * (float)(1 + rng_below(rng, 200));
    }
}

static void all_sets_agree(void **state)
{
    (void)state;
    struct rng rng = rng_begin(11);
    static struct scene scene;
    static struct vectors in;
    static struct results found[2];
    for (uint32_t round = 0; round < rounds_of(800); round++) {
        scene_init(&scene, 1 + rng_below(&rng, VIEWS_MAX), 16 * (1 + rng_below(&rng, 16)), &rng);
        vectors_init(&in, &scene, powf(10.0f, (float)rng_below(&rng, 30) - 15.0f), &rng);
        if (round % 5 == 0) { // estimates beyond their limits
            for (uint32_t v = 0; v < scene.views.count; v++) {
                scene.norms[v] = 1e6f;
                scene.bases[v] = 1e29f * rng_normal(&rng);
            }
        }
        run_all(dci_kernel_at(0), &scene, &in, &found[0]);
        for (uint32_t k = 1; dci_kernel_at(k) != NULL; k++) {
            run_all(dci_kernel_at(k), &scene, &in, &found[1]);
            assert_memory_equal(&found[0], &found[1], sizeof found[0]);
        }
    }
    for (uint32_t k = 0; dci_kernel_at(k) != NULL; k++) {
        printf("%s\n", dci_kernel_at(k)->name);
    }
    assert_true(dci_kernel_best() != NULL);
}

// ---- sums and products ----

static void sums_are_right(void **state)
{
    (void)state;
    struct rng rng = rng_begin(12);
    const struct dci_kernel *kernel = dci_kernel_best();
    for (uint32_t round = 0; round < 200; round++) {
        const uint32_t n = 16 * (1 + rng_below(&rng, 16));
        float a[256], b[256], sum[256];
        double dot = 0.0;
        for (uint32_t i = 0; i < n; i++) {
            sum[i] = a[i] = rng_normal(&rng);
            b[i] = rng_normal(&rng);
            dot += (double)a[i] * (double)b[i];
        }
        assert_true(fabs((double)kernel->dot(a, b, n) - dot) < 1e-4);
        kernel->add(sum, b, n);
        for (uint32_t i = 0; i < n; i++) {
            assert_true(sum[i] == a[i] + b[i]);
        }
    }
    float lanes[DCI_LANES];
    for (uint32_t i = 0; i < DCI_LANES; i++) {
        lanes[i] = i == 11 ? 300.0f : (float)i;
    }
    assert_true(dci_sum_lanes(lanes) == 120.0f - 11.0f + 300.0f);
    assert_true(dci_max_lanes(lanes) == 300.0f);
}

static void exp_and_log_are_close(void **state)
{
    (void)state;
    for (float x = -87.0f; x < 88.0f; x += 0.0137f) {
        const double expected = exp((double)x);
        assert_true(fabs((double)dci_exp(x) - expected) < 4e-7 * expected);
    }
    assert_true(dci_exp(-88.0f) == 0.0f && dci_exp(DCI_HIDDEN) == 0.0f && dci_exp(-INFINITY) == 0.0f);
    assert_true(dci_exp(1e30f) < INFINITY && dci_exp(0.0f) == 1.0f);
    for (float x = 1e-30f; x < 1e30f; x *= 1.37f) {
        const double expected = log((double)x);
        assert_true(fabs((double)dci_log(x) - expected) < 1e-6 * (fabs(expected) + 1.0));
    }
    assert_true(dci_log(1.0f) == 0.0f);
}

// With steps of 1 a center is the inner product of the codes itself: below 2^24, so that fp32 holds it.
static void inner_products_of_anchors_are_exact(void **state)
{
    (void)state;
    struct rng rng = rng_begin(61);
    static struct scene scene;
    for (uint32_t round = 0; round < rounds_of(200); round++) {
        float centers[VIEWS_MAX * DCI_LANES];
        scene_init(&scene, 1 + rng_below(&rng, VIEWS_MAX), 16 * (1 + rng_below(&rng, 16)), &rng);
        for (uint32_t i = 0; i < DCI_LANES; i++) {
            scene.block->step[i] = 1.0f;
        }
        for (uint32_t v = 0; v < scene.views.count; v++) {
            scene.steps[v] = 1.0f;
            scene.bases[v] = (float)v;
        }
        for (uint32_t k = 0; dci_kernel_at(k) != NULL; k++) {
            dci_kernel_at(k)->centers16(&scene.views, scene.block, centers);
            for (uint32_t v = 0; v < scene.views.count; v++) {
                for (uint32_t lane = 0; lane < DCI_LANES; lane++) {
                    const float center = centers[v * DCI_LANES + lane];
                    if (lane == 7) {
                        assert_true(center == DCI_HIDDEN);
                    } else {
                        assert_int_equal((int64_t)center, block_dot(&scene, v, lane) + v);
                    }
                }
            }
        }
    }
}

// The same for the rows of a page: halves of the codes' inner product, plus what the anchor scores. The top bits meet
// the table codes, the low bits the others.
static void inner_products_of_rows_are_exact(void **state)
{
    (void)state;
    struct rng rng = rng_begin(67);
    static struct scene scene;
    for (uint32_t round = 0; round < rounds_of(200); round++) {
        float scores[VIEWS_MAX * DCI_LANES], tops[VIEWS_MAX * DCI_LANES], anchors[VIEWS_MAX * DCI_LANES];
        int16_t signs[VIEWS_MAX * DCI_LANES];
        scene_init(&scene, 1 + rng_below(&rng, VIEWS_MAX), 16 * (1 + rng_below(&rng, 16)), &rng);
        for (uint32_t i = 0; i < DCI_LANES; i++) {
            scene.rows->scales[i] = dci_scale_narrow(1.0f);
        }
        for (uint32_t i = 0; i < VIEWS_MAX * DCI_LANES; i++) {
            scene.steps[i / DCI_LANES] = 1.0f;
            scene.table_steps[i / DCI_LANES] = 1.0f;
            anchors[i] = (float)i;
        }
        struct dci_lanes lanes;
        lanes_init(&scene, signs, anchors, &lanes);
        for (uint32_t k = 0; dci_kernel_at(k) != NULL; k++) {
            for (uint32_t i = 0; i < VIEWS_MAX * DCI_LANES; i++) {
                tops[i] = i % 2 == 0 ? DCI_HIDDEN : 1000.0f;
            }
            dci_kernel_at(k)->signs16(&scene.views, scene.rows, signs);
            dci_kernel_at(k)->score16(&scene.views, &lanes, scores, tops);
            for (uint32_t v = 0; v < scene.views.count; v++) {
                for (uint32_t lane = 0; lane < DCI_LANES; lane++) {
                    const uint32_t at = v * DCI_LANES + lane, dim = scene.views.head_dim;
                    int64_t top = 0, low = 0;
                    for (uint32_t i = 0; i < dim; i++) {
                        top += (top_bit(&scene, lane, i) == 1 ? 1 : -1) * (int64_t)scene.table_codes[v * dim + i];
                        low += (2 * (int64_t)low_bits(&scene, lane, i) - 15) * scene.codes[v * dim + i];
                    }
                    assert_int_equal(signs[at], top);
                    const int64_t sum = 16 * top + low + 2 * (int64_t)at;
                    const float before = lane % 2 == 0 ? DCI_HIDDEN : 1000.0f;
                    assert_true(lanes.live[lane] > 0.0f ? (int64_t)(2.0f * scores[at]) == sum
                                                        : scores[at] == DCI_HIDDEN);
                    assert_true(tops[at] == (scores[at] > before ? scores[at] : before));
                }
            }
        }
    }
}

// Tables of any query: their codes are the nearest that fit.
static void tables_meet_their_query(void **state)
{
    (void)state;
    struct rng rng = rng_begin(69);
    static struct scene scene;
    for (uint32_t round = 0; round < rounds_of(200); round++) {
        const uint32_t dim = 16 * (1 + rng_below(&rng, 16));
        float x[INDEX_HEAD_DIM_MAX];
        int16_t signs[DCI_LANES];
        const float size = powf(10.0f, (float)rng_below(&rng, 40) - 20.0f);
        scene_init(&scene, 1, dim, &rng);
        for (uint32_t i = 0; i < dim; i++) {
            x[i] = round % 7 == 0 ? 0.0f : size * rng_normal(&rng);
        }
        const float step = dci_tables_make(x, dim, scene.tables, scene.table_zeros);
        assert_true((step == 0.0f) == (round % 7 == 0));
        dci_kernel_best()->signs16(&scene.views, scene.rows, signs);
        for (uint32_t lane = 0; lane < DCI_LANES; lane++) {
            double sum = 0.0;
            for (uint32_t i = 0; i < dim; i++) {
                sum += (top_bit(&scene, lane, i) == 1 ? 1.0 : -1.0) * (double)x[i];
            }
            assert_true(fabs(sum - (double)step * signs[lane]) <= 0.501 * (double)step * dim);
        }
        for (uint32_t i = 0; i < dim * 4; i++) {
            assert_true(scene.tables[i] <= 127);
        }
    }
}

// What passes the sieve, and what the others add to the totals, against double precision.
static void the_sieve_follows_its_formula(void **state)
{
    (void)state;
    struct rng rng = rng_begin(70);
    static struct scene scene;
    static struct vectors in;
    static struct results out;
    uint32_t passed = 0, stopped = 0;
    for (uint32_t round = 0; round < rounds_of(200); round++) {
        scene_init(&scene, 1 + rng_below(&rng, VIEWS_MAX), 16 * (1 + rng_below(&rng, 16)), &rng);
        vectors_init(&in, &scene, 1.0f, &rng);
        run_all(dci_kernel_best(), &scene, &in, &out);
        assert_memory_equal(out.signs[0], out.signs[1], sizeof out.signs[0]);
        uint32_t counted = 0;
        for (uint32_t lane = 0; lane < DCI_LANES; lane++) {
            double mass = 0.0;
            const uint32_t position = scene.rows->positions[lane];
            const bool counts = position >= in.sieve.low && position - in.sieve.low < in.sieve.span;
            const bool passes = (out.passed >> lane & 1) != 0;
            for (uint32_t v = 0; v < scene.views.count; v++) {
                const double bits = (double)out.signs[0][v * DCI_LANES + lane] * (double)in.factors[v] *
                                        (double)dci_scale_widen(scene.rows->scales[lane]) +
                                    (double)in.offsets[v];
                const double term = exp((bits - (double)DCI_ROUGH_OFFSET) / (double)DCI_ROUGH_SLOPE);
                const double added = (double)out.sums[6][v * DCI_LANES + lane] - (double)in.start[v * DCI_LANES + lane];
                const double expected = counts && !passes ? term * (double)in.weights[v] : 0.0;
                assert_true(fabs(added - expected) <= 0.045 * expected + 1e-5);
                mass += term;
            }
            counted += counts ? 1 : 0;
            assert_true(passes ? counts && mass > 0.95 * (double)in.sieve.bar
                               : !counts || mass < 1.05 * (double)in.sieve.bar);
            passed += passes ? 1 : 0;
            stopped += counts && !passes ? 1 : 0;
            // Rows of one cell, scored together: those of the sieve's positions, around one anchor.
            for (uint32_t v = 0; v < scene.views.count; v++) {
                const uint32_t at = v * DCI_LANES + lane;
                const double own = (double)out.scores[at] - (double)out.centers[at];
                const double other = (double)out.tokens[at] - (double)out.centers[v * DCI_LANES + 3];
                assert_true(counts || out.tokens[at] == DCI_HIDDEN);
                assert_true(!counts || lane == 9 || fabs(own - other) <= 1e-4 * (1.0 + fabs(own)));
            }
        }
        assert_int_equal(out.passed >> DCI_LANES, counted);
        assert_int_equal(out.count, counted);
    }
    assert_true(passed > 50 && stopped > 50);
}

static void distances_follow_their_formulas(void **state)
{
    (void)state;
    struct rng rng = rng_begin(68);
    static struct scene scene;
    static struct vectors in;
    for (uint32_t round = 0; round < rounds_of(200); round++) {
        const uint32_t dim = 16 * (1 + rng_below(&rng, 16));
        scene_init(&scene, 1, dim, &rng);
        vectors_init(&in, &scene, 1.0f, &rng);
        for (uint32_t i = 0; i < 2; i++) {
            float distances[DCI_LANES];
            const struct dci_probe *probe = &in.probes[i];
            const uint32_t nearest = dci_kernel_best()->near16(probe, scene.block, dim, distances);
            for (uint32_t lane = 0; lane < DCI_LANES; lane++) {
                int64_t dot = 0;
                for (uint32_t j = 0; j < dim; j++) {
                    dot += (int64_t)block_code(&scene, lane, j) * probe->codes[j];
                }
                const double product = (double)dot * (double)scene.block->step[lane] * (double)probe->step;
                const double a2 = (double)scene.block->norm2[lane], b2 = (double)probe->norm2,
                             c2 = (double)probe->norm2_max;
                const double slack = a2 < c2 && b2 < c2 ? sqrt(c2 - a2) * sqrt(c2 - b2) : 0.0;
                const double expected = i == 0 ? a2 + b2 - 2.0 * product : c2 - product - slack;
                assert_true(lane < nearest ? distances[nearest] < distances[lane]
                                           : distances[nearest] <= distances[lane]);
                if (lane == 7) {
                    assert_true(distances[lane] == FLT_MAX);
                } else {
                    assert_true(fabs((double)distances[lane] - expected) <=
                                1e-5 * (a2 + b2 + c2 + 2.0 * fabs(product)));
                }
            }
        }
    }
}

// Vectors in 7 bits: what their codes stand for, and that sums are exact also at the limits.
static void members_are_exact(void **state)
{
    (void)state;
    struct rng rng = rng_begin(69);
    enum { COUNT = 600 };
    uint8_t *codes = malloc(COUNT * INDEX_HEAD_DIM_MAX);
    uint32_t order[COUNT];
    for (uint32_t round = 0; round < rounds_of(60); round++) {
        const uint32_t n = 16 * (1 + rng_below(&rng, 16)), count = 1 + rng_below(&rng, COUNT);
        float x[INDEX_HEAD_DIM_MAX], center[INDEX_HEAD_DIM_MAX], lanes[DCI_LANES] = {0}, values[COUNT];
        int8_t probe_codes[INDEX_HEAD_DIM_MAX];
        struct dci_probe probe = {.codes = probe_codes, .step = 0.5f};
        int32_t sums[INDEX_HEAD_DIM_MAX];
        const struct dci_kernel *kernel = dci_kernel_at(round % 2 == 0 ? 0 : 1);
        kernel = kernel == NULL ? dci_kernel_best() : kernel;
        for (uint32_t j = 0; j < n; j++) {
            center[j] = rng_normal(&rng);
            probe_codes[j] = (int8_t)(round % 3 == 0 ? DCI_PROBE_MOST : (int32_t)rng_below(&rng, 63) - DCI_PROBE_MOST);
            probe.sum += probe_codes[j];
        }
        for (uint32_t i = 0; i < count; i++) {
            int32_t norm2 = 0;
            for (uint32_t j = 0; j < n; j++) {
                x[j] = center[j] + (round % 4 == 0 ? 63.0f : (float)rng_below(&rng, 127) - 63.0f);
                norm2 += (int32_t)((x[j] - center[j]) * (x[j] - center[j]) + 0.5f);
            }
            kernel->largest16(x, center, n, lanes);
            assert_true(fabs((double)norm2 - kernel->encode7(x, center, 1.0f, n, codes + (size_t)i * n)) <
                        0.01 * norm2 + 1);
            order[i] = i;
        }
        assert_true(dci_max_lanes(lanes) < 63.01f);
        kernel->dots7(codes, n, order, count, &probe, values);
        kernel->sums7(codes, n, order, count, sums);
        for (uint32_t i = 0; i < count; i++) {
            int32_t dot = 0;
            for (uint32_t j = 0; j < n; j++) {
                dot += (codes[(size_t)i * n + j] - DCI_MEMBER_ZERO) * probe_codes[j];
                sums[j] -= codes[(size_t)i * n + j];
            }
            assert_true(values[i] == 0.5f * (float)dot);
        }
        for (uint32_t j = 0; j < n; j++) {
            assert_int_equal(sums[j], 0);
        }
    }
    free(codes);
}

// In the space of T_K the order by near16 is that of the images of the keys (paper, section 3.1): a probe and entries
// whose codes are exact.
static void promotion_orders_by_images(void **state)
{
    (void)state;
    struct rng rng = rng_begin(14);
    static struct scene scene;
    const uint32_t dim = 32;
    for (uint32_t round = 0; round < 100; round++) {
        int8_t codes[32];
        struct dci_probe probe = {.codes = codes, .step = 0.5f};
        double images[DCI_LANES], largest = 0.0;
        float distances[DCI_LANES];
        scene_init(&scene, 1, dim, &rng);
        for (uint32_t j = 0; j < dim; j++) {
            codes[j] = (int8_t)((int32_t)rng_below(&rng, 2 * DCI_PROBE_MOST + 1) - DCI_PROBE_MOST);
            probe.sum += codes[j];
            probe.norm2 += 0.25f * (float)codes[j] * (float)codes[j];
        }
        for (uint32_t lane = 0; lane < DCI_LANES; lane++) {
            scene.block->norm2[lane] = 0.0f;
            for (uint32_t j = 0; j < dim; j++) {
                const float x = scene.block->step[lane] * (float)block_code(&scene, lane, j);
                scene.block->norm2[lane] += x * x;
            }
            largest = (double)scene.block->norm2[lane] > largest ? (double)scene.block->norm2[lane] : largest;
        }
        largest = (double)probe.norm2 > largest ? (double)probe.norm2 : largest;
        probe.norm2_max = (float)(1.01 * largest);
        for (uint32_t lane = 0; lane < DCI_LANES; lane++) { // |T(a) - T(b)|^2, a and b over c
            const double c = sqrt((double)probe.norm2_max);
            double a2 = 0.0, b2 = 0.0, off2 = 0.0;
            for (uint32_t j = 0; j < dim; j++) {
                const double a = (double)scene.block->step[lane] * block_code(&scene, lane, j) / c;
                const double b = 0.5 * codes[j] / c;
                a2 += a * a;
                b2 += b * b;
                off2 += (a - b) * (a - b);
            }
            images[lane] = off2 + pow(sqrt(1.0 - a2) - sqrt(1.0 - b2), 2);
        }
        (void)dci_kernel_best()->near16(&probe, scene.block, dim, distances);
        for (uint32_t a = 0; a < DCI_LANES; a++) {
            for (uint32_t b = 0; b < DCI_LANES; b++) {
                if (a != 7 && b != 7 && images[a] < images[b] - 1e-5) {
                    assert_true(distances[a] < distances[b]);
                }
            }
        }
    }
}

// ---- estimates ----

// Against double precision. Deviations stay below their limit and exponents too.
static void estimates_follow_their_formulas(void **state)
{
    (void)state;
    struct rng rng = rng_begin(63);
    static struct scene scene;
    static struct vectors in;
    static struct results out;
    for (uint32_t round = 0; round < rounds_of(100); round++) {
        scene_init(&scene, 1 + rng_below(&rng, VIEWS_MAX), 32, &rng);
        vectors_init(&in, &scene, 1.0f, &rng);
        for (uint32_t i = 0; i < DCI_LANES; i++) {
            scene.block->unit[i] += 0.1f;
        }
        for (uint32_t v = 0; v < scene.views.count; v++) {
            scene.norms[v] += 0.1f;
        }
        run_all(dci_kernel_best(), &scene, &in, &out);
        float lower[DCI_LANES] = {0}, higher[DCI_LANES] = {0}, promises[VIEWS_MAX * DCI_LANES];
        dci_kernel_best()->merits16(&scene.views, scene.block, out.centers, scene.reference, -4.0f, lower, promises);
        dci_kernel_best()->merits16(&scene.views, scene.block, out.centers, scene.reference, 0.0f, higher, promises);
        for (uint32_t lane = 0; lane < DCI_LANES; lane++) {
            const struct dci_block *block = scene.block;
            double merit = 0.0, mass = 0.0, hope = -INFINITY, mixed = 0.0;
            for (uint32_t v = 0; v < scene.views.count; v++) {
                const uint32_t at = v * DCI_LANES + lane;
                const double center = (double)out.centers[at], reference = (double)scene.reference[v];
                const double s = (double)block->unit[lane] * (double)scene.norms[v], start = (double)in.start[at];
                const double few = fmin(s, (double)block->reach[lane]);
                const double mean = few * s - few * few / 2;
                const double all = (double)block->rows[lane] * exp(center - reference + mean);
                const double above = fmin(1.702 * (-2.0 - (center - reference) - s * s) / s, 600.0);
                const double reach = fmax(2.0 * (double)block->unit[lane], 1.5 * (double)block->far[lane]);
                const double score = (double)out.scores[at];
                const double weight = score > (double)DCI_HIDDEN ? exp(score - reference) : 0.0;
                const double off = score > (double)DCI_HIDDEN ? score - (double)out.centers[v * DCI_LANES + 3] : 0.0;
                // What the others promise is estimated to within 4 %.
                const double close = 0.045 * all + 1e-6;
                const double promise = fmax(start, lane == 7 ? start : center + mean);
                assert_true(out.promised[at] == out.centers[at]);
                assert_true(fabs((double)out.sums[0][at] - promise) <= 1e-5 * (1.0 + fabs(promise)));
                assert_true(fabs((double)out.sums[2][at] - start - all) <= close + 1e-4 * start);
                assert_true(fabs((double)out.promises[at] - all) <= close);
                assert_true(fabs((double)out.estimated[at] - all) <= close);
                const double waits = lane == 4 ? 0.0 : all;
                assert_true(fabs((double)out.sums[3][at] - start - waits) <= close + 1e-4 * start);
                const double most = (double)block->rows[lane] * (double)in.weights[v];
                const double limited = lane == 7 || lane == 4 ? 0.0 : fmin((double)out.promises[at], most);
                assert_true(fabs((double)out.sums[7][at] - start - limited) <= 1e-4 * (start + limited) + 1e-6);
                assert_true(fabs((double)out.sums[4][at] - start - 0.7 * off * off) <= 1e-3 * (start + off * off));
                assert_true(fabs((double)out.weights[at] - weight) <= 1e-4 * weight + 1e-7);
                assert_true(fabs((double)out.sums[5][at] - start - weight) <= 1e-4 * (start + weight) + 1e-6);
                merit += all / (1.0 + exp(above));
                mass += all;
                hope = lane == 7 ? hope : fmax(hope, center - reference + reach * (double)scene.norms[v]);
                mixed += weight * (double)scene.steps[v];
            }
            // Not less than the logistic curve says, and the less the higher the mass that counts.
            assert_true(lane != 7 || out.merits[lane] == DCI_TAKEN);
            if (lane != 4 && lane != 7) { // run_all has changed the one, the other is not in use
                assert_true((double)out.merits[lane] >= 0.9 * merit - 1e-3 * mass - 1e-6);
                assert_true(out.merits[lane] <= 1.0001f * lower[lane] && higher[lane] <= 1.0001f * out.merits[lane]);
            }
            assert_true(lane == 7 ? out.hopes[lane] < -1e38f : fabs((double)out.hopes[lane] - hope) <= 1e-4);
            assert_true(fabs((double)out.mass[lane] - mixed) <= 1e-4 * mixed + 1e-9);
            assert_int_equal(out.above[0] >> lane & 1, out.hopes[lane] >= out.hopes[5]);
            assert_int_equal(out.above[1] >> lane & 1, lane != 7);
            assert_int_equal(out.below >> lane & 1, out.hopes[lane] < out.hopes[5]);
        }
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(fp16_is_exact),
        cmocka_unit_test(bf16_and_fp32_are_exact),
        cmocka_unit_test(all_sets_agree),
        cmocka_unit_test(sums_are_right),
        cmocka_unit_test(exp_and_log_are_close),
        cmocka_unit_test(inner_products_of_anchors_are_exact),
        cmocka_unit_test(inner_products_of_rows_are_exact),
        cmocka_unit_test(tables_meet_their_query),
        cmocka_unit_test(the_sieve_follows_its_formula),
        cmocka_unit_test(distances_follow_their_formulas),
        cmocka_unit_test(members_are_exact),
        cmocka_unit_test(promotion_orders_by_images),
        cmocka_unit_test(estimates_follow_their_formulas),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
