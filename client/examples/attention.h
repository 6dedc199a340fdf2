// Softmax attention of one query head in plain floats. Sums run in a fixed order, so that equal inputs in equal order
// give equal bits, whatever the compiler or processor.
#ifndef ICECACHE_EXAMPLES_ATTENTION_H
#define ICECACHE_EXAMPLES_ATTENTION_H

#include "icecache.h"

#include <stddef.h>
#include <stdint.h>

void attention_to_float(float *out, const void *in, size_t count, ice_dtype dtype);

// weights[count] = softmax(scale * keys query). keys [count, head_dim], head_dim a multiple of 16.
void attention_weights(float *weights, const float *query, const float *keys, size_t count, uint32_t head_dim,
                       float scale);

// out[head_dim] = sum of weights[i] * values[i].
void attention_output(float *out, const float *weights, const float *values, size_t count, uint32_t head_dim);

#endif
