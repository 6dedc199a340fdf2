// Shard threads. A shard's lanes, scratch and list of due lanes belong to its thread; the queue is the only way in.
//
// Clustering runs when the queue is empty, or has not been for SERVER_BUILD_AFTER tasks, one slice at a time, so a
// decode request waits for one slice at most and a lane for its clustering not for ever.
// The lane at the head of the due list is finished before the next begins, so that memory for a build in progress is
// held once; where it waits for pages, a few behind it go on meanwhile (fetching_max).
#include "cached/shard.h"

#include "cached/gather.h"
#include "cached/log.h"
#include "cached/server.h"

#include <errno.h>
#include <stdio.h>

#define IDLE_WAIT_NS        (1000000000u)
#define FETCHING_LANES_MAX  16u
#define FETCHING_LANE_BYTES (4u << 20) // of the pool, for each lane that waits for pages of its clustering

static void due_append(struct shard *shard, struct lane *lane)
{
    lane->due_next = NULL;
    lane->due_previous = shard->due_tail;
    if (shard->due_tail)
        shard->due_tail->due_next = lane;
    else
        shard->due_head = lane;
    shard->due_tail = lane;
}

static void due_remove(struct shard *shard, struct lane *lane)
{
    if (lane->due_previous)
        lane->due_previous->due_next = lane->due_next;
    else
        shard->due_head = lane->due_next;
    if (lane->due_next)
        lane->due_next->due_previous = lane->due_previous;
    else
        shard->due_tail = lane->due_previous;
}

void shard_lane_due(struct shard *shard, struct lane *lane)
{
    if (lane->due || lane->damaged || lane->anchor != lane->layer || !index_build_is_due(lane->index))
        return;
    lane->due = true;
    due_append(shard, lane);
    atomic_fetch_add_explicit(&lane->stem->lanes_due, 1, memory_order_relaxed);
}

void shard_commit_soon(struct shard *shard, struct lane *lane)
{
    if (!lane->due)
        return;
    due_remove(shard, lane);
    lane->due_previous = NULL;
    lane->due_next = shard->due_head;
    if (shard->due_head)
        shard->due_head->due_previous = lane;
    else
        shard->due_tail = lane;
    shard->due_head = lane;
    lane->fetching = shard->stalled = false;
    shard->tasks_since_slice = SERVER_BUILD_AFTER;
}

void shard_lane_forget(struct shard *shard, struct lane *lane)
{
    if (!lane->due)
        return;
    due_remove(shard, lane);
    lane->due = lane->fetching = false;
    atomic_fetch_sub_explicit(&lane->stem->lanes_due, 1, memory_order_relaxed);
}

void *shard_scratch(struct shard *shard, void **memory, size_t *held_bytes, size_t bytes)
{
    if (bytes <= *held_bytes)
        return *memory;
    struct env *env = shard->server->env;
    void *larger = env->acquire(env, bytes);
    if (!larger)
        return NULL;
    env->release(env, *memory, *held_bytes);
    *memory = larger;
    *held_bytes = bytes;
    return larger;
}

// How many lanes may wait for pages at one time: enough to keep the disk busy, few enough that what one fetches does
// not push out what another waits for.
static uint32_t fetching_max(const struct shard *shard)
{
    const struct server *server = shard->server;
    const uint64_t share = pool_capacity_bytes(server->pool) / server->shard_count / FETCHING_LANE_BYTES;
    return share < 1 ? 1 : share > FETCHING_LANES_MAX ? FETCHING_LANES_MAX : (uint32_t)share;
}

// The first lane with clustering to do that does not wait for pages. NULL: none, or enough of them wait.
static struct lane *first_ready(struct shard *shard)
{
    struct lane *lane = shard->due_head;
    for (uint32_t n = 0; lane && lane->fetching; lane = lane->due_next) {
        if (++n == fetching_max(shard))
            return NULL;
    }
    return lane;
}

// Pages have come: whoever has waited for some looks again, the first one first.
static void end_fetching(struct shard *shard)
{
    uint32_t n = 0;
    for (struct lane *lane = shard->due_head; lane && n < FETCHING_LANES_MAX; lane = lane->due_next, n++)
        lane->fetching = false;
}

