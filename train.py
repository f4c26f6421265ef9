"""Training: three stages, one loop.

    warmup   every expert alone: loss on the replies of the records in which its pole is active. One run that equals ten
    router   encoder and expert embeddings only: the contrastive loss. The base model is not loaded
    joint    experts and router together: loss through the mixture, plus λ times the contrastive loss

What is notable:
- a stage is what it trains and its loss (Task); data order, schedule, log and checkpoints are the same for all (fit)
- batches hold rows of similar length; a step is cut into micro-batches under a budget of tokens, and its loss is the
  true mean over the tokens of the whole step, not a mean of means
- data order is a function of seed and step, so that a resumed run goes on where it stopped
- files are written under another name first, then renamed; safetensors and JSON only
- torchrun starts it on several GPUs: each process takes its share of every step's rows, and gradients are added up

    python train.py --preset tiny --stage all       # everything on a laptop's CPU in three minutes; needs no download
    python train.py --stage router                  # Qwen2.5-0.5B on one GPU
    python train.py --stage all                     # Llama-3.1-8B on one GPU
    torchrun --nproc_per_node=4 -- train.py --stage all     # on four; "--", or torchrun takes --run for its own

Shapes: B rows, T tokens, N supervised tokens, D width, V vocabulary, E experts.
"""
import math
import os
import signal
import sys
import threading
import time
import typing
from collections import Counter
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
from torch.nn import functional as F
from tqdm import tqdm

from lora import EXPERTS, expert_layers, save_experts
from model import Transformer, generate, pad, to_device
from router import GATE_RULES, format_gate, contrastive_loss, gate_statistics, gates_for_rule, save_router
from support.chat import Chat, load_tokenizer
from support.checkpoints import Stopped, append, check_room, read_log, restore, rewind_log, room_for, save_state, states
from support.command import parse, run_command
from support.compile import compile_layers
from support.files import UserError, atomic, human_readable_size, read_json
from support.process import all_reduce_sum, any_process_wants_to_stop, join_process_group, keep_freed_memory, rank_and_world_size
from support.records import messages_of
from support.rows import batches, n_tokens, make_rows, micro_batches, rows_per_pole
from support.runs import STAGES, lock, note_content, open_run, remaining, resolve, stage_settings, unbegin
from support.tiny import pretraining_rows, make_tiny
from synth import template_records


@dataclass
class Args:
    stage: typing.Literal["warmup", "router", "joint", "all"] = "all"
    """What to train; all does the three in order."""
    preset: typing.Literal["paper", "small", "tiny"] = "paper"
    """Models and sizes: paper is Llama-3.1-8B + Qwen2.5-0.5B on one GPU, small SmolLM2-135M + Qwen2.5-0.5B, tiny both
    made on the spot."""
    run: str | None = None
    """Folder for the results, the log and the checkpoints; runs/PRESET if not given."""
    data: str | None = None
    """Records: a .jsonl file, split 80/10/10 by query, or a folder with train, validation and test.jsonl. Without it,
    tiny and small make their own with the template teacher."""
    base: str | None = None
    """Model folder of the frozen base; the preset's if not given, as with all that has no default here."""
    encoder: str | None = None
    """Model folder of the persona encoder."""
    device: str | None = None
    """cpu, cuda or cuda:N; paper wants a GPU, small takes one if there is one."""
    dtype: typing.Literal["float32", "bfloat16"] | None = None
    """Of the frozen base: bfloat16 on a GPU (with autocast), float32 on a CPU. What is trained is always float32."""
    seed: int = 0
    """Of data order and initial values. Same seed, same machine: the same run, to the last bit on a CPU."""
    tau: float = 1.0
    """τ of the gate, softmax(cosine / τ). 1.0 is the source's, and nearly uniform."""
    steps: int | None = None
    """Optimiser steps of each stage."""
    batch: int | None = None
    """Rows a step; a warm-up row is one record under one of its active poles."""
    tokens: int | None = None
    """Most tokens in a micro-batch, padding included; lower it when memory runs out. Records longer than this are left
    out."""
    lr: float | None = None
    """Learning rate of the experts."""
    router_lr: float | None = None
    """Learning rate of encoder and expert embeddings."""
    lr_warmup: float = 0.1
    """Share of the steps in which the learning rate rises; after it, a cosine to 0."""
    clip: float = 1.0
    """Gradient norm above which gradients are scaled down: each expert's in warm-up, experts' and router's in joint."""
    rank: int = 8
    """r of every expert."""
    alpha: float = 16.0
    """α of every expert; its update is scaled by α/r."""
    lam: float = 0.1
    """λ, the weight of the contrastive loss in the joint stage (ours; the source does not give it)."""
    contrastive_tau: float = 0.07
    """Temperature of the contrastive loss (ours)."""
    joint_gate: typing.Literal["learned", "uniform"] = "learned"
    """Gate of the joint stage; uniform trains the fair control, in which routing plays no part."""
    recompute: bool = False
    """Keep only each layer's input for the backward pass and compute the rest again: less memory, more time."""
    compile: bool = False
    """Let torch.compile fuse each layer's operations; compiling takes a minute or so at the start. Needs Triton on a
    GPU and a C++ compiler on a CPU."""
    save_every: int = 100
    """Steps between checkpoints."""
    keep: int = 2
    """Checkpoints of a stage that stay."""
    log_every: int = 10
    """Steps between lines on the terminal; log.jsonl has every step."""
    eval_records: int | None = None
    """Held-out records that the closing table is computed on."""
    resume: bool = False
    """Go on from the last checkpoint of this run folder."""
    overwrite: bool = False
    """Remove this run's stage, and the stages after it, and train anew."""


