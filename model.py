"""A checkpoint folder and all that is in it: configuration, decoder, weights, chat template and tokenizer.

The decoder is the Llama family's (Llama 2 and 3.x, Mistral, Qwen 2.5), written out in full under Hugging Face parameter
names, so that a checkpoint's tensors load as they are. One thing is new: the feed-forward network (FFN) takes a second
input, which CC-Tuning has added to its output (MLP.forward).

    B      rows: prompts read together          L      decoder layers
    T      tokens of a row                      d      hidden size
    K      tokens that a query may look at      V      vocabulary
    heads  query heads                          D      head size
    kv     key/value heads                      H      FFN activations of one token in every layer, (L, B, d)

    config = Config.read(folder)                    the architecture
    model = load_model(folder)                      the decoder with its weights
    tokenizer = Tokenizer(folder, config)           text to ids and back, the chat template, the connection position
    save_checkpoint(out, folder, tensors, entry)    a folder that this file and `transformers` both load

Whatever is wrong with what the user gave is a UserError: one line that names the file and says what to do. The
functions that read and write users' files stand at the end.
"""
import argparse
import errno
import json
import os
import re
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file


class UserError(Exception):
    """Something the user gave is wrong. The message is one line: the file (and line), what is wrong, what to do."""


# ------------------------------------------------------------------------------------------------------ configuration

