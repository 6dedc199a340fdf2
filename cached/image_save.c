// Writing the image of a lane: its clustering comes to rest, its dirty pages are written, then tree and table go to the
// disk piece by piece. Belongs to the shard's thread; only save_done runs on an I/O thread.
//
// Nothing of the lane changes in between: its sequence has admitted one writer, the request that asks for the image,
// and lane_build looks at lane->saving.
#include "cached/image.h"

#include "cached/server.h"

#include <assert.h>
#include <string.h>

#define SETTLE_NS       (10ull * 1000000000u) // after which a request's lanes are saved with the tails that they have
#define PIECES_PER_STEP 2u

static void put32(uint8_t *to, uint32_t value)
{
    memcpy(to, &value, sizeof value);
}

static void put64(uint8_t *to, uint64_t value)
{
    memcpy(to, &value, sizeof value);
}

// ---- pieces ----

static void piece_written(struct task *task, void *thread)
{
    struct image_buffer *buffer = (struct image_buffer *)((char *)task - offsetof(struct image_buffer, task));
    struct shard *shard = thread;
    struct image_save *save = &shard->images.save;
    buffer->busy = false;
    save->flying--;
    if (buffer->request.result && save->status == ICE_OK)
        save->status = ICE_DISK_FAILED;
    shard->images_due = true;
}

// On an I/O thread.
static void save_done(struct disk_request *request)
{
    struct image_buffer *buffer = (struct image_buffer *)((char *)request - offsetof(struct image_buffer, request));
    buffer->task.run = piece_written;
    task_queue_push(&buffer->shard->queue, TASK_BULK, &buffer->task);
}

static uint32_t next_used_page(const struct lane *lane, uint32_t page)
{
    while (page < lane->page_capacity && !(lane->pages[page].flags & PAGE_USED))
        page++;
    return page;
}

// The bytes of the image from save->at on, as many as fit. Returns how many.
static size_t fill(struct image_save *save, const struct lane *lane, uint8_t *out, size_t room)
{
    size_t used = 0;
    if (save->at == 0) {
        memcpy(out, image_magic, sizeof image_magic);
        put64(out + 8, save->tree_bytes);
        put64(out + 16, save->image->page_count);
        put64(out + 24, save->image->tokens);
        used = IMAGE_HEADER_BYTES;
    }
    while (used < room && save->at + used < IMAGE_HEADER_BYTES + save->tree_bytes) {
        const size_t more = index_save_step(&save->tree, out + used, room - used);
        assert(more > 0);
        used += more;
    }
    // Entries may lie across two pieces: one that does is made twice, and cut.
    const uint64_t table = IMAGE_HEADER_BYTES + save->tree_bytes;
    while (used < room && save->table_page < lane->page_capacity) {
        uint8_t entry[IMAGE_ENTRY_BYTES];
        const struct page *page = &lane->pages[save->table_page];
        const size_t skip = (save->at + used - table) % IMAGE_ENTRY_BYTES, left = IMAGE_ENTRY_BYTES - skip;
        const size_t part = left < room - used ? left : room - used;
        put32(entry, save->table_page);
        put32(entry + 4, page->extent);
        put64(entry + 8, page->checksum);
        memcpy(out + used, entry + skip, part);
        used += part;
        if (part == left)
            save->table_page = next_used_page(lane, save->table_page + 1);
    }
    return used;
}

static void write_piece(struct shard *shard, struct image_buffer *buffer)
{
    struct image_save *save = &shard->images.save;
    struct image *image = save->image;
    const uint32_t extent = extents_acquire(shard->server->extents, NULL, IMAGE_PIECE_BYTES);
    if (extent == EXTENT_NONE) {
        save->status = ICE_SPILL_FULL;
        return;
    }
    uint8_t *memory = buffer->request.memory;
    const size_t bytes = fill(save, save->part->lane, memory, IMAGE_PIECE_BYTES);
    memset(memory + bytes, 0, IMAGE_PIECE_BYTES - bytes);
    save->at += bytes;
    image->pieces[save->next_piece] = (struct image_piece){extent_checksum(memory, IMAGE_PIECE_BYTES, extent), extent};
    image->piece_count = ++save->next_piece;
    buffer->busy = true;
    save->flying++;
    buffer->request.op = DISK_WRITE;
    buffer->request.next = NULL;
    buffer->request.offset = extent_offset(extent);
    buffer->request.bytes = IMAGE_PIECE_BYTES;
    buffer->request.done = save_done;
    disk_submit(shard->server->disk, &buffer->request);
}

// ---- the lane comes to rest ----

// True while the lane has clustering to do that gets on.
static bool settles(struct image_save *save, struct shard *shard)
{
    struct lane *lane = save->part->lane;
    const uint64_t now_ns = env_now_ns(shard->server->env);
    if (!save->settles) // all lanes of a request have that time together
        save->settle_until_ns = now_ns + SETTLE_NS;
    save->settles = true;
    if (lane->due && now_ns < save->settle_until_ns) {
        shard_look_again(shard, now_ns + SERVER_STARVED_RETRY_NS);
        return true;
    }
    lane->saving = true;
    lane_drop_plan(lane, shard);
    lane->write_failed = false;
    return false;
}

static bool is_saved(const struct page *page)
{
    return !(page->flags & PAGE_USED) || page->flags & PAGE_CLEAN;
}

