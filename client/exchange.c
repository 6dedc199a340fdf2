// The table of outstanding requests: sending, and bringing each reply to its record.
//
// Invariants: a request id is never used twice; its low bits are its place in the table, and a reply whose id is not
// the one in that place is dropped. A record is in the table from its submit until its reply or the end of the
// session; it is the caller's, or after exchange_abandon the table's. Landing rows named by a record belong to the
// daemon exactly while the record is in the table. After exchange_die the table is empty and nothing touches the
// sockets any more until reconnect replaces them.
//
// The client's lock guards everything here, the ZeroMQ socket included: a socket may move between threads behind a
// full fence, which the mutex is.
#include "client/exchange.h"

#include "client/error.h"
#include "client/handles.h"
#include "client/ring.h"
#include "client/staging.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define HAND_OVER_US 1000000u // that a submit waits for a daemon that does not empty the session's ring

_Static_assert((EXCHANGE_REQUESTS_MAX & (EXCHANGE_REQUESTS_MAX - 1)) == 0, "a place is a mask of the id");

struct pending *pending_create(void)
{
    struct pending *pending = calloc(1, sizeof *pending);
    if (pending == NULL) {
        (void)error_set(ICE_NO_MEMORY, "no memory for a request's record");
        return NULL;
    }
    pending->fd = -1;
    return pending;
}

void pending_destroy(struct pending *pending)
{
    if (pending == NULL) {
        return;
    }
    if (pending->reply != NULL) {
        icecache__wire__reply__free_unpacked(pending->reply, NULL);
    }
    if (pending->control_reply != NULL) {
        icecache__wire__control_reply__free_unpacked(pending->control_reply, NULL);
    }
    if (pending->fd >= 0) {
        (void)close(pending->fd);
    }
    free(pending->rows);
    free(pending);
}

ice_status exchange_check(const ice_client *client, uint64_t generation)
{
    if (client->generation != generation) {
        return error_set(ICE_UNKNOWN_SESSION, "the handle was made before ice_client_reconnect; close it");
    }
    if (client->dead) {
        return error_set(ICE_DISCONNECTED, "%s", client->dead_text);
    }
    return ICE_OK;
}

// ---- replies ----

// Sends a request whose reply nobody waits for.
static void send_forgotten(ice_client *client, Icecache__Wire__Request *request);

// The sequence that a reply has made; 0: none.
static uint64_t sequence_of(const Icecache__Wire__Reply *reply)
{
    switch (reply->body_case) {
    case ICECACHE__WIRE__REPLY__BODY_SEQUENCE_OPEN:
        return reply->sequence_open->sequence_id;
    case ICECACHE__WIRE__REPLY__BODY_ATTACH:
        return reply->attach->sequence_id;
    case ICECACHE__WIRE__REPLY__BODY_SEQUENCE_FORK:
        return reply->sequence_fork->sequence_id;
    default:
        return 0;
    }
}

// The daemon made something for a caller who has given up: give it back.
static void discard_late(ice_client *client, const struct pending *pending)
{
    if (client->dead || pending->status != ICE_OK) {
        return;
    }
    const Icecache__Wire__Reply *reply = pending->reply;
    const uint64_t sequence_id = reply != NULL ? sequence_of(reply) : 0;
    if (sequence_id != 0) {
        Icecache__Wire__SequenceClose close = ICECACHE__WIRE__SEQUENCE_CLOSE__INIT;
        close.sequence_id = sequence_id;
        Icecache__Wire__Request request = ICECACHE__WIRE__REQUEST__INIT;
        request.body_case = ICECACHE__WIRE__REQUEST__BODY_SEQUENCE_CLOSE;
        request.sequence_close = &close;
        send_forgotten(client, &request);
    }
    const Icecache__Wire__ControlReply *control = pending->control_reply;
    if (control != NULL && control->body_case == ICECACHE__WIRE__CONTROL_REPLY__BODY_LANDING) {
        Icecache__Wire__LandingClose close = ICECACHE__WIRE__LANDING_CLOSE__INIT;
        close.landing_id = control->landing->landing_id;
        Icecache__Wire__ControlRequest request = ICECACHE__WIRE__CONTROL_REQUEST__INIT;
        request.request_id = ++client->request_count * EXCHANGE_REQUESTS_MAX;
        request.body_case = ICECACHE__WIRE__CONTROL_REQUEST__BODY_LANDING_CLOSE;
        request.landing_close = &close;
        uint8_t packet[64];
        size_t size = icecache__wire__control_request__get_packed_size(&request);
        if (size <= sizeof packet) {
            (void)icecache__wire__control_request__pack(&request, packet);
            ice_status status = control_send(client->session.control_fd, packet, size, -1, 0);
            (void)status; // the session's end frees it otherwise
        }
    }
}

