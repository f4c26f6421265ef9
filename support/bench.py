"""The command bench: models answer the public benchmarks, and their replies are scored and compared.

What is notable:
- Replies are written as soon as a batch is done, so a stopped command goes on where it ended. The config.json beside
  them holds the settings that they were made with. A command with other settings is refused.
- The score is the benchmark authors' own. The table also shows what a guess and the best constant answer would score,
  and a lenient reading of the same replies.
- Two models are compared question by question, by a paired bootstrap and McNemar's test.

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
    """One or several of emobench, eqbench, tombench, safetybench and gpqa; or all, for those that --data holds."""
    run: str | None = None
    """Run folder. Default: none; the model of --base is measured alone."""
    data: str | None = None
    """The benchmark's folder as published. For several or all: the folder that holds emobench/, eqbench/ …"""
    replies: str | None = None
    """Score this replies.jsonl instead of running a model."""
    json: bool = False
    """Print the authors' numbers as JSON, and nothing else, on standard output."""
    only: typing.Literal["base", "personafuse"] | None = None
    """Run only one of the two models. Default: both, and their comparison."""
    mode: typing.Literal["generate", "logits"] | None = None
    """generate lets the model write, logits takes the most probable letter. Default: logits for SafetyBench, generate
    for the others."""
    lang: typing.Literal["en", "zh"] | None = None
    """Language of EmoBench and ToMBench. Default: both for EmoBench, en for ToMBench."""
    set: str | None = None
    """SafetyBench: en, zh or zh_subset. Default: the one that is there. GPQA: main, diamond or extended. Default:
    main."""
    revise: bool = False
    """EQ-Bench: also ask for a critique and revised scores."""
    cot: bool = False
    """EmoBench: ask for the reasoning first."""
    shots: int | None = None
    """SafetyBench: number of answered questions of the same category to show first, at most 5. Default: 0."""
    tries: int | None = None
    """Number of times that a question is asked. Default: 5 for ToMBench (at most 5), up to 3 for EQ-Bench until a reply
    can be parsed, 1 for GPQA."""
    rows: int | None = None
    """Number of questions, evenly spread over those chosen. GPQA: each repeat (--tries) counts as one. Default: all."""
    part: str | None = None
    """Take only the questions whose id or part begins with this: EA/en, "False Belief Task", "Mental Health"."""
    max_new_tokens: int | None = None
    """Maximum number of tokens in a reply. Default: EmoBench 50 (with --cot 2048), EQ-Bench 60 (with --revise 1000),
    ToMBench 32, SafetyBench 64, GPQA 1024."""
    prompts: str | None = None
    """JSON file with other instructions. It may replace any of those in data/benchmark_prompts.json."""
    password_env: str | None = None
    """GPQA: name of the environment variable that holds the archive's password."""
    out: str | None = None
    """Folder for the replies. Default: RUN/bench, or runs/bench-BASE for a base alone."""


# ----------------------------------------------------------------------------------------------------------------------
# The models that answer

