"""What a person with a GPU runs first: is everything right on it, and fast? CI never runs this.

    python tests/tools/gpu.py                      # under 8 minutes on one H100, without a network
    python tests/tools/gpu.py --only golden,step   # some checks; those from `step` on need `checkpoint` too
    python tests/tools/gpu.py --toy                # toy sizes on a CPU: tries this file, judges no speed

Each check prints one line: PASS, SKIP or FAIL, what is wrong, and its figures.
"""
import argparse
import contextlib
import gc
import json
import math
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

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import train
from cctuning import CCTuning, load_cctuning
from infer import Engine, Prompt
from model import Attention, Config, Transformer, attention_mask, choose_device, load_model, rotary_embedding

ROOT, ENVIRONMENT = Path(__file__).resolve().parents[2], dict(os.environ)
LLAMA_1B = {  # Llama 3.2 1B
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 128256, "hidden_size": 2048,
    "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
    "head_dim": 64, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
    "hidden_act": "silu", "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2}
TOY = {"vocab_size": 4096, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
       "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}


class Skipped(Exception):
    """The check cannot run here; the message says why."""


class Run:
    """What a check works with: sizes, a folder and the figures that all share, what it found wrong."""

    def __init__(self, toy, folder):
        self.toy, self.folder, self.figures, self.problems = toy, folder, {}, []
        self.device = choose_device()
        self.on_gpu = self.device.type == "cuda"
        # Rows of a step; tokens of a prompt, its answer and its English version; new tokens when answering.
        sizes = (2, 12, 6, 10, 5) if toy else (8, 512, 256, 512, 128)
        self.rows, self.prompt, self.answer, self.english, self.new = sizes
        self.many, self.repeats = (2, 3) if toy else (16, 6)  # prompts answered at once
        if not (self.on_gpu or toy):
            sys.exit("no GPU; --toy runs on a CPU")

    def require(self, holds, problem):
        """Fail unless `holds`."""
        if not holds:
            self.problems.append(problem)

    def goal(self, holds, problem):
        """As require, of speed and memory: not judged at toy sizes."""
        self.require(holds or self.toy, problem)

    def earlier(self, check, figure):
        """A figure of a check that ran before."""
        return self.figures.get(check, {}).get(figure, float("nan"))

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


# --------------------------------------------------- the machine, exactness: checks return {figure: value}

def machine(run):
    """The rates that other figures are set against, and the attention kernels of the model's calls."""
    size = 256 if run.toy else 8192
    a, b = (torch.randn(size, size, device=run.device, dtype=torch.bfloat16) for _ in range(2))
    rate = 2e-12 * size ** 3 / run.seconds(lambda: torch.mm(a, b))
    found = {"card": torch.cuda.get_device_name() if run.on_gpu else "CPU", "torch": torch.__version__,
             "bfloat16 products, TFLOP/s": rate}
    for kind, queries in (("train", None), ("decode", 1), ("connect", 3)):
        found[f"{kind}: kernel"] = kernel = attention_kernel(run, queries)
        run.require(not run.on_gpu or kernel in ("flash", "efficient"), f"attention: {kind}")
    return found


def attention_kernel(run, queries):
    """The kernel of the 1B model's attention. queries: that many, masked; None: causal, with gradients."""
    config, chosen, original = Config.read(run.folder / "1b"), set(), F.scaled_dot_product_attention
    layer = Attention(config).to(run.device, torch.bfloat16).requires_grad_(queries is None)
    count = queries or run.prompt
    x = torch.randn(2, count, config.hidden_size, device=run.device, dtype=torch.bfloat16)
    positions = torch.full((2, count), run.prompt - 1, device=run.device)
    rotary = rotary_embedding(config, positions).to(x.dtype)

    def recorded(*args, **options):
        chosen.add(("math", "flash", "efficient", "cudnn")[torch._fused_sdp_choice(*args, **options)])
        return original(*args, **options)
    F.scaled_dot_product_attention = recorded
    if queries is None:
        layer(x, rotary)
    else:
        cached = torch.randn(2, 2, config.num_key_value_heads, run.prompt, config.head_dim).to(x)
        mask = attention_mask(config, positions, run.prompt, x.dtype)
        layer(x, rotary, mask, lambda k, v: cached)
    F.scaled_dot_product_attention = original
    return "+".join(sorted(chosen))


def golden(run):
    """The golden values of test_golden.py on this device, in float32."""
    import calls
    import test_golden as tests
    calls.DEVICE, count = run.device, 0
    for folder, expected in tests.FOLDERS.items():
        tests.FOLDERS[folder] = {name: tensor.to(run.device) for name, tensor in expected.items()}
        cases = [(tests.test_forward,)] if "greedy" in expected else []
        if "decision_maker" in expected:
            cases += [(tests.test_training_step, False), (tests.test_training_step, True),
                      (tests.test_inference,), (tests.test_transform_matrix, "matrix.full_rank"),
                      (tests.test_transform_matrix, "matrix.rank_deficient")]
        for test, *args in cases:
            count += 1
            try:
                test(folder, *args)
            except AssertionError as error:
                line = traceback.extract_tb(error.__traceback__)[-1].line
                run.require(False, f"{test.__name__} {folder.name} {args}: {line}")
    return {"comparisons": count, "folders": len(tests.FOLDERS)}


# ------------------------------------------------------------------------------------------- runs of train.py

def python(*command):
    """Run a command. Returns what it printed; raises an error if it failed."""
    done = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, env=ENVIRONMENT, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        raise RuntimeError(f"{command} ended with {done.returncode}: {done.stdout[-600:]}")
    return done.stdout


def logged(folder):
    """The loss of each step in a run's log."""
    entries = map(json.loads, (folder / "train_log.jsonl").read_text().splitlines())
    return [entry["loss"] for entry in entries if "loss" in entry]


def apart(a, b):
    """Mean relative difference of two lists of losses."""
    return statistics.mean(abs(x / y - 1) for x, y in zip(a, b, strict=True))


def default_run(run):
    """The default run: alone, by torchrun, and killed and resumed. --toy: a step or two of it."""
    small = ("--model data/base --data data/dev.jsonl --epochs 1 --batch_size 96 --micro_batch 32 --lr 1e-4 "
             "--max_length 64 --matrix_prompts 64").split() if run.toy else []
    alone, by_torchrun, killed = folders = [run.folder / name for name in ("alone", "torchrun", "killed")]
    python("train.py", "--out", alone, *small)
    python("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1", "train.py", "--out",
           by_torchrun, *small)
    command = [sys.executable, "train.py", "--out", killed, "--save_every", 1 if run.toy else 4, *small]
    victim = subprocess.Popen(list(map(str, command)), cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    while victim.poll() is None and not list((killed / "checkpoints").glob("step-*[0-9]")):
        time.sleep(0.02)
    victim.kill()
    victim.wait()
    text = python("train.py", "--out", killed, "--resume", *small)
    run.require("resumed after step" in text, "the killed run was not resumed")
    losses, *others = [logged(folder) for folder in folders]
    run.require(losses[-1] < losses[0], "the loss does not fall")
    run.require(max(apart(other, losses) for other in others) < 0.01, "the three runs' losses differ")
    weights = [(folder / "model-00001-of-00001.safetensors").read_bytes() for folder in folders]
    return {"steps": len(losses), "first loss": losses[0], "last loss": losses[-1],
            "by torchrun: losses differ by": apart(others[0], losses), "same bits": weights[1] == weights[0],
            "resumed: losses differ by": apart(others[1], losses), "same bits too": weights[2] == weights[0]}


def sharded(run):
    """What several processes run (fully_shard, nccl, checkpoints), over one, against the plain path."""
    steps, found = range(4 if run.toy else 16), {}
    meeting = f"file://{run.folder}/meeting"
    backend = "nccl" if run.on_gpu else "gloo"
    torch.distributed.init_process_group(backend, rank=0, world_size=1, init_method=meeting)
    for dtype, bound in (("float32", 1e-4), ("bfloat16", 0.05 if run.toy else 0.02)):
        setup = training_setup(run, "data/base", "--dtype", dtype, "--batch_size", "8" if run.toy else "32")
        cc, _ = train.load_for_training(setup)
        optimizer = new_adamw(cc.parameters())
        losses = [train.train_step(setup, cc, optimizer, step)[0] for step in steps]

        setup.autocast = contextlib.nullcontext  # sharded weights are gathered in the dtype
        cc, optimizer = sharded_model(run, setup, dtype)
        found[f"{dtype} losses differ by"] = difference = apart(
            [train.train_step(setup, cc, optimizer, step)[0] for step in steps[:-2]], losses[:-2])
        train.save_state(setup, cc, optimizer, len(steps) - 2)
        cc, optimizer = sharded_model(run, setup, dtype)
        train.load_state(setup, cc, optimizer, len(steps) - 2)
        resumed = apart([train.train_step(setup, cc, optimizer, step)[0] for step in steps[-2:]], losses[-2:])
        run.require(max(difference, resumed) < bound, f"{dtype} losses differ, after resuming by {resumed}")
    torch.distributed.destroy_process_group()
    return found


def sharded_model(run, setup, dtype):
    with torch.device("meta"):
        cc = CCTuning(setup.config)
    train.shard(cc, setup.dist, dtype)
    load_cctuning(cc, setup.args.model, torch.float32, run.device)
    return cc, new_adamw(cc.parameters())


def training_setup(run, model, *options):
    """What train.py makes of its command line."""
    os.chdir(ROOT)
    (run.folder / "out").mkdir(exist_ok=True)
    args = train.parse_args(["--model", str(model), "--data", "data/dev.jsonl", "--template", "plain",
                             "--out", str(run.folder / "out"), *options])
    with contextlib.redirect_stdout(sys.stderr):  # what it says about the data is of no interest
        return train.Setup(args, train.Dist())


def new_adamw(parameters):
    trainable = [p for p in parameters if p.requires_grad]
    return torch.optim.AdamW(trainable, lr=1e-5, betas=train.BETAS, weight_decay=0.0, fused=True)


# ------------------------------------------------------------ training a checkpoint of Llama 3.2 1B's shape

def checkpoint(run):
    """Random weights of Llama 3.2 1B's shape, with the built-in tokenizer, a Decision Maker and a matrix."""
    folder, config = run.folder / "1b", Config.read(run.folder / "1b")
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


def setup_1b(run, *options):
    """The same of the 1B shape, with samples of one length in place of the data."""
    rows, length = str(run.rows), str(run.prompt + run.answer)
    setup = training_setup(run, run.folder / "1b", "--batch_size", rows, "--micro_batch", rows,
                           "--dtype", "bfloat16", "--max_length", length, *options)
    generator, setup.samples = torch.Generator().manual_seed(0), []
    for _ in range(run.rows):
        ids, english = (torch.randint(3, setup.config.vocab_size, (length,), generator=generator).tolist()
                        for length in (run.prompt + run.answer, run.english))
        setup.samples.append(train.Sample(ids, run.prompt, english, False))
    setup.steps = [(0, list(range(run.rows)))] * (2 + run.repeats)
    return setup


def measure_step(run, name, *options):
    """Figures of train_step on the 1B shape."""
    setup = setup_1b(run, *options)
    cc, _ = train.load_for_training(setup)
    parameters = {name: p for name, p in cc.named_parameters() if p.requires_grad}
    optimizer, steps, seen = new_adamw(cc.parameters()), iter(range(len(setup.steps))), []

    def once():
        seen.append(train.train_step(setup, cc, optimizer, next(steps)))
    run.peak()
    seconds, peak = run.seconds(once), run.peak()
    still = [key for key, p in parameters.items() if not optimizer.state[p]["exp_avg"].any()]
    run.require(not still, f"{name}: {len(still)} parameters without a gradient, {still[:1]}")
    run.require(all(map(math.isfinite, sum(seen, ()))), f"{name}: not finite {seen[0]}")
    setup.args.memory_plan = 1
    plan = list(train.memory_plan(setup.args).values())[-1] / 1e9
    tokens = run.rows * (run.prompt + run.answer + (setup.args.method == "cc") * run.english)
    found = {"ms": 1e3 * seconds, "tokens/s": tokens / seconds, "peak, GB": peak, "planned, GB": plan,
             "first loss": seen[0][0]}
    return {f"{name}: {key}": value for key, value in found.items()}


def step(run):
    """Training steps of train.py in bfloat16, plain and connected: speed, and memory."""
    found = {**measure_step(run, "sft", "--method", "sft"), **measure_step(run, "cc"),
             **measure_step(run, "cc checkpointed", "--checkpoint_activations")}
    found["cc / sft"] = found["cc: ms"] / found["sft: ms"]
    run.goal(found["cc / sft"] <= 1.25, "cc / sft is far above its arithmetic floor, 1.19")
    return found


def theirs(run, dtype):
    """transformers' model of the 1B checkpoint. As in ours, cuDNN's attention is off."""
    try:
        import transformers
    except ImportError as error:
        raise Skipped(f"transformers is not installed ({error})") from None
    name = "dtype" if int(transformers.__version__.split(".")[0]) >= 5 else "torch_dtype"
    model = transformers.AutoModelForCausalLM.from_pretrained(run.folder / "1b", **{name: dtype})
    return model.to(run.device)


def their_step(run):
    """transformers' plain step: the same weights, batch, autocast and optimizer."""
    model, setup = theirs(run, torch.float32), setup_1b(run, "--method", "sft")
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
    sft, cc = (run.earlier("step", f"{name}: ms") / 1e3 / seconds for name in ("sft", "cc"))
    run.goal(not cc > 0.9, "our cc step is slower than 0.9 of theirs")
    run.require(not abs(seen[0] / run.earlier("step", "sft: first loss") - 1) > 0.01, "its loss is another")
    return {"ms": 1e3 * seconds, "peak, GB": peak, "our sft / theirs": sft, "our cc / theirs": cc}


# -------------------------------------------------------------------------------------------------- answering

def random_prompts(run, rows):
    """Random ids (rows, T), and as Prompts."""
    size, generator = Config.read(run.folder / "1b").vocab_size, torch.Generator().manual_seed(2)
    ids = torch.randint(3, size, (rows, run.prompt), generator=generator)
    return ids, [Prompt(row, number=i) for i, row in enumerate(ids.tolist())]


def answers(run):
    """Connected prefill in ms and decoding in tokens/s of 1 and of 16 prompts, in bfloat16."""
    engine, found = Engine(run.folder / "1b"), {}
    engine.tokenizer.stop = set()  # random weights would end answers early
    for rows in (1, run.many):
        passes, answer = {}, partial(engine.generate, random_prompts(run, rows)[1], run.new)
        for connection in ("none", "matrix"):
            engine.connect(connection)
            passes[connection] = run.seconds(lambda answer=answer: next(answer()), 2 * run.repeats)
            found[f"prefill {rows} {connection}, ms"] = 1e3 * passes[connection]
        # Every token has a new length: the first time, cuDNN's attention would build a plan for each.
        whole = [run.seconds(lambda answer=answer: list(answer()), repeats, warm_up=0) for repeats in (1, 2)]
        new, seen = ((seconds - passes["matrix"]) / (run.new - 1) for seconds in whole)
        found[f"decode {rows}, tokens/s"] = rows / seen
        run.goal(new < 1.4 * seen, f"decoding {rows} is slow at new lengths")
        if rows == 1:
            found["connection / decode step"] = (passes["matrix"] - passes["none"]) / seen
    run.goal(found["connection / decode step"] <= 1.1, "the connection costs more than 1.1 decode steps")
    return {**found, "peak, GB": run.peak()}


def their_answers(run):
    """transformers' generate on the same weights, unconnected."""
    model, found = theirs(run, torch.bfloat16), {}
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = None
    for rows, least in ((1, 1.0), (run.many, 1.5)):
        ids = random_prompts(run, rows)[0].to(run.device)

        def generate(count, ids=ids):
            model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count,
                           min_new_tokens=count, do_sample=False)
        first = run.seconds(lambda: generate(1))
        speed = rows * (run.new - 1) / (run.seconds(lambda: generate(run.new), 2, warm_up=1) - first)
        faster = run.earlier("answers", f"decode {rows}, tokens/s") / speed
        run.goal(not faster < least, f"decoding {rows}: goal {least} times as fast")
        found |= {f"prefill {rows}, ms": 1e3 * first, f"decode {rows}, tokens/s": speed,
                  f"ours / theirs, {rows}": faster}
    return found


# ------------------------------------------------------------------------------------------------------- main

CHECKS = {check.__name__: check for check in (
    machine, golden, default_run, sharded, checkpoint, step, their_step, answers, their_answers)}


def check(name, run):
    """Run one check and print its line."""
    run.problems, began = [], time.perf_counter()
    try:
        found = run.figures[name] = CHECKS[name](run)
        shown = [f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
                 for key, value in found.items()]
        verdict, what = "FAIL" if run.problems else "PASS", "; ".join([*run.problems, ", ".join(shown)])
    except Skipped as reason:
        verdict, what = "SKIP", str(reason)
    except Exception as error:
        run.problems.append(name)
        frames = traceback.extract_tb(error.__traceback__)[-4:]
        places = " ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames)
        verdict, what = "FAIL", f"{type(error).__name__} {' '.join(str(error).split())[:600]}, at {places}"
    print(f"{verdict} {name}: {what} [{time.perf_counter() - began:.0f} s]", flush=True)
    run.peak()  # frees what the check held


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--only", default=",".join(CHECKS), help="(default: %(default)s)")
    parser.add_argument("--toy", action="store_true", help="toy sizes on a CPU")
    args = parser.parse_args()
    names, failed = args.only.split(","), []
    with tempfile.TemporaryDirectory() as folder:
        run = Run(args.toy, Path(folder))
        (run.folder / "1b").mkdir()
        config = LLAMA_1B | (TOY if args.toy else {})
        (run.folder / "1b" / "config.json").write_text(json.dumps(config))
        for name in names:
            check(name, run)
            failed += [name] * bool(run.problems)
    print(f"{len(names)} checks, {len(failed)} failed", *failed, sep=", ")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
