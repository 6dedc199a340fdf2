// The fake driver's host memory, streams, events and copies, and the way to its entry points.
#include "fake_cuda.h"
#include "gpu/scatter_job.h"

#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum {
    INVALID_HANDLE = 400,
    NOT_FOUND = 500,
    ALREADY_REGISTERED = 712,
    NOT_REGISTERED = 713,
    CAPTURE_UNSUPPORTED = 900,
    RANGES_MAX = 1024,
    WORKS_MAX = 4096,
    BATCH_MAX = 2048,
    VERSION = 13000
};

struct host_range {
    const uint8_t *memory; // NULL: free
    size_t bytes;
    bool mapped; // the GPU has it at an address of its own
};

#define HOST_ALIAS 0x4000000000000000ull // from host memory to where the GPU has it

struct work {
    cuda_address to;
    const uint8_t *from; // NULL: fill
    unsigned char value;
    size_t bytes;
    bool outwards; // rows, from the GPU
    struct cuda_rows rows;
    struct launch *launch;        // a kernel; owned
    const _Atomic uint64_t *word; // wait until it has at least `least`
    uint64_t least;
};

struct cuda_stream {
    struct cuda_context *context;
    int capture; // of a graph that is being captured: nothing is carried out
    uint64_t issued, done;
    struct work works[WORKS_MAX]; // number n at n % WORKS_MAX
    struct cuda_stream *next;
};

struct cuda_event {
    struct cuda_stream *stream;
    uint64_t number; // of the works before it
    bool asked;
    struct cuda_event *next;
};

static struct host_range ranges[RANGES_MAX];
static struct cuda_stream *streams;
static struct cuda_event *events;
static struct cuda_stream default_streams[4];

// ---- copies ----

static bool reachable(cuda_address address, size_t bytes)
{
    while (bytes > 0) {
        size_t part = bytes;
        if (!fake_content(address, &part)) {
            return false;
        }
        address += part;
        bytes -= part;
    }
    return true;
}

static void copy_in(cuda_address to, const uint8_t *from, unsigned char value, size_t bytes)
{
    while (bytes > 0) {
        size_t part = bytes;
        uint8_t *content = fake_content(to, &part);
        if (!content) {
            abort(); // freed under a copy: the real one would end the context
        }
        if (from) {
            memcpy(content, from, part);
            from += part;
        } else {
            memset(content, value, part);
        }
        to += part;
        bytes -= part;
    }
}

static void copy_out(uint8_t *to, cuda_address from, size_t bytes)
{
    while (bytes > 0) {
        size_t part = bytes;
        const uint8_t *content = fake_content(from, &part);
        memcpy(to, content, part);
        to += part;
        from += part;
        bytes -= part;
    }
}

struct launch {
    unsigned heads, rows, workers, lanes;
    struct scatter_job job;
};

// From the job's address to the end of its last row's block.
static size_t job_bytes(const struct scatter_job *job)
{
    uint64_t last = 0;
    for (uint32_t i = 0; i < job->row_count; i++) {
        last = job->rows[i] > last ? job->rows[i] : last;
    }
    return last * job->to_stride + job->counts_offset + 4u * (uint64_t)job->kv_heads;
}

// Workers one after the other, as no GPU would, but in no order that the kernel may count on. On a copy of the landing,
// which may lie in pieces.
static void run_kernel(struct launch *launch)
{
    struct scatter_job job = launch->job;
    const size_t bytes = job_bytes(&job);
    uint8_t *landing = aligned_alloc(512, (bytes + 511) / 512 * 512);
    if (!landing) {
        abort();
    }
    copy_out(landing, launch->job.to, bytes);
    job.to = (uint64_t)(uintptr_t)landing;
    job.from -= HOST_ALIAS;
    for (unsigned row = launch->rows; row-- > 0;) {
        for (unsigned head = launch->heads; head-- > 0;) {
            for (unsigned worker = launch->workers; worker-- > 0;) {
                for (unsigned lane = 0; lane < launch->lanes; lane++) {
                    scatter_cell(&job, row, head, worker, launch->workers, lane, launch->lanes);
                }
            }
        }
    }
    copy_in(launch->job.to, landing, 0, bytes);
    free(landing);
    free(launch);
}

