// The invariants of the spill tier, looked at between any two steps of a shard:
//
//   a page in memory stands in its shard's order exactly once, and nothing else does; the hand is in it, or nowhere
//   a page on its way has exactly one page_io, which knows its extent; READING has no memory, WRITING has, and is dirty
//   a page is never both read and resident, never lost and resident; one that is not in memory is clean
//   an extent is held exactly as often as pages, images and the I/O of pages that are gone name it
//   frames in use: pages in memory, pages being read, and the I/O of pages that are gone
//   bytes of the index's budget: what the lanes have taken, and the images; no more than the cap
//   a page that a hint has named stands among its shard's wishes, and is neither in memory nor on its way
//   the counters of pages, resident pages and waiting gathers agree with what there is
#include "world.h"

#include <stdlib.h>
#include <string.h>

#define IMAGES_MAX 1024u

struct sums {
    uint32_t *held; // by extent
    uint64_t resident[WORLD_SHARDS], reading, wished, image_bytes, index_bytes;
    const struct image *images[IMAGES_MAX]; // that are held
    uint32_t image_count;
};

static bool has_table(const struct lane *lane)
{
    return lane->pages != NULL;
}

static void hold(struct sums *sums, uint32_t extent)
{
    if (extent != EXTENT_NONE)
        sums->held[extent]++;
}

static void hold_image(struct sums *sums, const struct image *image);

// One that several prefixes and stems may hold.
static void hold_once(struct sums *sums, const struct image *image)
{
    for (uint32_t i = 0; i < sums->image_count; i++)
        if (sums->images[i] == image)
            return;
    if (!image)
        return;
    assert_true(sums->image_count < IMAGES_MAX);
    sums->images[sums->image_count++] = image;
    hold_image(sums, image);
}

static void hold_image(struct sums *sums, const struct image *image)
{
    if (!image)
        return;
    sums->image_bytes += image->memory_bytes;
    for (uint32_t i = 0; i < image->piece_count; i++)
        hold(sums, image->pieces[i].extent);
    for (uint32_t i = 0; i < image->page_count; i++)
        hold(sums, image->page_extents[i]);
}

static void check_flags(const struct page *page)
{
    const uint32_t flags = page->flags;
    assert_false(flags & PAGE_READING && (page->memory || !(flags & PAGE_CLEAN) || flags & PAGE_LOST));
    assert_false(flags & PAGE_WRITING && (!page->memory || flags & PAGE_CLEAN));
    assert_false(flags & PAGE_CHANGED && !(flags & PAGE_WRITING));
    assert_false(flags & PAGE_LOST && page->memory);
    assert_false(flags & (PAGE_HINTED | PAGE_AHEAD) && !page->memory && !(flags & (PAGE_READING | PAGE_LOST)));
    assert_false(flags & PAGE_WISHED && (page->memory || flags & PAGE_READING));
    assert_true(page->memory || (flags & PAGE_CLEAN && page->extent != EXTENT_NONE));
}

static void note_page(struct seen *seen, const struct lane *lane, const struct page *page)
{
    seen->plans_reading += lane->plan_runs && page->flags & PAGE_READING;
    seen->plans_spilling += lane->plan_runs && page->flags & PAGE_CHANGED;
    seen->appends_spilling += lane->prepared_tokens > 0 && page->flags & PAGE_CHANGED;
    seen->gathers_spilling += lane->gathers > 0 && page->flags & PAGE_WRITING;
}

// Returns its pages.
static uint64_t check_lane(struct world *world, const struct lane *lane, struct sums *sums)
{
    const bool borrows = lane->image && !lane->image_is_prefix; // its pages' extents are the image's
    uint64_t pages = 0, resident = 0;
    for (uint32_t number = 0; number < lane->page_capacity && has_table(lane); number++) {
        const struct page *page = &lane->pages[number];
        if (!(page->flags & PAGE_USED))
            continue;
        pages++;
        resident += page->memory != NULL;
        sums->reading += (page->flags & PAGE_READING) != 0;
        check_flags(page);
        note_page(&world->seen, lane, page);
        sums->wished += (page->flags & PAGE_WISHED) != 0;
        if (!borrows)
            hold(sums, page->extent);
    }
    if (borrows)
        hold_image(sums, lane->image);
    sums->resident[lane->shard] += resident;
    assert_int_equal(lane->absent, pages - resident);
    assert_true(lane->state == LANE_AWAKE || resident == 0);
    assert_true(lane->state != LANE_ASLEEP || !lane->index);
    // An attached lane's pages count when it has woken.
    return lane->state == LANE_AWAKE ? pages : borrows ? lane->image->page_count : 0;
}

