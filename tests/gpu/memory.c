// GPU memory for the tests. One process, one thread.
#include "memory.h"

#include <dirent.h>
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define PIECE_BYTES (2u << 20)

static struct cuda_driver driver;
static bool opened;

// ---- which driver ----

bool memory_is_fake(void)
{
    return getenv("FAKE_CUDA_DIR") != NULL;
}

const char *memory_library(void)
{
    return getenv("ICECACHE_CUDA_LIBRARY");
}

bool memory_choose_driver(void)
{
    const char *wanted = getenv("ICECACHE_TEST_GPU");
    if (wanted && strcmp(wanted, "real") == 0) {
        char text[CUDA_TEXT_BYTES];
        struct cuda_driver found;
        if (cuda_driver_open(memory_library(), &found, text) == ICE_OK)
            return true;
        printf("skipped: %s\n", text);
        return false;
    }
    if (!memory_is_fake()) { // else a child of a test
        static char folder[] = "/tmp/icecache-fake-gpu-XXXXXX";
        if (!mkdtemp(folder))
            abort();
        setenv("FAKE_CUDA_DIR", folder, 1);
        setenv("ICECACHE_CUDA_LIBRARY", FAKE_CUDA_PATH, 1);
        setenv("ICECACHE_NVML_LIBRARY", FAKE_NVML_PATH, 1);
    }
    return true;
}

void memory_fail(const char *line)
{
    char path[256], fresh[300];
    snprintf(path, sizeof path, "%s/fail", getenv("FAKE_CUDA_DIR"));
    if (!line) {
        unlink(path);
        return;
    }
    snprintf(fresh, sizeof fresh, "%s.new", path);
    FILE *file = fopen(fresh, "we");
    assert_non_null(file);
    fprintf(file, "%s\n", line);
    fclose(file);
    assert_int_equal(rename(fresh, path), 0); // seen whole or not at all
}

static uint32_t each_file(const char *prefix, bool remove)
{
    uint32_t count = 0;
    DIR *folder = opendir(getenv("FAKE_CUDA_DIR"));
    assert_non_null(folder);
    for (struct dirent *entry; (entry = readdir(folder)) != NULL;) {
        if (strncmp(entry->d_name, prefix, strlen(prefix)) != 0 || entry->d_name[0] == '.')
            continue;
        count++;
        if (remove)
            unlinkat(dirfd(folder), entry->d_name, 0);
    }
    closedir(folder);
    return count;
}

uint32_t memory_foreign_mappings(void)
{
    return each_file("open-", false);
}

void memory_forget_mappings(void)
{
    each_file("open-", true);
}

void memory_forget_folder(void)
{
    if (!memory_is_fake())
        return;
    each_file("", true);
    rmdir(getenv("FAKE_CUDA_DIR"));
}

// ---- memory ----

const struct cuda_driver *memory_driver(void)
{
    if (!opened) {
        char text[CUDA_TEXT_BYTES] = "";
        cuda_device device;
        cuda_context context;
        if (cuda_driver_open(memory_library(), &driver, text) != ICE_OK)
            fail_msg("%s", text);
        assert_int_equal(driver.device_get(&device, 0), CUDA_OK);
        assert_int_equal(driver.primary_retain(&context, device), CUDA_OK);
        assert_int_equal(driver.context_push(context), CUDA_OK);
        opened = true;
    }
    return &driver;
}

cuda_address memory_alloc(uint64_t bytes)
{
    cuda_address address = 0;
    assert_int_equal(memory_driver()->memory_alloc(&address, bytes), CUDA_OK);
    return address;
}

void memory_free(cuda_address address)
{
    assert_int_equal(memory_driver()->memory_free(address), CUDA_OK);
}

// As the driver has it; the toolkit's name is CUmemAllocationProp.
struct properties {
    int type, handle_types, location_type, location_id;
    void *unused;
    unsigned char flags[8];
};

