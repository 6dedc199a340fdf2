// Appends and reads through a scripted daemon: how they are cut into parts, what lies where in the staging area, what
// is refused before any byte is touched, and who owns a half of the area after a time-out.
#include "client_setup.h"

#include <signal.h>

// 4 tokens of all layers fit half of it: 2 (K, V) x 2 layers x 2 heads x 32 bytes = 256 bytes a token.
enum { SMALL_STAGING = 2048, TOKEN_BYTES = 256, PART_TOKENS = 4 };

// K and V with strides that are packed in no dimension, filled with fake_byte.
struct kv {
    uint8_t *keys, *values;
    size_t bytes;
    struct ice_kv_source source;
    struct ice_kv_target target;
};

static struct kv kv_create(uint32_t layers, uint64_t n, size_t layer_stride, size_t token_stride, size_t head_stride)
{
    struct kv kv = {.bytes = (layers - 1) * layer_stride + (n - 1) * token_stride + (KV_HEADS - 1) * head_stride +
                             ROW_BYTES};
    kv.keys = calloc(1, kv.bytes);
    kv.values = calloc(1, kv.bytes);
    assert_true(kv.keys != NULL && kv.values != NULL);
    kv.source = (struct ice_kv_source){kv.keys, kv.values, kv.bytes, kv.bytes, layer_stride, token_stride, head_stride};
    kv.target = (struct ice_kv_target){kv.keys, kv.values, kv.bytes, kv.bytes, layer_stride, token_stride, head_stride};
    return kv;
}

static void kv_free(struct kv *kv)
{
    free(kv->keys);
    free(kv->values);
}

static void kv_fill(struct kv *kv, uint32_t first_layer, uint32_t layers, uint64_t first, uint64_t n)
{
    for (uint32_t layer = 0; layer < layers; layer++) {
        for (uint64_t token = 0; token < n; token++) {
            for (uint32_t head = 0; head < KV_HEADS; head++) {
                size_t at =
                    layer * kv->source.layer_stride + token * kv->source.token_stride + head * kv->source.head_stride;
                for (uint32_t b = 0; b < ROW_BYTES; b++) {
                    kv->keys[at + b] = fake_byte(first_layer + layer, head, first + token, b, false);
                    kv->values[at + b] = fake_byte(first_layer + layer, head, first + token, b, true);
                }
            }
        }
    }
}

// What the daemon saw in the staging area of one part.
static void check_part(const struct fake_append *append)
{
    const uint8_t *at = append->bytes;
    for (int value = 0; value < 2; value++) {
        for (uint32_t layer = 0; layer < append->layers; layer++) {
            for (uint32_t head = 0; head < KV_HEADS; head++) {
                for (uint32_t token = 0; token < append->tokens; token++) {
                    for (uint32_t b = 0; b < ROW_BYTES; b++) {
                        assert_int_equal(*at++,
                                         fake_byte(append->layer + layer, head, append->first + token, b, value != 0));
                    }
                }
            }
        }
    }
    assert_int_equal((size_t)(at - append->bytes), append->size);
}

static void append_is_split_and_packed(void **state)
{
    (void)state;
    struct setup setup = set_up(0, SMALL_STAGING);
    const uint64_t n = 10, first = 7;
    struct kv kv = kv_create(LAYERS, n, 2000, 110, 45);
    kv_fill(&kv, 0, LAYERS, first, n);
    uint64_t length = 0;
    assert_int_equal(ice_append(setup.sequence, ICE_ALL_LAYERS, first, n, &kv.source, 0, &length), ICE_OK);
    assert_int_equal(length, 17);
    assert_int_equal(FAKE_GET(setup.fake, append_count), 3);
    const uint32_t tokens[] = {4, 4, 2};
    uint64_t done = 0;
    for (int i = 0; i < 3; i++) {
        const struct fake_append *append = &setup.fake->appends[i];
        assert_int_equal(append->layer, 0);
        assert_int_equal(append->layers, LAYERS);
        assert_int_equal(append->tokens, tokens[i]);
        assert_int_equal(append->first, first + done);
        assert_int_equal(append->reserve, n - done);
        check_part(append);
        done += tokens[i];
    }
    // The second part was copied beside the first.
    assert_int_not_equal(setup.fake->appends[0].offset, setup.fake->appends[1].offset);
    kv_free(&kv);
    tear_down(&setup);
}

