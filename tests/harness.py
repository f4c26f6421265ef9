"""What bench.py, true_shape.py and tests share: runs that take turns, the machine's limits, a plan that ends in time,
peak memory, and the same weights in two models."""
import functools
import gc
import os
import signal
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from lora import add_experts, expert_layers
from model import CONFIGS, Config, Linear, Transformer
from router import Router
from support.files import UserError
from support.int8 import quantise
from support.rows import Row
from support.tables import print_table
from train import Stage, row_losses


# ----------------------------------------------------------------------------------------------------------------------
# Time

def wait(device):
    """Wait until the GPU has finished what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleaved(runs, rounds, device=torch.device("cpu")):
    """Run {name: function} in turns, A B A B …. Returns {name: seconds of each round} without the first round."""
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


def print_times(title, times, tokens=None, work=None, rate=1.0):
    """Print a row for each name of `times`: the median, and the ratio to the first name's time in the same round.

    Ratios are medians, with the middle half of the rounds in brackets. tokens: of one run, for a column of tokens/s.
    work: {name: FLOPs or bytes of one run}, for a column with its share of `rate`, what the machine can do a second.
    """
    first, rows = next(iter(times.values())), []
    for name, seconds in times.items():
        ratios, median = sorted(t / f for t, f in zip(seconds, first)), statistics.median(seconds)
        quarter = len(ratios) // 4
        row = [name, f"{median * 1e3:,.0f} ms",
               f"{statistics.median(ratios):.2f} [{ratios[quarter]:.2f}, {ratios[-1 - quarter]:.2f}]"]
        if tokens:
            row.append(f"{tokens / median:,.1f}")
        if work:
            row.append(f"{work[name] / median / rate:.0%}" if name in work else "")
        rows.append(row)
    head = ["", "median", "ratio [half]"] + ["tokens/s"] * bool(tokens) + ["ceiling"] * bool(work)
    print_table(head, rows, title)


@functools.cache
def ceiling(device, dtype):
    """Returns what this machine can do: FLOP/s in matrix products and bytes/s from memory, the best of ten tries."""
    n = 2048 if device.type == "cpu" else 8192
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    big = torch.ones((1 << 28) // 4 if device.type == "cpu" else 1 << 30, device=device)
    times = interleaved({"product": lambda: a @ b, "sum": lambda: big.sum()}, 10, device)
    return 2 * n ** 3 / min(times["product"]), big.nbytes / min(times["sum"])


@contextmanager
def in_another_process(make, *args):
    """Call make(*args) in a fresh process, and yield a function that calls there what it returned.

    For runs that take turns but need different settings of the process, such as what malloc does with freed memory.
    """
    with ProcessPoolExecutor(1, get_context("spawn"), prepare, (make, *args)) as pool:
        yield lambda *which: pool.submit(run_prepared, *which).result()


def prepare(make, *args):
    global prepared
    prepared = make(*args)


def run_prepared(*which):
    prepared(*which)


# ----------------------------------------------------------------------------------------------------------------------
# A plan with an end: steps in a process that can be stopped

class Worker:
    """A process that calls one function after another and can be stopped meanwhile, with the compilers it started."""

    def __init__(self):
        context = get_context("spawn")  # a forked process could not use the GPU
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=work, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()

    def run(self, function, seconds):
        """Call function() there. Returns what went wrong, in one line or None, and whether the worker is as good as
        new."""
        try:
            self.connection.send(function)
            if not self.connection.poll(seconds):
                return f"stopped after {seconds:.0f} s", False
            return self.connection.recv()
        except (EOFError, OSError):
            self.process.join(1)
            return f"the process ended by itself, with status {self.process.exitcode}", False

    def stop(self):
        self.process.kill()
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.join(5)  # one that hangs in the GPU's driver is left behind


def work(connection):
    """What a Worker's process does."""
    os.setpgid(0, 0)
    torch.set_float32_matmul_precision("highest")  # some images choose TF32 by an environment variable
    while True:
        answer = None, True
        try:
            connection.recv()()
        except EOFError:  # the program that started this process has ended
            return
        except UserError as error:
            answer = str(error), True
        except ModuleNotFoundError as error:
            answer = f"{error.name} is not installed here", True
        except torch.OutOfMemoryError as error:
            answer = f"the GPU's memory is full ({' '.join(str(error).split())[:200]})", True
        except Exception as error:  # one of CUDA's may leave the GPU unusable in this process
            answer = " ".join(f"{type(error).__name__}: {error}".split())[:300], False
        sys.stdout.flush()
        gc.collect()
        if answer[1] and torch.cuda.is_initialized():  # else it would raise that error again
            torch.cuda.empty_cache()
        connection.send(answer)


LEAST = 10  # seconds below which no step is begun: a process needs about as many to start
ENOUGH = 30  # seconds that a step may take even if they are more than half of what is left


