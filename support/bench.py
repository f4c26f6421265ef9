"""The command bench: models answer the public benchmarks, and their replies are scored and compared.

What is notable:
- replies are written as soon as a batch is done, so a stopped command goes on where it ended. config.json beside them
  holds the settings they were made with; with other settings the folder is refused
- the score is the benchmark authors' own. Beside it stand what a guess and the best constant answer would score, and a
  lenient reading of the same replies
- two models are compared question by question: paired bootstrap, McNemar's test

    python eval.py bench emobench --data DIR --run runs/tiny
"""
import hashlib
import json
import math
import os
import sys
import time
import typing
from collections import defaultdict
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from lora import EXPERTS
from model import Prefix, Transformer, generate, last_positions, pad, shared_prefix
from support.benchmarks import BENCHMARKS, OUR_INSTRUCTIONS, group_by
from support.chat import Chat, encode
from support.command import pick_device, pick_dtype
from support.files import UserError, atomic, read_json, read_lines
from support.measure import GateOptions, LoadedRun, bootstrap, gate_from_options
from support.rows import micro_batches
from support.runs import differences, fingerprint
from support.tables import print_table


@dataclass(kw_only=True)
class Bench(GateOptions):
    names: list[str]
    """emobench, eqbench, tombench, safetybench or gpqa; several; or all, for those that --data holds."""
    run: str | None = None
    """Run folder. Without it, the model of --base is measured alone."""
    data: str | None = None
    """The benchmark's folder as published; for several or all, the folder that holds emobench/, eqbench/ …"""
    replies: str | None = None
    """Score this replies.jsonl instead of running a model."""
    against: str | None = None
    """With --replies: another replies.jsonl to compare with it, question by question."""
    json: bool = False
    """Print the authors' numbers as JSON, and nothing else, on standard output."""
    partial: bool = False
    """With --replies: score the file even if replies are missing."""
    only: typing.Literal["base", "personafuse"] | None = None
    """Run only one of the two; without it both run and are compared."""
    mode: typing.Literal["generate", "logits"] | None = None
    """generate lets the model write; logits takes the most probable letter. SafetyBench: logits, others: generate."""
    lang: typing.Literal["en", "zh"] | None = None
    """Language of EmoBench (without it both) and ToMBench (without it en)."""
    set: str | None = None
    """SafetyBench: en, zh or zh_subset; without it the one that is there. GPQA: main (without it), diamond or
    extended."""
    revise: bool = False
    """EQ-Bench: also ask for a critique and revised scores."""
    cot: bool = False
    """EmoBench: ask for the reasoning first."""
    shots: int | None = None
    """SafetyBench: show this many answered questions of the same category first, at most 5; without it none."""
    tries: int | None = None
    """How often a question is asked. Without it: ToMBench 5; EQ-Bench up to 3, until a reply can be parsed; GPQA 1."""
    rows: int | None = None
    """Take only this many questions, evenly spread."""
    part: str | None = None
    """Take only questions whose id begins with this: EA/en, "False Belief Task"."""
    max_new_tokens: int | None = None
    """Longest reply. Without it: EmoBench 50 (with --cot 2048), EQ-Bench 60 (with --revise 1000), ToMBench 32,
    SafetyBench 64, GPQA 1024."""
    prompts: str | None = None
    """JSON file with other instructions; it may replace any of those in data/benchmark_prompts.json."""
    password_env: str | None = None
    """GPQA: name of the environment variable that holds the archive's password."""
    out: str | None = None
    """Folder for the replies; without it RUN/bench, or runs/bench-BASE for a base alone. A stopped run goes on."""


# ----------------------------------------------------------------------------------------------------------------------
# The models that answer

