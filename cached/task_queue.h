// Work for one thread, in the order of a fair queue: by class, and within a class by session in turn. Any thread
// pushes, the owner pops. Tasks are embedded in what they belong to, so pushing never fails.
#ifndef ICECACHE_CACHED_TASK_QUEUE_H
#define ICECACHE_CACHED_TASK_QUEUE_H

#include "cached/fair_queue.h"

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

enum task_class { TASK_DECODE = FAIR_DECODE, TASK_BULK = FAIR_BULK, TASK_ADMIN = FAIR_ADMIN };

struct task {
    struct fair_node node;                        // first
    uint32_t flow;                                // whose it is: a session's slot, 0: the daemon's own
    void (*run)(struct task *task, void *thread); // thread: what the owner passes to itself, for example its shard
};

struct task_queue {
    pthread_mutex_t lock;
    pthread_cond_t ready;
    struct fair_queue waiting; // guarded by lock
    bool stopping;
};

void task_queue_init(struct task_queue *queue);
void task_queue_fini(struct task_queue *queue);
void task_queue_push(struct task_queue *queue, enum task_class class, struct task *task);
// The same for tasks that are linked by their nodes from first to last, in their order.
void task_queue_push_chain(struct task_queue *queue, enum task_class class, struct task *first, struct task *last);
// The owner: a task that has done a slice of its work goes on when the other sessions have had their turn.
void task_queue_push_front(struct task_queue *queue, enum task_class class, struct task *task);
bool task_queue_is_empty(struct task_queue *queue);
bool task_queue_has(struct task_queue *queue, enum task_class class);
// The next task, or NULL: at once where wait_ns is 0, after at most wait_ns, or when stopping and empty (*stopped set).
struct task *task_queue_pop(struct task_queue *queue, uint64_t wait_ns, bool *stopped);
// What is queued is still popped; then pop reports the stop.
void task_queue_stop(struct task_queue *queue);

#endif
