// Images: an index saved and made again lives on as the one that never was; bytes that are no image do no harm.
#include "test_index_owner.h"

#include "index/batch.h"

struct image {
    unsigned char *bytes;
    size_t count;
};

static struct image save(const struct index *index, struct rng *rng)
{
    struct index_save *state = malloc(sizeof *state);
    struct image image = {.count = (size_t)index_image_bytes(index)};
    image.bytes = malloc(image.count + 1);
    assert_true(state != NULL && image.bytes != NULL);
    index_save_begin(index, state);
    size_t done = 0;
    for (;;) {
        const size_t left = image.count - done, some = 1 + rng_below(rng, rng_below(rng, 3) == 0 ? 10 : 5000);
        const size_t room = some < left ? some : left;
        // Exactly as many bytes as there is room for, until there are no more.
        const size_t count = index_save_step(state, image.bytes + done, room == 0 ? 1 : room);
        assert_int_equal(count, room);
        done += count;
        if (room == 0) {
            break;
        }
    }
    free(state);
    return image;
}

static enum index_status load(const struct image *image, const struct index_params *params, struct heap *heap,
                              struct rng *rng, struct index **out)
{
    const struct index_allocator allocator = heap_allocator(heap);
    struct index_load *state;
    enum index_status status = index_load_begin(params, &allocator, image->count, &state);
    if (status != INDEX_OK) {
        return status;
    }
    for (size_t done = 0; done < image->count && status == INDEX_OK;) {
        const size_t left = image->count - done, some = rng_below(rng, rng_below(rng, 3) == 0 ? 10 : 5000);
        // A copy of its own, so that a read past its end is found.
        unsigned char *piece = malloc(some < left ? some + 1 : left);
        memcpy(piece, image->bytes + done, some < left ? some : left);
        status = index_load_feed(state, piece, some < left ? some : left);
        done += some < left ? some : left;
        free(piece);
    }
    const enum index_status finished = index_load_finish(state, out);
    assert_true(status == INDEX_OK || status == finished);
    return finished;
}

static void assert_images_equal(const struct image *a, const struct image *b)
{
    assert_int_equal(a->count, b->count);
    for (size_t i = 0; i < a->count; i++) {
        if (a->bytes[i] != b->bytes[i]) {
            fail_msg("byte %zu of %zu: %u is not %u", i, a->count, a->bytes[i], b->bytes[i]);
        }
    }
}

// The owner of a loaded index: it has the same pages, but for those provided for a plan that is not in the image.
static struct owner owner_again(const struct owner *owner, struct index *index)
{
    struct owner again = {.index = index, .params = owner->params, .row_bytes = owner->row_bytes};
    again.page_room = owner->page_room;
    again.keys = owner->keys;
    again.rows = malloc(owner->page_room * owner_page_bytes(owner) + 1);
    again.present = malloc(owner->page_room * sizeof again.present[0] + 1);
    again.erased = malloc((owner->length + 1) * sizeof again.erased[0]);
    assert_true(again.rows != NULL && again.present != NULL && again.erased != NULL);
    if (owner->page_room > 0) {
        memcpy(again.rows, owner->rows, owner->page_room * owner_page_bytes(owner));
        memcpy(again.present, owner->present, owner->page_room * sizeof again.present[0]);
    }
    if (owner->length > 0) {
        memcpy(again.erased, owner->erased, owner->length * sizeof again.erased[0]);
    }
    again.length = owner->length;
    again.erased_room = owner->length + 1;
    for (uint32_t i = 0; i < owner->planned_count; i++) {
        owner_take_back(&again, owner->planned[i]);
    }
    return again;
}

