"""Bad input: one line on stderr that names the culprit and says what to do, exit code 2, nothing written."""
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import write_checkpoint, write_data
from test_eval import write_benchmark

GOOD = {"instruction": "Nini?", "output": "Jibu", "instruction_en": "What?", "lang": "sw"}


class Place:
    """A good checkpoint, data file and benchmark in a folder of their own, to be spoilt."""

    def __init__(self, folder, checkpoint):
        self.folder, self.model, self.out = folder, folder / "model", folder / "out"
        shutil.copytree(checkpoint, self.model)
        self.data, self.bench = write_data(folder / "data.jsonl"), write_benchmark(folder / "bench")

    def config(self, **changes):
        raw = {**json.loads((self.model / "config.json").read_text()), **changes}
        (self.model / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if v != "absent"}))

    def tensors(self, change):
        weights = load_file(self.model / "model.safetensors")
        change(weights)
        save_file(weights, self.model / "model.safetensors")

    def cut(self, name, keep):
        data = (self.model / name).read_bytes()
        (self.model / name).write_bytes(data[:int(len(data) * keep)])

    def header(self, change):
        path = self.model / "model.safetensors"
        path.write_bytes(change(path.read_bytes()))

    def flip(self, at):
        self.header(lambda h: h[:at] + bytes([h[at] ^ 0xFF]) + h[at + 1:])

    def index(self, change):
        weights = load_file(self.model / "model.safetensors")
        (self.model / "model.safetensors").unlink()
        names = sorted(weights)
        save_file({n: weights[n] for n in names[:9]}, self.model / "a.safetensors")
        save_file({n: weights[n] for n in names[9:]}, self.model / "b.safetensors")
        weight_map = {n: "a.safetensors" if i < 9 else "b.safetensors" for i, n in enumerate(names)}
        change(weight_map)
        (self.model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    def connection(self, **tensors):
        save_file({"decision_maker.weight": torch.zeros(4, 48), "transform_matrix": torch.zeros(48, 48), **tensors}, self.model / "cctuning.safetensors")

    def lines(self, *lines):
        self.data.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))


def write(name, text):
    return lambda p: (p.model / name).write_bytes(text if isinstance(text, bytes) else text.encode())


