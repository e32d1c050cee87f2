"""Several processes: the same results as one, a share of the memory each, and no hanging when one dies."""
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

import train
from conftest import PAIRS, write_data

ROOT = Path(__file__).resolve().parent.parent
LLAMA_8B = dict(model_type="llama", vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
                num_key_value_heads=8, max_position_embeddings=131072, rope_theta=500000.0, rms_norm_eps=1e-5, tie_word_embeddings=False)
WORKER = """
import importlib, json, sys
import torch.distributed as dist
join, dist.destroy_process_group = dist.init_process_group, lambda: None
dist.init_process_group = lambda *a, **k: dist.is_initialized() or join(*a, **k)  # torchrun's store serves one meeting only
for script, *arguments in json.load(open(sys.argv[1])):
    sys.argv = [script + ".py", *arguments]
    importlib.import_module(script).main()
"""


def launch(folder, world, commands, worker=WORKER, timeout=200):
    """Run (script, *arguments) commands one after the other in `world` processes, started once."""
    (folder / "worker.py").write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n" + worker)
    (folder / "commands.json").write_text(json.dumps([[str(a) for a in command] for command in commands]))
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}", folder / "worker.py",
                           folder / "commands.json"], capture_output=True, text=True, timeout=timeout)


def arguments(model, data, out, *flags):
    return ["train", "--model", model, "--data", data, "--out", out, "--dtype", "float32", "--lr", "1e-3", "--epochs", "7", "--batch_size", "6",
            "--matrix_prompts", "40", *flags]


def losses(folder):
    log = [json.loads(line) for line in (folder / "train_log.jsonl").read_text().splitlines()]
    return np.array([entry["loss"] for entry in log if "loss" in entry])


def tensors(folder):
    return {name: t.float() for path in folder.glob("*.safetensors") if path.name != "cctuning.safetensors" for name, t in load_file(path).items()}


CASES = {  # (processes, what one process does too, what only these do): pairwise over accumulation, checkpointing, method, English gradients
    "cc, checkpointing": (2, [], ["--micro_batch", "6", "--checkpoint_activations"]),
    "cc with English gradients, accumulation": (2, ["--english_grad"], ["--micro_batch", "2", "--max_shard_size", "1e-4"]),
    "sft, accumulation and checkpointing": (2, ["--method", "sft"], ["--micro_batch", "2", "--checkpoint_activations"]),
    "cc, accumulation": (4, [], ["--micro_batch", "1"]),
    "cc with English gradients, checkpointing": (4, ["--english_grad"], ["--micro_batch", "6", "--checkpoint_activations"]),
    "sft": (4, ["--method", "sft"], ["--micro_batch", "6"]),
}


