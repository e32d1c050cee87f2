"""Why the matrix loses to plain fine-tuning (SFT), in a world where the connection should help.

    python tests/tools/drift.py    # every run; in bold the means. With --toy: at toy size, in seconds
    python tests/tools/drift.py --search --bases 0 --seeds 0     # the tries that chose METHODS' settings

World: persons have a country, a language and a currency, for each of which there is an English word
and one in each of four other languages. A word is one token. The base, a decoder of two layers,
answers in English whatever language a question is asked in, and has learnt a dictionary. Fine-tuning:
questions in the four languages, answered in the same language. Scored: the same for other facts, whose
answer words were fine-tuned on. The connection should help: the own-language pass ends with the English
word, too late to translate it; the second pass starts from it.

Columns, exact match in per cent: the connections of CCTuning.prefill; *identity*: W = 1, the model's
own H is fused; *untouched*: the base runs the first pass, the tuned model the second, and W maps the
base's H to the tuned model's English H (needs both models). R^2 of W by layer, on the scored facts.

How settings were chosen, a rule stated before the first try: batches of 32, the same epochs unless the
name says otherwise; the learning rate is the best of RATES on the dev facts, base 0, seed 0 (ties: the
lower), by the column that a method is for: none for SFT, identity for looped training, else matrix.
Both layers are tried as the fixed one, the better is in METHODS.
"""
import argparse
import random
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from cctuning import CCTuning, Fusion, TransformMatrix, gumbel_noise  # noqa: E402
from model import DATA, Config, Transformer, pad, select_positions  # noqa: E402
from train import Sample, collate, learning_rate, make_batches  # noqa: E402

SIZE = {"persons": 200, "names": 30, "terms": 30, "width": 128, "base_steps": 400, "epochs": 6}
TOY = {"persons": 20, "names": 10, "terms": 4, "width": 32, "base_steps": 80, "epochs": 4}
LANGUAGES = ("de", "es", "sw", "tr")
COLUMNS = ("matrix", "real English", "none", "identity", "untouched")
RATES = (5e-5, 1e-4, 2e-4, 4e-4, 8e-4)
METHODS = {  # settings: arguments of tune()
    "base, not tuned": {"lr": 0, "epochs": 0},
    "SFT": {"lr": 2e-4, "connection": "none"},
    "SFT, 2 x epochs": {"lr": 1e-4, "connection": "none", "epochs": 2},
    "SFT, 3 x epochs": {"lr": 5e-5, "connection": "none", "epochs": 3},
    "SFT, English samples too": {"lr": 2e-4, "connection": "none", "languages": ("en", *LANGUAGES)},
    "CC, Decision Maker": {"lr": 1e-4},
    "CC, fixed layer": {"lr": 1e-4, "source": 1},
    "CC, Decision Maker, retention": {"lr": 4e-4, "retention": 1.0},
    "CC, fixed layer, retention": {"lr": 2e-4, "source": 1, "retention": 1.0},
    "looped, fixed layer, no English": {"lr": 2e-4, "source": 1, "connection": "matrix"},
    "CC, fixed layer, retention x 0.3": {"lr": 2e-4, "source": 1, "retention": 0.3},
    "CC, fixed layer, retention x 3": {"lr": 4e-4, "source": 1, "retention": 3.0},
    "CC, fixed layer, retention by KL": {"lr": 2e-4, "source": 1, "retention": 1.0, "kl": True},
}


