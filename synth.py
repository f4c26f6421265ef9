"""The data: what a record is, how it is read and written, the teachers that make records, and how people look at them.

A record is one JSON object a line, {"id", "query", "response", "traits": {trait: -1 | 0 | 1}} and, if there are any,
"history", "cot", "domain", "culture"; fields that nobody here knows are kept as they are.

What is notable:
- every line is checked when it is read; a message names the file and the line, what was found and what was expected
- a record whose traits are all zero is a failure of synthesis: it is counted and reported and never trained on
- the template teacher needs no model: it composes situations from cues, each calling for one pole, and a reply from a
  neutral answer and one sentence in the manner of every active pole. Its text is data/lab.json
- the other teachers are language models, in this process or behind a server. They reason from the situation to its
  traits to the response; what has become of a query is on disk as soon as it is known, and a second start does the rest
- what models write is read with patience and refused where it could mean two things; nothing of it is ever run

    python synth.py --teacher template --out data/lab --count 20000      # train.jsonl, validation.jsonl, test.jsonl
    python synth.py --teacher http --url http://localhost:8080/v1 --model any --queries asked.txt --out data/mine.jsonl
    python synth.py report data/mine.jsonl                               # also: split, review

The last section is the command line that synth.py, train.py and eval.py share.
"""
import argparse
import ast
import csv
import email.utils
import hashlib
import http.client
import inspect
import io
import json
import math
import os
import queue
import random
import re
import ssl
import sys
import textwrap
import threading
import time
import typing
import unicodedata
import urllib.parse
from collections import Counter
from dataclasses import MISSING, dataclass, field, fields
from functools import cache
from pathlib import Path
from string import Template

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

from lora import EXPERTS, TRAITS
from model import Chat, Config, Transformer, UserError, atomic, generate, pad, read_json
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


def write_records(path, records):
    """Write records to a .jsonl file, all or nothing."""
    with atomic(path) as part:
        part.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")


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
# Persona-CoT: what a teacher is asked. All prompts are here and all are ours; $names are filled in

MANNERS = {
    "high_openness": "imaginative, curious", "low_openness": "down to earth",
    "high_conscientiousness": "orderly, step by step", "low_conscientiousness": "easy-going, no plan needed",
    "high_extraversion": "lively, enthusiastic", "low_extraversion": "quiet, of few words",
    "high_agreeableness": "warm, on the person's side", "low_agreeableness": "frank, setting limits",
    "high_neuroticism": "worried, seeing what could go wrong", "low_neuroticism": "calm, reassuring",
}
POLES = "\n".join(f"{trait}: high is {MANNERS['high_' + trait]}; low is {MANNERS['low_' + trait]}" for trait in TRAITS)
# a form and not an example: what an example says, small models say of everybody
FORM = "{" + ", ".join(f'"{trait}": {{"pole": "high|low|0", "cue": "..."}}' for trait in TRAITS) + "}"
PROMPTS = {name: Template(text.strip()) for name, text in {  # the query last: servers keep what is the same before it
    "system": "You write training data for an assistant whose manner fits each situation.",
    "situation": """
Describe the situation of the person who wrote the message below, in two sentences: what is going on, what they feel and
need, and which of their words show it. Do not answer the message.

$message""",
    "traits": f"""
The manner of a good answer has five traits, each with two poles:
{POLES}
For each trait decide which pole the situation of the person below calls for, high or low, or 0 where nothing calls for
one, and quote the cue: at most eight of their words that call for it. Mostly one to three traits are called for, never
none. Reply with one JSON object of this form:
{FORM}

$message
Their situation: $situation""",
    "response": """
Answer the message below in at most 100 words. Your manner: $manner. Let it show in how you write and do not speak of
it. Write only the answer.

$message
Their situation: $situation""",
    "joint": f"""
The manner of a good answer has five traits, each with two poles:
{POLES}
Reply to the message below with one JSON object. "situation": in two sentences, what is going on, what the person feels
and needs, and which of their words show it. "traits": for each trait the pole that the situation calls for, high or
low, or 0 where nothing does, and the cue: at most eight of their words that call for it. Mostly one to three traits are
called for, never none. "response": an answer of at most 100 words in that manner, without speaking of it. The form:
{{"situation": "...", "traits": {FORM}, "response": "..."}}

$message""",
    "score": """
Which manner does a good answer to the message below need: $high ("high"), $low ("low"), or neither of the two
("neither")? Reply with one word: high, low or neither.

$message""",
    "again": "That reply cannot be used: $complaint. Write it again, whole, in the form that was asked for.",
}.items()}
CHOICES = {"high": 1, "low": -1, "neither": 0}


def message(item):
    """The query as a teacher is shown it, with what is known of the conversation and the person."""
    parts = [f"{turn['role']}: {turn['content']}" for turn in item.get("history") or []]
    if parts:
        parts = ["The conversation before it:", *parts]
    if item.get("culture"):
        parts.append(f"The person's culture: {item['culture']}")
    return "\n".join([*parts, f'The message:\n"""\n{item["query"].strip()}\n"""'])


# ----------------------------------------------------------------------------------------------------------------------
# Reading replies: everything that models really write, and nothing that could be read in two ways

LONGEST = 50_000  # characters of a reply; what is longer is no answer


class Unusable(ValueError):
    """A reply that cannot be used. The message is the complaint that goes back to the teacher."""


@dataclass
class Reply:
    text: str
    cut: bool = False  # ended by the limit on tokens and not by the teacher
    read: int = 0      # tokens of the prompt
    written: int = 0   # tokens of the reply


# A mark, a text in double or in single quotes, or a bare word. A quote ends a text only where the object goes on after
# it, so that 'it's fine' is one text. Possessive (*+): nothing is tried twice, however long a text is.
TOKEN = re.compile(r"""\s*+(?: ([{}\[\]:,])
                             | "((?: [^"\\] | \\. | "(?!\s*+[,:}\]]) )*+)"
                             | '((?: [^'\\] | \\. | '(?!\s*+[,:}\]]) )*+)'
                             | ([^\s{}\[\]:,"']++) )""", re.S | re.X)
ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f"}


