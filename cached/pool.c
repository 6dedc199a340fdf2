// The page pool. Invariants, under the lock: every slab is either in the arena's free list or belongs to one class;
// sum over classes of the slabs that their promises would still need <= free slabs, so a promised frame is always
// there. A slab that is given up (pool_want) belongs to its class, but its free frames are in no count and no list.
// Free frames of a slab are linked through their own first bytes; fresh ones are counted by a bump index.
//
// Growth: acquire and release are O(1) plus a pass over the classes in use (at most 64, usually 1) where promises
// exist.
#include "cached/pool.h"

#include <assert.h>
#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <string.h>

#define NO_SLAB   POOL_SLAB_NONE
#define NO_CLASS  UINT32_MAX
#define LOOKED_AT 1024u // slabs, for one to give up
#define WANTS_MAX 4096u // calls after which another slab is tried: a frame does not leave

struct slab {
    uint32_t class_index;
    uint32_t used;           // frames handed out
    uint32_t fresh;          // frames never handed out start here
    uint32_t previous, next; // list of the class's slabs with free frames, or the arena's free list (next only)
    void *free_frames;
    uint64_t since_ns; // with its class
};

struct class
{
    uint64_t frame_bytes;
    uint32_t frames_per_slab;
    uint32_t partial; // first slab with free frames
    uint64_t slabs;
    uint64_t free_frames; // in this class's slabs
    uint64_t promised;
};

struct pool {
    struct env *env; // immutable, as the next two
    struct pool_regions regions;
    struct slab *slabs;
    pthread_mutex_t lock;
    uint32_t free_slab, free_slabs; // guarded by lock, as all below
    uint32_t class_count;
    struct class classes[POOL_CLASSES_MAX];
    _Atomic uint64_t used_bytes; // also read without the lock
    uint64_t used_frames;
    // A slab on its way from one class to another. Its free frames count for no class.
    _Atomic uint32_t given_up; // also read without the lock
    uint32_t wanted_by, wants; // class
    uint32_t cursor;           // slabs before it were looked at last
    uint32_t kept_for;         // class that one of the free slabs is kept for, until
    uint64_t kept_until_ns;
};

int pool_create(struct env *env, const struct pool_regions *regions, struct pool **out)
{
    const uint32_t count = regions->slab_count;
    struct pool *pool = env_acquire_zeroed(env, sizeof *pool);
    struct slab *slabs = env_acquire_zeroed(env, count * sizeof *slabs);
    if (!pool || !slabs) {
        env->release(env, slabs, count * sizeof *slabs);
        env->release(env, pool, sizeof *pool);
        return -ENOMEM;
    }
    pool->env = env;
    pool->regions = *regions;
    pool->slabs = slabs;
    pool->free_slabs = count;
    pool->given_up = NO_SLAB;
    pool->wanted_by = pool->kept_for = NO_CLASS;
    for (uint32_t i = 0; i < count; i++)
        slabs[i].next = i + 1 < count ? i + 1 : NO_SLAB;
    pthread_mutex_init(&pool->lock, NULL);
    *out = pool;
    return 0;
}

void pool_destroy(struct pool *pool)
{
    if (!pool)
        return;
    struct env *env = pool->env;
    assert(pool->used_frames == 0);
    env->release(env, pool->slabs, pool->regions.slab_count * sizeof *pool->slabs);
    pool_regions_unmap(env, &pool->regions);
    pthread_mutex_destroy(&pool->lock);
    env->release(env, pool, sizeof *pool);
}

static struct class *class_of(struct pool *pool, uint64_t frame_bytes)
{
    struct class *unused = NULL;
    for (uint32_t i = 0; i < pool->class_count; i++) {
        struct class *class = &pool->classes[i];
        if (class->frame_bytes == frame_bytes)
            return class;
        if (class->slabs == 0 && class->promised == 0 && i != pool->wanted_by && i != pool->kept_for)
            unused = class;
    }
    if (!unused && pool->class_count < POOL_CLASSES_MAX)
        unused = &pool->classes[pool->class_count++];
    if (unused)
        *unused = (struct class){
            .frame_bytes = frame_bytes,
            .frames_per_slab = (uint32_t)(POOL_SLAB_BYTES / frame_bytes),
            .partial = NO_SLAB,
        };
    return unused;
}

// Slabs that the promises of a class need beyond the free frames it has.
static uint64_t slabs_promised_by(const struct class *class)
{
    if (class->promised <= class->free_frames)
        return 0;
    return (class->promised - class->free_frames + class->frames_per_slab - 1) / class->frames_per_slab;
}

static uint64_t slabs_promised(const struct pool *pool)
{
    uint64_t sum = 0;
    for (uint32_t i = 0; i < pool->class_count; i++)
        sum += slabs_promised_by(&pool->classes[i]);
    return sum;
}

