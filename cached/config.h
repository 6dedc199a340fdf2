// The daemon's options: a list of (field, flag, type, default, min, max, help) and one of choices. A flag --pool-bytes
// is also the environment variable ICECACHE_POOL_BYTES; the flag wins.
#ifndef ICECACHE_CACHED_CONFIG_H
#define ICECACHE_CACHED_CONFIG_H

#include "proto/limits.h"

#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>

#define CONFIG_SHARDS_MAX 256u

// clang-format off
#define CONFIG_NUMBERS(X) \
    X(pool_bytes,            "pool-bytes",            SIZE,     1ull << 30,  2ull << 20, 1ull << 46, "memory for pages of K and V, taken at start") \
    X(index_bytes,           "index-bytes",           SIZE,     1ull << 30,  1ull << 20, 1ull << 46, "most memory for the trees") \
    X(spill_bytes,           "spill-bytes",           SIZE,     64ull << 30, 2ull << 20, 1ull << 44, "size of the spill file, which holds every page; with --spill-dir") \
    X(spill_depth,           "spill-depth",           NUMBER,   64,          1,          64,         "pages on their way to or from the disk at once") \
    X(spill_read_bytes_per_s,"spill-read-bytes-per-s",SIZE,     0,           0,          1ull << 40, "most bytes read from the spill file in a second; 0: no limit") \
    X(spill_write_bytes_per_s,"spill-write-bytes-per-s",SIZE,   0,           0,          1ull << 40, "most bytes written to it in a second; 0: no limit") \
    X(prefix_evict,          "prefix-evict",          NUMBER,   1,           0,          1,          "1: where the spill file is full, sealed prefixes that nobody uses make room, cold ones that are cheap to compute again first") \
    X(prefix_ttl_s,          "prefix-ttl-s",          NUMBER,   0,           0,          315360000,  "seconds after which a sealed prefix that nobody uses is removed; 0: never") \
    X(hibernate_ms,          "hibernate-ms",          NUMBER,   300000,      0,          86400000,   "after so long without a request a sequence leaves memory for the disk; 0: only where memory is short") \
    X(shared_bytes,          "shared-bytes",          SIZE,     1ull << 30,  1ull << 20, 1ull << 46, "most memory for landings, staging and rings") \
    X(shards,                "shards",                NUMBER,   0,           0,          CONFIG_SHARDS_MAX,      "threads that own lanes; 0: cores less one, at most 8") \
    X(page_tokens,           "page-tokens",           NUMBER,   16,          1,          256,        "tokens per page") \
    X(seed,                  "seed",                  NUMBER,   1,           0,          INT64_MAX,  "seed of the trees") \
    X(sessions_max,          "sessions-max",          NUMBER,   64,          1,          4096,       "workers connected at once") \
    X(sequences_max,         "sequences-max",         NUMBER,   4096,        1,          1u << 20,   "sequences open at once") \
    X(namespaces_max,        "namespaces-max",        NUMBER,   1024,        1,          65536,      "namespaces with sequences or sealed prefixes at once") \
    X(landings_max,          "landings-max",          NUMBER,   64,          1,          4096,       "landings per session") \
    X(inflight_max,          "inflight-max",          NUMBER,   256,         1,          1024,       "requests in flight per session") \
    X(decode_queue_max,      "decode-queue-max",      NUMBER,   4096,        1,          1u << 20,   "retrieves in flight, of all sessions; one below its share of them is never refused") \
    X(bulk_queue_max,        "bulk-queue-max",        NUMBER,   1024,        1,          1u << 20,   "appends, reads, seals and hints in flight, likewise") \
    X(tokens_max,            "tokens-max",            NUMBER,   1u << 20,    1,          1u << 24,   "positions per sequence") \
    X(ring_bytes,            "ring-bytes",            SIZE,     256ull << 10,0,          16ull << 20, "size of each of a session's two rings, a part of --shared-bytes; 0: workers use ZeroMQ") \
    X(staging_bytes_max,     "staging-bytes-max",     SIZE,     256ull << 20,1u << 12,   1ull << 40, "largest staging area of a session") \
    X(retrieve_deadline_ms,  "retrieve-deadline-ms",  NUMBER,   1000,        1,          600000,     "deadline of a retrieve that names none") \
    X(drain_ms,              "drain-ms",              NUMBER,   5000,        0,          600000,     "how long SIGTERM waits for requests in flight") \
    X(gpu_push,              "gpu-push",              NUMBER,   1,           0,          1,          "1: copy to workers' GPUs, which takes a CUDA context there; 0: workers fetch") \
    X(socket_mode,           "socket-mode",           OCTAL,    0600,        0,          0777,       "mode of the sockets; 0660 admits the folder's group")
