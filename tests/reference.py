"""The method once more, as plainly as possible: one prompt at a time, no batch, no padding, no cache.

It shares no code with the project. Tests compare what the scripts write with what is computed here.
Shapes are those of cctuning.py without the batch: T tokens, d hidden size, L layers, V vocabulary.
"""
import json
from pathlib import Path

import numpy as np
import sentencepiece
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

IGNORED = -100


class Reference:
    """A checkpoint folder's decoder (default or linear RoPE), Decision Maker and Transform Matrix.

    tensors: {Hugging Face name: float32 tensor that gathers gradients}.
    """

    def __init__(self, folder):
        self.config = json.loads((Path(folder) / "config.json").read_text("utf-8-sig"))
        files = list(Path(folder).glob("*.safetensors"))
        self.tensors = {name: tensor.float().requires_grad_() for path in files
                        for name, tensor in load_file(path).items()}

    def forward(self, ids, vector=None, position=None):
        """Logits (T, V) and FFN activations (L, T, d) of ids; vector (d,) is added at position."""
        c, w = self.config, self.tensors
        fusion_layer = c.get("cctuning", {}).get("fusion_layer", 0)
        heads, kv = c["num_attention_heads"], c["num_key_value_heads"]
        size, count = c.get("head_dim") or c["hidden_size"] // heads, len(ids)
        stretch = (c.get("rope_scaling") or {}).get("factor", 1)
        frequency = c["rope_theta"] ** (-torch.arange(0, size, 2) / size) / stretch
        angle = torch.arange(count)[:, None] * frequency  # (T, D/2)

        def norm(x, name):
            return x * (x.square().mean(-1, keepdim=True) + c["rms_norm_eps"]).rsqrt() * w[name + ".weight"]

        def linear(x, name):
            return F.linear(x, w[name + ".weight"], w.get(name + ".bias"))

        def heads_of(x):  # (T, heads * D) -> (heads, T, D)
            return x.view(count, -1, size).transpose(0, 1)

        def rotate(x):
            a, b = x.chunk(2, -1)
            return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), -1)

        x, activations = w["model.embed_tokens.weight"][list(ids)], []
        for i in range(c["num_hidden_layers"]):
            layer = f"model.layers.{i}."
            h = norm(x, layer + "input_layernorm")
            q, k, v = (heads_of(linear(h, f"{layer}self_attn.{n}_proj")) for n in "qkv")
            q, k = rotate(q), rotate(k).repeat_interleave(heads // kv, 0)
            scores = q @ k.transpose(1, 2) / size ** 0.5 + torch.full((count, count), -torch.inf).triu(1)
            y = scores.softmax(-1) @ v.repeat_interleave(heads // kv, 0)  # (heads, T, D)
            x = x + linear(y.transpose(0, 1).flatten(1), layer + "self_attn.o_proj")
            h = norm(x, layer + "post_attention_layernorm")
            y = linear(F.silu(linear(h, layer + "mlp.gate_proj")) * linear(h, layer + "mlp.up_proj"),
                       layer + "mlp.down_proj")
            activations.append(y)
            if i == fusion_layer and vector is not None:
                y = torch.cat((y[:position], y[position:position + 1] + vector, y[position + 1:]))
            x = x + y
        x = norm(x, "model.norm")
        head = "model.embed_tokens" if c.get("tie_word_embeddings") else "lm_head"
        return F.linear(x, w[head + ".weight"]), torch.stack(activations)

    def activations(self, prompt, index):
        """H (L, d) of a prompt at the connection position, counted from its end (-1: the last token)."""
        return self.forward(prompt)[1][:, len(prompt) + index]

    def scores(self, activations, token):
        """The Decision Maker's (L,) for H (L, d) and the own-language token at p."""
        mean = (activations + self.tensors["model.embed_tokens.weight"][token]).mean(0)
        return self.tensors["decision_maker.weight"] @ mean

    def loss(self, prompt, answer, vector=None, index=-1):
        """Cross-entropy summed over an answer's ids; vector (d,) is fused at the prompt's p."""
        logits, _ = self.forward(prompt + answer, vector, len(prompt) + index)
        return F.cross_entropy(logits[len(prompt) - 1:-1], torch.tensor(answer), reduction="sum")

    def connected_loss(self, prompt, english, answer, index=-1, noise=None, english_grad=False):
        """The loss of a training sample; noise (L,): the Gumbel noise that draws the layer."""
        with torch.set_grad_enabled(english_grad and torch.is_grad_enabled()):
            activations = self.activations(english, index)
        scores = self.scores(activations, prompt[index])
        noisy = scores if noise is None else scores + noise
        soft = noisy.softmax(-1)
        hard = F.one_hot(noisy.argmax(), len(noisy)).float()
        return self.loss(prompt, answer, (hard - soft.detach() + soft) @ activations, index)

    @torch.no_grad()
    def vector(self, prompt, index=-1, english=None):
        """What is fused at inference: from the own H through the matrix, or from the English H."""
        if english is None:
            activations = self.activations(prompt, index) @ self.tensors["transform_matrix"]
        else:
            activations = self.activations(english, index)
        return activations[self.scores(activations, prompt[index]).argmax()]

    @torch.no_grad()
    def answer(self, prompt, count, stop, vector=None, index=-1):
        """Up to `count` greedy ids after a prompt, each by a full pass, before the first of `stop`."""
        ids = list(prompt)
        while len(ids) - len(prompt) < count:
            token = int(self.forward(ids, vector, len(prompt) + index)[0][-1].argmax())
            if token in stop:
                break
            ids.append(token)
        return ids[len(prompt):]


@torch.no_grad()
def falls_short(reference, prompt, answer, vector=None, index=-1):
    """By how much an answer's ids miss the largest logits at most: 0 where they are the greedy ones.

    Equality would fail where two logits are as good as equal.
    """
    logits, _ = reference.forward(prompt + answer[:-1], vector, len(prompt) + index)
    logits = logits[len(prompt) - 1:]  # (tokens of the answer, V)
    return (logits.max(-1).values - logits[torch.arange(len(answer)), answer]).max()


def gumbel(seed, step, sample, layers):
    """The Gumbel noise (L,) of a sample in a step of training, as train.py documents it."""
    noise = np.random.default_rng((seed, step, sample)).gumbel(size=layers)
    return torch.tensor(noise, dtype=torch.float32)


def random_layer(prompt, layers, seed=0):
    """The layer that the ablation "random" takes outside training: drawn from the prompt's own ids."""
    return int(np.random.default_rng((seed, *prompt)).gumbel(size=layers).argmax())


def prompt_ids(folder, text, template="plain"):
    """(ids, p counted from their end, end of turn) of a prompt, for a SentencePiece checkpoint."""
    sp = sentencepiece.SentencePieceProcessor(model_file=str(Path(folder) / "tokenizer.model"))
    one = sp.piece_to_id
    if template == "llama3":
        start, end, turn = one("<|start_header_id|>"), one("<|end_header_id|>"), one("<|eot_id|>")
        ids = [start, *sp.encode("user"), end, *sp.encode(f"\n\n{text}"), turn,
               start, *sp.encode("assistant"), end, *sp.encode("\n\n")]
        return [sp.bos_id(), *ids], -1, turn
    if template == "chatml":
        start, turn, role = one("<|im_start|>"), one("<|im_end|>"), sp.encode("assistant\n")
        ids = [start, *sp.encode("system\nYou are a helpful assistant."), turn, *sp.encode("\n"),
               start, *sp.encode(f"user\n{text}"), turn, *sp.encode("\n"), start, *role]
        return [sp.bos_id(), *ids], -len(role), turn
    if template == "mistral":
        return [sp.bos_id(), one("[INST]"), *sp.encode(text + " "), one("[/INST]")], -2, sp.eos_id()
    return [sp.bos_id(), *sp.encode(text + "\n")], -1, sp.eos_id()


def answer_ids(folder, text, template="plain"):
    """Ids of an answer, end of turn included, for a SentencePiece checkpoint."""
    sp = sentencepiece.SentencePieceProcessor(model_file=str(Path(folder) / "tokenizer.model"))
    return [*sp.encode(text), prompt_ids(folder, "", template)[2]]
