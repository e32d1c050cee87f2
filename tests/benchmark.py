"""CC-Tuning here against what a user would otherwise run: Hugging Face transformers, plain and with CC-Tuning by hooks
(hookpeer.py).

    pip install transformers==4.46.3
    python tests/benchmark.py [--quick] [--data TRAINING_FILE --tokenizer FOLDER] [--checkpoint FOLDER]

Both sides have the same weights and alternate within one run, so that the ratios hold when the machine's speed drifts.
The reference work: a Llama of 56 M parameters, 8 rows, prompts of 128 tokens in both languages, answers of 64; forward
and backward, no optimizer; 2 threads. --data and --tokenizer measure padding on real samples; --checkpoint (a real one,
in bfloat16) measures loading. Exits 1 when a bound is missed by more than 10 %.
"""
import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", "2")

import torch

from cctuning import Batch, CCTuning, MatrixSums, gumbel_noise
from infer import Engine, Prompt, pack
from model import load_model, new_cache

ROOT = Path(__file__).resolve().parents[1]
SHAPE = {"vocab_size": 32000, "hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 8,
         "num_attention_heads": 8, "num_key_value_heads": 4}
ROWS, PROMPT, ANSWER, NEW = 8, 128, 64, 32
LAYERS, WIDTH = SHAPE["num_hidden_layers"], SHAPE["hidden_size"]


# ------------------------------------------------------------------------------------------------------ the two sides

def write_model(folder):
    """A random Llama of the reference shape, as transformers saves it."""
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SHAPE, max_position_embeddings=512, initializer_range=0.05)).save_pretrained(folder)


def touched(model):
    """Read every weight once: they may be mapped from the file and not in memory yet."""
    for p in model.parameters():
        p.sum()
    return model


def theirs(folder, dtype=torch.float32):
    from transformers import LlamaForCausalLM
    return touched(LlamaForCausalLM.from_pretrained(folder, torch_dtype=dtype, attn_implementation="sdpa"))


def ours(folder, dtype=torch.float32):
    cc = touched(CCTuning(load_model(folder, dtype)))
    cc.matrices["shared"] = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(1)) / WIDTH ** 0.5
    return cc


def make_batch():
    rng = torch.Generator().manual_seed(0)
    ids, english = (torch.randint(3, SHAPE["vocab_size"], (ROWS, n), generator=rng) for n in (PROMPT + ANSWER, PROMPT))
    labels = ids.masked_fill(torch.arange(PROMPT + ANSWER) < PROMPT, -100)
    last = torch.full((ROWS,), PROMPT - 1)
    return Batch(ids, labels, last, english, last)


def step_functions(folder, names):
    """{name: one forward and backward}, of the names wanted."""
    batch, noise = make_batch(), gumbel_noise(0, 0, range(ROWS), LAYERS)
    count = (batch.labels != -100).sum()
    functions = {}
    if "ours sft" in names or "ours cc" in names:
        cc = ours(folder)
        functions["ours sft"] = lambda: (cc(batch, "none") / count).backward()
        functions["ours cc"] = lambda: (cc(batch, noise=noise) / count).backward()
        functions["ours cc, English gradients"] = lambda: (cc(batch, noise=noise, english_grad=True) / count).backward()
    if "HF plain" in names:
        hf = theirs(folder)
        functions["HF plain"] = lambda: hf(input_ids=batch.ids, labels=batch.labels, use_cache=False).loss.backward()
    if "hooks cc" in names:
        from hookpeer import HookedCCTuning
        peer = HookedCCTuning(theirs(folder))
        for name, grad in (("hooks cc", False), ("hooks cc, English gradients", True)):
            functions[name] = lambda grad=grad: peer.loss(batch.ids, batch.labels, batch.position, batch.english_ids,
                                                          batch.english_position, noise, grad)[0].backward()
    return {name: functions[name] for name in names}


# ---------------------------------------------------------------------------------------------------------- measuring

