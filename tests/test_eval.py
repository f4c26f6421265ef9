"""Laws of eval.py and support/measure.py: metrics against examples worked by hand, and what the commands print, answer
and export. The commands run on two small runs: that of test_commands.py, which has hardly learned anything, and one
made here that has learned just enough to be healthy.
"""
import contextlib
import functools
import io
import itertools
import json
import math
import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

import eval as evaluation
import small
import train
from support import export as export_module
from support import runs
from support import tiny as tiny_models
from eval import heat_map, r_precision
from lora import EXPERTS, SHORT_NAMES, add_experts, expert_layers, merged_tensors
from model import Transformer, generate, pad
from router import GATE_RULES, active_experts, gates_for_rule, persona_gate, query_ids, raw_gate
from support.chat import Chat, encode
from support.files import UserError
from support.measure import (LoadedRun, average_precision, bootstrap, culture_gap, load_run, load_split, losses,
                             message_precision, situations, subsets)
from support.records import SPLITS, read_queries, read_records, write_records
from support.rows import make_rows
from support.runs import fingerprint
from support.tables import format_gate
from synth import lab, signatures, template_records
from test_commands import REDUCED, RUN, copy, here, reduced, run_folder, undone  # noqa: F401 (fixtures)

ROOT = Path(evaluation.__file__).resolve().parent
printed = []  # by the fixture `ablation`


# ----------------------------------------------------------------------------------------------------------------------
# Average precision and R-precision

@pytest.mark.parametrize("scores, relevant, wanted", [
    ([.9, .8, .7, .6], [1, 1, 0, 0], 1.0),
    ([.9, .8, .7, .6], [0, 0, 1, 1], (1 / 3 + 2 / 4) / 2),
    ([.6, .7, .8, .9], [1, 0, 0, 1], (1 / 1 + 2 / 4) / 2),     # in the order of the scores: 1 0 0 1
    ([.9, .8, .7, .6, .5], [1, 0, 1, 0, 1], (1 / 1 + 2 / 3 + 3 / 5) / 3),
    ([.5, .5, .5, .5], [1, 0, 0, 0], 1 / 4),                   # ties: the relevant one is counted last
    ([.5, .5, .5, .5], [0, 0, 0, 1], 1 / 4),
    ([.9, .5, .5, .1], [0, 1, 0, 1], (1 / 3 + 2 / 4) / 2),
    ([-.2, -.9], [1, 0], 1.0), ([.3], [1], 1.0), ([.4, .4], [1, 1], 1.0),
    ([.1, .2], [0, 0], math.nan),                              # nothing is relevant
])
def test_average_precision_of_examples_worked_by_hand(scores, relevant, wanted):
    found = average_precision(np.array(scores), np.array(relevant))
    assert np.isclose(found, wanted, rtol=0, atol=1e-12, equal_nan=True)