class Models:
    """The base and PersonaFuse ("by hand" if the user sets the gate). They are loaded when first used."""

    def __init__(self, args):
        if not args.run and not (args.base and args.only != "personafuse"):
            raise UserError("which model? --run with a run folder, or --base with a model folder to measure it alone")
        self.args, self.run = args, LoadedRun(replace(args, data=None)) if args.run else None
        self.base = self.run.setup.base if self.run else args.base
        self.dtype = pick_dtype(args.dtype, pick_device(args.device))
        fused = "by hand" if args.persona or args.gate else "PersonaFuse"
        names = {"base": ["base"], "personafuse": [fused], None: ["base", fused]}
        self.names = names[args.only] if self.run else ["base"]
        self.routed = {}  # {query: gate (E,)}

    @cached_property
    def model(self):
        if self.names == ["base"]:
            return Transformer.from_pretrained(self.base, self.dtype, pick_device(self.args.device))
        return self.run.model

    @cached_property
    def chat(self):
        return Chat.from_dir(self.base)

    def settings(self, name):
        """Returns what identifies a model, wherever its files are. All replies in one folder come from one model."""
        read_json(Path(self.base) / "config.json")  # for the error: without this file a folder is no model
        settings = {"base": Path(self.base).name, "content": fingerprint(self.base),
                    "dtype": str(self.dtype).removeprefix("torch."), "gate": "base"}
        if name == "base":
            return settings
        settings |= {"gate": self.args.persona or self.args.gate or "learned", "tau": self.run.setup.tau,
                     "alpha": self.run.setup.alpha}
        experts = [fingerprint(self.run.folder("experts") / e / "adapter_model.safetensors") for e in EXPERTS]
        settings["experts"] = hashlib.sha256("".join(experts).encode()).hexdigest()[:16]
        if settings["gate"] == "learned":
            settings["encoder"] = fingerprint(self.run.setup.encoder)
            settings["router"] = fingerprint(self.run.folder("router") / "model.safetensors")
        return settings

    def gates(self, name):
        """Returns None for the base, one gate (1, E) that the user set, or the method `route`."""
        if name == "base":
            return None
        by_hand = gate_from_options(self.run, self.args)
        return self.route if by_hand is None else by_hand

    def route(self, prompts):
        """Returns the router's gates (B, E) for prompts. It reads each query once, however often it is asked."""
        new = [query for query in dict.fromkeys(prompt.query for prompt in prompts) if query not in self.routed]
        if new:
            self.routed |= zip(new, self.run.gates([{"id": i, "query": query} for i, query in enumerate(new)]))
        return torch.stack([self.routed[prompt.query] for prompt in prompts])


def choose_letters(model, chat, prompts, ids, gate, prefix):
    """Returns a reply for each prompt: in each slot the letter with the highest log-probability after what precedes it.

    ids: the prompts as lists of ids. gate: (B, E), (1, E) or None. prefix: a Prefix of all ids, or None.
    """
    texts = ["" for _ in prompts]
    for slot in range(len(prompts[0].slots)):
        texts = [text + prompt.slots[slot][0] for text, prompt in zip(texts, prompts)]
        rows = [some + encode(chat.tokenizer, text) for some, text in zip(ids, texts)]
        inputs, lengths = pad([row[prefix.length if prefix else 0:] for row in rows], model.device)
        logits = model.head(model.hidden(inputs, gate, prefix, last_positions(inputs, lengths)))  # (B, V)
        for i, prompt in enumerate(prompts):
            letters = prompt.slots[slot][1]
            first_ids = [encode(chat.tokenizer, letter)[0] for letter in letters]
            texts[i] += letters[logits[i, first_ids].argmax().item()]
    return [text + prompt.closing for text, prompt in zip(texts, prompts)]


