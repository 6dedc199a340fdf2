// The queries of a request as a lane's search takes them. They are the worker's bytes, in any dtype and not aligned;
// the index judges the numbers.
#include "cached/op.h"

#include "proto/dtype.h"

#include <string.h>

static float half_to_float(uint16_t half)
{
    // Exponent and mantissa shifted into place and rescaled by 2^112: exact also for subnormals.
    union {
        uint32_t bits;
        float value;
    } number = {.bits = (uint32_t)(half & 0x7fffu) << 13}, scale = {.bits = 0x77800000u};
    number.value *= scale.value;
    if ((half & 0x7c00u) == 0x7c00u)
        number.bits |= 0x7f800000u; // infinity or NaN: the index refuses it
    number.bits |= (uint32_t)(half & 0x8000u) << 16;
    return number.value;
}

static void to_floats(float *out, const uint8_t *in, uint32_t count, uint32_t dtype)
{
    if (dtype == DTYPE_FP32) {
        memcpy(out, in, count * sizeof *out);
        return;
    }
    for (uint32_t i = 0; i < count; i++) {
        uint16_t half;
        memcpy(&half, in + 2 * i, sizeof half); // the frame need not be aligned
        if (dtype == DTYPE_FP16) {
            out[i] = half_to_float(half);
        } else {
            uint32_t bits = (uint32_t)half << 16;
            memcpy(&out[i], &bits, sizeof bits);
        }
    }
}

float *op_lane_queries(const struct op_lane *part, struct shard *shard)
{
    const struct op *op = part->op;
    const struct wire_shape *shape = &part->lane->stem->shape;
    uint32_t group = shape->query_heads / shape->kv_heads;
    uint32_t block = group * shape->head_dim;
    float *queries = shard_scratch(shard, (void **)&shard->now.queries, &shard->now.queries_bytes,
                                   (size_t)op->queries * block * sizeof *queries);
    if (!queries)
        return NULL;
    size_t element = dtype_bytes((enum dtype)op->query_dtype);
    const uint8_t *vectors = op->message.vectors;
    for (uint32_t query = 0; query < op->queries; query++) {
        size_t row = ((size_t)part->sequence_index * op->queries + query) * shape->query_heads;
        size_t offset = (row + (size_t)part->lane->kv_head * group) * shape->head_dim * element;
        to_floats(queries + (size_t)query * block, vectors + offset, block, op->query_dtype);
    }
    return queries;
}
