// A scripted daemon in the test's own process: a SEQPACKET listener and a ROUTER, served by one thread. It answers
// everything at once, except the kinds of request that the test holds back and answers later, in the order it likes.
// Where the test sets ring_bytes the session has rings instead of the ROUTER.
//
// The sockets belong to the thread; everything else is guarded by the lock. Include after client/icecache.h.
#ifndef ICECACHE_TESTS_CLIENT_FAKE_H
#define ICECACHE_TESTS_CLIENT_FAKE_H

#include "client_fake_ring.h"

#include "proto/control.h"
#include "proto/dtype.h"
#include "proto/limits.h"
#include "proto/shm.h"
#include "proto/wire.h"

#include <assert.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>
#include <zmq.h>

// ZeroMQ is not built with the sanitizer, which cannot see that it hands memory from thread to thread by atomics.
__attribute__((visibility("default"))) const char *__tsan_default_suppressions(void);
const char *__tsan_default_suppressions(void)
{
    return "called_from_lib:libzmq.so\nrace:libzmq.so\nrace:libstdc++.so\n";
}

#define FAKE_CHECK(condition)                                                                                          \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition);                                            \
            abort();                                                                                                   \
        }                                                                                                              \
    } while (0)

#define FAKE_HELD_MAX    512
#define FAKE_APPENDS_MAX 256
#define FAKE_PEERS_MAX   8

// A request that the test answers.
struct fake_held {
    uint8_t identity[64];
    size_t identity_bytes; // 0: it came by the ring
    uint64_t request_id;
    int kind; // body_case
    uint32_t heads;
    bool answered;
};

struct fake_append {
    uint32_t layer, layers, tokens;
    uint64_t first, offset, reserve;
    uint8_t *bytes; // what lay in the staging
    size_t size;
};

enum fake_command { FAKE_NONE, FAKE_LOOK, FAKE_ANSWER, FAKE_HANG_UP, FAKE_STOP };

struct fake {
    char directory[64], control_path[108], endpoint[128];
    pthread_t thread;
    int listener, wake;
    int peers[FAKE_PEERS_MAX];
    void *context, *router;
    struct fake_ring ring;

    pthread_mutex_t lock;
    pthread_cond_t changed;
    enum fake_command command;
    size_t command_index;
    uint64_t boot_token, wrong_boot_token; // the second, if set, goes into replies
    uint64_t session_id;
    uint8_t session_token[WIRE_SESSION_TOKEN_BYTES];
    uint32_t hold; // bit per body_case of data requests
    struct fake_held held[FAKE_HELD_MAX];
    size_t held_count;
    struct fake_append appends[FAKE_APPENDS_MAX];
    size_t append_count, append_fail_at; // the append with this index + 1 is refused
    uint32_t kv_heads, head_dim, row_bytes;
    uint32_t sequences_closed, landings_opened, landings_closed, sequences_opened, hellos;
    bool refuse_staging, unsealed_staging, refuse_hello, short_hello, garbled;
    ice_status retrieve_status, prefix_status; // prefix_status: of seals, lookups, attaches and removals
    uint64_t prefix_tokens;                    // what their replies say
    uint64_t tokens_max, prefix_removed;       // of the last attach and removal
    char name_space[32], hello_name_space[32]; // of the last lookup or removal, and of the last hello
    bool all_ranks;                            // of the last lookup
    uint64_t sealed_sequence;                  // of the last seal
    uint32_t block_tokens;                     // of the last lookup or attach
    bool no_body;                              // their replies have none
    uint64_t deadline_us;                      // of the last retrieve
    size_t vectors_bytes;                      // of the last message that had any
    uint8_t vectors[4096];
    uint64_t ring_bytes;        // of rings, a size that there is; 0: none are offered
    bool ring_deaf, ring_quiet; // takes no requests; wakes nobody for a reply
    bool ring_deafens;          // becomes deaf behind the next request
    uint8_t *staging, *landing;
    size_t staging_bytes, landing_bytes;
    struct landing_shape shape;
    struct landing_layout layout;
};

