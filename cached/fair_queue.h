// Order among those that wait for one thread: by class, decode before bulk before admin, and within a class by flow, in
// turn. A flow is one session's work, so that who has much waiting delays the others by one piece of his at a time.
//
// A class is not starved for ever: where it has waited while FAIR_BULK_AFTER pieces of better classes (FAIR_ADMIN_AFTER
// for admin) have been taken, one of its own is next. Nodes are embedded in what waits, so pushing never fails. No
// thread, no lock, no clock: the owner has those.
#ifndef ICECACHE_CACHED_FAIR_QUEUE_H
#define ICECACHE_CACHED_FAIR_QUEUE_H

#include <stdbool.h>
#include <stdint.h>

enum fair_class { FAIR_DECODE, FAIR_BULK, FAIR_ADMIN, FAIR_CLASSES };

// Sessions beyond it share flows, each with those whose number differs by a multiple of it.
#define FAIR_FLOWS       64u
#define FAIR_BULK_AFTER  32u
#define FAIR_ADMIN_AFTER 128u

struct fair_node {
    struct fair_node *next;
};

struct fair_list {
    struct fair_node *head, *tail;
};

// All zero: empty.
struct fair_queue {
    struct fair_list flows[FAIR_CLASSES][FAIR_FLOWS];
    uint64_t active[FAIR_CLASSES]; // bit f: flow f has something
    uint32_t turn[FAIR_CLASSES];   // the flow that is asked first
    uint32_t passed[FAIR_CLASSES]; // pieces of better classes taken since one of this class was, while it waits
};

void fair_queue_push(struct fair_queue *queue, enum fair_class class, uint32_t flow, struct fair_node *node);
// Before all of its flow: what goes on after a slice of its work, so that a flow finishes one piece before the next.
void fair_queue_push_front(struct fair_queue *queue, enum fair_class class, uint32_t flow, struct fair_node *node);
// The next one, and its class; NULL: nothing waits.
struct fair_node *fair_queue_pop(struct fair_queue *queue, enum fair_class *class);
// Takes one out, wherever it stands in its flow; it must be there.
void fair_queue_remove(struct fair_queue *queue, enum fair_class class, uint32_t flow, struct fair_node *node);
static inline bool fair_queue_is_empty(const struct fair_queue *queue)
{
    return !(queue->active[FAIR_DECODE] | queue->active[FAIR_BULK] | queue->active[FAIR_ADMIN]);
}

#endif
