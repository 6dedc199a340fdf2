// The layout of a landing: pinned numbers, since a kernel on a GPU reads at these addresses, and every refusal.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "proto/dtype.h"
#include "proto/limits.h"
#include "proto/shm.h"

#include <string.h>

static struct landing_shape valid(void)
{
    return (struct landing_shape){
        .rows = 4, .layers = 32, .kv_heads = 8, .slots = 336, .head_dim = 128, .dtype = DTYPE_BF16};
}

static void sizes_are_pinned(void **state)
{
    (void)state;
    const struct landing_shape shape = valid();
    struct landing_layout layout;
    assert_true(landing_layout_init(&layout, &shape));
    assert_int_equal(layout.slot_bytes, 256);
    assert_int_equal(layout.side_bytes, 86016);
    assert_int_equal(layout.head_bytes, 172032);
    assert_int_equal(layout.positions_offset, 8 * 172032);
    assert_int_equal(layout.counts_offset, 8 * 172032 + 8 * 336 * 4);
    assert_int_equal(layout.block_bytes, 1387520);
    assert_int_equal(layout.total_bytes, 128 * 1387520);
    assert_int_equal(landing_block(&layout, &shape, 3, 31), 127 * 1387520);
}

static void blocks_start_on_512_bytes(void **state)
{
    (void)state;
    const struct landing_shape shape = {
        .rows = 1, .layers = 2, .kv_heads = 1, .slots = 1, .head_dim = 16, .dtype = DTYPE_FP32};
    struct landing_layout layout;
    assert_true(landing_layout_init(&layout, &shape));
    assert_int_equal(layout.slot_bytes, 64);
    assert_int_equal(layout.side_bytes, 64);
    assert_int_equal(layout.head_bytes, 128);
    assert_int_equal(layout.positions_offset, 128);
    assert_int_equal(layout.counts_offset, 132);
    assert_int_equal(layout.block_bytes, 512);
    assert_int_equal(layout.total_bytes, 4096);
}

static void parts_never_overlap(void **state)
{
    (void)state;
    for (uint32_t slots = 1; slots < 200; slots += 3) {
        for (uint32_t heads = 1; heads < 40; heads += 5) {
            const struct landing_shape shape = {
                .rows = 3, .layers = 2, .kv_heads = heads, .slots = slots, .head_dim = 48, .dtype = DTYPE_FP16};
            struct landing_layout layout;
            assert_true(landing_layout_init(&layout, &shape));
            assert_int_equal(landing_block(&layout, &shape, 2, 1), 5 * layout.block_bytes);
            assert_true(layout.positions_offset >= heads * layout.head_bytes);
            assert_true(layout.counts_offset >= layout.positions_offset + 4 * heads * slots);
            assert_true(layout.block_bytes >= layout.counts_offset + 4 * heads);
            assert_true(layout.block_bytes - layout.counts_offset - 4 * heads < 512);
            assert_true(layout.total_bytes >= 6 * layout.block_bytes);
            assert_true(layout.total_bytes - 6 * layout.block_bytes < 4096);
            assert_int_equal(layout.positions_offset % 4, 0);
            assert_int_equal(layout.counts_offset % 4, 0);
            assert_int_equal(layout.block_bytes % 512, 0);
            assert_int_equal(layout.total_bytes % 4096, 0);
        }
    }
}

static void a_staging_holds_one_layer_of_each_row(void **state)
{
    (void)state;
    const struct landing_shape shape = valid();
    const struct landing_shape pulled = landing_held_shape(&shape, LANDING_PULL);
    const struct landing_shape pushed = landing_held_shape(&shape, LANDING_PUSH);
    const struct landing_shape whole = landing_held_shape(&shape, LANDING_HOST);
    assert_memory_equal(&whole, &shape, sizeof(shape));
    assert_memory_equal(&pulled, &pushed, sizeof(shape));
    assert_int_equal(pulled.layers, 1);
    struct landing_layout layout, held;
    assert_true(landing_layout_init(&layout, &shape));
    assert_true(landing_layout_init(&held, &pulled));
    assert_int_equal(held.block_bytes, layout.block_bytes); // so that a block goes over as it is
    assert_int_equal(held.total_bytes, 4 * layout.block_bytes);
}

static void refuse(struct landing_shape shape)
{
    struct landing_layout layout, before;
    memset(&layout, 0x5a, sizeof(layout));
    before = layout;
    assert_false(landing_layout_init(&layout, &shape));
    assert_memory_equal(&layout, &before, sizeof(layout));
}

