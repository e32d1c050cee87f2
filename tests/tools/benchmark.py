"""CC-Tuning here against what a user would otherwise run: Hugging Face transformers, plain and with CC-Tuning
by hooks (hookpeer.py).

    pip install transformers==4.46.3    # or newer
    python tests/benchmark.py [--quick] [--data TRAINING_FILE --tokenizer FOLDER] [--checkpoint FOLDER]

Both sides have the same weights and alternate within one run, so that the ratios hold when the machine's
speed drifts. The reference work: a Llama of 56 M parameters, 8 rows, prompts of 128 tokens in both languages,
answers of 64; forward and backward, no optimizer; 2 threads. --data and --tokenizer measure padding on real
samples; --checkpoint (a real one, in bfloat16) measures loading. Exits 1 when a bound is missed by more than
10 %.
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
from dataclasses import replace
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", "2")

import torch
from safetensors.torch import save_file

from cctuning import Batch, CCTuning, TransformMatrix, gumbel_noise, load_cctuning
from infer import Engine, Prompt
from model import Config, KVCache, Tokenizer

ROOT = Path(__file__).resolve().parents[1]
SHAPE = {"vocab_size": 32000, "hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8,
         "num_attention_heads": 8, "num_key_value_heads": 4}
ROWS, PROMPT, ANSWER, NEW = 8, 128, 64, 32
LAYERS, WIDTH = SHAPE["num_hidden_layers"], SHAPE["hidden_size"]
KV_WORK = 2 * 2 * WIDTH * WIDTH * SHAPE["num_key_value_heads"] // SHAPE["num_attention_heads"]
LAYER_WORK = KV_WORK + 2 * (2 * WIDTH * WIDTH + 3 * WIDTH * SHAPE["intermediate_size"])  # per token, of
HEAD_WORK = 2 * WIDTH * SHAPE["vocab_size"]                       # products other than attention's own


# -------------------------------------------------------------------------------------------- the two sides

def write_model(folder):
    """A random Llama of the reference shape, as transformers saves it, with the embedded tokenizer and a
    connection."""
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPE, max_position_embeddings=512, initializer_range=0.05)
    LlamaForCausalLM(config).save_pretrained(folder)
    connection = {"decision_maker.weight": 0.05 * torch.randn(LAYERS, WIDTH),
                  "transform_matrix": torch.randn(WIDTH, WIDTH) / WIDTH ** 0.5}
    save_file(connection, Path(folder) / "cctuning.safetensors")
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
    rng = torch.Generator().manual_seed(0)
    ids, english = (torch.randint(3, SHAPE["vocab_size"], (ROWS, n), generator=rng)
                    for n in (PROMPT + ANSWER, PROMPT))
    labels = ids.masked_fill(torch.arange(PROMPT + ANSWER) < PROMPT, -100)
    last = torch.full((ROWS,), PROMPT - 1)
    return Batch(ids, labels, last, english, last)


def make_noise():
    return gumbel_noise([(0, 0, i) for i in range(ROWS)], LAYERS)


def step_functions(folder, names):
    """{name: one forward and backward}, of the names wanted."""
    batch, noise, functions = make_batch(), make_noise(), {}
    count = ROWS * ANSWER
    if any("ours" in name for name in names):
        cc = ours(folder)
        functions["ours sft"] = lambda: (cc(batch, "none")[0] / count).backward()
        for name, grad in (("ours cc", False), ("ours cc, English gradients", True)):
            functions[name] = lambda grad=grad: (cc(batch, noise=noise, english_grad=grad)[0] / count).backward()
    if "HF plain" in names:
        hf, given = theirs(folder), {"input_ids": batch.ids, "labels": batch.labels, "use_cache": False}
        functions["HF plain"] = lambda: hf(**given).loss.backward()
    if "hooks cc" in names:
        from hookpeer import HookedCCTuning
        peer = HookedCCTuning(theirs(folder))
        for name, grad in (("hooks cc", False), ("hooks cc, English gradients", True)):
            functions[name] = lambda grad=grad: peer.loss(
                batch.ids, batch.labels, batch.position, batch.english_ids, batch.english_position, noise,
                grad)[0].backward()
    return {name: functions[name] for name in names}


# ------------------------------------------------------------------------------------------------ measuring

def interleaved(functions, repeats, in_a_row=1, warm_up=1):
    """{name: seconds of each repeat}, the functions taking turns, short ones several times in a row."""
    times = {name: [] for name in functions}
    for i in range(repeats + warm_up):
        for name, function in functions.items():
            gc.collect()
            began = time.perf_counter()
            for _ in range(in_a_row):
                function()
            if i >= warm_up:
                times[name].append((time.perf_counter() - began) / in_a_row)
    return times


def medians(*args, **options):
    """{name: median seconds}; as interleaved."""
    return {name: statistics.median(seconds) for name, seconds in interleaved(*args, **options).items()}


def products():
    """What the machine gives while the steps run.

    {name: (the reference work's matrix products of one shape, their floating-point operations)}
    """
    def of(rows, inner, outer, times):
        x, w, out = torch.randn(rows, inner), torch.randn(outer, inner), torch.empty(rows, outer)
        return lambda: [torch.mm(x, w.T, out=out) for _ in range(times)], 2 * rows * inner * outer * times
    tokens = ROWS * (PROMPT + ANSWER)
    return {"FFN": of(tokens, WIDTH, SHAPE["intermediate_size"], 50),
            "head": of(ROWS * ANSWER, WIDTH, SHAPE["vocab_size"], 7)}


def work_of_step(kind):
    """Floating-point operations of a training step's products, logits at the answer only."""
    own = ROWS * ((PROMPT + ANSWER) * LAYERS * LAYER_WORK + ANSWER * HEAD_WORK) * 3
    english = ROWS * PROMPT * ((LAYERS - 1) * LAYER_WORK + KV_WORK)  # of the last layer, one token
    return own + {"sft": 0, "cc": english, "cc, English gradients": 3 * english}[kind]


def in_new_process(code, *args):
    """The numbers that code prints, in which this file is the module b, and args are sys.argv[1:]."""
    code = f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r})\nimport benchmark as b\n{code}"
    done = subprocess.run([sys.executable, "-c", code, *map(str, args)], stdout=subprocess.PIPE, text=True,
                          check=True)
    return [float(x) for x in done.stdout.split()]


