// Waiting for a selection on the GPU's side: ice_ticket_stream_wait.
//
// Each row of a landing has a timeline word (proto/timeline.h) in which the daemon stores a retrieve's value when it is
// over. A wait issues in the worker's stream: a wait for the word of the ticket's first row (all rows of a retrieve are
// over together), then, for a pull landing, the copies of its rows out of the staging, then a mark. The watchdog stores
// the word where the daemon does not.
//
// Invariants: words and staging stay mapped and registered until every stream has passed its mark, or for good; rows of
// a pull are given back when the mark has been passed and the reply is here, so the daemon never writes to a staging
// that a stream reads while the session and the deadline hold. What a stream reads after the watchdog has let it go is
// not trusted: the ticket ends with an error.
//
// Locks: the client's, for the list and the states. It is not held while work is issued in the worker's stream, because
// a driver whose queue is full keeps the caller until the stream moves.
#include "client/error.h"
#include "client/exchange.h"
#include "client/handles.h"

#include "gpu/timeline.h"
#include "proto/timeline.h"

#include <stdlib.h>
#include <time.h>

#define SPIN_US  200u // how long a mark is asked for without a pause
#define PAUSE_US 20u

struct stream_wait {
    struct stream_wait *next;
    struct watch watch;
    cuda_event mark;
    uint64_t owner; // id of the request
    enum {
        WAIT_SPARE,
        WAIT_ISSUING, // by the thread that called
        WAIT_ISSUED,
        WAIT_PASSED,
        WAIT_LOST, // nobody can tell when the stream has passed
    } state;
    bool held;   // a ticket points here
    bool failed; // not all could be issued
};

struct streams {
    struct gpu_timeline timeline;
    struct stream_wait *waits;
};

// What is issued, gathered with the lock held.
struct order {
    struct stream_wait *wait;
    struct streams *streams;
    struct gpu_buffer *buffer;
    uint32_t word;
    bool pull;
    bool cleared[WIRE_SEQUENCES_PER_RETRIEVE_MAX]; // rows that held another sequence
};

static ice_status failed(ice_status status, const char *text)
{
    return error_set(status, "waiting in a stream: %s", text[0] != '\0' ? text : status_text((int)status));
}

// ---- records ----

static ice_status streams_open(ice_landing *landing)
{
    char text[CUDA_TEXT_BYTES] = "";
    if (landing->gpu->streams != NULL) {
        return ICE_OK;
    }
    struct streams *streams = calloc(1, sizeof *streams);
    if (streams == NULL) {
        return error_set(ICE_NO_MEMORY, "no memory for a record of waits in streams");
    }
    ice_status status = gpu_timeline_open(&landing->gpu->buffer.device, landing->words,
                                          timeline_bytes(&landing->shape, landing->place), &streams->timeline, text);
    if (status != ICE_OK) {
        free(streams);
        return failed(status, text);
    }
    landing->gpu->streams = streams;
    return ICE_OK;
}

// ---- passing ----

static bool is_answered(const ice_client *client, uint64_t id)
{
    const struct pending *pending = client->table[id % EXCHANGE_REQUESTS_MAX];
    return pending == NULL || pending->id != id;
}

static void rows_give_back(ice_landing *landing, uint64_t owner)
{
    for (uint32_t row = 0; row < landing->shape.rows; row++) {
        if (landing->row_owners[row] == owner) {
            landing->row_owners[row] = 0;
        }
    }
}

// Looks at a wait once.
static void wait_look(ice_landing *landing, struct stream_wait *wait)
{
    char text[CUDA_TEXT_BYTES];
    bool passed = false;
    if (wait->state == WAIT_ISSUED) {
        const ice_status status = gpu_mark_poll(landing->gpu->streams->timeline.device, wait->mark, &passed, text);
        wait->state = status != ICE_OK ? WAIT_LOST : passed ? WAIT_PASSED : WAIT_ISSUED;
    }
    if (wait->state == WAIT_PASSED && is_answered(landing->client, wait->owner)) {
        watchdog_remove(&landing->client->watchdog, &wait->watch);
        rows_give_back(landing, wait->owner);
        wait->state = WAIT_SPARE;
    }
}

