"""Laws of train.py and synth.py as commands: what a run folder holds, how a run is begun, stopped, gone on with,
refused and begun anew, and what the person at the keyboard is told. One much reduced tiny run is made and shared.
"""
import contextlib
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

import pytest
import torch
from safetensors.torch import load_file, save_file

import eval as evaluation
import synth
import train
from support import chat as chat_module
from support import checkpoints
from support import command
from support import process
from support import rows as rows_module
from support import runs
from lora import EXPERTS
from support.files import UserError
from support.records import SPLITS, load_data, read_records, write_records
from synth import template_records

ROOT = Path(train.__file__).resolve().parent
RUN = Path("runs/tiny")  # where the command puts it when nobody says otherwise
STEPS = {"pretrain": 4, "warmup": 5, "router": 8, "joint": 3}
REDUCED = runs.PRESETS["tiny"] | dict(
    records=(300, 40, 60), eval_records=8, pretrain=dict(steps=4, batch=6, lr=4e-3),
    warmup=dict(steps=5, batch=4, lr=1e-2), router=dict(steps=8, batch=8, router_lr=2e-3),
    joint=dict(steps=3, batch=4, lr=5e-3, router_lr=5e-4))
made = {}  # the run and what was printed; test_eval.py imports the fixture below and gets the same


@pytest.fixture(autouse=True)
def reduced(monkeypatch):
    """The tiny preset at a fortieth of its size, its models made from 300 records too."""
    monkeypatch.setitem(runs.PRESETS, "tiny", REDUCED)
    monkeypatch.setattr(train, "template_records", lambda split, n, seed: template_records(split, min(n, 300), seed))


@pytest.fixture
def run_folder(reduced, tmp_path_factory):
    """A whole run: python train.py --preset tiny --stage all, in an empty folder. Not to be written to."""
    if not made:
        folder, out, err = tmp_path_factory.mktemp("whole"), io.StringIO(), io.StringIO()
        with contextlib.chdir(folder), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            assert train.main(["--preset", "tiny", "--stage", "all"]) is None
        made.update(folder=folder, out=out.getvalue(), err=err.getvalue())
    return made["folder"] / RUN


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def no_closing(monkeypatch):
    """Runs end without measuring and answering, where a test asks for something else."""
    monkeypatch.setattr(train, "print_results", lambda setup: None)


def tiny(*argv):
    return train.main(["--preset", "tiny", *argv])


def copy(run_folder, here, without=()):
    """A copy of the run, under the same relative name, without some of its parts."""
    shutil.copytree(run_folder, here / RUN)
    for name in without:
        for path in (here / RUN).glob(name):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return here / RUN


def undone(run_folder, here, *stages):
    """A copy of the run as it was before these stages were begun."""
    run = copy(run_folder, here, [pattern for stage in stages for pattern in (stage, f"state/{stage}*")])
    config = json.loads((run / "config.json").read_text())
    config["stages"] = {stage: s for stage, s in config["stages"].items() if stage not in stages}
    for stage, role in (("warmup", "base"), ("router", "encoder")):
        config["setup"][role] = None if {stage, "joint"} <= set(stages) else config["setup"][role]
    (run / "config.json").write_text(json.dumps(config))
    for stage in stages:
        checkpoints.rewind_log(run, stage, 0).close()
    return run


def contents(folder, parts=("warmup", "router", "joint")):
    """{name: bytes} of all files in these parts of a run."""
    return {str(file.relative_to(folder)): file.read_bytes() for part in parts
            for file in [folder / part, *(folder / part).rglob("*")] if file.is_file()}


def differ(a, b, parts=("warmup", "router", "joint")):
    """Names of the files in these parts that are not the same, to the last bit, in both runs."""
    a, b = contents(a, parts), contents(b, parts)
    return {name for name in a.keys() | b.keys() if a.get(name) != b.get(name)}


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@contextlib.contextmanager
def stopping_in(stage, step, number):
    """Send this process a signal while this step of this stage is being computed."""
    whole, count = train.Stage.step, Counter()

    def unexpected(number, frame):  # a program that does not take the signal is not to end the tests
        raise AssertionError(f"nobody took signal {number}")

    def interrupted(task, *args):
        count[task.stage] += 1
        if (task.stage, count[task.stage]) == (stage, step):
            signal.raise_signal(number)
        return whole(task, *args)
    before = signal.signal(number, unexpected)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train.Stage, "step", interrupted)
            yield
        assert signal.getsignal(number) is unexpected  # the program has put back what it found
    finally:
        signal.signal(number, before)


# ----------------------------------------------------------------------------------------------------------------------
# A whole run