bool pool_reserve(struct pool *pool, struct pool_reservation *reservation, uint64_t frame_bytes, uint64_t frames)
{
    assert(frame_bytes >= sizeof(void *) && frame_bytes <= POOL_SLAB_BYTES);
    pthread_mutex_lock(&pool->lock);
    struct class *class = class_of(pool, frame_bytes);
    bool fits = class != NULL;
    if (class) {
        uint64_t before = class->promised;
        class->promised = before - reservation->rest_frames + frames;
        fits = slabs_promised(pool) <= pool->free_slabs;
        if (fits)
            reservation->rest_frames = frames;
        else
            class->promised = before;
    }
    pthread_mutex_unlock(&pool->lock);
    return fits;
}

void pool_unreserve(struct pool *pool, struct pool_reservation *reservation, uint64_t frame_bytes)
{
    pthread_mutex_lock(&pool->lock);
    if (reservation->rest_frames > 0) {
        class_of(pool, frame_bytes)->promised -= reservation->rest_frames;
        reservation->rest_frames = 0;
    }
    pthread_mutex_unlock(&pool->lock);
}

static void partial_push(struct pool *pool, struct class *class, uint32_t index)
{
    struct slab *slab = &pool->slabs[index];
    slab->previous = NO_SLAB;
    slab->next = class->partial;
    if (class->partial != NO_SLAB)
        pool->slabs[class->partial].previous = index;
    class->partial = index;
}

static void partial_remove(struct pool *pool, struct class *class, uint32_t index)
{
    struct slab *slab = &pool->slabs[index];
    if (slab->previous != NO_SLAB)
        pool->slabs[slab->previous].next = slab->next;
    else
        class->partial = slab->next;
    if (slab->next != NO_SLAB)
        pool->slabs[slab->next].previous = slab->previous;
}

static void slab_add(struct pool *pool, struct class *class)
{
    uint32_t index = pool->free_slab;
    struct slab *slab = &pool->slabs[index];
    pool->free_slab = slab->next;
    pool->free_slabs--;
    *slab = (struct slab){.class_index = (uint32_t)(class - pool->classes), .since_ns = env_now_ns(pool->env)};
    class->slabs++;
    class->free_frames += class->frames_per_slab;
    partial_push(pool, class, index);
}

// May somebody without a promise take a free slab for the class?
static bool may_add_slab(const struct pool *pool, const struct class *class)
{
    const bool kept = pool->kept_for != NO_CLASS && class != &pool->classes[pool->kept_for];
    return pool->free_slabs > slabs_promised(pool) + kept;
}

static void *frame_take(struct pool *pool, struct class *class)
{
    uint32_t index = class->partial;
    struct slab *slab = &pool->slabs[index];
    void *frame = slab->free_frames;
    if (frame)
        memcpy(&slab->free_frames, frame, sizeof frame);
    else
        frame = (uint8_t *)pool_regions_slab(&pool->regions, index) + slab->fresh++ * class->frame_bytes;
    if (++slab->used == class->frames_per_slab)
        partial_remove(pool, class, index);
    class->free_frames--;
    pool->used_frames++;
    atomic_fetch_add_explicit(&pool->used_bytes, class->frame_bytes, memory_order_relaxed);
    return frame;
}

void *pool_acquire(struct pool *pool, struct pool_reservation *reservation, uint64_t frame_bytes)
{
    void *frame = NULL;
    pthread_mutex_lock(&pool->lock);
    struct class *class = class_of(pool, frame_bytes);
    bool promised = class && reservation && reservation->rest_frames > 0;
    bool allowed = class && (promised || class->free_frames > class->promised || may_add_slab(pool, class));
    if (allowed) {
        if (class->free_frames == 0 || (!promised && class->free_frames <= class->promised))
            slab_add(pool, class);
        if (pool->kept_for == class - pool->classes)
            pool->kept_for = NO_CLASS;
        frame = frame_take(pool, class);
        if (promised) {
            reservation->rest_frames--;
            class->promised--;
        }
    }
    pthread_mutex_unlock(&pool->lock);
    return frame;
}

// The last frame of a slab that was given up has come back: it is a free one, for those who want it.
static void give_up_ended(struct pool *pool)
{
    pool->kept_for = pool->wanted_by;
    pool->kept_until_ns = env_now_ns(pool->env) + POOL_KEEP_NS;
    pool->wanted_by = NO_CLASS;
    atomic_store_explicit(&pool->given_up, NO_SLAB, memory_order_relaxed);
}

void pool_release(struct pool *pool, void *frame)
{
    pthread_mutex_lock(&pool->lock);
    uint32_t index = pool_regions_find(&pool->regions, frame);
    assert(index < pool->regions.slab_count);
    struct slab *slab = &pool->slabs[index];
    struct class *class = &pool->classes[slab->class_index];
    assert(slab->used > 0);
    const bool given_up = index == pool->given_up;
    if (slab->used == class->frames_per_slab && !given_up)
        partial_push(pool, class, index);
    memcpy(frame, &slab->free_frames, sizeof frame);
    slab->free_frames = frame;
    class->free_frames += !given_up;
    pool->used_frames--;
    atomic_fetch_sub_explicit(&pool->used_bytes, class->frame_bytes, memory_order_relaxed);
    if (--slab->used == 0 && !given_up) {
        partial_remove(pool, class, index);
        class->free_frames -= class->frames_per_slab;
    }
    if (slab->used == 0) {
        class->slabs--;
        slab->next = pool->free_slab;
        pool->free_slab = index;
        pool->free_slabs++;
        if (given_up)
            give_up_ended(pool);
    }
    pthread_mutex_unlock(&pool->lock);
}