static void assert_searches_equal(const struct owner *a, const struct owner *b, struct rng *rng)
{
    struct heap heap = {0};
    const struct index_allocator allocator = heap_allocator(&heap);
    struct index_search *search[2];
    float vector[4 * INDEX_HEAD_DIM_MAX];
    assert_int_equal(index_search_create(&allocator, &search[0]), INDEX_OK);
    assert_int_equal(index_search_create(&allocator, &search[1]), INDEX_OK);
    for (uint32_t round = 0; round < 4; round++) {
        for (uint32_t i = 0; i < 4 * a->params.head_dim; i++) {
            vector[i] = rng_normal(rng);
        }
        const struct index_query query = {.queries = vector,
                                          .query_count = 1 + round % 2,
                                          .head_count = 2,
                                          .first_position = a->length,
                                          .scale = 1.0f / sqrtf((float)a->params.head_dim),
                                          .budget = round == 0 ? a->length : 1 + rng_below(rng, 200),
                                          .sinks = rng_below(rng, 20),
                                          .window = rng_below(rng, 100),
                                          .page_wise = rng_below(rng, 3) == 0,
                                          .coverage = rng_below(rng, 3) == 0 ? 0.8f : 0.0f};
        const struct answer first = search_run(search[0], a->index, &query, 5000, UINT32_MAX);
        const struct answer second = search_run(search[1], b->index, &query, 700, UINT32_MAX);
        assert_int_equal(first.status, second.status);
        if (first.status != INDEX_OK) {
            continue;
        }
        assert_memory_equal(&first.selection, &second.selection, offsetof(struct index_selection, partial));
        if (first.selection.count > 0) {
            assert_memory_equal(first.tokens, second.tokens, first.selection.count * sizeof first.tokens[0]);
        }
    }
    index_search_destroy(search[0]);
    index_search_destroy(search[1]);
    assert_int_equal(heap.blocks, 0);
}

// What can be asked of them is the same. Page ids too, unless builds have gone on at other moments.
static void assert_equal(const struct owner *a, const struct owner *b, bool with_pages, struct rng *rng)
{
    const uint32_t n = a->length;
    struct index_place *places[2] = {calloc(n + 1, sizeof(struct index_place)),
                                     calloc(n + 1, sizeof(struct index_place))};
    assert_int_equal(index_length(a->index), index_length(b->index));
    assert_int_equal(index_indexed(a->index), index_indexed(b->index));
    assert_int_equal(index_version(a->index), index_version(b->index));
    struct index_shape shape[2];
    memset(shape, 0, sizeof shape);
    index_shape(a->index, &shape[0]);
    index_shape(b->index, &shape[1]);
    assert_memory_equal(&shape[0], &shape[1], sizeof shape[0]);
    if (with_pages) {
        assert_int_equal(index_page_bound(a->index), index_page_bound(b->index));
        index_locate(a->index, 0, n, places[0]);
        index_locate(b->index, 0, n, places[1]);
        assert_memory_equal(places[0], places[1], (n + 1) * sizeof places[0][0]);
        assert_searches_equal(a, b, rng);
    }
    free(places[0]);
    free(places[1]);
}

// Saves and loads; looks at both. The image is handed out.
static struct owner reborn(const struct owner *owner, struct heap *heap, struct rng *rng, struct image *out)
{
    struct image image = save(owner->index, rng);
    struct index *index = NULL;
    assert_int_equal(load(&image, &owner->params, heap, rng, &index), INDEX_OK);
    assert_int_equal(index_bytes(index), heap->bytes);
    struct owner again = owner_again(owner, index);
    owner_verify(&again);
    assert_equal(owner, &again, true, rng);
    struct image second = save(owner->index, rng), third = save(again.index, rng);
    assert_images_equal(&image, &second);
    assert_images_equal(&image, &third);
    free(second.bytes);
    free(third.bytes);
    *out = image;
    return again;
}

static struct index_params params_random(struct rng *rng, uint32_t round)
{
    static const uint32_t pages[] = {1, 3, 8, 16, 20, 64, 256}, dims[] = {16, 48, 64, 80, 128, 256};
    return (struct index_params){.head_dim = dims[rng_below(rng, round % 4 == 0 ? 6 : 3)],
                                 .dtype = (enum index_dtype)(1 + rng_below(rng, 3)),
                                 .page_tokens = pages[round % 7],
                                 .policy = (enum index_policy)(round / 7 % 2),
                                 .promotion_ratio = round % 3 == 0 ? 0.125f : 0.0f,
                                 .seed = rng_next(rng),
                                 .is_continuation = round % 5 < 2};
}

static void build_all(struct owner *owner)
{
    owner_build(owner, 100000);
}

// One event of a lane's life, the same for all. Builds are carried through, so that page ids stay alike.
static void live(struct owner *const *owners, uint32_t owner_count, uint32_t tokens, struct rng *rng)
{
    const uint32_t what = rng_below(rng, 10), n = owners[0]->length;
    const uint32_t some = 1 + rng_below(rng, 300), position = n == 0 ? 0 : rng_below(rng, n);
    for (uint32_t i = 0; i < owner_count; i++) {
        if (what < 5) {
            const enum index_status expected = index_is_sealed(owners[i]->index) ? INDEX_INVALID : INDEX_OK;
            assert_int_equal(owner_append(owners[i], some < tokens - n ? some : tokens - n), expected);
        } else if (what < 6) {
            owner_truncate(owners[i], n - (some < n ? some : n));
        } else if (what < 8) {
            for (uint32_t p = position; p < n && p < position + 9; p++) {
                owner_erase(owners[i], p);
            }
        } else {
            build_all(owners[i]);
        }
    }
}

