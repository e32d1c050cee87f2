"""A run that is stopped, killed at any point, out of disk or fed with broken samples goes on to the same
bits as an undisturbed one, and no folder is ever a mixture of two runs."""
import os
import re
import resource
import shutil
import signal
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.optim.optimizer import register_optimizer_step_pre_hook

import train
from conftest import (UNEVEN, files, json_lines, losses, same, saved_steps, sentencepiece_model, tensors,
                      training, worst_difference, write_checkpoint, write_data)
from model import UserError, load_model

long = partial(training, lr=1e-3, epochs=4, micro_batch=2, save_every=5, ridge=0.1)  # 12 steps
short = partial(training, lr=1e-3, epochs=1, save_every=3, ridge=0.1)  # 3 steps
SMALL = {"num_hidden_layers": 2, "hidden_size": 24, "intermediate_size": 48}
LOG, INDEX = "train_log.jsonl", "model.safetensors.index.json"
CHANGES = {  # options that change a result, and another value of each; None: said in the test
    "model": None, "data": None, "method": "sft", "epochs": 5, "batch_size": 5, "lr": 2e-3,
    "max_length": 100, "template": "llama2", "seed": 1, "english_grad": True, "source_layer": 1,
    "fusion_layer": 1, "matrix_prompts": 3, "ridge": 0.2, "dtype": "bfloat16"}
FREE = {"micro_batch": 6, "checkpoint_activations": True, "save_every": 2}  # may change on --resume
RELABELLED = [*UNEVEN[:3], (*UNEVEN[3][:3], "en"), *UNEVEN[4:]]  # the same texts, one called English


def write_files(folder, contents):
    """files(), the other way round."""
    for path, content in contents.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return folder


@pytest.fixture(scope="module")
def runs(ran, run, tmp_path_factory):
    """A run of 12 steps, `whole`, and the same stopped in step 7, `stopped`. Do not change them."""
    base, taken = tmp_path_factory.mktemp("runs"), []
    model, data = write_checkpoint(base / "model", **SMALL), write_data(base / "data.jsonl", UNEVEN)
    other = write_checkpoint(base / "other", seed=1, **SMALL)
    sentencepiece_model(other / "tokenizer.model", whole=["zz"])  # another tokenizer too
    ran(*long(model, data, base / "whole"))

    def stop(*_):
        taken.append(1)
        if len(taken) == 7:
            signal.raise_signal(signal.SIGTERM)
    hook = register_optimizer_step_pre_hook(stop)
    result = run(*long(model, data, base / "stopped"))
    hook.remove()
    return SimpleNamespace(model=model, other=other, data=data, whole=base / "whole",
                           stopped=base / "stopped", result=result)


@pytest.fixture
def go_on(runs, run, tmp_path):
    """go_on(**options): the same command with --resume, in a copy of the stopped run."""
    given = {"model": runs.model, "data": runs.data, "resume": True,
             "out": shutil.copytree(runs.stopped, tmp_path / "out")}
    return lambda **options: run(*long(**{**given, **options}))


# ------------------------------------------------------------------------------------ stopped, resumed

def test_stopped_and_resumed(runs, go_on, tmp_path):
    """Catches other moments, order, noise or learning rate, lost lines of the log, half a checkpoint used."""
    code, said, _ = runs.result
    assert code == 128 + signal.SIGTERM and re.search("stopped after step 7 of 12.* --resume", said)
    assert saved_steps(runs.stopped) == [5, 7] and not (runs.stopped / INDEX).exists()
    out = tmp_path / "out"
    with open(out / LOG, "a", encoding="utf-8") as log:
        log.write('{"step": 8, "loss": 0.5}\n{"step": 9, "lo')  # of a run that was killed later
    shutil.copytree(out / "checkpoints" / "step-0000007", out / "checkpoints" / "step-0000011.tmp")
    code, said, err = go_on()
    assert code == 0 and "resumed after step 7" in said and same(runs.whole, out), err
    steps, expected = ([{**line, "tokens_per_s": 0} for line in json_lines(folder / LOG)]
                       for folder in (out, runs.whole))
    assert steps == expected and len(losses(out)) == 12
    assert saved_steps(out) == saved_steps(runs.whole) == [10, 12] and not list(out.rglob("*.tmp"))


def test_other_files_in_out(runs, go_on, tmp_path):
    """Catches a run that needs its log, and an older result's tokenizer.json, read before tokenizer.model."""
    (tmp_path / "out" / LOG).write_bytes(b"\xff{")
    for name in ("tokenizer.json", "chat_template.jinja", "vocab.json"):
        (tmp_path / "out" / name).write_text("{}")
    code, _, err = go_on()
    assert code == 0 and same(runs.whole, tmp_path / "out") and len(losses(tmp_path / "out")) == 5, err
    assert files(tmp_path / "out").keys() == files(runs.whole).keys()


