"""The command inventory: the base and each expert alone answer a personality inventory, or statements with Yes or No.

    python eval.py inventory --run runs/tiny
    python eval.py inventory --run runs/small --items DIR    # a folder with openness.jsonl, …, agreeableness.jsonl, …
"""
import math
import textwrap
import typing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from lora import EXPERTS, SHORT_NAMES, TRAITS
from model import last_positions, pad
from support.chat import encode
from support.files import UserError, read_lines, read_table
from support.measure import RunOptions, LoadedRun, bootstrap, one_hot_gate
from support.rows import micro_batches
from support.tables import print_table


@dataclass(kw_only=True)
class Inventory(RunOptions):
    stage: typing.Literal["warmup", "joint"] | None = "warmup"
    """Stage whose experts to use. Warm-up trains each expert alone, and this command asks each alone."""
    items: str | None = None
    """The statements: a .csv file with the columns text ("Like to …"), label_ocean (O, C, E, A or N, the trait) and key
    (1, or -1 if agreeing means less of the trait). Default: our own data/inventory.csv. Or a folder with a file
    TRAIT.jsonl for each trait, whose lines have a question and, as answer_matching_behavior, what someone high in the
    trait would answer, Yes or No."""
    statements: int = 200
    """With a folder: number of statements a trait, drawn by --seed."""


OUR_ITEMS = Path(__file__).parent.parent / "data" / "inventory.csv"
INITIALS = [trait[0].upper() for trait in TRAITS]
GATES = {"base": None} | {name: one_hot_gate(e) for e, name in enumerate(EXPERTS)}
ANSWERS = ("very accurate", "moderately accurate", "neither accurate nor inaccurate", "moderately inaccurate",
           "very inaccurate")


def read_items(path):
    """Returns the statements of a .csv file as dicts. UserError names file and row."""
    table = read_table(path, ["text", "label_ocean", "key"])
    if not table:
        raise UserError(f"{path}: no statements in it")
    for number, item in table:
        if not item["text"].strip() or item["key"] not in ("1", "-1") or item["label_ocean"] not in INITIALS:
            raise UserError(f"{path}, row {number}: found {item}, expected text, label_ocean (O, C, E, A or N) and key "
                            "(1 or -1)")
    return [item for _, item in table]


@torch.no_grad()
def first_token_logits(run, questions, words, gate):
    """Returns the logits, as a reply's first token, of each word's first token: (len(questions), len(words)), fp32, on
    the CPU. gate: (1, E), or None for the base."""
    tokens = [encode(run.chat.tokenizer, word)[0] for word in words]
    prompts = [(i, run.chat.prompt([{"role": "user", "content": question}])) for i, question in enumerate(questions)]
    found = torch.zeros(len(questions), len(words))
    for group in micro_batches(prompts, run.args.tokens, lambda prompt: len(prompt[1])):
        numbers, rows = zip(*group)
        ids, lengths = pad(rows, run.model.device)
        h = run.model.hidden(ids, None if gate is None else gate.to(ids.device),
                             positions=last_positions(ids, lengths))                      # (B, D)
        found[list(numbers)] = run.model.head(h)[:, tokens].float().cpu()
    return found


def ratings(run, texts, gate):
    """Returns how strongly each of I statements is agreed to, from 1 to 5: (2, I), numpy.

    In the first row the answers were listed from "very accurate" down, in the second from "very inaccurate" up. A
    rating is the expected value under the probabilities of the five letters as the reply's first token, so no reply has
    to be parsed. gate: (1, E), or None for the base.
    """
    expected = []
    for values in ((5.0, 4.0, 3.0, 2.0, 1.0), (1.0, 2.0, 3.0, 4.0, 5.0)):
        listed = "\n".join(f"{letter}. {ANSWERS[5 - int(value)]}" for letter, value in zip("ABCDE", values))
        questions = [f"How accurately does this statement describe you? \"You {text[0].lower()}"
                     f"{text[1:].rstrip('. ')}.\"\n{listed}\nAnswer with one letter." for text in texts]
        expected.append(first_token_logits(run, questions, "ABCDE", gate).softmax(-1) @ torch.tensor(values))
    return torch.stack(expected).numpy()