@torch.no_grad()
def answer_prompts(model, chat, prompts, gates, mode, max_new_tokens, tokens, seed):
    """Yields (prompts, replies) batch by batch, short prompts first. gates: as from Models.gates.

    In logits mode the common beginning of all prompts with one instruction is computed once. The router's gates exclude
    that: under another gate the same tokens have other keys and values.
    """
    generator = torch.Generator().manual_seed(seed)
    kinds = defaultdict(list)
    for prompt in prompts:
        ids = chat.prompt([{"role": "user", "content": prompt.text}])
        kinds[prompt.instruction if mode == "logits" else prompt.temperature].append((prompt, ids))
    for kind, pairs in kinds.items():
        gate = gates.to(model.device) if torch.is_tensor(gates) else None
        prefix = None
        if mode == "logits" and not callable(gates):
            n = shared_prefix([ids for _, ids in pairs])
            prefix = Prefix(model, pairs[0][1][:n], gate) if n and len(pairs) > 1 else None
        for batch in micro_batches(pairs, tokens, lambda pair: len(pair[1]) + max_new_tokens):
            some, ids = zip(*batch)
            if callable(gates):
                gate = gates(some).to(model.device)
            if mode == "logits":
                yield some, choose_letters(model, chat, some, ids, gate, prefix)
            else:
                replies = generate(model, ids, gate, max_new_tokens, kind, stops=chat.stops, generator=generator)
                yield some, [chat.text(reply) for reply in replies]


# ----------------------------------------------------------------------------------------------------------------------
# Replies on disk

def read_replies(path, bench, rows, chosen):
    """Returns the replies in a replies.jsonl to the chosen rows, {id: {try: reply}}. UserError names a line that is no
    reply to any row of the benchmark."""
    by_id, replies = {row["id"]: row for row in rows}, {}
    for number, reply in read_lines(path):
        def check(condition, problem):
            if not condition:
                raise UserError(f"{path}, line {number}: {problem}")

        check(isinstance(reply, dict) and {"id", "try", "output"} <= reply.keys(),
              'not a reply; expected {"id", "try", "output", …}')
        id, n, output, letter_map = str(reply["id"]), reply["try"], reply["output"], reply.get("map")
        tries = replies.setdefault(id, {})
        check(id in by_id, f"{bench.title} has no question {id!r}")
        check(type(n) is int and n >= 0, f"try is {n!r}, expected a number from 0")
        check(n not in tries, f"a second reply to {id}, try {n}")
        check(isinstance(output, str), f"output is {output!r}, expected text")
        check(bench.name != "tombench" or bench.is_letter_map(by_id[id], letter_map),
              f"map is {letter_map!r}, expected {{letter shown: letter in the file}} for each option")
        tries[n] = reply
    return {row["id"]: replies[row["id"]] for row in chosen if row["id"] in replies}


def open_replies(folder, settings, bench, rows, chosen):
    """Starts a folder of replies, or continues it: returns the replies that are there, as read_replies does.

    UserError if they were made with other settings, or if this program did not make the folder. What a kill left of the
    last line is cut off.
    """
    file, config = folder / "replies.jsonl", folder / "config.json"
    if file.exists() and not config.exists():  # this program writes config.json first
        raise UserError(f"{file}: no config.json beside it says which model replied. Choose another --out")
    if not config.exists():
        with atomic(config) as part:
            part.write_text(json.dumps(settings, indent=2) + "\n")
    was = dict.fromkeys(settings, "unknown") | read_json(config)
    if changed := differences(was, settings):
        raise UserError(f"{folder} holds replies made with other settings: {changed}. Choose another --out")
    if not file.exists():
        return {}
    os.truncate(file, file.read_bytes().rfind(b"\n") + 1)
    return read_replies(file, bench, rows, chosen)


