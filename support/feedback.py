"""Feedback in the routing (ours): from verdicts on replies, learn which poles a person likes.

    python eval.py chat --run runs/tiny                   # /good and /bad append to feedback.jsonl
    python eval.py feedback --run runs/tiny --file feedback.jsonl --out user.json
    python eval.py chat --run runs/tiny --user user.json  # the gate is softmax((s + b) / τ)

b, ten numbers that sum to 0, comes from a logistic regression of the verdicts on the weights of the gates.
Shapes: N verdicts, E = 10 experts, M regressions at once.
"""
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from lora import EXPERTS
from router import softmax_gate
from support.files import UserError, read_lines
from support.measure import LARGEST_LIKE, LoadedRun, RunOptions
from support.records import FIELDS, check_record, is_for_each_expert, record_lines, refuse_to_replace, write_records
from support.tables import print_table


@dataclass(kw_only=True)
class Feedback(RunOptions):
    file: str = "feedback.jsonl"
    """The verdicts that /good and /bad of chat wrote."""
    out: str = "user.json"
    """File to write, for --user of ask, chat and export."""
    overwrite: bool = False
    """Replace the file that is there."""


LINE = {  # field: (whether a value is valid, what is expected)
    "query": FIELDS["query"],
    "similarity": (lambda s: s is None or is_for_each_expert(s, -1.001, 1.001), "a cosine for each expert, or null"),
    # the sum: --gate allows 1e-3, and rounding adds to it
    "gate": (lambda w: is_for_each_expert(w, 0, 1) and abs(sum(w.values()) - 1) < 2e-3, "ten weights, which sum to 1"),
    "verdict": (lambda value: value in ("good", "bad"), "good or bad")}


def read_feedback(path):
    """Returns the checked lines of a feedback file. UserError names file and line."""
    lines = dict(read_lines(path))
    for number, line in lines.items():
        if problem := check_record(line, LINE, LINE):
            raise UserError(f"{path}, line {number}: {problem}")
    return [*lines.values()]


def append_feedback(path, line):
    """Append a line to a feedback file. UserError, and no change, if the file holds anything else."""
    try:
        ended = not Path(path).exists() or not read_feedback(path) or Path(path).read_bytes().endswith(b"\n")
        with open(path, "ab") as file:
            file.write(b"\n" * (not ended) + record_lines([line]))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}; the verdict is not saved") from None


# The regression: p(good) = σ(β·x + c)

PENALTIES = (100, 30, 10, 3, 1)  # on ½‖β‖²; leave-one-out chooses one, of equals the first
INTERCEPT_PENALTY = 0.1          # on ½c², so that c stays finite where all verdicts are the same


def design(gates):
    """Returns x and a column of ones, (N, E + 1), for gates (N, E): their weights, centred, in units of one standard
    deviation that all experts share. So a row of x sums to 0, and so does the β of the smallest loss."""
    x = gates - gates.mean(0)
    return np.column_stack([x / max(x.std(), 1e-4), np.ones(len(x))])  # if all gates are equal, x is 0


def fit(x, good, penalty, counted):
    """Fit M penalised logistic regressions by Newton's method. counted (M, N): 1 where one reads a verdict, else 0.

    x: (N, E + 1), good: (N,) of 0 and 1. Returns (β, c), (M, E + 1), and the inverse Hessians, (M, E + 1, E + 1).
    """
    ridge = np.diag([penalty] * len(EXPERTS) + [INTERCEPT_PENALTY])
    squares, theta = x[:, :, None] * x[:, None], np.zeros((len(counted), x.shape[1]))
    for _ in range(12):  # of 3,000 random cases, none took more than 9 steps
        p = 1 / (1 + np.exp(-theta @ x.T))  # (M, N)
        gradient = (counted * (p - good)) @ x + theta @ ridge
        hessian = np.tensordot(counted * p * (1 - p), squares, 1) + ridge
        theta = theta - np.linalg.solve(hessian, gradient[..., None])[..., 0]
    return theta, np.linalg.inv(hessian)


def leave_one_out(x, good, penalty):
    """Returns the mean −log p of each verdict under the regression on all others."""
    theta, _ = fit(x, good, penalty, 1 - np.eye(len(good)))
    return np.log1p(np.exp((1 - 2 * good) * (theta * x).sum(1))).mean()


def learn_likes(gates, good):
    """Returns b (E,), its standard errors (E,) and the penalty, for gates (N, E) and verdicts good (N,) of 0 and 1.

    From β to b is our choice: a β of 1, where one standard deviation more weight multiplies the odds of a good verdict
    by 2.72, counts as half a cosine, and if some |β| is larger, all of b is scaled down, so that no |b| is above 1/2. A
    persona set by hand has 1. b is added to cosines, so the choice does not depend on τ; and a message still decides:
    expert f has a larger weight than expert e where s_f − s_e > b_e − b_f.
    """
    x = design(gates)
    penalty = min(PENALTIES, key=lambda penalty: leave_one_out(x, good, penalty))
    (theta,), (covariance,) = fit(x, good, penalty, np.ones((1, len(good))))
    # β sums to 0 already. The gates say nothing about its sum, so what the ridge says of that is taken out of the errors.
    centre = np.eye(len(EXPERTS)) - 1 / len(EXPERTS)
    beta, errors = theta[:-1], np.diag(centre @ covariance[:-1, :-1] @ centre) ** 0.5
    size = max(1, np.abs(beta).max())
    return LARGEST_LIKE * (beta / size), LARGEST_LIKE * (errors / size), penalty


def feedback(args):
    """Learn from the verdicts of a chat which poles a person likes, and write it as the file that --user takes."""
    out = Path(args.out)
    if out.suffix != ".json" or out.resolve() == Path(args.file).resolve():
        raise UserError(f"{out}: expected another file than {args.file}, with a name that ends in .json")
    refuse_to_replace(out, args.overwrite)
    tau = LoadedRun(args).setup.tau
    lines = read_feedback(args.file) if Path(args.file).exists() else None
    if not lines:
        found = "No such file" if lines is None else "no verdicts in it"
        raise UserError(f"{args.file}: {found}; /good and /bad in chat write some")
    gates = np.array([[line["gate"][expert] for expert in EXPERTS] for line in lines])
    good = np.array([float(line["verdict"] == "good") for line in lines])
    b, errors, penalty = learn_likes(gates, good)
    stars, gate = np.where(np.abs(b) > 2 * errors, "*", " "), softmax_gate(torch.tensor(b), tau).tolist()
    rows = [[EXPERTS[e], f"{b[e]:+.3f} ± {errors[e]:.3f} {stars[e]}", f"{gate[e]:.3f}"]
            for e in np.argsort(-b)]
    print_table(["pole", "b ± standard error  ", "gate where s = 0"], rows, f"What this person likes by {len(good)} "
                f"verdicts, {good.sum():.0f} of them good; tau {tau:g}, penalty {penalty}; * is two standard errors")
    why = ("they are fewer than ten" if len(good) < 10 else  # verdicts that are all the same give b = 0
           "no pole is two standard errors from 0" if "*" not in stars else "")
    write_records(out, [{"likes": dict(zip(EXPERTS, b.tolist())), "verdicts": len(lines)}])
    if why:
        print(f"\nThese verdicts do not tell yet: {why}.")
    print(f"\n{out} is for --user of ask, chat and export")