def interleaved(functions, repeats, in_a_row=1, warm_up=1):
    """{name: median seconds}, the functions taking turns after a warm-up, short ones several times in a row."""
    times = {name: [] for name in functions}
    for i in range(repeats + warm_up):
        for name, function in functions.items():
            gc.collect()
            began = time.perf_counter()
            for _ in range(in_a_row):
                function()
            if i >= warm_up:
                times[name].append((time.perf_counter() - began) / in_a_row)
    return {name: statistics.median(t) for name, t in times.items()}


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
    """Floating-point operations of a training step's matrix products, logits at the answer only, without attention's
    own."""
    # Per token: keys and values, and a whole layer.
    kv = 2 * 2 * WIDTH * WIDTH * SHAPE["num_key_value_heads"] // SHAPE["num_attention_heads"]
    layer = kv + 2 * (2 * WIDTH * WIDTH + 3 * WIDTH * SHAPE["intermediate_size"])
    own = ROWS * ((PROMPT + ANSWER) * LAYERS * layer + ANSWER * 2 * WIDTH * SHAPE["vocab_size"]) * 3
    english = ROWS * PROMPT * ((LAYERS - 1) * layer + kv)  # of the last layer, one token
    return own + {"sft": 0, "cc": english, "cc, English gradients": 3 * english}[kind]


def memory_of_step(folder, name):
    """MiB by which one step raises the peak resident size of a process of its own that has loaded the model."""
    code = (f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r}); import benchmark as b, torch\n"
            f"torch.set_num_threads(2); f = b.step_functions({str(folder)!r}, [{name!r}])[{name!r}]\n"
            "b.settle(); before = b.resident(); f(); print(b.resident('VmHWM') - before)")
    return float(subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True).stdout)


def resident(what="VmRSS"):
    """Resident MiB of this process: now, or with "VmHWM" the most since settle()."""
    # From here, for getrusage's peak would count the process that started this one.
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what)) / 1024


def settle():
    """Give freed memory back, so that what is measured next is what is added."""
    import ctypes
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here


def generation(folder, dtype, repeats, peer_prompts):
    """Seconds of 32 new tokens after 128-token prompts: ours connected and theirs unconnected in a batch of 16,
    hookpeer prompt by prompt."""
    from hookpeer import HookedCCTuning
    rows = 16
    ids = torch.randint(3, SHAPE["vocab_size"], (rows, PROMPT), generator=torch.Generator().manual_seed(2))
    cc, hf = ours(folder, dtype), theirs(folder, dtype)
    pack(cc.lm)
    engine = Engine.__new__(Engine)  # without a folder and a tokenizer
    engine.cc, engine.config, engine.matrix, engine.connection = cc, cc.lm.config, "shared", "matrix"
    engine.tokenizer = SimpleNamespace(connection_index=-1, stop=set())
    prompts = [Prompt(row.tolist(), number=i) for i, row in enumerate(ids)]
    functions = {
        "ours": lambda: engine.answer_all(prompts, rows, NEW),
        "HF generate": lambda: hf.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW,
                                           do_sample=False, eos_token_id=None),
    }
    if peer_prompts:
        peer = HookedCCTuning(hf)
        peer.dm.weight.data.copy_(cc.decision_maker.weight)
        last = torch.tensor([PROMPT - 1])

        @torch.inference_mode()
        def one_by_one():
            for row in ids[:peer_prompts]:  # NEW - 1, for it makes one pass more than it returns tokens
                peer.greedy(row[None], last, cc.matrices["shared"], torch.zeros(1, LAYERS), NEW - 1)
        functions["hooks, one by one"] = one_by_one
    return interleaved(functions, repeats, warm_up=repeats > 1)


def prefill(folder, repeats):
    """Seconds to read one 128-token prompt, up to the next token's logits."""
    ids, lengths = make_batch().english_ids[:1], torch.tensor([PROMPT])
    cc, hf = ours(folder), theirs(folder)

    @torch.inference_mode()
    def one(connection):
        cache = new_cache(cc.lm.config, 1, PROMPT + NEW, torch.float32, "cpu")
        cc.prefill(ids, lengths, -1, cache, connection, ["shared"])
    return interleaved({
        "ours": lambda: one("none"), "ours connected": lambda: one("matrix"),
        "HF": torch.inference_mode()(lambda: hf(input_ids=ids, use_cache=True, num_logits_to_keep=1)),
    }, repeats, in_a_row=5)


