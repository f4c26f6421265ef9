"""Everything that measures and uses a trained run: how it routes, what its gate is worth, what the models say.

    python eval.py routing --run runs/tiny   # does the router find the poles?
    python eval.py ablate --run runs/tiny    # held-out loss under seven gates
    python eval.py health --run runs/tiny    # signs of a failed training
    python eval.py ask --run runs/tiny "My boss is furious"
    python eval.py chat --run runs/tiny
    python eval.py export --run runs/tiny --as mixture --persona O+ --out DIR
    python eval.py prefer --run runs/tiny --file asked.jsonl --out sheet.csv   # a blind sheet for people to judge
    python eval.py feedback --run runs/tiny  # what a person likes, from /good and /bad of chat
    python eval.py bench emobench --data DIR --run runs/tiny
    python eval.py experiment routing --run runs/tiny   # also: plot, inventory

If some test records come from domains that training never saw, routing and ablate also report seen and held-out domains
separately. If the records name two or more cultures, they report each. Intervals are 95 % confidence intervals from a
paired bootstrap over records: both gates are measured on the same records. routing and ablate draw records that retell
one situation (`of`) together.

What is notable:
- A command is a dataclass of options and a function of them. The table COMMANDS at the end lists all commands.
- bench, experiment, plot, inventory, prefer and feedback are in support/. support/measure.py opens a run and measures
  losses for all.

Shapes: N records, E = 10 experts.
"""
import argparse
import json
import math
import sys
import textwrap
import typing
from dataclasses import dataclass, field
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
from support.export import write_merged
from support.feedback import Feedback, append_feedback, feedback
from support.files import UserError, atomic, shorten
from support.inventory import Inventory, inventory
from support.measure import (LoadedRun, RecordOptions, UserOptions, bootstrap, culture_gap, gate_from_options, load_run,
                             load_split, losses, message_precision, one_hot_gate, one_pole_only, pole_losses,
                             pole_precision, situations, subsets, update_gram)
from support.plots import Plot, plot
from support.prefer import Prefer, prefer
from support.records import load_data, messages_of, queries_to_answer, write_records
from support.rows import Row
from support.tables import format_gate, print_table, printable
from synth import from_templates, signatures
from train import evaluation_loss, generate_replies, score_queries

try:
    import readline  # after this, input() has arrow keys and a history
except ImportError:  # Windows
    readline = None


# ----------------------------------------------------------------------------------------------------------------------
# routing

@dataclass(kw_only=True)
class Routing(RecordOptions):
    show: int = 12
    """Number of queries in the heat map."""


def r_precision(similarity, active):
    """Returns the mean share of a query's k active poles that are among its k most similar experts.

    similarity (N, E), active (N, E) of 0 and 1.
    """
    rank = (-similarity).argsort(-1).argsort(-1)  # 0: the most similar
    n_active = active.sum(-1, keepdims=True)      # (N, 1)
    found = (rank < n_active) & (active > 0)
    return float((found.sum(-1) / active.sum(-1)).mean())


def heat_map(gates, active, queries):
    """Print gates (N, E) as shades relative to the largest weight, one row per query. * marks active poles."""
    shades = np.round(4 * gates / gates.max()).astype(int)
    rows = []
    for query, levels, poles in zip(queries, shades, active):
        cells = ["·░▒▓█"[level] + ("*" if is_active else " ") for level, is_active in zip(levels, poles)]
        rows.append([" ".join(query.split()), *cells])
    print_table(["query", *SHORT_NAMES], rows, "Gates: darker is a larger weight, * marks the poles that the labels "
                "call for", width=80)


