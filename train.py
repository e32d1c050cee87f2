"""Fine-tune a checkpoint with CC-Tuning (or plainly), then fit the Transform Matrix.

    python train.py                                                         # the embedded default: seconds on a laptop
    python train.py --model DIR --data FILE --out DIR
    torchrun --nproc_per_node 8 train.py --model DIR --data FILE --out DIR  # the model sharded, the losses the same
    python train.py --model DIR --data FILE --out DIR --save_every 100      # killed, it goes on with --resume added
    python train.py --model DIR --data FILE --out DIR --method sft          # plain fine-tuning, the baseline
    python train.py --model TUNED --data FILE --out DIR --epochs 0          # only fit the matrix
    python train.py --model DIR --memory_plan 8                             # what each of 8 processes would hold

FILE has JSON lines or a JSON list of {"instruction": own language, "instruction_en": the same prompt in English,
"output": answer}, optional "lang", and "input" that is appended to the instruction. DIR is a Hugging Face checkpoint
folder; the result is one too, ready for infer.py.

In the letters of cctuning.py, what happens to a training file:
    read_samples      a line becomes a Sample: ids of x and e
    plan              an epoch's samples become steps of --batch_size, rows of like length together
    deal, collate     a process's share of a step, --micro_batch at a time, becomes a Batch: x (B, T), e (B, Te), p (B,)
    CCTuning.forward  the loss of a Batch, summed over its answer tokens
    run               the mean over the whole step's answer tokens; AdamW; and in the end
    fit_matrices      W (d, d) from H (L, B, d) of prompts and of their English versions
"""
import argparse
import datetime
import hashlib
import json
import math
import os
import re
import shutil
import signal
import time
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from cctuning import Batch, MatrixSums, cctuning_tensors, gumbel_noise, load_cctuning, r_squared
from model import (TEMPLATES, Config, Help, Tokenizer, UserError, at_least, check_folder, empty_model, english_version,
                   holds_model, instruction, pad, read_json, read_records, read_text, run_script, save_checkpoint, sync,
                   text_field, write_text)

warnings.filterwarnings("ignore", "torch.distributed is disabled")  # checkpoints of a single process

BETAS, WEIGHT_DECAY, MAX_NORM, WARMUP = (0.9, 0.999), 0.0, 1.0, 0.1
WINDOW = 128      # samples that are sorted by length together when a step has fewer
HELD_OUT = 100    # prompts kept out of the matrix fit to measure it
MAX_SKIPPED = 10  # steps in a row whose loss or gradient is not finite, before the run stops
TIMEOUT = datetime.timedelta(minutes=10)  # that a process waits for the others, before it takes them for dead
DATA = os.path.relpath(Path(__file__).resolve().parent / "data")
EMBEDDED = {  # where neither --model nor --data is given
    "model": f"{DATA}/base", "data": f"{DATA}/train.jsonl", "eval_data": f"{DATA}/dev.jsonl",
    "epochs": 2, "batch_size": 32, "micro_batch": 32, "lr": 1e-4}
FREE = {  # arguments that do not change a run's result, and so may change when it is resumed
    "out", "overwrite", "resume", "save_every", "keep", "micro_batch", "checkpoint_activations", "max_shard_size",
    "log_every", "memory_plan", "eval_data", "embedded"}
CC_ONLY = {"english_grad": False, "source_layer": None, "ridge": 0.0, "per_language": False}  # no use in plain SFT


