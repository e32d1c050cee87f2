"""Answer prompts with a CC-tuned checkpoint (or a plain one), connected through its Transform Matrix.

    python infer.py --lang sw                                      # questions of the embedded default
    python infer.py --model DIR --prompt "Nini mji mkuu wa Kenya?"
    python infer.py --model DIR --input FILE.jsonl --output FILE.jsonl  # "instruction" in, "answer" added
    cat questions.txt | python infer.py --model DIR --prompt -     # a prompt per line, an answer per line

In the symbols of cctuning.py, what happens to a prompt:
    Engine.encode      text to ids: the chat template, one BOS                                 (T,)
    Engine.generate    prompts of similar length together, right-padded                        (B, T)
    CCTuning.prefill   a pass fills the KV cache and gives H at the connection position        (L, B, d)
                       H W, of which the Decision Maker picks one layer's vector               (B, d)
                       the tokens from the connection position on run again with that vector
                       added in the fusion layer: logits of the next token                     (B, V)
    sample_next_token  the token                                                               (B,)
    Engine.generate    token by token against the cache, until each row's end of turn
"""
import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from cctuning import CCTuning, load_cctuning
from model import (DATA, TEMPLATE_NAMES, Config, Help, KVCache, Record, Tokenizer, UserError, at_least,
                   check_writable, choose_device, error_line, file_path, holds_model, pad, printable,
                   process_ranks, read_json_lines, read_records, relative, run_script, write_text)

WHICH_MODEL = "out if it holds one, else the embedded data/tuned"  # default_model, in words
LANGUAGES = "ar bn de el en es eu fr hi id ja ko pt ru sw te th tr ur vi yo zh".split()  # the paper's


def parse_args(argv=None):
    docstring = __doc__.partition("\n\nIn the symbols")[0]
    parser = argparse.ArgumentParser(description=docstring, formatter_class=Help)
    add = parser.add_argument
    add("--model", type=file_path, metavar="DIR", help=f"checkpoint folder (default: {WHICH_MODEL})")
    add("--lang", metavar="CODE", help="language of the embedded questions; no effect on prompts of your own")
    add("--prompt", metavar="TEXT", help="a prompt, or - for a prompt per line of standard input")
    add("--input", type=file_path, metavar="FILE", help="prompts as JSON lines or a JSON list (-: from "
        "standard input) of \"instruction\", optional \"instruction_en\", \"lang\" and \"input\"")
    add("--prompt_en", metavar="TEXT", help="English version of --prompt, for --connection english")
    add("--output", type=file_path, metavar="FILE",
        help="--input's lines with \"answer\" added (default: standard output)")
    add("--explain", action="store_true", help="show the chosen layer and the Decision Maker's probabilities")
    add_engine_options(parser, max_new_tokens=256)
    add("--temperature", type=at_least(0, float), default=0.0, metavar="X", help="0: greedy; above: sampling")
    add("--top_p", type=at_least(0, float), default=1.0, metavar="X",
        help="total probability of the most likely tokens to sample from")
    add("--seed", type=at_least(0), default=0, metavar="N", help="random seed for sampling")
    return parser.parse_args(argv)


def add_engine_options(parser, max_new_tokens=None, connections=None):
    """The options that infer.py and eval.py share. connections: "+" where several may be given."""
    add = parser.add_argument
    add("--connection", nargs=connections, choices=("matrix", "english", "none"), help="matrix: from the "
        "prompt, through the Transform Matrix; english: from its English version, the upper bound for the "
        "matrix; none: a plain model (default: matrix, if there is one)")
    by_task = "" if max_new_tokens else " (default: by task: summaries 128, options 24, others 32)"
    add("--max_new_tokens", type=at_least(1), default=max_new_tokens, metavar="N",
        help=f"maximum tokens of an answer{by_task}")
    add("--batch_size", type=at_least(1), default=16, metavar="N", help="prompts answered together")
    add("--template", choices=TEMPLATE_NAMES, help="chat template (default: the checkpoint's)")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="compute dtype (default: as stored)")


def default_model():
    """The folder used without --model. Prints its name."""
    folder = "out" if holds_model("out") else relative(DATA / "tuned")
    if process_ranks()[0] == 0:
        print(f"model: {folder}", file=sys.stderr)
    return folder


# ------------------------------------------------------------------------------------------- the prompts