// The byte that a read returns for element byte `b` of (layer, head, position), K or V.
static inline uint8_t fake_byte(uint32_t layer, uint32_t head, uint64_t position, uint32_t b, bool value)
{
    return (uint8_t)(layer * 31u + head * 7u + (uint32_t)position * 3u + b + (value ? 128u : 0u));
}

// ---- control socket ----

static inline int fake_memfd(size_t bytes, bool sealed, uint8_t **mapping)
{
    int fd = memfd_create("fake", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    FAKE_CHECK(fd >= 0 && ftruncate(fd, (off_t)bytes) == 0);
    FAKE_CHECK(!sealed || fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) == 0);
    *mapping = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    FAKE_CHECK(*mapping != MAP_FAILED);
    return fd;
}

static inline void fake_control_send(int peer, const Icecache__Wire__ControlReply *reply, int fd)
{
    uint8_t packet[WIRE_CONTROL_BYTES_MAX];
    size_t size = icecache__wire__control_reply__pack(reply, packet);
    ice_status status = control_send(peer, packet, size, fd, 1000);
    (void)status;
    if (fd >= 0) {
        close(fd);
    }
}

static inline void fake_hello(struct fake *fake, int peer, Icecache__Wire__ControlReply *reply)
{
    Icecache__Wire__HelloReply hello = ICECACHE__WIRE__HELLO_REPLY__INIT;
    fake->hellos++;
    fake->session_id++;
    memset(fake->session_token, (int)fake->session_id, sizeof fake->session_token);
    hello.boot_token = fake->boot_token;
    hello.session_id = fake->session_id;
    hello.session_token.data = fake->session_token;
    hello.session_token.len = sizeof fake->session_token;
    hello.endpoint = fake->short_hello ? (char *)(uintptr_t) "tcp://127.0.0.1:1" : fake->endpoint;
    hello.inflight_max = 64;
    hello.vectors_bytes_max = 1 << 20;
    hello.ring_bytes = fake->ring_bytes;
    reply->body_case = ICECACHE__WIRE__CONTROL_REPLY__BODY_HELLO;
    reply->hello = &hello;
    if (fake->refuse_hello) {
        reply->body_case = ICECACHE__WIRE__CONTROL_REPLY__BODY__NOT_SET;
        reply->status = ICE_VERSION_MISMATCH;
        reply->text = (char *)(uintptr_t) "speak version 2";
    }
    fake_control_send(peer, reply, -1);
}

static inline void fake_staging(struct fake *fake, int peer, uint64_t bytes, Icecache__Wire__ControlReply *reply)
{
    Icecache__Wire__StagingReply staging = ICECACHE__WIRE__STAGING_REPLY__INIT;
    int fd = -1;
    if (fake->refuse_staging) {
        reply->status = ICE_SHARED_FULL;
        reply->text = (char *)(uintptr_t) "no shared memory is left";
    } else {
        if (fake->staging != NULL) {
            munmap(fake->staging, fake->staging_bytes);
        }
        fake->staging_bytes = bytes;
        fd = fake_memfd(bytes, !fake->unsealed_staging, &fake->staging);
        staging.bytes = bytes;
        reply->body_case = ICECACHE__WIRE__CONTROL_REPLY__BODY_STAGING;
        reply->staging = &staging;
    }
    fake_control_send(peer, reply, fd);
}

static inline void fake_landing(struct fake *fake, int peer, const Icecache__Wire__LandingOpen *open,
                                Icecache__Wire__ControlReply *reply)
{
    Icecache__Wire__LandingReply landing = ICECACHE__WIRE__LANDING_REPLY__INIT;
    fake->shape =
        (struct landing_shape){open->rows, open->layers, open->kv_heads, open->slots, open->head_dim, open->dtype};
    FAKE_CHECK(landing_layout_init(&fake->layout, &fake->shape));
    if (fake->landing != NULL) {
        munmap(fake->landing, fake->landing_bytes);
    }
    fake->landing_bytes = fake->layout.total_bytes;
    int fd = fake_memfd(fake->landing_bytes, true, &fake->landing);
    landing.landing_id = 5 + fake->landings_opened++;
    landing.bytes = fake->layout.total_bytes;
    reply->body_case = ICECACHE__WIRE__CONTROL_REPLY__BODY_LANDING;
    reply->landing = &landing;
    fake_control_send(peer, reply, fd);
}

