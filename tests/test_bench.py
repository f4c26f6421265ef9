"""Every command of bench.py runs, on tiny models, and the figures in its tables are what they claim to be."""
import importlib.util
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import nullcontext, redirect_stdout
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch._inductor.cudagraph_utils import log_cudagraph_skip_and_bump_counter

import bench
import on_device
from bench import main, operation
from harness import Worker, interleaved, linears, our_step, peak, print_times, rows_of, run_plan, saved_bytes
from harness import step_flops, token_bytes, with_experts
from lora import ExpertLinear, merged_tensors
from model import CONFIGS, Config, Transformer
from router import MAX_QUERY_TOKENS
from support.checkpoints import checkpoint_files
from support.compile import check_compiler
from support.files import UserError
from support.rows import micro_batches
from support.runs import PRESETS
from support.tiny import make_tiny
from synth import template_records
from train import Stage

pytest.importorskip("transformers", reason="transformers is in requirements-dev.txt")
pytest.importorskip("peft", reason="peft is in requirements-dev.txt")
LLAMA = Config(1024, 64, 2, 4, 2, 16, 160, 1e-5, 1e4)
SHAPES = {"Llama-3.1-8B": LLAMA, "SmolLM2-135M": Config(1024, 64, 2, 4, 2, 16, 160, 1e-5, 1e4, tied=True),
          "Qwen2.5-0.5B": Config(1024, 64, 2, 4, 2, 16, 160, 1e-6, 1e4, qkv_bias=True, tied=True)}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    for name, config in SHAPES.items():
        monkeypatch.setitem(CONFIGS, name, config)
    monkeypatch.setattr(bench, "ceiling", lambda device, dtype: (1e11, 1e10))
    monkeypatch.setattr(bench, "GROWTH", {"experts": (1, 3), "tokens a row": (8, 32)})


def do_not_compile(monkeypatch):
    """Leave out torch.compile, which takes minutes."""
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **how: None)
    monkeypatch.setattr(torch, "compile", lambda function, **how: function)


def output(command):
    out = io.StringIO()
    with redirect_stdout(out):
        main(command.split())
    assert all(len(line) <= 80 for line in out.getvalue().splitlines()), out.getvalue()
    return out.getvalue()


# ----------------------------------------------------------------------------------------------------------------------
# The commands

@pytest.mark.parametrize("command, words", [
    pytest.param("step --rounds 1 --layers 1 --length 12 --compile", "the same, --compile", marks=pytest.mark.slow),
    pytest.param("generate --rounds 1 --steps 3 --batch 3 --compile", "compiled, 3 gates", marks=pytest.mark.slow),
    pytest.param("step --rounds 1 --layers 1 --length 12 --int8", "the same, --int8", marks=pytest.mark.slow),
    ("profile --rounds 1 --length 12 --compile", "products with the experts"),
    ("profile --rounds 1 --length 12 --int8", "products with the frozen layers"),
    ("generate --rounds 1 --steps 3 --batch 3 --int8", "PersonaFuse, 3 gates"),
    ("memory --length 16 --dtype bfloat16 --int8", "experts x width: 0 of"),
    ("router --rounds 1 --batch 3 --steps 2", "padded batches")])
