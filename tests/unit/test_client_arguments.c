// Every argument is checked before anything is sent, and the text names it.
#include "client_setup.h"

#include <math.h>

static void landing_arguments(void **state)
{
    (void)state;
    struct setup setup = set_up(0, 0);
    const struct {
        struct ice_landing_shape shape;
        ice_status status;
        const char *word;
    } cases[] = {
        {{0, 1, 1, 1, 16, ICE_BF16}, ICE_INVALID_ARGUMENT, "rows"},
        {{1, 0, 1, 1, 16, ICE_BF16}, ICE_INVALID_ARGUMENT, "layers"},
        {{1, 1, 0, 1, 16, ICE_BF16}, ICE_INVALID_ARGUMENT, "kv_heads"},
        {{1, 1, 1, 0, 16, ICE_BF16}, ICE_INVALID_ARGUMENT, "slots"},
        {{1, 1, 1, 1, 0, ICE_BF16}, ICE_INVALID_ARGUMENT, "head_dim"},
        {{1, 1, 1, 1, 20, ICE_BF16}, ICE_INVALID_ARGUMENT, "head_dim"},
        {{1, 1, 1, 1, 272, ICE_BF16}, ICE_TOO_LARGE, "head_dim"},
        {{1, 1, 1, 1, 16, (ice_dtype)0}, ICE_INVALID_ARGUMENT, "dtype"},
        {{5000, 1, 1, 1, 16, ICE_BF16}, ICE_TOO_LARGE, "rows"},
        {{4096, 512, 256, 1 << 24, 256, ICE_FP32}, ICE_TOO_LARGE, "shape"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        ice_landing *landing = NULL;
        assert_int_equal(ice_landing_open(setup.client, &cases[i].shape, 0, &landing), cases[i].status);
        assert_non_null(strstr(ice_last_error(), cases[i].word));
        assert_null(landing);
    }
    struct ice_landing_shape shape = landing_shape();
    ice_landing *landing = NULL;
    assert_int_equal(ice_landing_open(NULL, &shape, 0, &landing), ICE_INVALID_ARGUMENT);
    assert_int_equal(ice_landing_open(setup.client, NULL, 0, &landing), ICE_INVALID_ARGUMENT);
    assert_int_equal(ice_landing_open(setup.client, &shape, 0, NULL), ICE_INVALID_ARGUMENT);
    struct ice_landing_view view;
    assert_int_equal(ice_landing_view(NULL, 0, 0, 0, &view), ICE_INVALID_ARGUMENT);
    assert_int_equal(ice_landing_view(setup.landing, 0, 0, 0, NULL), ICE_INVALID_ARGUMENT);
    assert_int_equal(ice_landing_view(setup.landing, ROWS, 0, 0, &view), ICE_INVALID_ARGUMENT);
    assert_int_equal(ice_landing_view(setup.landing, 0, LAYERS, 0, &view), ICE_UNKNOWN_LAYER);
    assert_int_equal(ice_landing_view(setup.landing, 0, 0, KV_HEADS, &view), ICE_INVALID_ARGUMENT);
    ice_landing_close(NULL);
    assert_int_equal(FAKE_GET(setup.fake, landings_opened), 1);
    tear_down(&setup);
}

#define REFUSED_SEQUENCE(change, expected, word)                                                                       \
    do {                                                                                                               \
        struct ice_sequence_options options = sequence_options();                                                      \
        change;                                                                                                        \
        ice_sequence *sequence = NULL;                                                                                 \
        assert_int_equal(ice_sequence_open(setup.client, &options, 0, &sequence), expected);                           \
        assert_non_null(strstr(ice_last_error(), word));                                                               \
        assert_null(sequence);                                                                                         \
    } while (0)

static void sequence_arguments(void **state)
{
    (void)state;
    struct setup setup = set_up(0, 0);
    char name[WIRE_NAME_BYTES_MAX + 2];
    memset(name, 'n', sizeof name);
    name[sizeof name - 1] = '\0';
    const uint32_t anchors[LAYERS] = {0, 9};
    REFUSED_SEQUENCE(options.layers = 0, ICE_INVALID_ARGUMENT, "layers");
    REFUSED_SEQUENCE(options.layers = 513, ICE_TOO_LARGE, "layers");
    REFUSED_SEQUENCE(options.kv_heads = 0, ICE_INVALID_ARGUMENT, "kv_heads");
    REFUSED_SEQUENCE(options.query_heads = 3, ICE_INVALID_ARGUMENT, "query_heads");
    REFUSED_SEQUENCE(options.query_heads = 1000000, ICE_TOO_LARGE, "query_heads");
    REFUSED_SEQUENCE(options.query_heads = 2 * 65, ICE_INVALID_ARGUMENT, "query_heads");
    REFUSED_SEQUENCE(options.head_dim = 24, ICE_INVALID_ARGUMENT, "head_dim");
    REFUSED_SEQUENCE((options.layers = 512, options.kv_heads = 64, options.query_heads = 64), ICE_TOO_LARGE, "layers");
    REFUSED_SEQUENCE(options.dtype = (ice_dtype)7, ICE_INVALID_ARGUMENT, "dtype");
    REFUSED_SEQUENCE(options.name_space = name, ICE_INVALID_ARGUMENT, "name_space");
    REFUSED_SEQUENCE(options.name_space = "", ICE_INVALID_ARGUMENT, "name_space");
    REFUSED_SEQUENCE(options.model_digest = NULL, ICE_INVALID_ARGUMENT, "model_digest");
    REFUSED_SEQUENCE(options.model_digest_bytes = 65, ICE_INVALID_ARGUMENT, "model_digest");
    REFUSED_SEQUENCE(options.tp_rank = 1, ICE_INVALID_ARGUMENT, "tp_rank");
    REFUSED_SEQUENCE(options.softmax_scale = NAN, ICE_INVALID_ARGUMENT, "softmax_scale");
    REFUSED_SEQUENCE(options.block_tokens = 5000, ICE_TOO_LARGE, "block_tokens");
    REFUSED_SEQUENCE(options.max_tokens = UINT64_MAX, ICE_TOO_LARGE, "max_tokens");
    REFUSED_SEQUENCE(options.anchor_layers = anchors, ICE_INVALID_ARGUMENT, "anchor_layers[1]");
    struct ice_sequence_options options = sequence_options();
    ice_sequence *sequence = NULL;
    assert_int_equal(ice_sequence_open(setup.client, NULL, 0, &sequence), ICE_INVALID_ARGUMENT);
    assert_int_equal(ice_sequence_open(setup.client, &options, 0, NULL), ICE_INVALID_ARGUMENT);
    assert_int_equal(ice_sequence_info(setup.sequence, 0, NULL), ICE_INVALID_ARGUMENT);
    ice_sequence_close(NULL);
    assert_int_equal(FAKE_GET(setup.fake, sequences_opened), 1);
    tear_down(&setup);
}

#define REFUSED_RETRIEVE(change, expected, word)                                                                       \
    do {                                                                                                               \
        uint32_t row = 0;                                                                                              \
        struct ice_retrieve_options options = one_retrieve(&setup, &row);                                              \
        change;                                                                                                        \
        assert_int_equal(ice_retrieve(setup.client, &options, NULL), expected);                                        \
        assert_non_null(strstr(ice_last_error(), word));                                                               \
    } while (0)

static void retrieve_arguments(void **state)
{
    (void)state;
    struct setup setup = set_up(0, 0);
    const uint64_t far_query = WIRE_TOKENS_MAX;
    ice_sequence *none = NULL;
    REFUSED_RETRIEVE(options.landing = NULL, ICE_INVALID_ARGUMENT, "landing");
    REFUSED_RETRIEVE(options.sequences = NULL, ICE_INVALID_ARGUMENT, "sequences");
    REFUSED_RETRIEVE(options.sequences = &none, ICE_INVALID_ARGUMENT, "sequences[0]");
    REFUSED_RETRIEVE(options.rows = NULL, ICE_INVALID_ARGUMENT, "rows");
    REFUSED_RETRIEVE(options.first_queries = NULL, ICE_INVALID_ARGUMENT, "first_queries");
    REFUSED_RETRIEVE(options.first_queries = &far_query, ICE_TOO_LARGE, "first_queries[0]");
    REFUSED_RETRIEVE(options.query_vectors = NULL, ICE_INVALID_ARGUMENT, "query_vectors");
    REFUSED_RETRIEVE(options.keys = "k", ICE_INVALID_ARGUMENT, "values");
    REFUSED_RETRIEVE(options.sequence_count = 0, ICE_INVALID_ARGUMENT, "sequence_count");
    REFUSED_RETRIEVE(options.sequence_count = 257, ICE_TOO_LARGE, "sequence_count");
    REFUSED_RETRIEVE(options.queries = 257, ICE_TOO_LARGE, "queries");
    REFUSED_RETRIEVE(options.query_dtype = (ice_dtype)0, ICE_INVALID_ARGUMENT, "query_dtype");
    REFUSED_RETRIEVE(options.budget = 0, ICE_INVALID_ARGUMENT, "budget");
    REFUSED_RETRIEVE(options.window = UINT32_MAX, ICE_TOO_LARGE, "window");
    REFUSED_RETRIEVE(options.coverage = 1.5f, ICE_INVALID_ARGUMENT, "coverage");
    REFUSED_RETRIEVE(options.keep = options.budget + 1, ICE_INVALID_ARGUMENT, "options.keep");
    REFUSED_RETRIEVE((options.keep = 1, options.granularity = ICE_PAGE_WISE), ICE_NOT_SUPPORTED, "options.keep");
    REFUSED_RETRIEVE(options.coverage = NAN, ICE_INVALID_ARGUMENT, "coverage");
    REFUSED_RETRIEVE(options.granularity = (enum ice_granularity)5, ICE_INVALID_ARGUMENT, "granularity");
    REFUSED_RETRIEVE(options.layer = LAYERS, ICE_UNKNOWN_LAYER, "layer");
    REFUSED_RETRIEVE(row = ROWS, ICE_INVALID_ARGUMENT, "rows[0]");
    assert_int_equal(ice_retrieve(setup.client, NULL, NULL), ICE_INVALID_ARGUMENT);
    assert_int_equal(ice_retrieve(NULL, NULL, NULL), ICE_INVALID_ARGUMENT);
    assert_int_equal(ice_retrieve_wait(NULL, 0, NULL), ICE_INVALID_ARGUMENT);
    ice_ticket_close(NULL);
    tear_down(&setup);
}

static void shapes_and_owners(void **state)
{
    (void)state;
    struct setup setup = set_up(0, 0);
    struct ice_landing_shape shape = landing_shape();
    shape.head_dim = 32;
    ice_landing *other_landing = NULL;
    assert_int_equal(ice_landing_open(setup.client, &shape, 0, &other_landing), ICE_OK);
    REFUSED_RETRIEVE(options.landing = other_landing, ICE_SHAPE_MISMATCH, "head_dim 32");
    shape = landing_shape();
    shape.layers = 1;
    ice_landing_close(other_landing);
    assert_int_equal(ice_landing_open(setup.client, &shape, 0, &other_landing), ICE_OK);
    REFUSED_RETRIEVE((options.landing = other_landing, options.layer = 1), ICE_UNKNOWN_LAYER, "layer 1");
    ice_landing_close(other_landing);

    struct ice_sequence_options wide = sequence_options();
    wide.query_heads = 8;
    ice_sequence *pair[2] = {setup.sequence, NULL};
    assert_int_equal(ice_sequence_open(setup.client, &wide, 0, &pair[1]), ICE_OK);
    const uint32_t rows[] = {0, 1};
    const uint64_t firsts[] = {1, 1};
    REFUSED_RETRIEVE(
        (options.sequence_count = 2, options.sequences = pair, options.rows = rows, options.first_queries = firsts),
        ICE_SHAPE_MISMATCH, "sequences[1]");
    ice_sequence_close(pair[1]);

    // 1 MiB is what this daemon takes: 256 queries of 4 heads x 256 elements in fp32.
    struct ice_sequence_options large = sequence_options();
    large.head_dim = 256;
    ice_sequence *large_sequence = NULL;
    assert_int_equal(ice_sequence_open(setup.client, &large, 0, &large_sequence), ICE_OK);
    shape = landing_shape();
    shape.head_dim = 256;
    assert_int_equal(ice_landing_open(setup.client, &shape, 0, &other_landing), ICE_OK);
    const uint64_t first = 0;
    float *queries = calloc(256 * 4 * 256, sizeof *queries);
    assert_non_null(queries);
    REFUSED_RETRIEVE((options.landing = other_landing, options.sequences = &large_sequence, options.queries = 256,
                      options.query_dtype = ICE_FP32, options.query_vectors = queries, options.first_queries = &first,
                      options.keys = queries, options.values = queries),
                     ICE_TOO_LARGE, "vectors_bytes_max");
    free(queries);
    ice_sequence_close(large_sequence);
    ice_landing_close(other_landing);

    // Handles of another client.
    ice_client *other = connect_to(setup.fake, 0, 0);
    uint32_t row = 0;
    struct ice_retrieve_options options = one_retrieve(&setup, &row);
    assert_int_equal(ice_retrieve(other, &options, NULL), ICE_INVALID_ARGUMENT);
    assert_non_null(strstr(ice_last_error(), "another client"));
    ice_client_close(other);
    ice_client_close(setup.client); // the fake daemon knows only its latest session
    fake_stop(setup.fake);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(landing_arguments),
        cmocka_unit_test(sequence_arguments),
        cmocka_unit_test(retrieve_arguments),
        cmocka_unit_test(shapes_and_owners),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
