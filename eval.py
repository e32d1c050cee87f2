"""Score checkpoints on multilingual benchmarks, answered by infer.py's engine.

    python eval.py                                            # held-out questions of the embedded default
    python eval.py --model DIR [DIR ...] --data BENCHMARKS [--tasks XNLI,MMMLU] [--langs sw,hi] [--limit 50]
    python eval.py ... --connection matrix english none       # the three connections side by side
    python eval.py ... --rescore                              # score the answers in --out, without a model
    torchrun --nproc_per_node 8 eval.py ...                   # same answers, prompts spread over 8 processes

BENCHMARKS has the layout of the paper's repository: TASK/split/LANG.json with the prompts and
TASK/ans/LANG.json with the gold answers (or split_sample and ans_sample), a JSON value per line. The English
version of a prompt is the same line of split_en/LANG.json (split_sample_en), or else of the task's en.json.

    task                    main metric, 0 to 100               also reported
    XNLI XStoryCloze MMMLU  accuracy of the option named        likelihood: the option with the highest
                            by the answer                       probability over "B", "(B) text" and "text"
    XQuAD MKQA              contained: a gold answer stands     exact match, token F1
                            in the answer
    XLSum                   ROUGE-L
    any other               exact match                         contained, token F1

95 % intervals: Wilson's for items scored 0 or 1, bootstrap for the rest. Means are unweighted over languages,
then over tasks. Other columns are compared with the first by a paired sign-flip permutation test on the same
items. Answers are reused while prompts, model and settings stay the same.
"""
import argparse
import json
import math
import platform
import re
import runpy
import string
import subprocess
import sys
import time
import unicodedata
import zlib
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import numpy as np
import torch
from tqdm import tqdm

from infer import WHICH_MODEL, Engine, add_engine_options, default_model, write_json_lines
from model import (CCTUNING_FILE, DATA, TOKENIZER_FILES, Config, Help, Tokenizer, UserError, at_least,
                   check_writable, file_path, read_json, read_json_lines, read_records, read_text, relative,
                   run_script, weight_files, write_text)
from train import Dist, digest, sha256_of

OPTIONS = {"XNLI": "123", "XStoryCloze": "12", "MMMLU": "ABCD"}  # other tasks are answered freely
METRICS = defaultdict(lambda: ("exact", "contained", "f1"), {  # of each task, its main metric first
    **dict.fromkeys(OPTIONS, ("accuracy",)), "XLSum": ("rouge_l",),
    **dict.fromkeys(("XQuAD", "MKQA"), ("contained", "exact", "f1"))})
MAX_NEW_TOKENS = defaultdict(lambda: 32, XLSum=128, **dict.fromkeys(OPTIONS, 24))  # 32 cut most summaries
LIKELIHOOD = ", likelihood"  # added to a task's name in the rows of this metric
FLAGS = {  # of an answer: text that follows the number of answers with it
    "unparsed": "answers named no option, or several, and count as wrong",
    "truncated": "answers were cut at --max_new_tokens",
    "shortened": "prompts were shortened to fit",
    "unreachable": "golds are dates, yes or no, without words for them in data/languages.json"}
ANSWER_KEYS = {  # of a row of OUT/answers
    "digest", "prompts", "answer", "likelihood", "layer", "layers", "truncated", "shortened"}
RESAMPLES, PERMUTATIONS = 1000, 10000
HERE = Path(__file__).resolve().parent
LANGUAGE_TABLES = read_json(HERE / "data" / "languages.json")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    add = parser.add_argument
    add("--model", type=file_path, nargs="+", metavar="DIR",
        help=f"checkpoint folders to compare (default: {WHICH_MODEL})")
    add("--data", type=file_path, default=relative(DATA / "test"), metavar="DIR",
        help="benchmarks (default: the embedded data/test)")
    add("--tasks", metavar="TASK,...", help="folders of --data (default: all)")
    add("--langs", metavar="CODE,...", help="languages (default: all that a task has)")
    add("--limit", type=at_least(1), metavar="N", help="only the first N items of each language")
    add("--out", type=file_path, default="out/eval", metavar="DIR",
        help="folder for results.json, results.md and answers")
    add("--plot", type=file_path, metavar="DIR",
        help="folder for scores.png, layers.png and loss.png (needs matplotlib)")
    add("--again", action="store_true", help="generate all answers again, also those in --out")
    add("--rescore", action="store_true", help="score the answers in --out; no model is loaded")
    add_engine_options(parser, connections="+")
    return parser.parse_args(argv)


# -------------------------------------------------------------------------------------------- benchmarks

def task_folder(task, kind):
    """The folder of a task's prompts (kind "split") or gold answers ("ans"), complete or sampled."""
    return task / (kind if (task / kind).is_dir() else f"{kind}_sample")


def select(option, text, known, where):
    """The comma-separated names given to an option, which must be known; all known ones if none are given."""
    if not known:
        raise UserError(f"{where}: no benchmark found; expected TASK/split/LANG.json or split_sample")
    names = text.split(",") if text else known
    for name in names:
        if name not in known:
            raise UserError(f"{option}: unknown name {name!r}; {where} has {', '.join(known)}")
        if names.count(name) > 1:
            raise UserError(f"{option}: {name} is named twice; name it once")
    return names


def find_tasks(data, tasks, langs):
    """[(task, language)] to run. tasks, langs: comma-separated names, or None for all."""
    folders = {path.name: task_folder(path, "split") for path in sorted(Path(data).glob("*"))}
    known = [name for name, folder in folders.items() if folder.is_dir()]
    return [(name, lang) for name in select("--tasks", tasks, known, data)
            for lang in select("--langs", langs, sorted(path.stem for path in folders[name].glob("*.json")),
                               folders[name])]


