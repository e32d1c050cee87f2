"""CC-Tuning: all that is added to a language model.

    Ye et al., "CC-Tuning: A Cross-Lingual Connection Mechanism for Improving Joint Multilingual Supervised
    Fine-Tuning", ACL 2025, https://doi.org/10.18653/v1/2025.acl-long.933

    here  shape                 what the paper calls it
    x     (B, T) token ids      non-English input: a prompt in its own language, followed in training by its answer
    e     (B, Te) token ids     English input: the same prompt in English, without an answer
    p     (B,)                  connection position: the token of a prompt where the assistant's turn begins
    H     (L, B, d)             FFN activations: the feed-forward output of every layer at p, before it is added to the
                                residual stream
    W_d   (L, d)                Decision Maker, which picks one of the L layers
    W     (d, d)                Transform Matrix, from own-language to English-like activations
    B rows, T and Te tokens, L decoder layers, d hidden size, V vocabulary

Training (CCTuning.forward)
    1. English pass: H of e at its own p.                                      No gradient, unless english_grad.
    2. Decision Maker: s = W_d mean_l(H_l + emb(x)[p]), a score per layer; one is drawn by straight-through
       Gumbel-Softmax. (emb is the token embedding; the token at p is the template's, the same for every prompt.)
    3. Fusion: the H_l of that layer is added to the FFN output of the first layer (model.FUSION_LAYER) in x's pass, at
       p and nowhere else.
    4. Loss: next-token cross-entropy on the answer.
After training (MatrixSums)
    5. Transform Matrix: W = argmin ||X W - Y||, with X the H of x and Y the H of e, a row for each layer of each of
       many prompts. English prompts are left out.
Inference (CCTuning.prefill)
    6. x alone: H W in place of the English H, then 2 (the argmax) and 3, then ordinary decoding. English prompts too.

What it asks of the language model `lm` is one call: lm(ids, at=p) returns the decoder's output at p and H; lm(ids,
fused=(v, p)) adds the vectors v (B, d) in that layer at index p of ids, and returns the decoder's output and None.
"""
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from model import ADDED, UserError, empty_model, load_weights, open_tensors, token


class Batch(NamedTuple):
    """Right-padded samples. `labels` are the ids on the answer and -100 elsewhere, not shifted."""
    ids: torch.Tensor               # x (B, T): prompt and answer
    labels: torch.Tensor            # (B, T)
    position: torch.Tensor          # p (B,) of x
    english_ids: torch.Tensor       # e (B, Te)
    english_position: torch.Tensor  # p (B,) of e


def gumbel_noise(seed, step, samples, layers):
    """Gumbel noise (B, L) for samples (their numbers) in a step: the same however they are spread over processes."""
    noise = [np.random.default_rng((seed, step, i)).gumbel(size=layers) for i in samples]
    return torch.tensor(np.stack(noise), dtype=torch.float32)


