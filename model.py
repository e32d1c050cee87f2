"""The decoder, its tokenizer and its checkpoint folder.

The decoder is the Llama family's (Llama 2 and 3.x, Mistral, Qwen 2.5 and 3, SmolLM3) under Hugging Face
parameter names: checkpoints load without a rename table. One thing is new: the feed-forward network (FFN)
takes a second input, a Fusion, which CC-Tuning adds to its output (MLP.forward).

    B      rows (prompts) in a batch            L      decoder layers
    T      tokens of a row                      d      hidden size
    K      positions in the KV cache            V      vocabulary size
    heads  query heads                          D      head size
    kv     key/value heads

    config = Config.read(folder)                  the architecture
    model = load_model(folder)                    the decoder with its weights
    tokenizer = Tokenizer(folder, config)         text <-> ids, chat template, connection position
    save_checkpoint(out, folder, tensors, info)   a folder that transformers loads too

Errors in what the user gave are UserErrors: one line that names the file and says what to do. Functions that
read and write users' files stand at the end.
"""
import argparse
import datetime
import errno
import json
import os
import re
import secrets
import shutil
import signal
import sys
from contextlib import suppress
from dataclasses import dataclass
from functools import partial, wraps
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor


DATA = Path(__file__).resolve().parent / "data"  # the embedded default


class UserError(Exception):
    """Bad input. The message is one line: the file (and line), what is wrong, what to do."""


# ------------------------------------------------------------------------------------------ configuration

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "smollm3")  # the values of model_type that are implemented
OTHERS = {  # part of an unsupported model_type: what is missing
    "gemma": "scaled embeddings and other norms", "phi3": "fused projections", "cohere": "parallel blocks",
    "olmo": "norms after the blocks", "granite": "multipliers", "mixtral": "experts", "moe": "experts",
    "gpt_oss": "experts", "llama4": "experts", "deepseek": "experts", "vl": "images", "mistral3": "images"}
