"""Runs that are killed, stopped, starved of disk or fed with poison, and what they leave behind."""
import os
import signal
import subprocess
from functools import partial
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import train
from conftest import (PAIRS, UNEVEN, at_step, launch, logged, losses, same, tensors, training, worst_difference,
                      write_checkpoint, write_data)
from model import INDEX, UserError, load_model

command = partial(training, lr=1e-3, epochs=7, micro_batch=2, save_every=4)  # of 13 samples: 21 steps
KILL = at_step(9, "os.kill(os.getpid(), signal.SIGKILL)")


@pytest.fixture
def data(tmp_path):
    return write_data(tmp_path / "data.jsonl", UNEVEN)


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


def saved_steps(out):
    """The steps of the complete checkpoints."""
    return [int(path.name.removeprefix("step-")) for path in train.checkpoints(out / "checkpoints")]


@pytest.mark.slow
def test_a_killed_run_goes_on(checkpoint, data, tmp_path):
    """Catches moments, step, order of samples or noise that are not what they were: two processes, one of them killed
    at step 10, are to end with the same bits as if nothing had happened. The checkpoint before is of an epoch's end,
    written after validation: parameters that are still gathered would be saved without their moments. And the other
    process waiting for ever, and a checkpoint that a killed run was writing taken for a complete one."""
    whole, killed, settings = tmp_path / "whole", tmp_path / "killed", {"eval_data": data, "save_every": 3}
    assert launch(tmp_path, 2, [command(checkpoint(), data, whole, **settings)]).returncode == 0
    done = launch(tmp_path, 2, [command(checkpoint(), data, killed, **settings)], before=KILL, timeout=100)
    assert done.returncode != 0 and "SIGKILL" in done.stderr
    assert saved_steps(killed) == [6, 9] and not (killed / "config.json").exists()
    (killed / "checkpoints" / "step-0000012.tmp").mkdir()
    with pytest.raises(UserError):
        load_model(killed)
    done = launch(tmp_path, 2, [command(checkpoint(), data, killed, resume=True, **settings)])
    assert done.returncode == 0 and "resumed after step 9" in done.stdout, done.stderr[-3000:]
    assert same(whole, killed) and (losses(whole) == losses(killed)).all() and len(losses(whole)) == 21
    assert saved_steps(killed) == [18, 21] and not list(killed.rglob("*.tmp"))


@pytest.mark.slow
def test_another_number_of_processes(checkpoint, data, tmp_path, run, stop_at):
    """Catches a checkpoint that only as many processes can read as wrote it, and moments given to another parameter."""
    model, whole, fewer, more = checkpoint(), tmp_path / "whole", tmp_path / "2-1", tmp_path / "1-2"
    assert run(*command(model, data, whole))[0] == 0
    stop_at(9)
    code, out, _ = run(*command(model, data, more))
    assert code == 128 + signal.SIGTERM and "stopped after step 10 of 21" in out and "--resume" in out
    stop_at(None)
    assert launch(tmp_path, 2, [command(model, data, fewer)], before=KILL).returncode != 0
    assert launch(tmp_path, 2, [command(model, data, more, resume=True)]).returncode == 0
    assert run(*command(model, data, fewer, resume=True))[0] == 0
    for found in (more, fewer):
        assert len(losses(found)) == 21 and abs(losses(found) - losses(whole)).max() < 1e-5
        assert worst_difference(tensors(found), tensors(whole)) < 1e-4


def test_what_may_not_change(checkpoint, data, tmp_path, run, stop_at):
    """Catches a resumed run that is a mixture of two, one that starts over what is there unasked, and a finished one
    that starts again."""
    def go_on(**options):
        return run(*command(checkpoint(), data, tmp_path / "out", **{"resume": True, **options}))

    def files():
        return {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}

    stop_at(5, signal.SIGINT)
    assert go_on(resume=False)[0] == 128 + signal.SIGINT
    stop_at(None)
    before = files()
    for options, culprit in (({"lr": 2e-3}, "--lr"), ({"seed": 1}, "--seed"),
                             ({"english_grad": True}, "--english_grad"), ({"resume": False}, "--resume")):
        code, _, err = go_on(**options)
        assert code == 2 and culprit in err and err.count("\n") == 1, err
    own, english, answer, _ = PAIRS[0]
    for other in (PAIRS * 2, [(own, english, answer, "en"), *UNEVEN[1:]]):
        write_data(data, other)
        code, _, err = go_on()
        assert code == 2 and "--data" in err
    assert files() == before
    write_data(data, UNEVEN)
    code, out, err = go_on(keep=1, checkpoint_activations=True)
    assert code == 0 and "resumed after step 6" in out, err
    code, out, _ = go_on()
    assert code == 0 and "already" in out