def test_average_precision_is_its_definition():
    """For each relevant item: the share of relevant ones among all items that are ranked at least as high. An item is
    preceded by all irrelevant items of its own score."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        n = int(rng.integers(1, 30))
        scores, relevant = rng.integers(0, 6, n) / 5, rng.integers(0, 2, n).astype(float)
        if not relevant.any():
            continue
        precisions = []
        for score in np.unique(scores):
            above, tied = scores > score, scores == score
            for k in range(int(relevant[tied].sum())):  # the tied relevant items, one after the other
                hits = relevant[above].sum() + k + 1
                precisions.append(hits / (above.sum() + (1 - relevant[tied]).sum() + k + 1))
        for order in (np.arange(n), rng.permutation(n)):
            assert abs(average_precision(scores[order], relevant[order]) - np.mean(precisions)) < 1e-12


def test_r_precision_takes_as_many_experts_as_there_are_active_poles():
    similarity = np.array([[.9, .8, .1, .0], [.1, .2, .3, .4], [.5, .1, .4, .3]])
    active = np.array([[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 0]])
    for i, wanted in enumerate((1, 0, 2 / 3)):  # the last: .5 .4 .3 are the three highest, so .1 is missed
        assert abs(r_precision(similarity[i:i + 1], active[i:i + 1]) - wanted) < 1e-12
    assert abs(r_precision(similarity, active) - (1 + 0 + 2 / 3) / 3) < 1e-12
    rng = np.random.default_rng(0)
    similarity, active = rng.normal(size=(50, 10)), np.eye(10)[rng.integers(0, 10, 50)]
    active[::2, 3] = 1
    shares = [np.mean([e in np.argsort(-s)[:int(a.sum())] for e in np.flatnonzero(a)])
              for s, a in zip(similarity, active)]
    assert abs(r_precision(similarity, active) - np.mean(shares)) < 1e-12


# ----------------------------------------------------------------------------------------------------------------------
# Intervals and subsets

def test_an_interval_holds_the_mean_per_token_and_narrows_with_records():
    rng, widths = np.random.default_rng(1), []
    for n in (50, 5000):
        difference, counts = rng.normal(0.5, 2, n), rng.integers(1, 30, n).astype(float)
        mean, low, high = bootstrap(difference, counts, n=300)
        assert low < mean < high and abs(mean - difference.sum() / counts.sum()) < 1e-12
        widths.append(high - low)
    assert 0.05 < widths[1] / widths[0] < 0.2  # about 1 / √100
    counts = np.array([3.0, 10.0, 1.0, 25.0])
    assert np.allclose(bootstrap(0.2 * counts, counts), 0.2, atol=1e-12)  # a constant difference has no width


def test_an_interval_covers_the_true_mean_as_often_as_it_says():
    """95 % of intervals hold the true mean: of 150 trials, between 132 and 149."""
    rng = np.random.default_rng(2)
    covered = sum(low <= 0 <= high for low, high in (
        bootstrap(rng.normal(0, 1, 80), np.ones(80), seed, n=200)[1:] for seed in range(150)))
    assert 132 <= covered < 150


def test_the_bootstrap_is_paired_and_fixed_by_its_seed():
    """What records have in common under both gates cancels: records differ by 10, the gates by 0.01."""
    rng = np.random.default_rng(3)
    records, counts = rng.normal(100, 10, 400), np.ones(400)
    difference = records + rng.normal(0.01, 0.01, 400) - records
    mean, low, high = bootstrap(difference, counts)
    assert 0.008 < low < mean < high < 0.012
    assert bootstrap(difference, counts, 5) == bootstrap(difference, counts, 5) != bootstrap(difference, counts, 6)


def test_seen_and_held_out_domains_are_subsets_where_there_are_both():
    parts = subsets(np.array([False, True, True, False, False]))
    assert [(name, rows.tolist()) for name, rows in parts] == [
        ("all", [0, 1, 2, 3, 4]), ("domains seen in training", [0, 3, 4]), ("domains held out", [1, 2])]
    for one_kind in (np.zeros(3, bool), np.ones(3, bool)):
        assert [(name, rows.tolist()) for name, rows in subsets(one_kind)] == [("all", [0, 1, 2])]


def of_cultures(*cultures):
    return [{"id": i} | ({"culture": culture} if culture else {}) for i, culture in enumerate(cultures)]


@pytest.mark.parametrize("cultures, expected", [
    ((None, None, None), []), (("Finnish", None, "Finnish"), []), (("Finnish", "", "日本"), [
        ("culture: Finnish", [0]), ("culture: 日本", [2]), ("culture: none named", [1])]),
    (("B", "A", "B"), [("culture: A", [1]), ("culture: B", [0, 2])])])
def test_cultures_are_subsets_where_records_name_two_or_more(cultures, expected):
    parts = subsets(np.zeros(3, bool), of_cultures(*cultures))
    assert [(name, rows.tolist()) for name, rows in parts] == [("all", [0, 1, 2]), *expected]


def p_of(values, records, seed=0, n=300):
    gap = culture_gap(values, np.ones(len(records)), records, "AP", seed, n)
    return float(re.search(r"p = (\d\.\d+)", gap)[1])


def test_a_gap_between_cultures_is_told_from_chance():
    """Labels at random: p is below 0.1 in about a tenth of the draws. A real gap is found, and named."""
    rng, records = np.random.default_rng(0), of_cultures(*"ABC" * 20)
    p = [p_of(rng.normal(size=60), records, seed, 100) for seed in range(100)]
    assert 2 <= sum(x < 0.1 for x in p) <= 20 and 0.4 < np.mean(p) < 0.6
    values = rng.normal(size=60) + 2 * np.array([record["culture"] == "B" for record in records])
    gap = culture_gap(values, np.ones(60), records, "AP", n=300)
    assert re.match(r"AP by culture: from -?0\.\d+ \([AC]\) to \d\.\d+ \(B\)\. Cultures differ by more than", gap)
    assert p_of(values, records) == pytest.approx(1 / 301, abs=1e-4)
    few = values + rng.normal(size=60) * 9  # fixed by its seed
    assert p_of(few, records, 1) == p_of(few, records, 1) != p_of(few, records, 2)
    assert culture_gap(values, np.ones(60), of_cultures(*["A"] * 30, *[None] * 30), "AP") == ""
    weights = np.where(values > 0, 3.0, 1.0)  # a mean per token
    means = [np.average(values[i::3] / weights[i::3], weights=weights[i::3]) for i in range(3)]
    assert f"from {min(means):.4f}" in culture_gap(values, weights, records, "AP", n=1)
    alone = [*records, {"id": 60}]  # what names no culture is not counted
    assert culture_gap(np.append(values, 99), np.ones(61), alone, "AP", n=300) == gap


def test_what_one_situation_has_in_common_is_not_taken_for_a_gap_nor_for_many_records():
    """Sixty situations that differ much, each told by A, and half a point lower by B."""
    rng = np.random.default_rng(1)
    base, records = 10 * rng.normal(size=60), of_cultures(*"AB" * 60)
    values = np.repeat(base, 2) + np.tile([0.5, 0.0], 60) + rng.normal(size=120) * 0.1
    told = [record | {"of": i // 2} for i, record in enumerate(records)]
    assert p_of(values, told) < 0.01 and p_of(values, records) > 0.2
    ones, same = np.ones(120), np.array([record["of"] for record in told])
    together, apart = bootstrap(values, ones, clusters=same), bootstrap(values, ones)
    assert together[0] == pytest.approx(apart[0])
    assert (together[2] - together[1]) / (apart[2] - apart[1]) == pytest.approx(2 ** 0.5, rel=0.15)
    assert together == pytest.approx(bootstrap(values[::2] + values[1::2], np.full(60, 2.0)))
    assert situations([{"id": 7}, {"id": 8, "of": 7}, {"id": "9"}]).tolist() == ["7", "7", "9"]


# ----------------------------------------------------------------------------------------------------------------------
# A run to measure

def output_of(capsys, command, *more):
    """What a command of eval.py prints. `more`: arguments with spaces in them."""
    capsys.readouterr()
    evaluation.main([*command.split(), *map(str, more)])
    return capsys.readouterr().out


def opened(run, **options):
    return LoadedRun(evaluation.Talk(run=str(run), **options))


def accept_models(run):
    """Make a run take the models in its folder for those that it was trained on."""
    config = json.loads((run / "config.json").read_text())
    config["fingerprints"] |= {role: fingerprint(run / "models" / role) for role in ("base", "encoder")}
    (run / "config.json").write_text(json.dumps(config))


def rewrite(file, change):
    """Apply change(name, tensor) to every tensor of a safetensors file."""
    save_file({name: change(name, t) for name, t in sorted(load_file(file).items())}, file, metadata={"format": "pt"})


@pytest.fixture
def strong(run_folder, here):
    """A copy of the run with large random weights. The run itself has hardly learned anything: it answers everything
    with full stops, and its experts change nothing that could be seen."""
    folder = copy(run_folder, here)
    torch.manual_seed(0)
    rewrite(folder / "models" / "base" / "model.safetensors",
            lambda name, t: t if t.dim() < 2 else 0.2 * torch.randn_like(t))
    accept_models(folder)
    for file in sorted((folder / "joint" / "experts").glob("*/adapter_model.safetensors")):
        rewrite(file, lambda name, t: t if "lora_A" in name else 0.1 * torch.randn_like(t))
    return folder


@pytest.fixture
def ablation(run_folder, capsys):
    """What ablate prints on 20 records. Three tests look at it, so it is computed once."""
    if not printed:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(evaluation, "generate_replies", functools.partial(train.generate_replies, max_new_tokens=3))
            printed.append(output_of(capsys, f"ablate --run {run_folder} --records 20 --replies 1"))
    return printed[0]


@pytest.fixture
def no_table(monkeypatch):
    """ablate without the slow table of experts and poles."""
    monkeypatch.setattr(evaluation, "expert_table", lambda run, args: None)


@pytest.fixture
def ids():
    return torch.randint(5, 300, (2, 20), generator=torch.Generator().manual_seed(0))


# ----------------------------------------------------------------------------------------------------------------------
# Which run, which stage, which temperature

def test_a_run_without_joint_is_measured_after_warm_up(run_folder, here, no_table, capsys):
    copy(run_folder, here, ["joint"])
    assert "router after router, tau 1" in output_of(capsys, f"routing --run {RUN}")
    assert "experts after warmup" in " ".join(output_of(capsys, f"ablate --run {RUN} --records 4").split())
    run = opened(RUN)
    assert (run.folder("experts"), run.folder("router")) == (RUN / "warmup" / "experts", RUN / "router" / "router")
    with pytest.raises(UserError, match="no router of stage joint yet: .*--preset tiny --stage joint --run runs/tiny"):
        evaluation.main(f"routing --run {RUN} --stage joint".split())


@pytest.mark.parametrize("stage, command, part, missing", [
    ("router", "ask Hello", "experts", "warmup"), ("router", "ablate", "experts", "warmup"),
    ("router", "health", "experts", "warmup"), ("warmup", "routing", "router", "router"),
    ("warmup", "ablate", "router", "router"), ("warmup", "health", "router", "router"),
    ("warmup", "ask Hello", "router", "router")])
def test_a_run_of_one_stage_names_the_missing_one_with_its_command(run_folder, here, stage, command, part, missing):
    undone(run_folder, here, "joint", missing)
    with pytest.raises(UserError, match=f"no {part} of stage {missing} yet: python train.py --preset tiny --stage "
                                        f"{missing} --run {RUN}"):
        evaluation.main([*command.split(), "--run", str(RUN)])


@pytest.mark.parametrize("command", ["routing", "ablate", "ask Hello"])
def test_a_run_that_does_not_exist_is_one_line_with_the_way_out(here, command):
    with pytest.raises(UserError, match="no/run: no config.json, so there is no run here; python train.py --preset tiny"
                       ) as error:
        evaluation.main([*command.split(), "--run", "no/run"])
    assert "\n" not in str(error.value) and not any(here.iterdir())


def test_the_temperature_is_that_of_joint_training_unless_given(run_folder, here):
    folder = copy(run_folder, here)
    config = json.loads((folder / "config.json").read_text())
    config["stages"]["joint"]["tau"] = 0.3
    (folder / "config.json").write_text(json.dumps(config))
    for given, wanted in ((None, 0.3), (0.7, 0.7)):
        run = opened(RUN, tau=given)
        assert run.setup.tau == run.router.temperature == wanted


def set_int8(run, value):
    """Make a run's config.json say that its base was in 8 bits, or not; None for a run of before --int8."""
    config = json.loads((run / "config.json").read_text())
    config["setup"] |= {"int8": value}
    if value is None:
        del config["setup"]["int8"]
    (run / "config.json").write_text(json.dumps(config))
    return run


@pytest.mark.parametrize("trained, given, wanted", [
    (False, None, False), (False, True, True), (False, False, False), (None, None, False), (None, True, True),
    (True, None, True), (True, True, True), (True, False, False)])
def test_a_base_is_in_8_bits_if_it_was_in_training_unless_said_otherwise(run_folder, here, trained, given, wanted):
    """The run that trained the experts decides, also if they are another's."""
    own, other = set_int8(copy(run_folder, here), trained), set_int8(shutil.copytree(RUN, here / "other"), not trained)
    for run in (opened(own, int8=given), opened(other, experts=f"{own}/joint/experts", int8=given)):
        dtypes = {layer.weight.dtype for layer in expert_layers(run.model).values()}
        assert dtypes == {torch.int8 if wanted else torch.float32} and run.model.dtype == torch.float32


def test_experts_or_a_router_trained_on_other_models_are_refused(run_folder, here):
    """The other models have the same shape, so nothing else would show it. --base and --encoder make it right; what
    PEFT trained belongs to no run, so it cannot be checked."""
    copy(run_folder, here)
    other = Path(shutil.copytree(RUN, "other"))
    for role in ("base", "encoder"):
        rewrite(other / "models" / role / "model.safetensors", lambda name, t: t + 1e-3)
    accept_models(other)
    shutil.copytree("other/joint/experts", "elsewhere")
    for role, part, loaded in (("base", "experts", "model"), ("encoder", "router", "router")):
        theirs = f"other/joint/{part}"
        why = f"models/{role}: not the {role} that {theirs} was trained on.*--{role} names"
        with pytest.raises(UserError, match=why) as error:
            getattr(opened(RUN, **{part: theirs}), loaded)
        assert "\n" not in str(error.value)
        getattr(opened(RUN, **{part: theirs, role: f"other/models/{role}"}), loaded)
        getattr(opened(RUN, **{part: f"{RUN}/joint/{part}"}), loaded)
    assert opened(RUN, experts="elsewhere").model


STAGES_OF = {"W": ["warmup"], "R": ["router"], "B": ["warmup", "router"], "A": ["all"], "other": ["all"]}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """A folder with a run for each set of stages that can be finished, another run on other models of the same shape,
    and copies of that run's experts and router outside of any run."""
    folder = tmp_path_factory.mktemp("pairs")
    small.make(folder)
    small.write_model(folder / "base2", seed=7)
    small.write_model(folder / "encoder2", "qwen2", seed=9)
    with contextlib.chdir(folder):
        for run, stages in STAGES_OF.items():
            models = ["--base", "base2", "--encoder", "encoder2"] if run == "other" else []
            for stage in stages:
                status, _, said = small.run_quietly(train, *small.TRAIN, "--run", run, *models, "--stage", stage)
                assert status == 0, said
        shutil.copytree("other/joint/experts", "experts")
        shutil.copytree("other/joint/router", "router")
    return folder


