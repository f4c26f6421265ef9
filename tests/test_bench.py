"""Every command of bench.py runs, on tiny models, and the figures in its tables are what they claim to be."""
import io
import subprocess
import sys
from collections import Counter
from contextlib import redirect_stdout

import pytest
import torch

import bench
from bench import main, operation
from harness import interleaved, linears, our_step, peak, print_times, rows_of, saved_bytes, step_flops, token_bytes
from harness import with_experts
from lora import ExpertLinear
from model import CONFIGS, Config, Transformer
from support.files import UserError
from support.tiny import make_tiny
from synth import template_records

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
@pytest.mark.parametrize("compiler", ["none", "inductor"])
def test_gpu_runs_on_a_cpu(compiler, monkeypatch):
    if compiler == "none":
        do_not_compile(monkeypatch)
    out = output("gpu --device cpu --tokens 48 --rounds 1 --steps 2 --batch 2 --length 24")
    rows = [line.split()[:4] for line in out.splitlines() if line.split()[1:2] == ["24"]]
    assert rows == [[stage, "24", recompute, compiled] for stage in ("warmup", "router", "joint")
                    for compiled in ("no", "yes") for recompute in ("no", "yes")]
    assert "Decoding, 2 x 2 tokens" in out and "compiled, 2 gate(s)" in out and "out of memory" not in out


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
    """FlopCounterMode leaves out attention on a CPU, and what the experts add in place. The profiler counts products
    only."""
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
    assert counter.get_total_flops() + in_place + attention == whole
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profiled:
        our_step(model, batch, torch.optim.AdamW(parameters, fused=True), gate)()
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
