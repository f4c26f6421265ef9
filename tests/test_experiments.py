"""Laws of experiments, plots and the inventory, on the small run of test_commands.py."""
import csv
import functools
import json
import re
import shutil
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import eval as evaluation
import train
from support import experiments
from support import inventory
from lora import SHORT_NAMES, TRAITS, add_experts, expert_layers, merged_tensors
from model import Config, Transformer
from router import active_experts, persona_gate, softmax_gate
from support.baselines import reply_states, steered
from support.experiments import compared, variant, without_cues
from support.files import UserError
from support.inventory import ratings, read_items
from support.measure import LoadedRun, bootstrap, load_split, losses, one_hot_gate, update_gram
from support.records import SPLITS, read_records, write_records
from support.tables import print_table
from support.rows import Row
from synth import signatures, template_records
from test_commands import RUN, copy, here, reduced, run_folder, undone  # noqa: F401 (fixtures)


def shown(capsys, command):
    """(exit status, what is printed) of a command of eval.py."""
    capsys.readouterr()
    status = evaluation.main(command.split())
    return status, capsys.readouterr().out


def asked(run, **changes):
    return experiments.Experiment(names=["routing"], run=str(run), **changes)


def stages_of(run):
    return json.loads((run / "config.json").read_text())["stages"]


def per_token(nats, split):
    return nats.sum() / split.counts.sum()


def small_model(n_experts=3, rank=2, alpha=6):
    torch.manual_seed(0)
    model = Transformer(Config(60, 16, 2, 2, 1, 8, 24, 1e-5, 1e4)).double()
    add_experts(model, n_experts, rank, alpha)
    for layer in expert_layers(model).values():
        layer.A.data, layer.B.data = torch.randn_like(layer.A).double(), torch.randn_like(layer.B).double() / 10
    return model


# ----------------------------------------------------------------------------------------------------------------------
# Arithmetic

def test_inner_products_of_updates_are_those_of_the_dense_updates():
    model = small_model()
    frozen = {name: layer.weight for name, layer in expert_layers(model).items()}

    def dense(gate):
        state = dict(merged_tensors(model, gate))
        return torch.cat([(state[f"{name}.weight"] - weight).flatten() for name, weight in frozen.items()])
    each, gram = [dense(gate) for gate in torch.eye(3, dtype=torch.double)], update_gram(model)
    assert torch.allclose(gram, torch.stack([torch.stack([a @ b for b in each]) for a in each]), rtol=1e-9)
    gate = torch.tensor([0.2, 0.7, 0.1], dtype=torch.double)
    assert torch.allclose((gate @ gram @ gate).sqrt(), dense(gate).norm(), rtol=1e-9)


def test_experts_under_a_uniform_gate_are_one_lora_of_all_their_ranks_in_training_too():
    """Three experts of rank 2 with three times the α and a weight of a third each, against one of rank 6: the numbers
    are the same after ten steps of clipped AdamW, in fp64."""
    many, one = small_model(3, 2, alpha=3 * 4), small_model(1, 6, alpha=12)
    for ours, theirs in zip(expert_layers(many).values(), expert_layers(one).values()):
        theirs.A.data, theirs.B.data = (x.data.flatten(0, 1)[None].clone() for x in (ours.A, ours.B))
    rows = [Row(str(i), None, np.arange(3 + i, 12 + 2 * i), 2) for i in range(4)]
    found = []
    for model, gate in ((many, torch.full((4, 3), 1 / 3, dtype=torch.double)), (one, torch.ones(4, 1))):
        tensors = [x for layer in expert_layers(model).values() for x in (layer.A, layer.B)]
        optimizer = torch.optim.AdamW(tensors, lr=1e-2, weight_decay=0)
        for _ in range(10):
            optimizer.zero_grad()
            train.row_losses(model, rows, gate.double()).sum().backward()
            torch.nn.utils.clip_grad_norm_(tensors, 1.0)
            optimizer.step()
        found.append(torch.cat([x.detach().flatten() for x in tensors]))
    untrained = torch.cat([x.flatten() for layer in expert_layers(small_model(3, 2)).values()
                           for x in (layer.A, layer.B)])
    assert torch.allclose(*found, rtol=1e-7, atol=1e-9) and not torch.allclose(found[1], untrained)


def test_comparisons_average_over_seeds_and_draw_over_records():
    rng, split = np.random.default_rng(0), SimpleNamespace(counts=np.array([2.0, 5.0, 3.0, 10.0]))
    a, b = ([rng.normal(size=4) for _ in range(3)] for _ in range(2))
    part = np.array([0, 2, 3])
    (first, mean_and_std, against), (second, _, nothing) = compared({"a": a, "b": b}, split, "b", part, seed=4)
    assert (first, second, nothing) == ("a", "b", "")
    per_seed = [nats[part].sum() / 15 for nats in a]
    assert np.allclose(mean_and_std, [np.mean(per_seed), np.std(per_seed)])
    assert np.allclose(against, bootstrap((sum(a) - sum(b))[part] / 3, split.counts[part], 4))


def test_tables_are_laid_out_within_80_columns(capsys):
    print_table(["what", "n", "x", "mean", "against"], [
        ["first", 1234567, 0.5, [1.0, 0.25], [-0.5, -1.0, 0.0]], ["second one", 2, 10.0, "", ""]], title="word " * 30)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80 and "  first       1,234,567   0.500  1.000 ± 0.250  -0.5000 [-1.0000, +0.0000]" \
        in lines and lines[-1] == "  second one          2  10.000"


def test_reply_states_are_means_over_the_reply_alone():
    model = small_model().float()
    rows = [Row(str(i), None, np.arange(i + 1, i + 8 + 3 * i), 3 + i) for i in range(3)]
    states = reply_states(model, rows)
    assert states.shape == (3, 2, 16)
    for row, state in zip(rows, states):
        kept = []
        hook = model.model.layers[1].register_forward_hook(lambda block, given, out: kept.append(out))
        model.hidden(torch.tensor(row.ids)[None])
        hook.remove()
        assert torch.allclose(state[1], kept[0][0, row.n_prompt:].mean(0), atol=1e-5)
    assert not any(block._forward_hooks for block in model.model.layers)


