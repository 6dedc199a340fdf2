// Options of the daemon. Reads its list (config.h) for defaults, environment, arguments and help alike, so that they
// cannot differ. Runs before any thread.
#include "cached/config.h"

#include "gpu/driver.h"
#include "gpu/nvml.h"
#include "proto/control.h"

#include <ctype.h>
#include <errno.h>
#include <getopt.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

enum type { SIZE, NUMBER, OCTAL };

struct number {
    const char *flag;
    enum type type;
    uint64_t initial, min, max;
    const char *help;
    size_t offset, given_offset;
};

static const struct number numbers[] = {
#define CONFIG_ROW(field, flag, type, initial, min, max, help)                                                         \
    {flag, type, initial, min, max, help, offsetof(struct config, field), offsetof(struct config, given.field)},
    CONFIG_NUMBERS(CONFIG_ROW)
#undef CONFIG_ROW
};
#define NUMBER_COUNT (sizeof numbers / sizeof *numbers)

struct choice {
    const char *flag, *words; // separated by |
    unsigned initial;
    const char *help;
    size_t offset;
};

static const struct choice choices[] = {
#define CONFIG_ROW(field, flag, words, initial, help) {flag, words, initial, help, offsetof(struct config, field)},
    CONFIG_CHOICES(CONFIG_ROW)
#undef CONFIG_ROW
};
#define CHOICE_COUNT (sizeof choices / sizeof *choices)

enum {
    FLAG_SOCKET_DIR = 1000,
    FLAG_LOG_LEVEL,
    FLAG_CUDA_LIBRARY,
    FLAG_SPILL_DIR,
    FLAG_NVML_LIBRARY,
    FLAG_QUOTA,
    FLAG_QUOTA_DEFAULT,
    FLAG_HELP,
    FLAG_VERSION,
    FLAG_CHOICE
};

bool config_parse_size(const char *text, uint64_t *out)
{
    char *end;
    errno = 0;
    if (!isdigit((unsigned char)*text))
        return false;
    unsigned long long value = strtoull(text, &end, 10);
    static const char suffixes[] = "kmgt";
    unsigned shift = 0;
    if (*end) {
        const char *suffix = strchr(suffixes, tolower((unsigned char)*end));
        if (!suffix || (end[1] && strcasecmp(end + 1, "b") != 0 && strcasecmp(end + 1, "ib") != 0))
            return false;
        shift = 10u * (unsigned)(suffix - suffixes + 1);
    }
    if (errno || (shift && value > UINT64_MAX >> shift))
        return false;
    *out = (uint64_t)value << shift;
    return true;
}

static bool parse_number(enum type type, const char *text, uint64_t *out)
{
    if (type == SIZE)
        return config_parse_size(text, out);
    char *end;
    errno = 0;
    if (!isdigit((unsigned char)*text))
        return false;
    *out = strtoull(text, &end, type == OCTAL ? 8 : 10);
    return errno == 0 && *end == '\0';
}

static bool set_number(struct config *config, const struct number *number, const char *text, char *error,
                       size_t capacity)
{
    uint64_t value;
    if (!parse_number(number->type, text, &value) || value < number->min || value > number->max) {
        const char *format = number->type == OCTAL  ? "--%s: '%s' is not a mode from %llo to %llo"
                             : number->type == SIZE ? "--%s: '%s' is not a size from %llu to %llu bytes (k, m, g and t "
                                                      "may follow the number)"
                                                    : "--%s: '%s' is not a number from %llu to %llu";
        snprintf(error, capacity, format, number->flag, text, (unsigned long long)number->min,
                 (unsigned long long)number->max);
        return false;
    }
    memcpy((char *)config + number->offset, &value, sizeof value);
    memcpy((char *)config + number->given_offset, &(bool){true}, sizeof(bool));
    return true;
}

// The number-th of words that are separated by |; its length, 0 where there is none.
static size_t word_at(const char *words, unsigned number, const char **out)
{
    for (; number > 0 && words; number--) {
        words = strchr(words, '|');
        words = words ? words + 1 : NULL;
    }
    *out = words;
    return words ? strcspn(words, "|") : 0;
}

static bool set_choice(struct config *config, const struct choice *choice, const char *text, char *error,
                       size_t capacity)
{
    const char *word;
    size_t length;
    for (unsigned i = 0; (length = word_at(choice->words, i, &word)) > 0; i++) {
        if (strlen(text) == length && memcmp(text, word, length) == 0) {
            memcpy((char *)config + choice->offset, &i, sizeof i);
            return true;
        }
    }
    snprintf(error, capacity, "--%s: '%s' is none of %s", choice->flag, text, choice->words);
    return false;
}

static bool set_text(char *field, size_t field_bytes, const char *flag, const char *text, char *error, size_t capacity)
{
    if (text[0] == '\0') {
        snprintf(error, capacity, "--%s: empty; leave it out for the default", flag);
        return false;
    }
    if (strlen(text) >= field_bytes) {
        snprintf(error, capacity, "--%s: longer than %zu bytes", flag, field_bytes - 1);
        return false;
    }
    strcpy(field, text);
    return true;
}

