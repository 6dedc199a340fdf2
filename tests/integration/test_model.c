// Random operations on many sequences, held against a model in memory: a sequence is a list of tokens, and whatever is
// read or selected of it must be those tokens' K and V, bit for bit, whatever its forks, truncations, seals and the
// disk have been through. A seed is a schedule; ICECACHE_TEST_SEED=n plays that one alone.
#include "worker.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SEQUENCES = 10, TOKENS = 2400, SEALS = 6, SLOTS = TOKENS, BLOCK = 16, BLOCKS = TOKENS / BLOCK };

static const struct shape shape = {2, 2, 4, 32, ICE_BF16};

static const char *const in_memory[] = {
    "--pool-bytes", "64m", "--index-bytes", "64m", "--shared-bytes", "64m", "--shards", "2", NULL};
// A pool that holds a part of what is there, and sequences that sleep.
static const char *const on_disk[] = {DAEMON_WITH_DISK("4m", "256m"), "--hibernate-ms", "100", NULL};

struct modelled {
    ice_sequence *handle; // NULL: not open
    uint32_t tokens[TOKENS];
    uint64_t lengths[2]; // of the layers
};

struct modelled_seal {
    uint64_t id; // 0: none
    uint32_t tokens[TOKENS];
    uint64_t length;
    uint8_t hashes[BLOCKS][ICE_HASH_BYTES];
};

struct model {
    uint64_t random;
    ice_client *client;
    ice_landing *landing; // a row for each sequence
    struct modelled sequences[SEQUENCES];
    struct modelled_seal seals[SEALS];
    uint32_t next_token;
    uint64_t forks, truncations, attached, retrieves, refused;
    uint8_t *keys, *values, *got_keys, *got_values; // [layer][token][head] rows
};

static uint64_t draw(struct model *model, uint64_t bound)
{
    uint64_t x = (model->random += 0x9e3779b97f4a7c15u);
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return (x ^ (x >> 31)) % bound;
}

// ---- the model's bytes ----

static size_t row_bytes(void)
{
    return shape_row_bytes(&shape);
}

static void make_row(uint32_t token, uint32_t layer, uint32_t head, bool is_value, uint8_t *out)
{
    float row[32];
    vector_make(row, shape.head_dim, token, layer * shape.kv_heads + head, token % 24, is_value);
    vector_encode(row, shape.head_dim, shape.dtype, out);
}

// Tokens first .. first+n-1 of a list, of `layers` layers from `layer` on.
static void make_rows(const uint32_t *tokens, uint64_t first, uint64_t n, uint32_t layer, uint32_t layers,
                      uint8_t *keys, uint8_t *values)
{
    for (uint32_t i = 0; i < layers; i++) {
        for (uint64_t token = 0; token < n; token++) {
            for (uint32_t head = 0; head < shape.kv_heads; head++) {
                const size_t at = ((i * n + token) * shape.kv_heads + head) * row_bytes();
                make_row(tokens[first + token], layer + i, head, false, keys + at);
                make_row(tokens[first + token], layer + i, head, true, values + at);
            }
        }
    }
}

static uint64_t shortest(const struct modelled *modelled)
{
    return modelled->lengths[0] < modelled->lengths[1] ? modelled->lengths[0] : modelled->lengths[1];
}

static uint64_t longest(const struct modelled *modelled)
{
    return modelled->lengths[0] > modelled->lengths[1] ? modelled->lengths[0] : modelled->lengths[1];
}

static void set_lengths(struct modelled *modelled, uint64_t length)
{
    modelled->lengths[0] = modelled->lengths[1] = length;
}

// ---- operations ----

static ice_status send_rows(struct model *model, struct modelled *modelled, uint32_t layer, uint64_t first, uint64_t n)
{
    const uint32_t layers = layer == ICE_ALL_LAYERS ? shape.layers : 1;
    const size_t bytes = layers * n * shape.kv_heads * row_bytes();
    make_rows(modelled->tokens, first, n, layer == ICE_ALL_LAYERS ? 0 : layer, layers, model->keys, model->values);
    const struct ice_kv_source source = {.keys = model->keys,
                                         .values = model->values,
                                         .keys_bytes = bytes,
                                         .values_bytes = bytes,
                                         .layer_stride = n * shape.kv_heads * row_bytes(),
                                         .token_stride = shape.kv_heads * row_bytes(),
                                         .head_stride = row_bytes()};
    return ice_append(modelled->handle, layer, first, n, &source, 0, NULL);
}