static inline void fake_rings(struct fake *fake, int peer, Icecache__Wire__ControlReply *reply)
{
    Icecache__Wire__RingReply rings = ICECACHE__WIRE__RING_REPLY__INIT;
    uint8_t packet[WIRE_CONTROL_BYTES_MAX];
    int fds[FAKE_RING_FDS];
    FAKE_CHECK(fake_ring_open(&fake->ring, fake->ring_bytes, fds));
    rings.bytes = fake->ring_bytes;
    reply->body_case = ICECACHE__WIRE__CONTROL_REPLY__BODY_RING;
    reply->ring = &rings;
    size_t size = icecache__wire__control_reply__pack(reply, packet);
    FAKE_CHECK(control_send_all(peer, packet, size, fds, FAKE_RING_FDS, 1000) == ICE_OK);
    for (int i = 0; i < FAKE_RING_FDS; i++) {
        close(fds[i]);
    }
}

// false: the peer is gone.
static inline bool fake_control(struct fake *fake, int peer)
{
    uint8_t packet[WIRE_CONTROL_BYTES_MAX], memory[16384];
    size_t size;
    int fd;
    if (control_receive(peer, packet, sizeof packet, &size, &fd, 0) != ICE_OK) {
        return false;
    }
    struct wire_arena arena;
    struct wire_error error;
    uint64_t id;
    wire_arena_init(&arena, memory, sizeof memory);
    Icecache__Wire__ControlRequest *request = NULL;
    FAKE_CHECK(wire_control_request_decode(packet, size, &arena, &request, &id, &error) == ICE_OK);
    Icecache__Wire__ControlReply reply = ICECACHE__WIRE__CONTROL_REPLY__INIT;
    reply.request_id = id;
    switch (request->body_case) {
    case ICECACHE__WIRE__CONTROL_REQUEST__BODY_HELLO:
        snprintf(fake->hello_name_space, sizeof fake->hello_name_space, "%s", request->hello->name_space);
        fake_hello(fake, peer, &reply);
        break;
    case ICECACHE__WIRE__CONTROL_REQUEST__BODY_STAGING_OPEN:
        fake_staging(fake, peer, request->staging_open->bytes, &reply);
        break;
    case ICECACHE__WIRE__CONTROL_REQUEST__BODY_LANDING_OPEN:
        fake_landing(fake, peer, request->landing_open, &reply);
        break;
    case ICECACHE__WIRE__CONTROL_REQUEST__BODY_RING_OPEN:
        fake_rings(fake, peer, &reply);
        break;
    default:
        fake->landings_closed++;
        fake_control_send(peer, &reply, -1);
        break;
    }
    return true;
}

// ---- data socket ----

static inline void fake_send(struct fake *fake, const struct fake_held *to, Icecache__Wire__Reply *reply)
{
    uint8_t bytes[65536];
    reply->request_id = to->request_id;
    reply->boot_token = fake->wrong_boot_token != 0 ? fake->wrong_boot_token : fake->boot_token;
    FAKE_CHECK(icecache__wire__reply__get_packed_size(reply) <= sizeof bytes);
    size_t size = icecache__wire__reply__pack(reply, bytes);
    if (to->identity_bytes == 0) {
        fake_ring_send(&fake->ring, bytes, fake->garbled ? 2 : size, fake->ring_quiet);
        return;
    }
    (void)zmq_send(fake->router, to->identity, to->identity_bytes, ZMQ_SNDMORE | ZMQ_DONTWAIT);
    (void)zmq_send(fake->router, bytes, fake->garbled ? 2 : size, ZMQ_DONTWAIT);
}

