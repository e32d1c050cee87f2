"""Scoring: the benchmark layout, the choice that an answer names, what is written."""
import json
from pathlib import Path

import pytest

from conftest import ROOT, json_lines, results_of, write_benchmark, write_checkpoint
from eval import Cell, averages, choice, compare, open_scores, read_task, rouge_l, shorten, summary_tokens, table
from infer import LANGUAGES
from model import Config, Tokenizer

XNLI = {"1": "Entail", "2": "Neutral", "3": "Contradict"}
STORY = {"1": "She went home.", "2": "She stayed at the office."}
MMMLU = {"A": "0", "B": "4", "C": "2 or more", "D": "The field has no degree"}
CHOICES = [  # (options, their texts, [(language, answer, what it names)])
    ("123", XNLI, [
        ("en", "1", "1"), ("en", "(2)", "2"), ("en", "(2) Neutral", "2"), ("en", "Answer: 3", "3"),
        ("en", "Answer: 3.", "3"), ("en", "**2**", "2"), ("en", "2.", "2"), ("en", "[1]", "1"),
        ("en", "My answer would be (1).", "1"), ("en", "Neutral", "2"),
        ("en", "I think they contradict each other", "3"), ("en", "The relation is neutral.", "2"), ("en", "12", None),
        ("en", "", None), ("en", "none of them", None), ("en", "4", None), ("en", "1.5", None),
        ("en", "1. Neutral", None),
    ]),
    ("12", STORY, [
        ("en", "Option 2 is more likely, not 1", None), ("en", "1 or 2", None), ("en", "1, 2", None),
        ("en", "(1) or (2)", None), ("en", "1. The first, because 2 persons are there", "1"), ("en", "2011", None),
        ("en", "She stayed at the office.", "2"), ("en", "She went home. She stayed at the office.", None),
    ]),
    ("ABCD", MMMLU, [
        ("en", "B", "B"), ("en", "B)", "B"), ("en", "B. 4", "B"), ("en", "b)", "B"), ("en", "(C) 2 or more", "C"),
        ("en", "Answer: A", "A"), ("en", "A", "A"), ("en", "A degree is a number", None), ("en", "Absolutely", None),
        ("en", "The answer is D", "D"), ("en", "A or B", None), ("en", "A) and B)", None),
        ("en", "The field has no degree", "D"), ("en", "DNA", None), ("en", "E", None), ("en", "A) 4", None),
        ("en", "**A** because", "A"),
    ]),
    ("123", {}, [
        ("ar", "١", "1"), ("ar", "الجواب: ٢", "2"), ("ar", "(٣) يتناقض", "3"), ("ar", "١ أو ٢", None),
        ("bn", "উত্তর: ১", "1"), ("de", "Die Antwort ist 2.", "2"), ("de", "(1) Folgt", "1"), ("de", "1 und 3", None),
        ("el", "Απάντηση: 3", "3"), ("el", "(1) Συνεπάγεται", "1"), ("es", "La respuesta es 1", "1"),
        ("fr", "Réponse : 3", "3"), ("fr", "« 2 »", "2"), ("hi", "१", "1"), ("hi", "उत्तर: २", "2"),
        ("hi", "(३) विरोधाभास", "3"), ("pt", "A resposta é 2", "2"), ("ru", "Ответ: 1", "1"),
        ("ru", "(2) Нейтрально", "2"), ("sw", "Jibu ni 3", "3"), ("sw", "2 au 3", None), ("th", "คำตอบคือ 2", "2"),
        ("th", "๓", "3"), ("th", "(1) บ่งบอก", "1"), ("tr", "Cevap: 3", "3"), ("ur", "جواب: ۲", "2"), ("ur", "(۱)", "1"),
        ("vi", "Câu trả lời là 2", "2"), ("zh", "答案是2", "2"), ("zh", "（1）蕴含", "1"),
    ]),
    ("12", {}, [
        ("bn", "২", "2"), ("es", "Ni 1 ni 2", None), ("eu", "2. aukera", "2"), ("eu", "Nire erantzuna: (1)", "1"),
        ("hi", "१ और २", None), ("id", "Jawaban: 2", "2"), ("ja", "答えは2です", "2"), ("ja", "（２）", "2"),
        ("ja", "１または２", None), ("ko", "정답은 2번입니다", "2"), ("ko", "1번과 2번", None), ("te", "జవాబు: 1", "1"),
        ("te", "౨", "2"), ("zh", "1和2都有可能", None),
    ]),
    ("ABCD", {}, [
        ("ko", "답은 A입니다", "A"), ("ja", "正解はAです", "A"), ("zh", "选A，因为", "A"), ("hi", "उत्तर A है", "A"),
        ("fr", "La réponse est A, car", "A"), ("ar", "الجواب B", "B"), ("bn", "(C)", "C"), ("de", "Antwort: D", "D"),
        ("es", "Opción B", "B"), ("es", "A casa", None), ("fr", "A priori, rien", None), ("id", "Pilihan (B)", "B"),
        ("ja", "Ｂ", "B"), ("ko", "답: (A)", "A"), ("pt", "A resposta é B", "B"), ("tr", "B şıkkı", "B"),
        ("vi", "Đáp án C", "C"), ("yo", "Idahun: (D)", "D"), ("yo", "A ò mọ̀", None), ("zh", "选B。", "B"),
    ]),
    ("ABCD", {"A": "Vitamin C", "B": "Vitamin D"}, [("en", "Vitamin C", "A")]),
    ("ABCD", {"A": "1", "B": "0, 1"}, [("en", "1", "A")]),
    ("ABCD", {"A": "n + ১", "B": "n + 2"}, [("bn", "n + ১", "A")]),
    ("123", {"1": "يستلزم", "2": "محايد", "3": "يتناقض"}, [("ar", "محايد", "2")]),
    ("123", {"2": "নিরপেক্ষ", "3": "বিরোধী"}, [("bn", "নিরপেক্ষ", "2")]),
    ("123", {"1": "Συνεπάγεται", "2": "Ουδέτερο"}, [("el", "Ουδέτερο", "2")]),
    ("123", {"1": "निहित", "2": "तटस्थ"}, [("hi", "तटस्थ।", "2")]),
    ("123", {"2": "Нейтрально", "3": "Противоречие"}, [("ru", "Противоречие", "3")]),
    ("123", {"1": "Inajumuisha", "3": "Kupingana"}, [("sw", "Kupingana", "3")]),
]


