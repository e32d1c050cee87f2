"""Training: data, batches, the loss of a step, one process against two, what is saved."""
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import train
from cctuning import gumbel_noise, load_cctuning
from conftest import PAIRS, write_checkpoint, write_data
from model import Config, Tokenizer, pad

ROOT = Path(__file__).parent.parent


def steps_of(folder):
    """(losses, gradient norms) of the logged steps."""
    lines = [json.loads(line) for line in (folder / "train_log.jsonl").read_text().splitlines()]
    return [np.array([line[key] for line in lines if "loss" in line]) for key in ("loss", "grad_norm")]


def weights(folder):
    return {name: t for file in folder.glob("*.safetensors") for name, t in load_file(file).items()}


def worst_difference(a, b):
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


def arguments(folder, data, out, **options):
    options = {"lr": 1e-2, "epochs": 2, "batch_size": 6, "micro_batch": 6, "matrix_prompts": 40, "dtype": "float32", **options}
    flags = [f"--{name}" if value is True else f"--{name}={value}" for name, value in options.items() if value is not False]
    return ["--model", folder, "--data", data, "--out", out, *flags]


@pytest.mark.parametrize("method, english_grad", [("cc", False), ("cc", True), ("sft", False)])
def test_accumulation_and_two_processes_equal_one_batch(checkpoint, tmp_path, run, method, english_grad):
    """Catches a mean of means (answers differ in length), gradients summed over processes or averaged over micro-batches, Gumbel noise that
    depends on the process, and a process without a sample in the last step. 13 samples: steps of 6, 6 and 1."""
    data = write_data(tmp_path / "data.jsonl", (PAIRS * 3)[:13])
    options = dict(method=method, english_grad=english_grad, seed=3)
    code, _, err = run("train", *arguments(checkpoint(), data, tmp_path / "one", **options))
    assert code == 0, err
    run("train", *arguments(checkpoint(), data, tmp_path / "accumulated", **options, micro_batch=2))
    two = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", ROOT / "train.py",
           *arguments(checkpoint(), data, tmp_path / "two", **options, micro_batch=2)]
    done = subprocess.run([str(a) for a in two], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    losses, norms = steps_of(tmp_path / "one")
    assert len(losses) == 6 and losses[0] > losses[-1]
    for other in ("accumulated", "two"):
        other_losses, other_norms = steps_of(tmp_path / other)
        assert np.abs(other_losses - losses).max() < 1e-5, other
        assert np.abs(other_norms / norms - 1).max() < 1e-4, other
        assert worst_difference(weights(tmp_path / other), weights(tmp_path / "one")) < 1e-4, other
    assert (tmp_path / "one" / "cctuning.safetensors").exists() == (method == "cc")


@pytest.mark.parametrize("english_grad", [False, True])
def test_equals_a_plain_loop(checkpoint, tmp_path, run, english_grad):
    """Catches what every way of running has in common: gradients kept from the last step, betas, weight decay, Gumbel noise left out or
    repeated, --english_grad that changes nothing, a matrix fitted at another position, from English to own language, or without its ridge."""
    folder, data = checkpoint("chatml"), write_data(tmp_path / "data.jsonl", PAIRS[:5])
    code, _, err = run("train", *arguments(folder, data, tmp_path / "out", epochs=3, batch_size=3, english_grad=english_grad, ridge=0.1))
    assert code == 0, err
    log = [json.loads(line) for line in (tmp_path / "out" / "train_log.jsonl").read_text().splitlines()]
    cc, tokenizer = load_cctuning(folder, torch.float32), Tokenizer(folder, Config.read(folder))
    samples, _ = train.read_samples(data, tokenizer, 256)
    optimizer = torch.optim.AdamW(cc.parameters(), betas=(0.9, 0.999), weight_decay=0.0)
    for step, numbers in enumerate(numbers for epoch in range(3) for numbers in train.plan(samples, 3, 0, epoch)):
        batch = train.collate([samples[i] for i in numbers], tokenizer.connection_index)
        loss = cc(batch, "english", gumbel_noise(0, step, numbers, 4), english_grad) / (batch.labels != -100).sum()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(cc.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = log[step]["lr"]
        optimizer.step()
        assert abs(loss.item() - log[step]["loss"]) < 1e-4 and abs(norm.item() / log[step]["grad_norm"] - 1) < 1e-3, step
    saved, foreign = load_cctuning(tmp_path / "out"), [s for s in samples if not s.is_english]  # four samples: none is held out
    assert max((a - b).abs().max().item() for a, b in zip(cc.parameters(), saved.parameters())) < 1e-5
    with torch.no_grad():
        x, y = (cc.activations(ids, lengths + tokenizer.connection_index).flatten(0, 1).double()
                for ids, lengths in (pad([s.ids[:s.prompt_length] for s in foreign]), pad([s.english_ids for s in foreign])))
    expected = torch.linalg.solve(x.T @ x + 0.1 * x.square().sum() / 48 * torch.eye(48), x.T @ y)
    assert (saved.matrices["shared"] - expected).abs().max() < 1e-3 * expected.abs().max()


def test_keeps_dtype_and_template(tmp_path, run):
    """Catches weights saved in float32 whatever they came in, and a --template that is forgotten with the run."""
    folder = write_checkpoint(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    save_file({name: t.bfloat16() for name, t in tensors.items()}, folder / "model.safetensors")
    data = write_data(tmp_path / "data.jsonl", repeat=2)
    run("train", *arguments(folder, data, tmp_path / "out", epochs=1, template="llama2"))
    found = weights(tmp_path / "out")
    assert {t.dtype for name, t in found.items() if name in tensors} == {torch.bfloat16} and found["transform_matrix"].dtype == torch.float32
    assert Tokenizer(tmp_path / "out", Config.read(tmp_path / "out")).template == "llama2"


def test_fit_is_measured_on_other_prompts(checkpoint, tmp_path, run):
    """Catches R^2 taken on the prompts of the fit (1.00 here, where few prompts are fitted exactly), and --matrix_prompts ignored."""
    data = write_data(tmp_path / "data.jsonl", [(f"swali {i} {i * 7}", f"question {i * 3}", "jibu", "sw") for i in range(30)])
    run("train", *arguments(checkpoint(), data, tmp_path / "out", epochs=1, matrix_prompts=5))
    note = json.loads((tmp_path / "out" / "config.json").read_text())["cctuning"]["matrix"]
    assert (note["prompts"], note["held_out"]) == (5, 6) and max(note["r_squared"]) < 0.9


def test_same_seed_same_run(checkpoint, tmp_path, run):
    """Catches randomness outside the seed, and a seed that changes nothing."""
    data = write_data(tmp_path / "data.jsonl", repeat=2)
    for out, seed in (("a", 1), ("b", 1), ("c", 2)):
        run("train", *arguments(checkpoint(), data, tmp_path / out, seed=seed, epochs=1))
    a, b, c = (weights(tmp_path / out) for out in "abc")
    assert worst_difference(a, b) == 0 and worst_difference(a, c) > 0


@pytest.fixture
def tokenizer(checkpoint):
    folder = checkpoint("llama3")
    return Tokenizer(folder, Config.read(folder))


def test_targets(tokenizer, tmp_path):
    """Catches an end of turn that is not trained on, a prompt token that is, padding that is, and a connection position off by one."""
    samples, _ = train.read_samples(write_data(tmp_path / "data.jsonl"), tokenizer, 256)
    batch = train.collate(samples, tokenizer.connection_index)
    for i, (own, english, answer, _) in enumerate(PAIRS):
        prompt = tokenizer.prompt(own)
        targets = batch.labels[i][batch.labels[i] != -100].tolist()
        assert targets == tokenizer.answer(answer) and targets[-1] == tokenizer.control["<|eot_id|>"]
        assert batch.ids[i, :len(prompt)].tolist() == prompt and batch.position[i] == len(prompt) - 1
        assert batch.english_position[i] == len(tokenizer.prompt(english)) - 1


def test_lengths(tokenizer, tmp_path):
    """Catches an English prompt cut to the other language's length, a prompt cut instead of dropped, an answer not cut at --max_length."""
    data = write_data(tmp_path / "data.jsonl", [("fupi", "a much longer question in English: " + "what? " * 9, "jibu refu " * 30, "sw"),
                                                ("ndefu " * 60, "short", "jibu", "sw"), ("fupi", "long " * 60, "jibu", "sw")])
    samples, dropped = train.read_samples(data, tokenizer, 100)
    assert dropped == 2 and len(samples) == 1
    assert len(samples[0].ids) == 100 and samples[0].english_ids == tokenizer.prompt("a much longer question in English: " + "what? " * 9)


def test_schema(tokenizer, tmp_path):
    """Catches a JSON list read otherwise than JSON lines, an "input" that is lost, and English samples that are not seen as such."""
    lines = [{"instruction": "Jibu:", "input": "2 + 3", "output": "5", "instruction_en": "Answer: 2 + 3"},
             {"instruction": "Answer:", "input": "2 + 3", "output": "5", "instruction_en": "Answer:"}]
    (tmp_path / "list.json").write_text("[\n" + ",\n".join(json.dumps(line) for line in lines) + "\n]\n")
    (tmp_path / "lines.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    a, b = (train.read_samples(tmp_path / name, tokenizer, 256)[0] for name in ("list.json", "lines.jsonl"))
    assert a == b and [s.is_english for s in a] == [False, True]
    assert a[0].ids[:a[0].prompt_length] == tokenizer.prompt("Jibu:\n2 + 3")
    assert a[1].english_ids == a[1].ids[:a[1].prompt_length] == tokenizer.prompt("Answer:\n2 + 3")


@pytest.mark.parametrize("batch_size", [4, 50, 128, 300])
def test_plan(batch_size):
    """Catches samples lost or seen twice in an epoch, an order that repeats or follows length, and rows of very different length together."""
    rng = np.random.default_rng(0)
    samples = [train.Sample([0] * int(n), 1, [0], None, False) for n in rng.integers(2, 400, 700)]
    steps = train.plan(samples, batch_size, 0, 0)
    assert sorted(i for step in steps for i in step) == list(range(700))
    assert [len(s) for s in steps if len(s) != batch_size] in ([], [700 % batch_size])
    assert [list(s) for s in steps] != [list(s) for s in train.plan(samples, batch_size, 0, 1)]
    lengths = [[len(samples[i].ids) for i in step] for step in steps]
    assert all(step == sorted(step, reverse=True) for step in lengths)
    means = [np.mean(step) for step in lengths]
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.5 or len(means) < 10
    padding = 1 - sum(map(sum, lengths)) / sum(len(step[i:i + 4]) * step[i] for step in lengths for i in range(0, len(step), 4))
    assert padding < 0.15


def test_deal():
    """Catches a sample that no process gets, or two get, and processes that would wait for one another for ever."""
    for world in (1, 2, 3, 5):
        dealt = [list(train.Workers(rank, world, None, None).deal(list(range(11)), 2)) for rank in range(world)]
        assert len({len(groups) for groups in dealt}) == 1
        assert sorted(i for groups in dealt for group, real in groups if real for i in group) == list(range(11))


def test_only_the_matrix(checkpoint, tmp_path, run):
    """Catches --epochs 0 that changes weights or the Decision Maker, and per-language matrices that are not saved."""
    data = write_data(tmp_path / "data.jsonl", repeat=4)
    run("train", *arguments(checkpoint(), data, tmp_path / "trained", epochs=1))
    code, out, err = run("train", *arguments(tmp_path / "trained", data, tmp_path / "fitted", epochs=0, per_language=True, ridge=0.1))
    assert code == 0, err
    before, after = weights(tmp_path / "trained"), weights(tmp_path / "fitted")
    assert after.keys() - before.keys() == {"transform_matrix.de", "transform_matrix.hi", "transform_matrix.sw"}
    assert all(before[name].equal(after[name]) for name in before if name != "transform_matrix")
    assert not before["transform_matrix"].equal(after["transform_matrix"])
    note = json.loads((tmp_path / "fitted" / "config.json").read_text())["cctuning"]
    assert note["arguments"]["epochs"] == 0 and note["matrix"]["ridge"] == 0.1 and len(note["matrix"]["r_squared"]) == 4
    assert sum(note["matrix"]["prompts_per_language"].values()) == note["matrix"]["prompts"] == 16
    assert load_cctuning(tmp_path / "fitted").matrices.keys() == {"shared", "de", "hi", "sw"}


def test_validation_loss(checkpoint, tmp_path, run):
    """Catches a validation loss that is not the mean over answer tokens, or one whose connection is not what it says."""
    data = write_data(tmp_path / "data.jsonl", repeat=2)
    code, _, err = run("train", *arguments(checkpoint(), data, tmp_path / "out", eval_data=data, micro_batch=4))
    assert code == 0, err
    entries = [json.loads(line).get("eval_loss") for line in (tmp_path / "out" / "train_log.jsonl").read_text().splitlines()]
    per_epoch, found = [e for e in entries if e and len(e) == 1], entries[-1]
    assert [e.keys() for e in per_epoch] == [{"english"}] and found.keys() == {"english", "matrix", "none"}
    cc, tokenizer = load_cctuning(tmp_path / "out"), Tokenizer(tmp_path / "out", Config.read(tmp_path / "out"))
    samples, _ = train.read_samples(data, tokenizer, 256)
    with torch.no_grad():
        for connection, loss in found.items():
            batches = [train.collate([s], tokenizer.connection_index) for s in samples]
            expected = sum(cc(b, connection) for b in batches) / sum((b.labels != -100).sum() for b in batches)
            assert abs(loss - expected) < 1e-4, connection


def test_learning_rate(checkpoint, tmp_path, run):
    """Catches a warm-up that starts at zero or never ends, and a cosine that does not come down."""
    data = write_data(tmp_path / "data.jsonl", repeat=5)
    run("train", *arguments(checkpoint(), data, tmp_path / "out", epochs=4, lr=1e-3))
    rates = [json.loads(line)["lr"] for line in (tmp_path / "out" / "train_log.jsonl").read_text().splitlines() if '"lr"' in line]
    assert len(rates) == 20 and rates[:2] == [5e-4, 1e-3] and all(a >= b for a, b in zip(rates[1:], rates[2:])) and 0 < rates[-1] < 2e-5


def test_an_ablation_outlives_refitting(checkpoint, tmp_path, run):
    """Catches a fixed layer that is forgotten when the matrix is fitted again, and a Decision Maker that is trained though it does not choose."""
    data = write_data(tmp_path / "data.jsonl", PAIRS)
    assert run("train", *arguments(checkpoint(), data, tmp_path / "one", layer=2, epochs=1))[0] == 0
    assert run("train", *arguments(tmp_path / "one", data, tmp_path / "two", epochs=0))[0] == 0
    found, start = load_cctuning(tmp_path / "two"), load_cctuning(checkpoint())
    assert found.layer == 2 and torch.equal(found.decision_maker.weight, start.decision_maker.weight)
