"""infer.py against tests/reference.py, and against checkpoints whose answers are known."""
import json
import math
import os
import re
import shutil
import sys
import unicodedata
from collections import Counter
from functools import cache
from unittest.mock import MagicMock

import pytest
import torch
from safetensors.torch import load_file, save_file

import infer
from conftest import (PAIRS, ROOT, SPECIAL_TOKENS, json_lines, reading, sentencepiece_model, text_of,
                      write_checkpoint, write_connection, write_parrot)
from model import MLP
from reference import Reference, prompt_ids

ROLE = "chatml, assistant in several pieces"  # as in SmolLM2's tokenizer
STOP = [2, *range(330, 400)]  # many tokens end an answer, so that rows stop at different times
RECORDS = [{"instruction": own, "instruction_en": english, "lang": lang} for own, english, _, lang in PAIRS]


@pytest.fixture(scope="session")
def with_connection(tmp_path_factory):
    """with_connection(template, **config changes): a checkpoint with a connection, made once a session."""
    @cache
    def make(template, **changes):
        folder = tmp_path_factory.mktemp("with_connection") / "model"
        write_checkpoint(folder, template.split(",")[0], seed=4, **changes)
        if template == ROLE:
            sentencepiece_model(folder / "tokenizer.model", SPECIAL_TOKENS["chatml"], whole=[" assist"])
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": STOP}))
        return write_connection(folder)
    return make