def test_a_run_folder_is_laid_out_as_promised(run_folder):
    expected = {"config.json", "log.jsonl", *(f"data/{name}.jsonl" for name in SPLITS)}
    for role in ("base", "encoder"):
        expected |= {f"models/{role}/{name}" for name in (
            "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")}
    for stage in ("warmup", "joint"):
        expected |= {f"{stage}/experts/{expert}/{name}" for expert in EXPERTS
                     for name in ("adapter_config.json", "adapter_model.safetensors")}
    expected |= {f"tokens/{role}.safetensors" for role in ("base", "encoder")}
    for stage in ("router", "joint"):
        expected |= {f"{stage}/router/config.json", f"{stage}/router/model.safetensors"}
    found = {str(file.relative_to(run_folder)) for file in run_folder.rglob("*") if file.is_file()}
    state = {name for name in found if name.startswith("state/")}
    assert found - state == expected
    assert state == {f"state/{stage}-{steps:07d}.safetensors" for stage, steps in STEPS.items()}
    assert {Path(name).suffix for name in found} == {".json", ".jsonl", ".safetensors"}  # and so no pickle


def test_the_runs_config_tells_how_to_make_it_again(run_folder):
    found = json.loads((run_folder / "config.json").read_text())
    assert found["setup"] == {"preset": "tiny", "base": "{run}/models/base", "encoder": "{run}/models/encoder",
                              "data": "{run}/data", "seed": 0, "rank": 8, "alpha": 16.0}
    assert list(found["stages"]) == ["warmup", "router", "joint"]
    for stage, settings in found["stages"].items():
        assert settings.items() >= REDUCED[stage].items() and settings["seed"] == 0 and settings["clip"] == 1.0
    assert found["stages"]["joint"].items() >= {"lam": 0.1, "tau": 1.0, "contrastive_tau": 0.07,
                                                "joint_gate": "learned"}.items()


def test_the_log_has_every_step_once_in_order(run_folder):
    entries = log(run_folder)
    assert [(entry["stage"], entry["step"]) for entry in entries] == [
        (stage, step) for stage, steps in STEPS.items() for step in range(1, steps + 1)]
    for entry in entries:
        keys = {"step", "stage", "loss", "grad_norm", "lr", "tokens_per_s"}
        gates = {"entropy", "top1", "usage"} if entry["stage"] in ("router", "joint") else set()
        extra = {"contrastive"} if entry["stage"] == "joint" else set()
        assert set(entry) == keys | gates | extra
        assert all(math.isfinite(entry[key]) and entry[key] >= 0 for key in set(entry) - {"stage", "usage"})
        if gates:
            assert len(entry["usage"]) == len(EXPERTS) and abs(sum(entry["usage"]) - 1) < 1e-3
            assert 0.1 <= entry["top1"] <= 0.451 and 0 < entry["entropy"] <= math.log(10) + 1e-4  # τ = 1 on cosines


def test_a_run_ends_with_losses_under_five_gates_and_five_queries_answered(run_folder):
    shown = made["out"]
    table = dict(re.findall(r"^  (\w+) +(\d+\.\d{4}) +[+-]\d\.\d{4}   \S", shown, re.M))
    assert list(table) == ["base", "uniform", "shuffled", "learned", "oracle"]
    for i, record in enumerate(read_records(run_folder / "data" / "test.jsonl")[:5], 1):
        part = shown.split(f"\nQuery {i}: ")[1].split("\nQuery ")[0].splitlines()
        assert part[0] == record["query"]
        assert [line.split()[0] for line in part[1:6]] == [e.split("_")[1] for e in EXPERTS[::2]]
        assert part[6].startswith("  base:        ") and part[7].startswith("  PersonaFuse: ")
    assert "Query 6" not in shown
    assert "Router on 8 held-out queries, tau 1: its first choice" in shown and "no fair control; shuffled is" in shown
    assert shown.rstrip().splitlines()[-1] == f"Results are in {RUN}; python eval.py ask --run {RUN} \"…\" asks it " \
                                              "something"


def test_the_closing_table_is_the_held_out_loss(run_folder, monkeypatch):
    """Of the latest experts, per token of the reply, on test records that training never saw."""
    monkeypatch.chdir(run_folder.parent.parent)
    args = command.parse(train.Args, ["--preset", "tiny"])
    setup = runs.resolve(args, runs.STAGES)
    model, chat = setup.load_base(RUN / "joint" / "experts"), chat_module.Chat.from_dir(setup.base)
    rows, _ = rows_module.make_rows(setup.load_data()["test"][:8], chat)
    for rule, gate in (("base", None), ("uniform", torch.full((1, 10), 0.1))):
        losses = [train.row_losses(model, [row], gate).item() for row in rows]
        mean = sum(losses) / sum(len(row.ids) - row.prompt for row in rows)
        assert abs(float(re.search(rf"^  {rule} +(\d+\.\d+)", made["out"], re.M)[1]) - mean) < 2e-4


