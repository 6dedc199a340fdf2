// FAISS and hnswlib through their Python wheels: peers.py gets the same data as .npy files and does one round when told
// so, between ours. Messages are lines: a command to it, one JSON text back.
#include "search.h"

#include <errno.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

extern char **environ;

struct peers {
    pid_t pid;
    FILE *to, *from;
    char folder[256];
};

static bool write_npy(const char *folder, const char *name, const char *type, const char *shape, const void *data,
                      size_t bytes)
{
    char path[320], header[256];
    (void)snprintf(path, sizeof path, "%s/%s.npy", folder, name);
    // Magic, version and length are 10 bytes; the header's end is aligned to 64.
    const int text =
        snprintf(header, sizeof header, "{'descr': '%s', 'fortran_order': False, 'shape': (%s), }", type, shape);
    const size_t padded = ((size_t)text + 1 + 10 + 63) / 64 * 64 - 10;
    memset(header + text, ' ', padded - (size_t)text);
    header[padded - 1] = '\n';
    const unsigned char length[2] = {(unsigned char)(padded & 0xff), (unsigned char)(padded >> 8)};
    FILE *file = fopen(path, "wb");
    if (file == NULL) {
        return false;
    }
    const bool written = fwrite("\x93NUMPY\x01\x00", 1, 8, file) == 8 && fwrite(length, 1, 2, file) == 2 &&
                         fwrite(header, 1, padded, file) == padded && fwrite(data, 1, bytes, file) == bytes;
    return fclose(file) == 0 && written;
}

static bool write_lane(const struct search *search, uint32_t lane, const char *folder)
{
    const struct data *data = &search->data;
    const struct data_lane *from = &data->lanes[lane];
    char name[32], shape[64];
    (void)snprintf(name, sizeof name, "K%u", lane);
    (void)snprintf(shape, sizeof shape, "%u, %u", data->tokens, data->head_dim);
    bool written =
        write_npy(folder, name, "<f4", shape, from->keys, (size_t)data->tokens * data->head_dim * sizeof(float));
    (void)snprintf(name, sizeof name, "Q%u", lane);
    (void)snprintf(shape, sizeof shape, "%u, %u, %u", data->query_count, data->query_heads, data->head_dim);
    written = written && write_npy(folder, name, "<f4", shape, from->queries,
                                   (size_t)data->query_count * data->query_heads * data->head_dim * sizeof(float));
    (void)snprintf(name, sizeof name, "best%u", lane);
    (void)snprintf(shape, sizeof shape, "%u, %u", data->query_count, REFERENCE_ALONE);
    written = written && write_npy(folder, name, "<u4", shape, search->lanes[lane].reference.alone,
                                   (size_t)data->query_count * REFERENCE_ALONE * sizeof(uint32_t));
    uint32_t *ranges = malloc((size_t)data->query_count * 2 * sizeof *ranges);
    for (uint32_t q = 0; ranges != NULL && q < data->query_count; q++) {
        data_range(data, from, q, &ranges[2 * q], &ranges[2 * q + 1]);
    }
    (void)snprintf(name, sizeof name, "range%u", lane);
    (void)snprintf(shape, sizeof shape, "%u, 2", data->query_count);
    written = written && ranges != NULL &&
              write_npy(folder, name, "<u4", shape, ranges, (size_t)data->query_count * 2 * sizeof *ranges);
    free(ranges);
    return written;
}

static bool start(struct peers *peers, const struct search *search)
{
    char lanes[16];
    (void)snprintf(lanes, sizeof lanes, "%u", search->data.lane_count);
    char *const arguments[] = {(char *)search->options->python, "-B", BENCH_PEERS_SCRIPT, peers->folder, lanes, NULL};
    int to[2], from[2];
    if (pipe(to) != 0) {
        return false;
    }
    if (pipe(from) != 0) {
        (void)close(to[0]);
        (void)close(to[1]);
        return false;
    }
    posix_spawn_file_actions_t actions;
    (void)posix_spawn_file_actions_init(&actions);
    (void)posix_spawn_file_actions_adddup2(&actions, to[0], STDIN_FILENO);
    (void)posix_spawn_file_actions_adddup2(&actions, from[1], STDOUT_FILENO);
    (void)posix_spawn_file_actions_addclose(&actions, to[1]);
    (void)posix_spawn_file_actions_addclose(&actions, from[0]);
    const int error = posix_spawnp(&peers->pid, search->options->python, &actions, NULL, arguments, environ);
    (void)posix_spawn_file_actions_destroy(&actions);
    (void)close(to[0]);
    (void)close(from[1]);
    peers->to = fdopen(to[1], "w");
    peers->from = fdopen(from[0], "r");
    if (error != 0) {
        (void)fprintf(stderr, "icecache-bench: %s: %s\n", search->options->python, strerror(error));
        peers->pid = 0;
    }
    return error == 0 && peers->to != NULL && peers->from != NULL;
}

// Sends a command; its answer, or NULL when the process is gone.
static json_t *tell(struct peers *peers, const char *command)
{
    if (fprintf(peers->to, "%s\n", command) < 0 || fflush(peers->to) != 0) {
        return NULL;
    }
    char *line = NULL;
    size_t room = 0;
    json_t *answer = getline(&line, &room, peers->from) > 0 ? json_loads(line, JSON_DECODE_ANY, NULL) : NULL;
    free(line);
    return answer;
}

static void stop(struct peers *peers)
{
    if (peers->to != NULL) {
        (void)fclose(peers->to);
    }
    if (peers->from != NULL) {
        (void)fclose(peers->from);
    }
    if (peers->pid > 0) {
        while (waitpid(peers->pid, NULL, 0) < 0 && errno == EINTR) {
        }
    }
    static const char *const names[] = {"K", "Q", "best", "range"};
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
        char path[320];
        for (uint32_t lane = 0;; lane++) {
            (void)snprintf(path, sizeof path, "%s/%s%u.npy", peers->folder, names[i], lane);
            if (unlink(path) != 0) {
                break;
            }
        }
    }
    (void)rmdir(peers->folder);
    free(peers);
}

struct peers *peers_open(const struct search *search)
{
    struct peers *peers = calloc(1, sizeof *peers);
    if (peers == NULL) {
        return NULL;
    }
    const char *temporary = getenv("TMPDIR");
    (void)snprintf(peers->folder, sizeof peers->folder, "%s/icecache-bench-XXXXXX",
                   temporary != NULL && strlen(temporary) < sizeof peers->folder / 2 ? temporary : "/tmp");
    if (mkdtemp(peers->folder) == NULL) {
        (void)fprintf(stderr, "icecache-bench: %s: %s; no peers\n", peers->folder, strerror(errno));
        free(peers);
        return NULL;
    }
    bool ready = true;
    for (uint32_t l = 0; ready && l < search->data.lane_count; l++) {
        ready = write_lane(search, l, peers->folder);
    }
    ready = ready && start(peers, search);
    json_t *answer = ready ? tell(peers, "build") : NULL;
    if (!json_is_true(answer)) {
        (void)fputs("icecache-bench: no peers; `pip install numpy faiss-cpu hnswlib`, then --python with that "
                    "interpreter\n",
                    stderr);
        stop(peers);
        peers = NULL;
    }
    json_decref(answer);
    return peers;
}

void peers_round(struct peers *peers, bool cold)
{
    json_decref(tell(peers, cold ? "cold" : "warm"));
}

json_t *peers_close(struct peers *peers)
{
    if (peers == NULL) {
        return json_array();
    }
    json_t *rows = tell(peers, "rows");
    stop(peers);
    return rows != NULL ? rows : json_array();
}