def memory_of_step(folder, name):
    """MiB by which one step raises the peak resident size of a process of its own, the model loaded."""
    return in_new_process("""
b.torch.set_num_threads(2)
step = b.step_functions(sys.argv[1], sys.argv[2:])[sys.argv[2]]
b.settle()
before = b.resident()
step()
print(b.resident("VmHWM") - before)""", folder, name)[0]


def resident(what="VmRSS"):
    """Resident MiB of this process: now, or with "VmHWM" the most since settle()."""
    # From here, for getrusage's peak would count the process that started this one.
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what)) / 1024


def settle():
    """Give freed memory back, so that what is measured next is what is added."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here


def generation(folder, dtype, repeats, peer_prompts):
    """Seconds of 32 new tokens after 128-token prompts: ours connected and theirs unconnected in a batch of
    16, hookpeer prompt by prompt."""
    rows = 16
    ids = torch.randint(3, SHAPE["vocab_size"], (rows, PROMPT), generator=torch.Generator().manual_seed(2))
    engine, hf = Engine(folder, "matrix", dtype=dtype), theirs(folder, getattr(torch, dtype))
    engine.tokenizer.stop = set()  # random weights would end answers early
    hf.generation_config.eos_token_id = hf.generation_config.pad_token_id = None
    prompts = [Prompt(row.tolist(), number=i) for i, row in enumerate(ids)]
    functions = {
        "ours": lambda: engine.answer_all(prompts, rows, NEW),
        "HF generate": lambda: hf.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW,
                                           do_sample=False),
    }
    if peer_prompts:
        from hookpeer import HookedCCTuning
        peer, matrix = HookedCCTuning(hf), engine.cc.transform_matrix.weight
        peer.dm.weight.data.copy_(engine.cc.decision_maker.weight)
        last = torch.tensor([PROMPT - 1])

        @torch.inference_mode()
        def one_by_one():
            for row in ids[:peer_prompts]:  # NEW - 1, for it makes one pass more than it returns tokens
                peer.greedy(row[None], last, matrix, torch.zeros(1, LAYERS), NEW - 1)
        functions["hooks, one by one"] = one_by_one
    return medians(functions, repeats, warm_up=repeats > 1)


def prefill(folder, repeats):
    """Of one 128-token prompt: {"plain", "connected", "step": median seconds}, and the connection's in steps.

    The first two end with the next token's logits, and so does a decoding step against a cache of that
    length. The connection's is the median of paired differences.
    """
    cc, ids, lengths = ours(folder), make_batch().english_ids[:1], torch.tensor([PROMPT])
    cache = KVCache(cc.lm.config, 1, PROMPT + 1, torch.float32, "cpu")

    def step():
        cache.length = PROMPT + 1
        cc.lm.logits(cc.lm(cc.lm.embed(ids[:, :1]), lengths[:, None], cache).hidden[:, -1])
    times = {"plain": partial(cc.prefill, ids, lengths, -1, cache, "none"),
             "connected": partial(cc.prefill, ids, lengths, -1, cache, "matrix"), "step": step}
    with torch.inference_mode():
        times = interleaved(times, repeats, in_a_row=3)
    extra = statistics.median(c - p for c, p in zip(times["connected"], times["plain"], strict=True))
    seconds = {name: statistics.median(found) for name, found in times.items()}
    return seconds, extra / seconds["step"]


def matrix_fit(folder, repeats, pairs):
    """Seconds of a whole fit over those of its two forward passes."""
    cc, generator = ours(folder), torch.Generator().manual_seed(3)
    own, english = torch.randint(3, SHAPE["vocab_size"], (2, ROWS, PROMPT), generator=generator)
    last = torch.full((ROWS,), PROMPT - 1)

    @torch.no_grad()
    def fit():
        began, passes, matrix = time.perf_counter(), 0.0, TransformMatrix()
        for _ in range(pairs // ROWS):
            start = time.perf_counter()
            activations = cc.activations(own, last), cc.activations(english, last)
            passes += time.perf_counter() - start
            matrix.add(*activations)
        matrix.solve()
        return (time.perf_counter() - began) / passes
    fit()
    return statistics.median(fit() for _ in range(repeats))


def loading(folder):
    """Of a process of its own: seconds of load_model over those of reading its file, and growth of the
    resident size over the file's size."""
    return in_new_process("""
from model import load_model
files = list(b.Path(sys.argv[1]).glob("*.safetensors"))
size = sum(file.stat().st_size for file in files)
load = lambda: b.touched(load_model(sys.argv[1]))
times = b.medians({"read": lambda: [file.read_bytes() for file in files], "load": load}, 5)
b.settle()
before = b.resident()
model = load()
print(times["load"] / times["read"], (b.resident() - before) * 2 ** 20 / size)""", folder)