ROPE_SCALING = {  # rope type: the numbers that describe it
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


@dataclass(frozen=True)
class Config:
    """The architecture, as config.json gives it."""
    model_type: str
    vocab_size: int                # V
    hidden_size: int               # d
    intermediate_size: int
    num_hidden_layers: int         # L
    num_attention_heads: int       # heads
    num_key_value_heads: int       # kv
    head_dim: int                  # D
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: dict | None      # {"rope_type": "llama3" or "linear", "factor": ...}
    tie_word_embeddings: bool
    qkv_bias: bool
    initializer_range: float       # standard deviation of the Decision Maker's start
    max_length: int                # positions that the model was made for, or its sliding window where that is shorter
    bos_token_id: int | None
    eos_token_ids: tuple
    cctuning: dict                 # what train.py noted: template, method, arguments, source_layer, languages, the fit

    @classmethod
    def read(cls, folder):
        """Read and check FOLDER/config.json, in the spelling of transformers 4 or 5.

        Raises UserError, by name, for what is missing, of the wrong type or not implemented. To add a Llama-like
        model_type: allow its name below, add a field for what differs (as `qkv_bias` is for Qwen 2.5), and read that
        field in the class concerned.
        """
        path = Path(folder) / "config.json"
        if not path.exists():
            raise UserError(f"{path}: not found; --model takes a Hugging Face checkpoint folder")
        raw = read_json(path)
        rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}  # transformers 5, 4
        if not isinstance(rope, dict):
            raise UserError(f"{path}: rope_scaling is {rope!r}, expected an object; restore the file")
        family, rope_type = raw.get("model_type"), rope.get("rope_type") or rope.get("type") or "default"
        not_implemented = {
            f"model_type {family!r}": family not in ("llama", "mistral", "qwen2"),
            "quantization_config (quantised weights)": raw.get("quantization_config") is not None,
            "attention_bias": raw.get("attention_bias"),
            "mlp_bias": raw.get("mlp_bias"),
            f"hidden_act {raw.get('hidden_act')!r}": raw.get("hidden_act", "silu") != "silu",
            f"rope type {rope_type!r}": str(rope_type) not in ROPE_SCALING,
            "partial_rotary_factor": {**raw, **rope}.get("partial_rotary_factor", 1.0) != 1.0,
        }
        for what, found in not_implemented.items():
            if found:
                raise UserError(f"{path}: {what} is not implemented; use a Llama, Mistral or Qwen 2.5 without it")

        def number(source, key, default=None, kind=int):
            value = default if source.get(key) is None else source[key]
            if isinstance(value, bool) or not isinstance(value, (int, kind)) or not 0 < value < 2 ** 31:
                raise UserError(f"{path}: {key} is {value!r}, expected a positive {kind.__name__}; restore the file")
            return kind(value)

        layers, hidden = number(raw, "num_hidden_layers"), number(raw, "hidden_size")
        heads = number(raw, "num_attention_heads")
        kv, head_dim = number(raw, "num_key_value_heads", heads), number(raw, "head_dim", hidden // heads)
        if heads % kv or head_dim % 2 or (raw.get("head_dim") is None and hidden % heads):
            raise UserError(f"{path}: hidden_size {hidden}, {heads} heads, {kv} key/value heads and head_dim "
                            f"{head_dim} do not fit together; restore the file")
        scaling = {key: number(rope, key, kind=float) for key in ROPE_SCALING[rope_type]}
        if rope_type == "llama3" and not scaling["high_freq_factor"] > scaling["low_freq_factor"]:
            raise UserError(f"{path}: high_freq_factor must be larger than low_freq_factor; restore the file")
        max_length = number(raw, "max_position_embeddings", 2048)
        if family == "mistral" or raw.get("use_sliding_window"):
            max_length = min(max_length, number(raw, "sliding_window", max_length))

        tied, eos, cctuning = raw.get("tie_word_embeddings", False), raw.get("eos_token_id"), raw.get("cctuning", {})
        eos = eos if isinstance(eos, list) else [] if eos is None else [eos]
        if not (isinstance(tied, bool) and all(isinstance(i, int) for i in eos) and isinstance(cctuning, dict)
                and isinstance(languages := cctuning.get("languages", []), list)
                and all(isinstance(lang, str) for lang in languages)
                and cctuning.get("source_layer", "decision_maker") in ("decision_maker", "random", *range(layers))):
            raise UserError(f"{path}: tie_word_embeddings, eos_token_id or cctuning is malformed; restore the file")
        return cls(
            model_type=family,
            vocab_size=number(raw, "vocab_size"),
            hidden_size=hidden,
            intermediate_size=number(raw, "intermediate_size"),
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv,
            head_dim=head_dim,
            rms_norm_eps=number(raw, "rms_norm_eps", 1e-6, float),
            rope_theta=number(rope, "rope_theta", raw.get("rope_theta", 10000.0), float),
            rope_scaling=dict(scaling, rope_type=rope_type) if scaling else None,
            tie_word_embeddings=tied,
            qkv_bias=family == "qwen2",
            initializer_range=number(raw, "initializer_range", 0.02, float),
            max_length=max_length,
            bos_token_id=raw["bos_token_id"] if isinstance(raw.get("bos_token_id"), int) else None,
            eos_token_ids=tuple(eos),
            cctuning=cctuning,
        )


# ------------------------------------------------------------------------------------------------------------ decoder

FUSION_LAYER = 0  # to whose FFN output the connection is added: the first, as in the paper


class RMSNorm(nn.Module):
    """Root-mean-square normalisation (arXiv 1910.07467)."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        """(..., d) -> (..., d)."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def rotary_table(config, length, device=None):
    """Cosines and sines of the rotary embedding (arXiv 2104.09864), positions 0 to length - 1: (2, length, D) float32.

    Dimension i is paired with i + D/2 (the split-half layout of Hugging Face checkpoints), so each frequency stands
    twice. A pair (a, b) turns into (a cos - b sin, b cos + a sin): hence the minus on the sines of the first half.
    """
    dims = torch.arange(0, config.head_dim, 2, device=device, dtype=torch.float32)
    frequency = 1.0 / config.rope_theta ** (dims / config.head_dim)  # (D/2,) radians per token
    scaling = config.rope_scaling or {}
    if scaling.get("rope_type") == "linear":
        frequency = frequency / scaling["factor"]
    elif scaling.get("rope_type") == "llama3":
        # Long wavelengths are stretched by `factor`, short ones kept, those between blended.
        turns = scaling["original_max_position_embeddings"] * frequency / (2 * torch.pi)  # within the original context
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)
        frequency = keep * frequency + (1 - keep) * frequency / scaling["factor"]
    angle = torch.outer(torch.arange(length, device=device, dtype=torch.float32), frequency)  # (length, D/2)
    cos, sin = angle.cos(), angle.sin()
    return torch.stack((torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)))  # (2, length, D)


