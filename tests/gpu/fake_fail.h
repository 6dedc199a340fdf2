// What the fake libraries are told to do wrong.
#ifndef ICECACHE_TESTS_FAKE_FAIL_H
#define ICECACHE_TESTS_FAKE_FAIL_H

const char *fake_folder(void); // FAKE_CUDA_DIR, or NULL
// What this call must answer at once, or 0; waits where it must hang. device: its context's, -1: none.
int fake_injected(const char *entry, int device);

#endif
