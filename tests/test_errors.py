"""Bad input: one line on stderr that names the culprit and says what to do, exit code 2, nothing written.

Each row of the tables below is a case: what is wrong; what the message must name; then the changes that
make a good folder bad, such as remove(CONFIG), and the options to add to the command.
"""
import io
import json
import os
import runpy
import shutil
import sys
import types

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import ROOT, write_benchmark, write_checkpoint, write_data

# the good folder: a plain checkpoint, training data, and XNLI in English and Swahili with five items each
CONFIG, WEIGHTS, CONNECTION = "model/config.json", "model/model.safetensors", "model/cctuning.safetensors"
TOKENIZER, GENERATION = "model/tokenizer.model", "model/generation_config.json"
DATA, PROMPTS, GOLDS = "data.jsonl", "bench/XNLI/split_sample", "bench/XNLI/ans_sample"
GOOD = {"instruction": "Nini?", "output": "Jibu", "instruction_en": "What?", "lang": "sw"}
LINE = json.dumps(GOOD)


# ---------------------------------------------------------- changes: each function returns change(folder)

def remove(name):
    """The file or folder is not there."""
    def change(folder):
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return change


def write(name, content):
    content = content if isinstance(content, bytes) else content.encode()
    return lambda folder: (folder / name).write_bytes(content)


def lines(*samples):
    """These samples, or texts, as the lines of the training data."""
    texts = [sample if isinstance(sample, str) else json.dumps(sample) for sample in samples]
    return write(DATA, "\n".join(texts))


def copy(name, to):
    return lambda folder: shutil.copytree(folder / name, folder / to)


def make_a_folder(name):
    """A folder in place of the file."""
    def change(folder):
        remove(name)(folder)
        (folder / name).mkdir()
    return change


def make_a_pipe(name):
    """In the place of a file."""
    def change(folder):
        (folder / name).unlink()
        os.mkfifo(folder / name)
    return change


def link_to_nowhere(name):
    """A link whose target is gone, in place of the file."""
    def change(folder):
        remove(name)(folder)
        (folder / name).symlink_to("gone")
    return change


def replace(name, old, new):
    """Other bytes in a file, where `old` stands first."""
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes().replace(old, new, 1))


def cut(name, share):
    """Only the first share (0 to 1) of a file."""
    def change(folder):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:int(len(content) * share)])
    return change


def flip(name, at):
    """One byte of a file inverted."""
    def change(folder):
        content = bytearray((folder / name).read_bytes())
        content[at] ^= 0xFF
        (folder / name).write_bytes(content)
    return change


def merged(old, new):
    return {key: value for key, value in {**old, **new}.items() if value is not None}


def config(**values):
    """Other values in config.json; a key with None goes."""
    def change(folder):
        old = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(merged(old, values)))
    return change


def weights(values):
    """Other tensors; a name with None goes."""
    return lambda folder: save_file(merged(load_file(folder / WEIGHTS), values), folder / WEIGHTS)


