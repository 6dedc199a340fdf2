// What every test of the client begins with: a fake daemon, a client, a landing and a sequence on it.
#ifndef ICECACHE_TESTS_CLIENT_SETUP_H
#define ICECACHE_TESTS_CLIENT_SETUP_H

#include "client/icecache.h"

#include "client_fake.h"

#include <setjmp.h>
#include <stdarg.h>
#include <time.h>

#include <cmocka.h>

enum { LAYERS = 2, KV_HEADS = 2, QUERY_HEADS = 4, HEAD_DIM = 16, ROWS = 8, SLOTS = 8, ROW_BYTES = 32 };
#define HOLD_RETRIEVES (1u << ICECACHE__WIRE__REQUEST__BODY_RETRIEVE)

struct setup {
    struct fake *fake;
    ice_client *client;
    ice_landing *landing;
    ice_sequence *sequence;
};

static inline struct ice_landing_shape landing_shape(void)
{
    return (struct ice_landing_shape){ROWS, LAYERS, KV_HEADS, SLOTS, HEAD_DIM, ICE_BF16};
}

static inline struct ice_sequence_options sequence_options(void)
{
    return (struct ice_sequence_options){.model_digest = "m",
                                         .model_digest_bytes = 1,
                                         .layers = LAYERS,
                                         .kv_heads = KV_HEADS,
                                         .query_heads = QUERY_HEADS,
                                         .head_dim = HEAD_DIM,
                                         .dtype = ICE_BF16};
}

static inline ice_client *connect_to(struct fake *fake, uint64_t deadline_us, uint64_t staging_bytes)
{
    struct ice_client_options options = {.socket_directory = fake->directory,
                                         .name = "test",
                                         .deadline_us = deadline_us,
                                         .staging_bytes = staging_bytes};
    ice_client *client = NULL;
    ice_status status = ice_client_connect(&options, &client);
    if (status != ICE_OK) {
        print_error("%s: %s\n", ice_status_name(status), ice_last_error());
    }
    assert_int_equal(status, ICE_OK);
    assert_string_equal(ice_last_error(), "");
    return client;
}

static inline void open_handles(struct setup *setup)
{
    struct ice_landing_shape shape = landing_shape();
    struct ice_sequence_options options = sequence_options();
    assert_int_equal(ice_landing_open(setup->client, &shape, 0, &setup->landing), ICE_OK);
    assert_int_equal(ice_sequence_open(setup->client, &options, 0, &setup->sequence), ICE_OK);
}

static inline struct setup set_up(uint64_t deadline_us, uint64_t staging_bytes)
{
    struct setup setup = {.fake = fake_start()};
    setup.client = connect_to(setup.fake, deadline_us, staging_bytes);
    open_handles(&setup);
    return setup;
}

static inline void tear_down(struct setup *setup)
{
    ice_sequence_close(setup->sequence);
    ice_landing_close(setup->landing);
    ice_client_close(setup->client);
    fake_stop(setup->fake);
}

// One query position for one sequence into one row. The pointers are the caller's.
static inline struct ice_retrieve_options one_retrieve(struct setup *setup, const uint32_t *row)
{
    static const uint64_t first_query = 100;
    static const uint16_t queries[QUERY_HEADS * HEAD_DIM];
    return (struct ice_retrieve_options){.landing = setup->landing,
                                         .sequence_count = 1,
                                         .sequences = &setup->sequence,
                                         .rows = row,
                                         .first_queries = &first_query,
                                         .query_vectors = queries,
                                         .query_dtype = ICE_BF16,
                                         .budget = 4};
}

static inline uint64_t now_us(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000u + (uint64_t)now.tv_nsec / 1000u;
}

#endif
