"""Training: what a run reads, the losses of its steps, what it fits, measures and saves.

Runs of the script are compared with tests/reference.py, which computes one prompt at a time.
"""
import json
import math
import re
import shutil
import signal
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import sentencepiece
import torch
from safetensors.torch import load_file, save_file

from conftest import (PAIRS, ROOT, json_lines, logged, losses, reading, same, tensors, training,
                      write_checkpoint, write_connection, write_data)
from reference import Reference, gumbel, prompt_ids

SAMPLES = [(own + end, english + end, answer + end, lang) for end in ("", " tano", " na mbili na tatu")
           for own, english, answer, lang in PAIRS][:12]
SMALL = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
HELD = [("nani?", "who?", "mimi", "sw"), ("Wer?", "Who?", "ich und du und er und sie", "de"),
        ("who?", "who?", "I", "en")]
RUNS = {  # what is trained, in steps of 4 of the 12 samples
    "llama3": {"template": "llama3", "seed": 3, "torch_dtype": "bfloat16"},
    "chatml": {"template": "chatml", "english_grad": True, "micro_batch": 3},
    "mistral": {"template": "mistral", "micro_batch": 2, "layers": 2},
    "sft": {"template": "plain", "method": "sft", "micro_batch": 1, "epochs": 10, "layers": 1},
}


def noted(folder):
    """What the run noted in the result's config.json."""
    return json.loads((folder / "config.json").read_text())["cctuning"]


def encoded(folder, pairs, template="plain"):
    """(prompt, English prompt, answer with its end of turn, connection position from the prompt's end) of
    each pair."""
    sp, rows = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model")), []
    for own, english, answer, _ in pairs:
        prompt, index, turn = prompt_ids(folder, own, template)
        rows.append((prompt, prompt_ids(folder, english, template)[0], [*sp.encode(answer), turn], index))
    return rows


def found_in(calls, rows):
    """The numbers of the rows of ids, in the order in which a model read them (right-padded with 0)."""
    numbers = {tuple(row): i for i, row in enumerate(rows)}
    read = [row for call in calls if isinstance(call[0], list) for row in call]
    ends = (max((i for i, token in enumerate(row) if token), default=0) + 1 for row in read)
    keys = [tuple(row[:end]) for row, end in zip(read, ends, strict=True)]
    return [numbers[key] for key in keys if key in numbers]


def mean_loss(model, rows, connection):
    """Validation: the mean loss of all answer tokens, the layer being the Decision Maker's first choice."""
    total = 0.0
    with torch.no_grad():
        for prompt, english, answer, index in rows:
            if connection == "english":
                total += model.connected_loss(prompt, english, answer, index)
            else:
                vector = model.vector(prompt, index) if connection == "matrix" else None
                total += model.loss(prompt, answer, vector, index)
    return float(total) / sum(len(answer) for _, _, answer, _ in rows)


def retrained(folder, rows, steps, rates, held, seed=0, method="cc", english_grad=False):
    """The steps (lists of sample numbers) of a run, computed plainly: (model, [loss], [gradient norm], {step:
    held-out loss}), the last after each third step."""
    model, found = Reference(folder), SimpleNamespace(losses=[], norms=[], held={})
    shape = model.config["num_hidden_layers"], model.config["hidden_size"]
    start = 0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    if method == "cc":
        model.tensors["decision_maker.weight"] = start.requires_grad_()
    parameters = list(model.tensors.values())
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    for step, (numbers, rate) in enumerate(zip(steps, rates, strict=True)):
        total = 0
        for i in numbers:
            prompt, english, answer, index = rows[i]
            noise = gumbel(seed, step, i, shape[0])
            total += (model.loss(prompt, answer) if method == "sft" else
                      model.connected_loss(prompt, english, answer, index, noise, english_grad))
        loss = total / sum(len(rows[i][2]) for i in numbers)  # of all answer tokens of the step
        optimizer.zero_grad()
        loss.backward()
        found.losses.append(loss.item())
        found.norms.append(torch.nn.utils.clip_grad_norm_(parameters, 1.0).item())
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        if step % 3 == 2:
            found.held[step + 1] = mean_loss(model, held, "english" if method == "cc" else "none")
    return model, found


