// icecached: start-up and tear-down, in order, and nothing else.
#include "cached/config.h"
#include "cached/env_linux.h"
#include "cached/log.h"
#include "cached/memory_check.h"
#include "cached/server.h"

#include <signal.h>
#include <stdio.h>
#include <stdlib.h>

enum { EXIT_USAGE = 2 };

static void block_signals(void)
{
    sigset_t signals;
    sigemptyset(&signals);
    sigaddset(&signals, SIGTERM);
    sigaddset(&signals, SIGINT);
    pthread_sigmask(SIG_BLOCK, &signals, NULL); // inherited by every thread: only the reactor reads them
    signal(SIGPIPE, SIG_IGN);
}

static int serve(struct server *server)
{
    int outcome = EXIT_FAILURE;
    if (server_take_directory(server) && server_take_pool(server) && server_take_disk(server) &&
        prefixes_load(server) && server_start_threads(server) && reactor_init(server) == 0) {
        log_info("ready: version=%s socket-dir=%s shards=%u", ICECACHE_VERSION, server->config->socket_directory,
                 server->shard_count);
        reactor_run(server);
        outcome = EXIT_SUCCESS;
    } else if (server->stopped_early) {
        outcome = EXIT_SUCCESS;
    }
    server_stop_threads(server);
    reactor_fini(server);
    server_fini(server);
    return outcome;
}

int main(int argc, char **argv)
{
    static struct server server;
    struct config config;
    struct env env;
    char error[256];
    enum log_level level;
    switch (config_read(&config, argc, argv, error, sizeof error)) {
    case CONFIG_HELP:
        config_print_help(stdout);
        return EXIT_SUCCESS;
    case CONFIG_VERSION:
        printf("icecached %s\n", ICECACHE_VERSION);
        return EXIT_SUCCESS;
    case CONFIG_ERROR:
        fprintf(stderr, "icecached: %s\n", error);
        return EXIT_USAGE;
    default:
        break;
    }
    if (!log_level_parse(config.log_level, &level)) {
        fprintf(stderr, "icecached: --log-level: '%s' is none of error, warn, info, debug\n", config.log_level);
        return EXIT_USAGE;
    }
    log_set_level(level);
    block_signals();
    env_linux_init(&env);
    if (!memory_fits(&env, &config) || !server_init(&server, &env, &config))
        return EXIT_FAILURE;
    int outcome = serve(&server);
    if (outcome == EXIT_SUCCESS)
        log_info("stopped");
    return outcome;
}
