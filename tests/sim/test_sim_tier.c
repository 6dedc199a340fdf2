// The spill tier under schedules drawn by chance: requests of several sequences on one or two shards, a disk that
// answers in any order and fails at times, a pool of a few pages, a clock that passes deadlines. One thread plays all
// of them, a step at a time; between two steps every invariant is looked at (check.c), and what a request returns is
// compared with a plain copy of K and V: equal, or ICE_PAGE_LOST where a read was made to fail, never other bytes.
//
// A seed is a world and its schedule. ICECACHE_TEST_SEED=n plays that one alone; ICECACHE_TEST_FULL=1 plays many.
#include "world.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static struct world world;

static struct world_shape draw_shape(struct rng *rng)
{
    const bool two_sizes = rng_chance(rng, 3);
    struct world_shape shape = {
        .shards = 1 + rng_below(rng, WORLD_SHARDS),
        .page_tokens = rng_chance(rng, 2) || two_sizes ? 64 : 16,
        .slabs = two_sizes ? 1 + rng_below(rng, 3) : 1,
        .spill_bytes = 64u << 20,
        .index_bytes = 64u << 20,
        .head_dims = {64, two_sizes ? 128 : 64},
        .patient = !rng_chance(rng, 3),
    };
    if (!two_sizes)
        shape.frames = shape.page_tokens == 64 ? 6 + rng_below(rng, 60) : 16 + rng_below(rng, 200);
    if (rng_chance(rng, 8))
        shape.spill_bytes = 8u << 20;
    if (rng_chance(rng, 8))
        shape.index_bytes = 4u << 20;
    if (rng_chance(rng, 3))
        shape.read_faults = 20 + rng_below(rng, 400);
    if (rng_chance(rng, 4))
        shape.write_faults = 10 + rng_below(rng, 100);
    return shape;
}

static enum sim_fault draw_fault(struct rng *rng, const struct disk_request *request)
{
    const uint32_t in = request->op == DISK_READ ? world.shape.read_faults : world.shape.write_faults;
    if (in == 0 || !rng_chance(rng, in))
        return SIM_WELL;
    return request->op == DISK_READ && rng_chance(rng, 2) ? SIM_OLD_BYTES : SIM_FAILS;
}

static void answer_one(struct rng *rng, bool may_fail)
{
    struct sim_disk *disk = &world.disk;
    if (disk->held_count == 0)
        return;
    const uint32_t which = rng_below(rng, disk->held_count);
    sim_disk_answer(disk, which, may_fail ? draw_fault(rng, disk->held[which]) : SIM_WELL);
}

static void move_clock(struct rng *rng)
{
    world_now_ns += 1000u << rng_below(rng, 10);
    if (!world.shape.patient && rng_chance(rng, 300))
        world_now_ns += (uint64_t)rng_below(rng, 12000) * 1000000u;
}

static void request_something(struct rng *rng)
{
    static const enum op_kind kinds[] = {OP_APPEND,   OP_APPEND, OP_APPEND, OP_RETRIEVE, OP_RETRIEVE,
                                         OP_RETRIEVE, OP_READ,   OP_SLEEP,  OP_SLEEP,    OP_SEAL,
                                         OP_TRUNCATE, OP_HINT,   OP_HINT};
    struct member *member = &world.members[rng_below(rng, WORLD_SEQUENCES)];
    if (member->open)
        world_request(&world, member, kinds[rng_below(rng, sizeof kinds / sizeof *kinds)]);
}