def rotate(x, rotary):
    """Turn each pair of dimensions of x (B, heads, T, D) by its position's angle.

    rotary: the rows of a rotary_table for these tokens, (2, T, D), or (2, B, 1, T, D) where the rows' positions differ.
    """
    cos, sin = rotary.to(x.dtype)
    return x * cos + x.roll(x.shape[-1] // 2, -1) * sin  # the roll puts each dimension's partner in its place


def new_cache(config, rows, length, dtype, device):
    """Room for the keys and values of `rows` rows of up to `length` tokens: (L, 2, B, kv, room, D)."""
    shape = (config.num_hidden_layers, 2, rows, config.num_key_value_heads, length, config.head_dim)
    return torch.zeros(shape, dtype=dtype, device=device)


def store(cache, k, v, positions):
    """Write k, v (B, kv, T, D) into a layer's cache (2, B, kv, K, D) at positions (B, T); None: at all K.

    Returns the keys and values of all K positions, (B, kv, K, D) each.
    """
    keys, values = cache
    if positions is None:
        keys[:], values[:] = k, v
        return k, v
    rows = torch.arange(len(k), device=k.device)[:, None]  # (B, 1)
    keys[rows, :, positions] = k.transpose(1, 2)  # (B, kv, T, D) -> (B, T, kv, D), as this indexing has it
    values[rows, :, positions] = v.transpose(1, 2)
    return keys, values


def token(x, at):
    """One token of each row: of x (B, T, ...) at (B,), (B, ...)."""
    return x[torch.arange(len(x), device=x.device), at]


class Attention(nn.Module):
    """Grouped-query attention with rotary positions (arXiv 2305.13245)."""

    def __init__(self, config):
        super().__init__()
        self.head_dim, bias = config.head_dim, config.qkv_bias
        width, narrow = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
        self.q_proj = nn.Linear(config.hidden_size, width, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, narrow, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, narrow, bias=bias)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=False)

    def split_heads(self, x):
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # (B, T, heads * D) -> (B, heads, T, D)

    def keys_values(self, x, rotary):
        """Keys and values (B, kv, T, D) of x (B, T, d)."""
        return rotate(self.split_heads(self.k_proj(x)), rotary), self.split_heads(self.v_proj(x))

    def forward(self, x, rotary, k, v, mask):
        """What the tokens x (B, T, d) read from k, v (B, kv, K, D): (B, T, d).

        mask is True where a query may look, broadcastable to (B, heads, T, K); None: causal, T = K.
        """
        q = rotate(self.split_heads(self.q_proj(x)), rotary)  # (B, heads, T, D)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
        return self.o_proj(y.transpose(1, 2).flatten(2))  # (B, heads, T, D) -> (B, T, d)


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up (arXiv 2002.05202), element by element.

    Written out, it keeps two tensors for the backward pass; autograd would keep three.
    """

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, grad):
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grad * up, gate), grad * F.silu(gate)


class MLP(nn.Module):
    """The feed-forward network (FFN), gated, with the second input of CC-Tuning."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x, fused=None):
        """(B, T, d) -> (B, T, d).

        fused: a vector (B, d) and the index (B,) in T of the token to whose output it is added (paper, section 3).
        """
        y = self.down_proj(SwiGLU.apply(self.gate_proj(x), self.up_proj(x)))
        if fused is not None:
            vector, index = fused
            y[torch.arange(len(y), device=y.device), index] += vector.to(y.dtype)
        return y


class DecoderLayer(nn.Module):
    """Attention and FFN, each reading a normalised residual stream and adding to it."""

    def __init__(self, config):
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x, rotary, mask=None, cache=None, positions=None, fused=None, at=None):
        """(B, T, d) -> the layer's output and its FFN activation, (B, T, d) each.

        With at (B,), both are of that one token of each row, (B, 1, d): the others still serve as keys and values, but
        nothing more is computed for them. The other arguments are LanguageModel.forward's.
        """
        h = self.input_layernorm(x)
        k, v = self.self_attn.keys_values(h, rotary)
        if cache is not None:
            k, v = store(cache, k, v, positions)
        if at is not None:
            x, h = token(x, at)[:, None], token(h, at)[:, None]  # (B, T, d) -> (B, 1, d)
            rotary = rotary[:, at][:, :, None, None]  # (2, T, D) -> (2, B, 1, 1, D)
            mask = (torch.arange(k.shape[2], device=x.device) <= at[:, None])[:, None, None]  # (B, 1, 1, K)
        x = x + self.self_attn(h, rotary, k, v, mask)
        ffn = self.mlp(self.post_attention_layernorm(x), fused)  # the activation that H collects
        return x + ffn, ffn


