"""Laws of random damage: valid files in which some bytes are changed, removed or added are read or refused.

The readers that the commands use are called in this process. Each returns a value that can be used or raises UserError;
there is no other exception, no crash, no hang, and no gigabyte of memory. The cases are the same every time.
"""
import json
import resource
import shutil
import sys
import time
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("hypothesis")
import hypothesis  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

import small  # noqa: E402
import train  # noqa: E402
from lora import EXPERTS, adapter_shape, add_experts, load_experts, save_experts  # noqa: E402
from model import Transformer, generate  # noqa: E402
from router import Router, load_router, query_ids, save_router  # noqa: E402
from support import checkpoints, output, prefer, review, runs  # noqa: E402
from support.chat import Chat, load_tokenizer  # noqa: E402
from support.feedback import read_feedback  # noqa: E402
from support.files import UserError  # noqa: E402
from support.measure import LoadedRun, read_likes  # noqa: E402
from support.records import load_data, read_queries, read_records, write_records  # noqa: E402
from support.rows import make_rows  # noqa: E402
from test_train import settings  # noqa: E402


def read_base(folder):
    """Load a base, encode, generate, and compute its fingerprint."""
    model, chat = Transformer.from_pretrained(folder, torch.float32), Chat.from_dir(folder)
    prompt = chat.prompt([{"role": "user", "content": "Hi <|eot_id|>"}])
    chat.text(generate(model, [prompt], max_new_tokens=2, stops=chat.stops)[0])
    runs.fingerprint(folder)


def read_encoder(folder):
    ids = query_ids(load_tokenizer(folder), "Hi there")
    model = Transformer.from_pretrained(folder, torch.float32)
    if len(ids) > (model.context or 512):
        raise UserError("the commands refuse this later")
    model.hidden(torch.tensor([ids]))


def open_run(run):
    """Do what eval.py does with a run's config.json."""
    unset = dict.fromkeys("base encoder data dtype int8 tau stage experts router".split())
    setup = LoadedRun(SimpleNamespace(run=str(run), device="cpu", tokens=64, **unset)).setup
    runs.differences(runs.read_run(run)["setup"], {"seed": 0})
    assert setup.rank >= 1 and setup.tau > 0


def read_sheet(file):
    prefer.compare(prefer.read_judgements([file])[2])


def read_key(file):
    read_sheet(file.parent / "sheet.csv")


def repair(file):
    output.repair_last_line(file)
    output.read_rejected(file, set())


