// Parts of the serve command: real processes around a real daemon. The bench starts itself again in a role: as a
// worker, as one that builds meanwhile, or as the far side of a baseline. What parent and child say to each other goes
// through the child's standard input and output, as the structs below, because both are this program.
#ifndef ICECACHE_BENCH_SERVE_H
#define ICECACHE_BENCH_SERVE_H

#include "measure.h"
#include "options.h"
#include "random.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#define SERVE_PATH_ROOM   256u
#define SERVE_WORKERS_MAX 64u
#define SERVE_ROLE_FLAG   "--serve-role" // main's first argument in a child

// ---- processes (serve_process.c) ----

struct process {
    pid_t pid; // 0: none
    int input, output;
};
// arguments[0] is the program, NULL-terminated. Its standard error goes to the file `log`, or where ours goes (NULL).
// It dies with this process. False after a message on stderr, as below.
bool process_start(struct process *process, const char *const *arguments, const char *log);
bool process_start_role(struct process *process, const char *role, const char *argument); // argument may be NULL
bool process_write(const struct process *process, const void *bytes, size_t n);
bool process_read(const struct process *process, void *bytes, size_t n); // waits for minutes at most
bool process_has_ended(struct process *process);
// Closes its input and, where `signal` is not 0, sends that; waits for its end, at last by SIGKILL. True: exit status
// 0.
bool process_end(struct process *process, int signal);
// The child's side: its standard input and output. False at the end of the input.
bool parent_read(void *bytes, size_t n);
bool parent_write(const void *bytes, size_t n);
bool parent_is_waiting(void); // has sent something
// Removes a folder and all that is in it.
void folder_remove(const char *folder);

// ---- what a worker works on (serve_source.c) ----

struct serve_job {
    char sockets[SERVE_PATH_ROOM];
    char trace[SERVE_PATH_ROOM]; // empty: generated
    bool builds;                 // appends and clusters one sequence after the other
    uint32_t layers, kv_heads, query_heads, head_dim, dtype;
    uint32_t tokens, steps; // of the prompt; decode steps that have data of their own
    uint32_t step_room;     // decode steps that a sequence may have; what comes after it is in a new one
    uint32_t budget, sinks, window;
    uint32_t places[PLACES]; // enum option_place of its landings
    uint32_t place_count;
    uint32_t transport; // enum option_transport
    uint32_t hint;      // enum option_hint
    uint32_t think_us;  // before each retrieve
    uint64_t seed;
};
size_t serve_row_bytes(const struct serve_job *job);
uint32_t serve_slots(const struct serve_job *job);
uint32_t serve_frame_bytes(const struct serve_job *job); // of a page in the pool
uint64_t serve_bytes(const struct serve_job *job);       // of all K and V

struct serve_source {
    uint32_t tokens;        // with those of the steps
    size_t row_bytes;       // of one token's K or V of one head
    uint8_t *keys, *values; // [layer][KV head][token]
    uint8_t *queries;       // [layer][step][query head]
};
bool serve_source_init(struct serve_source *source, const struct serve_job *job);
void serve_source_fini(struct serve_source *source);
// Beyond the data's end it begins again: a token, and a step's query (of one query head after the other).
const uint8_t *serve_source_row(const struct serve_source *source, const struct serve_job *job, const uint8_t *side,
                                uint32_t layer, uint32_t head, uint32_t token);

const uint8_t *serve_source_queries(const struct serve_source *source, const struct serve_job *job, uint32_t layer,
                                    uint32_t step);

// ---- landings (serve_landing.c) ----

struct ice_client;
struct ice_landing;
struct serve_landing;
// What it holds of one layer, in host memory.
struct serve_view {
    const uint8_t *keys, *values; // [count][row]
    const uint32_t *positions;    // [count]
    uint32_t count;
};
// In a place: host memory, or GPU memory of this process that the library has not made, as an engine's is. NULL after a
// message on stderr. The job is borrowed.
struct serve_landing *serve_landing_create(struct ice_client *client, const struct serve_job *job,
                                           enum option_place place);
void serve_landing_destroy(struct serve_landing *landing); // before its client; accepts NULL
struct ice_landing *serve_landing_handle(struct serve_landing *landing);
enum option_place serve_landing_place(const struct serve_landing *landing); // what PLACE_AUTO has become
// Brings what a retrieve left for a layer to where serve_landing_view finds it; K and V only with `rows`.
bool serve_landing_fetch(struct serve_landing *landing, uint32_t layer, bool rows);
bool serve_landing_view(struct serve_landing *landing, uint32_t layer, uint32_t head, struct serve_view *out);

