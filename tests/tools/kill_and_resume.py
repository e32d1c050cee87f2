"""Kill a run of two processes many times, resume it each time: is the end that of an uninterrupted run?

    python tests/tools/kill_and_resume.py [--kills 12] [--seed 0]

A checkpoint every third step; half of the kills come while one is written. After each, OUT must not load.
"""
import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from conftest import ROOT, losses, same
from model import Help, UserError, load_model


def start(out, *flags):
    command = ["torch.distributed.run", "--standalone", "--nproc_per_node=2", "train.py", "--out", str(out),
               "--save_every", "3", *flags]
    return subprocess.Popen([sys.executable, "-m", *command], cwd=ROOT, text=True, stdout=subprocess.PIPE)


def processes(out):
    """Ids of torchrun's process and of both workers."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # gone meanwhile
            if str(out).encode() in path.read_bytes().split(b"\0"):
                yield int(path.parent.name)


def steps(out):
    log = out / "train_log.jsonl"
    return log.read_text().count('"loss"') if log.exists() else 0


def kill(run, out, rng):
    """Wait for progress, then for a random moment or a checkpoint in the making; kill all processes."""
    goal, in_checkpoint = steps(out) + rng.randint(1, 8), rng.random() < 0.5
    while steps(out) < goal and run.poll() is None:
        time.sleep(0.005)
    while in_checkpoint and not list((out / "checkpoints").glob("*.tmp")) and run.poll() is None:
        time.sleep(0.001)
    time.sleep(rng.uniform(0, 0.05 if in_checkpoint else 0.5))
    if run.poll() is not None:
        sys.exit(f"the run ended before it was killed:\n{run.communicate()[0][-2000:]}")
    for pid in list(processes(out)):
        os.kill(pid, signal.SIGKILL)
    run.communicate()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    parser.add_argument("--kills", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng, flags = random.Random(args.seed), []
    with tempfile.TemporaryDirectory() as folder:
        whole, killed = Path(folder) / "whole", Path(folder) / "killed"
        print(start(whole).communicate()[0].splitlines()[-2], flush=True)
        for i in range(args.kills):
            kill(start(killed, *flags), killed, rng)
            try:
                load_model(killed)
                sys.exit("what a kill left loads as a model")
            except UserError:
                half = [path.name for path in (killed / "checkpoints").glob("*.tmp")]
                print(f"kill {i + 1:>2} at step {steps(killed):>3}, half a checkpoint: {half}", flush=True)
            flags = ["--resume"]
        print(next(line for line in start(killed, *flags).communicate()[0].splitlines() if "resumed" in line))
        equal = same(whole, killed) and (losses(whole) == losses(killed)).all()
    print(f"weights, Decision Maker, matrix and losses: {'the same bits' if equal else 'NOT the same'}")
    sys.exit(not equal)


if __name__ == "__main__":
    main()
