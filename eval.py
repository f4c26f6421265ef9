"""Everything that measures and uses a run: how the router routes, what the gate is worth, what the models say.

    python eval.py routing --run runs/tiny                   # does the router find the poles that a query calls for?
    python eval.py ablate --run runs/tiny                    # held-out loss under seven gate rules; each expert alone
    python eval.py experiment routing --run runs/tiny        # also: temperature, rank, domain, stages, baselines
    python eval.py bench emobench --data DIR --run runs/tiny # a public benchmark: base, PersonaFuse, the difference
    python eval.py ask --run runs/tiny "My boss is furious"  # also: chat, export, health, plot, inventory

Test records are split, where the data allow it, into domains that training has seen and domains held out entirely.
Intervals are paired bootstraps over records, 95 %: the same records under both gates.
"""
import argparse
import json
import math
import shutil
import sys
import textwrap
import typing
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from safetensors.torch import save_file
import torch

from lora import EXPERTS, SHORT_NAMES, export_mixture, merged_tensors, save_experts
from model import generate
from router import GATE_RULES, format_gate, gate_statistics, gates_for_rule, persona_gate, query_ids, softmax_gate
from support.bench import Bench, bench
from support.chat import encode, load_tokenizer
from support.command import Parser, add_fields, check_numbers, for_users, run_command
from support.experiments import Experiment, experiment
from support.files import UserError, atomic, open_safetensors, read_json, weight_files
from support.inventory import Inventory, inventory
from support.measure import (GateOptions, LoadedRun, RecordOptions, bootstrap, gate_from_options, load_cases, losses, one_hot_gate, pole_losses,
                             domain_subsets, update_gram)
from support.plots import Plot, plot
from support.records import load_data, messages_of, read_queries, write_records
from support.rows import Row, make_rows
from synth import signatures
from train import generate_replies, evaluation_loss, score_queries

try:
    import readline
except ImportError:  # Windows
    readline = None


# ----------------------------------------------------------------------------------------------------------------------
# routing

@dataclass(kw_only=True)
class Routing(RecordOptions):
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
    top, lines = gates.max(), [" " * (width + 1) + "".join(f" {name} " for name in SHORT_NAMES)]
    for gate, poles, query in zip(gates, active, queries):
        cells = "".join(f"[{'·░▒▓█'[round(4 * w / top)] * 2}]" if p else f" {'·░▒▓█'[round(4 * w / top)] * 2} "
                        for w, p in zip(gate, poles))
        text = " ".join(query.split())
        lines.append(f"{text[:width - 1] + '…' if len(text) > width else text:<{width}} {cells}")
    return "\n".join(lines)


def routing(args):
    """Per-expert average precision, recall at |P|, entropy and top-1 mass, and a heat map queries × experts."""
    run = LoadedRun(args)
    records, new_domain = run.records(need_response=False)
    rows = run.rows(records)
    active = torch.stack([row.active for row in rows])
    similarity = score_queries(run.router, rows, args.tokens)
    gates, stage = gates_for_rule("learned", active, similarity, run.setup.tau), run.folder("router").parent.name
    active, similarity = active.numpy(), similarity.numpy()
    for name, part in domain_subsets(new_domain):
        a, s = active[part], similarity[part]
        scores = [average_precision(s[:, e], a[:, e]) for e in range(len(EXPERTS))]
        report = gate_statistics(gates[part])
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
class Ablate(RecordOptions):
    records: int | None = None
    """How many test records; all if not given."""
    control: str | None = None
    """Run folder of the fair control (train.py --joint-gate uniform), to compare with."""
    replies: int = 10
    """Replies that each expert writes to count its signature in; 0 leaves that out."""


