"""The command prefer: people decide which of two replies is better, without knowing whose is which.

    python eval.py prefer --run RUN --file messages.jsonl --out sheet.csv   # a sheet for the judges, and its key
    python eval.py prefer --run RUN --import a.csv b.csv                    # what the judges prefer

Shapes: J judges, N messages, Q = 4 questions: which is better, and the three qualities.
"""
import hashlib
import random
import shlex
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from router import persona_gate
from support.bench import mcnemar_p, score_interval
from support.files import UserError, read_bytes, read_lines, read_table
from support.measure import GateOptions, LoadedRun, bootstrap, gate_from_options
from support.records import messages_of, queries_to_answer, write_records
from support.review import krippendorff_alpha, read_sheets, transcript, write_sheet
from support.tables import print_table
from train import generate_replies


@dataclass(kw_only=True)
class Prefer(GateOptions):
    file: str | None = None
    """Messages to reply to: .txt (one a line), .jsonl (query, perhaps history, domain and culture) or .csv."""
    against: str | None = None
    """Compare with this persona's gate, such as O+,E-, instead of with the base."""
    out: str | None = None
    """The sheet to write (if not given: FILE.prefer.csv). Its key, which says whose each reply is, gets the same name
    with .key.jsonl."""
    import_: list[str] = ()
    """Copies of one sheet, each filled in by one judge. The key must be in the folder of the first."""
    max_new_tokens: int = 200
    """Maximum number of tokens in a reply."""


TEXTS = ("message", "reply A", "reply B")
QUALITIES = ("engagement", "appropriateness", "authenticity")
COLUMNS = {"better": (lambda text: {"A": 1, "B": -1, "TIE": 0}.get(text.upper()), "A, B, tie")} | {  # see read_sheets
    f"{quality} {side}": ({str(n): n for n in range(1, 6)}.get, "1, 2, 3, 4, 5")
    for quality in QUALITIES for side in "AB"}


def prefer(args):
    """Write the replies of base and PersonaFuse, or those under two gates, into a blind sheet for judges. With
    --import, report what they prefer and how far they agree."""
    if bool(args.import_) == bool(args.file):
        raise UserError("give messages with --file or, with --import, the sheets that judges have filled in")
    if args.import_:
        if given := [f"--{key}" for key in ("against", "persona", "gate", "out") if getattr(args, key)]:
            raise UserError(f"--import reads from the key what was compared: leave {' and '.join(given)} out")
        return report(args)
    records = queries_to_answer(args.file)
    out = Path(args.out or Path(args.file).with_suffix(".prefer.csv"))
    if out.suffix != ".csv":
        raise UserError(f"--out is {out}, expected a file named .csv")
    key_file = out.with_suffix(".key.jsonl")
    for path in (out, key_file):
        if path.exists():  # a sheet may have been filled in, and is worth nothing without its key
            raise UserError(f"{path} exists already: give another name with --out")
    run, coin = LoadedRun(args), random.Random(args.seed)
    against = persona_gate(args.against, run.setup.tau).expand(len(records), -1) if args.against else None
    by_hand = gate_from_options(run, args)
    gates = run.gates(records) if by_hand is None else by_hand.expand(len(records), -1)

    def replies(gates):  # in batches of eight, which fit in memory
        return [reply for i in range(0, len(records), 8) for reply in generate_replies(
            run.model, run.chat, records[i:i + 8], None if gates is None else gates[i:i + 8], args.max_new_tokens)]

    rows = []
    for record, mine, other in zip(records, replies(gates), replies(against)):
        message = transcript(messages_of(record)) if record.get("history") else record["query"]
        side, other_side = coin.choice((("A", "B"), ("B", "A")))
        rows.append({"side": side, "message": message, f"reply {side}": mine, f"reply {other_side}": other,
                     **{field: record.get(field) for field in ("id", "domain", "culture")}})
    write_records(key_file, [{"PersonaFuse": f"{run.origin('experts')}, gate: {args.persona or args.gate or 'router'}",
                              "other": args.against or "the base", "tau": run.setup.tau}, *rows])
    write_sheet(out, ["id", *TEXTS, *COLUMNS], [[id, *(row[column] for column in TEXTS), *[""] * len(COLUMNS)]
                                                for id, row in read_key(key_file)[1].items()])
    print(f"{out}: {len(rows)} messages, each with two replies\n{key_file}: whose they are; no judge may see it\n"
          "Give each judge a copy of the sheet, to fill in better (A, B or tie) and the\n"
          "qualities (1 to 5), or nothing (can't say). Then, with the key beside FIRST.csv:\n"
          f"python eval.py prefer --run {shlex.quote(args.run)} --import FIRST.csv SECOND.csv …")


def prefix(key_file):
    """Returns what the ids of a sheet begin with, a hash of its key's bytes: an edited key belongs to no sheet."""
    return f"k{hashlib.sha256(read_bytes(key_file)).hexdigest()[:8]}-"


