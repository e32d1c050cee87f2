"""Score checkpoints on multilingual benchmarks, answered by infer.py's engine.

    python eval.py                                                    # held-out questions of the embedded default
    python eval.py --model DIR [DIR ...] --data BENCHMARKS [--tasks XNLI,MMMLU] [--langs sw,hi] [--limit 50]
    torchrun --nproc_per_node 8 eval.py ...                           # the same answers, the prompts spread over 8 processes

XNLI, XStoryCloze and MMMLU are scored by the option that an answer names, other tasks by exact match with a gold answer.
BENCHMARKS has the layout of the paper's repository: TASK/split or split_sample/LANG.json with the prompts and TASK/ans or
ans_sample/LANG.json with the gold answers, a JSON value per line. The English version of a prompt is the same line of the task's en.json, or of
split_en/LANG.json (split_sample_en/LANG.json) where the task has that folder.
"""
import argparse
import json
import math
import os
import re
import sys
import unicodedata
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from infer import DATA, DEFAULT_MODEL, Engine, add_engine_options, default_model, write_lines
from model import Config, Tokenizer, UserError, at_least, check_folder, instruction, read_json_lines, run_script, weight_files, write_text

OPTIONS = {"XNLI": "123", "XStoryCloze": "12", "MMMLU": "ABCD"}  # the answers to choose from; other tasks are answered freely


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", nargs="+", metavar="DIR", help=f"checkpoint folders; the table has a column for each {DEFAULT_MODEL}")
    add("--data", default=str(DATA / "test"), metavar="DIR", help="folder of benchmarks (default: the embedded data/test)")
    add("--tasks", metavar="TASK,...", help="folders of --data (default: all that have prompts)")
    add("--langs", metavar="CODE,...", help="languages (default: all that a task has)")
    add("--limit", type=at_least(1), metavar="N", help="only the first N items of each language")
    add("--out", default="out/eval", metavar="DIR", help="folder for results.json, results.md and the answers (default %(default)s)")
    add_engine_options(parser)
    parser.set_defaults(max_new_tokens=32)
    return parser.parse_args(argv)


# ------------------------------------------------------------------------------------------------------------------- benchmarks

def task_folder(task, kind):
    """The folder of a task's prompts (kind "split") or gold answers ("ans"), whole or sampled; None where it has neither."""
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
    for file, found in zip(files, lines):
        if found and len(found) != len(lines[0]):
            raise UserError(f"{file}: has {len(found)} items, {files[0]} has {len(lines[0])}; get the whole benchmark")
    items = []
    for i, (line, record) in enumerate(lines[0][:limit]):
        gold_line, gold = lines[2][i]
        gold = gold if isinstance(gold, list) else [gold]  # one answer, or all that are right
        options = OPTIONS.get(name)
        if not gold or not all(isinstance(g, str) and g.strip() and (not options or g in list(options)) for g in gold):
            expected = "one of " + ", ".join(options) if options else "a text or a list of texts"
            raise UserError(f"{files[2]}:{gold_line}: gold answer is {lines[2][i][1]!r}, expected {expected}; restore the file")
        version = lines[1] and instruction(lines[1][i][1], f"{files[1]}:{lines[1][i][0]}")
        items.append((instruction(record, f"{files[0]}:{line}"), version, gold, f"{files[0]}:{line}"))
    return items


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


def choice(answer, options):
    """The option that an answer names first, standing by itself, or None."""
    apart = r"\d" if options[0].isdigit() else r"[^\W\d_]"
    found = re.search(f"(?<!{apart})[{options}](?!{apart})", answer)
    return found and found.group()


def plain(text):
    """A text for comparison: compatibility forms, case and spacing evened out."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


# ------------------------------------------------------------------------------------------------------------------------- main

def encode(engine, args, lang, items):
    """The Prompts of a task in one language, and how many had to be shortened to leave room for an answer."""
    room, shortened, prompts = engine.config.max_length - args.max_new_tokens, 0, []
    if room < len(engine.tokenizer.prompt("")) + 16:
        raise UserError(f"--max_new_tokens: {args.max_new_tokens} leaves no room for a prompt in the model's {engine.config.max_length}; lower it")
    for number, (own, english, _, where) in enumerate(items):
        english = english if engine.connection == "english" else None
        texts = [text and shorten(text, engine.tokenizer, room) for text in (own, english)]
        shortened += texts != [own, english]
        prompts.append(engine.prompt(*texts, lang, number, where))
    return prompts, shortened


def answer(engine, args, prompts, rank, world, what):
    """The Answers to a task's prompts, every process giving some; the same list on all."""
    with tqdm(total=math.ceil(len(prompts) / world), desc=what, leave=False, disable=rank > 0 or None) as progress:
        answers = engine.answer_all(prompts, args.batch_size, args.max_new_tokens, progress=progress, rank=rank, world=world)
    shares = [answers]
    if world > 1:
        shares = [None] * world
        dist.all_gather_object(shares, answers)
    return [next(answer for answer in given if answer) for given in zip(*shares)]