static uint64_t resident_of(const struct sums *sums)
{
    return sums->resident[0] + sums->resident[1];
}

static void check_stem(struct world *world, const struct stem *stem, struct sums *sums)
{
    const uint64_t before = resident_of(sums);
    uint64_t pages = 0;
    for (uint32_t head = 0; head < WORLD_HEADS; head++) {
        pages += check_lane(world, &stem->lanes[head], sums);
        world->seen.shared_building += stem->holds > 1 && stem->lanes[head].plan_runs;
        world->seen.shared_asleep += stem->holds > 1 && stem->lanes[head].state == LANE_ASLEEP && stem->asleep;
    }
    for (uint32_t head = 0; stem->images && head < WORLD_HEADS; head++)
        hold_once(sums, stem->images[head]);
    assert_int_equal(pages, atomic_load(&stem->page_count));
    assert_int_equal(resident_of(sums) - before, atomic_load(&stem->resident));
    sums->index_bytes += atomic_load(&stem->index_bytes);
}

static void check_order(const struct world *world, const struct shard *shard, uint64_t resident)
{
    const struct tier *tier = &shard->tier;
    const struct tier_book *books = world->server.books;
    uint32_t older = TIER_NONE;
    uint64_t count = 0;
    bool hand = tier->hand == TIER_NONE;
    for (uint32_t number = tier->oldest; number != TIER_NONE; older = number, number = books[number].newer) {
        const struct tier_book *book = &books[number];
        assert_int_equal(book->older, older);
        assert_int_equal(book->lane->shard, shard->index);
        const struct page *page = &book->lane->pages[book->page];
        assert_non_null(page->memory);
        assert_int_equal(pool_offset(world->server.pool, page->memory) / EXTENT_UNIT, number);
        hand |= tier->hand == number;
        assert_true(++count <= resident);
    }
    assert_int_equal(tier->newest, older);
    assert_int_equal(count, resident);
    assert_true(hand);
}

// Returns how many pages its wishes are about.
static uint32_t check_wishes(const struct shard *shard)
{
    const struct tier *tier = &shard->tier;
    uint32_t count = 0;
    assert_true(tier->wish_count <= TIER_WISHES_MAX);
    for (uint32_t i = 0; i < tier->wish_count; i++) {
        const struct tier_wish *wish = &tier->wishes[(tier->wish_first + i) % TIER_WISHES_MAX];
        if (!wish->lane)
            continue;
        assert_int_equal(wish->lane->shard, shard->index);
        assert_true(wish->page < wish->lane->page_capacity);
        count += (wish->lane->pages[wish->page].flags & PAGE_WISHED) != 0;
    }
    return count;
}

// Returns how many frames are in the hands of I/O whose page is gone.
static uint64_t check_ios(struct world *world, const struct shard *shard, struct sums *sums)
{
    const struct tier *tier = &shard->tier;
    bool idle[TIER_IO_MAX] = {false};
    uint32_t writes = 0, in_use = 0, on_their_way = 0;
    uint64_t orphans = 0;
    for (const struct page_io *io = tier->free_ios; io; io = io->next)
        idle[io - tier->ios] = true;
    for (uint32_t i = 0; i < TIER_IO_MAX; i++) {
        const struct page_io *io = &tier->ios[i];
        if (idle[i])
            continue;
        in_use++;
        writes += io->request.op == DISK_WRITE;
        if (!io->lane) {
            orphans++;
            world->seen.drops_reading += io->request.op == DISK_READ;
            world->seen.drops_writing += io->request.op == DISK_WRITE;
            hold(sums, io->extent);
            continue;
        }
        const struct page *page = &io->lane->pages[io->page];
        assert_true(page->flags & (io->request.op == DISK_READ ? PAGE_READING : PAGE_WRITING));
        assert_int_equal(page->extent, io->extent);
        if (io->request.op == DISK_WRITE)
            assert_ptr_equal(page->memory, io->request.memory);
        on_their_way++;
    }
    assert_int_equal(tier->writes, writes);
    assert_int_equal(in_use, on_their_way + orphans);
    return orphans;
}