class Models:
    """The models to measure: "base", "PersonaFuse", and "by hand" in its place if the user sets the gate.

    All are the same loaded model and differ in the gate: the base has none. It is loaded when it is first used.
    """

    def __init__(self, args):
        needs_run = args.only == "personafuse" or args.persona or args.gate or args.experts or args.router
        if args.run is None and (args.base is None or needs_run):
            raise UserError("which model? --run with a run folder, or --base with a model folder to measure it alone, "
                            "without --persona, --gate, --experts and --router")
        self.args = args
        self.run = LoadedRun(replace(args, data=None)) if args.run else None  # --data is the benchmarks' folder here
        self.base = self.run.model_folder("experts") if self.run else args.base
        self.dtype = pick_dtype(args.dtype, pick_device(args.device))
        self.int8 = bool(self.run.setup.int8 if self.run else args.int8)
        self.gate_by_hand = gate_from_options(self.run, args) if self.run and args.only != "base" else None
        fused = "PersonaFuse" if self.gate_by_hand is None else "by hand"
        names = {"base": ["base"], "personafuse": [fused], None: ["base", fused]}
        self.names = names[args.only] if self.run else ["base"]
        self.gate_of_query = {}  # {query: gate (E,)}

    @cached_property
    def model(self):
        if self.names == ["base"]:
            return Transformer.from_pretrained(self.base, self.dtype, pick_device(self.args.device), int8=self.int8)
        return self.run.model

    @cached_property
    def chat(self):
        return Chat.from_dir(self.base)

    def settings(self, name):
        """Returns what identifies a model, wherever its files are. Replies in one folder must come from one model."""
        read_json(Path(self.base) / "config.json")  # raises a UserError for a folder that holds no model
        settings = {"base": Path(self.base).name, "content": fingerprint(self.base),
                    "dtype": ("int8, " if self.int8 else "") + str(self.dtype).removeprefix("torch."), "gate": "base"}
        if name == "base":
            return settings
        settings |= {"gate": self.args.persona or self.args.gate or "learned", "tau": self.run.setup.tau,
                     "alpha": self.run.setup.alpha}
        experts = [fingerprint(self.run.folder("experts") / e / "adapter_model.safetensors") for e in EXPERTS]
        settings["experts"] = hashlib.sha256("".join(experts).encode()).hexdigest()[:16]
        if settings["gate"] == "learned":
            settings["router"] = fingerprint(self.run.folder("router") / "model.safetensors")
            settings["encoder"] = fingerprint(self.run.model_folder("router"))
        return settings

    def route(self, prompts):
        """Returns the router's gates (B, E) for prompts. It reads each query once, however often that is asked."""
        queries = dict.fromkeys(prompt.query for prompt in prompts)
        new = [query for query in queries if query not in self.gate_of_query]
        if new:
            gates = self.run.gates([{"id": i, "query": query} for i, query in enumerate(new)])
            self.gate_of_query |= zip(new, gates)
        return torch.stack([self.gate_of_query[prompt.query] for prompt in prompts])


def choose_letters(model, chat, prompts, ids, gate, prefix):
    """Returns a reply for each prompt. Each of its letters is the most probable one after all that precedes it.

    ids: the prompts as lists of ids. gate: (B, E), (1, E) or None. prefix: a Prefix, the beginning that
    all prompts share, or None.
    """
    texts = ["" for _ in prompts]
    for slot in range(len(prompts[0].slots)):
        texts = [text + prompt.slots[slot][0] for text, prompt in zip(texts, prompts)]
        rows = [prompt_ids + encode(chat.tokenizer, text) for prompt_ids, text in zip(ids, texts)]
        inputs, lengths = pad([row[prefix.length if prefix else 0:] for row in rows], model.device)
        logits = model.head(model.hidden(inputs, gate, prefix, last_positions(inputs, lengths)))  # (B, V)
        for i, prompt in enumerate(prompts):
            letters = prompt.slots[slot][1]
            first_ids = [encode(chat.tokenizer, letter)[0] for letter in letters]
            texts[i] += letters[logits[i, first_ids].argmax().item()]
    return [text + prompt.closing for text, prompt in zip(texts, prompts)]


@torch.no_grad()
def answer_prompts(model, chat, prompts, gate, route, mode, max_new_tokens, tokens, seed):
    """Yields (prompts, replies) batch by batch, short prompts first.

    gate: (1, E) for all prompts, or None for the base. route: None, or a function that returns the gates (B, E) of
    prompts, which then replace `gate`.

    In logits mode, the common beginning of all prompts with one instruction is computed once. This is impossible if
    each prompt has another gate: the same tokens then have other keys and values.
    """
    generator = torch.Generator().manual_seed(seed)
    gate = None if gate is None else gate.to(model.device)
    groups = defaultdict(list)  # prompts that may share a batch
    for prompt in prompts:
        ids = chat.prompt([{"role": "user", "content": prompt.text}])
        groups[prompt.instruction if mode == "logits" else prompt.temperature].append((prompt, ids))
    for group in groups.values():
        temperature, first_ids = group[0][0].temperature, group[0][1]
        prefix = None
        if mode == "logits" and route is None and len(group) > 1:
            n = shared_prefix([ids for _, ids in group])
            prefix = Prefix.compute(model, first_ids[:n], gate) if n else None
        for batch in micro_batches(group, tokens, lambda pair: len(pair[1]) + max_new_tokens):
            batch_prompts, ids = zip(*batch)
            if route is not None:
                gate = route(batch_prompts).to(model.device)
            if mode == "logits":
                yield batch_prompts, choose_letters(model, chat, batch_prompts, ids, gate, prefix)
            else:
                replies = generate(model, ids, gate, max_new_tokens, temperature, stops=chat.stops, generator=generator)
                yield batch_prompts, [chat.text(reply) for reply in replies]


