"""Fed anything: every file and argument that a user can hand in, broken in every way that happens.

TABLE has a row for each: the command, how its input is broken, and words that the message must contain. Each ends in
exit status 2 and one message on standard error, without a traceback and with every file as it was. What is refused
below the commands, in more detail, has tables of its own: MISTAKES in test_model.py (model folders), REFUSALS in
test_lora.py (adapters) and test_router.py (routers), REFUSED in test_synth.py (records) and test_teachers.py (replies),
the arguments in test_synth.py, other settings in test_commands.py, benchmarks' files in test_benchmarks.py, tables of
labels in test_review.py.
"""
import ast
import contextlib
import json
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import eval as evaluation
import synth
import train
from lora import EXPERTS
from support.files import UserError, atomic
import small
from conftest import ROOT

FIRST = EXPERTS[0]
made = {}


@pytest.fixture
def world(tmp_path_factory, monkeypatch):
    """A copy of base/, encoder/, data/ and a whole run/ on them, as working directory."""
    if not made:
        made["folder"] = folder = tmp_path_factory.mktemp("world")
        small.make(folder)
        with contextlib.chdir(folder):
            status, _, said = small.run_quietly(train, *small.TRAIN)
            assert status == 0, said
    here = tmp_path_factory.mktemp("here") / "w"
    shutil.copytree(made["folder"], here)
    monkeypatch.chdir(here)
    return here


# ----------------------------------------------------------------------------------------------------------------------
# How things break

def config(**changes):
    """config.json says something else; None removes a key."""
    def damage(path):
        found = json.loads(path.read_text()) | changes
        path.write_text(json.dumps({k: v for k, v in found.items() if v is not None}))
    return damage


def tensor(name, change):
    def damage(path):
        state = load_file(path)
        state[name] = change(state[name])
        path.unlink()
        save_file(state, path)
    return damage


def at(index, value):
    """One number of a tensor is something else."""
    def change(t):
        t.view(-1)[index] = value
        return t
    return change


def header(change):
    """The header of a safetensors file says something else about the same bytes."""
    def damage(path):
        raw = path.read_bytes()
        end = 8 + int.from_bytes(raw[:8], "little")
        found = json.loads(raw[8:end])
        change(found)
        found = json.dumps(found).encode()
        path.write_bytes(len(found).to_bytes(8, "little") + found + raw[end:])
    return damage


def cut(part):
    return lambda path: path.write_bytes(path.read_bytes()[:int(part * path.stat().st_size)])


def text(content):
    return lambda path: path.write_bytes(content if isinstance(content, bytes) else content.encode())


def gone(path):
    shutil.rmtree(path) if path.is_dir() else path.unlink()


def sharded(change):
    """The model in two shards, with an index, which `change(folder, index)` then breaks."""
    def damage(path):
        state, where = load_file(path), {}
        names = sorted(state)
        for i, part in enumerate((names[:4], names[4:]), 1):
            file = f"model-0000{i}-of-00002.safetensors"
            save_file({name: state[name] for name in part}, path.with_name(file))
            where |= dict.fromkeys(part, file)
        path.unlink()
        index = {"weight_map": where}
        change(path.parent, index)
        path.with_name("model.safetensors.index.json").write_text(json.dumps(index))
    return damage


def climbing(folder, index):
    (folder / "model-00001-of-00002.safetensors").rename(folder.parent / "x.safetensors")
    index["weight_map"] = {k: v.replace("model-00001-of-00002", "../x") for k, v in index["weight_map"].items()}


class Trap:
    """A pickle that would run code when opened."""
    def __reduce__(self):
        return open, ("opened-a-pickle", "w")


def record(**changes):
    """Line 2 of the training records is another."""
    def damage(path):
        lines = path.read_text().splitlines(keepends=True)
        lines[1] = json.dumps(json.loads(lines[1]) | changes) + "\n"
        path.write_text("".join(lines))
    return damage


