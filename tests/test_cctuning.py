"""The method: one step worked by hand, then each step against a plain reference (reference.py) and a
peer (hookpeer.py).

The golden values (test_golden.py) have the connection at the last token only, and choices that no noise
changes.
"""
import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

import calls
from conftest import (CONFIG, PAIRS, json_lines, losses, tensors, training, write_benchmark, write_checkpoint,
                      write_connection, write_data)
from hookpeer import HookedCCTuning
from reference import IGNORED, Reference, answer_ids, falls_short, gumbel, prompt_ids

PROMPTS = [[1, 5, 9, 30, 200, 7], [1, 400, 3, 3], [1, 8, 8, 8, 90, 17, 300, 12, 44]]
ENGLISH = [[1, 33, 34, 35, 36], [1, 77, 78, 79], [1, 91, 92, 93, 94, 95, 96]]
ANSWERS = [[20, 21, 2], [30, 2], [40, 41, 42, 43, 44, 45, 2]]
NOISE = torch.tensor([[0.0, 0, 4, 0], [4, 0, 0, 0], [0, 0, 0, 4]])  # draws layers 2, 0 and 3


def padded(rows):
    """(B, T) with 0 on the right, and lengths (B,)."""
    lengths = [len(row) for row in rows]
    return torch.tensor([row + [0] * (max(lengths) - len(row)) for row in rows]), torch.tensor(lengths)


def close(found, expected):
    return (found - torch.as_tensor(expected)).abs().max() < 1e-6


# ---------------------------------------------------------------------------------- worked by hand

@torch.no_grad()
def test_worked_by_hand(tmp_path):
    """Two layers, two dimensions, two prompts A and B: check every number below with a pencil.

    Catches mixed up rows or layers, a mean over the wrong axis, a forgotten embedding, W on the wrong
    side.
    """
    cc = calls.open_model(tiny_model(tmp_path), decision_maker=torch.eye(2))
    ids, p = torch.tensor([[1, 0], [1, 0]]), torch.tensor([1, 1])  # token 0, embedded as (1, 0), stands at p

    # 1. The English pass collects H, a vector for each layer and prompt.
    y = torch.tensor([[[4.0, 0], [0, 2]],   # layer 0: A, B
                      [[0.0, 2], [2, 4]]])  # layer 1: A, B
    # 2. The Decision Maker scores the mean over layers plus the embedding. W_d is the unit matrix.
    #    A: (4, 0) and (0, 2) have the mean (2, 1); plus (1, 0): s = (3, 1), so layer 0.
    #    B: (0, 2) and (2, 4) have the mean (1, 3); plus (1, 0): s = (2, 3), so layer 1.
    vectors, scores = calls.choose(cc, y, ids, p)
    assert close(scores, [[3, 1], [2, 3]]) and close(vectors, [[4, 0], [2, 4]])
    #    In training, noise is added. A: (3, 1) + (0, 5) = (3, 6), so layer 1. B: (2, 3) + (0, 0), so layer 1.
    vectors, scores = calls.choose(cc, y, ids, p, noise=torch.tensor([[0.0, 5], [0, 0]]))
    assert close(scores, [[3, 1], [2, 3]]) and close(vectors, [[0, 2], [2, 4]])

    # 3. The Transform Matrix. X has the rows (1, 0) and (0, 1) twice each: X'X = 2, and W = X'Y / 2.
    x = torch.tensor([[[1.0, 0], [0, 1]],   # layer 0: A, B
                      [[0.0, 1], [1, 0]]])  # layer 1: A, B
    #    Row 0 of W is the mean of (4, 0) and (2, 4), row 1 the mean of (0, 2) and (0, 2).
    w = calls.fit(x, y)
    assert close(w, [[3, 2], [0, 2]])
    #    A ridge of 1 adds the mean of X'X's diagonal, 2, to that diagonal: W is halved.
    assert close(calls.fit(x, y, ridge=1.0), [[1.5, 1], [0, 1]])
    #    Y - X W is (1, -2), (0, 0) in layer 0. Y about its mean (2, 1): (2, -1), (-2, 1). R^2 = 1 - 5/10.
    #    Y - X W is (0, 0), (-1, 2) in layer 1. Y about its mean (1, 3): (-1, -1), (1, 1). R^2 = 1 - 5/4.
    assert close(calls.r_squared(w, x, y), [0.5, -0.25])

    # 4. Answering: H W takes the place of H. A: (3, 2) and (0, 2); B: (0, 2) and (3, 2).
    #    Both have the mean (1.5, 2); plus (1, 0): s = (2.5, 2), so layer 0.
    vectors, scores = calls.choose(cc, calls.transform(w, x), ids, p)
    assert close(scores, [[2.5, 2], [2.5, 2]]) and close(vectors, [[3, 2], [0, 2]])
    # 5. Fusion. The rest of the model adds nothing: (1, 0) plus the vector is (4, 2) for A, (1, 2) for B.
    #    Before p stands (0, 1), the embedding of token 1. The last norm divides by sqrt((a^2 + b^2) / 2).
    logits = calls.logits(cc, ids, vectors, p)
    assert close(logits[0, 1] * 10 ** 0.5, [4, 2]) and close(logits[1, 1] * 2.5 ** 0.5, [1, 2])
    assert close(logits[:, 0] * 0.5 ** 0.5, [[0, 1], [0, 1]])


