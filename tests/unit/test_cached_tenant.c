// Namespaces: the table and its limit, quotas with what is used and promised, the count of those that are over, and
// which sealed prefix goes first.
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>

#include <cmocka.h>

#include "cached/env_linux.h"
#include "cached/prefix.h"
#include "cached/tenant.h"

#include <pthread.h>
#include <stdio.h>
#include <string.h>

static struct env env;
static struct config config;
static struct tenants tenants;

static int set_up(void **state)
{
    (void)state;
    env_linux_init(&env);
    memset(&config, 0, sizeof config);
    memset(&tenants, 0, sizeof tenants);
    config.namespaces_max = 3;
    return 0;
}

static int tear_down(void **state)
{
    (void)state;
    tenants_fini(&tenants, &env);
    return 0;
}

static struct tenant *take(const char *name)
{
    ice_status status = ICE_INTERNAL;
    struct tenant *tenant = tenant_take(&tenants, &env, &config, name, false, &status);
    assert_true((tenant != NULL) == (status == ICE_OK));
    return tenant;
}

static void quota(const char *name_space, uint64_t ram_bytes, uint64_t disk_bytes, uint64_t sequences)
{
    struct config_quota *place = &config.quotas[config.quota_count++];
    *place = (struct config_quota){.ram_bytes = ram_bytes, .disk_bytes = disk_bytes, .sequences = sequences};
    snprintf(place->name_space, sizeof place->name_space, "%s", name_space);
}

static void found_by_name_up_to_the_limit(void **state)
{
    (void)state;
    ice_status status;
    assert_null(tenant_find(&tenants, "a"));
    struct tenant *a = take("a"), *b = take("b"), *c = take("c");
    assert_true(a != b && b != c && take("b") == b && tenant_find(&tenants, "c") == c);
    assert_null(tenant_take(&tenants, &env, &config, "d", false, &status));
    assert_int_equal(status, ICE_LIMIT);
    struct tenant *d = tenant_take(&tenants, &env, &config, "d", true, &status); // as of a prefix on the disk
    assert_non_null(d);
    assert_int_equal(tenants.count, 4);
    a->sequences = 1;
    tenant_drop_empty(&tenants, &env, a);
    assert_true(tenant_find(&tenants, "a") == a);
    a->sequences = 0;
    tenant_drop_empty(&tenants, &env, a);
    assert_null(tenant_find(&tenants, "a"));
    tenant_drop_empty(&tenants, &env, d);
    assert_non_null(take("e"));
}

// Those of --quota are there from the start and stay.
static void named_ones_stay(void **state)
{
    (void)state;
    quota("a", 0, 0, 2);
    assert_true(tenants_init(&tenants, &env, &config));
    struct tenant *a = tenant_find(&tenants, "a");
    assert_non_null(a);
    tenant_drop_empty(&tenants, &env, a);
    assert_true(tenant_find(&tenants, "a") == a);
}

static void sequences_are_counted(void **state)
{
    (void)state;
    char text[TENANT_TEXT_BYTES];
    quota("a", 0, 0, 2);
    config.quota_default.sequences = 1;
    struct tenant *a = take("a"), *other = take("other");
    assert_int_equal(tenant_may_open(a, text), ICE_OK);
    a->sequences = 2;
    assert_int_equal(tenant_may_open(a, text), ICE_QUOTA);
    assert_string_equal(text, "namespace 'a' has 2 sequences open, its quota is sequences=2; close some or raise "
                              "--quota");
    other->sequences = 1;
    assert_int_equal(tenant_may_open(other, text), ICE_QUOTA);
    a->sequences = other->sequences = 0;
}

