// Loss of power at random moments under load: what a sealing that was answered has put on the disk is served bit for
// bit by the next daemon, whatever of the rest has survived, in whatever order and however torn; nothing torn is
// served.
#include "load.h"
#include "power.h"

static const char *const options[] = {DAEMON_WITH_DISK("2m", "64m"),
                                      "--spill-engine",
                                      "threads", // whose calls go through the table
                                      "--hibernate-ms",
                                      LOAD_HIBERNATION,
                                      NULL};

enum { KEEP = 4 };

static void lost_at_any_moment(void **state)
{
    struct daemon *daemon = *state;
    static struct load_ledger ledger;
    uint64_t random = random_seed("lost_at_any_moment");
    uint32_t seals = 0;
    ledger.count = 0;
    struct sick *sick = sick_open(daemon);
    sick->keeps_journal = true;
    sick->seed = random;
    atomic_store(&sick->unlink_pause_us, 40000); // while the other worker writes where there is room
    daemon_start(daemon);
    const uint32_t rounds = load_rounds(12, 300); // more where a slow machine has sealed nothing by then
    for (uint32_t round = 0; round < rounds || (seals == 0 && round < 4 * rounds); round++) {
        struct load load;
        load_start(&load, daemon, random_next(&random), round);
        load_run(&random, 700000);
        power_lose(daemon, sick, &random);
        load_end(&ledger, &load);
        daemon_start(daemon);
        load_check(&ledger, daemon);
        seals += ledger.count;
        load_remove(&ledger, daemon, KEEP);
    }
    assert_true(seals > 0);
    daemon_stop(daemon);
    sick_close(daemon, sick);
}

// A removal is answered when it is durable, however long that takes.
static void removed_is_removed(void **state)
{
    struct daemon *daemon = *state;
    static struct load_ledger ledger;
    struct worker worker;
    uint64_t random = random_seed("removed_is_removed");
    ledger.count = 0;
    struct sick *sick = sick_open(daemon);
    sick->keeps_journal = true;
    daemon_start(daemon);
    load_open(&worker, daemon);
    for (uint32_t document = 0; document < 2; document++)
        load_seal(&ledger, &worker, document, 20 + 30 * document);
    worker_close(&worker);
    atomic_store(&sick->unlink_pause_us, 300000);
    load_remove(&ledger, daemon, 1);
    power_lose(daemon, sick, &random);
    daemon_start(daemon);
    load_check(&ledger, daemon);
    daemon_stop(daemon);
    sick_close(daemon, sick);
}

// Until the manifest is gone for good, what it names is not written to: it may be back.
static void removal_under_way(void **state)
{
    struct daemon *daemon = *state;
    static struct load_ledger ledger;
    uint64_t random = random_seed("removal_under_way");
    ledger.count = 0;
    struct sick *sick = sick_open(daemon);
    sick->keeps_journal = true;
    daemon_start(daemon);
    for (uint32_t round = 0; round < scaled_count(5, 40); round++) {
        struct worker worker;
        struct history history;
        atomic_store(&sick->unlink_pause_us, 0);
        load_remove(&ledger, daemon, 0);
        load_open(&worker, daemon);
        load_seal(&ledger, &worker, 2 * round, LOAD_BLOCKS_MAX);
        ice_sequence_close(worker.sequence);
        worker.sequence = NULL;
        atomic_store(&sick->unlink_pause_us, TEST_DEADLINE_US);
        assert_status(ice_prefix_remove_from(worker.client, "tests", ledger.seals[0].id, 50000), ICE_TIMEOUT);
        ledger.seals[0].state = LOAD_REMOVING;
        load_history(&history, 2 * round + 1); // falls asleep: all of it is written
        worker.sequence = sequence_open(worker.client, &load_shape);
        worker_append(&worker, &history, 0, LOAD_TOKENS_MAX);
        for (uint64_t until = now_us() + TEST_DEADLINE_US, asleep = 0; asleep != 4; sleep_us(5000)) {
            json_t *stats = stats_read(daemon);
            asleep = stats_number(stats, "spill.hibernated");
            json_decref(stats);
            assert_true(now_us() < until);
        }
        power_lose(daemon, sick, &random);
        worker_close(&worker);
        history_destroy(&history);
        atomic_store(&sick->unlink_pause_us, 0);
        daemon_start(daemon);
        load_check(&ledger, daemon);
    }
    daemon_stop(daemon);
    sick_close(daemon, sick);
}

#define STOPPED_TEST(function)                                                                                         \
    cmocka_unit_test_prestate_setup_teardown(function, daemon_setup_stopped, daemon_teardown,                          \
                                             (void *)(uintptr_t)options)

int main(int argc, char **argv)
{
    static const struct role roles[] = {{LOAD_ROLE, load_role}};
    int exit_status;
    if (role_run(argc, argv, roles, 1, &exit_status))
        return exit_status;
    const struct CMUnitTest tests[] = {STOPPED_TEST(lost_at_any_moment), STOPPED_TEST(removed_is_removed),
                                       STOPPED_TEST(removal_under_way)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
