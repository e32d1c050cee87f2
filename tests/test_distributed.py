"""Several processes: the results of one, a share of the memory each, and no waiting for one that ended."""
import json
import re
import resource
import shutil
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from conftest import (PAIRS, ROOT, UNEVEN, at_step, launch, logged, losses, results_of, same,
                      saved_steps, tensors, training, worst_difference, write_checkpoint, write_data)
from model import choose_device

METHODS = {  # ridge: 9 prompts do not determine the matrix
    "cc": {"ridge": 0.1}, "cc, English gradients": {"english_grad": True, "ridge": 0.1},
    "sft": {"method": "sft"}}
SPLIT = {  # what one process does without
    "cc": {"checkpoint_activations": True}, "cc, English gradients": {"micro_batch": 2},
    "sft": {"micro_batch": 2, "checkpoint_activations": True}}
WATCH = """
import json, os, torch.distributed.fsdp as fsdp
from torch.optim.optimizer import register_optimizer_step_pre_hook
groups, steps, fully_shard = [], [], fsdp.fully_shard
def watched(module, **options):
    policy = options.get("mp_policy")
    groups.append([str(policy and policy.param_dtype), str(policy and policy.reduce_dtype)])
    return fully_shard(module, **options)
def see(optimizer, *_):
    held = [p for group in optimizer.param_groups for p in group["params"]]
    steps.append([sum(p.numel() for p in held), sum(p.to_local().numel() for p in held),
                  sorted({str(x.dtype) for p in held for x in (p, p.grad)})])
fsdp.fully_shard = watched
register_optimizer_step_pre_hook(see)
"""
SEEN = 'json.dump([groups, steps], open(f"{__file__}.{os.environ[\'RANK\']}", "w"))'


@pytest.fixture(scope="module")
def alone(ran, tmp_path_factory):
    """The runs of one process, of 21 steps each; train and answer make the commands for several."""
    base = tmp_path_factory.mktemp("alone")
    model, data = write_checkpoint(base / "model"), write_data(base / "data.jsonl", UNEVEN)
    held = write_data(base / "held.jsonl", [(own + "?", *rest) for own, *rest in PAIRS[:5]])

    def train(out, method, **options):
        return training(model, data, out, lr=1e-3, epochs=7, eval_data=held, **METHODS[method], **options)

    def answer(out):
        return ["eval", "--model", base / "cc", "--data", ROOT / "data" / "dev", "--out", out / "eval",
                "--langs=sw,zh", "--limit=7", "--max_new_tokens=5", "--batch_size=3"]
    for command in (*(train(base / method, method) for method in METHODS), answer(base)):
        ran(*command)
    return SimpleNamespace(base=base, train=train, answer=answer)


