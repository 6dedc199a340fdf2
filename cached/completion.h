// What other threads hand back to the reactor: a list and an eventfd. Completions are embedded, so posting never fails.
#ifndef ICECACHE_CACHED_COMPLETION_H
#define ICECACHE_CACHED_COMPLETION_H

#include <pthread.h>
#include <stdbool.h>

struct server;

struct completion {
    struct completion *next;
    void (*done)(struct completion *completion, struct server *server); // on the reactor
};

struct completion_list {
    pthread_mutex_t lock;
    struct completion *head, *tail; // guarded by lock
    int event_fd;
};

// 0 or -errno.
int completion_list_init(struct completion_list *list);
void completion_list_fini(struct completion_list *list);
void completion_post(struct completion_list *list, struct completion *completion);
bool completion_list_is_empty(struct completion_list *list);
// Reactor: runs what has been posted. Returns how many.
unsigned completion_run(struct completion_list *list, struct server *server);

#endif
