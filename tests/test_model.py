"""The decoder and its checkpoint folder."""
import contextlib
import math
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from cctuning import load_cctuning
from model import INDEX, Config, load_model, new_cache, pad, save_checkpoint

ROWS = [[1, 5, 9, 30, 200, 7], [1, 400], [1, 8, 8, 8, 90, 17, 300, 12, 44]]


@torch.no_grad()
def test_rows_together_equal_rows_alone(checkpoint):
    """Catches attention that sees padding, and rotary positions counted from the padded end."""
    lm = load_model(checkpoint())
    together = lm.logits(lm(pad(ROWS)[0])[0])
    for i, row in enumerate(ROWS):
        alone = lm.logits(lm(torch.tensor([row]))[0])[0]
        assert (together[i, :len(row)] - alone).abs().max() < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("chunk", [1, 3])
def test_cached_equals_uncached(checkpoint, chunk):
    """Catches a mask aligned to the wrong corner, cache rows mixed up, and stale padding that a later token can see."""
    lm, extra = load_model(checkpoint()), torch.randint(0, 512, (3, 6), generator=torch.Generator().manual_seed(1))
    ids, lengths = pad(ROWS)
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
    """Catches positions beyond the first table, and a table made in inference mode that a later training step cannot use."""
    ids = torch.randint(0, 512, (1, 300), generator=torch.Generator().manual_seed(0))
    lm, fresh = (load_model(checkpoint()) for _ in range(2))
    with torch.inference_mode():
        lm(ids[:, :5])
    assert lm(ids)[0].equal(fresh(ids)[0])
    with torch.enable_grad():
        lm.logits(lm(ids)[0]).sum().backward()


@torch.no_grad()
def test_one_token_of_the_last_layer(checkpoint):
    """Catches a last layer that, asked for one token, takes another's query, or a mask that lets it see what follows."""
    lm = load_model(checkpoint())
    ids, lengths = pad(ROWS)
    whole, _ = lm(ids)
    for at in (lengths - 1, lengths - 2):
        one, activations = lm(ids, at=at)
        assert (one[:, 0] - whole[torch.arange(3), at]).abs().max() < 1e-5
        assert activations.shape == (4, 3, 48)


@torch.no_grad()
def test_fusion_is_at_one_token(checkpoint):
    """Catches a second input that reaches another row or an earlier token, or is added in another layer than the first."""
    lm, ids = load_model(checkpoint()), pad(ROWS)[0]
    seen = []
    lm.model.layers[0].register_forward_hook(lambda module, args, output: seen.append(output[0]))
    vector, index = torch.randn(3, 48, generator=torch.Generator().manual_seed(2)), torch.tensor([3, 0, 5])
    plain, fused = lm(ids)[0], lm(ids, fused=(vector, index))[0]
    expected = seen[0].clone()
    expected[torch.arange(3), index] += vector
    assert (seen[1] - expected).abs().max() < 1e-5
    for i, p in enumerate(index):
        assert plain[i, :p].equal(fused[i, :p]) and not plain[i, p].equal(fused[i, p])


def saved(folder, source, **options):
    lm = load_model(source, torch.float32)  # as training does; what is saved has the dtype it came in
    save_checkpoint(folder, source, ((n, p.detach().to(lm.stored[n])) for n, p in lm.named_parameters()), {"template": "plain"}, **options)
    return folder


