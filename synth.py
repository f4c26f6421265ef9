"""The data: what a record is, how it is read and written, the template teacher, and the way from a query to a record.

A record is one JSON object a line, {"id", "query", "response", "traits": {trait: -1 | 0 | 1}} and, if there are any,
"history", "cot", "domain", "culture"; fields that nobody here knows are kept as they are.

What is notable:
- every line is checked when it is read; a message names the file and the line, what was found and what was expected
- a record whose traits are all zero is a failure of synthesis: it is counted and reported and never trained on
- the template teacher needs no model: it composes situations from cues, each calling for one pole, and a reply from a
  neutral answer and one sentence in the manner of every active pole. Its text is data/lab.json
- the other teachers are language models (teachers.py). What has become of a query is on disk as soon as it is known,
  and a second start does the rest

    python synth.py --teacher template --out data/lab --count 20000      # train.jsonl, validation.jsonl, test.jsonl
    python synth.py --teacher http --url http://localhost:8080/v1 --model any --queries asked.txt --out data/mine.jsonl
    python synth.py report data/mine.jsonl                               # also: split, review (review.py)
"""
import csv
import hashlib
import io
import json
import random
import re
import sys
import time
import typing
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

from command import field_help, parse, run_command
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
    except RecursionError:
        return "too many brackets within brackets"
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
        return "history: expected a list of {\"role\": \"system\" | \"user\" | \"assistant\", \"content\": text}"
    kept = record.get("teacher_traits") or {}  # what a review has changed
    if not isinstance(kept, dict) or any(label not in (-1, 0, 1) for label in kept.values()):
        return f"teacher_traits is {kept!r}, expected an object such as traits"
    return None


def read_lines(path):
    """(line number, value) of every line of a .jsonl file that is not blank. UserError names file and line."""
    for number, line in enumerate(read_bytes(path).split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line.decode("utf-8"))
        except UnicodeDecodeError:
            raise UserError(f"{path}, line {number}: not UTF-8; save the file as UTF-8") from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number}: not JSON ({error}); a torn line? mend or remove it") from None


def read_bytes(path):
    """A file's bytes, without a byte order mark."""
    try:
        return Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None


def read_records(path, need_response=True):
    """The records of a .jsonl file, checked. UserError names file and line. The router stage needs no responses."""
    records, lines = [], {}
    for number, record in read_lines(path):
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


def record_lines(records):
    """Records as the bytes of a .jsonl file."""
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()


def write_records(path, records):
    """Write records to a .jsonl file, all or nothing."""
    with atomic(path) as part:
        part.write_bytes(record_lines(records))


def fold(text):
    """Text by which two queries are the same: case and white space do not count."""
    return " ".join(text.lower().split())


def split_records(records, seed=0):
    """80 / 10 / 10 by a hash of the query (case and white space folded): two records of one query never part."""
    splits = {name: [] for name in SPLITS}
    for record in records:
        tenth = hashlib.sha256(f"{seed}:{fold(record['query'])}".encode()).digest()[0] * 10 // 256
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
        "traits": {e.split("_", 1)[1]: 1 if e.startswith("high") else -1 for e in experts},
        "cot": {"situation": opening,
                "traits": {e.split("_", 1)[1]: {"pole": e.split("_")[0], "cue": cues[e]} for e in experts}},
        "domain": domain, "neutral": neutral, "manner": manner,
    }


def template_records(split, count, seed=0):
    """`count` records with different queries, the same ones for the same seed. Half of them have one active pole, 30 %
    two, 20 % three. Sentence frames belong to one split only, words and phrases to all; the two held-out domains make
    up half of the test split."""
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
# Queries: what a teacher that is a language model starts from

def read_table(path, columns):
    """[(row number in the spreadsheet, {column: text})] of a .csv file with comma, semicolon or tab between the cells.
    UserError if one of `columns` is missing or the file is no table."""
    try:
        text = read_bytes(path).decode("utf-8")
        separator = max(",;\t", key=text.partition("\n")[0].count)
        header, *rows = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8; save it as CSV with the encoding UTF-8") from None
    except (ValueError, csv.Error) as error:
        raise UserError(f"{path}: not a table ({error}), expected CSV with the columns' names on top") from None
    header, table = [name.strip() for name in header], []
    for name in columns:
        if header.count(name) != 1:
            raise UserError(f"{path}: {header.count(name)} columns named {name!r}, expected one; the names found are "
                            f"{', '.join(header)[:200]!r}")
    for number, row in enumerate(rows, 2):
        if any(cell.strip() for cell in row[len(header):]):
            raise UserError(f"{path}, row {number}: {len(row)} cells under {len(header)} names")
        if any(cell.strip() for cell in row):
            table.append((number, dict(zip(header, row))))
    return table


