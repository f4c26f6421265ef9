"""Everything that measures and uses a trained run: how it routes, what its gate is worth, what the models say.

    python eval.py routing --run runs/tiny   # does the router find the poles?
    python eval.py ablate --run runs/tiny    # held-out loss under seven gates
    python eval.py health --run runs/tiny    # signs of a failed training
    python eval.py ask --run runs/tiny "My boss is furious"
    python eval.py chat --run runs/tiny
    python eval.py export --run runs/tiny --as mixture --persona O+ --out DIR
    python eval.py bench emobench --data DIR --run runs/tiny
    python eval.py experiment routing --run runs/tiny   # also: plot, inventory

If some test records come from domains that training never saw, routing and ablate also report seen and held-out
domains apart. Intervals are 95 % paired bootstraps over records: both gates are measured on the same records.

What is notable:
- a command is a dataclass of options and a function of them; the table COMMANDS at the end lists all
- bench, experiment, plot and inventory are in support/; support/measure.py opens a run and measures losses for all

Shapes: N records, E = 10 experts.
"""
import argparse
import json
import math
import sys
import textwrap
import typing
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from lora import EXPERTS, SHORT_NAMES, export_mixture, save_experts
from model import generate
from router import GATE_RULES, gate_statistics, gates_for_rule, persona_gate, query_ids, softmax_gate
from support.bench import Bench, bench
from support.chat import encode
from support.command import Parser, add_fields, check_numbers, for_users, run_command
from support.experiments import Experiment, experiment
from support.export import stored_dtype, write_merged
from support.files import UserError, atomic
from support.inventory import Inventory, inventory
from support.measure import (GateOptions, LoadedRun, RecordOptions, bootstrap, domain_subsets, gate_from_options,
                             load_cases, load_run, losses, one_hot_gate, pole_losses, update_gram)
from support.plots import Plot, plot
from support.records import load_data, messages_of, read_queries, write_records
from support.rows import Row
from support.tables import format_gate, print_table
from synth import signatures
from train import evaluation_loss, generate_replies, score_queries

try:
    import readline
except ImportError:  # Windows
    readline = None


# ----------------------------------------------------------------------------------------------------------------------
# routing

@dataclass(kw_only=True)
class Routing(RecordOptions):
    show: int = 12
    """Number of queries in the heat map."""


def average_precision(scores, relevant):
    """Mean over the relevant items of the precision at their rank. scores (N,), relevant (N,) of 0/1.

    Returns a float, NaN if nothing is relevant. Among equal scores the irrelevant items count as ranked first, so that
    a router that cannot tell queries apart gains nothing from ties.
    """
    order = np.lexsort((relevant, -scores))
    hits = relevant[order]
    precision = hits.cumsum() / np.arange(1, len(hits) + 1)
    return float((precision * hits).sum() / hits.sum()) if hits.any() else math.nan


def recall_at_k(similarity, active):
    """A query with k active poles has k guesses, its k most similar experts. Returns the mean share of active poles
    among the guesses. similarity (N, E), active (N, E) of 0/1."""
    rank = (-similarity).argsort(-1).argsort(-1)  # 0: the most similar
    k = active.sum(-1, keepdims=True)
    return float((((rank < k) & (active > 0)).sum(-1) / active.sum(-1)).mean())


def heat_map(gates, active, queries):
    """Print gates (N, E), one row per query, in shades relative to the largest weight; * marks active poles."""
    shades = np.round(4 * gates / gates.max()).astype(int)
    rows = [[" ".join(query.split()), *("·░▒▓█"[s] + ("*" if a else " ") for s, a in zip(row, poles))]
            for query, row, poles in zip(queries, shades, active)]
    print_table(["query", *SHORT_NAMES], rows, "Gates: darker is a larger weight, * marks the poles that the labels "
                "call for", width=80)