def can_be_used(part, role, run, given, model):
    """Whether the "experts" or the "router" are there and the model that they were trained on is known: `given` for
    --experts or --router, `model` for --base or --encoder."""
    own = {"W": "base", "R": "encoder"}.get(run, role) == role and role  # the run's own model, if it has one
    trained_on = own if given is None else f"{role}2" if "other" in given else None  # None: not known
    in_use = model or own or trained_on
    return bool(in_use and (given or own) and trained_on in (None, in_use))


@pytest.mark.parametrize("run", ["W", "R", "B", "A"])
def test_every_pair_of_stages_and_given_parts_and_models_works_or_is_refused_in_one_line(run, pairs, monkeypatch):
    monkeypatch.chdir(pairs)
    answers = {}
    for given in itertools.product((None, "other/joint/experts", "experts"), (None, "other/joint/router", "router"),
                                   (None, "base2"), (None, "encoder2")):
        options = dict(zip(("--experts", "--router", "--base", "--encoder"), given))
        argv = ["--run", run, *(word for option in options.items() if option[1] for word in option)]
        base = can_be_used("experts", "base", run, given[0], given[2])
        encoder = can_be_used("router", "encoder", run, given[1], given[3])
        commands = {"ask Hello --max-new-tokens 2": base and encoder}
        if (given[2] is None) == (given[3] is None):
            commands |= {"ablate --records 4 --replies 0": base and encoder, "routing --records 4": encoder,
                         f"export --as merged --persona O+ --out {run}{len(answers)}": base}
        for command, works in commands.items():
            status, answers[command.split()[0], *given], said = small.run_quietly(evaluation, *command.split(), *argv)
            assert status == (0 if works else 2), (command, argv, said)
            assert works or said.count("\n") == 1 and re.search(r"--(base|encoder|stage)\b", said), (argv, said)
    theirs = {"W": (None, "other/joint/router", None), "R": ("other/joint/experts", None, None)}.get(run)
    if theirs:  # the other run's model is taken, as if it had been given
        model = (None, "encoder2") if run == "W" else ("base2", None)
        assert answers["ask", *theirs, None] == answers["ask", *theirs[:2], *model] != ""


def test_an_encoder_that_was_saved_without_head_and_prefix_trains_and_routes_as_the_whole_one(pairs, monkeypatch):
    monkeypatch.chdir(pairs)
    shutil.copytree("encoder", "alone")
    state = load_file("encoder/model.safetensors")
    head = state.pop("lm_head.weight")
    save_file({name.removeprefix("model."): t for name, t in state.items()}, "alone/model.safetensors")
    status, _, said = small.run_quietly(train, *small.TRAIN, "--run", "S", "--encoder", "alone", "--stage", "router")
    assert status == 0, said
    whole, alone = (load_file(f"{run}/router/router/model.safetensors") for run in "RS")
    assert torch.equal(whole.pop("lm_head.weight"), head) and whole.keys() == alone.keys()
    assert all(torch.equal(whole[name], alone[name]) for name in whole)
    routed = [small.run_quietly(evaluation, "routing", "--run", run) for run in "RS"]
    assert routed[0][:2] == routed[1][:2] and routed[0][0] == 0


def test_experts_that_are_given_are_named_in_titles_and_belong_to_the_opened_run_alone(run_folder, here, capsys):
    """ablate's control and its table of warm-up experts, and the variants of an experiment, have their own experts."""
    copy(run_folder, here)
    shutil.copytree(RUN / "joint" / "experts", "elsewhere")
    out = output_of(capsys, f"ablate --run {RUN} --experts elsewhere --records 4 --replies 0")
    assert "; experts: elsewhere, tau 1" in " ".join(out.split()) and "Warm-up expert (row) alone" in out
    own = output_of(capsys, f"ablate --run {RUN} --records 4 --replies 0")
    assert "; experts after joint, tau 1" in " ".join(own.split())
    assert out.split("The gates")[1] == own.split("The gates")[1]  # the table of warm-up experts is the same
    given = opened(RUN, experts="elsewhere", router="theirs")
    assert (given.stage_of("experts"), given.origin("router")) == (None, "router: theirs")
    for stage, folders in (("warmup", ("warmup", "router")), ("joint", ("joint", "joint"))):
        other = load_run(given.args, RUN, stage)
        assert [other.folder(part) for part in ("experts", "router")] == [
            RUN / folder / part for folder, part in zip(folders, ("experts", "router"))]
    evaluation.main(f"ask --run {RUN} --experts elsewhere --gate high_openness:1 --max-new-tokens 1 Hello?".split())
    assert "note" not in capsys.readouterr().err  # which is about the run's joint experts


def test_evaluation_writes_nothing_into_the_run(run_folder, capsys):
    before = {file: file.stat().st_mtime_ns for file in run_folder.rglob("*")}
    output_of(capsys, f"ask --run {run_folder} --max-new-tokens 1 Hello?")
    output_of(capsys, f"routing --run {run_folder}")
    assert {file: file.stat().st_mtime_ns for file in run_folder.rglob("*")} == before


# ----------------------------------------------------------------------------------------------------------------------
# routing

def test_a_heat_map_has_a_row_for_each_query_and_fits_a_terminal(capsys):
    gates = np.full((3, 10), 0.02)
    gates[0, 3], gates[1, 0], gates[2, 9] = 0.8, 0.4, 0.2
    active = np.zeros((3, 10))
    active[0, 3] = active[0, 0] = active[1, 9] = 1
    heat_map(gates, active, ["Short", "A query\nover two lines, longer than its column, by far and away", "x" * 38])
    head, *rows = capsys.readouterr().out.split("\n\n")[1].splitlines()
    assert len(rows) == 3 and all(len(line) <= 80 for line in [head, *rows])
    assert re.findall(r"\S+", head) == ["query", *SHORT_NAMES]
    columns = [head.index(name) for name in SHORT_NAMES]  # each name stands over its column
    first, second, third = ([line.ljust(80)[at:at + 2] for at in columns] for line in rows)
    assert first[3] == "█*" and first[0] == "·*" and first[1] == "· "
    assert second[0] == "▒ " and second[9] == "·*" and third[9] == "░ "
    assert rows[0].startswith("  Short ") and rows[2].startswith(f"  {'x' * 38}  ")
    assert rows[1].startswith("  A query over two lines") and rows[1][:40].endswith("…")


def test_routing_reports_every_expert_on_three_subsets(run_folder, capsys):
    out = output_of(capsys, f"routing --run {run_folder} --show 4")
    titles = re.findall(r"^(\d+) test queries, (.*); router after joint, tau 1$", out, re.M)
    counts = [int(n) for n, _ in titles]
    assert [name for _, name in titles] == ["all", "domains seen in training", "domains held out"]
    assert counts[1] + counts[2] == counts[0] == 60
    for expert in EXPERTS:
        assert len(re.findall(rf"^  {expert} +\d+ +(?:\d\.\d{{3}}|nan) +\d\.\d{{3}} +\d\.\d{{3}}$", out, re.M)) == 3
    assert len(re.findall(r"^  mean ", out, re.M)) == out.count("R-precision") == out.count("top-1 mass") == 3
    queries = [r["query"] for r in read_records(run_folder / "data" / "test.jsonl")]
    _, *rows = out.split("\n\n")[-1].splitlines()
    assert len(rows) == 4 and all(row.startswith(f"  {query[:30]}") for row, query in zip(rows, queries))
    assert all(len(line) <= 80 for line in out.splitlines())


def test_routings_numbers_are_those_of_the_saved_router(run_folder, capsys):
    """Of the stage that was asked for, on the test records, at the temperature that was asked for."""
    records = read_records(run_folder / "data" / "test.jsonl")
    active = torch.stack([active_experts(r["traits"]) for r in records])
    for stage, tau in (("warmup", 1.0), ("joint", 0.2)):
        run = opened(run_folder, stage=stage)
        similarity = torch.cat([run.router.similarity(run.router.embed(*pad([row.query]))).detach()
                                for row in run.rows(records)])
        out = output_of(capsys, f"routing --run {run_folder} --stage {stage} --tau {tau}")
        assert f"router after {'router' if stage == 'warmup' else 'joint'}, tau {tau:g}" in out
        scores = [average_precision(s, a) for s, a in zip(similarity.T.numpy(), active.T.numpy())]
        first = out.split(" test queries, domains")[0]
        found = [float(re.search(rf"^  {e} +\d+ +(\S+)", first, re.M)[1]) for e in EXPERTS]
        assert np.allclose(found, scores, atol=2e-3)
        gates = (similarity / tau).softmax(-1)
        entropy, precision = (float(re.search(rf"{name} (\d\.\d+)", first)[1])
                              for name in ("entropy", "R-precision"))
        assert abs(entropy - -(gates * gates.log()).sum(-1).mean()) < 2e-3
        assert abs(precision - r_precision(similarity.numpy(), active.numpy())) < 0.01