// Every head gets `request_id` tokens (modulo the slots) in row 0's cells, so that a test can tell replies apart.
static inline void fake_answer_retrieve(struct fake *fake, const struct fake_held *to)
{
    Icecache__Wire__RetrieveReply found = ICECACHE__WIRE__RETRIEVE_REPLY__INIT;
    uint32_t counts[256];
    float masses[256];
    uint64_t indexed[256], versions[256];
    for (uint32_t i = 0; i < to->heads; i++) {
        counts[i] = i;
        masses[i] = 0.5f;
        indexed[i] = to->request_id;
        versions[i] = i + 1;
    }
    found.counts = found.changed = counts;
    found.masses = masses;
    found.indexed = indexed;
    found.versions = versions;
    found.n_counts = found.n_changed = found.n_masses = found.n_indexed = found.n_versions = to->heads;
    found.bytes_moved = 77;
    Icecache__Wire__Reply reply = ICECACHE__WIRE__REPLY__INIT;
    reply.body_case = ICECACHE__WIRE__REPLY__BODY_RETRIEVE;
    reply.retrieve = &found;
    if (fake->retrieve_status != ICE_OK) {
        reply.status = (uint32_t)fake->retrieve_status;
        reply.text = (char *)(uintptr_t) "the daemon's own words";
        reply.body_case = ICECACHE__WIRE__REPLY__BODY__NOT_SET;
    } else if (fake->landing != NULL) {
        uint32_t three[3] = {30, 10, 20};
        memcpy(fake->landing + fake->layout.counts_offset, &(uint32_t){3}, 4);
        memcpy(fake->landing + fake->layout.positions_offset, three, sizeof three);
        fake->landing[0] = 42;
        fake->landing[fake->layout.side_bytes] = 43;
    }
    fake_send(fake, to, &reply);
}

static inline void fake_answer_prefix(struct fake *fake, const struct fake_held *to)
{
    Icecache__Wire__Reply reply = ICECACHE__WIRE__REPLY__INIT;
    Icecache__Wire__SealReply seal = ICECACHE__WIRE__SEAL_REPLY__INIT;
    Icecache__Wire__LookupReply lookup = ICECACHE__WIRE__LOOKUP_REPLY__INIT;
    Icecache__Wire__AttachReply attach = ICECACHE__WIRE__ATTACH_REPLY__INIT;
    seal.prefix_id = 900;
    seal.known = 1;
    seal.tokens = lookup.tokens = attach.tokens = fake->prefix_tokens;
    if (fake->prefix_status != ICE_OK) {
        reply.status = (uint32_t)fake->prefix_status;
        reply.text = (char *)(uintptr_t) "the disk is not well";
    } else if (fake->no_body || to->kind == ICECACHE__WIRE__REQUEST__BODY_PREFIX_REMOVE) {
        reply.body_case = ICECACHE__WIRE__REPLY__BODY__NOT_SET;
    } else if (to->kind == ICECACHE__WIRE__REQUEST__BODY_SEAL) {
        reply.body_case = ICECACHE__WIRE__REPLY__BODY_SEAL;
        reply.seal = &seal;
    } else if (to->kind == ICECACHE__WIRE__REQUEST__BODY_LOOKUP) {
        reply.body_case = ICECACHE__WIRE__REPLY__BODY_LOOKUP;
        reply.lookup = &lookup;
    } else {
        attach.sequence_id = 100 + fake->sequences_opened++;
        reply.body_case = ICECACHE__WIRE__REPLY__BODY_ATTACH;
        reply.attach = &attach;
    }
    fake_send(fake, to, &reply);
}

