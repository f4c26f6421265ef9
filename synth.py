"""The data: what a record is, the template teacher, and Persona-CoT, by which a language model writes records.

A record is one JSON object on one line of a .jsonl file. This one is spread over several lines to be readable:

    {"id": "train-3",
     "query": "My aunt wants me to help with the wedding. Give me the simple,
               ordinary way that most people use. What would you do?",
     "traits": {"openness": -1},
     "response": "Talk to your aunt first. Keep what works, like the habit of
                  many years or the old recipe.",
     "cot": {"situation": "My aunt wants me to help with the wedding.",
             "traits": {"openness": {"pole": "low", "cue": "Give me the simple,
                                     ordinary way that most people use."}}},
     "domain": "family"}

`traits` says which poles the situation calls for: 1 is the high pole, -1 the low one, 0 or nothing means neither. If
all are 0, Persona-CoT rejects the query; if a file from elsewhere has such a record, training leaves it out and says
how many there were. Optional fields are `history` (earlier turns), `cot` (the teacher's reasoning), `domain`,
`culture`, `teacher` (which teacher wrote the record, with how many calls and tokens) and `teacher_traits` (the
teacher's labels, where a review changed them). Other fields are kept.

What is notable:
- a teacher writes the records. The template teacher needs no model: it combines sentences of data/lab.json
- Persona-CoT asks a language model what the situation is, then which poles it calls for and by which cue, and then for
  a response in that manner. All prompts are in PROMPTS
- the language model is a model folder (LocalTeacher, below) or a server (HttpTeacher, in support/server.py)
- finished queries are appended at once. After Ctrl-C or a kill the same command continues; it repeats only the queries
  that were in progress
- read it from the top: the template teacher, the prompts, the steps from a query to a record, a model folder as the
  teacher, the command. Files of records are checked in support/records.py, replies are read in support/replies.py

    python synth.py --teacher template --out data/lab --count 20000
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
from itertools import islice
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
from support.records import SPLITS, check_record, read_queries, refuse_to_replace, write_records
from support.replies import (CHOICES, LONGEST, QueryRejected, Reply, RequestFailed, UnusableReply, check_language,
                             check_text, read_object, read_text, read_traits)
from support.review import COMMANDS
from support.server import HttpTeacher


LAB = Path(__file__).parent / "data" / "lab.json"


# ----------------------------------------------------------------------------------------------------------------------
# The template teacher

@cache
def lab():
    """Returns data/lab.json: sentence frames, each for one split, and the words that fill them, for all splits."""
    return read_json(LAB)


def template_record(rng, split, domain, n_poles):
    """Returns a record without an id: a situation with a cue for each of n_poles poles, and a reply in their manner.

    The record also has the parts of the reply: `neutral`, which shows no pole, and `manner`, a sentence for each active
    pole.
    """
    frames, poles = lab()["domains"][domain], lab()["poles"]
    active = [EXPERTS[2 * TRAITS.index(trait) + rng.randrange(2)] for trait in rng.sample(TRAITS, n_poles)]
    slots = {name: rng.choice(words) for name, words in frames["slots"].items()}
    slots["action"], slots["other_action"] = rng.sample(lab()["actions"], 2)
    situation = rng.choice(frames["openings"][split]).format(**slots)
    neutral = rng.choice(lab()["neutral"][split]).format(**slots)
    cues = {expert: rng.choice(poles[expert]["cues"][split]) for expert in active}
    manner = {}
    for expert in sorted(active, key=EXPERTS.index):
        phrase, other_phrase = rng.sample(poles[expert]["phrases"], 2)
        frame = rng.choice(poles[expert]["manner"][split])
        manner[expert] = frame.format(phrase=phrase, other_phrase=other_phrase)
    before = [sentence for expert, sentence in manner.items() if poles[expert]["position"] == "before"]
    after = [sentence for expert, sentence in manner.items() if poles[expert]["position"] == "after"]
    traits, reasoning = {}, {}
    for expert in active:
        pole, trait = expert.split("_")
        traits[trait] = 1 if pole == "high" else -1
        reasoning[trait] = {"pole": pole, "cue": cues[expert]}
    return {
        "query": " ".join([situation, *cues.values(), rng.choice(lab()["closings"][split])]),
        "response": " ".join([*before, neutral, *after]),
        "traits": traits,
        "cot": {"situation": situation, "traits": reasoning},
        "domain": domain, "neutral": neutral, "manner": manner,
    }


def template_records(split, count, seed=0):
    """Returns `count` records with different queries, the same ones for the same seed.

    Half of them have one active pole, 30 % two, 20 % three. Each sentence frame belongs to one split; all splits share
    the words that fill the frames. The two held-out domains make up half of the test split and are in no other.
    """
    rng, records, seen = random.Random(f"{seed} {split}"), [], set()
    held_out = lab()["held_out_domains"]
    domains = [domain for domain in lab()["domains"] if domain not in held_out]
    for _ in range(1000 + 10 * count):  # tries, some of which repeat a query
        if len(records) == count:
            return records
        domain = rng.choice(held_out if split == "test" and rng.random() < 0.5 else domains)
        record = template_record(rng, split, domain, rng.choices((1, 2, 3), (5, 3, 2))[0])
        if record["query"] not in seen:
            seen.add(record["query"])
            records.append({"id": f"{split}-{len(records)}", **record})
    raise UserError(f"{LAB.name} is too small for {count} different queries for {split}: it gave {len(records)}")


def from_templates(records):
    """Returns whether the template teacher wrote all records: only its have the field "manner"."""
    return all("manner" in record for record in records)


@cache
def signature_patterns():
    return [re.compile(r"\b(?:" + "|".join(map(re.escape, lab()["poles"][expert]["signature"])) + r")\b")
            for expert in EXPERTS]


def signatures(text):
    """Returns ten 0/1: which poles' signatures a reply has.

    Every sentence in a pole's manner has one of its signatures, and no other text of the template teacher has. Counting
    them in replies therefore shows what an expert has learned.
    """
    return [int(bool(pattern.search(text.lower()))) for pattern in signature_patterns()]


# ----------------------------------------------------------------------------------------------------------------------
# Persona-CoT: what a teacher is asked. The paper gives no prompts, so all of them are ours. $names are filled in

MANNERS = {
    "high_openness": "imaginative, curious", "low_openness": "down to earth",
    "high_conscientiousness": "orderly, step by step", "low_conscientiousness": "easy-going, no plan needed",
    "high_extraversion": "lively, enthusiastic", "low_extraversion": "quiet, of few words",
    "high_agreeableness": "warm, on the person's side", "low_agreeableness": "frank, setting limits",
    "high_neuroticism": "worried, seeing what could go wrong", "low_neuroticism": "calm, reassuring",
}
POLES = "\n".join(f"{trait}: high is {MANNERS['high_' + trait]}; low is {MANNERS['low_' + trait]}" for trait in TRAITS)
# This is a form and not an example, because small models repeat an example's content for every query
FORM = "{" + ", ".join(f'"{trait}": {{"pole": "high|low|0", "cue": "..."}}' for trait in TRAITS) + "}"
# In each prompt the fixed text comes first where it can: servers cache a common prefix
PROMPTS = {name: Template(text.strip()) for name, text in {
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


def format_query(item):
    """Returns the query as a teacher sees it, with the earlier conversation and the person's culture, if given."""
    parts = []
    if item.get("history"):
        parts += ["The conversation before it:", *(f"{turn['role']}: {turn['content']}" for turn in item["history"])]
    if item.get("culture"):
        parts.append(f"The person's culture: {item['culture']}")
    return "\n".join([*parts, f'The message:\n"""\n{item["query"].strip()}\n"""'])