@pytest.fixture(scope="module", params=RUNS)
def trained(request, ran, tmp_path_factory):
    """One of RUNS: its folders, options, what the script said and read, and the same run by the reference."""
    options, base = dict(RUNS[request.param]), tmp_path_factory.mktemp(request.param)
    template, dtype = options.pop("template"), options.pop("torch_dtype", "float32")
    changes = {"torch_dtype": dtype, "num_hidden_layers": options.pop("layers", 4)}
    folder, out = write_checkpoint(base / "model", template, **changes), base / "out"
    weights, kind = load_file(folder / "model.safetensors"), getattr(torch, dtype)
    save_file({name: t.to(kind) for name, t in weights.items()}, folder / "model.safetensors")
    options |= {} if options.get("method") == "sft" else {"ridge": 0.1}
    files = write_data(base / "data.jsonl", SAMPLES), write_data(base / "held.jsonl", HELD)
    with reading() as calls:
        said = ran(*training(folder, files[0], out, batch_size=4, eval_data=files[1], **options))
    rows, held = encoded(folder, SAMPLES, template), encoded(folder, HELD, template)
    order = found_in(calls, [prompt + answer for prompt, _, answer, _ in rows])
    steps = [order[i:i + 4] for i in range(0, len(order), 4)]
    own = {name: options[name] for name in ("seed", "method", "english_grad") if name in options}
    model, expected = retrained(folder, rows, steps, logged(out, "lr"), held, **own)
    return SimpleNamespace(folder=folder, out=out, options=options, template=template, said=said, calls=calls,
                           rows=rows, held=held, steps=steps, model=model, expected=expected)


def test_steps(trained):
    """Catches a connection position that is the template's only by chance, a layer that is not the one drawn,
    noise that repeats or is left out, a mean of means, gradients kept from the step before, other betas,
    weight decay, clipping or rounding than documented, --english_grad or --seed without effect."""
    epochs = [trained.steps[i:i + 3] for i in range(0, len(trained.steps), 3)]
    assert len(epochs) == trained.options.get("epochs", 2)
    assert all(sorted(sum(epoch, [])) == list(range(12)) for epoch in epochs) and epochs[0] != epochs[1]
    assert logged(trained.out, "step")[:4].tolist() == [0, 1, 2, 3]  # 0: measured before the first
    assert np.abs(losses(trained.out) - trained.expected.losses).max() < 1e-4
    assert np.abs(logged(trained.out, "grad_norm") / trained.expected.norms - 1).max() < 1e-3
    assert max(trained.expected.norms) > 2  # what clipping at 1 changes


def test_learning_rate(trained):
    """Catches a warm-up that starts at zero, never ends or has another length, and a cosine that does not
    come down."""
    count, peak = len(trained.steps), 1e-2
    warm = math.ceil(count / 10)
    rest = [(1 + math.cos(math.pi * i / (count - warm))) / 2 for i in range(count - warm)]
    expected = [peak * (i + 1) / warm for i in range(warm)] + [peak * share for share in rest]
    assert logged(trained.out, "lr") == pytest.approx(expected, rel=1e-6)


