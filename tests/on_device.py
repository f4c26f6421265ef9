"""Checks of correctness on a device, for `bench.py gpu`. Each prints a figure and the most that it may be.

They need no test framework: on a borrowed GPU there may be nothing but PyTorch, `transformers` and `peft`.
"""
import os
import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch
from torch._dynamo.utils import counters

import small
import train
from harness import SMALL, gates, randomise, reference, with_experts, with_weights
from lora import merged_tensors
from model import Transformer, generate
from support.checkpoints import read_log
from support.compile import compile_decoding
from support.files import UserError
from support.runs import STAGES


def check(what, found, most):
    print(f"  {'ok' if found <= most else 'WRONG'}: {what}: {found:.2g} (at most {most:g})", flush=True)


def relative(found, expected):
    """The largest difference, as a share of the largest expected number."""
    return ((found.double() - expected.double()).abs().max() / expected.double().abs().max()).item()


def train_tiny(run, device, *more):
    """Train the preset tiny's three stages, with the table at their end. Returns the losses of all steps."""
    options = ["--run", run, "--device", device, "--dtype", "float32", *more]
    status, _, said = small.run_quietly(train, *small.TRAIN, *options)
    if status:
        raise RuntimeError(said)
    found = {(entry["stage"], entry["step"]): entry["loss"] for _, entry in read_log(Path(run))}
    return torch.tensor([found[key] for key in sorted(found)])


def stages(device):
    """Training on models of a few thousand parameters, beside the CPU and beside a run that was stopped and resumed."""
    before = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        try:
            os.chdir(folder)
            small.make(Path())
            losses = train_tiny("run", device)
            check(f"losses of {len(losses)} steps in three stages, beside the CPU",
                  relative(losses, train_tiny("on-cpu", "cpu")), 1e-4)
            for stage in STAGES:  # of four steps, every second saved: as if each had been stopped after its second
                shutil.rmtree(f"run/{stage}")
                os.remove(f"run/state/{stage}-0000004.safetensors")
            resumed = train_tiny("run", device, "--resume")
            check("the same, stopped in each stage and resumed", relative(resumed, losses), 1e-4)
        finally:
            os.chdir(before)


def check_graphs():
    """Since counters.clear(), no CUDA graph was skipped. PyTorch skips one without a word and is as slow as before."""
    check("CUDA graphs skipped", counters["inductor"]["cudagraph_skips"], 0)


@torch.no_grad()
def logits(device):
    """Logits beside `transformers` in fp32; then in bf16 the errors of both, beside `transformers` in fp32."""
    for name in ("Llama-3.1", "Qwen2.5"):
        config, found = SMALL[name], {}
        ids = torch.randint(config.vocab_size, (2, 512), generator=torch.Generator().manual_seed(0)).to(device)
        for dtype in (torch.float32, torch.bfloat16):
            args = SimpleNamespace(device=torch.device(device), dtype=dtype)
            state = {key: t.to(device, dtype) for key, t in randomise(Transformer(config)).state_dict().items()}
            theirs = reference(config, args)
            theirs.load_state_dict(state, strict=False, assign=True)
            theirs.tie_weights()
            found[dtype] = with_weights(config, state)(ids), theirs.eval()(ids).logits
        (ours, theirs), (ours_16, theirs_16) = found.values()
        check(f"{name}, fp32 beside transformers", relative(ours, theirs), 1e-4)
        errors = [(narrow.float() - theirs).abs().mean() / theirs.abs().mean() for narrow in (ours_16, theirs_16)]
        check(f"{name}, error of bf16, beside that of transformers", (errors[0] / errors[1]).item(), 1.2)


def short_of_best(model, prompts, gate, replies):
    """How far the tokens of greedy replies are below the largest logit of a whole pass, as a share of the logits' size.
    0 if they are the same; above 0 only by rounding if two logits are as good as equal."""
    worst = 0.0
    for row, (prompt, reply) in enumerate(zip(prompts, replies)):
        ids = torch.tensor([prompt + reply], device=model.device)
        found = model(ids, gate[row:row + 1])[0, len(prompt) - 1:-1].double()
        chosen = found.gather(1, torch.tensor(reply, device=model.device)[:, None])
        worst = max(worst, ((found.max(-1, keepdim=True).values - chosen).max() / found.abs().max()).item())
    return worst


def mixture(device):
    """A small model with experts that matter, in fp32, three prompts of different lengths, and a gate for each."""
    torch.manual_seed(0)
    model = randomise(Transformer(SMALL["Llama-3.1"])).to(device)
    for tensor in with_experts(model):
        tensor.data.mul_(8)
    prompts = [torch.randint(320, (length,)).tolist() for length in (5, 9, 70)]
    return model, prompts, gates(3, "cpu").to(device)


@torch.no_grad()
def experts(device):
    """Gates, and decoding with a cache."""
    model, prompts, gate = mixture(device)
    ids = torch.randint(320, (3, 40), device=device)
    base = with_weights(model.config, {key: t for key, t in model.state_dict().items() if key[-2:] not in (".A", ".B")})
    check("without a gate, beside the base", relative(model(ids), base(ids)), 0)
    mixed, rows = model(ids, gate), range(len(gate))
    alone = torch.cat([model(ids[row:row + 1], gate[row:row + 1]) for row in rows])
    check("three gates in a batch, beside one by one", relative(mixed, alone), 1e-4)
    merged = [with_weights(model.config, dict(merged_tensors(model, gate[row])))(ids[row:row + 1]) for row in rows]
    check("three gates, beside weights merged for each", relative(mixed, torch.cat(merged)), 1e-4)
    replies = generate(model, prompts, gate, 40)
    check("decoding with a cache, beside whole passes", short_of_best(model, prompts, gate, replies), 1e-4)


@torch.no_grad()
def cuda_graph(device):
    """Decoding in which a step is a CUDA graph."""
    if torch.device(device).type != "cuda":
        raise UserError("a CUDA graph needs a GPU")
    model, prompts, gate = mixture(device)
    compile_decoding(model)
    counters.clear()
    replies = generate(model, prompts, gate, 40)
    check_graphs()
    check("decoding by CUDA graph, beside whole passes", short_of_best(model, prompts, gate, replies), 1e-4)