def ablate(args):
    """Held-out loss under each gate rule, with intervals against the learned gate; and what each expert alone is
    worth on records of each pole."""
    run = LoadedRun(args)
    records, new_domain = run.records(limit=args.records)
    rows, _ = make_rows(records, run.chat)
    active = torch.stack([row.active for row in rows])
    similarity = score_queries(run.router, run.rows(records), args.tokens)
    stage = run.folder("experts").parent.name
    nats = {}
    for rule in GATE_RULES:
        gates = gates_for_rule(rule, active, similarity, run.setup.tau, args.seed)
        nats[rule], counts = evaluation_loss(run.model, rows, gates, args.tokens)
    if args.control:
        control = LoadedRun(replace(args, run=args.control, stage="joint"))
        nats["control"], _ = evaluation_loss(control.model, rows, gates_for_rule("uniform", active), args.tokens)
    for name, part in domain_subsets(new_domain):
        print(f"\nHeld-out loss, {len(part)} records, {counts[part].sum():.0f} reply tokens, {name}; experts after "
              f"{stage}, tau {run.setup.tau:g}\n\n  {'gate':<10}{'nats/token':>10}   {'against learned, 95 %':<30} "
              "what the gate is")
        for rule, found in nats.items():
            mean, low, high = bootstrap((found - nats["learned"])[part], counts[part], args.seed)
            against = "" if rule == "learned" else f"{mean:+.4f} [{low:+.4f}, {high:+.4f}]"
            print(f"  {rule:<10}{found[part].sum() / counts[part].sum():>10.4f}   {against:<30} "
                  f"{GATE_RULES.get(rule, 'trained and used with a uniform gate')}")
    expert_table(LoadedRun(replace(args, stage="warmup")), args)


def expert_table(run, args):
    """The 10 × 10 table: warm-up expert e alone on records whose one pole is p; and how often each expert's replies
    carry the signature of its pole (template teacher's data)."""
    records, poles, table = pole_losses(run, args)
    if not records:
        print("\nNo test record has exactly one active pole, so there is no table of experts and poles")
        return
    best = [p for p in set(poles) if np.nanargmin(table[:, p]) == p]
    print(f"\nWarm-up expert (row) alone on the {len(records)} records that call for one pole (column), nats/token; * "
          "is\nthe best of a column\n\n  " + " " * 22 + "".join(f"{name:>7}" for name in SHORT_NAMES))
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
        shares = [np.mean([signatures(text)[e] for text in generate_replies(run.model, run.chat, asked, gate)])
                  for gate in (None, one_hot_gate(e))]
        print(f"  {EXPERTS[e]:<22}{shares[0]:>7.2f}{shares[1]:>8.2f}")


# ----------------------------------------------------------------------------------------------------------------------
# health

@dataclass(kw_only=True)
class Health(RecordOptions):
    text: str | None = None
    """File of plain text, blank lines between its pieces, to see general ability on; the test queries, and the neutral
    replies of the template teacher's records, if not given."""
    records: int | None = None
    """How many test records; all if not given."""


def plain_rows(run, texts):
    """Texts as rows in which all but the first token counts: nobody asks, nobody is in a manner."""
    tokenizer, bos = load_tokenizer(run.setup.encoder), [] if run.chat.bos is None else [run.chat.bos]
    return [Row(str(i), torch.zeros(len(EXPERTS)), np.array([*bos, *encode(
        run.chat.tokenizer, text), run.chat.end][:run.args.tokens], dtype=np.int32), 1,
        np.array(query_ids(tokenizer, text), dtype=np.int32)) for i, text in enumerate(texts)]


