"""The method. Start with test_worked_by_hand: every number of the method, checked with a pencil.

Then each step against reference.py, which computes one prompt at a time without a batch or a cache, and
against hooks on transformers (tools/hookpeer.py); then the options of train.py that change the method.
"""
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import calls
from conftest import PAIRS, logged, losses, training, write_checkpoint, write_data
from model import pad
from reference import IGNORED, Reference, answer_ids, falls_short, gumbel, prompt_ids, random_layer

# ---------------------------------------------------------------------------------- worked by hand

def close(found, expected):
    return (found - torch.as_tensor(expected)).abs().max() < 1e-6


@torch.no_grad()
def test_worked_by_hand(tmp_path):
    """Catches rows or layers mixed up, a mean over the wrong axis, no embedding, W on the wrong side."""
    # The model has two layers and two dimensions: token 0 is embedded as (1, 0), token 1 as (0, 1), and
    # all layers add nothing. There are two prompts, A and B. Both are token 1, then token 0, at the
    # connection position p = 1. W_d is the unit matrix.
    cc = calls.open_model(tiny_model(tmp_path), decision_maker=torch.eye(2))
    ids, p = torch.tensor([[1, 0], [1, 0]]), torch.tensor([1, 1])

    # 1. The English pass collects H, a vector for each layer and prompt. Say it found:
    y = torch.tensor([[[4.0, 0], [0, 2]],   # layer 0: A, B
                      [[0.0, 2], [2, 4]]])  # layer 1: A, B

    # 2. The Decision Maker scores the mean over layers plus the embedding at p, (1, 0).
    #    A: (4, 0) and (0, 2) have the mean (2, 1); plus (1, 0): s = (3, 1), so layer 0.
    #    B: (0, 2) and (2, 4) have the mean (1, 3); plus (1, 0): s = (2, 3), so layer 1.
    vectors, scores = calls.choose(cc, y, ids, p)
    assert close(scores, [[3, 1], [2, 3]])
    assert close(vectors, [[4, 0], [2, 4]])
    #    In training, noise is added. A: (3, 1) + (0, 5) = (3, 6), so layer 1. B: (2, 3) + (0, 0), layer 1.
    vectors, scores = calls.choose(cc, y, ids, p, noise=torch.tensor([[0.0, 5], [0, 0]]))
    assert close(scores, [[3, 1], [2, 3]])
    assert close(vectors, [[0, 2], [2, 4]])

    # 3. The Transform Matrix. Say that the prompts' own pass found X:
    x = torch.tensor([[[1.0, 0], [0, 1]],   # layer 0: A, B
                      [[0.0, 1], [1, 0]]])  # layer 1: A, B
    #    X has the rows (1, 0) and (0, 1) twice each: X'X is 2 times the unit matrix, and W = X'Y / 2.
    #    Row 0 of W is the mean of (4, 0) and (2, 4), row 1 the mean of (0, 2) and (0, 2).
    w = calls.fit(x, y)
    assert close(w, [[3, 2], [0, 2]])
    #    A ridge of 1 adds the mean of X'X's diagonal, 2, to that diagonal: W is halved.
    assert close(calls.fit(x, y, ridge=1.0), [[1.5, 1], [0, 1]])
    #    Layer 0: Y - X W is (1, -2), (0, 0); Y about its mean (2, 1): (2, -1), (-2, 1). R^2 = 1 - 5/10.
    #    Layer 1: Y - X W is (0, 0), (-1, 2); Y about its mean (1, 3): (-1, -1), (1, 1). R^2 = 1 - 5/4.
    assert close(calls.r_squared(w, x, y), [0.5, -0.25])

    # 4. Inference: H W takes the place of the English H. A: (3, 2) and (0, 2); B: (0, 2) and (3, 2).
    #    Both have the mean (1.5, 2); plus (1, 0): s = (2.5, 2), so layer 0.
    vectors, scores = calls.choose(cc, calls.transform(w, x), ids, p)
    assert close(scores, [[2.5, 2], [2.5, 2]])
    assert close(vectors, [[3, 2], [0, 2]])

    # 5. Fusion: at p the model has (1, 0) plus the vector, (4, 2) for A and (1, 2) for B; before p, (0, 1).
    #    The last norm divides (a, b) by sqrt((a^2 + b^2) / 2), and the head is the unit matrix.
    logits = calls.logits(cc, ids, vectors, p)
    assert close(logits[0, 1] * 10 ** 0.5, [4, 2])
    assert close(logits[1, 1] * 2.5 ** 0.5, [1, 2])
    assert close(logits[:, 0] * 0.5 ** 0.5, [[0, 1], [0, 1]])


