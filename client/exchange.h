// The traffic of one client: requests out, replies back to whom they belong, and the waiting in between.
#ifndef ICECACHE_CLIENT_EXCHANGE_H
#define ICECACHE_CLIENT_EXCHANGE_H

#include "client/icecache.h"

#include "client/session.h"
#include "client/watchdog.h"
#include "proto/control.h"
#include "proto/limits.h"
#include "proto/wire.h"

#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <sys/types.h>
#include <zmq.h>

#define EXCHANGE_REQUESTS_MAX 256u // a power of two: the low bits of a request id are its place in the table

struct staging;
struct vectors;

// A thread that waits for something that only a reply (or another thread) can bring about. On the waiter's stack.
struct waiter {
    bool (*ready)(void *argument); // called with the lock held, by any thread
    void *argument;
    uint64_t generation;
    pthread_cond_t wake;
    struct waiter *previous, *next;
};

// A request whose reply is outstanding or has come. Owned by its caller; by the table from exchange_abandon until the
// reply.
struct pending {
    uint64_t id;
    bool control; // sent on the control socket, where its reply comes too
    bool done, abandoned;
    ice_status status; // valid when done, like the text and the reply
    char text[WIRE_TEXT_BYTES_MAX + 1];
    Icecache__Wire__Reply *reply;                // data plane; NULL where none came
    Icecache__Wire__ControlReply *control_reply; // control socket; NULL where none came
    int fd;                                      // came with the control reply; -1: none

    ice_landing *landing; // whose rows belong to the daemon until the reply; NULL: none
    uint32_t *rows;
    uint32_t row_count;
    // The rows stay taken until the landing has its copy (pull.c; stream.c where it is issued in the worker's stream);
    // for good where its end cannot be known (PULL_LOST).
    enum { PULL_NONE, PULL_DUE, PULL_ISSUED, PULL_LOST, PULL_STREAM } pull;
    struct staging *staging; // part of the staging area that the daemon uses until the reply; NULL: none
    uint32_t staging_half;
    bool opens_staging; // the reply is the staging area itself, for all threads
};

// A link in one of the client's lists of open handles. First member of each handle.
struct handle {
    struct handle *previous, *next;
};

struct ice_client {
    // Constant after connect.
    pid_t pid;
    char directory[108];
    char name[WIRE_NAME_BYTES_MAX + 1];
    char name_space[WIRE_NAME_BYTES_MAX + 1]; // empty: any
    uint64_t deadline_us, staging_bytes;
    enum ice_transport transport;
    uint64_t ring_spin_us;
    void *context; // ZeroMQ's
    int wake_fd;   // eventfd: ends the receiver's poll
    _Atomic uint64_t boot_token;
    struct watchdog watchdog; // has its own lock

    // Everything below is guarded by the lock, which is never held while sleeping.
    pthread_mutex_t lock;
    struct session session;
    uint64_t generation; // of the session; handles carry the one that they were made in
    bool dead, reconnecting;
    bool writable; // the data socket, or the ring, took messages when it was last looked at
    char dead_text[256];

    struct waiter *waiters;
    struct waiter *receiver;      // the waiter that polls, with the lock released; NULL: nobody
    pthread_cond_t receiver_left; // for reconnect, which replaces what the receiver polls

    uint64_t request_count;
    uint32_t pending_count;
    struct pending *table[EXCHANGE_REQUESTS_MAX];

    struct staging *staging;
    bool staging_opening;
    ice_status staging_status; // why there is none
    char staging_text[WIRE_TEXT_BYTES_MAX + 1];

    struct vectors *vectors; // ways of queries from GPUs, one for each; owned (vectors.c)

    struct handle landings, sequences, tickets; // list heads
};

void handle_list_init(struct handle *head);
void handle_link(struct handle *head, struct handle *handle);
void handle_unlink(struct handle *handle);

// NULL and fork checks, before anything else is touched.
ICE_MUST_CHECK ice_status client_check(const ice_client *client);
bool client_is_forked(const ice_client *client);
// The absolute end of a call that starts now.
uint64_t client_until(const ice_client *client, uint64_t deadline_us);
// Of the session as it is now: its generation, and the largest frame of vectors that its daemon takes.
// The namespace of a call: as given, NULL: the client's, else the default.
const char *client_name_space(const ice_client *client, const char *given);
uint64_t client_generation(ice_client *client);
uint64_t client_vectors_bytes_max(ice_client *client);

// With the lock held: may a handle of this generation be used?
ICE_MUST_CHECK ice_status exchange_check(const ice_client *client, uint64_t generation);

// Heap record of a request. NULL: no memory (the error is set).
struct pending *pending_create(void);
// Accepts NULL. Not for a record that the table still holds.
void pending_destroy(struct pending *pending);

// All exchange_* below: with the lock held; those that take until_us may release it while they wait.

// Sends a request (its id and session are filled in here) with up to one frame of vectors (consumed on success, may be
// NULL). On success the table knows the record; on failure nothing has been sent and the record is the caller's.
ICE_MUST_CHECK ice_status exchange_submit(ice_client *client, uint64_t generation, Icecache__Wire__Request *request,
                                          zmq_msg_t *vectors, struct pending *pending, uint64_t until_us);
ICE_MUST_CHECK ice_status exchange_submit_control(ice_client *client, uint64_t generation,
                                                  Icecache__Wire__ControlRequest *request, struct pending *pending);
// With descriptors beside the request, borrowed.
ICE_MUST_CHECK ice_status exchange_submit_descriptors(ice_client *client, uint64_t generation,
                                                      Icecache__Wire__ControlRequest *request, const int *fds,
                                                      uint32_t count, struct pending *pending);
// Waits until the record is done. ICE_TIMEOUT, else the reply's status, with its text as the last error.
ICE_MUST_CHECK ice_status exchange_wait(ice_client *client, uint64_t generation, struct pending *pending,
                                        uint64_t until_us);
// The caller's interest ends: destroys the record now, or when its reply has come.
void exchange_abandon(ice_client *client, struct pending *pending);
// Waits until ready(argument). ICE_TIMEOUT or ICE_DISCONNECTED otherwise, with a text.
ICE_MUST_CHECK ice_status exchange_wait_until(ice_client *client, uint64_t generation, bool (*ready)(void *argument),
                                              void *argument, uint64_t until_us);
// Takes in what has already arrived on the data socket, without waiting.
void exchange_pump(ice_client *client);
// The same for the control socket; its end is the end of the session.
void exchange_pump_control(ice_client *client);
// Wakes the waiters whose condition now holds.
void exchange_notify(ice_client *client);
// Ends the session here: all outstanding requests answer ICE_DISCONNECTED with this text.
void exchange_die(ice_client *client, const char *text);

// Without the lock: submits, waits and hands out the reply's record, also where the daemon refused (its status is the
// answer then). On success and refusal *out is the caller's; NULL where no reply came.
ICE_MUST_CHECK ice_status exchange_call(ice_client *client, uint64_t generation, Icecache__Wire__Request *request,
                                        uint64_t until_us, struct pending **out);
// The same with a frame of vectors (may be NULL), which is consumed in every case.
ICE_MUST_CHECK ice_status exchange_call_vectors(ice_client *client, uint64_t generation,
                                                Icecache__Wire__Request *request, zmq_msg_t *vectors, uint64_t until_us,
                                                struct pending **out);

#endif
