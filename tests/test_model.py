"""The decoder and its checkpoint folder."""
import contextlib
import json
import math
import shutil

import pytest
import torch
from safetensors.torch import save_file

import model
from cctuning import load_cctuning
from conftest import CONFIG, tensors, write_checkpoint
from model import INDEX, Config, load_model, new_cache, pad, save_checkpoint

ROWS = [[1, 5, 9, 30, 200, 7], [1, 400], [1, 8, 8, 8, 90, 17, 300, 12, 44]]


@torch.no_grad()
@pytest.mark.parametrize("chunk", [1, 3])
def test_cached_equals_uncached(checkpoint, chunk):
    """Catches a mask aligned to the wrong corner, cache rows mixed up, and stale padding that a later token can see."""
    lm, (ids, lengths) = load_model(checkpoint()), pad(ROWS)
    extra = torch.randint(0, 512, (3, 6), generator=torch.Generator().manual_seed(1))
    cache = new_cache(lm.config, 3, ids.shape[1] + 6, torch.float32, "cpu")
    lm(ids, cache=cache, at=lengths - 1)
    for start in range(0, 6, chunk):
        positions = lengths[:, None] + torch.arange(start, start + chunk)
        found = lm.logits(lm(extra[:, start:start + chunk], positions=positions, cache=cache)[0])
        for i, row in enumerate(ROWS):
            whole = lm.logits(lm(torch.tensor([row + extra[i, :start + chunk].tolist()]))[0])[0, -chunk:]
            assert (found[i] - whole).abs().max() < 1e-4


@torch.no_grad()
def test_rotary_table_grows(checkpoint):
    """Catches positions beyond the first table, and a table made in inference mode that a later training step cannot
    use."""
    ids = torch.randint(0, 512, (1, 300), generator=torch.Generator().manual_seed(0))
    lm, fresh = (load_model(checkpoint()) for _ in range(2))
    with torch.inference_mode():
        lm(ids[:, :5])
    assert lm(ids)[0].equal(fresh(ids)[0])
    with torch.enable_grad():
        lm.logits(lm(ids)[0]).sum().backward()


