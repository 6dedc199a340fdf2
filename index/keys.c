// Keys: reading rows, the rotation, and the hash that seeded choices are made with.
//
// The rotation is a Hadamard transform behind seeded changes of sign; where head_dim is no power of two, one over the
// first and one over the last coordinates, overlapping. It spreads what a key has in a few coordinates over all of
// them, so that equal steps code every key well. Pure functions of the index.
#include "index/tree.h"

#include <string.h>

float dci_key_widen(const struct index *index, const void *row, float *out)
{
    index->kernel->widen(index->dtype, row, index->head_dim, out);
    return index->kernel->dot(out, out, index->head_dim);
}

void dci_key_load(const struct index *index, const void *row, float *out)
{
    const float norm2 = dci_key_widen(index, row, out);
    if (!(norm2 <= TREE_NORM2_MAX)) { // also when it is NaN
        memset(out, 0, index->head_dim * sizeof out[0]);
    }
    dci_rotate(index, out);
}

void dci_rotation_init(struct index *index)
{
    for (uint32_t pass = 0; pass < 2; pass++) {
        for (uint32_t i = 0; i < INDEX_HEAD_DIM_MAX; i++) {
            const uint64_t random = dci_mix(index->seed ^ dci_mix(pass * INDEX_HEAD_DIM_MAX + i + 1));
            index->signs[pass][i] = (random >> 63) != 0 ? -1.0f : 1.0f;
        }
    }
}

void dci_rotate(const struct index *index, float *x)
{
    uint32_t power = DCI_LANES;
    while (2 * power <= index->head_dim) {
        power *= 2;
    }
    index->kernel->hadamard(x, power, index->signs[0]);
    if (power < index->head_dim) {
        index->kernel->hadamard(x + (index->head_dim - power), power, index->signs[1]);
    }
}

uint64_t dci_mix(uint64_t x)
{
    x += 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}
