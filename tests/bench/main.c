// icecache-bench: what the tree costs and finds on this machine, beside what one would use without it.
#include "commands.h"
#include "measure.h"
#include "serve.h"
#include "table.h"

#include <stdio.h>
#include <string.h>

static json_t *arguments(int argc, char **argv)
{
    json_t *list = json_array();
    for (int i = 1; i < argc; i++) {
        (void)json_array_append_new(list, json_string(argv[i]));
    }
    return list;
}

int main(int argc, char **argv)
{
    if (argc > 1 && strcmp(argv[1], SERVE_ROLE_FLAG) == 0) {
        return serve_role(argc, argv);
    }
    // getopt_long reorders argv.
    json_t *args = arguments(argc, argv);
    struct options options;
    int code = options_parse(&options, argc, argv);
    if (code != 0) {
        json_decref(args);
        return code < 0 ? 0 : code;
    }
    json_t *rows = json_array(), *ratios = json_object();
    json_t *result = json_pack("{s:s, s:s, s:o, s:I, s:o, s:o, s:o}", "command", options.command, "version",
                               ICECACHE_VERSION, "args", args, "seed", (json_int_t)options.seed, "machine",
                               measure_machine(), "rows", rows, "ratios", ratios);
    if (result == NULL) {
        (void)fputs("icecache-bench: no memory\n", stderr);
        return EXIT_MISSING;
    }
    code = strcmp(options.command, "search") == 0  ? command_search(&options, rows, ratios)
           : strcmp(options.command, "copy") == 0  ? command_copy(&options, rows, ratios)
           : strcmp(options.command, "reuse") == 0 ? command_reuse(&options, rows, ratios)
           : strcmp(options.command, "serve") == 0 ? command_serve(&options, rows, ratios)
           : strcmp(options.command, "spill") == 0 ? command_spill(&options, rows, ratios)
                                                   : command_step(&options, rows, ratios);
    if (code == 0 || code == EXIT_CHECK) {
        if (options.json) {
            (void)json_dumpf(result, stdout, JSON_INDENT(1) | JSON_REAL_PRECISION(6));
            (void)fputc('\n', stdout);
        } else {
            table_print(stdout, result);
        }
    }
    json_decref(result);
    return code;
}
