"""Make the built-in default from the Unicode CLDR: questions and answers in eleven languages, and a base
model that reads them all.

    pip install babel==2.18.0
    python data/make_default.py              # train.jsonl, dev.jsonl, dev/facts, test/facts: always the same
    python data/make_default.py --pretrain   # base/: tokenizer and weights, about 20 minutes on two cores
    python train.py --out data/tuned         # tuned/

A fact is a territory with its currency (where only one is legal tender) or its official language (of several,
the one that CLDR names first: most people speak it). It is kept if CLDR names all of it in all eleven
languages. Questions are phrased so that any name fits in without being inflected.

Territories are split once into four parts, which share none:

    base     asked and answered in every language in the base model's text
    train    train.jsonl, in every language
    dev      to choose settings on
    test     to report

The base model's text also has every fact in English, in several phrasings, and all names as dictionary
lines ("Ujerumani = Germany"). So it reads eleven languages and knows most facts in English alone, as large
models do.
"""
import argparse
import io
import json
import math
import random
import sys
from pathlib import Path

DATA = Path(__file__).resolve().parent
sys.path.insert(0, str(DATA.parent))
LANGS = ("en", "ar", "de", "es", "fr", "hi", "id", "pt", "sw", "tr", "zh")
PARTS = (("base", 0.4), ("train", 0.3), ("dev", 0.1), ("test", 0.2))
QUESTIONS = {
    "currency": {
        "en": "What is the currency of {x}?",
        "ar": "ما هي عملة {x}؟",
        "de": "Welche Währung gilt in diesem Gebiet: {x}?",
        "es": "¿Cuál es la moneda de {x}?",
        "fr": "Quelle est la monnaie du territoire suivant : {x} ?",
        "hi": "{x} की मुद्रा क्या है?",
        "id": "Apa mata uang {x}?",
        "pt": "Qual é a moeda deste território: {x}?",
        "sw": "Sarafu ya {x} ni nini?",
        "tr": "{x} hangi para birimini kullanır?",
        "zh": "{x}的货币是什么？",
    },
    "language": {
        "en": "What is the official language of {x}?",
        "ar": "ما هي اللغة الرسمية في {x}؟",
        "de": "Welche Amtssprache gilt in diesem Gebiet: {x}?",
        "es": "¿Cuál es el idioma oficial de {x}?",
        "fr": "Quelle est la langue officielle du territoire suivant : {x} ?",
        "hi": "{x} की आधिकारिक भाषा क्या है?",
        "id": "Apa bahasa resmi {x}?",
        "pt": "Qual é a língua oficial deste território: {x}?",
        "sw": "Lugha rasmi ya {x} ni ipi?",
        "tr": "{x} hangi resmî dili kullanır?",
        "zh": "{x}的官方语言是什么？",
    },
}
ENGLISH = {  # further phrasings, for the base model alone; a line break separates question and answer
    "currency": ("Which currency is used in {x}?\n{y}", "The currency of {x} is the {y}.",
                 "In {x}, people pay with the {y}.", "Currency of {x}: {y}"),
    "language": ("Which language is official in {x}?\n{y}", "The official language of {x} is {y}.",
                 "In {x}, the official language is {y}.", "Official language of {x}: {y}"),
}
SHAPE = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 6, "num_attention_heads": 6,
         "num_key_value_heads": 3}
STEPS, TOKENS, LEARNING_RATE = 8000, 1024, 2e-3  # of the base model's training; TOKENS a step, about


# ------------------------------------------------------------------------------------------- corpus

