"""Score checkpoints on multilingual benchmarks, answered by infer.py's engine.

    python eval.py                                            # held-out questions of the embedded default
    python eval.py --model DIR [DIR ...] --data BENCHMARKS [--tasks XNLI,MMMLU] [--langs sw,hi] [--limit 50]
    python eval.py ... --connection matrix english none       # each of the three, side by side
    torchrun --nproc_per_node 8 eval.py ...                   # the same answers, prompts spread over 8 processes

BENCHMARKS has the layout of the paper's repository: TASK/split or split_sample/LANG.json with the prompts and TASK/ans
or ans_sample/LANG.json with the gold answers, a JSON value per line. The English version of a prompt is the same line
of the task's en.json, or of split_en/LANG.json (split_sample_en/LANG.json) where the task has that folder.

    task                    score, 0 to 100
    XNLI XStoryCloze MMMLU  accuracy: the option that the answer names is the gold one
    XQuAD MKQA              the answer contains a gold one; beside it exact match and token F1
    XLSum                   ROUGE-L
    any other               exact match; beside it whether it contains a gold one, and token F1

Scores come with 95 % bootstrap intervals; means weigh languages alike, and the overall mean tasks alike. Each further
model or connection is compared with the first on the same items, by a paired sign-flip permutation test.
"""
import argparse
import importlib.util
import json
import math
import os
import re
import string
import sys
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from infer import DATA, WHICH_MODEL, Engine, add_engine_options, default_model, write_lines
from model import (Config, Help, Tokenizer, UserError, at_least, check_folder, instruction, read_json_lines, run_script,
                   weight_files, write_text)

OPTIONS = {"XNLI": "123", "XStoryCloze": "12", "MMMLU": "ABCD"}  # to choose from; other tasks are answered freely
METRICS = {**dict.fromkeys(OPTIONS, ("accuracy",)), "XLSum": ("rouge_l",),
           **dict.fromkeys(("XQuAD", "MKQA"), ("contained", "exact", "f1"))}
DEFAULT_METRICS = ("exact", "contained", "f1")  # the first is the task's score
RESAMPLES, PERMUTATIONS = 1000, 10000


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    add = parser.add_argument
    add("--model", nargs="+", metavar="DIR", help=f"checkpoint folders, to compare (default: {WHICH_MODEL})")
    add("--data", default=str(DATA / "test"), metavar="DIR", help="folder of benchmarks (default: the embedded "
        "data/test)")
    add("--tasks", metavar="TASK,...", help="folders of --data (default: all that have prompts)")
    add("--langs", metavar="CODE,...", help="languages (default: all that a task has)")
    add("--limit", type=at_least(1), metavar="N", help="only the first N items of each language")
    add("--out", default="out/eval", metavar="DIR", help="folder for results.json, results.md and the answers")
    add("--plot", metavar="DIR", help="folder for scores.png and layers.png (needs matplotlib)")
    add_engine_options(parser, connections="+")
    parser.set_defaults(max_new_tokens=32)
    return parser.parse_args(argv)


# --------------------------------------------------------------------------------------------------------- benchmarks

def task_folder(task, kind):
    """The folder of a task's prompts (kind "split") or gold answers ("ans"), whole or sampled; None for neither."""
    return next((task / name for name in (kind, f"{kind}_sample") if (task / name).is_dir()), None)


def find_tasks(data, tasks, langs):
    """[(task, language)] to run, from comma-separated names or, where those are None, from what is there."""
    data = Path(data)
    known = sorted(path.name for path in data.iterdir() if task_folder(path, "split")) if data.is_dir() else []
    if not known:
        raise UserError(f"{data}: has no folder TASK/split or TASK/split_sample; give the benchmarks folder as --data")
    found = []
    for name in tasks.split(",") if tasks else known:
        if name not in known:
            raise UserError(f"--tasks: unknown task {name!r}; {data} has {', '.join(known)}")
        if task_folder(data / name, "ans") is None:
            raise UserError(f"{data / name}: has no folder ans or ans_sample; get the whole benchmark")
        has = sorted(path.stem for path in task_folder(data / name, "split").glob("*.json"))
        for lang in langs.split(",") if langs else has:
            if lang not in has:
                raise UserError(f"--langs: {name} has no language {lang!r}; it has {', '.join(has)}")
            found.append((name, lang))
    return found


