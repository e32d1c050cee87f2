"""Runs that are killed, stopped, starved of disk or fed with poison, and what they leave behind."""
import json
import os
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import train
from conftest import PAIRS, write_checkpoint, write_data
from model import INDEX, UserError, load_model
from test_distributed import WORKER, launch, losses

KILLING = WORKER.replace("\nfor script", """
import os, signal, train
noise = train.gumbel_noise
def die(seed, step, *rest):
    if step == 9 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return noise(seed, step, *rest)
train.gumbel_noise = die
for script""", 1)


def command(model, data, out, *flags):
    return ["train", "--model", model, "--data", data, "--out", out, "--dtype", "float32", "--lr", "1e-3", "--epochs", "7", "--batch_size", "6",
            "--micro_batch", "2", "--matrix_prompts", "40", "--save_every", "4", *flags]  # 13 samples: 21 steps


def everything(folder):
    return {f"{path.name} {name}": tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def same(a, b):
    a, b = everything(a), everything(b)
    return a.keys() == b.keys() and len(a) > 10 and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def data(tmp_path):
    return write_data(tmp_path / "data.jsonl", (PAIRS * 3)[:13])


@pytest.fixture
def stop_at(monkeypatch):
    """stop_at(step): a signal comes while that step is computed."""
    noise = train.gumbel_noise

    def arrange(at, number=signal.SIGTERM):
        sent = []

        def noise_and_signal(seed, step, *rest):
            if step == at and not sent:  # once: a second one would end the process
                sent.append(os.kill(os.getpid(), number))
            return noise(seed, step, *rest)
        monkeypatch.setattr(train, "gumbel_noise", noise_and_signal)
    return arrange


def test_a_killed_run_goes_on(checkpoint, data, tmp_path):
    """Catches moments, step, order of samples or noise that are not what they were: two processes, one of them killed at step 10, are to end with the
    same bits as if nothing had happened. And a checkpoint that a killed run was writing taken for a complete one."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert launch(tmp_path, 2, [command(checkpoint(), data, whole)]).returncode == 0
    assert launch(tmp_path, 2, [command(checkpoint(), data, killed)], KILLING).returncode != 0
    assert [path.name for path in train.checkpoints(killed / "checkpoints")] == ["step-0000004", "step-0000008"]
    (killed / "checkpoints" / "step-0000012.tmp").mkdir()
    with pytest.raises(UserError):
        load_model(killed)
    done = launch(tmp_path, 2, [command(checkpoint(), data, killed, "--resume")])
    assert done.returncode == 0 and "resumed after step 8" in done.stdout, done.stderr[-3000:]
    assert same(whole, killed) and (losses(whole) == losses(killed)).all() and len(losses(whole)) == 21
    assert [path.name for path in train.checkpoints(killed / "checkpoints")] == ["step-0000020", "step-0000021"]
    assert not list(killed.rglob("*.tmp"))


def test_another_number_of_processes(checkpoint, data, tmp_path, run, stop_at):
    """Catches a checkpoint that only as many processes can read as wrote it, and moments given to another parameter."""
    model = checkpoint()
    assert run(*command(model, data, tmp_path / "whole"))[0] == 0
    stop_at(9)
    code, out, _ = run(*command(model, data, tmp_path / "1-2"))
    assert code == 128 + signal.SIGTERM and "stopped after step 10 of 21" in out and "--resume" in out
    killed = command(model, data, tmp_path / "2-1")
    assert launch(tmp_path, 2, [killed], KILLING).returncode != 0
    stop_at(None)
    assert launch(tmp_path, 2, [command(model, data, tmp_path / "1-2", "--resume")]).returncode == 0
    assert run(*killed, "--resume")[0] == 0
    for folder in (tmp_path / "1-2", tmp_path / "2-1"):
        assert len(losses(folder)) == 21 and abs(losses(folder) - losses(tmp_path / "whole")).max() < 1e-5
        found, expected = everything(folder), everything(tmp_path / "whole")
        assert max((found[name] - expected[name]).abs().max() for name in expected if "cctuning" not in name) < 1e-4


def test_what_may_not_change(checkpoint, data, tmp_path, run, stop_at):
    """Catches a resumed run that is a mixture of two, one that starts over what is there unasked, and a finished one that starts again."""
    stop_at(5, signal.SIGINT)
    assert run(*command(checkpoint(), data, tmp_path / "out"))[0] == 128 + signal.SIGINT
    stop_at(None)
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    for flags, culprit in ((["--resume", "--lr=2e-3"], "--lr"), (["--resume", "--seed=1"], "--seed"), (["--resume", "--english_grad"], "--english_grad"),
                           ([], "--resume")):
        code, _, err = run(*command(checkpoint(), data, tmp_path / "out", *flags))
        assert code == 2 and culprit in err and err.count("\n") == 1, err
    own, english, answer, _ = PAIRS[0]
    for other in (PAIRS * 2, [(own, english, answer, "en"), *(PAIRS * 3)[1:13]]):
        write_data(data, other)
        code, _, err = run(*command(checkpoint(), data, tmp_path / "out", "--resume"))
        assert code == 2 and "--data" in err
    assert before == {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    write_data(data, (PAIRS * 3)[:13])
    code, out, err = run(*command(checkpoint(), data, tmp_path / "out", "--resume", "--keep=1", "--checkpoint_activations"))
    assert code == 0 and "resumed after step 6" in out, err
    code, out, _ = run(*command(checkpoint(), data, tmp_path / "out", "--resume"))
    assert code == 0 and "already" in out


def test_one_process_is_told_to_stop(checkpoint, data, tmp_path):
    """Catches processes that do not agree: the others would wait for the one that stopped."""
    stopping = KILLING.replace("os.kill(os.getpid(), signal.SIGKILL)", "sent or sent.append(os.kill(os.getpid(), signal.SIGTERM))").replace(
        "\nnoise =", "\nsent = []\nnoise =")
    done = launch(tmp_path, 2, [command(checkpoint(), data, tmp_path / "out")], stopping, timeout=100)
    assert done.returncode != 0 and "stopped after step 10 of 21" in done.stdout, done.stderr[-3000:]
    assert train.checkpoints(tmp_path / "out" / "checkpoints")[-1].name == "step-0000010"


def test_killed_while_the_result_is_saved(checkpoint, data, tmp_path, run, monkeypatch):
    """Catches a folder half replaced that loads as a model, and a resumed run that takes it for the result: killed before each file is moved into place."""
    class Killed(BaseException):
        pass
    whole, killed, replace = tmp_path / "whole", tmp_path / "killed", Path.replace
    assert run(*command(checkpoint(), data, whole))[0] == 0
    for moved in range(20):
        left = [moved]

        def dying(path, target):
            if Path(target).parent == killed:
                left[0] -= 1
                if left[0] < 0:
                    raise Killed
            return replace(path, target)
        monkeypatch.setattr(Path, "replace", dying)
        try:
            code, out, err = run(*command(checkpoint(), data, killed, "--resume"))
        except Killed:
            monkeypatch.setattr(Path, "replace", replace)
            assert not (killed / INDEX).exists()  # what marks a model as complete comes last
            with pytest.raises(UserError):
                load_model(killed)
            continue
        assert code == 0 and "resumed after step 21" in out and same(whole, killed), err
        break
    assert 3 <= moved < 20


def test_a_damaged_checkpoint(checkpoint, data, tmp_path, run, stop_at):
    """Catches a traceback where a checkpoint cannot be read."""
    stop_at(5)
    run(*command(checkpoint(), data, tmp_path / "out"))
    stop_at(None)
    newest = train.checkpoints(tmp_path / "out" / "checkpoints")[-1]
    for part in newest.glob("*.distcp"):
        part.write_bytes(part.read_bytes()[:1000])
    code, _, err = run(*command(checkpoint(), data, tmp_path / "out", "--resume"))
    assert code == 2 and str(newest) in err and err.count("\n") == 1, err


def test_poison(data, tmp_path, run):
    """Catches one broken sample that ruins every weight, and a run that skips for ever."""
    folder = write_checkpoint(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][3 + 0xE2] = float("inf")  # the byte piece E2: no character of PAIRS has it
    save_file(weights, folder / "model.safetensors")
    poison = ("☠", "skull", "bones", "sw")
    one = write_data(tmp_path / "one.jsonl", [*(PAIRS * 3)[:13], poison])
    code, out, err = run(*command(folder, one, tmp_path / "one", "--seed", "2"))  # with this seed, poison is among the prompts of the fit
    log = [json.loads(line) for line in (tmp_path / "one" / "train_log.jsonl").read_text().splitlines()]
    assert code == 0 and out.count(" skipped: ") == 7 and "7 steps were skipped" in out and 7 == sum(entry.get("skipped", False) for entry in log), err  # once an epoch
    assert all(name.endswith("embed_tokens.weight") or tensor.isfinite().all() for name, tensor in everything(tmp_path / "one").items())
    code, out, err = run(*command(folder, write_data(tmp_path / "all.jsonl", [poison] * 13), tmp_path / "all"))
    assert code == 2 and "all.jsonl" in err and "10 steps" in err and err.count("\n") == 1
    assert not train.checkpoints(tmp_path / "all" / "checkpoints")  # steps that are skipped do not push out a good one


def test_full_disk(checkpoint, data, tmp_path, run):
    """Catches a checkpoint that destroys the one before it, and a traceback, where the disk is full. A tmpfs that holds one checkpoint, not two."""
    small = tmp_path / "small"
    small.mkdir()
    size = sum(p.numel() for p in load_model(checkpoint()).parameters()) * 12 * 3 // 2
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", small], capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs more rights than this user has")
    try:
        code, _, err = run(*command(checkpoint(), data, small / "out", "--keep", "1"))
        assert code == 2 and "checkpoints" in err and "make room" in err and err.count("\n") == 1, err
        assert [path.name for path in (small / "out" / "checkpoints").iterdir()] == ["step-0000004"]
        assert subprocess.run(["mount", "-o", f"remount,size={8 * size}", small]).returncode == 0
        code, out, err = run(*command(checkpoint(), data, small / "out", "--keep", "1", "--resume"))
        assert code == 0 and "resumed after step 4" in out, err
    finally:
        subprocess.run(["umount", small])
