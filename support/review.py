"""People and the data: what is in a file of records, how it is split, and how annotators check a teacher's labels.

    python synth.py report data/mine.jsonl                               # tables, and the warnings
    python synth.py split data/mine.jsonl --hold-out travel              # train.jsonl, validation.jsonl, test.jsonl
    python synth.py review data/mine.jsonl --sample 200                  # a table for a spreadsheet
    python synth.py review data/mine.jsonl --import a.csv b.csv          # agreement, and corrected records
"""
import csv
import json
import math
import random
import re
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from lora import EXPERTS, SHORT_NAMES, TRAITS
from router import active_experts
from support.files import UserError, atomic, read_table
from support.output import read_rejected, reasons
from support.records import normalise_query, read_records, split_records, write_records
from support.replies import read_pole


# ----------------------------------------------------------------------------------------------------------------------
# report: what is in a file of records

NAMED = re.compile(r"(?i)\b(openness|conscientious\w*|extr[ao]ver[st]\w*|introver[st]\w*|agreeable\w*|neurotic\w*)\b")


@dataclass(kw_only=True)
class Report:
    files: list[str]
    """Records, FILE.jsonl; of FILE.rejected.jsonl beside it, the reasons are counted."""
    json: bool = False
    """One JSON object instead of tables."""


def shares(records):
    """How many records, how many of them all-zero, and the share of each pole."""
    active = sum(active_experts(r["traits"]) for r in records)
    return {"records": len(records), "all_zero": sum(not any(r["traits"].values()) for r in records),
            "poles": {expert: n / len(records) for expert, n in zip(EXPERTS, active.tolist())}}


