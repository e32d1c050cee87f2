"""Runs that are killed, stopped, starved of disk or fed with poison, and what they leave behind."""
import os
import re
import shutil
import signal
import subprocess
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.optim.optimizer import register_optimizer_step_pre_hook

from conftest import (UNEVEN, at_step, json_lines, launch, logged, losses, same, tensors, training,
                      worst_difference, write_checkpoint, write_data)
from model import UserError, load_model

command = partial(training, lr=1e-3, epochs=4, micro_batch=2, save_every=5, ridge=0.1)  # 12 steps
SMALL = {"num_hidden_layers": 2, "hidden_size": 24, "intermediate_size": 48}
INDEX = "model.safetensors.index.json"
CHANGES = {  # options that change a result, and another value of each; None: said in the test
    "model": None, "data": None, "method": "sft", "epochs": 5, "batch_size": 5, "lr": 2e-3, "max_length": 100,
    "template": "llama2", "seed": 1, "english_grad": True, "source_layer": 1, "fusion_layer": 1,
    "matrix_prompts": 3, "ridge": 0.2, "dtype": "bfloat16"}
FREE = {  # options that may be others when a run is resumed
    "micro_batch": 6, "checkpoint_activations": True, "max_shard_size": 5e-5, "log_every": 1, "keep": 1,
    "save_every": 2}
OTHERS = {"eval_data", "out", "overwrite", "resume", "memory_plan", "help"}
RELABELLED = [*UNEVEN[:3], (*UNEVEN[3][:3], "en"), *UNEVEN[4:]]  # the same text, a sample called English


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def saved_steps(out):
    """The steps of the complete checkpoints."""
    names = [path.name for path in (out / "checkpoints").glob("*")]
    return sorted(int(name.removeprefix("step-")) for name in names if not name.endswith(".tmp"))


@pytest.fixture(scope="module")
def runs(ran, run, tmp_path_factory):
    """A run of 12 steps, `whole`, and the same stopped by a signal on its way, `stopped`. None of it is to be
    changed."""
    base, steps = tmp_path_factory.mktemp("runs"), []
    model, data = write_checkpoint(base / "model", **SMALL), write_data(base / "data.jsonl", UNEVEN)
    ran(*command(model, data, base / "whole"))

    def stop(*_):
        steps.append(1)
        if len(steps) == 7:
            signal.raise_signal(signal.SIGTERM)
    hook = register_optimizer_step_pre_hook(stop)
    result = run(*command(model, data, base / "stopped"))
    hook.remove()
    other = write_checkpoint(base / "other", seed=1, **SMALL)
    return SimpleNamespace(model=model, other_model=other, data=data, whole=base / "whole",
                           stopped=base / "stopped", result=result)


@pytest.fixture
def go_on(runs, run, tmp_path):
    """go_on(**options): the same command with --resume, in a copy of the stopped run."""
    given = {"model": runs.model, "data": runs.data, "resume": True,
             "out": shutil.copytree(runs.stopped, tmp_path / "out")}
    return lambda **options: run(*command(**{**given, **options}))


# ------------------------------------------------------------------------------------------- stopped, resumed

def test_stopped_and_resumed(runs, go_on, tmp_path):
    """Catches moments, step, order, noise or learning rate that are not what they were, a step left out or
    done twice, lines of the log that are lost or stand twice, a checkpoint that was being written taken for a
    complete one, and a log that is lost if the run dies while it is written anew."""
    code, said, _ = runs.result
    at = int(re.search(r"stopped after step (\d+) of 12, .* --resume", said)[1])
    assert code == 128 + signal.SIGTERM and at in (7, 8) and saved_steps(runs.stopped) == [5, at]
    assert logged(runs.stopped, "step").max() == at and not (runs.stopped / "config.json").exists()
    out = tmp_path / "out"
    with open(out / "train_log.jsonl", "a") as log:
        log.write(f'{{"step": {at + 1}, "loss": 0.5}}\n{{"step": {at + 2}, "lo')  # of a run killed later
    shutil.copytree(out / "checkpoints" / f"step-{at:07}", out / "checkpoints" / "step-0000011.tmp")
    os.link(out / "train_log.jsonl", tmp_path / "log")  # shows what becomes of the old file
    code, said, err = go_on()
    assert code == 0 and f"resumed after step {at}" in said, err
    assert (tmp_path / "log").read_text().endswith('"lo')
    assert same(runs.whole, out)
    steps, expected = ([{**line, "tokens_per_s": 0} for line in json_lines(folder / "train_log.jsonl")]
                       for folder in (out, runs.whole))
    assert steps == expected and len(losses(out)) == 12
    assert saved_steps(out) == saved_steps(runs.whole) == [10, 12] and not list(out.rglob("*.tmp"))