nothing = lambda p: None
INFER, TRAIN, EVAL = ("infer", "--prompt=hello", "--max_new_tokens=2"), ("train",), ("eval", "--max_new_tokens=2")
FILE = ("infer", "--input={data}", "--max_new_tokens=2")
CASES = {
    # the checkpoint
    "no folder": (lambda p: shutil.rmtree(p.model), INFER, "config.json"),
    "no config": (lambda p: (p.model / "config.json").unlink(), INFER, "config.json"),
    "config is no JSON": (write("config.json", '{"model_type": '), INFER, "config.json"),
    "config is a list": (write("config.json", "[1, 2]"), INFER, "config.json"),
    "config without a size": (lambda p: p.config(hidden_size="absent"), INFER, "config.json: hidden_size"),
    "config with a text for a size": (lambda p: p.config(num_hidden_layers="four"), INFER, "num_hidden_layers"),
    "heads that do not fit": (lambda p: p.config(num_key_value_heads=3), INFER, "key/value heads"),
    "another model_type": (lambda p: p.config(model_type="gemma2"), TRAIN, "model_type 'gemma2'"),
    "another rope type": (lambda p: p.config(rope_scaling={"rope_type": "yarn", "factor": 4.0}), TRAIN, "rope type 'yarn'"),
    "rope without its factor": (lambda p: p.config(rope_scaling={"rope_type": "linear"}), INFER, "factor"),
    "quantised": (lambda p: p.config(quantization_config={"bits": 4}), INFER, "quantization_config"),
    "another activation": (lambda p: p.config(hidden_act="gelu"), INFER, "hidden_act 'gelu'"),
    "attention bias": (lambda p: p.config(attention_bias=True), INFER, "attention_bias"),
    "a size beyond all bounds": (lambda p: p.config(hidden_size=10 ** 12), INFER, "hidden_size"),
    "a rope_theta beyond all bounds": (lambda p: p.config(rope_theta=10 ** 400), INFER, "rope_theta"),
    "an EOS that is a text": (lambda p: p.config(eos_token_id="</s>"), INFER, "eos_token_id"),
    "an EOS that is a list of lists": (write("generation_config.json", '{"eos_token_id": [[2]]}'), INFER, "generation_config.json: eos_token_id"),
    "a tied head that is a text": (lambda p: p.config(tie_word_embeddings="false"), INFER, "tie_word_embeddings"),
    "a saved template that is none": (lambda p: p.config(cctuning={"template": ["a"]}), INFER, "template"),
    "a layer that there is none of": (lambda p: p.config(cctuning={"layer": 4}), INFER, "cctuning"),
    "--layer beyond the model": (nothing, (*TRAIN, "--layer=4"), "--layer"),
    "languages that are no list": (lambda p: p.config(cctuning={"languages": 5}), INFER, "cctuning"),
    "added tokens of another shape": (write("tokenizer_config.json", '{"added_tokens_decoder": ["a"]}'), INFER, "tokenizer.model"),
    "an added token beyond the embedding": (write("tokenizer_config.json", '{"added_tokens_decoder": {"600": {"content": "<x>", "special": true}}}'), INFER, "601 tokens"),
    "[INST] in chat_template.jinja": (write("chat_template.jinja", "[INST] {{ x }} [/INST]"), INFER, "--template"),
    "no weights": (lambda p: (p.model / "model.safetensors").unlink(), INFER, "no model.safetensors"),
    "empty weights": (write("model.safetensors", b""), INFER, "model.safetensors"),
    **{f"weights cut at {tenth}/10": (lambda p, tenth=tenth: p.cut("model.safetensors", tenth / 10), INFER, "model.safetensors: damaged") for tenth in range(1, 10)},
    **{f"weights with byte {at} of the header flipped": (lambda p, at=at: p.flip(at), INFER, "model.safetensors") for at in (0, 3, 7, 8, 9, 40, 200)},
    "weights whose header declares more than there is": (lambda p: p.header(lambda h: b"\xff" * 6 + b"\0\0" + h[8:]), INFER, "model.safetensors: damaged"),
    "weights with a tensor beyond the file": (lambda p: p.header(lambda h: h.replace(b'"data_offsets":[0,', b'"data_offsets":[9,', 1)), INFER, "model.safetensors"),
    "weights linked to nowhere": (lambda p: ((p.model / "model.safetensors").unlink(), (p.model / "model.safetensors").symlink_to("gone")), INFER, "model"),
    "an index linked to nowhere": (lambda p: (p.index(lambda m: None), (p.model / "a.safetensors").unlink(),
                                              (p.model / "a.safetensors").symlink_to("gone")), INFER, "a.safetensors: not found"),
    "config with a key twice": (lambda p: (p.model / "config.json").write_text('{"vocab_size": 1, ' + (p.model / "config.json").read_text()[1:]), INFER, "twice"),
    "weights are a folder": (lambda p: ((p.model / "model.safetensors").unlink(), (p.model / "model.safetensors").mkdir()), INFER, "model.safetensors"),
    "index names a missing shard": (lambda p: p.index(lambda m: m.update({"model.norm.weight": "c.safetensors"})), INFER, "c.safetensors: not found"),
    "index names a tensor its shard lacks": (lambda p: p.index(lambda m: m.update({"model.norm.weight": "a.safetensors"})), INFER, "a.safetensors"),
    "index leaves a tensor out": (lambda p: p.index(lambda m: m.pop("model.norm.weight")), INFER, "model.norm.weight"),
    "index leads out of the folder": (lambda p: p.index(lambda m: m.update({"model.norm.weight": "../x.safetensors"})), INFER, "index.json"),
    "a tensor of the wrong shape": (lambda p: p.tensors(lambda w: w.update({"model.norm.weight": torch.zeros(47)})), INFER, "model.norm.weight has shape (47,)"),
    "a tensor missing": (lambda p: p.tensors(lambda w: w.pop("lm_head.weight")), INFER, "lm_head.weight"),
    "a tensor too many": (lambda p: p.tensors(lambda w: w.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(48)})), INFER, "q_proj.bias"),
    "a quantised tensor": (lambda p: p.tensors(lambda w: w.update({"model.norm.weight": torch.zeros(48, dtype=torch.int8)})), INFER, "I8"),
    "no tokenizer": (lambda p: (p.model / "tokenizer.model").unlink(), INFER, "no tokenizer.model"),
    "tokenizer.model is none": (write("tokenizer.model", b"what is this"), INFER, "tokenizer.model"),
    "tokenizer.json is none": (lambda p: ((p.model / "tokenizer.model").unlink(), write("tokenizer.json", "{}")(p)), INFER, "tokenizer.json"),
    "a tokenizer larger than the embedding": (lambda p: (p.config(vocab_size=300), p.tensors(lambda w: w.update(
        {k: w[k][:300].clone() for k in ("lm_head.weight", "model.embed_tokens.weight")}))), INFER, "tokenizer.model"),
    "a template without its control tokens": (nothing, (*INFER, "--template=llama3"), "<|start_header_id|>"),
    # what CC-Tuning added
    "a matrix of another model": (lambda p: p.connection(transform_matrix=torch.zeros(40, 40)), INFER, "cctuning.safetensors: transform_matrix"),
    "a Decision Maker of another model": (lambda p: p.connection(**{"decision_maker.weight": torch.zeros(5, 48)}), INFER, "decision_maker.weight"),
    "an unknown tensor beside them": (lambda p: p.connection(other=torch.zeros(1)), INFER, "other"),
    "matrices cut short": (lambda p: (p.connection(), p.cut("cctuning.safetensors", 0.5)), INFER, "cctuning.safetensors: damaged"),
    "matrix asked of a plain model": (nothing, (*INFER, "--connection=matrix"), "no Transform Matrix"),
    "english asked of a plain model": (nothing, (*INFER, "--connection=english", "--prompt_en=hi"), "no Decision Maker"),
    "english without an English version": (lambda p: p.connection(), (*INFER, "--connection=english"), "--prompt"),
    "no matrix of any language": (lambda p: p.connection(), (*INFER, "--matrix=per_language", "--lang=sw"), "--per_language"),
    "a blank English version": (lambda p: (p.connection(), p.lines(dict(GOOD, instruction_en=" "))), (*FILE, "--connection=english"), "data.jsonl:1"),
    "a matrix without its Decision Maker": (lambda p: save_file({"transform_matrix": torch.zeros(48, 48)}, p.model / "cctuning.safetensors"), INFER, "lacks"),
    "a language's matrix without the shared one": (lambda p: save_file({"decision_maker.weight": torch.zeros(4, 48), "transform_matrix.sw": torch.zeros(48, 48)},
                                                                       p.model / "cctuning.safetensors"), INFER, "lacks"),
    # prompts
    "an unknown language": (nothing, (*INFER, "--lang=xx"), "'xx'"),
    "a prompt too long": (nothing, ("infer", "--prompt=" + "neno " * 300), "--prompt"),
    "a prompt of 100,000 characters": (nothing, ("infer", "--prompt=" + "x y" * 33334), "--prompt"),
    "an empty prompt": (nothing, ("infer", "--prompt= "), "--prompt"),
    "two kinds of prompt": (nothing, ("infer", "--prompt=x", "--input=y"), "--prompt"),
    "a language that no embedded question is in": (nothing, ("infer", "--lang=yo"), "--lang"),
    "output without input": (nothing, (*INFER, "--output=x.jsonl"), "--output"),
    "output is the input": (nothing, (*FILE, "--output={data}"), "data.jsonl"),
    "output in a folder that is a file": (nothing, (*FILE, "--output={data}/x/answers.jsonl"), "data.jsonl"),
    "input missing": (lambda p: p.data.unlink(), FILE, "data.jsonl"),
    "input without instruction": (lambda p: p.lines({"instruction": "a"}, {"prompt": "b"}), FILE, "data.jsonl:2"),
    "an English version of a whole file": (nothing, (*FILE, "--prompt_en=hi"), "--prompt_en"),
    # training data
    "data missing": (lambda p: p.data.unlink(), TRAIN, "data.jsonl"),
    "data is a folder": (lambda p: (p.data.unlink(), p.data.mkdir()), TRAIN, "data.jsonl"),
    "data empty": (lambda p: p.lines(""), TRAIN, "data.jsonl"),
    "data an empty list": (lambda p: p.lines("[]"), TRAIN, "data.jsonl"),
    "data with a broken line": (lambda p: p.lines(GOOD, GOOD, '{"instruction": "x'), TRAIN, "data.jsonl:3"),
    "data with a broken list": (lambda p: p.lines("[", json.dumps(GOOD) + ",", json.dumps(GOOD), json.dumps(GOOD) + "]"), TRAIN, "data.jsonl:4"),
    "data with an unfinished list": (lambda p: p.lines("[", json.dumps(GOOD) + ",", json.dumps(GOOD)), TRAIN, "data.jsonl"),
    "data with text after the list": (lambda p: p.lines("[", json.dumps(GOOD) + "]", "more"), TRAIN, "data.jsonl"),
    "data with a key twice": (lambda p: p.lines(GOOD, '{"instruction": "a", ' + json.dumps(GOOD)[1:]), TRAIN, "data.jsonl:2"),
    "data with a prompt of only spaces": (lambda p: p.lines(dict(GOOD, instruction="\u3000 ")), TRAIN, 'data.jsonl:1: "instruction"'),
    "data linked to nowhere": (lambda p: (p.data.unlink(), p.data.symlink_to("gone")), TRAIN, "data.jsonl"),
    "data with prompts of 100,000 characters": (lambda p: p.lines(dict(GOOD, instruction="x y" * 33334)), TRAIN, "--max_length"),
    "data with a number for a line": (lambda p: p.lines(GOOD, "3"), TRAIN, "data.jsonl:2"),
    "data without a field": (lambda p: p.lines(GOOD, {k: v for k, v in GOOD.items() if k != "instruction_en"}), TRAIN, 'data.jsonl:2: "instruction_en"'),
    "data with an empty field": (lambda p: p.lines(GOOD, dict(GOOD, output=" ")), TRAIN, 'data.jsonl:2: "output"'),
    "data with a list for a text": (lambda p: p.lines(dict(GOOD, instruction=["a"])), TRAIN, 'data.jsonl:1: "instruction"'),
    "data with a number for a language": (lambda p: p.lines(dict(GOOD, lang=7)), TRAIN, 'data.jsonl:1: "lang"'),
    "data with half a character": (lambda p: p.lines(dict(GOOD, output="\ud83d")), TRAIN, 'data.jsonl:1: "output"'),
    "data not UTF-8": (lambda p: p.data.write_bytes(json.dumps(GOOD).encode() + b'\n{"instruction": "\xff"}'), TRAIN, "data.jsonl:2"),
    "data all too long": (nothing, (*TRAIN, "--max_length=4"), "--max_length"),
    "data all English": (lambda p: p.lines(dict(GOOD, instruction="What?")), TRAIN, "data.jsonl"),
    "data without languages": (lambda p: p.lines({k: v for k, v in GOOD.items() if k != "lang"}), (*TRAIN, "--per_language"), '"lang"'),
    "validation data broken": (lambda p: (p.folder / "dev.jsonl").write_text("{"), (*TRAIN, "--eval_data={folder}/dev.jsonl"), "dev.jsonl:1"),
    "--max_length beyond the model": (nothing, (*TRAIN, "--max_length=300"), "256"),
    "a learning rate that diverges": (lambda p: p.lines(*[GOOD] * 8), (*TRAIN, "--lr=1e18", "--batch_size=1"), "--lr"),
    "only a matrix, of a plain model": (nothing, (*TRAIN, "--epochs=0"), "no Decision Maker"),
    "--out is a file": (lambda p: p.out.write_text("mine"), TRAIN, "out"),
    "--out in a file": (nothing, (*TRAIN, "--out={data}/out"), "data.jsonl"),
    "--out holds a model": (nothing, (*TRAIN, "--out={model}"), "--overwrite"),
    # benchmarks
    "no room for prompts": (nothing, ("eval", "--max_new_tokens=300"), "--max_new_tokens"),
    "a second model that is none": (nothing, (*EVAL, "--model", "{model}", "{folder}/nowhere"), "nowhere/config.json"),
    "an unknown task": (nothing, (*EVAL, "--tasks=XYZ"), "'XYZ'"),
    "no task there": (lambda p: shutil.rmtree(p.bench / "XNLI"), EVAL, "bench"),
    "a task without gold": (lambda p: shutil.rmtree(p.bench / "XNLI" / "ans_sample"), EVAL, "XNLI"),
    "a language without gold": (lambda p: (p.bench / "XNLI" / "ans_sample" / "sw.json").unlink(), EVAL, "sw.json"),
    "a language that the task lacks": (nothing, (*EVAL, "--langs=en,yo"), "'yo'"),
    "fewer golds than prompts": (lambda p: (p.bench / "XNLI" / "ans_sample" / "sw.json").write_text('"1"\n"2"'), EVAL, "sw.json"),
    "a gold that is no option": (lambda p: (p.bench / "XNLI" / "ans_sample" / "sw.json").write_text('"1"\n"7"\n"1"\n"1"\n"1"'), EVAL, "sw.json:2"),
    "a broken prompt": (lambda p: (p.bench / "XNLI" / "split_sample" / "sw.json").write_text('{"instruction": "a"}\n{'), EVAL, "sw.json:2"),
    "results in a file": (lambda p: p.out.write_text("mine"), EVAL, "out"),
}