def routing(args):
    """Measures how well the router finds the poles that the labels call for: average precision for each expert, recall,
    the gate's entropy, and a heat map of queries and experts."""
    run = LoadedRun(args)
    records, new_domain = run.records(need_response=False)
    rows = run.rows(records)
    active = torch.stack([row.active for row in rows]).numpy()
    similarity = score_queries(run.router, rows, args.tokens)
    gates = softmax_gate(similarity, run.setup.tau)
    for name, part in domain_subsets(new_domain):
        a, s, statistics = active[part], similarity.numpy()[part], gate_statistics(gates[part])
        precision = [average_precision(s[:, e], a[:, e]) for e in range(len(EXPERTS))]
        table = [[expert, int(a[:, e].sum()), precision[e], float(a[:, e].mean()), statistics["usage"][e]]
                 for e, expert in enumerate(EXPERTS)]
        table.append(["mean", len(part), float(np.nanmean(precision)), float(a.mean()), ""])
        print_table(["expert", "queries", "AP", "by chance", "usage"], table,
                    f"{len(part)} test queries, {name}; router after {run.stage_of('router')}, tau {run.setup.tau:g}")
        print(f"\n  recall at |P| {recall_at_k(s, a):.3f}   entropy {statistics['entropy']:.3f} of at most "
              f"{math.log(len(EXPERTS)):.3f}   top-1 mass {statistics['top1']:.3f}")
    heat_map(gates[:args.show].numpy(), active[:args.show], [r["query"] for r in records])


# ----------------------------------------------------------------------------------------------------------------------
# ablate

@dataclass(kw_only=True)
class Ablate(RecordOptions):
    records: int | None = None
    """Number of test records. All if not given."""
    control: str | None = None
    """Run folder of the fair control to compare with: joint training under a uniform gate (train.py --joint-gate)."""
    replies: int = 10
    """Number of replies in which each expert's signature is counted. 0 skips this."""


def ablate(args):
    """Measures the held-out loss under each gate rule, compared with the learned gate, and the loss of each expert
    alone on the records of each pole."""
    run = LoadedRun(args)
    cases = load_cases(run, limit=args.records)
    nats, meaning = losses(run, cases, GATE_RULES, seed=args.seed), dict(GATE_RULES)
    if args.control:
        control = LoadedRun(replace(args, run=args.control, stage="joint", experts=None, router=None))
        uniform = gates_for_rule("uniform", cases.active)
        nats["control"], _ = evaluation_loss(control.model, cases.rows, uniform, args.tokens)
        meaning["control"] = "0.1 for each, in training too"
    for name, part in domain_subsets(cases.new_domain):
        counts, table = cases.counts[part], []
        for rule, found in nats.items():
            difference = bootstrap((found - nats["learned"])[part], counts, args.seed)
            table.append([rule, f"{found[part].sum() / counts.sum():.4f}", "" if rule == "learned" else difference])
        print_table(["gate", "nats/token", "against learned, 95 %"], table,
                    f"Held-out loss, {len(part)} records, {counts.sum():.0f} reply tokens, {name}; experts after "
                    f"{run.stage_of('experts')}, tau {run.setup.tau:g}")
    print("\nThe gates\n")
    for rule in nats:
        print(f"  {rule:<10}{meaning[rule]}")
    expert_table(load_run(args, args.run, "warmup"), args)


def expert_table(run, args):
    """Print two tables: the loss of warm-up expert e alone on the records that call for pole p only, and the share of
    its replies that carry its pole's signature (the template teacher's data have signatures)."""
    records, poles, table = pole_losses(run, args)
    if not records:
        print("\nNo test record has exactly one active pole, so there is no table of experts and poles")
        return
    best = {p: table[:, p].argmin() for p in sorted(set(poles))}
    rows = [[SHORT_NAMES[e], *(f"{table[e, p]:.2f}" + ("*" if best.get(p) == e else " ") for p in range(len(EXPERTS)))]
            for e in range(len(EXPERTS))]
    print_table(["expert", *(f"{name} " for name in SHORT_NAMES)], rows,
                f"Warm-up expert (row) alone on the {len(records)} records that call for one pole (column), "
                "nats/token; * is the best of a column")
    print(f"\n  lowest on the diagonal: {sum(p == e for p, e in best.items())} of {len(best)} poles")
    if not args.replies or not any("manner" in record for record in records):
        return
    rows = []
    for e in best:
        asked = [r for r, p in zip(records, poles) if p == e][:args.replies]
        shares = [np.mean([signatures(text)[e] for text in generate_replies(run.model, run.chat, asked, gate)])
                  for gate in (None, one_hot_gate(e))]
        rows.append([EXPERTS[e], *(f"{share:.2f}" for share in shares)])
    print_table(["pole", "base", "expert"], rows, f"Share of {args.replies} replies with the pole's signature")


