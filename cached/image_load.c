// Making a lane from its image. Pieces are read ahead of the one that is looked at, checked by their checksums, fed to
// the tree's load, and at the end to the table of pages. Belongs to the shard's thread; only load_done runs on an I/O
// thread.
//
// A lane whose image cannot be read, or is none, is lost (LANE_LOST): nothing of it is served.
#include "cached/image.h"

#include "cached/log.h"
#include "cached/server.h"

#include <string.h>

static uint32_t get32(const uint8_t *from)
{
    uint32_t value;
    memcpy(&value, from, sizeof value);
    return value;
}

static uint64_t get64(const uint8_t *from)
{
    uint64_t value;
    memcpy(&value, from, sizeof value);
    return value;
}

// ---- what the bytes say ----

static ice_status begin_tree(struct image_load *load, struct lane *lane, const uint8_t *header)
{
    const struct image *image = load->image;
    load->tree_bytes = get64(header + 8);
    load->page_count = get64(header + 16);
    if (memcmp(header, image_magic, sizeof image_magic) != 0 || load->page_count != image->page_count ||
        get64(header + 24) != image->tokens || load->tree_bytes > image->bytes ||
        IMAGE_HEADER_BYTES + load->tree_bytes + load->page_count * IMAGE_ENTRY_BYTES != image->bytes)
        return ICE_PAGE_LOST;
    return load->tree_bytes > 0 ? lane_load_begin(lane, load->tree_bytes, &load->tree) : ICE_OK;
}

static ice_status end_tree(struct image_load *load, struct lane *lane)
{
    struct index_load *tree = load->tree;
    load->tree = NULL;
    return tree ? lane_load_end(lane, tree) : ICE_OK;
}

// One entry of the table.
static ice_status take_entry(struct image_load *load, struct lane *lane, const uint8_t *entry)
{
    const uint32_t number = get32(entry), extent = get32(entry + 4);
    if (load->pages_done >= load->image->page_count || extent != load->image->page_extents[load->pages_done])
        return ICE_PAGE_LOST;
    load->pages_done++;
    return lane_load_page(lane, number, extent, get64(entry + 8));
}

// Collects header or entry that lies across pieces. NULL: more is needed.
static const uint8_t *collect(struct image_load *load, uint32_t wanted, const uint8_t **bytes, size_t *n)
{
    const uint32_t left = wanted - load->rest_bytes, part = *n < left ? (uint32_t)*n : left;
    memcpy(load->rest + load->rest_bytes, *bytes, part);
    load->rest_bytes += part;
    *bytes += part;
    *n -= part;
    load->at += part;
    if (load->rest_bytes < wanted)
        return NULL;
    load->rest_bytes = 0;
    return load->rest;
}

static ice_status feed(struct image_load *load, struct lane *lane, const uint8_t *bytes, size_t n)
{
    ice_status status = ICE_OK;
    while (n > 0 && status == ICE_OK && load->at < load->image->bytes) {
        const uint64_t tree_end = IMAGE_HEADER_BYTES + load->tree_bytes;
        if (load->at < IMAGE_HEADER_BYTES) {
            const uint8_t *header = collect(load, IMAGE_HEADER_BYTES, &bytes, &n);
            status = header ? begin_tree(load, lane, header) : ICE_OK;
        } else if (load->at < tree_end) {
            const size_t part = n < tree_end - load->at ? n : (size_t)(tree_end - load->at);
            status = lane_load_feed(load->tree, bytes, part);
            bytes += part;
            n -= part;
            load->at += part;
        } else {
            const uint8_t *entry = collect(load, IMAGE_ENTRY_BYTES, &bytes, &n);
            status = load->tree ? end_tree(load, lane) : ICE_OK;
            if (status == ICE_OK && entry)
                status = take_entry(load, lane, entry);
        }
    }
    return status;
}

// ---- pieces ----

static void piece_read(struct task *task, void *thread)
{
    struct image_buffer *buffer = (struct image_buffer *)((char *)task - offsetof(struct image_buffer, task));
    struct shard *shard = thread;
    struct image_load *load = &shard->images.load;
    buffer->busy = false;
    buffer->read = true;
    load->flying--;
    if (buffer->request.result && load->status == ICE_OK)
        load->status = ICE_PAGE_LOST;
    shard->images_due = true;
}

// On an I/O thread.
static void load_done(struct disk_request *request)
{
    struct image_buffer *buffer = (struct image_buffer *)((char *)request - offsetof(struct image_buffer, request));
    buffer->task.run = piece_read;
    task_queue_push(&buffer->shard->queue, TASK_DECODE, &buffer->task);
}

