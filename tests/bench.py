"""Speed and memory, beside what a user would otherwise take: `transformers` and `peft`, with the same weights.

Every table comes from interleaved runs (A B A B …): absolute times are noise, ratios of neighbours are not. Shown are
medians, the ratio to the table's first row (median over the rounds, and the middle half of them in brackets), and what
share of the machine's ceiling a row reaches: matrix products or bytes from memory, both measured on the spot.

    python tests/bench.py step                       # a training step beside peft, one adapter and ten
    python tests/bench.py generate                   # decoding beside transformers, and what experts cost in it
    python tests/bench.py teacher --weights weights/SmolLM2-135M-Instruct [--natural]
    python tests/bench.py router                     # the router stage beside a plain loop over padded batches
    python tests/bench.py memory                     # what experts save for backward; the largest tensors of a step
    python tests/bench.py memory --shape Llama-3.1-8B --layers 2 --dtype bfloat16 --length 256
    python tests/bench.py load --weights weights/SmolLM2-135M-Instruct weights/Qwen2.5-0.5B
    python tests/bench.py data --weights weights/SmolLM2-135M-Instruct weights/Qwen2.5-0.5B
    python tests/bench.py growth --layers 8 --out growth.png
    python tests/bench.py gpu                        # what wants a GPU, at the 8B's true shape

Without --weights, weights are random and of the shape --shape. pytest does not collect this file.
"""
import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
warnings.filterwarnings("ignore")

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lora import EXPERTS, TARGETS, add_experts, expert_layers, merged
from model import CONFIGS, Chat, Config, Transformer, UserError, generate, load_tokenizer, pad, weight_files
from router import MAX_QUERY_TOKENS, Router, contrastive_loss, query_ids
from synth import Parser, Query, pick_device, pick_dtype, read_queries, read_records, run_command, template_records
from synth import write_records
from train import PRESETS, Example, Setup, Task, batches, cost, examples, micro_batches, per_pole, row_losses


# ----------------------------------------------------------------------------------------------------------------------
# The harness

def wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleaved(runs, rounds, device=torch.device("cpu")):
    """{name: function} -> {name: seconds of each round}; one round to warm up, then all in turn, `rounds` times."""
    times = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            gc.collect()
            wait(device)
            began = time.perf_counter()
            run()
            wait(device)
            if turn:
                times[name].append(time.perf_counter() - began)
    return times


def show(title, head, rows):
    """Print a table: the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    print(f"\n{title}\n")
    for row in [head, *rows]:
        print("  " + "  ".join(f"{cell:{'<>'[i > 0]}{w}}" for i, (cell, w) in enumerate(zip(row, widths))).rstrip())
    sys.stdout.flush()


def table(title, times, per_second=None, unit="tokens/s", work=None, rate=1.0):
    """Print medians, and ratios of neighbours to the first name. per_second: how much each run does, in `unit`.
    work: {name: FLOPs or bytes of a run}, shown as a share of `rate` (FLOP/s or B/s), the machine's ceiling."""
    first, rows = next(iter(times.values())), []
    head = ["", "median", "to the first [middle half]", *([unit] if per_second else []), *(["of ceiling"] if work else [])]
    for name, found in times.items():
        ratios, middle = sorted(t / f for t, f in zip(found, first)), statistics.median(found)
        q = len(ratios) // 4
        rows.append([name, f"{middle * 1e3:,.0f} ms",
                     f"{statistics.median(ratios):.2f} [{ratios[q]:.2f}, {ratios[-1 - q]:.2f}]"])
        rows[-1] += [f"{per_second / middle:,.1f}"] if per_second else []
        rows[-1] += [f"{work[name] / middle / rate:.0%}" if name in work else ""] if work else []
    show(title, head, rows)


