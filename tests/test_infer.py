"""Answering: what infer.py prints and writes, against tests/reference.py and against checkpoints whose
answers are known."""
import contextlib
import io
import json
import math
import os
import re
import shutil
import sys
from collections import Counter
from functools import cache

import pytest
import sentencepiece
import torch
from safetensors.torch import load_file, save_file

import infer
from conftest import (PAIRS, ROOT, SPECIAL_TOKENS, json_lines, reading, sentencepiece_model, text_of,
                      write_checkpoint, write_connection, write_parrot)
from model import MLP
from reference import Reference, prompt_ids

TEMPLATES = ["llama3", "chatml", "mistral"]  # they connect at the last token, before it, and in the text
ROLE = "chatml, assistant in several pieces"  # as in SmolLM2's tokenizer: three from the end
STOP = [2, *range(330, 400)]  # many tokens end an answer, so that rows stop at different times
RECORDS = [{"instruction": own, "instruction_en": english, "lang": lang} for own, english, _, lang in PAIRS]


@pytest.fixture(scope="session")
def connected(tmp_path_factory):
    """connected(template, **config changes): a checkpoint with a connection, made once a session."""
    @cache
    def make(template, **changes):
        folder = tmp_path_factory.mktemp("connected") / "model"
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
def feed(tmp_path, monkeypatch):
    """feed(content): what standard input gives, by its name and by its descriptor."""
    kept = os.dup(0)

    def give(content):
        (tmp_path / "stdin").write_bytes(content)
        with open(tmp_path / "stdin", "rb") as file:
            os.dup2(file.fileno(), 0)
        monkeypatch.setattr("sys.stdin", open(0, encoding="utf-8", closefd=False))
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

@pytest.mark.parametrize("template", [*TEMPLATES, ROLE])
@pytest.mark.parametrize("connection", ["matrix", "english", "none"])
def test_answers_equal_the_reference(connected, ask, template, connection):
    """Catches a connection at another token than the template's, logits read there, padding or cache rows
    that mix prompts up when one stops, a matrix or English version not used, another layer reported."""
    folder = connected(template)
    answers = ask(folder, RECORDS, "--connection", connection, "--explain", "--batch_size=4",
                  "--max_new_tokens=12")
    for (own, english, *_), answer in zip(PAIRS, answers, strict=True):
        text, chances = expected_answer(folder, template, own, english, connection)
        assert answer["answer"] == text
        assert answer["probabilities"] == (chances and pytest.approx(chances, abs=1e-4))
        assert answer["layer"] == (chances and chances.index(max(chances)))
    assert len({answer["answer"] for answer in answers}) > 3


@pytest.mark.parametrize("changes, options, template", [
    ({"model_type": "qwen2"}, [], "chatml"), ({"tie_word_embeddings": True}, [], "chatml"),
    ({}, ["--template=plain"], "plain")], ids=["bias", "tied head", "template"])
def test_other_models_and_templates(connected, ask, changes, options, template):
    """Catches a bias or a tied head lost where weights are laid out anew, and a --template ignored, or
    overruled by the checkpoint's control tokens."""
    folder = connected("chatml", **changes)
    answers = ask(folder, RECORDS[:3], "--explain", "--max_new_tokens=6", *options)
    for record, answer in zip(RECORDS, answers, strict=False):
        text, chances = expected_answer(folder, template, record["instruction"], count=6)
        assert answer["answer"] == text and answer["probabilities"] == pytest.approx(chances, abs=1e-4)


def test_dtype(connected, ask, tmp_path):
    """Catches a --dtype that is ignored, another default than the stored weights' dtype, a product in half
    precision that is far off, and a Decision Maker or matrix rounded to that dtype."""
    folder = shutil.copytree(connected("chatml"), tmp_path / "half")
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


def test_default_connection(connected, ask, tmp_path, run):
    """Catches a matrix not used unless asked for, and answers without one in silence, also from Python."""
    texts = [[line["answer"] for line in ask(connected("llama3"), RECORDS, "--max_new_tokens=9", *option)]
             for option in ([], ["--connection=matrix"], ["--connection=none"])]
    assert texts[0] == texts[1] != texts[2]
    plain = write_checkpoint(tmp_path / "plain", "chatml")
    command = ("infer", "--model", plain, "--prompt=hello", "--max_new_tokens=3")
    for lacks in ("no cctuning.safetensors", "no Transform Matrix"):
        code, out, err = run(*command)
        assert code == 0 and err.count("\n") == 1 and lacks in err and "answering as a plain model" in err
        with pytest.warns(match=lacks):
            assert infer.Engine(plain).answer(["hello"], max_new_tokens=3) == [out[:-1]]
        save_file({"decision_maker.weight": torch.zeros(4, 48)}, plain / "cctuning.safetensors")
    assert run(*command, "--connection=english", "--prompt_en=hi")[0] == 0  # this needs no matrix


