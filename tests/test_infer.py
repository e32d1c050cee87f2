"""Answering: batches, stopping, sampling, the command line."""
import io
import itertools
import json
import types

import pytest
import torch
from safetensors.torch import save_file

from cctuning import CCTuning, cctuning_tensors
from conftest import PAIRS, json_lines, write_checkpoint
from infer import Engine, pack, pick
from model import load_model


@pytest.fixture(scope="session")
def tuned(tmp_path_factory):
    """A folder with a Decision Maker and matrices that matter (untrained: only the mechanics are tested here)."""
    folder = write_checkpoint(tmp_path_factory.mktemp("tuned") / "model", "chatml", seed=4)
    cc = CCTuning(load_model(folder), seed=1)
    generator = torch.Generator().manual_seed(2)
    matrices = {name: 5 * torch.randn(48, 48, generator=generator) for name in ("shared", "sw")}
    save_file(cctuning_tensors(cc.decision_maker.weight.detach() * 50, matrices), folder / "cctuning.safetensors")
    return folder


@pytest.mark.parametrize("options", [(12,), (12, 1.0, 0.9, 5)], ids=["greedy", "sampled"])
@pytest.mark.parametrize("connection", ["matrix", "english", "none"])
def test_batched_equals_alone(tuned, connection, options):
    """Catches rows that depend on their neighbours: through padding, a shared random state, or cache rows mixed up when
    one stops."""
    e = Engine(tuned, connection=connection)
    prompts = [e.prompt(own, english, lang, i) for i, (own, english, _, lang) in enumerate(PAIRS)]
    assert prompts[3].matrix_name == "shared"
    e.tokenizer.stop |= set(range(300, 420))  # so that rows stop at different times
    alone = [e.answer_all([p], 1, *options)[0] for p in prompts]
    together = e.answer_all(prompts, 4, *options)
    assert [a.ids for a in together] == [a.ids for a in alone] and len({len(a.ids) for a in alone}) > 2
    if connection == "none":
        assert all(a.layer is None for a in alone)
    else:
        assert [a.layer for a in together] == [a.layer for a in alone]
        assert abs(sum(alone[0].probabilities) - 1) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("changes", [
    pytest.param({}, id="llama"),
    pytest.param({"tie_word_embeddings": True}, id="tied"),
    pytest.param({"model_type": "qwen2"}, id="qwen2"),
])
def test_packed_equals_plain(checkpoint, changes, dtype):
    """Catches a bias or a tied head lost in packing, and products that are rounded more than once."""
    ids = torch.randint(0, 512, (3, 9), generator=torch.Generator().manual_seed(0))
    plain, packed = (load_model(checkpoint(**changes), dtype) for _ in range(2))
    pack(packed)
    expected, found = (lm.logits(lm(ids)[0]).float() for lm in (plain, packed))
    bound = 1e-4 if dtype == torch.float32 else 0.05
    assert found.dtype == expected.dtype and (found - expected).abs().max() < bound * expected.abs().max()


def test_connections_differ(tuned, monkeypatch):
    """Catches an option that is parsed and then ignored."""
    logits, prefill = [], CCTuning.prefill
    monkeypatch.setattr(CCTuning, "prefill", lambda *given: logits.append(prefill(*given)[0]) or prefill(*given))
    for options in ({"connection": "none"}, {"connection": "english"}, {"connection": "matrix"},
                    {"connection": "matrix", "matrix": "per_language"}):
        e = Engine(tuned, **options)
        e.answer_all([e.prompt(*PAIRS[0][:2], "sw")], 1, 1)
    assert all((a - b).abs().max() > 1e-3 for a, b in itertools.combinations(logits, 2))


def test_per_language(tuned):
    """Catches a language whose matrix is not used, and one without a matrix that ends the run or gets the shared one
    unsaid."""
    e = Engine(tuned, matrix="per_language")
    assert [e.prompt("Nini?", lang=lang).matrix_name for lang in ("sw", "en", None)] == ["sw", "shared", "shared"]
    assert len(e.notices) == 2 and "en" in e.notices[0]


