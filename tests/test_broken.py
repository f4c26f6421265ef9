"""Laws of broken input: every file and argument that a user can supply, broken in every way that happens.

BROKEN has a row for each way. Each ends in exit status 2 and one message on standard error, without a traceback, and
every file stays as it was. These rows go through whole commands. More that a reader refuses is in the tests of that
reader: test_model.py (model folders), test_lora.py (adapters), test_router.py (routers), test_records.py and
test_teachers.py (records, replies), test_benchmarks.py, test_review.py. Options are in test_command.py and
test_commands.py.
"""
import ast
import contextlib
import json
import pickle
import re
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import eval as evaluation
import small
import synth
import train
from conftest import ROOT
from lora import EXPERTS
from support.files import UserError, atomic

trained = {}


@pytest.fixture
def world(tmp_path_factory, monkeypatch):
    """The working directory: a copy of base/, encoder/, data/ and a complete run/ on them."""
    if not trained:
        trained["folder"] = folder = tmp_path_factory.mktemp("world")
        small.make(folder)
        with contextlib.chdir(folder):
            status, _, said = small.run_quietly(train, *small.TRAIN)
            assert status == 0, said
    here = tmp_path_factory.mktemp("here") / "w"
    shutil.copytree(trained["folder"], here)
    monkeypatch.chdir(here)
    return here


# ----------------------------------------------------------------------------------------------------------------------
# Ways to break a file: each takes what it writes and returns damage(path)

def nothing(path):
    pass


def gone(path):
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def cut(part):
    return lambda path: path.write_bytes(path.read_bytes()[:int(part * path.stat().st_size)])


def torn(path):
    """The last line is not complete."""
    path.write_bytes(path.read_bytes()[:-20])


def content(raw):
    return lambda path: path.write_bytes(raw)


def replaced(pattern, new):
    return lambda path: path.write_bytes(re.sub(pattern, new, path.read_bytes()))


def config(**changes):
    """A JSON file has other values; None removes a key."""
    def damage(path):
        found = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({k: v for k, v in found.items() if v is not None}))
    return damage


def without_int8(path):
    """config.json of a run that was made before there was --int8."""
    found = json.loads(path.read_text())
    del found["setup"]["int8"]
    path.write_text(json.dumps(found))
    gone(path.parent / "joint")


def tensor(name, change):
    """One tensor of a safetensors file is another."""
    def damage(path):
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        state = load_file(path)
        state[name] = change(state[name])
        path.unlink()  # `state` is mapped to the old file
        save_file(state, path, metadata)
    return damage


def number(value, index=0):
    """One number of a tensor is another."""
    def change(t):
        t.view(-1)[index] = value
        return t
    return change


def header(change):
    """The header of a safetensors file is another; the bytes after it stay."""
    def damage(path):
        raw = path.read_bytes()
        end = 8 + int.from_bytes(raw[:8], "little")
        found = json.loads(raw[8:end])
        change(found)
        found = json.dumps(found).encode()
        path.write_bytes(len(found).to_bytes(8, "little") + found + raw[end:])
    return damage


def sharded(change):
    """The model is in two shards with an index; then change(folder, index) breaks them."""
    def damage(path):
        state, weight_map = load_file(path), {}
        names = sorted(state)
        for file, part in (SHARD.replace("2-of", "1-of"), names[:4]), (SHARD, names[4:]):
            save_file({name: state[name] for name in part}, path.with_name(file))
            weight_map |= dict.fromkeys(part, file)
        path.unlink()
        index = {"weight_map": weight_map}
        change(path.parent, index)
        path.with_name("model.safetensors.index.json").write_text(json.dumps(index))
    return damage


def records(which=slice(None), **changes):
    """Some of the records have other values; by default all."""
    def damage(path):
        lines = path.read_text().splitlines()
        lines[which] = [json.dumps(json.loads(line) | changes) for line in lines[which]]
        path.write_text("\n".join(lines) + "\n")
    return damage


def more_tokens(path):
    """The tokenizer has nine tokens more than the model."""
    found = json.loads(path.read_text())
    for i in range(9):
        found["added_tokens"].append(found["added_tokens"][-1] | {"id": 300 + i, "content": f"<|more{i}|>"})
    path.write_text(json.dumps(found))


