// icecachectl: asks a running daemon. Exit: 0 ok, 1 failure, 2 usage, 3 no daemon.
#include "cached/ctl_connection.h"
#include "cached/ctl_print.h"
#include "proto/control.h"

#include <getopt.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { EXIT_USAGE = 2, EXIT_NO_DAEMON = 3, STATS_PAGES_MAX = 4096 };

struct arguments {
    char directory[108];
    int timeout_ms;
    bool json;
    const char *command;
};

static const char usage[] = "usage: icecachectl [options] COMMAND\n"
                            "  ping                  says whether the daemon answers\n"
                            "  version               the daemon's version\n"
                            "  stats                 sequences, tokens, pages, bytes, requests, latencies by phase\n"
                            "options\n"
                            "  --socket-dir DIR      the daemon's socket folder (ICECACHE_SOCKET_DIR)\n"
                            "  --json                one JSON object with stable keys\n"
                            "  --timeout SECONDS     how long to wait for the daemon (default 5)\n"
                            "  --help, --version\n"
                            "exit status: 0 ok, 1 failure, 2 usage, 3 no daemon\n";

static int ping(struct ctl_connection *connection, const struct arguments *arguments)
{
    Icecache__Wire__Reply *reply;
    if (ctl_stats(connection, UINT32_MAX, &reply) != ICE_OK)
        return EXIT_FAILURE;
    icecache__wire__reply__free_unpacked(reply, NULL);
    bool version = strcmp(arguments->command, "version") == 0;
    if (arguments->json)
        printf("{\"version\":\"%s\"}\n", connection->daemon_version);
    else
        printf(version ? "%s\n" : "icecached %s answers\n", connection->daemon_version);
    return EXIT_SUCCESS;
}

// Asks page by page; a daemon with very many sequences is cut at STATS_PAGES_MAX pages of 256.
static int stats(struct ctl_connection *connection, const struct arguments *arguments)
{
    Icecache__Wire__Reply **pages = calloc(STATS_PAGES_MAX, sizeof *pages);
    if (!pages)
        return EXIT_FAILURE;
    size_t count = 0;
    uint32_t from = 0;
    bool ok = true;
    do {
        ok = ctl_stats(connection, from, &pages[count]) == ICE_OK;
        from = ok ? pages[count++]->stats->sequences_next : 0;
    } while (ok && from > 0 && count < STATS_PAGES_MAX);
    if (ok && arguments->json)
        ctl_print_json(pages, count);
    else if (ok)
        ctl_print_table(pages, count);
    for (size_t i = 0; i < count; i++)
        icecache__wire__reply__free_unpacked(pages[i], NULL);
    free(pages);
    return ok ? EXIT_SUCCESS : EXIT_FAILURE;
}

// -1: go on; else the exit status.
static int read_arguments(struct arguments *arguments, int argc, char **argv)
{
    static const struct option options[] = {
        {"socket-dir", required_argument, NULL, 's'}, {"json", no_argument, NULL, 'j'},
        {"timeout", required_argument, NULL, 't'},    {"help", no_argument, NULL, 'h'},
        {"version", no_argument, NULL, 'v'},          {0},
    };
    *arguments = (struct arguments){.timeout_ms = 5000};
    const char *directory = NULL;
    for (int flag; (flag = getopt_long(argc, argv, "h", options, NULL)) != -1;) {
        if (flag == 's') {
            directory = optarg;
        } else if (flag == 'j') {
            arguments->json = true;
        } else if (flag == 't') {
            char *end;
            double seconds = strtod(optarg, &end);
            if (*end || !(seconds > 0 && seconds <= 3600)) {
                fprintf(stderr, "icecachectl: --timeout: '%s' is not a number of seconds up to 3600\n", optarg);
                return EXIT_USAGE;
            }
            arguments->timeout_ms = (int)(seconds * 1000);
        } else if (flag == 'v') {
            printf("icecachectl %s\n", ICECACHE_VERSION);
            return EXIT_SUCCESS;
        } else {
            fputs(usage, flag == 'h' ? stdout : stderr);
            return flag == 'h' ? EXIT_SUCCESS : EXIT_USAGE;
        }
    }
    if (optind + 1 != argc) {
        fputs(usage, stderr);
        return EXIT_USAGE;
    }
    arguments->command = argv[optind];
    bool fits = directory ? snprintf(arguments->directory, sizeof arguments->directory, "%s", directory) <
                                (int)sizeof arguments->directory
                          : control_default_directory(arguments->directory, sizeof arguments->directory) == ICE_OK;
    if (!fits)
        fprintf(stderr, "icecachectl: the socket folder's path is too long for a socket\n");
    return fits ? -1 : EXIT_USAGE;
}

int main(int argc, char **argv)
{
    struct arguments arguments;
    int outcome = read_arguments(&arguments, argc, argv);
    if (outcome >= 0)
        return outcome;
    bool is_stats = strcmp(arguments.command, "stats") == 0;
    if (!is_stats && strcmp(arguments.command, "ping") != 0 && strcmp(arguments.command, "version") != 0) {
        fprintf(stderr, "icecachectl: unknown command '%s'\n%s", arguments.command, usage);
        return EXIT_USAGE;
    }
    struct ctl_connection connection;
    ice_status status = ctl_connect(&connection, arguments.directory, arguments.timeout_ms);
    if (status == ICE_OK)
        outcome = is_stats ? stats(&connection, &arguments) : ping(&connection, &arguments);
    else
        outcome = status == ICE_NO_DAEMON ? EXIT_NO_DAEMON : EXIT_FAILURE;
    if (outcome != EXIT_SUCCESS)
        fprintf(stderr, "icecachectl: %s\n", connection.error);
    ctl_close(&connection);
    return outcome;
}