@pytest.mark.parametrize("spoil, command, culprit", CASES.values(), ids=CASES.keys())
def test_bad_input(checkpoint, tmp_path, run, spoil, command, culprit):
    """Catches a traceback, a message that does not name the culprit, an exit code of 0 or 1, and files left half-written."""
    place = Place(tmp_path, checkpoint())
    spoil(place)
    script, *flags = [part.format(**vars(place)) for part in command]
    options = {"--model": place.model}
    if script != "infer":
        options |= {"--data": place.data if script == "train" else place.bench, "--out": place.out}
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    code, out, err = run(script, *[str(x) for option in options.items() for x in option], *flags)
    message = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(message) == 1 and culprit in message[0] and err == message[0] + "\n", (code, err)
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.name != "train_log.jsonl"}
    assert after == before


def test_tokenizer_json_without_the_package(tmp_path, run, monkeypatch):
    """Catches an ImportError where the optional package is missing."""
    pytest.importorskip("tokenizers", reason="optional package: needed here to make the tokenizer.json")
    folder = write_checkpoint(tmp_path / "model", "llama3", "json")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    code, _, err = run("infer", "--model", folder, "--prompt", "hello")
    assert code == 2 and "tokenizer.json" in err and "pip install tokenizers" in err and err.count("\n") == 1


def test_from_the_shell(checkpoint, tmp_path):
    """Catches a script that does not go through run_script: everything else here calls main() in this process."""
    for script, flags in (("train", ["--data", "x"]), ("infer", ["--prompt", "x"]), ("eval", ["--data", str(write_benchmark(tmp_path))])):
        done = subprocess.run([sys.executable, Path(__file__).parent.parent / f"{script}.py", "--model", "nowhere", *flags], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 2 and done.stderr.startswith("error: nowhere/config.json") and done.stderr.count("\n") == 1, done.stderr


def test_bugs_keep_their_traceback(checkpoint, tmp_path, run, monkeypatch):
    """Catches a handler so wide that it turns our own mistakes into user errors."""
    monkeypatch.setattr("infer.read_prompts", lambda args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run("infer", "--model", checkpoint(), "--prompt", "hello")