# ----------------------------------------------------------------------------------------------------------------------
# health. Each check takes what health() measured on the test records, and returns whether to raise an alarm and a
# sentence about what it found. The first three checks are the source's, the others are ours.

@dataclass(kw_only=True)
class Health(RecordOptions):
    text: str | None = None
    """File of plain text, blank lines between its pieces, to measure general ability on. The test queries, and the
    neutral replies of the template teacher's records, if not given."""
    records: int | None = None
    """Number of test records. All if not given."""


def check_router(m):
    nats = losses(m.run, m.cases, ("learned", "random", "shuffled"), seed=m.args.seed)
    lost = {rule: bootstrap(nats[rule] - nats["learned"], m.cases.counts, m.args.seed)
            for rule in ("random", "shuffled")}
    each = [f"{rule} ones lose {mean:.4f} [{low:.4f}, {high:.4f}]" for rule, (mean, low, high) in lost.items()]
    return any(low <= 0 for _, low, _ in lost.values()), (
        f"against its gates, {', '.join(each)} nats/token; an interval that reaches 0 means that the router is no "
        "better than chance")


def plain_rows(run, texts):
    """Returns texts as rows without a question: all tokens but the first are supervised, and no pole is active."""
    rows = []
    for i, text in enumerate(texts):
        ids = [*([] if run.chat.bos is None else [run.chat.bos]), *encode(run.chat.tokenizer, text), run.chat.end]
        rows.append(Row(str(i), torch.zeros(len(EXPERTS)), np.array(ids[:run.args.tokens], dtype=np.int32), 1,
                        np.array(query_ids(run.tokenizer, text), dtype=np.int32)))
    return rows


def check_general_ability(m):
    texts = [text for record in m.cases.records for text in (record["query"], record.get("neutral")) if text]
    if m.args.text:
        try:
            texts = [text for text in Path(m.args.text).read_text(encoding="utf-8").split("\n\n") if text.strip()]
        except (OSError, ValueError) as error:
            raise UserError(f"{m.args.text}: {error}") from None
    rows = plain_rows(m.run, texts)
    gates = softmax_gate(score_queries(m.run.router, rows, m.args.tokens), m.run.setup.tau)
    base, counts = evaluation_loss(m.run.model, rows, None, m.args.tokens)
    mixed, _ = evaluation_loss(m.run.model, rows, gates, m.args.tokens)
    per_token = base.sum() / counts.sum()
    mean, low, high = (x / per_token for x in bootstrap(mixed - base, counts, m.args.seed))
    return low > 0.1, (f"the mixture's loss on plain text is {mean:+.1%} [{low:+.1%}, {high:+.1%}] of the base's "
                       f"{per_token:.3f} nats/token; an interval above a tenth is too much")


def check_vectors(m):
    splits, n_zero = load_data(m.run.setup.data, m.run.setup.seed)
    total = sum(map(len, splits.values())) + n_zero
    return n_zero > 0, f"{n_zero} of {total} records have no active trait; they are not trained on"


def check_dead_experts(m):
    weight, size = m.gates.mean(0), m.gram.diagonal().sqrt()
    first = torch.bincount(m.similarity.argmax(-1), minlength=len(EXPERTS)) / len(m.gates)
    dead = (weight < 0.1 / len(EXPERTS)) | (first < 0.1 / len(EXPERTS)) | (size < 0.01 * size.max())
    return bool(dead.any()), (
        f"{', '.join(EXPERTS[e] for e in dead.nonzero()[:, 0]) or 'none'}; lowest mean weight {weight.min():.3f}, "
        f"lowest share of first choices {first.min():.3f} (dead: below 0.01), smallest update "
        f"{size.min() / size.max():.2f} of the largest (dead: below 0.01)")


def check_collapsed_gate(m):
    entropy, uniform = gate_statistics(m.gates)["entropy"], math.log(len(EXPERTS))
    return not 0.01 < entropy / uniform < 0.99, (
        f"entropy {entropy:.3f} nats; within 1 % of 0 the gate is one expert, within 1 % of {uniform:.3f} it is "
        "uniform")