static bool is_waiting(const struct work *work)
{
    return work->word && (int64_t)(atomic_load(work->word) - work->least) < 0;
}

// As far as the stream gets: not beyond a word that it waits for.
static void carry_out(struct cuda_stream *stream, uint64_t until)
{
    for (; stream->done < until; stream->done++) {
        const struct work *work = &stream->works[stream->done % WORKS_MAX];
        const struct cuda_rows *rows = &work->rows;
        if (is_waiting(work)) {
            return;
        }
        for (size_t i = 0; work->outwards && i < rows->height; i++) {
            copy_out((uint8_t *)rows->to_host + i * rows->to_pitch, rows->from_device + i * rows->from_pitch,
                     rows->width_bytes);
        }
        if (work->launch) {
            run_kernel(work->launch);
        } else if (!work->outwards && !work->word) {
            copy_in(work->to, work->from, work->value, work->bytes);
        }
    }
}

// The stream itself, or the context's default one.
static struct cuda_stream *named(struct cuda_stream *stream)
{
    struct cuda_context *current = fake_current();
    if (stream) {
        return stream->context == current ? stream : NULL;
    }
    default_streams[current->device].context = current;
    return &default_streams[current->device];
}

static cuda_result issue(struct cuda_stream *stream, struct work work)
{
    stream = named(stream);
    if (stream && stream->capture) {
        return CAPTURE_UNSUPPORTED; // the real one would record it, and whoever waits for it would wait for ever
    }
    if (!stream || (!work.outwards && !work.launch && !work.word && !reachable(work.to, work.bytes)) ||
        stream->issued - stream->done == WORKS_MAX) {
        return CUDA_INVALID_VALUE;
    }
    stream->works[stream->issued++ % WORKS_MAX] = work;
    return CUDA_OK;
}

static bool registered(const uint8_t *memory, size_t bytes);

// What a kernel reads may go on in the next registration.
static bool registered_in_pieces(const uint8_t *memory, size_t bytes)
{
    for (size_t at = 0; at < bytes; at += 512) {
        if (!registered(memory + at, 1)) {
            return false;
        }
    }
    return registered(memory + bytes - 1, 1);
}

static bool registered(const uint8_t *memory, size_t bytes)
{
    for (int i = 0; i < RANGES_MAX; i++) {
        if (ranges[i].memory && memory >= ranges[i].memory && memory + bytes <= ranges[i].memory + ranges[i].bytes) {
            return true;
        }
    }
    return false;
}

EXPORT cuda_result cuMemcpyHtoDAsync(cuda_address to, const void *from, size_t bytes, cuda_stream stream);
EXPORT cuda_result cuMemcpyHtoDAsync(cuda_address to, const void *from, size_t bytes, cuda_stream stream)
{
    ENTER("cuMemcpyHtoDAsync", true);
    if (!registered(from, bytes)) {
        return fake_leave(CUDA_INVALID_VALUE);
    }
    return fake_leave(issue(stream, (struct work){.to = to, .from = from, .bytes = bytes}));
}

// The copies of one call are in no order: here the last one is the first.
static cuda_result copy_batch(const cuda_address *to, const cuda_address *from, const size_t *bytes, size_t count,
                              const struct cuda_batch_attributes *attributes, const size_t *firsts,
                              size_t attribute_count, cuda_stream stream)
{
    const bool valid = count > 0 && count <= BATCH_MAX && attribute_count == 1 && firsts[0] == 0 && stream &&
                       attributes->source_order >= 1 && attributes->source_order <= 3 && attributes->flags == 0;
    cuda_result result = valid ? CUDA_OK : CUDA_INVALID_VALUE;
    for (size_t i = count; i > 0 && result == CUDA_OK; i--) {
        const uint8_t *source = (const uint8_t *)(uintptr_t)from[i - 1];
        result = registered(source, bytes[i - 1])
                     ? issue(stream, (struct work){.to = to[i - 1], .from = source, .bytes = bytes[i - 1]})
                     : CUDA_INVALID_VALUE;
    }
    return result;
}

