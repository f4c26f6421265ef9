"""Experiments: does routing matter, and how would you know? Commands of eval.py, on whose pieces this file stands.

    python eval.py experiment routing --run runs/tiny        # or temperature, rank, domain, stages, baselines
    python eval.py health --run runs/tiny                    # failure signatures; exit status 1 when one holds
    python eval.py plot --run runs/tiny                      # pictures, in runs/tiny/plots/
    python eval.py inventory --run runs/tiny                 # a personality inventory, answered by each expert

An experiment trains variants of a run in run folders of their own, measures them under gate rules and compares; what is
trained stays trained, so it can be stopped at any time.
"""
import json
import math
import os
import textwrap
import time
from collections import Counter, defaultdict
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
import torch

from lora import EXPERTS, SHORT_NAMES, expert_layers, save_experts
from model import gate_at, pad
from router import gate_statistics, gates_for_rule, persona_gate, save_router, softmax_gate
import train
from support.files import UserError, atomic, read_json, shorten
from support.measure import (RunOptions, LoadedRun, bootstrap, load_cases, losses, one_hot_gate, load_run, domain_subsets,
                             update_gram)
from support.records import write_records
from support.rows import make_rows, micro_batches
from support.runs import STAGES, Setup, read_run
from support.tables import print_table
from train import evaluation_loss, score_queries


@dataclass(kw_only=True)
class Experiment(RunOptions):
    names: list[str]
    """Which: routing, temperature, rank, domain, stages, baselines; several are done in turn."""
    seeds: int | None = None
    """Runs, each with an order of data and initial values of its own; 3 for routing and temperature, else 1."""
    records: int | None = None
    """How many test records, and as many for validation; all if not given."""
    again: bool = False
    """Measure again what experiments/NAME/results.json holds. What is trained stays trained in any case."""


def variant(args, source, name, stages, fresh=(), data=None, **changes):
    """Train `stages` in a run folder of their own, RUN/experiments/<name> -> that folder.

    All else is the run `source`'s: settings but for `changes`, and as links its models, data and finished stages.
    `data` {split: records} takes the place of its data; a `fresh` stage is left as it is initialised. What is done is
    not done again, so that a run of many variants can be stopped at any time. Where nothing differs, `source` itself.
    """
    folder, found = Path(args.run) / "experiments" / name, read_json(source / "config.json")
    same = found["stages"].get("joint", {}) | found["setup"]
    if [*stages] == ["joint"] and not fresh and all(same.get(k) == v for k, v in changes.items()):
        return source
    settings = {stage: s for stage, s in found["stages"].items() if stage not in (*stages, *fresh, "joint")}
    if not (folder / "config.json").exists():
        setup = found["setup"] | {k: v for k, v in changes.items() if k in Setup.AGREE}
        content = {k: v for k, v in found.get("content", {}).items() if k != "data" or not data}
        with atomic(folder) as part:
            part.mkdir()
            for split, records in (data or {}).items():
                setup["data"] = f"{Setup.RUN}records"
                write_records(part / "records" / f"{split}.jsonl", records)
            for linked in ("models", "data", "records", *settings):
                if (source / linked).is_dir() and not (part / linked).exists():
                    (part / linked).symlink_to(os.path.relpath((source / linked).resolve(), folder.resolve()))
            (part / "config.json").write_text(json.dumps(found | {"setup": setup, "stages": settings, "content": content},
                                                           indent=2))
    was = read_run(folder)["stages"]
    if any(was.get(stage) != s for stage, s in settings.items()):
        raise UserError(f"{folder} was made from other stages than {source} has now: remove it to train it anew")
    setup = load_run(args, folder).setup
    for stage in fresh:
        if not (folder / stage).is_dir():
            with atomic(folder / stage) as part:
                save_experts(setup.load_base(), part / "experts", setup.base) if stage == "warmup" else \
                    save_router(setup.load_router(), part / "router")
    for stage in stages:
        given = found["stages"].get(stage, {}) | {k: getattr(setup, k) for k in (*Setup.AGREE, "device")} | changes
        given |= {"run": folder, "stage": stage, "resume": True, "log_every": 2**30, "dtype": args.dtype}
        began, done = time.perf_counter(), (folder / stage).is_dir()
        print(f"{'done' if done else 'training'}: {folder}, {stage}", flush=True)
        if train.main([f"--{k.replace('_', '-')}" + ("" if v is True else f"={v}") for k, v in given.items()
                       if v is not None and v is not False], close=False):
            raise KeyboardInterrupt
        if not done:
            with atomic(folder / stage / "seconds.json") as part:
                part.write_text(json.dumps({"seconds": time.perf_counter() - began}))
    return folder