def test_steering_adds_the_gates_vectors_after_one_block_and_leaves_no_trace():
    model = small_model().float()
    for layer in expert_layers(model).values():
        layer.B.data.zero_()
    ids, gate, vectors = torch.arange(14).view(2, 7), torch.tensor([[1., 0, 0], [0.2, 0.3, 0.5]]), torch.randn(3, 16)
    plain, seen = model.hidden(ids), []
    hook = model.model.layers[1].register_forward_hook(lambda block, given, out: seen.append((given[0], out)))
    with steered(model, 0, vectors):
        moved = model.hidden(ids, gate)
    before, _ = seen[-1]
    model.hidden(ids)
    hook.remove()
    assert torch.allclose(before - seen[-1][0], (gate @ vectors)[:, None].expand(-1, 7, -1), atol=1e-5)
    assert not torch.allclose(moved, plain) and torch.equal(model.hidden(ids, gate), plain)
    positions = torch.tensor([9, 3, 13])  # a loss asks for some positions only
    for layer in (0, 1):
        for some in (gate, gate[1:]):
            with steered(model, layer, vectors):
                every, found = model.hidden(ids, some), model.hidden(ids, some, positions=positions)
            assert torch.allclose(found, every.flatten(0, 1)[positions], atol=1e-5)


# ----------------------------------------------------------------------------------------------------------------------
# Variants

def test_a_variant_trains_what_is_asked_and_links_to_the_rest(run_folder, here, monkeypatch):  # noqa: F811
    """Its settings are the source's except for the changes. The source keeps every byte. A second start trains nothing;
    a variant that was cut off goes on, also when the run has been moved."""
    source, changes = copy(run_folder, here), {"tau": 0.5, "lr": 1e-3}
    before = {file: file.read_bytes() for file in source.rglob("*") if file.is_file()}
    folder = variant(asked(source), source, "x/y", ["joint"], **changes)
    assert folder == source / "experiments" / "x" / "y"
    was = stages_of(source)
    assert stages_of(folder) == was | {"joint": was["joint"] | changes | {"log_every": 2**30}}
    links = [path for path in folder.iterdir() if path.is_symlink()]
    assert {path.name for path in links} == {"models", "data", "warmup", "router"}
    assert not any(path.readlink().is_absolute() for path in links)
    assert {file: file.read_bytes() for file in before} == before
    experts = "joint/experts/low_openness/adapter_model.safetensors"
    trained = load_file(folder / experts)
    assert not all(torch.equal(t, load_file(source / experts)[n]) for n, t in trained.items())
    with monkeypatch.context() as patch:
        patch.setattr(train, "train_stage", None)
        assert variant(asked(source), source, "x/y", ["joint"], **changes) == folder
    moved = shutil.move(source, here / "elsewhere")
    shutil.rmtree(moved / "experiments" / "x" / "y" / "joint")
    again = variant(asked("elsewhere"), Path("elsewhere"), "x/y", ["joint"], **changes)
    assert all(torch.equal(t, trained[n]) for n, t in load_file(again / experts).items())


def test_nothing_is_trained_where_nothing_differs(run_folder, here, monkeypatch):  # noqa: F811
    source = copy(run_folder, here)
    monkeypatch.setattr(train, "main", None)
    assert variant(asked(source), source, "same", ["joint"], tau=1.0, lam=0.1) == source
    with pytest.raises(TypeError):
        variant(asked(source), source, "untrained", ["joint"], untrained=["warmup"])


def test_untrained_stages_stay_as_they_are_initialised(run_folder, here):  # noqa: F811
    source = copy(run_folder, here)
    folder = variant(asked(source), source, "x", ["joint"], untrained=["warmup", "router"])
    B = load_file(folder / "warmup/experts/high_openness/adapter_model.safetensors")
    assert all(tensor.abs().max() == 0 for name, tensor in B.items() if "lora_B" in name)
    first = LoadedRun(asked(source)).setup.load_router().expert_embeddings
    assert torch.equal(load_file(folder / "router/router/model.safetensors")["expert_embeddings"], first.data)
    assert not (folder / "warmup").is_symlink() and not (folder / "router").is_symlink()
    assert any(t.abs().max() > 0 for n, t in load_file(
        folder / "joint/experts/high_openness/adapter_model.safetensors").items() if "lora_B" in n)


def test_a_variant_finds_models_that_have_moved(run_folder, here):  # noqa: F811
    """--base and --encoder say where they are now, also to a variant that was made before."""
    source = copy(run_folder, here)
    folder = variant(asked(source), source, "x", ["joint"], tau=0.5)
    trained = load_file(folder / "joint/experts/high_openness/adapter_model.safetensors")
    shutil.rmtree(folder / "joint")
    moved = {role: str(shutil.move(source / "models" / role, here / f"moved-{role}")) for role in ("base", "encoder")}
    for name in ("x", "y"):
        again = variant(asked(source, **moved), source, name, ["joint"], tau=0.5)
        tensors = load_file(again / "joint/experts/high_openness/adapter_model.safetensors")
        assert all(torch.equal(t, trained[n]) for n, t in tensors.items())
        setup = json.loads((again / "config.json").read_text())["setup"]
        assert {role: setup[role] for role in moved} == moved


@pytest.mark.parametrize("given, dtype", [(None, "bfloat16"), ("float32", "float32")])
def test_a_variant_has_the_dtype_of_its_source_unless_another_is_given(run_folder, here, given, dtype):  # noqa: F811
    source = copy(run_folder, here)
    config = json.loads((source / "config.json").read_text())
    config["stages"]["joint"]["dtype"] = "bfloat16"
    (source / "config.json").write_text(json.dumps(config))
    folder = variant(asked(source, dtype=given), source, "x", ["joint"], tau=0.5)
    assert stages_of(folder)["joint"]["dtype"] == dtype


