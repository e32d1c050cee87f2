"""Score checkpoints on multilingual benchmarks, answered by infer.py's engine.

    python eval.py                                            # held-out questions of the embedded default
    python eval.py --model DIR [DIR ...] --data BENCHMARKS [--tasks XNLI,MMMLU] [--langs sw,hi] [--limit 50]
    python eval.py ... --connection matrix english none       # each of the three, side by side
    torchrun --nproc_per_node 8 eval.py ...                   # same answers, prompts spread over 8 processes

BENCHMARKS has the layout of the paper's repository: TASK/split or split_sample/LANG.json with the prompts and
TASK/ans or ans_sample/LANG.json with the gold answers, a JSON value per line. The English version of a prompt
is the same line of the task's en.json, or of split_en/LANG.json (split_sample_en/LANG.json) if the task has it.

    task                    score, 0 to 100
    XNLI XStoryCloze MMMLU  accuracy: the option that the answer names is the gold one
    XQuAD MKQA              contained: the answer contains a gold one; beside it exact match and token F1
    XLSum                   ROUGE-L
    any other               exact match; beside it contained and token F1

Scores have 95 % bootstrap intervals; means weigh languages alike, and the overall mean tasks alike. Each further
model or connection is compared with the first on the same items by a paired sign-flip permutation test.
"""
import argparse
import importlib.util
import json
import math
import re
import string
import sys
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
from tqdm import tqdm

from infer import WHICH_MODEL, Engine, add_engine_options, default_model, write_json_lines
from model import (DATA, Config, Help, Tokenizer, UserError, at_least, check_writable, read_json, read_json_lines,
                   read_records, relative, run_script, weight_files, write_text)
from train import Dist

OPTIONS = {"XNLI": "123", "XStoryCloze": "12", "MMMLU": "ABCD"}  # other tasks are answered freely
METRICS = {**dict.fromkeys(OPTIONS, ("accuracy",)), "XLSum": ("rouge_l",),
           **dict.fromkeys(("XQuAD", "MKQA"), ("contained", "exact", "f1"))}
DEFAULT_METRICS = ("exact", "contained", "f1")  # the first is the task's score
RESAMPLES, PERMUTATIONS = 1000, 10000
HERE = Path(__file__).resolve().parent
LANGUAGE_TABLES = read_json(HERE / "data" / "languages.json")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    add = parser.add_argument
    add("--model", nargs="+", metavar="DIR", help=f"checkpoint folders to compare (default: {WHICH_MODEL})")
    add("--data", default=relative(DATA / "test"), metavar="DIR", help="benchmarks (default: the embedded data/test)")
    add("--tasks", metavar="TASK,...", help="folders of --data (default: all)")
    add("--langs", metavar="CODE,...", help="languages (default: all that a task has)")
    add("--limit", type=at_least(1), metavar="N", help="only the first N items of each language")
    add("--out", default="out/eval", metavar="DIR", help="folder for results.json, results.md and answers")
    add("--plot", metavar="DIR", help="folder for scores.png and layers.png (needs matplotlib)")
    add_engine_options(parser, max_new_tokens=32, connections="+")
    return parser.parse_args(argv)


# -------------------------------------------------------------------------------------------- benchmarks

def task_folder(task, kind):
    """The folder of a task's prompts (kind "split") or gold answers ("ans"), whole or sampled; or None."""
    return next((task / name for name in (kind, f"{kind}_sample") if (task / name).is_dir()), None)


