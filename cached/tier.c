// Pages between pool and disk, see tier.h. Invariants: a page with memory stands in its shard's order exactly once; a
// page on its way (READING, WRITING) has exactly one page_io; a page's extent is held once for the page while it is
// used. A page that goes while it is on its way leaves memory and extent to its page_io.
//
// Growth: every call is O(1), or bound by TIER_SCAN_MAX; memory: 24 bytes for each 4 KiB of the pool.
#include "cached/tier.h"

#include "cached/log.h"
#include "cached/quota.h"
#include "cached/server.h"

#include <assert.h>
#include <errno.h>
#include <string.h>

#define LOW_SHARE  32u // of the pool is kept free: evicting begins below 1/32
#define HIGH_SHARE 16u // and ends at 1/16

static uint64_t frame_bytes_of(const struct lane *lane)
{
    return lane->stem->frame_bytes;
}

static struct page *page_of(const struct lane *lane, uint32_t page)
{
    assert(page < lane->page_capacity && lane->pages[page].flags & PAGE_USED);
    return &lane->pages[page];
}

bool tier_serves(const struct server *server)
{
    return server->disk && !disk_is_off(server->disk);
}

// ---- the order of the pages in memory ----

static uint32_t book_of(const struct server *server, const uint8_t *memory)
{
    return (uint32_t)(pool_offset(server->pool, memory) / EXTENT_UNIT);
}

static void order_enter(struct shard *shard, struct lane *lane, uint32_t page)
{
    struct tier *tier = &shard->tier;
    struct tier_book *books = shard->server->books;
    if (!books)
        return;
    const uint32_t number = book_of(shard->server, page_of(lane, page)->memory);
    struct tier_book *book = &books[number];
    book->lane = lane;
    book->page = page;
    book->older = tier->newest;
    book->newer = TIER_NONE;
    atomic_store_explicit(&book->owner, shard->index + 1, memory_order_relaxed);
    if (tier->newest != TIER_NONE)
        books[tier->newest].newer = number;
    else
        tier->oldest = number;
    tier->newest = number;
    tier->count++;
    atomic_fetch_add_explicit(&shard->server->tier_stats.resident, 1, memory_order_relaxed);
}

static void order_leave(struct shard *shard, const uint8_t *memory)
{
    struct tier *tier = &shard->tier;
    struct tier_book *books = shard->server->books;
    if (!books)
        return;
    const uint32_t number = book_of(shard->server, memory);
    struct tier_book *book = &books[number];
    atomic_store_explicit(&book->owner, 0, memory_order_relaxed);
    if (tier->hand == number)
        tier->hand = book->newer;
    if (book->older != TIER_NONE)
        books[book->older].newer = book->newer;
    else
        tier->oldest = book->newer;
    if (book->newer != TIER_NONE)
        books[book->newer].older = book->older;
    else
        tier->newest = book->older;
    tier->count--;
    atomic_fetch_sub_explicit(&shard->server->tier_stats.resident, 1, memory_order_relaxed);
}

#define BETS_LEARN  64u   // pages from which on the past is looked at
#define BETS_MEMORY 1024u // pages after which it fades
#define BETS_TRIES  16u   // while it does not pay, it is tried once in so many times

static void bets_note(struct tier_bets *bets, bool used)
{
    bets->used = (uint16_t)(bets->used + used);
    bets->wasted = (uint16_t)(bets->wasted + !used);
    if (bets->used + bets->wasted >= (int)BETS_MEMORY) {
        bets->used /= 2;
        bets->wasted /= 2;
    }
}

// One page in four asked for is worth it: a page more in a batch costs less than a page alone.
static bool bets_pay(struct tier_bets *bets)
{
    if ((uint32_t)bets->used + bets->wasted < BETS_LEARN || bets->used * 3 >= bets->wasted)
        return true;
    return ++bets->skipped % BETS_TRIES == 0;
}

// A page of the lane has come into memory, or left it.
static void count_resident(struct lane *lane, int pages)
{
    lane->absent -= (uint32_t)pages;
    quota_count_resident(lane->stem, pages);
}