class LanguageModel(nn.Module):
    """The decoder. Parameter names are Hugging Face's: model.embed_tokens, model.layers.N, model.norm, lm_head."""

    def __init__(self, config):
        super().__init__()
        assert FUSION_LAYER < config.num_hidden_layers, (FUSION_LAYER, config.num_hidden_layers)
        self.config = config
        self.model = nn.ModuleDict({
            "embed_tokens": nn.Embedding(config.vocab_size, config.hidden_size),
            "layers": nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers)),
            "norm": RMSNorm(config.hidden_size, config.rms_norm_eps),
        })
        # A tied head is the embedding matrix: no module, so no second parameter to load, shard or save.
        self.lm_head = None
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.rotary = None  # not a buffer: it must stay float32 whatever the model's dtype, and off the meta device

    def forward(self, ids, positions=None, cache=None, fused=None, at=None):
        """Run tokens ids (B, T) through the decoder.

        positions (B, T): where the tokens stand in their rows; they see the cache's earlier positions. None: whole rows
            from position 0, right-padded. Causality is then mask enough, for padding comes after every real token.
        cache: made by new_cache; keys and values are kept there.
        fused: a vector (B, d) and the index (B,) in T of the token to whose FFN output it is added in FUSION_LAYER.
        at (B,): only this token of each row is wanted (needs positions=None, fused=None).
        Returns the last layer's output (B, T, d), to be given to logits(), and None;
            with `at`, that of one token, (B, 1, d), and H (L, B, d), its FFN activation in every layer.
        """
        x = self.model.embed_tokens(ids)  # (B, T, d)
        length = ids.shape[1] if positions is None else int(positions.max()) + 1
        if self.rotary is None or self.rotary.shape[1] < length or self.rotary.device != ids.device:
            with torch.inference_mode(False):  # else a table first needed there could not serve training afterwards
                self.rotary = rotary_table(self.config, max(2 * length, 256), ids.device)
        if positions is None:
            rotary, mask = self.rotary[:, :length], None  # (2, T, D)
        else:
            rotary = self.rotary[:, positions][:, :, None]  # (2, B, 1, T, D)
            mask = (torch.arange(length, device=ids.device) <= positions[:, :, None])[:, None]  # (B, 1, T, K)
        activations = []
        for i, layer in enumerate(self.model.layers):
            last = i == len(self.model.layers) - 1
            x, ffn = layer(
                x, rotary, mask,
                cache=None if cache is None else cache[i, :, :, :, :length],  # (2, B, kv, K, D)
                positions=positions,
                fused=fused if i == FUSION_LAYER else None,
                at=at if last else None,
            )
            if at is not None:
                activations.append(ffn[:, 0] if last else token(ffn, at))  # (B, d)
        return x, torch.stack(activations) if activations else None  # (L, B, d)

    def logits(self, x):
        """Next-token logits (..., V) from the decoder's output (..., d)."""
        x = self.model.norm(x)
        return F.linear(x, self.model.embed_tokens.weight) if self.lm_head is None else self.lm_head(x)


def pad(rows):
    """Right-pad lists of ids to (B, T); also their lengths (B,)."""
    lengths = torch.tensor([len(row) for row in rows])
    padded = torch.zeros(len(rows), int(lengths.max()), dtype=torch.long)
    for i, row in enumerate(rows):
        padded[i, :len(row)] = torch.tensor(row)
    return padded, lengths


# ---------------------------------------------------------------------------------------------- weights, in and out

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
INDEX = "model.safetensors.index.json"
ADDED = "cctuning.safetensors"  # beside the weights: decision_maker.weight, transform_matrix, transform_matrix.LANG
PAPER_DECISION_MAKER = "model.source_select.weight"  # its name in checkpoints of the paper's own code
TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
                   "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "generation_config.json")


def open_tensors(path):
    """safe_open, with an error that names the file."""
    if not Path(path).is_file():
        raise UserError(f"{path}: not found; copy the folder again")
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: damaged or cut short ({error}); copy the file again") from None


def weight_files(folder):
    """{file: names of the tensors to take from it} of a checkpoint folder, from its one file or its index."""
    folder = Path(folder)
    if (folder / "model.safetensors").exists():
        with open_tensors(folder / "model.safetensors") as file:
            return {folder / "model.safetensors": list(file.keys())}
    if not (folder / INDEX).exists():
        raise UserError(f"{folder}: no model.safetensors and no {INDEX}; convert other formats to safetensors")
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not (isinstance(weight_map, dict)
            and all(isinstance(file, str) and Path(file).name == file for file in weight_map.values())):
        raise UserError(f"{folder / INDEX}: weight_map does not map tensor names to file names; restore the file")
    files = {}
    for name, file in weight_map.items():
        files.setdefault(folder / file, []).append(name)
    return files


