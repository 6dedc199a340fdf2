// Rows and ratios of the `search` command.
#include "search.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

static json_t *number(double value)
{
    return isfinite(value) ? json_real(value) : json_null();
}

enum statistic { MEDIAN, LEAST, MOST };

static double statistic_of(const struct samples *samples, enum statistic statistic)
{
    return statistic == MEDIAN  ? samples_median(samples)
           : statistic == LEAST ? samples_min(samples)
                                : samples_max(samples);
}

// The faster one of the default and the cheapest setting that reaches a level, where the default reaches it too.
static const struct setting *faster(const struct measured *measured, bool reaches, const struct setting *found,
                                    enum mode mode, bool cold)
{
    const struct setting *usual = &measured->settings[0];
    if (!reaches) {
        return found;
    }
    const bool is_faster =
        found == NULL || samples_median(&usual->us[mode][cold]) < samples_median(&found->us[mode][cold]);
    return is_faster ? usual : found;
}

static const struct setting *setting_at(const struct measured *measured, enum mode mode, uint32_t level, bool cold)
{
    const struct setting *usual = &measured->settings[0];
    if (mode == ALONE) {
        const double recall = search_recalls[level];
        return faster(measured, usual->recall >= recall, search_reaching_recall(measured, recall), mode, cold);
    }
    const double share = search_shares[level];
    return faster(measured, usual->share >= share, search_reaching_share(measured, share), mode, cold);
}

static json_t *at_levels(const struct measured *measured, enum mode mode, bool cold, enum statistic statistic)
{
    json_t *object = json_object();
    for (uint32_t i = 0; i < (mode == ALONE ? RECALLS : SHARES); i++) {
        const struct setting *setting = setting_at(measured, mode, i, cold);
        const double us = setting == NULL ? NAN : statistic_of(&setting->us[mode][cold], statistic);
        (void)json_object_set_new(object, mode == ALONE ? search_recall_names[i] : search_share_names[i], number(us));
    }
    return object;
}

static void set_levels(json_t *row, const struct measured *measured, bool cold)
{
    static const char *const names[MODES][3] = {{"at_recall", "at_recall_min", "at_recall_max"},
                                                {"at_share", "at_share_min", "at_share_max"}};
    for (enum mode mode = ALONE; mode < MODES; mode++) {
        for (enum statistic statistic = MEDIAN; statistic <= MOST; statistic++) {
            (void)json_object_set_new(row, names[mode][statistic], at_levels(measured, mode, cold, statistic));
        }
    }
}

static json_t *row_of_data(const struct search *search, const char *method, bool cold)
{
    return json_pack("{s:s, s:b, s:s, s:i, s:i, s:i, s:i, s:i}", "method", method, "cold", cold, "data",
                     search->data.name, "tokens", (int)search->data.tokens, "head_dim", (int)search->data.head_dim,
                     "query_heads", (int)search->data.query_heads, "lanes", (int)search->data.lane_count, "budget",
                     (int)search->budget);
}

static void set(json_t *row, const char *key, double value)
{
    (void)json_object_set_new(row, key, number(value));
}

static void set_tree_costs(struct measured *measured, json_t *row, uint32_t trees)
{
    set(row, "build_us_per_key", samples_median(&measured->build_us));
    set(row, "build_us_per_key_min", samples_min(&measured->build_us));
    set(row, "build_us_per_key_max", samples_max(&measured->build_us));
    set(row, "insert_us_per_key", samples_median(&measured->insert_us));
    set(row, "insert_us_per_key_min", samples_min(&measured->insert_us));
    set(row, "insert_us_per_key_max", samples_max(&measured->insert_us));
    set(row, "insert_p50_us", quantile(measured->latencies.ns, measured->latencies.count, 0.5) / 1000);
    set(row, "insert_p99_us", quantile(measured->latencies.ns, measured->latencies.count, 0.99) / 1000);
    set(row, "insert_behind", measured->behind / trees);
    set(row, "moved_per_1000", measured->moved_per_1000 / trees);
    set(row, "fill", measured->fill);
}