static void stall(struct shard *shard, uint64_t until_ns)
{
    shard->stalled = true;
    shard->stalled_until_ns = until_ns;
}

static void build_slice(struct shard *shard)
{
    struct env *env = shard->server->env;
    struct lane *lane = first_ready(shard);
    shard->tasks_since_slice = 0;
    uint64_t from_ns = env_now_ns(env);
    if (!lane) {
        stall(shard, from_ns + SERVER_STARVED_RETRY_NS);
        return;
    }
    enum lane_work work = lane_build(lane, shard);
    uint64_t until_ns = env_now_ns(env);
    atomic_fetch_add_explicit(&lane->stem->build_ns, until_ns - from_ns, memory_order_relaxed);
    lane->fetching = work == LANE_FETCHES;
    if (work == LANE_IDLE) {
        shard_lane_forget(shard, lane);
    } else if (work == LANE_STALLED) {
        // Its tail stays searchable by scanning; try again when something may have been freed.
        due_remove(shard, lane);
        due_append(shard, lane);
        stall(shard, until_ns + SERVER_STALL_RETRY_NS);
    }
}

static bool can_build(struct shard *shard)
{
    if (!shard->due_head) {
        shard->stalled = false;
        return false;
    }
    if (!shard->stalled)
        return true;
    if (env_now_ns(shard->server->env) < shard->stalled_until_ns)
        return false;
    shard->stalled = false;
    end_fetching(shard);
    return true;
}

void shard_wake(struct shard *shard)
{
    shard->woken = true;
    shard->stalled = false;
    shard->images_due = true;
    end_fetching(shard);
}

void shard_look_again(struct shard *shard, uint64_t at_ns)
{
    shard->look_again_ns = at_ns < shard->look_again_ns ? at_ns : shard->look_again_ns;
}

// Where something found no room it looks again soon: other shards make some.
static void note_starved(struct shard *shard, uint64_t now_ns)
{
    if (shard->tier.starved)
        shard_look_again(shard, now_ns + SERVER_STARVED_RETRY_NS);
    shard->tier.starved = false;
}

static bool has_waiting(const struct shard *shard)
{
    return shard->gathers || shard->parked || shard->images.save.part;
}

// Goes on with what waits for pages or room, where something has changed or a deadline has passed.
static void go_on_with_waiting(struct shard *shard)
{
    if (!has_waiting(shard))
        return;
    const uint64_t now_ns = env_now_ns(shard->server->env);
    note_starved(shard, now_ns);
    // Also now and then: whose session has ended need not wait until his deadline.
    if (!shard->woken && now_ns < shard->look_again_ns && now_ns < shard->looked_ns + IDLE_WAIT_NS)
        return;
    shard->looked_ns = now_ns;
    shard->woken = false;
    shard->images_due = true;
    shard->look_again_ns = UINT64_MAX; // gathers that begin meanwhile may lower it again
    const uint64_t gathers_ns = gather_all(shard, now_ns), parked_ns = op_lane_run_parked(shard, now_ns);
    shard_look_again(shard, gathers_ns < parked_ns ? gathers_ns : parked_ns);
    note_starved(shard, now_ns);
}

static void go_on_with_images(struct shard *shard)
{
    if (!shard->images_due)
        return;
    shard->images_due = false; // what is set during the step stays set
    if (images_step(shard))
        shard->images_due = true;
}

static uint64_t wait_of(struct shard *shard, bool busy)
{
    if (busy || shard->images_due)
        return 0;
    if (!has_waiting(shard) && !shard->stalled)
        return IDLE_WAIT_NS;
    const uint64_t now_ns = env_now_ns(shard->server->env);
    uint64_t until_ns = now_ns + IDLE_WAIT_NS;
    if (has_waiting(shard) && shard->look_again_ns < until_ns)
        until_ns = shard->look_again_ns;
    if (shard->stalled && shard->stalled_until_ns < until_ns)
        until_ns = shard->stalled_until_ns;
    return until_ns > now_ns ? until_ns - now_ns : 1;
}

