"""What all tests share: tiny checkpoints with real tokenizers, and ways to run the scripts on them.

    file                  what it holds
    test_cctuning.py      the method: a step worked by hand (start here), then against reference.py and a peer
    reference.py          the method once more, as plainly as possible, without any code of the project
    test_golden.py        numbers computed by transformers, in golden/: logits, losses, matrices, templates
    test_model.py         the decoder, its configuration, loading and saving weights
    test_tokenizer.py     tokenizers, chat templates, connection position
    test_train.py         train.py: data, steps, validation, the matrix fit, what is printed and saved
    test_distributed.py   several processes against one
    test_io.py            files of users: bad input, --out, saving; a kill at any point
    test_resume.py        checkpoints, signals and --resume
    test_infer.py         infer.py: decoding, sampling, batches, input and output
    test_eval.py          eval.py: parsing of answers, metrics, likelihoods, intervals, tables
    test_connected.py     the connection in transformers (data/connected.py) against infer.py's
    test_data.py          the built-in data, and data/README.md's converter
    test_pictures.py      data/plot.py and data/walkthrough.ipynb
    test_drift.py         tools/drift.py at toy size
    test_readme.py        README.md's table, options, links and recipes
    conftest.py           this file: files to test on, running the scripts, reading what they wrote
    calls.py              all calls that tests make to the model itself
    answers.json          answers of real models and the option that each names, for test_eval.py
    tools/                run by hand: drift.py (why the matrix loses), mutants.py (do the tests catch known
                          bugs?), gpu.py, benchmark.py and hookpeer.py (against transformers), miniature.py
                          (README's table), kill_and_resume.py, make_paper_files.py (for .ci/run),
                          lm_eval_task.py, real_weights.py (checkpoints too large to ship)

    python -m pytest -q                # quick tests: no package beyond the six
    python -m pytest -q -m optional    # against transformers, tokenizers and others
    python -m pytest -q -m slow        # several processes: minutes
"""
import contextlib
import functools
import importlib
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

os.environ["OMP_NUM_THREADS"] = "1"  # tiny models: threads would only wait for one another
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # exact equality holds on CPUs; tools/gpu.py is for GPUs

import numpy as np
import pytest
import sentencepiece
import torch
from safetensors.torch import load_file, save_file
from torch.optim.optimizer import register_optimizer_step_pre_hook

from model import Config, Transformer, run_script

ROOT = Path(__file__).resolve().parent.parent
TEXT = ["What is the capital of Kenya?", "Nini mji mkuu wa Kenya?", "The capital of Kenya is Nairobi.",
        "Mji mkuu wa Kenya ni Nairobi.", "two plus three makes five", "mbili na tatu ni tano",
        "Wie heißt die Hauptstadt von Kenia?", "भारत की राजधानी क्या है?", "You are a helpful assistant.",
        "user and assistant, system and helpful", "INST eot_id im_start im_end header_id"] * 4
CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 512, "hidden_size": 48,
    "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 256, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "hidden_act": "silu",
    "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "float32"}
PAIRS = [  # instruction, instruction_en, output, lang
    ("Nini mji mkuu wa Kenya?", "What is the capital of Kenya?", "Nairobi", "sw"),
    ("mbili na tatu?", "two plus three?", "five, for two and three make five and nothing else", "sw"),
    ("Wie heißt die Hauptstadt von Kenia?", "What is the capital of Kenya?", "Nairobi is the capital", "de"),
    ("भारत की राजधानी क्या है?", "What is the capital of India?", "New Delhi", "hi"),
    ("What is the capital of Kenya?", "What is the capital of Kenya?", "It is Nairobi", "en"),
    ("tatu na tatu ni ngapi, na mbili na mbili?", "three plus three?", "six", "sw")]
UNEVEN = (PAIRS * 3)[:13]  # with --batch_size 6, an epoch of steps of 6, 6 and 1
SPECIAL_TOKENS = {  # by template
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "chatml": ("<|im_start|>", "<|im_end|>"), "mistral": ("[INST]", "[/INST]"), "llama2": (), "plain": ()}


# --------------------------------------------------------------------------------- files to test on

