"""What a person with a GPU runs first: is everything right on it, and fast? CI never runs this.

    python tests/tools/gpu.py                      # under 8 minutes on one H100, without a network
    python tests/tools/gpu.py --only golden        # some checks; step and answers need checkpoint too
    python tests/tools/gpu.py --toy                # toy sizes on a CPU: tries this file, judges no speed

Each check prints one line: PASS or FAIL, what is wrong, and its figures. With transformers installed, it is
the measure of steps and answers.
"""
import argparse
import contextlib
import gc
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from safetensors.torch import save_file

import train
from infer import Engine, Prompt
from model import Config, Help, Transformer, choose_device, load_model

ROOT = Path(__file__).resolve().parents[2]
HAS_TRANSFORMERS = importlib.util.find_spec("transformers") is not None
LLAMA_1B = {  # Llama 3.2 1B
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 128256, "hidden_size": 2048,
    "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
    "head_dim": 64, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
    "hidden_act": "silu", "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2}
TOY = {"vocab_size": 4096, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
       "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
new_adamw = partial(torch.optim.AdamW, lr=1e-5, betas=train.BETAS, weight_decay=0.0, fused=True)


class Run:
    """What a check works with: sizes, a folder that all share, what it found wrong."""

    def __init__(self, toy, folder):
        self.toy, self.folder, self.problems = toy, folder, []
        self.device = choose_device()
        self.on_gpu = self.device.type == "cuda"
        # Rows of a step; tokens of a prompt, its answer and its English version; new tokens when answering.
        sizes = (2, 12, 6, 10, 5) if toy else (8, 512, 256, 512, 128)
        self.rows, self.prompt, self.answer, self.english, self.new = sizes
        self.many, self.repeats = (2, 3) if toy else (16, 6)  # prompts answered at once
        self.config = LLAMA_1B | (TOY if toy else {})
        if not (self.on_gpu or toy):
            sys.exit("no GPU; --toy runs on a CPU")

    def require(self, holds, problem):
        """Fail unless `holds`."""
        if not holds:
            self.problems.append(problem)

    def seconds(self, function, repeats=None, warm_up=2):
        """Median time of function()."""
        times, wait = [], torch.cuda.synchronize if self.on_gpu else lambda: None
        for _ in range(warm_up + (repeats or self.repeats)):
            wait()
            began = time.perf_counter()
            function()
            wait()
            times.append(time.perf_counter() - began)
        return statistics.median(times[warm_up:])

    def peak(self):
        """GB allocated at most since the last call."""
        if not self.on_gpu:
            return 0.0
        peak = torch.cuda.max_memory_allocated() / 1e9
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        return peak


# -------------------------------------------------------------- exactness: checks return {figure: value}

def golden(run):
    """test_golden.py on this device, in float32."""
    import calls
    import test_golden
    calls.DEVICE = run.device
    for folder, expected in test_golden.FOLDERS.items():
        test_golden.FOLDERS[folder] = {name: tensor.to(run.device) for name, tensor in expected.items()}
    # --noconftest: conftest.py hides the GPU.
    failed = pytest.main(["-q", "--noconftest", "-p", "no:cacheprovider", test_golden.__file__])
    run.require(not failed, "see above")
    return {"folders": len(test_golden.FOLDERS)}


def python(*command):
    """Run a command that must succeed. Returns what it printed; its errors are shown."""
    command = [sys.executable, *map(str, command)]
    return subprocess.run(command, cwd=ROOT, text=True, stdout=subprocess.PIPE, check=True).stdout


def default_run(run):
    """The default run: whole, and killed and resumed. --toy: a step or two of it."""
    small = ("--model data/base --data data/dev.jsonl --epochs 1 --batch_size 96 --micro_batch 32 --lr 1e-4 "
             "--max_length 64 --matrix_prompts 64").split() if run.toy else []
    whole, killed = run.folder / "whole", run.folder / "killed"
    python("train.py", "--out", whole, *small)
    command = [sys.executable, "train.py", "--out", killed, "--save_every", 1 if run.toy else 4, *small]
    victim = subprocess.Popen(list(map(str, command)), cwd=ROOT, stdout=subprocess.DEVNULL)
    while victim.poll() is None and not list((killed / "checkpoints").glob("step-*[0-9]")):
        time.sleep(0.02)
    victim.kill()
    victim.wait()
    text = python("train.py", "--out", killed, "--resume", *small)
    run.require("resumed after step" in text, "the killed run was not resumed")
    losses = {}
    for folder in (whole, killed):
        entries = map(json.loads, (folder / "train_log.jsonl").read_text().splitlines())
        losses[folder] = torch.tensor([entry["loss"] for entry in entries if "loss" in entry])
    apart = (losses[killed] / losses[whole] - 1).abs().mean().item()
    run.require(losses[whole][-1] < losses[whole][0], "the loss does not fall")
    run.require(apart < 0.01, "resumed: other losses")
    weights = [(folder / "model-00001-of-00001.safetensors").read_bytes() for folder in (whole, killed)]
    return {"steps": len(losses[whole]), "last loss": losses[whole][-1].item(),
            "resumed: losses differ by": apart, "same bits": weights[0] == weights[1]}


# ------------------------------------------------------------ training a checkpoint of Llama 3.2 1B's shape

def checkpoint(run):
    """Random weights of Llama 3.2 1B's shape, with the built-in tokenizer, a Decision Maker and a matrix."""
    folder = run.folder / "1b"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(run.config))
    config = Config.read(folder)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in Transformer(config).named_parameters()}
    torch.manual_seed(0)
    tensors = {}
    for name, shape in shapes.items():
        noise = 0.02 * torch.randn(shape, device=run.device)
        tensors[name] = (1 + noise if len(shape) == 1 else noise).bfloat16().cpu()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    save_file({"decision_maker.weight": 0.02 * torch.randn(config.num_hidden_layers, config.hidden_size),
               "transform_matrix": torch.eye(config.hidden_size)}, folder / "cctuning.safetensors")
    (folder / "tokenizer.model").write_bytes((ROOT / "data" / "base" / "tokenizer.model").read_bytes())
    return {"loaded in, s": run.seconds(lambda: load_model(folder, None, run.device), 1, warm_up=0)}


