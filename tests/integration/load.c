// The worker under load: a process of its own. It says what it is about to ask for, and what it was answered, one line
// each; a line that has been written outlives it and the daemon.
#include "load.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { LOOKS = 6, SEQUENCES = 3, HISTORY_SEED = 7000 };

const struct shape load_shape = {2, 2, 4, 64, ICE_BF16};

struct open_document {
    ice_sequence *sequence; // NULL: none
    struct history history;
    uint32_t document;
    uint64_t length;
};

struct loader {
    struct worker worker;
    struct open_document open[SEQUENCES];
    uint32_t next_document;
    uint32_t number; // what it seals has so many blocks modulo LOAD_WORKERS, so that others can tell whose it is
    uint64_t random;
    struct load_seal sealed[64]; // the last ones
    uint32_t sealed_count;
};

// ---- documents ----

void load_history(struct history *history, uint32_t document)
{
    history_create(history, &load_shape, LOAD_TOKENS_MAX, HISTORY_SEED + document);
}

void load_hashes(uint32_t document, uint8_t hashes[LOAD_BLOCKS_MAX][ICE_HASH_BYTES])
{
    uint32_t tokens[LOAD_TOKENS_MAX];
    for (uint32_t i = 0; i < LOAD_TOKENS_MAX; i++)
        tokens[i] = i * 7919 + document;
    assert_ok(ice_block_hashes(tokens, LOAD_TOKENS_MAX, 16, NULL, 0, hashes));
}

ice_status load_look(struct worker *worker, const struct history *history, uint64_t length, uint64_t *digest)
{
    *digest = 0;
    for (uint32_t i = 0; i < LOOKS; i++) {
        struct retrieve retrieve;
        struct ice_retrieve_result result;
        const uint32_t layer = i % load_shape.layers;
        retrieve_init(&retrieve, worker, history, layer, length - 1 - i, 1);
        retrieve_ends(&retrieve, 40 + i, 8, 32);
        retrieve.options.deadline_us = TEST_DEADLINE_US;
        const ice_status status = ice_retrieve(worker->client, &retrieve.options, &result);
        retrieve_fini(&retrieve);
        if (status != ICE_OK)
            return status;
        assert_false(result.partial);
        *digest ^= landing_digest(worker->landing, 0, layer, &load_shape);
        *digest = bytes_digest(*digest, result.masses, result.head_count * sizeof *result.masses);
    }
    return ICE_OK;
}

ice_status load_read(const struct worker *worker, const struct history *history, uint64_t length, bool *equal)
{
    const size_t bytes = shape_row_bytes(&load_shape), side = length * load_shape.kv_heads * bytes;
    uint8_t *keys = malloc(side), *values = malloc(side);
    assert_true(keys && values);
    const struct ice_kv_target target = {keys, values, side, side, 0, bytes, length * bytes};
    ice_status status = ICE_OK;
    *equal = true;
    for (uint32_t layer = 0; layer < load_shape.layers && status == ICE_OK; layer++) {
        status = ice_read(worker->sequence, layer, 0, length, &target, TEST_DEADLINE_US);
        for (uint32_t head = 0; head < load_shape.kv_heads && status == ICE_OK; head++) {
            const size_t at = head * length * bytes;
            *equal &= memcmp(keys + at, history_key(history, layer, head, 0), length * bytes) == 0 &&
                      memcmp(values + at, history_value(history, layer, head, 0), length * bytes) == 0;
        }
    }
    free(keys);
    free(values);
    return status;
}

// ---- what the worker does ----

// Ends the process where the daemon has died, which is what it waits for; with a failure where it answers otherwise.
static void need(ice_status status, const char *what)
{
    if (status == ICE_OK)
        return;
    if (status == ICE_DISCONNECTED || status == ICE_UNKNOWN_SESSION || status == ICE_NO_DAEMON)
        exit(0);
    printf("unexpected %s: %s (%s)\n", what, ice_status_name(status), ice_last_error());
    exit(1);
}

static void need_true(bool condition, const char *what)
{
    if (condition)
        return;
    printf("unexpected: %s\n", what);
    exit(1);
}

static void close_document(struct open_document *each)
{
    if (!each->sequence)
        return;
    ice_sequence_close(each->sequence);
    history_destroy(&each->history);
    *each = (struct open_document){0};
}

static void open_document(struct loader *loader, struct open_document *each)
{
    const struct ice_sequence_options options = sequence_options(&load_shape);
    close_document(each);
    need(ice_sequence_open(loader->worker.client, &options, 0, &each->sequence), "open");
    each->document = loader->next_document++;
    load_history(&each->history, each->document);
}

static void wait_idle(const struct open_document *each)
{
    struct ice_sequence_info info;
    for (uint64_t until = now_us() + TEST_DEADLINE_US;; sleep_us(500)) {
        need(ice_sequence_info(each->sequence, 0, &info), "info");
        if (info.idle)
            return;
        need_true(now_us() < until, "it does not become idle");
    }
}

