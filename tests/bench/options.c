// Parsing by getopt_long, with defaults per command.
#include "options.h"

#include <errno.h>
#include <getopt.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define IDLE_DEFAULT 1000u
#define PAGE_UNIT    4096u // direct transfers come in pieces of it

static const char help[] =
    "usage: icecache-bench COMMAND [options]\n"
    "\n"
    "commands\n"
    "  search   build, insertion, memory and search of one lane: the tree beside exact scans\n"
    "  copy     bringing a selection of 8 KV heads into a landing: gathered in host memory, and on to a GPU\n"
    "  reuse    steps of a trace that keep a part of the last selection: attention mass against bytes moved\n"
    "  serve    retrieves end to end, by a daemon and workers that are started for it, also with too little memory\n"
    "  spill    pages on their way to a file system and back, by the daemon's disk and by fio\n"
    "  step     the whole node job of one decode step at a model's shape: search and gather of all lanes\n"
    "\n"
    "options (LIST: numbers with commas between them)\n"
    "  --json              one JSON object instead of a table\n"
    "  --seed N            of data and trees (1)\n"
    "  --rounds N          interleaved rounds; times are medians over them (5; serve without --trace and --ram-cap: "
    "3)\n"
    "  --seeds N           search: trees built with different seeds (3)\n"
    "  --trace DIR         data: a trace folder; may be repeated\n"
    "  --data KIND[,KIND]  data: attention, gauss, or both (attention)\n"
    "  --tokens LIST       of generated data (search 4096,32768; step 36000; serve 8192, one only)\n"
    "  --head-dim LIST     of generated data, search and copy (128)\n"
    "  --query-heads LIST  of generated data, per KV head, search (4)\n"
    "  --queries N         search: per lane, reuse: steps (64)\n"
    "  --budget LIST       tokens to select (64,256; serve 64, one only); the first one is timed by search; copy: "
    "tokens a\n"
    "                      KV head\n"
    "  --sinks N           of traces, and of serve (16)\n"
    "  --window N          of traces, and of serve (64)\n"
    "  --policy NAME[,NAME]\n"
    "                      policies that build trees: means, promotion (search both; step means)\n"
    "  --insert-share X    search: share of the tokens that is inserted one by one (0.0625)\n"
    "  --peers             search: FAISS and hnswlib, through their Python wheels\n"
    "  --python PATH       the interpreter that has them (python3)\n"
    "  --shape NAME        step, serve: llama-3.1-8b (32 layers x 8 KV heads, 4 query heads each, head_dim 128), "
    "slice\n"
    "                      (4 x 2, 4, 128) or small (4 x 2, 4, 64); step: llama-3.1-8b, serve: slice\n"
    "  --copies N          step: lanes that are made from the same draw of data, or from a trace's lane (64)\n"
    "  --cores LIST        step: threads over the lanes (1)\n"
    "  --no-gather         step: without K and V, which need most of the memory\n"
    "  --workers LIST      serve: worker processes; one only with --ram-cap (1,2,4,16; --trace, --ram-cap: 1)\n"
    "  --steps N           serve: decode steps of a worker in each round, instead of --seconds (--trace, --ram-cap: "
    "32)\n"
    "  --build-tokens N    serve: of the sequences that are clustered meanwhile (131072, less where memory is short)\n"
    "  --mix WxM           serve: W workers with M sequences each that come, grow, fork and go; none: not (4x8; "
    "--trace, "
    "\n"
    "                      --ram-cap: none)\n"
    "  --mix-steps N       serve: decode steps of each of them (128)\n"
    "  --idle N            serve: idle sequences of 256 lanes whose memory is measured; 0: none (1000; --trace, "
    "--ram-cap: 0)\n"
    "  --place NAME[,NAME]\n"
    "                      serve: where landings are: host, pull or push (GPU memory), or auto, which is the first of "
    "push, "
    "pull\n"
    "                      and host that there is; one only with --ram-cap (host)\n"
    "  --transport NAME    serve: zmq, ring (or it fails), or auto: a ring where it is to be had (auto)\n"
    "  --ram-cap LIST      serve: shares of the pages, from 0.01 to 1, that memory has room for; all: "
    "1,0.5,0.25,0.1,0.05\n"
    "  --hint NAME[,NAME]  serve, with --ram-cap: what workers hint at before a retrieve: none, layer (the layer "
    "before, the\n"
    "                      same step), step (the step before, the same layer) or exact (what will be asked) (none)\n"
    "  --think-us N        serve: pause of a worker before each retrieve, not timed (0)\n"
    "  --daemon PATH       serve: the daemon to start (icecached beside this program)\n"
    "  --dir DIR           spill, serve: a folder of the file system to use; one is made in it and removed ($TMPDIR, "
    "or\n"
    "                      spill: here, serve: /tmp)\n"
    "  --bytes N           spill: of the file (1073741824)\n"
    "  --page-bytes N      spill: of a page, a multiple of 4096 (8192)\n"
    "  --depths LIST       spill: pages in flight, up to 64 (1,4,16,32,64)\n"
    "  --seconds X         of each measurement (spill 1, serve 0.5)\n"
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
    WORKERS,
    STEPS,
    PLACE,
    TRANSPORT,
    RAM_CAP,
    HINT,
    THINK_US,
    DAEMON,
    BUILD_TOKENS,
    MIX,
    MIX_STEPS,
    IDLE,
    HELP
};