#define VARIABLE_BYTES 64

// --pool-bytes -> ICECACHE_POOL_BYTES, whose name goes to `name`
static const char *environment_of(const char *flag, char *name)
{
    strcpy(name, "ICECACHE_");
    size_t used = strlen(name);
    for (; *flag && used < VARIABLE_BYTES - 1; flag++)
        name[used++] = *flag == '-' ? '_' : (char)toupper((unsigned char)*flag);
    name[used] = '\0';
    return getenv(name);
}

// Says after the error that its value came from a variable, because nobody sees it in the command line.
static bool blame_variable(const char *name, char *error, size_t capacity)
{
    size_t used = strlen(error);
    snprintf(error + used, capacity - used, "; it comes from the environment: %s", name);
    return false;
}

static bool read_environment(struct config *config, char *error, size_t capacity)
{
    char name[VARIABLE_BYTES];
    for (size_t i = 0; i < NUMBER_COUNT; i++) {
        const char *text = environment_of(numbers[i].flag, name);
        if (text && !set_number(config, &numbers[i], text, error, capacity))
            return blame_variable(name, error, capacity);
    }
    for (size_t i = 0; i < CHOICE_COUNT; i++) {
        const char *text = environment_of(choices[i].flag, name);
        if (text && !set_choice(config, &choices[i], text, error, capacity))
            return blame_variable(name, error, capacity);
    }
    const char *level = environment_of("log-level", name);
    if (level && !set_text(config->log_level, sizeof config->log_level, "log-level", level, error, capacity))
        return blame_variable(name, error, capacity);
    const char *library = environment_of("cuda-library", name);
    if (library &&
        !set_text(config->cuda_library, sizeof config->cuda_library, "cuda-library", library, error, capacity))
        return blame_variable(name, error, capacity);
    library = environment_of("nvml-library", name);
    if (library &&
        !set_text(config->nvml_library, sizeof config->nvml_library, "nvml-library", library, error, capacity))
        return blame_variable(name, error, capacity);
    const char *quota = environment_of("quota", name);
    if (quota && !config_add_quotas(config, quota, error, capacity))
        return blame_variable(name, error, capacity);
    quota = environment_of("quota-default", name);
    if (quota && !config_set_default_quota(config, quota, error, capacity))
        return blame_variable(name, error, capacity);
    const char *spill = environment_of("spill-dir", name);
    if (spill &&
        !set_text(config->spill_directory, sizeof config->spill_directory, "spill-dir", spill, error, capacity))
        return blame_variable(name, error, capacity);
    return true;
}

static enum config_outcome read_arguments(struct config *config, int argc, char *const *argv, char *error,
                                          size_t capacity)
{
    struct option options[NUMBER_COUNT + CHOICE_COUNT + 10] = {{0}};
    for (size_t i = 0; i < NUMBER_COUNT; i++)
        options[i] = (struct option){numbers[i].flag, required_argument, NULL, (int)i};
    options[NUMBER_COUNT] = (struct option){"socket-dir", required_argument, NULL, FLAG_SOCKET_DIR};
    options[NUMBER_COUNT + 1] = (struct option){"log-level", required_argument, NULL, FLAG_LOG_LEVEL};
    options[NUMBER_COUNT + 2] = (struct option){"help", no_argument, NULL, FLAG_HELP};
    options[NUMBER_COUNT + 3] = (struct option){"version", no_argument, NULL, FLAG_VERSION};
    options[NUMBER_COUNT + 4] = (struct option){"cuda-library", required_argument, NULL, FLAG_CUDA_LIBRARY};
    options[NUMBER_COUNT + 5] = (struct option){"spill-dir", required_argument, NULL, FLAG_SPILL_DIR};
    options[NUMBER_COUNT + 6] = (struct option){"nvml-library", required_argument, NULL, FLAG_NVML_LIBRARY};
    options[NUMBER_COUNT + 7] = (struct option){"quota", required_argument, NULL, FLAG_QUOTA};
    options[NUMBER_COUNT + 8] = (struct option){"quota-default", required_argument, NULL, FLAG_QUOTA_DEFAULT};
    for (size_t i = 0; i < CHOICE_COUNT; i++)
        options[NUMBER_COUNT + 9 + i] = (struct option){choices[i].flag, required_argument, NULL, FLAG_CHOICE + (int)i};
    optind = 1;
    opterr = 0;
    for (int flag; (flag = getopt_long(argc, argv, ":h", options, NULL)) != -1;) {
        bool ok = true;
        if (flag == FLAG_HELP || flag == 'h')
            return CONFIG_HELP;
        if (flag == FLAG_VERSION)
            return CONFIG_VERSION;
        if (flag == '?' || flag == ':') {
            snprintf(error, capacity, flag == ':' ? "%s needs a value" : "unknown option %s; see --help",
                     argv[optind - 1]);
            return CONFIG_ERROR;
        }
        if (flag == FLAG_SOCKET_DIR)
            ok = set_text(config->socket_directory, sizeof config->socket_directory, "socket-dir", optarg, error,
                          capacity);
        else if (flag == FLAG_LOG_LEVEL)
            ok = set_text(config->log_level, sizeof config->log_level, "log-level", optarg, error, capacity);
        else if (flag == FLAG_CUDA_LIBRARY)
            ok = set_text(config->cuda_library, sizeof config->cuda_library, "cuda-library", optarg, error, capacity);
        else if (flag == FLAG_NVML_LIBRARY)
            ok = set_text(config->nvml_library, sizeof config->nvml_library, "nvml-library", optarg, error, capacity);
        else if (flag == FLAG_SPILL_DIR)
            ok =
                set_text(config->spill_directory, sizeof config->spill_directory, "spill-dir", optarg, error, capacity);
        else if (flag == FLAG_QUOTA)
            ok = config_add_quotas(config, optarg, error, capacity);
        else if (flag == FLAG_QUOTA_DEFAULT)
            ok = config_set_default_quota(config, optarg, error, capacity);
        else if (flag >= FLAG_CHOICE)
            ok = set_choice(config, &choices[flag - FLAG_CHOICE], optarg, error, capacity);
        else
            ok = set_number(config, &numbers[flag], optarg, error, capacity);
        if (!ok)
            return CONFIG_ERROR;
    }
    if (optind < argc) {
        snprintf(error, capacity, "unexpected argument '%s'; see --help", argv[optind]);
        return CONFIG_ERROR;
    }
    return CONFIG_RUN;
}

