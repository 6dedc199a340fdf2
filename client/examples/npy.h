// NumPy's .npy files, mapped read-only: version 1 to 3, C order, little-endian.
#ifndef ICECACHE_EXAMPLES_NPY_H
#define ICECACHE_EXAMPLES_NPY_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define NPY_RANK_MAX 4u

struct npy {
    const void *data; // borrowed from the mapping, valid until npy_close
    size_t data_bytes;
    char kind;              // 'f' float, 'u' unsigned integer
    uint32_t element_bytes; // 2 or 4
    uint32_t rank;
    uint64_t shape[NPY_RANK_MAX];
    void *map;
    size_t map_bytes;
};

// False, with a text that names the file and what is wrong, where it cannot be read; *out is written on success only.
bool npy_open(const char *path, struct npy *out, char *error, size_t error_bytes);
// Accepts a zeroed struct.
void npy_close(struct npy *npy);

#endif