def test_from_python(connected):
    """Catches answers in another order than the texts, and a text taken for a list of letters."""
    folder, texts = connected("chatml"), [own for own, *_ in PAIRS]
    versions = {"english": [english for _, english, *_ in PAIRS], "matrix": [None] * len(PAIRS)}
    for connection, english in versions.items():
        engine = infer.Engine(folder, connection)
        answers = engine.answer(texts, english=english, max_new_tokens=5, batch_size=2)
        assert answers == [expected_answer(folder, "chatml", own, en, connection, 5)[0]
                           for own, en in zip(texts, english, strict=True)]
    with pytest.raises((TypeError, infer.UserError)):
        engine.answer("abc")


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_connection_costs_a_few_tokens(connected, run, monkeypatch, template):
    """Catches a second pass over more than the tokens from the connection position on."""
    folder, prompt = connected(template), "Nini mji mkuu wa Kenya, na wa India? " * 3
    widths, ffn = [], MLP.forward

    def forward(mlp, x, *more):
        widths.append(x.shape[1])
        return ffn(mlp, x, *more)
    monkeypatch.setattr(MLP, "forward", forward)
    code, _, _ = run("infer", "--model", folder, "--prompt", prompt, "--max_new_tokens=1")
    assert code == 0 and len(widths) == 8 and widths[4:] == [-prompt_ids(folder, prompt, template)[1]] * 4


# ---------------------------------------------------------------------------- the length of answers

def test_stops_at_every_eos(tmp_path, ask):
    """Catches an id of generation_config.json that does not end an answer, or is kept in it."""
    folder = write_parrot(tmp_path / "model", {"Nini?": ["a", "b", "c", "d"]})
    sp = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    c, d = (sp.piece_to_id(piece) for piece in "cd")
    for stop, answer in ((2, "abcd"), ([2, d, c], "ab"), (d, "abc"), ([1, 2], "abcd")):
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": stop}))
        assert ask(folder, [{"instruction": "Nini?"}])[0]["answer"] == answer


def test_length_of_answers(tmp_path, ask):
    """Catches an answer that runs past --max_new_tokens, its default or the model's positions."""
    folder = write_parrot(tmp_path / "long", {"Say:": ["ha", "ha"]}, max_position_embeddings=280)
    lengths = [len(ask(folder, [{"instruction": "Say:"}], *option)[0]["answer"]) // len("ha")
               for option in ([], ["--max_new_tokens=7"], ["--max_new_tokens=1000"])]
    assert lengths == [256, 7, 280 - len(prompt_ids(folder, "Say:")[0])]


@pytest.mark.parametrize("room, code", [(1, 0), (0, 2), (-5, 2)])
def test_length_of_prompts(tmp_path, run, room, code):
    """Catches a prompt, also English, refused although a token of an answer fits, or taken otherwise."""
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
    (1, 0.95, 4), (2, 0.7, 3), (0.5, 0.6, 1)])
def test_sampling(dice, ask, temperature, top_p, kept):
    """Catches a temperature ignored, upside down or applied to probabilities (p^(1/T) is drawn from), a
    token too many or too few among those with probability top_p together at this temperature, a default
    that leaves some out, and what is left not drawn in proportion."""
    option = [] if top_p is None else [f"--top_p={top_p}"]
    found = Counter(throw(ask, dice, f"--temperature={temperature}", *option))
    weights = {text: p ** (1 / temperature) for text, p in list(CHANCES.items())[:kept]}
    assert set(found) == set(weights)
    for text, weight in weights.items():
        p = weight / sum(weights.values())
        assert abs(found[text] / 800 - p) <= 4 * math.sqrt(p * (1 - p) / 800), (text, found)


def test_cold_is_greedy(dice, ask):
    """Catches a default that samples, and a small temperature that does not give the likeliest token."""
    for option in ([], ["--temperature=0"], ["--temperature=0.001"], ["--temperature=1e-40"],
                   ["--seed=5", "--top_p=0.9"]):
        assert set(throw(ask, dice, *option, count=60)) == {"yes"}


def test_seed(dice, ask, run):
    """Catches draws that cannot be repeated, that are the same for every prompt or every seed, or that
    depend on other prompts and on the size of a batch."""
    def answers(*options, count=60):
        return throw(ask, dice, "--temperature=2", *options, count=count, question="Again?")
    first = answers()
    assert set(first) == {"so", "soitis", "soitwas", "not", "notitis", "notitwas"}
    assert answers("--seed=0", "--batch_size=7") == first == answers(count=90)[:60]
    assert 25 < sum(a != b for a, b in zip(first, answers("--seed=1"), strict=True)) < 60
    alone = [run("infer", "--model", dice, "--prompt=Really?", "--temperature=2", f"--seed={seed}")
             for seed in range(12)]
    assert len({out for _, out, _ in alone}) > 2