# ----------------------------------------------------------------------------------------------------------------------
# Replies on disk

def read_replies(path, bench, rows, chosen):
    """Returns the replies to the chosen rows in a replies.jsonl: {id: {try: reply}}. UserError names a line that is not
    a reply to a row of the benchmark."""
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
    """Makes a folder for replies if there is none. Returns the replies that are in it, as read_replies does.

    UserError if they were made with other settings, or if this program did not make the folder. A last line that a kill
    has left unfinished is removed.
    """
    file, config = folder / "replies.jsonl", folder / "config.json"
    if file.exists() and not config.exists():  # config.json is written first
        raise UserError(f"{file}: no config.json beside it says which model replied. Choose another --out")
    if not config.exists():
        with atomic(config) as part:
            part.write_text(json.dumps(settings, indent=2) + "\n")
    # An older version of this program may not have written every setting. A missing one counts as different, because
    # the replies may come from another model.
    stored = {key: "unknown" for key in settings} | read_json(config)
    if changed := differences(stored, settings):
        raise UserError(f"{folder} holds replies made with other settings: {changed}. Choose another --out")
    if not file.exists():
        return {}
    os.truncate(file, file.read_bytes().rfind(b"\n") + 1)
    return read_replies(file, bench, rows, chosen)


def run_bench(args, bench, rows, chosen, models, name, folder):
    """Asks one model the chosen rows that have no reply in `folder` yet. Returns all replies to them."""
    mode = args.mode or ("logits" if bench.name == "safetybench" else "generate")
    chat = models.chat  # loaded before any file is written, because the model folder may be wrong
    max_new_tokens = 0 if mode == "logits" else args.max_new_tokens or bench.max_new_tokens
    all_prompts = "".join(bench.ask(row, 0).text for row in rows)
    settings = {"bench": bench.name, "mode": mode, "max_new_tokens": max_new_tokens, "set": args.set,
                "revise": args.revise, "cot": args.cot, "shots": args.shots, "seed": args.seed,
                "prompts": hashlib.sha256(all_prompts.encode()).hexdigest()[:16], **models.settings(name)}
    replies = {id: {n: reply for n, reply in tries.items() if n < bench.tries}  # an earlier command may have had more
               for id, tries in open_replies(folder, settings, bench, rows, chosen).items()}
    by_id = {row["id"]: row for row in chosen}
    # EQ-Bench needs several rounds: what cannot be parsed is asked again.
    while prompts := list(bench.unanswered(chosen, replies)):
        gate = models.gate_by_hand if name == "by hand" else None
        route = models.route if name == "PersonaFuse" else None
        start = time.perf_counter()
        bar = tqdm(total=len(prompts), desc=f"{bench.title}, {name}", unit="reply", disable=not sys.stderr.isatty(),
                   dynamic_ncols=True)
        with bar, open(folder / "replies.jsonl", "a", encoding="utf-8") as out:
            batches = answer_prompts(models.model, chat, prompts, gate, route, mode, max_new_tokens, args.tokens,
                                     args.seed)
            for answered, texts in batches:
                seconds = round((time.perf_counter() - start) / len(answered), 3)
                for prompt, text in zip(answered, texts):
                    reply = {"id": prompt.id, "try": prompt.try_number,
                             "output": bench.text_to_store(by_id[prompt.id], text), "seconds": seconds}
                    reply |= {"map": prompt.letter_map} if prompt.letter_map else {}
                    replies.setdefault(prompt.id, {})[prompt.try_number] = reply
                    out.write(json.dumps(reply, ensure_ascii=False) + "\n")
                out.flush()
                bar.update(len(answered))
                start = time.perf_counter()
    return replies


def stored_replies(file, bench, rows, chosen):
    """Returns the replies in a file that --replies names. Missing ones are noted on standard error."""
    replies = read_replies(file, bench, rows, chosen)
    if not replies:
        raise UserError(f"{file}: no replies to {bench.title} in it")
    missing = len(list(bench.unanswered(chosen, replies)))
    if missing:
        print(f"{file}: {missing} replies are missing, and the others are scored. --part takes one part of the "
              "benchmark; --tries says how often a question was asked", file=sys.stderr)
    return replies


# ----------------------------------------------------------------------------------------------------------------------
# Statistics