static uint32_t pages_on_their_way(const struct world *world)
{
    uint32_t count = 0;
    for (uint32_t i = 0; i < world->stem_count; i++) {
        for (uint32_t head = 0; head < WORLD_HEADS; head++) {
            const struct lane *lane = &world->stems[i]->lanes[head];
            for (uint32_t number = 0; number < lane->page_capacity; number++)
                count += (lane->pages[number].flags & (PAGE_READING | PAGE_WRITING)) != 0;
        }
    }
    return count;
}

// A gather counts in every stem of its sequence.
static void check_gathers(const struct world *world)
{
    uint32_t gathers = 0, waiting = 0;
    for (uint32_t i = 0; i < world->stem_count; i++)
        for (uint32_t head = 0; head < WORLD_HEADS; head++)
            gathers += world->stems[i]->lanes[head].gathers;
    for (uint32_t i = 0; i < WORLD_OPS; i++) {
        const struct work *work = &world->works[i];
        waiting += work->used ? atomic_load(&work->op.lanes_left) * (work->member->sequence->chain_count + 1) : 0;
    }
    assert_true(gathers <= waiting);
}

// Prefixes, and what is a sequence's beside its stems.
static uint64_t other_bytes(const struct world *world)
{
    uint64_t bytes = 0;
    for (uint32_t i = 0; i < WORLD_SEALS; i++)
        bytes += world->seals[i].prefix ? world->seals[i].prefix->memory_bytes : 0;
    for (const struct sequence *each = world->session.sequences; each; each = each->session_next)
        bytes += each->bytes;
    return bytes;
}

static void check_extents(struct world *world, const struct sums *sums)
{
    struct extents *extents = world->server.extents;
    const uint32_t units = (uint32_t)(world->shape.spill_bytes / EXTENT_UNIT);
    struct extents_usage usage;
    uint64_t in_use = 0;
    for (uint32_t extent = 0; extent < units; extent++) {
        if (sums->held[extent] == 0)
            continue;
        in_use++;
        assert_int_equal(extents_holds(extents, extent), sums->held[extent]);
    }
    extents_usage(extents, &usage);
    assert_int_equal(usage.used_extents, in_use);
}

void world_check(struct world *world)
{
    static uint32_t *held;
    static uint64_t room;
    const uint64_t units = world->shape.spill_bytes / EXTENT_UNIT;
    struct sums sums = {0};
    if (room < units) {
        free(held);
        held = malloc(units * sizeof *held);
        room = units;
    }
    memset(held, 0, units * sizeof *held);
    sums.held = held;
    for (uint32_t i = 0; i < world->stem_count; i++)
        check_stem(world, world->stems[i], &sums);
    for (uint32_t i = 0; i < WORLD_SEALS; i++) {
        const struct prefix *prefix = world->seals[i].prefix;
        for (uint32_t image = 0; prefix && image < prefix_image_count(prefix); image++)
            hold_once(&sums, prefix->images[image]);
    }
    for (uint32_t i = 0; i < WORLD_OPS; i++)
        for (uint32_t lane = 0; world->works[i].used && lane < world->works[i].op.lane_count; lane++)
            hold_once(&sums, world->works[i].lanes[lane].image);
    uint64_t orphans = 0, resident = 0, in_use = 0, wishes = 0;
    for (uint32_t i = 0; i < world->shape.shards; i++) {
        const struct shard *shard = &world->shards[i];
        hold_image(&sums, shard->images.save.image);
        check_order(world, shard, sums.resident[i]);
        orphans += check_ios(world, shard, &sums);
        resident += sums.resident[i];
        wishes += check_wishes(shard);
        for (uint32_t io = 0; io < TIER_IO_MAX; io++)
            in_use += shard->tier.ios[io].lane != NULL;
    }
    assert_int_equal(in_use, pages_on_their_way(world));
    assert_true(wishes >= sums.wished); // a page that came another way may be wished for again
    check_gathers(world);
    check_extents(world, &sums);
    world->seen.slabs_given_up += pool_given_up(world->server.pool) != POOL_SLAB_NONE;
    struct pool_usage usage;
    pool_usage(world->server.pool, &usage);
    assert_int_equal(usage.used_frames, world->hog_count + resident + sums.reading + orphans);
    assert_int_equal(resident, atomic_load(&world->server.tier_stats.resident));
    assert_int_equal(budget_used(&world->server.index_budget),
                     sums.index_bytes + sums.image_bytes + other_bytes(world));
    assert_true(budget_committed(&world->server.index_budget) <= world->server.index_budget.cap_bytes);
}
