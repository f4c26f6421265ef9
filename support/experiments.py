"""The command experiment: is it the method that helps, and which part of it? Eight questions, one function for each.

    python eval.py experiment routing --run runs/tiny   # or temperature, rank, domain, stages, baselines, cues, turns

- An experiment trains variants of a run, measures their loss under gate rules and compares them.
- A variant is a run folder in RUN/experiments/. It differs from the run in a few settings and links to everything else.
- A finished variant is never trained again, so an experiment can be stopped at any time and started again.
"""
import hashlib
import json
import math
import os
import textwrap
import time
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from lora import EXPERTS, SHORT_NAMES, TRAITS, expert_layers, save_experts
from model import Config
from router import active_experts, gate_statistics, persona_gate, save_router, softmax_gate
from support.baselines import base_alone, warmup_experts
from support.checkpoints import read_log
from support.files import UserError, atomic, read_json, read_lines
from support.measure import (RunOptions, LoadedRun, bootstrap, load_run, load_split, losses, message_precision,
                             one_hot_gate, one_pole_only, pole_precision, subsets, update_gram)
from support.records import read_records, write_records
from support.runs import STAGES, Setup, read_run, unfinished_stages, write_config
from support.tables import print_table
from synth import from_templates, signatures
import train
from train import evaluation_loss, generate_replies, score_queries


@dataclass(kw_only=True)
class Experiment(RunOptions):
    names: list[str]
    """One or several of routing, temperature, rank, domain, stages, baselines, cues and turns."""
    seeds: int | None = None
    """Number of seeds: the run's own, and others with another order of the data and other initial values. Default: 3
    for routing and temperature, 1 for rank and stages. domain, baselines, cues and turns take the run alone."""
    records: int | None = None
    """Number of test records, and of validation records. Default: all."""
    again: bool = False
    """Measure again what experiments/NAME/results.json holds. Finished variants are not trained again."""


# ----------------------------------------------------------------------------------------------------------------------
# Variants of a run

def start_variant(folder, source, config, kept, data, changes):
    """Make the run folder of a variant: links to models, data and the stages `kept` of `source`, and a config.json."""
    setup = config["setup"] | {k: v for k, v in changes.items() if k in Setup.SHARED}
    fingerprints = {k: v for k, v in config["fingerprints"].items() if k != "data" or not data}
    with atomic(folder) as part:
        part.mkdir()
        for split, records in (data or {}).items():
            setup["data"] = f"{Setup.INSIDE}records"
            write_records(part / "records" / f"{split}.jsonl", records)
        for name in ("models", "data", "records", *kept):
            if (source / name).is_dir() and not (part / name).exists():
                (part / name).symlink_to(os.path.relpath((source / name).resolve(), folder.resolve()))
        write_config(part, config | {"setup": setup, "stages": kept, "fingerprints": fingerprints})


def variant(args, source, name, stages, untrained=(), data=None, **changes):
    """Train `stages` in the run folder RUN/experiments/<name>, and return that folder.

    Settings, models, records and all other finished stages are those of the run `source`, with these exceptions:
    changes: settings that differ.
    untrained: stages that are not trained. Their experts or router are saved as they are initialised.
    data: {split: records} to use in place of the source's.

    If joint is the only stage to train and nothing would differ from the source's, the folder is `source` itself.
    """
    folder, config = Path(args.run) / "experiments" / name, read_run(source)
    settings = config["stages"].get("joint", {}) | config["setup"]
    if [*stages] == ["joint"] and not untrained and all(settings.get(k) == v for k, v in changes.items()):
        return source
    kept = {stage: s for stage, s in config["stages"].items() if stage not in (*stages, *untrained, "joint")}
    models = {role: getattr(args, role) or config["setup"][role] for role in ("base", "encoder")}  # they may have moved
    if not (folder / "config.json").exists():
        start_variant(folder, source, config, kept, data, changes)
    stored = read_run(folder)
    if any(stored["stages"].get(stage) != s for stage, s in kept.items()):
        raise UserError(f"{folder} was made from other stages than {source} has now: remove it to train it again")
    if stored["setup"] | models != stored["setup"]:
        write_config(folder, stored | {"setup": stored["setup"] | models})

    setup = load_run(args, folder).setup
    for stage in untrained:
        if not (folder / stage).is_dir():
            with atomic(folder / stage) as part:
                if stage == "warmup":
                    save_experts(setup.load_base(), part / "experts", setup.base)
                else:
                    save_router(setup.load_router(), part / "router")
    for stage in stages:
        print(f"{'done' if (folder / stage).is_dir() else 'training'}: {folder}, {stage}", flush=True)
        options = config["stages"].get(stage, {}) | {k: getattr(setup, k) for k in (*Setup.SHARED, "device")} | changes
        options |= {"run": folder, "stage": stage, "resume": True, "log_every": 2**30,  # prints only the last step
                    "int8": stored["setup"]["int8"]}  # as its source, however it is measured
        if args.dtype:
            options["dtype"] = args.dtype
        command = [f"--{k.replace('_', '-')}" + ("" if v is True else f"={v}") for k, v in options.items()
                   if v is not None and v is not False]
        if train.main(command, show_results=False):
            raise KeyboardInterrupt  # training was stopped, so the experiment stops as well
    return folder


