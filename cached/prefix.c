// The registry of sealed prefixes, see prefix.h. Manifests as bytes are in prefix_file.c.
//
// Growth: finding costs a bucket and, for each prefix that begins with the same block, a binary search over the chain
// (a hash stands for all blocks before it). Memory: 16 bytes a block, 12 a piece of 64 KiB of tree, 4 a page.
#include "cached/prefix.h"

#include "cached/log.h"
#include "cached/prefix_file.h"
#include "cached/server.h"

#define XXH_INLINE_ALL
#include <xxhash.h>

#include <assert.h>
#include <stdio.h>
#include <string.h>

void prefix_identity_of(struct server *server, const Icecache__Wire__SequenceOpen *message,
                        struct prefix_identity *out)
{
    memset(out, 0, sizeof *out);
    strncpy(out->name_space, message->name_space, sizeof out->name_space - 1);
    memcpy(out->model_digest, message->model_digest.data, message->model_digest.len);
    out->model_digest_bytes = (uint8_t)message->model_digest.len;
    out->tp_rank = message->tp_rank;
    out->tp_size = message->tp_size;
    out->block_tokens = message->block_tokens;
    out->layers = message->layers;
    out->kv_heads = message->kv_heads;
    out->query_heads = message->query_heads;
    out->head_dim = message->head_dim;
    out->dtype = message->dtype;
    out->page_tokens = (uint32_t)server->config->page_tokens;
}

static struct prefix **bucket_of(struct server *server, const struct prefix_identity *identity, const uint8_t *hash)
{
    const uint64_t seed = XXH3_64bits(hash, PREFIX_BLOCK_BYTES);
    return &server->prefixes.buckets[XXH3_64bits_withSeed(identity, sizeof *identity, seed) % PREFIX_BUCKETS];
}

static uint32_t common_blocks(const struct prefix *prefix, const uint8_t (*hashes)[PREFIX_BLOCK_BYTES], uint32_t count)
{
    uint32_t equal = 0, until = (count < prefix->block_count ? count : prefix->block_count) + 1;
    while (until - equal > 1) {
        const uint32_t middle = equal + (until - equal) / 2;
        if (memcmp(prefix->hashes[middle - 1], hashes[middle - 1], PREFIX_BLOCK_BYTES) == 0)
            equal = middle;
        else
            until = middle;
    }
    return equal;
}

struct prefix *prefix_find(struct server *server, const struct prefix_identity *identity,
                           const uint8_t (*hashes)[PREFIX_BLOCK_BYTES], uint32_t count, uint32_t *blocks)
{
    struct prefix *best = NULL;
    *blocks = 0;
    if (count == 0)
        return NULL;
    for (struct prefix *each = *bucket_of(server, identity, hashes[0]); each; each = each->next) {
        if (memcmp(&each->identity, identity, sizeof *identity) != 0)
            continue;
        const uint32_t common = common_blocks(each, hashes, count);
        // Of two that match as far, the shorter one: less of it has to be cut off.
        if (common > *blocks || (common > 0 && common == *blocks && each->block_count < best->block_count)) {
            *blocks = common;
            best = each;
        }
    }
    return best;
}

struct prefix *prefix_by_id(struct server *server, uint64_t id)
{
    for (uint32_t bucket = 0; bucket < PREFIX_BUCKETS; bucket++) {
        for (struct prefix *each = server->prefixes.buckets[bucket]; each; each = each->next) {
            if (each->id == id)
                return each;
        }
    }
    return NULL;
}

uint64_t prefix_tokens(const struct prefix *prefix)
{
    return (uint64_t)prefix->block_count * prefix->identity.block_tokens;
}

uint64_t prefix_disk_bytes(const struct prefix *prefix)
{
    uint64_t bytes = 0;
    for (uint32_t i = 0; i < prefix->lane_count; i++)
        bytes += prefix->images[i] ? image_disk_bytes(prefix->images[i]) : 0;
    return bytes;
}

// ---- making and unmaking ----

struct prefix *prefix_create(struct server *server, const struct prefix_identity *identity, uint32_t lane_count,
                             uint32_t block_count)
{
    const size_t images = sizeof(struct prefix), hashes = images + lane_count * sizeof(struct image *);
    const size_t bytes = hashes + (size_t)block_count * PREFIX_BLOCK_BYTES;
    if (!budget_take(&server->index_budget, NULL, bytes))
        return NULL;
    uint8_t *memory = env_acquire_zeroed(server->env, bytes);
    if (!memory) {
        budget_give(&server->index_budget, bytes);
        return NULL;
    }
    struct prefix *prefix = (struct prefix *)memory;
    prefix->identity = *identity;
    prefix->seed = server->config->seed;
    prefix->block_count = block_count;
    prefix->hashes = (uint8_t(*)[PREFIX_BLOCK_BYTES])(memory + hashes);
    prefix->lane_count = lane_count;
    prefix->images = (struct image **)(memory + images);
    prefix->memory_bytes = bytes;
    prefix->server = server;
    return prefix;
}