def seeded(args, default=1):
    """The run from each of several seeds, one after the other: itself, then all three stages anew from other seeds on
    the same models and records -> seed and folder of each."""
    run = LoadedRun(args)
    for seed in range(run.setup.seed, run.setup.seed + (args.seeds or default)):
        yield seed, Path(args.run) if seed == run.setup.seed else variant(
            args, Path(args.run), f"seed-{seed}", STAGES, data=run.setup.load_data(), seed=seed)


def mean_and_std(values):
    """-> [mean, standard deviation over seeds], as tables and results.json have it."""
    return [float(np.mean(values)), float(np.std(values))]


def compared(found, c, reference, part=slice(None), seed=0):
    """{name: nats (N,) of each seed} -> table rows: name, nats per token with their spread over seeds, and the
    difference to `reference`, averaged over seeds, with its interval over records."""
    rows, counts = [], c.counts[part]
    for name, runs in found.items():
        difference = (np.mean(runs, 0) - np.mean(found[reference], 0))[part]
        rows.append([name, mean_and_std([nats[part].sum() / counts.sum() for nats in runs]),
                     "" if name == reference else [*map(float, bootstrap(difference, counts, seed))]])
    return rows


def routing_tables(args, run):
    """Is the router's gate worth more than other gates, on the experts before and after joint training?"""
    tests, validation = load_cases(run, "test", args.records), load_cases(run, "validation", args.records)

    def measure(folder, stage):
        m = load_run(args, folder, stage)

        def alone(c, e):
            return evaluation_loss(m.model, c.rows, one_hot_gate(e).expand(len(c.rows), -1), args.tokens)[0]
        nats = losses(m, tests, ("base", "uniform", "shuffled", "learned", "oracle", "labels"))
        nats["random"] = np.mean([losses(m, tests, ["random"], seed=draw)["random"] for draw in range(3)], 0)
        nats["best single"] = alone(tests, min(range(len(EXPERTS)), key=lambda e: alone(validation, e).sum()))
        return nats

    found = {"warmup": defaultdict(list), "joint": defaultdict(list)}
    for seed, folder in seeded(args, 3):
        control = variant(args, folder, f"routing/control-{seed}", ["joint"], joint_gate="uniform")
        for stage in found:
            for rule, nats in measure(folder, stage).items():
                found[stage][rule].append(nats)
        found["joint"]["control"].append(losses(load_run(args, control, "joint"), tests, ["uniform"])["uniform"])
    return [{"title": f"Experts after {stage}, tau {run.setup.tau:g}; {len(part)} test records, {name}: loss in "
                      f"nats/token, mean and spread of {len(runs['learned'])} seeds, against the learned gate, 95 %",
             "head": ["gate", "loss", "against learned"], "rows": compared(runs, tests, "learned", part, args.seed)}
            for stage, runs in found.items() for name, part in domain_subsets(tests.new_domain)]


TAUS = (1.0, 0.5, 0.2, 0.1, 0.05)
LENGTHS = {"before joint": 0, "short joint": 1, "long joint": 3}  # in the joint stage's own number of steps


