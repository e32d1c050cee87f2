"""CC-Tuning: everything that is added to a language model.

    Ye et al., "CC-Tuning: A Cross-Lingual Connection Mechanism for Improving Joint Multilingual
    Supervised Fine-Tuning", ACL 2025, https://doi.org/10.18653/v1/2025.acl-long.933

    here  shape                 in the paper
    x     (B, T) token ids      non-English input: the original prompt; in training the answer follows
    e     (B, Te) token ids     English input: the same prompt in English, without an answer
    p     (B,)                  connection position: a token of the chat template at or near the prompt's end
    H     (L, B, d)             FFN activations: the FFN output of every layer at p, before the residual add
    W_d   (L, d)                Decision Maker, which picks one of the L layers
    W     (d, d)                Transform Matrix, from own-language to English-like activations
    B rows, T and Te tokens, L decoder layers, d hidden size, V vocabulary size

Training (CCTuning.forward)
    1. English pass: H of e at its own p. No gradient, unless english_grad.
    2. Decision Maker: a score per layer; one layer is drawn by straight-through Gumbel-Softmax.
    3. Fusion: that layer's H_l is added to the first layer's FFN output in x's pass, at p only.
    4. Loss: next-token cross-entropy on the answer.
After training (TransformMatrix)
    5. W = argmin ||X W - Y||, where X holds the H of many x and Y the H of their e, a row per prompt
       and layer. English samples are left out.
Inference (CCTuning.prefill)
    6. x alone: H W takes the place of the English H; then steps 2 (argmax) and 3, then decoding.
       English prompts too.
"""
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from model import (CCTUNING_FILE, Fusion, Transformer, UserError, assign, load_weights, open_safetensors,
                   refuse_nan, select_positions)


class Batch(NamedTuple):
    """Right-padded samples. `labels` are the ids of the answer and -100 elsewhere, not shifted."""
    ids: torch.Tensor               # x (B, T): prompt and answer
    labels: torch.Tensor            # (B, T)
    position: torch.Tensor          # p (B,) of x
    english_ids: torch.Tensor       # e (B, Te)
    english_position: torch.Tensor  # p (B,) of e


def gumbel_noise(seeds, layers):
    """Gumbel noise (B, L): a row for each seed, which is a list of integers."""
    noise = [np.random.default_rng(seed).gumbel(size=layers) for seed in seeds]
    return torch.tensor(np.stack(noise), dtype=torch.float32)


# ------------------------------------------------------------------------ step 2: Decision Maker

class DecisionMaker(nn.Module):
    """s = W_d . mean_l(H_l + emb(x)[p]): a score per layer (paper, section 3).

    The embedding is the own-language prompt's at p: a token of the chat template, the same for all
    prompts.
    """

    def __init__(self, layers, width):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(layers, width))  # W_d

    def forward(self, activations, embedding, noise=None):
        """Pick one layer's vector from H (L, B, d); embedding: emb(x)[p] (B, d).

        With Gumbel noise (B, L): sample one layer; the backward pass uses the softmax gradient
        (straight-through, tau = 1; arXiv 1611.01144). Without noise: take the argmax.
        Returns the vector (B, d) and the scores s (B, L), without noise.
        """
        mean = (activations.float() + embedding).mean(0).to(self.weight.dtype)  # (B, d)
        scores = F.linear(mean, self.weight).float()  # (B, L)
        noisy = scores if noise is None else scores + noise
        hard, soft = F.one_hot(noisy.argmax(-1), noisy.shape[-1]).to(noisy.dtype), noisy.softmax(-1)  # (B, L)
        # Straight-through: the value of `hard`, the gradient of `soft`.
        choice = hard if noise is None else hard - soft.detach() + soft
        return torch.einsum("bl,lbd->bd", choice, activations.to(choice.dtype)), scores


class FixedChoice(nn.Module):
    """Replaces the Decision Maker in ablations. source: a layer index, "random" or "mean" (of all layers)."""

    def __init__(self, source):
        super().__init__()
        self.source = source

    def forward(self, activations, embedding, noise=None):
        """As DecisionMaker.forward. Scores: 0 for the chosen layer, -inf for the others; None for "mean"."""
        if self.source == "mean":  # dominated by the last layers: their norms are the largest
            return activations.float().mean(0), None
        if self.source == "random":
            layer = noise.argmax(-1)  # (B,)
        else:
            layer = torch.full(embedding.shape[:1], self.source, device=embedding.device)
        scores = F.one_hot(layer, len(activations)).float().log()  # (B, L)
        return select_positions(activations.transpose(0, 1), layer).float(), scores


# ---------------------------------------------------------------------- step 5: Transform Matrix

