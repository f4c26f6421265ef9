"""Training: three stages, one loop.

    warmup   every expert alone: language-model loss on the replies of the records in which its pole is active
    router   the encoder and the expert embeddings: contrastive loss. The base model is not loaded
    joint    experts and router together: language-model loss through the mixture, plus λ times the contrastive loss;
             a share of the rows trains one expert alone, as in warm-up (--rehearse, ours)

What is notable:
- data flow one way: record -> row -> batch -> gate -> loss -> step. `Stage` is what one stage trains and its loss;
  `fit` is the loop that all stages share
- a step is cut into micro-batches under a budget of tokens, which does not change its loss: a language-model loss is a
  mean over the tokens of the whole step (in warm-up one for each expert, summed), a contrastive loss over its rows
- the order of the data depends only on the rows, the batch size, the seed, the stage, the step and, in joint, on
  --rehearse. So a resumed run goes on where it stopped, on the same CPU bit for bit
- under torchrun, process r of n takes rows r, r + n, … of a step, sorted by length; gradients and logged numbers are
  summed over the processes

    python train.py --preset tiny --stage all       # everything on a laptop's CPU in three minutes; needs no download
    python train.py --stage router                  # Qwen2.5-0.5B on one GPU
    python train.py --stage all                     # Llama-3.1-8B on one GPU
    torchrun --nproc_per_node=4 -- train.py --stage all     # on four; "--" ends torchrun's own options

Shapes: B rows, T tokens, N supervised tokens, D width, V vocabulary, E experts.
"""
import math
import os
import sys
import time
import typing
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from torch.nn import functional as F
from tqdm import tqdm

from lora import EXPERTS, expert_layers, save_experts
from model import Config, generate, pad, to_device
from router import GATE_RULES, contrastive_loss, gate_statistics, gates_for_rule, save_router
from support.chat import Chat, load_tokenizer
from support.checkpoints import (Stopped, append_to_log, check_disk_space, check_finite, load_latest_checkpoint,
                                 open_log, save_checkpoint)
from support.command import parse, run_command
from support.compile import compile_layers
from support.files import UserError, atomic
from support.head_loss import frozen_head_loss
from support.process import (all_reduce_sum, any_process_wants_to_stop, join_process_group, keep_freed_memory,
                             rank_and_world_size, stop_on_signal)
from support.records import messages_of
from support.rows import batches, make_rows, micro_batches, n_tokens, rehearsed, rows_per_pole
from support.runs import (STAGES, check_fingerprints, complete_setup, make_setup, open_run, stage_settings,
                          unfinished_stages)
from support.tables import print_table
from support.tiny import make_missing_models


