// See sim_disk.h. One thread.
#include "sim_disk.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

void sim_disk_init(struct sim_disk *sim, uint64_t size)
{
    *sim = (struct sim_disk){.bytes = calloc(1, size), .before = calloc(1, size), .size = size};
    assert(sim->bytes && sim->before);
}

void sim_disk_fini(struct sim_disk *sim)
{
    assert(sim->held_count == 0);
    free(sim->bytes);
    free(sim->before);
}

struct disk *sim_disk_as_disk(struct sim_disk *sim)
{
    return (struct disk *)sim;
}

static struct sim_disk *sim_of(const struct disk *disk)
{
    return (struct sim_disk *)disk;
}

static bool overlap(const struct disk_request *a, const struct disk_request *b)
{
    return a->offset < b->offset + b->bytes && b->offset < a->offset + a->bytes;
}

void disk_submit(struct disk *disk, struct disk_request *first)
{
    struct sim_disk *sim = sim_of(disk);
    for (struct disk_request *request = first, *next; request; request = next) {
        next = request->next;
        request->next = NULL;
        assert(sim->held_count < SIM_DISK_HELD_MAX && request->op != DISK_SYNC);
        assert((request->offset | request->bytes | (uintptr_t)request->memory) % DISK_ALIGN == 0);
        assert(request->bytes > 0 && request->offset + request->bytes <= sim->size);
        for (uint32_t i = 0; request->op == DISK_WRITE && i < sim->held_count; i++)
            assert(sim->held[i]->op != DISK_WRITE || !overlap(request, sim->held[i]));
        if (request->op == DISK_WRITE) {
            memcpy(sim->before + request->offset, sim->bytes + request->offset, request->bytes);
            memcpy(sim->bytes + request->offset, request->memory, request->bytes / 2);
        }
        sim->held[sim->held_count++] = request;
    }
}

void sim_disk_answer(struct sim_disk *sim, uint32_t which, enum sim_fault fault)
{
    assert(which < sim->held_count);
    struct disk_request *request = sim->held[which];
    sim->held[which] = sim->held[--sim->held_count];
    request->result = sim->off || fault == SIM_FAILS ? -EIO : 0;
    if (request->op == DISK_READ) {
        sim->reads++;
        sim->failed_reads += request->result != 0 || fault == SIM_OLD_BYTES;
        const uint8_t *from = fault == SIM_OLD_BYTES ? sim->before : sim->bytes;
        if (request->result == 0)
            memcpy(request->memory, from + request->offset, request->bytes);
    } else {
        const uint64_t half = request->bytes / 2;
        sim->writes++;
        sim->failed_writes += request->result != 0;
        if (request->result == 0)
            memcpy(sim->bytes + request->offset + half, (const uint8_t *)request->memory + half, half);
    }
    request->done(request);
}

bool disk_is_off(const struct disk *disk)
{
    return sim_of(disk)->off;
}

uint32_t disk_memory_align(const struct disk *disk)
{
    (void)disk;
    return DISK_ALIGN;
}

// ---- what a test of the tier does not call, but the daemon's library names ----

int disk_open(struct env *env, const struct disk_params *params, struct disk **out, char *text, size_t capacity)
{
    (void)env, (void)params, (void)out, (void)text, (void)capacity;
    return -ENOSYS;
}

int disk_close(struct disk *disk)
{
    (void)disk;
    return 0;
}

void disk_usage(struct disk *disk, struct disk_usage *out)
{
    (void)disk;
    *out = (struct disk_usage){.engine = "simulated", .because = ""};
}

bool disk_hangs(struct disk *disk)
{
    (void)disk;
    return false;
}