@pytest.fixture(scope="module")
def targets(tmp_path_factory):
    """[(file to damage, its reader, what the reader is given, the file's bytes)] in folders with valid files."""
    at = tmp_path_factory.mktemp("fuzz")
    small.make(at)
    base, encoder, run = at / "base", at / "encoder", at / "run"
    model = Transformer.from_pretrained(base, torch.float32)
    add_experts(model, rank=2, alpha=4)
    router = Router(Transformer.from_pretrained(encoder, torch.float32))
    save_experts(model, at / "experts")
    save_router(router, at / "router")
    rows, _ = make_rows(small.records(6), tokenizer=load_tokenizer(encoder))
    s = settings(steps=2, batch=2, tokens=64)
    train.fit(train.Stage("router", None, Router(router.encoder), s), rows, s, run)

    def resume(run):
        checkpoints.load_latest_checkpoint(run, train.Stage("router", None, router, s))
        checkpoints.rewind_log(run, "router", 1)
    (run / "config.json").write_text(json.dumps({
        "version": runs.VERSION, "stages": {"router": {"steps": 2}, "joint": {"tau": 1.0}}, "fingerprints": {},
        "setup": {"preset": "tiny", "base": "{run}/base", "encoder": "{run}/encoder", "data": "{run}/data", "seed": 0,
                  "rank": 8, "alpha": 16.0}}))
    write_records(at / "data.jsonl", small.records(40))
    (at / "q.csv").write_text('id,query,domain\n1,"What, now?",work\n2,Why?,\n')
    (at / "q.txt").write_text("What now?\nWhy, then?\n")
    write_records(at / "q.jsonl", [{"query": "What?", "history": [{"role": "user", "content": "Hi"}]},
                                   {"query": "Why?"}])
    write_records(at / "rejected.jsonl", [{"id": "a", "query": "b", "reason": "c"}, {"id": "d", "reason": "e"}])
    ten = dict.fromkeys(EXPERTS, .1)
    write_records(at / "feedback.jsonl", [{"query": "What?", "similarity": ten, "gate": ten, "verdict": "good"}])
    write_records(at / "user.json", [{"likes": ten}])
    texts = {"message": "What?", "reply A": "=1", "reply B": "No."}
    for folder in (at, at / "key"):
        write_records(folder / "x.key.jsonl", [{"tau": 1.0}, *({"side": side, **texts} for side in "AB")])
        review.write_sheet(folder / "sheet.csv", ["id", *prefer.TEXTS, *prefer.COLUMNS], [
            [id, *(row[text] for text in prefer.TEXTS), "a", *"1234 5"]
            for id, row in prefer.read_key(folder / "x.key.jsonl")[1].items()])
    model_files = ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors")
    found = [(folder / file, reader, folder) for file in model_files
             for folder, reader in ((base, read_base), (encoder, read_encoder))]
    found += [(at / "experts" / EXPERTS[1] / file, lambda path: load_experts(model, path), at / "experts")
              for file in ("adapter_config.json", "adapter_model.safetensors")]
    found += [(at / "experts" / EXPERTS[0] / "adapter_config.json", adapter_shape, at / "experts")]
    found += [(at / "router" / file, lambda path: load_router(router, path), at / "router")
              for file in ("config.json", "model.safetensors")]
    found += [(run / "state/router-0000002.safetensors", resume, run), (run / "log.jsonl", resume, run),
              (run / "config.json", open_run, run)]
    found += [(at / name, reader, at / name) for name, reader in (
        ("data.jsonl", load_data), ("data/test.jsonl", read_records), ("q.csv", read_queries), ("q.txt", read_queries),
        ("q.jsonl", read_queries), ("rejected.jsonl", repair), ("feedback.jsonl", read_feedback),
        ("user.json", read_likes), ("sheet.csv", read_sheet), ("key/x.key.jsonl", read_key))]
    for _, reader, path in found:
        reader(path)  # it is valid before the damage
    return [(file, reader, path, file.read_bytes()) for file, reader, path in found]


PIECES = [b"", b"\0", b"\xff", b"9", b"-", b"1e999", b"NaN", b"null", b"[", b"{", b'"', b"\n", b"99999999", b"true",
          b"\\ud800"]
# (place as a share of the file, whether only its first 300 bytes are meant, how many bytes are removed, what is added)
EDIT = st.tuples(st.floats(0, 1, exclude_max=True), st.booleans(), st.sampled_from([0, 1, 1, 2, 8, 10**9]),
                 st.one_of(st.binary(min_size=1, max_size=2), st.sampled_from(PIECES)))


def edited(raw, edits):
    for share, early, removed, added in edits:
        at = int(share * (min(300, len(raw)) if early else len(raw)))
        raw = raw[:at] + added + raw[at + removed:]
    return raw


@pytest.mark.parametrize("cases", [500, pytest.param(2000, marks=pytest.mark.slow)])
def test_files_with_changed_bytes_are_read_or_refused(targets, cases, capsys):
    outcomes, slowest, peak = {"read": 0, "refused": 0}, 0.0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    @hypothesis.settings(max_examples=cases, derandomize=True, database=None, deadline=None,
                         suppress_health_check=list(hypothesis.HealthCheck))
    @hypothesis.given(st.integers(0, len(targets) - 1), st.lists(EDIT, min_size=1, max_size=3))
    def case(which, edits):
        nonlocal slowest
        file, reader, path, raw = targets[which]
        began = time.perf_counter()
        try:
            file.write_bytes(edited(raw, edits))
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
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 2**19  # KiB more than before this test


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss has other units elsewhere")
@pytest.mark.parametrize("key", ["hidden_size", "vocab_size", "num_hidden_layers", "intermediate_size",
                                 "num_attention_heads", "head_dim"])
def test_sizes_that_a_config_claims_take_no_memory(targets, tmp_path, key):
    """Some claim terabytes; the peak of this process grows by less than 100 MiB."""
    base = shutil.copytree(targets[0][2], tmp_path / "base")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    config = json.loads((base / "config.json").read_text())
    for value in (10**6, 2**31, 2**62, 10**30):
        (base / "config.json").write_text(json.dumps(config | {key: value}))
        with pytest.raises(UserError):
            read_base(base)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 2**10
