// The text of the calling thread's last error.
#ifndef ICECACHE_CLIENT_ERROR_H
#define ICECACHE_CLIENT_ERROR_H

#include "client/icecache.h"

// Empties the text: every public call that can fail begins with it.
void error_clear(void);
// Stores the text and returns status, so that a failing function ends with `return error_set(...)`.
ice_status error_set(ice_status status, const char *format, ...) __attribute__((format(printf, 2, 3)));
// Between the two the text is kept as it is: calls without a status (the closing ones) leave the last error readable.
void error_hold(void);
void error_let_go(void);

#endif