def health(args):
    """Failure signatures, in words and figures; exit status 1 when one holds. The first three are the source's."""
    run, alarms = LoadedRun(args), []
    c, (splits, zero) = load_cases(run, limit=args.records), load_data(run.setup.data, run.setup.seed)
    similarity, tau, uniform = score_queries(run.router, c.rows, args.tokens), run.setup.tau, math.log(len(EXPERTS))
    gates = softmax_gate(similarity, tau)
    print(f"{args.run}: experts after {run.folder('experts').parent.name}, tau {tau:g}, {len(c.rows)} test records\n")

    def check(name, holds, text):
        alarms.extend([name] * bool(holds))
        print(textwrap.fill(f"{'ALARM' if holds else 'ok':<7}{name}: {text}", 80, subsequent_indent=" " * 7))

    nats = losses(run, c, ("learned", "random", "shuffled"), seed=args.seed)
    worth = {rule: bootstrap(nats[rule] - nats["learned"], c.counts, args.seed) for rule in ("random", "shuffled")}
    check("router", any(low <= 0 for _, low, _ in worth.values()),
          "against its gates, " + ", ".join(f"{rule} ones lose {mean:.4f} [{low:.4f}, {high:.4f}]"
                                            for rule, (mean, low, high) in worth.items())
          + " nats/token; an interval that reaches 0 is a router no better than chance")

    texts = [text for record in c.records for text in (record["query"], record.get("neutral")) if text]
    if args.text:
        try:
            texts = [text for text in Path(args.text).read_text(encoding="utf-8").split("\n\n") if text.strip()]
        except (OSError, ValueError) as error:
            raise UserError(f"{args.text}: {error}") from None
    rows = plain_rows(run, texts)
    base, counts = evaluation_loss(run.model, rows, None, args.tokens)
    mixed, _ = evaluation_loss(run.model, rows, softmax_gate(score_queries(run.router, rows, args.tokens), tau), args.tokens)
    mean, low, high = (x / (base.sum() / counts.sum()) for x in bootstrap(mixed - base, counts, args.seed))
    check("general ability", low > 0.1, f"the mixture's loss on plain text is {mean:+.1%} [{low:+.1%}, {high:+.1%}] of "
          f"the base's {base.sum() / counts.sum():.3f} nats/token; an interval above a tenth is too much")

    total = sum(map(len, splits.values())) + zero
    check("all-zero vectors", zero, f"{zero} of {total} records have no active trait; they are not trained on")

    gram, usage = update_gram(run.model), gates.mean(0)
    size, first = gram.diagonal().sqrt(), torch.bincount(similarity.argmax(-1), minlength=len(EXPERTS)) / len(gates)
    dead = [name for name, share, updated in zip(EXPERTS, torch.minimum(usage, first), size / size.max())
            if share < 0.1 / len(EXPERTS) or updated < 0.01]
    check("dead experts", dead, f"{', '.join(dead) or 'none'}; lowest mean weight {usage.min():.3f}, lowest share of "
          f"first choices {first.min():.3f}, smallest update {size.min() / size.max():.2f} of the largest (dead: 0.01)")

    entropy = gate_statistics(gates)["entropy"]
    check("collapsed gate", not 0.01 < entropy / uniform < 0.99, f"entropy {entropy:.3f} nats; within 1 % of 0 it is "
          f"one expert, within 1 % of {uniform:.3f} all alike")

    alone = [i for i, a in enumerate(c.active) if a.sum() == 1]
    rows, poles = [c.rows[i] for i in alone], c.active[alone].argmax(-1)
    gain = np.full(len(EXPERTS), math.nan)
    if alone:
        gains = (evaluation_loss(run.model, rows, torch.eye(len(EXPERTS))[poles], args.tokens)[0]
                 - evaluation_loss(run.model, rows, None, args.tokens)[0])
        for p in set(poles.tolist()):
            gain[p] = gains[poles == p].sum() / c.counts[alone][poles == p].sum()
    lost = [EXPERTS[e] for e in np.flatnonzero(gain > 0)]
    check("experts that only work together", lost, (", ".join(lost) or "none") + "; one alone on its pole's records "
          f"against the base, nats/token: best {np.nanmin(gain):+.3f}, worst {np.nanmax(gain):+.3f}" if alone else
          "not seen: no test record calls for one pole alone")

    cosines = gram / size.outer(size).clamp(min=1e-30) - 2 * torch.eye(len(EXPERTS))
    a, b = divmod(int(cosines.argmax()), len(EXPERTS))
    check("copies", cosines.max() > 0.9, f"the updates most alike are those of {EXPERTS[a]} and {EXPERTS[b]}, cosine "
          f"{cosines.max():.2f}; above 0.90 they are copies")
    print(f"\n{len(alarms)} alarm{'s' * (len(alarms) != 1)}" + ": " * bool(alarms) + ", ".join(alarms))
    return int(bool(alarms))


