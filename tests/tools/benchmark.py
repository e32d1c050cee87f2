"""Time and memory of CC-Tuning here and of transformers, plain or with CC-Tuning by hooks (hookpeer.py).

    pip install transformers==4.46.3    # or newer
    python tests/tools/benchmark.py [--quick]

The reference work: a Llama of 56 M parameters, 8 rows, prompts of 128 tokens in both languages, answers of
64; forward and backward, no optimizer; 2 threads. All sides have the same weights and take turns, so that
the ratios hold when the machine's speed drifts. Exits 1 when a bound is missed by more than 10 %.
"""
import argparse
import ctypes
import gc
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
os.environ["OMP_NUM_THREADS"] = "2"

import torch
from safetensors.torch import save_file

from cctuning import Batch, CCTuning, TransformMatrix, gumbel_noise, load_cctuning
from infer import Engine, Prompt
from model import Config, KVCache, Transformer

ROOT = Path(__file__).resolve().parents[2]
SHAPE = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 32000,
         "hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8, "num_attention_heads": 8,
         "num_key_value_heads": 4, "max_position_embeddings": 512, "rms_norm_eps": 1e-6, "hidden_act": "silu",
         "rope_theta": 10000.0, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2}
ROWS, PROMPT, ANSWER = 8, 128, 64
MANY, NEW = 16, 32  # prompts and new tokens of the generation
LAYERS, WIDTH = SHAPE["num_hidden_layers"], SHAPE["hidden_size"]
# Floating-point operations per token of the matrix products, without attention's own
KV_WORK = 2 * 2 * WIDTH * WIDTH * SHAPE["num_key_value_heads"] // SHAPE["num_attention_heads"]
LAYER_WORK = KV_WORK + 2 * (2 * WIDTH * WIDTH + 3 * WIDTH * SHAPE["intermediate_size"])
HEAD_WORK = 2 * WIDTH * SHAPE["vocab_size"]


# ------------------------------------------------------------------------------------- the two sides

def write_model(folder):
    """A random checkpoint of the reference shape, with the built-in tokenizer and a connection."""
    folder = Path(folder)
    (folder / "config.json").write_text(json.dumps(SHAPE))
    torch.manual_seed(0)
    weights = {}
    for name, p in Transformer(Config.read(folder)).named_parameters():
        weights[name] = torch.ones_like(p) if p.dim() == 1 else 0.05 * torch.randn(p.shape)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    connection = {"decision_maker.weight": 0.05 * torch.randn(LAYERS, WIDTH),
                  "transform_matrix": torch.randn(WIDTH, WIDTH) / WIDTH ** 0.5}
    save_file(connection, folder / "cctuning.safetensors")
    shutil.copy(ROOT / "data" / "base" / "tokenizer.model", folder)


def touched(model):
    """Read every weight once: they may be mapped from the file and not in memory yet."""
    for p in model.parameters():
        p.sum()
    return model


def theirs(folder, dtype=torch.float32):
    import transformers
    name = "dtype" if int(transformers.__version__.split(".")[0]) >= 5 else "torch_dtype"
    options = {name: dtype, "attn_implementation": "sdpa"}
    return touched(transformers.LlamaForCausalLM.from_pretrained(folder, **options))


def ours(folder):
    with torch.device("meta"):
        cc = CCTuning(Config.read(folder))
    load_cctuning(cc, folder, torch.float32)
    return touched(cc)


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
    from hookpeer import HookedCCTuning
    hf, peer, batch = theirs(folder), HookedCCTuning(theirs(folder)), make_batch()
    noise = gumbel_noise([(0, 0, i) for i in range(ROWS)], LAYERS)

    def plain():
        hf(input_ids=batch.ids, labels=batch.labels, use_cache=False).loss.backward()

    def hooks():
        peer.loss(*batch, noise, False)[0].backward()
    return {"HF plain": plain, "hooks cc": hooks}


