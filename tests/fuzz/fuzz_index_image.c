// Images of indexes that were changed: no load does harm, and what it accepts is an index that can be lived with.
//
// An input is not an image but says how to spoil one: its first byte names a real image, made here, then each edit
// takes six bytes. So a few bytes reach any field of an image that is right but for them, and the corpus outlives the
// format. The image's announced size is put right, unless an edit says otherwise.
#include "fuzz.h"

#include "index/index.h"

#include <string.h>

#define EDIT_BYTES    6u
#define IMAGE_MOST    131072u
#define HEAD_DIM      16u
#define TOKENS        430u
#define HEADER_BYTES  128u
#define SIZE_AT       8u // of the image's bytes, in the header
#define CONSTANT_MOST 100000u

enum { KINDS = 12 };

static struct {
    struct index_params params;
    unsigned char bytes[IMAGE_MOST];
    size_t count;
} images[KINDS];

struct heap {
    size_t bytes, most;
};

static void *acquire(void *owner, size_t bytes)
{
    struct heap *heap = owner;
    heap->bytes += bytes;
    heap->most = heap->bytes > heap->most ? heap->bytes : heap->most;
    void *memory = aligned_alloc(64, (bytes + 63) / 64 * 64);
    FUZZ_CHECK(memory != NULL);
    memset(memory, 0xa5, bytes);
    return memory;
}

static void release(void *owner, void *memory, size_t bytes)
{
    struct heap *heap = owner;
    heap->bytes -= memory == NULL ? 0 : bytes;
    free(memory);
}

// ---- an owner whose keys are a function of their positions ----

static void key_of(uint32_t position, float *key)
{
    for (uint32_t i = 0; i < HEAD_DIM; i++) {
        uint32_t x = (position * 2654435761u) ^ (i * 40503u);
        x = (x ^ x >> 15) * 2246822519u;
        key[i] = (float)((x >> 13) % 1000) * 0.002f - 1.0f + (i == position % 5 ? 3.0f : 0.0f);
    }
}

static void append(struct index *index, uint32_t n)
{
    float keys[64 * HEAD_DIM];
    struct index_place places[64];
    for (uint32_t done = 0; done < n;) {
        const uint32_t some = n - done < 64 ? n - done : 64;
        for (uint32_t i = 0; i < some; i++) {
            key_of((uint32_t)index_length(index) + i, keys + (size_t)i * HEAD_DIM);
        }
        const enum index_status status = index_append_prepare(index, keys, HEAD_DIM * sizeof(float), some, places);
        if (status == INDEX_FULL || (status == INDEX_INVALID && index_is_sealed(index))) {
            return;
        }
        FUZZ_CHECK(status == INDEX_OK);
        index_append_commit(index);
        done += some;
    }
}

static void lend(struct index *index, uint32_t page_tokens, float *rows, const void **keys)
{
    const uint32_t *pages;
    uint32_t count, positions[INDEX_PAGE_TOKENS_MAX];
    index_rows_get(index, &pages, &count);
    FUZZ_CHECK(count * page_tokens <= 16384);
    for (uint32_t i = 0; i < count; i++) {
        float *first = rows + (size_t)i * page_tokens * HEAD_DIM;
        index_page_positions(index, pages[i], positions);
        for (uint32_t row = 0; row < page_tokens; row++) {
            key_of(positions[row], first + (size_t)row * HEAD_DIM);
        }
        keys[i] = first;
    }
    index_rows_give(index, keys, HEAD_DIM * sizeof(float));
}

// Builds until nothing is due. stop: at the first plan, which stays pending.
static void build(struct index *index, uint32_t page_tokens, bool stop)
{
    static float rows[4][16384 * HEAD_DIM];
    static const void *keys[16384];
    uint32_t lent = 0;
    for (uint32_t steps = 0;; steps++) {
        FUZZ_CHECK(steps < 1000000);
        switch (index_build_step(index, 100000)) {
        case INDEX_BUILD_IDLE:
            return;
        case INDEX_BUILD_ROWS:
            FUZZ_CHECK(lent < 4);
            lend(index, page_tokens, rows[lent++], keys);
            break;
        case INDEX_BUILD_PLAN:
            if (stop) {
                return;
            }
            index_plan_commit(index);
            lent = 0;
            break;
        case INDEX_BUILD_MORE:
            break;
        default:
            FUZZ_CHECK(false);
        }
    }
}

static void check(const struct index *index)
{
    char text[256] = "";
    if (!index_check(index, text, sizeof text)) {
        fprintf(stderr, "index_check: %s\n", text);
        abort();
    }
}

