// Opening, sharing and giving up the staging area.
//
// The daemon makes, sizes and seals the memory; it is accepted only if it cannot shrink under our writes. A half stays
// busy until the daemon has answered the request that uses it, also when the caller has stopped waiting. The client's
// lock guards everything but the bytes.
#include "client/staging.h"

#include "client/error.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

static void staging_unreference(struct staging *staging)
{
    staging->references--;
    if (staging->references == 0) {
        staging_fetch_close(staging);
        (void)munmap(staging->base, staging->mapped_bytes);
        free(staging);
    }
}

void staging_forget(ice_client *client)
{
    struct staging *staging = client->staging;
    client->staging = NULL;
    client->staging_opening = false;
    if (staging != NULL) {
        staging_unreference(staging);
    }
}

static void refuse(ice_client *client, ice_status status, const char *text)
{
    client->staging_status = status;
    (void)snprintf(client->staging_text, sizeof client->staging_text, "%s", text);
}

static uint64_t half_of(uint64_t bytes)
{
    uint64_t alignment = bytes >= 2 * 4096 ? 4096 : 64;
    return bytes / 2 / alignment * alignment;
}

static void staging_map(ice_client *client, int fd, uint64_t bytes)
{
    struct stat stat;
    int seals = fcntl(fd, F_GET_SEALS);
    if (bytes == 0 || bytes > SIZE_MAX || fstat(fd, &stat) != 0 || stat.st_size < 0 || (uint64_t)stat.st_size < bytes) {
        refuse(client, ICE_INTERNAL, "the staging memory is smaller than the daemon says");
        return;
    }
    if (seals < 0 || (seals & F_SEAL_SHRINK) == 0) {
        refuse(client, ICE_INTERNAL, "the staging memory is not sealed against shrinking");
        return;
    }
    struct staging *staging = calloc(1, sizeof *staging);
    if (staging == NULL) {
        refuse(client, ICE_NO_MEMORY, "no memory for the staging area's record");
        return;
    }
    void *base = mmap(NULL, (size_t)bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (base == MAP_FAILED) {
        char text[128];
        (void)snprintf(text, sizeof text, "mmap of %llu bytes of staging: errno %d", (unsigned long long)bytes, errno);
        refuse(client, errno == ENOMEM ? ICE_NO_MEMORY : ICE_SYSTEM, text);
        free(staging);
        return;
    }
    // Contents of appends are user data, and a forked child has no use for them.
    (void)madvise(base, (size_t)bytes, MADV_DONTDUMP);
    (void)madvise(base, (size_t)bytes, MADV_DONTFORK);
    staging->references = 1;
    staging->base = base;
    staging->mapped_bytes = bytes;
    staging->half_bytes = half_of(bytes);
    client->staging = staging;
}

void staging_adopt(ice_client *client, struct pending *pending)
{
    client->staging_opening = false;
    if (pending->status != ICE_OK) {
        refuse(client, pending->status, pending->text);
        return;
    }
    const Icecache__Wire__ControlReply *reply = pending->control_reply;
    if (reply == NULL || reply->body_case != ICECACHE__WIRE__CONTROL_REPLY__BODY_STAGING || pending->fd < 0) {
        refuse(client, ICE_BAD_MESSAGE, "the daemon's answer brings no staging memory");
        return;
    }
    staging_map(client, pending->fd, reply->staging->bytes);
}

// Sends the request; its record belongs to the table, and its reply is taken in by whoever receives it.
static ice_status staging_open(ice_client *client, uint64_t generation)
{
    struct pending *pending = pending_create();
    if (pending == NULL) {
        return ICE_NO_MEMORY;
    }
    Icecache__Wire__StagingOpen open = ICECACHE__WIRE__STAGING_OPEN__INIT;
    open.bytes = client->staging_bytes;
    Icecache__Wire__ControlRequest request = ICECACHE__WIRE__CONTROL_REQUEST__INIT;
    request.body_case = ICECACHE__WIRE__CONTROL_REQUEST__BODY_STAGING_OPEN;
    request.staging_open = &open;
    ice_status status = exchange_submit_control(client, generation, &request, pending);
    if (status != ICE_OK) {
        pending_destroy(pending);
        return status;
    }
    pending->opens_staging = true;
    client->staging_opening = true;
    exchange_abandon(client, pending);
    return ICE_OK;
}

static bool staging_opened(void *argument)
{
    const ice_client *client = argument;
    return !client->staging_opening;
}

static bool half_free(void *argument)
{
    const ice_client *client = argument;
    return client->staging == NULL || !client->staging->busy[0] || !client->staging->busy[1];
}

bool staging_try_acquire(ice_client *client, struct staging **staging, uint32_t *half)
{
    for (uint32_t i = 0; client->staging != NULL && i < STAGING_HALVES; i++) {
        if (!client->staging->busy[i]) {
            client->staging->busy[i] = true;
            client->staging->references++;
            *staging = client->staging;
            *half = i;
            return true;
        }
    }
    return false;
}

// Until the area is there; the error says why it is not.
static ice_status staging_ensure(ice_client *client, uint64_t generation, uint64_t until_us)
{
    ice_status status = ICE_OK;
    if (!client->staging_opening) {
        status = staging_open(client, generation);
    }
    if (status == ICE_OK) {
        status = exchange_wait_until(client, generation, staging_opened, client, until_us);
    }
    if (status == ICE_OK && client->staging == NULL) {
        status = exchange_check(client, generation);
        if (status == ICE_OK) {
            status = error_set(client->staging_status, "the staging area (staging_bytes %llu): %s",
                               (unsigned long long)client->staging_bytes, client->staging_text);
        }
    }
    return status;
}

ice_status staging_acquire(ice_client *client, uint64_t generation, uint64_t until_us, struct staging **staging,
                           uint32_t *half)
{
    for (;;) {
        ice_status status = exchange_check(client, generation);
        if (status == ICE_OK && client->staging == NULL) {
            status = staging_ensure(client, generation, until_us);
        }
        if (status != ICE_OK) {
            return status;
        }
        if (staging_try_acquire(client, staging, half)) {
            return ICE_OK;
        }
        status = exchange_wait_until(client, generation, half_free, client, until_us);
        if (status != ICE_OK) {
            return status;
        }
    }
}

void staging_lose(struct staging *staging)
{
    staging_unreference(staging); // the half stays busy; where the area goes, the driver waits for its copies first
}

void staging_release(ice_client *client, struct staging *staging, uint32_t half)
{
    staging->busy[half] = false;
    staging_unreference(staging);
    exchange_notify(client);
}
