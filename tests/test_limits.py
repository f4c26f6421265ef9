"""What happens while training, doors that stay shut, and numbers at their ends.

- a loss that is not a number, a device without memory, batches in which nothing is supervised
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

import synth
import train
from support import checkpoints
from support import command as command_module
from lora import EXPERTS, add_experts, expert_layers
from model import Config, Transformer, generate
from router import Router, contrastive_loss, query_ids
from support.chat import Chat, encode
from support.checkpoints import save_checkpoint
from support.files import UserError
from support.rows import batches, n_tokens
from train import Stage, fit, evaluation_loss, row_losses
import small
from conftest import ROOT
from test_teachers import asked, good, http_command, ids, serving  # noqa: F401 (asked is a fixture)
from test_train import base, router, settings, some_rows


# ----------------------------------------------------------------------------------------------------------------------
# What happens while training

@pytest.mark.parametrize("what", ["loss", "grad_norm"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_figure_that_is_no_number_ends_training_and_keeps_the_last_good_checkpoint(tmp_path, monkeypatch, what,
                                                                                     value):
    whole, s = train.metrics_to_floats, settings(steps=6, save_every=2, keep=1, batch=3)
    at = iter(range(1, 100))
    monkeypatch.setattr(train, "metrics_to_floats", lambda report: whole(report) | ({what: value} if next(at) == 5 else {}))
    rows = some_rows(30)
    with pytest.raises(UserError,
                       match=f"joint, step 5: the {what} is {value}.*joint-0000004.safetensors is kept.*--lr") as e:
        fit(Stage("joint", base(), router(), s), rows, s, tmp_path)
    order = batches([n_tokens(row) for row in rows], 3, [0, *b"joint"])
    fifth = [next(order) for _ in range(5)][4]
    assert str(e.value).endswith("look at this step's records: " + ", ".join(rows[i].id for i in fifth))
    assert [p.name for p in (tmp_path / "state").iterdir()] == ["joint-0000004.safetensors"]
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 4


def test_parameters_that_are_no_numbers_are_not_saved_over_good_ones(tmp_path):
    """A step may have a loss and make parameters of which the next has none."""
    s, task = settings(steps=4, save_every=2), Stage("router", None, router(), settings())
    fit(task, some_rows(10), settings(steps=2, save_every=2), tmp_path)
    before = small.contents(tmp_path / "state")
    with torch.no_grad():
        next(task.router.parameters())[0, 0] = torch.inf
    with pytest.raises(UserError, match="router, step 4: a parameter is NaN or infinite"):
        save_checkpoint(task, 4, s.keep, tmp_path)
    assert small.contents(tmp_path / "state") == before


@pytest.mark.parametrize("stage", ["warmup", "router", "joint"])
def test_memory_that_is_full_says_what_to_lower(tmp_path, monkeypatch, stage):
    """Raised where CUDA would: in the forward pass of a later step. Checkpoints made before it stay."""
    s, model = settings(steps=6, save_every=2, tokens=500), base() if stage != "router" else None
    task = Stage(stage, model, router() if stage != "warmup" else None, s)
    whole, calls = Stage.losses, []

    def losses(self, rows, tokens):
        calls.append(1)
        if (tmp_path / "state").exists():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has 79 GiB")
        return whole(self, rows, tokens)
    monkeypatch.setattr(Stage, "losses", losses)
    with pytest.raises(UserError, match=f"{stage}, step 3: .*memory is full .CUDA out of memory") as error:
        fit(task, some_rows(20), s, tmp_path)
    said = str(error.value)
    assert all(option in said for option in ("--tokens (now 500)", "--rank", "--recompute")) and "\n" not in said
    assert [p.stem for p in (tmp_path / "state").iterdir()] == [f"{stage}-0000002"]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries are left as they are")
def test_a_step_uses_the_memory_that_the_last_one_freed():
    said = subprocess.run([sys.executable, "-c", """