def test_routing_and_ablate_have_a_table_for_each_culture(run_folder, here, capsys, no_table):
    copy(run_folder, here)
    records = [record | {"culture": "ABC"[i % 3], "of": str(i // 3)}
               for i, record in enumerate(template_records("test", 12))]
    for record in records[::3]:
        del record["culture"]
    for name in SPLITS:
        write_records(here / "mine" / f"{name}.jsonl", records)
    out = output_of(capsys, f"routing --run {RUN} --data mine --seed 3")
    assert all(len(line) <= 80 for line in out.splitlines())
    names = ["culture: B", "culture: C", "culture: none named"]
    assert re.findall(r"^4 test queries, (culture: .*); router", out, re.M) == names
    run = LoadedRun(evaluation.Routing(run=str(RUN), data="mine"))
    active = torch.stack([active_experts(r["traits"]) for r in records]).numpy()
    found = message_precision(train.score_queries(run.router, run.rows(records)).numpy(), active)
    for i, name in enumerate(names):
        of = found[[1, 2, 0][i]::3]
        words = np.mean([len(r["query"].split()) for r in records[[1, 2, 0][i]::3]])
        mean, low, high = bootstrap(of, np.ones(4), 3)
        shown = re.escape(f"{mean:.3f} [{low:.3f}, {high:.3f}]")
        assert re.search(rf"^  {name} +4 +{words:.3f} +\d\.\d+ +{shown}$", out, re.M)
    mean, low, high = bootstrap(found, np.ones(12), 3, clusters=situations(records))
    assert f"{mean:.3f} [{low:.3f}, {high:.3f}]" in out
    ones, said = np.ones(12), " ".join(out.split())
    assert culture_gap(found, ones, records, "AP of a message", 3) in said
    out = " ".join(output_of(capsys, f"ablate --run {RUN} --data mine --replies 0 --seed 3").split())
    test = load_split(run)
    nats = losses(run, test, ["uniform", "learned", "base"])
    assert re.findall(r"Held-out loss, 4 records, \d+ reply tokens, (culture: .*?); experts", out) == names
    assert culture_gap(nats["uniform"] - nats["learned"], test.counts, records,
                       "What the learned gate saves against a uniform one, nats/token,", 3) in out
    difference = bootstrap(nats["base"] - nats["learned"], test.counts, 3, clusters=situations(records))
    assert "{:+.4f} [{:+.4f}, {:+.4f}]".format(*difference) in out.split("culture: B")[0]

def test_routing_needs_no_responses(run_folder, here, capsys):
    copy(run_folder, here, ["warmup", "joint"])
    records = [{k: v for k, v in r.items() if k != "response"} for r in template_records("test", 8)]
    for name in SPLITS:
        write_records(here / "mine" / f"{name}.jsonl", records)
    assert "6 test queries, all" in output_of(capsys, f"routing --run {RUN} --data mine --records 6")


def test_domains_count_as_held_out_if_the_run_was_not_trained_on_them_whatever_the_data(run_folder, here):
    """--data has its own training split, which the run has never seen. Without the run's own records nothing is known,
    and a record without a domain is in none that was held out."""
    source = copy(run_folder, here)
    domains = {record["domain"] for record in read_records(source / "data" / "train.jsonl")}
    records = [*template_records("test", 8), template_records("train", 1)[0] | {"domain": "never", "id": "a"}]
    for name in SPLITS:
        write_records(here / "mine" / f"{name}.jsonl", records)
    records.append({**records[0], "id": "b"})
    del records[-1]["domain"]
    write_records(here / "mine" / "test.jsonl", records)
    expected = [record.get("domain", "none") not in {*domains, "none"} for record in records]
    run = LoadedRun(evaluation.Routing(run=str(RUN), data="mine"))
    assert run.records()[1].tolist() == expected and 0 < sum(expected) < len(records)
    shutil.rmtree(source / "data")
    assert not run.records()[1].any() and not (source / "data").exists()


# ----------------------------------------------------------------------------------------------------------------------
# ablate

def test_ablate_has_every_rule_on_three_subsets_with_intervals(ablation):
    parts = [" ".join(part.split()) for part in ablation.split("\nHeld-out loss, ")[1:]]
    titles = [re.match(r"(\d+) records, (\d+) reply tokens, (.*?); experts after joint, tau 1 gate", part).groups()
              for part in parts]
    assert [name for *_, name in titles] == ["all", "domains seen in training", "domains held out"]
    counts = [(int(records), int(tokens)) for records, tokens, _ in titles]
    assert counts[0][0] == 20 and tuple(map(sum, zip(*counts[1:]))) == counts[0]
    for part in ablation.split("The gates")[0].split("\nHeld-out loss, ")[1:]:
        rows = {line.split()[0]: line for line in part.splitlines() if re.match("  [a-z]+ +[0-9]", line)}
        assert list(rows) == list(GATE_RULES)
        learned = float(rows["learned"].split()[1])
        for rule, line in rows.items():
            found = re.search(r"([+-]\d\.\d{4}) \[([+-]\d\.\d{4}), ([+-]\d\.\d{4})\]", line)
            assert bool(found) == (rule != "learned")
            if found:
                mean, low, high = map(float, found.groups())
                assert low <= mean <= high and abs(float(line.split()[1]) - learned - mean) < 3e-4
    assert all(re.search(rf"^  {rule} +{re.escape(meaning)}$", ablation, re.M) for rule, meaning in GATE_RULES.items())
    assert all(len(line) <= 80 for line in ablation.splitlines())


def test_ablates_losses_are_those_of_the_gates(run_folder, ablation):
    run, records = opened(run_folder), read_records(run_folder / "data" / "test.jsonl")[:20]
    rows, _ = make_rows(records, run.chat)
    active = torch.stack([row.active for row in rows])
    similarity = train.score_queries(run.router, run.rows(records))
    for rule in ("base", "shuffled", "oracle"):
        gates = gates_for_rule(rule, active, similarity, 1.0, seed=0)
        nats = [train.row_losses(run.model, [row], None if gates is None else gates[i:i + 1]).item()
                for i, row in enumerate(rows)]
        mean = sum(nats) / sum(len(row.ids) - row.n_prompt for row in rows)
        assert abs(float(re.search(rf"^  {rule} +(\d\.\d+)", ablation, re.M)[1]) - mean) < 3e-4, rule


def test_ablate_ends_with_the_table_of_warm_up_experts_and_poles(run_folder, ablation):
    """Expert e alone, as warm-up left it, on records that call for pole p and for no other."""
    records = [r for r in read_records(run_folder / "data" / "test.jsonl")[:20] if len(r["traits"]) == 1]
    poles = np.array([int(active_experts(r["traits"]).argmax()) for r in records])
    table = ablation.split(f"alone on the {len(records)} records that call for one pole")[1].split("\nShare of")[0]
    assert re.search("^  expert +" + " +".join(map(re.escape, SHORT_NAMES)) + "$", table, re.M)
    cells = [re.search(rf"^  {re.escape(name)}  +(.*)$", table, re.M)[1].split() for name in SHORT_NAMES]
    values = np.array([[float(cell.strip("*")) for cell in row] for row in cells])
    assert values.shape == (10, 10)
    run = opened(run_folder, stage="warmup")
    rows, _ = make_rows(records, run.chat)
    for e in (0, 7):
        nats = np.array([train.row_losses(run.model, [row], torch.eye(10)[e:e + 1]).item() for row in rows])
        for p in range(10):
            if (poles == p).any():
                tokens = sum(len(row.ids) - row.n_prompt for row, pole in zip(rows, poles) if pole == p)
                assert abs(values[e, p] - nats[poles == p].sum() / tokens) < 6e-3
            else:
                assert np.isnan(values[e, p])
    assert re.search(rf"lowest on the diagonal: \d+ of {len(set(poles))} poles", table)
    assert all(sum("*" in row[p] for row in cells) == (p in poles) for p in range(10))
    shares = ablation.split("Share of up to 1 replies with the pole's signature")[1]
    named = re.findall(r"^  (\w+_\w+) +[01]\.\d\d +[01]\.\d\d$", shares, re.M)
    assert named == [EXPERTS[p] for p in sorted(set(poles))]


def test_signatures_are_counted_by_whether_the_query_calls_for_their_pole(run_folder, monkeypatch):
    """Each reply shows the pole with the largest weight: the oracle's is called for; a shuffled gate's is another's."""
    words = [pole["signature"][0] for pole in lab()["poles"].values()]

    def replies(model, chat, records, gates=None, **_):
        return ["nothing"] * len(records) if gates is None else [words[int(gate.argmax())] for gate in gates]
    monkeypatch.setattr(evaluation, "generate_replies", replies)
    args = evaluation.Ablate(run=str(run_folder), replies=2)
    run = LoadedRun(args)
    test = load_split(run, limit=30)
    similarity = train.score_queries(run.router, test.rows)
    rows = {name: shares for name, *shares in evaluation.signature_table(run, test, similarity, args)}
    assert rows["base"] == ["0.00", "0.00"] and rows["oracle"] == ["1.00", "0.00"]
    gates = gates_for_rule("shuffled", test.active[:20], similarity[:20], seed=0)
    right = np.mean([test.active[i, gates[i].argmax()].item() for i in range(20)])
    assert rows["shuffled"] == [f"{right:.2f}", f"{1 - right:.2f}"]
    test.records = [{k: v for k, v in record.items() if k != "manner"} for record in test.records]
    assert evaluation.signature_table(run, test, similarity, args) == []


def test_signature_shares_are_counted_in_replies(run_folder, capsys, monkeypatch):
    """An expert whose every reply has its signature has a share of 1; a base that never writes one has 0."""
    words = [pole["signature"][0] for pole in lab()["poles"].values()]

    def replies(model, chat, records, gates=None, **_):
        return ["nothing" if gates is None else words[int(gates.argmax())] for _ in records]
    monkeypatch.setattr(evaluation, "generate_replies", replies)
    assert signatures(words[3]) == [int(e == 3) for e in range(10)]
    args = evaluation.Ablate(run=str(run_folder), records=12, replies=3, stage="warmup")
    evaluation.expert_table(LoadedRun(args), args)
    table = capsys.readouterr().out.split("Share of up to 3 replies")[1]
    shares = re.findall(r"^  \w+_\w+ +(\d\.\d\d) +(\d\.\d\d)$", table, re.M)
    assert shares and set(shares) == {("0.00", "1.00")}


def test_ablate_compares_with_a_control(run_folder, here, no_table, capsys):
    """The control is the joint experts of another run under a uniform gate. (Here it is the run itself.)"""
    copy(run_folder, here)
    out = output_of(capsys, f"ablate --run {RUN} --control {RUN} --records 4")
    rows = re.findall(r"^  (uniform|control) +(\S+) +(\S+ \[.*?\])", out, re.M)
    assert rows[0][1:] == rows[1][1:] and re.search("^  control +0.1 for each, in training too$", out, re.M)
    shutil.rmtree(here / RUN / "joint")
    with pytest.raises(UserError, match="has no experts of stage joint yet: python train.py .*--stage joint --run"):
        evaluation.main(f"ablate --run {RUN} --control {RUN} --records 4".split())


def test_ablate_has_one_base_in_memory_at_a_time(run_folder, capsys, monkeypatch):
    """It measures three models: the run's, the control's and warm-up's."""
    loaded, load_base = [], runs.Setup.load_base

    def load(setup, experts=None):
        assert not any(model() for model in loaded)
        model = load_base(setup, experts)
        loaded.append(weakref.ref(model))
        return model
    monkeypatch.setattr(runs.Setup, "load_base", load)
    output_of(capsys, f"ablate --run {run_folder} --control {run_folder} --records 4 --replies 0")
    assert len(loaded) == 3


# ----------------------------------------------------------------------------------------------------------------------
# health

HEALTHY = REDUCED | dict(
    records=(400, 40, 60), pretrain=dict(steps=10, batch=6, lr=4e-3), warmup=dict(steps=44, batch=8, lr=1e-2),
    router=dict(steps=200, batch=16, router_lr=2e-3, frozen_layers=0),
    joint=dict(steps=2, batch=6, lr=2e-4, router_lr=5e-4, frozen_layers=0))
healthy_folder = []


@pytest.fixture
def healthy(reduced, monkeypatch, tmp_path_factory):
    """A run at tau 0.3 in which everything works. Not to be written to."""
    monkeypatch.setitem(runs.PRESETS, "tiny", HEALTHY)
    monkeypatch.setattr(tiny_models, "template_records",
                        lambda split, n, seed: template_records(split, min(n, 400), seed))
    if not healthy_folder:
        folder = tmp_path_factory.mktemp("healthy")
        with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()):
            train.main(["--preset", "tiny", "--tau", "0.3"], show_results=False)
        healthy_folder.append(folder)
    return healthy_folder[0] / RUN


def health(capsys, command):
    """(exit status, what is printed) of the command health."""
    capsys.readouterr()
    status = evaluation.main(["health", *command.split()])
    return status, capsys.readouterr().out


@pytest.mark.slow
def test_a_healthy_run_has_no_alarm(healthy, capsys):
    for stage in ("warmup", "joint"):
        status, out = health(capsys, f"--run {healthy} --stage {stage}")
        assert status == 0 and "\nalarms: none\n" in out and "ALARM" not in out, out
        assert len(re.findall(r"^ok     ", out, re.M)) == 7
        assert max(map(len, out.splitlines())) <= 80 + len(str(healthy))


def router_with(change):
    """A disease: the joint router's expert embeddings are change(embeddings)."""
    return lambda run: rewrite(run / "joint/router/model.safetensors", lambda name, tensor: change(tensor)
                               if name == "expert_embeddings" else tensor)


def opposite_to_all(embeddings, expert=3):
    """Expert embeddings with which the router never chooses the expert."""
    worst = -F.normalize(embeddings, dim=-1).mean(0, keepdim=True)
    return torch.cat((embeddings[:expert], worst, embeddings[expert + 1:]))


def experts_scaled(experts, factor):
    """A disease: these joint experts' updates are multiplied by a factor."""
    def change(run):
        for e in experts:
            rewrite(run / f"joint/experts/{EXPERTS[e]}/adapter_model.safetensors",
                    lambda name, tensor: tensor * factor if "lora_B" in name else tensor)
    return change


def copied_expert(run):
    shutil.copy(run / f"joint/experts/{EXPERTS[6]}/adapter_model.safetensors",
                run / f"joint/experts/{EXPERTS[1]}/adapter_model.safetensors")


def empty_vectors(run):
    file = run / "data" / "train.jsonl"
    records = read_records(file)
    write_records(file, [*records, records[0] | {"id": "zero", "traits": {"openness": 0}}])


@pytest.mark.slow
@pytest.mark.parametrize("disease, alarm, says, more", [
    (router_with(lambda v: v.roll(3, 0)), "router", "reaches 0", ""),
    (router_with(lambda v: v[:1].repeat(10, 1)), "router", r"shuffled ones -?0.0000 \[-?0.0000, -?0.0000\]", ""),
    (lambda run: None, "collapsed gate", r"entropy 0.00\d nats", "--tau 0.001"),
    (lambda run: None, "collapsed gate", r"entropy 2.303 nats", "--tau 100"),
    (experts_scaled(range(10), 30), "general ability", r"is \+[1-9]\d*.\d% \[", ""),
    (empty_vectors, "all-zero vectors", "1 of 501 records have no active trait", ""),
    (router_with(opposite_to_all), "dead experts", "low_conscientiousness[;,].*first choices 0.000", ""),
    (experts_scaled([7], 0), "dead experts", "low_agreeableness[;,].*smallest update 0.00 of the largest", ""),
    (experts_scaled([4], -9), "experts that only work together", "high_extraversion[;,].*worst \\+", ""),
    (copied_expert, "copies", r"low_openness and high_agreeableness, cosine 1.00", "")])
def test_each_disease_raises_its_alarm(healthy, here, capsys, disease, alarm, says, more):
    run = copy(healthy, here)
    disease(run)
    status, out = health(capsys, f"--run {run} --stage joint --records 30 {more}")
    assert status == 1, out
    found = re.search(rf"^ALARM  {alarm}: ((?:.|\n       )*)", out, re.M)
    assert found and re.search(says, " ".join(found[1].split())), out
    assert re.search(rf"^alarms: (.*, )?{alarm}(,|$)", out, re.M)
    for other in {"all-zero vectors", "copies"} - {alarm}:
        assert f"ALARM  {other}" not in out


@pytest.mark.slow
def test_general_ability_is_measured_on_the_text_that_is_given(healthy, here, capsys):
    run = opened(healthy)
    (here / "text").write_text("A first piece.\nIts second line.\n\n\nAnother piece, quite different.\n")
    _, out = health(capsys, f"--run {healthy} --records 10 --text text")
    rows = evaluation.plain_rows(run, ["A first piece.\nIts second line.", "\nAnother piece, quite different.\n"])
    assert all(row.n_prompt == 1 for row in rows) and rows[0].ids[0] == run.chat.bos and rows[0].ids[-1] == run.chat.end
    base, counts = train.evaluation_loss(run.model, rows)
    mixed, _ = train.evaluation_loss(run.model, rows, gates_for_rule(
        "learned", torch.ones(2, 10), train.score_queries(run.router, rows), 0.3))
    flat = " ".join(out.split())
    assert f"base's {base.sum() / counts.sum():.3f} nats/token" in flat
    assert f"text is {(mixed - base).sum() / base.sum():+.1%}" in flat


@pytest.mark.parametrize("text, why", [(None, "No such file"), ("\n \n\n\t\n", "no text in it")])
def test_a_file_without_text_is_refused(run_folder, here, text, why):
    if text:
        (here / "given.txt").write_text(text)
    with pytest.raises(UserError, match=f"given.txt: .*{why}|{why}.*given.txt") as error:
        evaluation.main(["health", "--run", str(run_folder), "--records", "4", "--text", "given.txt"])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("tokens, context, limit", [(64, None, 64), (64, 48, 48), (32, 48, 32)])
def test_plain_text_is_cut_to_the_batch_and_to_the_models_context(run_folder, tokens, context, limit):
    run = opened(run_folder, tokens=tokens)
    run.model.context = context
    long, short = evaluation.plain_rows(run, ["A long text. " * 100, "Short."])
    assert len(long.ids) == limit and short.ids[-1] == run.chat.end
    train.evaluation_loss(run.model, [long, short], tokens=tokens)


# ----------------------------------------------------------------------------------------------------------------------
# ask

def replies_in(out):
    return re.findall(r"^base:        (.*)\n\nPersonaFuse: (.*)$", out, re.M)


def test_ask_answers_as_the_base_and_as_the_mixture(run_folder, capsys):
    """A reply is what generate gives with that gate, whether the router or a persona set it."""
    run, queries = opened(run_folder), ["My boss is furious.", "I miss my sister — what now?"]
    learned = torch.cat([run.router(*pad([query_ids(run.tokenizer, q)])) for q in queries]).detach()
    for options, gates in (("", learned), ("--persona O+,E-:0.5", persona_gate("O+,E-:0.5", 1.0).expand(2, -1))):
        out = output_of(capsys, f"ask --run {run_folder} --max-new-tokens 6 {options}", *queries)
        wanted = []
        for query, gate in zip(queries, gates):
            prompt = run.chat.prompt([{"role": "user", "content": query}])
            wanted.append(tuple(run.chat.text(generate(run.model, [prompt], g, 6, stops=run.chat.stops)[0])
                                for g in (None, gate[None])))
            assert query in out and format_gate(gate) in out
        assert replies_in(out) == wanted


def test_ask_reads_files_and_prints_json_with_the_same_replies(strong, capsys, here):
    """Standard output holds nothing but JSON; the file's ids and histories are used."""
    queries = [{"id": "a", "query": "My boss is furious."},
               {"id": 7, "query": "And now?", "history": [{"role": "user", "content": "He left."},
                                                          {"role": "assistant", "content": "Oh no."}]}]
    (here / "asked.jsonl").write_text("".join(json.dumps(q) + "\n" for q in queries))
    common = f"ask --run {strong} --max-new-tokens 9"
    found = [json.loads(line) for line in output_of(capsys, f"{common} --json --file asked.jsonl").splitlines()]
    assert [(row["id"], row["query"]) for row in found] == [(q["id"], q["query"]) for q in queries]
    run = opened(strong)
    said = run.similarity([{"id": i, "query": text} for i, text in enumerate(("He left.", "And now?"))])
    history = ((said[0] + 2 * said[1]) / 3).softmax(-1)[None]  # as in chat: the replies are not read
    unread = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": " "}]
    assert torch.allclose(run.gates([queries[1] | {"history": unread + queries[1]["history"]}]), history)
    for row, query, gate in zip(found, queries, (run.gates(queries[:1]), history)):
        assert list(row["gate"]) == list(EXPERTS) and torch.allclose(torch.tensor([*row["gate"].values()]), gate[0])
        prompt = run.chat.prompt([*query.get("history", []), {"role": "user", "content": query["query"]}])
        assert [row["base"], row["reply"]] == [
            run.chat.text(generate(run.model, [prompt], g, 9, stops=run.chat.stops)[0]) for g in (None, gate)]
    base, reply = (evaluation.printable(found[0][key]) for key in ("base", "reply"))
    assert f"base:        {base}\n\nPersonaFuse: {reply}" in output_of(capsys, common, queries[0]["query"])
    assert base != reply


def test_ask_with_a_persona_needs_no_router(run_folder, here, capsys):
    copy(run_folder, here, ["joint", "router", "models/encoder"])
    assert replies_in(output_of(capsys, f"ask --run {RUN} --max-new-tokens 2 --persona O+ Hello?"))


def test_sampled_replies_are_fixed_by_the_seed(run_folder, capsys):
    command = f"ask --run {run_folder} --max-new-tokens 8 --temperature 3 Hello?"
    one, again, other = (output_of(capsys, f"{command} --seed {seed}") for seed in (1, 1, 2))
    assert one == again and replies_in(one) != replies_in(other)


@pytest.mark.parametrize("options, note", [
    ("--gate high_openness:1", True), ("--gate high_openness:1 --stage warmup", False),
    ("--gate high_openness:0.5,low_openness:0.5", False), ("--persona O+", False)])
def test_one_joint_expert_alone_prints_a_note(run_folder, capsys, options, note):
    """After joint training a single expert is far from what it was trained for; warm-up's were trained alone."""
    evaluation.main(f"ask --run {run_folder} --max-new-tokens 1 {options} Hello?".split())
    out, err = capsys.readouterr()
    assert ("note: joint training" in err) == note and ("--stage warmup" in err) == note
    if options.startswith("--gate"):
        assert format_gate(raw_gate(options.split()[1])[0]) in out


@pytest.mark.parametrize("argv, why", [
    (["Hello?", ""], "an empty query"), ([" \n"], "an empty query"), (["caf\udce9"], "not UTF-8"),
    (["--persona", "O+", "--gate", "high_openness:1", "Hello?"], "--persona and --gate both set the gate: choose one"),
    (["--gate", "high_openness:1", "--user", "u.json", "Hello?"], "--gate and --user both set the gate: choose one"),
    (["--persona", "X+", "Hello?"], "persona 'X\\+'"), (["--gate", "1", "Hello?"], "expected ten weights"),
    (["--device", "tpu", "Hello?"], "--device 'tpu'"), ([], "either as arguments or with --file"),
    (["--file", "f.txt", "Hello?"], "either as arguments or with --file"),
    (["--file", "none.txt"], "none.txt: No such file"),
    (["--file", "f.pdf"], "expected queries in a .txt")])
def test_what_cannot_be_asked_is_refused_in_one_line(run_folder, argv, why):
    with pytest.raises(UserError, match=why) as error:
        evaluation.main(["ask", "--run", str(run_folder), *argv])
    assert "\n" not in str(error.value)


def test_a_models_text_cannot_control_the_terminal():
    assert evaluation.printable("a\x1b[2Jb\n\tc\x07é\u202e") == "a[2Jb\n\tcé"
    control = [chr(c) for c in (*range(32), *range(0x7F, 0xA0)) if chr(c) not in "\n\t"]
    assert not any(map(evaluation.printable, [*control, *"\u202a\u202b\u202c\u202d\u2066\u2067\u2068\u2069\ud83d"]))


@pytest.mark.parametrize("text", [
    "Monsieur\u00a0Dupont", "10\u202f000\u2009€", "私\u3000は", "می\u200cخواهم", "👨\u200d👩\u200d👧", "❤\ufe0f", "e\u0301",
    "co\u00adop", "\ufeffBOM", "שלום\u200f!", "🏴\U000e0067\U000e0062\U000e007f", "\ue000", "\U0001fae8"])
def test_no_character_that_carries_text_is_lost(text):
    assert evaluation.printable(text) == text


# ----------------------------------------------------------------------------------------------------------------------
# chat

class Terminal:
    """A program that runs in a pseudo-terminal."""

    def __init__(self, *argv):
        self.master, slave = pty.openpty()
        self.process = subprocess.Popen([sys.executable, *map(str, argv)], stdin=slave, stdout=slave, stderr=slave,
                                        start_new_session=True, env=os.environ | {"TERM": "dumb"})
        os.close(slave)
        self.seen = ""

    def until(self, pattern, seconds=60):
        """Read until the pattern has come. Returns what was read up to the pattern's end."""
        deadline = time.monotonic() + seconds
        while not (found := re.search(pattern, self.seen)):
            ready = select.select([self.master], [], [], max(0, deadline - time.monotonic()))[0]
            assert ready, f"waited for {pattern!r}, saw {self.seen!r}"
            try:
                self.seen += os.read(self.master, 65536).decode("utf-8", "replace").replace("\r\n", "\n")
            except OSError:  # how Linux reports that the program has ended
                assert not pattern, f"ended before {pattern!r}, saw {self.seen!r}"
        head, self.seen = self.seen[:found.end()], self.seen[found.end():]
        return head

    def say(self, line):
        os.write(self.master, line.encode() + b"\n")
        return self.until(r"\n> ")

    def close(self):
        os.write(self.master, b"\x04")
        return self.process.wait(30)


def test_a_conversation_in_a_terminal(strong, here):
    """The router reads each message alone, and each counts twice as much as the one before. The gate stands in one line
    of at most 80 columns before the reply, and the reply is what generate gives for the conversation under that gate."""
    run, turns = opened(strong), []
    talk = Terminal(ROOT / "eval.py", "chat", "--run", strong, "--max-new-tokens", 12)

    def expected(query, gate=None, base=False):
        messages = [{"role": role, "content": text}
                    for turn in turns for role, text in zip(("user", "assistant"), turn)]
        said = [{"id": "0", "query": text} for text in (*(turn[0] for turn in turns), query)]
        counts = torch.tensor([2.0 ** i for i in range(len(said))])[:, None]  # the last message counts most
        gate = run.gate_of((run.similarity(said) * counts).sum(0) / counts.sum())[None] if gate is None else gate
        prompt = run.chat.prompt([*messages, {"role": "user", "content": query}])
        found = generate(run.model, [prompt], None if base else gate, 12, stops=run.chat.stops)[0]
        line = " ".join(f"{name}{w:.2f}".replace("0.", ".") for name, w in zip(SHORT_NAMES, gate[0].tolist()))
        return run.chat.text(found), line

    try:
        talk.until("/help lists the commands.*\n\n> ")
        for query, persona in (("My boss is furious.", None), ("And my sister too.", None), ("Why?", "O+,E-:0.5")):
            if persona:
                talk.say(f"/persona {persona}")
            out = talk.say(query)
            text, line = expected(query, persona_gate(persona, 1.0)[None] if persona else None)
            assert f"{'by hand' if persona else 'router'}  {line}\n\n{evaluation.printable(text)}\n\n> " in out
            assert max(map(len, out.splitlines()[1:3])) <= 80
            turns.append((query, text))
        last = turns.pop()
        text, _ = expected(last[0], base=True)
        assert f"base\n\n{evaluation.printable(text)}\n" in talk.say("/base")
        for line, answer in (
                ("/save said.jsonl", "3 turns"), ("/save said.jsonl", "exists already"),
                ("/save said.txt", "ends in .jsonl"), ("/save", "its argument is missing"), ("/help", "/persona"),
                (f"/save {'x' * 300}.jsonl", "File name too long"),
                ("/good", "feedback.jsonl: good"), ("/bad", "has a verdict already"),
                ("/nothing", "/nothing is not a command"), ("/persona X+", "expected a letter of OCEAN"),
                ("/reset", ""), ("/router", "")):
            assert answer in talk.say(line)
        turns.clear()
        text, line = expected("Hello again.")
        assert f"router  {line}\n\n{evaluation.printable(text)}\n\n> " in talk.say("Hello again.")
        talk.say("/reset")
        assert "there is none yet" in talk.say("/base") and "nothing to save" in talk.say("/save more.jsonl")
        assert talk.close() == 0
    finally:
        talk.process.kill()
    items, _ = read_queries(here / "said.jsonl")
    saved = [json.loads(line) for line in (here / "said.jsonl").read_text().splitlines()]
    assert all(list(turn["gate"]) == list(EXPERTS) for turn in saved)
    gates = torch.tensor([[*turn["gate"].values()] for turn in saved])
    assert torch.allclose(run.gates(items)[:2], gates[:2], atol=1e-6)  # which ask chooses, too; the third was by hand
    assert [item["query"] for item in items] == ["My boss is furious.", "And my sister too.", "Why?"]
    assert [len(item.get("history", [])) for item in items] == [0, 2, 4]
    assert saved[1]["response"] == items[2]["history"][3]["content"]
    assert items[2]["history"][1]["content"] == items[1]["history"][1]["content"]


def test_a_conversation_through_a_pipe_has_no_prompts_and_goes_on_after_errors(strong):
    talk = subprocess.run([sys.executable, ROOT / "eval.py", "chat", "--run", strong, "--max-new-tokens", "4",
                           "--persona", "O+"], input=b"/base\n\n\xff\xfe\nHello\n/quit\nnever\n", capture_output=True)
    out, err = talk.stdout.decode(), talk.stderr.decode()
    assert talk.returncode == 0 and out.startswith("by hand  O+.25 ") and out.count("by hand") == 1 and "> " not in out
    assert "there is none yet" in err and "UTF-8" in err and "Traceback" not in err


def test_a_reply_is_streamed_and_can_be_stopped(run_folder, monkeypatch, capsys):
    """Text comes as soon as it is known, in whole characters only; Ctrl-C keeps what was said."""
    args = evaluation.Talk(run=str(run_folder))
    talk, pieces = evaluation.Conversation(LoadedRun(args), args), []
    said = encode(talk.run.chat.tokenizer, "Ä bé — 猫 now")

    def stopped(model, prompts, gate, n, temperature, top_p, stops, generator, each):
        for token in said:
            each(0, token)
            pieces.append(capsys.readouterr().out)
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluation, "generate", stopped)
    text = talk.stream({"query": "Hello"}, None)
    assert text == "Ä bé — 猫 now" == "".join(pieces) and not any("\ufffd" in piece for piece in pieces)
    assert sum(map(bool, pieces)) > 4 and capsys.readouterr().out == " [stopped]\n\n"


