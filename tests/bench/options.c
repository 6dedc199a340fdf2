// Parsing by getopt_long, with defaults per command.
#include "options.h"

#include <errno.h>
#include <getopt.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define PAGE_UNIT 4096u // direct transfers come in pieces of it

static const char help[] =
    "usage: icecache-bench COMMAND [options]\n"
    "\n"
    "commands\n"
    "  search   build, insertion, memory and search of one lane: the tree beside exact scans\n"
    "  copy     bringing a selection of 8 KV heads into a landing: gathered in host memory, and on to a GPU\n"
    "  spill    pages on their way to a file system and back, by the daemon's disk and by fio\n"
    "  step     the whole node job of one decode step at a model's shape: search and gather of all lanes\n"
    "\n"
    "options (LIST: numbers with commas between them)\n"
    "  --json              one JSON object instead of a table\n"
    "  --seed N            of data and trees (1)\n"
    "  --rounds N          interleaved rounds; times are medians over them (5)\n"
    "  --seeds N           search: trees built with different seeds (3)\n"
    "  --trace DIR         data: a trace folder; may be repeated\n"
    "  --data KIND[,KIND]  data: attention, gauss, or both (attention)\n"
    "  --tokens LIST       of generated data (search 4096,32768; step 36000)\n"
    "  --head-dim LIST     of generated data, search and copy (128)\n"
    "  --query-heads LIST  of generated data, per KV head, search (4)\n"
    "  --queries N         search: per lane (64)\n"
    "  --budget LIST       tokens to select (64,256); the first one is timed by search; copy: tokens a KV head\n"
    "  --sinks N           of traces (16)\n"
    "  --window N          of traces (64)\n"
    "  --policy NAME[,NAME]\n"
    "                      policies that build trees: means, promotion (search both; step means)\n"
    "  --insert-share X    search: share of the tokens that is inserted one by one (0.0625)\n"
    "  --peers             search: FAISS and hnswlib, through their Python wheels\n"
    "  --python PATH       the interpreter that has them (python3)\n"
    "  --shape NAME        step: llama-3.1-8b (32 layers x 8 KV heads, 4 query heads each, head_dim 128) or small\n"
    "                      (4 x 2, 4, 64)\n"
    "  --copies N          step: lanes that are made from the same draw of data, or from a trace's lane (64)\n"
    "  --cores LIST        step: threads over the lanes (1)\n"
    "  --no-gather         step: without K and V, which need most of the memory\n"
    "  --dir DIR           spill: a folder of the file system to measure; one is made in it ($TMPDIR, or here)\n"
    "  --bytes N           spill: of the file (1073741824)\n"
    "  --page-bytes N      spill: of a page, a multiple of 4096 (8192)\n"
    "  --depths LIST       spill: pages in flight, up to 64 (1,4,16,32,64)\n"
    "  --seconds X         spill: of each measurement (1)\n"
    "\n"
    "exit status: 0, 1 a check inside failed, 2 wrong usage, 3 something needed is missing\n";

enum {
    OPTION_FIRST = 256,
    JSON,
    SEED,
    ROUNDS,
    SEEDS,
    TRACE,
    DATA,
    TOKENS,
    HEAD_DIM,
    QUERY_HEADS,
    QUERIES,
    BUDGET,
    SINKS,
    WINDOW,
    POLICY,
    INSERT_SHARE,
    PEERS,
    PYTHON,
    SHAPE,
    COPIES,
    CORES,
    NO_GATHER,
    DIR,
    BYTES,
    PAGE_BYTES,
    DEPTHS,
    SECONDS,
    HELP
};