// One layer takes half the room; heads outermost with packed tokens takes the path of long copies.
static void append_of_one_layer_with_packed_tokens(void **state)
{
    (void)state;
    struct setup setup = set_up(0, SMALL_STAGING);
    const uint64_t n = 9;
    struct kv kv = kv_create(1, n, 0, ROW_BYTES, 9 * ROW_BYTES + 8);
    kv_fill(&kv, 1, 1, 0, n);
    uint64_t length = 0;
    assert_int_equal(ice_append(setup.sequence, 1, 0, n, &kv.source, 0, &length), ICE_OK);
    assert_int_equal(length, n);
    assert_int_equal(FAKE_GET(setup.fake, append_count), 2);
    assert_int_equal(setup.fake->appends[0].tokens, 2 * PART_TOKENS);
    assert_int_equal(setup.fake->appends[0].layer, 1);
    assert_int_equal(setup.fake->appends[0].layers, 1);
    check_part(&setup.fake->appends[0]);
    check_part(&setup.fake->appends[1]);
    kv_free(&kv);
    tear_down(&setup);
}

static void interrupted_append_tells_the_length(void **state)
{
    (void)state;
    struct setup setup = set_up(0, SMALL_STAGING);
    FAKE_SET(setup.fake, append_fail_at, 2);
    struct kv kv = kv_create(LAYERS, 12, 2000, 110, 45);
    uint64_t length = 99;
    assert_int_equal(ice_append(setup.sequence, ICE_ALL_LAYERS, 0, 12, &kv.source, 0, &length), ICE_POOL_FULL);
    assert_string_equal(ice_last_error(), "no frame is left");
    assert_int_equal(length, 4);
    assert_int_equal(FAKE_GET(setup.fake, append_count), 2);
    // A refusal by the library tells the length last heard.
    length = 99;
    assert_int_equal(ice_append(setup.sequence, ICE_ALL_LAYERS, 4, 0, &kv.source, 0, &length), ICE_INVALID_ARGUMENT);
    assert_int_equal(length, 4);
    FAKE_SET(setup.fake, append_fail_at, 0);
    assert_int_equal(ice_append(setup.sequence, ICE_ALL_LAYERS, 4, 8, &kv.source, 0, &length), ICE_OK);
    assert_int_equal(length, 12);
    length = 99;
    kv.source.keys_bytes--;
    assert_int_equal(ice_append(setup.sequence, ICE_ALL_LAYERS, 12, 12, &kv.source, 0, &length), ICE_OUT_OF_BOUNDS);
    assert_int_equal(length, 12);
    kv_free(&kv);
    tear_down(&setup);
}

static void read_returns_every_row(void **state)
{
    (void)state;
    struct setup setup = set_up(0, SMALL_STAGING);
    const uint64_t n = 11, first = 5;
    struct kv got = kv_create(LAYERS, n, 2000, 110, 45), wanted = kv_create(LAYERS, n, 2000, 110, 45);
    kv_fill(&wanted, 0, LAYERS, first, n);
    assert_int_equal(ice_read(setup.sequence, ICE_ALL_LAYERS, first, n, &got.target, 0), ICE_OK);
    assert_memory_equal(got.keys, wanted.keys, got.bytes); // also: nothing written between the rows
    assert_memory_equal(got.values, wanted.values, got.bytes);
    got.target.token_stride = ROW_BYTES - 1;
    assert_int_equal(ice_read(setup.sequence, ICE_ALL_LAYERS, first, n, &got.target, 0), ICE_INVALID_ARGUMENT);
    got.target.token_stride = 110;
    got.target.values_bytes--;
    assert_int_equal(ice_read(setup.sequence, ICE_ALL_LAYERS, first, n, &got.target, 0), ICE_OUT_OF_BOUNDS);
    assert_non_null(strstr(ice_last_error(), "values"));
    kv_free(&got);
    kv_free(&wanted);
    tear_down(&setup);
}