def other_base(path):
    """Another model of the same shape."""
    shutil.rmtree(path, ignore_errors=True)
    small.write_model(path, seed=7)


def checkpoint(damage):
    """The joint stage is as it was before its end, and its last checkpoint is broken."""
    def both(path):
        gone(path)
        damage(path.parent / "state" / "joint-0000004.safetensors")
    return both


class Trap:
    """A pickle that runs code when it is opened."""
    def __reduce__(self):
        return open, ("opened-a-pickle", "w")


PICKLE = pickle.dumps(Trap())
Q = "model.layers.0.self_attn.q_proj.weight"
LORA = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
SHARD = "model-00002-of-00002.safetensors"
SECOND = slice(1, 2)
WARMUP = [*small.TRAIN, "--stage", "warmup", "--run", "new"]
ROUTER = [*small.TRAIN, "--stage", "router", "--run", "new"]
ASK = ["ask", "--run", "run", "Hi", "--max-new-tokens", "2"]
RESUME, OVERWRITE = [*small.TRAIN, "--resume"], [*small.TRAIN, "--overwrite"]
MODEL, DATA, RUN = "base/model.safetensors", "data/train.jsonl", "run/config.json"
EXPERT, ROUTED = f"run/joint/experts/{EXPERTS[0]}", "run/joint/router/model.safetensors"
ADAPTER, ADAPTER_CONFIG = f"{EXPERT}/adapter_model.safetensors", f"{EXPERT}/adapter_config.json"
WARMED, STATE = ADAPTER.replace("joint", "warmup"), "run/state/joint-0000004.safetensors"