# ----------------------------------------------------------------------------------------------------------------------
# The steps from a query to a record

PATIENCE = 600  # seconds of waiting that a server may ask for in one step before further waits count as tries; ours


class Question(typing.NamedTuple):
    messages: list
    choices: tuple | None = None  # if given, the reply is one of these words instead of a written text


class Synthesis:
    """One query on its way to a record.

    A teacher works on many queries at the same time, so it advances each of them by hand:

        while not synthesis.outcome:
            synthesis.tell(the reply to synthesis.question)

    A reply is a Reply, one of the question's choices, a RequestFailed (the question is asked again) or a QueryRejected.
    The outcome is the record or, if the query was rejected, its entry in the rejected file. The steps are generators:
    `yield` hands out a question and returns the reply to it.
    """

    def __init__(self, item, steps, retries, teacher):
        self.item, self.retries = item, retries
        self.question, self.outcome, self.last_text = None, None, ""
        self.provenance = {"name": teacher, "steps": steps, "calls": 0, "tokens_read": 0, "tokens_written": 0}
        self.progress = self.make_record(steps)
        self.tell(None)  # go to the first question

    def tell(self, reply):
        try:
            if isinstance(reply, QueryRejected):
                raise reply
            self.question = self.progress.send(reply)
        except StopIteration as end:
            record = {**self.item, **end.value, "teacher": self.provenance}
            problem = check_record(record)
            self.outcome = self.rejection(problem) if problem else record
        except QueryRejected as problem:
            self.outcome = self.rejection(str(problem))

    def rejection(self, reason):
        return {"id": self.item["id"], "query": self.item["query"], "reason": reason, "raw": self.last_text,
                "teacher": self.provenance}

    def make_record(self, steps):
        """The steps, written as if the teacher answered at once. Returns the record's new fields."""
        if steps == "joint":
            situation, traits, reasoning, response = yield from self.ask("joint", self.parse_joint)
        else:
            situation = yield from self.ask("situation", lambda reply: read_text(reply, "situation"))
            if steps == "separate":
                traits, reasoning = yield from self.ask("traits", self.parse_traits, situation=situation)
            else:
                traits, reasoning = yield from self.score_traits()
            manner = "; ".join(MANNERS[f"{reasoning[trait]['pole']}_{trait}"] for trait in traits)
            response = yield from self.ask("response", self.parse_response, situation=situation, manner=manner)
        return {"response": response, "traits": traits, "cot": {"situation": situation, "traits": reasoning}}

    def parse_joint(self, reply):
        found = read_object(reply, {"situation", "traits", "response"})
        situation, response = (check_text(found.get(key), key) for key in ("situation", "response"))
        traits, reasoning = read_traits(found.get("traits"))
        check_language(response, self.item)
        return situation, traits, reasoning, response

    def parse_traits(self, reply):
        found = read_object(reply, {"traits", *TRAITS})  # an object that has any of these keys
        if "traits" in found:
            return read_traits(found["traits"])
        found.pop("situation", None)  # some models repeat it
        return read_traits(found)

    def parse_response(self, reply):
        response = read_text(reply, "response")
        check_language(response, self.item)
        return response

    def score_traits(self):
        """Let the teacher choose high, low or neither for each trait. It writes nothing that could be misread."""
        traits, reasoning = {}, {}
        for trait in TRAITS:
            messages = self.messages("score", high=MANNERS["high_" + trait], low=MANNERS["low_" + trait])
            choice = yield Question(messages, tuple(CHOICES))
            self.provenance["calls"] += 1
            if CHOICES[choice]:
                traits[trait] = CHOICES[choice]
                reasoning[trait] = {"pole": choice, "cue": ""}
        if not traits:
            raise QueryRejected("all-zero vector: neither is the most probable for every trait")
        return traits, reasoning

    def messages(self, prompt, **parts):
        text = PROMPTS[prompt].substitute(parts, message=format_query(self.item))
        return [{"role": "system", "content": PROMPTS["system"].template}, {"role": "user", "content": text}]

    def ask(self, prompt, read, **parts):
        """Ask until `read` can use the reply, and return its result.

        After an unusable reply, the next question includes the complaint. After a failed request the same question is
        asked again. Waits that a server asks for do not count as tries until they add up to PATIENCE.
        """
        messages = first = self.messages(prompt, **parts)
        tries, waited = 0, 0.0
        while tries <= self.retries:
            reply = yield Question(messages)
            self.provenance["calls"] += 1
            if isinstance(reply, RequestFailed):
                reason = str(reply)
                if not reply.wait or waited >= PATIENCE:
                    tries += 1
                waited += reply.wait or 0.0
                continue
            tries += 1
            self.last_text = reply.raw[:LONGEST]
            self.provenance["tokens_read"] += reply.tokens_read
            self.provenance["tokens_written"] += reply.tokens_written
            try:
                if len(reply.text) > LONGEST:
                    raise UnusableReply(f"it is longer than {LONGEST:,} characters")
                if reply.cut_off and not reply.text:
                    raise UnusableReply("it was cut off before the reply began (--max-new-tokens); think less")
                return read(reply)
            except UnusableReply as problem:
                reason = str(problem)
                messages = [*first, {"role": "assistant", "content": reply.text[:2000].strip() or "…"},
                            {"role": "user", "content": PROMPTS["again"].substitute(complaint=reason)}]
        raise QueryRejected(reason)


