// The daemon's state, put together in main.c and handed to every module; nothing is global.
#ifndef ICECACHE_CACHED_SERVER_H
#define ICECACHE_CACHED_SERVER_H

#include "cached/admission.h"
#include "cached/budget.h"
#include "cached/completion.h"
#include "cached/config.h"
#include "cached/counts.h"
#include "cached/env.h"
#include "cached/gpus.h"
#include "cached/histogram.h"
#include "cached/intake.h"
#include "cached/op.h"
#include "cached/pool.h"
#include "cached/prefix.h"
#include "cached/session.h"
#include "cached/shard.h"
#include "cached/tenant.h"

#define SERVER_HASH_BUCKETS       4096u
#define SERVER_SEARCH_UNITS       20000u      // work units between two looks at the deadline: 0.05 to 0.3 ms
#define SERVER_SEARCH_SLICE_NS    300000u     // of a lane's search, until other sessions have had their turn
#define SERVER_COMMIT_PATIENCE_NS 1000000000u // that a plan waits for cut searches, until no more are cut
#define SERVER_HINT_NS            2000000u    // of a lane's search for a hint, which bulk work may wait for
#define SERVER_BUILD_UNITS        8000u // work units of a clustering slice, while which a decode task may wait: 0.05 to 0.2 ms
#define SERVER_PLAN_PAGES         128u         // pages that a slice of a plan gives frames to
#define SERVER_MOVE_BYTES         65536u       // K and V that a slice of a plan copies
#define SERVER_APPEND_SLICE_BYTES (256u << 10) // K and V that a slice of an append or read copies: below 1 ms
#define SERVER_WAITING_SLICE_NS   300000u      // going on with appends that waited, until others have their turn
#define SERVER_BUILD_AFTER        64u          // tasks, while a lane waits for clustering: then a slice of it is next
#define SERVER_SPARE_CHUNK_BYTES  (6ull << 20) // of index memory for each shard, beyond --index-bytes, that lies idle
#define SERVER_SPARE_CONNECTIONS  8u // beyond --sessions-max: for icecachectl, and for those that are yet to say hello
#define SERVER_HELLO_DEADLINE_NS  (5ull * 1000000000u)
#define SERVER_ACCEPT_PAUSE_NS    (100ull * 1000000u)
#define SERVER_LEAVE_NS           (5ull * 1000000000u) // beyond it what the GPU driver holds is not waited for at a stop
#define SERVER_FAREWELL_NS        (100ull * 1000000u) // between the last reply and the closing of the sockets at a stop
#define SERVER_INFLIGHT_BYTES_MAX (128ull << 20)      // of a session's requests, beyond which it must wait for replies
#define SERVER_STALL_RETRY_NS     (100ull * 1000000u)
#define SERVER_IDLE_LOOK_NS       (500ull * 1000000u)
#define SERVER_IDLE_MIN_NS        (2ull * 1000000000u)
#define SERVER_STARVED_RETRY_NS   (1000000ull)           // other shards make room meanwhile
#define SERVER_SEAL_WAIT_NS       (600ull * 1000000000u) // of a sealing for lanes that wake
#define SERVER_ROOM_WAIT_NS       (10ull * 1000000000u)  // of appends for room, of reads for pages

// Counters and latencies of requests. Reactor only.
struct server_stats {
    uint64_t retrieves, retrieves_partial, appends, reads, hints, errors, bytes_moved, sessions_reclaimed;
    struct histogram queue, search, fetch, copy, total, append, read;
};

struct server {
    // Immutable after start.
    struct env *env;
    const struct config *config;
    uint64_t boot_token;
    uint64_t started_ns;
    struct pool *pool;
    struct disk *disk; // NULL: no spill tier, as the next two
    struct extents *extents;
    struct tier_book *books; // [pool / EXTENT_UNIT]; a frame's is its shard's
    struct budget index_budget, shared_budget;
    struct gpu_system gpu_system;
    uint32_t shard_count, shard_room; // running, and in the allocation
    struct shard *shards;
    char control_path[128], data_path[128], lock_path[128];

    // Any thread.
    struct completion_list completions;
    struct task_queue keeper_queue; // work that takes long: populate, unmap
    pthread_t keeper;
    bool keeper_runs;   // main thread, as the next
    bool stopped_early; // by a signal, before it served
    struct gpus gpus;
    struct tier_stats tier_stats;

