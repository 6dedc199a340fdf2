// Connecting, closing and reconnecting, and the checks that every call begins with.
//
// A client belongs to the process that made it: every call compares the process id before it touches a lock or a
// socket, because in a forked child another thread's lock may stay locked for ever and ZeroMQ's threads do not exist.
#include "client/error.h"
#include "client/exchange.h"
#include "client/handles.h"
#include "client/ring.h"
#include "client/staging.h"
#include "client/vectors.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>

#define DEADLINE_DEFAULT_US   5000000u
#define STAGING_DEFAULT_BYTES (64u << 20)
#define RING_SPIN_US_MAX      1000u
#define CONTEXT_SOCKETS_MAX   64 // one, and old ones that ZeroMQ's reaper has not closed yet

void handle_list_init(struct handle *head)
{
    head->previous = head->next = head;
}

void handle_link(struct handle *head, struct handle *handle)
{
    handle->previous = head->previous;
    handle->next = head;
    head->previous->next = handle;
    head->previous = handle;
}

void handle_unlink(struct handle *handle)
{
    handle->previous->next = handle->next;
    handle->next->previous = handle->previous;
}

bool client_is_forked(const ice_client *client)
{
    return client->pid != getpid();
}

ice_status client_check(const ice_client *client)
{
    if (client == NULL) {
        return error_set(ICE_INVALID_ARGUMENT, "the client is NULL");
    }
    if (client_is_forked(client)) {
        return error_set(ICE_FORKED, "the client was made by process %ld; connect in this one", (long)client->pid);
    }
    return ICE_OK;
}

uint64_t client_until(const ice_client *client, uint64_t deadline_us)
{
    uint64_t now_us = clock_us();
    uint64_t wanted_us = deadline_us != 0 ? deadline_us : client->deadline_us;
    uint64_t most_us = INT64_MAX / 1000u; // what a timespec and the arithmetic on it hold
    return wanted_us < most_us - now_us ? now_us + wanted_us : most_us;
}

const char *client_name_space(const ice_client *client, const char *given)
{
    if (given != NULL) {
        return given;
    }
    return client->name_space[0] != '\0' ? client->name_space : WIRE_NAME_SPACE_DEFAULT;
}

uint64_t client_generation(ice_client *client)
{
    (void)pthread_mutex_lock(&client->lock);
    uint64_t generation = client->generation;
    (void)pthread_mutex_unlock(&client->lock);
    return generation;
}

uint64_t client_vectors_bytes_max(ice_client *client)
{
    (void)pthread_mutex_lock(&client->lock);
    uint64_t most = client->session.vectors_bytes_max;
    (void)pthread_mutex_unlock(&client->lock);
    return most != 0 ? most : WIRE_VECTORS_BYTES_MAX; // 0: no session; the submit says so
}

// ---- connect ----

// A program may be called anything; the daemon takes printable ASCII.
static void name_from_program(char *name, size_t capacity)
{
    (void)strncpy(name, program_invocation_short_name, capacity - 1);
    for (char *c = name; *c != '\0'; c++) {
        if (*c < 0x20 || *c > 0x7e) {
            *c = '?';
        }
    }
}

static ice_status transport_apply(ice_client *client, const struct ice_client_options *given)
{
    client->transport = given->transport;
    client->ring_spin_us = given->ring_spin_us;
    if (given->transport > ICE_TRANSPORT_RING) {
        return error_set(ICE_INVALID_ARGUMENT, "transport is %u; take one of enum ice_transport",
                         (unsigned)given->transport);
    }
    if (given->ring_spin_us > RING_SPIN_US_MAX) {
        return error_set(ICE_TOO_LARGE, "ring_spin_us is %u, the limit is %u", given->ring_spin_us, RING_SPIN_US_MAX);
    }
    const char *named = getenv("ICECACHE_TRANSPORT");
    if (given->transport != ICE_TRANSPORT_AUTO || named == NULL || *named == '\0' || strcmp(named, "auto") == 0) {
        return ICE_OK;
    }
    if (strcmp(named, "zmq") != 0 && strcmp(named, "ring") != 0) {
        return error_set(ICE_INVALID_ARGUMENT, "$ICECACHE_TRANSPORT is %.32s; it may be auto, zmq or ring", named);
    }
    client->transport = strcmp(named, "zmq") == 0 ? ICE_TRANSPORT_ZMQ : ICE_TRANSPORT_RING;
    return ICE_OK;
}