def read_prompts(args):
    """The Records of --prompt, standard input or --input; without these, of the embedded questions."""
    if args.input:
        return read_records(args.input)
    if args.prompt is None:
        return embedded_questions(args.lang or "sw")
    if args.prompt != "-":
        return [Record.parse({"instruction": args.prompt, "instruction_en": args.prompt_en}, "--prompt")]
    try:
        text = sys.stdin.buffer.read().decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise UserError(f"standard input: not UTF-8 text ({error.reason}); convert it to UTF-8") from None
    records = [Record.parse({"instruction": line}, f"standard input:{n}")
               for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not records:
        raise UserError("standard input: is empty; give a prompt per line")
    return records


def embedded_questions(lang):
    """A few held-out questions of data/ in a language; `answer` is the right one."""
    folder = DATA / "test" / "facts"
    if not (folder / "split" / f"{lang}.json").exists():
        known = " ".join(sorted(path.stem for path in (folder / "split").glob("*.json")))
        raise UserError(f"--lang: the embedded questions are in {known}; give one of these, or --prompt TEXT")
    own, english = (read_records(folder / "split" / f"{code}.json") for code in (lang, "en"))
    gold = read_json_lines(folder / "ans" / f"{lang}.json")
    return [own[i]._replace(english=english[i].prompt, answer=gold[i][1]) for i in range(0, len(own), 15)]


@dataclass
class Prompt:
    ids: list                        # (T,)
    english_ids: list | None = None  # (Te,), for --connection english
    number: int = 0                  # its place in the input
    forms: dict | None = None        # {option: [ids of a form of it, end of turn included]}, to score


@dataclass
class Answer:
    ids: list
    probabilities: list | None = None  # (L,) the Decision Maker's; None: no connection, or a mean
    likelihood: dict | None = None     # {option: log-probability of giving it in any of its forms, in nats}

    @property
    def layer(self):
        return None if self.probabilities is None else int(np.argmax(self.probabilities))


# -------------------------------------------------------------------------------------------- the engine

class Engine:
    """A loaded checkpoint and its connection.

    connection, template, dtype: as the options of these names.  single: for one prompt at a time.
    notices: lines to show the user. Raises UserError for a folder that lacks what the connection needs.
    """

    def __init__(self, folder, connection=None, template=None, dtype=None, single=False):
        self.folder, self.config = folder, Config.read(folder)
        self.tokenizer = Tokenizer(folder, self.config, template)
        self.device = choose_device()
        with torch.device("meta"):
            self.cc = CCTuning(self.config)
        load_cctuning(self.cc, folder, dtype and getattr(torch, dtype), self.device)
        self.dtype = self.cc.lm.model.embed_tokens.weight.dtype
        if self.device.type == "cpu" and not (single and self.dtype == torch.float32):
            prepack_for_cpu(self.cc.lm)
        notices = self.tokenizer.notice, self.config.cctuning.get("matrix", {}).get("doubt")
        self.notices = [notice for notice in notices if notice]
        self.connect(connection)

    def lacks(self, connection):
        """What the checkpoint lacks for a connection (None: matrix), and the remedy; None if nothing."""
        if connection in (None, "matrix") and self.cc.transform_matrix.weight is None:
            if self.cc.trained:
                return "no Transform Matrix; fit one with train.py --epochs 0"
            return "no cctuning.safetensors, so no Transform Matrix; train with train.py"
        if connection == "english" and not self.cc.trained:
            return "no trained Decision Maker; train it with train.py"
        return None

    def connect(self, connection=None):
        """Use this connection from now on; None: the matrix, or none and a notice.

        Raises UserError if the checkpoint lacks what the connection needs.
        """
        problem = self.lacks(connection)
        if problem and connection:
            raise UserError(f"{self.folder}: {problem}, or use --connection none")
        if problem:
            self.notices.append(f"{self.folder}: {problem}; answering as a plain model")
        self.connection = connection or ("none" if problem else "matrix")

    def encode(self, record, number=0):
        """The Prompt of a Record. Raises UserError for what cannot be answered."""
        prompt = Prompt(self.tokenizer.prompt(record.prompt), None, number)
        if self.connection == "english":
            if not record.english or not record.english.strip():
                raise UserError(f"{record.where}: --connection english needs the prompt's English version; "
                                "give instruction_en or --prompt_en")
            prompt.english_ids = self.tokenizer.prompt(record.english)
        longest = max(len(prompt.ids), len(prompt.english_ids or []))
        if longest >= self.config.max_length:
            raise UserError(f"{record.where}: is {longest} tokens long, the model takes "
                            f"{self.config.max_length} with the answer; shorten it")
        return prompt

    def answer_all(self, prompts, batch_size, *options, progress=None, rank=0, world_size=1):
        """The Answers to Prompts, in batches of similar length; options: those of generate.

        Several processes take turns at the batches; each returns None for the others' prompts.
        """
        answers = [None] * len(prompts)
        order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i].ids))
        for start in range(rank * batch_size, len(order), world_size * batch_size):
            batch = order[start:start + batch_size]
            *_, found = self.generate([prompts[i] for i in batch], *options)
            for i, answer in zip(batch, found, strict=True):
                answers[i] = answer
            if progress is not None:
                progress.update(len(batch))
        return answers

    def prefill(self, prompts, room):
        """Read Prompts. Returns a KVCache with room for that many answer tokens, logits, scores."""
        ids, lengths = (t.to(self.device) for t in pad([p.ids for p in prompts]))  # (B, T), (B,)
        cache = KVCache(self.config, len(prompts), ids.shape[1] + room, self.dtype, self.device)
        english = None
        if self.connection == "english":
            english = [t.to(self.device) for t in pad([p.english_ids for p in prompts])]
        index = self.tokenizer.connection_index
        return cache, *self.cc.prefill(ids, lengths, index, cache, self.connection, english)

    def score_options(self, prompts, cache, logits):
        """{option: log-probability of answering with any of its forms} for each Prompt.

        logits (B, V): the prefill's, which predict a form's first token. Its other tokens run against the
        prefill's cache, at the positions after the prompt, a form of each prompt at a time. The next form, or
        the answer, overwrites their cache entries before it reads them.
        """
        length, scores = cache.length, [{} for _ in prompts]
        starts = torch.tensor([len(p.ids) for p in prompts], device=self.device)
        first = logits.float().log_softmax(-1)  # (B, V)
        forms = [[(option, form) for option, found in p.forms.items() for form in found] for p in prompts]
        forms = [sorted(found, key=lambda form: len(form[1])) for found in forms]  # little padding
        for step in range(max(map(len, forms))):
            rows = [found[min(step, len(found) - 1)] for found in forms]
            ids, lengths = (t.to(self.device) for t in pad([form for _, form in rows]))  # (B, F), (B,)
            offsets = torch.arange(ids.shape[1] - 1, device=self.device)
            cache.length = length + len(offsets)
            embeddings = self.cc.lm.embed(ids[:, :-1])  # (B, F - 1, d)
            x = self.cc.lm(embeddings, starts[:, None] + offsets, cache).hidden
            real = offsets + 1 < lengths[:, None]  # (B, F - 1)
            loss = F.cross_entropy(self.cc.lm.logits(x[real]).float(), ids[:, 1:][real], reduction="none")
            sums = first.gather(1, ids[:, :1])[:, 0]  # (B,)
            sums = sums.index_add(0, real.nonzero()[:, 0], loss, alpha=-1)
            for i, ((option, _), total) in enumerate(zip(rows, sums.tolist(), strict=True)):
                if step < len(forms[i]):
                    scores[i].setdefault(option, []).append(total)
        cache.length = length
        return [{option: float(np.logaddexp.reduce(found[option])) for option in p.forms}
                for p, found in zip(prompts, scores, strict=True)]

    @torch.inference_mode()
    def generate(self, prompts, max_new_tokens, temperature=0.0, top_p=1.0, seed=0):
        """Answer a batch of Prompts: yields one list of Answers, updated in place after each token.

        Finished rows leave the batch.
        """
        limits = [min(max_new_tokens, self.config.max_length - len(p.ids)) for p in prompts]
        forms = [form for p in prompts for found in (p.forms or {}).values() for form in found]
        room = max(limits + [len(form) for form in forms])
        cache, logits, scores = self.prefill(prompts, room)  # logits (B, V), scores (B, L)
        probabilities = [None] * len(prompts) if scores is None else scores.float().softmax(-1).tolist()
        answers = [Answer([], p) for p in probabilities]
        if prompts[0].forms:
            for answer, likelihood in zip(answers, self.score_options(prompts, cache, logits), strict=True):
                answer.likelihood = likelihood
        generators = [np.random.default_rng((seed, p.number)) for p in prompts]
        positions = torch.tensor([len(p.ids) for p in prompts], device=self.device)  # of the next token
        active = list(range(len(prompts)))  # the prompts of the remaining rows
        while True:
            if not logits.isfinite().all():
                raise UserError(f"{self.folder}: logits are not finite; give --dtype float32")
            tokens = sample_next_token(logits, temperature, top_p, [generators[i] for i in active])  # (B,)
            keep = []
            for row, (i, token) in enumerate(zip(active, tokens.tolist(), strict=True)):
                if token not in self.tokenizer.stop:
                    answers[i].ids.append(token)
                    if len(answers[i].ids) < limits[i]:
                        keep.append(row)
            yield answers
            if not keep:
                return
            if len(keep) < len(active):
                rows = torch.tensor(keep, device=self.device)
                tokens, positions, active = tokens[rows], positions[rows], [active[row] for row in keep]
                cache.keep_rows(rows)
            cache.length += 1
            x = self.cc.lm(self.cc.lm.embed(tokens[:, None]), positions[:, None], cache).hidden  # (B, 1, d)
            logits, positions = self.cc.lm.logits(x[:, -1]), positions + 1

    def explain(self, answer):
        """A line about where the connection came from."""
        if self.connection == "none":
            return "[unconnected]"
        if answer.layer is None:
            return f"[connection {self.connection}: mean of all layers]"
        probabilities = " ".join(f"{p:.2f}" for p in answer.probabilities)
        return (f"[connection {self.connection}: from layer {answer.layer} of 0-"
                f"{len(answer.probabilities) - 1}; probabilities {probabilities}]")