def seeded(args, default=1):
    """Yield (seed, folder) of the run, then of variants trained from other seeds on the same models and records."""
    run = LoadedRun(args)
    for seed in range(run.setup.seed, run.setup.seed + (args.seeds or default)):
        yield seed, Path(args.run) if seed == run.setup.seed else variant(
            args, Path(args.run), f"seed-{seed}", STAGES, data=run.setup.load_data(), seed=seed)


# ----------------------------------------------------------------------------------------------------------------------
# Losses compared

def loss_of(args, folder, stage, split, rule="learned"):
    """Returns the nats (N,) of every reply under one gate rule, with a run's experts of `stage`."""
    return losses(load_run(args, folder, stage), split, [rule], seed=args.seed)[rule]


def mean_and_std(values):
    """Returns [mean, standard deviation over seeds], a cell of a table."""
    return [float(np.mean(values)), float(np.std(values))]


def compared(nats, split, reference, part=slice(None), seed=0):
    """Returns a table's rows, one for each method in `nats`, {method: [nats (N,) of each seed]}.

    A row has the method's name; its loss in nats/token, [mean, standard deviation over seeds]; and its loss minus that
    of the method `reference`, averaged over seeds, as [difference, low, high]. The interval is a bootstrap over the
    records. part: the numbers of the records to compare on.
    """
    rows, counts = [], split.counts[part]
    for name, of_seeds in nats.items():
        difference = (np.mean(of_seeds, 0) - np.mean(nats[reference], 0))[part]
        rows.append([name, mean_and_std([values[part].sum() / counts.sum() for values in of_seeds]),
                     "" if name == reference else bootstrap(difference, counts, seed)])
    return rows


def over_seeds(n):
    """Returns how a title explains the cells of `mean_and_std`."""
    return f"mean ± standard deviation over {n} seeds" if n > 1 else "one seed"


# ----------------------------------------------------------------------------------------------------------------------
# The eight experiments. Their docstrings are printed above the tables.

def routing_tables(args, run):
    """Is the router's gate worth more than other gates, on the experts before and after joint training?"""
    test, validation = load_split(run, "test", args.records), load_split(run, "validation", args.records)

    def alone(opened, split, e):
        return evaluation_loss(opened.model, split.rows, one_hot_gate(e).expand(len(split.rows), -1), args.tokens)[0]

    nats = {"warmup": defaultdict(list), "joint": defaultdict(list)}  # {stage: {gate: [nats (N,) of each seed]}}
    for seed, folder in seeded(args, 3):
        control = variant(args, folder, f"routing/control-{seed}", ["joint"], joint_gate="uniform")
        for stage in nats:
            opened = load_run(args, folder, stage)
            rules = "base", "uniform", "shuffled", "learned", "oracle", "labels"
            for rule, values in losses(opened, test, rules, seed=args.seed).items():
                nats[stage][rule].append(values)
            draws = [losses(opened, test, ["random"], seed=args.seed + draw)["random"] for draw in range(3)]
            nats[stage]["random"].append(np.mean(draws, 0))
            best = min(range(len(EXPERTS)), key=lambda e: alone(opened, validation, e).sum())
            nats[stage]["best single"].append(alone(opened, test, best))
        nats["joint"]["control"].append(loss_of(args, control, "joint", test, "uniform"))
    return [{"title": f"Experts after {stage}, tau {run.setup.tau:g}; {len(part)} test records, {name}: loss in "
                      f"nats/token ({over_seeds(len(of_gates['learned']))}), and its difference to the learned gate's "
                      "with a 95 % interval",
             "head": ["gate", "loss", "against learned"], "rows": compared(of_gates, test, "learned", part, args.seed)}
            for stage, of_gates in nats.items() for name, part in subsets(test.new_domain)]