def empty_model(folder):
    """The decoder that a checkpoint's config.json describes, on the meta device: shapes without memory."""
    with torch.device("meta"):
        return LanguageModel(Config.read(folder))


def load_weights(model, folder, dtype=None, device="cpu", local=None):
    """Give an empty_model its weights, in the dtype they are stored in or the one given, tensor by tensor.

    local(parameter): for a model that is spread over processes, the tensor of this one's part and the rows of the whole
        that are in it; only these are read.
    Sets `stored` to each tensor's dtype as stored; `paper_decision_maker` to the Decision Maker's weight, if the
    checkpoint is of the paper's own code. Raises UserError for what is missing, left over or of the wrong shape.
    """
    folder, parameters, tied = Path(folder), dict(model.named_parameters()), model.config.tie_word_embeddings
    tensors, model.stored, model.paper_decision_maker = {}, {}, None
    for path, names in weight_files(folder).items():
        with open_tensors(path) as file:
            held = set(file.keys())
            for name in names:
                if name not in held:
                    raise UserError(f"{path}: lacks {name}, which {INDEX} says it holds; copy the folder again")
                if name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and tied):
                    continue
                stored = file.get_slice(name)
                shape, kind = tuple(stored.get_shape()), stored.get_dtype()
                if kind not in FLOATS:
                    raise UserError(f"{path}: {name} is stored as {kind}, which is not implemented; use float weights")
                if name == PAPER_DECISION_MAKER:
                    model.paper_decision_maker = file.get_tensor(name)
                    continue
                if name not in parameters:
                    raise UserError(f"{path}: unexpected tensor {name}; config.json describes another model")
                if shape != tuple(parameters[name].shape):
                    raise UserError(f"{path}: {name} has shape {shape}, config.json says "
                                    f"{tuple(parameters[name].shape)}; one is of another model")
                model.stored[name] = FLOATS[kind]
                if local is None:
                    tensors[name] = file.get_tensor(name).to(device=device, dtype=dtype)
                else:
                    part, rows = local(parameters[name])
                    part.copy_(stored[rows] if len(part) else part)
    missing = sorted(parameters.keys() - model.stored.keys())
    if missing:
        raise UserError(f"{folder}: lacks {len(missing)} tensors, {missing[0]} the first; copy the folder again")
    if local is None:
        model.load_state_dict(tensors, strict=True, assign=True)
    if dtype is None:  # one dtype throughout, also where norms are stored in another
        model.to(model.model.embed_tokens.weight.dtype)


def load_model(folder, dtype=None, device="cpu"):
    """The checkpoint's decoder with its weights; see load_weights."""
    model = empty_model(folder)
    load_weights(model, folder, dtype, device)
    return model


def holds_model(folder):
    """Is there a model in this folder that saving would replace?"""
    return any((Path(folder) / name).exists() for name in ("config.json", INDEX, "model.safetensors"))


def save_checkpoint(out, source, tensors, entry, extra=None, shard_bytes=5_000_000_000):
    """Write a Hugging Face checkpoint folder.

    out: the folder; a model in it is replaced once the new one is written.
    source: the folder that configuration and tokenizer files are copied from.
    tensors: (name, tensor) pairs in the dtype to store; taken one by one and let go file by file.
    entry: stands in config.json under "cctuning".  extra: {name: tensor} for cctuning.safetensors, if any.
    The index is renamed into place last: a folder without it is no model.
    """
    out, source = Path(out), Path(source)
    staging = out / "saving.tmp"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)

    shards, shard, size, total = [], {}, 0, 0  # names in each file, the file to come, its bytes, all bytes

    def close_shard():
        save_file(shard, staging / f"{len(shards)}.tmp", metadata={"format": "pt"})
        shards.append(list(shard))
        shard.clear()

    for name, tensor in tensors:
        if shard and size + tensor.nbytes > shard_bytes:
            close_shard()
            size = 0
        shard[name] = tensor.contiguous()
        size, total = size + tensor.nbytes, total + tensor.nbytes
    close_shard()
    weight_map = {}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        (staging / f"{i}.tmp").rename(staging / file)
        weight_map.update(dict.fromkeys(names, file))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    config = dict(read_json(source / "config.json"), cctuning=entry)
    write_text(staging / "config.json", json.dumps(config, indent=2, ensure_ascii=False))
    write_text(staging / INDEX, json.dumps(index, indent=2))
    for name in TOKENIZER_FILES:
        if (source / name).exists():
            shutil.copyfile(source / name, staging / name)
    if extra:
        save_file({name: t.contiguous() for name, t in extra.items()}, staging / ADDED)
    for path in staging.iterdir():
        sync(path)

    # The old model goes, index first, with every file of its own that the new one lacks.
    olds = [out / name for name in (INDEX, ADDED, *TOKENIZER_FILES)]
    for old in [*olds, *out.glob("model*.safetensors")]:
        old.unlink(missing_ok=True)
    for path in sorted(staging.iterdir(), key=lambda p: p.name == INDEX):
        path.replace(out / path.name)
    staging.rmdir()
    sync(out)