def read_key(key_file):
    """Returns what was compared, and {id: row}, the rows of the sheet with the side of PersonaFuse's reply."""
    compared, *rows = (line for _, line in read_lines(key_file))
    start = prefix(key_file)
    return compared, {f"{start}{n}": row for n, row in enumerate(rows, 1)}


def read_judgements(paths):
    """Returns what was compared, the key's rows, and the answers (J, N, Q) as PersonaFuse minus the other: 1, 0 or −1
    for which is better, and the differences of the ratings. NaN where a cell is empty."""
    table, key_files = read_table(paths[0], ["id"]), sorted(Path(paths[0]).parent.glob("*.key.jsonl"))
    first = table[0][1]["id"].strip() if table else ""
    key_file = next((file for file in key_files if first.startswith(prefix(file))), None)
    if key_file is None:
        raise UserError(f"{paths[0]}: its first id is {first!r}, and no .key.jsonl in its folder is the key of such a "
                        "sheet; expected the key there, and key and ids as they were written")
    compared, rows = read_key(key_file)
    texts = {id: {column: row[column] for column in TEXTS} for id, row in rows.items()}
    sheets = read_sheets(paths, texts, COLUMNS, key_file)
    answers = np.full((len(paths), len(rows), 1 + len(QUALITIES)), np.nan)
    for j, (path, sheet) in enumerate(zip(paths, sheets)):
        if sheet.keys() != rows.keys() or not any(sheet.values()):
            raise UserError(f"{path}: {len(rows) - len(sheet)} of {len(rows)} rows are missing, and "
                            f"{sum(map(bool, sheet.values()))} are filled in; expected all rows, and some filled in")
        for n, (id, row) in enumerate(rows.items()):
            sign, sides = (1, "AB") if row["side"] == "A" else (-1, "BA")
            mine, other = ([sheet[id].get(f"{quality} {side}", np.nan) for quality in QUALITIES] for side in sides)
            answers[j, n] = [sign * sheet[id].get("better", np.nan), *np.subtract(mine, other)]
    return compared, list(rows.values()), answers


def mean_and_interval(x, interval, form):
    """Returns "mean [low, high]" of x (M,), or of fewer than ten messages (our choice) only the mean: a bootstrap's
    interval would be too narrow."""
    if len(x) < 10:
        return form.format(x.mean()) if len(x) else "–"
    return "{} [{}, {}]".format(*map(form.format, interval(x)))


def compare(answers, seed=0):
    """Returns answers (J, N, Q) as a row for each of the three tables of `report`."""
    questions = np.moveaxis(answers, 2, 0)  # (Q, J, N)
    # for each question (M,): the mean over the judges who answered it, of the messages that have such a judge
    better, *ratings = (np.nanmean(x[:, ~np.isnan(x).all(0)], 0) for x in questions)
    wins, losses = int((better > 0).sum()), int((better < 0).sum())
    rate = mean_and_interval(50 + 50 * better, lambda x: score_interval(x, seed), "{:.1f}")
    p = mcnemar_p(0 * better, better)  # against zeros, McNemar's test is the sign test of wins and losses
    # Each message counts in both orders, A-B and B-A, since a coin decided which reply is A. Otherwise judges who always
    # prefer PersonaFuse would have no variance, and no alpha.
    alphas = [krippendorff_alpha(np.hstack([x, -x])) for x in questions]
    return ([len(better), wins, len(better) - wins - losses, losses, rate, f"{p:.2g}"],
            [mean_and_interval(x, lambda x: bootstrap(x, np.ones(len(x)), seed), "{:+.2f}") for x in ratings],
            ["–" if np.isnan(alpha) else alpha for alpha in alphas])


def report(args):
    """Print win rate, differences of ratings and agreement, for all messages and for each domain and culture."""
    compared, keyed, answers = read_judgements(args.import_)
    groups = {"all": np.full(answers.shape[1], True)} | {
        f"{field} {name}": np.array([row[field] == name for row in keyed]) for field in ("domain", "culture")
        for name in sorted({row[field] for row in keyed if row[field] and isinstance(row[field], str)})}
    wins, ratings, alphas = zip(*(compare(answers[:, part], args.seed) for part in groups.values()))
    for title, head, rows in (
            (f"PersonaFuse ({compared['PersonaFuse']}) against {compared['other']}, tau {compared['tau']:g}; judges: "
             f"{len(answers)}, whose answers are averaged for each message; the sign of the mean makes it a win, a tie "
             "or a loss. Win rate: the mean of these means, from 0 to 100 %, with a 95 % interval from ten messages on; "
             "p: exact sign test",
             ["messages", "wins", "ties", "losses", "win rate", "p"], wins),
            ("Ratings: PersonaFuse's minus the other's, with 95 % intervals (bootstrap)", QUALITIES, ratings),
            ("Krippendorff's alpha, ordinal, of the judges' preferences and differences of ratings: 1 is full "
             "agreement, 0 that of coins tossed over A and B; a high win rate alone raises it", ["better", *QUALITIES],
             alphas if len(answers) > 1 else ())):
        if rows:
            print_table(["", *head], [[name, *row] for name, row in zip(groups, rows)], title)