TAUS = (1.0, 0.5, 0.2, 0.1, 0.05)
JOINT_STEPS = {"before joint": 0, "short joint": 1, "long joint": 3}  # in units of the run's own number of steps


def update_statistics(model, gates):
    """Returns what the experts' updates ΔW, and their mixtures under gates (N, E), are like:

    size: the mean norm of one expert's update.
    norm: the mean norm of the mixed update, divided by `size`.
    cos opp: the mean cosine between the updates of a trait's two poles.
    cos oth: the mean cosine between the updates of experts of different traits.
    """
    gram, gates, trait = update_gram(model), gates.double(), torch.arange(len(EXPERTS)) // 2
    size = gram.diagonal().sqrt()
    cosines = gram / size.outer(size).clamp(min=1e-30)
    opposite = (trait[:, None] == trait) & ~torch.eye(len(trait), dtype=bool)
    return {"size": size.mean().item(), "norm": ((gates @ gram * gates).sum(-1).sqrt().mean() / size.mean()).item(),
            "cos opp": cosines[opposite].mean().item(), "cos oth": cosines[trait[:, None] != trait].mean().item()}


def temperature_tables(args, run):
    """Which τ gives the lowest loss, before and after joint training? How good is a single expert then?"""
    test, validation = load_split(run, "test", args.records), load_split(run, "validation", args.records)
    one_pole, poles = one_pole_only(test.active)
    one_pole_rows = [test.rows[i] for i in one_pole]

    def one_pole_loss(nats):  # of the records with one active pole; NaN if there are none
        return nats.sum() / test.counts[one_pole].sum() if len(one_pole) else math.nan

    def measure(folder, stage, tau):
        opened = load_run(args, folder, stage)
        gates = softmax_gate(score_queries(opened.router, test.rows, args.tokens), tau)
        nats, valid = (losses(opened, split, ["learned"], tau)["learned"] for split in (test, validation))
        single, persona = (
            evaluation_loss(opened.model, one_pole_rows, gate_of_pole[poles], args.tokens)[0] for gate_of_pole in
            (torch.eye(len(EXPERTS)), torch.stack([persona_gate(name, tau) for name in SHORT_NAMES])))
        return gate_statistics(gates) | update_statistics(opened.model, gates) | {
            "nats": nats, "test": nats.sum() / test.counts.sum(), "valid.": valid.sum() / validation.counts.sum(),
            "router": one_pole_loss(nats[one_pole]), "single": one_pole_loss(single),
            "persona": one_pole_loss(persona)}

    measured = defaultdict(list)  # {(when, tau): [what `measure` returns for each seed]}
    for seed, folder in seeded(args, 3):
        own_steps = read_run(folder)["stages"]["joint"]["steps"]
        for tau in TAUS:
            before = measure(folder, "warmup", tau)
            measured["before joint", tau].append(before | {"grown": 1.0})
            for when in ("short joint", "long joint"):
                steps = own_steps * JOINT_STEPS[when]
                trained = variant(args, folder, f"temperature/tau-{tau:g}-steps-{steps}-seed-{seed}", ["joint"],
                                  tau=tau, steps=steps)
                after = measure(trained, "joint", tau)
                measured[when, tau].append(after | {"grown": after["size"] / before["size"]})

    def mean(when, tau, *keys):
        return [float(np.mean([of_seed[key] for of_seed in measured[when, tau]])) for key in keys]

    columns = ["entropy", "top1", "norm", "grown", "cos opp", "cos oth", "valid."]
    n_seeds = len(measured["before joint", TAUS[0]])
    tables = [{"title": f"{when.capitalize()}: entropy and top-1 mass of the gate; norm of the mixed update, divided "
                        "by that of one expert's; how many times larger one expert's has grown in joint training; "
                        "mean cosine of the updates of opposite poles and of other pairs; loss under the learned gate "
                        f"in nats/token on validation and test (test: {over_seeds(n_seeds)})",
               "head": ["tau", "entropy", "top-1", "norm", "grown", "cos opp", "cos oth", "valid.", "test"],
               "rows": [[f"{tau:g}", *mean(when, tau, *columns),
                         mean_and_std([of_seed["test"] for of_seed in measured[when, tau]])] for tau in TAUS]}
              for when in JOINT_STEPS]
    title = (f"The {len(one_pole)} test records with exactly one active pole: loss under the router's gate, with that "
             "pole's expert alone, and under a persona of that pole at the same tau")
    tables.append({"title": title if len(one_pole) else "No test record has exactly one active pole: an empty table",
                   "head": ["experts", "tau", "router", "single", "persona"],
                   "rows": [[when, f"{tau:g}", *mean(when, tau, "router", "single", "persona")]
                            for when in JOINT_STEPS for tau in TAUS] if len(one_pole) else []})
    best = {when: min(TAUS, key=lambda tau: mean(when, tau, "valid.")) for when in JOINT_STEPS}
    rows = []
    for when in JOINT_STEPS:
        two = {f"{when}, tau {tau:g}": [of_seed["nats"] for of_seed in measured[when, tau]]
               for tau in (1.0, best[when])}
        rows += compared(two, test, f"{when}, tau 1", seed=args.seed)
    tables.append({"title": f"Test loss ({over_seeds(n_seeds)}) at the tau that is best on validation, and its "
                            "difference to tau 1 with a 95 % interval",
                   "head": ["experts", "loss", "against tau 1"], "rows": rows})
    return tables