// What was read early has been asked for, or goes unused.
static void end_bet(struct lane *lane, struct page *page, bool used)
{
    struct server *server = lane->stem->server;
    struct tier_stats *stats = &server->tier_stats;
    if (page->flags & PAGE_AHEAD) {
        bets_note(&server->shards[lane->shard].tier.ahead, used);
        atomic_fetch_add_explicit(used ? &stats->ahead_used : &stats->ahead_wasted, 1, memory_order_relaxed);
    }
    if (page->flags & PAGE_HINTED) {
        bets_note(&lane->hints, used);
        atomic_fetch_add_explicit(used ? &stats->hinted_used : &stats->hinted_wasted, 1, memory_order_relaxed);
    }
    page->flags &= (uint16_t) ~(PAGE_AHEAD | PAGE_HINTED);
}

static void drop_memory(struct shard *shard, struct lane *lane, struct page *page)
{
    order_leave(shard, page->memory);
    pool_release(shard->server->pool, page->memory);
    page->memory = NULL;
    end_bet(lane, page, false);
    count_resident(lane, -1);
}

// ---- I/O ----

// On an I/O thread.
static void io_done(struct disk_request *request)
{
    struct page_io *io = (struct page_io *)((char *)request - offsetof(struct page_io, request));
    struct tier *tier = &io->shard->tier;
    if (request->op == DISK_READ && request->result == 0)
        io->matches = extent_checksum(request->memory, request->bytes, io->extent) == io->checksum;
    pthread_mutex_lock(&tier->lock);
    struct shard *shard = io->shard; // which may take the page_io back once the lock is free
    const bool first = !tier->done;
    io->next = tier->done;
    tier->done = io;
    pthread_mutex_unlock(&tier->lock);
    // Not under the lock, which the shard wants as soon as it runs. The task is not in the queue: it runs once for each
    // time that something is done again, and empties the list.
    if (first)
        task_queue_push(&shard->queue, TASK_DECODE, &tier->done_task);
}

static struct page_io *io_take(struct tier *tier)
{
    struct page_io *io = tier->free_ios;
    if (io) {
        tier->free_ios = io->next;
        tier->in_flight++;
    }
    return io;
}

static void io_give(struct tier *tier, struct page_io *io)
{
    io->lane = NULL;
    tier->in_flight--;
    io->next = tier->free_ios;
    tier->free_ios = io;
}

static void io_start(struct shard *shard, struct page_io *io, enum disk_op op, struct lane *lane, uint32_t number,
                     uint8_t *memory)
{
    struct page *page = page_of(lane, number);
    const uint32_t bytes = (uint32_t)frame_bytes_of(lane);
    *io = (struct page_io){.shard = shard, .lane = lane, .page = number, .extent = page->extent};
    io->checksum = op == DISK_READ ? page->checksum : extent_checksum(memory, bytes, page->extent);
    io->request = (struct disk_request){
        .op = op, .offset = extent_offset(page->extent), .memory = memory, .bytes = bytes, .done = io_done};
    io->request.urgent = op == DISK_READ && shard->tier.urgent;
    page->flags |= op == DISK_READ ? PAGE_READING : PAGE_WRITING;
    shard->tier.writes += op == DISK_WRITE;
    io->request.next = shard->tier.asked;
    shard->tier.asked = &io->request;
}

void tier_submit(struct shard *shard)
{
    struct disk_request *asked = shard->tier.asked;
    shard->tier.asked = NULL;
    if (asked)
        disk_submit(shard->server->disk, asked);
}

static void read_ended(struct page_io *io, struct page *page)
{
    struct shard *shard = io->shard;
    struct server *server = shard->server;
    page->flags &= (uint16_t)~PAGE_READING;
    if (io->request.result == 0 && io->matches) {
        page->memory = io->request.memory;
        order_enter(shard, io->lane, io->page); // as visited as those that asked for it have made it
        count_resident(io->lane, 1);
        atomic_fetch_add_explicit(&server->tier_stats.pages_read, 1, memory_order_relaxed);
        return;
    }
    pool_release(server->pool, io->request.memory);
    page->flags |= PAGE_LOST;
    if (atomic_fetch_add_explicit(&server->tier_stats.pages_lost, 1, memory_order_relaxed) == 0)
        log_error("a page of sequence %llu cannot be read back from the spill file: %s; requests that need it fail",
                  (unsigned long long)io->lane->stem->sequence_id,
                  io->request.result ? strerror(-io->request.result) : "its bytes are not those that were written");
}

