// The replay's own arithmetic: reading of traces, attention, and the quality figures, against plain double arithmetic.
#include "attention.h"
#include "replay.h"

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <cmocka.h>

#define LAYERS   2u
#define KV_HEADS 2u
#define GROUP    2u
#define DIM      16u
#define TOKENS   300u
#define STEPS    4u
#define SINKS    5u
#define WINDOW   9u
#define BUDGETS  2u
#define SLOTS    (SINKS + WINDOW + 20u)

// What the measured part asks of the rest of the program.
void replay_progress(const struct replay *replay, const char *format, ...)
{
    (void)replay;
    (void)format;
}

int replay_fail(const struct replay *replay, const char *what, ice_status status)
{
    (void)replay;
    (void)status;
    fail_msg("%s", what);
    return REPLAY_FAILED;
}

static void write_npy(const char *folder, const char *name, const char *header, const void *data, size_t bytes)
{
    char path[512];
    (void)snprintf(path, sizeof(path), "%s/%s", folder, name);
    FILE *file = fopen(path, "wb");
    assert_non_null(file);
    // As NumPy writes it: the data starts on a multiple of 64 bytes.
    char padded[256];
    size_t header_bytes = (strlen(header) + 10 + 63) / 64 * 64 - 10;
    (void)snprintf(padded, sizeof(padded), "%-*s", (int)header_bytes, header);
    const unsigned char prefix[10] = {0x93, 'N', 'U', 'M', 'P', 'Y', 1, 0, (unsigned char)header_bytes, 0};
    assert_int_equal(fwrite(prefix, 1, sizeof(prefix), file), sizeof(prefix));
    assert_int_equal(fwrite(padded, 1, header_bytes, file), header_bytes);
    assert_int_equal(fwrite(data, 1, bytes, file), bytes);
    assert_int_equal(fclose(file), 0);
}

static void make_folder(char *folder, size_t bytes)
{
    const char *base = getenv("TMPDIR");
    (void)snprintf(folder, bytes, "%s/icecache-trace-XXXXXX", base != NULL ? base : "/tmp");
    assert_non_null(mkdtemp(folder));
}

static void remove_files(const char *folder)
{
    static const char *const names[] = {"manifest.json", "L0_K.npy", "L0_V.npy", "L0_Q.npy",
                                        "L1_K.npy",      "L1_V.npy", "L1_Q.npy", "x.npy"};
    char path[512];
    for (size_t i = 0; i < sizeof(names) / sizeof(names[0]); i++) {
        (void)snprintf(path, sizeof(path), "%s/%s", folder, names[i]);
        (void)unlink(path);
    }
    assert_int_equal(rmdir(folder), 0);
}

static void npy_is_checked(void **state)
{
    (void)state;
    char folder[256];
    make_folder(folder, sizeof(folder));
    char path[512];
    (void)snprintf(path, sizeof(path), "%s/x.npy", folder);
    char error[600];
    struct npy npy;
    const float data[6] = {1, 2, 3, 4, 5, 6};
    write_npy(folder, "x.npy", "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }\n", data, sizeof(data));
    assert_true(npy_open(path, &npy, error, sizeof(error)));
    assert_int_equal(npy.rank, 2);
    assert_int_equal(npy.shape[1], 3);
    assert_memory_equal(npy.data, data, sizeof(data));
    npy_close(&npy);
    static const char *const bad[] = {
        "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 4), }\n",
        "{'descr': '<f4', 'fortran_order': True, 'shape': (2, 3), }\n",
        "{'descr': '>f4', 'fortran_order': False, 'shape': (2, 3), }\n",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (4294967295, 4294967295, 4294967295), }\n",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (), }\n",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3",
        "{}",
    };
    for (size_t i = 0; i < sizeof(bad) / sizeof(bad[0]); i++) {
        write_npy(folder, "x.npy", bad[i], data, sizeof(data));
        assert_false(npy_open(path, &npy, error, sizeof(error)));
        assert_non_null(strstr(error, path));
    }
    remove_files(folder);
}

static void every_half_is_converted(void **state)
{
    (void)state;
    for (uint32_t bits = 0; bits < 65536; bits++) {
        uint16_t half = (uint16_t)bits;
        float got;
        attention_to_float(&got, &half, 1, ICE_FP16);
        uint32_t exponent = bits >> 10 & 31;
        uint32_t fraction = bits & 1023;
        double size = exponent == 0 ? ldexp(fraction, -24) : ldexp(1024 + fraction, (int)exponent - 25);
        if (exponent == 31) {
            assert_true(fraction == 0 ? isinf(got) : isnan(got));
        } else {
            assert_true((double)got == (bits & 0x8000 ? -size : size));
        }
        assert_true((signbit(got) != 0) == ((bits & 0x8000) != 0));
    }
    const uint16_t one = 0x3f80;
    float got;
    attention_to_float(&got, &one, 1, ICE_BF16);
    assert_true(got == 1.0f);
}

