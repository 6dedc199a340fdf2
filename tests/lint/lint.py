"""Runs one lint: lint.py NAME --source DIR --build DIR. With --must-fail, proves that the lint finds what it should."""
import argparse
import importlib
import inspect
import sys
import tempfile

NAMES = ("headers", "layers", "pages", "readme", "style", "symbols", "text", "tidy")


def check(module, source, build):
    found = list(module.check(source, build))
    for line in found:
        print(line)
    return 1 if found else 0


def must_fail(module, source, build):
    missed = 0
    with tempfile.TemporaryDirectory() as folder:
        arguments = (source, build, folder)[:len(inspect.signature(module.must_fail).parameters)]
        for what, found in module.must_fail(*arguments):
            print(f"{'found' if found else 'MISSED'}: {what}")
            missed += not found
    return 1 if missed else 0


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("--source", required=True)
    parser.add_argument("--build", required=True)
    parser.add_argument("--must-fail", action="store_true")
    arguments = parser.parse_args()
    module = importlib.import_module(arguments.name)
    run = must_fail if arguments.must_fail else check
    sys.exit(run(module, arguments.source, arguments.build))


if __name__ == "__main__":
    main()
