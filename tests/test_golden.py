"""Expected values, computed by transformers and by an implementation that was checked against the
paper's own code.

GOLDEN=DIR points at another folder of such checkpoints, of any width, depth and seed;
tests/golden/README.md says what each tensor is.
"""
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import calls
from model import Config, Tokenizer

GOLDEN = Path(os.environ.get("GOLDEN", Path(__file__).parent / "golden"))
FOLDERS = {path.parent: load_file(path) for path in sorted(GOLDEN.glob("*/expected.safetensors"))}
FORWARD = [pytest.param(f, id=f.name) for f, expected in FOLDERS.items() if "greedy" in expected]
PROMPTS = [pytest.param(f, id=f.name) for f in FOLDERS if (f / "prompts.json").exists()]
CC = [pytest.param(f, id=f.name) for f, expected in FOLDERS.items() if "decision_maker" in expected]


def test_there_are_golden_folders():
    """Catches a GOLDEN that points nowhere: without parameters, the tests below would pass unrun."""
    assert len(FORWARD) + len(CC) == len(FOLDERS) > 0


def relative(found, expected):
    return ((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30)).item()


@pytest.mark.parametrize("folder", FORWARD)
@torch.no_grad()
def test_forward(folder):
    """Catches attention to later tokens, a wrong rotary frequency, a missing bias, a cache misplaced."""
    cc, expected = calls.open_model(folder), FOLDERS[folder]
    ids, lengths, tokens = expected["input_ids"], expected["lengths"], expected["greedy"]
    real = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
    assert (calls.logits(cc, ids) - expected["logits"])[real].abs().max() < 1e-4
    assert calls.answer(cc, ids, lengths, tokens.shape[1])[2].equal(tokens)


@pytest.mark.optional
@pytest.mark.parametrize("folder", PROMPTS)
def test_prompts(folder):
    """Catches a byte-level tokenizer given a space after a control token, and a chat template not obeyed."""
    pytest.importorskip("tokenizers", reason="optional package: only tokenizer.json needs it")
    tokenizer = Tokenizer(folder, Config.read(folder))
    for text, (prompt, dialogue) in json.loads((folder / "prompts.json").read_text()).items():
        assert tokenizer.prompt(text) == prompt
        assert prompt + tokenizer.answer("Nairobi") == dialogue
    assert tokenizer.connection_index == -1  # [/INST]: the token before it is the user's


def open_cc(folder, matrix=None):
    expected = FOLDERS[folder]
    return calls.open_model(folder, expected["decision_maker"], matrix and expected[matrix]), expected


@pytest.mark.parametrize("english_grad", [False, True])
@pytest.mark.parametrize("folder", CC)
def test_training_step(folder, english_grad):
    """Catches fusion at another token or layer, logits of other positions, a gradient lost or too many."""
    cc, expected = open_cc(folder)
    ids, labels, position = expected["input_ids"], expected["labels"], expected["prompt_lengths"] - 1
    english = expected["english_ids"], expected["english_lengths"] - 1
    with torch.no_grad():
        activations = calls.activations(cc, *english)
        _, scores = calls.choose(cc, activations, ids, position)
    assert relative(activations, expected["english_activations"]) < 1e-4
    assert relative(scores, expected["decision_logits"]) < 1e-4
    assert (scores + expected["gumbel_noise"]).argmax(-1).equal(expected["selected_layer"])

    loss = calls.loss(cc, ids, labels, position, *english, noise=expected["gumbel_noise"],
                      english_grad=english_grad) / (labels != -100).sum()
    loss.backward()
    case = "english_grad" if english_grad else "english_detached"
    assert abs(loss.item() - expected[f"{case}.loss"].item()) < 1e-5
    found = calls.gradients(cc)
    found["decision_maker"] = found["decision_maker.weight"]
    worst = {key: relative(found[key.removeprefix(f"{case}.grad.")], value)
             for key, value in expected.items() if key.startswith(f"{case}.grad.")}
    assert worst and max(worst.values()) < 1e-4, max(worst.items(), key=lambda item: item[1])


@pytest.mark.parametrize("case", ["matrix.full_rank", "matrix.rank_deficient"])
@pytest.mark.parametrize("folder", CC)
@torch.no_grad()
def test_transform_matrix(folder, case):
    """Catches X and Y swapped, and a solution that is not the least where prompts do not determine it."""
    cc, expected = open_cc(folder)
    x, y = (calls.activations(cc, expected[f"{case}.{side}_ids"], expected[f"{case}.{side}_lengths"] - 1)
            for side in ("source", "english"))
    matrix = calls.fit(x, y)
    assert relative(matrix, expected[f"{case}.solution"]) < 1e-4
    residual = (x.double() @ matrix.double() - y.double()).square().mean()
    assert abs(residual - expected[f"{case}.residual_mse"]) < 1e-4 * y.double().square().mean()


@pytest.mark.parametrize("folder", CC)
@torch.no_grad()
def test_inference(folder):
    """Catches a matrix on the wrong side, a cache from before the connection, a choice by chance."""
    cc, expected = open_cc(folder, "matrix.full_rank.solution")
    ids, lengths, tokens = (expected[f"inference.{k}"] for k in ("input_ids", "lengths", "greedy"))
    logits, scores, found = calls.answer(cc, ids, lengths, tokens.shape[1], connection="matrix")
    assert scores.argmax(-1).equal(expected["inference.selected_layer"])
    assert (logits - expected["inference.first_logits"]).abs().max() < 1e-4
    assert found.equal(tokens)
    plain, _, _ = calls.answer(cc, ids, lengths, 1)
    assert (plain - expected["inference.first_logits_unconnected"]).abs().max() < 1e-4
