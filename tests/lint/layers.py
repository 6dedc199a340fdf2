"""Each folder sees only the folders below it: including another one's header must fail to compile."""
import os
import re

import tree

INCLUDE = re.compile(r'^\s*#\s*include\s*"([^"]+)"')


def check_text(path, text):
    """Includes that name a folder which the file's folder may not see, or that leave the folder by '..'."""
    layer = path.split("/")[0]
    for number, line in enumerate(text.splitlines(), 1):
        found = INCLUDE.match(line)
        if not found:
            continue
        target = found.group(1)
        first = target.split("/")[0]
        if ".." in target.split("/"):
            yield f'{path}:{number}: #include "{target}": name the folder instead of ".."'
        elif layer in tree.LAYERS and "/" in target and first in tree.LAYERS and first not in tree.MAY_INCLUDE[layer]:
            yield f'{path}:{number}: #include "{target}": {layer}/ must not depend on {first}/'
        elif path.startswith("client/examples/") and "/" in target and target != "client/icecache.h":
            yield f'{path}:{number}: #include "{target}": examples see nothing but icecache.h'


def check_compiler(layer, near, headers):
    """Compiles, as a file of the layer would be, one header of every folder."""
    directory, compiler, flags = near
    for other, header in sorted(headers.items()):
        compiles, messages = tree.compile_text(directory, compiler, flags, f'#include "{header}"\n')
        if compiles and other not in tree.MAY_INCLUDE[layer]:
            yield f"{layer}/: #include \"{header}\" compiles, but {layer}/ must not see {other}/"
        elif not compiles and other == layer:
            yield f"{layer}/: cannot even include its own {header}: {messages}"


def find_headers(source):
    headers = {}
    for layer in tree.LAYERS:
        of_layer = [path for path in tree.files(source, ".h") if os.path.dirname(path) == layer]
        if of_layer:
            headers[layer] = of_layer[0]
    return headers


def check(source, build):
    for path in tree.files(source, ".c", ".h"):
        with open(os.path.join(source, path), encoding="utf-8") as stream:
            yield from check_text(path, stream.read())
    commands = tree.Commands(source, build)
    headers = find_headers(source)
    for layer in tree.LAYERS:
        near = commands.near(f"{layer}/x.c")
        if near is None:
            yield f"{layer}/: no file of it is compiled in {build}"
        else:
            yield from check_compiler(layer, near, headers)


def must_fail(source, build):
    yield "an include of cached/ in index/", list(check_text("index/x.c", '#include "cached/x.h"\n'))
    yield "an include of proto/ in index/", list(check_text("index/x.c", '#include "proto/status.h"\n'))
    yield "an include by ..", list(check_text("tests/unit/x.c", ' # include "../client/x.h"\n'))
    yield "an inner header in an example", list(check_text("client/examples/x.c", '#include "proto/status.h"\n'))
    headers = find_headers(source)
    for layer, other in (("index", "cached"), ("index", "proto"), ("client", "cached"), ("gpu", "index")):
        directory, compiler, flags = tree.Commands(source, build).near(f"{layer}/x.c")
        # As if the layer linked the other one: the headers below may be needed too.
        roots = [f"-I{build}/roots/{root}" for root in tree.MAY_INCLUDE[other]]
        _, _, other_flags = tree.Commands(source, build).near(f"{other}/x.c")
        near = (directory, compiler, flags + roots + other_flags)
        yield f"{layer}/ linked with {other}/", list(check_compiler(layer, near, headers))