def padding(data, tokenizer_folder, config):
    """Share of the computed tokens that are padding, in both passes, over an epoch of steps of 16 in
    micro-batches of 8. The tokenizer may come without a config.json."""
    import train
    tokenizer = Tokenizer(tokenizer_folder, replace(config, vocab_size=10 ** 6))
    samples = train.read_samples(data, tokenizer, 1024, lambda text: None)
    real = sum(len(s.ids) + len(s.english_ids) for s in samples)
    computed = 0
    for step in train.make_batches(samples, 16, 0, 0):
        for i in range(0, len(step), 8):
            batch = train.collate([samples[j] for j in step[i:i + 8]], -1)
            computed += batch.ids.numel() + batch.english_ids.numel()
    return 1 - real / computed


def bfloat16_training(folder, repeats):
    """Seconds of the reference step in float32 and bfloat16; and the relative difference of the two losses
    over the steps of train.py's default run: the mean of its absolute value, and its largest (single steps of
    few rows are noisy)."""
    batch, count, noise = make_batch(), ROWS * ANSWER, make_noise()

    def step(cc, low):
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            loss = cc(batch, noise=noise)[0] / count
        loss.backward()
    functions = {name: partial(step, ours(folder), name == "bfloat16") for name in ("float32", "bfloat16")}
    seconds, curves = medians(functions, repeats), []
    for name in functions:
        with tempfile.TemporaryDirectory() as out:
            options = ["--out", out, "--dtype", name, "--matrix_prompts", "1"]
            command = [sys.executable, ROOT / "train.py", *options]
            subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
            log = (Path(out) / "train_log.jsonl").read_text().splitlines()
            curves.append([entry["loss"] for entry in map(json.loads, log) if "loss" in entry])
    differences = [abs(b / a - 1) for a, b in zip(*curves, strict=True)]
    return seconds, statistics.mean(differences), max(differences)


# --------------------------------------------------------------------------------------------------- report

class Table:
    """The report, printed row by row."""

    def __init__(self):
        import transformers
        self.missed = []
        print(f"torch {torch.__version__}, transformers {transformers.__version__}, {torch.get_num_threads()} "
              f"threads, CPU capability {torch.backends.cpu.get_cpu_capability()}, load average "
              f"{os.getloadavg()[0]:.1f}\n\n| what | measured | bound | |\n|---|---|---|---|")

    def row(self, what, value, bound=None, at_least=False):
        def misses(bound):
            return value < bound if at_least else value > bound
        verdict = ""
        if bound is not None and misses(bound):
            is_far = misses(bound / 1.1 if at_least else bound * 1.1)
            verdict = "MISSED" if is_far else "missed by under 10 %"
            self.missed += [what] * is_far
        limit = f"{'>=' if at_least else '<='} {bound}" if bound else ""
        print(f"| {what} | {value:.{4 if value < 0.02 else 2}f} | {limit} | {verdict} |", flush=True)


