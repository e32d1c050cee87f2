"""The built-in data: what it is made of, and that nothing held out is in what a model is trained on."""
import csv
import json
import subprocess
import sys

import pytest

from conftest import ROOT, json_lines, results_of
from data import make_default
from model import read_records

DATA = ROOT / "data"
LANGS = make_default.LANGS


def territory(question, lang):
    """The territory that a question asks for."""
    for template in make_default.QUESTIONS.values():
        before, after = template[lang].split("{x}")
        if question.startswith(before) and question.endswith(after):
            return question[len(before):len(question) - len(after)]
    raise AssertionError(question)


def held_out(part, lang):
    """[(question, answer)] of dev or test."""
    folder = DATA / part / "facts"
    questions, answers = (json_lines(folder / kind / f"{lang}.json") for kind in ("split", "ans"))
    return [(question["instruction"], answer) for question, answer in zip(questions, answers, strict=True)]


def test_every_fact_is_there_in_every_language():
    """Catches a name that CLDR lacks in a language, and a fact that is left out in one."""
    for part in ("train", "dev"):
        samples = json_lines(DATA / f"{part}.jsonl")
        assert [s["lang"] for s in samples] == list(LANGS) * (len(samples) // len(LANGS))
        assert all(value.strip() for s in samples for value in s.values())
        english = {s["instruction"] for s in samples if s["lang"] == "en"}
        assert english == {s["instruction_en"] for s in samples} and len(samples) == len(LANGS) * len(english)
    assert len({len(held_out("test", lang)) for lang in LANGS}) == 1
    dev = [(s["instruction"], s["output"]) for s in json_lines(DATA / "dev.jsonl")]
    assert sorted(dev) == sorted(pair for lang in LANGS for pair in held_out("dev", lang))


def test_train_dev_and_test_share_no_territory():
    """Catches a split by fact, which would show a territory's language and test its currency."""
    samples = json_lines(DATA / "train.jsonl")
    for lang in LANGS:
        train = {territory(s["instruction"], lang) for s in samples if s["lang"] == lang}
        dev, test = ({territory(question, lang) for question, _ in held_out(part, lang)}
                     for part in ("dev", "test"))
        assert train.isdisjoint(dev | test) and dev.isdisjoint(test), lang


@pytest.mark.optional
def test_make_default(tmp_path):
    """Catches files of data/ changed by hand, and held-out questions that a model saw in its language."""
    pytest.importorskip("babel", reason="pip install babel==2.18.0")
    names, facts = make_default.read_cldr()
    parts = make_default.split(facts)
    make_default.write_corpus(tmp_path, names, parts)
    made = [path.relative_to(tmp_path) for path in tmp_path.rglob("*.json*")]
    assert len(made) == 2 + 4 * len(LANGS)
    for path in made:
        assert (tmp_path / path).read_bytes() == (DATA / path).read_bytes(), path
    text = make_default.base_text(names, parts)
    seen = [line for kind, lines in text.items() for line in lines if kind != "english"]
    seen += [s["instruction"] for s in json_lines(DATA / "train.jsonl") if s["lang"] != "en"]
    seen = "\n".join(seen)
    for lang in set(LANGS) - {"en"}:
        questions = [question for part in ("dev", "test") for question, _ in held_out(part, lang)]
        assert len(questions) > 100 and not [question for question in questions if question in seen]


def test_default_evaluation(tmp_path, ran):
    """Catches a data/tuned of other data or without English, and answers compared with the wrong line."""
    config = json.loads((DATA / "tuned" / "config.json").read_text())["cctuning"]
    made_with = {"model": "data/base", "data": "data/train.jsonl", "method": "cc", "epochs": 2}
    assert made_with.items() <= config["arguments"].items() and config["matrix"]["prompts"] == 1000
    ran("eval", "--model", DATA / "tuned", "--langs=en,sw", "--limit=40", "--out", tmp_path)
    folder, = (tmp_path / "answers").iterdir()
    for result, least in zip(results_of(tmp_path), (35, 5), strict=True):
        gold = [answer for _, answer in held_out("test", result["lang"])[:40]]
        answers = [row["answer"] for row in json_lines(folder / "facts" / f"{result['lang']}.jsonl")]
        right = sum(answer == right for answer, right in zip(answers, gold, strict=True))
        assert result["items"] == 40 and result["scores"]["exact"] == right / 40 and right > least


def test_converter(tmp_path):
    """Catches a converter in data/README.md that does not run, or makes what train.py does not read."""
    code = (DATA / "README.md").read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    own = "Habari, \"mji\"?\nNini?"
    sample = {"instruction": own, "instruction_en": "What?", "output": "Jibu", "lang": "sw"}
    with open(tmp_path / "a.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([sample.keys(), sample.values()])
    aya = [{"inputs": own, "targets": "Jibu", "language": "Swahili", "language_code": "swh"},
           {"inputs": "What?", "targets": "This", "language_code": "eng"}]
    (tmp_path / "aya.jsonl").write_text("\n".join(map(json.dumps, aya)))
    converted = [{"instruction": own, "output": "Jibu", "lang": "swh"},
                 {"instruction": "What?", "instruction_en": "What?", "output": "This", "lang": "eng"}]
    for name, expected in (("a.csv", [sample]), ("aya.jsonl", converted)):
        command = [sys.executable, "-c", code, tmp_path / name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        (tmp_path / "made.jsonl").write_text(text)
        records = read_records(tmp_path / "made.jsonl", ("instruction", "output"))
        assert [record.fields for record in records] == expected