class TransformMatrix:
    """W = argmin ||X W - Y||: from own-language activations X to English ones Y, rows of all layers.

    Least squares needs only the sums X'X and X'Y: O(d^2) memory for any number of prompts. Processes can
    add their sums.
    """

    def __init__(self, weight=None):
        self.weight = weight  # W (d, d) float32; None: not fitted
        self.sums = None      # (2, d, d) float64: X'X and X'Y

    def add(self, own, english):
        """Add X and Y (L, B, d): the H of prompts and of their English versions."""
        x, y = (h.flatten(0, 1).double() for h in (own, english))  # (L * B, d)
        if self.sums is None:
            self.sums = x.new_zeros(2, x.shape[1], x.shape[1])
        self.sums[0].addmm_(x.T, x)
        self.sums[1].addmm_(x.T, y)

    def solve(self, ridge=0.0):
        """Set W to the minimum of ||X W - Y||^2 + ridge mean(diag(X'X)) ||W||^2.

        If the solution is not unique, take the minimum-norm one.
        """
        xx, xy = self.sums
        penalty = ridge * xx.diagonal().mean() * torch.eye(len(xx), dtype=xx.dtype, device=xx.device)
        self.weight = (torch.linalg.pinv(xx + penalty, hermitian=True) @ xy).float()

    def __call__(self, activations):
        """H W, in float32: (L, B, d) -> (L, B, d)."""
        with torch.autocast(activations.device.type, enabled=False):
            return activations.float() @ self.weight

    def r_squared(self, own, english):
        """R^2 of each layer (L,) on X, Y (L, N, d): 1 - sum (Y - X W)^2 / sum (Y - mean Y)^2.

        1: Y is predicted exactly; 0: no better than the mean of Y. Per layer: a pooled R^2 would be
        dominated by the last layer's norm.
        """
        own, english = own.double(), english.double()
        residual = (english - own @ self.weight.double()).square().sum((1, 2))
        return 1 - residual / (english - english.mean(1, keepdim=True)).square().sum((1, 2))


# ------------------------------------------------------------------------------------ the method

class CCTuning(nn.Module):
    """A Transformer `lm`, a Decision Maker (or FixedChoice) and a Transform Matrix."""

    def __init__(self, config, seed=0):
        """load_cctuning sets the parameters. seed: of "random" layers and a new Decision Maker."""
        super().__init__()
        self.lm = Transformer(config)
        if config.source_layer == "decision_maker":
            self.decision_maker = DecisionMaker(config.num_hidden_layers, config.hidden_size)
        else:
            self.decision_maker = FixedChoice(config.source_layer)
        self.transform_matrix = TransformMatrix()
        self.trained = False  # True once a trained connection is loaded
        self.seed = seed

    def activations(self, ids, position):
        """Step 1: H (L, B, d) of right-padded prompts (B, T) at p (B,). Computes no logits."""
        return self.lm(self.lm.embed(ids), collect_at=position).activations

    def pick(self, activations, ids, embeddings, position, noise=None):
        """Step 2 for prompts ids (B, T), their embeddings (B, T, d) and p (B,).

        Returns the vector to fuse (B, d) and the scores (B, L).
        """
        if noise is None and self.lm.config.source_layer == "random":  # repeatable: seeded by the prompt
            prompts = [row[:p + 1] for row, p in zip(ids.tolist(), position.tolist(), strict=True)]
            seeds = [[self.seed, *prompt] for prompt in prompts]
            noise = gumbel_noise(seeds, len(activations)).to(ids.device)
        return self.decision_maker(activations, select_positions(embeddings, position), noise)

    def forward(self, batch, connection="english", noise=None, english_grad=False):
        """Steps 1 to 4. Returns the loss, summed over the answer tokens, and the scores (B, L) or None.

        connection: what the fused vector comes from. "english": the English prompt, as in training;
            "matrix": the prompt itself, as at inference; "none": plain fine-tuning.
        noise (B, L): Gumbel noise, in training.
        english_grad: differentiate the English pass too. The paper's published configuration does
            not: its reentrant gradient checkpointing runs that pass without a graph.
        """
        fusion = scores = None
        targets = batch.labels[:, 1:]  # the token after each position
        rows, columns = (targets != -100).nonzero(as_tuple=True)  # first: the CPU waits for the GPU here
        embeddings = self.lm.embed(batch.ids)  # (B, T, d), once: each look-up has a gradient of size (V, d)
        if connection != "none":
            ids, position = batch.ids, batch.position
            if connection == "english":
                ids, position = batch.english_ids, batch.english_position
            with torch.set_grad_enabled(english_grad and torch.is_grad_enabled()):
                # Not self.activations: under FSDP that is a forward of its own, which would free the
                # root's weights during the step.
                activations = self.lm(self.lm.embed(ids), collect_at=position).activations
            if connection == "matrix":
                activations = self.transform_matrix(activations)
            vector, scores = self.pick(activations, batch.ids, embeddings, batch.position, noise)
            fusion = Fusion(vector, batch.position)
        x = self.lm(embeddings, fusion=fusion).hidden  # (B, T, d)
        logits = self.lm.logits(x[rows, columns]).float()  # (answer tokens, V): none of the prompt's
        return F.cross_entropy(logits, targets[rows, columns], reduction="sum"), scores

    def prefill(self, ids, lengths, connection_index, cache, connection="matrix", english=None):
        """Step 6: read right-padded prompts (B, T) of these lengths (B,) into the cache, connected.

        connection_index: p, counted from a prompt's end; -1 for its last token.
        connection: "matrix"; "english", from english = (ids, lengths) of the English prompts, the
            upper bound for the matrix; "none".
        Returns the logits that follow the prompts (B, V) and the scores (B, L) or None.

            a. First pass, without connection: all tokens. It gives H at p, keys and values.
            b. The vector to fuse, from H W or from the English prompts.
            c. Second pass, with the vector: the tokens from p on, from the fusion layer on.

        Why the connection costs one token: fusion changes the fusion layer's output at p. That is the
        input of the layers above, so in these p has other keys, values and outputs, which the second
        pass overwrites in the cache. Attention is causal, so no token before p changes: running the
        tokens from p on (one for Llama 3, two or three for ChatML) equals a second full pass.
        """
        position, embeddings = lengths + connection_index, self.lm.embed(ids)
        if connection == "none":
            x = self.lm(embeddings, cache=cache, collect_at=lengths - 1).hidden  # (B, 1, d)
            return self.lm.logits(x[:, 0]), None
        first = self.lm(embeddings, cache=cache, collect_at=position)
        if connection == "matrix":
            activations = self.transform_matrix(first.activations)
        else:
            activations = self.activations(english[0], english[1] + connection_index)
        vector, scores = self.pick(activations, ids, embeddings, position)
        again = position[:, None] + torch.arange(-connection_index, device=ids.device)  # (B, n)
        x = first.fusion_input[torch.arange(len(ids), device=ids.device)[:, None], again]  # (B, n, d)
        fusion = Fusion(vector, torch.zeros_like(position))  # p is the first of the n tokens
        x = self.lm(x, again, cache, fusion, first_layer=self.lm.config.fusion_layer).hidden
        return self.lm.logits(x[:, -1]), scores