@pytest.fixture
def ask(run, tmp_path):
    """ask(folder, records, *options): the lines that infer.py --input writes for these records."""
    def call(folder, records, *options):
        (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
        code, _, err = run("infer", "--model", folder, "--input", tmp_path / "in.jsonl",
                           "--output", tmp_path / "out.jsonl", *options)
        assert code == 0, err
        return json_lines(tmp_path / "out.jsonl")
    return call


@pytest.fixture
def feed(tmp_path):
    """feed(content): what standard input gives."""
    kept = os.dup(0)

    def give(content):
        (tmp_path / "stdin").write_bytes(content)
        with open(tmp_path / "stdin", "rb") as file:
            os.dup2(file.fileno(), 0)
    yield give
    os.dup2(kept, 0)
    os.close(kept)


@torch.no_grad()
def expected_answer(folder, template, own, english=None, connection="matrix", count=12, stop=STOP):
    """(text, the Decision Maker's probabilities or None) by the reference: greedy, without a cache."""
    reference, template = Reference(folder), template.split(",")[0]
    ids, index, turn = prompt_ids(folder, own, template)
    vector = probabilities = None
    if connection != "none":
        english = prompt_ids(folder, english, template)[0] if connection == "english" else None
        vector = reference.vector(ids, index, english)
        activations = reference.activations(english or ids, index)
        activations = activations if english else activations @ reference.tensors["transform_matrix"]
        probabilities = reference.scores(activations, ids[index]).softmax(-1).tolist()
    return text_of(folder, reference.answer(ids, count, {turn, *stop}, vector, index)), probabilities


# ------------------------------------------------------------------------------------ the right answers

@pytest.mark.parametrize("template, changes", [
    ("llama3", {}), ("chatml", {"model_type": "qwen2"}), ("mistral", {"tie_word_embeddings": True}),
    (ROLE, {})], ids=["llama3", "biases", "tied head", "role"])
@pytest.mark.parametrize("connection", ["matrix", "english", "none"])
def test_answers_equal_the_reference(with_connection, ask, template, changes, connection):
    """Catches a connection at another token than the template's, and prompts of a batch that mix."""
    folder = with_connection(template, **changes)
    option = [] if connection == "matrix" else ["--connection", connection]  # the matrix is the default
    answers = ask(folder, RECORDS, "--explain", "--batch_size=4", "--max_new_tokens=12", *option)
    for (own, english, *_), answer in zip(PAIRS, answers, strict=True):
        text, chances = expected_answer(folder, template, own, english, connection)
        assert answer["answer"] == text
        assert answer["probabilities"] == (chances and pytest.approx(chances, abs=1e-4))
        assert answer["layer"] == (chances and chances.index(max(chances)))
    assert len({answer["answer"] for answer in answers}) > 3


def test_dtype(with_connection, ask, tmp_path):
    """Catches a --dtype that is ignored, and another default than the stored weights' dtype."""
    folder = shutil.copytree(with_connection("chatml"), tmp_path / "half")
    weights = {name: tensor.bfloat16() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    added = load_file(folder / "cctuning.safetensors")
    save_file({name: tensor / 8 for name, tensor in added.items()}, folder / "cctuning.safetensors")

    def chances(*options):
        lines = ask(folder, RECORDS[:3], "--explain", "--max_new_tokens=1", *options)
        return torch.tensor([line["probabilities"] for line in lines])
    expected = [expected_answer(folder, "chatml", own, count=1)[1] for own, *_ in PAIRS[:3]]
    exact, bfloat16, float16 = (chances(f"--dtype={name}") for name in ("float32", "bfloat16", "float16"))
    assert (exact - torch.tensor(expected)).abs().max() < 1e-4
    assert 1e-6 < (float16 - exact).abs().max() < 0.005 and 1e-5 < (bfloat16 - exact).abs().max() < 0.1
    assert (chances() == bfloat16).all()


def test_no_connection(tmp_path, run):
    """Catches answers without a connection in silence, and a text taken for a list of letters."""
    plain = write_checkpoint(tmp_path / "plain", "chatml")
    code, out, err = run("infer", "--model", plain, "--prompt=hello", "--max_new_tokens=3")
    assert code == 0 and "no Transform Matrix" in err and "answering as a plain model" in err
    pytest.raises(TypeError, infer.Engine(plain).answer, "hello")
    with pytest.warns(match="no Transform Matrix"):
        assert infer.Engine(plain).answer(["hello"], max_new_tokens=3) == [out[:-1]]


@pytest.mark.parametrize("template", ["llama3", "chatml", "mistral"])
def test_the_connection_costs_a_few_tokens(with_connection, run, monkeypatch, template):
    """Catches a second pass over more than the tokens from p on, and a last FFN of more than one token."""
    folder, prompt = with_connection(template), "Nini mji mkuu wa Kenya, na wa India? " * 3
    widths, ffn = [], MLP.forward

    def forward(mlp, x, *more):
        widths.append(x.shape[1])
        return ffn(mlp, x, *more)
    monkeypatch.setattr(MLP, "forward", forward)
    code, _, _ = run("infer", "--model", folder, "--prompt", prompt, "--max_new_tokens=1")
    ids, index, _ = prompt_ids(folder, prompt, template)
    assert code == 0 and widths == [len(ids)] * 3 + [1] + [-index] * 4


# ---------------------------------------------------------------------------- the length of answers

def test_length_of_answers(tmp_path, ask):
    """Catches an answer that runs past --max_new_tokens, its default or the model's positions."""
    folder = write_parrot(tmp_path / "long", {"Say:": ["ha", "ha"]}, max_position_embeddings=280)
    records = [{"instruction": "Say:"}, {"instruction": "a longer one in the batch, Say:"}]
    lengths = [len(ask(folder, records, *option)[0]["answer"]) // len("ha")
               for option in ([], ["--max_new_tokens=7"], ["--max_new_tokens=1000"])]
    assert lengths == [256, 7, 280 - len(prompt_ids(folder, "Say:")[0])]


@pytest.mark.parametrize("room, code", [(1, 0), (0, 2)])
def test_length_of_prompts(tmp_path, run, room, code):
    """Catches a prompt, also English, refused though an answer token fits, or taken though none does."""
    text = "Mji mkuu wa Kenya " * 30
    folder = write_connection(write_parrot(tmp_path / "model", {"Say:": "ha"}))
    size, config = len(prompt_ids(folder, text)[0]), json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": size + room}))
    for prompt in (["--prompt", text], ["--prompt=Say:", "--prompt_en", text, "--connection=english"]):
        found, _, err = run("infer", "--model", folder, *prompt, "--max_new_tokens=2")
        assert found == code and (not code or "--prompt" in err and str(size) in err), err


def test_answers_that_overflow(tmp_path, run):
    """Catches an answer chosen from logits that are not finite."""
    folder = write_parrot(tmp_path / "model", {"Say:": "ha"})
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][-1] = torch.inf
    save_file(weights, folder / "model.safetensors")
    code, out, err = run("infer", "--model", folder, "--prompt=Say:")
    assert code == 2 and not out and "logits are not finite" in err.splitlines()[-1], err


# ------------------------------------------------------------------------------------------- sampling

CHANCES = {"yes": 0.5, "no": 0.25, "maybe": 0.17, "never": 0.08}


@pytest.fixture(scope="module")
def dice(tmp_path_factory):
    """A checkpoint that answers by chance: Really? in one token, Again? in one or three."""
    return write_parrot(tmp_path_factory.mktemp("dice") / "model", {
        "Really?": CHANCES,
        "Again?": [{"so": 0.5, "not": 0.5}, {"it": 0.5, "</s>": 0.5}, {"is": 0.5, "was": 0.5}]})


def throw(ask, folder, *options, count=800, question="Really?"):
    """The answers to the same question, asked `count` times."""
    records = [{"instruction": question}] * count
    return [line["answer"] for line in ask(folder, records, "--batch_size=800", *options)]


@pytest.mark.parametrize("temperature, top_p, kept", [
    (0.5, None, 4), (1, None, 4), (2, None, 4), (1, 0.0, 1), (1, 0.4, 1), (1, 0.6, 2), (1, 0.8, 3),
    (1, 0.95, 4), (2, 0.7, 3), (0.5, 0.6, 1), (0.001, None, 1), (1e-40, None, 1)])
def test_sampling(dice, ask, temperature, top_p, kept):
    """Catches a temperature upside down, a nucleus with a token too many or too few, a biased draw."""
    option = [] if top_p is None else [f"--top_p={top_p}"]
    found = Counter(throw(ask, dice, f"--temperature={temperature}", *option))
    weights = {text: (p / 0.5) ** (1 / temperature) for text, p in list(CHANCES.items())[:kept]}
    assert set(found) == set(weights)
    for text, weight in weights.items():
        p = weight / sum(weights.values())
        assert abs(found[text] / 800 - p) <= 4 * math.sqrt(p * (1 - p) / 800), (text, found)


def test_seed(dice, ask):
    """Catches draws that repeat for every prompt or seed, or that depend on the batch."""
    def answers(*options, count=60):
        return throw(ask, dice, "--temperature=2", *options, count=count, question="Again?")
    first = answers()
    assert set(first) == {"so", "soitis", "soitwas", "not", "notitis", "notitwas"}
    assert answers("--seed=0", "--batch_size=7") == first == answers(count=90)[:60]
    assert 25 < sum(a != b for a, b in zip(first, answers("--seed=1"), strict=True)) < 60


# ------------------------------------------------------------------------------------ the command line

def test_prompt_streams(tmp_path, run):
    """Catches a stream that differs from the whole answer, --template ignored, --explain without a layer."""
    folder, own = write_connection(write_checkpoint(tmp_path / "model", "llama3", seed=4)), PAIRS[0][0]
    text, chances = expected_answer(folder, "plain", own, count=25, stop=[2])
    explained = (f"[connection matrix: from layer {chances.index(max(chances))}; "
                 f"probabilities {' '.join(f'{p:.2f}' for p in chances)}]\n")
    options = ("--template=plain", "--max_new_tokens=25", "--explain")
    code, out, _ = run("infer", "--model", folder, "--prompt", own, *options)
    assert (code, out) == (0, explained + text + "\n") and len(text) > 20


def test_no_half_characters(tmp_path, run):
    """Catches a stream that prints a character before its last byte, or loses an unfinished one."""
    folder = write_parrot(tmp_path / "model", {
        "Nini?": ["one", "<0xE0>", "<0xA4>", "<0xA8>", "two"], "Na?": ["four", "<0xE2>"]})
    for prompt, answer in (("Nini?", "oneनtwo\n"), ("Na?", "four\ufffd\n")):
        assert run("infer", "--model", folder, "--prompt", prompt)[:2] == (0, answer)


def test_files(tmp_path, run, ask, feed, monkeypatch):
    """Catches answers out of order, fields lost or escaped, and - taken for a file's name."""
    says = {"moja?": "one", "mbili?": "two", "tatu?": "three"}
    folder = write_parrot(tmp_path / "model", says)
    records = [{"instruction": "Ni " + own, "id": 7, "output": "é", "input": " "} for own in says]
    records.append({"instruction": "moja?", "input": "mbili?", "lang": "xx"})
    answers = ["one", "two", "three", "two"]
    answered = [{**record, "answer": text} for record, text in zip(records, answers, strict=True)]
    with reading() as calls:
        assert ask(folder, records, "--batch_size=2") == answered
    assert max(len(call) for call in calls if isinstance(call[0], list)) == 2
    assert "é" in (tmp_path / "out.jsonl").read_text(encoding="utf-8")
    feed(json.dumps(records, indent=1).encode())
    monkeypatch.chdir(tmp_path)
    code, out, _ = run("infer", "--model", folder, "--input=-", "--output=-")
    assert code == 0 and [json.loads(line) for line in out.splitlines()] == answered


def test_standard_input(tmp_path, run, feed):
    """Catches an answer of several lines, and a byte order mark or carriage return in a prompt."""
    folder = write_parrot(tmp_path / "model", {"Nini?": ["a", "\n", "b"], "moja\u2028mbili?": "two"})
    feed("\ufeffNini?\r\n\r\nmoja\u2028mbili?".encode())
    with reading() as calls:
        found = run("infer", "--model", folder, "--prompt=-", "--explain")
    assert found[:2] == (0, "a\\nb  [connection none]\ntwo  [connection none]\n")
    prompts = sorted(prompt_ids(folder, line)[0] for line in ("Nini?", "moja\u2028mbili?"))
    assert sorted([*filter(None, row)] for row in calls[0]) == prompts
    feed(b"x\n\n" + b"na " * 300)
    code, out, err = run("infer", "--model", folder, "--prompt=-")
    assert code == 2 and not out and "input:3" in err, err


def test_at_a_terminal(tmp_path, run, monkeypatch):
    """Catches answers that wait for the last line, and a blank line that is asked."""
    folder = write_parrot(tmp_path / "model", {"Nini?": "hivi", "Na?": {"pia": 0.4, "tu": 0.6}})
    shown = []

    def typed():
        yield from ("Nini?\n", "\n")
        shown.append(sys.stdout.buffer.getvalue())  # before the last line
        yield "Na?\n"
    terminal = MagicMock()
    terminal.isatty.return_value = True
    terminal.__iter__.return_value = typed()
    monkeypatch.setattr("sys.stdin", terminal)
    code, out, err = run("infer", "--model", folder, "--prompt=-", "--temperature=1")
    assert (code, out, shown) == (0, "hivi\ntu\n", [b"hivi\n"]), err  # number 0 or 1 would draw pia


def test_default_model(tmp_path, run, monkeypatch):
    """Catches a model in `out` that is not used, and one half saved that is."""
    monkeypatch.chdir(tmp_path)
    folder, command = write_parrot(tmp_path / "parrot", {"nini?": "mine"}), ["infer", "--prompt=Hii ni nini?"]
    (tmp_path / "out").mkdir()
    shutil.copy(folder / "config.json", tmp_path / "out")  # killed while it was saved
    code, _, err = run(*command, "--max_new_tokens=4")
    assert code == 0 and err.splitlines()[0].endswith("data/tuned"), err
    shutil.copytree(folder, tmp_path / "out", dirs_exist_ok=True)
    names = dict.fromkeys(load_file(folder / "model.safetensors"), "model.safetensors")
    (tmp_path / "out" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    code, out, err = run(*command)
    assert (code, out) == (0, "mine\n") and err.splitlines()[0] == "model: out", err


def columns(text):
    """Columns at a terminal, for Chinese and Hindi."""
    marks = sum(unicodedata.category(letter) == "Mn" for letter in text)
    return len(text) - marks + sum(letter >= "\u3000" for letter in text)


@pytest.mark.parametrize("lang", ["zh", "hi"])
def test_built_in_questions(run, lang):
    """Catches columns that do not line up at a terminal, and right answers of other questions."""
    test = ROOT / "data" / "test" / "facts"
    questions = [line["instruction"] for line in json_lines(test / "split" / f"{lang}.json")]
    golds = json_lines(test / "ans" / f"{lang}.json")
    code, out, err = run("infer", "--lang", lang, "--explain", "--max_new_tokens=8")
    title, *rows, total = out.splitlines()
    assert code == 0 and len(rows) == 7 and total.startswith(f"{out.count('  right  ')} of 7 right;"), err
    for row in rows:
        question, answer, verdict, *_ = re.split("  +", row)
        gold = golds[questions.index(question)]
        assert verdict == ("right" if answer == gold else f"wrong: {gold}")
        assert columns(row[:row.index("  " + verdict)]) == columns(title[:title.index("  right?")])