// The record's reply is in it, or will never come: takes it out of the table.
static void finish(ice_client *client, struct pending *pending)
{
    client->table[pending->id % EXCHANGE_REQUESTS_MAX] = NULL;
    client->pending_count--;
    // What a stream copies or will copy is given back when it has (stream.c).
    if (pending->pull != PULL_STREAM &&
        (pending->pull == PULL_NONE || pending->status != ICE_OK || pending->abandoned)) {
        landing_rows_release(pending);
    }
    pending->done = true;
    if (pending->opens_staging) {
        staging_adopt(client, pending);
    }
    if (pending->abandoned) {
        if (!pending->opens_staging) {
            discard_late(client, pending);
        }
        if (pending->staging != NULL) {
            staging_release(client, pending->staging, pending->staging_half);
        }
        pending_destroy(pending);
    }
}

// control: did the reply come on the control socket?
static struct pending *lookup(const ice_client *client, uint64_t id, bool control)
{
    struct pending *pending = client->table[id % EXCHANGE_REQUESTS_MAX];
    return pending != NULL && pending->id == id && pending->control == control ? pending : NULL;
}

static void answer(struct pending *pending, uint32_t status, const char *text)
{
    bool known = status <= INT32_MAX && status_is_known((int)status);
    pending->status = known ? (ice_status)status : ICE_INTERNAL;
    bool told = text != NULL && text[0] != '\0';
    (void)snprintf(pending->text, sizeof pending->text, "%s", told ? text : status_text((int)pending->status));
}

// A reply that decodes but makes no sense: its caller gets an error instead of running into its deadline. Anything
// less is dropped.
static void take_unsound(ice_client *client, const void *bytes, size_t size)
{
    Icecache__Wire__Reply *reply =
        size <= WIRE_REPLY_BYTES_MAX ? icecache__wire__reply__unpack(NULL, size, bytes) : NULL;
    if (reply == NULL) {
        return;
    }
    struct pending *pending = lookup(client, reply->request_id, false);
    if (pending != NULL && reply->boot_token == client->session.boot_token) {
        answer(pending, ICE_BAD_MESSAGE, "the daemon's reply contradicts itself; install the same release of both");
        finish(client, pending);
    }
    icecache__wire__reply__free_unpacked(reply, NULL);
}

static void take_reply(ice_client *client, const void *bytes, size_t size)
{
    Icecache__Wire__Reply *reply = NULL;
    if (wire_reply_decode(bytes, size, &reply) != ICE_OK) {
        take_unsound(client, bytes, size);
        return;
    }
    struct pending *pending = NULL;
    if (reply->boot_token != client->session.boot_token) {
        exchange_die(client, "the daemon was restarted (its boot token changed); connect again");
    } else {
        pending = lookup(client, reply->request_id, false);
    }
    if (pending == NULL) {
        icecache__wire__reply__free_unpacked(reply, NULL);
        return;
    }
    answer(pending, reply->status, reply->text);
    pending->reply = reply;
    finish(client, pending);
}

