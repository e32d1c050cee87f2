"""Fine-tune a checkpoint with CC-Tuning (or plainly), then fit the Transform Matrix.

    python train.py                                                  # the embedded default: seconds
    python train.py --model DIR --data FILE --out DIR
    torchrun --nproc_per_node 8 train.py --model DIR --data FILE     # sharded over 8 GPUs, same batches
    python train.py ... --save_every 100                             # if killed: run again with --resume
    python train.py ... --method sft                                 # plain fine-tuning, the baseline
    python train.py --model TUNED --data FILE --epochs 0             # only fit the matrix
    python train.py --model DIR --memory_plan 8                      # memory of each of 8 processes

FILE has JSON lines or a JSON list of {"instruction": own language, "instruction_en": the same prompt in
English, "output": answer}, optional "lang", and "input" that is appended to the instruction. DIR is a
Hugging Face checkpoint folder; the result is one too, ready for infer.py.
"""
import argparse
import contextlib
import datetime
import functools
import json
import math
import os
import re
import shutil
import signal
import socket
import sys
import time
import warnings
from dataclasses import dataclass, replace
from hashlib import file_digest, sha256
from pathlib import Path

import numpy as np
import torch
import torch.distributed
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from cctuning import Batch, CCTuning, gumbel_noise, load_cctuning
from model import (DATA, INDEX_FILE, RUN_FILE, SOURCES, TEMPLATE_NAMES, Config, Help, Tokenizer, UserError,
                   at_least, check_writable, choose_device, error_line, file_path, is_ours, pad, printable,
                   process_ranks, read_json, read_records, read_text, refuse_nan, relative, run_script,
                   save_checkpoint, silence, sync, tokenizer_files, write_text)

warnings.filterwarnings("ignore", "torch.distributed is disabled")  # checkpoints of a single process

BETAS, WEIGHT_DECAY, MAX_NORM, WARMUP = (0.9, 0.999), 0.0, 1.0, 0.1
SORT_WINDOW = 128  # at least this many samples are sorted by length together
HELD_OUT = 100     # prompts kept out of the matrix fit to measure it
MAX_SKIPPED = 10   # steps in a row without a finite loss and gradient before the run stops
STEP = "step-" + 7 * "[0-9]"  # name of a checkpoint
PAPER = {"epochs": 3, "batch_size": 128, "micro_batch": 8, "lr": 1e-5}
EMBEDDED = {  # without --model and --data
    "model": relative(DATA / "base"), "data": relative(DATA / "train.jsonl"),
    "eval_data": relative(DATA / "dev.jsonl"),
    "epochs": 2, "batch_size": 32, "micro_batch": 32, "lr": 1e-4}
RESUME_MAY_CHANGE = {  # arguments that change a result by rounding at most
    "out", "overwrite", "resume", "save_every", "keep", "micro_batch", "checkpoint_activations",
    "max_shard_size", "log_every", "memory_plan", "eval_data", "embedded"}
CC_ONLY = {"english_grad": False, "source_layer": None, "fusion_layer": None, "ridge": 0.0}
CONNECTION = {"cc": "english", "sft": "none"}  # in training, by method; see CCTuning.forward


def source_layer(text):
    return text if text in SOURCES else at_least(0)(text)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)

    def add(name, help, kind=None, metavar="N", **options):
        help += f" (default: {PAPER[name]})" if name in PAPER else ""
        options |= {"type": kind, "metavar": metavar} if kind else {}
        group.add_argument(f"--{name}", help=help, **options)

    embedded = " ".join(f"--{name} {EMBEDDED[name]}" for name in PAPER)
    group = parser.add_argument_group("files")
    add("model", "checkpoint folder to start from (default: the embedded data/base)", file_path, "DIR")
    add("data", f"training samples (default: the embedded data/train.jsonl, with {embedded})", file_path,
        "FILE")
    add("eval_data", "samples for the validation loss, measured after each epoch", file_path, "FILE")
    add("out", "folder for the result", file_path, "DIR", default="out")
    add("overwrite", "replace a model in --out once the new one is written", action="store_true")
    add("max_shard_size", "maximum GB per weight file", at_least(0, float), default=5.0)

    group = parser.add_argument_group("training")
    add("method", "CC-Tuning, or plain fine-tuning", choices=("cc", "sft"), default="cc")
    add("epochs", "passes over --data; 0: only fit the matrix", at_least(0))
    add("batch_size", "samples per step, over all processes", at_least(1))
    add("lr", "peak learning rate; 10%% warm-up, then cosine", at_least(0, float))
    add("max_length", "maximum tokens of prompt and answer; longer answers are cut "
        "(default: 1024, or what the model takes)", at_least(2))
    add("template", "chat template (default: the checkpoint's)", choices=TEMPLATE_NAMES)
    add("seed", "random seed of order, noise and the initial Decision Maker", at_least(0), default=0)
    add("english_grad", "differentiate the English pass too; the paper's code does not", action="store_true")
    add("source_layer", "ablation, what is fused: decision_maker, random, mean (the last layers dominate "
        "it) or a layer's number (default: the model's)", source_layer)
    add("fusion_layer", "layer to whose FFN output it is added (default: the model's, else 0)", at_least(0))

    group = parser.add_argument_group("Transform Matrix")
    add("matrix_prompts", "number of prompts for the fit", at_least(1), default=1000)
    add("ridge", "penalty on the matrix, relative to mean(diag(X'X))", at_least(0, float), default=0.0)

    group = parser.add_argument_group("memory")
    add("dtype", "compute dtype; the weights stay float32 (default: bfloat16 on a GPU, float32 on a CPU)",
        choices=("float32", "bfloat16"))
    add("micro_batch", "samples per forward pass of a process; changes memory, not results", at_least(1))
    add("checkpoint_activations", "recompute layers in the backward pass: less memory, a quarter more time",
        action="store_true")
    add("memory_plan", "only print the memory that each of N processes needs", at_least(1))

    group = parser.add_argument_group("stopping and resuming")
    add("save_every", "steps between checkpoints (default: save only when stopped)", at_least(1))
    add("keep", "number of checkpoints to keep", at_least(1), default=2)
    add("resume", "continue from the newest checkpoint, on any number of processes", action="store_true")
    add("log_every", "steps between printed lines; OUT/train_log.jsonl has all", at_least(1), default=10)

    args = parser.parse_args(argv)
    args.embedded = args.model is None and args.data is None
    if not args.embedded and (args.model is None or (args.data is None and not args.memory_plan)):
        raise UserError("--model: give both --model and --data, or neither for the embedded default")
    for name, value in (EMBEDDED if args.embedded else PAPER).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