EXPORT cuda_result cuMemcpyBatchAsync_v2(cuda_address *to, cuda_address *from, size_t *bytes, size_t count,
                                         struct cuda_batch_attributes *attributes, size_t *firsts,
                                         size_t attribute_count, cuda_stream stream);
EXPORT cuda_result cuMemcpyBatchAsync_v2(cuda_address *to, cuda_address *from, size_t *bytes, size_t count,
                                         struct cuda_batch_attributes *attributes, size_t *firsts,
                                         size_t attribute_count, cuda_stream stream)
{
    ENTER("cuMemcpyBatchAsync_v2", true);
    return fake_leave(copy_batch(to, from, bytes, count, attributes, firsts, attribute_count, stream));
}

EXPORT cuda_result cuMemcpyBatchAsync(cuda_address *to, cuda_address *from, size_t *bytes, size_t count,
                                      struct cuda_batch_attributes *attributes, size_t *firsts, size_t attribute_count,
                                      size_t *failed, cuda_stream stream);
EXPORT cuda_result cuMemcpyBatchAsync(cuda_address *to, cuda_address *from, size_t *bytes, size_t count,
                                      struct cuda_batch_attributes *attributes, size_t *firsts, size_t attribute_count,
                                      size_t *failed, cuda_stream stream)
{
    ENTER("cuMemcpyBatchAsync", true);
    *failed = SIZE_MAX; // of no copy in particular
    return fake_leave(copy_batch(to, from, bytes, count, attributes, firsts, attribute_count, stream));
}

EXPORT cuda_result cuMemcpy2DAsync(const struct cuda_rows *rows, cuda_stream stream);
EXPORT cuda_result cuMemcpy2DAsync(const struct cuda_rows *rows, cuda_stream stream)
{
    ENTER("cuMemcpy2DAsync", true);
    if (rows->from_x || rows->from_y || rows->to_x || rows->to_y || rows->from_type != CUDA_MEMORY_DEVICE ||
        rows->to_type != CUDA_MEMORY_HOST || rows->from_pitch < rows->width_bytes ||
        rows->to_pitch < rows->width_bytes || rows->height == 0 ||
        !registered(rows->to_host, (rows->height - 1) * rows->to_pitch + rows->width_bytes)) {
        return fake_leave(CUDA_INVALID_VALUE);
    }
    for (size_t i = 0; i < rows->height; i++) {
        if (!reachable(rows->from_device + i * rows->from_pitch, rows->width_bytes)) {
            return fake_leave(CUDA_INVALID_VALUE);
        }
    }
    return fake_leave(issue(stream, (struct work){.outwards = true, .rows = *rows}));
}

EXPORT cuda_result cuMemsetD8Async(cuda_address to, unsigned char value, size_t bytes, cuda_stream stream);
EXPORT cuda_result cuMemsetD8Async(cuda_address to, unsigned char value, size_t bytes, cuda_stream stream)
{
    ENTER("cuMemsetD8Async", true);
    return fake_leave(issue(stream, (struct work){.to = to, .value = value, .bytes = bytes}));
}

EXPORT cuda_result cuMemcpyHtoD(cuda_address to, const void *from, size_t bytes);
EXPORT cuda_result cuMemcpyHtoD(cuda_address to, const void *from, size_t bytes)
{
    ENTER("cuMemcpyHtoD", true);
    if (!reachable(to, bytes)) {
        return fake_leave(CUDA_INVALID_VALUE);
    }
    copy_in(to, from, 0, bytes);
    return fake_leave(CUDA_OK);
}