// A made-up request whose keys and queries are drawn from a fixed generator.
struct fixture {
    char folder[256];
    struct trace trace;
};

static float draw(uint64_t *seed)
{
    *seed = *seed * 6364136223846793005u + 1442695040888963407u;
    return (float)(int32_t)(*seed >> 32) * 0x1p-31f;
}

static void write_layer(const struct fixture *fixture, uint32_t layer, uint64_t *seed)
{
    static const char letters[] = "KVQ";
    static float data[KV_HEADS * TOKENS * DIM];
    for (uint32_t i = 0; i < 3; i++) {
        size_t rows = i < 2 ? KV_HEADS * TOKENS : KV_HEADS * GROUP * STEPS;
        for (size_t j = 0; j < rows * DIM; j++) {
            data[j] = 3 * draw(seed);
        }
        char name[32];
        char header[128];
        (void)snprintf(name, sizeof(name), "L%u_%c.npy", layer, letters[i]);
        (void)snprintf(header, sizeof(header), "{'descr': '<f4', 'fortran_order': False, 'shape': (%u, %u, %u), }",
                       i < 2 ? KV_HEADS : KV_HEADS * GROUP, i < 2 ? TOKENS : STEPS, DIM);
        write_npy(fixture->folder, name, header, data, rows * DIM * sizeof(float));
    }
}

static int make_trace(void **state)
{
    static struct fixture fixture;
    make_folder(fixture.folder, sizeof(fixture.folder));
    char path[512];
    (void)snprintf(path, sizeof(path), "%s/manifest.json", fixture.folder);
    FILE *file = fopen(path, "w");
    assert_non_null(file);
    (void)fprintf(file,
                  "{\"name\": \"made-up\", \"n\": %u, \"n_layers\": %u, \"kv_heads\": %u, \"q_heads\": %u, "
                  "\"head_dim\": %u, \"q_positions\": [%u, %u]}",
                  TOKENS, LAYERS, KV_HEADS, KV_HEADS * GROUP, DIM, TOKENS - STEPS, TOKENS);
    assert_int_equal(fclose(file), 0);
    uint64_t seed = 1;
    for (uint32_t layer = 0; layer < LAYERS; layer++) {
        write_layer(&fixture, layer, &seed);
    }
    char error[600];
    if (!trace_open(fixture.folder, &fixture.trace, error, sizeof(error))) {
        fail_msg("%s", error);
    }
    *state = &fixture;
    return 0;
}

static int drop_trace(void **state)
{
    struct fixture *fixture = *state;
    trace_close(&fixture->trace);
    remove_files(fixture->folder);
    return 0;
}

// Softmax of one query over the first count tokens, in double.
static void plain_weights(const struct trace *trace, uint32_t layer, uint32_t head, uint32_t step, uint32_t count,
                          double *weights)
{
    const float *query = trace_query(trace, layer, head, step);
    double total = 0;
    for (uint32_t i = 0; i < count; i++) {
        const float *key = trace_key(trace, layer, head / GROUP, i);
        double score = 0;
        for (uint32_t j = 0; j < DIM; j++) {
            score += (double)query[j] * (double)key[j];
        }
        weights[i] = exp(score / 4);
        total += weights[i];
    }
    for (uint32_t i = 0; i < count; i++) {
        weights[i] /= total;
    }
}

static void attention_is_softmax(void **state)
{
    const struct trace *trace = &((struct fixture *)*state)->trace;
    float weights[TOKENS];
    float output[DIM];
    double plain[TOKENS];
    plain_weights(trace, 1, 3, 2, TOKENS, plain);
    attention_weights(weights, trace_query(trace, 1, 3, 2), trace_key(trace, 1, 1, 0), TOKENS, DIM, 0.25f);
    attention_output(output, weights, trace_value(trace, 1, 1, 0), TOKENS, DIM);
    for (uint32_t j = 0; j < DIM; j++) {
        double sum = 0;
        for (uint32_t i = 0; i < TOKENS; i++) {
            sum += plain[i] * (double)((const float *)trace_value(trace, 1, 1, i))[j];
        }
        assert_true(fabs(sum - (double)output[j]) < 1e-5);
    }
    for (uint32_t i = 0; i < TOKENS; i++) {
        assert_true(fabs(plain[i] - (double)weights[i]) < 1e-6);
    }
}