static bool room_is_low(const struct server *server, uint32_t share)
{
    return pool_free_bytes(server->pool) < pool_capacity_bytes(server->pool) / share;
}

bool tier_is_short(const struct server *server)
{
    return room_is_low(server, HIGH_SHARE);
}

static uint64_t slab_of(const struct server *server, const uint8_t *memory)
{
    return pool_offset(server->pool, memory) / POOL_SLAB_BYTES;
}

static bool is_given_up(const struct server *server, const uint8_t *memory)
{
    const uint32_t slab = pool_given_up(server->pool);
    return slab != POOL_SLAB_NONE && slab == slab_of(server, memory);
}

static void write_ended(struct page_io *io, struct page *page)
{
    struct server *server = io->shard->server;
    const bool changed = page->flags & PAGE_CHANGED;
    page->flags &= (uint16_t) ~(PAGE_WRITING | PAGE_CHANGED);
    if (io->request.result) {
        io->lane->write_failed = true;
        if (atomic_fetch_add_explicit(&server->tier_stats.write_errors, 1, memory_order_relaxed) == 0)
            log_error("a page cannot be written to the spill file: %s; it stays in memory",
                      strerror(-io->request.result));
        return;
    }
    atomic_fetch_add_explicit(&server->tier_stats.pages_written, 1, memory_order_relaxed);
    if (changed)
        return;
    page->flags |= PAGE_CLEAN;
    page->checksum = io->checksum;
    if (is_given_up(server, page->memory) || (!page->visited && room_is_low(server, HIGH_SHARE))) {
        drop_memory(io->shard, io->lane, page);
        atomic_fetch_add_explicit(&server->tier_stats.pages_evicted, 1, memory_order_relaxed);
    }
}

static void io_end(struct page_io *io)
{
    struct shard *shard = io->shard;
    struct tier *tier = &shard->tier;
    tier->writes -= io->request.op == DISK_WRITE;
    if (!io->lane) {
        pool_release(shard->server->pool, io->request.memory);
        extents_release(shard->server->extents, &io->extent, 1);
    } else if (io->request.op == DISK_READ) {
        read_ended(io, page_of(io->lane, io->page));
    } else {
        write_ended(io, page_of(io->lane, io->page));
    }
    io_give(tier, io);
}

static void end_all(struct shard *shard)
{
    struct tier *tier = &shard->tier;
    pthread_mutex_lock(&tier->lock);
    struct page_io *io = tier->done;
    tier->done = NULL;
    pthread_mutex_unlock(&tier->lock);
    while (io) {
        struct page_io *next = io->next;
        io_end(io);
        io = next;
    }
}

static void run_done(struct task *task, void *thread)
{
    (void)task;
    end_all(thread);
    shard_wake(thread);
}

bool tier_read(struct shard *shard, struct lane *lane, uint32_t number)
{
    struct tier *tier = &shard->tier;
    struct page *page = page_of(lane, number);
    if (page->flags & PAGE_READING || page->memory)
        return true;
    if (page->flags & PAGE_WISHED) { // asked for sooner than it was brought
        page->flags &= (uint16_t)~PAGE_WISHED;
        atomic_fetch_add_explicit(&shard->server->tier_stats.hinted_late, 1, memory_order_relaxed);
    }
    assert(page->flags & PAGE_CLEAN);
    struct page_io *io = io_take(tier); // first: what makes room may write
    uint8_t *memory = io ? tier_take_memory(shard, frame_bytes_of(lane), NULL) : NULL;
    if (!memory) {
        if (io)
            io_give(tier, io);
        tier->starved = true;
        return false;
    }
    io_start(shard, io, DISK_READ, lane, number, memory);
    return true;
}

