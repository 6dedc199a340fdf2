// What a retrieve's message and its bytes would cost without the daemon: a request and a reply of the same sizes over
// ZeroMQ (ROUTER and DEALER on ipc) and through shared memory with an eventfd each way, to a process that only answers;
// and the selection's bytes, gathered by memcpy from random places out of cache.
#include "serve.h"

#include "gpu/store.h"
#include "proto/limits.h"
#include "proto/wire.h"

#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <unistd.h>
#include <zmq.h>

#define POOL_BYTES   ((size_t)256 << 20)
#define RING_BYTES   ((size_t)4 << 20) // requests in the first half, replies in the second
#define ZMQ_WAIT_MS  10000
#define FRAMES_BYTES ((size_t)16 << 20)

const char *const serve_base_names[SERVE_BASES] = {"raw-zmq", "ring", "memcpy"};

struct serve_bases {
    size_t header_bytes, vectors_bytes, reply_bytes; // of a retrieve's frames
    uint8_t *request, *reply;                        // as large as they are
    struct process echo, ring;
    void *context, *socket;
    char endpoint[SERVE_PATH_ROOM];
    uint8_t *shared; // RING_BYTES
    int asked_fd, answered_fd, shared_fd;
    struct arena arena;
    uint8_t *pool, *landing;
    size_t row_bytes, rows;
    struct random random;
};

// Sizes as the client and the daemon make them.
static void measure_frames(struct serve_bases *bases, const struct serve_job *job)
{
    uint64_t id = UINT64_MAX, position = job->tokens, indexed[64], versions[64];
    uint32_t row = 0, counts[64];
    float masses[64];
    uint8_t token[16] = {0};
    const uint32_t heads = job->kv_heads < 64 ? job->kv_heads : 64;
    for (uint32_t i = 0; i < heads; i++) {
        indexed[i] = versions[i] = job->tokens;
        counts[i] = serve_slots(job);
        masses[i] = 0.5f;
    }
    Icecache__Wire__Request request = ICECACHE__WIRE__REQUEST__INIT;
    Icecache__Wire__Retrieve retrieve = ICECACHE__WIRE__RETRIEVE__INIT;
    retrieve.sequence_ids = &id;
    retrieve.rows = &row;
    retrieve.first_queries = &position;
    retrieve.n_sequence_ids = retrieve.n_rows = retrieve.n_first_queries = 1;
    retrieve.landing_id = retrieve.layer = retrieve.queries = retrieve.query_dtype = 1;
    retrieve.budget = job->budget;
    retrieve.sinks = job->sinks;
    retrieve.window = job->window;
    retrieve.append = true;
    retrieve.deadline_us = 4000000;
    request.protocol_version = WIRE_PROTOCOL_VERSION;
    request.request_id = job->tokens;
    request.session_id = id;
    request.session_token = (ProtobufCBinaryData){sizeof token, token};
    request.body_case = ICECACHE__WIRE__REQUEST__BODY_RETRIEVE;
    request.retrieve = &retrieve;
    bases->header_bytes = icecache__wire__request__get_packed_size(&request);
    bases->vectors_bytes = (job->query_heads + 2 * job->kv_heads) * serve_row_bytes(job);
    Icecache__Wire__Reply reply = ICECACHE__WIRE__REPLY__INIT;
    Icecache__Wire__RetrieveReply body = ICECACHE__WIRE__RETRIEVE_REPLY__INIT;
    body.n_counts = body.n_changed = body.n_masses = body.n_indexed = body.n_versions = heads;
    body.counts = body.changed = counts;
    body.masses = masses;
    body.indexed = indexed;
    body.versions = versions;
    body.queue_us = body.search_us = body.copy_us = 100;
    body.bytes_moved = 2ull * heads * serve_slots(job) * serve_row_bytes(job);
    reply.request_id = job->tokens;
    reply.boot_token = id;
    reply.body_case = ICECACHE__WIRE__REPLY__BODY_RETRIEVE;
    reply.retrieve = &body;
    bases->reply_bytes = icecache__wire__reply__get_packed_size(&reply);
}

// ---- ZeroMQ ----

static void compute(uint32_t us)
{
    const uint64_t until_ns = measure_ns() + UINT64_C(1000) * us;
    while (measure_ns() < until_ns) {
    }
}

