// The order of a fair queue: classes, turns of flows, nobody starved, and against a plain model.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "cached/fair_queue.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

struct piece {
    struct fair_node node; // first
    enum fair_class class;
    uint32_t flow, number;
    bool waits;
};

static struct piece *pop(struct fair_queue *queue)
{
    enum fair_class class = FAIR_CLASSES;
    struct piece *piece = (struct piece *)fair_queue_pop(queue, &class);
    if (piece)
        assert_int_equal(class, piece->class);
    return piece;
}

static void push(struct fair_queue *queue, struct piece *piece, enum fair_class class, uint32_t flow)
{
    *piece = (struct piece){.class = class, .flow = flow};
    fair_queue_push(queue, class, flow, &piece->node);
}

static void test_classes(void **state)
{
    (void)state;
    struct fair_queue queue = {0};
    struct piece pieces[3];
    assert_true(fair_queue_is_empty(&queue));
    assert_null(pop(&queue));
    push(&queue, &pieces[0], FAIR_ADMIN, 1);
    push(&queue, &pieces[1], FAIR_BULK, 1);
    push(&queue, &pieces[2], FAIR_DECODE, 1);
    assert_false(fair_queue_is_empty(&queue));
    for (uint32_t i = 3; i-- > 0;)
        assert_ptr_equal(pop(&queue), &pieces[i]);
    assert_true(fair_queue_is_empty(&queue));
}

// One flow has a thousand pieces before the others come with one each: they wait for one of its pieces at most.
static void test_turns(void **state)
{
    (void)state;
    struct fair_queue queue = {0};
    static struct piece flood[1000], others[FAIR_FLOWS];
    for (uint32_t i = 0; i < 1000; i++)
        push(&queue, &flood[i], FAIR_DECODE, 7);
    assert_ptr_equal(pop(&queue), &flood[0]);
    for (uint32_t i = 0; i < FAIR_FLOWS; i++) {
        if (i != 7)
            push(&queue, &others[i], FAIR_DECODE, i);
    }
    uint32_t of_flood = 0;
    for (uint32_t i = 0; i < FAIR_FLOWS; i++)
        of_flood += pop(&queue)->flow == 7;
    assert_int_equal(of_flood, 1); // of a whole turn
    for (uint32_t i = 2; i < 1000; i++)
        assert_ptr_equal(pop(&queue), &flood[i]); // in order
    assert_null(pop(&queue));
}

// Two flows that are never empty get the same, however much one has.
static void test_shares(void **state)
{
    (void)state;
    struct fair_queue queue = {0};
    static struct piece pieces[64];
    uint32_t served[2] = {0};
    for (uint32_t i = 0; i < 64; i++)
        push(&queue, &pieces[i], FAIR_DECODE, i < 62 ? 3 : 5);
    for (uint32_t i = 0; i < 1000; i++) {
        struct piece *piece = pop(&queue);
        served[piece->flow == 5]++;
        fair_queue_push(&queue, piece->class, piece->flow, &piece->node);
    }
    assert_int_equal(served[0], 500);
    assert_int_equal(served[1], 500);
}

// Better classes never end: the others are served all the same, at the rate that is stated.
static void test_nobody_starves(void **state)
{
    (void)state;
    struct fair_queue queue = {0};
    struct piece pieces[FAIR_CLASSES];
    uint32_t served[FAIR_CLASSES] = {0}, gap = 0, longest = 0;
    for (uint32_t class = 0; class < FAIR_CLASSES; class ++)
        push(&queue, &pieces[class], (enum fair_class) class, class);
    for (uint32_t i = 0; i < 100000; i++) {
        struct piece *piece = pop(&queue);
        served[piece->class]++;
        gap = piece->class == FAIR_BULK ? 0 : gap + 1;
        longest = gap > longest ? gap : longest;
        fair_queue_push(&queue, piece->class, piece->flow, &piece->node);
    }
    assert_true(longest <= FAIR_BULK_AFTER + 1); // an admin piece may come between
    assert_in_range(served[FAIR_BULK], 100000 / (FAIR_BULK_AFTER + 2), 100000 / FAIR_BULK_AFTER);
    assert_in_range(served[FAIR_ADMIN], 100000 / (FAIR_ADMIN_AFTER + 2), 100000 / FAIR_ADMIN_AFTER);
}