# ----------------------------------------------------------------------------------------------------------------------
# The loss of a row

class FrozenHeadLoss(torch.autograd.Function):
    """Cross-entropy through a head that does not train. Its gradient is worked out on the way forward, a chunk of
    positions at a time, so that no more than a chunk of logits exists at once and none is computed twice. All chunks
    use the same memory, and the softmax happens in it: on a CPU, new memory takes longer than what is done to it.

    With m the largest logit l of a position, e = exp(l − m) and z = Σ e, the loss is ln z + m − l_target.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, chunk):
        losses, grads, n = [], [], len(targets)
        # Positions are filled up to a multiple of 16: on a CPU, products of matrices with 171 take longer than with 176,
        # and a GPU's tensor cores want rows that begin at multiples of 16 bytes
        hidden, targets = F.pad(hidden, (0, 0, 0, -n % 16)), F.pad(targets, (0, -n % 16))
        count = max(1, round(n / chunk))  # of equal size: a small one would read the head for little
        size = max(1, -(-len(targets) // (16 * count))) * 16
        logits = hidden.new_empty(len(weight), size)
        for h, t in zip(hidden.split(size), targets[:, None].split(size)):
            l = torch.mm(weight, h.T, out=logits[:, :len(h)]).T  # (n, V); the other way round takes a seventh longer
            l = l.to(torch.promote_types(l.dtype, torch.float32))  # the same memory, unless it is narrower
            m, at_target = l.amax(-1, keepdim=True), l.gather(1, t)  # (n, 1)
            e = l.sub_(m).exp_()
            z = e.sum(-1, keepdim=True)
            losses.append((z.log() + m - at_target)[:, 0])
            if ctx.needs_input_grad[0]:  # d loss / d logits is softmax minus one-hot
                grads.append(e.div_(z).scatter_add_(1, t, -torch.ones_like(z)).to(h.dtype) @ weight)
        ctx.save_for_backward(torch.cat(grads)[:n] if grads else None)
        return torch.cat(losses)[:n]

    @staticmethod
    def backward(ctx, upstream):  # (N,)
        grad, = ctx.saved_tensors
        return grad * upstream[:, None].to(grad.dtype), None, None, None


def token_losses(model, hidden, targets, chunk=None):
    """Cross-entropy of every supervised position: hidden (N, D), targets (N,) -> (N,), fp32 (or wider).

    In chunks of about `chunk` positions: 4,096 rows of fp32 logits over Llama's 128,256 words would be 2.1 GB. As a rule
    as many as make 64 MiB of logits on a CPU and 512 MiB on a GPU: fewer positions use the head's matrix less well.
    """
    weight = model.head_weight
    if weight.requires_grad:  # tiny's base, made from nothing
        return F.cross_entropy(model.head(hidden), targets, reduction="none")
    chunk = chunk or max(1, (2**24 if hidden.device.type == "cpu" else 2**27) // len(weight))
    return FrozenHeadLoss.apply(hidden, weight, targets, chunk)


def row_losses(model, rows, gate=None):
    """Summed loss of each row's reply, in nats: -> (B,), fp32. gate: (B, E) or None."""
    ids, _ = pad([row.ids[:-1] for row in rows], model.device)  # nothing is predicted from the last token
    # Position t predicts token t + 1: reply tokens prompt … len−1 are predicted from prompt−1 … len−2. Worked out here,
    # on the host: a search on the device would have to be waited for
    T = ids.shape[1]
    at = np.concatenate([i * T + np.arange(row.prompt - 1, len(row.ids) - 1) for i, row in enumerate(rows)])     # (N,)
    targets = np.concatenate([row.ids[row.prompt:] for row in rows]).astype(np.int64)                            # (N,)
    owner = np.repeat(np.arange(len(rows)), [len(row.ids) - row.prompt for row in rows])                         # (N,)
    hidden = model.hidden(ids, gate, at=to_device(at, model.device))  # (N, D)
    losses = token_losses(model, hidden, to_device(targets, model.device))
    return losses.new_zeros(len(rows)).index_add(0, to_device(owner, model.device), losses)


