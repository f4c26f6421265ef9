"""The data: what a record is, how it is read and written, and the teachers that make records.

A record is one JSON object a line, {"id", "query", "response", "traits": {trait: -1 | 0 | 1}} and, if there are any,
"history", "cot", "domain", "culture"; fields that nobody here knows are kept as they are.

What is notable:
- every line is checked when it is read; a message names the file and the line, what was found and what was expected
- a record whose traits are all zero is a failure of synthesis: it is counted and reported and never trained on
- the template teacher needs no model: it composes situations from cues, each calling for one pole, and a reply from a
  neutral answer and one sentence in the manner of every active pole. Its text is data/lab.json

    python synth.py --teacher template --out data/lab --count 20000      # train.jsonl, validation.jsonl, test.jsonl

The last section is the command line that synth.py, train.py and eval.py share.
"""
import argparse
import ast
import hashlib
import inspect
import json
import random
import re
import sys
import textwrap
import typing
from dataclasses import MISSING, dataclass, fields
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from lora import EXPERTS, TRAITS
from model import Chat, Config, Transformer, UserError, atomic, read_json
from router import active_experts

SPLITS = ("train", "validation", "test")
LAB = Path(__file__).parent / "data" / "lab.json"


# ----------------------------------------------------------------------------------------------------------------------
# Records

def check_record(record, need_response=True):
    """What is wrong with a record, in words, or None."""
    if not isinstance(record, dict):
        return f"found a {type(record).__name__}, expected a JSON object"
    for key in ("id", "query", "response", "traits"):
        if key not in record and (need_response or key != "response"):
            return f"no {key!r}; a record needs id, query, response and traits"
    for key in ("query", "response"):
        text = record.get(key, "-")
        if not isinstance(text, str) or not text.strip():
            return f"{key} is {text!r}, expected some text"
    try:
        json.dumps(record, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return "half of a surrogate pair (\\ud800 to \\udfff), which is no text"
    if not isinstance(record["id"], (str, int)) or isinstance(record["id"], bool):
        return f"id is {record['id']!r}, expected a string"
    if not isinstance(record["traits"], dict):
        return f"traits is {record['traits']!r}, expected an object such as {{\"openness\": 1}}"
    try:
        active_experts(record["traits"])
    except (TypeError, ValueError) as error:
        return f"traits: {error}"
    history = record.get("history") or []
    if not isinstance(history, list) or not all(
            isinstance(turn, dict) and turn.get("role") in ("system", "user", "assistant")
            and isinstance(turn.get("content"), str) for turn in history):
        return "history: expected a list of {\"role\": \"user\" | \"assistant\", \"content\": text}"
    return None


def read_records(path, need_response=True):
    """The records of a .jsonl file, checked. UserError names file and line. The router stage needs no responses."""
    records, lines = [], {}
    try:
        text = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    for number, line in enumerate(text.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError:
            raise UserError(f"{path}, line {number}: not UTF-8; save the file as UTF-8") from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number}: not JSON ({error}); a torn line? mend or remove it") from None
        problem = check_record(record, need_response)
        if problem is None and str(record["id"]) in lines:
            problem = f"id {record['id']!r} stands on line {lines[str(record['id'])]} already"
        if problem:
            raise UserError(f"{path}, line {number}: {problem}")
        lines[str(record["id"])] = number
        records.append(record)
    if not records:
        raise UserError(f"{path}: no records in it, expected one JSON object a line")
    return records


def write_records(path, records):
    """Write records to a .jsonl file, all or nothing."""
    with atomic(path) as part:
        part.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")


def split_records(records, seed=0):
    """80 / 10 / 10 by a hash of the query (case and white space folded): two records of one query never part."""
    splits = {name: [] for name in SPLITS}
    for record in records:
        query = " ".join(record["query"].lower().split())
        tenth = hashlib.sha256(f"{seed}:{query}".encode()).digest()[0] * 10 // 256
        splits[SPLITS[max(0, tenth - 7)]].append(record)
    return splits


def load_data(path, seed=0, need_response=True):
    """`--data`: a .jsonl file, split by query, or a folder with train, validation and test -> {split: records}.

    Records whose traits are all zero are left out; the second result says how many there were.
    """
    path = Path(path)
    if path.is_dir():
        splits = {name: read_records(path / f"{name}.jsonl", need_response) for name in SPLITS}
    else:
        splits = split_records(read_records(path, need_response), seed)
    active = {name: [r for r in records if any(r["traits"].values())] for name, records in splits.items()}
    for name, records in active.items():
        if not records:
            raise UserError(f"{path}: no records with an active trait for {name}; expected at least one in each of "
                            f"{', '.join(SPLITS)}")
    return active, sum(map(len, splits.values())) - sum(map(len, active.values()))


# ----------------------------------------------------------------------------------------------------------------------
# The template teacher

@cache
def lab():
    """data/lab.json: sentence frames, each for one split, and the words and phrases that fill them, for all splits."""
    return read_json(LAB)


def template_record(rng, split, domain, n_poles):
    """One record: a situation with a cue for each of n_poles poles, and a reply in their manner.

    Beside the usual fields it keeps the parts: `neutral` is the reply without any manner, `manner` the sentence of each
    active pole, `cot` which cue called for which pole.
    """
    place, poles = lab()["domains"][domain], lab()["poles"]
    chosen = [TRAITS.index(t) * 2 + rng.randrange(2) for t in rng.sample(TRAITS, n_poles)]
    experts = [EXPERTS[e] for e in chosen]
    slots = {name: rng.choice(words) for name, words in place["slots"].items()}
    slots["action"], slots["other_action"] = rng.sample(lab()["actions"], 2)
    opening = rng.choice(place["openings"][split]).format(**slots)
    neutral = rng.choice(lab()["neutral"][split]).format(**slots)
    cues = {expert: rng.choice(poles[expert]["cues"][split]) for expert in experts}
    manner = {}
    for expert in sorted(experts, key=EXPERTS.index):
        phrase, other = rng.sample(poles[expert]["phrases"], 2)
        manner[expert] = rng.choice(poles[expert]["manner"][split]).format(phrase=phrase, other_phrase=other)
    reply = [*(manner[e] for e in manner if poles[e]["position"] == "before"), neutral,
             *(manner[e] for e in manner if poles[e]["position"] == "after")]
    return {
        "query": " ".join([opening, *cues.values(), rng.choice(lab()["closings"][split])]),
        "response": " ".join(reply),
        "traits": {e.split("_")[1]: 1 if e.startswith("high") else -1 for e in experts},
        "cot": {"situation": opening,
                "traits": {e.split("_")[1]: {"pole": e.split("_")[0], "cue": cues[e]} for e in experts}},
        "domain": domain, "neutral": neutral, "manner": manner,
    }


def template_records(split, count, seed=0):
    """`count` records with different queries, the same ones for the same seed. Half of them have one active pole, 30 %
    two, 20 % three. Phrases belong to one split only; the two held-out domains make up half of the test split."""
    rng, records, seen = random.Random(f"{seed} {split}"), [], set()
    held_out = lab()["held_out_domains"]
    domains = [d for d in lab()["domains"] if d not in held_out]
    for _ in range(1000 + 10 * count):
        if len(records) == count:
            return records
        domain = rng.choice(held_out if split == "test" and rng.random() < 0.5 else domains)
        record = template_record(rng, split, domain, rng.choices((1, 2, 3), (5, 3, 2))[0])
        if record["query"] not in seen:
            seen.add(record["query"])
            records.append({"id": f"{split}-{len(records)}", **record})
    raise UserError(f"{LAB.name} is too small for {count} different queries for {split}: it gave {len(records)}")


@cache
def signature_patterns():
    return [re.compile(r"\b(?:" + "|".join(map(re.escape, lab()["poles"][expert]["signature"])) + r")\b")
            for expert in EXPERTS]


def signatures(text):
    """Which poles' signatures a reply carries -> a list of ten 0/1. Every sentence in a pole's manner has one of its
    phrases and nothing else in the template teacher's text has, so this counts what an expert has learned."""
    return [int(bool(pattern.search(text.lower()))) for pattern in signature_patterns()]


# ----------------------------------------------------------------------------------------------------------------------
# The embedded default: two small models made on the spot

LLAMA_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}"
    "<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}")