def sample_next_token(logits, temperature, top_p, generators):
    """The next token of each row (B,) from logits (B, V), by nucleus sampling (arXiv 1904.09751).

    generators: a random state per row, so that an answer does not depend on its batch.
    """
    if temperature == 0:
        return logits.argmax(-1)
    temperature = max(temperature, 1e-30)  # below, logits overflow
    p, tokens = (logits.float() / temperature).softmax(-1).sort(-1, descending=True)  # (B, V)
    more_likely = p.cumsum(-1) - p  # probability of all more likely tokens
    p = p.masked_fill((more_likely >= top_p) & (more_likely > 0), 0)  # the most likely one always stays
    uniform = torch.tensor([[g.random()] for g in generators], device=logits.device)  # (B, 1)
    rank = (p.cumsum(-1) <= uniform * p.sum(-1, keepdim=True)).sum(-1, keepdim=True)  # (B, 1)
    return tokens.gather(1, rank.clamp(max=(p > 0).sum(-1, keepdim=True) - 1))[:, 0]


def prepack_for_cpu(lm):
    """Reorder weights for oneDNN: decoding on a CPU is up to 3x faster. Inference only.

    float16, and bfloat16 where the CPU lacks instructions for it, is widened to float32 (exact). The
    operators are private: torch.compile's freezing uses them.
    """
    if not torch.backends.mkldnn.is_available():
        return
    lm.requires_grad_(False)
    if lm.lm_head is None:  # tied: the embedding itself is still needed to look tokens up
        lm.lm_head = nn.Linear(lm.config.hidden_size, lm.config.vocab_size, bias=False, device="meta")
        lm.lm_head.weight = lm.model.embed_tokens.weight
    for linear in [module for module in lm.modules() if isinstance(module, nn.Linear)]:
        dtype, weight, bias = linear.weight.dtype, linear.weight, linear.bias
        if dtype != torch.bfloat16 or not torch.cpu._is_avx512_bf16_supported():
            weight, bias = weight.float(), None if bias is None else bias.float()
        weight, linear.weight = torch.ops.mkldnn._reorder_linear_weight(weight), None
        linear.forward = lambda x, w=weight, b=bias, dtype=dtype, wide=weight.dtype: (
            torch.ops.mkldnn._linear_pointwise(x.to(wide), w, b, "none", [], "").to(dtype))
    for p in lm.parameters():  # a view of the mapped file would keep all of it resident
        p.data = p.data.clone()