def rank_tables(args, run):
    """What does a larger rank cost, and what does it gain, if α/r stays the same?"""
    test, rows = load_split(run, "test", args.records), []
    for rank in (4, 8, 16):
        loss, speeds = defaultdict(list), []
        for seed, source in seeded(args):
            folder = variant(args, source, f"rank/rank-{rank}-seed-{seed}", ["warmup", "joint"], rank=rank,
                             alpha=run.setup.alpha / run.setup.rank * rank)
            for stage in ("warmup", "joint"):
                loss[stage].append(loss_of(args, folder, stage, test).sum() / test.counts.sum())
            logged = [entry.get("tokens_per_s") for _, entry in read_log(folder)]
            speeds += [speed for speed in logged if isinstance(speed, float)]
        experts = expert_layers(load_run(args, folder, "joint").model).values()
        rows.append([str(rank), sum(layer.A.numel() + layer.B.numel() for layer in experts),
                     f"{np.median(speeds):,.0f}" if speeds else "", *map(mean_and_std, loss.values())])
    return [{"title": f"Rank, alpha/r {run.setup.alpha / run.setup.rank:g}: parameters of all experts; median tokens/s "
                      f"of warm-up and joint training; loss under the learned gate in nats/token on {len(test.rows)} "
                      f"test records ({over_seeds(len(loss['joint']))})",
             "head": ["rank", "parameters", "tokens/s", "after warm-up", "after joint"], "rows": rows}]


def domain_tables(args, run):
    """How well does a run that was trained on one domain do on the others?"""
    test, splits = load_split(run, "test", args.records), run.setup.load_data()
    names = [name for name, _ in Counter(r["domain"] for r in splits["train"] if r.get("domain")).most_common(3)]
    if len(names) < 3:
        raise UserError(f"{run.setup.data}: the training records name {len(names)} domains, expected three or more")
    domains = np.array([record.get("domain") for record in test.records])
    parts = {name: domains == name for name in names}
    parts |= {"others": ~test.new_domain & ~np.isin(domains, names), "never seen": test.new_domain}
    parts = {name: part for name, part in parts.items() if part.any()}
    folders = {f"only {name}": variant(args, Path(args.run), f"domain/{i}-{name.replace('/', '-')}", STAGES, data={
        **splits, "train": [r for r in splits["train"] if r.get("domain") == name]}) for i, name in enumerate(names)}
    folders["all domains"] = Path(args.run)
    rules = "base", "learned", "shuffled"
    nats = {name: losses(load_run(args, folder, "joint"), test, rules, seed=args.seed)
            for name, folder in folders.items()}

    def table(title, nats_of_runs):
        return {"title": title, "head": ["trained on", *(f"{name} ({part.sum()})" for name, part in parts.items())],
                "rows": [[name, *(float(values[part].sum() / test.counts[part].sum()) for part in parts.values())]
                         for name, values in nats_of_runs.items()]}
    return [table("Loss in nats/token by the domain of the test records (their number), joint experts, learned gate",
                  {"nothing (base)": nats["all domains"]["base"]} | {name: of["learned"] for name, of in nats.items()}),
            table("What the router's gate is worth there: loss under another query's gate minus loss under its own",
                  {name: of["shuffled"] - of["learned"] for name, of in nats.items()})]


