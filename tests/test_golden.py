"""Expected values, computed by transformers and by an implementation that was checked against the paper's own code.

GOLDEN=DIR points at another folder of such checkpoints, of any width, depth and seed; tests/golden/README.md says what
each tensor is.
"""
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cctuning import Batch, CCTuning, MatrixSums
from model import load_model, new_cache

GOLDEN = Path(os.environ.get("GOLDEN", Path(__file__).parent / "golden"))
FOLDERS = {path.parent: load_file(path) for path in sorted(GOLDEN.glob("*/expected.safetensors"))}
FORWARD = [pytest.param(f, id=f.name) for f, expected in FOLDERS.items() if "greedy" in expected]
CC = [pytest.param(f, id=f.name) for f, expected in FOLDERS.items() if "decision_maker" in expected]


def test_there_are_golden_folders():
    """Catches a GOLDEN that points nowhere: the parametrised tests below would then pass by being empty."""
    assert len(FORWARD) + len(CC) == len(FOLDERS) > 0


def relative(found, expected):
    return ((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30)).item()


def greedy(lm, logits, lengths, cache, count):
    """`count` greedy tokens after a prefill, without stopping."""
    tokens = []
    for i in range(count):
        tokens.append(logits.argmax(-1))
        x, _ = lm(tokens[-1][:, None], positions=(lengths + i)[:, None], cache=cache)
        logits = lm.logits(x[:, -1])
    return torch.stack(tokens, 1)


@pytest.mark.parametrize("folder", FORWARD)
@torch.no_grad()
def test_forward(folder):
    """Catches attention that sees padding or what follows, a wrong rotary frequency or pairing, a bias forgotten, a
    head tied or not, a last layer that takes another token's query, a cache row written at the wrong position."""
    lm, expected = load_model(folder, torch.float32), FOLDERS[folder]
    ids, lengths = expected["input_ids"], expected["lengths"]
    logits = lm.logits(lm(ids)[0])
    real = torch.arange(ids.shape[1]) < lengths[:, None]
    assert (logits - expected["logits"])[real].abs().max() < 1e-4
    count = expected["greedy"].shape[1]
    cache = new_cache(lm.config, len(ids), ids.shape[1] + count, torch.float32, "cpu")
    x, _ = lm(ids, cache=cache, at=lengths - 1)
    assert greedy(lm, lm.logits(x[:, -1]), lengths, cache, count).equal(expected["greedy"])


def load_cc(folder):
    cc = CCTuning(load_model(folder, torch.float32))
    cc.decision_maker.weight.data = FOLDERS[folder]["decision_maker"].clone()
    return cc, FOLDERS[folder]


@pytest.mark.parametrize("english_grad", [False, True])
@pytest.mark.parametrize("folder", CC)
def test_training_step(folder, english_grad):
    """Catches fusion at the wrong token, row or layer, logits of the wrong positions, a graph through the English pass
    where there is none to be (or none where there is), and a straight-through estimator without its gradient."""
    cc, expected = load_cc(folder)
    batch = Batch(expected["input_ids"], expected["labels"], expected["prompt_lengths"] - 1,
                  expected["english_ids"], expected["english_lengths"] - 1)
    with torch.no_grad():
        activations = cc.activations(batch.english_ids, batch.english_position)
        _, logits = cc.select(activations, batch.ids, batch.position)
    assert relative(activations, expected["english_activations"]) < 1e-4
    assert relative(logits, expected["decision_logits"]) < 1e-4
    assert (logits + expected["gumbel_noise"]).argmax(-1).equal(expected["selected_layer"])

    loss = cc(batch, noise=expected["gumbel_noise"], english_grad=english_grad) / (batch.labels != -100).sum()
    loss.backward()
    case = "english_grad" if english_grad else "english_detached"
    assert abs(loss.item() - expected[f"{case}.loss"].item()) < 1e-5
    found = {"decision_maker": cc.decision_maker.weight.grad, **{n: p.grad for n, p in cc.lm.named_parameters()}}
    worst = {key: relative(found[key.removeprefix(f"{case}.grad.")], value)
             for key, value in expected.items() if key.startswith(f"{case}.grad.")}
    assert max(worst.values()) < 1e-4, max(worst.items(), key=lambda item: item[1])


@pytest.mark.parametrize("case", ["matrix.full_rank", "matrix.rank_deficient"])
@pytest.mark.parametrize("folder", CC)
def test_transform_matrix(folder, case):
    """Catches sums over the wrong axis, X and Y swapped, and a solver that blows up or is not of least norm when
    rank-deficient."""
    cc, expected = load_cc(folder)
    with torch.no_grad():
        x, y = (cc.activations(expected[f"{case}.{side}_ids"], expected[f"{case}.{side}_lengths"] - 1)
                for side in ("source", "english"))
    sums = MatrixSums(["shared"], cc.lm.config.hidden_size)
    for part in torch.arange(x.shape[1]).split(7):  # as training does
        sums.add(x[:, part], y[:, part], ["shared"] * len(part))
    matrix = sums.solve()["shared"]
    assert relative(matrix, expected[f"{case}.solution"]) < 1e-4
    residual = (x.double() @ matrix.double() - y.double()).square().mean()
    assert abs(residual - expected[f"{case}.residual_mse"]) < 1e-4 * y.double().square().mean()


@pytest.mark.parametrize("folder", CC)
@torch.no_grad()
def test_inference(folder):
    """Catches a matrix applied from the wrong side, a cache that keeps what the connection changed, a choice that is
    not the argmax, and a connection that leaks when it is off."""
    cc, expected = load_cc(folder)
    cc.matrices["shared"] = expected["matrix.full_rank.solution"].float()
    ids, lengths, tokens = (expected[f"inference.{k}"] for k in ("input_ids", "lengths", "greedy"))
    cache = new_cache(cc.lm.config, len(ids), ids.shape[1] + tokens.shape[1], torch.float32, "cpu")
    logits, decision = cc.prefill(ids, lengths, -1, cache, "matrix", ["shared"] * len(ids))
    assert decision.argmax(-1).equal(expected["inference.selected_layer"])
    assert (logits - expected["inference.first_logits"]).abs().max() < 1e-4
    assert greedy(cc.lm, logits, lengths, cache, tokens.shape[1]).equal(tokens)
    plain, _ = cc.prefill(ids, lengths, -1, torch.zeros_like(cache), "none")
    assert (plain - expected["inference.first_logits_unconnected"]).abs().max() < 1e-4