# ----------------------------------------------------------------------------------------------------------------------
# What ask and chat share

@dataclass(kw_only=True)
class Talk(GateOptions):
    max_new_tokens: int = 200
    """Longest reply."""
    temperature: float = 0.0
    """Of sampling; 0 takes the most probable token every time."""
    top_p: float = 1.0
    """Sample from the smallest set of tokens with this much probability."""


def check_text(query):
    """UserError for what is no text, or none at all."""
    if not query.strip():
        raise UserError("an empty query: say what to ask")
    if any("\ud800" <= char <= "\udfff" for char in query):  # how Python shows stray bytes
        raise UserError("the query is not UTF-8 text: check the terminal's encoding")


# ----------------------------------------------------------------------------------------------------------------------
# ask

@dataclass(kw_only=True)
class Ask(Talk):
    queries: list[str] = field(default_factory=list)
    """What to ask; several are answered in turn."""
    file: str | None = None
    """Queries from a file instead: .txt (one a line), .jsonl (query, perhaps id and history) or .csv."""
    json: bool = False
    """Print only JSON, one object a line: id, query, gate, base and reply."""


def ask(args):
    """The gate as bars, the base's reply and PersonaFuse's reply to each query."""
    if bool(args.queries) == bool(args.file):
        raise UserError("ask needs queries, as words or with --file FILE" + " and not both" * bool(args.file))
    for query in args.queries:
        check_text(query)
    records = read_queries(args.file)[0] if args.file else [
        {"id": str(i), "query": query} for i, query in enumerate(args.queries)]
    run = LoadedRun(args)
    hand = gate_from_options(run, args)
    gates = run.gates(records) if hand is None else hand.expand(len(records), -1)
    for record, gate in zip(records, gates):
        base, reply = (generate_replies(run.model, run.chat, [record], one, args.max_new_tokens, temperature=args.temperature,
                              top_p=args.top_p, generator=torch.Generator().manual_seed(args.seed))[0]
                       for one in (None, gate[None]))
        if args.json:
            weights = dict(zip(EXPERTS, gate.tolist()))
            print(json.dumps({"id": record["id"], "query": record["query"], "gate": weights, "base": base,
                              "reply": reply}, ensure_ascii=False), flush=True)
        else:
            print(f"\n{record['query']}\n\n{format_gate(gate)}\n\nbase:        {printable(base)}\n\n"
                  f"PersonaFuse: {printable(reply)}", flush=True)


def printable(text):
    """A model's words without what a terminal would take for commands."""
    return "".join(c for c in text if c.isprintable() or c in "\n\t")


# ----------------------------------------------------------------------------------------------------------------------
# chat

HELP = """/persona O+,E-:0.5  set the gate by hand      /router     the router sets it again
/base               the last message's reply without experts, beside the conversation
/reset              begin anew                /save FILE  the conversation, as queries (.jsonl)
/help               this                      /quit       or Ctrl-D"""