static ice_status options_apply(ice_client *client, const struct ice_client_options *options)
{
    static const struct ice_client_options none;
    const struct ice_client_options *given = options != NULL ? options : &none;
    client->deadline_us = given->deadline_us != 0 ? given->deadline_us : DEADLINE_DEFAULT_US;
    client->staging_bytes = given->staging_bytes != 0 ? given->staging_bytes : STAGING_DEFAULT_BYTES;

    ice_status status = transport_apply(client, given);
    if (status != ICE_OK) {
        return status;
    }
    if (given->name == NULL) {
        name_from_program(client->name, sizeof client->name);
    } else if (strlen(given->name) > WIRE_NAME_BYTES_MAX) {
        return error_set(ICE_TOO_LARGE, "name has %zu bytes, the limit is %u", strlen(given->name),
                         WIRE_NAME_BYTES_MAX);
    } else {
        memcpy(client->name, given->name, strlen(given->name) + 1);
    }

    if (given->name_space != NULL) {
        if (given->name_space[0] == '\0' || strlen(given->name_space) > WIRE_NAME_BYTES_MAX) {
            return error_set(ICE_INVALID_ARGUMENT, "name_space is empty or longer than %u bytes", WIRE_NAME_BYTES_MAX);
        }
        memcpy(client->name_space, given->name_space, strlen(given->name_space) + 1);
    }

    if (given->socket_directory == NULL) {
        status = control_default_directory(client->directory, sizeof client->directory);
        if (status != ICE_OK) {
            return error_set(status, "the default socket directory ($ICECACHE_SOCKET_DIR) is too long");
        }
    } else if (strlen(given->socket_directory) >= sizeof client->directory) {
        return error_set(ICE_TOO_LARGE, "socket_directory has %zu bytes, more than a socket address holds",
                         strlen(given->socket_directory));
    } else {
        memcpy(client->directory, given->socket_directory, strlen(given->socket_directory) + 1);
    }
    return ICE_OK;
}

static ice_status context_create(void **out)
{
    void *context = zmq_ctx_new();
    if (context == NULL) {
        return error_set(ICE_SYSTEM, "zmq_ctx_new: %s", zmq_strerror(errno));
    }
    if (zmq_ctx_set(context, ZMQ_IO_THREADS, 1) != 0 ||
        zmq_ctx_set(context, ZMQ_MAX_SOCKETS, CONTEXT_SOCKETS_MAX) != 0 || zmq_ctx_set(context, ZMQ_BLOCKY, 0) != 0) {
        (void)zmq_ctx_term(context);
        return error_set(ICE_SYSTEM, "zmq_ctx_set: %s", zmq_strerror(errno));
    }
    *out = context;
    return ICE_OK;
}

static ice_status locks_init(ice_client *client)
{
    if (pthread_mutex_init(&client->lock, NULL) != 0) {
        return error_set(ICE_NO_MEMORY, "no memory for a mutex");
    }
    if (pthread_cond_init(&client->receiver_left, NULL) != 0) {
        (void)pthread_mutex_destroy(&client->lock);
        return error_set(ICE_NO_MEMORY, "no memory for a condition variable");
    }
    const ice_status status = watchdog_init(&client->watchdog);
    if (status != ICE_OK) {
        (void)pthread_cond_destroy(&client->receiver_left);
        (void)pthread_mutex_destroy(&client->lock);
    }
    return status;
}

static void context_destroy(void *context)
{
    // Returns at once with LINGER 0; EINTR says try again.
    while (zmq_ctx_term(context) != 0 && errno == EINTR) {
    }
}

static ice_status connect_now(const ice_client *client, struct session *session)
{
    const struct session_options options = {client->context,    client->directory, client->name,
                                            client->name_space, client->transport, client->wake_fd};
    return session_connect(session, &options, client_until(client, 0));
}

static ice_status client_init(ice_client *client, const struct ice_client_options *options)
{
    client->pid = getpid();
    session_init(&client->session);
    handle_list_init(&client->landings);
    handle_list_init(&client->sequences);
    handle_list_init(&client->tickets);
    ice_status status = options_apply(client, options);
    if (status != ICE_OK) {
        return status;
    }
    status = locks_init(client);
    if (status != ICE_OK) {
        return status;
    }
    client->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (client->wake_fd < 0) {
        status = error_set(ICE_SYSTEM, "eventfd: %s", strerror(errno));
        goto no_eventfd;
    }
    status = context_create(&client->context);
    if (status != ICE_OK) {
        goto no_context;
    }
    status = connect_now(client, &client->session);
    if (status != ICE_OK) {
        goto no_session;
    }
    client->generation = 1;
    watchdog_session(&client->watchdog, client->session.control_fd);
    atomic_store(&client->boot_token, client->session.boot_token);
    return ICE_OK;

no_session:
    context_destroy(client->context);
no_context:
    (void)close(client->wake_fd);
no_eventfd:
    watchdog_fini(&client->watchdog);
    (void)pthread_cond_destroy(&client->receiver_left);
    (void)pthread_mutex_destroy(&client->lock);
    return status;
}

