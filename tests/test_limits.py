"""Laws of extremes and of what fails while training.

- losses that are NaN, full memory, batches in which no token is supervised
- certificates, with a real handshake against a server of our own
- gates of one expert, prompts of one token and of the whole context, 20,000 steps
"""
import contextlib
import io
import json
import platform
import resource
import shutil
import ssl
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch

import small
import synth
import train
from conftest import ROOT
from lora import add_experts, expert_layers
from model import Config, Transformer, generate
from router import Router, contrastive_loss, query_ids
from support.chat import Chat, encode
from support.checkpoints import save_checkpoint
from support.command import run_command
from support.files import UserError
from support.rows import batches, n_tokens
from test_teachers import asked, good, http_command, ids, serving  # noqa: F401 (asked is a fixture)
from test_train import STAGES, mixed_rows, new_stage, settings, some_rows
from train import Stage, evaluation_loss, fit, row_losses


def logged(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


# ----------------------------------------------------------------------------------------------------------------------
# What fails while training

@pytest.mark.parametrize("key", ["loss", "grad_norm"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_or_gradient_that_is_nan_or_infinite_stops_training_and_keeps_the_last_checkpoint(
        tmp_path, monkeypatch, key, value):
    """The message names the checkpoint and the records of the step."""
    original, s, rows = train.metrics_to_floats, settings(steps=6, save_every=2, keep=1, batch=3), some_rows(30)
    step = iter(range(1, 100))
    monkeypatch.setattr(train, "metrics_to_floats",
                        lambda metrics: original(metrics) | ({key: value} if next(step) == 5 else {}))
    order = batches([n_tokens(row) for row in rows], 3, [0, *b"joint"])
    fifth = [next(order) for _ in range(5)][4]
    with pytest.raises(UserError, match=f"joint, step 5: the {key} is {value}.*joint-0000004.safetensors is kept.*--lr"
                                        f".*this step's records: {', '.join(rows[i].id for i in fifth)}$"):
        fit(new_stage("joint", s), rows, s, tmp_path)
    assert [p.name for p in (tmp_path / "state").iterdir()] == ["joint-0000004.safetensors"]
    assert len(logged(tmp_path)) == 4


def test_parameters_that_are_infinite_are_not_saved(tmp_path):
    """A step with a finite loss can make parameters infinite; only the next loss would show it."""
    s = settings(steps=2, save_every=2)
    stage = new_stage("router", s)
    fit(stage, some_rows(10), s, tmp_path)
    before = small.contents(tmp_path / "state")
    with torch.no_grad():
        next(stage.router.parameters())[0, 0] = torch.inf
    with pytest.raises(UserError, match="router, step 4: a parameter is NaN or infinite"):
        save_checkpoint(tmp_path, stage, 4, s.keep)
    assert small.contents(tmp_path / "state") == before


@STAGES
def test_a_full_gpu_stops_training_with_the_options_to_lower(name, tmp_path, monkeypatch):
    """CUDA would raise this error in the forward pass. Checkpoints from before stay."""
    original, s = Stage.losses, settings(steps=6, save_every=2, tokens=500)

    def losses(self, rows, tokens):
        if (tmp_path / "state").exists():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has 79 GiB")
        return original(self, rows, tokens)
    monkeypatch.setattr(Stage, "losses", losses)
    with pytest.raises(UserError, match=f"{name}, step 3: .*memory is full .CUDA out of memory") as error:
        fit(new_stage(name, s), some_rows(20), s, tmp_path)
    said = str(error.value)
    assert all(option in said for option in ("--tokens (now 500)", "--rank", "--recompute", "--int8")) and "\n" not in said
    assert [p.stem for p in (tmp_path / "state").iterdir()] == [f"{name}-0000002"]


def test_full_memory_elsewhere_is_one_line(monkeypatch):
    def full_gpu(argv):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 99 GiB\nmore")
    for main, words in ((full_gpu, "CUDA out"), (lambda argv: torch.empty(2**45), "")):  # the second: 140 TB on the CPU
        monkeypatch.setattr(train, "main", main)
        status, _, said = small.run_quietly(train)
        assert status == 2 and said.startswith(f"train.py: error: memory is full ({words}") and said.count("\n") == 1
        assert "--dtype bfloat16" in said


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left as they are")
def test_training_on_a_cpu_makes_the_process_keep_freed_memory():
    """Then a step gets the memory that the step before it freed, without page faults."""
    faults = subprocess.run([sys.executable, "-c", """
import resource, torch, train
try:
    train.main("--preset tiny --run no-run --resume".split())  # is refused, but after the allocator was set
except train.UserError:
    pass
for _ in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for size in (2**20, 2**22, 3 * 2**20):
        tensors = [torch.ones(size) for _ in range(8)]  # of 4 to 16 MiB
    del tensors
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    # a few more pages may be needed until every block has found its place, which differs between processes
    first, *later = map(int, faults)
    assert first > 10_000 and max(later) < first / 10 and later[-1] < 100, faults


@pytest.mark.parametrize("closed", [True, False], ids=["closed", "ASCII"])
def test_streams_that_are_closed_or_lack_a_character_are_no_error(monkeypatch, closed):
    """Closed by `python train.py >&-`, or of a terminal that knows ASCII only."""
    def main():
        print("τ", file=sys.stdout)
        print("τ", file=sys.stderr)
        return len(sys.stdin.read())
    out = io.TextIOWrapper(io.BytesIO(), "ascii")
    for name, stream in (("stdin", io.StringIO("12")), ("stdout", out),
                         ("stderr", io.TextIOWrapper(io.BytesIO(), "ascii"))):
        monkeypatch.setattr(sys, name, None if closed else stream)
    with pytest.raises(SystemExit) as exit:
        run_command(main)
    out.flush()
    assert (exit.value.code, out.buffer.getvalue()) == ((0, b"") if closed else (2, b"\\u03c4\n"))


# ----------------------------------------------------------------------------------------------------------------------
# Certificates

@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A folder with a self-signed certificate for localhost, and its key."""
    if not shutil.which("openssl"):
        pytest.skip("openssl, which makes the certificate, is not installed")
    folder = tmp_path_factory.mktemp("tls")
    subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", folder / "key.pem", "-out",
                    folder / "cert.pem", "-days", "2", "-subj", "/CN=localhost",
                    "-addext", "subjectAltName=DNS:localhost"], check=True, capture_output=True)
    return folder


@pytest.mark.parametrize("trusted, host, why", [
    (False, "localhost", "localhost: its certificate is not valid .self.signed certificate"),
    (True, "127.0.0.1", "127.0.0.1: its certificate is not valid .IP address mismatch"), (True, "localhost", None)])
def test_a_servers_certificate_is_verified(asked, tmp_path, monkeypatch, certificate, trusted, host, why):  # noqa: F811
    """Nothing, and no key above all, is sent to a server whose certificate is not valid."""
    monkeypatch.setenv("MY_KEY", "sk-secret")
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate / "cert.pem" if trusted else tmp_path / "none.pem"))
    context, out = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), tmp_path / "o.jsonl"
    context.load_cert_chain(certificate / "cert.pem", certificate / "key.pem")
    with serving(good) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        server.url = f"https://{host}:{server.server_port}/v1"
        command = http_command(server, asked, out, "--key-env", "MY_KEY", "--retries", 0)
        with pytest.raises(UserError, match=why) if why else contextlib.nullcontext() as error:
            assert not synth.main(command)
    if why:
        assert not server.bodies and not server.headers and not ids(out) and "sk-secret" not in str(error.value)
    else:
        assert len(ids(out)) == 12
        assert {headers["Authorization"] for headers in server.headers} == {"Bearer sk-secret"}