def test_every_option_is_known(ran):
    """Catches a new option that the tables above do not name: may it be another when a run is resumed?"""
    there = re.findall(r"^  (?:-h, )?--(\w+)", ran("train", "--help"), re.MULTILINE)
    assert "lr" in there and set(there) <= {*CHANGES, *FREE, *OTHERS}


@pytest.mark.parametrize("name", CHANGES)
def test_what_may_not_change(runs, ran, go_on, tmp_path, name):
    """Catches a resumed run that is a mixture of two."""
    before, data = files(tmp_path / "out"), runs.data.read_bytes()
    value = {"model": runs.other_model, "data": runs.data}.get(name, CHANGES[name])
    without = {"ridge": False} if name == "method" else {}  # of no use in plain fine-tuning
    try:
        if name == "data":
            write_data(runs.data, RELABELLED)
        code, _, err = go_on(**{**without, name: value})
    finally:
        runs.data.write_bytes(data)
    name = "(template|data)" if name == "template" else name  # another template: other ids of the data
    assert code == 2 and re.search(f"another --{name} ", err) and err.count("\n") == 1, err
    assert files(tmp_path / "out") == before


def test_what_may_change(runs, go_on, tmp_path):
    """Catches an option refused that changes no result, or one that changes it, and a --dtype that is
    compared as it is written and not as it is meant."""
    meant = {} if torch.cuda.is_available() else {"dtype": False}  # on a CPU, float32 is the default
    code, said, err = go_on(**FREE, **meant, eval_data=runs.data)
    out = tmp_path / "out"
    assert code == 0 and "resumed after step" in said and saved_steps(out) == [12], err
    assert abs(losses(out) - losses(runs.whole)).max() < 1e-5
    assert worst_difference(tensors(out), tensors(runs.whole)) < 1e-4
    assert 1 < len(list(out.glob("model-*.safetensors"))) < 6  # of 50 KB each


@pytest.mark.parametrize("options, words", [
    ({"resume": False}, "--resume"), ({"resume": False, "lr": 1}, "--resume"),
], ids=str)
def test_a_stopped_run_is_not_started_over_unasked(go_on, tmp_path, options, words):
    """Catches a run whose checkpoints are thrown away by the same command without --resume."""
    before = files(tmp_path / "out")
    code, _, err = go_on(**options)
    assert code == 2 and words in err and err.count("\n") == 1 and files(tmp_path / "out") == before


def test_overwriting_a_stopped_run(go_on, tmp_path):
    """Catches checkpoints of the old run that a later --resume would take for the new one's."""
    out, steps = tmp_path / "out", {"save_every": False, "epochs": 1}
    shutil.copytree(out / "checkpoints" / "step-0000005", out / "checkpoints" / "step-0000099")
    code, said, err = go_on(resume=False, overwrite=True, **steps)
    assert code == 0 and "resumed" not in said and not saved_steps(out) and len(losses(out)) == 3, err


# ----------------------------------------------------------------------------------------- finished, replaced

def test_a_finished_run(runs, run, ran, tmp_path):
    """Catches a finished result that is replaced without --overwrite, also by --resume with other options or
    data, one that is computed again, and one that is written over in place or keeps files of its own."""
    out, data, kept = tmp_path / "out", write_data(tmp_path / "data.jsonl", UNEVEN), tmp_path / "kept"
    short = partial(command, runs.model, data, out, epochs=1)
    ran(*short(save_every=3))
    before = files(out)
    for options in ({}, {"lr": 2e-3}, {"resume": True, "lr": 2e-3}, {"resume": True, "matrix_prompts": 3},
                    {"resume": True, "changed": True}):
        write_data(data, RELABELLED if options.pop("changed", False) else UNEVEN)
        code, _, err = run(*short(**options))
        assert code == 2 and "--overwrite" in err and err.count("\n") == 1, err
        assert files(out) == before
    write_data(data, UNEVEN)
    assert "already" in ran(*short(resume=True, keep=1, log_every=3)) and files(out) == before
    shutil.copytree(out, kept, copy_function=os.link)  # shows what becomes of the old files
    ran(*short(overwrite=True, method="sft", ridge=False, save_every=False))
    assert files(kept) == before
    assert not (out / "cctuning.safetensors").exists() and not saved_steps(out) and len(losses(out)) == 3