// One message from the data socket; frames after the first have no meaning in a reply.
static void receive_message(ice_client *client)
{
    zmq_msg_t frame;
    bool first = true, more = true;
    while (more && !client->dead) {
        if (zmq_msg_init(&frame) != 0) {
            return;
        }
        if (zmq_msg_recv(&frame, client->session.socket, ZMQ_DONTWAIT) < 0) {
            (void)zmq_msg_close(&frame);
            return;
        }
        more = zmq_msg_more(&frame) != 0;
        if (first) {
            take_reply(client, zmq_msg_data(&frame), zmq_msg_size(&frame));
            first = false;
        }
        (void)zmq_msg_close(&frame);
    }
}

// Is there a message to receive? The call that re-arms ZMQ_FD: only exchange_pump makes it, because whoever learns
// that there is a message must take it.
static bool socket_readable(ice_client *client)
{
    int events = 0;
    size_t size = sizeof events;
    if (client->dead || client->session.socket == NULL) {
        return false;
    }
    while (zmq_getsockopt(client->session.socket, ZMQ_EVENTS, &events, &size) != 0) {
        if (errno != EINTR) {
            return false;
        }
    }
    client->writable = (events & ZMQ_POLLOUT) != 0;
    return (events & ZMQ_POLLIN) != 0;
}

// The same for rings. True: something was received, or has gone on of what waited for room.
static bool pump_ring(ice_client *client)
{
    struct client_ring *ring = client->session.ring;
    const void *bytes;
    size_t size;
    bool news = false;
    while (!client->dead && ring_receive(ring, &bytes, &size)) {
        take_reply(client, bytes, size);
        news = true;
    }
    if (!client->dead) {
        client->writable = ring_flush(ring);
        if (ring_is_corrupt(ring)) {
            exchange_die(client, "the daemon has spoilt the rings; connect again");
        }
    }
    news = news || ring->kept_sent != ring->kept_told; // any submit may have sent it
    ring->kept_told = ring->kept_sent;
    return news;
}

void exchange_pump(ice_client *client)
{
    bool was_writable = client->writable, news = false;
    if (client->session.ring != NULL) {
        news = pump_ring(client);
    }
    while (socket_readable(client)) {
        receive_message(client);
        news = true;
    }
    if (news || (client->writable && !was_writable)) {
        exchange_notify(client);
    }
}

static void take_control_reply(ice_client *client, const void *bytes, size_t size, int fd)
{
    Icecache__Wire__ControlReply *reply = NULL;
    struct pending *pending = NULL;
    if (wire_control_reply_decode(bytes, size, &reply) == ICE_OK) {
        pending = lookup(client, reply->request_id, true);
        if (pending == NULL) {
            icecache__wire__control_reply__free_unpacked(reply, NULL);
        }
    }
    if (pending == NULL) {
        if (fd >= 0) {
            (void)close(fd);
        }
        return;
    }
    answer(pending, reply->status, reply->text);
    pending->control_reply = reply;
    pending->fd = fd;
    finish(client, pending);
}

void exchange_pump_control(ice_client *client)
{
    uint8_t packet[WIRE_CONTROL_BYTES_MAX];
    bool received = false;
    while (!client->dead) {
        size_t size = 0;
        int fd = -1;
        ice_status status = control_receive(client->session.control_fd, packet, sizeof packet, &size, &fd, 0);
        if (status == ICE_DISCONNECTED) {
            exchange_die(client, "the daemon closed the control socket or died; connect again");
        } else if (status == ICE_OK) {
            take_control_reply(client, packet, size, fd);
            received = true;
        } else if (status != ICE_BAD_MESSAGE) {
            break; // nothing more, or a passing shortage: the poll says when to try again
        }
    }
    if (received) {
        exchange_notify(client);
    }
}