def find_tasks(data, tasks, langs):
    """[(task, language)] to run, from comma-separated names; None: all that is there."""
    data = Path(data)
    known = sorted(path.name for path in data.iterdir() if task_folder(path, "split")) if data.is_dir() else []
    if not known:
        raise UserError(f"{data}: has no folder TASK/split or TASK/split_sample; give a benchmarks folder as --data")
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
    """The Records of a task in a language; `answer` is the list of gold answers."""
    task = Path(data) / name
    prompts = task_folder(task, "split")
    english_folder = prompts.with_name(prompts.name + "_en")
    english = english_folder / f"{lang}.json" if english_folder.is_dir() else prompts / "en.json"
    own, golds = prompts / f"{lang}.json", task_folder(task, "ans") / f"{lang}.json"
    records, gold_values = read_records(own), read_json_lines(golds)
    versions = read_records(english) if english.exists() or english_folder.is_dir() else [None] * len(records)
    for file, found in ((golds, gold_values), (english, versions)):
        if len(found) != len(records):
            raise UserError(f"{file}: has {len(found)} items, {own} has {len(records)}; get the whole benchmark")
    items, options = [], OPTIONS.get(name)
    for record, version, (where, value) in list(zip(records, versions, gold_values, strict=True))[:limit]:
        gold = value if isinstance(value, list) else [value]  # one answer, or all that are right
        valid = all(isinstance(g, str) and g.strip() and (not options or g in [*options]) for g in gold)
        if not gold or not valid:
            expected = "one of " + ", ".join(options) if options else "a text or a list of texts"
            raise UserError(f"{where}: gold answer is {value!r}, expected {expected}; restore the file")
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


def encode(engine, args, items):
    """The Prompts of a task in one language, and how many were shortened to leave room for an answer."""
    tokenizer, room, shortened, prompts = engine.tokenizer, engine.config.max_length - args.max_new_tokens, 0, []
    if room < len(tokenizer.prompt("")) + 16:
        raise UserError(f"--max_new_tokens: {args.max_new_tokens} leaves no room for a prompt in the model's "
                        f"{engine.config.max_length}; lower it")
    for number, item in enumerate(items):
        english = item.english if engine.connection == "english" else None
        fitting = item._replace(prompt=shorten(item.prompt, tokenizer, room),
                                english=english and shorten(english, tokenizer, room))
        shortened += (fitting.prompt, fitting.english) != (item.prompt, english)
        prompts.append(engine.encode(fitting, number))
    return prompts, shortened


def answer(engine, args, prompts, dist, title):
    """The Answers to a task's prompts, each process giving some; the same list on all."""
    with tqdm(total=math.ceil(len(prompts) / dist.world_size), desc=title, leave=False,
              disable=dist.rank > 0 or None) as progress:
        answers = engine.answer_all(prompts, args.batch_size, args.max_new_tokens, progress=progress,
                                    rank=dist.rank, world_size=dist.world_size)
    return [next(answer for answer in given if answer) for given in zip(*dist.gather(answers), strict=True)]


# ----------------------------------------------------------------------------------------------- scoring

UNSPACED = "".join("{}-{}".format(*(chr(int(end, 16)) for end in block.split("-")))
                   for block in LANGUAGE_TABLES["unspaced_scripts"]["ranges"])
# What may stand before an option at the start of an answer, and after it.
OPENING = r"[\s(\[{<\"'*_`«“‘„「『（【]*"
CLOSING = r"[\s\"'*_`»”’」』]*(?:[.):,\]}>।。、：】](?!\d)|$)"


def normalize_text(text):
    """NFKC, ASCII digits, no zero-width characters."""
    text = unicodedata.normalize("NFKC", text)
    return "".join(str(unicodedata.decimal(c)) if c.isdecimal() else c for c in text
                   if unicodedata.category(c) != "Cf")


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


def open_scores(answer, golds, lang):
    """{metric: 0 to 1, the best over the gold answers}: contained, exact match and token F1."""
    found, best = answer_tokens(answer, lang), {"contained": 0.0, "exact": 0.0, "f1": 0.0}
    for gold in golds:
        gold = answer_tokens(re.sub(r"^(\d+)\.0$", r"\1", gold), lang)  # MKQA writes whole numbers as 3.0
        common = sum((Counter(found) & Counter(gold)).values())
        starts = range(len(found) - len(gold) + 1)
        contained = bool(gold) and any(found[i:i + len(gold)] == gold for i in starts)
        f1 = 2 * common / (len(found) + len(gold)) if common else float(found == gold)
        for metric, value in (("contained", contained), ("exact", found == gold), ("f1", f1)):
            best[metric] = max(best[metric], float(value))
    return best