def source_layer(text):
    return text if text in ("decision_maker", "random") else at_least(0)(text)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\nIn the letters")[0], formatter_class=Help)
    add = parser.add_argument_group("files").add_argument
    add("--model", metavar="DIR", help="checkpoint folder to start from (default: the embedded data/base)")
    embedded = " ".join(f"--{name} {EMBEDDED[name]}" for name in ("epochs", "batch_size", "micro_batch", "lr"))
    add("--data", metavar="FILE", help=f"training samples (default: the embedded data/train.jsonl, with {embedded})")
    add("--eval_data", metavar="FILE", help="samples for a validation loss, after each epoch")
    add("--out", default="out", metavar="DIR", help="folder for the result")
    add("--overwrite", action="store_true", help="replace a model in --out, once the new one is there")
    add("--max_shard_size", type=at_least(0, float), default=5.0, metavar="GB", help="of each file of weights")

    add = parser.add_argument_group("training").add_argument
    add("--method", choices=("cc", "sft"), default="cc", help="CC-Tuning, or plain fine-tuning")
    add("--epochs", type=at_least(0), default=3, metavar="N", help="passes over --data; 0: only fit the matrix")
    add("--batch_size", type=at_least(1), default=128, metavar="N", help="samples a step, over all processes")
    add("--lr", type=at_least(0, float), default=1e-5, metavar="X", help="peak learning rate; 10%% warm-up, cosine")
    add("--max_length", type=at_least(2), metavar="N", help="tokens of prompt and answer, which is cut there (default: "
        "1024, or what the model takes)")
    add("--template", choices=TEMPLATES, help="chat template (default: told by the checkpoint)")
    add("--seed", type=at_least(0), default=0, metavar="N", help="of order, noise and the Decision Maker's start")
    add("--english_grad", action="store_true", help="differentiate the English pass too; the paper's published "
        "configuration does not")
    add("--source_layer", type=source_layer, metavar="WHO", help="ablation: who picks the layer whose activation is "
        "added, decision_maker or random, or always the layer of this number (default: as the model was trained)")

    add = parser.add_argument_group("Transform Matrix").add_argument
    add("--matrix_prompts", type=at_least(1), default=1000, metavar="N", help="prompts to fit it on, of all languages "
        "together")
    add("--ridge", type=at_least(0, float), default=0.0, metavar="X", help="added to the diagonal of X'X, in "
        "means of that diagonal")
    add("--per_language", action="store_true", help="also fit one per language, by the samples' \"lang\"")

    add = parser.add_argument_group("memory").add_argument
    add("--dtype", choices=("float32", "bfloat16"), help="of the computation; trained weights are float32 until saved "
        "(default: bfloat16 on a GPU, float32 on a CPU)")
    add("--micro_batch", type=at_least(1), default=8, metavar="N", help="samples at a time in one process; changes "
        "memory, not results")
    add("--checkpoint_activations", action="store_true", help="keep each layer's input alone and compute the rest "
        "again for the backward pass: same results, less memory, about a quarter more time")
    add("--memory_plan", type=at_least(1), metavar="N", help="only print what each of N processes would hold")

    add = parser.add_argument_group("stopping and going on").add_argument
    add("--save_every", type=at_least(1), metavar="N", help="write OUT/checkpoints every N steps (default: only when "
        "stopped by a signal)")
    add("--keep", type=at_least(1), default=2, metavar="N", help="checkpoints to keep")
    add("--resume", action="store_true", help="go on from the newest of OUT/checkpoints, on any number of processes; "
        "from the start where there is none")
    add("--log_every", type=at_least(1), default=10, metavar="N", help="steps between printed lines; "
        "OUT/train_log.jsonl has them all")

    args = parser.parse_args(argv)
    if args.memory_plan and args.model:
        return args
    embedded = args.model is None and args.data is None
    if not embedded and (args.model is None or args.data is None):
        raise UserError("--model: give both --model and --data, or neither for the embedded default")
    parser.set_defaults(embedded=embedded, **EMBEDDED if embedded else {})  # noted: a later default run may replace it
    return parser.parse_args(argv)


# --------------------------------------------------------------------------------------------------------------- data

@dataclass
class Sample:
    ids: list           # x: prompt and answer, end of turn included
    prompt_length: int
    english_ids: list   # e: English prompt
    lang: str | None
    is_english: bool


def read_samples(path, tokenizer, max_length):
    """The samples of a training file, and how many were dropped: their prompts leave no room for an answer.

    Raises UserError for the first line that is not as it should be, or where no sample is left.
    """
    samples, dropped = [], 0
    for line, record in read_records(path):
        where = f"{path}:{line}"
        own, english = instruction(record, where), english_version(record, where)
        output, lang = text_field(record, "output", where), text_field(record, "lang", where, required=False)
        ids, english_ids = tokenizer.prompt(own), tokenizer.prompt(english)
        if len(ids) >= max_length or len(english_ids) > max_length:
            dropped += 1
            continue
        is_english = lang == "en" or record["instruction_en"] == record["instruction"]
        samples.append(Sample((ids + tokenizer.answer(output))[:max_length], len(ids), english_ids, lang, is_english))
    if not samples:
        raise UserError(f"{path}: all {dropped} prompts are too long for --max_length {max_length}; raise it")
    return samples, dropped


