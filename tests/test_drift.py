"""tests/tools/drift.py at toy size."""
import sys

import pytest
import torch
from conftest import ROOT
from model import KVCache, pad

sys.path.insert(0, str(ROOT / "tests" / "tools"))
import drift  # noqa: E402

pytestmark = pytest.mark.slow

def test_two_runs_print_the_same(monkeypatch, capsys):
    """Bug: a base or an order without a seed, so that nobody can repeat the figures."""
    monkeypatch.setattr(sys, "argv", "drift.py --toy --bases 0 --seeds 0".split())
    said = [(drift.main(), capsys.readouterr().out)[1] for _ in range(2)]
    assert said[0] == said[1] and all(f"| {name} |" in said[0] for name in drift.METHODS)


def test_scores_are_those_of_prefill():
    """Bug: a second pass fused at another token or layer than at inference, or one that sees the answers."""
    world = drift.World(drift.TOY, 0)
    base, _ = drift.train_base(world, 0)
    cc, samples = drift.tune(base, world, 0, lr=3e-3, source=1, epochs=3), world.samples("train")
    ids, lengths = pad([s.ids[:s.prompt_length] for s in samples])
    cache = KVCache(base.config, len(ids), ids.shape[1], torch.float32, "cpu")
    logits, _ = cc.prefill(ids, lengths, -1, cache, "english", pad([s.english_ids for s in samples]))
    right = 100 * (logits.argmax(-1) == torch.tensor([s.ids[-1] for s in samples])).float().mean().item()
    found = drift.evaluate(base, cc, world, drift.collate(samples, -1), 0)
    assert found["real English"] == right > found["none"]