def our_prefills(folder):
    """{name: passes up to the next token's logits} of one prompt; "decode step": against a cache."""
    cc, ids, lengths = ours(folder), make_batch().english_ids[:1], torch.tensor([PROMPT])
    cache = KVCache(cc.lm.config, 1, PROMPT + 1, torch.float32, "cpu")

    @torch.inference_mode()
    def prefill(connection):
        cc.prefill(ids, lengths, -1, cache, connection)

    @torch.inference_mode()
    def step():
        cache.length = PROMPT + 1
        cc.lm.logits(cc.lm(cc.lm.embed(ids[:, :1]), lengths[:, None], cache).hidden[:, -1])
    return {"prefill, plain": partial(prefill, "none"), "prefill, connected": partial(prefill, "matrix"),
            "decode step": step}


def generators(folder, dtype, peer_prompts):
    """{name: 32 new tokens} in a batch of 16: ours connected, theirs not; of hookpeer prompt by prompt."""
    ids = torch.randint(3, SHAPE["vocab_size"], (MANY, PROMPT), generator=torch.Generator().manual_seed(2))
    prompts = [Prompt(row, number=i) for i, row in enumerate(ids.tolist())]
    engine = Engine(folder, "matrix", dtype=dtype)
    engine.tokenizer.stop = set()  # random weights would end answers early
    hf = theirs(folder, getattr(torch, dtype))
    hf.generation_config.eos_token_id = hf.generation_config.pad_token_id = None
    given = {"attention_mask": torch.ones_like(ids), "max_new_tokens": NEW, "do_sample": False}
    functions = {"ours": lambda: engine.answer_all(prompts, MANY, NEW),
                 "HF generate": lambda: hf.generate(ids, **given)}
    if not peer_prompts:
        return functions
    from hookpeer import HookedCCTuning
    peer, matrix = HookedCCTuning(hf), engine.cc.transform_matrix.weight
    peer.dm.weight.data.copy_(engine.cc.decision_maker.weight)

    def one_by_one():
        for row in ids[:peer_prompts]:  # NEW - 1: it makes one pass more than it returns tokens
            peer.greedy(row[None], torch.tensor([PROMPT - 1]), matrix, torch.zeros(1, LAYERS), NEW - 1)
    return {**functions, "hooks, one by one": one_by_one}


# ----------------------------------------------------------------------------------------- measuring

def alternating(functions, repeats, in_a_row=1):
    """{name: seconds of each repeat}, the functions taking turns; the first turn is not counted."""
    times = {name: [] for name in functions}
    for i in range(repeats + 1):
        for name, function in functions.items():
            gc.collect()
            began = time.perf_counter()
            for _ in range(in_a_row):
                function()
            if i:
                times[name].append((time.perf_counter() - began) / in_a_row)
    return times