def unescape(text):
    text = re.sub(r"(?s)\\(?:u([0-9a-fA-F]{4})|(.))",
                  lambda m: chr(int(m[1], 16)) if m[1] else ESCAPES.get(m[2], m[2]), text)
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")  # \ud83d\ude00 is one character


def read_value(text, at, depth=0):
    """The JSON value that begins at text[at] -> (value, where it ends), also in single quotes, with bare words or with
    a comma too many. Keys are lower case; bare words and numbers stay texts, but null is None."""
    def token(at):
        found = TOKEN.match(text, at)
        if not found:
            raise Unusable("its JSON is not complete")
        return found[found.lastindex], found.lastindex, found.end()  # kinds: 1 a mark, 2 and 3 quoted, 4 bare

    word, kind, at = token(at)
    if kind != 1:
        return (unescape(word) if kind < 4 else None if word in ("null", "None") else word), at
    if depth > 8:
        raise Unusable("its JSON is nested too deeply")
    if word not in "{[":
        raise Unusable(f"its JSON has {word!r} where a value should be")
    found, close, values = {}, "]}"[word == "{"], []
    while True:
        word, kind, end = token(at)
        if kind == 1 and word == close:
            return (found if close == "}" else values), end
        value, at = read_value(text, at, depth + 1)
        if close == "}":
            key, (word, kind, at) = str(value).strip().lower(), token(at)
            if (word, kind) != (":", 1):
                raise Unusable(f"its JSON has {word!r} after the key {key!r}, expected a colon")
            value, at = read_value(text, at, depth + 1)
            if found.setdefault(key, value) != value:
                raise Unusable(f"{key!r} stands in it twice, with different values")
        values.append(value)
        word, kind, end = token(at)
        if (word, kind) == (",", 1):
            at = end
        elif (word, kind) != (close, 1):
            raise Unusable(f"its JSON has {word!r} where a comma or {close!r} should be")


def read_object(reply, wanted):
    """The one JSON object in a reply, whatever stands around it, that has one of the keys `wanted`."""
    text, found, complaint, failures = reply.text, [], "there is no JSON object in it", 0
    at = text.find("{")
    while at >= 0 and failures < 50:  # each may read to the end
        try:
            value, end = read_value(text, at)
            if wanted & value.keys() and value not in found:
                found.append(value)
        except Unusable as problem:
            end, failures = at + 1, failures + 1
            complaint = str(problem) if failures == 1 else complaint
        at = text.find("{", end)
    if len(found) > 1:
        raise Unusable("there are several JSON objects in it that differ")
    if not found:
        raise Unusable("it was cut off; be briefer" if reply.cut else complaint)
    return found[0]


def read_text(reply, key):
    """A reply in plain words, or what stands under `key` where a teacher has put it into JSON all the same."""
    text = re.sub(r"^```\w*\n(.*)\n```$", r"\1", reply.text.strip(), flags=re.S).strip()
    if text.startswith("{") and key in text.lower():
        text = read_object(reply, {key})[key]
    elif reply.cut:
        raise Unusable("it was cut off; be briefer")
    if not isinstance(text, str):
        raise Unusable(f"{key} is {str(text)[:80]!r}, expected a text")
    text = re.sub(rf"^\W*{key}\W*:[*_\s]*", "", text.strip(), flags=re.I)
    text = re.sub(r'^["“]([^"“”]*)["”]$', r"\1", text).strip()
    if not text:
        raise Unusable("it is empty")
    return text


def read_pole(value):
    """1, −1 or 0 for what teachers and annotators write for high, low and neither; None for anything else."""
    text = "none" if value is None else str(value).strip().lower().replace("−", "-")
    text = re.sub(r"( pole|\.0+)$", "", text)
    return {"+1": 1, "1": 1, "+": 1, "-1": -1, "-": -1, "0": 0, "none": 0, "neutral": 0, **CHOICES}.get(text)


def read_traits(found):
    """{trait: pole or {"pole", "cue"}}, or a list of objects with "trait" -> ({trait: ±1}, {trait: {"pole", "cue"}}),
    the active ones. Unusable for unknown traits, other poles, and if none is active."""
    if isinstance(found, list) and all(isinstance(one, dict) and isinstance(one.get("trait"), str) for one in found):
        if len({one["trait"] for one in found}) < len(found):
            raise Unusable("a trait stands in it twice")
        found = {one["trait"].strip().lower(): one for one in found}
    if not isinstance(found, dict):
        raise Unusable(f"traits is {str(found)[:80]!r}, expected an object with the five traits")
    traits, why = {}, {}
    for trait, value in found.items():
        if trait not in TRAITS:
            raise Unusable(f"{trait[:40]!r} is not one of the traits {', '.join(TRAITS)}")
        cue = value.get("cue") if isinstance(value, dict) else None
        poles = {read_pole(value[key]) for key in ("pole", "value") if key in value} if isinstance(value, dict) \
            else {read_pole(value)}
        if len(poles) != 1 or None in poles:
            raise Unusable(f"{trait} is {str(value)[:80]!r}, expected the pole high, low or neither")
        pole = poles.pop()
        if pole:
            traits[trait] = pole
            why[trait] = {"pole": "high" if pole > 0 else "low", "cue": cue.strip() if isinstance(cue, str) else ""}
    if not traits:
        raise Unusable("all-zero vector: no trait has a pole; name at least the one that is called for most")
    return dict(sorted(traits.items(), key=lambda t: TRAITS.index(t[0]))), why


def scripts(text):
    """The scripts of a text's letters, the most frequent first. Japanese mixes three, so these count as one."""
    names = (unicodedata.name(char, "?").split()[0] for char in text if char.isalpha())
    return [name for name, _ in Counter("CJK" if n in ("HIRAGANA", "KATAKANA") else n for n in names).most_common()]


def check_language(response, item):
    """Unusable for a response in a script of which the query has no letter: small models fall into another language.
    (French for an English query goes unseen.)"""
    ours, theirs = scripts(response), scripts(item["query"])
    if ours and theirs and ours[0] not in theirs:
        raise Unusable(f"the response is in the wrong language: its script is {ours[0].title()}, the query's "
                       f"{theirs[0].title()}")