@dataclass
class Args:
    stage: typing.Literal["warmup", "router", "joint", "all"] = "all"
    """What to train; all does the three in order."""
    preset: typing.Literal["paper", "small", "tiny"] = "paper"
    """Models and sizes. paper: Llama-3.1-8B and Qwen2.5-0.5B on one GPU. small: SmolLM2-135M and Qwen2.5-0.5B. tiny:
    two models made on the spot. An option without a default takes the preset's value."""
    run: str | None = None
    """Folder for results, log and checkpoints; runs/PRESET if not given."""
    data: str | None = None
    """Records: a .jsonl file, split 80/10/10 by query or by each record's field split, or a folder with train,
    validation and test.jsonl. "template" makes records from templates (synth.py). Default: for tiny, template; for
    small, data/personacot.jsonl; for paper, data/personafuse.jsonl, or that of small where it is missing."""
    base: str | None = None
    """Model folder of the frozen base."""
    encoder: str | None = None
    """Model folder of the persona encoder."""
    device: str | None = None
    """cpu, cuda or cuda:N. Default: paper needs a GPU, small takes one if there is one, tiny uses the CPU."""
    dtype: typing.Literal["float32", "bfloat16"] | None = None
    """bfloat16: the frozen base's dtype, and autocast. Default: bfloat16 on a GPU, float32 on a CPU. Trained weights
    are always float32."""
    int8: bool = False
    """Keep the weights of the base's linear layers in 8 bits: a little over half the memory of bfloat16. Losses rise
    slightly (docs/results.md). The same for all stages of a run; the router stage, which needs no base, ignores it."""
    seed: int = 0
    """Seed of data order and initial values. The same seed on the same CPU gives the same run, bit for bit."""
    tau: float = 1.0
    """τ of the gate, softmax(cosine / τ). 1.0 is the paper's, and nearly uniform."""
    steps: int | None = None
    """Optimiser steps of each stage."""
    batch: int | None = None
    """Rows a step; a warm-up row is one record under one of its active poles."""
    tokens: int | None = None
    """Maximum number of tokens in a micro-batch, padding included; lower it when memory runs out. Warm-up and joint
    leave out longer records."""
    lr: float | None = None
    """Learning rate of the experts."""
    router_lr: float | None = None
    """Learning rate of encoder and expert embeddings."""
    frozen_layers: int | None = None
    """Leave the encoder's token embedding and its first N layers as they are (ours). With 0, the whole encoder trains,
    as in the paper."""
    lr_warmup: float = 0.1
    """Share of the steps in which the learning rate rises; after it, a cosine to 0."""
    clip: float = 1.0
    """Gradient norm above which gradients are scaled down: each expert's in warm-up, experts' and router's in joint."""
    rank: int = 8
    """LoRA rank r of every expert."""
    alpha: float = 16.0
    """LoRA α of every expert; its update is scaled by α/r."""
    lam: float = 0.1
    """λ, the weight of the contrastive loss in the joint stage (ours; the paper does not give it)."""
    contrastive_tau: float = 0.07
    """Temperature of the contrastive loss (ours)."""
    joint_gate: typing.Literal["learned", "uniform"] = "learned"
    """Gate of the joint stage's rows, but for those that --rehearse draws. uniform trains the fair control: the
    router's gate plays no part in it."""
    rehearse: float = 0.1
    """Share of the joint stage's rows that train one active pole's expert alone, as in warm-up, so that single experts
    go on working (ours). 0 is the paper's."""
    recompute: bool = False
    """Gradient checkpointing: keep only each layer's input for the backward pass and compute the rest again. It takes
    less memory and more time."""
    compile: bool = False
    """Let torch.compile fuse each layer's operations; compiling takes a minute or so at the start. Needs Triton
    and a C compiler on a GPU, a C++ compiler on a CPU."""
    save_every: int = 100
    """Steps between checkpoints."""
    keep: int = 2
    """How many checkpoints of a stage stay."""
    log_every: int = 10
    """Steps between lines on the terminal; log.jsonl has every step."""
    eval_records: int | None = None
    """Test records that the closing table is computed on."""
    resume: bool = False
    """Go on from the last checkpoint of this run folder."""
    overwrite: bool = False
    """Train this stage again. The old run folder is kept under another name; the new one takes over only the stages
    before this one."""


# ----------------------------------------------------------------------------------------------------------------------
# The language-model loss

def token_losses(model, hidden, targets, chunk=None):
    """Cross-entropy −log p(target) of every position: hidden (N, D), targets (N,) -> (N,), fp32 or wider.

    With a frozen head, logits are computed for one chunk of positions at a time: 4,096 rows of fp32 logits over Llama's
    128,256 tokens would be 2.1 GB.
    """
    if model.head_weight.requires_grad:  # only while tiny's base is made
        return F.cross_entropy(model.head(hidden), targets, reduction="none")
    return frozen_head_loss(hidden, model.head_weight, targets, chunk)


