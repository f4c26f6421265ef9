"""Every command of bench.py runs, on models of almost no size: what it prints is for people, that it runs is for all."""
import io
import json
from contextlib import redirect_stdout

import pytest
import torch

import bench
import train
from bench import main
from lora import ExpertLinear
from model import CONFIGS, Config, UserError
from synth import make_tiny, template_records

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
    monkeypatch.setattr(bench, "GROWTH", {"experts": (1, 3), "rank": (2, 8), "tokens a row": (8, 32), "rows": (1, 3)})


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A base and an encoder with tokenizers, untrained."""
    folder, records = tmp_path_factory.mktemp("models"), template_records("train", 100)
    for kind in ("base", "encoder"):
        make_tiny(kind, folder / kind, records, 0, lambda model, chat: None)
    return f"{folder / 'base'} {folder / 'encoder'}"


def shown(command):
    out = io.StringIO()
    with redirect_stdout(out):
        main(command.split())
    print(out.getvalue())
    assert all(len(line) <= 100 for line in out.getvalue().splitlines())
    return out.getvalue()


@pytest.mark.parametrize("command", [
    "step --rounds 2 --length 12", "step --rounds 1 --layers 1 --dtype bfloat16", "generate --rounds 2 --steps 3 --batch 3",
    "memory --length 16", "router --rounds 1 --batch 3 --steps 2"])
def test_runs_on_random_weights(command):
    assert "PersonaFuse" in shown(command) or command.startswith("memory")


def test_runs_on_model_folders(folders, tmp_path):
    queries = tmp_path / "queries.txt"
    queries.write_text("How are you?\nWhat should I do on Sunday, when nobody is at home?\n")
    assert "2 of 2 equal" in shown(f"teacher --weights {folders} --steps 4 --batch 2 --rounds 1")
    assert "4 to 4" not in shown(f"teacher --weights {folders} --steps 400 --batch 2 --rounds 1 --natural --queries {queries}")
    encoder = folders.split()[1]
    shown(f"router --weights {encoder} --queries {queries} --rounds 1 --batch 2 --steps 1")
    assert "reading the files once" in shown(f"load --weights {folders} --rounds 1")
    assert "300 records" in shown(f"data --weights {folders} --count 300")


def test_growth_is_a_table_and_a_picture(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is in requirements-dev.txt")
    table = shown(f"growth --rounds 1 --out {tmp_path / 'growth.png'}")
    assert "tokens a row" in table and (tmp_path / "growth.png").read_bytes().startswith(b"\x89PNG")


def test_gpu_runs_where_there_is_none():
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="there is none here"):
            main(["gpu"])
    table = shown("gpu --device cpu --tokens 48 --rounds 1 --steps 2 --batch 2 --length 24")
    assert all(name in table for name in ("warmup", "router", "joint", "Decoding"))


def test_what_must_not_exist_is_seen(monkeypatch):
    """Experts one by one and then mixed, as a stacked einsum: tokens x experts x width, which memory has to count."""
    assert "width: 0 of" in shown("memory --length 16")

    def einsum(self, x, gate=None):
        y = torch.nn.functional.linear(x, self.weight, self.bias)
        if gate is None:
            return y
        each = torch.einsum("btei,eio->bteo", torch.einsum("btd,erd->bter", x, self.A), self.B)  # (B, T, E, out)
        return y + self.scale * torch.einsum("be,bteo->bto", gate, each)
    monkeypatch.setattr(ExpertLinear, "forward", einsum)
    assert "width: 0 of" not in shown("memory --length 16")
