"""The command inventory: a personality inventory, answered by the base and by each expert.
"""
import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from lora import EXPERTS, TRAITS
from model import pad
from support.chat import encode
from support.files import UserError, read_table
from support.measure import RunOptions, LoadedRun, one_hot_gate
from support.rows import Row, micro_batches
from support.tables import print_table


@dataclass(kw_only=True)
class Inventory(RunOptions):
    items: str | None = None
    """Statements, a .csv file with the columns label_raw (facet), text ("Like to …"), label_ocean (a letter of OCEAN)
    and key (1, or -1 where agreeing means less of the trait); our own data/inventory.csv if not given."""


INITIALS = [trait[0].upper() for trait in TRAITS]
ANSWERS = "very accurate", "moderately accurate", "neither accurate nor inaccurate", "moderately inaccurate", \
    "very inaccurate"


def read_items(path):
    """Statements of a .csv file -> list of dicts, checked. UserError names file and row."""
    table = read_table(path, ["text", "label_ocean", "key"])
    if not table:
        raise UserError(f"{path}: no statements in it")
    for number, item in table:
        if not item.get("text", "").strip() or item.get("key") not in ("1", "-1") or \
                item.get("label_ocean") not in INITIALS:
            raise UserError(f"{path}, row {number}: found {item}, expected text, label_ocean (O, C, E, A or N) and key "
                            "(1 or -1)")
    return [item for _, item in table]


@torch.no_grad()
def ratings(run, texts, gate):
    """How far each statement is agreed to: (2, I), 1 to 5, the answers listed from "very accurate" down and up.

    The expected value under the probabilities of the five letters as the reply's first token; nothing is parsed.
    """
    letters, found = [encode(run.chat.tokenizer, letter)[0] for letter in "ABCDE"], torch.zeros(2, len(texts))
    for order, values in enumerate(((5.0, 4.0, 3.0, 2.0, 1.0), (1.0, 2.0, 3.0, 4.0, 5.0))):
        listed = "\n".join(f"{letter}. {ANSWERS[5 - int(value)]}" for letter, value in zip("ABCDE", values))
        prompts = [run.chat.prompt([{"role": "user", "content": (
            f"How accurately does this statement describe you? \"You {text[0].lower()}{text[1:].rstrip('. ')}.\"\n"
            f"{listed}\nAnswer with one letter.")}]) for text in texts]
        rows = [Row(i, None, np.array(ids), 0) for i, ids in enumerate(prompts)]
        for group in micro_batches(rows, run.args.tokens):
            ids, lengths = pad([row.ids for row in group], run.model.device)
            h = run.model.hidden(ids, None if gate is None else gate.expand(len(group), -1).to(ids.device))
            logits = run.model.head(h[torch.arange(len(group), device=h.device), lengths - 1])[:, letters]  # (B, 5)
            found[order, [row.id for row in group]] = logits.float().softmax(-1).cpu() @ torch.tensor(values)
    return found.numpy()


def inventory(args):
    """An inventory answered by the base and by each expert alone: trait scores, pole separation, leakage."""
    run, items = LoadedRun(replace(args, stage=args.stage or "warmup")), read_items(
        args.items or Path(__file__).parent.parent / "data" / "inventory.csv")
    keys, letters = np.array([int(item["key"]) for item in items]), np.array([item["label_ocean"] for item in items])
    agreed = np.stack([ratings(run, [item["text"].strip() for item in items], gate)
                       for gate in (None, *map(one_hot_gate, range(len(EXPERTS))))])  # (1 + E, 2, I)
    scores, who = np.where(keys > 0, agreed, 6 - agreed), ("base", *EXPERTS)
    traits = [letter for letter in INITIALS if letter in letters]
    stage = run.folder("experts").parent.name

    def mean(e, mask):  # nan, without a warning, where nothing is keyed this way
        return scores[e][:, mask].mean() if mask.any() else math.nan

    cells = [[(mean(e, letters == t), np.abs(np.subtract(*scores[e][:, letters == t])).mean(),
               mean(e, (letters == t) & (keys > 0)), mean(e, (letters == t) & (keys < 0))) for t in traits]
             for e in range(len(who))]
    print_table(**{"title": f"{len(items)} statements, experts after {stage}, each alone: trait scores from 1 to 5 ± the "
                         "mean gap between the two orders of the answers", "head": ["", *traits],
                "rows": [[name, *(f"{x:.2f}±{gap:.2f}" for x, gap, _, _ in row)] for name, row in zip(who, cells)]})
    print_table(**{"title": "The same from the positively / negatively keyed statements alone: halves that differ show a "
                         "habit of agreeing, not a trait", "head": ["", *traits],
                "rows": [[name, *(f"{plus:.2f}/{minus:.2f}" for _, _, plus, minus in row)]
                         for name, row in zip(who, cells)]})
    moved = scores.mean(1)[1::2] - scores.mean(1)[2::2]  # (5, I): high expert minus low expert, a row a trait
    apart = np.array([[row[letters == t].mean() / max(row[letters == t].std(), 1e-9) for t in traits] for row in moved])
    own = np.array([[TRAITS[INITIALS.index(t)] == trait for t in traits] for trait in TRAITS])
    print_table(**{"title": "High expert minus low expert, in standard deviations of that difference over statements; "
                         "rows: whose experts, columns: whose statements", "head": ["", *traits],
                "rows": [[trait, *(f"{x:+.2f}" for x in row)] for trait, row in zip(TRAITS, apart)]})
    print(f"\n  pole separation (own trait) {apart[own].mean():+.2f}, leakage to other traits (mean size) "
          f"{np.abs(apart[~own]).mean():.2f}")