// What some of the commands have no use for; it is refused there, because a figure would not be what was asked for.
static const struct {
    int option;
    const char *command, *other; // that have a use for it; NULL: no other
} of_some[] = {
    {SEEDS, "search", NULL},    {HEAD_DIM, "search", "copy"},   {QUERY_HEADS, "search", NULL},
    {QUERIES, "search", NULL},  {INSERT_SHARE, "search", NULL}, {PEERS, "search", NULL},
    {PYTHON, "search", NULL},   {SHAPE, "step", NULL},          {COPIES, "step", NULL},
    {CORES, "step", NULL},      {NO_GATHER, "step", NULL},      {TRACE, "search", "step"},
    {DATA, "search", "step"},   {TOKENS, "search", "step"},     {SINKS, "search", "step"},
    {WINDOW, "search", "step"}, {POLICY, "search", "step"},     {DIR, "spill", NULL},
    {BYTES, "spill", NULL},     {PAGE_BYTES, "spill", NULL},    {DEPTHS, "spill", NULL},
    {SECONDS, "spill", NULL},
};

static const struct option long_options[] = {
    {"json", no_argument, NULL, JSON},
    {"seed", required_argument, NULL, SEED},
    {"rounds", required_argument, NULL, ROUNDS},
    {"seeds", required_argument, NULL, SEEDS},
    {"trace", required_argument, NULL, TRACE},
    {"data", required_argument, NULL, DATA},
    {"tokens", required_argument, NULL, TOKENS},
    {"head-dim", required_argument, NULL, HEAD_DIM},
    {"query-heads", required_argument, NULL, QUERY_HEADS},
    {"queries", required_argument, NULL, QUERIES},
    {"budget", required_argument, NULL, BUDGET},
    {"sinks", required_argument, NULL, SINKS},
    {"window", required_argument, NULL, WINDOW},
    {"policy", required_argument, NULL, POLICY},
    {"insert-share", required_argument, NULL, INSERT_SHARE},
    {"peers", no_argument, NULL, PEERS},
    {"python", required_argument, NULL, PYTHON},
    {"shape", required_argument, NULL, SHAPE},
    {"copies", required_argument, NULL, COPIES},
    {"cores", required_argument, NULL, CORES},
    {"no-gather", no_argument, NULL, NO_GATHER},
    {"dir", required_argument, NULL, DIR},
    {"bytes", required_argument, NULL, BYTES},
    {"page-bytes", required_argument, NULL, PAGE_BYTES},
    {"depths", required_argument, NULL, DEPTHS},
    {"seconds", required_argument, NULL, SECONDS},
    {"help", no_argument, NULL, HELP},
    {NULL, 0, NULL, 0},
};

static bool parse_number(const char *text, uint64_t least, uint64_t most, uint64_t *out)
{
    char *end;
    errno = 0;
    const unsigned long long value = strtoull(text, &end, 10);
    if (errno != 0 || end == text || *end != '\0' || *text == '-' || value < least || value > most) {
        (void)fprintf(stderr, "icecache-bench: %s: not a number from %" PRIu64 " to %" PRIu64 "\n", text, least, most);
        return false;
    }
    *out = value;
    return true;
}

static bool parse_u32(const char *text, uint32_t least, uint32_t most, uint32_t *out)
{
    uint64_t value;
    if (!parse_number(text, least, most, &value)) {
        return false;
    }
    *out = (uint32_t)value;
    return true;
}

static bool parse_list(const char *text, uint32_t least, uint32_t most, struct option_list *out)
{
    struct option_list list = {0};
    for (const char *rest = text; rest != NULL;) {
        char part[24];
        const size_t n = strcspn(rest, ",");
        (void)snprintf(part, sizeof part, "%.*s", (int)(n < sizeof part ? n : sizeof part), rest);
        if (list.count == OPTIONS_LIST_MAX || !parse_u32(part, least, most, &list.values[list.count])) {
            return false;
        }
        list.count++;
        rest = rest[n] == ',' ? rest + n + 1 : NULL;
    }
    *out = list;
    return true;
}

// A list of some of two names.
static bool parse_names(const char *option, const char *text, const char *const names[2], bool chosen[2])
{
    chosen[0] = chosen[1] = false;
    for (const char *rest = text; rest != NULL;) {
        const size_t n = strcspn(rest, ",");
        bool known = false;
        for (int i = 0; i < 2; i++) {
            if (strlen(names[i]) == n && strncmp(rest, names[i], n) == 0) {
                known = chosen[i] = true;
            }
        }
        if (!known) {
            (void)fprintf(stderr, "icecache-bench: --%s %s: only %s and %s are known\n", option, text, names[0],
                          names[1]);
            return false;
        }
        rest = rest[n] == ',' ? rest + n + 1 : NULL;
    }
    return true;
}