def check_experts_alone(m):
    alone = [i for i, active in enumerate(m.cases.active) if active.sum() == 1]
    if not alone:
        return False, "not measured: no test record calls for one pole alone"
    rows, poles = [m.cases.rows[i] for i in alone], m.cases.active[alone].argmax(-1)
    nats, counts = evaluation_loss(m.run.model, rows, torch.eye(len(EXPERTS))[poles], m.args.tokens)
    difference = nats - evaluation_loss(m.run.model, rows, None, m.args.tokens)[0]
    per_token = {p: difference[poles == p].sum() / counts[poles == p].sum() for p in sorted(set(poles.tolist()))}
    worse = [EXPERTS[p] for p in per_token if per_token[p] > 0]
    return bool(worse), (f"{', '.join(worse) or 'none'}; one expert alone on its pole's records against the base, "
                         f"nats/token: best {min(per_token.values()):+.3f}, worst {max(per_token.values()):+.3f}")


def check_copies(m):
    size = m.gram.diagonal().sqrt()
    cosines = m.gram / size.outer(size).clamp(min=1e-30) - 2 * torch.eye(len(EXPERTS))  # no expert copies itself
    a, b = divmod(int(cosines.argmax()), len(EXPERTS))
    return bool(cosines.max() > 0.9), (f"the updates most alike are those of {EXPERTS[a]} and {EXPERTS[b]}, cosine "
                                       f"{cosines.max():.2f}; above 0.90 they are copies")


CHECKS = {"router": check_router, "general ability": check_general_ability, "all-zero vectors": check_vectors,
          "dead experts": check_dead_experts, "collapsed gate": check_collapsed_gate,
          "experts that only work together": check_experts_alone, "copies": check_copies}


def health(args):
    """Looks for signs of a failed training and explains each in a sentence. Exit status 1 if it finds one."""
    run = LoadedRun(args)
    cases = load_cases(run, limit=args.records)
    similarity = score_queries(run.router, cases.rows, args.tokens)
    measured = SimpleNamespace(run=run, args=args, cases=cases, similarity=similarity,
                               gates=softmax_gate(similarity, run.setup.tau), gram=update_gram(run.model))
    print(f"{args.run}: experts after {run.stage_of('experts')}, tau {run.setup.tau:g}, {len(cases.rows)} test "
          "records\n")
    alarms = []
    for name, check in CHECKS.items():
        alarm, text = check(measured)
        alarms += [name] if alarm else []
        print(textwrap.fill(f"{'ALARM' if alarm else 'ok':<7}{name}: {text}", 80, subsequent_indent=" " * 7))
    print(f"\n{len(alarms)} alarm{'' if len(alarms) == 1 else 's'}" + (": " if alarms else "") + ", ".join(alarms))
    return 1 if alarms else 0


# ----------------------------------------------------------------------------------------------------------------------
# ask

@dataclass(kw_only=True)
class Talk(GateOptions):
    max_new_tokens: int = 200
    """Most tokens in a reply."""
    temperature: float = 0.0
    """Temperature of sampling. 0 takes the most probable token every time."""
    top_p: float = 1.0
    """Sample from the smallest set of tokens whose probabilities sum to this."""


@dataclass(kw_only=True)
class Ask(Talk):
    queries: list[str] = field(default_factory=list)
    """What to ask. Several queries are answered one after the other."""
    file: str | None = None
    """Read the queries from a file: .txt (one a line), .jsonl (query, perhaps id and history) or .csv."""
    json: bool = False
    """Print only JSON, one object a line: id, query, gate, base and reply."""


def check_text(query):
    """UserError for an empty query, or one that is not text."""
    if not query.strip():
        raise UserError("an empty query: say what to ask")
    if any("\ud800" <= char <= "\udfff" for char in query):  # Python's way to keep bytes that it cannot decode
        raise UserError("the query is not UTF-8 text: check the terminal's encoding")


def printable(text):
    """Returns a model's text without control characters, which could change the terminal's state."""
    return "".join(c for c in text if c.isprintable() or c in "\n\t")