EXPORT cuda_result cuMemcpyDtoH(void *to, cuda_address from, size_t bytes);
EXPORT cuda_result cuMemcpyDtoH(void *to, cuda_address from, size_t bytes)
{
    ENTER("cuMemcpyDtoH", true);
    if (!reachable(from, bytes)) {
        return fake_leave(CUDA_INVALID_VALUE);
    }
    copy_out(to, from, bytes);
    return fake_leave(CUDA_OK);
}

EXPORT cuda_result cuMemsetD8(cuda_address to, unsigned char value, size_t bytes);
EXPORT cuda_result cuMemsetD8(cuda_address to, unsigned char value, size_t bytes)
{
    ENTER("cuMemsetD8", true);
    if (!reachable(to, bytes)) {
        return fake_leave(CUDA_INVALID_VALUE);
    }
    copy_in(to, NULL, value, bytes);
    return fake_leave(CUDA_OK);
}

// ---- host memory ----

static uintptr_t page_of(const uint8_t *memory)
{
    return (uintptr_t)memory / 4096;
}

EXPORT cuda_result cuMemHostRegister(void *memory, size_t bytes, unsigned flags);
EXPORT cuda_result cuMemHostRegister(void *memory, size_t bytes, unsigned flags)
{
    ENTER("cuMemHostRegister", true);
    const uint8_t *from = memory;
    struct host_range *place = NULL;
    for (int i = 0; i < RANGES_MAX; i++) {
        if (!ranges[i].memory) {
            place = place ? place : &ranges[i];
        } else if (page_of(from) <= page_of(ranges[i].memory + ranges[i].bytes - 1) &&
                   page_of(ranges[i].memory) <= page_of(from + bytes - 1)) {
            return fake_leave(ALREADY_REGISTERED); // pages are pinned as a whole
        }
    }
    if ((flags != 0 && flags != CUDA_HOST_DEVICE_MAPPED) || bytes == 0 || !place) {
        return fake_leave(CUDA_INVALID_VALUE);
    }
    *place = (struct host_range){from, bytes, flags == CUDA_HOST_DEVICE_MAPPED};
    return fake_leave(CUDA_OK);
}

// What a stream still has to do must not need the range: the real one would read what is not there.
static void check_unused(struct cuda_stream *stream, const struct host_range *range)
{
    carry_out(stream, stream->issued);
    for (uint64_t n = stream->done; n < stream->issued; n++) {
        const struct work *work = &stream->works[n % WORKS_MAX];
        const uint8_t *uses = work->word       ? (const uint8_t *)work->word
                              : work->outwards ? work->rows.to_host
                                               : work->from;
        if (uses && uses >= range->memory && uses < range->memory + range->bytes) {
            abort();
        }
    }
}

EXPORT cuda_result cuMemHostUnregister(void *memory);
EXPORT cuda_result cuMemHostUnregister(void *memory)
{
    ENTER("cuMemHostUnregister", true);
    for (int i = 0; i < RANGES_MAX; i++) {
        if (ranges[i].memory && ranges[i].memory == memory) {
            for (struct cuda_stream *stream = streams; stream; stream = stream->next) {
                check_unused(stream, &ranges[i]);
            }
            for (size_t j = 0; j < sizeof(default_streams) / sizeof(default_streams[0]); j++) {
                check_unused(&default_streams[j], &ranges[i]);
            }
            ranges[i].memory = NULL;
            return fake_leave(CUDA_OK);
        }
    }
    return fake_leave(NOT_REGISTERED);
}

EXPORT cuda_result cuMemHostGetDevicePointer(cuda_address *address, void *memory, unsigned flags);
EXPORT cuda_result cuMemHostGetDevicePointer(cuda_address *address, void *memory, unsigned flags)
{
    ENTER("cuMemHostGetDevicePointer", true);
    const uint8_t *at = memory;
    for (int i = 0; i < RANGES_MAX; i++) {
        if (ranges[i].memory && ranges[i].mapped && at >= ranges[i].memory && at < ranges[i].memory + ranges[i].bytes &&
            flags == 0) {
            *address = (uintptr_t)memory + HOST_ALIAS;
            return fake_leave(CUDA_OK);
        }
    }
    return fake_leave(CUDA_INVALID_VALUE);
}