# -------------------------------------------------------------------------------------------------- data

# What happens to a training file, in the symbols of cctuning.py:
#     read_samples     a line becomes a Sample: ids of x and e
#     make_batches     an epoch's samples become steps of --batch_size, rows of similar length together
#     micro_batches    this process's share of a step, --micro_batch rows at a time
#     collate          a Batch: x (B, T), e (B, Te), p (B,)
#     train_step       CCTuning.forward, the mean loss over the step's answer tokens, AdamW
#     fit_matrix       in the end, W (d, d) from H (L, B, d) of prompts and of their English versions


@dataclass
class Sample:
    ids: list           # x: prompt and answer, end of turn included
    prompt_length: int
    english_ids: list   # e: English prompt; empty if there is none
    lang: str | None
    is_english: bool


def read_samples(path, tokenizer, max_length, print0, method="cc"):
    """The Samples of a training file. Prints how many prompts are too long, and how many answers are cut.

    Raises UserError for the first malformed line, or if no sample is left.
    """
    required = ("instruction", "output") + ("instruction_en",) * (method == "cc")
    records, samples = read_records(path, required), []
    for record in records:
        ids = tokenizer.prompt(record.prompt)
        english_ids = tokenizer.prompt(record.english) if record.english else []
        if len(ids) < max_length and len(english_ids) <= max_length:
            answered = (ids + tokenizer.answer(record.answer))[:max_length]
            samples.append(Sample(answered, len(ids), english_ids, record.lang, record.is_english))
    if not samples:
        raise UserError(f"{path}: all {len(records)} prompts are too long for --max_length {max_length}; "
                        "raise it")
    if dropped := len(records) - len(samples):
        print0(f"{path}: {dropped} of {len(records)} samples dropped: their prompts are too long for "
               f"--max_length {max_length}")
    if cut := sum(s.ids[-1] != tokenizer.end_of_turn for s in samples):
        print0(f"{path}: {cut} answers cut at {max_length} tokens")
    return samples


def make_batches(samples, batch_size, seed, epoch):
    """The steps of an epoch, each an array of sample numbers, longest first.

    Samples are shuffled, sorted by length within windows of at least SORT_WINDOW, cut into steps, and the
    steps shuffled: a step's rows have similar lengths, and the order of steps says nothing about length.
    """
    lengths = np.array([len(s.ids) + len(s.english_ids) for s in samples])
    rng = np.random.default_rng((seed, epoch))
    order, window = rng.permutation(len(samples)), batch_size * math.ceil(SORT_WINDOW / batch_size)
    steps = []
    for start in range(0, len(order), window):
        part = order[start:start + window]
        part = part[np.argsort(-lengths[part], kind="stable")]
        steps += [part[i:i + batch_size] for i in range(0, len(part), batch_size)]
    return [steps[i] for i in rng.permutation(len(steps))]


def collate(samples, connection_index, device="cpu"):
    """A Batch of samples. connection_index: position from the prompt's end (-1: last token)."""
    ids, lengths = pad([s.ids for s in samples])
    english_ids, english_lengths = pad([s.english_ids for s in samples])
    prompts, column = torch.tensor([s.prompt_length for s in samples]), torch.arange(ids.shape[1])
    is_answer = (column >= prompts[:, None]) & (column < lengths[:, None])  # (B, T)
    batch = Batch(ids, ids.masked_fill(~is_answer, -100), prompts + connection_index,
                  english_ids, english_lengths + connection_index)
    if torch.device(device).type == "cuda":  # pinned memory: the CPU does not wait for the copy
        batch = [tensor.pin_memory() for tensor in batch]
    return Batch(*(tensor.to(device, non_blocking=True) for tensor in batch))


# --------------------------------------------------------------------------------------------- processes

