"""Several processes: the same results as one, a share of the memory each, and no hanging when one does."""
import json
import subprocess
import sys

import numpy as np
import pytest
from safetensors.torch import load_file

import train
from conftest import (PAIRS, ROOT, UNEVEN, at_step, launch, logged, losses, results_of, tensors, training,
                      worst_difference, write_data)

LLAMA_8B = {"model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
            "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
            "max_position_embeddings": 131072, "rope_theta": 500000.0, "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False}
METHODS = {"cc": {}, "cc, English gradients": {"english_grad": True}, "sft": {"method": "sft"}}
CASES = [  # (processes, method, what one process does without): pairwise over accumulation and checkpointing too
    (2, "cc", {"checkpoint_activations": True}),
    (2, "cc, English gradients", {"micro_batch": 2, "max_shard_size": 1e-4}),
    (2, "sft", {"micro_batch": 2, "checkpoint_activations": True}),
    (4, "cc", {"micro_batch": 1}),
    (4, "cc, English gradients", {"checkpoint_activations": True}),
    (4, "sft", {}),
]


def head(path, count):
    """The first samples of the embedded training data, in a file of their own."""
    lines = (ROOT / "data" / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join(lines[:count]), encoding="utf-8")
    return path


@pytest.mark.slow
def test_several_processes_equal_one(checkpoint, tmp_path, run):
    """Catches gradients summed or averaged wrongly, a mean of means, Gumbel noise that depends on the process, a
    process without a sample in the last step, a layer whose recomputation differs, rows of a sharded weight read from
    the wrong place, a matrix summed over one process only, answers in another order. 21 steps, of 6, 6 and 1 samples in
    turn."""
    model, data, fit = checkpoint(), write_data(tmp_path / "data.jsonl", UNEVEN), head(tmp_path / "fit.jsonl", 110)
    tuned = tmp_path / "cc 1"

    def command(out, method, **options):
        return training(model, data, tmp_path / out, lr=1e-3, epochs=7, **METHODS[method], **options)

    def again(world):
        return ["train", "--model", tuned, "--data", fit, "--out", tmp_path / f"fit{world}", "--epochs=0",
                "--dtype=float32"]

    def answers(world):
        return ["eval", "--model", tuned, "--data", ROOT / "data" / "dev", "--out", tmp_path / f"eval{world}",
                "--langs=sw,zh", "--limit=7", "--max_new_tokens=5", "--batch_size=3"]

    for alone in (*(command(f"{method} 1", method) for method in METHODS), again(1), answers(1)):
        assert run(*alone)[0] == 0
    for world in (2, 4):
        cases = {f"{method} {world}": (method, own) for processes, method, own in CASES if processes == world}
        commands = [command(name, method, **own) for name, (method, own) in cases.items()]
        if world == 2:  # bfloat16 promises no more than likeness
            commands.append(command("low", "cc", dtype="bfloat16"))
        done = launch(tmp_path, world, [*commands, again(world), answers(world)])
        assert done.returncode == 0, done.stderr[-3000:]
        for name, (method, own) in cases.items():
            expected, found = tmp_path / f"{method} 1", tmp_path / name
            assert len(losses(expected)) == 21 and np.abs(losses(found) - losses(expected)).max() < 1e-5, name
            assert np.abs(logged(found, "grad_norm") / logged(expected, "grad_norm") - 1).max() < 1e-4, name
            assert worst_difference(tensors(found), tensors(expected)) < 1e-4, name
            assert (len(list(found.glob("model-*.safetensors"))) > 1) == ("max_shard_size" in own)
        likeness = np.abs(losses(tmp_path / "low") / losses(tuned) - 1)
        assert likeness.mean() < 0.01  # single steps, some of one sample, are noisy
        saved = tensors(tmp_path / "low")["model.embed_tokens.weight"]
        assert not saved.equal(saved.bfloat16().float())  # the float32 weights, not what was gathered for the fit
        matrices = [load_file(tmp_path / f"fit{n}" / "cctuning.safetensors")["transform_matrix"] for n in (1, world)]
        assert (matrices[1] - matrices[0]).abs().max() < 1e-6 * matrices[0].abs().max()
        given = [[path.read_text() for path in sorted((tmp_path / f"eval{n}" / "answers").rglob("*.jsonl"))]
                 for n in (1, world)]
        assert given[0] == given[1] and len(given[0]) == 2
        assert results_of(tmp_path / "eval1") == results_of(tmp_path / f"eval{world}")


@pytest.mark.slow
def test_the_default_run(tmp_path, run):
    """Catches the embedded default giving other losses on two processes than on one in its first 20 steps, and other
    answers, in bfloat16 as stored."""
    data = head(tmp_path / "data.jsonl", 640)
    settings = [f"--{name}={train.EMBEDDED[name]}" for name in ("model", "batch_size", "micro_batch", "lr")]

    def commands(n):
        return [["train", *settings, "--data", data, "--out", tmp_path / f"train{n}", "--epochs=1", "--dtype=float32",
                 "--matrix_prompts=1"],
                ["eval", "--model", ROOT / "data" / "tuned", "--data", ROOT / "data" / "test", "--langs=pt,de",
                 "--out", tmp_path / f"eval{n}"]]

    for command in commands(1):
        assert run(*command)[0] == 0
    done = launch(tmp_path, 2, commands(2))
    assert done.returncode == 0, done.stderr[-3000:]
    assert results_of(tmp_path / "eval1") == results_of(tmp_path / "eval2")
    one, two = losses(tmp_path / "train1"), losses(tmp_path / "train2")
    assert len(one) == 20 and np.abs(two - one).max() < 1e-5


def test_memory_plan(tmp_path, run):
    """Catches a part of the model that is kept whole by every process, and a plan that says something else than what is
    done."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import torch, torch.distributed as dist, train
from torch.testing._internal.distributed.fake_pg import FakeStore
from cctuning import CCTuning
from model import empty_model
dist.init_process_group('fake', store=FakeStore(), rank=0, world_size=8)
cc = CCTuning(empty_model({str(tmp_path)!r}))
train.shard(cc, train.Workers(0, 8, torch.device('cpu'), torch.bfloat16))
for module in (cc, *cc.lm.model.layers):
    policy = module._get_fsdp_state()._fsdp_param_group.mp_policy  # its own group: gathered by itself
    assert (policy.param_dtype, policy.reduce_dtype) == (torch.bfloat16, torch.float32)
print(sum(p.numel() for p in cc.lm.parameters()), sum(p.to_local().numel() for p in cc.lm.parameters()))
"""
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True)
    whole, part = map(int, done.stdout.split())
    assert abs(whole / 8.03e9 - 1) < 0.01 and abs(8 * part / whole - 1) < 0.01
    embedding, layer = 128256 * 4096, 4096 * (4096 * 2 + 1024 * 2 + 14336 * 3 + 2)
    rest, logits = 2 * embedding + 4096, 4 * 1024 * 128256 * 4 * 3
    expected = {1: [4 * whole, 4 * whole, 8 * whole, 2 * (32 * layer + embedding), 0, logits],
                8: [4 * part, 4 * part, 8 * part, 2 * (rest + 2 * layer), 6 * rest, logits]}
    command = ["train", "--model", tmp_path, "--dtype=bfloat16", "--micro_batch=4", "--memory_plan"]
    for world, sizes in expected.items():
        code, out, err = run(*command, world)
        assert code == 0, err
        shown = [float(line.split(" GB  ")[0]) for line in out.splitlines()]
        assert shown == pytest.approx([size / 1e9 for size in [*sizes, sum(sizes)]], abs=0.02)


@pytest.mark.slow
def test_a_process_that_hangs(checkpoint, tmp_path):
    """Catches the others waiting for ever for one that is there and does nothing. (For one that dies:
    test_resume.py.)"""
    impatient = "import datetime, train\ntrain.TIMEOUT = datetime.timedelta(seconds=5)\n"
    hang = "signal.signal(signal.SIGTERM, signal.SIG_DFL); time.sleep(90)"  # torchrun waits for who ignores its signal
    command = training(checkpoint(), write_data(tmp_path / "data.jsonl", PAIRS), tmp_path / "out", epochs=7)
    done = launch(tmp_path, 2, [command], before=impatient + at_step(3, hang), timeout=60)
    assert done.returncode != 0 and "5000ms" in done.stderr
