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
from router import active_experts, decaying_mean, gates_for_rule, persona_gate, raw_gate, softmax_gate
from support.chat import Chat, load_tokenizer
from support.command import pick_device, pick_dtype
from support.files import UserError, read_json
from support.records import check_record, is_for_each_expert, load_data, messages_of
from support.rows import make_rows
from support.runs import Setup, fingerprint, read_run
from train import evaluation_loss, score_queries


# ----------------------------------------------------------------------------------------------------------------------
# Options that several commands have

@dataclass(kw_only=True)
class RunOptions:
    run: str = "runs/paper"
    """Run folder that train.py made."""
    stage: typing.Literal["warmup", "joint"] | None = None
    """Stage whose experts to use: warmup (with the router stage's router) or joint (with joint's router). Default: the
    latest stage that is finished."""
    base: str | None = None
    """The base's model folder, if it has moved."""
    encoder: str | None = None
    """The encoder's model folder, if it has moved."""
    experts: str | None = None
    """Use experts that PEFT or another run trained: a folder that holds one PEFT folder for each expert."""
    router: str | None = None
    """Use another run's router: its router/router or joint/router folder."""
    device: str | None = None
    """cpu, cuda or cuda:N. Default: a GPU if there is one."""
    dtype: typing.Literal["float32", "bfloat16"] | None = None
    """Data type of the base's weights. Default: bfloat16 on a GPU, float32 on a CPU."""
    int8: bool | None = None
    """Keep the weights of the base's linear layers in 8 bits, or with --no-int8 in full. Default: as when the experts
    were trained, or as in --run if no run trained them."""
    seed: int = 0
    """Seed of random and shuffled gates, of bootstraps and of sampling."""
    tau: float | None = None
    """Temperature τ of the gate. Default: the joint stage's, or 1.0 without a joint stage."""
    tokens: int = 4096
    """Maximum number of tokens in a batch, padding included."""


@dataclass(kw_only=True)
class RecordOptions(RunOptions):
    data: str | None = None
    """Measure on other records than the run's: a .jsonl file or a folder, as for train.py."""
    records: int | None = None
    """Number of test records. Default: all."""


@dataclass(kw_only=True)
class GateOptions(RunOptions):
    persona: str | None = None
    """Set the gate by traits, through the router's softmax: O+,E-:0.5 is open and, half as strongly, introverted."""
    gate: str | None = None
    """Set the gate's weights: ten numbers with commas between, or names as in high_openness:0.7,low_neuroticism:0.3."""

    def __post_init__(self):
        given = [f"--{key}" for key in ("persona", "gate", "user") if getattr(self, key, None)]
        if len(given) > 1:
            raise UserError(f"{' and '.join(given[:2])} both set the gate: choose one")


@dataclass(kw_only=True)
class UserOptions(GateOptions):
    user: str | None = None
    """Shift the router's gate towards what a person likes: the user.json that eval.py feedback wrote."""


# ----------------------------------------------------------------------------------------------------------------------
# A run

TRAINED_ON = {"experts": "base", "router": "encoder"}  # {what is trained: the model that it is trained on}