@dataclass
class Dist:
    """The processes that torchrun started, if it did; otherwise a single one."""
    rank: int
    world_size: int
    device: torch.device
    torchrun: int | None = None  # its process id

    @classmethod
    def start(cls, backend=None):
        """Join the process group; backend: nccl on GPUs, else gloo, unless given."""
        rank, world_size, *_ = process_ranks()
        device = choose_device()
        if world_size > 1:
            backend = backend or ("nccl" if device.type == "cuda" else "gloo")
            torch.distributed.init_process_group(backend, timeout=datetime.timedelta(minutes=10),
                                                 device_id=device if backend == "nccl" else None)
        return cls(rank, world_size, device, os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None)

    def __enter__(self):
        return self

    def __exit__(self, error, *_):
        """Wait for all processes on success; do not wait after an error."""
        if self.world_size > 1:
            if error is None or error is SystemExit:
                self.gather(None)
            torch.distributed.destroy_process_group()

    def print0(self, text, file=None):
        """Print on rank 0, above a progress bar; None: nothing. If the reader has gone, the run goes on."""
        if self.rank == 0 and text is not None:
            file = file or sys.stdout
            try:
                tqdm.write(printable(text), file=file)
                file.flush()
            except BrokenPipeError:
                silence(file)

    def gather(self, value):
        """[the value of each rank]; the values are pickled. Also a barrier."""
        values = [value] * self.world_size
        if self.world_size > 1:
            torch.distributed.all_gather_object(values, value)
        return values

    def together(self, function, *args):
        """function(*args), called on every rank. A UserError or OSError on one rank ends all of them."""
        result = problem = None
        try:
            result = function(*args)
        except (UserError, OSError) as error:
            if (problem := error_line(error)) is None:
                raise
        if problems := [found for found in self.gather(problem) if found]:
            raise UserError(problems[0])
        return result

    def on_rank0(self, function, *args):
        """function(*args), called on rank 0 only. All ranks get the result."""
        return self.gather(self.together(lambda: function(*args) if self.rank == 0 else None))[0]

    def sum(self, tensor):
        """Sum a tensor over the processes, in place."""
        if self.world_size > 1:
            torch.distributed.all_reduce(tensor)
        return tensor

    def micro_batches(self, items, size):
        """Yield (group, weight): this process's share of items, in groups of at most `size`.

        All ranks get the same number of groups, since FSDP needs every rank in each forward: a rank without
        work repeats the last group with weight 0. Other groups have weight 1.
        """
        size = min(size, math.ceil(len(items) / self.world_size))
        groups = [items[i:i + size] for i in range(0, len(items), size)]
        rounds = math.ceil(len(groups) / self.world_size)
        for i in range(self.rank, rounds * self.world_size, self.world_size):
            yield (groups[i], 1) if i < len(groups) else (groups[-1], 0)


def shard(cc, dist, dtype):
    """Shard the model over the processes: each decoder layer, and the rest with the root.

    Both passes of a step run within one forward of the root. Weights and optimizer stay float32; layers
    are gathered in the dtype of the computation, gradients reduced in float32.
    """
    low = torch.bfloat16 if dtype == "bfloat16" else None
    # Inputs are not cast: Gumbel noise rounded to bfloat16 could draw another layer than one process draws.
    policy = MixedPrecisionPolicy(low, reduce_dtype=low and torch.float32, cast_forward_inputs=False)
    mesh = torch.distributed.init_device_mesh(dist.device.type, (dist.world_size,))
    for module in [*cc.lm.model.layers, cc]:
        fully_shard(module, mesh=mesh, mp_policy=policy)
    register_fsdp_forward_method(cc, "activations")
    cc.to_empty(device=dist.device)


def full_tensor(parameter):
    """The whole parameter, on the CPU. Collective: every process must call it."""
    parameter = parameter.detach()
    return (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).cpu()


def memory_plan(args):
    """Estimate from config.json: {what: bytes} of each of --memory_plan processes, without activations."""
    world, config = args.memory_plan, Config.read(args.model)
    with torch.device("meta"):
        lm = CCTuning(config).lm
    layer = sum(p.numel() for p in lm.model.layers[0].parameters())
    rest = sum(p.numel() for p in lm.parameters()) - config.num_hidden_layers * layer
    part = sum(math.ceil(len(p) / world) * p[0].numel() for p in lm.parameters())
    low = 4 if args.dtype == "float32" else 2  # bytes of a number in the dtype of computation
    tokens = min(args.micro_batch, math.ceil(args.batch_size / world)) * default_max_length(args, config)
    # The root's and two layers' weights are gathered, one group's gradients reduced in float32.
    weights, reduced = low * (rest + 2 * layer), (low + 4) * max(rest, layer)
    if world == 1:  # autocast's copies of all weights but the embedding
        multiplied = config.num_hidden_layers * layer + config.vocab_size * config.hidden_size
        weights, reduced = low * multiplied if low == 2 else 0, 0
    return {
        "parameters, float32": 4 * part,
        "gradients, float32": 4 * part,
        "AdamW's two moments": 8 * part,
        "weights in the dtype of the computation": weights,
        "gradients while they are reduced": reduced,
        "logits, if all tokens were answer": 3 * 4 * tokens * config.vocab_size,  # + log-softmax, gradient
    }


# ------------------------------------------------------------------------------------------------- setup