SOURCES = ("decision_maker", "random", "mean")  # of the fused vector; or a layer's number (cctuning.py)
ROPE_SCALING = {  # rope type: its numbers in config.json
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
LARGEST = {"vocab_size": 2 ** 24, "hidden_size": 2 ** 20, "intermediate_size": 2 ** 20,
           "num_hidden_layers": 1000, "num_attention_heads": 2 ** 14}  # larger: the file is damaged


@dataclass(frozen=True)
class Config:
    """The architecture, read from config.json."""
    vocab_size: int                # V
    hidden_size: int               # d
    intermediate_size: int
    num_hidden_layers: int         # L
    num_attention_heads: int       # heads
    num_key_value_heads: int       # kv
    head_dim: int                  # D
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: dict             # {"rope_type": "llama3" or "linear", "factor": ...}, or empty
    tie_word_embeddings: bool
    qkv_bias: bool
    output_bias: bool              # of o_proj
    qk_norm: bool                  # RMSNorm of each query and key head
    rope_layers: tuple             # (L,) True: the layer's queries and keys are rotated
    initializer_range: float       # standard deviation of the Decision Maker's initial weights
    max_length: int                # max_position_embeddings, or the sliding window if shorter
    bos_token_id: int | None
    eos_token_ids: tuple
    fusion_layer: int              # the layer whose FFN takes the second input
    source_layer: str | int        # what is fused: one of SOURCES, or a layer's number
    cctuning: dict                 # metadata of train.py: template, method, arguments, matrix fit

    @classmethod
    def read(cls, folder):
        """Read and check FOLDER/config.json, written by transformers 4 or 5.

        Raises UserError for missing, malformed or unsupported settings. To add a Llama-like model_type:
        (1) add its name to FAMILIES, (2) add a field for each difference, such as qkv_bias, and (3) use the
        field in its module.
        """
        path = Path(folder) / "config.json"
        if not path.exists():
            advice = "--model takes a Hugging Face checkpoint folder"
            if re.fullmatch(r"[\w.-]+/[\w.-]+", str(folder)) and not Path(folder).exists():
                advice += f" (a model of the hub: hf download {folder} --local-dir {folder})"
            raise UserError(f"{path}: not found; {advice}")
        raw = read_json(path)
        family = raw.get("model_type")
        rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}  # transformers 5, 4

        def require(condition, problem):
            if not condition:
                raise UserError(f"{path}: {problem}; correct it, or copy the file again")

        def number(key, default=None, kind=int, source=raw, low=None, high=2 ** 31 - 1):
            """The number source[key]: positive, or equal to `low`; at most `high`."""
            value = default if source.get(key) is None else source[key]
            valid = isinstance(value, (int, kind)) and not isinstance(value, bool) and value <= high
            require(valid and (value > 0 or value == low),
                    f"{key} is {value!r}, expected a positive {kind.__name__} up to {high}")
            return kind(value)

        require(isinstance(rope, dict), f"rope_scaling is {rope!r}, expected an object")
        require(isinstance(raw.get("layer_types") or [], list), "layer_types is not a list")
        rope_type = rope.get("rope_type") or rope.get("type") or "default"
        refuse_unsupported(path, raw, rope, rope_type)

        sizes = {name: number(name, high=largest) for name, largest in LARGEST.items()}
        hidden, layers, heads = sizes["hidden_size"], sizes["num_hidden_layers"], sizes["num_attention_heads"]
        kv, head_dim = number("num_key_value_heads", heads), number("head_dim", hidden // heads)
        require(heads % kv == 0 and head_dim % 2 == 0 and heads * head_dim <= LARGEST["hidden_size"]
                and (raw.get("head_dim") or hidden % heads == 0),
                f"{heads} heads, {kv} key/value heads, head_dim {head_dim}, hidden_size {hidden} do not fit")
        tied = raw.get("tie_word_embeddings", family == "smollm3") or False  # null: False
        require(isinstance(tied, bool), f"tie_word_embeddings is {tied!r}, expected true or false")
        has_bias = bool(raw.get("attention_bias")) and family not in ("mistral", "qwen2")  # ignored there
        bos, eos = raw.get("bos_token_id"), raw.get("eos_token_id")
        eos = eos if isinstance(eos, list) else [] if eos is None else [eos]
        require(all(isinstance(i, int) for i in eos), f"eos_token_id is {eos!r}, expected ids")

        scaling = {key: number(key, kind=float, source=rope) for key in ROPE_SCALING[rope_type]}
        require(rope_type != "llama3" or scaling["high_freq_factor"] > scaling["low_freq_factor"],
                "high_freq_factor must be larger than low_freq_factor")
        # SmolLM3: no rotary positions in every fourth layer. no_rope_layers: 1 for a layer with them.
        rotated = [1] * layers
        if family == "smollm3":
            interval = number("no_rope_layer_interval", 4)
            rotated = raw.get("no_rope_layers") or [int((i + 1) % interval != 0) for i in range(layers)]
        require(isinstance(rotated, list) and len(rotated) == layers and all(i in (0, 1) for i in rotated),
                f"no_rope_layers is {rotated!r}, expected a 0 or 1 for each of {layers} layers")

        length = number("max_position_embeddings", 2048)
        if rope_type == "linear" and not rope.get("original_max_position_embeddings"):
            length = max(length, number("max_sequence_length", int(length * scaling["factor"])))
        slides = (family == "mistral" or raw.get("use_sliding_window")
                  or "sliding_attention" in (raw.get("layer_types") or []))
        if slides and raw.get("sliding_window") not in (0, -1):
            length = min(length, number("sliding_window", length))

        info = raw.get("cctuning", {})
        require(isinstance(info, dict) and all(isinstance(info.get(key, {}), dict)
                                               for key in ("matrix", "arguments")), "cctuning is malformed")
        languages, fusion = info.get("languages", []), info.get("fusion_layer", 0)
        source = info.get("source_layer", "decision_maker")
        require(isinstance(languages, list) and all(isinstance(lang, str) for lang in languages),
                "cctuning.languages is not a list of language codes")
        require(fusion in range(layers) and source in (*SOURCES, *range(layers)),
                f"cctuning names the layers {fusion!r} and {source!r}, the model has {layers}")
        return cls(
            **sizes,
            num_key_value_heads=kv,
            head_dim=head_dim,
            rms_norm_eps=number("rms_norm_eps", 1e-6, float),
            rope_theta=number("rope_theta", raw.get("rope_theta", 10000.0), float, rope, high=1e12),
            rope_scaling=dict(scaling, rope_type=rope_type) if scaling else {},
            tie_word_embeddings=tied,
            qkv_bias=has_bias or family == "qwen2",
            output_bias=has_bias,
            qk_norm=family == "qwen3",
            rope_layers=tuple(map(bool, rotated)),
            initializer_range=number("initializer_range", 0.02, float, low=0),
            max_length=length,
            bos_token_id=bos if isinstance(bos, int) else None,
            eos_token_ids=tuple(eos),
            fusion_layer=fusion,
            source_layer=source,
            cctuning=info,
        )


def refuse_unsupported(path, raw, rope, rope_type):
    """Raise UserError for what the decoder does not implement."""
    family = raw.get("model_type")
    why = next((why for part, why in OTHERS.items() if part in str(family)), "another architecture")
    kinds = {*map(str, raw.get("layer_types") or [])} - {"full_attention", "sliding_attention"}
    for feature, found in {
        f"model_type {family!r} ({why})": family not in FAMILIES,
        "quantization_config (quantised weights)": raw.get("quantization_config") is not None,
        "mlp_bias": raw.get("mlp_bias"),
        f"hidden_act {raw.get('hidden_act')!r}": raw.get("hidden_act", "silu") != "silu",
        f"rope type {rope_type!r}": str(rope_type) not in ROPE_SCALING,
        "partial_rotary_factor": {**raw, **rope}.get("partial_rotary_factor") not in (None, 1),
        f"layer_types {sorted(kinds)}": kinds,
    }.items():
        if found:
            raise UserError(f"{path}: {feature} is not supported; use another model (model_type "
                            f"{', '.join(FAMILIES)}), or extend Config.read in model.py")


# ------------------------------------------------------------------------------------------------ decoder

class Fusion(NamedTuple):
    """The second input of an FFN: a vector for one token of each row, added to the FFN's output."""
    vector: torch.Tensor    # (B, d)
    position: torch.Tensor  # (B,) index in T


def select_positions(x, positions):
    """One token of each row of x (B, T, ...): at positions (B,) -> (B, ...)."""
    return x[torch.arange(len(x), device=x.device), positions]


class RMSNorm(nn.Module):
    """Root-mean-square normalisation (arXiv 1910.07467)."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        """(..., d) -> (..., d). Under autocast, cast once here: else each linear layer would."""
        y, device = F.rms_norm(x, self.weight.shape, self.weight, self.eps), x.device.type
        return y.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else y


def rotary_embedding(config, positions):
    """Cosines and sines of the rotary embedding (arXiv 2104.09864).

    positions (B, T) or (1, T) -> (2, B or 1, T, 1, D) float32. Dimension i is paired with i + D/2
    (the split-half layout of Hugging Face checkpoints): a pair (a, b) turns into
    (a cos - b sin, b cos + a sin), hence the minus on the sines of the first half.
    """
    dims = torch.arange(0, config.head_dim, 2, device=positions.device, dtype=torch.float32)
    frequency = 1.0 / config.rope_theta ** (dims / config.head_dim)  # (D/2,) radians per token
    scaling = config.rope_scaling
    if scaling.get("rope_type") == "linear":
        frequency = frequency / scaling["factor"]
    elif scaling.get("rope_type") == "llama3":
        # Stretch long wavelengths by `factor`, keep short ones, blend in between.
        turns = scaling["original_max_position_embeddings"] * frequency / (2 * torch.pi)
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        frequency = keep * frequency + (1 - keep) * frequency / scaling["factor"]
    angle = positions.float()[..., None, None] * frequency  # (B, T, 1, D/2)
    cos, sin = angle.cos(), angle.sin()
    return torch.stack((torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)))


def rotate(x, rotary):
    """Rotate x (B, T, heads, D) by the angles of rotary (2, B or 1, T, 1, D). None: return x unchanged."""
    if rotary is None:
        return x
    cos, sin = rotary.to(x.dtype)
    return x * cos + x.roll(x.shape[-1] // 2, -1) * sin  # roll: the partner of each dimension


class KVCache:
    """Keys and values of the tokens read so far, a pair of tensors (B, kv, room, D) per layer.

    length: positions in use, the same for all rows. Shorter rows have unused positions: the attention mask
    hides them, but they must be finite (0 x NaN is NaN), so start from zeros.
    """

    def __init__(self, config, rows, room, dtype, device):
        shape = (rows, config.num_key_value_heads, room, config.head_dim)
        self.layers = [[torch.zeros(shape, dtype=dtype, device=device) for _ in range(2)]
                       for _ in range(config.num_hidden_layers)]
        self.length = 0

    def update(self, layer, k, v, at=None):
        """Write k, v (B, kv, T, D) at positions (B, 1, T, 1), expanded to their shape; None: 0 to T - 1.

        Returns the keys and values of all positions in use, (B, kv, length, D) each.
        """
        keys, values = (tensor[:, :, :self.length] for tensor in self.layers[layer])
        if at is None:
            keys[:], values[:] = k, v
            return k, v
        return keys.scatter_(2, at, k), values.scatter_(2, at, v)

    def keep_rows(self, rows):
        """Keep only these rows. Layer by layer: memory never holds the cache twice."""
        for layer in self.layers:
            layer[:] = (tensor[rows] for tensor in layer)


class Attention(nn.Module):
    """Grouped-query attention (arXiv 2305.13245) with rotary positions."""

    def __init__(self, config):
        super().__init__()
        self.head_dim, bias = config.head_dim, config.qkv_bias
        width = config.num_attention_heads * config.head_dim
        kv_width = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, width, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=bias)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=config.output_bias)
        self.q_norm, self.k_norm = nn.Identity(), nn.Identity()
        if config.qk_norm:
            self.q_norm, self.k_norm = (RMSNorm(config.head_dim, config.rms_norm_eps) for _ in range(2))

    def split_heads(self, x):
        return x.unflatten(-1, (-1, self.head_dim))  # (B, T, heads, D)

    def keys_values(self, x, rotary):
        """Keys and values (B, kv, T, D) of x (B, T, d)."""
        k, v = self.split_heads(self.k_proj(x)), self.split_heads(self.v_proj(x))
        return rotate(self.k_norm(k), rotary).transpose(1, 2), v.transpose(1, 2)

    def forward(self, x, rotary, k, v, mask):
        """The queries of x (B, T, d) attend to k, v (B, kv, K, D): (B, T, d).

        mask (B, 1, group * T or 1, K), the same for all key heads: boolean (True: visible) or added to the
            scores; group: query heads per key head. None: causal, K = T.
        """
        q = rotate(self.q_norm(self.split_heads(self.q_proj(x))), rotary).transpose(1, 2)  # (B, heads, T, D)
        if mask is None:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        else:
            # enable_gqa with a mask has no fused GPU kernel before torch 2.14, except cuDNN's. So the
            # query heads that share a key head become rows of one query.
            group = q.shape[1] // k.shape[1]
            q = q.unflatten(1, (-1, group)).flatten(2, 3)  # (B, kv, group * T, D)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
            y = y.unflatten(2, (group, -1)).flatten(1, 2)  # (B, heads, T, D)
        return self.o_proj(y.transpose(1, 2).flatten(2))  # (B, heads, T, D) -> (B, T, d)


def attention_mask(config, positions, length, dtype):
    """For queries at positions (B, T): 0 for visible keys, -inf for later ones (B, 1, group * T, K = length).

    Made once for all layers: numbers, with a row stride that is a multiple of 8, as the GPU kernels need it.
    They would convert and copy any other mask in every layer.
    """
    group = config.num_attention_heads // config.num_key_value_heads
    keys = torch.arange(-(-length // 8) * 8, device=positions.device)
    later = (keys > positions[:, :, None]).repeat(1, group, 1)[:, None]
    return torch.zeros_like(later, dtype=dtype).masked_fill_(later, -torch.inf)[..., :length]


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up (arXiv 2002.05202). Saves two tensors for the backward pass, autograd three."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), grad * F.silu(gate)


class MLP(nn.Module):
    """The gated feed-forward network (FFN), with CC-Tuning's second input."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x, fusion=None):
        """FFN(x), plus fusion.vector at fusion.position (paper, section 3): (B, T, d) -> (B, T, d)."""
        y = self.down_proj(SwiGLU.apply(self.gate_proj(x), self.up_proj(x)))
        if fusion is not None:
            rows = torch.arange(len(y), device=y.device)
            y[rows, fusion.position] += fusion.vector.to(y.dtype)
        return y


class DecoderLayer(nn.Module):
    """Attention and FFN; each reads the normalised residual stream and adds to it."""

    def __init__(self, config):
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x, rotary, mask=None, update_cache=None, fusion=None, only_at=None):
        """(B, T, d) -> the layer's output and its FFN activation, (B, T, d) each.

        update_cache(k, v): writes keys and values to the KV cache, returns those of all positions.
        only_at (B,): compute the output only for this token of each row, (B, 1, d) each. All tokens
            still give keys and values.
        """
        h = self.input_layernorm(x)
        k, v = self.self_attn.keys_values(h, rotary)
        if update_cache is not None:
            k, v = update_cache(k, v)
        if only_at is not None:
            x, h = (select_positions(t, only_at)[:, None] for t in (x, h))  # (B, 1, d)
            if rotary is not None:
                rotary = rotary[:, 0, only_at, None]  # (2, 1, T, 1, D) -> (2, B, 1, 1, D)
            keys = torch.arange(k.shape[2], device=x.device)
            mask = (keys <= only_at[:, None])[:, None, None]  # (B, 1, 1, K)
        x = x + self.self_attn(h, rotary, k, v, mask)
        activation = self.mlp(self.post_attention_layernorm(x), fusion)
        return x + activation, activation


