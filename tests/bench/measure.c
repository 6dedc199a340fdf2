// Clock, statistics, bandwidth, and the machine's description from /proc and /sys.
#include "measure.h"

#include "arena.h"
#include "scan.h"

#include <glob.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/utsname.h>
#include <time.h>
#include <unistd.h>

#define BANDWIDTH_BYTES  ((size_t)512 << 20)
#define BANDWIDTH_PASSES 5

uint64_t measure_ns(void)
{
    struct timespec now;
    (void)clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

void samples_add(struct samples *samples, double value)
{
    if (samples->count < MEASURE_SAMPLES_MAX) {
        samples->values[samples->count++] = value;
    }
}

static int ascending(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

double quantile(double *values, uint32_t count, double q)
{
    if (count == 0) {
        return NAN;
    }
    qsort(values, count, sizeof *values, ascending);
    return values[(uint32_t)(q * (count - 1) + 0.5)];
}

double samples_median(const struct samples *samples)
{
    struct samples sorted = *samples;
    return quantile(sorted.values, sorted.count, 0.5);
}

double samples_min(const struct samples *samples)
{
    struct samples sorted = *samples;
    return quantile(sorted.values, sorted.count, 0);
}

double samples_max(const struct samples *samples)
{
    struct samples sorted = *samples;
    return quantile(sorted.values, sorted.count, 1);
}

// Reads as a scan does: one coordinate row after the other, through the int8 kernel's simplest sibling.
static uint64_t read_all(const uint64_t *memory, size_t count)
{
    uint64_t sums[8] = {0};
    for (size_t i = 0; i + 64 <= count; i += 64) {
        for (size_t line = 0; line < 64; line += 8) {
            __builtin_prefetch(memory + i + line + 512);
            for (size_t j = 0; j < 8; j++) {
                sums[j] += memory[i + line + j];
            }
        }
    }
    for (size_t j = 1; j < 8; j++) {
        sums[0] ^= sums[j];
    }
    return sums[0];
}

double measure_bandwidth(void)
{
    struct arena arena = {0};
    uint64_t *memory = arena_acquire(&arena, BANDWIDTH_BYTES);
    if (memory == NULL) {
        return 0;
    }
    memset(memory, 1, BANDWIDTH_BYTES);
    double best = 0;
    volatile uint64_t sink = 0;
    for (int pass = 0; pass < BANDWIDTH_PASSES; pass++) {
        const uint64_t begin = measure_ns();
        sink = sink + read_all(memory, BANDWIDTH_BYTES / sizeof *memory);
        const double rate = (double)BANDWIDTH_BYTES / (double)(measure_ns() - begin);
        best = rate > best ? rate : best;
    }
    arena_fini(&arena);
    return best;
}

// The text behind the first "key ... :" of a file, or "".
static void find_line(const char *path, const char *key, char *out, size_t room)
{
    out[0] = '\0';
    FILE *file = fopen(path, "r");
    char line[512];
    while (file != NULL && fgets(line, sizeof line, file) != NULL) {
        const char *colon = strchr(line, ':');
        if (strncmp(line, key, strlen(key)) == 0 && colon != NULL) {
            colon += 1 + strspn(colon + 1, " \t");
            (void)snprintf(out, room, "%.*s", (int)strcspn(colon, "\n"), colon);
            break;
        }
    }
    if (file != NULL) {
        (void)fclose(file);
    }
}

static void first_line(const char *path, char *out, size_t room)
{
    out[0] = '\0';
    FILE *file = fopen(path, "r");
    if (file != NULL) {
        if (fgets(out, (int)room, file) != NULL) {
            out[strcspn(out, "\n")] = '\0';
        }
        (void)fclose(file);
    }
}

static json_t *gpu(void)
{
    glob_t found;
    json_t *name = NULL;
    if (glob("/proc/driver/nvidia/gpus/*/information", 0, NULL, &found) == 0) {
        char model[256];
        find_line(found.gl_pathv[0], "Model", model, sizeof model);
        name = json_string(model);
        globfree(&found);
    }
    return name != NULL ? name : json_null();
}

json_t *measure_machine(void)
{
    char cpu[256], huge[256];
    struct utsname names;
    find_line("/proc/cpuinfo", "model name", cpu, sizeof cpu);
    first_line("/sys/kernel/mm/transparent_hugepage/enabled", huge, sizeof huge);
    const char *kernel = uname(&names) == 0 ? names.release : "";
    const long pages = sysconf(_SC_PHYS_PAGES), page_bytes = sysconf(_SC_PAGESIZE);
    return json_pack("{s:s, s:I, s:s, s:I, s:s, s:s, s:o}", "cpu", cpu, "cores",
                     (json_int_t)sysconf(_SC_NPROCESSORS_ONLN), "isa", scan_ops_best()->name, "ram_bytes",
                     (json_int_t)pages * page_bytes, "huge_pages", huge, "kernel", kernel, "gpu", gpu());
}