def test_killed_while_the_result_is_saved(runs, run, ran, tmp_path, monkeypatch):
    """Catches a folder half replaced that loads as a model, and a resumed run that takes it for the result.
    What a kill would leave is copied before each file is removed or moved into place."""
    out, again, left = tmp_path / "out", {"resume": True, "overwrite": True}, []
    ran(*command(runs.model, runs.data, out, epochs=1, save_every=False, max_shard_size=6e-5))
    old = files(out)
    shutil.copytree(runs.whole / "checkpoints", out / "checkpoints")

    def copying(call):
        def change(path, *target, **options):
            if os.path.dirname(target[0] if target else path) == str(out) and os.path.exists(path):
                left.append(shutil.copytree(out, tmp_path / f"left{len(left)}"))
            return call(path, *target, **options)
        return change
    with monkeypatch.context() as patch:
        for name in ("replace", "rename", "unlink", "remove"):
            patch.setattr(os, name, copying(getattr(os, name)))
        ran(*command(runs.model, runs.data, out, **again))
    assert same(runs.whole, out) and len(left) > 8
    log = Path("train_log.jsonl")  # a new one before anything else changes
    for folder in left:
        found = files(folder)
        if any(found.get(path) != old[path] for path in old.keys() - {log}):  # no longer the old one
            with pytest.raises(UserError):
                load_model(folder)
        code, said, err = run(*command(runs.model, runs.data, folder, **again))
        assert code == 0 and "resumed after step 12" in said and same(runs.whole, folder), err


def test_killed_before_the_old_model_is_replaced(runs, run, go_on, tmp_path):
    """Catches --resume refused, or the old model taken for the result, where a run died while it wrote its result
    beside an old model."""
    for path in runs.whole.iterdir():
        if path.is_file():
            shutil.copy(path, tmp_path / "out")
    code, _, err = go_on(seed=2)
    assert code == 2 and "--overwrite" in err
    (tmp_path / "out" / "saving.tmp").mkdir()
    code, said, err = go_on()
    assert code == 0 and "resumed after step" in said and same(runs.whole, tmp_path / "out"), err


def test_killed_twice_while_the_result_is_saved(runs, ran, tmp_path):
    """Catches a result without its last file, the index, taken for finished: a run that died while moving the
    files into place, then again after it had removed its staging folder."""
    out = shutil.copytree(runs.whole, tmp_path / "out")
    (out / INDEX).unlink()
    assert "resumed after step 12" in ran(*command(runs.model, runs.data, out, resume=True))
    assert same(runs.whole, out) and (out / INDEX).exists()


def test_all_is_on_the_disk_before_it_is_renamed(runs, ran, tmp_path, monkeypatch):
    """Catches a result, log or checkpoint that a power cut leaves empty under its final name."""
    synced, early, moved, fsync, out = set(), [], [], os.fsync, tmp_path / "out"

    def watched(call):
        def move(path, target, **options):
            path, target = Path(path), Path(target)
            parts = [path] if path.is_file() else [*path.rglob("*")]
            if ".tmp" not in str(target.relative_to(out)):
                early.extend(part for part in parts if os.stat(part).st_ino not in synced)
                moved.append(target.relative_to(out).parts[0])
            return call(path, target, **options)
        return move
    monkeypatch.setattr(os, "fsync", lambda handle: synced.add(os.fstat(handle).st_ino) or fsync(handle))
    monkeypatch.setattr(os, "replace", watched(os.replace))
    monkeypatch.setattr(os, "rename", watched(os.rename))
    ran(*command(runs.model, runs.data, out, epochs=1, save_every=3))
    assert not early and {"checkpoints", "config.json", INDEX, "train_log.jsonl"} <= set(moved)
    assert moved[-1] == INDEX
    assert all(os.stat(folder).st_ino in synced for folder in (out, out / "checkpoints"))


# -------------------------------------------------------------------------------------------- what goes wrong

@pytest.mark.parametrize("number, default", [(signal.SIGTERM, signal.SIG_DFL),
                                             (signal.SIGINT, signal.default_int_handler)])
def test_signals(runs, run, tmp_path, capfd, number, default):
    """Catches a run that a second signal does not end at once, one that does not say that it got the first, and a
    handler that stays after the run."""
    before, during = signal.getsignal(number), []

    def stop(*_):
        if not during:
            signal.raise_signal(number)
            during.append(signal.getsignal(number))
    hook = register_optimizer_step_pre_hook(stop)
    code, said, _ = run(*command(runs.model, runs.data, tmp_path / "out"))
    hook.remove()
    assert code == 128 + number and "stopped after step" in said
    assert during == [default] and signal.getsignal(number) == before
    assert capfd.readouterr().err.count("signal received") == 1


