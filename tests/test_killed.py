"""Killed and resumed is never interrupted: laws of a run that ends at any moment and is gone on with.

Runs of twelve steps are started in processes of their own (small.serve) and killed with SIGKILL at random calls and
returns of functions, Python's and C's, so that every moment can be hit and every failure can be repeated: in a step,
in the middle of a checkpoint whose writer has been slowed down to a thousand bytes a time, between two renames. Each
is resumed, perhaps killed again, and must end as the run that nobody interrupted: the same files, every tensor equal,
a log without gaps and doubles.
"""
import contextlib
import errno
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import train
from support import checkpoints
from support import files as files_module
from support import checkpoints, runs
import small

linux = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@pytest.fixture(scope="module")
def server():
    process = subprocess.Popen([sys.executable, small.__file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               text=True)

    def start(cwd, *argv, **how):
        process.stdin.write(json.dumps({"cwd": str(cwd), "argv": argv, **how}) + "\n")
        process.stdin.flush()
        return json.loads(process.stdout.readline())
    yield start
    process.stdin.close()
    process.wait(timeout=60)


@pytest.fixture(scope="module")
def whole(server, tmp_path_factory):
    """A run that nobody interrupted, and how many events it took with the slow writer."""
    folder = tmp_path_factory.mktemp("whole")
    small.make(folder)
    done = server(folder, *small.TRAIN, slow=True, event=0)
    assert done["status"] == 0, done
    return folder, done["events"]


def fresh(whole, folder):
    """The models and data of another run, to begin anew."""
    folder.mkdir()
    for name in ("base", "encoder", "data"):
        (folder / name).symlink_to(whole[0] / name)
    return folder


def assert_no_half_file(run):
    """Under final names, every file is whole; what is being written has another name."""
    for file in run.rglob("*"):
        if file.is_dir() or any(part.endswith((".~part", ".~old")) for part in file.relative_to(run).parts):
            continue
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as tensors:
                assert tensors.keys()
        else:
            for line in [file.read_text()] if file.suffix == ".json" else file.read_text().splitlines():
                json.loads(line)


def log(run):
    return [json.loads(line) | {"tokens_per_s": 0} for line in (run / "log.jsonl").read_text().splitlines()]


def assert_same_run(run, other):
    a, b = small.contents(run), small.contents(other)
    assert a.keys() == b.keys()
    for name in a:
        if name.endswith(".safetensors"):
            one, two = load_file(run / name), load_file(other / name)
            assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one), name
        elif name != "log.jsonl":
            assert a[name] == b[name], name
    assert log(run) == log(other)
    assert [(e["stage"], e["step"]) for e in log(run)] == [(s, i) for s in runs.STAGES for i in range(1, 5)]


@linux
@pytest.mark.parametrize("kills", [10, pytest.param(30, marks=pytest.mark.slow)])
def test_a_run_that_is_killed_at_random_moments_ends_as_if_it_had_not_been(server, whole, tmp_path, kills):
    """Ten kills over a few runs: each run is killed and resumed until it ends by itself. Kills in the first thirds of
    what is left, so that most runs see several; each fifth in the middle of a checkpoint's writing."""
    draw, killed, rounds, writing = random.Random(kills), 0, 0, 0
    while killed < kills:
        here, rounds = fresh(whole, tmp_path / str(rounds)), rounds + 1
        argv, left = small.TRAIN, whole[1]
        while True:
            how = {"event": draw.randrange(1, left) if killed < kills else 0}
            if killed < kills and killed % 5 == 2:
                how = {"half": f"{draw.choice(runs.STAGES)}-000000{draw.choice((2, 4))}"}
            done = server(here, *argv, slow=True, **how)
            if done["status"] == 0:
                break
            assert done["status"] == -signal.SIGKILL, done
            killed += 1
            run = here / "run"
            writing += any(run.rglob("*.~part"))
            assert_no_half_file(here / "run") if run.exists() else None
            if (run / "config.json").exists():  # else nothing was begun
                argv = [*small.TRAIN, "--resume"]
        assert_same_run(here / "run", whole[0] / "run")
    assert killed == kills and writing >= kills // 5, writing


