"""What bench.py's tables are made with: interleaved runs, the machine's ceiling, peaks of memory, the least that a step
and a token cost, and the same weights in our model and in that of `transformers`.
"""
import gc
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from lora import add_experts, expert_layers
from model import CONFIGS, Config, Transformer
from router import Router
from support.rows import Row
from train import Stage, row_losses


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


def table(title, times, amount=None, work=None, rate=1.0):
    """Print medians, and ratios of neighbours to the first name with their middle half. amount: tokens of a run, for
    tokens/s. work: {name: FLOPs or bytes of a run}, shown as a share of `rate`, the machine's ceiling."""
    first, rows = next(iter(times.values())), []
    for name, found in times.items():
        ratios, middle = sorted(t / f for t, f in zip(found, first)), statistics.median(found)
        q = len(ratios) // 4
        rows.append([name, f"{middle * 1e3:,.0f} ms",
                     f"{statistics.median(ratios):.2f} [{ratios[q]:.2f}, {ratios[-1 - q]:.2f}]",
                     *([f"{amount / middle:,.1f}"] if amount else []),
                     *([f"{work[name] / middle / rate:.0%}" if name in work else ""] if work else [])])
    show(title, ["", "median", "ratio [half]", *(["tokens/s"] if amount else []),
                 *(["ceiling"] if work else [])], rows)


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


def alone(function, *args, ready=None, measure=None):
    """function(*args) in a fresh process -> (its result, or measure(it), seconds, peak bytes above those at its
    start). The result is there until the clock has stopped, so that to free it is not counted."""
    with ProcessPoolExecutor(1, get_context("spawn"), ready) as pool:
        return pool.submit(timed, measure, function, *args).result()


@contextmanager
def elsewhere(make, *args):
    """make(*args) in a fresh process -> the function that it returned there, run there when it is called here. For runs
    that take turns, but have to differ in what a process has one of: how malloc treats what is freed."""
    with ProcessPoolExecutor(1, get_context("spawn"), prepare, (make, *args)) as pool:
        yield lambda *which: pool.submit(run_prepared, *which).result()


def prepare(make, *args):
    global prepared
    prepared = make(*args)


def run_prepared(*which):
    prepared(*which)


def timed(measure, function, *args):
    def resident(which):  # Linux
        return int(Path("/proc/self/status").read_text().split(which)[1].split()[0]) * 1024
    before, began = resident("VmRSS:"), time.perf_counter()
    result = function(*args)
    seconds = time.perf_counter() - began
    return measure(result) if measure else result, seconds, resident("VmHWM:") - before


# ----------------------------------------------------------------------------------------------------------------------
# What a step and a token cost at least

def linears(config):
    """(in, out) of the seven linear layers of a block."""
    c, heads, kv = config, config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    return [(c.dim, heads), *[(c.dim, kv)] * 2, (heads, c.dim), *[(c.dim, c.hidden_dim)] * 2, (c.hidden_dim, c.dim)]


def step_flops(config, lengths, wanted, experts=10, rank=8, frozen=True, head=True):
    """FLOPs of a training step over rows of these lengths: 2 for each weight and token forward, 2 backward for the
    input and, unless it is frozen, 2 for the weight; causal attention, 2 + 5. The last layer's MLP and the head work
    on the `wanted` positions only: those that a loss is computed from."""
    c, tokens = config, sum(lengths)

    def linear(shapes):  # per token
        return sum((4 if frozen else 6) * i * o + 6 * (i + o) * experts * rank for i, o in shapes)
    attention = 7 * c.n_layers * c.n_heads * c.head_dim * sum(length**2 for length in lengths)
    return (c.n_layers * linear(linears(c)) * tokens - linear(linears(c)[4:]) * (tokens - wanted) + attention
            + head * 4 * c.vocab_size * c.dim * wanted)


def token_bytes(model, experts=True):
    """Bytes of weights that decoding one token (of all rows at once) has to read."""
    read = sum(p.nbytes for name, p in model.named_parameters() if ".layers." in name
               and (experts or not name.endswith((".A", ".B"))))
    return read + model.head_weight.nbytes


# ----------------------------------------------------------------------------------------------------------------------
# The same weights, ours and theirs

def shape(args, default="SmolLM2-135M", whole_head=False):
    """The Config that is asked for. With fewer layers the vocabulary shrinks alike: the head keeps its share."""
    config = Config.from_dir(args.weights[0]) if args.weights else CONFIGS[args.shape or default]
    if not args.layers:
        return config
    vocabulary = config.vocab_size if whole_head else config.vocab_size * args.layers // config.n_layers // 64 * 64
    return replace(config, n_layers=args.layers, vocab_size=vocabulary)


def fresh(config, args, dtype=None):
    """A model with random weights, laid out on the device in its dtype, or the one in --weights, if it is whole."""
    if args.weights and not args.layers:
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
    return [Row(str(i), None, row.numpy(), prompt) for i, row in enumerate(ids)]


def our_step(model, batch, optimizer, gate):
    """A training step of the mixture as a function, without the router: through train.py's loss."""
    tokens = sum(len(row.ids) - row.prompt for row in batch)

    def run():
        (row_losses(model, batch, gate).sum() / tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
    return run


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
    return Stage(name, model, route, s), [m for m in (model, route and route.encoder) if m is not None]
