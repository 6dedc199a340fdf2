// Pulling a selection out of the shared staging into GPU memory.
//
// Invariant: a row of a pull landing is given back when the copy that reads its staging has ended, or when none was
// issued; so the daemon never writes to a staging that is being read. Locks: the client's, for the state of each ticket
// and the landing's rows; it is released between looks at a copy.
#include "client/error.h"
#include "client/exchange.h"
#include "client/handles.h"

#include <string.h>
#include <time.h>

_Static_assert(WIRE_SEQUENCES_PER_RETRIEVE_MAX <= SCATTER_ROWS_MAX, "one launch has all rows of a retrieve");

#define SPIN_US  200u // how long the end of a copy is asked for without a pause
#define PAUSE_US 20u

// Any of the fences does for any ticket: one that is set again moves behind the later copies.
static uint32_t fence_of(const ice_ticket *ticket)
{
    return ticket->pending->rows[0] % GPU_FENCES_MAX;
}

// The rows are ours again, and whoever waits for them hears of it.
static void give_back(const ice_ticket *ticket)
{
    ticket->pending->pull = PULL_NONE;
    landing_rows_release(ticket->pending);
    exchange_notify(ticket->client);
}

// ---- step reuse ----

static uint64_t *cell_of(const ice_ticket *ticket, uint32_t i)
{
    const ice_landing *landing = ticket->pending->landing;
    return &landing->gpu->cells[(uint64_t)ticket->pending->rows[i] * landing->shape.layers + ticket->layer];
}

// Where the GPU lacks what the daemon takes it to have, or where a copy of whole blocks is expected to be faster.
bool pull_wants_whole(const ice_ticket *ticket)
{
    const struct pending *pending = ticket->pending;
    const struct gpu_landing_side *gpu = pending->landing->gpu;
    if (gpu->buffer.pull.staging == 0) {
        return true; // there is no kernel
    }
    for (uint32_t i = 0; i < pending->row_count; i++) {
        if (*cell_of(ticket, i) != ticket->sequence_ids[i]) {
            return true;
        }
    }
    return gpu->copy == ICE_COPY_ANY && !gpu_pull_prefers_kernel(&gpu->buffer.pull, pending->row_count, gpu->turnover);
}

// What stands in the cells of a retrieve that is under way: neither a sequence's id nor another request's mark.
static uint64_t mark_of(const ice_ticket *ticket)
{
    return ticket->pending->id | UINT64_C(1) << 63;
}

// Until the copies of this retrieve are issued nobody knows what the cells hold.
void pull_submitted(ice_ticket *ticket)
{
    for (uint32_t i = 0; i < ticket->pending->row_count; i++) {
        *cell_of(ticket, i) = mark_of(ticket);
    }
}

// The share of this reply counts for an eighth.
static void note_turnover(const ice_ticket *ticket)
{
    const Icecache__Wire__Reply *reply = ticket->pending->reply;
    struct gpu_landing_side *gpu = ticket->pending->landing->gpu;
    uint64_t slots = 0, changed = 0;
    if (reply == NULL || reply->body_case != ICECACHE__WIRE__REPLY__BODY_RETRIEVE) {
        return;
    }
    for (size_t i = 0; i < reply->retrieve->n_counts; i++) {
        slots += reply->retrieve->counts[i];
        changed += reply->retrieve->changed[i];
    }
    if (slots > 0) {
        gpu->turnover += ((float)changed / (float)slots - gpu->turnover) / 8.0f;
    }
}

// A later retrieve of the cells, which a stream's ticket may outlive, has its own mark there.
void pull_landed(ice_ticket *ticket)
{
    for (uint32_t i = 0; i < ticket->pending->row_count; i++) {
        uint64_t *cell = cell_of(ticket, i);
        *cell = *cell == mark_of(ticket) ? ticket->sequence_ids[i] : *cell;
    }
    note_turnover(ticket);
}

// ---- copies ----

static ice_status issue(ice_ticket *ticket, char *text)
{
    const struct pending *pending = ticket->pending;
    struct gpu_landing_side *gpu = pending->landing->gpu;
    bool cleared[WIRE_SEQUENCES_PER_RETRIEVE_MAX];
    for (uint32_t i = 0; i < pending->row_count; i++) {
        uint64_t holds = gpu->row_sequences[pending->rows[i]];
        cleared[i] = holds != 0 && holds != ticket->sequence_ids[i];
    }
    ice_status status = gpu_buffer_pull(&gpu->buffer, pending->rows, cleared, pending->row_count, ticket->layer,
                                        ticket->whole, fence_of(ticket), text);
    for (uint32_t i = 0; i < pending->row_count && status == ICE_OK; i++) {
        gpu->row_sequences[pending->rows[i]] = ticket->sequence_ids[i];
    }
    if (status == ICE_OK) {
        pull_landed(ticket);
    }
    return status;
}