def score(engine, task, lang, items, answers):
    """The scored answers to a task in one language, and its row of results.json."""
    rows = []
    for (own, _, gold, _), answer in zip(items, answers):
        text = engine.tokenizer.decode(answer.ids)
        found = choice(text, OPTIONS[task]) if task in OPTIONS else plain(text)
        correct = found in (gold if task in OPTIONS else map(plain, gold))
        rows.append({"instruction": own, "answer": text, "choice": found, "gold": gold, "correct": correct, "layer": answer.layer})
    correct = sum(row["correct"] for row in rows)
    return rows, {"task": task, "lang": lang, "connection": engine.connection, "items": len(rows), "correct": correct,
            "accuracy": correct / len(rows), "unparsed": sum(row["choice"] is None for row in rows)}


def table(results, models):
    """Markdown: accuracy in per cent, a row per task and language, a column per model, means below each task: of all languages, and of all but English."""
    lines = ["| task | language | items | " + " | ".join(models) + " |", "|---|---|---|" + "---|" * len(models)]
    for task in dict.fromkeys(r["task"] for r in results):
        rows = [r for r in results if r["task"] == task]
        langs = list(dict.fromkeys(r["lang"] for r in rows))
        cell = {(r["lang"], r["model"]): r for r in rows}
        for lang in langs:
            scores = " | ".join(f"{100 * cell[lang, m]['accuracy']:.1f}" for m in models)
            lines.append(f"| {task} | {lang} | {cell[lang, models[0]]['items']} | {scores} |")
        others = [lang for lang in langs if lang != "en"]
        for name, group in {"mean": langs, "mean without en": others}.items():
            if group and (name == "mean" or others != langs):
                means = (sum(cell[lang, m]["accuracy"] for lang in group) / len(group) for m in models)
                lines.append(f"| {task} | {name} | | " + " | ".join(f"{100 * mean:.1f}" for mean in means) + " |")
    return "\n".join(lines)


def main():
    args = parse_args()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    say = print if rank == 0 else lambda *_, **__: None
    out = Path(args.out)
    check_folder(out)
    args.model = args.model or [default_model()]
    if len(set(args.model)) < len(args.model):
        raise UserError("--model: a folder is named twice; name each once")
    todo = [(task, lang, read_task(args.data, task, lang, args.limit)) for task, lang in find_tasks(args.data, args.tasks, args.langs)]
    for model in args.model:  # what can be told without loading the weights, before any work is done
        Tokenizer(model, Config.read(model), args.template)
        weight_files(model)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if world > 1:
        dist.init_process_group("gloo")  # for answers alone: each process has the whole model
    results = []
    for model in args.model:
        engine = Engine(model, args)
        encoded = [encode(engine, args, lang, items) for _, lang, items in todo]
        for notice in engine.notices:
            say(notice, file=sys.stderr)
        folder = out / "answers" / re.sub(r"[^\w.-]+", "_", model.strip("/"))
        for (task, lang, items), (prompts, shortened) in zip(todo, encoded):
            rows, result = score(engine, task, lang, items, answer(engine, args, prompts, rank, world, f"{task} {lang}"))
            results.append({"model": model, **result, "shortened": shortened})
            if rank == 0:
                write_lines(folder / task / f"{lang}.jsonl", rows)
        for what, meaning in (("unparsed", "answers named no option and count as wrong"), ("shortened", "prompts were shortened to fit")):
            count = sum(r[what] for r in results if r["model"] == model)
            if count:
                say(f"{model}: {count} {meaning}")
        del engine  # before the next model is loaded
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()
    if rank > 0:
        return
    markdown = table(results, args.model)
    for file, text in (("results.json", json.dumps({"arguments": vars(args), "results": results}, indent=1)), ("results.md", markdown + "\n")):
        write_text(out / file, text)
    print(f"accuracy, per cent\n\n{markdown}\n\nresults and answers are in {out}")


if __name__ == "__main__":
    run_script(main, speak=int(os.environ.get("LOCAL_RANK", 0)) == 0)