def wilson_interval(share, n):
    """Returns (low, high), Wilson's 95 % interval of a share of n questions."""
    z = 1.96
    middle, half = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


def mcnemar_p(a, b):
    """Returns the exact two-sided p for two arrays of 0 and 1 on the same questions.

    If the models were equally good, each question on which they differ would favour either one like the flip of a coin.
    """
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

    The interval is a paired bootstrap. p is McNemar's, or None if a score is neither right (100) nor wrong (0).
    """
    p = mcnemar_p(a, b) if np.isin([a, b], (0, 100)).all() else None
    return *bootstrap(b - a, np.ones(len(a)), seed), p


def question_scores(bench, rows, grades):
    """Returns {question: score out of 100}. GPQA's repeats of a question are averaged; None is left out."""
    scores = defaultdict(list)
    for row in rows:
        if grades.get(row["id"]) is not None:
            scores[row.get("repeat_of", row["id"])].append(bench.scale * grades[row["id"]])
    return {question: np.mean(repeats) for question, repeats in scores.items()}


def best_constant(bench, rows, replies):
    """Returns {id: grade} of the constant reply that scores best on these rows.

    The reply replaces those in `replies` in every try. A row that does not offer its letter gets an empty reply.
    """
    constants = {row["id"]: bench.constant_replies(row) for row in rows}
    names = dict.fromkeys(name for row in rows for name in constants[row["id"]])  # in order, each once
    graded = []
    for name in names:
        constant = {}
        for row in rows:
            text, tries = constants[row["id"]].get(name, ""), replies.get(row["id"], {0: {}})
            constant[row["id"]] = {n: {**reply, "output": text} for n, reply in tries.items()}
        graded.append(bench.grade(rows, constant))
    return max(graded, key=lambda grades: sum(grades.values()))


# ----------------------------------------------------------------------------------------------------------------------
# Tables

def score_table(bench, parts, grades, constant, replies, seed):
    """Returns one model's table, column names first, with a line for each (part, rows) of `parts`.

    grades: [strict, lenient], each {id: grade}. constant: {id: grade} of the best constant reply.
    """
    table = [["", "n", "chance", "constant", "score [95 %]", "lenient", "unparsed"]]
    for part, rows in parts:
        strict, lenient = (list(question_scores(bench, rows, reading).values()) for reading in grades)
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
            a, b = (question_scores(bench, rows, readings[lenient]) for readings in grades.values())
            shared = [question for question in a if question in b]
            if not shared:
                continue
            a, b = (np.array([scores[question] for question in shared]) for scores in (a, b))
            mean, low, high, p = paired_difference(a, b, seed)
            table.append([part + (", lenient" if lenient else ""), f"{a.mean():.1f}", f"{b.mean():.1f}",
                          f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]", "" if p is None else f"{p:.2g}",
                          f"{100 * (b.mean() - a.mean()) / abs(a.mean()):+.1f} %" if a.mean() else "-",
                          bench.reported if last and not lenient else ""])
    return table


def print_report(bench, rows, replies, scores, seed):
    """Prints a table for each model, and one for two side by side. Returns the last table.

    replies: {model: {id: {try: reply}}}. scores: {model: the authors' numbers}.
    """
    grades = {name: [bench.grade(rows, replies[name], lenient) for lenient in (False, True)] for name in replies}
    first = next(iter(replies))
    rows = [row for row in rows if row["id"] in grades[first][0]]
    parts, constant = group_by(rows, "part"), {}
    for _, part_rows in parts:
        constant |= best_constant(bench, part_rows, replies[first])
    parts += [("all", rows)] if len(parts) > 1 else []
    for name in replies:
        table = score_table(bench, parts, grades[name], constant, replies[name], seed)
        print_table(table[0], table[1:], f"{bench.title}, {name}; out of 100", width=80)
        numbers = {key: value for key, value in scores[name].items() if not isinstance(value, dict)}
        if numbers and bench.name != "safetybench":  # whose numbers are those of the table
            texts = [f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
                     for key, value in numbers.items()]
            print("\n  the authors' own: " + ", ".join(texts))
    print("\n  constant: the one answer that scores best, given to all of a part (in the line\n"
          "  all, to each part its own); lenient: read as a person would; the score is the\n"
          "  authors' strict reading")
    if len(replies) == 2:
        table = comparison_table(bench, parts, grades, seed)
        title = f"{bench.title}, side by side; reported: the relative improvement in PersonaFuse's paper, at 8B"
        print_table(table[0], table[1:], title, width=80)
    return table