static void zero_and_excess_are_refused(void **state)
{
    (void)state;
    static const uint32_t too_many[] = {WIRE_ROWS_MAX + 1, WIRE_LAYERS_MAX + 1, WIRE_KV_HEADS_MAX + 1,
                                        WIRE_SLOTS_MAX + 1, WIRE_HEAD_DIM_MAX + 1};
    for (size_t i = 0; i < sizeof(too_many) / sizeof(too_many[0]); i++) {
        const uint32_t values[] = {0, too_many[i], UINT32_MAX};
        for (size_t j = 0; j < sizeof(values) / sizeof(values[0]); j++) {
            struct landing_shape shape = valid();
            uint32_t *fields[] = {&shape.rows, &shape.layers, &shape.kv_heads, &shape.slots, &shape.head_dim};
            *fields[i] = values[j];
            refuse(shape);
        }
    }
    struct landing_shape shape = valid();
    shape.dtype = 0;
    refuse(shape);
    shape.dtype = DTYPE_FP32 + 1;
    refuse(shape);
}

static void sizes_beyond_the_limit_are_refused(void **state)
{
    (void)state;
    // Every dimension at its limit: the product does not fit 64 bits.
    refuse((struct landing_shape){.rows = WIRE_ROWS_MAX,
                                  .layers = WIRE_LAYERS_MAX,
                                  .kv_heads = WIRE_KV_HEADS_MAX,
                                  .slots = WIRE_SLOTS_MAX,
                                  .head_dim = WIRE_HEAD_DIM_MAX,
                                  .dtype = DTYPE_FP32});
    // Data of exactly 2^46 bytes: the counts and positions are one part too many.
    struct landing_shape shape = {
        .rows = 4096, .layers = 1, .kv_heads = 1, .slots = 1u << 24, .head_dim = 256, .dtype = DTYPE_BF16};
    refuse(shape);
    shape.rows = 2048;
    struct landing_layout layout;
    assert_true(landing_layout_init(&layout, &shape));
    assert_int_equal(layout.positions_offset, UINT64_C(1) << 34);
    assert_true(layout.total_bytes <= WIRE_SHARED_BYTES_MAX);
}

static void each_dimension_may_reach_its_limit(void **state)
{
    (void)state;
    static const uint32_t most[] = {WIRE_ROWS_MAX, WIRE_LAYERS_MAX, WIRE_KV_HEADS_MAX, WIRE_SLOTS_MAX,
                                    WIRE_HEAD_DIM_MAX};
    for (size_t i = 0; i < sizeof(most) / sizeof(most[0]); i++) {
        struct landing_shape shape = {
            .rows = 1, .layers = 1, .kv_heads = 1, .slots = 1, .head_dim = 16, .dtype = DTYPE_FP32};
        uint32_t *fields[] = {&shape.rows, &shape.layers, &shape.kv_heads, &shape.slots, &shape.head_dim};
        *fields[i] = most[i];
        struct landing_layout layout;
        assert_true(landing_layout_init(&layout, &shape));
    }
}

static void staging_sides(void **state)
{
    (void)state;
    assert_int_equal(staging_side_bytes(32, 8, 1000, 256), UINT64_C(65536000));
    assert_int_equal(staging_side_bytes(WIRE_LAYERS_MAX, WIRE_KV_HEADS_MAX, WIRE_TOKENS_MAX, 1024),
                     UINT64_C(1) << (9 + 8 + 24 + 10));
}

static void dtypes(void **state)
{
    (void)state;
    assert_false(dtype_is_valid(0));
    assert_false(dtype_is_valid(4));
    assert_int_equal(dtype_bytes(DTYPE_BF16), 2);
    assert_int_equal(dtype_bytes(DTYPE_FP16), 2);
    assert_int_equal(dtype_bytes(DTYPE_FP32), 4);
    assert_string_equal(dtype_name(DTYPE_FP16), "fp16");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(sizes_are_pinned),
        cmocka_unit_test(blocks_start_on_512_bytes),
        cmocka_unit_test(parts_never_overlap),
        cmocka_unit_test(a_staging_holds_one_layer_of_each_row),
        cmocka_unit_test(zero_and_excess_are_refused),
        cmocka_unit_test(sizes_beyond_the_limit_are_refused),
        cmocka_unit_test(each_dimension_may_reach_its_limit),
        cmocka_unit_test(staging_sides),
        cmocka_unit_test(dtypes),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