def row_losses(model, rows, gate=None):
    """Summed loss of each row's reply in nats, (B,), fp32. gate: (B, E), or None for the base alone."""
    ids, _ = pad([row.ids[:-1] for row in rows], model.device)  # (B, T); nothing is predicted from the last token
    # Position t predicts token t + 1, so a reply's first token is predicted at the prompt's last position. Positions
    # count through the flattened batch. They are computed on the CPU: finding them on the GPU with a boolean mask would
    # make the CPU wait for the result's size.
    T = ids.shape[1]
    positions = np.concatenate([i * T + np.arange(row.n_prompt - 1, len(row.ids) - 1) for i, row in enumerate(rows)])
    targets = np.concatenate([row.ids[row.n_prompt:] for row in rows]).astype(np.int64)
    owner = np.repeat(np.arange(len(rows)), [row.n_supervised for row in rows])
    positions, targets, owner = (to_device(values, model.device) for values in (positions, targets, owner))  # (N,)
    hidden = model.hidden(ids, gate, positions=positions)  # (N, D)
    losses = token_losses(model, hidden, targets)          # (N,)
    return losses.new_zeros(len(rows)).index_add(0, owner, losses)


# ----------------------------------------------------------------------------------------------------------------------
# A stage: what it trains, and its loss

def freeze_first_layers(router, n):
    """Let everything in the router train but the encoder's token embedding and first n layers; all of it for n = 0.

    Frozen first layers need no backward pass: freezing half of all layers saves about a third of a step's work.
    """
    router.requires_grad_(True)
    if n:
        router.encoder.model.embed_tokens.requires_grad_(False)
        router.encoder.model.layers[:n].requires_grad_(False)


