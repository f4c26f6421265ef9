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
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

import train
from batches import Example, cost, examples, micro_batches
from eval import Common, Measured, OnRecords, bootstrap, one_hot, pole_losses, show, subsets
from lora import EXPERTS, SHORT, TRAITS, expert_layers, save_experts
from model import UserError, atomic, encode, gate_at, load_tokenizer, pad, read_json, short
from router import gate_report, gates_under, persona_gate, query_ids, save_router, softmax_gate
from runs import STAGES, Setup, read_log, read_run
from synth import load_data, read_table, write_records
from train import heldout, similarities

# ----------------------------------------------------------------------------------------------------------------------
# experiment: train a variant, measure it under a gate rule, compare

@dataclass(kw_only=True)
class Experiment(Common):
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
    setup = opened(args, folder).setup
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


def opened(args, folder, stage=None):
    """The run in `folder`, to be measured with the other arguments of `args`."""
    return Measured(replace(args, run=str(folder), stage=stage))


def seeded(args, default=1):
    """The run from each of several seeds, one after the other: itself, then all three stages anew from other seeds on
    the same models and records -> seed and folder of each."""
    run = Measured(args)
    for seed in range(run.setup.seed, run.setup.seed + (args.seeds or default)):
        yield seed, Path(args.run) if seed == run.setup.seed else variant(
            args, Path(args.run), f"seed-{seed}", STAGES, data=run.setup.load_data(), seed=seed)


def cases(run, split="test", limit=None):
    """Records of a split as rows for base and encoder, and what gate rules and comparisons need of them."""
    records, new_domain = run.records(split, limit=limit)
    rows, _ = examples(records, run.chat, load_tokenizer(run.setup.encoder))
    return SimpleNamespace(
        records=records, rows=rows, active=torch.stack([row.active for row in rows]),
        counts=np.array([float(cost(row) - row.prompt) for row in rows]),
        new_domain=new_domain)


def losses(run, c, rules, tau=None, seed=0):
    """Nats of every case's reply under each gate rule, {rule: (N,)}."""
    similarity = similarities(run.router, c.rows, run.args.tokens)
    return {rule: heldout(run.model, c.rows, gates_under(rule, c.active, similarity, tau or run.setup.tau, seed),
                          run.args.tokens)[0] for rule in rules}


def spread(values):
    """-> [mean, standard deviation over seeds], as tables and results.json have it."""
    return [float(np.mean(values)), float(np.std(values))]


def compared(found, c, reference, part=slice(None), seed=0):
    """{name: nats (N,) of each seed} -> table rows: name, nats per token with their spread over seeds, and the
    difference to `reference`, averaged over seeds, with its interval over records."""
    rows, counts = [], c.counts[part]
    for name, runs in found.items():
        difference = (np.mean(runs, 0) - np.mean(found[reference], 0))[part]
        rows.append([name, spread([nats[part].sum() / counts.sum() for nats in runs]),
                     "" if name == reference else [*map(float, bootstrap(difference, counts, seed))]])
    return rows


def show_table(table):
    """Print a table {"title", "head", "rows"}: [mean, spread] as 1.234 ± 0.005, [mean, low, high] as an interval."""
    def text(x):
        if isinstance(x, list):
            if len(x) == 2:  # without spread: one seed
                return f"{x[0]:.3f} ± {x[1]:.3f}" if x[1] else f"{x[0]:.3f}"
            return f"{x[0]:+.4f} [{x[1]:+.4f}, {x[2]:+.4f}]"
        return f"{x:.3f}" if isinstance(x, float) else f"{x:,}" if isinstance(x, int) else str(x)
    print("\n" + textwrap.fill(table["title"], 80) + "\n")
    show([table["head"], *([text(x) for x in row] for row in table["rows"])], width=200)


