"""CC-Tuning: what is added to a language model.

    Ye et al., "CC-Tuning: A Cross-Lingual Connection Mechanism for Improving Joint Multilingual Supervised Fine-Tuning", ACL 2025,
    https://doi.org/10.18653/v1/2025.acl-long.933

    x       a prompt in its own language, with its answer in training            (B, T) token ids
    e       the same prompt in English, without an answer                        (B, T) token ids
    p       the connection position of a prompt, where the assistant's turn begins   (B,)
    H       FFN activations: the feed-forward output of every layer at p, before the residual addition   (L, B, d)
    W_d     the Decision Maker, which picks one layer                            (L, d)
    W       the Transform Matrix, from own-language to English-like activations  (d, d)

Training (`CCTuning.forward`)
    1. English pass: H of e at its p.                                            no gradient, unless english_grad
    2. Decision Maker: s = W_d mean_l(H_l + emb(x)[p]); one layer by straight-through Gumbel-Softmax.
    3. Fusion: the chosen layer's H_l is added to the FFN output of layer 0 of x's pass, at p and nowhere else.
    4. Loss: next-token cross-entropy on the answer.
After training (`MatrixSums`): W = argmin ||X W - Y||, X being H of x, Y being H of e, over many prompts and all layers.
Inference (`CCTuning.prefill`): H of x, times W, stands for H of e.
"""
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from model import UserError, empty_model, fill, open_tensors

FILE = "cctuning.safetensors"  # beside the weights: decision_maker.weight, transform_matrix, transform_matrix.LANG


class Batch(NamedTuple):
    """Right-padded samples. `labels` are the ids on the answer and -100 elsewhere, not shifted."""
    ids: torch.Tensor               # (B, T) prompt and answer
    labels: torch.Tensor            # (B, T)
    position: torch.Tensor          # (B,) connection position in ids
    english_ids: torch.Tensor       # (B, Te) English prompt
    english_position: torch.Tensor  # (B,)