def run_plan(plan, minutes, start=Worker, clock=time.monotonic):
    """Call the functions of plan, {title: function}, one after the other, and end after so many minutes at the latest.

    A step may take half of the time that is left, so that one that hangs does not take all, or ENOUGH. Steps for which
    no time is left are listed as not measured.
    """
    end, worker = clock() + 60 * minutes, None
    try:
        for title, function in plan.items():
            left = end - clock()
            if left < LEAST:
                print(f"{title}: not measured, the time is up")
                continue
            print(f"{title} (at {60 * minutes - left:.0f} s)", flush=True)
            worker = worker or start()
            problem, usable = worker.run(function, min(left, max(left / 2, ENOUGH)))
            if problem:
                print(f"  not measured: {problem}", flush=True)
            if not usable:
                worker.stop()
                worker = None
    finally:
        if worker is not None:
            worker.stop()


# ----------------------------------------------------------------------------------------------------------------------
# Memory

def peak(run, device):
    """Call run(). Returns the most bytes that were allocated at once, beyond those before, and the bytes of the largest
    allocation, which is None on a GPU."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before, None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]  # negative where memory is freed
    return int(np.cumsum(sizes).max()), max(sizes)


def saved_bytes(parameters, run):
    """Returns the bytes that autograd saves for the backward pass of run(), without `parameters`. Each storage counts
    once."""
    own, saved = {p.untyped_storage().data_ptr() for p in parameters}, {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = run()  # alive until everything is counted, so that no address is used twice
    del output
    return sum(saved.values())


def alone(function, *args, ready=None, measure=None):
    """Call function(*args) in a fresh process, after ready(). Returns its result, or measure(result), its seconds and
    its peak memory in bytes beyond that at its start (on Linux). The result is freed after the clock has stopped."""
    with ProcessPoolExecutor(1, get_context("spawn"), ready) as pool:
        return pool.submit(measured, measure, function, *args).result()


def measured(measure, function, *args):
    def memory(field):
        return int(Path("/proc/self/status").read_text().split(field)[1].split()[0]) * 1024
    before, began = memory("VmRSS:"), time.perf_counter()
    result = function(*args)
    seconds = time.perf_counter() - began
    return measure(result) if measure else result, seconds, memory("VmHWM:") - before


# ----------------------------------------------------------------------------------------------------------------------
# The least work that a step and a token take

def linears(config):
    """Returns (in, out) of the seven linear layers of a block."""
    c, heads, kv = config, config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
    return [(c.dim, heads), *[(c.dim, kv)] * 2, (heads, c.dim), *[(c.dim, c.hidden_dim)] * 2, (c.hidden_dim, c.dim)]


def step_flops(config, lengths, supervised, experts=10, rank=8, frozen=True, head=True):
    """Returns the FLOPs of a training step over rows of these lengths.

    A weight takes 2 per token forward, 2 backward for its input and, unless it is frozen, 2 for its gradient. Causal
    attention is 2 products forward and 5 backward. The last layer's MLP and the head work on `supervised` positions.
    """
    c, tokens = config, sum(lengths)

    def per_token(shapes):
        return sum((4 if frozen else 6) * i * o + 6 * (i + o) * experts * rank for i, o in shapes)
    attention = 7 * c.n_layers * c.n_heads * c.head_dim * sum(length**2 for length in lengths)
    return (c.n_layers * per_token(linears(c)) * tokens - per_token(linears(c)[4:]) * (tokens - supervised) + attention
            + head * 4 * c.vocab_size * c.dim * supervised)


def token_bytes(model, experts=True):
    """Returns the bytes of weights that are read to decode one token of each row."""
    read = sum(p.nbytes for name, p in model.named_parameters() if ".layers." in name
               and (experts or not name.endswith((".A", ".B"))))
    return read + model.head_weight.nbytes


# ----------------------------------------------------------------------------------------------------------------------
# Models and batches

STRETCHED = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
             "original_max_position_embeddings": 64}  # far below 512 tokens, so that every part of the formula matters
SMALL = {  # vocab, dim, layers, heads, kv heads, d, hidden, eps, theta
    "Llama-3.1": Config(320, 96, 2, 4, 2, 32, 160, 1e-5, 5e5, STRETCHED),
    "Llama-3.2": Config(352, 128, 2, 8, 2, 64, 192, 1e-5, 5e5, STRETCHED | {"factor": 32.0}, tied=True),
    "SmolLM2": Config(320, 144, 2, 9, 3, 32, 208, 1e-5, 1e5, tied=True),
    "Qwen2.5": Config(384, 112, 2, 6, 2, 32, 176, 1e-6, 1e6, qkv_bias=True, tied=True),
}


def shape(args, default="SmolLM2-135M", whole_head=False):
    """Returns the Config that the options name.

    With fewer layers the vocabulary shrinks in proportion, so that the head keeps its share, unless whole_head.
    """
    config = Config.from_dir(args.weights[0]) if args.weights else CONFIGS[args.shape or default]
    if not args.layers:
        return config
    vocabulary = config.vocab_size if whole_head else config.vocab_size * args.layers // config.n_layers // 64 * 64
    return replace(config, n_layers=args.layers, vocab_size=vocabulary)


def fresh(config, args, dtype=None, int8=None):
    """Returns the model in --weights, or one of this shape with random weights; with --layers always the latter.

    int8: None for --int8.
    """
    int8 = args.int8 if int8 is None else int8
    if args.weights and not args.layers:
        return Transformer.from_pretrained(args.weights[0], dtype or args.dtype, args.device, int8=int8)
    torch.manual_seed(0)
    torch.set_default_dtype(dtype or args.dtype)
    try:
        with args.device:
            model = Transformer(config)
    finally:
        torch.set_default_dtype(torch.float32)
    return in_8_bits(model) if int8 else model


def in_8_bits(model):
    """Quantise the linear layers of a model that has its weights already."""
    for layer in model.modules():
        if isinstance(layer, Linear):
            layer.set_int8(*quantise(layer.weight.detach()))
    return model


def with_weights(config, state):
    """Returns another Transformer that shares the tensors of a state dict."""
    with torch.device("meta"):
        model = Transformer(config)
    for name, layer in model.named_modules():
        if f"{name}.weight_scale" in state:
            layer.set_int8(state[f"{name}.weight"], state[f"{name}.weight_scale"])
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(False)


def published(config):
    """A Config as the contents of config.json, in the style of published models."""
    return {
        "model_type": "qwen2" if config.qkv_bias else "llama", "hidden_act": "silu", "vocab_size": config.vocab_size,
        "hidden_size": config.dim, "intermediate_size": config.hidden_dim, "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads, "num_key_value_heads": config.n_kv_heads, "head_dim": config.head_dim,
        "rms_norm_eps": config.norm_eps, "max_position_embeddings": 2048, "tie_word_embeddings": config.tied,
        "bos_token_id": None, "eos_token_id": None, "rope_theta": config.rope_theta,
        "rope_scaling": config.rope_scaling}


def reference(config, args):
    """Returns a model of `transformers` of this shape."""
    import transformers
    settings = transformers.AutoConfig.for_model(**published(config) | {"max_position_embeddings": 8192})
    with args.device:  # an 8B would take minutes on the CPU
        return transformers.AutoModelForCausalLM.from_config(settings, dtype=args.dtype)


@torch.no_grad()
def randomise(model, seed=0):
    """Make every parameter random and large enough to matter. Embeddings are small, as trained ones are, so that eps
    matters, too."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in sorted(model.named_parameters()):
        noise = torch.randn(p.shape, generator=generator)
        if name.endswith("norm.weight"):
            p.copy_(1 + noise / 2)
        elif "embed_tokens" in name:
            p.copy_(noise / 50)
        else:
            p.copy_(noise if p.dim() == 1 else noise * (0.5 if "lm_head" in name else 1.5) / p.shape[1] ** 0.5)
    return model