def temperature_tables(args, run):
    """Which τ, for the gate as it is and for joint training at it, short and long; what becomes of single experts."""
    tests, validation = load_cases(run, "test", args.records), load_cases(run, "validation", args.records)
    alone = [i for i, a in enumerate(tests.active) if a.sum() == 1]  # records that call for one pole
    rows, poles = [tests.rows[i] for i in alone], tests.active[alone].argmax(-1)

    def measure(folder, stage, tau, first):
        m = load_run(args, folder, stage)
        gram, gates = update_gram(m.model), softmax_gate(score_queries(m.router, tests.rows, args.tokens), tau)
        size, report, pair = gram.diagonal().sqrt(), gate_statistics(gates), torch.arange(len(EXPERTS)) // 2
        cosines = gram / size.outer(size).clamp(min=1e-30)
        opposite, other = (pair[:, None] == pair) & ~torch.eye(len(pair), dtype=bool), pair[:, None] != pair
        gates = gates.double()
        nats = losses(m, tests, ["learned"], tau)["learned"]
        count = tests.counts[alone].sum()
        by_hand = torch.stack([persona_gate(SHORT_NAMES[e], tau) for e in poles])
        return {"entropy": report["entropy"], "top-1": report["top1"], "opposite": cosines[opposite].mean().item(),
                "others": cosines[other].mean().item(), "size": size.mean().item(),
                "norm": ((gates @ gram * gates).sum(-1).sqrt().mean() / size.mean()).item(),
                "growth": size.mean().item() / (first or size.mean().item()),
                "validation": losses(m, validation, ["learned"], tau)["learned"].sum() / validation.counts.sum(),
                "test": nats.sum() / tests.counts.sum(), "nats": nats, "one-pole": nats[alone].sum() / count,
                "single": evaluation_loss(m.model, rows, torch.eye(len(EXPERTS))[poles], args.tokens)[0].sum() / count,
                "persona": evaluation_loss(m.model, rows, by_hand, args.tokens)[0].sum() / count}

    found = defaultdict(list)
    for seed, folder in seeded(args, 3):
        own = read_json(folder / "config.json")["stages"]["joint"]["steps"]
        for tau in TAUS:
            found["before joint", tau].append(first := measure(folder, "warmup", tau, None))
            for when in ("short joint", "long joint"):
                steps = own * LENGTHS[when]
                at = variant(args, folder, f"temperature/tau-{tau:g}-steps-{steps}-seed-{seed}", ["joint"], tau=tau,
                             steps=steps)
                found[when, tau].append(measure(at, "joint", tau, first["size"]))
    def mean(when, tau, *keys):
        return [float(np.mean([m[key] for m in found[when, tau]])) for key in keys]

    keys = "entropy", "top-1", "norm", "growth", "opposite", "others", "validation"
    tables = [{"title": f"{when.capitalize()}: the gate's entropy and top-1 mass; norm of the mixed update in units of "
                        "one expert's; how far experts grew; mean cosine of opposite poles' updates and of others'; "
                        "loss in nats/token on validation and test, learned gate",
               "head": ["tau", "entropy", "top-1", "norm", "grown", "cos opp", "cos oth", "valid.", "test"],
               "rows": [[f"{tau:g}", *mean(when, tau, *keys), mean_and_std([m["test"] for m in found[when, tau]])]
                        for tau in TAUS]} for when in LENGTHS]
    tables.append({"title": f"The {len(alone)} test records with one active pole: loss under the router's gate, with "
                            "that expert alone, and under a persona of that pole at the same tau",
                   "head": ["experts", "tau", "router", "single", "persona"],
                   "rows": [[when, f"{tau:g}", *mean(when, tau, "one-pole", "single", "persona")]
                            for when in LENGTHS for tau in TAUS]})
    rows = []
    for when in LENGTHS:
        best = min(TAUS, key=lambda tau: mean(when, tau, "validation"))
        both = {f"{when}, tau {tau:g}": [m["nats"] for m in found[when, tau]] for tau in {1.0: 0, best: 0}}
        rows += compared(both, tests, f"{when}, tau 1", seed=args.seed)
    return [*tables, {"title": "Test loss at the tau that is best on validation, against tau 1, 95 %",
                      "head": ["experts", "loss", "against tau 1"], "rows": rows}]


