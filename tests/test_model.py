"""The decoder's checkpoint folder: config.json, what is read, what is written, and in which dtype."""
import contextlib
import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

import calls
import model
from conftest import (CONFIG, PAIRS, losses, tensors, training, worst_difference, write_checkpoint,
                      write_data)
from model import Config, load_model, read_records
from reference import Reference, answer_ids, prompt_ids

INDEX = "model.safetensors.index.json"


def reweighted(source, folder, change=lambda name, tensor: tensor, **more):
    """A copy of a checkpoint with other weights: change(name, tensor) of each, and more tensors."""
    shutil.copytree(source, folder)
    weights = {name: change(name, tensor) for name, tensor in tensors(source, "model.safetensors").items()}
    save_file({**weights, **more}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def copied(ran, source, out):
    """The folder that train.py writes when nothing changes: plain fine-tuning, learning rate 0."""
    data = write_data(out.with_suffix(".jsonl"), PAIRS[:2])
    ran(*training(source, data, out, method="sft", lr=0, epochs=1))
    return out


def plain_loss(folder, pairs=PAIRS[:2]):
    """The mean loss per answer token, by the reference."""
    answers = [answer_ids(folder, answer) for _, _, answer, _ in pairs]
    total = sum(Reference(folder).loss(prompt_ids(folder, own)[0], answer).item()
                for (own, *_), answer in zip(pairs, answers, strict=True))
    return total / sum(map(len, answers))


# --------------------------------------------------------------------------------------- config.json

SIZES = {name: CONFIG[name] for name in ("model_type", "vocab_size", "hidden_size", "intermediate_size",
                                         "num_hidden_layers", "num_attention_heads")}
DEFAULTS = {  # if config.json has nothing but SIZES
    "vocab_size": 512, "hidden_size": 48, "num_hidden_layers": 4, "num_key_value_heads": 4, "head_dim": 12,
    "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "rope_scaling": {}, "max_length": 2048,
    "tie_word_embeddings": False, "initializer_range": 0.02, "bos_token_id": None, "eos_token_ids": (),
    "qkv_bias": False, "output_bias": False, "qk_norm": False, "rope_layers": (True,) * 4,
    "fusion_layer": 0, "source_layer": "decision_maker", "cctuning": {}}
OTHERS = {"num_key_value_heads": 1, "head_dim": 20, "rms_norm_eps": 1e-5, "rope_theta": 5e5,
          "tie_word_embeddings": True, "initializer_range": 0.05, "bos_token_id": 7}
FUSED = {"fusion_layer": 2, "source_layer": "mean"}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 8192}
LINEAR, PLAIN = {"rope_type": "linear", "factor": 2.0}, {"rope_type": "default", "rope_theta": 5e5}
LONG, WINDOW = {"max_position_embeddings": 9999}, {"sliding_window": 64}
SPELLINGS = [  # more in config.json, and what then differs from DEFAULTS
    ({}, {}), (OTHERS, OTHERS),
    ({"cctuning": FUSED}, {"cctuning": FUSED, **FUSED}),
    ({"num_key_value_heads": None, "head_dim": None, "rope_scaling": None, "eos_token_id": None}, {}),
    (LONG, {"max_length": 9999}), ({**LONG, **WINDOW}, {"max_length": 9999}),
    ({"eos_token_id": 0}, {"eos_token_ids": (0,)}), ({"eos_token_id": [8, 9]}, {"eos_token_ids": (8, 9)}),
    # A window applies to Mistral, where it is 4096 unless given, null for none; to Qwen if switched on.
    ({"model_type": "mistral", **LONG}, {"max_length": 4096}),
    ({"model_type": "mistral", **LONG, **WINDOW}, {"max_length": 64}),
    ({"model_type": "mistral", **LONG, "sliding_window": None}, {"max_length": 9999}),
    ({"model_type": "qwen2", **WINDOW, "use_sliding_window": False}, {"qkv_bias": True}),
    ({"model_type": "qwen2", **WINDOW, "use_sliding_window": True}, {"qkv_bias": True, "max_length": 64}),
    ({**WINDOW, "layer_types": ["sliding_attention"] * 4}, {"max_length": 64}),
    # Rotary positions, as transformers 4, earlier ones, and 5 spell it.
    ({"rope_scaling": LLAMA3, "rope_parameters": LINEAR}, {"rope_scaling": LLAMA3}),  # both: the first
    ({"rope_scaling": {"type": "linear", "factor": 2}}, {"rope_scaling": LINEAR}),
    ({"rope_parameters": PLAIN}, {"rope_theta": 5e5}),
    ({"rope_parameters": {**LINEAR, "rope_theta": 5e5}}, {"rope_scaling": LINEAR, "rope_theta": 5e5}),
    ({"attention_bias": True}, {"qkv_bias": True, "output_bias": True}),
    ({"model_type": "mistral", "attention_bias": True}, {}), ({"model_type": "qwen3"}, {"qk_norm": True}),
    ({"model_type": "smollm3"}, {"rope_layers": (True, True, True, False), "tie_word_embeddings": True}),
    ({"model_type": "smollm3", "no_rope_layers": [0, 1, 1, 1], "tie_word_embeddings": False},
     {"rope_layers": (False, True, True, True)}),
    ({"model_type": "smollm3", "no_rope_layers": None, "no_rope_layer_interval": 2},
     {"rope_layers": (True, False, True, False), "tie_word_embeddings": True}),
]