// Answers each request of two frames by one frame as large as the number in front of the endpoint says, after as many
// us as the second frame begins with.
int serve_echo(const char *argument)
{
    char *endpoint;
    const size_t bytes = strtoul(argument, &endpoint, 10);
    static uint8_t reply[FRAMES_BYTES];
    char ready = 1;
    void *context = zmq_ctx_new(), *socket = zmq_socket(context, ZMQ_ROUTER);
    if (socket == NULL || bytes > sizeof reply || *endpoint != ' ' || zmq_bind(socket, endpoint + 1) != 0 ||
        !parent_write(&ready, 1)) {
        return 1;
    }
    for (;;) { // until it is killed
        zmq_msg_t frames[3];
        for (int i = 0; i < 3; i++) {
            (void)zmq_msg_init(&frames[i]);
            if (zmq_msg_recv(&frames[i], socket, 0) < 0) {
                return 1;
            }
        }
        uint32_t us = 0;
        if (zmq_msg_size(&frames[2]) >= sizeof us) {
            memcpy(&us, zmq_msg_data(&frames[2]), sizeof us);
        }
        compute(us);
        if (zmq_msg_send(&frames[0], socket, ZMQ_SNDMORE) < 0 || zmq_send(socket, reply, bytes, 0) < 0) {
            return 1;
        }
        (void)zmq_msg_close(&frames[1]);
        (void)zmq_msg_close(&frames[2]);
    }
}

static bool start_zmq(struct serve_bases *bases, const char *work)
{
    char argument[SERVE_PATH_ROOM + 32], ready;
    const int wait_ms = ZMQ_WAIT_MS, linger = 0;
    (void)snprintf(bases->endpoint, sizeof bases->endpoint, "ipc://%.200s/echo", work);
    (void)snprintf(argument, sizeof argument, "%zu %s", bases->reply_bytes, bases->endpoint);
    if (!process_start_role(&bases->echo, "echo", argument) || !process_read(&bases->echo, &ready, 1)) {
        return false;
    }
    bases->context = zmq_ctx_new();
    bases->socket = bases->context != NULL ? zmq_socket(bases->context, ZMQ_DEALER) : NULL;
    return bases->socket != NULL && zmq_setsockopt(bases->socket, ZMQ_LINGER, &linger, sizeof linger) == 0 &&
           zmq_setsockopt(bases->socket, ZMQ_RCVTIMEO, &wait_ms, sizeof wait_ms) == 0 &&
           zmq_connect(bases->socket, bases->endpoint) == 0;
}

static bool ask_zmq(struct serve_bases *bases)
{
    return zmq_send(bases->socket, bases->request, bases->header_bytes, ZMQ_SNDMORE) >= 0 &&
           zmq_send(bases->socket, bases->request + bases->header_bytes, bases->vectors_bytes, 0) >= 0 &&
           zmq_recv(bases->socket, bases->reply, bases->reply_bytes, 0) == (int)bases->reply_bytes;
}

// ---- shared memory ----

static bool wait_eventfd(int fd)
{
    uint64_t value;
    return read(fd, &value, sizeof value) == (ssize_t)sizeof value;
}

static bool ring_eventfd(int fd)
{
    const uint64_t one = 1;
    return write(fd, &one, sizeof one) == (ssize_t)sizeof one;
}

int serve_ring(const char *argument)
{
    int shared_fd, asked_fd, answered_fd;
    size_t request_bytes, reply_bytes;
    if (sscanf(argument, "%d %d %d %zu %zu", &shared_fd, &asked_fd, &answered_fd, &request_bytes, &reply_bytes) != 5) {
        return 1;
    }
    uint8_t *shared = mmap(NULL, RING_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, shared_fd, 0);
    uint8_t *request = malloc(request_bytes), *reply = calloc(1, reply_bytes);
    char ready = 1;
    if (shared == MAP_FAILED || request == NULL || reply == NULL || !parent_write(&ready, 1)) {
        free(request);
        free(reply);
        return 1;
    }
    while (wait_eventfd(asked_fd)) { // until it is killed
        memcpy(request, shared, request_bytes);
        memcpy(shared + RING_BYTES / 2, reply, reply_bytes);
        if (!ring_eventfd(answered_fd)) {
            break;
        }
    }
    free(request);
    free(reply);
    return 1;
}

static bool start_ring(struct serve_bases *bases)
{
    char argument[128], ready;
    bases->shared_fd = memfd_create("icecache-bench", 0); // these three are inherited
    bases->asked_fd = eventfd(0, 0);
    bases->answered_fd = eventfd(0, 0);
    if (bases->shared_fd < 0 || bases->asked_fd < 0 || bases->answered_fd < 0 ||
        ftruncate(bases->shared_fd, (off_t)RING_BYTES) != 0) {
        return false;
    }
    bases->shared = mmap(NULL, RING_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED, bases->shared_fd, 0);
    (void)snprintf(argument, sizeof argument, "%d %d %d %zu %zu", bases->shared_fd, bases->asked_fd, bases->answered_fd,
                   bases->header_bytes + bases->vectors_bytes, bases->reply_bytes);
    return bases->shared != MAP_FAILED && process_start_role(&bases->ring, "ring", argument) &&
           process_read(&bases->ring, &ready, 1);
}