# ----------------------------------------------------------------------------------------------------------------------
# A stage: what trains, and its loss

class Stage:
    """One stage's parameters, loss and optimiser step.

    stage "pretrain" (tiny's base only) trains all of `model` on plain text. `s` holds lr, router_lr, tokens, clip, lam,
    contrastive_tau and joint_gate.
    """

    def __init__(self, stage, model=None, router=None, s=None):
        self.stage, self.model, self.router, self.s = stage, model, router, s
        # tiny's base is made by the first process alone
        self.rank, self.world_size = rank_and_world_size() if stage != "pretrain" else (0, 1)
        groups = []
        if stage == "pretrain":
            groups.append({"params": list(model.parameters()), "lr": s.lr})
        elif stage == "joint":
            groups.append({"params": self.expert_tensors(), "lr": s.lr})
        elif stage == "warmup":
            # One run that equals ten. Each expert's slices of A and B are parameters of their own, sharing A's and B's
            # memory: an expert without rows in a step has no gradient (None), so neither momentum nor bias correction
            # nor decay moves it, and each has its own count of steps.
            self.views = [(expert, whole, torch.nn.Parameter(whole.detach()[expert]))
                          for whole in self.expert_tensors() for expert in range(len(whole))]
            groups.append({"params": [view for _, _, view in self.views], "lr": s.lr})
        if stage in ("router", "joint"):
            router.requires_grad_(True)
            groups.append({"params": list(router.parameters()), "lr": s.router_lr})
        # betas and no decay: ours. The fused kernel is much faster for the thousands of small views of warm-up
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
        self.base_lr = [group["lr"] for group in groups]
        self.device = (model or router.encoder).device
        half = self.device.type == "cuda" and (model is None or model.dtype == torch.bfloat16)
        self.autocast = torch.autocast("cuda", torch.bfloat16) if half else nullcontext()

    def expert_tensors(self):
        return [tensor for layer in expert_layers(self.model).values() for tensor in (layer.A, layer.B)]

    def parameters(self):
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def losses(self, rows, tokens):
        """Loss of a micro-batch as its part of the step's: (language-model part, contrastive part, gate or None).

        tokens: supervised tokens of the whole step, by expert in warm-up (each expert has a mean of its own, and they
        are added), else under None.
        """
        gate = contrast = None
        if self.router is not None:
            ids, lengths = pad([row.query for row in rows], self.device)
            similarity = self.router.similarity(self.router.embed(ids, lengths))  # (B, E)
            gate = self.router.gate(similarity)
            active = torch.stack([row.active for row in rows])  # stays on the host, where it is checked
            contrast = contrastive_loss(similarity, active, self.s.contrastive_tau) * len(rows)  # their sum
        if self.model is None:
            return None, contrast, gate
        mixture = gate
        if self.stage == "warmup":
            mixture = F.one_hot(torch.tensor([row.expert for row in rows]), len(EXPERTS)).float().to(self.device)
        elif self.stage == "joint" and self.s.joint_gate == "uniform":
            mixture = torch.full_like(gate, 1 / len(EXPERTS))
        weight = to_device([1 / tokens[row.expert] for row in rows], self.device)
        return (row_losses(self.model, rows, mixture) * weight).sum(), contrast, gate

    def step(self, rows, factor=1.0):
        """One optimiser step on these rows, learning rates times `factor` -> what the log says of it, as tensors: a
        number would have to be waited for (see `figures`).

        Every process knows all rows and computes every size-th of them, so that nothing but gradients and the log's
        sums is exchanged: token counts, and which experts have rows, are the whole step's everywhere.
        """
        tokens = Counter()
        for row in rows:
            tokens[row.expert] += n_tokens(row) - row.prompt
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)  # loss, contrastive part
        gates, lam = [], self.s.lam if self.stage == "joint" else 1.0
        for group in micro_batches(sorted(rows, key=n_tokens)[self.rank::self.world_size], self.s.tokens):
            with self.autocast:
                language, contrast, gate = self.losses(group, tokens)
                parts = [] if language is None else [language]
                if contrast is not None:
                    parts.append(lam * contrast / len(rows))
                    sums[1] += contrast.detach() / len(rows)
                loss = sum(parts)
            loss.backward()
            sums[0] += loss.detach()
            gates += [] if gate is None else [gate.detach().float()]
        trained = self.expert_tensors() if self.stage == "warmup" else self.parameters()
        if gates:  # rows of other processes are 0 here
            every = gates[0].new_zeros(len(rows), len(EXPERTS))
            every[self.rank::self.world_size] = torch.cat(gates)
        if self.world_size > 1:
            all_reduce_sum([sums, *([every] if gates else []), *(p.grad for p in trained if p.grad is not None)])
        norm = self.clip({row.expert for row in rows})
        for group, lr in zip(self.optimizer.param_groups, self.base_lr):
            group["lr"] = lr * factor
        self.optimizer.step()
        for p in (*self.parameters(), *trained):
            p.grad = None
        # warm-up adds ten means; its log shows their average, so that it compares with the other stages'
        report = {"loss": sums[0] / (len(tokens) if self.stage == "warmup" else 1), "grad_norm": norm,
                  "lr": self.optimizer.param_groups[0]["lr"]}
        if self.stage == "joint":
            report["contrastive"] = sums[1]
        return report | ({"gates": every} if gates else {})

    def clip(self, present):
        """Scale large gradients down, each expert's by itself in warm-up, else experts and router apart -> the norm."""
        if self.stage != "warmup":
            norms = [torch.nn.utils.clip_grad_norm_(g["params"], self.s.clip) for g in self.optimizer.param_groups]
            return torch.stack(norms).norm()
        whole = self.expert_tensors()
        norms = sum(w.grad.square().sum((1, 2)) for w in whole).sqrt()  # (E,)
        scale = (self.s.clip / (norms + 1e-6)).clamp(max=1)
        for w in whole:
            w.grad *= scale[:, None, None]
        for expert, w, view in self.views:
            view.grad = w.grad[expert] if expert in present else None
        return norms.norm()

    def save(self, folder, base):
        """Write the stage's result: experts/ and router/, what of them this stage trains."""
        if self.model is not None:
            save_experts(self.model, folder / "experts", base)
        if self.router is not None:
            save_router(self.router, folder / "router", contrastive_temperature=self.s.contrastive_tau)


