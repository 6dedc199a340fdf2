// What icecache-replay prints.
#include "replay.h"

#include <stdarg.h>
#include <stdio.h>

void replay_progress(const struct replay *replay, const char *format, ...)
{
    if (!replay->options->progress) {
        return;
    }
    char line[256];
    va_list arguments;
    va_start(arguments, format);
    (void)vsnprintf(line, sizeof(line), format, arguments);
    va_end(arguments);
    (void)fprintf(stderr, "%s: %s\n", replay->options->name, line);
}

int replay_fail(const struct replay *replay, const char *what, ice_status status)
{
    const char *detail = ice_last_error();
    (void)fprintf(stderr, "icecache-replay: %s: %s: %s: %s\n", replay->options->name, what, ice_status_name(status),
                  detail[0] != '\0' ? detail : ice_status_text(status));
    return status == ICE_NO_DAEMON ? REPLAY_NO_DAEMON : REPLAY_FAILED;
}

void replay_print_table(const struct replay *replay)
{
    (void)printf("%-10s %6s %7s %8s %7s %7s %7s %9s %9s %10s\n", "worker", "budget", "tokens", "build s", "p50 us",
                 "p99 us", "mass %", "of best %", "error", "MB moved");
    for (uint32_t i = 0; i < replay->options->budget_count; i++) {
        const struct replay_row *row = &replay->rows[i];
        (void)printf("%-10s %6u %7llu %8.2f %7.0f %7.0f %7.2f %9.2f %9.4f %10.1f\n", replay->options->name, row->budget,
                     (unsigned long long)(replay->trace.first_query + replay->steps), replay->ready_s, row->p50_us,
                     row->p99_us, 100 * row->mass, 100 * row->share, row->output_error,
                     1e-6 * (double)row->bytes_moved);
    }
}

// A JSON string; control bytes in names are replaced, the rest of UTF-8 passes through.
static void print_string(const char *text)
{
    (void)putchar('"');
    for (const char *c = text; *c != '\0'; c++) {
        if (*c == '"' || *c == '\\') {
            (void)putchar('\\');
        }
        (void)putchar((unsigned char)*c < 0x20 ? '?' : *c);
    }
    (void)putchar('"');
}

static void print_row(const struct replay_row *row)
{
    (void)printf("{\"budget\": %u, \"retrieve_us\": {\"p50\": %.1f, \"p99\": %.1f}, \"mass\": %.6f, \"share\": %.6f, "
                 "\"output_error\": %.6f, \"estimated_mass\": %.6f, \"bytes_moved\": %llu, \"partial\": %llu}",
                 row->budget, row->p50_us, row->p99_us, row->mass, row->share, row->output_error, row->estimated_mass,
                 (unsigned long long)row->bytes_moved, (unsigned long long)row->partial);
}

void replay_print_json(const struct replay *replay)
{
    const struct trace *trace = &replay->trace;
    (void)printf("{\"command\": \"icecache-replay\", \"version\": ");
    print_string(ice_version());
    (void)printf(", \"name\": ");
    print_string(replay->options->name);
    (void)printf(", \"trace\": ");
    print_string(trace->name);
    (void)printf(", \"tokens\": %llu, \"prompt_tokens\": %llu, \"steps\": %u, \"layers\": %u, \"kv_heads\": %u, "
                 "\"query_heads\": %u, \"head_dim\": %u, \"dtype\": \"%s\", \"sinks\": %u, \"window\": %u, "
                 "\"exact\": %s, \"append_s\": %.6f, \"build_s\": %.6f, \"build_cpu_s\": %.6f, \"pool_bytes\": %llu, "
                 "\"index_bytes\": %llu, \"wrong_rows\": %llu, \"rows\": [",
                 (unsigned long long)(trace->first_query + replay->steps), (unsigned long long)trace->first_query,
                 replay->steps, trace->layers, trace->kv_heads, trace->query_heads, trace->head_dim,
                 trace->dtype == ICE_FP32 ? "fp32" : "fp16", replay->options->sinks, replay->options->window,
                 replay->options->exact ? "true" : "false", replay->append_s, replay->ready_s, replay->build_cpu_s,
                 (unsigned long long)replay->pool_bytes, (unsigned long long)replay->index_bytes,
                 (unsigned long long)replay->wrong_rows);
    for (uint32_t i = 0; i < replay->options->budget_count && !replay->options->exact; i++) {
        (void)printf("%s", i > 0 ? ", " : "");
        print_row(&replay->rows[i]);
    }
    (void)printf("]}\n");
}
