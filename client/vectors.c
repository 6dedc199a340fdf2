// Registered host memory through which a retrieve's queries leave a GPU. For each GPU there is one way (gpu/fetch.h)
// with a few buffers, made at first use and kept until the client's close; a buffer belongs to one submit, from before
// its copies are issued until they are in the request's frame.
//
// A buffer whose copies have not ended within the deadline is not used again before they have. The memory is shared and
// not inherited: a fork neither copies pinned pages nor leaves the GPU writing to the wrong process's.
//
// Locks: the client's, for the list and the buffers' states; not for the memory of a taken buffer, and it is never held
// while a copy is waited for.
#include "client/vectors.h"

#include "client/error.h"
#include "client/handles.h"

#include "gpu/export.h"
#include "gpu/fetch.h"

#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#define BUFFERS            8u // submits from GPU memory that wait for their copies at the same time; more take turns
#define BUFFER_BYTES_LEAST (64u << 10)
#define PAUSE_US           50u // between looks for a free buffer

_Static_assert(BUFFERS <= GPU_FENCES_MAX, "a buffer's fence has its number");

struct buffer {
    uint8_t *memory; // registered; NULL: none
    uint64_t bytes;
    enum buffer_state {
        BUFFER_FREE,
        BUFFER_TAKEN,
        BUFFER_LATE,
        BUFFER_LOST
    } state; // late: its fence tells when it is free
};

struct vectors {
    struct vectors *next;
    struct gpu_fetch fetch;
    struct buffer buffers[BUFFERS];
};

// ---- ways ----

static ice_status refused(ice_status status, const char *name, const char *text)
{
    return error_set(status, "options.%s: %s", name, text[0] != '\0' ? text : status_text((int)status));
}

static struct vectors *find(const ice_client *client, cuda_device device)
{
    struct vectors *vectors = client->vectors;
    while (vectors != NULL && vectors->fetch.device.id != device) {
        vectors = vectors->next;
    }
    return vectors;
}

// With the lock held: the way from the GPU of the first piece. NULL: there is none, and why.
static struct vectors *way_open(ice_client *client, const struct vectors_piece *piece, ice_status *status)
{
    char text[CUDA_TEXT_BYTES] = "";
    const cuda_address address = (uintptr_t)piece->from;
    // Any way knows the driver.
    if (client->vectors != NULL) {
        cuda_device device = 0;
        cuda_context context = NULL;
        *status = gpu_address_find(&client->vectors->fetch.device.driver, address, &device, &context, text);
        if (*status != ICE_OK) {
            (void)refused(*status, piece->name, text);
            return NULL;
        }
        struct vectors *known = find(client, device);
        if (known != NULL) {
            return known;
        }
    }
    struct vectors *vectors = calloc(1, sizeof *vectors);
    if (vectors == NULL) {
        *status = error_set(ICE_NO_MEMORY, "no memory for a record of queries from a GPU");
        return NULL;
    }
    *status = gpu_fetch_open(secure_getenv("ICECACHE_CUDA_LIBRARY"), address, &vectors->fetch, text);
    if (*status != ICE_OK) {
        free(vectors);
        (void)refused(*status, piece->name, text);
        return NULL;
    }
    vectors->next = client->vectors;
    client->vectors = vectors;
    return vectors;
}

// All pieces are on one GPU, the landing's where that is on one.
static ice_status pieces_check(const struct vectors *vectors, const ice_landing *landing,
                               const struct vectors_piece *pieces, uint32_t count)
{
    const struct gpu_device *wanted = landing->gpu != NULL ? &landing->gpu->buffer.device : &vectors->fetch.device;
    for (uint32_t i = 0; i < count; i++) {
        char text[CUDA_TEXT_BYTES] = "";
        cuda_device device = 0;
        cuda_context context = NULL;
        const ice_status status =
            gpu_address_find(&vectors->fetch.device.driver, (uintptr_t)pieces[i].from, &device, &context, text);
        if (status != ICE_OK) {
            return refused(status, pieces[i].name, text);
        }
        if (device != wanted->id) {
            return error_set(ICE_INVALID_ARGUMENT, "options.%s is on GPU %d, %s is on GPU %d", pieces[i].name, device,
                             landing->gpu != NULL ? "the landing" : pieces[0].name, wanted->id);
        }
    }
    return ICE_OK;
}

// ---- buffers ----

// A free buffer becomes the caller's; one whose late copies have ended is free.
static bool buffer_try_take(struct vectors *vectors, uint32_t *out)
{
    for (uint32_t i = 0; i < BUFFERS; i++) {
        struct buffer *buffer = &vectors->buffers[i];
        if (buffer->state == BUFFER_FREE || (buffer->state == BUFFER_LATE && gpu_fetch_is_over(&vectors->fetch, i))) {
            buffer->state = BUFFER_TAKEN;
            *out = i;
            return true;
        }
    }
    return false;
}

// With the lock held, which is released while none is free. Nobody tells when copies end, so it looks again and again.
static ice_status buffer_take(ice_client *client, uint64_t generation, struct vectors *vectors, uint64_t until_us,
                              uint32_t *out)
{
    for (;;) {
        const ice_status status = exchange_check(client, generation);
        if (status != ICE_OK || buffer_try_take(vectors, out)) {
            return status;
        }
        if (clock_us() >= until_us) {
            return error_set(ICE_TIMEOUT, "%u copies of queries from the GPU have not ended within the deadline",
                             BUFFERS);
        }
        (void)pthread_mutex_unlock(&client->lock);
        const struct timespec pause = {0, PAUSE_US * 1000};
        (void)nanosleep(&pause, NULL);
        (void)pthread_mutex_lock(&client->lock);
    }
}

