// A seeded stream of random numbers: the same on every machine.
#ifndef ICECACHE_BENCH_RANDOM_H
#define ICECACHE_BENCH_RANDOM_H

#include <stdint.h>

struct random {
    uint64_t state[4];
    double spare; // the second normal of a pair
    int has_spare;
};

void random_init(struct random *random, uint64_t seed);
uint64_t random_bits(struct random *random);
double random_unit(struct random *random);                                               // in [0, 1)
uint32_t random_below(struct random *random, uint32_t count);                            // in [0, count)
double random_normal(struct random *random);                                             // mean 0, variance 1
void random_choose(struct random *random, uint32_t from, uint32_t count, uint32_t *out); // distinct ones; count <= 64

#endif
