// The fair queue: a list for each flow of each class, and a bit for each list that holds something, so that the next
// flow in turn is found without a walk.
#include "cached/fair_queue.h"

#include <assert.h>
#include <stddef.h>

static const uint32_t patience[FAIR_CLASSES] = {
    [FAIR_DECODE] = UINT32_MAX,
    [FAIR_BULK] = FAIR_BULK_AFTER,
    [FAIR_ADMIN] = FAIR_ADMIN_AFTER,
};

void fair_queue_push(struct fair_queue *queue, enum fair_class class, uint32_t flow, struct fair_node *node)
{
    flow %= FAIR_FLOWS;
    struct fair_list *list = &queue->flows[class][flow];
    node->next = NULL;
    if (list->tail)
        list->tail->next = node;
    else
        list->head = node;
    list->tail = node;
    queue->active[class] |= (uint64_t)1 << flow;
}

void fair_queue_push_front(struct fair_queue *queue, enum fair_class class, uint32_t flow, struct fair_node *node)
{
    flow %= FAIR_FLOWS;
    struct fair_list *list = &queue->flows[class][flow];
    node->next = list->head;
    list->head = node;
    if (!list->tail)
        list->tail = node;
    queue->active[class] |= (uint64_t)1 << flow;
}

// The class whose turn it is: the one that has waited too long, else the best one that has something.
static enum fair_class class_in_turn(const struct fair_queue *queue)
{
    enum fair_class best = FAIR_CLASSES;
    for (int class = FAIR_CLASSES - 1; class >= 0; class --) {
        if (!queue->active[class])
            continue;
        if (queue->passed[class] >= patience[class])
            return (enum fair_class) class;
        best = (enum fair_class) class;
    }
    return best;
}

// The first active flow from the class's turn on, around.
static uint32_t flow_in_turn(const struct fair_queue *queue, enum fair_class class)
{
    const uint64_t active = queue->active[class], behind = active & (~(uint64_t)0 << queue->turn[class]);
    return (uint32_t)__builtin_ctzll(behind ? behind : active);
}

static void note_taken(struct fair_queue *queue, enum fair_class taken)
{
    queue->passed[taken] = 0;
    for (uint32_t class = (uint32_t)taken + 1; class < FAIR_CLASSES; class ++)
        queue->passed[class] = queue->active[class] ? queue->passed[class] + 1 : 0;
}

static void list_emptied(struct fair_queue *queue, enum fair_class class, uint32_t flow)
{
    queue->flows[class][flow].tail = NULL;
    queue->active[class] &= ~((uint64_t)1 << flow);
}

struct fair_node *fair_queue_pop(struct fair_queue *queue, enum fair_class *class)
{
    if (fair_queue_is_empty(queue))
        return NULL;
    *class = class_in_turn(queue);
    const uint32_t flow = flow_in_turn(queue, *class);
    struct fair_list *list = &queue->flows[*class][flow];
    struct fair_node *node = list->head;
    list->head = node->next;
    if (!list->head)
        list_emptied(queue, *class, flow);
    queue->turn[*class] = (flow + 1) % FAIR_FLOWS;
    note_taken(queue, *class);
    return node;
}

void fair_queue_remove(struct fair_queue *queue, enum fair_class class, uint32_t flow, struct fair_node *node)
{
    flow %= FAIR_FLOWS;
    struct fair_list *list = &queue->flows[class][flow];
    struct fair_node *before = NULL;
    for (struct fair_node *at = list->head; at != node; at = at->next) {
        assert(at);
        before = at;
    }
    if (before)
        before->next = node->next;
    else
        list->head = node->next;
    if (list->tail == node)
        list->tail = before;
    if (!list->head)
        list_emptied(queue, class, flow);
}
