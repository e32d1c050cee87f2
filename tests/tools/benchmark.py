"""Time and memory of CC-Tuning here and of transformers, plain or with CC-Tuning by hooks (hookpeer.py).

    pip install transformers==4.46.3    # or newer
    python tests/tools/benchmark.py [--quick]

The reference work: a Llama of 56 M parameters, 8 rows, prompts of 128 tokens in both languages, answers of
64; forward and backward, no optimizer; 2 threads. All sides have the same weights and take turns, so that
the ratios hold when the machine's speed drifts.
"""
import argparse
import ctypes
import gc
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
os.environ["OMP_NUM_THREADS"] = "2"

import torch
import transformers
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from cctuning import Batch, CCTuning, TransformMatrix, gumbel_noise, load_cctuning
from hookpeer import HookedCCTuning
from infer import Engine, Prompt
from model import Config, Help

ROOT = Path(__file__).resolve().parents[2]
SHAPE = {"vocab_size": 32000, "hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8,
         "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 512}
LAYERS, WIDTH = SHAPE["num_hidden_layers"], SHAPE["hidden_size"]
ROWS, PROMPT, ANSWER = 8, 128, 64
MANY, NEW = 16, 32  # prompts and new tokens of the generation


# ------------------------------------------------------------------------------------- the two sides

def write_model(folder):
    """A random checkpoint of the reference shape, with the built-in tokenizer and a connection."""
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SHAPE)).save_pretrained(folder)
    connection = {"decision_maker.weight": 0.05 * torch.randn(LAYERS, WIDTH),
                  "transform_matrix": torch.randn(WIDTH, WIDTH) / WIDTH ** 0.5}
    save_file(connection, Path(folder) / "cctuning.safetensors")
    shutil.copy(ROOT / "data" / "base" / "tokenizer.model", folder)


def theirs(folder, dtype=torch.float32):
    return LlamaForCausalLM.from_pretrained(folder, attn_implementation="sdpa").to(dtype)


def ours(folder):
    with torch.device("meta"):
        cc = CCTuning(Config.read(folder))
    load_cctuning(cc, folder, torch.float32)
    for p in cc.parameters():
        p.sum()  # reads the weights, which are only mapped from the file so far
    return cc


def make_batch():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, SHAPE["vocab_size"], (ROWS, PROMPT + ANSWER), generator=generator)
    english = torch.randint(3, SHAPE["vocab_size"], (ROWS, PROMPT), generator=generator)
    labels = ids.masked_fill(torch.arange(PROMPT + ANSWER) < PROMPT, -100)
    last = torch.full((ROWS,), PROMPT - 1)
    return Batch(ids, labels, last, english, last)


def our_steps(folder):
    """{name: one forward and backward}"""
    cc, batch, noise = ours(folder), make_batch(), gumbel_noise([(0, 0, i) for i in range(ROWS)], LAYERS)

    def step(*args):
        (cc(batch, *args)[0] / (ROWS * ANSWER)).backward()
    return {"ours sft": partial(step, "none"), "ours cc": partial(step, "english", noise)}


def their_steps(folder):
    hf, peer, batch = theirs(folder), HookedCCTuning(theirs(folder)), make_batch()
    noise = gumbel_noise([(0, 0, i) for i in range(ROWS)], LAYERS)

    def plain():
        hf(input_ids=batch.ids, labels=batch.labels, use_cache=False).loss.backward()

    def hooks():
        peer.loss(*batch, noise, False)[0].backward()
    return {"HF plain": plain, "hooks cc": hooks}


def our_answers(folder):
    """{name: one answer} to one prompt, of one token, or of nine: eight decode steps more."""
    engine = Engine(folder, dtype="float32")
    engine.tokenizer.stop = set()  # random weights would end answers early
    prompts = [Prompt(make_batch().english_ids[0].tolist())]

    def answer(connection, new):
        engine.connect(connection)
        engine.answer_all(prompts, 1, new)
    return {"plain": partial(answer, "none", 1), "connected": partial(answer, "matrix", 1),
            "eight more": partial(answer, "matrix", 9)}