# ----------------------------------------------------------------------------------------------------------------------
# A model folder as the teacher

class LocalTeacher:
    """A model folder, loaded into this process.

    It writes replies in batches. A batch holds prompts of similar length, so that little of it is padding. The longest
    prompts come first: most belong to queries that are nearly finished, which are then saved soonest.
    """

    MOST_TOKENS = 8192  # the longest prompt; less if the model's context is shorter

    def __init__(self, args):
        self.batch, self.max_new_tokens, self.temperature = args.batch, args.max_new_tokens, args.temperature or 0.0
        device = pick_device(args.device)
        self.model = Transformer.from_pretrained(args.model, pick_dtype(args.dtype, device), device, int8=args.int8)
        if args.compile:
            compile_decoding(self.model)
        self.chat, self.name = Chat.from_dir(args.model), f"local:{Path(args.model).resolve().name}"
        self.longest = min(self.MOST_TOKENS, (self.model.context or 2**31) - 1)  # leaves room to write one token
        self.generator = torch.Generator().manual_seed(args.seed)

    def run(self, queries, save):
        """Take every query (an iterator of Synthesis) to its outcome, and save([outcome, …]) after each batch."""
        window = []
        while True:
            window += islice(queries, 4 * self.batch - len(window))  # several batches, to find similar lengths among
            if not window:
                return
            window.sort(key=lambda query: sum(len(m["content"]) for m in query.question.messages), reverse=True)
            batch, window = window[:self.batch], window[self.batch:]
            for query, reply in zip(batch, self.replies([query.question for query in batch])):
                query.tell(reply)
            save([query.outcome for query in batch if query.outcome])
            window += [query for query in batch if not query.outcome]

    def replies(self, questions):
        """Returns for each question a Reply, one of its choices, or QueryRejected if its prompt is too long."""
        prompts = [self.chat.prompt(question.messages) for question in questions]
        replies, to_write = [None] * len(prompts), []
        for i, (prompt, question) in enumerate(zip(prompts, questions)):
            if len(prompt) > self.longest:
                replies[i] = QueryRejected(f"the prompt has {len(prompt):,} tokens, more than {self.longest:,}")
            elif question.choices:
                replies[i] = self.choose(*question)
            else:
                to_write.append(i)
        if to_write:
            written = generate(self.model, [prompts[i] for i in to_write], None, self.max_new_tokens, self.temperature,
                               stops=self.chat.stops, generator=self.generator)
            for i, ids in zip(to_write, written):
                ended = ids[-1] in self.chat.stops
                text = self.chat.tokenizer.decode(ids[:-1] if ended else ids, skip_special_tokens=False)  # marks, too
                replies[i] = Reply(text, not ended, tokens_read=len(prompts[i]), tokens_written=len(ids))
        return replies

    @torch.no_grad()
    def choose(self, messages, choices):
        """Returns the choice that is most probable as the whole reply, including the end of the turn."""
        rows = [self.chat.example(messages, choice) for choice in choices]
        ids, _ = pad([ids for ids, _ in rows], self.model.device)  # (C, T), one row for each choice
        hidden, scores = self.model.hidden(ids), []  # (C, T, D)
        for h, row, (_, supervised) in zip(hidden, ids, rows):
            at = torch.tensor(supervised, device=row.device).nonzero()[:, 0]  # positions of the reply's tokens
            log_probs = self.model.head(h[at - 1]).float().log_softmax(-1)  # position t − 1 predicts token t
            scores.append(log_probs.gather(-1, row[at][:, None]).sum().item())
        return choices[scores.index(max(scores))]


