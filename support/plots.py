"""The command plot: pictures of a run.
"""
import math
import textwrap
from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import torch

from lora import EXPERTS, SHORT_NAMES
from router import softmax_gate
from support.checkpoints import read_log
from support.experiments import LENGTHS, NOT_WRITTEN_BY_US
from support.files import UserError, read_json
from support.measure import LoadedRun, RecordOptions, load_run, pole_losses
from train import score_queries


@dataclass(kw_only=True)
class Plot(RecordOptions):
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
    run = LoadedRun(args)
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
        gates = softmax_gate(score_queries(run.router, rows, args.tokens), run.setup.tau).numpy()
        called = np.where(torch.stack([row.active for row in rows]).numpy() > 0, "●", "")
        queries = [textwrap.shorten(record["query"], 60, placeholder=" …") for record in records]
        save("heatmap", table(gates, queries, SHORT_NAMES, (12, 1.2 + 0.36 * len(rows)), f"weight at tau {run.setup.tau:g}; "
                              "● the labels call for this pole", called))

    if (run.setup.run / "warmup").is_dir():
        _, _, nats = pole_losses(load_run(args, args.run, "warmup"), args)
        best = np.where(np.isnan(nats), np.inf, nats).min(0)
        text = np.array([[f"{x:.2f}" + "*" * bool(x == low) for x, low in zip(row, best)] for row in nats])
        figure = table(nats, EXPERTS, SHORT_NAMES, (10, 5.5), "nats/token; * is the best of a column", text)
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
