// The staging area as the destination of copies from GPU memory. Made at the first append from there, closed with the
// area.
//
// Whoever makes it holds the client's lock meanwhile, so that it is made once; after that it does not change until the
// last half is given back.
#include "client/error.h"
#include "client/handles.h"
#include "client/staging.h"

#include "gpu/fetch.h"

#include <stdlib.h>

static ice_status open_locked(struct staging *staging, uint64_t address, char *text)
{
    if (staging->fetch != NULL) {
        return gpu_fetch_check(staging->fetch, address, text);
    }
    struct gpu_fetch *fetch = malloc(sizeof *fetch);
    if (fetch == NULL) {
        return ICE_NO_MEMORY;
    }
    ice_status status = gpu_fetch_open(secure_getenv("ICECACHE_CUDA_LIBRARY"), address, fetch, text);
    if (status != ICE_OK) {
        free(fetch);
        return status;
    }
    status = gpu_fetch_register(fetch, staging->base, staging->mapped_bytes, text);
    if (status != ICE_OK) {
        gpu_fetch_close(fetch);
        free(fetch);
        return status;
    }
    staging->fetch = fetch;
    return ICE_OK;
}

ice_status staging_fetch_open(ice_client *client, struct staging *staging, uint64_t address)
{
    char text[CUDA_TEXT_BYTES] = "";
    (void)pthread_mutex_lock(&client->lock);
    ice_status status = open_locked(staging, address, text);
    (void)pthread_mutex_unlock(&client->lock);
    return status == ICE_OK ? ICE_OK : error_set(status, "%s", text[0] != '\0' ? text : status_text((int)status));
}

void staging_fetch_close(struct staging *staging)
{
    if (staging->fetch != NULL) {
        gpu_fetch_unregister(staging->fetch, staging->base);
        gpu_fetch_close(staging->fetch);
        free(staging->fetch);
        staging->fetch = NULL;
    }
}