def ceiling(device, dtype):
    """This machine's rate of matrix products (FLOP/s) and its memory bandwidth (B/s), the best of ten."""
    n = 2048 if device.type == "cpu" else 8192
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    big = torch.ones((1 << 28) // 4 if device.type == "cpu" else 1 << 30, device=device)
    products = interleaved({"mm": lambda: a @ b, "sum": lambda: big.sum()}, 10, device)
    return 2 * n ** 3 / min(products["mm"]), big.nbytes / min(products["sum"])


def peak(run, device):
    """Run it -> (the most bytes that were allocated at once, above those there before; the largest allocation)."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before, None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]  # freed ones are negative
    return int(np.cumsum(sizes).max()), max(sizes)


def child(what, *argv):
    """Run a command of this file's CHILDREN in a process of its own -> the JSON it prints last, with peak memory."""
    done = subprocess.run([sys.executable, __file__, what, *map(str, argv)], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{what}: {done.stderr.strip() or done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def resident(which="VmRSS"):
    """Bytes of this process in memory now, or at most so far (VmHWM). Linux."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(which))
    return int(line.split()[1]) * 1024


# ----------------------------------------------------------------------------------------------------------------------
# What a step and a token cost at least

def linears(config):
    """(in, out) of the seven linear layers of a block."""
    c, heads, kv = config, config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    return [(c.dim, heads), (c.dim, kv), (c.dim, kv), (heads, c.dim), *[(c.dim, c.hidden_dim)] * 2, (c.hidden_dim, c.dim)]


def step_flops(config, lengths, supervised, experts=10, rank=8, frozen=True):
    """FLOPs of a training step over rows of these lengths: 2 for each weight and token forward, 2 backward for the
    input and, unless it is frozen, 2 for the weight; attention causal, forward and backward; the head where it counts."""
    c, tokens = config, sum(lengths)
    weights = c.n_layers * sum(i * o for i, o in linears(c))
    adapters = c.n_layers * sum(i + o for i, o in linears(c)) * experts * rank
    attention = 7 * c.n_layers * c.n_heads * c.head_dim * sum(length**2 for length in lengths)
    return (4 if frozen else 6) * weights * tokens + 6 * adapters * tokens + attention + 4 * c.vocab_size * c.dim * supervised


def token_bytes(model, experts=True):
    """Bytes of weights that decoding one token (of all rows at once) has to read."""
    read = sum(p.nbytes for name, p in model.named_parameters() if ".layers." in name
               and (experts or not name.endswith((".A", ".B"))))
    return read + model.head_weight.nbytes


# ----------------------------------------------------------------------------------------------------------------------
# The same weights, ours and theirs

def shape(args, default="SmolLM2-135M", whole_head=False):
    """The Config that is asked for. With fewer layers the vocabulary shrinks alike, so that the head keeps its share."""
    config = Config.from_dir(args.weights[0]) if args.weights else CONFIGS[args.shape or default]
    if not args.layers or args.weights:
        return config
    vocabulary = config.vocab_size if whole_head else config.vocab_size * args.layers // config.n_layers // 64 * 64
    return replace(config, n_layers=args.layers, vocab_size=vocabulary)


def fresh(config, args, dtype=None):
    """A model with random weights, laid out on the device in its dtype, or the one in --weights."""
    if args.weights:
        return Transformer.from_pretrained(args.weights[0], dtype or args.dtype, args.device)
    torch.manual_seed(0)
    torch.set_default_dtype(dtype or args.dtype)
    try:
        with args.device:
            return Transformer(config)
    finally:
        torch.set_default_dtype(torch.float32)


def reference(config, args):
    """A `transformers` model of this shape."""
    import transformers
    kind = "Qwen2" if config.qkv_bias else "Llama"
    settings = getattr(transformers, kind + "Config")(
        vocab_size=config.vocab_size, hidden_size=config.dim, intermediate_size=config.hidden_dim,
        num_hidden_layers=config.n_layers, num_attention_heads=config.n_heads, num_key_value_heads=config.n_kv_heads,
        head_dim=config.head_dim, rms_norm_eps=config.norm_eps, rope_theta=config.rope_theta,
        tie_word_embeddings=config.tied, max_position_embeddings=8192)
    return getattr(transformers, kind + "ForCausalLM")(settings).to(args.device, args.dtype)


def pair(args):
    """(our model, theirs), which share their weights: random ones of the shape --shape, or those in --weights."""
    config = shape(args)
    ours, theirs = fresh(config, args), reference(config, args)
    theirs.load_state_dict(ours.state_dict(), strict=False, assign=True)
    theirs.tie_weights()
    theirs.generation_config.eos_token_id = theirs.generation_config.pad_token_id = None
    return ours, theirs.eval()


def with_experts(model, n_experts=10, rank=8):
    """Experts beside every layer, with B as if it had been trained -> the trainable parameters."""
    parameters = add_experts(model, n_experts, rank, 2 * rank)
    for layer in expert_layers(model).values():
        torch.nn.init.normal_(layer.B, std=0.01)
    return parameters


def gates(n, device, n_experts=10):
    return torch.randn(n, n_experts, device=device).softmax(-1)


def rows_of(config, rows, length, prompt=1):
    """`rows` Examples of random ids: `length` tokens that are predicted, of which `prompt` − 1 are not supervised."""
    ids = torch.randint(config.vocab_size, (rows, length + 1), generator=torch.Generator().manual_seed(0))
    return [Example(str(i), None, row.numpy(), prompt) for i, row in enumerate(ids)]


def our_step(model, batch, optimizer, gate):
    """A training step of the mixture as a function, without the router: through train.py's loss."""
    tokens = sum(len(row.ids) - row.prompt for row in batch)

    def run():
        (row_losses(model, batch, gate).sum() / tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
    return run


# ----------------------------------------------------------------------------------------------------------------------
# step, generate, teacher

def step(args):
    """A training step: forward, loss, backward, optimiser."""
    import peft
    ours, theirs = pair(args)
    rows, length = args.batch or 4, args.length or 128  # 4 × 128 = 512 supervised tokens
    optimizer = torch.optim.AdamW(with_experts(ours), fused=True)
    gate = gates(rows, args.device).requires_grad_()
    settings = peft.LoraConfig(r=8, lora_alpha=16, target_modules=list(TARGETS))
    theirs = peft.get_peft_model(theirs, settings, EXPERTS[0])

    def their_step(batch, names):
        theirs.base_model.set_adapter(names)
        adam = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], fused=True)
        ids = torch.tensor(np.stack([row.ids for row in batch]), device=args.device)
        labels = ids.clone()
        labels[:, :batch[0].prompt] = -100

        def run():
            theirs(input_ids=ids, labels=labels).loss.backward()
            adam.step()
            adam.zero_grad()
        return run

    for prompt, share in ((1, "all"), (length * 2 // 3 + 1, "a third")):
        batch = rows_of(ours.config, rows, length, prompt)
        runs = {"peft, one adapter": their_step(batch, EXPERTS[0]),
                "PersonaFuse, ten experts": our_step(ours, batch, optimizer, gate)}
        work = {"PersonaFuse, ten experts": step_flops(ours.config, [length] * rows, rows * (length + 1 - prompt))}
        table(f"Training step, {rows} x {length} tokens, {share} of them supervised",
              interleaved(runs, args.rounds, args.device), work=work, rate=args.flops)
    for name in EXPERTS[1:]:
        theirs.add_adapter(name, settings)
    batch = rows_of(ours.config, rows, length)
    runs = {"PersonaFuse, ten experts": our_step(ours, batch, optimizer, gate),
            "peft, ten adapters": their_step(batch, list(EXPERTS))}
    table("The same, all supervised, beside ten adapters", interleaved(runs, max(1, args.rounds // 2), args.device))


def decode(args):
    """Greedy generation, and what experts cost in it."""
    ours, theirs = pair(args)
    with torch.device("meta"):
        dense = Transformer(ours.config)
    with_experts(ours)
    new, length = args.steps or 64, args.length or 64
    for rows in (1, args.batch or 16):
        ids = torch.randint(3, ours.config.vocab_size, (rows, length), device=args.device)
        prompts, gate = ids.tolist(), gates(rows, args.device)
        mask = torch.ones_like(ids)
        mixture = f"PersonaFuse, {rows} gate{'s' * (rows > 1)}"
        runs = {"PersonaFuse, no experts": lambda: generate(ours, prompts, None, new),
                "transformers.generate": lambda: theirs.generate(
                    ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False),
                mixture: lambda: generate(ours, prompts, gate, new)}
        if rows == 1:
            dense.load_state_dict(merged(ours, gate[0]), assign=True)
            runs["PersonaFuse, merged for one gate"] = lambda: generate(dense, prompts, None, new)
        work = {name: new * token_bytes(ours, name == mixture) for name in runs}
        table(f"Generation, {rows} x {length} tokens of prompt, {new} new ones",
              interleaved(runs, args.rounds, args.device), rows * new, work=work, rate=args.bandwidth)


def teacher(args):
    """The local teacher's replies, in batches, from the prompts that synth.py asks it with (--steps joint there)."""
    from transformers import AutoModelForCausalLM
    folder, device = folders(args, 1)[0], args.device
    ours, chat = Transformer.from_pretrained(folder, args.dtype, device), Chat.from_dir(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=args.dtype).to(device).eval()
    rows, new, stops = args.batch or 16, args.steps or 64, sorted(chat.stops)
    prompts = [chat.prompt(Query(item, "joint", 0, "bench").ask[0]) for item in queries(args, rows)]
    width, replies = max(map(len, prompts)), {}
    ids = torch.tensor([[stops[0]] * (width - len(p)) + p for p in prompts], device=device)  # padded on the left
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)

    def run_ours():
        replies["ours"] = generate(ours, prompts, None, new, stops=chat.stops if args.natural else ())

    def run_theirs():
        out = theirs.generate(input_ids=ids, attention_mask=mask, max_new_tokens=new, do_sample=False,
                              min_new_tokens=None if args.natural else new, eos_token_id=stops, pad_token_id=stops[0])
        found = out[:, width:].tolist()
        ends = [next((i + 1 for i, t in enumerate(r) if args.natural and t in chat.stops), len(r)) for r in found]
        replies["theirs"] = [r[:end] for r, end in zip(found, ends)]

    times = interleaved({"transformers.generate": run_theirs, "PersonaFuse": run_ours}, args.rounds, device)
    lengths, same = [len(r) for r in replies["ours"]], sum(a == b for a, b in zip(*replies.values()))
    table(f"{Path(folder).name}, {rows} prompts of {min(map(len, prompts))} to {width} tokens, replies of {min(lengths)} to "
          f"{max(lengths)}; {same} of {rows} equal", times, sum(lengths), work={
              "PersonaFuse": max(lengths) * token_bytes(ours)}, rate=args.bandwidth)


# ----------------------------------------------------------------------------------------------------------------------
# router

def folders(args, n):
    """The first n of --weights. UserError if there are fewer."""
    if len(args.weights or ()) < n:
        raise UserError(f"{args.what} needs --weights with {n} model folder{'s: base, encoder' if n > 1 else ''}")
    return args.weights[:n]


def queries(args, n):
    """n queries as items: those of --queries, over again where they don't suffice, else the template teacher's."""
    items = read_queries(args.queries)[0] if args.queries else template_records("train", n)
    return [items[i % len(items)] for i in range(n)]


def query_rows(config, args, n):
    """n Examples with queries: random ids of real queries' lengths (--queries, with the tokenizer of --weights) or of
    lengths drawn log-normally, median 60 tokens, sigma 0.7."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(60), 0.7, n), 4, MAX_QUERY_TOKENS).astype(int)
    if args.queries:
        tokenizer = load_tokenizer(folders(args, 1)[0])
        every = [len(query_ids(tokenizer, item["query"])) for item in read_queries(args.queries)[0]]
        lengths = rng.choice(every, n, replace=n > len(every))
    return [Example(str(i), torch.eye(len(EXPERTS))[rng.integers(len(EXPERTS))],
                    query=rng.integers(config.vocab_size, size=length)) for i, length in enumerate(lengths)]


def router(args):
    """The router stage over the same queries in batches of --batch: train.py's, of similar length and cut into
    micro-batches, and random ones padded to their longest row. Parameters and optimiser are shared by both."""
    config = shape(args, "Qwen2.5-0.5B", whole_head=True)
    rows, batch = query_rows(config, args, (args.steps or 4) * (args.batch or 16)), args.batch or 16
    task, _ = stage("router", config, args)
    ours, theirs = task.router, reference(config, args).model
    for name, parameter in ours.encoder.named_parameters():
        owner, _, leaf = name.removeprefix("model.").rpartition(".")
        setattr(theirs.get_submodule(owner), leaf, parameter)
    order, rng = batches([cost(row) for row in rows], batch, 0), np.random.default_rng(0)

    def run_ours():
        for _ in range(len(rows) // batch):
            task.step([rows[i] for i in next(order)])

    def run_theirs():
        for part in rng.permutation(len(rows)).reshape(-1, batch):
            ids, lengths = pad([rows[i].query for i in part], args.device)
            mask = torch.arange(ids.shape[1], device=args.device) < lengths[:, None]
            with task.autocast:
                hidden = theirs(input_ids=ids, attention_mask=mask.long()).last_hidden_state
                similarity = ours.similarity(hidden[torch.arange(len(part)), lengths - 1])
                loss = contrastive_loss(similarity, torch.stack([rows[i].active for i in part]), task.s.contrastive_tau)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(task.parameters(), task.s.clip)
            task.optimizer.step()
            task.optimizer.zero_grad()

    lengths = [cost(row) for row in rows]
    runs = {"transformers, random padded batches": run_theirs, "PersonaFuse, router stage": run_ours}
    table(f"Router stage, {len(rows)} queries of {min(lengths)} to {max(lengths)} tokens (median "
          f"{statistics.median(lengths):.0f}), {batch} a step", interleaved(runs, args.rounds, args.device), sum(lengths),
          work=dict.fromkeys(runs, step_flops(config, lengths, 0, 0, frozen=False)), rate=args.flops)


def stage(name, config, args, encoder=None, tokens=2048):
    """A stage's Task with a model of `config` (the router's encoder, for "router") -> (task, the models in it)."""
    s = SimpleNamespace(lr=1e-4, router_lr=1e-5, tokens=tokens, clip=1.0, lam=0.1, contrastive_tau=0.07,
                        joint_gate="learned", batch=0)
    model = None if name == "router" else fresh(config, args)
    if model is not None:
        with_experts(model)
    route = None
    if name != "warmup":
        route = Router(fresh(config if name == "router" else encoder, args, torch.float32)).to(args.device)
    return Task(name, model, route, s), [m for m in (model, route and route.encoder) if m is not None]


# ----------------------------------------------------------------------------------------------------------------------
# memory

def saved_bytes(model, run):
    """Bytes that autograd keeps for the backward pass of run(), parameters not counted; each storage once."""
    own, kept = {p.data_ptr() for p in model.parameters()}, {}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = run()  # alive until all is counted, so that no address is used twice
    del loss
    return sum(kept.values())


class Sizes(TorchDispatchMode):
    """Collects the shape, bytes and origin of every tensor that an operation newly allocates."""

    def __init__(self):
        super().__init__()
        self.found = []  # (bytes, shape, operation)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in args if isinstance(t, torch.Tensor)}
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in given:
                self.found.append((t.numel() * t.element_size(), tuple(t.shape), func.__name__))
        return out


def memory(args):
    """What ten experts add to what is saved for backward, and the largest tensors of a step."""
    config = shape(args, whole_head=True)
    model, rows, length = fresh(config, args).requires_grad_(False), args.batch or 4, args.length or 128
    batch, tokens, state = rows_of(config, rows, length), rows * length, model.state_dict()
    saved = {}
    for n_experts in (0, 1, 10):  # 0: gradients through the frozen model, to the embeddings
        with torch.device("meta"):
            model = Transformer(config)
        model.load_state_dict(state, assign=True)
        model.requires_grad_(False)
        parameters = with_experts(model, n_experts) if n_experts else []
        gate = gates(rows, args.device, n_experts).requires_grad_() if n_experts else None
        hook = model.model.embed_tokens.register_forward_hook(lambda module, given, out: out.requires_grad_())
        saved[n_experts] = saved_bytes(model, lambda: row_losses(model, batch, gate))
        hook.remove()
    run = our_step(model, batch, torch.optim.AdamW(parameters, fused=True), gate)
    run()
    most, largest = peak(run, args.device)
    with Sizes() as sizes:
        run()
    held = sum(t.nbytes for t in state.values()) + 3 * sum(p.nbytes for p in parameters)  # and two moments
    show(f"Saved for backward, {rows} x {length} tokens",
         ["", "MB", "share of the step's peak", "with weights"],
         [[name, f"{size / 1e6:,.1f}", f"{size / most:.1%}", f"{size / (most + held):.1%}"] for name, size in (
             ("by the frozen model", saved[0]), ("one expert adds", saved[1] - saved[0]),
             ("nine more experts add", saved[10] - saved[1]), ("ten experts add", saved[10] - saved[0]),
             ("peak of a step, above weights and moments", most))])
    # what a naive formulation would allocate: logits of all positions, each expert's own output
    forbidden = {tokens * config.vocab_size, *(tokens * 10 * width for pair in linears(config) for width in pair)}
    unlike = sorted({(size, f"{list(dims)}", op) for size, dims, op in sizes.found}, reverse=True)[:6]
    note = "" if largest is None else f"; the profiler's largest allocation is {largest / 1e6:,.1f} MB"
    show(f"The largest tensors of a step{note}", ["tensor", "MB", "made by"],
         [[dims, f"{size / 1e6:,.1f}", op] for size, dims, op in unlike])
    found = [dims for _, dims, _ in sizes.found if np.prod(dims, dtype=int) in forbidden]
    print(f"\n  of tokens x vocabulary ({tokens:,} x {config.vocab_size:,}) or tokens x experts x width: "
          f"{len(found)} of {len(sizes.found):,} tensors {' '.join(map(str, found[:3]))}")


# ----------------------------------------------------------------------------------------------------------------------
# load, data: in processes of their own, so that peak memory is true

def read(args):
    """The files' bytes, once."""
    return sum(len(file.read_bytes()) for folder in args.weights for file in weight_files(folder))


def setup_of(args):
    base, encoder = folders(args, 2)
    return Setup(Path("none"), "small", base, encoder, None, args.device, args.dtype, 0, 1.0, 8, 16.0, 2048, 100)


def ours(args):
    """Both models, as train.py --stage joint --preset small loads them -> their bytes."""
    setup = setup_of(args)
    loaded = setup.load_base(), setup.load_router()
    return sum(p.nbytes for model in loaded for p in model.parameters())


def theirs(args):
    from transformers import AutoModelForCausalLM
    loaded = [AutoModelForCausalLM.from_pretrained(folder, dtype=args.dtype) for folder in args.weights]
    return sum(p.nbytes for model in loaded for p in model.parameters())


def measured(what):
    """-> a command that does it and prints seconds, peak memory above the start, and what it returned."""
    def run(args):
        if what is theirs:
            from transformers import AutoModelForCausalLM  # noqa: F401 (importing is not loading)
        before, began = resident(), time.perf_counter()
        size = what(args)
        print(json.dumps({"seconds": time.perf_counter() - began, "peak": resident("VmHWM") - before, "size": size}))
    return run


def load(args):
    """Start-up of --preset small: both models in memory, beside reading their files once (from the page cache)."""
    given = ["--weights", *folders(args, 2), "--dtype", str(args.dtype).removeprefix("torch.")]
    kinds = {"reading the files once": "child-read", f"PersonaFuse, {given[-1]}": "child-ours",
             f"transformers, {given[-1]}": "child-theirs"}
    found = {name: [] for name in kinds}
    for turn in range(args.rounds + 1):
        for name, what in kinds.items():
            one = child(what, *given)
            found[name] += [one] if turn else []
    table("Loading both models of --preset small", {n: [one["seconds"] for one in all] for n, all in found.items()})
    show("Memory of it", ["", "bytes of result", "peak above the start", "ratio"],
         [[name, f"{all[0]['size'] / 1e9:.2f} GB", f"{(most := max(one['peak'] for one in all)) / 1e9:.2f} GB",
           f"{most / all[0]['size']:.2f}"] for name, all in found.items()])


def data_path(args):
    """Records to padded micro-batches of one epoch, as train.py's warm-up does it; prints seconds and peak memory."""
    setup, marks = setup_of(args), [time.perf_counter()]
    records = read_records(args.records)
    marks.append(time.perf_counter())
    rows, _ = examples(records, Chat.from_dir(setup.base), load_tokenizer(setup.encoder), setup.tokens)
    marks.append(time.perf_counter())
    rows = per_pole(rows)
    order, steps, padded = batches([cost(row) for row in rows], 64, 0), len(rows) // 64, 0
    for _ in range(steps):
        for group in micro_batches([rows[i] for i in next(order)], setup.tokens):
            padded += pad([row.ids for row in group])[0].numel() + pad([row.query for row in group])[0].numel()
    marks.append(time.perf_counter())
    print(json.dumps({"seconds": np.diff(marks).tolist(), "peak": resident("VmHWM"), "rows": len(rows),
                      "tokens": int(sum(len(row.ids) + len(row.query) for row in rows)), "padded": padded}))


def data(args):
    """The data path against the number of records: reading, tokenising for both models, an epoch of batches."""
    given, rows = ["--weights", *folders(args, 2)], []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "records.jsonl"
        for count in (args.count // 10, args.count):
            write_records(file, template_records("train", count))
            found = child("child-data", *given, "--records", file)
            rows.append([f"{count:,} records", *(f"{s:.1f} s" for s in (*found["seconds"], sum(found["seconds"]))),
                         f"{found['peak'] / 1e9:.2f} GB"])
    show("The data path, one process", ["", "reading", "tokenising", "batching", "together", "peak memory"], rows)


# ----------------------------------------------------------------------------------------------------------------------
# growth

GROWTH = {"experts": (1, 2, 5, 10, 20, 40), "rank": (1, 4, 8, 16, 32, 64), "tokens a row": (32, 64, 128, 256, 512),
          "rows": (1, 2, 4, 8, 16)}


def growth(args):
    """Step time and memory against one size at a time; the others are 10 experts, rank 8, 128 tokens, 4 rows."""
    config = shape(args)
    state = fresh(config, args).state_dict()
    runs, most = {}, {}
    for what, values in GROWTH.items():
        for value in values:
            sizes = {"experts": 10, "rank": 8, "tokens a row": 128, "rows": 4} | {what: value}
            with torch.device("meta"):
                model = Transformer(config)
            model.load_state_dict(state, assign=True)
            optimizer = torch.optim.AdamW(with_experts(model, sizes["experts"], sizes["rank"]), fused=True)
            runs[what, value] = our_step(model, rows_of(config, sizes["rows"], sizes["tokens a row"]), optimizer,
                                         gates(sizes["rows"], args.device, sizes["experts"]))
            runs[what, value]()
            most[what, value] = peak(runs[what, value], args.device)[0]
    times = interleaved(runs, args.rounds, args.device)
    middle = {key: statistics.median(found) for key, found in times.items()}
    show(f"A step's time and memory above weights and moments, {config.n_layers} layers", ["", "", "median", "min to max", "peak"],
         [[what, str(value), f"{middle[what, value] * 1e3:,.0f} ms", f"{min(found) * 1e3:,.0f} to {max(found) * 1e3:,.0f}",
           f"{most[what, value] / 1e6:,.0f} MB"] for (what, value), found in times.items()])
    if args.out:
        plot(middle, times, most, args.out)


def plot(middle, times, most, file):
    """Time above, memory below, one column a size; colours that the colour-blind can tell apart, and two markers."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(2, len(GROWTH), figsize=(12, 5.5), sharex="col", sharey="row", layout="constrained")
    for column, (what, values) in enumerate(GROWTH.items()):
        time_axis, memory_axis = axes[:, column]
        times_ms = np.array([[f(times[what, v]) * 1e3 for v in values] for f in (min, statistics.median, max)])
        time_axis.errorbar(values, times_ms[1], [times_ms[1] - times_ms[0], times_ms[2] - times_ms[1]], color="#0072B2",
                           marker="o", capsize=3)
        memory_axis.plot(values, [most[what, v] / 1e6 for v in values], color="#D55E00", marker="s", linestyle="--")
        memory_axis.set_xscale("log", base=2)
        memory_axis.set_xticks(values, [str(v) for v in values])
        memory_axis.minorticks_off()
        memory_axis.set_xlabel(what)
        for axis in (time_axis, memory_axis):
            axis.grid(alpha=0.3)
            axis.set_ylim(bottom=0)
    axes[0, 0].set_ylabel("step, ms (min, median, max)")
    axes[1, 0].set_ylabel("peak above weights, MB")
    figure.savefig(file, dpi=120)
    print(f"\n{file}")


# ----------------------------------------------------------------------------------------------------------------------
# gpu

def gpu(args):
    """The 8B's true shape with random weights: the three stages with and without recomputation and compilation, and
    decoding against the bandwidth."""
    config, encoder = shape(args, "Llama-3.1-8B"), CONFIGS["Qwen2.5-0.5B"]
    encoder = replace(encoder, n_layers=min(args.layers or encoder.n_layers, encoder.n_layers))
    on_gpu, budget, rows = args.device.type == "cuda", args.tokens, []
    for name in ("warmup", "router", "joint"):
        task, models = stage(name, encoder if name == "router" else config, args, encoder, budget)
        for length in (2048, 512) if not args.length else (args.length,):
            batch = whole_rows(name, config, encoder, 4 * budget // length, length)
            real = sum(len(row.ids) * (name != "router") + len(row.query) * (name != "warmup") for row in batch)
            for recompute, compiled in ((False, False), (True, False), (False, True), (True, True)):
                for model in models:
                    model.recompute = recompute
                    compile_blocks(model, compiled)
                cells = [name, f"{length}", "yes" if recompute else "no", "yes" if compiled else "no"]
                run = partial(task.step, batch)
                try:
                    run()  # makes moments and kernels
                    held = torch.cuda.memory_allocated(args.device) if on_gpu else 0
                    most = peak(run, args.device)[0] + held
                    times = interleaved({"": run}, args.rounds, args.device)[""]
                    cells += [f"{real / statistics.median(times):,.0f}", f"{min(times):.2f} to {max(times):.2f}",
                              f"{most / 1e9:.1f}"]
                except torch.OutOfMemoryError:
                    cells += ["out of memory", "", ""]
                    torch.cuda.empty_cache()
                rows.append(cells)
                print(*cells, sep="  ", file=sys.stderr, flush=True)
        del run, task, models, model  # the next stage needs the memory
    note = "" if on_gpu else "; on a CPU, without weights"
    show(f"Training, {budget:,} tokens a micro-batch, 4 of them a step; peak in GB{note}",
         ["stage", "row", "recompute", "compile", "tokens/s", "s a step", "peak"], rows)
    model = fresh(config, args)
    with_experts(model)
    new, runs = args.steps or 128, {}
    for compiled in (False, True):
        compile_blocks(model, compiled)
        for n in (1, args.batch or 16):
            prompts, gate = torch.randint(3, config.vocab_size, (n, 64)).tolist(), gates(n, args.device)
            runs = {f"batch {n}, no experts": lambda: generate(model, prompts, None, new),
                    f"batch {n}, {n} gates": lambda: generate(model, prompts, gate, new)}
            table(f"Decoding, {new} tokens, {'compiled' if compiled else 'as written'}",
                  interleaved(runs, args.rounds, args.device), n * new,
                  work={k: new * token_bytes(model, "gates" in k) for k in runs}, rate=args.bandwidth)


def whole_rows(name, config, encoder, rows, length):
    """Rows of `length` tokens, a third of them prompt; the router reads a quarter as many."""
    batch = rows_of(config, rows, length - 1, length // 3)
    for i, row in enumerate(batch):
        row.active, row.expert = torch.eye(len(EXPERTS))[i % len(EXPERTS)], i % len(EXPERTS) if name == "warmup" else None
        if name != "warmup":
            row.query = np.random.default_rng(i).integers(encoder.vocab_size, size=length // 4)
        row.ids = None if name == "router" else row.ids
    return batch


def compile_blocks(model, compiled):
    for block in model.model.layers:
        block._compiled_call_impl = None
        if compiled:
            block.compile(dynamic=True)


COMMANDS = {"step": step, "generate": decode, "teacher": teacher, "router": router, "memory": memory, "load": load,
            "data": data, "growth": growth, "gpu": gpu}
CHILDREN = {"child-read": measured(read), "child-ours": measured(ours), "child-theirs": measured(theirs),
            "child-data": data_path}
NO_CEILING = ("load", "data", "memory", "growth", *CHILDREN)


def main(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("what", choices=[*COMMANDS, *CHILDREN], metavar="{" + ",".join(COMMANDS) + "}")
    parser.add_argument("--weights", nargs="+", metavar="FOLDER", help="model folders; else random weights")
    parser.add_argument("--shape", choices=CONFIGS, help="SmolLM2-135M; router: Qwen2.5-0.5B; gpu: Llama-3.1-8B")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--batch", type=int, help="rows; generate: in its second table")
    parser.add_argument("--length", type=int, help="tokens a row")
    parser.add_argument("--steps", type=int, help="new tokens of generate, teacher and gpu; steps a round of router")
    parser.add_argument("--tokens", type=int, default=PRESETS["paper"]["tokens"], help="gpu: tokens a micro-batch")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--natural", action="store_true", help="teacher: replies end where they end")
    parser.add_argument("--queries", help="router, teacher: a file of real queries, .txt, .jsonl or .csv")
    parser.add_argument("--count", type=int, default=100_000, help="data: records")
    parser.add_argument("--records", help=argparse.SUPPRESS)
    parser.add_argument("--out", help="growth: a PNG file for the plot")
    parser.add_argument("--device", help="cpu (the default; gpu: cuda), cuda or cuda:N")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="float32 on a CPU, bfloat16 on a GPU")
    args = parser.parse_args(argv)
    if args.what == "gpu" and not args.device and not torch.cuda.is_available():
        raise UserError("gpu needs a CUDA GPU, and there is none here; --device cpu --layers 1 --tokens 512 --length 128 "
                        "only tries the code")
    args.device = pick_device(args.device or ("cuda" if args.what == "gpu" else "cpu"))
    args.dtype = pick_dtype(args.dtype, args.device)
    if args.what not in CHILDREN:
        print(f"{torch.cuda.get_device_name(args.device) if args.device.type == 'cuda' else 'CPU'}, "
              f"{torch.get_num_threads()} threads, {str(args.dtype).removeprefix('torch.')}", end="")
        if args.what not in NO_CEILING:
            args.flops, args.bandwidth = ceiling(args.device, args.dtype)
            print(f": at most {args.flops / 1e9:,.0f} GFLOP/s in matrix products, {args.bandwidth / 1e9:.1f} GB/s from "
                  "memory", end="")
        print(flush=True)
    (COMMANDS | CHILDREN)[args.what](args)


if __name__ == "__main__":
    run_command(main)