def sentencepiece_model(path, control=(), whole=()):
    """Write a tokenizer.model. control: its control tokens.  whole: texts that are one piece each."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT), model_writer=model, model_type="bpe",
        vocab_size=400 + len(whole), hard_vocab_limit=False, byte_fallback=True,
        control_symbols=list(control), user_defined_symbols=[text.replace(" ", "\u2581") for text in whole],
        normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2)
    path.write_bytes(model.getvalue())


def tokenizer_json(folder, control=(), bos="<s>"):
    """Write a tokenizer.json. The tests that call it are marked optional."""
    pytest.importorskip("tokenizers", reason="optional package: only tokenizer.json needs it")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    tk = Tokenizer(models.BPE())
    tk.pre_tokenizer, tk.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tk.train_from_iterator(TEXT, trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<pad>", "<s>", "</s>", *control],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    tk.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": bos, "eos_token": "</s>"}))


def write_checkpoint(folder, template="plain", kind="sentencepiece", seed=0, **changes):
    """Random weights, and a tokenizer with the template's control tokens. changes: of config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    generator, weights = torch.Generator().manual_seed(seed), {}
    for name, p in Transformer(Config.read(folder)).named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        weights[name] = noise * (0.1 if p.dim() == 1 else 0.15) + (1.0 if "norm" in name else 0.0)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    if kind == "sentencepiece":
        sentencepiece_model(folder / "tokenizer.model", SPECIAL_TOKENS[template])
    else:
        tokenizer_json(folder, SPECIAL_TOKENS[template], bos=None if template == "chatml" else "<s>")
    return folder


def write_connection(folder, seed=1):
    """Add a Decision Maker and a matrix to a checkpoint: untrained, but of a size that matters."""
    generator, config = torch.Generator().manual_seed(seed), Config.read(folder)
    layers, width = config.num_hidden_layers, config.hidden_size
    save_file({"decision_maker.weight": torch.randn(layers, width, generator=generator),
               "transform_matrix": 5 * torch.randn(width, width, generator=generator)},
              folder / "cctuning.safetensors")
    return folder


def write_parrot(folder, says, **changes):
    """A checkpoint whose answers are known: attention and FFN add nothing, a token decides on the next.

    says: {how a prompt ends: a text, {text: its probability} or a list of these, in turn}.
    """
    after = {}  # {piece: {next piece: probability}}
    for ending, answer in says.items():
        pieces = answer if isinstance(answer, list) else [answer]
        for piece, following in zip([ending + "\n", *pieces], [*pieces, "</s>"], strict=True):
            chances = following if isinstance(following, dict) else {following: 1.0}
            for text in piece if isinstance(piece, dict) else [piece]:
                if text != "</s>":
                    after.setdefault(text, chances)
    width, size = 8 * (len(after) // 8 + 1), 512 + 2 * len(after)
    write_checkpoint(folder, num_hidden_layers=2, hidden_size=width, vocab_size=size, **changes)
    sentencepiece_model(folder / "tokenizer.model", whole=[t for t in after if not t.startswith("<0x")])
    sp = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    weights = load_file(folder / "model.safetensors")
    for name, weight in weights.items():
        if name.endswith(("o_proj.weight", "down_proj.weight", "embed_tokens.weight")):
            weight.zero_()
    weights["model.norm.weight"].fill_(width ** -0.5)  # undoes the norm of a vector with a single 1
    weights["lm_head.weight"].fill_(-50)
    for i, (piece, chances) in enumerate(after.items()):
        weights["model.embed_tokens.weight"][sp.piece_to_id(piece.replace(" ", "\u2581")), i] = 1
        for following, chance in chances.items():
            weights["lm_head.weight"][sp.piece_to_id(following.replace(" ", "\u2581")), i] = np.log(chance)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_data(path, pairs=PAIRS):
    """Training samples, in the schema of train.py."""
    fields = ("instruction", "instruction_en", "output", "lang")
    lines = [json.dumps(dict(zip(fields, pair, strict=True)), ensure_ascii=False) for pair in pairs]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def write_task(folder, task, lang, items, sample="_sample", english=()):
    """Prompts and golds of a task. items: [(prompt, gold)]; english: the prompts of split_en."""
    parts = {"split" + sample: [{"instruction": prompt} for prompt, _ in items],
             "ans" + sample: [gold for _, gold in items],
             f"split{sample}_en": [{"instruction": text} for text in english]}
    for part in [part for part in parts if parts[part]]:
        path = folder / "bench" / task / part / f"{lang}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in parts[part]), "utf-8")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """checkpoint(template, kind, **config changes): the folder, made once a session."""
    @functools.cache
    def make(template="plain", kind="sentencepiece", **changes):
        folder = tmp_path_factory.mktemp(template) / "model"
        return write_checkpoint(folder, template, kind, **changes)
    return make


# ------------------------------------------------------------------------------ running the scripts

def training(model, data, out, **options):
    """A command line of train.py. options: True is one without a value, False one that is not given."""
    options = {"lr": 1e-2, "epochs": 2, "batch_size": 6, "micro_batch": 6, "matrix_prompts": 40,
               "dtype": "float32", **options}
    flags = [f"--{name}" if value is True else f"--{name}={value}"
             for name, value in options.items() if value is not False]
    return ["train", "--model", model, "--data", data, "--out", out, *flags]


@pytest.fixture(scope="session")
def run():
    """run("train", *arguments): (exit code, stdout, stderr) of the script's main() in this process."""
    def call(script, *arguments):
        out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", newline="", write_through=True) for _ in range(2))
        code = 0
        with (mock.patch.object(sys, "argv", [f"{script}.py", *map(str, arguments)]),
              contextlib.redirect_stdout(out), contextlib.redirect_stderr(err)):
            try:
                run_script(importlib.import_module(script).main)
            except SystemExit as stop:
                code = stop.code or 0
        return code, *(stream.buffer.getvalue().decode() for stream in (out, err))
    return call


@pytest.fixture(scope="session")
def ran(run):
    """The stdout of a run that must succeed."""
    def call(*command):
        code, out, err = run(*command)
        assert code == 0, err
        return out
    return call


@contextlib.contextmanager
def reading():
    """A list that fills with the ids that a model looks up in its embedding."""
    calls, forward = [], torch.nn.Embedding.forward

    def look(module, ids):
        calls.append(ids.tolist())
        return forward(module, ids)
    with mock.patch.object(torch.nn.Embedding, "forward", look):
        yield calls


@pytest.fixture
def stop_at(request):
    """stop_at(step, signal): send the signal once, as AdamW is about to take this step from now on."""
    def arrange(step, number=signal.SIGTERM):
        countdown = iter(reversed(range(step)))

        def act(*_):
            if next(countdown, None) == 0:
                signal.raise_signal(number)
        request.addfinalizer(register_optimizer_step_pre_hook(act).remove)
    return arrange


def launch(folder, world, commands, before="", after="", timeout=200):
    """Run commands in `world` processes, started once. before, after: code for each process."""
    lines = [list(map(str, command)) for command in commands]
    (folder / "worker.py").write_text(f"""
import importlib, os, sys
import torch.distributed as dist
sys.path.insert(0, {str(ROOT)!r})
join, dist.destroy_process_group = dist.init_process_group, lambda: None
# torchrun's store serves one meeting
dist.init_process_group = lambda *a, **k: dist.is_initialized() or join(*a, **k)
{before}
for script, *arguments in {lines!r}:
    sys.argv = [script + ".py", *arguments]
    importlib.import_module(script).main()
{after}
sys.stdout.flush()
os._exit(0)  # as run_script does, and why
""")
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}",
         folder / "worker.py"], capture_output=True, text=True, timeout=timeout)