class Output(NamedTuple):
    """What Transformer.forward returns."""
    hidden: torch.Tensor               # (B, T, d) of the last layer; (B, 1, d) with collect_at
    activations: torch.Tensor | None   # (L, B, d) FFN activations at collect_at
    fusion_input: torch.Tensor         # (B, T, d) input of the fusion layer


class Transformer(nn.Module):
    """The decoder, under Hugging Face's parameter names: model.embed_tokens, model.layers.N, ..."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = nn.ModuleDict({
            "embed_tokens": nn.Embedding(config.vocab_size, config.hidden_size),
            "layers": nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers)),
            "norm": RMSNorm(config.hidden_size, config.rms_norm_eps),
        })
        # A tied head is the embedding matrix itself: no second parameter to load, shard or save.
        self.lm_head = None
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def embed(self, ids):
        """Token embeddings: (...) -> (..., d)."""
        return self.model.embed_tokens(ids)

    def forward(self, x, positions=None, cache=None, fusion=None, collect_at=None, first_layer=0):
        """Run token embeddings x (B, T, d) through the decoder. Returns an Output.

        Full pass (positions=None): right-padded rows from position 0. Padding comes after every real
            token, so the causal mask is enough. With a cache, it writes keys and values there.
        Decoding: positions (B, T) of the tokens in their rows, and a KVCache; they attend to the cached
            positions up to their own.
        Restart: first_layer > 0; x is the input of that layer.
        fusion: the second input of the fusion layer's FFN.
        collect_at (B,): in a full pass, collect the FFN activations of this token of each row; the last
            layer computes only this token.
        """
        config, layers = self.config, self.model.layers
        rotary_positions, mask, at = positions, None, None
        if positions is None:
            rotary_positions = torch.arange(x.shape[1], device=x.device)[None]  # (1, T)
            if cache is not None:
                cache.length = x.shape[1]
        else:
            mask = attention_mask(config, positions, cache.length, x.dtype)
            at = positions[:, None, :, None].expand(-1, config.num_key_value_heads, -1, config.head_dim)
        rotary = rotary_embedding(config, rotary_positions).to(x.dtype)
        activations, fusion_input = [], None
        for i in range(first_layer, len(layers)):
            is_last = i == len(layers) - 1
            if i == config.fusion_layer:
                fusion_input = x
            x, activation = layers[i](
                x, rotary if config.rope_layers[i] else None, mask,
                update_cache=None if cache is None else partial(cache.update, i, at=at),
                fusion=fusion if i == config.fusion_layer else None,
                only_at=collect_at if is_last else None,
            )
            if collect_at is not None:
                here = torch.zeros_like(collect_at) if is_last else collect_at
                activations.append(select_positions(activation, here))  # (B, d)
        return Output(x, torch.stack(activations) if activations else None, fusion_input)

    def logits(self, x):
        """Next-token logits (..., V) from the last layer's output (..., d)."""
        x = self.model.norm(x)
        if self.lm_head is None:
            return F.linear(x, self.model.embed_tokens.weight)
        return self.lm_head(x)


def pad(rows):
    """Right-pad lists of ids: (B, T), and their lengths (B,)."""
    lengths = torch.tensor([len(row) for row in rows])
    padded = torch.zeros(len(rows), int(lengths.max()), dtype=torch.long)
    for i, row in enumerate(rows):
        padded[i, :len(row)] = torch.tensor(row)
    return padded, lengths


# ------------------------------------------------------------------------------ checkpoint folder: reading

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
INDEX_FILE = "model.safetensors.index.json"
CCTUNING_FILE = "cctuning.safetensors"  # decision_maker.weight (L, d), transform_matrix (d, d)
PAPER_DECISION_MAKER = "model.source_select.weight"  # its name in checkpoints of the paper's code
TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
                   "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja",
                   "generation_config.json")


class Loaded(NamedTuple):
    """What load_weights returns."""
    dtypes: dict                          # {tensor name: dtype as stored}
    decision_maker: torch.Tensor | None   # (L, d), in a checkpoint of the paper's code


def open_safetensors(path):
    """safe_open, with an error that names the file."""
    if not Path(path).is_file():
        raise UserError(f"{path}: not found; copy the folder again")
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: damaged or cut short ({error}); copy the file again") from None


def weight_files(folder):
    """{file: names of its tensors} of a checkpoint folder, from its single file or its index."""
    folder = Path(folder)
    single, index, files = folder / "model.safetensors", folder / INDEX_FILE, {}
    if single.exists():
        with open_safetensors(single) as file:
            return {single: list(file.keys())}
    if not index.exists():
        raise UserError(f"{folder}: no {single.name}, no {INDEX_FILE}; convert other formats to safetensors")
    weight_map = read_json(index).get("weight_map")
    names = weight_map.values() if isinstance(weight_map, dict) else [None]
    if not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise UserError(f"{index}: weight_map must map tensor names to file names; copy the file again")
    for name, file in weight_map.items():
        files.setdefault(folder / file, []).append(name)
    return files


def is_papers_checkpoint(folder):
    """True if a Decision Maker of the paper's code is among the weights."""
    try:
        return any(PAPER_DECISION_MAKER in names for names in weight_files(folder).values())
    except UserError:  # raised again when the weights are loaded
        return False