class Stage:
    """One stage's parameters, loss and optimiser step.

    name: warmup, router or joint; "pretrain" makes tiny's base from nothing, on plain text. settings: lr, router_lr,
    dtype, tokens, clip, lam, contrastive_tau, joint_gate, frozen_layers. Of the experts, a row with `expert` set
    trains that one only; in joint, the router's contrastive loss still counts the row.
    """

    def __init__(self, name, model=None, router=None, settings=None):
        self.name, self.model, self.router, self.settings = name, model, router, settings
        # only the first process makes tiny's base; the others wait
        self.rank, self.world_size = rank_and_world_size() if name != "pretrain" else (0, 1)
        groups = []
        if name == "pretrain":
            groups.append({"params": list(model.parameters()), "lr": settings.lr})
        elif name == "joint":
            groups.append({"params": self.expert_tensors(), "lr": settings.lr})
        elif name == "warmup":
            # Ten warm-ups in one run: AdamW has to treat each expert as if it trained alone. Each expert's slice of A
            # and B is therefore a parameter of its own, a view of the whole tensor. backward() fills the whole tensor's
            # gradient, and `clip` gives each view its slice. An expert without rows in a step gets None, so that AdamW
            # does not touch it; a zero gradient would still move it by momentum.
            self.views = [(expert, whole, torch.nn.Parameter(whole.detach()[expert]))
                          for whole in self.expert_tensors() for expert in range(len(whole))]
            groups.append({"params": [view for _, _, view in self.views], "lr": settings.lr})
        if name in ("router", "joint"):
            freeze_first_layers(router, settings.frozen_layers)
            groups.append({"params": [p for p in router.parameters() if p.requires_grad], "lr": settings.router_lr})
        # The betas and weight_decay=0 are our choice. The fused kernel is much faster for warm-up's thousands of views.
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
        self.peak_lrs = [group["lr"] for group in groups]
        self.device = (model or router.encoder).device
        self.autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=settings.dtype == "bfloat16")

    def expert_tensors(self):
        """A and B of every expert layer."""
        return [tensor for layer in expert_layers(self.model).values() for tensor in (layer.A, layer.B)]

    def parameters(self):
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def losses(self, rows, n_supervised):
        """A micro-batch's losses: (lm_loss, contrastive, router_gate). What a stage does not have is None.

        n_supervised: {self.loss_group(row): supervised tokens in the whole step}. lm_loss is this micro-batch's share
        of the step's mean over tokens (in warm-up: of the sum of such means, one for each expert that has rows).
        contrastive is summed over the rows. router_gate (B, E) is what the router says, whatever gate is used.
        """
        lm_loss = contrastive = router_gate = None
        if self.router is not None:
            ids, lengths = pad([row.query for row in rows], self.device)
            similarity = self.router.similarity(self.router.embed(ids, lengths))  # (B, E)
            router_gate = self.router.gate(similarity)                            # (B, E)
            active = torch.stack([row.active for row in rows])                    # (B, E), on the CPU
            contrastive = contrastive_loss(similarity, active, self.settings.contrastive_tau) * len(rows)
        if self.model is not None:
            # A row with an expert (all of warm-up's, and those that joint rehearses) goes through that expert alone,
            # the others of joint under its gate. Pretraining has no gate.
            gate = router_gate
            if self.name == "joint" and self.settings.joint_gate == "uniform":
                gate = torch.full_like(router_gate, 1 / len(EXPERTS))
            one_hot = torch.tensor([[float(expert == row.expert) for expert in range(len(EXPERTS))] for row in rows])
            if one_hot.any():
                one_hot = to_device(one_hot, self.device)                                        # (B, E)
                gate = one_hot if gate is None else torch.where(one_hot.any(-1, keepdim=True), one_hot, gate)
            weights = to_device([1 / n_supervised[self.loss_group(row)] for row in rows], self.device)  # (B,)
            lm_loss = (row_losses(self.model, rows, gate) * weights).sum()
        return lm_loss, contrastive, router_gate

    def loss_group(self, row):
        """Rows of one group share a mean over tokens: in warm-up those of one expert, else all rows."""
        return row.expert if self.name == "warmup" else None

    def step(self, rows, lr_factor=1.0):
        """One optimiser step. Returns metrics: loss and grad_norm as tensors, and lr; in joint also contrastive; in
        router and joint also gates (rows, E), the shortest row first.

        Calling .item() here would stall the GPU on every step, so the loop converts them later. All processes know all
        rows, so that token counts and the experts with rows are those of the whole step.
        """
        n_supervised = Counter()
        for row in rows:
            n_supervised[self.loss_group(row)] += row.n_supervised
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)  # loss, contrastive loss
        gates = []
        weight = self.settings.lam if self.name == "joint" else 1.0     # of the contrastive loss
        mine = sorted(rows, key=n_tokens)[self.rank::self.world_size]   # by length, for about equal work everywhere
        for group in micro_batches(mine, self.settings.tokens):
            with self.autocast:
                loss, contrastive, router_gate = self.losses(group, n_supervised)
                if contrastive is not None:
                    loss = (0 if loss is None else loss) + weight * contrastive / len(rows)
                    sums[1] += contrastive.detach() / len(rows)
            loss.backward()
            sums[0] += loss.detach()
            if router_gate is not None:
                gates.append(router_gate.detach().float())

        with_gradient = self.expert_tensors() if self.name == "warmup" else self.parameters()
        reduced = [sums, *(p.grad for p in with_gradient if p.grad is not None)]
        if gates:  # other processes' rows are 0 until the sum
            all_gates = gates[0].new_zeros(len(rows), len(EXPERTS))
            all_gates[self.rank::self.world_size] = torch.cat(gates)
            reduced.append(all_gates)
        if self.world_size > 1:
            all_reduce_sum(reduced)
        norm = self.clip(present={row.expert for row in rows})
        for group, lr in zip(self.optimizer.param_groups, self.peak_lrs):
            group["lr"] = lr * lr_factor
        self.optimizer.step()
        for p in (*self.parameters(), *with_gradient):
            p.grad = None
        # Warm-up's loss is a sum of means. The log shows their average, which is comparable with the other stages.
        metrics = {"loss": sums[0] / (len(n_supervised) if self.name == "warmup" else 1), "grad_norm": norm,
                   "lr": self.optimizer.param_groups[0]["lr"]}
        if self.name == "joint":
            metrics["contrastive"] = sums[1]
        return metrics | ({"gates": all_gates} if gates else {})

    def clip(self, present):
        """Scale large gradients down: in warm-up each expert's separately, in joint the experts' and the router's
        separately. Returns the norm before clipping. present: the experts that have rows in this step."""
        if self.name != "warmup":
            norms = [torch.nn.utils.clip_grad_norm_(group["params"], self.settings.clip)
                     for group in self.optimizer.param_groups]
            return torch.stack(norms).norm()
        whole = self.expert_tensors()
        norms = sum(w.grad.square().sum((1, 2)) for w in whole).sqrt()  # (E,)
        scale = (self.settings.clip / (norms + 1e-6)).clamp(max=1)
        for w in whole:
            w.grad *= scale[:, None, None]
        for expert, w, view in self.views:
            view.grad = w.grad[expert] if expert in present else None
        return norms.norm()

    def save(self, folder, base):
        """Save what this stage trained: experts/, router/ or both. `base` is noted as the experts' base."""
        if self.model is not None:
            save_experts(self.model, folder / "experts", base)
        if self.router is not None:
            save_router(self.router, folder / "router", contrastive_temperature=self.settings.contrastive_tau)


