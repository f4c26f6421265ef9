"""Laws of interrupted runs: a run that is killed and resumed ends as a run that was never interrupted.

Runs of twelve steps are started in separate processes (small.serve) and killed at random calls and returns of Python
and C functions. So every moment can be hit, and every failure can be repeated: in a step, between two renames, or in
the middle of a checkpoint, which is written slowly on purpose. Each run is resumed, perhaps killed again, and must end
with the same files, equal tensors, and a log that has each step once.
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
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import small
import train
from support import checkpoints, runs

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@pytest.fixture(scope="module")
def server():
    """start(cwd, *argv, **how): train in another process, as small.serve does."""
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
    """(folder of a run that was never interrupted, how many events it took with the slow writer)."""
    folder = tmp_path_factory.mktemp("whole")
    small.make(folder)
    done = server(folder, *small.TRAIN, slow=True, event=0)
    assert done["status"] == 0, done
    return folder, done["events"]


def fresh(whole, folder):
    """A new folder with the models and data of the whole run, without the run."""
    folder.mkdir()
    for name in ("base", "encoder", "data"):
        (folder / name).symlink_to(whole[0] / name)
    return folder


@pytest.fixture
def here(whole, tmp_path, monkeypatch):
    """A fresh working directory; runs in this process do not print their results."""
    monkeypatch.chdir(fresh(whole, tmp_path / "here"))
    monkeypatch.setattr(train, "print_results", lambda setup: None)
    return tmp_path / "here"


def assert_no_half_file(run):
    """Every file under its final name is whole; a file that is being written has another name."""
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


def train_here(*more):
    """(exit status, standard output, standard error) of the run in this process."""
    return small.run_quietly(train, *small.TRAIN, *more)


# ----------------------------------------------------------------------------------------------------------------------
# Kills and signals

@needs_fork
@pytest.mark.parametrize("kills", [10, pytest.param(30, marks=pytest.mark.slow)])
def test_a_run_that_is_killed_at_random_moments_ends_as_if_it_had_not_been(server, whole, tmp_path, kills):
    """A run is killed and resumed until it ends by itself; then the next run is started, until all kills are done.
    Every fifth kill comes in the middle of a checkpoint."""
    draw, killed, n_runs, in_checkpoint = random.Random(kills), 0, 0, 0
    while killed < kills:
        here, n_runs = fresh(whole, tmp_path / str(n_runs)), n_runs + 1
        run, argv = here / "run", small.TRAIN
        while True:
            how = {"event": draw.randrange(1, whole[1]) if killed < kills else 0}
            if killed < kills and killed % 5 == 2:
                how = {"half": f"{draw.choice(runs.STAGES)}-000000{draw.choice((2, 4))}"}
            done = server(here, *argv, slow=True, **how)
            if done["status"] == 0:
                break
            assert done["status"] == -signal.SIGKILL, done
            killed += 1
            in_checkpoint += any(run.rglob("*.~part"))
            assert_no_half_file(run)
            if (run / "config.json").exists():  # otherwise there is nothing to resume
                argv = [*small.TRAIN, "--resume"]
        assert_same_run(run, whole[0] / "run")
    assert killed == kills and in_checkpoint >= kills // 5, in_checkpoint


@needs_fork
def test_a_kill_in_the_middle_of_a_checkpoint_keeps_the_checkpoint_before_it(server, whole, tmp_path):
    here = fresh(whole, tmp_path / "here")
    done = server(here, *small.TRAIN, slow=True, half="router-0000004")
    assert done["status"] == -signal.SIGKILL
    state = here / "run/state"
    half = (state / "router-0000004.safetensors.~part").stat().st_size
    assert half < (whole[0] / "run/state/router-0000004.safetensors").stat().st_size
    assert_no_half_file(here / "run")
    assert (state / "router-0000002.safetensors").exists()
    (state / "router-0000003.safetensors.~part").write_bytes(b"of a step that will not be saved again")
    done = server(here, *small.TRAIN, "--resume")
    assert done["status"] == 0, done
    assert_same_run(here / "run", whole[0] / "run")


@needs_fork
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_from_outside_ends_the_step_saves_it_and_says_how_to_resume(server, whole, tmp_path, number):
    here = fresh(whole, tmp_path / "here")
    done = server(here, *small.TRAIN, event=whole[1] // 3, number=number)
    assert done["status"] == 130 and "stopped after step" in done["err"] and "--resume" in done["err"], done
    assert done["err"].count("\n") == 1
    assert server(here, *small.TRAIN, "--resume")["status"] == 0
    done = small.contents(here / "run")
    for name, raw in small.contents(whole[0] / "run").items():
        if not name.startswith(("state/", "log")):
            assert done[name] == raw, name
    assert log(here / "run") == log(whole[0] / "run")


@needs_fork
@pytest.mark.parametrize("more, states", [([], (2, 4)), (
    ["--save-every", "1", "--keep", "1", "--log-every", "1", "--eval-records", "1"], (4,))], ids=["same", "more often"])
def test_a_seed_fixes_the_run_however_often_it_is_logged_saved_and_measured(server, whole, tmp_path, more, states):
    here = fresh(whole, tmp_path / "here")
    assert server(here, *small.TRAIN, *more)["status"] == 0
    a, b = small.contents(here / "run"), small.contents(whole[0] / "run")
    may_differ = ("log", "config", "state") if more else ("log", "config")
    assert [name for name in b if a.get(name) != b[name] and not name.startswith(may_differ)] == []
    assert log(here / "run") == log(whole[0] / "run")
    assert sorted(p.name for p in (here / "run/state").iterdir()) == [
        f"{stage}-000000{step}.safetensors" for stage in sorted(runs.STAGES) for step in states]


@needs_fork
def test_overwrite_keeps_the_old_run_whole_under_another_name(server, whole, here):
    """So it does if the new run is killed. The new run can be resumed, and the next old run gets the next name."""
    assert train_here()[0] == 0
    before, other = small.contents(here / "run"), ["--seed", "5"]
    done = server(here, *small.TRAIN, *other, "--overwrite", slow=True, half="warmup-0000002")
    assert done["status"] == -signal.SIGKILL and small.contents(here / "run.replaced-1") == before
    assert train_here(*other, "--resume")[0] == 0
    assert json.loads((here / "run/config.json").read_text())["setup"]["seed"] == 5
    status, shown, _ = train_here("--overwrite")
    assert status == 0 and "run: the earlier run is now in run.replaced-2" in shown
    assert_same_run(here / "run", here / "run.replaced-1")


@pytest.mark.parametrize("stage", ["warmup", "router"], ids=["all stages", "later stages"])
def test_a_kill_between_the_two_renames_of_overwrite_loses_nothing(here, monkeypatch, stage):
    """The old run is whole under its new name. The next command finds the prepared folder and goes on in it."""
    assert train_here()[0] == 0
    before = small.contents(here / "run")

    def rename_once(source, target, replace=os.replace):
        if target.name == "run":
            raise KeyboardInterrupt
        replace(source, target)
    with monkeypatch.context() as patch:
        patch.setattr(runs.os, "replace", rename_once)
        assert train_here("--stage", stage, "--overwrite")[0] == 130
    assert small.contents(here / "run.replaced-1") == before and not (here / "run").exists()
    assert train_here("--stage", stage, "--resume")[0] == 0
    assert (here / "run/warmup").is_dir() and not (here / "run/joint").exists()


@needs_fork
@pytest.mark.parametrize("more", [None, "--resume", "--overwrite"])
def test_two_processes_cannot_train_in_one_folder(here, more):
    """The second process is refused, also while the first is starting and the folder is empty."""
    if more:
        assert train_here("--stage", "warmup")[0] == 0
    else:
        (here / "run").mkdir()
    before = small.contents(here / "run")
    with runs.lock(here / "run"):
        status, _, said = train_here(*[more] if more else [])
    assert status == 2 and "run: another process trains here" in said and said.count("\n") == 1, said
    assert small.contents(here / "run") == before


# ----------------------------------------------------------------------------------------------------------------------
# Full disks, and folders that are read-only

@contextlib.contextmanager
def largest_file(size):
    """No file of this process can grow beyond `size` bytes; writing more fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@needs_fork
