// kill -9 of icecached at random moments under load. After each, a restart must have what the sealings and removals
// that were answered say: every sealed prefix is listed, attached to without clustering, and bit for bit what it was;
// of all else nothing is left.
#include "load.h"

#include <stdlib.h>
#include <string.h>

static const char *const options[] = {DAEMON_WITH_DISK("2m", "128m"), "--hibernate-ms", LOAD_HIBERNATION, NULL};

enum { KEEP = 6 };

static void killed_at_any_moment(void **state)
{
    struct daemon *daemon = *state;
    static struct load_ledger ledger;
    uint64_t random = random_seed("killed_at_any_moment");
    uint32_t seals = 0;
    const uint32_t rounds = load_rounds(12, 200); // more where a slow machine has sealed nothing by then
    for (uint32_t round = 0; round < rounds || (seals == 0 && round < 4 * rounds); round++) {
        struct load load;
        load_start(&load, daemon, random_next(&random), round);
        load_run(&random, 900000);
        daemon_kill(daemon);
        load_end(&ledger, &load);
        daemon_start(daemon);
        load_check(&ledger, daemon);
        seals += ledger.count;
        load_remove(&ledger, daemon, KEEP);
    }
    assert_true(seals > 0);
}

int main(int argc, char **argv)
{
    static const struct role roles[] = {{LOAD_ROLE, load_role}};
    int exit_status;
    if (role_run(argc, argv, roles, 1, &exit_status))
        return exit_status;
    const struct CMUnitTest tests[] = {DAEMON_TEST_WITH(killed_at_any_moment, options)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