def read_queries(path):
    """Queries of a .txt (one a line), .jsonl or .csv file -> ([{"id", "query", all else that was there}], duplicates).

    A given id is kept, else it is a hash of the query (and its history): the same file gives the same ids. Queries that
    differ in case and white space only are one; the first is kept. UserError names file and line.
    """
    kind = Path(path).suffix.lower()
    if kind == ".jsonl":
        rows = read_lines(path)
    elif kind == ".csv":
        rows = [(number, {k: v for k, v in row.items() if v.strip()}) for number, row in read_table(path, ["query"])]
    elif kind == ".txt":
        try:
            lines = read_bytes(path).decode("utf-8").split("\n")
        except UnicodeDecodeError:
            raise UserError(f"{path}: not UTF-8; save the file as UTF-8") from None
        rows = [(number, {"query": line.strip()}) for number, line in enumerate(lines, 1) if line.strip()]
    else:
        raise UserError(f"{path}: expected queries in a .txt, .jsonl or .csv file")
    items, seen, lines, duplicates = [], set(), {}, 0
    for number, row in rows:
        if isinstance(row, dict):  # what the teacher is to write is not taken from elsewhere
            row = {k: v for k, v in row.items() if k not in ("response", "traits", "cot")}
            row["id"] = "" if row.get("id") is None else row["id"]
            problem = check_record(row | {"traits": {}}, need_response=False)
        else:
            problem = check_record(row)
        if problem:
            raise UserError(f"{path}, line {number}: {problem.partition(';')[0]}")
        key = fold(row["query"]) + (json.dumps(row["history"]) if row.get("history") else "")
        if key in seen:
            duplicates += 1
            continue
        seen.add(key)
        if row["id"] == "":
            row["id"] = "q-" + hashlib.sha256(key.encode()).hexdigest()[:16]
        if str(row["id"]) in lines:
            raise UserError(f"{path}, line {number}: id {row['id']!r} stands on line {lines[str(row['id'])]} already, "
                            "with another query")
        lines[str(row["id"])] = number
        items.append({"id": row["id"]} | row)
    if not items:
        raise UserError(f"{path}: no queries in it")
    return items, duplicates


# ----------------------------------------------------------------------------------------------------------------------
# Output: nothing lost, nothing twice

class Sink:
    """FILE.jsonl for records and FILE.rejected.jsonl beside it, both append-only, a line a query, flushed.

    Opening takes a lock of the operating system, which ends with the process, mends a torn last line and finds what is
    done. A query that is tried again may stand in both files, or twice in the second, until `close` (or the next
    opening) has cleared up: a record counts more than a rejection, a later rejection more than an earlier one.
    """

    def __init__(self, out):
        try:
            import fcntl
        except ImportError:
            raise UserError("--teacher local and http need the file locks of Linux or macOS") from None
        self.out, self.rejected = Path(out), Path(out).with_suffix(".rejected.jsonl")
        self.out.parent.mkdir(parents=True, exist_ok=True)
        try:
            self.file = open(self.out, "ab")
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mend(self.out), mend(self.rejected)
        except BlockingIOError:
            raise UserError(f"{out}: another process is writing to it; wait for it, or give another --out") from None
        except OSError as error:
            raise UserError(f"{error.filename or out}: {error.strerror or error}") from None
        self.done = {str(r["id"]) for r in read_records(self.out)} if self.out.stat().st_size else set()
        self.refused = {}
        self.clear_up()

    def clear_up(self):
        self.refused = read_rejected(self.rejected, self.done)
        if self.rejected.exists() and len(self.refused) < len(self.rejected.read_bytes().splitlines()):
            write_records(self.rejected, self.refused.values())

    def add(self, outcomes):
        """Append what is finished: one write for each file, so that an interruption comes before it or after it."""
        try:
            for path in (self.out, self.rejected):
                text = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in outcomes
                               if ("response" in one) == (path == self.out))
                if text:
                    with open(path, "ab") as file:
                        file.write(text.encode("utf-8", "replace"))
        except OSError as error:
            raise UserError(f"{path}: {error.strerror or error}; what was finished before is saved") from None
        self.done |= {str(o["id"]) for o in outcomes if "response" in o}
        self.refused |= {str(o["id"]): o for o in outcomes if "response" not in o}

    def close(self):
        self.clear_up()
        self.file.close()


