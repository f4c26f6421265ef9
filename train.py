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
import hashlib
import importlib.util
import inspect
import json
import math
import os
import shutil
import signal
import sys
import threading
import time
import typing
from collections import Counter
from contextlib import nullcontext
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import tokenizers
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.nn import functional as F
from tqdm import tqdm

from command import MOST, parse, pick_device, pick_dtype, run_command
from lora import EXPERTS, add_experts, expert_layers, load_experts, save_experts
from model import Chat, Transformer, UserError, atomic, encode, finite, generate, load_tokenizer, open_safetensors
from model import pad, read_json, remove, send, short, weight_files
from router import RULES, Router, active_experts, bars, contrastive_loss, gate_report, gates_under, load_router
from router import query_ids, save_router
from synth import SPLITS, load_data, make_tiny, read_bytes, template_records, write_records

VERSION = 1  # of the run folder's format
STAGES = ("warmup", "router", "joint")

# What each preset is made of, and each stage's sizes: optimiser steps, rows a step, learning rates (all ours). "tokens"
# is the most that a micro-batch holds, padding included.
PRESETS = {
    "paper": dict(
        base=("weights/Llama-3.1-8B-Instruct",), encoder=("weights/Qwen2.5-0.5B",), data="data/personafuse.jsonl",
        tokens=8192, eval_records=500,
        warmup=dict(steps=3000, batch=64, lr=2e-4), router=dict(steps=2300, batch=128, router_lr=2e-5),
        joint=dict(steps=1500, batch=64, lr=1e-4, router_lr=1e-5)),
    "small": dict(
        base=("weights/SmolLM2-135M-Instruct",),
        encoder=("weights/Qwen2.5-0.5B", "weights/Qwen2.5-Coder-0.5B-Instruct"), data=None, records=(8000, 400, 400),
        tokens=2048, eval_records=100,
        warmup=dict(steps=100, batch=20, lr=1e-3), router=dict(steps=60, batch=16, router_lr=5e-5),
        joint=dict(steps=40, batch=16, lr=5e-4, router_lr=2e-5)),
    "tiny": dict(
        base=(), encoder=(), data=None, records=(8000, 400, 600), tokens=4096, eval_records=200,
        pretrain=dict(steps=200, batch=20, lr=4e-3),
        warmup=dict(steps=100, batch=16, lr=1e-2), router=dict(steps=100, batch=40, router_lr=2e-3),
        joint=dict(steps=60, batch=16, lr=5e-3, router_lr=5e-4)),
}
DOWNLOADS = {
    "Llama-3.1-8B-Instruct": "hf auth login && hf download meta-llama/Llama-3.1-8B-Instruct --exclude \"original/*\"",
    "Qwen2.5-0.5B": "hf download Qwen/Qwen2.5-0.5B",
    "SmolLM2-135M-Instruct": "hf download HuggingFaceTB/SmolLM2-135M-Instruct",
}


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
    """Model folder of the frozen base."""
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
    """Let torch.compile fuse each layer's operations; compiling takes a minute or so at the start. Needs Triton on a GPU
    and a C++ compiler on a CPU."""
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
# From records to batches

@dataclass
class Example:
    """One row of a batch. `ids` is prompt and reply for the base, `query` what the router reads."""
    id: str
    active: torch.Tensor            # (E,) of 0/1
    ids: np.ndarray | None = None
    prompt: int = 0                 # how many of ids are not supervised
    query: np.ndarray | None = None
    expert: int | None = None       # warm-up: the one expert that this row trains


def messages_of(record):
    return [*(record.get("history") or []), {"role": "user", "content": record["query"]}]


class Ahead:
    """Stands in for a tokenizer while many texts are encoded: it notes what it is asked and answers with nothing, and
    once `encode_all` has encoded all of that in one call, on all cores, it answers with the ids."""

    def __init__(self, tokenizer):
        self.tokenizer, self.token_to_id, self.known = tokenizer, tokenizer.token_to_id, {}

    def encode(self, text, add_special_tokens=False):
        return self.known.setdefault(text, SimpleNamespace(ids=[]))

    def encode_all(self):
        found = self.tokenizer.encode_batch_fast(list(self.known), add_special_tokens=False)
        self.known = dict(zip(self.known, found))


def tokenised(records, tokenise, tokenizer, facts=(), file=None, some=4096):
    """[(ids, how many of them are the prompt)] of all records, in their order, as tokenise(tokenizer, record) has them.

    With a file, they are kept there, for the stages to come and for a resumed run. What is kept holds for these texts,
    this tokenizer, `facts` (what else the format hangs on), the library's version and this code, of which its key is a
    hash, and for the ids that it was written with. Anything else that stands there, half a file too, is made anew.
    """
    key = hashlib.sha256()
    if file is not None:
        code = [inspect.getsource(part) for part in (Chat, encode, query_ids, messages_of, Ahead, tokenised, examples)]
        key.update(json.dumps([*code, *facts, tokenizers.__version__, tokenizer.to_str()]).encode())
        for record in records:
            key.update(json.dumps([messages_of(record), record.get("response")]).encode())
        try:
            with open_safetensors(file) as kept:
                tokens = kept.get_tensor("tokens").numpy()
                whole = kept.metadata() == {"key": key.hexdigest(), "tokens": hashlib.sha256(tokens).hexdigest()}
        except UserError:
            whole = False
        if whole:
            lengths, prompts, ids = np.split(tokens, [len(records), 2 * len(records)])
            return list(zip(np.split(ids, lengths.cumsum()[:-1]), prompts.tolist()))
    found = []
    for at in range(0, len(records), some):
        ahead = Ahead(tokenizer)
        for record in records[at:at + some]:
            tokenise(ahead, record)
        ahead.encode_all()
        found += [tokenise(ahead, record) for record in records[at:at + some]]
    found = [(np.array(ids, dtype=np.int32), prompt) for ids, prompt in found]
    if file is not None and place()[0] == 0:
        tokens = np.concatenate([np.array([[len(ids), prompt] for ids, prompt in found], dtype=np.int32).T.flatten(),
                                 *(ids for ids, _ in found)])  # all lengths, then all prompts', then all ids
        with atomic(file) as part:
            save_file({"tokens": torch.from_numpy(tokens)}, part,
                      metadata={"key": key.hexdigest(), "tokens": hashlib.sha256(tokens).hexdigest()})
    return found