def plan(samples, batch_size, seed, epoch):
    """The steps of an epoch, each an array of sample numbers, longest first.

    Samples are shuffled; within windows of at least WINDOW of them they are sorted by length and cut into steps, which
    are shuffled again. So the rows of a step are of like length, and the order of the steps says nothing about length.
    """
    lengths = np.array([len(s.ids) + len(s.english_ids) for s in samples])
    rng = np.random.default_rng((seed, epoch))
    order, window = rng.permutation(len(samples)), batch_size * math.ceil(WINDOW / batch_size)
    steps = []
    for start in range(0, len(order), window):
        part = order[start:start + window]
        part = part[np.argsort(-lengths[part], kind="stable")]
        steps += [part[i:i + batch_size] for i in range(0, len(part), batch_size)]
    return [steps[i] for i in rng.permutation(len(steps))]


def collate(samples, connection_index):
    """A Batch of samples; connection_index: the connection position, counted from a prompt's end (negative)."""
    ids, lengths = pad([s.ids for s in samples])
    english_ids, english_lengths = pad([s.english_ids for s in samples])
    prompts, column = torch.tensor([s.prompt_length for s in samples]), torch.arange(ids.shape[1])  # (B,), (T,)
    answer = (column >= prompts[:, None]) & (column < lengths[:, None])  # (B, T)
    labels = ids.masked_fill(~answer, -100)
    return Batch(ids, labels, prompts + connection_index, english_ids, english_lengths + connection_index)


# ---------------------------------------------------------------------------------------------------------- processes

@dataclass
class Workers:
    """The processes of this run, and what this one computes on."""
    rank: int
    world: int
    device: torch.device
    dtype: torch.dtype

    def deal(self, items, size):
        """This process's share of items, in groups of at most `size`: (group, 1), or (some group, 0) to keep in step.

        Every process gets the same number of groups, for all must take part in each forward pass of a sharded model.
        """
        size = min(size, math.ceil(len(items) / self.world))
        groups = [items[i:i + size] for i in range(0, len(items), size)]
        for i in range(self.rank, math.ceil(len(groups) / self.world) * self.world, self.world):
            yield (groups[i], 1) if i < len(groups) else (groups[-1], 0)

    def sum(self, tensor):
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def barrier(self):
        if self.world > 1:
            dist.barrier()

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)


def start_workers(dtype):
    """Join the processes that torchrun started, if it did."""
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT)
    return Workers(rank, world, device, getattr(torch, dtype or ("bfloat16" if device.type == "cuda" else "float32")))


def shard(cc, workers):
    """Spread the model over the processes: each decoder layer, and the rest with the root.

    One forward of the root runs both passes of a step. Weights and optimizer stay float32; layers are gathered in the
    dtype of the computation, gradients reduced in float32. Returns what model.load_weights needs: local(parameter), its
    part here and the rows of the whole that it is.
    """
    low = torch.bfloat16 if workers.dtype == torch.bfloat16 else None
    # Inputs are not cast: Gumbel noise rounded to bfloat16 could choose another layer than in one process.
    policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=low and torch.float32, cast_forward_inputs=False)
    mesh = dist.init_device_mesh(workers.device.type, (workers.world,))
    for module in [*cc.lm.model.layers, cc]:
        fully_shard(module, mesh=mesh, mp_policy=policy)
    register_fsdp_forward_method(cc, "activations")

    def local(parameter):
        part = parameter.detach().to_local()
        start = workers.rank * math.ceil(len(parameter) / workers.world)  # dimension 0 in equal parts, the last shorter
        return part, slice(start, start + len(part))
    return local


def let_go(cc):
    """After passes without a backward: drop the root's gathered weights, which are not the optimizer's parameters."""
    if isinstance(cc, FSDPModule):
        cc.reshard()