CHATML_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def make_tiny(kind, folder, records, seed, fit_base):
    """Write a Llama-shaped base or a Qwen-shaped encoder of under a million parameters, with its tokenizer, as a model
    folder like any published one. `fit_base` trains the base; the encoder stays as initialised."""
    llama = kind == "base"
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"] \
        if llama else ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = [text for r in records for text in (r["query"], r["response"])] + ["system user assistant"]
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=1400, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    config = {"model_type": "llama" if llama else "qwen2", "hidden_act": "silu", "tie_word_embeddings": True,
              "architectures": ["LlamaForCausalLM" if llama else "Qwen2ForCausalLM"],
              "vocab_size": tokenizer.get_vocab_size(), "hidden_size": 128, "intermediate_size": 352,
              "num_hidden_layers": 3 if llama else 2, "num_attention_heads": 4, "num_key_value_heads": 2,
              "rms_norm_eps": 1e-5 if llama else 1e-6, "rope_theta": 10000.0, "max_position_embeddings": 2048,
              "eos_token_id": tokenizer.token_to_id(special[-1]), "bos_token_id": tokenizer.token_to_id(special[0])}
    with atomic(folder) as part:
        part.mkdir()
        tokenizer.save(str(part / "tokenizer.json"))
        (part / "config.json").write_text(json.dumps(config, indent=2))
        (part / "tokenizer_config.json").write_text(json.dumps({
            "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": special[0], "eos_token": special[-1],
            "chat_template": LLAMA_TEMPLATE if llama else CHATML_TEMPLATE}, indent=2))
        torch.manual_seed(seed)
        model = Transformer(Config.from_dir(part))
        for p in model.parameters():
            if p.dim() == 2:  # biases and norms keep PyTorch's start: 0 (below) and 1
                torch.nn.init.normal_(p, std=0.02)
        for name, p in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.zeros_(p)
        if llama:
            fit_base(model, Chat.from_dir(part))
        save_file({n: t.contiguous() for n, t in model.state_dict().items()}, part / "model.safetensors",
                  metadata={"format": "pt"})