def run_bench(args, bench, rows, chosen, models, name, folder):
    """Asks one model the chosen rows that have no reply in `folder` yet. Returns all replies to them."""
    mode = args.mode or ("logits" if bench.name == "safetybench" else "generate")
    chat = models.chat  # before any file is written: the model folder may be wrong
    longest = 0 if mode == "logits" else args.max_new_tokens or bench.max_new_tokens
    prompts = "".join(bench.ask(row, 0).text for row in rows)
    settings = {"bench": bench.name, "mode": mode, "max_new_tokens": longest, "set": args.set, "revise": args.revise,
                "cot": args.cot, "shots": args.shots, "seed": args.seed,
                "prompts": hashlib.sha256(prompts.encode()).hexdigest()[:16], **models.settings(name)}
    replies = open_replies(folder, settings, bench, rows, chosen)
    by_id = {row["id"]: row for row in chosen}
    while prompts := list(bench.unanswered(chosen, replies)):  # again while EQ-Bench has replies that cannot be parsed
        gates, start = models.gates(name), time.perf_counter()
        bar = tqdm(total=len(prompts), desc=f"{bench.title}, {name}", unit="reply", disable=not sys.stderr.isatty(),
                   dynamic_ncols=True)
        with bar, open(folder / "replies.jsonl", "a", encoding="utf-8") as out:
            for some, texts in answer_prompts(models.model, chat, prompts, gates, mode, longest, args.tokens,
                                              args.seed):
                seconds = round((time.perf_counter() - start) / len(some), 3)
                for prompt, text in zip(some, texts):
                    reply = {"id": prompt.id, "try": prompt.try_number,
                             "output": bench.text_to_store(by_id[prompt.id], text), "seconds": seconds}
                    reply |= {"map": prompt.letter_map} if prompt.letter_map else {}
                    replies.setdefault(prompt.id, {})[prompt.try_number] = reply
                    out.write(json.dumps(reply, ensure_ascii=False) + "\n")
                out.flush()
                bar.update(len(some))
                start = time.perf_counter()
    return replies


def stored_replies(args, bench, rows, chosen):
    """Returns {name: replies} for --replies and --against. UserError if replies are missing, unless --partial. A file
    need not have all groups of a benchmark."""
    files = {"base": args.replies, "PersonaFuse": args.against} if args.against else {"replies": args.replies}
    found = {name: read_replies(file, bench, rows, chosen) for name, file in files.items()}
    for name, replies in found.items():
        if not replies:
            raise UserError(f"{files[name]}: no replies to {bench.title} in it")
        groups = {row["group"] for row in chosen if row["id"] in replies}
        missing = len(list(bench.unanswered([row for row in chosen if row["group"] in groups], replies)))
        if missing and not args.partial:
            raise UserError(f"{files[name]}: {missing} replies are missing. --partial scores the others; --tries says "
                            "how often a question was asked")
        if missing:
            print(f"{files[name]}: {missing} replies are missing; the others are scored", file=sys.stderr)
    return found


# ----------------------------------------------------------------------------------------------------------------------
# Statistics

def wilson_interval(share, n):
    """Returns (low, high), the 95 % interval of a share of n."""
    z = 1.96
    middle, half = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


def mcnemar_p(a, b):
    """Returns the exact two-sided p of two arrays of 0 and 1 on the same questions: if the models were equally good, a
    question on which they differ would favour either one like the flip of a coin."""
    gained, lost = int((a < b).sum()), int((a > b).sum())
    n = gained + lost
    return min(1.0, 2 * sum(math.comb(n, k) for k in range(min(gained, lost) + 1)) / 2 ** n)


def score_interval(scores, seed=0):
    """Returns (mean, low, high) of scores (N,) out of 100: Wilson's interval for right and wrong, else a bootstrap."""
    if np.isin(scores, (0, 100)).all():
        return scores.mean(), *(100 * x for x in wilson_interval(scores.mean() / 100, len(scores)))
    return bootstrap(scores, np.ones(len(scores)), seed)


def paired_difference(a, b, seed=0):
    """Returns (mean of b − a, low, high, p) for the scores of two models on the same questions, out of 100.

    The interval is a paired bootstrap. p is McNemar's for right and wrong, else twice the share of bootstrap means on
    the other side of 0.
    """
    interval = bootstrap(b - a, np.ones(len(a)), seed)
    if np.isin([a, b], (0, 100)).all():
        return *interval, mcnemar_p(a, b)
    means = (b - a)[np.random.default_rng(seed).integers(0, len(a), (2000, len(a)))].mean(1)
    return *interval, min(1.0, 2 * (1 + min((means <= 0).sum(), (means >= 0).sum())) / 2001)


def question_scores(bench, rows, grades):
    """Returns {question: score out of 100}. GPQA's repeats of a question are averaged; None is left out."""
    scores = defaultdict(list)
    for row in rows:
        if grades.get(row["id"]) is not None:
            scores[row.get("repeat_of", row["id"])].append(bench.scale * grades[row["id"]])
    return {question: np.mean(some) for question, some in scores.items()}


