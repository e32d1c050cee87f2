"""The user's files stay as they are, and every error is reported: folders, links, pipes, streams, environment."""
import contextlib
import errno
import fcntl
import io
import json
import os
import shutil
import stat
import subprocess
import sys
import threading
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import infer
import model
import train
from conftest import (PAIRS, ROOT, at_step, launch, logged, training, write_checkpoint, write_connection,
                      write_data)
from model import UserError, is_ours, run_script, tokenizer_files, write_text

SMALL = {"num_hidden_layers": 2, "hidden_size": 24, "intermediate_size": 48}
command = partial(training, epochs=1)
OURS = {"cctuning": "process 1 on host"}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A checkpoint and training data; tests must not change them."""
    folder = tmp_path_factory.mktemp("base")
    return SimpleNamespace(model=write_checkpoint(folder / "model", **SMALL), data=write_data(folder / "data.jsonl"))


@pytest.fixture(scope="module")
def result(base, ran, tmp_path_factory):
    """A trained folder; tests must not change it."""
    out = tmp_path_factory.mktemp("result") / "out"
    ran(*command(base.model, base.data, out))
    return out


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def put(folder, name):
    """Write a file of the user's, and its folder."""
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("mine")


# ------------------------------------------------------------------------------------------------ what OUT may be

NAMES = ["config.json", "run.json", "train_log.jsonl", "model.safetensors", "model.safetensors.index.json",
         "model-00001-of-00002.safetensors", "cctuning.safetensors", "tokenizer.model", "tokenizer.json", "vocab.json",
         "merges.txt", "generation_config.json", "chat_template.jinja", "checkpoints/llama-8b/weights",
         "saving.tmp/weights"]


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_that_is_not_ours(base, run, tmp_path, name):
    """Catches a user's file that is removed or replaced because train.py writes one of the same name."""
    out = tmp_path / "out"
    put(out, name)
    (out / name).write_text("{}") if name in ("config.json", "run.json") else None
    before = files(tmp_path)
    code, _, err = run(*command(base.model, base.data, out, overwrite=True))
    assert code == 2 and name.split("/")[0] in err and err.count("\n") == 1, err
    assert files(tmp_path) == before


def test_unrelated_files_stay(base, ran, tmp_path):
    """Catches a run that refuses, or clears, a folder with unrelated files."""
    names = {"notes.txt", "model-old.safetensors", "cc/config.json", "step-0000001/weights", "a.tmp"}
    for name in names:
        put(tmp_path, name)
    ran(*command(base.model, base.data, tmp_path))
    ran(*command(base.model, base.data, tmp_path, overwrite=True))
    assert all((tmp_path / name).read_text() == "mine" for name in names)


def test_the_users_files_in_our_folder_stay(result, base, ran, tmp_path):
    """Catches user's files beside a result that are removed when it is replaced."""
    out = shutil.copytree(result, tmp_path / "out")
    for name in ("vocab.json", "checkpoints/llama-8b/weights", "checkpoints/step-final/weights"):
        put(out, name)
    (out / "checkpoints" / "step-0000009").mkdir()
    ran(*command(base.model, base.data, out, overwrite=True))
    assert (out / "vocab.json").exists() and (out / "checkpoints" / "llama-8b" / "weights").exists()
    assert (out / "checkpoints" / "step-final").exists() and not (out / "checkpoints" / "step-0000009").exists()


def test_tokenizer_files_of_the_old_result_go(result, ran, base, tmp_path):
    """Catches files of the old tokenizer that stay beside the new one."""
    out = shutil.copytree(result, tmp_path / "out")
    note = json.loads((out / "config.json").read_text())
    note["cctuning"]["files"].append("merges.txt")
    (out / "config.json").write_text(json.dumps(note))
    put(out, "merges.txt")
    ran(*command(base.model, base.data, out, overwrite=True))
    assert not (out / "merges.txt").exists()


@pytest.mark.parametrize("change, culprit", [
    ("replaced by a foreign model", "config.json"), ("a single file of weights", "model.safetensors"),
    ("a folder for the log", "train_log.jsonl"), ("a file for the staging folder", "saving.tmp"),
    ("a link for the checkpoints", "checkpoints")])