def ask(args):
    """Answers queries as the base and as PersonaFuse, and shows the gate as bars."""
    if bool(args.queries) == bool(args.file):
        raise UserError("ask needs queries, as words or with --file FILE" + (" and not both" if args.file else ""))
    for query in args.queries:
        check_text(query)
    records = read_queries(args.file)[0] if args.file else [
        {"id": str(i), "query": query} for i, query in enumerate(args.queries)]
    run = LoadedRun(args)
    gate = gate_from_options(run, args)
    gates = run.gates(records) if gate is None else gate.expand(len(records), -1)

    def reply_to(record, gate):
        return generate_replies(run.model, run.chat, [record], gate, args.max_new_tokens, temperature=args.temperature,
                                top_p=args.top_p, generator=torch.Generator().manual_seed(args.seed))[0]

    for record, gate in zip(records, gates):
        base, reply = reply_to(record, None), reply_to(record, gate[None])
        if args.json:
            print(json.dumps({"id": record["id"], "query": record["query"], "gate": dict(zip(EXPERTS, gate.tolist())),
                              "base": base, "reply": reply}, ensure_ascii=False), flush=True)
        else:
            print(f"\n{record['query']}\n\n{format_gate(gate)}\n\nbase:        {printable(base)}\n\n"
                  f"PersonaFuse: {printable(reply)}", flush=True)


# ----------------------------------------------------------------------------------------------------------------------
# chat

HELP = """/persona O+,E-:0.5  set the gate yourself
/router             let the router set the gate again
/base               answer the last message again without experts, beside the conversation
/reset              forget the conversation
/save FILE.jsonl    save the conversation as queries
/help               show this list
/quit               end, as Ctrl-D does"""


def as_record(query, turns):
    """Returns a message after earlier turns as a record: its query, and the history if there is one."""
    history = [{"role": role, "content": turn[key]} for turn in turns
               for role, key in (("user", "query"), ("assistant", "response"))]
    return {"query": query} | ({"history": history} if history else {})


class Conversation:
    """A chat in the terminal. The router reads the conversation at every turn and chooses a new gate.

    Cached keys and values belong to the gate that they were computed under. So nothing is kept from turn to turn: the
    base reads the whole conversation again.
    """

    def __init__(self, run, args):
        self.run, self.args, self.turns = run, args, []
        self.fixed_gate = gate_from_options(run, args)  # None: the router's
        self.generator = torch.Generator().manual_seed(args.seed)
        run.model  # load now, not at the first message
        if self.fixed_gate is None:
            run.router

    def stream(self, record, gate):
        """Print a reply while it is generated, and return it. Ctrl-C ends it early."""
        chat, ids, shown = self.run.chat, [], 0

        def print_new_text(_, token):
            nonlocal shown
            ids.append(token)
            text = chat.text(ids)
            if not text.endswith("\ufffd"):  # otherwise the bytes of the last character are not complete yet
                print(printable(text[shown:]), end="", flush=True)
                shown = len(text)

        try:
            generate(self.run.model, [chat.prompt(messages_of(record))], gate, self.args.max_new_tokens,
                     self.args.temperature, self.args.top_p, chat.stops, self.generator, print_new_text)
        except KeyboardInterrupt:
            print(" [stopped]", end="")
        text = chat.text(ids)
        print(printable(text[shown:]) + "\n")
        return text

    def reply(self, query):
        """Choose the gate, print it in one line, and answer."""
        check_text(query)
        record, gate = as_record(query, self.turns), self.fixed_gate
        if gate is None:
            gate = self.run.gates([record | {"id": "0"}])
        weights, chosen_by = gate[0].tolist(), "router" if self.fixed_gate is None else "by hand"
        shown = " ".join(name + f"{weight:.2f}".lstrip("0") for name, weight in zip(SHORT_NAMES, weights))
        print(f"{chosen_by}  {shown}\n", flush=True)
        text = self.stream(record, gate)
        self.turns.append({"query": query, "response": text, "gate": dict(zip(EXPERTS, weights))})

    def command(self, line):
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        if name == "/persona" and rest:
            self.fixed_gate = persona_gate(rest, self.run.setup.tau)[None]
        elif name == "/router":
            self.run.router  # without a router this is an error, and the gate stays
            self.fixed_gate = None
        elif name == "/base":
            if not self.turns:
                raise UserError("/base answers the last message again, and there is none yet")
            print("base\n")
            self.stream(as_record(self.turns[-1]["query"], self.turns[:-1]), None)
        elif name == "/reset":
            self.turns = []
        elif name == "/save" and rest:
            self.save(Path(rest))
        elif name == "/help":
            print(HELP + "\n")
        else:
            raise UserError(f"{name} is not a command, or lacks its argument; /help lists the commands. Put a space "
                            "before a message that begins with /")

    def save(self, path):
        if not self.turns:
            raise UserError("the conversation is empty: there is nothing to save")
        if path.exists():
            raise UserError(f"{path} exists already: give another name")
        if path.suffix != ".jsonl":
            raise UserError(f"{path}: expected a file name that ends in .jsonl")
        write_records(path, [{"id": str(i)} | as_record(turn["query"], self.turns[:i]) | turn
                             for i, turn in enumerate(self.turns)])
        print(f"{path}: {len(self.turns)} turns\n")


