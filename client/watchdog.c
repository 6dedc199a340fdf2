// The watchdog's thread: sleeps until the first deadline, the session's end or a new watch.
//
// It polls the control socket for its end only and reads nothing there: replies are for whoever waits for them. It
// takes no other lock than its own, allocates nothing and calls no driver, so nothing that a stream keeps waiting can
// keep it.
//
// A word is stored here only where it has less than the value. That cannot undo a later value: the row's next request,
// which brings it, is not sent before this one's reply, and the daemon stores before it replies.
#include "client/watchdog.h"

#include "client/error.h"
#include "client/session.h"

#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

ice_status watchdog_init(struct watchdog *watchdog)
{
    *watchdog = (struct watchdog){.control_fd = -1, .look_again_us = UINT64_MAX};
    watchdog->watches.previous = watchdog->watches.next = &watchdog->watches;
    if (pthread_mutex_init(&watchdog->lock, NULL) != 0) {
        return error_set(ICE_NO_MEMORY, "no memory for a mutex");
    }
    if (pthread_cond_init(&watchdog->left, NULL) != 0) {
        (void)pthread_mutex_destroy(&watchdog->lock);
        return error_set(ICE_NO_MEMORY, "no memory for a condition variable");
    }
    watchdog->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (watchdog->wake_fd < 0) {
        const ice_status status = error_set(ICE_SYSTEM, "eventfd: %s", strerror(errno));
        (void)pthread_cond_destroy(&watchdog->left);
        (void)pthread_mutex_destroy(&watchdog->lock);
        return status;
    }
    return ICE_OK;
}

void watchdog_close_forked(const struct watchdog *watchdog)
{
    (void)close(watchdog->wake_fd);
}

// ---- with the lock held ----

static void wake(const struct watchdog *watchdog)
{
    const uint64_t one = 1;
    const ssize_t written = write(watchdog->wake_fd, &one, sizeof one); // fails only where it is readable anyway
    (void)written;
}

static void unlink_watch(struct watch *watch)
{
    watch->previous->next = watch->next;
    watch->next->previous = watch->previous;
    watch->previous = watch->next = NULL;
}

static bool is_stored(const struct watch *watch)
{
    return atomic_load_explicit(watch->word, memory_order_acquire) >= watch->value;
}

static void give_up(struct watch *watch)
{
    // Not over what the daemon stores meanwhile: a pushed row may have a later request's value by then.
    uint64_t seen = atomic_load_explicit(watch->word, memory_order_acquire);
    while (seen < watch->value && !watch->gave_up) {
        watch->gave_up = atomic_compare_exchange_weak_explicit(watch->word, &seen, watch->value, memory_order_release,
                                                               memory_order_acquire);
    }
    unlink_watch(watch);
}

// Ends the watches that are due, answers when to look again.
static uint64_t look(struct watchdog *watchdog)
{
    const uint64_t now_us = clock_us();
    uint64_t next_us = UINT64_MAX;
    struct watch *const head = &watchdog->watches;
    for (struct watch *watch = head->next, *next; watch != head; watch = next) {
        next = watch->next;
        if (is_stored(watch)) {
            unlink_watch(watch);
        } else if (watchdog->lost || now_us >= watch->until_us) {
            give_up(watch);
        } else if (watch->until_us < next_us) {
            next_us = watch->until_us;
        }
    }
    return next_us;
}

// ---- the thread ----

static void *watchdog_main(void *argument)
{
    struct watchdog *watchdog = argument;
    (void)pthread_mutex_lock(&watchdog->lock);
    while (!watchdog->stopping) {
        watchdog->look_again_us = look(watchdog);
        const bool idle = watchdog->look_again_us == UINT64_MAX;
        struct pollfd polled[] = {
            {.fd = watchdog->wake_fd, .events = POLLIN},
            {.fd = idle || watchdog->lost ? -1 : watchdog->control_fd, .events = POLLRDHUP},
        };
        const int wait_ms = idle ? -1 : clock_left_ms(watchdog->look_again_us);
        watchdog->polling = true;
        (void)pthread_mutex_unlock(&watchdog->lock);
        const int ready = poll(polled, 2, wait_ms); // an error or a signal is one more turn
        (void)pthread_mutex_lock(&watchdog->lock);
        watchdog->polling = false;
        watchdog->polls++;
        (void)pthread_cond_signal(&watchdog->left);
        uint64_t count;
        const ssize_t consumed = read(watchdog->wake_fd, &count, sizeof count);
        (void)consumed;
        if (ready > 0 && polled[1].revents != 0 && polled[1].fd == watchdog->control_fd) {
            watchdog->lost = true;
        }
    }
    (void)pthread_mutex_unlock(&watchdog->lock);
    return NULL;
}