def line(content, number=2):
    def damage(path):
        lines = path.read_bytes().splitlines(keepends=True)
        lines[number - 1] = content
        path.write_bytes(b"".join(lines))
    return damage


def every(**changes):
    """Every record is changed."""
    def damage(path):
        lines = [json.dumps(json.loads(one) | changes) for one in path.read_text().splitlines()]
        path.write_text("\n".join(lines) + "\n")
    return damage


def other_tokens(path):
    """The tokenizer of another family, beside this model."""
    shutil.copy(path.parent.parent / "encoder" / "tokenizer.json", path)


def longer(path):
    """Nine tokens more than before, which is more than the model has."""
    found = json.loads(path.read_text())
    for i in range(9):
        found["added_tokens"].append(found["added_tokens"][-1] | {"id": 300 + i, "content": f"<|more{i}|>"})
    path.write_text(json.dumps(found))


def token_id(path):
    """One token's id is beyond the embedding."""
    found = json.loads(path.read_text())
    found["model"]["vocab"]["A"] = 9999
    path.write_text(json.dumps(found))


def other_rank(path):
    torch.manual_seed(0)
    file = path / "adapter_model.safetensors"
    state = {k: torch.cat((v, v), 0 if "lora_A" in k else 1).contiguous() for k, v in load_file(file).items()}
    file.unlink()
    save_file(state, file)
    config(r=4, lora_alpha=32)(path / "adapter_config.json")


def other_base(path):
    """Another base of the same shape, under the old name."""
    gone(path)
    small.write_model(path, seed=7)


def tensor_and_step(name, change):
    """As `tensor`, and the file still says its step."""
    def damage(path):
        state = load_file(path)
        state[name] = change(state[name])
        path.unlink()
        save_file(state, path, metadata={"step": str(int(path.stem.split("-")[1]))})
    return damage


def checkpoint(damage):
    """The joint stage as it was before its end, and its last checkpoint broken."""
    def both(path):
        gone(path)
        damage(path.parent / "state" / "joint-0000004.safetensors")
    return both


Q = "model.layers.0.self_attn.q_proj.weight"
LORA = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
WARMUP = [*small.TRAIN, "--stage", "warmup", "--run", "new"]
ROUTER = [*small.TRAIN, "--stage", "router", "--run", "new"]
ASK = ["ask", "--run", "run", "Hi", "--max-new-tokens", "2"]
AGAIN = [*small.TRAIN, "--resume"]
ANEW = [*small.TRAIN, "--overwrite"]
JOINT = [*AGAIN, "--stage", "joint"]
MODEL, ADAPTER = "base/model.safetensors", f"run/joint/experts/{FIRST}/adapter_model.safetensors"
ADAPTED, DATA, RUN = f"run/joint/experts/{FIRST}/adapter_config.json", "data/train.jsonl", "run/config.json"
STATE, ROUTED = "run/state/joint-0000004.safetensors", "run/joint/router/model.safetensors"
WARMED = f"run/warmup/experts/{FIRST}/adapter_model.safetensors"