def routing(args):
    """Measure how well the router finds the poles that the labels call for: average precision for each expert,
    R-precision, the gate's entropy, and a heat map of queries and experts."""
    run = LoadedRun(args)
    records, new_domain = run.records(need_response=False, limit=args.records)
    rows = run.rows(records)
    active = torch.stack([row.active for row in rows]).numpy()
    similarity = score_queries(run.router, rows, args.tokens)
    gates = softmax_gate(similarity, run.setup.tau)
    words = np.array([len(record["query"].split()) for record in records])
    of_messages, ones = message_precision(similarity.numpy(), active), np.ones(len(records))
    retold, summary, parts = situations(records), [], subsets(new_domain, records)
    for name, part in parts:
        labels = active[part]
        scores = similarity.numpy()[part]
        statistics = gate_statistics(gates[part])
        precision = pole_precision(scores, labels)
        table = [[expert, int(labels[:, e].sum()), float(precision[e]), float(labels[:, e].mean()),
                  statistics["usage"][e]] for e, expert in enumerate(EXPERTS)]
        table.append(["mean", len(part), float(np.nanmean(precision)), float(labels.mean()), ""])
        print_table(["expert", "queries", "AP", "by chance", "usage"], table,
                    f"{len(part)} test queries, {name}; {run.origin('router')}, tau {run.setup.tau:g}")
        print(f"\n  R-precision {r_precision(scores, labels):.3f}   entropy {statistics['entropy']:.3f} of at most "
              f"{math.log(len(EXPERTS)):.3f}   top-1 mass {statistics['top1']:.3f}")
        mean, low, high = bootstrap(of_messages[part], ones[part], args.seed, clusters=retold[part])
        summary.append([name, len(part), float(words[part].mean()), float(np.nanmean(precision)),
                        f"{mean:.3f} [{low:.3f}, {high:.3f}]"])
    print_table(["test queries", "number", "words", "mean AP", "AP of a message, 95 %"], summary,
                "Mean words of a query; mean AP of the experts over the queries; mean AP of the queries over the "
                "experts (1: a query's poles are the most similar ones)")
    if gap := culture_gap(of_messages, ones, records, "AP of a message", args.seed):
        print("\n" + textwrap.fill(gap, 80))
    heat_map(gates[:args.show].numpy(), active[:args.show], [r["query"] for r in records])


# ----------------------------------------------------------------------------------------------------------------------
# ablate

@dataclass(kw_only=True)
class Ablate(RecordOptions):
    control: str | None = None
    """Run folder of the fair control to compare with: joint training under a uniform gate (train.py --joint-gate
    uniform)."""
    replies: int = 10
    """Number of replies to write for each expert, and ten times as many for each gate, in which to look for signatures:
    words that the template teacher uses for one pole and for no other. 0 skips this."""


def ablate(args):
    """Measure the held-out loss under each gate rule, compared with the learned gate, and the loss of each expert alone
    on the records of each pole. On the template teacher's records, also count whose manner the replies show."""
    run = LoadedRun(args)
    test = load_split(run, limit=args.records)
    similarity = score_queries(run.router, test.rows, args.tokens)
    nats = losses(run, test, GATE_RULES, seed=args.seed, similarity=similarity)
    meaning = dict(GATE_RULES)
    shares = signature_table(run, test, similarity, args)
    del run.model  # so that only one base at a time is in memory
    if args.control:
        control = load_run(args, args.control, "joint")
        nats["control"], _ = evaluation_loss(control.model, test.rows, gates_for_rule("uniform", test.active),
                                             args.tokens)
        meaning["control"] = "0.1 for each, in training too"
        del control
    retold = situations(test.records)
    for name, part in subsets(test.new_domain, test.records):
        counts = test.counts[part]
        table = []
        for rule, found in nats.items():
            # (mean, low, high) fill one cell
            interval = bootstrap((found - nats["learned"])[part], counts, args.seed, clusters=retold[part])
            table.append([rule, f"{found[part].sum() / counts.sum():.4f}", "" if rule == "learned" else interval])
        print_table(["gate", "nats/token", "against learned, 95 %"], table,
                    f"Held-out loss, {len(part)} records, {counts.sum():.0f} reply tokens, {name}; "
                    f"{run.origin('experts')}, tau {run.setup.tau:g}")
    if gap := culture_gap(nats["uniform"] - nats["learned"], test.counts, test.records,
                          "What the learned gate saves against a uniform one, nats/token,", args.seed):
        print("\n" + textwrap.fill(gap, 80))
    print("\nThe gates\n")
    for rule in nats:
        print(f"  {rule:<10}{meaning[rule]}")
    if shares:
        print_table(["gate", "called for", "not called for"], shares,
                    f"Share of {min(10 * args.replies, len(test.records))} replies with the signature of a pole that "
                    "the query calls for, and of one that it does not call for")
    if (run.setup.run / "warmup").is_dir():  # the run's own, even where --experts gave others
        expert_table(load_run(args, args.run, "warmup"), args)