def matrix_fit(folder, repeats, pairs):
    """Seconds of a whole fit over those of its two forward passes."""
    cc = ours(folder)
    own, english = torch.randint(3, SHAPE["vocab_size"], (2, ROWS, PROMPT), generator=torch.Generator().manual_seed(3))
    last = torch.full((ROWS,), PROMPT - 1)

    @torch.no_grad()
    def fit():
        began, passes, sums = time.perf_counter(), 0.0, MatrixSums(["shared"], WIDTH)
        for _ in range(pairs // ROWS):
            start = time.perf_counter()
            activations = cc.activations(own, last), cc.activations(english, last)
            passes += time.perf_counter() - start
            sums.add(*activations, ["shared"] * ROWS)
        sums.solve()
        return (time.perf_counter() - began) / passes
    fit()
    return statistics.median(fit() for _ in range(repeats))


def loading(folder):
    """Of a process of its own: seconds of load_model over those of reading its file, and growth of the resident size
    over the file's size."""
    code = f"""
import sys
sys.path.insert(0, {str(ROOT / 'tests')!r})
import benchmark as b
from pathlib import Path
files = list(Path({str(folder)!r}).glob('*.safetensors'))
size = sum(f.stat().st_size for f in files)
def read():
    return [f.read_bytes() for f in files]
def load():
    return b.touched(b.load_model({str(folder)!r}))
times = b.interleaved({{'read': read, 'load': load}}, 5)
b.settle()
before = b.resident()
model = load()
print(times['load'] / times['read'], (b.resident() - before) * 2 ** 20 / size)
"""
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True)
    return [float(x) for x in done.stdout.split()]


def padding(data, tokenizer_folder):
    """Share of the computed tokens that are padding, in both passes, over an epoch of steps of 16 in micro-batches of
    8."""
    import train
    from model import Tokenizer
    with tempfile.TemporaryDirectory() as folder:  # the tokenizer may come without a config.json
        for file in Path(tokenizer_folder).iterdir():
            (Path(folder) / file.name).symlink_to(file.resolve())
        if not (Path(folder) / "config.json").exists():
            (Path(folder) / "config.json").write_text("{}")
        config = SimpleNamespace(vocab_size=10 ** 6, cctuning={}, eos_token_ids=(), bos_token_id=None)
        tokenizer = Tokenizer(folder, config)
    samples, _ = train.read_samples(data, tokenizer, 1024)
    real = sum(len(s.ids) + len(s.english_ids) for s in samples)
    computed = 0
    for step in train.plan(samples, 16, 0, 0):
        for i in range(0, len(step), 8):
            batch = train.collate([samples[j] for j in step[i:i + 8]], -1)
            computed += batch.ids.numel() + batch.english_ids.numel()
    return 1 - real / computed


def bfloat16_training(folder, repeats):
    """Seconds of the reference step in float32 and bfloat16; and the relative difference of the two losses over two
    epochs of train.py's default run on data/, 100 steps and some: the mean of its absolute value, and its largest
    (single steps of few rows are noisy)."""
    batch, count = make_batch(), ROWS * ANSWER

    def step(cc, low):
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            loss = cc(batch, noise=gumbel_noise(0, 0, range(ROWS), LAYERS)) / count
        loss.backward()
    functions = {"float32": partial(step, ours(folder), False), "bfloat16": partial(step, ours(folder), True)}
    seconds, curves = interleaved(functions, repeats), []
    for name in functions:
        with tempfile.TemporaryDirectory() as out:
            options = ["--out", out, "--dtype", name, "--epochs", "2", "--matrix_prompts", "1"]
            subprocess.run([sys.executable, ROOT / "train.py", *options], stdout=subprocess.DEVNULL, check=True)
            log = [json.loads(line) for line in (Path(out) / "train_log.jsonl").read_text().splitlines()]
            curves.append([entry["loss"] for entry in log if "loss" in entry])
    differences = [abs(b / a - 1) for a, b in zip(*curves, strict=True)]
    return seconds, statistics.mean(differences), max(differences)