// What was promised counts for others and not for whom it was promised to; a need of nothing is never refused.
static void memory_without_a_disk(void **state)
{
    (void)state;
    char text[TENANT_TEXT_BYTES];
    struct tenant_promise mine = {0}, other = {0};
    const struct tenant_need big = {.pool_bytes = 50, .index_bytes = 20}, small = {.pool_bytes = 11}, none = {0};
    quota("a", 100, 1, 0);
    struct tenant *a = take("a");
    tenant_add_ram(a, 20);
    assert_int_equal(tenant_may_take(a, &mine, &big, false, text), ICE_OK);
    assert_int_equal(tenant_may_take(a, &mine, &big, false, text), ICE_OK); // set, not added
    assert_int_equal(tenant_may_take(a, &other, &small, false, text), ICE_QUOTA);
    assert_string_equal(text, "namespace 'a' has 90 bytes of memory in use or promised and needs 11 more, its quota is "
                              "100; close sequences or raise ram= of its --quota");
    assert_true(tenants.refused == a && !tenants.refused_for_disk);
    assert_true(other.ram_bytes == 0 && a->ram_promised == 70);
    tenant_unpromise(a, &mine);
    assert_int_equal(a->ram_promised, 0);
    assert_int_equal(tenant_may_take(a, NULL, &small, false, text), ICE_OK);
    assert_int_equal(a->ram_promised, 0);
    tenant_add_ram(a, 200);
    assert_int_equal(tenant_may_take(a, NULL, &none, false, text), ICE_OK);
    assert_int_equal(tenant_may_take(a, NULL, &small, false, text), ICE_QUOTA);
    tenant_add_ram(a, -220);
}

// Pages are the disk's then, trees the memory's.
static void memory_with_a_disk(void **state)
{
    (void)state;
    char text[TENANT_TEXT_BYTES];
    const struct tenant_need pages = {.pool_bytes = 1000, .disk_bytes = 50}, trees = {.index_bytes = 60};
    quota("a", 100, 100, 0);
    struct tenant *a = take("a");
    tenant_add_ram(a, 500); // of pages: they will go
    tenant_add_index(a, 40);
    tenant_add_disk(a, 50);
    assert_int_equal(tenant_may_take(a, NULL, &pages, true, text), ICE_OK);
    assert_int_equal(tenant_may_take(a, NULL, &trees, true, text), ICE_OK);
    tenant_add_index(a, 1);
    assert_int_equal(tenant_may_take(a, NULL, &trees, true, text), ICE_QUOTA);
    assert_non_null(strstr(text, "41 bytes of trees in memory"));
    assert_false(tenants.refused_for_disk);
    tenant_add_disk(a, 1);
    assert_int_equal(tenant_may_take(a, NULL, &pages, true, text), ICE_QUOTA);
    assert_non_null(strstr(text, "51 bytes of disk"));
    assert_true(tenants.refused_for_disk);
    tenant_add_ram(a, -500);
    tenant_add_index(a, -41);
    tenant_add_disk(a, -51);
}

static void longest_text_fits(void **state)
{
    (void)state;
    char text[TENANT_TEXT_BYTES], name[WIRE_NAME_BYTES_MAX + 1];
    const struct tenant_need need = {.disk_bytes = UINT64_MAX / 2};
    memset(name, 'n', sizeof name - 1);
    name[sizeof name - 1] = '\0';
    quota(name, 1ull << 46, 1ull << 46, 1);
    struct tenant *tenant = take(name);
    tenant_add_disk(tenant, INT64_MAX);
    assert_int_equal(tenant_may_take(tenant, NULL, &need, true, text), ICE_QUOTA);
    assert_non_null(strstr(text, "raise disk= of its --quota"));
    tenant_add_disk(tenant, -INT64_MAX);
}

enum { THREADS = 4, ROUNDS = 20000 };

static void *wander(void *argument)
{
    struct tenant *tenant = argument;
    for (int i = 0; i < ROUNDS; i++) {
        tenant_add_ram(tenant, 1 + i % 40);
        tenant_add_index(tenant, 7);
        tenant_add_ram(tenant, -(1 + i % 40));
        tenant_add_index(tenant, -7);
    }
    return NULL;
}