void exchange_die(ice_client *client, const char *text)
{
    if (client->dead) {
        return;
    }
    client->dead = true;
    (void)snprintf(client->dead_text, sizeof client->dead_text, "%s", text);
    atomic_store(&client->boot_token, 0);
    for (uint32_t i = 0; i < EXCHANGE_REQUESTS_MAX; i++) {
        struct pending *pending = client->table[i];
        if (pending != NULL) {
            answer(pending, ICE_DISCONNECTED, text);
            finish(client, pending);
        }
    }
    staging_forget(client);
    watchdog_lose(&client->watchdog);
    // Nobody may answer at that address for this session any more: stop trying to reach it.
    if (client->session.socket != NULL) {
        (void)zmq_disconnect(client->session.socket, client->session.endpoint);
    }
    exchange_notify(client);
}

// ---- requests ----

// A place in the table and the id that goes with it; 0: the table is full.
static uint64_t reserve(ice_client *client, struct pending *pending)
{
    for (uint32_t i = 0; i < EXCHANGE_REQUESTS_MAX; i++) {
        uint64_t place = (client->request_count + i) % EXCHANGE_REQUESTS_MAX;
        if (client->table[place] == NULL) {
            pending->id = ++client->request_count * EXCHANGE_REQUESTS_MAX + place;
            client->table[place] = pending;
            client->pending_count++;
            return pending->id;
        }
    }
    return 0;
}

// The request was not sent: undoes reserve, unless the session's end has already taken the record out.
static void withdraw(ice_client *client, struct pending *pending)
{
    if (!pending->done) {
        client->table[pending->id % EXCHANGE_REQUESTS_MAX] = NULL;
        client->pending_count--;
        landing_rows_release(pending);
    }
}

static ice_status enlist(ice_client *client, uint64_t generation, struct pending *pending)
{
    ice_status status = exchange_check(client, generation);
    if (status != ICE_OK) {
        return status;
    }
    // Nobody may be receiving: what has arrived meanwhile may free a place or the rows.
    if (client->pending_count == EXCHANGE_REQUESTS_MAX || landing_rows_busy(pending)) {
        exchange_pump(client);
        exchange_pump_control(client);
        status = exchange_check(client, generation);
        if (status != ICE_OK) {
            return status;
        }
        if (pending->landing != NULL) {
            stream_reap(pending->landing); // as may a stream that has passed
        }
    }
    if (reserve(client, pending) == 0) {
        return error_set(ICE_QUEUE_FULL, "%u requests of this client are in flight; wait for replies",
                         EXCHANGE_REQUESTS_MAX);
    }
    status = landing_rows_acquire(pending);
    if (status != ICE_OK) {
        withdraw(client, pending);
    }
    return status;
}

static void identify(const ice_client *client, Icecache__Wire__Request *request, uint64_t id)
{
    request->protocol_version = WIRE_PROTOCOL_VERSION;
    request->request_id = id;
    request->session_id = client->session.id;
    request->session_token.data = (uint8_t *)(uintptr_t)client->session.token; // packing only reads it
    request->session_token.len = WIRE_SESSION_TOKEN_BYTES;
}

static ice_status header_pack(const Icecache__Wire__Request *request, zmq_msg_t *header)
{
    size_t size = icecache__wire__request__get_packed_size(request);
    if (size > WIRE_HEADER_BYTES_MAX) {
        return error_set(ICE_TOO_LARGE, "the request's header has %zu bytes, the limit is %u", size,
                         WIRE_HEADER_BYTES_MAX);
    }
    if (zmq_msg_init_size(header, size) != 0) {
        return error_set(ICE_NO_MEMORY, "no memory for a request's header");
    }
    (void)icecache__wire__request__pack(request, zmq_msg_data(header));
    return ICE_OK;
}

