"""What a person with a GPU runs first: is everything right on it, and fast? CI never runs this.

    python tests/gpu.py                      # under 8 minutes on one H100, without a network
    python tests/gpu.py --only golden,step   # some checks; `step` and those after it need `checkpoint` too
    python tests/gpu.py --toy                # toy sizes on a CPU: tries this file, judges no speed

Each check runs in a process of its own with a time limit and prints one line: PASS, SKIP or FAIL, what is
wrong, and its figures. With OUT set, lines and figures are also written to $OUT/gpu.txt and $OUT/gpu.json.
"""
import argparse
import contextlib
import gc
import json
import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from functools import partial
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch.profiler import ProfilerActivity

import train
from cctuning import CCTuning
from infer import Engine, Prompt
from model import Attention, Config, Transformer, attention_mask, choose_device, load_model, rotary_embedding

ROOT = Path(__file__).resolve().parent.parent
LLAMA_1B = {  # Llama 3.2 1B
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 128256, "hidden_size": 2048,
    "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
    "head_dim": 64, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
    "rope_scaling": {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                     "original_max_position_embeddings": 8192},
    "hidden_act": "silu", "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2,
    "torch_dtype": "bfloat16"}
LLAMA_8B = {  # Llama 3.1 8B
    **LLAMA_1B, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "head_dim": 128,
    "tie_word_embeddings": False}