// ---- kernels ----

// The kernel of gpu/scatter_job.h is the only one there is.
struct cuda_module {
    struct cuda_context *context;
};

struct cuda_function {
    struct cuda_module *module;
};

EXPORT cuda_result cuModuleLoadData(cuda_module *module, const void *image);
EXPORT cuda_result cuModuleLoadData(cuda_module *module, const void *image)
{
    ENTER("cuModuleLoadData", true);
    if (!strstr(image, ".entry icecache_scatter(")) {
        return fake_leave(CUDA_INVALID_VALUE);
    }
    static struct cuda_module modules[64]; // one that is never unloaded is no leak of this program's
    for (size_t i = 0; i < sizeof(modules) / sizeof(modules[0]); i++) {
        if (!modules[i].context) {
            modules[i].context = fake_current();
            *module = &modules[i];
            return fake_leave(CUDA_OK);
        }
    }
    return fake_leave(CUDA_OUT_OF_MEMORY);
}

static struct cuda_function function;

EXPORT cuda_result cuModuleUnload(cuda_module module);
EXPORT cuda_result cuModuleUnload(cuda_module module)
{
    ENTER("cuModuleUnload", true);
    module->context = NULL;
    return fake_leave(CUDA_OK);
}

EXPORT cuda_result cuModuleGetFunction(cuda_function *out, cuda_module module, const char *name);
EXPORT cuda_result cuModuleGetFunction(cuda_function *out, cuda_module module, const char *name)
{
    ENTER("cuModuleGetFunction", true);
    if (strcmp(name, "icecache_scatter") != 0 || module->context != fake_current()) {
        return fake_leave(NOT_FOUND);
    }
    function.module = module;
    *out = &function;
    return fake_leave(CUDA_OK);
}

// All blocks of the job's rows, on both sides.
static bool scatter_reachable(const struct scatter_job *job)
{
    const uint64_t from_bytes = job->changed_counts_offset + 4u * (uint64_t)job->kv_heads;
    for (uint32_t i = 0; i < job->row_count; i++) {
        if (!registered_in_pieces(
                (const uint8_t *)(uintptr_t)(job->from - HOST_ALIAS + job->rows[i] * job->from_stride), from_bytes)) {
            return false;
        }
    }
    return reachable(job->to, job_bytes(job));
}

EXPORT cuda_result cuLaunchKernel(cuda_function kernel, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                                  unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared_bytes,
                                  cuda_stream stream, void **parameters, void **extra);
EXPORT cuda_result cuLaunchKernel(cuda_function kernel, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                                  unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared_bytes,
                                  cuda_stream stream, void **parameters, void **extra)
{
    ENTER("cuLaunchKernel", true);
    const struct scatter_job *job = parameters[0];
    if (kernel != &function || grid_x != job->kv_heads || grid_y != job->row_count || grid_y == 0 || grid_z == 0 ||
        grid_y > SCATTER_ROWS_MAX || block_x == 0 || block_x % 32 != 0 || block_x > 1024 || block_y != 1 ||
        block_z != 1 || shared_bytes != 0 || extra || !scatter_reachable(job)) {
        return fake_leave(CUDA_INVALID_VALUE);
    }
    struct launch *launch = malloc(sizeof(*launch));
    if (!launch) {
        abort();
    }
    *launch = (struct launch){grid_x, grid_y, grid_z * block_x / 32, 32, *job};
    const cuda_result result = issue(stream, (struct work){.launch = launch});
    if (result != CUDA_OK) {
        free(launch);
    }
    return fake_leave(result);
}

// ---- streams and events ----

