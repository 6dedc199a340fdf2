// What a load was told, held against what a daemon has after its restart.
#include "load.h"

#include "manifests.h"

#include <dirent.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// ---- the ledger ----

static struct load_seal *seal_by_id(struct load_ledger *ledger, uint64_t id)
{
    for (uint32_t i = 0; i < ledger->count; i++) {
        if (ledger->seals[i].id == id)
            return &ledger->seals[i];
    }
    fail_msg("the worker speaks of prefix %016" PRIx64 ", which nobody has sealed", id);
    return NULL;
}

static void drop(struct load_ledger *ledger, struct load_seal *seal)
{
    const size_t behind = (size_t)(ledger->seals + ledger->count - (seal + 1));
    memmove(seal, seal + 1, behind * sizeof *seal);
    ledger->count--;
}

static void enter(struct load_ledger *ledger, const char *line)
{
    struct load_seal seal = {.state = LOAD_SEALING};
    uint64_t id;
    int known;
    if (sscanf(line, "seal %u %u %" SCNu64, &seal.document, &seal.blocks, &seal.digest) == 3) {
        assert_true(ledger->count < LOAD_SEALS_MAX);
        ledger->seals[ledger->count++] = seal;
    } else if (sscanf(line, "sealed %" SCNu64 " %d", &id, &known) == 2) {
        assert_true(ledger->count > 0);
        struct load_seal *last = &ledger->seals[ledger->count - 1];
        assert_int_equal(last->state, LOAD_SEALING);
        last->id = id;
        last->state = LOAD_SEALED;
        if (known)
            drop(ledger, last);
    } else if (sscanf(line, "remove %" SCNu64, &id) == 1) {
        seal_by_id(ledger, id)->state = LOAD_REMOVING;
    } else if (sscanf(line, "removed %" SCNu64, &id) == 1) {
        drop(ledger, seal_by_id(ledger, id));
    } else {
        fail_msg("the worker says: %s", line);
    }
}

void load_start(struct load *load, const struct daemon *daemon, uint64_t seed, uint32_t round)
{
    for (uint32_t i = 0; i < LOAD_WORKERS; i++) {
        char seed_text[32], first_text[32], number_text[32];
        snprintf(seed_text, sizeof seed_text, "%" PRIu64, seed + i);
        snprintf(first_text, sizeof first_text, "%u", (round * LOAD_WORKERS + i) * LOAD_DOCUMENTS);
        snprintf(number_text, sizeof number_text, "%u", i);
        const char *const arguments[] = {LOAD_ROLE, daemon->sockets, seed_text, first_text, number_text, NULL};
        child_start_role(&load->children[i], arguments);
    }
}

#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
#define SLOWER 5u
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer) || __has_feature(address_sanitizer)
#define SLOWER 5u
#endif
#endif
#ifndef SLOWER
#define SLOWER 1u
#endif

void load_run(uint64_t *random, uint64_t most_us)
{
    sleep_us(SLOWER * (50000 + random_below(random, most_us)));
}

uint32_t load_rounds(uint32_t scaled, uint32_t full)
{
    return scaled_count(SLOWER > 1 ? scaled / 2 : scaled, full);
}

// One after the other: the lines wait.
void load_end(struct load_ledger *ledger, struct load *load)
{
    char line[512];
    for (uint32_t i = 0; i < LOAD_WORKERS; i++) {
        while (child_read_line(&load->children[i], line, sizeof line))
            enter(ledger, line);
        child_expect_exit(&load->children[i], 0);
    }
}

// ---- what there is ----

struct listed {
    uint64_t ids[LOAD_SEALS_MAX], tokens[LOAD_SEALS_MAX];
    uint32_t count;
};

static void list_prefixes(const struct daemon *daemon, struct listed *listed)
{
    static char text[1 << 18];
    const char *const arguments[] = {"prefixes", "--json", NULL};
    assert_int_equal(daemon_ctl(daemon, arguments, text, sizeof text), 0);
    json_t *all = json_loads(text, 0, NULL), *row;
    assert_non_null(all);
    size_t i;
    listed->count = 0;
    json_array_foreach(json_object_get(all, "prefix"), i, row)
    {
        assert_true(listed->count < LOAD_SEALS_MAX);
        listed->ids[listed->count] = strtoull(json_string_value(json_object_get(row, "id")), NULL, 16);
        listed->tokens[listed->count++] = (uint64_t)json_integer_value(json_object_get(row, "tokens"));
    }
    json_decref(all);
}

static void take_at(struct listed *listed, uint32_t i)
{
    listed->ids[i] = listed->ids[--listed->count];
    listed->tokens[i] = listed->tokens[listed->count];
}

static bool take(struct listed *listed, uint64_t id)
{
    for (uint32_t i = 0; i < listed->count; i++) {
        if (listed->ids[i] == id) {
            take_at(listed, i);
            return true;
        }
    }
    return false;
}

// Of a sealing that was not answered the id is not known, but how many tokens it has, which no other such one has.
static bool take_unknown(struct listed *listed, struct load_seal *seal)
{
    for (uint32_t i = 0; i < listed->count; i++) {
        if (listed->tokens[i] == seal->blocks * 16u) {
            seal->id = listed->ids[i];
            take_at(listed, i);
            return true;
        }
    }
    return false;
}