// Lengths at which something begins.
static void every_length_comes_back(void **state)
{
    (void)state;
    struct rng rng = rng_begin(91);
    enum { TOKENS = 900 };
    for (uint32_t round = 0; round < 14; round++) {
        const struct index_params params = params_random(&rng, round);
        const uint32_t page = params.page_tokens;
        const uint32_t lengths[] = {
            0, 1, page - 1, page, page + 1, 15, 16, 17, 33, 256 + page + 63, 256 + page + 64, 256 + page + 90, TOKENS};
        unsigned char *keys = keys_make(KEYS_CLUSTERED, params.dtype, params.head_dim, TOKENS, &rng);
        for (uint32_t i = 0; i < sizeof lengths / sizeof lengths[0]; i++) {
            struct heap heap = {0}, other = {0};
            struct owner owner = owner_begin(&params, &heap, keys);
            assert_int_equal(owner_append(&owner, lengths[i]), INDEX_OK);
            struct image image;
            struct owner again = reborn(&owner, &other, &rng, &image); // all of it in the tail
            free(image.bytes);
            owner_end(&again);
            assert_int_equal(other.blocks, 0);
            build_all(&owner);
            again = reborn(&owner, &other, &rng, &image);
            free(image.bytes);
            assert_int_equal(owner_append(&owner, TOKENS - lengths[i]), INDEX_OK);
            assert_int_equal(owner_append(&again, TOKENS - lengths[i]), INDEX_OK);
            build_all(&owner);
            build_all(&again);
            owner_verify(&again);
            assert_equal(&owner, &again, true, &rng);
            owner_end(&again);
            index_seal(owner.index); // the rest is clustered after a load as it is without one
            again = reborn(&owner, &other, &rng, &image);
            free(image.bytes);
            assert_true(index_is_sealed(again.index));
            assert_int_equal(owner_append(&again, 1), INDEX_INVALID);
            build_all(&owner);
            build_all(&again);
            assert_equal(&owner, &again, true, &rng);
            owner_end(&owner);
            owner_end(&again);
            assert_int_equal(heap.blocks, 0);
            assert_int_equal(other.blocks, 0);
        }
        free(keys);
    }
}

// At any moment of any life the image is of what was committed, and both go the same way from there.
static void lives_go_on_alike(void **state)
{
    (void)state;
    struct rng rng = rng_begin(92);
    enum { TOKENS = 4000 };
    for (uint32_t round = 0; round < rounds_of(84); round++) {
        const struct index_params params = params_random(&rng, round);
        const enum keys_kind kind = (enum keys_kind)rng_below(&rng, KEYS_KINDS);
        unsigned char *keys = keys_make(kind, params.dtype, params.head_dim, TOKENS, &rng);
        struct heap heap = {0}, other = {0};
        struct owner owner = owner_begin(&params, &heap, keys), shadow;
        struct owner *const both[] = {&owner, &shadow};
        for (uint32_t event = 0; event < 10 + rng_below(&rng, 40); event++) {
            live(both, 1, TOKENS - 300, &rng);
        }
        // In the middle of a build, or with a plan that is pending or dropped.
        const uint32_t moment = round % 4;
        enum index_build_state build = INDEX_BUILD_MORE;
        assert_int_equal(owner_append(&owner, 300), INDEX_OK);
        const uint32_t steps = moment == 0 ? 0 : moment == 1 ? rng_below(&rng, 300) : UINT32_MAX;
        for (uint32_t i = 0; i < steps && (build == INDEX_BUILD_MORE || build == INDEX_BUILD_ROWS); i++) {
            build = owner_step(&owner, 1 + rng_below(&rng, 500));
        }
        if (moment == 3 && build == INDEX_BUILD_PLAN) {
            owner_drop_plan(&owner);
            build = INDEX_BUILD_MORE;
        }
        struct image image;
        shadow = reborn(&owner, &other, &rng, &image);
        if (build == INDEX_BUILD_PLAN) {
            owner_carry_out(&owner, NULL, NULL);
        }
        for (uint32_t event = 0; event < 40; event++) {
            if (event == 20 && round % 3 == 0) {
                index_seal(owner.index);
                index_seal(shadow.index);
            }
            build_all(&owner); // first of all, so that both number pages in the same order
            build_all(&shadow);
            assert_equal(&owner, &shadow, event % 8 == 0, &rng);
            live(both, 2, TOKENS, &rng);
        }
        owner_verify(&shadow);
        assert_equal(&owner, &shadow, true, &rng);
        struct image a = save(owner.index, &rng), b = save(shadow.index, &rng);
        assert_images_equal(&a, &b);
        free(a.bytes);
        free(b.bytes);
        free(image.bytes);
        owner_end(&owner);
        owner_end(&shadow);
        assert_int_equal(heap.blocks, 0);
        assert_int_equal(other.blocks, 0);
        free(keys);
    }
}