def test_a_damaged_checkpoint(go_on, tmp_path):
    """Catches a traceback where a checkpoint cannot be read, and no way on from the one before it."""
    newest = tmp_path / "out" / "checkpoints" / "step-0000007"
    for part in newest.glob("*.distcp"):
        part.write_bytes(part.read_bytes()[:1000])
    code, _, err = go_on()
    assert code == 2 and newest.name in err and err.count("\n") == 1, err
    shutil.rmtree(newest)
    code, said, err = go_on()
    assert code == 0 and "resumed after step 5" in said, err


@pytest.mark.parametrize("name", CHANGES)
def test_what_may_not_change(runs, go_on, tmp_path, name):
    """Catches a resumed run that is a mixture of two: other options or data."""
    before, data = files(tmp_path / "out"), write_data(tmp_path / "data.jsonl", RELABELLED)
    value = {"model": runs.other, "data": data}.get(name, CHANGES[name])
    code, _, err = go_on(**{name: value})
    named = "template|data" if name == "template" else name  # it makes other ids of the data
    assert code == 2 and re.search(f"had --({named}) ", err), err
    assert files(tmp_path / "out") == before and err.count("\n") == 1


def test_what_may_change(runs, go_on, tmp_path):
    """Catches an option refused that changes no result, and a --dtype compared as written, not meant."""
    meant = {} if torch.cuda.is_available() else {"dtype": False}  # on a CPU, float32 is the default
    code, said, err = go_on(**FREE, **meant, eval_data=runs.data)
    assert code == 0 and "resumed after step 7" in said, err
    assert abs(losses(tmp_path / "out") - losses(runs.whole)).max() < 1e-5
    assert worst_difference(tensors(tmp_path / "out"), tensors(runs.whole)) < 1e-4


# --------------------------------------------------------------------------------------------- killed

WATCHED = []  # [(folder, states)] while a test watches a folder


def look(event, arguments):
    """Keep the state of the watched folder before Python changes any file, as a kill would leave it;
    and the state with the file that is opened for writing empty, unless it is named as unfinished."""
    is_write = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)
    if not WATCHED or not (is_write or event in ("os.rename", "os.remove", "os.rmdir")):
        return
    folder, states = WATCHED.pop()  # looking opens files too
    states.append(files(folder))
    path = str(arguments[0])
    if is_write and path.startswith(f"{folder}/") and ".tmp" not in path:
        states.append({**states[-1], (folder / path).relative_to(folder): b""})
    WATCHED.append((folder, states))


sys.addaudithook(look)  # for good: Python has no way to remove it


def kills(folder, call):
    """The distinct states in which a kill during call() could leave a folder."""
    distinct = {}
    WATCHED.append((folder, []))
    call()
    for state in WATCHED.pop()[1]:
        key = {path: content for path, content in state.items()
               if ".tmp" not in str(path) and path.name != LOG}
        distinct[hash(frozenset(key.items()))] = state
    return distinct.values()


def model_of(contents):
    """The files of a folder that a user of the model reads."""
    return {path: content for path, content in contents.items() if len(path.parts) == 1
            and path.suffix != ".tmp" and path.name not in (LOG, train.RUN_FILE)}


@pytest.mark.parametrize("was", ["finished", "stopped"])
def test_killed_at_each_point(runs, run, stop_at, tmp_path, was):
    """Catches a kill after which a mixture of two models loads, a run goes on from another's, or none can."""
    old, new = (partial(short, model, runs.data) for model in (runs.other, runs.model))
    out = tmp_path / "out"
    run(*old(tmp_path / "old"))
    if was == "finished":
        shutil.copytree(tmp_path / "old", out)
    else:
        stop_at(2)
        run(*old(out))
    left, found = kills(out, lambda: run(*new(out, overwrite=True))), []
    models = {"old": model_of(files(tmp_path / "old")), "new": model_of(files(out))}
    for number, state in enumerate(left):
        folder = write_files(tmp_path / str(number), state)
        found.append(next((name for name in models if models[name] == model_of(state)), "none"))
        if found[-1] == "none":
            with pytest.raises(UserError):
                load_model(folder)
        code, _, err = run(*old(folder, resume=True))  # the old run: refused, or its own result
        assert code == 2 and "had --" in err or same(folder, tmp_path / "old"), (number, err)
        folder = write_files(tmp_path / f"{number} new", state)
        code, _, err = run(*new(folder, resume=True))
        if code:  # killed before the new run had marked the folder
            assert "had --" in err, err
            code, _, err = run(*new(folder, overwrite=True))
        assert code == 0 and same(folder, out), (number, err)
    assert {*found} >= {"none", "new"} and ("old" in found) == (was == "finished") and len(left) > 12


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals(runs, run, stop_at, tmp_path, monkeypatch, number):
    """Catches a second signal without effect, a first one without a word, and work lost (| tee)."""
    said, before = [], signal.getsignal(number)

    def write(descriptor, text):
        said.append((descriptor, text[:15]))
        raise BrokenPipeError
    monkeypatch.setattr(os, "write", write)
    stop_at(2, number)
    code, out, _ = run(*short(runs.model, runs.data, tmp_path / "out"))
    after = signal.signal(number, before)
    assert code == 128 + number and "stopped after step 2 " in out and after == signal.SIG_DFL
    assert (2, b"signal received") in said


