"""A run that is stopped, killed at any point, out of disk or fed with broken samples goes on to the same
bits as an undisturbed one, and no folder is ever a mixture of two runs."""
import os
import re
import resource
import shutil
import signal
import sys
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_pre_hook

import train
from conftest import (UNEVEN, json_lines, losses, same, sentencepiece_model, tensors, training,
                      worst_difference, write_checkpoint, write_data)
from model import UserError, load_model

command = partial(training, lr=1e-3, epochs=4, micro_batch=2, save_every=5, ridge=0.1)  # 12 steps
short = partial(training, lr=1e-3, epochs=1, save_every=3, ridge=0.1)  # 3 steps
SMALL = {"num_hidden_layers": 2, "hidden_size": 24, "intermediate_size": 48}
LOG, INDEX = "train_log.jsonl", "model.safetensors.index.json"
CHANGES = {  # options that change a result, and another value of each; None: said in the test
    "model": None, "data": None, "method": "sft", "epochs": 5, "batch_size": 5, "lr": 2e-3,
    "max_length": 100, "template": "llama2", "seed": 1, "english_grad": True, "source_layer": 1,
    "fusion_layer": 1, "matrix_prompts": 3, "ridge": 0.2, "dtype": "bfloat16"}
FREE = {"micro_batch": 6, "checkpoint_activations": True, "save_every": 2}  # may change on --resume
OTHERS = {"eval_data", "out", "overwrite", "resume", "memory_plan", "help"}
RELABELLED = [*UNEVEN[:3], (*UNEVEN[3][:3], "en"), *UNEVEN[4:]]  # the same texts, one called English


def files(folder):
    """{path: content} of a folder."""
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def write_files(folder, contents):
    """The other way round."""
    for path, content in contents.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return folder


def saved_steps(out):
    """The steps of the complete checkpoints."""
    names = [path.name for path in (out / "checkpoints").glob("step-*")]
    return sorted(int(name.removeprefix("step-")) for name in names if not name.endswith(".tmp"))


@pytest.fixture(scope="module")
def runs(ran, run, tmp_path_factory):
    """A run of 12 steps, `whole`, and the same stopped in step 7, `stopped`. Do not change them."""
    base, taken = tmp_path_factory.mktemp("runs"), []
    model, data = write_checkpoint(base / "model", **SMALL), write_data(base / "data.jsonl", UNEVEN)
    other = write_checkpoint(base / "other", seed=1, **SMALL)
    sentencepiece_model(other / "tokenizer.model", whole=["zz"])  # another tokenizer too
    ran(*command(model, data, base / "whole"))

    def stop(*_):
        taken.append(1)
        if len(taken) == 7:
            signal.raise_signal(signal.SIGTERM)
    hook = register_optimizer_step_pre_hook(stop)
    result = run(*command(model, data, base / "stopped"))
    hook.remove()
    return SimpleNamespace(model=model, other=other, data=data, whole=base / "whole",
                           stopped=base / "stopped", result=result)


@pytest.fixture
def go_on(runs, run, tmp_path):
    """go_on(**options): the same command with --resume, in a copy of the stopped run."""
    given = {"model": runs.model, "data": runs.data, "resume": True,
             "out": shutil.copytree(runs.stopped, tmp_path / "out")}
    return lambda **options: run(*command(**{**given, **options}))


# ------------------------------------------------------------------------------------ stopped, resumed

def test_stopped_and_resumed(runs, go_on, tmp_path):
    """Catches moments, step, order, noise or learning rate other than before, a step left out or done
    twice, lines of the log lost or doubled, an unfinished checkpoint used, one too many kept."""
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


@pytest.mark.parametrize("content", [None, b"", b"\xff{"], ids=["missing", "empty", "not UTF-8"])
def test_a_damaged_log(runs, go_on, tmp_path, content):
    """Catches a run that cannot go on without its log, which nothing depends on."""
    log = tmp_path / "out" / LOG
    log.unlink() if content is None else log.write_bytes(content)
    code, said, err = go_on(eval_data=runs.data)
    assert code == 0 and "resumed after step 7" in said and same(runs.whole, tmp_path / "out"), err
    assert len(losses(tmp_path / "out")) == 5


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


def test_tokenizer_files_of_an_older_result(runs, go_on, tmp_path):
    """Catches files that a kill has left: tokenizer.json would be read before tokenizer.model."""
    for name in ("tokenizer.json", "chat_template.jinja", "vocab.json"):
        (tmp_path / "out" / name).write_text("{}")
    assert go_on()[0] == 0 and files(tmp_path / "out").keys() == files(runs.whole).keys()


def test_every_option_is_known(ran):
    """Catches a new option that the tables above lack: may it change when a run is resumed?"""
    there = re.findall(r"^  (?:-h, )?--(\w+)", ran("train", "--help"), re.MULTILINE)
    assert "lr" in there and set(there) <= {*CHANGES, *FREE, *OTHERS}