// 0, or an errno. The frames stay the caller's: a send that fails after the first frame has rolled that one back.
static int send_frames(const struct session *session, zmq_msg_t *header, zmq_msg_t *vectors)
{
    if (session->ring != NULL) {
        return ring_submit(session->ring, zmq_msg_data(header), zmq_msg_size(header),
                           vectors != NULL ? zmq_msg_data(vectors) : NULL, vectors != NULL ? zmq_msg_size(vectors) : 0);
    }
    zmq_msg_t *frames[] = {header, vectors};
    size_t count = vectors != NULL ? 2 : 1;
    for (size_t i = 0; i < count; i++) {
        zmq_msg_t copy;
        if (zmq_msg_init(&copy) != 0 || zmq_msg_copy(&copy, frames[i]) != 0) {
            return ENOMEM;
        }
        int flags = ZMQ_DONTWAIT | (i + 1 < count ? ZMQ_SNDMORE : 0);
        while (zmq_msg_send(&copy, session->socket, flags) < 0) {
            if (errno != EINTR) {
                int error = errno;
                (void)zmq_msg_close(&copy);
                return error;
            }
        }
    }
    return 0;
}

static bool writable(void *argument)
{
    const ice_client *client = argument;
    return client->writable;
}

struct handover {
    const ice_client *client;
    uint64_t end;
};

static bool handed_over(void *argument)
{
    const struct handover *handover = argument;
    const struct client_ring *ring = handover->client->session.ring; // NULL: another thread reconnects
    return ring != NULL && ring->kept_sent >= handover->end;
}

// Until all of the message that was submitted last is in the ring: what is kept goes on only while somebody looks at
// the ring, and its sender may not be about to. The daemon takes it at once unless it stands still;
// then, and at the deadline, the message is the ring's all the same: it goes on with the next call, and its reply will
// come.
static ice_status hand_over(ice_client *client, uint64_t generation, uint64_t until_us)
{
    if (client->session.ring == NULL) {
        return ICE_OK;
    }
    struct handover handover = {client, ring_kept_end(client->session.ring)};
    if (handed_over(&handover)) {
        return ICE_OK;
    }
    const uint64_t patient_us = clock_us() + HAND_OVER_US;
    error_hold();
    const ice_status ignored =
        exchange_wait_until(client, generation, handed_over, &handover, until_us < patient_us ? until_us : patient_us);
    (void)ignored;
    error_let_go();
    return exchange_check(client, generation);
}

static ice_status send_waiting(ice_client *client, uint64_t generation, zmq_msg_t *header, zmq_msg_t *vectors,
                               uint64_t until_us)
{
    for (;;) {
        int error = send_frames(&client->session, header, vectors);
        client->writable = client->writable && error != EAGAIN; // the pump tells whoever waits that it is again
        // Also a failed send may have consumed the edge of ZMQ_FD that the receiver waits for.
        exchange_pump(client);
        if (error == 0) {
            return hand_over(client, generation, until_us);
        }
        if (error != EAGAIN) {
            return error_set(error == ENOMEM ? ICE_NO_MEMORY : ICE_SYSTEM, "sending a request: %s",
                             zmq_strerror(error));
        }
        // With ZeroMQ only a lost connection stops a send (the marks are above the table's size): it comes back, or the
        // control socket says that the daemon is gone. With rings very much waits for room.
        ice_status status = exchange_wait_until(client, generation, writable, client, until_us);
        if (status == ICE_OK) {
            status = exchange_check(client, generation); // before the socket is touched again
        }
        if (status != ICE_OK) {
            return status;
        }
    }
}

ice_status exchange_submit(ice_client *client, uint64_t generation, Icecache__Wire__Request *request,
                           zmq_msg_t *vectors, struct pending *pending, uint64_t until_us)
{
    ice_status status = enlist(client, generation, pending);
    if (status != ICE_OK) {
        return status;
    }
    identify(client, request, pending->id);
    zmq_msg_t header;
    status = header_pack(request, &header);
    if (status == ICE_OK) {
        status = send_waiting(client, generation, &header, vectors, until_us);
        (void)zmq_msg_close(&header);
    }
    if (status != ICE_OK) {
        withdraw(client, pending);
        return status;
    }
    if (vectors != NULL) {
        (void)zmq_msg_close(vectors);
    }
    return ICE_OK;
}