def saved(folder, source, **options):
    lm = load_model(source, torch.float32)  # as training does; what is saved has the dtype it came in
    weights = ((name, p.detach().to(lm.stored[name])) for name, p in lm.named_parameters())
    save_checkpoint(folder, source, weights, {"template": "plain"}, **options)
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, "mixed"])
@pytest.mark.parametrize("tied", [False, True])
def test_save_load_save(checkpoint, tmp_path, dtype, tied):
    """Catches a dtype that is not kept tensor by tensor, a tied head written twice, shards with a tensor too many or
    too few, and a list of EOS ids that is left behind."""
    source = shutil.copytree(checkpoint(tie_word_embeddings=tied), tmp_path / "source")
    weights = {name: t.to((torch.float32 if "norm" in name else torch.bfloat16) if dtype == "mixed" else dtype)
               for name, t in tensors(source).items()}
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    (source / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    first = saved(tmp_path / "first", source, shard_bytes=50_000)
    second = saved(tmp_path / "second", first, shard_bytes=50_000)
    for folder in (first, second):
        found, index = tensors(folder), json.loads((folder / INDEX).read_text())["weight_map"]
        assert len(set(index.values())) > 1 and all((folder / file).exists() for file in index.values())
        assert found.keys() == index.keys() == weights.keys()
        assert (folder / "generation_config.json").read_text() == '{"eos_token_id": [2, 7]}'
        for name, tensor in weights.items():
            assert found[name].dtype == tensor.dtype and found[name].equal(tensor), name


def test_saving_over_a_model_leaves_none_of_it(checkpoint, tmp_path):
    """Catches an old model.safetensors beside the new shards (loaders would take it), an old tokenizer or matrix, and
    leftovers of the staging folder."""
    folder = shutil.copytree(checkpoint(), tmp_path / "model")
    (folder / "tokenizer.json").write_text("another model's")
    (folder / "cctuning.safetensors").write_text("another model's")
    saved(folder, checkpoint())
    gone = ("model.safetensors", "saving.tmp", "tokenizer.json", "cctuning.safetensors")
    assert not any((folder / name).exists() for name in gone)
    saved(folder, folder)  # in place, as --epochs 0 may
    assert (folder / "tokenizer.model").exists()
    assert tensors(folder).keys() == tensors(checkpoint()).keys()


@pytest.mark.parametrize("changes", [
    {},
    {"tie_word_embeddings": True},
    {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]},
    {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "head_dim": 8, "sliding_window": None},
    {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
], ids=["llama", "tied", "qwen2", "mistral", "linear"])
@torch.no_grad()
def test_transformers_opens_what_we_save(tmp_path, changes):
    """Catches names, a config or an index that transformers does not understand, and any difference in the decoder
    itself."""
    transformers = pytest.importorskip("transformers", reason="optional package: only compared with")
    ours = saved(tmp_path / "ours", write_checkpoint(tmp_path / "source", **changes), shard_bytes=50_000)
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(ours, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    lm, ids = load_model(ours), torch.tensor(ROWS[2:])
    assert (lm.logits(lm(ids)[0]) - theirs(ids).logits).abs().max() < 1e-4


def test_checkpoint_of_the_papers_code(checkpoint, tmp_path):
    """Catches a Decision Maker that is refused or dropped under the name the paper's code gives it."""
    folder = shutil.copytree(checkpoint(), tmp_path / "paper")
    decision_maker = torch.randn(4, 48, generator=torch.Generator().manual_seed(3))
    save_file({**tensors(folder), "model.source_select.weight": decision_maker}, folder / "model.safetensors")
    cc = load_cctuning(folder)
    assert cc.trained and cc.decision_maker.weight.equal(decision_maker)


def test_config_spellings(tmp_path):
    """Catches a sliding window that is ignored where it counts or heeded where it is switched off, and a misread
    transformers-5 config."""
    def read(**changes):
        raw = {**CONFIG, **changes}
        (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in raw.items() if v != "absent"}))
        return Config.read(tmp_path)
    assert read(model_type="mistral", sliding_window=64).max_length == 64
    assert read(model_type="qwen2", sliding_window=64, use_sliding_window=False).max_length == 256
    assert read(model_type="qwen2", sliding_window=64, use_sliding_window=True).max_length == 64
    five = read(rope_theta="absent", rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    assert five.rope_theta == 5e5 and five.rope_scaling is None
    assert read(rope_scaling={"type": "linear", "factor": 2}).rope_scaling == {"rope_type": "linear", "factor": 2.0}


def test_a_process_reads_only_its_rows(checkpoint, monkeypatch):
    """Catches a sharded load that reads whole tensors first, and rows taken from the wrong place."""
    whole = dict(load_model(checkpoint(), torch.float32).named_parameters())
    opened = model.open_tensors

    class Rows:
        def __init__(self, file):
            self.keys, self.get_slice = file.keys, file.get_slice

    @contextlib.contextmanager
    def rows_only(path):
        with opened(path) as file:
            yield Rows(file)
    monkeypatch.setattr(model, "open_tensors", rows_only)

    @torch.no_grad()
    def read(world, rank):
        """{name: this process's rows} of every parameter."""
        lm, parts = model.empty_model(checkpoint()), {}

        def local(p):
            size = math.ceil(len(p) / world)
            rows = slice(rank * size, min((rank + 1) * size, len(p)))
            parts[p] = torch.empty(rows.stop - rows.start, *p.shape[1:])
            return parts[p], rows
        model.load_weights(lm, checkpoint(), torch.float32, local=local)
        return {name: parts[p] for name, p in lm.named_parameters()}

    for world in (2, 4):
        for rank in range(world):
            found = read(world, rank)
            assert all(found[name].equal(p.chunk(world)[rank]) for name, p in whole.items())