// A running build leaves no trace in the image: it is that of the index whose build was voided, whenever it is saved.
static void builds_are_not_in_it(void **state)
{
    (void)state;
    struct rng rng = rng_begin(93);
    uint32_t with_drafts = 0;
    for (uint32_t round = 0; round < 60; round++) {
        const struct index_params params = params_random(&rng, round % 14);
        unsigned char *keys = keys_make(KEYS_CLUSTERED, params.dtype, params.head_dim, 2000, &rng);
        struct heap heap = {0};
        struct owner owner = owner_begin(&params, &heap, keys);
        for (uint32_t i = 0; i < 3; i++) { // the first batch, later ones, and cells that are mended
            assert_int_equal(owner_append(&owner, 600), INDEX_OK);
            owner_erase(&owner, 5);
            const uint32_t steps = rng_below(&rng, 400);
            enum index_build_state build = INDEX_BUILD_MORE;
            for (uint32_t step = 0; step < steps && build != INDEX_BUILD_PLAN && build != INDEX_BUILD_IDLE; step++) {
                build = owner_step(&owner, 300);
            }
            with_drafts += owner.index->batch != NULL && owner.index->batch->draft_count > 0 ? 1 : 0;
            struct image during = save(owner.index, &rng);
            owner_erase(&owner, 5); // erased already: nothing but the build goes
            struct image voided = save(owner.index, &rng);
            assert_images_equal(&during, &voided);
            free(during.bytes);
            free(voided.bytes);
            build_all(&owner);
            for (uint32_t p = 300; p < 500; p++) {
                owner_erase(&owner, p);
            }
        }
        owner_end(&owner);
        assert_int_equal(heap.blocks, 0);
        free(keys);
    }
    assert_true(with_drafts > 10);
}

// Whichever acquisition is refused, nothing is left, and no byte is wasted on it.
static void refused_memory_leaves_nothing(void **state)
{
    (void)state;
    struct rng rng = rng_begin(94);
    const struct index_params params = {.head_dim = 32, .dtype = INDEX_FP32, .page_tokens = 8, .seed = 4};
    unsigned char *keys = keys_make(KEYS_CLUSTERED, params.dtype, params.head_dim, 1200, &rng);
    struct heap heap = {0};
    struct owner owner = owner_begin(&params, &heap, keys);
    assert_int_equal(owner_append(&owner, 1200), INDEX_OK);
    build_all(&owner);
    owner_truncate(&owner, 900);
    struct image image = save(owner.index, &rng);
    bool refused = true;
    for (uint64_t at = 1; refused; at++) {
        struct heap other = {.refuse_at = at};
        struct index *index = NULL;
        const enum index_status status = load(&image, &params, &other, &rng, &index);
        refused = other.refused;
        assert_int_equal(status, refused ? INDEX_NO_MEMORY : INDEX_OK);
        index_destroy(index);
        assert_int_equal(other.blocks, 0);
    }
    free(image.bytes);
    owner_end(&owner);
    free(keys);
}

// Memory is taken as the announced size allows, whatever the bytes say.
static void takes_no_more_than_its_share(void **state)
{
    (void)state;
    struct rng rng = rng_begin(95);
    for (uint32_t round = 0; round < 14; round++) {
        const struct index_params params = params_random(&rng, round);
        unsigned char *keys = keys_make(KEYS_CLUSTERED, params.dtype, params.head_dim, 3000, &rng);
        struct heap heap = {0}, other = {0};
        struct owner owner = owner_begin(&params, &heap, keys);
        assert_int_equal(owner_append(&owner, 3000), INDEX_OK);
        build_all(&owner);
        const uint64_t held = index_bytes(owner.index);
        struct image image = save(owner.index, &rng);
        printf("round %u: %zu bytes of image, %llu of memory\n", round, image.count, (unsigned long long)held);
        assert_true(image.count <= held + held / 8);
        struct index *index;
        assert_int_equal(load(&image, &owner.params, &other, &rng, &index), INDEX_OK);
        assert_true(other.bytes <= held + held / 8);
        index_destroy(index);
        free(image.bytes);
        for (uint32_t p = 0; p < 3000; p++) { // nothing is left but places
            owner_erase(&owner, p);
        }
        image = save(owner.index, &rng);
        assert_int_equal(load(&image, &owner.params, &other, &rng, &index), INDEX_OK);
        assert_true(other.bytes <= 8 * image.count + 300000);
        index_destroy(index);
        free(image.bytes);
        owner_end(&owner);
        free(keys);
    }
}