def read_task(data, name, lang, limit):
    """The Records of a task in a language; `answer` is the list of gold answers."""
    own, golds = (task_folder(Path(data, name), kind) / f"{lang}.json" for kind in ("split", "ans"))
    english = own.parent.with_name(own.parent.name + "_en") / own.name
    if not english.parent.is_dir():
        english = own.with_name("en.json")
    records, gold_values = read_records(own), read_json_lines(golds)
    versions = read_records(english) if english.exists() else [None] * len(records)
    for file, found in ((golds, gold_values), (english, versions)):
        if len(found) != len(records):
            raise UserError(f"{file}: has {len(found)} items, {own} has {len(records)}; copy both again")
    items, options = [], [*OPTIONS.get(name, "")]
    for record, version, (where, value) in list(zip(records, versions, gold_values, strict=True))[:limit]:
        gold = value if isinstance(value, list) else [value]  # one answer, or all that are right
        if not gold or not all(isinstance(g, str) and (g in options if options else g.strip()) for g in gold):
            expected = "one of " + ", ".join(options) if options else "a text or a list of texts"
            raise UserError(f"{where}: gold answer is {value!r}, expected {expected}; correct the file")
        items.append(record._replace(english=version and version.prompt, answer=gold))
    return items


# --------------------------------------------------------------------------------------------- answering

def shorten(text, tokenizer, room):
    """The text, cut from the middle until its prompt has at most `room` tokens."""
    if len(tokenizer.prompt(text)) <= room:
        return text
    low, high = 0, len(text) // 2  # characters kept at either end; low fits
    while high - low > 1:
        middle = (low + high) // 2
        fits = len(tokenizer.prompt(text[:middle] + text[-middle:])) <= room
        low, high = (middle, high) if fits else (low, middle)
    return text[:low] + text[len(text) - low:]


def option_forms(item, task, tokenizer):
    """{option: ids of each answer that gives it}: "B", "(B) text" and "text", end of turn included."""
    forms = {option: [option] for option in OPTIONS[task]}
    for option, text in option_texts(item.prompt, OPTIONS[task]).items():
        forms[option] += [f"({option}) {text}", text] if text != option else [f"({option}) {text}"]
    return {option: [tokenizer.answer(form) for form in found] for option, found in forms.items()}


def encode(engine, task, items, max_new_tokens):
    """The Prompts of a task in one language, and its items, shortened to leave room for an answer."""
    tokenizer, prompts, fitting = engine.tokenizer, [], []
    for number, item in enumerate(items):
        forms = option_forms(item, task, tokenizer) if task in OPTIONS else {}
        longest = max([max_new_tokens, *(len(form) for found in forms.values() for form in found)])
        room = engine.config.max_length - longest
        if room < len(tokenizer.prompt("")) + 16:
            raise UserError(f"--max_new_tokens: answers of {longest} tokens leave no room for a prompt in "
                            f"the model's {engine.config.max_length}; lower it, or leave out {task}")
        item = item._replace(prompt=shorten(item.prompt, tokenizer, room))
        if engine.connection == "english":
            item = item._replace(english=shorten(item.english, tokenizer, room))
        fitting.append(item)
        prompts.append(replace(engine.encode(item, number), forms=forms))
    return prompts, fitting


def model_digest(folder):
    """A hash of a checkpoint folder: small files by content, weight files by name, size and time."""
    small = [Path(folder) / name for name in ("config.json", *TOKENIZER_FILES, CCTUNING_FILE)]
    weights = [(path.name, path.stat()) for path in sorted(weight_files(folder))]
    return digest(([(path.name, sha256_of(path)) for path in small if path.exists()],
                   [(name, stat.st_size, stat.st_mtime_ns) for name, stat in weights]))


def give_answers(engine, path, task, items, args, dist):
    """The rows of OUT/answers for a task in one language; those of the file at `path` if nothing has changed.

    Several processes share the prompts; all get the same rows.
    """
    max_new_tokens = args.max_new_tokens or MAX_NEW_TOKENS[task]
    prompts, fitting = encode(engine, task, items, max_new_tokens)
    texts, ids = [item.prompt for item in items], [(prompt.ids, prompt.english_ids) for prompt in prompts]
    model = model_digest(engine.folder)
    wanted = digest((model, engine.connection, engine.dtype, max_new_tokens, texts, ids))
    if not args.again and (rows := dist.on_rank0(read_answers, path, len(items), {"digest": wanted})):
        return rows
    with tqdm(total=math.ceil(len(prompts) / dist.world_size), desc=f"{task} {path.stem}", leave=False,
              disable=dist.rank > 0 or None) as progress:
        answers = engine.answer_all(prompts, args.batch_size, max_new_tokens, progress=progress,
                                    rank=dist.rank, world_size=dist.world_size)
    answers = [next(filter(None, of_ranks)) for of_ranks in zip(*dist.gather(answers), strict=True)]
    return [{"digest": wanted, "prompts": digest(texts), "item": n,
             "answer": engine.tokenizer.decode(answer.ids), "tokens": len(answer.ids),
             "truncated": len(answer.ids) >= max_new_tokens, "shortened": fitting[n] != items[n],
             "layer": answer.layer,
             "likelihood": {option: round(value, 4) for option, value in (answer.likelihood or {}).items()},
             "layers": engine.config.num_hidden_layers} for n, answer in enumerate(answers)]