@pytest.mark.parametrize("trained, given", [(True, None), (True, False), (False, True)])
def test_a_variant_is_in_8_bits_if_its_source_is_however_it_is_measured(
        run_folder, here, monkeypatch, trained, given):  # noqa: F811
    source, dtypes = copy(run_folder, here), set()
    config = json.loads((source / "config.json").read_text())
    config["setup"]["int8"] = trained
    (source / "config.json").write_text(json.dumps(config))
    step = train.Stage.step
    monkeypatch.setattr(train.Stage, "step", lambda self, *a: dtypes.update(
        layer.weight.dtype for layer in expert_layers(self.model).values()) or step(self, *a))
    folder = variant(asked(source, int8=given), source, "x", ["joint"], tau=0.5)
    assert dtypes == {torch.int8 if trained else torch.float32}
    assert json.loads((folder / "config.json").read_text())["setup"]["int8"] is trained


def test_results_in_8_bits_are_not_taken_for_those_of_the_full_weights(run_folder, here, monkeypatch):  # noqa: F811
    source, measured = copy(run_folder, here), []

    def measure(args, run):
        """Nothing."""
        measured.append(bool(run.setup.int8))
        return []
    monkeypatch.setitem(experiments.EXPERIMENTS, "routing", measure)
    for int8 in (None, None, True, True, None):
        experiments.experiment(asked(source, int8=int8))
    assert measured == [False, True, False]


def test_a_variant_of_stages_that_have_changed_is_refused(run_folder, here):  # noqa: F811
    source = copy(run_folder, here)
    variant(asked(source), source, "x", ["joint"], tau=0.5)
    config = json.loads((source / "config.json").read_text())
    config["stages"]["warmup"]["steps"] += 1
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="experiments/x was made from other stages .* remove it"):
        variant(asked(source), source, "x", ["joint"], tau=0.5)


def test_other_seeds_are_other_runs_on_the_same_records(run_folder, here):  # noqa: F811
    """A single data file would be split by the seed, so the variant gets the split records."""
    source = copy(run_folder, here)
    seeds, folders = zip(*experiments.seeded(asked(source, seeds=2)))
    assert seeds == (0, 1) and folders == (source, source / "experiments" / "seed-1")
    for split in SPLITS:
        ours, theirs = (read_records(folder / f"{split}.jsonl") for folder in (folders[1] / "records", source / "data"))
        assert ours == theirs
    setup = LoadedRun(asked(folders[1])).setup
    assert setup.seed == 1 and setup.base.endswith("models/base")
    for stage, file in (("warmup", "experts/high_openness/adapter_model"), ("router", "router/model")):
        ours, theirs = (load_file(folder / stage / f"{file}.safetensors") for folder in folders)
        assert not any(torch.equal(t, theirs[n]) for n, t in ours.items() if "lora_A" in n or "expert_emb" in n)


def test_a_variant_that_is_stopped_ends_the_experiment(run_folder, here, monkeypatch):  # noqa: F811
    source = copy(run_folder, here)
    monkeypatch.setattr(train, "main", lambda argv, show_results: 130)
    with pytest.raises(KeyboardInterrupt):
        variant(asked(source), source, "x", ["joint"], tau=0.5)


# ----------------------------------------------------------------------------------------------------------------------
# Experiments

@pytest.mark.slow
def test_routing_compares_every_gate_before_and_after_joint(run_folder, here, capsys, monkeypatch):  # noqa: F811
    source = copy(run_folder, here).relative_to(here)
    command = f"experiment routing --run {source} --seeds 1 --records 12"
    status, out = shown(capsys, command)
    assert status is None and max(map(len, out.splitlines())) <= 80
    tables = experiments.read_results(source / "experiments/routing/results.json")["tables"]
    title = re.compile(r"Experts after (\w+), tau 1; (\d+) test records, (.*): loss")
    titles = [title.match(table["title"]).groups() for table in tables]
    subsets = "all", "domains seen in training", "domains held out"
    assert [(stage, name) for stage, _, name in titles] == [(stage, name) for stage in ("warmup", "joint")
                                                            for name in subsets]
    assert int(titles[0][1]) == 12 == int(titles[1][1]) + int(titles[2][1])
    control = LoadedRun(asked(source / "experiments/routing/control-0", stage="joint"))
    assert stages_of(control.setup.run)["joint"]["joint_gate"] == "uniform"
    for stage, table in (("warmup", tables[0]), ("joint", tables[3])):
        rows, m = {row[0]: row for row in table["rows"]}, LoadedRun(asked(source, stage=stage))
        assert list(rows) == ["base", "uniform", "shuffled", "learned", "oracle", "labels", "random", "best single"] \
            + ["control"] * (stage == "joint")
        tests, validation = load_split(m, limit=12), load_split(m, "validation", 12)

        def alone(split, e):
            return train.evaluation_loss(m.model, split.rows, one_hot_gate(e).expand(12, -1))[0]
        nats = losses(m, tests, ["learned", "oracle"])
        nats["best single"] = alone(tests, min(range(10), key=lambda e: alone(validation, e).sum()))
        if stage == "joint":
            nats["control"] = losses(control, load_split(control, limit=12), ["uniform"])["uniform"]
        for name, one in nats.items():
            assert np.allclose(rows[name][1], [per_token(one, tests), 0], atol=1e-6)
        assert np.allclose(rows["oracle"][2], bootstrap(nats["oracle"] - nats["learned"], tests.counts), atol=1e-6)
    monkeypatch.setattr(experiments, "losses", None)
    assert shown(capsys, command)[1] in out  # what was measured is printed again; anything else is measured
    for more in ("--records 11", "--again", "--seed 3"):
        with pytest.raises(TypeError):
            shown(capsys, f"{command} {more}")
    with pytest.raises(UserError, match="dtype was 'float32' and is now 'bfloat16'"):
        shown(capsys, f"{command} --dtype bfloat16")


