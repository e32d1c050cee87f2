"""Answer prompts with a CC-tuned checkpoint (or a plain one), connected through its Transform Matrix.

    python infer.py --lang sw                                                      # questions of the embedded default
    python infer.py --model DIR --lang sw --prompt "Nini mji mkuu wa Kenya?"
    python infer.py --model DIR --lang sw --input FILE.jsonl --output FILE.jsonl   # "instruction" in, "answer" added
    cat questions.txt | python infer.py --model DIR --lang sw --prompt -           # a prompt a line, an answer a line

In the letters of cctuning.py, what happens to a prompt:
    Engine.prompt      text to ids: the chat template, one BOS                                 (T,)
    Engine.generate    prompts of like length together, right-padded                           (B, T)
    CCTuning.prefill   a pass fills the cache and gives H at the connection position           (L, B, d)
                       H W, of which the Decision Maker picks one layer's vector               (B, d)
                       the tokens from the connection position on, one to three, run again
                       with that vector added in the first layer: logits of the next token     (B, V)
    pick               the token                                                               (B,)
    Engine.generate    token after token against the cache, until each row's end of turn
"""
import argparse
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from tqdm import tqdm

from cctuning import load_cctuning
from model import (TEMPLATES, Config, Help, Tokenizer, UserError, at_least, check_folder, english_version, holds_model,
                   instruction, new_cache, pad, read_json_lines, read_records, run_script, text_field, write_text)

DATA = Path(os.path.relpath(Path(__file__).resolve().parent / "data"))
WHICH_MODEL = "out, where you have trained one, else the embedded data/tuned"  # default_model, in words
LANGUAGES = "ar bn de el en es eu fr hi id ja ko pt ru sw te th tr ur vi yo zh".split()  # of the paper's evaluation


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\nIn the letters")[0], formatter_class=Help)
    add = parser.add_argument
    add("--model", metavar="DIR", help=f"checkpoint folder; a plain one answers unconnected (default: {WHICH_MODEL})")
    add("--lang", metavar="CODE", help="language of the prompts where their lines have no \"lang\"; it picks the "
        "matrix with --matrix per_language, and the questions of the embedded default")
    add("--prompt", metavar="TEXT", help="a prompt, or - for a prompt per line of standard input")
    add("--prompt_en", metavar="TEXT", help="its English version, for --connection english")
    add("--input", metavar="FILE", help="prompts as JSON lines or a JSON list: \"instruction\", optional "
        "\"instruction_en\", \"lang\" and \"input\"")
    add("--output", metavar="FILE", help="where the lines of --input go, with \"answer\" added (default: standard "
        "output)")
    add("--explain", action="store_true", help="show the chosen layer and the Decision Maker's probabilities")
    add_engine_options(parser)
    add("--temperature", type=at_least(0, float), default=0.0, metavar="X", help="of sampling; 0: the likeliest token")
    add("--top_p", type=at_least(0, float), default=1.0, metavar="X", help="sample among the likeliest tokens that "
        "have this probability together")
    add("--seed", type=at_least(0), default=0, metavar="N", help="of sampling; other prompts do not change an answer")
    return parser.parse_args(argv)


def add_engine_options(parser, connections=None):
    """What infer.py and eval.py have in common. connections: "+" where several may be given."""
    add = parser.add_argument
    add("--connection", nargs=connections, choices=("matrix", "english", "none"), help="matrix: from the prompt "
        "itself, through the Transform Matrix; english: from its instruction_en, the bound of what a matrix can give; "
        "none: the plain model (default: matrix, where there is one)")
    add("--matrix", choices=("shared", "per_language"), default="shared", help="one for all, as in the paper, or the "
        "language's own")
    add("--max_new_tokens", type=at_least(1), default=256, metavar="N", help="length of an answer at most")
    add("--batch_size", type=at_least(1), default=16, metavar="N", help="prompts answered together")
    add("--template", choices=TEMPLATES, help="chat template (default: told by the checkpoint)")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="of the computation (default: as the weights are "
        "stored)")


def default_model():
    """The folder to answer from where none is given."""
    folder = "out" if holds_model("out") else str(DATA / "tuned")
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"model: {folder}", file=sys.stderr)
    return folder


# ------------------------------------------------------------------------------------------------------- the prompts

def read_prompts(args):
    """[(record, file:line)] to answer: of --prompt, standard input or --input; without these the embedded questions."""
    if args.prompt is None and args.input is None:
        return embedded_questions(args.lang or "sw")
    if args.input:
        return [(record, f"{args.input}:{line}") for line, record in read_records(args.input)]
    if args.prompt != "-":
        return [({"instruction": args.prompt, "instruction_en": args.prompt_en}, "--prompt")]
    try:
        text = sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"standard input: not UTF-8 text ({error.reason}); convert it to UTF-8") from None
    if not text:
        raise UserError("standard input: is empty; give a prompt per line")
    lines = text.removesuffix("\n").split("\n")
    return [({"instruction": line}, f"standard input:{i}") for i, line in enumerate(lines, 1)]


