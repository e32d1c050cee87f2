"""The embedded default in data/: what it is made of, and that nothing held out is in what a model is trained on."""
import importlib.util
import json
from pathlib import Path

import pytest

DATA = Path(__file__).resolve().parent.parent / "data"
spec = importlib.util.spec_from_file_location("make_default", DATA / "make_default.py")
make_default = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make_default)
LANGS, QUESTIONS = make_default.LANGS, make_default.QUESTIONS


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def territory(question, lang):
    """The territory that a question asks for."""
    for template in QUESTIONS.values():
        before, after = template[lang].split("{x}")
        if question.startswith(before) and question.endswith(after):
            return question[len(before):len(question) - len(after)]
    raise AssertionError(question)


def held_out(part, lang):
    """[(question, answer)] of dev or test."""
    folder = DATA / part / "facts"
    questions, answers = lines(folder / "split" / f"{lang}.json"), lines(folder / "ans" / f"{lang}.json")
    assert len(questions) == len(answers)
    return [(question["instruction"], answer) for question, answer in zip(questions, answers)]


def test_every_line_has_all_fields_in_every_language():
    """Catches a name that CLDR lacks in a language, and a fact that is left out in one."""
    for part in ("train", "dev"):
        samples = lines(DATA / f"{part}.jsonl")
        assert all(s.keys() == {"instruction", "output", "instruction_en", "lang"} and all(value.strip() for value in s.values()) for s in samples)
        assert [s["lang"] for s in samples] == list(LANGS) * (len(samples) // len(LANGS))
        english = {s["instruction"] for s in samples if s["lang"] == "en"}
        assert english == {s["instruction_en"] for s in samples} and len(samples) == len(LANGS) * len(english)
    for part in ("dev", "test"):
        assert len({len(held_out(part, lang)) for lang in LANGS}) == 1
        assert all(question.strip() and answer.strip() for lang in LANGS for question, answer in held_out(part, lang))
    dev = [(s["instruction"], s["output"]) for s in lines(DATA / "dev.jsonl")]
    assert sorted(dev) == sorted(pair for lang in LANGS for pair in held_out("dev", lang))


@pytest.mark.parametrize("lang", LANGS)
def test_train_dev_and_test_share_no_territory(lang):
    """Catches a split by fact, which would show a territory's language and test its currency."""
    asked = [{territory(s["instruction"], lang) for s in lines(DATA / "train.jsonl") if s["lang"] == lang},
             *({territory(question, lang) for question, _ in held_out(part, lang)} for part in ("dev", "test"))]
    assert len(set.union(*asked)) == sum(map(len, asked))


def test_no_model_is_trained_on_what_is_held_out(tmp_path):
    """Catches a base model that has seen the test in another language than English, parts that overlap, and files that others than this script
    made."""
    pytest.importorskip("babel", reason="pip install babel==2.18.0")
    names, facts = make_default.read_cldr()
    parts = make_default.split(facts)
    territories = [{fact[0] for fact in part} for part in parts.values()]
    assert len(set.union(*territories)) == sum(map(len, territories)) and all(territories)
    text = make_default.base_text(names, parts)
    english = {line for line in text["english"]}
    seen = [line for kind in text.values() for line in kind if line not in english]
    seen += [s["instruction"] + "\n" + s["output"] for s in lines(DATA / "train.jsonl") if s["lang"] != "en"]
    for lang in set(LANGS) - {"en"}:
        for part in ("dev", "test"):
            for question, _ in held_out(part, lang):
                assert not any(question in line for line in seen), question
    makes = tmp_path / "made"
    make_default.write_corpus(makes, names, parts)
    made = sorted(path.relative_to(makes) for path in makes.rglob("*.json*"))
    assert len(made) == 2 + 4 * len(LANGS)
    for path in made:
        assert (makes / path).read_bytes() == (DATA / path).read_bytes(), path


def test_tuned_answers(run):
    """Catches an embedded checkpoint that is missing, unconnected, or was not made from data/base and data/train.jsonl."""
    code, out, err = run("infer", "--model", DATA / "tuned", "--lang", "sw", "--explain")
    asked = [line for line in out.splitlines() if "[right: " in line]
    assert code == 0 and len(asked) == 7 and all("[connection matrix: layer " in line for line in asked), (out, err)
    config = json.loads((DATA / "tuned" / "config.json").read_text())["cctuning"]
    assert config["method"] == "cc" and config["arguments"]["data"] == "data/train.jsonl" and config["arguments"]["epochs"] == 2


def test_default_evaluation(tmp_path, run):
    """Catches scores that do not follow from the answers, an English model that has lost its English, and answers compared with the wrong line."""
    code, out, err = run("eval", "--model", DATA / "tuned", "--langs", "en,sw", "--limit", 40, "--out", tmp_path)
    assert code == 0, err
    for result in json.loads((tmp_path / "results.json").read_text())["results"]:
        folder = next((tmp_path / "answers").iterdir())
        rows, gold = lines(folder / "facts" / f"{result['lang']}.jsonl"), [answer for _, answer in held_out("test", result["lang"])]
        right = sum(r["answer"] == g for r, g in zip(rows, gold))
        assert len(rows) == result["items"] == 40 and result["scores"]["exact"] == right / 40 and right > (35 if result["lang"] == "en" else 5)