static void bounds_are_checked_first(void **state)
{
    (void)state;
    struct setup setup = set_up(0, SMALL_STAGING);
    struct kv kv = kv_create(LAYERS, 5, 700, 110, 45);
    struct ice_kv_source source = kv.source;
    assert_int_equal(ice_append(setup.sequence, ICE_ALL_LAYERS, 0, 5, &source, 0, NULL), ICE_OK);
    size_t sent = FAKE_GET(setup.fake, append_count);

    source.keys_bytes--;
    assert_int_equal(ice_append(setup.sequence, ICE_ALL_LAYERS, 5, 5, &source, 0, NULL), ICE_OUT_OF_BOUNDS);
    assert_non_null(strstr(ice_last_error(), "of keys"));
    source.keys_bytes++;
    source.values_bytes--;
    assert_int_equal(ice_append(setup.sequence, ICE_ALL_LAYERS, 5, 5, &source, 0, NULL), ICE_OUT_OF_BOUNDS);
    source.values_bytes++;
    // Products and sums that wrap.
    const size_t strides[] = {SIZE_MAX, SIZE_MAX / 2, SIZE_MAX / 4 + 1, SIZE_MAX - 31};
    for (size_t i = 0; i < sizeof strides / sizeof strides[0]; i++) {
        for (int which = 0; which < 3; which++) {
            struct ice_kv_source wild = source;
            *(which == 0 ? &wild.layer_stride : which == 1 ? &wild.token_stride : &wild.head_stride) = strides[i];
            assert_int_equal(ice_append(setup.sequence, ICE_ALL_LAYERS, 5, 5, &wild, 0, NULL), ICE_OUT_OF_BOUNDS);
        }
    }
    assert_int_equal(ice_append(setup.sequence, LAYERS, 5, 1, &source, 0, NULL), ICE_UNKNOWN_LAYER);
    assert_int_equal(ice_append(setup.sequence, 0, WIRE_TOKENS_MAX, 1, &source, 0, NULL), ICE_TOO_LARGE);
    assert_int_equal(ice_append(setup.sequence, 0, UINT64_MAX, UINT64_MAX, &source, 0, NULL), ICE_TOO_LARGE);
    assert_int_equal(ice_append(setup.sequence, 0, 5, 1, NULL, 0, NULL), ICE_INVALID_ARGUMENT);
    assert_int_equal(ice_append(NULL, 0, 5, 1, &source, 0, NULL), ICE_INVALID_ARGUMENT);
    source.values = NULL;
    assert_int_equal(ice_append(setup.sequence, 0, 5, 1, &source, 0, NULL), ICE_INVALID_ARGUMENT);
    assert_int_equal(ice_read(setup.sequence, 0, 0, 1, NULL, 0), ICE_INVALID_ARGUMENT);
    assert_int_equal(FAKE_GET(setup.fake, append_count), sent); // nothing of it was sent
    kv_free(&kv);
    tear_down(&setup);
}

