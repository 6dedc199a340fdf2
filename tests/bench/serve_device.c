// The device's own latency for a batch of pages, by the daemon's disk with as many in flight as the daemon has, on a
// file of the same file system: the batch is handed in at once, as a retrieve's missing pages are.
//
// Thread-safety: `left` and `error` are guarded by the lock; all else is the main thread's.
#include "serve.h"

#include "cached/disk.h"
#include "cached/env_linux.h"

#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#define BATCH_MAX 4096u // pages

struct page_read {
    struct disk_request request; // first
    struct serve_device *device;
};

struct serve_device {
    struct env env;
    struct disk *disk;
    char folder[SERVE_PATH_ROOM];
    uint32_t page_bytes, page_count;
    uint8_t *memory; // [BATCH_MAX][page_bytes]
    struct page_read *reads;
    struct random random;
    pthread_mutex_t lock;
    pthread_cond_t ended;
    uint32_t left;
    int error;
};

static void read_done(struct disk_request *request)
{
    struct serve_device *device = ((struct page_read *)request)->device;
    pthread_mutex_lock(&device->lock);
    device->error = request->result != 0 ? request->result : device->error;
    if (--device->left == 0) {
        pthread_cond_signal(&device->ended);
    }
    pthread_mutex_unlock(&device->lock);
}

// One chain of `count` requests, which are filled in but for where they lie in memory.
static bool run_batch(struct serve_device *device, enum disk_op op, uint32_t count)
{
    device->left = count;
    device->error = 0;
    for (uint32_t i = 0; i < count; i++) {
        struct disk_request *request = &device->reads[i].request;
        device->reads[i].device = device;
        request->op = op;
        request->memory = device->memory + (size_t)i * device->page_bytes;
        request->bytes = device->page_bytes;
        request->done = read_done;
        request->next = i + 1 < count ? &device->reads[i + 1].request : NULL;
    }
    disk_submit(device->disk, &device->reads[0].request);
    pthread_mutex_lock(&device->lock);
    while (device->left > 0) {
        pthread_cond_wait(&device->ended, &device->lock);
    }
    pthread_mutex_unlock(&device->lock);
    if (device->error != 0) {
        (void)fprintf(stderr, "icecache-bench: serve: the device: %s\n", strerror(-device->error));
    }
    return device->error == 0;
}

// What was never written is read without the device.
static bool write_file(struct serve_device *device)
{
    bool written = true;
    for (size_t i = 0; i < (size_t)BATCH_MAX * device->page_bytes; i += sizeof(uint64_t)) {
        const uint64_t bits = random_bits(&device->random);
        memcpy(device->memory + i, &bits, sizeof bits);
    }
    for (uint32_t page = 0, n; written && page < device->page_count; page += n) {
        n = device->page_count - page < BATCH_MAX ? device->page_count - page : BATCH_MAX;
        for (uint32_t i = 0; i < n; i++) {
            device->reads[i].request.offset = (uint64_t)(page + i) * device->page_bytes;
        }
        written = run_batch(device, DISK_WRITE, n);
    }
    return written;
}

struct serve_device *serve_device_create(const char *disk, uint64_t bytes, uint32_t page_bytes, uint64_t seed)
{
    char text[256] = "no memory";
    struct serve_device *device = calloc(1, sizeof *device);
    if (device == NULL) {
        return NULL;
    }
    pthread_mutex_init(&device->lock, NULL);
    pthread_cond_init(&device->ended, NULL);
    env_linux_init(&device->env);
    random_init(&device->random, seed);
    device->page_bytes = page_bytes;
    device->page_count = (uint32_t)(bytes / page_bytes);
    device->memory = aligned_alloc(DISK_ALIGN, (size_t)BATCH_MAX * page_bytes);
    device->reads = calloc(BATCH_MAX, sizeof *device->reads);
    (void)snprintf(device->folder, sizeof device->folder, "%.200s/device", disk);
    const struct disk_params params = {
        .directory = device->folder, .bytes = (uint64_t)device->page_count * page_bytes, .depth = DISK_DEPTH_MAX};
    if (device->memory == NULL || device->reads == NULL || mkdir(device->folder, 0700) != 0 ||
        disk_open(&device->env, &params, &device->disk, text, sizeof text) != 0) {
        (void)fprintf(stderr, "icecache-bench: serve: %s: %s\n", device->folder, text);
        serve_device_destroy(device);
        return NULL;
    }
    if (!write_file(device)) {
        serve_device_destroy(device);
        return NULL;
    }
    return device;
}

void serve_device_destroy(struct serve_device *device)
{
    if (device == NULL) {
        return;
    }
    const bool is_closed = disk_close(device->disk) == 0;
    folder_remove(device->folder);
    if (is_closed) { // a device that hangs may still write there
        free(device->memory);
        free(device->reads);
        pthread_cond_destroy(&device->ended);
        pthread_mutex_destroy(&device->lock);
        free(device);
    }
}

bool serve_device_measure(struct serve_device *device, uint32_t pages, double *us, uint32_t count)
{
    pages = pages < 1 ? 1 : pages < BATCH_MAX ? pages : BATCH_MAX;
    for (uint32_t i = 0; i < count; i++) {
        for (uint32_t page = 0; page < pages; page++) {
            device->reads[page].request.offset =
                (uint64_t)random_below(&device->random, device->page_count) * device->page_bytes;
        }
        const uint64_t begun_ns = measure_ns();
        if (!run_batch(device, DISK_READ, pages)) {
            return false;
        }
        us[i] = (double)(measure_ns() - begun_ns) / 1000;
    }
    return true;
}