# ----------------------------------------------------------------------------------------------------------------------
# The loop

def learning_rate_factor(step, steps, warmup):
    """Factor of the learning rate at a step counted from 0: a linear rise, then a cosine to 0."""
    rise = max(1, round(warmup * steps))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def metrics_to_floats(metrics):
    """The metrics of `Stage.step` as numbers for the log; gates become entropy, top1 and usage."""
    numbers = {k: v.item() if torch.is_tensor(v) else v for k, v in metrics.items() if k != "gates"}
    return numbers | (gate_statistics(metrics["gates"]) if "gates" in metrics else {})


def fit(stage, rows, s, run, stop=lambda: False):
    """Train `stage` on `rows` for s.steps steps, from the run folder's last checkpoint if there is one.

    Raises Stopped after the step in which `stop()` turns true. UserError for a loss or gradient norm that is NaN or
    infinite, and for a GPU whose memory is full.
    """
    # the stage's name is part of the seed, so that each stage has an order of its own
    rng = np.random.default_rng([s.seed, *stage.name.encode()])
    order = batches([n_tokens(row) for row in rows], s.batch, rng)
    done = load_latest_checkpoint(run, stage)
    is_writer = stage.rank == 0  # only the first process writes
    log = open_log(run, stage.name, done) if is_writer else None
    pending, n_real, began = [], 0, time.perf_counter()
    bar = tqdm(total=s.steps, initial=done, desc=stage.name, unit="step", dynamic_ncols=True,
               disable=not (is_writer and sys.stderr.isatty()))
    for step in range(1, s.steps + 1):
        batch = [rows[i] for i in next(order)]
        if stage.name == "joint":
            batch = rehearsed(batch, s.rehearse, rng)
        if step <= done:  # a resumed run draws the same order and skips what is done
            continue
        try:
            metrics = stage.step(batch, learning_rate_factor(step - 1, s.steps, s.lr_warmup))
        except torch.OutOfMemoryError as error:
            reason = " ".join(str(error).split())[:150]
            raise UserError(f"{stage.name}, step {step}: the GPU's memory is full ({reason}). Give --recompute, "
                            f"which --resume takes too; or --overwrite with a lower --tokens (now {s.tokens}) or "
                            "--rank, or with --int8") from None
        pending.append((step, batch, metrics))
        for row in batch:
            n_real += len(row.ids) if stage.model is not None else 0
            n_real += len(row.query) if stage.router is not None else 0
        stopping = any_process_wants_to_stop(stop)
        print_line = step % s.log_every == 0 or step == s.steps
        save = step % s.save_every == 0 or step == s.steps or stopping
        # Reading a metric makes the CPU wait for the GPU, so a GPU's metrics are read only when they are needed.
        if print_line or save or stage.device.type == "cpu":
            rate = n_real / (time.perf_counter() - began)
            for past_step, past_batch, past_metrics in pending:
                entry = {"step": past_step, "stage": stage.name, **metrics_to_floats(past_metrics),
                         "tokens_per_s": rate}
                check_finite(entry, [row.id for row in past_batch], run)
                if is_writer:
                    append_to_log(log, entry)
            pending, n_real, began = [], 0, time.perf_counter()
            bar.set_postfix_str(f"loss {entry['loss']:.3f}", refresh=False)  # the last entry is this step's
        bar.update()
        if print_line and is_writer:
            bar.write(log_line(entry, s.steps), file=sys.stdout)
            sys.stdout.flush()
        if save and is_writer:
            os.fsync(log.fileno())  # the log is on disk before the checkpoint that relies on it
            save_checkpoint(run, stage, step, s.keep)
        if stopping and step < s.steps:
            bar.close()
            raise Stopped(f"stopped after step {step} of {s.steps} of {stage.name}; everything is saved")
    bar.close()
    if is_writer:
        log.close()


