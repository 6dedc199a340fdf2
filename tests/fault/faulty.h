// The real table of outside effects, in which one call fails: the n-th of one kind after arming. It counts what is
// held, so that a test can tell that everything has been given back. Thread-safe.
#ifndef ICECACHE_TESTS_FAULTY_H
#define ICECACHE_TESTS_FAULTY_H

#include "cached/env.h"

#include <stdatomic.h>
#include <stdbool.h>

// clang-format off
#define FAULT_KINDS(X) \
    X(ACQUIRE, "acquire") X(RANDOM, "random") X(MAP_REGION, "map_region") X(MEMFD, "memfd_create") \
    X(MAP_SHARED, "map_shared") X(DIRECTORY, "make_directory") X(LOCK, "lock_file") X(UNLINK, "unlink") \
    X(LISTEN, "listen") X(ACCEPT, "accept") X(CONTROL_SEND, "control_send") X(CONTROL_RECEIVE, "control_receive") \
    X(EVENT, "event_open") X(BELL, "bell_open") \
    X(BUS_OPEN, "bus_open") X(BUS_RECEIVE, "bus_receive") X(BUS_SEND, "bus_send") X(READ_SYSTEM, "read_system") \
    X(OPEN_FOLDER, "open_directory") X(OPEN_FILE, "open_data_file") X(FILE_BYTES, "file_bytes") \
    X(CHECK_FILE, "check_file") X(RESIZE_FILE, "resize_file") X(PREALLOCATE, "preallocate") X(PREAD, "pread") \
    X(PWRITE, "pwrite") X(SYNC_FILE, "sync_file") X(RING_RESULT, "ring_result") X(WRITE_FILE, "write_file") \
    X(READ_FILE, "read_file") X(LIST_FILES, "list_files") X(UNLINK_FILE, "unlink_file")
// clang-format on

enum fault_kind {
#define FAULT_KIND(name, text) FAULT_##name,
    FAULT_KINDS(FAULT_KIND)
#undef FAULT_KIND
        FAULT_KIND_COUNT
};
const char *fault_name(enum fault_kind kind);

struct faulty {
    struct env env; // what the daemon gets; first, so that the daemon's pointer leads back here
    struct env real;
    uint32_t nodes;           // NUMA nodes that there seem to be; 0: as the machine has them
    _Atomic int kind;         // FAULT_KIND_COUNT: none
    _Atomic uint32_t left;    // calls of the kind until the one that fails
    _Atomic uint32_t fired;   // calls that have failed since arming
    _Atomic int error;        // -errno, or an ice_status for the control socket
    _Atomic uint64_t bytes;   // acquired and not released
    _Atomic uint32_t regions; // mapped and not unmapped, private and shared
};

void faulty_init(struct faulty *faulty);
// The nth call from now on (1: the next) of the kind fails with the error, all others are real. One fault at a time.
void faulty_arm(struct faulty *faulty, enum fault_kind kind, uint32_t nth, int error);
// False where the fault never came up.
bool faulty_disarm(struct faulty *faulty);

#endif
