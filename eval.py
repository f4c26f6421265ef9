"""Everything that measures: how the router routes, what the gate is worth, and what the models say.

    python eval.py routing --run runs/tiny                   # does the router find the poles that a query calls for?
    python eval.py ablate --run runs/tiny                    # held-out loss under seven gate rules; each expert alone
    python eval.py ask --run runs/tiny "My boss is furious"  # gate, the base's reply, PersonaFuse's reply
    python eval.py ask --run runs/tiny --persona O+,E-:0.5 "My boss is furious"

Test records are split, where the data allow it, into domains that training has seen and domains held out entirely.
Intervals are paired bootstraps over records, 95 %: the same records under both gates.
"""
import argparse
import math
import typing
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from lora import EXPERTS
from model import Chat, UserError, load_tokenizer, read_json
from router import RULES, bars, gate_report, gates_under, persona_gate
from synth import Parser, add_fields, check_numbers, run_command, signatures
from train import Setup, answer, examples, heldout, pick_device, pick_dtype, similarities

SHORT = [f"{e.split('_')[1][0].upper()}{'+' if e.startswith('high') else '-'}" for e in EXPERTS]  # O+ O- C+ C- …


# ----------------------------------------------------------------------------------------------------------------------
# What all commands share

@dataclass(kw_only=True)
class Common:
    run: str = "runs/paper"
    """Run folder that train.py made."""
    stage: typing.Literal["warmup", "joint"] | None = None
    """Which experts: warmup (with the router stage's router) or joint (with its own); the latest if not given."""
    data: str | None = None
    """Other records than the run's: a .jsonl file or a folder, as for train.py."""
    base: str | None = None
    """The base's model folder, if it has moved."""
    encoder: str | None = None
    """The encoder's model folder, if it has moved."""
    device: str | None = None
    """cpu, cuda or cuda:N; a GPU if there is one."""
    dtype: typing.Literal["float32", "bfloat16"] | None = None
    """Of the base: bfloat16 on a GPU, float32 on a CPU."""
    seed: int = 0
    """Of random and shuffled gates, bootstraps and sampling."""
    tau: float | None = None
    """τ of the gate; that of the joint stage, else 1.0, if not given."""
    tokens: int = 4096
    """Most tokens in a batch, padding included."""


class Measured:
    """A run opened for measuring: its Setup, and of models and data what a command asks for, when it does."""

    def __init__(self, args):
        run = Path(args.run)
        if not (run / "config.json").exists():
            raise UserError(f"{run}: no config.json, so there is no run here; python train.py --preset tiny makes one")
        found, self.args = read_json(run / "config.json"), args
        own = found["setup"] | {k: getattr(args, k) or Setup.inside(found["setup"][k], run)
                                for k in ("base", "encoder", "data")}
        device = pick_device(args.device)
        self.setup = Setup(
            run=run, device=device, dtype=pick_dtype(args.dtype, device), tokens=args.tokens,
            tau=args.tau or found["stages"].get("joint", {}).get("tau", 1.0), eval_records=0, **own)

    def folder(self, part):
        """Where the "experts" or the "router" to measure are. UserError if they are not trained yet."""
        first = "warmup" if part == "experts" else "router"
        stage = {None: None, "warmup": first, "joint": "joint"}[self.args.stage]
        folder = self.setup.run / stage / part if stage else self.setup.stage_folder(part)
        if folder is None or not folder.is_dir():
            raise UserError(f"{self.setup.run} has no {part} of stage {stage or first} yet: python train.py "
                            f"--preset {self.setup.preset} --stage {stage or first} --run {self.setup.run}")
        return folder

    @cached_property
    def model(self):
        return self.setup.load_base(self.folder("experts"))

    @cached_property
    def chat(self):
        self.folder("experts")
        return Chat.from_dir(self.setup.base)

    @cached_property
    def router(self):
        return self.setup.load_router(self.folder("router"))

    def rows(self, records):
        """Records as rows for the router alone."""
        self.folder("router")
        return examples(records, tokenizer=load_tokenizer(self.setup.encoder))[0]

    def test_records(self, need_response=True, limit=None):
        """-> test records, and a mask (N,): True where training has never seen the record's domain."""
        splits = self.setup.load_data(need_response)
        records, known = splits["test"][:limit], {record.get("domain") for record in splits["train"]}
        return records, np.array([record.get("domain") not in known for record in records])