def medians(functions, repeats, in_a_row=1):
    times = alternating(functions, repeats, in_a_row)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def memory_of_step(folder, name):
    """MiB by which a step raises the peak resident size of a new process that has loaded the model."""
    command = [sys.executable, __file__, "--memory", name, "--folder", folder]
    return float(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


def print_memory(folder, name):
    step = (our_steps if name.startswith("ours") else their_steps)(folder)[name]
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # give freed memory back
    Path("/proc/self/clear_refs").write_text("5")  # count the peak from here
    before = resident("VmRSS")
    step()
    print(resident("VmHWM") - before)


def resident(what):
    """Resident MiB of this process: VmRSS now, VmHWM at most."""
    # Not getrusage: its peak would count the process that started this one.
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

class Table:
    """The report, printed row by row."""

    def __init__(self):
        import transformers
        self.missed = []
        print(f"torch {torch.__version__}, transformers {transformers.__version__}, CPU capability "
              f"{torch.backends.cpu.get_cpu_capability()}, load average {os.getloadavg()[0]:.1f}\n\n"
              "| what | measured | bound | |\n|---|---|---|---|")

    def row(self, what, value, at_most=None, at_least=None):
        bound, verdict = at_most or at_least, ""
        excess = 0 if bound is None else value / at_most if at_most else at_least / value
        if excess > 1:
            verdict = "MISSED" if excess > 1.1 else "missed by under 10 %"
            self.missed += [what] * (excess > 1.1)
        limit = f"{'<=' if at_most else '>='} {bound}" if bound else ""
        print(f"| {what} | {value:.{4 if value < 0.02 else 2}f} | {limit} | {verdict} |", flush=True)


def products():
    """What the machine gives: {name: (matrix products of the work's shapes, their operations)}"""
    def of(rows, inner, outer, times):
        x, w, out = torch.randn(rows, inner), torch.randn(outer, inner), torch.empty(rows, outer)
        return lambda: [torch.mm(x, w.T, out=out) for _ in range(times)], 2 * rows * inner * outer * times
    return {"FFN": of(ROWS * (PROMPT + ANSWER), WIDTH, SHAPE["intermediate_size"], 50),
            "head": of(ROWS * ANSWER, WIDTH, SHAPE["vocab_size"], 7)}


def training_rows(row, folder, repeats):
    shapes, steps = products(), {**their_steps(folder), **our_steps(folder)}
    times = medians({**{shape: function for shape, (function, _) in shapes.items()}, **steps}, repeats)
    rate = max(work / times[shape] for shape, (_, work) in shapes.items())
    row("matrix products, GFLOP/s", rate / 1e9)
    for name in steps:
        row(f"step, {name}: seconds", times[name])
    own = ROWS * ((PROMPT + ANSWER) * LAYERS * LAYER_WORK + ANSWER * HEAD_WORK) * 3
    english = ROWS * PROMPT * ((LAYERS - 1) * LAYER_WORK + KV_WORK)  # of the last layer, one token
    for name, work in (("ours sft", own), ("ours cc", own + english)):
        row(f"step, {name}: share of the product rate reached", work / times[name] / rate)
    for other, bound in (("HF plain", 0.75), ("hooks cc", 0.75), ("ours sft", 1.25)):
        row(f"step, ours cc / {other}", times["ours cc"] / times[other], at_most=bound)
    memory = {}
    for name in ("HF plain", "ours cc"):
        memory[name] = statistics.median(memory_of_step(folder, name) for _ in range(1 + repeats // 3))
        row(f"memory a step adds, {name}: MiB", memory[name])
    row("memory a step adds, ours cc / HF plain", memory["ours cc"] / memory["HF plain"], at_most=0.70)


def answering_rows(row, folder, repeats):
    times = alternating(our_prefills(folder), 10 * repeats, in_a_row=3)
    for name, found in times.items():
        row(f"128 tokens of one prompt, {name}: milliseconds", 1000 * statistics.median(found))
    extra = statistics.median(connected - plain for connected, plain in
                              zip(times["prefill, connected"], times["prefill, plain"], strict=True))
    ratio, layers = extra / statistics.median(times["decode step"]), LAYERS * LAYER_WORK
    row("(connected - plain prefill) / decode step", ratio, at_most=0.80)
    row("its floor: the layers run again / the step's layers and head", layers / (layers + HEAD_WORK))
    for dtype, peers in (("float32", 2 if repeats < 3 else MANY), ("bfloat16", 0)):
        times = medians(generators(folder, dtype, peers), max(1, repeats // 2))
        speed = {}
        for name, seconds in times.items():
            speed[name] = (peers if "hooks" in name else MANY) * NEW / seconds
            row(f"generation, {dtype}, {name}: tokens/s", speed[name])
        for other, bound in (("HF generate", 1.25), ("hooks, one by one", 6)):
            if other in speed:
                ratio = speed["ours"] / speed[other]
                row(f"generation, {dtype}, ours connected / {other}", ratio, at_least=bound)


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--quick", action="store_true", help="fewer repeats: under 3 minutes")
    add("--memory", help=argparse.SUPPRESS)
    add("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(2)
    if args.memory:
        return print_memory(args.folder, args.memory)
    with tempfile.TemporaryDirectory() as folder:
        write_model(folder)
        table, repeats = Table(), 2 if args.quick else 7
        training_rows(table.row, folder, repeats)
        answering_rows(table.row, folder, repeats)
        ratio = matrix_fit(folder, 96 if args.quick else 1000)
        table.row("matrix fit / its two forward passes", ratio, at_most=1.25)
    if table.missed:
        sys.exit("missed by more than 10 %: " + "; ".join(table.missed))


if __name__ == "__main__":
    main()