void prefix_destroy(struct prefix *prefix)
{
    struct server *server = prefix->server;
    assert(!prefix->listed && prefix->attached == 0);
    for (uint32_t i = 0; i < prefix->lane_count; i++)
        image_destroy(server, prefix->images[i]);
    const size_t bytes = prefix->memory_bytes;
    server->env->release(server->env, prefix, bytes);
    budget_give(&server->index_budget, bytes);
}

void prefix_list_add(struct prefix *prefix)
{
    struct prefix **bucket = bucket_of(prefix->server, &prefix->identity, prefix->hashes[0]);
    prefix->next = *bucket;
    *bucket = prefix;
    prefix->listed = true;
    prefix->used = ++prefix->server->prefixes.uses;
    prefix->server->prefixes.count++;
}

static void list_remove(struct prefix *prefix)
{
    struct prefix **link = bucket_of(prefix->server, &prefix->identity, prefix->hashes[0]);
    while (*link != prefix)
        link = &(*link)->next;
    *link = prefix->next;
    prefix->listed = false;
    prefix->server->prefixes.count--;
}

void prefix_attach(struct prefix *prefix, struct sequence *sequence)
{
    prefix->attached++;
    prefix->used = ++prefix->server->prefixes.uses;
    sequence->prefix = prefix;
    for (uint32_t i = 0; i < prefix->lane_count; i++)
        lane_attach(&sequence->lanes[i], prefix->images[i]);
}

void prefix_detach(struct prefix *prefix)
{
    assert(prefix->attached > 0);
    if (--prefix->attached == 0 && prefix->unlinked)
        prefix_destroy(prefix);
}

// ---- the keeper's work ----

static struct prefix *of_task(struct task *task)
{
    return (struct prefix *)((char *)task - offsetof(struct prefix, task));
}

static struct prefix *of_completion(struct completion *completion)
{
    return (struct prefix *)((char *)completion - offsetof(struct prefix, completion));
}

static void run_write(struct task *task, void *thread)
{
    (void)thread;
    struct prefix *prefix = of_task(task);
    prefix->status = prefix_file_write(prefix);
    completion_post(&prefix->server->completions, &prefix->completion);
}

// On an I/O thread.
static void synced(struct disk_request *request)
{
    struct prefix *prefix = (struct prefix *)((char *)request - offsetof(struct prefix, sync));
    if (request->result) {
        prefix->status = ICE_DISK_FAILED;
        completion_post(&prefix->server->completions, &prefix->completion);
        return;
    }
    prefix->task.run = run_write;
    task_queue_push(&prefix->server->keeper_queue, TASK_BULK, &prefix->task);
}

void prefix_write(struct prefix *prefix)
{
    prefix->sync = (struct disk_request){.op = DISK_SYNC, .done = synced};
    disk_submit(prefix->server->disk, &prefix->sync);
}

static void run_unlink(struct task *task, void *thread)
{
    (void)thread;
    struct prefix *prefix = of_task(task);
    prefix->status = prefix_file_unlink(prefix);
    completion_post(&prefix->server->completions, &prefix->completion);
}

// Where the manifest cannot be removed the prefix may come back at the next start, so what it names is left alone.
static void removed(struct completion *completion, struct server *server)
{
    struct prefix *prefix = of_completion(completion);
    server->prefixes.removing--;
    if (prefix->status != ICE_OK) {
        log_error("the manifest of sealed prefix %016llx cannot be removed; its room stays taken until the next start",
                  (unsigned long long)prefix->id);
        return;
    }
    prefix->unlinked = true;
    if (prefix->attached == 0)
        prefix_destroy(prefix);
}

void prefix_remove(struct prefix *prefix)
{
    struct server *server = prefix->server;
    list_remove(prefix);
    server->prefixes.removing++;
    prefix->completion.done = removed;
    prefix->task.run = run_unlink;
    task_queue_push(&server->keeper_queue, TASK_BULK, &prefix->task);
}

bool prefix_evict(struct server *server)
{
    struct prefix *oldest = NULL;
    for (uint32_t bucket = 0; bucket < PREFIX_BUCKETS; bucket++) {
        for (struct prefix *each = server->prefixes.buckets[bucket]; each; each = each->next) {
            if (each->attached == 0 && (!oldest || each->used < oldest->used))
                oldest = each;
        }
    }
    if (!oldest)
        return false;
    log_info("sealed prefix %016llx (%llu tokens) makes room", (unsigned long long)oldest->id,
             (unsigned long long)prefix_tokens(oldest));
    prefix_remove(oldest);
    return true;
}

void prefixes_fini(struct server *server)
{
    for (uint32_t bucket = 0; bucket < PREFIX_BUCKETS; bucket++) {
        for (struct prefix *each; (each = server->prefixes.buckets[bucket]) != NULL;) {
            list_remove(each);
            prefix_destroy(each);
        }
    }
}