def test_our_folder_changed(result, base, run, tmp_path, change, culprit):
    """Catches --overwrite replacing a model that train.py did not write, a result that is never loaded because
    model.safetensors is read before its index, and a run that fails only when it saves."""
    out = shutil.copytree(result, tmp_path / "out")
    if culprit == "config.json":
        shutil.copy(base.model / "config.json", out)
    elif culprit == "train_log.jsonl":
        (out / culprit).unlink()
        (out / culprit).mkdir()
    elif culprit == "checkpoints":
        (out / culprit).symlink_to(tmp_path)
    else:
        put(out, culprit)
    before = files(tmp_path)
    code, _, err = run(*command(base.model, base.data, out, overwrite=True))
    assert code == 2 and culprit in err and err.count("\n") == 1 and files(tmp_path) == before, err


def test_out_is_the_model(base, run, tmp_path):
    """Catches a result that replaces its own base model, however the path is spelled."""
    folder = shutil.copytree(base.model, tmp_path / "model")
    (tmp_path / "link").symlink_to(folder)
    before = files(folder)
    for out in (folder, tmp_path / "link", f"{folder}/../model"):
        code, _, err = run(*command(folder, base.data, out, overwrite=True))
        assert code == 2 and "--model" in err and err.count("\n") == 1 and files(folder) == before, err


@pytest.mark.parametrize("embedded, own, refused", [
    (True, True, False), (False, True, True), (True, False, True)])
def test_the_embedded_result_is_replaced(tmp_path, embedded, own, refused):
    """Catches the default run refusing to replace its own result, or replacing another, and another run
    replacing it."""
    out = shutil.copytree(ROOT / "data" / "tuned", tmp_path / "tuned")
    config = json.loads((out / "config.json").read_text())
    config["cctuning"]["arguments"]["embedded"] = own
    (out / "config.json").write_text(json.dumps(config))
    setup = SimpleNamespace(args=SimpleNamespace(out=out, resume=False, overwrite=False, embedded=embedded))
    with contextlib.ExitStack() as until_exit:
        if refused:
            with pytest.raises(UserError, match="--overwrite"):
                train.claim(setup, until_exit)
        else:
            assert train.claim(setup, until_exit) is False


def test_a_run_that_died_at_once(base, ran, tmp_path):
    """Catches a folder that is not recognised after a run died at its start."""
    (tmp_path / "run.json").write_text(json.dumps(OURS))
    (tmp_path / "train_log.jsonl").write_text("")
    assert is_ours(tmp_path)
    assert "saved to" in ran(*command(base.model, base.data, tmp_path))


def test_two_runs(base, run, tmp_path, monkeypatch):
    """Catches a second run in the same folder, a folder that stays locked, and no warning where locks do not work."""
    out = tmp_path / "out"
    assert run(*command(base.model, base.data, out))[0] == 0
    with open(out / ".lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)  # a lock that is not shared is refused all the same
        before = files(out)
        code, _, err = run(*command(base.model, base.data, out, overwrite=True))
        assert code == 2 and f"in use by process {os.getpid()} on " in err and err.count("\n") == 1, err
        assert files(out) == before

    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")
    monkeypatch.setattr(fcntl, "flock", no_locks)
    code, said, err = run(*command(base.model, base.data, out, overwrite=True))
    assert code == 0 and said.count("cannot be locked;") == 1, err


# ---------------------------------------------------------------------------------------------------- outputs

def test_outputs_keep_what_they_are(tmp_path):
    """Catches a device, pipe, link or mode that is replaced, and a temporary file that overwrites another file."""
    link, target, taken = tmp_path / "link", tmp_path / "target", tmp_path / "target.tmp"
    target.write_text("old")
    target.chmod(0o640)
    link.symlink_to(target)
    taken.write_text("mine")
    write_text(link, "new")
    assert link.is_symlink() and target.read_text() == "new" and stat.S_IMODE(target.stat().st_mode) == 0o640
    assert taken.read_text() == "mine" and len(list(tmp_path.iterdir())) == 3
    os.mkfifo(tmp_path / "pipe")
    read = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_text()))
    reader.start()
    write_text(tmp_path / "pipe", "through")
    reader.join(10)
    assert read == ["through"] and (tmp_path / "pipe").is_fifo()
    write_text("/dev/null", "x")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_a_failed_output_leaves_nothing(tmp_path, monkeypatch):
    """Catches a temporary file left behind on a full disk, and an error that names it."""
    (tmp_path / "x").write_text("old")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError) as failure:
        write_text(tmp_path / "x", "new")
    assert failure.value.filename == str(tmp_path / "x")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_modes_of_a_result(base, ran, tmp_path):
    """Catches weights that only the owner can read: safetensors creates them with mode 0600."""
    before = os.umask(0o027)
    try:
        ran(*command(base.model, base.data, tmp_path / "out"))
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").iterdir()} == {0o640}