def subsets(new_domain):
    """[(name, row numbers)]: all records, and seen and held-out domains apart where there are both."""
    parts = [("all", np.arange(len(new_domain)))]
    if new_domain.any() and not new_domain.all():
        parts += [("domains seen in training", np.flatnonzero(~new_domain)),
                  ("domains held out", np.flatnonzero(new_domain))]
    return parts


def bootstrap(difference, counts, seed=0, n=2000):
    """Paired bootstrap of a loss difference: per-record nats (N,) and tokens (N,) -> (mean per token, low, high)."""
    rng, size = np.random.default_rng(seed), len(counts)
    drawn = [rng.integers(0, size, size) for _ in range(n)]
    means = [difference[i].sum() / counts[i].sum() for i in drawn]
    return difference.sum() / counts.sum(), *np.percentile(means, (2.5, 97.5))


# ----------------------------------------------------------------------------------------------------------------------
# routing

@dataclass(kw_only=True)
class Routing(Common):
    show: int = 12
    """Queries in the heat map."""


def average_precision(scores, relevant):
    """Mean over the relevant items of the precision at their rank: scores (N,), relevant (N,) of 0/1 -> float, or NaN
    without a relevant one. Ties are broken against us: among equal scores the irrelevant come first."""
    order = np.lexsort((relevant, -scores))
    hits = relevant[order]
    precision = hits.cumsum() / np.arange(1, len(hits) + 1)
    return float((precision * hits).sum() / hits.sum()) if hits.any() else math.nan


def recall_at_k(similarity, active):
    """Mean share of a query's k active poles among the k experts it is most similar to: (N, E), (N, E) -> float."""
    rank = (-similarity).argsort(-1).argsort(-1)
    return float((((rank < active.sum(-1, keepdims=True)) & (active > 0)).sum(-1) / active.sum(-1)).mean())


def heat_map(gates, active, queries, width=40):
    """Gates (N, E) as text, a row a query: darker is more, relative to the largest; [ ] marks the labels' poles."""
    top, lines = gates.max(), [" " * (width + 1) + "".join(f" {name} " for name in SHORT)]
    for gate, poles, query in zip(gates, active, queries):
        cells = "".join(f"[{'·░▒▓█'[round(4 * w / top)] * 2}]" if p else f" {'·░▒▓█'[round(4 * w / top)] * 2} "
                        for w, p in zip(gate, poles))
        text = " ".join(query.split())
        lines.append(f"{text[:width - 1] + '…' if len(text) > width else text:<{width}} {cells}")
    return "\n".join(lines)


def routing(args):
    """Per-expert average precision, recall at |P|, entropy and top-1 mass, and a heat map queries × experts."""
    run = Measured(args)
    records, new_domain = run.test_records(need_response=False)
    rows = run.rows(records)
    active = torch.stack([row.active for row in rows])
    similarity = similarities(run.router, rows, args.tokens)
    gates, stage = gates_under("learned", active, similarity, run.setup.tau), run.folder("router").parent.name
    active, similarity = active.numpy(), similarity.numpy()
    for name, part in subsets(new_domain):
        a, s = active[part], similarity[part]
        scores = [average_precision(s[:, e], a[:, e]) for e in range(len(EXPERTS))]
        report = gate_report(gates[part])
        print(f"\n{len(part)} test queries, {name}; router after {stage}, tau {run.setup.tau:g}\n\n"
              f"  {'expert':<24}{'queries':>8}{'AP':>8}{'by chance':>11}{'usage':>8}")
        for e, expert in enumerate(EXPERTS):
            print(f"  {expert:<24}{int(a[:, e].sum()):>8}{scores[e]:>8.3f}{a[:, e].mean():>11.3f}"
                  f"{report['usage'][e]:>8.3f}")
        print(f"  {'mean':<24}{len(part):>8}{np.nanmean(scores):>8.3f}{a.mean():>11.3f}")
        print(f"\n  recall at |P| {recall_at_k(s, a):.3f}   entropy {report['entropy']:.3f} of at most "
              f"{math.log(len(EXPERTS)):.3f}   top-1 mass {report['top1']:.3f}")
    print("\nGates, darker is more; [ ] marks the poles that the labels call for\n\n"
          + heat_map(gates[:args.show].numpy(), active[:args.show], [r["query"] for r in records]))


