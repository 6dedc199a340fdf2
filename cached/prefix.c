// The registry of sealed prefixes, see prefix.h. Manifests as bytes are in prefix_file.c.
//
// Growth: finding costs a bucket and, for each prefix that begins with the same block, a binary search over the chain
// (a hash stands for all blocks before it). Memory: 16 bytes a block, 16 a piece of 64 KiB of tree, 4 a page.
#include "cached/prefix.h"

#include "cached/log.h"
#include "cached/prefix_file.h"
#include "cached/server.h"

#define XXH_INLINE_ALL
#include <xxhash.h>

#include <assert.h>
#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>

void prefix_identity_of(struct server *server, const Icecache__Wire__SequenceOpen *message, struct prefix_identity *out)
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
    for (struct prefix *each = server->prefixes.unlisted; each; each = each->next) {
        if (each->id == id && !each->unlinked)
            return each;
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
    for (uint32_t i = 0; i < prefix_image_count(prefix); i++)
        bytes += prefix->images[i] ? image_disk_bytes(prefix->images[i]) : 0;
    return bytes;
}

// ---- making and unmaking ----

struct prefix *prefix_create(struct server *server, const struct prefix_identity *identity, uint32_t lane_count,
                             uint32_t part_count, uint32_t block_count)
{
    const size_t parts = sizeof(struct prefix), images = parts + part_count * sizeof(struct prefix_part);
    const size_t hashes = images + (size_t)part_count * lane_count * sizeof(struct image *);
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
    prefix->part_count = part_count;
    prefix->parts = (struct prefix_part *)(memory + parts);
    prefix->images = (struct image **)(memory + images);
    for (uint32_t i = 0; i < part_count; i++)
        prefix->parts[i].images = prefix->images + (size_t)i * lane_count;
    prefix->memory_bytes = bytes;
    prefix->server = server;
    return prefix;
}

void prefix_know_stem(struct prefix_part *part, struct stem *stem)
{
    part->stem = stem;
    part->next_same = stem->sources;
    stem->sources = part;
}

void prefix_forget_stem(struct stem *stem)
{
    for (struct prefix_part *part = stem->sources; part; part = part->next_same)
        part->stem = NULL;
    stem->sources = NULL;
}

static void leave_stem(struct prefix_part *part)
{
    if (!part->stem)
        return;
    struct prefix_part **link = &part->stem->sources;
    while (*link != part)
        link = &(*link)->next_same;
    *link = part->next_same;
    part->stem = NULL;
}

void prefix_destroy(struct prefix *prefix)
{
    struct server *server = prefix->server;
    assert(!prefix->listed && prefix->attached == 0);
    prefix_uncount(prefix);
    for (uint32_t i = 0; i < prefix->part_count; i++)
        leave_stem(&prefix->parts[i]);
    for (uint32_t i = 0; i < prefix_image_count(prefix); i++)
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
    prefix_touch(prefix);
    prefix->listed_ns = prefix->used_ns;
    prefix_count(prefix);
    prefix->server->prefixes.count++;
}

static void unlink_from(struct prefix **link, const struct prefix *prefix)
{
    while (*link != prefix)
        link = &(*link)->next;
    *link = prefix->next;
}

static void list_remove(struct prefix *prefix)
{
    unlink_from(bucket_of(prefix->server, &prefix->identity, prefix->hashes[0]), prefix);
    prefix->listed = false;
    prefix->server->prefixes.count--;
}

static void unlisted_add(struct prefix *prefix)
{
    prefix->next = prefix->server->prefixes.unlisted;
    prefix->server->prefixes.unlisted = prefix;
}

static void unlisted_destroy(struct prefix *prefix)
{
    unlink_from(&prefix->server->prefixes.unlisted, prefix);
    prefix_destroy(prefix);
}

void prefix_attach(struct prefix *prefix, struct sequence *sequence)
{
    prefix->attached++;
    prefix_touch(prefix);
    sequence->prefix = prefix;
}

