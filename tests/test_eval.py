"""Laws of what is measured: the figures against examples worked by hand, the gate rules, and the commands' output on
the small run that test_commands.py makes.
"""
import functools
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import eval as evaluation
import train
from support import measure
from eval import average_precision, heat_map, recall_at_k
from lora import EXPERTS, SHORT_NAMES
from model import generate, pad
from router import GATE_RULES, active_experts, format_gate, gates_for_rule, oracle_gate, persona_gate, query_ids, raw_gate
from support.chat import load_tokenizer
from support.files import UserError
from support.measure import bootstrap, domain_subsets
from support.records import SPLITS, read_records, write_records
from support.rows import make_rows
from support.runs import fingerprint
from synth import lab, signatures, template_records
from test_commands import RUN, copy, here, reduced, run_folder, undone  # noqa: F401 (fixtures)


# ----------------------------------------------------------------------------------------------------------------------
# Average precision and recall

@pytest.mark.parametrize("scores, relevant, wanted", [
    ([.9, .8, .7, .6], [1, 1, 0, 0], 1.0),
    ([.9, .8, .7, .6], [0, 0, 1, 1], (1 / 3 + 2 / 4) / 2),
    ([.6, .7, .8, .9], [1, 0, 0, 1], (1 / 1 + 2 / 4) / 2),     # in the order of the scores: 1 0 0 1
    ([.9, .8, .7, .6, .5], [1, 0, 1, 0, 1], (1 / 1 + 2 / 3 + 3 / 5) / 3),
    ([.5, .5, .5, .5], [1, 0, 0, 0], 1 / 4),                   # ties: the relevant one is counted last
    ([.5, .5, .5, .5], [0, 0, 0, 1], 1 / 4),
    ([.9, .5, .5, .1], [0, 1, 0, 1], (1 / 3 + 2 / 4) / 2),
    ([-.2, -.9], [1, 0], 1.0), ([.3], [1], 1.0), ([.4, .4], [1, 1], 1.0),
])
def test_average_precision_of_examples_worked_by_hand(scores, relevant, wanted):
    assert abs(average_precision(np.array(scores), np.array(relevant)) - wanted) < 1e-12


