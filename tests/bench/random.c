// xoshiro256++, seeded by splitmix64; normals by Marsaglia's polar method.
#include "random.h"

#include <math.h>
#include <stdbool.h>

static uint64_t rotate(uint64_t x, int by)
{
    return x << by | x >> (64 - by);
}

void random_init(struct random *random, uint64_t seed)
{
    *random = (struct random){0};
    for (int i = 0; i < 4; i++) {
        uint64_t z = seed += 0x9e3779b97f4a7c15u;
        z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
        z = (z ^ z >> 27) * 0x94d049bb133111ebu;
        random->state[i] = z ^ z >> 31;
    }
}

uint64_t random_bits(struct random *random)
{
    uint64_t *s = random->state;
    const uint64_t result = rotate(s[0] + s[3], 23) + s[0];
    const uint64_t t = s[1] << 17;
    s[2] ^= s[0];
    s[3] ^= s[1];
    s[1] ^= s[2];
    s[0] ^= s[3];
    s[2] ^= t;
    s[3] = rotate(s[3], 45);
    return result;
}

double random_unit(struct random *random)
{
    return (double)(random_bits(random) >> 11) * 0x1p-53;
}

uint32_t random_below(struct random *random, uint32_t count)
{
    return (uint32_t)(((random_bits(random) >> 32) * count) >> 32);
}

double random_normal(struct random *random)
{
    if (random->has_spare) {
        random->has_spare = 0;
        return random->spare;
    }
    double x, y, square;
    do {
        x = 2 * random_unit(random) - 1;
        y = 2 * random_unit(random) - 1;
        square = x * x + y * y;
    } while (square >= 1 || square == 0);
    const double factor = sqrt(-2 * log(square) / square);
    random->spare = y * factor;
    random->has_spare = 1;
    return x * factor;
}

void random_choose(struct random *random, uint32_t from, uint32_t count, uint32_t *out)
{
    for (uint32_t i = 0; i < count; i++) {
        bool taken;
        do {
            out[i] = random_below(random, from);
            taken = false;
            for (uint32_t j = 0; j < i; j++) {
                taken = taken || out[j] == out[i];
            }
        } while (taken);
    }
}
