// Runs a fuzz target over the files named, or over all files of the folders named, where there is no libFuzzer.
// Fails where there is nothing to replay: an empty corpus must not pass for a tested one.
#include "fuzz.h"

#include <dirent.h>
#include <errno.h>
#include <string.h>
#include <sys/stat.h>

static unsigned replayed;

static int replay_file(const char *path)
{
    FILE *file = fopen(path, "rb");
    struct stat status;
    if (!file || fstat(fileno(file), &status) != 0) {
        fprintf(stderr, "%s: %s\n", path, strerror(errno));
        if (file) {
            fclose(file);
        }
        return 1;
    }
    // Exactly so long, so that a sanitizer sees any read beyond the end.
    const size_t size = (size_t)status.st_size;
    uint8_t *bytes = malloc(size ? size : 1);
    const size_t read = bytes ? fread(bytes, 1, size, file) : 0;
    fclose(file);
    if (!bytes || read != size) {
        fprintf(stderr, "%s: cannot be read\n", path);
        free(bytes);
        return 1;
    }
    printf("%s\n", path); // before the run: the last line names a crash
    fflush(stdout);
    const int rc = LLVMFuzzerTestOneInput(bytes, size);
    free(bytes);
    replayed++;
    return rc;
}

static int replay(const char *path)
{
    DIR *folder = opendir(path);
    if (!folder) {
        return replay_file(path);
    }
    int rc = 0;
    for (struct dirent *entry = readdir(folder); entry && rc == 0; entry = readdir(folder)) {
        char file[4096];
        if (entry->d_name[0] != '.' && snprintf(file, sizeof(file), "%s/%s", path, entry->d_name) < (int)sizeof(file)) {
            rc = replay_file(file);
        }
    }
    closedir(folder);
    return rc;
}

int main(int argc, char **argv)
{
    for (int i = 1; i < argc; i++) {
        if (replay(argv[i]) != 0) {
            return 1;
        }
    }
    printf("%u inputs replayed\n", replayed);
    return replayed > 0 ? 0 : 1;
}
