// A byte budget shared by threads: what is in use, what is promised to running appends, and the cap.
//
// A promise (reservation) is made before an append of several parts begins, so that it cannot run dry half-way; takers
// that name their reservation draw from it first, all others must leave promised bytes alone.
#ifndef ICECACHE_CACHED_BUDGET_H
#define ICECACHE_CACHED_BUDGET_H

#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>

struct budget {
    pthread_mutex_t lock;
    uint64_t cap_bytes;      // immutable
    uint64_t used_bytes;     // guarded by lock, as all below
    uint64_t promised_bytes; // sum of all reservations' rests
};

struct reservation {
    uint64_t rest_bytes; // guarded by the budget's lock
};

void budget_init(struct budget *budget, uint64_t cap_bytes);
void budget_fini(struct budget *budget);
// Sets the reservation's rest to `bytes`. False, unchanged, where the budget has no room for it.
bool budget_reserve(struct budget *budget, struct reservation *reservation, uint64_t bytes);
// Gives the reservation's rest back.
void budget_unreserve(struct budget *budget, struct reservation *reservation);
// reservation may be NULL. False where the bytes would exceed the cap or touch another's reservation.
bool budget_take(struct budget *budget, struct reservation *reservation, uint64_t bytes);
void budget_give(struct budget *budget, uint64_t bytes);
uint64_t budget_used(struct budget *budget);
uint64_t budget_rest(struct budget *budget, const struct reservation *reservation); // reservation may be NULL: 0
uint64_t budget_committed(struct budget *budget);                                   // in use and promised

#endif
