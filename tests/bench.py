"""Speed and memory beside `transformers` and `peft` with the same weights.

What is compared runs in turns (A B A B …), because on a busy machine the ratio of neighbouring runs is steadier than
the times. A table shows medians and the ratio to its first row: the median over the rounds, and in brackets the middle
half of them. "ceiling" is the share of what this machine can do, in matrix products or in bytes from memory, which is
measured first.

    python tests/bench.py step [--compile] [--int8]  # a training step beside peft, one adapter and ten
    python tests/bench.py profile [--compile]        # where the time of such a step goes
    python tests/bench.py generate [--compile]       # decoding beside transformers, and what experts cost in it
    python tests/bench.py teacher --weights weights/SmolLM2-135M-Instruct [--natural]
    python tests/bench.py router                     # the router stage beside a plain loop over padded batches
    python tests/bench.py memory                     # what experts save for backward; the largest tensors of a step
    python tests/bench.py memory --shape Llama-3.1-8B --layers 2 --length 64     # takes 8 GB
    python tests/bench.py load --weights weights/SmolLM2-135M-Instruct weights/Qwen2.5-0.5B
    python tests/bench.py data --weights weights/SmolLM2-135M-Instruct weights/Qwen2.5-0.5B
    python tests/bench.py growth --layers 8 --out growth.png
    python tests/bench.py gpu --minutes 8            # a GPU: correctness, then the 8B's shape; what matters first
    python tests/bench.py gpu --device cpu --shape SmolLM2-135M --layers 2 --minutes 2      # its rehearsal

Without --weights, models have random weights and the shape --shape. pytest does not collect this file.
"""
import argparse
import functools
import gc
import os
import statistics
import sys
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error", KINETO_LOG_LEVEL="99", PYTHONWARNINGS="ignore")
warnings.filterwarnings("ignore")

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import on_device
from harness import alone, ceiling, fresh, gates, in_another_process, interleaved, linears, our_step, pair, peak
from harness import print_times, reference, rows_of, run_plan, saved_bytes, shape, stage, step_flops, token_bytes
from harness import wait, with_experts, with_weights
from lora import EXPERTS, TARGETS, merged_tensors
from model import CONFIGS, Transformer, generate, pad
from router import MAX_QUERY_TOKENS, contrastive_loss, query_ids
from support.chat import Chat, load_tokenizer
from support.command import Parser, for_users, pick_device, pick_dtype, run_command
from support.compile import compile_decoding, compile_layers
from support.files import UserError
from support.process import keep_freed_memory
from support.records import read_queries, read_records, write_records
from support.rows import Row, batches, n_tokens, make_rows, micro_batches, rows_per_pole
from support.runs import PRESETS, Setup
from support.tables import print_table
from support.weights import weight_files
from synth import Synthesis, template_records
from train import row_losses


# ----------------------------------------------------------------------------------------------------------------------
# step, profile