def read_task(data, name, lang, limit):
    """[(prompt, its English version or None, gold answers, file:line)] of a task in a language."""
    task = Path(data) / name
    prompts = task_folder(task, "split")
    english = prompts.with_name(prompts.name + "_en") / f"{lang}.json"
    if not english.parent.is_dir():
        english = prompts / "en.json"
    files = [prompts / f"{lang}.json", english, task_folder(task, "ans") / f"{lang}.json"]
    lines = [read_json_lines(file) if file.exists() or file != english else None for file in files]
    for file, found in zip(files, lines, strict=True):
        if found and len(found) != len(lines[0]):
            raise UserError(f"{file}: has {len(found)} items, {files[0]} has {len(lines[0])}; get the whole benchmark")
    items, options = [], OPTIONS.get(name)
    for i, (line, record) in enumerate(lines[0][:limit]):
        gold_line, gold = lines[2][i]
        gold = gold if isinstance(gold, list) else [gold]  # one answer, or all that are right
        if not gold or not all(isinstance(g, str) and g.strip() and (not options or g in [*options]) for g in gold):
            expected = "one of " + ", ".join(options) if options else "a text or a list of texts"
            raise UserError(f"{files[2]}:{gold_line}: gold answer is {lines[2][i][1]!r}, expected {expected}; restore "
                            "the file")
        version = lines[1] and instruction(lines[1][i][1], f"{files[1]}:{lines[1][i][0]}")
        items.append((instruction(record, f"{files[0]}:{line}"), version, gold, f"{files[0]}:{line}"))
    return items


# ---------------------------------------------------------------------------------------------------------- answering

def shorten(text, tokenizer, room):
    """The text, without so much of its middle that its prompt has at most `room` tokens."""
    if len(tokenizer.prompt(text)) <= room:
        return text
    low, high = 0, len(text) // 2  # characters kept at either end: low fits
    while high - low > 1:
        middle = (low + high) // 2
        fits = len(tokenizer.prompt(text[:middle] + text[-middle:])) <= room
        low, high = (middle, high) if fits else (low, middle)
    return text[:low] + text[len(text) - low:]


def encode(engine, args, lang, items):
    """The Prompts of a task in one language, and how many had to be shortened to leave room for an answer."""
    room, shortened, prompts = engine.config.max_length - args.max_new_tokens, 0, []
    if room < len(engine.tokenizer.prompt("")) + 16:
        raise UserError(f"--max_new_tokens: {args.max_new_tokens} leaves no room for a prompt in the model's "
                        f"{engine.config.max_length}; lower it")
    for number, (own, english, _, where) in enumerate(items):
        english = english if engine.connection == "english" else None
        texts = [text and shorten(text, engine.tokenizer, room) for text in (own, english)]
        shortened += texts != [own, english]
        prompts.append(engine.prompt(*texts, lang, number, where))
    return prompts, shortened


def answer(engine, args, prompts, rank, world, what):
    """The Answers to a task's prompts, every process giving some; the same list on all."""
    with tqdm(total=math.ceil(len(prompts) / world), desc=what, leave=False, disable=rank > 0 or None) as progress:
        options = args.batch_size, args.max_new_tokens
        shares = [engine.answer_all(prompts, *options, progress=progress, rank=rank, world=world)]
    if world > 1:
        given, shares = shares[0], [None] * world
        dist.all_gather_object(shares, given)
    return [next(answer for answer in given if answer) for given in zip(*shares, strict=True)]


# ------------------------------------------------------------------------------------------------------------ scoring

ARTICLES = {  # as in the scorers of SQuAD and MLQA (arXiv 1910.07475)
    "en": "a an the", "es": "un una unos unas el la los las", "vi": "của là cái chiếc những",
    "de": "ein eine einen einem eines einer der die das den dem des", "fr": "le la l les du de d des un une", "eu": "",
    "pt": "o a os as um uma uns umas", "el": "ο η το οι τα του της των τον την ένας μια ένα"}
UNSPACED = ("\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
            "\U00020000-\U0003ffff")  # scripts without spaces between words: Thai to Han
OPENING, CLOSING = r"[\s(\[{<\"'*_`«“‘„「『（【]*", r"[\s\"'*_`»”’」』]*(?:[.):,\]}>।。、：】](?!\d)|$)"


def even(text):
    """Compatibility forms, ASCII digits for those of every script, no invisible characters."""
    text = unicodedata.normalize("NFKC", text)
    return "".join(str(unicodedata.decimal(c)) if c.isdecimal() else c for c in text if unicodedata.category(c) != "Cf")