# ----------------------------------------------------------------------------------------------------------------------
# The loop

def metrics_to_floats(report):
    """What Task.step returned, as numbers. They are asked for where the log is written, since the device then has to
    finish what it was given."""
    numbers = {k: v.item() if torch.is_tensor(v) else v for k, v in report.items() if k != "gates"}
    return numbers | (gate_statistics(report["gates"]) if "gates" in report else {})


def schedule(step, steps, warmup):
    """Factor of the learning rate at a step counted from 0: a linear rise, then a cosine to 0."""
    rise = max(1, round(warmup * steps))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def fit(task, rows, s, run, stop=lambda: False):
    """Train `task` on `rows` for s.steps steps, from the run folder's last checkpoint if it has one."""
    lengths, skipped = [n_tokens(row) for row in rows], Counter()
    order = supervised(rows, batches(lengths, s.batch, [s.seed, *task.stage.encode()]), task, skipped)
    done, first = restore(task, run), task.rank == 0  # the first process writes
    log = rewind_log(run, task.stage, done) if first else None
    lost = done - len({entry["step"] for _, entry in read_log(run) if entry["stage"] == task.stage}) if first else 0
    if lost:
        print(f"{task.stage}: {run}/log.jsonl lacks {lost} of the {done} steps that are done: a crash of the machine, or "
              "an edit", file=sys.stderr)
    pending, real, began = [], 0, time.perf_counter()
    bar = tqdm(total=s.steps, initial=done, desc=task.stage, unit="step", disable=not (first and sys.stderr.isatty()),
               dynamic_ncols=True)
    for step, batch in zip(range(1, s.steps + 1), order):
        if step <= done:  # the order is drawn again, the steps are not
            continue
        try:
            pending.append((step, batch, task.step(batch, schedule(step - 1, s.steps, s.lr_warmup))))
        except torch.OutOfMemoryError as error:
            raise UserError(f"{task.stage}, step {step}: {memory_advice(task, error)}") from None
        real += sum((0 if row.ids is None or task.model is None else len(row.ids))
                    + (0 if task.router is None else len(row.query)) for row in batch)
        stopping = any_process_wants_to_stop(stop, task.world_size)
        line = step % s.log_every == 0 or step == s.steps
        save = step % s.save_every == 0 or step == s.steps or stopping
        if line or save or task.device.type == "cpu":  # on a GPU, steps in between are not waited for
            for at, rows_then, report in pending:
                report = {"step": at, "stage": task.stage, **metrics_to_floats(report)}
                bad = next((key for key in ("loss", "grad_norm") if not math.isfinite(report[key])), None)
                if bad:  # nothing of it is saved: the last checkpoint is before it
                    kept = states(run, task.stage)[-1:]
                    raise UserError(f"{task.stage}, step {at}: the {bad} is {report[bad]}, so training ends here"
                                    + f"; {kept[0] if kept else 'no checkpoint'} is kept. Try a lower --lr or "
                                    "--router-lr with --overwrite, or look at this step's records: "
                                    + ", ".join(row.id if row.id.isprintable() else repr(row.id) for row in rows_then))
                report["tokens_per_s"] = real / (time.perf_counter() - began)
                if first:
                    append(log, report)
            pending, real, began = [], 0, time.perf_counter()
            bar.set_postfix_str(f"loss {report['loss']:.3f}", refresh=False)
        bar.update()
        if line and first:
            bar.write(log_line(report, s.steps), file=sys.stdout)
            sys.stdout.flush()
        if save and first:
            os.fsync(log.fileno())  # no checkpoint without its lines
            save_state(task, step, s, run)
        if stopping and step < s.steps:
            bar.close()
            raise Stopped(f"stopped after step {step} of {s.steps} of {task.stage}; all of it is saved")
    bar.close()
    if skipped and first:
        print(f"{task.stage}: skipped {skipped['batches']} batches without a supervised token")
    if first:
        log.close()


