"""Several processes that torchrun starts train what one process trains: checked with two, on the CPU, in fp64."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import ROOT
from test_commands import RUN, copy, here, reduced, run_folder  # noqa: F401 (fixtures)
from test_train import base, router, settings, some_rows
from support.process import join_process_group
from train import Stage, metrics_to_floats

STEPS = [(2, 5), range(10), (2, 7)]  # experts that 5 rows are drawn from: of many, each has its rows on one process only


def trained(stage):
    """Three steps of a stage -> (parameters afterwards, log)."""
    model = base(random_B=True).double() if stage != "router" else None
    task = Stage(stage, model, router().double() if stage != "warmup" else None, settings())
    log = [metrics_to_floats(task.step(some_rows(5, seed, experts))) for seed, experts in enumerate(STEPS)]
    return {str(i): p.detach() for i, p in enumerate(task.parameters())}, log


def torchrun(*command, cwd):
    """Run a script in two processes -> CompletedProcess. Without the "--" torchrun takes --run for an option of its own."""
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2",
                           "--rdzv_backend=c10d", "--rdzv_endpoint=127.0.0.1:0", "--", *map(str, command)],
                          cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


def threads():
    """Names of this process's threads, C++'s too (Linux)."""
    return " ".join(file.read_text() for file in Path("/proc/self/task").glob("*/comm"))


@pytest.mark.slow
def test_two_processes_train_what_one_does(tmp_path):
    done = torchrun(__file__, tmp_path, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    for stage in ("warmup", "router", "joint"):
        parameters, log = trained(stage)
        for rank in (0, 1):
            found = load_file(tmp_path / f"{stage}-{rank}.safetensors")
            apart = max((found[i] - p).abs().max() for i, p in parameters.items())
            assert apart < (1e-10 if stage == "warmup" else 1e-6), (stage, apart)  # the router's cosines are fp32
            for ours, theirs in zip(log, json.loads((tmp_path / f"{stage}-{rank}.json").read_text()), strict=True):
                assert ours.keys() == theirs.keys()
                for key, figure in ours.items():
                    assert theirs[key] == pytest.approx(figure, rel=1e-6, abs=1e-5 if key == "usage" else 0), key


@pytest.mark.slow
def test_torchrun_trains_saves_stops_and_resumes_like_one_process(run_folder, here):  # noqa: F811
    source = copy(run_folder, here)
    given = ["--preset", "tiny", "--stage", "all", "--base", source / "models/base", "--encoder", source / "models/encoder",
             "--data", source / "data", "--steps", "4", "--batch", "6", "--save-every", "2", "--eval-records", "8"]
    for name, run in (("one", lambda *c: subprocess.run([sys.executable, *map(str, c)], cwd=here, check=True,
                                                        capture_output=True, text=True)),
                      ("two", lambda *c: torchrun(*c, cwd=here))):
        done = run(ROOT / "train.py", *given, "--run", here / name)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("Query 1:") == 1 and done.stdout.count("warmup 4/4") == 1
    logs = [[json.loads(line) for line in (here / name / "log.jsonl").read_text().splitlines()] for name in ("one", "two")]
    assert [(e["stage"], e["step"]) for e in logs[0]] == [(e["stage"], e["step"]) for e in logs[1]]
    for one, two in zip(*logs):
        assert one["loss"] == pytest.approx(two["loss"], abs=1e-5) and one.keys() == two.keys()
    before = load_file(here / "two/joint/router/model.safetensors")
    for file in [*(here / "two/state").glob("joint-0000004*")]:
        file.unlink()
    (here / "two/joint").rename(here / "gone")
    done = torchrun(ROOT / "train.py", *given, "--run", here / "two", "--resume", cwd=here)
    assert done.returncode == 0, done.stderr[-3000:]
    after = load_file(here / "two/joint/router/model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


if __name__ == "__main__":  # what torchrun runs: each process writes what it has after each stage
    torch.set_num_threads(1)
    join_process_group(torch.device("cpu"), {})
    for stage in ("warmup", "router", "joint"):
        parameters, log = trained(stage)
        name = f"{sys.argv[1]}/{stage}-{torch.distributed.get_rank()}"
        save_file({i: p.contiguous() for i, p in parameters.items()}, f"{name}.safetensors")
        with open(f"{name}.json", "w") as file:
            json.dump(log, file)
    assert "gloo" in threads()
    torch.distributed.destroy_process_group()
    assert "gloo" not in threads()  # one that is left may abort the process while Python ends