def gathered(parameter):
    """A parameter as a whole on the CPU. Every process must call it."""
    parameter = parameter.detach()
    return (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).cpu()


def memory_plan(args):
    """Bytes that each of --memory_plan processes holds in training, by name. Activations come on top."""
    world, lm = args.memory_plan, empty_model(args.model)
    config = lm.config
    layer = sum(p.numel() for p in lm.model.layers[0].parameters())
    rest = sum(p.numel() for name, p in lm.named_parameters() if ".layers." not in name)
    part = sum(math.ceil(len(p) / world) * p[0].numel() for p in lm.parameters())
    low = 4 if args.dtype == "float32" else 2  # bytes of a number in the dtype of the computation
    rows = min(args.micro_batch, math.ceil(args.batch_size / world))
    tokens = rows * (args.max_length or min(1024, config.max_length))
    if world > 1:  # weights of the root and two layers are gathered, gradients of one group reduced in float32
        weights, reduced = low * (rest + 2 * layer), (low + 4) * max(rest, layer)
    else:  # autocast's copies of what is multiplied, which is all but the embedding
        multiplied = config.num_hidden_layers * layer + config.vocab_size * config.hidden_size
        weights, reduced = low * multiplied if low == 2 else 0, 0
    return {
        "parameters, float32": 4 * part,
        "gradients, float32": 4 * part,
        "AdamW's two moments": 8 * part,
        "weights in the dtype of the computation": weights,
        "gradients while they are reduced": reduced,
        "logits, were all tokens answer": 3 * 4 * tokens * config.vocab_size,  # they, their log-softmax, its gradient
    }


# ------------------------------------------------------------------------------- validation and the Transform Matrix

@torch.no_grad()
def validation_loss(cc, samples, tokenizer, workers, micro_batch, connection):
    """Mean loss per answer token, the layer being the Decision Maker's argmax."""
    samples = sorted(samples, key=lambda s: -len(s.ids))
    total = torch.zeros(2, dtype=torch.float64, device=workers.device)  # loss, answer tokens
    for group, real in workers.deal(samples, micro_batch):
        batch = Batch(*(t.to(workers.device) for t in collate(group, tokenizer.connection_index)))
        with workers.autocast():
            loss = cc(batch, connection)
        total += real * torch.stack((loss, (batch.labels != -100).sum())).double()
    let_go(cc)
    loss, count = workers.sum(total).tolist()
    return loss / count