bool tier_write(struct shard *shard, struct lane *lane, uint32_t number)
{
    struct page *page = page_of(lane, number);
    assert(page->memory && !(page->flags & (PAGE_CLEAN | PAGE_WRITING)));
    if (page->extent == EXTENT_NONE)
        page->extent = extents_acquire(shard->server->extents, NULL, frame_bytes_of(lane));
    if (page->extent == EXTENT_NONE || shard->tier.writes >= TIER_WRITES_MAX)
        return false;
    struct page_io *io = io_take(&shard->tier);
    if (io)
        io_start(shard, io, DISK_WRITE, lane, number, page->memory);
    return io != NULL;
}

// ---- reading before anybody asks ----

void tier_early_used(struct lane *lane, struct page *page)
{
    end_bet(lane, page, true);
}

void tier_read_ahead(struct shard *shard, struct lane *lane, const uint32_t *pages, uint32_t count)
{
    struct server *server = shard->server;
    struct tier *tier = &shard->tier;
    if (!tier_serves(server) || !bets_pay(&tier->ahead))
        return;
    for (uint32_t i = 0; i < count && tier->in_flight < TIER_EARLY_MAX; i++) {
        struct page *page = page_of(lane, pages[i]);
        if (page->memory || page->flags & (PAGE_READING | PAGE_LOST))
            continue;
        if (!tier_read(shard, lane, pages[i]))
            return;
        page->flags |= PAGE_AHEAD;
        atomic_fetch_add_explicit(&server->tier_stats.ahead, 1, memory_order_relaxed);
    }
}

bool tier_hints_pay(struct lane *lane)
{
    return bets_pay(&lane->hints);
}

static void count_dropped(const struct shard *shard, uint32_t pages)
{
    atomic_fetch_add_explicit(&shard->server->tier_stats.hinted_dropped, pages, memory_order_relaxed);
}

bool tier_wish(struct shard *shard, struct lane *lane, uint32_t number)
{
    struct tier *tier = &shard->tier;
    struct page *page = page_of(lane, number);
    if (page->memory || page->flags & (PAGE_READING | PAGE_LOST | PAGE_WISHED))
        return false;
    if (tier->wish_count == TIER_WISHES_MAX) {
        count_dropped(shard, 1);
        return false;
    }
    page->flags |= PAGE_WISHED;
    tier->wishes[(tier->wish_first + tier->wish_count++) % TIER_WISHES_MAX] = (struct tier_wish){lane, number};
    return true;
}

// The next wish that still is one; NULL: none.
static struct page *next_wish(struct tier *tier, struct tier_wish *wish)
{
    while (tier->wish_count > 0) {
        *wish = tier->wishes[tier->wish_first];
        tier->wish_first = (tier->wish_first + 1) % TIER_WISHES_MAX;
        tier->wish_count--;
        struct page *page = wish->lane ? &wish->lane->pages[wish->page] : NULL;
        if (page && page->flags & PAGE_WISHED) {
            page->flags &= (uint16_t)~PAGE_WISHED;
            return page;
        }
    }
    return NULL;
}

void tier_grant(struct shard *shard)
{
    struct tier *tier = &shard->tier;
    struct tier_wish wish;
    struct page *page;
    while (tier->in_flight < TIER_EARLY_MAX && (page = next_wish(tier, &wish)) != NULL) {
        if (!tier_serves(shard->server) || !tier_read(shard, wish.lane, wish.page)) {
            count_dropped(shard, 1); // and not the rest in vain
            while (next_wish(tier, &wish))
                count_dropped(shard, 1);
            return;
        }
        page->flags |= PAGE_HINTED;
        atomic_fetch_add_explicit(&shard->server->tier_stats.hinted, 1, memory_order_relaxed);
    }
}

void tier_forget_wishes(struct shard *shard, const struct lane *lane)
{
    struct tier *tier = &shard->tier;
    for (uint32_t i = 0; i < tier->wish_count; i++) {
        struct tier_wish *wish = &tier->wishes[(tier->wish_first + i) % TIER_WISHES_MAX];
        if (wish->lane == lane)
            wish->lane = NULL;
    }
}