def segment(text):
    """Words where words are spaced; single characters of scripts that are written without spaces."""
    return re.findall(f"[{UNSPACED}]|[^\\s{UNSPACED}]+", text)


def answer_tokens(text, lang):
    """A short answer as SQuAD and MLQA compare it: lower case, no punctuation or articles, segmented."""
    text = even(text)
    if lang == "tr":
        text = text.replace("İ", "i").replace("I", "ı")
    text = text.lower()
    if lang == "fr":
        text = re.sub(r"\b([ld])['’]", "", text)
    text = "".join(c for c in text if not (unicodedata.category(c).startswith("P") or c in string.punctuation))
    if lang == "ar":
        text = re.sub(r"\bال", "", text)
    return [token for token in segment(text) if token not in ARTICLES.get(lang, "").split()]


def open_scores(answer, golds, lang):
    """{metric: the best that any of the gold answers gives}: contained, exact match and token F1, each 0 to 1."""
    found, best = answer_tokens(answer, lang), {"contained": 0.0, "exact": 0.0, "f1": 0.0}
    for gold in golds:
        gold = answer_tokens(re.sub(r"^(\d+)\.0$", r"\1", gold), lang)  # MKQA writes whole numbers so
        common = sum((Counter(found) & Counter(gold)).values())
        held = bool(gold) and any(found[i:i + len(gold)] == gold for i in range(len(found) - len(gold) + 1))
        f1 = 2 * common / (len(found) + len(gold)) if common else float(found == gold)
        for metric, value in (("contained", held), ("exact", found == gold), ("f1", f1)):
            best[metric] = max(best[metric], float(value))
    return best


def summary_tokens(text):
    """Lower-case words, or characters of unspaced scripts; marks belong to their letters, all else separates."""
    text = even(text).lower()
    return segment("".join(c if unicodedata.category(c)[0] in "LMN" else " " for c in text))


def rouge_l(answer, gold):
    """F1 of the longest common subsequence (ROUGE-L, Lin 2004)."""
    a, b = summary_tokens(answer), summary_tokens(gold)
    lengths = [0] * (len(b) + 1)  # of the longest common to a so far and each beginning of b
    for x in a:
        row = [0]
        for j, y in enumerate(b):
            row.append(lengths[j] + 1 if x == y else max(row[j], lengths[j + 1]))
        lengths = row
    return 2 * lengths[-1] / (len(a) + len(b)) if lengths[-1] else 0.0


def option_texts(prompt, options):
    """{option: its text} of the lines "(1) text" of a prompt; the last of each, should the question have such too."""
    lines = re.findall(rf"^\(([{options}])\)[ \t]*(.+)$", prompt, re.MULTILINE)
    return {option: text.strip() for option, text in lines}


def choice(answer, options, texts):
    """The option that an answer names, or None where it names none or more than one; texts: {option: its text}.

    In turn: the option whose text the whole answer is; an option at the start that is set off ("1", "(B)", "2. since"),
    unless another's text follows it; the only one that stands by itself; the only one whose text the answer repeats.
    Digits of every script and full-width letters count as their ASCII forms.
    """
    def bare(text):
        return even(text).strip(" \n.।。۔").casefold()

    whole = [option for option, text in texts.items() if bare(text) == bare(answer)]
    if len(whole) == 1 and bare(answer) not in options.casefold():
        return whole[0]
    answer, letters = even(answer).strip(), not options[0].isdigit()
    given = options + options.lower() if letters else options
    alone = r"(?<![\dA-Za-z.,])[%s](?![\dA-Za-z]|[.,]\d)"  # no part of a number or a Latin word
    bracketed = {found.upper() for found in re.findall(rf"(?<![\dA-Za-z])([{given}])\)", answer)}
    pairs = re.findall(rf"({alone % given})\W+(?:[^\W\d_]+\W+)?({alone % given})", answer)
    if len(bracketed) > 1 or any(a.upper() != b.upper() for a, b in pairs):  # "(1) (2)", "1 or 2"
        return None
    if match := re.match(f"{OPENING}([{given}]){CLOSING}", answer):
        named, rest = match.group(1).upper(), summary_tokens(answer[match.end():].strip().split("\n")[0])
        tokens = {option: summary_tokens(text) for option, text in texts.items()}
        follow = [option for option, words in tokens.items() if words and rest[:len(words)] == words]
        return named if not follow or max(follow, key=lambda option: len(texts[option])) == named else None
    named = bracketed or set(re.findall(alone % options, answer))
    article = not re.search(r"(?<![A-Za-z])A(?![A-Za-z]|[ \t]+[A-Za-zÀ-ɏḀ-ỿ])", answer)  # only before Latin words
    if letters and article and "A" not in bracketed:
        named -= {"A"}
    if named:
        return named.pop() if len(named) == 1 else None
    words = f" {' '.join(summary_tokens(answer))} "
    repeated = [option for option, text in texts.items() if (t := " ".join(summary_tokens(text))) and f" {t} " in words]
    longest = [o for o in repeated if not any(o != other and texts[o] in texts[other] for other in repeated)]
    return longest[0] if len(longest) == 1 else None