def training_rows(row, folder, repeats):
    names = ["HF plain", "hooks cc", "hooks cc, English gradients",
             "ours sft", "ours cc", "ours cc, English gradients"]
    shapes = products()
    runs = {shape: run for shape, (run, _) in shapes.items()}
    step = medians({**runs, **step_functions(folder, names)}, repeats)
    rate = max(work / step[shape] for shape, (_, work) in shapes.items())
    row("matrix products, GFLOP/s", rate / 1e9)
    for name in names:
        row(f"step, {name}: seconds", step[name])
    for name in names[3:]:
        reached = work_of_step(name.removeprefix("ours ")) / step[name] / rate
        row(f"step, {name}: share of the product rate reached", reached)
    row("step, ours cc / HF plain", step["ours cc"] / step["HF plain"], 0.75)
    row("step, ours cc / hooks cc", step["ours cc"] / step["hooks cc"], 0.75)
    row("step, ours cc / ours sft", step["ours cc"] / step["ours sft"], 1.25)
    memory = {name: statistics.median(memory_of_step(folder, name) for _ in range(1 + repeats // 3))
              for name in ("HF plain", "ours cc")}
    for name, value in memory.items():
        row(f"memory a step adds, {name}: MiB", value)
    row("memory a step adds, ours cc / HF plain", memory["ours cc"] / memory["HF plain"], 0.70)


def answering_rows(row, folder, repeats):
    times, ratio = prefill(folder, 10 * repeats)
    for name, value in times.items():
        row(f"128 tokens of one prompt, {name}: milliseconds", 1000 * value)
    row("(connected - plain prefill) / decode step", ratio, 0.80)
    layers = LAYERS * LAYER_WORK
    row("its floor: the layers run again / the step's layers and head", layers / (layers + HEAD_WORK))
    for dtype, peers in (("float32", 2 if repeats < 3 else 16), ("bfloat16", 0)):
        tokens = {"ours": 16 * NEW, "HF generate": 16 * NEW, "hooks, one by one": peers * NEW}
        times = generation(folder, dtype, max(1, repeats // 2), peers)
        speed = {name: tokens[name] / seconds for name, seconds in times.items()}
        for name, value in speed.items():
            row(f"generation, {dtype}, {name}: tokens/s", value)
        ratio = speed["ours"] / speed["HF generate"]
        row(f"generation, {dtype}, ours connected / HF generate", ratio, 1.25, at_least=True)
        if peers:
            ratio = speed["ours"] / speed["hooks, one by one"]
            row(f"generation, {dtype}, ours / hooks one by one", ratio, 6, at_least=True)


def main():
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    add = parser.add_argument
    add("--quick", action="store_true", help="fewer repeats, long rows only once: under 3 minutes")
    add("--data", help="training samples, for the share of padding")
    add("--tokenizer", help="folder of the tokenizer to measure padding with")
    add("--checkpoint", help="a real checkpoint, for loading")
    add("--bfloat16_training", action="store_true", help="also compare training in both dtypes over 100 steps "
        "(minutes; needs a CPU with bfloat16 instructions to be of use)")
    args = parser.parse_args()
    torch.set_num_threads(2)
    table, repeats = Table(), 2 if args.quick else 7
    row = table.row
    with tempfile.TemporaryDirectory() as folder:
        write_model(folder)
        training_rows(row, folder, repeats)
        answering_rows(row, folder, repeats)
        ratio = matrix_fit(folder, max(1, repeats // 2), 100 if args.quick else 1000)
        row("matrix fit / its two forward passes", ratio, 1.25)
        if args.checkpoint:
            ratio, growth = loading(args.checkpoint)
            row("load_model / reading the file once", ratio, 1.5)
            row("resident growth by loading / size of the weights", growth, 1.2)
        if args.data and args.tokenizer:
            share = padding(args.data, args.tokenizer, Config.read(folder))
            row("padding, share of the tokens computed", share, 0.15)
        if args.bfloat16_training:
            seconds, mean, largest = bfloat16_training(folder, repeats)
            faster = seconds["float32"] / seconds["bfloat16"]
            row("training step, float32 / bfloat16", faster, 1.4, at_least=True)
            row("relative difference of the loss over 100 steps, mean", mean, 0.01)
            row("the same, largest of any step", largest)
    if table.missed:
        sys.exit("missed by more than 10 %: " + "; ".join(table.missed))


if __name__ == "__main__":
    main()