def best_constant(bench, rows, replies):
    """Returns {id: grade} of the constant reply that scores best on these rows, given in every try."""
    constants, graded = {row["id"]: bench.constant_replies(row) for row in rows}, []
    for name in constants[rows[0]["id"]]:
        graded.append(bench.grade(rows, {row["id"]: {
            n: {**reply, "output": constants[row["id"]].get(name, "")}
            for n, reply in replies.get(row["id"], {0: {}}).items()} for row in rows}))
    return max(graded, key=lambda grades: sum(grades.values()))


# ----------------------------------------------------------------------------------------------------------------------
# Tables

def score_table(bench, parts, grades, constant, replies, seed):
    """Returns one model's table, head first: a line for each (part, rows) of `parts`. grades: strict and lenient."""
    table = [["", "n", "chance", "constant", "score [95 %]", "lenient", "unparsed"]]
    for part, rows in parts:
        strict, lenient = (list(question_scores(bench, rows, some).values()) for some in grades)
        chance = bench.scale * np.mean([bench.chance(row) for row in rows])
        best = bench.scale * np.mean([constant[row["id"]] for row in rows])
        mean, low, high = score_interval(np.array(strict), seed) if strict else (0, 0, 0)
        table.append([part, str(len(strict)), f"{chance:.1f}", f"{best:.1f}", f"{mean:.1f} [{low:.1f}, {high:.1f}]",
                      f"{np.mean(lenient) if lenient else 0:.1f}", str(bench.count_unparsed(rows, replies))])
    return table


def comparison_table(bench, parts, grades, seed):
    """Returns the table of two models, {name: (strict grades, lenient grades)}, on the questions that both have."""
    table = [["", *grades, "difference [95 %]", "p", "relative", "reported"]]
    for part, rows in parts:
        last = part == parts[-1][0]
        for lenient in (False, True) if last else (False,):
            a, b = (question_scores(bench, rows, some[lenient]) for some in grades.values())
            shared = [question for question in a if question in b]
            if not shared:
                continue
            a, b = (np.array([scores[question] for question in shared]) for scores in (a, b))
            mean, low, high, p = paired_difference(a, b, seed)
            table.append([part + (", lenient" if lenient else ""), f"{a.mean():.1f}", f"{b.mean():.1f}",
                          f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]", f"{p:.2g}",
                          f"{100 * (b.mean() - a.mean()) / abs(a.mean()):+.1f} %" if a.mean() else "-",
                          bench.reported if last and not lenient else ""])
    return table


def print_report(bench, rows, replies, scores, seed):
    """Prints a table for each model, and one for two side by side. Returns the last table."""
    grades = {name: [bench.grade(rows, some, lenient) for lenient in (False, True)] for name, some in replies.items()}
    name = next(iter(replies))
    rows = [row for row in rows if row["id"] in grades[name][0]]
    parts, constant = group_by(rows, "part"), {}
    for _, some in parts:
        constant |= best_constant(bench, some, replies[name])
    parts += [("all", rows)] if len(parts) > 1 else []
    for name, some in replies.items():
        table = score_table(bench, parts, grades[name], constant, some, seed)
        print_table(table[0], table[1:], f"{bench.title}, {name}; out of 100", width=80)
        official = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in scores[name].items()
                             if bench.name != "safetybench" and not isinstance(v, dict))
        print(f"\n  the authors' own: {official}" if official else "")
    print("  constant: the one answer that scores best on a part, given to all of it;\n"
          "  lenient: read as a person would; the score is the authors' strict reading")
    if len(replies) == 2:
        table = comparison_table(bench, parts, grades, seed)
        title = f"{bench.title}, side by side; reported: the source's relative improvement at 8B"
        print_table(table[0], table[1:], title, width=80)
    return table


def markdown(tables):
    """Returns {title: table} with the same columns as one Markdown table."""
    head = next(iter(tables.values()))[0]
    lines = [["benchmark", "part", *head[1:]], ["---"] * (len(head) + 1)]
    lines += [[title, *row] for title, table in tables.items() for row in table[1:]]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