def step(args):
    """A training step: forward, loss, backward, optimiser.

    Ours and peft's run in two processes, because train.py has malloc keep freed memory, which is a setting of the whole
    process, and peft is measured as a user finds it.
    """
    rows, length = args.batch, args.length
    mixture = "PersonaFuse, ten experts"
    full = argparse.Namespace(**vars(args) | {"int8": False})
    with in_another_process(our_steps, full) as ours, in_another_process(our_steps, args) as in_int8, \
            in_another_process(their_steps, full) as theirs:  # a process starts when it is first called
        for prompt, share in ((1, "all"), (length * 2 // 3 + 1, "a third")):
            runs = {mixture: partial(ours, prompt)}
            if args.compile:
                runs["the same, --compile"] = partial(ours, prompt, True)
            if args.int8:
                runs["the same, --int8"] = partial(in_int8, prompt)
            work = step_flops(shape(args), [length] * rows, rows * (length + 1 - prompt))
            print_times(f"Training step, {rows} x {length} tokens, {share} of them supervised",
                        interleaved({"peft, one adapter": partial(theirs, prompt)} | runs, args.rounds),
                        work=dict.fromkeys(runs, work), rate=args.flops)
        runs = {mixture: partial(ours, 1), "peft, ten adapters": partial(theirs, 1, len(EXPERTS))}
        print_times("The same, all supervised, beside ten adapters", interleaved(runs, max(1, args.rounds // 2)))


def our_steps(args):
    """Returns a function that makes a step of the mixture: (first supervised token, compiled or not)."""
    if args.device.type == "cpu":
        keep_freed_memory()
    model, rows, length = fresh(shape(args), args), args.batch, args.length
    optimizer = torch.optim.AdamW(with_experts(model), fused=True)
    gate = gates(rows, args.device).requires_grad_()
    model.recompute = args.recompute

    def run(prompt, compiled=False):
        compile_blocks(model, compiled)  # compiled code is found again
        with autocast(args):
            our_step(model, rows_of(model.config, rows, length, prompt), optimizer, gate)()
        wait(args.device)
    return run


def their_steps(args):
    """Returns a function that makes a step of peft: (first supervised token, number of adapters)."""
    import peft
    (ours, theirs), rows, length = pair(args), args.batch, args.length
    settings = peft.LoraConfig(r=8, lora_alpha=16, target_modules=list(TARGETS))
    model, config = peft.get_peft_model(theirs, settings, EXPERTS[0]), ours.config
    if args.recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()  # else transformers does not recompute

    @functools.cache
    def optimizer(adapters):
        for name in EXPERTS[len(model.peft_config):adapters]:
            model.add_adapter(name, settings)
        model.base_model.set_adapter(list(EXPERTS[:adapters]))
        return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)

    def run(prompt, adapters=1):
        adam, batch = optimizer(adapters), rows_of(config, rows, length, prompt)
        ids = torch.tensor(np.stack([row.ids[:-1] for row in batch]), device=args.device)  # as many positions as ours
        labels = ids.clone()
        labels[:, :prompt] = -100
        with autocast(args):
            model(input_ids=ids, labels=labels).loss.backward()
        adam.step()
        adam.zero_grad()
        wait(args.device)
    return run


def autocast(args):
    """In bf16, as train.py and the trainers of `transformers` compute."""
    return torch.autocast(args.device.type, torch.bfloat16, enabled=args.dtype == torch.bfloat16)


def profile(args, run=None):
    """Where the time of a training step, run(), goes, by PyTorch's profiler.

    Matrix products are told apart by whose weights they multiply. Between operations, Python works. On a GPU, the time
    of an operation is that of its kernels.
    """
    run = run or partial(our_steps(args), 1, args.compile)
    vocabulary, on_gpu = shape(args).vocab_size, args.device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * on_gpu
    found, wall = {}, 0.0  # {kind: [operations, seconds, FLOPs]}
    run()  # the first step is slower
    for _ in range(args.rounds):
        with torch.profiler.profile(activities=activities, record_shapes=True) as profiled:
            began = time.perf_counter()
            run()
            wall += time.perf_counter() - began
        for event in profiled.events():
            if event.device_type == torch.autograd.DeviceType.CPU:  # a kernel's time is its operation's, too
                kind, work = operation(event, vocabulary)
                microseconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
                more = event.name.startswith("aten::"), microseconds / 1e6, work
                found[kind] = [n + m for n, m in zip(found.get(kind, (0, 0, 0)), more)]
    found["between operations"] = [0, wall - sum(seconds for _, seconds, _ in found.values()), 0]
    cells = []
    for kind, (n, seconds, work) in sorted(found.items(), key=lambda item: -item[1][1]):
        rate = [f"{work / seconds / 1e9:,.0f}", f"{work / seconds / args.flops:.0%}"] if work and seconds else ["", ""]
        cells.append([kind, f"{n / args.rounds:,.0f}", f"{seconds / args.rounds * 1e3:,.0f}", f"{seconds / wall:.0%}",
                      *rate])
    print_table(["", "operations", "ms", "share", "GFLOP/s", "ceiling"], cells,
                f"A training step, {args.batch} x {args.length} tokens: {wall / args.rounds * 1e3:,.0f} ms, profiled")


def operation(event, vocabulary, width=8 * len(EXPERTS)):
    """Returns the kind of a profiler event, and its FLOPs if it is a matrix product. width: E·r.

    A product is recognised by its sizes, so a step must not have as many tokens as E·r or the vocabulary.
    """
    if event.name in ("aten::mm", "aten::addmm", "aten::addmm_"):
        (n, k), (_, m) = event.input_shapes[event.name != "aten::mm":][:2]
        whose = "the experts" if width in (n, k, m) else "the head" if vocabulary in (n, k, m) else "the frozen layers"
        return f"products with {whose}", 2 * n * k * m
    kinds = {"scaled_dot_product": "attention", "adamw": "the optimiser"}
    return next((kind for part, kind in kinds.items() if part in event.name), "all other operations"), 0


# ----------------------------------------------------------------------------------------------------------------------
# generate, teacher

def decode(args):
    """Greedy generation, and what experts cost in it."""
    ours, theirs = pair(args)
    with_experts(ours)
    new, length = args.steps, args.length
    for rows in (1, args.batch):
        ids = torch.randint(3, ours.config.vocab_size, (rows, length), device=args.device)
        prompts, gate = ids.tolist(), gates(rows, args.device)
        gated = f"{rows} gate{'s' * (rows > 1)}"
        runs = {"PersonaFuse, no experts": partial(generate, ours, prompts, None, new),
                "transformers.generate": partial(
                    theirs.generate, ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new,
                    do_sample=False),
                f"PersonaFuse, {gated}": partial(generate, ours, prompts, gate, new)}
        if rows == 1 and not args.int8:
            dense = with_weights(ours.config, dict(merged_tensors(ours, gate[0])))
            runs["merged for one gate"] = partial(generate, dense, prompts, None, new)
        if args.compile:
            runs |= decoding_compiled(ours, {"no experts": (prompts, None, new), gated: (prompts, gate, new)})
        work = {name: new * token_bytes(ours, gated in name) for name in runs}
        print_times(f"Generation, {rows} x {length} tokens of prompt, {new} new ones",
                    interleaved(runs, args.rounds, args.device), rows * new, work=work, rate=args.bandwidth)


def decoding_compiled(model, calls):
    """Returns {name: run} for calls {name: arguments of generate}. Only these runs use the model's compiled step."""
    compile_decoding(model)
    compiled, model.compiled_step = model.compiled_step, None

    def run(given):
        model.compiled_step = compiled
        generate(model, *given)
        model.compiled_step = None
    return {f"compiled, {name}": partial(run, given) for name, given in calls.items()}


def teacher(args):
    """The local teacher's replies, in batches, to the prompts of synth.py --steps joint."""
    from transformers import AutoModelForCausalLM
    folder, device = folders(args, 1)[0], args.device
    ours = Transformer.from_pretrained(folder, args.dtype, device, int8=args.int8)
    chat = Chat.from_dir(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=args.dtype).to(device).eval()
    rows, new, stops = args.batch, args.steps, sorted(chat.stops)
    prompts = [chat.prompt(Synthesis(item, "joint", 0, "bench").question.messages) for item in queries(args, rows)]
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
    print_times(f"{rows} prompts of {min(map(len, prompts))} to {width} tokens, replies of {min(lengths)} to "
                f"{max(lengths)}; {same} of {rows} equal", times, sum(lengths),
                {"PersonaFuse": max(lengths) * token_bytes(ours)}, args.bandwidth)


def folders(args, n):
    """Returns the first n folders of --weights. UserError if there are fewer."""
    if len(args.weights or ()) < n:
        raise UserError(f"{args.what} needs --weights with {n} model folder{'s: base, encoder' if n > 1 else ''}")
    return args.weights[:n]


def queries(args, n):
    """Returns n queries: those of --queries, repeated if there are fewer, or the template teacher's."""
    items = read_queries(args.queries)[0] if args.queries else template_records("train", n)
    return [items[i % len(items)] for i in range(n)]


# ----------------------------------------------------------------------------------------------------------------------
# router

def query_rows(config, args, n):
    """Returns n Rows whose queries are random ids of realistic lengths.

    Lengths are those of --queries under the tokenizer of --weights, or log-normal with median 60 and sigma 0.7.
    """
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(60), 0.7, n), 4, MAX_QUERY_TOKENS).astype(int)
    if args.queries:
        tokenizer = load_tokenizer(folders(args, 1)[0])
        real = [len(query_ids(tokenizer, item["query"])) for item in read_queries(args.queries)[0]]
        lengths = rng.choice(real, n, replace=n > len(real))
    return [Row(str(i), torch.eye(len(EXPERTS))[rng.integers(len(EXPERTS))],
                query=rng.integers(config.vocab_size, size=length)) for i, length in enumerate(lengths)]


def router(args):
    """The router stage over the same queries in batches of --batch, with the same parameters and optimiser.

    train.py makes batches of similar lengths and cuts them into micro-batches. The plain loop makes random batches and
    pads them to their longest row.
    """
    config = shape(args, "Qwen2.5-0.5B", whole_head=True)
    rows, batch = query_rows(config, args, args.steps * args.batch), args.batch
    lengths = [n_tokens(row) for row in rows]
    task, _ = stage("router", config, args)
    ours, theirs = task.router, reference(config, args).model
    for name, parameter in ours.encoder.named_parameters():
        owner, _, leaf = name.removeprefix("model.").rpartition(".")
        setattr(theirs.get_submodule(owner), leaf, parameter)
    order, rng = batches(lengths, batch, 0), np.random.default_rng(0)

    def run_ours():
        for _ in range(len(rows) // batch):
            task.step([rows[i] for i in next(order)])

    def run_theirs():
        for part in rng.permutation(len(rows)).reshape(-1, batch):
            ids, sizes = pad([rows[i].query for i in part], args.device)
            mask = torch.arange(ids.shape[1], device=args.device) < sizes[:, None]
            with task.autocast:
                hidden = theirs(input_ids=ids, attention_mask=mask.long()).last_hidden_state
                similarity = ours.similarity((hidden * mask[..., None]).sum(1) / sizes[:, None])
                active = torch.stack([rows[i].active for i in part])
                loss = contrastive_loss(similarity, active, task.settings.contrastive_tau)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(task.parameters(), task.settings.clip)
            task.optimizer.step()
            task.optimizer.zero_grad()

    runs = {"transformers, padded batches": run_theirs, "PersonaFuse": run_ours}
    work = step_flops(config, lengths, sum(lengths), experts=0, frozen=False, head=False)
    print_times(f"Router stage, {len(rows)} queries of {min(lengths)} to {max(lengths)} tokens, {batch} a step",
                interleaved(runs, args.rounds, args.device), sum(lengths), dict.fromkeys(runs, work), args.flops)


# ----------------------------------------------------------------------------------------------------------------------
# memory

class Sizes(TorchDispatchMode):
    """Notes (bytes, shape, operation) of every tensor that an operation allocates, in `found`."""

    def __init__(self):
        super().__init__()
        self.found = []

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
    rows, length = args.batch, args.length
    batch, state = rows_of(config, rows, length), fresh(config, args).state_dict()
    saved = {}
    for n_experts in (0, 1, 10):  # 0: gradients pass through the frozen model to the embeddings
        model, parameters, gate = with_weights(config, state), [], None
        if n_experts:
            parameters, gate = with_experts(model, n_experts), gates(rows, args.device, n_experts).requires_grad_()
        hook = model.model.embed_tokens.register_forward_hook(lambda module, given, out: out.requires_grad_())
        saved[n_experts] = saved_bytes(model.parameters(), lambda: row_losses(model, batch, gate))
        hook.remove()
    run = our_step(model, batch, torch.optim.AdamW(parameters, fused=True), gate)
    run()  # makes the optimiser's moments
    most, largest = peak(run, args.device)
    with Sizes() as sizes:
        run()
    always = sum(t.nbytes for t in state.values()) + 3 * sum(p.nbytes for p in parameters)  # 3: experts and two moments
    cells = {"by the frozen model": saved[0], "one expert adds": saved[1] - saved[0],
             "nine more experts add": saved[10] - saved[1], "ten experts add": saved[10] - saved[0],
             "peak of a step, above weights and moments": most}
    print_table(["", "MB", "of the peak", "with weights"],
                [[what, f"{size / 1e6:,.1f}", f"{size / most:.1%}", f"{size / (most + always):.1%}"]
                 for what, size in cells.items()], f"Saved for backward, {rows} x {length} tokens")
    note = "" if largest is None else f" (the profiler's largest allocation: {largest / 1e6:,.1f} MB)"
    print_table(["tensor", "MB", "made by"],
                [[f"{list(dims)}", f"{size / 1e6:,.1f}", name]
                 for size, dims, name in sorted(set(sizes.found), reverse=True)[:6]],
                f"The largest tensors of a step{note}")
    # what a naive formulation would allocate: logits of all positions, and the output of each expert
    widths, tokens = {width for pair in linears(config) for width in pair}, (rows * length, rows * (length + 1))
    naive = {"tokens x vocabulary": {n * config.vocab_size for n in tokens},
             "tokens x experts x width": {n * 10 * width for n in tokens for width in widths}}
    for what, numbers in naive.items():
        found = [dims for _, dims, _ in sizes.found if np.prod(dims, dtype=int) in numbers]
        print(f"  of size {what}: {len(found)} of {len(sizes.found):,} tensors", *found[:1])


# ----------------------------------------------------------------------------------------------------------------------
# load, data: each run in its own process, whose peak memory is then that of the run

def read_once(folders, dtype, int8):
    return [np.frombuffer(file.read_bytes(), np.uint8) for folder in folders for file in weight_files(folder)]


def load_ours(folders, dtype, int8):
    """Loads as train.py --preset small --stage joint does."""
    setup = Setup(Path(), "small", *folders, None, torch.device("cpu"), dtype, 0, 1.0, 8, 16.0, 2048, 100, int8)
    return [*setup.load_base().parameters(), *setup.load_router().parameters()]


def load_theirs(folders, dtype, int8):
    from transformers import AutoModelForCausalLM
    return [p for folder in folders for p in AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).parameters()]


def bytes_of(arrays):
    return sum(array.nbytes for array in arrays)


def import_transformers():
    """Import what loading needs, which does not count as loading."""
    import transformers
    transformers.utils.logging.disable_progress_bar()
    transformers.AutoModelForCausalLM, transformers.LlamaForCausalLM, transformers.Qwen2ForCausalLM


def drop_from_page_cache(folders):
    """Have the system forget what it keeps in memory of these models' files."""
    for file in (file for folder in folders for file in weight_files(folder)):
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def load(args):
    """Loading both models of --preset small, beside reading their files once, from the page cache and from the disk."""
    given = folders(args, 2), args.dtype, args.int8
    runs = {"reading the files once": read_once, "PersonaFuse": load_ours, "transformers": load_theirs}
    sizes = {}  # {name: (bytes of the result, highest peak)}
    for place in ("the page cache", "the disk"):
        times = {name: [] for name in runs}
        for turn in range(args.rounds + 1):
            for name, run in runs.items():
                if place == "the disk":
                    drop_from_page_cache(given[0])
                size, seconds, most = alone(run, *given, ready=import_transformers, measure=bytes_of)
                sizes[name] = size, max(most, sizes.get(name, (0, 0))[1])
                if turn:
                    times[name].append(seconds)
        print_times(f"Loading both models of --preset small from {place}", times)
    print_table(["", "result", "peak above the start", "ratio"],
                [[name, f"{size / 1e9:.2f}", f"{most / 1e9:.2f}", f"{most / size:.2f}"]
                 for name, (size, most) in sizes.items()], "Memory of it, in GB")


def data_path(file, folders):
    """From a file to the padded micro-batches of one epoch of warm-up. Returns the seconds of each part."""
    marks = [time.perf_counter()]
    records = read_records(file)
    marks.append(time.perf_counter())
    rows, _ = make_rows(records, Chat.from_dir(folders[0]), load_tokenizer(folders[1]), 2048)
    marks.append(time.perf_counter())
    rows = rows_per_pole(rows)
    order = batches([n_tokens(row) for row in rows], 64, 0)
    for _ in range(len(rows) // 64):
        for group in micro_batches([rows[i] for i in next(order)], 2048):
            pad([row.ids for row in group]), pad([row.query for row in group])
    marks.append(time.perf_counter())
    return [*np.diff(marks), marks[-1] - marks[0]]


def data(args):
    """The data path of --count records: reading, tokenising for both models, an epoch of batches."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "records.jsonl"
        write_records(file, template_records("train", args.count))
        seconds, _, most = alone(data_path, file, folders(args, 2))
    print_table(["", "reading", "tokenising", "batching", "together", "peak"],
                [[f"{args.count:,} records", *(f"{s:.1f} s" for s in seconds), f"{most / 1e9:.2f} GB"]],
                "The data path, one process")


# ----------------------------------------------------------------------------------------------------------------------
# growth

GROWTH = {"experts": (1, 2, 5, 10, 20, 40), "rank": (1, 4, 8, 16, 32, 64), "tokens a row": (32, 64, 128, 256, 512),
          "rows": (1, 2, 4, 8, 16)}


def growth(args):
    """Step time and memory while one size grows; the others stay at 10 experts, rank 8, 128 tokens, 4 rows."""
    config = shape(args)
    state = fresh(config, args).state_dict()
    runs, most = {}, {}
    for key in [(what, value) for what, values in GROWTH.items() for value in values]:
        sizes = {"experts": 10, "rank": 8, "tokens a row": 128, "rows": 4} | dict([key])
        model = with_weights(config, state)
        optimizer = torch.optim.AdamW(with_experts(model, sizes["experts"], sizes["rank"]), fused=True)
        runs[key] = our_step(model, rows_of(config, sizes["rows"], sizes["tokens a row"]), optimizer,
                             gates(sizes["rows"], args.device, sizes["experts"]))
        runs[key]()
        most[key] = peak(runs[key], args.device)[0]
    times = interleaved(runs, args.rounds, args.device)
    cells = []
    for (what, value), seconds in times.items():
        low, median, high = (f"{f(seconds) * 1e3:,.0f}" for f in (min, statistics.median, max))
        cells.append([what, value, f"{median} ms", f"{low} to {high}", f"{most[what, value] / 1e6:,.0f} MB"])
    print_table(["", "", "median", "lowest to highest", "peak"], cells,
                f"A step's time, and memory above weights and moments, {config.n_layers} layers")
    if args.out:
        plot(times, most, args.out)


def plot(times, most, file):
    """Draw time above and memory below, a column for each size. The colour-blind can tell the two colours apart.

    All axes are logarithmic: what grows in proportion is a straight line of slope 1.
    """
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(2, len(GROWTH), figsize=(12, 6), sharex="col", sharey="row", layout="constrained")
    for (top, bottom), (what, values) in zip(axes.T, GROWTH.items()):
        low, median, high = (np.array([f(times[what, v]) * 1e3 for v in values]) for f in (min, statistics.median, max))
        top.errorbar(values, median, [median - low, high - median], color="#0072B2", marker="o", capsize=3)
        bottom.plot(values, [most[what, v] / 1e6 for v in values], color="#D55E00", marker="s", linestyle="--")
        bottom.set_xlabel(what)
        for axis in (top, bottom):
            axis.set_xscale("log", base=2)
            axis.set_yscale("log", base=2)
            axis.set_xticks(values, [str(v) for v in values])
            axis.yaxis.set_major_formatter("{x:,.0f}")
            axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("step, ms (lowest, median, highest)")
    axes[1, 0].set_ylabel("peak above weights, MB")
    figure.savefig(file, dpi=120)
    print(f"\n{file}")


# ----------------------------------------------------------------------------------------------------------------------
# gpu

def gpu(args):
    """What matters first on a GPU, within --minutes; see `run_plan` in harness.py. Models have random weights. What is
    compiled comes last: that may take longer than all the rest."""
    others = "weights", "queries", "int8", "compile", "recompute", "natural", "out"
    if given := [f"--{name}" for name in others if getattr(args, name)]:
        raise UserError(f"gpu follows a plan of its own: leave {' '.join(given)} out")
    device, args.recompute, args.shape = str(args.device), True, args.shape or "Llama-3.1-8B"
    sizes = {"tokens": 8192, "length": 2048, "steps": 64, "rounds": 2}
    if args.device.type == "cpu":
        sizes = {"tokens": 256, "length": 64, "steps": 8, "rounds": 1}
    for name, value in sizes.items():
        setattr(args, name, getattr(args, name) or value)
    in_full = argparse.Namespace(**vars(args) | {"recompute": False})
    in_int8 = argparse.Namespace(**vars(args) | {"int8": True})
    run_plan({
        "The limits of this machine": partial(limits, args),
        "1. Correctness: training": partial(on_device.stages, device),
        "1. Correctness: logits": partial(on_device.logits, device),
        "1. Correctness: experts": partial(on_device.experts, device),
        "2. Warm-up, recomputed": partial(train_stage, args, "warmup"),
        "2. Joint, recomputed": partial(train_stage, args, "joint"),
        "2. Router": partial(train_stage, in_full, "router"),
        "2. Warm-up": partial(train_stage, in_full, "warmup"),
        "2. Joint": partial(train_stage, in_full, "joint"),
        "2. Warm-up in 8 bits, recomputed": partial(train_stage, in_int8, "warmup"),
        "3. One adapter of peft, recomputed": partial(beside_peft, args),
        "4. Decoding": partial(decode_random, args),
        "5. Profile of a warm-up step, recomputed": partial(profile_warmup, args),
        "2. Warm-up, recomputed and compiled": partial(train_stage, args, "warmup", compiled=True),
        "1. Correctness: CUDA graph": partial(on_device.cuda_graph, device),
        "4. Decoding by CUDA graph": partial(decode_random, args, compiled=True),
    }, args.minutes)


def limits(args):
    args.flops, args.bandwidth = ceiling(args.device, args.dtype)
    print(f"  {args.flops / 1e12:,.2f} TFLOP/s in products, {args.bandwidth / 1e9:,.1f} GB/s from memory", flush=True)


def stage_step(args, name, n_micro_batches, compiled=False):
    """Returns (run, tokens, work): run() makes a step of train.py's Stage and returns its loss; the step's tokens,
    without padding, and its FLOPs, without recomputation. A step has this many micro-batches of --tokens in rows of
    --length; that of the router has 128 queries, as in the preset, if --tokens is the preset's."""
    sizes = argparse.Namespace(weights=None, shape=None, layers=args.layers)
    config = encoder = shape(args)  # a rehearsal's encoder has the same shape
    if args.shape == "Llama-3.1-8B":
        encoder = shape(sizes, "Qwen2.5-0.5B")
    if compiled and args.device.type != "cuda":
        raise UserError("compiling takes minutes on a CPU: see step --compile")
    task, models = stage(name, encoder if name == "router" else config, args, encoder, args.tokens)
    for model in models:
        model.recompute = args.recompute
        compile_blocks(model, compiled)
    rows = max(1, args.tokens // 64) if name == "router" else n_micro_batches * args.tokens // args.length
    rows = query_rows(encoder, args, rows)
    for row in rows if name == "joint" else ():  # results.md's memory table: the longest query
        row.query = np.resize(row.query, min(args.length // 4, MAX_QUERY_TOKENS))
    tokens = sum(len(row.query) for row in rows if name != "warmup")
    lengths = [len(row.query) for row in rows]
    work = step_flops(encoder, lengths, sum(lengths), 0, frozen=False, head=False) if tokens else 0
    if name != "router":
        for i, (row, whole) in enumerate(zip(rows, rows_of(config, len(rows), args.length - 1, args.length // 3))):
            row.ids, row.n_prompt, row.expert = whole.ids, whole.n_prompt, i % 10 if name == "warmup" else None
        tokens += len(rows) * args.length
        work += step_flops(config, [args.length - 1] * len(rows), sum(row.n_supervised for row in rows))

    def run():
        loss = task.step(rows)["loss"]
        wait(args.device)
        return loss
    return run, tokens, work


def tell_first(what, run):
    """Returns a function that calls run(). Its first call prints the seconds, with those of compiling, and the loss."""
    first = [True]

    def tell():
        began, loss = time.perf_counter(), run()
        if first and first.pop():
            seconds = f"{what}first run {time.perf_counter() - began:.1f} s"
            if torch.is_tensor(loss):
                seconds = f"{'' if loss.isfinite() else 'WRONG: '}{seconds}, loss {loss:.4f}"
            print(f"  {seconds}", flush=True)
    return tell


def print_rate(args, what, run, tokens, work=None):
    """Measure run() and print its rate and its peak memory. Returns the seconds of each round."""
    if args.device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(args.device)
    seconds = interleaved({"": tell_first(what, run)}, args.rounds, args.device)[""]
    median = statistics.median(seconds)
    print(f"  {what}{tokens / median:,.0f} tokens/s, {tokens:,} in {min(seconds):.2f} to {max(seconds):.2f} s"
          + (f", {work / median / args.flops:.0%} of the limit" if work else ""), flush=True)
    if args.device.type == "cuda":
        print(f"  {what}peak {torch.cuda.max_memory_allocated(args.device) / 1e9:.1f} GB, "
              f"{torch.cuda.max_memory_reserved(args.device) / 1e9:.1f} GB reserved", flush=True)
    return seconds


def train_stage(args, name, compiled=False):
    args.flops, _ = ceiling(args.device, args.dtype)
    print_rate(args, "", *stage_step(args, name, 4, compiled))


def beside_peft(args):
    """A micro-batch through ten experts and through one adapter of peft, the same rows."""
    args.batch, times = args.tokens // args.length, {}
    for who, make in (("peft", their_steps), ("ours", our_steps)):
        run = partial(make(args), args.length // 3)
        times[who] = print_rate(args, f"{who}: ", run, args.batch * args.length)
        del run  # the other needs the memory
    print(f"  ours takes {statistics.median(times['ours']) / statistics.median(times['peft']):.2f} of the time of peft")


def decode_random(args, compiled=False):
    if compiled and args.device.type != "cuda":
        raise UserError("a CUDA graph needs a GPU")
    _, args.bandwidth = ceiling(args.device, args.dtype)
    model, new, config = fresh(shape(args), args), args.steps, shape(args)
    with_experts(model)
    if compiled:
        compile_decoding(model)
        on_device.counters.clear()
    for rows in (1, args.batch):
        prompts = torch.randint(3, config.vocab_size, (rows, 64)).tolist()
        choices = {} if compiled else {"no experts": None}
        runs = {name: tell_first(f"{name}: ", partial(generate, model, prompts, gate, new))
                for name, gate in (choices | {"gates": gates(rows, args.device)}).items()}
        print_times(f"Decoding, {rows} x {new} tokens", interleaved(runs, args.rounds, args.device), rows * new,
                    {name: new * token_bytes(model, name == "gates") for name in runs}, args.bandwidth)
        if compiled:
            on_device.check_graphs()


def profile_warmup(args):
    args.flops, args.rounds, args.batch = ceiling(args.device, args.dtype)[0], 1, args.tokens // args.length
    profile(args, stage_step(args, "warmup", 1)[0])


def compile_blocks(model, compiled):
    for block in model.model.layers:
        block._compiled_call_impl = None
    if compiled:
        compile_layers(model)


COMMANDS = {  # the function, and what --batch, --length and --steps are if they are not given
    "step": (step, {"batch": 4, "length": 128}),
    "profile": (profile, {"batch": 4, "length": 128}),
    "generate": (decode, {"batch": 16, "length": 64, "steps": 64}),
    "teacher": (teacher, {"batch": 16, "steps": 64}),
    "router": (router, {"batch": 16, "steps": 4}),
    "memory": (memory, {"batch": 4, "length": 128}),
    "load": (load, {}),
    "data": (data, {}),
    "growth": (growth, {}),
    "gpu": (gpu, {"batch": 16}),
}
NO_CEILING = ("load", "data", "memory", "growth", "gpu")


def main(argv=None):
    parser = Parser(description=for_users(__doc__), allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", metavar="COMMAND", choices=COMMANDS)
    parser.add_argument("--weights", nargs="+", metavar="FOLDER", help="model folders; else random weights")
    parser.add_argument("--shape", choices=CONFIGS, help="SmolLM2-135M; router: Qwen2.5-0.5B; gpu: Llama-3.1-8B")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--batch", type=int, help="rows; generate and gpu: those of the second decoding table")
    parser.add_argument("--length", type=int, help="tokens a row")
    parser.add_argument("--steps", type=int, help="router: steps a round; generate, teacher, gpu: new tokens a row")
    parser.add_argument("--tokens", type=int, help="gpu: tokens a micro-batch (8192; on a CPU 256)")
    parser.add_argument("--rounds", type=int, help="measured rounds, after one that is not counted (5; gpu: 2)")
    parser.add_argument("--minutes", type=float, default=8, help="gpu: when it ends at the latest (8)")
    parser.add_argument("--recompute", action="store_true", help="step, profile: with gradient checkpointing, both")
    parser.add_argument("--compile", action="store_true",
                        help="step, generate: with torch.compile as well; profile: with it")
    parser.add_argument("--natural", action="store_true", help="teacher: replies end at a stop token")
    parser.add_argument("--queries", help="router, teacher: a file of real queries, .txt, .jsonl or .csv")
    parser.add_argument("--count", type=int, default=100_000, help="data: records")
    parser.add_argument("--out", help="growth: a PNG file for the plot")
    parser.add_argument("--device", help="cpu (the default; gpu: cuda), cuda or cuda:N")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="float32 on a CPU, bfloat16 on a GPU")
    parser.add_argument("--int8", action="store_true",
                        help="step: with the base in 8 bits as well; the others: with it, but for their encoder")
    args = parser.parse_args(argv)
    command, defaults = COMMANDS[args.what]
    for name, value in ({"rounds": 5 if args.what != "gpu" else None} | defaults).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.what == "gpu" and not args.device and not torch.cuda.is_available():
        raise UserError("gpu needs a CUDA GPU, and there is none here; --device cpu --shape SmolLM2-135M --layers 2 "
                        "--minutes 2 only tries the code")
    args.device = pick_device(args.device or ("cuda" if args.what == "gpu" else "cpu"))
    args.dtype = pick_dtype(args.dtype, args.device)
    args.flops, args.bandwidth = (0, 0) if args.what in NO_CEILING else ceiling(args.device, args.dtype)
    print(f"{torch.cuda.get_device_name(args.device) if args.device.type == 'cuda' else 'CPU'}, "
          f"{torch.get_num_threads()} threads, {str(args.dtype).removeprefix('torch.')}"
          + (f"; at most {args.flops / 1e9:,.0f} GFLOP/s, {args.bandwidth / 1e9:,.1f} GB/s" if args.flops else ""),
          flush=True)
    command(args)


if __name__ == "__main__":
    run_command(main)