def inventory(args):
    """Ask the base and each expert alone the statements of an inventory. Print trait scores, how far the two poles of a
    trait are apart, and how far they leak into other traits."""
    run = LoadedRun(args)
    if args.items and Path(args.items).is_dir():
        return yes_or_no(run, args)
    items = read_items(args.items or OUR_ITEMS)
    keys, letters = np.array([int(item["key"]) for item in items]), np.array([item["label_ocean"] for item in items])
    agreed = np.stack([ratings(run, [item["text"].strip() for item in items], gate) for gate in GATES.values()])
    scores = np.where(keys > 0, agreed, 6 - agreed)  # (1 + E, 2, I)
    traits = [letter for letter in INITIALS if letter in letters]

    def mean(score, mask):  # NaN, without numpy's warning, where no statement is keyed this way
        return score[:, mask].mean() if mask.any() else math.nan

    both_orders, both_keys = [], []
    for name, score in zip(GATES, scores):
        both_orders.append([name, *(f"{mean(score, letters == t):.2f}±"
                                    f"{np.abs(np.subtract(*score[:, letters == t])).mean():.2f}" for t in traits)])
        both_keys.append([name, *(f"{mean(score, (letters == t) & (keys > 0)):.2f}/"
                                  f"{mean(score, (letters == t) & (keys < 0)):.2f}" for t in traits)])
    print_table(["", *traits], both_orders, f"{len(items)} statements, {run.origin('experts')}, each "
                "alone: trait scores from 1 to 5 ± the mean gap between the two orders of the answers")
    print_table(["", *traits], both_keys, "The same from the positively / negatively keyed statements alone: halves "
                "that differ show a habit of agreeing, not a trait")
    moved = scores.mean(1)[1::2] - scores.mean(1)[2::2]  # (5, I): high expert minus low expert, a row per trait
    apart = np.array([[row[letters == t].mean() / max(row[letters == t].std(), 1e-9) for t in traits] for row in moved])
    print_table(["", *traits], [[trait, *(f"{x:+.2f}" for x in row)] for trait, row in zip(TRAITS, apart)],
                "High expert minus low expert, in standard deviations of that difference over statements; rows: whose "
                "experts, columns: whose statements")
    own = np.array([[initial == t for t in traits] for initial in INITIALS])
    print(f"\n  pole separation (own trait) {apart[own].mean():+.2f}, leakage to other traits (mean size) "
          f"{np.abs(apart[~own]).mean():.2f}")


def read_statements(folder, trait, n, seed):
    """Returns (questions, answers (n,)) of n statements of TRAIT.jsonl: 1 where someone high in the trait says Yes."""
    file, questions, answers = Path(folder) / f"{trait}.jsonl", [], []
    for number, statement in read_lines(file):
        statement = statement if isinstance(statement, dict) else {}
        question, answer = (statement.get(key) for key in ("question", "answer_matching_behavior"))
        if not isinstance(question, str) or str(answer).strip() not in ("Yes", "No"):
            raise UserError(f"{file}, line {number}: expected a question and an answer_matching_behavior, Yes or No")
        questions.append(question)
        answers.append(answer.strip() == "Yes")
    if not questions:
        raise UserError(f"{file}: no statements in it")
    drawn = np.random.default_rng(seed).permutation(len(questions))[:n]
    return [questions[i] for i in drawn], np.array(answers)[drawn]


def yes_or_no(run, args):
    """Ask the base and each expert alone whether a statement is something they would say. Print, for each trait, the
    share answered as someone high in it would. The answer is the likelier of Yes and No as the reply's first token."""
    shares, own, undecided = [[name] for name in ("base", *SHORT_NAMES)], [], []
    for trait in TRAITS:
        questions, high_says_yes = read_statements(args.items, trait, args.statements, args.seed)
        as_high = {}
        for row, (name, gate) in zip(shares, GATES.items()):
            yes, no = first_token_logits(run, questions, ["Yes", "No"], gate).numpy().T
            as_high[name] = ((yes > no) == high_says_yes).astype(float)
            row.append(f"{as_high[name].mean():.3f} ({(yes - no).mean():+.1f})")
        ones, pair = np.ones(len(questions)), (f"high_{trait}", f"low_{trait}")
        own += [[name, float(as_high["base"].mean()), float(as_high[name].mean()),
                 bootstrap(as_high[name] - as_high["base"], ones, args.seed)] for name in pair]
        own.append([f"high minus low {trait}", "", "",
                    bootstrap(as_high[pair[0]] - as_high[pair[1]], ones, args.seed)])
        _, low, high = bootstrap(as_high["base"], ones, args.seed)
        if low <= 0.5 <= high:
            undecided.append(trait)
    print_table(["", *INITIALS], shares, f"Share of statements answered as someone high in the trait would "
                f"(and mean log-odds of Yes over No); {run.origin('experts')}, each alone")
    print_table(["expert", "base", "expert", "difference"], own, "The same share on statements of the "
                "expert's own trait, with a 95 % interval of the difference, over statements")
    if undecided:
        print("\n" + textwrap.fill("The base is no better than a coin toss, or always gives the same answer (see the "
                                    f"log-odds), where its interval holds 0.5: {', '.join(undecided)}", 80))
