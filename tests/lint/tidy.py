"""clang-tidy with the checks of .clang-tidy over every file that is compiled, in parallel."""
import concurrent.futures
import os
import subprocess

import tree


def check_file(source, path, extra):
    done = subprocess.run(["clang-tidy", "--quiet", *extra, path], cwd=source, capture_output=True, text=True)
    if done.returncode != 0:
        return f"{path}:\n{done.stdout}{done.stderr}"
    return None


def check(source, build):
    paths = sorted(tree.Commands(source, build).entries)
    jobs = len(os.sched_getaffinity(0))
    # Flags that gcc knows and clang does not are no finding.
    extra = ["-p", build, "--extra-arg=-Wno-unknown-warning-option"]
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        for number, found in enumerate(pool.map(lambda path: check_file(source, path, extra), paths), 1):
            if number % 20 == 0 or number == len(paths):
                print(f"{number} of {len(paths)} files", flush=True)
            if found:
                yield found


def must_fail(source, _build, folder):
    bad = {
        "a function of 80 lines": "int f(int x);\nint f(int x)\n{\n" + "    x ^= x << 1;\n" * 80 + "    return x;\n}\n",
        "a redundant expression": "int f(int x);\nint f(int x)\n{\n    return x > 3 && x > 3;\n}\n",
    }
    for name, text in bad.items():
        path = os.path.join(folder, "bad.c")
        with open(path, "w", encoding="utf-8") as stream:
            stream.write(text)
        found = check_file(source, path, [f"--config-file={os.path.abspath(source)}/.clang-tidy", "--extra-arg=-std=c17"])
        yield name, [found] if found and "unable to" not in found else []
