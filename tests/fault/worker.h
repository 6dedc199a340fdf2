// A worker as a script: it speaks the protocol by itself, so that it can stop, lie or hang up at any step.
#ifndef ICECACHE_TESTS_FAULT_WORKER_H
#define ICECACHE_TESTS_FAULT_WORKER_H

#include "proto/limits.h"
#include "proto/shm.h"
#include "proto/wire.h"

#include <stdbool.h>
#include <stdint.h>

enum { LAYERS = 2, KV_HEADS = 2, QUERY_HEADS = 4, HEAD_DIM = 16, ROW_BYTES = HEAD_DIM * 4 };
enum { TOKENS = 700, FIRST_PART = 300, BUDGET = 8, SINKS = 4, WINDOW = 8, SLOTS = BUDGET + SINKS + WINDOW };
#define STAGING_BYTES ((uint64_t)1 << 20)

struct worker {
    int control; // -1: closed
    void *context, *data;
    uint64_t session_id, boot_token;
    uint8_t token[WIRE_SESSION_TOKEN_BYTES];
    char endpoint[256];
    bool admin;
    bool send_only;  // requests are sent, replies not waited for
    int patience_ms; // for a reply
    uint64_t next_request;
    uint8_t *staging;
    uint8_t *landing;
    uint32_t landing_id;
    struct landing_layout layout;
    uint64_t sequence_id;
    char text[WIRE_TEXT_BYTES_MAX]; // of the last error
};

// One token's K or V element: the same in every run.
float worker_element(bool value, uint32_t layer, uint32_t head, uint64_t position, uint32_t element);

void worker_init(struct worker *worker);
void worker_close(struct worker *worker); // hangs up and forgets; the memory is unmapped

// The steps of a small session, in order. ICE_OK, or what the daemon answered; ICE_TIMEOUT where it did not answer in
// time, ICE_DISCONNECTED where it hung up.
ice_status worker_hello(struct worker *worker, const char *sockets);
ice_status worker_open_staging(struct worker *worker);
ice_status worker_open_landing(struct worker *worker);
ice_status worker_open_sequence(struct worker *worker);
ice_status worker_append_first(struct worker *worker); // reserves room for the second part too
ice_status worker_append_rest(struct worker *worker);
ice_status worker_retrieve(struct worker *worker, uint32_t layer); // the step's K and V ride along
ice_status worker_read(struct worker *worker);                     // and compares with what was appended
ice_status worker_wait_clustered(struct worker *worker);
ice_status worker_close_sequence(struct worker *worker);
ice_status worker_close_landing(struct worker *worker);

struct step {
    const char *name;
    ice_status (*run)(struct worker *worker);
};
extern const struct step worker_steps[]; // from the staging on
extern const uint32_t worker_step_count;
// Hello and all steps. The first status that is not ok, and the step's name (may be NULL).
ice_status worker_session(struct worker *worker, const char *sockets, const char **step);

// What the daemon says that it holds, asked by an admin session.
struct held {
    uint64_t sessions, sequences, pool_bytes, index_bytes, shared_bytes;
};
ice_status worker_stats(struct worker *worker, struct held *held);
// Asks until nothing is held; fails the test where that takes longer than 10 s.
void worker_expect_nothing_held(const char *sockets);

// For scripts that do something else: sends without waiting, waits for one reply (free with
// icecache__wire__reply__free_unpacked).
void worker_send(struct worker *worker, Icecache__Wire__Request *request, const void *vectors, size_t bytes);
ice_status worker_receive(struct worker *worker, Icecache__Wire__Reply **out);
// Sends the request of the n-th step (0: staging) and does not wait for the answer.
void worker_send_step(struct worker *worker, uint32_t step);
void worker_send_control(struct worker *worker, Icecache__Wire__ControlRequest *request);
ice_status worker_receive_control(struct worker *worker, Icecache__Wire__ControlReply **out, int *fd);

#endif