void prefix_detach(struct prefix *prefix)
{
    assert(prefix->attached > 0);
    prefix_touch(prefix);
    if (--prefix->attached == 0 && prefix->unlinked)
        unlisted_destroy(prefix);
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
        log_error("the spill file cannot be synced: %s; nothing can be sealed until the next start",
                  strerror(-request->result));
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
    prefix->removing = false;
    prefix->unlinked = prefix->status == ICE_OK;
    if (!prefix->unlinked)
        log_error("the manifest of sealed prefix %016llx cannot be removed; its room stays taken, and it may be back "
                  "after the next start",
                  (unsigned long long)prefix->id);
    prefix_removed(prefix, prefix->status);
    if (prefix->unlinked && prefix->attached == 0)
        unlisted_destroy(prefix);
    op_retry_waiting(server);
}

static void start_removing(struct prefix *prefix)
{
    struct server *server = prefix->server;
    server->prefixes.removing++;
    prefix->removing = true;
    prefix->completion.done = removed;
    prefix->task.run = run_unlink;
    task_queue_push(&server->keeper_queue, TASK_BULK, &prefix->task);
}

void prefix_abandon(struct prefix *prefix)
{
    unlisted_add(prefix);
    start_removing(prefix);
}

void prefix_remove(struct prefix *prefix)
{
    if (prefix->listed) {
        list_remove(prefix);
        unlisted_add(prefix);
    }
    if (!prefix->removing)
        start_removing(prefix);
}

// ---- start-up ----

// Takes the extents of an image. False where the spill file does not have them: it was made smaller, or is another one.
static bool claim_image(struct server *server, struct image *image)
{
    for (; image->piece_count < image->claims_pieces; image->piece_count++) {
        if (!extents_claim(server->extents, image->pieces[image->piece_count].extent, IMAGE_PIECE_BYTES))
            return false;
    }
    for (; image->page_count < image->claims_pages; image->page_count++) {
        if (!extents_claim(server->extents, image->page_extents[image->page_count], image->frame_bytes))
            return false;
    }
    return true;
}

struct probe {
    struct disk_request request;
    pthread_mutex_t lock;
    pthread_cond_t ended;
    bool done;
};

static void probe_done(struct disk_request *request)
{
    struct probe *probe = (struct probe *)((char *)request - offsetof(struct probe, request));
    pthread_mutex_lock(&probe->lock);
    probe->done = true;
    pthread_cond_signal(&probe->ended);
    pthread_mutex_unlock(&probe->lock);
}

// Is the spill file the one that the manifest speaks of? Reads one piece and looks at its checksum; all else is looked
// at when it is needed. 0, -errno where it cannot be read, or -EBADMSG: it is another one.
static int look_at_piece(struct server *server, const struct image *image, uint8_t *memory)
{
    struct probe probe = {.lock = PTHREAD_MUTEX_INITIALIZER, .ended = PTHREAD_COND_INITIALIZER};
    if (image->piece_count == 0)
        return -EBADMSG;
    const struct image_piece *piece = &image->pieces[image->piece_count - 1];
    probe.request = (struct disk_request){.op = DISK_READ,
                                          .offset = extent_offset(piece->extent),
                                          .memory = memory,
                                          .bytes = IMAGE_PIECE_BYTES,
                                          .done = probe_done};
    disk_submit(server->disk, &probe.request);
    pthread_mutex_lock(&probe.lock);
    while (!probe.done) // the disk answers every request: a device that hangs is the operator's to see
        pthread_cond_wait(&probe.ended, &probe.lock);
    pthread_mutex_unlock(&probe.lock);
    if (probe.request.result)
        return probe.request.result;
    return extent_checksum(memory, IMAGE_PIECE_BYTES, piece->extent) == piece->checksum ? 0 : -EBADMSG;
}

struct loading {
    struct server *server;
    int folder;
    uint8_t *memory; // of a manifest, grown as needed
    size_t memory_bytes;
    uint8_t *piece; // aligned
    bool no_memory;
    uint32_t dropped;
};

