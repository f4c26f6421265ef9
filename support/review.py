"""Looking at records: what a file holds, how it is split, and how people check the labels that a teacher gave.

    python synth.py report data/mine.jsonl                               # tables; warns of all-zero vectors
    python synth.py split data/mine.jsonl --hold-out travel              # train.jsonl, validation.jsonl, test.jsonl
    python synth.py review data/mine.jsonl --sample 200                  # a table to fill in with a spreadsheet program
    python synth.py review data/mine.jsonl --import a.csv b.csv          # agreement, and corrected records
"""
import csv
import json
import math
import random
import re
import shlex
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from lora import EXPERTS, SHORT_NAMES, TRAITS
from router import active_experts
from support.files import UserError, atomic, read_table
from support.output import read_rejected, reasons
from support.records import normalise_query, read_records, refuse_to_replace, split_records, write_records
from support.replies import read_pole
from support.tables import print_table


def read_files(files):
    """Returns the records of several files as one list. UserError if two files share an id, or one is given twice."""
    records, file_of_id = [], {}
    for file in files:
        for record in read_records(file):
            id = str(record["id"])
            if id in file_of_id:
                raise UserError(f"{file}: id {record['id']!r} is in {file_of_id[id]} too")
            file_of_id[id] = file
            records.append(record)
    return records


# ----------------------------------------------------------------------------------------------------------------------
# report: what a file of records holds

NAMED = re.compile(r"(?i)\b(openness|conscientious\w*|extr[ao]ver[st]\w*|introver[st]\w*|agreeable\w*|neurotic\w*)\b")


@dataclass
class Report:
    files: list[str]
    """Files of records, FILE.jsonl. FILE.rejected.jsonl beside each is counted, too."""
    json: bool = False
    """Print one JSON object instead of tables."""


def as_dict(value):
    """Returns the value if it is a dict, else an empty dict: other people's records may hold anything under `cot`."""
    return value if isinstance(value, dict) else {}


def shares(records):
    """Returns the number of records, how many have an all-zero vector, and each pole's share of the records."""
    active = sum(active_experts(r["traits"]) for r in records)
    return {"records": len(records), "all_zero": sum(not any(r["traits"].values()) for r in records),
            "poles": {expert: n / len(records) for expert, n in zip(EXPERTS, active.tolist())}}


