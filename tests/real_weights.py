"""Checks on real checkpoints, run by hand (they are too large to ship):

    MODEL=DIR DATA=FILE python -m pytest tests/real_weights.py -s   # the same greedy answers as transformers,
                                                                    # and the memory of two processes against one
    MODEL=DIR python -m pytest tests/real_weights.py        # the continuations in DIR/expected.json, to the letter
    TOKENIZERS=DIR python -m pytest tests/real_weights.py   # the prompts in DIR/expected.json, by their chat templates

Each runs where its variables are set.
"""
import json
import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from conftest import launch
from infer import Engine
from model import Config, Tokenizer, load_model, new_cache, read_records

MODEL, DATA, TOKENIZERS = (os.environ.get(name) and Path(os.environ[name]) for name in ("MODEL", "DATA", "TOKENIZERS"))
needs_both = pytest.mark.skipif(not (MODEL and DATA), reason="real weights are too large to ship: set MODEL and DATA")
needs_expected = pytest.mark.skipif(not (MODEL and (MODEL / "expected.json").exists()),
                                    reason="set MODEL to a folder with an expected.json")


@needs_both
def test_answers_as_transformers(capsys):
    """Four prompts in each of five languages, 32 greedy tokens in float32: ours in one batch, theirs one by one."""
    import transformers
    by_language = {}
    for _, record in read_records(DATA):
        by_language.setdefault(record["lang"], []).append(record["instruction"])
    chosen = [text for lang in sorted(by_language)[:5] for text in by_language[lang][:4]]
    assert len(chosen) == 20
    engine = Engine(MODEL, "none", dtype="float32")
    prompts = [engine.prompt(text) for text in chosen]
    ours = [a.ids for a in engine.answer_all(prompts, 20, 32)]
    model = transformers.AutoModelForCausalLM.from_pretrained(MODEL, torch_dtype=torch.float32)
    stop, theirs = sorted(engine.tokenizer.stop), []
    for prompt in prompts:
        ids = torch.tensor([prompt.ids])
        found = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=32, do_sample=False,
                               eos_token_id=stop, pad_token_id=stop[0])
        theirs.append([i for i in found[0, len(prompt.ids):].tolist() if i not in stop])
    with capsys.disabled():
        same = sum(a == b for a, b in zip(ours, theirs, strict=True))
        print(f"\n{same} of 20 prompts in {', '.join(sorted(by_language)[:5])}: the same tokens, "
              f"{sum(map(len, ours))} in all")
    assert ours == theirs


@needs_both
def test_two_processes_share_the_memory(tmp_path, capsys, monkeypatch):
    """Peak host memory of each of two processes that load, train one step and save: below 0.7 of one process's."""
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "262144")  # else glibc keeps what each gathered layer had, in pieces
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for _, record in read_records(DATA)[:16]))
    report = "print('peak', next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    peaks, seconds = {}, {}
    for world in (1, 2):
        began = time.perf_counter()
        command = ["train", "--model", MODEL, "--data", data, "--out", tmp_path / str(world), "--epochs=1",
                   "--batch_size=16", "--micro_batch=1", "--dtype=float32", "--max_length=256"]
        done = launch(tmp_path, world, [command], after=report, timeout=600)
        assert done.returncode == 0, done.stderr[-3000:]
        seconds[world] = time.perf_counter() - began
        peaks[world] = max(int(line.split()[1]) / 1024 for line in done.stdout.splitlines() if line.startswith("peak"))
    with capsys.disabled():
        print(f"\npeak of a process: {peaks[1]:.0f} and {peaks[2]:.0f} MiB, {peaks[2] / peaks[1]:.2f}; "
              f"time of the command: {seconds[2] / seconds[1]:.2f}")
    assert peaks[2] < 0.7 * peaks[1]


@needs_expected
@torch.no_grad()
def test_expected_continuations():
    """Greedy tokens from BOS and a prompt without template, and their text."""
    lm, tokenizer = load_model(MODEL, torch.float32), Tokenizer(MODEL, Config.read(MODEL))
    for case in json.loads((MODEL / "expected.json").read_text())["cases"]:
        ids = [tokenizer.bos, *tokenizer.encode(case["prompt"])] if case["prompt"] else [tokenizer.bos]
        cache = new_cache(lm.config, 1, len(case["ids"]), torch.float32, "cpu")
        x, _ = lm(torch.tensor([ids]), cache=cache, at=torch.tensor([len(ids) - 1]))
        while len(ids) < len(case["ids"]):
            ids.append(lm.logits(x[0, -1]).argmax().item())
            x, _ = lm(torch.tensor([ids[-1:]]), positions=torch.tensor([[len(ids) - 1]]), cache=cache)
        assert ids == case["ids"] and tokenizer.decode(ids) == case["text"]


@pytest.mark.skipif(not TOKENIZERS, reason="real tokenizers are too large to ship: set TOKENIZERS")
def test_templates(tmp_path):
    """Ids, connection position and end of turn of every expected prompt."""
    for case in json.loads((TOKENIZERS / "expected.json").read_text()):
        folder = tmp_path / case["tokenizer"]
        if not folder.exists():
            folder.mkdir()
            for file in (TOKENIZERS / case["tokenizer"]).iterdir():
                (folder / file.name).symlink_to(file.resolve())
            (folder / "config.json").write_text("{}")
            config = SimpleNamespace(vocab_size=10 ** 6, cctuning={}, eos_token_ids=(), bos_token_id=None)
            tokenizer = Tokenizer(folder, config, "llama2" if case["template"] == "llama2" else None)
        assert tokenizer.template == case["template"] and tokenizer.prompt(case["text"]) == case["ids"], case
        assert (tokenizer.connection_index, tokenizer.end_of_turn) == (case["connection_index"], case["end_of_turn"])