import resource, torch, train
train.keep_freed_memory()
for _ in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for size in (2**20, 2**22, 3 * 2**20):
        tensors = [torch.ones(size) for _ in range(8)]  # of 4 to 16 MiB
    del tensors
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)  # pages that the system had to hand out
"""], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    # a few pages more may be taken until all pieces have found a place, which differs with the addresses of a process
    first, *later = map(int, said)
    assert first > 10_000 and max(later) < first / 10 and later[-1] < 100, said


def test_memory_that_is_full_outside_of_training_is_one_line_too(monkeypatch):
    def main(argv):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 99 GiB\nmore")
    for run, words in ((main, "CUDA out"), (lambda argv: torch.empty(2**45), "")):  # the second: 140 TB on the CPU
        monkeypatch.setattr(train, "main", run)
        status, _, said = small.run_quietly(train)
        assert status == 2 and said.startswith(f"train.py: error: memory is full ({words}") and said.count("\n") == 1
        assert "--dtype bfloat16" in said


def test_streams_that_are_closed_or_lack_a_character_stop_nothing(monkeypatch):
    """`python train.py >&-`, and a terminal that is said to be ASCII."""
    def main():
        print("τ", file=sys.stdout)
        print("τ", file=sys.stderr)
        return len(sys.stdin.read())
    for streams in (dict.fromkeys(("stdin", "stdout", "stderr")), {
            "stdin": io.StringIO("12"), "stdout": io.TextIOWrapper(io.BytesIO(), "ascii"),
            "stderr": io.TextIOWrapper(io.BytesIO(), "ascii")}):
        for name, stream in streams.items():
            monkeypatch.setattr(sys, name, stream)
        with pytest.raises(SystemExit) as left:
            command_module.run_command(main)
        assert left.value.code == (0 if streams["stdin"] is None else 2)
    sys.stdout.flush()
    assert sys.stdout.buffer.getvalue() == b"\\u03c4\n"


def test_a_batch_without_supervised_tokens_is_skipped_and_counted(tmp_path, capsys):
    """Training is then that on the other rows, in their order; resumed, too."""
    s, rows = settings(steps=6, batch=2, save_every=3), some_rows(24)
    for i, row in enumerate(rows):
        row.prompt = len(row.ids) if i % 4 else row.prompt
    order = batches([n_tokens(row) for row in rows], 2, [0, *b"warmup"])
    want, skipped = [], 0
    while len(want) < 6:
        some = [rows[i].id for i in next(order) if not i % 4]
        want, skipped = want + ([some] if some else []), skipped + (not some)
    assert skipped
    for part in ("whole", "parts"):
        task, got = Stage("warmup", base(), s=s), []
        whole = task.step
        task.step = lambda batch, *a: got.append([row.id for row in batch]) or whole(batch, *a)
        if part == "parts":
            with pytest.raises(checkpoints.Stopped):
                fit(task, rows, s, tmp_path / part, stop=iter([False, True]).__next__)
        fit(task, rows, s, tmp_path / part)
        assert got == want
        assert f"warmup: skipped {skipped} batches without a supervised token" in capsys.readouterr().out
    for row in rows:
        row.prompt = len(row.ids)
    with pytest.raises(UserError, match="warmup: no record has a single supervised token"):
        fit(Stage("warmup", base(), s=s), rows, s, tmp_path / "none")


# ----------------------------------------------------------------------------------------------------------------------
# Certificates

@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A self-signed certificate for localhost, and its key."""
    if not shutil.which("openssl"):
        pytest.skip("openssl is not here to make a certificate with")
    at = tmp_path_factory.mktemp("tls")
    subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", at / "key.pem", "-out",
                    at / "cert.pem", "-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"],
                   check=True, capture_output=True)
    return at


@contextlib.contextmanager
def serving_tls(certificate):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate / "cert.pem", certificate / "key.pem")
    with serving(good) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        yield server