# ----------------------------------------------------------------------------------------------------------------------
# The command line

@dataclass
class Args:
    teacher: typing.Literal["template", "local", "http"] = "template"
    """What writes the records. template: sentences from data/lab.json, without a model. local: a model folder. http: a
    server that speaks OpenAI's chat completions."""
    out: str | None = None
    """Where to write the records: FILE.jsonl or, with template, also a folder for all three splits. With local and
    http, the same command continues after an interruption, and rejected queries go to FILE.rejected.jsonl."""
    count: int = 20000
    """template: how many records. A folder gets 80 % of them in train.jsonl and 10 % each in validation.jsonl and
    test.jsonl."""
    split: typing.Literal["train", "validation", "test"] = "train"
    """template: the split whose sentence frames make a single FILE.jsonl. No frame is in two splits."""
    seed: int = 0
    """The same seed gives the same records (template) or the same draws (local)."""
    overwrite: bool = False
    """template: replace files that exist. Records of a language model are never replaced: give another --out."""
    queries: str | None = None
    """local, http: file with what people asked: .txt (one query on each line), .csv (with a column named query) or
    .jsonl (query and perhaps id, history, domain, culture and others, which are kept)."""
    model: str | None = None
    """local: the model's folder. http: the model's name at the server."""
    url: str | None = None
    """http: base of the server's addresses, which usually ends in /v1."""
    key_env: str | None = None
    """http: name of the environment variable that holds the key. If not given, no key is sent."""
    steps: typing.Literal["separate", "joint", "score"] = "separate"
    """separate asks for situation, traits and response one after the other; joint asks for all in one reply; score
    (local) is separate, except that each trait is the most probable of the words high, low and neither."""
    retries: int = 3
    """local, http: how often a step of a query is tried again, after a reply that cannot be used or a failed request.
    Then the query is rejected. Waits that a server asks for do not count for the first ten minutes of a step."""
    max_new_tokens: int = 512
    """The most tokens of one reply."""
    temperature: float | None = None
    """Temperature of sampling. If not given: the server's own (http), or 0, the most probable token (local)."""
    workers: int = 8
    """http: number of requests in flight."""
    timeout: float = 120.0
    """http: seconds to wait for a reply, after which the request counts as failed. Only a server that is slow to
    connect or sends its headers in pieces can take longer."""
    backoff: float = 1.0
    """http: seconds to wait after a failed request. The wait doubles with each further failure of the same query, up to
    60, and is shortened at random by up to half. If the server sends Retry-After, that is used instead. After each 429
    and each such wait, requests follow each other more slowly for a while."""
    batch: int = 16
    """local: how many replies are written at the same time."""
    device: str | None = None
    """local: cpu, cuda or cuda:N. If not given, a GPU if there is one."""
    dtype: typing.Literal["float32", "bfloat16"] | None = None
    """local: if not given, bfloat16 on a GPU and float32 on a CPU."""
    int8: bool = False
    """local: keep the weights of the model's linear layers in 8 bits: a little over half the memory of bfloat16."""
    compile: bool = False
    """local: compile the decoding step with torch.compile. It takes minutes at the start, so it pays for many queries.
    Needs Triton and a C compiler on a GPU, a C++ compiler on a CPU."""
    retry_rejected: bool = False
    """local, http: try the queries of FILE.rejected.jsonl again. Those that succeed move to FILE.jsonl."""