def reasons(entries):
    """How many entries of a rejected file have each reason, by what stands before its colon."""
    return Counter(entry["reason"].partition(":")[0][:60] for entry in entries)


def read_rejected(path, done):
    """The entries of a rejected file, {id: the last one}, without those that are done by now; {} without a file."""
    entries = {}
    for number, entry in read_lines(path) if path.exists() else ():
        if not isinstance(entry, dict) or "id" not in entry or not isinstance(entry.get("reason"), str):
            raise UserError(f"{path}, line {number}: no entry of a rejected file")
        entries[str(entry["id"])] = entry
    return {key: entry for key, entry in entries.items() if key not in done}


def mend(path):
    """Make a .jsonl file end with a whole line: what a kill or a power cut left of a last one is removed, and told."""
    data = path.read_bytes() if path.exists() else b""
    if data and not data.endswith(b"\n"):
        start = data.rfind(b"\n") + 1
        try:
            json.loads(data[start:])
            end = b"\n"
        except (ValueError, RecursionError):
            if data[start:].strip(b"\0")[:1] not in (b"{", b""):
                raise UserError(f"{path}: its last line is no JSON object; is this a file of records?") from None
            end = b""
            print(f"{path}: the last line was torn and is removed; its query is done again")
        with open(path, "r+b") as file:
            file.truncate(len(data) if end else start)
            file.seek(0, 2)
            file.write(end)


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
        for name, p in model.named_parameters():  # norms start at 1
            if p.dim() == 2:
                torch.nn.init.normal_(p, std=0.02)
            elif name.endswith("bias"):
                torch.nn.init.zeros_(p)
        if llama:
            fit_base(model, Chat.from_dir(part))
        save_file({n: t.contiguous() for n, t in model.state_dict().items()}, part / "model.safetensors",
                  metadata={"format": "pt"})


# ----------------------------------------------------------------------------------------------------------------------
# The command line

@dataclass
class Args:
    teacher: typing.Literal["template", "local", "http"] = "template"
    """Who writes the records: template composes them from data/lab.json and needs no model; local is a model folder,
    http a server that speaks OpenAI's chat completions."""
    out: str | None = None
    """Where to: FILE.jsonl, or for template also a folder that gets all three splits. With local and http, a second
    start goes on where the first ended, and FILE.rejected.jsonl gets the queries that came to nothing."""
    count: int = 20000
    """template: how many records; a folder gets 80 % of them in train.jsonl and 10 % each in validation.jsonl and
    test.jsonl."""
    split: typing.Literal["train", "validation", "test"] = "train"
    """template: whose sentence frames a single FILE.jsonl is made of; no frame is in two splits."""
    seed: int = 0
    """The same seed gives the same records (template), or the same draws (local)."""
    overwrite: bool = False
    """template: replace what is there."""
    queries: str | None = None
    """local, http: what people asked: .txt (one a line), .jsonl (query; perhaps id, history, domain, culture and more,
    which is kept) or .csv (with a column named query)."""
    model: str | None = None
    """local: the model's folder. http: its name at the server."""
    url: str | None = None
    """http: the base of the server's addresses, which mostly ends in /v1."""
    key_env: str | None = None
    """http: name of the environment variable that holds the key; without it, none is sent."""
    steps: typing.Literal["separate", "joint", "score"] = "separate"
    """Situation, traits and response in a call each, or joint in one; score (local) takes the most probable of high,
    low and neither for each trait."""
    retries: int = 3
    """Further attempts at a reply that cannot be read, or at a request that failed."""
    max_new_tokens: int = 512
    """Most tokens of one reply."""
    temperature: float | None = None
    """Of sampling; if not given, the server's own (http) or 0, the most probable token every time (local)."""
    workers: int = 8
    """http: requests in flight."""
    timeout: float = 120.0
    """http: seconds for one request."""
    backoff: float = 1.0
    """http: seconds to wait after a failed request, doubled after each in a row up to 60; the server's Retry-After
    comes first."""
    batch: int = 16
    """local: replies written at the same time."""
    device: str | None = None
    """local: cpu, cuda or cuda:N; a GPU if there is one."""
    dtype: typing.Literal["float32", "bfloat16"] | None = None
    """local: bfloat16 on a GPU, float32 on a CPU."""
    compile: bool = False
    """local: let torch.compile have a decoding step whole. It takes minutes at the start and pays for many queries.
    Needs Triton on a GPU and a C++ compiler on a CPU."""
    retry_rejected: bool = False
    """Try the queries of FILE.rejected.jsonl again; what succeeds moves to FILE.jsonl."""


