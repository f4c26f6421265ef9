"""Experiments: is it the method that helps, and which part of it? Six questions, each a function that returns tables.

    python eval.py experiment routing --run runs/tiny        # or temperature, rank, domain, stages, baselines

- An experiment trains variants of a run, measures their loss under gate rules and compares.
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

from lora import EXPERTS, SHORT_NAMES, expert_layers, save_experts
from router import gate_statistics, persona_gate, save_router, softmax_gate
from support.baselines import base_alone, warmup_experts
from support.files import UserError, atomic, read_json, shorten
from support.measure import (RunOptions, LoadedRun, bootstrap, domain_subsets, load_cases, load_run, losses,
                             one_hot_gate, update_gram)
from support.records import write_records
from support.runs import STAGES, Setup, read_run, write_config
from support.tables import print_table
import train
from train import evaluation_loss, score_queries


@dataclass(kw_only=True)
class Experiment(RunOptions):
    names: list[str]
    """Which: routing, temperature, rank, domain, stages, baselines; several are done in turn."""
    seeds: int | None = None
    """How many runs, each with its own order of the data and initial values; 3 for routing and temperature, else 1."""
    records: int | None = None
    """How many test records, and as many for validation; all if not given."""
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


def variant(args, source, name, stages, fresh=(), data=None, **changes):
    """Train `stages` in the run folder RUN/experiments/<name>, and return that folder.

    Everything else comes from the run `source`: its settings except for `changes`, its models, its data (or `data`,
    {split: records}) and its finished stages (except those in `fresh`, which stay as they are initialised).
    Where nothing differs, the folder returned is `source` itself.
    """
    folder, config = Path(args.run) / "experiments" / name, read_run(source)
    settings = config["stages"].get("joint", {}) | config["setup"]
    if [*stages] == ["joint"] and not fresh and all(settings.get(k) == v for k, v in changes.items()):
        return source
    kept = {stage: s for stage, s in config["stages"].items() if stage not in (*stages, *fresh, "joint")}
    if not (folder / "config.json").exists():
        start_variant(folder, source, config, kept, data, changes)
    if any(read_run(folder)["stages"].get(stage) != s for stage, s in kept.items()):
        raise UserError(f"{folder} was made from other stages than {source} has now: remove it to train it again")

    setup = load_run(args, folder).setup
    for stage in fresh:
        if not (folder / stage).is_dir():
            with atomic(folder / stage) as part:
                if stage == "warmup":
                    save_experts(setup.load_base(), part / "experts", setup.base)
                else:
                    save_router(setup.load_router(), part / "router")
    for stage in stages:
        done, began = (folder / stage).is_dir(), time.perf_counter()
        print(f"{'done' if done else 'training'}: {folder}, {stage}", flush=True)
        options = config["stages"].get(stage, {}) | {k: getattr(setup, k) for k in (*Setup.SHARED, "device")} | changes
        options |= {"run": folder, "stage": stage, "resume": True, "log_every": 2**30, "dtype": args.dtype}
        command = [f"--{k.replace('_', '-')}" + ("" if v is True else f"={v}") for k, v in options.items()
                   if v is not None and v is not False]
        if train.main(command, close=False):
            raise KeyboardInterrupt  # training was stopped, so the experiment stops as well
        if not done:
            with atomic(folder / stage / "seconds.json") as part:
                part.write_text(json.dumps({"seconds": time.perf_counter() - began}))
    return folder


def seconds_of(folder):
    """How long a variant's stage took to train; NaN if the process was killed before it could note the time."""
    file = folder / "seconds.json"
    seconds = read_json(file).get("seconds") if file.exists() else math.nan
    if not isinstance(seconds, (int, float)):
        raise UserError(f"{file}: seconds is {shorten(seconds)}, expected a number; remove the file")
    return seconds


def seeded(args, default=1):
    """Yield (seed, folder) of the run, then of variants trained from other seeds on the same models and records."""
    run = LoadedRun(args)
    for seed in range(run.setup.seed, run.setup.seed + (args.seeds or default)):
        yield seed, Path(args.run) if seed == run.setup.seed else variant(
            args, Path(args.run), f"seed-{seed}", STAGES, data=run.setup.load_data(), seed=seed)


