// No stream waits for ever: one thread of the library, started with the first wait on a GPU's side, that stores the
// words that streams wait for when nobody else will any more.
#ifndef ICECACHE_CLIENT_WATCHDOG_H
#define ICECACHE_CLIENT_WATCHDOG_H

#include "client/icecache.h"
#include "proto/status.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

// A word that a stream waits for. The caller's, who keeps it, and the word, until watchdog_remove.
struct watch {
    struct watch *previous, *next; // NULL: not watched
    _Atomic uint64_t *word;
    uint64_t value, until_us;
    bool gave_up; // the watchdog has stored it, not the daemon
};

// One for each client. The lock guards everything, and is held for short whatever the driver or the client's lock do: a
// stream that waits may keep both.
struct watchdog {
    pthread_mutex_t lock;
    pthread_cond_t left; // the thread has left its poll
    pthread_t thread;
    bool runs, stopping, polling;
    bool lost;              // the session's end is known
    uint64_t polls;         // that have ended
    int wake_fd;            // eventfd; ends the poll
    int control_fd;         // the session's, borrowed; -1: none
    uint64_t look_again_us; // when the thread does by itself
    struct watch watches;   // list head
};

ICE_MUST_CHECK ice_status watchdog_init(struct watchdog *watchdog);
void watchdog_fini(struct watchdog *watchdog); // ends the thread
void watchdog_close_forked(const struct watchdog *watchdog);

// A new session's control socket, or -1 before an old one is closed: then nobody polls it any more.
void watchdog_session(struct watchdog *watchdog, int control_fd);
// The session has ended, whoever has found out: gives all watches up.
void watchdog_lose(struct watchdog *watchdog);

// Watches a word: stores the value where the session ends or until_us (monotonic clock) passes before the daemon has.
ICE_MUST_CHECK ice_status watchdog_add(struct watchdog *watchdog, struct watch *watch);
// At once, where the daemon has not.
void watchdog_give_up(struct watchdog *watchdog, struct watch *watch);
void watchdog_remove(struct watchdog *watchdog, struct watch *watch); // accepts what is not watched
bool watchdog_gave_up(struct watchdog *watchdog, const struct watch *watch);

#endif