# ---------------------------------------------------------------------------------------- chat template and tokenizer

@dataclass(frozen=True)
class Template:
    """How a prompt {x} becomes the model's input. Control tokens are encoded by name, the rest as text.

    connection_index: the connection position, counted from the prompt's end; None: the first token of the role's name
        ("assistant"), found by encoding the text after the last control token.
    """
    text: str
    control: tuple = ()             # the control tokens in it
    end_of_turn: str | None = None  # None: the model's EOS
    connection_index: int | None = -1


TEMPLATES = {
    "llama3": Template("<|start_header_id|>user<|end_header_id|>\n\n{x}<|eot_id|>"
                       "<|start_header_id|>assistant<|end_header_id|>\n\n",
                       ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), "<|eot_id|>"),
    "chatml": Template("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
                       "<|im_start|>user\n{x}<|im_end|>\n<|im_start|>assistant\n",
                       ("<|im_start|>", "<|im_end|>"), "<|im_end|>", None),
    # SentencePiece puts a space before each text it encodes: the one between [INST] and the prompt. The connection
    # position, -2, is the token before [/INST].
    "mistral": Template("[INST]{x} [/INST]", ("[INST]", "[/INST]"), None, -2),
    "llama2": Template("[INST] {x} [/INST]"),
    "plain": Template("{x}\n"),
}