@pytest.mark.parametrize("options, texts, answer, named", [
    (options, texts, answer, named) for options, texts, cases in CHOICES for _, answer, named in cases])
def test_choice(options, texts, answer, named):
    """Catches a digit taken out of a number, a letter out of a word, an article taken for an option, a script whose
    digits are not known, an option's text that is not recognised, and a guess where an answer names two."""
    assert choice(answer, options, texts) == named


def test_choices_cover_the_languages():
    """Catches a language of the paper's evaluation whose answers no case above is in."""
    langs = [lang for _, _, cases in CHOICES for lang, _, _ in cases]
    assert set(langs) == set(LANGUAGES) and len(langs) >= 80


@pytest.mark.parametrize("lang, answer, gold, contained, exact, f1", [
    ("en", "The Panthers' defense.", "panthers defense", 1, 1, 1), ("en", "It was in 1999", "1999", 1, 0, 2 / 5),
    ("en", "13", "3", 0, 0, 0), ("en", "a cat", "the cat", 1, 1, 1), ("es", "el gato", "un gato", 1, 1, 1),
    ("de", "Die Stadt Köln", "Köln", 1, 0, 2 / 3), ("de", "eine Stadt", "die Stadt", 1, 1, 1),
    ("fr", "la ville de Paris", "Paris", 1, 0, 2 / 3), ("ar", "الكتاب", "كتاب", 1, 1, 1),
    ("ar", "في الكتاب", "كتاب", 1, 0, 2 / 3), ("vi", "những con mèo", "con mèo", 1, 1, 1),
    ("hi", "भारत की राजधानी", "राजधानी", 1, 0, 1 / 2), ("zh", "北京市", "北京", 1, 0, 4 / 5),
    ("zh", "在 1999年", "1999", 1, 0, 1 / 2), ("ja", "東京タワー", "東京", 1, 0, 4 / 7),
    ("th", "กรุงเทพ", "กรุงเทพ", 1, 1, 1), ("th", "กข", "ขค", 0, 0, 1 / 2), ("ru", "Москва!", "москва", 1, 1, 1),
    ("tr", "ankara", "Ankara", 1, 1, 1), ("el", "η Αθήνα", "Αθήνα", 1, 1, 1),
    ("fr", "l'Allemagne", "Allemagne", 1, 1, 1), ("ar", "١٩٩٩", "1999", 1, 1, 1), ("en", "308\u200b", "308", 1, 1, 1),
    ("tr", "İstanbul", "istanbul", 1, 1, 1), ("tr", "ISPARTA", "ısparta", 1, 1, 1), ("ja", "3", "3.0", 1, 1, 1),
    ("ja", "30", "3.0", 0, 0, 0), ("ko", "서울 특별시", "서울", 1, 0, 2 / 3), ("pt", "O Brasil", "Brasil", 1, 1, 1),
    ("en", "", "x", 0, 0, 0),
])
def test_open_scores(lang, answer, gold, contained, exact, f1):
    """Catches articles of another language, words where characters should count, punctuation that keeps answers apart,
    a number found in another."""
    expected = pytest.approx({"contained": contained, "exact": exact, "f1": f1})
    assert open_scores(answer, [gold], lang) == expected
    assert open_scores(answer, ["something else entirely", gold], lang) == expected