// Starts writing what is dirty. True while some of it is.
static bool writes_pages(struct image_save *save, struct shard *shard)
{
    struct lane *lane = save->part->lane;
    const uint32_t capacity = lane->page_capacity;
    while (save->page < capacity && is_saved(&lane->pages[save->page]))
        save->page++;
    if (save->page == capacity)
        return false;
    if (lane->write_failed) {
        save->status = ICE_DISK_FAILED;
        return false;
    }
    for (uint32_t page = save->page; page < capacity && page < save->page + TIER_WRITES_MAX; page++) {
        const struct page *entry = &lane->pages[page];
        if (!(entry->flags & PAGE_USED) || entry->flags & (PAGE_CLEAN | PAGE_WRITING))
            continue;
        if (!tier_write(shard, lane, page))
            break;
    }
    if (lane->pages[save->page].flags & PAGE_WRITING)
        return true; // its end wakes the shard
    if (lane->pages[save->page].extent == EXTENT_NONE)
        save->status = ICE_SPILL_FULL;
    else
        shard_look_again(shard, env_now_ns(shard->server->env) + SERVER_STARVED_RETRY_NS);
    return save->status == ICE_OK;
}

static void begin_image(struct image_save *save, struct shard *shard)
{
    struct lane *lane = save->part->lane;
    uint32_t pages = 0;
    for (uint32_t page = next_used_page(lane, 0); page < lane->page_capacity; page = next_used_page(lane, page + 1)) {
        pages++;
        // What sleeps may still be tried again when it wakes; a seal promises that all of it is there.
        if (lane_page_is_lost(lane, page) && save->part->op->kind == OP_SEAL)
            save->status = ICE_PAGE_LOST;
    }
    if (save->status != ICE_OK)
        return;
    save->tree_bytes = lane->index ? index_image_bytes(lane->index) : 0;
    const uint64_t bytes = IMAGE_HEADER_BYTES + save->tree_bytes + (uint64_t)pages * IMAGE_ENTRY_BYTES;
    const uint32_t pieces = (uint32_t)((bytes + IMAGE_PIECE_BYTES - 1) / IMAGE_PIECE_BYTES);
    struct image *image = image_create(shard->server, pieces, pages);
    save->image = image;
    if (!image) {
        save->status = ICE_INDEX_FULL;
        return;
    }
    image->bytes = bytes;
    image->tokens = lane_length(lane);
    image->indexed = lane->index ? index_indexed(lane->index) : 0;
    image->frame_bytes = lane->stem->frame_bytes;
    for (uint32_t page = next_used_page(lane, 0); page < lane->page_capacity; page = next_used_page(lane, page + 1))
        image->page_extents[image->page_count++] = lane->pages[page].extent;
    extents_hold(shard->server->extents, image->page_extents, image->page_count);
    if (lane->index)
        index_save_begin(lane->index, &save->tree);
    save->table_page = next_used_page(lane, 0);
}

// ---- one lane after the other ----

static void end(struct image_save *save, struct shard *shard)
{
    struct op_lane *part = save->part;
    const ice_status status = save->status;
    part->lane->saving = false;
    if (status == ICE_OK)
        part->image = save->image;
    else
        image_destroy(shard->server, save->image);
    save->part = NULL;
    save->image = NULL;
    const struct op_lane *next = shard->images.saves;
    save->settles = save->settles && next && next->op == part->op;
    op_lane_finish(part, shard, status);
}

static void take_next(struct images *images)
{
    struct image_save *save = &images->save;
    struct op_lane *part = images->saves;
    if (save->part || !part)
        return;
    images->saves = part->parked_next;
    if (!images->saves)
        images->saves_tail = NULL;
    save->part = part;
    save->image = NULL;
    save->status = ICE_OK;
    save->page = save->next_piece = 0;
    save->at = 0;
}

static void queue_push(struct images *images, struct op_lane *part)
{
    part->parked_next = NULL;
    if (images->saves_tail)
        images->saves_tail->parked_next = part;
    else
        images->saves = part;
    images->saves_tail = part;
}

void images_save(struct shard *shard, struct op_lane *part)
{
    queue_push(&shard->images, part);
    shard->images_due = true;
}

// True where the next slice may follow at once.
static bool advance(struct image_save *save, struct shard *shard)
{
    const struct op *op = save->part->op;
    if (atomic_load_explicit(&op->cancelled, memory_order_relaxed) && save->status == ICE_OK)
        save->status = ICE_UNKNOWN_SESSION;
    if (!save->image && save->status == ICE_OK) {
        if (!save->part->lane->saving && settles(save, shard))
            return false;
        if (writes_pages(save, shard))
            return false;
        if (save->status == ICE_OK)
            begin_image(save, shard);
    }
    for (uint32_t i = 0, n = 0; i < IMAGE_BUFFERS && n < PIECES_PER_STEP; i++) {
        if (save->status != ICE_OK || save->at == save->image->bytes)
            break;
        if (!save->buffers[i].busy) {
            write_piece(shard, &save->buffers[i]);
            n++;
        }
    }
    const bool done = save->status != ICE_OK || save->at == save->image->bytes;
    if (done && save->flying == 0) {
        end(save, shard);
        return true;
    }
    return !done && save->flying < IMAGE_BUFFERS;
}

// Who waits behind another sequence's lane and is not wanted any more ends at once.
static void end_cancelled(struct shard *shard)
{
    struct images *images = &shard->images;
    struct op_lane *part = images->saves;
    images->saves = images->saves_tail = NULL;
    for (struct op_lane *next; part; part = next) {
        next = part->parked_next;
        if (atomic_load_explicit(&part->op->cancelled, memory_order_relaxed))
            op_lane_finish(part, shard, ICE_UNKNOWN_SESSION);
        else
            queue_push(images, part);
    }
}

bool image_save_step(struct shard *shard)
{
    end_cancelled(shard);
    take_next(&shard->images);
    return shard->images.save.part && advance(&shard->images.save, shard);
}