@torch.no_grad()
def fit_matrices(cc, samples, tokenizer, workers, args):
    """Fit the Transform Matrices on a seeded draw of the samples that are not English.

    Returns {name: W (d, d)} and what to note of the fit; R^2 is measured on HELD_OUT prompts that are not in it.
    """
    foreign = [s for s in samples if not s.is_english]
    order = np.random.default_rng((args.seed, len(samples))).permutation(len(foreign))
    held_out = min(HELD_OUT, len(foreign) // 5)
    chosen = [foreign[i] for i in order[:held_out + args.matrix_prompts]]
    test, fit = (sorted(part, key=lambda s: -s.prompt_length) for part in (chosen[:held_out], chosen[held_out:]))

    def name(sample):
        return sample.lang if args.per_language else "shared"

    def activations(group):
        """X and Y (L, B, d) of samples (B)."""
        sides = pad([s.ids[:s.prompt_length] for s in group]), pad([s.english_ids for s in group])
        with workers.autocast():
            return [cc.activations(ids.to(workers.device), (lengths + tokenizer.connection_index).to(workers.device))
                    for ids, lengths in sides]

    sums = MatrixSums(sorted({name(s) for s in fit}), cc.lm.config.hidden_size, workers.device)
    dealt = list(workers.deal(fit, args.micro_batch))
    for group, real in tqdm(dealt, "matrix", disable=workers.rank > 0 or None):
        own, english = activations(group)
        sound = (own.isfinite() & english.isfinite()).all(2).all(0)  # (B,); a broken sample would ruin the matrix
        if real and sound.any():
            names = [name(s) for s, kept in zip(group, sound.tolist(), strict=True) if kept]
            sums.add(own[:, sound], english[:, sound], names)
    for pair in sums.sums.values():
        workers.sum(pair)
    matrices = sums.solve(args.ridge)
    note = {"prompts": len(fit), "ridge": args.ridge, "held_out": len(test)}
    if args.per_language:
        note["prompts_per_language"] = {lang: sum(s.lang == lang for s in fit) for lang in sums.sums}
    if test:  # on every process the same, few as they are
        groups = [activations(test[i:i + args.micro_batch]) for i in range(0, len(test), args.micro_batch)]
        own, english = (torch.cat(side, dim=1) for side in zip(*groups, strict=True))
        found = r_squared(matrices["shared"], own, english).tolist()
        note["r_squared"] = [round(r, 4) if math.isfinite(r) else None for r in found]  # None: no variance to explain
    let_go(cc)
    return matrices, note


# ------------------------------------------------------------------------------------------------ stopping and going on

def run_state(cc, optimizer):
    """All that a run goes on from, by name: weights and AdamW's moments, to be written, or read in place.

    Order of the samples, learning rate and Gumbel noise follow from the seed and the step.
    """
    state = {}
    for name, p in cc.named_parameters():
        state[name] = p.detach()
        if p.requires_grad:
            moments = optimizer.state[p]
            if not moments:  # as AdamW starts them
                moments.update(step=torch.zeros((), device=p.device), exp_avg=torch.zeros_like(p),
                               exp_avg_sq=torch.zeros_like(p))
            state.update({f"{name}.{key}": value for key, value in moments.items()})
    return state


def save_run(folder, step, state, note, keep, workers):
    """Write FOLDER/step-N, whole or not at all, and remove all but the newest `keep`.

    Its parts are torch.distributed.checkpoint's, whose index is a pickle: a checkpoint is for whoever wrote it, and
    never leaves the user's --out.
    """
    target, partial = folder / f"step-{step:07d}", folder / f"step-{step:07d}.tmp"
    if target.exists():
        return
    try:
        if workers.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            write_text(partial / "run.json", json.dumps(note))
        workers.barrier()
        dcp.save(state, storage_writer=dcp.FileSystemWriter(partial, sync_files=True), no_dist=workers.world == 1)
        if workers.rank == 0:
            partial.rename(target)
            sync(folder)
            for old in checkpoints(folder)[:-keep]:
                shutil.rmtree(old.rename(old.with_suffix(".tmp")))
    except (OSError, CheckpointException) as error:
        if workers.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise UserError(f"{target}: cannot be written ({last_line(error)}); make room, go on with --resume") from None


def checkpoints(folder):
    """The complete checkpoints in a folder, oldest first."""
    found = [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{7}", path.name)]
    return sorted(path for path in found if (path / ".metadata").exists())


def load_run(path, state, note, workers):
    """Read a checkpoint into `state` in place, having made sure that it is of the same run. Returns its step."""
    saved = read_json(path / "run.json")
    for name in note:
        if saved.get(name) != note[name]:
            raise UserError(f"{path}: was written with another --{name} ({saved.get(name)}, now {note[name]}); give "
                            "the same, or another --out")
    try:
        dcp.load(state, storage_reader=dcp.FileSystemReader(path), no_dist=workers.world == 1)
    except (Exception, CheckpointException) as error:  # a damaged file can make the reader raise anything
        raise UserError(f"{path}: damaged ({last_line(error)}); remove it to resume from the one before it") from None
    return int(path.name.removeprefix("step-"))


def last_line(error):
    """What an error says in the end; of several processes' errors, the first one's."""
    failures = list(getattr(error, "failures", {}).values())
    error = failures[0][0] if failures else error
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


def open_log(out, start, resumed):
    """train_log.jsonl, with the lines up to step `start` of the run that is resumed; other leftovers are removed."""
    lines = []
    if resumed and (out / "train_log.jsonl").exists():
        for line in read_text(out / "train_log.jsonl").splitlines():
            try:
                lines += [line] if json.loads(line)["step"] <= start else []
            except (ValueError, KeyError):
                pass  # cut short, or of the end of a run
    elif not resumed:
        shutil.rmtree(out / "checkpoints", ignore_errors=True)
    for left in [out / "saving.tmp", *(out / "checkpoints").glob("*.tmp")]:
        shutil.rmtree(left, ignore_errors=True)
    write_text(out / "train_log.jsonl", "".join(line + "\n" for line in lines))
    return open(out / "train_log.jsonl", "a", encoding="utf-8")


# --------------------------------------------------------------------------------------------------------------- main

def learning_rate(step, steps, peak):
    """Linear over the first tenth of the steps, then a cosine to 0."""
    warmup = math.ceil(WARMUP * steps)
    done = max(0, step - warmup) / max(1, steps - warmup)  # share of the cosine
    return peak * min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * done))