def test_average_precision_is_its_definition():
    """For each relevant item: of those that score at least as high (itself included), how many are relevant; where
    items tie, a relevant one is preceded by all irrelevant ones of its score and by those relevant ones before it."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        n = int(rng.integers(1, 30))
        scores, relevant = rng.integers(0, 6, n) / 5, rng.integers(0, 2, n).astype(float)
        if not relevant.any():
            continue
        precisions = []
        for score in np.unique(scores):
            above, tied = scores > score, scores == score
            for k in range(int(relevant[tied].sum())):  # the tied relevant ones, one after the other
                hits = relevant[above].sum() + k + 1
                precisions.append(hits / (above.sum() + (1 - relevant[tied]).sum() + k + 1))
        assert abs(average_precision(scores, relevant) - np.mean(precisions)) < 1e-12
        mixed = rng.permutation(n)
        assert abs(average_precision(scores[mixed], relevant[mixed]) - np.mean(precisions)) < 1e-12


def test_average_precision_of_nothing_relevant_is_not_a_number():
    assert math.isnan(average_precision(np.array([.1, .2]), np.array([0, 0])))


def test_recall_counts_as_many_places_as_there_are_active_poles():
    similarity = np.array([[.9, .8, .1, .0], [.1, .2, .3, .4], [.5, .1, .4, .3]])
    active = np.array([[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 0]])
    assert recall_at_k(similarity[:1], active[:1]) == 1.0
    assert recall_at_k(similarity[1:2], active[1:2]) == 0.0
    assert abs(recall_at_k(similarity[2:], active[2:]) - 2 / 3) < 1e-12  # .5 .4 .3 are first; .1 is missed
    assert abs(recall_at_k(similarity, active) - (1 + 0 + 2 / 3) / 3) < 1e-12
    assert recall_at_k(np.array([[.2, .9, .5]]), np.array([[0, 1, 0]])) == 1.0  # ranks, not the order: they differ here
    rng = np.random.default_rng(0)
    similarity, active = rng.normal(size=(50, 10)), np.eye(10)[rng.integers(0, 10, 50)]
    active[::2, 3] = 1
    shares = [np.mean([e in np.argsort(-s)[:int(a.sum())] for e in np.flatnonzero(a)])
              for s, a in zip(similarity, active)]
    assert abs(recall_at_k(similarity, active) - np.mean(shares)) < 1e-12


# ----------------------------------------------------------------------------------------------------------------------
# Intervals and subsets

def test_an_interval_holds_the_mean_per_token_and_narrows_with_records():
    rng = np.random.default_rng(1)
    widths = []
    for n in (50, 5000):
        difference, counts = rng.normal(0.5, 2, n), rng.integers(1, 30, n).astype(float)
        mean, low, high = bootstrap(difference, counts, n=300)
        assert low < mean < high and abs(mean - difference.sum() / counts.sum()) < 1e-12
        widths.append(high - low)
    assert 0.05 < widths[1] / widths[0] < 0.2  # about one over the root of a hundred


def test_an_interval_covers_as_often_as_it_says():
    """95 % of intervals hold the true mean; with 150 trials, between 132 and 149 of them."""
    rng = np.random.default_rng(2)
    held = sum(low <= 0 <= high for low, high in (
        bootstrap(rng.normal(0, 1, 80), np.ones(80), seed, n=200)[1:] for seed in range(150)))
    assert 132 <= held < 150


def test_a_constant_difference_has_an_interval_of_no_width():
    counts = np.array([3.0, 10.0, 1.0, 25.0])
    assert np.allclose(bootstrap(0.2 * counts, counts), 0.2, atol=1e-12)


def test_the_bootstrap_is_paired_and_fixed_by_its_seed():
    """What makes both losses of a record large cancels: records differ by ten, the gates by a hundredth."""
    rng = np.random.default_rng(3)
    records, counts = rng.normal(100, 10, 400), np.ones(400)
    a, b = records + rng.normal(0.01, 0.01, 400), records
    mean, low, high = bootstrap(a - b, counts)
    assert 0.008 < low < mean < high < 0.012
    assert bootstrap(a - b, counts, 5) == bootstrap(a - b, counts, 5) != bootstrap(a - b, counts, 6)


def test_subsets_are_seen_and_held_out_domains_where_there_are_both():
    parts = domain_subsets(np.array([False, True, True, False, False]))
    assert [(name, rows.tolist()) for name, rows in parts] == [
        ("all", [0, 1, 2, 3, 4]), ("domains seen in training", [0, 3, 4]), ("domains held out", [1, 2])]
    for one_kind in (np.zeros(3, bool), np.ones(3, bool)):
        assert [(name, rows.tolist()) for name, rows in domain_subsets(one_kind)] == [("all", [0, 1, 2])]


# ----------------------------------------------------------------------------------------------------------------------
# Gate rules

def some_labels(n=400, seed=0):
    generator = torch.Generator().manual_seed(seed)
    active = (torch.rand(n, 10, generator=generator) < 0.2).float()
    active[active.sum(-1) == 0, 0] = 1
    return active, torch.rand(n, 10, generator=generator) * 2 - 1


@pytest.mark.parametrize("tau", [0.2, 1.0])
def test_every_rules_gates_are_distributions(tau):
    active, similarity = some_labels()
    for rule in GATE_RULES:
        gates = gates_for_rule(rule, active, similarity, tau, seed=1)
        if rule == "base":
            assert gates is None
        else:
            assert gates.shape == (400, 10) and gates.dtype == torch.float32 and (gates >= 0).all(), rule
            assert (gates.sum(-1) - 1).abs().max() < 1e-5, rule


def test_rules_are_their_formulas():
    active, similarity = some_labels()
    assert torch.equal(gates_for_rule("uniform", active), torch.full((400, 10), 0.1))
    assert torch.equal(gates_for_rule("learned", active, similarity, 0.3), (similarity / 0.3).softmax(-1))
    assert torch.equal(gates_for_rule("labels", active), active / active.sum(-1, keepdim=True))
    for tau in (0.5, 1.0):
        gates, k = gates_for_rule("oracle", active, tau=tau), active.sum(-1, keepdim=True)
        e, f = math.exp(1 / tau), math.exp(-1 / tau)
        assert torch.allclose(gates, (active * e + (1 - active) * f) / (k * e + (10 - k) * f), atol=1e-6)
        assert torch.equal(gates, oracle_gate(active, tau))


@pytest.mark.parametrize("n", [2, 3, 400])
def test_shuffled_gates_are_the_learned_ones_and_nobody_keeps_their_own(n):
    active, similarity = some_labels(n)
    learned = gates_for_rule("learned", active, similarity, 0.5)
    for seed in range(5):
        shuffled = gates_for_rule("shuffled", active, similarity, 0.5, seed)
        same = (shuffled[:, None] == learned[None]).all(-1)  # (N, N): whose gate each row got
        assert (same.sum(0) == 1).all() and (same.sum(1) == 1).all() and not same.diagonal().any()
    if n > 3:
        assert not torch.equal(shuffled, gates_for_rule("shuffled", active, similarity, 0.5, 0))
        assert torch.equal(shuffled, gates_for_rule("shuffled", active, similarity, 0.5, 4))


def test_random_gates_are_dirichlet_of_one_and_fixed_by_the_seed():
    """Uniform on the simplex: mean 1/10, variance 9/1100 of each weight."""
    active, _ = some_labels(20_000)
    gates = gates_for_rule("random", active, seed=3)
    assert torch.equal(gates, gates_for_rule("random", active, seed=3))
    assert not torch.equal(gates, gates_for_rule("random", active, seed=4))
    assert (gates.mean(0) - 0.1).abs().max() < 0.003 and (gates.var(0) - 9 / 1100).abs().max() < 0.0005


def test_a_rule_that_is_none_is_refused():
    with pytest.raises(ValueError, match="unknown gate rule 'best', expected one of base, uniform"):
        gates_for_rule("best", *some_labels(2))


# ----------------------------------------------------------------------------------------------------------------------
# Text: heat map and raw gates

def test_a_heat_map_has_a_row_for_each_query_and_fits_a_terminal():
    gates = torch.full((3, 10), 0.02)
    gates[0, 3], gates[1, 0], gates[2, 9] = 0.8, 0.4, 0.2
    active = torch.zeros(3, 10)
    active[0, 3] = active[0, 0] = active[1, 9] = 1
    queries = ["Short", "A query\nover two lines, longer than the column that it is given here, by far", "x" * 40]
    lines = heat_map(gates.numpy(), active.numpy(), queries).split("\n")
    assert len(lines) == 4 and all(len(line) <= 82 for line in lines)
    assert lines[0].split() == [*SHORT_NAMES] == ["O+", "O-", "C+", "C-", "E+", "E-", "A+", "A-", "N+", "N-"]
    cells = [[line[41:][4 * i:4 * i + 4] for i in range(10)] for line in lines]
    assert [cell.strip() for cell in cells[0]] == [*SHORT_NAMES]  # each name stands over its column
    assert cells[1][3] == "[██]" and cells[1][0] == "[··]" and cells[1][1] == " ·· "
    assert cells[2][0] == " ▒▒ " and cells[2][9] == "[··]" and cells[3][9] == " ░░ "
    assert lines[1].startswith("Short ") and lines[2][39:41] == "… " and "over two" in lines[2]
    assert lines[3][:40] == "x" * 40


@pytest.mark.parametrize("text, wanted", [
    (",".join(["0.1"] * 10), [0.1] * 10), ("1,0,0,0,0,0,0,0,0,0", [1] + [0] * 9),
    ("high_openness:0.7,low_neuroticism:0.3", [0.7] + [0] * 8 + [0.3]), ("low_openness", [0, 1] + [0] * 8),
    (" low_neuroticism:0.25 , high_openness:0.75 ", [0.75] + [0] * 8 + [0.25]),
    ("0.0999,0.1001" + ",0.1" * 8, [0.0999, 0.1001] + [0.1] * 8), ("high_openness:1", [1] + [0] * 9)])
def test_raw_gates_that_are_distributions_are_taken(text, wanted):
    gate = raw_gate(text)
    assert gate.shape == (1, 10) and torch.allclose(gate, torch.tensor([wanted]).float(), atol=1e-6)


@pytest.mark.parametrize("text", [
    "", "1", "0.5,0.5", ",".join(["0.1"] * 9), ",".join(["0.1"] * 11), ",".join(["0.2"] * 10), "2,-1" + ",0" * 8,
    "nan" + ",0" * 9, "inf" + ",0" * 9, "high_openness:0.7", "openness:1", "O+", "high_openness:x,low_openness:1",
    "high_openness:0.5,low_openness:0.6", "high_openness:1.5,low_openness:-0.5", "high_openness:nan",
    "a,b,c,d,e,f,g,h,i,j", "high_openness:0.4,high_openness:1"])
def test_raw_gates_that_are_none_are_refused_with_what_is_expected(text):
    with pytest.raises(UserError, match="expected ten weights from 0 up that sum to 1") as error:
        raw_gate(text)
    assert all(name in str(error.value) for name in EXPERTS)


# ----------------------------------------------------------------------------------------------------------------------
# The commands

@pytest.fixture
def run(run_folder, monkeypatch):  # noqa: F811
    """The run, read only, under the name that it was made with."""
    monkeypatch.chdir(run_folder.parent.parent)
    return RUN


def shown(capsys, command, *argv):
    evaluation.main([*command.split(), *argv])
    return capsys.readouterr().out


def opened(run, stage="joint"):
    args = evaluation.Ask(queries=["x"], run=str(run), stage=stage)
    return measure.LoadedRun(args)


def test_routing_reports_every_expert_on_three_subsets(run, capsys):
    out = shown(capsys, f"routing --run {run} --show 4")
    assert re.findall(r"^(\d+) test queries, (.*); router after joint, tau 1$", out, re.M) == [
        ("60", "all"), *zip(re.findall(r"^(\d+) test queries, domains", out, re.M),
                            ("domains seen in training", "domains held out"))]
    counts = [int(n) for n in re.findall(r"^(\d+) test queries", out, re.M)]
    assert counts[1] + counts[2] == counts[0] == 60
    for expert in EXPERTS:
        assert len(re.findall(rf"^  {expert} +\d+ +(?:\d\.\d{{3}}|nan) +\d\.\d{{3}} +\d\.\d{{3}}$", out, re.M)) == 3
    assert len(re.findall(r"^  mean ", out, re.M)) == out.count("recall at |P|") == out.count("top-1 mass") == 3
    queries = [r["query"] for r in read_records(run / "data" / "test.jsonl")]
    rows = out.split("\n\n")[-1].splitlines()
    assert len(rows) == 5 and all(row.startswith(query[:39]) for row, query in zip(rows[1:], queries))
    assert rows[0].split() == [*SHORT_NAMES] and all(len(row) <= 82 for row in rows)


def test_routings_figures_are_those_of_the_saved_router(run, capsys):
    """Of the stage that was asked for, on the test records, at the temperature that was asked for."""
    records = read_records(run / "data" / "test.jsonl")
    active = torch.stack([active_experts(r["traits"]) for r in records])
    for stage, tau in (("warmup", 1.0), ("joint", 0.2)):
        m = opened(run, stage)
        similarity = torch.cat([m.router.similarity(m.router.embed(*pad([row.query]))).detach()
                                for row in m.rows(records)])
        out = shown(capsys, f"routing --run {run} --stage {stage} --tau {tau}")
        assert f"router after {'router' if stage == 'warmup' else 'joint'}, tau {tau:g}" in out
        scores = [average_precision(s, a) for s, a in zip(similarity.T.numpy(), active.T.numpy())]
        first = out.split(" test queries, domains")[0]
        found = [float(re.search(rf"^  {e} +\d+ +(\S+)", first, re.M)[1]) for e in EXPERTS]
        assert np.allclose(found, scores, atol=2e-3)
        gates = (similarity / tau).softmax(-1)
        entropy = -(gates * gates.log()).sum(-1).mean()
        assert abs(float(re.search(r"entropy (\d\.\d+)", first)[1]) - entropy) < 2e-3
        assert abs(float(re.search(r"recall at \|P\| (\d\.\d+)", first)[1])
                   - recall_at_k(similarity.numpy(), active.numpy())) < 0.01


def test_routing_needs_no_responses(run_folder, here, capsys):  # noqa: F811
    copy(run_folder, here, ["warmup", "joint"])
    records = [{k: v for k, v in r.items() if k != "response"} for r in template_records("test", 8)]
    for name in SPLITS:
        write_records(here / "mine" / f"{name}.jsonl", records)
    out = shown(capsys, f"routing --run {RUN} --data mine")
    assert "8 test queries, all" in out and "held out" not in out  # the training split here has the same domains


@pytest.fixture
def no_table(monkeypatch):
    """ablate without the table of experts and poles, where a test asks for something else."""
    monkeypatch.setattr(evaluation, "expert_table", lambda run, args: None)


@pytest.fixture(scope="module")
def ablated():
    """Where `ablation` keeps what it has printed."""
    return {}


def ablation(ablated, run, capsys):
    """What ablate prints, computed once."""
    if not ablated:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(evaluation, "generate_replies", functools.partial(evaluation.generate_replies, max_new_tokens=3))
            ablated["out"] = shown(capsys, f"ablate --run {run} --records 20 --replies 1")
    return ablated["out"]


def test_ablate_has_every_rule_on_three_subsets_with_intervals(run, capsys, ablated):
    out = ablation(ablated, run, capsys)
    parts = out.split("\nHeld-out loss, ")[1:]
    assert [re.search(r"tokens, (.*); experts after joint, tau 1$", part, re.M)[1] for part in parts] == [
        "all", "domains seen in training", "domains held out"]
    counts = [tuple(map(int, re.match(r"(\d+) records, (\d+) reply tokens", part).groups())) for part in parts]
    assert counts[0][0] == 20 and tuple(map(sum, zip(*counts[1:]))) == counts[0]
    for part in parts:
        rows = {line.split()[0]: line for line in part.splitlines() if re.match("  [a-z]+ +[0-9]", line)}
        assert list(rows) == list(GATE_RULES)
        own = float(rows["learned"].split()[1])
        for rule, line in rows.items():
            assert GATE_RULES[rule] in line
            found = re.search(r"([+-]\d\.\d{4}) \[([+-]\d\.\d{4}), ([+-]\d\.\d{4})\]", line)
            assert bool(found) == (rule != "learned")
            if found:
                mean, low, high = map(float, found.groups())
                assert low <= mean <= high and abs(float(line.split()[1]) - own - mean) < 3e-4


def test_ablates_losses_are_those_of_the_gates(run, capsys, ablated):
    out = ablation(ablated, run, capsys)
    m = opened(run)
    records = read_records(run / "data" / "test.jsonl")[:20]
    rows, _ = make_rows(records, m.chat)
    active = torch.stack([row.active for row in rows])
    similarity = train.score_queries(m.router, m.rows(records))
    for rule in ("base", "shuffled", "oracle"):
        gates = gates_for_rule(rule, active, similarity, 1.0, seed=0)
        losses = [train.row_losses(m.model, [row], None if gates is None else gates[i:i + 1]).item()
                  for i, row in enumerate(rows)]
        mean = sum(losses) / sum(len(row.ids) - row.prompt for row in rows)
        assert abs(float(re.search(rf"^  {rule} +(\d\.\d+)", out, re.M)[1]) - mean) < 3e-4, rule


def test_ablate_ends_with_the_table_of_warm_up_experts_and_poles(run, capsys, ablated):
    """Expert e alone, as warm-up left it, on records that call for pole p and for no other."""
    out = ablation(ablated, run, capsys)
    records = [r for r in read_records(run / "data" / "test.jsonl")[:20] if len(r["traits"]) == 1]
    poles = np.array([int(active_experts(r["traits"]).argmax()) for r in records])
    table = out.split(f"alone on the {len(records)} records that call for one pole")[1].split("\nShare of")[0]
    values = np.array([[float(cell.strip("*")) for cell in re.search(rf"^  {e} (.*)$", table, re.M)[1].split()]
                       for e in EXPERTS])
    assert values.shape == (10, 10) and re.search(r"^ +" + " +".join(map(re.escape, SHORT_NAMES)) + "$", table, re.M)
    m = opened(run, "warmup")
    rows, _ = make_rows(records, m.chat)
    for e in (0, 7):
        nats = [train.row_losses(m.model, [row], torch.eye(10)[e:e + 1]).item() for row in rows]
        for p in range(10):
            here_ = np.flatnonzero(poles == p)
            if not len(here_):
                assert np.isnan(values[e, p])
            else:
                wanted = sum(nats[i] for i in here_) / sum(len(rows[i].ids) - rows[i].prompt for i in here_)
                assert abs(values[e, p] - wanted) < 6e-3
    assert re.search(rf"lowest on the diagonal: \d+ of {len(set(poles))} poles", table)
    for p in set(poles):
        assert sum("*" in re.search(rf"^  {e} (.*)$", table, re.M)[1].split()[p] for e in EXPERTS) == 1
    shares = out.split("Share of 1 replies with the pole's signature")[1]
    named = re.findall(r"^  (\w+_\w+) +[01]\.\d\d +[01]\.\d\d$", shares, re.M)
    assert named == [EXPERTS[p] for p in sorted(set(poles))]


def test_signature_shares_are_counted_in_replies(run, capsys, monkeypatch):
    """An expert whose every reply has its signature has a share of 1, the base that has none 0."""
    words = [pole["signature"][0] for pole in lab()["poles"].values()]

    def answer(model, chat, records, gates=None, **_):
        return ["nothing" if gates is None else words[int(gates.argmax())] for _ in records]
    monkeypatch.setattr(evaluation, "generate_replies", answer)
    assert signatures(words[3]) == [int(e == 3) for e in range(10)]
    args = evaluation.Ablate(run=str(run), records=12, replies=3, stage="warmup")
    evaluation.expert_table(measure.LoadedRun(args), args)
    out = capsys.readouterr().out
    shares = re.findall(r"^  \w+_\w+ +(\d\.\d\d) +(\d\.\d\d)$", out.split("Share of 3 replies")[1], re.M)
    assert shares and set(shares) == {("0.00", "1.00")}


def test_ablate_compares_with_a_control(run_folder, here, no_table, capsys):  # noqa: F811
    """Another run's joint experts under a uniform gate, record by record. (Here the run itself stands in for it.)"""
    copy(run_folder, here)
    out = shown(capsys, f"ablate --run {RUN} --control {RUN} --records 4")
    rows = re.findall(r"^  (uniform|control) +(\S+) +(\S+ \[.*?\])", out, re.M)
    assert rows[0][1:] == rows[1][1:] and "trained and used with a uniform gate" in out
    shutil.rmtree(here / RUN / "joint")
    with pytest.raises(UserError, match="has no experts of stage joint yet: python train.py .*--stage joint --run"):
        evaluation.main(f"ablate --run {RUN} --control {RUN} --records 4".split())