def test_runs_on_random_weights(command, words, monkeypatch):
    do_not_compile(monkeypatch)
    assert words in output(command)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base and an encoder with tokenizers, untrained."""
    folder, records = tmp_path_factory.mktemp("models"), template_records("train", 100)
    for kind in ("base", "encoder"):
        make_tiny(kind, folder / kind, records, 0, lambda model, chat: None)
    return f"{folder / 'base'} {folder / 'encoder'}"


def test_runs_on_model_folders_and_real_queries(folders, tmp_path):
    queries = tmp_path / "queries.txt"
    queries.write_text("How are you?\nWhat should I do on Sunday, when nobody is at home?\n")
    assert "2 of 2 equal" in output(f"teacher --weights {folders} --steps 4 --batch 2 --rounds 1 --queries {queries}")
    assert "PersonaFuse" in output(f"teacher --weights {folders} --steps 4 --batch 2 --rounds 1 --int8")
    assert "8 queries" in output(f"router --weights {folders.split()[1]} --queries {queries} --rounds 1 --batch 2")


@pytest.mark.slow
def test_runs_in_other_processes(folders):
    printed = output(f"load --weights {folders} --rounds 1")
    assert "from the page cache" in printed and "from the disk" in printed and "Memory of it" in printed
    assert "Memory of it" in output(f"load --weights {folders} --rounds 1 --int8")
    assert "300 records" in output(f"data --weights {folders} --count 300")


@pytest.mark.slow
def test_growth_is_a_table_and_a_picture(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib", reason="matplotlib is in requirements-dev.txt")
    monkeypatch.chdir(tmp_path)
    assert "tokens a row" in output("growth --rounds 1 --out growth.png")
    assert (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")


def test_is_a_program():
    said = subprocess.run([sys.executable, bench.__file__, "--help"], capture_output=True, text=True)
    assert said.returncode == 0 and "python tests/bench.py step" in said.stdout, said.stderr


@pytest.mark.parametrize("command, words", [("gpu", "needs a CUDA GPU"), ("load", "--weights with 2"),
                                            ("teacher", "--weights with 1")])
def test_names_what_is_missing(command, words, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=words):
        main([command])


@pytest.mark.parametrize("device, found, missing", [
    ("cuda", "", "Triton"), ("cuda", "triton g++", "neither gcc nor clang"), ("cuda", "triton gcc", None),
    ("cuda", "triton clang", None), ("cuda", "triton zig", None), ("cpu", "gcc", "neither g++ nor clang++"),
    ("cpu", "g++", None), ("cpu", "zig", None)])
def test_compiling_needs_a_compiler_of_c_on_a_gpu_and_of_cpp_on_a_cpu(device, found, missing, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name in found.split() or None)
    monkeypatch.setattr(shutil, "which", lambda name: name if name in found.split() else None)
    monkeypatch.setenv("CC", "zig")
    monkeypatch.setenv("CXX", "zig")
    with pytest.raises(UserError, match=re.escape(missing)) if missing else nullcontext():
        check_compiler(torch.device(device))


@pytest.mark.parametrize("option", ["weights x", "queries x", "int8", "compile", "recompute", "natural", "out x"])
def test_the_plan_takes_no_option_that_it_cannot_follow(option):
    with pytest.raises(UserError, match=f"leave --{option.split()[0]} out"):
        main(f"gpu --device cpu --{option}".split())


def test_peft_computes_as_many_positions_as_ours():
    seen = set()
    args = SimpleNamespace(weights=None, shape=None, layers=None, device=torch.device("cpu"), dtype=torch.float32,
                           batch=2, length=12, int8=False, recompute=False)

    def look(module, given):
        if isinstance(module, torch.nn.Embedding):
            seen.add((make.__name__, *given[0].shape))
    with torch.nn.modules.module.register_module_forward_pre_hook(look):
        for make in (bench.our_steps, bench.their_steps):
            make(args)(5)
    assert seen == {("our_steps", 2, 12), ("their_steps", 2, 12)}


# ----------------------------------------------------------------------------------------------------------------------
# The plan for a GPU

class Stub:
    """Stands in for a Worker. `steps`: for each call the seconds that it takes, what went wrong, and Worker.run's
    second answer."""
    time, limits, started, stopped = 0.0, [], 0, 0

    def __init__(self, steps=()):
        self.steps = iter(steps)

    def start(self):
        self.started += 1
        return self

    def run(self, function, seconds):
        takes, problem, usable = next(self.steps, (0.0, None, True))
        function()
        self.limits = [*self.limits, seconds]
        self.time += min(takes, seconds)
        return (problem, usable) if takes <= seconds else ("stopped", False)

    def stop(self):
        self.stopped += 1


def run_stubbed(steps, titles, minutes=8.0):
    stub, called, out = Stub(steps), [], io.StringIO()
    with redirect_stdout(out):
        run_plan({title: partial(called.append, title) for title in titles}, minutes, stub.start, lambda: stub.time)
    return stub, "".join(called), out.getvalue()


def test_a_plan_goes_on_after_what_fails_in_a_new_process_where_the_old_one_may_be_broken():
    stub, called, out = run_stubbed([(60, None, True), (20, "no peft", True), (200, "CUDA error", False)], "abcd")
    assert called == "abcd" and stub.limits == [240, 210, 200, 100]  # half of what is left
    assert out.splitlines() == ["a (at 0 s)", "b (at 60 s)", "  not measured: no peft", "c (at 80 s)",
                                "  not measured: CUDA error", "d (at 280 s)"]
    assert stub.started == stub.stopped == 2


def test_a_plan_ends_in_time_though_every_step_hangs():
    titles = "abcdefghij"
    stub, called, out = run_stubbed([(1e9, None, True)] * len(titles), titles)
    assert stub.time <= 480 and stub.started == stub.stopped == len(called) > 3 and titles.startswith(called)
    late = [line for line in out.splitlines() if "the time is up" in line]
    assert [line[0] for line in late] == list(titles[len(called):]) and late


def test_a_plan_without_time_begins_nothing():
    stub, called, out = run_stubbed([], "ab", minutes=0.1)
    assert not called and not stub.started and out.count("not measured, the time is up") == 2


def test_a_plan_leaves_a_step_at_least_half_a_minute_or_what_there_is():
    stub, called, _ = run_stubbed([(440, None, True), (15, "slow", True), (14, None, True)], "abc", minutes=16)
    assert called == "abc" and stub.limits == [480, 260, 252.5]
    stub, called, _ = run_stubbed([(20, None, True), (15, None, True)], "abc", minutes=55 / 60)
    assert called == "abc" and stub.limits == [30, 30, 20]


def no_memory():
    raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2.00 GiB")


def broken_gpu():
    """As after an error that leaves the GPU unusable: whatever follows raises it again."""
    torch.cuda.is_initialized, torch.cuda.empty_cache = lambda: True, broken_gpu
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def tf32():
    if torch.get_float32_matmul_precision() != "highest":
        raise UserError("fp32 is not what it says")


@pytest.mark.slow
def test_a_worker_says_how_a_step_failed_and_can_be_stopped(monkeypatch):
    monkeypatch.setenv("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "1")  # as in images of NVIDIA's
    worker = Worker()
    try:
        assert worker.run(partial(int, "7"), 60) == (None, True)
        assert worker.run(tf32, 60) == (None, True)
        assert worker.run(no_memory, 60) == (
            "the GPU's memory is full (CUDA out of memory. Tried to allocate 2.00 GiB)", True)
        assert worker.run(partial(int, "x"), 60) == ("ValueError: invalid literal for int() with base 10: 'x'", False)
        assert worker.run(partial(importlib.import_module, "peft2"), 60) == ("peft2 is not installed here", True)
        assert worker.run(partial(on_device.cuda_graph, "cpu"), 60) == ("a CUDA graph needs a GPU", True)
        assert worker.run(signal.pause, 0.01) == ("stopped after 0 s", False)
        assert worker.process.is_alive()
    finally:
        worker.stop()
    assert not worker.process.is_alive()
    assert worker.run(int, 60)[1] is False
    worker = Worker()
    broken = "RuntimeError: CUDA error: an illegal memory access was encountered", False
    assert worker.run(broken_gpu, 60) == broken
    assert worker.run(partial(os._exit, 3), 60) == ("the process ended by itself, with status 3", False)
    worker.stop()


TITLES = """The limits|1. Correctness: training|1. Correctness: logits|1. Correctness: experts|
2. Warm-up, recomputed|2. Joint, recomputed|2. Router|2. Warm-up|2. Joint|2. Warm-up in 8|3. One adapter|4. Decoding|
5. Profile|2. Warm-up, recomputed and compiled|1. Correctness: CUDA|4. Decoding by CUDA graph""".replace("\n", "").split("|")


def assert_in_order(out):
    lines = [line for line in out.splitlines() if line.startswith(("The limits", *"12345"))]
    assert len(lines) == len(TITLES) and all(map(str.startswith, lines, TITLES)), lines


def here(monkeypatch):
    """Run the plan's steps in this process. A UserError is what it needs a GPU for."""
    class Here(Stub):
        def run(self, function, seconds):
            try:
                return function(), True
            except UserError as error:
                return str(error), True
    monkeypatch.setattr(bench, "run_plan", partial(run_plan, start=Here))