@pytest.mark.slow
@pytest.mark.parametrize("name", experiments.EXPERIMENTS)
def test_every_experiment_runs_and_fits_80_columns(name, run_folder, here, capsys, monkeypatch):  # noqa: F811
    source = copy(run_folder, here).relative_to(here)
    status, out = shown(capsys, f"experiment {name} --run {source} --seeds 2 --records 20")
    numbers = [x for table in experiments.read_results(source / "experiments" / name / "results.json")["tables"]
               for row in table["rows"] for cell in row[1:]
               for x in (cell if isinstance(cell, list) else [cell]) if isinstance(x, float)]
    assert status is None and numbers and np.isfinite(numbers).all() and "nan" not in out
    tables = out[out.index(f"\n{name}: "):]
    wide = [line for line in tables.splitlines() if len(line) > 80]
    assert not wide or name == "domain"  # one column per domain, whatever its name
    if name == "rank":  # its speed is the median of what the variants' steps logged
        logs = [(source / f"experiments/rank/rank-8-seed-{seed}/log.jsonl").read_text() for seed in (0, 1)]
        speeds = [json.loads(line)["tokens_per_s"] for log in logs for line in log.splitlines()]
        assert f"{np.median(speeds):,.0f}" in tables
    before = {file: file.stat().st_mtime_ns for file in source.rglob("*.safetensors")}
    again = shown(capsys, f"experiment {name} --run {source} --seeds 2 --records 20 --again")[1]
    again = again[again.index(f"\n{name}: "):]
    assert again.split("\n\n")[1:-1] == tables.split("\n\n")[1:-1]
    assert {file: file.stat().st_mtime_ns for file in source.rglob("*.safetensors")} == before


@pytest.mark.slow
def test_the_temperature_sweep_measures_what_it_says(run_folder, here, capsys, monkeypatch):  # noqa: F811
    """One row of each table is computed again. The τ that is best on validation is the one reported on test."""
    source = copy(run_folder, here)
    monkeypatch.setattr(experiments, "TAUS", (1.0, 0.1))
    shown(capsys, f"experiment temperature --run {source} --seeds 1 --records 14")
    *sweeps, poles, chosen = experiments.read_results(source / "experiments/temperature/results.json")["tables"]
    folders = [source, *(source / f"experiments/temperature/tau-0.1-steps-{n}-seed-0" for n in (3, 9))]
    assert [(s["steps"], s["tau"]) for s in (stages_of(f)["joint"] for f in folders[1:])] == [(3, 0.1), (9, 0.1)]
    first = update_gram(LoadedRun(asked(source, stage="warmup")).model).diagonal().sqrt().mean()
    for table, folder, stage in zip(sweeps, folders, ("warmup", "joint", "joint")):
        m = LoadedRun(asked(folder, stage=stage, tau=0.1))
        tests, validation = load_split(m, limit=14), load_split(m, "validation", 14)
        gates = (train.score_queries(m.router, tests.rows) / 0.1).softmax(-1).double()
        gram = update_gram(m.model)
        size = gram.diagonal().sqrt()
        cosines = gram / size.clamp(min=1e-15).outer(size.clamp(min=1e-15))
        opposite = np.mean([cosines[2 * t, 2 * t + 1] for t in range(5)])
        nats = losses(m, tests, ["learned"])["learned"]
        wanted = {"entropy": -(gates * gates.log()).sum(-1).mean(), "top-1": gates.max(-1).values.mean(),
                  "norm": np.mean([(w @ gram @ w).sqrt() / size.mean() for w in gates]), "grown": size.mean() / first,
                  "cos opp": opposite, "cos oth": (cosines.sum() - cosines.trace() - 10 * opposite) / 80,
                  "valid.": per_token(losses(m, validation, ["learned"])["learned"], validation)}
        row = dict(zip(table["head"], table["rows"][1]))
        assert row["tau"] == "0.1" and row["test"][0] == pytest.approx(per_token(nats, tests), abs=1e-5)
        for name, value in wanted.items():
            assert row[name] == pytest.approx(float(value), abs=1e-4 if name == "entropy" else 1e-5), name

        alone = tests.active.sum(-1) == 1
        rows, which = [r for r, one in zip(tests.rows, alone) if one], tests.active[alone].argmax(-1)
        single, persona = (train.evaluation_loss(m.model, rows, g)[0].sum() for g in (
            torch.eye(10)[which], torch.stack([persona_gate(SHORT_NAMES[e], 0.1) for e in which])))
        when = table["title"].split(":")[0].lower()
        found = next(r for r in poles["rows"] if r[:2] == [when, "0.1"])
        assert np.allclose(found[2:], np.array([nats[alone].sum(), single, persona])
                           / tests.counts[alone.numpy()].sum(), atol=1e-5)
        best = min(table["rows"], key=lambda row: row[table["head"].index("valid.")])
        reported = [r for r in chosen["rows"] if r[0].startswith(when)]
        assert reported[0][0] == f"{when}, tau 1" and reported[-1][:2] == [f"{when}, tau {best[0]}", best[-1]]


def test_a_sweep_without_records_of_one_pole_says_so(run_folder, here, capsys, monkeypatch):  # noqa: F811
    source = copy(run_folder, here)
    file = source / "data" / "test.jsonl"
    write_records(file, [record | {"traits": {"openness": 1, "neuroticism": -1}} for record in read_records(file)])
    monkeypatch.setattr(experiments, "TAUS", (1.0,))
    monkeypatch.setattr(experiments, "variant", lambda args, source, *rest, **changes: source)
    args = asked(source, seeds=1, records=6)
    *sweeps, poles, chosen = experiments.temperature_tables(args, LoadedRun(args))
    assert "No test record has exactly one active pole" in poles["title"] and poles["rows"] == []
    numbers = [x for table in sweeps for row in table["rows"] for x in row[1:-1]]
    assert np.isfinite(numbers).all() and len(chosen["rows"]) == 3


def test_gates_of_chance_depend_on_the_seed(run_folder, monkeypatch):  # noqa: F811
    """Every experiment hands --seed to the shuffled and random gates."""
    seeds = []
    monkeypatch.setattr(experiments, "losses", lambda run, split, rules, tau=None, seed=0: seeds.append(seed) or {
        rule: np.ones(len(split.rows)) for rule in rules})
    monkeypatch.setattr(experiments, "variant", lambda args, source, *rest, **changes: source)
    args = asked(run_folder, seeds=1, records=4, seed=7)
    monkeypatch.setattr(experiments, "evaluation_loss", lambda model, rows, *rest: (np.ones(len(rows)), None))
    experiments.routing_tables(args, LoadedRun(args))
    assert set(seeds) == {7, 8, 9}  # 8 and 9 are draws of the random gate
    seeds.clear()
    experiments.domain_tables(args, LoadedRun(args))
    experiments.stages_tables(args, LoadedRun(args))
    assert set(seeds) == {7}