def test_folders_that_cannot_be_flushed(base, ran, tmp_path, monkeypatch):
    """Catches a finished model reported as failed on file systems without fsync of folders."""
    fsync = os.fsync

    def no_folders(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        fsync(handle)
    monkeypatch.setattr(os, "fsync", no_folders)
    ran(*command(base.model, base.data, tmp_path / "out", save_every=1))


# ----------------------------------------------------------------------------------------------- tokenizers

CHARSMAP = "/////wAAAAD/////AAAA/////w=="  # its header declares more than there is


@pytest.mark.parametrize("key, value", [
    ("pre_tokenizer", {"type": "Split", "pattern": {"Regex": "(a+)+b"}, "behavior": "Isolated", "invert": False}),
    ("normalizer", {"type": "Precompiled", "precompiled_charsmap": CHARSMAP})], ids=["in use", "in reading"])
def test_a_tokenizer_that_panics(run, tmp_path, capfd, key, value):
    """Catches a panic of the tokenizers package, which is not an Exception, and the lines that it prints."""
    pytest.importorskip("tokenizers", reason="optional package: only tokenizer.json needs it")
    folder = write_checkpoint(tmp_path / "model", "chatml", "json", **SMALL)
    contents = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps({**contents, key: value}))
    code, _, err = run("infer", "--model", folder, "--prompt", "a" * 60, "--max_new_tokens=1")
    assert code == 2 and "tokenizer.json: the tokenizers package fails" in err and err.count("\n") == 1, err
    assert capfd.readouterr().err == ""
    os.write(2, b"shown")
    assert capfd.readouterr().err == "shown"


def test_a_prompt_without_tokens(base, monkeypatch):
    """Catches a prompt without tokens: it has no connection position."""
    tokenizer = model.Tokenizer(base.model, model.Config.read(base.model))
    monkeypatch.setattr(tokenizer, "_fill", lambda *_: [])
    with pytest.raises(UserError, match="no tokens for the prompt 'x y'"):
        tokenizer.prompt("x y")


# ------------------------------------------------------------------------------------------ told before training

@pytest.mark.parametrize("name, make", [
    ("vocab.json", lambda path, base: path.mkdir()), ("merges.txt", lambda path, base: os.mkfifo(path)),
    ("added_tokens.json", lambda path, base: path.symlink_to("/etc/hostname")),
    ("vocab.json", lambda path, base: path.symlink_to("gone"))], ids=["folder", "pipe", "link outside", "dangling"])
def test_tokenizer_files_that_cannot_be_copied(base, run, tmp_path, name, make):
    """Catches a run that fails when it saves, one that waits for ever, and a copy of a file from elsewhere."""
    folder = shutil.copytree(base.model, tmp_path / "model")
    make(folder / name, base)
    code, _, err = run(*command(folder, base.data, tmp_path / "out"))
    assert code == 2 and name in err and err.count("\n") == 1 and not (tmp_path / "out").exists(), err


def test_the_hub_cache(base, tmp_path):
    """Catches folders of Hugging Face's cache being refused: their files are links to blobs/."""
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for i, path in enumerate(base.model.iterdir()):
        shutil.copy(path, blobs / str(i))
        (snapshot / path.name).symlink_to(f"../../blobs/{i}")
    (tmp_path / "link").symlink_to(snapshot)
    assert tokenizer_files(snapshot) == tokenizer_files(tmp_path / "link") == ["tokenizer.model"]