static bool parse_real(const char *text, double least, double most, const char *what, double *out)
{
    char *end;
    const double value = strtod(text, &end);
    if (end == text || *end != '\0' || !(value >= least && value <= most)) {
        (void)fprintf(stderr, "icecache-bench: %s: not %s from %g to %g\n", text, what, least, most);
        return false;
    }
    *out = value;
    return true;
}

static bool set_trace(struct options *options, const char *folder)
{
    if (options->trace_count == OPTIONS_LIST_MAX) {
        (void)fprintf(stderr, "icecache-bench: more than %u traces\n", OPTIONS_LIST_MAX);
        return false;
    }
    options->traces[options->trace_count++] = folder;
    return true;
}

static bool set_shape(struct options *options, const char *name)
{
    options->shape = name;
    if (strcmp(name, "llama-3.1-8b") != 0 && strcmp(name, "small") != 0) {
        (void)fprintf(stderr, "icecache-bench: --shape %s: only llama-3.1-8b and small are known\n", name);
        return false;
    }
    return true;
}

static const char *const kind_names[] = {[DATA_ATTENTION] = "attention", [DATA_GAUSS] = "gauss"};
static const char *const policy_names[] = {[INDEX_MEANS] = "means", [INDEX_PROMOTION] = "promotion"};

static bool set(struct options *options, int option, const char *text)
{
    switch (option) {
    case JSON:
        return options->json = true;
    case PEERS:
        return options->peers = true;
    case SEED:
        return parse_number(text, 0, UINT32_MAX, &options->seed);
    case ROUNDS:
        return parse_u32(text, 1, 100, &options->rounds);
    case SEEDS:
        return parse_u32(text, 1, 16, &options->seeds);
    case TRACE:
        return set_trace(options, text);
    case DATA:
        return parse_names("data", text, kind_names, options->kinds);
    case TOKENS:
        return parse_list(text, 256, 1u << 22, &options->tokens);
    case HEAD_DIM:
        return parse_list(text, 16, INDEX_HEAD_DIM_MAX, &options->head_dims);
    case QUERY_HEADS:
        return parse_list(text, 1, INDEX_GROUP_MAX, &options->query_heads);
    case QUERIES:
        return parse_u32(text, 1, 4096, &options->queries);
    case BUDGET:
        return parse_list(text, 16, 4096, &options->budgets);
    case SINKS:
        return parse_u32(text, 0, 4096, &options->sinks);
    case WINDOW:
        return parse_u32(text, 0, 65536, &options->window);
    case POLICY:
        return parse_names("policy", text, policy_names, options->policies);
    case INSERT_SHARE:
        return parse_real(text, 0, 0.9, "a share", &options->insert_share);
    case PYTHON:
        options->python = text;
        return true;
    case SHAPE:
        return set_shape(options, text);
    case COPIES:
        return parse_u32(text, 1, 4096, &options->copies);
    case CORES:
        return parse_list(text, 1, 256, &options->cores);
    case NO_GATHER:
        options->pages = false;
        return true;
    case DIR:
        options->folder = text;
        return true;
    case BYTES:
        return parse_number(text, (uint64_t)1 << 20, (uint64_t)1 << 40, &options->bytes);
    case PAGE_BYTES:
        return parse_u32(text, PAGE_UNIT, 1u << 20, &options->page_bytes);
    case DEPTHS:
        return parse_list(text, 1, 64, &options->depths);
    case SECONDS:
        return parse_real(text, 0.05, 600, "seconds", &options->seconds);
    default:
        return false;
    }
}

static const char *name_of(int option)
{
    const struct option *named = long_options;
    while (named->val != option) {
        named++;
    }
    return named->name;
}