def test_what_is_piped_has_lines_and_no_carriage_returns(run_folder):
    assert "\r" not in made["out"] + made["err"] and "\x1b" not in made["out"] + made["err"]
    for stage, steps in STEPS.items():
        assert re.search(rf"^{stage} {steps}/{steps} loss \d+\.\d{{4}} norm ", made["out"], re.M)
    assert made["err"] == ""


def test_a_complete_run_shows_its_closing_again_and_changes_nothing(run_folder, here, capsys):
    run = copy(run_folder, here)
    times = {file: file.stat().st_mtime_ns for file in (run / "warmup").rglob("*")}
    assert tiny() is None
    shown = capsys.readouterr().out
    assert f"{RUN} is complete" in shown and shown.split("\nRouter on ")[1] == made["out"].split("\nRouter on ")[1]
    assert not differ(run, run_folder, ("warmup", "router", "joint", "models", "data", "state", "log.jsonl"))
    assert {file: file.stat().st_mtime_ns for file in (run / "warmup").rglob("*")} == times


def test_a_whole_run_says_the_same_as_its_log(run_folder):
    last = {entry["stage"]: entry for entry in log(run_folder)}
    for stage, entry in last.items():
        assert f"{stage} {entry['step']}/{entry['step']} loss {entry['loss']:.4f} " in made["out"]


# ----------------------------------------------------------------------------------------------------------------------
# Other arguments on a run that is there

@pytest.mark.parametrize("argv, why", [
    ("--lr 0.5", "lr was 0.01 and is now 0.5"), ("--router-lr 0.5", "router_lr was 0.002 and is now 0.5"),
    ("--steps 6", "steps was 5 and is now 6"), ("--batch 3", "batch was 4 and is now 3"),
    ("--clip 2", "clip was 1.0 and is now 2.0"), ("--lr-warmup 0.2", "lr_warmup was 0.1 and is now 0.2"),
    ("--tokens 99 --resume", "tokens was 4096 and is now 99"), ("--stage joint --lr 1", "lr was 0.005 and is now 1.0"),
    ("--contrastive-tau 1", "contrastive_tau was 0.07 and is now 1.0"),
    ("--seed 1 --resume", "seed was 0 and is now 1"),
    ("--tau 0.2", "tau was 1.0 and is now 0.2"), ("--lam 1", "lam was 0.1 and is now 1.0"),
    ("--joint-gate uniform", "joint_gate was 'learned' and is now 'uniform'"), ("--seed 1", "seed was 0 and is now 1"),
    ("--rank 4", "rank was 8 and is now 4"), ("--alpha 8", "alpha was 16.0 and is now 8.0"),
    (f"--preset small --run {RUN} --data . --base . --encoder .", "preset was 'tiny' and is now 'small'"),
    ("--base .", "base was '.*models/base' and is now '.'"), ("--data .", "data was '.*data' and is now '.'"),
])
def test_other_settings_than_the_runs_are_refused_by_name(run_folder, monkeypatch, argv, why):
    monkeypatch.chdir(run_folder.parent.parent)
    before = contents(run_folder, ("config.json",))
    with pytest.raises(UserError, match=why) as error:
        tiny(*argv.split())
    assert "\n" not in str(error.value) and contents(run_folder, ("config.json",)) == before


def test_what_changes_no_result_may_change(run_folder, here, no_closing):
    run = copy(run_folder, here)
    assert tiny(*"--save-every 3 --keep 1 --log-every 1 --recompute --eval-records 3".split()) is None
    assert not differ(run, run_folder)


def test_a_run_of_another_format_is_refused(run_folder, here):
    file = here / RUN / "config.json"
    file.parent.mkdir(parents=True)
    for text in ('{"version": 99, "stages": {}, "setup": {}}', '{"version": 1}', "{}"):
        file.write_text(text)
        with pytest.raises(UserError, match="config.json: (format .*made by another version|not a run's)"):
            tiny()
    file.write_text("{")
    with pytest.raises(UserError, match="config.json: not readable as JSON"):
        tiny()


def test_what_is_inside_the_run_folder_is_what_it_was_begun_with(run_folder, here, no_closing):
    """The models and data that tiny makes for itself, changed by hand: refused, and left as they are."""
    def other_weights(file):
        state = load_file(file)
        state["model.norm.weight"] *= 1.01
        save_file(state, file)

    def other_response(file):
        lines = file.read_text().splitlines(keepends=True)
        file.write_text(json.dumps(json.loads(lines[0]) | {"response": "No."}) + "\n" + "".join(lines[1:]))

    def own_records(file):
        write_records(file, read_records(file)[::2])
    for name, change, words in (
            ("models/base/model.safetensors", other_weights, "not the base that runs/tiny was begun with"),
            ("data/train.jsonl", other_response, "not the data that runs/tiny was begun with"),
            ("data/train.jsonl", own_records, "neither the template teacher's records of seed 0 nor a part of them")):
        run = undone(run_folder, here, "joint")
        change(run / name)
        before = contents(run, ("models", "data", "state", "config.json", "log.jsonl"))
        with pytest.raises(UserError, match=words):
            tiny("--resume")
        assert contents(run, ("models", "data", "state", "config.json", "log.jsonl")) == before
        shutil.rmtree(run)


