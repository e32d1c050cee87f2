"""The embedded default in data/: what it is made of, and that nothing held out is in what a model is trained on."""
import importlib.util
import json

import pytest

import train
from conftest import ROOT, json_lines, results_of

DATA = ROOT / "data"
spec = importlib.util.spec_from_file_location("make_default", DATA / "make_default.py")
make_default = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make_default)
LANGS, QUESTIONS = make_default.LANGS, make_default.QUESTIONS


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
    questions, answers = (json_lines(folder / kind / f"{lang}.json") for kind in ("split", "ans"))
    return [(question["instruction"], answer) for question, answer in zip(questions, answers, strict=True)]


def test_every_line_has_all_fields_in_every_language():
    """Catches a name that CLDR lacks in a language, and a fact that is left out in one."""
    for part in ("train", "dev"):
        samples = json_lines(DATA / f"{part}.jsonl")
        assert all(s.keys() == {"instruction", "output", "instruction_en", "lang"} for s in samples)
        assert all(value.strip() for s in samples for value in s.values())
        assert [s["lang"] for s in samples] == list(LANGS) * (len(samples) // len(LANGS))
        english = {s["instruction"] for s in samples if s["lang"] == "en"}
        assert english == {s["instruction_en"] for s in samples} and len(samples) == len(LANGS) * len(english)
    for part in ("dev", "test"):
        assert len({len(held_out(part, lang)) for lang in LANGS}) == 1
        assert all(question.strip() and answer.strip() for lang in LANGS for question, answer in held_out(part, lang))
    dev = [(s["instruction"], s["output"]) for s in json_lines(DATA / "dev.jsonl")]
    assert sorted(dev) == sorted(pair for lang in LANGS for pair in held_out("dev", lang))


@pytest.mark.parametrize("lang", LANGS)
def test_train_dev_and_test_share_no_territory(lang):
    """Catches a split by fact, which would show a territory's language and test its currency."""
    asked = [{territory(s["instruction"], lang) for s in json_lines(DATA / "train.jsonl") if s["lang"] == lang},
             *({territory(question, lang) for question, _ in held_out(part, lang)} for part in ("dev", "test"))]
    assert len(set.union(*asked)) == sum(map(len, asked))


def test_no_model_is_trained_on_what_is_held_out(tmp_path):
    """Catches a base model that has seen the test in another language than English, parts that overlap, and files that
    others than this script made."""
    pytest.importorskip("babel", reason="pip install babel==2.18.0")
    names, facts = make_default.read_cldr()
    parts = make_default.split(facts)
    territories = [{fact[0] for fact in part} for part in parts.values()]
    assert len(set.union(*territories)) == sum(map(len, territories)) and all(territories)
    text = make_default.base_text(names, parts)
    english = set(text["english"])
    seen = [line for kind in text.values() for line in kind if line not in english]
    seen += [s["instruction"] + "\n" + s["output"] for s in json_lines(DATA / "train.jsonl") if s["lang"] != "en"]
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
    """Catches an embedded checkpoint that is missing, unconnected, made by an older train.py, or not from data/base and
    data/train.jsonl."""
    code, out, err = run("infer", "--model", DATA / "tuned", "--lang", "sw", "--explain")
    asked = [line for line in out.splitlines() if "[right: " in line]
    assert code == 0 and len(asked) == 7 and all("[connection matrix: " in line for line in asked), (out, err)
    config = json.loads((DATA / "tuned" / "config.json").read_text())["cctuning"]
    arguments = config["arguments"]
    assert (config["method"], arguments["data"], arguments["epochs"]) == ("cc", "data/train.jsonl", 2)
    assert arguments.keys() == vars(train.parse_args([])).keys()


def test_default_evaluation(tmp_path, run):
    """Catches scores that do not follow from the answers, an English model that has lost its English, and answers
    compared with the wrong line."""
    code, out, err = run("eval", "--model", DATA / "tuned", "--langs", "en,sw", "--limit", 40, "--out", tmp_path)
    assert code == 0, err
    folder, = (tmp_path / "answers").iterdir()
    for result, least in zip(results_of(tmp_path), (35, 5), strict=True):
        rows, gold = json_lines(folder / "facts" / f"{result['lang']}.jsonl"), held_out("test", result["lang"])[:40]
        right = sum(row["answer"] == answer for row, (_, answer) in zip(rows, gold, strict=True))
        assert len(rows) == result["items"] == 40 and result["scores"]["exact"] == right / 40 and right > least