def tiny_model(folder):
    """L = 2, d = 2, V = 2. Embeddings and head are unit matrices, the norms' weights are 1, all else is
    0: attention and FFN add nothing."""
    sizes = {"vocab_size": 2, "hidden_size": 2, "intermediate_size": 2, "num_hidden_layers": 2,
             "num_attention_heads": 1, "num_key_value_heads": 1, "rms_norm_eps": 1e-12}
    (folder / "config.json").write_text(json.dumps({**CONFIG, **sizes}))
    weights = {name: torch.eye(2) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    for layer in ("model.layers.0.", "model.layers.1."):
        for name in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up",
                     "mlp.down"):
            weights[f"{layer}{name}_proj.weight"] = torch.zeros(2, 2)
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{layer}{name}.weight"] = torch.ones(2)
    save_file({**weights, "model.norm.weight": torch.ones(2)}, folder / "model.safetensors")
    return folder


# ------------------------------------------------------- against a plain reference, and against a peer

@pytest.fixture(scope="module")
def connected(tmp_path_factory):
    """A folder whose rows choose different layers, and whose matrix matters."""
    folder = write_checkpoint(tmp_path_factory.mktemp("connected") / "model")
    generator = torch.Generator().manual_seed(6)
    decision_maker, matrix = (torch.randn(rows, 48, generator=generator) for rows in (4, 48))
    save_file({"decision_maker.weight": 0.1 * decision_maker,  # so small that softmax does not saturate
               "transform_matrix": 2 * matrix}, folder / "cctuning.safetensors")
    return folder


def opened(folder):
    """The project's model and the reference's."""
    added = load_file(folder / "cctuning.safetensors")
    cc = calls.open_model(folder, added["decision_maker.weight"], added["transform_matrix"])
    return cc, Reference(folder)


def training_batch(index):
    """Ids and labels (B, T), connection positions (B,), and the English prompts' ids and positions."""
    rows = [prompt + answer for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)]
    ids, labels = padded(rows)[0], torch.full((len(rows), max(map(len, rows))), IGNORED)
    for i, (prompt, answer) in enumerate(zip(PROMPTS, ANSWERS, strict=True)):
        labels[i, len(prompt):len(prompt) + len(answer)] = torch.tensor(answer)
    english, english_lengths = padded(ENGLISH)
    return ids, labels, padded(PROMPTS)[1] + index, english, english_lengths + index


@pytest.mark.parametrize("index", [-1, -3])
@pytest.mark.parametrize("english_grad", [False, True])
def test_training_equals_the_reference(connected, english_grad, index):
    """Catches the argmax in place of the layer drawn by noise, fusion at the last token instead of the
    connection position, English activations of another token, padding in loss or attention, and any
    wrong gradient."""
    cc, reference = opened(connected)
    loss = calls.loss(cc, *training_batch(index), noise=NOISE, english_grad=english_grad)
    loss.backward()
    expected = sum(reference.connected_loss(p, e, a, index, n, english_grad)
                   for p, e, a, n in zip(PROMPTS, ENGLISH, ANSWERS, NOISE, strict=True))
    expected.backward()
    assert abs(loss - expected) < 1e-4 * expected
    found = calls.gradients(cc)
    assert found.keys() == reference.tensors.keys() - {"transform_matrix"}
    for name, gradient in found.items():
        wanted = reference.tensors[name].grad
        assert (gradient - wanted).abs().max() < 1e-4 * wanted.abs().max(), name