def test_a_runs_name_may_be_a_part_of_others(here):
    """--run s with --base weights/b is not inside s, though "s/" is in it."""
    setup = runs.Setup(Path("s"), "tiny", "weights/b", "s/models/encoder", "s/data", *[None] * 8)
    kept = [setup.relative(path) for path in (setup.base, setup.encoder, setup.data)]
    assert kept == ["weights/b", "{run}/models/encoder", "{run}/data"]
    assert [runs.Setup.inside(path, "t/s") for path in kept] == ["weights/b", "t/s/models/encoder", "t/s/data"]


def test_every_number_that_is_taken_makes_a_run_that_can_be_opened(here, no_closing, monkeypatch):
    monkeypatch.setattr(train, "train_stage", lambda *_: None)
    monkeypatch.setattr(train, "prepare", lambda *_: None)
    monkeypatch.setattr(train, "room_for", lambda *_: 0)
    most = str(2**31)
    assert tiny("--seed", most, "--alpha", most, "--tau", most) is None
    assert runs.read_run(here / RUN)["setup"]["seed"] == 2**31


# ----------------------------------------------------------------------------------------------------------------------
# Stopping and going on

def test_training_on_a_cpu_keeps_freed_memory(run_folder, here, no_closing, monkeypatch):
    called = []
    monkeypatch.setattr(train, "keep_freed_memory", lambda: called.append(True))
    copy(run_folder, here)
    tiny("--stage", "all", "--resume")
    assert called


@pytest.mark.parametrize("stage, step, number", [
    ("pretrain", 2, signal.SIGTERM), ("warmup", 3, signal.SIGINT), ("joint", 1, signal.SIGTERM)])
def test_a_stopped_run_is_not_trained_over_and_resumes_to_the_same_bits(
        run_folder, here, no_closing, capsys, stage, step, number):
    """Ctrl-C and SIGTERM finish the step and save it. Nothing but --resume or --overwrite may touch such a run."""
    if stage == "pretrain":  # from nothing at all: so two runs of one seed are the same, too
        run = here / RUN
    else:
        run = undone(run_folder, here, stage)
    only = ["--stage", "all" if stage == "pretrain" else stage]
    with stopping_in(stage, step, number):
        assert tiny(*only) == 130
    shown = capsys.readouterr()
    assert f"stopped after step {step} of {STEPS[stage]} of {stage}" in shown.err and "--resume" in shown.err
    assert (run / "config.json").exists() and not (run / stage).exists()
    assert [entry["step"] for entry in log(run) if entry["stage"] == stage] == list(range(1, step + 1))
    before = contents(run, ("config.json", "state", "log.jsonl"))
    with pytest.raises(UserError, match="--resume goes on.*--overwrite trains anew"):
        tiny(*only)
    assert contents(run, ("config.json", "state", "log.jsonl")) == before
    assert tiny(*only, "--resume") is None
    everything = ("warmup", "router", "joint", "models", "data", "state")
    changed = differ(run, run_folder, everything)
    assert changed == {f"state/{stage}-{step:07d}.safetensors"}  # of the checkpoints, two of each stage stay
    logs = [sorted((e["stage"], e["step"], e["loss"], e["lr"]) for e in log(folder)) for folder in (run, run_folder)]
    assert logs[0] == logs[1]


def test_resume_with_nothing_but_the_config_starts_from_the_beginning(run_folder, here, no_closing):
    run = copy(run_folder, here, ["[!c]*"])
    assert [p.name for p in run.iterdir()] == ["config.json"]
    with pytest.raises(UserError, match="begun: warmup, router, joint; not done: warmup, router, joint"):
        tiny()
    assert tiny("--resume", "--stage", "router") is None
    assert not differ(run, run_folder, ("config.json", "router", "models/encoder", "data"))


@pytest.mark.parametrize("folder", [True, False], ids=["an empty folder", "no folder"])
def test_resume_without_a_config_is_an_error(here, folder):
    if folder:
        (here / RUN).mkdir(parents=True)
    with pytest.raises(UserError, match="no config.json, so there is no run to resume"):
        tiny("--resume")
    assert not any(here.rglob("*.*"))


