// Lanes from the generators and from traces, and fp16.
#include "data.h"

#include "trace.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

float data_of_half(uint16_t half)
{
    const uint32_t sign = (uint32_t)(half & 0x8000u) << 16, exponent = half >> 10 & 0x1fu, fraction = half & 0x3ffu;
    uint32_t bits = sign | (exponent + 112) << 23 | fraction << 13;
    if (exponent == 0) {
        const float small = (float)fraction * 0x1p-24f;
        return sign != 0 ? -small : small;
    }
    if (exponent == 31) {
        bits = sign | 0x7f800000u | fraction << 13;
    }
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

uint16_t data_half_of(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    const uint32_t sign = bits >> 16 & 0x8000u;
    const float size = fabsf(value);
    if (size < 0x1p-14f) {
        return (uint16_t)(sign | (uint32_t)lrintf(size * 0x1p24f));
    }
    bits &= 0x7fffffffu;
    bits += 0xfffu + (bits >> 13 & 1u);
    return (uint16_t)(sign | ((bits >> 13) - (112u << 10)));
}

size_t data_row_bytes(const struct data *data)
{
    return (size_t)data->head_dim * (data->dtype == INDEX_FP32 ? sizeof(float) : sizeof(uint16_t));
}

static bool lanes_create(struct data *data)
{
    data->lanes = calloc(data->lane_count, sizeof *data->lanes);
    bool complete = data->lanes != NULL;
    for (uint32_t i = 0; complete && i < data->lane_count; i++) {
        struct data_lane *lane = &data->lanes[i];
        const size_t queries = (size_t)data->query_count * data->query_heads * data->head_dim;
        lane->keys = malloc((size_t)data->tokens * data->head_dim * sizeof *lane->keys);
        lane->rows = malloc((size_t)data->tokens * data_row_bytes(data));
        lane->queries = malloc(queries * sizeof *lane->queries);
        lane->stands = malloc(data->query_count * sizeof *lane->stands);
        complete = lane->keys != NULL && lane->rows != NULL && lane->queries != NULL && lane->stands != NULL;
    }
    return complete;
}

static void round_to_half(float *values, size_t count, uint16_t *halves)
{
    for (size_t i = 0; i < count; i++) {
        const uint16_t half = data_half_of(values[i]);
        values[i] = data_of_half(half);
        if (halves != NULL) {
            halves[i] = half;
        }
    }
}

bool data_generate(struct data *data, enum data_kind kind, uint32_t tokens, uint32_t head_dim, uint32_t query_heads,
                   uint32_t query_count, uint32_t lane_count, uint64_t seed)
{
    *data = (struct data){
        .tokens = tokens,
        .head_dim = head_dim,
        .query_heads = query_heads,
        .query_count = query_count,
        .lane_count = lane_count,
        .dtype = INDEX_FP16,
        .scale = 1 / sqrtf((float)head_dim),
    };
    (void)snprintf(data->name, sizeof data->name, "%s", kind == DATA_ATTENTION ? "attention" : "gauss");
    bool complete = lanes_create(data);
    const struct generator_shape shape = {tokens, head_dim, query_heads, query_count, false};
    for (uint32_t i = 0; complete && i < lane_count; i++) {
        struct data_lane *lane = &data->lanes[i];
        const uint64_t lane_seed = seed * 1000003 + i;
        if (kind == DATA_ATTENTION) {
            complete = generate_attention(&shape, lane_seed, lane->keys, lane->queries);
        } else {
            generate_gauss(&shape, lane_seed, lane->keys, lane->queries);
        }
        round_to_half(lane->keys, (size_t)tokens * head_dim, lane->rows);
        round_to_half(lane->queries, (size_t)query_count * query_heads * head_dim, NULL);
        for (uint32_t q = 0; q < query_count; q++) {
            lane->stands[q] = tokens - 1;
        }
    }
    if (!complete) {
        data_fini(data);
    }
    return complete;
}

static void widen(const void *from, enum index_dtype dtype, uint32_t count, float *out)
{
    if (dtype == INDEX_FP32) {
        memcpy(out, from, count * sizeof *out);
        return;
    }
    const uint16_t *halves = from;
    for (uint32_t i = 0; i < count; i++) {
        out[i] = data_of_half(halves[i]);
    }
}

static void copy_lane(const struct data *data, const struct trace *trace, uint32_t layer, uint32_t head,
                      struct data_lane *lane)
{
    const uint32_t dim = data->head_dim;
    for (uint32_t i = 0; i < data->tokens; i++) {
        const void *row = trace_key(trace, layer, head, i);
        memcpy((char *)lane->rows + i * data_row_bytes(data), row, data_row_bytes(data));
        widen(row, data->dtype, dim, lane->keys + (size_t)i * dim);
    }
    const uint32_t skipped = trace->steps - data->query_count; // so that few tokens come after the query's
    for (uint32_t q = 0; q < data->query_count; q++) {
        lane->stands[q] = (uint32_t)trace->first_query + skipped + q;
        for (uint32_t h = 0; h < data->query_heads; h++) {
            widen(trace_query(trace, layer, head * data->query_heads + h, skipped + q), data->dtype, dim,
                  lane->queries + ((size_t)q * data->query_heads + h) * dim);
        }
    }
}

bool data_open_trace(struct data *data, const char *folder, uint32_t query_count, uint32_t sinks, uint32_t window,
                     char *error, size_t error_bytes)
{
    struct trace trace;
    if (!trace_open(folder, &trace, error, error_bytes)) {
        return false;
    }
    *data = (struct data){
        .tokens = (uint32_t)trace.tokens,
        .head_dim = trace.head_dim,
        .query_heads = trace.query_heads / trace.kv_heads,
        .query_count = query_count < trace.steps ? query_count : trace.steps,
        .lane_count = trace.layers * trace.kv_heads,
        .dtype = trace.dtype == ICE_FP32 ? INDEX_FP32 : INDEX_FP16,
        .sinks = sinks,
        .window = window,
        .scale = 1 / sqrtf((float)trace.head_dim),
    };
    (void)snprintf(data->name, sizeof data->name, "%s", trace.name);
    bool complete = false;
    if (trace.first_query < (uint64_t)sinks + window + 1) {
        (void)snprintf(error, error_bytes, "%s: shorter than sinks and window", folder);
    } else if (!lanes_create(data)) {
        (void)snprintf(error, error_bytes, "%s: no memory", folder);
    } else {
        complete = true;
        for (uint32_t i = 0; i < data->lane_count; i++) {
            copy_lane(data, &trace, i / trace.kv_heads, i % trace.kv_heads, &data->lanes[i]);
        }
    }
    trace_close(&trace);
    if (!complete) {
        data_fini(data);
    }
    return complete;
}

void data_fini(struct data *data)
{
    for (uint32_t i = 0; data->lanes != NULL && i < data->lane_count; i++) {
        free(data->lanes[i].keys);
        free(data->lanes[i].rows);
        free(data->lanes[i].queries);
        free(data->lanes[i].stands);
    }
    free(data->lanes);
    *data = (struct data){0};
}

void data_range(const struct data *data, const struct data_lane *lane, uint32_t query, uint32_t *first, uint32_t *end)
{
    const uint32_t visible = lane->stands[query] + 1;
    *first = data->sinks < visible ? data->sinks : visible;
    *end = visible > data->window ? visible - data->window : 0;
    *end = *end < *first ? *first : *end;
}