def assign(model, name, stored, dtype=None, device="cpu"):
    """Set a parameter from `stored`, a tensor or a slice of an open file. Returns the local tensor.

    Sharded (DTensor): copy this rank's shard, ceil(n / world) of the first dimension as in fully_shard.
    Otherwise: replace the parameter, without a copy unless dtype or device change.
    """
    parameter = model.get_parameter(name)
    if isinstance(parameter, DTensor):
        rows, mesh = parameter.detach().to_local(), parameter.device_mesh
        start = mesh.get_local_rank() * -(-len(parameter) // mesh.size())
        if len(rows):
            rows.copy_(stored[start:start + len(rows)])
        return rows
    module, _, leaf = name.rpartition(".")
    value = nn.Parameter(stored.to(device=device, dtype=dtype), parameter.requires_grad)
    setattr(model.get_submodule(module), leaf, value)
    return value


def refuse_nan(name, tensor):
    """Raise UserError for NaN, else return the tensor. (aminmax is far faster than isnan.)"""
    if len(tensor) and tensor.aminmax().max.isnan():
        raise UserError(f"{name} holds NaN; copy the file again, or train with a lower --lr")
    return tensor


def load_weights(model, folder, dtype=None, device="cpu"):
    """Load a checkpoint folder into a Transformer (on the meta device, or sharded). Returns Loaded.

    dtype: of the loaded weights; None: as stored. Raises UserError for a missing or unexpected tensor, or a
    wrong shape.
    """
    parameters, dtypes, decision_maker = dict(model.named_parameters()), {}, None
    ignored = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    for path, names in weight_files(folder).items():
        with open_safetensors(path) as file:
            held = set(file.keys())
            for name in names:
                if name in ignored or name.endswith("rotary_emb.inv_freq"):  # a buffer in old checkpoints
                    continue
                if name not in held:
                    raise UserError(f"{path}: lacks {name}, which {INDEX_FILE} lists; copy the folder again")
                if name == PAPER_DECISION_MAKER:
                    decision_maker = file.get_tensor(name)
                    continue
                if name not in parameters:
                    raise UserError(f"{path}: unexpected tensor {name}; config.json is not of this model")
                parameter, stored = parameters[name], file.get_slice(name)
                shape, kind = tuple(stored.get_shape()), stored.get_dtype()
                if kind not in DTYPES:
                    raise UserError(f"{path}: {name} has the dtype {kind}, not supported; use float weights")
                if shape != tuple(parameter.shape):
                    raise UserError(f"{path}: {name} has shape {shape}, config.json says "
                                    f"{tuple(parameter.shape)}; the files do not belong to the same model")
                dtypes[name] = DTYPES[kind]
                is_sharded = isinstance(parameter, DTensor)
                value = assign(model, name, stored if is_sharded else file.get_tensor(name), dtype, device)
                refuse_nan(f"{path}: {name}", value)
    if missing := sorted(parameters.keys() - dtypes.keys()):
        raise UserError(f"{folder}: {len(missing)} tensors are missing, for example {missing[0]}; copy the "
                        "folder again")
    if dtype is None:  # cast all parameters to one dtype: some checkpoints store norms in another
        model.to(model.model.embed_tokens.weight.dtype)
    return Loaded(dtypes, decision_maker)


def load_model(folder, dtype=None, device="cpu"):
    """The Transformer of a checkpoint folder, with its weights; see load_weights."""
    with torch.device("meta"):  # shapes without memory
        model = Transformer(Config.read(folder))
    load_weights(model, folder, dtype, device)
    return model


# ------------------------------------------------------------------------------ checkpoint folder: writing

RUN_FILE = "run.json"  # the first file that a run writes: its process and host
SHARDS = f"model-{5 * '[0-9]'}-of-{5 * '[0-9]'}.safetensors"


def holds_model(folder):
    """True if the folder has model files, which saving would replace."""
    return any((Path(folder) / name).exists() for name in ("config.json", INDEX_FILE, "model.safetensors"))


def is_ours(out):
    """True if config.json, or RUN_FILE before a result exists, has train.py's entry "cctuning".

    Raises UserError if a run would replace or remove a file not written by train.py.
    """
    out, folders = Path(out), ("checkpoints", "saving.tmp")
    marker = next((out / name for name in ("config.json", RUN_FILE) if (out / name).exists()), None)
    ours = marker is not None and "cctuning" in read_json(marker)
    files = ("config.json", RUN_FILE, "train_log.jsonl", INDEX_FILE, CCTUNING_FILE, *TOKENIZER_FILES)
    for path in [*(out / name for name in (*files, *folders)), *out.glob(SHARDS)]:
        expected = path.is_dir() and not path.is_symlink() if path.name in folders else path.is_file()
        if (path.is_symlink() or path.exists()) and not (ours and expected):
            raise UserError(f"{path}: was not written by train.py and would be replaced; give another --out")
    if (out / "model.safetensors").exists():
        raise UserError(f"{out}/model.safetensors: would be loaded instead of the result; give another --out")
    return ours


def tokenizer_files(folder):
    """Names of a checkpoint folder's tokenizer files.

    Raises UserError for a folder, a pipe or a link out of the checkpoint folder, except links to the blobs of
    Hugging Face's cache.
    """
    paths = [path for name in TOKENIZER_FILES if (path := Path(folder) / name).exists() or path.is_symlink()]
    home = Path(folder).resolve()
    for path in paths:
        if not path.is_file() or path.resolve().parent not in (home, home.parent.parent / "blobs"):
            raise UserError(f"{path}: is not a regular file of this folder; put a copy there")
    return [path.name for path in paths]


def write_shards(folder, tensors, shard_bytes):
    """Write (name, tensor) pairs as model-*-of-*.safetensors with their index. Keeps one shard in memory."""
    shard, shards, size, total = {}, [], 0, 0  # the open shard; names in each written one; bytes

    def close_shard():
        save_file(shard, folder / f"{len(shards)}.tmp", metadata={"format": "pt"})
        shards.append(list(shard))
        shard.clear()

    for name, tensor in tensors:
        if shard and size + tensor.nbytes > shard_bytes:
            close_shard()
            size = 0
        shard[name] = tensor.contiguous()
        size, total = size + tensor.nbytes, total + tensor.nbytes
    close_shard()
    index = {"metadata": {"total_size": total}, "weight_map": {}}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"{i}.tmp").rename(folder / file)
        index["weight_map"].update(dict.fromkeys(names, file))
    write_text(folder / INDEX_FILE, json.dumps(index, indent=2))


def save_checkpoint(out, source, tensors, info, extra=None, shard_bytes=5_000_000_000, tokenizer=None):
    """Write a Hugging Face checkpoint folder. An old model there stays until the new one is written.

    source: config.json and the tokenizer files are copied from this folder.
    tensors: iterable of (name, tensor) in the dtype to store.
    info: config.json's entry "cctuning".  extra: {name: tensor} of cctuning.safetensors.
    tokenizer: the source's Tokenizer; its chat template is saved.
    """
    out, source = Path(out), Path(source)
    staging = out / "saving.tmp"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    write_shards(staging, tensors, shard_bytes)
    for name in tokenizer_files(source):
        shutil.copyfile(source / name, staging / name)
    if tokenizer:
        tokenizer.save(staging)
    if extra:
        save_file({name: t.contiguous() for name, t in extra.items()}, staging / CCTUNING_FILE)
    info = {**info, "files": sorted(path.name for path in staging.iterdir())}
    config = dict(read_json(source / "config.json"), cctuning=info)
    write_text(staging / "config.json", json.dumps(config, indent=2, ensure_ascii=False))
    umask = os.umask(0)  # can only be read by setting it
    os.umask(umask)
    for path in staging.iterdir():
        path.chmod(0o666 & ~umask)  # save_file leaves 0600
        sync(path)

    # Remove the old model, its index first; then move the new one in, its index last. A folder without an
    # index does not load, so a crash in between leaves no mixture of the two. Tokenizer files not listed by
    # the old model are the user's.
    old = read_json(out / "config.json").get("cctuning", {}) if (out / "config.json").exists() else {}
    names = [INDEX_FILE, CCTUNING_FILE, *(name for name in TOKENIZER_FILES if name in old.get("files", []))]
    for path in [*(out / name for name in names), *out.glob(SHARDS)]:
        path.unlink(missing_ok=True)
    for path in sorted(staging.iterdir(), key=lambda p: p.name == INDEX_FILE):
        path.replace(out / path.name)
    staging.rmdir()
    sync(out)


