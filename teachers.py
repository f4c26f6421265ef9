"""Teachers that are language models: what they are asked, how their replies are read, and how they are reached.

What is notable:
- Persona-CoT reasons from the situation to its traits to the response; all prompts are here, easy to read and change
- what models write is read with patience and refused where it could mean two things; nothing of it is ever run
- a teacher is a model folder in this process, or a server that speaks OpenAI's chat completions; the standard library
  is enough for the second

synth.py hands over the queries and keeps what comes of each.
"""
import email.utils
import http.client
import json
import os
import queue
import random
import re
import ssl
import threading
import time
import unicodedata
import urllib.parse
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from string import Template

import torch

from command import pick_device, pick_dtype
from lora import TRAITS
from model import Chat, Transformer, UserError, compile_decoding, generate, pad
from synth import check_record


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
        raise Unusable(f"traits is {str(found)[:80]!r}, expected an object with the traits")
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
        self.tls = ssl.create_default_context() if url.scheme == "https" else None
        self.path = url.path.rstrip("/") + "/chat/completions"
        self.key = os.environ.get(args.key_env, "").strip() if args.key_env else ""
        if args.key_env and not (self.key.isascii() and self.key.isprintable() and self.key and " " not in self.key):
            raise UserError(f"the environment variable {args.key_env} (--key-env) holds no key")
        self.body = {"model": args.model, "max_tokens": args.max_new_tokens}
        self.body |= {} if args.temperature is None else {"temperature": args.temperature}
        self.name, self.args, self.reached, self.not_before = f"http:{args.model}", args, False, 0.0
        self.finished, self.over = queue.SimpleQueue(), threading.Event()

    def outcomes(self, queries):
        running, lock = self.args.workers, threading.Lock()
        room = threading.Semaphore(2 * running)  # for what is asked or not yet written: all that a kill can lose

        def work():  # daemons: they end with the program, whatever they wait for
            try:
                while True:
                    room.acquire()
                    with lock:
                        query = next(queries, None)
                    if query is None or self.over.is_set():
                        return self.finished.put(None)
                    self.drive(query)
                    self.finished.put(query.outcome)
            except BaseException as error:
                self.finished.put(error)

        for _ in range(running):
            threading.Thread(target=work, daemon=True).start()
        try:
            while running:
                outcome = self.finished.get()
                running -= outcome is None
                if isinstance(outcome, BaseException):
                    raise outcome
                if outcome:
                    yield [outcome]
                    room.release()
        finally:  # after an error or Ctrl-C nobody waits any longer or asks again
            self.over.set()
            room.release(self.args.workers)

    def left(self):
        outcomes = []
        while not self.finished.empty():
            outcomes.append(self.finished.get())
        return [outcome for outcome in outcomes if isinstance(outcome, dict)]

    def drive(self, query):
        """All requests of one query, with waits that double after every fault in a row, or as the server asks."""
        faults = 0
        while not query.outcome and not self.over.wait(max(0.0, self.not_before - time.monotonic())):
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
                    self.over.wait(min(60.0, self.args.backoff * 2 ** (faults - 1)) * random.uniform(0.5, 1))
            if isinstance(reply, Fault) and query.outcome and not self.reached:
                raise UserError(f"{self.args.url}: {reply}; is the server running, and is this its address?")

    def request(self, messages):
        """One chat completion -> Reply. Fault for what may pass; UserError with the server's message for what won't."""
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        headers |= {"Authorization": f"Bearer {self.key}"} if self.key else {}
        deadline, body = time.monotonic() + self.args.timeout, bytearray()
        where = {"host": self.host, "port": self.port, "timeout": self.args.timeout}
        connection = http.client.HTTPSConnection(**where, context=self.tls) if self.tls \
            else http.client.HTTPConnection(**where)
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
