"""The command bench: a model answers the public benchmarks, and its replies are scored and compared.
"""
import hashlib
import json
import math
import os
import re
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
from support.benchmarks import BENCHMARKS, PROMPTS, grouped
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
    """Which: emobench, eqbench, tombench, safetybench, gpqa, or all that --data holds."""
    run: str | None = None
    """Run folder; without it, --base DIR is measured alone."""
    data: str | None = None
    """The benchmark's folder as published; for several or all, the folder that holds emobench/ eqbench/ …"""
    replies: str | None = None
    """Score this replies.jsonl instead of running a model."""
    against: str | None = None
    """A second replies.jsonl, compared with that of --replies item by item."""
    json: bool = False
    """Print only JSON, the authors' numbers, on standard output."""
    partial: bool = False
    """Score what is there of a replies.jsonl that is not whole."""
    only: typing.Literal["base", "personafuse"] | None = None
    """Run one of the two; both, and compare them, if not given."""
    mode: typing.Literal["generate", "logits"] | None = None
    """logits takes the letter with the highest log-probability: SafetyBench's default; generate, the others'."""
    lang: typing.Literal["en", "zh"] | None = None
    """ToMBench: en if not given; EmoBench: both if not given."""
    set: str | None = None
    """SafetyBench: en, zh or zh_subset, the one that is there if not given. GPQA: main, if not given, diamond or
    extended."""
    revise: bool = False
    """EQ-Bench: ask for a critique and revised scores too."""
    cot: bool = False
    """EmoBench: ask for the reasoning first."""
    shots: int | None = None
    """SafetyBench: this many examples, at most 5, of the same category before each question; none if not given."""
    tries: int | None = None
    """Tries a question: ToMBench 5, EQ-Bench at most 3 until one parses, GPQA 1 (repeats) if not given."""
    rows: int | None = None
    """Run this many questions only, evenly spread."""
    part: str | None = None
    """Run only questions whose id begins so: EA/en, "False Belief Task"."""
    max_new_tokens: int | None = None
    """Longest reply; EmoBench 50 (2048 with --cot), EQ-Bench 60 (1000 with --revise), ToMBench 32, SafetyBench 64,
    GPQA 1024 if not given."""
    prompts: str | None = None
    """JSON file with other instructions, {"emobench/EA/en": text, …}; see PROMPTS in support/benchmarks.py."""
    password_env: str | None = None
    """GPQA: the environment variable that holds the archive's password."""
    out: str | None = None
    """Folder for the replies; RUN/bench, or runs/bench-BASE for a base alone, if not given. A stopped run goes on."""


class Subjects:
    """The base and PersonaFuse, loaded when first asked for, and the gate of each question."""

    def __init__(self, args):
        if not args.run and not (args.base and args.only != "personafuse"):
            raise UserError("which model? --run with a run folder, or --base with a model folder to measure it alone")
        self.args, self.run, self.routed = args, LoadedRun(replace(args, data=None)) if args.run else None, {}
        self.base = self.run.setup.base if self.run else args.base
        self.dtype = pick_dtype(args.dtype, pick_device(args.device))
        fused = "by hand" if args.persona or args.gate else "PersonaFuse"
        self.names = ["base"] if not self.run or args.only == "base" else [fused] if args.only else ["base", fused]

    @cached_property
    def model(self):
        if self.names != ["base"]:
            return self.run.model
        return Transformer.from_pretrained(self.base, self.dtype, pick_device(self.args.device))

    @cached_property
    def chat(self):
        return Chat.from_dir(self.base)

    def settings(self, name):
        """What says which model this is, wherever its run folder is: a resumed run must share it."""
        read_json(Path(self.base) / "config.json")  # fingerprint would take a folder without one for data
        found = {"base": Path(self.base).name, "content": fingerprint(self.base),
                 "dtype": str(self.dtype).removeprefix("torch."), "gate": "base"}
        if name == "base":
            return found
        found |= {"gate": self.args.persona or self.args.gate or "learned", "tau": self.run.setup.tau,
                  "alpha": self.run.setup.alpha}
        files = {"experts": [self.run.folder("experts") / e / "adapter_model.safetensors" for e in EXPERTS]}
        if found["gate"] == "learned":
            found["encoder"] = fingerprint(self.run.setup.encoder)
            files["router"] = [self.run.folder("router") / "model.safetensors"]
        for part, names in files.items():
            digest = hashlib.sha256()
            for file in names:
                with open(file, "rb") as content:
                    digest.update(hashlib.file_digest(content, "sha256").digest())
            found[part] = digest.hexdigest()
        return found

    def gates(self, name):
        """One gate (1, E) for all questions, None for the base, or what makes the gates of items: items -> (B, E)."""
        if name == "base":
            return None
        hand = gate_from_options(self.run, self.args)
        return self.route if hand is None else hand

    def route(self, items):
        """The router's gates, each query read once: the scenario and the question, as they stand."""
        new = [query for query in dict.fromkeys(item.query for item in items) if query not in self.routed]
        if new:
            self.routed |= zip(new, self.run.gates([{"id": i, "query": query} for i, query in enumerate(new)]))
        return torch.stack([self.routed[item.query] for item in items])