# -------------------------------------------------------------------------- chat template and tokenizer

class Template(NamedTuple):
    """One of the paper's chat templates."""
    turn: str                       # {x}: the user's text; then the start of the assistant's turn
    special: tuple = ()             # the special tokens in it
    end_of_turn: str | None = None  # None: the model's EOS
    system: str = ""                # text before the first turn


TEMPLATES = {
    "llama3": Template("<|start_header_id|>user<|end_header_id|>\n\n{x}<|eot_id|>"
                       "<|start_header_id|>assistant<|end_header_id|>\n\n",
                       ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), "<|eot_id|>"),
    "chatml": Template("<|im_start|>user\n{x}<|im_end|>\n<|im_start|>assistant\n",
                       ("<|im_start|>", "<|im_end|>"), "<|im_end|>",
                       "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"),
    # SentencePiece puts the space between [INST] and the prompt, as before each text after a special token.
    "mistral": Template("[INST]{x} [/INST]", ("[INST]", "[/INST]")),
    "llama2": Template("[INST] {x} [/INST]"),
    "plain": Template("{x}\n"),
}
TEMPLATE_NAMES = ("own", *TEMPLATES)  # own: the checkpoint's
JINJA = (  # of the paper's templates; START, BEFORE, AFTER and END are replaced
    "{{ START }}{% for m in messages %}{% if m['role'] == 'user' %}{{ BEFORE + m['content'] + AFTER }}"
    "{% elif m['role'] == 'assistant' %}{{ m['content'] + END }}"
    "{% else %}{{ raise_exception('trained with user and assistant turns only') }}{% endif %}{% endfor %}")
TODAY = datetime.datetime(2024, 7, 26)  # the date in every prompt: it must not change from day to day
TAG = re.compile(r"<[^<>\s]+>|\[/?[A-Z_]+\]")  # the form of pieces that mark turns
WORDS, ANSWER = "\ue000", "\ue001"  # placeholders, of the private use area


def freeze(source):
    """A chat template that renders the same on any day, and without thinking unless asked for."""
    dates = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")
    source = dates.sub(lambda match: json.dumps(TODAY.strftime(match[2])), source)
    if "date_string" in source and "set date_string" not in source:
        source = f'{{%- set date_string = date_string | default("{TODAY:%d %b %Y}") %}}\n' + source
    thinking = "{%- set enable_thinking = enable_thinking | default(false) %}\n"
    return thinking + source if "enable_thinking" in source and thinking not in source else source


def compile_jinja(source):
    """Compile a chat template with the options, filters and functions that transformers provides."""
    import jinja2.ext
    import jinja2.sandbox

    def raise_exception(message):
        raise jinja2.TemplateError(message)

    # {% generation %} marks the answer for transformers and changes no text.
    source = re.sub(r"({%[-+]?\s*)(end|)generation\b",
                    lambda match: match[1] + ("endif" if match[2] else "if true"), source)
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols])
    environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
    environment.globals.update(raise_exception=raise_exception, strftime_now=TODAY.strftime)
    return environment.from_string(source)


class Turn(NamedTuple):
    """A rendered turn, cut at special tokens: ids before; the text left + content + right; ids after."""
    before: list   # ids
    left: str
    right: str
    after: list    # ids
    strip: list    # [left, right]: True if white space of the prompt or answer is stripped there
    prefix: bool   # True if the tokenizer puts a space before the text


def no_panic(method):
    """Turn a failure of the tokenizers package into a UserError.

    It raises plain Exceptions, or panics: not an Exception, and printed before it can be caught. So stderr is
    silenced meanwhile.
    """
    @wraps(method)
    def guarded(self, *args, **options):
        stderr, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 2)
        try:
            return method(self, *args, **options)
        except BaseException as error:
            if type(error) is not Exception and type(error).__name__ != "PanicException":
                raise
            raise UserError(f"{self.path}: the tokenizers package fails ({error}); copy the file "
                            "again") from None
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            os.close(null)
    return guarded


def splitter(tokens):
    """A function that cuts a text at tokens, {text: token}: [text or id]."""
    ids, patterns = {name: token["id"] for name, token in tokens.items()}, []
    for name in sorted(ids, key=len, reverse=True):
        left, right = (r"\s*" if tokens[name].get(key) else "" for key in ("lstrip", "rstrip"))
        patterns.append(left + re.escape(name) + right)
    pattern = re.compile(f"({'|'.join(patterns) or '(?!)'})")

    def split(text):
        parts = enumerate(pattern.split(text))
        return [ids.get(part, ids.get(part.strip())) if n % 2 else part for n, part in parts if part]
    return split


def prefix_scheme(contents):
    """When a tokenizer.json puts a space before a text: always, first (at a prompt's start) or never."""
    text = json.dumps([contents.get("normalizer"), contents.get("pre_tokenizer")])
    if '"prepend_scheme": "first"' in text:
        return "first"
    always = ('"prepend_scheme": "always"', '"Prepend"', '"add_prefix_space": true')
    return "always" if any(sign in text for sign in always) else "never"


