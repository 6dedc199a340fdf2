"""Every C file is as clang-format writes it."""
import os
import subprocess

import tree


def check_files(source, paths):
    done = subprocess.run(["clang-format", f"--style=file:{os.path.abspath(source)}/.clang-format", "--dry-run", "-Werror",
                           *paths], cwd=source, capture_output=True, text=True)
    if done.returncode != 0:
        bad = sorted({line.split(":")[0] for line in done.stderr.splitlines() if ": error:" in line})
        yield from (f"{path}: clang-format would change it" for path in bad or [done.stderr])


def check(source, _build):
    yield from check_files(source, tree.files(source, ".c", ".h"))


def must_fail(source, _build, folder):
    path = os.path.join(folder, "bad.c")
    with open(path, "w", encoding="utf-8") as stream:
        stream.write("int main( void ) { return 0; }\n")
    yield "a brace in the wrong place", list(check_files(source, [path]))