// Are all options that were given (a bit each) of use to this command?
static bool are_used(const char *command, uint64_t given)
{
    for (size_t i = 0; i < sizeof of_some / sizeof *of_some; i++) {
        const char *other = of_some[i].other;
        const bool used = strcmp(of_some[i].command, command) == 0 || (other != NULL && strcmp(other, command) == 0);
        if (!used && (given & UINT64_C(1) << (of_some[i].option - OPTION_FIRST))) {
            (void)fprintf(stderr, "icecache-bench: --%s is an option of %s%s%s, not of %s\n",
                          name_of(of_some[i].option), of_some[i].command, other != NULL ? " and " : "",
                          other != NULL ? other : "", command);
            return false;
        }
    }
    return true;
}

static void set_defaults(struct options *options)
{
    const bool is_step = strcmp(options->command, "step") == 0;
    if (options->tokens.count == 0) {
        options->tokens = is_step ? (struct option_list){1, {36000}} : (struct option_list){2, {4096, 32768}};
    }
    if (options->head_dims.count == 0) {
        options->head_dims = (struct option_list){1, {128}};
    }
    if (options->query_heads.count == 0) {
        options->query_heads = (struct option_list){1, {4}};
    }
    if (options->budgets.count == 0) {
        options->budgets = (struct option_list){2, {64, 256}};
    }
    if (options->cores.count == 0) {
        options->cores = (struct option_list){1, {1}};
    }
    if (options->depths.count == 0) {
        options->depths = (struct option_list){5, {1, 4, 16, 32, 64}};
    }
    if (!options->kinds[0] && !options->kinds[1] && options->trace_count == 0) {
        options->kinds[DATA_ATTENTION] = true;
    }
    if (!options->policies[INDEX_MEANS] && !options->policies[INDEX_PROMOTION]) {
        options->policies[INDEX_MEANS] = true;
        options->policies[INDEX_PROMOTION] = !is_step;
    }
}

static bool is_valid(const struct options *options)
{
    for (uint32_t i = 0; i < options->head_dims.count; i++) {
        if (options->head_dims.values[i] % INDEX_HEAD_DIM_STEP != 0) {
            (void)fprintf(stderr, "icecache-bench: --head-dim must be a multiple of %u\n", INDEX_HEAD_DIM_STEP);
            return false;
        }
    }
    if (options->page_bytes % PAGE_UNIT != 0) {
        (void)fprintf(stderr, "icecache-bench: --page-bytes must be a multiple of %u\n", PAGE_UNIT);
        return false;
    }
    if (strcmp(options->command, "search") != 0 && strcmp(options->command, "step") != 0 &&
        strcmp(options->command, "copy") != 0 && strcmp(options->command, "spill") != 0) {
        (void)fprintf(stderr, "icecache-bench: %s: no such command; --help lists them\n", options->command);
        return false;
    }
    return true;
}

int options_parse(struct options *options, int argc, char **argv)
{
    *options = (struct options){
        .seed = 1,
        .rounds = 5,
        .queries = 64,
        .seeds = 3,
        .insert_share = 0.0625,
        .shape = "llama-3.1-8b",
        .python = "python3",
        .sinks = 16,
        .window = 64,
        .copies = 64,
        .pages = true,
        .bytes = (uint64_t)1 << 30,
        .page_bytes = 8192,
        .seconds = 1,
    };
    uint64_t given = 0;
    for (int option; (option = getopt_long(argc, argv, "", long_options, NULL)) != -1;) {
        if (option == HELP) {
            (void)fputs(help, stdout);
            return -1;
        }
        if (!set(options, option, optarg)) {
            return EXIT_USAGE;
        }
        given |= UINT64_C(1) << (option - OPTION_FIRST);
    }
    if (optind + 1 != argc) {
        (void)fputs(help, stderr);
        return EXIT_USAGE;
    }
    options->command = argv[optind];
    set_defaults(options);
    return is_valid(options) && are_used(options->command, given) ? 0 : EXIT_USAGE;
}
