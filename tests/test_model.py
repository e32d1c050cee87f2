"""The decoder and its checkpoint folder: what is read, what is written, and in which dtype."""
import contextlib
import itertools
import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

import calls
import model
from conftest import (CONFIG, PAIRS, losses, reading, tensors, training, worst_difference,
                      write_checkpoint, write_connection, write_data)
from model import Config, UserError, load_model
from reference import Reference, answer_ids, falls_short, prompt_ids

INDEX = "model.safetensors.index.json"


def rewritten(source, folder, change=lambda name, tensor: tensor, **more):
    """A copy of a checkpoint folder with other weights: change(name, tensor) of each, and more
    tensors."""
    shutil.copytree(source, folder)
    weights = {name: change(name, tensor) for name, tensor in tensors(source, "model.safetensors").items()}
    save_file({**weights, **more}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def copied(ran, source, out, pairs=PAIRS[:2], **options):
    """The folder that train.py writes when nothing changes: plain fine-tuning, learning rate 0."""
    data = write_data(out.with_suffix(".jsonl"), pairs)
    ran(*training(source, data, out, **{"method": "sft", "lr": 0, "epochs": 1, **options}))
    return out


def plain_loss(folder, pairs=PAIRS[:2]):
    """The mean loss per answer token, by the reference."""
    reference, total, count = Reference(folder), 0, 0
    for own, _, answer, _ in pairs:
        answer = answer_ids(folder, answer)
        total, count = total + reference.loss(prompt_ids(folder, own)[0], answer).item(), count + len(answer)
    return total / count


# ------------------------------------------------------------------------------- configuration

SIZES = {name: CONFIG[name] for name in ("model_type", "vocab_size", "hidden_size", "intermediate_size",
                                         "num_hidden_layers", "num_attention_heads")}
DEFAULTS = {  # if config.json has nothing but SIZES
    "num_key_value_heads": 4, "head_dim": 12, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
    "rope_scaling": {}, "max_length": 2048, "tie_word_embeddings": False,
    "initializer_range": 0.02, "bos_token_id": None, "eos_token_ids": (), "qkv_bias": False, "cctuning": {},
    "output_bias": False, "qk_norm": False, "rope_layers": (True,) * 4}
OTHERS = {
    "num_key_value_heads": 1, "head_dim": 20, "rms_norm_eps": 1e-5, "rope_theta": 5e5,
    "tie_word_embeddings": True, "initializer_range": 0.05, "bos_token_id": 7, "cctuning": {"method": "cc"}}
LINEAR, LLAMA3 = {"factor": 2.0}, {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                                   "original_max_position_embeddings": 8192}
WINDOW, FIVE = {"sliding_window": 64}, {"rope_theta": 5e5}
SPELLINGS = [  # more in config.json, and what then differs from DEFAULTS
    ({}, {}),
    (OTHERS, OTHERS),
    ({"num_key_value_heads": None, "head_dim": None, "rope_scaling": None, "eos_token_id": None}, {}),
    ({"max_position_embeddings": 99}, {"max_length": 99}),
    ({"eos_token_id": 8}, {"eos_token_ids": (8,)}),
    ({"eos_token_id": [8, 9]}, {"eos_token_ids": (8, 9)}),
    # a sliding window applies to Mistral, and to Qwen if switched on
    ({"model_type": "mistral", **WINDOW}, {"max_length": 64}),
    ({"model_type": "mistral", "sliding_window": 9999}, {}),
    ({"model_type": "mistral", "sliding_window": None}, {}),
    ({"model_type": "qwen2", **WINDOW, "use_sliding_window": False}, {"qkv_bias": True}),
    ({"model_type": "qwen2", **WINDOW, "use_sliding_window": True}, {"qkv_bias": True, "max_length": 64}),
    # rotary embedding, as transformers 4 spells it, earlier ones, and transformers 5
    ({"rope_scaling": {"rope_type": "llama3", **LLAMA3}}, {"rope_scaling": {"rope_type": "llama3", **LLAMA3}}),
    # linear scaling lengthens what the model takes, unless its config says so
    ({"rope_scaling": {"type": "linear", "factor": 2}},
     {"rope_scaling": {"rope_type": "linear", **LINEAR}, "max_length": 4096}),
    ({"rope_scaling": {"type": "linear", "factor": 2}, "max_sequence_length": 3000},
     {"rope_scaling": {"rope_type": "linear", **LINEAR}, "max_length": 3000}),
    ({"rope_scaling": {"type": "linear", "factor": 2, "original_max_position_embeddings": 1024}},
     {"rope_scaling": {"rope_type": "linear", **LINEAR}}),  # max_position_embeddings is the stretched length
    ({"rope_parameters": {"rope_type": "default", **FIVE}}, FIVE),
    ({"rope_parameters": {"rope_type": "linear", **LINEAR, **FIVE}},
     {"rope_scaling": {"rope_type": "linear", **LINEAR}, "max_length": 4096, **FIVE}),
    ({"rope_scaling": {"type": "linear", "factor": 2, "original_max_position_embeddings": 1024}},
     {"rope_scaling": {"rope_type": "linear", **LINEAR}}),
    # what publishers write
    ({"rope_theta": 45.2e9, "initializer_range": 0, "tie_word_embeddings": None},
     {"rope_theta": 45.2e9, "initializer_range": 0.0}),
    *(({"model_type": "mistral", "sliding_window": none}, {}) for none in (0, -1)),
    # other families
    ({"attention_bias": True}, {"qkv_bias": True, "output_bias": True}),
    ({"model_type": "qwen3"}, {"qk_norm": True}),
    ({"model_type": "smollm3"}, {"rope_layers": (True, True, True, False), "tie_word_embeddings": True}),
    ({"model_type": "smollm3", "no_rope_layers": [0, 1, 1, 1], "tie_word_embeddings": False},
     {"rope_layers": (False, True, True, True)}),
    ({"model_type": "smollm3", "no_rope_layers": None, "no_rope_layer_interval": 2},
     {"rope_layers": (True, False, True, False), "tie_word_embeddings": True}),
]


@pytest.mark.parametrize("says, differs", SPELLINGS)
def test_config(tmp_path, says, differs):
    """Catches a default other than transformers', a sliding window ignored where it applies or applied
    where it is off, and a value missed in one spelling."""
    (tmp_path / "config.json").write_text(json.dumps({**SIZES, **says}))
    config = Config.read(tmp_path)
    assert {name: getattr(config, name) for name in DEFAULTS} == {**DEFAULTS, **differs}


def test_name_of_a_repository():
    """Catches a name of the Hugging Face hub answered without the way to get it."""
    with pytest.raises(UserError, match="hf download org/name-1.0 --local-dir org/name-1.0"):
        Config.read("org/name-1.0")


def test_defaults_are_those_of_transformers(tmp_path):
    """Catches a mistake in the table above."""
    transformers = pytest.importorskip("transformers", reason="optional package: only compared with")
    (tmp_path / "config.json").write_text(json.dumps(SIZES))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path).to_dict()
    if (rope := theirs.get("rope_parameters")) is not None:  # transformers 5
        theirs["rope_theta"], theirs["rope_scaling"] = rope["rope_theta"], None
    same = ("num_key_value_heads", "rms_norm_eps", "rope_theta", "rope_scaling", "tie_word_embeddings",
            "initializer_range")
    assert {name: theirs[name] or {} for name in same} == {name: DEFAULTS[name] or {} for name in same}
    assert theirs["max_position_embeddings"] == DEFAULTS["max_length"]