def summary_tokens(text):
    """Lower-case words, or characters of unspaced scripts; marks belong to letters, all else separates."""
    text = normalize_text(text).lower()
    return segment("".join(c if unicodedata.category(c)[0] in "LMN" else " " for c in text))


def rouge_l(answer, gold):
    """F1 of the longest common subsequence (ROUGE-L, Lin 2004)."""
    a, b = summary_tokens(answer), summary_tokens(gold)
    lengths = [0] * (len(b) + 1)  # of the longest common subsequence of a so far and each prefix of b
    for x in a:
        row = [0]
        for j, y in enumerate(b):
            row.append(lengths[j] + 1 if x == y else max(row[j], lengths[j + 1]))
        lengths = row
    return 2 * lengths[-1] / (len(a) + len(b)) if lengths[-1] else 0.0


def option_texts(prompt, options):
    """{option: its text} from a prompt's lines "(1) text"; the last of each, as questions may have such too."""
    lines = re.findall(rf"^\(([{options}])\)[ \t]*(.+)$", prompt, re.MULTILINE)
    return {option: text.strip() for option, text in lines}


def choice(answer, options, texts):
    """The option that an answer names; None if it names none or several. texts: {option: its text}.

    In turn: the option whose text is the whole answer; an option set off at the start ("1", "(B)", "2. since"),
    unless another option's text follows; the only option that stands alone; the only one whose text is repeated.
    Digits of every script and full-width letters count as their ASCII forms.
    """
    def bare(text):
        return normalize_text(text).strip(" \n.।。۔").casefold()

    whole = [option for option, text in texts.items() if bare(text) == bare(answer)]
    if len(whole) == 1 and bare(answer) not in options.casefold():
        return whole[0]
    answer, letters = normalize_text(answer).strip(), not options[0].isdigit()
    given = options + options.lower() if letters else options
    alone = r"(?<![\dA-Za-z.,])[%s](?![\dA-Za-z]|[.,]\d)"  # not part of a number or a Latin word
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
    article = not re.search(r"(?<![A-Za-z])A(?![A-Za-z]|[ \t]+[A-Za-zÀ-ɏḀ-ỿ])", answer)  # before Latin words only
    if letters and article and "A" not in bracketed:
        named -= {"A"}
    if named:
        return named.pop() if len(named) == 1 else None
    words = f" {' '.join(summary_tokens(answer))} "
    repeated = [option for option, text in texts.items()
                if (t := " ".join(summary_tokens(text))) and f" {t} " in words]
    longest = [o for o in repeated if not any(o != other and texts[o] in texts[other] for other in repeated)]
    return longest[0] if len(longest) == 1 else None


def score_answer(task, lang, item, text):
    """({metric: 0 to 1}, the option that the answer names or None)."""
    if task in OPTIONS:
        named = choice(text, OPTIONS[task], option_texts(item.prompt, OPTIONS[task]))
        return {"accuracy": float(named in item.answer)}, named
    if task == "XLSum":
        return {"rouge_l": max(rouge_l(text, gold) for gold in item.answer)}, None
    scores = open_scores(text, item.answer, lang)
    return {metric: scores[metric] for metric in METRICS.get(task, DEFAULT_METRICS)}, None


def score_answers(engine, task, lang, items, answers):
    """The scored answers to a task in one language, as they are written to OUT/answers."""
    rows = []
    for item, answer in zip(items, answers, strict=True):
        text = engine.tokenizer.decode(answer.ids)
        scores, named = score_answer(task, lang, item, text)
        rows.append({"instruction": item.prompt, "answer": text, "choice": named, "gold": item.answer,
                     "scores": scores, "layer": answer.layer})
    return rows


# -------------------------------------------------------------------------------------------- statistics