def measure(records, rejected=()):
    """All that `report` shows, as JSON values. rejected: entries of the rejected file."""
    refused = reasons(rejected)
    active, total, words = torch.stack([active_experts(r["traits"]) for r in records]), shares(records), {}
    for name in ("query", "situation", "response"):
        texts = [r[name] if name != "situation" else r["cot"].get(name) if isinstance(r.get("cot"), dict) else None
                 for r in records]
        counts = sorted(len(text.split()) for text in texts if isinstance(text, str))
        if counts:
            words[name] = {"5 %": counts[len(counts) // 20], "median": counts[len(counts) // 2],
                           "95 %": counts[len(counts) * 19 // 20], "longest": counts[-1]}
    cues, quoted = {expert: Counter() for expert in EXPERTS}, []
    for record in records:
        why = record["cot"].get("traits") if isinstance(record.get("cot"), dict) else None
        for trait, one in why.items() if isinstance(why, dict) else ():  # other people's records may hold anything
            one = one if isinstance(one, dict) and trait in TRAITS else {}
            pole, cue = read_pole(one.get("pole")), normalise_query(str(one.get("cue") or ""))
            if pole and cue:
                cues[f"{'high' if pole > 0 else 'low'}_{trait}"][cue] += 1
                quoted.append(cue.strip(" .,;:!?\"'") in normalise_query(record["query"]))
    zero = total["all_zero"] + refused["all-zero vector"]
    teachers = [r["teacher"] for r in (*records, *rejected) if isinstance(r.get("teacher"), dict)]
    return total | {
        "rejected": dict(refused.most_common()),
        "all_zero_share": zero / (len(records) + refused["all-zero vector"]),
        "active_poles": {str(k): n for k, n in sorted(Counter(active.sum(-1).int().tolist()).items())},
        "together": {a: dict(zip(EXPERTS, row)) for a, row in zip(EXPERTS, (active.T @ active).int().tolist())},
        "duplicate_queries": len(records) - len({normalise_query(r["query"]) for r in records}),
        "duplicate_responses": len(records) - len({normalise_query(r["response"]) for r in records}),
        "words": words, "naming_traits": [r["id"] for r in records if NAMED.search(r["response"])],
        "cues": {expert: found.most_common(5) for expert, found in cues.items()},
        "cues_quoted": sum(quoted) / len(quoted) if quoted else None,
        **{key: {name: shares([r for r in records if r.get(key) == name]) for name in sorted(
            {r[key] for r in records if isinstance(r.get(key), str)})} for key in ("domain", "culture")},
        "teachers": dict(Counter(str(t.get("name", "?")) for t in teachers)),
        **{key: sum(n for t in teachers if type(n := t.get(key)) is int)
           for key in ("calls", "tokens_read", "tokens_written")}}


def tables(m):
    """What `measure` found, for a terminal of 80 columns."""
    def cut(text, width):
        return text if len(text) <= width else text[:width - 1] + "…"

    def line(name, cells, width):
        return f"  {cut(name, 24):<24}" + "".join(f"{one:>{width}}" for one in cells)
    naming, n = ", ".join(map(str, m["naming_traits"])), m["records"]
    lines = [f"  {n} records, {sum(m['rejected'].values())} rejected; {m['calls']} calls, {m['tokens_read']:,} tokens "
             f"read, {m['tokens_written']:,} written",
             *(f"  {count:>7} by {cut(name, 60)}" for name, count in m["teachers"].items()),
             *(f"  {count:>7} rejected: {cut(reason, 60)}" for reason, count in list(m["rejected"].items())[:8]), "",
             line("all-zero vectors", [f"{m['all_zero_share']:.1%}"], 9) + "   (of records and rejected ones)",
             line("duplicate queries", [m["duplicate_queries"]], 9),
             line("duplicate responses", [m["duplicate_responses"]], 9),
             line("responses naming traits", [len(m["naming_traits"])], 9) + f"   {cut(naming, 40)}"]
    if m["cues_quoted"] is not None:
        lines.append(line("cues that are quoted", [f"{m['cues_quoted']:.1%}"], 9) + "   (word for word in the query)")
    lines += ["", line("words", ["5 %", "median", "95 %", "longest"], 9)]
    lines += [line(name, found.values(), 9) for name, found in m["words"].items()]
    lines += ["", line("active poles", m["active_poles"], 9), line("records", m["active_poles"].values(), 9), ""]
    lines += [line("pole", ["share"], 9) + "   cues most often cited"]
    for expert in EXPERTS:
        cues = "; ".join(f"{cue} ({count})" for cue, count in m["cues"][expert])
        lines.append(line(expert, [f"{m['poles'][expert]:.1%}"], 9) + f"   {cut(cues, 42)}")
    lines += ["", line("records with both", SHORT_NAMES, 5)]
    lines += [line(expert, row.values(), 5) for expert, row in m["together"].items()]
    for key in ("domain", "culture"):
        if m[key]:
            lines += ["", line(f"{key}, poles in %", [" all", " zero", *(f" {name}" for name in SHORT_NAMES)], 4)]
            lines += [line(name, [f"{g['records']:>4}", f"{g['all_zero']:>5}", *(
                f"{100 * p:.0f}" for p in g["poles"].values())], 4) for name, g in m[key].items()]
    return "\n".join(text.rstrip() for text in lines)


def report(args):
    """Counts, poles, all-zero vectors, lengths, duplicates, cues, per domain and culture. Exit status 1 if more than
    20 % of the trait vectors are all zero."""
    records, rejected = [], []
    for file in args.files:
        records += read_records(file)
        beside, done = Path(file).with_suffix(".rejected.jsonl"), {str(r["id"]) for r in records}
        rejected += read_rejected(beside, done).values()
    found = measure(records, rejected)
    print(json.dumps({"files": args.files, **found}, ensure_ascii=False) if args.json
          else f"{', '.join(args.files)}\n\n{tables(found)}")
    if found["all_zero_share"] > 0.02:
        print(f"warning: {found['all_zero_share']:.1%} of the trait vectors are all zero, the source's sign of a "
              "synthesis that has failed (at most 2 % is fine)", file=sys.stderr)
    return 1 if found["all_zero_share"] > 0.2 else 0


# ----------------------------------------------------------------------------------------------------------------------
# split

@dataclass(kw_only=True)
class Split:
    files: list[str]
    """Records, FILE.jsonl; several are put together."""
    out: str | None = None
    """Folder for train.jsonl, validation.jsonl and test.jsonl; FILE without .jsonl if not given."""
    hold_out: list[str] = ()
    """Domains that go into test.jsonl whole, and so into no training."""
    seed: int = 0
    """Of the split; train.py --data FILE.jsonl --seed N makes the same one."""
    overwrite: bool = False
    """Replace what is there."""


def split(args):
    """Train, validation and test.jsonl, 80/10/10 by query: two records of one query never part."""
    records, lines = [], {}
    for file in args.files:
        for record in read_records(file):
            if lines.setdefault(str(record["id"]), file) != file:
                raise UserError(f"{file}: id {record['id']!r} stands in {lines[str(record['id'])]} too")
            records.append(record)
    out, domains = Path(args.out or Path(args.files[0]).with_suffix("")), {str(r.get("domain")) for r in records}
    if set(args.hold_out) - domains:
        raise UserError(f"--hold-out: no record is of the domain {min(set(args.hold_out) - domains)!r}; there are "
                        f"{', '.join(sorted(domains))}")
    held = {normalise_query(r["query"]) for r in records if str(r.get("domain")) in args.hold_out}
    splits = split_records([r for r in records if normalise_query(r["query"]) not in held], args.seed)
    splits["test"] += [r for r in records if normalise_query(r["query"]) in held]
    for name, part in splits.items():
        if not any(any(r["traits"].values()) for r in part):
            raise UserError(f"{', '.join(args.files)}: too few records: none with an active trait for {name}")
        if (out / f"{name}.jsonl").exists() and not args.overwrite:
            raise UserError(f"{out / f'{name}.jsonl'} is there already; --overwrite replaces it")
    for name, part in splits.items():
        write_records(out / f"{name}.jsonl", part)
        print(f"{out / f'{name}.jsonl'}: {len(part)} records, {len({normalise_query(r['query']) for r in part})} queries")


# ----------------------------------------------------------------------------------------------------------------------
# review: people check the labels

@dataclass(kw_only=True)
class Review:
    file: list[str] = field(default_factory=list)
    """Records, FILE.jsonl. With --import it may be left out: then the sample's own records are corrected."""
    sample: int = 200
    """How many records to draw, so that all poles are about equally frequent."""
    out: str | None = None
    """The table to fill in, FILE.review.csv if not given; with --import the corrected records, FILE.corrected.jsonl."""
    show_labels: bool = False
    """Show the annotators what the teacher chose."""
    import_: list[str] = ()
    """Tables that annotators have filled in with 1 (high), -1 (low), 0 (neither) or nothing (can't say)."""
    seed: int = 0
    """Of the sample."""
    overwrite: bool = False
    """Replace what is there."""


def review(args):
    """Draw a sample of records for people to label in a spreadsheet; or, with --import, measure how far they agree with
    each other and with the teacher, and write corrected records."""
    if len(args.file) > 1 or not args.file and not args.import_:
        raise UserError(f"review takes one file of records, found {len(args.file)}; see python synth.py review --help")
    if args.import_:
        return import_labels(args)
    records, out = read_records(args.file[0]), Path(args.out or Path(args.file[0]).with_suffix(".review.csv"))
    if out.suffix != ".csv":
        raise UserError(f"--out is {out}, expected a file named .csv")
    if out.exists() and not args.overwrite:
        raise UserError(f"{out} is there already, perhaps filled in; --overwrite replaces it")
    beside = out.with_suffix(".records.jsonl")
    if beside.exists() and beside.samefile(args.file[0]):
        raise UserError(f"{beside}, the records to draw from, would be replaced by the sample's; give another --out")
    if beside.exists() and not args.overwrite:
        raise UserError(f"{beside} is there already; --overwrite replaces it, another --out leaves it")
    sample, extra = stratified(records, args.sample, args.seed), ("domain", "culture", "history")
    texts = ["id", *(key for key in extra if any(r.get(key) for r in sample)), "query", "response"]
    columns = [*texts, *TRAITS, "comment", *(f"teacher_{trait}" for trait in TRAITS if args.show_labels)]
    with atomic(out) as part, open(part, "w", newline="", encoding="utf-8-sig") as file:  # the mark is for Excel
        table = csv.DictWriter(file, columns, restval="", extrasaction="ignore")
        table.writeheader()
        for r in sample:
            said = "\n".join(f"{turn['role']}: {turn['content']}" for turn in r.get("history") or [])
            table.writerow({key: cell(r.get(key)) for key in texts} | {"history": cell(said)}
                           | {f"teacher_{trait}": r["traits"].get(trait, 0) for trait in TRAITS})
    write_records(beside, sample)
    counts = sum(active_experts(r["traits"]) for r in sample).int().tolist()
    print(f"{out}: {len(sample)} of {len(records)} records ({', '.join(f'{n} {s}' for n, s in zip(counts, SHORT_NAMES))}).\n"
          "Give each annotator a copy, to fill the traits' columns with 1 (high), -1 (low),\n"
          "0 (neither) or nothing (can't say). Then:\n"
          f"python synth.py review {args.file[0]} --import FIRST.csv SECOND.csv …")


def cell(value):
    """A text for a spreadsheet, which must not take it for a formula."""
    text = "" if value is None else str(value)
    return "'" + text if text[:1] in ("=", "+", "-", "@", "\t", "\r") else text


def stratified(records, size, seed):
    """A sample that takes from each pole in turn (and from the all-zero records) as long as there are any, shuffled."""
    rng, taken = random.Random(seed), {}
    order = rng.sample(records, len(records))
    strata = [[r for r in order if active_experts(r["traits"])[e]] for e in range(len(EXPERTS))]
    strata = [iter(s) for s in (*strata, [r for r in order if not any(r["traits"].values())])]
    while len(taken) < min(size, len(records)):
        for stratum in strata:
            new = next((r for r in stratum if id(r) not in taken), None)
            if new is not None and len(taken) < size:
                taken[id(new)] = new
    return rng.sample(list(taken.values()), len(taken))


def read_labels(path, records):
    """A filled-in table -> {id: {trait: 1, 0 or −1}}, empty cells left out. One UserError names every cell that is
    wrong (the first five), by row and column."""
    known, labels, problems = {cell(r["id"]): str(r["id"]) for r in records}, {}, []
    for number, row in read_table(path, ["id", *TRAITS]):
        key = known.get(row["id"].strip(), known.get(cell(row["id"].strip())))
        if key is None or key in labels:
            problems.append(f"row {number}: id {row['id']!r} " + ("stands there twice" if key else "is no record's"))
            continue
        labels[key] = {}
        for trait in TRAITS:
            text = row.get(trait, "").strip()
            if text and read_pole(text) is None:
                problems.append(f"row {number}, column {trait}: {text[:40]!r}, expected 1, 0, -1 or nothing")
            elif text:
                labels[key][trait] = read_pole(text)
    if problems:
        more = f"; and {len(problems) - 5} more" if problems[5:] else ""
        raise UserError(f"{path}: {'; '.join(problems[:5])}{more}")
    return labels


def krippendorff_alpha(ratings):
    """Krippendorff's α for ordinal values: ratings (annotators, units), NaN where there is none -> 1 for full
    agreement, 0 for chance, NaN where nothing varies or no unit has two ratings.

    Coincidences o_ck count the pairs of values within a unit, each weighted 1/(m − 1) for m ratings; two values are as
    far apart as there are values from one to the other, δ_ck = (Σ_{g=c..k} n_g − (n_c + n_k)/2)², and
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


def corrected(records, tables):
    """-> records with the labels that more than half of the annotators gave, and how many changed, by trait."""
    changed, found = Counter(), []
    for record in records:
        new, kept = dict(record["traits"]), dict(record.get("teacher_traits") or {})
        for trait in TRAITS:
            votes = Counter(labels[str(record["id"])][trait] for labels in tables
                            if trait in labels.get(str(record["id"]), {}))
            value, count = votes.most_common(1)[0] if votes else (0, 0)
            if 2 * count > votes.total() and value != new.get(trait, 0):  # else the teacher's label stays
                kept.setdefault(trait, new.get(trait, 0))
                new[trait] = value
                changed[trait] += 1
        found.append(record | {"traits": new} | ({"teacher_traits": kept} if kept else {}))
    return found, changed


def import_labels(args):
    """review --import: agreement, and the corrected records."""
    records = read_records(args.file[0] if args.file else find_sample(args.import_[0]))
    out = Path(args.out or Path(args.file[0] if args.file else args.import_[0]).with_suffix(".corrected.jsonl"))
    if out.exists() and not args.overwrite:
        raise UserError(f"{out} is there already; --overwrite replaces it")
    if len({Path(path).resolve() for path in args.import_}) < len(args.import_):
        raise UserError("--import: one table is given twice; it would agree with itself")
    tables = [read_labels(path, records) for path in args.import_]
    teacher = {str(r["id"]): {t: r["traits"].get(t, 0) for t in TRAITS} | (r.get("teacher_traits") or {})
               for r in records}
    units = [key for key in teacher if any(key in labels for labels in tables)]

    def alphas(raters):
        return [krippendorff_alpha([[r.get(u, {}).get(t, math.nan) for u in units] for r in raters]) for t in TRAITS]
    rows = ([("annotators with each other", alphas(tables))] if len(tables) > 1 else []) + [
        (f"{Path(path).name[:24]} with teacher", alphas([labels, teacher]))
        for path, labels in zip(args.import_, tables)]
    print(f"Krippendorff's alpha, ordinal, {len(units)} records: 1 is full agreement, 0 chance\n\n  {'':<37}"
          + "".join(f"{trait[:5]:>8}" for trait in TRAITS))
    for name, found in rows:
        print(f"  {name:<37}" + "".join(f"{'–' if math.isnan(a) else format(a, '.3f'):>8}" for a in found))
    records, changed = corrected(records, tables)
    write_records(out, records)
    print(f"\n{out}: {len(records)} records, {changed.total()} labels changed to what more than half of the\n"
          "annotators gave; teacher_traits keeps the originals"
          + "".join(f"\n  {n:>6}  {trait}" for trait, n in changed.items()))


def find_sample(table):
    """The records of the sample that a table was made from: FOLDER/*.records.jsonl with all of the table's ids."""
    rows = {row["id"].strip() for _, row in read_table(table, ["id", *TRAITS])}
    for file in sorted(Path(table).parent.glob("*.records.jsonl")):
        if rows <= {cell(r["id"]) for r in read_records(file)}:
            return file
    raise UserError(f"{table}: beside it is no .records.jsonl with all of its ids; name the records: python synth.py "
                    "review FILE.jsonl --import …")


COMMANDS = {"report": (Report, report), "split": (Split, split), "review": (Review, review)}