def tiny_model(folder):
    """L = 2, d = 2, V = 2. Embedding and head are unit matrices, norms 1, all else 0."""
    sizes = {"vocab_size": 2, "hidden_size": 2, "intermediate_size": 2, "num_hidden_layers": 2,
             "num_attention_heads": 1, "num_key_value_heads": 1, "rms_norm_eps": 1e-12}
    write_checkpoint(folder, **sizes)
    weights = load_file(folder / "model.safetensors")
    for name, weight in weights.items():
        is_unit = name in ("model.embed_tokens.weight", "lm_head.weight")
        weight.copy_(torch.eye(2) if is_unit else torch.full_like(weight, float("norm" in name)))
    save_file(weights, folder / "model.safetensors")
    return folder


# -------------------------------------------------------------------------- against reference.py

PROMPTS = [[1, 5, 9, 30, 200, 7], [1, 400, 3, 3], [1, 8, 8, 8, 90, 17, 300, 12, 44]]
ENGLISH = [[1, 33, 34, 35, 36], [1, 77, 78, 79], [1, 91, 92, 93, 94, 95, 96]]
ANSWERS = [[20, 21, 2], [30, 2], [40, 41, 42, 43, 44, 45, 2]]
NOISE = torch.tensor([[0.0, 0, 4, 0], [4, 0, 0, 0], [0, 0, 0, 4]])  # draws layers 2, 0 and 3


@pytest.fixture(scope="module")
def connected(tmp_path_factory):
    """A folder whose rows choose different layers, and whose matrix matters."""
    folder = write_checkpoint(tmp_path_factory.mktemp("connected") / "model")
    generator = torch.Generator().manual_seed(6)
    decision_maker = 0.1 * torch.randn(4, 48, generator=generator)  # small: softmax does not saturate
    matrix = 2 * torch.randn(48, 48, generator=generator)
    save_file({"decision_maker.weight": decision_maker, "transform_matrix": matrix},
              folder / "cctuning.safetensors")
    return folder


def training_batch(index):
    """Ids and labels (B, T), p (B,) by an index from the prompts' ends; English ids (B, Te) and p (B,)."""
    rows = [prompt + answer for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)]
    ids, labels = pad(rows)[0], torch.full((len(rows), max(map(len, rows))), IGNORED)
    for i, (prompt, answer) in enumerate(zip(PROMPTS, ANSWERS, strict=True)):
        labels[i, len(prompt):len(prompt) + len(answer)] = torch.tensor(answer)
    english, english_lengths = pad(ENGLISH)
    return ids, labels, pad(PROMPTS)[1] + index, english, english_lengths + index


@pytest.mark.parametrize("index", [-1, -3])
@pytest.mark.parametrize("english_grad", [False, True])
def test_training_equals_the_reference(connected, english_grad, index):
    """Catches the argmax in place of the drawn layer, another token's activations, any wrong gradient."""
    cc, reference = calls.open_model(connected), Reference(connected)
    loss = calls.loss(cc, *training_batch(index), noise=NOISE, english_grad=english_grad)
    loss.backward()
    expected = sum(reference.connected_loss(p, e, a, index, n, english_grad)
                   for p, e, a, n in zip(PROMPTS, ENGLISH, ANSWERS, NOISE, strict=True))
    expected.backward()
    assert abs(loss - expected) < 1e-4 * expected
    wanted = {name: tensor.grad for name, tensor in reference.tensors.items() if name != "transform_matrix"}
    compare_gradients(calls.gradients(cc), wanted)


def compare_gradients(found, wanted):
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert (found[name] - gradient).abs().max() < 1e-4 * gradient.abs().max(), name


@torch.no_grad()
@pytest.mark.parametrize("index", [-1, -2, -3])
@pytest.mark.parametrize("connection", ["matrix", "english", "none"])
def test_answering_equals_full_passes(connected, index, connection):
    """Catches tokens after p computed without the connection, and logits of another token than the last."""
    cc, reference = calls.open_model(connected), Reference(connected)
    first, scores, found = calls.answer(cc, *pad(PROMPTS), 6, index, connection, pad(ENGLISH))
    for i, (prompt, english) in enumerate(zip(PROMPTS, ENGLISH, strict=True)):
        vector = None
        if connection != "none":
            vector = reference.vector(prompt, index, english if connection == "english" else None)
        logits, _ = reference.forward(prompt, vector, len(prompt) + index)
        assert (first[i] - logits[-1]).abs().max() < 1e-3
        assert falls_short(reference, prompt, found[i].tolist(), vector, index) < 1e-3
    if connection != "none":
        assert len(set(scores.argmax(-1).tolist())) > 1  # else the choice would not be tested


