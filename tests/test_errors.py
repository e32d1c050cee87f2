"""Bad input: one line on stderr that names the culprit and says what to do, exit code 2, nothing written."""
import json
import runpy
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import ROOT, write_benchmark, write_checkpoint, write_data
from model import INDEX

CONFIG, WEIGHTS, ADDED = "model/config.json", "model/model.safetensors", "model/cctuning.safetensors"
DATA, BENCH = "data.jsonl", "bench/XNLI"
GOOD = {"instruction": "Nini?", "output": "Jibu", "instruction_en": "What?", "lang": "sw"}
DECISION_MAKER, MATRIX = torch.zeros(4, 48), torch.zeros(48, 48)


# ------------------------------------------------------------------------------ ways to spoil a folder p of good things

def nothing(p):
    pass


def both(first, second):
    return lambda p: (first(p), second(p))


def remove(name):
    return lambda p: shutil.rmtree(p / name) if (p / name).is_dir() else (p / name).unlink()


def write(name, content):
    return lambda p: (p / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def link_to_nowhere(name):
    return both(remove(name), lambda p: (p / name).symlink_to("gone"))


def make_a_folder(name):
    return both(remove(name), lambda p: (p / name).mkdir())


def patch(name, change):
    return lambda p: (p / name).write_bytes(change((p / name).read_bytes()))


def cut(name, share):
    return patch(name, lambda content: content[:int(len(content) * share)])


def flip(name, at):
    return patch(name, lambda content: content[:at] + bytes([content[at] ^ 0xFF]) + content[at + 1:])


def config(**changes):
    """Other values in config.json; those that are "absent" go."""
    def spoil(p):
        raw = {**json.loads((p / CONFIG).read_text()), **changes}
        (p / CONFIG).write_text(json.dumps({key: value for key, value in raw.items() if value != "absent"}))
    return spoil


def tensors(change):
    def spoil(p):
        weights = load_file(p / WEIGHTS)
        change(weights)
        save_file(weights, p / WEIGHTS)
    return spoil


def index(change):
    """Weights in a.safetensors and b.safetensors with an index, which is changed."""
    def spoil(p):
        weights = load_file(p / WEIGHTS)
        (p / WEIGHTS).unlink()
        names = sorted(weights)
        weight_map = {name: "a.safetensors" if i < 9 else "b.safetensors" for i, name in enumerate(names)}
        for file in ("a.safetensors", "b.safetensors"):
            save_file({n: weights[n] for n in names if weight_map[n] == file}, p / "model" / file)
        change(weight_map)
        (p / "model" / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return spoil


def added(**tensors):
    """cctuning.safetensors with these tensors, beside good ones; those that are None go."""
    tensors = {"decision_maker.weight": DECISION_MAKER, "transform_matrix": MATRIX, **tensors}
    return lambda p: save_file({name: t for name, t in tensors.items() if t is not None}, p / ADDED)


def lines(*lines):
    lines = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    return write(DATA, "\n".join(lines))


def without(key):
    return {name: value for name, value in GOOD.items() if name != key}


CASES = {  # command: {what is wrong: (what the message names, how it is spoilt, further options)}
    ("infer", "--prompt=hello", "--max_new_tokens=2"): {
        # the checkpoint
        "no folder": ("config.json", remove("model")),
        "no config": ("config.json", remove(CONFIG)),
        "config is no JSON": ("config.json", write(CONFIG, '{"model_type": ')),
        "config is a list": ("config.json", write(CONFIG, "[1, 2]")),
        "config with a key twice": ("twice", patch(CONFIG, lambda text: b'{"vocab_size": 1, ' + text[1:])),
        "config without a size": ("config.json: hidden_size", config(hidden_size="absent")),
        "config with a text for a size": ("num_hidden_layers", config(num_hidden_layers="four")),
        "heads that do not fit": ("key/value heads", config(num_key_value_heads=3)),
        "rope without its factor": ("factor", config(rope_scaling={"rope_type": "linear"})),
        "quantised": ("quantization_config", config(quantization_config={"bits": 4})),
        "another activation": ("hidden_act 'gelu'", config(hidden_act="gelu")),
        "attention bias": ("attention_bias", config(attention_bias=True)),
        "a size beyond all bounds": ("hidden_size", config(hidden_size=10 ** 12)),
        "a rope_theta beyond all bounds": ("rope_theta", config(rope_theta=10 ** 400)),
        "an EOS that is a text": ("eos_token_id", config(eos_token_id="</s>")),
        "an EOS that is a list of lists": ("generation_config.json: eos_token_id",
                                           write("model/generation_config.json", '{"eos_token_id": [[2]]}')),
        "a tied head that is a text": ("tie_word_embeddings", config(tie_word_embeddings="false")),
        "a saved template that is none": ("template", config(cctuning={"template": ["a"]})),
        "a layer that there is none of": ("cctuning", config(cctuning={"source_layer": 4})),
        "languages that are no list": ("cctuning", config(cctuning={"languages": 5})),
        "no weights": ("no model.safetensors", remove(WEIGHTS)),
        "empty weights": ("model.safetensors", write(WEIGHTS, "")),
        **{f"weights cut at {tenth}/10": ("model.safetensors: damaged", cut(WEIGHTS, tenth / 10))
           for tenth in range(1, 10)},
        **{f"weights with byte {at} of the header flipped": ("model.safetensors", flip(WEIGHTS, at))
           for at in (0, 3, 7, 8, 9, 40, 200)},
        "weights whose header declares more than there is": (
            "model.safetensors: damaged", patch(WEIGHTS, lambda content: b"\xff" * 6 + b"\0\0" + content[8:])),
        "weights with a tensor beyond the file": ("model.safetensors", patch(
            WEIGHTS, lambda content: content.replace(b'"data_offsets":[0,', b'"data_offsets":[9,', 1))),
        "weights linked to nowhere": ("model", link_to_nowhere(WEIGHTS)),
        "weights are a folder": ("model.safetensors", make_a_folder(WEIGHTS)),
        "an index linked to nowhere": ("a.safetensors: not found", both(
            index(lambda files: None), link_to_nowhere("model/a.safetensors"))),
        "index names a missing shard": ("c.safetensors: not found", index(
            lambda files: files.update({"model.norm.weight": "c.safetensors"}))),
        "index names a tensor its shard lacks": ("a.safetensors", index(
            lambda files: files.update({"model.norm.weight": "a.safetensors"}))),
        "index leaves a tensor out": ("model.norm.weight", index(lambda files: files.pop("model.norm.weight"))),
        "index leads out of the folder": ("index.json", index(
            lambda files: files.update({"model.norm.weight": "../x.safetensors"}))),
        "a tensor of the wrong shape": ("model.norm.weight has shape (47,)", tensors(
            lambda weights: weights.update({"model.norm.weight": torch.zeros(47)}))),
        "a tensor missing": ("lm_head.weight", tensors(lambda weights: weights.pop("lm_head.weight"))),
        "a tensor too many": ("q_proj.bias", tensors(
            lambda weights: weights.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(48)}))),
        "a quantised tensor": ("I8", tensors(
            lambda weights: weights.update({"model.norm.weight": torch.zeros(48, dtype=torch.int8)}))),
        "no tokenizer": ("no tokenizer.model", remove("model/tokenizer.model")),
        "tokenizer.model is none": ("tokenizer.model", write("model/tokenizer.model", "what is this")),
        "tokenizer.json is none": ("tokenizer.json", both(
            remove("model/tokenizer.model"), write("model/tokenizer.json", "{}"))),
        "a tokenizer larger than the embedding": ("tokenizer.model", both(config(vocab_size=300), tensors(
            lambda weights: weights.update({name: weights[name][:300].clone()
                                            for name in ("lm_head.weight", "model.embed_tokens.weight")})))),
        "added tokens of another shape": ("tokenizer.model", write(
            "model/tokenizer_config.json", '{"added_tokens_decoder": ["a"]}')),
        "an added token beyond the embedding": ("601 tokens", write(
            "model/tokenizer_config.json", '{"added_tokens_decoder": {"600": {"content": "<x>", "special": true}}}')),
        "[INST] in chat_template.jinja": ("--template", write(
            "model/chat_template.jinja", "[INST] {{ x }} [/INST]")),
        "a template without its control tokens": ("<|start_header_id|>", nothing, "--template=llama3"),
        # what CC-Tuning added
        "a matrix of another model": ("cctuning.safetensors: transform_matrix", added(
            transform_matrix=torch.zeros(40, 40))),
        "a Decision Maker of another model": ("decision_maker.weight", added(
            **{"decision_maker.weight": torch.zeros(5, 48)})),
        "an unknown tensor beside them": ("other", added(other=torch.zeros(1))),
        "matrices cut short": ("cctuning.safetensors: damaged", both(added(), cut(ADDED, 0.5))),
        "a matrix without its Decision Maker": ("lacks", added(**{"decision_maker.weight": None})),
        "a language's matrix without the shared one": ("lacks", added(
            **{"transform_matrix": None, "transform_matrix.sw": MATRIX})),
        "matrix asked of a plain model": ("no Transform Matrix", nothing, "--connection=matrix"),
        "english asked of a plain model": ("no Decision Maker", nothing, "--connection=english", "--prompt_en=hi"),
        "english without an English version": ("--prompt", added(), "--connection=english"),
        "no matrix of any language": ("--per_language", added(), "--matrix=per_language", "--lang=sw"),
        # options
        "an unknown language": ("'xx'", nothing, "--lang=xx"),
        "output without input": ("--output", nothing, "--output=x.jsonl"),
        "an English version that is not used": ("--prompt_en", nothing, "--prompt_en=hi"),
        "two kinds of prompt": ("--prompt", nothing, "--input={data}"),
        "a prompt too long": ("--prompt", nothing, "--prompt=" + "neno " * 300),
        "a prompt of 100,000 characters": ("--prompt", nothing, "--prompt=" + "x y" * 33334),
        "an empty prompt": ("--prompt", nothing, "--prompt= "),
    },
    ("infer", "--lang=yo"): {
        "a language that no embedded question is in": ("--lang", nothing),
    },
    ("infer", "--input={data}", "--max_new_tokens=2"): {
        "input missing": ("data.jsonl", remove(DATA)),
        "input without instruction": ("data.jsonl:2", lines({"instruction": "a"}, {"prompt": "b"})),
        "a blank English version": ("data.jsonl:1", both(added(), lines({**GOOD, "instruction_en": " "})),
                                    "--connection=english"),
        "an English version of a whole file": ("--prompt_en", nothing, "--prompt_en=hi"),
        "output is the input": ("data.jsonl", nothing, "--output={data}"),
        "output in a folder that is a file": ("data.jsonl", nothing, "--output={data}/x/answers.jsonl"),
    },
    ("train",): {
        "another model_type": ("model_type 'gemma2'", config(model_type="gemma2")),
        "another rope type": ("rope type 'yarn'", config(rope_scaling={"rope_type": "yarn", "factor": 4.0})),
        "data missing": ("data.jsonl", remove(DATA)),
        "data is a folder": ("data.jsonl", make_a_folder(DATA)),
        "data linked to nowhere": ("data.jsonl", link_to_nowhere(DATA)),
        "data empty": ("data.jsonl", lines("")),
        "data an empty list": ("data.jsonl", lines("[]")),
        "data not UTF-8": ("data.jsonl:2", write(DATA, json.dumps(GOOD).encode() + b'\n{"instruction": "\xff"}')),
        "data with a broken line": ("data.jsonl:3", lines(GOOD, GOOD, '{"instruction": "x')),
        "data with a broken list": ("data.jsonl:4", lines(
            "[", json.dumps(GOOD) + ",", json.dumps(GOOD), json.dumps(GOOD) + "]")),
        "data with an unfinished list": ("data.jsonl", lines("[", json.dumps(GOOD) + ",", GOOD)),
        "data with text after the list": ("data.jsonl", lines("[", json.dumps(GOOD) + "]", "more")),
        "data with a key twice": ("data.jsonl:2", lines(GOOD, '{"instruction": "a", ' + json.dumps(GOOD)[1:])),
        "data with a number for a line": ("data.jsonl:2", lines(GOOD, "3")),
        "data without a field": ('data.jsonl:2: "instruction_en"', lines(GOOD, without("instruction_en"))),
        "data with an empty field": ('data.jsonl:2: "output"', lines(GOOD, {**GOOD, "output": " "})),
        "data with a prompt of only spaces": ('data.jsonl:1: "instruction"', lines({**GOOD, "instruction": "\u3000 "})),
        "data with a list for a text": ('data.jsonl:1: "instruction"', lines({**GOOD, "instruction": ["a"]})),
        "data with a number for a language": ('data.jsonl:1: "lang"', lines({**GOOD, "lang": 7})),
        "data with half a character": ('data.jsonl:1: "output"', lines({**GOOD, "output": "\ud83d"})),
        "data with prompts of 100,000 characters": ("--max_length", lines({**GOOD, "instruction": "x y" * 33334})),
        "data all too long": ("--max_length", nothing, "--max_length=4"),
        "data all English": ("data.jsonl", lines({**GOOD, "instruction": "What?"})),
        "data without languages": ('"lang"', lines(without("lang")), "--per_language"),
        "validation data broken": ("dev.jsonl:1", write("dev.jsonl", "{"), "--eval_data={folder}/dev.jsonl"),
        "--source_layer beyond the model": ("--source_layer", nothing, "--source_layer=4"),
        "--max_length beyond the model": ("256", nothing, "--max_length=300"),
        "a learning rate that diverges": ("--lr", lines(*[GOOD] * 8), "--lr=1e18", "--batch_size=1"),
        "only a matrix, of a plain model": ("no Decision Maker", nothing, "--epochs=0"),
        "an option without a use in plain fine-tuning": ("--source_layer", nothing, "--method=sft", "--source_layer=0"),
        "plain fine-tuning without an epoch": ("--epochs 0", nothing, "--method=sft", "--epochs=0"),
        "--out is a file": ("out", write("out", "mine")),
        "--out in a file": ("data.jsonl", nothing, "--out={data}/out"),
        "--out holds a model": ("--overwrite", nothing, "--out={model}"),
    },
    ("eval", "--max_new_tokens=2"): {
        "no room for prompts": ("--max_new_tokens", nothing, "--max_new_tokens=300"),
        "a second model that is none": ("nowhere/config.json", nothing, "--model", "{model}", "{folder}/nowhere"),
        "an unknown task": ("'XYZ'", nothing, "--tasks=XYZ"),
        "no task there": ("bench", remove(BENCH)),
        "a task without gold": ("XNLI", remove(f"{BENCH}/ans_sample")),
        "a language without gold": ("sw.json", remove(f"{BENCH}/ans_sample/sw.json")),
        "a language that the task lacks": ("'yo'", nothing, "--langs=en,yo"),
        "fewer golds than prompts": ("sw.json", write(f"{BENCH}/ans_sample/sw.json", '"1"\n"2"')),
        "a gold that is no option": ("sw.json:2", write(f"{BENCH}/ans_sample/sw.json", '"1"\n"7"\n"1"\n"1"\n"1"')),
        "a broken prompt": ("sw.json:2", write(f"{BENCH}/split_sample/sw.json", '{"instruction": "a"}\n{')),
        "results in a file": ("out", write("out", "mine")),
    },
}