TABLE = {  # name: (program, arguments, file or folder, how it is broken, words of the message)
    # model folders
    "no model folder": (train, WARMUP, "base", gone, "base, the base's model folder"),
    "no weights": (train, WARMUP, MODEL, gone, "base: no model.safetensors"),
    "a missing shard": (train, WARMUP, MODEL, sharded(lambda d, i: gone(d / "model-00002-of-00002.safetensors")),
                        "model-00002-of-00002.safetensors: no such file|download the missing part"),
    "a truncated shard": (train, WARMUP, MODEL, sharded(lambda d, i: cut(.9)(d / "model-00002-of-00002.safetensors")),
                          "model-00002-of-00002.safetensors: not a whole safetensors file"),
    "an index that climbs": (train, WARMUP, MODEL, sharded(climbing),
                             "index.json: |'../x.safetensors', expected the name of a file in this folder"),
    "an index with an absolute path": (train, WARMUP, MODEL,
                                       sharded(lambda d, i: i["weight_map"].update({Q: "/etc/x"})),
                                       "index.json: |'/etc/x', expected the name of a file"),
    "an index whose map is a list": (train, WARMUP, MODEL, sharded(lambda d, i: i.update(weight_map=[1])),
                                     "index.json: no weight_map"),
    "truncated weights": (train, WARMUP, MODEL, cut(.8), f"{MODEL}: not a whole safetensors file|download"),
    "empty weights": (train, WARMUP, MODEL, cut(0), f"{MODEL}: not a whole"),
    "a header of absurd length": (train, WARMUP, MODEL, text(b"\xff" * 100), f"{MODEL}: not a whole"),
    "a header that lies about a size": (train, WARMUP, MODEL, header(lambda h: h[Q].update(shape=[16, 8])),
                                        f"{MODEL}: not a whole"),
    "a header that lies about offsets": (train, WARMUP, MODEL, header(lambda h: h[Q].update(data_offsets=[0, 2**62])),
                                         f"{MODEL}: not a whole"),
    "offsets that overlap": (train, WARMUP, MODEL, header(lambda h: h[Q].update(data_offsets=[0, 1024])),
                             f"{MODEL}: not a whole"),
    "quantised weights": (train, WARMUP, MODEL, tensor(Q, lambda t: t.to(torch.int8)),
                          f"{MODEL}: {Q} is I8, expected floats"),
    "NaN in a weight": (train, WARMUP, MODEL, tensor(Q, at(3, torch.nan)), f"{MODEL}: {Q} has values that are NaN"),
    "Inf in a weight": (train, WARMUP, MODEL, tensor(Q, at(-1, -torch.inf)), f"{MODEL}: {Q} has values that are NaN"),
    "a weight too large for float32": (train, WARMUP, MODEL, tensor(Q, lambda t: at(5, 1e300)(t.double())),
                                       f"{MODEL}: {Q} has values that are NaN or infinite as float32"),
    "a pickle by another name": (train, WARMUP, MODEL, text(pickle.dumps(Trap())), f"{MODEL}: not a whole"),
    "a pickle": (train, WARMUP, MODEL, lambda path: (path.write_bytes(pickle.dumps(Trap())),
                                                     path.rename(path.with_name("pytorch_model.bin"))),
                 "found only pickled weights (pytorch_model.bin), which can run code"),
    "another width": (train, WARMUP, "base/config.json", config(hidden_size=32),
                      f"{MODEL}: |(264, 16), expected (264, 32)"),
    "more layers than weights": (train, WARMUP, "base/config.json", config(num_hidden_layers=2),
                                 "base: |missing, the first is model.layers.1."),
    "fewer layers than weights": (train, ROUTER, "encoder/config.json", config(num_hidden_layers=0),
                                  "encoder/config.json: num_hidden_layers is 0, expected a positive number"),
    "a million layers": (train, WARMUP, "base/config.json", config(num_hidden_layers=10**6), "expected at most 1024"),
    "heads beyond 64 bits": (train, WARMUP, "base/config.json", config(
        head_dim=2**39, num_attention_heads=2**39, num_key_value_heads=2**39), "no model of this shape"),
    "another vocabulary": (train, WARMUP, "base/config.json", config(vocab_size=300), "(264, 16), expected (300, 16)"),
    "a bias that is not there": (train, WARMUP, "base/config.json", config(model_type="qwen2"), "k_proj.bias"),
    "an infinite epsilon": (train, WARMUP, "base/config.json", config(rms_norm_eps=float("inf")),
                            "rms_norm_eps is inf"),
    "theta NaN": (train, WARMUP, "base/config.json", config(rope_theta=float("nan")), "rope_theta is nan"),
    "scaling in words": (train, WARMUP, "base/config.json", config(rope_scaling="llama3"), "rope_scaling is 'llama3'"),
    "scaling by zero": (train, WARMUP, "base/config.json", config(rope_scaling={
        "rope_type": "llama3", "factor": 0.0, "low_freq_factor": 1, "high_freq_factor": 4,
        "original_max_position_embeddings": 64}), "config.json: RoPE scaling|positive numbers"),
    "a context of no tokens": (train, WARMUP, "base/config.json", config(max_position_embeddings=0),
                               "max_position_embeddings is 0"),
    "tied in words": (train, WARMUP, "base/config.json", config(tie_word_embeddings="no"),
                      "tie_word_embeddings is 'no'"),
    "an end in words": (train, WARMUP, "base/config.json", config(eos_token_id="</s>"), "eos_token_id is ['</s>']"),
    "config.json cut": (train, WARMUP, "base/config.json", cut(.5), "base/config.json: not readable as JSON"),
    "config.json a tower of brackets": (train, WARMUP, "base/config.json", text("[" * 10**5), "not readable as JSON"),
    "the encoder's weights cut": (train, ROUTER, "encoder/model.safetensors", cut(.5),
                                  "encoder/model.safetensors: not a"),
    "NaN in the encoder": (train, ROUTER, "encoder/model.safetensors", tensor(Q, at(0, torch.nan)), f"{Q} has values"),
    # tokenizers
    "another family's tokenizer": (train, WARMUP, "base/tokenizer.json", other_tokens,
                                   "tokenizer.json: 259, eos_token_id of config.json|another model's tokenizer?"),
    "tokens beyond the embedding": (train, WARMUP, "base/tokenizer.json", longer,
                                    "has the id|264|another model's tokenizer?"),
    "one id beyond the embedding": (train, ROUTER, "encoder/tokenizer.json", token_id, "'A' has the id 9999"),
    "no tokenizer": (train, WARMUP, "base/tokenizer.json", gone, "base/tokenizer.json: no such file"),
    "a torn tokenizer": (train, WARMUP, "base/tokenizer.json", cut(.5), "base/tokenizer.json: not a tokenizer"),
    "a base model's tokenizer": (train, WARMUP, "base/tokenizer.json", lambda path: path.write_text(
        path.read_text().replace("<|eot_id|>", "<|the_end|>")), "base: |has neither Llama 3's chat tokens"),
    "a template that is a number": (train, WARMUP, "base/tokenizer_config.json", config(chat_template=5),
                                    "chat_template is 5, expected text"),
    "a template that is not UTF-8": (train, WARMUP, "base/chat_template.jinja", text(b"\xff\xfe"),
                                     "not readable as text"),
    # adapters
    "another rank": (evaluation, ASK, f"run/joint/experts/{FIRST}", other_rank, f"{ADAPTED}: r is 4, expected 2"),
    "a rank in words, from elsewhere": (evaluation, [*ASK, "--experts", "run/joint/experts"], ADAPTED, config(r="two"),
                                        f"{ADAPTED}: r is 'two' and lora_alpha 16.0, expected"),
    "other targets": (evaluation, ASK, ADAPTED, config(target_modules=["q_proj"]), f"{ADAPTED}: target_modules is"),
    "targets that are lists": (evaluation, ASK, ADAPTED, config(target_modules=[["q_proj"]]), "target_modules is"),
    "a missing expert": (evaluation, ASK, f"run/joint/experts/{EXPERTS[4]}", gone,
                         f"{EXPERTS[4]}/adapter_config.json: no such file"),
    "an adapter cut": (evaluation, ASK, ADAPTER, cut(.5), f"{ADAPTER}: not a whole"),
    "NaN in an adapter": (evaluation, ASK, ADAPTER, tensor(LORA, at(0, torch.nan)),
                          f"{ADAPTER}: {LORA} (float32) is not"),
    "an adapter of integers": (evaluation, ASK, ADAPTER, tensor(LORA, lambda t: t.long()), f"{LORA} (int64) is not"),
    "a pickle for an adapter": (evaluation, ASK, ADAPTER, text(pickle.dumps(Trap())), f"{ADAPTER}: not a whole"),
    "another base's adapter": (evaluation, ASK, ADAPTER, tensor(LORA, lambda t: t[:, :8].contiguous()),
                               "another base's?"),
    "another base than the run's": (evaluation, ASK, "base", other_base, "base: not the base that run was trained on"),
    "another base by argument": (evaluation, [*ASK, "--base", "other"], "other", lambda path: small.write_model(
        path, seed=7), "other: not the base that run was trained on"),
    "a warm-up adapter cut": (train, AGAIN, WARMED, lambda path: (gone(path.parents[3] / "joint"), cut(.5)(path)),
                              f"{WARMED}: not a whole"),
    # routers
    "another order of experts": (evaluation, ASK, "run/joint/router/config.json", config(experts=EXPERTS[::-1]),
                                 "run/joint/router: the router's experts are"),
    "a router cut": (evaluation, ASK, ROUTED, cut(.5), "not a whole"),
    "NaN in a router": (evaluation, ASK, ROUTED, tensor("expert_embeddings", at(0, torch.nan)),
                        "expert_embeddings (float32) is not all finite"),
    "nine experts": (evaluation, ASK, ROUTED, tensor("expert_embeddings", lambda t: t[:9].clone()),
                     "expert_embeddings is (9, 16), expected (10, 16)"),
    "another encoder than the run's": (evaluation, ASK, "encoder/config.json", config(rope_theta=5e4),
                                       "encoder: not the encoder that run was trained on"),
    # data; what a line may be is in REFUSED of test_synth.py
    "no data": (train, WARMUP, "data", gone, "data, the training records: python synth.py"),
    "empty data": (train, WARMUP, DATA, cut(0), f"{DATA}: no records"),
    "no test records": (train, WARMUP, "data/test.jsonl", gone, "data/test.jsonl: No such file"),
    "one record": (train, [*WARMUP, "--data", DATA], DATA,
                   lambda path: path.write_text(path.read_text().split("\n")[0]),
                   f"{DATA}: no records with an active trait for"),
    "a torn last line": (train, WARMUP, DATA, lambda path: path.write_bytes(path.read_bytes()[:-20]),
                         f"{DATA}, line 40: not JSON|torn"),
    "not UTF-8": (train, WARMUP, DATA, line('{"id": "é"}\n'.encode("latin-1")), f"{DATA}, line 2: not UTF-8"),
    "a tower of brackets": (train, WARMUP, DATA, line(b"[" * 10**5 + b"\n"), f"{DATA}, line 2: not JSON"),
    "UTF-16": (train, WARMUP, DATA, lambda path: path.write_bytes(path.read_text().encode("utf-16")),
               "line 1: not UTF-8"),
    "only records too long": (train, WARMUP, DATA, every(response="so " * 50),
                              "data: no record is short enough|--tokens"),
    "a query longer than the context": (evaluation, ["ask", "--run", "run", "so " * 100], DATA, lambda path: None,
                                        "a prompt has |200|shorten it"),
    "a test record beyond the context": (evaluation, ["ablate", "--run", "run"], "data/test.jsonl",
                                         record(response="so " * 100), "record 'r1' has |the base reads 200"),
    "an empty response": (train, WARMUP, DATA, record(response="  "),
                          f"{DATA}, line 2: response is '  ', expected some"),
    "an unknown trait": (train, WARMUP, DATA, record(traits={"charm": 1}),
                         f"{DATA}, line 2: traits: unknown trait 'charm'"),
    "a value of 2": (train, WARMUP, DATA, record(traits={"openness": 2}), f"{DATA}, line 2: traits: openness is 2"),
    "all zero": (train, WARMUP, DATA, every(traits={"openness": 0}), "data: no records with an active trait for train"),
    "one id twice": (train, WARMUP, DATA, record(id="r0"), f"{DATA}, line 2: id 'r0' stands on line 1 already"),
    "queries of no text": (synth, ["--teacher", "local", "--model", "base", "--queries", "q.jsonl", "--out", "o.jsonl"],
                           "q.jsonl", text('{"query": 5}\n'), "q.jsonl, line 1: query is 5"),
    "a report of no records": (synth, ["report", DATA], DATA, text("{}\n"), f"{DATA}, line 1: no 'id'"),
    # runs
    "a run that is none": (evaluation, ASK, RUN, gone, "run: no config.json"),
    "resume without a run": (train, [*AGAIN, "--run", "none"], "base", lambda path: None, "no run to resume"),
    "a run's config cut": (train, AGAIN, RUN, cut(.5), f"{RUN}: not readable as JSON"),
    "another version's run": (train, AGAIN, RUN, config(version=99), f"{RUN}: format 99, expected 2"),
    "another version's run, measured": (evaluation, ASK, RUN, config(version=99), f"{RUN}: format 99, expected 2"),
    "a setup of strings": (evaluation, ASK, RUN, config(setup={"preset": "tiny"}), f"{RUN}: alpha of setup is None"),
    "a stage that is a list": (evaluation, ASK, RUN, config(stages={"joint": []}), f"{RUN}: stage 'joint' is []"),
    "another base than before": (train, AGAIN, "base", other_base, "base: not the base that run was begun with"),
    "another chat template than before": (train, AGAIN, "base/tokenizer_config.json", config(chat_template="x"),
                                          "base: not the base that run was begun with"),
    "a model folder for a run": (evaluation, ["ask", "--run", "base", "Hi"], "base", lambda path: None,
                                 "base/config.json: not a run's"),
    "another dtype than before": (train, [*AGAIN, "--dtype", "bfloat16"], "run/joint", gone,
                                  "begun with other settings: dtype was 'float32' and is now 'bfloat16'"),
    "overwriting by torn data": (train, ANEW, DATA, lambda path: path.write_bytes(path.read_bytes()[:-20]),
                                 f"{DATA}, line 40: not JSON|torn"),
    "overwriting by NaN in a weight": (train, ANEW, MODEL, tensor(Q, at(3, torch.nan)), f"{Q} has values that are NaN"),
    "overwriting by a rank beyond the width": (train, [*ANEW, "--rank", "999"], "base", lambda path: None,
                                               "--rank is 999, expected at"),
    "overwriting by no tokens": (train, [*ANEW, "--tokens", "5"], "base", lambda path: None, "no record is short"),
    "overwriting by a run that ends in NaN": (train, [*ANEW, "--lr", "1e9", "--clip", "1e9"], "base",
                                              lambda path: None, "training ends here; no checkpoint is kept"),
    "records over a folder": (synth, ["--teacher", "template", "--count", "20", "--out", "o.jsonl", "--overwrite"], "o.jsonl",
                              lambda path: (path.mkdir(), (path / "x").touch()),
                              "o.jsonl is a folder, expected a file"),
    "other data than before": (train, AGAIN, DATA, record(response="Never."), "data: not the data that run was begun"),
    "a checkpoint cut": (train, JOINT, "run/joint", checkpoint(cut(.5)),
                         f"{STATE}: not a whole|goes on from joint-0000002"),
    "a checkpoint without its step": (train, JOINT, "run/joint", checkpoint(header(lambda h: h.pop("__metadata__"))),
                                      f"{STATE}: step is ''"),
    "a checkpoint with NaN": (train, JOINT, "run/joint", checkpoint(tensor_and_step("3.exp_avg", at(0, torch.nan))),
                              f"{STATE}: parameter 3 of it is not all finite|remove it"),
    "a checkpoint's moments of another shape": (train, JOINT, "run/joint", checkpoint(
        tensor_and_step("2.exp_avg", lambda t: t[:1].clone())), f"{STATE}: does not fit"),
    # arguments; all of them are in test_synth.py and test_commands.py
    "a negative number": (train, [*WARMUP, "--steps", "-1"], "base", lambda path: None, "--steps is -1, expected"),
    "zero": (train, [*WARMUP, "--lr", "0"], "base", lambda path: None, "--lr is 0"),
    "NaN": (evaluation, [*ASK, "--tau", "nan"], "base", lambda path: None, "--tau is nan"),
    "more than memory holds": (train, [*WARMUP, "--batch", "2000000000"], "base", lambda path: None,
                               "--batch is 2000000000"),
    "a rank beyond the width": (train, [*WARMUP, "--rank", "999"], "base", lambda path: None,
                                "--rank is 999, expected at"),
    "contradictory": (train, [*AGAIN, "--overwrite"], "base", lambda path: None, "choose one"),
    "an unknown stage": (train, [*small.TRAIN, "--stage", "pretrain"], "base", lambda path: None, "invalid choice"),
    "a gate of eleven": (evaluation, [*ASK, "--gate", ",".join(["0"] * 11)], "base", lambda path: None, "--gate '0,0"),
}


