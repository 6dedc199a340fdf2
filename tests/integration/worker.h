// A worker as the tests need it: a client with one landing and one sequence, and checks of what a retrieve leaves.
#ifndef ICECACHE_TESTS_WORKER_H
#define ICECACHE_TESTS_WORKER_H

#include "history.h"

#include "daemon.h"

// Evaluates a call, fails the test with the library's own text where the status differs.
#define assert_status(call, expected) status_check((call), (expected), #call, __FILE__, __LINE__)
#define assert_ok(call)               assert_status(call, ICE_OK)
void status_check(ice_status status, ice_status expected, const char *call, const char *file, int line);
// As above, and the library's text must contain `text`.
#define assert_refused(call, expected, text)                                                                           \
    do {                                                                                                               \
        assert_status(call, expected);                                                                                 \
        assert_text(ice_last_error(), text);                                                                           \
    } while (0)
#define assert_text(text, part) text_check((text), (part), __FILE__, __LINE__)
void text_check(const char *text, const char *part, const char *file, int line);

struct worker {
    ice_client *client;
    ice_landing *landing;
    ice_sequence *sequence;
    struct shape shape;
    uint32_t rows, slots;
};

ice_client *client_connect(const char *sockets, uint64_t deadline_us, uint64_t staging_bytes);
struct ice_sequence_options sequence_options(const struct shape *shape);
struct ice_landing_shape landing_shape(const struct shape *shape, uint32_t rows, uint32_t slots);
ice_sequence *sequence_open(ice_client *client, const struct shape *shape);
ice_landing *landing_open(ice_client *client, const struct shape *shape, uint32_t rows, uint32_t slots);

// Connects with a staging area of 4 MiB.
void worker_open(struct worker *worker, const char *sockets, const struct shape *shape, uint32_t rows, uint32_t slots);
void worker_close(struct worker *worker); // handles one by one, then the client
// Appends tokens first .. first+n-1 to all layers.
void worker_append(const struct worker *worker, const struct history *history, uint64_t first, uint64_t n);
// Reads tokens first .. first+n-1 of all layers back: bit for bit those of the history.
void worker_check_content(const struct worker *worker, const struct history *history, uint64_t first, uint64_t n);
// Waits until no clustering is due; the sequence must be indexed as far as that goes.
void sequence_wait_idle(ice_sequence *sequence, struct ice_sequence_info *info);
void worker_wait_idle(const struct worker *worker);

// One retrieve of the worker's sequence into row 0. The options' pointers are filled in.
struct retrieve {
    struct ice_retrieve_options options;
    ice_sequence *sequence;
    uint32_t row;
    uint64_t first;
    uint8_t *queries, *keys, *values; // keys and values: NULL, or they ride along
};
// Queries at positions first .. first+n-1 of a layer. Call retrieve_point before use where the struct has been moved.
void retrieve_init(struct retrieve *retrieve, const struct worker *worker, const struct history *history,
                   uint32_t layer, uint64_t first, uint32_t n);
void retrieve_point(struct retrieve *retrieve);
void retrieve_ends(struct retrieve *retrieve, uint32_t budget, uint32_t sinks, uint32_t window);
void retrieve_ride(struct retrieve *retrieve, const struct history *history); // the K and V of the query positions
void retrieve_fini(struct retrieve *retrieve);

// The row holds `count` tokens, each once, positions below `visible`, K and V bit for bit those of their positions.
void landing_check(ice_landing *landing, uint32_t row, uint32_t layer, const struct history *history, uint32_t count,
                   uint64_t visible);
// The row holds every position below `visible`, slot i position i.
void landing_check_all(ice_landing *landing, uint32_t row, uint32_t layer, const struct history *history,
                       uint64_t visible);
uint64_t bytes_digest(uint64_t digest, const void *bytes, size_t count); // FNV-1a; begin with 0
uint64_t landing_digest(ice_landing *landing, uint32_t row, uint32_t layer, const struct shape *shape);

#endif