// However the steps of several threads mix, those over their quota are as many as it says in the end.
static void over_is_counted_once(void **state)
{
    (void)state;
    pthread_t threads[THREADS];
    quota("a", 60, 0, 0);
    struct tenant *a = take("a"), *free = take("free");
    tenant_add_ram(NULL, 5); // of nobody
    tenant_add_ram(free, 1 << 30);
    assert_false(tenants_are_over_ram(&tenants) || tenant_is_over_ram(free) || tenant_is_over_ram(NULL));
    tenant_add_ram(a, 60);
    assert_false(tenants_are_over_ram(&tenants) || tenant_is_over_ram(a));
    tenant_add_ram(a, 1);
    assert_true(tenants_are_over_ram(&tenants) && tenant_is_over_ram(a));
    tenant_add_ram(a, -31);
    assert_false(tenants_are_over_ram(&tenants));
    for (int i = 0; i < THREADS; i++)
        assert_int_equal(pthread_create(&threads[i], NULL, wander, a), 0);
    for (int i = 0; i < THREADS; i++)
        pthread_join(threads[i], NULL);
    assert_int_equal(atomic_load(&tenants.ram_over), 0);
    assert_int_equal(atomic_load(&a->ram_bytes), 30);
    tenant_add_ram(a, -30);
    tenant_add_ram(free, -(1 << 30));
}

// ---- which prefix makes room ----

static struct prefix prefix_of(uint32_t tokens, uint64_t bytes_per_token, uint64_t used_ns)
{
    return (struct prefix){
        .identity = {.layers = 32, .kv_heads = 8, .query_heads = 32, .head_dim = 128, .block_tokens = 16},
        .block_count = tokens / 16,
        .counted_disk_bytes = tokens * bytes_per_token,
        .used_ns = used_ns,
    };
}

static void cold_and_cheap_ones_go_first(void **state)
{
    (void)state;
    const uint64_t now = 1000000000000;
    const struct prefix longer = prefix_of(131072, 131072, now - 1000), shorter = prefix_of(4096, 131072, now - 1000);
    assert_true(prefix_evict_score(&shorter, now) > prefix_evict_score(&longer, now)); // equally cold
    const struct prefix colder = prefix_of(131072, 131072, now - 2000);
    assert_true(prefix_evict_score(&colder, now) > prefix_evict_score(&longer, now));
    const struct prefix coldest = prefix_of(131072, 131072, now - 100000);
    assert_true(prefix_evict_score(&coldest, now) >
                prefix_evict_score(&shorter, now)); // cold enough, the long one goes
    const struct prefix larger = prefix_of(4096, 262144, now - 1000);
    assert_true(prefix_evict_score(&larger, now) > prefix_evict_score(&shorter, now)); // more room for the same work
    // 12 d^2 a token and n d of attention: at 12 d tokens both are the same.
    const double one = prefix_rebuild_cost(&longer.identity, 1),
                 many = prefix_rebuild_cost(&longer.identity, 12 * 4096);
    assert_true(many / one > 2 * 12 * 4096 * 0.999 && many / one < 2 * 12 * 4096 * 1.001);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(found_by_name_up_to_the_limit, set_up, tear_down),
        cmocka_unit_test_setup_teardown(named_ones_stay, set_up, tear_down),
        cmocka_unit_test_setup_teardown(sequences_are_counted, set_up, tear_down),
        cmocka_unit_test_setup_teardown(memory_without_a_disk, set_up, tear_down),
        cmocka_unit_test_setup_teardown(memory_with_a_disk, set_up, tear_down),
        cmocka_unit_test_setup_teardown(longest_text_fits, set_up, tear_down),
        cmocka_unit_test_setup_teardown(over_is_counted_once, set_up, tear_down),
        cmocka_unit_test(cold_and_cheap_ones_go_first),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