# ----------------------------------------------------------------------------------------------------------------------
# Losses compared

def loss_of(args, folder, stage, cases, rule="learned"):
    """Returns the nats (N,) of every reply under a run's experts of `stage` and one gate rule."""
    return losses(load_run(args, folder, stage), cases, [rule])[rule]


def mean_and_std(values):
    """Returns [mean, standard deviation over seeds], a cell of a table."""
    return [float(np.mean(values)), float(np.std(values))]


def compared(found, cases, reference, part=slice(None), seed=0):
    """Returns table rows for {name: [nats (N,) of each seed]}: the name, its nats per token with their deviation over
    seeds, and the difference to `reference`, averaged over seeds, with its interval over the records in `part`."""
    rows, counts = [], cases.counts[part]
    for name, runs in found.items():
        difference = (np.mean(runs, 0) - np.mean(found[reference], 0))[part]
        rows.append([name, mean_and_std([nats[part].sum() / counts.sum() for nats in runs]),
                     "" if name == reference else [*map(float, bootstrap(difference, counts, seed))]])
    return rows


# ----------------------------------------------------------------------------------------------------------------------
# The six experiments. Their docstrings are printed above the tables.

def routing_tables(args, run):
    """Is the router's gate worth more than other gates, on the experts before and after joint training?"""
    tests, validation = load_cases(run, "test", args.records), load_cases(run, "validation", args.records)

    def alone(opened, cases, e):
        return evaluation_loss(opened.model, cases.rows, one_hot_gate(e).expand(len(cases.rows), -1), args.tokens)[0]

    found = {"warmup": defaultdict(list), "joint": defaultdict(list)}
    for seed, folder in seeded(args, 3):
        control = variant(args, folder, f"routing/control-{seed}", ["joint"], joint_gate="uniform")
        for stage, nats in found.items():
            opened = load_run(args, folder, stage)
            rules = "base", "uniform", "shuffled", "learned", "oracle", "labels"
            for rule, values in losses(opened, tests, rules).items():
                nats[rule].append(values)
            draws = [losses(opened, tests, ["random"], seed=draw)["random"] for draw in range(3)]
            nats["random"].append(np.mean(draws, 0))
            best = min(range(len(EXPERTS)), key=lambda e: alone(opened, validation, e).sum())
            nats["best single"].append(alone(opened, tests, best))
        found["joint"]["control"].append(loss_of(args, control, "joint", tests, "uniform"))
    return [{"title": f"Experts after {stage}, tau {run.setup.tau:g}; {len(part)} test records, {name}: loss in "
                      f"nats/token, mean and spread of {len(runs['learned'])} seeds, against the learned gate, 95 %",
             "head": ["gate", "loss", "against learned"], "rows": compared(runs, tests, "learned", part, args.seed)}
            for stage, runs in found.items() for name, part in domain_subsets(tests.new_domain)]


TAUS = (1.0, 0.5, 0.2, 0.1, 0.05)
LENGTHS = {"before joint": 0, "short joint": 1, "long joint": 3}  # joint steps, in units of the run's own number


def update_geometry(model, gates):
    """Returns the mean norm of one expert's update, the mean norm of the mixed update under gates (N, E) in units of
    it, and the mean cosine between the updates of opposite poles and of all other pairs."""
    gram, gates, trait = update_gram(model), gates.double(), torch.arange(len(EXPERTS)) // 2
    size = gram.diagonal().sqrt()
    cosines = gram / size.outer(size).clamp(min=1e-30)
    opposite = (trait[:, None] == trait) & ~torch.eye(len(trait), dtype=bool)
    return {"size": size.mean().item(), "norm": ((gates @ gram * gates).sum(-1).sqrt().mean() / size.mean()).item(),
            "cos opp": cosines[opposite].mean().item(), "cos oth": cosines[trait[:, None] != trait].mean().item()}