static void staging_refusals(void **state)
{
    (void)state;
    struct setup setup = set_up(0, 2 * TOKEN_BYTES - 128); // half of it holds no token of all layers, but one of one
    struct kv kv = kv_create(LAYERS, 1, 700, 110, 45);
    FAKE_SET(setup.fake, refuse_staging, true);
    assert_int_equal(ice_append(setup.sequence, 0, 0, 1, &kv.source, 0, NULL), ICE_SHARED_FULL);
    assert_non_null(strstr(ice_last_error(), "no shared memory is left"));
    FAKE_SET(setup.fake, refuse_staging, false);
    FAKE_SET(setup.fake, unsealed_staging, true);
    assert_int_equal(ice_append(setup.sequence, 0, 0, 1, &kv.source, 0, NULL), ICE_INTERNAL);
    assert_non_null(strstr(ice_last_error(), "sealed"));
    FAKE_SET(setup.fake, unsealed_staging, false);
    assert_int_equal(ice_append(setup.sequence, 0, 0, 1, &kv.source, 0, NULL), ICE_OK); // and now there is one
    assert_int_equal(ice_append(setup.sequence, ICE_ALL_LAYERS, 0, 1, &kv.source, 0, NULL), ICE_TOO_LARGE);
    assert_non_null(strstr(ice_last_error(), "staging_bytes"));
    kv_free(&kv);
    tear_down(&setup);
}

static void time_out_keeps_the_half(void **state)
{
    (void)state;
    struct setup setup = set_up(0, SMALL_STAGING);
    struct kv kv = kv_create(LAYERS, 1, 700, 110, 45);
    FAKE_SET(setup.fake, hold, 1u << ICECACHE__WIRE__REQUEST__BODY_APPEND);
    assert_int_equal(ice_append(setup.sequence, ICE_ALL_LAYERS, 0, 1, &kv.source, 20000, NULL), ICE_TIMEOUT);
    assert_int_equal(ice_append(setup.sequence, ICE_ALL_LAYERS, 0, 1, &kv.source, 20000, NULL), ICE_TIMEOUT);
    fake_wait_held(setup.fake, 2);
    assert_int_not_equal(setup.fake->appends[0].offset, setup.fake->appends[1].offset);
    // Both halves are the daemon's now: nothing more is sent.
    assert_int_equal(ice_append(setup.sequence, ICE_ALL_LAYERS, 0, 1, &kv.source, 20000, NULL), ICE_TIMEOUT);
    assert_int_equal(FAKE_GET(setup.fake, append_count), 2);
    // The late reply gives one back.
    FAKE_SET(setup.fake, hold, 0);
    fake_do(setup.fake, FAKE_ANSWER, 1);
    assert_int_equal(ice_append(setup.sequence, ICE_ALL_LAYERS, 0, 1, &kv.source, 0, NULL), ICE_OK);
    assert_int_equal(FAKE_GET(setup.fake, appends[2].offset), FAKE_GET(setup.fake, appends[1].offset));
    // The other one is still out when the session ends.
    assert_int_equal(ice_client_reconnect(setup.client), ICE_OK);
    ice_sequence_close(setup.sequence);
    ice_landing_close(setup.landing);
    open_handles(&setup);
    assert_int_equal(ice_append(setup.sequence, ICE_ALL_LAYERS, 0, 1, &kv.source, 0, NULL), ICE_OK);
    kv_free(&kv);
    tear_down(&setup);
}

enum { THREADS = 4 };
struct appender {
    struct setup *setup;
    ice_status status;
    pthread_t thread;
};

static void *append_and_read(void *argument)
{
    struct appender *appender = argument;
    struct kv kv = kv_create(LAYERS, 30, 4000, 110, 45), wanted = kv_create(LAYERS, 30, 4000, 110, 45);
    kv_fill(&wanted, 0, LAYERS, 0, 30);
    for (int i = 0; i < 10 && appender->status == ICE_OK; i++) {
        appender->status = ice_append(appender->setup->sequence, ICE_ALL_LAYERS, 0, 12, &wanted.source, 0, NULL);
        if (appender->status == ICE_OK) {
            appender->status = ice_read(appender->setup->sequence, ICE_ALL_LAYERS, 0, 30, &kv.target, 0);
        }
        if (appender->status == ICE_OK && memcmp(kv.keys, wanted.keys, kv.bytes) != 0) {
            appender->status = ICE_INTERNAL;
        }
    }
    kv_free(&kv);
    kv_free(&wanted);
    return NULL;
}