# ----------------------------------------------------------------------------------------------------------------------
# One query's way to a record

class Fault(Exception):
    """A request that failed and may succeed when it is made again. `wait`: seconds that the server asks for."""

    def __init__(self, message, wait=None):
        super().__init__(message)
        self.wait = wait


class Rejected(Exception):
    """The attempts at a step are used up; the message is the last reason."""


class Query:
    """One query on its way through the steps. `ask` is what the teacher is to be asked next: (messages, choices), where
    choices is None for a written reply, else words to choose from. `tell` takes its Reply, Fault or choice. `outcome`
    is the record or, without a response, the entry of the rejected file, as soon as there is one."""

    def __init__(self, item, steps, retries, teacher):
        self.item, self.retries, self.outcome, self.raw = item, retries, None, ""
        self.facts = {"name": teacher, "steps": steps, "calls": 0, "tokens_read": 0, "tokens_written": 0}
        self.conversation = self.record(steps)
        self.tell(None)

    def tell(self, reply):
        try:
            self.ask = self.conversation.send(reply)
        except StopIteration as end:
            self.outcome = {**self.item, **end.value, "teacher": self.facts}
            problem = check_record(self.outcome)
            if problem:
                self.reject(problem)
        except Rejected as problem:
            self.reject(str(problem))

    def reject(self, reason):
        self.outcome = {"id": self.item["id"], "query": self.item["query"], "reason": reason, "raw": self.raw,
                        "teacher": self.facts}

    def record(self, steps):
        """The steps, as a generator that yields what to ask and is sent the replies -> the record's new fields."""
        item, text = self.item, message(self.item)
        if steps == "joint":
            def read(reply):
                found = read_object(reply, {"situation", "traits", "response"})
                for key in ("situation", "response"):
                    if not isinstance(found.get(key), str) or not found[key].strip():
                        raise Unusable(f"{key} is {str(found.get(key))[:80]!r}, expected a text")
                traits, why = read_traits(found.get("traits"))
                check_language(found["response"], item)
                return found["situation"].strip(), traits, why, found["response"].strip()
            situation, traits, why, response = yield from self.attempts("joint", read, message=text)
        else:
            situation = yield from self.attempts("situation", lambda reply: read_text(reply, "situation"), message=text)
            if steps == "separate":
                def read(reply):
                    found = read_object(reply, {"traits", *TRAITS})
                    return read_traits(found.get("traits", {k: v for k, v in found.items() if k != "situation"}))
                traits, why = yield from self.attempts("traits", read, message=text, situation=situation)
            else:
                traits = {}
                for trait in TRAITS:
                    choice = yield self.prompt("score", message=text, high=MANNERS["high_" + trait],
                                               low=MANNERS["low_" + trait]), tuple(CHOICES)
                    self.facts["calls"] += 1
                    if isinstance(choice, Fault):  # too long a prompt
                        raise Rejected(str(choice))
                    traits |= {trait: CHOICES[choice]} if CHOICES[choice] else {}
                why = {trait: {"pole": "high" if pole > 0 else "low", "cue": ""} for trait, pole in traits.items()}
                if not traits:
                    raise Rejected("all-zero vector: neither is the most probable for every trait")

            def read(reply):
                response = read_text(reply, "response")
                check_language(response, item)
                return response
            manner = "; ".join(MANNERS[f"{why[trait]['pole']}_{trait}"] for trait in traits)
            response = yield from self.attempts("response", read, message=text, situation=situation, manner=manner)
        return {"response": response, "traits": traits, "cot": {"situation": situation, "traits": why}}

    def prompt(self, name, **parts):
        return [{"role": "system", "content": PROMPTS["system"].template},
                {"role": "user", "content": PROMPTS[name].substitute(parts)}]

    def attempts(self, name, read, **parts):
        """Ask until `read` can make something of the reply. After one that it can't, its complaint is part of the next
        question; after a fault, the question is asked again as it was."""
        first = messages = self.prompt(name, **parts)
        for _ in range(1 + self.retries):
            reply = yield messages, None
            self.facts["calls"] += 1
            if isinstance(reply, Fault):
                reason = str(reply)
                continue
            self.raw = reply.text[:LONGEST]
            self.facts["tokens_read"] += reply.read
            self.facts["tokens_written"] += reply.written
            try:
                if len(reply.text) > LONGEST:
                    raise Unusable(f"it is longer than {LONGEST:,} characters")
                return read(reply)
            except Unusable as problem:
                reason = str(problem)
                messages = [*first, {"role": "assistant", "content": reply.text[:2000].strip() or "…"},
                            {"role": "user", "content": PROMPTS["again"].substitute(complaint=reason)}]
        raise Rejected(reason)


# ----------------------------------------------------------------------------------------------------------------------
# Teachers. outcomes(queries) yields lists of what is finished; left() is what was finished and not handed over yet

