// Rows and ratios for people.
#ifndef ICECACHE_BENCH_TABLE_H
#define ICECACHE_BENCH_TABLE_H

#include <jansson.h>
#include <stdio.h>

void table_print(FILE *out, const json_t *object);

#endif
