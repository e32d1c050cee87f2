"""Do the tests catch bugs? Puts one known bug at a time into a copy of the project and runs tests on it.

    python tests/tools/mutants.py                              # all of mutants.json, each by its test file
    python tests/tools/mutants.py i06 e12                      # these
    python tests/tools/mutants.py i06 -- tests/test_infer.py   # by other tests; `-- tests` by all of them
    python tests/tools/mutants.py --list FILE.json             # another list

The list holds objects with "id", "file", "old" (a text that stands in the file once), "new" (what the bug
puts there), "what" (the bug in words), "tests" (the file that catches it; default: all) and, where only a
slow or optional test can catch it, "marked": true. Prints caught, SURVIVED, or STALE where `old` is gone or
stands there twice; the exit code is then 1.
"""
import argparse
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.remove(str(Path(__file__).resolve().parent))  # the copy's is used
os.environ["OMP_NUM_THREADS"] = os.environ["PYTHONDONTWRITEBYTECODE"] = "1"

import pytest
import torch  # noqa: F401  imported once, not for each bug

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 900  # seconds; a bug may be an endless loop


def failure(folder, tests, marked):
    """Run tests in a folder. Returns None if they pass, else the line that names the first failure."""
    marks = ["-m", "slow or optional or not slow"] if marked else []
    with tempfile.TemporaryFile("w+") as out:
        child = os.fork()
        if child == 0:
            signal.alarm(TIMEOUT)
            os.chdir(folder)
            os.dup2(out.fileno(), 1)
            os.dup2(out.fileno(), 2)
            sys.dont_write_bytecode = True
            os._exit(pytest.main(["-q", "-x", "-p", "no:cacheprovider", *marks, *tests]))
        status = os.waitpid(child, 0)[1]
        out.seek(0)
        lines = out.read().splitlines()
    named = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return (named or lines[-1:] or ["ended without a word"])[0] if status else None


def main():
    own, others = sys.argv[1:], []
    if "--" in own:
        own, others = own[:own.index("--")], own[own.index("--") + 1:]
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("ids", nargs="*")
    parser.add_argument("--list", default=Path(__file__).with_suffix(".json"), type=Path)
    args = parser.parse_args(own)
    bugs = {bug["id"]: bug for bug in json.loads(args.list.read_text(encoding="utf-8"))}
    missed = 0
    with tempfile.TemporaryDirectory() as folder:
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
        for name in listed.decode().split("\0")[:-1]:
            Path(folder, name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, Path(folder, name))
        failure_without_bug = functools.cache(functools.partial(failure, folder))
        for bug in (bugs[i] for i in args.ids or bugs):
            tests = tuple(others or [bug.get("tests", "tests")])
            if fails := failure_without_bug(tests, bug.get("marked")):
                sys.exit(f"{tests} fail without a bug: {fails}")
            path, fails, verdict = Path(folder, bug["file"]), None, "STALE"
            text = path.read_text(encoding="utf-8") if path.exists() else ""
            if text.count(bug["old"]) == 1:
                path.write_text(text.replace(bug["old"], bug["new"]), encoding="utf-8")
                fails = failure(folder, tests, bug.get("marked"))
                path.write_text(text, encoding="utf-8")
                verdict = "caught" if fails else "SURVIVED"
            missed += not fails
            line = f"{verdict:<8}  {bug['id']}  {bug['file']}: {bug['what']}"
            print(f"{line}  {(fails or '')[:100]}", flush=True)
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