def pair(args):
    """Returns our model and that of `transformers`, which share their weights. With --int8, only ours is in 8 bits."""
    config = shape(args)
    ours, theirs = fresh(config, args, int8=False), reference(config, args)
    theirs.load_state_dict(ours.state_dict(), strict=False, assign=True)
    theirs.tie_weights()
    theirs.generation_config.eos_token_id = theirs.generation_config.pad_token_id = None
    return in_8_bits(ours) if args.int8 else ours, theirs.eval()


def with_experts(model, n_experts=10, rank=8):
    """Add experts whose B is random, as if they had been trained. Returns the trainable parameters."""
    parameters = add_experts(model, n_experts, rank, 2 * rank)
    for layer in expert_layers(model).values():
        torch.nn.init.normal_(layer.B, std=0.01)
    return parameters


def gates(n, device, n_experts=10):
    return torch.randn(n, n_experts, device=device).softmax(-1)


def rows_of(config, rows, length, prompt=1):
    """Returns Rows of random ids: `length` tokens are predicted, of which the first `prompt` − 1 are not supervised."""
    ids = torch.randint(config.vocab_size, (rows, length + 1), generator=torch.Generator().manual_seed(0))
    return [Row(str(i), None, row.numpy(), prompt) for i, row in enumerate(ids)]


def our_step(model, batch, optimizer, gate):
    """Returns a function that makes a training step of the mixture under a given gate, with train.py's loss."""
    tokens = sum(len(row.ids) - row.n_prompt for row in batch)

    def run():
        (row_losses(model, batch, gate).sum() / tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
    return run


def stage(name, config, args, encoder=None, tokens=2048):
    """Returns train.py's Stage with a model of `config` (for "router": an encoder), and the Transformers in it."""
    s = SimpleNamespace(lr=1e-4, router_lr=1e-5, tokens=tokens, clip=1.0, lam=0.1, contrastive_tau=0.07,
                        joint_gate="learned", frozen_layers=0, batch=0, dtype=str(args.dtype).removeprefix("torch."))
    model = None if name == "router" else fresh(config, args)
    if model is not None:
        with_experts(model)
    route = None
    if name != "warmup":
        route = Router(fresh(config if name == "router" else encoder, args, torch.float32, int8=False))
    return Stage(name, model, route, s), [m for m in (model, route and route.encoder) if m is not None]
