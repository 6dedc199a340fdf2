// The log behind log.h. The level is set once at start, before any thread; a line is one write(2), so lines never mix.
#include "cached/log.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

static const char *const level_names[] = {"error", "warn", "info", "debug"};
static enum log_level level_max = LOG_LEVEL_INFO;

void log_set_level(enum log_level level)
{
    level_max = level;
}

bool log_level_parse(const char *text, enum log_level *out)
{
    for (unsigned i = 0; i < sizeof level_names / sizeof *level_names; i++) {
        if (strcmp(text, level_names[i]) == 0) {
            *out = (enum log_level)i;
            return true;
        }
    }
    return false;
}

void log_write(enum log_level level, const char *format, ...)
{
    if (level > level_max)
        return;
    char line[1024];
    int used = snprintf(line, sizeof line, "%-5s ", level_names[level]);
    va_list arguments;
    va_start(arguments, format);
    int more = vsnprintf(line + used, sizeof line - (size_t)used - 1, format, arguments);
    va_end(arguments);
    size_t size = (size_t)used + (more > 0 ? (size_t)more : 0);
    if (size > sizeof line - 2)
        size = sizeof line - 2; // cut, not lost
    line[size++] = '\n';
    // A log that cannot be written must not stop the service.
    ssize_t ignored = write(STDERR_FILENO, line, size);
    (void)ignored;
}
