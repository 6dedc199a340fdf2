// Quotas, see quota.h. Estimates are of what tokens take on the whole: pages as if they were full, of a
// tree the codes and places of its tokens. So a step of one token needs a token's worth, and not a new page in each
// lane; the pages that clustering leaves half empty are counted when they are there.
#include "cached/quota.h"

#include "cached/server.h"

// Of a lane's tree for one token: two thirds of a byte a coordinate and this; as measured (ARCHITECTURE.md, Limits),
// and a little more.
#define QUOTA_TREE_TOKEN_BYTES 32u

void quota_count_pages(struct stem *stem, int64_t pages)
{
    atomic_fetch_add_explicit(&stem->page_count, (uint64_t)pages, memory_order_relaxed);
    if (stem->server->disk) // every page has an extent there
        tenant_add_disk(stem->tenant, pages * (int64_t)stem->frame_bytes);
}

void quota_count_image(struct stem *stem, const struct image *image, int sign)
{
    tenant_add_disk(stem->tenant, (int64_t)image->piece_count * IMAGE_PIECE_BYTES * sign);
    tenant_add_index(stem->tenant, (int64_t)image->memory_bytes * sign);
}

static uint64_t page_bytes(const struct sequence *sequence, uint64_t lanes, uint64_t tokens)
{
    return lanes * (tokens * sequence->own->frame_bytes / sequence->server->config->page_tokens);
}

static uint64_t tree_bytes(uint32_t head_dim, uint64_t lanes, uint64_t tokens)
{
    return lanes * tokens * (head_dim * 2 / 3 + QUOTA_TREE_TOKEN_BYTES);
}

ice_status quota_may_append(struct sequence *sequence, uint32_t layers, uint64_t tokens, bool promise, char *text)
{
    const uint64_t lanes = (uint64_t)layers * sequence->shape.kv_heads;
    const bool has_disk = tier_serves(sequence->server);
    const uint64_t pages = page_bytes(sequence, lanes, tokens);
    const struct tenant_need need = {
        .pool_bytes = pages,
        .index_bytes = tree_bytes(sequence->shape.head_dim, lanes, tokens),
        .disk_bytes = has_disk ? pages : 0,
    };
    return tenant_may_take(sequence->tenant, promise ? &sequence->own->quota_promised : NULL, &need, has_disk, text);
}

ice_status quota_may_seal(struct sequence *sequence, uint64_t tokens, char *text)
{
    const uint64_t pieces = tree_bytes(sequence->shape.head_dim, 1, tokens) / IMAGE_PIECE_BYTES + 1;
    const struct tenant_need need = {.disk_bytes = page_bytes(sequence, sequence->own->lane_count, tokens) +
                                                   sequence->own->lane_count * pieces * IMAGE_PIECE_BYTES};
    return tenant_may_take(sequence->tenant, NULL, &need, tier_serves(sequence->server), text);
}

// Of the first tokens of a prefix, those that are in memory for nobody: what is shared is counted already.
static uint64_t fresh_tokens(const struct prefix *prefix, uint64_t tokens)
{
    uint64_t fresh = 0;
    for (uint32_t i = 0; i < prefix->part_count; i++) {
        const struct prefix_part *part = &prefix->parts[i];
        if (part->first < tokens && !part->stem)
            fresh += (part->end < tokens ? part->end : tokens) - part->first;
    }
    return fresh;
}

ice_status quota_may_attach(struct server *server, const struct prefix *prefix, uint64_t tokens, char *text)
{
    const uint64_t fresh = fresh_tokens(prefix, tokens);
    uint64_t bytes = 0;
    for (uint32_t i = 0; i < prefix_image_count(prefix); i++)
        bytes += prefix->images[i]->page_count * prefix->images[i]->frame_bytes;
    const struct tenant_need need = {
        // Both may have 2^46, whose product has no room.
        .disk_bytes = (uint64_t)((double)bytes * ((double)fresh / (double)prefix_tokens(prefix))),
        .index_bytes = tree_bytes(prefix->identity.head_dim, prefix->lane_count, fresh),
    };
    const ice_status status =
        prefix->tenant ? tenant_may_take(prefix->tenant, NULL, &need, tier_serves(server), text) : ICE_OK;
    if (status == ICE_QUOTA)
        prefix->tenant->refused++;
    return status;
}

struct tenant *quota_lacking_disk(const struct op *op)
{
    const struct tenants *tenants = &op->server->tenants;
    return tenants->refused_for_disk ? tenants->refused : NULL;
}

void quota_note_refused(const struct op *op)
{
    op->server->tenants.refused->refused++;
}