# ----------------------------------------------------------------------------------------------------------------------
# The command line, for all three programs

@cache
def field_help(cls):
    """{field: the sentence under it} of a dataclass and those it inherits from, read from their source."""
    found = {}
    for parent in cls.__mro__[-2::-1]:  # object has none
        body = ast.parse(textwrap.dedent(inspect.getsource(parent))).body[0].body
        found |= {a.target.id: " ".join(b.value.value.split()) for a, b in zip(body, body[1:])
                  if isinstance(a, ast.AnnAssign) and isinstance(b, ast.Expr)}
    return found


class Parser(argparse.ArgumentParser):
    def error(self, message):  # one line, without the usage
        raise UserError(f"{message}; see python {self.prog} --help")


def parse(cls, argv=None, description=None):
    """Fill the dataclass `cls` from the command line: --name VALUE for each field, a switch for each bool; a field
    without a default is a list of plain words."""
    parser = Parser(description=description, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_fields(parser, cls)
    return check_numbers(cls(**vars(parser.parse_args(argv))))


def check_numbers(args):
    """UserError for a number out of its range: NaN, infinite, negative, or 0 where 0 makes no sense -> args."""
    for key, value in vars(args).items():
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            low = 0 if key in ("seed", "lam", "lr_warmup", "temperature", "replies") else 1 if isinstance(value, int) \
                else 1e-9
            high = 1 if key in ("lr_warmup", "top_p") else 2**31
            if not low <= value <= high:
                raise UserError(f"--{key.replace('_', '-')} is {value}, expected a number from {low:g} to {high:g}")
    return args


def add_fields(parser, cls):
    hints, sentences = typing.get_type_hints(cls), field_help(cls)
    for field in fields(cls):
        kind, sentence = hints[field.name], sentences[field.name]
        if field.default is MISSING:
            parser.add_argument(field.name, nargs="+", metavar="TEXT", help=sentence)
            continue
        if type(None) in typing.get_args(kind):  # "int | None": None stands for the preset's value
            kind = typing.get_args(kind)[0]
        option = {"default": field.default, "help": sentence.replace("%", "%%")}
        if field.default not in (None, False):
            option["help"] += f" (default: {field.default})"
        if kind is bool:
            option["action"] = "store_true"
        elif typing.get_origin(kind) is typing.Literal:
            option["choices"] = typing.get_args(kind)
        else:
            option.update(type=kind, metavar={int: "N", float: "X", str: "TEXT"}[kind])
        parser.add_argument("--" + field.name.replace("_", "-"), **option)


def run_command(main):
    """Run a program's main(); an error of the user's becomes one line on standard error and exit status 2."""
    try:
        sys.exit(main())
    except UserError as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of a pipe has gone: `… | head`
        sys.stderr.close()
        sys.exit(141)


@dataclass
class Args:
    teacher: typing.Literal["template"] = "template"
    """Who writes the records: template composes them from data/lab.json and needs no model."""
    out: str | None = None
    """Where to: FILE.jsonl for the phrases of one split, or a folder that gets all three."""
    count: int = 20000
    """How many records; a folder gets 80 % of them in train.jsonl and 10 % each in validation.jsonl and test.jsonl."""
    split: typing.Literal["train", "validation", "test"] = "train"
    """Whose phrases a single FILE.jsonl is made of; no phrase is in two splits."""
    seed: int = 0
    """The same seed gives the same records."""
    overwrite: bool = False
    """Replace what is there."""


def main(argv=None):
    args = parse(Args, argv, __doc__)
    if not args.out:
        raise UserError("--out is missing: where should the records go?")
    if args.count < 10:
        raise UserError(f"--count is {args.count}, expected at least 10")
    out = Path(args.out)
    files = {out: (args.split, args.count)} if out.suffix == ".jsonl" else {
        out / f"{split}.jsonl": (split, args.count * share // 10) for split, share in zip(SPLITS, (8, 1, 1))}
    for file in files:
        if file.exists() and not args.overwrite:
            raise UserError(f"{file} is there already; --overwrite replaces it")
    for file, (split, count) in files.items():
        records = template_records(split, count, args.seed)
        write_records(file, records)
        first = records[0]
        print(f"{file}: {count} records, e.g.\n  query:    {first['query']}\n  response: {first['response']}\n"
              f"  traits:   {first['traits']}")


if __name__ == "__main__":
    run_command(main)
