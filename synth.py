"""The data: what a record is, how it is read and written, the template teacher, and the way from a query to a record.

A record is one JSON object a line, {"id", "query", "response", "traits": {trait: -1 | 0 | 1}} and, if there are any,
"history", "cot", "domain", "culture"; fields that nobody here knows are kept as they are.

What is notable:
- every line is checked when it is read; a message names the file and the line, what was found and what was expected
- a record whose traits are all zero is a failure of synthesis: it is counted and reported and never trained on
- the template teacher needs no model: it composes situations from cues, each calling for one pole, and a reply from a
  neutral answer and one sentence in the manner of every active pole. Its text is data/lab.json
- the other teachers are language models. What has become of a query is on disk as soon as it is known,
  and a second start does the rest

    python synth.py --teacher template --out data/lab --count 20000      # train.jsonl, validation.jsonl, test.jsonl
    python synth.py --teacher http --url http://localhost:8080/v1 --model any --queries asked.txt --out data/mine.jsonl
    python synth.py report data/mine.jsonl                               # also: split, review
"""
import random
import re
import sys
import time
import typing
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from string import Template

import torch
from tqdm import tqdm

from lora import EXPERTS, TRAITS
from model import Transformer, generate, pad
from support.chat import Chat
from support.command import field_help, parse, pick_device, pick_dtype, run_command
from support.compile import compile_decoding
from support.files import UserError, read_json
from support.output import RecordWriter, reasons
from support.records import SPLITS, check_record, read_queries, write_records
from support.replies import (CHOICES, Fault, LONGEST, Reply, Unusable, check_language, read_object, read_text,
                             read_traits)
from support.review import COMMANDS
from support.server import Http


LAB = Path(__file__).parent / "data" / "lab.json"


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


def message(item):
    """The query as a teacher is shown it, with what is known of the conversation and the person."""
    parts = [f"{turn['role']}: {turn['content']}" for turn in item.get("history") or []]
    if parts:
        parts = ["The conversation before it:", *parts]
    if item.get("culture"):
        parts.append(f"The person's culture: {item['culture']}")
    return "\n".join([*parts, f'The message:\n"""\n{item["query"].strip()}\n"""'])


# ----------------------------------------------------------------------------------------------------------------------
# One query's way to a record

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
# A model folder as the teacher

class Local:
    """A model folder in this process: replies in batches of similar length, the longest first, which are mostly those
    that have come furthest."""

    MOST_TOKENS = 8192  # of a prompt; fewer where the model's context is shorter

    def __init__(self, args):
        self.batch, self.limit, self.temperature = args.batch, args.max_new_tokens, args.temperature or 0.0
        device = pick_device(args.device)
        self.model = Transformer.from_pretrained(args.model, pick_dtype(args.dtype, device), device)
        if args.compile:
            compile_decoding(self.model)
        self.chat, self.name = Chat.from_dir(args.model), f"local:{Path(args.model).resolve().name}"
        self.longest = min(self.MOST_TOKENS, (self.model.context or 2**31) - 1)  # one token is left to write
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
        replies = [Fault(f"the prompt has {len(prompt):,} tokens, more than {self.longest:,}") for prompt in prompts]
        fits = [i for i, prompt in enumerate(prompts) if len(prompt) <= self.longest]
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


def check_args(args):
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
    items, duplicates = read_queries(args.queries)
    sink = RecordWriter(args.out)
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
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in COMMANDS:
        cls, function = COMMANDS[argv[0]]
        return function(parse(cls, argv[1:], function.__doc__, f"synth.py {argv[0]}"))
    args = parse(Args, argv, __doc__)
    check_args(args)
    return from_templates(args) if args.teacher == "template" else synthesise(args)


if __name__ == "__main__":
    run_command(main)