def test_too_little_disk(base, run, tmp_path, monkeypatch):
    """Catches a run that has no room for its result, and says so only after training."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    code, said, err = run(*command(base.model, base.data, tmp_path / "out"))
    assert code == 2 and "make room" in err and err.count("\n") == 1 and "step 1" not in said, err


# ------------------------------------------------------------------------------------------------- quietly wrong

def spoiled(folder, file, name, value):
    tensors = load_file(folder / file)
    tensors[name].view(-1)[-1] = value
    save_file(tensors, folder / file, metadata={"format": "pt"})


@pytest.mark.parametrize("file, name", [("model.safetensors", "model.norm.weight"),
                                        ("cctuning.safetensors", "transform_matrix")])
def test_nan(base, run, tmp_path, file, name):
    """Catches answers computed from NaN in the weights or the matrix."""
    folder = write_connection(shutil.copytree(base.model, tmp_path / "model"))
    spoiled(folder, file, name, float("nan"))
    code, out, err = run("infer", "--model", folder, "--prompt=hello", "--max_new_tokens=2")
    assert code == 2 and not out and f"{file}: {name} holds NaN" in err and err.count("\n") == 1, err


def test_answers_that_overflow(base, run, tmp_path):
    """Catches an answer chosen from logits that are not finite."""
    folder = shutil.copytree(base.model, tmp_path / "model")
    spoiled(folder, "model.safetensors", "model.norm.weight", float("inf"))
    code, out, err = run("infer", "--model", folder, "--prompt=hello", "--max_new_tokens=2")
    assert code == 2 and "logits are not finite" in err and "Traceback" not in err, err


@pytest.mark.parametrize("method", ["cc", "sft"])
def test_training_that_diverges(base, run, tmp_path, monkeypatch, method):
    """Catches a result saved with a matrix fitted on no prompt, or with NaN in the weights."""
    if method == "sft":
        monkeypatch.setattr(train, "full_tensor", lambda p: torch.full_like(p, float("nan")))
    code, _, err = run(*command(base.model, base.data, tmp_path / "out", lr=9e18, method=method))
    assert code == 2 and "lower --lr" in err and err.count("\n") == 1, err
    assert not (tmp_path / "out" / "config.json").exists() and not (tmp_path / "out" / "saving.tmp").exists()


def test_every_step_skipped(base, run, tmp_path):
    """Catches an untrained model saved as a result when all steps, fewer than MAX_SKIPPED, were skipped."""
    folder = shutil.copytree(base.model, tmp_path / "model")
    spoiled(folder, "model.safetensors", "model.norm.weight", float("inf"))
    code, _, err = run(*command(folder, base.data, tmp_path / "out", method="sft"))
    assert code == 2 and "no finite loss" in err and err.count("\n") == 1, err


def test_a_doubtful_matrix(base, ran, run, tmp_path):
    """Catches no warning of a matrix with too few prompts, or with R^2 at or below 0."""
    out = tmp_path / "out"
    said = ran(*command(base.model, base.data, out, matrix_prompts=2))
    line = "2 prompts are too few to determine its 24 rows; fit it on more prompts, or with --ridge"
    assert said.count(line) == 1
    code, _, err = run("infer", "--model", out, "--prompt=hello", "--max_new_tokens=2")
    assert code == 0 and err.count(line) == 1
    config = SimpleNamespace(num_hidden_layers=4, hidden_size=24)
    assert train.doubt({"prompts": 6, "r_squared": [0.1, 0.2, -1, None]}, config) is None
    assert "R^2 <= 0" in train.doubt({"prompts": 6, "r_squared": [0.1, 0.0, -1, None]}, config)
    assert train.doubt({"prompts": 6, "r_squared": []}, config) is None


# -------------------------------------------------------------------------------------------- streams, terminals

def piped(path, content):
    """A pipe whose first reader gets the content, the second nothing."""
    os.mkfifo(path)
    threading.Thread(target=lambda: [path.write_text(text) for text in (content, "")], daemon=True).start()
    return path


def test_data_from_a_pipe(base, ran, tmp_path):
    """Catches data that are read twice: a pipe gives them only once."""
    content = base.data.read_text()
    assert "6 samples" in ran(*command(base.model, piped(tmp_path / "data", content), tmp_path / "out"))
    ran("infer", "--model", base.model, "--input", piped(tmp_path / "input", content), "--max_new_tokens=1",
        "--output", tmp_path / "answers.jsonl")
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == len(PAIRS)


def test_lines_of_windows(base, ran, monkeypatch):
    """Catches a carriage return that becomes part of the prompt."""
    def answers(text):
        monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(text)))
        return ran("infer", "--model", base.model, "--prompt=-", "--max_new_tokens=3")
    assert answers(b"Nini?\r\nWapi?\r\n") == answers(b"Nini?\nWapi?\n")


def test_at_a_terminal(base, run, monkeypatch):
    """Catches answers that wait for the last line, and a blank or a bad line that ends the session."""
    ours, theirs = os.openpty()
    os.write(ours, b"Nini?\n\n" + b"neno " * 300 + b"\nWapi?\n\x04")
    asked = []
    monkeypatch.setattr(infer, "stream", lambda engine, prompt, options, explain: asked.append(prompt.number))
    with open(theirs, encoding="utf-8") as terminal:
        monkeypatch.setattr("sys.stdin", terminal)
        code, _, err = run("infer", "--model", base.model, "--prompt=-", "--max_new_tokens=3")
    os.close(ours)
    assert code == 0 and asked == [0, 3] and "error: line 3: is " in err and err.count("error: ") == 1, err


def test_a_terminal_of_few_characters(base, tmp_path, monkeypatch):
    """Catches a traceback for a character that the terminal cannot show, and escapes that are not JSON's."""
    given = {"instruction": "a", "note": "h\u00e9 \u0939\ud83d"}
    (tmp_path / "input").write_text(json.dumps(given))
    main = infer.main
    monkeypatch.setattr("sys.argv", ["infer", "--model", str(base.model), "--input", str(tmp_path / "input"),
                                     "--max_new_tokens=3"])
    for encoding in ("ascii", "cp1252", "utf-8"):
        for call in (lambda: print(given["note"]), main):
            with io.TextIOWrapper(io.BytesIO(), encoding, write_through=True) as narrow:
                monkeypatch.setattr("sys.stdout", narrow)
                run_script(call)
                shown = narrow.buffer.getvalue().decode(encoding)
        assert json.loads(shown).items() >= given.items()