class LoadedRun:
    """A run opened for measuring. Models, tokenizer and data are loaded when a command first uses them."""

    def __init__(self, args):
        run = Path(args.run)
        if not (run / "config.json").exists():
            raise UserError(f"{run}: no config.json, so there is no run here; python train.py --preset tiny makes one")
        self.args = args
        config = read_run(run)
        stored = {key: Setup.restore_path(config["setup"][key], run) for key in ("base", "encoder", "data")}
        self.training_data = stored["data"]
        in_use = {key: getattr(args, key, None) or path for key, path in stored.items()}
        device = pick_device(args.device)
        self.setup = Setup(
            run=run, device=device, dtype=pick_dtype(args.dtype, device), tokens=args.tokens,
            tau=args.tau or config["stages"].get("joint", {}).get("tau", 1.0),
            eval_records=0,  # only for train.py's closing table, which is not printed here
            **(config["setup"] | in_use))
        # A run without a base or an encoder takes that of the run that --experts or --router comes from.
        for part, role in TRAINED_ON.items():
            if getattr(self.setup, role) is None and (trained_by := self.run_of(part)):
                folder, known = trained_by
                setattr(self.setup, role, Setup.restore_path(known["setup"][role], folder))
        self.likes = read_likes(args.user) if getattr(args, "user", None) else torch.zeros(len(EXPERTS))  # (E,), b
        if args.experts:
            self.setup.rank, self.setup.alpha = adapter_shape(args.experts)
        if args.int8 is not None:
            self.setup.int8 = args.int8
        elif trained_by := self.run_of("experts"):
            self.setup.int8 = trained_by[1]["setup"]["int8"]

    def folder(self, part):
        """Returns the folder of the "experts" or the "router" to measure. UserError if they are not trained yet."""
        given = getattr(self.args, part)
        if given:
            return Path(given)
        first = "warmup" if part == "experts" else "router"
        stage = first if self.args.stage == "warmup" else self.args.stage
        folder = self.setup.run / stage / part if stage else self.setup.stage_folder(part)
        if folder is None or not folder.is_dir():
            raise UserError(f"{self.setup.run} has no {part} of stage {stage or first} yet: python train.py "
                            f"--preset {self.setup.preset} --stage {stage or first} --run {self.setup.run}")
        return folder

    def stage_of(self, part):
        """Returns the stage that trained the "experts" or the "router". None if --experts or --router gives a folder,
        which can come from anywhere."""
        return None if getattr(self.args, part) else self.folder(part).parent.name

    def origin(self, part):
        """Returns where the "experts" or the "router" come from, as titles name it: "experts after joint", or
        "experts: DIR" for a folder that was given."""
        stage = self.stage_of(part)
        return f"{part} after {stage}" if stage else f"{part}: {self.folder(part)}"

    def run_of(self, part):
        """Returns the run that trained the "experts" or the "router", and its config.json. None if no run did, as for
        experts that PEFT trained elsewhere."""
        given = getattr(self.args, part)
        run = Path(given).resolve().parent.parent if given else self.setup.run  # given: RUN/STAGE/experts
        try:
            return run, read_run(run)
        except UserError:
            return None

    def model_folder(self, part):
        """Returns the base's or the encoder's folder, on which the "experts" or the "router" were trained. UserError if
        it is not known or not there."""
        role = TRAINED_ON[part]
        folder = getattr(self.setup, role)
        if folder is None:
            raise UserError(f"{self.setup.run} has no {role}: give --{role}, the folder of the model that "
                            f"{self.folder(part)} was trained on")
        if not Path(folder).is_dir():
            raise UserError(f"{folder}: no such folder, expected the {role}'s. --{role} names it, if it has moved")
        return folder

    def checked_folder(self, part):
        """Returns the folder of the "experts" or the "router" to measure. UserError if the experts were trained on
        another base, or the router on another encoder.

        --base and --encoder can name any folder, and a wrong model of the same shape would load without an error. The
        run that trained the part has a fingerprint of its model. Experts that PEFT trained elsewhere are not checked.
        """
        role, folder, trained_by = TRAINED_ON[part], self.folder(part), self.run_of(part)
        model = self.model_folder(part)
        known = trained_by and trained_by[1]["fingerprints"].get(role)
        if known and fingerprint(model) != known:
            raise UserError(f"{model}: not the {role} that {getattr(self.args, part) or self.setup.run} was trained "
                            f"on: its config.json, tokenizer or tensors differ. --{role} names the folder, if it has "
                            "moved")
        return folder

    @cached_property
    def model(self):
        """The base with its experts."""
        return self.setup.load_base(self.checked_folder("experts"))

    @cached_property
    def chat(self):
        """The base's chat format and tokenizer."""
        return Chat.from_dir(self.model_folder("experts"))

    @cached_property
    def router(self):
        """The router at the temperature τ of this measurement."""
        return self.setup.load_router(self.checked_folder("router"))

    @cached_property
    def tokenizer(self):
        """The encoder's tokenizer."""
        return load_tokenizer(self.model_folder("router"))

    def records(self, split="test", need_response=True, limit=None):
        """Returns the first `limit` records of a split, and a mask (N,): True where a record's domain was held out.

        A domain is held out if the run was not trained on any record of it. With --data, this takes the training
        records that the run's config.json names; if they are gone, no domain counts as held out.
        """
        splits = self.setup.load_data(need_response, needed=[split])
        records = splits[split][:limit]
        training = splits["train"]
        if getattr(self.args, "data", None):
            try:
                training = load_data(self.training_data, self.setup.seed, False, ["train"])[0]["train"]
            except UserError:
                return records, np.zeros(len(records), dtype=bool)
        seen = {None} | {record.get("domain") for record in training}  # a record may have no domain
        return records, np.array([record.get("domain") not in seen for record in records])

    def rows(self, records):
        """Returns records as rows for the router alone."""
        return make_rows(records, tokenizer=self.tokenizer)[0]

    def similarity(self, records):
        """Returns the router's cosines (N, E) for records, which need no traits. A history is read as in training."""
        rows = self.rows([record | {"traits": {}} for record in records])
        return score_queries(self.router, rows, self.args.tokens)

    def gate_of(self, similarity):
        """Returns the gates (N, E) of cosines (N, E), shifted by what --user likes: softmax((s + b) / τ)."""
        return softmax_gate(similarity + self.likes, self.setup.tau)

    def chat_similarity(self, records):
        """Returns the similarities (N, E) that set the gates of replies: the decaying mean of the cosines of each
        record's messages by the user, the query last. Empty messages are left out."""
        messages = [[turn["content"] for turn in messages_of(record)
                     if turn["role"] == "user" and turn["content"].strip()] for record in records]
        alone = self.similarity([{"id": "", "query": text} for texts in messages for text in texts])
        return torch.stack([decaying_mean(part) for part in alone.split([len(texts) for texts in messages])])

    def gates(self, records):
        """Returns the router's gates (N, E) for replies to records, which need no traits."""
        return self.gate_of(self.chat_similarity(records))