def finite(number):
    return number if math.isfinite(number) else None  # JSON has no other numbers


def check(args, out, say):
    """Refuse whatever the user gave that cannot work, before any work is done.

    Returns configuration, tokenizer, samples, validation samples and a digest of the samples; None if `out` holds the
    result of this run already.
    """
    check_folder(out)
    held = None  # what the model in `out` was made with; None also where it was being written when the run died
    if holds_model(out) and not (out / "saving.tmp").exists():
        held = Config.read(out).cctuning
    before = (held or {}).get("arguments", {})
    replaceable = args.overwrite or (args.embedded and before.get("embedded") is True)
    if held is not None and not (replaceable or args.resume):
        raise UserError(f"{out}: holds a model already; give another --out, or --overwrite to replace it")
    if checkpoints(out / "checkpoints") and not (args.overwrite or args.resume):
        raise UserError(f"{out}/checkpoints: a run was stopped; go on with --resume, or start anew with --overwrite")
    unused = [name for name, default in CC_ONLY.items() if args.method == "sft" and getattr(args, name) != default]
    if unused or (args.method == "sft" and args.epochs == 0):
        raise UserError(f"--method sft: does nothing with --{(unused or ['epochs 0'])[0]}; leave one of the two out")
    config = Config.read(args.model)
    layers, max_length = config.num_hidden_layers, args.max_length or min(1024, config.max_length)
    if max_length > config.max_length:
        raise UserError(f"--max_length: {max_length} is more than {args.model} takes, {config.max_length}; lower it")
    if args.source_layer not in (None, "decision_maker", "random", *range(layers)):
        raise UserError(f"--source_layer: {args.source_layer} is none of decision_maker, random and 0 to {layers - 1}")
    tokenizer = Tokenizer(args.model, config, args.template)
    if tokenizer.notice:
        say(tokenizer.notice)
    samples, dropped = read_samples(args.data, tokenizer, max_length)
    eval_samples, eval_dropped = read_samples(args.eval_data, tokenizer, max_length) if args.eval_data else ([], 0)
    for file, kept, gone in ((args.data, samples, dropped), (args.eval_data, eval_samples, eval_dropped)):
        if gone:
            say(f"{file}: {gone} of {len(kept) + gone} samples dropped, their prompts leave no room for an answer in "
                f"{max_length} tokens")
        if cut := sum(s.ids[-1] != tokenizer.end_of_turn for s in kept):
            say(f"{file}: {cut} answers cut at {max_length} tokens")
    digest = hashlib.sha256()
    for s in samples:
        digest.update(repr(s).encode())
    digest = digest.hexdigest()  # tells whether a resumed run has the same data
    if args.resume and held is not None:
        same = all(before.get(name) == value for name, value in vars(args).items() if name not in FREE)
        if same and held.get("data") == digest:
            return None
        if not replaceable:
            raise UserError(f"{out}: holds another run's model; give another --out, or --overwrite to replace it")
    foreign = [s for s in samples if not s.is_english]
    if args.method == "cc" and not foreign:
        raise UserError(f"{args.data}: every instruction equals its instruction_en, the Transform Matrix needs other "
                        "languages; add some, or give --method sft")
    if args.per_language and not all(s.lang for s in foreign):
        raise UserError(f'{args.data}: --per_language needs a "lang" in every sample; add it')
    return config, tokenizer, samples, eval_samples, digest