# ------------------------------------------------------------------------------------------------------------- report

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer repeats, long rows only once: under 3 minutes")
    parser.add_argument("--data", help="training samples, for the share of padding")
    parser.add_argument("--tokenizer", help="folder of the tokenizer to measure padding with")
    parser.add_argument("--checkpoint", help="a real checkpoint, for loading")
    parser.add_argument("--bfloat16_training", action="store_true", help="also compare training in both dtypes over "
                        "100 steps (minutes; needs a CPU with bfloat16 instructions to be of use)")
    args = parser.parse_args()
    torch.set_num_threads(2)
    repeats, missed = (2 if args.quick else 7), []

    def row(what, value, bound=None, at_least=False):
        far = bound is not None and (value < bound / 1.1 if at_least else value > bound * 1.1)
        near = bound is not None and (value < bound if at_least else value > bound)
        limit = f"{'>=' if at_least else '<='} {bound}" if bound else ""
        verdict = "MISSED" if far else "missed by under 10 %" if near else ""
        print(f"| {what} | {value:.{4 if value < 0.02 else 2}f} | {limit} | {verdict} |", flush=True)
        missed.extend([what] * far)

    with tempfile.TemporaryDirectory() as folder:
        write_model(folder)
        print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, "
              f"CPU capability {torch.backends.cpu.get_cpu_capability()}\n\n"
              "| what | measured | bound | |\n|---|---|---|---|")
        names = ["HF plain", "hooks cc", "hooks cc, English gradients",
                 "ours sft", "ours cc", "ours cc, English gradients"]
        shapes = products()
        runs = {shape: run for shape, (run, _) in shapes.items()}
        step = interleaved({**runs, **step_functions(folder, names)}, repeats)
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
        memory = {name: statistics.median(memory_of_step(folder, name) for _ in range(1 if args.quick else 3))
                  for name in ("HF plain", "ours cc")}
        for name, value in memory.items():
            row(f"memory a step adds, {name}: MiB", value)
        row("memory a step adds, ours cc / HF plain", memory["ours cc"] / memory["HF plain"], 0.70)
        times = prefill(folder, 3 * repeats)
        for name, value in times.items():
            row(f"prefill of 128 tokens, {name}: milliseconds", 1000 * value)
        row("prefill, ours connected / ours", times["ours connected"] / times["ours"], 1.15)
        row("prefill, ours connected / HF", times["ours connected"] / times["HF"], 1.0)
        for dtype, peers in ((torch.float32, 2 if args.quick else 16), (torch.bfloat16, 0)):
            kind = str(dtype).removeprefix("torch.")
            tokens = {"ours": 16 * NEW, "HF generate": 16 * NEW, "hooks, one by one": peers * NEW}
            times = generation(folder, dtype, max(1, repeats // 2), peers)
            speed = {name: tokens[name] / seconds for name, seconds in times.items()}
            for name, value in speed.items():
                row(f"generation, {kind}, {name}: tokens/s", value)
            ratio = speed["ours"] / speed["HF generate"]
            row(f"generation, {kind}, ours connected / HF generate", ratio, 1.25, at_least=True)
            if peers:
                ratio = speed["ours"] / speed["hooks, one by one"]
                row(f"generation, {kind}, ours / hooks one by one", ratio, 6, at_least=True)
        ratio = matrix_fit(folder, max(1, repeats // 2), 100 if args.quick else 1000)
        row("matrix fit / its two forward passes", ratio, 1.25)
        if args.checkpoint:
            ratio, growth = loading(args.checkpoint)
            row("load_model / reading the file once", ratio, 1.5)
            row("resident growth by loading / size of the weights", growth, 1.2)
        if args.data and args.tokenizer:
            row("padding, share of the tokens computed", padding(args.data, args.tokenizer), 0.15)
        if args.bfloat16_training:
            seconds, mean, largest = bfloat16_training(folder, repeats)
            row("training step, float32 / bfloat16", seconds["float32"] / seconds["bfloat16"], 1.4, at_least=True)
            row("relative difference of the loss over 100 steps, mean", mean, 0.01)
            row("the same, largest of any step", largest)
    if missed:
        sys.exit("missed by more than 10 %: " + "; ".join(missed))


if __name__ == "__main__":
    main()