// Every setting that was judged, for scripts.
static json_t *efforts_of(const struct measured *measured)
{
    json_t *list = json_array();
    for (uint32_t i = 1; i < measured->setting_count; i++) {
        const struct setting *setting = &measured->settings[i];
        (void)json_array_append_new(list, json_pack("{s:f, s:f, s:f, s:f}", "effort", setting->effort, "recall",
                                                    setting->recall, "share", setting->share, "scanned_share",
                                                    setting->scanned));
    }
    return list;
}

// What is the same for a tree out of cache and in cache.
static void set_tree_answers(struct search *search, uint32_t m, json_t *row)
{
    const struct search_method *method = &search_methods[m];
    const struct setting *usual = &search->measured[m].settings[0];
    const struct option_list *budgets = &search->options->budgets;
    json_t *mass = json_object(), *coverage = json_object();
    for (uint32_t i = 0; i < budgets->count; i++) {
        char name[16];
        (void)snprintf(name, sizeof name, "%u", budgets->values[i]);
        (void)json_object_set_new(mass, name, search_masses(search, method, budgets->values[i]));
    }
    for (uint32_t i = 0; i < COVERAGES; i++) {
        (void)json_object_set_new(coverage, search_coverage_names[i],
                                  search_coverage(search, method, search_coverages[i]));
    }
    (void)json_object_set_new(row, "mass", mass);
    (void)json_object_set_new(row, "coverage_error",
                              json_pack("{s:f, s:f}", "mean", usual->error, "mean_absolute", usual->error_size));
    (void)json_object_set_new(row, "coverage", coverage);
    (void)json_object_set_new(row, "efforts", efforts_of(&search->measured[m]));
}

static json_t *method_row(struct search *search, uint32_t m, bool cold)
{
    const struct search_method *method = &search_methods[m];
    struct measured *measured = &search->measured[m];
    const struct setting *usual = &measured->settings[0];
    json_t *row = row_of_data(search, method->name, cold);
    if (method->is_tree) {
        set_tree_costs(measured, row, search->data.lane_count * search->seeds);
    } else {
        set(row, "build_us_per_key", measured->pack_us);
    }
    set(row, "bytes_per_key", measured->bytes_per_key);
    set_levels(row, measured, cold);
    const double together_us = samples_median(&usual->us[TOGETHER][cold]);
    (void)json_object_set_new(row, "default",
                              json_pack("{s:f, s:f, s:f, s:o, s:o}", "recall", usual->recall, "share", usual->share,
                                        "scanned_share", usual->scanned, "alone_us",
                                        number(samples_median(&usual->us[ALONE][cold])), "together_us",
                                        number(together_us)));
    if (!method->is_tree) {
        const double gb_per_s = measured->bytes_per_key * search->data.tokens / together_us / 1000;
        set(row, "gb_per_s", gb_per_s);
        set(row, "over_bandwidth", gb_per_s / samples_median(&search->bandwidth.gb_per_s));
    }
    set(row, "scanned_share", usual->scanned);
    return row;
}

static double find_us(const json_t *row, const char *object, const char *key)
{
    const json_t *value = json_object_get(json_object_get(row, object), key);
    return json_is_real(value) ? json_real_value(value) : NAN;
}

// How many times faster: the other's time over ours; null where one of them does not get there.
static void set_ratio(json_t *ratio, const char *name, bool cold, double other_us, double our_us)
{
    char key[64];
    (void)snprintf(key, sizeof key, "%s%s", name, cold ? "" : "_warm");
    set(ratio, key, other_us / our_us);
}