static void append(struct loader *loader, struct open_document *each)
{
    const uint64_t room = (LOAD_TOKENS_MAX - each->length) / 16;
    if (room == 0)
        return;
    const uint64_t blocks = each->length / 16 + 1 + random_below(&loader->random, room);
    const uint64_t tokens = 16 * blocks - each->length;
    const struct ice_kv_source source = history_source(&each->history, ICE_ALL_LAYERS, each->length);
    uint64_t length = 0;
    need(ice_append(each->sequence, ICE_ALL_LAYERS, each->length, tokens, &source, 0, &length), "append");
    each->length = length;
}

static uint64_t look(struct loader *loader, const struct open_document *each)
{
    uint64_t digest = 0;
    loader->worker.sequence = each->sequence;
    wait_idle(each);
    need(load_look(&loader->worker, &each->history, each->length, &digest), "retrieve");
    return digest;
}

static void seal(struct loader *loader, const struct open_document *each)
{
    static uint8_t hashes[LOAD_BLOCKS_MAX][ICE_HASH_BYTES];
    if (each->length < 64 || each->length / 16 % LOAD_WORKERS != loader->number)
        return;
    struct ice_seal_result result;
    struct load_seal sealed = {.document = each->document, .blocks = (uint32_t)(each->length / 16)};
    sealed.digest = look(loader, each);
    load_hashes(each->document, hashes);
    printf("seal %u %u %llu\n", sealed.document, sealed.blocks, (unsigned long long)sealed.digest);
    need(ice_sequence_seal(each->sequence, hashes, sealed.blocks, 0, &result), "seal");
    sealed.id = result.prefix_id;
    printf("sealed %llu %d\n", (unsigned long long)sealed.id, result.known);
    if (result.known)
        return;
    if (loader->sealed_count == sizeof loader->sealed / sizeof *loader->sealed)
        memmove(loader->sealed, loader->sealed + 1, --loader->sealed_count * sizeof *loader->sealed);
    loader->sealed[loader->sealed_count++] = sealed;
}

static void attach(struct loader *loader, struct open_document *each)
{
    static uint8_t hashes[LOAD_BLOCKS_MAX][ICE_HASH_BYTES];
    const struct ice_sequence_options options = sequence_options(&load_shape);
    if (loader->sealed_count == 0)
        return;
    const struct load_seal *sealed = &loader->sealed[random_below(&loader->random, loader->sealed_count)];
    uint64_t tokens = 0;
    close_document(each);
    load_hashes(sealed->document, hashes);
    need(ice_sequence_attach(loader->worker.client, &options, hashes, sealed->blocks, 0, 0, &each->sequence, &tokens),
         "attach");
    load_history(&each->history, sealed->document);
    each->document = sealed->document;
    each->length = tokens;
    need_true(tokens == sealed->blocks * 16u, "attached to another number of tokens");
    need_true(look(loader, each) == sealed->digest, "an attached sequence selects something else");
}

static void remove_one(struct loader *loader)
{
    if (loader->sealed_count == 0)
        return;
    const uint64_t which = random_below(&loader->random, loader->sealed_count);
    const uint64_t id = loader->sealed[which].id;
    printf("remove %llu\n", (unsigned long long)id);
    need(ice_prefix_remove_from(loader->worker.client, "tests", id, TEST_DEADLINE_US), "remove");
    printf("removed %llu\n", (unsigned long long)id);
    loader->sealed[which] = loader->sealed[--loader->sealed_count];
}

static void check(struct loader *loader, const struct open_document *each)
{
    bool equal;
    if (each->length == 0)
        return;
    loader->worker.sequence = each->sequence;
    need(load_read(&loader->worker, &each->history, each->length, &equal), "read");
    need_true(equal, "other bytes than were appended");
}

static void work(struct loader *loader)
{
    struct open_document *each = &loader->open[random_below(&loader->random, SEQUENCES)];
    if (!each->sequence || each->length + 16 > LOAD_TOKENS_MAX)
        open_document(loader, each);
    switch (random_below(&loader->random, 12)) {
    case 0:
        open_document(loader, each);
        break;
    case 1:
    case 2:
        attach(loader, each);
        break;
    case 3:
        check(loader, each);
        break;
    case 4:
        sleep_us(random_below(&loader->random, 150000)); // some of them fall asleep
        break;
    case 5:
        remove_one(loader);
        break;
    case 6:
    case 7:
    case 8:
        seal(loader, each);
        break;
    default:
        append(loader, each);
        break;
    }
}

int load_role(int argc, char **argv)
{
    static struct loader loader;
    if (argc != 5)
        return 2;
    setvbuf(stdout, NULL, _IOLBF, 0);
    loader.random = strtoull(argv[2], NULL, 10);
    loader.next_document = (uint32_t)strtoul(argv[3], NULL, 10);
    loader.number = (uint32_t)strtoul(argv[4], NULL, 10);
    const struct ice_client_options options = {
        .socket_directory = argv[1], .name = "load", .deadline_us = TEST_DEADLINE_US, .staging_bytes = 4u << 20};
    const struct ice_landing_shape landing = landing_shape(&load_shape, 1, 256);
    loader.worker.shape = load_shape;
    loader.worker.slots = 256;
    need(ice_client_connect(&options, &loader.worker.client), "connect");
    need(ice_landing_open(loader.worker.client, &landing, 0, &loader.worker.landing), "landing");
    for (;;)
        work(&loader);
}