@pytest.mark.parametrize("case", TABLE)
def test_what_is_broken_ends_in_one_message_and_changes_nothing(case, world):
    program, argv, name, damage, words = TABLE[case]
    damage(world / name)
    before = small.contents(world)
    status, _, said = small.run_quietly(program, *argv)
    after = small.contents(world)
    assert status == 2 and said.startswith(f"{program.__name__}.py: error: ") and "Traceback" not in said, said
    assert all(word in said for word in words.split("|")), said
    assert said.count("\n") == 1 or "missing\n" in said, said
    assert after.keys() == before.keys() and not [k for k in after if after[k] != before[k]]


@pytest.mark.parametrize("damage", [
    lambda path: path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes()),
    lambda path: path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n")),
    record(response="so " * 350_000), record(query="so " * 1000), record(traits={})],
    ids=["BOM", "CRLF", "a record of a megabyte", "a query beyond the context", "one all-zero record"])
def test_what_can_be_read_is_trained_on(world, damage):
    """What is too long is left out and counted, and so is what calls for nothing."""
    damage(world / DATA)
    status, shown, said = small.run_quietly(train, *WARMUP)
    assert status == 0, said
    large = "so so so so" in (world / DATA).read_text()
    assert ("left out 1 of 40 records, longer than 150 tokens" in shown) == large
    assert ("left out 1 records whose traits are all zero" in shown) == ('"traits": {}' in (world / DATA).read_text())