// Of new tokens, and at times of some that are there, also of tokens before a fork.
static void append(struct model *model, struct modelled *modelled)
{
    const uint64_t length = shortest(modelled), back = draw(model, 3) == 0 ? draw(model, 60) : 0;
    const uint64_t first = back < length ? length - back : 0;
    uint64_t n = 1 + draw(model, draw(model, 4) == 0 ? 500 : 40) + (length - first);
    const bool one = draw(model, 8) == 0; // a step that is broken off in the middle
    n = n < TOKENS - first ? n : TOKENS - first;
    if (n == 0)
        return;
    for (uint64_t i = longest(modelled); i < first + n; i++)
        modelled->tokens[i] = ++model->next_token;
    assert_ok(send_rows(model, modelled, one ? 0 : ICE_ALL_LAYERS, first, n));
    for (uint32_t layer = 0; layer < (one ? 1 : shape.layers); layer++)
        modelled->lengths[layer] = modelled->lengths[layer] > first + n ? modelled->lengths[layer] : first + n;
}

// Other bytes over what is there, in whichever stem that is.
static void contradict(struct model *model, struct modelled *modelled)
{
    const uint64_t length = shortest(modelled), first = draw(model, length), n = 1 + draw(model, length - first);
    const uint64_t wrong = first + draw(model, n);
    modelled->tokens[wrong] ^= 0x40000000u;
    assert_status(send_rows(model, modelled, ICE_ALL_LAYERS, first, n), ICE_CONFLICT);
    modelled->tokens[wrong] ^= 0x40000000u;
    model->refused++;
}

static struct modelled *closed_one(struct model *model)
{
    for (uint32_t i = 0; i < SEQUENCES; i++)
        if (!model->sequences[i].handle)
            return &model->sequences[i];
    return NULL;
}

static void open_one(struct model *model)
{
    struct modelled *modelled = closed_one(model);
    if (!modelled)
        return;
    set_lengths(modelled, 0);
    modelled->handle = sequence_open(model->client, &shape);
}

static void fork_one(struct model *model, struct modelled *parent)
{
    struct modelled *child = closed_one(model);
    const uint64_t length = shortest(parent);
    const uint64_t tokens = draw(model, 3) == 0 ? draw(model, length + 1) : ICE_ALL_TOKENS;
    ice_sequence *handle;
    if (!child)
        return;
    const ice_status status = ice_sequence_fork(parent->handle, tokens, 0, &handle);
    if (status == ICE_CONFLICT && longest(parent) != length) { // in the middle of a step
        model->refused++;
        return;
    }
    status_check(status, ICE_OK, "ice_sequence_fork", __FILE__, __LINE__);
    *child = *parent;
    child->handle = handle;
    set_lengths(child, tokens == ICE_ALL_TOKENS ? length : tokens);
    model->forks++;
}

static void truncate_one(struct model *model, struct modelled *modelled)
{
    const uint64_t length = longest(modelled);
    const uint64_t tokens = draw(model, 2) == 0 ? shortest(modelled) : draw(model, length + 1);
    assert_ok(ice_sequence_truncate(modelled->handle, tokens, 0));
    assert_ok(ice_sequence_truncate(modelled->handle, tokens, 0)); // again
    for (uint32_t layer = 0; layer < shape.layers; layer++)
        modelled->lengths[layer] = modelled->lengths[layer] < tokens ? modelled->lengths[layer] : tokens;
    if (longest(modelled) < TOKENS)
        assert_status(ice_sequence_truncate(modelled->handle, longest(modelled) + 1, 0), ICE_OUT_OF_BOUNDS);
    model->truncations++;
}

static void read_some(struct model *model, struct modelled *modelled, bool all)
{
    const uint64_t length = shortest(modelled), first = all ? 0 : draw(model, length);
    const uint64_t n = all ? length : 1 + draw(model, length - first);
    const size_t bytes = shape.layers * n * shape.kv_heads * row_bytes();
    const struct ice_kv_target target = {.keys = model->got_keys,
                                         .values = model->got_values,
                                         .keys_bytes = bytes,
                                         .values_bytes = bytes,
                                         .layer_stride = n * shape.kv_heads * row_bytes(),
                                         .token_stride = shape.kv_heads * row_bytes(),
                                         .head_stride = row_bytes()};
    assert_ok(ice_read(modelled->handle, ICE_ALL_LAYERS, first, n, &target, 0));
    make_rows(modelled->tokens, first, n, 0, shape.layers, model->keys, model->values);
    assert_memory_equal(model->got_keys, model->keys, bytes);
    assert_memory_equal(model->got_values, model->values, bytes);
}