enum config_outcome config_read(struct config *config, int argc, char *const *argv, char *error, size_t capacity)
{
    *config = (struct config){
        .log_level = "info", .cuda_library = CUDA_LIBRARY_DEFAULT, .nvml_library = NVML_LIBRARY_DEFAULT};
    for (size_t i = 0; i < NUMBER_COUNT; i++)
        memcpy((char *)config + numbers[i].offset, &numbers[i].initial, sizeof numbers[i].initial);
    for (size_t i = 0; i < CHOICE_COUNT; i++)
        memcpy((char *)config + choices[i].offset, &choices[i].initial, sizeof choices[i].initial);
    if (control_default_directory(config->socket_directory, sizeof config->socket_directory) != ICE_OK)
        config->socket_directory[0] = '\0'; // too long: --socket-dir may still name a shorter one
    if (!read_environment(config, error, capacity))
        return CONFIG_ERROR;
    enum config_outcome outcome = read_arguments(config, argc, argv, error, capacity);
    if (outcome == CONFIG_RUN && config->socket_directory[0] == '\0') {
        snprintf(error, capacity,
                 "the default socket folder's path is too long for a socket; name one by --socket-dir");
        return CONFIG_ERROR;
    }
    return outcome;
}

void config_print_help(FILE *file)
{
    fprintf(
        file,
        "usage: icecached [options]\n"
        "Keeps the KV caches of inference workers on this node and finds the tokens their queries attend to.\n\n"
        "  --socket-dir DIR          where the sockets and the lock file are (ICECACHE_SOCKET_DIR)\n"
        "  --log-level LEVEL         error, warn, info or debug (default info)\n"
        "  --cuda-library FILE       the CUDA driver, loaded for the first landing on a GPU (default libcuda.so.1)\n"
        "  --nvml-library FILE       NVML, which says how much GPU memory the daemon takes (default "
        "libnvidia-ml.so.1)\n"
        "  --spill-dir DIR           where the spill file is: pages that are not used leave memory for it (default "
        "none)\n"
        "  --quota NAME:ram=BYTES,disk=BYTES,sequences=N\n"
        "                            what a namespace may have; once for each, or several with semicolons between "
        "them\n"
        "  --quota-default ram=BYTES,disk=BYTES,sequences=N\n"
        "                            what each of the others may have (default no limit)\n");
    for (size_t i = 0; i < NUMBER_COUNT; i++) {
        const struct number *number = &numbers[i];
        char value[32];
        if (number->type == OCTAL)
            snprintf(value, sizeof value, "%04llo", (unsigned long long)number->initial);
        else if (number->type == SIZE)
            snprintf(value, sizeof value, "%llum", (unsigned long long)(number->initial >> 20));
        else
            snprintf(value, sizeof value, "%llu", (unsigned long long)number->initial);
        fprintf(file, "  --%-23s %s (default %s)\n", number->flag, number->help, value);
    }
    for (size_t i = 0; i < CHOICE_COUNT; i++) {
        const char *word;
        const int length = (int)word_at(choices[i].words, choices[i].initial, &word);
        fprintf(file, "  --%-23s %s: %s (default %.*s)\n", choices[i].flag, choices[i].words, choices[i].help, length,
                word);
    }
    fprintf(
        file,
        "  --help, --version\n\n"
        "Every option is also an environment variable: --pool-bytes is ICECACHE_POOL_BYTES. Sizes take k, m, g or t.\n"
        "SIGTERM answers what is in flight and exits; a second one exits at once.\n");
}