def test_the_plan_prints_a_figure_for_every_step_that_needs_no_gpu(monkeypatch):
    here(monkeypatch)
    out = output("gpu --device cpu --tokens 48 --length 24 --rounds 1 --steps 2 --batch 2")
    assert_in_order(out)
    assert "WRONG" not in out and out.count("ok: ") == 10
    assert out.count("tokens/s, ") == 6 + 2 and "ours takes" in out and "products with the experts" in out
    assert out.count("needs a GPU") == 2 and out.count("not measured") == 3
    losses = re.findall(r"^2\. ([\w-]+).*\n  first run \S+ s, loss (\S+)$", out, re.MULTILINE)
    for stage, lines in (("Warm-up", 3), ("Joint", 2), ("Router", 1)):
        same = [float(loss) for name, loss in losses if name == stage]
        assert len(same) == lines and max(same) - min(same) < 0.02, losses  # 8 bits round more coarsely
    assert "Decoding, 1 x 2 tokens" in out and "Decoding, 2 x 2 tokens" in out


on_cpu = on_device.train_tiny


def test_a_skipped_cuda_graph_is_wrong(capsys):
    on_device.counters.clear()
    on_device.check_graphs()
    log_cudagraph_skip_and_bump_counter("skipping cudagraphs")
    on_device.check_graphs()
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == ["  ok", "  WRONG"]