def supervised(rows, order, task, skipped):
    """Batches of row numbers -> batches of rows. Where the base's loss is asked for, rows without a supervised token
    are left out, and a batch that has no others is skipped and counted."""
    some = [task.model is None or len(row.ids) > row.prompt for row in rows]
    if not any(some):
        raise UserError(f"{task.stage}: no record has a single supervised token: are all responses empty?")
    for batch in order:
        batch = [rows[i] for i in batch if some[i]]
        if batch:
            yield batch
        else:
            skipped["batches"] += 1


def memory_advice(task, error):
    """What fills a GPU, which settings reduce it and by how much: one line. Sizes are estimates from the shapes."""
    trained = sum(p.numel() for p in task.parameters())
    frozen = sum(p.nbytes for part in (task.model, task.router) if part for p in part.parameters()) - 4 * trained
    kept = sum(activations(part, task.s.tokens, part.recompute) for part in decoders(task))
    if_recomputed = sum(activations(part, task.s.tokens, True) for part in decoders(task))
    said = " ".join(str(error).split())[:150]
    advice = (f"the device's memory is full ({said}). "
              + (f"The frozen base takes {human_readable_size(frozen)}, what trains " if frozen > 0 else "What trains takes ")
              + f"{human_readable_size(16 * trained)} (values, gradients, two moments) and a micro-batch of {task.s.tokens} "
              f"tokens about {human_readable_size(kept)}. --tokens {max(1, task.s.tokens // 2)} with --overwrite halves the last")
    if if_recomputed < kept:
        advice += f"; --recompute, with --resume too, leaves {human_readable_size(if_recomputed)} of it, at a third more time"
    if task.model is not None and task.stage != "pretrain":
        r = expert_layers(task.model)["model.layers.0.self_attn.q_proj"].A.shape[1]
        experts = sum(tensor.numel() for tensor in task.expert_tensors())
        advice += f"; half of --rank {r} saves {human_readable_size(8 * experts)}" if r > 1 else ""
    return advice