static bool read_manifest(struct loading *loading, const char *name, size_t *bytes)
{
    struct env *env = loading->server->env;
    int error = env->read_file(env, loading->folder, name, loading->memory, loading->memory_bytes, bytes);
    if (error != -EFBIG || *bytes > PREFIX_FILE_BYTES_MAX)
        return error == 0;
    env->release(env, loading->memory, loading->memory_bytes);
    loading->memory = env->acquire(env, *bytes);
    loading->memory_bytes = loading->memory ? *bytes : 0;
    loading->no_memory |= !loading->memory;
    return loading->memory &&
           env->read_file(env, loading->folder, name, loading->memory, loading->memory_bytes, bytes) == 0;
}

static bool load_one(void *context, const char *name)
{
    struct loading *loading = context;
    struct server *server = loading->server;
    size_t bytes = 0;
    ice_status status = ICE_INVALID_ARGUMENT;
    struct prefix *prefix = NULL;
    if (read_manifest(loading, name, &bytes))
        prefix = prefix_decode(server, loading->memory, bytes, &status);
    if (loading->no_memory || status == ICE_NO_MEMORY) {
        loading->no_memory = true;
        return false;
    }
    bool whole = prefix != NULL;
    for (uint32_t i = 0; whole && i < prefix_image_count(prefix); i++)
        whole = claim_image(server, prefix->images[i]);
    const int error = whole ? look_at_piece(server, prefix->images[0], loading->piece) : -EBADMSG;
    if (error == 0) {
        prefix_list_add(prefix);
        return true;
    }
    if (error != -EBADMSG) { // a disk that cannot be read today may be read after the next start
        log_warn("what %s/%s names cannot be read: %s; it is left alone", server->config->spill_directory, name,
                 strerror(-error));
        unlisted_add(prefix);
        return true;
    }
    if (prefix)
        prefix_destroy(prefix);
    loading->dropped++;
    log_warn("%s/%s is not whole, or not of this spill file: removed", server->config->spill_directory, name);
    if (server->env->unlink_file(server->env, loading->folder, name) != 0)
        log_warn("%s/%s cannot be removed", server->config->spill_directory, name);
    return true;
}

// What a crash has left of a manifest that was being written; its name never comes again.
static bool remove_leftover(void *context, const char *name)
{
    const struct loading *loading = context;
    struct server *server = loading->server;
    if (server->env->unlink_file(server->env, loading->folder, name) != 0)
        log_warn("%s/%s, left over by a crash, cannot be removed", server->config->spill_directory, name);
    return true;
}

bool prefixes_load(struct server *server)
{
    struct env *env = server->env;
    struct loading loading = {.server = server};
    if (!server->disk)
        return true;
    uint8_t *memory = env->acquire(env, IMAGE_PIECE_BYTES + DISK_ALIGN);
    int error = memory ? env->open_directory(env, server->config->spill_directory, &loading.folder) : -ENOMEM;
    if (!error) {
        loading.piece = memory + (DISK_ALIGN - (uintptr_t)memory % DISK_ALIGN) % DISK_ALIGN;
        error = env->list_files(env, loading.folder, PREFIX_SUFFIX ENV_TEMPORARY, remove_leftover, &loading);
        if (!error)
            error = env->list_files(env, loading.folder, PREFIX_SUFFIX, load_one, &loading);
        env->close_fd(env, loading.folder);
    }
    env->release(env, memory, IMAGE_PIECE_BYTES + DISK_ALIGN);
    env->release(env, loading.memory, loading.memory_bytes);
    error = loading.no_memory ? -ENOMEM : error;
    if (error)
        log_error("cannot read the sealed prefixes in %s: %s%s", server->config->spill_directory, strerror(-error),
                  error == -ENOMEM ? "; raise --index-bytes" : "");
    else if (server->prefixes.count > 0 || loading.dropped > 0)
        log_info("sealed prefixes: %u found, %u dropped", server->prefixes.count, loading.dropped);
    return error == 0;
}

void prefixes_fini(struct server *server)
{
    for (uint32_t bucket = 0; bucket < PREFIX_BUCKETS; bucket++) {
        for (struct prefix *each; (each = server->prefixes.buckets[bucket]) != NULL;) {
            list_remove(each);
            prefix_destroy(each);
        }
    }
    while (server->prefixes.unlisted) // whose removal the end has overtaken, or that could not be removed
        unlisted_destroy(server->prefixes.unlisted);
}
