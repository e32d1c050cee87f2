"""Tiny checkpoints with real tokenizers, made on the fly; every test runs in float32 with explicit seeds."""
import io
import json
import os
import sys

os.environ["OMP_NUM_THREADS"] = "1"  # tiny models: threads would only wait for one another

import pytest
import sentencepiece
import torch
from safetensors.torch import save_file

from model import TEMPLATES, Config, LanguageModel

TEXT = ["What is the capital of Kenya?", "Nini mji mkuu wa Kenya?", "The capital of Kenya is Nairobi.", "Mji mkuu wa Kenya ni Nairobi.",
        "two plus three makes five", "mbili na tatu ni tano", "Wie heißt die Hauptstadt von Kenia?", "भारत की राजधानी क्या है?",
        "user and assistant, system and helpful", "You are a helpful assistant.", "INST eot_id im_start im_end header_id"] * 4
CONFIG = dict(model_type="llama", architectures=["LlamaForCausalLM"], vocab_size=512, hidden_size=48, intermediate_size=96, num_hidden_layers=4,
              num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, rms_norm_eps=1e-6, rope_theta=10000.0,
              hidden_act="silu", tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, torch_dtype="float32")
PAIRS = [("Nini mji mkuu wa Kenya?", "What is the capital of Kenya?", "Nairobi", "sw"),
         ("mbili na tatu?", "two plus three?", "five, for two and three make five and nothing else", "sw"),
         ("Wie heißt die Hauptstadt von Kenia?", "What is the capital of Kenya?", "Nairobi is the capital", "de"),
         ("भारत की राजधानी क्या है?", "What is the capital of India?", "New Delhi", "hi"),
         ("What is the capital of Kenya?", "What is the capital of Kenya?", "It is Nairobi", "en"),
         ("tatu na tatu ni ngapi, na mbili na mbili?", "three plus three?", "six", "sw")]


def sentencepiece_model(path, control=()):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT), model_writer=model, model_type="bpe", vocab_size=400, hard_vocab_limit=False, byte_fallback=True,
        control_symbols=list(control), normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2)
    path.write_bytes(model.getvalue())


def tokenizer_json(folder, control=(), bos="<s>"):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    tk = Tokenizer(models.BPE())
    tk.pre_tokenizer, tk.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tk.train_from_iterator(TEXT, trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<pad>", "<s>", "</s>", *control], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    tk.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": bos, "eos_token": "</s>"}))


def write_checkpoint(folder, template="plain", kind="sentencepiece", seed=0, **changes):
    """A Hugging Face folder of random weights whose tokenizer carries the template's control tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    generator = torch.Generator().manual_seed(seed)
    model = LanguageModel(Config.read(folder))
    for name, p in model.named_parameters():
        p.data = torch.randn(p.shape, generator=generator) * (0.1 if p.dim() == 1 else 0.15) + (1.0 if "norm" in name else 0.0)
    save_file({n: p.data for n, p in model.named_parameters()}, folder / "model.safetensors", metadata={"format": "pt"})
    if kind == "sentencepiece":
        sentencepiece_model(folder / "tokenizer.model", TEMPLATES[template].control)
    else:
        tokenizer_json(folder, TEMPLATES[template].control, bos=None if template == "chatml" else "<s>")
    return folder


def write_data(path, pairs=PAIRS, repeat=1):
    lines = [dict(instruction=own, instruction_en=english, output=answer, lang=lang) for own, english, answer, lang in pairs * repeat]
    path.write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in lines), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """checkpoint(template, kind, **config changes): the folder, made once a session."""
    made = {}

    def make(template="plain", kind="sentencepiece", **changes):
        key = (template, kind, *sorted(changes.items()))
        if key not in made:
            made[key] = write_checkpoint(tmp_path_factory.mktemp(template) / "model", template, kind, **changes)
        return made[key]
    return make


@pytest.fixture
def run(monkeypatch, capsys):
    """run("train", *arguments): the script's main() in this process, as from the command line; returns (exit code, stdout, stderr)."""
    def call(script, *arguments):
        import importlib
        from model import run_script
        monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, arguments)])
        code = 0
        try:
            run_script(importlib.import_module(script).main)
        except SystemExit as stop:
            code = stop.code or 0
        return (code, *capsys.readouterr())
    return call