static void come_and_go(struct rng *rng)
{
    struct member *member = &world.members[rng_below(rng, WORLD_SEQUENCES)];
    struct seal *seal = &world.seals[rng_below(rng, WORLD_SEALS)];
    if (!member->open) {
        struct member *parent = &world.members[rng_below(rng, WORLD_SEQUENCES)];
        const bool attaches = seal->prefix && rng_chance(rng, 2);
        const uint64_t all = attaches ? seal->tokens : parent->open ? member_length(parent) : 0;
        const uint64_t tokens = all > 0 && rng_chance(rng, 2) ? 1 + rng_below(rng, (uint32_t)all) : all;
        if (attaches || !parent->open || rng_chance(rng, 3))
            world_open(&world, member, attaches ? seal : NULL, attaches ? tokens : 0);
        else
            world_fork(&world, parent, member, tokens);
    } else if (!member->closing && !member->writer && member->readers + member->hints == 0 && rng_chance(rng, 4)) {
        world_close(&world, member);
    } else if (seal->prefix && seal->prefix->attached == 0 && rng_chance(rng, 4)) {
        world_unseal(&world, seal);
    }
}

static void cancel_something(struct rng *rng)
{
    struct work *work = &world.works[rng_below(rng, WORLD_OPS)];
    if (work->used)
        atomic_store(&work->op.cancelled, true);
}

static void run_shard(struct rng *rng)
{
    assert_true(shard_round(&world.shards[rng_below(rng, world.shape.shards)], false));
}

static void step(void)
{
    struct rng *rng = &world.rng;
    const uint32_t draw = rng_below(rng, 1000);
    world.steps++;
    if (draw < 60)
        request_something(rng);
    else if (draw < 66)
        come_and_go(rng);
    else if (draw < 67)
        cancel_something(rng);
    else if (draw < 350)
        answer_one(rng, true);
    else if (draw < 500)
        move_clock(rng);
    else
        run_shard(rng);
    world_take_ends(&world);
    world_check(&world);
}

// The disk answers and the shards run: nothing may wait for longer than this.
static void settle(const char *what)
{
    for (uint32_t i = 0; !world_is_idle(&world); i++) {
        for (uint32_t n = 0; n < 8; n++)
            answer_one(&world.rng, false);
        for (uint32_t n = 0; n < 4; n++)
            run_shard(&world.rng);
        world_now_ns += i < 25000 ? 500000 : 5000000; // who still waits is a seal: each settles for ten seconds
        world.steps++;
        world_take_ends(&world);
        world_check(&world);
        if (i > 60000)
            fail_msg("%s: something waits for ever", what);
    }
}

// All of every sequence is read, as far as no page is lost.
static void read_all(void)
{
    for (uint32_t i = 0; i < WORLD_SEQUENCES; i++) {
        struct member *member = &world.members[i];
        for (uint32_t n = 0; member->open && n < 3; n++) {
            world_request(&world, member, n == 1 ? OP_RETRIEVE : OP_READ);
            settle("reading at the end");
        }
    }
}

static void close_all(void)
{
    for (uint32_t i = 0; i < WORLD_SEQUENCES; i++)
        if (world.members[i].open)
            world_close(&world, &world.members[i]);
    settle("closing at the end");
    for (uint32_t i = 0; i < WORLD_SEALS; i++)
        if (world.seals[i].prefix)
            world_unseal(&world, &world.seals[i]);
}

static uint64_t totals[OP_HINT + 1], evicted, lost, partial, hinted, hinted_used, hinted_wasted, hinted_late;
static struct seen seen;

static void note_seen(void)
{
    const struct seen *from = &world.seen;
    seen.plans_reading += from->plans_reading;
    seen.plans_spilling += from->plans_spilling;
    seen.appends_spilling += from->appends_spilling;
    seen.gathers_spilling += from->gathers_spilling;
    seen.drops_reading += from->drops_reading;
    seen.drops_writing += from->drops_writing;
    seen.slabs_given_up += from->slabs_given_up;
    seen.shared_building += from->shared_building;
    seen.shared_asleep += from->shared_asleep;
}