def markdown(tables):
    """Returns one Markdown table of several tables, {title: table}, which have the same columns."""
    head = next(iter(tables.values()))[0]
    lines = [["benchmark", "part", *head[1:]], ["---"] * (len(head) + 1)]
    lines += [[title, *row] for title, table in tables.items() for row in table[1:]]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


# ----------------------------------------------------------------------------------------------------------------------
# The command

def make_benchmark(args, name, folder):
    """Returns the benchmark, all its rows, and those that --lang, --part and --rows choose."""
    instructions, replaced = read_json(OUR_INSTRUCTIONS), read_json(args.prompts) if args.prompts else {}
    for key, text in replaced.items():
        if key not in instructions or not isinstance(text, str):
            raise UserError(f"{args.prompts}: {key!r}; expected texts under some of {', '.join(instructions)}")
    if (args.shots or 0) > 5:
        raise UserError(f"--shots {args.shots}: there are five examples of each category")
    password = os.environ.get(args.password_env) if args.password_env else None
    if args.password_env and not password:
        raise UserError(f"--password-env {args.password_env}: there is no such environment variable, or it is empty")
    if args.mode == "logits" and (name == "eqbench" or args.cot):
        raise UserError("--mode logits chooses among letters: EQ-Bench has none, and --cot asks for reasoning first")
    bench = BENCHMARKS[name](args, instructions | replaced, password)
    rows, lang = bench.load(folder), args.lang or bench.default_lang
    asked = [row for row in rows if lang is None or row.get("lang", lang) == lang]
    if not args.replies:  # a replies file may have more repeats of a question than --tries
        asked = [row for row in asked if bench.tries_of(row)]
    part = args.part or ""
    chosen = [row for row in asked if row["id"].startswith(part) or row["part"].startswith(part)]
    if not chosen:
        parts = ", ".join(dict.fromkeys(row["part"] for row in asked))
        raise UserError(f"--part {part!r}: no id or part of {bench.title} begins with it; the first id is "
                        f"{asked[0]['id']!r}, the parts are {parts}")
    n = min(args.rows or len(chosen), len(chosen))
    if n < len(asked):
        print(f"{bench.title}: {n} of {len(asked)} questions", file=sys.stderr)
    return bench, rows, [chosen[i * len(chosen) // n] for i in range(n)]


def bench(args):
    """Run the public benchmarks on the base and on PersonaFuse, score both as the authors do, and compare them."""
    every, data = args.names == ["all"], Path(args.data or "")
    names = [name for name in BENCHMARKS if (data / name).is_dir()] if every else args.names
    if not args.data or not names or not set(names) <= set(BENCHMARKS):
        raise UserError(f"bench {' '.join(args.names)} --data {args.data}: expected the name of a benchmark "
                        f"({', '.join(BENCHMARKS)}) and its folder as published, or all and the folder they are in")
    several = every or len(names) > 1
    if args.replies and (several or args.run or args.base):
        raise UserError("--replies scores one benchmark's file without a model: give one name, and neither --run nor "
                        "--base")
    models = None if args.replies else Models(args)
    out = Path(args.out or (Path(args.run) / "bench" if args.run else f"runs/bench-{Path(args.base or '').name}"))
    numbers, tables = {}, {}
    for name in names:
        try:
            bench, rows, chosen = make_benchmark(args, name, data / name if several else data)
        except UserError as error:
            if not every:
                raise
            print(f"{name} is left out: {error}", file=sys.stderr)
            continue
        if models:
            folders = {model: out / name / model.replace(" ", "-") for model in models.names}
            replies = {model: run_bench(args, bench, rows, chosen, models, model, folder)
                       for model, folder in folders.items()}
        else:
            replies = {"replies": stored_replies(args.replies, bench, rows, chosen)}
        scores = {model: bench.score(chosen, replies[model]) for model in replies}
        numbers[name] = scores.get("replies", scores)
        if not args.json:
            tables[bench.title] = print_report(bench, chosen, replies, scores, args.seed)
    if args.json:
        print(json.dumps(numbers if several else numbers[names[0]], ensure_ascii=False))
    elif every and tables:
        with atomic(out / "bench.md") as part:
            part.write_text(markdown(tables), encoding="utf-8")
        print(f"\n{markdown(tables)}\nwritten to {out / 'bench.md'}")