// A piece that goes on is before its flow's others, and behind the other flows' turn.
static void test_going_on(void **state)
{
    (void)state;
    struct fair_queue queue = {0};
    struct piece long_one, next, other;
    push(&queue, &long_one, FAIR_DECODE, 2);
    push(&queue, &next, FAIR_DECODE, 2);
    push(&queue, &other, FAIR_DECODE, 9);
    assert_ptr_equal(pop(&queue), &long_one);
    fair_queue_push_front(&queue, FAIR_DECODE, 2, &long_one.node);
    assert_ptr_equal(pop(&queue), &other);
    assert_ptr_equal(pop(&queue), &long_one);
    fair_queue_push_front(&queue, FAIR_DECODE, 2, &long_one.node);
    assert_ptr_equal(pop(&queue), &long_one);
    assert_ptr_equal(pop(&queue), &next);
    fair_queue_push_front(&queue, FAIR_DECODE, 2, &long_one.node); // into an empty one
    push(&queue, &next, FAIR_DECODE, 2);
    assert_ptr_equal(pop(&queue), &long_one);
    assert_ptr_equal(pop(&queue), &next);
    assert_null(pop(&queue));
}

// A class that was empty has no claim from before.
static void test_no_claims(void **state)
{
    (void)state;
    struct fair_queue queue = {0};
    struct piece decode[200], bulk;
    for (uint32_t i = 0; i < 200; i++)
        push(&queue, &decode[i], FAIR_DECODE, 0);
    for (uint32_t i = 0; i < 100; i++)
        assert_non_null(pop(&queue));
    push(&queue, &bulk, FAIR_BULK, 0);
    for (uint32_t i = 0; i < FAIR_BULK_AFTER; i++)
        assert_int_equal(pop(&queue)->class, FAIR_DECODE);
    assert_ptr_equal(pop(&queue), &bulk);
}

static uint64_t random_next(uint64_t *state)
{
    uint64_t z = *state += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

static uint64_t seed_of_test(void)
{
    const char *text = getenv("ICECACHE_TEST_SEED");
    const uint64_t seed = text ? strtoull(text, NULL, 0) : (uint64_t)time(NULL);
    printf("seed %llu\n", (unsigned long long)seed);
    return seed;
}

// Random pushes, pops and removals: none lost, none twice, each flow of a class in order.
static void test_model(void **state)
{
    (void)state;
    static struct piece pieces[512];
    static uint32_t last[FAIR_CLASSES][FAIR_FLOWS];
    struct fair_queue queue = {0};
    uint64_t random = seed_of_test();
    uint32_t number = 0, waiting = 0;
    memset(pieces, 0, sizeof pieces);
    memset(last, 0, sizeof last);
    for (uint32_t round = 0; round < 200000; round++) {
        struct piece *piece = &pieces[random_next(&random) % 512];
        const uint64_t what = random_next(&random) % 8;
        if (what < 4 && !piece->waits) {
            push(&queue, piece, (enum fair_class)(random_next(&random) % FAIR_CLASSES),
                 (uint32_t)(random_next(&random) % 100)); // beyond FAIR_FLOWS they are shared
            piece->number = ++number;
            piece->waits = true;
            waiting++;
        } else if (what == 4 && piece->waits) {
            fair_queue_remove(&queue, piece->class, piece->flow, &piece->node);
            piece->waits = false;
            waiting--;
        } else if (what > 4) {
            piece = pop(&queue);
            assert_int_equal(piece != NULL, waiting > 0);
            if (!piece)
                continue;
            assert_true(piece->waits && piece->number > last[piece->class][piece->flow % FAIR_FLOWS]);
            last[piece->class][piece->flow % FAIR_FLOWS] = piece->number;
            piece->waits = false;
            waiting--;
        }
    }
    for (struct piece *piece; (piece = pop(&queue)) != NULL; waiting--)
        assert_true(piece->waits);
    assert_int_equal(waiting, 0);
    assert_true(fair_queue_is_empty(&queue));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_classes),        cmocka_unit_test(test_turns),     cmocka_unit_test(test_shares),
        cmocka_unit_test(test_nobody_starves), cmocka_unit_test(test_no_claims), cmocka_unit_test(test_model),
        cmocka_unit_test(test_going_on),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