def test_squad_as_torchmetrics():
    """Catches a normalisation or F1 that is not SQuAD's, against a package's."""
    squad = pytest.importorskip("torchmetrics.functional.text", reason="pip install torchmetrics").squad
    texts = ["The quick, brown fox!", "a fox", "quick brown", "1,000 men of the U.S. army", "1000 men",
             "It's the end of the world", "its end"]
    for answer in ["", *texts]:
        for gold in texts:
            theirs = squad([{"prediction_text": answer, "id": "0"}],
                           [{"answers": {"text": [gold], "answer_start": [0]}, "id": "0"}])
            ours = open_scores(answer, [gold], "en")
            assert abs(float(theirs["exact_match"]) / 100 - ours["exact"]) < 1e-6, (answer, gold)
            assert abs(float(theirs["f1"]) / 100 - ours["f1"]) < 1e-6, (answer, gold)


def test_rouge_as_rouge_score():
    """Catches a longest common subsequence, or a tokenisation of spaced text, that is not ROUGE's."""
    scorer = pytest.importorskip("rouge_score.rouge_scorer", reason="pip install rouge-score").RougeScorer(["rougeL"])
    texts = ["The police killed the gunman.", "the gunman killed police", "Police, it's said, killed a gunman in 2011!",
             "nothing in common", "a b c d e f g", "g f a b d e"]
    for answer in texts:
        for gold in texts:
            assert abs(scorer.score(gold, answer)["rougeL"].fmeasure - rouge_l(answer, gold)) < 1e-6, (answer, gold)


SENTENCES = {
    "ar": "عاصمة كينيا هي نيروبي", "bn": "কেনিয়ার রাজধানী নাইরোবি", "de": "Die Hauptstadt von Kenia heißt Nairobi",
    "el": "Η πρωτεύουσα της Κένυας", "en": "The capital of Kenya", "es": "La capital de Kenia está aquí",
    "eu": "Keniako hiriburua Nairobi da", "fr": "C'est la capitale du Kenya", "hi": "केन्या की राजधानी नैरोबी है",
    "id": "Ibu kota Kenya adalah Nairobi", "ja": "ケニアの首都はナイロビです", "ko": "케냐의 수도는 나이로비입니다",
    "pt": "A capital do Quênia é Nairóbi", "ru": "Столица Кении — Найроби", "sw": "Mji mkuu wa Kenya ni Nairobi",
    "te": "కెన్యా రాజధాని నైరోబి", "th": "เมืองหลวงของเคนยาคือไนโรบี", "tr": "Kenya'nın başkenti Nairobi'dir",
    "ur": "کینیا کا دارالحکومت نیروبی ہے", "vi": "Thủ đô của Kenya là Nairobi", "yo": "Olú ìlú Kẹ́ńyà ni Nairobi",
    "zh": "肯尼亚的首都是内罗毕",
}


