"""CUDA without a card: no operation mixes tensors of the GPU with tensors of the CPU.

PyTorch's FakeTensorMode makes tensors that have a shape, a dtype and a device but no values, and raises an error where
an operation mixes devices. Where PyTorch is a CUDA build, they may be on "cuda" although there is no card. Some things
need a driver all the same: the backward pass, and indexing with a list.
"""
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from harness import fresh, gates, stage, with_experts
from model import CONFIGS, LONG_PREFIX, generate
from test_train import STAGES, mixed_rows, some_rows

pytestmark = [
    pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="this PyTorch is not a CUDA build"),
    pytest.mark.skipif(torch.__version__ < (2, 14) and not torch.cuda.is_available(),
                       reason="there is no GPU, and before PyTorch 2.14 (2.6 was tried) random numbers on it need one")]
BASE, ENCODER = (replace(CONFIGS[name], n_layers=2) for name in ("Llama-3.1-8B", "Qwen2.5-0.5B"))
ARGS = SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16, weights=None, int8=False)


@pytest.fixture(autouse=True)
def fake_tensors(monkeypatch):
    """Every new tensor is fake. Where Python asks for its values, they are made up."""
    monkeypatch.setattr(FakeTensor, "__bool__", lambda self: True, raising=False)
    monkeypatch.setattr(FakeTensor, "tolist", lambda self: [1] * len(self), raising=False)
    monkeypatch.setattr(FakeTensor, "pin_memory", lambda self: self, raising=False)
    # without a card, autocast would turn itself off
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


@STAGES
@pytest.mark.parametrize("recompute", [False, True])
def test_a_training_step_mixes_no_devices(name, recompute, monkeypatch):
    """At the 8B's width, in bf16 under autocast: forward pass, clipping and optimiser. Gradients are made up."""
    task, models = stage(name, ENCODER if name == "router" else BASE, ARGS, ENCODER)
    for model in models:
        model.recompute = recompute
    losses = []

    def backward(loss):
        assert loss.requires_grad
        losses.append(loss)
        for p in task.expert_tensors() if name == "warmup" else task.parameters():
            p.grad = torch.zeros_like(p)
    monkeypatch.setattr(torch.Tensor, "backward", backward)
    metrics = task.step(some_rows(4) if name == "warmup" else mixed_rows(4))
    assert {t.device.type for t in (*losses, *metrics.values()) if torch.is_tensor(t)} == {"cuda"} and losses


def test_experts_are_drawn_on_the_cpu_so_that_a_seed_gives_the_same_on_every_device(monkeypatch):
    drawn, draw = set(), torch.nn.init.uniform_
    monkeypatch.setattr(torch.nn.init, "uniform_", lambda tensor, *bounds: (
        drawn.add(tensor.device.type), draw(tensor, *bounds))[1])
    model = fresh(BASE, ARGS)
    assert {p.device.type for p in with_experts(model)} == {"cuda"} and drawn == {"cpu"}


@pytest.mark.parametrize("gate", ["none", "all rows", "each row"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_generation_mixes_no_devices(gate, temperature):
    """Prefill, decoding with a cache and sampling. What the prompts share becomes a Prefix, unless each row has its own
    gate. No row ends before the others, because dropping one from the cache indexes with a list."""
    model = fresh(BASE, ARGS)
    with_experts(model)
    gate = {"none": None, "all rows": gates(1, "cpu"), "each row": gates(2, "cpu")}[gate]
    shared = list(range(LONG_PREFIX))
    assert generate(model, [shared + [1], shared + [1, 2, 3]], gate, 4, temperature, top_p=0.9) == [[1] * 4] * 2