// Of the index, and behind it of its beginning once more.
static void search(const struct index *index, const struct index_allocator *allocator, uint32_t first)
{
    const uint64_t length = index_length(index), end = length + length / 2;
    const struct index_part parts[] = {{index, 0, length}, {index, length, end}};
    float vectors[2 * HEAD_DIM];
    struct index_search *context;
    FUZZ_CHECK(index_search_create(allocator, &context) == INDEX_OK);
    for (uint32_t round = first; round < 4; round += 2) {
        for (uint32_t i = 0; i < 2 * HEAD_DIM; i++) {
            vectors[i] = (float)(i % 7) - 3.0f;
        }
        const struct index_query query = {.queries = vectors,
                                          .query_count = 1,
                                          .head_count = 2,
                                          .first_position = round == 2 ? length / 2 : end,
                                          .scale = 0.25f,
                                          .budget = round == 0 ? (uint32_t)end : 40,
                                          .sinks = 2,
                                          .window = round == 1 ? 0 : 20,
                                          .page_wise = round == 1,
                                          .coverage = round == 2 ? 0.9f : 0.0f};
        struct index_selection selection;
        const struct index_selected *tokens;
        FUZZ_CHECK(index_search_reserve(context, parts, 1 + round % 2, &query) == INDEX_OK);
        const enum index_status status = index_search_begin(context, parts, 1 + round % 2, &query);
        if (status == INDEX_NOT_FINITE) {
            continue;
        }
        FUZZ_CHECK(status == INDEX_OK);
        for (uint32_t steps = 0; !index_search_step(context, 10000); steps++) {
            FUZZ_CHECK(steps < 1000000);
        }
        index_search_finish(context, &selection, &tokens);
        for (uint32_t i = 0; i < selection.count; i++) {
            struct index_place place;
            const uint32_t position = tokens[i].position;
            FUZZ_CHECK(position < (round % 2 == 0 ? length : end) && tokens[i].mass >= 0.0f && tokens[i].mass < 1.1f);
            index_locate(index, position < length ? position : position - length, 1, &place);
            FUZZ_CHECK(place.page == tokens[i].place.page && place.row == tokens[i].place.row);
        }
    }
    index_search_destroy(context);
}

// ---- images ----

static size_t save(const struct index *index, unsigned char *out, size_t room)
{
    static struct index_save state;
    const uint64_t bytes = index_image_bytes(index);
    FUZZ_CHECK(bytes <= room);
    index_save_begin(index, &state);
    FUZZ_CHECK(index_save_step(&state, out, room) == bytes);
    FUZZ_CHECK(index_save_step(&state, out, 1) == 0);
    return (size_t)bytes;
}

static enum index_status load(const struct index_params *params, const struct index_allocator *allocator,
                              const unsigned char *bytes, size_t count, size_t slice, struct index **out)
{
    struct index_load *state;
    enum index_status status = index_load_begin(params, allocator, count, &state);
    if (status != INDEX_OK) {
        return status;
    }
    for (size_t done = 0; done < count && status == INDEX_OK; done += slice) {
        status = index_load_feed(state, bytes + done, count - done < slice ? count - done : slice);
    }
    return index_load_finish(state, out);
}

static void forget(struct index *index, uint64_t length)
{
    static uint32_t pages[1u << 17];
    uint32_t count;
    FUZZ_CHECK(index_page_bound(index) <= sizeof pages / sizeof pages[0]);
    index_truncate(index, length, pages, &count);
    for (uint64_t p = 3; p < length && p < 400; p += 29) {
        index_erase(index, p, pages, &count);
    }
}

// Of every policy, of pages of several sizes; without a tree, with one, with a plan pending, cut and patched.
static void make_images(void)
{
    static const uint32_t pages[] = {4, 16, 20};
    struct heap heap = {0};
    const struct index_allocator allocator = {acquire, release, &heap};
    for (uint32_t kind = 0; kind < KINDS; kind++) {
        struct index *index;
        images[kind].params = (struct index_params){.head_dim = HEAD_DIM,
                                                    .dtype = INDEX_FP32,
                                                    .page_tokens = pages[kind % 3],
                                                    .policy = kind % 2 == 0 ? INDEX_MEANS : INDEX_PROMOTION,
                                                    .promotion_ratio = kind % 2 == 0 ? 0.0f : 0.125f,
                                                    .seed = kind,
                                                    .is_continuation = kind >= 8};
        const uint32_t page_tokens = images[kind].params.page_tokens;
        FUZZ_CHECK(index_create(&images[kind].params, &allocator, &index) == INDEX_OK);
        append(index, kind < 3 ? 30 * kind : TOKENS);
        if (kind % 5 == 4) {
            index_seal(index);
        }
        build(index, page_tokens, kind % 4 == 3);
        if (kind % 4 == 2) {
            forget(index, index_length(index) - 37);
        }
        images[kind].count = save(index, images[kind].bytes, IMAGE_MOST);
        index_destroy(index);
    }
    FUZZ_CHECK(heap.bytes == 0);
}