@pytest.fixture(scope="module", params=[2, 4])
def several(request, alone, tmp_path_factory):
    """The same runs by 2 and by 4 processes, started once, and what each rank saw."""
    world, folder = request.param, tmp_path_factory.mktemp("several")
    commands = [alone.train(folder / method, method, **own) for method, own in SPLIT.items()]
    commands += [alone.train(folder / "low", "cc", dtype="bfloat16"), alone.answer(folder)]
    done = launch(folder, world, commands, before=WATCH, after=SEEN, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    seen = [json.loads((folder / f"worker.py.{rank}").read_text()) for rank in range(world)]
    return SimpleNamespace(world=world, folder=folder, seen=seen)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_training_equals_one_process(alone, several, method):
    """Catches gradients, noise, rows or validation losses that depend on the number of processes."""
    found, expected = several.folder / method, alone.base / method
    assert len(losses(expected)) == 21 and np.abs(losses(found) - losses(expected)).max() < 1e-5
    assert np.abs(logged(found, "grad_norm") / logged(expected, "grad_norm") - 1).max() < 1e-4
    assert worst_difference(tensors(found), tensors(expected)) < 1e-4
    measured, wanted = logged(found, "eval_loss"), logged(expected, "eval_loss")
    assert len(measured) == 7 and list(measured) == [pytest.approx(one, abs=1e-5) for one in wanted]


@pytest.mark.slow
def test_the_rest_equals_one_process(alone, several):
    """Catches answers lost or out of order, and weights saved as they were gathered, in bfloat16."""
    one, given = ([path.read_text() for path in sorted((folder / "eval" / "answers").rglob("*.jsonl"))]
                  for folder in (alone.base, several.folder))
    assert one == given and len(one) == 2
    assert results_of(alone.base / "eval") == results_of(several.folder / "eval")
    difference = np.abs(losses(several.folder / "low") / losses(alone.base / "cc") - 1)
    assert 0 < difference.mean() < 0.01  # single steps, some of one sample, are noisy
    saved = tensors(several.folder / "low")["model.embed_tokens.weight"]
    assert not saved.equal(saved.bfloat16().float())


@pytest.mark.slow
def test_each_process_holds_a_share(several):
    """Catches a part that every process keeps whole, layers gathered all at once, gradients in bfloat16."""
    for groups, steps in several.seen:
        assert len(groups) % 5 == 0  # each of the four layers by itself, and the rest
        low = ["torch.bfloat16", "torch.float32"]
        assert groups.count(low) == 5 and all(group in (low, ["None", "None"]) for group in groups)
        assert len(steps) == 4 * 21 and all(kinds == ["torch.float32"] for _, _, kinds in steps)
        assert all(abs(part * several.world / whole - 1) < 0.01 for whole, part, _ in steps)


# --------------------------------------------------------------------------------- killed, told to stop

long = partial(training, lr=1e-3, epochs=4, micro_batch=2, save_every=3, ridge=0.1)  # 12 steps


@pytest.mark.slow
def test_killed_and_resumed(checkpoint, ran, tmp_path):
    """Catches a resumed run with other bits, or on one process other results, and waiting for the killed."""
    data = write_data(tmp_path / "data.jsonl", UNEVEN)
    mine, killed = partial(long, checkpoint(), data, eval_data=data), tmp_path / "killed"
    assert launch(tmp_path, 2, [mine(tmp_path / "whole")]).returncode == 0
    kill = at_step(10, "os.kill(os.getpid(), signal.SIGKILL)")
    done = launch(tmp_path, 2, [mine(killed)], before=kill, timeout=100)
    assert done.returncode != 0 and "SIGKILL" in done.stderr and saved_steps(killed) == [6, 9]
    ran(*mine(shutil.copytree(killed, tmp_path / "one"), resume=True))
    done = launch(tmp_path, 2, [mine(killed, resume=True)])
    assert done.returncode == 0 and "resumed after step 9" in done.stdout, done.stderr[-3000:]
    assert same(tmp_path / "whole", killed) and saved_steps(killed) == [9, 12]
    for folder in (killed, tmp_path / "one"):
        assert len(losses(folder)) == 12
        assert np.abs(losses(folder) - losses(tmp_path / "whole")).max() < 1e-5
        assert worst_difference(tensors(folder), tensors(tmp_path / "whole")) < 1e-4


@pytest.mark.slow
def test_stopped_and_resumed_by_more(checkpoint, run, tmp_path, stop_at):
    """Catches a checkpoint of one process that two cannot read, and processes that do not agree to stop."""
    mine, out = partial(long, checkpoint(), write_data(tmp_path / "data.jsonl", UNEVEN)), tmp_path / "out"
    assert run(*mine(tmp_path / "whole"))[0] == 0
    stop_at(2)
    run(*mine(out))
    stop = at_step(6, "os.kill(os.getpid(), signal.SIGTERM)")
    done = launch(tmp_path, 2, [mine(out, resume=True)], before=stop, timeout=100)
    step = re.search(r"stopped after step ([7-9]) of 12", done.stdout)
    assert done.returncode != 0 and step and saved_steps(out)[-1] == int(step[1]), done.stderr[-3000:]
    assert run(*mine(out, resume=True))[0] == 0
    assert worst_difference(tensors(out), tensors(tmp_path / "whole")) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("fault, culprit", [
    ("data", "data.jsonl:1"), ("out", "files of others"), ("disk", "")])
def test_one_line_for_an_error(checkpoint, tmp_path, fault, culprit):
    """Catches an error shown by each process, one of rank 0 that the others wait for, and a traceback."""
    data, out = write_data(tmp_path / "data.jsonl", UNEVEN), tmp_path / "out"
    if fault == "data":
        data.write_text('{"instruction": "a"}')
    if fault == "out":
        out.mkdir()
        (out / "notes.txt").write_text("mine")
    script, *given = training(checkpoint(), data, out, epochs=1, ridge=0.1)
    largest = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (90_000, 90_000))  # bytes of a file
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
         ROOT / f"{script}.py", *given], capture_output=True, text=True, timeout=100,
        preexec_fn=largest if fault == "disk" else None)
    ours = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode != 0 and len(ours) == 1 and culprit in ours[0], done.stderr[-3000:]
    assert done.stderr.count("Traceback") == 1  # torchrun's own


def test_how_a_process_of_several_ends(monkeypatch):
    """Catches an interpreter that shuts down: gloo's threads then abort it, in one of six runs."""
    code = "import atexit, os, sys, model; atexit.register(os.abort); model.run_script(lambda: sys.exit(3))"
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 3


LLAMA_8B = {"model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
            "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
            "max_position_embeddings": 131072, "rope_theta": 500000.0, "tie_word_embeddings": False}
LAYER = 4096 * (4096 * 2 + 1024 * 2 + 14336 * 3 + 2)  # numbers in a layer
REST = 2 * 128256 * 4096 + 4096


@pytest.mark.parametrize("options, world, copies, reduced, tokens", [
    ({}, 1, 2 * (32 * LAYER + REST), 0, 4096), ({"dtype": "float32"}, 1, 0, 0, 4096),
    ({"dtype": "float32", "max_length": 150000}, 8, 4 * (REST + 2 * LAYER), 8 * REST, 4 * 131072),
    ({"micro_batch": 8, "batch_size": 24, "max_length": 512}, 8, 2 * (REST + 2 * LAYER), 6 * REST, 1536)])
def test_memory_plan(tmp_path, ran, options, world, copies, reduced, tokens):
    """Catches a plan that forgets or miscounts what a process holds. For Llama-3.1-8B, in bytes."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    options = {"dtype": "bfloat16", "micro_batch": 4, **options, "memory_plan": world}
    said = ran("train", "--model", tmp_path, *(f"--{name}={value}" for name, value in options.items()))
    part = (32 * LAYER + REST) / world  # of 8.03 billion parameters
    sizes = [4 * part, 4 * part, 8 * part, copies, reduced, 3 * 4 * tokens * 128256]
    shown = [float(line.split(" GB  ")[0]) for line in said.splitlines()]
    assert shown == pytest.approx([size / 1e9 for size in [*sizes, sum(sizes)]], abs=0.02)


def test_gpu_of_a_process(monkeypatch):
    """Catches a process on another's GPU, and cuDNN's attention left on."""
    taken, allowed = [], []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", allowed.append)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert choose_device() == torch.device("cuda", 1)
    assert taken == [torch.device("cuda", 1)] and allowed == [False]