def embedded_questions(lang):
    """[(record, file:line)] of a few held-out questions of data/ in a language, with the right answers."""
    folder = DATA / "test" / "facts"
    if not (folder / "split" / f"{lang}.json").exists():
        has = " ".join(sorted(path.stem for path in (folder / "split").glob("*.json")))
        raise UserError(f"--lang: the embedded questions are in {has}; give one of these, or --prompt TEXT")
    files = (f"split/{lang}.json", "split/en.json", f"ans/{lang}.json")
    own, english, gold = (read_json_lines(folder / name) for name in files)
    return [({**own[i][1], "instruction_en": english[i][1]["instruction"], "right": gold[i][1]},
             f"{folder}/split/{lang}.json:{own[i][0]}") for i in range(0, len(own), 15)]


@dataclass
class Prompt:
    ids: list                        # (T,)
    english_ids: list | None = None  # (Te,), for --connection english
    matrix_name: str = "shared"
    number: int = 0                  # its place in the input


@dataclass
class Answer:
    ids: list
    probabilities: list | None = None  # (L,), the Decision Maker's; None where unconnected

    @property
    def layer(self):
        return None if self.probabilities is None else int(np.argmax(self.probabilities))


# -------------------------------------------------------------------------------------------------------- the engine

class Engine:
    """A loaded checkpoint and how it is to be connected."""

    def __init__(self, folder, connection=None, matrix="shared", template=None, dtype=None, single=False):
        """connection, matrix, template, dtype: as the options of these names.  single: for one prompt at a time.

        Raises UserError for a folder that is no checkpoint, or lacks what the connection needs.
        """
        self.config, self.folder, self.matrix = Config.read(folder), folder, matrix
        self.tokenizer = Tokenizer(folder, self.config, template)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.cc = load_cctuning(folder, dtype and getattr(torch, dtype), device)
        float32 = self.cc.lm.model.embed_tokens.weight.dtype == torch.float32
        if device == "cpu" and torch.backends.mkldnn.is_available() and not (single and float32):
            pack(self.cc.lm)
        self.notices = [self.tokenizer.notice] if self.tokenizer.notice else []  # that the user should know; no errors
        self.connect(connection or self.default_connection())

    def can_connect(self, connection):
        return connection == "none" or (self.cc.trained if connection == "english" else bool(self.cc.matrices))

    def default_connection(self):
        """By the matrix where there is one."""
        if self.cc.matrices:
            return "matrix"
        lacks = "no cctuning.safetensors"
        if self.cc.trained:
            lacks = "no Transform Matrix (train.py --epochs 0 fits one)"
        self.notices.append(f"{self.folder}: {lacks}, answering as a plain model")
        return "none"

    def connect(self, connection):
        """Answer by this connection from now on. Raises UserError where the checkpoint lacks what it needs."""
        if not self.can_connect(connection):
            lacks = "no Transform Matrix; fit one with train.py --epochs 0, or use --connection none"
            if connection == "english":
                lacks = "no Decision Maker to connect with; train it with train.py, or use --connection none"
            raise UserError(f"{self.folder}: has {lacks}")
        if connection == "matrix" and self.matrix == "per_language" and len(self.cc.matrices) == 1:
            raise UserError(f"{self.folder}: has no matrix of any language; fit them with train.py --epochs 0 "
                            "--per_language, or use --matrix shared")
        self.connection = connection

    def prompt(self, own, english=None, lang=None, number=0, where="prompt"):
        """Encode a prompt; where: its file:line. Raises UserError for what cannot be answered."""
        name = lang if self.matrix == "per_language" and lang in self.cc.matrices else "shared"
        if self.matrix == "per_language" and name == "shared" and self.connection == "matrix":
            notice = f"{self.folder}: has no matrix for {lang or 'prompts without a language'}, the shared one is used"
            self.notices += [] if notice in self.notices else [notice]
        prompt = Prompt(self.tokenizer.prompt(own), None, name, number)
        if self.connection == "english":
            if not english or not english.strip():
                raise UserError(f"{where}: --connection english needs the prompt's English version; give "
                                "instruction_en or --prompt_en")
            prompt.english_ids = self.tokenizer.prompt(english)
        for ids in (prompt.ids, prompt.english_ids or []):
            if len(ids) >= self.config.max_length:
                raise UserError(f"{where}: is {len(ids)} tokens long, the model takes {self.config.max_length} with "
                                "the answer; shorten it")
        return prompt

    def answer_all(self, prompts, batch_size, *options, progress=None, rank=0, world=1):
        """The Answers to any number of Prompts, in batches of like length; options: of generate.

        Of several processes each answers its share of the batches, the same ones whatever their number, and has None
        for the others' prompts.
        """
        answers = [None] * len(prompts)
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i].ids))
        for start in range(rank * batch_size, len(order), world * batch_size):
            part = order[start:start + batch_size]
            *_, found = self.generate([prompts[i] for i in part], *options)
            for i, answer in zip(part, found, strict=True):
                answers[i] = answer
            if progress is not None:
                progress.update(len(part))
        return answers

    @torch.inference_mode()
    def generate(self, prompts, max_new_tokens, temperature=0.0, top_p=1.0, seed=0):
        """Answer a batch of Prompts. Yields the same list of Answers after each token, grown; stopped rows drop out."""
        cc, device = self.cc, self.cc.decision_maker.weight.device
        limits = [min(max_new_tokens, self.config.max_length - len(p.ids)) for p in prompts]
        ids, lengths = (t.to(device) for t in pad([p.ids for p in prompts]))  # (B, T), (B,)
        dtype, length = cc.lm.model.embed_tokens.weight.dtype, ids.shape[1] + max(limits)
        cache = new_cache(self.config, len(prompts), length, dtype, device)  # (L, 2, B, kv, length, D)
        english = None
        if self.connection == "english":
            english = [t.to(device) for t in pad([p.english_ids for p in prompts])]
        names = [p.matrix_name for p in prompts]
        index = self.tokenizer.connection_index
        logits, scores = cc.prefill(ids, lengths, index, cache, self.connection, names, english)  # (B, V), (B, L)

        probabilities = [None] * len(prompts) if scores is None else scores.float().softmax(-1).tolist()
        answers = [Answer([], p) for p in probabilities]
        randoms = [np.random.default_rng((seed, p.number)) for p in prompts]
        live = list(range(len(prompts)))  # the prompts behind the rows that are left
        while True:
            tokens, keep = pick(logits, temperature, top_p, [randoms[i] for i in live]), []  # (B,), rows to go on with
            for row, (i, token) in enumerate(zip(live, tokens.tolist(), strict=True)):
                if token not in self.tokenizer.stop:
                    answers[i].ids.append(token)
                    if len(answers[i].ids) < limits[i]:
                        keep.append(row)
            yield answers
            if not keep:
                return
            if len(keep) < len(live):
                live, rows = [live[row] for row in keep], torch.tensor(keep, device=device)
                tokens, lengths, cache = tokens[rows], lengths[rows], cache[:, :, rows]  # B is now len(keep)
            x, _ = cc.lm(tokens[:, None], positions=lengths[:, None], cache=cache)  # (B, 1, d)
            logits, lengths = cc.lm.logits(x[:, -1]), lengths + 1

    def explain(self, answer):
        """A line on where the connection came from."""
        if answer.layer is None:
            return "[unconnected]"
        layers, chances = len(answer.probabilities), " ".join(f"{p:.2f}" for p in answer.probabilities)
        return f"[connection {self.connection}: from layer {answer.layer} of 0-{layers - 1}; probabilities {chances}]"


