// The parts of the serve command that have a daemon of their own, beside the retrieves of serve.c.
#ifndef ICECACHE_BENCH_SERVE_PARTS_H
#define ICECACHE_BENCH_SERVE_PARTS_H

#include "options.h"

#include <jansson.h>
#include <stdbool.h>

// Where sockets and logs lie, and the disk's files: two folders of SERVE_PATH_ROOM bytes' path, "" where one could not
// be made, which a message on stderr says.
bool serve_folders_make(const struct options *options, char *work, char *disk);

// Each adds its rows and returns an exit code.
int serve_mix_run(const struct options *options, json_t *rows);
int serve_idle_run(const struct options *options, json_t *rows, json_t *ratios);
int serve_idle_worker(void); // the role of the second's child

#endif