def score_item(task, lang, prompt, answer, golds):
    """({metric: 0 to 1}, the option that the answer names, None where it names none or the task has no options)."""
    if task in OPTIONS:
        named = choice(answer, OPTIONS[task], option_texts(prompt, OPTIONS[task]))
        return {"accuracy": float(named in golds)}, named
    if task == "XLSum":
        return {"rouge_l": max(rouge_l(answer, gold) for gold in golds)}, None
    scores = open_scores(answer, golds, lang)
    return {metric: scores[metric] for metric in METRICS.get(task, DEFAULT_METRICS)}, None


def score(engine, task, lang, items, answers):
    """The scored answers to a task in one language."""
    rows = []
    for (own, _, gold, _), answer in zip(items, answers, strict=True):
        text = engine.tokenizer.decode(answer.ids)
        scores, named = score_item(task, lang, own, text, gold)
        rows.append({"instruction": own, "answer": text, "choice": named, "gold": gold, "scores": scores,
                     "layer": answer.layer})
    return rows


# --------------------------------------------------------------------------------------------------------- statistics

class Cell:
    """The score of a column on a task in a language, with what its uncertainty takes; Cell.mean averages cells."""

    def __init__(self, values, first, number):
        """values: the items' scores; first: those of the first column; number: seeds the draws.

        The number is the task's, for its items are the same questions in every language: drawn apart, translations
        would count as independent and a mean's interval come out too narrow.
        """
        values, count = np.array(values), len(values)
        differences = values - np.array(first)
        self.score, self.difference = values.mean(), differences.mean()
        rng = np.random.default_rng(number)  # in portions, for tasks of many items
        draws = (rng.integers(count, size=(100, count)) for _ in range(RESAMPLES // 100))
        self.resampled = np.concatenate([values[portion].mean(1) for portion in draws])  # bootstrap over items
        signs = (rng.choice(np.array((-1, 1), "int8"), size=(100, count)) for _ in range(PERMUTATIONS // 100))
        self.flipped = np.concatenate([portion @ differences / count for portion in signs])  # were the columns alike

    @classmethod
    def mean(cls, cells):
        mean = cls.__new__(cls)
        for name in ("score", "difference", "resampled", "flipped"):
            setattr(mean, name, np.mean([getattr(cell, name) for cell in cells], axis=0))
        return mean

    def summary(self):
        """Score, 95 % interval, difference to the first column and its two-sided p-value."""
        low, high = np.percentile(self.resampled, (2.5, 97.5))
        p = (1 + (abs(self.flipped) >= abs(self.difference) - 1e-12).sum()) / (1 + PERMUTATIONS)
        return {"score": float(self.score), "interval": [float(low), float(high)],
                "difference": float(self.difference), "p": float(p)}


def compare(answered):
    """{(task, lang): a Cell per column} from the scored answers {(task, lang): rows} of each column."""
    cells, tasks = {}, list(dict.fromkeys(task for task, _ in answered[0]))
    for task, lang in answered[0]:
        metric = METRICS.get(task, DEFAULT_METRICS)[0]
        values = [[row["scores"][metric] for row in found[task, lang]] for found in answered]
        cells[task, lang] = [Cell(column, values[0], tasks.index(task)) for column in values]
    return cells


def averages(cells):
    """[(task, language, summary of each column)] from cells {(task, lang): a Cell per column}.

    After a task's languages come "mean" and, where it has English, "mean without en"; after the tasks, those of "all".
    """
    def mean(group):
        return [Cell.mean(column) for column in zip(*group, strict=True)]

    found, english = {}, {task for task, lang in cells if lang == "en"}
    for task in dict.fromkeys(task for task, _ in cells):
        langs = {lang: columns for (t, lang), columns in cells.items() if t == task}
        found.update({(task, lang): columns for lang, columns in langs.items()})
        found[task, "mean"] = mean(langs.values())
        if others := [columns for lang, columns in langs.items() if lang != "en"]:
            found[task, "mean without en"] = mean(others)
    if len({task for task, _ in cells}) > 1:
        for lang in dict.fromkeys(lang for _, lang in found):
            group = [columns for (_, found_lang), columns in found.items() if found_lang == lang]
            if len(group) > 1:
                found["all", lang] = mean(group)
    return [(task, lang, [cell.summary() for cell in columns]) for (task, lang), columns in found.items()
            if lang != "mean without en" or (english if task == "all" else task in english)]


# ------------------------------------------------------------------------------------------------------------ results

def table(rows, columns):
    """Markdown: scores in per cent with their intervals, a row per task and language; then the comparisons."""
    lines = ["| task | language | " + " | ".join(columns) + " |", "|---|---|" + "---|" * len(columns)]
    for task, lang, cells in rows:
        numbers = ([100 * x for x in (cell["score"], *cell["interval"])] for cell in cells)
        lines.append(f"| {task} | {lang} | " + " | ".join("{:.1f} ({:.1f}-{:.1f})".format(*n) for n in numbers) + " |")
    if len(columns) > 1:
        lines += ["", f"| task | language | against {columns[0]} | difference | p |", "|---|---|---|---|---|"]
        lines += [f"| {task} | {lang} | {column} | {100 * cell['difference']:+.1f} | {cell['p']:.4f} |"
                  for task, lang, cells in rows if lang.startswith("mean")
                  for column, cell in list(zip(columns, cells, strict=True))[1:]]
    return "\n".join(lines)


def beside(results, columns):
    """Markdown lines: the further metrics of tasks that have them, mean of the languages; empty where no task has."""
    lines = []
    for task in dict.fromkeys(r["task"] for r in results):
        for metric in METRICS.get(task, DEFAULT_METRICS)[1:]:
            scores = [[r["scores"][metric] for r in results if (r["task"], r["column"]) == (task, column)]
                      for column in columns]
            lines.append(f"| {task} | {metric} | " + " | ".join(f"{100 * np.mean(s):.1f}" for s in scores) + " |")
    head = ["", "| task | mean of | " + " | ".join(columns) + " |", "|---|---|" + "---|" * len(columns)]
    return head + lines if lines else []


def plot(folder, rows, columns, layers):
    """scores.png: score per language of each column, with intervals; layers.png: share of each chosen layer."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    Path(folder).mkdir(parents=True, exist_ok=True)

    def panels(count):
        return plt.subplots(count, figsize=(9, 2.6 * count), squeeze=False, constrained_layout=True)

    tasks = [task for task in dict.fromkeys(task for task, _, _ in rows) if task != "all"]
    figure, axes_of = panels(len(tasks))
    for task, axes in zip(tasks, axes_of[:, 0], strict=True):
        shown = [(lang, cells) for t, lang, cells in rows if t == task and not lang.startswith("mean")]
        width = 0.8 / len(columns)
        for i, column in enumerate(columns):
            scores = np.array([[cells[i]["score"], *cells[i]["interval"]] for _, cells in shown]) * 100  # (langs, 3)
            axes.bar(np.arange(len(shown)) + width * i, scores[:, 0], width, label=column, error_kw={"linewidth": 0.8},
                     yerr=np.abs(scores[:, 1:] - scores[:, :1]).T)
        axes.set_xticks(np.arange(len(shown)) + 0.4 - width / 2, [lang for lang, _ in shown])
        axes.set_title(task, fontsize=9)
        axes.set_ylabel("%")
        axes.spines[["top", "right"]].set_visible(False)
    legend = axes_of[0, 0].get_legend_handles_labels()
    figure.legend(*legend, loc="outside upper center", ncols=3, fontsize=7, frameon=False)
    figure.savefig(Path(folder) / "scores.png", dpi=130)
    if layers:
        figure, axes_of = panels(len(layers))
        for (column, chosen), axes in zip(layers.items(), axes_of[:, 0], strict=True):
            count = 1 + max(max(found) for found in chosen.values())
            shares = [np.bincount(found, minlength=count) / len(found) for found in chosen.values()]  # (langs, layers)
            image = axes.imshow(np.array(shares).T, aspect="auto", origin="lower", vmin=0, vmax=1)
            axes.set_xticks(range(len(chosen)), list(chosen), fontsize=7, rotation=30)
            axes.set_ylabel("layer")
            axes.set_title(f"share of each chosen layer, {column}", fontsize=9)
            figure.colorbar(image, ax=axes)
        figure.savefig(Path(folder) / "layers.png", dpi=130)


# --------------------------------------------------------------------------------------------------------------- main

def main():
    args = parse_args()
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    say = print if rank == 0 else lambda *_, **__: None
    out = Path(args.out)
    check_folder(out)
    args.model = args.model or [default_model()]
    if len(set(args.model)) < len(args.model):
        raise UserError("--model: a folder is named twice; name each once")
    found = find_tasks(args.data, args.tasks, args.langs)
    todo = [(task, lang, read_task(args.data, task, lang, args.limit)) for task, lang in found]
    for model in args.model:  # what can be told without loading the weights, before any work is done
        Tokenizer(model, Config.read(model), args.template)
        weight_files(model)
    if args.plot and not importlib.util.find_spec("matplotlib"):
        raise UserError("--plot: needs the matplotlib package; pip install matplotlib")
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if world > 1:
        dist.init_process_group("gloo")  # for answers alone: each process has the whole model

    # A column is a model with one connection: its answers, written as they come, and their scores.
    columns, answered, results = [], [], []  # answered: {(task, lang): scored answers} of each column
    for model in args.model:
        engine = Engine(model, "none", args.matrix, args.template, args.dtype)
        asked = args.connection or [engine.default_connection()]
        for connection in [c for c in asked if engine.can_connect(c)] or [engine.default_connection()]:
            engine.connect(connection)
            name = ", ".join([model] * (len(args.model) > 1) + [connection] * (len(asked) > 1)) or model
            folder = re.sub(r"[^\w.-]+", "_", model.strip("/") + f" {connection}" * (len(asked) > 1))
            encoded = [encode(engine, args, lang, items) for _, lang, items in todo]
            columns.append(name)
            answered.append({})
            for (task, lang, items), (prompts, shortened) in zip(todo, encoded, strict=True):
                rows = score(engine, task, lang, items, answer(engine, args, prompts, rank, world, f"{task} {lang}"))
                answered[-1][task, lang] = rows
                scores = {m: sum(row["scores"][m] for row in rows) / len(rows) for m in rows[0]["scores"]}
                unparsed = sum(row["choice"] is None for row in rows) if task in OPTIONS else 0
                results.append({"column": name, "model": model, "connection": connection, "task": task, "lang": lang,
                                "items": len(rows), "scores": scores, "unparsed": unparsed, "shortened": shortened})
                if rank == 0:
                    write_lines(out / "answers" / folder / task / f"{lang}.jsonl", rows)
            for what, meaning in (("unparsed", "answers named no option, or several, and count as wrong"),
                                  ("shortened", "prompts were shortened to fit")):
                if count := sum(r[what] for r in results if r["column"] == name):
                    say(f"{name}: {count} {meaning}")
        for notice in engine.notices:
            say(notice, file=sys.stderr)
        del engine  # before the next model is loaded
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()
    if rank > 0:
        return

    rows = averages(compare(answered))
    markdown = "\n".join([table(rows, columns), *beside(results, columns)])
    summaries = [{"task": task, "lang": lang, "column": column, **cell}
                 for task, lang, cells in rows for column, cell in zip(columns, cells, strict=True)]
    everything = {"arguments": vars(args), "results": results, "summaries": summaries}
    write_text(out / "results.json", json.dumps(everything, indent=1))
    write_text(out / "results.md", markdown + "\n")
    if args.plot:
        layers = [{f"{task} {lang}": [item["layer"] for item in items] for (task, lang), items in found.items()}
                  for found in answered]
        connected = {column: chosen for column, chosen in zip(columns, layers, strict=True)
                     if None not in next(iter(chosen.values()))}
        plot(args.plot, rows, columns, connected)
    print(f"scores in per cent (95 % intervals)\n\n{markdown}\n\nresults and answers are in {out}")


if __name__ == "__main__":
    run_script(main, speak=os.environ.get("LOCAL_RANK", "0") == "0")
