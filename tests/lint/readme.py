"""The C in README.md compiles, and the commands and files that it names exist."""
import os
import re

import tree

# What the example takes from the engine around it.
AROUND = """#include <stdio.h>
#include "client/icecache.h"
void example(const void *digest, const void *k, const void *v, size_t k_bytes, size_t v_bytes, size_t layer,
             size_t token, size_t head, uint64_t prompt_tokens, uint32_t l, uint64_t position, const void *q,
             const void *k_step, const void *v_step, uint32_t kv_head,
             const uint32_t *token_ids, uint8_t (*hashes)[ICE_HASH_BYTES]);
void example(const void *digest, const void *k, const void *v, size_t k_bytes, size_t v_bytes, size_t layer,
             size_t token, size_t head, uint64_t prompt_tokens, uint32_t l, uint64_t position, const void *q,
             const void *k_step, const void *v_step, uint32_t kv_head,
             const uint32_t *token_ids, uint8_t (*hashes)[ICE_HASH_BYTES])
{
%s
    (void)status;
    (void)view;
}
"""
BLOCK = re.compile(r"^```c\n(.*?)^```", re.MULTILINE | re.DOTALL)
PATH = re.compile(r"(?<![\w./-])((?:deploy|tests|client|cached|index|proto|gpu)/[\w./-]*\w)")


def check_code(near, text):
    directory, compiler, flags = near
    blocks = BLOCK.findall(text)
    if not blocks:
        yield "README.md: no example in C"
    for block in blocks:
        code = AROUND % block.replace("#include <icecache.h>\n", "")
        compiles, messages = tree.compile_text(directory, compiler, flags, code)
        if not compiles:
            yield f"README.md: the example in C does not compile:\n{messages}"


def check_paths(source, text):
    for path in sorted(set(PATH.findall(text))):
        if not os.path.exists(os.path.join(source, path)):
            yield f"README.md names {path}, which does not exist"


def read(source):
    with open(os.path.join(source, "README.md"), encoding="utf-8") as stream:
        return stream.read()


def check(source, build):
    text = read(source)
    yield from check_code(tree.Commands(source, build).near("client/x.c"), text)
    yield from check_paths(source, text)


def must_fail(source, build):
    near = tree.Commands(source, build).near("client/x.c")
    yield "a field that does not exist", list(check_code(near, read(source).replace(".budget =", ".no_such_field =")))
    yield "a file that does not exist", list(check_paths(source, "run `deploy/no-such-file`"))
