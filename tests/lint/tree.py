"""What the lints know about the source tree and how it is compiled."""
import json
import os
import pathlib
import shlex
import subprocess

LAYERS = ("proto", "index", "gpu", "client", "cached")
# Who may include whose headers. Everything else must not compile.
MAY_INCLUDE = {
    "proto": {"proto"},
    "index": {"index"},
    "gpu": {"gpu", "proto"},
    "client": {"client", "gpu", "proto"},
    "cached": {"cached", "gpu", "index", "proto"},
}


def files(source, *suffixes):
    """Paths relative to source of all files that belong to the project and end in one of the suffixes (none: all)."""
    try:
        listed = subprocess.run(["git", "-C", source, "ls-files", "-co", "--exclude-standard"], check=True,
                                capture_output=True, text=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        listed = [str(path.relative_to(source)) for path in pathlib.Path(source).rglob("*") if path.is_file()]
        listed = [path for path in listed if not path.startswith(("build/", ".git/"))]
    return sorted(path for path in set(listed)
                  if path.endswith(suffixes or "") and os.path.isfile(os.path.join(source, path)))


class Commands:
    """The build's compile_commands.json, by path relative to source."""

    def __init__(self, source, build):
        with open(os.path.join(build, "compile_commands.json"), encoding="utf-8") as stream:
            entries = json.load(stream)
        root = os.path.realpath(source) + os.sep
        self.entries = {}
        for entry in entries:
            path = os.path.realpath(os.path.join(entry["directory"], entry["file"]))
            if path.startswith(root) and not path.startswith(os.path.realpath(build) + os.sep):
                arguments = entry.get("arguments") or shlex.split(entry["command"])
                self.entries[path[len(root):]] = (entry["directory"], arguments)

    def near(self, path):
        """(directory, compiler, flags) of the source beside path whose name shares most words with it (tests of different layers
        share a folder), else of one in a folder above it; None if there is none."""
        folder = os.path.dirname(path)
        while folder:
            beside = [known for known in sorted(self.entries) if os.path.dirname(known) == folder]
            if beside:
                closest = max(beside, key=lambda known: len(words(known) & words(path)))
                directory, arguments = self.entries[closest]
                return directory, arguments[0], preprocessing(arguments)
            folder = os.path.dirname(folder)
        return None


def words(path):
    return set(os.path.splitext(os.path.basename(path))[0].split("_")) - {"test"}


def preprocessing(arguments):
    """The flags that decide what a file sees: include paths, definitions, the language and its warnings."""
    kept = []
    takes_next = False
    for argument in arguments[1:]:
        if takes_next or argument.startswith(("-I", "-D", "-std=", "-W")):
            kept.append(argument)
            takes_next = argument in ("-I", "-D")
        elif argument == "-isystem":
            kept.append(argument)
            takes_next = True
    return kept


def compile_text(directory, compiler, flags, text):
    """Compiles text as a C file without output; (succeeded, messages)."""
    done = subprocess.run([compiler, *flags, "-fsyntax-only", "-x", "c", "-"], input=text, cwd=directory,
                          capture_output=True, text=True)
    return done.returncode == 0, done.stderr