def generators(folder, dtype):
    """{name: 32 new tokens} in a batch of 16: ours connected, theirs not."""
    ids = torch.randint(3, SHAPE["vocab_size"], (MANY, PROMPT), generator=torch.Generator().manual_seed(2))
    prompts = [Prompt(row, number=i) for i, row in enumerate(ids.tolist())]
    engine = Engine(folder, "matrix", dtype=dtype)
    engine.tokenizer.stop = set()  # random weights would end answers early
    hf = theirs(folder, getattr(torch, dtype))
    hf.generation_config.eos_token_id = hf.generation_config.pad_token_id = None
    given = {"attention_mask": torch.ones_like(ids), "max_new_tokens": NEW, "do_sample": False}
    return {"ours": lambda: engine.answer_all(prompts, MANY, NEW),
            "HF generate": lambda: hf.generate(ids, **given)}


# ----------------------------------------------------------------------------------------- measuring

def measure(functions, repeats, of=statistics.median):
    """{name: median seconds}, the functions taking turns; the first turn is not counted."""
    times = {name: [] for name in functions}
    for _ in range(repeats + 1):
        for name, function in functions.items():
            gc.collect()
            began = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - began)
    return {name: of(seconds[1:]) for name, seconds in times.items()}


def memory_of_step(folder, name):
    """MiB by which a step raises the peak resident size of a new process that has loaded the model."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(added_memory, (folder, name))


def added_memory(folder, name):
    step = (our_steps if name.startswith("ours") else their_steps)(folder)[name]
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # give freed memory back
    Path("/proc/self/clear_refs").write_text("5")  # count the peak from here
    before = resident("VmRSS")
    step()
    return resident("VmHWM") - before


def resident(what):
    """Resident MiB of this process: VmRSS now, VmHWM at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what)) / 1024


def matrix_fit(folder, prompts):
    """Seconds of a fit over those of its two forward passes."""
    cc, passes = ours(folder), 0.0
    batch, matrix, began = make_batch(), TransformMatrix(), time.perf_counter()
    with torch.no_grad():
        for _ in range(prompts // ROWS):
            start = time.perf_counter()
            own = cc.activations(batch.ids[:, :PROMPT], batch.position)
            english = cc.activations(batch.english_ids, batch.english_position)
            passes += time.perf_counter() - start
            matrix.add(own, english)
        matrix.solve()
    return (time.perf_counter() - began) / passes


# -------------------------------------------------------------------------------------------- report

def row(what, value, at_most=None, at_least=None):
    missed = value > at_most if at_most else value < at_least
    bound = f"<= {at_most}" if at_most else f">= {at_least}"
    print(f"| {what} | {value:.2f} | {bound} | {'missed' if missed else ''} |", flush=True)


def training_rows(folder, repeats):
    times = measure({**their_steps(folder), **our_steps(folder)}, repeats)
    for other, bound in (("HF plain", 0.75), ("hooks cc", 0.75), ("ours sft", 1.25)):
        row(f"step, ours cc / {other}", times["ours cc"] / times[other], at_most=bound)
    memory = {name: memory_of_step(folder, name) for name in ("ours cc", "HF plain")}
    row("memory a step adds, ours cc / HF plain", memory["ours cc"] / memory["HF plain"], at_most=0.70)


def answering_rows(folder, repeats):
    times = measure(our_answers(folder), 10 * repeats, of=min)  # a small difference: medians are too noisy
    connection, step = times["connected"] - times["plain"], (times["eight more"] - times["connected"]) / 8
    row("the connection in decode steps, 128 tokens of one prompt", connection / step, at_most=0.80)
    for dtype in ("float32", "bfloat16"):
        times = measure(generators(folder, dtype), max(1, repeats // 2))
        row(f"generation, {dtype}, ours connected / HF generate: tokens/s",
            times["HF generate"] / times["ours"], at_least=1.25)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    parser.add_argument("--quick", action="store_true", help="fewer repeats: under 3 minutes")
    repeats = 2 if parser.parse_args().quick else 7
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, load {os.getloadavg()}\n")
    print("| what | measured | bound | |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        write_model(folder)
        training_rows(folder, repeats)
        answering_rows(folder, repeats)
        ratio = matrix_fit(folder, 96 if repeats < 3 else 1000)
        row("matrix fit / its two forward passes", ratio, at_most=1.25)


if __name__ == "__main__":
    main()
