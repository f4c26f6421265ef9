"""What all commands that measure share: a run opened, its test records, gates, losses, intervals and tables.
"""
import math
import sys
import typing
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from lora import EXPERTS, adapter_shape, expert_layers
from router import gates_for_rule, persona_gate, raw_gate, softmax_gate
from support.chat import Chat, load_tokenizer
from support.command import pick_device, pick_dtype
from support.files import UserError
from support.rows import n_tokens, make_rows
from support.runs import Setup, fingerprint, read_run
from train import evaluation_loss, score_queries


@dataclass(kw_only=True)
class RunOptions:
    run: str = "runs/paper"
    """Run folder that train.py made."""
    stage: typing.Literal["warmup", "joint"] | None = None
    """Which experts: warmup (with the router stage's router) or joint (with its own); the latest if not given."""
    base: str | None = None
    """The base's model folder, if it has moved."""
    encoder: str | None = None
    """The encoder's model folder, if it has moved."""
    experts: str | None = None
    """Experts from elsewhere, trained with PEFT or in another run: a folder with one PEFT folder for each."""
    router: str | None = None
    """A router from elsewhere: another run's router/router or joint/router."""
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


@dataclass(kw_only=True)
class RecordOptions(RunOptions):
    data: str | None = None
    """Other records than the run's: a .jsonl file or a folder, as for train.py."""


@dataclass(kw_only=True)
class GateOptions(RunOptions):
    persona: str | None = None
    """Set the gate by hand, through the same softmax: O+,E-:0.5 is open, and half as strongly introverted."""
    gate: str | None = None
    """Set raw weights: ten numbers with commas between, or names as in high_openness:0.7,low_neuroticism:0.3."""

    def __post_init__(self):
        if self.persona and self.gate:
            raise UserError("--persona and --gate both set the gate: choose one")


class LoadedRun:
    """A run opened for measuring: its Setup, and of models and data what a command asks for, when it does."""

    def __init__(self, args):
        run = Path(args.run)
        if not (run / "config.json").exists():
            raise UserError(f"{run}: no config.json, so there is no run here; python train.py --preset tiny makes one")
        found, self.args = read_run(run), args
        own = found["setup"] | {k: getattr(args, k, None) or Setup.inside(found["setup"][k], run)
                                for k in ("base", "encoder", "data")}
        device = pick_device(args.device)
        self.setup = Setup(
            run=run, device=device, dtype=pick_dtype(args.dtype, device), tokens=args.tokens,
            tau=args.tau or found["stages"].get("joint", {}).get("tau", 1.0), eval_records=0, **own)
        if args.experts:
            self.setup.rank, self.setup.alpha = adapter_shape(args.experts)

    def folder(self, part):
        """Where the "experts" or the "router" to measure are. UserError if they are not trained yet."""
        if getattr(self.args, part):
            return Path(getattr(self.args, part))
        first = "warmup" if part == "experts" else "router"
        stage = {None: None, "warmup": first, "joint": "joint"}[self.args.stage]
        folder = self.setup.run / stage / part if stage else self.setup.stage_folder(part)
        if folder is None or not folder.is_dir():
            raise UserError(f"{self.setup.run} has no {part} of stage {stage or first} yet: python train.py "
                            f"--preset {self.setup.preset} --stage {stage or first} --run {self.setup.run}")
        return folder

    def same(self, role, part):
        """UserError if the base or the encoder is not what experts or router were trained on: --base may name any
        folder. Of --experts and --router a run's own say what that was; what PEFT trained doesn't."""
        folder, given = getattr(self.setup, role), getattr(self.args, part)
        run = Path(given).resolve().parent.parent if given else self.setup.run  # RUN/STAGE/experts
        try:
            known = read_run(run).get("content", {}).get(role)
        except UserError:
            known = None  # not a run's
        if known and fingerprint(folder) != known:
            raise UserError(f"{folder}: not the {role} that {given or run} was trained on: config.json, tokenizer or "
                            f"tensors are others. --{role} names the folder, if it has moved")

    @cached_property
    def model(self):
        folder = self.folder("experts")
        self.same("base", "experts")
        return self.setup.load_base(folder)

    @cached_property
    def chat(self):
        self.folder("experts")
        return Chat.from_dir(self.setup.base)

    @cached_property
    def router(self):
        folder = self.folder("router")
        self.same("encoder", "router")
        return self.setup.load_router(folder)

    def rows(self, records):
        """Records as rows for the router alone."""
        self.folder("router")
        return make_rows(records, tokenizer=load_tokenizer(self.setup.encoder))[0]

    def gates(self, records):
        """The router's gates for records, whose traits may be unknown: (N, E)."""
        rows = self.rows([record | {"traits": {}} for record in records])
        return softmax_gate(score_queries(self.router, rows, self.args.tokens), self.setup.tau)

    def records(self, split="test", need_response=True, limit=None):
        """-> records of a split, and a mask (N,): True where training has never seen the record's domain."""
        splits = self.setup.load_data(need_response)
        records, known = splits[split][:limit], {record.get("domain") for record in splits["train"]}
        return records, np.array([record.get("domain") not in known for record in records])