// Where an edit is, what it does, and with what.
static void edit(const uint8_t *how, unsigned char *bytes, size_t *count, bool *keeps_size)
{
    static const uint32_t values[] = {0, 1, UINT32_MAX, 0x7f800000u, 0x7fc00000u, 0x7f7fffffu, 0x80000000u, 16};
    const size_t words = *count / sizeof(uint32_t);
    size_t at = how[1] | (size_t)how[2] << 8;
    const size_t from = how[4] | (size_t)how[5] << 8;
    uint32_t word;
    if (words == 0) {
        return;
    }
    at = ((how[0] & 0x80) != 0 ? at % (HEADER_BYTES / 4) : at) % words * sizeof word;
    memcpy(&word, bytes + at, sizeof word);
    switch (how[0] % 8) {
    case 0:
        word ^= 1u << how[3] % 32;
        break;
    case 1:
        word += how[3] - 128u;
        break;
    case 2:
        word = values[how[3] % 8];
        break;
    case 3:
        word = (uint32_t)how[3] << 24 | (uint32_t)how[4] << 16 | how[5];
        break;
    case 4: // of another place: an id, a position or a number that is used already
        memcpy(&word, bytes + from % words * sizeof word, sizeof word);
        break;
    case 5: { // two words change places
        uint32_t other;
        memcpy(&other, bytes + from % words * sizeof word, sizeof other);
        memcpy(bytes + from % words * sizeof word, &word, sizeof word);
        word = other;
        break;
    }
    case 6:
        *keeps_size = how[3] % 2 == 0;
        *count -= how[4] < *count ? how[4] : 0;
        return;
    default:
        if (*count + how[4] <= IMAGE_MOST) {
            memset(bytes + *count, how[3], how[4]);
            *count += how[4];
        }
        return;
    }
    memcpy(bytes + at, &word, sizeof word);
}

// What was accepted holds together, and goes on to.
static void live(struct index *index, const struct index_allocator *allocator, uint32_t page_tokens)
{
    check(index);
    search(index, allocator, 0);
    append(index, 80);
    build(index, page_tokens, false);
    check(index);
    search(index, allocator, 1);
    forget(index, index_length(index) * 3 / 4);
    check(index);
    build(index, page_tokens, false);
    check(index);
    search(index, allocator, 2);
}

int LLVMFuzzerTestOneInput(const uint8_t *bytes, size_t size)
{
    static unsigned char image[IMAGE_MOST], again[IMAGE_MOST];
    if (images[0].count == 0) {
        make_images();
    }
    if (size == 0) {
        return 0;
    }
    const uint32_t kind = bytes[0] % KINDS;
    const struct index_params *params = &images[kind].params;
    size_t count = images[kind].count;
    bool keeps_size = true;
    memcpy(image, images[kind].bytes, count);
    for (size_t at = 1; at + EDIT_BYTES <= size; at += EDIT_BYTES) {
        edit(bytes + at, image, &count, &keeps_size);
    }
    const uint64_t announced = count;
    if (keeps_size && count >= HEADER_BYTES) {
        memcpy(image + SIZE_AT, &announced, sizeof announced);
    }
    struct heap heap = {0};
    const struct index_allocator allocator = {acquire, release, &heap};
    struct index *index = NULL;
    const enum index_status status = load(params, &allocator, image, count, size % 2 == 0 ? 1 + size : count, &index);
    FUZZ_CHECK(heap.most <= 8 * count + CONSTANT_MOST);
    if (status != INDEX_OK) {
        FUZZ_CHECK(status == INDEX_INVALID && heap.bytes == 0);
        FUZZ_CHECK(size > EDIT_BYTES); // what was not changed is accepted
        return 0;
    }
    FUZZ_CHECK(save(index, again, IMAGE_MOST) == count);
    for (size_t i = 0; i < count; i++) {
        if (image[i] != again[i]) { // every bit of it means something
            fprintf(stderr, "byte %zu of %zu is %u, and %u when saved again\n", i, count, image[i], again[i]);
            abort();
        }
    }
    live(index, &allocator, params->page_tokens);
    index_destroy(index);
    FUZZ_CHECK(heap.bytes == 0);
    return 0;
}