TAKEN_BY = {  # option: the teachers that it is for. Other options are ignored by teachers that have no use for them
    "out": ("template", "local", "http"), "overwrite": ("template",),
    "queries": ("local", "http"), "model": ("local", "http"), "retry_rejected": ("local", "http"),
    "url": ("http",), "key_env": ("http",), "compile": ("local",), "int8": ("local",),
}
REQUIRED_OPTIONS = ("out", "queries", "model", "url")  # by the teachers that take them


def check_args(args):
    """UserError if an option is missing or does not go with the teacher."""
    for key, teachers in TAKEN_BY.items():
        given, option = getattr(args, key), "--" + key.replace("_", "-")
        if args.teacher in teachers and key in REQUIRED_OPTIONS and not given:
            raise UserError(f"--teacher {args.teacher} needs {option}: {field_help(Args)[key]}")
        if args.teacher not in teachers and given:
            raise UserError(f"{option} does not go with --teacher {args.teacher}. {field_help(Args)[key]}")
    if args.teacher == "template" and args.count < 10 and Path(args.out).suffix != ".jsonl":
        raise UserError(f"--count is {args.count}, expected at least 10 for the three splits of a folder")
    if args.teacher != "template" and (Path(args.out).suffix != ".jsonl" or Path(args.out).is_dir()):
        raise UserError(f"--out is {args.out}, expected a file named .jsonl")
    if args.steps == "score" and args.teacher != "local":
        raise UserError("--steps score needs the probabilities of words, which only --teacher local has")


