"""Man pages: they format without warnings, and say all that the header and the programs' --help say, and no more."""
import os
import pathlib
import re
import subprocess

import symbols

PROGRAMS = (("icecached", "icecached.8"), ("icecachectl", "icecachectl.1"), ("icecache-replay", "icecache-replay.1"),
            ("icecache-bench", "icecache-bench.1"))
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*[a-z0-9]")
FUNCTION = re.compile(r"\bice_[a-z_]+(?=\()")
STATUS = re.compile(r"\bICE_[A-Z_]+\b")


def plain(page_text):
    """The page's words, without roff's escapes and font changes."""
    text = page_text.replace("\\-", "-").replace("\\(aq", "'").replace("\\e", "\\")
    return re.sub(r"\\f[BIRP]|\\&", "", text)


def compare(wanted, found, page, other):
    for name in sorted(wanted - found):
        yield f"{page} does not mention {name}, which {other} has"
    for name in sorted(found - wanted):
        yield f"{page} mentions {name}, which {other} does not have"


def statuses(header_text):
    return set(re.findall(r"^\s+(ICE_[A-Z_]+) = \d+,$", header_text.split("ice_status;")[0], re.MULTILINE))


def check_library(header_text, page_text):
    text = plain(page_text)
    # A function is written as its name and an opening parenthesis in the synopsis.
    yield from compare(symbols.declared(header_text), set(FUNCTION.findall(text)), "icecache.3", "icecache.h")
    mentioned = set(STATUS.findall(text))
    yield from compare(statuses(header_text), statuses(header_text) & mentioned, "icecache.3", "enum ice_status")


def check_program(help_text, page_text, page):
    yield from compare(set(OPTION.findall(help_text)), set(OPTION.findall(plain(page_text))), page, "--help")


def check_format(path):
    done = subprocess.run(["groff", "-man", "-Tutf8", "-ww", "-z", path], capture_output=True, text=True)
    if done.returncode != 0 or done.stderr:
        yield f"{path}: {done.stderr}"


def read(path):
    with open(path, encoding="utf-8") as stream:
        return stream.read()


def check(source, build):
    folder = os.path.join(source, "deploy/man")
    for name in sorted(os.listdir(folder)):
        yield from check_format(os.path.join(folder, name))
    yield from check_library(symbols.read_header(source), read(os.path.join(folder, "icecache.3")))
    for program, page in PROGRAMS:
        found = [path for path in pathlib.Path(build).glob(f"**/{program}") if path.is_file() and os.access(path, os.X_OK)]
        if not found:
            continue
        if not os.path.exists(os.path.join(folder, page)):
            yield f"{program} has no page deploy/man/{page}"
            continue
        done = subprocess.run([found[0], "--help"], capture_output=True, text=True, timeout=20)
        if done.returncode != 0 or not OPTION.search(done.stdout):
            yield f"{program} --help answers {done.returncode} and names no options on its standard output"
        yield from check_program(done.stdout, read(os.path.join(folder, page)), page)


def must_fail(source, _build, folder):
    header = symbols.read_header(source)
    page = read(os.path.join(source, "deploy/man/icecache.3"))
    yield "a function without a page", list(check_library(header + "\nICE_API int ice_new_thing(void);\n", page))
    yield "a page without its function", list(check_library(header, page + "\n.BI ice_old_thing( void );\n"))
    yield "a status without a page", list(check_library(header, page.replace("ICE_POOL_FULL", "")))
    yield "an option without a page", list(check_program("--alpha --beta", ".B \\-\\-alpha", "x.1"))
    yield "a page without its option", list(check_program("--alpha", ".B \\-\\-alpha \\-\\-beta", "x.1"))
    path = os.path.join(folder, "bad.1")
    with open(path, "w", encoding="utf-8") as stream:
        stream.write(".TH X 1\n.SH NAME\nx \\- y\n.NOSUCHMACRO z\n")
    yield "a macro that does not exist", list(check_format(path))
