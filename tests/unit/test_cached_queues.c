// What threads hand to each other: tasks by class, and completions for the reactor.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "cached/completion.h"
#include "cached/task_queue.h"

#include <poll.h>
#include <stdatomic.h>
#include <string.h>
#include <time.h>

#define PRODUCERS 4u
#define EACH      2000u
#define SECOND_NS 1000000000ull

static uint64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * SECOND_NS + (uint64_t)now.tv_nsec;
}

static void test_classes(void **state)
{
    (void)state;
    struct task_queue queue;
    struct task tasks[9] = {0};
    bool stopped;
    task_queue_init(&queue);
    for (int i = 0; i < 9; i++)
        task_queue_push(&queue, (enum task_class)(2 - i % 3), &tasks[i]);
    for (int class = 0; class < 3; class ++)
        for (int i = 0; i < 3; i++)
            assert_ptr_equal(task_queue_pop(&queue, 0, &stopped), &tasks[2 - class + 3 * i]);
    assert_null(task_queue_pop(&queue, 0, &stopped));
    assert_false(stopped);
    uint64_t from = now_ns();
    assert_null(task_queue_pop(&queue, 20000000, &stopped));
    assert_true(now_ns() - from >= 19000000);
    task_queue_push(&queue, TASK_ADMIN, &tasks[0]);
    task_queue_stop(&queue);
    assert_ptr_equal(task_queue_pop(&queue, 10 * SECOND_NS, &stopped), &tasks[0]); // what is queued still comes
    assert_false(stopped);
    assert_null(task_queue_pop(&queue, 10 * SECOND_NS, &stopped));
    assert_true(stopped);
    task_queue_fini(&queue);
}

struct numbered {
    struct task task;
    struct completion completion;
    uint32_t producer, number;
};
static struct numbered items[PRODUCERS][EACH];
static struct task_queue shared_queue;
static struct completion_list shared_list;
static uint32_t done[PRODUCERS];

static void *push_all(void *argument)
{
    struct numbered *mine = argument;
    for (uint32_t i = 0; i < EACH; i++)
        task_queue_push(&shared_queue, TASK_BULK, &mine[i].task);
    return NULL;
}

static void *post_all(void *argument)
{
    struct numbered *mine = argument;
    for (uint32_t i = 0; i < EACH; i++)
        completion_post(&shared_list, &mine[i].completion);
    return NULL;
}

static void count_done(struct completion *completion, struct server *server)
{
    (void)server;
    struct numbered *item = (struct numbered *)((char *)completion - offsetof(struct numbered, completion));
    assert_int_equal(item->number, done[item->producer]);
    done[item->producer]++;
    memset(item, 0, sizeof *item); // it may be freed here
}

static void number_items(void)
{
    memset(done, 0, sizeof done);
    for (uint32_t p = 0; p < PRODUCERS; p++)
        for (uint32_t i = 0; i < EACH; i++)
            items[p][i] = (struct numbered){.completion = {.done = count_done}, .producer = p, .number = i};
}

static void start(pthread_t *threads, void *(*run)(void *))
{
    for (uint32_t p = 0; p < PRODUCERS; p++)
        assert_int_equal(pthread_create(&threads[p], NULL, run, items[p]), 0);
}

// None lost, none twice, each producer's in order; a sleeping popper is woken long before its time.
static void test_queue_threads(void **state)
{
    (void)state;
    pthread_t threads[PRODUCERS];
    task_queue_init(&shared_queue);
    number_items();
    start(threads, push_all);
    for (uint32_t n = 0; n < PRODUCERS * EACH; n++) {
        bool stopped;
        uint64_t from = now_ns();
        struct numbered *item;
        do
            item = (struct numbered *)task_queue_pop(&shared_queue, 60 * SECOND_NS, &stopped);
        while (!item && now_ns() - from < 30 * SECOND_NS);
        assert_non_null(item);
        assert_int_equal(item->number, done[item->producer]);
        done[item->producer]++;
    }
    for (uint32_t p = 0; p < PRODUCERS; p++)
        pthread_join(threads[p], NULL);
    task_queue_fini(&shared_queue);
}

static void test_completions(void **state)
{
    (void)state;
    pthread_t threads[PRODUCERS];
    assert_int_equal(completion_list_init(&shared_list), 0);
    assert_int_equal(completion_run(&shared_list, NULL), 0);
    number_items();
    start(threads, post_all);
    for (unsigned n = 0; n < PRODUCERS * EACH;) {
        struct pollfd ready = {.fd = shared_list.event_fd, .events = POLLIN};
        assert_int_equal(poll(&ready, 1, 30000), 1); // no wake-up is lost
        n += completion_run(&shared_list, NULL);
    }
    for (uint32_t p = 0; p < PRODUCERS; p++) {
        pthread_join(threads[p], NULL);
        assert_int_equal(done[p], EACH);
    }
    completion_list_fini(&shared_list);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_classes), cmocka_unit_test(test_queue_threads),
                                       cmocka_unit_test(test_completions)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