def examples(records, chat=None, tokenizer=None, limit=None, folder=None):
    """Records -> Examples; with `chat` for the base, with `tokenizer` for the encoder. Both tokenizers are asked here
    and nowhere else in training, and only once where there is a folder to keep the tokens in. Returns also how many
    were left out because they are longer than `limit` tokens."""
    base, encoder = (folder and folder / f"{role}.safetensors" for role in ("base", "encoder"))

    def for_base(tokenizer, record):
        own = copy(chat)
        own.tokenizer = tokenizer
        ids, supervised = own.example(messages_of(record), record["response"])
        return ids, supervised.index(True)

    def for_encoder(tokenizer, record):
        return query_ids(tokenizer, record["query"], record.get("history") or ()), 0

    rows = [Example(str(record["id"]), active_experts(record["traits"])) for record in records]
    if tokenizer is not None:
        for row, (ids, _) in zip(rows, tokenised(records, for_encoder, tokenizer, (), encoder)):
            row.query = ids
    if chat is None:
        return rows, 0
    facts = chat.bos, chat.end, chat.dates, chat.default_system
    for row, (ids, prompt) in zip(rows, tokenised(records, for_base, chat.tokenizer, facts, base)):
        row.ids, row.prompt = ids, prompt
    short = [row for row in rows if not limit or len(row.ids) <= limit]
    return short, len(rows) - len(short)


def per_pole(rows):
    """Warm-up's rows: one for every record and active pole."""
    return [Example(row.id, row.active, row.ids, row.prompt, row.query, expert)
            for row in rows for expert in row.active.nonzero()[:, 0].tolist()]


