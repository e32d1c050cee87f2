"""train.py against tests/reference.py, which computes one prompt at a time."""
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
from torch.nn.modules.module import register_module_forward_pre_hook

from conftest import (PAIRS, ROOT, json_lines, logged, losses, reading, tensors, training,
                      write_checkpoint, write_connection, write_data)
from reference import Reference, gumbel, prompt_ids

SAMPLES = [(own + end, english + end, answer + end, lang) for end in ("", " tano", " na mbili na tatu")
           for own, english, answer, lang in PAIRS][:12]
SMALL = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
HELD = [("nani?", "who?", "mimi", "sw"), ("Wer?", "Who?", "ich und du und er und sie", "de"),
        ("who?", "who?", "I", "en")]
RUNS = {  # what is trained, in steps of 4 of the 12 samples
    "llama3": {"template": "llama3", "seed": 18, "torch_dtype": "bfloat16"},
    "chatml": {"template": "chatml", "english_grad": True, "micro_batch": 3},
    "sft": {"template": "plain", "method": "sft", "micro_batch": 1, "epochs": 10, "layers": 1},
}


def noted(folder):
    """What the run noted in the result's config.json."""
    return json.loads((folder / "config.json").read_text())["cctuning"]


def encoded(folder, pairs, template="plain"):
    """[(prompt, English prompt, answer, connection position from the prompt's end)] of pairs, as ids."""
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
    """Validation: the mean loss of all answer tokens; the Decision Maker takes its first choice."""
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
    """The steps (lists of sample numbers) of a run, computed plainly; held-out losses after each third."""
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
    """One of RUNS, and the same run by the reference."""
    options, base = dict(RUNS[request.param]), tmp_path_factory.mktemp(request.param)
    template, dtype = options.pop("template"), options.pop("torch_dtype", "float32")
    changes = {"torch_dtype": dtype, "num_hidden_layers": options.pop("layers", 4)}
    folder, out = write_checkpoint(base / "model", template, **changes), base / "out"
    weights, kind = load_file(folder / "model.safetensors"), getattr(torch, dtype)
    save_file({name: t.to(kind) for name, t in weights.items()}, folder / "model.safetensors")
    is_sft = options.get("method") == "sft"  # it needs no English versions
    samples = [(own, None if is_sft else english, answer, lang) for own, english, answer, lang in SAMPLES]
    options |= {} if is_sft else {"ridge": 0.1}
    files = write_data(base / "data.jsonl", samples), write_data(base / "held.jsonl", HELD)
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
    """Catches a connection at another token, noise that repeats, a mean of means, another learning rate."""
    epochs = [trained.steps[i:i + 3] for i in range(0, len(trained.steps), 3)]
    assert len(epochs) == trained.options.get("epochs", 2) and epochs[0] != epochs[1]
    assert np.abs(losses(trained.out) - trained.expected.losses).max() < 1e-4
    assert np.abs(logged(trained.out, "grad_norm") / trained.expected.norms - 1).max() < 1e-3
    assert max(trained.expected.norms) > 2  # what clipping at 1 changes
    count, peak = len(trained.steps), 1e-2
    warm = math.ceil(count / 10)
    rest = [(1 + math.cos(math.pi * i / (count - warm))) / 2 for i in range(count - warm)]
    expected = [peak * (i + 1) / warm for i in range(warm)] + [peak * share for share in rest]
    assert logged(trained.out, "lr") == pytest.approx(expected, rel=1e-6)


def test_saved_weights(trained):
    """Catches weights trained in their stored dtype, or saved in another."""
    found, stored = tensors(trained.out), tensors(trained.folder)
    for name, weight in trained.model.tensors.items():
        kept = stored[name].dtype if name in stored else torch.float32
        assert found[name].dtype == kept
        weight = weight.detach().to(kept).float()
        # The mean: AdamW may move a weight whose gradient is all rounding either way.
        assert (found[name].float() - weight).abs().mean() < 1e-5 * (1 + 10 * (kept == torch.bfloat16)), name