def replies(out):
    return re.findall(r"^base:        (.*)\n\nPersonaFuse: (.*)$", out, re.M)


def test_ask_answers_as_the_base_and_as_the_mixture(run, capsys):
    """The reply is what generate gives with that gate, of the learned rule as of a persona."""
    m, queries = opened(run), ["My boss is furious.", "I miss my sister — what now?"]
    gates = {"learned": torch.cat([m.router(*pad([query_ids(load_tokenizer(m.setup.encoder), q)]))
                                   for q in queries]).detach(),
             "persona": persona_gate("O+,E-:0.5", 1.0).expand(2, -1)}
    for kind, argv in (("learned", []), ("persona", ["--persona", "O+,E-:0.5"])):
        out = shown(capsys, f"ask --run {run} --max-new-tokens 6", *argv, *queries)
        wanted = []
        for i, query in enumerate(queries):
            prompt = m.chat.prompt([{"role": "user", "content": query}])
            wanted.append(tuple(m.chat.text(generate(m.model, [prompt], gate, 6, stops=m.chat.stops)[0])
                                for gate in (None, gates[kind][i:i + 1])))
            assert query in out and format_gate(gates[kind][i]) in out
        assert replies(out) == wanted


def test_sampled_replies_are_fixed_by_the_seed(run, capsys):
    one, again, other = (shown(capsys, f"ask --run {run} --max-new-tokens 8 --temperature 3 --seed {seed}", "Hello?")
                         for seed in (1, 1, 2))
    assert one == again and replies(one) != replies(other)