def read_answers(path, count, expected):
    """The `count` rows of a file of answers, if all have the expected {key: value}; else None."""
    rows = [row for _, row in read_json_lines(path)] if path.exists() else []
    valid = all(isinstance(row, dict) and row.keys() >= ANSWER_KEYS and row.items() >= expected.items()
                for row in rows)
    return rows if valid and len(rows) == count else None


# ----------------------------------------------------------------------------------------------- scoring

UNSPACED = "".join("{}-{}".format(*(chr(int(end, 16)) for end in block.split("-")))
                   for block in LANGUAGE_TABLES["unspaced_scripts"]["ranges"])
POINT, MINUS = "\ue000", "\ue001"  # a number's point and sign, while punctuation is stripped


def normalize_text(text):
    """NFKC, ASCII digits, no zero-width characters."""
    text = unicodedata.normalize("NFKC", text)
    return "".join(str(unicodedata.decimal(c)) if c.isdecimal() else c for c in text
                   if unicodedata.category(c) != "Cf")


def any_of(words):
    """A pattern for any of some words; whole words in Latin, Greek and Cyrillic letters."""
    whole = [rf"\b{re.escape(word)}\b" if word.upper() != word.lower() else re.escape(word)
             for word in sorted(words, key=len, reverse=True)]
    return f"(?:{'|'.join(whole) or '(?!)'})"


def segment(text):
    """Words, or single characters in scripts written without spaces."""
    return re.findall(f"[{UNSPACED}]|[^\\s{UNSPACED}]+", text)


def answer_tokens(text, lang):
    """A short answer as SQuAD and MLQA compare it: lower case, no punctuation or articles, segmented."""
    text = normalize_text(text)
    if lang == "tr":
        text = text.replace("İ", "i").replace("I", "ı")
    text = text.lower()
    if lang == "fr":
        text = re.sub(r"\b([ld])['’]", "", text)
    text = "".join(c for c in text if unicodedata.category(c)[0] != "P" and c not in string.punctuation)
    if lang == "ar":
        text = re.sub(r"\bال", "", text)
    articles = LANGUAGE_TABLES["articles"].get(lang, "").split()
    return [token for token in segment(text) if token not in articles]


def plain_numbers(text, lang):
    """The text with each number as sign, digits and decimal point: no thousands marks, no ".0" at the end.

    Languages with a decimal comma may also use a decimal point.
    """
    comma = lang in LANGUAGE_TABLES["decimal_comma"]["languages"].split()
    thousands, point = ("[. ]", "[.,]") if comma else (",", "[.]")
    number = (rf"((?<!\S)[-−])?(?<!\d)(?<!\d[.,])([1-9]\d{{0,2}}(?:{thousands}\d{{3}})+|\d+)"
              rf"(?:{point}(\d+))?(?![.,]?\d)")  # sign, whole part, decimals; not 1.2.3

    def plain(match):
        sign, whole, decimals = match.groups("")
        decimals = decimals.rstrip("0")
        return MINUS * bool(sign) + re.sub(r"\D", "", whole) + POINT * bool(decimals) + decimals

    return re.sub(number, plain, normalize_text(text).replace("٫", ".").replace("٬", ","))


def iso_dates(text, lang):
    """The text with dates as the language writes them in ISO form: 2019-06-30, or 2019-06 without a day."""
    numbers = {name.casefold(): n for n, names in enumerate(LANGUAGE_TABLES["months"].get(lang, ()), 1)
               for name in names.split("|")}
    month = rf"\b(?P<m>{any_of(numbers)})\b\.?(?:/{any_of(numbers)})?"
    day, year = r"\b(?P<d>\d{1,2})(?:st|nd|rd|th|o|\.)?", r"(?P<y>\d{4})(?!\d)"
    link = r"[\s,]*(?:(?:de|do|of|the|ngày|năm)\b)?[\s,]*"
    patterns = [rf"(?:{day}{link})?{month}{link}{year}", rf"{month}\s+{day}{link}{year}",
                r"(?P<y>\d{4})\s*[年년]\s*(?P<m>\d{1,2})\s*[月월](?:\s*(?P<d>\d{1,2})\s*[日日号號일])?"]
    if lang in LANGUAGE_TABLES["day_first"]["languages"].split():
        patterns.append(r"\b(?P<d>\d{1,2})([./])\s?(?P<m>\d{1,2})\2\s?(?P<y>\d{4})(?!\d)")

    def iso(match):
        found = match.groupdict()
        number = numbers.get(found["m"]) or int(found["m"])
        return f" {found['y']}-{number:02}" + (f"-{int(found['d']):02} " if found["d"] else " ")

    text = normalize_text(text).casefold()
    for pattern in patterns:
        text = re.sub(pattern, iso, text)
    return text


def is_date(gold):
    return bool(re.fullmatch(r"\d{4}-\d\d(-\d\d)?", gold))


def unreachable(golds, lang):
    """Are all golds dates, yes or no in a language whose words for them are not in data/languages.json?"""
    return all(is_date(g) and lang not in LANGUAGE_TABLES["months"]
               or g.casefold() in ("yes", "no") and lang not in LANGUAGE_TABLES["yes_no"] for g in golds)