class Conversation:
    """Turns of a chat. Each turn has a gate of its own, so what earlier turns left in the cache, made under another
    gate, is of no use: the whole conversation is read again."""

    def __init__(self, run, args):
        self.run, self.args, self.hand, self.turns = run, args, gate_from_options(run, args), []
        self.model, self.chat = run.model, run.chat
        if self.hand is None:
            run.router  # loaded now, and not at the first message
        self.generator = torch.Generator().manual_seed(args.seed)

    def record(self, query, turns):
        history = [{"role": role, "content": turn[key]} for turn in turns
                   for role, key in (("user", "query"), ("assistant", "response"))]
        return {"query": query} | ({"history": history} if history else {})

    def say(self, record, gate):
        """Stream a reply to standard output -> its text. Ctrl-C ends it early."""
        ids, shown = [], 0

        def stream(_, token):
            nonlocal shown
            ids.append(token)
            text = self.chat.text(ids)
            if not text.endswith("\ufffd"):  # else a character of which some bytes are still to come
                print(printable(text[shown:]), end="", flush=True)
                shown = len(text)
        try:
            generate(self.model, [self.chat.prompt(messages_of(record))], gate, self.args.max_new_tokens,
                     self.args.temperature, self.args.top_p, self.chat.stops, self.generator, stream)
        except KeyboardInterrupt:
            print(" [stopped]", end="")
        text = self.chat.text(ids)
        print(printable(text[shown:]) + "\n")
        return text

    def reply(self, query):
        """Route, show the gate in a line, answer."""
        check_text(query)
        record = self.record(query, self.turns)
        gate = self.run.gates([record | {"id": "0"}]) if self.hand is None else self.hand
        weights = " ".join(name + f"{weight:.2f}".lstrip("0") for name, weight in zip(SHORT_NAMES, gate[0].tolist()))
        print(f"{'router' if self.hand is None else 'by hand'}  {weights}\n", flush=True)
        text = self.say(record, gate)
        self.turns.append({"query": query, "response": text, "gate": dict(zip(EXPERTS, gate[0].tolist()))})

    def command(self, line):
        name, _, rest = line.partition(" ")
        if name == "/persona" and rest.strip():
            self.hand = persona_gate(rest.strip(), self.run.setup.tau)[None]
        elif name == "/router":
            self.run.router  # first: where there is none, the gate stays
            self.hand = None
        elif name == "/base":
            if not self.turns:
                raise UserError("/base answers the last message again, and there is none yet")
            print("base\n")
            self.say(self.record(self.turns[-1]["query"], self.turns[:-1]), None)
        elif name == "/reset":
            self.turns = []
        elif name == "/save" and rest.strip():
            self.save(Path(rest.strip()))
        elif name == "/help":
            print(HELP + "\n")
        else:
            raise UserError(f"{line.split()[0]} is not known, or lacks what should follow it; /help lists all. A "
                            "message that begins with / needs a space before it")

    def save(self, path):
        if not self.turns:
            raise UserError("nothing said yet, so nothing to save")
        if path.suffix != ".jsonl" or path.exists():
            raise UserError(f"{path} " + ("is there already: give another name" if path.exists() else
                                          "is no name for a file of queries, expected one that ends in .jsonl"))
        write_records(path, [{"id": str(i)} | self.record(turn["query"], self.turns[:i]) | turn
                             for i, turn in enumerate(self.turns)])
        print(f"{path}: {len(self.turns)} turns\n")


def chat(args):
    """A conversation in the terminal. Each turn is routed anew; /help lists the commands."""
    talk = Conversation(LoadedRun(args), args)
    if sys.stdin.isatty():
        if readline is not None:
            readline.set_auto_history(True)  # and the arrow keys, in input() below
        print(f"{talk.run.setup.run}: /help lists the commands, Ctrl-D ends\n")
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
            if line.strip() == "/quit":
                return
            if line.startswith("/"):
                talk.command(line)
            elif line.strip():
                talk.reply(line.strip())
        except EOFError:
            return
        except UnicodeDecodeError:
            print("not UTF-8 text: check the terminal's encoding\n", file=sys.stderr)
        except UserError as error:  # what was said so far is worth more than an end
            print(f"{error}\n", file=sys.stderr)


# ----------------------------------------------------------------------------------------------------------------------
# export

@dataclass(kw_only=True)
class Export(GateOptions):
    as_: typing.Literal["experts", "mixture", "merged"] = "experts"
    """experts: ten PEFT adapters. mixture: one PEFT adapter of ten times the rank that equals the mixture under one
    gate. merged: a whole model folder with the mixture under one gate in its weights."""
    out: str | None = None
    """The folder to write."""
    query: str | None = None
    """Take the router's gate for this query."""
    shard_gb: float = 5.0
    """merged: most gigabytes of a file."""