def files(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != "train_log.jsonl"}


@pytest.mark.parametrize("command, culprit, spoil, options", [
    pytest.param(command, culprit, spoil, options, id=name)
    for command, cases in CASES.items() for name, (culprit, spoil, *options) in cases.items()])
def test_bad_input(checkpoint, tmp_path, run, command, culprit, spoil, options):
    """Catches a traceback, a message that does not name the culprit, an exit code of 0 or 1, and files left
    half-written."""
    places = {"folder": tmp_path, "model": tmp_path / "model", "data": tmp_path / DATA}
    shutil.copytree(checkpoint(), places["model"])
    write_data(places["data"])
    write_benchmark(tmp_path / "bench")
    spoil(tmp_path)
    before = files(tmp_path)
    script, *options = [part.format(**places) for part in (*command, *options)]
    given = {"infer": [], "train": ["--data", places["data"], "--out", tmp_path / "out"],
             "eval": ["--data", tmp_path / "bench", "--out", tmp_path / "out"]}[script]
    code, out, err = run(script, "--model", places["model"], *given, *options)
    message = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(message) == 1 and culprit in message[0] and err == message[0] + "\n", (code, err)
    assert files(tmp_path) == before


def test_tokenizer_json_without_the_package(tmp_path, run, monkeypatch):
    """Catches an ImportError where the optional package is missing."""
    pytest.importorskip("tokenizers", reason="optional package: needed here to make the tokenizer.json")
    folder = write_checkpoint(tmp_path / "model", "llama3", "json")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    code, _, err = run("infer", "--model", folder, "--prompt", "hello")
    assert code == 2 and "tokenizer.json" in err and "pip install tokenizers" in err and err.count("\n") == 1


def test_as_scripts(tmp_path, monkeypatch, capsys):
    """Catches a script that does not go through run_script: everything else here calls main() in its place."""
    monkeypatch.chdir(tmp_path)
    data = str(write_benchmark(tmp_path))
    commands = {"train": ["--data", data], "infer": ["--prompt", "x"], "eval": ["--data", data]}
    for script, options in commands.items():
        monkeypatch.setattr(sys, "argv", [f"{script}.py", "--model", "nowhere", *options])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(ROOT / f"{script}.py"), run_name="__main__")
        err = capsys.readouterr().err
        assert stop.value.code == 2 and err.startswith("error: nowhere/config.json") and err.count("\n") == 1, err


def test_bugs_keep_their_traceback(checkpoint, run, monkeypatch):
    """Catches a handler so wide that it turns our own mistakes into user errors."""
    monkeypatch.setattr("infer.read_prompts", lambda args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run("infer", "--model", checkpoint(), "--prompt", "hello")
