"""Check eval.py's likelihoods against lm-evaluation-harness: a local task of a few prompts, and a comparison.

    pip install "lm-eval[hf]" accelerate
    python tests/tools/lm_eval_task.py make --data BENCHMARKS --langs en,sw --limit 100 --out TASKS
    lm_eval run --model hf --model_args pretrained=MODEL,dtype=float32,trust_remote_code=True \\
        --apply_chat_template --tasks XNLI_options --include_path TASKS --log_samples --output_path MATRIX
    python tests/tools/lm_eval_task.py compare --model MODEL --samples MATRIX/*/samples_*.jsonl

Without trust_remote_code, lm_eval scores the plain model: compare that with --connection none. A choice is an
option's text and the end of turn. lm_eval counts white space at a prompt's end to each choice, a constant of
the prompt: compare leaves out a prompt's mean difference. It encodes prompt and choice as one text, so a
SentencePiece model whose prompts end with white space loses a space: --space " " writes it into the choices.
"""
import argparse
import json
import re
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from eval import option_likelihoods
from infer import Engine, Prompt
from model import Help, read_records

YAML = """task: {task}_options
dataset_path: json
dataset_kwargs: {{data_files: {file}}}
test_split: train
output_type: multiple_choice
doc_to_text: prompt
doc_to_choice: choices
doc_to_target: 0
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""


def make(args):
    """Write TASKS/NAME_options.yaml, and its prompts and choices."""
    out = Path(args.out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    for task in args.tasks.split(","):
        lines = []
        for lang in args.langs.split(","):
            (file,) = Path(args.data, task).glob(f"split*/{lang}.json")
            for record in read_records(file)[:args.limit]:
                texts = re.findall(r"^\([1-3A-D]\)[ \t]*(.*\S)", record.prompt, re.MULTILINE)
                choices = [args.space + text + args.end for text in texts]
                lines.append(json.dumps({"prompt": record.prompt, "choices": choices}) + "\n")
        (out / f"{task}.jsonl").write_text("".join(lines))
        (out / f"{task}_options.yaml").write_text(YAML.format(task=task, file=out / f"{task}.jsonl"))


def compare(args):
    """Print the largest difference, but for a prompt's mean, and how often the likeliest is the same."""
    engine = Engine(args.model, args.connection, dtype="float32")
    for file in args.samples:
        differences, constants, same = [], [], 0
        for row in map(json.loads, Path(file).read_text().splitlines()):
            theirs = np.array([float(response[0][0]) for response in row["resps"]])  # log-probabilities
            texts = [choice.removesuffix(args.end).strip() for choice in row["doc"]["choices"]]
            forms = [(number, engine.tokenizer.answer(text)) for number, text in enumerate(texts)]
            prompt = Prompt(engine.tokenizer.prompt(row["doc"]["prompt"]))
            (ours,) = option_likelihoods(engine, [prompt], [forms])
            ours = np.array(list(ours.values()))
            constants.append((theirs - ours).mean())
            differences.append(np.abs(theirs - ours - constants[-1]).max())
            same += int(theirs.argmax() == ours.argmax())
        print(f"{Path(file).name}: largest difference {max(differences):.1e} nats, but for a prompt's "
              f"constant ({np.mean(constants):.2f} on average); same likeliest in {same} of {len(constants)}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
    add = parser.add_argument
    add("action", choices=("make", "compare"))
    for name in ("data", "out", "model"):
        add(f"--{name}", metavar="DIR")
    add("--tasks", default="XNLI,XStoryCloze")
    add("--langs", default="en")
    add("--limit", type=int, help="prompts of each language")
    add("--space", default="")
    add("--end", default="<|im_end|>", help="end of turn")
    add("--connection", default="matrix")
    add("--samples", nargs="+", metavar="FILE", help="of lm_eval's --log_samples")
    args = parser.parse_args()
    {"make": make, "compare": compare}[args.action](args)