static void play(uint64_t seed, uint32_t steps)
{
    struct rng rng = {seed};
    const struct world_shape shape = draw_shape(&rng);
    print_message("seed %llu: %u shards, pages of %u, head_dim %u and %u, %u slabs, %u frames%s\n",
                  (unsigned long long)seed, shape.shards, shape.page_tokens, shape.head_dims[0], shape.head_dims[1],
                  shape.slabs, shape.frames, shape.patient ? ", patient" : "");
    world_init(&world, &shape, rng_next(&rng));
    for (uint32_t i = 0; i < steps; i++)
        step();
    settle("after the schedule");
    read_all();
    close_all();
    for (unsigned i = 0; i <= OP_HINT; i++)
        totals[i] += world.kinds[i];
    evicted += atomic_load(&world.server.tier_stats.pages_evicted);
    hinted += atomic_load(&world.server.tier_stats.hinted);
    hinted_used += atomic_load(&world.server.tier_stats.hinted_used);
    hinted_wasted += atomic_load(&world.server.tier_stats.hinted_wasted);
    hinted_late += atomic_load(&world.server.tier_stats.hinted_late);
    lost += world.lost;
    partial += world.partial;
    note_seen();
    world_fini(&world);
}

// Under a sanitizer a step takes many times as long.
static uint32_t worlds_wanted(void)
{
    const char *full = getenv("ICECACHE_TEST_FULL");
    if (full && strcmp(full, "1") == 0)
        return 2000;
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
    return 20;
#else
    return 40;
#endif
}

static void test_schedules(void **state)
{
    (void)state;
    const char *text = getenv("ICECACHE_TEST_SEED");
    if (text) {
        play(strtoull(text, NULL, 0), 6000);
        return;
    }
    for (uint32_t i = 1; i <= worlds_wanted(); i++)
        play(i, 6000);
    print_message(
        "retrieves %llu (%llu lanes cut short), appends %llu, reads %llu, seals %llu, sleeps %llu, lost %llu, "
        "pages evicted %llu, forks %llu, truncations %llu; of shared stems: plans seen %llu, sleeping lanes %llu\n",
        (unsigned long long)totals[OP_RETRIEVE], (unsigned long long)partial, (unsigned long long)totals[OP_APPEND],
        (unsigned long long)totals[OP_READ], (unsigned long long)totals[OP_SEAL], (unsigned long long)totals[OP_SLEEP],
        (unsigned long long)lost, (unsigned long long)evicted, (unsigned long long)totals[OP_FORK],
        (unsigned long long)totals[OP_TRUNCATE], (unsigned long long)seen.shared_building,
        (unsigned long long)seen.shared_asleep);
    print_message("seen between two steps: plans that read %llu, that spill %llu, appends that spill %llu, selections "
                  "that spill %llu, drops while reading %llu, while writing %llu, slabs given up %llu\n",
                  (unsigned long long)seen.plans_reading, (unsigned long long)seen.plans_spilling,
                  (unsigned long long)seen.appends_spilling, (unsigned long long)seen.gathers_spilling,
                  (unsigned long long)seen.drops_reading, (unsigned long long)seen.drops_writing,
                  (unsigned long long)seen.slabs_given_up);
    print_message("hints %llu, pages that they brought %llu, used %llu, wasted %llu, asked for before %llu\n",
                  (unsigned long long)totals[OP_HINT], (unsigned long long)hinted, (unsigned long long)hinted_used,
                  (unsigned long long)hinted_wasted, (unsigned long long)hinted_late);
    // The schedules came to what they are for.
    assert_true(seen.plans_reading > 0 && seen.plans_spilling > 0 && seen.appends_spilling > 0 &&
                seen.gathers_spilling > 0 && seen.drops_reading > 0 && seen.drops_writing > 0 &&
                seen.slabs_given_up > 0);
    assert_true(totals[OP_RETRIEVE] > 0 && totals[OP_APPEND] > 0 && totals[OP_READ] > 0 && totals[OP_SEAL] > 0 &&
                totals[OP_SLEEP] > 0 && totals[OP_FORK] > 0 && totals[OP_TRUNCATE] > 0 && seen.shared_building > 0 &&
                seen.shared_asleep > 0 && hinted_used > 0 && hinted_wasted > 0 && lost > 0 && partial > 0 &&
                evicted > 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_schedules)};
    setvbuf(stdout, NULL, _IOLBF, 0);
    return cmocka_run_group_tests(tests, NULL, NULL);
}