// ---- eviction ----

// What the hand does with a page. True where its memory is free now.
static bool evict(struct shard *shard, struct lane *lane, uint32_t number)
{
    struct page *page = page_of(lane, number);
    if (page->visited) {
        page->visited = 0;
        return false;
    }
    if (page->flags & PAGE_WRITING)
        return false;
    if (page->flags & PAGE_CLEAN) {
        drop_memory(shard, lane, page);
        atomic_fetch_add_explicit(&shard->server->tier_stats.pages_evicted, 1, memory_order_relaxed);
        return true;
    }
    tier_write(shard, lane, number);
    return false;
}

// Moves the hand until `wanted` frames are free or enough was looked at: one lap at most, so that what is used between
// two calls stays, however few pages the shard has. of_over: only pages of namespaces over their quota go, and fewer
// are looked at, because there is room. Returns how many.
static uint32_t sweep(struct shard *shard, uint32_t wanted, bool of_over)
{
    struct tier *tier = &shard->tier;
    const uint32_t limit = of_over ? TIER_SCAN_MAX / 8 : TIER_SCAN_MAX;
    const uint32_t most = tier->count < limit ? tier->count : limit;
    uint32_t freed = 0;
    for (uint32_t seen = 0; seen < most && freed < wanted; seen++) {
        const uint32_t number = tier->hand != TIER_NONE ? tier->hand : tier->oldest;
        if (number == TIER_NONE)
            break;
        const struct tier_book *book = &shard->server->books[number];
        tier->looked_at++;
        tier->hand = book->newer; // also where the page goes: then it is the one behind it
        if (!of_over || tenant_is_over_ram(book->lane->stem->tenant))
            freed += evict(shard, book->lane, book->page);
    }
    return freed;
}

// Pages of the shard that lie in the slab that frames of another size wait for leave it, used or not.
static void empty_slab(struct shard *shard)
{
    struct server *server = shard->server;
    const uint32_t slab = pool_given_up(server->pool), units = (uint32_t)(POOL_SLAB_BYTES / EXTENT_UNIT);
    for (uint32_t i = 0; slab != POOL_SLAB_NONE && i < units; i++) {
        struct tier_book *book = &server->books[slab * units + i];
        if (atomic_load_explicit(&book->owner, memory_order_relaxed) != shard->index + 1)
            continue;
        page_of(book->lane, book->page)->visited = 0;
        evict(shard, book->lane, book->page);
    }
}

// Other shards hold most of the pool: each sweeps its own pages.
static void ask_relief(struct server *server, const struct shard *asking)
{
    for (uint32_t i = 0; i < server->shard_count; i++) {
        struct shard *shard = &server->shards[i];
        if (shard != asking && !atomic_exchange_explicit(&shard->tier.relief_asked, true, memory_order_acq_rel))
            task_queue_push(&shard->queue, TASK_BULK, &shard->tier.relief_task);
    }
}

void tier_relieve(struct server *server)
{
    ask_relief(server, NULL);
}

static void run_relief(struct task *task, void *thread)
{
    (void)task;
    struct shard *shard = thread;
    atomic_store_explicit(&shard->tier.relief_asked, false, memory_order_release);
    empty_slab(shard);
    tier_balance(shard);
}

bool tier_balance(struct shard *shard)
{
    struct server *server = shard->server;
    struct tier *tier = &shard->tier;
    tier->looked_at = 0;
    tier->balances = tier_serves(server) && room_is_low(server, tier->balances ? HIGH_SHARE : LOW_SHARE);
    if (!tier->balances && tier_serves(server) && tenants_are_over_ram(&server->tenants))
        return sweep(shard, 64, true) > 0;
    return tier->balances && sweep(shard, 64, false) > 0;
}