static inline void fake_answer(struct fake *fake, const struct fake_held *to)
{
    Icecache__Wire__Reply reply = ICECACHE__WIRE__REPLY__INIT;
    Icecache__Wire__SequenceOpenReply opened = ICECACHE__WIRE__SEQUENCE_OPEN_REPLY__INIT;
    Icecache__Wire__AppendReply appended = ICECACHE__WIRE__APPEND_REPLY__INIT;
    Icecache__Wire__ReadReply read = ICECACHE__WIRE__READ_REPLY__INIT;
    Icecache__Wire__SequenceInfoReply info = ICECACHE__WIRE__SEQUENCE_INFO_REPLY__INIT;
    uint64_t lengths[] = {9, 4}, indexed[] = {3, 2};
    switch (to->kind) {
    case ICECACHE__WIRE__REQUEST__BODY_SEQUENCE_OPEN:
        opened.sequence_id = 100 + fake->sequences_opened++;
        reply.body_case = ICECACHE__WIRE__REPLY__BODY_SEQUENCE_OPEN;
        reply.sequence_open = &opened;
        break;
    case ICECACHE__WIRE__REQUEST__BODY_SEQUENCE_CLOSE:
        fake->sequences_closed++;
        break;
    case ICECACHE__WIRE__REQUEST__BODY_APPEND: {
        const struct fake_append *append = &fake->appends[fake->append_count - 1];
        bool fails = fake->append_fail_at == fake->append_count;
        reply.status = fails ? ICE_POOL_FULL : ICE_OK;
        reply.text = (char *)(uintptr_t)(fails ? "no frame is left" : "");
        appended.length = append->first + (fails ? 0 : append->tokens);
        reply.body_case = ICECACHE__WIRE__REPLY__BODY_APPEND;
        reply.append = &appended;
        break;
    }
    case ICECACHE__WIRE__REQUEST__BODY_READ:
        read.tokens = to->heads;
        reply.body_case = ICECACHE__WIRE__REPLY__BODY_READ;
        reply.read = &read;
        break;
    case ICECACHE__WIRE__REQUEST__BODY_SEQUENCE_INFO:
        info.lengths = lengths;
        info.indexed = indexed;
        info.n_lengths = info.n_indexed = 2;
        info.pages = 6;
        info.idle = 1;
        reply.body_case = ICECACHE__WIRE__REPLY__BODY_SEQUENCE_INFO;
        reply.sequence_info = &info;
        break;
    case ICECACHE__WIRE__REQUEST__BODY_SEAL:
    case ICECACHE__WIRE__REQUEST__BODY_LOOKUP:
    case ICECACHE__WIRE__REQUEST__BODY_ATTACH:
    case ICECACHE__WIRE__REQUEST__BODY_PREFIX_REMOVE:
        fake_answer_prefix(fake, to);
        return;
    default:
        fake_answer_retrieve(fake, to);
        return;
    }
    fake_send(fake, to, &reply);
}

static inline void fake_note_append(struct fake *fake, const Icecache__Wire__Append *append)
{
    FAKE_CHECK(fake->append_count < FAKE_APPENDS_MAX);
    struct fake_append *note = &fake->appends[fake->append_count++];
    *note = (struct fake_append){append->layer,          append->layers,         append->tokens, append->first,
                                 append->staging_offset, append->reserve_tokens, NULL,           0};
    note->size = 2 * staging_side_bytes(append->layers, fake->kv_heads, append->tokens, fake->row_bytes);
    FAKE_CHECK(note->offset + note->size <= fake->staging_bytes);
    note->bytes = malloc(note->size);
    FAKE_CHECK(note->bytes != NULL);
    memcpy(note->bytes, fake->staging + note->offset, note->size);
}

static inline void fake_fill_read(struct fake *fake, const Icecache__Wire__Read *read)
{
    uint8_t *to = fake->staging + read->staging_offset;
    for (int value = 0; value < 2; value++) {
        for (uint32_t layer = 0; layer < read->layers; layer++) {
            for (uint32_t head = 0; head < fake->kv_heads; head++) {
                for (uint32_t token = 0; token < read->tokens; token++) {
                    for (uint32_t b = 0; b < fake->row_bytes; b++) {
                        *to++ = fake_byte(read->layer + layer, head, read->first + token, b, value != 0);
                    }
                }
            }
        }
    }
}

