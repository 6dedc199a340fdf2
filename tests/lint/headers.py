"""Every header has an include guard and compiles alone, and the public one also as C++.

A file that is included several times under different macros says "No include guard" in its opening comment."""
import os
import re
import shutil
import subprocess

import tree

GUARD = re.compile(r"^#ifndef (\w+_H)\n#define \1$", re.MULTILINE)


def check_header(near, path):
    directory, compiler, flags = near
    with open(path, encoding="utf-8") as stream:
        text = stream.read()
    if "no include guard" in text.split("\n#", 1)[0].lower():
        return
    if not GUARD.search(text):
        yield f"{path}: no include guard"
    compiles, messages = tree.compile_text(directory, compiler, flags, f'#include "{path}"\nextern int not_empty;\n')
    if not compiles:
        yield f"{path} does not compile alone:\n{messages}"


def check(source, build):
    commands = tree.Commands(source, build)
    for path in tree.files(source, ".h"):
        near = commands.near(path)
        if near is None:
            yield f"{path}: nothing in its folder is compiled in {build}, so its flags are not known"
        else:
            yield from check_header(near, os.path.join(os.path.abspath(source), path))
    compiler = shutil.which("clang++") or shutil.which("g++")
    done = subprocess.run([compiler, "-std=c++11", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-fsyntax-only", "-x",
                           "c++", os.path.join(source, "client/icecache.h")], capture_output=True, text=True)
    if done.returncode != 0:
        yield f"client/icecache.h is not C++:\n{done.stderr}"


def must_fail(source, build, folder):
    path = os.path.join(folder, "needy.h")
    with open(path, "w", encoding="utf-8") as stream:
        stream.write("#ifndef NEEDY_H\n#define NEEDY_H\nstatic inline size_t needy(void)\n{\n    return 1;\n}\n#endif\n")
    near = tree.Commands(source, build).near("index/x.h")
    yield "a header that needs <stddef.h>", list(check_header(near, path))
    with open(path, "w", encoding="utf-8") as stream:
        stream.write("extern int unguarded;\n")
    yield "a header without a guard", list(check_header(near, path))
