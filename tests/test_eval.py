"""Scoring: what an answer names and is worth, and what eval.py makes of answers that are known
beforehand."""
import itertools
import json
import re
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

import infer  # noqa: F401 (both stay imported, whatever the test of defaults does)
from conftest import PAIRS, ROOT, json_lines, results_of, text_of, write_checkpoint, write_connection, write_parrot
from eval import OPTIONS, choice, holm, open_scores, rouge_l
from reference import Reference, answer_ids, prompt_ids

LANGUAGES = "ar bn de el en es eu fr hi id ja ko pt ru sw te th tr ur vi yo zh".split()  # the paper's

XNLI = {"1": "Entail", "2": "Neutral", "3": "Contradict"}
STORY = {"1": "She went home.", "2": "She stayed at the office."}
MMMLU = {"A": "0", "B": "4", "C": "2 or more", "D": "The field has no degree"}
CHOICES = [  # (options, their texts, [(language, answer, what it names)])
    ("123", XNLI, [
        ("en", "1", "1"), ("en", "(2)", "2"), ("en", "(2) Neutral", "2"), ("en", "Answer: 3", "3"),
        ("en", "Answer: 3.", "3"), ("en", "**2**", "2"), ("en", "2.", "2"), ("en", "[1]", "1"),
        ("en", "My answer would be (1).", "1"), ("en", "Neutral", "2"),
        ("en", "I think they contradict each other", "3"), ("en", "The relation is neutral.", "2"),
        ("en", "12", None), ("en", "", None), ("en", "none of them", None), ("en", "4", None),
        ("en", "1.5", None), ("en", "1. Neutral", None),
    ]),
    ("12", STORY, [
        ("en", "Option 2 is more likely, not 1", None), ("en", "1 or 2", None), ("en", "1, 2", None),
        ("en", "(1) or (2)", None), ("en", "1. The first, because 2 persons are there", "1"),
        ("en", "2011", None), ("en", "She stayed at the office.", "2"),
        ("en", "She went home. She stayed at the office.", None),
    ]),
    ("ABCD", MMMLU, [
        ("en", "B", "B"), ("en", "B)", "B"), ("en", "B. 4", "B"), ("en", "b)", "B"),
        ("en", "(C) 2 or more", "C"), ("en", "Answer: A", "A"), ("en", "A", "A"),
        ("en", "A degree is a number", None), ("en", "Absolutely", None),
        ("en", "The answer is D", "D"), ("en", "A or B", None), ("en", "A) and B)", None),
        ("en", "The field has no degree", "D"), ("en", "DNA", None), ("en", "E", None),
        ("en", "A) 4", None), ("en", "**A** because", "A"), ("en", "The option B is not wrong", "B"),
    ]),
    ("123", {}, [
        ("ar", "١", "1"), ("ar", "الجواب: ٢", "2"), ("ar", "(٣) يتناقض", "3"), ("ar", "١ أو ٢", None),
        ("bn", "উত্তর: ১", "1"), ("de", "Die Antwort ist 2.", "2"), ("de", "(1) Folgt", "1"),
        ("de", "1 und 3", None), ("el", "Απάντηση: 3", "3"), ("el", "(1) Συνεπάγεται", "1"),
        ("es", "La respuesta es 1", "1"), ("fr", "Réponse : 3", "3"), ("fr", "« 2 »", "2"),
        ("hi", "१", "1"), ("hi", "उत्तर: २", "2"), ("hi", "(३) विरोधाभास", "3"),
        ("pt", "A resposta é 2", "2"), ("ru", "Ответ: 1", "1"), ("ru", "(2) Нейтрально", "2"),
        ("sw", "Jibu ni 3", "3"), ("sw", "2 au 3", None), ("th", "คำตอบคือ 2", "2"), ("th", "๓", "3"),
        ("th", "(1) บ่งบอก", "1"), ("tr", "Cevap: 3", "3"), ("ur", "جواب: ۲", "2"), ("ur", "(۱)", "1"),
        ("vi", "Câu trả lời là 2", "2"), ("zh", "答案是2", "2"), ("zh", "（1）蕴含", "1"),
    ]),
    ("12", {}, [
        ("bn", "২", "2"), ("es", "Ni 1 ni 2", None), ("eu", "2. aukera", "2"),
        ("eu", "Nire erantzuna: (1)", "1"), ("hi", "१ और २", None), ("id", "Jawaban: 2", "2"),
        ("ja", "答えは2です", "2"), ("ja", "（２）", "2"), ("ja", "１または２", None), ("ko", "정답은 2번입니다", "2"),
        ("ko", "1번과 2번", None), ("te", "జవాబు: 1", "1"), ("te", "౨", "2"), ("zh", "1和2都有可能", None),
    ]),
    ("ABCD", {}, [
        ("ko", "답은 A입니다", "A"), ("ja", "正解はAです", "A"), ("zh", "选A，因为", "A"), ("hi", "उत्तर A है", "A"),
        ("fr", "La réponse est A, car", "A"), ("ar", "الجواب B", "B"), ("bn", "(C)", "C"),
        ("de", "Antwort: D", "D"), ("es", "Opción B", "B"), ("es", "A casa", None),
        ("fr", "A priori, rien", None), ("id", "Pilihan (B)", "B"), ("ja", "Ｂ", "B"),
        ("ko", "답: (A)", "A"), ("pt", "A resposta é B", "B"), ("tr", "B şıkkı", "B"),
        ("vi", "Đáp án C", "C"), ("yo", "Idahun: (D)", "D"), ("yo", "A ò mọ̀", None),
        ("zh", "选B。", "B"),
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
    """Catches a digit taken out of a number, a letter out of a word, an article taken for an option, a
    script whose digits are not known, an option's text that is not recognised, and a guess where an
    answer names two."""
    assert choice(answer, options, texts) == named


def test_choices_cover_the_languages():
    """Catches a language of the paper's evaluation whose answers no case above is in."""
    langs = [lang for _, _, cases in CHOICES for lang, _, _ in cases]
    assert set(langs) == set(LANGUAGES) and len(langs) >= 80


LABELLED = json.loads((ROOT / "tests" / "answers.json").read_text(encoding="utf-8"))


def test_choice_as_a_reader():
    """Catches a change that helps one wording and loses others, in any language: what 1,261 wordings and the
    answers of three models name, labelled by hand. The few that it misses are paraphrases and echoes."""
    tasks, missed, count = {"nli": "XNLI", "st": "XStoryCloze"}, Counter(), Counter()
    for kind, rows in [(key.split(":")[0], rows) for key, rows in LABELLED.items() if ":" in key]:
        for *of, lang, texts, answer, named in rows:
            options = OPTIONS[of[1] if of else tasks.get(texts.partition("-")[0], "MMMLU")]
            texts = LABELLED["options"][texts] if isinstance(texts, str) else texts
            for group in (kind, lang):
                count[group] += 1
                missed[group] += choice(answer, options, texts) != named
    assert count["wordings"] >= 150 and count["real"] >= 150
    assert missed["wordings"] == 0 and missed["real"] <= 0.03 * count["real"]
    assert all(missed[group] <= max(2, 0.03 * count[group]) for group in count), missed


@pytest.mark.parametrize("lang, answer, gold, contained, exact, f1", [
    ("en", "The Panthers' defense.", "panthers defense", 1, 1, 1),
    ("en", "It was in 1999", "1999", 1, 0, 2 / 5), ("en", "13", "3", 0, 0, 0),
    ("en", "a cat", "the cat", 1, 1, 1), ("es", "el gato", "un gato", 1, 1, 1),
    ("de", "Die Stadt Köln", "Köln", 1, 0, 2 / 3), ("de", "eine Stadt", "die Stadt", 1, 1, 1),
    ("fr", "la ville de Paris", "Paris", 1, 0, 2 / 3), ("ar", "الكتاب", "كتاب", 1, 1, 1),
    ("ar", "في الكتاب", "كتاب", 1, 0, 2 / 3), ("vi", "những con mèo", "con mèo", 1, 1, 1),
    ("hi", "भारत की राजधानी", "राजधानी", 1, 0, 1 / 2), ("zh", "北京市", "北京", 1, 0, 4 / 5),
    ("zh", "在 1999年", "1999", 1, 0, 1 / 2), ("ja", "東京タワー", "東京", 1, 0, 4 / 7),
    ("th", "กรุงเทพ", "กรุงเทพ", 1, 1, 1), ("th", "กข", "ขค", 0, 0, 1 / 2),
    ("ru", "Москва!", "москва", 1, 1, 1), ("tr", "ankara", "Ankara", 1, 1, 1),
    ("el", "η Αθήνα", "Αθήνα", 1, 1, 1), ("fr", "l'Allemagne", "Allemagne", 1, 1, 1),
    ("ar", "١٩٩٩", "1999", 1, 1, 1), ("en", "308\u200b", "308", 1, 1, 1),
    ("tr", "İstanbul", "istanbul", 1, 1, 1), ("tr", "ISPARTA", "ısparta", 1, 1, 1),
    ("ja", "3", "3.0", 1, 1, 1), ("ja", "3.0", "3.0", 1, 1, 1), ("ja", "30", "3.0", 0, 0, 0),
    ("ko", "서울 특별시", "서울", 1, 0, 2 / 3), ("en", "It is OBrien, I think", "O'Brien", 1, 0, 1 / 3),
    ("pt", "O Brasil", "Brasil", 1, 1, 1), ("en", "", "x", 0, 0, 0),
])
def test_open_scores(lang, answer, gold, contained, exact, f1):
    """Catches articles of another language, words where characters should count, punctuation that keeps
    answers apart, a number found in another."""
    expected = pytest.approx({"contained": contained, "exact": exact, "f1": f1})
    assert open_scores(answer, [gold], lang) == expected
    assert open_scores(answer, ["something else entirely", gold], lang) == expected


@pytest.mark.parametrize("lang, answer, gold, contained, exact", [
    # attached particles; not for numbers, short words or another language
    ("ko", "정답은 서울입니다", "서울", 1, 0), ("ko", "서울시장", "서울", 0, 0), ("ko", "25도", "25", 0, 0),
    ("tr", "Ankara'dır", "Ankara", 1, 0), ("tr", "Cevap kırmızıdır.", "kırmızı", 1, 0),
    ("tr", "karadeniz", "kara", 0, 0), ("ar", "والقاهرة", "القاهرة", 1, 0),
    ("ar", "بباريس", "باريس", 1, 0), ("ar", "للقاهرة", "القاهرة", 1, 0), ("ar", "وكان", "ان", 0, 0),
    ("ru", "в Ленинграде", "Ленинград", 1, 0), ("ru", "Новгородский", "Новгород", 0, 0),
    ("ru", "Иван Грозный жил", "Иван Грозн", 1, 0), ("ru", "Ивана Грозный", "Иван Грозный", 0, 0),
    ("en", "Parisian", "Paris", 0, 0), ("en", "Paris's mayor", "Paris", 1, 0),
    # numbers
    ("sw", "35", "3.5", 0, 0), ("sw", "5", "-5", 0, 0), ("sw", "-5", "-5.0", 1, 1),
    ("en", "1990-1995", "-1995", 0, 0), ("en", "1990-1995", "1990–1995", 1, 1), ("en", "18 years", "18.0 years", 1, 1),
    ("en", "It is 1,000,000.", "1000000.0", 1, 0), ("de", "3,5", "3.5", 1, 1),
    ("de", "1.000", "1000", 1, 1), ("en", "1.5", "1,5", 0, 0),
    ("ru", "1 000 000 лет", "1000000", 1, 0), ("de", "0,125", "0.125", 1, 1),
    ("en", "version 1.2.3", "123", 1, 0), ("en", "0.5", "0.50", 1, 1), ("ar", "٣٫٥", "3.5", 1, 1),
    ("ar", "١٬٠٠٠", "1000", 1, 1),
    # dates
    ("en", "June 30, 2019", "2019-06-30", 1, 1),
    ("en", "on the 30th of June 2019", "2019-06-30", 1, 0), ("en", "6/3/2019", "2019-06-03", 0, 0),
    ("en", "June 2019", "2019-06-30", 0, 0), ("en", "June 2019", "2019-06", 1, 1),
    ("de", "am 30. Juni 2019", "2019-06-30", 1, 0), ("de", "03.06.2019", "2019-06-03", 1, 1),
    ("ru", "30 июня 2019 года", "2019-06-30", 1, 0),
    ("pt", "30 de junho de 2019", "2019-06-30", 1, 1), ("tr", "30 Haziran 2019", "2019-06-30", 1, 1),
    ("vi", "ngày 30 tháng 6 năm 2019", "2019-06-30", 1, 0),
    ("vi", "ngày 1 tháng 12, 2019", "2019-12-01", 1, 0), ("ar", "٣٠ يونيو ٢٠١٩", "2019-06-30", 1, 1),
    ("ar", "30 حزيران 2019", "2019-06-30", 1, 1), ("ar", "1 كانون الثاني 2019", "2019-01-01", 1, 1),
    ("ja", "2019年6月30日です", "2019-06-30", 1, 0), ("zh", "2019年6月30日", "2019-06-30", 1, 1),
    ("ko", "2019년 6월 30일", "2019-06-30", 1, 1), ("ko", "2019년 6월 29일", "2019-06-30", 0, 0),
    ("ko", "2019년 6월 30일입니다", "2019-06-30", 1, 0), ("en", "Sept. 5, 2011", "2011-09-05", 1, 1),
    ("pt", "1º de maio de 2010", "2010-05-01", 1, 1), ("ru", "в мае 2010 года", "2010-05", 1, 0),
    ("ar", "1 أيار/مايو 2010", "2010-05-01", 1, 1),
    # yes and no
    ("de", "Nein, das stimmt nicht", "no", 1, 0), ("de", "nein", "no", 1, 1),
    ("en", "It has no moon", "no", 0, 0),
    ("de", "Neinsager", "no", 0, 0), ("ja", "いいえ、違います", "no", 1, 0), ("zh", "是的", "yes", 1, 0),
    ("zh", "不是", "yes", 0, 0), ("ko", "네.", "yes", 1, 1), ("ja", "はい", "yes", 1, 1),
])
def test_spellings(lang, answer, gold, contained, exact):
    """Catches a particle taken for another word or a word for a particle, a number that loses its sign or
    point, a date read in another order, a yes inside a word."""
    scores = open_scores(answer, [gold], lang)
    assert (scores["contained"], scores["exact"]) == (contained, exact)


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
    rouge = pytest.importorskip("rouge_score.rouge_scorer", reason="pip install rouge-score")
    scorer = rouge.RougeScorer(["rougeL"])
    texts = ["The police killed the gunman.", "the gunman killed police", "nothing in common",
             "a b c d e f g", "Police, it's said, killed a gunman in 2011!", "g f a b d e"]
    for answer in texts:
        for gold in texts:
            theirs = scorer.score(gold, answer)["rougeL"].fmeasure
            assert abs(theirs - rouge_l(answer, gold)) < 1e-6, (answer, gold)


SENTENCES = {
    "ar": "عاصمة كينيا هي نيروبي", "bn": "কেনিয়ার রাজধানী নাইরোবি",
    "de": "Die Hauptstadt von Kenia heißt Nairobi", "el": "Η πρωτεύουσα της Κένυας",
    "en": "The capital of Kenya", "es": "La capital de Kenia está aquí",
    "eu": "Keniako hiriburua Nairobi da", "fr": "C'est la capitale du Kenya",
    "hi": "केन्या की राजधानी नैरोबी है", "id": "Ibu kota Kenya adalah Nairobi", "ja": "ケニアの首都はナイロビです",
    "ko": "케냐의 수도는 나이로비입니다", "pt": "A capital do Quênia é Nairóbi", "ru": "Столица Кении — Найроби",
    "sw": "Mji mkuu wa Kenya ni Nairobi", "te": "కెన్యా రాజధాని నైరోబి",
    "th": "เมืองหลวงของเคนยาคือไนโรบี", "tr": "Kenya'nın başkenti Nairobi'dir",
    "ur": "کینیا کا دارالحکومت نیروبی ہے", "vi": "Thủ đô của Kenya là Nairobi",
    "yo": "Olú ìlú Kẹ́ńyà ni Nairobi", "zh": "肯尼亚的首都是内罗毕",
}


def test_rouge_in_every_language():
    """Catches a script that falls apart or away in tokenisation: the same text scores 1, half of it
    between 0 and 1, another language's 0."""
    assert SENTENCES.keys() == set(LANGUAGES)
    for lang, text in SENTENCES.items():
        other = SENTENCES["te" if lang != "te" else "th"]
        assert rouge_l(text, text) == 1 and 0 < rouge_l(text[:len(text) // 2], text) < 1, lang
        assert rouge_l(text, other) == 0, lang


@pytest.mark.parametrize("answer, gold, score", [
    ("a x b y c", "a b c", 2 * 3 / (5 + 3)),                     # a b c
    ("A, x-b!", "a b c", 2 * 2 / (3 + 3)),                       # a b, of a x b
    ("c b a", "a b c", 2 * 1 / (3 + 3)),                         # any one
    ("首都は東京", "東京は首都", 2 * 2 / (5 + 5)),                   # two characters
    ("Mji mkuu", "", 0), ("", "Mji mkuu", 0), ("...", "...", 0),
    ("केन्या की राजधानी!", "राजधानी", 2 * 1 / (3 + 1)),                # marks belong to their letters
    ("१२ ٣", "12 3", 1),
])
def test_rouge_by_hand(answer, gold, score):
    """Catches a subsequence taken for a substring or a set, marks cut off their letters, case and digits
    that differ, and recall or precision in place of F1."""
    assert rouge_l(answer, gold) == pytest.approx(score)


# ------------------------------------------------------------------------------- eval.py on known answers

def write_task(folder, task, lang, items, sample="_sample", english=None):
    """A task's prompts and gold answers in a language; items: [(prompt, gold)]; english: those of
    split_en."""
    kinds = {"split": [{"instruction": prompt} for prompt, _ in items], "ans": [gold for _, gold in items]}
    for kind, lines in kinds.items():
        path = folder / task / (kind + sample) / f"{lang}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in lines), encoding="utf-8")
    if english:
        path = folder / task / f"split{sample}_en" / f"{lang}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text("\n".join(json.dumps({"instruction": text}) for text in english))


@pytest.fixture
def score(run, tmp_path, monkeypatch):
    """score(models, data, *options): (results.json, what is printed, {column: {task/lang: answers}}), run
    in tmp_path."""
    monkeypatch.chdir(tmp_path)

    def call(models, data, *options):
        scores = tmp_path / "scores"
        code, out, err = run("eval", "--model", *models, "--data", data, "--out", scores, *options)
        assert code == 0, err
        answers = {column.name: {f"{path.parent.name}/{path.name}": json_lines(path)
                                 for path in column.glob("*/*.jsonl")}
                   for column in (scores / "answers").iterdir()}
        return json.loads((scores / "results.json").read_text()), out, answers
    return call


def summary(everything, task, lang):
    """The summaries of each column."""
    return [s for s in everything["summaries"] if (s["task"], s["lang"]) == (task, lang)]


# In the form of the benchmarks: (task, language, prompt, what is answered, the option that this names).
PROMPTS = [
    ("XNLI", "en", "Premise: A child sleeps.\nHypothesis: A child is awake.\n\nWhat do you think is the "
     "relationship between the premise and the hypothesis?\n\n(1) Entail \n(2) Neutral\n(3) Contradict\n\n"
     "Your answer, (1), (2) or (3), would be:", "Entail", "1"),
    ("XNLI", "sw", "Nguzo: Mtoto amelala (1) kitandani.\nNadharia: Yuko macho.\n\nUnafikiri kuna uhusiano "
     "gani?\n\n(1) Inajumuisha\n(2) Kuegemea upande wowote\n(3) Kupingana\n\nJibu lako litakuwa:",
     "Nadhani ni kuegemea upande wowote", "2"),
    ("XNLI", "tr", "Öncül: Çocuk uyuyor.\nHipotez: Çocuk uyanık.\n\nİlişki nedir?\n\n(1) Gerektirme\n"
     "(2) Nötr \n(3) Çelişki\n\nCevabınız:", "Bilmiyorum", None),
    ("XNLI", "zh", "前提：孩子在睡觉。\n假设：孩子醒着。\n\n它们之间的关系是什么？\n\n(1) 蕴涵\n(2) 中立\n"
     "(3) 矛盾\n\n你的答案是：", "矛盾", "3"),
    ("XStoryCloze", "en", "Ann lost her key.She called a friend.\n(1) Ann waited at home.\n"
     "(2) Ann waited at the door.\n\nWhich of the two options is more likely?\nYour answer:",
     "Ann waited at the door.", "2"),
    ("XStoryCloze", "eu", "Anek giltza galdu zuen.\n(1) Ane etxean geratu zen.\n(2) Ane kalean geratu zen."
     "\n\nZure erantzuna, (1) ala (2), hau da:", "Ane etxean geratu zen", "1"),
    ("XStoryCloze", "hi", "अनु की चाबी खो गई।\n(1) अनु घर गई।\n(2) अनु दरवाज़े पर रुकी।\n\nआपका उत्तर:",
     "अनु दरवाज़े पर रुकी।", "2"),
    ("MMMLU", "en", "Please answer the following multiple choice question.\n\nWhich number is even?\n(A) 1\n"
     "(B) 4\n(C) 4 or more\n(D) 7\n\nYour answer would be:", "4", "B"),
    ("MMMLU", "es", "Responda.\n\n¿Qué es?\n(A) un color\n(B) un sonido\n(C) nada\n(D) un gran sonido\n\n"
     "Su respuesta:", "D) un gran sonido", "D"),
    ("MMMLU", "pt", "Responda.\n\nQual destas?\n(A) Uma cor\n(B) Uma cor clara\n(C) Um som\n(D) Nada\n\n"
     "Sua resposta:", "Acho que uma cor clara", "B"),
    ("MMMLU", "ko", "다음 질문에 답하세요.\n\n(A) 위와 같은 줄은?\n(A) 사과\n(B) 배 \n(C) 감\n(D) 귤\n\n답:",
     "사과", "A"),
]


@pytest.mark.parametrize("task", ["XNLI", "XStoryCloze", "MMMLU"])
def test_options_of_real_prompts(score, tmp_path, task):
    """Catches options that are not found in a prompt, whose text is cut or keeps its line's last space,
    or that are taken from the question; and a score that does not follow from the choice."""
    rows = [row for row in PROMPTS if row[0] == task]
    write_parrot(tmp_path / "model", {prompt.splitlines()[-1]: text for _, _, prompt, text, _ in rows},
                 max_position_embeddings=2048)
    for _, lang, prompt, _, named in rows:
        wrong = "2" if named == "1" else "1" if task != "MMMLU" else "C"
        write_task(tmp_path / "bench", task, lang, [(prompt, named or wrong), (prompt, wrong)])
    everything, out, answers = score(["model"], "bench")
    for (_, lang, _, text, named), result in zip(sorted(rows), everything["results"], strict=True):
        written = [(row["answer"], row["choice"]) for row in answers["model_none"][f"{task}/{lang}.jsonl"]]
        assert result["lang"] == lang and written == [(text, named)] * 2
        assert result["scores"]["accuracy"] == (0.5 if named else 0)
        assert result["unparsed"] == (0 if named else 2)
    said = "model: 2 answers named no option, or several, and count as wrong"
    assert (said in out) == (task == "XNLI")


def test_unparsed_answers_of_each_column(score, tmp_path):
    """Catches answers without an option that are counted for another column, or not said."""
    write_parrot(tmp_path / "clear", {"?": "2"})
    write_parrot(tmp_path / "vague", {"?": "perhaps"})
    write_task(tmp_path / "bench", "XNLI", "sw", [("Gani?", "1")] * 3)
    everything, out, _ = score(["vague", "clear"], "bench")
    assert [row["unparsed"] for row in everything["results"]] == [3, 0]
    assert "vague: 3 answers named no option" in out and "clear: " not in out


def test_scores_of_each_task(score, tmp_path):
    """Catches a task scored by another's metric, a gold scored against itself, the worst of several
    golds, articles of another language, and a score that is not the mean over items."""
    write_parrot(tmp_path / "model", {"Mwaka?": "It was in 1999", "Jiji?": "the town", "Na?": "sijui",
                                      "Habari?": "Watu wawili walikufa jana"})
    year, town, other = ("Mwaka?", ["2000", "1999"]), ("Jiji?", "a town"), ("Na?", "hakuna")
    for task in ("XQuAD", "MKQA", "Other"):
        write_task(tmp_path / "bench", task, "en", [year, town, other, other])
    write_task(tmp_path / "bench", "XQuAD", "sw", [town] * 4)  # Swahili has no such articles
    write_task(tmp_path / "bench", "XLSum", "sw", [("Habari?", ["Mvua", "Watu walikufa"]), other])
    everything, out, _ = score(["model"], "bench")
    found = {(row["task"], row["lang"]): row["scores"] for row in everything["results"]}
    open_answer = {"contained": 2 / 4, "exact": 1 / 4, "f1": (2 / 5 + 1) / 4}
    assert found == {
        **{(task, "en"): pytest.approx(open_answer) for task in ("XQuAD", "MKQA", "Other")},
        ("XQuAD", "sw"): {"contained": 0, "exact": 0, "f1": 1 / 2},
        ("XLSum", "sw"): {"rouge_l": pytest.approx((2 * 2 / (4 + 2) + 0) / 2)}}
    for line in ("| XQuAD | en | 50.0 (", "| MKQA | en | 50.0 (", "| Other | en | 25.0 (",
                 "| XLSum | sw | 33.3 (", "| XQuAD | exact | 12.5 |", "| MKQA | f1 | 35.0 |",
                 "| Other | contained | 50.0 |"):
        assert line in out, line
    assert all(row["unparsed"] == 0 for row in everything["results"]) and "named no option" not in out


# "a" answers 1, "b" 2, "c" 3. Right is 1 in XNLI in English, 2 in Swahili; in facts 2 in Hindi, 1 or 2 in
# Swahili.
TABLE = """\
| task | language | a | b | c |
|---|---|---|---|---|
| XNLI | en | 100.0 (91.2-100.0) | 0.0 (0.0-8.8) | 0.0 (0.0-8.8) |
| XNLI | sw | 0.0 (0.0-8.8) | 100.0 (91.2-100.0) | 0.0 (0.0-8.8) |
| XNLI | mean | 50.0 (50.0-50.0) | 50.0 (50.0-50.0) | 0.0 (0.0-0.0) |
| XNLI | mean without en | 0.0 (0.0-0.0) | 100.0 (100.0-100.0) | 0.0 (0.0-0.0) |
| facts | hi | 0.0 (0.0-8.8) | 100.0 (91.2-100.0) | 0.0 (0.0-8.8) |
| facts | sw | 100.0 (95.4-100.0) | 100.0 (95.4-100.0) | 0.0 (0.0-4.6) |
| facts | mean | 50.0 (50.0-50.0) | 100.0 (100.0-100.0) | 0.0 (0.0-0.0) |
| XNLI, likelihood | en | 100.0 (91.2-100.0) | 0.0 (0.0-8.8) | 0.0 (0.0-8.8) |
| XNLI, likelihood | sw | 0.0 (0.0-8.8) | 100.0 (91.2-100.0) | 0.0 (0.0-8.8) |
| XNLI, likelihood | mean | 50.0 (50.0-50.0) | 50.0 (50.0-50.0) | 0.0 (0.0-0.0) |
| XNLI, likelihood | mean without en | 0.0 (0.0-0.0) | 100.0 (100.0-100.0) | 0.0 (0.0-0.0) |
| all | sw | 50.0 (50.0-50.0) | 100.0 (100.0-100.0) | 0.0 (0.0-0.0) |
| all | mean | 50.0 (50.0-50.0) | 75.0 (75.0-75.0) | 0.0 (0.0-0.0) |
| all | mean without en | 25.0 (25.0-25.0) | 100.0 (100.0-100.0) | 0.0 (0.0-0.0) |

| task | language | against a | difference | 95 % interval | p | Holm's p |
|---|---|---|---|---|---|---|
| XNLI | mean | b | +0.0 | +0.0 to +0.0 | 1.0000 | 1.0000 |
| XNLI | mean | c | -50.0 | -50.0 to -50.0 | 0.0001 | 0.0010 |
| XNLI | mean without en | b | +100.0 | +100.0 to +100.0 | 0.0001 | 0.0010 |
| XNLI | mean without en | c | +0.0 | +0.0 to +0.0 | 1.0000 | 1.0000 |
| facts | mean | b | +50.0 | +50.0 to +50.0 | 0.0001 | 0.0010 |
| facts | mean | c | -50.0 | -50.0 to -50.0 | 0.0001 | 0.0010 |
| XNLI, likelihood | mean | b | +0.0 | +0.0 to +0.0 | 1.0000 | 1.0000 |
| XNLI, likelihood | mean | c | -50.0 | -50.0 to -50.0 | 0.0001 | 0.0010 |
| XNLI, likelihood | mean without en | b | +100.0 | +100.0 to +100.0 | 0.0001 | 0.0010 |
| XNLI, likelihood | mean without en | c | +0.0 | +0.0 to +0.0 | 1.0000 | 1.0000 |
| all | mean | b | +25.0 | +25.0 to +25.0 | 0.0001 |  |
| all | mean | c | -50.0 | -50.0 to -50.0 | 0.0001 |  |
| all | mean without en | b | +75.0 | +75.0 to +75.0 | 0.0001 |  |
| all | mean without en | c | -25.0 | -25.0 to -25.0 | 0.0001 |  |

| task | mean of | a | b | c |
|---|---|---|---|---|
| XNLI | chance | 33.3 | 33.3 | 33.3 |
| XNLI | majority | 100.0 | 100.0 | 100.0 |
| XNLI | picked 1 | 100.0 | 0.0 | 0.0 |
| XNLI | picked 2 | 0.0 | 100.0 | 0.0 |
| XNLI | picked 3 | 0.0 | 0.0 | 100.0 |
| XNLI | likeliest 1 | 100.0 | 0.0 | 0.0 |
| XNLI | likeliest 2 | 0.0 | 100.0 | 0.0 |
| XNLI | likeliest 3 | 0.0 | 0.0 | 100.0 |
| XNLI | unparsed | 0.0 | 0.0 | 0.0 |
| XNLI | truncated | 0.0 | 0.0 | 0.0 |
| XNLI | items | 80 | 80 | 80 |
| XNLI | seconds | SECONDS |
| facts | contained | 50.0 | 100.0 | 0.0 |
| facts | f1 | 50.0 | 100.0 | 0.0 |
| facts | truncated | 0.0 | 0.0 | 0.0 |
| facts | items | 120 | 120 | 120 |
| facts | seconds | SECONDS |
"""


def test_table(score, tmp_path):
    """Catches a column under another model, a comparison with another than the first, a difference with
    the wrong sign, a mean over items where it should be over languages, English that counts as another
    language, a row too many."""
    for name, says in (("a", "1"), ("b", "2"), ("c", "3")):
        write_parrot(tmp_path / name, {"?": says})
    parts = [("XNLI", "en", 40), ("XNLI", "sw", 40), ("facts", "hi", 40), ("facts", "sw", 80)]
    for (task, lang, count), gold in zip(parts, ["1", "2", "2", ["1", "2"]], strict=True):
        write_task(tmp_path / "bench", task, lang, [("Gani?", gold)] * count)
    everything, out, answers = score(["a", "b", "c"], "bench", "--batch_size=80", "--max_new_tokens=2")
    markdown = (tmp_path / "scores" / "results.md").read_text()
    assert re.sub(r"(seconds \|) .*(?= \|\n)", r"\1 SECONDS", markdown) == TABLE and markdown.strip() in out
    assert [answers[f"{name}_none"]["XNLI/sw.jsonl"][0]["answer"] for name in "abc"] == ["1", "2", "3"]
    keys = ("column", "model", "connection", "task", "lang", "items")
    rows = [tuple(row[key] for key in keys) for row in everything["results"]]
    assert rows == [(name, name, "none", *part) for name in "abc" for part in parts]


@pytest.fixture(scope="module")
def compared(tmp_path_factory, run):
    """(results.json, results.md) of two models, of which the first says 1 and the second 2 whatever is
    asked."""
    folder = tmp_path_factory.mktemp("compared")
    for name in ("1", "2"):
        write_parrot(folder / name, {"?": name})
    first, second, both, neither = (("Gani?", gold) for gold in ("1", "2", ["1", "2"], "3"))
    for lang in ("hi", "sw"):
        write_task(folder, "XNLI", lang, [first] * 50 + [neither] * 150)
    for task, items in (("ten", [first] * 10 + [neither] * 30), ("few", [both] * 8 + [second] * 2),
                        ("swapped", [first] * 6 + [second] * 6 + [both] * 8)):
        write_task(folder, task, "sw", items)
    scores = folder / "scores"
    code, _, err = run("eval", "--model", folder / "1", folder / "2", "--data", folder, "--out", scores,
                       "--batch_size=200", "--max_new_tokens=2")
    assert code == 0, err
    return json.loads((scores / "results.json").read_text()), (scores / "results.md").read_text()


def test_intervals(compared):
    """Catches an interval of another width than 95 %, or upside down, and one of a mean that is too
    narrow: the questions are the same in every language."""
    everything, table = compared
    of_sw, _ = summary(everything, "XNLI", "sw")
    assert of_sw["score"] == 0.25
    assert of_sw["interval"] == pytest.approx([0.1951, 0.3143], abs=1e-4)  # Wilson's of 50 in 200
    assert "| XNLI | sw | 25.0 (19.5-31.4) | 0.0 (0.0-1.9) |" in table
    spread, (_, second) = 1.96 * (0.25 * 0.75 / 200) ** 0.5, summary(everything, "XNLI", "mean")
    interval = summary(everything, "XNLI", "mean")[0]["interval"]
    assert interval == pytest.approx([0.25 - spread, 0.25 + spread], abs=0.006)
    assert second["difference_interval"] == pytest.approx([-0.25 - spread, -0.25 + spread], abs=0.006)


@pytest.mark.parametrize("task, difference, p, error", [
    ("XNLI", -0.25, 1e-4, 1e-5),         # 50 items differ, in one direction: no permutation does as much
    ("ten", -0.25, 2 / 2 ** 10, 0.001),  # 10 do
    ("few", 0.2, 2 / 2 ** 2, 0.02),      # 2 do
    ("swapped", 0, 1, 0),                # 6 in each direction
])
def test_p_values(compared, task, difference, p, error):
    """Catches a test that is not paired, not two-sided, or of another number of permutations, and a wrong
    sign."""
    first, second = summary(compared[0], task, "sw")
    assert (first["difference"], first["p"]) == (0, 1)
    assert second["difference"] == pytest.approx(difference) and second["p"] == pytest.approx(p, abs=error)
    assert summary(compared[0], task, "mean")[1]["p"] == pytest.approx(second["p"])


def test_corrected_p_values():
    """Catches p-values corrected by their number alone, out of order, or for rows of single languages."""
    rows = [("XNLI", "sw", "a", 1), ("XNLI", "sw", "b", 0.001), ("XNLI", "mean", "a", 1),
            ("XNLI", "mean", "b", 0.03), ("XNLI", "mean", "c", 0.01), ("facts", "mean", "a", 1),
            ("facts", "mean", "b", 0.04), ("all", "mean", "a", 1), ("all", "mean", "b", 0.02)]
    rows = [dict(zip(("task", "lang", "column", "p"), row, strict=True)) for row in rows]
    found = [row.get("p_holm") for row in holm(rows)]
    assert found == [None, None, None, pytest.approx(0.06), pytest.approx(0.03), None, pytest.approx(0.06), None, None]


def test_which_items(score, tmp_path):
    """Catches a sample preferred to the whole benchmark, prompts with another line's gold, and --tasks,
    --langs or --limit ignored or taken from the end."""
    write_parrot(tmp_path / "model", {"moja?": "1", "mbili?": "2"})
    for task in ("XNLI", "facts"):
        for lang in ("hi", "sw", "zh"):
            write_task(tmp_path / "bench", task, lang, [("Sampuli, moja?", "2")])
            items = [("moja?", "1"), ("mbili?", ["3", "2"]), ("moja?", "3")]
            write_task(tmp_path / "bench", task, lang, items, sample="")
    everything, _, _ = score(["model"], "bench")
    assert [(row["task"], row["lang"]) for row in everything["results"]] == [
        (task, lang) for task in ("XNLI", "facts") for lang in ("hi", "sw", "zh")]
    assert all(row["items"] == 3 and 2 / 3 in row["scores"].values() for row in everything["results"])
    everything, out, answers = score(["model"], "bench", "--tasks=XNLI", "--langs=zh,sw", "--limit=2")
    scores = {"accuracy": 1, "likelihood": 0.5}  # its "1" and "2" are not spelt as the tokenizer does: a tie
    assert [(row["task"], row["lang"], row["items"], row["scores"]) for row in everything["results"]] == [
        ("XNLI", lang, 2, scores) for lang in ("zh", "sw")]
    for n, (named, gold) in enumerate((("1", ["1"]), ("2", ["3", "2"]))):
        row = answers["model_none"]["XNLI/sw.jsonl"][n]
        expected = {"item": n, "answer": named, "choice": named, "gold": gold, "layer": None, "tokens": 1,
                    "truncated": False, "shortened": False, "scores": scores}
        assert {key: row[key] for key in expected} == expected
    prompts = json_lines(tmp_path / "scores" / "prompts" / "XNLI" / "sw.jsonl")
    assert prompts == [{"item": 0, "instruction": "moja?"}, {"item": 1, "instruction": "mbili?"}]
    assert "| XNLI | mean | 100.0" in out and "| all |" not in out
    assert everything["arguments"]["limit"] == 2 and everything["arguments"]["langs"] == "zh,sw"


@torch.no_grad()
def test_connections_side_by_side(score, tmp_path):
    """Catches a column with another connection's answers, an English version of another line or from
    another file, and a plain checkpoint that is asked what only a tuned one can."""
    tuned = write_connection(write_checkpoint(tmp_path / "tuned", "chatml", seed=4))
    write_checkpoint(tmp_path / "plain", "chatml", seed=4)
    own, of_en = [own for own, *_ in PAIRS[:3]], ["What is a capital?", "two plus three?", "Which capital?"]
    versions = {"XQuAD": of_en, "XLSum": [f"{i} What is it?" for i in range(3)]}
    for task, sample, english in (("XQuAD", "", None), ("XLSum", "_sample", versions["XLSum"])):
        for lang, prompts in (("sw", own), ("en", of_en)):
            write_task(tmp_path / "bench", task, lang, [(text, "x") for text in prompts], sample, english)
    options = ("--langs=sw", "--max_new_tokens=6", "--connection", "matrix", "english", "none")
    everything, _, answers = score(["tuned", "plain"], "bench", *options)
    columns = [(row["column"], row["connection"]) for row in everything["results"] if row["task"] == "XQuAD"]
    connections = ["matrix", "english", "none"]
    assert columns == [*((f"tuned, {c}", c) for c in connections), ("plain, none", "none")]
    assert answers["plain_none"].keys() == {"XQuAD/sw.jsonl", "XLSum/sw.jsonl"}
    reference = Reference(tuned)
    for task, i, connection in itertools.product(versions, range(3), connections):
        ids, index, turn = prompt_ids(tuned, own[i], "chatml")
        english, _, _ = prompt_ids(tuned, versions[task][i], "chatml")
        vector = reference.vector(ids, index, english if connection == "english" else None)
        expected = reference.answer(ids, 6, {turn, 2}, None if connection == "none" else vector, index)
        row = answers[f"tuned_{connection}"][f"{task}/sw.jsonl"][i]
        assert row["answer"] == text_of(tuned, expected) and (row["layer"] is None) == (connection == "none")
    alone, _, _ = score(["tuned"], "bench", *options[:2])
    assert [(row["column"], row["connection"]) for row in alone["results"]] == [("tuned", "matrix")] * 2


@torch.no_grad()
def test_long_prompts_are_shortened_in_the_middle(score, tmp_path):
    """Catches a prompt cut at its end, where the question stands, one cut further than it must be, one
    that leaves no room for the answer, and cutting unsaid."""
    model = write_checkpoint(tmp_path / "model", seed=3)
    text = "Mwanzo. " + "maneno mengi ya katikati " * 50 + "Swali?"
    write_task(tmp_path / "bench", "facts", "sw", [(text, "x"), ("Nini?", "x")])
    everything, out, answers = score(["model"], "bench", "--max_new_tokens=8")
    kept = max(n for n in range(1, 250) if len(prompt_ids(model, text[:n] + text[-n:])[0]) <= 256 - 8)
    ids, _, turn = prompt_ids(model, text[:kept] + text[-kept:])
    row = answers["model_none"]["facts/sw.jsonl"][0]
    assert row["answer"] == text_of(model, Reference(model).answer(ids, 8, {turn}))
    prompts = json_lines(tmp_path / "scores" / "prompts" / "facts" / "sw.jsonl")
    assert prompts[0] == {"item": 0, "instruction": text} and row["shortened"]
    assert everything["results"][0]["shortened"] == 1 and "model: 1 prompts were shortened to fit" in out


@torch.no_grad()
def test_options_of_the_engine(score, tmp_path):
    """Catches a --dtype, a --template or a --batch_size that eval.py ignores."""
    folder = write_checkpoint(tmp_path / "model", "chatml", seed=4)
    write_task(tmp_path / "bench", "facts", "sw", [(own, "x") for own, *_ in PAIRS[:3]])
    seen = set()

    def look(module, given):
        if isinstance(module, torch.nn.Embedding) and given[0].dim() == 2:
            seen.add((module.weight.dtype, len(given[0])))
    hook = torch.nn.modules.module.register_module_forward_pre_hook(look)
    options = ("--dtype=bfloat16", "--batch_size=3", "--max_new_tokens=1")
    score(["model"], "bench", *options)
    hook.remove()
    assert seen == {(torch.bfloat16, 3)}
    _, _, answers = score(["model"], "bench", "--template=plain", "--max_new_tokens=4")
    for row, (own, *_) in zip(answers["model_none"]["facts/sw.jsonl"], PAIRS, strict=False):
        ids, _, turn = prompt_ids(folder, own)
        assert row["answer"] == text_of(folder, Reference(folder).answer(ids, 4, {turn}))


@torch.no_grad()
@pytest.mark.parametrize("connection", ["none", "matrix", "english"])
def test_likelihoods(score, tmp_path, connection):
    """Catches a form scored at another position, against another form's keys or without its end of turn, and
    forms that change the answer: likelihoods are an uncached full pass's, of whole prompts."""
    folder = write_connection(write_checkpoint(tmp_path / "model", "chatml", seed=4))
    prompts = [("Nini?\n(A) 1\n(B) two plus three\n(C) tano tano tano\n(D) tano", "What?"),
               ("Mji mkuu wa Kenya?", "Capital?")]
    write_task(tmp_path / "bench", "MMMLU", "sw", [(prompt, "B") for prompt, _ in prompts])
    write_task(tmp_path / "bench", "MMMLU", "en", [(english, "B") for _, english in prompts])
    _, _, answers = score(["model"], "bench", "--langs=sw", "--connection", connection, "--max_new_tokens=4")
    reference = Reference(folder)
    for row, (text, english) in zip(answers[f"model_{connection}"]["MMMLU/sw.jsonl"], prompts, strict=True):
        ids, index, turn = prompt_ids(folder, text, "chatml")
        of_en = prompt_ids(folder, english, "chatml")[0] if connection == "english" else None
        vector = None if connection == "none" else reference.vector(ids, index, of_en)
        texts = dict(re.findall(r"^\((.)\) (.*)", text, re.MULTILINE))
        for option in "ABCD":
            forms = {option, *([f"({option}) {texts[option]}", texts[option]] if texts else [])}
            answers_of = [answer_ids(folder, form, "chatml") for form in forms]
            expected = torch.stack([-reference.loss(ids, answer, vector, index) for answer in answers_of])
            assert row["likelihood"][option] == pytest.approx(expected.logsumexp(0).item(), abs=1e-3)
        assert row["answer"] == text_of(folder, reference.answer(ids, 4, {turn, 2}, vector, index))


def test_answers_are_kept(score, run, tmp_path, monkeypatch):
    """Catches answers given twice, answers of another prompt, setting or model taken over, --again ignored,
    and --rescore that needs the model or keeps old scores."""
    write_parrot(tmp_path / "model", {"moja?": "1", "mbili?": "2"})
    write_task(tmp_path / "bench", "XNLI", "sw", [("moja?", "1"), ("mbili?", "1")])
    write_task(tmp_path / "bench", "facts", "sw", [("moja?", "1")])
    asked = []

    def answered(*options):
        del asked[:]
        everything, _, _ = score(["model"], "bench", *options)
        assert [row["scores"].get("accuracy") for row in everything["results"]] == [0.5, None]
        return asked
    engine = sys.modules["infer"].Engine
    generate = engine.generate

    def counted(self, prompts, *options):
        asked.append(len(prompts))
        return generate(self, prompts, *options)
    monkeypatch.setattr(engine, "generate", counted)
    assert answered() == [2, 1] and answered() == [] and answered("--again") == [2, 1]
    assert answered("--max_new_tokens=3") == [2, 1]
    write_task(tmp_path / "bench", "facts", "sw", [("mbili?", "1")])
    assert answered("--max_new_tokens=3") == [1]
    for contents in ("{}", '{"eos_token_id": 2}'):
        (tmp_path / "model" / "generation_config.json").write_text(contents)
        assert answered("--max_new_tokens=3") == [2, 1]
    (tmp_path / "model").rename(tmp_path / "elsewhere")
    assert answered("--rescore") == []
    write_task(tmp_path / "bench", "XNLI", "sw", [("moja?", "2"), ("mbili?", "2")])
    path = tmp_path / "scores" / "answers" / "model_none" / "XNLI" / "sw.jsonl"
    path.write_text(path.read_text().replace('"answer": "1"', '"answer": "3"'))
    assert answered("--rescore") == [] and json_lines(path)[0]["choice"] == "3"
    code, _, err = run("eval", "--model", "model", "--data", "bench", "--out", tmp_path / "scores", "--limit=1",
                       "--rescore")
    assert code == 2 and "sw.jsonl: does not hold answers to these 1 prompts" in err
    write_task(tmp_path / "bench", "XNLI", "sw", [("mbili?", "2"), ("moja?", "2")])  # other prompts, as many
    code, _, err = run("eval", "--model", "model", "--data", "bench", "--out", tmp_path / "scores", "--rescore")
    assert code == 2 and "sw.jsonl: does not hold answers to these 2 prompts" in err
    write_parrot(tmp_path / "other", {"?": "1"})
    assert run("eval", "--model", "other", "--data", "bench", "--out", tmp_path / "scores")[0] == 0  # to these prompts
    write_task(tmp_path / "bench", "XNLI", "sw", [("moja?", "2"), ("mbili?", "2")])
    assert answered("--rescore") == []
    path.write_text(path.read_text().replace('"answer"', '"reply"'))  # by another program
    code, _, err = run("eval", "--model", "model", "--data", "bench", "--out", tmp_path / "scores", "--rescore")
    assert code == 2 and "sw.jsonl: does not hold answers" in err
    (tmp_path / "elsewhere").rename(tmp_path / "model")
    assert answered("--max_new_tokens=3") == [2]


def test_results_grow(run, tmp_path, monkeypatch):
    """Catches results that are lost when a later part fails, models that write over one another's answers,
    and an evaluation that a missing git ends."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "")
    (tmp_path / "a").mkdir()
    for folder, says in (("a/b", "1"), ("a_b", "2")):
        write_parrot(tmp_path / folder, {"?": says})
    write_task(tmp_path / "bench", "XNLI", "sw", [("Gani?", "1")] * 2)
    write_task(tmp_path / "bench", "facts", "sw", [("Gani?", "1")])
    score_row = sys.modules["eval"].score_row

    def fails_late(task, lang, item, row):
        assert (task, row["answer"]) != ("facts", "2"), "stopped"
        return score_row(task, lang, item, row)
    monkeypatch.setattr("eval.score_row", fails_late)
    command = ("eval", "--model", "a/b", "a_b", "--data", "bench", "--out", "scores")
    with pytest.raises(AssertionError, match="stopped"):
        run(*command)
    found = json.loads((tmp_path / "scores" / "results.json").read_text())
    cells = [(row["column"], row["task"]) for row in found["results"]]
    assert cells == [("a/b", "XNLI"), ("a/b", "facts"), ("a_b", "XNLI")]
    markdown = (tmp_path / "scores" / "results.md").read_text()
    assert "| facts | sw | 100.0 (20.7-100.0) |  |" in markdown and "| XNLI | mean | a_b | -100.0 |" in markdown
    assert found["commit"] is None and found["models"]["a_b"]["template"] == "plain"
    monkeypatch.setattr("eval.score_row", score_row)
    code, out, err = run(*command)
    assert code == 0 and "a_b: facts sw: exact 0.0, 1 items, 0 s\n" in err
    assert {path.name for path in (tmp_path / "scores" / "answers").iterdir()} == {"a%2Fb_none", "a_b_none"}


def test_one_column_each(run, tmp_path, monkeypatch):
    """Catches a connection that counts twice, English that is missed after an hour of other answers, and answers
    in a hidden folder."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    write_connection(write_parrot(tmp_path / "model", {"?": "1"}))
    write_task(tmp_path / "bench", "XNLI", "sw", [("Gani?", "1")], english=["Which?"])
    command = ("eval", "--model", "../model", "--data", "../bench", "--out", "scores", "--connection")
    assert run(*command, "none", "none")[0] == 0 and run(*command, "none", "none", "--rescore")[0] == 0
    found, = results_of(tmp_path / "here" / "scores")
    assert found["items"] == 1
    folder, = (tmp_path / "here" / "scores" / "answers").iterdir()
    assert not folder.name.startswith(".") and folder.name.endswith("model_none")
    write_task(tmp_path / "bench", "facts", "sw", [("Gani?", "1")])
    code, _, err = run(*command, "matrix", "english")
    assert code == 2 and "facts/split_sample/sw.json:1: --connection english" in err and "XNLI" not in err


def test_defaults(tmp_path, run, monkeypatch):
    """Catches another length of answers than --help says, another folder for results, and a model in
    `out`, just trained, that is not the one scored."""
    monkeypatch.chdir(tmp_path)
    for script in ("infer", "eval"):
        monkeypatch.delitem(sys.modules, script)
    write_parrot(tmp_path / "out", {"?": ["ha", "ha"]})
    write_task(tmp_path / "bench", "facts", "sw", [("Nini?", "ha")])
    code, out, err = run("eval", "--data", "bench")
    assert code == 0 and err.splitlines()[0] == "model: out"
    assert out.endswith("results and answers are in out/eval\n")
    assert "answering as a plain model" in err
    row, = json_lines(tmp_path / "out" / "eval" / "answers" / "out_none" / "facts" / "sw.jsonl")
    assert row["answer"] == "ha" * 32 and row["truncated"]


def test_lengths(score, tmp_path):
    """Catches a summary cut at the length of a name, and answers cut unsaid."""
    write_parrot(tmp_path / "model", {"?": ["ha", "ha"]})
    for task, gold in (("XNLI", "1"), ("XLSum", "ha"), ("MKQA", "ha")):
        write_task(tmp_path / "bench", task, "sw", [("Nini?", gold)])
    everything, out, answers = score(["model"], "bench")
    tokens = {path: rows[0]["tokens"] for path, rows in answers["model_none"].items()}
    assert tokens == {"XNLI/sw.jsonl": 24, "XLSum/sw.jsonl": 128, "MKQA/sw.jsonl": 32}
    assert all(row["truncated"] == 1 for row in everything["results"]) and "model: 3 answers were cut" in out


def test_figures(score, tmp_path, monkeypatch):
    """Catches a bar of another column or language, an interval that is not the table's, layers of an
    unconnected column, and figures that are not written."""
    figure = pytest.importorskip("matplotlib.figure", reason="pip install matplotlib").Figure
    save, drawn = figure.savefig, {}

    def watch(self, path, **options):
        drawn[Path(path).name] = self
        save(self, path, **options)
    monkeypatch.setattr(figure, "savefig", watch)
    for name, says in (("a", "1"), ("b", "2")):
        write_parrot(tmp_path / name, {"?": says})
    write_connection(tmp_path / "b")
    for lang, right in (("hi", 1), ("sw", 8)):
        items = [("Gani?", "1")] * right + [("Gani?", "2")] * (10 - right)
        write_task(tmp_path / "bench", "XNLI", lang, items)
    log = [{"step": 1, "loss": 3, "lr": 1}, {"step": 2, "loss": 2, "lr": 0},
           {"step": 2, "eval_loss": {"none": 1.5}}, {"matrix": {}}]
    (tmp_path / "b" / "train_log.jsonl").write_text("\n".join([*map(json.dumps, log), '{"step": 3, "lo']))
    everything, _, answers = score(["a", "b"], "bench", "--plot", "figures")
    pictures = [tmp_path / "figures" / name for name in ("scores.png", "layers.png", "loss.png")]
    assert all(picture.stat().st_size > 1000 for picture in pictures)
    axes, _, means = drawn["scores.png"].axes
    assert [text.get_text() for text in axes.get_xticklabels()] == ["hi", "sw"]
    assert [text.get_text() for text in means.get_xticklabels()] == ["XNLI", "XNLI, likelihood"]
    assert [bar.get_height() for bar in axes.patches] == pytest.approx([10, 80, 90, 20])
    assert axes.get_ylim() == (0, 100) and axes.lines[-1].get_ydata()[0] == pytest.approx(100 / 3)  # chance
    ends = [segment[:, 1] for lines in axes.collections for segment in lines.get_segments()]
    intervals = [summary(everything, "XNLI", lang)[i]["interval"] for i in (0, 1) for lang in ("hi", "sw")]
    assert [list(end / 100) for end in ends] == [pytest.approx(interval) for interval in intervals]
    loss, rate = drawn["loss.png"].axes
    assert [list(line.get_ydata()) for line in (*loss.lines, *rate.lines)] == [[3, 2], [1.5], [1, 0]]
    layers = drawn["layers.png"].axes
    shares = [image.get_array() for one in layers for image in one.images]
    layer = answers["b_matrix"]["XNLI/sw.jsonl"][0]["layer"]
    assert len(shares) == 1 and shares[0].shape == (2, 2) and (shares[0][layer] == 1).all()