static inline void fake_request(struct fake *fake, struct fake_held *from, const Icecache__Wire__Request *request)
{
    FAKE_CHECK(request->session_id == fake->session_id);
    FAKE_CHECK(memcmp(request->session_token.data, fake->session_token, sizeof fake->session_token) == 0);
    from->request_id = request->request_id;
    from->kind = (int)request->body_case;
    switch (request->body_case) {
    case ICECACHE__WIRE__REQUEST__BODY_APPEND:
        fake_note_append(fake, request->append);
        break;
    case ICECACHE__WIRE__REQUEST__BODY_READ:
        fake_fill_read(fake, request->read);
        from->heads = request->read->tokens;
        break;
    case ICECACHE__WIRE__REQUEST__BODY_RETRIEVE:
        fake->deadline_us = request->retrieve->deadline_us;
        from->heads = (uint32_t)request->retrieve->n_sequence_ids * fake->kv_heads;
        break;
    case ICECACHE__WIRE__REQUEST__BODY_SEAL:
        fake->sealed_sequence = request->seal->sequence_id;
        break;
    case ICECACHE__WIRE__REQUEST__BODY_LOOKUP:
        fake->block_tokens = request->lookup->identity->block_tokens;
        fake->all_ranks = request->lookup->all_ranks;
        snprintf(fake->name_space, sizeof fake->name_space, "%s", request->lookup->identity->name_space);
        break;
    case ICECACHE__WIRE__REQUEST__BODY_ATTACH:
        fake->block_tokens = request->attach->open->block_tokens;
        fake->tokens_max = request->attach->tokens_max;
        break;
    case ICECACHE__WIRE__REQUEST__BODY_PREFIX_REMOVE:
        fake->prefix_removed = request->prefix_remove->prefix_id;
        snprintf(fake->name_space, sizeof fake->name_space, "%s", request->prefix_remove->name_space);
        break;
    default:
        break;
    }
    if ((fake->hold >> from->kind & 1u) != 0) {
        FAKE_CHECK(fake->held_count < FAKE_HELD_MAX);
        fake->held[fake->held_count++] = *from;
    } else {
        fake_answer(fake, from);
    }
}

static inline void fake_message(struct fake *fake, struct fake_held *from, const uint8_t *header, size_t size)
{
    static uint8_t memory[WIRE_ARENA_BYTES_MAX];
    struct wire_arena arena;
    struct wire_error error;
    uint64_t id;
    wire_arena_init(&arena, memory, sizeof memory);
    Icecache__Wire__Request *request = NULL;
    ice_status status = wire_request_decode(header, size, &arena, &request, &id, &error);
    if (status != ICE_OK) {
        fprintf(stderr, "the fake daemon cannot decode a request: %s\n", error.text);
        abort();
    }
    fake_request(fake, from, request);
}

// One message of the ring; false where there is none.
static inline bool fake_ring_data(struct fake *fake)
{
    struct fake_held from = {0};
    if (fake->ring.mapping == NULL || fake->ring_deaf || !fake_ring_receive(&fake->ring)) {
        return false;
    }
    const struct ring_record *record = &fake->ring.inbox.record;
    if (record->vectors_bytes > 0) {
        fake->vectors_bytes = record->vectors_bytes;
        memcpy(fake->vectors, fake->ring.message + record->header_bytes,
               record->vectors_bytes < sizeof fake->vectors ? record->vectors_bytes : sizeof fake->vectors);
    }
    fake_message(fake, &from, fake->ring.message, record->header_bytes);
    fake->ring_deaf = fake->ring_deafens;
    return true;
}

// One message of the socket; false where there is none.
static inline bool fake_data(struct fake *fake)
{
    struct fake_held from = {0};
    int identity = zmq_recv(fake->router, from.identity, sizeof from.identity, ZMQ_DONTWAIT);
    if (identity < 0) {
        return false;
    }
    from.identity_bytes = (size_t)identity;
    static uint8_t header[WIRE_HEADER_BYTES_MAX];
    int size = zmq_recv(fake->router, header, sizeof header, 0);
    FAKE_CHECK(size > 0);
    int more = 0;
    size_t more_bytes = sizeof more;
    FAKE_CHECK(zmq_getsockopt(fake->router, ZMQ_RCVMORE, &more, &more_bytes) == 0);
    if (more != 0) {
        int vectors = zmq_recv(fake->router, fake->vectors, sizeof fake->vectors, 0);
        fake->vectors_bytes = (size_t)vectors;
    }
    fake_message(fake, &from, header, (size_t)size);
    return true;
}

