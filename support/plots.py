"""The command plot: pictures of a run as RUN/plots/*.png. It needs matplotlib, which is optional.

    python eval.py plot --run runs/tiny

Each draw_ function draws one picture from the numbers that it is given; `plot` collects the numbers.
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
from support.files import UserError
from support.measure import LoadedRun, RecordOptions, load_run, pole_losses
from train import score_queries


@dataclass(kw_only=True)
class Plot(RecordOptions):
    show: int = 12
    """Number of queries in the heat map."""


# Okabe and Ito's colours, which colour-blind people can tell apart
COLOURS = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9"
LOSSES = {"router": "contrastive loss", "joint": "nats/token + λ × contrastive loss"}  # other stages: nats/token


def curves(run):
    """Returns the steps in log.jsonl as {stage: (N, 3 or 14)}.

    The columns are step, loss and learning rate; with a router also the entropy of the gate and its ten mean weights.
    UserError names a line without these numbers.
    """
    log, file = defaultdict(list), run / "log.jsonl"
    for line, entry in read_log(run):
        try:
            gate = [entry["entropy"], *entry["usage"]] if "entropy" in entry else []
            log[entry["stage"]].append([float(x) for x in (entry["step"], entry["loss"], entry["lr"], *gate)])
            if len(gate) not in (0, 1 + len(EXPERTS)) or len({len(row) for row in log[entry["stage"]]}) > 1:
                raise ValueError(f"{3 + len(gate)} numbers")
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            number = file.read_bytes().splitlines().index(line) + 1
            raise UserError(f"{file}, line {number}: not what training logs ({type(error).__name__}: {error}); without "
                            "this line the others can be drawn") from None
    return {stage: np.array(rows) for stage, rows in log.items()}


def smooth(values):
    """Returns the mean over the last ten steps, for every step: (N, …) -> (N, …)."""
    return np.array([values[max(0, i - 9):i + 1].mean(0) for i in range(len(values))])


def draw_training(pyplot, log):
    figure, axes = pyplot.subplots(2, len(log), figsize=(3.2 * len(log), 5), layout="constrained", squeeze=False)
    for (stage, columns), (above, below) in zip(log.items(), axes.T):
        steps, loss, lr = columns[:, :3].T
        above.plot(steps, loss, color="#BBBBBB", label="each step")
        above.plot(steps, smooth(loss), color=COLOURS[0], label="mean of ten")
        below.plot(steps, lr, color=COLOURS[1])
        above.set(title=stage, ylabel=LOSSES.get(stage, "nats/token"))
        below.set(xlabel="step", ylabel="learning rate")
    axes[0, 0].legend()
    return figure


def draw_gate(pyplot, log):
    figure, axes = pyplot.subplots(2, len(log), figsize=(4.5 * len(log) + 2, 6.5), layout="constrained", squeeze=False)
    for (stage, columns), (above, below) in zip(log.items(), axes.T):
        steps = columns[:, 0]
        above.plot(steps, columns[:, 3], color=COLOURS[0])
        above.axhline(math.log(len(EXPERTS)), color="black", linestyle=":")
        above.set(title=stage, ylabel="entropy of the gate, nats (dotted: uniform)")
        for e, values in enumerate(smooth(columns[:, 4:]).T):
            below.plot(steps, values, "-" if e % 2 == 0 else "--", color=COLOURS[e // 2], label=EXPERTS[e])
        below.set(xlabel="step", ylabel="mean weight (mean of ten steps)")
    figure.legend(*below.get_legend_handles_labels(), loc="outside right center")
    return figure


def draw_table(pyplot, values, texts, rows, columns, label, size, **axis_labels):
    """Draw a matrix as colours, with a text in every cell."""
    figure, axes = pyplot.subplots(figsize=size, layout="constrained")
    image = axes.imshow(values, aspect="auto", cmap="viridis")
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.set(**axis_labels)
    figure.colorbar(image, label=label)
    for (y, x), text in np.ndenumerate(texts):
        dark = image.norm(values[y, x]) < 0.6
        axes.text(x, y, text, ha="center", va="center", fontsize=8, color="white" if dark else "black")
    return figure


def plot(args):
    """Draw a run's losses, gates and experts as RUN/plots/*.png. Needs matplotlib."""
    try:
        import matplotlib
        matplotlib.use("agg")
        from matplotlib import pyplot
    except ImportError:
        raise UserError("plot needs matplotlib, which is optional: pip install matplotlib") from None
    opened = LoadedRun(args)
    run = opened.setup.run
    log = curves(run)
    (run / "plots").mkdir(exist_ok=True)

    def save(name, figure):
        figure.savefig(run / "plots" / f"{name}.png", dpi=130)
        pyplot.close(figure)
        print(run / "plots" / f"{name}.png")

    if log:
        save("training", draw_training(pyplot, log))
    else:
        print(f"{run / 'log.jsonl'}: no step is logged yet, so there are no curves to draw")
    gated = {stage: columns for stage, columns in log.items() if columns.shape[1] > 3}
    if gated:
        save("gate", draw_gate(pyplot, gated))
    if opened.setup.stage_folder("router"):
        records, _ = opened.records(need_response=False, limit=args.show)
        rows, tau = opened.rows(records), opened.setup.tau
        gates = softmax_gate(score_queries(opened.router, rows, args.tokens), tau).numpy()
        marks = np.where(torch.stack([row.active for row in rows]).numpy() > 0, "●", "")
        queries = [textwrap.shorten(record["query"], 60, placeholder=" …") for record in records]
        save("heatmap", draw_table(pyplot, gates, marks, queries, SHORT_NAMES, f"weight at tau {tau:g}; ● the labels "
                                   "call for this pole", (12, 1.2 + 0.36 * len(rows))))
    if (run / "warmup").is_dir():
        records, _, nats = pole_losses(load_run(args, args.run, "warmup"), args)
        if records:
            best = np.where(np.isnan(nats), np.inf, nats).min(0)
            texts = np.array([[f"{x:.2f}*" if x == lowest else f"{x:.2f}" for x, lowest in zip(row, best)]
                              for row in nats])
            save("experts", draw_table(pyplot, nats, texts, EXPERTS, SHORT_NAMES, "nats/token; * is the best of a "
                                       "column", (10, 5.5), xlabel="pole that the records call for",
                                       ylabel="warm-up expert, alone"))
        else:
            print("no test record calls for exactly one pole, so there is no table of experts to draw")
