// The `step` command: the node's job of one decode step at a model's shape, in process, out of cache.
//
// Each lane has its own tree, scan copy and pages; lanes repeat a few draws of data (or a trace's lanes) with different
// queries. First all efforts are judged without a clock, then the default and the cheapest efforts for some shares are
// timed in interleaved rounds beside the int8 scan. Policies are built and measured one after the other, each beside
// the scan again.
#include "step.h"

#include "commands.h"
#include "measure.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define EFFORT_LEAST 0.003
#define EFFORT_STEP  1.25
#define SHARES       3u
#define SETTINGS_MAX (SHARES + 2u)

static const double shares[SHARES] = {0.95, 0.98, 0.99};

// One way to do the step, and what it gave.
struct setting {
    enum step_job job;
    double effort, share, share_mean, scanned;
    struct samples search_ms[2], gather_ms; // [warm]
};

// A policy, a budget and a number of cores.
struct combination {
    enum index_policy policy;
    uint32_t budget, cores;
    struct setting settings[SETTINGS_MAX];
    uint32_t setting_count;
};

static bool judge(struct step *step, uint32_t budget, struct setting *setting)
{
    const struct step_pass pass = {.job = setting->job, .cores = 1, .budget = budget, .effort = setting->effort};
    double ms, mass = 0, best = 0, ratios = 0, scanned = 0;
    if (!step_run(step, &pass, &ms)) {
        (void)fputs("icecache-bench: the index refused a query\n", stderr);
        return false;
    }
    for (uint32_t l = 0; l < step->lane_count; l++) {
        const struct step_lane *lane = &step->lanes[l];
        const double of_lane = reference_mass(lane->reference, lane->query, lane->positions, lane->count);
        const double possible = reference_best(lane->reference, lane->query, budget);
        mass += of_lane;
        best += possible;
        ratios += of_lane / possible;
        scanned += lane->scanned;
    }
    setting->share = mass / best;
    setting->share_mean = ratios / step->lane_count;
    setting->scanned = scanned / step->lane_count;
    return true;
}

// The default effort, the cheapest ones that reach the shares, and the scan.
static bool find_settings(struct step *step, struct combination *combination)
{
    struct setting *settings = combination->settings;
    settings[0] = (struct setting){.job = STEP_TREE};
    settings[1] = (struct setting){.job = STEP_SCAN, .effort = 1};
    combination->setting_count = 2;
    if (!judge(step, combination->budget, &settings[0]) || !judge(step, combination->budget, &settings[1])) {
        return false;
    }
    uint32_t reached = 0;
    double effort = EFFORT_LEAST;
    while (reached < SHARES && effort <= 1) {
        struct setting setting = {.job = STEP_TREE, .effort = effort};
        if (!judge(step, combination->budget, &setting)) {
            return false;
        }
        if (setting.share >= shares[reached]) {
            settings[combination->setting_count++] = setting;
        }
        while (reached < SHARES && setting.share >= shares[reached]) {
            reached++;
        }
        effort = effort < 1 ? fmin(effort * EFFORT_STEP, 1) : 2; // the last one is 1
    }
    return true;
}

static bool check_landing(const struct step *step)
{
    if (!step_landing_is_right(step)) {
        (void)fputs("icecache-bench: check failed: a gathered row is not the token's\n", stderr);
        return false;
    }
    return true;
}

static bool time_setting(struct step *step, const struct combination *combination, struct setting *setting)
{
    for (int warm = 0; warm < 2; warm++) {
        double ms;
        struct step_pass pass = {.job = setting->job,
                                 .cores = combination->cores,
                                 .budget = combination->budget,
                                 .effort = setting->effort,
                                 .warm = warm != 0};
        if (!step_run(step, &pass, &ms)) {
            return false;
        }
        samples_add(&setting->search_ms[warm], ms);
        if (warm != 0 || !step->options->pages) {
            continue;
        }
        // The scan finds positions; where their rows lie is asked outside the measurement.
        for (uint32_t l = 0; setting->job == STEP_SCAN && l < step->lane_count; l++) {
            struct step_lane *lane = &step->lanes[l];
            for (uint32_t i = 0; i < lane->count; i++) {
                index_locate(lane->tree.index, lane->positions[i], 1, &lane->places[i]);
            }
        }
        pass.job = STEP_GATHER;
        if (!step_run(step, &pass, &ms) || !check_landing(step)) {
            return false;
        }
        samples_add(&setting->gather_ms, ms);
    }
    return true;
}

static json_t *number(double value)
{
    return isfinite(value) ? json_real(value) : json_null();
}