def load_run(args, folder, stage=None):
    """Returns the run in `folder`, opened with the other arguments of `args`. Experts and router are its own.

    If that is the run of `args`, but --experts or --router gave others, then --base and --encoder name the models of
    those. The run's own parts use them only if they were trained on the same.
    """
    own, known = {}, read_run(folder)["fingerprints"] if Path(folder) == Path(args.run) else {}
    for part, role in TRAINED_ON.items():
        model = getattr(args, role)
        if model and getattr(args, part) and role in known and fingerprint(model) != known[role]:
            own[role] = None
    return LoadedRun(replace(args, run=str(folder), stage=stage, experts=None, router=None, **own))


LARGEST_LIKE = 0.5  # ours: a cosine; support/feedback.py says why
USER = {"likes": (lambda b: is_for_each_expert(b, -LARGEST_LIKE, LARGEST_LIKE),  # as FIELDS in support/records.py
                  f"a number from {-LARGEST_LIKE} to {LARGEST_LIKE} for each expert's name")}


def read_likes(path):
    """Returns b (E,) from a user.json. UserError if it is none."""
    user = read_json(path)
    if problem := check_record(user, USER, USER):
        raise UserError(f"{path}: {problem}")
    return torch.tensor([float(user["likes"][expert]) for expert in EXPERTS])


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

def load_split(run, name="test", limit=None):
    """Returns a split with all that gate rules and comparisons need.

    Its fields are records and rows (encoded for base and encoder), active (N, E) of 0 and 1, counts (N,) of the
    replies' tokens, and new_domain (N,), the mask of LoadedRun.records.
    """
    records, new_domain = run.records(name, limit=limit)
    rows, _ = make_rows(records, run.chat, run.tokenizer)
    return SimpleNamespace(records=records, rows=rows, active=torch.stack([row.active for row in rows]),
                           counts=np.array([float(row.n_supervised) for row in rows]),
                           new_domain=new_domain)


def losses(run, split, rules, tau=None, seed=0, similarity=None):
    """Returns {rule: nats (N,)}, the loss of every reply under each gate rule, summed over its tokens.

    split: what load_split returns. similarity: the router's cosines (N, E), if they are known already.
    """
    if similarity is None and {"learned", "shuffled"} & {*rules}:
        similarity = score_queries(run.router, split.rows, run.args.tokens)
    found = {}
    for rule in rules:
        gates = gates_for_rule(rule, split.active, similarity, tau or run.setup.tau, seed)
        found[rule], _ = evaluation_loss(run.model, split.rows, gates, run.args.tokens)
    return found


def one_pole_only(active):
    """Returns the indices of the records that call for one pole only, and these poles: (M,) and (M,), numpy.
    active: (N, E) of 0 and 1."""
    numbers = (active.sum(-1) == 1).nonzero()[:, 0]
    return numbers.numpy(), active[numbers].argmax(-1).numpy()


def pole_losses(run, args):
    """Measure each expert alone on the test records that call for one pole only.

    Returns these records, the pole (M,) of each, and a table (E, E): nats/token of expert e on the records of pole p,
    NaN where there are none.
    """
    records, _ = run.records(limit=args.records)
    numbers, poles = one_pole_only(torch.stack([active_experts(record["traits"]) for record in records]))
    records = [records[i] for i in numbers]
    table = np.full((len(EXPERTS), len(EXPERTS)), math.nan)
    if not records:
        return records, poles, table
    rows, _ = make_rows(records, run.chat)
    for e in range(len(EXPERTS)):
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

