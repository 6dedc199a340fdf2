// Waiting without a thread of our own: leader and followers.
//
// One waiter at a time is the receiver: it polls the data socket's ZMQ_FD (or the ring's epoll), the control socket and
// the wake-up eventfd with the lock released, so that submits of other threads go on. All others sleep on their own
// condition variable. Whoever takes replies in (the receiver, or any thread that has just sent) wakes the waiters whose
// condition holds now: by their condition variable, the receiver by the eventfd. Who leaves while nobody receives hands
// the role to the next waiter.
//
// ZMQ_FD is edge-triggered: its edge may be consumed by any call on the socket. Therefore the socket is always emptied
// (exchange_pump) with the lock held before polling and after every send.
//
// A deadline that has passed ends a wait only after one more look at what has arrived: a caller that polls with
// deadlines too short to sleep in, while nobody receives or the receiver has not yet woken, still gets its reply.
//
// The client's lock guards the list of waiters and the receiver's role. A waiter lives on its thread's stack and is in
// the list exactly while that thread is in exchange_wait_until.
#include "client/exchange.h"

#include "client/error.h"
#include "client/ring.h"

#include <errno.h>
#include <poll.h>
#include <unistd.h>

static bool lost(const ice_client *client, const struct waiter *waiter)
{
    return client->dead || client->generation != waiter->generation;
}

static void wake(ice_client *client, struct waiter *waiter)
{
    if (client->receiver == waiter) {
        uint64_t one = 1;
        // Fails only where the counter is near its end, and then the poll ends as well.
        ssize_t written = write(client->wake_fd, &one, sizeof one);
        (void)written;
    } else {
        (void)pthread_cond_signal(&waiter->wake);
    }
}

void exchange_notify(ice_client *client)
{
    for (struct waiter *waiter = client->waiters; waiter != NULL; waiter = waiter->next) {
        if (lost(client, waiter) || waiter->ready(waiter->argument)) {
            wake(client, waiter);
        }
    }
}

static void waiter_add(ice_client *client, struct waiter *waiter)
{
    waiter->previous = NULL;
    waiter->next = client->waiters;
    if (waiter->next != NULL) {
        waiter->next->previous = waiter;
    }
    client->waiters = waiter;
}

static void waiter_remove(ice_client *client, struct waiter *waiter)
{
    if (waiter->next != NULL) {
        waiter->next->previous = waiter->previous;
    }
    if (waiter->previous != NULL) {
        waiter->previous->next = waiter->next;
    } else {
        client->waiters = waiter->next;
    }
    if (client->receiver == NULL && client->waiters != NULL) {
        wake(client, client->waiters);
    }
}

// Both with the lock held on both sides of the wait; an error or a signal is one more turn.
static void wait_for_socket(ice_client *client, uint64_t until_us)
{
    struct pollfd polled[] = {
        {.fd = client->session.socket_fd, .events = POLLIN},
        {.fd = client->session.control_fd, .events = POLLIN},
        {.fd = client->wake_fd, .events = POLLIN},
    };
    (void)pthread_mutex_unlock(&client->lock);
    (void)poll(polled, 3, clock_left_ms(until_us));
    (void)pthread_mutex_lock(&client->lock);
}

static void wait_for_ring(ice_client *client, uint64_t until_us)
{
    struct client_ring *ring = client->session.ring; // reconnect replaces it only when nobody receives
    if (client->ring_spin_us > 0) {
        const uint64_t seen = ring->replies.peer;
        (void)pthread_mutex_unlock(&client->lock);
        ring_spin(ring, seen, client->ring_spin_us);
        (void)pthread_mutex_lock(&client->lock);
    }
    if (!ring_may_wait(ring)) {
        return;
    }
    (void)pthread_mutex_unlock(&client->lock);
    ring_wait(ring, clock_left_ms(until_us));
    (void)pthread_mutex_lock(&client->lock);
}

// One turn as the receiver: empty the socket, poll with the lock released, take in what came.
static void receive_turn(ice_client *client, struct waiter *self, uint64_t until_us)
{
    exchange_pump(client);
    if (lost(client, self) || self->ready(self->argument)) {
        return;
    }
    client->receiver = self;
    if (client->session.ring != NULL) {
        wait_for_ring(client, until_us);
    } else {
        wait_for_socket(client, until_us);
    }
    client->receiver = NULL;
    (void)pthread_cond_signal(&client->receiver_left);
    uint64_t count;
    ssize_t consumed = read(client->wake_fd, &count, sizeof count);
    (void)consumed;
    if (lost(client, self)) {
        return;
    }
    exchange_pump(client);
    exchange_pump_control(client);
}

static void sleep_turn(ice_client *client, struct waiter *self, uint64_t until_us)
{
    struct timespec until = {
        .tv_sec = (time_t)(until_us / 1000000u),
        .tv_nsec = (long)(until_us % 1000000u) * 1000,
    };
    (void)pthread_cond_clockwait(&self->wake, &client->lock, CLOCK_MONOTONIC, &until);
}

ice_status exchange_wait_until(ice_client *client, uint64_t generation, bool (*ready)(void *argument), void *argument,
                               uint64_t until_us)
{
    if (ready(argument)) {
        return ICE_OK;
    }
    struct waiter self = {.ready = ready, .argument = argument, .generation = generation};
    if (pthread_cond_init(&self.wake, NULL) != 0) {
        return error_set(ICE_NO_MEMORY, "no memory for a condition variable");
    }
    waiter_add(client, &self);
    ice_status status = ICE_OK;
    bool looked = false; // behind the deadline
    while (!ready(argument)) {
        if (lost(client, &self)) {
            status = error_set(ICE_DISCONNECTED, "%s",
                               client->dead ? client->dead_text : "the session was replaced by ice_client_reconnect");
            break;
        }
        if (looked) {
            status = error_set(ICE_TIMEOUT, "%s", status_text(ICE_TIMEOUT));
            break;
        }
        if (clock_us() >= until_us) {
            exchange_pump(client);
            exchange_pump_control(client);
            looked = true;
        } else if (client->receiver == NULL) {
            receive_turn(client, &self, until_us);
        } else {
            sleep_turn(client, &self, until_us);
        }
    }
    waiter_remove(client, &self);
    (void)pthread_cond_destroy(&self.wake);
    return status;
}