def stages_tables(args, run):
    """What is each stage worth, and what do λ, the contrastive loss's weight, and rehearsal change in joint?"""
    test, nats = load_split(run, "test", args.records), defaultdict(list)
    plans = {"no warm-up": dict(untrained=["warmup"]), "no router stage": dict(untrained=["router"]),
             "no rehearsal": dict(rehearse=0.0), "rehearse 0.1": dict(rehearse=0.1),
             "rehearse 0.5": dict(rehearse=0.5), "lambda 0": dict(lam=0.0), "lambda 0.1": dict(lam=0.1),
             "lambda 1": dict(lam=1.0)}
    for seed, source in seeded(args):
        nats["all stages"].append(loss_of(args, source, "joint", test))
        nats["no joint stage"].append(loss_of(args, source, "warmup", test))
        for name, plan in plans.items():
            folder = variant(args, source, f"stages/{name}-seed-{seed}".replace(" ", "-"), ["joint"], **plan)
            nats[name].append(loss_of(args, folder, "joint", test))
    return [{"title": f"Loss under the learned gate in nats/token on {len(test.rows)} test records "
                      f"({over_seeds(len(nats['all stages']))}), and its difference to the run with all stages with a "
                      "95 % interval", "head": ["", "loss", "against all stages"],
             "rows": compared(nats, test, "all stages", seed=args.seed)}]