static void expect_slots(struct model *model, const struct modelled *modelled, uint32_t row, uint32_t layer,
                         uint64_t visible, bool all)
{
    for (uint32_t head = 0; head < shape.kv_heads; head++) {
        struct ice_landing_view view;
        bool seen[TOKENS] = {false};
        assert_ok(ice_landing_view(model->landing, row, layer, head, &view));
        for (uint32_t slot = 0; slot < view.count; slot++) {
            uint8_t wanted[2][64];
            const uint32_t position = view.positions[slot];
            assert_true(position < visible && !seen[position]);
            assert_true(!all || position == slot);
            seen[position] = true;
            make_row(modelled->tokens[position], layer, head, false, wanted[0]);
            make_row(modelled->tokens[position], layer, head, true, wanted[1]);
            assert_memory_equal((const uint8_t *)view.keys + slot * row_bytes(), wanted[0], row_bytes());
            assert_memory_equal((const uint8_t *)view.values + slot * row_bytes(), wanted[1], row_bytes());
        }
        assert_true(!all || view.count == visible);
    }
}

static void retrieve_one(struct model *model, struct modelled *modelled)
{
    const uint32_t row = (uint32_t)(modelled - model->sequences), layer = (uint32_t)draw(model, shape.layers);
    const uint64_t length = modelled->lengths[layer];
    const uint32_t n = 1 + (uint32_t)draw(model, 3);
    if (length < n)
        return;
    const bool all = draw(model, 4) == 0;
    const uint64_t first = draw(model, 4) == 0 ? draw(model, length - n + 1) : length - n;
    float queries[3 * 4 * 32];
    for (uint32_t i = 0; i < n * shape.query_heads; i++)
        vector_make(queries + i * shape.head_dim, shape.head_dim, model->random, i, draw(model, 24), 2);
    const struct ice_retrieve_options options = {.landing = model->landing,
                                                 .layer = layer,
                                                 .sequence_count = 1,
                                                 .sequences = &modelled->handle,
                                                 .rows = &row,
                                                 .first_queries = &first,
                                                 .queries = n,
                                                 .query_vectors = queries,
                                                 .query_dtype = ICE_FP32,
                                                 .budget = all ? TOKENS - 40 : 1 + (uint32_t)draw(model, 120),
                                                 .sinks = (uint32_t)draw(model, 20),
                                                 .window = (uint32_t)draw(model, 20),
                                                 .granularity = draw(model, 4) == 0 ? ICE_PAGE_WISE : ICE_TOKEN_WISE,
                                                 .deadline_us = TEST_DEADLINE_US};
    struct ice_retrieve_result result;
    assert_ok(ice_retrieve(model->client, &options, &result));
    assert_false(result.partial);
    expect_slots(model, modelled, row, layer, first + n, all && first + n <= TOKENS - 40);
    for (uint32_t head = 0; head < result.head_count; head++)
        assert_true(result.masses[head] >= 0 && result.masses[head] < 1.001f);
    model->retrieves++;
}

// ---- sealed prefixes ----

static void seal_one(struct model *model, const struct modelled *modelled)
{
    struct modelled_seal *seal = &model->seals[draw(model, SEALS)];
    const uint64_t blocks = shortest(modelled) / BLOCK;
    struct ice_seal_result sealed;
    if (seal->id) {
        assert_ok(ice_prefix_remove_from(model->client, "tests", seal->id, 0));
        for (uint32_t i = 0; i < SEALS; i++) // equal beginnings are one prefix
            model->seals[i].id = model->seals[i].id == seal->id && &model->seals[i] != seal ? 0 : model->seals[i].id;
        seal->id = 0;
    }
    if (blocks == 0)
        return;
    seal->length = (1 + draw(model, blocks)) * BLOCK;
    memcpy(seal->tokens, modelled->tokens, seal->length * sizeof *seal->tokens);
    assert_ok(ice_block_hashes(seal->tokens, seal->length, BLOCK, NULL, 0, seal->hashes));
    assert_ok(ice_sequence_seal(modelled->handle, seal->hashes, seal->length / BLOCK, 0, &sealed));
    assert_int_equal(sealed.tokens, seal->length);
    seal->id = sealed.prefix_id;
}