void mapped_create(struct mapped *mapped, uint32_t pieces, bool shareable)
{
    const struct cuda_driver *cuda = memory_driver();
    cuda_result (*create)(cuda_allocation *, size_t, const struct properties *, unsigned long long);
    void *library = dlopen(memory_library() ? memory_library() : CUDA_LIBRARY_DEFAULT, RTLD_NOW | RTLD_LOCAL);
    assert_non_null(library);
    void *symbol = dlsym(library, "cuMemCreate");
    assert_non_null(symbol);
    memcpy(&create, &symbol, sizeof create);
    *mapped = (struct mapped){.bytes = (uint64_t)pieces * PIECE_BYTES, .piece_bytes = PIECE_BYTES};
    assert_int_equal(cuda->address_reserve(&mapped->address, mapped->bytes, 0, 0, 0), CUDA_OK);
    for (uint32_t i = 0; i < pieces; i++) {
        const struct properties properties = {
            .type = 1, .handle_types = shareable ? CUDA_HANDLE_POSIX_FD : 0, .location_type = CUDA_LOCATION_DEVICE};
        cuda_allocation allocation;
        assert_int_equal(create(&allocation, PIECE_BYTES, &properties, 0), CUDA_OK);
        assert_int_equal(cuda->memory_map(mapped->address + (uint64_t)i * PIECE_BYTES, PIECE_BYTES, 0, allocation, 0),
                         CUDA_OK);
        assert_int_equal(cuda->allocation_release(allocation), CUDA_OK);
    }
    const struct cuda_access access = {{CUDA_LOCATION_DEVICE, 0}, CUDA_ACCESS_READ_WRITE};
    assert_int_equal(cuda->memory_set_access(mapped->address, mapped->bytes, &access, 1), CUDA_OK);
}

void mapped_destroy(struct mapped *mapped)
{
    const struct cuda_driver *cuda = memory_driver();
    for (uint64_t at = 0; at < mapped->bytes; at += mapped->piece_bytes)
        assert_int_equal(cuda->memory_unmap(mapped->address + at, mapped->piece_bytes), CUDA_OK);
    assert_int_equal(cuda->address_free(mapped->address, mapped->bytes), CUDA_OK);
}

void memory_capture(cuda_stream stream, bool begin)
{
    union {
        void *symbol;
        cuda_result (*begin)(cuda_stream, int);
        cuda_result (*end)(cuda_stream, void **);
    } call;
    void *graph = NULL;
    void *library = dlopen(memory_library(), RTLD_NOW | RTLD_LOCAL);
    assert_non_null(library);
    call.symbol = dlsym(library, begin ? "cuStreamBeginCapture" : "cuStreamEndCapture");
    assert_non_null(call.symbol);
    assert_int_equal(begin ? call.begin(stream, 0) : call.end(stream, &graph), CUDA_OK);
}

void memory_read(void *to, cuda_address from, uint64_t bytes)
{
    assert_int_equal(memory_driver()->copy_to_host_waiting(to, from, bytes), CUDA_OK);
}

void memory_fill(cuda_address to, int value, uint64_t bytes)
{
    assert_int_equal(memory_driver()->fill_waiting(to, (unsigned char)value, bytes), CUDA_OK);
}

// ---- landings ----

void worker_open_gpu(struct worker *worker, const char *sockets, const struct shape *shape, uint32_t rows,
                     uint32_t slots, const struct ice_gpu_options *options)
{
    *worker = (struct worker){.shape = *shape, .rows = rows, .slots = slots};
    worker->client = client_connect(sockets, TEST_DEADLINE_US, 4u << 20);
    const struct ice_landing_shape wanted = landing_shape(shape, rows, slots);
    assert_ok(ice_landing_open_gpu(worker->client, &wanted, options, 0, &worker->landing));
    worker->sequence = sequence_open(worker->client, shape);
}

// Where a block is: the layout that icecache.h promises.
static cuda_address block_of(const struct worker *worker, const struct ice_gpu_landing *gpu, uint32_t row,
                             uint32_t layer)
{
    return gpu->address + ((uint64_t)row * worker->shape.layers + layer) * gpu->layer_bytes;
}