def test_a_reader_that_goes_away(base, monkeypatch, tmp_path):
    """Catches a traceback after `| head`, and a training run that ends when nobody reads its output."""
    for arguments, code in ((["infer", "--model", base.model, "--input", base.data, "--max_new_tokens=1"], 141),
                            (command(base.model, base.data, tmp_path / "out"), None)):
        here, there = os.pipe()
        os.close(here)
        script = {"infer": infer, "train": train}[arguments[0]]
        with open(there, "w", encoding="utf-8") as pipe, monkeypatch.context() as patch:
            patch.setattr("sys.stdout", pipe)
            patch.setattr("sys.argv", [*map(str, arguments)])
            try:
                run_script(script.main)
                assert code is None
            except SystemExit as stop:
                assert stop.code == code
    assert (tmp_path / "out" / "config.json").exists()


def test_closed_streams(base, monkeypatch, capfd, tmp_path):
    """Catches a traceback when stderr or stdin is closed."""
    monkeypatch.setattr("sys.stderr", None)
    monkeypatch.setattr("sys.argv", [*map(str, command(base.model, base.data, tmp_path / "out"))])
    run_script(train.main)
    monkeypatch.setattr("sys.stdin", None)
    monkeypatch.setattr("sys.argv", ["infer", "--model", str(base.model), "--prompt=-"])
    monkeypatch.setattr("sys.stderr", io.TextIOWrapper(io.BytesIO(), write_through=True))
    with pytest.raises(SystemExit):
        run_script(infer.main)
    assert sys.stderr.buffer.getvalue().startswith(b"error: standard input: is empty")


def test_interrupted(run, monkeypatch):
    """Catches a traceback after Ctrl-C."""
    def interrupt(args):
        raise KeyboardInterrupt
    monkeypatch.setattr(infer, "read_prompts", interrupt)
    assert run("infer", "--model", "x", "--lang=sw") == (130, "", "")


# ------------------------------------------------------------------------------------------------- one line each

def test_errors_of_the_system(capsys):
    """Catches a traceback for an error about a file, the wrong advice, two lines, and control characters."""
    def fails(error):
        def main():
            raise error
        with pytest.raises(SystemExit) as stop:
            run_script(main)
        assert stop.value.code == 2
        return capsys.readouterr().err
    assert fails(PermissionError(errno.EACCES, "Permission denied", "a/b")) == (
        "error: a/b: Permission denied; check path and permissions\n")
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        assert "output: full; make room" in fails(OSError(number, "full"))
    assert "the working directory" in fails(FileNotFoundError(errno.ENOENT, "No such file or directory"))
    assert fails(OSError(errno.ELOOP, "loop", "a\n\x1b[31mb")) == (
        "error: a \\x1b[31mb: loop; check path and permissions\n")
    assert fails(UserError("a\nb\x9b")) == "error: a b\\x9b\n"
    with pytest.raises(ConnectionError):  # a bug, or the network: no file
        run_script(lambda: (_ for _ in ()).throw(ConnectionError(errno.ECONNREFUSED, "refused")))


