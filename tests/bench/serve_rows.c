// Rounds of the serve command become samples, samples become rows.
#include "serve_rows.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

double serve_pages_read(const struct serve_round *round)
{
    const uint64_t retrieves = round->after.retrieves - round->before.retrieves;
    return retrieves > 0 ? (double)(round->after.pages_read - round->before.pages_read) / (double)retrieves : 0;
}

static double wire_us(const struct serve_record *record)
{
    const float wire = record->total_us - record->queue_us - record->search_us - record->fetch_us - record->copy_us;
    return wire > 0 ? (double)wire : 0;
}

static double mean_of(const double *values, uint32_t count)
{
    double sum = 0;
    for (uint32_t i = 0; i < count; i++) {
        sum += values[i];
    }
    return count > 0 ? sum / count : NAN;
}

enum figure { TOTAL, QUEUE, SEARCH, FETCH, COPY, WIRE, FIGURES };

static double figure_of(const struct serve_record *record, enum figure figure)
{
    const double values[FIGURES] = {(double)record->total_us, (double)record->queue_us, (double)record->search_us,
                                    (double)record->fetch_us, (double)record->copy_us,  wire_us(record)};
    return values[figure];
}

static void add_times(struct serve_set *set, const struct serve_round *round, double *values)
{
    const uint32_t count = round->record_count;
    struct samples *const medians[FIGURES] = {&set->p50,   &set->queue, &set->search,
                                              &set->fetch, &set->copy,  &set->wire};
    for (enum figure figure = TOTAL; figure < FIGURES; figure++) {
        for (uint32_t i = 0; i < count; i++) {
            values[i] = figure_of(&round->records[i], figure);
        }
        if (figure == TOTAL) {
            samples_add(&set->mean, mean_of(values, count));
            samples_add(&set->p99, quantile(values, count, 0.99));
            samples_add(&set->p999, quantile(values, count, 0.999));
        }
        samples_add(medians[figure], quantile(values, count, 0.5));
    }
}

// One worker's; returns its retrieves per second.
static double add_worker(struct serve_set *set, const struct serve_answer *answer, const struct serve_record *records,
                         double *kept, double *turnover)
{
    for (uint32_t i = 0; i < answer->record_count; i++) {
        *kept += (double)records[i].kept;
        *turnover += (double)records[i].turnover_bytes;
        set->partial += records[i].partial;
        set->bytes_moved += (double)records[i].bytes;
    }
    set->wrong_rows += answer->wrong_rows;
    return answer->record_count / (1e-9 * (double)(answer->ended_ns - answer->begun_ns));
}

static void add_workers(struct serve_set *set, const struct serve_round *round)
{
    uint64_t begun_ns = UINT64_MAX, ended_ns = 0;
    double slowest = INFINITY, all = 0, kept = 0, turnover = 0;
    const double moved_before = set->bytes_moved;
    const struct serve_record *records = round->records;
    for (uint32_t w = 0; w < round->workers; w++) {
        const struct serve_answer *answer = &round->answers[w];
        const double per_s = add_worker(set, answer, records, &kept, &turnover);
        records += answer->record_count;
        begun_ns = answer->begun_ns < begun_ns ? answer->begun_ns : begun_ns;
        ended_ns = answer->ended_ns > ended_ns ? answer->ended_ns : ended_ns;
        slowest = per_s < slowest ? per_s : slowest;
        all += per_s;
    }
    set->retrieves += round->record_count;
    samples_add(&set->per_s, round->record_count / (1e-9 * (double)(ended_ns - begun_ns)));
    samples_add(&set->slowest, slowest / (all / round->workers));
    samples_add(&set->kept, kept / round->record_count);
    samples_add(&set->moved_over_turnover, (set->bytes_moved - moved_before) / turnover);
}

static void add_device(struct serve_set *set, const struct serve_round *round, double *values)
{
    const double retrieve_p50 = set->p50.values[set->p50.count - 1],
                 retrieve_mean = set->mean.values[set->mean.count - 1];
    memcpy(values, round->device_us, round->device_count * sizeof *values);
    const double mean = mean_of(values, round->device_count);
    const double p50 = quantile(values, round->device_count, 0.5);
    samples_add(&set->device_p50, p50);
    samples_add(&set->device_p99, quantile(values, round->device_count, 0.99));
    samples_add(&set->over_device, retrieve_p50 / p50);
    samples_add(&set->mean_over_device, retrieve_mean / mean);
}

bool serve_set_add(struct serve_set *set, const struct serve_round *round)
{
    const uint32_t count = round->record_count;
    double *values = malloc((count > round->device_count ? count : round->device_count) * sizeof *values);
    if (values == NULL) {
        (void)fputs("icecache-bench: serve: no memory\n", stderr);
        return false;
    }
    add_times(set, round, values);
    add_workers(set, round);
    samples_add(&set->pages_read, serve_pages_read(round));
    const double hinted = (double)(round->after.hinted - round->before.hinted);
    samples_add(&set->hinted, hinted / count);
    if (hinted > 0) {
        samples_add(&set->useful, (double)(round->after.hinted_used - round->before.hinted_used) / hinted);
    }
    samples_add(&set->cpu_us, (double)(round->after.cpu_ns - round->before.cpu_ns) / 1000 / count);
    set->builds += round->builds;
    samples_add(&set->build_s, round->build_s);
    if (round->device_count > 0) {
        add_device(set, round, values);
    }
    free(values);
    return true;
}