// What was answered is there; what was not is there or not, and that is entered.
static void settle(struct load_ledger *ledger, const struct daemon *daemon)
{
    struct listed listed;
    list_prefixes(daemon, &listed);
    for (int unknown = 0; unknown < 2; unknown++) { // at last those whose id is not known: what is left may be theirs
        for (uint32_t i = 0; i < ledger->count;) {
            struct load_seal *seal = &ledger->seals[i];
            if ((seal->state == LOAD_SEALING) != unknown) {
                i++;
            } else if (unknown ? take_unknown(&listed, seal) : take(&listed, seal->id)) {
                seal->state = LOAD_SEALED;
                i++;
            } else if (seal->state == LOAD_SEALED) {
                fail_msg("document %u, sealed with %u blocks as %016" PRIx64 ", is not there", seal->document,
                         seal->blocks, seal->id);
            } else {
                drop(ledger, seal);
            }
        }
    }
    if (listed.count > 0)
        fail_msg("prefix %016" PRIx64 " of %" PRIu64 " tokens is there, which was removed or never sealed",
                 listed.ids[0], listed.tokens[0]);
}

static void check_one(struct worker *worker, const struct load_seal *seal)
{
    static uint8_t hashes[LOAD_BLOCKS_MAX][ICE_HASH_BYTES];
    const struct ice_sequence_options options = sequence_options(&load_shape);
    struct ice_sequence_info info;
    struct history history;
    uint64_t tokens = 0, digest = 0;
    bool equal = false;
    load_hashes(seal->document, hashes);
    load_history(&history, seal->document);
    assert_ok(ice_prefix_lookup(worker->client, &options, hashes, seal->blocks, 0, &tokens));
    assert_int_equal(tokens, seal->blocks * 16);
    assert_ok(ice_sequence_attach(worker->client, &options, hashes, seal->blocks, 0, 0, &worker->sequence, &tokens));
    assert_int_equal(tokens, seal->blocks * 16);
    assert_ok(load_look(worker, &history, tokens, &digest));
    if (digest != seal->digest)
        fail_msg("document %u with %u blocks (%016" PRIx64 ") selects something else than before", seal->document,
                 seal->blocks, seal->id);
    assert_ok(load_read(worker, &history, tokens, &equal));
    assert_true(equal);
    assert_ok(ice_sequence_info(worker->sequence, 0, &info));
    assert_int_equal(info.build_us, 0);
    ice_sequence_close(worker->sequence);
    worker->sequence = NULL;
    history_destroy(&history);
}

static uint64_t spill_bytes(const struct daemon *daemon)
{
    json_t *stats = stats_read(daemon);
    const uint64_t bytes = stats_number(stats, "spill.bytes");
    json_decref(stats);
    return bytes;
}

static void expect_nothing_else(const struct load_ledger *ledger, const struct daemon *daemon)
{
    uint32_t count = 0;
    const uint64_t expected = manifests_bytes(daemon->spill, &count);
    assert_int_equal(count, ledger->count);
    for (uint64_t until = now_us() + TEST_DEADLINE_US; spill_bytes(daemon) != expected; sleep_us(2000)) {
        if (now_us() >= until)
            fail_msg("the spill file has %" PRIu64 " bytes in use, the manifests name %" PRIu64, spill_bytes(daemon),
                     expected);
    }
    DIR *folder = opendir(daemon->spill);
    assert_non_null(folder);
    for (const struct dirent *each; (each = readdir(folder)) != NULL;) {
        const char *dot = strrchr(each->d_name, '.');
        if (each->d_name[0] != '.' && strcmp(each->d_name, "data") != 0 && !(dot && strcmp(dot, ".seal") == 0))
            fail_msg("%s is left over", each->d_name);
    }
    closedir(folder);
}

void load_open(struct worker *worker, const struct daemon *daemon)
{
    worker_open(worker, daemon->sockets, &load_shape, 1, 256);
    ice_sequence_close(worker->sequence);
    worker->sequence = NULL;
}

void load_seal(struct load_ledger *ledger, struct worker *worker, uint32_t document, uint32_t blocks)
{
    static uint8_t hashes[LOAD_BLOCKS_MAX][ICE_HASH_BYTES];
    struct ice_sequence_info info;
    struct ice_seal_result sealed;
    struct history history;
    struct load_seal *seal = &ledger->seals[ledger->count++];
    assert_true(ledger->count <= LOAD_SEALS_MAX);
    *seal = (struct load_seal){.document = document, .blocks = blocks, .state = LOAD_SEALED};
    load_hashes(document, hashes);
    load_history(&history, document);
    ice_sequence_close(worker->sequence);
    worker->sequence = sequence_open(worker->client, &load_shape);
    worker_append(worker, &history, 0, blocks * 16);
    sequence_wait_idle(worker->sequence, &info);
    assert_ok(load_look(worker, &history, blocks * 16, &seal->digest));
    assert_ok(ice_sequence_seal(worker->sequence, hashes, blocks, 0, &sealed));
    assert_false(sealed.known);
    seal->id = sealed.prefix_id;
    history_destroy(&history);
}

void load_check(struct load_ledger *ledger, const struct daemon *daemon)
{
    struct worker worker;
    settle(ledger, daemon);
    expect_nothing_else(ledger, daemon);
    load_open(&worker, daemon);
    for (uint32_t i = 0; i < ledger->count; i++)
        check_one(&worker, &ledger->seals[i]);
    worker_close(&worker);
    expect_nothing_else(ledger, daemon);
}

void load_remove(struct load_ledger *ledger, const struct daemon *daemon, uint32_t keep)
{
    ice_client *client = client_connect(daemon->sockets, TEST_DEADLINE_US, 0);
    while (ledger->count > keep) {
        assert_ok(ice_prefix_remove_from(client, "tests", ledger->seals[0].id, 0));
        drop(ledger, &ledger->seals[0]);
    }
    ice_client_close(client);
}