@pytest.mark.parametrize("out, culprit", [
    ("link", "not a writable directory"), ("loop", "not a writable directory"), ("x" * 300, "too long")])
def test_out_cannot_be_made(base, run, tmp_path, out, culprit):
    """Catches a traceback when --out is a dangling link, a link to itself, or too long a name."""
    (tmp_path / "link").symlink_to("gone")
    (tmp_path / "loop").symlink_to("loop")
    code, said, err = run(*command(base.model, base.data, tmp_path / out))
    assert code == 2 and culprit in err and err.count("\n") == 1 and "step" not in said, err


@pytest.mark.parametrize("settings", [
    {"RANK": "abc"}, {"RANK": "1"}, {"WORLD_SIZE": "0"}, {"RANK": "-1", "WORLD_SIZE": "2"}, {"LOCAL_RANK": "x"},
    {"WORLD_SIZE": "2"}, {"RANK": "0", "WORLD_SIZE": "2"}], ids=str)
@pytest.mark.parametrize("script", ["train", "infer", "eval"])
def test_processes_that_torchrun_did_not_start(run, monkeypatch, settings, script):
    """Catches a run that prints and saves nothing, one that waits for ever, and a traceback."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    code, _, err = run(script)
    assert code == 2 and "torchrun" in err and err.count("\n") == 1, err


def test_more_processes_than_gpus(monkeypatch):
    """Catches a CUDA error instead of one line."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for settings in ({"LOCAL_WORLD_SIZE": "3"}, {"LOCAL_RANK": "2"}):
        with monkeypatch.context() as patch, pytest.raises(UserError, match="3 processes|2 GPUs"):
            for name, value in settings.items():
                patch.setenv(name, value)
            train.Dist.start()


# --------------------------------------------------------------------------------------------- several processes

def test_how_a_process_of_several_ends():
    """Catches a process that shuts its interpreter down: a thread of gloo that then frees a tensor aborts it. (Seen in
    one of six runs of two processes on a busy machine, after the result was saved.)"""
    script = f"""
import atexit, os, sys
sys.path.insert(0, {str(ROOT)!r})
from model import UserError, run_script
os.environ.update(RANK="1", WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT="1")
atexit.register(os.abort)  # where the interpreter shuts down

def fail(error):
    raise error

for main in (lambda: print("saved"), lambda: fail(SystemExit(143)), lambda: fail(UserError("a: b; c")), lambda: 1 / 0):
    if not (child := os.fork()):
        run_script(main)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
os._exit(0)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["saved", "0", "143", "2", "-6"], done
    assert done.stderr.startswith("error: a: b; c\nTraceback") and "ZeroDivisionError" in done.stderr


@pytest.mark.slow
def test_ranks_that_differ(base, tmp_path):
    """Catches ranks with different arguments, and an error of rank 1 that is not shown."""
    for change, culprit in (('sys.argv[-1] = "--seed=1"', "different arguments"),
                            ('sys.argv[4] = "/not/there"', "/not/there")):
        before = ('import os\nload = json.load\n'
                  'def differing(file):\n'
                  '    commands = load(file)\n'
                  '    sys.argv = ["", *commands[0]]\n'
                  f'    if os.environ["RANK"] == "1": {change}\n'
                  '    return [sys.argv[1:]]\n'
                  'json.load = differing\n')
        given = command(base.model, base.data, tmp_path / "out", seed=0)
        done = launch(tmp_path, 2, [given], before=before, timeout=100)
        assert done.returncode != 0 and culprit in done.stderr, done.stderr[-2000:]


@pytest.mark.slow
def test_orphans(base, tmp_path):
    """Catches processes that go on training and writing after torchrun was killed."""
    data, out = write_data(tmp_path / "data.jsonl", PAIRS * 4), tmp_path / "out"
    kill = at_step(5, "os.kill(os.getppid(), signal.SIGKILL)")
    done = launch(tmp_path, 2, [command(base.model, data, out, epochs=4000)], before=kill, timeout=100)
    assert done.returncode != 0
    for _ in range(200):
        if list((out / "checkpoints").glob("step-???????")):
            break
        threading.Event().wait(0.1)
    count = len(logged(out, "step"))
    assert 5 <= count < 100