static void attach_one(struct model *model)
{
    struct modelled *modelled = closed_one(model);
    const struct modelled_seal *seal = &model->seals[draw(model, SEALS)];
    const struct ice_sequence_options options = sequence_options(&shape);
    if (!modelled || !seal->id)
        return;
    const uint64_t most = draw(model, 2) == 0 ? 0 : BLOCK * (1 + draw(model, seal->length / BLOCK));
    uint64_t tokens;
    assert_ok(ice_sequence_attach(model->client, &options, seal->hashes, seal->length / BLOCK, most, 0,
                                  &modelled->handle, &tokens));
    assert_int_equal(tokens, most ? most : seal->length);
    memcpy(modelled->tokens, seal->tokens, tokens * sizeof *seal->tokens);
    set_lengths(modelled, tokens);
    model->attached++;
}

// ---- schedules ----

static void step(struct model *model, bool seals)
{
    struct modelled *modelled = &model->sequences[draw(model, SEQUENCES)];
    const uint64_t what = draw(model, 100);
    if (what < 6) {
        open_one(model);
    } else if (what < 10 && seals) {
        attach_one(model);
    } else if (!modelled->handle) {
        return;
    } else if (what < 40) {
        append(model, modelled);
    } else if (what < 50) {
        fork_one(model, modelled);
    } else if (what < 56) {
        truncate_one(model, modelled);
    } else if (what < 60) {
        ice_sequence_close(modelled->handle);
        modelled->handle = NULL;
    } else if (shortest(modelled) == 0) {
        return;
    } else if (what < 62) {
        contradict(model, modelled);
    } else if (what < 66 && seals) {
        seal_one(model, modelled);
    } else if (what < 76) {
        read_some(model, modelled, false);
    } else {
        retrieve_one(model, modelled);
    }
}

static void model_open(struct model *model, const struct daemon *daemon, uint64_t seed)
{
    const size_t bytes = (size_t)shape.layers * TOKENS * shape.kv_heads * row_bytes();
    *model = (struct model){.random = seed, .keys = malloc(4 * bytes)};
    assert_non_null(model->keys);
    model->values = model->keys + bytes;
    model->got_keys = model->values + bytes;
    model->got_values = model->got_keys + bytes;
    model->client = client_connect(daemon->sockets, TEST_DEADLINE_US, 4u << 20);
    model->landing = landing_open(model->client, &shape, SEQUENCES, SLOTS);
}

static void model_close(struct model *model)
{
    for (uint32_t i = 0; i < SEQUENCES; i++) {
        struct modelled *modelled = &model->sequences[i];
        if (modelled->handle && shortest(modelled) > 0)
            read_some(model, modelled, true);
        ice_sequence_close(modelled->handle);
    }
    for (uint32_t i = 0; i < SEALS; i++) {
        for (uint32_t k = i + 1; k < SEALS; k++)
            model->seals[k].id = model->seals[k].id == model->seals[i].id ? 0 : model->seals[k].id;
        if (model->seals[i].id)
            assert_ok(ice_prefix_remove_from(model->client, "tests", model->seals[i].id, 0));
    }
    ice_landing_close(model->landing);
    ice_client_close(model->client);
    free(model->keys);
}

static void play(const struct daemon *daemon, bool seals)
{
    static struct model model;
    const char *one = getenv("ICECACHE_TEST_SEED");
    const uint32_t seeds = one ? 1 : scaled_count(2, 20), steps = scaled_rounds(1500, 6000);
    uint64_t forks = 0, truncations = 0, attached = 0, refused = 0;
    struct stats_held before;
    stats_held(daemon, &before);
    for (uint32_t seed = 0; seed < seeds; seed++) {
        model_open(&model, daemon, one ? strtoull(one, NULL, 0) : seed + 1);
        for (uint32_t i = 0; i < steps; i++)
            step(&model, seals);
        model_close(&model);
        forks += model.forks;
        truncations += model.truncations;
        attached += model.attached;
        refused += model.refused;
        // Whatever was forked, cut and sealed: all of it is back.
        stats_wait(daemon, &before, TEST_DEADLINE_US);
    }
    assert_true(forks > 0 && truncations > 0 && refused > 0 && (!seals || attached > 0));
    print_message("forks %llu, truncations %llu, attached %llu, refused %llu\n", (unsigned long long)forks,
                  (unsigned long long)truncations, (unsigned long long)attached, (unsigned long long)refused);
}

static void holds_in_memory(void **state)
{
    play(*state, false);
}

static void holds_on_disk(void **state)
{
    play(*state, true);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        DAEMON_TEST_WITH(holds_in_memory, in_memory),
        DAEMON_TEST_WITH(holds_on_disk, on_disk),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