class CCTuning(nn.Module):
    """A language model with a Decision Maker and, once fitted, Transform Matrices."""

    def __init__(self, lm, seed=0):
        super().__init__()
        config = lm.config
        self.lm = lm
        self.decision_maker = nn.Linear(config.hidden_size, config.num_hidden_layers, bias=False)  # W_d
        nn.init.normal_(self.decision_maker.weight, std=config.initializer_range, generator=torch.Generator().manual_seed(seed))
        self.trained = False  # is the Decision Maker more than its random start?
        self.layer = config.cctuning.get("layer", "decision_maker")  # who chooses; in ablations "random", or the number of one layer
        self.matrices = {}    # W by name, (d, d) float32: "shared", and a language's own

    # Step 1 ------------------------------------------------------------------------------------------------------------------

    def activations(self, ids, position):
        """H (L, B, d) of right-padded prompts (B, T) at their connection positions (B,). Computes no logits."""
        return self.lm(ids, at=position)[1]

    # Step 2 ------------------------------------------------------------------------------------------------------------------

    def select(self, activations, ids, position, noise=None):
        """The Decision Maker's choice among H (L, B, d) for the prompts ids (B, T).

        With Gumbel noise (B, L), one layer is drawn and gradients pass as through a softmax (straight-through, tau = 1); without, it is
        the argmax. Returns the chosen vector (B, d) and the logits s (B, L), before noise.
        """
        if self.layer != "decision_maker":
            return self.select_otherwise(activations, ids, position, noise)
        rows = torch.arange(len(ids), device=ids.device)
        embedding = self.lm.model.embed_tokens(ids[rows, position])  # (B, d)
        logits = self.decision_maker((activations + embedding).float().mean(0))  # (B, L)
        scores = logits.float() if noise is None else logits.float() + noise
        choice = F.one_hot(scores.argmax(-1), scores.shape[-1]).to(scores.dtype)  # (B, L)
        if noise is not None:
            soft = scores.softmax(-1)
            choice = choice - soft.detach() + soft  # value: the choice; gradient: the softmax's
        return torch.einsum("bl,lbd->bd", choice, activations.to(choice.dtype)), logits

    def select_otherwise(self, activations, ids, position, noise):
        """select for the ablations, a fixed layer or a random one; the logits (B, L) are 0 for the layer taken and -inf for the others."""
        if self.layer != "random":
            chosen = torch.full_like(position, self.layer)  # (B,)
        elif noise is not None:
            chosen = noise.argmax(-1)  # (B,)
        else:  # by the prompt alone, so that answers can be repeated
            draws = [np.random.default_rng(row[:p + 1]).integers(len(activations)) for row, p in zip(ids.tolist(), position.tolist())]
            chosen = torch.tensor(draws, device=ids.device)  # (B,)
        return activations[chosen, torch.arange(len(ids), device=ids.device)], F.one_hot(chosen, len(activations)).float().log()

    # Steps 1 to 4 ------------------------------------------------------------------------------------------------------------

    def forward(self, batch, connection="english", noise=None, english_grad=False):
        """The loss of a Batch: cross-entropy summed over its answer tokens (divide by their number over the whole step).

        connection: "english", from the English prompt, as in training; "matrix", from the prompt itself; "none", plain fine-tuning.
        noise (B, L): Gumbel noise for the choice of layer, in training.
        english_grad: differentiate the English pass too. The paper's published configuration does not: its reentrant gradient
            checkpointing runs that pass without a graph.
        """
        fused = None
        if connection != "none":
            if connection == "english":
                with torch.set_grad_enabled(english_grad and torch.is_grad_enabled()):
                    activations = self.activations(batch.english_ids, batch.english_position)
            else:
                prompts = batch.ids[:, :int(batch.position.max()) + 1]  # nothing after the connection position can matter
                activations = self.transform(self.activations(prompts, batch.position), ["shared"] * len(prompts))
            vector, _ = self.select(activations, batch.ids, batch.position, noise)
            fused = vector, batch.position  # step 3, in MLP.forward of layer 0
        x, _ = self.lm(batch.ids, fused=fused)  # (B, T, d)
        targets = batch.labels[:, 1:]  # the token after each position
        wanted = targets != -100
        x = x[:, :-1][wanted]  # (answer tokens, d): the prompt's logits are never computed
        return F.cross_entropy(self.lm.logits(x).float(), targets[wanted], reduction="sum")

    # Inference ---------------------------------------------------------------------------------------------------------------

    def transform(self, activations, matrix_names):
        """H W in float32: English-like activations (L, B, d) from own-language ones, each row (B) by the matrix of its name."""
        activations = activations.float()
        result = torch.empty_like(activations)
        with torch.autocast(activations.device.type, enabled=False):
            for name in sorted(set(matrix_names)):
                rows = [i for i, n in enumerate(matrix_names) if n == name]
                result[:, rows] = activations[:, rows] @ self.matrices[name]
        return result

    def prefill(self, ids, lengths, connection_index, cache, connection="matrix", matrix_names=None, english=None):
        """Read right-padded prompts (B, T) of these lengths (B,) into the cache, connected.

        connection_index: the connection position, counted from a prompt's end, -1 for its last token.
        connection: "matrix", by the matrices of these names (B); "english", from english = (ids, lengths) of the English prompts; "none".
        Returns the logits that follow the prompts (B, V) and the Decision Maker's (B, L), or None.

        With the matrix, H is known only after a pass over the prompt, and fusion changes layer 0's output at p alone. Attention being
        causal, all that stood before p stays as it is: it is enough to run the tokens from p on once more, over their rows of the cache.
        This equals a second full pass.
        """
        position, decision = lengths + connection_index, None
        if connection == "matrix":
            activations = self.transform(self.lm(ids, cache=cache, at=position)[1], matrix_names)
            vector, decision = self.select(activations, ids, position)
            tail = position[:, None] + torch.arange(-connection_index, device=ids.device)  # (B, 1 to 3)
            x, _ = self.lm(ids.gather(1, tail), positions=tail, cache=cache, fused=(vector, torch.zeros_like(position)))
        elif connection == "english":
            activations = self.activations(english[0], english[1] + connection_index)
            vector, decision = self.select(activations, ids, position)
            x, _ = self.lm(ids, cache=cache, fused=(vector, position))
            x = x[torch.arange(len(ids), device=ids.device), lengths - 1][:, None]  # (B, 1, d)
        else:
            x, _ = self.lm(ids, cache=cache, at=lengths - 1)
        return self.lm.logits(x[:, -1]), decision


def gumbel_noise(seed, step, samples, layers):
    """Gumbel noise (B, L) for samples (numbers) in a step: the same however samples are spread over batches and processes."""
    return torch.tensor(np.stack([np.random.default_rng((seed, step, i)).gumbel(size=layers) for i in samples]), dtype=torch.float32)


# -------------------------------------------------------------------------------------------------------------- Transform Matrix

