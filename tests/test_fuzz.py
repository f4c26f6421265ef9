"""Fed anything, at random: valid files, some of whose bytes are changed, cut out or put in, must be read or refused.

In-process, on the readers that every command goes through: what comes is a UserError or a value that can be used; no
other exception, no crash, no hang, no memory beyond a gigabyte. The cases are the same every time (derandomized).
"""
import functools
import json
import resource
import shutil
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given  # noqa: E402
from hypothesis import settings as how  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

import train  # noqa: E402
from support import checkpoints  # noqa: E402
from support import measure  # noqa: E402
from support import output  # noqa: E402
from support import records  # noqa: E402
from support import runs  # noqa: E402
from lora import adapter_shape, add_experts, load_experts, save_experts  # noqa: E402
from model import Transformer, generate  # noqa: E402
from router import Router, load_router, query_ids, save_router  # noqa: E402
from support.chat import Chat, load_tokenizer  # noqa: E402
from support.files import UserError  # noqa: E402
from support.records import read_queries, read_records, write_records  # noqa: E402
from support.rows import make_rows  # noqa: E402
import small  # noqa: E402
from test_train import settings  # noqa: E402


def use_model(folder):
    """All that is done with a base: load, encode, generate, measure."""
    model, chat = Transformer.from_pretrained(folder, torch.float32), Chat.from_dir(folder)
    prompt = chat.prompt([{"role": "user", "content": "Hi <|eot_id|>"}])
    chat.text(generate(model, [prompt], max_new_tokens=2, stops=chat.stops)[0])
    runs.fingerprint(folder)


def use_encoder(folder):
    ids = query_ids(load_tokenizer(folder), "Hi there")
    model = Transformer.from_pretrained(folder, torch.float32)
    if len(ids) > (model.context or 512):
        raise UserError("refused by what follows")
    model.hidden(torch.tensor([ids]))


@functools.cache
def base_with_experts(folder):
    model = Transformer.from_pretrained(folder, torch.float32)
    add_experts(model, rank=2, alpha=4)
    return model


@functools.cache
def some_router(folder):
    return Router(Transformer.from_pretrained(folder, torch.float32))


def use_checkpoint(run):
    """The state folder of a run: what --resume does."""
    task = train.Stage("router", None, some_router(str(run.parent / "w" / "encoder")), settings())
    checkpoints.load_latest_checkpoint(task, run)
    checkpoints.rewind_log(run, "router", 1)


def use_run(run):
    setup = measure.LoadedRun(SimpleNamespace(
        run=str(run), base=None, encoder=None, data=None, device="cpu", dtype=None, tokens=64, tau=None, stage=None,
        experts=None, router=None)).setup
    runs.differences(runs.read_run(run)["setup"], {"seed": 0})
    assert setup.rank >= 1 and setup.tau > 0


def read_and_mend(file):
    output.repair_last_line(file)
    output.read_rejected(file, set())