def joint_loss(args, folder, c, rule="learned"):
    """Nats of every case's reply under a run's joint experts."""
    return losses(load_run(args, folder, "joint"), c, [rule])[rule]


def seconds_of(folder):
    """What a variant's stage took; NaN if a kill came between its result and the note of it."""
    file = folder / "seconds.json"
    seconds = read_json(file).get("seconds") if file.exists() else math.nan
    if not isinstance(seconds, (int, float)):
        raise UserError(f"{file}: seconds is {shorten(seconds)}, expected a number; remove the file")
    return seconds


def rank_tables(args, run):
    """What a larger rank costs and brings, α/r kept as it is."""
    tests, rows = load_cases(run, "test", args.records), []
    for rank in (4, 8, 16):
        found = defaultdict(list)
        for seed, source in seeded(args):
            folder = variant(args, source, f"rank/rank-{rank}-seed-{seed}", ["warmup", "joint"], rank=rank,
                             alpha=run.setup.alpha / run.setup.rank * rank)
            for stage in ("warmup", "joint"):
                m = load_run(args, folder, stage)
                found[stage].append(losses(m, tests, ["learned"])["learned"].sum() / tests.counts.sum())
                found["seconds"].append(seconds_of(folder / stage))
            size = sum(layer.A.numel() + layer.B.numel() for layer in expert_layers(m.model).values())
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
    of = np.array([record.get("domain") for record in tests.records])
    parts = {name: of == name for name in names}
    parts |= {"others": ~tests.new_domain & ~np.isin(of, names), "never seen": tests.new_domain}
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
        found["all stages"].append(joint_loss(args, source, tests))
        found["no joint stage"].append(losses(load_run(args, source, "warmup"), tests, ["learned"])["learned"])
        for name, plan in plans.items():
            folder = variant(args, source, f"stages/{name}-seed-{seed}".replace(" ", "-"), ["joint"], **plan)
            found[name].append(joint_loss(args, folder, tests))
    return [{"title": f"Loss in nats/token on {len(tests.rows)} test records, learned gate, and the difference to the "
                      "run with all stages, 95 %", "head": ["", "loss", "against all stages"],
             "rows": compared(found, tests, "all stages", seed=args.seed)}]


@torch.no_grad()
def reply_states(model, rows, tokens):
    """Mean state over each row's reply after every block: -> (N, layers, D), fp32, on the CPU."""
    kept, found, order = [], [None] * len(rows), {id(row): i for i, row in enumerate(rows)}
    hooks = [block.register_forward_hook(lambda block, given, out: kept.append(out)) for block in model.model.layers]
    try:
        for group in micro_batches(rows, tokens):
            kept.clear()
            ids, lengths = pad([row.ids for row in group], model.device)
            model.hidden(ids)
            for b, row in enumerate(group):
                found[order[id(row)]] = torch.stack([x[b, row.prompt:lengths[b]].float().mean(0).cpu() for x in kept])
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(found)