def summarise(records, rejected=()):
    """Returns everything that `report` shows, as JSON values. rejected: the entries of the rejected files."""
    total, refused = shares(records), reasons(rejected)
    cots = [as_dict(r.get("cot")) for r in records]
    texts = {"query": [r["query"] for r in records], "situation": [cot.get("situation") for cot in cots],
             "response": [r["response"] for r in records]}
    words = {}
    for name, found in texts.items():
        lengths = sorted(len(text.split()) for text in found if isinstance(text, str))
        if lengths:
            words[name] = {"5 %": lengths[len(lengths) // 20], "median": lengths[len(lengths) // 2],
                           "95 %": lengths[len(lengths) * 19 // 20], "longest": lengths[-1]}

    cues, quoted = {expert: Counter() for expert in EXPERTS}, []
    for record, cot in zip(records, cots):
        for trait, choice in as_dict(cot.get("traits")).items():
            pole, cue = read_pole(as_dict(choice).get("pole")), normalise_query(str(as_dict(choice).get("cue") or ""))
            if pole and cue and trait in TRAITS:
                cues[f"{'high' if pole > 0 else 'low'}_{trait}"][cue] += 1
                quoted.append(cue.strip(" .,;:!?\"'") in normalise_query(record["query"]))

    active = torch.stack([active_experts(r["traits"]) for r in records])
    zero = total["all_zero"] + refused["all-zero vector"]
    teachers = [r["teacher"] for r in (*records, *rejected) if isinstance(r.get("teacher"), dict)]
    groups = {key: {name: shares([r for r in records if r.get(key) == name])
                    for name in sorted({r[key] for r in records if isinstance(r.get(key), str)})}
              for key in ("domain", "culture")}
    return total | {
        "rejected": dict(refused.most_common()),
        "all_zero_share": zero / (len(records) + refused["all-zero vector"]),
        "active_poles": {str(k): n for k, n in sorted(Counter(active.sum(-1).int().tolist()).items())},
        "duplicate_queries": len(records) - len({normalise_query(r["query"]) for r in records}),
        "duplicate_responses": len(records) - len({normalise_query(r["response"]) for r in records}),
        "words": words, "naming_traits": [r["id"] for r in records if NAMED.search(r["response"])],
        "cues": {expert: found.most_common(5) for expert, found in cues.items()},
        "cues_quoted": sum(quoted) / len(quoted) if quoted else None,
        **groups,
        "teachers": dict(Counter(str(t.get("name", "?")) for t in teachers)),
        **{key: sum(n for t in teachers if type(n := t.get(key)) is int)
           for key in ("calls", "tokens_read", "tokens_written")}}


def print_summary(found):
    """Print what `summarise` found as tables of at most 80 columns."""
    def table(head, rows, left=(0,)):
        print()
        print_table(head, rows, width=80, left=left)

    def cut(text, width=42):
        return text if len(text) <= width else text[:width - 1] + "…"

    print(f"\n  {found['records']:,} records, {sum(found['rejected'].values()):,} rejected; {found['calls']:,} calls, "
          f"{found['tokens_read']:,} tokens read, {found['tokens_written']:,} written")
    for name, head in (("teachers", "teacher"), ("rejected", "reason for rejecting")):
        if found[name]:
            table([head, "queries"], list(found[name].items())[:8])
    rows = [["all-zero vectors", f"{found['all_zero_share']:.1%}", "of records and rejected ones"],
            ["duplicate queries", found["duplicate_queries"], ""],
            ["duplicate responses", found["duplicate_responses"], ""],
            ["responses naming traits", len(found["naming_traits"]), cut(", ".join(map(str, found["naming_traits"])))]]
    if found["cues_quoted"] is not None:
        rows.append(["cues that are quoted", f"{found['cues_quoted']:.1%}", "word for word in the query"])
    table(["quality", "", ""], rows, left=(0, 2))
    table(["words", "5 %", "median", "95 %", "longest"], [[name, *n.values()] for name, n in found["words"].items()])
    table(["active poles", *found["active_poles"]], [["records", *found["active_poles"].values()]])
    cues = {expert: "; ".join(f"{cue} ({n})" for cue, n in most) for expert, most in found["cues"].items()}
    table(["pole", "share", "cues most often cited"],
          [[expert, f"{share:.1%}", cut(cues[expert])] for expert, share in found["poles"].items()], left=(0, 2))
    for key in ("domain", "culture"):
        if found[key]:
            table([f"{key}, poles in %", "all", "zero", *SHORT_NAMES],
                  [[name, *map(str, (group["records"], group["all_zero"])),
                    *(f"{100 * share:.0f}" for share in group["poles"].values())]
                   for name, group in found[key].items()])


def report(args):
    """Counts, poles, all-zero vectors, lengths, duplicates and cues, also per domain and culture. The exit status is 1
    if more than 20 % of the trait vectors are all zero."""
    records, rejected = read_files(args.files), []
    done = {str(r["id"]) for r in records}
    for file in args.files:
        rejected += read_rejected(Path(file).with_suffix(".rejected.jsonl"), done).values()
    found = summarise(records, rejected)
    if args.json:
        print(json.dumps({"files": args.files, **found}, ensure_ascii=False))
    else:
        print(", ".join(args.files))
        print_summary(found)
    if found["all_zero_share"] > 0.02:
        print(f"warning: {found['all_zero_share']:.1%} of the trait vectors are all zero, the paper's sign of a "
              "synthesis that has failed (at most 2 % is fine)", file=sys.stderr)
    return 1 if found["all_zero_share"] > 0.2 else 0


# ----------------------------------------------------------------------------------------------------------------------
# split

@dataclass
class Split:
    files: list[str]
    """Records, FILE.jsonl; several are put together."""
    out: str | None = None
    """Folder for train.jsonl, validation.jsonl and test.jsonl. If not given, the first FILE without .jsonl."""
    hold_out: list[str] = ()
    """Domains whose records all go into test.jsonl, so that training never sees them."""
    seed: int = 0
    """Seed of the split. Without --hold-out, train.py --data FILE.jsonl --seed N makes the same split."""
    overwrite: bool = False
    """Replace files that exist."""


def split(args):
    """Write train, validation and test.jsonl, 80/10/10 by query: records with the same query stay together."""
    records, out = read_files(args.files), Path(args.out or Path(args.files[0]).with_suffix(""))
    domains = {r["domain"] for r in records if isinstance(r.get("domain"), str)}
    unknown = sorted(set(args.hold_out) - domains)
    if unknown:
        raise UserError(f"--hold-out: no record is of the domain {unknown[0]!r}; the records' domains are "
                        f"{', '.join(sorted(domains)) or 'not given'}")
    held_out = {normalise_query(r["query"]) for r in records if r.get("domain") in args.hold_out}
    splits = split_records([r for r in records if normalise_query(r["query"]) not in held_out], args.seed)
    splits["test"] += [r for r in records if normalise_query(r["query"]) in held_out]
    for name, part in splits.items():
        if not any(any(r["traits"].values()) for r in part):
            raise UserError(f"{', '.join(args.files)}: too few records: none with an active trait for {name}")
        refuse_to_replace(out / f"{name}.jsonl", args.overwrite)
    for name, part in splits.items():
        write_records(out / f"{name}.jsonl", part)
        queries = {normalise_query(r["query"]) for r in part}
        print(f"{out / f'{name}.jsonl'}: {len(part)} records, {len(queries)} queries")


# ----------------------------------------------------------------------------------------------------------------------
# review: people check the labels

@dataclass
class Review:
    files: list[str]
    """Records, FILE.jsonl; several are put together."""
    sample: int = 200
    """How many records to draw. All poles are drawn about equally often."""
    out: str | None = None
    """Where to write the table to fill in (if not given: FILE.review.csv) or, with --import, the corrected records
    (FILE.corrected.jsonl)."""
    import_: list[str] = ()
    """Tables that annotators have filled in with 1 (high), -1 (low), 0 (neither) or nothing (can't say). A label
    changes where more than half of those who filled in its cell agree."""
    seed: int = 0
    """Seed of the sample."""
    overwrite: bool = False
    """Replace a file that exists."""


def review(args):
    """Draw a sample of records for people to label in a spreadsheet program. With --import, measure how far they agree
    with each other and with the teacher, and write corrected records. The table does not show the teacher's labels:
    annotators who see them tend to repeat them."""
    records = read_files(args.files)
    if args.import_:
        return import_labels(args, records)
    out = Path(args.out or Path(args.files[0]).with_suffix(".review.csv"))
    if out.suffix != ".csv":
        raise UserError(f"--out is {out}, expected a file named .csv")
    refuse_to_replace(out, args.overwrite)  # it may have been filled in
    sample = stratified_sample(records, args.sample, args.seed)
    columns = ["id", *(key for key in ("domain", "culture", "history") if any(r.get(key) for r in sample)),
               "query", "response"]
    texts = [r | {"history": transcript(r.get("history") or [])} for r in sample]
    write_sheet(out, [*columns, *TRAITS], [[r.get(key) for key in columns] + [""] * len(TRAITS) for r in texts])
    counts = sum(active_experts(r["traits"]) for r in sample).int().tolist()
    poles = ", ".join(f"{n} {name}" for n, name in zip(counts, SHORT_NAMES))
    print(f"{out}: {len(sample)} of {len(records)} records ({poles}).\n"
          "Give each annotator a copy, to fill the traits' columns with 1 (high), -1 (low),\n"
          "0 (neither) or nothing (can't say). Then:\n"
          f"python synth.py review {shlex.join(args.files)} --import FIRST.csv SECOND.csv …")


LABELS = {trait: (read_pole, "1, 0, -1") for trait in TRAITS}  # see read_sheets


def cell(value):
    """Returns a value as text that a spreadsheet program does not take for a formula."""
    text = "" if value is None else str(value)
    return "'" + text if text[:1] in ("=", "+", "-", "@", "\t", "\r") else text


def transcript(turns):
    """Returns the turns of a conversation as one text, as a cell shows it."""
    return "\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)


def write_sheet(path, columns, rows):
    """Write a table for a spreadsheet program. No cell of its rows is taken for a formula."""
    with atomic(path) as part, open(part, "w", newline="", encoding="utf-8-sig") as file:  # Excel needs the mark
        csv.writer(file).writerows([columns, *([cell(value) for value in row] for row in rows)])


def stratified_sample(records, size, seed):
    """Returns `size` records, drawn in turn from those of each pole and the all-zero ones, then shuffled."""
    rng, taken = random.Random(seed), {}
    order = rng.sample(records, len(records))
    strata = [[r for r in order if active_experts(r["traits"])[e]] for e in range(len(EXPERTS))]
    strata = [iter(s) for s in (*strata, [r for r in order if not any(r["traits"].values())])]
    while len(taken) < min(size, len(records)):
        for stratum in strata:
            new = next((r for r in stratum if str(r["id"]) not in taken), None)
            if new is not None and len(taken) < size:
                taken[str(new["id"])] = new
    return rng.sample(list(taken.values()), len(taken))


def read_sheets(paths, rows, columns, source="the records"):
    """Returns filled-in tables as [{id: {column: value}}], without empty cells. UserError names a wrong cell.

    rows: {id: {column: text}}, the rows that `source` has, each with the texts that must still be as they were written.
    columns: {column to fill in: (parse, expected)}; parse(text) returns a cell's value, or None if it is wrong.
    """
    if len({Path(path).resolve() for path in paths}) < len(paths):
        raise UserError("--import: a table is given twice; it would agree with itself")
    return [read_sheet(path, rows, columns, source) for path in paths]


def read_sheet(path, rows, columns, source):
    """One table of `read_sheets`."""
    def plain(text):  # spreadsheet programs may drop the "'" and change how lines end
        return " ".join(text.split()).removeprefix("'")

    known, found = {cell(id).strip(): id for id in rows}, {}
    for number, row in read_table(path, ["id", *next(iter(rows.values())), *columns]):
        written = row["id"].strip()
        id = known.get(written, known.get(cell(written)))  # the program may have dropped the "'"
        if id is None or id in found:
            problem = "there twice" if id is not None else f"not in {source}"
            raise UserError(f"{path}, row {number}: id {row['id']!r} is {problem}")
        for column, text in rows[id].items():
            if plain(row[column]) != plain(cell(text)):
                raise UserError(f"{path}, row {number}, column {column}: {row[column][:40]!r}, expected the text that "
                                "was written there")
        found[id] = {}
        for column, (parse, expected) in columns.items():
            text = row[column].strip()
            if text and parse(text) is None:
                raise UserError(f"{path}, row {number}, column {column}: {text[:40]!r}, expected {expected} or nothing")
            if text:
                found[id][column] = parse(text)
    return found


def krippendorff_alpha(ratings):
    """Returns Krippendorff's α for ordinal values: 1 for full agreement, 0 for chance, NaN if nothing varies or no unit
    has two ratings. ratings: (annotators, units), NaN where one is missing.

    The coincidences o_ck count the pairs of values within a unit, each weighted 1/(m − 1) where the unit has m ratings.
    The distance of two values grows with how many ratings lie between them: δ_ck = (Σ_{g=c..k} n_g − (n_c + n_k)/2)².
    α = 1 − Σ o δ / (Σ n_c n_k δ / (n − 1)).  (Krippendorff, Content Analysis, chapter on reliability.)
    """
    ratings = np.asarray(ratings, dtype=float)
    values = np.unique(ratings[~np.isnan(ratings)])
    counts = (ratings[None] == values[:, None, None]).sum(1)  # (V, N)
    m = counts.sum(0)
    counts, m = counts[:, m > 1], m[m > 1]
    o = (counts[:, None] * counts - np.eye(len(values))[:, :, None] * counts) @ (1 / (m - 1))  # (V, V)
    n = o.sum(1)
    below = n.cumsum() - n / 2
    distance = (below[:, None] - below) ** 2
    expected = (np.outer(n, n) * distance).sum()
    return float(1 - (n.sum() - 1) * (o * distance).sum() / expected) if expected > 0 else math.nan


def apply_majority(records, tables):
    """Returns the records with corrected labels, and the number of changes as {trait: count}.

    A label changes where more than half of those who filled in its cell agree on another value. Empty cells do not
    count as votes. Otherwise the teacher's label stays.
    """
    changes, corrected = Counter(), []
    for record in records:
        traits, originals = dict(record["traits"]), dict(record.get("teacher_traits") or {})
        given = [labels.get(str(record["id"]), {}) for labels in tables]
        for trait in TRAITS:
            votes = Counter(labels[trait] for labels in given if trait in labels)
            value, count = votes.most_common(1)[0] if votes else (0, 0)
            if 2 * count > votes.total() and value != traits.get(trait, 0):
                originals.setdefault(trait, traits.get(trait, 0))
                traits[trait] = value
                changes[trait] += 1
        corrected.append(record | {"traits": traits} | ({"teacher_traits": originals} if originals else {}))
    return corrected, changes


def import_labels(args, records):
    """Print how far annotators and teacher agree, and write the corrected records."""
    out = Path(args.out or Path(args.files[0]).with_suffix(".corrected.jsonl"))
    refuse_to_replace(out, args.overwrite)
    tables = read_sheets(args.import_, {str(r["id"]): {} for r in records}, LABELS)
    teacher = {str(r["id"]): {t: r["traits"].get(t, 0) for t in TRAITS} | (r.get("teacher_traits") or {})
               for r in records}
    units = [key for key in teacher if any(key in labels for labels in tables)]

    def agreement(name, *raters):
        """Returns a row of the table below."""
        alphas = [krippendorff_alpha([[r.get(u, {}).get(t, math.nan) for u in units] for r in raters]) for t in TRAITS]
        return [name, *("–" if math.isnan(alpha) else alpha for alpha in alphas)]
    rows = [agreement("annotators with each other", *tables)] if len(tables) > 1 else []
    for path, labels in zip(args.import_, tables):
        rows.append(agreement(f"{Path(path).name} with teacher", labels, teacher))
    print_table(["", *(trait[:5] for trait in TRAITS)], rows, width=80,
                title=f"Krippendorff's alpha, ordinal, {len(units)} records: 1 is full agreement, 0 chance")
    corrected, changes = apply_majority(records, tables)
    write_records(out, corrected)
    print(f"\n{out}: {len(corrected)} records, {changes.total()} labels changed, where more than half of\n"
          "those who filled in the cell agree; teacher_traits keeps the originals")
    if changes:
        print_table(["", "changed"], changes.items())


COMMANDS = {"report": (Report, report), "split": (Split, split), "review": (Review, review)}