def signature_table(run, test, similarity, args):
    """Returns a row for each gate rule: its name, the share of replies with the signature of a pole that the query
    calls for, and the share with the signature of another pole. [] for records without signatures, and for no replies.

    similarity: (N, E), the router's cosines. The first 10 · --replies queries are answered under each rule.
    """
    n, rows = min(10 * args.replies, len(test.records)), []
    if not n or not from_templates(test.records):
        return []
    records, called = test.records[:n], test.active[:n]
    for rule in GATE_RULES:
        gates = gates_for_rule(rule, called, similarity[:n], run.setup.tau, args.seed)
        shown = torch.tensor([signatures(text) for text in generate_replies(run.model, run.chat, records, gates)])
        rows.append([rule, *(f"{(shown * poles).any(1).float().mean():.2f}" for poles in (called, 1 - called))])
    return rows


def expert_table(run, args):
    """Print the loss of warm-up expert e alone on the records that call for pole p only and, for the template teacher's
    records, the share of the base's and the expert's replies that have its pole's signature."""
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

    if not args.replies or not from_templates(records):
        return
    rows = []
    for e in best:
        asked = [record for record, pole in zip(records, poles) if pole == e][:args.replies]
        shares = []
        for gate in (None, one_hot_gate(e)):
            replies = generate_replies(run.model, run.chat, asked, gate)
            shares.append(np.mean([signatures(text)[e] for text in replies]))
        rows.append([EXPERTS[e], *(f"{share:.2f}" for share in shares)])
    print_table(["pole", "base", "expert"], rows, f"Share of up to {args.replies} replies with the pole's signature")


# ----------------------------------------------------------------------------------------------------------------------
# health. Each check takes what health() measured on the test records, and returns whether to raise an alarm and a
# sentence about what it found. The first three checks are the paper's, the others are ours.

@dataclass(kw_only=True)
class Health(RecordOptions):
    text: str | None = None
    """File of plain text, blank lines between its pieces, to measure general ability on. Default: the test queries,
    and the neutral replies of the template teacher's records."""


def check_router(measured):
    rules = ("learned", "random", "shuffled")
    nats = losses(measured.run, measured.test, rules, seed=measured.args.seed, similarity=measured.similarity)
    costs = []
    lows = []
    for rule in ("random", "shuffled"):
        mean, low, high = bootstrap(nats[rule] - nats["learned"], measured.test.counts, measured.args.seed)
        costs.append(f"{mean:.4f} [{low:.4f}, {high:.4f}]")
        lows.append(low)
    return min(lows) <= 0, (
        f"random gates instead of the router's cost {costs[0]} nats/token, shuffled ones {costs[1]}; an interval that "
        "reaches 0 means that the router is no better than chance")


def plain_rows(run, texts):
    """Returns texts as rows without a question: all tokens but the first are supervised, and no pole is active.

    A long text is cut to what fits into a batch and into the model's context.
    """
    limit = min(run.args.tokens, run.model.context or run.args.tokens)
    rows = []
    for i, text in enumerate(texts):
        ids = [run.chat.bos, *encode(run.chat.tokenizer, text), run.chat.end]
        ids = [id for id in ids if id is not None]  # not every format has them
        rows.append(Row(str(i), torch.zeros(len(EXPERTS)), np.array(ids[:limit], dtype=np.int32), 1,
                        np.array(query_ids(run.tokenizer, text), dtype=np.int32)))
    return rows


def check_general_ability(measured):
    run = measured.run
    args = measured.args
    file = args.text
    if file:
        try:
            texts = [text for text in Path(file).read_text(encoding="utf-8").split("\n\n") if text.strip()]
        except (OSError, ValueError) as error:
            raise UserError(f"{file}: {error}") from None
        if not texts:
            raise UserError(f"{file}: no text in it")
    else:
        texts = [text for r in measured.test.records for text in (r["query"], r.get("neutral")) if text]
    rows = plain_rows(run, texts)
    gates = softmax_gate(score_queries(run.router, rows, args.tokens), run.setup.tau)
    base, counts = evaluation_loss(run.model, rows, None, args.tokens)
    mixed, _ = evaluation_loss(run.model, rows, gates, args.tokens)
    per_token = base.sum() / counts.sum()
    mean, low, high = (x / per_token for x in bootstrap(mixed - base, counts, args.seed))
    return low > 0.1, (f"the mixture's loss on plain text is {mean:+.1%} [{low:+.1%}, {high:+.1%}] of the base's "
                       f"{per_token:.3f} nats/token; an alarm if the whole interval is above +10 %")