class Tokenizer:
    """Text to ids and back in the checkpoint's chat template, for training, inference and evaluation.

    template: its name.  jinja: its source; transformers makes the same prompts with it.
    connection_index: the connection position, counted from a prompt's end (-1: its last token).
    end_of_turn: the id that ends an answer.  stop: all ids that end decoding.
    control: {text: id} of special tokens and of the template's tokens; no user text becomes one of them.
    notice: a line to show the user, or None.
    Raises UserError for missing or malformed files, or if the template's special tokens are missing.
    """

    @no_panic
    def __init__(self, folder, config, template=None):
        self.folder, self.notice = Path(folder), None
        paths = (self.folder / name for name in ("tokenizer.model", "tokenizer.json"))
        self.path = next((path for path in paths if path.is_file()), None)
        if self.path is None:
            raise UserError(f"{folder}: no tokenizer.model or tokenizer.json; copy the base model's "
                            "tokenizer there")
        files = (self.folder / f"{name}.json" for name in (
            "tokenizer_config", "generation_config", "special_tokens_map", "added_tokens", "tokenizer"))
        self.settings, self.generation, special_map, listed, contents = (
            read_json(path) if path.exists() else {} for path in files)
        if "added_tokens_decoder" in self.settings:  # as in transformers: it replaces these files
            special_map, listed = {}, {}
        read = self._read_sentencepiece if self.path.suffix == ".model" else self._read_tokenizer_json
        try:
            self.added = {token["content"]: token for token in contents.get("added_tokens") or []}
            for i, token in (self.settings.get("added_tokens_decoder") or {}).items():
                self.added[token["content"]] = dict(token, id=int(i))
            for text, i in listed.items():
                self.added.setdefault(text, {"id": i})
            read(contents, {**self.settings, **special_map}, config)
            source = self.settings.get("chat_template")
            if isinstance(source, list):  # several, by name
                source = {entry["name"]: entry["template"] for entry in source}.get("default")
            if (self.folder / "chat_template.jinja").exists():
                source = read_text(self.folder / "chat_template.jinja")
            if not isinstance(source, (str, type(None))):
                raise TypeError(f"chat_template is {source!r}")
            self._source = freeze(source) if source else None
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{self.path}: this file or tokenizer_config.json is malformed ({error!r}); copy "
                            "both again") from None
        self._set_eos(config)
        self.template = template or config.cctuning.get("template") or self._choose_template()
        if not isinstance(self.template, str) or self.template not in TEMPLATE_NAMES:
            raise UserError(f"{folder}: unknown template {self.template!r}; give one of "
                            f"{', '.join(TEMPLATE_NAMES)}")
        self._set_template(config)

    # ---- the vocabulary

    def _set_special(self, given, id_of):
        """Mark the special tokens of tokenizer_config.json; set named, {"bos_token": text, ...}, bos and eos.

        id_of(text): an id or None. As in transformers, a token missing from the vocabulary gets the next id.
        """
        names = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
        tokens = {name: given[name] for name in names if given.get(name)}
        for key in ("additional_special_tokens", "extra_special_tokens"):
            extra = given.get(key) or []
            tokens |= extra if isinstance(extra, dict) else {f"{key}_{n}": x for n, x in enumerate(extra)}
        for name, token in tokens.items():
            token = token if isinstance(token, dict) else {"content": token}
            text = tokens[name] = token["content"]
            following = max([self.size, *(known["id"] + 1 for known in self.added.values())])
            known = {"id": following if id_of(text) is None else id_of(text), **self.added.get(text, {})}
            self.added[text] = {**token, **known, "special": True}
        self.named = tokens
        self.bos, self.eos = (self.added[tokens[key]]["id"] if key in tokens else None
                              for key in ("bos_token", "eos_token"))

    def _set_eos(self, config):
        """Collect the EOS ids of the configs; the first becomes eos if the tokenizer has none."""
        listed = self.generation.get("eos_token_id")
        listed = [*(listed if isinstance(listed, list) else [listed]), *config.eos_token_ids]
        if not all(i is None or isinstance(i, int) for i in listed):
            raise UserError(f"{self.folder}/generation_config.json: eos_token_id is {listed!r}; copy the "
                            "file again")
        self._listed = [i for i in listed if i is not None and 0 <= i < config.vocab_size]
        self.eos = self._listed[0] if self.eos is None and self._listed else self.eos

    def _read_sentencepiece(self, contents, given, config):
        import sentencepiece
        proto = self.path.read_bytes()
        try:
            sp = sentencepiece.SentencePieceProcessor(model_proto=proto)
            # Protobuf messages merge when concatenated: this sets normalizer_spec.add_dummy_prefix to false.
            bare = sentencepiece.SentencePieceProcessor(model_proto=proto + b"\x1a\x02\x18\x00")
        except (RuntimeError, OSError):
            raise UserError(f"{self.path}: not a SentencePiece model; copy it again, or remove it to use "
                            "tokenizer.json") from None
        self.size = size = sp.get_piece_size()
        for i in range(size):
            text, is_control = sp.id_to_piece(i), sp.is_control(i)
            if is_control or (TAG.fullmatch(text) and not sp.is_byte(i)):  # or user-defined
                self.added.setdefault(text, {"id": i, "special": is_control})
        self.added = {text: token for text, token in self.added.items()  # not where a piece has its id
                      if token["id"] >= size or token["id"] == sp.piece_to_id(text)}
        ids = {"bos_token": sp.bos_id(), "eos_token": sp.eos_id(), "unk_token": sp.unk_id()}
        self._set_special({**{key: sp.id_to_piece(i) for key, i in ids.items() if i >= 0}, **given},
                          lambda text: None if sp.is_unknown(i := sp.piece_to_id(text)) else i)
        # Unless legacy, transformers puts SentencePiece's space only before a text at the very start.
        scheme = "always" if self.settings.get("legacy") in (None, True) else "first"
        if "model" in contents and self.settings.get("add_prefix_space") is None:  # as in transformers
            scheme = prefix_scheme(contents)
        self.prefix = "never" if self.settings.get("add_prefix_space") is False else scheme

        # Texts of what SentencePiece cannot decode: added words, and "" for special tokens.
        mark = WORDS if self.prefix == "always" else ""  # the tokenizer puts a space after the word
        texts = {token["id"]: "" if token.get("special") else text + mark
                 for text, token in self.added.items() if token["id"] >= size or token.get("special")}

        def decode(ids):
            pieces = [texts.get(i) or sp.id_to_piece(i) for i in ids if texts.get(i, i < size)]
            return sp.decode(pieces).replace(WORDS + " ", "").replace(WORDS, "")

        self._cut, self._decode = splitter(self.added), decode
        self._raw = lambda text, prefix: (sp if prefix else bare).encode(text)

    def _read_tokenizer_json(self, contents, given, config):
        try:
            import tokenizers
        except ImportError:
            raise UserError(f"{self.path}: needs the tokenizers package; pip install tokenizers") from None
        contents.update(truncation=None, padding=None)  # settings of some training run
        contents["model"]["dropout"] = None
        self.prefix = prefix_scheme(contents)
        tk = tokenizers.Tokenizer.from_str(json.dumps(contents))
        self.size = tk.get_vocab_size()
        bos = None if given or config.bos_token_id == -1 else config.bos_token_id
        if bos is not None and bos not in range(self.size):
            raise UserError(f"{self.folder}/config.json: bos_token_id is beyond the vocabulary; correct it")
        self._set_special(given if bos is None else {"bos_token": tk.id_to_token(bos)}, tk.token_to_id)
        flags = ("lstrip", "rstrip", "normalized", "single_word", "special")
        ordered = sorted(self.added.items(), key=lambda item: item[1]["id"])
        tk.add_tokens([tokenizers.AddedToken(text, **{key: token[key] for key in flags if key in token})
                       for text, token in ordered])
        self.added = {text: dict(token, id=tk.token_to_id(text)) for text, token in ordered}
        ids = {token["id"] for token in self.added.values()}

        def cut(text):
            tk.encode_special_tokens, parts, end = False, [], 0
            encoding = tk.encode(text, add_special_tokens=False)
            for i, (start, stop) in zip(encoding.ids, encoding.offsets, strict=True):
                if i in ids and not {WORDS, ANSWER} & {*text[start:stop]}:  # they may be the unknown token
                    parts += [text[end:start], i]
                    end = stop
            return [part for part in [*parts, text[end:]] if part != ""]

        def raw(text, prefix):
            tk.encode_special_tokens = True  # text does not become a special token
            lead = "" if prefix or self.prefix == "never" else WORDS  # it takes the space, and is cut off
            ids, before = (tk.encode(part, add_special_tokens=False).ids for part in (lead + text, lead))
            return ids[len(before):]
        self._cut, self._raw, self._decode = cut, raw, tk.decode

    # ---- the chat template

    def _choose_template(self):
        """The name of the checkpoint's template: its own, or the paper's with the same special tokens."""
        by_tokens = next((name for name, template in TEMPLATES.items()
                          if template.special and self.added.keys() >= set(template.special)), None)
        if self._source and not (by_tokens and is_papers_checkpoint(self.folder)):
            return "own"
        if by_tokens is None:
            self.notice = f"{self.folder}: no chat template, using plain (--template names another)"
        return by_tokens or "plain"

    def _jinja(self):
        """Source of the chat template in use."""
        if self.template == "own":
            if not self._source:
                raise UserError(f"{self.folder}: has no chat template of its own; give --template NAME")
            return self._source
        template = TEMPLATES[self.template]
        for name in template.special:
            if name not in self.added:
                raise UserError(f"{self.path}: lacks {name} of the template {self.template}; give another "
                                "--template")
        start, bos, (before, after) = template.system, self.named.get("bos_token"), template.turn.split("{x}")
        if bos and self.settings.get("add_bos_token") is not False and not (start + before).startswith(bos):
            start = bos + start  # SmolLM2's BOS is the <|im_start|> that the template begins with
        eos = next((text for text, token in self.added.items() if token["id"] == self.eos), "")
        texts = {"START": start, "BEFORE": before, "AFTER": after, "END": template.end_of_turn or eos}
        return re.sub("|".join(texts), lambda match: json.dumps(texts[match[0]], ensure_ascii=False), JINJA)

    def _set_template(self, config):
        """Render the template once, around placeholders, and cut it at special tokens."""
        self.jinja = self._jinja()

        def render(words, answer=None):
            messages = [{"role": "user", "content": words}, {"role": "assistant", "content": answer}]
            return compiled.render(messages=messages[:1 if answer is None else 2], tools=None, documents=None,
                                   add_generation_prompt=answer is None, **self.named)

        try:
            compiled = compile_jinja(self.jinja)
            prompt, dialogue = render(WORDS), render(WORDS, ANSWER)
        except Exception as error:  # a template can raise anything
            raise UserError(f"{self.folder}: its chat template fails ({error}); correct it, or give "
                            "--template NAME") from None
        if prompt.count(WORDS) != 1 or dialogue.count(ANSWER) > 1:
            raise UserError(f"{self.folder}: its chat template has the prompt {prompt.count(WORDS)} times, "
                            f"the answer {dialogue.count(ANSWER)} times; give --template NAME")
        before, _, after = dialogue.partition(ANSWER)
        # Thinking templates render an old answer without the block that the prompt ends with.
        between = before[len(prompt):] if before.startswith(prompt) else ""
        parts, answer_parts = self._cut(prompt), self._cut(between + ANSWER + after)
        used = {part for part in (*parts, *answer_parts) if isinstance(part, int)}
        self.control = {text: token["id"] for text, token in self.added.items()
                        if token.get("special") or token["id"] in used}
        # A text that spells a control token is cut after its first character, so that it stays text.
        self._spelled = {i: self._encode([text[:1]], False) + self._encode([text[1:]], False)
                         for text, i in self.control.items()
                         if [i] in (self._encode([text], False), self._encode([text], True))}
        words = {text: token for text, token in self.added.items()
                 if text not in self.control and self.size <= token["id"] < config.vocab_size}
        self._words = splitter(words if self.path.suffix == ".model" else {})  # tokenizers cuts itself

        # The paper's code encodes the answer separately; in a checkpoint's template it continues the prompt.
        apart = self.template != "own" or (self.prefix == "always" and isinstance(parts[-1], int))
        self._prompt = self._turn(parts, WORDS, self.prefix != "never", [
            self._cut(render(words)) == parts for words in (" " + WORDS, WORDS + " ")])
        answer = self._turn(answer_parts, ANSWER, apart, [
            self._cut(render(WORDS, words)) == self._cut(dialogue) for words in (" " + ANSWER, ANSWER + " ")])
        if not answer.after or answer.right.strip():  # no special token ends the answer
            if self.eos is None:
                raise UserError(f"{self.folder}: no file has an EOS token; add eos_token_id to config.json")
            answer = answer._replace(right="", after=[self.eos])
        self._answer, self.end_of_turn = answer._replace(after=answer.after[:1]), answer.after[0]
        self.stop = {self.end_of_turn, *self._listed} | ({self.eos} - {None})
        # Named tokens (pad_token) and words beside SentencePiece need no embedding unless they are used.
        listed = [token["id"] for text, token in self.added.items() if text not in self.named.values()
                  and (token.get("special") or self.path.suffix == ".json")]
        needed = 1 + max(self.size - 1, self.end_of_turn, *used, *listed)
        if needed > config.vocab_size:
            raise UserError(f"{self.path}: has {needed} tokens, the model {config.vocab_size}; they do not "
                            "belong together")

        # The connection position, at the start of the assistant's turn.
        after, start = self._prompt.after, self.control.get("<|im_start|>")
        self.connection_index = -1
        if start in after[:-1]:
            self.connection_index = -after[::-1].index(start)  # the token after it
        elif after[-1:] == [self.control.get("[/INST]")] and (self._prompt.right or len(after) > 1):
            self.connection_index = -2

    def _turn(self, parts, placeholder, prefix, strip):
        """The Turn of parts (ids and texts). prefix: a text at the start gets the tokenizer's space."""
        at = next(n for n, part in enumerate(parts) if isinstance(part, str) and placeholder in part)
        left, right = parts[at].split(placeholder)
        later = self.prefix == "always"
        before, after = self._encode(parts[:at], prefix), self._encode(parts[at + 1:], later)
        return Turn(before, left, right, after, strip, later if before else prefix)

    # ---- prompts and answers

    def _encode(self, parts, prefix):
        """Ids of texts and ids. prefix: the tokenizer may put a space before a text at the start."""
        ids = []
        for part in parts:
            ids += [part] if isinstance(part, int) else self._raw(part, prefix)
            prefix = self.prefix == "always"
        return ids

    @no_panic
    def encode(self, text, prefix=True):
        """Ids of a text, none of them a control token. prefix: the tokenizer may put a space before it."""
        ids = self._encode(self._words(text), prefix)
        return [j for i in ids for j in self._spelled.get(i, [i])]

    def _fill(self, turn, words):
        words = words.lstrip() if turn.strip[0] else words
        words = words.rstrip() if turn.strip[1] else words
        return [*turn.before, *self.encode(turn.left + words + turn.right, turn.prefix), *turn.after]

    def prompt(self, text):
        """Ids of a prompt in the chat template. No part of the text becomes a control token."""
        if not (ids := self._fill(self._prompt, text)):
            raise UserError(f"{self.path}: no tokens for the prompt {text[:20]!r}; give another --template")
        return ids

    def answer(self, text):
        """Ids of an answer, end of turn included."""
        return self._fill(self._answer, text)

    @no_panic
    def decode(self, ids):
        """Text of an answer's ids; special tokens are left out."""
        return self._decode(ids).removeprefix(self._answer.left)

    def save(self, folder):
        """Write the chat template and end of turn into a folder, for transformers and vLLM."""
        texts = {token["id"]: text for text, token in self.added.items()}
        ids = {"bos_token": self.bos, "eos_token": self.eos}
        settings = dict(self.settings) or {key: texts[i] for key, i in ids.items() if i in texts}
        if self.prefix != "never":  # transformers 4 and 5 have different defaults
            settings["legacy"] = self.prefix == "always"
        settings["chat_template"] = self.jinja
        write_text(folder / "tokenizer_config.json", json.dumps(settings, indent=2, ensure_ascii=False))
        eos = [self.end_of_turn, *sorted(self.stop - {self.end_of_turn})]
        generation = {**self.generation, "eos_token_id": eos}
        write_text(folder / "generation_config.json", json.dumps(generation, indent=2))
        (folder / "chat_template.jinja").unlink(missing_ok=True)  # it would have precedence