@pytest.fixture
def short_closing(monkeypatch):
    monkeypatch.setattr(train, "generate_replies", functools.partial(train.generate_replies, max_new_tokens=3))


@pytest.mark.parametrize("stages", [["router", "warmup", "joint"], ["warmup", "router"]], ids=" ".join)
def test_stages_one_by_one_are_the_same_bits_as_all_in_one(run_folder, here, no_closing, stages):
    """Warm-up before the router or after it: neither knows of the other."""
    run = undone(run_folder, here, "warmup", "router", "joint")
    for stage in stages:
        assert tiny("--stage", stage) is None
    assert not differ(run, run_folder, (*stages, "models", "data"))


@pytest.mark.parametrize("stage, there, shows", [
    ("warmup", [], "experts after warmup"), ("router", [], "Router on"), ("router", ["warmup"], "Router on"),
    ("warmup", ["router"], "experts after warmup")])
def test_a_stage_alone_ends_well_whatever_was_done_before(run_folder, here, short_closing, capsys, stage, there, shows):
    run = undone(run_folder, here, "joint", *({"warmup", "router"} - set(there)))
    shutil.copytree(run_folder / stage, run / stage)  # as if it had just been trained
    assert tiny("--stage", stage, "--eval-records", "5") is None
    shown = capsys.readouterr().out
    assert shows in shown and f"Results are in {RUN}" in shown


def test_a_stage_starts_from_what_was_made_before_it(run_folder, here, no_closing, monkeypatch):
    """Joint from warm-up's experts and the router stage's router, that one from the encoder: seen by taking no step."""
    monkeypatch.setattr(train, "fit", lambda *_: None)
    run = undone(run_folder, here, "router", "joint")
    tiny("--stage", "router")
    router, encoder = (load_file(run / name / "model.safetensors") for name in ("router/router", "models/encoder"))
    assert router.keys() - encoder.keys() == {"expert_embeddings"}
    assert all(torch.equal(router[name], tensor) for name, tensor in encoder.items())
    shutil.rmtree(run / "router")
    shutil.copytree(run_folder / "router", run / "router")
    tiny("--stage", "joint")
    joint = {name: tensors for name, tensors in contents(run, ["joint"]).items() if name.endswith(".safetensors")}
    assert len(joint) == 11
    for name, tensors in joint.items():
        first = "router" if name.startswith("joint/router") else "warmup"
        assert tensors == (run_folder / name.replace("joint", first, 1)).read_bytes(), name


# ----------------------------------------------------------------------------------------------------------------------
# Beginning anew, and what is never touched

def test_overwrite_trains_a_stage_and_those_after_it_anew(run_folder, here, no_closing):
    run = copy(run_folder, here)
    assert tiny("--stage", "router", "--overwrite", "--steps", "2", "--seed", "0") is None
    assert not differ(run, run_folder, ("warmup", "models", "data"))
    assert not (run / "joint").exists() and differ(run, run_folder, ["router"])
    assert Counter(entry["stage"] for entry in log(run)) == {"pretrain": 4, "warmup": 5, "router": 2}
    assert not list((run / "state").glob("joint*")) and len(list((run / "state").glob("router*"))) == 1
    assert json.loads((run / "config.json").read_text())["stages"].keys() == {"warmup", "router"}
    assert tiny("--stage", "router", "--overwrite") is None and tiny("--stage", "joint") is None
    assert not differ(run, run_folder)


def test_overwrite_of_everything_may_change_everything(run_folder, here, no_closing):
    run = copy(run_folder, here)
    assert tiny("--overwrite", "--seed", "1", "--rank", "4", "--stage", "warmup", "--steps", "2") is None
    assert differ(run, run_folder, ["models", "data"]) >= {"models/base/model.safetensors", "data/train.jsonl"}
    assert json.loads((run / "config.json").read_text())["setup"].items() >= {"seed": 1, "rank": 4}.items()
    adapter = load_file(run / "warmup" / "experts" / EXPERTS[0] / "adapter_model.safetensors")
    assert {tensor.shape[0] for name, tensor in adapter.items() if "lora_A" in name} == {4}
    assert not (run / "router").exists() and not (run / "joint").exists()
    assert {entry["stage"] for entry in log(run)} == {"pretrain", "warmup"}


def test_overwrite_that_is_refused_has_removed_nothing(run_folder, here):
    """What the stages that stay agreed on may not change under them; and a refusal leaves all as it was."""
    run, everything = copy(run_folder, here), ("warmup", "router", "joint", "state", "log.jsonl", "config.json")
    with pytest.raises(UserError, match="rank was 8 and is now 4"):
        tiny("--overwrite", "--stage", "router", "--rank", "4")
    assert not differ(run, run_folder, everything)


