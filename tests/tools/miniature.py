"""Plain fine-tuning against CC-Tuning on the built-in data: exact match on held-out facts, several seeds.

    python tests/tools/miniature.py                   # five seeds of both, on the test facts: README's table
    python tests/tools/miniature.py --part dev --seeds 2 --cc "--ridge 0.1" --out out/other   # to choose by

--sft and --cc add options of train.py to the default run of each method. Runs that are complete in --out are
not repeated. Prints a table in Markdown; --figure draws accuracy per language (needs matplotlib).
"""
import argparse
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NAMES = {  # (method, how its result is connected)
    ("base", "none"): "base model, untrained",
    ("sft", "none"): "SFT",
    ("cc", "matrix"): "CC-Tuning, Transform Matrix",
    ("cc", "english"): "CC-Tuning, real English prompt (the bound)",
    ("cc", "none"): "CC-Tuning, no connection",
}


def run(script, *options):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, ROOT / script, *map(str, options)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"{script} {' '.join(map(str, options))}\n{done.stderr}")


def one_run(method, seed, args):
    """Train and answer once; {connection: {language: accuracy}}."""
    folder = args.out / re.sub(r"\W+", "_", f"{method} {getattr(args, method, '')} {seed}")
    model = ROOT / "data" / "base" if method == "base" else folder
    if not (model / "model.safetensors.index.json").exists():
        run("train.py", "--method", method, "--seed", seed, "--out", folder, "--overwrite",
            *shlex.split(getattr(args, method)))
    found = {}
    for connection in [connection for m, connection in NAMES if m == method]:
        scores = folder / args.part / re.sub(r"\W+", "_", f"{connection} {args.answer}")
        if not (scores / "results.json").exists():
            run("eval.py", "--model", model, "--data", ROOT / "data" / args.part, "--connection", connection,
                "--batch_size", 64, "--out", scores, *shlex.split(args.answer))
        results = json.loads((scores / "results.json").read_text())["results"]
        found[connection] = {r["lang"]: 100 * r["scores"]["exact"] for r in results}
    return found


def draw(path, scores):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    langs = list(next(iter(scores.values()))[0])
    figure, axes = plt.subplots(figsize=(9, 3.2), constrained_layout=True)
    width = 0.8 / len(scores)
    for i, (key, runs) in enumerate(scores.items()):
        values = [[found[lang] for found in runs] for lang in langs]
        axes.bar([x + width * i for x in range(len(langs))], [statistics.mean(v) for v in values], width,
                 label=NAMES[key], yerr=[statistics.stdev(v) for v in values] if len(runs) > 1 else None,
                 error_kw={"linewidth": 0.8})
    axes.set_xticks([x + 0.4 - width / 2 for x in range(len(langs))], langs)
    axes.set_ylabel("exact match, %")
    axes.legend(fontsize=7, frameon=False, ncols=2)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--seeds", type=int, default=5, help="seeds 0 to N-1 (default %(default)s)")
    add("--part", choices=("dev", "test"), default="test", help="facts to answer (default %(default)s)")
    add("--methods", default="sft,cc", help="(default %(default)s)")
    add("--sft", default="--lr 2e-4", metavar="OPTIONS", help="of train.py (default, the best of eight on "
        "dev: %(default)s)")
    add("--cc", default="--english_grad", metavar="OPTIONS", help="of train.py (default, the best of eight "
        "on dev: %(default)s)")
    add("--answer", default="", metavar="OPTIONS", help="of eval.py")
    add("--jobs", type=int, default=2, help="runs at a time, of one thread each (default %(default)s)")
    add("--out", type=Path, default=ROOT / "out" / "miniature", metavar="DIR", help="(out/miniature)")
    add("--figure", type=Path, metavar="FILE", help="a PNG to draw")
    args = parser.parse_args()
    jobs = [("base", 0)]
    jobs += [(method, seed) for seed in range(args.seeds) for method in args.methods.split(",")]
    with ThreadPoolExecutor(args.jobs) as pool:
        results = dict(zip(jobs, pool.map(lambda job: one_run(*job, args), jobs), strict=True))
    scores = {(method, connection): [found[connection] for (m, _), found in results.items() if m == method]
              for method, connection in NAMES if (method, 0) in results}
    print(f"| {args.part} facts, exact match in % | mean of ten languages | spread (s.d.) | each seed "
          "| English |\n|---|---|---|---|---|")
    for key, runs in scores.items():
        ten = [statistics.mean(value for lang, value in found.items() if lang != "en") for found in runs]
        spread = f"{statistics.stdev(ten):.1f}" if len(ten) > 1 else ""
        english = statistics.mean(found["en"] for found in runs)
        each = ", ".join(f"{value:.1f}" for value in ten)
        print(f"| {NAMES[key]} | {statistics.mean(ten):.1f} | {spread} | {each} | {english:.1f} |")
    if args.figure:
        draw(args.figure, scores)


if __name__ == "__main__":
    main()