def test_a_pair_differs_by_one_cue():
    """Of the template teacher's records, and of those in real language that data/pairs.jsonl rewrites."""
    records = template_records("test", 40)
    pairs, neutral = without_cues(records)
    assert len(pairs) == sum(sum(map(abs, r["traits"].values())) for r in records) and len(neutral) == 40
    for record, rest in zip(records, neutral):
        cues = [trait["cue"] for trait in record["cot"]["traits"].values()]
        mine = [pair for pair in pairs if pair["query"] == record["query"]]
        assert not any(cue in rest for cue in cues) and len(mine) == len(cues)
        for pair in mine:
            left, shorter = [cue in pair["without"] for cue in cues], len(pair["query"]) - len(pair["without"])
            assert left.count(False) == 1 and shorter == len(cues[left.index(False)]) + 1
            assert active_experts(record["traits"]).nonzero()[:, 0].tolist() == sorted([pair["removed"], *pair["kept"]])
            cue_of_removed = record["cot"]["traits"][TRAITS[pair["removed"] // 2]]["cue"]
            assert cue_of_removed not in pair["without"]
    pairs, neutral = without_cues([{"query": "Real.", "traits": {"openness": 1}}])
    assert len(pairs) == 120 and Counter(pair["removed"] for pair in pairs) == dict.fromkeys(range(10), 12)
    assert len(neutral) == 40 and all(pair["query"] != pair["without"] for pair in pairs)


def test_cues_compares_each_pair(run_folder):  # noqa: F811
    args = asked(run_folder, records=12)
    run = LoadedRun(args)
    *of_pairs, by_poles, worth = experiments.cues_tables(args, run)
    expected, split = without_cues(run.records(limit=12)[0])[0], load_split(run, limit=12)
    cosines = [train.score_queries(run.router, run.rows([{"id": 0, "query": pair[key], "traits": {}}
                                                         for pair in expected])) for key in ("query", "without")]
    assert [table["head"][2] for table in of_pairs] == ["similarity", "weight"]
    for table, measured in zip(of_pairs, (cosines, [x.softmax(-1) for x in cosines])):
        rows = {row[0]: row[1:] for row in table["rows"]}
        assert sum(rows.get(f"removed: {name}", [0])[0] for name in SHORT_NAMES) == len(expected)
        for name, (n, mean, change) in rows.items():
            looked_at = [(i, pole) for i, pair in enumerate(expected) for pole in (
                pair["kept"] if name == "the poles kept" else [pair["removed"]])
                if name in ("the poles kept", "removed, others kept" if pair["kept"] else "removed, none kept",
                            f"removed: {SHORT_NAMES[pole]}")]
            before, after = (np.array([x[i, pole] for i, pole in looked_at]) for x in measured)
            assert n == len(looked_at) and mean == pytest.approx(before.mean(), abs=1e-6)
            assert np.allclose(change, bootstrap(after - before, np.ones(n)), atol=1e-6)
    nats, n_poles = losses(run, split, ["learned", "uniform"]), split.active.sum(-1).int().numpy()
    assert [row[1] for row in by_poles["rows"]] == [12, *(int((n_poles == n).sum()) for n in sorted({*n_poles}))]
    rows = {(row[0], row[2]): row for row in worth["rows"]}
    assert len(rows) == 4 * len({*n_poles})
    for n in sorted({*n_poles}):
        part = n_poles == n
        assert rows[str(n), "learned"][3][0] == pytest.approx(nats["learned"][part].sum() / split.counts[part].sum())
        assert np.allclose(rows[str(n), "uniform"][4], bootstrap((nats["uniform"] - nats["learned"])[part],
                                                                 split.counts[part]), atol=1e-5)


def test_conversations_are_of_one_domain_or_of_six_and_use_no_message_twice():
    records = [{"domain": name} for name, n in zip("ABCDEFGH", (13, 12, 9, 6, 6, 5, 1, 20)) for _ in range(n)]
    one, six = (experiments.conversations(records, across, 0) for across in (False, True))
    for numbers, n_domains in ((one, 1), (six, 6)):
        assert all(len({records[i]["domain"] for i in of}) == n_domains for of in numbers)
        assert len({*numbers.flat}) == numbers.size and numbers.shape[1] == 6
    assert len(one) == 2 + 2 + 1 + 1 + 1 + 3 and len(six) >= 6
    assert not np.array_equal(six, experiments.conversations(records, True, 1))
    assert experiments.conversations(records[:5], False, 0).shape == (0, 6) == experiments.conversations(
        records[:5], True, 0).shape


def test_turns_routes_on_one_text_on_the_last_message_and_on_a_decaying_mean_as_chat_does(
        run_folder, monkeypatch):  # noqa: F811
    """Each conversation ends with a follow-up."""
    monkeypatch.setattr(experiments, "generate_replies", functools.partial(train.generate_replies, max_new_tokens=12))
    args = asked(run_folder, records=60)
    run = LoadedRun(args)
    records, numbers = run.records()[0], np.arange(12).reshape(2, 6)
    found = {name: experiments.route_conversations(run, records, numbers, name, True)
             for name in experiments.ROUTINGS}
    unsaid, nothing = experiments.route_conversations(run, records, numbers, "decaying", False)
    assert torch.allclose(unsaid, found["decaying"][0], atol=1e-4) and nothing is None  # it reads no replies

    def cosines(**record):
        return train.score_queries(run.router, run.rows([{"id": 0, "traits": {}} | record]))[0]
    for c, of in enumerate(numbers):
        queries = [*(records[i]["query"] for i in of), experiments.FOLLOW_UPS[c]]
        alone = torch.stack([cosines(query=query) for query in queries])
        chat = evaluation.Conversation(run, evaluation.Talk(run=str(run_folder), max_new_tokens=12))
        similarity, shown = found["decaying"]
        for turn, query in enumerate(queries):
            chat.reply(query)
            gate = torch.tensor(list(chat.turns[-1]["gate"].values()))
            assert torch.allclose((similarity[c, turn] / run.setup.tau).softmax(-1), gate, atol=1e-4)
            assert shown[c, turn].tolist() == signatures(chat.turns[-1]["response"])
        history = []
        for turn, query in enumerate(queries):
            assert torch.allclose(found["one text"][0][c, turn], cosines(query=query, history=history), atol=1e-4)
            gate = softmax_gate(found["one text"][0][c, turn], run.setup.tau)[None]
            said = train.generate_replies(run.model, run.chat, [{"query": query, "history": history}], gate, 12)[0]
            assert found["one text"][1][c, turn].tolist() == signatures(said)
            history += [{"role": "user", "content": query}, {"role": "assistant", "content": said}]
        weights = torch.tensor([0.5 ** k for k in range(7)])
        decaying = torch.stack([(weights[:t + 1].flip(0)[:, None] * alone[:t + 1]).sum(0) / weights[:t + 1].sum()
                                for t in range(7)])
        assert torch.allclose(found["last"][0][c], alone, atol=1e-4)
        assert torch.allclose(found["decaying"][0][c], decaying, atol=1e-4)


def test_turns_measures_what_it_says(run_folder, monkeypatch):  # noqa: F811
    """Replies show one pole; the routers know the poles of the last message, of the first, and of no other."""
    args = asked(run_folder, records=60)
    run = LoadedRun(args)
    active = torch.stack([active_experts(r["traits"]) for r in run.records(limit=60)[0]])

    def routed(run, records, numbers, routing, replies):
        labels = active[numbers]
        shown = torch.zeros(len(numbers), 7, 10)
        shown[..., 3] = 1
        last = torch.cat([labels, torch.zeros(len(numbers), 1, 10)], 1)  # nothing at the follow-up
        return (last if routing == "last" else labels[:, :1].expand(-1, 7, -1)), shown
    monkeypatch.setattr(experiments, "route_conversations", routed)
    for table, across in zip(experiments.turns_tables(args, run), (False, True)):
        numbers = experiments.conversations(run.records(limit=60)[0], across, 0)
        labels = active[numbers]
        rows = {tuple(row[:2]): row[2:] for row in table["rows"]}
        assert len(rows) == 3 * 8 and f"{len(numbers)} conversations" in table["title"]
        for turn in range(6):
            ap, moved, called, other, gain = rows["last", str(turn + 1)]
            assert ap == 1 and called == pytest.approx(labels[:, turn, 3].mean().item())
            assert other == pytest.approx(1 - called)
            gates = labels.softmax(-1)
            assert turn == 0 and moved == "" or moved == pytest.approx(torch.cosine_similarity(
                gates[:, turn], gates[:, turn - 1], dim=-1).mean().item())
            assert rows["one text", str(turn + 1)][4] == "" and not any(rows["decaying", str(turn + 1)][4])
            assert turn == 0 or rows["one text", str(turn + 1)][1] == pytest.approx(1)
            missed = 1 - experiments.message_precision(labels[:, 0].numpy(), labels[:, turn].numpy())
            assert np.allclose(gain, bootstrap(missed, np.ones(len(numbers))))
        assert rows["last", "2 to 6"][2] == pytest.approx(labels[:, 1:, 3].mean().item())
        assert rows["last", "2 to 6"][4][0] == pytest.approx(np.mean(
            [rows["last", str(turn)][4][0] for turn in range(2, 7)]))
        # the poles of the message before are called for at the follow-up, whose own text has none of them
        assert rows["last", "follow-up"][2] == pytest.approx(labels[:, 5, 3].mean().item())
        assert rows["last", "follow-up"][0] < rows["last", "6"][0] == 1


@pytest.mark.parametrize("argv, why", [
    ("experiment turns --run Z --records 4", "4 test records, expected 6 of one domain, or one of each of 6 domains"),
    ("experiment nonsense --run X", "no experiment 'nonsense', expected some of routing, temperature, rank, domain"),
    ("experiment routing --run X --stage joint", "leave out --stage, --experts and --router"),
    ("experiment routing --run X --experts E", "leave out --stage, --experts and --router"),
    ("experiment routing --run X", "X has no router stage yet: python train.py --preset tiny --stage router --run X"),
    ("experiment domain --run Y", "name 1 domains, expected three or more")])
def test_experiments_that_cannot_be_done_are_refused_in_one_line(run_folder, here, argv, why):  # noqa: F811
    shutil.move(copy(run_folder, here, ["router", "joint"]), here / "X")
    if "Z" in argv:
        shutil.move(copy(run_folder, here), here / "Z")
    if "Y" in argv and "domain" in argv:
        shutil.move(copy(run_folder, here), here / "Y")
        for split in ("train", "test"):
            file = here / "Y" / "data" / f"{split}.jsonl"
            write_records(file, [record | {"domain": "work"} for record in read_records(file)])
    with pytest.raises(UserError, match=why) as error:
        evaluation.main(argv.split())
    assert "\n" not in str(error.value)


# ----------------------------------------------------------------------------------------------------------------------
# Plots and results.json

TABLES = [{"title": "", "head": ["tau", "test"], "rows": [["1", [4.0, 0.1]]]}]


@pytest.fixture
def matplotlib():
    return pytest.importorskip("matplotlib", reason="plots need matplotlib, which is optional")


def measured(monkeypatch):
    """Run the temperature experiment with the tables above in place of hours of training. Returns its results.json."""
    monkeypatch.setitem(experiments.EXPERIMENTS, "temperature", lambda args, run: TABLES)
    evaluation.main(["experiment", "temperature", "--run", str(RUN)])
    return RUN / "experiments" / "temperature" / "results.json"


@pytest.mark.slow
def test_plots_are_pictures_of_what_is_there(run_folder, here, matplotlib, capsys, monkeypatch):  # noqa: F811
    run = copy(run_folder, here)
    with open(run / "log.jsonl", "ab") as log:
        log.write(b'{"stage": "joint", "step": 7, "lo')  # cut off, as by a full disk
    _, out = shown(capsys, f"plot --run {run} --records 8 --show 3")
    names = ["training", "gate", "heatmap", "experts"]
    assert [Path(line).stem for line in out.splitlines()] == names
    assert all((run / "plots" / f"{n}.png").read_bytes().startswith(b"\x89PNG") for n in names)


def test_experts_are_not_drawn_without_a_record_of_one_pole(run_folder, here, matplotlib, capsys):  # noqa: F811
    run = undone(run_folder, here, "router", "joint")
    file = run / "data" / "test.jsonl"
    write_records(file, [record | {"traits": {"openness": 1, "neuroticism": -1}} for record in read_records(file)])
    _, out = shown(capsys, f"plot --run {RUN} --records 4")
    assert "no test record calls for exactly one pole" in out and not (run / "plots" / "experts.png").exists()


LINE = {"step": 1, "stage": "joint", "loss": 2.0, "lr": 1e-3, "entropy": 1.0, "usage": [0.1] * 10}


@pytest.mark.parametrize("change", [
    {"loss": None}, {"loss": "x"}, {"loss": [1]}, {"lr": {}}, {"lr": 10**400}, {"usage": 5}, {"usage": [0.1] * 9},
    {"usage": [0.1] * 9 + ["x"]}, {"entropy": "high"}, {"loss": ...}, {"lr": ...}, {"usage": ...}, {"entropy": ...}])
def test_a_log_that_training_did_not_write_is_one_line(run_folder, here, matplotlib, change):  # noqa: F811
    run = copy(run_folder, here)
    odd = {k: v for k, v in (LINE | change).items() if v is not ...}
    (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in (LINE, LINE | {"step": 2}, odd)))
    with pytest.raises(UserError, match=r"runs/tiny/log.jsonl, line 3: not what training logs \(.*; without this line"
                       ) as error:
        evaluation.main(["plot", "--run", str(RUN)])
    assert "\n" not in str(error.value) and not (run / "plots").exists()


def test_a_run_without_a_step_has_nothing_to_draw(run_folder, here, matplotlib, capsys):  # noqa: F811
    run = undone(run_folder, here, "warmup", "router", "joint")
    for torn in ("", '{"step": 1, "st'):
        (run / "log.jsonl").write_text(torn)
        status, out = shown(capsys, f"plot --run {RUN}")
        assert not status and out == "runs/tiny/log.jsonl: no step is logged yet, so there are no curves to draw\n"


@pytest.mark.parametrize("change", [
    {"tables": 5}, {"tables": [TABLES[0] | {"head": []}]}, {"seconds": "x"}, {"settings": {}},
    {"sha256": 5}, {"tables": ...}, {"seconds": ...}, {"sha256": ...}])
def test_results_that_were_changed_are_refused(run_folder, here, monkeypatch, change):  # noqa: F811
    copy(run_folder, here)
    file = measured(monkeypatch)
    changed = json.loads(file.read_text()) | change
    file.write_text(json.dumps({k: v for k, v in changed.items() if v is not ...}))
    with pytest.raises(UserError, match="temperature/results.json: changed since .*--again") as error:
        evaluation.main(["experiment", "temperature", "--run", str(RUN)])
    assert "\n" not in str(error.value)
    evaluation.main(["experiment", "temperature", "--run", str(RUN), "--again"])
    assert experiments.read_results(file)["tables"] == TABLES


def test_without_matplotlib_a_plot_says_what_to_do(run_folder, monkeypatch):  # noqa: F811
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match="plot needs matplotlib, which is optional: pip install matplotlib"):
        evaluation.main(["plot", "--run", str(run_folder)])


