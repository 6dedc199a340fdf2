"""The shared library exports what the public header declares, and nothing else."""
import os
import pathlib
import re
import subprocess

DECLARATION = re.compile(r"^ICE_(?:API|CHECKED)\b[^;(]*?\b(ice_\w+)\s*\(", re.MULTILINE)


def declared(header_text):
    return set(DECLARATION.findall(header_text))


def read_header(source):
    with open(os.path.join(source, "client/icecache.h"), encoding="utf-8") as stream:
        return stream.read()


def exported(library):
    done = subprocess.run(["nm", "-D", "--defined-only", "--format=posix", library], check=True, capture_output=True,
                          text=True)
    # Lines are "name type value size"; type A is the version script's own node.
    rows = (line.split() for line in done.stdout.splitlines() if line)
    return {row[0].split("@")[0] for row in rows if row[1] != "A"}


def compare(wanted, found):
    for name in sorted(found - wanted):
        yield f"libicecache exports {name}, which icecache.h does not declare"
    for name in sorted(wanted - found):
        yield f"icecache.h declares {name}, which libicecache does not export"


def check(source, build):
    libraries = sorted(str(path) for path in pathlib.Path(build).glob("*/libicecache.so*"))
    if not libraries:
        yield f"no libicecache.so in {build}"
        return
    wanted = declared(read_header(source))
    if len(wanted) < 10:
        yield "icecache.h: its declarations are not recognised"
    yield from compare(wanted, exported(libraries[0]))


def must_fail(source, _build):
    wanted = declared(read_header(source))
    yield "an extra symbol", list(compare(wanted, wanted | {"wire_decode"}))
    yield "a missing symbol", list(compare(wanted, wanted - {"ice_retrieve"}))
    yield "an undeclared function", list(compare(declared("ICE_API int ice_a(void);\n"), {"ice_a", "ice_b"}))