void stream_reap(ice_landing *landing)
{
    struct streams *streams = landing->gpu != NULL ? landing->gpu->streams : NULL;
    for (struct stream_wait *wait = streams != NULL ? streams->waits : NULL; wait != NULL; wait = wait->next) {
        wait_look(landing, wait);
    }
}

// ---- records of waits ----

static struct stream_wait *find_spare(const struct streams *streams)
{
    struct stream_wait *wait = streams->waits;
    while (wait != NULL && (wait->state != WAIT_SPARE || wait->held)) {
        wait = wait->next;
    }
    return wait;
}

// NULL: there is none, and why.
static struct stream_wait *wait_create(ice_landing *landing, ice_status *status)
{
    char text[CUDA_TEXT_BYTES] = "";
    struct streams *streams = landing->gpu->streams;
    struct stream_wait *wait = find_spare(streams);
    if (wait == NULL) {
        stream_reap(landing); // only now: it asks the driver about each
        wait = find_spare(streams);
    }
    if (wait == NULL) {
        wait = calloc(1, sizeof *wait);
        if (wait == NULL) {
            *status = error_set(ICE_NO_MEMORY, "no memory for a record of a wait in a stream");
            return NULL;
        }
        *status = gpu_mark_create(streams->timeline.device, &wait->mark, text);
        if (*status != ICE_OK) {
            free(wait);
            (void)failed(*status, text);
            return NULL;
        }
        wait->next = streams->waits;
        streams->waits = wait;
    }
    return wait;
}

static void pause_unlocked(ice_client *client, uint64_t begun_us)
{
    (void)pthread_mutex_unlock(&client->lock);
    if (clock_us() - begun_us >= SPIN_US) {
        const struct timespec pause = {0, PAUSE_US * 1000};
        (void)nanosleep(&pause, NULL);
    }
    (void)pthread_mutex_lock(&client->lock);
}

// ---- issuing ----

static ice_status ticket_check(const ice_ticket *ticket)
{
    const struct pending *pending = ticket->pending;
    if (ticket->streamed) {
        return error_set(ICE_INVALID_ARGUMENT,
                         "a stream waits for the ticket already; let other streams wait for an event behind it");
    }
    if (pending->landing == NULL) {
        return error_set(ICE_UNKNOWN_LANDING, "the ticket's landing was closed");
    }
    if (pending->landing->words == NULL) {
        return error_set(ICE_NOT_SUPPORTED,
                         "the landing is in host memory; only landings on a GPU are waited for there");
    }
    if (pending->done && pending->status != ICE_OK) {
        return error_set(pending->status, "%s", pending->text);
    }
    if (pending->pull == PULL_ISSUED || pending->pull == PULL_LOST) {
        return error_set(ICE_BUSY, "ice_retrieve_wait has begun to copy the ticket's selection; go on with that");
    }
    if (clock_us() >= ticket->until_us) {
        return error_set(ICE_TIMEOUT, "the ticket's deadline has passed");
    }
    return ICE_OK;
}

// Everything that can be refused before something is issued. With the lock held.
static ice_status order_prepare(ice_ticket *ticket, void *stream, struct order *order)
{
    char text[CUDA_TEXT_BYTES] = "";
    struct pending *pending = ticket->pending;
    ice_landing *landing = pending->landing;
    ice_status status = streams_open(landing);
    if (status != ICE_OK) {
        return status;
    }
    struct streams *streams = landing->gpu->streams;
    status = gpu_timeline_check(&streams->timeline, stream, text);
    if (status != ICE_OK) {
        return failed(status, text);
    }
    struct stream_wait *wait = wait_create(landing, &status);
    if (wait == NULL) {
        return status;
    }
    *order =
        (struct order){.wait = wait, .streams = streams, .buffer = &landing->gpu->buffer, .word = pending->rows[0]};
    order->pull = pending->pull == PULL_DUE;
    for (uint32_t i = 0; order->pull && i < pending->row_count; i++) {
        const uint64_t holds = landing->gpu->row_sequences[pending->rows[i]];
        order->cleared[i] = holds != 0 && holds != ticket->sequence_ids[i];
    }
    wait->watch.word = landing->words + order->word;
    wait->watch.value = ticket->signal;
    wait->watch.until_us = ticket->until_us;
    status = watchdog_add(&ticket->client->watchdog, &wait->watch);
    if (status != ICE_OK) {
        return status;
    }
    wait->owner = pending->id;
    wait->state = WAIT_ISSUING;
    wait->failed = false;
    wait->held = true;
    ticket->wait = wait;
    ticket->streamed = true;
    if (order->pull) {
        pending->pull = PULL_STREAM;
    }
    return ICE_OK;
}

