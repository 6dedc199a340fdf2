// Finding the CUDA driver and its entry points.
//
// Invariants: a driver is never unloaded; a table of entry points is complete, apart from the optional ones, or not
// handed out at all.
// Threads: stateless, any thread.
#include "gpu/driver.h"

#include <dlfcn.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>

typedef cuda_result (*proc_address_call)(const char *symbol, void **out, int version, uint64_t flags, int *found);

static ice_status no_driver(char *text, const char *library, const char *reason)
{
    (void)snprintf(text, CUDA_TEXT_BYTES, "no CUDA driver: %.80s: %.150s", library, reason);
    return ICE_NOT_SUPPORTED;
}

// ISO C has no conversion from an object's address to a function's, POSIX promises that the bytes are the same.
static void set_function(void *field, void *symbol)
{
    memcpy(field, &symbol, sizeof(symbol));
}

// What only some calls need says so itself where it is not there.
static bool may_be_missing(const char *symbol)
{
    return strcmp(symbol, "cuStreamWaitValue64") == 0;
}

static ice_status find_entries(const char *library, proc_address_call find, struct cuda_driver *driver, char *text)
{
    const struct {
        const char *symbol;
        int version;
        size_t offset;
    } entries[] = {
#define CUDA_ENTRY_ROW(field, symbol, version, parameters) {symbol, version, offsetof(struct cuda_driver, field)},
        CUDA_ENTRIES(CUDA_ENTRY_ROW)
#undef CUDA_ENTRY_ROW
    };
    for (size_t i = 0; i < sizeof(entries) / sizeof(entries[0]); i++) {
        void *symbol = NULL;
        int found = 0;
        const cuda_result result =
            find(entries[i].symbol, &symbol, entries[i].version, CUDA_PROC_ADDRESS_DEFAULT, &found);
        if ((result != CUDA_OK || !symbol) && may_be_missing(entries[i].symbol)) {
            set_function((char *)driver + entries[i].offset, NULL);
            continue;
        }
        if (result != CUDA_OK || !symbol) {
            char reason[CUDA_TEXT_BYTES];
            (void)snprintf(reason, sizeof(reason), "it has no %s", entries[i].symbol);
            return no_driver(text, library, reason);
        }
        set_function((char *)driver + entries[i].offset, symbol);
    }
    return ICE_OK;
}

// A driver answers with the newest form that is no newer than the version asked for, so a form that it may not have yet
// must not be asked for: another one would come, with other parameters.
static void find_optional(proc_address_call find, struct cuda_driver *driver)
{
    int version = 0;
    driver->copy_batch = NULL;
    driver->copy_batch_12 = NULL;
    if (driver->driver_version(&version) != CUDA_OK || version < CUDA_BATCH_12) {
        return;
    }
    void *symbol = NULL;
    int found = 0;
    const int form = version >= CUDA_BATCH_13 ? CUDA_BATCH_13 : CUDA_BATCH_12;
    if (find("cuMemcpyBatchAsync", &symbol, form, CUDA_PROC_ADDRESS_DEFAULT, &found) == CUDA_OK && symbol) {
        set_function(form == CUDA_BATCH_13 ? (void *)&driver->copy_batch : (void *)&driver->copy_batch_12, symbol);
    }
}

ice_status cuda_driver_open(const char *library, struct cuda_driver *out, char *text)
{
    const char *const name = library ? library : CUDA_LIBRARY_DEFAULT;
    void *const handle = dlopen(name, RTLD_NOW | RTLD_LOCAL);
    if (!handle) {
        const char *reason = dlerror();
        const size_t length = strlen(name);
        if (reason && strncmp(reason, name, length) == 0 && strncmp(reason + length, ": ", 2) == 0) {
            reason += length + 2; // the name is said already
        }
        return no_driver(text, name, reason ? reason : "it cannot be loaded");
    }
    void *const symbol = dlsym(handle, "cuGetProcAddress_v2");
    if (!symbol) {
        return no_driver(text, name, "it is older than CUDA 12.0 (driver 525)");
    }
    proc_address_call find;
    set_function(&find, symbol);
    struct cuda_driver driver;
    const ice_status status = find_entries(name, find, &driver, text);
    if (status != ICE_OK) {
        return status;
    }
    const cuda_result result = driver.init(0);
    if (result == CUDA_NO_DEVICE) {
        return no_driver(text, name, "it finds no GPU");
    }
    if (result != CUDA_OK) {
        char reason[CUDA_TEXT_BYTES];
        (void)cuda_failed(&driver, "cuInit", result, reason);
        return no_driver(text, name, reason);
    }
    find_optional(find, &driver);
    *out = driver;
    return ICE_OK;
}

ice_status cuda_failed(const struct cuda_driver *driver, const char *call, cuda_result result, char *text)
{
    const char *name = NULL;
    if (driver->error_name(result, &name) != CUDA_OK || !name) {
        name = "an unknown error";
    }
    (void)snprintf(text, CUDA_TEXT_BYTES, "%s: %s (%d)", call, name, result);
    return result == CUDA_OUT_OF_MEMORY ? ICE_NO_MEMORY : ICE_SYSTEM;
}

void cuda_uuid_format(const uint8_t *uuid, char *text)
{
    size_t used = (size_t)snprintf(text, CUDA_TEXT_BYTES, "GPU-");
    for (size_t i = 0; i < CUDA_UUID_BYTES; i++) {
        const char *const dash = i == 4 || i == 6 || i == 8 || i == 10 ? "-" : "";
        used += (size_t)snprintf(text + used, CUDA_TEXT_BYTES - used, "%s%02x", dash, uuid[i]);
    }
}

ice_status cuda_device_find(const struct cuda_driver *driver, const uint8_t *uuid, cuda_device *out, char *text)
{
    int count = 0;
    cuda_result result = driver->device_count(&count);
    if (result != CUDA_OK) {
        return cuda_failed(driver, "cuDeviceGetCount", result, text);
    }
    for (int i = 0; i < count; i++) {
        cuda_device device;
        struct cuda_uuid found;
        result = driver->device_get(&device, i);
        if (result != CUDA_OK) {
            return cuda_failed(driver, "cuDeviceGet", result, text);
        }
        result = driver->device_uuid(&found, device);
        if (result != CUDA_OK) {
            return cuda_failed(driver, "cuDeviceGetUuid", result, text);
        }
        if (memcmp(found.bytes, uuid, CUDA_UUID_BYTES) == 0) {
            *out = device;
            return ICE_OK;
        }
    }
    char name[CUDA_TEXT_BYTES];
    cuda_uuid_format(uuid, name);
    (void)snprintf(text, CUDA_TEXT_BYTES,
                   "%.48s is none of the %d GPUs seen here: CUDA_VISIBLE_DEVICES may hide it, or it is a MIG instance",
                   name, count);
    return ICE_NOT_SUPPORTED;
}