@pytest.mark.parametrize("option, rows", [([], 16), (["--batch_size=5"], 5)])
def test_batch_size(dice, ask, option, rows):
    """Catches a --batch_size that is ignored, and another default."""
    with reading() as calls:
        ask(dice, [{"instruction": "Really?"}] * 20, "--max_new_tokens=1", *option)
    assert max(len(call) for call in calls if isinstance(call[0], list)) == rows


# ------------------------------------------------------------------------------------ the command line

def test_prompt_streams(tmp_path, run):
    """Catches a stream that differs from the answer in one piece, and --explain without its layer."""
    folder, (own, english, *_) = write_checkpoint(tmp_path / "model", "llama3", seed=4), PAIRS[0]
    write_connection(folder)
    text, chances = expected_answer(folder, "llama3", own, count=25, stop=[2])
    command = ["infer", "--model", folder, "--prompt", own, "--max_new_tokens=25"]
    explained = (f"[connection matrix: from layer {chances.index(max(chances))} of 0-3; "
                 f"probabilities {' '.join(f'{p:.2f}' for p in chances)}]\n")
    assert len(text) > 20 and run(*command, "--explain")[:2] == (0, explained + text + "\n")
    text, _ = expected_answer(folder, "llama3", own, english, "english", 9, stop=[2])
    found = run(*command[:5], "--prompt_en", english, "--connection=english", "--max_new_tokens=9")
    assert found[:2] == (0, text + "\n")
    code, out, _ = run(*command, "--explain", "--connection=none")
    assert code == 0 and out.splitlines()[0] == "[unconnected]"


class Recorder(io.TextIOWrapper):
    """A standard output that keeps what is written to it at a time."""

    def __init__(self):
        super().__init__(io.BytesIO(), "utf-8")
        self.parts = []

    def write(self, text):
        self.parts += [text] if text else []


def test_no_half_characters(tmp_path, monkeypatch):
    """Catches a stream that prints a character before its last byte is there, that waits for the end of
    the answer, or that keeps an unfinished character back for ever."""
    folder = write_parrot(tmp_path / "model", {
        "Nini?": ["one", "<0xE0>", "<0xA4>", "<0xA8>", "two", "<0xC3>", "<0xA9>", "three"],
        "Na?": ["four", "<0xE2>"]})
    for prompt, parts in (("Nini?", ["one", "न", "two", "é", "three", "\n"]), ("Na?", ["four", "\ufffd\n"])):
        monkeypatch.setattr(sys, "argv", ["infer.py", "--model", str(folder), "--prompt", prompt])
        with contextlib.redirect_stdout(Recorder()) as out:
            infer.main()
        assert out.parts[:len(parts) - 1] == parts[:-1] and "".join(out.parts) == "".join(parts)


def test_files(tmp_path, run, ask, feed, monkeypatch):
    """Catches answers out of order, fields lost, added or escaped, half a surrogate pair that ends the run,
    an "input" not read, a JSON list not taken, and - taken for a file's name."""
    says = {"moja?": "one", "mbili?": "two", "tatu?": "three"}
    folder = write_parrot(tmp_path / "model", says)
    records = [{"instruction": "Ni " + own, "id": [7, "\ud83d"], "output": "é"} for own in says]
    records += [{"instruction": "moja?", "input": "mbili?", "lang": "xx"},
                {"instruction": "moja?", "input": " "}]
    answers = ["one", "two", "three", "two", "one"]
    answered = [{**record, "answer": text} for record, text in zip(records, answers, strict=True)]
    assert ask(folder, records, "--batch_size=2") == answered
    assert "é" in (tmp_path / "out.jsonl").read_text(encoding="utf-8")
    feed(json.dumps(records, indent=1).encode())
    monkeypatch.chdir(tmp_path)
    code, out, _ = run("infer", "--model", folder, "--input=-", "--output=-")
    assert code == 0 and [json.loads(line) for line in out.splitlines()] == answered
    assert not (tmp_path / "-").exists()


