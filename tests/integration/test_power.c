// Loss of power at random moments under load: what a sealing that was answered has put on the disk is served bit for
// bit by the next daemon, whatever of the rest has survived, in whatever order and however torn; nothing torn is
// served.
#include "load.h"
#include "power.h"

static const char *const options[] = {"--pool-bytes",
                                      "2m",
                                      "--index-bytes",
                                      "64m",
                                      "--shared-bytes",
                                      "64m",
                                      "--shards",
                                      "2",
                                      "--spill-dir",
                                      DAEMON_SPILL_FOLDER,
                                      "--spill-bytes",
                                      "64m",
                                      "--spill-engine",
                                      "threads", // whose calls go through the table
                                      "--hibernate-ms",
                                      LOAD_HIBERNATION,
                                      NULL};

enum { DOCUMENTS_PER_ROUND = 1000, KEEP = 4 };

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
    daemon_start(daemon);
    for (uint32_t round = 0, rounds = scaled_count(16, 300); round < rounds; round++) {
        struct child load;
        load_start(&load, daemon, random_next(&random), round * DOCUMENTS_PER_ROUND);
        sleep_us(50000 + random_below(&random, 700000));
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

#define STOPPED_TEST(function)                                                                                         \
    cmocka_unit_test_prestate_setup_teardown(function, daemon_setup_stopped, daemon_teardown,                          \
                                             (void *)(uintptr_t)options)

int main(int argc, char **argv)
{
    static const struct role roles[] = {{LOAD_ROLE, load_role}};
    int exit_status;
    if (role_run(argc, argv, roles, 1, &exit_status))
        return exit_status;
    const struct CMUnitTest tests[] = {STOPPED_TEST(lost_at_any_moment), STOPPED_TEST(removed_is_removed)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