def test_saved_weights(trained):
    """Catches weights trained in the dtype they are stored in, or saved in another, a Decision Maker left out
    or rounded, and a config.json that is not the old one."""
    found, stored = tensors(trained.out), tensors(trained.folder)
    for name, weight in trained.model.tensors.items():
        kept = stored[name].dtype if name in stored else torch.float32
        assert found[name].dtype == kept
        weight = weight.detach().to(kept).float()
        # The mean: AdamW may move a weight whose gradient is all rounding either way.
        assert (found[name].float() - weight).abs().mean() < 1e-5 * (1 + 10 * (kept == torch.bfloat16)), name
    extra = set() if trained.options.get("method") == "sft" else {"transform_matrix"}
    assert found.keys() - trained.model.tensors.keys() == extra
    config = json.loads((trained.out / "config.json").read_text())
    assert config.pop("cctuning") and config == json.loads((trained.folder / "config.json").read_text())
    index = json.loads((trained.out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(found[name].nbytes for name in stored)


def pairs_of(model, rows):
    """X and Y (L, N, d), float64, of the prompts in these rows and of their English versions."""
    with torch.no_grad():
        x = torch.stack([model.activations(prompt, index) for prompt, _, _, index in rows], 1)
        y = torch.stack([model.activations(english, index) for _, english, _, index in rows], 1)
    return x.double(), y.double()


def fitted(model, rows, ridge):
    """W (d, d) of these rows."""
    x, y = (side.flatten(0, 1) for side in pairs_of(model, rows))
    penalty = ridge * x.square().sum() / x.shape[1] * torch.eye(x.shape[1])
    return torch.linalg.solve(x.T @ x + penalty, x.T @ y)


def explained(model, rows, matrix):
    """R^2 of each layer on these rows."""
    x, y = pairs_of(model, rows)
    rest, spread = (y - x @ matrix).square().sum((1, 2)), (y - y.mean(1, keepdim=True)).square().sum((1, 2))
    return (1 - rest / spread).tolist()


def test_matrix_and_validation(trained):
    """Catches a matrix fitted at another position, on English prompts, from English to own language, without
    its ridge or with what it is measured on, and a validation loss that is no mean over answer tokens, comes
    at other steps than an epoch's last, or whose connection is not what it says."""
    model, method = trained.model, trained.options.get("method", "cc")
    each = [entry for entry in json_lines(trained.out / "train_log.jsonl") if "eval_loss" in entry]
    last = each.pop()["eval_loss"]
    connections = {"cc": ("english", "matrix", "none"), "sft": ("none",)}[method]
    trained.expected.held.pop(len(trained.steps))  # of the last epoch: `last`, once the matrix is there
    assert {entry["step"]: entry["eval_loss"] for entry in each} == {
        step: {connections[0]: pytest.approx(loss, abs=1e-4)} for step, loss in trained.expected.held.items()}
    if method == "cc":
        foreign = [row for row, pair in zip(trained.rows, SAMPLES, strict=True) if pair[0] != pair[1]]
        order = found_in(trained.calls, [prompt for prompt, *_ in foreign])  # first the fit's, then others
        fit, test = [foreign[i] for i in order[:8]], [foreign[i] for i in order[8:]]
        note, matrix = noted(trained.out)["matrix"], fitted(model, fit, 0.1)
        assert (note["prompts"], note["held_out"], note["ridge"], len(set(order))) == (8, 2, 0.1, 10)
        saved = tensors(trained.out)["transform_matrix"]
        assert saved.dtype == torch.float32 and (saved - matrix).abs().max() < 1e-3 * matrix.abs().max()
        assert note["r_squared"] == pytest.approx(explained(model, test, matrix), abs=2e-3)
        model.tensors["transform_matrix"] = matrix.float()
    assert last == {c: pytest.approx(mean_loss(model, trained.held, c), abs=1e-4) for c in connections}


def test_report(trained):
    """Catches a base loss of another model or connection than the one before training, a table with columns mixed
    up, and a verdict on the matrix that the losses do not give."""
    entries, cc = json_lines(trained.out / "train_log.jsonl"), trained.options.get("method", "cc") == "cc"
    base, last = entries[0]["base_loss"], [entry for entry in entries if "eval_loss" in entry][-1]["eval_loss"]
    assert base == pytest.approx(mean_loss(Reference(trained.folder), trained.held, "none"), abs=1e-4)
    expected = {"base model": base, "no connection": last["none"]}
    expected |= {"matrix": last["matrix"], "real English": last["english"]} if cc else {}
    assert dict(re.findall(r"^  (\w.*?)  +(\d\.\d{4})$", trained.said, re.MULTILINE)) == {
        name: f"{loss:.4f}" for name, loss in expected.items()}
    assert len(re.findall(r"layer \d \(\d+ %\)", trained.said)) == (2 if cc else 0)
    if cc:
        assert ("is better than no connection" in trained.said) == (last["matrix"] < last["none"])


def test_noted(trained):
    """Catches a template, method or option that is forgotten with the run, and languages that infer.py cannot
    list."""
    note, method = noted(trained.out), trained.options.get("method", "cc")
    assert (note["template"], note["method"]) == (trained.template, method)
    assert all(note["arguments"][name] == value for name, value in trained.options.items())
    assert note.get("languages") == (["de", "en", "hi", "sw"] if method == "cc" else None)
    assert f"template {trained.template}, {len(trained.steps)} steps" in trained.said
    assert (trained.out / "cctuning.safetensors").exists() == (method == "cc")
    printed = [int(step) for step in re.findall(r"^step +(\d+)/", trained.said, re.MULTILINE)]
    assert printed == sorted({*range(10, len(trained.steps), 10), len(trained.steps)})


# ---------------------------------------------------------------------------------------- options of training

def test_bfloat16(checkpoint, tmp_path, ran):
    """Catches a --dtype that computes in float32, weights that are trained or fitted in bfloat16, and a
    weight's copy that the English pass made without a graph and that keeps its gradient from the own-language
    pass."""
    data, out = write_data(tmp_path / "data.jsonl", SAMPLES), {}
    for dtype in ("float32", "bfloat16"):
        out[dtype] = tmp_path / dtype
        ran(*training(checkpoint(), data, out[dtype], dtype=dtype, lr=1e-3, ridge=0.1))
    exact, low = (losses(out[dtype]) for dtype in out)
    assert 1e-4 < np.abs(low / exact - 1).max() < 0.02
    before, exact, low = (tensors(folder) for folder in (checkpoint(), *out.values()))
    for name, weight in low.items():
        assert weight.dtype == torch.float32 and not weight.equal(weight.bfloat16().float()), name
        start = before.get(name, 0)
        moves = [(t[name] - start).flatten() for t in (exact, low)]
        assert torch.cosine_similarity(*moves, dim=0) > 0.95, name


def test_checkpoint_activations(checkpoint, tmp_path, ran):
    """Catches a layer that is not computed again, or an option that is parsed and then saves no memory: each
    product with a weight is to be done twice, the head's once, with the same losses."""
    data, counts = write_data(tmp_path / "data.jsonl", PAIRS), {}
    for option in (False, True):
        calls = counts[option] = Counter()

        def count(module, _, calls=calls):
            calls.update([module] * isinstance(module, torch.nn.Linear))
        handle = torch.nn.modules.module.register_module_forward_pre_hook(count)
        out = tmp_path / str(option)
        ran(*training(checkpoint(), data, out, method="sft", checkpoint_activations=option))
        handle.remove()
    assert sorted(counts[False].values()) == [2] * (4 * 7 + 1)  # steps
    assert sorted(counts[True].values()) == [2] + [4] * (4 * 7)
    assert np.abs(losses(tmp_path / "True") - losses(tmp_path / "False")).max() < 1e-5


def test_same_seed_same_run(checkpoint, tmp_path, ran):
    """Catches randomness outside the seed."""
    data = write_data(tmp_path / "data.jsonl", PAIRS)
    for out in "ab":
        ran(*training(checkpoint(**SMALL), data, tmp_path / out, seed=1, epochs=1))
    assert same(tmp_path / "a", tmp_path / "b")


def test_only_the_matrix(checkpoint, tmp_path, ran):
    """Catches --epochs 0 that changes weights or the Decision Maker, a fit on English prompts, on too few, on
    the first ones, on the same for every seed, or on what it is measured on (R^2 would be 1 here)."""
    pairs = [(f"{'swali' if i % 4 else 'question'} {i}", f"question {i}", "jibu", "") for i in range(60)]
    data, model, read = write_data(tmp_path / "data.jsonl", pairs), tmp_path / "model", []
    ran(*training(checkpoint(), write_data(tmp_path / "few.jsonl", PAIRS), model, epochs=1))
    foreign = [prompt if i % 4 else [] for i, (prompt, *_) in enumerate(encoded(checkpoint(), pairs))]
    for seed in (0, 1):
        out = tmp_path / f"{seed}"
        with reading() as calls:
            ran(*training(model, data, out, epochs=0, matrix_prompts=8, seed=seed))
        read.append(found_in(calls, foreign))
        note, before, after = noted(out)["matrix"], tensors(model), tensors(out)
        assert before.keys() == after.keys()
        assert [name for name in before if not before[name].equal(after[name])] == ["transform_matrix"]
        assert (note["prompts"], note["held_out"]) == (8, 9) and max(note["r_squared"]) < 0.9
        assert len(set(read[-1])) == len(read[-1]) == 17 and all(i % 4 for i in read[-1])
        assert max(read[-1][:8]) > 30 and max(read[-1][8:]) > 30  # a draw, of the fit and of what is kept out
    assert set(read[0][:8]) != set(read[1][:8])


# ------------------------------------------------------------------------------------------------------- data

@pytest.mark.parametrize("batch_size", [4, 50])
def test_order(checkpoint, tmp_path, ran, batch_size):
    """Catches samples lost or seen twice in an epoch, an order that repeats or follows length, and rows of
    very different length together."""
    rng = np.random.default_rng(0)
    pairs = [(f"{i}", "x", "mbili " * int(n), "sw") for i, n in enumerate(rng.integers(1, 60, 150))]
    data, folder = write_data(tmp_path / "data.jsonl", pairs), checkpoint(**SMALL)
    with reading() as calls:
        ran(*training(folder, data, tmp_path / "out", method="sft", batch_size=batch_size, micro_batch=4))
    rows = [prompt + answer for prompt, _, answer, _ in encoded(folder, pairs)]
    order = found_in(calls, rows)
    assert len(order) == 300 and len(losses(tmp_path / "out")) == 2 * math.ceil(150 / batch_size)
    assert sorted(order[:150]) == sorted(order[150:]) == list(range(150)) and order[:150] != order[150:]
    assert sum(len(call) * len(call[0]) for call in calls) < 1.2 * 2 * sum(map(len, rows))  # padding
    if batch_size == 4:
        means = [np.mean([len(rows[i]) for i in order[start:start + 4]]) for start in range(0, 148, 4)]
        assert abs(np.corrcoef(means, np.arange(37))[0, 1]) < 0.5


LONG = [("fupi", "a longer question: " + "what? " * 9, "jibu refu " * 30, "sw"),
        ("fupi", "long " * 80, "jibu", "sw"),
        ("ndefu " * 40, "short", "jibu", "sw"),
        ("nini " * 20, "what", "jibu", "sw")]


@pytest.mark.parametrize("length, kept, cut", [
    (43, [], 0), (44, [3], 1), (61, [3], 0), (62, [0, 3], 1), (162, [0, 3], 1)])
def test_lengths(checkpoint, tmp_path, run, length, kept, cut):
    """Catches a prompt that is cut instead of left out, or kept without a token of its answer, an English
    prompt held to the other language's length or left out at --max_length, an answer that is not cut there,
    and silence on it."""
    folder = checkpoint(**SMALL)
    rows = encoded(folder, LONG)
    assert [len(own) for own, *_ in rows] == [6, 6, 163, 43]
    assert [len(english) for _, english, *_ in rows] == [62, 323, 7, 6]
    with reading() as calls:
        data = write_data(tmp_path / "data.jsonl", LONG)
        code, said, err = run(*training(folder, data, tmp_path / "out", max_length=length, epochs=1))
    assert sorted(found_in(calls[:3], [(own + answer)[:length] for own, _, answer, _ in rows])) == kept
    if kept:
        assert code == 0 and f"{4 - len(kept)} of 4 samples dropped" in said
        assert re.findall(r"\d+ answers cut at \d+", said) == [f"{cut} answers cut at {length}"] * (cut > 0)
    else:
        assert code == 2 and f"all 4 prompts are too long for --max_length {length}" in err


@pytest.mark.parametrize("limit, length", [(2048, 1024), (96, 96)])
def test_default_length(tmp_path, ran, limit, length):
    """Catches answers of more than 1024 tokens, or than the model takes, where --max_length is not given."""
    folder = write_checkpoint(tmp_path / "model", max_position_embeddings=limit, **SMALL)
    data = write_data(tmp_path / "data.jsonl", [("nani?", "who?", "mimi " * 1200, "sw")])
    with reading() as calls:
        ran(*training(folder, data, tmp_path / "out", epochs=1))
    assert max(len(row) for call in calls if isinstance(call[0], list) for row in call) == length


def test_schema(checkpoint, tmp_path, ran):
    """Catches a JSON list read otherwise than JSON lines, an "input" that is lost in training or in
    answering, and English samples that are not seen as such."""
    folder = write_connection(write_checkpoint(tmp_path / "model", **SMALL))
    lines = [{"instruction": "Jibu:", "input": "2 + 3", "output": "5", "instruction_en": "Answer: 2 + 3"},
             {"instruction": "Answer:", "input": "2 + 3", "output": "5", "instruction_en": "Answer:"},
             {"instruction": "Say: 5", "output": "5", "instruction_en": "Say 5", "lang": "en", "input": " "}]
    (tmp_path / "list.json").write_text("[\n" + ",\n".join(map(json.dumps, lines)) + "\n]\n")
    (tmp_path / "lines.jsonl").write_text("\n".join(map(json.dumps, lines)))
    prompts = [prompt_ids(folder, text)[0] for text in
               ("Jibu:\n2 + 3", "Answer:\n2 + 3", "Say: 5", "Answer: 2 + 3", "Say 5")]
    for name in ("list.json", "lines.jsonl"):
        with reading() as calls:
            ran(*training(folder, tmp_path / name, tmp_path / name[:4], epochs=1))
        assert {1, 3, 4} <= set(found_in(calls[:2], prompts))  # the English pass
        assert noted(tmp_path / name[:4])["matrix"]["prompts"] == 1
        with reading() as calls:
            ran("infer", "--model", folder, "--input", tmp_path / name, "--connection=english",
                "--max_new_tokens=1")
        assert sorted(found_in(calls, prompts)) == [0, 1, 1, 2, 3, 4]
    assert same(tmp_path / "list", tmp_path / "line")


# --------------------------------------------------------------------------------------------------- defaults

DEFAULTS = {  # what --help and README.md promise
    "out": "out", "max_shard_size": 5.0, "method": "cc", "epochs": 3, "batch_size": 128, "lr": 1e-5,
    "seed": 0, "matrix_prompts": 1000, "ridge": 0.0, "micro_batch": 8, "keep": 2, "log_every": 10}


def promised(ran):
    """{option: what --help says between "(default: " and ")"}."""
    options = (re.sub(r"\s+", " ", text) for text in ran("train", "--help").split("\n  --")[1:])
    return {text.split()[0]: text.partition("(default: ")[2].split(")")[0] for text in options}


def test_defaults(checkpoint, tmp_path, ran, monkeypatch):
    """Catches a default that is not the one of README.md and --help, or that is said and not used."""
    data, told = write_data(tmp_path / "data.jsonl", PAIRS), promised(ran)
    model = checkpoint(**SMALL)
    monkeypatch.chdir(tmp_path)
    said = ran("train", "--model", model, "--data", data)
    used = noted(tmp_path / "out")["arguments"]
    for name, value in DEFAULTS.items():
        assert used[name] == value and told[name] in (str(value), repr(value)), name
    assert not any(used[name] for name in ("english_grad", "checkpoint_activations", "overwrite", "resume"))
    assert told["max_length"] == "1024, or what the model takes" and used["max_length"] is None
    assert len(losses(tmp_path / "out")) == 3 and logged(tmp_path / "out", "lr")[0] == 1e-5
    assert "cc on 1 x cpu, float32: 6 samples" in said or torch.cuda.is_available()


def test_embedded_defaults(checkpoint, tmp_path, ran, run, stop_at):
    """Catches other settings for the run without --model and --data than --help says, and one that replaces
    another model than an earlier one's."""
    given = dict(re.findall(r"--(\w+) (\S+)", promised(ran)["data"]))
    assert {name: float(value) for name, value in given.items()} == {
        "epochs": 2, "batch_size": 32, "micro_batch": 32, "lr": 1e-4}
    out = shutil.copytree(ROOT / "data" / "tuned", tmp_path / "out")
    stop_at(1, signal.SIGINT)
    with reading() as calls:
        code, said, err = run("train", "--out", out)
    assert code == 128 + signal.SIGINT, err
    count = 2 * math.ceil(len((ROOT / "data" / "train.jsonl").read_text().splitlines()) / 32)
    assert f" of {count}, saved" in said and max(len(call) for call in calls) == 32
    assert logged(out, "lr")[0] == pytest.approx(1e-4 / math.ceil(count / 10))
    code, _, err = run("train", "--out", shutil.copytree(checkpoint(), tmp_path / "other"))
    assert code == 2 and "other/config.json: was not written by train.py" in err


def test_plain_fine_tuning_without_english_versions(tmp_path, ran, checkpoint):
    """Catches --method sft that asks for instruction_en, which the paper's own file for it lacks, or that uses it."""
    runs = []
    for name, keys in (("with", ("instruction", "instruction_en", "output")), ("without", ("instruction", "output"))):
        lines = [json.dumps(dict(zip(keys, pair if name == "with" else pair[::2], strict=False))) for pair in PAIRS]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
        ran(*training(checkpoint(**SMALL), tmp_path / f"{name}.jsonl", tmp_path / name, method="sft"))
        runs.append(tensors(tmp_path / name))
    assert all(runs[0][key].equal(runs[1][key]) for key in runs[0])
