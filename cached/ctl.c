// icecachectl: asks a running daemon. Exit: 0 ok, 1 failure, 2 usage, 3 no daemon.
#include "cached/ctl_connection.h"
#include "cached/ctl_print.h"
#include "proto/control.h"

#include <getopt.h>
#include <inttypes.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { EXIT_USAGE = 2, EXIT_NO_DAEMON = 3, LIST_PARTS_MAX = 4096 };

struct arguments {
    char directory[108];
    int timeout_ms;
    bool json;
    const struct command *command;
    uint64_t prefix_id;
};

struct command {
    const char *name;
    int operands; // after the name
    int (*run)(struct ctl_connection *, const struct arguments *);
};

static const char usage[] = "usage: icecachectl [options] COMMAND\n"
                            "  ping                  says whether the daemon answers\n"
                            "  version               the daemon's version\n"
                            "  stats                 sequences, tokens, pages, bytes, requests, latencies by phase\n"
                            "  prefixes              the sealed prefixes on the daemon's disk\n"
                            "  remove-prefix ID      forgets one of them\n"
                            "  leases                everything that is held: its owner, age, time unused and bytes\n"
                            "  namespaces            what each namespace has, and its quotas\n"
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
    bool version = strcmp(arguments->command->name, "version") == 0;
    if (arguments->json)
        printf("{\"version\":\"%s\"}\n", connection->daemon_version);
    else
        printf(version ? "%s\n" : "icecached %s answers\n", connection->daemon_version);
    return EXIT_SUCCESS;
}

// Where the rest of a list begins; 0: this was the end.
static uint32_t next_of(const Icecache__Wire__Reply *reply)
{
    switch (reply->body_case) {
    case ICECACHE__WIRE__REPLY__BODY_STATS:
        return reply->stats->sequences_next;
    case ICECACHE__WIRE__REPLY__BODY_LEASE_LIST:
        return reply->lease_list->next;
    case ICECACHE__WIRE__REPLY__BODY_NAMESPACE_LIST:
        return reply->namespace_list->next;
    default:
        return reply->prefix_list->next;
    }
}

// Asks part by part and prints them all; a very long list is cut at LIST_PARTS_MAX parts of 256.
static int list(struct ctl_connection *connection,
                ice_status (*ask)(struct ctl_connection *, uint32_t, Icecache__Wire__Reply **),
                void (*print)(Icecache__Wire__Reply *const *, size_t))
{
    Icecache__Wire__Reply **parts = calloc(LIST_PARTS_MAX, sizeof *parts);
    if (!parts)
        return EXIT_FAILURE;
    size_t count = 0;
    uint32_t from = 0;
    bool ok = true;
    do {
        ok = ask(connection, from, &parts[count]) == ICE_OK;
        from = ok ? next_of(parts[count++]) : 0;
    } while (ok && from > 0 && count < LIST_PARTS_MAX);
    if (ok)
        print(parts, count);
    for (size_t i = 0; i < count; i++)
        icecache__wire__reply__free_unpacked(parts[i], NULL);
    free(parts);
    return ok ? EXIT_SUCCESS : EXIT_FAILURE;
}

static int stats(struct ctl_connection *connection, const struct arguments *arguments)
{
    return list(connection, ctl_stats, arguments->json ? ctl_print_json : ctl_print_table);
}

static int prefixes(struct ctl_connection *connection, const struct arguments *arguments)
{
    return list(connection, ctl_prefixes, arguments->json ? ctl_print_prefixes_json : ctl_print_prefixes_table);
}

static int leases(struct ctl_connection *connection, const struct arguments *arguments)
{
    return list(connection, ctl_leases, arguments->json ? ctl_print_leases_json : ctl_print_leases_table);
}

static int namespaces(struct ctl_connection *connection, const struct arguments *arguments)
{
    return list(connection, ctl_namespaces, arguments->json ? ctl_print_namespaces_json : ctl_print_namespaces_table);
}

static int remove_prefix(struct ctl_connection *connection, const struct arguments *arguments)
{
    if (ctl_remove_prefix(connection, arguments->prefix_id) != ICE_OK)
        return EXIT_FAILURE;
    printf(arguments->json ? "{\"removed\":\"%016" PRIx64 "\"}\n" : "prefix %016" PRIx64 " is removed\n",
           arguments->prefix_id);
    return EXIT_SUCCESS;
}

static const struct command commands[] = {
    {"ping", 0, ping},
    {"version", 0, ping},
    {"stats", 0, stats},
    {"prefixes", 0, prefixes},
    {"remove-prefix", 1, remove_prefix},
    {"leases", 0, leases},
    {"namespaces", 0, namespaces},
};

// Words that are no options: the command and, where it takes one, a prefix's id as `prefixes` prints it.
static bool read_command(struct arguments *arguments, int count, char **words)
{
    for (size_t i = 0; count > 0 && i < sizeof commands / sizeof commands[0]; i++) {
        if (strcmp(words[0], commands[i].name) == 0)
            arguments->command = &commands[i];
    }
    if (count > 0 && !arguments->command)
        fprintf(stderr, "icecachectl: unknown command '%s'\n", words[0]);
    if (!arguments->command || count != 1 + arguments->command->operands) {
        fputs(usage, stderr);
        return false;
    }
    if (count == 2) {
        if (strlen(words[1]) != 16 || strspn(words[1], "0123456789abcdefABCDEF") != 16) {
            fprintf(stderr, "icecachectl: '%s' is not the id of a prefix, 16 hexadecimal digits\n", words[1]);
            return false;
        }
        arguments->prefix_id = strtoull(words[1], NULL, 16);
    }
    return true;
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
    if (!read_command(arguments, argc - optind, argv + optind))
        return EXIT_USAGE;
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
    struct ctl_connection connection;
    ice_status status = ctl_connect(&connection, arguments.directory, arguments.timeout_ms);
    if (status == ICE_OK)
        outcome = arguments.command->run(&connection, &arguments);
    else
        outcome = status == ICE_NO_DAEMON ? EXIT_NO_DAEMON : EXIT_FAILURE;
    if (outcome != EXIT_SUCCESS)
        fprintf(stderr, "icecachectl: %s\n", connection.error);
    ctl_close(&connection);
    return outcome;
}