class MatrixSums:
    """X'X and X'Y, all that least squares needs of any number of prompts: O(d^2) memory, and sums of several processes just add up.

    Kept in float64 for each of `names`: the languages, or "shared" alone.
    """

    def __init__(self, names, width, device="cpu"):
        self.sums = {name: torch.zeros(2, width, width, dtype=torch.float64, device=device) for name in names}

    def add(self, own, english, names):
        """Take in activations X and Y (L, B, d) of prompts and of their English versions; names (B): the matrix each prompt belongs to."""
        for name in sorted(set(names)):
            rows = [i for i, n in enumerate(names) if n == name]
            x, y = (h[:, rows].flatten(0, 1).double() for h in (own, english))  # (L * rows, d)
            self.sums[name][0].addmm_(x.T, x)
            self.sums[name][1].addmm_(x.T, y)

    def solve(self, ridge=0.0):
        """{name: W} in float32, with "shared" from all prompts together."""
        return {name: least_squares(*sums, ridge).float() for name, sums in {**self.sums, "shared": sum(self.sums.values())}.items()}


def least_squares(xx, xy, ridge=0.0):
    """The W of least norm among those that minimise ||X W - Y||^2 + ridge * mean(diag(X'X)) * ||W||^2, from xx = X'X and xy = X'Y."""
    penalty = ridge * xx.diagonal().mean() * torch.eye(len(xx), dtype=xx.dtype, device=xx.device)
    return torch.linalg.pinv(xx + penalty, hermitian=True) @ xy


def r_squared(matrix, own, english):
    """How much of the English activations Y (L, N, d) the matrix explains from X (L, N, d), layer by layer: (L,), 1 is all.

    R2_l = 1 - sum (Y_l - X_l W)^2 / sum (Y_l - mean Y_l)^2. Pooled over layers, the last one's large norm would hide the others.
    """
    own, english = own.double(), english.double()
    residual = (english - own @ matrix.double()).square().sum((1, 2))
    return 1 - residual / (english - english.mean(1, keepdim=True)).square().sum((1, 2))


# ------------------------------------------------------------------------------------------------------------ loading and saving

def load_cctuning(folder, dtype=None, device="cpu", seed=0, shard=None):
    """The model of a checkpoint folder with what CC-Tuning added to it. A plain checkpoint's Decision Maker starts at random.

    shard(cc): spreads the model, before it has weights, over processes; returns `local` of model.fill.
    """
    cc = CCTuning(empty_model(folder), seed)
    decision_maker = cc.decision_maker.weight.detach().clone()
    local = shard(cc) if shard else None
    if shard:
        cc.to_empty(device=device)
    fill(cc.lm, folder, dtype, device, local)
    path = Path(folder) / FILE
    if path.exists():
        with open_tensors(path) as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    else:
        path = folder
        tensors = {"decision_maker.weight": w for w in cc.lm.extra.values()}
    if tensors and "decision_maker.weight" not in tensors or (len(tensors) > 1 and "transform_matrix" not in tensors):
        raise UserError(f"{path}: lacks decision_maker.weight or transform_matrix; fit the matrix again with train.py --epochs 0")
    width = cc.lm.config.hidden_size
    for name, tensor in tensors.items():
        weight = name == "decision_maker.weight"
        if not weight and name.split(".")[0] != "transform_matrix":
            raise UserError(f"{path}: unexpected tensor {name}; train again or fit the matrix again with train.py --epochs 0")
        shape = tuple(cc.decision_maker.weight.shape) if weight else (width, width)
        if tuple(tensor.shape) != shape:
            raise UserError(f"{path}: {name} has shape {tuple(tensor.shape)}, the model needs {shape}; it was made for another model")
        if weight:
            decision_maker, cc.trained = tensor.float(), True
        else:
            cc.matrices[name.removeprefix("transform_matrix").removeprefix(".") or "shared"] = tensor.float().to(device)
    if local is None:
        cc.decision_maker.weight = nn.Parameter(decision_maker.to(device))
    else:
        part, rows = local(cc.decision_maker.weight)
        part.copy_(decision_maker[rows])
    return cc


def cctuning_tensors(decision_maker, matrices):
    """{name: tensor} of cctuning.safetensors."""
    names = {name: "transform_matrix" if name == "shared" else f"transform_matrix.{name}" for name in matrices}
    return {"decision_maker.weight": decision_maker.float(), **{names[name]: w for name, w in matrices.items()}}