class Local:
    """A model folder in this process: replies in batches of similar length, the longest first, which are mostly those
    that have come furthest."""

    LONGEST = 8192  # tokens of a prompt

    def __init__(self, args):
        self.batch, self.limit, self.temperature = args.batch, args.max_new_tokens, args.temperature or 0.0
        device = pick_device(args.device)
        self.model = Transformer.from_pretrained(args.model, pick_dtype(args.dtype, device), device)
        self.chat, self.name = Chat.from_dir(args.model), f"local:{Path(args.model).resolve().name}"
        self.generator = torch.Generator().manual_seed(args.seed)

    def outcomes(self, queries):
        window, more = [], True
        while window or more:
            while more and len(window) < 4 * self.batch:  # to choose neighbours in length from
                query = next(queries, None)
                more = query is not None
                window += [query] if more else []
            window.sort(key=lambda query: sum(len(m["content"]) for m in query.ask[0]), reverse=True)
            batch, window = window[:self.batch], window[self.batch:]
            for query, reply in zip(batch, self.replies([query.ask for query in batch])):
                query.tell(reply)
            yield [query.outcome for query in batch if query.outcome]
            window += [query for query in batch if not query.outcome]

    def replies(self, asks):
        """[(messages, choices)] -> a Reply for each, or one of its choices."""
        prompts = [self.chat.prompt(messages) for messages, _ in asks]
        replies = [Fault(f"the prompt has {len(prompt):,} tokens, more than {self.LONGEST:,}") for prompt in prompts]
        fits = [i for i, prompt in enumerate(prompts) if len(prompt) <= self.LONGEST]
        write = [i for i in fits if not asks[i][1]]
        written = generate(self.model, [prompts[i] for i in write], None, self.limit, self.temperature,
                           stops=self.chat.stops, generator=self.generator) if write else []
        for i, ids in zip(write, written):
            replies[i] = Reply(self.chat.text(ids), ids[-1] not in self.chat.stops, len(prompts[i]), len(ids))
        for i in sorted(set(fits) - set(write)):
            replies[i] = self.choose(*asks[i])
        return replies

    @torch.no_grad()
    def choose(self, messages, choices):
        """The most probable of some words as the whole reply, the end of the turn included."""
        rows = [self.chat.example(messages, choice) for choice in choices]
        ids, _ = pad([ids for ids, _ in rows], self.model.device)
        hidden, scores = self.model.hidden(ids), []
        for h, row, (_, supervised) in zip(hidden, ids, rows):
            at = torch.tensor(supervised, device=row.device).nonzero()[:, 0]
            logs = self.model.head(h[at - 1]).float().log_softmax(-1)  # position t − 1 predicts token t
            scores.append(logs.gather(-1, row[at][:, None]).sum().item())
        return choices[scores.index(max(scores))]

    def left(self):
        return []


class Http:
    """Any server that speaks OpenAI's chat completions, with `workers` requests in flight.

    The key goes to the host of --url and nowhere else: redirects are not followed and proxies not used. Whatever the
    server sends is scrubbed of it before it can be printed or written.
    """

    def __init__(self, args):
        try:
            url = urllib.parse.urlsplit(args.url)
            self.host, self.port = url.hostname, url.port
        except ValueError:
            self.host = None
        if not self.host or url.scheme not in ("http", "https") or "@" in url.netloc or url.query or url.fragment \
                or not args.url.isascii() or not args.url.isprintable() or " " in args.url:
            raise UserError("--url: expected the base of the server's addresses, such as http://localhost:8080/v1, "
                            "without user name, key or query")
        self.tls, self.path = url.scheme == "https", url.path.rstrip("/") + "/chat/completions"
        self.key = os.environ.get(args.key_env, "").strip() if args.key_env else ""
        if args.key_env and not (self.key.isascii() and self.key.isprintable() and self.key and " " not in self.key):
            raise UserError(f"the environment variable {args.key_env} (--key-env) holds no key")
        self.body = {"model": args.model, "max_tokens": args.max_new_tokens}
        self.body |= {} if args.temperature is None else {"temperature": args.temperature}
        self.name, self.args, self.reached, self.not_before = f"http:{args.model}", args, False, 0.0
        self.finished = queue.SimpleQueue()

    def outcomes(self, queries):
        lock = threading.Lock()

        def work():  # daemons: they end with the program, whatever they wait for
            try:
                while True:
                    with lock:
                        query = next(queries, None)
                    if query is None or self.stopped:
                        return self.finished.put(None)
                    self.drive(query)
                    self.finished.put(query.outcome)
            except BaseException as error:
                self.finished.put(error)

        self.stopped, running = False, self.args.workers
        for _ in range(running):
            threading.Thread(target=work, daemon=True).start()
        while running:
            outcome = self.finished.get()
            running -= outcome is None
            if isinstance(outcome, BaseException):
                self.stopped = True
                raise outcome
            if outcome:
                yield [outcome]

    def left(self):
        outcomes = []
        while not self.finished.empty():
            outcomes.append(self.finished.get())
        return [outcome for outcome in outcomes if isinstance(outcome, dict)]

    def drive(self, query):
        """All requests of one query, with waits that double after every fault in a row, or as the server asks."""
        faults = 0
        while not query.outcome:
            time.sleep(max(0.0, self.not_before - time.monotonic()))
            try:
                reply, faults = self.request(query.ask[0]), 0
            except Fault as fault:
                reply, faults = fault, faults + 1
            except UserError as error:
                raise UserError(f"query {query.item['id']!r}: {error}") from None
            query.tell(reply)
            if isinstance(reply, Fault) and not query.outcome:
                if reply.wait is not None:  # for everybody: the server has said when
                    self.not_before = max(self.not_before, time.monotonic() + reply.wait)
                else:
                    time.sleep(min(60.0, self.args.backoff * 2 ** (faults - 1)) * random.uniform(0.5, 1))
            if isinstance(reply, Fault) and query.outcome and not self.reached:
                raise UserError(f"{self.args.url}: {reply}; is the server running, and is this its address?")

    def request(self, messages):
        """One chat completion -> Reply. Fault for what may pass; UserError with the server's message for what won't."""
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        headers |= {"Authorization": f"Bearer {self.key}"} if self.key else {}
        deadline, body = time.monotonic() + self.args.timeout, bytearray()
        kind = {"context": ssl.create_default_context()} if self.tls else {}
        connection = (http.client.HTTPSConnection if self.tls else http.client.HTTPConnection)(
            self.host, self.port, timeout=self.args.timeout, **kind)
        try:
            connection.connect()
            self.reached, plug = True, connection.sock
            connection.request("POST", self.path, json.dumps(self.body | {"messages": messages}), headers)
            response = connection.getresponse()
            while (left := deadline - time.monotonic()) > 0 and len(body) < 8_000_000:
                plug.settimeout(left)  # of the whole request: a server that sends a byte a minute is none
                part = response.read1(65536)
                if not part:
                    break
                body += part
            else:
                raise Fault("the reply is longer than 8 MB" if left > 0 else "no reply in time (--timeout)")
        except ssl.SSLCertVerificationError as error:
            raise UserError(f"{self.host}: its certificate is not valid ({error.verify_message})") from None
        except TimeoutError:
            raise Fault("no reply in time (--timeout)") from None
        except (OSError, http.client.HTTPException) as error:
            raise Fault(f"connection: {self.clean(str(error) or type(error).__name__)}") from None
        finally:
            connection.close()
        try:
            found = json.loads(body)
        except (ValueError, RecursionError):
            found = None
        if response.status != 200:
            raise self.refusal(response, found, body)
        try:
            choice, usage = found["choices"][0], found.get("usage") or {}
            counts = [usage.get(key) for key in ("prompt_tokens", "completion_tokens")]
            return Reply(self.scrub(str(choice["message"]["content"] or "")), choice.get("finish_reason") == "length",
                         *(n if type(n) is int else 0 for n in counts))
        except (LookupError, TypeError, AttributeError):
            raise Fault(f"not a chat completion: {self.clean(body[:2000].decode('utf-8', 'replace'))!r}") from None

    def refusal(self, response, found, body):
        """What a status other than 200 means: a Fault for 429 and 5xx, else a UserError."""
        said = found.get("error", found) if isinstance(found, dict) else None
        said = said.get("message", said) if isinstance(said, dict) else said
        said = f"{response.status} {response.reason}: {said or body[:2000].decode('utf-8', 'replace')}"
        if response.status == 429 or response.status >= 500:
            return Fault(f"server: {self.clean(said)}", retry_after(response.headers.get("Retry-After")))
        if response.status < 400:
            where = response.headers.get("Location")
            said = f"{response.status}, redirects to {where}; if you trust it, give that as --url"
        return UserError(f"{self.host} answered {self.clean(said)}")

    def scrub(self, text):
        return text.replace(self.key, "[key]") if self.key else text

    def clean(self, text):
        """A server's words, fit for one line of a terminal."""
        return "".join(c if c.isprintable() else " " for c in " ".join(self.scrub(text).split()))[:300]