# ---------------------------------------------------------------------------- loading and saving

def load_cctuning(cc, folder, dtype=None, device="cpu"):
    """Load a checkpoint folder into a CCTuning (on the meta device, or sharded). Returns model.Loaded.

    A missing Decision Maker is drawn from a normal distribution of the config's initializer_range.
    Raises UserError for files that are damaged or do not belong to the model.
    """
    loaded = load_weights(cc.lm, folder, dtype, device)
    source, tensors, width = Path(folder) / CCTUNING_FILE, {}, cc.lm.config.hidden_size
    shapes = {f"decision_maker.{name}": [*p.shape] for name, p in cc.decision_maker.named_parameters()}
    shapes["transform_matrix"] = [width, width]
    if source.exists():
        with open_safetensors(source) as file:
            tensors = {name: file.get_tensor(name).float() for name in file.keys()}
        if isinstance(cc.decision_maker, FixedChoice):
            tensors.pop("decision_maker.weight", None)
        if (required := next(iter(shapes))) not in tensors:
            raise UserError(f"{source}: lacks {required}; copy the file again, or train again")
    elif loaded.decision_maker is not None and "decision_maker.weight" in shapes:
        source, tensors = folder, {"decision_maker.weight": loaded.decision_maker.float()}
    for name, tensor in tensors.items():
        if [*tensor.shape] != shapes.get(name):
            raise UserError(f"{source}: {name} has shape {[*tensor.shape]}, the model needs "
                            f"{shapes.get(name, 'no such tensor')}; copy both from the same model")
        refuse_nan(f"{source}: {name}", tensor)
    cc.trained = bool(tensors)
    if "transform_matrix" in tensors:
        cc.transform_matrix.weight = tensors["transform_matrix"].to(device)
    if shape := shapes.get("decision_maker.weight"):
        generator = torch.Generator().manual_seed(cc.seed)
        new = torch.empty(shape).normal_(std=cc.lm.config.initializer_range, generator=generator)
        assign(cc, "decision_maker.weight", tensors.get("decision_maker.weight", new), device=device)
    return loaded