// ---- from one size to another ----

// The slab with the fewest frames in use of those that are looked at, which another class can do without and has had
// for a while: two sizes that are both in need get on by turns.
static uint32_t slab_to_give_up(struct pool *pool, const struct class *wanted, uint64_t now_ns)
{
    const uint32_t count = pool->regions.slab_count;
    uint32_t best = NO_SLAB;
    for (uint32_t i = 0; i < count && i < LOOKED_AT; i++) {
        const uint32_t index = pool->cursor;
        const struct slab *slab = &pool->slabs[index];
        pool->cursor = index + 1 < count ? index + 1 : 0;
        if (slab->used == 0 || slab->class_index == (uint32_t)(wanted - pool->classes) ||
            now_ns < slab->since_ns + POOL_KEEP_NS)
            continue; // free slabs have no frames in use
        const struct class *class = &pool->classes[slab->class_index];
        const bool spared = class->free_frames - (class->frames_per_slab - slab->used) >= class->promised;
        if (spared && (best == NO_SLAB || slab->used < pool->slabs[best].used))
            best = index;
    }
    return best;
}

static void give_up(struct pool *pool, uint32_t index, const struct class *wanted)
{
    struct slab *slab = &pool->slabs[index];
    struct class *class = &pool->classes[slab->class_index];
    if (slab->used < class->frames_per_slab)
        partial_remove(pool, class, index);
    class->free_frames -= class->frames_per_slab - slab->used;
    pool->wanted_by = (uint32_t)(wanted - pool->classes);
    pool->wants = 0;
    atomic_store_explicit(&pool->given_up, index, memory_order_relaxed);
}

// It stays what it was.
static void take_back(struct pool *pool)
{
    struct slab *slab = &pool->slabs[pool->given_up];
    struct class *class = &pool->classes[slab->class_index];
    class->free_frames += class->frames_per_slab - slab->used;
    if (slab->used < class->frames_per_slab)
        partial_push(pool, class, pool->given_up);
    pool->wanted_by = NO_CLASS;
    atomic_store_explicit(&pool->given_up, NO_SLAB, memory_order_relaxed);
}

void pool_want(struct pool *pool, uint64_t frame_bytes)
{
    const uint64_t now_ns = env_now_ns(pool->env);
    pthread_mutex_lock(&pool->lock);
    const struct class *class = class_of(pool, frame_bytes);
    if (pool->kept_for != NO_CLASS && now_ns >= pool->kept_until_ns)
        pool->kept_for = NO_CLASS; // nobody came for it
    if (pool->given_up != NO_SLAB && ++pool->wants > WANTS_MAX)
        take_back(pool);
    const bool waits = class && class->free_frames <= class->promised && !may_add_slab(pool, class);
    if (waits && pool->given_up == NO_SLAB && pool->kept_for == NO_CLASS) {
        const uint32_t index = slab_to_give_up(pool, class, now_ns);
        if (index != NO_SLAB)
            give_up(pool, index, class);
    }
    pthread_mutex_unlock(&pool->lock);
}

uint32_t pool_given_up(struct pool *pool)
{
    return atomic_load_explicit(&pool->given_up, memory_order_relaxed);
}

uint64_t pool_capacity_bytes(const struct pool *pool)
{
    return pool->regions.slab_count * POOL_SLAB_BYTES;
}

uint64_t pool_free_bytes(struct pool *pool)
{
    return pool_capacity_bytes(pool) - atomic_load_explicit(&pool->used_bytes, memory_order_relaxed);
}

uint64_t pool_offset(const struct pool *pool, const void *frame)
{
    const uint32_t slab = pool_regions_find(&pool->regions, frame);
    const uint8_t *base = pool_regions_slab(&pool->regions, slab);
    return slab * POOL_SLAB_BYTES + (uint64_t)((const uint8_t *)frame - base);
}

void pool_usage(struct pool *pool, struct pool_usage *out)
{
    pthread_mutex_lock(&pool->lock);
    *out = (struct pool_usage){
        .capacity_bytes = pool->regions.slab_count * POOL_SLAB_BYTES,
        .used_bytes = pool->used_bytes,
        .used_frames = pool->used_frames,
        .kind = pool_regions_kind(&pool->regions),
        .huge_bytes = pool_regions_huge_bytes(&pool->regions),
    };
    pthread_mutex_unlock(&pool->lock);
}

const char *pool_huge_name(enum env_huge kind)
{
    static const char *const names[] = {"hugetlb-1g", "hugetlb-2m", "transparent", "collapsed", "none"};
    return names[kind];
}