@pytest.mark.parametrize("name", [*CHANGES, "config"])
def test_what_may_not_change(runs, go_on, tmp_path, name):
    """Catches a resumed run that is a mixture of two: other options, data, or another config.json."""
    before, data = files(tmp_path / "out"), write_data(tmp_path / "data.jsonl", RELABELLED)
    config = (runs.model / "config.json").read_text()
    value = {"model": runs.other, "data": data}.get(name, CHANGES.get(name))
    if name == "config":
        (runs.model / "config.json").write_text(config.replace("10000.0", "500000.0"))
    code, _, err = go_on(**({} if name == "config" else {name: value}))
    (runs.model / "config.json").write_text(config)
    same_thing = {"template": "template|data", "config": "config|model"}  # other ids of the data
    assert code == 2 and re.search(f"had --({same_thing.get(name, name)}) ", err), err
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
    """Catches a kill during --overwrite, a checkpoint or the saving of the result that leaves a mixture
    of two models that loads, lets one run go on from the other's checkpoint, or lets none go on."""
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
    """Catches a second signal that does not end the run at once, a first one without a word, exit code
    0, and work lost where stderr has gone (| tee, which the same Ctrl-C ends)."""
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

def write_poison(folder, value=float("inf"), eps=1e-6):
    """A checkpoint with one bad embedding, of a token that PAIRS lack. Returns a sample with it."""
    write_checkpoint(folder, rms_norm_eps=eps, **SMALL)
    weights = load_file(folder / "model.safetensors")
    weights["model.embed_tokens.weight"][3 + 0xE2] = value  # the byte piece E2
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return ("\u2620", "skull", "bones", "sw")


@pytest.mark.parametrize("value, eps, found", [
    (float("inf"), 1e-6, "loss nan"), (1e-30, 1e-45, "gradient norm inf")])
def test_skipped_steps(tmp_path, run, monkeypatch, value, eps, found):
    """Catches a broken sample that ruins all weights or the matrix, by its loss or its gradient alone, a
    run given up for skipped steps that are not in a row, and one that skips for ever."""
    poison, out = write_poison(tmp_path / "model", value, eps), tmp_path / "out"
    data = write_data(tmp_path / "data.jsonl", [*UNEVEN, poison])
    monkeypatch.setattr(train, "MAX_SKIPPED", 3)
    code, said, err = run(*command(tmp_path / "model", data, out, seed=2))  # seed: it is in the fit
    monkeypatch.undo()
    assert code == 0, err
    lines = [line for line in said.splitlines() if " skipped: " in line]
    assert len(lines) == 4 and all(found in line for line in lines)  # once an epoch
    assert len(losses(out)) == 8 and "NaN" not in (out / LOG).read_text()
    bad = [name for name, tensor in tensors(out).items() if not tensor.isfinite().all()]
    assert bad == ["model.embed_tokens.weight"] * (value > 1)
    code, _, err = run(*command(
        tmp_path / "model", write_data(data, [poison] * 13), tmp_path / "bad", save_every=1))
    assert code == 2 and str(data) in err and "10 steps" in err and err.count("\n") == 1
    assert not saved_steps(tmp_path / "bad") and not (tmp_path / "bad" / INDEX).exists()


def test_stopped_in_a_skipped_first_step(tmp_path, run):
    """Catches a checkpoint of AdamW before its first update: get_state_dict would count a step for it."""
    data = write_data(tmp_path / "data.jsonl", [*UNEVEN, write_poison(tmp_path / "model")])
    mine, hooks = partial(command, tmp_path / "model", data, epochs=1, seed=0), []

    def stop(*_):
        hooks.pop().remove()
        signal.raise_signal(signal.SIGTERM)
    run(*mine(tmp_path / "whole"))
    assert "skipped" in json_lines(tmp_path / "whole" / LOG)[0]  # with this seed
    hooks.append(register_module_forward_pre_hook(stop))
    assert run(*mine(tmp_path / "out"))[0] == 128 + signal.SIGTERM
    code, _, err = run(*mine(tmp_path / "out", resume=True))
    assert code == 0 and same(tmp_path / "whole", tmp_path / "out"), err


@pytest.mark.parametrize("method", ["cc", "sft"])
def test_training_that_diverges(runs, run, tmp_path, monkeypatch, method):
    """Catches a result saved with a matrix that no prompt determined, or with NaN in the weights."""
    if method == "sft":
        monkeypatch.setattr(train, "full_tensor", lambda p: torch.full_like(p, float("nan")))
    given = short(runs.model, runs.data, tmp_path / "out", lr=9e18, method=method, save_every=False)
    code, _, err = run(*given)
    assert code == 2 and "lower --lr" in err and err.count("\n") == 1, err
    assert not list((tmp_path / "out").glob("*.safetensors"))


@contextmanager
def largest_file(size):
    """Files may not grow beyond this size: the system refuses as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("save_every", [5, False], ids=["checkpoint", "result"])
def test_a_full_disk(runs, go_on, tmp_path, save_every):
    """Catches a traceback (SafetensorError is no OSError), half a result that loads, and a checkpoint lost
    where the next one or the result does not fit."""
    with largest_file(60_000):
        code, _, err = go_on(save_every=save_every)
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
