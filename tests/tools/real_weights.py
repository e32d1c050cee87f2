"""Checks on real checkpoints, too large to ship: run by hand. Each runs where its variables are set.

    MODEL=DIR DATA=FILE python -m pytest tests/tools/real_weights.py  # answers, memory of two processes
    MODEL=DIR python -m pytest tests/tools/real_weights.py        # the continuations in DIR/expected.json
    TOKENIZERS=DIR python -m pytest tests/tools/real_weights.py   # the prompts in DIR/expected.json
"""
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch

import calls
from conftest import CONFIG, json_lines, launch, training
from model import Config, Tokenizer

MODEL, DATA, TOKENIZERS = [Path(os.environ.get(name, "/nowhere")) for name in ("MODEL", "DATA", "TOKENIZERS")]
needs_both = pytest.mark.skipif(not (MODEL.exists() and DATA.exists()), reason="too large: set MODEL, DATA")


@needs_both
def test_answers_as_transformers(tmp_path, ran):
    """20 prompts, 32 greedy tokens in float32: ours in one batch, theirs one by one."""
    import transformers
    records = json_lines(DATA)
    chosen = records[::len(records) // 20][:20]  # from each part of the file
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, chosen)))
    ran("infer", "--model", MODEL, "--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl",
        "--connection=none", "--dtype=float32", "--batch_size=20", "--max_new_tokens=32")
    ours = [record["answer"] for record in json_lines(tmp_path / "out.jsonl")]
    tokenizer = Tokenizer(MODEL, Config.read(MODEL))
    model = transformers.AutoModelForCausalLM.from_pretrained(MODEL, torch_dtype=torch.float32)
    stop = sorted(tokenizer.stop)
    for record, answer in zip(chosen, ours, strict=True):
        ids = torch.tensor([tokenizer.prompt(record["instruction"])])
        found = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=32, do_sample=False,
                               eos_token_id=stop, pad_token_id=stop[0])[0, ids.shape[1]:]
        assert answer == tokenizer.decode([i for i in found.tolist() if i not in stop]), record


@needs_both
def test_two_processes_share_the_memory(tmp_path, monkeypatch):
    """Peak host memory of each of two processes that train a step and save: below 0.7 of one process's."""
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "262144")  # else glibc keeps freed memory
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in json_lines(DATA)[:16]))
    report = ("print('peak', next(line.split()[1] for line in open('/proc/self/status') "
              "if line.startswith('VmHWM')))")
    sizes, peaks = {"epochs": 1, "batch_size": 16, "micro_batch": 1, "max_length": 256}, {}
    for world in (1, 2):
        command = training(MODEL, data, tmp_path / str(world), **sizes)
        done = launch(tmp_path, world, [command], after=report, timeout=600)
        assert done.returncode == 0, done.stderr[-3000:]
        peaks[world] = max(map(int, re.findall(r"^peak (\d+)", done.stdout, re.MULTILINE)))
    assert peaks[2] < 0.7 * peaks[1], peaks


@pytest.mark.skipif(not (MODEL / "expected.json").exists(), reason="too large to ship: set MODEL")
@torch.no_grad()
def test_expected_continuations():
    """Greedy tokens from BOS and a prompt without template, and their text."""
    cc, config = calls.open_model(MODEL), Config.read(MODEL)
    tokenizer = Tokenizer(MODEL, config)
    for case in json.loads((MODEL / "expected.json").read_text())["cases"]:
        ids = [config.bos_token_id, *(tokenizer.encode(case["prompt"]) if case["prompt"] else [])]
        count = len(case["ids"]) - len(ids)
        ids += calls.answer(cc, torch.tensor([ids]), torch.tensor([len(ids)]), count)[2][0].tolist()
        assert ids == case["ids"] and tokenizer.decode(ids) == case["text"]


@pytest.mark.skipif(not TOKENIZERS.exists(), reason="real tokenizers are not ours to ship: set TOKENIZERS")
def test_templates(tmp_path):
    """Ids, connection position and end of turn of every expected prompt."""
    for case in json.loads((TOKENIZERS / "expected.json").read_text()):
        folder = tmp_path / case["tokenizer"]
        if not folder.exists():
            shutil.copytree(TOKENIZERS / case["tokenizer"], folder)
            (folder / "config.json").write_text(json.dumps({**CONFIG, "vocab_size": 200000}))
            t = Tokenizer(folder, Config.read(folder), case["template"])
        assert t.template == case["template"] and t.prompt(case["text"]) == case["ids"], case
        assert (t.connection_index, t.end_of_turn) == (case["connection_index"], case["end_of_turn"])
