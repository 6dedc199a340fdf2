// Byte budget with reservations. Invariant: used + promised <= cap. Any thread; one short lock.
#include "cached/budget.h"

#include <assert.h>

void budget_init(struct budget *budget, uint64_t cap_bytes)
{
    *budget = (struct budget){.cap_bytes = cap_bytes};
    pthread_mutex_init(&budget->lock, NULL);
}

void budget_fini(struct budget *budget)
{
    pthread_mutex_destroy(&budget->lock);
}

bool budget_reserve(struct budget *budget, struct reservation *reservation, uint64_t bytes)
{
    pthread_mutex_lock(&budget->lock);
    uint64_t others = budget->used_bytes + budget->promised_bytes - reservation->rest_bytes;
    bool fits = bytes <= budget->cap_bytes - others;
    if (fits) {
        budget->promised_bytes += bytes - reservation->rest_bytes;
        reservation->rest_bytes = bytes;
    }
    pthread_mutex_unlock(&budget->lock);
    return fits;
}

void budget_unreserve(struct budget *budget, struct reservation *reservation)
{
    pthread_mutex_lock(&budget->lock);
    budget->promised_bytes -= reservation->rest_bytes;
    reservation->rest_bytes = 0;
    pthread_mutex_unlock(&budget->lock);
}

bool budget_take(struct budget *budget, struct reservation *reservation, uint64_t bytes)
{
    pthread_mutex_lock(&budget->lock);
    uint64_t promised = reservation ? reservation->rest_bytes : 0;
    uint64_t drawn = promised < bytes ? promised : bytes;
    bool fits = bytes - drawn <= budget->cap_bytes - budget->used_bytes - budget->promised_bytes;
    if (fits) {
        if (reservation)
            reservation->rest_bytes -= drawn;
        budget->promised_bytes -= drawn;
        budget->used_bytes += bytes;
    }
    pthread_mutex_unlock(&budget->lock);
    return fits;
}

void budget_give(struct budget *budget, uint64_t bytes)
{
    pthread_mutex_lock(&budget->lock);
    assert(bytes <= budget->used_bytes);
    budget->used_bytes -= bytes;
    pthread_mutex_unlock(&budget->lock);
}

uint64_t budget_used(struct budget *budget)
{
    pthread_mutex_lock(&budget->lock);
    uint64_t used = budget->used_bytes;
    pthread_mutex_unlock(&budget->lock);
    return used;
}

uint64_t budget_rest(struct budget *budget, const struct reservation *reservation)
{
    pthread_mutex_lock(&budget->lock);
    uint64_t rest = reservation ? reservation->rest_bytes : 0;
    pthread_mutex_unlock(&budget->lock);
    return rest;
}

uint64_t budget_committed(struct budget *budget)
{
    pthread_mutex_lock(&budget->lock);
    uint64_t committed = budget->used_bytes + budget->promised_bytes;
    pthread_mutex_unlock(&budget->lock);
    return committed;
}