@pytest.mark.parametrize("argv, note", [
    (["--gate", "high_openness:1"], True), (["--gate", "high_openness:1", "--stage", "warmup"], False),
    (["--gate", "high_openness:0.5,low_openness:0.5"], False), (["--persona", "O+"], False)])
def test_one_joint_expert_alone_is_commented_on(run, capsys, argv, note):
    """After joint training a single expert is far from what it was trained for; warm-up's were trained alone."""
    evaluation.main(f"ask --run {run} --max-new-tokens 1".split() + [*argv, "Hello?"])
    out, err = capsys.readouterr()
    assert ("note: joint training" in err) == note and ("--stage warmup" in err) == note
    if argv[0] == "--gate":
        assert format_gate(raw_gate(argv[1])[0]) in out


@pytest.mark.parametrize("argv, why", [
    (["Hello?", ""], "an empty query"), ([" \n"], "an empty query"), (["caf\udce9"], "not UTF-8"),
    (["--persona", "O+", "--gate", "high_openness:1", "Hello?"], "--persona and --gate both set the gate: choose one"),
    (["--persona", "X+", "Hello?"], "persona 'X\\+'"), (["--gate", "1", "Hello?"], "expected ten weights"),
    (["--device", "tpu", "Hello?"], "--device 'tpu'")])
