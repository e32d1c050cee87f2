"""Scoring: the benchmark layout, the choice that an answer names, what is written."""
import json

import pytest

from conftest import write_checkpoint
from eval import choice, read_task, shorten, table
from model import Config, Tokenizer


def write_benchmark(folder, task="XNLI", langs=("en", "sw"), items=5, sample="_sample"):
    for lang in langs:
        for kind, lines in (("split", [{"instruction": f"{lang} question {i}?"} for i in range(items)]), ("ans", [str(i % 3 + 1) for i in range(items)])):
            (folder / task / (kind + sample)).mkdir(parents=True, exist_ok=True)
            (folder / task / (kind + sample) / f"{lang}.json").write_text("\n".join(map(json.dumps, lines)))
    return folder


@pytest.mark.parametrize("answer, options, expected", [
    ("1", "123", "1"), (" (2) Neutral", "123", "2"), ("Answer: 3.", "123", "3"), ("B", "ABCD", "B"), ("(C) 2", "ABCD", "C"), ("答えは2です", "12", "2"),
    ("12", "123", None), ("", "123", None), ("none of them", "123", None), ("4", "123", None), ("Absolutely", "ABCD", None), ("الجواب B", "ABCD", "B"),
])
def test_choice(answer, options, expected):
    """Catches a digit taken out of a number, a letter out of a word, and an option that other scripts surround."""
    assert choice(answer, options) == expected


def test_layout(tmp_path):
    """Catches prompts paired with another line's gold answer or another line's English version."""
    items = read_task(write_benchmark(tmp_path), "XNLI", "sw", 4)
    assert [i[:3] for i in items] == [(f"sw question {n}?", f"en question {n}?", [str(n % 3 + 1)]) for n in range(4)]
    own_english = tmp_path / "XNLI" / "split_sample_en"
    own_english.mkdir()
    (own_english / "sw.json").write_text("\n".join(json.dumps({"instruction": f"translated {n}"}) for n in range(5)))
    assert [i[1] for i in read_task(tmp_path, "XNLI", "sw", None)] == [f"translated {n}" for n in range(5)]


def test_shorten(checkpoint):
    """Catches a prompt cut at its end, where the question stands, and one cut further than it must be."""
    tokenizer = Tokenizer(checkpoint(), Config.read(checkpoint()))
    text = "Mwanzo. " + "maneno mengi ya katikati " * 50 + "Swali?"
    short = shorten(text, tokenizer, 60)
    assert short.startswith("Mwanzo") and short.endswith("Swali?") and 50 < len(tokenizer.prompt(short)) <= 60
    assert shorten("fupi", tokenizer, 60) == "fupi"


def test_command(checkpoint, tmp_path, run):
    """Catches scores that do not follow from the answers written beside them, and models mixed up in the table."""
    data, other = write_benchmark(tmp_path / "data"), write_checkpoint(tmp_path / "other", seed=9)
    code, out, err = run("eval", "--model", checkpoint(), other, "--data", data, "--out", tmp_path / "out", "--max_new_tokens", 8, "--batch_size", 2)
    assert code == 0, err
    results = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    assert len(results) == 4 and (tmp_path / "out" / "results.md").read_text().strip() in out
    for folder in (tmp_path / "out" / "answers").iterdir():
        for row in results:
            if folder.name.endswith("other") == row["model"].endswith("other"):
                answers = [json.loads(line) for line in (folder / "XNLI" / f"{row['lang']}.jsonl").read_text().splitlines()]
                assert len(answers) == 5 and row["accuracy"] == sum(choice(a["answer"], "123") in a["gold"] for a in answers) / 5
                assert row["unparsed"] == sum(choice(a["answer"], "123") is None for a in answers)


def test_table():
    """Catches a mean over items where it should be over languages, and a column under the wrong model."""
    row = lambda model, lang, accuracy: {"model": model, "task": "XNLI", "lang": lang, "items": 4, "accuracy": accuracy}
    lines = table([row("a", "en", 0.5), row("a", "sw", 0.25), row("b", "en", 1.0), row("b", "sw", 0.0)], ["a", "b"]).splitlines()
    assert lines[2:] == ["| XNLI | en | 4 | 50.0 | 100.0 |", "| XNLI | sw | 4 | 25.0 | 0.0 |", "| XNLI | mean | | 37.5 | 50.0 |",
                         "| XNLI | mean without en | | 25.0 | 0.0 |"]