# ----------------------------------------------------------------------------------------------------------------------
# The inventory

def test_our_inventory_is_balanced():
    items = read_items(inventory.OUR_ITEMS)
    assert len(items) == 60 and Counter((i["label_ocean"], i["key"]) for i in items) == {
        (letter, key): 6 for letter in "OCEAN" for key in ("1", "-1")}
    assert all(n == 2 for n in Counter((i["label_ocean"], i["label_raw"]) for i in items).values())
    assert len({i["text"] for i in items}) == 60 and all(i["text"][0].isupper() and i["text"][-1] != "." for i in items)


@pytest.mark.parametrize("text, why", [
    ("", "not a table"), ("label_raw,text,label_ocean,key\n", "no statements in it"),
    ('label_raw,text,label_ocean,key\nf,"Like,O,1\n', "not a table"),
    ("label_raw,text,label_ocean,key\nf,Like it,O,1\nf,,O,1\n", "row 3: found"),
    ("label_raw,text,label_ocean,key\nf,Like it,X,1\n", "row 2: found .*'X'.*O, C, E, A or N"),
    ("label_raw,text,label_ocean,key\nf,Like it,O,0\n", "row 2: .*key \\(1 or -1\\)"),
    ("a,b\n1,2\n", "0 columns named 'text'")])
