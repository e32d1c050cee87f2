"""Answering: what infer.py prints and writes, against tests/reference.py and against checkpoints whose
answers are known."""
import contextlib
import importlib
import io
import json
import math
import re
import shutil
import subprocess
import sys
import types
from collections import Counter

import pytest
import sentencepiece
import torch
from safetensors.torch import load_file, save_file

import eval  # noqa: F401 (both stay imported, whatever `elsewhere` does)
import infer  # noqa: F401
from conftest import (PAIRS, ROOT, json_lines, reading, sentencepiece_model, text_of, write_checkpoint,
                      write_connection, write_parrot)
from model import MLP
from reference import Reference, prompt_ids

TEMPLATES = ["llama3", "chatml", "mistral"]  # they connect at the last token, before it, and in the text
CONNECTIONS = ["matrix", "english", "none"]
STOP = [2, *range(330, 400)]  # many tokens end an answer, so that rows stop at different times


@pytest.fixture(scope="session")
def connected(tmp_path_factory):
    """connected(template, **config changes): a checkpoint with a Decision Maker and a matrix, made once a
    session."""
    made = {}

    def make(template, **changes):
        key = (template, *changes.items())
        if key not in made:
            folder = tmp_path_factory.mktemp(template) / "model"
            write_checkpoint(folder, template, seed=4, **changes)
            (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": STOP}))
            made[key] = write_connection(folder)
        return made[key]
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


RECORDS = [{"instruction": own, "instruction_en": english, "lang": lang} for own, english, _, lang in PAIRS]


def expected_answer(folder, template, own, english=None, connection="matrix", count=12, stop=STOP):
    """(text, the Decision Maker's probabilities or None) by the reference: greedy, without a cache."""
    reference = Reference(folder)
    ids, index, turn = prompt_ids(folder, own, template)
    vector = probabilities = None
    if connection != "none":
        english = prompt_ids(folder, english, template)[0] if connection == "english" else None
        vector = reference.vector(ids, index, english)
        activations = reference.activations(english or ids, index)
        activations = activations if english else activations @ reference.tensors["transform_matrix"]
        probabilities = reference.scores(activations, ids[index]).softmax(-1).tolist()
    return text_of(folder, reference.answer(ids, count, {turn, *stop}, vector, index)), probabilities


# -------------------------------------------------------------------------------------- the right answers

@torch.no_grad()
@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("connection", CONNECTIONS)
def test_answers_equal_the_reference(connected, ask, template, connection):
    """Catches a connection at another token than the template's, logits read there, padding or cache rows
    that mix prompts up when one stops, a matrix or an English version not used, and a layer that is not
    the one reported."""
    folder = connected(template)
    answers = ask(folder, RECORDS, "--connection", connection, "--explain", "--batch_size=4",
                  "--max_new_tokens=12")
    for (own, english, *_), answer in zip(PAIRS, answers, strict=True):
        text, chances = expected_answer(folder, template, own, english, connection)
        assert answer["answer"] == text
        assert answer["probabilities"] == (chances and pytest.approx(chances, abs=1e-4))
        assert answer["layer"] == (chances and chances.index(max(chances)))
    assert len({answer["answer"] for answer in answers}) > 3


@torch.no_grad()
@pytest.mark.parametrize("connection", CONNECTIONS)
def test_a_role_of_several_pieces(tmp_path, ask, connection):
    """Catches a connection position of ChatML that is fixed: with SmolLM2's tokenizer it is three from
    the end."""
    folder = write_connection(write_checkpoint(tmp_path / "model", "chatml", seed=6))
    sentencepiece_model(folder / "tokenizer.model", ["<|im_start|>", "<|im_end|>"], whole=[" assist"])
    assert prompt_ids(folder, "Nini?", "chatml")[1] <= -3
    answers = ask(folder, RECORDS[:3], "--connection", connection, "--explain", "--max_new_tokens=6")
    for (own, english, *_), answer in zip(PAIRS, answers, strict=False):
        text, chances = expected_answer(folder, "chatml", own, english, connection, 6, stop=[2])
        assert answer["answer"] == text
        assert answer["probabilities"] == (chances and pytest.approx(chances, abs=1e-4))


@torch.no_grad()
@pytest.mark.parametrize("changes", [
    pytest.param({"model_type": "qwen2"}, id="bias"), pytest.param({"tie_word_embeddings": True}, id="tied")])
def test_answers_of_other_models(connected, ask, changes):
    """Catches a bias or a tied head that is lost where weights are laid out anew for a batch."""
    folder = connected("chatml", **changes)
    answers = [line["answer"] for line in ask(folder, RECORDS[:3], "--max_new_tokens=6")]
    assert answers == [expected_answer(folder, "chatml", r["instruction"], count=6)[0] for r in RECORDS[:3]]


def test_dtype(connected, ask, tmp_path):
    """Catches a --dtype that is ignored, a default other than the dtype of the stored weights, and a
    product in half precision that is far off."""
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
    """Catches a matrix that is not used unless asked for, one used unsaid where there is none, and a
    checkpoint without one that answers unconnected unsaid."""
    folder = connected("llama3")
    texts = [[line["answer"] for line in ask(folder, RECORDS, "--max_new_tokens=9", *option)]
             for option in ([], ["--connection=matrix"], ["--connection=none"])]
    assert texts[0] == texts[1] != texts[2]
    plain = write_checkpoint(tmp_path / "plain", "chatml")
    command = ("infer", "--model", plain, "--prompt=hello", "--max_new_tokens=3")
    for lacks in ("no cctuning.safetensors", "no Transform Matrix"):
        code, _, err = run(*command)
        assert code == 0 and err.count("\n") == 1 and lacks in err and "answering as a plain model" in err
        save_file({"decision_maker.weight": torch.zeros(4, 48)}, plain / "cctuning.safetensors")
    assert run(*command, "--connection=english", "--prompt_en=hi")[0] == 0  # this needs no matrix


@torch.no_grad()
def test_english_version_of_a_line_with_input(connected, ask):
    """Catches an "input" that is appended to an English version of its own, or left out where the English
    version only repeats the instruction."""
    folder = connected("llama3")
    for english, whole in (("Which capital?", "Which capital?"), ("Nini?", "Nini?\nMji mkuu")):
        record = {"instruction": "Nini?", "input": "Mji mkuu", "instruction_en": english}
        answer, = ask(folder, [record], "--connection=english", "--explain", "--max_new_tokens=3")
        _, chances = expected_answer(folder, "llama3", "Nini?\nMji mkuu", whole, "english", 3)
        assert answer["probabilities"] == pytest.approx(chances, abs=1e-4)


@torch.no_grad()
def test_template_option(connected, ask):
    """Catches a --template that is ignored, and one that the checkpoint's control tokens overrule."""
    folder = connected("chatml")
    answers = ask(folder, RECORDS[:3], "--template=plain", "--explain", "--max_new_tokens=5")
    for record, answer in zip(RECORDS, answers, strict=False):
        text, chances = expected_answer(folder, "plain", record["instruction"], count=5)
        assert answer["answer"] == text and answer["probabilities"] == pytest.approx(chances, abs=1e-4)


@pytest.mark.parametrize("option, rows", [([], 16), (["--batch_size=5"], 5)])
def test_batch_size(dice, ask, option, rows):
    """Catches a --batch_size that is ignored, and another default."""
    with reading() as calls:
        ask(dice, [{"instruction": "Really?"}] * 20, "--max_new_tokens=1", *option)
    assert max(len(call) for call in calls if isinstance(call[0], list)) == rows


@pytest.mark.parametrize("template", TEMPLATES)
def test_the_connection_costs_a_few_tokens(connected, run, monkeypatch, template):
    """Catches a second pass over the whole prompt: only the tokens from the connection position on are
    run again."""
    folder, prompt = connected(template), "Nini mji mkuu wa Kenya, na wa India? " * 3
    widths, ffn = [], MLP.forward

    def forward(mlp, x, *more):
        widths.append(x.shape[1])
        return ffn(mlp, x, *more)
    monkeypatch.setattr(MLP, "forward", forward)
    code, _, _ = run("infer", "--model", folder, "--prompt", prompt, "--max_new_tokens=1")
    ids, index, _ = prompt_ids(folder, prompt, template)
    assert code == 0 and widths == [len(ids)] * 3 + [1] + [-index] * 4  # of four layers, twice


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
    folder = write_parrot(tmp_path / "long", {"Say:": ["ha", "ha"]}, max_position_embeddings=400)
    lengths = [len(ask(folder, [{"instruction": "Say:"}], *option)[0]["answer"]) // len("ha")
               for option in ([], ["--max_new_tokens=7"], ["--max_new_tokens=1000"])]
    assert lengths == [256, 7, 400 - len(prompt_ids(folder, "Say:")[0])]


@pytest.mark.parametrize("room, code", [(1, 0), (0, 2), (-5, 2)])
def test_length_of_prompts(tmp_path, run, room, code):
    """Catches a prompt, also an English one, that is refused although a token of an answer fits, or taken
    although none does."""
    text = "Mji mkuu wa Kenya " * 30
    folder = write_parrot(tmp_path / "model", {"Say:": "ha"}, max_position_embeddings=400)
    size = len(prompt_ids(folder, text)[0])
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": size + room}))
    write_connection(folder)
    for prompt in (["--prompt", text], ["--prompt=Say:", "--prompt_en", text, "--connection=english"]):
        found, _, err = run("infer", "--model", folder, *prompt, "--max_new_tokens=2")
        assert found == code and (not code or "--prompt" in err and str(size) in err), err


# ----------------------------------------------------------------------------------------------- sampling

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


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_temperature(dice, ask, temperature):
    """Catches a temperature that is ignored, upside down or applied to probabilities: p^(1/T) is what is
    drawn from."""
    found = Counter(throw(ask, dice, f"--temperature={temperature}"))
    weights = {text: p ** (1 / temperature) for text, p in CHANCES.items()}
    for text, weight in weights.items():
        p = weight / sum(weights.values())
        assert abs(found[text] / 800 - p) < 4 * math.sqrt(p * (1 - p) / 800), (text, found)


def test_cold_is_greedy(dice, ask):
    """Catches a default that samples, and a small temperature that does not come to the likeliest token."""
    for option in ([], ["--temperature=0"], ["--temperature=0.001"], ["--temperature=1e-40"],
                   ["--seed=5", "--top_p=0.9"]):
        assert set(throw(ask, dice, *option, count=60)) == {"yes"}


@pytest.mark.parametrize("temperature, top_p, kept", [
    (1, 0.0, 1), (1, 0.4, 1), (1, 0.6, 2), (1, 0.8, 3), (1, 0.95, 4), (1, None, 4), (2, 0.7, 3),
    (0.5, 0.6, 1)])
def test_top_p(dice, ask, temperature, top_p, kept):
    """Catches a token too many or too few among those with the probability top_p together (at this
    temperature), a default that leaves some out, and what is left not drawn in proportion."""
    option = [] if top_p is None else [f"--top_p={top_p}"]
    found = Counter(throw(ask, dice, f"--temperature={temperature}", *option))
    left = list(CHANCES)[:kept]
    p = 0.5 ** (1 / temperature) / sum(CHANCES[text] ** (1 / temperature) for text in left)
    assert set(found) == set(left) and abs(found["yes"] / 800 - p) <= 4 * math.sqrt(p * (1 - p) / 800)


def test_seed(dice, ask, run):
    """Catches draws that cannot be repeated, that are the same for every prompt or every seed, or that
    depend on other prompts and on the size of a batch."""
    hot = "--temperature=2"

    def answers(*options, count=60):
        return throw(ask, dice, hot, *options, count=count, question="Again?")
    first = answers()
    assert set(first) == {"so", "soitis", "soitwas", "not", "notitis", "notitwas"}
    assert answers("--seed=0", "--batch_size=7") == first == answers(count=90)[:60]
    assert 25 < sum(a != b for a, b in zip(first, answers("--seed=1"), strict=True)) < 60
    alone = [run("infer", "--model", dice, "--prompt=Really?", hot, f"--seed={seed}") for seed in range(40)]
    assert {out for _, out, _ in alone} == {text + "\n" for text in CHANCES}


# --------------------------------------------------------------------------------------- the command line

@torch.no_grad()
def test_prompt_streams(tmp_path, run):
    """Catches a stream that loses spaces or differs from the answer in one piece, and --explain without
    its layer."""
    folder, (own, english, *_) = write_checkpoint(tmp_path / "model", "llama3", seed=4), PAIRS[0]
    write_connection(folder)
    text, chances = expected_answer(folder, "llama3", own, count=40, stop=[2])
    command = ["infer", "--model", folder, "--prompt", own, "--max_new_tokens=40"]
    assert len(text) > 20 and run(*command)[:2] == (0, text + "\n")
    explained = (f"[connection matrix: from layer {chances.index(max(chances))} of 0-3; "
                 f"probabilities {' '.join(f'{p:.2f}' for p in chances)}]\n")
    assert run(*command, "--explain")[:2] == (0, explained + text + "\n")
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
            importlib.import_module("infer").main()
        assert out.parts[:len(parts) - 1] == parts[:-1] and "".join(out.parts) == "".join(parts)


def test_files(tmp_path, run, ask):
    """Catches answers out of order, fields that are lost or added, an "input" that is not read, a JSON
    list that is not taken, and text that is escaped where it need not be."""
    says = {"moja?": "one", "mbili?": "two", "tatu?": "three"}
    folder = write_parrot(tmp_path / "model", says)
    records = [{"instruction": "Ni " + own, "id": [7], "output": "é"} for own in says]
    records += [{"instruction": "moja?", "input": "mbili?", "lang": "xx"},
                {"instruction": "moja?", "input": " "}]
    answers = ["one", "two", "three", "two", "one"]
    answered = [{**record, "answer": text} for record, text in zip(records, answers, strict=True)]
    assert ask(folder, records, "--batch_size=2") == answered
    assert "é" in (tmp_path / "out.jsonl").read_text(encoding="utf-8")
    (tmp_path / "list.json").write_text(json.dumps(records, indent=1))
    for output in ([], ["--output=-"]):
        code, out, _ = run("infer", "--model", folder, "--input", tmp_path / "list.json", *output)
        assert code == 0 and [json.loads(line) for line in out.splitlines()] == answered


def test_streams_by_name(tmp_path):
    """Catches - taken for the name of a file, and an error that does not name the output."""
    folder = write_parrot(tmp_path / "model", {"Nini?": "hivi"})
    line = '{"instruction": "Nini?", "answer": "hivi"}\n'
    for output, shown in (("-", line), ("/dev/stdout", line), ("/dev/full", "")):
        command = [sys.executable, ROOT / "infer.py", "--model", folder, "--input", "-", "--output", output]
        done = subprocess.run(command, input='{"instruction": "Nini?"}', capture_output=True, text=True, cwd=tmp_path)
        assert done.stdout == shown and not (tmp_path / "-").exists()
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("error: /dev/full: No space left")


def test_half_a_character_in_a_field(tmp_path, ask):
    """Catches a traceback for half a surrogate pair in a field that is only passed on, and its loss."""
    folder = write_parrot(tmp_path / "model", {"Nini?": "hivi"})
    assert ask(folder, [{"instruction": "Nini?", "id": "\ud83d"}])[0] == {
        "instruction": "Nini?", "id": "\ud83d", "answer": "hivi"}


def test_standard_input(tmp_path, run, monkeypatch):
    """Catches an answer that takes more than its line, a line separator of Unicode taken for the end of a
    prompt, and a last line without its end that is left out."""
    folder = write_parrot(tmp_path / "model", {
        "Nini?": ["a", "\n", "b"], "moja\u2028mbili?": "two", "x": "three"})
    for end in ("", "\n"):
        lines = io.BytesIO(("Nini?\nmoja\u2028mbili?\nx" + end).encode())
        monkeypatch.setattr("sys.stdin", types.SimpleNamespace(buffer=lines))
        code, out, err = run("infer", "--model", folder, "--prompt", "-", "--lang=sw")
        assert (code, out) == (0, "a\\nb\ntwo\nthree\n"), err


@torch.no_grad()
def test_byte_order_mark(connected, run, monkeypatch):
    """Catches a byte order mark that becomes a part of the prompt, and --explain ignored for a line."""
    folder, prompt = connected("mistral"), PAIRS[2][0]
    text, chances = expected_answer(folder, "mistral", prompt, count=5)
    monkeypatch.setattr("sys.stdin", types.SimpleNamespace(buffer=io.BytesIO(f"\ufeff{prompt}".encode())))
    code, out, _ = run("infer", "--model", folder, "--prompt", "-", "--max_new_tokens=5", "--explain")
    layer = chances.index(max(chances))
    assert code == 0 and text and out.startswith(f"{text}  [connection matrix: from layer {layer} of 0-3; ")


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """Another current folder than the project's, for scripts that are imported anew there."""
    monkeypatch.chdir(tmp_path)
    for script in ("infer", "eval"):
        monkeypatch.delitem(sys.modules, script)
    return tmp_path


def test_default_model(elsewhere, run):
    """Catches a model in `out`, just trained, that is not the one asked, and the choice made unsaid."""
    command = ["infer", "--prompt=Sarafu ya Kenya ni nini?", "--max_new_tokens=4", "--explain"]
    code, out, err = run(*command)
    assert code == 0 and "[connection matrix" in out
    assert err.startswith("model: ") and err.splitlines()[0].endswith("data/tuned")
    write_parrot(elsewhere / "out", {"Kenya ni nini?": "mine"})
    code, out, err = run(*command)
    assert (code, out) == (0, "[unconnected]\nmine\n") and err.splitlines()[0] == "model: out"
    code, out, _ = run(*command, "--model", ROOT / "data" / "tuned")
    assert code == 0 and "[connection matrix" in out


@pytest.mark.parametrize("lang", [None, "hi"])
def test_embedded_questions(run, ask, lang):
    """Catches right answers or English versions of other questions, questions of another language, and a
    default other than Swahili."""
    tuned, test = ROOT / "data" / "tuned", ROOT / "data" / "test" / "facts"
    files = (f"split/{lang or 'sw'}.json", "split/en.json", f"ans/{lang or 'sw'}.json")
    own, english, right = (json_lines(test / file) for file in files)
    options = ["--max_new_tokens=4", "--connection=english", *(["--lang", lang] if lang else [])]
    code, out, err = run("infer", "--model", tuned, *options, "--explain")
    assert code == 0, err
    pattern = re.compile(r"(.*?)  (.*)  \[(?:right|wrong: (.*))\]  \[connection english: .*\]")
    *lines, total = out.splitlines()
    found = [pattern.fullmatch(line).groups() for line in lines]
    lines = [(question, text, wrong or text) for question, text, wrong in found]
    assert total.startswith(f"{sum(text == answer for _, text, answer in lines)} of 7 right; ")
    numbers = [own.index({"instruction": question}) for question, _, _ in lines]
    assert len(set(numbers)) == 7 and [answer for _, _, answer in lines] == [right[i] for i in numbers]
    records = [{**own[i], "instruction_en": english[i]["instruction"]} for i in numbers]
    answers = [record["answer"] for record in ask(tuned, records, *options)]
    assert [answer.replace("\n", "\\n") for answer in answers] == [text for _, text, _ in lines]


def test_languages(tmp_path, run):
    """Catches a language that the checkpoint's training data brought, or a line of --input, which --lang
    does not know, and an unknown one refused."""
    folder = write_parrot(tmp_path / "model", {"Nini?": "hivi"}, cctuning={"languages": ["qq"]})
    assert run("infer", "--model", folder, "--prompt=Nini?", "--lang=qq")[:2] == (0, "hivi\n")
    assert run("infer", "--model", folder, "--prompt=Nini?", "--lang=yo")[0] == 0
    (tmp_path / "in.jsonl").write_text(json.dumps({"instruction": "Nini?", "lang": "zz"}))
    assert run("infer", "--model", folder, "--input", tmp_path / "in.jsonl", "--lang=zz")[0] == 0
    code, out, err = run("infer", "--model", folder, "--prompt=Nini?", "--lang=zz")
    assert (code, out) == (0, "hivi\n") and "--lang: zz" in err and "qq" in err  # a notice


SHARED_DEFAULTS = {
    "model": "out if it holds one, else the embedded data/tuned", "batch_size": "16",
    "connection": "matrix, if there is one", "template": "the checkpoint's",
    "dtype": "as stored"}
DEFAULTS = {
    "infer": {**SHARED_DEFAULTS, "max_new_tokens": "256", "temperature": "0.0", "top_p": "1.0", "seed": "0",
              "output": "standard output"},
    "eval": {**SHARED_DEFAULTS, "max_new_tokens": "by task: summaries 128, options 24, others 32",
             "data": "the embedded data/test",
             "tasks": "all", "langs": "all that a task has", "out": "out/eval"},
}


@pytest.mark.parametrize("script", DEFAULTS)
def test_help_promises_defaults(script, run):
    """Catches a default that was changed unnoticed: --help takes numbers from the parser itself."""
    code, text, _ = run(script, "--help")
    options = re.split(r"\n  --(?=\w)", re.sub(r"\s*\n {4,}", " ", text))[1:]
    found = {option.split()[0]: default.group(1) for option in options
             if (default := re.search(r"\(default: (.*?)\)", option))}
    assert code == 0 and {name: found.get(name) for name in DEFAULTS[script]} == DEFAULTS[script]
