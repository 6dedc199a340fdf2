// Quotas of namespaces as options: --quota and --quota-default. Runs before any thread.
#include "cached/config.h"

#include <stdlib.h>
#include <string.h>

#define QUOTA_FORM "ram=BYTES,disk=BYTES,sequences=N"

static bool refuse(char *error, size_t capacity, const char *flag, const char *part, size_t length, const char *why)
{
    snprintf(error, capacity, "--%s: '%.*s' %s", flag, (int)(length < 100 ? length : 100), part, why);
    return false;
}

// One KEY=VALUE.
static bool read_part(struct config_quota *quota, const char *flag, const char *part, size_t length, char *error,
                      size_t capacity)
{
    const struct {
        const char *key;
        uint64_t *out;
        uint64_t max;
    } keys[] = {{"ram=", &quota->ram_bytes, 1ull << 46},
                {"disk=", &quota->disk_bytes, 1ull << 46},
                {"sequences=", &quota->sequences, 1u << 20}};
    char value[32] = "";
    for (size_t i = 0; i < sizeof keys / sizeof *keys; i++) {
        const size_t key = strlen(keys[i].key);
        if (length <= key || length - key >= sizeof value || memcmp(part, keys[i].key, key) != 0)
            continue;
        memcpy(value, part + key, length - key);
        // Numbers take the suffixes of sizes too: a thousand sequences may be 1k.
        if (config_parse_size(value, keys[i].out) && *keys[i].out > 0 && *keys[i].out <= keys[i].max)
            return true;
        return refuse(error, capacity, flag, part, length,
                      "is no quota: a number above 0, which k, m, g or t may follow; leave it out for no limit");
    }
    return refuse(error, capacity, flag, part, length, "is no part of a quota; give " QUOTA_FORM);
}

static bool read_parts(struct config_quota *quota, const char *flag, const char *text, size_t length, char *error,
                       size_t capacity)
{
    for (const char *end = text + length; text <= end;) {
        const char *comma = memchr(text, ',', (size_t)(end - text));
        const size_t part = (size_t)((comma ? comma : end) - text);
        if (!read_part(quota, flag, text, part, error, capacity))
            return false;
        text += part + 1;
    }
    return true;
}

// The name may have colons of its own.
static bool read_quota(struct config_quota *quota, const char *text, size_t length, char *error, size_t capacity)
{
    size_t name = length;
    while (name > 0 && text[name - 1] != ':')
        name--;
    if (name <= 1)
        return refuse(error, capacity, "quota", text, length, "names no namespace; give NAME:" QUOTA_FORM);
    if (name - 1 > WIRE_NAME_BYTES_MAX)
        return refuse(error, capacity, "quota", text, length, "names a namespace of more than 128 bytes");
    memcpy(quota->name_space, text, name - 1);
    return read_parts(quota, "quota", text + name, length - name, error, capacity);
}

static struct config_quota *place_of(struct config *config, const char *name_space)
{
    for (uint32_t i = 0; i < config->quota_count; i++) {
        if (strcmp(config->quotas[i].name_space, name_space) == 0)
            return &config->quotas[i];
    }
    return config->quota_count < CONFIG_QUOTAS_MAX ? &config->quotas[config->quota_count++] : NULL;
}

bool config_add_quotas(struct config *config, const char *text, char *error, size_t capacity)
{
    for (;;) {
        struct config_quota quota = {0};
        const size_t length = strcspn(text, ";");
        if (!read_quota(&quota, text, length, error, capacity))
            return false;
        struct config_quota *place = place_of(config, quota.name_space);
        if (!place) {
            snprintf(error, capacity, "--quota: more than %u namespaces; use --quota-default for the others",
                     CONFIG_QUOTAS_MAX);
            return false;
        }
        *place = quota;
        if (text[length] == '\0')
            return true;
        text += length + 1;
    }
}

bool config_set_default_quota(struct config *config, const char *text, char *error, size_t capacity)
{
    struct config_quota quota = {0};
    if (!read_parts(&quota, "quota-default", text, strlen(text), error, capacity))
        return false;
    config->quota_default = quota;
    return true;
}