def test_two_embedding_lookups_a_step(connected):
    """Catches another look-up of the own-language ids: each makes a gradient of the whole table's size."""
    cc, _ = opened(connected)
    seen = []
    cc.lm.model.embed_tokens.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    calls.loss(cc, *training_batch(-1), noise=NOISE)
    ids, _, _, english, _ = training_batch(-1)
    assert len(seen) == 2 and any(s.equal(ids) for s in seen) and any(s.equal(english) for s in seen)


@torch.no_grad()
def test_validation_equals_the_reference(connected):
    """Catches a connection in plain fine-tuning, and one from the own prompt without its matrix."""
    cc, reference = opened(connected)
    vectors = {"none": [None] * 3, "matrix": [reference.vector(p, -2) for p in PROMPTS],
               "english": [reference.vector(p, -2, e) for p, e in zip(PROMPTS, ENGLISH, strict=True)]}
    for connection, fused in vectors.items():
        expected = sum(reference.loss(p, a, v, -2) for p, a, v in zip(PROMPTS, ANSWERS, fused, strict=True))
        found = calls.loss(cc, *training_batch(-2), connection)
        assert abs(found - expected) < 1e-4 * expected, connection


@torch.no_grad()
@pytest.mark.parametrize("index", [-1, -2, -3])
@pytest.mark.parametrize("connection", ["matrix", "english", "none"])
def test_answering_equals_full_passes(connected, index, connection):
    """Catches tokens after the connection position still computed without the connection (in logits or
    cache), logits of another token than the prompt's last, and rows that depend on each other. At -3, a
    mask of three tokens at other positions in each row, repeated in another order than the query heads."""
    cc, reference = opened(connected)
    first, scores, found = calls.answer(cc, *padded(PROMPTS), 6, index, connection, padded(ENGLISH))
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
    """Catches a ridge that depends on the scale of the activations or the number of prompts, and a
    solution that is not of least norm, noisy in the null space, or computed in float32."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(5, 6, 8, generator=generator) for _ in range(2))
    rows, targets = x.flatten(0, 1).double(), y.flatten(0, 1).double()
    penalty = 0.1 * rows.square().sum() / 8 * torch.eye(8)
    expected = torch.linalg.solve(rows.T @ rows + penalty, rows.T @ targets)
    assert (calls.fit(x, y, 0.1) - expected).abs().max() < 1e-5
    assert (calls.fit(10 * x, 10 * y, 0.1) - expected).abs().max() < 1e-5
    assert (calls.fit(x.repeat(1, 3, 1), y.repeat(1, 3, 1), 0.1) - expected).abs().max() < 1e-5
    sizes = torch.logspace(0, -4, 8)  # activations have a few huge directions
    expected = torch.linalg.lstsq(rows * sizes, targets).solution
    assert ((calls.fit(x * sizes, y) - expected).abs() * sizes[:, None]).max() < 1e-5
    x[..., 3] = x[..., 5]
    expected = torch.linalg.pinv(x.flatten(0, 1).double()) @ targets
    assert (calls.fit(x, y) - expected).abs().max() < 1e-5


@pytest.fixture(scope="module")
def peer(connected):
    """The peer with the same weights, Decision Maker and matrix."""
    transformers = pytest.importorskip("transformers", reason="optional package: only compared with")
    peer = HookedCCTuning(transformers.AutoModelForCausalLM.from_pretrained(connected))
    peer.dm.weight.data = load_file(connected / "cctuning.safetensors")["decision_maker.weight"]
    return peer


@pytest.mark.parametrize("english_grad", [False, True])
def test_training_equals_hooks_on_transformers(connected, peer, english_grad):
    """Catches a mistake shared with the reference: loss and every gradient, by another library."""
    batch = training_batch(-2)
    cc, (_, labels, *_) = opened(connected)[0], batch
    loss = calls.loss(cc, *batch, noise=NOISE, english_grad=english_grad) / (labels != IGNORED).sum()
    loss.backward()
    peer.zero_grad()
    expected, activations, scores, _ = peer.loss(*batch, NOISE, english_grad)
    expected.backward()
    assert abs(loss - expected) < 1e-4 and (scores + NOISE).argmax(-1).tolist() == [2, 0, 3]
    wanted = {name.removeprefix("hf."): p.grad for name, p in peer.named_parameters()}
    wanted["decision_maker.weight"] = wanted.pop("dm.weight")
    found = calls.gradients(cc)
    assert found.keys() == wanted.keys()
    for name, gradient in found.items():
        assert (gradient - wanted[name]).abs().max() < 1e-4 * wanted[name].abs().max(), name


@torch.no_grad()
def test_answering_equals_hooks_on_transformers(connected, peer):
    """Catches the same in answering: logits after a connected prompt, and the chosen layer."""
    ids, lengths = padded(PROMPTS)
    matrix = load_file(connected / "cctuning.safetensors")["transform_matrix"]
    logits, _, chosen = peer.prefill(ids, lengths - 2, matrix, torch.zeros(4))
    found, scores, _ = calls.answer(opened(connected)[0], ids, lengths, 1, -2, "matrix")
    assert (found - logits[torch.arange(3), lengths - 1]).abs().max() < 1e-3
    assert scores.argmax(-1).equal(chosen.argmax(-1))


# ----------------------------------------------------------------------------- through the scripts

MANY = PAIRS + [(f"swali {i}?", f"question {3 * i}?", "jibu", "sw") for i in range(18)]


def first_loss(run, model, out, **options):
    """The loss of one step over all of MANY, of a run that changes no weight."""
    data, size = write_data(out.with_suffix(".jsonl"), MANY), len(MANY)
    code, _, err = run(*training(model, data, out, lr=0, epochs=1, matrix_prompts=1, batch_size=size,
                                 micro_batch=size, **options))
    assert code == 0, err
    return losses(out)[0]


@pytest.mark.parametrize("source_layer", [2, "random", "mean"])
def test_layer_ablations(checkpoint, tmp_path, run, source_layer):
    """Catches a fixed layer overruled by the Decision Maker, one layer drawn for a whole batch, draws at
    inference that depend on batch or padding, a choice lost when the matrix is fitted again, and a Decision
    Maker saved though it does not choose."""
    folder, out, again = checkpoint(), tmp_path / "out", tmp_path / "again"
    found, reference = first_loss(run, folder, out, source_layer=source_layer, seed=3), Reference(folder)
    total = count = 0
    for i, (own, english, answer, _) in enumerate(MANY):
        (own, index, _), (english, _, _) = prompt_ids(folder, own), prompt_ids(folder, english)
        activations, answer = reference.activations(english, index), answer_ids(folder, answer)
        vectors = {2: activations[2], "mean": activations.mean(0), "random": activations[gumbel(3, 0, i, 4).argmax()]}
        total += reference.loss(own, answer, vectors[source_layer], index).item()
        count += len(answer)
    assert abs(found - total / count) < 1e-4
    assert run(*training(out, tmp_path / "out.jsonl", again, epochs=0))[0] == 0
    for model in (out, again):
        assert json.loads((model / "config.json").read_text())["cctuning"]["source_layer"] == source_layer
        assert load_file(model / "cctuning.safetensors").keys() == {"transform_matrix"}
    layers = []
    for size in (1, 4):
        answers = tmp_path / f"{size}.jsonl"
        assert run("infer", "--model", out, "--input", tmp_path / "out.jsonl", "--output", answers,
                   "--explain", "--max_new_tokens=1", "--batch_size", size)[0] == 0
        layers.append([line["layer"] for line in json_lines(answers)])
    assert layers[0] == layers[1]
    if source_layer == "mean":  # of a model with a Decision Maker
        tuned = write_connection(shutil.copytree(folder, tmp_path / "tuned"))
        command = training(tuned, tmp_path / "out.jsonl", again, epochs=0, source_layer="mean", overwrite=True)
        assert run(*command)[0] == 0
        assert load_file(again / "cctuning.safetensors").keys() == {"transform_matrix"}
    assert set(layers[0]) == {2: {2}, "random": {0, 1, 2, 3}, "mean": {None}}[source_layer]


def test_mean_is_explained(checkpoint, tmp_path, run):
    """Catches a mean of all layers shown as a choice of one, and drawn as one in layers.png."""
    first_loss(run, checkpoint(), tmp_path / "out", source_layer="mean")
    code, text, _ = run("infer", "--model", tmp_path / "out", "--prompt=Nini?", "--explain", "--max_new_tokens=1")
    assert code == 0 and text.startswith("[connection matrix: mean of all layers]\n")
    pytest.importorskip("matplotlib", reason="optional package: only for figures")
    data = write_benchmark(tmp_path / "bench", langs=("sw",), items=2)
    assert run("eval", "--model", tmp_path / "out", "--data", data, "--out", tmp_path / "eval",
               "--plot", tmp_path / "figures", "--max_new_tokens=2")[0] == 0
    assert not (tmp_path / "figures" / "layers.png").exists()


@pytest.mark.parametrize("layer", [1, 3])
def test_fusion_layer(checkpoint, tmp_path, run, layer):
    """Catches a --fusion_layer that training ignores, config.json does not keep, or answering does not use:
    fusion in another layer, or too few layers run again."""
    folder, out = shutil.copytree(checkpoint(), tmp_path / "model"), tmp_path / "out"
    config = json.loads((folder / "config.json").read_text())
    found = first_loss(run, folder, out, fusion_layer=layer, source_layer=0)
    (folder / "config.json").write_text(json.dumps({**config, "cctuning": {"fusion_layer": layer}}))
    reference, total, count = Reference(folder), 0, 0
    for own, english, answer, _ in MANY:
        (own, index, _), (english, _, _) = prompt_ids(folder, own), prompt_ids(folder, english)
        answer = answer_ids(folder, answer)
        total += reference.loss(own, answer, reference.activations(english, index)[0], index).item()
        count += len(answer)
    assert abs(found - total / count) < 1e-4
    assert json.loads((out / "config.json").read_text())["cctuning"]["fusion_layer"] == layer
    cc, reference = calls.open_model(out), Reference(out)
    with torch.no_grad():
        first, _, found = calls.answer(cc, *padded(PROMPTS), 4, -2, "matrix")
    for i, prompt in enumerate(PROMPTS):
        activations = (reference.activations(prompt, -2) @ reference.tensors["transform_matrix"]).detach()
        logits, _ = reference.forward(prompt, activations[0], len(prompt) - 2)
        assert (first[i] - logits[-1]).abs().max() < 1e-3
        assert falls_short(reference, prompt, found[i].tolist(), activations[0], -2) < 1e-3


def test_another_fusion_layer_is_refused(checkpoint, tmp_path, run):
    """Catches a Decision Maker that goes on in another layer than it was trained for."""
    first_loss(run, checkpoint(), tmp_path / "out", fusion_layer=1)
    for layer, expected in ((0, 2), (1, 0), (4, 2)):
        code, _, err = run(*training(tmp_path / "out", tmp_path / "out.jsonl", tmp_path / "next", epochs=0,
                                     fusion_layer=layer))
        assert code == expected and ("--fusion_layer" in err) == (expected == 2)
    code, _, err = run("infer", "--model", tmp_path / "out", "--prompt=hi", "--max_new_tokens=1")
    assert code == 0, err


def test_decision_maker_starts_from_the_seed(checkpoint, tmp_path, run):
    """Catches an irreproducible start, or one of another spread than the config's initializer_range."""
    starts, wide = [], checkpoint(initializer_range=0.1)
    for out, seed, spread in (("a", 1, 0.02), ("b", 1, 0.02), ("c", 2, 0.02), ("d", 1, 0.1)):
        first_loss(run, wide if spread == 0.1 else checkpoint(), tmp_path / out, seed=seed)
        starts.append(load_file(tmp_path / out / "cctuning.safetensors")["decision_maker.weight"])
        assert abs(starts[-1].std() / spread - 1) < 0.15
    assert starts[0].equal(starts[1]) and not starts[0].equal(starts[2])


def test_bfloat16_step_has_every_gradient(checkpoint, tmp_path, run):
    """Catches a --dtype bfloat16 computed in float32, and lost gradients: weights cast in the English
    pass under no_grad must not be reused in the own-language pass.

    AdamW's first step moves each weight by the learning rate, against the sign of its gradient.
    """
    folder, data, moved = checkpoint(), write_data(tmp_path / "data.jsonl"), {}
    for dtype in ("float32", "bfloat16"):
        out = tmp_path / dtype
        assert run(*training(folder, data, out, epochs=1, dtype=dtype, matrix_prompts=1))[0] == 0
        moved[dtype] = {name: (tensors(out)[name] - t).flatten() for name, t in tensors(folder).items()}
    assert losses(tmp_path / "float32")[0] != losses(tmp_path / "bfloat16")[0]
    for name, exact in moved["float32"].items():
        assert F.cosine_similarity(exact, moved["bfloat16"][name], dim=0) > 0.8, name