def write_template_records(args):
    out, files = Path(args.out), {}
    if out.suffix == ".jsonl":
        files[out] = args.split, args.count
    else:
        for split, tenths in zip(SPLITS, (8, 1, 1)):
            files[out / f"{split}.jsonl"] = split, args.count * tenths // 10
    for file in files:
        refuse_to_replace(file, args.overwrite)
    for file, (split, count) in files.items():
        records = template_records(split, count, args.seed)
        write_records(file, records)
        first = records[0]
        print(f"{file}: {count} records, e.g.\n  query:    {first['query']}\n  response: {first['response']}\n"
              f"  traits:   {first['traits']}")


def synthesise(args):
    """Take every query of a file to a record or to the rejected file, except those that are there already."""
    items, duplicates = read_queries(args.queries)
    writer = RecordWriter(args.out)
    skipped = writer.done if args.retry_rejected else writer.done | writer.rejected.keys()
    todo = [item for item in items if str(item["id"]) not in skipped]
    print(f"{args.queries}: {len(items)} queries, {duplicates} duplicates dropped; "
          f"{len(items) - len(todo)} are done or rejected, {len(todo)} to do", flush=True)
    done_before, finished, began = len(writer.done), 0, time.monotonic()

    def save(outcomes):
        nonlocal finished
        writer.add(outcomes)
        finished += len(outcomes)
        bar.set_postfix_str(f"{len(writer.rejected)} rejected", refresh=False)
        bar.update(len(outcomes))

    if todo:
        teacher = {"local": LocalTeacher, "http": HttpTeacher}[args.teacher](args)
        queries = (Synthesis(item, args.steps, args.retries, teacher.name) for item in todo)
        pause = 0.1 if sys.stderr.isatty() else 60  # seconds between two updates; fewer updates in a log file
        with tqdm(total=len(todo), unit="record", dynamic_ncols=True, delay=pause, mininterval=pause,
                  maxinterval=60) as bar:
            try:
                teacher.run(queries, save)
            except KeyboardInterrupt:
                print("stopped; finished queries are saved, and the same command continues", file=sys.stderr)
                return 130
            finally:
                writer.close()
    print(f"{args.out}: {len(writer.done)} records, {len(writer.done) - done_before} of them new"
          + (f", {(time.monotonic() - began) / finished:.2f} s for each query" if finished else ""))
    if writer.rejected:
        print(f"{writer.rejected_file}: {len(writer.rejected)} rejected, which --retry-rejected tries again")
        for reason, count in reasons(writer.rejected.values()).most_common(8):
            print(f"  {count:>6}  {reason}")


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in COMMANDS:
        options, function = COMMANDS[argv[0]]
        return function(parse(options, argv[1:], function.__doc__, f"synth.py {argv[0]}"))
    args = parse(Args, argv, __doc__)
    check_args(args)
    return write_template_records(args) if args.teacher == "template" else synthesise(args)


if __name__ == "__main__":
    run_command(main)