def one_lora(args, run, splits):
    """Returns {method: nats (N,)} of one LoRA with as many parameters as ten experts. It is trained on as many rows, at
    the better of two learning rates.

    Ten experts under a fixed uniform gate are one LoRA of ten times the rank: with ten times the α, their sum
    Σ_e 1/10 · 10α/r · B_e A_e is α/r · B A, and gradient clipping and AdamW treat both alike. So the LoRA is trained as
    a variant and needs no extra code. A uniform gate does not use the router, so the encoder's layers are frozen, which
    saves time.
    """
    stages, nats = read_run(args.run)["stages"], {}
    n_layers = Config.from_dir(run.model_folder("router")).n_layers
    rows = sum(stages[stage]["steps"] * stages[stage]["batch"] for stage in ("warmup", "joint"))
    for lr in sorted({stages["warmup"]["lr"], stages["joint"]["lr"]}):
        folder = variant(args, Path(args.run), f"baselines/one-lora-lr-{lr:g}", ["joint"], untrained=["warmup"],
                         alpha=run.setup.alpha * len(EXPERTS), joint_gate="uniform", rehearse=0.0,
                         frozen_layers=n_layers, steps=rows // stages["joint"]["batch"], lr=lr)
        nats[lr] = {split: loss_of(args, folder, "joint", splits[split], "uniform") for split in ("validation", "test")}
    best = min(nats, key=lambda lr: nats[lr]["validation"].sum())
    return {f"one LoRA, rank {run.setup.rank * len(EXPERTS)} (lr {best:g})": nats[best]["test"]}


def baselines_tables(args, run):
    """How well do simpler methods do on the same records: instructions, steering, one LoRA, an untrained router?"""
    splits = {split: load_split(run, split, n) for split, n in (
        ("train", 1000), ("validation", args.records), ("test", args.records))}
    router = load_run(args, args.run, "warmup").router
    cosines = {name: score_queries(router, split.rows, args.tokens) for name, split in splits.items()}
    nats = (base_alone(args, splits, cosines) | warmup_experts(args, splits, cosines, TAUS)
            | one_lora(args, run, splits) | {"PersonaFuse": loss_of(args, args.run, "joint", splits["test"])})
    return [{"title": f"Loss in nats/token on {len(splits['test'].rows)} test records, and its difference to "
                      "PersonaFuse after joint with a 95 % interval; what is in brackets was chosen on validation",
             "head": ["method", "loss", "against PersonaFuse"],
             "rows": compared({name: [values] for name, values in nats.items()}, splits["test"], "PersonaFuse",
                              seed=args.seed)}]


PAIRS = Path(__file__).parent.parent / "data" / "pairs.jsonl"        # messages, and the same without one pole's cue
CONTRAST = Path(__file__).parent.parent / "data" / "contrast.jsonl"  # messages that call for nothing in particular


def without_cues(records):
    """Returns (pairs, queries without any cue), to compare with the records' queries.

    A pair is {"query", "without", "removed": the pole whose cue `without` lacks, "kept": the other poles called for}.
    The template teacher's queries are made of sentences, so that a cue can be taken out of them. For others, people
    would have to rewrite them: then these are the messages of data/pairs.jsonl and data/contrast.jsonl.
    """
    pairs, neutral = [], []
    if not from_templates(records):
        for number, pair in read_lines(PAIRS):
            poles = {key: active_experts(pair[key]).nonzero()[:, 0].tolist() for key in ("removed", "kept")}
            pairs.append({"query": pair["query"], "without": pair["without"], "removed": poles["removed"][0],
                          "kept": poles["kept"]})
        return pairs, sorted({record["query"] for record in read_records(CONTRAST)})
    for record in records:
        rest, poles = record["query"], active_experts(record["traits"]).nonzero()[:, 0].tolist()
        for pole in poles:
            cue = record["cot"]["traits"][TRAITS[pole // 2]]["cue"]
            pairs.append({"query": record["query"], "without": record["query"].replace(cue + " ", ""), "removed": pole,
                          "kept": [other for other in poles if other != pole]})
            rest = rest.replace(cue + " ", "")
        neutral.append(rest)
    return pairs, neutral


def changes_without_cues(pairs, before, after, seed):
    """Returns rows [whose value, number of pairs, mean value with the cue, its change without the cue, with interval].

    before, after: (M, E), what the router says of each pair's `query` and `without`: similarities or weights.
    """
    whose = {"removed, others kept": [(i, pair["removed"]) for i, pair in enumerate(pairs) if pair["kept"]],
             "removed, none kept": [(i, pair["removed"]) for i, pair in enumerate(pairs) if not pair["kept"]],
             "the poles kept": [(i, pole) for i, pair in enumerate(pairs) for pole in pair["kept"]]}
    for e, name in enumerate(SHORT_NAMES):
        whose[f"removed: {name}"] = [(i, e) for i, pair in enumerate(pairs) if pair["removed"] == e]
    rows = []
    for name, looked_at in whose.items():
        if looked_at:
            numbers, poles = zip(*looked_at)
            with_cue, without = before[numbers, poles].numpy(), after[numbers, poles].numpy()
            rows.append([name, len(numbers), float(with_cue.mean()),
                         bootstrap(without - with_cue, np.ones(len(numbers)), seed)])
    return rows


def cues_tables(args, run):
    """What does the gate do where cues are clear, several, absent, or taken out?"""
    test = load_split(run, "test", args.records)
    pairs, neutral = without_cues(test.records)

    def cosines(queries):
        return run.similarity([{"id": "0", "query": query} for query in queries])

    of_pairs = [cosines([pair[key] for pair in pairs]) for key in ("query", "without")]
    tables = [{"title": f"{len(pairs)} pairs of messages: a pole's {measure} with its cue, and how it changes (95 % "
                        f"interval) when the cue is taken out; tau {run.setup.tau:g}",
               "head": ["pole", "pairs", measure, "change"],
               "rows": changes_without_cues(pairs, *values, args.seed)} for measure, values in (
        ("similarity", of_pairs), ("weight", [softmax_gate(s, run.setup.tau) for s in of_pairs]))]

    n_poles, similarity = test.active.sum(-1).int().numpy(), score_queries(run.router, test.rows, args.tokens)
    groups = {"none": cosines(neutral)} | {str(n): similarity[n_poles == n] for n in sorted({*n_poles})}
    statistics = {name: gate_statistics(softmax_gate(s, run.setup.tau)) for name, s in groups.items()}
    tables.append({"title": f"The gate by the number of poles that a message calls for, tau {run.setup.tau:g}",
                   "head": ["poles", "messages", "entropy", "top-1"],
                   "rows": [[name, len(groups[name]), s["entropy"], s["top1"]] for name, s in statistics.items()]})

    nats = losses(run, test, ["base", "uniform", "shuffled", "learned"], seed=args.seed, similarity=similarity)
    rows = []
    for n in sorted({*n_poles}):
        of_gates = compared({rule: [values] for rule, values in nats.items()}, test, "learned",
                            np.flatnonzero(n_poles == n), args.seed)
        rows += [[str(n), int((n_poles == n).sum()), *row] for row in of_gates]
    tables.append({"title": "Loss in nats/token by the number of poles, and its difference to the learned gate's with "
                            "a 95 % interval", "head": ["poles", "records", "gate", "loss", "against learned"],
                   "rows": rows, "left": (0, 2)})
    return tables


TURNS = 6  # messages in a conversation, before the follow-up
ROUTINGS = "one text", "last", "decaying"  # what the router reads
FOLLOW_UPS = ("And then?", "Why?", "Can you say more about that?", "Okay. And after that?", "How do I start?",
              "Could you give me an example?", "What if it does not work?", "Is there another way?", "Are you sure?",
              "Which of these comes first?")  # they call for nothing of their own


def conversations(records, across, seed):
    """Returns conversations (C, TURNS), as numbers of records: each of one domain or, if `across`, of TURNS domains.

    A record is in at most one; one that names no domain is in none. Across domains, each conversation takes from the
    domains with most records left.
    """
    rng, of_domain, found = np.random.default_rng(seed), defaultdict(list), []
    for i in rng.permutation(len(records)):
        if records[i].get("domain"):
            of_domain[records[i]["domain"]].append(i)
    if across:
        while sum(map(bool, of_domain.values())) >= TURNS:
            most = sorted(of_domain.values(), key=len, reverse=True)[:TURNS]
            found.append([most[i].pop() for i in rng.permutation(TURNS)])
    else:
        found = [of[i:i + TURNS] for of in of_domain.values() for i in range(0, len(of) - TURNS + 1, TURNS)]
    return np.array(found, dtype=int).reshape(-1, TURNS)


def route_conversations(run, records, numbers, routing, replies):
    """Hold the conversations `numbers` (C, TURNS), and a follow-up in each, with the router's gate of each turn. Returns
    the similarities that set the gates, and which signatures the replies show, or None without `replies`: both
    (C, TURNS + 1, E).

    routing: the router reads the conversation as "one text"; its "last" message alone; or each of the user's messages
    alone, for `decaying_mean`, as in chat ("decaying").
    """
    histories, similarity, shown = [[] for _ in numbers], [], []
    for turn in range(TURNS + 1):
        asked = [{"id": str(c), "query": records[numbers[c, turn]]["query"] if turn < TURNS else
                  FOLLOW_UPS[c % len(FOLLOW_UPS)], "history": list(history)} for c, history in enumerate(histories)]
        if routing == "decaying":
            similarity.append(run.chat_similarity(asked))
        else:
            known = {} if routing == "one text" else {"history": []}
            similarity.append(run.similarity([record | known for record in asked]))
        said = [""] * len(asked)  # without replies: "last" and "decaying" do not read them
        if replies:
            said = generate_replies(run.model, run.chat, asked, softmax_gate(similarity[-1], run.setup.tau))
            shown.append(torch.tensor([signatures(text) for text in said]))
        for history, record, reply in zip(histories, asked, said):
            history += [{"role": "user", "content": record["query"]}, {"role": "assistant", "content": reply}]
    return torch.stack(similarity, 1), torch.stack(shown, 1) if replies else None


def turns_tables(args, run):
    """Does the router find the poles of the current message when earlier turns speak of others, does it keep the
    previous message's poles at a follow-up without a cue, and how fast does the gate move?"""
    records, _ = run.records(limit=args.records)
    active, styled, tables = torch.stack([active_experts(r["traits"]) for r in records]), from_templates(records), []
    for kind, across in (("one domain", False), ("six domains", True)):
        numbers, rows, precision = conversations(records, across, args.seed), [], {}
        for routing in ROUTINGS if len(numbers) else ():
            replies = styled or routing == "one text"  # template replies are counted below; "one text" reads them
            similarity, shown = route_conversations(run, records, numbers, routing, replies)
            gates = softmax_gate(similarity, run.setup.tau)                                       # (C, TURNS + 1, E)
            labels = active[np.column_stack([numbers, numbers[:, -1]])]  # a follow-up has those of the message before
            moved = torch.cosine_similarity(gates[:, 1:], gates[:, :-1], dim=-1)                  # (C, TURNS)
            precision[routing] = message_precision(
                similarity.flatten(0, 1).numpy(), labels.flatten(0, 1).numpy()).reshape(-1, TURNS + 1)
            for name, part in [*((str(t + 1), slice(t, t + 1)) for t in range(TURNS)), ("2 to 6", slice(1, TURNS)),
                               ("follow-up", slice(TURNS, TURNS + 1))]:
                scores, poles = (x[:, part].flatten(0, 1) for x in (similarity, labels))
                shares = [(shown[:, part].flatten(0, 1) * p).any(1).float().mean().item() if styled else ""
                          for p in (poles, 1 - poles)]
                gain = (precision[routing] - precision["one text"])[:, part].mean(1)
                rows.append([routing, name, float(np.nanmean(pole_precision(scores.numpy(), poles.numpy()))),
                             "" if name == "1" else moved[:, max(part.start - 1, 0):part.stop - 1].mean().item(),
                             *shares, "" if routing == "one text" else bootstrap(gain, np.ones(len(gain)), args.seed)])
        tables.append({"title": f"{len(numbers)} conversations of {TURNS} messages of {kind}, tau {run.setup.tau:g}, "
                                "by what the router reads: mean average precision over poles; cosine of the gate to "
                                "that of the turn before; share of replies with the signature of a pole that the "
                                "message calls for, and of another (template records only); average precision of a "
                                "message's poles against routing on one text, with a 95 % interval over conversations",
                       "head": ["reads", "turn", "AP", "cosine", "called", "other", "against one text"],
                       "rows": rows, "left": (0, 1)})
    if not any(table["rows"] for table in tables):
        raise UserError(f"{run.setup.data}: {len(records)} test records, expected {TURNS} of one domain, or one of "
                        f"each of {TURNS} domains")
    return tables


EXPERIMENTS = {"routing": routing_tables, "temperature": temperature_tables, "rank": rank_tables,
               "domain": domain_tables, "stages": stages_tables, "baselines": baselines_tables, "cues": cues_tables,
               "turns": turns_tables}


# ----------------------------------------------------------------------------------------------------------------------
# The command

def checksum(results):
    return hashlib.sha256(json.dumps(results).encode()).hexdigest()


def read_results(file):
    """Returns an experiment's results.json: {"settings", "tables", "seconds"}. UserError if it was changed since."""
    results = read_json(file)
    written = results.pop("sha256", None)
    if checksum(results) != written:
        raise UserError(f"{file}: changed since the experiment wrote it; python eval.py experiment {file.parent.name} "
                        f"--run {file.parents[2]} --again measures again")
    return results


def experiment(args):
    """Train and measure what one question needs; print tables and keep them in RUN/experiments/NAME/results.json."""
    for name in args.names:
        if name not in EXPERIMENTS:
            raise UserError(f"no experiment {name!r}, expected some of {', '.join(EXPERIMENTS)}")
    if args.stage or args.experts or args.router:
        raise UserError("an experiment chooses the experts and the router that it measures: leave out --stage, "
                        "--experts and --router")
    run = LoadedRun(args)
    for stage in unfinished_stages(run.setup.run, STAGES):
        raise UserError(f"{args.run} has no {stage} stage yet: python train.py --preset {run.setup.preset} "
                        f"--stage {stage} --run {args.run}")
    settings = {"tau": run.setup.tau, "stages": read_run(args.run)["stages"],
                **{key: getattr(args, key) for key in ("seed", "seeds", "records")}}
    if run.setup.int8:  # only where given, so that older results stay valid
        settings["int8"] = True
    if args.dtype:
        settings["dtype"] = args.dtype
    for name in args.names:
        file, began = Path(args.run) / "experiments" / name / "results.json", time.perf_counter()
        results = read_results(file) if file.exists() and not args.again else {}
        if results.get("settings") != settings:
            tables = EXPERIMENTS[name](args, run)
            results = {"settings": settings, "tables": tables, "seconds": time.perf_counter() - began}
            with atomic(file) as part:
                part.write_text(json.dumps(results | {"sha256": checksum(results)}, indent=1) + "\n")
        print("\n" + textwrap.fill(" ".join(f"{name}: {EXPERIMENTS[name].__doc__}".split()), 80))
        for table in results["tables"]:
            print_table(**table)
        print(f"\n{file}: took {results['seconds']:.0f} s")
