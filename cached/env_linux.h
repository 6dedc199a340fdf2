// Parts of the real table of outside effects.
#ifndef ICECACHE_CACHED_ENV_LINUX_H
#define ICECACHE_CACHED_ENV_LINUX_H

#include "cached/env.h"

void env_zmq_init(struct env *env);  // fills the bus_ entries
void env_file_init(struct env *env); // fills those of the spill folder

#endif