static void read_ahead(struct image_load *load, struct shard *shard)
{
    struct disk_request *chain = NULL;
    while (load->next_read < load->image->piece_count && load->next_read < load->next_feed + IMAGE_BUFFERS) {
        struct image_buffer *buffer = &load->buffers[load->next_read % IMAGE_BUFFERS];
        buffer->busy = true;
        buffer->read = false;
        buffer->piece = load->next_read;
        load->flying++;
        buffer->request.op = DISK_READ;
        buffer->request.offset = extent_offset(load->image->pieces[load->next_read++].extent);
        buffer->request.bytes = IMAGE_PIECE_BYTES;
        buffer->request.done = load_done;
        buffer->request.next = chain;
        chain = &buffer->request;
    }
    if (chain)
        disk_submit(shard->server->disk, chain);
}

static ice_status feed_piece(struct image_load *load, const struct image_buffer *buffer)
{
    const struct image_piece *piece = &load->image->pieces[load->next_feed++];
    const uint8_t *memory = buffer->request.memory;
    if (extent_checksum(memory, IMAGE_PIECE_BYTES, piece->extent) != piece->checksum)
        return ICE_PAGE_LOST;
    return feed(load, load->lane, memory, IMAGE_PIECE_BYTES);
}

// ---- one lane after the other ----

static void end(struct image_load *load, struct shard *shard)
{
    struct lane *lane = load->lane;
    ice_status status = load->status;
    load->runs = false;
    if (!lane) {
        index_load_drop(load->tree);
        load->tree = NULL;
        return;
    }
    if (status == ICE_OK)
        status = end_tree(load, lane);
    if (status == ICE_OK && load->pages_done != load->image->page_count)
        status = ICE_PAGE_LOST;
    index_load_drop(load->tree);
    load->tree = NULL;
    load->lane = NULL;
    lane_woken(lane, shard, status);
    shard_wake(shard);
}

static void take_next(struct images *images)
{
    struct image_load *load = &images->load;
    struct lane *lane = images->wakes;
    if (load->runs || !lane)
        return;
    images->wakes = lane->wake_next;
    if (!images->wakes)
        images->wakes_tail = NULL;
    load->lane = lane;
    load->runs = true;
    load->image = lane->image;
    load->status = ICE_OK;
    load->tree = NULL;
    load->at = load->tree_bytes = load->page_count = load->pages_done = 0;
    load->next_read = load->next_feed = load->rest_bytes = 0;
    for (uint32_t i = 0; i < IMAGE_BUFFERS; i++)
        load->buffers[i].read = false;
}

void images_wake(struct shard *shard, struct lane *lane)
{
    struct images *images = &shard->images;
    lane->wake_next = NULL;
    if (images->wakes_tail)
        images->wakes_tail->wake_next = lane;
    else
        images->wakes = lane;
    images->wakes_tail = lane;
    shard->images_due = true;
}

void images_forget(struct shard *shard, struct lane *lane)
{
    struct images *images = &shard->images;
    if (images->load.lane == lane) {
        index_load_drop(images->load.tree); // its memory is the lane's
        images->load.tree = NULL;
        images->load.lane = NULL; // the pieces on their way end first
        return;
    }
    struct lane *previous = NULL;
    for (struct lane *each = images->wakes; each; previous = each, each = each->wake_next) {
        if (each != lane)
            continue;
        if (previous)
            previous->wake_next = lane->wake_next;
        else
            images->wakes = lane->wake_next;
        if (images->wakes_tail == lane)
            images->wakes_tail = previous;
        return;
    }
}

bool image_load_step(struct shard *shard)
{
    struct image_load *load = &shard->images.load;
    take_next(&shard->images);
    if (!load->runs)
        return false;
    const bool goes_on = load->lane && load->status == ICE_OK;
    struct image_buffer *buffer = &load->buffers[load->next_feed % IMAGE_BUFFERS];
    if (goes_on && load->next_feed < load->next_read && buffer->read) {
        buffer->read = false;
        load->status = feed_piece(load, buffer);
    }
    if (load->lane && load->status == ICE_OK && load->next_feed < load->image->piece_count) {
        read_ahead(load, shard);
        return load->buffers[load->next_feed % IMAGE_BUFFERS].read;
    }
    if (load->flying > 0)
        return false;
    end(load, shard);
    return true;
}