@pytest.mark.parametrize("loss, said", [(torch.tensor(11.93), "  first run "), (torch.tensor(torch.nan), "  WRONG: ")])
def test_a_loss_that_is_no_number_is_wrong(loss, said, capsys):
    run = bench.tell_first("", lambda: loss)
    run(), run()
    line, = capsys.readouterr().out.splitlines()  # of the first run only
    assert line.startswith(said) and line.endswith(f" s, loss {loss:.4f}")


@pytest.mark.parametrize("step, module, name, broken", [
    ("logits", "model", "rotate", lambda x, cos, sin: x * cos - sin),
    ("experts", "on_device", "merged_tensors", lambda model, gate: merged_tensors(model, gate.flip(0))),
    ("experts", "model", "last_positions", lambda ids, lengths: ids.shape[1] * torch.arange(1, len(ids) + 1) - 1),
    ("stages", "train", "load_latest_checkpoint", lambda run, stage: 2 * bool(checkpoint_files(run, stage.name))),
    ("stages", "on_device", "train_tiny",  # the experts of the second run do not learn
     lambda run, *more: on_cpu(run, *more, *["--lr", "1e-9"] * (run == "on-cpu")))])
def test_a_check_says_what_is_wrong(step, module, name, broken, monkeypatch, capsys):
    monkeypatch.setattr(importlib.import_module(module), name, broken)
    getattr(on_device, step)("cpu")
    assert "WRONG" in capsys.readouterr().out


@pytest.mark.parametrize("name, rows", [("warmup", 16), ("router", 128), ("joint", 16)])
def test_a_measured_step_is_that_of_the_paper_preset(name, rows, monkeypatch):
    """Its tokens are those that train.py counts, without padding. A micro-batch of long rows is full."""
    args = SimpleNamespace(weights=None, queries=None, shape="Llama-3.1-8B", layers=None, device=torch.device("cpu"),
                           dtype=torch.float32, tokens=8192, length=2048, recompute=True, int8=False)
    seen = []
    monkeypatch.setattr(Stage, "step", lambda stage, rows: seen.append((stage, rows)) or {"loss": None})
    run, tokens, work = bench.stage_step(args, name, 4)
    run()
    (stage, step), = seen
    assert stage.name == name and stage.settings.tokens == PRESETS["paper"]["tokens"] and len(step) == rows
    assert all(part.recompute for part in (stage.model, stage.router and stage.router.encoder) if part)
    full = [len(group) for group in micro_batches(step, 8192)] == [4] * 4
    assert name == "router" or full and {len(row.ids) for row in step} == {2048}
    base, encoder = sum(len(row.ids) for row in step if row.ids is not None), sum(len(row.query) for row in step)
    assert tokens == {"warmup": base, "router": encoder, "joint": base + encoder}[name]
    assert {row.expert is None for row in step} == {name != "warmup"} and work > 0
    assert name != "joint" or {len(row.query) for row in step} == {MAX_QUERY_TOKENS}


@pytest.mark.slow
def test_the_rehearsal_ends_in_time():
    began = time.monotonic()
    command = "gpu --device cpu --shape SmolLM2-135M --layers 2 --minutes 0.5".split()
    found = subprocess.run([sys.executable, bench.__file__, *command], capture_output=True, text=True)
    assert found.returncode == 0 and not found.stderr and time.monotonic() - began < 30 + 15, found.stderr
    assert_in_order(found.stdout)
    assert "GFLOP/s" not in found.stdout.splitlines()[0]