# ---------------------------------------------------------------------------------------- dtype

def norms_apart(name, tensor):
    return tensor.to(torch.float32 if "norm" in name else torch.bfloat16)


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16", "mixed"])
@pytest.mark.parametrize("asked", [None, torch.float32, torch.bfloat16, torch.float16])
def test_loaded_in_the_dtype_asked_for(checkpoint, tmp_path, stored, asked):
    """Catches an ignored dtype, and a mixed checkpoint that stays mixed: with no dtype given, all
    weights take the embedding's."""
    dtype = torch.bfloat16 if stored == "mixed" else getattr(torch, stored)
    change = norms_apart if stored == "mixed" else lambda name, tensor: tensor.to(dtype)
    folder = rewritten(checkpoint(), tmp_path / "model", change)
    found, weights = dict(load_model(folder, asked).named_parameters()), tensors(folder)
    assert found.keys() == weights.keys()
    for name, parameter in found.items():
        assert parameter.dtype == (asked or dtype), name
        assert parameter.equal(weights[name].to(asked or dtype)), name


def test_computed_in_the_dtype_asked_for(tmp_path, ran):
    """Catches an infer.py that ignores --dtype or defaults to another dtype than the weights', and a
    Decision Maker or matrix rounded to that dtype."""
    source = write_connection(write_checkpoint(tmp_path / "source"))
    folder, found = rewritten(source, tmp_path / "model", norms_apart), {}
    data = write_data(tmp_path / "data.jsonl", PAIRS[:2])
    for dtype in (None, "bfloat16", "float32"):
        out = ran("infer", "--model", folder, "--input", data, "--explain", "--max_new_tokens=1",
                  *([f"--dtype={dtype}"] if dtype else []))
        found[dtype] = torch.tensor([json.loads(line)["probabilities"] for line in out.splitlines()])
    assert found[None].equal(found["bfloat16"]) and not found[None].equal(found["float32"])
    reference = Reference(folder)
    for row, (own, *_) in zip(found["float32"], PAIRS, strict=False):
        ids = prompt_ids(folder, own)[0]
        activations = reference.activations(ids, -1) @ reference.tensors["transform_matrix"]
        assert (row - reference.scores(activations, ids[-1]).softmax(-1)).abs().max() < 1e-4