// What some of the commands have no use for; it is refused there, because a figure would not be what was asked for.
static const struct {
    int option;
    const char *commands; // that have a use for it, with blanks between them
} of_some[] = {
    {SEEDS, "search"},
    {HEAD_DIM, "search copy"},
    {QUERY_HEADS, "search"},
    {QUERIES, "search reuse"},
    {INSERT_SHARE, "search"},
    {PEERS, "search"},
    {PYTHON, "search"},
    {SHAPE, "step serve"},
    {COPIES, "step"},
    {CORES, "step"},
    {NO_GATHER, "step"},
    {TRACE, "search step serve reuse"},
    {DATA, "search step"},
    {TOKENS, "search step serve"},
    {SINKS, "search step serve reuse"},
    {WINDOW, "search step serve reuse"},
    {POLICY, "search step"},
    {DIR, "spill serve"},
    {BYTES, "spill"},
    {PAGE_BYTES, "spill"},
    {DEPTHS, "spill"},
    {SECONDS, "spill serve"},
    {WORKERS, "serve"},
    {STEPS, "serve"},
    {PLACE, "serve"},
    {TRANSPORT, "serve"},
    {RAM_CAP, "serve"},
    {HINT, "serve"},
    {THINK_US, "serve"},
    {DAEMON, "serve"},
    {BUILD_TOKENS, "serve"},
    {MIX, "serve"},
    {MIX_STEPS, "serve"},
    {IDLE, "serve"},
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
    {"workers", required_argument, NULL, WORKERS},
    {"steps", required_argument, NULL, STEPS},
    {"place", required_argument, NULL, PLACE},
    {"transport", required_argument, NULL, TRANSPORT},
    {"ram-cap", required_argument, NULL, RAM_CAP},
    {"hint", required_argument, NULL, HINT},
    {"think-us", required_argument, NULL, THINK_US},
    {"daemon", required_argument, NULL, DAEMON},
    {"build-tokens", required_argument, NULL, BUILD_TOKENS},
    {"mix", required_argument, NULL, MIX},
    {"mix-steps", required_argument, NULL, MIX_STEPS},
    {"idle", required_argument, NULL, IDLE},
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

const char *const option_transport_names[TRANSPORTS] = {"auto", "zmq", "ring"};

static bool set_transport(struct options *options, const char *text)
{
    for (options->transport = 0; options->transport < TRANSPORTS; options->transport++) {
        if (strcmp(text, option_transport_names[options->transport]) == 0) {
            return true;
        }
    }
    (void)fprintf(stderr, "icecache-bench: --transport %s: auto, zmq and ring are known\n", text);
    return false;
}

const char *const option_place_names[PLACES] = {"host", "pull", "push", "auto"};

const char *const option_hint_names[HINTS] = {"none", "layer", "step", "exact"};

// Numbers of names, in the order given, each once.
static bool parse_each_once(const char *text, const char *const *names, uint32_t count, struct option_list *out)
{
    struct option_list list = {0};
    uint32_t given = 0;
    for (const char *rest = text; rest != NULL;) {
        const size_t n = strcspn(rest, ",");
        uint32_t at = 0;
        while (at < count && (strlen(names[at]) != n || strncmp(rest, names[at], n) != 0)) {
            at++;
        }
        if (at == count || (given & 1u << at) != 0) {
            return false;
        }
        given |= 1u << at;
        list.values[list.count++] = at;
        rest = rest[n] == ',' ? rest + n + 1 : NULL;
    }
    *out = list;
    return true;
}

static bool set_places(struct options *options, const char *text)
{
    const bool good = parse_each_once(text, option_place_names, PLACES, &options->places);
    if (!good) {
        (void)fprintf(stderr, "icecache-bench: --place %s: host, pull, push and auto are known, each once\n", text);
    }
    return good;
}

static bool set_hints(struct options *options, const char *text)
{
    const bool good = parse_each_once(text, option_hint_names, HINTS, &options->hints);
    if (!good) {
        (void)fprintf(stderr, "icecache-bench: --hint %s: none, layer, step and exact are known, each once\n", text);
    }
    return good;
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

// Shares in the order given, behind a 1: what is compared with what fits.
static bool set_ram_caps(struct options *options, const char *text)
{
    struct option_shares shares = {1, {1}};
    for (const char *rest = strcmp(text, "all") == 0 ? "1,0.5,0.25,0.1,0.05" : text; rest != NULL;) {
        char part[24];
        double share;
        const size_t n = strcspn(rest, ",");
        (void)snprintf(part, sizeof part, "%.*s", (int)(n < sizeof part ? n : sizeof part), rest);
        if (shares.count > OPTIONS_LIST_MAX || !parse_real(part, 0.01, 1, "a share", &share)) {
            return false;
        }
        if (share < 1) {
            shares.values[shares.count++] = share;
        }
        rest = rest[n] == ',' ? rest + n + 1 : NULL;
    }
    options->ram_caps = shares;
    return true;
}

// "WxM", or "none".
static bool set_mix(struct options *options, const char *text)
{
    unsigned workers = 0, sequences = 0;
    char behind;
    options->mix_given = true;
    if (strcmp(text, "none") == 0) {
        options->mix_workers = options->mix_sequences = 0;
        return true;
    }
    if (sscanf(text, "%2ux%3u%c", &workers, &sequences, &behind) != 2 || workers < 1 ||
        workers > OPTIONS_MIX_WORKERS_MAX || sequences < 1 || sequences > OPTIONS_MIX_SEQUENCES_MAX) {
        (void)fprintf(stderr,
                      "icecache-bench: --mix %s: WxM is wanted, 1 to %u workers and 1 to %u sequences, or none\n", text,
                      OPTIONS_MIX_WORKERS_MAX, OPTIONS_MIX_SEQUENCES_MAX);
        return false;
    }
    options->mix_workers = workers;
    options->mix_sequences = sequences;
    return true;
}

static const struct options_shape shapes[] = {
    {"llama-3.1-8b", 32, 8, 4, 128}, {"slice", 4, 2, 4, 128}, {"small", 4, 2, 4, 64}};

static bool set_shape(struct options *options, const char *name)
{
    for (size_t i = 0; i < sizeof shapes / sizeof shapes[0]; i++) {
        if (strcmp(shapes[i].name, name) == 0) {
            options->shape = shapes[i].name;
            return true;
        }
    }
    (void)fprintf(stderr, "icecache-bench: --shape %s: only llama-3.1-8b, slice and small are known\n", name);
    return false;
}

const struct options_shape *options_shape(const struct options *options)
{
    const struct options_shape *shape = shapes;
    while (strcmp(shape->name, options->shape) != 0) {
        shape++;
    }
    return shape;
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
    case WORKERS:
        return parse_list(text, 1, 64, &options->workers);
    case STEPS:
        return parse_u32(text, 1, 4096, &options->steps);
    case PLACE:
        return set_places(options, text);
    case TRANSPORT:
        return set_transport(options, text);
    case RAM_CAP:
        return set_ram_caps(options, text);
    case HINT:
        return set_hints(options, text);
    case THINK_US:
        return parse_u32(text, 0, 1000000, &options->think_us);
    case DAEMON:
        options->daemon = text;
        return true;
    case BUILD_TOKENS:
        return parse_u32(text, 512, 1u << 20, &options->build_tokens);
    case MIX:
        return set_mix(options, text);
    case MIX_STEPS:
        return parse_u32(text, 1, 100000, &options->mix_steps);
    case IDLE:
        options->idle_given = true;
        return parse_u32(text, 0, 100000, &options->idle);
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

// Is it one of the words?
static bool is_among(const char *words, const char *word)
{
    const size_t n = strlen(word);
    for (const char *at = words; at != NULL; at = strchr(at, ' ')) {
        at += *at == ' ';
        if (strncmp(at, word, n) == 0 && (at[n] == ' ' || at[n] == '\0')) {
            return true;
        }
    }
    return false;
}

// Are all options that were given (a bit each) of use to this command?
static bool are_used(const char *command, uint64_t given)
{
    for (size_t i = 0; i < sizeof of_some / sizeof *of_some; i++) {
        if (!is_among(of_some[i].commands, command) && (given & UINT64_C(1) << (of_some[i].option - OPTION_FIRST))) {
            (void)fprintf(stderr, "icecache-bench: --%s is not an option of %s, but of: %s\n",
                          name_of(of_some[i].option), command, of_some[i].commands);
            return false;
        }
    }
    return true;
}

// All that serve can show where it has nothing but generated data; a trace's steps are few, and at a share of memory a
// sequence that grows would change it.
static void set_serve_defaults(struct options *options)
{
    const bool is_whole = options->trace_count == 0 && options->ram_caps.count == 0;
    if (options->workers.count == 0) {
        options->workers = is_whole ? (struct option_list){4, {1, 2, 4, 16}} : (struct option_list){1, {1}};
    }
    if (options->steps == 0 && options->seconds == 0 && !is_whole) {
        options->steps = 32;
    }
    if (is_whole && !options->mix_given) {
        options->mix_workers = 4;
        options->mix_sequences = 8;
    }
    if (is_whole && !options->idle_given) {
        options->idle = IDLE_DEFAULT;
    }
    if (options->seconds == 0) {
        options->seconds = 0.5;
    }
    if (options->rounds == 0 && is_whole) {
        options->rounds = 3;
    }
}

static void set_defaults(struct options *options)
{
    const bool is_step = strcmp(options->command, "step") == 0, is_serve = strcmp(options->command, "serve") == 0;
    if (options->tokens.count == 0) {
        options->tokens = is_step    ? (struct option_list){1, {36000}}
                          : is_serve ? (struct option_list){1, {8192}}
                                     : (struct option_list){2, {4096, 32768}};
    }
    if (options->shape == NULL) {
        options->shape = is_serve ? "slice" : "llama-3.1-8b";
    }
    if (is_serve) {
        set_serve_defaults(options);
    }
    if (options->rounds == 0) {
        options->rounds = 5;
    }
    if (options->seconds == 0) {
        options->seconds = 1;
    }
    if (options->places.count == 0) {
        options->places = (struct option_list){1, {PLACE_HOST}};
    }
    if (options->hints.count == 0 && options->ram_caps.count > 0) {
        options->hints = (struct option_list){1, {HINT_NONE}};
    }
    if (options->head_dims.count == 0) {
        options->head_dims = (struct option_list){1, {128}};
    }
    if (options->query_heads.count == 0) {
        options->query_heads = (struct option_list){1, {4}};
    }
    if (options->budgets.count == 0) {
        options->budgets = is_serve ? (struct option_list){1, {64}} : (struct option_list){2, {64, 256}};
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

static bool serve_is_valid(const struct options *options, bool has_seconds)
{
    if (options->steps > 0 && has_seconds) {
        (void)fputs("icecache-bench: serve: --steps and --seconds: one of them\n", stderr);
        return false;
    }
    if (options->ram_caps.count > 0 && has_seconds) {
        (void)fputs("icecache-bench: serve: --ram-cap takes --steps, not --seconds\n", stderr);
        return false;
    }
    if (options->hints.count > 0 && options->ram_caps.count == 0) {
        (void)fputs("icecache-bench: serve: --hint needs --ram-cap: hints are about pages that are not in memory\n",
                    stderr);
        return false;
    }
    if (options->ram_caps.count > 0 && 1 + (options->ram_caps.count - 1) * options->hints.count > OPTIONS_LIST_MAX) {
        (void)fprintf(stderr, "icecache-bench: serve: --ram-cap and --hint: more than %u daemons\n", OPTIONS_LIST_MAX);
        return false;
    }
    const char *list = options->tokens.count > 1                                   ? "tokens"
                       : options->budgets.count > 1                                ? "budget"
                       : options->ram_caps.count > 0 && options->workers.count > 1 ? "workers, with --ram-cap,"
                       : options->ram_caps.count > 0 && options->places.count > 1  ? "place, with --ram-cap,"
                                                                                   : NULL;
    if (list != NULL) {
        (void)fprintf(stderr, "icecache-bench: serve: --%s takes one value\n", list);
    }
    return list == NULL;
}

static bool is_valid(const struct options *options, bool has_seconds)
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
    if (!is_among("search step serve copy spill reuse", options->command)) {
        (void)fprintf(stderr, "icecache-bench: %s: no such command; --help lists them\n", options->command);
        return false;
    }
    return strcmp(options->command, "serve") != 0 || serve_is_valid(options, has_seconds);
}

int options_parse(struct options *options, int argc, char **argv)
{
    *options = (struct options){
        .seed = 1,
        .queries = 64,
        .seeds = 3,
        .insert_share = 0.0625,
        .python = "python3",
        .sinks = 16,
        .window = 64,
        .copies = 64,
        .pages = true,
        .bytes = (uint64_t)1 << 30,
        .page_bytes = 8192,
        .mix_steps = 128,
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
    const bool has_seconds = (given & UINT64_C(1) << (SECONDS - OPTION_FIRST)) != 0;
    return is_valid(options, has_seconds) && are_used(options->command, given) ? 0 : EXIT_USAGE;
}