@pytest.mark.parametrize("says, differs", SPELLINGS)
def test_config(tmp_path, says, differs):
    """Catches a default other than transformers', a sliding window ignored, a spelling missed."""
    (tmp_path / "config.json").write_text(json.dumps({**SIZES, **says}))
    config = Config.read(tmp_path)
    assert {name: getattr(config, name) for name in DEFAULTS} == {**DEFAULTS, **differs}


@pytest.mark.optional
@pytest.mark.parametrize("family, window", [("llama", None), ("mistral", 4096)])
def test_defaults_are_those_of_transformers(tmp_path, family, window):
    """Catches a mistake in the tables above."""
    transformers = pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text(json.dumps({**SIZES, **LONG, "model_type": family}))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path).to_dict()
    theirs |= theirs.get("rope_parameters") or {}  # transformers 5
    names = ("rms_norm_eps", "rope_theta", "tie_word_embeddings", "initializer_range")
    assert [theirs[name] for name in names] == [DEFAULTS[name] for name in names]
    assert theirs.get("sliding_window") == window


# --------------------------------------------------------------------------------------------- dtype

def in_dtype(stored):
    """A change of weights, for reweighted: to this dtype; "mixed": norms float32, others bfloat16."""
    def change(name, tensor):
        if stored == "mixed":
            return tensor.to(torch.float32 if "norm" in name else torch.bfloat16)
        return tensor.to(getattr(torch, stored))
    return change


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16", "mixed"])
@pytest.mark.parametrize("asked", [None, torch.float32, torch.bfloat16, torch.float16])
def test_loaded_in_the_dtype_asked_for(checkpoint, tmp_path, stored, asked):
    """Catches an ignored dtype, and a mixed checkpoint that does not take the embedding's dtype."""
    folder = reweighted(checkpoint(), tmp_path / "model", in_dtype(stored))
    found, weights = dict(load_model(folder, asked).named_parameters()), tensors(folder)
    dtype = asked or weights["model.embed_tokens.weight"].dtype
    assert found.keys() == weights.keys()
    for name, parameter in found.items():
        assert parameter.dtype == dtype and parameter.equal(weights[name].to(dtype)), name


@pytest.mark.parametrize("dtype, tied", [("float32", True), ("float16", False), ("mixed", True)])
def test_what_is_saved_is_what_was_loaded(checkpoint, tmp_path, ran, dtype, tied):
    """Catches a tensor saved in another dtype, a tied head written twice, and a wrong index."""
    source = reweighted(checkpoint(tie_word_embeddings=tied), tmp_path / "source", in_dtype(dtype))
    first, weights = copied(ran, source, tmp_path / "first"), tensors(source)
    assert abs(losses(first)[0] - plain_loss(source)) < 1e-4
    for folder in (first, copied(ran, first, tmp_path / "second")):
        found, index = tensors(folder), json.loads((folder / INDEX).read_text())
        assert found.keys() == index["weight_map"].keys() == weights.keys()
        for name, tensor in weights.items():
            assert found[name].dtype == tensor.dtype and found[name].equal(tensor), name
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in weights.values())
        assert {*index["weight_map"].values()} == {path.name for path in folder.glob("*.safetensors")}


# ----------------------------------------------------------------------------- what else is in a folder

KEPT = {"special_tokens_map.json": '{"bos_token": "<s>"}', "added_tokens.json": '{"<pad>": 511}',
        "vocab.json": '{"a": 5}', "merges.txt": "#version: 0.2\na b\n"}