bool shard_round(struct shard *shard, bool may_wait)
{
    bool stopped;
    bool build = can_build(shard);
    go_on_with_waiting(shard); // first: what has come must not be pushed out again
    bool sweeps = tier_balance(shard);
    go_on_with_images(shard);
    tier_grant(shard);
    tier_submit(shard);
    if (build && shard->tasks_since_slice >= SERVER_BUILD_AFTER) {
        build_slice(shard);
        return true;
    }
    const uint64_t wait_ns = may_wait ? wait_of(shard, build || sweeps) : 0;
    struct task *task = task_queue_pop(&shard->queue, wait_ns, &stopped);
    shard->tasks_since_slice += build && task;
    if (task)
        task->run(task, shard);
    else if (!stopped && build)
        build_slice(shard);
    return task || !stopped;
}

static void *shard_main(void *argument)
{
    while (shard_round(argument, true))
        ;
    return NULL;
}

static void *scratch_acquire(void *owner, size_t bytes)
{
    struct env *env = owner;
    return env->acquire(env, bytes);
}

static void scratch_release(void *owner, void *memory, size_t bytes)
{
    struct env *env = owner;
    env->release(env, memory, bytes);
}

// Room for another search while one is cut. False: as many are as may be, or there is no memory.
static bool take_spare(struct shard *shard, struct search_room *room)
{
    const struct index_allocator allocator = {scratch_acquire, scratch_release, shard->server->env};
    *room = (struct search_room){0};
    if (shard->spare_count > 0)
        *room = shard->spare[--shard->spare_count];
    else if (shard->spare_made < SHARD_SEARCHES_CUT_MAX && index_search_create(&allocator, &room->search) == INDEX_OK)
        shard->spare_made++;
    return room->search != NULL;
}

bool shard_search_cut(struct shard *shard, struct op_lane *part)
{
    struct search_room spare;
    if (!take_spare(shard, &spare))
        return false;
    part->cut = shard->now;
    part->cut_ns = env_now_ns(shard->server->env);
    op_lane_hold_cut(part);
    shard->now = spare;
    return true;
}

void shard_search_resume(struct shard *shard, struct op_lane *part)
{
    shard->spare[shard->spare_count++] = shard->now;
    shard->now = part->cut;
    part->cut = (struct search_room){0};
    part->begun_ns += env_now_ns(shard->server->env) - part->cut_ns; // it has waited for its turn
    op_lane_release_cut(part, shard);
    shard->stalled = false; // a plan may have waited
}

static void free_room(struct env *env, struct search_room *room)
{
    index_search_destroy(room->search);
    env->release(env, room->queries, room->queries_bytes);
}

int shard_init(struct server *server, struct shard *shard, uint32_t index)
{
    *shard = (struct shard){.server = server, .index = index, .look_again_ns = UINT64_MAX};
    int error = tier_init(shard);
    if (error)
        return error;
    error = images_init(shard);
    if (error) {
        tier_fini(shard);
        return error;
    }
    task_queue_init(&shard->queue);
    arena_init(&shard->arena, server->env);
    const struct index_allocator allocator = {scratch_acquire, scratch_release, server->env};
    if (index_search_create(&allocator, &shard->now.search) != INDEX_OK) {
        shard_fini(shard);
        return -ENOMEM;
    }
    return 0;
}

int shard_start(struct server *server, struct shard *shard, uint32_t index)
{
    int error = shard_init(server, shard, index);
    if (error)
        return error;
    error = pthread_create(&shard->thread, NULL, shard_main, shard);
    if (error) {
        shard_fini(shard);
        return -error;
    }
    char name[16];
    snprintf(name, sizeof name, "shard-%u", index % 1000u);
    pthread_setname_np(shard->thread, name);
    return 0;
}

void shard_stop(struct shard *shard)
{
    task_queue_stop(&shard->queue);
    pthread_join(shard->thread, NULL);
}

void shard_fini(struct shard *shard)
{
    struct env *env = shard->server->env;
    tier_fini(shard);
    images_fini(shard);
    free_room(env, &shard->now);
    while (shard->spare_count > 0)
        free_room(env, &shard->spare[--shard->spare_count]);
    env->release(env, shard->record, shard->record_bytes);
    env->release(env, shard->followed, shard->followed_bytes);
    env->release(env, shard->kept, shard->kept_bytes);
    env->release(env, shard->places, shard->places_bytes);
    arena_fini(&shard->arena);
    task_queue_fini(&shard->queue);
}