# ----------------------------------------------------------------------------------------------------------------------
# ablate

@dataclass(kw_only=True)
class Ablate(Common):
    records: int | None = None
    """How many test records; all if not given."""
    control: str | None = None
    """Run folder of the fair control (train.py --joint-gate uniform), to compare with."""
    replies: int = 10
    """Replies that each expert writes to count its signature in; 0 leaves that out."""


def ablate(args):
    """Held-out loss under each gate rule, with intervals against the learned gate; and what each expert alone is
    worth on records of each pole."""
    run = Measured(args)
    records, new_domain = run.test_records(limit=args.records)
    rows, _ = examples(records, run.chat)
    active = torch.stack([row.active for row in rows])
    similarity = similarities(run.router, run.rows(records), args.tokens)
    stage = run.folder("experts").parent.name
    nats = {}
    for rule in RULES:
        gates = gates_under(rule, active, similarity, run.setup.tau, args.seed)
        nats[rule], counts = heldout(run.model, rows, gates, args.tokens)
    if args.control:
        control = Measured(replace(args, run=args.control, stage="joint"))
        nats["control"], _ = heldout(control.model, rows, gates_under("uniform", active), args.tokens)
    for name, part in subsets(new_domain):
        print(f"\nHeld-out loss, {len(part)} records, {counts[part].sum():.0f} reply tokens, {name}; experts after "
              f"{stage}, tau {run.setup.tau:g}\n\n  {'gate':<10}{'nats/token':>10}   {'against learned, 95 %':<30} "
              "what the gate is")
        for rule, found in nats.items():
            mean, low, high = bootstrap((found - nats["learned"])[part], counts[part], args.seed)
            against = "" if rule == "learned" else f"{mean:+.4f} [{low:+.4f}, {high:+.4f}]"
            print(f"  {rule:<10}{found[part].sum() / counts[part].sum():>10.4f}   {against:<30} "
                  f"{RULES.get(rule, 'trained and used with a uniform gate')}")
    expert_table(Measured(replace(args, stage="warmup")), args)


def expert_table(run, args):
    """The 10 × 10 table: warm-up expert e alone on records whose one pole is p; and how often each expert's replies
    carry the signature of its pole (template teacher's data)."""
    records, _ = run.test_records(limit=args.records)
    records = [record for record in records if sum(map(abs, record["traits"].values())) == 1]
    if not records:
        print("\nNo test record has exactly one active pole, so there is no table of experts and poles")
        return
    rows, _ = examples(records, run.chat)
    poles, table = np.array([int(row.active.argmax()) for row in rows]), np.full((len(EXPERTS),) * 2, math.nan)
    for e in range(len(EXPERTS)):
        nats, counts = heldout(run.model, rows, one_hot(e).expand(len(rows), -1), args.tokens)
        for p in set(poles):
            table[e, p] = nats[poles == p].sum() / counts[poles == p].sum()
    best = [p for p in set(poles) if np.nanargmin(table[:, p]) == p]
    print(f"\nWarm-up expert (row) alone on the {len(rows)} records that call for one pole (column), nats/token; * is\n"
          "the best of a column\n\n  " + " " * 22 + "".join(f"{name:>7}" for name in SHORT))
    for e, expert in enumerate(EXPERTS):
        print(f"  {expert:<22}" + "".join(
            f"{table[e, p]:>6.2f}" + ("*" if p in set(poles) and np.nanargmin(table[:, p]) == e else " ")
            for p in range(len(EXPERTS))))
    print(f"\n  lowest on the diagonal: {len(best)} of {len(set(poles))} poles")
    if not args.replies or not any("manner" in record for record in records):
        return
    print(f"\nShare of {args.replies} replies with the pole's signature\n\n  {'pole':<22}{'base':>7}{'expert':>8}")
    for e in sorted(set(poles)):
        asked = [r for r, p in zip(records, poles) if p == e][:args.replies]
        shares = [np.mean([signatures(text)[e] for text in answer(run.model, run.chat, asked, gate)])
                  for gate in (None, one_hot(e))]
        print(f"  {EXPERTS[e]:<22}{shares[0]:>7.2f}{shares[1]:>8.2f}")


