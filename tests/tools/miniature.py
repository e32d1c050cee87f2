"""Plain fine-tuning against CC-Tuning on the built-in data: exact match on held-out facts, several seeds.

    python tests/tools/miniature.py                   # five seeds of both, on the test facts: README's table
    python tests/tools/miniature.py --part dev --seeds 2 --cc "--ridge 0.1" --out out/other   # to choose by

--sft and --cc add options of train.py to the default run of each method. Complete runs in --out are not
repeated. Prints a table in Markdown.
"""
import argparse
import json
import os
import re
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
NAMES = {  # (method, how its result is connected)
    ("base", "none"): "base model, untrained",
    ("sft", "none"): "SFT",
    ("cc", "matrix"): "CC-Tuning, Transform Matrix",
    ("cc", "english"): "CC-Tuning, real English prompt (the bound)",
    ("cc", "none"): "CC-Tuning, no connection",
}


def run(script, *options):
    command = [sys.executable, ROOT / script, *map(str, options)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})


def one_run(method, seed, args):
    """Train and answer once; {connection: {language: accuracy}}."""
    folder = args.out / re.sub(r"\W+", "_", f"{method} {getattr(args, method, '')} {seed}")
    model = ROOT / "data" / "base" if method == "base" else folder
    if not (model / "model.safetensors.index.json").exists():
        run("train.py", "--method", method, "--seed", seed, "--out", folder, "--overwrite",
            *shlex.split(getattr(args, method)))
    found = {}
    for connection in [connection for m, connection in NAMES if m == method]:
        out = folder / args.part / connection
        run("eval.py", "--model", model, "--data", ROOT / "data" / args.part, "--connection", connection,
            "--batch_size", 64, "--out", out)
        results = json.loads((out / "results.json").read_text())["results"]
        found[connection] = {r["lang"]: 100 * r["scores"]["exact"] for r in results}
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(usage=__doc__)
    add = parser.add_argument
    add("--seeds", type=int, default=5, metavar="N", help="seeds 0 to N-1 (default %(default)s)")
    add("--part", choices=("dev", "test"), default="test", help="facts to answer (default %(default)s)")
    add("--methods", default="sft,cc", help="(default %(default)s)")
    best_of_eight = "of train.py (default, the best of eight on dev: %(default)s)"
    add("--sft", default="--lr 2e-4", metavar="OPTIONS", help=best_of_eight)
    add("--cc", default="--english_grad", metavar="OPTIONS", help=best_of_eight)
    add("--jobs", type=int, default=2, help="runs at a time, of one thread each (default %(default)s)")
    add("--out", type=Path, default=ROOT / "out" / "miniature", metavar="DIR", help="(out/miniature)")
    args = parser.parse_args()
    methods = args.methods.split(",")
    jobs = [("base", 0)] + [(method, seed) for seed in range(args.seeds) for method in methods]
    with ThreadPoolExecutor(args.jobs) as pool:
        results = dict(zip(jobs, pool.map(lambda job: one_run(*job, args), jobs), strict=True))
    scores = {(method, connection): [found[connection] for (m, _), found in results.items() if m == method]
              for method, connection in NAMES if (method, 0) in results}
    print(f"| {args.part} facts, exact match in % | mean of ten | s.d. | English |\n|---|---|---|---|")
    for key, runs in scores.items():
        english = np.array([found["en"] for found in runs])
        ten = (np.array([sum(found.values()) for found in runs]) - english) / 10  # (seeds,)
        spread = ten.std(ddof=len(ten) > 1)
        print(f"| {NAMES[key]} | {ten.mean():.1f} | {spread:.1f} | {english.mean():.1f} |")