def decoders(task):
    return [part for part in (task.model, task.router and task.router.encoder) if part is not None]


def activations(model, tokens, recompute):
    """Bytes that a forward pass over `tokens` tokens keeps for the backward pass, about: per token and layer the
    inputs and outputs of norms, projections, attention and experts; with recomputation each layer's input, and one
    layer whole."""
    c = model.config
    adapted = getattr(model.model.layers[0].self_attn.q_proj, "A", None)
    low = 0 if adapted is None else 2 * 7 * adapted.shape[0] * adapted.shape[1]
    layer = 4 * c.dim + 2 * c.head_dim * (c.n_heads + c.n_kv_heads) + 4 * c.hidden_dim + low
    width = 2 if model.device.type == "cuda" else model.model.embed_tokens.weight.element_size()
    return tokens * width * (2 * c.dim + (c.n_layers * c.dim + layer if recompute else c.n_layers * layer))


def log_line(report, steps):
    line = (f"{report['stage']} {report['step']:>{len(str(steps))}}/{steps} loss {report['loss']:.4f} "
            f"norm {report['grad_norm']:.2f} lr {report['lr']:.1e} {report['tokens_per_s']:,.0f} tok/s")  # 80 columns
    return line + (f" H {report['entropy']:.2f} top1 {report['top1']:.2f}" if "entropy" in report else "")


# ----------------------------------------------------------------------------------------------------------------------
# Stages, one after the other

def check_args(args):
    """UserError for arguments that contradict each other."""
    if args.resume and args.overwrite:
        raise UserError("--resume goes on with what is there, --overwrite removes it: choose one")
    for key, stages in (("lr", "warmup joint"), ("router_lr", "router joint")):
        if getattr(args, key) is not None and args.stage != "all" and args.stage not in stages.split():
            raise UserError(f"--{key.replace('_', '-')} has no meaning for --stage {args.stage}")
    if args.joint_gate != "learned" and args.stage not in ("joint", "all"):
        raise UserError("--joint-gate is for --stage joint")


def prepare(setup, settings, stop):
    """tiny: make the models that are missing or torn. Only folders inside the run folder are ever made."""
    for role, folder in (("encoder", setup.encoder), ("base", setup.base)):
        if folder != str(setup.run / "models" / role):
            continue
        try:
            Transformer.from_pretrained(folder), load_tokenizer(folder), read_json(f"{folder}/tokenizer_config.json")
        except UserError:
            records = template_records("train", 2000, setup.seed)

            def fit_base(model, chat):
                print("making the tiny base: a Llama of under a million parameters that answers neutrally")
                fit(Stage("pretrain", model, s=settings), pretraining_rows(records, chat), settings, setup.run, stop)
            make_tiny(role, folder, records, setup.seed, fit_base)