def test_what_cannot_be_asked_is_refused(run, argv, why):
    with pytest.raises(UserError, match=why) as error:
        evaluation.main(["ask", "--run", str(run), *argv])
    assert "\n" not in str(error.value)


# ----------------------------------------------------------------------------------------------------------------------
# Which run, which stage, which temperature

def test_a_run_without_joint_is_measured_after_warm_up(run_folder, here, no_table, capsys):  # noqa: F811
    copy(run_folder, here, ["joint"])
    assert "router after router, tau 1" in shown(capsys, f"routing --run {RUN}")
    assert "experts after warmup" in shown(capsys, f"ablate --run {RUN} --records 4")
    m = measure.LoadedRun(evaluation.Ask(queries=["x"], run=str(RUN)))
    assert (m.folder("experts"), m.folder("router")) == (RUN / "warmup" / "experts", RUN / "router" / "router")
    with pytest.raises(UserError, match="no router of stage joint yet: .*--preset tiny --stage joint --run runs/tiny"):
        evaluation.main(f"routing --run {RUN} --stage joint".split())


@pytest.mark.parametrize("command, gone, why", [
    ("routing", "router", "no router of stage router yet: python train.py --preset tiny --stage router --run runs/"),
    ("ablate", "warmup", "no experts of stage warmup yet: python train.py --preset tiny --stage warmup --run runs/"),
    ("ask Hello", "warmup", "no experts of stage warmup yet: python train.py --preset tiny --stage warmup")])
