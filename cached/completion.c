// Completions: posted under a lock by any thread, taken as a whole by the reactor. The eventfd is written only when the
// list was empty, one wake-up per batch, and never read: it is watched for edges.
#include "cached/completion.h"

#include <errno.h>
#include <stdint.h>
#include <sys/eventfd.h>
#include <unistd.h>

int completion_list_init(struct completion_list *list)
{
    *list = (struct completion_list){.event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)};
    if (list->event_fd < 0)
        return -errno;
    pthread_mutex_init(&list->lock, NULL);
    return 0;
}

void completion_list_fini(struct completion_list *list)
{
    close(list->event_fd);
    pthread_mutex_destroy(&list->lock);
}

void completion_post(struct completion_list *list, struct completion *completion)
{
    completion->next = NULL;
    pthread_mutex_lock(&list->lock);
    bool first = list->head == NULL;
    if (first)
        list->head = completion;
    else
        list->tail->next = completion;
    list->tail = completion;
    pthread_mutex_unlock(&list->lock);
    if (first) {
        uint64_t one = 1;
        ssize_t ignored = write(list->event_fd, &one, sizeof one); // only fails when already readable
        (void)ignored;
    }
}

bool completion_list_is_empty(struct completion_list *list)
{
    pthread_mutex_lock(&list->lock);
    const bool is_empty = list->head == NULL;
    pthread_mutex_unlock(&list->lock);
    return is_empty;
}

unsigned completion_run(struct completion_list *list, struct server *server)
{
    pthread_mutex_lock(&list->lock);
    struct completion *next = list->head;
    list->head = list->tail = NULL;
    pthread_mutex_unlock(&list->lock);
    unsigned done = 0;
    while (next) {
        struct completion *completion = next;
        next = completion->next; // before done: it may free the completion
        completion->done(completion, server);
        done++;
    }
    return done;
}