def read_cldr():
    """names {(kind, code): {lang: name}} and facts [(territory, kind, code of the answer)].

    Only what has a name in all of LANGS.
    """
    from babel import Locale
    from babel.languages import get_official_languages
    from babel.numbers import get_territory_currencies
    locales = {lang: Locale.parse(lang) for lang in LANGS}
    names = {}
    for kind, table in (("territory", "territories"), ("currency", "currencies"), ("language", "languages")):
        for code in sorted(getattr(locales["en"], table)):
            found = {lang: getattr(locale, table).get(code) for lang, locale in locales.items()}
            if all(found.values()):
                names[kind, code] = found
    facts = []
    for kind, territory in list(names):
        if kind == "territory" and len(territory) == 2:
            currencies = get_territory_currencies(territory)
            languages = get_official_languages(territory, de_facto=True)
            if len(currencies) == 1 and ("currency", currencies[0]) in names:
                facts.append((territory, "currency", currencies[0]))
            if languages and ("language", languages[0]) in names:
                facts.append((territory, "language", languages[0]))
    used = {("territory", t) for t, _, _ in facts} | {(kind, code) for _, kind, code in facts}
    return {key: name for key, name in names.items() if key in used}, facts


def split(facts):
    """{part: its facts}: every territory in one part only."""
    territories = sorted({territory for territory, _, _ in facts})
    random.Random(0).shuffle(territories)
    parts, start = {}, 0.0
    for part, share in PARTS:
        own = set(territories[round(start * len(territories)):round((start + share) * len(territories))])
        parts[part], start = [fact for fact in facts if fact[0] in own], start + share
    return parts


def ask(names, fact, lang):
    """A fact as (question, answer) in a language."""
    territory, kind, code = fact
    return QUESTIONS[kind][lang].format(x=names["territory", territory][lang]), names[kind, code][lang]


def sample(names, fact, lang):
    """A fact in the training schema."""
    question, answer = ask(names, fact, lang)
    english, _ = ask(names, fact, "en")
    return {"instruction": question, "output": answer, "instruction_en": english, "lang": lang}


def base_text(names, parts):
    """The base model's text as {what: lines}; in a line, a line break stands between question and answer."""
    facts = [fact for part in parts.values() for fact in part]
    english = ["\n".join(ask(names, fact, "en")) for fact in facts]
    for fact in facts:
        values = {"x": names["territory", fact[0]]["en"], "y": names[fact[1:]]["en"]}
        english += [phrase.format(**values) for phrase in ENGLISH[fact[1]]]
    others = [lang for lang in LANGS if lang != "en"]
    called = {lang: names["language", lang]["en"] for lang in others}
    dictionary = []
    for name in names.values():
        for lang in others:
            dictionary.append(f"{name[lang]} = {name['en']}")
            dictionary.append(f"{name['en']} in {called[lang]} = {name[lang]}")
    return {
        "english": english,
        "dictionary": dictionary,
        "questions": ["\n".join(ask(names, fact, lang)) for fact in parts["base"] for lang in others],
        "translations": [f"{ask(names, fact, lang)[0]} = {ask(names, fact, 'en')[0]}"
                         for fact in parts["base"] for lang in others],
    }


def write_json_lines(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(value, ensure_ascii=False) + "\n" for value in values]
    path.write_text("".join(lines), encoding="utf-8")


def write_corpus(folder, names, parts):
    """train.jsonl and dev.jsonl in the training schema; dev/facts, test/facts in the benchmarks' layout."""
    for part in ("train", "dev"):
        samples = [sample(names, fact, lang) for fact in parts[part] for lang in LANGS]
        write_json_lines(folder / f"{part}.jsonl", samples)
    for part in ("dev", "test"):
        for lang in LANGS:
            questions, answers = zip(*(ask(names, fact, lang) for fact in parts[part]), strict=True)
            prompts = [{"instruction": question} for question in questions]
            write_json_lines(folder / part / "facts" / "split" / f"{lang}.json", prompts)
            write_json_lines(folder / part / "facts" / "ans" / f"{lang}.json", answers)


# --------------------------------------------------------------------------------------- base model