class Setup:
    """All inputs of a run, read and checked before any work is done."""

    def __init__(self, args, dist):
        check_writable(args.out)
        if args.method == "sft":
            unused = [name for name, off in CC_ONLY.items() if getattr(args, name) != off]
            if unused := unused + ["epochs 0"] * (args.epochs == 0):
                raise UserError(f"--method sft: --{unused[0]} needs --method cc; leave it out")
        self.args, self.dist, self.config = args, dist, Config.read(args.model)
        if os.path.exists(args.out) and os.path.samefile(args.out, args.model):
            raise UserError(f"{args.out}: is --model too, which would be lost; give another --out")
        tokenizer_files(args.model)  # raises now for what cannot be copied in the end
        max_length, longest = default_max_length(args, self.config), self.config.max_length
        if max_length > longest:
            raise UserError(f"--max_length: {args.model} takes {longest} tokens; give at most that")
        layers = self.config.num_hidden_layers
        for name in ("source_layer", "fusion_layer"):
            if (value := getattr(args, name)) is not None:
                if isinstance(value, int) and value >= layers:
                    raise UserError(f"--{name}: {args.model} has layers 0 to {layers - 1}; give one of them")
                self.config = replace(self.config, **{name: value})
        self.tokenizer = Tokenizer(args.model, self.config, args.template)
        dist.print0(self.tokenizer.notice)
        self.samples, self.eval_samples = (
            read_samples(path, self.tokenizer, max_length, dist.print0, args.method) if path else []
            for path in (args.data, args.eval_data))
        if args.method == "cc" and all(s.is_english for s in self.samples):
            raise UserError(f"{args.data}: every sample is English (by lang, or instruction equals "
                            "instruction_en), the Transform Matrix needs others; add some, or give "
                            "--method sft")
        self.steps = [(epoch, numbers) for epoch in range(args.epochs)  # numbers: of the samples of a step
                      for numbers in make_batches(self.samples, args.batch_size, args.seed, epoch)]
        args.dtype = args.dtype or ("bfloat16" if dist.device.type == "cuda" else "float32")
        # bfloat16 in one process. In several, fully_shard gathers the weights in it: see shard.
        enabled = args.dtype == "bfloat16" and dist.world_size == 1
        self.autocast = functools.partial(torch.autocast, dist.device.type, torch.bfloat16, enabled)
        # Settings that must match on --resume. The model is known by its resolved path and its config.json.
        model = Path(args.model).resolve()
        self.run_info = {name: value for name, value in vars(args).items() if name not in RESUME_MAY_CHANGE}
        self.run_info |= {
            "model": f"{model} {digest(read_text(model / 'config.json'))}", "data": digest(self.samples),
            "fusion_layer": self.config.fusion_layer}


def digest(*values):
    """A hash of the values. Lists are hashed item by item, to avoid one huge string."""
    hashed = sha256()
    for value in values:
        items = value if isinstance(value, list) else [value]
        for item in (len(items), *items):
            hashed.update(repr(item).encode())
    return hashed.hexdigest()[:16]


def default_max_length(args, config):
    return args.max_length or min(1024, config.max_length)


def claim(setup, until_exit):
    """Lock --out and mark it as ours; for rank 0. Returns True if --resume finds this run's result there.

    Raises UserError if the folder is in use, or holds something that must not be replaced.
    """
    args, out = setup.args, Path(setup.args.out)
    is_ours(out)  # refuses a folder of others before anything is written there
    out.mkdir(parents=True, exist_ok=True)
    lock = until_exit.enter_context(open(out / ".lock", "a"))
    try:
        import fcntl
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # released by the kernel, however the run ends
    except BlockingIOError:
        user = read_json(out / RUN_FILE).get("cctuning") if (out / RUN_FILE).exists() else "another run"
        raise UserError(f"{out}: in use by {user}; wait for it, or give another --out") from None
    except (OSError, ImportError):  # a file system without locks; Windows
        setup.dist.print0(f"{out}: cannot be locked; do not start a second run with this --out")
    # A complete model has an index, written last and removed first. saving.tmp: a run died before that.
    if (out / INDEX_FILE).exists() and not (out / "saving.tmp").exists():
        existing = Config.read(out).cctuning
        if args.resume and existing.get("run") == digest(setup.run_info):
            return True
        if not (args.overwrite or args.embedded and existing.get("arguments", {}).get("embedded") is True):
            raise UserError(f"{out}: holds a model already; give another --out, or --overwrite to replace it")
    elif list((out / "checkpoints").glob(STEP)) and not (args.overwrite or args.resume):
        raise UserError(f"{out}/checkpoints: a run was stopped; continue with --resume, or start over with "
                        "--overwrite")
    write_text(out / RUN_FILE, json.dumps({"cctuning": f"process {os.getpid()} on {socket.gethostname()}"}))
    return False