@pytest.mark.parametrize("argv", [[], ["--overwrite"]], ids=["", "overwrite"])
def test_what_is_no_run_is_refused_and_not_touched(here, argv):
    (here / "home" / "photos").mkdir(parents=True)
    (here / "home" / "letter.txt").write_text("dear")
    (here / "file").write_text("a file")
    for name in ("home", "file"):
        with pytest.raises(UserError, match=f"{name} is there already and holds no run"):
            tiny("--run", name, *argv)
    assert sorted(p.name for p in here.rglob("*")) == ["file", "home", "letter.txt", "photos"]
    assert (here / "home" / "letter.txt").read_text() == "dear"


def told(message):
    """The python commands in a message -> lists of words."""
    return [shlex.split(found)[1:] for found in re.findall(r"python \w+\.py(?: --?[\w-]+ ?[^-\s]\S*)*", message)]


@pytest.mark.parametrize("there", [[], ["warmup"], ["router"]], ids=["nothing", "warmup", "router"])
def test_joint_before_the_others_is_refused_with_the_command_for_them(run_folder, here, there):
    """The command is one that can be run as it stands: the preset is in it, or it would be another run."""
    missing = "router" if there == ["warmup"] else "warmup"
    if there:
        undone(run_folder, here, missing, "joint")
    with pytest.raises(UserError, match=f"{missing} is not done here") as error:
        tiny("--stage", "joint")
    assert there or not (here / RUN).exists()
    (program, *argv), = told(str(error.value))
    found = command.parse(train.Args, argv)
    assert (program, found.stage, Path(found.run)) == ("train.py", missing, RUN)
    assert found.preset == "tiny"


def test_joint_is_not_removed_where_it_could_not_be_trained_anew(run_folder, here):
    run = copy(run_folder, here, ["warmup"])
    with pytest.raises(UserError, match="warmup is not done here"):
        tiny("--stage", "joint", "--overwrite")
    assert not differ(run, run_folder, ("joint", "router", "state"))


@pytest.mark.parametrize("argv, why", [
    ("--resume --overwrite", "--resume goes on.*--overwrite removes it: choose one"),
    ("--stage router --lr 1e-3", "--lr has no meaning for --stage router"),
    ("--stage warmup --router-lr 1e-3", "--router-lr has no meaning for --stage warmup"),
    ("--stage warmup --joint-gate uniform", "--joint-gate is for --stage joint"),
    ("--stage router --joint-gate uniform", "--joint-gate is for --stage joint"),
    ("--device tpu", "--device 'tpu': expected cpu, cuda or cuda:N"), ("--device mps", "expected cpu, cuda or cuda:N"),
])
def test_arguments_that_contradict_each_other_are_refused(here, argv, why):
    with pytest.raises(UserError, match=why):
        tiny(*argv.split())
    assert not any(here.iterdir())


# ----------------------------------------------------------------------------------------------------------------------
# Torn files

@pytest.mark.parametrize("name", [
    "data", "models", *(f"data/{split}.jsonl" for split in SPLITS),
    *(f"models/{role}/{file}" for role in ("base", "encoder")
      for file in ("model.safetensors", "tokenizer.json", "config.json", "tokenizer_config.json"))])