EXPORT cuda_result cuStreamWaitValue64(cuda_stream stream, cuda_address address, uint64_t value, unsigned flags);
EXPORT cuda_result cuStreamWaitValue64(cuda_stream stream, cuda_address address, uint64_t value, unsigned flags)
{
    ENTER("cuStreamWaitValue64", true);
    const uint8_t *word = (const uint8_t *)(uintptr_t)(address - HOST_ALIAS);
    bool mapped = false;
    for (int i = 0; i < RANGES_MAX; i++) {
        mapped = mapped || (ranges[i].memory && ranges[i].mapped && word >= ranges[i].memory &&
                            word + sizeof(value) <= ranges[i].memory + ranges[i].bytes);
    }
    if (!mapped || address % sizeof(value) != 0 || flags != CUDA_WAIT_AT_LEAST) {
        return fake_leave(CUDA_INVALID_VALUE);
    }
    return fake_leave(issue(stream, (struct work){.word = (const void *)word, .least = value}));
}

EXPORT cuda_result cuStreamCreateWithPriority(cuda_stream *stream, unsigned flags, int priority);
EXPORT cuda_result cuStreamCreateWithPriority(cuda_stream *stream, unsigned flags, int priority)
{
    ENTER("cuStreamCreateWithPriority", true);
    if (flags != CUDA_STREAM_NON_BLOCKING || priority > 0) {
        return fake_leave(CUDA_INVALID_VALUE);
    }
    *stream = calloc(1, sizeof(**stream));
    if (!*stream) {
        abort();
    }
    (*stream)->context = fake_current();
    (*stream)->next = streams;
    streams = *stream;
    return fake_leave(CUDA_OK);
}

EXPORT cuda_result cuStreamDestroy(cuda_stream stream);
EXPORT cuda_result cuStreamDestroy(cuda_stream stream)
{
    ENTER("cuStreamDestroy", true);
    while (carry_out(stream, stream->issued), stream->done < stream->issued) {
        (void)fake_leave(CUDA_OK); // the real one goes on behind the call
        (void)usleep(1000);
        ENTER("cuStreamDestroy", true);
    }
    for (struct cuda_event *event = events; event; event = event->next) {
        if (event->stream == stream) {
            event->stream = NULL; // all before it is done
        }
    }
    struct cuda_stream **link = &streams;
    while (*link != stream) {
        link = &(*link)->next;
    }
    *link = stream->next;
    free(stream);
    return fake_leave(CUDA_OK);
}

EXPORT cuda_result cuStreamIsCapturing(cuda_stream stream, int *capture);
EXPORT cuda_result cuStreamIsCapturing(cuda_stream stream, int *capture)
{
    ENTER("cuStreamIsCapturing", true);
    stream = named(stream);
    if (!stream) {
        return fake_leave(INVALID_HANDLE);
    }
    *capture = stream->capture;
    return fake_leave(CUDA_OK);
}

// Not of the table: what a worker of the tests calls.
EXPORT cuda_result cuStreamBeginCapture(cuda_stream stream, int mode);
EXPORT cuda_result cuStreamBeginCapture(cuda_stream stream, int mode)
{
    ENTER("cuStreamBeginCapture", true);
    (void)mode;
    stream->capture = 1;
    return fake_leave(CUDA_OK);
}

EXPORT cuda_result cuStreamEndCapture(cuda_stream stream, void **graph);
EXPORT cuda_result cuStreamEndCapture(cuda_stream stream, void **graph)
{
    ENTER("cuStreamEndCapture", true);
    stream->capture = 0;
    *graph = NULL;
    return fake_leave(CUDA_OK);
}

EXPORT cuda_result cuEventCreate(cuda_event *event, unsigned flags);
EXPORT cuda_result cuEventCreate(cuda_event *event, unsigned flags)
{
    ENTER("cuEventCreate", true);
    if (flags != CUDA_EVENT_DISABLE_TIMING) {
        return fake_leave(CUDA_INVALID_VALUE);
    }
    *event = calloc(1, sizeof(**event));
    if (!*event) {
        abort();
    }
    (*event)->next = events;
    events = *event;
    return fake_leave(CUDA_OK);
}