def setup_1b(run, method):
    """What train.py makes of its command line, with samples of one length in place of the data's."""
    args = train.parse_args(
        [f"--model={run.folder / '1b'}", f"--data={ROOT / 'data' / 'dev.jsonl'}", "--template=plain",
         f"--method={method}", "--dtype=bfloat16", f"--micro_batch={run.rows}"])
    with contextlib.redirect_stdout(sys.stderr):  # what it says about the data is of no interest
        setup = train.Setup(args, train.Dist())
    generator, setup.samples = torch.Generator().manual_seed(0), []
    for _ in range(run.rows):
        ids, english = (torch.randint(3, setup.config.vocab_size, (length,), generator=generator).tolist()
                        for length in (run.prompt + run.answer, run.english))
        setup.samples.append(train.Sample(ids, run.prompt, english, False))
    setup.steps = [(0, list(range(run.rows)))] * (2 + run.repeats)
    return setup


def our_step(run, method):
    """A function that takes the next step of train.py and returns its loss."""
    setup = setup_1b(run, method)
    cc, _ = train.load_for_training(setup)
    optimizer, steps = new_adamw(cc.parameters()), iter(range(len(setup.steps)))
    return lambda: train.train_step(setup, cc, optimizer, next(steps))[0]


def their_step(run):
    """The same of transformers, plain: the same weights, batch, autocast and optimizer."""
    model, setup = theirs(run, torch.float32), setup_1b(run, "sft")
    batch = train.collate(setup.samples, -1, run.device)
    optimizer = new_adamw(model.train().parameters())

    def once():
        with setup.autocast():
            loss = model(input_ids=batch.ids, labels=batch.labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), train.MAX_NORM).item()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()
    return once


def theirs(run, dtype):
    """transformers' model of the 1B checkpoint. As in ours, cuDNN's attention is off."""
    from transformers import AutoModelForCausalLM
    return AutoModelForCausalLM.from_pretrained(run.folder / "1b").to(run.device, dtype)


def measure_step(run, once):
    """Milliseconds, peak GB and first loss of a step."""
    run.peak()
    seen = []
    seconds = run.seconds(lambda: seen.append(once()))
    run.require(torch.tensor(seen).isfinite().all(), f"losses are not finite: {seen}")
    return 1e3 * seconds, run.peak(), seen[0]


