// The test's side of a sick daemon: what it shares with it, and the loss of power. Single thread.
#ifndef ICECACHE_TESTS_POWER_H
#define ICECACHE_TESTS_POWER_H

#include "daemon.h"
#include "sick.h"

// Makes the daemon, which must not run, a sick one from its next start on. The memory is there until sick_close.
struct sick *sick_open(struct daemon *daemon);
void sick_close(struct daemon *daemon, struct sick *sick);

// Kills the daemon, and leaves of its files what a loss of power at that moment may leave: of the writes that were not
// synced some, in any order, some of them with a part of their sectors; of manifests on their way in or out one or the
// other.
void power_lose(struct daemon *daemon, struct sick *sick, uint64_t *random);

#endif
