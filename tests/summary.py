"""summary.py LOGS: adds up the steps and the junit files that tests/run left, and says what failed and was skipped."""
import pathlib
import re
import sys
import xml.etree.ElementTree

SKIPPED_CASE = re.compile(r"^\[  SKIPPED \] (?!\d+ test)(\w+)", re.MULTILINE)


def reason(output, message):
    for line in output.splitlines():
        if "skip" in line.lower() and not line.startswith("["):
            return line.strip()
    return message or "no reason given"


def read_junit(path, passed, failed, skipped):
    for case in xml.etree.ElementTree.parse(path).getroot().iter("testcase"):
        name = f"{path.stem}/{case.get('name')}"
        output = case.findtext("system-out") or ""
        skip = case.find("skipped")
        if case.find("failure") is not None or case.get("status") in ("fail", "notrun"):
            # ctest calls a program that was never built "notrun" and marks it as skipped.
            if skip is not None and "SKIP" in (skip.get("message") or ""):
                skipped.append(f"{name}: {reason(output, skip.get('message'))}")
            else:
                failed.append(name)
        elif skip is not None or case.get("status") == "disabled":
            skipped.append(f"{name}: {reason(output, skip.get('message') if skip is not None else 'disabled')}")
        else:
            passed.append(name)
            skipped.extend(f"{name}, case {inner}: {reason(output, None)}"
                           for inner in dict.fromkeys(SKIPPED_CASE.findall(output)))


def main():
    logs = pathlib.Path(sys.argv[1])
    passed, failed, skipped = [], [], []
    for line in (logs / "steps").read_text(encoding="utf-8").splitlines():
        outcome, name = line.split("\t")
        (passed if outcome == "passed" else failed).append(name)
    for path in sorted(logs.glob("*.xml")):
        read_junit(path, passed, failed, skipped)
    for title, names in (("failed", failed), ("skipped", skipped)):
        for name in names:
            print(f"{title}: {name}")
    print(f"{len(passed)} passed, {len(failed)} failed, {len(skipped)} skipped")
    sys.exit(1 if failed or not passed else 0)


if __name__ == "__main__":
    main()