def temperature_tables(args, run):
    """Which τ, for the gate as it is and for joint training at it, short and long; what becomes of single experts."""
    tests, validation = load_cases(run, "test", args.records), load_cases(run, "validation", args.records)
    one_pole = [i for i, active in enumerate(tests.active) if active.sum() == 1]
    rows, poles = [tests.rows[i] for i in one_pole], tests.active[one_pole].argmax(-1)
    count = tests.counts[one_pole].sum()

    def measure(folder, stage, tau):
        opened = load_run(args, folder, stage)
        gates = softmax_gate(score_queries(opened.router, tests.rows, args.tokens), tau)
        nats, valid = (losses(opened, cases, ["learned"], tau)["learned"] for cases in (tests, validation))

        def one_pole_loss(gates):
            return evaluation_loss(opened.model, rows, gates, args.tokens)[0].sum() / count
        return gate_statistics(gates) | update_geometry(opened.model, gates) | {
            "nats": nats, "test": nats.sum() / tests.counts.sum(), "valid.": valid.sum() / validation.counts.sum(),
            "router": nats[one_pole].sum() / count, "single": one_pole_loss(torch.eye(len(EXPERTS))[poles]),
            "persona": one_pole_loss(torch.stack([persona_gate(SHORT_NAMES[e], tau) for e in poles]))}

    found = defaultdict(list)
    for seed, folder in seeded(args, 3):
        own_steps = read_run(folder)["stages"]["joint"]["steps"]
        for tau in TAUS:
            found["before joint", tau].append(measure(folder, "warmup", tau))
            for when in ("short joint", "long joint"):
                steps = own_steps * LENGTHS[when]
                trained = variant(args, folder, f"temperature/tau-{tau:g}-steps-{steps}-seed-{seed}", ["joint"],
                                  tau=tau, steps=steps)
                found[when, tau].append(measure(trained, "joint", tau))
            for when in LENGTHS:
                found[when, tau][-1]["grown"] = found[when, tau][-1]["size"] / found["before joint", tau][-1]["size"]

    def mean(when, tau, *keys):
        return [float(np.mean([m[key] for m in found[when, tau]])) for key in keys]

    tables = [{"title": f"{when.capitalize()}: the gate's entropy and top-1 mass; norm of the mixed update in units of "
                        "one expert's; how far experts grew; mean cosine of opposite poles' updates and of others'; "
                        "loss in nats/token on validation and test, learned gate",
               "head": ["tau", "entropy", "top-1", "norm", "grown", "cos opp", "cos oth", "valid.", "test"],
               "rows": [[f"{tau:g}", *mean(when, tau, "entropy", "top1", "norm", "grown", "cos opp", "cos oth",
                                           "valid."), mean_and_std([m["test"] for m in found[when, tau]])]
                        for tau in TAUS]} for when in LENGTHS]
    tables.append({"title": f"The {len(one_pole)} test records with one active pole: loss under the router's gate, "
                            "with that expert alone, and under a persona of that pole at the same tau",
                   "head": ["experts", "tau", "router", "single", "persona"],
                   "rows": [[when, f"{tau:g}", *mean(when, tau, "router", "single", "persona")]
                            for when in LENGTHS for tau in TAUS]})
    best = {when: min(TAUS, key=lambda tau: mean(when, tau, "valid.")) for when in LENGTHS}
    tables.append({"title": "Test loss at the tau that is best on validation, against tau 1, 95 %",
                   "head": ["experts", "loss", "against tau 1"], "rows": []})
    for when in LENGTHS:
        both = {f"{when}, tau {tau:g}": [m["nats"] for m in found[when, tau]] for tau in (1.0, best[when])}
        tables[-1]["rows"] += compared(both, tests, f"{when}, tau 1", seed=args.seed)
    return tables