# -------------------------------------------------------------------------------- users' input and files

def run_script(main):
    """Call main(). A UserError or OSError becomes one line on stderr and exit code 2.

    A closed stream is replaced by the null device. Characters that the terminal cannot show are escaped. If
    the reader of stdout has gone (`| head`), the script ends quietly.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):  # in file descriptor order
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")
    ranks, code = (0, 1, 0, 1), 0
    try:
        ranks = process_ranks()
        main()
        sys.stdout.flush()
    except SystemExit as end:
        code = end.code
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    except BrokenPipeError:
        silence(sys.stdout)
        code = 128 + 13  # as SIGPIPE does
    except (UserError, OSError) as error:
        if (message := error_line(error)) is None:
            raise
        if ranks[2] == 0:  # once per machine: all ranks have the same error
            print(f"error: {message}", file=sys.stderr)
        code = 2
    if ranks[1] > 1:
        # Skip the interpreter's shutdown: gloo's threads outlive the process group, and one that frees a
        # tensor during the shutdown aborts the process.
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):
                stream.flush()
        os._exit(code or 0)
    if code:
        sys.exit(code)


def error_line(error):
    """A UserError or OSError as one line: the file, what is wrong, what to do. None: not about a file."""
    message = str(error)
    if isinstance(error, OSError):
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        other = "output" if is_full else "the working directory" if error.errno == errno.ENOENT else None
        if (name := error.filename or other) is None:
            return None
        advice = "make room and run again" if is_full else "check path and permissions"
        message = f"{name}: {error.strerror}; {advice}"
    return printable(" ".join(message.splitlines()))


def printable(text):
    """Escape control characters: a file name may contain some, and a terminal would obey them."""
    return re.sub(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", lambda match: repr(match[0])[1:-1], text)


def silence(stream):
    """Discard buffered and later output of the stream."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def process_ranks():
    """(rank, world size, local rank, local world size), as torchrun sets them."""
    names = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    values = [os.environ.get(name, default) for name, default in names.items()]
    ranks = [int(value) if value.isdecimal() else -1 for value in values]
    needed = {"RANK", "MASTER_ADDR", "MASTER_PORT"} if ranks[1] > 1 else set()
    if min(ranks) < 0 or ranks[0] >= ranks[1] or needed - os.environ.keys():
        raise UserError(f"{', '.join(names)}: are {', '.join(values)}; start several processes with "
                        "torchrun, or unset these variables")
    return ranks


