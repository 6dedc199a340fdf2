// Task queue: a mutex, a condition on the monotonic clock, a fair queue. Owned by one popping thread.
#include "cached/task_queue.h"

#include <time.h>

void task_queue_init(struct task_queue *queue)
{
    *queue = (struct task_queue){0};
    pthread_condattr_t attributes;
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_mutex_init(&queue->lock, NULL);
    pthread_cond_init(&queue->ready, &attributes);
    pthread_condattr_destroy(&attributes);
}

void task_queue_fini(struct task_queue *queue)
{
    pthread_cond_destroy(&queue->ready);
    pthread_mutex_destroy(&queue->lock);
}

void task_queue_push(struct task_queue *queue, enum task_class class, struct task *task)
{
    task_queue_push_chain(queue, class, task, task);
}

void task_queue_push_chain(struct task_queue *queue, enum task_class class, struct task *first, struct task *last)
{
    pthread_mutex_lock(&queue->lock);
    for (struct task *task = first, *next; task; task = next) {
        next = task == last ? NULL : (struct task *)task->node.next; // the node is the task's first member
        fair_queue_push(&queue->waiting, (enum fair_class) class, task->flow, &task->node);
    }
    pthread_mutex_unlock(&queue->lock);
    pthread_cond_signal(&queue->ready); // behind the lock, so that whoever wakes does not find it taken
}

void task_queue_push_front(struct task_queue *queue, enum task_class class, struct task *task)
{
    pthread_mutex_lock(&queue->lock);
    fair_queue_push_front(&queue->waiting, (enum fair_class) class, task->flow, &task->node);
    pthread_mutex_unlock(&queue->lock);
}

bool task_queue_is_empty(struct task_queue *queue)
{
    pthread_mutex_lock(&queue->lock);
    const bool is_empty = fair_queue_is_empty(&queue->waiting);
    pthread_mutex_unlock(&queue->lock);
    return is_empty;
}

bool task_queue_has(struct task_queue *queue, enum task_class class)
{
    pthread_mutex_lock(&queue->lock);
    const bool has = queue->waiting.active[class] != 0;
    pthread_mutex_unlock(&queue->lock);
    return has;
}

static struct task *take(struct task_queue *queue)
{
    enum fair_class class;
    return (struct task *)fair_queue_pop(&queue->waiting, &class); // the node is the task's first member
}

struct task *task_queue_pop(struct task_queue *queue, uint64_t wait_ns, bool *stopped)
{
    pthread_mutex_lock(&queue->lock);
    struct task *task = take(queue);
    if (!task && !queue->stopping && wait_ns > 0) {
        struct timespec until;
        clock_gettime(CLOCK_MONOTONIC, &until);
        uint64_t ns = (uint64_t)until.tv_nsec + wait_ns;
        until.tv_sec += (time_t)(ns / 1000000000u);
        until.tv_nsec = (long)(ns % 1000000000u);
        pthread_cond_timedwait(&queue->ready, &queue->lock, &until); // an early wake-up only means an early look
        task = take(queue);
    }
    *stopped = !task && queue->stopping;
    pthread_mutex_unlock(&queue->lock);
    return task;
}

void task_queue_stop(struct task_queue *queue)
{
    pthread_mutex_lock(&queue->lock);
    queue->stopping = true;
    pthread_cond_signal(&queue->ready);
    pthread_mutex_unlock(&queue->lock);
}