def pick(logits, temperature, top_p, randoms):
    """The next token of each row (B,) from logits (B, V), by nucleus sampling (arXiv 1904.09751).

    randoms: each row's own, so that its neighbours do not matter.
    """
    if temperature == 0:
        return logits.argmax(-1)
    chances, tokens = (logits.float() / temperature).softmax(-1).sort(-1, descending=True)  # (B, V)
    below = chances.cumsum(-1) - chances  # probability of all likelier tokens
    chances = chances.masked_fill((below >= top_p) & (below > 0), 0)  # the likeliest always stays
    uniform = torch.tensor([[r.random()] for r in randoms], device=logits.device)  # (B, 1)
    rank = (chances.cumsum(-1) <= uniform * chances.sum(-1, keepdim=True)).sum(-1, keepdim=True)  # (B, 1)
    return tokens.gather(1, rank.clamp(max=(chances > 0).sum(-1, keepdim=True) - 1))[:, 0]


def pack(lm):
    """Lay a model's weights out as oneDNN's matrix products read them, for answering on a CPU. It cannot train after.

    A decoding step multiplies a few rows with every weight once; from weights as they lie, MKL reaches a third of the
    memory's speed in that (but all of it with a single float32 row). Weights in float16, or in bfloat16 where the CPU
    has no instructions for it, are widened to float32, which is exact, and each product is rounded back.
    (torch.compile's freezing uses the same operators; they have no public name.)
    """
    lm.requires_grad_(False)
    if lm.lm_head is None:  # tied: the embedding stays as it is for looking tokens up
        lm.lm_head = nn.Linear(lm.config.hidden_size, lm.config.vocab_size, bias=False, device="meta")
        lm.lm_head.weight = lm.model.embed_tokens.weight
    for linear in [module for module in lm.modules() if isinstance(module, nn.Linear)]:
        dtype, weight, bias = linear.weight.dtype, linear.weight, linear.bias
        if dtype != torch.bfloat16 or not torch.cpu._is_avx512_bf16_supported():
            weight, bias = weight.float(), None if bias is None else bias.float()
        weight, linear.weight = torch.ops.mkldnn._reorder_linear_weight(weight), None
        linear.forward = lambda x, w=weight, b=bias, dtype=dtype, wide=weight.dtype: (
            torch.ops.mkldnn._linear_pointwise(x.to(wide), w, b, "none", [], "").to(dtype))
    for p in lm.parameters():  # those left still lie in the mapped file and would keep all of it resident
        p.data = p.data.clone()