def rank_tables(args, run):
    """What a larger rank costs and brings, α/r kept as it is."""
    tests, rows = load_cases(run, "test", args.records), []
    for rank in (4, 8, 16):
        found = defaultdict(list)
        for seed, source in seeded(args):
            folder = variant(args, source, f"rank/rank-{rank}-seed-{seed}", ["warmup", "joint"], rank=rank,
                             alpha=run.setup.alpha / run.setup.rank * rank)
            for stage in ("warmup", "joint"):
                opened = load_run(args, folder, stage)
                found[stage].append(losses(opened, tests, ["learned"])["learned"].sum() / tests.counts.sum())
                found["seconds"].append(seconds_of(folder / stage))
            size = sum(layer.A.numel() + layer.B.numel() for layer in expert_layers(opened.model).values())
        rows.append([str(rank), size, f"{sum(found['seconds']) / len(found['joint']):.0f}",
                     mean_and_std(found["warmup"]), mean_and_std(found["joint"])])
    return [{"title": f"Rank, alpha/r {run.setup.alpha / run.setup.rank:g}: parameters of all experts, seconds of "
                      f"warm-up and joint, loss in nats/token on {len(tests.rows)} test records, learned gate",
             "head": ["rank", "parameters", "seconds", "after warm-up", "after joint"], "rows": rows}]


def domain_tables(args, run):
    """Trained on one domain, tested on the others."""
    tests, splits = load_cases(run, "test", args.records), run.setup.load_data()
    names = [name for name, _ in Counter(r["domain"] for r in splits["train"] if r.get("domain")).most_common(3)]
    if len(names) < 3:
        raise UserError(f"{run.setup.data}: the training records name {len(names)} domains, expected three or more")
    domains = np.array([record.get("domain") for record in tests.records])
    parts = {name: domains == name for name in names}
    parts |= {"others": ~tests.new_domain & ~np.isin(domains, names), "never seen": tests.new_domain}
    parts = {name: part for name, part in parts.items() if part.any()}
    folders = {f"only {name}": variant(args, Path(args.run), f"domain/{i}-{name.replace('/', '-')}", STAGES, data={
        **splits, "train": [r for r in splits["train"] if r.get("domain") == name]}) for i, name in enumerate(names)}
    found = {name: losses(load_run(args, folder, "joint"), tests, ("base", "learned", "shuffled"))
             for name, folder in (folders | {"all domains": Path(args.run)}).items()}

    def table(title, values):
        return {"title": title, "head": ["trained on", *(f"{name} ({part.sum()})" for name, part in parts.items())],
                "rows": [[name, *(float(nats[part].sum() / tests.counts[part].sum()) for part in parts.values())]
                         for name, nats in values.items()]}
    return [table("Loss in nats/token by the test records' domain (how many), joint experts, learned gate",
                  {"nothing (base)": found["all domains"]["base"]} | {k: v["learned"] for k, v in found.items()}),
            table("What the router's gate is worth there: loss under another query's gate minus under its own",
                  {name: nats["shuffled"] - nats["learned"] for name, nats in found.items()})]


def stages_tables(args, run):
    """What each stage, and λ, is worth."""
    tests, found = load_cases(run, "test", args.records), defaultdict(list)
    plans = {"no warm-up": dict(fresh=["warmup"]), "no router stage": dict(fresh=["router"]), "lambda 0": dict(lam=0.0),
             "lambda 0.1": dict(lam=0.1), "lambda 1": dict(lam=1.0)}
    for seed, source in seeded(args):
        found["all stages"].append(loss_of(args, source, "joint", tests))
        found["no joint stage"].append(loss_of(args, source, "warmup", tests))
        for name, plan in plans.items():
            folder = variant(args, source, f"stages/{name}-seed-{seed}".replace(" ", "-"), ["joint"], **plan)
            found[name].append(loss_of(args, folder, "joint", tests))
    return [{"title": f"Loss in nats/token on {len(tests.rows)} test records, learned gate, and the difference to the "
                      "run with all stages, 95 %", "head": ["", "loss", "against all stages"],
             "rows": compared(found, tests, "all stages", seed=args.seed)}]


