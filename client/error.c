// Errors as a caller sees them: the codes' names and texts, and the calling thread's last error.
//
// Everything here is thread-local or constant; there is no lock.
#include "client/error.h"

#include "proto/limits.h"
#include "proto/status.h"

#include <stdarg.h>
#include <stdio.h>

#ifndef ICECACHE_VERSION
#error "the build defines ICECACHE_VERSION"
#endif

static _Thread_local char last_error[WIRE_TEXT_BYTES_MAX + 1];
static _Thread_local unsigned held;

void error_clear(void)
{
    if (held == 0) {
        last_error[0] = '\0';
    }
}

ice_status error_set(ice_status status, const char *format, ...)
{
    if (held == 0) {
        va_list arguments;
        va_start(arguments, format);
        (void)vsnprintf(last_error, sizeof last_error, format, arguments);
        va_end(arguments);
    }
    return status;
}

void error_hold(void)
{
    held++;
}

void error_let_go(void)
{
    held--;
}

const char *ice_last_error(void)
{
    return last_error;
}

const char *ice_status_name(ice_status status)
{
    return status_name((int)status);
}

const char *ice_status_text(ice_status status)
{
    return status_text((int)status);
}

const char *ice_version(void)
{
    return ICECACHE_VERSION;
}
