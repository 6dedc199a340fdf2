// The data file's allocator, in the manner of the pool (pool.c), but with the books beside the room, which is on a
// disk. Invariants, under the lock: every slab is either in the list of free slabs or belongs to one class; the slabs
// that the classes' promises would still need are free, and each class has spare books for its own; a slab has a book
// exactly while one of its extents is held; an extent is free in its book's map exactly while its count is 0.
//
// A slab's book is taken when its first extent is, so that memory follows what is used: 64 bytes a slab and 2 an
// extent. One book more than promised is kept in each class, so that an extent that comes and goes takes no memory
// each time.
//
// Growth: acquire and release are O(1) (a map is 8 words), plus a pass over the classes (at most 64, usually 2) where a
// slab is taken.
#include "cached/extents.h"

#define XXH_INLINE_ALL
#include <xxhash.h>

#include <assert.h>
#include <errno.h>
#include <pthread.h>
#include <string.h>

#define NO_SLAB    UINT32_MAX
#define SLAB_UNITS ((uint32_t)(EXTENTS_SLAB_BYTES / EXTENT_UNIT))
#define MAP_WORDS  (SLAB_UNITS / 64)

static_assert(EXTENTS_BYTES_MAX / EXTENT_UNIT < EXTENT_NONE, "every extent has a number that is not EXTENT_NONE");

struct book {
    uint64_t free[MAP_WORDS]; // a bit for each free extent; spare: the first word is the next spare's address
    uint16_t holds[];
};

struct slab {
    struct book *book;       // NULL: a free slab
    uint32_t previous, next; // in the list of free slabs, or of its class's slabs with free extents
    uint16_t used;           // extents held
    uint8_t class_index;
};

struct class
{
    uint32_t units;    // of an extent
    uint32_t per_slab; // extents
    uint32_t partial;  // first slab with free extents
    uint64_t slabs;
    uint64_t free; // extents, in this class's slabs
    uint64_t promised;
    struct book *spares;
    uint64_t spare_count;
};

struct extents {
    struct env *env; // immutable, as the next two
    struct slab *slabs;
    uint32_t slab_count;
    pthread_mutex_t lock;
    uint32_t free_slab, free_slabs; // guarded by lock, as all below
    uint32_t class_count;
    struct class classes[EXTENTS_CLASSES_MAX];
    uint64_t used_bytes, used_extents;
};

// ---- lists of slabs ----

static void list_push(struct extents *extents, uint32_t *head, uint32_t index)
{
    struct slab *slab = &extents->slabs[index];
    slab->previous = NO_SLAB;
    slab->next = *head;
    if (*head != NO_SLAB)
        extents->slabs[*head].previous = index;
    *head = index;
}

static void list_remove(struct extents *extents, uint32_t *head, uint32_t index)
{
    struct slab *slab = &extents->slabs[index];
    if (slab->previous != NO_SLAB)
        extents->slabs[slab->previous].next = slab->next;
    else
        *head = slab->next;
    if (slab->next != NO_SLAB)
        extents->slabs[slab->next].previous = slab->previous;
}

// ---- books ----

static size_t book_bytes(const struct class *class)
{
    return sizeof(struct book) + class->per_slab * sizeof(uint16_t);
}

static bool spare_add(struct extents *extents, struct class *class)
{
    struct book *book = extents->env->acquire(extents->env, book_bytes(class));
    if (!book)
        return false;
    memcpy(book->free, &class->spares, sizeof class->spares);
    class->spares = book;
    class->spare_count++;
    return true;
}

static struct book *spare_take(struct class *class)
{
    struct book *book = class->spares;
    memcpy(&class->spares, book->free, sizeof class->spares);
    class->spare_count--;
    return book;
}

static void spares_trim(struct extents *extents, struct class *class, uint64_t keep)
{
    while (class->spare_count > keep)
        extents->env->release(extents->env, spare_take(class), book_bytes(class));
}

// ---- create and destroy ----

