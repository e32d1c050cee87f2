"""Several processes: the same results as one, a share of the memory each, and no hanging when one does."""
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from conftest import (PAIRS, ROOT, UNEVEN, at_step, json_lines, launch, logged, losses, results_of, tensors,
                      training, worst_difference, write_checkpoint, write_data)
from model import UserError, choose_device

LLAMA_8B = {"model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
            "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
            "max_position_embeddings": 131072, "rope_theta": 500000.0, "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False}
METHODS = {  # ridge: 9 prompts do not determine the matrix
    "cc": {"ridge": 0.1}, "cc, English gradients": {"english_grad": True, "ridge": 0.1},
    "sft": {"method": "sft"}}
CASES = {  # name: (processes, method, what one process does without), pairs of choices with one another
    "2 a": (2, "cc", {"checkpoint_activations": True}),
    "2 b": (2, "cc, English gradients", {"micro_batch": 2, "max_shard_size": 1e-4}),
    "2 c": (2, "sft", {"micro_batch": 2, "checkpoint_activations": True}),
    "4 a": (4, "cc", {"micro_batch": 1}),
    "4 b": (4, "cc, English gradients", {"checkpoint_activations": True}),
    "4 c": (4, "sft", {}),
}
LOG = "train_log.jsonl"
WATCH = """
import json, os
import torch.distributed.fsdp as fsdp
from torch.optim.optimizer import register_optimizer_step_pre_hook
place, groups, steps, fully_shard = sys.argv[1], [], [], fsdp.fully_shard
def watched(module, **options):
    policy = options.get("mp_policy")
    groups.append([str(policy and policy.param_dtype), str(policy and policy.reduce_dtype)])
    return fully_shard(module, **options)
def look(optimizer, *_):
    held = [p for group in optimizer.param_groups for p in group["params"]]
    steps.append([sum(p.numel() for p in held), sum(p.to_local().numel() for p in held),
                  sorted({str(x.dtype) for p in held for x in (p, p.grad)})])
fsdp.fully_shard = watched
register_optimizer_step_pre_hook(look)
"""
SEEN = """
json.dump([groups, steps], open(place + os.environ["RANK"], "w"))
"""


def head(path, count):
    """The first samples of the embedded training data, in a file of their own."""
    lines = (ROOT / "data" / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join(lines[:count]), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def alone(ran, tmp_path_factory):
    """The runs of one process. commands(world): the same for several, 21 steps of 6, 6 and 1 samples in turn
    each."""
    base = tmp_path_factory.mktemp("alone")
    model, data, fit = write_checkpoint(base / "model"), base / "data.jsonl", head(base / "fit.jsonl", 110)
    write_data(data, UNEVEN)
    held = write_data(base / "held.jsonl", [(own + "?", *rest) for own, *rest in PAIRS[:5]])

    def train(out, method, **options):
        return training(model, data, out, lr=1e-3, epochs=7, eval_data=held, **METHODS[method], **options)

    def others(out):
        return [training(base / "cc", fit, out / "fit", epochs=0, matrix_prompts=1000),
                ["eval", "--model", base / "cc", "--data", ROOT / "data" / "dev", "--out", out / "eval",
                 "--langs=sw,zh", "--limit=7", "--max_new_tokens=5", "--batch_size=3"]]

    for command in (*(train(base / method, method) for method in METHODS), *others(base)):
        ran(*command)
    return SimpleNamespace(base=base, train=train, others=others)


@pytest.fixture(scope="module", params=[2, 4])
def several(request, alone, tmp_path_factory):
    """The same runs by 2 and by 4 processes, started once: world, folder, and what each rank saw."""
    world, folder = request.param, tmp_path_factory.mktemp("several")
    cases = {name: case for name, case in CASES.items() if case[0] == world}
    commands = [alone.train(folder / name, method, **own) for name, (_, method, own) in cases.items()]
    commands += [alone.train(folder / "low", "cc", dtype="bfloat16"), *alone.others(folder)]
    done = launch(folder, world, commands, before=WATCH, after=SEEN)
    assert done.returncode == 0, done.stderr[-3000:]
    seen = [json.loads((folder / f"commands.json{rank}").read_text()) for rank in range(world)]
    return SimpleNamespace(world=world, folder=folder, seen=seen)


@pytest.mark.slow
def test_training_equals_one_process(alone, several):
    """Catches gradients summed or averaged wrongly, a mean of means, Gumbel noise that depends on the
    process, a process without a sample in the last step, a layer whose recomputation differs, rows of a
    sharded weight read from the wrong place."""
    for name, (world, method, own) in CASES.items():
        if world == several.world:
            expected, found = alone.base / method, several.folder / name
            assert len(losses(expected)) == 21 and np.abs(losses(found) - losses(expected)).max() < 1e-5, name
            assert np.abs(logged(found, "grad_norm") / logged(expected, "grad_norm") - 1).max() < 1e-4, name
            assert worst_difference(tensors(found), tensors(expected)) < 1e-4, name
            assert (len(list(found.glob("model-*.safetensors"))) > 1) == ("max_shard_size" in own), name


@pytest.mark.slow
def test_validation_equals_one_process(alone, several):
    """Catches a validation loss over one process's samples only, or one that counts what an idle process
    repeats."""
    for name, (world, method, _) in CASES.items():
        if world == several.world:
            files = (several.folder / name / LOG, alone.base / method / LOG)
            found, expected = ({line.get("step"): line["eval_loss"] for line in json_lines(file)
                                if "eval_loss" in line} for file in files)
            assert len(found) == 7
            assert found == {step: pytest.approx(loss, abs=1e-5) for step, loss in expected.items()}, name


@pytest.mark.slow
def test_bfloat16_is_like_float32(alone, several):
    """Catches float32 weights that are saved as they were gathered, in bfloat16. More than likeness is not
    promised."""
    likeness = np.abs(losses(several.folder / "low") / losses(alone.base / "cc") - 1)
    assert 0 < likeness.mean() < 0.01  # single steps, some of one sample, are noisy
    saved = tensors(several.folder / "low")["model.embed_tokens.weight"]
    assert not saved.equal(saved.bfloat16().float())


@pytest.mark.slow
def test_fit_equals_one_process(alone, several):
    """Catches a matrix that is summed over one process only. 352 rows of 48 numbers: it is determined."""
    one, matrix = (load_file(folder / "fit" / "cctuning.safetensors")["transform_matrix"]
                   for folder in (alone.base, several.folder))
    assert (matrix - one).abs().max() < 1e-6 * one.abs().max()


@pytest.mark.slow
def test_answers_equal_one_process(alone, several):
    """Catches answers in another order, lost or given twice."""
    one, given = ([path.read_text() for path in sorted((folder / "eval" / "answers").rglob("*.jsonl"))]
                  for folder in (alone.base, several.folder))
    assert one == given and len(one) == 2
    assert results_of(alone.base / "eval") == results_of(several.folder / "eval")


@pytest.mark.slow
def test_each_process_holds_a_share(several):
    """Catches a part of the model that every process keeps whole, layers that are gathered all at once,
    weights that are not float32, or gradients that are not reduced in it."""
    for groups, steps in several.seen:
        assert len(groups) % 5 == 0  # each of the four layers by itself, and the rest
        low = ["torch.bfloat16", "torch.float32"]
        assert groups.count(low) == 5 and all(group in (low, ["None", "None"]) for group in groups)
        assert len(steps) == 4 * 21 and all(kinds == ["torch.float32"] for _, _, kinds in steps)
        assert all(abs(part * several.world / whole - 1) < 0.01 for whole, part, _ in steps)


@pytest.mark.slow
def test_the_default_run(tmp_path, ran):
    """Catches the embedded default giving other losses on two processes than on one in its first 20 steps,
    and other answers, in bfloat16 as stored."""
    data = head(tmp_path / "data.jsonl", 640)
    settings = {"batch_size": 32, "micro_batch": 32, "lr": 1e-4, "epochs": 1, "matrix_prompts": 1}

    def commands(n):
        return [training(ROOT / "data" / "base", data, tmp_path / f"train{n}", **settings),
                ["eval", "--model", ROOT / "data" / "tuned", "--data", ROOT / "data" / "test",
                 "--langs=pt,de", "--out", tmp_path / f"eval{n}"]]

    for command in commands(1):
        ran(*command)
    done = launch(tmp_path, 2, commands(2))
    assert done.returncode == 0, done.stderr[-3000:]
    assert results_of(tmp_path / "eval1") == results_of(tmp_path / "eval2")
    one, two = losses(tmp_path / "train1"), losses(tmp_path / "train2")
    assert len(one) == 20 and np.abs(two - one).max() < 1e-5


EMBEDDING, LAYER = 128256 * 4096, 4096 * (4096 * 2 + 1024 * 2 + 14336 * 3 + 2)  # numbers in each
REST = 2 * EMBEDDING + 4096


@pytest.mark.parametrize("options, world, copies, reduced, tokens", [
    ({}, 1, 2 * (32 * LAYER + EMBEDDING), 0, 4 * 1024),
    ({}, 8, 2 * (REST + 2 * LAYER), 6 * REST, 4 * 1024),
    ({"dtype": "float32"}, 1, 0, 0, 4 * 1024),
    ({"dtype": "float32"}, 8, 4 * (REST + 2 * LAYER), 8 * REST, 4 * 1024),
    ({"micro_batch": 8, "batch_size": 24, "max_length": 512}, 8, 2 * (REST + 2 * LAYER), 6 * REST, 3 * 512),
])
def test_memory_plan(tmp_path, ran, options, world, copies, reduced, tokens):
    """Catches a plan that forgets one of the things a process holds, or counts it otherwise. (That it holds
    them: test_each_process_holds_a_share.) For Llama-3.1-8B, in bytes."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    options = {"dtype": "bfloat16", "micro_batch": 4, **options, "memory_plan": world}
    said = ran("train", "--model", tmp_path, *(f"--{name}={value}" for name, value in options.items()))
    part = (32 * LAYER + REST) / world  # of 8.03 billion parameters
    sizes = [4 * part, 4 * part, 8 * part, copies, reduced, 3 * 4 * tokens * 128256]
    shown = [float(line.split(" GB  ")[0]) for line in said.splitlines()]
    assert shown == pytest.approx([size / 1e9 for size in [*sizes, sum(sizes)]], abs=0.02)


@pytest.mark.slow
def test_a_process_that_hangs(checkpoint, tmp_path):
    """Catches the others waiting for ever, or for longer than a quarter of an hour, for one that is there and
    does nothing. (For one that dies: test_resume.py.)"""
    impatient = """
from datetime import timedelta
patient = dist.init_process_group
def meet(*given, timeout, **options):
    assert timeout <= timedelta(minutes=15)
    return patient(*given, timeout=timedelta(seconds=5), **options)
dist.init_process_group = meet
"""
    hang = "signal.signal(signal.SIGTERM, signal.SIG_DFL); time.sleep(90)"  # else torchrun would wait for it
    command = training(checkpoint(), write_data(tmp_path / "data.jsonl", PAIRS), tmp_path / "out", epochs=7)
    done = launch(tmp_path, 2, [command], before=impatient + at_step(3, hang), timeout=60)
    assert done.returncode != 0 and "5000ms" in done.stderr


def test_gpu_of_a_process(monkeypatch):
    """Catches a process on another's GPU, more processes than GPUs, and cuDNN's attention left on."""
    taken, allowed = [], []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(torch.backends.cuda, "enable_cudnn_sdp", allowed.append)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert choose_device() == torch.device("cuda", 1)
    assert taken == [torch.device("cuda", 1)] and allowed == [False]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(UserError, match="3 processes for 2 GPUs"):
        choose_device()