static void threads_share_the_staging(void **state)
{
    (void)state;
    struct setup setup = set_up(60000000, SMALL_STAGING);
    uint64_t begun_us = now_us();
    struct appender appenders[THREADS];
    for (int i = 0; i < THREADS; i++) {
        appenders[i] = (struct appender){.setup = &setup};
        assert_int_equal(pthread_create(&appenders[i].thread, NULL, append_and_read, &appenders[i]), 0);
    }
    for (int i = 0; i < THREADS; i++) {
        assert_int_equal(pthread_join(appenders[i].thread, NULL), 0);
        assert_int_equal(appenders[i].status, ICE_OK);
    }
    assert_true(now_us() - begun_us < 30000000); // nobody slept until the deadline
    assert_int_equal(FAKE_GET(setup.fake, append_count), THREADS * 10 * 3);
    for (size_t i = 0; i < THREADS * 10 * 3; i++) {
        check_part(&setup.fake->appends[i]);
    }
    tear_down(&setup);
}

static void *append_once(void *argument)
{
    struct appender *appender = argument;
    struct kv kv = kv_create(LAYERS, 1, 700, 110, 45);
    appender->status = ice_append(appender->setup->sequence, ICE_ALL_LAYERS, 0, 1, &kv.source, 0, NULL);
    kv_free(&kv);
    return NULL;
}

// A half is given back by a thread, not by a message: who polls the sockets for it has to be woken.
static void freed_half_wakes_who_polls(void **state)
{
    (void)state;
    struct setup setup = set_up(60000000, SMALL_STAGING);
    uint64_t begun_us = now_us();
    for (size_t round = 0; round < 20; round++) {
        FAKE_SET(setup.fake, hold, 1u << ICECACHE__WIRE__REQUEST__BODY_APPEND);
        struct appender appenders[3];
        for (int i = 0; i < 3; i++) { // two take the halves, the third waits for one
            appenders[i] = (struct appender){.setup = &setup};
            assert_int_equal(pthread_create(&appenders[i].thread, NULL, append_once, &appenders[i]), 0);
        }
        for (size_t i = 0; i < 3; i++) {
            fake_wait_held(setup.fake, 3 * round + (i < 2 ? 2 : 3));
            fake_do(setup.fake, FAKE_ANSWER, 3 * round + i);
        }
        for (int i = 0; i < 3; i++) {
            assert_int_equal(pthread_join(appenders[i].thread, NULL), 0);
            assert_int_equal(appenders[i].status, ICE_OK);
        }
    }
    assert_true(now_us() - begun_us < 30000000);
    tear_down(&setup);
}

static void info_reports_shortest_and_longest(void **state)
{
    (void)state;
    struct setup setup = set_up(0, 0);
    struct ice_sequence_info info;
    assert_int_equal(ice_sequence_info(setup.sequence, 0, &info), ICE_OK);
    assert_int_equal(info.length, 9);
    assert_int_equal(info.length_min, 4);
    assert_int_equal(info.indexed_min, 2);
    assert_int_equal(info.pages, 6);
    assert_true(info.idle);
    tear_down(&setup);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(append_is_split_and_packed),
        cmocka_unit_test(append_of_one_layer_with_packed_tokens),
        cmocka_unit_test(interrupted_append_tells_the_length),
        cmocka_unit_test(read_returns_every_row),
        cmocka_unit_test(bounds_are_checked_first),
        cmocka_unit_test(staging_refusals),
        cmocka_unit_test(time_out_keeps_the_half),
        cmocka_unit_test(threads_share_the_staging),
        cmocka_unit_test(freed_half_wakes_who_polls),
        cmocka_unit_test(info_reports_shortest_and_longest),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