@pytest.mark.parametrize("trusted, host, why", [
    (False, "localhost", "localhost: its certificate is not valid .self.signed certificate"),
    (True, "127.0.0.1", "127.0.0.1: its certificate is not valid .IP address mismatch"), (True, "localhost", None)])
def test_a_servers_certificate_is_verified(asked, tmp_path, monkeypatch, certificate, trusted, host, why):  # noqa: F811
    """A real handshake. Nothing is sent to a server that nobody vouches for, the key least of all."""
    monkeypatch.setenv("MY_KEY", "sk-secret")
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate / "cert.pem" if trusted else tmp_path / "none.pem"))
    out = tmp_path / "o.jsonl"
    with serving_tls(certificate) as server:
        server.url = f"https://{host}:{server.server_port}/v1"
        command_module = http_command(server, asked, out, "--key-env", "MY_KEY", "--retries", 0)
        if why:
            with pytest.raises(UserError, match=why) as error:
                synth.main(command_module)
            assert not server.bodies and not server.headers and not ids(out) and "sk-secret" not in str(error.value)
        else:
            assert not synth.main(command_module) and len(ids(out)) == 12
            assert {headers["Authorization"] for headers in server.headers} == {"Bearer sk-secret"}


# ----------------------------------------------------------------------------------------------------------------------
# Numbers at their ends

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("limits") / "base"
    small.write_model(folder)
    return folder


def loaded(folder):
    torch.manual_seed(0)
    model = Transformer.from_pretrained(folder, torch.float32)
    add_experts(model, rank=2, alpha=4)
    for layer in expert_layers(model).values():
        torch.nn.init.normal_(layer.B, std=0.3)
    return model, Chat.from_dir(folder)


def test_a_gate_at_a_temperature_of_a_thousandth_is_one_expert_in_loss_and_reply(folder):
    """Similarities a hundredth apart are 10 apart at τ = 1e-3: e^-10. And its gradient is finite."""
    (model, chat), rows = loaded(folder), some_rows(6)
    for row in rows:
        row.ids, row.query = row.ids % 250, row.query % 250
    similarity = torch.linspace(-1, 1, 10).repeat(6, 1)[:, torch.randperm(10)].requires_grad_()
    r = Router(Transformer(Config(264, 16, 1, 2, 1, 8, 24, 1e-5, 1e4)), 1e-3)
    gate, one_hot = r.gate(similarity), torch.eye(10)[similarity.argmax(-1)]
    assert torch.equal(gate.detach(), one_hot) and torch.allclose(gate.sum(-1), torch.ones(6))
    assert np.array_equal(evaluation_loss(model, rows, gate.detach())[0], evaluation_loss(model, rows, one_hot)[0])
    (row_losses(model, rows, gate).sum() + contrastive_loss(similarity, one_hot, 1e-3)).backward()
    assert similarity.grad.isfinite().all()
    prompt = chat.prompt([{"role": "user", "content": "Hi"}])
    assert generate(model, [prompt], gate[:1].detach(), 5) == generate(model, [prompt], one_hot[:1], 5)


@pytest.mark.parametrize("stage", ["router", "joint"])
def test_a_stage_trains_at_a_temperature_of_a_thousandth(stage, tmp_path):
    s, r = settings(steps=4), router()
    r.temperature = 1e-3
    fit(Stage(stage, base(random_B=True) if stage == "joint" else None, r, s), some_rows(12), s, tmp_path)
    entries = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert all(np.isfinite(e["loss"]) and np.isfinite(e["grad_norm"]) and e["top1"] > 0.9 for e in entries)