def write_tokenizer(folder, text):
    """A SentencePiece model of 4000 pieces, bytes standing in for rare characters."""
    import sentencepiece
    model, sentences = io.BytesIO(), []
    for lines in text.values():
        sentences += "\n".join(lines).split("\n")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_writer=model, model_type="bpe", vocab_size=4000,
        byte_fallback=True, character_coverage=0.9995, normalization_rule_name="identity",
        remove_extra_whitespaces=False, minloglevel=2)
    (folder / "tokenizer.model").write_bytes(model.getvalue())


def pretrain(folder, text):
    """Train a Llama on the text, as next-token prediction with a line in a row, and save it in bfloat16."""
    import torch
    import torch.nn.functional as F
    from tqdm import tqdm
    from model import Config, Tokenizer, Transformer, pad, save_checkpoint

    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder, text)
    (folder / "config.json").write_text(json.dumps({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 4000, **SHAPE,
        "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
        "tie_word_embeddings": True, "initializer_range": 0.02, "bos_token_id": 1, "eos_token_id": 2,
        "torch_dtype": "bfloat16"}, indent=2))
    config = Config.read(folder)
    tokenizer = Tokenizer(folder, config)

    def encode(line):
        question, _, answer = line.rpartition("\n")
        return (tokenizer.prompt(question) if question else [tokenizer.bos]) + tokenizer.answer(answer)
    rows = [encode(line) for lines in text.values() for line in lines]

    torch.manual_seed(0)
    lm = Transformer(config)
    for name, p in lm.named_parameters():
        if p.dim() == 2:  # what writes to the residual stream starts smaller (GPT-2)
            writes = name.endswith(("o_proj.weight", "down_proj.weight"))
            smaller = math.sqrt(2 * config.num_hidden_layers) if writes else 1
            torch.nn.init.normal_(p, std=config.initializer_range / smaller)
    optimizer = torch.optim.AdamW(lm.parameters(), betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    rng, batches = random.Random(0), []
    with tqdm(total=STEPS, desc="base model") as progress:
        for step in range(STEPS):
            if not batches:  # an epoch: rows of similar length together, as many as make a step
                rng.shuffle(rows)
                batch = []
                for row in sorted(rows, key=lambda row: len(row) + rng.random()):
                    if (len(batch) + 1) * len(row) > TOKENS:
                        batches.append(batch)
                        batch = []
                    batch.append(row)
                batches.append(batch)
                rng.shuffle(batches)
            ids, lengths = pad(batches.pop())
            cosine = 0.5 + 0.5 * math.cos(math.pi * step / STEPS)
            optimizer.param_groups[0]["lr"] = LEARNING_RATE * min((step + 1) / 200, cosine)
            targets = ids[:, 1:].masked_fill(torch.arange(1, ids.shape[1]) >= lengths[:, None], -100)
            hidden = lm(lm.embed(ids)).hidden[:, :-1]
            loss = F.cross_entropy(lm.logits(hidden).flatten(0, 1), targets.flatten())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            progress.update()
            if (step + 1) % 200 == 0:
                progress.write(f"step {step + 1:>5}/{STEPS}  loss {loss.item():.4f}")
    weights = {name: p.detach().to(torch.bfloat16) for name, p in lm.named_parameters()}
    save_checkpoint(folder, folder, weights, {"template": "plain"})


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--pretrain", action="store_true", help="train the base model too")
    parser.add_argument("--out", type=Path, default=DATA, metavar="DIR",
                        help="folder to write to (default: the one this script is in)")
    args = parser.parse_args()
    names, facts = read_cldr()
    parts = split(facts)
    write_corpus(args.out, names, parts)
    text = base_text(names, parts)
    print(f"{len(facts)} facts: " + ", ".join(f"{len(part)} {name}" for name, part in parts.items()))
    print("lines for the base model: " + ", ".join(f"{len(lines)} {what}" for what, lines in text.items()))
    if args.pretrain:
        pretrain(args.out / "base", text)


if __name__ == "__main__":
    main()
