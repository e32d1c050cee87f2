"""The method: what the golden values do not cover."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cctuning import Batch, CCTuning, MatrixSums, gumbel_noise, least_squares, load_cctuning, r_squared
from model import load_model, new_cache, pad
from train import Workers

PROMPTS = [[1, 5, 9, 30, 200, 7], [1, 400, 3, 3], [1, 8, 8, 8, 90, 17, 300, 12, 44]]
ENGLISH = [[1, 33, 34, 35, 36], [1, 77, 78, 79], [1, 91, 92, 93, 94, 95, 96]]


@pytest.fixture
def cc(checkpoint):
    cc = CCTuning(load_model(checkpoint()), seed=5)
    cc.decision_maker.weight.data *= 50  # so that rows choose different layers
    for seed, name in enumerate(("shared", "sw", "hi")):
        cc.matrices[name] = 2 * torch.randn(48, 48, generator=torch.Generator().manual_seed(seed))
    return cc


@torch.no_grad()
@pytest.mark.parametrize("index", [-1, -2, -3])
@pytest.mark.parametrize("connection", ["matrix", "english"])
def test_recompute_equals_two_full_passes(cc, index, connection):
    """Catches tokens after the connection position that keep what they read before the connection, in the logits or in
    the cache."""
    ids, lengths = pad(PROMPTS)
    cache = new_cache(cc.lm.config, 3, 16, torch.float32, "cpu")
    logits, decision = cc.prefill(ids, lengths, index, cache, connection, ["shared"] * 3, pad(ENGLISH))
    if connection == "matrix":
        activations = cc.transform(cc.activations(ids, lengths + index), ["shared"] * 3)
    else:
        english, english_lengths = pad(ENGLISH)
        activations = cc.activations(english, english_lengths + index)
    vector, full_decision = cc.select(activations, ids, lengths + index)
    full = cc.lm.logits(cc.lm(ids, fused=(vector, lengths + index))[0])
    assert (decision - full_decision).abs().max() < 1e-4
    assert (logits - full[torch.arange(3), lengths - 1]).abs().max() < 1e-4
    token = torch.tensor([[17], [18], [19]])
    cached = cc.lm.logits(cc.lm(token, positions=lengths[:, None], cache=cache)[0])[:, 0]
    longer = F.pad(ids, (0, 1)).scatter(1, lengths[:, None], token)
    uncached = cc.lm.logits(cc.lm(longer, fused=(vector, lengths + index))[0])[torch.arange(3), lengths]
    assert (cached - uncached).abs().max() < 1e-4


@torch.no_grad()
def test_unconnected_loss(cc):
    """Catches a connection that leaks into plain fine-tuning, and a loss over other tokens than the answer's."""
    ids, lengths = pad(PROMPTS)
    answers = ids.masked_fill(torch.arange(ids.shape[1]) != lengths[:, None] - 1, -100)  # each row's last token
    loss = cc(Batch(ids, answers, lengths - 2, *pad(ENGLISH)), "none")
    logits = cc.lm.logits(cc.lm(ids)[0])[torch.arange(3), lengths - 2]
    assert abs(loss - F.cross_entropy(logits, ids[torch.arange(3), lengths - 1], reduction="sum")) < 1e-4


