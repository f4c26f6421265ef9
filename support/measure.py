"""What all commands that measure share: an opened run, its test records, gates, losses and confidence intervals."""
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
from support.rows import make_rows, n_tokens
from support.runs import Setup, fingerprint, read_run
from train import evaluation_loss, score_queries


# ----------------------------------------------------------------------------------------------------------------------
# Options that several commands have

@dataclass(kw_only=True)
class RunOptions:
    run: str = "runs/paper"
    """Run folder that train.py made."""
    stage: typing.Literal["warmup", "joint"] | None = None
    """Whose experts to use: warmup's (with the router stage's router) or joint's (with joint's router). The latest
    stage if not given."""
    base: str | None = None
    """The base's model folder, if it has moved."""
    encoder: str | None = None
    """The encoder's model folder, if it has moved."""
    experts: str | None = None
    """Use experts that PEFT or another run trained: a folder that holds one PEFT folder for each expert."""
    router: str | None = None
    """Use another run's router: its router/router or joint/router folder."""
    device: str | None = None
    """cpu, cuda or cuda:N. A GPU if there is one, if not given."""
    dtype: typing.Literal["float32", "bfloat16"] | None = None
    """Data type of the base's weights. bfloat16 on a GPU and float32 on a CPU, if not given."""
    seed: int = 0
    """Seed of random and shuffled gates, of bootstraps and of sampling."""
    tau: float | None = None
    """τ of the gate. The joint stage's τ, or 1.0 without a joint stage, if not given."""
    tokens: int = 4096
    """Most tokens in a batch, padding included."""


@dataclass(kw_only=True)
class RecordOptions(RunOptions):
    data: str | None = None
    """Measure on other records than the run's: a .jsonl file or a folder, as for train.py."""


@dataclass(kw_only=True)
class GateOptions(RunOptions):
    persona: str | None = None
    """Set the gate by traits, through the router's softmax: O+,E-:0.5 is open and, half as strongly, introverted."""
    gate: str | None = None
    """Set the gate's weights: ten numbers with commas between, or names as in high_openness:0.7,low_neuroticism:0.3."""

    def __post_init__(self):
        if self.persona and self.gate:
            raise UserError("--persona and --gate both set the gate: choose one")


# ----------------------------------------------------------------------------------------------------------------------
# A run

class LoadedRun:
    """A run opened for measuring. Models, tokenizer and data are loaded when a command first uses them."""

    def __init__(self, args):
        run = Path(args.run)
        if not (run / "config.json").exists():
            raise UserError(f"{run}: no config.json, so there is no run here; python train.py --preset tiny makes one")
        found, self.args = read_run(run), args
        own = found["setup"] | {k: getattr(args, k, None) or Setup.from_config(found["setup"][k], run)
                                for k in ("base", "encoder", "data")}
        device = pick_device(args.device)
        self.setup = Setup(
            run=run, device=device, dtype=pick_dtype(args.dtype, device), tokens=args.tokens,
            tau=args.tau or found["stages"].get("joint", {}).get("tau", 1.0), eval_records=0, **own)
        if args.experts:
            self.setup.rank, self.setup.alpha = adapter_shape(args.experts)

    def folder(self, part):
        """Returns the folder of the "experts" or the "router" to measure. UserError if they are not trained yet."""
        if getattr(self.args, part):
            return Path(getattr(self.args, part))
        first = "warmup" if part == "experts" else "router"
        stage = {None: None, "warmup": first, "joint": "joint"}[self.args.stage]
        folder = self.setup.run / stage / part if stage else self.setup.stage_folder(part)
        if folder is None or not folder.is_dir():
            raise UserError(f"{self.setup.run} has no {part} of stage {stage or first} yet: python train.py "
                            f"--preset {self.setup.preset} --stage {stage or first} --run {self.setup.run}")
        return folder

    def stage_of(self, part):
        """Returns the name of the stage that trained the "experts" or the "router"."""
        return self.folder(part).parent.name

    def check_trained_on(self, role, part):
        """UserError if the experts were trained on another base, or the router on another encoder.

        --base and --encoder can name any folder, and a wrong model of the same shape would load without an error. The
        run that trained the part has a fingerprint of its model. Experts that PEFT trained elsewhere are not checked.
        """
        folder, given = getattr(self.setup, role), getattr(self.args, part)
        run = Path(given).resolve().parent.parent if given else self.setup.run  # given: RUN/STAGE/experts
        try:
            known = read_run(run)["fingerprints"].get(role)
        except UserError:
            known = None  # not in a run folder
        if known and fingerprint(folder) != known:
            raise UserError(f"{folder}: not the {role} that {given or run} was trained on: its config.json, tokenizer "
                            f"or tensors differ. --{role} names the folder, if it has moved")

    @cached_property
    def model(self):
        """The base with its experts."""
        folder = self.folder("experts")
        self.check_trained_on("base", "experts")
        return self.setup.load_base(folder)

    @cached_property
    def chat(self):
        """The base's chat format and tokenizer."""
        self.folder("experts")  # a run without experts may have no base either
        return Chat.from_dir(self.setup.base)

    @cached_property
    def router(self):
        folder = self.folder("router")
        self.check_trained_on("encoder", "router")
        return self.setup.load_router(folder)

    @cached_property
    def tokenizer(self):
        """The encoder's tokenizer."""
        self.folder("router")  # a run without a router may have no encoder either
        return load_tokenizer(self.setup.encoder)

    def records(self, split="test", need_response=True, limit=None):
        """Returns the records of a split, and a mask (N,) that is True where training never saw the record's domain."""
        splits = self.setup.load_data(need_response)
        records, known = splits[split][:limit], {record.get("domain") for record in splits["train"]}
        return records, np.array([record.get("domain") not in known for record in records])

    def rows(self, records):
        """Returns records as rows for the router alone."""
        return make_rows(records, tokenizer=self.tokenizer)[0]

    def gates(self, records):
        """Returns the router's gates (N, E) for records, which need no traits."""
        rows = self.rows([record | {"traits": {}} for record in records])
        return softmax_gate(score_queries(self.router, rows, self.args.tokens), self.setup.tau)