def retry_after(text):
    """Seconds to wait as a Retry-After header has them, in seconds or as a date -> 0 to 3600, or None."""
    try:
        if not re.fullmatch(r"\d{1,9}(\.\d*)?", (text or "").strip()):
            return min(3600.0, max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time()))
        return min(3600.0, float(text))
    except (TypeError, ValueError, OverflowError):
        return None


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
# report: what is in a file of records

SHORT = [f"{e.split('_')[1][0].upper()}{'+' if e.startswith('high') else '-'}" for e in EXPERTS]  # O+ O- C+ C- …
NAMED = re.compile(r"(?i)\b(openness|conscientious\w*|extr[ao]ver[st]\w*|introver[st]\w*|agreeable\w*|neurotic\w*)\b")


@dataclass(kw_only=True)
class Report:
    files: list[str]
    """Records, FILE.jsonl; of FILE.rejected.jsonl beside it, the reasons are counted."""
    json: bool = False
    """One JSON object instead of tables."""


def shares(records):
    """How many records, how many of them all-zero, and the share of each pole."""
    active = sum(active_experts(r["traits"]) for r in records)
    return {"records": len(records), "all_zero": sum(not any(r["traits"].values()) for r in records),
            "poles": {expert: n / len(records) for expert, n in zip(EXPERTS, active.tolist())}}