TOY = {"vocab_size": 4096, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
       "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}


class Skipped(Exception):
    """The check cannot run here; the message says why."""


class Run:
    """What a check works with: sizes, a folder that all checks share, and what it found wrong."""

    def __init__(self, toy, folder):
        self.toy, self.folder, self.problems, self.device = toy, folder, [], choose_device()
        # Rows of a step; tokens of a prompt, its answer and its English version; new tokens when answering.
        sizes = (2, 12, 6, 10, 5) if toy else (8, 512, 256, 512, 128)
        self.rows, self.prompt, self.answer, self.english, self.new = sizes
        self.many, self.repeats = (2, 3) if toy else (16, 6)
        self.on_gpu = self.device.type == "cuda"
        if not (self.on_gpu or toy):
            raise Skipped("no GPU; --toy runs on a CPU")

    def require(self, holds, problem):
        """Fail unless `holds`."""
        if not holds:
            self.problems.append(problem)

    def goal(self, holds, problem):
        """As require, of speed and memory: not judged at toy sizes."""
        self.require(holds or self.toy, problem)

    def earlier(self, check, figure, default=float("nan")):
        """A figure of a check that ran before."""
        path = self.folder / "figures.json"
        figures = json.loads(path.read_text()) if path.exists() else {}
        return figures.get(check, {}).get(figure, default)

    def wait(self):
        if self.on_gpu:
            torch.cuda.synchronize()

    def seconds(self, function, repeats=None, warm_up=2):
        """Median time of function()."""
        times = []
        for _ in range(warm_up + (repeats or self.repeats)):
            self.wait()
            began = time.perf_counter()
            function()
            self.wait()
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


# Each check returns {figure: value}.
# ------------------------------------------------------------------------------------ the machine, exactness

def machine(run):
    """The rates that other figures are set against, and the attention kernels of the model's calls."""
    size = 256 if run.toy else 8192
    a, b = (torch.randn(size, size, device=run.device, dtype=torch.bfloat16) for _ in range(2))
    x = torch.empty(2 ** (20 if run.toy else 31), dtype=torch.uint8, device=run.device)
    y = torch.empty_like(x)
    found = {"card": torch.cuda.get_device_name() if run.on_gpu else "CPU", "torch": torch.__version__,
             "bfloat16 products, TFLOP/s": 2e-12 * size ** 3 / run.seconds(lambda: torch.mm(a, b), 10),
             "copies, TB/s": 2e-12 * len(x) / run.seconds(lambda: y.copy_(x), 10)}
    for kind, queries in (("train", None), ("decode", 1), ("connect", 3)):
        kernel, new, seen = attention(run, queries)
        found |= {f"{kind}: kernel": kernel, f"{kind}: ms at a new length": 1e3 * new,
                  f"{kind}: ms at a seen length": 1e3 * seen}
        run.require(not run.on_gpu or kernel in ("flash", "efficient"), f"attention: {kind}")
        run.goal(new < 3 * seen + 1e-3, f"attention at new lengths: {kind}")
    return found


def attention(run, queries):
    """Kernel, and median seconds at a new length and at the same again, of the 1B model's attention.

    queries: that many against a cache, masked; None: causal, forward and backward.
    """
    names, original = ("math", "flash", "efficient", "cudnn"), F.scaled_dot_product_attention
    config, chosen = Config.read(run.folder / "1b"), set()
    layer = Attention(config).to(run.device, torch.bfloat16).requires_grad_(queries is None)

    def recorded(*args, **options):
        chosen.add(names[torch._fused_sdp_choice(*args, **options)])
        return original(*args, **options)

    def call(length):
        x = torch.randn(2, queries or length, config.hidden_size, device=run.device, dtype=torch.bfloat16)
        rotary = rotary_embedding(config, torch.arange(x.shape[1], device=run.device)[None])
        if queries is None:
            k, v = layer.keys_values(x, rotary)
            return run.seconds(lambda: layer(x, rotary, k, v, None).sum().backward(), 1, warm_up=0)
        k, v = torch.randn(2, 2, config.num_key_value_heads, length, config.head_dim).to(x)
        mask = attention_mask(config, torch.full((2, queries), length - 1).to(x.device), length, x.dtype)
        return run.seconds(lambda: layer(x, rotary, k, v, mask), 1, warm_up=0)
    F.scaled_dot_product_attention = recorded
    times = [(call(length), call(length)) for length in range(run.prompt // 2, run.prompt // 2 + 12)]
    F.scaled_dot_product_attention = original
    return "+".join(sorted(chosen)), *map(statistics.median, zip(*times[2:], strict=True))


def golden(run):
    """The golden values of test_golden.py on this device, in float32."""
    import calls
    import test_golden as tests
    calls.DEVICE, count = run.device, 0

    def check(test, folder, *args):
        nonlocal count
        count += 1
        try:
            test(folder, *args)
        except AssertionError as error:
            line = traceback.extract_tb(error.__traceback__)[-1].line
            run.require(False, f"{test.__name__} {folder.name} {args}: {line}")

    for folder, expected in tests.FOLDERS.items():
        tests.FOLDERS[folder] = {name: tensor.to(run.device) for name, tensor in expected.items()}
        if "greedy" in expected:
            check(tests.test_forward, folder)
        if "decision_maker" in expected:
            for english_grad in (False, True):
                check(tests.test_training_step, folder, english_grad)
            for case in ("matrix.full_rank", "matrix.rank_deficient"):
                check(tests.test_transform_matrix, folder, case)
            check(tests.test_inference, folder)
    return {"comparisons": count, "folders": len(tests.FOLDERS)}


# ------------------------------------------------------------------------------------------- runs of train.py

def start(*command, **environment):
    return subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT, env={**os.environ, **environment},
                            text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def finish(*processes):
    """Wait for processes. Returns what they printed; raises an error if one failed."""
    printed = [process.communicate()[0] for process in processes]
    for process, text in zip(processes, printed, strict=True):
        if process.returncode:
            raise RuntimeError(f"{process.args[1:]} ended with {process.returncode}: {text[-600:]}")
    return printed


def logged(folder, key="loss"):
    """A number of each step in a run's log."""
    lines = (folder / "train_log.jsonl").read_text().splitlines()
    return [entry[key] for entry in map(json.loads, lines) if "loss" in entry]


def apart(a, b):
    """Mean relative difference of two runs' losses."""
    return statistics.mean(abs(x / y - 1) for x, y in zip(logged(a), logged(b), strict=True))


def some_data(run, lines):
    """Options of train.py for the first lines of the embedded data."""
    path = run.folder / f"{lines}.jsonl"
    text = (ROOT / "data" / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join(text[:lines]), encoding="utf-8")
    size = 8 if run.toy else 32
    return ["--model", "data/base", "--data", path, "--epochs", 1, "--batch_size", size,
            "--micro_batch", size // 2, "--lr", 1e-4, "--matrix_prompts", 64]


def default_run(run):
    """The default run: alone, by torchrun, and killed and resumed."""
    small = some_data(run, 96) if run.toy else []
    alone, by_torchrun, killed = folders = [run.folder / name for name in ("alone", "by_torchrun", "killed")]
    began = time.perf_counter()
    finish(start("train.py", "--out", alone, *small))
    seconds = time.perf_counter() - began
    other = start("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1", "train.py", "--out",
                  by_torchrun, *small)
    victim = start("train.py", "--out", killed, "--save_every", 4, *small)
    while victim.poll() is None and not list((killed / "checkpoints").glob("step-*[0-9]")):
        time.sleep(0.02)
    victim.kill()
    victim.communicate()
    _, text = finish(other, start("train.py", "--out", killed, "--save_every", 1000, "--resume", *small))
    run.require("resumed after step" in text, "the killed run was not resumed")
    losses, speed = logged(alone), logged(alone, "tokens_per_s")
    differences = apart(by_torchrun, alone), apart(killed, alone)
    run.require(losses[-1] < losses[0], "the loss does not fall")
    run.require(max(differences) < 0.01, "the three runs' losses differ")
    weights = [(folder / "model-00001-of-00001.safetensors").read_bytes() for folder in folders]
    return {"s": seconds, "steps": len(losses), "first loss": losses[0], "last loss": losses[-1],
            "tokens/s": statistics.median(speed), "of the slowest step": min(speed),
            "losses by torchrun differ by": differences[0], "same bits": weights[1] == weights[0],
            "losses killed and resumed differ by": differences[1],
            "same bits, resumed": weights[2] == weights[0]}


SHARDED = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import torch, train

class Several(int):
    "A 1 that train.py takes for more: it shards the weights, over this one process."
    __gt__ = lambda self, other: True
    __eq__ = lambda self, other: False
    __hash__ = int.__hash__

start, init_device_mesh = train.Dist.start, torch.distributed.init_device_mesh

def start_sharded():
    dist = start()
    backend, device = ("nccl", dist.device) if dist.device.type == "cuda" else ("gloo", None)
    torch.distributed.init_process_group(backend, device_id=device)
    dist.world_size = Several(1)
    return dist

train.Dist.start = start_sharded
torch.distributed.init_device_mesh = lambda kind, shape: init_device_mesh(kind, (1,))
train.run_script(train.main)
"""


def sharded(run):
    """The path of several processes on one card (fully_shard, nccl, checkpoints) against that of one."""
    script, data = run.folder / "sharded.py", some_data(run, 96 if run.toy else 640)
    script.write_text(SHARDED)
    names = "one", "low", "shards", "low_shards"
    one, low, shards, low_shards = folders = [run.folder / name for name in names]

    def begin(folder, *more):
        launch = (script, ROOT, "--save_every", 1000) if "shards" in folder.name else ("train.py",)
        dtype = "bfloat16" if "low" in folder.name else "float32"
        return start(*launch, *data, *more, "--dtype", dtype, "--out", folder, MASTER_ADDR="127.0.0.1",
                     MASTER_PORT=str(29570 + folders.index(folder)), RANK="0", WORLD_SIZE="1")
    finish(*map(begin, folders))
    for file in [*low_shards.glob("model*"), low_shards / "config.json"]:
        file.unlink()  # as if it had died before saving
    (text,) = finish(begin(low_shards, "--resume"))
    run.require("resumed after step" in text and list(low_shards.glob("model*")), "not resumed when sharded")
    exact, like, rounding = apart(shards, one), apart(low_shards, low), apart(low, one)
    run.require(exact < 1e-4, "float32 losses differ")
    run.require(max(like, rounding) < (0.05 if run.toy else 0.02), "bfloat16 losses differ")
    return {"steps": len(logged(one)), "float32 losses differ by": exact, "bfloat16 losses differ by": like,
            "bfloat16 from float32": rounding}


# ------------------------------------------------------------ training a checkpoint of Llama 3.2 1B's shape

def checkpoint(run):
    """Random weights of Llama 3.2 1B's shape, with the embedded tokenizer, a Decision Maker and a matrix."""
    folder, config = run.folder / "1b", Config.read(run.folder / "1b")
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in Transformer(config).named_parameters()}
    torch.manual_seed(0)
    tensors = {name: torch.ones(shape, dtype=torch.bfloat16) if len(shape) == 1
               else (0.02 * torch.randn(shape, device=run.device)).bfloat16().cpu()
               for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    save_file({"decision_maker.weight": 0.02 * torch.randn(config.num_hidden_layers, config.hidden_size),
               "transform_matrix": torch.eye(config.hidden_size)}, folder / "cctuning.safetensors")
    shutil.copy(ROOT / "data" / "base" / "tokenizer.model", folder)
    seconds = run.seconds(lambda: load_model(folder, None, run.device), 1, warm_up=0)
    return {"GB": (folder / "model.safetensors").stat().st_size / 1e9, "loaded in, s": seconds}


def training_setup(run, *options):
    """What train.py makes of its command line, with samples of the same length in place of the data.

    The last steps have new lengths: each is one token shorter in every part.
    """
    os.chdir(ROOT)
    (run.folder / "out").mkdir(exist_ok=True)
    setup = train.Setup(train.parse_args([
        "--model", str(run.folder / "1b"), "--data", "data/dev.jsonl", "--out", str(run.folder / "out"),
        "--batch_size", str(run.rows), "--micro_batch", str(run.rows), "--dtype", "bfloat16",
        "--max_length", str(run.prompt + run.answer), *options]), train.Dist(0, 1, run.device))
    generator, setup.samples = torch.Generator().manual_seed(0), []
    for i in range(run.repeats):
        lengths = run.prompt + run.answer - 2 * i, run.english - i
        for _ in range(run.rows):
            ids, english = (torch.randint(3, setup.config.vocab_size, (length,), generator=generator)
                            for length in lengths)
            setup.samples.append(train.Sample(ids.tolist(), run.prompt - i, english.tolist(), "sw", False))
    numbers = torch.arange(len(setup.samples)).view(-1, run.rows).tolist()
    setup.steps = [(0, rows) for rows in [numbers[0]] * (2 + run.repeats) + numbers[1:]]
    return setup


def work(run, english, all_logits=False):
    """Floating-point operations of a training step's products, those of causal attention included."""
    c = Config.read(run.folder / "1b")
    width, layers, queries = c.hidden_size, c.num_hidden_layers, c.num_attention_heads * c.head_dim
    kv = 2 * 2 * width * c.num_key_value_heads * c.head_dim  # of keys and values, per token
    layer = kv + 2 * (2 * width * queries + 3 * width * c.intermediate_size)
    tokens = run.prompt + run.answer
    own = tokens * layers * (layer + 2 * queries * tokens)
    own += (tokens if all_logits else run.answer) * 2 * width * c.vocab_size
    once = run.english * ((layers - 1) * (layer + 2 * queries * run.english) + kv)  # forward only
    return run.rows * (3 * own + (once if english else 0))


def new_adamw(parameters):
    return torch.optim.AdamW(parameters, lr=1e-5, betas=train.BETAS, weight_decay=0.0, fused=True)


def measure_step(run, name, *options):
    """Figures of train_step on the 1B shape."""
    setup = training_setup(run, *options)
    cc, _ = train.load_for_training(setup)
    parameters = {name: p for name, p in cc.named_parameters() if p.requires_grad}
    optimizer, steps, seen = new_adamw(parameters.values()), iter(range(len(setup.steps))), []

    def once():
        seen.append(train.train_step(setup, cc, optimizer, next(steps)))
    run.peak()
    seconds = run.seconds(once)
    peak, new = run.peak(), run.seconds(once, run.repeats - 2, warm_up=1)
    connected = setup.args.method == "cc"
    tokens = run.rows * (run.prompt + run.answer + connected * run.english)
    rate = 1e12 * run.earlier("machine", "bfloat16 products, TFLOP/s")
    none = torch.zeros(())
    still = [key for key, p in parameters.items() if not optimizer.state[p].get("exp_avg", none).any()]
    run.require(not still, f"{name}: {len(still)} parameters without a gradient, {still[:1]}")
    run.require(all(map(math.isfinite, sum(seen, ()))), f"{name}: not finite {seen[0]}")
    run.goal(new < 1.5 * seconds, f"{name}: slow at new lengths")
    found = {"ms": 1e3 * seconds, "ms at new lengths": 1e3 * new, "tokens/s": tokens / seconds,
             "of the product rate": work(run, connected) / seconds / rate, "peak, GB": peak,
            "first loss": seen[0][0]}
    optimizer = None
    if run.on_gpu and not setup.args.checkpoint_activations:
        share = peak / (planned(run, setup) + kept_for_backward(setup, cc))
        found["peak / plan and activations"] = share
        run.goal(share <= 1.05, f"{name}: more memory than planned")
    return {f"{name}: {key}": value for key, value in found.items()}


def planned(run, setup):
    """GB of --memory_plan, without the dtype's copy of the weights; logits: one float32 gradient of them."""
    setup.args.memory_plan = 1
    kinds = ("parameters", "gradients, ", "AdamW")
    weights = sum(size for what, size in train.memory_plan(setup.args).items() if what.startswith(kinds))
    return (weights + 4 * run.rows * run.answer * setup.config.vocab_size) / 1e9


def kept_for_backward(setup, cc):
    """GB that a forward pass keeps: activations, logits and the weights in bfloat16."""
    batch = train.collate([setup.samples[i] for i in setup.steps[0][1]], -1, setup.dist.device)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    with setup.autocast():
        loss, _ = cc(batch, train.CONNECTION[setup.args.method])
    kept = torch.cuda.memory_allocated() - before
    del loss
    return kept / 1e9


def step(run):
    """Training steps of train.py in bfloat16, plain and connected: speed, and memory against the plan."""
    found = {**measure_step(run, "sft", "--method", "sft"), **measure_step(run, "cc"),
             **measure_step(run, "cc checkpointed", "--checkpoint_activations")}
    ratio, floor = found["cc: ms"] / found["sft: ms"], work(run, True) / work(run, False)
    run.goal(ratio <= 1.05 * floor, "cc / sft is far above its arithmetic floor")
    return {**found, "cc / sft": ratio, "floor": floor}


def theirs(run, dtype):
    """transformers' model of the 1B checkpoint, and its version. As in ours, cuDNN's attention is off."""
    try:
        import transformers
    except ImportError as error:
        raise Skipped(f"transformers is not installed ({error})") from None
    name = "dtype" if int(transformers.__version__.split(".")[0]) >= 5 else "torch_dtype"
    model = transformers.AutoModelForCausalLM.from_pretrained(run.folder / "1b", **{name: dtype})
    return model.to(run.device), {"transformers": transformers.__version__}


def their_step(run):
    """transformers' plain step: the same weights, batch, autocast and optimizer."""
    (model, found), setup = theirs(run, torch.float32), training_setup(run, "--method", "sft")
    batch = train.collate(setup.samples[:run.rows], -1, run.device)
    optimizer, seen = new_adamw(model.train().parameters()), []

    def once():
        with setup.autocast():
            loss = model(input_ids=batch.ids, labels=batch.labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), train.MAX_NORM).item()
        seen.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    run.peak()
    seconds, peak = run.seconds(once), run.peak()
    ratios = {f"our {name} / theirs": run.earlier("step", f"{name}: ms") / 1e3 / seconds
              for name in ("sft", "cc")}
    run.goal(not ratios["our cc / theirs"] > 0.9, "our cc step is slower than 0.9 of theirs")
    run.require(not abs(seen[0] / run.earlier("step", "sft: first loss") - 1) > 0.01, "its loss is another")
    rate = 1e12 * run.earlier("machine", "bfloat16 products, TFLOP/s")
    return {**found, "ms": 1e3 * seconds, "tokens/s": run.rows * (run.prompt + run.answer) / seconds,
            "of the product rate": work(run, False, all_logits=True) / seconds / rate, "peak, GB": peak,
            "first loss": seen[0], **ratios}


# -------------------------------------------------------------------------------------------------- answering

def random_prompts(run, rows):
    """Random ids (rows, T), and as Prompts."""
    size, generator = Config.read(run.folder / "1b").vocab_size, torch.Generator().manual_seed(2)
    ids = torch.randint(3, size, (rows, run.prompt), generator=generator)
    return ids, [Prompt(row, number=i) for i, row in enumerate(ids.tolist())]


def open_engine(run):
    engine = Engine(run.folder / "1b")
    engine.tokenizer.stop = set()  # random weights would end answers early
    return engine


def measure_answers(run, engine):
    """Prefill in ms and decoding in tokens/s of 1 and of 16 prompts."""
    found = {}
    for rows in (1, run.many):
        passes, answer = {}, partial(engine.generate, random_prompts(run, rows)[1], run.new)
        for connection in ("none", "matrix"):
            engine.connect(connection)
            passes[connection] = run.seconds(lambda answer=answer: next(answer()), 2 * run.repeats)
            found[f"prefill {rows} {connection}, ms"] = 1e3 * passes[connection]
        whole = [run.seconds(lambda answer=answer: list(answer()), repeats, warm_up=0) for repeats in (1, 2)]
        new, seen = ((seconds - passes["matrix"]) / (run.new - 1) for seconds in whole)  # new: of new lengths
        found |= {f"decode {rows}, tokens/s": rows / seen, f"{rows} at new lengths": rows / new}
        run.goal(new < 1.4 * seen, f"decoding {rows} is slow at new lengths")
        if rows == 1:
            found["connection / decode step"] = (passes["matrix"] - passes["none"]) / seen
    return {**found, "peak, GB": run.peak()}


def answers(run):
    """Connected prefill and decoding of the 1B shape in bfloat16, by infer.py's Engine."""
    found = measure_answers(run, open_engine(run))
    run.goal(found["connection / decode step"] <= 1.1, "the connection costs more than 1.1 decode steps")
    return found


def their_answers(run):
    """transformers' generate on the same weights, unconnected."""
    model, found = theirs(run, torch.bfloat16)
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = None
    for rows, least in ((1, 1.0), (run.many, 1.5)):
        ids = random_prompts(run, rows)[0].to(run.device)

        def generate(count, ids=ids):
            model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count,
                           min_new_tokens=count, do_sample=False)
        first = run.seconds(lambda: generate(1))
        speed = rows * (run.new - 1) / (run.seconds(lambda: generate(run.new), 2, warm_up=1) - first)
        prefill = run.earlier("answers", f"prefill {rows} matrix, ms") / 1e3
        faster = run.earlier("answers", f"decode {rows}, tokens/s") / speed
        run.goal(not faster < least, f"decoding {rows}: goal {least} times as fast")
        found |= {f"prefill {rows}, ms": 1e3 * first, f"ours, connected / theirs, {rows}": prefill / first,
                  f"decode {rows}, tokens/s": speed, f"ours / theirs, {rows}": faster}
    return found


def profile(run):
    """Where the time of a decoding step goes: the GPU's kernels against the clock."""
    steps = 3 if run.toy else 16
    tokens = open_engine(run).generate(random_prompts(run, 1)[1], 3 * steps + 2)
    list(islice(tokens, steps))
    clock = run.seconds(lambda: list(islice(tokens, steps)), 1, warm_up=0) / steps
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * run.on_gpu
    with torch.profiler.profile(activities=kinds) as trace:
        list(islice(tokens, steps))
        run.wait()
    events = trace.key_averages()
    kernels = {e.key: e.self_device_time_total / steps / 1e3 for e in events if "CUDA" in str(e.device_type)}
    found = {"a token, ms": 1e3 * clock, "kernels, ms": sum(kernels.values())}
    for what in ("LaunchKernel", "Synchronize"):
        found[what] = sum(e.count for e in events if what in e.key) / steps
    longest = sorted(kernels, key=lambda key: -kernels[key])[:6]
    return {**found, **{f"{key[:60]}, ms": kernels[key] for key in longest}}


def answers_8b(run):
    """Decoding with random weights of Llama 3.1 8B's shape, against the measured bandwidth."""
    if run.on_gpu and torch.cuda.mem_get_info()[0] < 30e9:
        raise Skipped("less than 30 GB of memory are free")
    engine = open_engine(run)
    engine.config = Config.read(run.folder / "8b")
    with torch.device("meta"):
        engine.cc = cc = CCTuning(engine.config)
    cc.lm.to(torch.bfloat16)
    cc.to_empty(device=run.device)
    with torch.no_grad():
        for p in cc.parameters():
            p.fill_(1.0) if p.dim() == 1 else p.normal_(0, 0.02)
    cc.transform_matrix.weight, cc.trained = torch.eye(engine.config.hidden_size, device=run.device), True
    found = measure_answers(run, engine)
    read = sum(p.nbytes for name, p in cc.lm.named_parameters() if "embed" not in name)
    bandwidth = 1e12 * run.earlier("machine", "copies, TB/s")
    return {**found, "of the copy rate, 1 row": read * found["decode 1, tokens/s"] / bandwidth}


# ------------------------------------------------------------------------------------------------------- main

CHECKS = {  # in this order: what, and seconds allowed
    "machine": (machine, 60), "golden": (golden, 60), "default_run": (default_run, 120),
    "sharded": (sharded, 90), "checkpoint": (checkpoint, 60), "step": (step, 100),
    "their_step": (their_step, 60), "answers": (answers, 60), "their_answers": (their_answers, 80),
    "profile": (profile, 45), "answers_8b": (answers_8b, 70)}


def show(value):
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def check(name, toy, folder):
    """Run one check in this process, print its line and keep its figures. Returns True if it failed."""
    torch.set_num_threads(1 if toy else torch.get_num_threads())
    try:
        run = Run(toy, folder)
        found = CHECKS[name][0](run)
        figures = folder / "figures.json"
        earlier = json.loads(figures.read_text()) if figures.exists() else {}
        figures.write_text(json.dumps({**earlier, name: found}, indent=1))
        what = "; ".join([*run.problems, ", ".join(f"{key} {show(value)}" for key, value in found.items())])
        verdict = "FAIL" if run.problems else "PASS"
    except Skipped as reason:
        verdict, what = "SKIP", str(reason)
    except Exception as error:
        places = " ".join(f"{Path(frame.filename).name}:{frame.lineno}"
                          for frame in traceback.extract_tb(error.__traceback__)[-4:])
        verdict, what = "FAIL", f"{type(error).__name__} {' '.join(str(error).split())[:600]}, at {places}"
    print(f"{verdict} {name}: {what}", flush=True)
    return verdict == "FAIL"


def supervise(name, limit, toy, folder):
    """Run a check in a process of its own for at most `limit` seconds. Returns its line."""
    command = [sys.executable, __file__, "--check", name, "--folder", folder, *["--toy"] * toy]
    began = time.perf_counter()
    with open(folder / f"{name}.stderr", "w+") as stderr:
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True,
                                 start_new_session=True)
        try:
            printed = child.communicate(timeout=limit)[0].splitlines()
            stderr.seek(0)
            line = next((line for line in printed if line.startswith(("PASS", "SKIP", "FAIL"))),
                        f"FAIL {name}: ended with {child.returncode}: {stderr.read()[-400:]!r}")
        except subprocess.TimeoutExpired:
            line = f"FAIL {name}: not done in {limit:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)  # with what the check started
    return f"{line} [{time.perf_counter() - began:.0f} s]"


def main():
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    add = parser.add_argument
    add("--only", type=lambda text: text.split(","), default=list(CHECKS), help=", ".join(CHECKS))
    add("--toy", action="store_true", help="toy sizes on a CPU")
    add("--budget", type=float, default=470, metavar="SECONDS", help="skip what does not fit in")
    add("--check", help=argparse.SUPPRESS)
    add("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.check:
        sys.exit(check(args.check, args.toy, args.folder))
    began, lines, out = time.perf_counter(), [], os.environ.get("OUT")
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for name, shape in (("1b", LLAMA_1B), ("8b", LLAMA_8B)):
            (folder / name).mkdir()
            (folder / name / "config.json").write_text(json.dumps({**shape, **(TOY if args.toy else {})}))
        for name in args.only:
            left = 3600 if args.toy else args.budget - (time.perf_counter() - began)
            limit = min(left, CHECKS[name][1] * (10 if args.toy else 1))
            line = supervise(name, limit, args.toy, folder) if left > 15 else f"SKIP {name}: no time left"
            lines.append(line)
            print(line, flush=True)
            if out:
                (Path(out) / "gpu.txt").write_text("\n".join(lines) + "\n")
                if (folder / "figures.json").exists():
                    shutil.copy(folder / "figures.json", Path(out) / "gpu.json")
    failed = [line.split(":")[0] for line in lines if line.startswith("FAIL")]
    seconds = time.perf_counter() - began
    print(f"{len(lines)} checks, {len(failed)} failed, {seconds:.0f} s", *failed, sep=", ")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