int extents_create(struct env *env, uint64_t capacity_bytes, struct extents **out)
{
    uint64_t slab_count = capacity_bytes / EXTENTS_SLAB_BYTES;
    if (slab_count == 0)
        return -EINVAL;
    if (slab_count > EXTENTS_BYTES_MAX / EXTENTS_SLAB_BYTES)
        return -EFBIG;
    struct extents *extents = env_acquire_zeroed(env, sizeof *extents);
    struct slab *slabs = env_acquire_zeroed(env, slab_count * sizeof *slabs);
    if (!extents || !slabs) {
        env->release(env, slabs, slab_count * sizeof *slabs);
        env->release(env, extents, sizeof *extents);
        return -ENOMEM;
    }
    extents->env = env;
    extents->slabs = slabs;
    extents->slab_count = extents->free_slabs = (uint32_t)slab_count;
    extents->free_slab = NO_SLAB;
    for (uint32_t i = extents->slab_count; i-- > 0;)
        list_push(extents, &extents->free_slab, i);
    pthread_mutex_init(&extents->lock, NULL);
    *out = extents;
    return 0;
}

void extents_destroy(struct extents *extents)
{
    if (!extents)
        return;
    struct env *env = extents->env;
    for (uint32_t i = 0; i < extents->slab_count; i++) {
        struct slab *slab = &extents->slabs[i];
        env->release(env, slab->book, slab->book ? book_bytes(&extents->classes[slab->class_index]) : 0);
    }
    for (uint32_t i = 0; i < extents->class_count; i++)
        spares_trim(extents, &extents->classes[i], 0);
    pthread_mutex_destroy(&extents->lock);
    env->release(env, extents->slabs, extents->slab_count * sizeof *extents->slabs);
    env->release(env, extents, sizeof *extents);
}

// ---- classes and promises ----

// NULL where the size is none, or nobody gives up one of the classes for it.
static struct class *class_of(struct extents *extents, uint64_t bytes)
{
    if (bytes == 0 || bytes > EXTENTS_SLAB_BYTES)
        return NULL;
    uint32_t units = (uint32_t)((bytes + EXTENT_UNIT - 1) / EXTENT_UNIT);
    struct class *unused = NULL;
    for (uint32_t i = 0; i < extents->class_count; i++) {
        struct class *class = &extents->classes[i];
        if (class->units == units)
            return class;
        if (class->slabs == 0 && class->promised == 0)
            unused = class;
    }
    if (unused)
        spares_trim(extents, unused, 0);
    else if (extents->class_count < EXTENTS_CLASSES_MAX)
        unused = &extents->classes[extents->class_count++];
    if (unused)
        *unused = (struct class){.units = units, .per_slab = SLAB_UNITS / units, .partial = NO_SLAB};
    return unused;
}

// Slabs that the promises of a class need beyond the free extents it has.
static uint64_t slabs_promised_by(const struct class *class)
{
    if (class->promised <= class->free)
        return 0;
    return (class->promised - class->free + class->per_slab - 1) / class->per_slab;
}

static uint64_t slabs_promised(const struct extents *extents)
{
    uint64_t sum = 0;
    for (uint32_t i = 0; i < extents->class_count; i++)
        sum += slabs_promised_by(&extents->classes[i]);
    return sum;
}

// May somebody without a promise have an extent of the class, of a free slab or of those it has? Takes the memory for
// the books of what is promised afterwards.
static bool can_take(struct extents *extents, struct class *class, bool of_free_slab)
{
    if (of_free_slab ? extents->free_slabs == 0 : class->free == 0)
        return false;
    uint64_t before = class->free;
    class->free = before + (of_free_slab ? class->per_slab : 0) - 1;
    uint64_t books = slabs_promised_by(class) + of_free_slab;
    bool fits = slabs_promised(extents) + of_free_slab <= extents->free_slabs;
    class->free = before;
    while (fits && class->spare_count < books)
        fits = spare_add(extents, class);
    return fits;
}

uint64_t extents_reserve(struct extents *extents, struct extents_reservation *reservation, uint64_t bytes,
                         uint64_t count)
{
    uint64_t granted = 0;
    pthread_mutex_lock(&extents->lock);
    struct class *class = class_of(extents, bytes);
    if (class) {
        class->promised -= reservation->rest;
        uint64_t slabs = slabs_promised_by(class) + extents->free_slabs - slabs_promised(extents);
        uint64_t most = class->free + slabs * class->per_slab - class->promised;
        granted = count < most ? count : most;
        class->promised += granted;
        while (class->spare_count < slabs_promised_by(class) && spare_add(extents, class))
            ;
        if (class->spare_count < slabs_promised_by(class)) { // no memory: what the books at hand allow
            uint64_t lacking = class->promised - class->free - class->spare_count * class->per_slab;
            lacking = lacking < granted ? lacking : granted;
            granted -= lacking;
            class->promised -= lacking;
        }
        spares_trim(extents, class, slabs_promised_by(class) + 1);
        reservation->rest = granted;
    }
    pthread_mutex_unlock(&extents->lock);
    return granted;
}

