"""Do the tests catch bugs? Puts one known bug at a time into a copy of the project and runs tests on it.

    python tests/tools/mutants.py                                   # all, each by its test file
    python tests/tools/mutants.py i06 e12                           # these
    python tests/tools/mutants.py i06 --tests tests/test_infer.py   # by other tests

mutants.json: "id", "file", "old" (stands there once), "new", "what" (the bug in words), "tests" (the file
that catches it; default: all), "marked": true where only a slow or optional test does. Prints caught,
SURVIVED, or STALE where `old` is gone or stands there twice; the exit code is then 1.
"""
import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.remove(str(Path(__file__).resolve().parent))  # the copy's is used
os.environ["OMP_NUM_THREADS"] = os.environ["PYTHONDONTWRITEBYTECODE"] = "1"

import pytest
import torch  # noqa: F401  imported once, not for each bug

sys.dont_write_bytecode = True  # it would outlive the bug
ROOT = Path(__file__).resolve().parents[2]


def failure(folder, tests, marked):
    """Run tests in a folder. Returns "" if they pass, else the line that names the first failure."""
    marks = ["-m", "slow or optional or not slow"] if marked else []
    with tempfile.TemporaryFile("w+") as out:
        child = os.fork()
        if child == 0:
            signal.alarm(900)  # seconds; a bug may be an endless loop
            os.chdir(folder)
            os.dup2(out.fileno(), 1)
            os.dup2(out.fileno(), 2)
            os._exit(pytest.main(["-q", "-x", "-p", "no:cacheprovider", *marks, *tests]))
        status = os.waitpid(child, 0)[1]
        out.seek(0)
        named = [line.strip() for line in out if line.startswith(("FAILED", "ERROR"))]
    return (named or ["no test ran to its end"])[0] if status else ""


if __name__ == "__main__":
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("ids", nargs="*")
    parser.add_argument("--tests", nargs="+", metavar="FILE")
    parser.add_argument("--list", default=Path(__file__).with_suffix(".json"), type=Path, metavar="FILE")
    args = parser.parse_args()
    bugs = {bug["id"]: bug for bug in json.loads(args.list.read_text())}
    missed, passed = 0, []
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(f"git ls-files -z | xargs -0 cp --parents -t {folder}", shell=True, cwd=ROOT)
        for bug in (bugs[i] for i in args.ids or bugs):
            run = folder, args.tests or [bug.get("tests", "tests")], bug.get("marked")
            if run not in passed and (fails := failure(*run)):
                sys.exit(f"{run[1]} fail without a bug: {fails}")
            passed.append(run)
            path, fails, verdict = Path(folder, bug["file"]), "", "STALE"
            text = path.read_text()
            if text.count(bug["old"]) == 1:
                path.write_text(text.replace(bug["old"], bug["new"]))
                fails = failure(*run)
                path.write_text(text)
                verdict = "caught" if fails else "SURVIVED"
            missed += not fails
            print(f"{verdict:<8}  {bug['id']}  {bug['file']}: {bug['what']}  {fails[:100]}", flush=True)
    sys.exit(1 if missed else 0)