def load_for_training(setup):
    """Returns the model, float32 and sharded over the processes, and {tensor name: dtype as stored}."""
    args, dist = setup.args, setup.dist
    with torch.device("meta"):
        cc = CCTuning(setup.config, args.seed)
    if dist.world_size > 1:
        shard(cc, dist, args.dtype)
    dtypes = load_cctuning(cc, args.model, torch.float32, dist.device).dtypes
    trained_for = setup.config.cctuning.get("fusion_layer", 0)
    if args.method == "sft":
        cc.decision_maker.requires_grad_(False)
    elif cc.trained and trained_for != setup.config.fusion_layer:
        raise UserError(f"--fusion_layer: {args.model} was trained for layer {trained_for}; leave it out")
    elif args.epochs == 0 and not cc.trained and setup.config.source_layer == "decision_maker":
        raise UserError(f"{args.model}: no trained Decision Maker; train before fitting (--epochs 1)")
    if args.checkpoint_activations:
        for layer in cc.lm.model.layers:
            layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
    size = sum(p.numel() * dtypes[name].itemsize for name, p in cc.lm.named_parameters())
    if dist.rank == 0 and (free := shutil.disk_usage(args.out).free) < size:
        raise UserError(f"{args.out}: {free / 1e9:.2f} GB free, {size / 1e9:.2f} needed; make room")
    return cc, dtypes


# ------------------------------------------------------------------------------------- one training step

def learning_rate(step, steps, peak):
    """Linear warm-up over the first tenth of the steps, then a cosine to 0."""
    warmup = math.ceil(WARMUP * steps)
    progress = max(0, step - warmup) / max(1, steps - warmup)  # share of the cosine
    return peak * min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * progress))


def train_step(setup, cc, optimizer, step):
    """Forward, backward and update. Returns loss and gradient norm; if one is not finite, no update.

    The loss is the mean over the answer tokens of the whole step: an average of averages would weigh the
    tokens of short answers more.
    """
    args, dist, samples = setup.args, setup.dist, setup.samples
    numbers = setup.steps[step][1]
    targets = sum(len(samples[i].ids) - samples[i].prompt_length for i in numbers)
    total = torch.zeros((), device=dist.device)
    for group, weight in dist.micro_batches(numbers, args.micro_batch):
        batch = collate([samples[i] for i in group], setup.tokenizer.connection_index, dist.device)
        # By sample: the noise does not depend on how samples are spread over processes.
        noise = gumbel_noise([(args.seed, step, i) for i in group], setup.config.num_hidden_layers)
        noise = noise.to(dist.device, non_blocking=True)  # (B, L)
        with setup.autocast():
            loss, _ = cc(batch, CONNECTION[args.method], noise, args.english_grad)
        loss = weight * loss
        (loss * dist.world_size / targets).backward()  # FSDP averages gradients over processes: undo that
        total += loss.detach()
    norm = torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], MAX_NORM)
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    loss, norm = dist.sum(total).item() / targets, norm.item()  # now the CPU waits for the GPU
    optimizer.param_groups[0]["lr"] = learning_rate(step, len(setup.steps), args.lr)
    if math.isfinite(loss + norm):
        optimizer.step()
    optimizer.zero_grad()
    return loss, norm


# -------------------------------------------------------------------- validation and the Transform Matrix

@torch.no_grad()
def validate(setup, cc, connections):
    """Returns {connection: mean loss per answer token} and the Decision Maker's favourite layer.

    The favourite is the layer that it picks most often from the English prompts; None without these.
    """
    samples, losses, favourite = sorted(setup.eval_samples, key=lambda s: -len(s.ids)), {}, None
    for connection in connections:
        total = torch.zeros(2, dtype=torch.float64, device=setup.dist.device)  # loss, answer tokens
        picked = torch.zeros(setup.config.num_hidden_layers, device=setup.dist.device)  # of each layer
        for group, weight in setup.dist.micro_batches(samples, setup.args.micro_batch):
            batch = collate(group, setup.tokenizer.connection_index, setup.dist.device)
            with setup.autocast():
                loss, scores = cc(batch, connection)
            total += weight * torch.stack((loss, (batch.labels != -100).sum())).double()
            if scores is not None:
                picked += weight * scores.argmax(-1).bincount(minlength=len(picked))
        loss, count = setup.dist.sum(total).tolist()
        losses[connection] = loss / count
        share, layer = (setup.dist.sum(picked) / len(samples)).max(0)
        if connection == "english" and setup.config.source_layer == "decision_maker":
            favourite = f"layer {int(layer)} ({100 * share:.0f} %)"
    if isinstance(cc, FSDPModule):
        cc.reshard()  # FSDP keeps the root's weights gathered after a forward without a backward
    return losses, favourite


def report_validation(setup, cc, log):
    """Print what training did to the validation loss, and whether the connection helps."""
    names = {"none": "no connection", "matrix": "matrix", "english": "real English"}
    losses, favourite = validate(setup, cc, names if setup.args.method == "cc" else ["none"])
    log.write(eval_loss=losses)
    rows = {"base model": log.first.get("base_loss"), **{names[c]: loss for c, loss in losses.items()}}
    lines = ["validation loss (lower is better)"]
    lines += [f"  {name:<15}{loss:.4f}" for name, loss in rows.items() if loss]
    if favourite:
        earlier = log.first.get("favourite", "not measured")
        lines.append(f"the Decision Maker's favourite: {earlier} before training, {favourite} after")
    if "matrix" in losses:
        lines.append("The matrix, which inference uses, is " + (
            "better than no connection." if losses["matrix"] < losses["none"] else
            "no better than no connection: on this data the connection does not help at inference."))
    setup.dist.print0("\n".join(lines))