@pytest.mark.parametrize("where", ["generate", "similarity"])
def test_a_reply_stopped_before_its_first_word_leaves_no_turn(run_folder, monkeypatch, capsys, where):
    """While the base reads the prompt, and while the router does. The conversation goes on."""
    def stop(*args):
        raise KeyboardInterrupt

    args = evaluation.Talk(run=str(run_folder), max_new_tokens=4)
    talk = evaluation.Conversation(LoadedRun(args), args)
    earlier = {"query": "Hello", "response": "Hi.", "gate": {}}
    talk.turns = [earlier]
    with monkeypatch.context() as patch:
        patch.setattr(*((evaluation, "generate", stop) if where == "generate" else (talk.run, "similarity", stop)))
        talk.reply("And now?")
    assert talk.turns == [earlier] and capsys.readouterr().out.endswith("[stopped]\n\n")
    talk.reply("And then?")
    assert [turn["query"] for turn in talk.turns] == ["Hello", "And then?"]


# ----------------------------------------------------------------------------------------------------------------------
# export

def their_logits(folder, ids, adapter=None):
    """What transformers, and peft with an adapter, compute from an export."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if adapter:
        theirs = pytest.importorskip("peft").PeftModel.from_pretrained(theirs, adapter)
    with torch.no_grad():
        return theirs.eval()(ids).logits


def our_logits(run, ids, gate):
    with torch.no_grad():
        return run.model(ids, gate)


def test_exported_experts_are_what_peft_computes(strong, ids, here, capsys):
    output_of(capsys, f"export --run {strong} --out out")
    assert sorted(p.name for p in Path("out").iterdir()) == sorted(EXPERTS)
    run = opened(strong)
    for e in (0, 7):
        ours = our_logits(run, ids, torch.eye(10)[[e, e]])
        assert (their_logits(run.setup.base, ids, f"out/{EXPERTS[e]}") - ours).abs().max() <= 1e-4
    config = json.loads(Path("out/high_openness/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == run.setup.base


@pytest.mark.parametrize("options", [["--persona", "O+,E-:0.5"], ["--gate", "high_openness:0.7,low_neuroticism:0.3"],
                                     ["--query", "My boss is furious."]])
@pytest.mark.parametrize("kind", ["mixture", "merged"])
def test_a_mixture_or_merged_weights_are_what_others_compute(strong, ids, here, capsys, kind, options):
    out = output_of(capsys, f"export --run {strong} --as {kind} --out out --shard-gb 0.001", *options)
    asked = json.loads(output_of(capsys, f"ask --run {strong} --max-new-tokens 1 --json", *(
        options[1:] if options[0] == "--query" else [*options, "Hello"])))
    gate, run = torch.tensor([[*asked["gate"].values()]]), opened(strong)
    ours = our_logits(run, ids, gate.expand(2, -1))
    theirs = their_logits(run.setup.base, ids, "out") if kind == "mixture" else their_logits("out", ids)
    assert (theirs - ours).abs().max() <= 1e-4 and (ours - our_logits(run, ids, None)).abs().max() > 0.1
    assert format_gate(gate[0]) in out
    if kind == "mixture":
        assert json.loads(Path("out/adapter_config.json").read_text())["r"] == 80


def test_experts_that_were_trained_in_8_bits_are_exported_and_merged_into_the_full_weights(strong, here, capsys):
    for words in ("experts", "mixture --persona A+", "merged --persona A+ --no-int8"):
        full, in_8_bits = (output_of(capsys, f"export --run {set_int8(strong, value)} --out {name} --as {words}")
                           for value, name in ((False, "full"), (True, "int8")))
        assert full.replace("full", "int8") == in_8_bits and small.contents(Path("full")) == small.contents(Path("int8"))
        shutil.rmtree("full"), shutil.rmtree("int8")


def test_merged_is_a_whole_model_folder_in_shards(strong, here, capsys):
    """Shards keep to the size asked for, the index names every tensor once, and all files of the base's folder are
    there."""
    export = f"export --run {strong} --as merged --persona A+ --out"
    output_of(capsys, f"{export} many --shard-gb 0.001")
    output_of(capsys, f"{export} one")
    run = opened(strong)
    whole, found = dict(merged_tensors(run.model, persona_gate("A+", 1.0))), {}
    index = json.loads(Path("many/model.safetensors.index.json").read_text())
    for file in sorted(Path("many").glob("*.safetensors")):
        state = load_file(file)
        assert len(state) == 1 or sum(t.nbytes for t in state.values()) <= 1e6
        assert {index["weight_map"][name] for name in state} == {file.name}
        found |= state
    assert re.fullmatch(r"model-00001-of-000\d\d.safetensors", min(index["weight_map"].values()))
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in found.values())
    for state in (found, load_file("one/model.safetensors")):
        assert state.keys() == whole.keys() and all(torch.equal(state[n], whole[n]) for n in whole)
    for file in Path(run.setup.base).iterdir():
        assert (Path("one") / file.name).exists()
        if file.name.startswith("tokenizer"):
            assert file.read_bytes() == (Path("many") / file.name).read_bytes()
    config = json.loads(Path("one/config.json").read_text())
    assert config.pop("torch_dtype") == "float32"
    assert config.items() <= json.loads((Path(run.setup.base) / "config.json").read_text()).items()
    loaded = Transformer.from_pretrained("many", torch.float32)
    assert torch.equal(loaded.head_weight, whole["model.embed_tokens.weight"])
    assert Chat.from_dir("many").stops == run.chat.stops


def test_merged_keeps_one_shard_beside_the_model(strong, here, monkeypatch):
    """Tensors are made when their shard is written, not before."""
    events, make, save = [], merged_tensors, save_file

    def made(model, gate):
        for name, tensor in make(model, gate):
            events.append("make")
            yield name, tensor

    monkeypatch.setattr(export_module, "merged_tensors", made)
    monkeypatch.setattr(export_module, "save_file", lambda state, *a, **k: events.append(len(state)) or save(
        state, *a, **k))
    evaluation.main(f"export --run {strong} --as merged --persona A+ --out many --shard-gb 0.001".split())
    shards = [event for event in events if event != "make"]
    assert len(shards) > 1 and events == [event for n in shards for event in ["make"] * n + [n]]


def test_merged_is_rounded_once_to_the_dtype_asked_for(strong, here, capsys):
    """fp32 experts are added to the weights in that dtype; without --dtype, in the dtype of the base's own file."""
    export = f"export --run {strong} --as merged --persona A+"
    output_of(capsys, f"{export} --out b --dtype bfloat16")
    run = opened(strong, dtype="bfloat16")
    wanted = dict(merged_tensors(run.model, persona_gate("A+", 1.0)))
    state = load_file("b/model.safetensors")
    assert all(t.dtype == torch.bfloat16 and torch.equal(t, wanted[n]) for n, t in state.items())
    assert json.loads(Path("b/config.json").read_text())["torch_dtype"] == "bfloat16"
    rewrite(Path(run.setup.base) / "model.safetensors", lambda name, t: t.half())
    accept_models(strong)
    output_of(capsys, f"{export} --out h")
    assert {t.dtype for t in load_file("h/model.safetensors").values()} == {torch.float16}
    assert json.loads(Path("h/config.json").read_text())["torch_dtype"] == "float16"


