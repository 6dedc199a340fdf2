// The smallest useful worker: connect, open a landing and a sequence, append random K and V, retrieve for one layer and
// print the positions that came. Needs a running icecached.
//
//     icecache-hello [SOCKET_DIRECTORY]
#include "client/icecache.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { LAYERS = 2, KV_HEADS = 2, QUERY_HEADS = 4, HEAD_DIM = 64, TOKENS = 4096, BUDGET = 32, SINKS = 4, WINDOW = 8 };

static int failed(const char *what, ice_status status)
{
    fprintf(stderr, "%s: %s: %s\n", what, ice_status_name(status), ice_last_error());
    return 1;
}

// Numbers in -1..1, the same on every run.
static void fill_random(float *out, size_t count, unsigned *state)
{
    for (size_t i = 0; i < count; i++) {
        *state = *state * 1664525u + 1013904223u;
        out[i] = (float)(*state >> 8) / (float)(1u << 23) - 1.0f;
    }
}

static int append_random(ice_sequence *sequence)
{
    size_t count = (size_t)LAYERS * KV_HEADS * TOKENS * HEAD_DIM;
    float *keys = malloc(count * sizeof *keys), *values = malloc(count * sizeof *values);
    if (keys == NULL || values == NULL) {
        free(keys);
        free(values);
        return failed("malloc", ICE_NO_MEMORY);
    }
    unsigned state = 1;
    fill_random(keys, count, &state);
    fill_random(values, count, &state);
    // [layer, token, KV head, head_dim]
    struct ice_kv_source source = {
        .keys = keys,
        .values = values,
        .keys_bytes = count * sizeof *keys,
        .values_bytes = count * sizeof *values,
        .layer_stride = (size_t)TOKENS * KV_HEADS * HEAD_DIM * sizeof *keys,
        .token_stride = (size_t)KV_HEADS * HEAD_DIM * sizeof *keys,
        .head_stride = HEAD_DIM * sizeof *keys,
    };
    uint64_t length = 0;
    ice_status status = ice_append(sequence, ICE_ALL_LAYERS, 0, TOKENS, &source, 0, &length);
    free(keys);
    free(values);
    if (status != ICE_OK) {
        return failed("ice_append", status);
    }
    printf("%llu tokens in %d layers\n", (unsigned long long)length, LAYERS);
    return 0;
}

static int retrieve_and_print(ice_client *client, ice_landing *landing, ice_sequence *sequence)
{
    float queries[QUERY_HEADS * HEAD_DIM];
    unsigned state = 2;
    fill_random(queries, QUERY_HEADS * HEAD_DIM, &state);
    struct ice_retrieve_options options = {
        .landing = landing,
        .layer = 1,
        .sequence_count = 1,
        .sequences = &sequence,
        .rows = &(uint32_t){0},
        .first_queries = &(uint64_t){TOKENS - 1},
        .query_vectors = queries,
        .query_dtype = ICE_FP32,
        .budget = BUDGET,
        .sinks = SINKS,
        .window = WINDOW,
    };
    struct ice_retrieve_result result;
    ice_status status = ice_retrieve(client, &options, &result);
    if (status != ICE_OK) {
        return failed("ice_retrieve", status);
    }
    for (uint32_t head = 0; head < result.head_count; head++) {
        struct ice_landing_view view;
        status = ice_landing_view(landing, 0, options.layer, head, &view);
        if (status != ICE_OK) {
            return failed("ice_landing_view", status);
        }
        printf("KV head %u: %u tokens, estimated mass %.3f, positions", head, view.count, (double)result.masses[head]);
        for (uint32_t slot = 0; slot < view.count; slot++) {
            printf(" %u", view.positions[slot]);
        }
        printf("\n");
    }
    return 0;
}

int main(int argc, char **argv)
{
    struct ice_client_options options = {.socket_directory = argc > 1 ? argv[1] : NULL, .name = "hello"};
    ice_client *client = NULL;
    ice_status status = ice_client_connect(&options, &client);
    if (status != ICE_OK) {
        return failed("ice_client_connect", status);
    }
    struct ice_landing_shape shape = {
        .rows = 1,
        .layers = LAYERS,
        .kv_heads = KV_HEADS,
        .slots = SINKS + WINDOW + BUDGET,
        .head_dim = HEAD_DIM,
        .dtype = ICE_FP32,
    };
    struct ice_sequence_options sequence_options = {
        .model_digest = "hello",
        .model_digest_bytes = strlen("hello"),
        .layers = LAYERS,
        .kv_heads = KV_HEADS,
        .query_heads = QUERY_HEADS,
        .head_dim = HEAD_DIM,
        .dtype = ICE_FP32,
    };
    ice_landing *landing = NULL;
    ice_sequence *sequence = NULL;
    int result = 1;
    if ((status = ice_landing_open(client, &shape, 0, &landing)) != ICE_OK) {
        result = failed("ice_landing_open", status);
    } else if ((status = ice_sequence_open(client, &sequence_options, 0, &sequence)) != ICE_OK) {
        result = failed("ice_sequence_open", status);
    } else if (append_random(sequence) == 0) {
        result = retrieve_and_print(client, landing, sequence);
    }
    ice_sequence_close(sequence);
    ice_landing_close(landing);
    ice_client_close(client);
    return result;
}