BROKEN = {  # (program, arguments, file or folder): {how it is broken: (damage, *words of the message)}
    "weights": (train, WARMUP, MODEL, {
        "truncated": (cut(.8), f"{MODEL}: not a whole safetensors file", "download"),
        "empty": (cut(0), f"{MODEL}: not a whole"),
        "header of absurd length": (content(b"\xff" * 100), f"{MODEL}: not a whole"),
        "header with a wrong size": (header(lambda h: h[Q].update(shape=[16, 8])), f"{MODEL}: not a whole"),
        "offsets beyond the end": (header(lambda h: h[Q].update(data_offsets=[0, 2**62])), f"{MODEL}: not a whole"),
        "offsets that overlap": (header(lambda h: h[Q].update(data_offsets=[0, 1024])), f"{MODEL}: not a whole"),
        "a pickle under this name": (content(PICKLE), f"{MODEL}: not a whole"),
        "a pickle": (lambda path: (path.unlink(), path.with_name("pytorch_model.bin").write_bytes(PICKLE)),
                     "found only pickled weights (pytorch_model.bin), which can run code"),
        "NaN": (tensor(Q, number(torch.nan, 3)), f"{MODEL}: {Q} has values that are NaN"),
        "Inf": (tensor(Q, number(-torch.inf, -1)), f"{MODEL}: {Q} has values that are NaN or infinite"),
        "a value beyond float32": (tensor(Q, lambda t: number(1e300)(t.double())),
                                   f"{MODEL}: {Q} has values that are NaN or infinite as float32"),
        "a missing shard": (sharded(lambda folder, index: gone(folder / SHARD)), f"{SHARD}: no such file", "download"),
        "a truncated shard": (sharded(lambda folder, index: cut(.9)(folder / SHARD)), f"{SHARD}: not a whole"),
        "an index that leaves the folder": (sharded(lambda folder, index: index["weight_map"].update({Q: "../x"})),
                                            "index.json: ", "'../x', expected the name of a file in this folder"),
        "an index with an absolute path": (sharded(lambda folder, index: index["weight_map"].update({Q: "/etc/x"})),
                                           "index.json: ", "'/etc/x', expected the name of a file"),
        "an index whose map is a list": (sharded(lambda folder, index: index.update(weight_map=[1])),
                                         "index.json: no weight_map")}),
    "model config": (train, WARMUP, "base/config.json", {
        "another width": (config(hidden_size=32), f"{MODEL}: ", "(264, 16), expected (264, 32)"),
        "more layers than weights": (config(num_hidden_layers=2), f"{MODEL}: ", "the first is model.layers.1."),
        "an infinite epsilon": (config(rms_norm_eps=float("inf")), "rms_norm_eps is inf"),
        "theta NaN": (config(rope_theta=float("nan")), "rope_theta is nan"),
        "scaling by zero": (config(rope_scaling={
            "rope_type": "llama3", "factor": 0.0, "low_freq_factor": 1, "high_freq_factor": 4,
            "original_max_position_embeddings": 64}), "config.json: factor is 0.0, expected a positive number"),
        "an end token in words": (config(eos_token_id="</s>"), "eos_token_id is ['</s>']"),
        "cut": (cut(.5), "base/config.json: not readable as JSON"),
        "100,000 brackets": (content(b"[" * 10**5), "base/config.json: not readable as JSON")}),
    "encoder": (train, ROUTER, "encoder/model.safetensors", {
        "cut": (cut(.5), "encoder/model.safetensors: not a"),
        "NaN": (tensor(Q, number(torch.nan)), f"{Q} has values that are NaN")}),
    "tokenizer": (train, WARMUP, "base/tokenizer.json", {
        "another family's": (lambda path: shutil.copy("encoder/tokenizer.json", path),
                             "tokenizer.json: 259, eos_token_id of config.json", "another model's tokenizer?"),
        "more tokens than embeddings": (more_tokens, "has the id", "264", "another model's tokenizer?"),
        "none": (gone, "base/tokenizer.json: no such file"),
        "torn": (cut(.5), "base/tokenizer.json: not a tokenizer"),
        "without chat tokens": (replaced(b"eot_id", b"the_end"), "base: ", "has neither Llama 3's chat tokens")}),
    "encoder's tokenizer": (train, ROUTER, "encoder/tokenizer.json", {
        "an id beyond the embeddings": (replaced(rb'"A": *\d+', b'"A": 9999'), "'A' has the id 9999")}),
    "chat template": (train, WARMUP, "base/tokenizer_config.json", {
        "a number": (config(chat_template=5), "chat_template is 5, expected text")}),
    "chat template file": (train, WARMUP, "base/chat_template.jinja", {
        "not UTF-8": (content(b"\xff\xfe"), "not readable as text")}),
    "adapter": (evaluation, ASK, ADAPTER, {
        "cut": (cut(.5), f"{ADAPTER}: not a whole"),
        "NaN": (tensor(LORA, number(torch.nan)), f"{ADAPTER}: {LORA} has values that are NaN"),
        "integers": (tensor(LORA, lambda t: t.long()), f"{LORA} is I64, expected"),
        "a pickle": (content(PICKLE), f"{ADAPTER}: not a whole")}),
    "adapter's config": (evaluation, ASK, ADAPTER_CONFIG, {
        "target_modules a list of lists": (config(target_modules=[["q_proj"]]), "target_modules is")}),
    "adapter by --experts": (evaluation, [*ASK, "--experts", "run/joint/experts"], ADAPTER_CONFIG, {
        "a rank in words": (config(r="two"), f"{ADAPTER_CONFIG}: r is 'two' and lora_alpha 16, expected")}),
    "warm-up's adapter": (train, RESUME, WARMED, {
        "cut": (lambda path: (gone(path.parents[3] / "joint"), cut(.5)(path)), f"{WARMED}: not a whole")}),
    "router": (evaluation, ASK, ROUTED, {
        "cut": (cut(.5), f"{ROUTED}: not a whole"),
        "NaN": (tensor("expert_embeddings", number(torch.nan)), "expert_embeddings has values that are NaN"),
        "nine experts": (tensor("expert_embeddings", lambda t: t[:9].clone()), "(9, 16), expected (10, 16)")}),
    "records": (train, WARMUP, DATA, {
        "a torn last line": (torn, f"{DATA}, line 40: not JSON", "torn"),
        "100,000 brackets": (lambda path: path.write_bytes(b"[" * 10**5 + b"\n" + path.read_bytes()),
                             f"{DATA}, line 1: not JSON"),
        "UTF-16": (lambda path: path.write_bytes(path.read_text().encode("utf-16")), f"{DATA}, line 1: not UTF-8"),
        "all too long": (records(response="so " * 50), "data: no record is short enough", "--tokens"),
        "all zero": (records(traits={"openness": 0}), "data: no records with an active trait for train")}),
    "one record": (train, [*WARMUP, "--data", DATA], DATA, {
        "as the only file": (lambda path: path.write_text(path.read_text().split("\n")[0]),
                             f"{DATA}: no records with an active trait for")}),
    "test records": (train, WARMUP, "data/test.jsonl", {"none": (gone, "data/test.jsonl: No such file")}),
    "test records of ablate": (evaluation, ["ablate", "--run", "run"], "data/test.jsonl", {
        "too long": (records(SECOND, response="so " * 100), "record 'r1' has ", "the base reads 200")}),
    "queries": (synth, "--teacher local --model base --queries q.jsonl --out o.jsonl".split(), "q.jsonl", {
        "a number": (content(b'{"query": 5}\n'), "q.jsonl, line 1: query is 5")}),
    "messages of prefer": (evaluation, ["prefer", "--run", "run", "--file", "m.jsonl"], "m.jsonl", {
        "none": (nothing, "m.jsonl: No such file"),
        "torn": (content(b'{"query": "Hi"}\n{"qu'), "m.jsonl, line 2: not JSON", "torn"),
        "beyond the context": (content(b'{"query": "%b"}\n' % (b"so " * 100)), "a prompt has ", "200", "shorten it")}),
    "sheet of prefer": (evaluation, ["prefer", "--run", "run", "--import", "a.csv"], "a.csv", {
        "none": (nothing, "a.csv: No such file"), "empty": (content(b""), "a.csv: not a table"),
        "UTF-16": (content("id\nk1-1\n".encode("utf-16")), "a.csv: not UTF-8"),
        "without its key": (content(b"id\nk1-1\n"), "a.csv: its first id is 'k1-1', and no .key.jsonl in its folder")}),
    "records of report": (synth, ["report", DATA], DATA, {
        "without keys": (content(b"{}\n"), f"{DATA}, line 1: no 'id'")}),
    "synth's output": (synth, ["--count", "20", "--out", "o.jsonl", "--overwrite"], "o.jsonl", {
        "a folder": (lambda path: (path.mkdir(), (path / "x").touch()), "o.jsonl is a folder, expected a file")}),
    "run to measure": (evaluation, ASK, RUN, {
        "none": (gone, "run: no config.json"),
        "another version's": (config(version=99), f"{RUN}: version is 99, expected 4"),
        "setup incomplete": (config(setup={"preset": "tiny"}), f"{RUN}: data is None, expected "),
        "a stage that is a list": (config(stages={"joint": []}), f"{RUN}: joint is [], expected "),
        "a stage that is null": (config(stages={"warmup": None}), f"{RUN}: warmup is None, expected "),
        "a stage of no run": (config(stages={"polish": 1}), f"{RUN}: 'polish' is no setting or stage")}),
    "run to resume": (train, RESUME, RUN, {
        "cut": (cut(.5), f"{RUN}: not readable as JSON"),
        "another version's": (config(version=99), f"{RUN}: version is 99, expected 4"),
        "without a version": (content(b"{}"), f"{RUN}: not a run's")}),
    "no run to resume": (train, [*RESUME, "--run", "none"], "none", {
        "no folder": (nothing, "none: no config.json, so there is no run to resume"),
        "empty folder": (lambda path: path.mkdir(), "none: no config.json, so there is no run to resume")}),
    "a model folder as --run": (evaluation, ["ask", "--run", "base", "Hi"], RUN, {
        "": (nothing, "base/config.json: not a run's")}),
    "another base to measure": (evaluation, ASK, "base", {
        "same name": (other_base, "base: not the base that run was trained on")}),
    "another --base": (evaluation, [*ASK, "--base", "other"], "other", {
        "same shape": (other_base, "other: not the base that run was trained on")}),
    "another encoder": (evaluation, ASK, "encoder/config.json", {
        "other theta": (config(rope_theta=5e4), "encoder: not the encoder that run was trained on")}),
    "another base to resume": (train, RESUME, "base", {
        "same name": (other_base, "base: not the base that run was started with")}),
    "another chat template": (train, RESUME, "base/tokenizer_config.json", {
        "": (config(chat_template="x"), "base: not the base that run was started with")}),
    "other data to resume": (train, RESUME, DATA, {
        "a response": (records(SECOND, response="Never."), "data: not the data that run was started with")}),
    "weights to keep in 8 bits": (train, [*WARMUP, "--int8"], MODEL, {
        "NaN": (tensor(Q, number(torch.nan)), f"{MODEL}: {Q} has values that are NaN or infinite as float32"),
        "infinite": (tensor(Q, number(-torch.inf, 3)), f"{MODEL}: {Q} has values that are NaN")}),
    "run of before --int8": (train, [*RESUME, "--int8"], RUN, {
        "": (without_int8, "int8 was False and is now True")}),
    "another dtype": (train, [*RESUME, "--dtype", "bfloat16"], "run/joint", {
        "": (gone, "dtype was 'float32' and is now 'bfloat16'")}),
    "checkpoint": (train, [*RESUME, "--stage", "joint"], "run/joint", {
        "cut": (checkpoint(cut(.5)), f"{STATE}: not a whole", "goes on from joint-0000002"),
        "no step": (checkpoint(header(lambda h: h.pop("__metadata__"))), f"{STATE}: step is ''"),
        "NaN": (checkpoint(tensor("3.exp_avg", number(torch.nan))), f"{STATE}: parameter 3 has values", "remove this file"),
        "another shape": (checkpoint(tensor("2.exp_avg", lambda t: t[:1].clone())),
                          f"{STATE}: parameter 2 does not fit")}),
    "overwrite, records": (train, OVERWRITE, DATA, {"torn": (torn, f"{DATA}, line 40: not JSON", "torn")}),
    "overwrite, weights": (train, OVERWRITE, MODEL, {
        "NaN": (tensor(Q, number(torch.nan, 3)), f"{Q} has values that are NaN")}),
    "overwrite, rank": (train, [*OVERWRITE, "--rank", "999"], DATA, {"999": (nothing, "--rank is 999, expected at")}),
    "overwrite, tokens": (train, [*OVERWRITE, "--tokens", "5"], DATA, {"5": (nothing, "no record is short")}),
    "overwrite, loss": (train, [*OVERWRITE, "--stage", "router", "--router-lr", "2e9"], DATA, {
        "NaN": (nothing, "training ends here; no checkpoint is kept")}),
    "rank beyond the width": (train, [*WARMUP, "--rank", "999"], DATA, {
        "999": (nothing, "--rank is 999, expected at")}),
    "batch beyond memory": (train, [*WARMUP, "--batch", "2000000000"], DATA, {
        "2e9": (nothing, "--batch is 2000000000")}),
    "feedback": (evaluation, ["feedback", "--run", "run", "--file", "f.jsonl"], "f.jsonl", {
        "none": (nothing, "f.jsonl: No such file"), "empty": (content(b""), "f.jsonl: no verdicts in it"),
        "a torn line": (content(b'{"query": "Hi", "ver'), "f.jsonl, line 1: not JSON", "torn"),
        "records": (content(b'{"id": "1", "query": "Hi", "traits": {}}'), "f.jsonl, line 1: no 'similarity', expected"),
        "a list": (content(b"[1]"), "f.jsonl, line 1: found a list, expected a JSON object"),
        "no weights": (content(b'{"query": "Hi", "similarity": null, "verdict": "good", "gate": {}}'),
                       "f.jsonl, line 1: gate is {}", "expected ten weights, which sum to 1")}),
    "user": (evaluation, [*ASK, "--user", "user.json"], "user.json", {
        "none": (nothing, "user.json: no such file"),
        "torn": (content(b'{"likes": {"hi'), "user.json: not readable as JSON"),
        "a list": (content(b"[]"), "user.json: found a list, expected a JSON object"),
        "no likes": (content(b"{}"), "user.json: no 'likes'"),
        "too much": (content(json.dumps({"likes": dict.fromkeys(EXPERTS, 9)}).encode()),
                     "user.json: likes is", "expected a number from -0.5 to 0.5 for each expert's name")}),
    "gate": (evaluation, [*ASK, "--gate", ",".join(["0"] * 11)], DATA, {"eleven weights": (nothing, "--gate '0,0")}),
    "query beyond the context": (evaluation, ["ask", "--run", "run", "so " * 100], DATA, {
        "300 tokens": (nothing, "a prompt has ", "200", "shorten it")}),
}
CASES = {f"{what}: {how}": (program, argv, name, damage, words) for what, (program, argv, name, cases) in BROKEN.items()
         for how, (damage, *words) in cases.items()}