@torch.no_grad()
def test_matrix_is_applied_in_float32():
    """Catches a product in bfloat16 in a bfloat16 run."""
    generator = torch.Generator().manual_seed(1)
    activations, matrix = (torch.randn(size, generator=generator) for size in ((4, 3, 48), (48, 48)))
    with torch.autocast("cpu", torch.bfloat16):
        found = calls.transform(matrix, activations)
    assert (found - activations @ matrix).abs().max() < 1e-4


def test_least_squares():
    """Catches a ridge that depends on scale or number of prompts, a float32 solution, not the least norm."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(5, 6, 8, generator=generator) for _ in range(2))
    rows, targets = x.flatten(0, 1).double(), y.flatten(0, 1).double()
    penalty = 0.1 * rows.square().sum() / 8 * torch.eye(8)
    expected = torch.linalg.solve(rows.T @ rows + penalty, rows.T @ targets)
    for own, english in ((x, y), (10 * x, 10 * y), (x.repeat(1, 3, 1), y.repeat(1, 3, 1))):
        assert (calls.fit(own, english, 0.1) - expected).abs().max() < 1e-5
    sizes = torch.logspace(0, -4, 8)  # activations have a few huge directions
    expected = torch.linalg.lstsq(rows * sizes, targets).solution
    assert ((calls.fit(x * sizes, y) - expected).abs() * sizes[:, None]).max() < 1e-5
    x[..., 3] = x[..., 5]
    expected = torch.linalg.pinv(x.flatten(0, 1).double()) @ targets
    assert (calls.fit(x, y) - expected).abs().max() < 1e-5


# ------------------------------------------------------------------- against hooks on transformers

@pytest.mark.optional
@pytest.mark.parametrize("english_grad", [False, True])
def test_equals_hooks_on_transformers(connected, english_grad):
    """Catches a mistake that reference.py shares."""
    transformers = pytest.importorskip("transformers", reason="optional package: only compared with")
    from hookpeer import HookedCCTuning
    peer = HookedCCTuning(transformers.AutoModelForCausalLM.from_pretrained(connected))
    saved = load_file(connected / "cctuning.safetensors")
    peer.dm.weight.data = saved["decision_maker.weight"]

    cc, batch = calls.open_model(connected), training_batch(-2)
    loss = calls.loss(cc, *batch, noise=NOISE, english_grad=english_grad)
    loss = loss / (batch[1] != IGNORED).sum()
    loss.backward()
    expected, _, scores, _ = peer.loss(*batch, NOISE, english_grad)
    expected.backward()
    assert abs(loss - expected) < 1e-4 and (scores + NOISE).argmax(-1).tolist() == [2, 0, 3]
    wanted = {name.removeprefix("hf."): p.grad for name, p in peer.named_parameters()}
    wanted["decision_maker.weight"] = wanted.pop("dm.weight")
    compare_gradients(calls.gradients(cc), wanted)

    ids, lengths = pad(PROMPTS)
    logits, _, chosen = peer.prefill(ids, lengths - 2, saved["transform_matrix"], torch.zeros(4))
    with torch.no_grad():
        found, scores, _ = calls.answer(cc, ids, lengths, 1, -2, "matrix")
    assert (found - logits[torch.arange(3), lengths - 1]).abs().max() < 1e-3
    assert scores.argmax(-1).equal(chosen.argmax(-1))


# -------------------------------------------------------------------------- through the scripts

MANY = PAIRS + [(f"swali {i}?", f"question {3 * i}?", "jibu", "sw") for i in range(18)]


@pytest.fixture
def one_step(ran, tmp_path):
    """one_step(model, name, **options): the result of one step over MANY that changes no weight."""
    data, size = write_data(tmp_path / "data.jsonl", MANY), len(MANY)

    def call(model, name="out", **options):
        options = {"lr": 0, "epochs": 1, "matrix_prompts": 1, **options}
        ran(*training(model, data, tmp_path / name, batch_size=size, micro_batch=size, **options))
        return tmp_path / name
    return call


def reference_loss(folder, vector_of):
    """Mean loss per answer token of MANY. What is fused: vector_of(English H (L, d), number, prompt ids)."""
    reference, total, count = Reference(folder), 0, 0
    for i, (prompt, english, answer, _) in enumerate(MANY):
        (prompt, index, _), (english, _, _) = prompt_ids(folder, prompt), prompt_ids(folder, english)
        answer = answer_ids(folder, answer)
        vector = vector_of(reference.activations(english, index), i, prompt)
        total += reference.loss(prompt, answer, vector, index).item()
        count += len(answer)
    return total / count


@pytest.mark.parametrize("source, explained, vector_of", ids=["2", "mean", "random"], argvalues=[
    (2, ": from layer 2; probabilities 0.00 0.00 1.00 0.00", lambda h, i, prompt: h[2]),
    ("mean", "]", lambda h, i, prompt: h.mean(0)),
    ("random", ": from layer", lambda h, i, prompt: h[gumbel(3, 0, i, 4).argmax()])])
def test_layer_ablations(connected, one_step, ran, source, explained, vector_of):
    """Catches a layer chosen by the old Decision Maker, one drawn for a batch, a choice lost in a new fit."""
    out = one_step(connected, source_layer=source, seed=3)
    assert abs(losses(out)[0] - reference_loss(connected, vector_of)) < 1e-4
    for folder in (out, one_step(out, "again", epochs=0)):
        assert json.loads((folder / "config.json").read_text())["cctuning"]["source_layer"] == source
        assert load_file(folder / "cctuning.safetensors").keys() == {"transform_matrix"}
    text = ran("infer", "--model", out, "--prompt=Nini?", "--explain", "--max_new_tokens=1")
    assert text.startswith(f"[connection matrix{explained}")


def test_random_layers_follow_from_the_prompt(checkpoint, one_step, ran, tmp_path):
    """Catches a layer drawn without the token at p, with another seed in validation, by batch or padding."""
    folder, data = checkpoint(), tmp_path / "data.jsonl"
    out = one_step(folder, source_layer="random", seed=3, eval_data=data)
    expected = reference_loss(folder, lambda h, i, prompt: h[random_layer(prompt, 4, seed=3)])
    assert abs(logged(out, "eval_loss")[-1]["english"] - expected) < 1e-4
    answers = ran("infer", "--model", out, "--input", data, "--explain", "--max_new_tokens=1")
    expected = [random_layer(prompt_ids(folder, prompt)[0], 4) for prompt, *_ in MANY]
    assert [json.loads(line)["layer"] for line in answers.splitlines()] == expected


@pytest.mark.parametrize("layer", [1, 3])
def test_fusion_layer(checkpoint, one_step, run, tmp_path, layer):
    """Catches a --fusion_layer that training or inference ignores, and one that changes after training."""
    out = one_step(checkpoint(), fusion_layer=layer, source_layer=0)
    one_step(out, "same", epochs=0, fusion_layer=layer)
    for other in (0, 4):
        code, _, err = run(*training(out, tmp_path / "data.jsonl", tmp_path / "next", fusion_layer=other))
        assert code == 2 and "--fusion_layer" in err
    assert json.loads((out / "config.json").read_text())["cctuning"]["fusion_layer"] == layer
    assert abs(losses(out)[0] - reference_loss(out, lambda h, i, prompt: h[0])) < 1e-4  # reads config.json
    cc, reference = calls.open_model(out), Reference(out)
    with torch.no_grad():
        first, _, found = calls.answer(cc, *pad(PROMPTS), 4, -2, "matrix")
    for i, prompt in enumerate(PROMPTS):
        activations = (reference.activations(prompt, -2) @ reference.tensors["transform_matrix"]).detach()
        logits, _ = reference.forward(prompt, activations[0], len(prompt) - 2)
        assert (first[i] - logits[-1]).abs().max() < 1e-3
        assert falls_short(reference, prompt, found[i].tolist(), activations[0], -2) < 1e-3


def test_a_new_decision_maker(checkpoint, one_step):
    """Catches a start without seed or initializer_range, and a model of an ablation that cannot get one."""
    mean = one_step(checkpoint(), "mean", source_layer="mean")
    wide, starts = checkpoint(initializer_range=0.1), []
    for model, seed in ((checkpoint(), 1), (mean, 1), (checkpoint(), 2), (wide, 1)):
        out = one_step(model, str(len(starts)), seed=seed, source_layer="decision_maker")
        starts.append(load_file(out / "cctuning.safetensors")["decision_maker.weight"])
        assert abs(starts[-1].std() / (0.1 if model == wide else 0.02) - 1) < 0.15
    assert starts[0].equal(starts[1]) and not starts[0].equal(starts[2])