void extents_unreserve(struct extents *extents, struct extents_reservation *reservation, uint64_t bytes)
{
    pthread_mutex_lock(&extents->lock);
    if (reservation->rest > 0) {
        struct class *class = class_of(extents, bytes);
        assert(class && class->promised >= reservation->rest);
        class->promised -= reservation->rest;
        reservation->rest = 0;
        spares_trim(extents, class, slabs_promised_by(class) + 1);
    }
    pthread_mutex_unlock(&extents->lock);
}

// ---- slabs and extents ----

static void slab_add(struct extents *extents, struct class *class, uint32_t index)
{
    assert(class->spare_count > 0);
    list_remove(extents, &extents->free_slab, index);
    extents->free_slabs--;
    struct book *book = spare_take(class);
    memset(book, 0, book_bytes(class));
    for (uint32_t i = 0; i < class->per_slab; i++)
        book->free[i / 64] |= UINT64_C(1) << i % 64;
    extents->slabs[index] = (struct slab){.book = book, .class_index = (uint8_t)(class - extents->classes)};
    class->slabs++;
    class->free += class->per_slab;
    list_push(extents, &class->partial, index);
}

static uint32_t first_free(const struct book *book)
{
    uint32_t word = 0;
    while (book->free[word] == 0)
        word++;
    return word * 64 + (uint32_t)__builtin_ctzll(book->free[word]);
}

static uint32_t extent_take(struct extents *extents, struct class *class, uint32_t index, uint32_t place)
{
    struct slab *slab = &extents->slabs[index];
    slab->book->free[place / 64] &= ~(UINT64_C(1) << place % 64);
    slab->book->holds[place] = 1;
    if (++slab->used == class->per_slab)
        list_remove(extents, &class->partial, index);
    class->free--;
    extents->used_extents++;
    extents->used_bytes += (uint64_t) class->units * EXTENT_UNIT;
    return index * SLAB_UNITS + place * class->units;
}

// With the lock.
static uint32_t acquire(struct extents *extents, struct extents_reservation *reservation, uint64_t bytes)
{
    struct class *class = class_of(extents, bytes);
    const bool promised = class && reservation && reservation->rest > 0;
    if (!class || (!promised && !can_take(extents, class, class->free == 0)))
        return EXTENT_NONE;
    if (class->free == 0)
        slab_add(extents, class, extents->free_slab);
    if (promised) {
        reservation->rest--;
        class->promised--;
    }
    return extent_take(extents, class, class->partial, first_free(extents->slabs[class->partial].book));
}

uint32_t extents_acquire(struct extents *extents, struct extents_reservation *reservation, uint64_t bytes)
{
    pthread_mutex_lock(&extents->lock);
    const uint32_t extent = acquire(extents, reservation, bytes);
    pthread_mutex_unlock(&extents->lock);
    return extent;
}

// The slab and the place in it of an extent that is held: anything else is a fault of ours.
static struct slab *slab_of(struct extents *extents, uint32_t extent, uint32_t *place)
{
    uint32_t index = extent / SLAB_UNITS;
    assert(index < extents->slab_count);
    struct slab *slab = &extents->slabs[index];
    assert(slab->book);
    const struct class *class = &extents->classes[slab->class_index];
    *place = extent % SLAB_UNITS / class->units;
    assert(extent % SLAB_UNITS % class->units == 0 && *place < class->per_slab && slab->book->holds[*place] > 0);
    return slab;
}

void extents_hold(struct extents *extents, const uint32_t *list, size_t count)
{
    pthread_mutex_lock(&extents->lock);
    for (size_t i = 0; i < count; i++) {
        if (list[i] == EXTENT_NONE)
            continue;
        uint32_t place = 0;
        uint16_t *holds = slab_of(extents, list[i], &place)->book->holds;
        if (holds[place] < EXTENT_HOLDS_MAX)
            holds[place]++;
    }
    pthread_mutex_unlock(&extents->lock);
}