def test_several_processes_equal_one(checkpoint, tmp_path, run):
    """Catches gradients summed or averaged wrongly, a mean of means, Gumbel noise that depends on the process, a layer whose recomputation
    differs, rows of a sharded weight read from the wrong place, a matrix summed over one process only, answers in another order.
    13 samples of unequal answers: steps of 6, 6 and 1, 21 of them."""
    model, data = checkpoint(), write_data(tmp_path / "data.jsonl", (PAIRS * 3)[:13])
    fit = tmp_path / "fit.jsonl"
    fit.write_text("".join((ROOT / "data" / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[:110]), encoding="utf-8")
    one = {}
    for _, shared, _ in CASES.values():
        folder = one.setdefault(tuple(shared), tmp_path / f"one{len(one)}")
        if not folder.exists():
            assert run(*arguments(model, data, folder, "--micro_batch", "6", *shared))[0] == 0
    tuned = one[()]
    again = lambda out: ["train", "--model", tuned, "--data", fit, "--out", out, "--epochs", "0", "--dtype", "float32"]
    answers = lambda out: ["eval", "--model", tuned, "--data", ROOT / "data" / "dev", "--langs", "sw,zh", "--limit", "7", "--max_new_tokens", "5", "--batch_size", "3", "--out", out]
    for command in (again(tmp_path / "fit1"), answers(tmp_path / "eval1")):
        assert run(*command)[0] == 0
    for world in (2, 4):
        cases = {name: case for name, case in CASES.items() if case[0] == world}
        commands = [arguments(model, data, tmp_path / name, *shared, *own) for name, (_, shared, own) in cases.items()]
        if world == 2:  # bfloat16 promises no more than likeness
            commands.append(arguments(model, data, tmp_path / "low", "--micro_batch", "6", "--dtype", "bfloat16"))
        done = launch(tmp_path, world, [*commands, again(tmp_path / f"fit{world}"), answers(tmp_path / f"eval{world}")])
        assert done.returncode == 0, done.stderr[-3000:]
        for name, (_, shared, own) in cases.items():
            expected, found = one[tuple(shared)], tmp_path / name
            assert len(losses(expected)) == 21 and np.abs(losses(found) - losses(expected)).max() < 1e-5, name
            weights = tensors(found)
            assert max((weights[key] - w).abs().max().item() for key, w in tensors(expected).items()) < 1e-4, name
            assert (len(list(found.glob("model-*.safetensors"))) > 1) == ("--max_shard_size" in own)
        assert np.abs(losses(tmp_path / "low") / losses(tuned) - 1).max() < 0.02
        matrices = [load_file(tmp_path / f"fit{n}" / "cctuning.safetensors")["transform_matrix"] for n in (1, world)]
        assert (matrices[1] - matrices[0]).abs().max() < 1e-6 * matrices[0].abs().max()
        results, given = ([p.read_text() for p in sorted((tmp_path / f"eval{n}").rglob("*.json*")) if p.name != "results.json"] for n in (1, world))
        assert results == given and len(given) == 2
        scores = [json.loads((tmp_path / f"eval{n}" / "results.json").read_text())["results"] for n in (1, world)]
        assert scores[0] == scores[1]


def test_the_default_run(tmp_path, run):
    """Catches the embedded default giving other losses on two processes than on one in its first 20 steps, and other answers, in bfloat16 as stored."""
    data = tmp_path / "data.jsonl"
    data.write_text("".join((ROOT / "data" / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[:640]), encoding="utf-8")
    settings = [f"--{name}={train.EMBEDDED[name]}" for name in ("model", "batch_size", "micro_batch", "lr")]
    command = lambda out: ["train", *settings, "--data", data, "--out", out, "--epochs", "1", "--dtype", "float32", "--matrix_prompts", "1"]
    assert run(*command(tmp_path / "one"))[0] == 0
    answers = lambda out: ["eval", "--model", ROOT / "data" / "tuned", "--data", ROOT / "data" / "test", "--langs", "pt,de", "--out", out]
    assert run(*answers(tmp_path / "eval1"))[0] == 0
    done = launch(tmp_path, 2, [command(tmp_path / "two"), answers(tmp_path / "eval2")])
    assert done.returncode == 0, done.stderr[-3000:]
    results = [json.loads((tmp_path / f"eval{n}" / "results.json").read_text())["results"] for n in (1, 2)]
    assert results[0] == results[1]
    assert len(losses(tmp_path / "one")) == 20 and np.abs(losses(tmp_path / "two") - losses(tmp_path / "one")).max() < 1e-5


def test_memory_plan(tmp_path, run):
    """Catches a part of the model that is kept whole by every process, and a plan that says something else than what is done."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    code = (f"import sys; sys.path.insert(0, {str(ROOT)!r}); import torch, torch.distributed as dist, train\n"
            "from torch.testing._internal.distributed.fake_pg import FakeStore\n"
            "from cctuning import CCTuning\nfrom model import empty_model\n"
            "dist.init_process_group('fake', store=FakeStore(), rank=0, world_size=8)\n"
            f"cc = CCTuning(empty_model({str(tmp_path)!r}))\n"
            "train.shard(cc, train.Workers(0, 8, torch.device('cpu'), torch.bfloat16))\n"
            "for module in (cc, *cc.lm.model.layers):\n"
            "    policy = module._get_fsdp_state()._fsdp_param_group.mp_policy  # its own group: gathered by itself\n"
            "    assert (policy.param_dtype, policy.reduce_dtype) == (torch.bfloat16, torch.float32)\n"
            "print(sum(p.numel() for p in cc.lm.parameters()), sum(p.to_local().numel() for p in cc.lm.parameters()))")
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True)
    whole, part = map(int, done.stdout.split())
    assert abs(whole / 8.03e9 - 1) < 0.01 and abs(8 * part / whole - 1) < 0.01
    shown = {}
    for world in (1, 8):
        code, out, err = run("train", "--model", tmp_path, "--memory_plan", world, "--dtype", "bfloat16", "--micro_batch", 4)
        assert code == 0, err
        shown[world] = {what: float(size) for size, what in (line.split(" GB  ") for line in out.splitlines())}
    embedding, layer = 128256 * 4096, 4096 * (4096 * 2 + 1024 * 2 + 14336 * 3 + 2)
    logits = 4 * 1024 * 128256 * 4 * 3
    for world, sizes in {1: [4 * whole, 4 * whole, 8 * whole, 2 * (32 * layer + embedding), 0, logits],
                         8: [4 * part, 4 * part, 8 * part, 2 * (2 * embedding + 4096 + 2 * layer), 6 * (2 * embedding + 4096), logits]}.items():
        assert list(shown[world].values()) == pytest.approx([size / 1e9 for size in [*sizes, sum(sizes)]], abs=0.02)


def test_a_process_that_dies(checkpoint, tmp_path):
    """Catches the others waiting for ever for one that is gone, and for one that is there and does nothing."""
    dying = WORKER.replace("\nfor script", "\nimport os, signal, train\nnoise = train.gumbel_noise\n"
                           "def die(seed, step, *rest):\n"
                           "    if step == 3 and os.environ['RANK'] == '1': os.kill(os.getpid(), signal.SIGKILL)\n"
                           "    return noise(seed, step, *rest)\n"
                           "train.gumbel_noise = die\nfor script", 1)
    data = write_data(tmp_path / "data.jsonl", PAIRS)
    done = launch(tmp_path, 2, [arguments(checkpoint(), data, tmp_path / "out")], dying, timeout=100)
    assert done.returncode != 0 and "SIGKILL" in done.stderr
    assert not (tmp_path / "out" / "config.json").exists()
    hanging = dying.replace("os.kill(os.getpid(), signal.SIGKILL)", "__import__('time').sleep(90)").replace(
        "import os, signal, train\n", "import os, signal, train, datetime\ntrain.TIMEOUT = datetime.timedelta(seconds=5)\n")
    done = launch(tmp_path, 2, [arguments(checkpoint(), data, tmp_path / "out")], hanging, timeout=60)
    assert done.returncode != 0 and "5000ms" in done.stderr