def tensors(folder):
    return {name: tensor for file in folder.glob("model*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, "mixed"])
@pytest.mark.parametrize("tied", [False, True])
def test_save_load_save(checkpoint, tmp_path, dtype, tied):
    """Catches a dtype that is not kept tensor by tensor, a tied head written twice, and shards with a tensor too many or too few."""
    source = checkpoint(tie_word_embeddings=tied)
    original = tmp_path / "original"
    original.mkdir()
    for file in source.iterdir():
        (original / file.name).write_bytes(file.read_bytes())
    kinds = {n: (torch.float32 if "norm" in n else torch.bfloat16) if dtype == "mixed" else dtype for n in tensors(source)}
    weights = {name: t.to(kinds[name]) for name, t in tensors(source).items()}
    save_file(weights, original / "model.safetensors", metadata={"format": "pt"})
    first = saved(tmp_path / "first", original, shard_bytes=50_000)
    lm = load_model(first, torch.float32)
    second = tmp_path / "second"
    save_checkpoint(second, first, ((n, p.detach().to(lm.stored[n])) for n, p in lm.named_parameters()), {}, shard_bytes=50_000)
    assert len(list(first.glob("model-*.safetensors"))) > 1
    assert tensors(first).keys() == tensors(second).keys() == weights.keys()
    for name, tensor in weights.items():
        for folder in (first, second):
            found = tensors(folder)[name]
            assert found.dtype == tensor.dtype and found.equal(tensor), name
    index = json.loads((second / INDEX).read_text())["weight_map"]
    assert index.keys() == weights.keys() and all((second / file).exists() for file in index.values())


def test_saving_over_a_model_leaves_none_of_it(checkpoint, tmp_path):
    """Catches an old model.safetensors beside the new shards (loaders would take it), an old tokenizer or matrix, and leftovers of the staging folder."""
    folder = tmp_path / "model"
    folder.mkdir()
    for file in checkpoint().iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "tokenizer.json").write_text("another model's")
    (folder / "cctuning.safetensors").write_text("another model's")
    saved(folder, checkpoint())
    assert not any((folder / name).exists() for name in ("model.safetensors", "saving.tmp", "tokenizer.json", "cctuning.safetensors"))
    saved(folder, folder)  # in place, as --epochs 0 may
    assert (folder / "tokenizer.model").exists()
    assert tensors(folder).keys() == tensors(checkpoint()).keys()


@pytest.mark.parametrize("changes", [
    {}, {"tie_word_embeddings": True}, {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]},
    {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "head_dim": 8, "sliding_window": None},
    {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
], ids=["llama", "tied", "qwen2", "mistral", "linear"])
@torch.no_grad()
def test_transformers_opens_what_we_save(tmp_path, changes):
    """Catches names, a config or an index that transformers does not understand, and any difference in the decoder itself."""
    transformers = pytest.importorskip("transformers", reason="compares with transformers, which the project does not need")
    from conftest import write_checkpoint
    source = write_checkpoint(tmp_path / "source", **changes)
    ours = saved(tmp_path / "ours", source, shard_bytes=50_000)
    model, report = transformers.AutoModelForCausalLM.from_pretrained(ours, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    lm, ids = load_model(ours), torch.tensor(ROWS[2:])
    assert (lm.logits(lm(ids)[0]) - model(ids).logits).abs().max() < 1e-4


def test_checkpoint_of_the_papers_code(checkpoint, tmp_path):
    """Catches a Decision Maker that is refused or dropped under the name the paper's code gives it."""
    folder = tmp_path / "paper"
    folder.mkdir()
    for file in checkpoint().iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    decision_maker = torch.randn(4, 48, generator=torch.Generator().manual_seed(3))
    save_file({**tensors(folder), "model.source_select.weight": decision_maker}, folder / "model.safetensors")
    cc = load_cctuning(folder)
    assert cc.trained and cc.decision_maker.weight.equal(decision_maker)


def test_config_spellings(tmp_path):
    """Catches a sliding window that is ignored where it counts or heeded where it is switched off, and a misread transformers-5 config."""
    from conftest import CONFIG

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
    import model
    whole = load_model(checkpoint(), torch.float32)
    opened = model.open_tensors

    class Rows:
        def __init__(self, file):
            self.keys, self.get_slice = file.keys, file.get_slice

    @contextlib.contextmanager
    def rows_only(path):
        with opened(path) as file:
            yield Rows(file)
    monkeypatch.setattr(model, "open_tensors", rows_only)
    for world in (2, 4):
        for rank in range(world):
            part = model.empty_model(checkpoint())
            expected = {name: p.detach().chunk(world)[rank] for name, p in whole.named_parameters()}
            found = {id(p): torch.empty_like(expected[name]) for name, p in part.named_parameters()}

            def local(p):
                size = math.ceil(len(p) / world)
                return found[id(p)], slice(rank * size, rank * size + len(found[id(p)]))
            model.fill(part, checkpoint(), torch.float32, local=local)
            assert all(torch.equal(found[id(p)], expected[name]) for name, p in part.named_parameters())
