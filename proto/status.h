// Status codes shared by the daemon and its clients.
//
// One list, (name, value, scope, text). The scope is the largest thing that is lost when the code is returned: only
// the request, the whole session, or the daemon. Values are part of the wire protocol: never renumber, only add.
#ifndef ICECACHE_PROTO_STATUS_H
#define ICECACHE_PROTO_STATUS_H

#include <stdbool.h>

enum ice_scope {
    ICE_SCOPE_NONE,    // nothing is lost
    ICE_SCOPE_REQUEST, // this request had no effect; the session goes on
    ICE_SCOPE_SESSION, // the session and all that it held is gone; connect again
    ICE_SCOPE_DAEMON,  // the daemon itself is gone or cannot serve
};

// clang-format off
#define ICE_STATUS_LIST(X) \
    X(ICE_OK,                    0, NONE,    "ok") \
    X(ICE_INVALID_ARGUMENT,      1, REQUEST, "an argument is out of range; the message names it") \
    X(ICE_BAD_MESSAGE,           2, REQUEST, "the message cannot be decoded; use a client library of this version") \
    X(ICE_TOO_LARGE,             3, REQUEST, "the message or shape exceeds a limit; the message names the limit") \
    X(ICE_VERSION_MISMATCH,      4, SESSION, "client and daemon speak different protocol versions; install the same release of both") \
    X(ICE_NOT_SUPPORTED,         5, REQUEST, "the feature is not supported by this daemon; the message names it") \
    X(ICE_UNKNOWN_SEQUENCE,      6, REQUEST, "no such sequence in this session; open it first") \
    X(ICE_UNKNOWN_LANDING,       7, REQUEST, "no such landing in this session; open it first") \
    X(ICE_UNKNOWN_LAYER,         8, REQUEST, "the layer is outside the sequence or the landing") \
    X(ICE_SHAPE_MISMATCH,        9, REQUEST, "head counts, head_dim or dtype differ from what was declared at open") \
    X(ICE_POSITION_GAP,         10, REQUEST, "the append starts after the end of the layer; append the missing positions first") \
    X(ICE_CONFLICT,             11, REQUEST, "the positions already hold other data; positions cannot be rewritten") \
    X(ICE_OUT_OF_BOUNDS,        12, REQUEST, "the data would be read or written outside its buffer") \
    X(ICE_NOT_FINITE,           13, REQUEST, "a key or query is NaN, infinite or too large to square; check the model's numerics") \
    X(ICE_POOL_FULL,            14, REQUEST, "the page pool is full; close sequences or raise --pool-bytes") \
    X(ICE_INDEX_FULL,           15, REQUEST, "the index memory is full; close sequences or raise --index-bytes") \
    X(ICE_SHARED_FULL,          16, REQUEST, "the memory for landings and staging is used up; close landings or raise --shared-bytes") \
    X(ICE_LIMIT,                17, REQUEST, "a limit on counts is reached; the message names it") \
    X(ICE_BUSY,                 18, REQUEST, "the landing row still belongs to an earlier request; wait for its reply") \
    X(ICE_QUEUE_FULL,           19, REQUEST, "too many requests in flight on this session; wait for replies") \
    X(ICE_TIMEOUT,              20, REQUEST, "the deadline passed before the reply came; the request may still be carried out") \
    X(ICE_NO_MEMORY,            21, REQUEST, "the system has no memory left for this request") \
    X(ICE_SHUTTING_DOWN,        22, SESSION, "the daemon is stopping; connect again when it is back") \
    X(ICE_UNKNOWN_SESSION,      23, SESSION, "the session is unknown to this daemon; connect again") \
    X(ICE_DISCONNECTED,         24, SESSION, "the daemon closed the connection or died; connect again") \
    X(ICE_NO_DAEMON,            25, DAEMON,  "no daemon answers on this socket; start icecached or check the path") \
    X(ICE_FORKED,               26, SESSION, "the handle was made by the parent process; connect in the child") \
    X(ICE_PERMISSION,           27, SESSION, "this user may not use the daemon; check the socket's owner and mode") \
    X(ICE_SYSTEM,               28, REQUEST, "a system call failed; the message names it") \
    X(ICE_INTERNAL,             29, DAEMON,  "a defect in icecache; please report it with the log") \
    X(ICE_SPILL_FULL,           30, REQUEST, "the spill file is full; close sequences or raise --spill-bytes") \
    X(ICE_PAGE_LOST,            31, REQUEST, "the disk has lost K and V of this sequence; close it and compute it again") \
    X(ICE_UNKNOWN_PREFIX,       32, REQUEST, "no sealed prefix of this model and namespace begins like this; append the tokens instead") \
    X(ICE_DISK_FAILED,          33, REQUEST, "the daemon has no disk, or it failed; the message says more") \
    X(ICE_OVERLOADED,           34, REQUEST, "the daemon has more work than it can do in time; wait for replies, and keep fewer requests in flight") \
    X(ICE_QUOTA,                35, REQUEST, "a quota of the namespace is used up; the message says which one and what to do")
// clang-format on

#ifdef ICECACHE_H
// The public header came first and holds the same enum, written out for its readers: prove that they agree.
#define ICE_STATUS_CHECK(name, value, scope, text) _Static_assert(name == (value), "icecache.h and status.h disagree");
ICE_STATUS_LIST(ICE_STATUS_CHECK)
#undef ICE_STATUS_CHECK
#else
#define ICE_STATUS_ENUM(name, value, scope, text) name = (value),
typedef enum ice_status { ICE_STATUS_LIST(ICE_STATUS_ENUM) } ice_status;
#undef ICE_STATUS_ENUM
#endif

#define ICE_MUST_CHECK __attribute__((warn_unused_result))

// The code's name ("ICE_POOL_FULL") and its text. Never NULL, also for values outside the list. Thread-safe.
const char *status_name(int status);
const char *status_text(int status);
enum ice_scope status_scope(int status);
bool status_is_known(int status);

#endif