def at_step(step, action):
    """Code for `launch`: rank 1 does something as AdamW is about to take this step, the first being 1."""
    return f"""
import os, signal, time
from torch.optim.optimizer import register_optimizer_step_pre_hook
countdown = iter(reversed(range({step})))
def act(*_):
    if next(countdown, None) == 0 and os.environ["RANK"] == "1":
        {action}
register_optimizer_step_pre_hook(act)
"""


# ----------------------------------------------------------------------------- reading what they wrote

def json_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def files(folder):
    """{path: content} of a folder."""
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def saved_steps(out):
    """The steps of the complete checkpoints."""
    names = sorted(path.name for path in (out / "checkpoints").glob("step-???????"))
    return [int(name.removeprefix("step-")) for name in names]


def text_of(folder, ids):
    """The text of ids, by a folder's tokenizer.model, without control tokens and ids without a piece."""
    sp = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    return sp.decode([i for i in ids if i < sp.get_piece_size() and not sp.is_control(i)])


def results_of(folder):
    """The scores that eval.py wrote: an entry for each column, task and language."""
    return json.loads((folder / "results.json").read_text())["results"]


def logged(folder, key):
    """A number of each step that train.py logged."""
    return np.array([entry[key] for entry in json_lines(folder / "train_log.jsonl") if key in entry])


losses = functools.partial(logged, key="loss")


def tensors(folder, files="*.safetensors"):
    """{name: tensor} of a folder's weights, Decision Maker and matrix."""
    return {name: tensor for path in folder.glob(files) for name, tensor in load_file(path).items()}


def worst_difference(a, b):
    """The largest difference of two such dicts."""
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


def same(a, b):
    """Do two folders hold the same weights, Decision Maker and matrix, to the bit?"""
    a, b = ({path.name: path.read_bytes() for path in folder.glob("*.safetensors")} for folder in (a, b))
    return a == b and len(a) > 1