// field, flag, the words allowed (the field holds the number of the one chosen), initial, help
#define CONFIG_CHOICES(X) \
    X(spill_engine,          "spill-engine",          "auto|io_uring|threads", CONFIG_SPILL_AUTO, "io_uring where it works, else threads; io_uring and no other; threads that call pread and pwrite") \
    X(huge_pages,            "huge-pages",            "require|prefer|off", CONFIG_HUGE_PREFER, "reserved huge pages or no start; the best there are; pages of 4 KiB") \
    X(memory_check,          "memory-check",          "refuse|warn", CONFIG_MEMORY_REFUSE, "what happens where the shares do not fit into the machine or the cgroup") \
    X(gpu_copy,              "gpu-copy",              "auto|loop|batch", CONFIG_GPU_COPY_AUTO, "how the rows of one retrieve are pushed to a GPU: as measured when a landing is opened; a call for each; one call for all, with CUDA 12.8")
// clang-format on

enum config_huge_pages { CONFIG_HUGE_REQUIRE, CONFIG_HUGE_PREFER, CONFIG_HUGE_OFF };
enum config_spill_engine { CONFIG_SPILL_AUTO, CONFIG_SPILL_URING, CONFIG_SPILL_THREADS };
enum config_gpu_copy { CONFIG_GPU_COPY_AUTO, CONFIG_GPU_COPY_LOOP, CONFIG_GPU_COPY_BATCH };
enum config_memory_check { CONFIG_MEMORY_REFUSE, CONFIG_MEMORY_WARN };

#define CONFIG_QUOTAS_MAX 64u

// What the sequences and sealed prefixes of a namespace may have. 0: no limit.
struct config_quota {
    char name_space[WIRE_NAME_BYTES_MAX + 1];
    uint64_t ram_bytes; // pages in memory and trees
    uint64_t disk_bytes;
    uint64_t sequences;
};

struct config {
#define CONFIG_FIELD(field, flag, type, initial, min, max, help) uint64_t field;
    CONFIG_NUMBERS(CONFIG_FIELD)
#undef CONFIG_FIELD
#define CONFIG_FIELD(field, flag, words, initial, help) unsigned field;
    CONFIG_CHOICES(CONFIG_FIELD)
#undef CONFIG_FIELD
    struct config_given { // by a flag or a variable, so that it is no default
#define CONFIG_FIELD(field, flag, type, initial, min, max, help) bool field;
        CONFIG_NUMBERS(CONFIG_FIELD)
#undef CONFIG_FIELD
    } given;
    char socket_directory[108];
    char log_level[16];
    char cuda_library[108], nvml_library[108];
    char spill_directory[256];         // empty: no spill tier
    struct config_quota quota_default; // of namespaces that the list does not name
    struct config_quota quotas[CONFIG_QUOTAS_MAX];
    uint32_t quota_count;
};

enum config_outcome { CONFIG_RUN, CONFIG_HELP, CONFIG_VERSION, CONFIG_ERROR };

// Defaults, then the environment, then the arguments. On CONFIG_ERROR, error says what is wrong and what is allowed.
enum config_outcome config_read(struct config *config, int argc, char *const *argv, char *error, size_t capacity);
void config_print_help(FILE *file);
// "64m" -> bytes (k, m, g, t; binary). False where it is no size.
bool config_parse_size(const char *text, uint64_t *out);

// Quotas (config_quota.c). "NAME:ram=BYTES,disk=BYTES,sequences=N", several of them separated by semicolons; a part
// that is left out is no limit. A name that comes again has the later quota.
bool config_add_quotas(struct config *config, const char *text, char *error, size_t capacity);
// The same without the name.
bool config_set_default_quota(struct config *config, const char *text, char *error, size_t capacity);

#endif