ice_status ice_client_connect(const struct ice_client_options *options, ice_client **out)
{
    error_clear();
    if (out == NULL) {
        return error_set(ICE_INVALID_ARGUMENT, "out is NULL");
    }
    ice_client *client = calloc(1, sizeof *client);
    if (client == NULL) {
        return error_set(ICE_NO_MEMORY, "no memory for a client");
    }
    ice_status status = client_init(client, options);
    if (status != ICE_OK) {
        free(client);
        return status;
    }
    *out = client;
    return ICE_OK;
}

// ---- close ----

// In a forked child: nothing that the parent shares is touched. ZeroMQ's own memory and descriptors stay until exit.
static void close_forked(ice_client *client)
{
    if (client->session.control_fd >= 0) {
        (void)close(client->session.control_fd);
    }
    ring_close_forked(client->session.ring);
    (void)close(client->wake_fd);
    watchdog_close_forked(&client->watchdog);
    free(client); // the staging area is not mapped in a child (MADV_DONTFORK)
}

void ice_client_close(ice_client *client)
{
    if (client == NULL) {
        return;
    }
    if (client_is_forked(client)) {
        close_forked(client);
        return;
    }
    gpu_close_pushed(client);
    (void)pthread_mutex_lock(&client->lock);
    exchange_die(client, "the client was closed");
    (void)pthread_mutex_unlock(&client->lock);
    while (client->tickets.next != &client->tickets) {
        ice_ticket_close((ice_ticket *)client->tickets.next);
    }
    while (client->sequences.next != &client->sequences) {
        ice_sequence_close((ice_sequence *)client->sequences.next);
    }
    while (client->landings.next != &client->landings) {
        ice_landing_close((ice_landing *)client->landings.next);
    }
    vectors_close(client);
    watchdog_fini(&client->watchdog); // before the socket that it polls goes
    session_close(&client->session);
    context_destroy(client->context);
    (void)close(client->wake_fd);
    (void)pthread_cond_destroy(&client->receiver_left);
    (void)pthread_mutex_destroy(&client->lock);
    free(client);
}

// ---- reconnect ----

// Takes the old session out, once nobody polls its sockets. The client is dead meanwhile, so nobody else uses them.
static ice_status session_take(ice_client *client, struct session *old)
{
    (void)pthread_mutex_lock(&client->lock);
    if (client->reconnecting) {
        (void)pthread_mutex_unlock(&client->lock);
        return error_set(ICE_BUSY, "another thread is reconnecting this client");
    }
    client->reconnecting = true;
    exchange_die(client, "the session was given up by ice_client_reconnect");
    while (client->receiver != NULL) {
        (void)pthread_cond_wait(&client->receiver_left, &client->lock);
    }
    *old = client->session;
    session_init(&client->session);
    (void)pthread_mutex_unlock(&client->lock);
    return ICE_OK;
}

ice_status ice_client_reconnect(ice_client *client)
{
    error_clear();
    ice_status status = client_check(client);
    if (status != ICE_OK) {
        return status;
    }
    struct session session;
    status = session_take(client, &session);
    if (status != ICE_OK) {
        return status;
    }
    watchdog_session(&client->watchdog, -1);
    session_close(&session);
    status = connect_now(client, &session);

    (void)pthread_mutex_lock(&client->lock);
    client->reconnecting = false;
    if (status == ICE_OK) {
        client->session = session;
        client->generation++;
        client->dead = false;
        client->writable = true;
        atomic_store(&client->boot_token, session.boot_token);
        watchdog_session(&client->watchdog, session.control_fd);
    }
    (void)pthread_mutex_unlock(&client->lock);
    return status;
}

uint64_t ice_client_boot_token(const ice_client *client)
{
    return client == NULL || client_is_forked(client) ? 0 : atomic_load(&client->boot_token);
}