@torch.no_grad()
def fit_matrix(setup, cc):
    """Fit the Transform Matrix on a seeded sample of the non-English prompts. Returns the fit's info."""
    args, dist, matrix = setup.args, setup.dist, cc.transform_matrix
    prompts = [replace(s, ids=s.ids[:s.prompt_length]) for s in setup.samples if not s.is_english]
    order = np.random.default_rng((args.seed, len(setup.samples))).permutation(len(prompts))
    held_out = min(HELD_OUT, len(prompts) // 5)
    test, fit = (sorted((prompts[i] for i in part), key=lambda s: -s.prompt_length)
                 for part in (order[:held_out], order[held_out:held_out + args.matrix_prompts]))

    def activations(prompts):
        """X and Y (L, B, d)."""
        batch = collate(prompts, setup.tokenizer.connection_index, dist.device)
        with setup.autocast():
            return (cc.activations(batch.ids, batch.position),
                    cc.activations(batch.english_ids, batch.english_position))

    count = torch.zeros((), device=dist.device)  # of prompts in the fit
    groups = list(dist.micro_batches(fit, args.micro_batch))
    for group, weight in tqdm(groups, "matrix", disable=dist.rank > 0 or None):
        own, english = activations(group)
        finite = (own.isfinite() & english.isfinite()).all(2).all(0)  # (B,): NaN and inf spoil sums
        finite &= bool(weight)
        matrix.add(own[:, finite], english[:, finite])
        count += finite.sum()
    if not dist.sum(count):
        raise UserError(f"{args.data}: no prompt has finite activations; lower --lr, or check the samples")
    dist.sum(matrix.sums)
    matrix.solve(args.ridge)
    info = {"prompts": int(count), "ridge": args.ridge, "held_out": len(test), "r_squared": []}
    if test:  # few: every process computes all
        groups = [activations(test[i:i + args.micro_batch]) for i in range(0, len(test), args.micro_batch)]
        own, english = (torch.cat(h, dim=1) for h in zip(*groups, strict=True))  # (L, N, d)
        info["r_squared"] = [round(r, 4) if math.isfinite(r) else None
                             for r in matrix.r_squared(own, english).tolist()]
    info["doubt"] = doubt(info, setup.config)
    shown = " ".join("-" if r is None else f"{r:.2f}" for r in info["r_squared"])
    measured = f"R^2 per layer on {len(test)} others {shown}" if test else "too few to measure R^2 on others"
    dist.print0(f"matrix: fitted on {info['prompts']} prompts, {measured}")
    dist.print0(info["doubt"])
    if isinstance(cc, FSDPModule):
        cc.reshard()
    return info


def doubt(info, config):
    """A warning if the fit looks unreliable, else None."""
    r_squared, problem = info["r_squared"], None
    if info["prompts"] * config.num_hidden_layers < config.hidden_size:
        problem = f"{info['prompts']} prompts are too few to determine its {config.hidden_size} rows"
    elif sum(r is None or r <= 0 for r in r_squared) > len(r_squared) / 2:
        problem = "in most layers it predicts no better than the mean would (R^2 <= 0)"
    return problem and f"Transform Matrix: {problem}; fit it on more prompts, or with --ridge 0.1"


# ----------------------------------------------------------------------------------------- checkpointing

@contextlib.contextmanager
def writing(path, temporary, dist):
    """Around code that writes `path`: a failure removes the temporary folder and becomes one line."""
    try:
        yield
    except (UserError, OSError, SafetensorError, CheckpointException) as error:  # the last is a BaseException
        if dist.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        reason = str(error).strip() or type(error).__name__
        raise UserError(f"{path}: cannot be written ({reason.splitlines()[-1]}); make room, then run again "
                        "with --resume") from None


class Checkpointer:
    """Weights and AdamW's moments in OUT/checkpoints/step-N, to resume from.

    The order of samples, the learning rate and the noise follow from the seed and the step. The index of
    torch.distributed.checkpoint is a pickle: never resume from a checkpoint that is not yours.
    """

    def __init__(self, setup, cc, optimizer):
        self.setup, self.cc, self.optimizer = setup, cc, optimizer
        self.folder = Path(setup.args.out) / "checkpoints"

    def state(self):
        """{name: tensor} of all that is saved; resume reads into these tensors."""
        state = {}
        for name, p in self.cc.named_parameters():
            state[name] = p.detach()
            if p.requires_grad:
                moments = self.optimizer.state[p]
                if not moments:  # as AdamW initialises them
                    moments.update(step=torch.zeros((), device=p.device), exp_avg=torch.zeros_like(p),
                                   exp_avg_sq=torch.zeros_like(p))
                state.update({f"{name}.{key}": value for key, value in moments.items()})
        return state

    def hashes(self, folder):
        """{name: SHA-256} of the files that this rank wrote to a checkpoint."""
        names = [f"__{self.setup.dist.rank}_*", *([".metadata"] if self.setup.dist.rank == 0 else [])]
        return {path.name: sha256_of(path) for name in names for path in folder.glob(name)}

    def save(self, step):
        """Write step-N atomically, and remove all but the newest --keep."""
        dist, target = self.setup.dist, self.folder / f"step-{step:07d}"
        temporary = target.with_suffix(".tmp")

        def finish(hashes):
            files = {name: found for of_rank in hashes for name, found in of_rank.items()}
            saved = {**self.setup.run_info, "step": step, "files": files}
            write_text(temporary / "run.json", json.dumps(saved))
            temporary.rename(target)
            sync(self.folder)
            for old in sorted(self.folder.glob(STEP))[:-self.setup.args.keep]:
                shutil.rmtree(old.rename(old.with_suffix(".tmp")))

        with writing(target, temporary, dist):
            dcp.save(self.state(), storage_writer=dcp.FileSystemWriter(temporary, sync_files=True))
            dist.on_rank0(finish, dist.gather(dist.together(self.hashes, temporary)))

    def check(self, path):
        """Refuse a checkpoint of another run or with changed bytes. Each rank reads its share."""
        saved, dist = read_json(path / "run.json"), self.setup.dist
        for name, value in self.setup.run_info.items():
            if saved.get(name) != value:
                raise UserError(f"{path}: has another --{name} ({saved.get(name)}, now {value}); give the "
                                "same, or another --out")
        files = sorted(saved.get("files", {}).items())[dist.rank::dist.world_size]
        as_written = all(sha256_of(path / name) == found for name, found in files)
        if not as_written or path.name != f"step-{saved.get('step', 0):07d}":
            raise UserError(f"{path}: damaged, or renamed; remove it to resume from the one before it")

    def resume(self):
        """With --resume, load the newest checkpoint. Removes what other runs left. Returns the step or 0."""
        dist, paths, step = self.setup.dist, sorted(self.folder.glob(STEP)), 0
        if paths and self.setup.args.resume:
            dist.together(self.check, paths[-1])
            dcp.load(self.state(), storage_reader=dcp.FileSystemReader(paths[-1]))
            step = int(paths[-1].name.removeprefix("step-"))
        dist.gather(None)  # every rank has read the folder; rank 0 may write now
        if dist.rank == 0:
            leftovers = self.folder.glob(f"{STEP}.tmp" if step else f"{STEP}*")
            for old in [self.folder.with_name("saving.tmp"), *leftovers]:
                shutil.rmtree(old, ignore_errors=True)
        return step


def sha256_of(path):
    with open(path, "rb") as file:
        return file_digest(file, "sha256").hexdigest()


class Log:
    """OUT/train_log.jsonl, written by rank 0: a line per step, then the matrix and validation losses."""

    def __init__(self, setup, start):
        """Keep the lines up to step `start` of a resumed run."""
        self.path, self.rank, entries = Path(setup.args.out) / "train_log.jsonl", setup.dist.rank, []
        for line in read_text(self.path).splitlines() if start and self.path.exists() else []:
            with contextlib.suppress(ValueError, KeyError, TypeError):  # cut short, or without a step
                entries += [entry for entry in [json.loads(line)] if entry["step"] <= start]
        self.first = next((entry for entry in entries if entry["step"] == 0), {})  # measured before training
        if self.rank == 0:
            write_text(self.path, "".join(json.dumps(entry) + "\n" for entry in entries))

    def write(self, **entry):
        if self.rank == 0:
            text = re.sub(r"-?\b(NaN|Infinity)\b", "null", json.dumps(entry))  # JSON has no such numbers
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(text + "\n")


# --------------------------------------------------------------------------------------------- the run

def train(args, stop_signals):
    """Train, fit the matrix, save. stop_signals: the signals received so far; see main."""
    with Dist.start() as dist, contextlib.ExitStack() as until_exit:
        setup = dist.together(Setup, args, dist)
        if len(set(dist.gather(digest(vars(args), setup.samples, setup.eval_samples)))) > 1:
            raise UserError("--data: the ranks have different arguments or data; start all with the same")
        if dist.on_rank0(claim, setup, until_exit):
            return dist.print0(f"{args.out}: holds the result of this run already")
        cc, dtypes = dist.together(load_for_training, setup)
        trainable = [p for p in cc.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trainable, args.lr, BETAS, weight_decay=WEIGHT_DECAY, fused=True)
        checkpointer = Checkpointer(setup, cc, optimizer)
        start = checkpointer.resume()
        log = Log(setup, start)
        resumed = f", resumed after step {start}" if start else ""
        dist.print0(f"{args.method} on {dist.world_size} x {dist.device.type}, {args.dtype}: "
                    f"{len(setup.samples)} samples, template {setup.tokenizer.template}, "
                    f"{len(setup.steps)} steps{resumed}")
        if setup.eval_samples and not start:
            losses, favourite = validate(setup, cc, sorted({"none", CONNECTION[args.method]}))
            log.first = {"base_loss": losses["none"], "favourite": favourite}
            log.write(step=0, **log.first)
        train_steps(setup, cc, optimizer, checkpointer, log, start, stop_signals)
        info = {"run": digest(setup.run_info), "template": setup.tokenizer.template, "method": args.method,
                "source_layer": setup.config.source_layer, "fusion_layer": setup.config.fusion_layer,
                "arguments": vars(args)}
        if args.method == "cc":
            info["languages"] = sorted({s.lang for s in setup.samples if s.lang})
            info["matrix"] = fit_matrix(setup, cc)
            log.write(matrix=info["matrix"])
        if setup.eval_samples:
            report_validation(setup, cc, log)
        save_result(setup, cc, dtypes, info)
        use = ("--lang sw", "") if args.embedded else ("--prompt ...", " --data BENCHMARKS")
        dist.print0(f"saved to {args.out}\nnext: python infer.py --model {args.out} {use[0]}, python eval.py "
                    f"--model {args.out}{use[1]}")


def train_steps(setup, cc, optimizer, checkpointer, log, start, stop_signals):
    """The steps from `start` on: update, log, validate after each epoch, write checkpoints."""
    args, dist, steps = setup.args, setup.dist, setup.steps
    skipped = in_a_row = 0
    for step in tqdm(range(start, len(steps)), "train ", len(steps), initial=start,
                     disable=None if dist.rank == 0 and steps else True):
        (epoch, numbers), began = steps[step], time.perf_counter()
        loss, norm = train_step(setup, cc, optimizer, step)
        is_last, is_finite = step + 1 == len(steps), math.isfinite(loss + norm)

        # log
        rate = optimizer.param_groups[0]["lr"]
        tokens = sum(len(setup.samples[i].ids) + (args.method == "cc") * len(setup.samples[i].english_ids)
                     for i in numbers)
        speed = tokens / (time.perf_counter() - began)
        log.write(step=step + 1, epoch=epoch, loss=loss, lr=rate, grad_norm=norm,
                  tokens_per_s=round(speed, 1), skipped=not is_finite)
        if is_last or (step + 1) % args.log_every == 0:
            dist.print0(f"step {step + 1:>{len(str(len(steps)))}}/{len(steps)}  loss {loss:7.4f}  "
                        f"lr {rate:8.2e}  grad {norm:8.3f}  {speed:8.0f} tokens/s")
        if not is_finite:
            dist.print0(f"step {step + 1} skipped: loss {loss}, gradient norm {norm}")
            skipped += 1
        in_a_row = 0 if is_finite else in_a_row + 1
        if in_a_row == min(MAX_SKIPPED, len(steps)):
            raise UserError(f"{args.data}: no finite loss or gradient in {in_a_row} steps up to {step + 1}; "
                            "lower --lr, or look for broken samples")

        # validate; after the last epoch train() does
        if setup.eval_samples and not is_last and steps[step + 1][0] != epoch:
            losses, _ = validate(setup, cc, [CONNECTION[args.method]])
            log.write(step=step + 1, epoch=epoch, eval_loss=losses)
            dist.print0(f"epoch {epoch + 1}/{args.epochs}: validation loss {min(losses.values()):.4f}")

        # save, after the last step too: the fit may be interrupted. Not after a skipped step: the weights are
        # unchanged, and --keep would remove an older checkpoint for them.
        is_orphan = dist.torchrun not in (None, os.getppid())  # torchrun was killed
        is_stopping = dist.sum(torch.tensor(float(len(stop_signals) + is_orphan), device=dist.device)) > 0
        is_due = args.save_every and is_finite and (is_last or (step + 1) % args.save_every == 0)
        if is_stopping or is_due:
            checkpointer.save(step + 1)
        if is_stopping:
            dist.print0(f"stopped after step {step + 1} of {len(steps)}, saved in {args.out}/checkpoints; "
                        "continue with --resume")
            raise SystemExit(128 + (stop_signals or [signal.SIGTERM])[0])
    if skipped:
        dist.print0(f"{skipped} steps were skipped, loss or gradient not finite; check the samples")


def save_result(setup, cc, dtypes, info):
    """Write the checkpoint folder. Every process gathers the weights, rank 0 writes them."""
    args, out, extra = setup.args, Path(setup.args.out), {}
    if args.method == "cc":
        extra = {f"decision_maker.{name}": full_tensor(p) for name, p in cc.decision_maker.named_parameters()}
        extra["transform_matrix"] = cc.transform_matrix.weight.cpu()
    tensors = ((name, refuse_nan(f"{out}: {name}", full_tensor(p).to(dtypes[name])))
               for name, p in cc.lm.named_parameters())
    if setup.dist.rank > 0:
        for _ in tensors:  # take part in the gathering
            pass
        return
    with writing(out, out / "saving.tmp", setup.dist):
        shard_bytes = int(1e9 * args.max_shard_size)
        save_checkpoint(out, args.model, tensors, info, extra, shard_bytes, setup.tokenizer)


def main():
    args = parse_args()
    if args.memory_plan:
        sizes = memory_plan(args)
        for what, size in [*sizes.items(), ("together, activations come on top", sum(sizes.values()))]:
            print(f"{size / 1e9:8.2f} GB  {what}")
        return
    # On SIGTERM or SIGINT: finish the step, write a checkpoint, exit; after the last step: finish the run.
    # A second signal ends the run at once.
    default = {signal.SIGTERM: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
    stop_signals = []

    def stop(number, frame):
        stop_signals.append(number)
        signal.signal(number, default[number])
        with contextlib.suppress(OSError):  # the reader may have gone (| tee)
            if process_ranks()[0] == 0:  # not print: the signal may come while it is printing
                os.write(2, b"signal received: finishing this step or the run; another ends it at once\n")

    with contextlib.ExitStack() as until_exit:
        for number in default:
            until_exit.callback(signal.signal, number, signal.signal(number, stop))
        train(args, stop_signals)


if __name__ == "__main__":
    run_script(main)
