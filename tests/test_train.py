"""Training: data, batches, the loss of a step, what is saved."""
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import infer
import train
from cctuning import gumbel_noise, load_cctuning
from conftest import (PAIRS, UNEVEN, logged, losses, tensors, training, worst_difference, write_checkpoint,
                      write_data)
from model import Config, Tokenizer, pad


def note_of(folder):
    """What the run noted in the result's config.json."""
    return json.loads((folder / "config.json").read_text())["cctuning"]


@pytest.mark.parametrize("method, english_grad", [("cc", False), ("cc", True), ("sft", False)])
def test_accumulation_equals_one_batch(checkpoint, tmp_path, run, method, english_grad):
    """Catches a mean of means (answers differ in length), gradients averaged over micro-batches, and Gumbel noise that
    depends on the micro-batch. (For several processes: test_distributed.py.)"""
    data, one, parts = write_data(tmp_path / "data.jsonl", UNEVEN), tmp_path / "one", tmp_path / "parts"
    options = {"method": method, "english_grad": english_grad, "seed": 3}
    for out, micro_batch in ((one, 6), (parts, 2)):
        code, _, err = run(*training(checkpoint(), data, out, micro_batch=micro_batch, **options))
        assert code == 0, err
    assert len(losses(one)) == 6 and losses(one)[0] > losses(one)[-1]
    assert np.abs(losses(parts) - losses(one)).max() < 1e-5
    assert np.abs(logged(parts, "grad_norm") / logged(one, "grad_norm") - 1).max() < 1e-4
    assert worst_difference(tensors(parts), tensors(one)) < 1e-4
    assert (one / "cctuning.safetensors").exists() == (method == "cc")


def test_checkpoint_activations(checkpoint, tmp_path, run, monkeypatch):
    """Catches an option that is parsed and then saves no memory: each layer of both passes is to go through
    torch.utils.checkpoint, and the losses to be the same."""
    calls, once, data = [], train.checkpoint, write_data(tmp_path / "data.jsonl", PAIRS)
    monkeypatch.setattr(train, "checkpoint", lambda *given, **options: calls.append(1) or once(*given, **options))
    for out, option in (("plain", False), ("less", True)):
        command = training(checkpoint(), data, tmp_path / out, checkpoint_activations=option, matrix_prompts=1)
        assert run(*command)[0] == 0
        assert len(calls) >= (2 * 2 * 4 if option else 0) and bool(calls) == option  # steps, passes, layers
    assert np.abs(losses(tmp_path / "less") - losses(tmp_path / "plain")).max() < 1e-5