# ----------------------------------------------------------------------------------------------------------------------
# The figures

def test_runs_take_turns_and_a_ratio_is_that_of_the_same_round(capsys):
    order = []
    times = interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 2)
    assert "".join(order) == "ababab" and all(len(found) == 2 for found in times.values())  # the first does not count
    print_times("title", {"a": [1.0, 2.0, 4.0, 1.0], "b": [3.0, 4.0, 4.0, 2.0]}, 7, {"b": 70.0}, 100.0)
    _, a, b = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert a[1:] == ["1,500", "ms", "1.00", "[1.00,", "1.00]", "4.7"]
    assert b[1:] == ["3,500", "ms", "2.00", "[2.00,", "2.00]", "2.0", "20%"]


def test_a_peak_is_what_is_allocated_at_once():
    def run():
        for _ in range(3):
            both = torch.empty(1000), torch.empty(5000)  # 24 kB, three times, but never at once
            del both
    assert peak(run, torch.device("cpu")) == (24_000, 20_000)


def test_what_is_saved_for_backward_is_counted_once_and_without_parameters():
    layer, x = torch.nn.Linear(8, 8), torch.ones(4, 8, requires_grad=True)
    assert saved_bytes(layer.parameters(), lambda: (layer(x) + layer(x)).sum()) == x.nbytes  # x is saved twice


def test_the_work_of_a_step_is_what_pytorch_counts():
    """FlopCounterMode leaves out what the experts add in place, and attention where it is one fused kernel. In releases
    of PyTorch without that kernel for a CPU, attention is six plain products, none of them halved by the causal mask.
    The profiler counts products only."""
    from torch.utils.flop_counter import FlopCounterMode
    model = Transformer(SHAPES["Llama-3.1-8B"])
    parameters, c = with_experts(model), model.config
    model.model.embed_tokens.register_forward_hook(lambda module, given, out: out.requires_grad_())
    gate, batch = torch.full((4, 10), 0.1), rows_of(c, 4, 16, 9)  # 64 positions, 32 of them supervised
    whole = step_flops(c, [16] * 4, 32)
    with FlopCounterMode(display=False) as counter:
        our_step(model, batch, torch.optim.AdamW(parameters), gate)()
    in_place = 2 * 80 * (c.n_layers * sum(out for _, out in linears(c)) * 64 - sum(out for _, out in linears(c)[4:]) * 32)
    attention = c.n_layers * 7 * c.n_heads * c.head_dim * 4 * 16**2  # 2 products forward and 5 backward, half of each
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profiled:
        our_step(model, batch, torch.optim.AdamW(parameters, fused=True), gate)()
    fused = any("flash_attention" in event.name for event in profiled.events())
    assert counter.get_total_flops() + in_place + (attention if fused else -attention * 5 // 7) == whole
    found = Counter()
    for event in profiled.events():
        kind, work = operation(event, c.vocab_size)
        found[kind] += work
    experts, head = whole - step_flops(c, [16] * 4, 32, experts=0), 4 * c.vocab_size * c.dim * 32
    assert found == {"products with the experts": experts, "products with the head": head, "attention": 0,
                     "products with the frozen layers": whole - attention - experts - head,
                     "the optimiser": 0, "all other operations": 0}
    assert token_bytes(model) - token_bytes(model, experts=False) == sum(p.nbytes for p in parameters)


def test_memory_finds_a_tensor_of_size_tokens_by_experts_by_width(monkeypatch):
    """Such a tensor is made on purpose: each expert's output, then their sum."""
    assert "experts x width: 0 of" in output("memory --length 16")

    def one_by_one(self, x, gate=None):
        y = torch.nn.functional.linear(x, self.weight, self.bias)
        each = torch.einsum("bter,ero->bteo", torch.einsum("btd,erd->bter", x, self.A), self.B)  # (B, T, E, out)
        return y if gate is None else y + self.scale * (gate[:, None, :, None] * each).sum(2)
    monkeypatch.setattr(ExpertLinear, "forward", one_by_one)
    assert "experts x width: 0 of" not in output("memory --length 16")