# ------------------------------------------------------------------------------ what is written

@pytest.mark.parametrize("dtype, tied", [("float32", True), ("float16", False), ("bfloat16", True),
                                         ("mixed", False)])
def test_what_is_saved_is_what_was_loaded(checkpoint, tmp_path, ran, dtype, tied):
    """Catches a tensor saved in another dtype, a tied head written twice, and shards that are read
    wrongly or hold a tensor too many or too few."""
    change = norms_apart if dtype == "mixed" else lambda name, tensor: tensor.to(getattr(torch, dtype))
    source = rewritten(checkpoint(tie_word_embeddings=tied), tmp_path / "source", change)
    first = copied(ran, source, tmp_path / "first", max_shard_size=5e-5)  # 50 kB
    second = copied(ran, first, tmp_path / "second", max_shard_size=5e-5)
    assert abs(losses(first)[0] - plain_loss(source)) < 1e-4
    weights = tensors(source)
    for folder in (first, second):
        found, index = tensors(folder), json.loads((folder / INDEX).read_text())
        assert found.keys() == index["weight_map"].keys() == weights.keys()
        for name, tensor in weights.items():
            assert found[name].dtype == tensor.dtype and found[name].equal(tensor), name
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in weights.values())
        files = {}  # {file: bytes of its tensors}
        for name, file in index["weight_map"].items():
            files.setdefault(file, []).append(weights[name].nbytes)
        assert sorted(files) == sorted(path.name for path in folder.glob("*.safetensors"))
        sizes = list(files.values())
        assert len(sizes) > 2 and all(sum(size) <= 50_000 or len(size) == 1 for size in sizes)
        assert all(sum(size) + following[0] > 50_000 for size, following in itertools.pairwise(sizes))


FILES = {  # beside tokenizer.model
    "tokenizer.json": '{"another": "kind"}',  # not read: there is a tokenizer.model
    "tokenizer_config.json": '{"chat_template": "{{ messages }}", "padding_side": "left"}',
    "special_tokens_map.json": '{"bos_token": "<s>"}',
    "added_tokens.json": '{"<pad>": 511}',
    "vocab.json": '{"a": 5}',
    "merges.txt": "#version: 0.2\na b\n",
    "chat_template.jinja": "{{ messages[0].content }}\n",
    "generation_config.json": '{"eos_token_id": [2, 7], "temperature": 0.6}',
}


def test_what_else_is_copied(checkpoint, tmp_path, ran):
    """Catches a tokenizer file left behind, and an entry of config.json lost or changed: torch_dtype
    names the dtype of the weights, others serve other programs."""
    source = write_checkpoint(tmp_path / "source", torch_dtype="bfloat16", use_cache=True, pad_token_id=None)
    for name, content in FILES.items():
        (source / name).write_text(content)
    (source / "README.md").write_text("of another model")
    out = copied(ran, source, tmp_path / "out")
    changed = {"tokenizer_config.json", "generation_config.json", "chat_template.jinja"}
    for name in {*FILES, "tokenizer.model"} - changed:
        assert (out / name).read_bytes() == (source / name).read_bytes(), name
    settings, generation = (json.loads((out / f"{name}_config.json").read_text())
                            for name in ("tokenizer", "generation"))
    assert settings["chat_template"] == FILES["chat_template.jinja"] and settings["padding_side"] == "left"
    assert generation == {"eos_token_id": [2, 7], "temperature": 0.6} and not (out / "chat_template.jinja").exists()
    assert not (out / "README.md").exists()
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (source, out))
    assert after.pop("cctuning")["method"] == "sft" and after == before