uint8_t *tier_take_memory(struct shard *shard, uint64_t bytes, struct pool_reservation *promised)
{
    struct server *server = shard->server;
    uint8_t *memory = pool_acquire(server->pool, promised, bytes);
    if (memory || !tier_serves(server))
        return memory;
    for (int i = 0; i < 4 && !memory && shard->tier.looked_at < TIER_ROUND_MAX; i++) {
        if (sweep(shard, 8, false) > 0)
            memory = pool_acquire(server->pool, promised, bytes);
    }
    if (!memory) {
        pool_want(server->pool, bytes);
        empty_slab(shard);
        memory = pool_acquire(server->pool, promised, bytes);
    }
    if (!memory) {
        shard->tier.starved = true;
        ask_relief(server, shard);
    }
    return memory;
}

uint8_t *tier_take_frame(struct shard *shard, struct lane *lane, uint32_t number, struct pool_reservation *promised)
{
    struct page *page = page_of(lane, number);
    page->memory = tier_take_memory(shard, frame_bytes_of(lane), promised);
    if (page->memory) {
        order_enter(shard, lane, number);
        count_resident(lane, 1);
    }
    return page->memory;
}

// ---- pages that change or go ----

void tier_change(struct shard *shard, struct lane *lane, uint32_t number)
{
    struct page *page = page_of(lane, number);
    assert(page->memory);
    if (page->flags & PAGE_WRITING)
        page->flags |= PAGE_CHANGED;
    if (!(page->flags & PAGE_CLEAN))
        return;
    page->flags &= (uint16_t)~PAGE_CLEAN;
    // A sealed prefix may hold the extent too: what it holds stays as it is.
    page->extent = extents_own(shard->server->extents, page->extent, frame_bytes_of(lane));
}

// The page is on its way: what it has becomes its page_io's.
static void leave_to_io(struct shard *shard, struct lane *lane, uint32_t number)
{
    uint32_t i = 0;
    while (i < TIER_IO_MAX && !(shard->tier.ios[i].lane == lane && shard->tier.ios[i].page == number))
        i++;
    assert(i < TIER_IO_MAX); // a page on its way has a page_io
    shard->tier.ios[i].lane = NULL;
}

void tier_forget(struct shard *shard, struct lane *lane, uint32_t number)
{
    struct server *server = shard->server;
    struct page *page = page_of(lane, number);
    if (page->flags & (PAGE_READING | PAGE_WRITING)) {
        if (page->memory) {
            order_leave(shard, page->memory);
            count_resident(lane, -1);
        }
        leave_to_io(shard, lane, number);
    } else {
        if (page->memory)
            drop_memory(shard, lane, page);
        if (page->extent != EXTENT_NONE)
            extents_release(server->extents, &page->extent, 1);
    }
    lane->absent--;
    *page = (struct page){0};
}

// ---- start and end ----

static void free_tables(const struct tier *tier, struct env *env)
{
    env->release(env, tier->ios, TIER_IO_MAX * sizeof *tier->ios);
    env->release(env, tier->wishes, TIER_WISHES_MAX * sizeof *tier->wishes);
}

int tier_init(struct shard *shard)
{
    struct tier *tier = &shard->tier;
    struct env *env = shard->server->env;
    *tier = (struct tier){.oldest = TIER_NONE,
                          .newest = TIER_NONE,
                          .hand = TIER_NONE,
                          .done_task = {.run = run_done},
                          .relief_task = {.run = run_relief}};
    pthread_mutex_init(&tier->lock, NULL);
    if (!shard->server->disk)
        return 0;
    tier->ios = env_acquire_zeroed(env, TIER_IO_MAX * sizeof *tier->ios);
    tier->wishes = env->acquire(env, TIER_WISHES_MAX * sizeof *tier->wishes);
    if (!tier->ios || !tier->wishes) {
        free_tables(tier, env);
        pthread_mutex_destroy(&tier->lock);
        return -ENOMEM;
    }
    for (uint32_t i = 0; i < TIER_IO_MAX; i++) {
        tier->ios[i].next = tier->free_ios;
        tier->free_ios = &tier->ios[i];
    }
    return 0;
}

void tier_fini(struct shard *shard)
{
    struct tier *tier = &shard->tier;
    assert(!tier->asked);
    if (tier->ios)
        end_all(shard);
    free_tables(tier, shard->server->env);
    pthread_mutex_destroy(&tier->lock);
}