# ----------------------------------------------------------------------------------------------------------------------
# The command

def make_benchmark(args, name, folder):
    """Returns the benchmark, all its rows, and those that --lang, --part and --rows choose."""
    instructions, given = read_json(OUR_INSTRUCTIONS), read_json(args.prompts) if args.prompts else {}
    for key, text in given.items():
        if key not in instructions or not isinstance(text, str):
            raise UserError(f"{args.prompts}: {key!r}; expected texts under some of {', '.join(instructions)}")
    if (args.shots or 0) > 5:
        raise UserError(f"--shots {args.shots}: there are five examples of each category")
    password = os.environ.get(args.password_env) if args.password_env else None
    if args.password_env and not password:
        raise UserError(f"--password-env {args.password_env}: there is no such environment variable, or it is empty")
    bench = BENCHMARKS[name](subset=args.set, revise=args.revise, cot=args.cot, shots=args.shots or 0,
                             tries=args.tries, instructions=instructions | given, password=password)
    rows, lang = bench.load(folder), args.lang or bench.default_lang
    if args.mode == "logits" and (name == "eqbench" or args.cot):
        raise UserError("--mode logits chooses among letters: EQ-Bench has none, and --cot asks for reasoning first")
    asked = [row for row in rows if row.get("lang", lang) == lang or lang is None]
    if not args.replies:  # a replies file may have more repeats of a question than --tries
        asked = [row for row in asked if bench.tries_of(row)]
    chosen = [row for row in asked if row["id"].startswith(args.part or "")]
    if not chosen:
        raise UserError(f"--part {args.part!r}: no id of {bench.title} begins with it; the first is {asked[0]['id']!r}")
    n = min(args.rows or len(chosen), len(chosen))
    if n < len(asked):
        print(f"{bench.title}: {n} of {len(asked)} questions", file=sys.stderr)
    return bench, rows, [chosen[i * len(chosen) // n] for i in range(n)]


def bench(args):
    """The public benchmarks, scored as their authors do: the base, PersonaFuse, and the two side by side."""
    every, data = args.names == ["all"], Path(args.data or "")
    names = [name for name in BENCHMARKS if (data / name).is_dir()] if every else args.names
    if not args.data or not names or not set(names) <= set(BENCHMARKS):
        raise UserError(f"bench {' '.join(args.names)} --data {args.data}: expected the name of a benchmark "
                        f"({', '.join(BENCHMARKS)}) and its folder as published, or all and the folder they are in")
    several = every or len(names) > 1
    if (args.replies or args.against) and (several or args.run or args.base or not args.replies):
        raise UserError("--replies scores one benchmark's file without a model, and --against compares a second file "
                        "with it: give one name, and neither --run nor --base")
    models = None if args.replies else Models(args)
    out = Path(args.out or (Path(args.run) / "bench" if args.run else f"runs/bench-{Path(args.base or '').name}"))
    found, tables = {}, {}
    for name in names:
        try:
            bench, rows, chosen = make_benchmark(args, name, data / name if several else data)
        except UserError as error:
            if not every:
                raise
            print(f"{name} is left out: {error}", file=sys.stderr)
            continue
        if models:
            replies = {who: run_bench(args, bench, rows, chosen, models, who, out / name / who.replace(" ", "-"))
                       for who in models.names}
        else:
            replies = stored_replies(args, bench, rows, chosen)
        scores = {who: bench.score(chosen, some) for who, some in replies.items()}
        found[name] = scores.get("replies", scores)
        if not args.json:
            tables[bench.title] = print_report(bench, chosen, replies, scores, args.seed)
    if args.json:
        print(json.dumps(found if several else found[names[0]], ensure_ascii=False))
    elif every and tables:
        with atomic(out / "bench.md") as part:
            part.write_text(markdown(tables), encoding="utf-8")
        print(f"\n{markdown(tables)}\nwritten to {out / 'bench.md'}")