// Without the lock. *issued: something may be in the stream. *marked: the mark is behind it.
static ice_status order_issue(const ice_ticket *ticket, const struct order *order, void *stream, bool *issued,
                              bool *marked)
{
    char text[CUDA_TEXT_BYTES] = "";
    const struct pending *pending = ticket->pending;
    ice_status status = gpu_timeline_wait(&order->streams->timeline, order->word, ticket->signal, stream, text);
    *issued = status == ICE_OK;
    *marked = false;
    if (!*issued) {
        return failed(status, text);
    }
    if (order->pull) {
        status = gpu_buffer_pull_in(order->buffer, stream, pending->rows, order->cleared, pending->row_count,
                                    ticket->layer, ticket->whole, text);
    }
    if (status != ICE_OK) {
        (void)failed(status, text);
        error_hold();
    }
    // Behind copies of which some could not be issued, too: the others read the staging.
    const ice_status mark = gpu_mark_set(order->streams->timeline.device, order->wait->mark, stream, text);
    *marked = mark == ICE_OK;
    if (status != ICE_OK) {
        error_let_go();
        return status;
    }
    return mark == ICE_OK ? ICE_OK : failed(mark, text);
}

// With the lock held: nothing is in the stream, so the ticket is as it was.
static void order_undo(ice_ticket *ticket, const struct order *order)
{
    struct pending *pending = ticket->pending;
    watchdog_remove(&ticket->client->watchdog, &order->wait->watch);
    order->wait->state = WAIT_SPARE;
    order->wait->held = false;
    ticket->wait = NULL;
    ticket->streamed = false;
    if (order->pull) {
        pending->pull = PULL_DUE;
        if (pending->done && pending->status != ICE_OK) {
            landing_rows_release(pending); // which its reply would have done
        }
    }
}

static void order_settle(ice_ticket *ticket, const struct order *order, ice_status status, bool marked)
{
    struct pending *pending = ticket->pending;
    order->wait->state = marked ? WAIT_ISSUED : WAIT_LOST;
    order->wait->failed = status != ICE_OK;
    for (uint32_t i = 0; order->pull && status == ICE_OK && i < pending->row_count; i++) {
        pending->landing->gpu->row_sequences[pending->rows[i]] = ticket->sequence_ids[i];
    }
}

static ice_status stream_wait(ice_ticket *ticket, void *stream)
{
    ice_client *client = ticket->client;
    struct order order;
    (void)pthread_mutex_lock(&client->lock);
    ice_status status = exchange_check(client, ticket->generation);
    if (status == ICE_OK) {
        exchange_pump(client); // nobody may be receiving: a refusal may be here
        status = exchange_check(client, ticket->generation);
    }
    if (status == ICE_OK) {
        status = ticket_check(ticket);
    }
    // A pull that has been waited for is in the landing, as is a push that was answered: whatever is issued now sees
    // it.
    const bool there = ticket->pending->done && ticket->pending->pull == PULL_NONE;
    if (status == ICE_OK && !there) {
        status = order_prepare(ticket, stream, &order);
    }
    (void)pthread_mutex_unlock(&client->lock);
    if (status != ICE_OK || there) {
        return status;
    }
    bool issued = false, marked = false;
    status = order_issue(ticket, &order, stream, &issued, &marked);
    (void)pthread_mutex_lock(&client->lock);
    if (issued) {
        order_settle(ticket, &order, status, marked);
    } else {
        order_undo(ticket, &order);
    }
    (void)pthread_mutex_unlock(&client->lock);
    return status;
}

ice_status ice_ticket_stream_wait(ice_ticket *ticket, void *stream)
{
    error_clear();
    if (ticket == NULL) {
        return error_set(ICE_INVALID_ARGUMENT, "ticket is NULL");
    }
    ice_status status = client_check(ticket->client);
    return status == ICE_OK ? stream_wait(ticket, stream) : status;
}