def one_lora(args, run, cases):
    """Returns {method: nats} of one LoRA with as many parameters as ten experts, trained on as many rows, at the better
    of two learning rates.

    Ten experts under a fixed uniform gate are one LoRA of ten times the rank: with ten times the α, their sum
    Σ_e 1/10 · 10α/r · B_e A_e is α/r · B A, and gradient clipping and AdamW treat both alike. So the LoRA is trained as
    a variant and needs no extra code.
    """
    stages, found = read_run(args.run)["stages"], {}
    rows = sum(stages[stage]["steps"] * stages[stage]["batch"] for stage in ("warmup", "joint"))
    for lr in sorted({stages["warmup"]["lr"], stages["joint"]["lr"]}):
        folder = variant(args, Path(args.run), f"baselines/lora-lr-{lr:g}", ["joint"], fresh=["warmup"],
                         alpha=run.setup.alpha * len(EXPERTS), joint_gate="uniform",
                         steps=rows // stages["joint"]["batch"], lr=lr)
        found[lr] = [loss_of(args, folder, "joint", cases[split], "uniform") for split in ("validation", "test")]
    best = min(found, key=lambda lr: found[lr][0].sum())
    return {f"one LoRA, rank {run.setup.rank * len(EXPERTS)} (lr {best:g})": found[best][1]}


def baselines_tables(args, run):
    """What simpler methods make of the same records: instructions, steering, one LoRA, a router that is not trained."""
    cases = {split: load_cases(run, split, n) for split, n in (
        ("train", 1000), ("validation", args.records), ("test", args.records))}
    router = load_run(args, args.run, "warmup").router
    cosines = {split: score_queries(router, c.rows, args.tokens) for split, c in cases.items()}
    found = (base_alone(args, cases, cosines) | warmup_experts(args, cases, cosines, TAUS) | one_lora(args, run, cases)
             | {"PersonaFuse": loss_of(args, args.run, "joint", cases["test"])})
    return [{"title": f"Loss in nats/token on {len(cases['test'].rows)} test records and the difference to PersonaFuse "
                      "after joint, 95 %; what is in brackets was chosen on validation",
             "head": ["method", "loss", "against PersonaFuse"],
             "rows": compared({name: [nats] for name, nats in found.items()}, cases["test"], "PersonaFuse",
                              seed=args.seed)}]


EXPERIMENTS = {"routing": routing_tables, "temperature": temperature_tables, "rank": rank_tables,
               "domain": domain_tables, "stages": stages_tables, "baselines": baselines_tables}


# ----------------------------------------------------------------------------------------------------------------------
# The command

def checksum(results):
    return hashlib.sha256(json.dumps(results).encode()).hexdigest()


def read_results(file):
    """An experiment's results.json: {"settings", "tables", "seconds"}. UserError if it is not as it was written."""
    results = read_json(file)
    written = results.pop("sha256", None)
    if checksum(results) != written:
        raise UserError(f"{file}: changed since the experiment wrote it; python eval.py experiment {file.parent.name} "
                        "--again measures again")
    return results


def experiment(args):
    """Train and measure what one question needs; print tables and keep them in RUN/experiments/NAME/results.json."""
    for name in args.names:
        if name not in EXPERIMENTS:
            raise UserError(f"no experiment {name!r}, expected some of {', '.join(EXPERIMENTS)}")
    if args.stage:
        raise UserError("an experiment chooses the stages that it measures: leave out --stage")
    run = LoadedRun(args)
    for stage in STAGES:
        if not (run.setup.run / stage).is_dir():
            raise UserError(f"{args.run} has no {stage} stage yet: python train.py --preset {run.setup.preset} "
                            f"--stage {stage} --run {args.run}")
    settings = {"tau": run.setup.tau, "stages": read_run(args.run)["stages"],
                **{key: getattr(args, key) for key in ("seed", "seeds", "records")}}
    for name in args.names:
        file, began = Path(args.run) / "experiments" / name / "results.json", time.perf_counter()
        results = read_results(file) if file.exists() and not args.again else {}
        if results.get("settings") != settings:
            tables = EXPERIMENTS[name](args, run)
            results = {"settings": settings, "tables": tables, "seconds": time.perf_counter() - began}
            with atomic(file) as part:
                part.write_text(json.dumps(results | {"sha256": checksum(results)}, indent=1) + "\n")
        print("\n" + textwrap.fill(f"{name}: {EXPERIMENTS[name].__doc__}", 80))
        for table in results["tables"]:
            print_table(**table)
        print(f"\n{file}: took {results['seconds']:.0f} s")