def check_vectors(measured):
    setup = measured.run.setup
    splits, n_zero = load_data(setup.data, setup.seed)
    total = sum(map(len, splits.values())) + n_zero
    return n_zero > 0, f"{n_zero} of {total} records have no active trait; they are not trained on"


def check_dead_experts(measured):
    weight = measured.gates.mean(0)
    first = torch.bincount(measured.similarity.argmax(-1), minlength=len(EXPERTS)) / len(measured.gates)
    size = measured.gram.diagonal().sqrt()
    dead = (weight < 0.1 / len(EXPERTS)) | (first < 0.1 / len(EXPERTS)) | (size < 0.01 * size.max())
    names = ", ".join(EXPERTS[e] for e in dead.nonzero()[:, 0]) or "none"
    return bool(dead.any()), (
        f"{names}; lowest mean weight {weight.min():.3f}, lowest share of first choices {first.min():.3f} (dead: below "
        f"0.01), smallest update {size.min() / size.max():.2f} of the largest (dead: below 0.01)")


def check_collapsed_gate(measured):
    entropy = gate_statistics(measured.gates)["entropy"]
    uniform = math.log(len(EXPERTS))
    return not 0.01 < entropy / uniform < 0.99, (
        f"entropy {entropy:.3f} nats, {entropy / uniform:.1%} of a uniform gate's {uniform:.3f}; below 1 % the gate is "
        "one expert, above 99 % it is uniform")


def check_experts_alone(measured):
    model = measured.run.model
    tokens = measured.args.tokens
    numbers, poles = one_pole_only(measured.test.active)
    if not len(numbers):
        return False, "not measured: no test record calls for one pole only"
    rows = [measured.test.rows[i] for i in numbers]
    alone, counts = evaluation_loss(model, rows, torch.eye(len(EXPERTS))[poles], tokens)
    base, _ = evaluation_loss(model, rows, None, tokens)
    per_token = {p: (alone - base)[poles == p].sum() / counts[poles == p].sum() for p in sorted(set(poles))}
    worse = ", ".join(EXPERTS[p] for p in per_token if per_token[p] > 0) or "none"
    return any(x > 0 for x in per_token.values()), (
        f"{worse}; one expert alone on its pole's records against the base, nats/token: best "
        f"{min(per_token.values()):+.3f}, worst {max(per_token.values()):+.3f}")


def check_copies(measured):
    size = measured.gram.diagonal().sqrt()
    cosines = measured.gram / size.outer(size).clamp(min=1e-30)
    cosines.fill_diagonal_(-1)  # an expert is no copy of itself
    one, other = divmod(int(cosines.argmax()), len(EXPERTS))
    return bool(cosines.max() > 0.9), (f"the updates most alike are those of {EXPERTS[one]} and {EXPERTS[other]}, "
                                       f"cosine {cosines.max():.2f}; above 0.90 they are copies")


CHECKS = {"router": check_router, "general ability": check_general_ability, "all-zero vectors": check_vectors,
          "dead experts": check_dead_experts, "collapsed gate": check_collapsed_gate,
          "experts that only work together": check_experts_alone, "copies": check_copies}


def health(args):
    """Look for signs of a failed training and explain each in a sentence. The exit status is 1 if there is one."""
    run = LoadedRun(args)
    test = load_split(run, limit=args.records)
    similarity = score_queries(run.router, test.rows, args.tokens)
    measured = SimpleNamespace(run=run, args=args, test=test, similarity=similarity,
                               gates=softmax_gate(similarity, run.setup.tau), gram=update_gram(run.model))
    print(f"{args.run}: {run.origin('experts')}, tau {run.setup.tau:g}, {len(test.rows)} test records\n")
    alarms = []
    for name, check in CHECKS.items():
        alarm, text = check(measured)
        if alarm:
            alarms.append(name)
        print(textwrap.fill(f"{'ALARM' if alarm else 'ok':<7}{name}: {text}", 80, subsequent_indent=" " * 7))
    print(f"\nalarms: {', '.join(alarms) or 'none'}")
    return 1 if alarms else 0


# ----------------------------------------------------------------------------------------------------------------------
# ask

