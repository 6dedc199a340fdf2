// A disk in memory, behind the functions of cached/disk.h (a test links it in their place). It holds what is submitted
// until the test says which request is answered, and fails or falsifies as many as it is told to.
//
// A write is torn: its first half reaches the file when it is submitted, its second half when it is answered.
#ifndef ICECACHE_TEST_SIM_DISK_H
#define ICECACHE_TEST_SIM_DISK_H

#include "cached/disk.h"

#define SIM_DISK_HELD_MAX 1024u

struct sim_disk {
    uint8_t *bytes, *before; // before: what each place held until it was last written
    uint64_t size;
    struct disk_request *held[SIM_DISK_HELD_MAX];
    uint32_t held_count;
    bool off;
    uint64_t reads, writes, failed_reads, failed_writes;
};

enum sim_fault { SIM_WELL, SIM_FAILS, SIM_OLD_BYTES };

void sim_disk_init(struct sim_disk *sim, uint64_t size);
void sim_disk_fini(struct sim_disk *sim);
struct disk *sim_disk_as_disk(struct sim_disk *sim);
// Answers one of the held requests.
void sim_disk_answer(struct sim_disk *sim, uint32_t which, enum sim_fault fault);

#endif