static bool ask_ring(struct serve_bases *bases)
{
    memcpy(bases->shared, bases->request, bases->header_bytes + bases->vectors_bytes);
    if (!ring_eventfd(bases->asked_fd) || !wait_eventfd(bases->answered_fd)) {
        return false;
    }
    memcpy(bases->reply, bases->shared + RING_BYTES / 2, bases->reply_bytes);
    return true;
}

// ---- memcpy ----

static bool gather(struct serve_bases *bases)
{
    const size_t bytes = bases->row_bytes;
    const uint32_t places = (uint32_t)(POOL_BYTES / bytes);
    const uint8_t *next[STORE_ROWS_AHEAD]; // asked for
    for (size_t i = 0; i < bases->rows + STORE_ROWS_AHEAD; i++) {
        if (i >= STORE_ROWS_AHEAD) {
            memcpy(bases->landing + (i - STORE_ROWS_AHEAD) * bytes, next[i % STORE_ROWS_AHEAD], bytes);
        }
        next[i % STORE_ROWS_AHEAD] = bases->pool + random_below(&bases->random, places) * bytes;
        store_ask(next[i % STORE_ROWS_AHEAD], bytes);
    }
    return true;
}

static bool start_memcpy(struct serve_bases *bases, const struct serve_job *job)
{
    bases->row_bytes = 2 * serve_row_bytes(job);
    bases->rows = (size_t)job->kv_heads * serve_slots(job);
    bases->pool = arena_acquire(&bases->arena, POOL_BYTES);
    bases->landing = calloc(bases->rows, bases->row_bytes);
    if (bases->pool == NULL || bases->landing == NULL) {
        return false;
    }
    memset(bases->pool, 1, POOL_BYTES);
    random_init(&bases->random, job->seed);
    return true;
}

// ---- all ----

struct serve_bases *serve_bases_create(const struct serve_job *job, const char *work)
{
    struct serve_bases *bases = calloc(1, sizeof *bases);
    if (bases == NULL) {
        return NULL;
    }
    bases->shared_fd = bases->asked_fd = bases->answered_fd = -1;
    bases->shared = MAP_FAILED;
    measure_frames(bases, job);
    bases->request = calloc(1, bases->header_bytes + bases->vectors_bytes);
    bases->reply = calloc(1, bases->reply_bytes);
    const bool fits =
        bases->header_bytes + bases->vectors_bytes <= RING_BYTES / 2 && bases->reply_bytes <= RING_BYTES / 2;
    if (!fits || bases->request == NULL || bases->reply == NULL || !start_zmq(bases, work) || !start_ring(bases) ||
        !start_memcpy(bases, job)) {
        (void)fputs("icecache-bench: serve: the baselines cannot be set up\n", stderr);
        serve_bases_destroy(bases);
        return NULL;
    }
    return bases;
}

void serve_bases_destroy(struct serve_bases *bases)
{
    if (bases == NULL) {
        return;
    }
    if (bases->socket != NULL) {
        (void)zmq_close(bases->socket);
    }
    if (bases->context != NULL) {
        (void)zmq_ctx_term(bases->context);
    }
    (void)process_end(&bases->echo, SIGKILL);
    (void)process_end(&bases->ring, SIGKILL);
    if (bases->shared != MAP_FAILED) {
        (void)munmap(bases->shared, RING_BYTES);
    }
    const int fds[] = {bases->shared_fd, bases->asked_fd, bases->answered_fd};
    for (int i = 0; i < 3; i++) {
        if (fds[i] >= 0) {
            (void)close(fds[i]);
        }
    }
    arena_fini(&bases->arena);
    free(bases->landing);
    free(bases->request);
    free(bases->reply);
    free(bases);
}

bool serve_bases_measure(struct serve_bases *bases, enum serve_base base, double *us, uint32_t count)
{
    bool (*const once[SERVE_BASES])(struct serve_bases *) = {ask_zmq, ask_ring, gather};
    for (uint32_t i = 0; i < count; i++) {
        const uint64_t begun_ns = measure_ns();
        if (!once[base](bases)) {
            (void)fprintf(stderr, "icecache-bench: serve: %s does not answer\n", serve_base_names[base]);
            return false;
        }
        us[i] = (double)(measure_ns() - begun_ns) / 1000;
    }
    return true;
}

void serve_bases_work(struct serve_bases *bases, uint32_t us)
{
    memcpy(bases->request + bases->header_bytes, &us, sizeof us); // a row of vectors is longer
}

uint64_t serve_bases_bytes(const struct serve_bases *bases, enum serve_base base)
{
    return base == SERVE_MEMCPY ? bases->rows * bases->row_bytes
                                : bases->header_bytes + bases->vectors_bytes + bases->reply_bytes;
}