CHANGED = {"tokenizer_config.json": '{"chat_template": "{{ messages }}", "padding_side": "left"}',
           "chat_template.jinja": "{{ messages[0].content }}\n",
           "generation_config.json": '{"eos_token_id": [2, 7], "temperature": 0.6}'}


def test_what_else_is_copied(checkpoint, tmp_path, ran):
    """Catches a tokenizer file left behind, and an entry of config.json lost or changed."""
    source = write_checkpoint(tmp_path / "source", torch_dtype="bfloat16", use_cache=True, pad_token_id=None)
    for name, content in {**KEPT, **CHANGED, "README.md": "of another model"}.items():
        (source / name).write_text(content)
    out = copied(ran, source, tmp_path / "out")
    for name in (*KEPT, "tokenizer.model"):
        assert (out / name).read_bytes() == (source / name).read_bytes(), name
    settings = json.loads((out / "tokenizer_config.json").read_text())
    assert settings["chat_template"] == CHANGED["chat_template.jinja"] and settings["padding_side"] == "left"
    generation = json.loads((out / "generation_config.json").read_text())
    assert generation == {"eos_token_id": [2, 7], "temperature": 0.6}
    assert not (out / "chat_template.jinja").exists() and not (out / "README.md").exists()
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (source, out))
    assert after.pop("cctuning")["method"] == "sft" and after == before


@pytest.mark.optional
@pytest.mark.parametrize("changes", [
    {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "tie_word_embeddings": True}], ids=str)
def test_transformers_opens_what_we_save(tmp_path, ran, changes):
    """Catches a folder that transformers does not understand, and a difference in the decoder."""
    transformers = pytest.importorskip("transformers")
    source, data = write_checkpoint(tmp_path / "source", **changes), write_data(tmp_path / "data.jsonl")
    ran(*training(source, data, tmp_path / "out", epochs=1, ridge=0.1))
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    ids = torch.tensor([[1, 8, 8, 8, 90, 17, 300, 12, 44]])
    assert (calls.logits(calls.open_model(tmp_path / "out"), ids) - theirs(ids).logits).abs().max() < 1e-4


def test_unused_tensors(tmp_path, ran):
    """Catches lm_head.weight beside a tied embedding refused, or rotary buffers; linear RoPE upside down."""
    unused = {f"model.{place}rotary_emb.inv_freq": torch.ones(6) for place in ("", "layers.0.self_attn.")}
    for tied, head in ((False, {}), (True, {"lm_head.weight": torch.zeros(512, 48)})):
        source = write_checkpoint(tmp_path / f"of {tied}", tie_word_embeddings=tied, rope_scaling=LINEAR)
        out = copied(ran, reweighted(source, tmp_path / f"{tied}", **unused, **head), tmp_path / f"out{tied}")
        assert worst_difference(tensors(out), tensors(source)) == 0
        assert abs(losses(out)[0] - plain_loss(source)) < 1e-4


def test_one_file_before_an_index(checkpoint, tmp_path):
    """Catches weights read from another file than transformers reads."""
    folder = reweighted(checkpoint(), tmp_path / "model")
    weights = tensors(folder)
    zeros = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
    save_file(zeros, folder / "other.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(zeros, "other.safetensors")}))
    assert all(parameter.equal(weights[name]) for name, parameter in load_model(folder).named_parameters())
    (folder / "model.safetensors").unlink()
    assert not any(parameter.any() for parameter in load_model(folder).parameters())


def test_text_files(tmp_path):
    """Catches a byte order mark read as text, and lines split at U+2028, which JSON allows in a string."""
    texts = ["Nini\u2028mji mkuu\x85wa Kenya?", " mbili", "भारत \u200d"]
    lines = [json.dumps({"instruction": text}, ensure_ascii=False) for text in texts]
    (tmp_path / "data.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    assert [record.prompt for record in read_records(tmp_path / "data.jsonl")] == texts


def test_a_process_reads_only_its_rows(checkpoint, monkeypatch):
    """Catches a sharded load that reads whole tensors, or takes rows from the wrong place."""
    opened = model.open_safetensors

    class Rows:
        def __init__(self, file):
            self.keys, self.get_slice = file.keys, file.get_slice

    @contextlib.contextmanager
    def rows_only(path):
        with opened(path) as file:
            yield Rows(file)
    monkeypatch.setattr(model, "open_safetensors", rows_only)
    for world, rank in ((2, 1), (4, 0), (5, 4)):
        found = calls.read_rows(checkpoint(), world, rank)
        for name, tensor in tensors(checkpoint()).items():
            assert found[name].equal(tensor.chunk(world)[rank]), name