@dataclass(kw_only=True)
class Talk(UserOptions):
    max_new_tokens: int = 200
    """Maximum number of tokens in a reply."""
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
    """Raise a UserError if a query is empty or not text."""
    if not query.strip():
        raise UserError("an empty query: say what to ask")
    if any("\ud800" <= char <= "\udfff" for char in query):  # how Python keeps bytes that it cannot decode
        raise UserError("the query is not UTF-8 text: check the terminal's encoding")


def ask(args):
    """Answer queries as the base and as PersonaFuse, and show the gate as bars."""
    if bool(args.queries) == bool(args.file):
        raise UserError("give the queries either as arguments or with --file")
    if args.file:
        records = queries_to_answer(args.file)
    else:
        records = [{"id": str(i), "query": query} for i, query in enumerate(args.queries)]
    for query in args.queries:
        check_text(query)
    run = LoadedRun(args)
    fixed_gate = gate_from_options(run, args)
    gates = run.gates(records) if fixed_gate is None else fixed_gate.expand(len(records), -1)

    def reply_to(record, gate):
        generator = torch.Generator().manual_seed(args.seed)
        return generate_replies(run.model, run.chat, [record], gate, args.max_new_tokens, generator=generator,
                                temperature=args.temperature, top_p=args.top_p)[0]

    for record, weights in zip(records, gates):
        base = reply_to(record, None)
        reply = reply_to(record, weights[None])
        if args.json:
            answer = {"id": record["id"], "query": record["query"], "gate": dict(zip(EXPERTS, weights.tolist())),
                      "base": base, "reply": reply}
            print(json.dumps(answer, ensure_ascii=False), flush=True)
        else:
            print(f"\n{printable(record['query'])}\n\n{format_gate(weights)}\n\nbase:        {printable(base)}\n\n"
                  f"PersonaFuse: {printable(reply)}", flush=True)


# ----------------------------------------------------------------------------------------------------------------------
# chat

@dataclass(kw_only=True)
class ChatOptions(Talk):
    feedback: str = "feedback.jsonl"
    """File to which /good and /bad append their verdicts."""


HELP = """/persona O+,E-:0.5  set the gate yourself
/router             let the router set the gate again
/base               answer the last message again without experts; not added to the conversation
/good, /bad         judge PersonaFuse's last reply (not /base's): a line in the file that --feedback names
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
    """A chat in the terminal. At every turn, the router reads each of the user's messages alone and chooses a new gate.

    Cached keys and values are valid only under the gate that they were computed with. So no cache is kept from turn to
    turn, and the base reads the whole conversation again.
    """

    def __init__(self, run, args):
        self.run = run
        self.args = args
        # {"query", "response", "gate", "similarity", perhaps "verdict"} of each; a gate by hand has similarity None
        self.turns = []
        self.fixed_gate = gate_from_options(run, args)  # None: the router chooses
        self.generator = torch.Generator().manual_seed(args.seed)
        run.model  # load now, not at the first message
        if self.fixed_gate is None:
            run.router

    def stream(self, record, gate):
        """Print a reply while it is generated, and return it. Ctrl-C ends it early."""
        chat = self.run.chat
        ids = []
        shown = 0

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
        record = as_record(query, self.turns)
        try:
            gate, chosen_by, cosines = self.fixed_gate, "by hand", None
            if gate is None:
                similarity = self.run.chat_similarity([record])  # (1, E)
                gate, chosen_by = self.run.gate_of(similarity), "router"
                cosines = dict(zip(EXPERTS, similarity[0].tolist()))
        except KeyboardInterrupt:
            print("[stopped]\n")
            return
        weights = gate[0].tolist()
        shown = " ".join(name + f"{weight:.2f}".lstrip("0") for name, weight in zip(SHORT_NAMES, weights))
        print(f"{chosen_by}  {shown}\n", flush=True)
        text = self.stream(record, gate)
        if text.strip():  # a reply without a word, as after an early Ctrl-C, leaves no turn
            self.turns.append({"query": query, "response": text, "gate": dict(zip(EXPERTS, weights)),
                               "similarity": cosines})

    def command(self, line):
        """Obey a line that begins with /."""
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
        elif name in ("/good", "/bad") and not rest:
            self.judge(name[1:])
        elif name == "/reset":
            self.turns = []
        elif name == "/save" and rest:
            self.save(Path(rest))
        elif name == "/help":
            print(HELP + "\n")
        else:
            raise UserError(f"{name} is not a command, or its argument is missing or too much; /help lists the "
                            "commands. Put a space before a message that begins with /")

    def judge(self, verdict):
        """Append the last message, its reply's similarities and gate, and the verdict on it to the feedback file."""
        if not self.turns or "verdict" in self.turns[-1]:
            there_is = "it has a verdict already" if self.turns else "there is none yet"
            raise UserError(f"/{verdict} judges PersonaFuse's last reply, and {there_is}")
        turn = self.turns[-1]
        append_feedback(self.args.feedback, {key: turn[key] for key in ("query", "similarity", "gate")}
                        | {"verdict": verdict})
        turn["verdict"] = verdict
        print(f"{self.args.feedback}: {verdict}, for {shorten(printable(turn['query']))}\n")

    def save(self, path):
        """Write the conversation to a new .jsonl file, one turn a line."""
        if not self.turns:
            raise UserError("the conversation is empty: there is nothing to save")
        if path.suffix != ".jsonl":
            raise UserError(f"{path}: expected a file name that ends in .jsonl")
        try:
            if path.exists():
                raise UserError(f"{path} exists already: give another name")
            write_records(path, [{"id": str(i)} | as_record(turn["query"], self.turns[:i]) | turn
                                 for i, turn in enumerate(self.turns)])
        except OSError as error:  # a name that the file system refuses: the chat goes on
            raise UserError(f"{path}: {error.strerror}") from None
        print(f"{path}: {len(self.turns)} turns\n")