def log_line(entry, steps):
    line = (f"{entry['stage']} {entry['step']:>{len(str(steps))}}/{steps} loss {entry['loss']:.4f} "
            f"norm {entry['grad_norm']:.2f} lr {entry['lr']:.1e} {entry['tokens_per_s']:,.0f} tok/s")
    return line + (f" H {entry['entropy']:.2f} top1 {entry['top1']:.2f}" if "entropy" in entry else "")


# ----------------------------------------------------------------------------------------------------------------------
# Stages, one after the other

def check_args(args):
    """UserError for arguments that contradict each other."""
    if args.resume and args.overwrite:
        raise UserError("--resume goes on with what is there, --overwrite starts again: choose one")
    for key, stages in (("lr", "warmup joint"), ("router_lr", "router joint"), ("frozen_layers", "router joint")):
        if getattr(args, key) is not None and args.stage != "all" and args.stage not in stages.split():
            raise UserError(f"--{key.replace('_', '-')} has no meaning for --stage {args.stage}")
    for key in ("joint_gate", "rehearse"):
        if getattr(args, key) != getattr(Args, key) and args.stage not in ("joint", "all"):
            raise UserError(f"--{key.replace('_', '-')} is for --stage joint")


def check_frozen_layers(setup, settings):
    """UserError if one of these stages, {stage: settings}, is to freeze more layers than the encoder has."""
    for stage in settings.keys() & {"router", "joint"}:
        n_frozen, n_layers = settings[stage]["frozen_layers"], Config.from_dir(setup.encoder).n_layers
        if n_frozen > n_layers:
            raise UserError(f"--frozen-layers is {n_frozen}, expected at most {n_layers}, the layers of "
                            f"{setup.encoder}")


def train_stage(name, setup, settings, stop):
    """Load what one stage needs, train it, write its result to the run folder.

    settings: {stage: settings} of this stage and those that follow, for which the disk must have room.
    """
    s = SimpleNamespace(**settings[name])
    records = setup.load_data(need_response=name != "router")["train"]
    model = router = chat = tokenizer = None
    if name != "router":
        model = setup.load_base(setup.run / "warmup" / "experts" if name == "joint" else None)
        chat = Chat.from_dir(setup.base)
        if not chat.is_protected:
            print(f"{name}: the chat template of {setup.base} writes turns as text, which a message can imitate")
    if name != "warmup":
        router = setup.load_router(setup.run / "router" / "router" if name == "joint" else None)
        tokenizer = load_tokenizer(setup.encoder)

    limit = min(s.tokens, model.context or s.tokens) if model else s.tokens
    rows, n_long = make_rows(records, chat, tokenizer, limit)
    if n_long:
        why = "--tokens" if limit == s.tokens else "the base's context"
        print(f"{name}: left out {n_long} of {len(records)} records, longer than {limit} tokens ({why})")
    if not rows:
        raise UserError(f"{setup.data}: no record is short enough to train on; raise --tokens")
    if name == "warmup":
        rows = rows_per_pole(rows)
        idle = [EXPERTS[e] for e in sorted(set(range(len(EXPERTS))) - {row.expert for row in rows})]
        if idle:
            print(f"warmup: no record calls for {', '.join(idle)}; these experts stay untrained, without effect")

    stage = Stage(name, model, router, s)
    for decoder in (model, router and router.encoder):
        if decoder is not None:
            decoder.recompute = s.recompute
            if s.compile:
                compile_layers(decoder)
    if stage.rank == 0:
        check_disk_space(setup, settings)
    fit(stage, rows, s, setup.run, stop)
    if stage.rank == 0:
        with atomic(setup.run / name) as part:
            part.mkdir()
            stage.save(part, setup.base)
    if stage.world_size > 1:
        dist.barrier()  # the next stage begins with what this one wrote


