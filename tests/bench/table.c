// A table stands on its side: a line for each value, a column for each row of the result.
#include "table.h"

#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#define COLUMNS    6
#define NAMES_MAX  128
#define NAME_BYTES 64

struct names {
    int count;
    char names[NAMES_MAX][NAME_BYTES];
};

static void collect(struct names *names, const char *prefix, const json_t *row)
{
    const char *key;
    const json_t *value;
    json_object_foreach((json_t *)row, key, value)
    {
        // Extremes and lists are for scripts.
        if (strstr(key, "_min") != NULL || strstr(key, "_max") != NULL || json_is_array(value)) {
            continue;
        }
        char name[NAME_BYTES];
        (void)snprintf(name, sizeof name, "%s%s%s", prefix, prefix[0] != '\0' ? "/" : "", key);
        if (json_is_object(value)) {
            collect(names, name, value);
            continue;
        }
        bool known = false;
        for (int i = 0; i < names->count; i++) {
            known = known || strcmp(names->names[i], name) == 0;
        }
        if (!known && names->count < NAMES_MAX) {
            (void)snprintf(names->names[names->count++], NAME_BYTES, "%s", name);
        }
    }
}

static const json_t *find(const json_t *row, const char *name)
{
    const size_t n = strcspn(name, "/");
    char key[NAME_BYTES];
    (void)snprintf(key, sizeof key, "%.*s", (int)n, name);
    const json_t *value = json_object_get(row, key);
    return name[n] == '/' ? find(value, name + n + 1) : value;
}

static void print_value(FILE *out, const json_t *value)
{
    char text[64] = "-";
    if (json_is_string(value)) {
        (void)snprintf(text, sizeof text, "%s", json_string_value(value));
    } else if (json_is_boolean(value)) {
        (void)snprintf(text, sizeof text, "%s", json_is_true(value) ? "yes" : "no");
    } else if (json_is_integer(value)) {
        (void)snprintf(text, sizeof text, "%lld", (long long)json_integer_value(value));
    } else if (json_is_real(value)) {
        (void)snprintf(text, sizeof text, "%.4g", json_real_value(value));
    }
    (void)fprintf(out, " %16s", text);
}

static void print_columns(FILE *out, const json_t *rows, size_t begin, size_t end)
{
    struct names *names = calloc(1, sizeof *names);
    if (names == NULL) {
        return;
    }
    for (size_t i = begin; i < end; i++) {
        collect(names, "", json_array_get(rows, i));
    }
    for (int line = 0; line < names->count; line++) {
        (void)fprintf(out, "%-32s", names->names[line]);
        for (size_t i = begin; i < end; i++) {
            print_value(out, find(json_array_get(rows, i), names->names[line]));
        }
        (void)fputc('\n', out);
    }
    (void)fputc('\n', out);
    free(names);
}

static void print_flat(FILE *out, const json_t *object, const char *indent)
{
    const char *key;
    const json_t *value;
    json_object_foreach((json_t *)object, key, value)
    {
        (void)fprintf(out, "%s%-34s", indent, key);
        if (json_is_object(value)) {
            (void)fputc('\n', out);
            print_flat(out, value, "  ");
        } else {
            print_value(out, value);
            (void)fputc('\n', out);
        }
    }
}

void table_print(FILE *out, const json_t *object)
{
    print_flat(out, json_object_get(object, "machine"), "");
    (void)fputc('\n', out);
    const json_t *rows = json_object_get(object, "rows");
    const size_t count = json_array_size(rows);
    for (size_t i = 0; i < count; i += COLUMNS) {
        print_columns(out, rows, i, i + COLUMNS < count ? i + COLUMNS : count);
    }
    print_flat(out, json_object_get(object, "ratios"), "");
}