@pytest.mark.parametrize("dtype, keys", [
    (torch.bfloat16, ()), (torch.float64, ("dtype",)), (torch.float32, ("dtype", "torch_dtype")), (None, ("torch_dtype",))])
def test_merged_keeps_the_dtype_of_each_tensor_and_no_key_contradicts_it(strong, here, capsys, dtype, keys):
    """None: the norms are fp32, the rest fp16. keys: those of config.json that say bfloat16, right or wrong."""
    base = Path(opened(strong).setup.base)
    rewrite(base / "model.safetensors", lambda name, t: t.to(dtype or (torch.float16 if t.dim() > 1 else t.dtype)))
    config = json.loads((base / "config.json").read_text())
    config.pop("torch_dtype", None), config.pop("dtype", None)
    (base / "config.json").write_text(json.dumps(config | dict.fromkeys(keys, "bfloat16")))
    accept_models(strong)
    output_of(capsys, f"export --run {strong} --as merged --persona A+ --out out")
    before, after = (load_file(folder / "model.safetensors") for folder in (base, Path("out")))
    assert {n: t.dtype for n, t in after.items()} == {n: before[n].dtype for n in after}
    model = opened(strong).setup.load_base(strong / "joint/experts").double()
    for name, exact in merged_tensors(model, persona_gate("A+", 1.0)):
        exact = exact + before[name].double() - model.state_dict()[name]  # the last two differ by what loading rounds
        error = (after[name].double() - exact).abs().max()
        assert error <= torch.finfo(after[name].dtype).eps * exact.abs().max() + 1e-6  # sums of the update are fp32
        assert "proj" in name or torch.equal(after[name], before[name])
    said = json.loads(Path("out/config.json").read_text())
    assert {said[key] for key in ("dtype", "torch_dtype") if key in said} == {str(dtype or torch.float16)[6:]}