def measure(records, rejected=()):
    """All that `report` shows, as JSON values. rejected: entries of the rejected file."""
    reasons = Counter(entry["reason"].partition(":")[0][:60] for entry in rejected)
    active, total, words = torch.stack([active_experts(r["traits"]) for r in records]), shares(records), {}
    for name in ("query", "situation", "response"):
        texts = [r[name] if name != "situation" else r["cot"].get(name) if isinstance(r.get("cot"), dict) else None
                 for r in records]
        counts = sorted(len(text.split()) for text in texts if isinstance(text, str))
        if counts:
            words[name] = {"5 %": counts[len(counts) // 20], "median": counts[len(counts) // 2],
                           "95 %": counts[len(counts) * 19 // 20], "longest": counts[-1]}
    cues, quoted = {expert: Counter() for expert in EXPERTS}, []
    for record in records:
        why = record["cot"].get("traits") if isinstance(record.get("cot"), dict) else None
        for trait, one in why.items() if isinstance(why, dict) else ():  # other people's records may hold anything
            one = one if isinstance(one, dict) and trait in TRAITS else {}
            pole, cue = read_pole(one.get("pole")), fold(str(one.get("cue") or ""))
            if pole and cue:
                cues[f"{'high' if pole > 0 else 'low'}_{trait}"][cue] += 1
                quoted.append(cue.strip(" .,;:!?\"'") in fold(record["query"]))
    zero = total["all_zero"] + reasons["all-zero vector"]
    teachers = [r["teacher"] for r in (*records, *rejected) if isinstance(r.get("teacher"), dict)]
    return total | {
        "rejected": dict(reasons.most_common()),
        "all_zero_share": zero / (len(records) + reasons["all-zero vector"]),
        "active_poles": {str(k): n for k, n in sorted(Counter(active.sum(-1).int().tolist()).items())},
        "together": {a: dict(zip(EXPERTS, row)) for a, row in zip(EXPERTS, (active.T @ active).int().tolist())},
        "duplicate_queries": len(records) - len({fold(r["query"]) for r in records}),
        "duplicate_responses": len(records) - len({fold(r["response"]) for r in records}),
        "words": words, "naming_traits": [r["id"] for r in records if NAMED.search(r["response"])],
        "cues": {expert: found.most_common(5) for expert, found in cues.items()},
        "cues_quoted": sum(quoted) / len(quoted) if quoted else None,
        **{key: {name: shares([r for r in records if r.get(key) == name]) for name in sorted(
            {r[key] for r in records if isinstance(r.get(key), str)})} for key in ("domain", "culture")},
        "teachers": dict(Counter(t.get("name", "?") for t in teachers)),
        **{key: sum(t.get(key, 0) for t in teachers) for key in ("calls", "tokens_read", "tokens_written")}}


def tables(m):
    """What `measure` found, for a terminal of 80 columns."""
    def cut(text, width):
        return text if len(text) <= width else text[:width - 1] + "…"

    def line(name, cells, width):
        return f"  {cut(name, 24):<24}" + "".join(f"{one:>{width}}" for one in cells)
    naming, n = ", ".join(map(str, m["naming_traits"])), m["records"]
    lines = [f"  {n} records, {sum(m['rejected'].values())} rejected; {m['calls']} calls, {m['tokens_read']:,} tokens "
             f"read, {m['tokens_written']:,} written",
             *(f"  {count:>7} by {cut(name, 60)}" for name, count in m["teachers"].items()),
             *(f"  {count:>7} rejected: {cut(reason, 60)}" for reason, count in list(m["rejected"].items())[:8]), "",
             line("all-zero vectors", [f"{m['all_zero_share']:.1%}"], 9) + "   (of records and rejected ones)",
             line("duplicate queries", [m["duplicate_queries"]], 9),
             line("duplicate responses", [m["duplicate_responses"]], 9),
             line("responses naming traits", [len(m["naming_traits"])], 9) + f"   {cut(naming, 40)}"]
    if m["cues_quoted"] is not None:
        lines.append(line("cues that are quoted", [f"{m['cues_quoted']:.1%}"], 9) + "   (word for word in the query)")
    lines += ["", line("words", ["5 %", "median", "95 %", "longest"], 9)]
    lines += [line(name, found.values(), 9) for name, found in m["words"].items()]
    lines += ["", line("active poles", m["active_poles"], 9), line("records", m["active_poles"].values(), 9), ""]
    lines += [line("pole", ["share"], 9) + "   cues most often cited"]
    for expert in EXPERTS:
        cues = "; ".join(f"{cue} ({count})" for cue, count in m["cues"][expert])
        lines.append(line(expert, [f"{m['poles'][expert]:.1%}"], 9) + f"   {cut(cues, 42)}")
    lines += ["", line("records with both", SHORT, 5)]
    lines += [line(expert, row.values(), 5) for expert, row in m["together"].items()]
    for key in ("domain", "culture"):
        if m[key]:
            lines += ["", line(f"{key}, poles in %", [" all", " zero", *(f" {name}" for name in SHORT)], 4)]
            lines += [line(name, [f"{g['records']:>4}", f"{g['all_zero']:>5}", *(
                f"{100 * p:.0f}" for p in g["poles"].values())], 4) for name, g in m[key].items()]
    return "\n".join(text.rstrip() for text in lines)


def report(args):
    """Counts, poles, all-zero vectors, lengths, duplicates, cues, per domain and culture. Exit status 1 if more than
    20 % of the trait vectors are all zero."""
    records, rejected = [], []
    for file in args.files:
        records += read_records(file)
        beside, done = Path(file).with_suffix(".rejected.jsonl"), {str(r["id"]) for r in records}
        rejected += read_rejected(beside, done).values()
    found = measure(records, rejected)
    print(json.dumps({"files": args.files, **found}, ensure_ascii=False) if args.json
          else f"{', '.join(args.files)}\n\n{tables(found)}")
    if found["all_zero_share"] > 0.02:
        print(f"warning: {found['all_zero_share']:.1%} of the trait vectors are all zero, the source's sign of a "
              "synthesis that has failed (at most 2 % is fine)", file=sys.stderr)
    return 1 if found["all_zero_share"] > 0.2 else 0


# ----------------------------------------------------------------------------------------------------------------------
# split

@dataclass(kw_only=True)
class Split:
    files: list[str]
    """Records, FILE.jsonl; several are put together."""
    out: str | None = None
    """Folder for train.jsonl, validation.jsonl and test.jsonl; FILE without .jsonl if not given."""
    hold_out: list[str] = ()
    """Domains that go into test.jsonl whole, and so into no training."""
    seed: int = 0
    """Of the split; train.py --data FILE.jsonl --seed N makes the same one."""
    overwrite: bool = False
    """Replace what is there."""


def split(args):
    """Train, validation and test.jsonl, 80/10/10 by query: two records of one query never part."""
    records, lines = [], {}
    for file in args.files:
        for record in read_records(file):
            if lines.setdefault(str(record["id"]), file) != file:
                raise UserError(f"{file}: id {record['id']!r} stands in {lines[str(record['id'])]} too")
            records.append(record)
    out, domains = Path(args.out or Path(args.files[0]).with_suffix("")), {str(r.get("domain")) for r in records}
    if set(args.hold_out) - domains:
        raise UserError(f"--hold-out: no record is of the domain {min(set(args.hold_out) - domains)!r}; there are "
                        f"{', '.join(sorted(domains))}")
    held = {fold(r["query"]) for r in records if str(r.get("domain")) in args.hold_out}
    splits = split_records([r for r in records if fold(r["query"]) not in held], args.seed)
    splits["test"] += [r for r in records if fold(r["query"]) in held]
    for name, part in splits.items():
        if not any(any(r["traits"].values()) for r in part):
            raise UserError(f"{', '.join(args.files)}: too few records: none with an active trait for {name}")
        if (out / f"{name}.jsonl").exists() and not args.overwrite:
            raise UserError(f"{out / f'{name}.jsonl'} is there already; --overwrite replaces it")
    for name, part in splits.items():
        write_records(out / f"{name}.jsonl", part)
        print(f"{out / f'{name}.jsonl'}: {len(part)} records, {len({fold(r['query']) for r in part})} queries")


# ----------------------------------------------------------------------------------------------------------------------
# review: people check the labels

@dataclass(kw_only=True)
class Review:
    file: list[str] = field(default_factory=list)
    """Records, FILE.jsonl. With --import it may be left out: then the sample's own records are corrected."""
    sample: int = 200
    """How many records to draw, so that all poles are about equally frequent."""
    out: str | None = None
    """The table to fill in, FILE.review.csv if not given; with --import the corrected records, FILE.corrected.jsonl."""
    show_labels: bool = False
    """Show the annotators what the teacher chose."""
    import_: list[str] = ()
    """Tables that annotators have filled in with 1 (high), -1 (low), 0 (neither) or nothing (can't say)."""
    seed: int = 0
    """Of the sample."""
    overwrite: bool = False
    """Replace what is there."""


def review(args):
    """Draw a sample of records for people to label in a spreadsheet; or, with --import, measure how far they agree with
    each other and with the teacher, and write corrected records."""
    if len(args.file) > 1 or not args.file and not args.import_:
        raise UserError(f"review takes one file of records, found {len(args.file)}; see python synth.py review --help")
    if args.import_:
        return take_in(args)
    records, out = read_records(args.file[0]), Path(args.out or Path(args.file[0]).with_suffix(".review.csv"))
    if out.suffix != ".csv":
        raise UserError(f"--out is {out}, expected a file named .csv")
    if out.exists() and not args.overwrite:
        raise UserError(f"{out} is there already, perhaps filled in; --overwrite replaces it")
    sample, extra = stratified(records, args.sample, args.seed), ("domain", "culture", "history")
    texts = ["id", *(key for key in extra if any(r.get(key) for r in sample)), "query", "response"]
    columns = [*texts, *TRAITS, "comment", *(f"teacher_{trait}" for trait in TRAITS if args.show_labels)]
    with atomic(out) as part, open(part, "w", newline="", encoding="utf-8-sig") as file:  # the mark is for Excel
        table = csv.DictWriter(file, columns, restval="", extrasaction="ignore")
        table.writeheader()
        for r in sample:
            said = "\n".join(f"{turn['role']}: {turn['content']}" for turn in r.get("history") or [])
            table.writerow({key: cell(r.get(key)) for key in texts} | {"history": cell(said)}
                           | {f"teacher_{trait}": r["traits"].get(trait, 0) for trait in TRAITS})
    write_records(out.with_suffix(".records.jsonl"), sample)
    counts = sum(active_experts(r["traits"]) for r in sample).int().tolist()
    print(f"{out}: {len(sample)} of {len(records)} records ({', '.join(f'{n} {s}' for n, s in zip(counts, SHORT))}).\n"
          "Give each annotator a copy, to fill the traits' columns with 1 (high), -1 (low),\n"
          "0 (neither) or nothing (can't say). Then:\n"
          f"python synth.py review {args.file[0]} --import FIRST.csv SECOND.csv …")


def cell(value):
    """A text for a spreadsheet, which must not take it for a formula."""
    text = "" if value is None else str(value)
    return "'" + text if text[:1] in ("=", "+", "-", "@", "\t", "\r") else text


def stratified(records, size, seed):
    """A sample that takes from each pole in turn (and from the all-zero records) as long as there are any, shuffled."""
    rng, taken = random.Random(seed), {}
    order = rng.sample(records, len(records))
    strata = [[r for r in order if active_experts(r["traits"])[e]] for e in range(len(EXPERTS))]
    strata = [iter(s) for s in (*strata, [r for r in order if not any(r["traits"].values())])]
    while len(taken) < min(size, len(records)):
        for stratum in strata:
            new = next((r for r in stratum if id(r) not in taken), None)
            if new is not None and len(taken) < size:
                taken[id(new)] = new
    return rng.sample(list(taken.values()), len(taken))


def read_labels(path, records):
    """A filled-in table -> {id: {trait: 1, 0 or −1}}, empty cells left out. One UserError names every cell that is
    wrong (the first five), by row and column."""
    known, labels, problems = {cell(r["id"]): str(r["id"]) for r in records}, {}, []
    for number, row in read_table(path, ["id", *TRAITS]):
        key = known.get(row["id"].strip(), known.get(cell(row["id"].strip())))
        if key is None or key in labels:
            problems.append(f"row {number}: id {row['id']!r} " + ("stands there twice" if key else "is no record's"))
            continue
        labels[key] = {}
        for trait in TRAITS:
            text = row.get(trait, "").strip()
            if text and read_pole(text) is None:
                problems.append(f"row {number}, column {trait}: {text[:40]!r}, expected 1, 0, -1 or nothing")
            elif text:
                labels[key][trait] = read_pole(text)
    if problems:
        more = f"; and {len(problems) - 5} more" if problems[5:] else ""
        raise UserError(f"{path}: {'; '.join(problems[:5])}{more}")
    return labels


def krippendorff_alpha(ratings):
    """Krippendorff's α for ordinal values: ratings (annotators, units), NaN where there is none -> 1 for full
    agreement, 0 for chance, NaN where nothing varies or no unit has two ratings.

    Coincidences o_ck count the pairs of values within a unit, each weighted 1/(m − 1) for m ratings; two values are as
    far apart as there are values from one to the other, δ_ck = (Σ_{g=c..k} n_g − (n_c + n_k)/2)², and
    α = 1 − Σ o δ / (Σ n_c n_k δ / (n − 1)).  (Krippendorff, Content Analysis, chapter on reliability.)
    """
    ratings = np.asarray(ratings, dtype=float)
    values = np.unique(ratings[~np.isnan(ratings)])
    counts = (ratings[None] == values[:, None, None]).sum(1)  # (V, N)
    m = counts.sum(0)
    counts, m = counts[:, m > 1], m[m > 1]
    o = (counts[:, None] * counts - np.eye(len(values))[:, :, None] * counts) @ (1 / (m - 1))  # (V, V)
    n = o.sum(1)
    below = n.cumsum() - n / 2
    distance = (below[:, None] - below) ** 2
    expected = (np.outer(n, n) * distance).sum()
    return float(1 - (n.sum() - 1) * (o * distance).sum() / expected) if expected > 0 else math.nan


def take_in(args):
    """review --import: agreement, and the corrected records."""
    records = read_records(args.file[0] if args.file else find_sample(args.import_[0]))
    out = Path(args.out or Path(args.file[0] if args.file else args.import_[0]).with_suffix(".corrected.jsonl"))
    if out.exists() and not args.overwrite:
        raise UserError(f"{out} is there already; --overwrite replaces it")
    if len({Path(path).resolve() for path in args.import_}) < len(args.import_):
        raise UserError("--import: one table is given twice; it would agree with itself")
    tables = [read_labels(path, records) for path in args.import_]
    teacher = {str(r["id"]): {t: r["traits"].get(t, 0) for t in TRAITS} | r.get("teacher_traits", {}) for r in records}
    units = [key for key in teacher if any(key in labels for labels in tables)]

    def alphas(raters):
        return [krippendorff_alpha([[r.get(u, {}).get(t, math.nan) for u in units] for r in raters]) for t in TRAITS]
    rows = ([("annotators with each other", alphas(tables))] if len(tables) > 1 else []) + [
        (f"{Path(path).name[:24]} with teacher", alphas([labels, teacher]))
        for path, labels in zip(args.import_, tables)]
    print(f"Krippendorff's alpha, ordinal, {len(units)} records: 1 is full agreement, 0 chance\n\n  {'':<37}"
          + "".join(f"{trait[:5]:>8}" for trait in TRAITS))
    for name, found in rows:
        print(f"  {name:<37}" + "".join(f"{'–' if math.isnan(a) else format(a, '.3f'):>8}" for a in found))
    changed, corrected = Counter(), []
    for record in records:
        new, kept = dict(record["traits"]), dict(record.get("teacher_traits", {}))
        for trait in TRAITS:
            votes = Counter(labels[str(record["id"])][trait] for labels in tables
                            if trait in labels.get(str(record["id"]), {}))
            value, count = votes.most_common(1)[0] if votes else (0, 0)
            if 2 * count > votes.total() and value != new.get(trait, 0):  # else the teacher's label stays
                kept.setdefault(trait, new.get(trait, 0))
                new[trait] = value
                changed[trait] += 1
        corrected.append(record | {"traits": new} | ({"teacher_traits": kept} if kept else {}))
    write_records(out, corrected)
    print(f"\n{out}: {len(records)} records, {changed.total()} labels changed to what more than half of the\n"
          "annotators gave; teacher_traits keeps the originals"
          + "".join(f"\n  {n:>6}  {trait}" for trait, n in changed.items()))


def find_sample(table):
    """The records of the sample that a table was made from: FOLDER/*.records.jsonl with all of the table's ids."""
    rows = {row["id"].strip() for _, row in read_table(table, ["id", *TRAITS])}
    for file in sorted(Path(table).parent.glob("*.records.jsonl")):
        if rows <= {cell(r["id"]) for r in read_records(file)}:
            return file
    raise UserError(f"{table}: beside it is no .records.jsonl with all of its ids; name the records: python synth.py "
                    "review FILE.jsonl --import …")


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


def parse(cls, argv=None, description=None, prog=None):
    """Fill the dataclass `cls` from the command line: --name VALUE for each field, a switch for each bool, several
    values for a list; a field without a default is a list of plain words, perhaps empty if it has a default_factory."""
    parser = Parser(description=description, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
                    prog=prog)
    add_fields(parser, cls)
    return check_numbers(cls(**vars(parser.parse_args(argv))))


def check_numbers(args):
    """UserError for a number out of its range: NaN, infinite, negative, or 0 where 0 makes no sense -> args."""
    for key, value in vars(args).items():
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            low = 0 if key in ("seed", "lam", "lr_warmup", "temperature", "replies", "retries") else \
                1 if isinstance(value, int) else 1e-9
            high = 1 if key in ("lr_warmup", "top_p") else 2**31
            if not low <= value <= high:
                raise UserError(f"--{key.replace('_', '-')} is {value}, expected a number from {low:g} to {high:g}")
    return args


def add_fields(parser, cls):
    hints, sentences = typing.get_type_hints(cls), field_help(cls)
    for one in fields(cls):
        kind, sentence = hints[one.name], sentences[one.name]
        if one.default is MISSING:
            parser.add_argument(one.name, nargs="+" if one.default_factory is MISSING else "*",
                                metavar="FILE" if one.name.startswith("file") else "TEXT", help=sentence)
            continue
        if type(None) in typing.get_args(kind):  # "int | None": None stands for the preset's value
            kind = typing.get_args(kind)[0]
        option = {"default": one.default, "help": sentence.replace("%", "%%")}
        if one.default not in (None, False, ()):
            option["help"] += f" (default: {one.default})"
        if kind is bool:
            option["action"] = "store_true"
        elif typing.get_origin(kind) is typing.Literal:
            option["choices"] = typing.get_args(kind)
        elif typing.get_origin(kind) is list:
            option.update(nargs="+", metavar="TEXT")
        else:
            option.update(type=kind, metavar={int: "N", float: "X", str: "TEXT"}[kind])
        parser.add_argument("--" + one.name.rstrip("_").replace("_", "-"), dest=one.name, **option)


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


def pick_device(name=None):
    """cpu, cuda or cuda:N -> torch.device; None takes a GPU if there is one."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name!r}: expected cpu, cuda or cuda:N")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("a CUDA GPU, and a PyTorch built for it: --device cpu does without, slowly")
    return device


def pick_dtype(name, device):
    """The base's dtype: as named, else bfloat16 on a GPU and float32 on a CPU."""
    if device.type == "cuda" and name != "float32" and not torch.cuda.is_bf16_supported():
        raise UserError(f"bfloat16, which {torch.cuda.get_device_name(device)} cannot do: use --dtype float32")
    return getattr(torch, name or ("bfloat16" if device.type == "cuda" else "float32"))


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
    """template: whose phrases a single FILE.jsonl is made of; no phrase is in two splits."""
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
    for key in ("queries", "model", "url", "key_env", "retry_rejected"):
        given = getattr(args, key)
        if key in needs and not given:
            raise UserError(f"--teacher {args.teacher} needs --{key}: {field_help(Args)[key]}")
        if given and (args.teacher == "template" or args.teacher == "local" and key in ("url", "key_env")):
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
    items, duplicates = read_queries(args.queries)
    sink = Sink(args.out)
    again = sink.refused if args.retry_rejected else {}
    todo = [item for item in items if str(item["id"]) not in sink.done
            and (str(item["id"]) not in sink.refused or str(item["id"]) in again)]
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
        reasons = Counter(entry["reason"].partition(":")[0][:60] for entry in sink.refused.values())
        print(f"{sink.rejected}: {len(sink.refused)} rejected, which --retry-rejected tries again\n"
              + "\n".join(f"  {count:>6}  {reason}" for reason, count in reasons.most_common(8)))


COMMANDS = {"report": (Report, report), "split": (Split, split), "review": (Review, review)}  # without one: synthesis


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in COMMANDS:
        cls, function = COMMANDS[argv[0]]
        return function(parse(cls, argv[1:], function.__doc__, f"synth.py {argv[0]}"))
    args = parse(Args, argv, __doc__)
    check(args)
    return from_templates(args) if args.teacher == "template" else synthesise(args)


if __name__ == "__main__":
    run_command(main)