def test_stops_at_every_eos_and_at_the_models_length(tuned):
    """Catches a stop token that is ignored or kept in the answer, and an answer that runs past the positions the model
    has."""
    e = Engine(tuned)
    prompt = e.prompt("Nini mji mkuu wa Kenya?")
    free = e.answer_all([prompt], 1, 30)[0].ids
    for token in set(free):
        e.tokenizer.stop = {token, 511}
        assert e.answer_all([prompt], 1, 30)[0].ids == free[:free.index(token)]
    e.tokenizer.stop = set()
    assert len(e.answer_all([prompt], 1, 1000)[0].ids) == 256 - len(prompt.ids)


def test_pick():
    """Catches top-p that keeps a token too many or too few, and a draw that does not follow the probabilities."""
    chances = torch.tensor([[0.1, 0.5, 0.15, 0.25]])

    def draw(uniform, top_p):
        return pick(chances.log(), 1.0, top_p, [types.SimpleNamespace(random=lambda: uniform)]).item()
    assert [draw(u, 1.0) for u in (0.0, 0.49, 0.51, 0.74, 0.76, 0.89, 0.91, 0.999999)] == [1, 1, 3, 3, 2, 2, 0, 0]
    assert {draw(u / 100, 0.6) for u in range(100)} == {1, 3} and {draw(u / 100, 0.0) for u in range(100)} == {1}
    assert pick(chances.log(), 0, 1.0, []).item() == 1
    assert draw(1 - 1e-9, 0.6) == 3  # in float32 this is 1: the last token that is allowed, not the last of all


def test_prompt_streams(tuned, run):
    """Catches a stream that loses spaces, splits characters, or differs from the answer in one piece."""
    e = Engine(tuned)
    expected = e.tokenizer.decode(e.answer_all([e.prompt("Nini mji mkuu wa Kenya?")], 1, 40)[0].ids)
    command = ["infer", "--model", tuned, "--lang=sw", "--prompt=Nini mji mkuu wa Kenya?", "--max_new_tokens=40"]
    code, out, err = run(*command)
    assert (code, out) == (0, expected + "\n"), err
    code, out, _ = run(*command, "--explain")
    assert out.endswith(expected + "\n") and "layer" in out.splitlines()[0] and "matrix" in out.splitlines()[0]


def test_files_and_standard_input(tuned, run, tmp_path, monkeypatch):
    """Catches answers out of order, fields that are lost, and an answer that takes more than its line."""
    records = [{"instruction": own, "instruction_en": english, "lang": lang, "id": f"{i}\ud83d"}
               for i, (own, english, _, lang) in enumerate(PAIRS)]
    (tmp_path / "in.jsonl").write_text("\n".join(json.dumps(r) for r in records))
    code, _, err = run("infer", "--model", tuned, "--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl",
                       "--batch_size=2", "--max_new_tokens=9")
    assert code == 0, err
    e = Engine(tuned)
    texts = [e.tokenizer.decode(e.answer_all([e.prompt(own)], 1, 9)[0].ids) for own, *_ in PAIRS]
    answered = [{**r, "answer": text} for r, text in zip(records, texts, strict=True)]
    assert json_lines(tmp_path / "out.jsonl") == answered
    lines = "\n".join(own for own, *_ in PAIRS).encode() + b"\n"
    monkeypatch.setattr("sys.stdin", types.SimpleNamespace(buffer=io.BytesIO(lines)))
    code, out, err = run("infer", "--model", tuned, "--prompt", "-", "--max_new_tokens", 9)
    assert out.split("\n")[:-1] == [text.replace("\n", "\\n") for text in texts]


def test_plain_checkpoint_says_so(checkpoint, run):
    """Catches a missing matrix that goes unnoticed."""
    code, _, err = run("infer", "--model", checkpoint("chatml"), "--prompt", "hello", "--max_new_tokens", 3)
    assert code == 0 and err.count("\n") == 1 and "plain model" in err