class CCTuning(nn.Module):
    """A language model with a Decision Maker and, once fitted, Transform Matrices."""

    def __init__(self, lm, seed=0):
        super().__init__()
        config = lm.config
        self.lm = lm
        self.decision_maker = nn.Linear(config.hidden_size, config.num_hidden_layers, bias=False)  # W_d
        generator = torch.Generator().manual_seed(seed)
        nn.init.normal_(self.decision_maker.weight, std=config.initializer_range, generator=generator)
        self.trained = False  # is the Decision Maker more than its random start?
        self.source_layer = config.cctuning.get("source_layer", "decision_maker")  # who picks; otherwise see `ablated`
        self.matrices = {}    # W by name, (d, d) float32: "shared", and a language's own

    # Step 1

    def activations(self, ids, position):
        """H (L, B, d) of right-padded prompts (B, T) at their connection positions (B,). Computes no logits."""
        return self.lm(ids, at=position)[1]

    # Step 2

    def select(self, activations, ids, position, noise=None):
        """The Decision Maker's choice among H (L, B, d) for the prompts ids (B, T) with connection positions (B,).

        With Gumbel noise (B, L), a layer is drawn and gradients pass as through a softmax (straight-through, tau = 1;
        arXiv 1611.01144); without, it is the argmax. Returns the chosen vector (B, d) and the scores s (B, L), before
        noise.
        """
        if self.source_layer == "decision_maker":
            embedding = self.lm.model.embed_tokens(token(ids, position))  # (B, d)
            scores = self.decision_maker((activations + embedding).float().mean(0)).float()  # (L, B, d) -> (B, L)
        else:
            scores = self.ablated(ids, position, noise)
        noisy = scores if noise is None else scores + noise
        choice = F.one_hot(noisy.argmax(-1), noisy.shape[-1]).to(noisy.dtype)  # (B, L)
        if noise is not None:
            soft = noisy.softmax(-1)
            choice = choice - soft.detach() + soft  # value: the choice; gradient: the softmax's
        return torch.einsum("bl,lbd->bd", choice, activations.to(choice.dtype)), scores

    def ablated(self, ids, position, noise):
        """For ablations: scores (B, L) that leave no choice, 0 for one layer and -inf for the others.

        The layer is `self.source_layer`, if that is a number; if it is "random", one of each row's own.
        """
        layers = self.lm.config.num_hidden_layers
        if self.source_layer != "random":
            picked = torch.full_like(position, self.source_layer)  # (B,)
        elif noise is not None:
            picked = noise.argmax(-1)
        else:  # by the prompt alone, so that answers can be repeated
            prompts = [row[:p + 1] for row, p in zip(ids.tolist(), position.tolist(), strict=True)]
            draws = [np.random.default_rng(prompt).integers(layers) for prompt in prompts]
            picked = torch.tensor(draws, device=ids.device)
        return F.one_hot(picked, layers).float().log()

    # Steps 1 to 4

    def forward(self, batch, connection="english", noise=None, english_grad=False):
        """The loss of a Batch: cross-entropy summed over its answer tokens (divide by their number in the whole step).

        connection: "english", from the English prompt, as in training; "matrix", from the prompt itself, as at
            inference; "none", plain fine-tuning.
        noise (B, L): Gumbel noise for the choice of layer, in training.
        english_grad: differentiate the English pass too. The paper's published configuration does not: its reentrant
            gradient checkpointing runs that pass without a graph.
        """
        fused = None
        if connection != "none":
            if connection == "english":
                with torch.set_grad_enabled(english_grad and torch.is_grad_enabled()):
                    # Not self.activations: of a sharded model, that is a forward of its own, and would end this one.
                    _, activations = self.lm(batch.english_ids, at=batch.english_position)  # (L, B, d)
            else:
                prompts = batch.ids[:, :int(batch.position.max()) + 1]  # nothing after the connection position matters
                activations = self.transform(self.lm(prompts, at=batch.position)[1], ["shared"] * len(prompts))
            vector, _ = self.select(activations, batch.ids, batch.position, noise)  # (B, d)
            fused = vector, batch.position
        x, _ = self.lm(batch.ids, fused=fused)  # (B, T, d)
        targets = batch.labels[:, 1:]  # the token after each position
        wanted = targets != -100
        x = x[:, :-1][wanted]  # (B, T - 1, d) -> (answer tokens, d): the prompt's logits are never computed
        return F.cross_entropy(self.lm.logits(x).float(), targets[wanted], reduction="sum")

    # Step 6

    def transform(self, activations, matrix_names):
        """H W in float32: English-like activations (L, B, d) from own-language ones, each row (B) by the W it names."""
        activations = activations.float()
        result = torch.empty_like(activations)
        with torch.autocast(activations.device.type, enabled=False):
            for name in set(matrix_names):
                rows = [i for i, n in enumerate(matrix_names) if n == name]
                result[:, rows] = activations[:, rows] @ self.matrices[name]
        return result

    def prefill(self, ids, lengths, connection_index, cache, connection="matrix", matrix_names=None, english=None):
        """Read right-padded prompts (B, T) of these lengths (B,) into the cache, connected.

        connection_index: the connection position, counted from a prompt's end, -1 for its last token.
        connection: "matrix", by the matrices of these names (B); "english", from english = (ids, lengths) of the
            English prompts, which bounds what a matrix can give; "none".
        Returns the logits that follow the prompts (B, V), and the Decision Maker's scores (B, L) or None.

        With the matrix, H is known only after a pass over the prompt, and fusion changes a layer's output at p alone.
        Attention being causal, all that stood before p stays as it is: it is enough to run the tokens from p on once
        more (one for Llama, up to three for ChatML), over their rows of the cache. This equals a second full pass.
        """
        position, scores = lengths + connection_index, None
        if connection == "matrix":
            activations = self.transform(self.lm(ids, cache=cache, at=position)[1], matrix_names)  # (L, B, d)
            vector, scores = self.select(activations, ids, position)  # (B, d), (B, L)
            again = position[:, None] + torch.arange(-connection_index, device=ids.device)  # positions (B, 1 to 3)
            fused = vector, torch.zeros_like(position)  # p is the first of these
            x, _ = self.lm(ids.gather(1, again), positions=again, cache=cache, fused=fused)  # (B, 1 to 3, d)
        elif connection == "english":
            vector, scores = self.select(self.activations(english[0], english[1] + connection_index), ids, position)
            x, _ = self.lm(ids, cache=cache, fused=(vector, position))  # (B, T, d)
            x = token(x, lengths - 1)[:, None]  # (B, 1, d)
        else:
            x, _ = self.lm(ids, cache=cache, at=lengths - 1)  # (B, 1, d)
        return self.lm.logits(x[:, -1]), scores