@linux
def test_a_kill_in_the_middle_of_a_checkpoint_costs_no_checkpoint(server, whole, tmp_path):
    found = fresh(whole, tmp_path / "run")
    done = server(found, *small.TRAIN, slow=True, half="router-0000004")
    assert done["status"] == -signal.SIGKILL
    half = (found / "run/state/router-0000004.safetensors.~part").stat().st_size
    assert half < (whole[0] / "run/state/router-0000004.safetensors").stat().st_size
    assert_no_half_file(found / "run")
    assert (found / "run/state/router-0000002.safetensors").exists()
    (found / "run/state/router-0000003.safetensors.~part").write_bytes(b"of a step that will not be saved again")
    done = server(found, *small.TRAIN, "--resume")
    assert done["status"] == 0, done
    assert_same_run(found / "run", whole[0] / "run")


@linux
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_step_saves_it_and_says_how_to_go_on(server, whole, tmp_path, number):
    """From outside, as a process; what happens inside is in test_commands.py."""
    here = fresh(whole, tmp_path / "x")
    done = server(here, *small.TRAIN, event=whole[1] // 3, number=number)
    assert done["status"] == 130 and "stopped after step" in done["err"] and "--resume" in done["err"], done
    assert done["err"].count("\n") == 1
    assert server(here, *small.TRAIN, "--resume")["status"] == 0
    done = small.contents(here / "run")
    for name, raw in small.contents(whole[0] / "run").items():
        if not name.startswith(("state/", "log")):
            assert done[name] == raw, name
    assert log(here / "run") == log(whole[0] / "run")


@linux
def test_the_same_seed_is_the_same_run_and_how_often_is_logged_saved_and_measured_changes_nothing(server, whole,
                                                                                                  tmp_path):
    for i, more in enumerate(([], ["--save-every", "1", "--keep", "1", "--log-every", "1", "--eval-records", "1"])):
        here = fresh(whole, tmp_path / str(i))
        assert server(here, *small.TRAIN, *more)["status"] == 0
        a, b = small.contents(here / "run"), small.contents(whole[0] / "run")
        assert [n for n in b if not n.startswith(("log", "config",
                                                  *(["state"] if more else []))) and a.get(n) != b[n]] == []
        assert log(here / "run") == log(whole[0] / "run")
        states = sorted(p.name for p in (here / "run/state").iterdir())
        assert states == [f"{s}-000000{n}.safetensors" for s in ("joint", "router",
                                                                 "warmup") for n in ((4,) if more else (2, 4))]


# ----------------------------------------------------------------------------------------------------------------------
# Full disks, and folders that may only be read

@contextlib.contextmanager
def files_end_at(size):
    """No file of this process can grow beyond `size` bytes: writing more fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def here(whole, tmp_path, monkeypatch):
    monkeypatch.chdir(fresh(whole, tmp_path / "here"))
    monkeypatch.setattr(train, "print_results", lambda setup: None)
    return tmp_path / "here"


@linux
@pytest.mark.parametrize("size, name", [(20_000, "state/warmup-0000002.safetensors"), (10, "config.json")])
def test_a_full_disk_is_one_message_and_the_last_checkpoint_stays(here, size, name):
    with files_end_at(size):
        status, _, said = small.run_quietly(train, *small.TRAIN)
    assert status == 2 and f"run/{name}: cannot be written" in said, said
    assert "is kept" in said and said.count("\n") == 1
    assert_no_half_file(here / "run") if (here / "run").exists() else None
    assert not list(here.rglob("*.~part"))


@linux
def test_a_disk_that_fills_up_between_two_checkpoints_costs_neither_the_first_nor_the_run(here, whole, monkeypatch):
    whole_save, saved = checkpoints.save_file, []

    def save(tensors, file, metadata=None):
        saved.append(file)
        if len(saved) == 2:
            with files_end_at(1000):
                return whole_save(tensors, file, metadata)
        return whole_save(tensors, file, metadata)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save_file", save)
        status, _, said = small.run_quietly(train, *small.TRAIN)
    assert status == 2 and "run/state/warmup-0000004.safetensors: cannot be written" in said, said
    assert [p.name for p in (here / "run/state").iterdir()] == ["warmup-0000002.safetensors"]
    assert small.run_quietly(train, *small.TRAIN, "--resume")[0] == 0
    assert_same_run(here / "run", whole[0] / "run")


def test_a_disk_without_room_for_checkpoints_is_told_before_training(here, monkeypatch):
    monkeypatch.setattr(runs.shutil, "disk_usage", lambda path: type("", (), {"free": 10_000}))
    monkeypatch.setattr(train.Stage, "step", lambda *_: pytest.fail("a step was taken"))
    status, _, said = small.run_quietly(train, *small.TRAIN)
    assert status == 2 and "run: its disk has 0.0 MiB free, and warmup needs" in said and "lower --keep" in said, said
    assert not (here / "run").exists()


def test_room_that_only_a_later_stage_lacks_is_told_before_the_first(here, monkeypatch):
    needs = []
    whole = files_module.human_readable_size
    monkeypatch.setattr(checkpoints, "human_readable_size", lambda n: needs.append(n) or whole(n))
    monkeypatch.setattr(train.Stage, "step", lambda *_: pytest.fail("a step was taken"))
    for free in (0, 1):  # none; then what warm-up alone would need
        monkeypatch.setattr(runs.shutil, "disk_usage", lambda path: type("", (), {"free": needs[1] if free else 0}))
        status, _, said = small.run_quietly(train, *small.TRAIN)
        assert status == 2 and "; the stages after it about " in said and not (here / "run").exists(), said
    assert small.run_quietly(train, *small.TRAIN, "--stage", "joint")[0] == 2
    monkeypatch.undo()
    monkeypatch.chdir(here)
    monkeypatch.setattr(train, "print_results", lambda setup: None)
    assert small.run_quietly(train, *small.TRAIN)[0] == 0
    setup = runs.Setup(here / "run", "tiny", "base", "encoder", "data", None, None, 0, 1.0, 2, 16.0, 150, 4)
    for stage in runs.STAGES:
        files = [file for part in (f"state/{stage}-*.safetensors", f"{stage}/**/*.safetensors")
                 for file in (here / "run").glob(part)]
        taken = sum(t.nbytes for file in files for t in load_file(file).values())
        assert 0.7 * taken < checkpoints.room_for(setup, stage, {"steps": 4, "save_every": 2, "keep": 2}) < 1.4 * taken


@pytest.mark.parametrize("save_every", [1, 100])
def test_the_room_asked_for_is_the_room_that_is_taken(here, monkeypatch, save_every):
    needs, warmup = [], [*small.TRAIN, "--stage", "warmup", "--save-every", str(save_every)]

    def taken(*folders):
        """Bytes of each file's tensors; at this size headers weigh as much."""
        files = [p.read_bytes() for folder in folders for p in (here / "run" / folder).rglob("*.safetensors")]
        return [len(data) - 8 - int.from_bytes(data[:8], "little") for data in files]
    with monkeypatch.context() as patch:
        whole = files_module.human_readable_size
        patch.setattr(checkpoints, "human_readable_size", lambda n: needs.append(n) or whole(n))
        patch.setattr(runs.shutil, "disk_usage", lambda path: type("", (), {"free": 0}))
        status, _, said = small.run_quietly(train, *warmup)
    assert status == 2, said
    assert small.run_quietly(train, *warmup)[0] == 0
    most = sum(taken("state", "warmup")) + (max(taken("state")) if save_every == 1 else 0)  # before the oldest goes
    assert 0.75 * needs[1] < most <= needs[1]  # an expert without a row yet has no moments


@linux
def test_a_log_that_cannot_grow_ends_the_run_and_is_continued(here, whole, monkeypatch):
    class Full:
        name = "run/log.jsonl"

        def write(self, line):
            raise OSError(errno.ENOSPC, "No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr(train, "rewind_log", lambda *_: Full())
        status, _, said = small.run_quietly(train, *small.TRAIN)
    assert status == 2 and "run/log.jsonl: cannot be written (No space left on device); the last check" in said, said
    assert small.run_quietly(train, *small.TRAIN)[0] == 0
    assert_same_run(here / "run", whole[0] / "run")


@linux
def test_lines_of_the_log_that_a_crash_has_lost_are_told(here, monkeypatch):
    assert small.run_quietly(train, *small.TRAIN, "--stage", "warmup")[0] == 0
    shutil.rmtree(here / "run/warmup")
    lines = (here / "run/log.jsonl").read_bytes().splitlines(keepends=True)
    (here / "run/log.jsonl").write_bytes(b"".join(lines[:2]) + lines[2][:20])
    status, _, said = small.run_quietly(train, *small.TRAIN, "--stage", "warmup", "--resume")
    assert status == 0 and "run/log.jsonl lacks 2 of the 4 steps that are done" in said, said


@linux
def test_two_processes_do_not_train_in_one_folder(here):
    assert small.run_quietly(train, *small.TRAIN, "--stage", "warmup")[0] == 0
    before = small.contents(here / "run")
    with runs.lock(here / "run"):
        for more in (["--resume"], ["--overwrite"]):
            status, _, said = small.run_quietly(train, *small.TRAIN, *more)
            assert status == 2 and "run: another process trains here" in said and said.count("\n") == 1, said
    assert small.contents(here / "run") == before
    assert small.run_quietly(train, *small.TRAIN, "--resume")[0] == 0


@linux
def test_what_overwrite_replaces_stays_until_the_first_checkpoint_of_what_replaces_it(server, whole, here):
    """Killed before it, a run that then cannot go on is the old run again; after it, the new one goes on."""
    assert small.run_quietly(train, *small.TRAIN)[0] == 0
    before, other = small.contents(here / "run"), [*small.TRAIN, "--seed", "5"]
    done = server(here, *other, "--overwrite", slow=True, half="warmup-0000002")
    assert done["status"] == -signal.SIGKILL and small.contents(here / "run") != before
    data = (here / "data").resolve()
    (here / "data").unlink()
    (here / "data").mkdir()
    assert small.run_quietly(train, *other, "--resume")[0] == 2  # nothing is changed by what is refused at once
    (here / "data").rmdir()
    (here / "data").symlink_to(data)
    assert small.run_quietly(train, *other, "--overwrite", "--tokens", "5")[0] == 2
    assert small.contents(here / "run") == before
    done = server(here, *other, "--overwrite", slow=True, half="warmup-0000004")
    assert done["status"] == -signal.SIGKILL and not (here / "run/replaced").exists()
    assert small.run_quietly(train, *other, "--resume")[0] == 0
    assert json.loads((here / "run/config.json").read_text())["setup"]["seed"] == 5


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="needs users")
def test_a_folder_that_may_only_be_read_is_told_before_training(here, monkeypatch):
    monkeypatch.setattr(train.Stage, "step", lambda *_: pytest.fail("a step was taken"))
    user, mode = os.geteuid(), here.stat().st_mode
    here.chmod(0o555)
    try:
        if user == 0:  # root may write anywhere
            os.seteuid(65534)
        status, _, said = small.run_quietly(train, *small.TRAIN, "--base", "base")
    finally:
        os.seteuid(user)
        here.chmod(mode)
    assert status == 2 and ("cannot be written" in said or "ermission denied" in said), said
    assert not (here / "run").exists()