def shards(values):
    """The weights in a.safetensors and b.safetensors, with these changes to the index's {tensor: file}."""
    def change(folder):
        tensors = load_file(folder / WEIGHTS)
        (folder / WEIGHTS).unlink()
        names = sorted(tensors)
        file_of = {name: "a.safetensors" if i < 9 else "b.safetensors" for i, name in enumerate(names)}
        for file in ("a.safetensors", "b.safetensors"):
            part = {name: tensors[name] for name in names if file_of[name] == file}
            save_file(part, folder / "model" / file)
        index = {"weight_map": merged(file_of, values)}
        (folder / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    return change


def connection(values=None):
    """A Decision Maker and a matrix beside the weights, with these changes; a name with None goes."""
    good = {"decision_maker.weight": torch.zeros(4, 48), "transform_matrix": torch.zeros(48, 48)}
    return lambda folder: save_file(merged(good, values or {}), folder / CONNECTION)


# ---------------------------------------------------------------------------------------------- the cases

CHECKPOINTS = [  # a prompt is asked of each
    ("no folder", "config.json", remove("model")),
    ("no config", "config.json", remove(CONFIG)),
    ("config is no JSON", "config.json", write(CONFIG, '{"model_type": ')),
    ("config is a list", "config.json", write(CONFIG, "[1, 2]")),
    ("config with a key twice", "twice", replace(CONFIG, b"{", b'{"vocab_size": 1, ')),
    ("config without a size", "config.json: hidden_size", config(hidden_size=None)),
    ("config with a text for a size", "num_hidden_layers", config(num_hidden_layers="four")),
    ("heads that do not fit", "key/value heads", config(num_key_value_heads=3)),
    ("rope without its factor", "factor", config(rope_scaling={"rope_type": "linear"})),
    ("quantised", "quantization_config", config(quantization_config={"bits": 4})),
    ("another activation", "hidden_act 'gelu'", config(hidden_act="gelu")),
    ("FFN bias", "mlp_bias", config(mlp_bias=True)),
    ("another family", "model_type 'gemma2' (scaled embeddings", config(model_type="gemma2")),
    ("layers of another kind", "linear_attention", config(layer_types=["linear_attention"] * 4)),
    ("a size beyond all bounds", "hidden_size", config(hidden_size=10 ** 12)),
    ("a million layers", "num_hidden_layers is 1000000", config(num_hidden_layers=10 ** 6)),
    ("a width of two billion", "hidden_size is 2147483640", config(hidden_size=2147483640)),
    ("heads wider than any model", "key/value heads", config(head_dim=2 ** 19)),
    ("config is a pipe", "config.json: not a regular file", make_a_pipe(CONFIG)),
    ("a rope_theta beyond all bounds", "rope_theta", config(rope_theta=10 ** 400)),
    ("an EOS that is a text", "eos_token_id", config(eos_token_id="</s>")),
    ("an EOS that is a list of lists", "generation_config.json: eos_token_id", write(
        GENERATION, '{"eos_token_id": [[2]]}')),
    ("a tied head that is a text", "tie_word_embeddings", config(tie_word_embeddings="false")),
    ("a saved template that is none", "template", config(cctuning={"template": ["a"]})),
    ("a saved layer that there is none of", "cctuning", config(cctuning={"source_layer": 4})),
    ("saved languages that are no list", "cctuning", config(cctuning={"languages": 5})),

    ("no weights", "no model.safetensors", remove(WEIGHTS)),
    ("empty weights", "model.safetensors", write(WEIGHTS, "")),
    *((f"weights cut at {tenth}/10", "model.safetensors: damaged", cut(WEIGHTS, tenth / 10))
      for tenth in range(1, 10)),
    *((f"weights with byte {at} of the header flipped", "model.safetensors", flip(WEIGHTS, at))
      for at in (0, 3, 7, 8, 9, 40, 200)),
    ("weights that declare more than there is", "model.safetensors: damaged", write(
        WEIGHTS, b"\xff" * 6 + b"\0\0{}")),
    ("weights with a tensor beyond the file", "model.safetensors", replace(
        WEIGHTS, b'"data_offsets":[0,', b'"data_offsets":[9,')),
    ("weights linked to nowhere", "model", link_to_nowhere(WEIGHTS)),
    ("weights are a folder", "model.safetensors", make_a_folder(WEIGHTS)),
    ("a shard linked to nowhere", "a.safetensors: not found", shards({}),
     link_to_nowhere("model/a.safetensors")),
    ("a shard missing", "c.safetensors: not found", shards({"model.norm.weight": "c.safetensors"})),
    ("a tensor in another shard", "a.safetensors", shards({"model.norm.weight": "a.safetensors"})),
    ("an index without a tensor", "model.norm.weight", shards({"model.norm.weight": None})),
    ("an index that leads out of the folder", "index.json", shards(
        {"model.norm.weight": "../x.safetensors"})),
    ("a tensor of another shape", "model.norm.weight has shape (47,)", weights(
        {"model.norm.weight": torch.zeros(47)})),
    ("a tensor missing", "lm_head.weight", weights({"lm_head.weight": None})),
    ("a tensor too many", "q_proj.bias", weights(
        {"model.layers.0.self_attn.q_proj.bias": torch.zeros(48)})),
    ("a quantised tensor", "I8", weights({"model.norm.weight": torch.zeros(48, dtype=torch.int8)})),

    ("no tokenizer", "no tokenizer.model", remove(TOKENIZER)),
    ("tokenizer.model is none", "tokenizer.model", write(TOKENIZER, "what is this")),
    ("tokenizer.json is none", "tokenizer.json", remove(TOKENIZER), write("model/tokenizer.json", "{}")),
    ("a tokenizer larger than the embedding", "tokenizer.model", config(vocab_size=300), weights(
        {name: torch.zeros(300, 48) for name in ("lm_head.weight", "model.embed_tokens.weight")})),
    ("added tokens of another shape", "tokenizer.model", write(
        "model/tokenizer_config.json", '{"added_tokens_decoder": ["a"]}')),
    ("an added token beyond the embedding", "601 tokens", write(
        "model/tokenizer_config.json",
        '{"added_tokens_decoder": {"600": {"content": "<x>", "special": true}}}')),
    ("[INST] in chat_template.jinja", "--template", write(
        "model/chat_template.jinja", "[INST] {{ x }} [/INST]")),
    ("a template without its control tokens", "<|start_header_id|>", "--template=llama3"),

    ("a matrix of another model", "cctuning.safetensors: transform_matrix", connection(
        {"transform_matrix": torch.zeros(40, 40)})),
    ("a Decision Maker of another model", "decision_maker.weight", connection(
        {"decision_maker.weight": torch.zeros(5, 48)})),
    ("an unknown tensor beside them", "other", connection({"other": torch.zeros(1)})),
    ("a connection cut short", "cctuning.safetensors: damaged", connection(), cut(CONNECTION, 0.5)),
    ("arguments that are none", "cctuning is malformed", config(cctuning={"arguments": 5})),
    ("a matrix without its Decision Maker", "lacks", connection({"decision_maker.weight": None})),
    ("matrix asked of a plain model", "no Transform Matrix", "--connection=matrix"),
    ("english asked of a plain model", "no trained Decision Maker", "--connection=english", "--prompt_en=hi"),
]
QUESTIONS = [  # infer.py --prompt=hello
    ("english without an English version", "--prompt", connection(), "--connection=english"),
    ("an English version that is not used", "--prompt_en", "--prompt_en=hi"),
    ("an English version too long", "--prompt", connection(), "--connection=english",
     "--prompt_en=" + "neno " * 300),
    ("output without input", "--output", "--output=x.jsonl"),
    ("two kinds of prompt", "--prompt", "--input={data}"),
    ("a prompt too long", "--prompt", "--prompt=" + "neno " * 300),
    ("a prompt of 100,000 characters", "--prompt", "--prompt=" + "x y" * 33334),
    ("an empty prompt", "--prompt", "--prompt= "),
]
INPUT = [  # infer.py --input={data}
    ("input missing", "data.jsonl", remove(DATA)),
    ("input without instruction", 'data.jsonl:2: "instruction"', lines(
        {"instruction": "a"}, {"prompt": "b"})),
    ("a blank English version", "data.jsonl:1", connection(), lines({**GOOD, "instruction_en": " "}),
     "--connection=english"),
    ("no English version", "data.jsonl:2", connection(), lines(GOOD, {"instruction": "Nini?"}),
     "--connection=english"),
    ("a number for a language", 'data.jsonl:1: "lang"', lines({**GOOD, "lang": 7})),
    ("a number for an input", 'data.jsonl:1: "input"', lines({**GOOD, "input": 7})),
    ("a line too long", "data.jsonl:2", lines(GOOD, {"instruction": "neno " * 300})),
    ("an English version for a whole file", "--prompt_en", "--prompt_en=hi"),
    ("output is the input", "data.jsonl", "--output={data}"),
    ("output is a folder", "model", "--output={model}"),
    ("output in a folder that is a file", "data.jsonl", "--output={data}/x/answers.jsonl"),
]
EMBEDDED = [  # infer.py alone
    ("a language that no embedded question is in", "--lang", "--lang=yo"),
]
SAMPLES = [  # train.py on lines that are wrong
    ("data missing", "data.jsonl", remove(DATA)),
    ("data is a folder", "data.jsonl", make_a_folder(DATA)),
    ("data linked to nowhere", "data.jsonl", link_to_nowhere(DATA)),
    ("data empty", "data.jsonl", lines("")),
    ("data an empty list", "data.jsonl", lines("[]")),
    ("data not UTF-8", "data.jsonl:2", write(DATA, LINE.encode() + b'\n{"instruction": "\xff"}')),
    ("data with a broken line", "data.jsonl:3", lines(GOOD, GOOD, '{"instruction": "x')),
    ("data with a broken list", "data.jsonl:4", lines("[", LINE + ",", LINE, LINE + "]")),
    ("data with an unfinished list", "data.jsonl", lines("[", LINE + ",", LINE)),
    ("data with text after the list", "data.jsonl", lines("[", LINE + "]", "more")),
    ("data with a key twice", "data.jsonl:2", lines(GOOD, '{"instruction": "a", ' + LINE[1:])),
    ("data with a number for a line", "data.jsonl:2", lines(GOOD, "3")),
    ("data without a field", 'data.jsonl:2: "instruction_en"', lines(
        GOOD, merged(GOOD, {"instruction_en": None}))),
    ("data with an empty field", 'data.jsonl:2: "output"', lines(GOOD, {**GOOD, "output": " "})),
    ("data with a prompt of only spaces", 'data.jsonl:1: "instruction"', lines(
        {**GOOD, "instruction": "\u3000 "})),
    ("data with a list for a text", 'data.jsonl:1: "instruction"', lines({**GOOD, "instruction": ["a"]})),
    ("data with a number for a language", 'data.jsonl:1: "lang"', lines({**GOOD, "lang": 7})),
    ("data with half a character", 'data.jsonl:1: "output"', lines({**GOOD, "output": "\ud83d"})),
    ("data with prompts of 100,000 characters", "--max_length", lines(
        {**GOOD, "instruction": "x y" * 33334})),
    ("data all English", "data.jsonl", lines({**GOOD, "instruction": "What?"})),
    ("data as CSV", "looks like CSV", write(DATA, "instruction,output\r\nNini?,Jibu\r\n")),
    ("data as Parquet", "a Parquet file", write(DATA, b"PAR1\x15\x04\xff")),
    ("data of dialogues", "data.jsonl:1: has", lines({"messages": [{"role": "user", "content": "Nini?"}]})),
    ("data of Aya", "data/README.md has a converter", lines({"inputs": "Nini?", "targets": "Jibu"})),
    ("validation data broken", "dev.jsonl:1", write("dev.jsonl", "{"), "--eval_data={folder}/dev.jsonl"),
]
TRAINING = [  # train.py
    ("another rope type", "rope type 'yarn'", config(rope_scaling={"rope_type": "yarn", "factor": 4.0})),
    ("no room for any sample", "--max_length", "--max_length=4"),
    ("--max_length beyond the model", "256", "--max_length=300"),
    ("--source_layer beyond the model", "--source_layer", "--source_layer=4"),
    ("a learning rate that diverges", "--lr", lines(*[GOOD] * 8), "--lr=1e18", "--batch_size=1"),
    ("only a matrix, of a plain model", "no trained Decision Maker", "--epochs=0"),
    ("an option without a use in plain fine-tuning", "--source_layer", "--method=sft", "--source_layer=0"),
    ("plain fine-tuning without an epoch", "--epochs 0", "--method=sft", "--epochs=0"),
    ("--out is a file", "out", write("out", "mine")),
    ("--out in a file", "data.jsonl", "--out={data}/out"),
    ("--out is the model", "--model", "--out={model}"),
]
EVALUATION = [  # eval.py
    ("no room for prompts", "--max_new_tokens", "--max_new_tokens=300"),
    ("a second model that is none", "nowhere/config.json", "--model", "{model}", "{folder}/nowhere"),
    ("a second model without weights", "second: no model.safetensors", copy("model", "second"),
     remove("second/model.safetensors"), "--model", "{model}", "{folder}/second"),
    ("a model named twice", "--model", "--model", "{model}", "{model}"),
    ("an unknown task", "'XYZ'", "--tasks=XYZ"),
    ("a task named twice", "XNLI is named twice", "--tasks=XNLI,XNLI"),
    ("a language named twice", "sw is named twice", "--langs=sw,en,sw"),
    ("a task without prompts", "split_sample", remove(f"{PROMPTS}/en.json"), remove(f"{PROMPTS}/sw.json")),
    ("nothing to score again", "answers", "--rescore"),
    ("no task there", "bench", remove("bench/XNLI")),
    ("a task without gold", "XNLI", remove(GOLDS)),
    ("a language without gold", "sw.json", remove(f"{GOLDS}/sw.json")),
    ("a language that the task lacks", "'yo'", "--langs=en,yo"),
    ("fewer golds than prompts", "ans_sample/sw.json", write(f"{GOLDS}/sw.json", '"1"\n"2"')),
    ("fewer English prompts than prompts", "en.json", write(f"{PROMPTS}/en.json", '{"instruction": "a"}'),
     "--langs=sw"),
    ("a gold that is no option", "sw.json:2", write(f"{GOLDS}/sw.json", '"1"\n"7"\n"1"\n"1"\n"1"')),
    ("a gold of several options in one", "sw.json:1", write(f"{GOLDS}/sw.json", '"12"\n"1"\n"1"\n"1"\n"1"')),
    ("a gold that is a number", "sw.json:2", write(f"{GOLDS}/sw.json", '"1"\n1\n"1"\n"1"\n"1"')),
    ("a gold of none", "sw.json:3", write(f"{GOLDS}/sw.json", '"1"\n"1"\n[]\n"1"\n"1"')),
    ("a broken prompt", "sw.json:2", write(f"{PROMPTS}/sw.json", '{"instruction": "a"}\n{')),
    ("english without an English version", "sw.json:1", connection(), remove(f"{PROMPTS}/en.json"),
     "--connection=english"),
    ("results in a file", "out", write("out", "mine")),
]
COMMANDS = [  # the cases that each command is tried on
    (["infer", "--prompt=hello", "--max_new_tokens=2"], CHECKPOINTS + QUESTIONS),
    (["infer", "--input={data}", "--max_new_tokens=2"], INPUT),
    (["infer"], EMBEDDED),
    (["train", "--data={data}", "--out={folder}/out"], SAMPLES + TRAINING),
    (["eval", "--data={folder}/bench", "--out={folder}/out", "--max_new_tokens=2"], EVALUATION),
]


@pytest.mark.parametrize("script, option", [("train", "--model"), ("train", "--data"), ("train", "--eval_data"),
                                            ("train", "--out"), ("infer", "--model"), ("infer", "--input"),
                                            ("infer", "--output"), ("eval", "--model"), ("eval", "--data"),
                                            ("eval", "--out"), ("eval", "--plot")])
def test_empty_paths(run, script, option):
    """Catches an empty path (of a shell variable that is not set) taken for an option that is not given: a model
    saved without training, the embedded default instead of the user's."""
    code, _, err = run(script, option, "")
    assert code == 2 and f"argument {option}: is empty" in err


def files(folder):
    """{path: content}; a run may have begun its folder before it fails."""
    begun = ("train_log.jsonl", "run.json", ".lock")
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name not in begun]
    return {path: path.read_bytes() for path in paths}