static void set(json_t *row, const char *key, double value)
{
    (void)json_object_set_new(row, key, number(value));
}

static void set_samples(json_t *row, const char *key, const struct samples *samples)
{
    char name[32];
    set(row, key, samples_median(samples));
    (void)snprintf(name, sizeof name, "%s_min", key);
    set(row, name, samples_min(samples));
    (void)snprintf(name, sizeof name, "%s_max", key);
    set(row, name, samples_max(samples));
}

static json_t *base_row(const struct step *step, const struct combination *combination)
{
    return json_pack("{s:s, s:i, s:i, s:i, s:i, s:i, s:i}", "data", step->data.name, "tokens", (int)step->data.tokens,
                     "head_dim", (int)step->data.head_dim, "query_heads", (int)step->data.query_heads, "budget",
                     (int)combination->budget, "cores", (int)combination->cores, "lanes", (int)step->lane_count);
}

static json_t *row_of(const struct step *step, const struct combination *combination, const struct setting *setting,
                      bool warm, double bandwidth)
{
    const double keys = (double)step->data.tokens * step->lane_count;
    json_t *row = json_pack("{s:s, s:b}", "method",
                            setting->job == STEP_TREE ? tree_methods[combination->policy] : "scan-i8", "cold", !warm);
    json_t *base = base_row(step, combination);
    (void)json_object_update(row, base);
    json_decref(base);
    if (setting->job == STEP_TREE) {
        (void)json_object_set_new(row, "effort",
                                  setting->effort > 0 ? json_real(setting->effort) : json_string("default"));
    }
    set_samples(row, "search_ms", &setting->search_ms[warm]);
    set_samples(row, "gather_ms", &setting->gather_ms);
    set(row, "share", setting->share);
    set(row, "share_mean", setting->share_mean);
    set(row, "scanned_share", setting->scanned);
    set(row, "build_s", setting->job == STEP_TREE ? step->costs.build_ns / 1e9 : NAN);
    set(row, "insert_us_per_key",
        setting->job == STEP_TREE ? step->costs.insert_ns / step->costs.inserted / 1000 : NAN);
    if (setting->job == STEP_TREE) {
        double bytes = 0;
        for (uint32_t l = 0; l < step->lane_count; l++) {
            bytes += (double)index_bytes(step->lanes[l].tree.index);
        }
        set(row, "bytes_per_key", bytes / keys);
    } else {
        const double bytes =
            (double)scan_keys_bytes(SCAN_I8, step->data.tokens, step->data.head_dim) * step->lane_count;
        const double gb_per_s = bytes / samples_median(&setting->search_ms[warm]) / 1e6;
        set(row, "bytes_per_key", bytes / keys);
        set(row, "gb_per_s", gb_per_s);
        set(row, "over_bandwidth", combination->cores == 1 ? gb_per_s / bandwidth : NAN);
    }
    return row;
}

// The fastest timed setting of the tree whose share is at least .98.
static const struct setting *cheapest(const struct combination *combination, bool warm)
{
    const struct setting *found = NULL;
    for (uint32_t i = 0; i < combination->setting_count; i++) {
        const struct setting *setting = &combination->settings[i];
        if (setting->job == STEP_TREE && setting->share >= shares[1] &&
            (found == NULL || samples_median(&setting->search_ms[warm]) < samples_median(&found->search_ms[warm]))) {
            found = setting;
        }
    }
    return found;
}

static void add_ratio(const struct step *step, const struct combination *combination, json_t *ratios)
{
    static const char *const names[TREE_POLICIES][2] = {
        [INDEX_MEANS] = {"tree_over_i8", "tree_over_i8_warm"},
        [INDEX_PROMOTION] = {"tree_promotion_over_i8", "tree_promotion_over_i8_warm"},
    };
    char name[256];
    (void)snprintf(name, sizeof name, "%s tokens=%u head_dim=%u query_heads=%u budget=%u cores=%u", step->data.name,
                   step->data.tokens, step->data.head_dim, step->data.query_heads, combination->budget,
                   combination->cores);
    if (json_object_get(ratios, name) == NULL) {
        (void)json_object_set_new(ratios, name, base_row(step, combination));
    }
    json_t *ratio = json_object_get(ratios, name);
    (void)json_object_del(ratio, "lanes");
    for (int warm = 0; warm < 2; warm++) {
        const struct setting *tree = cheapest(combination, warm != 0), *scan = &combination->settings[1];
        const double scan_ms = samples_median(&scan->search_ms[warm]);
        set(ratio, names[combination->policy][warm],
            tree == NULL ? NAN : scan_ms / samples_median(&tree->search_ms[warm]));
    }
}

