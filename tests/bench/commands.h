// The commands of icecache-bench. Each fills rows (array) and ratios (object) and returns an exit code.
#ifndef ICECACHE_BENCH_COMMANDS_H
#define ICECACHE_BENCH_COMMANDS_H

#include "options.h"

#include <jansson.h>

int command_copy(const struct options *options, json_t *rows, json_t *ratios);
int command_search(const struct options *options, json_t *rows, json_t *ratios);
int command_spill(const struct options *options, json_t *rows, json_t *ratios);
int command_step(const struct options *options, json_t *rows, json_t *ratios);

#endif