# -------------------------------------------------------------------------------------------------- main

def check_args(args):
    """Refuse options that do not go together, and an output that cannot be written."""
    if args.prompt is not None and args.input is not None:
        raise UserError("--prompt: give either --prompt TEXT (or - for standard input) or --input FILE")
    if args.prompt_en is not None and (args.prompt in (None, "-") or args.connection != "english"):
        raise UserError("--prompt_en: goes with --prompt TEXT and --connection english; with --input, give "
                        "instruction_en")
    if args.output and not args.input:
        raise UserError("--output: goes with --input; the answer to --prompt is printed")
    output = Path(args.output or "-")
    if args.output and (output.is_dir() or output.resolve() == Path(args.input).resolve()):
        raise UserError(f"{output}: is a folder, or the input itself; choose another --output")
    if args.output and (output.is_file() or not output.exists()):
        check_writable(output.resolve().parent)


def stream(engine, prompt, options, explain):
    """Print one answer while it is generated.

    Each time, decode the whole answer and print what is new: decoded token by token, SentencePiece loses
    spaces. An incomplete character (U+FFFD) at the end waits for its next token.
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


def answer_lines(engine, options, explain):
    """Answer each line typed at a terminal as it comes, until Ctrl-D."""
    for number, line in enumerate(sys.stdin.buffer):
        try:
            if text := line.decode("utf-8", "replace").strip():
                prompt = engine.encode(Record.parse({"instruction": text}, f"line {number + 1}"), number)
                stream(engine, prompt, options, explain)
        except UserError as error:
            print(f"error: {error_line(error)}", file=sys.stderr)


def write_json_lines(path, values):
    """Write JSON lines atomically."""
    write_text(path, "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values))


def write_answers(args, records, answers, texts):
    """Write the lines of --input with their answers to --output or standard output."""
    lines = []
    for record, answer, text in zip(records, answers, texts, strict=True):
        explained = {"layer": answer.layer, "probabilities": answer.probabilities} if args.explain else {}
        lines.append({**record.fields, "answer": text, **explained})
    if args.output:
        return write_json_lines(args.output, lines)
    for line in lines:
        print(json.dumps(line, ensure_ascii=sys.stdout.encoding.lower() != "utf-8"))


def main():
    args = parse_args()
    args.input = "/dev/stdin" if args.input == "-" else args.input
    args.output = None if args.output == "-" else args.output  # standard output
    check_args(args)
    args.model = args.model or default_model()
    is_terminal = args.prompt == "-" and sys.stdin.buffer.isatty()
    records = [] if is_terminal else read_prompts(args)
    trained = Config.read(args.model).cctuning.get("languages", [])
    known = {*LANGUAGES, *trained, *(r.lang for r in records if r.lang)}
    if args.lang and args.lang not in known:
        print(f"--lang: {printable(args.lang)} is none of {' '.join(sorted(known))}", file=sys.stderr)
    single = min(len(records), args.batch_size) <= 1
    engine = Engine(args.model, args.connection, args.template, args.dtype, single)
    prompts = [engine.encode(record, number) for number, record in enumerate(records)]
    for notice in engine.notices:
        print(printable(notice), file=sys.stderr)
    options = args.max_new_tokens, args.temperature, args.top_p, args.seed

    if is_terminal:
        return answer_lines(engine, options, args.explain)
    if args.prompt not in (None, "-"):
        return stream(engine, prompts[0], options, args.explain)
    with tqdm(total=len(prompts), desc="answers", unit="prompt", disable=None) as progress:
        answers = engine.answer_all(prompts, args.batch_size, *options, progress=progress)
    texts = [engine.tokenizer.decode(answer.ids) for answer in answers]
    if args.input:
        return write_answers(args, records, answers, texts)
    for record, answer, text in zip(records, answers, texts, strict=True):
        line = text.replace("\n", "\\n")
        if args.prompt is None:
            verdict = "right" if text == record.answer else f"wrong: {record.answer}"
            line = f"{record.prompt}  {line}  [{verdict}]"
        print(line + (f"  {engine.explain(answer)}" if args.explain else ""))
    if args.prompt is None:
        right = sum(text == record.answer for record, text in zip(records, texts, strict=True))
        print(f"{right} of {len(records)} right; python eval.py scores all of them")


if __name__ == "__main__":
    run_script(main)
