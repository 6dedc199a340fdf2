"""Rules about files as such: length, names of folders, words of unfinished work, machine paths, asserts that stay on."""
import os
import re

import tree

LINES_MAX = 800
NO_FOLDERS = re.compile(r"(^|/)(utils?|common|helpers?|misc)(/|\.|_)", re.IGNORECASE)
# Put together from parts, so that this file is not found itself.
UNFINISHED = re.compile("|".join(("TO" + "DO", "FIX" + "ME", r"\bXX" + r"X\b", r"not yet impl" + "emented",
                                  r"\bfor n" + r"ow\b")))
SOURCES = (".c", ".h", ".py", ".cu", ".cmake", "CMakeLists.txt", ".proto", ".sh", ".md", ".1", ".3", ".8")


def check_text(path, text):
    lines = text.splitlines()
    if path.endswith((".c", ".h", ".py", ".cu")) and len(lines) > LINES_MAX:
        yield f"{path}: {len(lines)} lines, more than {LINES_MAX}"
    for number, line in enumerate(lines, 1):
        if UNFINISHED.search(line):
            yield f"{path}:{number}: unfinished work: {line.strip()}"


def check_name(path):
    if NO_FOLDERS.search(path):
        yield f"{path}: a file or folder must be named for what it is about"


def check_flags(path, arguments):
    if any(argument.startswith("-DNDEBUG") for argument in arguments):
        yield f"{path}: compiled with NDEBUG; asserts stay on"


def check(source, build):
    for path in tree.files(source):
        yield from check_name(path)
        if path.endswith(SOURCES) and not path.startswith("tests/data/"):
            with open(os.path.join(source, path), encoding="utf-8") as stream:
                yield from check_text(path, stream.read())
    for path, (_, arguments) in sorted(tree.Commands(source, build).entries.items()):
        yield from check_flags(path, arguments)


def must_fail(_source, _build):
    yield "a file of 801 lines", list(check_text("index/x.c", "\n" * (LINES_MAX + 1)))
    yield "unfinished work", list(check_text("index/x.c", "// TO" + "DO: later\n"))
    yield "a folder for nothing in particular", list(check_name("cached/util" + "s/x.c"))
    yield "a file for nothing in particular", list(check_name("index/help" + "er_x.c"))
    yield "asserts off", list(check_flags("index/x.c", ["cc", "-O2", "-DNDEBUG"]))
