"""Laws of train.py as a command: what a run folder holds, how a run is started, stopped, resumed, refused and
overwritten, and what is printed. One tiny run of twenty steps is trained once and shared.
"""
import contextlib
import errno
import functools
import io
import json
import math
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

import eval as evaluation
import small
import train
from lora import EXPERTS
from router import active_experts
from support import checkpoints, command, rows, runs
from support import tiny as tiny_models
from support.chat import Chat
from support.files import UserError
from support.records import SPLITS, read_records, write_records
from synth import template_records

ROOT = Path(train.__file__).resolve().parent
RUN = Path("runs/tiny")  # where the run is if no --run is given
STEPS = {"pretrain": 4, "warmup": 5, "router": 8, "joint": 3}
REDUCED = runs.PRESETS["tiny"] | dict(
    records=(300, 40, 60), eval_records=8, pretrain=dict(steps=4, batch=6, lr=4e-3),
    warmup=dict(steps=5, batch=4, lr=1e-2), router=dict(steps=8, batch=8, router_lr=2e-3, frozen_layers=0),
    joint=dict(steps=3, batch=4, lr=5e-3, router_lr=5e-4, frozen_layers=0))
RESULTS, EVERYTHING = ("warmup", "router", "joint"), ("warmup", "router", "joint", "models", "data", "state")
trained = {}  # the shared run's folder and what was printed, once it is trained; other test files share it too


@pytest.fixture(autouse=True)
def reduced(monkeypatch):
    """Make the tiny preset a fortieth of its size, with models made from 300 records."""
    monkeypatch.setitem(runs.PRESETS, "tiny", REDUCED)
    monkeypatch.setattr(tiny_models, "template_records",
                        lambda split, n, seed: template_records(split, min(n, 300), seed))


@pytest.fixture
def run_folder(reduced, tmp_path_factory):
    """The folder of a complete run: python train.py --preset tiny --stage all. Tests must not write to it."""
    if not trained:
        folder, out, err = tmp_path_factory.mktemp("whole"), io.StringIO(), io.StringIO()
        with contextlib.chdir(folder), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            assert train.main(["--preset", "tiny", "--stage", "all"]) is None
        trained.update(folder=folder, out=out.getvalue(), err=err.getvalue())
    return trained["folder"] / RUN


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def no_results(monkeypatch):
    """Leave out the closing table and the replies."""
    monkeypatch.setattr(train, "print_results", lambda setup: None)


def train_tiny(*argv):
    return train.main(["--preset", "tiny", *argv])


def copy(run_folder, here, without=()):
    """A copy of the run under the same relative name, without what matches the patterns `without`."""
    shutil.copytree(run_folder, here / RUN)
    for name in without:
        for path in (here / RUN).glob(name):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return here / RUN


def undone(run_folder, here, *stages):
    """A copy of the run as it was before these stages were started."""
    run = copy(run_folder, here, [pattern for stage in stages for pattern in (stage, f"state/{stage}*")])
    config = json.loads((run / "config.json").read_text())
    config["stages"] = {stage: s for stage, s in config["stages"].items() if stage not in stages}
    for stage, *only_for in (("warmup", "base", "int8"), ("router", "encoder")):
        if {stage, "joint"} <= set(stages):
            config["setup"] |= dict.fromkeys(only_for)
    (run / "config.json").write_text(json.dumps(config))
    for stage in stages:
        checkpoints.rewind_log(run, stage, 0)
    return run


def contents(folder, parts=RESULTS):
    """{name: bytes} of all files in these parts of a run."""
    return {str(file.relative_to(folder)): file.read_bytes() for part in parts
            for file in [folder / part, *(folder / part).rglob("*")] if file.is_file()}


def differing(a, b, parts=RESULTS):
    """The names of the files in these parts whose bytes are not the same in both runs."""
    a, b = contents(a, parts), contents(b, parts)
    return {name for name in a.keys() | b.keys() if a.get(name) != b.get(name)}


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def message_of(*argv):
    """The error message of a train.py command that must fail."""
    with pytest.raises(UserError) as error:
        train.main(list(argv))
    return str(error.value)


def commands_in(message):
    """The python commands that a message suggests, as lists of words without "python"."""
    return [shlex.split(found)[1:] for found in re.findall(r"python \w+\.py(?: --?[\w-]+ ?[^-\s]\S*)*", message)]


# ----------------------------------------------------------------------------------------------------------------------
# A complete run