class Tokenizer:
    """Text to ids and back, with the checkpoint's chat template: one function for training, inference and evaluation.

    connection_index: the connection position, counted from a prompt's end (-1: its last token).
    end_of_turn: the id that ends an answer.  stop: every id that ends decoding.
    notice: a line to show the user, or None.
    Raises UserError where files are missing or malformed, or do not have what the template needs.
    """

    def __init__(self, folder, config, template=None):
        folder = Path(folder)
        settings, generation = (read_json(folder / name) if (folder / name).exists() else {}
                                for name in ("tokenizer_config.json", "generation_config.json"))
        path = next((folder / name for name in ("tokenizer.model", "tokenizer.json") if (folder / name).exists()), None)
        if path is None:
            raise UserError(f"{folder}: no tokenizer.model or tokenizer.json; copy the base model's tokenizer there")
        try:
            (self._open_sentencepiece if path.suffix == ".model" else self._open_json)(path, settings, config)
        except (AttributeError, KeyError, TypeError, ValueError) as error:  # JSON of another shape than tokenizers have
            raise UserError(f"{path}: it or tokenizer_config.json is malformed ({error!r}); restore both") from None
        needed = max([self.size, *(i + 1 for i in self.control.values())])
        if needed > config.vocab_size:
            raise UserError(f"{path}: has {needed} tokens, the model {config.vocab_size}; one is of another model")

        self.template, self.notice = template or config.cctuning.get("template"), None
        if self.template is None:
            known = [name for name, t in TEMPLATES.items() if t.control and self.control.keys() >= set(t.control)]
            jinja = folder / "chat_template.jinja"
            if not known and "[INST]" in (read_text(jinja) if jinja.exists() else str(settings.get("chat_template"))):
                raise UserError(f"{folder}: [INST] of its chat template is no token; give --template llama2 or mistral")
            if not known:
                self.notice = f"{folder}: no chat template recognised, using plain (--template names another)"
            self.template = (known or ["plain"])[0]
        if not isinstance(self.template, str) or self.template not in TEMPLATES:
            raise UserError(f"{folder}: unknown template {self.template!r}; there are {', '.join(TEMPLATES)}")
        t = TEMPLATES[self.template]
        for name in t.control:
            if name not in self.control:
                raise UserError(f"{path}: lacks {name} of the template {self.template}; give another --template")
            if self.control[name] in self.encode(name):
                raise UserError(f"{path}: the text {name} would become a control token; make it a control piece")
        between = "|".join(f"({re.escape(name)})" for name in t.control) or r"(?!)"
        self._pieces = [p for p in re.split(between, t.text) if p]  # control tokens and the texts between them

        listed = generation.get("eos_token_id", [])
        listed = [*(listed if isinstance(listed, list) else [listed]), *config.eos_token_ids]
        if not all(isinstance(i, int) for i in listed):
            raise UserError(f"{folder}/generation_config.json: eos_token_id is {listed!r}, no ids; restore the file")
        if t.end_of_turn is None and self.eos is None and not listed:
            raise UserError(f"{folder}: no EOS token in any of its files; add eos_token_id to config.json")
        self.eos = listed[0] if self.eos is None and listed else self.eos
        self.end_of_turn = self.eos if t.end_of_turn is None else self.control[t.end_of_turn]
        self.stop = {self.end_of_turn, *listed} | ({self.eos} - {None})
        self.connection_index = t.connection_index
        if self.connection_index is None:
            self.connection_index = -len(self.encode(self._pieces[-1]))

    def _open_sentencepiece(self, path, settings, config):
        import sentencepiece
        try:
            sp = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError):
            raise UserError(f"{path}: not a SentencePiece model; restore it, or remove it for tokenizer.json") from None
        self.encode, self._decode, self.size = sp.encode, sp.decode, sp.get_piece_size()
        self.control = {sp.id_to_piece(i): i for i in range(self.size) if sp.is_control(i)}
        # Control tokens that were added to a SentencePiece vocabulary later stand beside it.
        for i, token in (settings.get("added_tokens_decoder") or {}).items():
            if token.get("special") and int(i) >= self.size:
                self.control[token["content"]] = int(i)
        self.bos, self.eos = (i if i >= 0 else None for i in (sp.bos_id(), sp.eos_id()))

    def _open_json(self, path, settings, config):
        try:
            import tokenizers
        except ImportError:
            raise UserError(f"{path}: reading it needs the tokenizers package; pip install tokenizers") from None
        contents = read_json(path)
        added = contents.get("added_tokens") or []
        self.control = {t["content"]: t["id"] for t in added if t.get("special")}
        for token in added:  # with encode_special_tokens below: no text, whatever it spells, becomes an added token
            token["special"] = True
        try:
            tk = tokenizers.Tokenizer.from_str(json.dumps(contents))
        except Exception as error:  # the package raises plain Exception
            raise UserError(f"{path}: not a tokenizer ({error}); restore the file") from None
        tk.encode_special_tokens = True
        self.encode = lambda text: tk.encode(text, add_special_tokens=False).ids
        self._decode = lambda ids: tk.decode(ids, skip_special_tokens=False)
        self.size = tk.get_vocab_size(with_added_tokens=True)

        def id_of(key):
            token = settings.get(key)
            token = token.get("content") if isinstance(token, dict) else token
            return tk.token_to_id(token) if token else None

        self.bos, self.eos = id_of("bos_token") if settings else config.bos_token_id, id_of("eos_token")

    def prompt(self, text):
        """Ids of a prompt in the chat template, with exactly one BOS where the model has one.

        Text never becomes a control token.
        """
        ids = []
        for piece in self._pieces:
            control = piece in TEMPLATES[self.template].control
            ids += [self.control[piece]] if control else self.encode(piece.replace("{x}", text))
        has_bos = self.bos is None or ids[0] == self.bos  # SmolLM2's BOS is the <|im_start|> of the template
        return ids if has_bos else [self.bos, *ids]

    def answer(self, text):
        """Ids of an answer, end of turn included."""
        return [*self.encode(text), self.end_of_turn]

    def decode(self, ids):
        """Text of ids; control tokens are left out."""
        hidden = set(self.control.values())
        return self._decode([i for i in ids if i not in hidden and i < self.size])


# -------------------------------------------------------------------------------------------- what the user gave

def run_script(main, speak=True):
    """Call main(). A UserError becomes one line on stderr and exit code 2; errors of our own keep their traceback.

    speak: not on processes beside the first, which have the same to say.
    """
    try:
        main()
    except (UserError, OSError) as error:
        if isinstance(error, OSError):
            if error.errno != errno.ENOSPC:
                raise
            error = f"{error.filename or 'output'}: the disk is full; make room and run again (train.py: with --resume)"
        if speak:
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


