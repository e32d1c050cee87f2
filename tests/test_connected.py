"""The connection in transformers (data/connected.py) answers as infer.py does."""
import shutil
import warnings

import pytest
import torch

from cctuning import Batch
from conftest import ROOT, training, write_connection, write_data
from infer import Engine, Prompt
from model import pad

pytestmark = pytest.mark.optional
TEXTS = ["Nini mji mkuu wa Kenya?", "tatu", "mbili na tatu?\nna moja?", "Wie heißt die Hauptstadt?", "?",
         "भारत की राजधानी क्या है?", "two plus three", "Sarafu ya Kenya ni nini, na ya Samoa ya Marekani?"]
CHAT = {"qwen2": ("chatml", "tokenizers"), "mistral": ("mistral", "sentencepiece")}  # template, vocabulary
NEW = 10  # tokens of an answer


@pytest.fixture(scope="module")
def results(tmp_path_factory, checkpoint, ran):
    """A folder of train.py's results: of the built-in model (llama) and of tiny chat models."""
    folder = tmp_path_factory.mktemp("results")
    ran(*training(ROOT / "data/tuned", ROOT / "data/dev.jsonl", folder / "llama", epochs=0))
    for family, (template, kind) in CHAT.items():
        base, data = checkpoint(template, kind, model_type=family), write_data(folder / "data.jsonl")
        ran(*training(base, data, folder / family, epochs=1, fusion_layer=1, ridge=3))
    write_connection(folder / "mistral")  # a strong one
    return folder


def load(folder, trust=True):
    transformers = pytest.importorskip("transformers", reason="optional package: only compared with")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trust).float()
    model.generation_config.eos_token_id = 10 ** 6  # all answers have NEW tokens
    return model


class Pair:
    """A model in transformers, and the Engine's answers to Prompts."""

    def __init__(self, folder, connection="matrix"):
        self.engine = Engine(folder, connection, dtype="float32")
        self.model = load(folder, trust=connection == "matrix")
        self.engine.tokenizer.stop = set()
        self.prompts = [Prompt(self.engine.tokenizer.prompt(text)) for text in TEXTS]
        self.answers = [answer.ids for answer in self.engine.answer_all(self.prompts, 8, NEW)]

    def loss(self, prompt, answer):
        """Minus the log-probability of an answer, by CCTuning.forward."""
        ids, labels = torch.tensor([prompt.ids + answer]), torch.tensor([[-100] * len(prompt.ids) + answer])
        position = torch.tensor([len(prompt.ids) + self.engine.tokenizer.connection_index])
        return self.engine.cc(Batch(ids, labels, position, ids, position), "matrix")[0].item()


@pytest.fixture(scope="module", params=["llama", *CHAT])
def pair(request, results):
    return Pair(results / request.param)


def generate(model, prompts, **options):
    """Greedy answers to Prompts, padded on the left."""
    ids = pad([prompt.ids[::-1] for prompt in prompts])[0].flip(1)
    out = model.generate(ids, attention_mask=(ids != 0).long(), max_new_tokens=NEW, pad_token_id=0, **options)
    return out[:, ids.shape[1]:][:, :NEW].tolist()


@pytest.mark.filterwarnings("error:not connected")
def test_answers_are_the_engines(pair):
    """Catches a wrong position in a padded row, and answers read, several tokens at once, as prompts."""
    assert generate(pair.model, pair.prompts) == pair.answers
    for prompt, answer in zip(pair.prompts[:3], pair.answers, strict=False):
        assert generate(pair.model, [prompt]) == [answer]
        assert generate(pair.model, [prompt], prompt_lookup_num_tokens=3) == [answer]


def test_plain_without_trust_remote_code(pair):
    """Catches a folder that needs it, a row connected without a marker, and a second warning."""
    plain = Pair(pair.engine.folder, "none")
    assert generate(plain.model, pair.prompts) == plain.answers != pair.answers
    ids, model = pad([pair.prompts[0].ids, pair.prompts[1].ids[:-1]])[0], load(pair.engine.folder)
    with pytest.warns(UserWarning, match="not connected"):
        logits = model(ids).logits
    with warnings.catch_warnings(action="error"):
        model(ids)
    assert [a.allclose(b) for a, b in zip(logits, plain.model(ids).logits, strict=True)] == [False, True]


def test_a_cached_prefix(pair):
    """Catches a connection that needs the whole prompt, or one that changes the prefix."""
    from transformers import DynamicCache
    prompt, cache = pair.prompts[2], DynamicCache()
    with warnings.catch_warnings(action="ignore"):  # a prefix has no marker
        pair.model(torch.tensor([prompt.ids[:5]]), past_key_values=cache)
    assert generate(pair.model, [prompt], past_key_values=cache) == [pair.answers[2]]


def test_an_answer_after_the_prompt(pair):
    """Catches a position counted from a row's end: lm-eval appends answers and pads on the right."""
    ids, _ = pad([prompt.ids + answer for prompt, answer in zip(pair.prompts, pair.answers, strict=True)])
    for row, prompt, answer in zip(pair.model(ids).logits, pair.prompts, pair.answers, strict=True):
        row = row[len(prompt.ids) - 1:][:NEW]
        loss = torch.nn.functional.cross_entropy(row, torch.tensor(answer), reduction="sum").item()
        assert loss == pytest.approx(pair.loss(prompt, answer), abs=1e-3)


def test_three_beams(pair):
    """Catches beams that lose the connection: their scores are log-probabilities."""
    found = pair.model.generate(
        torch.tensor([pair.prompts[0].ids]), max_new_tokens=NEW, pad_token_id=0, num_beams=3,
        num_return_sequences=3, length_penalty=0.0, output_scores=True, return_dict_in_generate=True)
    losses = [pair.loss(pair.prompts[0], ids[len(pair.prompts[0].ids):]) for ids in found.sequences.tolist()]
    assert losses == pytest.approx((-found.sequences_scores).tolist(), abs=1e-3)


@pytest.mark.parametrize("old, new", [('"decision_maker"', '"mean"'), ('"marker"', '"mark"')])
def test_what_is_refused(results, tmp_path, old, new):
    """Catches another fused vector, or a template without a marker, that is connected all the same."""
    config = shutil.copytree(results / "qwen2", tmp_path / "copy") / "config.json"
    config.write_text(config.read_text().replace(old, new))
    with pytest.raises(ValueError, match="copy: config.json has no marker, or another source_layer"):
        load(config.parent)


def test_nothing_is_left_of_an_earlier_connection(results, tmp_path, ran):
    """Catches a plain result that opens as connected: trained on from a connected model, and in its place."""
    source, out = results / "qwen2", shutil.copytree(results / "qwen2", tmp_path / "out")
    ran(*training(source, results / "data.jsonl", out, epochs=1, method="sft", overwrite=True))
    config = (out / "config.json").read_text()
    assert '"auto_map"' not in config and '"marker"' not in config and not (out / "connected.py").exists()