// With the lock held. The program's signals are not for this thread.
static ice_status start(struct watchdog *watchdog)
{
    sigset_t all, before;
    (void)sigfillset(&all);
    (void)pthread_sigmask(SIG_SETMASK, &all, &before);
    const int error = pthread_create(&watchdog->thread, NULL, watchdog_main, watchdog);
    (void)pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (error != 0) {
        return error_set(ICE_SYSTEM, "the thread that watches streams cannot be started: %s", strerror(error));
    }
    (void)pthread_setname_np(watchdog->thread, "ice-watchdog");
    watchdog->runs = true;
    return ICE_OK;
}

// ---- from other threads ----

void watchdog_fini(struct watchdog *watchdog)
{
    (void)pthread_mutex_lock(&watchdog->lock);
    watchdog->stopping = true;
    wake(watchdog);
    (void)pthread_mutex_unlock(&watchdog->lock);
    if (watchdog->runs) {
        (void)pthread_join(watchdog->thread, NULL);
    }
    (void)close(watchdog->wake_fd);
    (void)pthread_cond_destroy(&watchdog->left);
    (void)pthread_mutex_destroy(&watchdog->lock);
}

void watchdog_session(struct watchdog *watchdog, int control_fd)
{
    (void)pthread_mutex_lock(&watchdog->lock);
    watchdog->control_fd = control_fd;
    watchdog->lost = control_fd < 0;
    (void)look(watchdog);
    const uint64_t polls = watchdog->polls; // a later one is of no socket
    while (control_fd < 0 && watchdog->polling && watchdog->polls == polls) {
        wake(watchdog);
        (void)pthread_cond_wait(&watchdog->left, &watchdog->lock);
    }
    (void)pthread_mutex_unlock(&watchdog->lock);
}

void watchdog_lose(struct watchdog *watchdog)
{
    (void)pthread_mutex_lock(&watchdog->lock);
    watchdog->lost = true;
    (void)look(watchdog);
    (void)pthread_mutex_unlock(&watchdog->lock);
}

ice_status watchdog_add(struct watchdog *watchdog, struct watch *watch)
{
    ice_status status = ICE_OK;
    (void)pthread_mutex_lock(&watchdog->lock);
    if (!watchdog->runs) {
        status = start(watchdog);
    }
    if (status == ICE_OK) {
        watch->gave_up = false;
        watch->previous = watchdog->watches.previous;
        watch->next = &watchdog->watches;
        watch->previous->next = watch;
        watchdog->watches.previous = watch;
        if (watchdog->lost) {
            give_up(watch);
        } else if (watch->until_us < watchdog->look_again_us) {
            watchdog->look_again_us = watch->until_us;
            wake(watchdog);
        }
    }
    (void)pthread_mutex_unlock(&watchdog->lock);
    return status;
}

void watchdog_give_up(struct watchdog *watchdog, struct watch *watch)
{
    (void)pthread_mutex_lock(&watchdog->lock);
    if (watch->next != NULL) {
        give_up(watch);
    }
    (void)pthread_mutex_unlock(&watchdog->lock);
}

void watchdog_remove(struct watchdog *watchdog, struct watch *watch)
{
    (void)pthread_mutex_lock(&watchdog->lock);
    if (watch->next != NULL) {
        unlink_watch(watch);
    }
    (void)pthread_mutex_unlock(&watchdog->lock);
}

bool watchdog_gave_up(struct watchdog *watchdog, const struct watch *watch)
{
    (void)pthread_mutex_lock(&watchdog->lock);
    const bool gave_up = watch->gave_up;
    (void)pthread_mutex_unlock(&watchdog->lock);
    return gave_up;
}