class World:
    """Facts (relation, person, term): 60 % to fine-tune on, 15 % dev, 25 % test."""

    def __init__(self, size, seed):
        self.size, self.words, rng = size, {"<pad>": 0, "<s>": 1}, random.Random(seed)
        names, facts = range(size["names"]), []
        persons = rng.sample([(first, last) for first in names for last in names], size["persons"])
        for relation in ("country", "language", "currency"):
            rng.shuffle(persons)
            facts += [(relation, person, i % size["terms"]) for i, person in enumerate(persons)]
        rng.shuffle(facts)
        dev, test = round(0.6 * len(facts)), round(0.75 * len(facts))
        self.facts = {"train": facts[:dev], "dev": facts[dev:test], "test": facts[test:]}
        self.base_rows = [(self.prompt(fact, lang), self.answer(fact, "en"))
                          for fact in facts for lang in ("en", *LANGUAGES)]
        for relation, term in sorted({(relation, term) for relation, _, term in facts}):
            for lang in LANGUAGES:
                own = self.ids(f"{lang}:{relation}-{term}")[0]
                self.base_rows.append((self.ids(f"<s> {lang}:word {lang}:for en:{relation}-{term}"), own))

    def ids(self, text):
        return [self.words.setdefault(word, len(self.words)) for word in text.split()]

    def prompt(self, fact, lang):
        """As "Land von Anna Berg": five tokens; p is the last."""
        relation, (first, last), _ = fact
        return self.ids(f"<s> {lang}:{relation} {lang}:of first:{first} last:{last}")

    def answer(self, fact, lang):
        return self.ids(f"{lang}:{fact[0]}-{fact[2]}")[0]

    def samples(self, part, languages=LANGUAGES):
        return [Sample([*self.prompt(fact, lang), self.answer(fact, lang)], 5, self.prompt(fact, "en"),
                       lang == "en") for fact in self.facts[part] for lang in languages]


def answer_logits(lm, ids, position, fusion=None):
    """The logits (B, V) after p."""
    return lm.logits(select_positions(lm(lm.embed(ids), fusion=fusion).hidden, position))