@pytest.mark.slow
def test_one_process_is_told_to_stop(checkpoint, data, tmp_path):
    """Catches processes that do not agree: the others would wait for the one that stopped."""
    stop = at_step(9, "os.kill(os.getpid(), signal.SIGTERM)")
    done = launch(tmp_path, 2, [command(checkpoint(), data, tmp_path / "out")], before=stop, timeout=100)
    assert done.returncode != 0 and "stopped after step 10 of 21" in done.stdout, done.stderr[-3000:]
    assert saved_steps(tmp_path / "out")[-1] == 10


def test_killed_while_the_result_is_saved(checkpoint, data, tmp_path, run, monkeypatch):
    """Catches a folder half replaced that loads as a model, and a resumed run that takes it for the result: killed
    before each file is moved into place."""
    class Killed(BaseException):
        pass
    whole, killed, replace = tmp_path / "whole", tmp_path / "killed", Path.replace
    assert run(*command(checkpoint(), data, whole))[0] == 0
    left = []  # the moves that come before death

    def dying(path, target):
        if Path(target).parent == killed:
            if not left:
                raise Killed
            left.pop()
        return replace(path, target)
    monkeypatch.setattr(Path, "replace", dying)
    for moved in range(20):
        left[:] = [None] * moved
        try:
            code, out, err = run(*command(checkpoint(), data, killed, resume=True))
        except Killed:
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
    code, _, err = run(*command(checkpoint(), data, tmp_path / "out", resume=True))
    assert code == 2 and str(newest) in err and err.count("\n") == 1, err


def test_poison(data, tmp_path, run):
    """Catches one broken sample that ruins every weight, and a run that skips for ever."""
    folder, out = write_checkpoint(tmp_path / "model"), tmp_path / "out"
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][3 + 0xE2] = float("inf")  # the byte piece E2: no character of PAIRS has it
    save_file(weights, folder / "model.safetensors")
    poison = ("☠", "skull", "bones", "sw")
    write_data(data, [*UNEVEN, poison])
    code, said, err = run(*command(folder, data, out, seed=2))  # with this seed, poison is among the prompts of the fit
    assert code == 0 and said.count(" skipped: ") == 7 and "7 steps were skipped" in said, err  # once an epoch
    assert logged(out, "skipped").sum() == 7
    assert all(name.endswith("embed_tokens.weight") or t.isfinite().all() for name, t in tensors(out).items())
    write_data(data, [poison] * 13)
    code, _, err = run(*command(folder, data, tmp_path / "other"))
    assert code == 2 and str(data) in err and "10 steps" in err and err.count("\n") == 1
    assert not saved_steps(tmp_path / "other")  # steps that are skipped do not push out a good one


def test_full_disk(checkpoint, data, tmp_path, run):
    """Catches a checkpoint that destroys the one before it, and a traceback, where the disk is full. A tmpfs that holds
    one checkpoint, not two."""
    small = tmp_path / "small"
    small.mkdir()
    size = sum(p.numel() for p in load_model(checkpoint()).parameters()) * 12 * 3 // 2
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", small]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs more rights than this user has")
    try:
        code, _, err = run(*command(checkpoint(), data, small / "out", keep=1))
        assert code == 2 and "checkpoints" in err and "make room" in err and err.count("\n") == 1, err
        assert [path.name for path in (small / "out" / "checkpoints").iterdir()] == ["step-0000004"]
        assert subprocess.run(["mount", "-o", f"remount,size={8 * size}", small]).returncode == 0
        code, out, err = run(*command(checkpoint(), data, small / "out", keep=1, resume=True))
        assert code == 0 and "resumed after step 4" in out, err
    finally:
        subprocess.run(["umount", small])
