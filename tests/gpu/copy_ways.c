// How long the rows of one retrieve take to a GPU by a call for each and by one call for all, from the first call to
// the end of the copies, and what a landing of these blocks chooses. In this process, as the library's pull copies.
//
//     copy_ways [ROUNDS]
#include "memory.h"

#include "gpu/buffer.h"

#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>

static const uint32_t slots[] = {2, 8, 32, 128, 512}, counts[] = {1, 2, 4, 8, 16, 32, 64, 128, 256};
enum { SHAPES = sizeof slots / sizeof *slots, COUNTS = sizeof counts / sizeof *counts, ROWS = 256, ROUNDS_MAX = 1000 };

static uint64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static int ascending(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

// One copy of `count` rows; issue_us: until the calls have returned.
static double copy_once(struct gpu_buffer *buffer, uint32_t count, double *issue_us)
{
    static const bool cleared[ROWS];
    uint32_t rows[ROWS];
    char text[CUDA_TEXT_BYTES];
    for (uint32_t i = 0; i < count; i++)
        rows[i] = i;
    const uint64_t begun_ns = now_ns();
    assert_int_equal(gpu_buffer_pull(buffer, rows, cleared, count, 0, true, 0, text), ICE_OK);
    *issue_us = (double)(now_ns() - begun_ns) / 1000;
    for (bool done = false; !done;)
        assert_int_equal(gpu_buffer_poll(buffer, 0, &done, text), ICE_OK);
    return (double)(now_ns() - begun_ns) / 1000;
}

// In place: the buffer's path points into it.
static void open_buffer(struct gpu_buffer *buffer, const struct landing_shape *shape, uint64_t bytes, uint8_t *staging,
                        enum gpu_copy_way way)
{
    char text[CUDA_TEXT_BYTES] = "";
    if (gpu_buffer_open(memory_library(), 0, bytes, 0, buffer, text) != ICE_OK ||
        gpu_buffer_pull_open(buffer, shape, staging, way, false, text) != ICE_OK) {
        printf("%s\n", text);
        exit(1);
    }
}

static void measure(uint32_t shape_slots, uint32_t rounds)
{
    static double us[2][ROUNDS_MAX], issue_us[2][ROUNDS_MAX];
    const struct landing_shape shape = {ROWS, 1, 8, shape_slots, 128, ICE_BF16};
    struct landing_layout layout, held;
    assert_true(landing_layout_init(&layout, &shape) && landing_held_init(&held, &shape, LANDING_PULL));
    uint8_t *stagings[2];
    struct gpu_buffer buffers[2];
    for (int way = 0; way < 2; way++) {
        stagings[way] =
            mmap(NULL, held.total_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
        assert_ptr_not_equal(stagings[way], MAP_FAILED);
    }
    struct gpu_buffer chosen;
    open_buffer(&chosen, &shape, layout.total_bytes, stagings[0], GPU_COPY_AUTO);
    printf("blocks of %.1f KiB: %s\n", (double)layout.block_bytes / 1024, gpu_path_way(&chosen.pull.path));
    gpu_buffer_close(&chosen);
    for (int way = 0; way < 2; way++)
        open_buffer(&buffers[way], &shape, layout.total_bytes, stagings[way], way ? GPU_COPY_BATCH : GPU_COPY_LOOP);
    for (uint32_t i = 0; i < COUNTS; i++) {
        for (uint32_t round = 0; round < rounds; round++) // in turn, so that what drifts is the same for both
            for (int way = 0; way < 2; way++)
                us[way][round] = copy_once(&buffers[way], counts[i], &issue_us[way][round]);
        for (int way = 0; way < 2; way++) {
            qsort(us[way], rounds, sizeof(double), ascending);
            qsort(issue_us[way], rounds, sizeof(double), ascending);
        }
        const double loop = us[0][rounds / 2], batch = us[1][rounds / 2];
        printf("  %4u rows  loop %9.1f us (calls %8.1f)  batch %9.1f us (call %8.1f)  batch/loop %.2f\n", counts[i],
               loop, issue_us[0][rounds / 2], batch, issue_us[1][rounds / 2], batch / loop);
    }
    for (int way = 0; way < 2; way++) {
        gpu_buffer_close(&buffers[way]);
        munmap(stagings[way], held.total_bytes);
    }
}

int main(int argc, char **argv)
{
    const uint32_t rounds = argc > 1 ? (uint32_t)strtoul(argv[1], NULL, 10) : 50;
    if (!memory_choose_driver())
        return 77;
    // One round is a test: that it runs is seen without the largest blocks, which take nearly all of its time.
    const uint32_t shapes = rounds > 1 ? SHAPES : scaled_count(SHAPES - 1, SHAPES);
    for (uint32_t i = 0; i < shapes; i++)
        measure(slots[i], rounds < 1 ? 1 : rounds < ROUNDS_MAX ? rounds : ROUNDS_MAX);
    memory_forget_folder();
    return 0;
}