def base_rows(records, chat):
    """What tiny's base learns from: queries with neutral replies, and the sentences of all manners as plain text, so
    that it knows their words but not when to use them. All of a row is supervised: it has a language to learn."""
    rows, _ = examples([{**r, "response": r["neutral"]} for r in records], chat)
    sentences = sorted({text for record in records for text in record["manner"].values()})
    plain = [Example(f"plain-{i}", torch.zeros(len(EXPERTS)),
                     np.array([chat.bos, *encode(chat.tokenizer, text), chat.end], dtype=np.int32), 1)
             for i, text in enumerate(sentences)]
    for row in rows:
        row.prompt = 1
    return rows + plain[:len(rows) // 3]


def cost(row):
    """Tokens that a row costs: those of the base's text where there is one."""
    return len(row.query if row.ids is None else row.ids)


def batches(lengths, batch, seed, pool=50):
    """Endless batches of row numbers. Rows of similar length go together: pools of up to `pool` batches are drawn at
    random, sorted by length, cut into batches, and the batches shuffled. A pool is never larger than an epoch."""
    rng, stream = np.random.default_rng(seed), []
    size = min(pool * batch, max(len(lengths) // batch, 1) * batch)
    while True:
        while len(stream) < size:
            stream += rng.permutation(len(lengths)).tolist()
        drawn, stream = sorted(stream[:size], key=lengths.__getitem__), stream[size:]
        cut = [drawn[i:i + batch] for i in range(0, size, batch)]
        for i in rng.permutation(len(cut)):
            yield cut[i]


def micro_batches(rows, tokens, length=cost):
    """Cut a step's rows, by length, into groups whose padded size stays within `tokens`. A group that already fills an
    eighth of that ends where one more row would make more than 5 % of it padding."""
    group, real = [], 0
    for row in sorted(rows, key=length):
        real, padded = real + length(row), length(row) * (len(group) + 1)
        if group and (padded > tokens or padded > tokens / 8 and real < 0.95 * padded):
            yield group
            group, real = [], length(row)
        group.append(row)
    yield group


class FrozenHeadLoss(torch.autograd.Function):
    """Cross-entropy through a head that does not train. Its gradient is worked out on the way forward, a chunk of
    positions at a time, so that no more than a chunk of logits exists at once and none is computed twice."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, chunk):
        losses, grads = [], []
        count = max(1, round(len(targets) / chunk))  # of equal size: a small last one would read the whole head for little
        for h, t in zip(hidden.tensor_split(count), targets[:, None].tensor_split(count)):
            logits = F.linear(h, weight)  # (n, V), then in fp32 at least
            p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
            losses.append(-p.gather(1, t)[:, 0])
            if ctx.needs_input_grad[0]:  # d loss / d logits is softmax minus one-hot
                p = p.exp_().scatter_add_(1, t, -torch.ones_like(t, dtype=p.dtype))
                grads.append(p.to(h.dtype) @ weight)
        ctx.save_for_backward(torch.cat(grads) if grads else None)
        return torch.cat(losses)

    @staticmethod
    def backward(ctx, upstream):  # (N,)
        grad, = ctx.saved_tensors
        return grad * upstream[:, None].to(grad.dtype), None, None, None


def token_losses(model, hidden, targets, chunk=None):
    """Cross-entropy of every supervised position: hidden (N, D), targets (N,) -> (N,), fp32 (or wider).

    In chunks of about `chunk` positions: 4,096 rows of fp32 logits over Llama's 128,256 words would be 2.1 GB. As a rule as
    many as make 32 MiB of logits on a CPU (more is slower: memory of that size is asked of the system each time), and
    512 MiB on a GPU.
    """
    weight = model.head_weight
    if weight.requires_grad:  # tiny's base, made from nothing
        return F.cross_entropy(model.head(hidden), targets, reduction="none")
    chunk = chunk or max(1, (2**23 if hidden.device.type == "cpu" else 2**27) // len(weight))
    return FrozenHeadLoss.apply(hidden, weight, targets, chunk)


def row_losses(model, rows, gate=None):
    """Summed loss of each row's reply, in nats: -> (B,), fp32. gate: (B, E) or None."""
    ids, _ = pad([row.ids for row in rows], model.device)
    # Position t predicts token t + 1: reply tokens prompt … len−1 are predicted from prompt−1 … len−2. Worked out here,
    # on the host: a search on the device would have to be waited for
    T = ids.shape[1]
    at = np.concatenate([i * T + np.arange(row.prompt - 1, len(row.ids) - 1) for i, row in enumerate(rows)])     # (N,)
    targets = np.concatenate([row.ids[row.prompt:] for row in rows]).astype(np.int64)                            # (N,)
    owner = np.repeat(np.arange(len(rows)), [len(row.ids) - row.prompt for row in rows])                         # (N,)
    hidden = model.hidden(ids, gate).flatten(0, 1)  # (B·T, D)
    losses = token_losses(model, hidden[send(at, model.device)], send(targets, model.device))
    return losses.new_zeros(len(rows)).index_add(0, send(owner, model.device), losses)


# ----------------------------------------------------------------------------------------------------------------------
# A stage: what trains, and its loss

class Task:
    """One stage's parameters, loss and optimiser step.

    stage "pretrain" (tiny's base only) trains all of `model` on plain text. `s` holds lr, router_lr, tokens, clip, lam,
    contrastive_tau and joint_gate.
    """

    def __init__(self, stage, model=None, router=None, s=None):
        self.stage, self.model, self.router, self.s = stage, model, router, s
        self.rank, self.size = place() if stage != "pretrain" else (0, 1)  # tiny's base is made by the first process
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
        weight = send([1 / tokens[row.expert] for row in rows], self.device)
        return (row_losses(self.model, rows, mixture) * weight).sum(), contrast, gate

    def step(self, rows, factor=1.0):
        """One optimiser step on these rows, learning rates times `factor` -> what the log says of it, as tensors: a
        number would have to be waited for (see `figures`).

        Every process knows all rows and computes every size-th of them, so that nothing but gradients and the log's
        sums is exchanged: token counts, and which experts have rows, are the whole step's everywhere.
        """
        tokens = Counter()
        for row in rows:
            tokens[row.expert] += cost(row) - row.prompt
        sums = torch.zeros(2, dtype=torch.float64, device=self.device)  # loss, contrastive part
        gates, lam = [], self.s.lam if self.stage == "joint" else 1.0
        for group in micro_batches(sorted(rows, key=cost)[self.rank::self.size], self.s.tokens):
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
            every[self.rank::self.size] = torch.cat(gates)
        if self.size > 1:
            add_up([sums, *([every] if gates else []), *(p.grad for p in trained if p.grad is not None)])
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

class Stopped(Exception):
    """Ctrl-C or SIGTERM came; the step was finished and saved."""


def place():
    """(number of this process, how many there are) of those that torchrun started; (0, 1) alone."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def add_up(tensors):
    """Sum each tensor over all processes, in place."""
    for work in [dist.all_reduce(tensor, async_op=True) for tensor in tensors]:
        work.wait()


def agreed(stop, size):
    """Whether any of `size` processes was asked to stop: all of them end after the same step."""
    flag = torch.tensor(float(stop()))
    if size > 1:
        add_up([flag])
    return flag.item() > 0


def figures(report):
    """What Task.step returned, as numbers. They are asked for where the log is written, since the device then has to
    finish what it was given."""
    numbers = {k: v.item() if torch.is_tensor(v) else v for k, v in report.items() if k != "gates"}
    return numbers | (gate_report(report["gates"]) if "gates" in report else {})


def schedule(step, steps, warmup):
    """Factor of the learning rate at a step counted from 0: a linear rise, then a cosine to 0."""
    rise = max(1, round(warmup * steps))
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def fit(task, rows, s, run, stop=lambda: False):
    """Train `task` on `rows` for s.steps steps, from the run folder's last checkpoint if it has one."""
    lengths, skipped = [cost(row) for row in rows], Counter()
    order = supervised(rows, batches(lengths, s.batch, [s.seed, *task.stage.encode()]), task, skipped)
    done, first = restore(task, run), task.rank == 0  # the first process writes
    log = rewind_log(run, task.stage, done) if first else None
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
        stopping = agreed(stop, task.size)
        line = step % s.log_every == 0 or step == s.steps
        save = step % s.save_every == 0 or step == s.steps or stopping
        if line or save or task.device.type == "cpu":  # on a GPU, steps in between are not waited for
            for at, batch, report in pending:
                report = {"step": at, "stage": task.stage, **figures(report)}
                bad = next((key for key in ("loss", "grad_norm") if not math.isfinite(report[key])), None)
                if bad:  # nothing of it is saved: the last checkpoint is before it
                    kept = states(run, task.stage)[-1:]
                    raise UserError(f"{task.stage}, step {at}: the {bad} is {report[bad]}, so training ends here"
                                    + f"; {kept[0] if kept else 'no checkpoint'} is kept. Try a lower --lr or "
                                    "--router-lr with --overwrite, or look at this step's records: "
                                    + ", ".join(row.id for row in batch))
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
    parts = {id(p): p for module in (task.model, task.router) if module is not None for p in module.parameters()}
    frozen = sum(p.numel() * p.element_size() for p in parts.values()) - 4 * trained
    kept = sum(activations(part, task.s.tokens, part.recompute) for part in decoders(task))
    if_recomputed = sum(activations(part, task.s.tokens, True) for part in decoders(task))
    said = " ".join(str(error).split())[:150]
    advice = (f"the device's memory is full ({said}). The frozen base takes {size(frozen)}, what trains "
              f"{size(16 * trained)} (values, gradients, two moments) and a micro-batch of {task.s.tokens} tokens "
              f"about {size(kept)}. --tokens {max(1, task.s.tokens // 2)} with --overwrite halves the last")
    if if_recomputed < kept:
        advice += f"; --recompute, with --resume too, leaves {size(if_recomputed)} of it, at a third more time"
    if task.model is not None and task.stage != "pretrain":
        rank = expert_layers(task.model)["model.layers.0.self_attn.q_proj"].A.shape[1]
        experts = sum(tensor.numel() for tensor in task.expert_tensors())
        advice += f"; half of --rank {rank} saves {size(8 * experts)}" if rank > 1 else ""
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


def size(n):
    """Bytes in words."""
    return f"{n / 2**30:.1f} GiB" if n >= 2**29 else f"{n / 2**20:.1f} MiB"


def append(log, entry):
    """One more line of log.jsonl, in one write: a kill comes before it or after it."""
    line = json.dumps(entry).encode() + b"\n"
    try:
        if log.write(line) < len(line):  # the disk took a part of it
            raise OSError("no space left on the disk")
    except OSError as error:
        raise UserError(f"{log.name}: cannot be written ({error.strerror or error}); the last checkpoint is kept. Free "
                        "some space, then --resume goes on") from None


def log_line(report, steps):
    line = (f"{report['stage']} {report['step']:>{len(str(steps))}}/{steps} loss {report['loss']:.4f} "
            f"norm {report['grad_norm']:.2f} lr {report['lr']:.1e} {report['tokens_per_s']:,.0f} tok/s")  # 80 columns
    return line + (f" H {report['entropy']:.2f} top1 {report['top1']:.2f}" if "entropy" in report else "")


def rewind_log(run, stage, done):
    """log.jsonl, open for appending, without this stage's lines after step `done` (or a torn last one)."""
    file, lines = run / "log.jsonl", []
    for line in file.read_bytes().splitlines() if file.exists() else []:
        try:
            entry = json.loads(line)
            keep = entry["stage"] != stage or entry["step"] <= done
        except (ValueError, LookupError, TypeError, RecursionError):
            continue
        lines += [line + b"\n"] if keep else []
    with atomic(file) as part:
        part.write_bytes(b"".join(lines))
    return open(file, "ab", buffering=0)


def states(run, stage):
    """This stage's checkpoints, oldest first."""
    return sorted((run / "state").glob(f"{stage}-*.safetensors"))


def save_state(task, step, s, run):
    """Everything that resuming needs in one file: parameters, moments, step counts. The last s.keep of them stay."""
    tensors = {}
    for i, p in enumerate(task.parameters()):
        if not finite(p):
            raise UserError(f"{task.stage}, step {step}: a parameter is NaN or infinite, so nothing is saved over the "
                            "last good checkpoint. Try a lower --lr or --router-lr with --overwrite")
        tensors[f"{i}.value"] = p.detach().contiguous()
        for name, value in task.optimizer.state.get(p, {}).items():  # empty for an expert that has not trained yet
            tensors[f"{i}.{name}"] = value
    with atomic(run / "state" / f"{task.stage}-{step:07d}.safetensors") as part:
        save_file(tensors, part, metadata={"step": str(step)})
        with open(part, "rb") as file:
            os.fsync(file.fileno())
    for old in states(run, task.stage)[:-s.keep]:
        old.unlink()


@torch.no_grad()
def restore(task, run):
    """Fill parameters and optimiser from the last checkpoint -> the step it was made after; 0 without one."""
    files = states(run, task.stage)
    if task.rank == 0:
        remove(*(run / "state").glob(f"{task.stage}-*.part"))  # what a kill has left of one
    if not files:
        return 0
    try:
        return restore_from(files[-1], task)
    except UserError as error:
        before = f"remove it, and --resume goes on from {files[-2].name}" if len(files) > 1 else \
            "remove it, and --resume begins this stage anew"
        raise UserError(f"{error}; {before}") from None


def restore_from(file, task):
    """Fill parameters and optimiser from one checkpoint -> its step. All is checked before anything is changed."""
    with open_safetensors(file) as tensors:
        found, step = set(tensors.keys()), (tensors.metadata() or {}).get("step", "")
        if not step.isascii() or not step.isdigit() or file.stem != f"{task.stage}-{int(step):07d}":
            raise UserError(f"{file}: step is {short(step)}, expected the one in the file's name")
        values, moments = [], []
        for i, p in enumerate(task.parameters()):
            names = [f"{i}.value", *([f"{i}.exp_avg", f"{i}.exp_avg_sq"] if f"{i}.step" in found else [])]
            if any(name not in found or tensors.get_slice(name).get_shape() != list(p.shape) for name in names):
                raise UserError(f"{file}: does not fit this run's models; use --overwrite to train anew")
            value, *rest = (tensors.get_tensor(name) for name in names)
            count = [tensors.get_tensor(f"{i}.step")] if rest else []
            if not all(t.is_floating_point() and finite(t) for t in (value, *rest, *count)) or count and count[0].dim():
                raise UserError(f"{file}: parameter {i} of it is not all finite floats")
            values.append(value)
            kinds = zip(("step", "exp_avg", "exp_avg_sq"), (*count, *rest))
            moments.append({name: t.to(p.device) for name, t in kinds})
    for p, value, state in zip(task.parameters(), values, moments):
        p.copy_(value)
        if state:
            task.optimizer.state[p] = state
    return int(step)


# ----------------------------------------------------------------------------------------------------------------------
# A run: its folder, models and data

@dataclass
class Setup:
    """Where a run's models, data and results are, and how to load them. eval.py makes it from the run's config.json."""
    run: Path
    preset: str
    base: str | None
    encoder: str | None
    data: str | None
    device: torch.device
    dtype: torch.dtype
    seed: int
    tau: float
    rank: int
    alpha: float
    tokens: int
    eval_records: int

    RUN = "{run}/"  # how config.json writes paths inside the run folder, so that a run can be moved
    AGREE = ("preset", "base", "encoder", "data", "seed", "rank", "alpha")  # must be the same for all stages of a run

    @staticmethod
    def inside(path, run):
        """A path as config.json has it -> as it is now that the run folder is `run`."""
        return path and path.replace(Setup.RUN, f"{run}/")

    def load_base(self, experts=None):
        """The frozen base with ten experts, fresh ones from the seed or those saved in the folder `experts`."""
        model = Transformer.from_pretrained(self.base, self.dtype, self.device)
        if self.rank > model.config.dim:
            raise UserError(f"--rank is {self.rank}, expected at most the base's width, {model.config.dim}")
        torch.manual_seed(self.seed)
        add_experts(model, rank=self.rank, alpha=self.alpha)
        if experts is not None:
            load_experts(model, experts)
        return model

    def load_router(self, folder=None):
        """The router, fp32, from the public encoder or as saved in `folder`."""
        encoder = Transformer.from_pretrained(self.encoder, torch.float32, self.device)
        torch.manual_seed(self.seed)
        router = Router(encoder, self.tau)
        if folder is not None:
            load_router(router, folder)
        return router

    def load_data(self, need_response=True):
        """{split: records}. The template teacher's are made where they are missing or torn: same seed, same text."""
        if Path(self.data) == self.run / "data":
            counts = PRESETS[self.preset]["records"]
            try:
                torn = [len(records) for records in load_data(self.data)[0].values()] != list(counts)
            except UserError:
                torn = True
            if torn:
                for name, count in zip(SPLITS, counts):
                    write_records(self.run / "data" / f"{name}.jsonl", template_records(name, count, self.seed))
        splits, zero = load_data(self.data, self.seed, need_response)
        if zero:
            print(f"{self.data}: left out {zero} records whose traits are all zero")
        return splits

    def stage_folder(self, part):
        """Where the latest experts ("experts") or router ("router") of this run are, or None."""
        first = "warmup" if part == "experts" else "router"
        return next((self.run / s / part for s in ("joint", first) if (self.run / s / part).is_dir()), None)


def resolve(args, stages):
    """The Setup that the arguments ask for. One UserError names everything that is missing, and how to get it."""
    preset, problems = PRESETS[args.preset], []
    run = Path(args.run or f"runs/{args.preset}")

    def model_folder(given, choices, role):
        if args.preset == "tiny" and given is None:
            return str(run / "models" / role)
        folder = next((f for f in ((given,) if given else choices) if Path(f).is_dir()), given or choices[0])
        name = Path(folder).name
        if not Path(folder).is_dir():
            how = f": {DOWNLOADS[name]} --local-dir {folder}" if name in DOWNLOADS else ""
            problems.append(f"{folder}, the {role}'s model folder{how}")
        elif not given and folder != choices[0]:
            print(f"{choices[0]} is not here; the encoder is {folder}, of the same shape")
        return folder

    base = model_folder(args.base, preset["base"], "base") if set(stages) & {"warmup", "joint"} else None
    encoder = model_folder(args.encoder, preset["encoder"], "encoder") if set(stages) & {"router", "joint"} else None
    data = args.data or preset["data"] or str(run / "data")
    if not Path(data).exists() and data != str(run / "data"):
        problems.append(f"{data}, the training records: python synth.py --teacher template --out {data} --count 20000")
    device = dtype = None
    try:
        device = pick_device(args.device or {"paper": "cuda", "tiny": "cpu"}.get(args.preset))
        dtype = pick_dtype(args.dtype, device)
    except UserError as error:
        problems.append(str(error))
    if problems:
        what = args.stage if args.stage != "all" else "stages"
        raise UserError(f"preset {args.preset}, {what}: missing\n" + "".join(f"  - {p}\n" for p in problems)
                        + "python train.py --preset tiny --stage all runs without any of it")
    return Setup(run, args.preset, base, encoder, data, device, dtype, args.seed, args.tau, args.rank,
                 args.alpha, args.tokens or preset["tokens"], args.eval_records or preset["eval_records"])


def stage_settings(args, stage):
    """What a stage trains with: the command line's values, else the preset's."""
    s = PRESETS[args.preset][stage] | {"tokens": PRESETS[args.preset]["tokens"]}
    s |= {k: v for k in ("steps", "batch", "lr", "router_lr", "tokens")
          if (v := getattr(args, k)) is not None and k in s}
    for key in ("seed", "clip", "lr_warmup", "save_every", "keep", "log_every", "recompute", "compile"):
        s[key] = getattr(args, key)
    if stage in ("router", "joint"):
        s["contrastive_tau"] = args.contrastive_tau
    if stage == "joint":
        s |= {"lam": args.lam, "tau": args.tau, "joint_gate": args.joint_gate}
    return s


def check(args):
    """UserError for arguments that contradict each other."""
    if args.resume and args.overwrite:
        raise UserError("--resume goes on with what is there, --overwrite removes it: choose one")
    for key, stages in (("lr", "warmup joint"), ("router_lr", "router joint")):
        if getattr(args, key) is not None and args.stage != "all" and args.stage not in stages.split():
            raise UserError(f"--{key.replace('_', '-')} has no meaning for --stage {args.stage}")
    if args.joint_gate != "learned" and args.stage not in ("joint", "all"):
        raise UserError("--joint-gate is for --stage joint")


HARMLESS = ("save_every", "keep", "log_every", "recompute", "compile")  # may change from one part of a run to the next


def differences(was, now):
    """What differs between two dicts of settings, in words; None is "not given", and agrees with anything."""
    return "; ".join(f"{k} was {was.get(k)!r} and is now {v!r}" for k, v in now.items()
                     if k not in HARMLESS and None not in (was.get(k), v) and was.get(k) != v)


def is_path(value):
    return isinstance(value, str) and value != "" and "\0" not in value


KINDS = {  # what the setup in a run's config.json holds
    "preset": lambda v: isinstance(v, str) and v in PRESETS, "data": is_path,
    "base": lambda v: v is None or is_path(v), "encoder": lambda v: v is None or is_path(v),
    "seed": lambda v: type(v) is int and 0 <= v < 2**31, "rank": lambda v: type(v) is int and 1 <= v <= MOST["rank"],
    "alpha": lambda v: type(v) in (int, float) and 0 < v < 2**31}


def read_run(run):
    """A run folder's config.json -> dict. UserError for what another version, or a hand, has made of it."""
    file = Path(run) / "config.json"
    found = read_json(file)
    if found.get("version") != VERSION or not all(isinstance(found.get(k), dict) for k in ("setup", "stages")):
        raise UserError(f"{file}: format {short(found.get('version'))}, expected {VERSION}: made by another version")
    setup, stages = found["setup"], found["stages"]
    for key in sorted(setup.keys() | KINDS):
        if key not in KINDS or not KINDS[key](setup.get(key)):
            raise UserError(f"{file}: {key} of setup is {short(setup.get(key))}, which no run has. Was it edited?")
    for stage, settings in stages.items():
        tau = settings.get("tau", 1.0) if isinstance(settings, dict) else None
        if stage not in STAGES or type(tau) not in (int, float) or not 1e-9 <= tau < 2**31:
            raise UserError(f"{file}: stage {short(stage)} is {short(settings)}, which no run has. Was it edited?")
    if not isinstance(found.get("content", {}), dict):
        raise UserError(f"{file}: content is {short(found['content'])}, expected an object")
    return found


def fingerprint(path):
    """What a model folder or data hold, as a short text: a hash of config.json, the tokenizer and a sample of every
    tensor (the same for one file and for shards); or of the records."""
    path, digest = Path(path), hashlib.sha256()
    if not (path / "config.json").exists():
        for file in [path / f"{split}.jsonl" for split in SPLITS] if path.is_dir() else [path]:
            digest.update(hashlib.sha256(read_bytes(file)).digest())
        return digest.hexdigest()[:16]
    digest.update(json.dumps(read_json(path / "config.json"), sort_keys=True).encode())
    if (path / "tokenizer.json").exists():
        digest.update(read_bytes(path / "tokenizer.json"))
    samples = {}
    for file, names in weight_files(path).items():
        with open_safetensors(file) as tensors:
            for name in set(tensors.keys()) & set(tensors.keys() if names is None else names):
                part = tensors.get_slice(name)
                shape = part.get_shape()
                values = part[shape[0] // 2:shape[0] // 2 + 1] if shape else torch.zeros(0)  # the row in the middle
                samples[name] = f"{name}{shape}".encode() + values.contiguous().view(torch.uint8).numpy().tobytes()
    for name in sorted(samples):
        digest.update(samples[name])
    return digest.hexdigest()[:16]


def content(setup):
    """Fingerprints of what the run takes from outside its folder; what is inside was made from the seed."""
    paths = {key: getattr(setup, key) for key in ("base", "encoder", "data")}
    return {key: fingerprint(path) for key, path in paths.items() if path and not path.startswith(f"{setup.run}/")}


def open_run(setup, settings, args):
    """Begin, continue or refuse a run folder; write its config.json -> the stages that are still to be trained."""
    run, file = setup.run, setup.run / "config.json"
    own = {k: getattr(setup, k) for k in Setup.AGREE}
    own |= {k: own[k].replace(f"{run}/", Setup.RUN) for k in ("base", "encoder", "data") if own[k]}
    if "joint" in settings and (args.overwrite or not (run / "joint").is_dir()):
        for stage in ("warmup", "router"):
            if stage not in settings and not (run / stage).is_dir():
                raise UserError(f"{run}: the joint stage starts from warmup and router, and {stage} is not done here: "
                                f"python train.py --preset {setup.preset} --stage {stage} --run {run} first")
    if not file.exists():
        if args.resume:
            raise UserError(f"{run}: no config.json, so there is no run to resume; without --resume one is begun here")
        if run.exists() and (not run.is_dir() or any(run.iterdir())):
            raise UserError(f"{run} is there already and holds no run: choose another --run, or remove it")
        found = {"version": VERSION, "setup": own, "stages": {}, "content": content(setup)}
    else:
        found = read_run(run)
        # later stages were built on the first one that is trained anew
        remove = STAGES[STAGES.index(next(iter(settings))):] if args.overwrite else ()
        found["stages"] = {stage: was for stage, was in found["stages"].items() if stage not in remove}
        differ = differences(found["setup"], own) if found["stages"] or not args.overwrite else ""
        if differ:
            raise UserError(f"{run} was begun with other arguments: {differ}. Give the same or another --run")
        was = found.get("content", {}) if found["stages"] or not args.overwrite else {}
        found["content"] = was | content(setup)
        for key in was:
            if found["content"][key] != was[key]:
                raise UserError(f"{getattr(setup, key)}: not the {key} that {run} was begun with: what is in it has "
                                f"changed (its fingerprint was {short(was[key])}, now {found['content'][key]!r}). "
                                "Put back what was there, or give another --run")
        if args.overwrite:
            clear(run, remove if found["stages"] else (*remove, "pretrain", "models", "data", "tokens"))
        found["setup"] = own if not found["stages"] and args.overwrite else found["setup"] | {
            k: v for k, v in own.items() if v is not None}
    begun = [stage for stage in settings if stage in found["stages"]]
    for stage in begun:
        differ = differences(found["stages"][stage], settings[stage])
        if differ:
            raise UserError(f"{run}: {stage} was begun with other settings: {differ}. Give the same to go on with "
                            "--resume, or --overwrite to train anew")
    to_do = [stage for stage in settings if not (run / stage).is_dir()]
    if begun and to_do and not args.resume:
        raise UserError(f"{run} holds a run (begun: {', '.join(begun)}; not done: {', '.join(to_do)}): --resume goes "
                        "on with it, --overwrite trains anew")
    found["stages"] |= settings
    with atomic(file) as part:
        part.write_text(json.dumps(found, indent=2) + "\n")
    return remaining(setup, settings)


def unbegin(run, stages, config):
    """Leave a run as it was, if an error came before anything of it was trained: config is what config.json held."""
    logged = (run / "log.jsonl").is_file() and (run / "log.jsonl").stat().st_size
    if any(states(run, stage) or (run / stage).exists() for stage in stages):
        return
    if config is not None:
        with atomic(run / "config.json") as part:
            part.write_bytes(config)
    elif not logged and {path.name for path in run.iterdir()} <= {"config.json", "log.jsonl", "state", "tokens"}:
        remove(run)


def remaining(setup, settings):
    """Take what the run folder's config.json says of models -> the stages that are still to be trained."""
    found = read_run(setup.run)["setup"]  # the closing may need what another stage was given
    setup.base, setup.encoder = (Setup.inside(found[k], setup.run) for k in ("base", "encoder"))
    return [stage for stage in settings if not (setup.run / stage).is_dir()]


def join(setup, settings):
    """Join the processes that torchrun started, each with a GPU of its own -> the number of this one, 0 if alone."""
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size == 1:
        return 0
    for stage, s in settings.items():
        if s["batch"] < size:
            raise UserError(f"{size} processes share {s['batch']} rows of a {stage} step: give a larger --batch")
    if setup.device.type == "cuda":
        setup.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(setup.device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if setup.device.type == "cuda" else "gloo")
    return place()[0]


def clear(run, names):
    """Remove stages' (or other) folders and checkpoints, and their lines of the log."""
    for name in names:
        shutil.rmtree(run / name, ignore_errors=True)
        for file in states(run, name):
            file.unlink()
        if (run / "log.jsonl").exists():
            rewind_log(run, name, 0).close()


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
                fit(Task("pretrain", model, s=settings), base_rows(records, chat), settings, setup.run, stop)
            make_tiny(role, folder, records, setup.seed, fit_base)


def compile_layers(model):
    """Let torch.compile have every layer of a model, without graph breaks and for sizes of all kinds at once. The first
    step compiles, and the first batch of a single row, for which PyTorch always makes a graph of its own."""
    cuda = model.device.type == "cuda"
    if cuda and not importlib.util.find_spec("triton"):
        raise UserError("--compile needs Triton on a GPU: pip install triton, or leave --compile out")
    if not cuda and not any(map(shutil.which, [os.environ.get("CXX", ""), "g++", "clang++"])):
        raise UserError("--compile needs a C++ compiler on a CPU, and there is neither g++ nor clang++: install one, "
                        "or leave --compile out")
    for block in model.model.layers:
        block.compile(dynamic=True, fullgraph=True)


def train_stage(stage, setup, s, stop):
    """Load what one stage needs, train it, write its result."""
    records = setup.load_data(need_response=stage != "router")["train"]
    model = router = chat = tokenizer = None
    if stage != "router":
        model = setup.load_base(setup.run / "warmup" / "experts" if stage == "joint" else None)
        model.recompute, chat = s.recompute, Chat.from_dir(setup.base)
    if stage != "warmup":
        router = setup.load_router(setup.run / "router" / "router" if stage == "joint" else None)
        router.encoder.recompute, tokenizer = s.recompute, load_tokenizer(setup.encoder)
    for decoder in ([model] if model else []) + ([router.encoder] if router else []):
        if s.compile:
            compile_layers(decoder)
    limit = min(s.tokens, model.context or s.tokens) if model else s.tokens
    rows, long = examples(records, chat, tokenizer, limit, setup.run / "tokens")
    if long:
        why = "--tokens" if limit == s.tokens else "the base's context"
        print(f"{stage}: left out {long} of {len(records)} records, longer than {limit} tokens ({why})")
    if not rows:
        raise UserError(f"{setup.data}: no record is short enough to train on; raise --tokens")
    if stage == "warmup":
        rows = per_pole(rows)
        idle = [EXPERTS[e] for e in sorted(set(range(len(EXPERTS))) - {row.expert for row in rows})]
        if idle:
            print(f"warmup: no record calls for {', '.join(idle)}; these experts stay as they are, without effect")
    task = Task(stage, model, router, s)
    if task.rank == 0:
        check_room(task, s, setup.run)
    fit(task, rows, s, setup.run, stop)
    if task.rank == 0:
        with atomic(setup.run / stage) as part:
            part.mkdir()
            task.save(part, setup.base)
    if task.size > 1:
        dist.barrier()  # the next stage begins with what this one wrote


def check_room(task, s, run):
    """UserError, before training, where the disk has no room for this stage's checkpoints and its result."""
    trained = 4 * sum(p.numel() for p in task.parameters())
    have, there = shutil.disk_usage(run).free, len(states(run, task.stage))
    checkpoints = max(1, min(s.keep, -(-s.steps // s.save_every)) + 1 - there)  # the oldest goes last
    need = 3 * trained * checkpoints + trained
    if need > have:
        raise UserError(f"{run}: its disk has {size(have)} free, and {task.stage} needs {size(need)} more: "
                        f"{checkpoints} checkpoint(s) of {size(3 * trained)} and its result. Free some, lower --keep, "
                        "or give a --run on another disk")


# ----------------------------------------------------------------------------------------------------------------------
# Held-out loss under a gate rule, and what a run ends with

@torch.no_grad()
def similarities(router, rows, tokens=8192):
    """What the router sees in each row's query: -> (N, E), fp32, on the CPU."""
    found = torch.zeros(len(rows), len(EXPERTS))
    order = {id(row): i for i, row in enumerate(rows)}
    for group in micro_batches(rows, tokens, lambda row: len(row.query)):
        ids, lengths = pad([row.query for row in group], router.encoder.device)
        found[[order[id(row)] for row in group]] = router.similarity(router.embed(ids, lengths)).cpu()
    return found


@torch.no_grad()
def heldout(model, rows, gates=None, tokens=8192):
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
    return nats, np.array([float(cost(row) - row.prompt) for row in rows])


def answer(model, chat, records, gates=None, max_new_tokens=80, **sampling):
    """Replies of the base (gates None) or of the mixture to records -> texts."""
    prompts = [chat.prompt(messages_of(record)) for record in records]
    return [chat.text(ids) for ids in generate(model, prompts, gates, max_new_tokens, stops=chat.stops, **sampling)]


def closing(setup):
    """What a run ends with: held-out loss under each gate rule, and five held-out queries with gate and replies."""
    need = setup.stage_folder("experts") is not None
    records = setup.load_data(need)["test"][:setup.eval_records]
    chat = Chat.from_dir(setup.base) if need else None
    router = setup.load_router(setup.stage_folder("router")) if setup.stage_folder("router") else None
    rows, _ = examples(records, chat, load_tokenizer(setup.encoder) if router else None)
    active = torch.stack([row.active for row in rows])
    similarity = similarities(router, rows) if router else None
    rules = ["base", "uniform", "shuffled", "learned", "oracle"] if router else ["base", "uniform", "oracle"]
    gates = {rule: gates_under(rule, active, similarity, setup.tau, setup.seed) for rule in rules}
    if router:
        report = gate_report(gates["learned"])
        chance, hit = active.mean().item(), (active * F.one_hot(similarity.argmax(-1), len(EXPERTS))).sum(-1).mean()
        print(f"\nRouter on {len(rows)} held-out queries, tau {setup.tau:g}: its first choice is called for in {hit:.0%}\n"
              f"(by chance {chance:.0%}), gate entropy {report['entropy']:.3f} (uniform {math.log(len(EXPERTS)):.3f}), "
              f"top-1 mass {report['top1']:.3f}")
    if not need:
        return
    model = setup.load_base(setup.stage_folder("experts"))
    stage = setup.stage_folder("experts").parent.name
    print(f"\nHeld-out loss on {len(rows)} records, experts after {stage}, tau {setup.tau:g}\n\n"
          f"  {'gate':<10}{'nats/token':>10}{'against base':>14}   what the gate is")
    losses = {}
    for rule in rules:
        nats, count = heldout(model, rows, gates[rule], setup.tokens)
        losses[rule] = nats.sum() / count.sum()
        print(f"  {rule:<10}{losses[rule]:>10.4f}{losses[rule] - losses['base']:>+14.4f}   {RULES[rule]}")
    if stage == "joint":
        print("\n  After joint training a uniform gate is not what the experts were trained for, so it is\n"
              "  no fair control; shuffled is. See README, Results.")
    few = records[:5]
    rule = "learned" if router else "oracle"
    replies = answer(model, chat, few), answer(model, chat, few, gates[rule][:5])
    for i, record in enumerate(few):
        print(f"\nQuery {i + 1}: {record['query']}\n{bars(gates[rule][i])}\n  base:        {replies[0][i]}\n"
              f"  PersonaFuse: {replies[1][i]}")


def main(argv=None, close=True):
    """close: end with the closing table and five replies; eval.py's experiments do without."""
    if int(os.environ.get("RANK", 0)):
        sys.stdout = open(os.devnull, "w")  # the first process speaks for all
    args = parse(Args, argv, __doc__)
    check(args)
    stages = STAGES if args.stage == "all" else (args.stage,)
    setup = resolve(args, stages)
    settings = {stage: stage_settings(args, stage) for stage in stages}
    rank, config = join(setup, settings), setup.run / "config.json"
    before = config.read_bytes() if config.is_file() else None
    if rank == 0:
        to_do = open_run(setup, settings, args)
    stop = threading.Event()

    def ask_to_stop(*_):  # the step is finished and saved; a second signal ends at once, but torchrun always sends one
        stop.set()
        for number in (signal.SIGINT, signal.SIGTERM) if place()[1] == 1 else ():
            signal.signal(number, was[number])

    was = {number: signal.signal(number, ask_to_stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        if setup.preset == "tiny" and rank == 0:
            prepare(setup, SimpleNamespace(**stage_settings(Args(preset="tiny", seed=args.seed), "pretrain")),
                    stop.is_set)
        if place()[1] > 1:
            if rank == 0:
                setup.load_data(args.stage != "router")  # made, where it is missing, before others look for it
            dist.barrier()
            if rank:
                to_do = remaining(setup, settings)
            dist.barrier()
        for stage in to_do:
            train_stage(stage, setup, SimpleNamespace(**settings[stage]), stop.is_set)
    except UserError:
        if rank == 0 and not args.overwrite:
            unbegin(setup.run, to_do, before)
        raise
    except Stopped as stopped:
        if rank == 0:
            print(f"{stopped}. Go on with the same command and --resume", file=sys.stderr)
        return 130
    finally:
        for number, handler in was.items():
            signal.signal(number, handler)
    if dist.is_initialized():
        dist.destroy_process_group()
    if rank or not close:
        return
    if not to_do:
        print(f"{setup.run} is complete")
    closing(setup)
    print(f"\nResults are in {setup.run}; python eval.py ask --run {setup.run} \"…\" asks it something")


if __name__ == "__main__":
    run_command(main)
