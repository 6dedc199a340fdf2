// The command line of icecache-replay.
#include "replay.h"

#include <errno.h>
#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>

static const char usage_text[] =
    "usage: icecache-replay --trace DIR [options]\n"
    "Plays a trace of attention through icecached as an inference engine would, and compares what was retrieved\n"
    "with full attention.\n"
    "\n"
    "  --trace DIR       folder with manifest.json and L<layer>_{K,V,Q}.npy\n"
    "  --socket-dir DIR  where the daemon listens (default: $ICECACHE_SOCKET_DIR, else the usual places)\n"
    "  --budget N        tokens to retrieve per KV head; repeatable (default: 64 and 256)\n"
    "  --sinks N         first tokens that are always sent (default: 16)\n"
    "  --window N        last tokens that are always sent (default: 64)\n"
    "  --steps N         decode steps (default: all of the trace)\n"
    "  --exact           retrieve everything and check it bit for bit\n"
    "  --name NAME       name in the table and in the daemon's statistics (default: replay)\n"
    "  --json            one JSON object instead of the table\n"
    "  --progress        progress lines on stderr\n"
    "  --help            this text\n"
    "  --version         the library's version\n"
    "\n"
    "exit: 0 ok, 1 a check or a call failed, 2 wrong usage or unreadable trace, 3 no daemon\n";

enum option_code {
    OPTION_TRACE = 256,
    OPTION_SOCKET_DIR,
    OPTION_BUDGET,
    OPTION_SINKS,
    OPTION_WINDOW,
    OPTION_STEPS,
    OPTION_EXACT,
    OPTION_NAME,
    OPTION_JSON,
    OPTION_PROGRESS,
    OPTION_HELP,
    OPTION_VERSION,
};

static const struct option long_options[] = {
    {"trace", required_argument, NULL, OPTION_TRACE},
    {"socket-dir", required_argument, NULL, OPTION_SOCKET_DIR},
    {"budget", required_argument, NULL, OPTION_BUDGET},
    {"sinks", required_argument, NULL, OPTION_SINKS},
    {"window", required_argument, NULL, OPTION_WINDOW},
    {"steps", required_argument, NULL, OPTION_STEPS},
    {"exact", no_argument, NULL, OPTION_EXACT},
    {"name", required_argument, NULL, OPTION_NAME},
    {"json", no_argument, NULL, OPTION_JSON},
    {"progress", no_argument, NULL, OPTION_PROGRESS},
    {"help", no_argument, NULL, OPTION_HELP},
    {"version", no_argument, NULL, OPTION_VERSION},
    {NULL, 0, NULL, 0},
};

static bool parse_count(const char *option, const char *text, uint32_t least, uint32_t *out)
{
    char *end;
    errno = 0;
    unsigned long long value = strtoull(text, &end, 10);
    if (errno != 0 || *text < '0' || *text > '9' || *end != '\0' || value < least || value > 1u << 24) {
        (void)fprintf(stderr, "icecache-replay: --%s takes a number from %u to %u, not '%s'\n", option, least, 1u << 24,
                      text);
        return false;
    }
    *out = (uint32_t)value;
    return true;
}

static bool add_budget(struct replay_options *options, const char *text)
{
    if (options->budget_count == REPLAY_BUDGETS_MAX) {
        (void)fprintf(stderr, "icecache-replay: at most %u budgets\n", REPLAY_BUDGETS_MAX);
        return false;
    }
    uint32_t budget;
    if (!parse_count("budget", text, 1, &budget)) {
        return false;
    }
    uint32_t at = options->budget_count++;
    for (; at > 0 && options->budgets[at - 1] > budget; at--) {
        options->budgets[at] = options->budgets[at - 1];
    }
    options->budgets[at] = budget;
    return true;
}

// -1 to go on, else the exit code.
static int take_option(struct replay_options *options, int code, const char *argument)
{
    bool is_valid = true;
    switch (code) {
    case OPTION_TRACE:
        options->trace_folder = argument;
        break;
    case OPTION_SOCKET_DIR:
        options->socket_directory = argument;
        break;
    case OPTION_BUDGET:
        is_valid = add_budget(options, argument);
        break;
    case OPTION_SINKS:
        is_valid = parse_count("sinks", argument, 0, &options->sinks);
        break;
    case OPTION_WINDOW:
        is_valid = parse_count("window", argument, 0, &options->window);
        break;
    case OPTION_STEPS:
        is_valid = parse_count("steps", argument, 1, &options->steps);
        break;
    case OPTION_EXACT:
        options->exact = true;
        break;
    case OPTION_NAME:
        options->name = argument;
        break;
    case OPTION_JSON:
        options->json = true;
        break;
    case OPTION_PROGRESS:
        options->progress = true;
        break;
    case OPTION_HELP:
        (void)fputs(usage_text, stdout);
        return REPLAY_OK;
    case OPTION_VERSION:
        (void)printf("icecache-replay %s\n", ice_version());
        return REPLAY_OK;
    default:
        is_valid = false;
        (void)fputs("icecache-replay: try --help\n", stderr);
    }
    return is_valid ? -1 : REPLAY_USAGE;
}

int replay_options_parse(struct replay_options *options, int argc, char **argv)
{
    *options = (struct replay_options){.name = "replay", .sinks = ICE_DEFAULT_SINKS, .window = ICE_DEFAULT_WINDOW};
    int code;
    while ((code = getopt_long(argc, argv, "", long_options, NULL)) != -1) {
        int exit_code = take_option(options, code, optarg);
        if (exit_code != -1) {
            return exit_code;
        }
    }
    if (optind < argc || options->trace_folder == NULL) {
        (void)fputs("icecache-replay: --trace DIR is needed, and nothing but options; try --help\n", stderr);
        return REPLAY_USAGE;
    }
    if (options->exact && options->budget_count > 0) {
        (void)fputs("icecache-replay: --exact chooses the budget itself\n", stderr);
        return REPLAY_USAGE;
    }
    if (options->budget_count == 0 && !options->exact) {
        options->budgets[0] = 64;
        options->budgets[1] = 256;
        options->budget_count = 2;
    }
    return -1;
}