@pytest.fixture(scope="module")
def targets(tmp_path_factory):
    """[(file that is changed, reader, what it reads)] in folders with valid files."""
    at = tmp_path_factory.mktemp("fuzz")
    small.make(at / "w")
    world, found = at / "w", []
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"):
        found.append((world / "base" / file, use_model, world / "base"))
        found.append((world / "encoder" / file, use_encoder, world / "encoder"))
    model, router = base_with_experts(str(world / "base")), some_router(str(world / "encoder"))
    save_experts(model, at / "experts")
    save_router(router, at / "router")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        found.append((at / "experts" / "low_openness" / file, lambda path: load_experts(model, path), at / "experts"))
    found.append((at / "experts" / "high_openness" / "adapter_config.json", lambda path: adapter_shape(path),
                  at / "experts"))
    for file in ("config.json", "model.safetensors"):
        found.append((at / "router" / file, lambda path: load_router(router, path), at / "router"))
    s = settings(steps=2, batch=2, tokens=64)
    rows, _ = make_rows(small.records(6), tokenizer=load_tokenizer(world / "encoder"))
    train.fit(train.Stage("router", None, Router(router.encoder), s), rows, s, at / "run")
    config = {"version": runs.VERSION, "stages": {"router": {"steps": 2}, "joint": {"tau": 1.0}}, "fingerprints": {}, "setup": {
        "preset": "tiny", "base": "{run}/base", "encoder": "{run}/encoder", "data": "{run}/data", "seed": 0,
        "rank": 8, "alpha": 16.0}}
    (at / "run" / "config.json").write_text(json.dumps(config))
    found += [(at / "run/state/router-0000002.safetensors", use_checkpoint, at / "run"),
              (at / "run/log.jsonl", use_checkpoint, at / "run"), (at / "run/config.json", use_run, at / "run")]
    write_records(at / "data.jsonl", small.records(40))
    found.append((at / "data.jsonl", lambda path: records.load_data(path), at / "data.jsonl"))
    found.append((world / "data" / "test.jsonl", lambda path: read_records(path), world / "data" / "test.jsonl"))
    (at / "q.csv").write_text('id,query,domain\n1,"What, now?",work\n2,Why?,\n')
    (at / "q.txt").write_text("What now?\nWhy, then?\n")
    write_records(at / "q.jsonl", [{"query": "What?", "history": [{"role": "user", "content": "Hi"}]},
                                   {"query": "Why?"}])
    found += [(at / name, lambda path: read_queries(path), at / name) for name in ("q.csv", "q.txt", "q.jsonl")]
    write_records(at / "r.rejected.jsonl", [{"id": "a", "query": "b", "reason": "c"}, {"id": "d", "reason": "e"}])
    found.append((at / "r.rejected.jsonl", read_and_mend, at / "r.rejected.jsonl"))
    for file, reader, path in found:
        reader(path)  # whole so far
    return [(file, reader, path, file.read_bytes()) for file, reader, path in found]


PIECES = [b"", b"\0", b"\xff", b"9", b"-", b"1e999", b"NaN", b"null", b"[", b"{", b'"', b"\n", b"99999999", b"true",
          b"\\ud800"]
# (place as a share of the file, or of its first 300 bytes; how many bytes go; what comes)
change = st.tuples(st.floats(0, 1, exclude_max=True), st.booleans(), st.sampled_from([0, 1, 1, 2, 8, 10**9]),
                   st.one_of(st.binary(min_size=1, max_size=2), st.sampled_from(PIECES)))


def changed(raw, edits):
    for share, early, gone, comes in edits:
        at = int(share * (min(300, len(raw)) if early else len(raw)))
        raw = raw[:at] + comes + raw[at + gone:]
    return raw


@pytest.mark.parametrize("cases", [500, pytest.param(2000, marks=pytest.mark.slow)])
def test_files_with_changed_bytes_are_read_or_refused(targets, cases, capsys):
    outcomes, slowest, peak = {"read": 0, "refused": 0}, 0.0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    @how(max_examples=cases, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.integers(0, len(targets) - 1), st.lists(change, min_size=1, max_size=3))
    def case(which, edits):
        nonlocal slowest
        file, reader, path, raw = targets[which]
        began = time.perf_counter()
        try:
            file.write_bytes(changed(raw, edits))
            reader(path)
            outcomes["read"] += 1
        except UserError as error:
            assert str(error).strip()
            outcomes["refused"] += 1
        finally:
            file.write_bytes(raw)
            slowest = max(slowest, time.perf_counter() - began)
    case()
    assert outcomes["refused"] > cases / 4 and outcomes["read"] > cases / 50, outcomes
    assert slowest < 20, slowest
    if sys.platform.startswith("linux"):
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 2**19  # KiB beyond what tests before took


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss has other units elsewhere")
def test_no_size_that_a_file_claims_takes_memory(targets, tmp_path):
    """Headers and configs that speak of terabytes: the peak of this process does not move by 100 MB."""
    base = Path(shutil.copytree(targets[0][2], tmp_path / "base"))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    good = json.loads((base / "config.json").read_text())
    for key in ("hidden_size", "vocab_size", "num_hidden_layers", "intermediate_size", "num_attention_heads",
                "head_dim"):
        for value in (10**6, 2**31, 2**62, 10**30):
            (base / "config.json").write_text(json.dumps(good | {key: value}))
            with pytest.raises(UserError):
                use_model(base)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 2**10
