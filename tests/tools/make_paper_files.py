"""Files of the names and schema that data/PAPER.md uses, at toy size, from the embedded data.

    python tests/make_paper_files.py FOLDER

FOLDER/Training/data gets the authors' seven training files, FOLDER/Inference/data their six tasks. .ci/run runs the
commands of data/PAPER.md on them.
"""
import json
import sys
from pathlib import Path

DATA = Path(__file__).resolve().parents[1] / "data"
OPTIONS = {"XNLI": "123", "XStoryCloze": "12", "MMMLU": "ABCD"}


def main():
    folder = Path(sys.argv[1])
    training = folder / "Training" / "data"
    training.mkdir(parents=True)
    samples = [json.loads(line) for line in (DATA / "train.jsonl").read_text(encoding="utf-8").splitlines()[:66]]
    parallel = [{key: sample[key] for key in ("instruction", "instruction_en", "output")} for sample in samples]
    plain = [{key: sample[key] for key in ("instruction", "output")} for sample in samples]
    for name in ("aya_train_mini_parallel", "aya_train_mini_all_parallel", "aya_train_mini_add_mt_parallel",
                 "Llama-3.1-8B_SDRRL_parallel", "Qwen2.5-7B_SDRRL_parallel", "Mistral-7B-v0.3_SDRRL_parallel"):
        (training / f"{name}.json").write_text(json.dumps(parallel, ensure_ascii=False), encoding="utf-8")
    (training / "aya_train_mini.json").write_text(json.dumps(plain, ensure_ascii=False), encoding="utf-8")

    for task in ("XNLI", "XStoryCloze", "MMMLU", "XQuAD", "MKQA", "XLSum"):
        for lang in ("en", "sw"):
            questions = (DATA / "dev" / "facts" / "split" / f"{lang}.json").read_text(encoding="utf-8").splitlines()[:2]
            golds = (DATA / "dev" / "facts" / "ans" / f"{lang}.json").read_text(encoding="utf-8").splitlines()[:2]
            if task in OPTIONS:
                golds = [json.dumps(option) for option in OPTIONS[task][:2]]
            for kind, lines in (("split", questions), ("ans", golds)):
                path = folder / "Inference" / "data" / task / kind / f"{lang}.json"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