void gpu_check_counts(const struct worker *worker, uint32_t row, uint32_t layer, uint32_t count)
{
    struct ice_gpu_landing gpu;
    assert_ok(ice_landing_gpu(worker->landing, &gpu));
    for (uint32_t head = 0; head < worker->shape.kv_heads; head++) {
        uint32_t found = 0;
        memory_read(&found, block_of(worker, &gpu, row, layer) + gpu.counts_offset + 4 * head, sizeof found);
        assert_int_equal(found, count);
    }
}

void gpu_check(const struct worker *worker, uint32_t row, uint32_t layer, const struct history *history, uint32_t count,
               uint64_t visible)
{
    size_t bytes = shape_row_bytes(&worker->shape), side = worker->slots * bytes;
    struct ice_gpu_landing gpu;
    assert_ok(ice_landing_gpu(worker->landing, &gpu));
    uint8_t *block = malloc(gpu.layer_bytes);
    assert_non_null(block);
    gpu_check_counts(worker, row, layer, count);
    memory_read(block, block_of(worker, &gpu, row, layer), gpu.layer_bytes);
    for (uint32_t head = 0; head < worker->shape.kv_heads; head++) {
        const uint8_t *keys = block + head * 2 * side, *values = keys + side;
        const uint32_t *positions =
            (const void *)(block + gpu.positions_offset + (uint64_t)head * worker->slots * sizeof *positions);
        bool *seen = calloc(visible, sizeof *seen);
        assert_non_null(seen);
        for (uint32_t slot = 0; slot < count; slot++) {
            assert_true(positions[slot] < visible && !seen[positions[slot]]);
            seen[positions[slot]] = true;
            if (memcmp(keys + slot * bytes, history_key(history, layer, head, positions[slot]), bytes) != 0 ||
                memcmp(values + slot * bytes, history_value(history, layer, head, positions[slot]), bytes) != 0)
                fail_msg("layer %u head %u slot %u does not hold the bytes of position %u", layer, head, slot,
                         positions[slot]);
        }
        free(seen);
    }
    free(block);
}

// ---- service ----

ice_status gpu_retrieve_all(const struct worker *worker, const struct history *history, uint32_t row, uint32_t layer,
                            bool check)
{
    const uint32_t length = (uint32_t)history->length;
    struct retrieve retrieve;
    retrieve_init(&retrieve, worker, history, layer, length - 1, 1);
    retrieve.row = row;
    retrieve_ends(&retrieve, length, 0, 0);
    ice_status status = ice_retrieve(worker->client, &retrieve.options, NULL);
    if (status == ICE_OK && check)
        gpu_check(worker, row, layer, history, length, length);
    if (status != ICE_OK)
        assert_string_not_equal(ice_last_error(), "");
    retrieve_fini(&retrieve);
    return status;
}

void gpu_expect_service(const struct daemon *daemon, const struct history *history, enum ice_gpu_mode mode)
{
    const uint32_t rows = 2, slots = (uint32_t)history->length + 8;
    struct worker worker;
    worker_open(&worker, daemon->sockets, &history->shape, rows, slots);
    worker_append(&worker, history, 0, history->length);
    struct retrieve retrieve;
    retrieve_init(&retrieve, &worker, history, 0, history->length - 1, 1);
    retrieve_ends(&retrieve, (uint32_t)history->length, 0, 0);
    assert_ok(ice_retrieve(worker.client, &retrieve.options, NULL));
    landing_check_all(worker.landing, 0, 0, history, history->length);
    retrieve_fini(&retrieve);
    worker_close(&worker);
    worker_open_gpu(&worker, daemon->sockets, &history->shape, rows, slots, &(struct ice_gpu_options){.mode = mode});
    worker_append(&worker, history, 0, history->length);
    assert_ok(gpu_retrieve_all(&worker, history, 1, 1, true));
    worker_close(&worker);
}