static void send_forgotten(ice_client *client, Icecache__Wire__Request *request)
{
    // No record has this id: ids count up, and the reply is dropped.
    identify(client, request, ++client->request_count * EXCHANGE_REQUESTS_MAX);
    zmq_msg_t header;
    error_hold();
    if (header_pack(request, &header) == ICE_OK) {
        (void)send_frames(&client->session, &header, NULL);
        (void)zmq_msg_close(&header);
    }
    error_let_go();
}

ice_status exchange_submit_control(ice_client *client, uint64_t generation, Icecache__Wire__ControlRequest *request,
                                   struct pending *pending)
{
    return exchange_submit_descriptors(client, generation, request, NULL, 0, pending);
}

ice_status exchange_submit_descriptors(ice_client *client, uint64_t generation, Icecache__Wire__ControlRequest *request,
                                       const int *fds, uint32_t count, struct pending *pending)
{
    pending->control = true;
    ice_status status = enlist(client, generation, pending);
    if (status != ICE_OK) {
        return status;
    }
    request->request_id = pending->id;
    uint8_t packet[WIRE_CONTROL_BYTES_MAX];
    size_t size = icecache__wire__control_request__get_packed_size(request);
    if (size > sizeof packet) {
        status = error_set(ICE_TOO_LARGE, "a control request of %zu bytes; the limit is %zu", size, sizeof packet);
    } else {
        (void)icecache__wire__control_request__pack(request, packet);
        status = control_send_all(client->session.control_fd, packet, size, fds, count, 0);
        if (status == ICE_DISCONNECTED) {
            withdraw(client, pending);
            exchange_die(client, "the daemon closed the control socket or died; connect again");
            return error_set(ICE_DISCONNECTED, "%s", client->dead_text);
        }
        if (status != ICE_OK) {
            status = status == ICE_TIMEOUT ? ICE_QUEUE_FULL : status;
            status = error_set(status, "the control socket takes no request now: %s", status_text((int)status));
        }
    }
    if (status != ICE_OK) {
        withdraw(client, pending);
    }
    return status;
}

// ---- waiting for one reply ----

static bool pending_done(void *argument)
{
    const struct pending *pending = argument;
    return pending->done;
}

ice_status exchange_wait(ice_client *client, uint64_t generation, struct pending *pending, uint64_t until_us)
{
    ice_status status = exchange_wait_until(client, generation, pending_done, pending, until_us);
    if (status == ICE_OK && pending->status != ICE_OK) {
        status = error_set(pending->status, "%s", pending->text);
    }
    return status;
}

void exchange_abandon(ice_client *client, struct pending *pending)
{
    if (!pending->done) {
        pending->abandoned = true;
        return;
    }
    if (pending->staging != NULL) {
        staging_release(client, pending->staging, pending->staging_half);
    }
    pending_destroy(pending);
}

ice_status exchange_call(ice_client *client, uint64_t generation, Icecache__Wire__Request *request, uint64_t until_us,
                         struct pending **out)
{
    return exchange_call_vectors(client, generation, request, NULL, until_us, out);
}

ice_status exchange_call_vectors(ice_client *client, uint64_t generation, Icecache__Wire__Request *request,
                                 zmq_msg_t *vectors, uint64_t until_us, struct pending **out)
{
    *out = NULL;
    struct pending *pending = pending_create();
    ice_status status = ICE_NO_MEMORY;
    (void)pthread_mutex_lock(&client->lock);
    if (pending != NULL) {
        status = exchange_submit(client, generation, request, vectors, pending, until_us);
    }
    if (status != ICE_OK) {
        (void)pthread_mutex_unlock(&client->lock);
        if (vectors != NULL) {
            (void)zmq_msg_close(vectors);
        }
        pending_destroy(pending);
        return status;
    }
    status = exchange_wait(client, generation, pending, until_us);
    bool done = pending->done;
    if (!done) {
        exchange_abandon(client, pending);
    }
    (void)pthread_mutex_unlock(&client->lock);
    if (done) {
        *out = pending;
    }
    return status;
}