def export(args):
    """Write the run for other software: PEFT adapters, or a model folder for transformers, vLLM or llama.cpp."""
    ways = [key for key in ("gate", "persona", "query") if getattr(args, key)]
    if len(ways) != (args.as_ != "experts"):
        raise UserError(f"--as {args.as_} takes " + ("no gate" if args.as_ == "experts" else "one gate, by --gate, "
                        "--persona or --query") + f"; found {' and '.join('--' + way for way in ways) or 'none'}")
    if not args.out:
        raise UserError("--out is missing: where should the export go?")
    out = Path(args.out)
    if out.exists():
        raise UserError(f"{out} is there already: give another name, or remove it")
    run = LoadedRun(args)
    if args.as_ == "merged" and not args.dtype:  # as the base is stored, whatever it is computed in here
        run.setup.dtype = stored_dtype(run.setup.base)
    if args.query:
        check_text(args.query)
    gate = run.gates([{"id": "0", "query": args.query}]) if args.query else gate_from_options(run, args)
    if args.as_ == "experts":
        with atomic(out) as part:
            save_experts(run.model, part, run.setup.base)
    elif args.as_ == "mixture":
        export_mixture(run.model, gate, out, run.setup.base)
    else:
        write_model(run, gate, out, args.shard_gb * 1e9)
    print(f"{out}: {args.as_}, {sum(f.stat().st_size for f in out.rglob('*') if f.is_file()) / 1e6:,.0f} MB"
          + ("" if gate is None else f", for the gate\n{format_gate(gate[0])}"))


def stored_dtype(folder):
    """The dtype of a model folder's first tensor, as safetensors names it -> torch's."""
    file, names = next(iter(weight_files(folder).items()))
    with open_safetensors(file) as tensors:
        kind = tensors.get_slice(names[0] if names else next(iter(tensors.keys()))).get_dtype()
    return {"F32": torch.float32, "F16": torch.float16}.get(kind, torch.bfloat16)


def write_model(run, gate, out, most):
    """A model folder with dense weights for one gate. Tensors are merged as their shard is written: beside the model
    there is never more than one shard in memory."""
    base, total, shards = Path(run.setup.base), 0, [{}]
    for name, tensor in run.model.state_dict().items():
        if not name.endswith((".A", ".B")):
            if shards[-1] and sum(shards[-1].values()) + tensor.nbytes > most:
                shards.append({})
            shards[-1][name] = tensor.nbytes
            total += tensor.nbytes
    files = ["model.safetensors"] if len(shards) == 1 else [
        f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    tensors = merged_tensors(run.model, gate)
    with atomic(out) as part:
        part.mkdir()
        for file, shard in zip(files, shards):
            state = {name: tensor.cpu().contiguous() for name, tensor in (next(tensors) for _ in shard)}
            save_file(state, part / file, metadata={"format": "pt"})
            del state
        if len(shards) > 1:
            where = {name: file for file, shard in zip(files, shards) for name in shard}
            (part / "model.safetensors.index.json").write_text(
                json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=2) + "\n")
        for file in sorted(base.iterdir()):  # tokenizer, chat template, generation settings, licence
            if file.is_file() and (file.suffix in (".json", ".jinja", ".txt", ".model") or "LICENSE" in file.name) \
                    and not file.name.endswith(".index.json"):
                shutil.copyfile(file, part / file.name)
        settings = read_json(base / "config.json") | {"torch_dtype": str(run.setup.dtype).removeprefix("torch.")}
        (part / "config.json").write_text(json.dumps(settings, indent=2) + "\n")


# ----------------------------------------------------------------------------------------------------------------------
# The command line


COMMANDS = {
    "routing": (Routing, routing), "ablate": (Ablate, ablate), "health": (Health, health), "ask": (Ask, ask),
    "chat": (Talk, chat), "export": (Export, export), "bench": (Bench, bench), "experiment": (Experiment, experiment),
    "plot": (Plot, plot), "inventory": (Inventory, inventory)}


def main(argv=None):
    parser = Parser(description=for_users(__doc__), formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser, metavar="COMMAND")
    for name, (cls, function) in COMMANDS.items():
        add_fields(commands.add_parser(name, help=function.__doc__, description=function.__doc__, allow_abbrev=False),
                   cls)
    values = vars(parser.parse_args(argv))
    cls, function = COMMANDS[values.pop("command")]
    return function(check_numbers(cls(**values)))


if __name__ == "__main__":
    run_command(main)