static bool measure_all(struct step *step, struct combination *combinations, uint32_t count)
{
    for (uint32_t c = 0; c < count; c++) {
        if (c > 0 && combinations[c - 1].budget == combinations[c].budget) {
            const uint32_t cores = combinations[c].cores;
            combinations[c] = combinations[c - 1]; // the answers do not depend on the cores
            combinations[c].cores = cores;
        } else if (!find_settings(step, &combinations[c])) {
            return false;
        }
    }
    for (uint32_t r = 0; r < step->options->rounds; r++) {
        (void)fprintf(stderr, "round %u of %u\n", r + 1, step->options->rounds);
        bandwidth_measure(&step->bandwidth);
        for (uint32_t c = 0; c < count; c++) {
            for (uint32_t i = 0; i < combinations[c].setting_count; i++) {
                if (!time_setting(step, &combinations[c], &combinations[c].settings[i])) {
                    return false;
                }
            }
        }
    }
    return true;
}

static int run_policy(struct step *step, enum index_policy policy, json_t *rows, json_t *ratios, bool *with_scan)
{
    const struct options *options = step->options;
    const uint32_t count = options->budgets.count * options->cores.count;
    struct combination *combinations = calloc(count, sizeof *combinations);
    int code = combinations == NULL ? EXIT_MISSING : step_build(step, policy);
    for (uint32_t c = 0; code == 0 && c < count; c++) {
        combinations[c].policy = policy;
        combinations[c].budget = options->budgets.values[c / options->cores.count];
        combinations[c].cores = options->cores.values[c % options->cores.count];
    }
    if (code == 0 && !measure_all(step, combinations, count)) {
        code = EXIT_CHECK;
    }
    const double bandwidth = samples_median(&step->bandwidth.gb_per_s);
    for (uint32_t c = 0; code == 0 && c < count; c++) {
        for (uint32_t i = 0; i < combinations[c].setting_count; i++) {
            const struct setting *setting = &combinations[c].settings[i];
            for (int warm = 0; (*with_scan || setting->job == STEP_TREE) && warm < 2; warm++) {
                (void)json_array_append_new(rows, row_of(step, &combinations[c], setting, warm != 0, bandwidth));
            }
        }
        add_ratio(step, &combinations[c], ratios);
    }
    *with_scan = false; // its rows are there
    free(combinations);
    return code;
}

static uint32_t largest(const struct option_list *list)
{
    uint32_t most = 0;
    for (uint32_t i = 0; i < list->count; i++) {
        most = list->values[i] > most ? list->values[i] : most;
    }
    return most;
}

static int run(struct step *step, json_t *rows, json_t *ratios)
{
    step->budget_max = largest(&step->options->budgets);
    step->cores_max = largest(&step->options->cores);
    int code = step_prepare(step);
    bool with_scan = true;
    for (enum index_policy policy = INDEX_MEANS; policy <= INDEX_PROMOTION && code == 0; policy++) {
        if (step->options->policies[policy]) {
            code = run_policy(step, policy, rows, ratios, &with_scan);
            step_clear(step);
        }
    }
    step_release(step);
    data_fini(&step->data);
    return code;
}

static int run_shape(const struct options *options, const struct options_shape *shape, json_t *rows, json_t *ratios)
{
    const uint32_t lane_count = shape->layers * shape->kv_heads;
    const uint32_t copies = options->copies < lane_count ? options->copies : lane_count;
    int code = 0;
    for (uint32_t i = 0; i < options->trace_count && code == 0; i++) {
        struct step step = {.options = options, .lane_count = lane_count};
        char error[512];
        if (!data_open_trace(&step.data, options->traces[i], copies, options->sinks, options->window, error,
                             sizeof error)) {
            (void)fprintf(stderr, "icecache-bench: %s\n", error);
            return EXIT_MISSING;
        }
        code = run(&step, rows, ratios);
    }
    for (enum data_kind kind = DATA_ATTENTION; kind <= DATA_GAUSS; kind++) {
        for (uint32_t t = 0; options->kinds[kind] && t < options->tokens.count && code == 0; t++) {
            struct step step = {.options = options, .lane_count = lane_count};
            if (!data_generate(&step.data, kind, options->tokens.values[t], shape->head_dim, shape->query_heads, copies,
                               (lane_count + copies - 1) / copies, options->seed)) {
                (void)fputs("icecache-bench: no memory for the data\n", stderr);
                return EXIT_MISSING;
            }
            code = run(&step, rows, ratios);
        }
    }
    return code;
}

int command_step(const struct options *options, json_t *rows, json_t *ratios)
{
    return run_shape(options, options_shape(options), rows, ratios);
}