def is_contained(answer, gold, lang):
    """Do the gold's words stand in the answer, side by side?

    The first word may have a prefix particle (ar; words of three letters or more), the last one a suffix
    particle (ko, tr, ru; two letters or more); digits have none. Apostrophes may separate words.
    """
    before, after = (LANGUAGE_TABLES["particles"][side].get(lang, "") for side in ("before", "after"))
    for apostrophe in ("(?!)", "['’ʼ`]"):
        found, words = (answer_tokens(re.sub(apostrophe, " ", text), lang) for text in (answer, gold))
        key = re.escape(" ".join(words))
        key = rf"(?<!\S)(?:(?:{before})(?=[^\d\s]{{3}}))?{key}(?:(?<=[^\d\s]{{2}})(?:{after}))?(?!\S)"
        if words and re.search(key, " ".join(found)):
            return True
    return False


def token_f1(answer, gold, lang):
    """The F1 of SQuAD and MLQA, but without the ".0" of whole numbers: MKQA writes 3 as 3.0."""
    whole = (re.sub(r"(?<![\d.,])(\d+)\.0(?![.,]?\d)", r"\1", text) for text in (answer, gold))
    found, wanted = (answer_tokens(text, lang) for text in whole)
    common = sum((Counter(found) & Counter(wanted)).values())
    return 2 * common / (len(found) + len(wanted)) if common else float(found == wanted)


def open_scores(answer, golds, lang):
    """{metric: 0 to 1, the best over the gold answers}: contained, exact match and token F1.

    Contained and exact also know numbers in other spellings and MKQA's ISO dates as its languages write them.
    Its "yes" and "no" are the language's words: contained is the answer's first word.
    """
    best = {"contained": 0.0, "exact": 0.0, "f1": 0.0}
    for gold in golds:
        if words := LANGUAGE_TABLES["yes_no"].get(lang, {}).get(gold.casefold(), "").split():
            first = rf"\W*(?:{'|'.join(words)})(?:\b|(?<=[{UNSPACED}]))"
            contained = bool(re.match(first, normalize_text(answer).lower()))
            exact = any(answer_tokens(answer, lang) == answer_tokens(word, lang) for word in words)
        else:
            given = plain_numbers(iso_dates(answer, lang) if is_date(gold) else answer, lang)
            wanted = plain_numbers(gold, lang)
            exact = answer_tokens(given, lang) == answer_tokens(wanted, lang)
            contained = exact or is_contained(given, wanted, lang)
        scores = {"contained": contained, "exact": exact, "f1": token_f1(answer, gold, lang)}
        best = {metric: max(best[metric], float(score)) for metric, score in scores.items()}
    return best


def summary_tokens(text):
    """Lower-case words, or characters of unspaced scripts; marks belong to letters, all else separates."""
    text = normalize_text(text).lower()
    return segment("".join(c if unicodedata.category(c)[0] in "LMN" else " " for c in text))


def rouge_l(answer, gold):
    """F1 of the longest common subsequence (ROUGE-L, Lin 2004)."""
    a, b = summary_tokens(answer), summary_tokens(gold)
    lengths = [0] * (len(b) + 1)
    for x in a:  # row of dynamic programming: lengths[j] is that of a up to x and b[:j]
        row = [0]
        for j, y in enumerate(b):
            row.append(lengths[j] + 1 if x == y else max(row[j], lengths[j + 1]))
        lengths = row
    return 2 * lengths[-1] / (len(a) + len(b)) if lengths[-1] else 0.0


# ------------------------------------------------------------------------------- which option is named

CHOICE = LANGUAGE_TABLES["choices"]
LATIN = "A-Za-zÀ-ÖØ-öø-ɏ\u0300-\u036fḀ-ỿ"
# What may stand before an option at the start of an answer, and after one that is set off.
OPENING = r"[\s(\[{<\"'*_`«“‘„「『（【>#-]*"
CLOSING = r"[ \t\"'*_`»”’」』]*(?:[.):,\]}>。۔、：】](?!\d)|\n|$)"
ELISION = rf"['’](?=\w)(?!(?:{LANGUAGE_TABLES['particles']['after']['tr']})\b)"  # C'est, and not C'dir
LETTERS = {local: letter for letter, others in CHOICE["letters"].items() for local in others.split()}


CUE = "|".join(map(re.escape, CHOICE["answer"]))
BECAUSE = any_of(CHOICE["because"])
OR = rf"[\W_]*{any_of(CHOICE['or'])}[\W_]*(?:\w{{2,}}[\W_]+)?"  # "A or possibly B"
NOT = rf"{any_of(CHOICE['not'])}\s*"  # before an option, with up to three words between: "not the option A"
NOT_MARK = rf"{NOT}(?:[A-D\d]{OR})*(?:(?!{any_of(CHOICE['but'])}|[A-D\d]\b)\w+\s+){{0,3}}[^\w\s]*$"
# after an option or its text: "is wrong", and not "is not wrong"
DENIED = rf"\s*{any_of(CHOICE['denied'])}(?!\s*{any_of(CHOICE['wrong'])})"


def option_texts(prompt, options):
    """{option: its text} from a prompt's lines "(1) text"; the last of each: questions may have some too."""
    lines = re.findall(rf"^\(([{options}])\)[ \t]*(.+)$", prompt, re.MULTILINE)
    return {option: text.strip() for option, text in lines}


def bare(text):
    """A text for comparison: one line, no case, no full stop at the end."""
    return " ".join(normalize_text(text).casefold().split()).strip(" .।。۔")