def choose(model, chat, items, prompts, gate, prefix):
    """Replies made of the letters with the highest log-probability, slot by slot -> texts. gate: (B, E), (1, E) or
    None; prefix: what all prompts begin with, computed already, or None."""
    texts = ["" for _ in items]
    for slot in range(len(items[0].slots)):
        texts = [text + item.slots[slot][0] for text, item in zip(texts, items)]
        rows = [ids + encode(chat.tokenizer, text) for ids, text in zip(prompts, texts)]
        ids, lengths = pad([row[prefix.length if prefix else 0:] for row in rows], model.device)
        logits = model.head(model.hidden(ids, gate, prefix, last_positions(ids, lengths)))  # (B, V)
        for i, item in enumerate(items):
            letters = item.slots[slot][1]
            texts[i] += letters[logits[i, [encode(chat.tokenizer, letter)[0] for letter in letters]].argmax().item()]
    return [text + item.end for text, item in zip(texts, items)]


@torch.no_grad()
def reply_to(model, chat, items, gates, mode, max_new_tokens, tokens, seed):
    """Yield (items, texts) batch by batch, the shortest prompts first. In logits mode, what the prompts of one
    instruction begin with is computed once where the gate allows it: one gate for all, or none."""
    generator = torch.Generator().manual_seed(seed)
    kinds = defaultdict(list)
    for item in items:
        ids = chat.prompt([{"role": "user", "content": item.text}])
        kinds[item.instruction if mode == "logits" else item.temperature].append((item, ids))
    for kind, part in kinds.items():
        gate, prefix = gates.to(model.device) if torch.is_tensor(gates) else None, None
        if mode == "logits" and not callable(gates):
            n = shared_prefix([ids for _, ids in part])
            prefix = Prefix(model, part[0][1][:n], gate) if n and len(part) > 1 else None
        for group in micro_batches(part, tokens, lambda one: len(one[1]) + max_new_tokens):
            some, prompts = zip(*group)
            if callable(gates):
                gate = gates(some).to(model.device)
            if mode == "logits":
                yield some, choose(model, chat, some, prompts, gate, prefix)
            else:
                found = generate(model, prompts, gate, max_new_tokens, kind, stops=chat.stops, generator=generator)
                yield some, [chat.text(ids) for ids in found]