def step(run):
    """Training steps in bfloat16: SFT, CC-Tuning, and transformers' plain one."""
    sft, cc = measure_step(run, our_step(run, "sft")), measure_step(run, our_step(run, "cc"))
    found = {"sft, ms": sft[0], "sft, peak GB": sft[1], "cc, ms": cc[0], "cc, peak GB": cc[1],
             "cc / sft": cc[0] / sft[0]}
    run.require(run.toy or found["cc / sft"] <= 1.25, "cc / sft is far above its arithmetic floor, 1.19")
    if HAS_TRANSFORMERS:
        plain = measure_step(run, their_step(run))
        found |= {"transformers, ms": plain[0], "transformers, peak GB": plain[1],
                  "sft / transformers": sft[0] / plain[0], "cc / transformers": cc[0] / plain[0]}
        run.require(run.toy or found["cc / transformers"] <= 0.9, "our cc step is slower than 0.9 of theirs")
        run.require(run.toy or cc[1] < plain[1], "our cc step needs more memory than theirs")
        run.require(abs(sft[2] / plain[2] - 1) < 0.01, f"our loss {sft[2]}, theirs {plain[2]}")
    return found


# -------------------------------------------------------------------------------------------------- answering

def our_answers(run, ids):
    """Seconds that the connection takes, and seconds of a decode step, in bfloat16."""
    engine, passes = Engine(run.folder / "1b"), {}
    engine.tokenizer.stop = set()  # random weights would end answers early
    prompts = [Prompt(row, number=i) for i, row in enumerate(ids.tolist())]
    answer = partial(engine.generate, prompts, run.new)
    for connection in ("none", "matrix"):
        engine.connect(connection)
        passes[connection] = run.seconds(lambda: next(answer()), 2 * run.repeats)
    # Each token has a new length: no warm-up, for cuDNN's attention would build a plan for each.
    whole = run.seconds(lambda: list(answer()), 1, warm_up=0)
    return passes["matrix"] - passes["none"], (whole - passes["matrix"]) / (run.new - 1)


def their_decoding(run, ids):
    """Seconds of a step of transformers' generate on the same weights, unconnected."""
    model, ids = theirs(run, torch.bfloat16), ids.to(run.device)
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = None

    def generate(count):
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False)
    first = run.seconds(lambda: generate(1))
    return (run.seconds(lambda: generate(run.new), 2, warm_up=1) - first) / (run.new - 1)


def answers(run):
    """Connected answers to 1 and to 16 prompts, and what the connection costs."""
    found, generator = {}, torch.Generator().manual_seed(2)
    for rows, least in ((1, 1.0), (run.many, 1.5)):
        ids = torch.randint(3, run.config["vocab_size"], (rows, run.prompt), generator=generator)
        connection, decode = our_answers(run, ids)
        found[f"decode {rows}, tokens/s"] = rows / decode
        if rows == 1:
            found["connection / decode step"] = connection / decode
            run.require(run.toy or connection <= 1.1 * decode, "the connection costs over 1.1 decode steps")
        if HAS_TRANSFORMERS:
            found[f"decode {rows}, times generate"] = faster = their_decoding(run, ids) / decode
            run.require(run.toy or faster >= least, f"decoding {rows}: under {least} times generate")
    return found


# ------------------------------------------------------------------------------------------------------- main

CHECKS = {check.__name__: check for check in (golden, default_run, checkpoint, step, answers)}


def check(name, run):
    """Run one check and print its line."""
    run.problems, began = [], time.perf_counter()
    try:
        found = CHECKS[name](run)
        shown = [f"{key} {value:.4g}" for key, value in found.items()]
        what = "; ".join([*run.problems, ", ".join(shown)])
    except Exception as error:
        run.problems.append(name)
        traceback.print_exc()
        what = f"{type(error).__name__} {error}"
    verdict = "FAIL" if run.problems else "PASS"
    print(f"{verdict} {name}: {what} [{time.perf_counter() - began:.0f} s]", flush=True)
    run.peak()  # frees what the check held


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    parser.add_argument("--only", default=",".join(CHECKS), help="checks, in order")
    parser.add_argument("--toy", action="store_true", help="toy sizes on a CPU")
    args = parser.parse_args()
    names, failed = args.only.split(","), []
    with tempfile.TemporaryDirectory() as folder:
        run = Run(args.toy, Path(folder))
        for name in names:
            check(name, run)
            failed += [name] * bool(run.problems)
    print(f"{len(names)} checks, {len(failed)} failed", *failed, sep=", ")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