def test_a_file_that_holds_no_statements_is_refused_with_its_row(here, text, why):  # noqa: F811
    (here / "items.csv").write_text(text)
    with pytest.raises(UserError, match=f"items.csv.*{why}") as error:
        read_items("items.csv")
    assert "\n" not in str(error.value)


def test_ratings_are_expected_values_of_the_five_letters_in_both_orders(run_folder):  # noqa: F811
    run, texts = LoadedRun(asked(run_folder, stage="warmup")), ["Like long walks.", "Keep quiet"]
    found = ratings(run, texts, one_hot_gate(3))
    for order, listed in enumerate((inventory.ANSWERS, inventory.ANSWERS[::-1])):
        for i, said in enumerate(("You like long walks.", "You keep quiet.")):
            answers = "".join(f"{letter}. {answer}\n" for letter, answer in zip("ABCDE", listed))
            query = f'How accurately does this statement describe you? "{said}"\n{answers}Answer with one letter.'
            nats = np.array([train.row_losses(run.model, [Row("", None, np.array(ids[:-1]), s.index(True))],
                                              one_hot_gate(3)).item() for ids, s in (
                run.chat.example([{"role": "user", "content": query}], letter) for letter in "ABCDE")])
            p = np.exp(-nats) / np.exp(-nats).sum()
            value = [5, 4, 3, 2, 1] if order == 0 else [1, 2, 3, 4, 5]
            assert abs(found[order, i] - p @ value) < 1e-4