def test_saving_over_a_model_leaves_none_of_it(checkpoint, tmp_path, ran):
    """Catches old weights beside the new ones (loaders would take them), an old tokenizer, matrix or
    staging folder, and the loss of a file of the user's."""
    pytest.importorskip("tokenizers", reason="optional package: only tokenizer.json needs it")
    out = copied(ran, checkpoint(), tmp_path / "out", method="cc", max_shard_size=5e-5)
    assert (out / "cctuning.safetensors").exists() and (out / "tokenizer.model").exists()
    (out / "notes.txt").write_text("mine")
    (out / "saving.tmp").mkdir()
    (out / "saving.tmp" / "0.tmp").write_text("of a run that was killed")
    copied(ran, checkpoint("plain", "json"), out, overwrite=True)
    names = {"config.json", INDEX, "model-00001-of-00001.safetensors", "tokenizer.json",
             "tokenizer_config.json", "generation_config.json", "train_log.jsonl", "notes.txt", "run.json", ".lock"}
    assert {path.name for path in out.iterdir()} == names
    assert worst_difference(tensors(out), tensors(checkpoint())) == 0


@pytest.mark.parametrize("changes", [
    {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "tie_word_embeddings": True},
], ids=["llama, linear", "qwen2, tied"])
def test_transformers_opens_what_we_save(tmp_path, ran, changes):
    """Catches names, a config or an index that transformers does not understand, and a difference in the
    decoder. The golden values cover other kinds."""
    transformers = pytest.importorskip("transformers", reason="optional package: only compared with")
    source = write_checkpoint(tmp_path / "source", **changes)
    ours = copied(ran, source, tmp_path / "ours", max_shard_size=2e-4)  # two shards
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(ours, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    ids = torch.tensor([[1, 8, 8, 8, 90, 17, 300, 12, 44]])
    found = calls.logits(calls.open_model(ours), ids)
    assert (found - theirs(ids).logits).abs().max() < 1e-4


# --------------------------------------------------------------------------------- what is read

def test_unused_tensors(checkpoint, tmp_path, ran):
    """Catches the refusal of checkpoints with unused tensors: lm_head.weight beside a tied embedding,
    rotary buffers of old Llama files. The result has neither."""
    buffers = {f"model.{place}rotary_emb.inv_freq": torch.ones(6) for place in ("", "layers.0.self_attn.")}
    head = {"lm_head.weight": torch.zeros(512, 48)}
    for tied, more in ((False, buffers), (True, {**buffers, **head})):
        source = checkpoint(tie_word_embeddings=tied)
        out = copied(ran, rewritten(source, tmp_path / f"{tied}", **more), tmp_path / f"out {tied}")
        assert worst_difference(tensors(out), tensors(source)) == 0
        assert abs(losses(out)[0] - plain_loss(source)) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checkpoint_of_the_papers_code(checkpoint, tmp_path, ran, dtype):
    """Catches a Decision Maker refused, dropped or rounded under the name used by the paper's code, or
    saved under it."""
    decision_maker = torch.randn(4, 48, generator=torch.Generator().manual_seed(3)).to(dtype)
    folder = rewritten(checkpoint(), tmp_path / "paper", **{"model.source_select.weight": decision_maker})
    out = copied(ran, folder, tmp_path / "out", method="cc", epochs=0)  # needs a trained Decision Maker
    found = tensors(out)
    assert found.pop("decision_maker.weight").equal(decision_maker.float())
    matrix = found.pop("transform_matrix")
    assert (matrix.shape, matrix.dtype) == ((48, 48), torch.float32)
    assert worst_difference(found, tensors(checkpoint())) == 0


STRANGE = [("Nini\u2028mji\u2029mkuu\x85wa Kenya?", "What?", "Nairobi\u2028", "sw"),
           ("\ufeff mbili", "two", " tano\x0b", "sw"),
           ("भारत \u200d", "India", "दिल्ली", "hi")]


@pytest.mark.parametrize("form", ["lines", "CRLF", "list"])
def test_text_files(checkpoint, tmp_path, ran, form):
    """Catches a byte order mark read as text, in data or checkpoint files; lines split at U+2028, which
    JSON allows inside strings; Windows line ends; stripped texts."""
    folder, data = shutil.copytree(checkpoint(), tmp_path / "model"), tmp_path / "data.json"
    (folder / "tokenizer_config.json").write_text("{}")
    lines = write_data(data, STRANGE).read_text(encoding="utf-8").split("\n")
    forms = {"lines": "\n".join(lines) + "\n\n", "CRLF": "\r\n".join(lines), "list": f"\n[{','.join(lines)}]"}
    data.write_bytes(forms[form].encode())
    for path in (data, folder / "config.json", folder / "tokenizer_config.json"):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    ran(*training(folder, data, tmp_path / "out", method="sft", lr=0, epochs=1))
    assert abs(losses(tmp_path / "out")[0] - plain_loss(folder, STRANGE)) < 1e-4
    with reading() as read:
        ran("infer", "--model", folder, "--input", data, "--output", tmp_path / "answers.jsonl",
            "--batch_size=1", "--max_new_tokens=1")
    prompts = [prompt_ids(folder, own)[0] for own, *_ in STRANGE]
    assert sorted(ids for (ids,) in read) == sorted(prompts)
    answers = (tmp_path / "answers.jsonl").read_bytes().decode().split("\n")
    assert [json.loads(line)["instruction"] for line in answers if line] == [own for own, *_ in STRANGE]


def test_input_below_the_instruction(checkpoint, tmp_path, ran):
    """Catches Alpaca's "input" left out of a prompt or its English version, or joined by something else.
    An English version equal to the instruction gets the same input."""
    records = [{"instruction": "Nini?", "input": "mbili", "instruction_en": "What? two", "output": "tano"},
               {"instruction": "What?", "input": "three", "instruction_en": "What?", "output": "five"},
               {"instruction": "tatu?", "input": " ", "instruction_en": "three?", "output": "six"}]
    data, folder = tmp_path / "data.jsonl", checkpoint()
    data.write_text("\n".join(map(json.dumps, records)))
    with reading() as read:
        ran(*training(folder, data, tmp_path / "out", lr=0, epochs=1, batch_size=1, matrix_prompts=1))
    own = ["Nini?\nmbili", "What?\nthree", "tatu?"]
    wanted = [prompt_ids(folder, text)[0] for text in ("What? two", "What?\nthree", "three?")]
    wanted += [prompt_ids(folder, text)[0] + answer_ids(folder, record["output"])
               for text, record in zip(own, records, strict=True)]
    rows = [call[0] for call in read if isinstance(call[0], list)]
    assert all(row in rows for row in wanted)


def test_one_file_before_an_index(checkpoint, tmp_path):
    """Catches weights read from another file than transformers reads."""
    folder = rewritten(checkpoint(), tmp_path / "model", lambda name, tensor: 2 * tensor)
    weights = tensors(folder)
    zeros = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
    save_file(zeros, folder / "other.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(zeros, "other.safetensors")}))
    assert all(parameter.equal(weights[name]) for name, parameter in load_model(folder).named_parameters())
    (folder / "model.safetensors").unlink()
    assert not any(parameter.any() for parameter in load_model(folder).parameters())


@torch.no_grad()
def test_long_answers(checkpoint):
    """Catches long answers that outgrow a table or mask sized for the prompt."""
    cc, reference = calls.open_model(checkpoint()), Reference(checkpoint())
    generator = torch.Generator().manual_seed(0)
    short, longer = (torch.randint(3, 400, (1, size), generator=generator) for size in (110, 300))
    _, _, found = calls.answer(cc, short, torch.tensor([110]), 160)
    assert falls_short(reference, short[0].tolist(), found[0].tolist()) < 1e-3
    assert (calls.logits(cc, longer)[0] - reference.forward(longer[0].tolist())[0]).abs().max() < 1e-3


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
    weights = tensors(checkpoint())
    for world, rank in ((2, 0), (2, 1), (4, 0), (4, 3), (5, 4)):
        found = calls.read_rows(checkpoint(), world, rank)
        assert all(found[name].equal(tensor.chunk(world)[rank]) for name, tensor in weights.items())