// Chooses for one (step, layer, head) the exact shared best (or, where `worst`, the smallest); returns what they hold.
static double choose(struct replay *replay, uint32_t step, uint32_t layer, uint32_t budget_index, uint32_t kv_head,
                     bool worst, double *landing_mass)
{
    uint32_t count = (uint32_t)replay->trace.first_query + step + 1;
    double mass[TOKENS] = {0};
    double plain[TOKENS];
    for (uint32_t head = kv_head * GROUP; head < (kv_head + 1) * GROUP; head++) {
        plain_weights(&replay->trace, layer, head, step, count, plain);
        for (uint32_t i = 0; i < count; i++) {
            mass[i] += plain[i];
        }
    }
    size_t index = replay_cell(replay, step, layer, budget_index) * KV_HEADS + kv_head;
    uint32_t *positions = replay->positions + index * SLOTS;
    uint32_t filled = 0;
    bool taken[TOKENS] = {false};
    for (uint32_t i = 0; i < count; i++) {
        if (i < SINKS || i >= count - WINDOW) {
            positions[filled++] = i;
            taken[i] = true;
            *landing_mass += mass[i];
        }
    }
    double chosen = 0;
    for (uint32_t n = 0; n < replay->options->budgets[budget_index]; n++) {
        uint32_t best = UINT32_MAX;
        for (uint32_t i = 0; i < count; i++) {
            if (!taken[i] && (best == UINT32_MAX || (worst ? mass[i] < mass[best] : mass[i] > mass[best]))) {
                best = i;
            }
        }
        taken[best] = true;
        positions[filled++] = best;
        chosen += mass[best];
    }
    replay->counts[index] = filled;
    *landing_mass += chosen;
    return chosen;
}

static void measure(void **state, bool worst)
{
    const struct replay_options options = {
        .budgets = {7, 20}, .budget_count = BUDGETS, .sinks = SINKS, .window = WINDOW};
    enum { CALLS = STEPS * LAYERS * BUDGETS };
    static uint32_t counts[CALLS * KV_HEADS];
    static uint32_t positions[CALLS * KV_HEADS * SLOTS];
    static float outputs[CALLS * KV_HEADS * GROUP * DIM]; // zeros: an output error of one
    static float latencies_us[CALLS];
    struct replay replay = {.options = &options,
                            .trace = ((struct fixture *)*state)->trace,
                            .steps = STEPS,
                            .slots = SLOTS,
                            .scale = 0.25f,
                            .counts = counts,
                            .positions = positions,
                            .outputs = outputs,
                            .latencies_us = latencies_us};
    for (uint32_t i = 0; i < CALLS; i++) {
        latencies_us[i] = (float)(CALLS - i);
    }
    double chosen[BUDGETS] = {0};
    double mass[BUDGETS] = {0};
    for (uint32_t lane = 0; lane < STEPS * LAYERS * KV_HEADS; lane++) {
        for (uint32_t i = 0; i < BUDGETS; i++) {
            chosen[i] += choose(&replay, lane / KV_HEADS / LAYERS, lane / KV_HEADS % LAYERS, i, lane % KV_HEADS, worst,
                                &mass[i]);
        }
    }
    assert_int_equal(replay_measure(&replay), REPLAY_OK);
    for (uint32_t i = 0; i < BUDGETS; i++) {
        assert_int_equal(replay.rows[i].budget, options.budgets[i]);
        assert_true(fabs(replay.rows[i].mass - mass[i] / (STEPS * LAYERS * KV_HEADS * GROUP)) < 1e-5);
        assert_true(fabs(replay.rows[i].output_error - 1) < 1e-5);
        assert_true(worst ? replay.rows[i].share < 0.2 : fabs(replay.rows[i].share - 1) < 1e-5);
    }
    assert_true(replay.rows[1].p50_us < replay.rows[1].p99_us);
    assert_true(replay.rows[1].p99_us < replay.rows[0].p50_us);
}

static void best_choice_has_share_one(void **state)
{
    measure(state, false);
}

static void worst_choice_has_little(void **state)
{
    measure(state, true);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(npy_is_checked),
        cmocka_unit_test(every_half_is_converted),
        cmocka_unit_test_setup_teardown(attention_is_softmax, make_trace, drop_trace),
        cmocka_unit_test_setup_teardown(best_choice_has_share_one, make_trace, drop_trace),
        cmocka_unit_test_setup_teardown(worst_choice_has_little, make_trace, drop_trace),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