def test_a_signal_after_the_terminal_has_gone(runs, run, stop_at, tmp_path, monkeypatch):
    """Catches a run that loses its work when stderr cannot be written (| tee, which the same Ctrl-C ends)."""
    def broken(*_):
        raise BrokenPipeError
    monkeypatch.setattr(os, "write", broken)
    stop_at(2)
    code, said, _ = run(*command(runs.model, runs.data, tmp_path / "out"))
    assert code == 128 + signal.SIGTERM and "stopped after step 2" in said


def test_another_spelling_of_the_paths(runs, go_on, tmp_path, monkeypatch):
    """Catches a resumed run that is refused because the same paths are spelled differently."""
    (tmp_path / "link").symlink_to(runs.data)
    monkeypatch.chdir(runs.model.parent)
    code, said, err = go_on(model="model", data=tmp_path / "link")
    assert code == 0 and "resumed after step" in said, err
    code, said, err = go_on(model="./model")
    assert code == 0 and "already" in said, err


def test_the_model_has_changed(runs, go_on):
    """Catches a resumed run whose base model's config.json has changed."""
    config = runs.model / "config.json"
    before = config.read_bytes()
    config.write_bytes(before.replace(b'"rope_theta": 10000.0', b'"rope_theta": 500000.0'))
    try:
        code, _, err = go_on()
    finally:
        config.write_bytes(before)
    assert code == 2 and "another --model" in err and err.count("\n") == 1, err


@pytest.mark.parametrize("file", ["__0_0.distcp", ".metadata"])
def test_a_flipped_bit(go_on, tmp_path, file):
    """Catches a damaged checkpoint that torch loads without an error."""
    path = sorted((tmp_path / "out" / "checkpoints").iterdir())[-1] / file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x40
    path.write_bytes(content)
    code, _, err = go_on()
    assert code == 2 and f"{path.parent}: damaged" in err and err.count("\n") == 1, err


def test_a_renamed_checkpoint(go_on, tmp_path):
    """Catches a renamed checkpoint that is resumed at the step of its name."""
    folder = tmp_path / "out" / "checkpoints"
    (folder / "step-0000005").rename(folder / "step-0000011")
    code, _, err = go_on()
    assert code == 2 and "renamed" in err and err.count("\n") == 1, err


def test_a_damaged_checkpoint(go_on, tmp_path):
    """Catches a traceback where a checkpoint cannot be read."""
    newest = sorted((tmp_path / "out" / "checkpoints").iterdir())[-1]
    for part in newest.glob("*.distcp"):
        part.write_bytes(part.read_bytes()[:1000])
    code, _, err = go_on()
    assert code == 2 and str(newest) in err and err.count("\n") == 1, err
    shutil.rmtree(newest)
    code, said, err = go_on()
    assert code == 0 and "resumed after step 5" in said, err


@pytest.mark.parametrize("value, eps, found", [
    (float("inf"), 1e-6, "loss nan"), (1e-30, 1e-45, "gradient norm inf")])
def test_poison(tmp_path, run, monkeypatch, value, eps, found):
    """Catches one broken sample that ruins every weight, by its loss or by its gradient alone, a matrix or a
    count that is broken by it, a run that skips for ever or pushes out a good checkpoint meanwhile, and one
    given up for skipped steps that are not in a row."""
    folder, data = write_checkpoint(tmp_path / "model", rms_norm_eps=eps, **SMALL), tmp_path / "data.jsonl"
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][3 + 0xE2] = value  # the byte piece E2: no character of PAIRS has it
    save_file(weights, folder / "model.safetensors")
    poison = ("\u2620", "skull", "bones", "sw")
    write_data(data, [*UNEVEN, poison])
    out = tmp_path / "out"
    monkeypatch.setattr("train.MAX_SKIPPED", 4)
    code, said, err = run(*command(folder, data, out, seed=2))  # with this seed, it is in the matrix fit
    monkeypatch.undo()
    assert code == 0 and "4 steps were skipped" in said, err  # once an epoch
    lines = [line for line in said.splitlines() if " skipped: " in line]
    assert len(lines) == 4 and all(found in line for line in lines)
    assert sorted(logged(out, "skipped")) == [False] * 8 + [True] * 4
    assert "NaN" not in (out / "train_log.jsonl").read_text()
    found = tensors(out)
    assert all(t.isfinite().all() for name, t in found.items() if not name.endswith("embed_tokens.weight"))
    write_data(data, [poison] * 13)
    code, _, err = run(*command(folder, data, tmp_path / "other"))
    assert code == 2 and str(data) in err and "10 steps" in err and err.count("\n") == 1
    assert not saved_steps(tmp_path / "other")


