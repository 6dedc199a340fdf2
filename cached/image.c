// Images of lanes, see image.h: what is kept of them, and the state of a shard's images. Writing is in image_save.c,
// reading in image_load.c.
#include "cached/image.h"

#include "cached/server.h"

#include <errno.h>
#include <string.h>

static size_t memory_bytes(uint32_t pieces, uint32_t pages)
{
    return sizeof(struct image) + pieces * sizeof(struct image_piece) + pages * sizeof(uint32_t);
}

struct image *image_create(struct server *server, uint32_t pieces, uint32_t pages)
{
    const size_t bytes = memory_bytes(pieces, pages);
    if (!budget_take(&server->index_budget, NULL, bytes))
        return NULL;
    struct image *image = env_acquire_zeroed(server->env, bytes);
    if (!image) {
        budget_give(&server->index_budget, bytes);
        return NULL;
    }
    *image = (struct image){.holds = 1, .memory_bytes = bytes};
    image->pieces = (struct image_piece *)(image + 1);
    image->page_extents = (uint32_t *)(image->pieces + pieces);
    return image;
}

void image_hold(struct image *image)
{
    image->holds++;
}

void image_destroy(struct server *server, struct image *image)
{
    if (!image || --image->holds > 0)
        return;
    for (uint32_t i = 0; i < image->piece_count; i++)
        extents_release(server->extents, &image->pieces[i].extent, 1);
    extents_release(server->extents, image->page_extents, image->page_count);
    const size_t bytes = image->memory_bytes;
    server->env->release(server->env, image, bytes);
    budget_give(&server->index_budget, bytes);
}

uint64_t image_disk_bytes(const struct image *image)
{
    return (uint64_t)image->piece_count * IMAGE_PIECE_BYTES + image->page_count * image->frame_bytes;
}

// ---- the buffers of a shard ----

static void buffers_init(struct shard *shard, struct image_buffer *buffers, uint8_t *memory)
{
    for (uint32_t i = 0; i < IMAGE_BUFFERS; i++) {
        buffers[i] = (struct image_buffer){.shard = shard};
        buffers[i].request.memory = memory + (size_t)i * IMAGE_PIECE_BYTES;
    }
}

#define MEMORY_BYTES ((size_t)2 * IMAGE_BUFFERS * IMAGE_PIECE_BYTES)

int images_init(struct shard *shard)
{
    struct server *server = shard->server;
    struct images *images = &shard->images;
    if (!server->disk)
        return 0;
    // The environment aligns to 64 only.
    images->memory = server->env->acquire(server->env, MEMORY_BYTES + DISK_ALIGN);
    if (!images->memory)
        return -ENOMEM;
    uint8_t *aligned = images->memory + (DISK_ALIGN - (uintptr_t)images->memory % DISK_ALIGN) % DISK_ALIGN;
    buffers_init(shard, images->save.buffers, aligned);
    buffers_init(shard, images->load.buffers, aligned + MEMORY_BYTES / 2);
    return 0;
}

void images_fini(struct shard *shard)
{
    struct images *images = &shard->images;
    shard->server->env->release(shard->server->env, images->memory, MEMORY_BYTES + DISK_ALIGN);
    images->memory = NULL;
}

bool images_step(struct shard *shard)
{
    if (!shard->server->disk)
        return false;
    const bool loads = image_load_step(shard), saves = image_save_step(shard);
    return loads || saves;
}