def write_statements(folder, *lines):
    folder.mkdir()
    for trait in TRAITS:
        (folder / f"{trait}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_statements_are_answered_by_the_likelier_of_yes_and_no(run_folder, here, capsys, monkeypatch):  # noqa: F811
    """Experts that say what someone high, or low, in their trait would say; a base that always says Yes."""
    write_statements(here / "said", *({"question": f"{i}?", "answer_matching_behavior": " No" if i % 4 == 0 else " Yes"}
                                      for i in range(40)))

    def say(run, questions, words, gate):
        assert words == ["Yes", "No"]
        high = torch.tensor([int(q[:-1]) % 4 > 0 for q in questions])
        e = None if gate is None else int(gate.argmax())
        yes = torch.ones(len(questions)) if e is None else torch.where(high == (e % 2 == 0), 2.0, -2.0)
        return torch.stack((yes, torch.zeros(len(questions))), 1)
    monkeypatch.setattr(inventory, "first_token_logits", say)
    _, out = shown(capsys, f"inventory --run {run_folder} --items said --statements 20 --seed 3")
    drawn = np.random.default_rng(3).permutation(40)[:20]
    share = np.mean(drawn % 4 > 0)
    assert re.search(rf"base( +{share:.3f} \(\+1.0\)){{5}}$", out, re.M)
    assert re.search(r"O\+( +1.000 \([+-]\d.\d\)){5}$", out, re.M)
    assert re.search(r"O-( +0.000 \([+-]\d.\d\)){5}$", out, re.M)
    assert max(map(len, out.splitlines())) <= 80 and "holds 0.5: openness, consc" in " ".join(out.split())
    for name, value in (("high_openness", 1), ("low_openness", 0)):
        assert re.search(rf"  {name} +{share:.3f} +{value}.000 +[+-]{abs(value - share):.4f} \[", out)
    assert re.search(r"  high minus low openness +\+1.0000 \[\+1.0000, \+1.0000\]", out)


def test_the_first_tokens_logits_are_the_models(run_folder):  # noqa: F811
    run, gate = LoadedRun(asked(run_folder, stage="warmup")), one_hot_gate(3)
    questions = ["Would you say \"I am loud\"?", "And \"I count my steps\", would you?"]
    found = inventory.first_token_logits(run, questions, ["Yes", "No"], gate)
    for question, logits in zip(questions, found):
        ids = run.chat.prompt([{"role": "user", "content": question}])
        tokens = [run.chat.tokenizer.encode(word, add_special_tokens=False).ids[0] for word in ("Yes", "No")]
        assert torch.allclose(run.model(torch.tensor([ids]), gate)[0, -1, tokens], logits, atol=1e-4)


@pytest.mark.parametrize("line", [{"question": "A?"}, {"question": 3, "answer_matching_behavior": "Yes"}, [1],
                                  {"question": "A?", "answer_matching_behavior": "Maybe"}])
def test_a_folder_that_holds_no_statements_is_refused_with_its_line(run_folder, here, line):  # noqa: F811
    write_statements(here / "said", {"question": "A?", "answer_matching_behavior": "No"}, line)
    with pytest.raises(UserError, match="openness.jsonl, line 2: expected a question and an answer_matching_behavior"):
        evaluation.main(f"inventory --run {run_folder} --items said".split())
    (here / "said" / "openness.jsonl").unlink()
    with pytest.raises(UserError, match="openness.jsonl: No such file"):
        evaluation.main(f"inventory --run {run_folder} --items said".split())


def test_the_inventory_scores_what_is_agreed_to(run_folder, here, capsys, monkeypatch):  # noqa: F811
    """A model that always takes the first letter scores 3, with a gap of 4. Experts that agree with the positively
    keyed statements of their trait, and disagree with the others, differ on that trait alone."""
    with open(here / "items.csv", "w", newline="") as file:
        csv.writer(file).writerows([("label_raw", "text", "label_ocean", "key"), *(
            ("f", f"{t}{k}{i}", t, k) for t in "OCEAN" for k in (1, -1) for i in range(2))])

    def agree(run, texts, gate):
        if gate is None:
            return np.stack([np.full(len(texts), 5.0), np.full(len(texts), 1.0)])
        e = int(gate.argmax())
        signs = [(t[0] == "OCEAN"[e // 2]) * (1 if "-1" not in t else -1) * (1 - 2 * (e % 2)) for t in texts]
        return np.stack([[3 + sign * (1 + .1 * i) for i, sign in enumerate(signs)]] * 2)
    monkeypatch.setattr(inventory, "ratings", agree)
    _, out = shown(capsys, f"inventory --run {run_folder} --items items.csv")
    assert max(map(len, out.splitlines())) <= 80 and "20 statements, experts after warmup" in " ".join(out.split())
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines() if re.match(r"  \w+ +[\d+-]", line)}
    first = out.split("The same from")[0]
    assert re.search(r"base( +3.00±4.00){5}$", first, re.M) and re.search(r"base( +3.00/3.00){5}$", out, re.M)
    assert re.search(r"high_openness +4.05/4.25( +3.00/3.00){4}$", out, re.M)
    own = [1 + .1 * i for i in range(4)]
    assert re.search(rf"high_openness +{3 + np.mean(own):.2f}±0.00( +3.00±0.00){{4}}$", first, re.M)
    for t, trait in enumerate(("openness", "conscientiousness", "extraversion", "agreeableness", "neuroticism")):
        values = [2 + .2 * i for i in range(4 * t, 4 * t + 4)]
        assert [float(x) for x in rows[trait]] == [
            pytest.approx(np.mean(values) / np.std(values), abs=6e-3) if u == t else 0 for u in range(5)]
    assert "leakage to other traits (mean size) 0.00" in out