# ----------------------------------------------------------------------------------------------------------------------
# Held-out loss under a gate, and what a run ends with

@torch.no_grad()
def score_queries(router, rows, tokens=8192):
    """Cosines of each row's query with the expert embeddings, (N, E), fp32, on the CPU."""
    similarity = torch.zeros(len(rows), len(EXPERTS))
    for numbers in micro_batches(range(len(rows)), tokens, lambda i: len(rows[i].query)):
        ids, lengths = pad([rows[i].query for i in numbers], router.encoder.device)
        similarity[numbers] = router.similarity(router.embed(ids, lengths)).cpu()
    return similarity


@torch.no_grad()
def evaluation_loss(model, rows, gates=None, tokens=8192):
    """Loss of every row's reply: (summed nats (N,), supervised tokens (N,)), numpy fp64. gates: (N, E) or None."""
    for row in rows:
        if len(row.ids) > (model.context or math.inf):
            raise UserError(f"record {row.id!r} has {len(row.ids):,} tokens, and the base reads {model.context:,}: "
                            "take it out of the data")
    nats = np.zeros(len(rows))
    for numbers in micro_batches(range(len(rows)), tokens, lambda i: n_tokens(rows[i])):
        gate = None if gates is None else gates[numbers].to(model.device)
        nats[numbers] = row_losses(model, [rows[i] for i in numbers], gate).double().cpu().numpy()
    return nats, np.array([float(row.n_supervised) for row in rows])


def generate_replies(model, chat, records, gates=None, max_new_tokens=80, **sampling):
    """Replies to records as texts, of the base (gates None) or of the mixture (gates (N, E) or (1, E))."""
    prompts = [chat.prompt(messages_of(record)) for record in records]
    return [chat.text(ids) for ids in generate(model, prompts, gates, max_new_tokens, stops=chat.stops, **sampling)]