def test_full_disk(tmp_path, run, runs):
    """Catches a checkpoint that destroys the one before it, and a traceback, where the disk is full. A tmpfs
    that holds one checkpoint, not two."""
    small = tmp_path / "small"
    small.mkdir()
    one = runs.whole / "checkpoints" / "step-0000012"
    size = sum(file.stat().st_size for file in one.iterdir()) * 3 // 2
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", small]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs needs more rights than this user has")
    try:
        code, _, err = run(*command(runs.model, runs.data, small / "out", keep=1))
        assert code == 2 and "checkpoints" in err and "make room" in err and err.count("\n") == 1, err
        assert [path.name for path in (small / "out" / "checkpoints").iterdir()] == ["step-0000005"]
        assert subprocess.run(["mount", "-o", f"remount,size={8 * size}", small]).returncode == 0
        code, out, err = run(*command(runs.model, runs.data, small / "out", keep=1, resume=True))
        assert code == 0 and "resumed after step 5" in out and same(runs.whole, small / "out"), err
    finally:
        subprocess.run(["umount", small])


# ------------------------------------------------------------------------------------------ several processes

KILL = at_step(10, "os.kill(os.getpid(), signal.SIGKILL)")


@pytest.mark.slow
def test_a_killed_run_goes_on(checkpoint, tmp_path):
    """Catches moments, step, order of samples or noise that are not what they were: two processes, one of
    them killed in step 10, are to end with the same bits as if nothing had happened. The checkpoint before is
    of an epoch's end, written after validation: parameters that are still gathered would be saved without
    their moments. And the other process waiting for ever."""
    data, whole, killed = write_data(tmp_path / "data.jsonl", UNEVEN), tmp_path / "whole", tmp_path / "killed"
    settings = {"eval_data": data, "save_every": 3}
    assert launch(tmp_path, 2, [command(checkpoint(), data, whole, **settings)]).returncode == 0
    done = launch(tmp_path, 2, [command(checkpoint(), data, killed, **settings)], before=KILL, timeout=100)
    assert done.returncode != 0 and "SIGKILL" in done.stderr
    assert saved_steps(killed) == [6, 9] and not (killed / "config.json").exists()
    with pytest.raises(UserError):
        load_model(killed)
    done = launch(tmp_path, 2, [command(checkpoint(), data, killed, resume=True, **settings)])
    assert done.returncode == 0 and "resumed after step 9" in done.stdout, done.stderr[-3000:]
    assert same(whole, killed) and (losses(whole) == losses(killed)).all() and len(losses(whole)) == 12
    assert saved_steps(killed) == [9, 12] and not list(killed.rglob("*.tmp"))


@pytest.mark.slow
@pytest.mark.parametrize("first, then", [(1, 2), (2, 1)])
def test_another_number_of_processes(runs, tmp_path, first, then):
    """Catches a checkpoint that only as many processes can read as wrote it, and moments given to another
    parameter."""
    out = tmp_path / "out"
    if first == 1:
        shutil.copytree(runs.stopped, out)
    else:
        assert launch(tmp_path, 2, [command(runs.model, runs.data, out)], before=KILL).returncode != 0
    done = launch(tmp_path, then, [command(runs.model, runs.data, out, resume=True)])
    assert done.returncode == 0 and "resumed after step" in done.stdout, done.stderr[-3000:]
    assert len(losses(out)) == 12 and abs(losses(out) - losses(runs.whole)).max() < 1e-5
    assert worst_difference(tensors(out), tensors(runs.whole)) < 1e-4


@pytest.mark.slow
def test_one_process_is_told_to_stop(runs, tmp_path):
    """Catches processes that do not agree: the others would wait for the one that stopped."""
    stop = at_step(9, "os.kill(os.getpid(), signal.SIGTERM)")
    done = launch(tmp_path, 2, [command(runs.model, runs.data, tmp_path / "out")], before=stop, timeout=100)
    step = re.search(r"stopped after step (9|10) of 12", done.stdout)
    assert done.returncode != 0 and step, done.stderr[-3000:]
    assert saved_steps(tmp_path / "out")[-1] == int(step[1])