# -------------------------------------------------------------------------------------------------------------- main

def check_args(args):
    """Refuse options that do not go together, and an output that could not be written."""
    if args.prompt is not None and args.input is not None:
        raise UserError("--prompt: give either --prompt TEXT (or - for standard input) or --input FILE, not both")
    if args.prompt_en is not None and (args.prompt in (None, "-") or args.connection != "english"):
        raise UserError("--prompt_en: goes with --prompt TEXT and --connection english; lines of --input have their "
                        "own instruction_en")
    if args.output and not args.input:
        raise UserError("--output: goes with --input; the answer to --prompt is printed")
    if args.output:
        check_folder(Path(args.output).parent)
        if Path(args.output).is_dir() or Path(args.output).resolve() == Path(args.input).resolve():
            raise UserError(f"{args.output}: is a folder, or the input itself; choose another --output")


def stream(engine, prompt, options, explain):
    """Print one answer as it grows.

    Decoded token by token, it would lose spaces and split characters: all of it is decoded each time, and what is new
    is printed unless it ends in half a character (U+FFFD).
    """
    shown = text = ""
    for (answer,) in engine.generate([prompt], *options):
        if explain:
            print(engine.explain(answer))
            explain = False
        text = engine.tokenizer.decode(answer.ids)
        if not text.endswith("\ufffd"):
            print(text[len(shown):], end="", flush=True)
            shown = text
    print(text[len(shown):])


def write_lines(path, records):
    """Write JSON lines, whole or not at all."""
    try:
        write_text(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); choose another place") from None


def main():
    args = parse_args()
    check_args(args)
    args.model = args.model or default_model()
    records = read_prompts(args)
    texts = [(instruction(r, where), english_version(r, where, required=False),
              text_field(r, "lang", where, required=False), where) for r, where in records]
    brought = Config.read(args.model).cctuning.get("languages", [])  # by the training data
    known = {*LANGUAGES, *brought, *(lang for _, _, lang, _ in texts if lang)}
    if args.lang and args.lang not in known:
        raise UserError(f"--lang: unknown language {args.lang!r}; give one of {' '.join(sorted(known))}")
    single = min(len(texts), args.batch_size) == 1
    engine = Engine(args.model, args.connection, args.matrix, args.template, args.dtype, single)
    prompts = [engine.prompt(own, english, lang or args.lang, number, where)
               for number, (own, english, lang, where) in enumerate(texts)]
    for notice in engine.notices:
        print(notice, file=sys.stderr)
    options = args.max_new_tokens, args.temperature, args.top_p, args.seed

    if args.prompt not in (None, "-"):
        return stream(engine, prompts[0], options, args.explain)
    with tqdm(total=len(prompts), desc="answers", unit="prompt", disable=None) as progress:
        answers = engine.answer_all(prompts, args.batch_size, *options, progress=progress)
    done = []
    for (record, _), answer in zip(records, answers, strict=True):
        text = engine.tokenizer.decode(answer.ids)
        if args.input:
            explained = {"layer": answer.layer, "probabilities": answer.probabilities} if args.explain else {}
            done.append({**record, "answer": text, **explained})
        else:
            line = text.replace("\n", "\\n")
            if "right" in record:
                line = f"{record['instruction']}  {line}  [right: {record['right']}]"
            print(line + (f"  {engine.explain(answer)}" if args.explain else ""))
    if args.output:
        write_lines(args.output, done)
    else:
        for record in done:
            print(json.dumps(record, ensure_ascii=False))


if __name__ == "__main__":
    run_script(main)