def from_templates(args):
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


def check(args):
    """UserError for arguments that are missing or don't go with the teacher."""
    if not args.out:
        raise UserError("--out is missing: where should the records go?")
    needs = {"template": (), "local": ("queries", "model"), "http": ("queries", "model", "url")}[args.teacher]
    keys = ("queries", "model", "url", "key_env", "retry_rejected", "compile")
    others = {"template": keys, "local": ("url", "key_env"), "http": ("compile",)}[args.teacher]
    for key in keys:
        given = getattr(args, key)
        if key in needs and not given:
            raise UserError(f"--teacher {args.teacher} needs --{key}: {field_help(Args)[key]}")
        if given and key in others:
            raise UserError(f"--{key.replace('_', '-')} has no meaning for --teacher {args.teacher}")
    if args.teacher == "template":
        return
    if Path(args.out).suffix != ".jsonl" or Path(args.out).is_dir():
        raise UserError(f"--out is {args.out}, expected a file named .jsonl")
    if args.overwrite:
        raise UserError(f"--overwrite: what a model wrote is never replaced. A second start goes on with {args.out}; "
                        "to begin anew, give another --out")
    if args.steps == "score" and args.teacher != "local":
        raise UserError("--steps score needs the probabilities of words, and so --teacher local")


def synthesise(args):
    """Every query of a file to a record, or to the rejected file; what is done already is skipped."""
    from teachers import Http, Local, Query  # here, since that file stands on this one

    items, duplicates = read_queries(args.queries)
    sink = Sink(args.out)
    todo = [item for item in items if str(item["id"]) not in sink.done
            and (args.retry_rejected or str(item["id"]) not in sink.refused)]
    print(f"{args.queries}: {len(items)} queries, {duplicates} duplicates dropped; {len(items) - len(todo)} are done, "
          f"{len(todo)} to do", flush=True)
    records, rejected, began, said = 0, 0, time.monotonic(), 0.0
    if todo:
        teacher = {"local": Local, "http": Http}[args.teacher](args)
        bar = tqdm(total=len(todo), unit="record", disable=not sys.stderr.isatty(), dynamic_ncols=True)
        try:
            queries = (Query(item, args.steps, args.retries, teacher.name) for item in todo)
            for outcomes in teacher.outcomes(queries):
                sink.add(outcomes)
                records += sum("response" in outcome for outcome in outcomes)
                rejected += sum("response" not in outcome for outcome in outcomes)
                bar.set_postfix_str(f"{rejected} rejected", refresh=False)
                bar.update(len(outcomes))
                passed = time.monotonic() - began
                if bar.disable and passed - said > 60 and records + rejected:  # a line a minute in a log
                    said, rate = passed, (records + rejected) / passed
                    print(f"{records + rejected}/{len(todo)} done, {rejected} rejected, {rate:.3g} records/s, "
                          f"{tqdm.format_interval(int((len(todo) - records - rejected) / rate))} left", flush=True)
        except KeyboardInterrupt:
            print("stopped; what was finished is saved, and the same command goes on", file=sys.stderr)
            return 130
        finally:
            sink.add(teacher.left())
            bar.close()
            sink.close()
    seconds = time.monotonic() - began
    print(f"{args.out}: {len(sink.done)} records, {records} of them new"
          + (f", {seconds / (records + rejected):.2f} s for each query" if records + rejected else ""))
    if sink.refused:
        print(f"{sink.rejected}: {len(sink.refused)} rejected, which --retry-rejected tries again\n"
              + "\n".join(f"  {count:>6}  {reason}" for reason, count in reasons(sink.refused.values()).most_common(8)))


def main(argv=None):
    from review import COMMANDS  # here, since that file stands on this one

    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in COMMANDS:
        cls, function = COMMANDS[argv[0]]
        return function(parse(cls, argv[1:], function.__doc__, f"synth.py {argv[0]}"))
    args = parse(Args, argv, __doc__)
    check(args)
    return from_templates(args) if args.teacher == "template" else synthesise(args)


if __name__ == "__main__":
    import synth  # by the name under which teachers.py and review.py know it
    run_command(synth.main)