def update(model, optimizer, loss, lr):
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.param_groups[0]["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()


def train_base(world, seed):
    """The base, and the share of its questions and words that it answers."""
    width, steps = world.size["width"], world.size["base_steps"]
    lm = Transformer(replace(
        Config.read(DATA / "base"), vocab_size=len(world.words), hidden_size=width, head_dim=width // 4,
        num_attention_heads=4, num_key_value_heads=4, intermediate_size=3 * width, num_hidden_layers=2,
        rope_layers=(True, True)))
    torch.manual_seed(seed)
    for parameter in lm.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.02)
    optimizer = torch.optim.AdamW(lm.parameters(), betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    ids, lengths = pad([prompt for prompt, _ in world.base_rows])
    answers = torch.tensor([answer for _, answer in world.base_rows])
    for step in range(steps):
        rows = torch.randperm(len(ids))[:256]
        loss = F.cross_entropy(answer_logits(lm, ids[rows], lengths[rows] - 1), answers[rows])
        update(lm, optimizer, loss, learning_rate(step, steps, 2e-3))
    with torch.no_grad():
        right = answer_logits(lm, ids, lengths - 1).argmax(-1) == answers
    return lm.requires_grad_(False), right.float().mean().item()


def tune(base, world, seed, lr, connection="english", source="decision_maker", epochs=1,
         languages=LANGUAGES, retention=0.0, kl=False):
    """Fine-tune a copy of the base, as train.py does. epochs: in multiples of the world's.

    connection: in training; "matrix": looped, own H with W = 1, both passes differentiated.
    retention: weight of a term that is not in the paper. It keeps the unconnected pass as it was, by
        cross-entropy on the base's answer, the English word; kl: on the base's probabilities.
    """
    cc = CCTuning(replace(base.config, source_layer=source))
    cc.lm.load_state_dict(base.state_dict())
    cc.transform_matrix.weight = torch.eye(base.config.hidden_size)  # for looped training
    generator = torch.Generator().manual_seed(seed)
    for parameter in cc.decision_maker.parameters():
        torch.nn.init.normal_(parameter, std=0.02, generator=generator)
    samples, steps = world.samples("train", languages), []
    for epoch in range(epochs * world.size["epochs"]):
        steps += make_batches(samples, 32, seed, epoch)
    optimizer = torch.optim.AdamW(cc.parameters(), betas=(0.9, 0.999), weight_decay=0.0, fused=True)
    for step, numbers in enumerate(steps):
        batch = collate([samples[i] for i in numbers], -1)
        noise = gumbel_noise([(seed, step, i) for i in numbers], base.config.num_hidden_layers)
        loss, _ = cc(batch, connection, noise, english_grad=connection == "matrix")
        if retention:
            target = answer_logits(base, batch.ids, batch.position)
            target = target.softmax(-1) if kl else target.argmax(-1)  # the base is always right
            now = answer_logits(cc.lm, batch.ids, batch.position)
            loss = loss + retention * F.cross_entropy(now, target, reduction="sum")
        update(cc, optimizer, loss / len(numbers), learning_rate(step, len(steps), lr))
    return cc.requires_grad_(False)


def collect(lm, base, batch):
    """H (L, B, d) of three passes: the prompts by lm and by the base, their English versions by lm."""
    passes = ((lm, batch.ids, batch.position), (base, batch.ids, batch.position),
              (lm, batch.english_ids, batch.english_position))
    return [model(model.embed(ids), collect_at=p).activations for model, ids, p in passes]


def evaluate(base, cc, world, batch, seed):
    """{column: value}. The matrices are fitted on 1000 of the training prompts."""
    samples, matrix, from_base = world.samples("train"), TransformMatrix(), TransformMatrix()
    order = np.random.default_rng(seed).permutation(len(samples))[:1000]
    own, untouched, english = collect(cc.lm, base, collate([samples[i] for i in order], -1))
    for w, h in ((matrix, own), (from_base, untouched)):
        w.add(h, english)
        w.solve()
    embedding = cc.lm.embed(select_positions(batch.ids, batch.position))

    def exact(h=None):  # h (L, B, d): what the Decision Maker picks from. None: unconnected
        fusion = h if h is None else Fusion(cc.decision_maker(h, embedding)[0], batch.position)
        guess = answer_logits(cc.lm, batch.ids, batch.position, fusion).argmax(-1)
        return 100 * (guess == batch.ids[:, -1]).float().mean().item()  # the answer, after p

    own, untouched, english = collect(cc.lm, base, batch)
    return {"matrix": exact(matrix(own)), "real English": exact(english), "none": exact(),
            "identity": exact(own), "untouched": exact(from_base(untouched)),
            "R^2": matrix.r_squared(own, english).tolist()}


def row(name, settings, seed, runs):
    """A line of a Markdown table: means, and standard deviations of several runs."""
    cells = [name, f"{settings['lr']:g}", str(settings.get("source", "")), str(seed)]
    for column in COLUMNS:
        values = [run[column] for run in runs]
        spread = f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
        is_sft = settings.get("connection") == "none" and column != "none"
        cells.append("" if is_sft else f"{np.mean(values):.1f}{spread}")
    layers = zip(*(run["R^2"] for run in runs), strict=True)
    cells.append(" ".join(f"{np.mean(layer):.2f}" for layer in layers))
    return f"| {' | '.join(cells)} |"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--bases", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--search", action="store_true")
    parser.add_argument("--toy", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for number in args.bases:
        world, part = World(TOY if args.toy else SIZE, number), "dev" if args.search else "test"
        (base, right), batch = train_base(world, number), collate(world.samples(part), -1)
        print(f"\nBase {number} answers {right:.1%} of what it learnt. Scores on {part} facts.\n")
        print(f"| | lr | layer | seed | {' | '.join(COLUMNS)} | R^2 |\n|{10 * '---|'}")
        for name, chosen in METHODS.items():
            layers = (0, 1) if "source" in chosen else ("decision_maker",)
            tries = [chosen | {"lr": lr, "source": layer} for layer in layers for lr in RATES]
            for settings in tries if args.search else [chosen]:
                runs = []
                for seed in args.seeds:
                    runs.append(evaluate(base, tune(base, world, seed, **settings), world, batch, seed))
                    print(row(name, settings, seed, runs[-1:]), flush=True)
                if len(runs) > 1:
                    print(row(f"**{name}**", settings, "mean", runs))


if __name__ == "__main__":
    main()