void serve_base_add(struct serve_set *set, double *us, uint32_t count)
{
    samples_add(&set->mean, mean_of(us, count));
    samples_add(&set->p50, quantile(us, count, 0.5));
    samples_add(&set->p99, quantile(us, count, 0.99));
    samples_add(&set->p999, quantile(us, count, 0.999));
}

double serve_median_ratio(const struct samples *above, const struct samples *below)
{
    struct samples ratios = {0};
    for (uint32_t i = 0; i < above->count && i < below->count; i++) {
        samples_add(&ratios, above->values[i] / below->values[i]);
    }
    return samples_median(&ratios);
}

// ---- rows ----

static json_t *number(double value)
{
    return isfinite(value) ? json_real(value) : json_null();
}

static json_t *times(const struct serve_set *set)
{
    return json_pack("{s:o, s:o, s:o, s:o, s:o, s:o}", "p50", number(samples_median(&set->p50)), "p50_min",
                     number(samples_min(&set->p50)), "p50_max", number(samples_max(&set->p50)), "p99",
                     number(samples_median(&set->p99)), "p999", number(samples_median(&set->p999)), "mean",
                     number(samples_median(&set->mean)));
}

static json_t *phases(const struct serve_set *set)
{
    return json_pack("{s:o, s:o, s:o, s:o, s:o}", "queue", number(samples_median(&set->queue)), "search",
                     number(samples_median(&set->search)), "fetch", number(samples_median(&set->fetch)), "copy",
                     number(samples_median(&set->copy)), "wire", number(samples_median(&set->wire)));
}

static void add_device_keys(const struct serve_set *set, json_t *row)
{
    (void)json_object_set_new(row, "ram_cap", json_real(set->ram_cap));
    (void)json_object_set_new(row, "pages_read", number(samples_median(&set->pages_read)));
    (void)json_object_set_new(row, "hint", json_string(option_hint_names[set->hint]));
    if (set->hint != HINT_NONE) {
        (void)json_object_set_new(row, "pages_hinted", number(samples_median(&set->hinted)));
        (void)json_object_set_new(row, "hinted_useful", number(samples_median(&set->useful)));
    }
    if (set->device_p50.count > 0) {
        (void)json_object_set_new(row, "device_us",
                                  json_pack("{s:o, s:o}", "p50", number(samples_median(&set->device_p50)), "p99",
                                            number(samples_median(&set->device_p99))));
    }
}

static void add_build_keys(const struct serve_set *set, json_t *row)
{
    (void)json_object_set_new(row, "build_tokens", json_integer(set->build_tokens));
    (void)json_object_set_new(row, "build_lanes", json_integer(set->build_lanes));
    (void)json_object_set_new(row, "builds", json_integer((json_int_t)set->builds));
    (void)json_object_set_new(row, "build_s", number(samples_median(&set->build_s)));
}

json_t *serve_set_row(const struct serve_set *set)
{
    json_t *row = json_pack(
        "{s:s, s:s, s:I, s:I, s:I, s:s, s:s, s:b, s:o, s:o, s:o, s:o, s:o, s:o, s:f, s:o, s:o, s:I, s:I}", "method",
        "retrieve", "data", set->data, "tokens", (json_int_t)set->tokens, "workers", (json_int_t)set->workers,
        "sequences", (json_int_t)set->workers, "class", "decode", "place", option_place_names[set->place], "building",
        (int)set->building, "retrieve_us", times(set), "phase_us", phases(set), "per_s",
        number(samples_median(&set->per_s)), "bytes_moved", number(set->bytes_moved / (double)set->retrieves),
        "resident_share", number(samples_median(&set->resident)), "slowest_over_mean",
        number(samples_median(&set->slowest)), "ready_s", set->ready_s, "kept_share",
        number(samples_median(&set->kept)), "daemon_cpu_us", number(samples_median(&set->cpu_us)), "partial",
        (json_int_t)set->partial, "wrong_rows", (json_int_t)set->wrong_rows);
    if (row == NULL) {
        return NULL;
    }
    (void)json_object_set_new(row, "moved_over_turnover", number(samples_median(&set->moved_over_turnover)));
    if (set->ram_cap > 0) {
        add_device_keys(set, row);
    }
    if (set->building) {
        add_build_keys(set, row);
    }
    return row;
}

json_t *serve_base_row(enum serve_base base, const struct serve_set *set, uint64_t bytes)
{
    return json_pack("{s:s, s:s, s:b, s:o, s:I}", "method", serve_base_names[base], "data", set->data, "building",
                     (int)set->building, "retrieve_us", times(set), "bytes_moved", (json_int_t)bytes);
}