// What other parameters, other lengths and other bytes make of an image.
static void what_is_no_image_is_refused(void **state)
{
    (void)state;
    struct rng rng = rng_begin(96);
    const struct index_params params = {.head_dim = 32, .dtype = INDEX_BF16, .page_tokens = 8, .seed = 4};
    unsigned char *keys = keys_make(KEYS_CLUSTERED, params.dtype, params.head_dim, 700, &rng);
    struct heap heap = {0}, other = {0};
    struct owner owner = owner_begin(&params, &heap, keys);
    assert_int_equal(owner_append(&owner, 700), INDEX_OK);
    build_all(&owner);
    struct image image = save(owner.index, &rng);
    struct index *index = NULL;
    struct index_params wrong[] = {params, params, params, params, params, params, params};
    wrong[0].head_dim = 48;
    wrong[1].dtype = INDEX_FP16;
    wrong[2].page_tokens = 16;
    wrong[3].policy = INDEX_PROMOTION;
    wrong[4].seed = 5;
    wrong[5].head_dim = 17;
    wrong[6].is_continuation = true;
    for (uint32_t i = 0; i < 7; i++) {
        assert_int_equal(load(&image, &wrong[i], &other, &rng, &index), INDEX_INVALID);
    }
    // Of another length, or announced so.
    for (uint32_t i = 0; i < 200; i++) {
        struct image cut = {image.bytes, rng_below(&rng, (uint32_t)image.count)};
        assert_int_equal(load(&cut, &params, &other, &rng, &index), INDEX_INVALID);
    }
    const struct index_allocator allocator = heap_allocator(&other);
    struct index_load *state_of;
    assert_int_equal(index_load_begin(&params, &allocator, image.count, &state_of), INDEX_OK);
    assert_int_equal(index_load_feed(state_of, image.bytes, image.count - 1), INDEX_OK);
    assert_int_equal(index_load_finish(state_of, &index), INDEX_INVALID);
    assert_int_equal(index_load_begin(&params, &allocator, image.count, &state_of), INDEX_OK);
    assert_int_equal(index_load_feed(state_of, image.bytes, image.count), INDEX_OK);
    assert_int_equal(index_load_feed(state_of, image.bytes, 1), INDEX_INVALID);
    assert_int_equal(index_load_feed(state_of, image.bytes, 1), INDEX_INVALID);
    index_load_drop(state_of);
    index_load_drop(NULL);
    assert_int_equal(index_load_begin(&params, &allocator, image.count, &state_of), INDEX_OK);
    index_load_drop(state_of);
    // A byte that is another one: refused, or an index that holds together.
    uint32_t refused = 0;
    for (uint32_t i = 0; i < rounds_of(6000); i++) {
        const size_t at = rng_below(&rng, (uint32_t)(i % 2 == 0 ? image.count : 8000));
        const unsigned char was = image.bytes[at];
        const uint64_t other_byte = i % 3 == 0 ? was ^ 1u << rng_below(&rng, 8) : rng_next(&rng);
        image.bytes[at] = (unsigned char)other_byte;
        if (load(&image, &params, &other, &rng, &index) == INDEX_OK) {
            char text[256] = "";
            if (!index_check(index, text, sizeof text)) {
                fail_msg("byte %zu: %s", at, text);
            }
            index_destroy(index);
        } else {
            refused++;
        }
        image.bytes[at] = was;
        assert_int_equal(other.blocks, 0);
    }
    printf("%u refused\n", refused);
    assert_true(refused > 0);
    free(image.bytes);
    owner_end(&owner);
    free(keys);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(every_length_comes_back),      cmocka_unit_test(lives_go_on_alike),
        cmocka_unit_test(builds_are_not_in_it),         cmocka_unit_test(refused_memory_leaves_nothing),
        cmocka_unit_test(takes_no_more_than_its_share), cmocka_unit_test(what_is_no_image_is_refused),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