def one_hot(expert):
    """(1, E) with all the weight on one expert."""
    return torch.eye(len(EXPERTS))[expert:expert + 1]


# ----------------------------------------------------------------------------------------------------------------------
# ask

@dataclass(kw_only=True)
class Ask(Common):
    queries: list[str]
    """What to ask; several are answered in turn."""
    persona: str | None = None
    """Set the gate by hand, through the same softmax: O+,E-:0.5 is open, and half as strongly introverted."""
    gate: str | None = None
    """Set raw weights: ten numbers with commas between, or names as in high_openness:0.7,low_neuroticism:0.3."""
    max_new_tokens: int = 200
    """Longest reply."""
    temperature: float = 0.0
    """Of sampling; 0 takes the most probable token every time."""
    top_p: float = 1.0
    """Sample from the smallest set of tokens with this much probability."""


def raw_gate(text):
    """`--gate` -> (1, E). UserError unless it is ten weights, or names with weights, from 0 up that sum to 1."""
    parts = [part.strip() for part in text.split(",")]
    named = dict(part.partition(":")[::2] for part in parts)
    try:
        if set(named) <= set(EXPERTS) and len(named) == len(parts):
            weights = [float(named[e] or 1) if e in named else 0.0 for e in EXPERTS]
        else:
            weights = [float(part) for part in parts]
    except ValueError:
        weights = []
    if len(weights) != len(EXPERTS) or not all(0 <= w <= 1 for w in weights) or abs(sum(weights) - 1) > 1e-3:
        raise UserError(f"--gate {text!r}: expected ten weights from 0 up that sum to 1, in the order "
                        f"{', '.join(EXPERTS)}, or some of these names with weights, such as high_openness:0.7,"
                        "low_neuroticism:0.3")
    return torch.tensor([weights])


def ask(args):
    """The gate as bars, the base's reply and PersonaFuse's reply to each query."""
    if args.persona and args.gate:
        raise UserError("--persona and --gate both set the gate: choose one")
    if not all(query.strip() for query in args.queries):
        raise UserError("an empty query: say what to ask")
    if any("\ud800" <= char <= "\udfff" for query in args.queries for char in query):
        raise UserError("the query is not UTF-8 text: check the terminal's encoding")  # how Python shows stray bytes
    run, records = Measured(args), [{"id": i, "query": query, "traits": {}} for i, query in enumerate(args.queries)]
    if args.gate:
        gates = raw_gate(args.gate).expand(len(records), -1)
        if gates.max() > 0.999 and run.folder("experts").parent.name == "joint":
            print("note: joint training has made the experts used to working together, and one alone is far from what\n"
                  "they were trained for; --stage warmup has experts that were trained alone")
    elif args.persona:
        gates = persona_gate(args.persona, run.setup.tau).expand(len(records), -1)
    else:
        rows = run.rows(records)
        active = torch.stack([row.active for row in rows])
        gates = gates_under("learned", active, similarities(run.router, rows, args.tokens), run.setup.tau)
    for i, record in enumerate(records):
        sampling = {"temperature": args.temperature, "top_p": args.top_p, "max_new_tokens": args.max_new_tokens}
        replies = [answer(run.model, run.chat, [record], gate, generator=torch.Generator().manual_seed(args.seed),
                          **sampling)[0] for gate in (None, gates[i:i + 1])]
        print(f"\n{record['query']}\n\n{bars(gates[i])}\n\nbase:        {replies[0]}\n\nPersonaFuse: {replies[1]}")


# ----------------------------------------------------------------------------------------------------------------------
# The command line

COMMANDS = {"routing": (Routing, routing), "ablate": (Ablate, ablate), "ask": (Ask, ask)}


def main(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser, metavar="COMMAND")
    for name, (cls, function) in COMMANDS.items():
        add_fields(commands.add_parser(name, help=function.__doc__, description=function.__doc__, allow_abbrev=False),
                   cls)
    values = vars(parser.parse_args(argv))
    cls, function = COMMANDS[values.pop("command")]
    function(check_numbers(cls(**values)))


if __name__ == "__main__":
    run_command(main)