# -------------------------------------------------------------------------- broken samples, full disks

@pytest.mark.parametrize("value, eps, found", [
    (torch.inf, 1e-6, "loss nan"), (1e-30, 1e-45, "gradient norm inf")])
def test_skipped_steps(tmp_path, run, monkeypatch, value, eps, found):
    """Catches a sample that ruins all weights, a run given up too early, and one that skips for ever."""
    model, out = write_checkpoint(tmp_path / "model", rms_norm_eps=eps, **SMALL), tmp_path / "out"
    weights = load_file(model / "model.safetensors")
    weights["model.embed_tokens.weight"][3 + 0xE2] = value  # the byte piece E2, which PAIRS lack
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    poison = [("\u2620", "skull", "bones", "sw"), ("skull", "\u2620", "bones", "sw")]  # in one step: short
    data = write_data(tmp_path / "data.jsonl", [*UNEVEN, *poison])
    monkeypatch.setattr(train, "MAX_SKIPPED", 3)
    code, said, err = run(*long(model, data, out, seed=2))  # seed: both are in the fit
    monkeypatch.undo()
    lines = [line for line in said.splitlines() if " skipped: " in line]
    assert code == 0 and len(lines) == 4 and all(found in line for line in lines), err  # once an epoch
    assert len(losses(out)) == 8 and "NaN" not in (out / LOG).read_text()
    bad = [name for name, tensor in tensors(out).items() if not tensor.isfinite().all()]
    assert bad == ["model.embed_tokens.weight"] * (value > 1)
    write_data(data, poison * 7)
    for epochs, skipped in ((4, "10 steps"), (1, "3 steps")):
        code, _, err = run(*long(model, data, tmp_path / "bad", epochs=epochs, save_every=1))
        assert code == 2 and str(data) in err and skipped in err and err.count("\n") == 1
        assert not saved_steps(tmp_path / "bad") and not (tmp_path / "bad" / INDEX).exists()


@pytest.mark.parametrize("method", ["cc", "sft"])
def test_training_that_diverges(runs, run, tmp_path, monkeypatch, method):
    """Catches a result saved with a matrix that no prompt determined, or with NaN in the weights."""
    if method == "sft":
        monkeypatch.setattr(train, "full_tensor", lambda p: torch.full_like(p, float("nan")))
    given = short(runs.model, runs.data, tmp_path / "out", lr=9e18, method=method, save_every=False)
    code, _, err = run(*given)
    assert code == 2 and "lower --lr" in err and err.count("\n") == 1, err
    assert not list((tmp_path / "out").glob("*.safetensors"))


@pytest.mark.parametrize("save_every", [5, False], ids=["checkpoint", "result"])
def test_a_full_disk(runs, go_on, tmp_path, request, save_every):
    """Catches a traceback, half a result that loads, a checkpoint lost where the next does not fit."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    free = partial(resource.setrlimit, resource.RLIMIT_FSIZE, before)
    request.addfinalizer(free)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, before[1]))  # bytes of a file
    code, _, err = go_on(save_every=save_every)
    free()
    assert code == 2 and err.count("\n") == 1 and saved_steps(tmp_path / "out") == [5, 7], err
    with pytest.raises(UserError):
        load_model(tmp_path / "out")
    code, said, err = go_on()
    assert code == 0 and "resumed after step" in said and same(runs.whole, tmp_path / "out"), err


def test_too_little_disk(runs, run, tmp_path, monkeypatch):
    """Catches a run that has no room for its result, and says so only after training."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    code, said, err = run(*short(runs.model, runs.data, tmp_path / "out"))
    assert code == 2 and "make room" in err and err.count("\n") == 1 and "step 1" not in said, err