# ----------------------------------------------------------------------------------------------------------------------
# Lets no one in

def test_the_program_runs_nothing_from_a_file():
    """No pickle, no eval, no template engine, no shell in any module: calls and imports, from the syntax tree."""
    forbidden = {"eval", "exec", "compile", "__import__", "system", "popen", "Popen", "check_output", "import_module",
                 "loads_pickle", "extractall"}
    modules = {"pickle", "jinja2", "yaml", "marshal", "shelve", "subprocess", "dill", "joblib"}
    for file in ROOT.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                name = getattr(node.func, "attr", getattr(node.func, "id", ""))
                on = getattr(getattr(node.func, "value", None), "id", "")
                allowed = {("re", "compile"), ("block", "compile"), ("torch", "compile")}
                assert name not in forbidden or (on, name) in allowed, f"{file.name}:{node.lineno}: {name}"
                assert (on, name) not in {("torch", "load"), ("torch", "save"),
                                          ("np", "load")}, f"{file.name}:{node.lineno}"
            elif isinstance(node, (ast.Import, ast.ImportFrom)):
                names = {alias.name.split(".")[0] for alias in node.names} | {getattr(node, "module", "") or ""}
                assert not names & modules, f"{file.name}:{node.lineno}"


def test_a_kill_between_the_renames_of_a_folder_loses_neither(tmp_path):
    """What was there before is put back, and stays if the next write fails."""
    for content in ("old", "new"):
        with atomic(tmp_path / "folder") as part:
            part.mkdir()
            (part / content).touch()
    (tmp_path / "folder").rename(tmp_path / "folder.~old")
    with pytest.raises(UserError, match="folder: cannot be written .No space.*what was there before is kept"):
        with atomic(tmp_path / "folder") as part:
            part.mkdir()
            raise OSError(28, "No space left on device")
    assert [p.name for p in tmp_path.rglob("*")] == ["folder", "new"]
