"""Do the tests catch bugs? Puts one known bug at a time into a copy of the project and runs the tests on it.

    python tests/mutants.py                                       # all of tests/mutants.json: hours
    python tests/mutants.py i06 e12                               # these
    python tests/mutants.py i06 e12 -- tests/test_infer.py        # these, by some of the tests: seconds each
    python tests/mutants.py --list FILE.json                      # another list

The list holds objects with "id", "file", "old" (a text that stands in the file once), "new" (what the bug
puts there), "what" (the bug in words) and, where only a slow test can catch it, "slow": true. Prints caught,
SURVIVED, or STALE where `old` is gone or stands there twice; the exit code is then 1.
"""
import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def failure(folder, slow, arguments):
    """Run the tests in a folder. Returns None if they pass, else the line that names the first failure."""
    marks = ["-m", "slow or not slow"] if slow else []
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *marks, *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True,
                          env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"})
    lines = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return (lines or [done.stderr[-300:]])[0] if done.returncode else None


def main():
    own, rest = sys.argv[1:], []
    if "--" in own:
        own, rest = own[:own.index("--")], own[own.index("--") + 1:]
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("ids", nargs="*")
    parser.add_argument("--list", default=Path(__file__).with_suffix(".json"), type=Path)
    args = parser.parse_args(own)
    bugs = json.loads(args.list.read_text(encoding="utf-8"))
    if unknown := set(args.ids) - {bug["id"] for bug in bugs}:
        sys.exit(f"{args.list} has no {', '.join(sorted(unknown))}")
    missed = 0
    with tempfile.TemporaryDirectory() as folder:
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
        for name in listed.decode().split("\0")[:-1]:
            Path(folder, name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, Path(folder, name))
        if fails := failure(folder, False, rest):
            sys.exit(f"the tests fail without a bug: {fails}")
        for bug in (bug for bug in bugs if not args.ids or bug["id"] in args.ids):
            path, fails = Path(folder, bug["file"]), None
            text = path.read_text(encoding="utf-8") if path.exists() else ""
            if text.count(bug["old"]) == 1:
                path.write_text(text.replace(bug["old"], bug["new"]), encoding="utf-8")
                fails = failure(folder, bug.get("slow"), rest)
                path.write_text(text, encoding="utf-8")
                verdict = "caught  " if fails else "SURVIVED"
            else:
                verdict = "STALE   "
            missed += not fails
            print(f"{verdict}  {bug['id']}  {bug['file']}: {bug['what']}  {(fails or '')[:100]}", flush=True)
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
