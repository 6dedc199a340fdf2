// The commands of icecache-bench. Each fills rows (array) and ratios (object) and returns an exit code.
#ifndef ICECACHE_BENCH_COMMANDS_H
#define ICECACHE_BENCH_COMMANDS_H

#include "options.h"

#include <jansson.h>

int command_copy(const struct options *options, json_t *rows, json_t *ratios);
int command_reuse(const struct options *options, json_t *rows, json_t *ratios);
int command_search(const struct options *options, json_t *rows, json_t *ratios);
int command_serve(const struct options *options, json_t *rows, json_t *ratios);
int command_spill(const struct options *options, json_t *rows, json_t *ratios);
int command_step(const struct options *options, json_t *rows, json_t *ratios);
// What this program does where serve has started it again (SERVE_ROLE_FLAG). Returns an exit code.
int serve_role(int argc, char **argv);

#endif