@pytest.mark.parametrize("english_grad", [False, True])
def test_equals_a_plain_loop(checkpoint, tmp_path, run, english_grad):
    """Catches what every way of running has in common: gradients kept from the last step, betas, weight decay, Gumbel
    noise left out or repeated, --english_grad that changes nothing, a matrix fitted at another position, from English
    to own language, or without its ridge."""
    folder, data, out = checkpoint("chatml"), write_data(tmp_path / "data.jsonl", PAIRS[:5]), tmp_path / "out"
    code, _, err = run(*training(folder, data, out, epochs=3, batch_size=3, english_grad=english_grad, ridge=0.1))
    assert code == 0, err
    cc, tokenizer = load_cctuning(folder, torch.float32), Tokenizer(folder, Config.read(folder))
    samples, _ = train.read_samples(data, tokenizer, 256)
    optimizer = torch.optim.AdamW(cc.parameters(), betas=(0.9, 0.999), weight_decay=0.0)
    steps = [numbers for epoch in range(3) for numbers in train.plan(samples, 3, 0, epoch)]
    log = zip(losses(out), logged(out, "grad_norm"), logged(out, "lr"), strict=True)
    for step, (numbers, (logged_loss, logged_norm, lr)) in enumerate(zip(steps, log, strict=True)):
        batch = train.collate([samples[i] for i in numbers], tokenizer.connection_index)
        loss = cc(batch, "english", gumbel_noise(0, step, numbers, 4), english_grad) / (batch.labels != -100).sum()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(cc.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        assert abs(loss.item() - logged_loss) < 1e-4 and abs(norm.item() / logged_norm - 1) < 1e-3, step
    saved = load_cctuning(out)
    assert max((a - b).abs().max().item() for a, b in zip(cc.parameters(), saved.parameters(), strict=True)) < 1e-5
    foreign = [s for s in samples if not s.is_english]  # four: none is held out
    with torch.no_grad():
        x, y = (cc.activations(ids, lengths + tokenizer.connection_index).flatten(0, 1).double() for ids, lengths in
                (pad([s.ids[:s.prompt_length] for s in foreign]), pad([s.english_ids for s in foreign])))
    expected = torch.linalg.solve(x.T @ x + 0.1 * x.square().sum() / 48 * torch.eye(48), x.T @ y)
    assert (saved.matrices["shared"] - expected).abs().max() < 1e-3 * expected.abs().max()


def test_keeps_dtype_and_template(tmp_path, run):
    """Catches weights saved in float32 whatever they came in, and a --template that is forgotten with the run."""
    folder, out = write_checkpoint(tmp_path / "model"), tmp_path / "out"
    weights = {name: t.bfloat16() for name, t in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors")
    data = write_data(tmp_path / "data.jsonl", repeat=2)
    run(*training(folder, data, out, epochs=1, template="llama2"))
    found = tensors(out)
    assert {found[name].dtype for name in weights} == {torch.bfloat16}
    assert found["transform_matrix"].dtype == torch.float32
    assert Tokenizer(out, Config.read(out)).template == "llama2"


def test_fit_is_measured_on_other_prompts(checkpoint, tmp_path, run):
    """Catches R^2 taken on the prompts of the fit (1.00 here, where few prompts are fitted exactly), and
    --matrix_prompts ignored."""
    pairs = [(f"swali {i} {i * 7}", f"question {i * 3}", "jibu", "sw") for i in range(30)]
    data = write_data(tmp_path / "data.jsonl", pairs)
    run(*training(checkpoint(), data, tmp_path / "out", epochs=1, matrix_prompts=5))
    note = note_of(tmp_path / "out")["matrix"]
    assert (note["prompts"], note["held_out"]) == (5, 6) and max(note["r_squared"]) < 0.9


def test_same_seed_same_run(checkpoint, tmp_path, run):
    """Catches randomness outside the seed, and a seed that changes nothing."""
    data = write_data(tmp_path / "data.jsonl", repeat=2)
    for out, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(*training(checkpoint(), data, tmp_path / out, seed=seed, epochs=1))
    a, b, c = (tensors(tmp_path / out) for out in "abc")
    assert worst_difference(a, b) == 0 and worst_difference(a, c) > 0


@pytest.fixture
def tokenizer(checkpoint):
    folder = checkpoint("llama3")
    return Tokenizer(folder, Config.read(folder))


def test_targets(tokenizer, tmp_path):
    """Catches an end of turn that is not trained on, a prompt token that is, padding that is, and a connection position
    off by one."""
    samples, _ = train.read_samples(write_data(tmp_path / "data.jsonl"), tokenizer, 256)
    batch = train.collate(samples, tokenizer.connection_index)
    for i, (own, english, answer, _) in enumerate(PAIRS):
        prompt = tokenizer.prompt(own)
        targets = batch.labels[i][batch.labels[i] != -100].tolist()
        assert targets == tokenizer.answer(answer) and targets[-1] == tokenizer.control["<|eot_id|>"]
        assert batch.ids[i, :len(prompt)].tolist() == prompt and batch.position[i] == len(prompt) - 1
        assert batch.english_position[i] == len(tokenizer.prompt(english)) - 1


def test_lengths(tokenizer, tmp_path):
    """Catches an English prompt cut to the other language's length, a prompt cut instead of dropped, an answer not cut
    at --max_length."""
    english = "a much longer question in English: " + "what? " * 9
    data = write_data(tmp_path / "data.jsonl", [
        ("fupi", english, "jibu refu " * 30, "sw"),
        ("ndefu " * 60, "short", "jibu", "sw"),
        ("fupi", "long " * 60, "jibu", "sw"),
    ])
    samples, dropped = train.read_samples(data, tokenizer, 100)
    assert dropped == 2 and len(samples) == 1
    assert len(samples[0].ids) == 100 and samples[0].english_ids == tokenizer.prompt(english)


def test_schema(tokenizer, tmp_path):
    """Catches a JSON list read otherwise than JSON lines, an "input" that is lost, and English samples that are not
    seen as such."""
    lines = [{"instruction": "Jibu:", "input": "2 + 3", "output": "5", "instruction_en": "Answer: 2 + 3"},
             {"instruction": "Answer:", "input": "2 + 3", "output": "5", "instruction_en": "Answer:"}]
    (tmp_path / "list.json").write_text("[\n" + ",\n".join(json.dumps(line) for line in lines) + "\n]\n")
    (tmp_path / "lines.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    a, b = (train.read_samples(tmp_path / name, tokenizer, 256)[0] for name in ("list.json", "lines.jsonl"))
    assert a == b and [s.is_english for s in a] == [False, True]
    assert a[0].ids[:a[0].prompt_length] == tokenizer.prompt("Jibu:\n2 + 3")
    assert a[1].english_ids == a[1].ids[:a[1].prompt_length] == tokenizer.prompt("Answer:\n2 + 3")


def test_english_version_of_a_prompt_to_answer(checkpoint, tmp_path, run, monkeypatch):
    """Catches an "input" that the English pass sees in training and not in answering, and a --lang that overrules the
    line's own."""
    own = {"instruction": "Answer:", "input": "2 + 3", "instruction_en": "Answer:", "output": "5", "lang": "de"}
    data, seen, prompt = tmp_path / "data.jsonl", [], infer.Engine.prompt
    data.write_text(json.dumps(own))
    monkeypatch.setattr(infer.Engine, "prompt", lambda *given: seen.append(given[1:4]) or prompt(*given))
    assert run("infer", "--model", checkpoint(), "--input", data, "--lang", "sw", "--max_new_tokens", 1)[0] == 0
    assert seen == [("Answer:\n2 + 3", "Answer:\n2 + 3", "de")]


@pytest.mark.parametrize("batch_size", [4, 50, 128, 300])
def test_plan(batch_size):
    """Catches samples lost or seen twice in an epoch, an order that repeats or follows length, and rows of very
    different length together."""
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
    computed = sum(len(step[i:i + 4]) * step[i] for step in lengths for i in range(0, len(step), 4))
    assert 1 - sum(map(sum, lengths)) / computed < 0.15  # padding


def test_deal():
    """Catches a sample that no process gets, or two get, and processes that would wait for one another for ever."""
    for world in (1, 2, 3, 5):
        dealt = [list(train.Workers(rank, world, None, None).deal(list(range(11)), 2)) for rank in range(world)]
        assert len({len(groups) for groups in dealt}) == 1
        assert sorted(i for groups in dealt for group, real in groups if real for i in group) == list(range(11))


def test_only_the_matrix(checkpoint, tmp_path, run):
    """Catches --epochs 0 that changes weights or the Decision Maker, and per-language matrices that are not saved."""
    data, trained, fitted = write_data(tmp_path / "data.jsonl", repeat=4), tmp_path / "trained", tmp_path / "fitted"
    run(*training(checkpoint(), data, trained, epochs=1))
    code, _, err = run(*training(trained, data, fitted, epochs=0, per_language=True, ridge=0.1))
    assert code == 0, err
    before, after = tensors(trained), tensors(fitted)
    assert after.keys() - before.keys() == {"transform_matrix.de", "transform_matrix.hi", "transform_matrix.sw"}
    assert all(before[name].equal(after[name]) for name in before if name != "transform_matrix")
    assert not before["transform_matrix"].equal(after["transform_matrix"])
    note = note_of(fitted)
    assert note["arguments"]["epochs"] == 0
    assert note["matrix"]["ridge"] == 0.1 and len(note["matrix"]["r_squared"]) == 4
    assert sum(note["matrix"]["prompts_per_language"].values()) == note["matrix"]["prompts"] == 16
    assert load_cctuning(fitted).matrices.keys() == {"shared", "de", "hi", "sw"}


def test_validation_loss(checkpoint, tmp_path, run):
    """Catches a validation loss that is not the mean over answer tokens, or one whose connection is not what it
    says."""
    data, out = write_data(tmp_path / "data.jsonl", repeat=2), tmp_path / "out"
    code, _, err = run(*training(checkpoint(), data, out, eval_data=data, micro_batch=4))
    assert code == 0, err
    first, last = logged(out, "eval_loss")
    assert first.keys() == {"english"} and last.keys() == {"english", "matrix", "none"}
    cc, tokenizer = load_cctuning(out), Tokenizer(out, Config.read(out))
    samples, _ = train.read_samples(data, tokenizer, 256)
    batches = [train.collate([s], tokenizer.connection_index) for s in samples]
    with torch.no_grad():
        for connection, loss in last.items():
            expected = sum(cc(b, connection) for b in batches) / sum((b.labels != -100).sum() for b in batches)
            assert abs(loss - expected) < 1e-4, connection


def test_learning_rate(checkpoint, tmp_path, run):
    """Catches a warm-up that starts at zero or never ends, and a cosine that does not come down."""
    data = write_data(tmp_path / "data.jsonl", repeat=5)
    run(*training(checkpoint(), data, tmp_path / "out", epochs=4, lr=1e-3))
    rates = logged(tmp_path / "out", "lr").tolist()
    assert len(rates) == 20 and rates[:2] == [5e-4, 1e-3] and 0 < rates[-1] < 2e-5
    assert rates[1:] == sorted(rates[1:], reverse=True)


def test_an_ablation_outlives_refitting(checkpoint, tmp_path, run):
    """Catches a fixed layer that is forgotten when the matrix is fitted again, and a Decision Maker that is trained
    though it does not choose."""
    data = write_data(tmp_path / "data.jsonl", PAIRS)
    assert run(*training(checkpoint(), data, tmp_path / "one", source_layer=2, epochs=1))[0] == 0
    assert run(*training(tmp_path / "one", data, tmp_path / "two", epochs=0))[0] == 0
    found, start = load_cctuning(tmp_path / "two"), load_cctuning(checkpoint())
    assert found.source_layer == 2 and torch.equal(found.decision_maker.weight, start.decision_maker.weight)