def read_replies(path, bench, rows):
    """A replies.jsonl -> {id: {try: reply}}, checked. UserError names file and line."""
    by_id, replies, ignored = {row["id"]: row for row in rows}, defaultdict(dict), 0
    for number, reply in read_lines(path):
        try:
            id, n, output, shown = str(reply["id"]), reply["try"], reply["output"], reply.get("map")
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}, line {number}: not a reply ({type(error).__name__}: {error}); expected {{\"id\", "
                            "\"try\", \"output\", …}") from None
        if bench.ignored(id):
            ignored += 1
            continue
        problem = f"{bench.title} has no {id!r}" if id not in by_id else \
            f"try is {n!r}, expected a number from 0" if type(n) is not int or n < 0 else \
            f"output is {output!r}, expected text" if not isinstance(output, str) else \
            f"a second reply to {id}, try {n}" if n in replies[id] else \
            f"map is {shown!r}, expected the letter shown -> the letter in the file, for each option" \
            if bench.name == "tombench" and not bench.fits(by_id[id], shown) else None
        if problem:
            raise UserError(f"{path}, line {number}: {problem}")
        replies[id][n] = reply
    if ignored:
        print(f"{path}: {ignored} replies in the other language are not scored", file=sys.stderr)
    return dict(replies)


def open_replies(folder, settings, bench, rows):
    """Begin or go on with a folder of replies -> {id: {try: reply}} so far. UserError if they were made differently."""
    file, replies = folder / "replies.jsonl", {}
    if (folder / "config.json").exists():
        was = dict.fromkeys(settings, "unknown") | read_json(folder / "config.json")
        differ = differences(was, settings)
        if differ:
            raise UserError(f"{folder} holds replies made with other settings: {differ}. Choose another --out")
    if file.exists():
        text, begins = file.read_bytes(), b'{"id": "", "try": '
        if torn := len(text) - text.rfind(b"\n") - 1:  # it was stopped in the middle of a line
            first = re.sub(rb'^({"id": ")[^"]*', rb"\1", text.split(b"\n")[0])[:len(begins)]
            if not begins.startswith(first):
                raise UserError(f"{file}, line 1: not a reply; expected {{\"id\", \"try\", \"output\", …}}. Remove the "
                                "file, or choose another --out")
            os.truncate(file, len(text) - torn)
        replies = read_replies(file, bench, rows)
    with atomic(folder / "config.json") as part:
        part.write_text(json.dumps(settings, indent=2) + "\n")
    for item in bench.ask(rows, {}):
        if replies.get(item.id, {}).get(item.n, {}).get("prompt_sha256", item.sha256) != item.sha256:
            raise UserError(f"{file}: {item.id} was asked in other words (prompt_sha256). Choose another --out")
    return replies


def run_bench(args, bench, rows, chosen, subjects, name, folder):
    """Ask those of `chosen` (some of `rows`) that have no reply yet; replies.jsonl grows batch by batch -> their
    replies. Stopped at any time, the same command goes on."""
    mode = args.mode or ("logits" if bench.name == "safetybench" else "generate")
    longest, chat = args.max_new_tokens or bench.tokens, subjects.chat  # a wrong folder shows before any file is
    replies = open_replies(folder, {
        "bench": bench.name, "mode": mode, "max_new_tokens": longest if mode == "generate" else None, "set": args.set,
        "revise": bench.revise, "cot": bench.cot, "shots": bench.shots, "seed": args.seed,
        **subjects.settings(name)}, bench, rows)
    by_id = {row["id"]: row for row in chosen}
    while items := [item for item in bench.ask(chosen, replies) if item.n not in replies.get(item.id, ())]:
        gates, began = subjects.gates(name), time.perf_counter()
        bar = tqdm(total=len(items), desc=f"{bench.title}, {name}", unit="reply", disable=not sys.stderr.isatty(),
                   dynamic_ncols=True)
        with bar, open(folder / "replies.jsonl", "a", encoding="utf-8") as out:
            for some, texts in reply_to(subjects.model, chat, items, gates, mode,
                                        longest if mode == "generate" else 0, args.tokens, args.seed):
                seconds = round((time.perf_counter() - began) / len(some), 3)
                for item, text in zip(some, texts):
                    reply = {"id": item.id, "try": item.n, "prompt_sha256": item.sha256,
                             "output": bench.stored(by_id[item.id], text), "seconds": seconds}
                    reply |= {"map": item.map} if item.map else {}
                    replies.setdefault(item.id, {})[item.n] = reply
                    out.write(json.dumps(reply, ensure_ascii=False) + "\n")
                out.flush()
                bar.update(len(some))
                began = time.perf_counter()
    return {id: tries for id, tries in replies.items() if id in by_id}


def wilson_interval(share, n):
    """95 % interval of a share of n."""
    z = 1.96
    middle, half = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


def mcnemar_p(a, b):
    """Exact two-sided p of two arrays of 0/1 on the same items: those that differ fall either way like a fair coin."""
    gained, lost = int((a < b).sum()), int((a > b).sum())
    n = gained + lost
    return min(1.0, 2 * sum(math.comb(n, k) for k in range(min(gained, lost) + 1)) / 2 ** n)


def estimate(values, seed=0):
    """Scores of items (N,), out of 100 -> (mean, low, high): Wilson for right and wrong, else a bootstrap."""
    if np.isin(values, (0, 100)).all():
        return values.mean(), *(100 * x for x in wilson_interval(values.mean() / 100, len(values)))
    return bootstrap(values, np.ones(len(values)), seed)


def paired(a, b, seed=0):
    """The same items under two models, out of 100 -> (mean of b − a, low, high, p). The interval is a paired bootstrap;
    p is McNemar's for right and wrong, else how often the bootstrap falls on the other side of 0."""
    found = bootstrap(b - a, np.ones(len(a)), seed)
    if np.isin([a, b], (0, 100)).all():
        return *found, mcnemar_p(a, b)
    means = (b - a)[np.random.default_rng(seed).integers(0, len(a), (2000, len(a)))].mean(1)
    return *found, min(1.0, 2 * (1 + min((means <= 0).sum(), (means >= 0).sum())) / 2001)


def values_of(points, rows, scale):
    """{question: score out of 100}; repeats of a question are averaged, what could not be parsed is left out."""
    found = defaultdict(list)
    for row in rows:
        if points.get(row["id"]) is not None:
            found[row.get("unit", row["id"])].append(scale * points[row["id"]])
    return {unit: np.mean(scores) for unit, scores in found.items()}


def best_constant(bench, rows, replies):
    """{id: points} of the one answer that would score best, given to each of these rows in every try."""
    graded = []
    for constant in bench.constants(rows[0]):
        said = {row["id"]: {n: {**reply, "output": bench.constants(row).get(constant, "")}
                            for n, reply in replies.get(row["id"], {0: {}}).items()} for row in rows}
        graded.append(bench.grade(rows, said))
    return max(graded, key=lambda points: sum(points.values()))


def bench_lines(bench, rows, replies, seed=0):
    """replies {model: {id: {try: reply}}} -> what the tables show: a dict for each part of a benchmark, and all."""
    graded = {name: (bench.grade(rows, some), bench.grade(rows, some, lenient=True)) for name, some in replies.items()}
    scale, a_model = 1 if bench.points else 100, next(iter(replies))
    seen = [row for row in rows if row["id"] in graded[a_model][0]]
    parts, constant, lines = grouped(seen, "part"), {}, []
    for _, some in parts:
        constant |= best_constant(bench, some, replies[a_model])
    for part, some in parts + ([("all", seen)] if len(parts) > 1 else []):
        line = {"part": part, "chance": np.mean([bench.chance(row) for row in some]) * scale,
                "constant": np.mean([constant[row["id"]] for row in some]) * scale, "models": {}}
        for name, points in graded.items():
            values, loose = (values_of(p, some, scale) for p in points)
            line["models"][name] = {
                "values": values, "loose": loose, "n": len(values),
                "score": estimate(np.array(list(values.values())), seed) if values else (0.0, 0.0, 0.0),
                "lenient": np.mean(list(loose.values())) if loose else 0.0,
                "unparsed": sum(points[0].get(row["id"], 0) is None for row in some) if bench.points else sum(
                    bench.unparsed(row, reply) for row in some for reply in replies[name].get(row["id"], {}).values())}
        for key in ("values", "loose") if len(graded) == 2 else ():
            a, b = (model[key] for model in line["models"].values())
            both = [unit for unit in a if unit in b]
            line[f"paired {key}"] = both and paired(*(np.array([x[unit] for unit in both]) for x in (a, b)), seed)
        lines.append(line)
    return lines


def score_rows(lines, name):
    """One model's table."""
    return [["", "n", "chance", "constant", "score [95 %]", "lenient", "unparsed"]] + [
        [line["part"], str(found["n"]), f"{line['chance']:.1f}", f"{line['constant']:.1f}",
         "{:.1f} [{:.1f}, {:.1f}]".format(*found["score"]), f"{found['lenient']:.1f}", str(found["unparsed"])]
        for line in lines for found in [line["models"][name]]]


def comparison_rows(lines, reported):
    """Two models side by side, on the items that both have; the source's relative improvement last."""
    table = [["", *lines[0]["models"], "difference [95 %]", "p", "relative", "reported"]]
    for line in lines:
        for key in ("values", "loose") if line is lines[-1] else ("values",):
            if not line[f"paired {key}"]:
                continue
            mean, low, high, p = line[f"paired {key}"]
            first, second = (found[key] for found in line["models"].values())
            a, b = (np.mean([x[unit] for unit in first if unit in second]) for x in (first, second))
            table.append([line["part"] + (", lenient" if key == "loose" else ""), f"{a:.1f}", f"{b:.1f}",
                          f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]", f"{p:.2g}",
                          f"{100 * (b - a) / abs(a):+.1f} %" if a else "-",
                          reported if line is lines[-1] and key == "values" else ""])
    return table