    // Reactor only.
    int epoll_fd, listener_fd, lock_fd, signal_fd;
    struct env_bus *bus;
    bool bus_due; // it is to be looked at, in this round or the next
    bool stopping;
    uint64_t stop_deadline_ns, farewell_ns;
    uint64_t accept_from_ns; // the listener is not watched until then; 0: it is
    uint32_t session_count;  // connections of every kind
    uint32_t worker_count;   // those that have said hello as workers
    uint32_t sequence_count, ops;
    uint64_t next_id;
    struct session *sessions, *graveyard;
    struct session *rings_ready, *rings_ready_tail; // with rings that have something to do (rings.c)
    struct sequence *sequences[SERVER_HASH_BUCKETS];
    struct prefixes prefixes;
    struct tenants tenants;
    struct op *room_waiting; // for sealed prefixes to go
    bool disk_off_said;      // it has been logged
    uint64_t idle_look_ns;   // when sequences are looked at for sleep next
    struct server_stats stats;
    struct counts counts;
    struct intake intake;
    struct admission_state admission;
};

// From start to end (server.c, pool_start.c), in this order. What fails logs its cause and leaves nothing that the
// calls below, stop_threads, reactor_fini and fini, do not give back; those three may be called whatever was reached in
// between.
ICE_MUST_CHECK bool server_init(struct server *server, struct env *env, const struct config *config); // false: no fini
ICE_MUST_CHECK bool server_take_directory(struct server *server);
ICE_MUST_CHECK bool server_take_pool(struct server *server);
ICE_MUST_CHECK bool server_take_disk(struct server *server); // where one is configured
ICE_MUST_CHECK bool server_start_threads(struct server *server);
// Runs what is queued, joins. Ends the process where a CUDA driver that hangs keeps a thread.
void server_stop_threads(struct server *server);
// Ends the process at once, with a failure: a CUDA driver holds memory that cannot be freed under it.
_Noreturn void server_abandon(const char *what);
void server_fini(struct server *server);

// Bytes of a page in memory, for K or V rows of row_bytes.
uint64_t server_frame_bytes(const struct server *server, uint64_t row_bytes);

// Reactor (reactor.c).
int reactor_init(struct server *server); // 0 or -errno; logs the cause
void reactor_run(struct server *server); // until SIGTERM has drained
void reactor_fini(struct server *server);
// Watches a descriptor for reading; `what` comes back with it (NULL-free). 0 or -errno.
int reactor_watch(struct server *server, int fd, void *what);
// The same for a session's ring, for edges.
int reactor_watch_ring(struct server *server, int fd, struct session *session);
void reactor_unwatch(struct server *server, int fd);
void reactor_pause_accepting(struct server *server); // for SERVER_ACCEPT_PAUSE_NS

// Replies (reply.c). All reactor only.
void reply_error(struct server *server, struct session *session, const struct env_message *to, uint64_t request_id,
                 ice_status status, const char *text);
void reply_op(struct op *op, ice_status status, const char *text);
void reply_sequence_open(struct server *server, struct session *session, const struct env_message *to,
                         uint64_t request_id, uint64_t sequence_id);
void reply_lookup(struct server *server, struct session *session, const struct env_message *to, uint64_t request_id,
                  uint64_t tokens);
void reply_attach(struct server *server, struct session *session, const struct env_message *to, uint64_t request_id,
                  uint64_t sequence_id, uint64_t tokens);
void reply_sequence_info(struct server *server, struct session *session, const struct env_message *to,
                         uint64_t request_id, struct sequence *sequence);
// Statistics (report.c).
void report_stats(struct server *server, struct session *session, const struct env_message *to, uint64_t request_id,
                  uint32_t sequences_from);
void reply_send(struct server *server, struct session *session, const uint8_t *route, size_t route_bytes,
                Icecache__Wire__Reply *reply);

// Requests about sealed prefixes that are answered at once (op_prefix.c).
void lookup_prefix(struct server *server, struct session *session, const Icecache__Wire__Request *request,
                   const struct env_message *message);
void attach_prefix(struct server *server, struct session *session, const Icecache__Wire__Request *request,
                   const struct env_message *message);
void remove_prefix(struct server *server, struct session *session, const Icecache__Wire__Request *request,
                   const struct env_message *message);
void report_prefixes(struct server *server, struct session *session, const struct env_message *to, uint64_t request_id,
                     const Icecache__Wire__PrefixList *list);
// The namespace that a request about prefixes means; NULL: an admin session's, of all.
const char *named_space(const struct session *session, const char *name_space);
// What is held, and what namespaces have (report_held.c).
void report_leases(struct server *server, struct session *session, const struct env_message *to, uint64_t request_id,
                   uint32_t from);
void report_namespaces(struct server *server, struct session *session, const struct env_message *to,
                       uint64_t request_id, uint32_t from);

// Stems that have been idle for long fall asleep (idle.c). Returns when to look again.
uint64_t idle_look(struct server *server, uint64_t now_ns);
bool idle_stem(const struct stem *stem, uint64_t now_ns, uint64_t idle_ns); // it may sleep: unused for so long

// A request whose turn it is (dispatch.c), of a session that lives. Takes ownership of the message.
void dispatch_request(struct server *server, struct session *session, const Icecache__Wire__Request *request,
                      struct env_message *message);

#endif
