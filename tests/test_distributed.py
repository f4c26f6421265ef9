"""Several processes started by torchrun train what one process trains; checked with two, on the CPU, in fp64."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import ROOT
from support.process import join_process_group
from support.runs import STAGES
from test_commands import copy, here, reduced, run_folder  # noqa: F401 (fixtures)
from test_train import new_stage, some_rows
from train import metrics_to_floats

# The experts that each step's rows are drawn from. With ten experts for five rows, most have rows in one process only.
STEPS = [(2, 5), range(10), (2, 7)]


def train_three_steps(name):
    """Returns ({number of the parameter: its value}, log) after three steps of a stage."""
    stage = new_stage(name, dtype=torch.float64, random_B=True)
    log = [metrics_to_floats(stage.step(some_rows(5, seed, experts))) for seed, experts in enumerate(STEPS)]
    return {str(i): p.detach().contiguous() for i, p in enumerate(stage.parameters())}, log


def torchrun(*command, cwd):
    """Run a script in two processes. Without the "--", torchrun would take --run for an option of its own."""
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv_backend=c10d",
                           "--rdzv_endpoint=127.0.0.1:0", "--", *map(str, command)],
                          cwd=cwd, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_two_processes_train_what_one_does(tmp_path):
    torchrun(__file__, tmp_path, cwd=tmp_path)
    for name in STAGES:
        parameters, log = train_three_steps(name)
        for rank in (0, 1):
            found = load_file(tmp_path / f"{name}-{rank}.safetensors")
            difference = max((found[i] - p).abs().max() for i, p in parameters.items())
            assert difference < (1e-10 if name == "warmup" else 1e-6), name  # the router's cosines are fp32
            for ours, theirs in zip(log, json.loads((tmp_path / f"{name}-{rank}.json").read_text()), strict=True):
                assert ours.keys() == theirs.keys()
                for key, value in ours.items():
                    assert theirs[key] == pytest.approx(value, rel=1e-6, abs=1e-5 if key == "usage" else 0), key


@pytest.mark.slow
def test_torchrun_trains_saves_prints_and_resumes_like_one_process(run_folder, here):  # noqa: F811
    source = copy(run_folder, here)
    argv = ["--preset", "tiny", "--stage", "all", "--base", source / "models/base", "--encoder",
            source / "models/encoder", "--data", source / "data", "--steps", "4", "--batch", "6", "--save-every", "2",
            "--eval-records", "8"]
    one = subprocess.run([sys.executable, *map(str, [ROOT / "train.py", *argv, "--run", here / "one"])], cwd=here,
                         check=True, capture_output=True, text=True).stdout
    two = torchrun(ROOT / "train.py", *argv, "--run", here / "two", cwd=here)
    assert all(out.count("Query 1:") == 1 and out.count("warmup 4/4") == 1 for out in (one, two))
    logs = [[json.loads(line) for line in open(here / name / "log.jsonl")] for name in ("one", "two")]
    assert [(e["stage"], e["step"]) for e in logs[0]] == [(e["stage"], e["step"]) for e in logs[1]]
    for one, two in zip(*logs):
        assert one["loss"] == pytest.approx(two["loss"], abs=1e-5) and one.keys() == two.keys()
    before = load_file(here / "two/joint/router/model.safetensors")
    (here / "two/state/joint-0000004.safetensors").unlink()
    (here / "two/joint").rename(here / "gone")
    torchrun(ROOT / "train.py", *argv, "--run", here / "two", "--resume", cwd=here)
    after = load_file(here / "two/joint/router/model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


def thread_names():
    """The names of this process's threads, also those of C++ (Linux)."""
    return " ".join(file.read_text() for file in Path("/proc/self/task").glob("*/comm"))


if __name__ == "__main__":  # torchrun runs this: each process writes what it has after each stage
    torch.set_num_threads(1)
    join_process_group(torch.device("cpu"), {})
    for name in STAGES:
        parameters, log = train_three_steps(name)
        file = f"{sys.argv[1]}/{name}-{torch.distributed.get_rank()}"
        save_file(parameters, f"{file}.safetensors")
        Path(f"{file}.json").write_text(json.dumps(log))
    assert "gloo" in thread_names()
    torch.distributed.destroy_process_group()
    assert "gloo" not in thread_names()  # a thread that is left may abort the process while Python ends
