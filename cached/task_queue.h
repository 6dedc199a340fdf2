// Work for one thread, by class: decode before bulk before admin. Any thread pushes, the owner pops. Tasks are embedded
// in what they belong to, so pushing never fails.
#ifndef ICECACHE_CACHED_TASK_QUEUE_H
#define ICECACHE_CACHED_TASK_QUEUE_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

enum task_class { TASK_DECODE, TASK_BULK, TASK_ADMIN, TASK_CLASSES };

struct task {
    struct task *next;
    void (*run)(struct task *task, void *thread); // thread: what the owner passes to itself, for example its shard
};

struct task_queue {
    pthread_mutex_t lock;
    pthread_cond_t ready;
    struct task *head[TASK_CLASSES], *tail[TASK_CLASSES]; // guarded by lock
    bool stopping;
};

void task_queue_init(struct task_queue *queue);
void task_queue_fini(struct task_queue *queue);
void task_queue_push(struct task_queue *queue, enum task_class class, struct task *task);
// The same for tasks that are linked from first to last, in their order.
void task_queue_push_chain(struct task_queue *queue, enum task_class class, struct task *first, struct task *last);
// The next task, or NULL: at once where wait_ns is 0, after at most wait_ns, or when stopping and empty (*stopped set).
struct task *task_queue_pop(struct task_queue *queue, uint64_t wait_ns, bool *stopped);
// What is queued is still popped; then pop reports the stop.
void task_queue_stop(struct task_queue *queue);

#endif