def load_run(args, folder, stage=None):
    """Returns the run in `folder`, opened with the other arguments of `args`."""
    return LoadedRun(replace(args, run=str(folder), stage=stage))


def gate_from_options(run, args):
    """Returns the gate (1, E) that --persona or --gate sets, or None if neither is given."""
    if args.persona:
        return persona_gate(args.persona, run.setup.tau)[None]
    if not args.gate:
        return None
    gate = raw_gate(args.gate)
    if gate.max() > 0.999 and run.stage_of("experts") == "joint":
        print("note: joint training made the experts work together. One alone is far from what they were\n"
              "trained for; --stage warmup has experts that were trained alone", file=sys.stderr)
    return gate


def one_hot_gate(expert):
    """Returns a gate (1, E) with all the weight on one expert."""
    return torch.eye(len(EXPERTS))[expert:expert + 1]


# ----------------------------------------------------------------------------------------------------------------------
# Losses

def load_cases(run, split="test", limit=None):
    """Returns a split as rows for base and encoder, with what gate rules and comparisons need:
    records, rows, active (N, E), counts of reply tokens (N,), and new_domain (N,) as LoadedRun.records has it."""
    records, new_domain = run.records(split, limit=limit)
    rows, _ = make_rows(records, run.chat, run.tokenizer)
    return SimpleNamespace(records=records, rows=rows, active=torch.stack([row.active for row in rows]),
                           counts=np.array([float(n_tokens(row) - row.prompt) for row in rows]),
                           new_domain=new_domain)


def losses(run, cases, rules, tau=None, seed=0):
    """Returns {rule: nats (N,)}, the loss of every reply under each gate rule, summed over its tokens."""
    similarity, tau = score_queries(run.router, cases.rows, run.args.tokens), tau or run.setup.tau
    return {rule: evaluation_loss(run.model, cases.rows, gates_for_rule(rule, cases.active, similarity, tau, seed),
                                  run.args.tokens)[0] for rule in rules}


def pole_losses(run, args):
    """Measures each expert alone on the test records that call for one pole only.

    Returns these records, the pole (N,) of each, and a table (E, E): nats/token of expert e on the records of pole p,
    NaN where there are none.
    """
    records, _ = run.records(limit=args.records)
    records = [record for record in records if sum(map(abs, record["traits"].values())) == 1]
    rows, _ = make_rows(records, run.chat)
    poles = np.array([int(row.active.argmax()) for row in rows])
    table = np.full((len(EXPERTS), len(EXPERTS)), math.nan)
    for e in range(len(EXPERTS) if rows else 0):
        nats, counts = evaluation_loss(run.model, rows, one_hot_gate(e).expand(len(rows), -1), args.tokens)
        for p in set(poles):
            table[e, p] = nats[poles == p].sum() / counts[poles == p].sum()
    return records, poles, table


@torch.no_grad()
def update_gram(model):
    """Returns the inner products of the experts' updates, ⟨ΔW_e, ΔW_f⟩ summed over all layers: (E, E), fp64.

    No dense matrix is built. With A (r, in) and B (r, out):  ⟨ΔW_e, ΔW_f⟩ = (α/r)² Σ_ij (B_e B_fᵀ)_ij (A_e A_fᵀ)_ij.
    The root of the diagonal is the experts' norms, and the root of w G w the norm of the mixture under a gate w.
    """
    total = 0
    for layer in expert_layers(model).values():
        A, B = layer.A.flatten(0, 1).double(), layer.B.flatten(0, 1).double()            # (E·r, in), (E·r, out)
        products = ((A @ A.T) * (B @ B.T)).unflatten(0, layer.A.shape[:2]).unflatten(2, layer.A.shape[:2])
        total += layer.scale ** 2 * products.sum((1, 3)).cpu()                           # (E, r, E, r) -> (E, E)
    return total


# ----------------------------------------------------------------------------------------------------------------------
# Comparisons

def domain_subsets(new_domain):
    """Returns [(name, record numbers)]: all records, then those of seen and of held-out domains if there are both."""
    parts = [("all", np.arange(len(new_domain)))]
    if new_domain.any() and not new_domain.all():
        parts += [("domains seen in training", np.flatnonzero(~new_domain)),
                  ("domains held out", np.flatnonzero(new_domain))]
    return parts


def bootstrap(difference, counts, seed=0, n=2000):
    """Paired bootstrap over records. difference (N,): nats of a record under one gate minus those under another;
    counts (N,): its tokens. Returns (mean per token, low, high), a 95 % interval."""
    rng, size = np.random.default_rng(seed), len(counts)
    drawn = [rng.integers(0, size, size) for _ in range(n)]
    means = [difference[i].sum() / counts[i].sum() for i in drawn]
    return difference.sum() / counts.sum(), *np.percentile(means, (2.5, 97.5))