def chat(args):
    """Holds a conversation in the terminal. The router chooses a new gate at every turn; /help lists the commands."""
    conversation = Conversation(LoadedRun(args), args)
    if sys.stdin.isatty():
        if readline is not None:
            readline.set_auto_history(True)  # arrow keys edit the line and recall earlier ones
        print(f"{conversation.run.setup.run}: /help lists the commands, Ctrl-D ends\n")
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
            if line.strip() == "/quit":
                return
            if line.startswith("/"):
                conversation.command(line)
            elif line.strip():
                conversation.reply(line.strip())
        except EOFError:
            return
        except UnicodeDecodeError:
            print("not UTF-8 text: check the terminal's encoding\n", file=sys.stderr)
        except UserError as error:  # print it and go on: the conversation would be lost
            print(f"{error}\n", file=sys.stderr)


# ----------------------------------------------------------------------------------------------------------------------
# export

@dataclass(kw_only=True)
class Export(GateOptions):
    as_: typing.Literal["experts", "mixture", "merged"] = "experts"
    """experts: ten PEFT adapters. mixture: one PEFT adapter of ten times the rank, equal to the mixture under one
    gate. merged: a whole model folder with the mixture under one gate in its weights."""
    out: str | None = None
    """Folder to write."""
    query: str | None = None
    """Take the router's gate for this query."""
    shard_gb: float = 5.0
    """With merged: largest size of a file, in gigabytes."""


def export(args):
    """Writes the run for other software: PEFT adapters, or a model folder for transformers, vLLM or llama.cpp."""
    given = [f"--{key}" for key in ("gate", "persona", "query") if getattr(args, key)]
    if len(given) != (0 if args.as_ == "experts" else 1):
        expected = "no gate" if args.as_ == "experts" else "one gate, by --gate, --persona or --query"
        raise UserError(f"--as {args.as_} takes {expected}; found {' and '.join(given) or 'none'}")
    if not args.out:
        raise UserError("--out is missing: where should the export go?")
    out = Path(args.out)
    if out.exists():
        raise UserError(f"{out} exists already: give another name, or remove it")
    run = LoadedRun(args)
    if args.as_ == "merged" and not args.dtype:
        run.setup.dtype = stored_dtype(run.setup.base)  # the exported weights are rounded as the base's are
    gate = gate_from_options(run, args)
    if args.query:
        check_text(args.query)
        gate = run.gates([{"id": "0", "query": args.query}])

    if args.as_ == "experts":
        with atomic(out) as part:
            save_experts(run.model, part, run.setup.base)
    elif args.as_ == "mixture":
        export_mixture(run.model, gate, out, run.setup.base)
    else:
        write_merged(run.model, gate, run.setup.base, out, shard_bytes=args.shard_gb * 1e9)
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    print(f"{out}: {args.as_}, {size / 1e6:,.0f} MB"
          + ("" if gate is None else f", for the gate\n{format_gate(gate[0])}"))


# ----------------------------------------------------------------------------------------------------------------------
# The command line

COMMANDS = {
    "routing": (Routing, routing), "ablate": (Ablate, ablate), "health": (Health, health), "ask": (Ask, ask),
    "chat": (Talk, chat), "export": (Export, export), "bench": (Bench, bench), "experiment": (Experiment, experiment),
    "plot": (Plot, plot), "inventory": (Inventory, inventory)}


def main(argv=None):
    parser = Parser(description=for_users(__doc__), formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser, metavar="COMMAND")
    for name, (options, function) in COMMANDS.items():
        add_fields(commands.add_parser(name, help=function.__doc__, description=function.__doc__, allow_abbrev=False),
                   options)
    values = vars(parser.parse_args(argv))
    options, function = COMMANDS[values.pop("command")]
    return function(check_numbers(options(**values)))


if __name__ == "__main__":
    run_command(main)