EXPORT cuda_result cuEventRecord(cuda_event event, cuda_stream stream);
EXPORT cuda_result cuEventRecord(cuda_event event, cuda_stream stream)
{
    ENTER("cuEventRecord", true);
    stream = named(stream);
    if (!event || !stream) {
        return fake_leave(INVALID_HANDLE);
    }
    if (stream->capture) {
        return fake_leave(CAPTURE_UNSUPPORTED);
    }
    *event = (struct cuda_event){.stream = stream, .number = stream->issued, .next = event->next};
    return fake_leave(CUDA_OK);
}

EXPORT cuda_result cuEventQuery(cuda_event event);
EXPORT cuda_result cuEventQuery(cuda_event event)
{
    ENTER("cuEventQuery", true);
    if (!event->stream) {
        return fake_leave(CUDA_OK); // nothing to wait for
    }
    if (!event->asked) {
        event->asked = true;
        return fake_leave(CUDA_NOT_READY);
    }
    carry_out(event->stream, event->number);
    return fake_leave(event->stream->done >= event->number ? CUDA_OK : CUDA_NOT_READY);
}

EXPORT cuda_result cuEventDestroy(cuda_event event);
EXPORT cuda_result cuEventDestroy(cuda_event event)
{
    ENTER("cuEventDestroy", true);
    struct cuda_event **link = &events;
    while (*link != event) {
        link = &(*link)->next;
    }
    *link = event->next;
    free(event);
    return fake_leave(CUDA_OK);
}

// ---- entry points ----

#define DECLARE(field, symbol, version, parameters) extern cuda_result fake_##field parameters __asm__(symbol);
CUDA_ENTRIES(DECLARE)
#undef DECLARE

// FAKE_CUDA_VERSION, or the newest.
static int version_of_driver(void)
{
    const char *wanted = getenv("FAKE_CUDA_VERSION");
    return wanted ? (int)strtol(wanted, NULL, 10) : VERSION;
}

EXPORT cuda_result cuDriverGetVersion(int *version);
EXPORT cuda_result cuDriverGetVersion(int *version)
{
    const int code = fake_enter("cuDriverGetVersion", false);
    if (code != 0) {
        return code;
    }
    *version = version_of_driver();
    return fake_leave(CUDA_OK);
}

// As the real one: the newest form that is no newer than what was asked for, or than the driver.
static void (*find_batch(int version))(void)
{
    version = version < version_of_driver() ? version : version_of_driver();
    return version >= CUDA_BATCH_13   ? (void (*)(void))cuMemcpyBatchAsync_v2
           : version >= CUDA_BATCH_12 ? (void (*)(void))cuMemcpyBatchAsync
                                      : NULL;
}

EXPORT cuda_result cuGetProcAddress_v2(const char *symbol, void **out, int version, uint64_t flags, int *found);
EXPORT cuda_result cuGetProcAddress_v2(const char *symbol, void **out, int version, uint64_t flags, int *found)
{
    static const struct {
        const char *symbol;
        int version;
        void (*call)(void);
    } entries[] = {
#define ROW(field, symbol, version, parameters) {symbol, version, (void (*)(void))fake_##field},
        CUDA_ENTRIES(ROW)
#undef ROW
    };
    const char *missing = getenv("FAKE_CUDA_MISSING"); // an entry point that this driver is too old for
    if (strcmp(symbol, "cuMemcpyBatchAsync") == 0 && !(missing && strcmp(missing, symbol) == 0)) {
        void (*call)(void) = find_batch(version);
        memcpy(out, &call, sizeof(*out));
        *found = call ? 0 : 1;
        return call ? CUDA_OK : NOT_FOUND;
    }
    for (size_t i = 0; i < sizeof(entries) / sizeof(entries[0]); i++) {
        if (strcmp(entries[i].symbol, symbol) == 0 && version == entries[i].version && flags == 0 &&
            !(missing && strcmp(missing, symbol) == 0)) {
            memcpy(out, &entries[i].call, sizeof(*out));
            *found = 0;
            return CUDA_OK;
        }
    }
    *out = NULL;
    *found = 1;
    return NOT_FOUND;
}