def gate_from_options(run, args):
    """The gate that --gate or --persona sets, (1, E), or None."""
    if args.persona:
        return persona_gate(args.persona, run.setup.tau)[None]
    gate = raw_gate(args.gate) if args.gate else None
    if gate is not None and gate.max() > 0.999 and run.folder("experts").parent.name == "joint":
        print("note: joint training has made the experts used to working together, and one alone is far from what\n"
              "they were trained for; --stage warmup has experts that were trained alone", file=sys.stderr)
    return gate


def one_hot_gate(expert):
    """(1, E) with all the weight on one expert."""
    return torch.eye(len(EXPERTS))[expert:expert + 1]


def load_run(args, folder, stage=None):
    """The run in `folder`, to be measured with the other arguments of `args`."""
    return LoadedRun(replace(args, run=str(folder), stage=stage))


def load_cases(run, split="test", limit=None):
    """Records of a split as rows for base and encoder, and what gate rules and comparisons need of them."""
    records, new_domain = run.records(split, limit=limit)
    rows, _ = make_rows(records, run.chat, load_tokenizer(run.setup.encoder))
    return SimpleNamespace(
        records=records, rows=rows, active=torch.stack([row.active for row in rows]),
        counts=np.array([float(n_tokens(row) - row.prompt) for row in rows]),
        new_domain=new_domain)


def losses(run, c, rules, tau=None, seed=0):
    """Nats of every case's reply under each gate rule, {rule: (N,)}."""
    similarity = score_queries(run.router, c.rows, run.args.tokens)
    return {rule: evaluation_loss(run.model, c.rows, gates_for_rule(rule, c.active, similarity, tau or run.setup.tau, seed),
                          run.args.tokens)[0] for rule in rules}


@torch.no_grad()
def update_gram(model):
    """Inner products of the experts' updates, <ΔW_e, ΔW_f> summed over layers: (E, E), fp64.

    No dense matrix is built: with A (r, in) and B (r, out), <B_e A_e, B_f A_f> = Σ_ij (B_e B_f^T)_ij (A_e A_f^T)_ij.
    Norms are the roots of the diagonal, and the mixture's norm under a gate w is the root of w G w.
    """
    total = 0
    for layer in expert_layers(model).values():
        A, B = layer.A.flatten(0, 1).double(), layer.B.flatten(0, 1).double()            # (E·r, in), (E·r, out)
        products = ((A @ A.T) * (B @ B.T)).unflatten(0, layer.A.shape[:2]).unflatten(2, layer.A.shape[:2])
        total += layer.scale ** 2 * products.sum((1, 3)).cpu()
    return total


def pole_losses(run, args):
    """-> test records with one active pole, which one that is (N,), and nats/token of expert e alone on those of pole p
    as (E, E), NaN where there are none."""
    records, _ = run.records(limit=args.records)
    records = [record for record in records if sum(map(abs, record["traits"].values())) == 1]
    rows, _ = make_rows(records, run.chat)
    poles, table = np.array([int(row.active.argmax()) for row in rows]), np.full((len(EXPERTS),) * 2, math.nan)
    for e in range(len(EXPERTS) if rows else 0):
        nats, counts = evaluation_loss(run.model, rows, one_hot_gate(e).expand(len(rows), -1), args.tokens)
        for p in set(poles):
            table[e, p] = nats[poles == p].sum() / counts[poles == p].sum()
    return records, poles, table


def domain_subsets(new_domain):
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