def test_a_run_folder_has_the_documented_files_and_no_others(run_folder):
    expected = {"config.json", "log.jsonl", *(f"data/{name}.jsonl" for name in SPLITS)}
    expected |= {f"models/{role}/{name}" for role in ("base", "encoder") for name in (
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")}
    expected |= {f"{stage}/experts/{expert}/{name}" for stage in ("warmup", "joint") for expert in EXPERTS
                 for name in ("adapter_config.json", "adapter_model.safetensors")}
    expected |= {f"{stage}/router/{name}" for stage in ("router", "joint") for name in (
        "config.json", "model.safetensors")}
    expected |= {f"state/{stage}-{steps:07d}.safetensors" for stage, steps in STEPS.items()}
    assert {str(file.relative_to(run_folder)) for file in run_folder.rglob("*") if file.is_file()} == expected


def test_config_json_has_all_settings_of_the_run(run_folder):
    found = json.loads((run_folder / "config.json").read_text())
    assert found["setup"] == {"preset": "tiny", "base": "{run}/models/base", "encoder": "{run}/models/encoder",
                              "data": "{run}/data", "seed": 0, "rank": 8, "alpha": 16.0, "int8": False}
    assert list(found["stages"]) == ["warmup", "router", "joint"]
    for stage, settings in found["stages"].items():
        assert settings.items() >= REDUCED[stage].items() and settings["seed"] == 0 and settings["clip"] == 1.0
    assert found["stages"]["joint"].items() >= {"lam": 0.1, "tau": 1.0, "contrastive_tau": 0.07,
                                                "joint_gate": "learned", "rehearse": 0.1}.items()


def test_the_log_has_every_step_once_and_in_order_and_the_printed_lines_agree_with_it(run_folder):
    entries = log(run_folder)
    assert [(entry["stage"], entry["step"]) for entry in entries] == [
        (stage, step) for stage, steps in STEPS.items() for step in range(1, steps + 1)]
    for entry in entries:
        keys = {"step", "stage", "loss", "grad_norm", "lr", "tokens_per_s"}
        gates = {"entropy", "top1", "usage"} if entry["stage"] in ("router", "joint") else set()
        assert set(entry) == keys | gates | ({"contrastive"} if entry["stage"] == "joint" else set())
        assert all(math.isfinite(entry[key]) and entry[key] >= 0 for key in set(entry) - {"stage", "usage"})
        if gates:
            assert len(entry["usage"]) == len(EXPERTS) and abs(sum(entry["usage"]) - 1) < 1e-3
            assert 0.1 <= entry["top1"] <= 0.451 and 0 < entry["entropy"] <= math.log(10) + 1e-4  # τ = 1 on cosines
        if entry["step"] == STEPS[entry["stage"]]:
            assert re.search("^{stage} {step}/{step} loss {loss:.4f} norm ".format(**entry), trained["out"], re.M)


def test_output_that_goes_to_a_file_has_lines_only_and_no_bars(run_folder):
    assert trained["err"] == "" and "\r" not in trained["out"] and "\x1b" not in trained["out"]


def test_a_run_ends_with_losses_under_five_gates_and_replies_to_five_queries(run_folder):
    shown = trained["out"]
    table = dict(re.findall(r"^  (\w+) +(\d+\.\d{4}) +[+-]\d\.\d{4}  \S", shown, re.M))
    assert list(table) == ["base", "uniform", "shuffled", "learned", "oracle"]
    for i, record in enumerate(read_records(run_folder / "data" / "test.jsonl")[:5], 1):
        part = shown.split(f"\nQuery {i}: ")[1].split("\nQuery ")[0].splitlines()
        assert part[0] == record["query"]
        poles = [EXPERTS[e].replace("_", " ") for e in active_experts(record["traits"]).nonzero()[:, 0]]
        assert part[1] == f"  calls for:   {', '.join(poles)}"
        weights = [float(weight) for weight in re.findall(r" (0\.\d\d),", part[2])]
        assert part[2].startswith("  gate:        ") and weights == sorted(weights, reverse=True) and len(weights) == 3
        assert part[3].startswith("  base:        ") and part[4].startswith("  PersonaFuse: ")
    assert "Query 6" not in shown and "Router on 8 held-out queries, tau 1" in shown and "no fair" in shown
    assert f"python eval.py ask --run {RUN}" in shown.rstrip().splitlines()[-1]


def test_the_closing_table_shows_the_mean_loss_per_reply_token_on_test_records(run_folder, monkeypatch):
    monkeypatch.chdir(trained["folder"])
    setup = runs.make_setup(command.parse(train.Args, ["--preset", "tiny"]), runs.STAGES)
    model, chat = setup.load_base(RUN / "joint" / "experts"), Chat.from_dir(setup.base)
    test_rows, _ = rows.make_rows(setup.load_data()["test"][:8], chat)
    for rule, gate in (("base", None), ("uniform", torch.full((1, 10), 0.1))):
        losses = [train.row_losses(model, [row], gate).item() for row in test_rows]
        mean = sum(losses) / sum(len(row.ids) - row.n_prompt for row in test_rows)
        assert abs(float(re.search(rf"^  {rule} +(\d+\.\d+)", trained["out"], re.M)[1]) - mean) < 2e-4


def test_a_complete_run_prints_its_results_again_and_writes_nothing(run_folder, here, capsys):
    """Options that change no result may differ from those of the run."""
    run = copy(run_folder, here)
    times = {file: file.stat().st_mtime_ns for file in (run / "warmup").rglob("*")}
    assert train_tiny(*"--save-every 3 --keep 1 --log-every 1 --recompute --eval-records 8".split()) is None
    shown = capsys.readouterr().out
    assert f"{RUN} is complete" in shown and shown.split("\nRouter on ")[1] == trained["out"].split("\nRouter on ")[1]
    assert not differing(run, run_folder, (*EVERYTHING, "log.jsonl"))
    assert {file: file.stat().st_mtime_ns for file in (run / "warmup").rglob("*")} == times


# ----------------------------------------------------------------------------------------------------------------------
# A run that exists and other settings

@pytest.mark.parametrize("argv, why", [
    ("--lr 0.5", "lr was 0.01 and is now 0.5"), ("--router-lr 0.5", "router_lr was 0.002 and is now 0.5"),
    ("--steps 6", "steps was 5 and is now 6"), ("--batch 3", "batch was 4 and is now 3"),
    ("--clip 2", "clip was 1.0 and is now 2.0"), ("--lr-warmup 0.2", "lr_warmup was 0.1 and is now 0.2"),
    ("--tokens 99 --resume", "tokens was 4096 and is now 99"), ("--stage joint --lr 1", "lr was 0.005 and is now 1.0"),
    ("--contrastive-tau 1", "contrastive_tau was 0.07 and is now 1.0"),
    ("--seed 1 --resume", "seed was 0 and is now 1"),
    ("--tau 0.2", "tau was 1.0 and is now 0.2"), ("--lam 1", "lam was 0.1 and is now 1.0"),
    ("--joint-gate uniform", "joint_gate was 'learned' and is now 'uniform'"),
    ("--rehearse 0", "rehearse was 0.1 and is now 0.0"), ("--seed 1", "seed was 0 and is now 1"),
    ("--rank 4", "rank was 8 and is now 4"), ("--int8", "int8 was False and is now True"), ("--alpha 8", "alpha was 16.0 and is now 8.0"),
    (f"--preset small --run {RUN} --data . --base . --encoder .", "preset was 'tiny' and is now 'small'"),
    ("--base .", "base was '.*models/base' and is now '.'"), ("--data .", "data was '.*data' and is now '.'")])
def test_settings_that_differ_from_the_runs_are_refused_by_name(run_folder, monkeypatch, argv, why):
    monkeypatch.chdir(trained["folder"])
    before = contents(run_folder, ["config.json"])
    with pytest.raises(UserError, match=why) as error:
        train_tiny(*argv.split())
    assert "\n" not in str(error.value) and contents(run_folder, ["config.json"]) == before


@pytest.mark.parametrize("name, change, why", [
    ("models/base/model.safetensors", lambda raw: raw[:-4] + bytes(4), "not the base that runs/tiny was started with"),
    ("data/train.jsonl", lambda raw: raw.replace(b'"response": "', b'"response": "No. ', 1),
     "not the data that runs/tiny was started with"),
    ("data/train.jsonl", lambda raw: b"".join(raw.splitlines(keepends=True)[::2]),
     "neither the template teacher's records of seed 0 nor a part of them")], ids=["weights", "a response", "records"])
def test_models_and_data_inside_the_run_folder_that_were_changed_are_refused_and_kept(
        run_folder, here, no_results, name, change, why):
    run = undone(run_folder, here, "joint")
    (run / name).write_bytes(change((run / name).read_bytes()))
    before = contents(run, (*EVERYTHING, "log.jsonl"))
    with pytest.raises(UserError, match=why):
        train_tiny("--resume")
    assert contents(run, (*EVERYTHING, "log.jsonl")) == before


def test_only_paths_below_the_run_folder_are_stored_relative_to_it():
    """With --run s, the base weights/b is not inside s, although its path contains "s/"."""
    setup = runs.Setup(Path("s"), "tiny", "weights/b", "s/models/encoder", "s/data", *[None] * 8)
    stored = [setup.stored_path(path) for path in (setup.base, setup.encoder, setup.data)]
    assert stored == ["weights/b", "{run}/models/encoder", "{run}/data"]
    assert [runs.Setup.restore_path(path, "t/s") for path in stored] == ["weights/b", "t/s/models/encoder", "t/s/data"]


def test_the_largest_numbers_that_options_take_make_a_run_that_can_be_opened(here, no_results, monkeypatch):
    for name in ("train_stage", "make_missing_models", "check_disk_space", "check_frozen_layers"):
        monkeypatch.setattr(train, name, lambda *_: None)
    largest = str(2**31)
    assert train_tiny("--seed", largest, "--alpha", largest, "--tau", largest) is None
    assert runs.read_run(here / RUN)["setup"]["seed"] == 2**31


# ----------------------------------------------------------------------------------------------------------------------
# Stop and resume

@pytest.mark.parametrize("stage, step, number", [
    ("pretrain", 2, signal.SIGTERM), ("warmup", 3, signal.SIGINT), ("joint", 1, signal.SIGTERM)])
def test_a_stopped_run_needs_resume_or_overwrite_and_resumes_to_the_same_bits(
        run_folder, here, no_results, monkeypatch, capsys, stage, step, number):
    """Ctrl-C and SIGTERM let the step finish and save it. The first case starts from nothing, so it also shows that two
    runs of one seed are the same."""
    run = here / RUN if stage == "pretrain" else undone(run_folder, here, stage)
    only = ["--stage", "all" if stage == "pretrain" else stage]
    original, steps, handler = train.Stage.step, Counter(), signal.getsignal(number)

    def step_with_signal(self, *args):
        steps[self.name] += 1
        if (self.name, steps[self.name]) == (stage, step):
            signal.raise_signal(number)
        return original(self, *args)
    with monkeypatch.context() as patch:
        patch.setattr(train.Stage, "step", step_with_signal)
        assert train_tiny(*only) == 130
    assert signal.getsignal(number) == handler  # the program has restored it
    shown = capsys.readouterr()
    assert f"stopped after step {step} of {STEPS[stage]} of {stage}" in shown.err and "--resume" in shown.err
    assert (run / "config.json").exists() and not (run / stage).exists()
    assert [entry["step"] for entry in log(run) if entry["stage"] == stage] == list(range(1, step + 1))
    before = contents(run, ("config.json", "state", "log.jsonl"))
    if stage != "pretrain":  # making tiny's base is no stage, so the same command without --resume goes on with it
        with pytest.raises(UserError, match="--resume goes on.*--overwrite starts again"):
            train_tiny(*only)
    assert contents(run, ("config.json", "state", "log.jsonl")) == before
    assert train_tiny(*only, "--resume") is None
    assert differing(run, run_folder, EVERYTHING) == {f"state/{stage}-{step:07d}.safetensors"}  # the last two are kept
    logs = [sorted((e["stage"], e["step"], e["loss"], e["lr"]) for e in log(folder)) for folder in (run, run_folder)]
    assert logs[0] == logs[1]


def test_a_run_in_8_bits_resumes_to_the_same_bits(run_folder, here, no_results, monkeypatch, capsys):
    """tiny's base is made in full and loaded in 8 bits. Both stages that load it are stopped after their second step."""
    undone(run_folder, here, *RESULTS)
    assert train_tiny("--int8") is None
    whole = shutil.move(here / RUN, here / "whole")
    run, original, steps = undone(run_folder, here, *RESULTS), train.Stage.step, Counter()

    def step_with_signal(self, *args):
        steps[self.name] += 1
        if self.name != "router" and steps[self.name] == 2:
            signal.raise_signal(signal.SIGINT)
        dtypes = {layer.weight.dtype for layer in train.expert_layers(self.model).values()} if self.model else set()
        assert dtypes <= {torch.int8}
        return original(self, *args)
    monkeypatch.setattr(train.Stage, "step", step_with_signal)
    assert [train_tiny("--int8", *more) for more in ([], ["--resume"], ["--resume"])] == [130, 130, None]
    assert differing(run, whole, RESULTS) == set()
    assert differing(run, run_folder, ["models"]) == set() and differing(run, run_folder, ["warmup"])
    assert all(json.loads((folder / "config.json").read_text())["setup"]["int8"] is True for folder in (run, whole))


@pytest.mark.parametrize("int8", [False, True])
def test_the_stages_that_load_the_base_agree_on_8_bits_and_the_router_stage_may_come_first_or_last(
        run_folder, here, monkeypatch, int8):
    shown, given = [], ["--int8"] * int8
    monkeypatch.setattr(train, "print_results", lambda setup: shown.append(setup.int8))
    run = undone(run_folder, here, *RESULTS)
    train_tiny("--stage", "router", "--overwrite")
    with monkeypatch.context() as no_memory, pytest.raises(MemoryError):  # a warm-up that never began binds nobody
        no_memory.setattr(train, "train_stage", mock.Mock(side_effect=MemoryError))
        train_tiny("--stage", "warmup", "--rank", "4", *["--int8"] * (not int8))
    train_tiny("--stage", "warmup", *given)
    assert "int8 was" in message_of("--preset", "tiny", "--stage", "joint", *["--int8"] * (not int8))
    shutil.rmtree(run / "router")
    train_tiny("--stage", "router", "--resume")
    assert shown == [None, int8, int8]


def test_resume_with_nothing_but_config_json_starts_from_the_beginning(run_folder, here, no_results):
    run = copy(run_folder, here, ["[!c]*"])
    assert [p.name for p in run.iterdir()] == ["config.json"]
    assert train_tiny("--resume", "--stage", "router") is None
    assert not differing(run, run_folder, ("router", "models/encoder", "data"))


@pytest.mark.parametrize("stages", [["router", "warmup", "joint"], ["warmup", "router"]], ids=" ".join)
def test_stages_one_by_one_give_the_same_bits_as_all_in_one_command(run_folder, here, no_results, stages):
    """Warm-up and router stage may come in either order: neither uses the other's result."""
    run = undone(run_folder, here, "warmup", "router", "joint")
    for stage in stages:
        assert train_tiny("--stage", stage) is None
    assert not differing(run, run_folder, (*stages, "models", "data"))


@pytest.mark.parametrize("stage, there, shows", [
    ("warmup", [], "experts after warmup"), ("router", [], "Router on"), ("router", ["warmup"], "Router on"),
    ("warmup", ["router"], "experts after warmup")])
def test_a_single_stage_prints_results_whatever_was_done_before(
        run_folder, here, monkeypatch, capsys, stage, there, shows):
    monkeypatch.setattr(train, "generate_replies", functools.partial(train.generate_replies, max_new_tokens=3))
    run = undone(run_folder, here, "joint", *({"warmup", "router"} - set(there)))
    shutil.copytree(run_folder / stage, run / stage)  # as if it had just been trained
    assert train_tiny("--stage", stage, "--eval-records", "5") is None
    shown = capsys.readouterr().out
    assert shows in shown and f"Results are in {RUN}" in shown


def test_a_stage_starts_from_the_results_of_the_stages_before_it(run_folder, here, no_results, monkeypatch):
    """If no step is taken, the router stage saves the encoder, and joint saves warm-up's experts and that router."""
    monkeypatch.setattr(train, "fit", lambda *_: None)
    run = undone(run_folder, here, "router", "joint")
    train_tiny("--stage", "router")
    router, encoder = (load_file(run / name / "model.safetensors") for name in ("router/router", "models/encoder"))
    assert router.keys() - encoder.keys() == {"expert_embeddings"}
    assert all(torch.equal(router[name], tensor) for name, tensor in encoder.items())
    shutil.rmtree(run / "router")
    shutil.copytree(run_folder / "router", run / "router")
    train_tiny("--stage", "joint")
    joint = {name: raw for name, raw in contents(run, ["joint"]).items() if name.endswith(".safetensors")}
    assert len(joint) == 11
    for name, raw in joint.items():
        source = "router" if name.startswith("joint/router") else "warmup"
        assert raw == (run_folder / name.replace("joint", source, 1)).read_bytes(), name


# ----------------------------------------------------------------------------------------------------------------------
# Overwrite, and what is never touched

def test_overwrite_trains_a_stage_again_and_drops_the_stages_after_it(run_folder, here, no_results):
    run = copy(run_folder, here)
    assert train_tiny("--stage", "router", "--overwrite", "--steps", "2", "--seed", "0") is None
    assert not differing(run, run_folder, ("warmup", "models", "data"))
    assert not (run / "joint").exists() and differing(run, run_folder, ["router"])
    assert Counter(entry["stage"] for entry in log(run)) == {"pretrain": 4, "warmup": 5, "router": 2}
    assert not list((run / "state").glob("joint*")) and len(list((run / "state").glob("router*"))) == 1
    assert json.loads((run / "config.json").read_text())["stages"].keys() == {"warmup", "router"}
    assert train_tiny("--stage", "router", "--overwrite") is None and train_tiny("--stage", "joint") is None
    assert not differing(run, run_folder)


def test_overwrite_of_every_stage_may_change_every_setting(run_folder, here, no_results):
    run = copy(run_folder, here)
    assert train_tiny("--overwrite", "--seed", "1", "--rank", "4", "--stage", "warmup", "--steps", "2") is None
    assert differing(run, run_folder, ["models", "data"]) >= {"models/base/model.safetensors", "data/train.jsonl"}
    assert json.loads((run / "config.json").read_text())["setup"].items() >= {"seed": 1, "rank": 4}.items()
    adapter = load_file(run / "warmup" / "experts" / EXPERTS[0] / "adapter_model.safetensors")
    assert {tensor.shape[0] for name, tensor in adapter.items() if "lora_A" in name} == {4}
    assert not (run / "router").exists() and not (run / "joint").exists()
    assert {entry["stage"] for entry in log(run)} == {"pretrain", "warmup"}


def test_an_overwrite_without_room_for_its_copies_changes_nothing(run_folder, here, no_results, monkeypatch):
    run = copy(run_folder, here)
    before = contents(run)
    monkeypatch.setattr(shutil, "copyfile", mock.Mock(side_effect=OSError(errno.ENOSPC, "No space left on device")))
    said = message_of("--preset", "tiny", "--stage", "joint", "--overwrite")
    assert "cannot be written (No space left on device)" in said
    assert contents(run) == before and [path.name for path in run.parent.iterdir()] == [run.name]


@pytest.mark.parametrize("without, argv, why", [
    ([], "--stage router --rank 4", "rank was 8 and is now 4"),  # warm-up stays, and was trained with rank 8
    (["warmup"], "--stage joint", "warmup is not done here")], ids=["another rank", "joint without warm-up"])
def test_an_overwrite_that_is_refused_changes_nothing(run_folder, here, without, argv, why):
    run = copy(run_folder, here, without)
    with pytest.raises(UserError, match=why):
        train_tiny("--overwrite", *argv.split())
    assert not differing(run, run_folder, {*EVERYTHING, "log.jsonl", "config.json"} - set(without))


@pytest.mark.parametrize("argv", [[], ["--overwrite"]], ids=["", "overwrite"])
def test_a_folder_or_file_that_is_no_run_is_refused_and_not_touched(here, argv):
    (here / "home" / "photos").mkdir(parents=True)
    (here / "home" / "letter.txt").write_text("dear")
    (here / "file").write_text("a file")
    for name in ("home", "file"):
        with pytest.raises(UserError, match=f"{name} is there already and holds no run"):
            train_tiny("--run", name, *argv)
    assert sorted(p.name for p in here.rglob("*")) == ["file", "home", "letter.txt", "photos"]
    assert (here / "home" / "letter.txt").read_text() == "dear"


@pytest.mark.parametrize("there", [[], ["warmup"], ["router"]], ids=["nothing", "warmup", "router"])
def test_joint_before_the_other_stages_is_refused_with_the_command_to_run_first(run_folder, here, there):
    missing = "router" if there == ["warmup"] else "warmup"
    if there:
        undone(run_folder, here, missing, "joint")
    said = message_of("--preset", "tiny", "--stage", "joint")
    assert f"{missing} is not done here" in said and (there or not (here / RUN).exists())
    (program, *argv), = commands_in(said)
    found = command.parse(train.Args, argv)
    assert (program, found.stage, found.preset, Path(found.run)) == ("train.py", missing, "tiny", RUN)


@pytest.mark.parametrize("argv, why", [
    ("--resume --overwrite", "--resume goes on.*--overwrite starts again: choose one"),
    ("--stage router --lr 1e-3", "--lr has no meaning for --stage router"),
    ("--stage warmup --router-lr 1e-3", "--router-lr has no meaning for --stage warmup"),
    ("--stage warmup --joint-gate uniform", "--joint-gate is for --stage joint"),
    ("--stage router --joint-gate uniform", "--joint-gate is for --stage joint"),
    ("--device tpu", "--device 'tpu': expected cpu, cuda or cuda:N"), ("--device mps", "expected cpu, cuda or cuda:N")])
def test_arguments_that_contradict_each_other_are_refused(here, argv, why):
    with pytest.raises(UserError, match=why):
        train_tiny(*argv.split())
    assert not any(here.iterdir())


def test_a_gpu_that_only_emulates_bfloat16_is_refused_and_takes_float32(monkeypatch):
    """PyTorch says that such a GPU has bfloat16 unless it is asked without emulation. It would be slower than fp32."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    gpu = torch.device("cuda")
    for name in (None, "bfloat16"):
        with pytest.raises(UserError, match="Tesla T4 has no bfloat16: use --dtype float32"):
            command.pick_dtype(name, gpu)
    assert command.pick_dtype("float32", gpu) == command.pick_dtype(None, torch.device("cpu")) == torch.float32
    assert command.pick_dtype("bfloat16", torch.device("cpu")) == torch.bfloat16


# ----------------------------------------------------------------------------------------------------------------------
# Models and data that tiny makes, and a run that is moved

@pytest.mark.parametrize("name", [
    "data", "models", *(f"data/{split}.jsonl" for split in SPLITS), "data/train.jsonl, after a whole line",
    *(f"models/{role}/{file}" for role in ("base", "encoder")
      for file in ("model.safetensors", "tokenizer.json", "config.json", "tokenizer_config.json"))])
def test_data_and_models_that_are_missing_or_cut_off_are_made_again_identically(run_folder, here, monkeypatch, name):
    """Folders are removed, files are cut off after two thirds."""
    run = copy(run_folder, here)
    name, _, at_line_end = name.partition(", ")
    if (run / name).is_dir():
        shutil.rmtree(run / name)
    else:
        raw = (run / name).read_bytes()
        raw = raw[:len(raw) * 2 // 3]
        (run / name).write_bytes(raw[:raw.rindex(b"\n") + 1] if at_line_end else raw)
    monkeypatch.setattr(train, "print_results", lambda setup: setup.load_data())
    assert train_tiny() is None
    assert not differing(run, run_folder, ("data", "models"))


@pytest.mark.parametrize("name", ["elsewhere", "an/absolute/path"])
def test_a_run_can_be_moved(run_folder, here, capsys, name):
    """It is complete at its new place, and is measured without the models at the old one."""
    run = here / name if name.startswith("an/") else Path(name)
    run.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(copy(run_folder, here), run)
    assert train_tiny("--run", str(run)) is None
    assert f"{run} is complete" in capsys.readouterr().out
    evaluation.main(["routing", "--run", str(run)])
    assert "after joint" in capsys.readouterr().out


def test_the_options_of_a_stage_do_not_change_the_tiny_models(run_folder, here, no_results):
    """Otherwise a base that is made again would not be the same."""
    options = "--steps 2 --lr 1e-4 --batch 3 --clip 0.1 --lr-warmup 0.5 --tokens 512".split()
    assert train_tiny("--stage", "warmup", *options) is None
    assert not differing(here / RUN, run_folder, ["models/base", "data"])


# ----------------------------------------------------------------------------------------------------------------------
# What is missing, and how to get it

QWEN = "hf download Qwen/Qwen2.5-0.5B --local-dir weights/Qwen2.5-0.5B"
LLAMA = ("hf auth login && hf download meta-llama/Llama-3.1-8B-Instruct --exclude \"original/*\" --local-dir "
         "weights/Llama-3.1-8B-Instruct")
RECORDS = "data/personafuse.jsonl, the training records; --data template takes the template teacher's\n"


@pytest.mark.parametrize("argv, named, absent", [
    ("--stage router", ["preset paper, router: missing\n", QWEN, RECORDS], ["Llama", "response"]),
    ("--stage warmup", ["preset paper, warmup: missing\n", LLAMA, RECORDS], ["Qwen"]),
    ("--stage joint", ["preset paper, joint: missing\n", LLAMA, QWEN], []),
    ("", ["preset paper, stages: missing\n", LLAMA, QWEN], []),
    ("--device cpu --base b/Llama-3.1-8B-Instruct --encoder e --data d.jsonl",
     ["b/Llama-3.1-8B-Instruct, the base's model folder: hf auth login", "e, the encoder's model folder\n",
      "d.jsonl, the training records"], ["weights", "a CUDA GPU"])])
def test_one_message_names_all_that_a_stage_lacks_and_how_to_get_it(here, argv, named, absent):
    """It names nothing that the stage does not need."""
    said = message_of(*argv.split())
    if not torch.cuda.is_available() and "--device" not in argv:
        named = [*named, "a CUDA GPU", "--device cpu"]
    assert all(words in said for words in named) and not any(words in said for words in absent), said
    assert said.splitlines()[-1] == "python train.py --preset tiny --stage all runs without any of it"
    assert not any(here.iterdir())


@pytest.mark.parametrize("stage", ["all", "router"])
def test_more_frozen_layers_than_the_encoder_has_are_refused_before_training(here, stage):
    small.make(here)
    argv = [*small.TRAIN, "--stage", stage, "--frozen-layers", "2"]
    with pytest.raises(UserError, match="--frozen-layers is 2, expected at most 1, the layers of encoder"):
        train.main(argv)
    assert not (here / "run" / "warmup").exists() and not checkpoints.checkpoint_files(here / "run", "warmup")


def test_the_presets_records_are_the_first_that_are_there(here, capsys):
    """small and paper take data/personacot.jsonl; paper's own come first. "template" takes the template teacher's."""
    for name in ("base", "encoder"):
        small.write_model(here / name, "llama" if name == "base" else "qwen2")

    def data_of(*argv):
        args = command.parse(train.Args, ["--base", "base", "--encoder", "encoder", "--device", "cpu", *argv])
        return runs.make_setup(args, runs.STAGES).data
    (here / "data").mkdir()
    (here / "data" / "personacot.jsonl").write_text("")
    assert data_of("--preset", "small") == "data/personacot.jsonl" and not capsys.readouterr().out
    assert data_of() == "data/personacot.jsonl"
    assert capsys.readouterr().out == "data/personafuse.jsonl is not here; the records are data/personacot.jsonl\n"
    (here / "data" / "personafuse.jsonl").write_text("")
    assert data_of() == "data/personafuse.jsonl" and not capsys.readouterr().out
    for preset in ("tiny", "small", "paper"):
        assert data_of("--preset", preset, "--data", "template") == f"runs/{preset}/data"


def test_the_command_prints_this_message_and_nothing_else(here):
    found = subprocess.run([sys.executable, str(ROOT / "train.py"), "--stage", "router"], cwd=here,
                           capture_output=True, text=True, encoding="utf-8", timeout=120)
    assert (found.returncode, found.stdout) == (2, "") and not any(here.iterdir())
    assert found.stderr == f"train.py: error: {message_of('--stage', 'router')}\n"


@pytest.mark.parametrize("preset, folder, printed", [
    ("paper", "weights/Qwen2.5-0.5B", ""),
    ("small", "weights/Qwen2.5-Coder-0.5B-Instruct", "the encoder is weights/Qwen2.5-Coder-0.5B-Instruct")])
def test_models_and_data_that_are_there_are_taken(here, capsys, preset, folder, printed):
    """small takes the Coder encoder where only that one is there, and says so."""
    (here / folder).mkdir(parents=True)
    (here / "mine.jsonl").write_text("")
    argv = f"--preset {preset} --stage router --data mine.jsonl".split()
    setup = runs.make_setup(command.parse(train.Args, [*argv, "--device", "cpu"]), ("router",))
    assert (setup.base, setup.encoder, setup.data) == (None, folder, "mine.jsonl")
    shown = capsys.readouterr().out
    assert printed in shown and bool(shown) == bool(printed)
    if preset == "paper" and not torch.cuda.is_available():
        assert message_of(*argv).count("\n  - ") == 1  # the GPU


# ----------------------------------------------------------------------------------------------------------------------
# The user's own data

def record(number, **changes):
    """A record with the required fields only."""
    r = template_records("train", 1, seed=number)[0]
    return {"id": number, "query": r["query"], "response": r["response"], "traits": r["traits"]} | changes


def write_splits(path, records):
    """Write the same records as train, validation and test. Returns the folder's path."""
    for name in SPLITS:
        write_records(path / f"{name}.jsonl", [r | {"id": f"{name}-{r['id']}"} for r in records])
    return str(path)


def test_the_router_stage_needs_neither_responses_nor_a_base(run_folder, here, capsys):
    records = [{k: v for k, v in record(i).items() if k != "response"} for i in range(12)]
    data = write_splits(here / "mine", records)
    assert train_tiny("--stage", "router", "--data", data, "--encoder", str(run_folder / "models" / "encoder")) is None
    assert not (here / RUN / "models").exists() and (here / RUN / "router" / "router" / "model.safetensors").exists()
    assert "Router on 8 held-out queries" in capsys.readouterr().out
    with pytest.raises(UserError, match="line 1: no 'response'"):
        train_tiny("--stage", "warmup", "--data", data, "--base", str(run_folder / "models" / "base"))


@pytest.mark.parametrize("stage, changes", [("warmup", {}), ("router", {}), ("router", {"response": None})],
                         ids=["warmup", "router", "router without responses"])
def test_tiny_makes_its_models_for_any_records(here, no_results, stage, changes):
    """The models are made from the template teacher's text, whose extra fields other records lack."""
    records = [{k: v for k, v in record(i, **changes).items() if v is not None} for i in range(12)]
    assert train_tiny("--stage", stage, "--data", write_splits(here / "mine", records), "--steps", "1") is None


def test_records_left_out_and_experts_left_untrained_are_printed(run_folder, here, no_results, capsys):
    records = [record(i, traits={"openness": 1}) for i in range(8)]
    records += [record(8, traits={}), record(9, traits={"openness": 1}, response="so " * 400)]
    assert train_tiny("--stage", "warmup", "--data", write_splits(here / "mine", records), "--base",
                      str(run_folder / "models" / "base"), "--steps", "2", "--tokens", "200") is None
    shown = capsys.readouterr().out
    assert "left out 3 records whose traits are all zero" in shown  # one in each split
    assert "warmup: left out 1 of 9 records, longer than 200 tokens" in shown
    untrained = re.search("no record calls for (.*); these experts stay untrained", shown)[1].split(", ")
    assert untrained == [e for e in EXPERTS if e != "high_openness"]
    for expert in EXPERTS:
        adapter = load_file(here / RUN / "warmup" / "experts" / expert / "adapter_model.safetensors")
        moved = any(tensor.any() for name, tensor in adapter.items() if "lora_B" in name)
        assert moved == (expert == "high_openness")