@torch.no_grad()
def pairs_of(model, rows):
    """X and Y (L, N, d), float64, of the prompts in these rows and of their English versions."""
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
    """Catches a matrix fitted at another position or with what it is measured on, and a wrong validation."""
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
        assert order[:10] == order[10:]  # before and after training
        order, start = order[:10], Reference(trained.folder)
        note, saved = noted(trained.out)["matrix"], tensors(trained.out)["transform_matrix"]
        size = note["prompts"]
        fit, test = [foreign[i] for i in order[:size]], [foreign[i] for i in order[size:]]
        matrix = fitted(model, fit, 0.1)
        assert len(fit) + len(test) == len(set(order)) == 10 and len(test) == note["held_out"] > 0
        assert saved.dtype == torch.float32 and (saved - matrix).abs().max() < 1e-3 * matrix.abs().max()
        if len({tuple(english) for _, english, *_ in test}) > 1:  # else nothing to explain
            assert note["r_squared"] == pytest.approx(explained(model, test, matrix), abs=2e-3)
            before = explained(start, test, fitted(start, fit, 0.1))
            assert note["r_squared_before"] == pytest.approx(before, abs=2e-3)
        model.tensors["transform_matrix"] = matrix.float()
    assert last == {c: pytest.approx(mean_loss(model, trained.held, c), abs=1e-4) for c in connections}


def test_report(trained):
    """Catches a base loss of another model or connection, and a verdict that the losses do not give."""
    entries, method = json_lines(trained.out / "train_log.jsonl"), trained.options.get("method", "cc")
    base, last = entries[0]["base_loss"], [line for line in entries if "eval_loss" in line][-1]["eval_loss"]
    assert base == pytest.approx(mean_loss(Reference(trained.folder), trained.held, "none"), abs=1e-4)
    expected, note = {"base model": base, "no connection": last["none"]}, noted(trained.out)
    if method == "cc":
        expected |= {"matrix": last["matrix"], "real English": last["english"]}
        assert ("helps at inference" in trained.said) == (last["matrix"] < last["none"])
    assert dict(re.findall(r"^  (\w.*?)  +(\d\.\d{4})$", trained.said, re.MULTILINE)) == {
        name: f"{loss:.4f}" for name, loss in expected.items()}
    assert (note["template"], note["method"]) == (trained.template, method)
    assert all(note["arguments"][name] == value for name, value in trained.options.items())


def test_bfloat16(checkpoint, tmp_path, ran):
    """Catches a --dtype that computes in float32, and weights trained or fitted in bfloat16."""
    data, found = write_data(tmp_path / "data.jsonl", SAMPLES), []
    for dtype in ("float32", "bfloat16"):
        ran(*training(checkpoint(), data, tmp_path / dtype, dtype=dtype, lr=1e-3, ridge=0.1))
        found.append(tensors(tmp_path / dtype))
    changes = losses(tmp_path / "bfloat16") / losses(tmp_path / "float32") - 1
    assert 1e-4 < np.abs(changes).max() < 0.02
    for name, weight in found[1].items():
        assert weight.dtype == torch.float32 and not weight.equal(weight.bfloat16().float()), name
        start = tensors(checkpoint()).get(name, torch.zeros(1))
        moves = [(t[name] - start).flatten() for t in found]
        assert torch.cosine_similarity(*moves, dim=0) > 0.95, name


def test_checkpoint_activations(checkpoint, tmp_path, ran):
    """Catches an option that saves no memory: each product of a layer with a weight is to be done twice."""
    data, counts = write_data(tmp_path / "data.jsonl", PAIRS), Counter()
    handle = register_module_forward_pre_hook(
        lambda module, _: counts.update([module] * isinstance(module, torch.nn.Linear)))
    ran(*training(checkpoint(), data, tmp_path / "out", method="sft", checkpoint_activations=True))
    handle.remove()
    assert sorted(counts.values()) == [2] + [4] * (4 * 7)  # of 2 steps; the head's once


def test_only_the_matrix(tmp_path, ran):
    """Catches --epochs 0 that changes weights, and R^2 measured on the fit's prompts or translations."""
    pairs = [(f"{word} {i}", f"question {i % 20}", f"jibu {n}", "sw") for n in range(3)
             for word in ("swali", "frage") for i in range(40)]  # 80 prompts, 3 answers each, 20 versions
    pairs += [(f"question {i}", f"question {i}", "answer", "en") for i in range(20)]
    folder = write_connection(write_checkpoint(tmp_path / "model"))
    data, fits = write_data(tmp_path / "data.jsonl", pairs), []
    prompts = [prompt for prompt, *_ in encoded(folder, pairs)][:80]
    for seed in (0, 1):
        out = tmp_path / f"{seed}"
        with reading() as calls:
            ran(*training(folder, data, out, epochs=0, matrix_prompts=20, seed=seed))
        order = found_in(calls, prompts)
        fit, test = order[:20], order[20:]
        assert (noted(out)["matrix"]["prompts"], noted(out)["matrix"]["held_out"]) == (20, len(test))
        before, after = tensors(folder), tensors(out)
        assert [name for name in after if not before[name].equal(after[name])] == ["transform_matrix"]
        assert len(set(order)) == len(order) and len(test) > 3
        assert not {i % 20 for i in fit} & {i % 20 for i in test}  # 40 is a multiple of 20
        assert max(fit) > 40 and max(test) > 40  # a draw
        assert len(prompts[fit[-1]]) == min(map(len, prompts))  # not of the longest alone
        fits.append(set(fit))
    assert fits[0] != fits[1]


