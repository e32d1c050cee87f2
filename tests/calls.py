"""All calls that tests make to the model itself, in one place. Other tests go through the scripts and
their files.

Shapes are those of cctuning.py: B prompts, T tokens, L layers, d hidden size, V vocabulary. Prompts are
right-padded.
"""
import math
from types import SimpleNamespace

import torch

import model
from cctuning import Batch, CCTuning, MatrixSums
from cctuning import r_squared as r_squared_of_layers
from model import load_model, new_cache


def open_model(folder, decision_maker=None, matrix=None):
    """A checkpoint in float32, with this Decision Maker (L, d) and Transform Matrix (d, d)."""
    cc = CCTuning(load_model(folder, torch.float32))
    if decision_maker is not None:
        cc.decision_maker.weight.data = decision_maker.clone()
    if matrix is not None:
        cc.matrices["shared"] = matrix.float()
    return cc


def gradients(cc):
    """{name: gradient}, by Hugging Face's names and decision_maker.weight."""
    return {name.removeprefix("lm."): p.grad for name, p in cc.named_parameters() if p.grad is not None}


def logits(cc, ids, vectors=None, position=None):
    """(B, T, V), with vectors (B, d) added to the FFN output of layer 0 at position (B,)."""
    return cc.lm.logits(cc.lm(ids, fused=None if vectors is None else (vectors, position))[0])


def activations(cc, ids, position):
    """H (L, B, d) at the connection position (B,)."""
    return cc.activations(ids, position)


def choose(cc, activations, ids, position, noise=None):
    """The vector (B, d) that the Decision Maker takes from H (L, B, d), and its scores (B, L) before the
    noise."""
    return cc.select(activations, ids, position, noise)


def loss(cc, ids, labels, position, english_ids, english_position, connection="english", **options):
    """The loss summed over the answers' tokens; options: noise (B, L), english_grad."""
    return cc(Batch(ids, labels, position, english_ids, english_position), connection, **options)


def answer(cc, ids, lengths, count, index=-1, connection="none", english=None):
    """The logits (B, V) that follow the prompts, the scores (B, L) or None, and `count` greedy ids (B,
    count).

    index: the connection position, counted from a prompt's end.  english: ids and lengths of the English
    prompts. No id ends an answer.
    """
    cache, tokens = new_cache(cc.lm.config, len(ids), ids.shape[1] + count, torch.float32, "cpu"), []
    first, scores = cc.prefill(ids, lengths, index, cache, connection, ["shared"] * len(ids), english)
    following = first
    for i in range(count):
        tokens.append(following.argmax(-1))
        x, _ = cc.lm(tokens[-1][:, None], positions=(lengths + i)[:, None], cache=cache)
        following = cc.lm.logits(x[:, -1])
    return first, scores, torch.stack(tokens, 1)


def transform(matrix, activations):
    """H W of H (L, B, d), as answering computes it."""
    cc = SimpleNamespace(matrices={"shared": matrix})
    return CCTuning.transform(cc, activations, ["shared"] * activations.shape[1])


def fit(x, y, ridge=0.0, batch=7):
    """The Transform Matrix (d, d) from X and Y (L, N, d), taken in batch by batch as training does."""
    sums = MatrixSums(["shared"], x.shape[-1])
    for part in torch.arange(x.shape[1]).split(batch):
        sums.add(x[:, part], y[:, part], ["shared"] * len(part))
    return sums.solve(ridge)["shared"]


def r_squared(matrix, x, y):
    """Per layer (L,)."""
    return r_squared_of_layers(matrix, x, y)


@torch.no_grad()
def read_rows(folder, world, rank):
    """{name: the rows that this one of several processes reads} of every parameter."""
    lm, parts = model.empty_model(folder), {}

    def local(parameter):
        size = math.ceil(len(parameter) / world)
        rows = slice(rank * size, min((rank + 1) * size, len(parameter)))
        parts[parameter] = torch.empty(rows.stop - rows.start, *parameter.shape[1:])
        return parts[parameter], rows
    model.load_weights(lm, folder, torch.float32, local=local)
    return {name: parts[parameter] for name, parameter in lm.named_parameters()}
