// Clock, statistics, bandwidth, and the machine's description from /proc and /sys.
#include "measure.h"

#include "scan.h"

#include <glob.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/utsname.h>
#include <time.h>
#include <unistd.h>

#define BANDWIDTH_BYTES ((size_t)512 << 20)

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

bool bandwidth_init(struct bandwidth *bandwidth)
{
    *bandwidth = (struct bandwidth){0};
    bandwidth->memory = arena_acquire(&bandwidth->arena, BANDWIDTH_BYTES);
    if (bandwidth->memory == NULL) {
        return false;
    }
    memset(bandwidth->memory, 1, BANDWIDTH_BYTES);
    return true;
}

void bandwidth_fini(struct bandwidth *bandwidth)
{
    arena_fini(&bandwidth->arena);
    *bandwidth = (struct bandwidth){0};
}

void bandwidth_measure(struct bandwidth *bandwidth)
{
    volatile uint32_t sink = 0;
    const uint64_t begin = measure_ns();
    sink = sink + scan_ops_best()->read(bandwidth->memory, BANDWIDTH_BYTES);
    samples_add(&bandwidth->gb_per_s, (double)BANDWIDTH_BYTES / (double)(measure_ns() - begin));
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

uint64_t measure_free_bytes(void)
{
    char text[64];
    find_line("/proc/meminfo", "MemAvailable", text, sizeof text);
    return 1024 * strtoull(text, NULL, 10);
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