def test_standard_input(tmp_path, run, feed):
    """Catches an answer of more than its line, a prompt cut at a line separator of Unicode, a carriage
    return or byte order mark in a prompt, a last line left out, and --explain ignored."""
    folder = write_parrot(tmp_path / "model", {
        "Nini?": ["a", "\n", "b"], "moja\u2028mbili?": "two", "x": "three"})
    for text in ("Nini?\nmoja\u2028mbili?\nx", "\ufeffNini?\r\n\r\nmoja\u2028mbili?\r\nx\r\n"):
        feed(text.encode())
        with reading() as calls:
            code, out, err = run("infer", "--model", folder, "--prompt=-")
        assert (code, out) == (0, "a\\nb\ntwo\nthree\n"), err
        prompts = sorted(prompt_ids(folder, line)[0] for line in ("Nini?", "moja\u2028mbili?", "x"))
        assert sorted([token for token in row if token] for row in calls[0]) == prompts
    feed(b"x")
    assert run("infer", "--model", folder, "--prompt=-", "--explain")[1] == "three  [unconnected]\n"


@pytest.mark.parametrize("content, culprit", [
    (b" \r\n\n", "input: is empty"), (b"Nini?\n\xff", "UTF-8"), (b"x\n\n" + b"na " * 300, "input:3")])
def test_bad_standard_input(tmp_path, checkpoint, run, feed, content, culprit):
    """Catches an answer to nothing, and a message without the line."""
    feed(content)
    code, out, err = run("infer", "--model", checkpoint(), "--prompt=-", "--max_new_tokens=1")
    assert code == 2 and not out and culprit in err and err.count("\n") == 1, err


def test_at_a_terminal(tmp_path, run, monkeypatch):
    """Catches answers that wait for the last line, and a blank line that is asked."""
    folder, lines = write_parrot(tmp_path / "model", {"Nini?": "hivi", "Na?": "pia"}), []
    ours, theirs = os.openpty()
    os.write(ours, b"Nini?\n\n")
    decode = infer.Tokenizer.decode

    def answered(tokenizer, ids):
        if not lines:
            os.write(ours, b"Na?\n\x04")  # the second question comes after the first answer
        lines.append(ids)
        return decode(tokenizer, ids)
    monkeypatch.setattr(infer.Tokenizer, "decode", answered)
    with open(theirs, encoding="utf-8") as terminal:
        monkeypatch.setattr("sys.stdin", terminal)
        code, out, err = run("infer", "--model", folder, "--prompt=-")
    os.close(ours)
    assert (code, out) == (0, "hivi\npia\n"), err


def test_default_model(tmp_path, run, monkeypatch):
    """Catches a model in `out` that is not the one asked, half a result there that is, and silence."""
    monkeypatch.chdir(tmp_path)
    parrot, command = write_parrot(tmp_path / "parrot", {"nini?": "mine"}), ["infer", "--prompt=Hii ni nini?"]
    (tmp_path / "out").mkdir()
    shutil.copy(parrot / "config.json", tmp_path / "out")  # killed while it was saved
    code, out, err = run(*command, "--max_new_tokens=4", "--explain")
    assert code == 0 and "[connection matrix" in out and err.splitlines()[0].endswith("data/tuned"), err
    shutil.copytree(parrot, tmp_path / "out", dirs_exist_ok=True)
    names = dict.fromkeys(load_file(parrot / "model.safetensors"), "model.safetensors")
    (tmp_path / "out" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    code, out, err = run(*command)
    assert (code, out) == (0, "mine\n") and err.splitlines()[0] == "model: out", err


@pytest.mark.parametrize("lang", ["sw", "hi"])
def test_built_in_questions(run, ask, lang):
    """Catches answers or English versions of other questions or languages, and another default."""
    tuned, test = ROOT / "data" / "tuned", ROOT / "data" / "test" / "facts"
    options = ["--max_new_tokens=4", "--connection=english"]
    given = [] if lang == "sw" else [f"--lang={lang}"]
    code, out, err = run("infer", "--model", tuned, "--explain", *options, *given)
    assert code == 0, err
    *lines, total = out.splitlines()
    pattern = re.compile(r"(.*?)  (.*)  \[(?:right|wrong: (.*))\]  \[connection english: .*\]")
    found = [pattern.fullmatch(line).groups() for line in lines]
    assert total.startswith(f"{sum(wrong is None for *_, wrong in found)} of 7 right; ")
    own, english, right = (json_lines(test / file) for file in (
        f"split/{lang}.json", "split/en.json", f"ans/{lang}.json"))
    numbers = [own.index({"instruction": question}) for question, *_ in found]
    assert [wrong or text for _, text, wrong in found] == [right[i] for i in numbers]
    records = [{**own[i], "instruction_en": english[i]["instruction"]} for i in numbers]
    answers = [record["answer"].replace("\n", "\\n") for record in ask(tuned, records, *options)]
    assert len(set(numbers)) == 7 and answers == [text for _, text, _ in found]