def is_option(letter, before, after, options):
    """Does a letter that stands alone in a text name an option?"""
    if letter.islower():  # in brackets, at the start or after "Answer:", "the answer is"
        led = re.search(rf"(?:^|:|(?:{CUE})\w*(?:\s+\w+){{0,2}}){OPENING}$", before, re.IGNORECASE)
        return after.startswith(")") or led and re.match(CLOSING, after)
    word = re.match(rf"[ \t]+([{LATIN}]+)", after)  # A may be an article at a sentence's start
    return (letter != "A" or not word or word[1].casefold() in CHOICE["after_a"]["words"].split()
            or not re.search(rf"(?:^|[.!?:;\n。।]){OPENING}$", before)
            or re.match(rf"{OR}[{options}](?![{LATIN}])", after))  # "A or B"


def find_marks(answer, options):
    """The options that stand alone in an answer, as matches, and the answer with these as capital letters."""
    before = rf"(?<![\d{LATIN}])(?<![\d{LATIN}][.,])(?<!\b[{LATIN}]\()"  # no word, U.S.A. or P(A)
    after = rf"(?![\d{LATIN}]|[.,]\d|{ELISION})"

    def mark(match):
        parts = match[0], match.string[:match.start()], match.string[match.end():]
        return match[0].upper() if is_option(*parts, options) else match[0].lower()

    if not options.isdigit():
        letters = r"[\u0620-\u065f\u0900-\u0963\u0980-\u09e3]+"  # Arabic, Devanagari, Bengali
        answer = re.sub(letters, lambda match: LETTERS.get(match[0], match[0]), answer)
        answer = re.sub(f"{before}[{options}{options.lower()}]{after}", mark, answer)
    return list(re.finditer(f"{before}[{options}]{after}", answer)), answer


def text_after(mark, answer, texts):
    """The options whose text follows a mark: the longest text, whole or cut short; else one much like it."""
    rest = bare(re.sub(r"^(?:[^\w\s\-−]|[-−–](?=\s)|\s)+", "", answer[mark.end():]))
    found = [(min(len(text), len(rest)), option) for option, text in texts
             if rest.startswith(text) or len(rest) >= 8 and text.startswith(rest)]
    return ([option for length, option in found if length == max(found)[0]]
            or [option for option, text in texts if rouge_l(rest, text) > 0.75])


def confirmed(mark, marks, answer, texts):
    """The option of a mark; None if another is named with it ("A or B", a list) or another's text follows."""
    followed, rest = text_after(mark, answer, texts), answer[mark.end():]
    if followed and mark[0] not in followed or re.search(r"\w.*\n\($", rest):
        return None
    other = next((m for m in marks if m.start() > mark.start() and m[0] != mark[0]), None)
    if other is None:
        return mark[0]
    between, set_off = answer[mark.end():other.start()], re.match(CLOSING, answer[other.end():])
    if set_off and re.search(rf"\w.*\n{OPENING}$", between):  # the next of a list
        return None
    for _, text in texts:
        between = re.sub(re.escape(text), "", between, flags=re.IGNORECASE)
    side_by_side = re.fullmatch(r"(?!\n\n)[\W_]*" if set_off else r"[^\w\n]*", between)
    return None if side_by_side or re.fullmatch(OR, between, re.IGNORECASE) else mark[0]


def find_text(answer, texts):
    """The only option whose text stands in an answer; its last word may have a suffix of three letters.

    Texts of fewer than four letters or digits, all Latin, only count at the answer's end.
    """
    words, found = f" {' '.join(summary_tokens(answer))} ", []
    for option, text in texts:
        key = " ".join(summary_tokens(text))
        if key.isascii() and len(key.replace(" ", "")) < 4:
            stands = f" {bare(answer)}".endswith(f" {text}")
        else:
            match = re.search(rf" {re.escape(key)}\w{{0,3}} ", words)
            stands = match and not re.search(rf"{NOT}(?:\w+\s+)?$", words[:match.start() + 1])
        if stands:
            found.append((option, key))
    longest = {option for option, key in found if not any(key in other for o, other in found if o != option)}
    return longest.pop() if len(longest) == 1 else None


def choice(answer, options, texts):
    """The option that an answer names; None if it names none or several. texts: {option: its text}.

    The first of these that applies:
    1. The whole answer is an option's text: "Neutral".
    2. An option stands beside the last "answer" or "choose", in any language: "The answer is B".
    3. An option is set off at the start: "1", "(B)", "2. since".
    4. Only one option stands alone: "I think B".
    5. Only one option's text stands in the answer: "It is neutral, I think".
    Options that the answer denies are left out ("not A but B", "A is wrong"). Digits of every script,
    full-width letters and the option letters of Arabic, Bengali and Hindi count as their ASCII forms.
    """
    texts = [(option, bare(text)) for option, text in texts.items() if bare(text)]
    words = {"123": CHOICE["entailment"], "12": CHOICE["first_or_second"]}.get(options, {})
    known = texts + [(option, word) for option, spellings in words.items() for word in spellings]
    said = re.split(r"[.!?。।,\n]", answer)[0] if options == "123" else answer  # "Neutral, for ..."
    whole = {option for option, text in known if text == bare(said)}
    if len(whole) == 1 and bare(said) not in options.casefold():
        return whole.pop()
    marks, answer = find_marks(normalize_text(answer).strip(), options)
    own = "|".join(re.escape(text) for _, text in texts)
    denied = rf"(?:(?:{OR}|[,、]\s*)[{options}])*[^\w\s,;:]*\s*(?:{own})?{DENIED}"  # "A, B and C are wrong"
    marks = [mark for mark in marks if not re.match(denied, answer[mark.end():], re.IGNORECASE)]
    kept = [mark for mark in marks if not re.search(NOT_MARK, answer[:mark.start()], re.IGNORECASE)]
    for cue in reversed(list(re.finditer(CUE, answer, re.IGNORECASE))):
        clause = re.match(rf"[\W_]*.*?(?=[.!?।]\s|[。\n]|{BECAUSE}|$)", answer[cue.end():], re.IGNORECASE)
        start = re.search(r"[^.!?。।\n]*$", answer[:cue.start()]).start()  # of the sentence
        after = [mark for mark in kept if cue.end() <= mark.start() < cue.end() + clause.end()]
        before = [mark for mark in kept if start <= mark.start() < cue.start()]  # "B is the answer"
        if after or len(before) == 1:
            return confirmed((after or before)[0], kept, answer, known)
        if named := find_text(clause[0], texts):
            return named
    if not marks:
        return find_text(answer, texts) or find_text(answer, known)
    before, after = answer[:marks[0].start()], answer[marks[0].end():]
    is_set_off = re.fullmatch(OPENING, before) and re.match(CLOSING, after)
    later = {mark[0] for mark in marks if kept and mark.start() >= kept[0].start()}
    return confirmed(kept[0], kept, answer, known) if is_set_off or len(later) == 1 else None