def markdown(tables):
    """{title: rows, all with the same columns} -> one Markdown table."""
    head = next(iter(tables.values()))[0]
    lines = [["benchmark", "part", *head[1:]], ["---"] * (len(head) + 1)]
    lines += [[title, *row] for title, rows in tables.items() for row in rows[1:]]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def make_benchmark(args, name, folder):
    """-> the benchmark and its rows, all checked."""
    prompts = read_json(args.prompts) if args.prompts else {}
    for key, text in prompts.items():
        if key not in PROMPTS or not isinstance(text, str):
            raise UserError(f"{args.prompts}: {key!r}; expected texts under some of {', '.join(PROMPTS)}")
    if (args.shots or 0) > 5:
        raise UserError(f"--shots {args.shots}: there are five examples of each category")
    password = os.environ.get(args.password_env) if args.password_env else None
    if args.password_env and not password:
        raise UserError(f"--password-env {args.password_env}: there is no such environment variable, or it is empty")
    bench = BENCHMARKS[name](lang=args.lang, subset=args.set, revise=args.revise, cot=args.cot, shots=args.shots or 0,
                             tries=args.tries, prompts=prompts, password=password)
    rows = bench.load(folder)
    if args.mode == "logits" and (bench.points or args.cot):
        raise UserError("--mode logits chooses among letters: EQ-Bench has none, and --cot asks for reasoning first")
    return bench, rows