// Looks once. With the lock held.
static ice_status look(const ice_ticket *ticket, bool *done, char *text)
{
    return gpu_buffer_poll(&ticket->pending->landing->gpu->buffer, fence_of(ticket), done, text);
}

// Until the issued copy has ended. Another waiter of the ticket, or the landing's close, may be first.
static ice_status await(ice_ticket *ticket, uint64_t until_us)
{
    ice_client *client = ticket->client;
    char text[CUDA_TEXT_BYTES] = "";
    uint64_t begun_us = clock_us();
    while (ticket->pending->pull == PULL_ISSUED && ticket->pending->landing != NULL) {
        bool done = false;
        ice_status status = look(ticket, &done, text);
        if (status != ICE_OK) {
            ticket->pending->pull = PULL_LOST;
            return error_set(status, "copying to the GPU: %s", text);
        }
        if (done) {
            give_back(ticket);
            return ICE_OK;
        }
        uint64_t now_us = clock_us();
        if (now_us >= until_us) {
            return error_set(ICE_TIMEOUT, "the copy to the GPU has not ended within the deadline");
        }
        (void)pthread_mutex_unlock(&client->lock);
        if (now_us - begun_us >= SPIN_US) {
            const struct timespec pause = {0, PAUSE_US * 1000};
            (void)nanosleep(&pause, NULL);
        }
        (void)pthread_mutex_lock(&client->lock);
    }
    if (ticket->pending->pull == PULL_LOST) {
        return error_set(ICE_SYSTEM, "the copy to the GPU has failed before");
    }
    return ICE_OK;
}

ice_status pull_finish(ice_ticket *ticket, uint64_t until_us)
{
    struct pending *pending = ticket->pending;
    if (pending->landing == NULL) {
        return error_set(ICE_UNKNOWN_LANDING, "the landing was closed before its copy was waited for");
    }
    if (pending->pull == PULL_LOST) {
        return error_set(ICE_SYSTEM, "the copy to the GPU has failed before");
    }
    if (pending->pull == PULL_DUE) {
        char text[CUDA_TEXT_BYTES] = "";
        ice_status status = issue(ticket, text);
        if (status != ICE_OK) {
            pending->pull = PULL_LOST; // some of it may be under way, and no fence stands behind it
            return error_set(status, "copying to the GPU: %s", text);
        }
        pending->pull = PULL_ISSUED;
    }
    return await(ticket, until_us);
}

void pull_abandon(ice_ticket *ticket, uint64_t until_us)
{
    const struct pending *pending = ticket->pending;
    if (!pending->done || pending->landing == NULL) {
        return;
    }
    if (pending->pull == PULL_DUE) {
        give_back(ticket);
        return;
    }
    error_hold();
    ice_status status = await(ticket, until_us); // returns at once where nothing was issued
    (void)status;                                // the rows stay taken where the GPU does not answer
    error_let_go();
}

static ice_ticket *find_ticket(const ice_landing *landing)
{
    const struct handle *head = &landing->client->tickets;
    for (struct handle *at = head->next; at != head; at = at->next) {
        ice_ticket *ticket = (ice_ticket *)at;
        if (ticket->pending->landing == landing && ticket->pending->done) {
            return ticket;
        }
    }
    return NULL;
}

void pull_forget(ice_landing *landing, uint64_t until_us)
{
    // Replies that are still to come leave nothing to copy, so their rows are free when they are here.
    for (uint32_t i = 0; i < EXCHANGE_REQUESTS_MAX; i++) {
        struct pending *pending = landing->client->table[i];
        if (pending != NULL && pending->landing == landing) {
            pending->pull = PULL_NONE;
        }
    }
    // From the beginning each time: other tickets may come and go while a copy is waited for. This one may not, because
    // no call may overlap the landing's close.
    for (ice_ticket *ticket = find_ticket(landing); ticket != NULL; ticket = find_ticket(landing)) {
        pull_abandon(ticket, until_us);
        ticket->pending->landing = NULL;
    }
}