static void slab_return(struct extents *extents, struct class *class, uint32_t index)
{
    struct slab *slab = &extents->slabs[index];
    list_remove(extents, &class->partial, index);
    class->free -= class->per_slab;
    class->slabs--;
    memcpy(slab->book->free, &class->spares, sizeof class->spares);
    class->spares = slab->book;
    class->spare_count++;
    spares_trim(extents, class, slabs_promised_by(class) + 1);
    slab->book = NULL;
    list_push(extents, &extents->free_slab, index);
    extents->free_slabs++;
}

static void extent_release(struct extents *extents, uint32_t extent)
{
    uint32_t place = 0;
    struct slab *slab = slab_of(extents, extent, &place);
    struct class *class = &extents->classes[slab->class_index];
    // Who holds an extent that was held too often is not known any more.
    if (slab->book->holds[place] == EXTENT_HOLDS_MAX || --slab->book->holds[place] > 0)
        return;
    slab->book->free[place / 64] |= UINT64_C(1) << place % 64;
    if (slab->used == class->per_slab)
        list_push(extents, &class->partial, extent / SLAB_UNITS);
    class->free++;
    extents->used_extents--;
    extents->used_bytes -= (uint64_t) class->units * EXTENT_UNIT;
    if (--slab->used == 0)
        slab_return(extents, class, extent / SLAB_UNITS);
}

void extents_release(struct extents *extents, const uint32_t *list, size_t count)
{
    pthread_mutex_lock(&extents->lock);
    for (size_t i = 0; i < count; i++)
        if (list[i] != EXTENT_NONE)
            extent_release(extents, list[i]);
    pthread_mutex_unlock(&extents->lock);
}

uint32_t extents_own(struct extents *extents, uint32_t extent, uint64_t bytes)
{
    uint32_t place = 0, own = extent;
    pthread_mutex_lock(&extents->lock);
    if (slab_of(extents, extent, &place)->book->holds[place] > 1) {
        own = acquire(extents, NULL, bytes);
        extent_release(extents, extent);
    }
    pthread_mutex_unlock(&extents->lock);
    return own;
}

static bool claim(struct extents *extents, uint32_t extent, uint64_t bytes)
{
    uint32_t index = extent / SLAB_UNITS;
    if (index >= extents->slab_count)
        return false;
    struct class *class = class_of(extents, bytes);
    if (!class || extent % SLAB_UNITS % class->units != 0)
        return false;
    uint32_t place = extent % SLAB_UNITS / class->units;
    if (place >= class->per_slab)
        return false;
    struct slab *slab = &extents->slabs[index];
    if (slab->book && &extents->classes[slab->class_index] != class)
        return false;
    if (slab->book && slab->book->holds[place] > 0) {
        // The last count would be for good.
        bool fits = slab->book->holds[place] + 1 < (int)EXTENT_HOLDS_MAX;
        slab->book->holds[place] = (uint16_t)(slab->book->holds[place] + fits);
        return fits;
    }
    if (!can_take(extents, class, !slab->book))
        return false;
    if (!slab->book)
        slab_add(extents, class, index);
    (void)extent_take(extents, class, index, place);
    return true;
}

bool extents_claim(struct extents *extents, uint32_t extent, uint64_t bytes)
{
    pthread_mutex_lock(&extents->lock);
    bool claimed = claim(extents, extent, bytes);
    pthread_mutex_unlock(&extents->lock);
    return claimed;
}

uint32_t extents_holds(struct extents *extents, uint32_t extent)
{
    const uint32_t index = extent / SLAB_UNITS;
    uint32_t holds = 0;
    pthread_mutex_lock(&extents->lock);
    const struct slab *slab = index < extents->slab_count ? &extents->slabs[index] : NULL;
    if (slab && slab->book) {
        const struct class *class = &extents->classes[slab->class_index];
        const uint32_t place = extent % SLAB_UNITS / class->units;
        holds = place < class->per_slab && extent % SLAB_UNITS % class->units == 0 ? slab->book->holds[place] : 0;
    }
    pthread_mutex_unlock(&extents->lock);
    return holds;
}

void extents_usage(struct extents *extents, struct extents_usage *out)
{
    pthread_mutex_lock(&extents->lock);
    *out = (struct extents_usage){
        .capacity_bytes = extents->slab_count * EXTENTS_SLAB_BYTES,
        .used_bytes = extents->used_bytes,
        .used_extents = extents->used_extents,
    };
    pthread_mutex_unlock(&extents->lock);
}

uint64_t extent_checksum(const void *memory, size_t bytes, uint32_t extent)
{
    return XXH3_64bits_withSeed(memory, bytes, extent);
}