# --------------------------------------------------------------------------------- data and defaults

@pytest.mark.parametrize("batch_size", [4, 50])
def test_order(checkpoint, tmp_path, ran, batch_size):
    """Catches samples lost or doubled, an order that repeats or follows length, and much padding."""
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
        ("fupi", "long " * 80, "jibu", "sw"), ("ndefu " * 40, "short", "jibu", "sw"),
        ("nini " * 20, "what", "jibu", "sw")]  # prompts of 6, 6, 163 and 43 tokens; English 62, 323, 7, 6


@pytest.mark.parametrize("model, given, kept, cut", [
    (256, 43, [], 0), (256, 44, [3], 1), (256, 61, [3], 0), (256, 62, [0, 3], 1), (62, False, [0, 3], 1)])
def test_lengths(checkpoint, tmp_path, run, model, given, kept, cut):
    """Catches a prompt cut, or kept without a token of its answer, and an answer not cut, or in silence."""
    folder, length = checkpoint(max_position_embeddings=model, **SMALL), given or model
    data, rows = write_data(tmp_path / "data.jsonl", LONG), encoded(folder, LONG)
    with reading() as calls:
        code, said, err = run(*training(folder, data, tmp_path / "out", max_length=given, epochs=1))
    assert sorted(found_in(calls[:3], [(own + answer)[:length] for own, _, answer, _ in rows])) == kept
    told = f"{4 - len(kept)} of 4 samples dropped" if kept else "all prompts are too long"
    assert code == (0 if kept else 2) and told in said + err
    assert re.findall(r"\d+ answers cut at \d+", said) == [f"{cut} answers cut at {length}"] * (cut > 0)


def test_schema(checkpoint, tmp_path, ran):
    """Catches an "input" lost, or appended to another English version, and English not seen as such."""
    lines = [{"instruction": "Jibu:", "input": "2 + 3", "output": "5", "instruction_en": "Answer: 2 + 3"},
             {"instruction": "Answer:", "input": "2 + 3", "output": "5", "instruction_en": "Answer:"},
             {"instruction": "Say: 5", "output": "5", "instruction_en": "Say 5", "lang": "en", "input": " "}]
    (tmp_path / "data.json").write_text("\n" + json.dumps(lines, indent=1))
    prompts = [prompt_ids(checkpoint(**SMALL), text)[0] for text in
               ("Jibu:\n2 + 3", "Answer:\n2 + 3", "Say: 5", "Answer: 2 + 3", "Say 5")]
    with reading() as calls:
        ran(*training(checkpoint(**SMALL), tmp_path / "data.json", tmp_path / "out", epochs=1))
    assert {0, 1, 3, 4} <= set(found_in(calls, prompts))  # in the English pass and in the fit
    assert {"prompts": 1, "held_out": 0}.items() <= noted(tmp_path / "out")["matrix"].items()


DEFAULTS = {"out": "out", "method": "cc", "epochs": 3, "batch_size": 128, "lr": 1e-5, "max_length": 1024,
            "seed": 0, "matrix_prompts": 1000, "ridge": 0.0, "micro_batch": 8}


def test_defaults(checkpoint, tmp_path, ran, monkeypatch):
    """Catches another default, and one that is said and not used."""
    monkeypatch.chdir(tmp_path)
    ran("train", "--model", checkpoint(**SMALL), "--data", write_data(tmp_path / "data.jsonl", PAIRS))
    used = noted(tmp_path / "out")["arguments"]
    assert {name: used[name] for name in DEFAULTS} == DEFAULTS
    assert len(losses(tmp_path / "out")) == 3 and logged(tmp_path / "out", "lr")[0] == 1e-5


def test_the_built_in_run(tmp_path, run, stop_at):
    """Catches other settings than README.md says, and data/tuned refused by its own command."""
    out = shutil.copytree(ROOT / "data" / "tuned", tmp_path / "out")
    stop_at(1, signal.SIGINT)
    with reading() as calls:
        code, said, err = run("train", "--out", out)
    assert code == 128 + signal.SIGINT and " on 100 others " in said, err
    count = 2 * math.ceil(len((ROOT / "data" / "train.jsonl").read_text().splitlines()) / 32)
    assert f" of {count}; continue" in said and max(len(call) for call in calls) == 32
    assert logged(out, "lr")[0] == pytest.approx(1e-4 / math.ceil(count / 10))