def test_an_adapter_names_its_base_and_its_alpha_so_that_others_find_and_read_them(strong, here, capsys):
    """The base by a path that holds in every folder; alpha as an integer, where it is whole."""
    base = Path(shutil.copytree(strong / "models" / "base", "base")).absolute()
    for words in ("--as experts --out new/e", "--as mixture --persona O+ --out new/m"):
        output_of(capsys, f"export --run {strong} --base base {words}")
    for file, alpha in (("new/e/low_openness", 16), ("new/m", 160)):
        text = Path(file, "adapter_config.json").read_text()
        assert json.loads(text)["base_model_name_or_path"] == str(base) and f'"lora_alpha": {alpha},' in text


@pytest.mark.parametrize("argv, why", [
    (["--out", "x", "--persona", "O+"], "--as experts takes no gate; found --persona"),
    (["--out", "x", "--as", "mixture"], "--as mixture takes one gate, by --gate, --persona or --query; found none"),
    (["--out", "x", "--as", "merged", "--persona", "O+", "--query", "Hi"], "found --persona and --query"),
    (["--out", "x", "--as", "merged", "--persona", "O+", "--int8"], "in 8 bits: --no-int8 merges from the full weights"),
    (["--out", "x", "--user", "u.json"], "--user shifts the router's gate for a query: give --query too"),
    (["--as", "merged", "--persona", "O+"], "--out is missing"), (["--out", "there"], "there exists already"),
    (["--out", "x", "--as", "merged", "--query", " "], "an empty query"), (["--as", "gguf"], "invalid choice")])