// ---- the end of a ticket ----

// Until the stream has passed the copies of a pull.
static ice_status copies_await(ice_ticket *ticket, uint64_t until_us)
{
    const uint64_t begun_us = clock_us();
    struct pending *pending = ticket->pending;
    while (pending->landing != NULL && pending->pull == PULL_STREAM && ticket->wait != NULL) {
        struct stream_wait *wait = ticket->wait;
        wait_look(pending->landing, wait);
        if (wait->state == WAIT_SPARE) {
            pending->pull = PULL_NONE;
        } else if (wait->state == WAIT_LOST) {
            return error_set(ICE_SYSTEM, "the GPU does not tell how far the stream has come");
        } else if (clock_us() >= until_us) {
            return error_set(ICE_TIMEOUT, "the stream has not come to the selection's copies within the deadline");
        } else {
            pause_unlocked(ticket->client, begun_us);
        }
    }
    if (pending->landing == NULL || ticket->wait == NULL) {
        return error_set(ICE_UNKNOWN_LANDING, "the landing was closed before the ticket was waited for");
    }
    return ICE_OK;
}

ice_status stream_finish(ice_ticket *ticket, ice_status replied, uint64_t until_us)
{
    if (replied != ICE_OK) {
        error_hold(); // why the request failed says more
        const ice_status ignored = copies_await(ticket, until_us);
        (void)ignored;
        error_let_go();
        return replied;
    }
    const bool pulled = ticket->pending->pull == PULL_STREAM; // the first time
    const ice_status status = copies_await(ticket, until_us);
    if (status != ICE_OK) {
        return status;
    }
    if (ticket->wait->failed) {
        return error_set(ICE_SYSTEM, "not all that the stream was to wait for could be issued");
    }
    if (watchdog_gave_up(&ticket->client->watchdog, &ticket->wait->watch)) {
        return error_set(ICE_TIMEOUT, "the ticket's deadline passed before the selection came: the stream has gone on "
                                      "without it");
    }
    if (pulled) {
        pull_landed(ticket);
    }
    return ICE_OK;
}

void stream_leave(ice_ticket *ticket)
{
    if (ticket->wait != NULL) {
        ticket->wait->held = false;
        ticket->wait = NULL;
    }
}

// ---- the end of a landing ----

void stream_detach(const ice_landing *landing)
{
    const struct handle *head = &landing->client->tickets;
    for (struct handle *at = head->next; at != head; at = at->next) {
        ice_ticket *ticket = (ice_ticket *)at;
        if (ticket->pending->landing == landing) {
            stream_leave(ticket);
        }
    }
}

// Has every stream passed? One of which that cannot be known never has.
static bool all_passed(ice_landing *landing, bool *hopeless)
{
    bool all = true;
    stream_reap(landing);
    for (const struct stream_wait *wait = landing->gpu->streams->waits; wait != NULL; wait = wait->next) {
        *hopeless = *hopeless || wait->state == WAIT_LOST;
        all = all && (wait->state == WAIT_SPARE || wait->state == WAIT_PASSED);
    }
    return all;
}

bool stream_close(ice_landing *landing, uint64_t until_us)
{
    ice_client *client = landing->client;
    struct streams *streams = landing->gpu != NULL ? landing->gpu->streams : NULL;
    if (streams == NULL) {
        return true;
    }
    for (struct stream_wait *wait = streams->waits; wait != NULL; wait = wait->next) {
        watchdog_give_up(&client->watchdog, &wait->watch);
    }
    const uint64_t begun_us = clock_us();
    bool hopeless = false, passed = all_passed(landing, &hopeless);
    while (!passed && !hopeless && clock_us() < until_us) {
        pause_unlocked(client, begun_us);
        passed = all_passed(landing, &hopeless);
    }
    while (streams->waits != NULL) {
        struct stream_wait *wait = streams->waits;
        streams->waits = wait->next;
        watchdog_remove(&client->watchdog, &wait->watch);
        if (passed) {
            gpu_mark_destroy(streams->timeline.device, wait->mark);
        }
        free(wait);
    }
    if (passed) {
        gpu_timeline_close(&streams->timeline);
    }
    free(streams); // where a stream has not passed, the words stay registered
    landing->gpu->streams = NULL;
    return passed;
}
