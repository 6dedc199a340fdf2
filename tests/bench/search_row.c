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

static json_t *at_recall(const struct measured *measured, bool cold, enum statistic statistic)
{
    json_t *object = json_object();
    for (uint32_t i = 0; i < RECALLS; i++) {
        const struct setting *setting = search_reaching_recall(measured, search_recalls[i]);
        const double us = setting == NULL ? NAN : statistic_of(&setting->us[ALONE][cold], statistic);
        (void)json_object_set_new(object, search_recall_names[i], number(us));
    }
    return object;
}

static json_t *at_share(const struct measured *measured, bool cold, enum statistic statistic)
{
    json_t *object = json_object();
    for (uint32_t i = 0; i < SHARES; i++) {
        const struct setting *setting = search_reaching_share(measured, search_shares[i]);
        const double us = setting == NULL ? NAN : statistic_of(&setting->us[TOGETHER][cold], statistic);
        (void)json_object_set_new(object, search_share_names[i], number(us));
    }
    return object;
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

static void set_tree_costs(struct search *search, json_t *row)
{
    set(row, "build_us_per_key", samples_median(&search->build_us));
    set(row, "build_us_per_key_min", samples_min(&search->build_us));
    set(row, "build_us_per_key_max", samples_max(&search->build_us));
    set(row, "insert_us_per_key", samples_median(&search->insert_us));
    set(row, "insert_p99_us", quantile(search->latencies.ns, search->latencies.count, 0.99) / 1000);
    set(row, "moved_share_per_1000", search->moved_per_1000);
    set(row, "bytes_per_key", search->bytes_per_key);
    set(row, "fill", search->fill);
}

static json_t *method_row(struct search *search, uint32_t m, bool cold)
{
    const struct search_method *method = &search_methods[m];
    const struct measured *measured = &search->measured[m];
    const struct setting *usual = &measured->settings[0];
    json_t *row = row_of_data(search, method->name, cold);
    if (method->is_tree) {
        set_tree_costs(search, row);
    } else {
        set(row, "build_us_per_key", measured->pack_us);
        set(row, "bytes_per_key", measured->bytes_per_key);
    }
    (void)json_object_set_new(row, "at_recall", at_recall(measured, cold, MEDIAN));
    (void)json_object_set_new(row, "at_recall_min", at_recall(measured, cold, LEAST));
    (void)json_object_set_new(row, "at_recall_max", at_recall(measured, cold, MOST));
    (void)json_object_set_new(row, "at_share", at_share(measured, cold, MEDIAN));
    (void)json_object_set_new(row, "at_share_min", at_share(measured, cold, LEAST));
    (void)json_object_set_new(row, "at_share_max", at_share(measured, cold, MOST));
    const double together_us = samples_median(&usual->us[TOGETHER][cold]);
    (void)json_object_set_new(row, "default",
                              json_pack("{s:f, s:f, s:o, s:o}", "recall", usual->recall, "share", usual->share,
                                        "alone_us", number(samples_median(&usual->us[ALONE][cold])), "together_us",
                                        number(together_us)));
    if (method->is_tree) {
        (void)json_object_set_new(row, "mass", json_object());
    } else {
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

static void set_ratios(const json_t *rows, size_t first, bool cold, json_t *ratio)
{
    const json_t *tree = find_row(rows, first, "tree", cold), *scan = find_row(rows, first, "scan-i8", cold);
    set_ratio(ratio, "tree_over_i8_at_0.95", cold, find_us(scan, "at_recall", "0.95"),
              find_us(tree, "at_recall", "0.95"));
    set_ratio(ratio, "tree_over_i8_at_share_0.98", cold, find_us(scan, "at_share", "0.98"),
              find_us(tree, "at_share", "0.98"));
    double best_us = NAN;
    for (size_t i = first; i < json_array_size(rows); i++) {
        const json_t *row = json_array_get(rows, i);
        const char *method = json_string_value(json_object_get(row, "method"));
        if ((strncmp(method, "faiss", 5) == 0 || strcmp(method, "hnswlib") == 0) &&
            json_is_true(json_object_get(row, "cold")) == cold) {
            best_us = fmin(best_us, find_us(row, "at_recall", "0.95"));
        }
    }
    set_ratio(ratio, "tree_over_best_peer_at_0.95", cold, best_us, find_us(tree, "at_recall", "0.95"));
}

void search_rows(struct search *search, json_t *rows, json_t *ratios, json_t *peers)
{
    const size_t first = json_array_size(rows);
    for (uint32_t m = 0; m < METHODS; m++) {
        for (int cold = 1; cold >= 0; cold--) {
            (void)json_array_append_new(rows, method_row(search, m, cold != 0));
        }
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