def score_row(task, lang, item, row):
    """A row of OUT/answers with its chosen option, gold answers, scores (0 to 1) and FLAGS."""
    text, golds, likelihood = row["answer"], item.answer, row["likelihood"]
    named, best = None, []
    if task in OPTIONS:
        named = choice(text, OPTIONS[task], option_texts(item.prompt, OPTIONS[task]))
        best = [option for option, value in likelihood.items() if value == max(likelihood.values())]
        scores = {"accuracy": float(named in golds),
                  "likelihood": sum(option in golds for option in best) / len(best)}  # ties share
    elif task == "XLSum":
        scores = {"rouge_l": max(rouge_l(text, gold) for gold in golds)}
    else:
        scores = open_scores(text, golds, lang)
        scores = {metric: scores[metric] for metric in METRICS[task]}
    return {**row, "choice": named, "likeliest": best, "gold": golds, "scores": scores,
            "unparsed": task in OPTIONS and named is None, "unreachable": unreachable(golds, lang)}


# -------------------------------------------------------------------------------------------- statistics

class BootstrapScore(NamedTuple):
    """A score, or a mean of scores, with resamples: the same for all columns, so differences are paired."""
    score: float
    resampled: np.ndarray  # (RESAMPLES,) scores of bootstrap samples of the items
    flipped: np.ndarray  # (PERMUTATIONS,) scores with random signs of the items
    wilson: list | None = None  # interval of a score whose items are all 0 or 1

    @classmethod
    def of(cls, values, task):
        """values: the items' scores.

        One seed per task: its languages contain the same items. With other resamples for each language, the
        interval of the mean would be too narrow.
        """
        interval, count = wilson(values) if {*values} <= {0, 1} else None, len(values)
        values, rng = np.array(values), np.random.default_rng(zlib.crc32(task.encode()))
        # in portions, for tasks with many items
        resampled = [values[rng.integers(count, size=(100, count))].mean(1) for _ in range(RESAMPLES // 100)]
        flipped = [rng.choice(np.array((-1, 1), "int8"), size=(100, count)) @ values / count
                   for _ in range(PERMUTATIONS // 100)]
        return cls(values.mean(), np.concatenate(resampled), np.concatenate(flipped), interval)

    @classmethod
    def mean(cls, scores):
        return cls(*(np.mean(found, axis=0) for found in list(zip(*scores, strict=True))[:3]))

    def summary(self, first):
        """Score and difference to the first column, their 95 % intervals, p of a permutation test."""
        interval, of_difference = (np.percentile(found, (2.5, 97.5)).tolist()
                                   for found in (self.resampled, self.resampled - first.resampled))
        difference = float(self.score - first.score)
        as_large = abs(self.flipped - first.flipped) >= abs(difference) - 1e-12
        return {"score": float(self.score), "interval": self.wilson or interval,
                "difference": difference, "difference_interval": of_difference,
                "p": float((1 + as_large.sum()) / (1 + PERMUTATIONS))}


def wilson(values):
    """The 95 % interval of a share, from values of 0 and 1 (Wilson 1927): not empty at 0 and at 1."""
    n, p, z = len(values), sum(values) / len(values), 1.96
    centre, spread = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return [max(0.0, (centre - spread) / (1 + z * z / n)), min(1.0, (centre + spread) / (1 + z * z / n))]


def with_means(scores):
    """[(task, language, {column: BootstrapScore})] with means, unweighted over languages, then over tasks.

    scores: {task: {language: {column: BootstrapScore}}}. After a task's languages come "mean" and, if it has
    English, "mean without en"; after the tasks those of "all". Likelihood counts as a task of its own, after
    the others and not in "all".
    """
    def mean(group):
        return {column: BootstrapScore.mean([columns[column] for columns in group])
                for column in group[0] if all(column in columns for columns in group)}

    found = {}
    for task, langs in sorted(scores.items(), key=lambda item: LIKELIHOOD in item[0]):
        found[task] = langs | {"mean": mean([*langs.values()])}
        if others := [columns for lang, columns in langs.items() if lang != "en"]:
            found[task]["mean without en"] = mean(others)
    known = dict.fromkeys(lang for langs in found.values() for lang in langs)
    groups = {lang: [langs[lang] for task, langs in found.items() if lang in langs and LIKELIHOOD not in task]
              for lang in known}
    found["all"] = {lang: mean(group) for lang, group in groups.items() if len(group) > 1}
    return [(task, lang, columns) for task, langs in found.items() for lang, columns in langs.items()
            if lang != "mean without en" or "en" in (known if task == "all" else langs)]


def holm(summaries):
    """Add "p_holm", p-values corrected for their number, to the comparisons of the tasks' means."""
    cells = [s for s in summaries if s["lang"].startswith("mean") and s["task"] != "all"
             and s["column"] != summaries[0]["column"]]
    largest = 0.0
    for rank, cell in enumerate(sorted(cells, key=lambda cell: cell["p"])):
        largest = cell["p_holm"] = max(largest, min(1.0, (len(cells) - rank) * cell["p"]))
    return summaries


# ----------------------------------------------------------------------------------------------- results

def table(head, rows):
    """A Markdown table."""
    lines = ["| " + " | ".join(row) + " |" for row in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def tables(cells, seconds, summaries):
    """Markdown: scores with intervals, means compared with the first column, what explains the scores.

    cells, summaries: "results" and "summaries" of results.json. seconds: {(task, column): seconds}.
    """
    columns = list(dict.fromkeys(cell["column"] for cell in cells))
    scores, comparisons, details = defaultdict(dict), [], defaultdict(dict)  # {(task, name): {column: text}}
    for s in summaries:
        score, low, high = (100 * x for x in (s["score"], *s["interval"]))
        scores[s["task"], s["lang"]][s["column"]] = f"{score:.1f} ({low:.1f}-{high:.1f})"
        if s["column"] != columns[0] and s["lang"].startswith("mean"):
            difference, low, high = (100 * x for x in (s["difference"], *s["difference_interval"]))
            comparisons.append([s["task"], s["lang"], s["column"], f"{difference:+.1f}",
                                f"{low:+.1f} to {high:+.1f}", f"{s['p']:.4f}",
                                f"{s['p_holm']:.4f}" if "p_holm" in s else ""])
    for (task, column), duration in seconds.items():
        group = [cell for cell in cells if (cell["task"], cell["column"]) == (task, column)]
        for what in group[0]["details"]:
            details[task, what][column] = f"{100 * np.mean([cell['details'][what] for cell in group]):.1f}"
        details[task, "items"][column] = str(sum(cell["items"] for cell in group))
        details[task, "seconds"][column] = f"{duration:.1f}"

    def by_column(head, found):
        rows = ([*row, *(texts.get(column, "") for column in columns)] for row, texts in found.items())
        return table([*head, *columns], rows)

    found = [by_column(["task", "language"], scores), by_column(["task", "mean of"], details)]
    if comparisons:
        head = ["task", "language", f"against {columns[0]}", "difference", "95 % interval", "p", "Holm's p"]
        found.insert(1, table(head, comparisons))
    return "\n\n".join(found)


def load_plot():
    """The function draw of data/plot.py."""
    try:
        return runpy.run_path(str(HERE / "data" / "plot.py"))["draw"]
    except ImportError:
        raise UserError("--plot: needs the matplotlib package; pip install matplotlib") from None


def commit():
    """The commit of this code; None where it or git is missing."""
    command = ["git", "-C", HERE, "log", "-1", "--format=%H"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
    except OSError:
        return None


class Results:
    """A cell per column (a model with one connection), task and language, and the tables made from them."""

    def __init__(self, args):
        self.cells, self.scores = [], {}  # scores: {task: {language: {column: BootstrapScore}}}
        self.seconds = Counter()  # {(task, column): seconds}, all languages together
        self.about = {
            "arguments": vars(args), "date": time.strftime("%Y-%m-%d %H:%M:%S"), "commit": commit(),
            "python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__,
            "models": {}}

    def add(self, column, task, lang, rows, seconds, **about):
        """Take over a column's scored answers to a task in one language. about: model and connection."""
        def mean(values):
            return sum(values) / len(rows)

        values = {metric: [row["scores"][metric] for row in rows] for metric in rows[0]["scores"]}
        for metric, name in ((METRICS[task][0], task), ("likelihood", task + LIKELIHOOD)):
            if metric in values:
                columns = self.scores.setdefault(name, {}).setdefault(lang, {})
                columns[column] = BootstrapScore.of(values[metric], task)
        self.seconds[task, column] += seconds
        details = {metric: mean(values[metric]) for metric in METRICS[task][1:]}
        if options := OPTIONS.get(task):
            golds = [mean(option in row["gold"] for row in rows) for option in options]
            details |= {"chance": sum(golds) / len(golds), "majority": max(golds)}
            details |= {f"picked {o}": mean(row["choice"] == o for row in rows) for o in options}
            details |= {f"likeliest {o}": mean(o in row["likeliest"] for row in rows) for o in options}
            details["unparsed"] = mean(row["unparsed"] for row in rows)
        details["truncated"] = mean(row["truncated"] for row in rows)
        layers = [row["layer"] for row in rows if row["layer"] is not None]
        self.cells.append({
            "column": column, **about, "task": task, "lang": lang, "items": len(rows),
            "scores": {metric: mean(found) for metric, found in values.items()}, "details": details,
            "layers": np.bincount(layers, minlength=rows[0]["layers"]).tolist() if layers else None,
            **{flag: sum(row[flag] for row in rows) for flag in FLAGS}})

    def write(self, out):
        """Write results.json and results.md."""
        first = self.cells[0]["column"]
        summaries = holm([{"task": task, "lang": lang, "column": column, **score.summary(columns[first])}
                          for task, lang, columns in with_means(self.scores)
                          for column, score in columns.items()])
        everything = {**self.about, "results": self.cells, "summaries": summaries,
                      "seconds": [[*of, seconds] for of, seconds in self.seconds.items()]}
        write_text(out / "results.json", json.dumps(everything, indent=1))
        write_text(out / "results.md", tables(self.cells, self.seconds, summaries) + "\n")

    def notices(self):
        """What a reader of the tables must know, line by line."""
        for flag, meaning in FLAGS.items():
            for column in dict.fromkeys(cell["column"] for cell in self.cells):
                if count := sum(cell[flag] for cell in self.cells if cell["column"] == column):
                    yield f"{column}: {count} {meaning}"
        for task in dict.fromkeys(cell["task"] for cell in self.cells):
            if len({cell["items"] for cell in self.cells if cell["task"] == task}) > 1:
                yield (f"{task}: languages differ in their number of items; the intervals of its means "
                       "assume that item n is the same in every language")
        yield "intervals and p-values are over items: they do not include the variation over training seeds"
        if any(cell["task"] in OPTIONS for cell in self.cells):
            yield "untuned models favour some options whatever is asked: see the rows 'picked'"


# -------------------------------------------------------------------------------------------------- main

def evaluate(engine, column, folder, todo, args, dist, results, **about):
    """Answer (without an engine: read the answers to) and score all tasks for a column of the results."""
    for task, lang, items in todo:
        start, path = time.time(), folder / task / f"{lang}.jsonl"
        prompts = [{"item": n, "instruction": item.prompt} for n, item in enumerate(items)]
        if engine:
            rows = give_answers(engine, path, task, items, args, dist)
        else:
            texts = digest([item.prompt for item in items])
            rows = read_answers(path, len(items), {"prompts": texts})
            if rows is None:
                raise UserError(f"{path}: does not hold answers to these {len(items)} prompts; answer "
                                "without --rescore")
        rows = [score_row(task, lang, item, row) for item, row in zip(items, rows, strict=True)]
        results.add(column, task, lang, rows, round(time.time() - start, 1), **about)
        dist.on_rank0(write_json_lines, path, rows)
        dist.on_rank0(write_json_lines, Path(args.out) / "prompts" / task / f"{lang}.jsonl", prompts)
        dist.on_rank0(results.write, Path(args.out))
        if not sys.stderr.isatty():
            metric, score = next(iter(results.cells[-1]["scores"].items()))
            dist.print0(f"{column}: {task} {lang}: {metric} {100 * score:.1f}, {len(rows)} items, "
                        f"{time.time() - start:.0f} s", file=sys.stderr)


def open_columns(model, folder, args, results, dist):
    """Yield (connection, engine) for each requested connection of a model.

    folder: its answers, without the connection.  --rescore: connections with answers; engine None.
    """
    if args.rescore:
        yield from ((c, None) for c in args.connection if Path(f"{folder}_{c}").is_dir())
        return
    engine = dist.together(Engine, model, "none", args.template, args.dtype)
    results.about["models"][model] = {"template": engine.tokenizer.template, "dtype": str(engine.dtype),
                                      "device": engine.device.type}
    problems = {connection: engine.lacks(connection) for connection in args.connection or ()}
    engine.notices += [f"{model}: {problem}; --connection {connection} is left out"
                       for connection, problem in problems.items() if problem]
    for connection in [c for c, problem in problems.items() if not problem] or [None]:
        engine.connect(connection)
        yield engine.connection, engine
    for notice in engine.notices:
        dist.print0(notice, file=sys.stderr)


def main():
    args = parse_args()
    out, results = Path(args.out), Results(args)
    check_writable(out)
    args.model = args.model or [default_model()]
    args.connection = args.connection and list(dict.fromkeys(args.connection))
    if len({Path(model).resolve() for model in args.model}) < len(args.model):
        raise UserError("--model: a folder is named twice; name each once")
    todo = [(task, lang, read_task(args.data, task, lang, args.limit))
            for task, lang in find_tasks(args.data, args.tasks, args.langs)]
    if args.rescore:
        args.connection = args.connection or ["matrix", "english", "none"]
    else:  # check all before the first long work
        for model in args.model:
            Tokenizer(model, Config.read(model), args.template)
            weight_files(model)
        for task, lang, items in todo if "english" in (args.connection or ()) else ():
            for item in items:
                if not item.english:
                    raise UserError(f"{item.where}: --connection english needs the prompt's English version; "
                                    f"add it, or leave out {task} in {lang}")
    if args.plot:
        check_writable(args.plot)
        load_plot()
    with Dist.start("gloo") as dist:  # gloo: only answers are exchanged, each process has the whole model
        for model in args.model:
            name = relative(model)
            name = str(Path(model).resolve()) if name.startswith("..") else name  # no hidden folder
            folder = out / "answers" / quote(name, safe="")
            for connection, engine in open_columns(model, folder, args, results, dist):
                names = [name for name, given in ((model, args.model), (connection, args.connection or ()))
                         if len(given) > 1]  # what several columns differ in
                evaluate(engine, ", ".join(names) or model, Path(f"{folder}_{connection}"), todo,
                         args, dist, results, model=model, connection=connection)
                del engine  # before the next model is loaded
        if not results.cells:
            raise UserError(f"{out}/answers: has none of {', '.join(args.model)}; answer without --rescore")
        if dist.rank == 0:
            dist.print0("\n".join([*results.notices(), ""]))
            dist.print0(f"scores in per cent (95 % intervals)\n\n{read_text(out / 'results.md')}")
            if args.plot:
                load_plot()(Path(args.plot), read_json(out / "results.json"))
            dist.print0(f"results and answers are in {out}")


if __name__ == "__main__":
    run_script(main)