def routing_tables(args, run):
    """Is the router's gate worth more than other gates, on the experts before and after joint training?"""
    tests, validation = cases(run, "test", args.records), cases(run, "validation", args.records)

    def measure(folder, stage):
        m = opened(args, folder, stage)

        def alone(c, e):
            return heldout(m.model, c.rows, one_hot(e).expand(len(c.rows), -1), args.tokens)[0]
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
        found["joint"]["control"].append(losses(opened(args, control, "joint"), tests, ["uniform"])["uniform"])
    return [{"title": f"Experts after {stage}, tau {run.setup.tau:g}; {len(part)} test records, {name}: loss in "
                      f"nats/token, mean and spread of {len(runs['learned'])} seeds, against the learned gate, 95 %",
             "head": ["gate", "loss", "against learned"], "rows": compared(runs, tests, "learned", part, args.seed)}
            for stage, runs in found.items() for name, part in subsets(tests.new_domain)]


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


TAUS = (1.0, 0.5, 0.2, 0.1, 0.05)
LENGTHS = {"before joint": 0, "short joint": 1, "long joint": 3}  # in the joint stage's own number of steps


def temperature_tables(args, run):
    """Which τ, for the gate as it is and for joint training at it, short and long; what becomes of single experts."""
    tests, validation = cases(run, "test", args.records), cases(run, "validation", args.records)
    alone = [i for i, a in enumerate(tests.active) if a.sum() == 1]  # records that call for one pole
    rows, poles = [tests.rows[i] for i in alone], tests.active[alone].argmax(-1)

    def measure(folder, stage, tau, first):
        m = opened(args, folder, stage)
        gram, gates = update_gram(m.model), softmax_gate(similarities(m.router, tests.rows, args.tokens), tau)
        size, report, pair = gram.diagonal().sqrt(), gate_report(gates), torch.arange(len(EXPERTS)) // 2
        cosines = gram / size.outer(size).clamp(min=1e-30)
        opposite, other = (pair[:, None] == pair) & ~torch.eye(len(pair), dtype=bool), pair[:, None] != pair
        gates = gates.double()
        nats = losses(m, tests, ["learned"], tau)["learned"]
        count = tests.counts[alone].sum()
        by_hand = torch.stack([persona_gate(SHORT[e], tau) for e in poles])
        return {"entropy": report["entropy"], "top-1": report["top1"], "opposite": cosines[opposite].mean().item(),
                "others": cosines[other].mean().item(), "size": size.mean().item(),
                "norm": ((gates @ gram * gates).sum(-1).sqrt().mean() / size.mean()).item(),
                "growth": size.mean().item() / (first or size.mean().item()),
                "validation": losses(m, validation, ["learned"], tau)["learned"].sum() / validation.counts.sum(),
                "test": nats.sum() / tests.counts.sum(), "nats": nats, "one-pole": nats[alone].sum() / count,
                "single": heldout(m.model, rows, torch.eye(len(EXPERTS))[poles], args.tokens)[0].sum() / count,
                "persona": heldout(m.model, rows, by_hand, args.tokens)[0].sum() / count}

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
               "rows": [[f"{tau:g}", *mean(when, tau, *keys), spread([m["test"] for m in found[when, tau]])]
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
    return losses(opened(args, folder, "joint"), c, [rule])[rule]


def seconds_of(folder):
    """What a variant's stage took; NaN if a kill came between its result and the note of it."""
    file = folder / "seconds.json"
    seconds = read_json(file).get("seconds") if file.exists() else math.nan
    if not isinstance(seconds, (int, float)):
        raise UserError(f"{file}: seconds is {short(seconds)}, expected a number; remove the file")
    return seconds


def rank_tables(args, run):
    """What a larger rank costs and brings, α/r kept as it is."""
    tests, rows = cases(run, "test", args.records), []
    for rank in (4, 8, 16):
        found = defaultdict(list)
        for seed, source in seeded(args):
            folder = variant(args, source, f"rank/rank-{rank}-seed-{seed}", ["warmup", "joint"], rank=rank,
                             alpha=run.setup.alpha / run.setup.rank * rank)
            for stage in ("warmup", "joint"):
                m = opened(args, folder, stage)
                found[stage].append(losses(m, tests, ["learned"])["learned"].sum() / tests.counts.sum())
                found["seconds"].append(seconds_of(folder / stage))
            size = sum(layer.A.numel() + layer.B.numel() for layer in expert_layers(m.model).values())
        rows.append([str(rank), size, f"{sum(found['seconds']) / len(found['joint']):.0f}",
                     spread(found["warmup"]), spread(found["joint"])])
    return [{"title": f"Rank, alpha/r {run.setup.alpha / run.setup.rank:g}: parameters of all experts, seconds of "
                      f"warm-up and joint, loss in nats/token on {len(tests.rows)} test records, learned gate",
             "head": ["rank", "parameters", "seconds", "after warm-up", "after joint"], "rows": rows}]


def domain_tables(args, run):
    """Trained on one domain, tested on the others."""
    tests, splits = cases(run, "test", args.records), run.setup.load_data()
    names = [name for name, _ in Counter(r["domain"] for r in splits["train"] if r.get("domain")).most_common(3)]
    if len(names) < 3:
        raise UserError(f"{run.setup.data}: the training records name {len(names)} domains, expected three or more")
    of = np.array([record.get("domain") for record in tests.records])
    parts = {name: of == name for name in names}
    parts |= {"others": ~tests.new_domain & ~np.isin(of, names), "never seen": tests.new_domain}
    parts = {name: part for name, part in parts.items() if part.any()}
    folders = {f"only {name}": variant(args, Path(args.run), f"domain/{i}-{name.replace('/', '-')}", STAGES, data={
        **splits, "train": [r for r in splits["train"] if r.get("domain") == name]}) for i, name in enumerate(names)}
    found = {name: losses(opened(args, folder, "joint"), tests, ("base", "learned", "shuffled"))
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
    tests, found = cases(run, "test", args.records), defaultdict(list)
    plans = {"no warm-up": dict(fresh=["warmup"]), "no router stage": dict(fresh=["router"]), "lambda 0": dict(lam=0.0),
             "lambda 0.1": dict(lam=0.1), "lambda 1": dict(lam=1.0)}
    for seed, source in seeded(args):
        found["all stages"].append(joint_loss(args, source, tests))
        found["no joint stage"].append(losses(opened(args, source, "warmup"), tests, ["learned"])["learned"])
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
    base, found = opened(args, args.run, "warmup").setup.load_base(), {}  # experts as initialised add nothing

    def called(split, threshold):  # what the router names: its first choice, and all poles above a cosine
        s = cosines[split]
        return ((s >= threshold) | (s == s.max(-1, keepdim=True).values)).float()

    def f1(threshold):
        a, b = called("validation", threshold), c["validation"].active
        return 2 * (a * b).sum() / (a.sum() + b.sum())

    threshold = max(np.arange(-0.5, 1, 0.05), key=f1)  # the best one on validation
    named = {"labels": {split: c[split].active for split in c}, "router": {s: called(s, threshold) for s in c}}
    found["base"] = heldout(base, c["test"].rows, None, args.tokens)[0]
    for who, active in named.items():
        told = [{**record, "history": [{"role": "system", "content": "Answer as someone of " + " and ".join(
            EXPERTS[e].replace("_", " ") for e in poles.nonzero()[:, 0]) + "."}, *(record.get("history") or [])]}
            for record, poles in zip(c["test"].records, active["test"])]
        found[f"instruction, {who}"] = heldout(base, examples(told, run.chat)[0], None, args.tokens)[0]

    states, a = reply_states(base, c["train"].rows, args.tokens), c["train"].active        # (N, L, D), (N, E)
    contrast = a / a.sum(0).clamp(min=1) - (1 - a) / (1 - a).sum(0).clamp(min=1)           # (N, E)
    vectors = torch.einsum("ne,nld->led", contrast, states)  # mean state in a pole's manner, minus the mean of others
    layers = sorted({len(vectors) // 4, len(vectors) // 2, 3 * len(vectors) // 4})
    for who, active in named.items():
        def steer(split, layer, strength):
            with steered(base, layer, strength * vectors[layer]):
                return heldout(base, c[split].rows, gates_under("labels", active[split]), args.tokens)[0]
        choice = min(product(layers, (0.5, 1, 2, 4)), key=lambda choice: steer("validation", *choice).sum())
        found[f"steering, {who} (block {choice[0]}, x{choice[1]:g})"] = steer("test", *choice)
    return found


def routers_without_joint(args, c, cosines):
    """Warm-up experts under a router whose embeddings are each pole's mean state of the public encoder (nothing is
    trained; the overall mean is taken off), and under the trained router -> {method: nats}."""
    warm, found = opened(args, args.run, "warmup"), {}
    fresh = warm.setup.load_router()
    with torch.no_grad():
        h = {split: torch.cat([fresh.embed(*pad([row.query], fresh.encoder.device)) for row in c[split].rows])
             for split in c}
        mean = h["train"].mean(0)
        fresh.expert_embeddings.copy_(c["train"].active.T.to(mean) @ (h["train"] - mean))
        prototype = {split: fresh.similarity(h[split] - mean).cpu() for split in c}
    for name, cosine in (("prototype", prototype), ("trained", cosines)):
        def routed(split, tau):
            return heldout(warm.model, c[split].rows, softmax_gate(cosine[split], tau), args.tokens)[0]
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
    c = {split: cases(run, split, n) for split, n in (
        ("train", 1000), ("validation", args.records), ("test", args.records))}
    router = opened(args, args.run, "warmup").router
    cosines = {split: similarities(router, c[split].rows, args.tokens) for split in c}
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
        run, file = Measured(args), Path(args.run) / "experiments" / name / "results.json"
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
                show_table(table)
            print(f"\n{file}: {found['seconds']:.0f} s of this start")
        except NOT_WRITTEN_BY_US as error:
            raise UserError(f"{file}: not what this experiment writes ({type(error).__name__}: {error}); --again "
                            "measures anew") from None


# ----------------------------------------------------------------------------------------------------------------------
# health

@dataclass(kw_only=True)
class Health(OnRecords):
    text: str | None = None
    """File of plain text, blank lines between its pieces, to see general ability on; the test queries, and the neutral
    replies of the template teacher's records, if not given."""
    records: int | None = None
    """How many test records; all if not given."""


def plain_rows(run, texts):
    """Texts as rows in which all but the first token counts: nobody asks, nobody is in a manner."""
    tokenizer, bos = load_tokenizer(run.setup.encoder), [] if run.chat.bos is None else [run.chat.bos]
    return [Example(str(i), torch.zeros(len(EXPERTS)), np.array([*bos, *encode(
        run.chat.tokenizer, text), run.chat.end][:run.args.tokens], dtype=np.int32), 1,
        np.array(query_ids(tokenizer, text), dtype=np.int32)) for i, text in enumerate(texts)]


def health(args):
    """Failure signatures, in words and figures; exit status 1 when one holds. The first three are the source's."""
    run, alarms = Measured(args), []
    c, (splits, zero) = cases(run, limit=args.records), load_data(run.setup.data, run.setup.seed)
    similarity, tau, uniform = similarities(run.router, c.rows, args.tokens), run.setup.tau, math.log(len(EXPERTS))
    gates = softmax_gate(similarity, tau)
    print(f"{args.run}: experts after {run.folder('experts').parent.name}, tau {tau:g}, {len(c.rows)} test records\n")

    def check(name, holds, text):
        alarms.extend([name] * bool(holds))
        print(textwrap.fill(f"{'ALARM' if holds else 'ok':<7}{name}: {text}", 80, subsequent_indent=" " * 7))

    nats = losses(run, c, ("learned", "random", "shuffled"), seed=args.seed)
    worth = {rule: bootstrap(nats[rule] - nats["learned"], c.counts, args.seed) for rule in ("random", "shuffled")}
    check("router", any(low <= 0 for _, low, _ in worth.values()),
          "against its gates, " + ", ".join(f"{rule} ones lose {mean:.4f} [{low:.4f}, {high:.4f}]"
                                            for rule, (mean, low, high) in worth.items())
          + " nats/token; an interval that reaches 0 is a router no better than chance")

    texts = [text for record in c.records for text in (record["query"], record.get("neutral")) if text]
    if args.text:
        try:
            texts = [text for text in Path(args.text).read_text(encoding="utf-8").split("\n\n") if text.strip()]
        except (OSError, ValueError) as error:
            raise UserError(f"{args.text}: {error}") from None
    rows = plain_rows(run, texts)
    base, counts = heldout(run.model, rows, None, args.tokens)
    mixed, _ = heldout(run.model, rows, softmax_gate(similarities(run.router, rows, args.tokens), tau), args.tokens)
    mean, low, high = (x / (base.sum() / counts.sum()) for x in bootstrap(mixed - base, counts, args.seed))
    check("general ability", low > 0.1, f"the mixture's loss on plain text is {mean:+.1%} [{low:+.1%}, {high:+.1%}] of "
          f"the base's {base.sum() / counts.sum():.3f} nats/token; an interval above a tenth is too much")

    total = sum(map(len, splits.values())) + zero
    check("all-zero vectors", zero, f"{zero} of {total} records have no active trait; they are not trained on")

    gram, usage = update_gram(run.model), gates.mean(0)
    size, first = gram.diagonal().sqrt(), torch.bincount(similarity.argmax(-1), minlength=len(EXPERTS)) / len(gates)
    dead = [name for name, share, updated in zip(EXPERTS, torch.minimum(usage, first), size / size.max())
            if share < 0.1 / len(EXPERTS) or updated < 0.01]
    check("dead experts", dead, f"{', '.join(dead) or 'none'}; lowest mean weight {usage.min():.3f}, lowest share of "
          f"first choices {first.min():.3f}, smallest update {size.min() / size.max():.2f} of the largest (dead: 0.01)")

    entropy = gate_report(gates)["entropy"]
    check("collapsed gate", not 0.01 < entropy / uniform < 0.99, f"entropy {entropy:.3f} nats; within 1 % of 0 it is "
          f"one expert, within 1 % of {uniform:.3f} all alike")

    alone = [i for i, a in enumerate(c.active) if a.sum() == 1]
    rows, poles = [c.rows[i] for i in alone], c.active[alone].argmax(-1)
    gain = np.full(len(EXPERTS), math.nan)
    if alone:
        gains = (heldout(run.model, rows, torch.eye(len(EXPERTS))[poles], args.tokens)[0]
                 - heldout(run.model, rows, None, args.tokens)[0])
        for p in set(poles.tolist()):
            gain[p] = gains[poles == p].sum() / c.counts[alone][poles == p].sum()
    lost = [EXPERTS[e] for e in np.flatnonzero(gain > 0)]
    check("experts that only work together", lost, (", ".join(lost) or "none") + "; one alone on its pole's records "
          f"against the base, nats/token: best {np.nanmin(gain):+.3f}, worst {np.nanmax(gain):+.3f}" if alone else
          "not seen: no test record calls for one pole alone")

    cosines = gram / size.outer(size).clamp(min=1e-30) - 2 * torch.eye(len(EXPERTS))
    a, b = divmod(int(cosines.argmax()), len(EXPERTS))
    check("copies", cosines.max() > 0.9, f"the updates most alike are those of {EXPERTS[a]} and {EXPERTS[b]}, cosine "
          f"{cosines.max():.2f}; above 0.90 they are copies")
    print(f"\n{len(alarms)} alarm{'s' * (len(alarms) != 1)}" + ": " * bool(alarms) + ", ".join(alarms))
    return int(bool(alarms))


# ----------------------------------------------------------------------------------------------------------------------
# plot

@dataclass(kw_only=True)
class Plot(OnRecords):
    show: int = 12
    """Queries in the heat map."""
    records: int | None = None
    """How many test records for the table of experts; all if not given."""


COLOURS = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9"  # Okabe and Ito's, which colour-blind people tell apart


def curves(run):
    """log.jsonl -> {stage: (N, 3 or 14)}: step, loss, learning rate; with a router the gate's entropy and ten mean
    weights. UserError names a line that has others."""
    found, file = defaultdict(list), run / "log.jsonl"
    for line, entry in read_log(run):
        try:
            gate = [entry["entropy"], *entry["usage"]] if "entropy" in entry else []
            row = [float(x) for x in (entry["step"], entry["loss"], entry["lr"], *gate)]
            rows = found[entry["stage"]]
            rows.append(row)
            if len(row) not in (3, 4 + len(EXPERTS)) or len(row) != len(rows[0]):
                raise ValueError(f"{len(row)} numbers")
        except NOT_WRITTEN_BY_US as error:
            number = file.read_bytes().splitlines().index(line) + 1
            raise UserError(f"{file}, line {number}: not what training logs ({type(error).__name__}: {error}); remove "
                            "the line, and the others are drawn") from None
    return {stage: np.array(rows) for stage, rows in found.items()}


def sweep(file):
    """The temperature experiment's results.json -> {when: (5, T)}: tau, test loss and its spread, entropy, loss of
    single experts."""
    try:
        found, (*tables, poles) = {}, read_json(file)["tables"][:len(LENGTHS) + 1]
        for when, table in zip(LENGTHS, tables, strict=True):
            rows = [dict(zip(table["head"], row)) for row in table["rows"]]
            single = [row[3] for row in poles["rows"] if row[0] == when]
            found[when] = np.array([[row["tau"], *row["test"], row["entropy"], loss]
                                    for row, loss in zip(rows, single, strict=True)], dtype=float).T
            if len(found[when]) != 5 or not np.isfinite(found[when]).all() or (found[when][[0, 2]] < 0).any():
                raise ValueError(f"{when}: not five numbers for each tau")
        return found
    except NOT_WRITTEN_BY_US as error:
        raise UserError(f"{file}: not what the experiment writes ({type(error).__name__}: {error}); python eval.py "
                        "experiment temperature --again measures anew") from None


def plot(args):
    """Pictures of a run as RUN/plots/*.png: losses, gates, experts, the temperature sweep. Needs matplotlib."""
    try:
        import matplotlib
        matplotlib.use("agg")
        from matplotlib import pyplot
    except ImportError:
        raise UserError("plot needs matplotlib, which is optional: pip install matplotlib") from None
    run = Measured(args)
    folder, log, file = run.setup.run / "plots", curves(run.setup.run), \
        run.setup.run / "experiments" / "temperature" / "results.json"
    taus = sweep(file) if file.exists() else None
    folder.mkdir(exist_ok=True)

    def save(name, figure):
        figure.savefig(folder / f"{name}.png", dpi=130)
        pyplot.close(figure)
        print(folder / f"{name}.png")

    def smooth(values):  # mean of the last ten steps
        return np.array([values[max(0, i - 9):i + 1].mean(0) for i in range(len(values))])

    def table(values, rows, columns, figure_size, label, text=None):
        figure, axes = pyplot.subplots(figsize=figure_size, layout="constrained")
        image = axes.imshow(values, aspect="auto", cmap="viridis")
        axes.set_xticks(range(len(columns)), columns)
        axes.set_yticks(range(len(rows)), rows)
        figure.colorbar(image, label=label)
        for (y, x), word in np.ndenumerate(np.full(values.shape, "") if text is None else text):
            dark = image.norm(values[y, x]) < 0.6
            axes.text(x, y, word, ha="center", va="center", fontsize=8, color="white" if dark else "black")
        return figure

    if log:
        figure, axes = pyplot.subplots(2, len(log), figsize=(3.2 * len(log), 5), layout="constrained", squeeze=False)
        for (stage, found), (above, below) in zip(log.items(), axes.T):
            steps, loss, lr = found[:, :3].T
            above.plot(steps, loss, color="#BBBBBB", label="each step")
            above.plot(steps, smooth(loss), color=COLOURS[0], label="mean of ten")
            below.plot(steps, lr, color=COLOURS[1])
            above.set(title=stage, ylabel="loss (contrastive)" if stage == "router" else "loss, nats/token")
            below.set(xlabel="step", ylabel="learning rate")
        axes[0, 0].legend()
        save("training", figure)
    else:
        print(f"{run.setup.run / 'log.jsonl'}: no step is logged yet, so there are no curves to draw")

    gated = {stage: found for stage, found in log.items() if found.shape[1] > 3}
    if gated:
        figure, axes = pyplot.subplots(2, len(gated), figsize=(4.5 * len(gated) + 2, 6.5), layout="constrained",
                                       squeeze=False)
        for (stage, found), (above, below) in zip(gated.items(), axes.T):
            steps = found[:, 0]
            above.plot(steps, found[:, 3], color=COLOURS[0])
            above.axhline(math.log(len(EXPERTS)), color="black", linestyle=":")
            above.set(title=stage, ylabel="entropy of the gate, nats (dotted: uniform)")
            for e, values in enumerate(smooth(found[:, 4:]).T):
                colour = COLOURS[e // 2 % len(COLOURS)]
                below.plot(steps, values, "-" if e % 2 == 0 else "--", color=colour, label=EXPERTS[e])
            below.set(xlabel="step", ylabel="mean weight (mean of ten steps)")
        figure.legend(*below.get_legend_handles_labels(), loc="outside right center")
        save("gate", figure)

    if run.setup.stage_folder("router"):
        records, _ = run.records(need_response=False, limit=args.show)
        rows = run.rows(records)
        gates = softmax_gate(similarities(run.router, rows, args.tokens), run.setup.tau).numpy()
        called = np.where(torch.stack([row.active for row in rows]).numpy() > 0, "●", "")
        queries = [textwrap.shorten(record["query"], 60, placeholder=" …") for record in records]
        save("heatmap", table(gates, queries, SHORT, (12, 1.2 + 0.36 * len(rows)), f"weight at tau {run.setup.tau:g}; "
                              "● the labels call for this pole", called))

    if (run.setup.run / "warmup").is_dir():
        _, _, nats = pole_losses(opened(args, args.run, "warmup"), args)
        best = np.where(np.isnan(nats), np.inf, nats).min(0)
        text = np.array([[f"{x:.2f}" + "*" * bool(x == low) for x, low in zip(row, best)] for row in nats])
        figure = table(nats, EXPERTS, SHORT, (10, 5.5), "nats/token; * is the best of a column", text)
        figure.axes[0].set(xlabel="pole that the records call for", ylabel="warm-up expert, alone")
        save("experts", figure)

    if taus is None:
        print(f"no temperature sweep yet: python eval.py experiment temperature --run {args.run}")
        return
    figure, axes = pyplot.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for (when, (tau, loss, sd, entropy, single)), colour, marker in zip(taus.items(), COLOURS, "os^"):
        style = {"color": colour, "marker": marker, "label": when}
        axes[0].errorbar(tau, loss, sd, **style)
        axes[1].plot(tau, entropy, **style)
        axes[2].plot(tau, single, **style)
    for axis, label in zip(axes, ("test loss, nats/token", "entropy of the gate, nats",
                                  "loss of single experts, nats/token")):
        axis.set(xscale="log", xlabel="tau", ylabel=label, xticks=tau, xticklabels=[f"{x:g}" for x in tau])
        axis.minorticks_off()
    axes[0].legend()
    save("temperature", figure)


# ----------------------------------------------------------------------------------------------------------------------
# inventory

@dataclass(kw_only=True)
class Inventory(Common):
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
        rows = [Example(i, None, np.array(ids), 0) for i, ids in enumerate(prompts)]
        for group in micro_batches(rows, run.args.tokens):
            ids, lengths = pad([row.ids for row in group], run.model.device)
            h = run.model.hidden(ids, None if gate is None else gate.expand(len(group), -1).to(ids.device))
            logits = run.model.head(h[torch.arange(len(group), device=h.device), lengths - 1])[:, letters]  # (B, 5)
            found[order, [row.id for row in group]] = logits.float().softmax(-1).cpu() @ torch.tensor(values)
    return found.numpy()


def inventory(args):
    """An inventory answered by the base and by each expert alone: trait scores, pole separation, leakage."""
    run, items = Measured(replace(args, stage=args.stage or "warmup")), read_items(
        args.items or Path(__file__).parent / "data" / "inventory.csv")
    keys, letters = np.array([int(item["key"]) for item in items]), np.array([item["label_ocean"] for item in items])
    agreed = np.stack([ratings(run, [item["text"].strip() for item in items], gate)
                       for gate in (None, *map(one_hot, range(len(EXPERTS))))])  # (1 + E, 2, I)
    scores, who = np.where(keys > 0, agreed, 6 - agreed), ("base", *EXPERTS)
    traits = [letter for letter in INITIALS if letter in letters]
    stage = run.folder("experts").parent.name

    def mean(e, mask):  # nan, without a warning, where nothing is keyed this way
        return scores[e][:, mask].mean() if mask.any() else math.nan

    cells = [[(mean(e, letters == t), np.abs(np.subtract(*scores[e][:, letters == t])).mean(),
               mean(e, (letters == t) & (keys > 0)), mean(e, (letters == t) & (keys < 0))) for t in traits]
             for e in range(len(who))]
    show_table({"title": f"{len(items)} statements, experts after {stage}, each alone: trait scores from 1 to 5 ± the "
                         "mean gap between the two orders of the answers", "head": ["", *traits],
                "rows": [[name, *(f"{x:.2f}±{gap:.2f}" for x, gap, _, _ in row)] for name, row in zip(who, cells)]})
    show_table({"title": "The same from the positively / negatively keyed statements alone: halves that differ show a "
                         "habit of agreeing, not a trait", "head": ["", *traits],
                "rows": [[name, *(f"{plus:.2f}/{minus:.2f}" for _, _, plus, minus in row)]
                         for name, row in zip(who, cells)]})
    moved = scores.mean(1)[1::2] - scores.mean(1)[2::2]  # (5, I): high expert minus low expert, a row a trait
    apart = np.array([[row[letters == t].mean() / max(row[letters == t].std(), 1e-9) for t in traits] for row in moved])
    own = np.array([[TRAITS[INITIALS.index(t)] == trait for t in traits] for trait in TRAITS])
    show_table({"title": "High expert minus low expert, in standard deviations of that difference over statements; "
                         "rows: whose experts, columns: whose statements", "head": ["", *traits],
                "rows": [[trait, *(f"{x:+.2f}" for x in row)] for trait, row in zip(TRAITS, apart)]})
    print(f"\n  pole separation (own trait) {apart[own].mean():+.2f}, leakage to other traits (mean size) "
          f"{np.abs(apart[~own]).mean():.2f}")


COMMANDS = {"experiment": (Experiment, experiment), "health": (Health, health), "plot": (Plot, plot),
            "inventory": (Inventory, inventory)}