@pytest.mark.parametrize("length", [1, 2, 150, 199])
def test_generation_ends_with_the_context(folder, length):
    """Prompts from one token to one less than the context of 200: prompt and reply together fill it and never pass it,
    a batch gives the same as its rows, and every token is what the whole model says of all before it."""
    model, _ = loaded(folder)
    gate, prompt = torch.eye(10)[3:4], torch.randint(250, (length,),
                                                     generator=torch.Generator().manual_seed(1)).tolist()
    reply, = generate(model, [prompt], gate, 1000)
    assert len(prompt) + len(reply) == model.context == 200
    row = torch.tensor([prompt + reply])
    logits = model(row[:, :-1], gate)[0, length - 1:]
    assert logits.gather(1, row[0, length:, None])[:, 0].sub(logits.max(-1).values).abs().max() < 1e-4  # the largest
    short = prompt[:1]
    assert generate(model, [prompt, short], gate, 1000) == [reply, generate(model, [short], gate, 1000)[0]]


@pytest.mark.parametrize("length", [200, 201, 5000])
def test_a_prompt_that_fills_the_context_is_refused(folder, length):
    with pytest.raises(UserError, match=f"a prompt has {length:,} tokens, and the model can read and write 200"):
        generate(loaded(folder)[0], [[1], [1] * length], None, 5)


def test_prompts_of_nothing_are_refused_and_empty_queries_are_read_as_a_space(folder):
    model, chat = loaded(folder)
    with pytest.raises(ValueError, match="at least one token"):
        generate(model, [[]], None, 5)
    assert query_ids(chat.tokenizer, "") == encode(chat.tokenizer, " ")
    assert generate(model, [chat.prompt([{"role": "user", "content": ""}])], None, 3)


@pytest.mark.parametrize("stage", ["warmup", "router", "joint"])
def test_a_batch_of_one_row_of_one_supervised_token_trains(stage, tmp_path):
    s, rows = settings(steps=3, batch=1), some_rows(1)
    rows[0].ids, rows[0].prompt, rows[0].query = rows[0].ids[:2], 1, rows[0].query[:1]
    task = Stage(stage, None if stage == "router" else base(), None if stage == "warmup" else router(), s)
    fit(task, rows, s, tmp_path)
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 3
    assert all(p.isfinite().all() for p in task.parameters())


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_twenty_thousand_steps_take_no_more_memory_and_no_more_time_each(tmp_path, monkeypatch, capsys):
    """Of the router stage, whose steps are the shortest; the loop is the same for all. A line of log for each step, a
    checkpoint every 1,000. Times are in steps of a task that is always new, taken every 20: the machine's speed drifts."""
    def resident():
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    torch.manual_seed(0)
    s = settings(steps=20_000, batch=2, save_every=1000, log_every=1000, tokens=64)

    def new():
        return Stage("router", None, Router(Transformer(Config(97, 8, 1, 1, 1, 8, 8, 1e-5, 1e4, tied=True))), s)
    task, memory, times, bare, began = new(), [], [], [], [time.process_time()]
    whole = task.step

    def step(*args):
        now = time.process_time()  # of the processor, whoever else uses it
        times.append(now - began[0])  # a whole round of the loop: step, log, order
        if len(times) % 20 == 0:
            fresh = new()
            fresh.step(*args)  # makes moments
            now = time.process_time()
            fresh.step(*args)
            bare.append(time.process_time() - now)
        if len(times) % 1000 == 0:
            memory.append(resident())
        began[0] = time.process_time()
        return whole(*args)
    task.step = step
    fit(task, some_rows(40), s, tmp_path)
    early, late = (np.median(times[part]) / np.median(bare[part.start // 20:part.stop // 20])
                   for part in (slice(1000, 4000), slice(17_000, 20_000)))
    with capsys.disabled():
        print(f"\n20,000 steps: {early:.2f} bare steps each early, {late:.2f} late; "
              f"{memory[1] / 2**20:.1f} MiB after 2,000 steps, {memory[-1] / 2**20:.1f} after 20,000")
    assert late < 1.3 * early and memory[-1] - memory[1] < 8 * 2**20
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 20_000
    assert threading.active_count() < 10 and EXPERTS