def train_stage(stage, setup, s, stop, later=0):
    """Load what one stage needs, train it, write its result. later: bytes that the stages after it will write."""
    records = setup.load_data(need_response=stage != "router")["train"]
    model = router = chat = tokenizer = None
    if stage != "router":
        model = setup.load_base(setup.run / "warmup" / "experts" if stage == "joint" else None)
        model.recompute, chat = s.recompute, Chat.from_dir(setup.base)
    if stage != "warmup":
        router = setup.load_router(setup.run / "router" / "router" if stage == "joint" else None)
        router.encoder.recompute, tokenizer = s.recompute, load_tokenizer(setup.encoder)
    if rank_and_world_size()[0] == 0:
        note_content(setup)
    limit = min(s.tokens, model.context or s.tokens) if model else s.tokens
    rows, long = make_rows(records, chat, tokenizer, limit, setup.run / "tokens")
    if long:
        why = "--tokens" if limit == s.tokens else "the base's context"
        print(f"{stage}: left out {long} of {len(records)} records, longer than {limit} tokens ({why})")
    if not rows:
        raise UserError(f"{setup.data}: no record is short enough to train on; raise --tokens")
    if stage == "warmup":
        rows = rows_per_pole(rows)
        idle = [EXPERTS[e] for e in sorted(set(range(len(EXPERTS))) - {row.expert for row in rows})]
        if idle:
            print(f"warmup: no record calls for {', '.join(idle)}; these experts stay as they are, without effect")
    task = Stage(stage, model, router, s)
    for decoder in decoders(task) if s.compile else ():
        compile_layers(decoder)
    if task.rank == 0:
        check_room(task, s, setup.run, later)
    fit(task, rows, s, setup.run, stop)
    if task.rank == 0:
        with atomic(setup.run / stage) as part:
            part.mkdir()
            task.save(part, setup.base)
    if task.world_size > 1:
        dist.barrier()  # the next stage begins with what this one wrote


# ----------------------------------------------------------------------------------------------------------------------
# Held-out loss under a gate rule, and what a run ends with

@torch.no_grad()
def score_queries(router, rows, tokens=8192):
    """What the router sees in each row's query: -> (N, E), fp32, on the CPU."""
    found = torch.zeros(len(rows), len(EXPERTS))
    order = {id(row): i for i, row in enumerate(rows)}
    for group in micro_batches(rows, tokens, lambda row: len(row.query)):
        ids, lengths = pad([row.query for row in group], router.encoder.device)
        found[[order[id(row)] for row in group]] = router.similarity(router.embed(ids, lengths)).cpu()
    return found


@torch.no_grad()
def evaluation_loss(model, rows, gates=None, tokens=8192):
    """Loss of every row's reply: -> (summed nats (N,), supervised tokens (N,)), numpy fp64. gates: (N, E) or None."""
    nats, order = np.zeros(len(rows)), {id(row): i for i, row in enumerate(rows)}
    for row in rows:
        if len(row.ids) > (model.context or math.inf):
            raise UserError(f"record {row.id!r} has {len(row.ids):,} tokens, and the base reads {model.context:,}: "
                            "take it out of the data")
    for group in micro_batches(rows, tokens):
        where = [order[id(row)] for row in group]
        gate = None if gates is None else gates[where].to(model.device)
        nats[where] = row_losses(model, group, gate).double().cpu().numpy()
    return nats, np.array([float(n_tokens(row) - row.prompt) for row in rows])


def generate_replies(model, chat, records, gates=None, max_new_tokens=80, **sampling):
    """Replies of the base (gates None) or of the mixture to records -> texts."""
    prompts = [chat.prompt(messages_of(record)) for record in records]
    return [chat.text(ids) for ids in generate(model, prompts, gates, max_new_tokens, stops=chat.stops, **sampling)]