def average_precision(scores, relevant):
    """Returns the mean, over the relevant items, of the precision at their rank. NaN if nothing is relevant.

    scores (N,), relevant (N,) of 0 and 1. Among equal scores the irrelevant items count as ranked first, so that a
    router that cannot tell queries apart gains nothing from ties.
    """
    order = np.lexsort((relevant, -scores))
    hits = relevant[order]
    precision = hits.cumsum() / np.arange(1, len(hits) + 1)
    return float((precision * hits).sum() / hits.sum()) if hits.any() else math.nan


def pole_precision(scores, active):
    """Returns each expert's average precision over the messages, (E,). scores, active of 0 and 1: (N, E), numpy."""
    return np.array([average_precision(s, a) for s, a in zip(scores.T, active.T)])


def message_precision(scores, active):
    """Returns each message's average precision over the experts, (N,): 1 where its poles are the most similar ones.

    Unlike that of an expert, it is a value for each record, so that bootstrap and culture_gap can take it.
    scores, active of 0 and 1: (N, E), numpy.
    """
    return np.array([average_precision(s, a) for s, a in zip(scores, active)])


def cultures_of(records):
    """Returns the culture that each record names, (N,), or ""."""
    return np.array([str(record.get("culture") or "") for record in records])


def subsets(new_domain, records=()):
    """Returns [(name, record numbers)]: all records; if there are both, those of seen and of held-out domains; and if
    the records name two or more cultures, those of each, and those that name none."""
    parts = [("all", np.arange(len(new_domain)))]
    if new_domain.any() and not new_domain.all():
        parts += [("domains seen in training", np.flatnonzero(~new_domain)),
                  ("domains held out", np.flatnonzero(new_domain))]
    cultures = cultures_of(records)
    if len({*cultures} - {""}) >= 2:
        parts += [(f"culture: {name or 'none named'}", np.flatnonzero(cultures == name))
                  for name in sorted({*cultures}, key=lambda name: (not name, name))]
    return parts


def culture_gap(values, counts, records, what, seed=0, n=2000):
    """Returns a sentence: which cultures have the lowest and the highest weighted mean of values (N,), called `what`,
    and whether cultures differ by more than chance. "" if the records name fewer than two.

    The test permutes which record is of which culture, among records of the same situation (`of`, where records have
    it). It compares Σ_c counts_c (mean_c − mean)². counts (N,): the weights, as for bootstrap.
    """
    cultures = cultures_of(records)
    names, labels = np.unique(cultures[cultures != ""], return_inverse=True)
    if len(names) < 2:
        return ""
    values, counts = values[cultures != ""], counts[cultures != ""]
    situation = np.array([str(record.get("of") or "") for record in records])[cultures != ""]
    order, rng = np.argsort(situation, kind="stable"), np.random.default_rng(seed)

    def means_and_spread(labels):
        weights = np.bincount(labels, counts)
        means = np.bincount(labels, values) / weights
        return means, float((weights * (means - values.sum() / counts.sum()) ** 2).sum())

    means, found = means_and_spread(labels)
    at_least = 1  # the cultures as they are
    for _ in range(n):
        permuted = np.empty_like(labels)
        permuted[order] = labels[np.lexsort((rng.random(len(labels)), situation))]
        at_least += means_and_spread(permuted)[1] >= found * (1 - 1e-9)  # rounding: the same gap in another order
    p, low, high = at_least / (n + 1), means.argmin(), means.argmax()
    return (f"{what} by culture: from {means[low]:.4f} ({names[low]}) to {means[high]:.4f} ({names[high]}). Cultures "
            f"differ by {'more than' if p < 0.05 else 'no more than'} chance (permutation test, p = {p:.4f}).")


def bootstrap(difference, counts, seed=0, n=2000, clusters=None):
    """Returns (mean, low, high), floats: the weighted mean difference and its 95 % interval from a paired bootstrap.

    difference (N,): for each record, usually its nats under one gate minus those under another. counts (N,): the
    weights, such as its tokens, for a mean per token, or ones. clusters (N,): what is drawn together, such as the
    situation that several records tell.
    """
    if clusters is not None:
        numbers = np.unique(clusters, return_inverse=True)[1]
        difference, counts = np.bincount(numbers, difference), np.bincount(numbers, counts)
    rng = np.random.default_rng(seed)
    size = len(counts)
    drawn = [rng.integers(0, size, size) for _ in range(n)]
    means = [difference[i].sum() / counts[i].sum() for i in drawn]
    return float(difference.sum() / counts.sum()), *np.percentile(means, (2.5, 97.5)).tolist()


def situations(records):
    """Returns what `bootstrap` draws together, (N,): the record that a record retells (`of`), or else itself."""
    return np.array([str(record["id"] if record.get("of") is None else record["of"]) for record in records])