@pytest.mark.parametrize("case", CASES)
def test_broken_input_ends_in_one_message_and_loses_nothing(case, world):
    """Every file is unchanged; after --overwrite it may be in the folder that the old run was moved to. No weights and
    no temporary files are added."""
    program, argv, name, damage, words = CASES[case]
    damage(world / name)
    before = small.contents(world)
    status, _, said = small.run_quietly(program, *argv)
    after = small.contents(world)
    assert status == 2 and said.startswith(f"{program.__name__}.py: error: ") and "Traceback" not in said, said
    assert all(word in said for word in words) and said.count("\n") == 1, said
    moved = {name.replace("run.replaced-1/", "run/", 1): raw for name, raw in after.items() if "--overwrite" in argv}
    assert {name for name, raw in before.items() if raw not in (after.get(name), moved.get(name))} == set()
    assert not any(name.endswith((".safetensors", ".~part")) for name in after.keys() - before.keys()
                   if not name.startswith("run.replaced-1/")) and "opened-a-pickle" not in after


@pytest.mark.parametrize("damage", [
    lambda path: path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes()),
    lambda path: path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n")),
    records(SECOND, response="so " * 350_000), records(SECOND, query="so " * 1000), records(SECOND, traits={})],
    ids=["BOM", "CRLF", "a record of a megabyte", "a query beyond the context", "one all-zero record"])