@pytest.mark.parametrize("name, kept", [
    ("config.json", []), ("state/warmup-0000002.safetensors", []),
    ("state/warmup-0000004.safetensors", ["warmup-0000002.safetensors"])])
def test_a_full_disk_is_one_message_and_the_run_can_be_resumed(here, whole, name, kept):
    """Checkpoints that were saved before are kept."""
    size = (whole[0] / "run" / name).stat().st_size
    with largest_file(size - 1):
        status, _, said = train_here()
    assert status == 2 and f"run/{name}: cannot be written" in said and "is kept" in said, said
    assert said.count("\n") == 1 and not list(here.rglob("*.~part"))
    assert_no_half_file(here / "run")
    assert [p.name for p in (here / "run/state").glob("*")] == kept
    assert train_here(*["--resume"] if (here / "run/config.json").exists() else [])[0] == 0
    assert_same_run(here / "run", whole[0] / "run")


@needs_fork
def test_a_log_that_cannot_be_written_ends_the_run_which_can_be_started_again(here, whole, monkeypatch):
    def write(line):
        raise OSError(errno.ENOSPC, "No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr(train, "open_log", lambda *_: SimpleNamespace(name="run/log.jsonl", write=write))
        status, _, said = train_here()
    assert status == 2 and "run/log.jsonl: cannot be written (No space left on device)" in said, said
    assert train_here()[0] == 0
    assert_same_run(here / "run", whole[0] / "run")


@needs_fork
def test_lines_of_the_log_that_a_crash_has_lost_are_counted(here):
    assert train_here("--stage", "warmup")[0] == 0
    shutil.rmtree(here / "run/warmup")
    lines = (here / "run/log.jsonl").read_bytes().splitlines(keepends=True)
    (here / "run/log.jsonl").write_bytes(b"".join(lines[:2]) + lines[2][:20])
    status, _, said = train_here("--stage", "warmup", "--resume")
    assert status == 0 and "run/log.jsonl lacks 2 of the 4 steps that are done" in said, said


@pytest.mark.parametrize("stages", [["warmup"], [*runs.STAGES]], ids=["one", "all"])
@pytest.mark.parametrize("save_every", [1, 100])
def test_the_disk_space_that_is_checked_before_training_is_what_a_run_takes(here, monkeypatch, stages, save_every):
    """With one byte less, the run is refused before its first step; the same command can then be given again."""
    setup = runs.Setup(here / "run", "tiny", "base", "encoder", "data", None, None, 0, 1.0, 2, 16.0, 150, 4)
    needed = checkpoints.disk_space_needed(
        setup, dict.fromkeys(stages, {"steps": 4, "save_every": save_every, "keep": 2}))
    argv = ["--stage", "all" if len(stages) > 1 else "warmup", "--save-every", str(save_every)]
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.shutil, "disk_usage", lambda path: SimpleNamespace(free=needed - 1))
        patch.setattr(train.Stage, "step", lambda *_: pytest.fail("a step was taken"))
        status, _, said = train_here(*argv)
    assert status == 2 and f"results of {', '.join(stages)} need" in said and "lower --keep" in said, said
    assert train_here(*argv)[0] == 0

    def tensor_bytes(*folders):  # without headers, which weigh as much as the tensors at this size
        files = [p.read_bytes() for folder in folders for p in (here / "run" / folder).rglob("*.safetensors")]
        return [len(raw) - 8 - int.from_bytes(raw[:8], "little") for raw in files]
    taken = sum(tensor_bytes("state", *stages))
    if save_every == 1:  # the newest checkpoint is written before the oldest is removed
        taken += max(tensor_bytes("state"))
    assert 0.7 * needed < taken < 1.1 * needed  # norms are not counted; an expert without a row has no moments


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="needs users")
def test_a_read_only_folder_is_refused_before_training(here, monkeypatch):
    monkeypatch.setattr(train.Stage, "step", lambda *_: pytest.fail("a step was taken"))
    user, mode = os.geteuid(), here.stat().st_mode
    here.chmod(0o555)
    try:
        if user == 0:  # root may write anywhere
            os.seteuid(65534)
        status, _, said = train_here()
    finally:
        os.seteuid(user)
        here.chmod(mode)
    assert status == 2 and ("cannot be written" in said or "ermission denied" in said), said
    assert not (here / "run").exists()