def print_results(setup):
    """What a run ends with: held-out loss under each gate rule, and five held-out queries with gate and replies."""
    need = setup.stage_folder("experts") is not None
    records = setup.load_data(need)["test"][:setup.eval_records]
    chat = Chat.from_dir(setup.base) if need else None
    router = setup.load_router(setup.stage_folder("router")) if setup.stage_folder("router") else None
    rows, _ = make_rows(records, chat, load_tokenizer(setup.encoder) if router else None)
    active = torch.stack([row.active for row in rows])
    similarity = score_queries(router, rows, setup.tokens) if router else None
    rules = ["base", "uniform", "shuffled", "learned", "oracle"] if router else ["base", "uniform", "oracle"]
    gates = {rule: gates_for_rule(rule, active, similarity, setup.tau, setup.seed) for rule in rules}
    if router:
        report = gate_statistics(gates["learned"])
        chance, hit = active.mean().item(), (active * F.one_hot(similarity.argmax(-1), len(EXPERTS))).sum(-1).mean()
        print(f"\nRouter on {len(rows)} held-out queries, tau {setup.tau:g}: its first choice is called for in "
              f"{hit:.0%}\n(by chance {chance:.0%}), gate entropy {report['entropy']:.3f} (uniform {math.log(len(EXPERTS)):.3f}), "
              f"top-1 mass {report['top1']:.3f}")
    if not need:
        return
    model = setup.load_base(setup.stage_folder("experts"))
    stage = setup.stage_folder("experts").parent.name
    print(f"\nHeld-out loss on {len(rows)} records, experts after {stage}, tau {setup.tau:g}\n\n"
          f"  {'gate':<10}{'nats/token':>10}{'against base':>14}   what the gate is")
    losses = {}
    for rule in rules:
        nats, count = evaluation_loss(model, rows, gates[rule], setup.tokens)
        losses[rule] = nats.sum() / count.sum()
        print(f"  {rule:<10}{losses[rule]:>10.4f}{losses[rule] - losses['base']:>+14.4f}   {GATE_RULES[rule]}")
    if stage == "joint":
        print("\n  After joint training a uniform gate is not what the experts were trained for, so it is\n"
              "  no fair control; shuffled is. See README, Results.")
    few = records[:5]
    rule = "learned" if router else "oracle"
    replies = generate_replies(model, chat, few), generate_replies(model, chat, few, gates[rule][:5])
    for i, record in enumerate(few):
        print(f"\nQuery {i + 1}: {record['query']}\n{format_gate(gates[rule][i])}\n  base:        {replies[0][i]}\n"
              f"  PersonaFuse: {replies[1][i]}")


def main(argv=None, close=True):
    """close: end with the closing table and five replies; eval.py's experiments do without."""
    if int(os.environ.get("RANK", 0)):
        sys.stdout = open(os.devnull, "w")  # the first process speaks for all
    args = parse(Args, argv, __doc__)
    check_args(args)
    stages = STAGES if args.stage == "all" else (args.stage,)
    setup = resolve(args, stages)
    settings = {stage: stage_settings(args, stage, setup.dtype) for stage in stages}
    rank, config = join_process_group(setup, settings), setup.run / "config.json"
    if setup.device.type == "cpu":
        keep_freed_memory()
    before = config.read_bytes() if config.is_file() else None
    to_do, alone, stop, status = [], ExitStack(), threading.Event(), None

    def ask_to_stop(*_):  # the step is finished and saved; a second signal ends at once, but torchrun always sends one
        stop.set()
        for number in (signal.SIGINT, signal.SIGTERM) if rank_and_world_size()[1] == 1 else ():
            signal.signal(number, was[number])

    was = {number: signal.signal(number, ask_to_stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        if rank == 0:
            new = not setup.run.is_dir()
            if not new:
                alone.enter_context(lock(setup.run))
            to_do = open_run(setup, settings, args)
            if new:
                alone.enter_context(lock(setup.run))
        if setup.preset == "tiny" and rank == 0:
            prepare(setup, SimpleNamespace(**stage_settings(Args(preset="tiny", seed=args.seed), "pretrain")),
                    stop.is_set)
        if rank_and_world_size()[1] > 1:
            if rank == 0:
                setup.load_data(args.stage != "router")  # made, where it is missing, before others look for it
            dist.barrier()
            if rank:
                to_do = remaining(setup, settings)
            dist.barrier()
        for i, stage in enumerate(to_do):
            later = sum(room_for(setup, after, settings[after]) for after in to_do[i + 1:])
            train_stage(stage, setup, SimpleNamespace(**settings[stage]), stop.is_set, later)
    except Stopped as stopped:
        if rank == 0:
            print(f"{stopped}. Go on with the same command and --resume", file=sys.stderr)
        status = 130
    except BaseException:
        if rank == 0 and to_do:
            unbegin(setup.run, to_do, before)
        raise
    finally:
        alone.close()
        for number, handler in was.items():
            signal.signal(number, handler)
    if dist.is_initialized():
        dist.destroy_process_group()
    if rank or status or not close:
        return status
    if not to_do:
        print(f"{setup.run} is complete")
    print_results(setup)
    print(f"\nResults are in {setup.run}; python eval.py ask --run {setup.run} \"…\" asks it something")


if __name__ == "__main__":
    run_command(main)