// ---- workers (serve_worker.c) ----

struct serve_order {
    uint32_t steps; // to run now, at most; 0: a builder begins, or ends
    uint32_t place; // which of the job's
};
// A worker that has an order answers one byte when it could begin, and begins when it has this: so all begin together.
struct serve_go {
    uint64_t begin_ns, end_ns; // of the monotonic clock; end 0: when all steps are done
};
// Follows each order and, with steps 0, the start.
struct serve_answer {
    uint64_t begun_ns, ended_ns;
    uint32_t record_count;   // that follow
    uint32_t indexed;        // tokens that are clustered, in the worst lane
    uint32_t builds;         // a builder's, that have ended
    double build_s;          // that the daemon has spent on the last one, all lanes
    uint32_t wrong_rows;     // of the landing, of those that were compared
    bool is_idle;            // no clustering was due
    uint32_t places[PLACES]; // those of the job, as they are
};
struct serve_record { // of one retrieve
    float total_us, queue_us, search_us, fetch_us, copy_us;
    float kept; // share of the selected tokens that were those of the step before, too
    uint32_t bytes;
    uint32_t turnover_bytes; // of the tokens that the landing did not hold before, as the worker finds it
    bool partial;
};
int serve_worker(void);

// ---- the daemon (serve_daemon.c) ----

struct ctl_connection;
struct serve_daemon {
    struct process process;
    struct ctl_connection *connection; // NULL: none
    char sockets[SERVE_PATH_ROOM], spill[SERVE_PATH_ROOM], log[SERVE_PATH_ROOM];
};
struct serve_room { // what it may use
    uint64_t pool_bytes, index_bytes, shared_bytes;
    uint64_t spill_bytes; // 0: no disk
    uint32_t sessions;
    uint32_t sequences; // 0: the daemon's default
};
struct serve_stats {
    uint64_t pages, pool_bytes; // of those sequences that one reply has room for; in memory
    uint64_t all_pool_bytes, index_bytes;
    uint64_t pages_read, retrieves;
    uint64_t hinted, hinted_used; // pages
    uint64_t cpu_ns;              // of the process
    bool direct;                  // past the page cache
};
// `work` holds its sockets and log, `disk` its spill file; both end in `number`. program: NULL: beside this one.
bool serve_daemon_start(struct serve_daemon *daemon, const char *program, const char *work, const char *disk,
                        uint32_t number, const struct serve_room *room);
bool serve_daemon_stats(struct serve_daemon *daemon, struct serve_stats *out);
// Waits until its threads rest, some seconds at most: what was left to do is not part of the next measurement.
void serve_daemon_settle(const struct serve_daemon *daemon);
bool serve_daemon_stop(struct serve_daemon *daemon); // accepts one that was not started

// ---- baselines (serve_base.c) ----

enum serve_base { SERVE_ZMQ, SERVE_RING, SERVE_MEMCPY, SERVE_BASES };
extern const char *const serve_base_names[SERVE_BASES];
struct serve_bases;
struct serve_bases *serve_bases_create(const struct serve_job *job, const char *work);
void serve_bases_destroy(struct serve_bases *bases); // accepts NULL
// us[count], one each.
bool serve_bases_measure(struct serve_bases *bases, enum serve_base base, double *us, uint32_t count);
// The far side of SERVE_ZMQ computes so long before it answers, from now on; 0: as at first.
void serve_bases_work(struct serve_bases *bases, uint32_t us);
uint64_t serve_bases_bytes(const struct serve_bases *bases, enum serve_base base); // that one of them moves
int serve_echo(const char *endpoint);                                              // roles
int serve_ring(const char *numbers);

// ---- the device (serve_device.c) ----

struct serve_device;
// A file of `bytes` in a folder that is made in `disk`, written once.
struct serve_device *serve_device_create(const char *disk, uint64_t bytes, uint32_t page_bytes, uint64_t seed);
void serve_device_destroy(struct serve_device *device); // accepts NULL
// us[count]: from handing in `pages` random pages at once until the last has come.
bool serve_device_measure(struct serve_device *device, uint32_t pages, double *us, uint32_t count);

#endif