@pytest.mark.parametrize("lang", LANGUAGES)
def test_rouge_in_every_language(lang):
    """Catches a script that falls apart or away in tokenisation: the same text scores 1, half of it between 0 and 1,
    another language's 0."""
    text = SENTENCES[lang]
    assert rouge_l(text, text) == 1 and 0 < rouge_l(text[:len(text) // 2], text) < 1
    assert rouge_l(text, SENTENCES["te" if lang != "te" else "th"]) == 0


def test_rouge_by_hand():
    """Catches a subsequence taken for a substring, and marks cut off their letters."""
    assert rouge_l("a x b y c", "a b c") == pytest.approx(2 * 3 / 8)
    assert rouge_l("首都は東京", "東京は首都") == pytest.approx(2 * 2 / 10)
    assert summary_tokens("केन्या की राजधानी!") == ["केन्या", "की", "राजधानी"]


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
    code, out, err = run("eval", "--model", checkpoint(), other, "--data", data, "--out", tmp_path / "out",
                         "--max_new_tokens=8", "--batch_size=2")
    assert code == 0, err
    results = results_of(tmp_path / "out")
    assert len(results) == 4 and (tmp_path / "out" / "results.md").read_text().strip() in out
    for row in results:
        folder, = (tmp_path / "out" / "answers").glob("*" + Path(row["model"]).name)
        answers = json_lines(folder / "XNLI" / f"{row['lang']}.jsonl")
        named = [choice(a["answer"], "123", {}) for a in answers]
        right = sum(name in a["gold"] for name, a in zip(named, answers, strict=True))
        assert len(answers) == 5 and row["scores"]["accuracy"] == right / 5 and row["unparsed"] == named.count(None)


def test_averages_and_table():
    """Catches a mean over items where it should be over languages, English that counts as another language, a column
    under the wrong model, a difference with the wrong sign, an interval that does not hold the score, and p-values that
    see what is not there, or not what is."""
    few, many = [1.0] * 8 + [0.0] * 2, [0.0] * 30 + [1.0] * 10
    cells = {("XNLI", "en"): [Cell(few, few, 0), Cell([1.0] * 10, few, 0)],
             ("XNLI", "sw"): [Cell(many, many, 1), Cell([1.0] * 40, many, 1)],
             ("facts", "sw"): [Cell(few, few, 2), Cell(few[::-1], few, 2)]}
    rows = {(task, lang): found for task, lang, found in averages(cells)}
    scores = {key: [cell["score"] for cell in found] for key, found in rows.items()}
    assert scores["XNLI", "mean"] == [0.525, 1.0] and scores["XNLI", "mean without en"] == [0.25, 1.0]
    assert scores["all", "mean"] == pytest.approx([(0.525 + 0.8) / 2, 0.9])
    assert scores["all", "sw"] == pytest.approx([(0.25 + 0.8) / 2, 0.9])
    assert not {("all", "en"), ("facts", "mean without en")} & rows.keys()
    assert all(cell["interval"][0] <= cell["score"] <= cell["interval"][1] for found in rows.values() for cell in found)
    spread = 1.96 * (0.25 * 0.75 / 40) ** 0.5
    assert rows["XNLI", "sw"][0]["interval"] == pytest.approx([0.25 - spread, 0.25 + spread], abs=0.03)
    assert rows["XNLI", "sw"][1]["difference"] == 0.75 and rows["XNLI", "sw"][1]["p"] < 0.001
    assert rows["facts", "sw"][1]["difference"] == 0 and rows["facts", "sw"][1]["p"] == 1
    assert rows["XNLI", "en"][1]["p"] == pytest.approx(0.5, abs=0.05)
    text = table(averages(cells), ["a", "b"])
    for line in ("| XNLI | mean without en | 25.0 (", "| XNLI | mean | b | +47.5 | 0.0", "| all | mean | b | +23.8 |"):
        assert line in text


def test_translations_are_not_independent():
    """Catches an interval of a mean over languages that is too narrow, their questions being the same."""
    values = [0.0] * 30 + [1.0] * 10
    answers = {("XNLI", lang): [{"scores": {"accuracy": value}} for value in values] for lang in ("en", "sw", "hi")}
    assert len({tuple(found[0]["interval"]) for _, _, found in averages(compare([answers, answers]))}) == 1


def test_connections_side_by_side(tmp_path, run):
    """Catches a connection whose column holds another's answers, and figures that are not drawn."""
    pytest.importorskip("matplotlib", reason="pip install matplotlib")
    data = ROOT / "data"
    code, out, err = run("eval", "--model", data / "tuned", data / "base", "--data", data / "dev", "--langs=sw",
                         "--limit=20", "--out", tmp_path, "--connection", "matrix", "english", "none",
                         "--plot", tmp_path / "figures")
    assert code == 0, err
    results = results_of(tmp_path)
    columns = [("tuned", "matrix"), ("tuned", "english"), ("tuned", "none"), ("base", "none")]
    assert [(Path(r["model"]).name, r["connection"]) for r in results] == columns
    means = [f"{100 * r['scores']['f1']:.1f}" for r in results]
    assert f"| facts | f1 | {' | '.join(means)} |" in out
    answers = [path.read_text() for path in tmp_path.glob("answers/*/facts/sw.jsonl")]
    assert len(answers) == len(set(answers)) == 4
    assert all((tmp_path / "figures" / f"{name}.png").stat().st_size < 300_000 for name in ("scores", "layers"))
