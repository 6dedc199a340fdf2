// Keys: reading stored rows, the transforms of the method, and the hash that seeded choices are made with.
//
// T_K(k) = [k/c, sqrt(1 - |k|^2/c^2)] and T_Q(q) = [q/|q|, 0] turn the largest inner product into the nearest
// neighbour. The tree never writes T_K out: c^2 <T_K(a), T_K(b)> = a.b + sqrt(c^2-|a|^2) sqrt(c^2-|b|^2) orders nodes
// by their distance in that space, whatever c has grown to since the nodes were stored. Pure functions of the index.
#include "index/tree.h"

#include <math.h>

void dci_key_widen(const struct index *index, uint32_t position, float *out)
{
    index->kernel->widen(index->dtype, dci_store_at(&index->keys, position), index->head_dim, out);
}

static float norm2_of(const float *x, uint32_t n)
{
    return dci_kernel_at(0)->dot(x, x, n);
}

void dci_transform_key(const float *key, uint32_t head_dim, float norm_max, float *out)
{
    const float share = norm_max > 0.0f ? norm2_of(key, head_dim) / (norm_max * norm_max) : 0.0f;
    for (uint32_t i = 0; i < head_dim; i++) {
        out[i] = norm_max > 0.0f ? key[i] / norm_max : 0.0f;
    }
    out[head_dim] = sqrtf(share < 1.0f ? 1.0f - share : 0.0f);
}

void dci_transform_query(const float *query, uint32_t head_dim, float *out)
{
    const float norm = sqrtf(norm2_of(query, head_dim));
    for (uint32_t i = 0; i < head_dim; i++) {
        out[i] = norm > 0.0f ? query[i] / norm : 0.0f;
    }
    out[head_dim] = 0.0f;
}

float dci_affinity(float dot, float slack_a, float slack_b)
{
    return dot + slack_a * slack_b;
}

float dci_slack(float norm2, float norm2_max)
{
    return sqrtf(norm2 < norm2_max ? norm2_max - norm2 : 0.0f);
}

uint64_t dci_mix(uint64_t x)
{
    x += 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}
