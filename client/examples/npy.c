// Reading of .npy files. The header is a Python dictionary in text; only the three keys that NumPy writes are looked
// for.
#include "npy.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

// NumPy's own limit for the header of trusted files.
#define HEADER_BYTES_MAX 65536u

static bool refuse(char *error, size_t error_bytes, const char *path, const char *why)
{
    (void)snprintf(error, error_bytes, "%s: %s", path, why);
    return false;
}

// The text after "'key':" in the header, or NULL.
static const char *value_of(const char *header, const char *key)
{
    char quoted[32];
    (void)snprintf(quoted, sizeof(quoted), "'%s':", key);
    const char *found = strstr(header, quoted);
    if (found == NULL) {
        return NULL;
    }
    found += strlen(quoted);
    return found + strspn(found, " ");
}

static bool parse_shape(const char *text, struct npy *npy)
{
    if (text == NULL || *text != '(') {
        return false;
    }
    text++;
    npy->rank = 0;
    for (;;) {
        text += strspn(text, " ,");
        if (*text == ')') {
            return npy->rank > 0;
        }
        if (npy->rank == NPY_RANK_MAX || *text < '0' || *text > '9') {
            return false;
        }
        char *end;
        errno = 0;
        npy->shape[npy->rank] = strtoull(text, &end, 10);
        if (errno != 0 || npy->shape[npy->rank] > UINT32_MAX) {
            return false;
        }
        npy->rank++;
        text = end;
    }
}

static bool parse_dtype(const char *text, struct npy *npy)
{
    if (text == NULL || strlen(text) < 5 || text[0] != '\'' || text[1] != '<' || text[4] != '\'') {
        return false;
    }
    npy->kind = text[2];
    npy->element_bytes = (uint32_t)(text[3] - '0');
    return (npy->kind == 'f' || npy->kind == 'u') && (npy->element_bytes == 2 || npy->element_bytes == 4);
}

// Fills *npy from the mapped file; NULL, or what is wrong with it.
static const char *parse(struct npy *npy)
{
    const uint8_t *bytes = npy->map;
    if (npy->map_bytes < 12 || memcmp(bytes, "\x93NUMPY", 6) != 0) {
        return "not a .npy file";
    }
    size_t prefix_bytes = bytes[6] == 1 ? 10 : 12;
    size_t header_bytes = (size_t)bytes[8] | (size_t)bytes[9] << 8;
    if (bytes[6] > 1) {
        header_bytes |= (size_t)bytes[10] << 16 | (size_t)bytes[11] << 24;
    }
    if (header_bytes > HEADER_BYTES_MAX || prefix_bytes + header_bytes > npy->map_bytes) {
        return "the header is longer than the file";
    }
    char *header = strndup((const char *)bytes + prefix_bytes, header_bytes);
    if (header == NULL) {
        return "no memory";
    }
    const char *fortran_order = value_of(header, "fortran_order");
    bool is_c_order = fortran_order != NULL && strncmp(fortran_order, "False", 5) == 0;
    bool has_dtype = parse_dtype(value_of(header, "descr"), npy);
    bool has_shape = parse_shape(value_of(header, "shape"), npy);
    free(header);
    if (!is_c_order || !has_dtype || !has_shape) {
        return "only C-ordered little-endian arrays of 2 or 4 byte floats or unsigned integers can be read";
    }
    uint64_t wanted_bytes = npy->element_bytes;
    for (uint32_t i = 0; i < npy->rank; i++) {
        if (__builtin_mul_overflow(wanted_bytes, npy->shape[i], &wanted_bytes)) {
            return "the shape overflows";
        }
    }
    npy->data = bytes + prefix_bytes + header_bytes;
    npy->data_bytes = npy->map_bytes - prefix_bytes - header_bytes;
    return wanted_bytes == npy->data_bytes ? NULL : "the file's size does not match its shape";
}

bool npy_open(const char *path, struct npy *out, char *error, size_t error_bytes)
{
    struct npy npy = {0};
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) {
        return refuse(error, error_bytes, path, strerror(errno));
    }
    struct stat status;
    if (fstat(fd, &status) != 0 || status.st_size <= 0) {
        close(fd);
        return refuse(error, error_bytes, path, "empty or unreadable");
    }
    npy.map_bytes = (size_t)status.st_size;
    npy.map = mmap(NULL, npy.map_bytes, PROT_READ, MAP_PRIVATE, fd, 0);
    int map_errno = errno;
    close(fd);
    if (npy.map == MAP_FAILED) {
        return refuse(error, error_bytes, path, strerror(map_errno));
    }
    const char *wrong = parse(&npy);
    if (wrong != NULL) {
        munmap(npy.map, npy.map_bytes);
        return refuse(error, error_bytes, path, wrong);
    }
    *out = npy;
    return true;
}

void npy_close(struct npy *npy)
{
    if (npy->map != NULL) {
        munmap(npy->map, npy->map_bytes);
    }
    *npy = (struct npy){0};
}