def chat(args):
    """Hold a conversation in the terminal. The router chooses a new gate at every turn; /help lists the commands."""
    conversation = Conversation(LoadedRun(args), args)
    if sys.stdin.isatty():
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
class Export(UserOptions):
    as_: typing.Literal["experts", "mixture", "merged"] = "experts"
    """experts: ten PEFT adapters. mixture: one PEFT adapter of ten times the rank, equal to the mixture under one
    gate. merged: a whole model folder with the mixture under one gate in its weights."""
    out: str | None = None
    """Folder to write."""
    query: str | None = None
    """Take the router's gate for this query."""
    shard_gb: float = 5.0
    """With merged: maximum size of a file, in gigabytes."""


def export(args):
    """Write the run for other software: PEFT adapters, or a model folder for transformers, vLLM or llama.cpp."""
    given = [f"--{key}" for key in ("gate", "persona", "query") if getattr(args, key)]
    if len(given) != (0 if args.as_ == "experts" else 1):
        expected = "no gate" if args.as_ == "experts" else "one gate, by --gate, --persona or --query"
        raise UserError(f"--as {args.as_} takes {expected}; found {' and '.join(given) or 'none'}")
    if args.user and not args.query:
        raise UserError("--user shifts the router's gate for a query: give --query too")
    if not args.out:
        raise UserError("--out is missing: where should the export go?")
    out = Path(args.out)
    if out.exists():
        raise UserError(f"{out} exists already: give another name, or remove it")
    run = LoadedRun(args)
    if args.as_ == "merged":
        if run.setup.int8:
            raise UserError("--as merged writes full weights, and here the base's are in 8 bits: --no-int8 merges from "
                            "the full weights")
        if not args.dtype:
            run.setup.dtype = None  # each tensor keeps the dtype that the base's file has
    base = Path(run.model_folder("experts")).absolute()  # a relative path would work from this working directory only
    gate = gate_from_options(run, args)
    if args.query:
        check_text(args.query)
        gate = run.gates([{"id": "0", "query": args.query}])

    if args.as_ == "experts":
        with atomic(out) as part:
            save_experts(run.model, part, base)
    elif args.as_ == "mixture":
        export_mixture(run.model, gate, out, base)
    else:
        write_merged(run.model, gate, base, out, shard_bytes=args.shard_gb * 1e9)
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    print(f"{out}: {args.as_}, {size / 1e6:,.0f} MB"
          + ("" if gate is None else f", for the gate\n{format_gate(gate[0])}"))


# ----------------------------------------------------------------------------------------------------------------------
# The command line

COMMANDS = {
    "routing": (Routing, routing), "ablate": (Ablate, ablate), "health": (Health, health), "ask": (Ask, ask),
    "chat": (ChatOptions, chat), "export": (Export, export), "bench": (Bench, bench),
    "experiment": (Experiment, experiment), "plot": (Plot, plot), "inventory": (Inventory, inventory),
    "prefer": (Prefer, prefer), "feedback": (Feedback, feedback)}


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
