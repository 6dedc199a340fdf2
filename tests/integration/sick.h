// icecached over a disk that a test makes sick, or takes the power from: cached/main.c with the file functions of the
// table of outside effects replaced (sick_daemon.c). Test and daemon share a file, which outlives the daemon.
#ifndef ICECACHE_TESTS_SICK_H
#define ICECACHE_TESTS_SICK_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#define SICK_FOLDER_VARIABLE "ICECACHE_SICK" // in the daemon's environment: where the two files lie
#define SICK_FILE            "sick"          // struct sick
#define SICK_STABLE_FILE     "stable"        // what of the data file has been synced
#define SICK_NAME_BYTES      64u
#define SICK_JOURNAL_BYTES   ((uint64_t)256 << 20)
#define SICK_SECTOR_BYTES    512u // what a device writes whole or not at all

enum sick_kind { SICK_WRITE, SICK_FILE_WRITTEN, SICK_FILE_UNLINKED };
enum sick_state {
    SICK_BEGUN, // the call has not returned
    SICK_DONE,  // it has; a write can still be lost
    SICK_SYNCING,
    SICK_STABLE, // a write: a sync that began after it has returned 0
    SICK_DROPPED // a write: a sync has failed, and the system has forgotten it: no later one makes it stable
};

// What the daemon has done to its files: a write, or a small file with all its bytes.
struct sick_entry {
    uint64_t bytes, room; // of what follows; of all
    uint64_t offset;
    enum sick_kind kind;
    _Atomic int state; // enum sick_state
    char name[SICK_NAME_BYTES];
    uint8_t data[];
};

struct sick {
    // Set by the test. Errors are -errno, 0: none.
    _Atomic int read_error, write_error;       // of all transfers of the data file
    _Atomic uint32_t write_failures;           // so many are to come; UINT32_MAX: all
    _Atomic int sync_error;                    // of the next sync
    _Atomic int read_file_error, unlink_error; // of all
    _Atomic uint64_t bad_from, bad_until;      // places that cannot be read (-EIO)
    _Atomic bool hangs;                        // transfers and syncs do not return
    _Atomic bool shortens;                     // transfers move a part
    _Atomic uint32_t unlink_pause_us;          // before a file is unlinked
    uint64_t close_wait_ns;                    // of the disk, set before the daemon starts; 0: as it is
    // Told by the daemon.
    _Atomic uint64_t reads, writes, syncs, hanging;
    // The journal, for a loss of power. Threads engine only.
    bool keeps_journal; // set before the daemon starts
    uint64_t seed;      // of its pauses
    _Atomic uint64_t journal_used;
    _Alignas(64) uint8_t journal[SICK_JOURNAL_BYTES];
};

#endif
