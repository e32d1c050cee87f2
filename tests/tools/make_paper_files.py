"""Files of the names and schema that data/PAPER.md uses, at toy size, from the built-in data.

    python tests/tools/make_paper_files.py FOLDER

FOLDER/Training/data gets the authors' seven training files, FOLDER/Inference/data their six tasks. .ci/run
runs the commands of data/PAPER.md on them.
"""
import json
import sys
from pathlib import Path

DATA = Path(__file__).resolve().parents[2] / "data"
OPTIONS = {"XNLI": "123", "XStoryCloze": "12", "MMMLU": "ABCD"}
PARALLEL = ("aya_train_mini_parallel", "aya_train_mini_all_parallel", "aya_train_mini_add_mt_parallel",
            "Llama-3.1-8B_SDRRL_parallel", "Qwen2.5-7B_SDRRL_parallel", "Mistral-7B-v0.3_SDRRL_parallel")


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def main():
    training, inference = (Path(sys.argv[1]) / name / "data" for name in ("Training", "Inference"))
    lines = (DATA / "train.jsonl").read_text(encoding="utf-8").splitlines()[:66]
    for name in (*PARALLEL, "aya_train_mini"):
        keys = ("instruction", "output") + ("instruction_en",) * (name in PARALLEL)
        samples = [{key: json.loads(line)[key] for key in keys} for line in lines]
        write(training / f"{name}.json", json.dumps(samples, ensure_ascii=False))

    for task in ("XNLI", "XStoryCloze", "MMMLU", "XQuAD", "MKQA", "XLSum"):
        for lang in ("en", "sw"):
            for kind in ("split", "ans"):
                source = DATA / "dev" / "facts" / kind / f"{lang}.json"
                lines = source.read_text(encoding="utf-8").splitlines()
                if kind == "ans" and task in OPTIONS:
                    lines = [json.dumps(option) for option in OPTIONS[task]]
                write(inference / task / kind / f"{lang}.json", "\n".join(lines[:2]))


if __name__ == "__main__":
    main()