class Help(argparse.RawDescriptionHelpFormatter):
    """--help with the script's docstring as it is, and each option's default unless its text names one."""

    def _get_help_string(self, action):
        unset = any(action.default is value for value in (None, False, argparse.SUPPRESS))
        return action.help if unset or "(default" in action.help else action.help + " (default: %(default)s)"


def choose_device():
    """This process's GPU, or the CPU without one. Raises UserError for more processes than GPUs."""
    (_, _, local_rank, processes), count = process_ranks(), torch.cuda.device_count()
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if max(processes, local_rank + 1) > count:
        raise UserError(f"--nproc_per_node: {processes} processes for {count} GPUs; start one for each")
    # cuDNN's attention, the first choice on Hopper and Blackwell, builds a plan for each new shape, in up to
    # a second: for every length in training, and for nearly every token in decoding.
    torch.backends.cuda.enable_cudnn_sdp(False)
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def at_least(low, kind=int):
    """An argparse type: a number from `low` up, below 2^63."""
    def number(text):
        value = kind(text)
        if not low <= value < 2 ** 63:
            raise argparse.ArgumentTypeError(f"{text} is not {low} or more, and below 2^63")
        return value
    return number


def file_path(text):
    """An argparse type: a path."""
    if not text:
        raise argparse.ArgumentTypeError("is empty, expected a path")
    return text


CONVERT = ('expected JSON lines of "instruction", "instruction_en" and "output"; data/README.md has a '
           "converter for CSV and Aya")
FOREIGN = ("messages", "conversations", "inputs", "targets")  # keys of dialogues and of Aya


def read_text(path):
    """The text of a UTF-8 file."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        if error.object.startswith(b"PAR1"):
            raise UserError(f"{path}: is a Parquet file; {CONVERT}") from None
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line}: not UTF-8 ({error.reason}); convert the file to UTF-8") from None


def parse_json(text, path, line=1, expected="copy the file again"):
    """Parse a text that starts at this line of a file. Raises UserError, also for duplicate keys."""
    def no_duplicates(pairs):
        keys = [key for key, _ in pairs]
        if len(set(keys)) < len(keys):
            raise ValueError(f"the key {max(keys, key=keys.count)!r} occurs twice")
        return dict(pairs)

    try:
        return json.loads(text, object_pairs_hook=no_duplicates)
    except (ValueError, RecursionError) as error:
        line += getattr(error, "lineno", 1) - 1
        problem = getattr(error, "msg", error)  # without its own count of lines
        raise UserError(f"{path}:{line}: not valid JSON ({problem}); {expected}") from None


def read_json(path):
    """The JSON object in a file."""
    if Path(path).exists() and not Path(path).is_file():
        raise UserError(f"{path}: not a regular file; copy the file again")  # a pipe could block
    value = parse_json(read_text(path), path)
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds a JSON {type(value).__name__}, not an object; copy the file again")
    return value


def read_json_lines(path, text=None):
    """[("file:line", value)] of a file with one JSON value per line. text: its text, if already read."""
    text = read_text(path) if text is None else text
    lines = enumerate(text.split("\n"), 1)  # not splitlines(): a JSON string may hold U+2028
    values = [(f"{path}:{n}", parse_json(line, path, n, "expected one JSON value per line"))
              for n, line in lines if line.strip()]
    if not values:
        raise UserError(f"{path}: is empty; expected one JSON value per line")
    return values


class Record(NamedTuple):
    """A training sample, a prompt to answer or a benchmark item."""
    prompt: str                # in its own language
    english: str | None        # its English version
    answer: str | list | None  # of a training sample; the gold answers of a benchmark item
    lang: str | None
    where: str                 # "file:line", for error messages
    fields: dict               # the JSON object

    @classmethod
    def parse(cls, fields, where, required=("instruction",)):
        """Check a JSON object in the paper's schema: instruction, instruction_en, output, lang.

        Alpaca's "input" is appended to the instruction, and to an instruction_en that repeats it.
        """
        if not isinstance(fields, dict):
            raise UserError(f'{where}: {type(fields).__name__}, expected an object with "instruction"; '
                            "correct it")
        if known := [key for key in FOREIGN if key in fields and "instruction" not in fields]:
            raise UserError(f'{where}: has "{known[0]}" and no "instruction"; {CONVERT}')
        keys = ("instruction", "instruction_en", "output", "lang", "input")
        own, english, answer, lang, more = (text_field(fields, key, where, key in required) for key in keys)
        prompt = f"{own}\n{more}" if more and more.strip() else own
        return cls(prompt, prompt if english == own else english, answer, lang, where, fields)

    @property
    def is_english(self):
        return self.lang == "en" or self.english == self.prompt


def read_records(path, required=("instruction",)):
    """The Records of a file of JSON lines or one JSON list."""
    text = read_text(path)  # once: it may be a pipe
    if "," in (first := text.lstrip().partition("\n")[0]) and first[0] not in "{[":
        raise UserError(f"{path}: looks like CSV; {CONVERT}")
    if not text.lstrip().startswith("["):
        return [Record.parse(value, where, required) for where, value in read_json_lines(path, text)]
    values = parse_json(text, path, expected="expected JSON lines or one JSON list")
    if not values:
        raise UserError(f"{path}: is an empty list; expected JSON lines or a JSON list of objects")
    return [Record.parse(value, f"{path}: item {n}", required) for n, value in enumerate(values, 1)]


def text_field(fields, key, where, required):
    """The text fields[key]; None if it is optional and absent."""
    value = fields.get(key)
    if value is None and not required:
        return None
    problem = None
    if value is None:
        problem = "missing"
    elif not isinstance(value, str):
        problem = f"a {type(value).__name__}, expected text"
    elif required and not value.strip():
        problem = "empty"
    elif re.search("[\ud800-\udfff]", value):
        problem = "not valid text: it contains an unpaired surrogate"
    if problem:
        raise UserError(f'{where}: "{key}" is {problem}; correct or remove it')
    return value


def relative(path):
    """The path relative to the working directory, or unchanged if that is on another drive."""
    try:
        return os.path.relpath(path)
    except (OSError, ValueError):
        return str(path)


def check_writable(path):
    """Raise UserError if the folder cannot be made or written."""
    existing = next(p for p in (Path(path), *Path(path).absolute().parents) if p.is_symlink() or p.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UserError(f"{path}: {existing} is not a writable directory; choose another place")


def write_text(path, text):
    """Write a text file atomically.

    Follows a link, keeps the mode of an existing file, writes directly to a device or pipe.
    """
    content = text.encode(errors="backslashreplace")  # for unpaired surrogates
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        if Path(path).exists() and not Path(path).is_file():  # not the real path: a pipe has none
            Path(path).write_bytes(content)
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(content)
        sync(temporary)
        if target.exists():
            shutil.copymode(target, temporary)
        os.replace(temporary, target)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename = str(path)  # not the temporary file's
        raise


def sync(path):
    """Flush a file or folder to the disk."""
    try:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError:
        if not Path(path).is_dir():  # some file systems cannot flush folders
            raise