# --------------------------------------------------------------------------------------- step 5: the Transform Matrix

class MatrixSums:
    """X'X and X'Y, all that least squares needs of any number of prompts: O(d^2) memory, and several processes' add up.

    Kept in float64, (2, d, d) for each of `names`: the languages, or "shared" alone.
    """

    def __init__(self, names, width, device="cpu"):
        self.sums = {name: torch.zeros(2, width, width, dtype=torch.float64, device=device) for name in names}

    def add(self, own, english, names):
        """Take in X and Y (L, B, d), H of prompts and of their English versions; names (B): the matrix of each."""
        for name in set(names):
            rows = [i for i, n in enumerate(names) if n == name]
            x, y = (h[:, rows].flatten(0, 1).double() for h in (own, english))  # (L, rows, d) -> (L * rows, d)
            self.sums[name][0].addmm_(x.T, x)
            self.sums[name][1].addmm_(x.T, y)

    def solve(self, ridge=0.0):
        """{name: W} in float32, with "shared" from all prompts together."""
        sums = {**self.sums, "shared": sum(self.sums.values())}
        return {name: least_squares(xx, xy, ridge).float() for name, (xx, xy) in sums.items()}


def least_squares(xx, xy, ridge=0.0):
    """The W (d, d) that minimises ||X W - Y||^2 + ridge * mean(diag(X'X)) * ||W||^2, from xx = X'X and xy = X'Y.

    Where there are several, the one of least norm.
    """
    penalty = ridge * xx.diagonal().mean() * torch.eye(len(xx), dtype=xx.dtype, device=xx.device)
    return torch.linalg.pinv(xx + penalty, hermitian=True) @ xy


def r_squared(matrix, own, english):
    """How much of Y (L, N, d) the matrix explains from X (L, N, d), layer by layer: (L,), 1 is all.

    R2_l = 1 - sum (Y_l - X_l W)^2 / sum (Y_l - mean Y_l)^2. Pooled, the last layer's large norm would hide the others.
    """
    own, english = own.double(), english.double()
    residual = (english - own @ matrix.double()).square().sum((1, 2))
    return 1 - residual / (english - english.mean(1, keepdim=True)).square().sum((1, 2))


# ------------------------------------------------------------------------------------------------- loading and saving

def load_cctuning(folder, dtype=None, device="cpu", seed=0, shard=None):
    """The model of a checkpoint folder with what CC-Tuning added. A plain checkpoint's Decision Maker starts at random.

    shard(cc): spreads the model, before it has weights, over processes; returns `local` of model.load_weights.
    Raises UserError for a cctuning.safetensors that is of another model, or not whole; and as model.load_weights does.
    """
    cc = CCTuning(empty_model(folder), seed)
    decision_maker = cc.decision_maker.weight.detach().clone()
    local = None
    if shard:
        local = shard(cc)
        cc.to_empty(device=device)
    load_weights(cc.lm, folder, dtype, device, local)
    path = Path(folder) / ADDED
    if path.exists():
        with open_tensors(path) as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    else:
        path, paper = folder, cc.lm.paper_decision_maker
        tensors = {} if paper is None else {"decision_maker.weight": paper}
    if (tensors and "decision_maker.weight" not in tensors) or (len(tensors) > 1 and "transform_matrix" not in tensors):
        raise UserError(f"{path}: lacks decision_maker.weight or transform_matrix; copy the file again, or train again")
    width = cc.lm.config.hidden_size
    shapes = {name: (width, width) for name in tensors if name.split(".")[0] == "transform_matrix"}
    shapes["decision_maker.weight"] = tuple(decision_maker.shape)
    for name, tensor in tensors.items():
        if name not in shapes:
            raise UserError(f"{path}: unexpected tensor {name}; copy the file again, or train again")
        if tuple(tensor.shape) != shapes[name]:
            raise UserError(f"{path}: {name} has shape {tuple(tensor.shape)}, the model needs {shapes[name]}; it was "
                            "made for another model")
    cc.trained = "decision_maker.weight" in tensors
    decision_maker = tensors.pop("decision_maker.weight", decision_maker).float()
    cc.matrices = {name.removeprefix("transform_matrix").removeprefix(".") or "shared": w.float().to(device)
                   for name, w in tensors.items()}
    if local is None:
        cc.decision_maker.weight = nn.Parameter(decision_maker.to(device))
    else:
        part, rows = local(cc.decision_maker.weight)
        part.copy_(decision_maker[rows])
    return cc


def cctuning_tensors(decision_maker, matrices):
    """{name: tensor} of cctuning.safetensors, from W_d (L, d) and {name: W (d, d)}."""
    named = {"transform_matrix" if name == "shared" else f"transform_matrix.{name}": w for name, w in matrices.items()}
    return {"decision_maker.weight": decision_maker.float(), **named}