def test_a_stage_that_is_not_trained_yet_is_named_with_its_command(run_folder, here, command, gone, why):  # noqa: F811
    copy(run_folder, here, ["joint", gone])
    with pytest.raises(UserError, match=why):
        evaluation.main(command.split() + ["--run", str(RUN)])


@pytest.mark.parametrize("stage, command, why", [
    ("router", "ask Hello", "no experts of stage warmup yet"), ("router", "ablate", "no experts of stage warmup yet"),
    ("warmup", "routing", "no router of stage router yet"), ("warmup", "ablate", "no router of stage router yet"),
    ("warmup", "ask Hello", "no router of stage router yet")])
def test_a_run_of_one_stage_says_what_is_missing(run_folder, here, stage, command, why):  # noqa: F811
    """As train.py leaves it after one stage: it does not know the other stage's model yet."""
    undone(run_folder, here, "joint", *({"warmup", "router"} - {stage}))
    with pytest.raises(UserError, match=why):
        evaluation.main(command.split() + ["--run", str(RUN)])


def test_ask_with_a_gate_of_ones_own_needs_no_router(run_folder, here, capsys):  # noqa: F811
    copy(run_folder, here, ["joint", "router", "models/encoder"])
    assert replies(shown(capsys, f"ask --run {RUN} --max-new-tokens 2 --persona O+", "Hello?"))


