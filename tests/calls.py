"""All calls that tests make to the model itself; other tests go through the scripts and their files.

Symbols as in cctuning.py: B prompts, right-padded to T tokens, L layers, d hidden size, V vocabulary.
"""
import torch
import torch.distributed
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from cctuning import Batch, CCTuning, Fusion, TransformMatrix, load_cctuning, select_positions
from model import Config, KVCache, Transformer, load_weights

DEVICE = "cpu"  # tools/gpu.py sets another


def open_model(folder, decision_maker=None, matrix=None):
    """A checkpoint in float32, with this Decision Maker (L, d) and Transform Matrix (d, d)."""
    with torch.device("meta"):
        cc = CCTuning(Config.read(folder))
    load_cctuning(cc, folder, torch.float32, DEVICE)
    if decision_maker is not None:
        cc.decision_maker.weight.data = decision_maker.clone()
    if matrix is not None:
        cc.transform_matrix.weight = matrix.float()
    return cc


def gradients(cc):
    """{name: gradient}, by Hugging Face's names and decision_maker.weight."""
    return {name.removeprefix("lm."): p.grad for name, p in cc.named_parameters() if p.grad is not None}


def logits(cc, ids, vectors=None, position=None):
    """(B, T, V), with vectors (B, d) added to the FFN output of layer 0 at position (B,)."""
    fusion = None if vectors is None else Fusion(vectors, position)
    return cc.lm.logits(cc.lm(cc.lm.embed(ids), fusion=fusion).hidden)


def activations(cc, ids, position):
    """H (L, B, d) at the connection position (B,)."""
    return cc.activations(ids, position)


def choose(cc, activations, ids, position, noise=None):
    """The Decision Maker's vector (B, d) of H (L, B, d), and its scores (B, L), without noise."""
    embedding = select_positions(cc.lm.embed(ids), position)
    return cc.decision_maker(activations, embedding, noise)


def loss(cc, ids, labels, position, english_ids, english_position, connection="english", **options):
    """The loss summed over the answers' tokens; options: noise (B, L), english_grad."""
    return cc(Batch(ids, labels, position, english_ids, english_position), connection, **options)[0]


def answer(cc, ids, lengths, count, index=-1, connection="none", english=None):
    """Next-token logits (B, V) of the prompts, the scores (B, L) or None, and greedy ids (B, count).

    index: the connection position, from a prompt's end.  english: (ids, lengths) of English prompts.
    """
    cache, tokens = KVCache(cc.lm.config, len(ids), ids.shape[1] + count, torch.float32, DEVICE), []
    first, scores = cc.prefill(ids, lengths, index, cache, connection, english)
    following = first
    for i in range(count):
        tokens.append(following.argmax(-1))
        cache.length += 1
        x = cc.lm(cc.lm.embed(tokens[-1][:, None]), (lengths + i)[:, None], cache).hidden
        following = cc.lm.logits(x[:, -1])
    return first, scores, torch.stack(tokens, 1)


def transform(matrix, activations):
    """H W of H (L, B, d)."""
    return TransformMatrix(matrix)(activations)


def fit(x, y, ridge=0.0, batch=7):
    """The Transform Matrix (d, d) of X and Y (L, N, d), added batch by batch as in training."""
    matrix = TransformMatrix()
    for part in torch.arange(x.shape[1]).split(batch):
        matrix.add(x[:, part], y[:, part])
    matrix.solve(ridge)
    return matrix.weight


def r_squared(matrix, x, y):
    """Per layer (L,)."""
    return TransformMatrix(matrix).r_squared(x, y)


@torch.no_grad()
def read_rows(folder, world, rank):
    """{parameter: the rows that this rank reads of a sharded model}."""
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        with torch.device("meta"):
            lm = Transformer(Config.read(folder))
        fully_shard(lm, mesh=torch.distributed.init_device_mesh("cpu", (world,)))
        lm.to_empty(device="cpu")
        load_weights(lm, folder, torch.float32)
        return {name: p.to_local().clone() for name, p in lm.named_parameters()}
    finally:
        torch.distributed.destroy_process_group()