def test_what_is_torn_or_missing_in_data_or_models_is_made_again_identically(run_folder, here, monkeypatch, name):
    run = copy(run_folder, here)
    if (run / name).is_dir():
        shutil.rmtree(run / name)
    else:
        (run / name).write_bytes((run / name).read_bytes()[:(run / name).stat().st_size * 2 // 3])
    monkeypatch.setattr(train, "print_results", lambda setup: setup.load_data())
    assert tiny() is None
    assert not differ(run, run_folder, ("data", "models"))


def test_data_cut_at_a_lines_end_are_made_again(run_folder, here, monkeypatch):
    """Every line of them is whole; only their number says that some are missing."""
    run = copy(run_folder, here)
    file = run / "data" / "train.jsonl"
    file.write_text("".join(file.read_text(encoding="utf-8").splitlines(keepends=True)[:-3]), encoding="utf-8")
    monkeypatch.setattr(train, "print_results", lambda setup: setup.load_data())
    assert tiny() is None
    assert not differ(run, run_folder, ("data",))


@pytest.mark.parametrize("name", ["elsewhere", "an/absolute/path"])
def test_a_run_can_be_moved(run_folder, here, capsys, name):
    """It is complete there, with no settings that differ, and measured without the models at the old place."""
    run = here / name if name.startswith("an/") else Path(name)
    run.parent.mkdir(parents=True, exist_ok=True)
    shutil.move(copy(run_folder, here), run)
    assert tiny("--run", str(run)) is None
    assert f"{run} is complete" in capsys.readouterr().out
    evaluation.main(["routing", "--run", str(run)])
    assert "after joint" in capsys.readouterr().out


def test_the_tiny_models_are_the_same_whatever_a_stage_is_trained_with(run_folder, here, no_closing):
    """Learning rate, steps and the like are a stage's own. Else a base that is made again would not be the same."""
    own = "--steps 2 --lr 1e-4 --batch 3 --clip 0.1 --lr-warmup 0.5 --tokens 512".split()
    assert tiny("--stage", "warmup", *own) is None
    assert not differ(here / RUN, run_folder, ["models/base", "data"])


# ----------------------------------------------------------------------------------------------------------------------
# What is missing, and how to get it

def message_of(*argv):
    with pytest.raises(UserError) as error:
        train.main(list(argv))
    return str(error.value)


def test_the_router_stage_names_all_that_is_missing_and_nothing_that_it_does_not_need(here):
    said = message_of("--stage", "router")
    assert "hf download Qwen/Qwen2.5-0.5B --local-dir weights/Qwen2.5-0.5B" in said
    assert "data/personafuse.jsonl, the training records: python synth.py --teacher template --out " in said
    if not torch.cuda.is_available():
        assert "a CUDA GPU" in said and "--device cpu" in said
    assert said.splitlines()[-1] == "python train.py --preset tiny --stage all runs without any of it"
    assert "Llama" not in said and "response" not in said
    assert not any(here.iterdir())
    (_, *argv), = [words for words in told(said) if words[0] == "synth.py"]
    assert command.parse(synth.Args, argv).out == "data/personafuse.jsonl"  # the command is one that works


def test_warm_up_names_the_gated_base_and_how_to_get_at_it(here):
    said = message_of("--stage", "warmup")
    assert ("hf auth login && hf download meta-llama/Llama-3.1-8B-Instruct --exclude \"original/*\" "
            "--local-dir weights/Llama-3.1-8B-Instruct") in said
    assert "Qwen" not in said and "data/personafuse.jsonl" in said


@pytest.mark.parametrize("argv", [["--stage", "joint"], []], ids=["joint", "all"])
def test_stages_with_both_models_name_both(here, argv):
    said = message_of(*argv)
    assert said.count("hf download") == 2 and said.startswith(f"preset paper, {(argv or ['stages'])[-1]}: missing\n")


def test_what_is_there_is_not_called_missing(here, capsys):
    (here / "weights" / "Qwen2.5-0.5B").mkdir(parents=True)
    (here / "mine.jsonl").write_text("")
    if not torch.cuda.is_available():
        assert message_of("--stage", "router", "--data", "mine.jsonl").count("\n  - ") == 1  # the GPU
    args = command.parse(train.Args, "--stage router --data mine.jsonl --device cpu".split())
    setup = runs.resolve(args, ("router",))
    assert (setup.base, setup.encoder, setup.data) == (None, "weights/Qwen2.5-0.5B", "mine.jsonl")
    assert capsys.readouterr().out == ""


def test_small_takes_the_coder_encoder_where_only_that_is_and_says_so(here, capsys):
    (here / "weights" / "Qwen2.5-Coder-0.5B-Instruct").mkdir(parents=True)
    args = command.parse(train.Args, "--preset small --stage router --device cpu".split())
    assert runs.resolve(args, ("router",)).encoder == "weights/Qwen2.5-Coder-0.5B-Instruct"
    assert "the encoder is weights/Qwen2.5-Coder-0.5B-Instruct" in capsys.readouterr().out


def test_a_folder_or_file_that_was_named_and_is_not_there_is_named(here):
    said = message_of(*"--device cpu --base b/Llama-3.1-8B-Instruct --encoder e --data d.jsonl".split())
    assert "b/Llama-3.1-8B-Instruct, the base's model folder: hf auth login" in said
    assert "e, the encoder's model folder\n" in said and "d.jsonl, the training records" in said
    assert "weights" not in said


def test_as_a_command_the_message_is_all_that_is_said(here):
    said = message_of("--stage", "router")
    found = subprocess.run([sys.executable, str(ROOT / "train.py"), "--stage", "router"], cwd=here,
                           capture_output=True, text=True, encoding="utf-8", timeout=120)
    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr == f"train.py: error: {said}\n" and "Traceback" not in found.stderr
    assert not any(here.iterdir())


# ----------------------------------------------------------------------------------------------------------------------
# Other data than the template teacher's

def plain(number, **changes):
    """A record that has what a record needs and no more."""
    r = template_records("train", 1, seed=number)[0]
    return {"id": number, "query": r["query"], "response": r["response"], "traits": r["traits"]} | changes


def folder_of(path, records):
    for i, name in enumerate(SPLITS):
        write_records(path / f"{name}.jsonl", [r | {"id": f"{name}-{r['id']}"} for r in records])
    return str(path)


def test_the_router_stage_needs_neither_responses_nor_a_base(run_folder, here, capsys):
    records = [{k: v for k, v in plain(i).items() if k != "response"} for i in range(12)]
    data = folder_of(here / "mine", records)
    assert tiny("--stage", "router", "--data", data, "--encoder", str(run_folder / "models" / "encoder")) is None
    assert not (here / RUN / "models").exists() and (here / RUN / "router" / "router" / "model.safetensors").exists()
    assert "Router on 8 held-out queries" in capsys.readouterr().out
    with pytest.raises(UserError, match="line 1: no 'response'"):
        tiny("--stage", "warmup", "--data", data, "--base", str(run_folder / "models" / "base"))


@pytest.mark.parametrize("stage, changes", [("warmup", {}), ("router", {}), ("router", {"response": None})],
                         ids=["warmup", "router", "router without responses"])
def test_tiny_makes_its_models_whatever_the_records(here, no_closing, stage, changes):
    """Its models come from the template teacher's text; the user's records need none of that teacher's fields."""
    records = [{k: v for k, v in (plain(i) | changes).items() if v is not None} for i in range(12)]
    assert tiny("--stage", stage, "--data", folder_of(here / "mine", records), "--steps", "1") is None


def test_what_is_left_out_and_what_stays_untrained_is_said(run_folder, here, no_closing, capsys):
    records = [plain(i, traits={"openness": 1}) for i in range(8)]
    records += [plain(8, traits={}), plain(9, traits={"openness": 1}, response="so " * 400)]
    models = run_folder / "models"
    assert tiny("--stage", "warmup", "--data", folder_of(here / "mine", records), "--base", str(models / "base"),
                "--steps", "2", "--tokens", "200") is None
    shown = capsys.readouterr().out
    assert "left out 3 records whose traits are all zero" in shown  # one in each split
    assert "warmup: left out 1 of 9 records, longer than 200 tokens" in shown
    idle = re.search("no record calls for (.*); these experts stay as they are", shown)[1].split(", ")
    assert idle == [e for e in EXPERTS if e != "high_openness"]
    for expert in EXPERTS:
        adapter = load_file(here / RUN / "warmup" / "experts" / expert / "adapter_model.safetensors")
        moved = any(tensor.any() for name, tensor in adapter.items() if "lora_B" in name)
        assert moved == (expert == "high_openness")


# ----------------------------------------------------------------------------------------------------------------------
# python synth.py

def test_a_folder_gets_three_splits_that_train_reads(here, capsys):
    assert synth.main("--teacher template --out lab --count 100 --seed 3".split()) is None
    splits, zero = load_data(here / "lab")
    assert {name: len(records) for name, records in splits.items()} == {"train": 80, "validation": 10, "test": 10}
    assert zero == 0
    assert all(splits[name] == template_records(name, len(splits[name]), 3) for name in SPLITS)
    shown = capsys.readouterr().out
    assert all(f"lab/{name}.jsonl: " in shown for name in SPLITS) and splits["train"][0]["response"] in shown
    assert sorted(p.name for p in (here / "lab").iterdir()) == sorted(f"{name}.jsonl" for name in SPLITS)


@pytest.mark.parametrize("split", SPLITS)
def test_a_single_file_gets_the_phrases_of_one_split(here, split):
    synth.main(["--out", "new/some.jsonl", "--count", "30", *([] if split == "train" else ["--split", split])])
    assert read_records(here / "new" / "some.jsonl") == template_records(split, 30, 0)


def test_a_file_that_is_there_is_not_replaced_unless_asked(here):
    synth.main("--out lab --count 50".split())
    (here / "lab" / "train.jsonl").unlink()
    before = {p.name: p.read_bytes() for p in (here / "lab").iterdir()}
    with pytest.raises(UserError, match="lab/validation.jsonl is there already; --overwrite replaces it"):
        synth.main("--out lab --count 60".split())
    assert {p.name: p.read_bytes() for p in (here / "lab").iterdir()} == before
    synth.main("--out lab --count 60 --overwrite".split())
    assert len(read_records(here / "lab" / "train.jsonl")) == 48 and len(read_records(here / "lab" / "test.jsonl")) == 6
    with pytest.raises(UserError, match="is there already"):
        synth.main("--out lab/test.jsonl --count 60".split())


@pytest.mark.parametrize("argv, why", [
    ("--count 50", "--out is missing"), ("--out x --count 9", "--count is 9, expected at least 10"),
    ("--out x --teacher nobody", "invalid choice"), ("--out x --split dev", "invalid choice"),
    ("--out x --seed -3", "--seed is -3")])
def test_what_synth_cannot_do_is_refused(here, argv, why):
    with pytest.raises(UserError, match=why):
        synth.main(argv.split())
    assert not any(here.iterdir())