def test_records_that_can_be_read_are_trained_on(world, damage):
    """Records that are too long and records without an active trait are left out and counted."""
    damage(world / DATA)
    status, shown, said = small.run_quietly(train, *WARMUP)
    assert status == 0, said
    text = (world / DATA).read_text()
    assert ("left out 1 of 40 records, longer than 150 tokens" in shown) == ("so so so so" in text)
    assert ("left out 1 records whose traits are all zero" in shown) == ('"traits": {}' in text)


# ----------------------------------------------------------------------------------------------------------------------
# No file is run, and no folder is lost

def test_no_module_runs_code_from_a_file_or_starts_a_program():
    """No module has pickle, eval or a shell among its calls and imports, and of jinja2 only the sandbox, for chat
    templates."""
    calls = {"eval", "exec", "compile", "__import__", "system", "popen", "Popen", "check_output", "import_module",
             "extractall", "torch.load", "torch.save", "np.load"}
    allowed = {"re.compile", "torch.compile", "block.compile"}  # the last is torch.nn.Module.compile
    modules = {"pickle", "jinja2", "yaml", "marshal", "shelve", "subprocess", "dill", "joblib"}
    sandbox = {"ImmutableSandboxedEnvironment", "TemplateError", "Extension", "loopcontrols"}
    for file in (*ROOT.glob("*.py"), *ROOT.glob("support/*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            where = f"{file.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called in allowed or not {called, called.rpartition(".")[2]} & calls, f"{where}: {called}"
            elif isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [alias.name for alias in node.names]
                if file.name == "chat.py" and str(getattr(node, "module", "")).startswith("jinja2"):
                    assert sandbox.issuperset(names), where
                    continue
                names.append(getattr(node, "module", None) or "")
                assert not {name.split(".")[0] for name in names} & modules, where


def test_a_kill_between_the_two_renames_of_a_folder_loses_neither(tmp_path):
    """The next write puts the old folder back, and keeps it if that write fails."""
    for name in ("old", "new"):
        with atomic(tmp_path / "folder") as part:
            part.mkdir()
            (part / name).touch()
    (tmp_path / "folder").rename(tmp_path / "folder.~old")
    with pytest.raises(UserError, match="folder: cannot be written .No space.*what was there before is kept"):
        with atomic(tmp_path / "folder") as part:
            part.mkdir()
            raise OSError(28, "No space left on device")
    assert [p.name for p in tmp_path.rglob("*")] == ["folder", "new"]