@contextmanager
def steered(model, layer, vectors):
    """Activation steering: every state after block `layer` moves by gate @ vectors, (B, E) @ (E, D). The gate is the
    one that travels through the model; experts as initialised (B = 0) do nothing with it."""
    vectors = vectors.to(model.device, model.dtype)

    def move(block, given, named, out):
        x, _, gate = given[:3]
        if "at" in named:  # the last block, of which some positions only are wanted
            gate = gate_at(gate, named["at"], x.shape[1])
        return out + (gate.to(out.dtype) @ vectors)[:, None]
    hook = model.model.layers[layer].register_forward_hook(move, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def instructed_and_steered(args, run, c, cosines):
    """The base told, or pushed towards, the poles that labels or the router name -> {method: nats}."""
    base, found = load_run(args, args.run, "warmup").setup.load_base(), {}  # experts as initialised add nothing

    def called(split, threshold):  # what the router names: its first choice, and all poles above a cosine
        s = cosines[split]
        return ((s >= threshold) | (s == s.max(-1, keepdim=True).values)).float()

    def f1(threshold):
        a, b = called("validation", threshold), c["validation"].active
        return 2 * (a * b).sum() / (a.sum() + b.sum())

    threshold = max(np.arange(-0.5, 1, 0.05), key=f1)  # the best one on validation
    named = {"labels": {split: c[split].active for split in c}, "router": {s: called(s, threshold) for s in c}}
    found["base"] = evaluation_loss(base, c["test"].rows, None, args.tokens)[0]
    for who, active in named.items():
        told = [{**record, "history": [{"role": "system", "content": "Answer as someone of " + " and ".join(
            EXPERTS[e].replace("_", " ") for e in poles.nonzero()[:, 0]) + "."}, *(record.get("history") or [])]}
            for record, poles in zip(c["test"].records, active["test"])]
        found[f"instruction, {who}"] = evaluation_loss(base, make_rows(told, run.chat)[0], None, args.tokens)[0]

    states, a = reply_states(base, c["train"].rows, args.tokens), c["train"].active        # (N, L, D), (N, E)
    contrast = a / a.sum(0).clamp(min=1) - (1 - a) / (1 - a).sum(0).clamp(min=1)           # (N, E)
    vectors = torch.einsum("ne,nld->led", contrast, states)  # mean state in a pole's manner, minus the mean of others
    layers = sorted({len(vectors) // 4, len(vectors) // 2, 3 * len(vectors) // 4})
    for who, active in named.items():
        def steer(split, layer, strength):
            with steered(base, layer, strength * vectors[layer]):
                return evaluation_loss(base, c[split].rows, gates_for_rule("labels", active[split]), args.tokens)[0]
        choice = min(product(layers, (0.5, 1, 2, 4)), key=lambda choice: steer("validation", *choice).sum())
        found[f"steering, {who} (block {choice[0]}, x{choice[1]:g})"] = steer("test", *choice)
    return found


def routers_without_joint(args, c, cosines):
    """Warm-up experts under a router whose embeddings are each pole's mean state of the public encoder (nothing is
    trained; the overall mean is taken off), and under the trained router -> {method: nats}."""
    warm, found = load_run(args, args.run, "warmup"), {}
    fresh = warm.setup.load_router()
    with torch.no_grad():
        h = {split: torch.cat([fresh.embed(*pad([row.query], fresh.encoder.device)) for row in c[split].rows])
             for split in c}
        mean = h["train"].mean(0)
        fresh.expert_embeddings.copy_(c["train"].active.T.to(mean) @ (h["train"] - mean))
        prototype = {split: fresh.similarity(h[split] - mean).cpu() for split in c}
    for name, cosine in (("prototype", prototype), ("trained", cosines)):
        def routed(split, tau):
            return evaluation_loss(warm.model, c[split].rows, softmax_gate(cosine[split], tau), args.tokens)[0]
        tau = min(TAUS, key=lambda tau: routed("validation", tau).sum())
        found[f"warm-up experts, {name} router (tau {tau:g})"] = routed("test", tau)
    return found


def one_lora(args, run, c):
    """One LoRA with as many parameters, trained on as many rows -> {method: nats}.

    Ten experts under a fixed uniform gate are one LoRA of ten times the rank: with each one's α ten times as large,
    Σ_e 1/10 · 10α/r · B_e A_e = α/r · B A. Clipping and AdamW treat them as one; so that is how it is trained.
    """
    was, found = read_json(Path(args.run) / "config.json")["stages"], {}
    steps = sum(was[stage]["steps"] * was[stage]["batch"] for stage in ("warmup", "joint")) // was["joint"]["batch"]
    for lr in sorted({was["warmup"]["lr"], was["joint"]["lr"]}):
        folder = variant(args, Path(args.run), f"baselines/lora-lr-{lr:g}", ["joint"], fresh=["warmup"],
                         alpha=run.setup.alpha * len(EXPERTS), joint_gate="uniform", steps=steps, lr=lr)
        found[lr] = [joint_loss(args, folder, c[split], "uniform") for split in ("validation", "test")]
    best = min(found, key=lambda lr: found[lr][0].sum())
    return {f"one LoRA, rank {run.setup.rank * len(EXPERTS)} (lr {best:g})": found[best][1]}


def baselines_tables(args, run):
    """What simpler methods make of the same records: instructions, steering, one LoRA, a router that is not trained."""
    c = {split: load_cases(run, split, n) for split, n in (
        ("train", 1000), ("validation", args.records), ("test", args.records))}
    router = load_run(args, args.run, "warmup").router
    cosines = {split: score_queries(router, c[split].rows, args.tokens) for split in c}
    found = (instructed_and_steered(args, run, c, cosines) | routers_without_joint(args, c, cosines)
             | one_lora(args, run, c) | {"PersonaFuse": joint_loss(args, args.run, c["test"])})
    found = {name: [nats] for name, nats in found.items()}
    return [{"title": f"Loss in nats/token on {len(c['test'].rows)} test records and the difference to PersonaFuse "
                      "after joint, 95 %; what is in brackets was chosen on validation",
             "head": ["method", "loss", "against PersonaFuse"],
             "rows": compared(found, c["test"], "PersonaFuse", seed=args.seed)}]


NOT_WRITTEN_BY_US = LookupError, TypeError, ValueError, ArithmeticError, AttributeError  # what using such JSON raises
EXPERIMENTS = {"routing": routing_tables, "temperature": temperature_tables, "rank": rank_tables,
               "domain": domain_tables, "stages": stages_tables, "baselines": baselines_tables}


def experiment(args):
    """Train and measure what one question needs; tables, also in RUN/experiments/NAME/results.json."""
    for name in args.names:
        if name not in EXPERIMENTS:
            raise UserError(f"no experiment {name!r}, expected some of {', '.join(EXPERIMENTS)}")
    if args.stage:
        raise UserError("an experiment measures the stages that it is about: leave out --stage")
    for name in args.names:
        run, file = LoadedRun(args), Path(args.run) / "experiments" / name / "results.json"
        stages = read_json(run.setup.run / "config.json")["stages"]
        for stage in STAGES:
            if not (run.setup.run / stage).is_dir():
                raise UserError(f"{args.run} has no {stage} stage yet: python train.py --preset {run.setup.preset} "
                                f"--stage {stage} --run {args.run}")
        asked = {"tau": run.setup.tau, "stages": stages} | {k: getattr(args, k) for k in ("seed", "seeds", "records")}
        found = read_json(file) if file.exists() and not args.again else {}
        if found.get("asked") != asked:
            began = time.perf_counter()
            found = {"asked": asked, "tables": EXPERIMENTS[name](args, run)} | {"seconds": time.perf_counter() - began}
            with atomic(file) as part:
                part.write_text(json.dumps(found, indent=1) + "\n")
        print("\n" + textwrap.fill(f"{name}: {EXPERIMENTS[name].__doc__}", 80))
        try:
            for table in found["tables"]:
                print_table(**table)
            print(f"\n{file}: {found['seconds']:.0f} s of this start")
        except NOT_WRITTEN_BY_US as error:
            raise UserError(f"{file}: not what this experiment writes ({type(error).__name__}: {error}); --again "
                            "measures anew") from None