def print_results(setup):
    """Held-out loss under each gate rule, and five test queries with the poles they call for, gate and replies."""
    experts, routers = setup.stage_folder("experts"), setup.stage_folder("router")
    records = setup.load_data(need_response=experts is not None)["test"][:setup.eval_records]
    chat = Chat.from_dir(setup.base) if experts else None
    router = setup.load_router(routers) if routers else None
    rows, _ = make_rows(records, chat, load_tokenizer(setup.encoder) if router else None)
    active = torch.stack([row.active for row in rows])
    similarity = score_queries(router, rows, setup.tokens) if router else None
    rules = ["base", "uniform", "shuffled", "learned", "oracle"] if router else ["base", "uniform", "oracle"]
    gates = {rule: gates_for_rule(rule, active, similarity, setup.tau, setup.seed) for rule in rules}
    if router:
        statistics, chance = gate_statistics(gates["learned"]), active.mean().item()
        hits = (active * F.one_hot(similarity.argmax(-1), len(EXPERTS))).sum(-1).mean()
        print(f"\nRouter on {len(rows)} held-out queries, tau {setup.tau:g}: the top expert is an active pole for "
              f"{hits:.0%}\n(by chance {chance:.0%}); gate entropy {statistics['entropy']:.3f} (uniform "
              f"{math.log(len(EXPERTS)):.3f}), top-1 mass {statistics['top1']:.3f}")
    if not experts:
        return
    model, trained = setup.load_base(experts), experts.parent.name
    losses = {}
    for rule in rules:
        nats, counts = evaluation_loss(model, rows, gates[rule], setup.tokens)
        losses[rule] = nats.sum() / counts.sum()
    print_table(["gate", "nats/token", "minus base", "what the gate is"], [
        [rule, f"{loss:.4f}", f"{loss - losses['base']:+.4f}", GATE_RULES[rule]] for rule, loss in losses.items()],
        f"Held-out loss on {len(rows)} records, experts after {trained}, tau {setup.tau:g}", left=(0, 3))
    if trained == "joint":
        print("\n  Compare learned with shuffled. Joint training under the learned gate does not\n"
              "  prepare experts for a uniform one: it is no fair control; see docs/results.md.")
    rule = "learned" if router else "oracle"
    replies = generate_replies(model, chat, records[:5]), generate_replies(model, chat, records[:5], gates[rule][:5])
    names = [expert.replace("_", " ") for expert in EXPERTS]
    for i, record in enumerate(records[:5]):
        poles = ", ".join(names[e] for e in active[i].nonzero()[:, 0])
        largest = ", ".join(f"{names[e]} {gates[rule][i, e]:.2f}" for e in gates[rule][i].topk(3).indices)
        print(f"\nQuery {i + 1}: {record['query']}\n  calls for:   {poles}\n  gate:        {largest}, …\n"
              f"  base:        {replies[0][i]}\n  PersonaFuse: {replies[1][i]}")


# ----------------------------------------------------------------------------------------------------------------------
# The command line

def main(argv=None, show_results=True):
    """Train the stages that the command line names, then show results unless show_results is False."""
    if int(os.environ.get("RANK", 0)):
        sys.stdout = open(os.devnull, "w")  # only the first process prints
    args = parse(Args, argv, __doc__)
    check_args(args)
    stages = STAGES if args.stage == "all" else (args.stage,)
    setup = make_setup(args, stages)
    settings = {stage: stage_settings(args, stage, setup.dtype) for stage in stages}
    setup.device = join_process_group(setup.device, {stage: s["batch"] for stage, s in settings.items()})
    rank, world_size = rank_and_world_size()
    if setup.device.type == "cpu":
        keep_freed_memory()

    status = None
    with ExitStack() as locks, stop_on_signal() as stop:
        def fit_base(model, rows):
            print("making the tiny base: a Llama of under a million parameters that answers neutrally")
            s = SimpleNamespace(**stage_settings(Args(preset="tiny", seed=args.seed), "pretrain"))
            fit(Stage("pretrain", model, settings=s), rows, s, setup.run, stop.is_set)

        try:
            if rank == 0:
                to_do = open_run(setup, settings, args, locks)
                make_missing_models(setup, fit_base)
                setup.write_template_data()
                check_frozen_layers(setup, settings)
                check_fingerprints(setup)
            if world_size > 1:  # the first process makes models and data before the others look for them
                dist.barrier()
                if rank:
                    complete_setup(setup)
                    to_do = unfinished_stages(setup.run, settings)
                dist.barrier()
            for i, stage in enumerate(to_do):
                train_stage(stage, setup, {later: settings[later] for later in to_do[i:]}, stop.is_set)
        except Stopped as stopped:
            if rank == 0:
                print(f"{stopped}. Go on with the same command and --resume", file=sys.stderr)
            status = 130
    if dist.is_initialized():
        dist.destroy_process_group()
    if rank or status or not show_results:
        return status
    if not to_do:
        print(f"{setup.run} is complete")
    print_results(setup)
    print(f"\nResults are in {setup.run}; python eval.py ask --run {setup.run} \"…\" asks it something")


if __name__ == "__main__":
    run_command(main)
