"""clang-tidy with the checks of .clang-tidy over every file that is compiled, in parallel.

Nearly all of its time is the analyzer's, which follows a function's paths until it has seen 225,000 states. Here it stops
at a tenth of them, which is a fifth of the time; ICECACHE_TEST_FULL=1 lets it go on.
"""
import concurrent.futures
import os
import subprocess

import tree

STATES_MAX = 22500


def analyzer_limits():
    if os.environ.get("ICECACHE_TEST_FULL") == "1":
        return []
    words = ("-Xclang", "-analyzer-config", "-Xclang", f"max-nodes={STATES_MAX}")
    return [f"--extra-arg={word}" for word in words]


def check_file(source, path, extra):
    done = subprocess.run(["clang-tidy", "--quiet", *extra, path], cwd=source, capture_output=True, text=True)
    if done.returncode != 0:
        return f"{path}:\n{done.stdout}{done.stderr}"
    return None


def check(source, build):
    paths = sorted(tree.Commands(source, build).entries)
    jobs = len(os.sched_getaffinity(0))
    # Flags that gcc knows and clang does not are no finding.
    extra = ["-p", build, "--extra-arg=-Wno-unknown-warning-option", *analyzer_limits()]
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        for number, found in enumerate(pool.map(lambda path: check_file(source, path, extra), paths), 1):
            if number % 20 == 0 or number == len(paths):
                print(f"{number} of {len(paths)} files", flush=True)
            if found:
                yield found


LOST = """#include <stdlib.h>
static char *take(int size) { return size > 3 ? malloc((size_t)size) : NULL; }
int f(int size, int stop);
int f(int size, int stop)
{
    char *taken = take(size);
    if (taken && stop)
        return 1;
    free(taken);
    return 0;
}
"""


def must_fail(source, _build, folder):
    bad = {
        "a function of 80 lines": "int f(int x);\nint f(int x)\n{\n" + "    x ^= x << 1;\n" * 80 + "    return x;\n}\n",
        "memory that is lost on one path": LOST,
        "a redundant expression": "int f(int x);\nint f(int x)\n{\n    return x > 3 && x > 3;\n}\n",
    }
    for name, text in bad.items():
        path = os.path.join(folder, "bad.c")
        with open(path, "w", encoding="utf-8") as stream:
            stream.write(text)
        found = check_file(source, path, [f"--config-file={os.path.abspath(source)}/.clang-tidy", "--extra-arg=-std=c17",
                                         *analyzer_limits()])
        yield name, [found] if found and "unable to" not in found else []