// ---- thread ----

static inline void fake_hang_up(struct fake *fake)
{
    for (int i = 0; i < FAKE_PEERS_MAX; i++) {
        if (fake->peers[i] >= 0) {
            close(fake->peers[i]);
            fake->peers[i] = -1;
        }
    }
}

// false: stop.
static inline bool fake_obey(struct fake *fake)
{
    enum fake_command command = fake->command;
    fake->command = FAKE_NONE;
    if (command == FAKE_ANSWER) {
        fake_answer(fake, &fake->held[fake->command_index]);
        fake->held[fake->command_index].answered = true;
    } else if (command == FAKE_HANG_UP) {
        fake_hang_up(fake);
    }
    return command != FAKE_STOP;
}

static inline void fake_accept(struct fake *fake)
{
    int peer = accept4(fake->listener, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
    for (int i = 0; peer >= 0 && i < FAKE_PEERS_MAX; i++) {
        if (fake->peers[i] < 0) {
            fake->peers[i] = peer;
            return;
        }
    }
    FAKE_CHECK(peer < 0);
}

#define FAKE_SET(fake, field, value)                                                                                   \
    do {                                                                                                               \
        pthread_mutex_lock(&(fake)->lock);                                                                             \
        (fake)->field = (value);                                                                                       \
        pthread_mutex_unlock(&(fake)->lock);                                                                           \
    } while (0)

static inline uint64_t fake_get(struct fake *fake, const void *field, size_t bytes)
{
    uint64_t value = 0;
    pthread_mutex_lock(&fake->lock);
    memcpy(&value, field, bytes);
    pthread_mutex_unlock(&fake->lock);
    return value;
}
#define FAKE_GET(fake, field) fake_get((fake), &(fake)->field, sizeof(fake)->field)

static inline void *fake_run(void *argument)
{
    struct fake *fake = argument;
    bool running = true;
    while (running) {
        zmq_pollitem_t items[4 + FAKE_PEERS_MAX] = {
            {.fd = fake->listener, .events = ZMQ_POLLIN},
            {.fd = fake->wake, .events = ZMQ_POLLIN},
            {.socket = fake->router, .events = ZMQ_POLLIN},
        };
        int slots[FAKE_PEERS_MAX], count = 0;
        for (int i = 0; i < FAKE_PEERS_MAX; i++) {
            if (fake->peers[i] >= 0) {
                slots[count] = i;
                items[3 + count++] = (zmq_pollitem_t){.fd = fake->peers[i], .events = ZMQ_POLLIN};
            }
        }
        const bool listens = fake->ring.mapping != NULL && !FAKE_GET(fake, ring_deaf);
        items[3 + count] = (zmq_pollitem_t){.fd = listens ? fake->ring.event_fd : fake->wake, .events = ZMQ_POLLIN};
        (void)zmq_poll(items, 4 + count, 1000);
        pthread_mutex_lock(&fake->lock);
        for (int i = 0; i < count; i++) {
            if (items[3 + i].revents != 0 && !fake_control(fake, fake->peers[slots[i]])) {
                close(fake->peers[slots[i]]);
                fake->peers[slots[i]] = -1;
            }
        }
        while (fake_data(fake) || fake_ring_data(fake)) {
        }
        if (items[0].revents != 0) {
            fake_accept(fake);
        }
        if (items[1].revents != 0) {
            uint64_t value;
            FAKE_CHECK(read(fake->wake, &value, sizeof value) == sizeof value);
            running = fake_obey(fake);
        }
        pthread_cond_broadcast(&fake->changed);
        pthread_mutex_unlock(&fake->lock);
    }
    return NULL;
}

static inline void fake_do(struct fake *fake, enum fake_command command, size_t index)
{
    pthread_mutex_lock(&fake->lock);
    fake->command = command;
    fake->command_index = index;
    FAKE_CHECK(write(fake->wake, &(uint64_t){1}, sizeof(uint64_t)) == sizeof(uint64_t));
    while (fake->command != FAKE_NONE) {
        pthread_cond_wait(&fake->changed, &fake->lock);
    }
    pthread_mutex_unlock(&fake->lock);
}

// Waits until `count` requests are held back.
static inline void fake_wait_held(struct fake *fake, size_t count)
{
    pthread_mutex_lock(&fake->lock);
    while (fake->held_count < count) {
        pthread_cond_wait(&fake->changed, &fake->lock);
    }
    pthread_mutex_unlock(&fake->lock);
}

static inline void fake_get_text(struct fake *fake, const char *field, char *text, size_t capacity)
{
    pthread_mutex_lock(&fake->lock);
    snprintf(text, capacity, "%s", field);
    pthread_mutex_unlock(&fake->lock);
}

static inline struct fake *fake_start(void)
{
    struct fake *fake = calloc(1, sizeof *fake);
    FAKE_CHECK(fake != NULL);
    (void)snprintf(fake->directory, sizeof fake->directory, "/tmp/icecache-test-XXXXXX");
    FAKE_CHECK(mkdtemp(fake->directory) != NULL);
    FAKE_CHECK(control_path(fake->control_path, sizeof fake->control_path, fake->directory, CONTROL_SOCKET_NAME) ==
               ICE_OK);
    (void)snprintf(fake->endpoint, sizeof fake->endpoint, "ipc://%s/%s", fake->directory, CONTROL_DATA_SOCKET_NAME);
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    memcpy(address.sun_path, fake->control_path, strlen(fake->control_path) + 1);
    fake->listener = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    FAKE_CHECK(bind(fake->listener, (struct sockaddr *)&address, sizeof address) == 0);
    FAKE_CHECK(listen(fake->listener, 8) == 0);
    fake->wake = eventfd(0, EFD_CLOEXEC);
    for (int i = 0; i < FAKE_PEERS_MAX; i++) {
        fake->peers[i] = -1;
    }
    fake->boot_token = 0xb007;
    fake->kv_heads = 2;
    fake->head_dim = 16;
    fake->row_bytes = 32;
    fake->context = zmq_ctx_new();
    fake->router = zmq_socket(fake->context, ZMQ_ROUTER);
    FAKE_CHECK(zmq_setsockopt(fake->router, ZMQ_LINGER, &(int){0}, sizeof(int)) == 0);
    FAKE_CHECK(zmq_bind(fake->router, fake->endpoint) == 0);
    pthread_mutex_init(&fake->lock, NULL);
    pthread_cond_init(&fake->changed, NULL);
    FAKE_CHECK(pthread_create(&fake->thread, NULL, fake_run, fake) == 0);
    return fake;
}

static inline void fake_stop(struct fake *fake)
{
    fake_do(fake, FAKE_STOP, 0);
    pthread_join(fake->thread, NULL);
    fake_hang_up(fake);
    fake_ring_close(&fake->ring);
    close(fake->listener);
    close(fake->wake);
    zmq_close(fake->router);
    zmq_ctx_term(fake->context);
    unlink(fake->control_path);
    unlink(fake->endpoint + strlen("ipc://"));
    rmdir(fake->directory);
    for (size_t i = 0; i < fake->append_count; i++) {
        free(fake->appends[i].bytes);
    }
    if (fake->staging != NULL) {
        munmap(fake->staging, fake->staging_bytes);
    }
    if (fake->landing != NULL) {
        munmap(fake->landing, fake->landing_bytes);
    }
    pthread_mutex_destroy(&fake->lock);
    pthread_cond_destroy(&fake->changed);
    free(fake);
}

#endif