@torch.no_grad()
def test_a_row_gets_its_own_matrix(cc):
    """Catches per-language matrices that are handed to the wrong rows, and a product in bfloat16 in a bfloat16 run."""
    activations = torch.randn(4, 3, 48, generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", torch.bfloat16):
        found = cc.transform(activations, ["hi", "sw", "hi"])
    for i, name in enumerate(("hi", "sw", "hi")):
        assert (found[:, i] - activations[:, i] @ cc.matrices[name]).abs().max() < 1e-4


def test_bfloat16_step_has_every_gradient(cc):
    """Catches weights that the English pass cast under no_grad being reused, without their gradient, in the
    own-language pass."""
    ids, lengths = pad(PROMPTS)
    english, english_lengths = pad(ENGLISH)
    labels = ids.masked_fill(torch.arange(ids.shape[1]) < 2, -100)
    batch = Batch(ids, labels, torch.ones_like(lengths), english, english_lengths - 1)
    grads = {}
    for dtype in (torch.float32, torch.bfloat16):
        cc.zero_grad()
        with Workers(0, 1, torch.device("cpu"), dtype).autocast():
            loss = cc(batch, noise=gumbel_noise(0, 0, range(3), 4))
        loss.backward()
        grads[dtype] = {name: p.grad.clone() for name, p in cc.named_parameters()}
    for name, exact in grads[torch.float32].items():
        assert F.cosine_similarity(exact.flatten(), grads[torch.bfloat16][name].flatten(), dim=0) > 0.9, name


def test_gumbel_noise():
    """Catches noise that depends on which samples share a batch, repeats from step to step, or is not Gumbel."""
    whole = gumbel_noise(1, 7, [3, 8, 2], 4)
    assert whole[1:].equal(torch.cat([gumbel_noise(1, 7, [8], 4), gumbel_noise(1, 7, [2], 4)]))
    assert not whole.equal(gumbel_noise(1, 8, [3, 8, 2], 4)) and not whole.equal(gumbel_noise(2, 7, [3, 8, 2], 4))
    many = gumbel_noise(0, 0, range(5000), 4)
    assert abs(many.mean() - np.euler_gamma) < 0.03 and abs(many.var() - np.pi ** 2 / 6) < 0.06


def test_matrix_sums():
    """Catches sums that depend on the batching, languages that leak into one another, and a shared matrix that misses
    one."""
    rng = torch.Generator().manual_seed(0)
    x, y = (torch.randn(4, 60, 12, generator=rng) for _ in range(2))
    langs = ["sw", "hi", "de"] * 20
    sums = MatrixSums(["de", "hi", "sw"], 12)
    for part in torch.arange(60).split(11):
        sums.add(x[:, part], y[:, part], [langs[i] for i in part])
    found = sums.solve()
    assert found.keys() == {"shared", "de", "hi", "sw"}
    for name, matrix in found.items():
        rows = [i for i in range(60) if name in ("shared", langs[i])]
        expected = torch.linalg.lstsq(x[:, rows].flatten(0, 1).double(), y[:, rows].flatten(0, 1).double()).solution
        assert (matrix - expected).abs().max() < 1e-5


def test_least_squares():
    """Catches a ridge that depends on the scale of the activations, and a solution that is not of least norm or has
    noise in the null space."""
    rng = torch.Generator().manual_seed(0)
    x, y = (torch.randn(30, 8, generator=rng, dtype=torch.float64) for _ in range(2))
    expected = torch.linalg.solve(x.T @ x + 0.1 * (x * x).sum() / 8 * torch.eye(8, dtype=torch.float64), x.T @ y)
    assert (least_squares(x.T @ x, x.T @ y, 0.1) - expected).abs().max() < 1e-10
    assert (least_squares(100 * x.T @ x, 100 * x.T @ y, 0.1) - expected).abs().max() < 1e-10
    x[:, 3] = x[:, 5]
    expected = torch.linalg.pinv(x) @ y
    assert (least_squares(x.T @ x, x.T @ y) - expected).abs().max() < 1e-8


def test_r_squared():
    """Catches layers pooled, and an R^2 against zero instead of the mean."""
    x = torch.randn(3, 50, 6, generator=torch.Generator().manual_seed(0))
    y = x.clone()
    y[2] += 100.0 + 3 * torch.randn(50, 6, generator=torch.Generator().manual_seed(1))
    found = r_squared(torch.eye(6), x, y)
    assert (found[:2] - 1).abs().max() < 1e-6 and found[2] < 0
    expected = 1 - (y[2] - x[2]).square().sum() / (y[2] - y[2].mean(0)).square().sum()
    assert abs(found[2] / expected - 1) < 1e-4


def test_decision_maker_starts_from_the_seed(checkpoint):
    """Catches a start that is not reproducible, or of another spread than the config's initializer_range."""
    folder = checkpoint(hidden_size=480, num_attention_heads=4)
    one, again, other = (load_cctuning(folder, seed=seed).decision_maker.weight for seed in (1, 1, 2))
    assert one.equal(again) and not one.equal(other) and abs(one.std() - 0.02) < 0.002


@torch.no_grad()
def test_layer_ablations(checkpoint):
    """Catches a fixed layer that the Decision Maker overrules, one layer drawn for a whole batch, and draws at
    inference that depend on the padding."""
    cc = load_cctuning(checkpoint(), torch.float32)
    generator = torch.Generator().manual_seed(0)
    activations, ids = torch.randn(4, 40, 48, generator=generator), torch.randint(3, 400, (40, 9), generator=generator)
    position, noise = torch.full((40,), 6), gumbel_noise(0, 0, range(40), 4)
    cc.source_layer = 2
    vector, logits = cc.select(activations, ids, position, noise)
    assert torch.equal(vector, activations[2]) and torch.equal(logits.softmax(-1)[:, 2], torch.ones(40))
    cc.source_layer = "random"
    for given in (noise, None):
        vector, logits = cc.select(activations, ids, position, given)
        chosen = logits.argmax(-1)
        assert torch.equal(vector, activations[chosen, torch.arange(40)]) and (chosen.bincount(minlength=4) > 3).all()
    padded = torch.cat((ids, torch.zeros(40, 5, dtype=ids.dtype)), dim=1)
    assert torch.equal(cc.select(activations, padded, position)[1], logits)