class BootstrapScore:
    """The score of a column on a task in a language, with the resamples for its interval and p-value."""

    def __init__(self, values, first, seed):
        """values: the items' scores; first: those of the first column.

        seed: one per task, for all its languages: they are translations of one another, so that independent
        draws would make the interval of their mean too narrow.
        """
        values, count = np.array(values), len(values)
        differences = values - np.array(first)
        self.score, self.difference = values.mean(), differences.mean()
        rng = np.random.default_rng(seed)  # in portions, for tasks with many items
        draws = (rng.integers(count, size=(100, count)) for _ in range(RESAMPLES // 100))
        self.resampled = np.concatenate([values[portion].mean(1) for portion in draws])
        signs = (rng.choice(np.array((-1, 1), "int8"), size=(100, count)) for _ in range(PERMUTATIONS // 100))
        self.flipped = np.concatenate([portion @ differences / count for portion in signs])

    @classmethod
    def mean(cls, scores):
        mean = cls.__new__(cls)
        for name in ("score", "difference", "resampled", "flipped"):
            setattr(mean, name, np.mean([getattr(score, name) for score in scores], axis=0))
        return mean

    def summary(self):
        """Score, 95 % interval, difference to the first column and its two-sided p-value."""
        low, high = np.percentile(self.resampled, (2.5, 97.5))
        p = (1 + (abs(self.flipped) >= abs(self.difference) - 1e-12).sum()) / (1 + PERMUTATIONS)
        return {"score": float(self.score), "interval": [float(low), float(high)],
                "difference": float(self.difference), "p": float(p)}


def compare(columns):
    """{(task, lang): a BootstrapScore per column} from each column's {(task, lang): scored answers}."""
    scores, tasks = {}, list(dict.fromkeys(task for task, _ in columns[0]))
    for task, lang in columns[0]:
        metric = METRICS.get(task, DEFAULT_METRICS)[0]
        values = [[row["scores"][metric] for row in column[task, lang]] for column in columns]
        scores[task, lang] = [BootstrapScore(column, values[0], tasks.index(task)) for column in values]
    return scores


def averages(scores):
    """[(task, language, summary per column)] from {(task, lang): a BootstrapScore per column}.

    After a task's languages come "mean" and, if it has English, "mean without en"; after the tasks those of "all".
    """
    def mean(group):
        return [BootstrapScore.mean(column) for column in zip(*group, strict=True)]

    found, english = {}, {task for task, lang in scores if lang == "en"}
    for task in dict.fromkeys(task for task, _ in scores):
        langs = {lang: columns for (t, lang), columns in scores.items() if t == task}
        found.update({(task, lang): columns for lang, columns in langs.items()})
        found[task, "mean"] = mean(langs.values())
        if others := [columns for lang, columns in langs.items() if lang != "en"]:
            found[task, "mean without en"] = mean(others)
    if len({task for task, _ in scores}) > 1:
        for lang in dict.fromkeys(lang for _, lang in found):
            group = [columns for (_, found_lang), columns in found.items() if found_lang == lang]
            if len(group) > 1:
                found["all", lang] = mean(group)
    return [(task, lang, [score.summary() for score in columns]) for (task, lang), columns in found.items()
            if lang != "mean without en" or (english if task == "all" else task in english)]


# ----------------------------------------------------------------------------------------------- results

def table(rows, columns):
    """Markdown: scores in per cent with their intervals per task and language; then the comparisons."""
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


def secondary_table(results, columns):
    """Markdown lines: the mean over languages of the further metrics; empty if no task has any."""
    lines = []
    for task in dict.fromkeys(r["task"] for r in results):
        for metric in METRICS.get(task, DEFAULT_METRICS)[1:]:
            scores = [[r["scores"][metric] for r in results if (r["task"], r["column"]) == (task, column)]
                      for column in columns]
            lines.append(f"| {task} | {metric} | " + " | ".join(f"{100 * np.mean(s):.1f}" for s in scores) + " |")
    head = ["", "| task | mean of | " + " | ".join(columns) + " |", "|---|---|" + "---|" * len(columns)]
    return head + lines if lines else []


def load_plot():
    """data/plot.py as a module, imported by its path."""
    if not importlib.util.find_spec("matplotlib"):
        raise UserError("--plot: needs the matplotlib package; pip install matplotlib")
    spec = importlib.util.spec_from_file_location("plot", HERE / "data" / "plot.py")
    plot = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(plot)
    return plot


# -------------------------------------------------------------------------------------------------- main

class Results:
    """What is measured: columns (a model with one connection), their scored answers, a result per cell."""

    def __init__(self):
        self.columns, self.answers, self.cells = [], [], []  # answers: {(task, lang): rows} of each column

    def report(self, args, out):
        """Write results.json, results.md and the pictures. Returns the tables."""
        rows = averages(compare(self.answers))
        markdown = "\n".join([table(rows, self.columns), *secondary_table(self.cells, self.columns)])
        summaries = [{"task": task, "lang": lang, "column": column, **cell} for task, lang, cells in rows
                     for column, cell in zip(self.columns, cells, strict=True)]
        everything = {"arguments": vars(args), "results": self.cells, "summaries": summaries}
        write_text(out / "results.json", json.dumps(everything, indent=1))
        write_text(out / "results.md", markdown + "\n")
        if args.plot:
            plot = load_plot()
            Path(args.plot).mkdir(parents=True, exist_ok=True)
            plot.draw_scores(args.plot, rows, self.columns)
            layers = [{f"{task} {lang}": [row["layer"] for row in found] for (task, lang), found in column.items()}
                      for column in self.answers]
            layers = {name: chosen for name, chosen in zip(self.columns, layers, strict=True)
                      if None not in next(iter(chosen.values()))}
            if layers:
                plot.draw_layers(args.plot, layers)
        return markdown


def evaluate(engine, name, folder, todo, args, dist, results):
    """Answer and score all tasks with one model and connection: a column of the results."""
    encoded = [encode(engine, args, items) for _, _, items in todo]
    results.columns.append(name)
    results.answers.append({})
    for (task, lang, items), (prompts, shortened) in zip(todo, encoded, strict=True):
        answers = answer(engine, args, prompts, dist, f"{task} {lang}")
        rows = results.answers[-1][task, lang] = score_answers(engine, task, lang, items, answers)
        scores = {metric: sum(row["scores"][metric] for row in rows) / len(rows) for metric in rows[0]["scores"]}
        unparsed = sum(row["choice"] is None for row in rows) if task in OPTIONS else 0
        results.cells.append({"column": name, "model": engine.folder, "connection": engine.connection, "task": task,
                              "lang": lang, "items": len(rows), "scores": scores, "unparsed": unparsed,
                              "shortened": shortened})
        if dist.rank == 0:
            write_json_lines(folder / task / f"{lang}.jsonl", rows)
    for what, meaning in (("unparsed", "answers named no option, or several, and count as wrong"),
                          ("shortened", "prompts were shortened to fit")):
        if count := sum(cell[what] for cell in results.cells if cell["column"] == name):
            dist.print0(f"{name}: {count} {meaning}")


def main():
    args = parse_args()
    out, results = Path(args.out), Results()
    check_writable(out)
    args.model = args.model or [default_model()]
    if len(set(args.model)) < len(args.model):
        raise UserError("--model: a folder is named twice; name each once")
    todo = [(task, lang, read_task(args.data, task, lang, args.limit))
            for task, lang in find_tasks(args.data, args.tasks, args.langs)]
    for model in args.model:  # check all models before the first one's long work
        Tokenizer(model, Config.read(model), args.template)
        weight_files(model)
    if args.plot:
        check_writable(args.plot)
        load_plot()
    with Dist.start("gloo") as dist:  # gloo: only answers are exchanged, each process has the whole model
        for model in args.model:
            engine = Engine(model, "none", args.template, args.dtype)
            asked = args.connection or [engine.default_connection()]
            possible = [c for c in asked if engine.can_connect(c)] or [engine.default_connection()]
            for connection in possible:
                engine.connect(connection)
                name = ", ".join([model] * (len(args.model) > 1) + [connection] * (len(asked) > 1)) or model
                folder = re.sub(r"[^\w.-]+", "_", model.strip("/") + f" {connection}" * (len(asked) > 1))
                evaluate(engine, name, out / "answers" / folder, todo, args, dist, results)
            for notice in engine.notices:
                dist.print0(notice, file=sys.stderr)
            del engine  # before the next model is loaded
        if dist.rank == 0:
            markdown = results.report(args, out)
            print(f"scores in per cent (95 % intervals)\n\n{markdown}\n\nresults and answers are in {out}")


if __name__ == "__main__":
    run_script(main)