# ----------------------------------------------------------------------------------------------------------------------
# Numbers at their limits

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model folder. A byte is a token, and the context is 200 tokens."""
    folder = tmp_path_factory.mktemp("limits") / "base"
    small.write_model(folder)
    return folder


def load_with_experts(folder):
    torch.manual_seed(0)
    model = Transformer.from_pretrained(folder, torch.float32)
    add_experts(model, rank=2, alpha=4)
    for layer in expert_layers(model).values():
        torch.nn.init.normal_(layer.B, std=0.3)
    return model


def test_a_gate_at_tau_one_thousandth_is_one_expert_in_loss_and_reply(folder):
    """Cosines that differ by a hundredth differ by 10 after division by τ, so the second weight is below e^-10. The
    gradient stays finite."""
    model, rows = load_with_experts(folder), some_rows(6)
    for row in rows:
        row.ids, row.query = row.ids % 250, row.query % 250
    similarity = torch.linspace(-1, 1, 10).repeat(6, 1)[:, torch.randperm(10)].requires_grad_()
    router = Router(Transformer(Config(264, 16, 1, 2, 1, 8, 24, 1e-5, 1e4)), 1e-3)
    gate, one_hot = router.gate(similarity), torch.eye(10)[similarity.argmax(-1)]
    assert torch.equal(gate.detach(), one_hot) and torch.allclose(gate.sum(-1), torch.ones(6))
    assert np.array_equal(evaluation_loss(model, rows, gate.detach())[0], evaluation_loss(model, rows, one_hot)[0])
    (row_losses(model, rows, gate).sum() + contrastive_loss(similarity, one_hot, 1e-3)).backward()
    assert similarity.grad.isfinite().all()
    prompt = Chat.from_dir(folder).prompt([{"role": "user", "content": "Hi"}])
    assert generate(model, [prompt], gate[:1].detach(), 5) == generate(model, [prompt], one_hot[:1], 5)


@pytest.mark.parametrize("name", ["router", "joint"])
def test_a_stage_trains_at_tau_one_thousandth(name, tmp_path):
    s = settings(steps=4)
    stage = new_stage(name, s, random_B=True)
    stage.router.temperature = 1e-3
    fit(stage, some_rows(12), s, tmp_path)
    assert all(np.isfinite([e["loss"], e["grad_norm"]]).all() and e["top1"] > 0.9 for e in logged(tmp_path))


@STAGES
def test_a_batch_of_one_row_with_one_supervised_token_trains(name, tmp_path):
    s, (row,) = settings(steps=3, batch=1), mixed_rows(1)
    row.ids, row.n_prompt, row.query = row.ids[:2], 1, row.query[:1]
    row.expert = 0 if name == "warmup" else None
    stage = new_stage(name, s)
    fit(stage, [row], s, tmp_path)
    assert len(logged(tmp_path)) == 3 and all(p.isfinite().all() for p in stage.parameters())


@pytest.mark.parametrize("length", [1, 2, 150, 199])
def test_generation_ends_where_the_context_is_full(folder, length):
    """Prompt and reply together have exactly as many tokens as the context. A batch gives the same replies as its rows
    alone, and every token has the largest logit, computed without a cache."""
    model, gate = load_with_experts(folder), torch.eye(10)[3:4]
    prompt = torch.randint(250, (length,), generator=torch.Generator().manual_seed(1)).tolist()
    reply, = generate(model, [prompt], gate, 1000)
    assert len(prompt) + len(reply) == model.context == 200
    row = torch.tensor([prompt + reply])
    logits = model(row[:, :-1], gate)[0, length - 1:]
    assert logits.gather(1, row[0, length:, None])[:, 0].sub(logits.max(-1).values).abs().max() < 1e-4
    short = prompt[:1]
    assert generate(model, [prompt, short], gate, 1000) == [reply, generate(model, [short], gate, 1000)[0]]


@pytest.mark.parametrize("length", [200, 201, 5000])
def test_a_prompt_that_fills_the_context_is_refused(folder, length):
    with pytest.raises(UserError, match=f"a prompt has {length:,} tokens, and the model can read and write 200"):
        generate(load_with_experts(folder), [[1], [1] * length], None, 5)


def test_empty_prompts_are_refused_and_empty_queries_are_read_as_a_space(folder):
    model, chat = load_with_experts(folder), Chat.from_dir(folder)
    with pytest.raises(ValueError, match="at least one token"):
        generate(model, [[]], None, 5)
    assert query_ids(chat.tokenizer, "") == encode(chat.tokenizer, " ")
    assert generate(model, [chat.prompt([{"role": "user", "content": ""}])], None, 3)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_twenty_thousand_steps_need_no_more_memory_and_no_more_time_per_step(tmp_path, monkeypatch, capsys):
    """These are steps of the router stage, which are the shortest; the loop is the same for all stages. Each writes a
    line of log, and every thousandth a checkpoint. The time of a step is divided by that of a step of a new stage,
    measured every 20 steps, since the machine's speed changes."""
    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()

    def new():
        return Stage("router", None, Router(Transformer(Config(97, 8, 1, 1, 1, 8, 8, 1e-5, 1e4, tied=True))), s)
    torch.manual_seed(0)
    s = settings(steps=20_000, batch=2, save_every=1000, log_every=1000, tokens=64)
    stage, memory, times, new_times, began = new(), [], [], [], [time.process_time()]
    original = stage.step

    def step(*args):
        times.append(time.process_time() - began[0])  # CPU time of a round of the loop: step, log, order of the data
        if len(times) % 20 == 0:
            fresh = new()
            fresh.step(*args)  # makes the moments
            now = time.process_time()
            fresh.step(*args)
            new_times.append(time.process_time() - now)
        if len(times) % 1000 == 0:
            memory.append(resident())
        began[0] = time.process_time()
        return original(*args)
    stage.step = step
    fit(stage, some_rows(40), s, tmp_path)
    early, late = (np.median(times[part]) / np.median(new_times[part.start // 20:part.stop // 20])
                   for part in (slice(1000, 4000), slice(17_000, 20_000)))
    with capsys.disabled():
        print(f"\n20,000 steps: a round takes {early:.2f} new stage's steps early, {late:.2f} late; "
              f"{memory[1] / 2**20:.1f} MiB after 2,000 steps, {memory[-1] / 2**20:.1f} after 20,000")
    assert late < 1.3 * early and memory[-1] - memory[1] < 8 * 2**20
    assert len(logged(tmp_path)) == 20_000 and threading.active_count() < 10