def test_an_export_that_cannot_be_is_refused_and_nothing_is_written(run_folder, here, argv, why):
    (here / "there").mkdir()
    with pytest.raises(UserError, match=re.escape(why)):
        evaluation.main(["export", "--run", str(run_folder), *argv])
    assert [*here.iterdir()] == [here / "there"] and not [*Path("there").iterdir()]


def test_experts_that_peft_wrote_and_a_router_of_another_run_are_taken(strong, run_folder, here, capsys):
    """With experts saved by peft itself the reply is the same; with the router of an earlier stage the gate is that
    router's."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    base, experts = transformers.AutoModelForCausalLM.from_pretrained(opened(strong).setup.base), "joint/experts"
    theirs = peft.PeftModel.from_pretrained(base, strong / experts / EXPERTS[0], adapter_name=EXPERTS[0])
    for expert in EXPERTS[1:]:
        theirs.load_adapter(strong / experts / expert, adapter_name=expert)
    theirs.save_pretrained("elsewhere")

    def asked(run, options=""):
        command = f"ask --run {run} --max-new-tokens 9 --json {options}"
        return json.loads(output_of(capsys, command, "My boss is furious."))
    wanted = asked(strong)
    shutil.rmtree(strong / "joint" / "experts")
    found = asked(strong, "--experts elsewhere")
    assert found["reply"] == wanted["reply"] != found["base"]
    found = asked(run_folder, f"--router {run_folder / 'router' / 'router'}")
    assert found["gate"] == asked(run_folder, "--stage warmup")["gate"] != wanted["gate"]
    shutil.rmtree(Path("elsewhere") / EXPERTS[3])
    with pytest.raises(UserError, match=EXPERTS[3]):
        asked(strong, "--experts elsewhere")


@pytest.mark.slow
def test_a_merged_bf16_export_keeps_the_greedy_reply_of_real_weights(weights):
    """Up to a token whose rival is as close as the rounding of the weights to bf16 changes the logits."""
    folder, gate = weights / "SmolLM2-135M-Instruct", persona_gate("A+,N-", 0.5)[None]
    model, chat = Transformer.from_pretrained(folder, torch.bfloat16), Chat.from_dir(folder)
    add_experts(model)
    torch.manual_seed(0)
    for layer in expert_layers(model).values():
        torch.nn.init.normal_(layer.B, std=0.005)
    exact, rounded = (Transformer.from_pretrained(folder, torch.float32) for _ in range(2))
    rounded.load_state_dict({n: t.float() for n, t in merged_tensors(model, gate)})
    exact.load_state_dict(dict(merged_tensors(model.float(), gate)))
    prompts = [chat.prompt([{"role": "user", "content": r["query"]}]) for r in template_records("test", 8)]
    same = 0
    for prompt, a, b in zip(prompts, *(generate(m, prompts, None, 24) for m in (exact, rounded))):
        at = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), None)
        same += at is None
        if at is not None:
            with torch.no_grad():
                one, two = (m(torch.tensor([prompt + a[:at]]))[0, -1] for m in (exact, rounded))
            assert one[a[at]] - one[b[at]] <= 2 * (one - two).abs().max() <= 1
    assert same >= 2