static json_t *find_row(const json_t *rows, size_t first, const char *method, bool cold)
{
    for (size_t i = first; i < json_array_size(rows); i++) {
        json_t *row = json_array_get(rows, i);
        if (strcmp(json_string_value(json_object_get(row, "method")), method) == 0 &&
            json_is_true(json_object_get(row, "cold")) == cold) {
            return row;
        }
    }
    return NULL;
}

static bool is_peer(const char *method)
{
    return strncmp(method, "faiss", 5) == 0 || strcmp(method, "hnswlib") == 0;
}

static double best_peer_us(const json_t *rows, size_t first, bool cold)
{
    double best_us = NAN;
    for (size_t i = first; i < json_array_size(rows); i++) {
        const json_t *row = json_array_get(rows, i);
        if (is_peer(json_string_value(json_object_get(row, "method"))) &&
            json_is_true(json_object_get(row, "cold")) == cold) {
            best_us = fmin(best_us, find_us(row, "at_recall", "0.95"));
        }
    }
    return best_us;
}

static void set_ratios(const json_t *rows, size_t first, bool cold, json_t *ratio)
{
    static const char *const names[TREE_POLICIES][3] = {
        [INDEX_MEANS] = {"tree_over_i8_at_0.95", "tree_over_i8_at_share_0.98", "tree_over_best_peer_at_0.95"},
        [INDEX_PROMOTION] = {"tree_promotion_over_i8_at_0.95", "tree_promotion_over_i8_at_share_0.98",
                             "tree_promotion_over_best_peer_at_0.95"},
    };
    const json_t *scan = find_row(rows, first, "scan-i8", cold);
    for (uint32_t p = 0; p < TREE_POLICIES; p++) {
        const json_t *tree = find_row(rows, first, tree_methods[p], cold);
        if (tree == NULL) {
            continue;
        }
        const double recall_us = find_us(tree, "at_recall", "0.95"), share_us = find_us(tree, "at_share", "0.98");
        set_ratio(ratio, names[p][0], cold, find_us(scan, "at_recall", "0.95"), recall_us);
        set_ratio(ratio, names[p][1], cold, find_us(scan, "at_share", "0.98"), share_us);
        set_ratio(ratio, names[p][2], cold, best_peer_us(rows, first, cold), recall_us);
    }
}

void search_rows(struct search *search, json_t *rows, json_t *ratios, json_t *peers)
{
    const size_t first = json_array_size(rows);
    for (uint32_t m = 0; m < METHODS; m++) {
        if (!search_is_asked_for(search, m)) {
            continue;
        }
        json_t *pair[2] = {method_row(search, m, true), method_row(search, m, false)};
        if (search_methods[m].is_tree) {
            set_tree_answers(search, m, pair[0]);
            static const char *const same[] = {"mass", "coverage_error", "coverage", "efforts"};
            for (size_t i = 0; i < sizeof same / sizeof same[0]; i++) {
                (void)json_object_set(pair[1], same[i], json_object_get(pair[0], same[i]));
            }
        }
        (void)json_array_append_new(rows, pair[0]);
        (void)json_array_append_new(rows, pair[1]);
    }
    size_t i;
    json_t *peer;
    json_array_foreach(peers, i, peer)
    {
        json_t *row = row_of_data(search, json_string_value(json_object_get(peer, "method")),
                                  json_is_true(json_object_get(peer, "cold")));
        (void)json_object_update(row, peer);
        (void)json_array_append_new(rows, row);
    }
    json_t *ratio = row_of_data(search, "tree", true);
    (void)json_object_del(ratio, "method");
    (void)json_object_del(ratio, "cold");
    (void)json_object_del(ratio, "lanes");
    set_ratios(rows, first, true, ratio);
    set_ratios(rows, first, false, ratio);
    char name[256];
    (void)snprintf(name, sizeof name, "%s tokens=%u head_dim=%u query_heads=%u budget=%u", search->data.name,
                   search->data.tokens, search->data.head_dim, search->data.query_heads, search->budget);
    (void)json_object_set_new(ratios, name, ratio);
}