def test_the_temperature_is_that_of_joint_training_unless_given(run_folder, here):  # noqa: F811
    folder = copy(run_folder, here)
    config = (folder / "config.json").read_text()
    assert '"tau": 1.0' in config
    (folder / "config.json").write_text(config.replace('"tau": 1.0', '"tau": 0.3'))
    for given, wanted in ((None, 0.3), (0.7, 0.7)):
        m = measure.LoadedRun(evaluation.Ask(queries=["x"], run=str(RUN), tau=given))
        assert m.setup.tau == wanted and m.router.temperature == wanted


def test_experts_or_a_router_of_another_runs_models_are_refused(run_folder, here):  # noqa: F811
    """Of the same shape, so that nothing else shows it. --base and --encoder make it right; what PEFT trained, in no
    run, cannot be known."""
    copy(run_folder, here)
    other = Path(shutil.copytree(RUN, "other"))
    for role in ("base", "encoder"):
        file = other / "models" / role / "model.safetensors"
        save_file({name: t + 1e-3 for name, t in load_file(file).items()}, file, metadata={"format": "pt"})
    for folder in (RUN, other):
        config = json.loads((folder / "config.json").read_text())
        config["content"] = {role: fingerprint(folder / "models" / role) for role in ("base", "encoder")}
        (folder / "config.json").write_text(json.dumps(config))
    shutil.copytree("other/joint/experts", "elsewhere")

    def opened(**more):
        return measure.LoadedRun(evaluation.Ask(queries=["x"], run=str(RUN), **more))
    for role, part, loaded in (("base", "experts", "model"), ("encoder", "router", "router")):
        theirs = f"other/joint/{part}"
        with pytest.raises(UserError, match=f"models/{role}: not the {role} that {theirs} was trained on.*--{role} names"
                           ) as error:
            getattr(opened(**{part: theirs}), loaded)
        assert "\n" not in str(error.value)
        getattr(opened(**{part: theirs, role: f"other/models/{role}"}), loaded)
        getattr(opened(**{part: f"{RUN}/joint/{part}"}), loaded)
    assert opened(experts="elsewhere").model


@pytest.mark.parametrize("command", ["routing", "ablate", "ask Hello"])
def test_a_run_that_is_not_there_is_one_line_with_the_way_out(here, command):  # noqa: F811
    with pytest.raises(UserError, match="no/run: no config.json, so there is no run here; python train.py --preset tiny"
                       ) as error:
        evaluation.main(command.split() + ["--run", "no/run"])
    assert "\n" not in str(error.value) and not any(here.iterdir())


def test_evaluation_writes_nothing_into_the_run(run, capsys):
    before = {file: file.stat().st_mtime_ns for file in run.rglob("*")}
    shown(capsys, f"ask --run {run} --max-new-tokens 1", "Hello?")
    shown(capsys, f"routing --run {run}")
    assert {file: file.stat().st_mtime_ns for file in run.rglob("*")} == before