@pytest.mark.parametrize("command, culprit, how", [
    pytest.param(command, culprit, how, id=f"{command[0]}: {name}")
    for command, cases in COMMANDS for name, culprit, *how in cases])
def test_bad_input(checkpoint, tmp_path, run, command, culprit, how):
    """Catches a traceback, a message that does not name the culprit, an exit code of 0 or 1, and files
    left half-written."""
    places = {"folder": tmp_path, "model": tmp_path / "model", "data": tmp_path / DATA}
    shutil.copytree(checkpoint(), places["model"])
    write_data(places["data"])
    write_benchmark(tmp_path / "bench")
    for change in how:
        if not isinstance(change, str):
            change(tmp_path)
    before = files(tmp_path)
    options = [part for part in how if isinstance(part, str)]
    script, *options = [part.format(**places) for part in command + options]
    code, out, err = run(script, "--model", places["model"], *options)
    message = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(message) == 1 and culprit in message[0] and err == message[0] + "\n", (code, err)
    assert files(tmp_path) == before


@pytest.mark.parametrize("script, option", [
    ("infer", "--batch_size=0"), ("infer", "--max_new_tokens=0"), ("infer", "--temperature=-1"),
    ("infer", "--top_p=x"), ("infer", "--seed=-1"), ("infer", "--connection=some"), ("infer", "--dtype=int8"),
    ("infer", "--template=none"), ("eval", "--limit=0"), ("eval", "--batch_size=0"),
    ("eval", "--connection=all"), ("eval", f"--limit={2 ** 63}"), ("train", "--lr=-1"),
    ("train", "--batch_size=0"), ("train", "--epochs=-1"), ("train", "--method=dpo"),
])
def test_options_out_of_range(run, script, option):
    """Catches a value that is taken where it makes no sense."""
    code, _, err = run(script, option)
    message = f"{script}.py: error: argument {option.split('=')[0]}: "
    assert code == 2 and err.splitlines()[-1].startswith(message), err


