// The queries of a search as codes see them.
//
// Thread ownership: that of the search context. No allocation.
#include "index/search.h"

#include <math.h>
#include <string.h>

static void views_point(struct index_search *search)
{
    search->seen = (struct dci_views){
        .count = search->views,
        .head_dim = search->index->head_dim,
        .codes = SEARCH_ROOM(search, int8_t, ROOM_CODES),
        .sums = SEARCH_ROOM(search, int32_t, ROOM_SUMS),
        .steps = SEARCH_ROOM(search, float, ROOM_STEPS),
        .norms = SEARCH_ROOM(search, float, ROOM_NORMS),
        .row_bytes = search->index->code_row_bytes,
        .fine = SEARCH_ROOM(search, int8_t, ROOM_FINE),
        .tables = SEARCH_ROOM(search, uint8_t, ROOM_TABLES),
        .table_zeros = SEARCH_ROOM(search, int32_t, ROOM_ZEROS_OF_TABLES),
        .table_steps = SEARCH_ROOM(search, float, ROOM_STEPS_OF_TABLES),
    };
    search->plain = search->seen;
    search->plain.bases = SEARCH_ROOM(search, float, ROOM_ZEROS);
}

static void view_encode(struct index_search *search, uint32_t v, const float *vector)
{
    const struct index *index = search->index;
    const struct index_query *query = &search->query;
    const uint32_t dim = index->head_dim, half = index->code_row_bytes;
    float rotated[INDEX_HEAD_DIM_MAX];
    int8_t *codes = SEARCH_ROOM(search, int8_t, ROOM_CODES) + (size_t)v * dim;
    int8_t *fine = SEARCH_ROOM(search, int8_t, ROOM_FINE) + (size_t)v * 2 * half;
    memcpy(rotated, vector, dim * sizeof rotated[0]);
    dci_rotate(index, rotated);
    const float step = index->kernel->encode8(rotated, dim, codes, &SEARCH_ROOM(search, int32_t, ROOM_SUMS)[v]);
    SEARCH_ROOM(search, float, ROOM_STEPS)[v] = query->scale * step;
    for (uint32_t p = 0; p < search->part_count; p++) {
        SEARCH_ROOM(search, float, ROOM_BASES)
        [(size_t)p * search->views + v] = query->scale * index->kernel->dot(rotated, search->parts[p].index->base, dim);
    }
    memcpy(fine, codes, dim);
    memset(fine + dim, 0, 2 * half - dim);
    const float table_step =
        query->scale * dci_tables_make(rotated, dim, SEARCH_ROOM(search, uint8_t, ROOM_TABLES) + (size_t)v * dim * 4,
                                       &SEARCH_ROOM(search, int32_t, ROOM_ZEROS_OF_TABLES)[v]);
    SEARCH_ROOM(search, float, ROOM_STEPS_OF_TABLES)[v] = table_step;
    SEARCH_ROOM(search, float, ROOM_SCALES_OF_SIGNS)
    [v] = table_step * (DCI_ROUGH_SLOPE / (DCI_CODE_STEP * DCI_SIGN_MEAN));
}

bool dci_views_init(struct index_search *search)
{
    const struct index *index = search->index;
    const struct index_query *query = &search->query;
    float norm2_max = 0.0f;
    for (uint32_t p = 0; p < search->part_count; p++) {
        norm2_max = search->parts[p].index->norm2_max > norm2_max ? search->parts[p].index->norm2_max : norm2_max;
    }
    const float key_norm_max = sqrtf(norm2_max);
    views_point(search);
    for (uint32_t v = 0; v < search->views; v++) {
        const float *vector = query->queries + (size_t)v * index->head_dim;
        const float norm2 = index->kernel->dot(vector, vector, index->head_dim);
        const float norm = query->scale * sqrtf(norm2);
        if (!(norm2 <= TREE_NORM2_MAX) || !(norm <= DCI_SCORE_MAX) || !(norm * key_norm_max <= DCI_SCORE_MAX)) {
            return false;
        }
        SEARCH_ROOM(search, float, ROOM_NORMS)[v] = norm * SEARCH_SPREAD_PRIOR;
        SEARCH_ROOM(search, float, ROOM_NOISES)[v] = norm * DCI_SIGN_NOISE;
        SEARCH_ROOM(search, float, ROOM_ZEROS)[v] = 0.0f;
        SEARCH_ROOM(search, float, ROOM_REFERENCE)[v] = 0.0f;
        view_encode(search, v, vector);
    }
    float *tops = SEARCH_ROOM(search, float, ROOM_TOPS), *spreads = SEARCH_ROOM(search, float, ROOM_SPREADS);
    float *unseen = SEARCH_ROOM(search, float, ROOM_UNSEEN);
    for (size_t i = 0; i < (size_t)search->views * DCI_LANES; i++) {
        tops[i] = spreads[i] = unseen[i] = DCI_HIDDEN;
    }
    return true;
}