def run(args, stopped):
    """Check, train, fit, save.

    After the step in which `stopped` is no longer empty, a checkpoint is written and the run ends; once all steps are
    done, fit and saving are carried through.
    """
    workers = start_workers(args.dtype)
    main_process = workers.rank == 0
    say = print if main_process else lambda *_: None

    out = Path(args.out)
    checked = check(args, out, say)
    if checked is None:
        return say(f"{out}: holds the result of this run already")
    config, tokenizer, samples, eval_samples, digest = checked
    cc = load_cctuning(args.model, torch.float32, workers.device, args.seed,
                       partial(shard, workers=workers) if workers.world > 1 else None)
    if args.method == "cc" and args.epochs == 0 and not cc.trained:
        raise UserError(f"{args.model}: has no Decision Maker that a matrix could serve; train it first (--epochs 1)")
    cc.source_layer = cc.source_layer if args.source_layer is None else args.source_layer
    if args.method == "sft" or cc.source_layer != "decision_maker":
        cc.decision_maker.requires_grad_(False)
    if args.checkpoint_activations:
        for layer in cc.lm.model.layers:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    connections = ("english", "matrix", "none") if args.method == "cc" else ("none",)  # trained by the first

    # Train, from the start or from where a run was stopped.
    steps = [(epoch, s) for epoch in range(args.epochs) for s in plan(samples, args.batch_size, args.seed, epoch)]
    parameters = [p for p in cc.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True)
    note = {name: value for name, value in vars(args).items() if name not in FREE}
    note |= {"dtype": str(workers.dtype), "data": f"{args.data} {digest}"}
    start, resumable = 0, checkpoints(out / "checkpoints") if args.resume else []
    if resumable:
        start = load_run(resumable[-1], run_state(cc, optimizer), note, workers)
    workers.barrier()  # all have looked: now the first may change something
    log = open_log(out, start, resumable) if main_process else None

    def record(**entry):
        if log:
            log.write(json.dumps(entry) + "\n")
            log.flush()

    say(f"{args.method} on {workers.world} x {workers.device.type}, {str(workers.dtype).removeprefix('torch.')}: "
        f"{len(samples)} samples, template {tokenizer.template}, {len(steps)} steps"
        + (f", resumed after step {start}" if start else ""))
    skipped = skipped_in_all = 0  # steps: in a row, and together
    progress = tqdm(total=len(steps), initial=start, desc="train ", disable=None if main_process and steps else True)
    for step, (epoch, numbers) in list(enumerate(steps))[start:]:
        began, lr = time.perf_counter(), learning_rate(step, len(steps), args.lr)
        for group in optimizer.param_groups:
            group["lr"] = lr
        chosen = [samples[i] for i in numbers]
        targets = sum(len(s.ids) - s.prompt_length for s in chosen)  # in the whole step: no mean of means
        total = torch.zeros(2, device=workers.device)  # loss, processes that were told to stop
        for group, real in workers.deal(numbers, args.micro_batch):
            batch = collate([samples[i] for i in group], tokenizer.connection_index)
            batch = Batch(*(t.to(workers.device) for t in batch))
            noise = gumbel_noise(args.seed, step, group, config.num_hidden_layers).to(workers.device)  # (B, L)
            with workers.autocast():
                loss = cc(batch, connections[0], noise, args.english_grad) * real
            (loss * workers.world / targets).backward()  # sharded gradients are averaged over processes: undo that
            total[0] += loss.detach()
        total[1] = bool(stopped)
        loss, stopping = workers.sum(total).tolist()
        loss /= targets
        norm = torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM)
        norm = (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
        if math.isfinite(loss) and math.isfinite(norm):
            optimizer.step()
            skipped = 0
        else:
            skipped, skipped_in_all = skipped + 1, skipped_in_all + 1
            say(f"step {step + 1} skipped: loss {loss}, gradient norm {norm}")
        optimizer.zero_grad()
        if skipped == MAX_SKIPPED:
            raise UserError(f"{args.data}: no finite loss or gradient in {skipped} steps up to {step + 1}; lower --lr, "
                            "or look for broken samples")

        tokens = sum(len(s.ids) + (args.method == "cc") * len(s.english_ids) for s in chosen)
        speed = tokens / (time.perf_counter() - began)
        record(step=step + 1, epoch=epoch, loss=finite(loss), lr=lr, grad_norm=finite(norm),
               tokens_per_s=round(speed, 1), skipped=skipped > 0)
        progress.update()
        last, width = step + 1 == len(steps), len(str(len(steps)))
        if main_process and (last or (step + 1) % args.log_every == 0):
            progress.write(f"step {step + 1:>{width}}/{len(steps)}  loss {loss:7.4f}  lr {lr:8.2e}  grad {norm:8.3f}  "
                           f"{speed:8.0f} tokens/s")
        if eval_samples and not last and steps[step + 1][0] != epoch:  # after the last epoch: below
            found = validation_loss(cc, eval_samples, tokenizer, workers, args.micro_batch, connections[0])
            record(step=step + 1, epoch=epoch, eval_loss={connections[0]: finite(found)})
            if main_process:
                progress.write(f"epoch {epoch + 1}/{args.epochs}: validation loss {found:.4f} {connections[0]}")
        save = args.save_every and not skipped and (last or (step + 1) % args.save_every == 0)
        if stopping or save:  # after the last step too: fit and saving may be cut short
            save_run(out / "checkpoints", step + 1, run_state(cc, optimizer), note, args.keep, workers)
        if stopping:
            progress.close()
            say(f"stopped after step {step + 1} of {len(steps)}, saved in {out}/checkpoints; the same command with "
                "--resume goes on")
            workers.barrier()
            raise SystemExit(128 + (stopped or [signal.SIGTERM])[0])
    progress.close()
    if skipped_in_all:
        say(f"{skipped_in_all} steps were skipped, their loss or gradient was not finite; look for broken samples")

    # Fit the Transform Matrix.
    entry = {"data": digest, "template": tokenizer.template, "method": args.method, "source_layer": cc.source_layer,
             "arguments": vars(args)}
    extra = None
    if args.method == "cc":
        cc.matrices, entry["matrix"] = fit_matrices(cc, samples, tokenizer, workers, args)
        entry["languages"] = sorted({s.lang for s in samples if s.lang})
        matrices = {name: w.cpu() for name, w in cc.matrices.items()}
        extra = cctuning_tensors(gathered(cc.decision_maker.weight), matrices)
        shown = " ".join("-" if r is None else f"{r:.2f}" for r in entry["matrix"].get("r_squared", []))
        say(f"matrix: fitted on {entry['matrix']['prompts']} prompts, R^2 per layer on {entry['matrix']['held_out']} "
            f"others {shown}")
        record(matrix=entry["matrix"])
    if eval_samples:
        found = {c: validation_loss(cc, eval_samples, tokenizer, workers, args.micro_batch, c) for c in connections}
        record(eval_loss={name: finite(value) for name, value in found.items()})
        say("validation loss: " + ", ".join(f"{value:.4f} {name}" for name, value in found.items()))

    # Save. Every process gathers the weights, the first one writes them.
    tensors = ((name, gathered(p).to(cc.lm.stored[name])) for name, p in cc.lm.named_parameters())
    if main_process:
        try:
            save_checkpoint(out, args.model, tensors, entry, extra, int(1e9 * args.max_shard_size))
        except (OSError, SafetensorError) as error:
            shutil.rmtree(out / "saving.tmp", ignore_errors=True)
            raise UserError(f"{out}: cannot be written ({last_line(error)}); make room, then run again"
                            + (" with --resume" if args.save_every else "")) from None
        log.close()
    else:
        for _ in tensors:
            pass
    say(f"saved to {out}\nnext: python infer.py" + ("" if args.out == "out" else f" --model {out}")
        + (" --lang sw" if args.embedded else " --prompt ..."))
    workers.barrier()
    if workers.world > 1:
        dist.destroy_process_group()


def main():
    args = parse_args()
    if args.memory_plan:
        sizes = memory_plan(args)
        for what, size in [*sizes.items(), ("together, activations come on top", sum(sizes.values()))]:
            print(f"{size / 1e9:8.2f} GB  {what}")
        return
    stopped, default = [], {signal.SIGTERM: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}

    def stop(number, frame):
        stopped.append(number)
        signal.signal(number, default[number])  # a second one ends the run at once

    before = {number: signal.signal(number, stop) for number in default}
    try:
        run(args, stopped)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    run_script(main, speak=os.environ.get("LOCAL_RANK", "0") == "0")