static void buffer_free(const struct vectors *vectors, struct buffer *buffer)
{
    if (buffer->memory != NULL) {
        gpu_fetch_unregister(&vectors->fetch, buffer->memory);
        (void)munmap(buffer->memory, (size_t)buffer->bytes);
        buffer->memory = NULL;
    }
}

// A taken buffer gets room for this many bytes; twice as much as it had where it grows.
static ice_status buffer_grow(const struct vectors *vectors, struct buffer *buffer, uint64_t bytes)
{
    if (buffer->memory != NULL && buffer->bytes >= bytes) {
        return ICE_OK;
    }
    buffer_free(vectors, buffer);
    uint64_t wanted = BUFFER_BYTES_LEAST;
    while (wanted < bytes) {
        wanted *= 2;
    }
    void *memory = mmap(NULL, (size_t)wanted, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) {
        return error_set(ICE_NO_MEMORY, "no memory for %llu bytes of vectors", (unsigned long long)wanted);
    }
    (void)madvise(memory, (size_t)wanted, MADV_DONTDUMP);
    (void)madvise(memory, (size_t)wanted, MADV_DONTFORK);
    char text[CUDA_TEXT_BYTES] = "";
    const ice_status status = gpu_fetch_register(&vectors->fetch, memory, wanted, text);
    if (status != ICE_OK) {
        (void)munmap(memory, (size_t)wanted);
        return error_set(status, "copying queries from the GPU: %s", text);
    }
    buffer->memory = memory;
    buffer->bytes = wanted;
    return ICE_OK;
}

// ---- one request ----

// Into a taken buffer. *state: what it is afterwards.
static ice_status pieces_copy(const struct vectors *vectors, uint32_t number, const struct vectors_piece *pieces,
                              uint32_t count, void *stream, uint64_t until_us, enum buffer_state *state)
{
    char text[CUDA_TEXT_BYTES] = "";
    uint8_t *to = vectors->buffers[number].memory;
    *state = BUFFER_FREE;
    ice_status status = gpu_fetch_check_stream(&vectors->fetch, stream, text);
    if (status != ICE_OK) {
        return error_set(status, "copying queries from the GPU: %s", text);
    }
    for (uint32_t i = 0; i < count && status == ICE_OK; i++) {
        const struct gpu_rows rows = {.row_bytes = pieces[i].bytes, .rows = 1, .stride_bytes = pieces[i].bytes};
        status = gpu_fetch(&vectors->fetch, to, (uintptr_t)pieces[i].from, &rows, stream, text);
        to += pieces[i].bytes;
    }
    if (status != ICE_OK) {
        (void)error_set(status, "copying queries from the GPU: %s", text);
        error_hold();
    }
    // Waited for also where not all could be issued: what was writes to the buffer.
    const ice_status waited = gpu_fetch_wait(&vectors->fetch, number, stream, until_us, text);
    if (waited != ICE_OK) {
        *state = waited == ICE_TIMEOUT ? BUFFER_LATE : BUFFER_LOST;
    }
    if (status != ICE_OK) {
        error_let_go();
        return status;
    }
    return waited == ICE_OK ? ICE_OK : error_set(waited, "copying queries from the GPU: %s", text);
}

ice_status vectors_fetch(ice_landing *landing, const struct vectors_piece *pieces, uint32_t count, void *stream,
                         uint64_t until_us, uint8_t *to)
{
    ice_client *client = landing->client;
    uint32_t number = 0;
    size_t bytes = 0;
    for (uint32_t i = 0; i < count; i++) {
        bytes += pieces[i].bytes;
    }
    (void)pthread_mutex_lock(&client->lock);
    ice_status status = ICE_OK;
    struct vectors *vectors = way_open(client, &pieces[0], &status);
    (void)pthread_mutex_unlock(&client->lock);
    if (vectors == NULL) {
        return status;
    }
    status = pieces_check(vectors, landing, pieces, count);
    if (status != ICE_OK) {
        return status;
    }
    (void)pthread_mutex_lock(&client->lock);
    status = buffer_take(client, landing->generation, vectors, until_us, &number);
    (void)pthread_mutex_unlock(&client->lock);
    if (status != ICE_OK) {
        return status;
    }
    struct buffer *buffer = &vectors->buffers[number];
    enum buffer_state state = BUFFER_FREE;
    status = buffer_grow(vectors, buffer, bytes);
    if (status == ICE_OK) {
        status = pieces_copy(vectors, number, pieces, count, stream, until_us, &state);
    }
    if (status == ICE_OK) {
        memcpy(to, buffer->memory, bytes);
    }
    (void)pthread_mutex_lock(&client->lock);
    buffer->state = state;
    (void)pthread_mutex_unlock(&client->lock);
    return status;
}

// ---- close ----

// Nothing may write to the memory any more when it goes: a buffer whose copies have not ended is rather lost.
static bool buffers_close(struct vectors *vectors)
{
    bool all = true;
    for (uint32_t i = 0; i < BUFFERS; i++) {
        struct buffer *buffer = &vectors->buffers[i];
        const bool over =
            buffer->state == BUFFER_FREE || (buffer->state == BUFFER_LATE && gpu_fetch_is_over(&vectors->fetch, i));
        if (over) {
            buffer_free(vectors, buffer);
        }
        all = all && over;
    }
    return all;
}

void vectors_close(ice_client *client)
{
    while (client->vectors != NULL) {
        struct vectors *vectors = client->vectors;
        client->vectors = vectors->next;
        if (buffers_close(vectors)) {
            gpu_fetch_close(&vectors->fetch);
        }
        free(vectors);
    }
}