def stored_replies(args, bench, rows):
    """--replies, and --against -> {model: replies}. UserError if any are missing, unless --partial."""
    found = {}
    for name, file in (("base" if args.against else "replies", args.replies), ("PersonaFuse", args.against)):
        if file is None:
            continue
        found[name] = read_replies(file, bench, rows)
        missing = bench.missing(rows, found[name])
        if not found[name]:
            raise UserError(f"{file}: no replies to {bench.title} in it")
        if missing and not args.partial:
            raise UserError(f"{file}: {missing} replies are missing; --partial scores what is there")
        if missing:
            print(f"{file}: {missing} replies are missing; what is there is scored", file=sys.stderr)
    return found


def choose_rows(args, bench, rows):
    """The questions to ask: --part, and --rows of it, evenly spread."""
    chosen = [row for row in rows if row["id"].startswith(args.part or "")]
    if not chosen:
        raise UserError(f"--part {args.part!r}: no id of {bench.title} begins so; the first is {rows[0]['id']!r}")
    n = min(args.rows or len(chosen), len(chosen))
    if n < len(rows):
        print(f"{bench.title}: {n} of {len(rows)} questions", file=sys.stderr)
    return [chosen[i * len(chosen) // n] for i in range(n)]


def bench(args):
    """The public benchmarks, scored as their authors do: the base, PersonaFuse, and the two side by side."""
    every, data = args.names == ["all"], Path(args.data or "")
    names = [name for name in BENCHMARKS if (data / name).is_dir()] if every else args.names
    if not args.data or not names or not set(names) <= set(BENCHMARKS):
        raise UserError(f"bench {' '.join(args.names)} --data {args.data}: expected the name of a benchmark "
                        f"({', '.join(BENCHMARKS)}) and its folder as published, or all and the folder they are in")
    several = every or len(names) > 1
    if (args.replies or args.against) and (several or args.run or args.base or not args.replies):
        raise UserError("--replies scores one benchmark's file without a model, --against compares a second one with "
                        "it: one name, and neither --run nor --base")
    subjects = None if args.replies else Subjects(args)
    out = Path(args.out or (Path(args.run) / "bench" if args.run else f"runs/bench-{Path(args.base or '').name}"))
    found, tables = {}, {}
    for name in names:
        try:
            bench, rows = make_benchmark(args, name, data / name if several else data)
            chosen = choose_rows(args, bench, rows) if subjects else rows
        except UserError as error:
            if not every:
                raise
            print(f"{name} is left out: {error}", file=sys.stderr)
            continue
        if subjects is None:
            replies = stored_replies(args, bench, rows)
        else:
            replies = {who: run_bench(args, bench, rows, chosen, subjects, who, out / name / who.replace(" ", "-"))
                       for who in subjects.names}
        scores = {who: bench.score(chosen, some) for who, some in replies.items()}
        found[name] = scores.get("replies", scores)
        if not args.json:
            tables[bench.title] = bench_report(bench, chosen, replies, scores, args.seed)
    if args.json:
        print(json.dumps(found if several else found[names[0]], ensure_ascii=False))
    elif every and tables:
        with atomic(out / "bench.md") as part:
            part.write_text(markdown(tables), encoding="utf-8")
        print(f"\n{markdown(tables)}\nwritten to {out / 'bench.md'}")


def bench_report(bench, rows, replies, scores, seed):
    """Print a table for each model, and one for two side by side -> the rows of the last."""
    lines = bench_lines(bench, rows, replies, seed)
    for who in replies:
        print(f"\n{bench.title}, {who}; out of 100\n")
        table = score_rows(lines, who)
        print_table(table[0], table[1:], width=80)
        official = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in scores[who].items()
                             if bench.name != "safetybench" and not isinstance(v, dict))
        print(f"\n  the authors' own: {official}" if official else "")
    print("  constant: the one answer that scores best on a part, given to all of it;\n"
          "  lenient: read as a person would, beside the authors' strict reading in score")
    if len(replies) == 2:
        table = comparison_rows(lines, bench.reported)
        print(f"\n{bench.title}, side by side; reported: the source's relative improvement at 8B\n")
        print_table(table[0], table[1:], width=80)
    return table