@pytest.mark.parametrize("given, culprit", [
    (b"", "standard input: is empty"), (b"Nini?\n\xff", "standard input: not UTF-8"),
    (b" \r\n\n", "standard input: is empty"), (b"x\n\n" + b"neno " * 300, "standard input:3")],
    ids=["nothing", "not UTF-8", "empty lines", "a long line"])
def test_bad_standard_input(checkpoint, run, monkeypatch, given, culprit):
    """Catches an answer to nothing, and a message without the line."""
    monkeypatch.setattr("sys.stdin", types.SimpleNamespace(buffer=io.BytesIO(given)))
    code, out, err = run("infer", "--model", checkpoint(), "--prompt=-", "--max_new_tokens=2")
    assert code == 2 and not out and err.startswith(f"error: {culprit}") and err.count("\n") == 1, err


def test_figures_without_the_package(checkpoint, tmp_path, run, monkeypatch):
    """Catches an evaluation that is lost at its end because matplotlib is missing."""
    data = write_benchmark(tmp_path / "bench")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, _, err = run("eval", "--model", checkpoint(), "--data", data, "--out", tmp_path / "out",
                       "--plot", tmp_path)
    assert code == 2 and "pip install matplotlib" in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_tokenizer_json_without_the_package(tmp_path, run, monkeypatch):
    """Catches an ImportError where the optional package is missing."""
    pytest.importorskip("tokenizers", reason="optional package: needed here to make the tokenizer.json")
    folder = write_checkpoint(tmp_path / "model", "llama3", "json")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    code, _, err = run("infer", "--model", folder, "--prompt", "hello")
    assert code == 2 and "tokenizer.json" in err and "pip install tokenizers" in err and err.count("\n") == 1


def test_as_scripts(tmp_path, monkeypatch, capsys):
    """Catches a script that does not go through run_script: everything else here calls main() in its
    place."""
    monkeypatch.chdir(tmp_path)
    data = str(write_benchmark(tmp_path))
    commands = {"train": ["--data", data], "infer": ["--prompt", "x"], "eval": ["--data", data]}
    for script, options in commands.items():
        monkeypatch.setattr(sys, "argv", [f"{script}.py", "--model", "nowhere", *options])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(ROOT / f"{script}.py"), run_name="__main__")
        err = capsys.readouterr().err
        assert stop.value.code == 2 and err.count("\n") == 1, err
        assert err.startswith("error: nowhere/config.json")


def test_bugs_keep_their_traceback(checkpoint, run, monkeypatch):
    """Catches a handler so wide that it turns our own mistakes into user errors."""
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run("infer", "--model", checkpoint(), "--prompt", "hello")