class Help(argparse.RawDescriptionHelpFormatter):
    """--help: a script's docstring as it stands, and each option's default where its text does not say it."""

    def _get_help_string(self, action):
        none = any(action.default is value for value in (None, False, argparse.SUPPRESS))
        return action.help if none or "(default" in action.help else action.help + " (default: %(default)s)"


def at_least(low, kind=int):
    """An argparse type: a number from `low` up, within 63 bits."""
    def number(text):
        value = kind(text)
        if not low <= value < 2 ** 63:
            raise argparse.ArgumentTypeError(f"{text} is not {low} or more")
        return value
    return number


def read_text(path):
    """The text of a UTF-8 file."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line}: not UTF-8 text ({error.reason}); convert the file to UTF-8") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); check path and permissions") from None


def parse_json(text, path, line=1, expected="restore the file"):
    """The JSON value of a text that begins in this line of a file. No object may have a key twice."""
    def once(pairs):
        if len(found := dict(pairs)) < len(pairs):
            keys = [key for key, _ in pairs]
            raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} stands twice in an object")
        return found
    try:
        return json.loads(text, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        line += getattr(error, "lineno", 1) - 1
        raise UserError(f"{path}:{line}: not valid JSON ({error}); {expected}") from None


def read_json(path):
    """The JSON object in a file."""
    value = parse_json(read_text(path), path)
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds a JSON {type(value).__name__}, not an object; restore the file")
    return value


def read_json_lines(path):
    """[(line number, value)] of a file with one JSON value per line; values are not checked further."""
    lines = enumerate(read_text(path).split("\n"), 1)  # not splitlines(): a JSON string may hold U+2028
    records = [(n, parse_json(line, path, n, "expected one JSON value per line")) for n, line in lines if line.strip()]
    if not records:
        raise UserError(f"{path}: is empty; expected one JSON value per line")
    return records


def read_records(path):
    """[(line number, value)] of JSON lines, or of a JSON list."""
    text = read_text(path)
    if not text.lstrip().startswith("["):
        return read_json_lines(path)
    values = parse_json(text, path, expected="expected JSON lines or one JSON list")
    if not values:
        raise UserError(f"{path}: is an empty list; expected JSON lines or a JSON list of objects")
    records, line, begin, end = [], 1, 0, text.index("[") + 1
    for value in values:  # found again in the text, for its line
        before, begin = begin, re.compile(r"[\s,]*").match(text, end).end()
        line += text.count("\n", before, begin)
        records.append((line, value))
        _, end = json.JSONDecoder().raw_decode(text, begin)
    return records


def text_field(record, key, where, required=True):
    """The text record[key] of a JSON object; where: its file:line. None if it is optional and not there."""
    if not isinstance(record, dict):
        raise UserError(f"{where}: holds a JSON {type(record).__name__}, expected an object with \"{key}\"; correct it")
    value = record.get(key)
    if value is None and not required:
        return None
    if not isinstance(value, str):
        found = "missing" if value is None else f"a {type(value).__name__}"
        raise UserError(f'{where}: "{key}" is {found}, expected text; correct the line')
    if required and not value.strip():
        raise UserError(f'{where}: "{key}" is empty; fill it in or remove the line')
    if not value.isascii() and re.search("[\ud800-\udfff]", value):
        raise UserError(f'{where}: "{key}" has half of a surrogate pair, which is no character; remove it')
    return value


def instruction(record, where):
    """The own-language prompt of a record: "instruction", with the Alpaca schema's "input" below it."""
    text, more = text_field(record, "instruction", where), text_field(record, "input", where, required=False)
    return f"{text}\n{more}" if more and more.strip() else text


def english_version(record, where, required=True):
    """The English prompt of a record: "instruction_en"; where that repeats "instruction", with the same "input"."""
    english = text_field(record, "instruction_en", where, required)
    return instruction(record, where) if english == record.get("instruction") else english


def check_folder(path):
    """Refuse, before any work is done, a folder that could not be made or written."""
    there = next(p for p in (Path(path), *Path(path).absolute().parents) if p.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError(f"{path}: cannot be written, {there} is no folder that you may write to; choose another place")


def write_text(path, text):
    """Write a text file, whole or not at all."""
    path = Path(path)
    partial = path.with_name(path.name + ".tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial.write_text(text, encoding="utf-8", errors="backslashreplace")  # half a surrogate pair: as its JSON escape
    sync(partial)
    os.replace(partial, path)


def sync(path):
    """Have the system write a file or folder to the disk now."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
