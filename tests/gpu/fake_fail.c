// The file `fail` in FAKE_CUDA_DIR: "PROGRAM ENTRY CODE [DEVICE]" (the program's short name, or *), CODE a number,
// "hang" (for ever), "stall" (until the file says something else, then as if nothing had been), "slow" (50 ms, then the
// same) or "lag" (0.2 ms, then the same). With DEVICE only calls whose context is that device's.
#include "fake_fail.h"

#include <errno.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { CODE_BYTES = 32 };

const char *fake_folder(void)
{
    return getenv("FAKE_CUDA_DIR");
}

// The code for this call, or "".
static void read_code(const char *entry, int device, char *code)
{
    char path[256], line[256] = "", program[64] = "", name[64] = "";
    int wanted = -1;
    code[0] = '\0';
    (void)snprintf(path, sizeof(path), "%s/fail", fake_folder() ? fake_folder() : "");
    FILE *file = fopen(path, "re");
    if (!file) {
        return;
    }
    const bool mine = fgets(line, sizeof(line), file) &&
                      sscanf(line, "%63s %63s %31s %d", program, name, code, &wanted) >= 3 &&
                      (strcmp(program, "*") == 0 || strcmp(program, program_invocation_short_name) == 0) &&
                      strcmp(name, entry) == 0 && (wanted < 0 || wanted == device);
    (void)fclose(file);
    if (!mine) {
        code[0] = '\0';
    }
}

int fake_injected(const char *entry, int device)
{
    char code[CODE_BYTES];
    read_code(entry, device, code);
    while (strcmp(code, "hang") == 0) {
        (void)pause();
    }
    while (strcmp(code, "stall") == 0) {
        (void)nanosleep(&(struct timespec){0, 10000000}, NULL);
        read_code(entry, device, code);
    }
    if (strcmp(code, "slow") == 0 || strcmp(code, "lag") == 0) {
        (void)nanosleep(&(struct timespec){0, code[0] == 's' ? 50000000 : 200000}, NULL);
        return 0;
    }
    return (int)strtol(code, NULL, 10);
}
