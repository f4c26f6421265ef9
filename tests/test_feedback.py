"""Laws of feedback: verdicts in a chat become likes, and likes shift the gate to softmax((s + b) / τ)."""
import contextlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import eval as evaluation
from lora import EXPERTS
from router import persona_gate, softmax_gate
from support import feedback
from support.feedback import (INTERCEPT_PENALTY, PENALTIES, append_feedback, design, fit, learn_likes, leave_one_out,
                              read_feedback)
from support.files import UserError
from support.measure import LARGEST_LIKE, LoadedRun, gate_from_options
from test_commands import here, reduced, run_folder  # noqa: F401 (fixtures)

LIKES = [.4, -.1, 0, .3, -.5, .05, -.15, .1, -.2, .1]
QUERY = "My boss is furious."


def verdicts(n, seed=0, liked=(2, 7), strength=2.0, tau=1.0):
    """Gates of n messages with random similarities, and the verdicts of a person who likes two poles' weights."""
    rng = np.random.default_rng(seed)
    gates = softmax_gate(torch.tensor(rng.normal(0, .3, (n, 10))), tau).numpy()
    weight = gates[:, liked].sum(1)
    good = rng.random(n) < 1 / (1 + np.exp(-strength * (weight - weight.mean()) / max(weight.std(), 1e-9)))
    return gates, good.astype(float)


def everything(good):
    """counted of fit: one regression that reads all verdicts."""
    return np.ones((1, len(good)))


def write_lines(path, gates, good):
    lines = [{"query": f"What now, {i}?", "similarity": None, "gate": dict(zip(EXPERTS, gate)),
              "verdict": "good" if y else "bad"} for i, (gate, y) in enumerate(zip(gates.tolist(), good))]
    Path(path).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return lines


def write_user(path, likes):
    Path(path).write_text(json.dumps({"likes": dict(zip(EXPERTS, likes))}))
    return str(path)


# ----------------------------------------------------------------------------------------------------------------------
# The regression

def loss_of(theta, x, good, penalty):
    """The definition, in torch: −Σ log p(verdict) and both penalties. theta: (E + 1,)"""
    nats = F.binary_cross_entropy_with_logits(x @ theta, good, reduction="sum")
    return nats + penalty / 2 * theta[:-1].square().sum() + INTERCEPT_PENALTY / 2 * theta[-1] ** 2


def minimum_by_lbfgs(x, good, penalty):
    x, good = torch.tensor(x), torch.tensor(good)
    theta = torch.zeros(x.shape[1], dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([theta], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-15,
                                  line_search_fn="strong_wolfe")

    def closure():
        optimiser.zero_grad()
        loss = loss_of(theta, x, good, penalty)
        loss.backward()
        return loss
    optimiser.step(closure)
    return theta.detach()


@pytest.mark.parametrize("n, tau", [(3, 1.0), (12, 1.0), (80, .1)])
@pytest.mark.parametrize("penalty", PENALTIES)
def test_newtons_method_finds_the_minimum_that_another_optimiser_finds_and_the_inverse_hessian_there(n, tau, penalty):
    gates, good = verdicts(n, n, tau=tau)
    x = design(gates)
    (theta,), (covariance,) = fit(x, good, penalty, everything(good))
    other = minimum_by_lbfgs(x, good, penalty)
    assert np.abs(theta - other.numpy()).max() < 1e-6
    hessian = torch.autograd.functional.hessian(
        lambda theta: loss_of(theta, torch.tensor(x), torch.tensor(good), penalty), other)
    assert np.abs(covariance @ hessian.numpy() - np.eye(11)).max() < 1e-5


def test_newtons_method_converges_for_the_smallest_penalty_on_gates_of_every_kind():
    """Nearly uniform, one expert alone, and one gate far from all others, with verdicts that one weight decides."""
    rng = np.random.default_rng(0)
    for case in range(300):
        n = int(rng.integers(2, 150))
        gates = rng.dirichlet(np.full(10, rng.choice([.01, .1, 1, 100])), n)
        if case % 3 == 0:
            gates[1:] = .1
        good = (gates[:, 0] > np.median(gates[:, 0])) * 1.0 if case % 2 else (rng.random(n) < .1) * 1.0
        x, penalty = design(gates), min(PENALTIES)
        (theta,), _ = fit(x, good, penalty, everything(good))
        gradient = x.T @ (1 / (1 + np.exp(-x @ theta)) - good) + [*[penalty] * 10, INTERCEPT_PENALTY] * theta
        assert np.abs(gradient).max() < 1e-8


def test_leave_one_out_is_one_regression_for_each_verdict_on_all_the_others():
    gates, good = verdicts(15)
    x = design(gates)
    for penalty in PENALTIES:
        nats = []
        for i in range(15):
            others = np.arange(15) != i
            p = torch.tensor(x[i]) @ minimum_by_lbfgs(x[others], good[others], penalty)
            nats.append(F.binary_cross_entropy_with_logits(p, torch.tensor(good[i])).item())
        assert abs(leave_one_out(x, good, penalty) - np.mean(nats)) < 1e-7


@pytest.mark.parametrize("n, strength", [(12, 0), (40, 2), (200, 6)])
def test_the_penalty_is_the_one_with_the_lowest_leave_one_out_loss(n, strength):
    gates, good = verdicts(n, strength=strength)
    scores = {penalty: leave_one_out(design(gates), good, penalty) for penalty in PENALTIES}
    assert scores[learn_likes(gates, good)[2]] == min(scores.values())


@pytest.mark.parametrize("n", [1, 2, 9, 50, 400])
@pytest.mark.parametrize("strength", [0, 2, 50])
def test_likes_are_centred_bounded_and_do_not_depend_on_the_order_of_verdicts(n, strength):
    gates, good = verdicts(n, strength=strength)
    b, errors, _ = learn_likes(gates, good)
    assert abs(b.sum()) < 1e-9 and np.abs(b).max() <= LARGEST_LIKE and (errors > 0).all()
    order = np.random.default_rng(1).permutation(n)
    again, errors_again, _ = learn_likes(gates[order], good[order])
    assert np.allclose(b, again, atol=1e-7) and np.allclose(errors, errors_again, atol=1e-7)


def test_likes_of_renamed_experts_are_renamed_and_of_opposite_verdicts_are_opposite():
    gates, good = verdicts(60)
    b, errors, _ = learn_likes(gates, good)
    order = np.random.default_rng(1).permutation(10)
    assert np.allclose(learn_likes(gates[:, order], good)[0], b[order], atol=1e-7)
    opposite, errors_of_opposite, _ = learn_likes(gates, 1 - good)
    assert np.allclose(opposite, -b, atol=1e-7) and np.allclose(errors, errors_of_opposite, atol=1e-7)


def test_likes_tend_to_0_as_the_penalty_grows():
    gates, good = verdicts(50)
    sizes = [np.abs(fit(design(gates), good, penalty, everything(good))[0][0, :-1]).max()
             for penalty in (1, 10, 100, 1e4, 1e8)]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] > .3 and sizes[-1] < 1e-5


@pytest.mark.parametrize("tau", [1.0, .1])
def test_planted_likes_are_found_and_a_person_who_judges_by_chance_likes_nothing(tau):
    """Of 30 persons after 200 verdicts: the two poles are the top two, more than two standard errors from 0."""
    found = told = 0
    for person in range(30):
        liked = np.random.default_rng(person).choice(10, 2, replace=False)
        b, errors, _ = learn_likes(*verdicts(200, person, liked, tau=tau))
        found += {*np.argsort(-b)[:2]} == {*liked} and (b > 2 * errors)[liked].all()
        b, errors, _ = learn_likes(*verdicts(200, person, liked, strength=0, tau=tau))
        told += (np.abs(b) > 2 * errors).any()
    assert found >= 28 and told <= 5


def test_standard_errors_are_how_much_likes_vary_from_sample_to_sample(monkeypatch):
    """With so many verdicts that the penalty hardly matters."""
    monkeypatch.setattr(feedback, "PENALTIES", [1])
    monkeypatch.setattr(feedback, "leave_one_out", lambda *_: 0)
    all_b, all_errors = zip(*[learn_likes(*verdicts(2000, seed, strength=.5))[:2] for seed in range(40)])
    ratio = np.std(all_b, 0) / np.mean(all_errors, 0)
    assert .75 < ratio.mean() < 1.15 and .5 < ratio.min() and ratio.max() < 1.5


@pytest.mark.parametrize("n, good", [(1, 1), (1, 0), (40, 1), (40, 0)])
def test_verdicts_that_are_all_the_same_say_nothing(n, good):
    b, _, _ = learn_likes(verdicts(n)[0], np.full(n, float(good)))
    assert np.abs(b).max() < 1e-6


def test_a_few_thumbs_cannot_turn_the_gate_into_one_expert():
    """Nine verdicts that agree perfectly with one expert's weight. The message still decides: a pole that it calls for
    with a cosine of 0.8 keeps the largest weight."""
    gates, _ = verdicts(9)
    b = learn_likes(gates, (gates[:, 4] > np.median(gates[:, 4])).astype(float))[0]
    assert b.argmax() == 4 and softmax_gate(torch.tensor(b), 1.0).max() < .2
    assert softmax_gate(.8 * torch.eye(10)[7] + torch.tensor(b), .1).argmax() == 7


def test_gates_that_never_differ_say_nothing():
    gates = np.tile(persona_gate("O+,E-", 1.0).double().numpy(), (20, 1))
    assert np.abs(learn_likes(gates + 1e-9 * np.random.default_rng(0).normal(size=gates.shape),
                              np.arange(20) % 2 * 1.0)[0]).max() < 1e-3


# ----------------------------------------------------------------------------------------------------------------------
# The gate

def said_by(capsys, command, *more):
    capsys.readouterr()
    evaluation.main([*command.split(), *map(str, more)])
    return capsys.readouterr().out


def gates_of(run, capsys, monkeypatch, here, tau, *user):
    """The gate for QUERY in ask, chat and export, each (E,)."""
    asked = json.loads(said_by(capsys, f"ask --run {run} --tau {tau} --max-new-tokens 1 --json", *user, QUERY))["gate"]
    args = evaluation.ChatOptions(run=str(run), tau=tau, max_new_tokens=1, user=user[1] if user else None)
    talk = evaluation.Conversation(LoadedRun(args), args)
    in_chat = []
    monkeypatch.setattr(evaluation.Conversation, "stream", lambda self, record, gate: in_chat.append(gate[0]) or "Yes.")
    talk.reply(QUERY)
    exported = []
    monkeypatch.setattr(evaluation, "export_mixture", lambda model, gate, *_: exported.append(gate[0]))
    said_by(capsys, f"export --run {run} --tau {tau} --as mixture --out new --query", QUERY, *user)
    return [torch.tensor([asked[expert] for expert in EXPERTS]), *in_chat, *exported]


@pytest.mark.parametrize("tau", [1.0, .1])
def test_likes_shift_the_gate_of_ask_chat_and_export_alike(run_folder, here, capsys, monkeypatch, tau):
    """To softmax((s + b) / τ). b = 0 gives the router's gate, bit for bit."""
    similarity = LoadedRun(evaluation.Talk(run=str(run_folder))).similarity([{"id": "0", "query": QUERY}])[0]
    for likes, options in ((None, []), ([0] * 10, ["--user", write_user("0.json", [0] * 10)]),
                           (LIKES, ["--user", write_user("b.json", LIKES)])):
        found = gates_of(run_folder, capsys, monkeypatch, here, tau, *options)
        wanted = ((similarity.double() + torch.tensor(likes or [0] * 10).double()) / tau).softmax(-1)
        assert len(found) == 3 and all((gate - wanted).abs().max() < 1e-5 for gate in found)
        if likes is None:
            plain = found
        assert all(torch.equal(gate, before) for gate, before in zip(found, plain)) == (likes is not LIKES)


def test_likes_do_not_move_a_gate_that_is_set_by_hand(run_folder, here, monkeypatch):
    args = evaluation.ChatOptions(run=str(run_folder), user=write_user("b.json", LIKES))
    talk, gates = evaluation.Conversation(LoadedRun(args), args), []
    monkeypatch.setattr(talk, "stream", lambda record, gate: gates.append(gate[0]) or "Yes.")
    for line in ("/persona O+", "/router"):
        talk.command(line)
        talk.reply(QUERY)
    assert torch.equal(gates[0], persona_gate("O+", 1.0)) and not torch.equal(gates[0], gates[1])


@pytest.mark.parametrize("argv, why", [
    ("ask Hi --persona O+ --user u.json", "--persona and --user both set the gate: choose one"),
    ("chat --gate high_openness --user u.json", "--gate and --user both set the gate: choose one"),
    ("export --out x --as mixture --persona O+ --user u.json", "--persona and --user both"),
    ("export --out x --user u.json", "--user shifts the router's gate for a query: give --query too"),
    ("ask Hi --user none.json", "none.json: no such file"),
    ("bench emobench --user u.json", "unrecognized arguments: --user")])
def test_a_user_that_cannot_be_is_refused_in_one_line_and_nothing_is_written(run_folder, here, argv, why):
    command, *rest = argv.split()
    with pytest.raises(UserError, match=why) as error:
        evaluation.main([command, *rest, "--run", str(run_folder)])
    assert "\n" not in str(error.value) and not any(here.iterdir())


@pytest.mark.parametrize("likes, found", [
    (None, "no 'likes'"), (5, "likes is 5"), ({}, "likes is {}"), (dict.fromkeys(EXPERTS[1:], 0), "likes is {"),
    (dict.fromkeys(EXPERTS, 0) | {"honesty": 0}, "likes is {"), (dict.fromkeys(EXPERTS, "0"), "likes is {"),
    (dict.fromkeys(EXPERTS, .51), "likes is {"), (dict.fromkeys(EXPERTS, float("nan")), "likes is {"),
    (dict.fromkeys(EXPERTS, True), "likes is {")])
def test_a_user_json_with_anything_but_ten_bounded_numbers_is_refused(run_folder, here, likes, found):
    Path("u.json").write_text(json.dumps({} if likes is None else {"likes": likes}))
    with pytest.raises(UserError, match="u.json: " + found) as error:
        LoadedRun(evaluation.Talk(run=str(run_folder), user="u.json"))
    assert likes is None or "expected a number from -0.5 to 0.5 for each expert's name" in str(error.value)


# ----------------------------------------------------------------------------------------------------------------------
# The commands

def test_good_and_bad_append_the_last_turn_to_the_feedback_file(run_folder, here, capsys, monkeypatch):
    """With the similarities that set the gate, before --user shifts them; null where it was set by hand. A line that
    was there stays, and a turn is judged once."""
    args = evaluation.ChatOptions(run=str(run_folder), max_new_tokens=2, user=write_user("b.json", LIKES))
    talk = evaluation.Conversation(LoadedRun(args), args)
    monkeypatch.setattr(talk, "stream", lambda record, gate: "Yes.")
    earlier = json.dumps(write_lines("feedback.jsonl", *verdicts(1))[0])
    Path("feedback.jsonl").write_text(earlier)  # whoever edited it left out the last line's end
    for line in ("/good", QUERY, "/good", "/bad", "And now?", "/nothing", "/bad", "/persona O+", "Why?", "/good",
                 "/good yes", "/reset", "/bad"):
        with contextlib.suppress(UserError):
            talk.command(line) if line[0] == "/" else talk.reply(line)
    assert capsys.readouterr().out.count("feedback.jsonl: ") == 3
    first, *written = Path("feedback.jsonl").read_text().splitlines()
    found = read_feedback("feedback.jsonl")[1:]
    assert first == earlier and len(written) == 3
    assert [(line["query"], line["verdict"]) for line in found] == [
        (QUERY, "good"), ("And now?", "bad"), ("Why?", "good")]
    alone = talk.run.similarity([{"id": query, "query": query} for query in (QUERY, "And now?")])
    for line, similarity in zip(found, (alone[0], (alone[0] + 2 * alone[1]) / 3)):
        assert torch.allclose(torch.tensor([line["similarity"][expert] for expert in EXPERTS]), similarity)
        gate = softmax_gate(similarity + torch.tensor(LIKES), 1.0)
        assert torch.allclose(torch.tensor([line["gate"][expert] for expert in EXPERTS]), gate)
    assert found[2]["similarity"] is None and found[2]["gate"]["high_openness"] > .2


@pytest.mark.parametrize("lines, why", [
    (["/good"], "/good judges PersonaFuse's last reply, and there is none yet"),
    (["Hi", "/reset", "/bad"], "/bad judges PersonaFuse's last reply, and there is none yet"),
    (["Hi", "/bad", "/good"], "/good judges PersonaFuse's last reply, and it has a verdict already"),
    (["Hi", "/good yes"], "/good is not a command, or its argument is missing or too much")])
def test_a_verdict_that_cannot_be_given_is_one_line_and_writes_nothing(run_folder, here, monkeypatch, lines, why):
    args = evaluation.ChatOptions(run=str(run_folder), persona="O+", feedback="f.jsonl")
    talk = evaluation.Conversation(LoadedRun(args), args)
    monkeypatch.setattr(talk, "stream", lambda record, gate: "Yes.")
    for line in lines[:-1]:
        talk.command(line) if line[0] == "/" else talk.reply(line)
    before = Path("f.jsonl").read_bytes() if Path("f.jsonl").exists() else None
    with pytest.raises(UserError, match=why) as error:
        talk.command(lines[-1])
    assert "\n" not in str(error.value)
    assert (Path("f.jsonl").read_bytes() if Path("f.jsonl").exists() else None) == before


@pytest.mark.parametrize("content, why", [
    (b'{"query": "Hi", "verd', "line 1: not JSON .*a torn line"),
    (b'{"id": "1", "query": "Hi"}\n', "line 1: no 'similarity'"), (b"\xff\xfe", "line 1: not UTF-8"),
    (None, "Is a directory")])
def test_a_verdict_is_not_appended_to_a_file_that_holds_anything_else(here, content, why):
    Path("f.jsonl").mkdir() if content is None else Path("f.jsonl").write_bytes(content)
    line = write_lines("other.jsonl", *verdicts(1))[0]
    with pytest.raises(UserError, match=f"f.jsonl.*{why}" if content else "f.jsonl"):
        append_feedback("f.jsonl", line)
    assert content is None or Path("f.jsonl").read_bytes() == content


def test_a_line_may_have_more_fields_and_the_rounding_that_gate_takes(run_folder, here):
    """What /good writes can be read again: --gate takes weights that sum to 1.001, and chat notes them rounded."""
    args = evaluation.ChatOptions(run=str(run_folder), gate="high_openness:0.9002,low_neuroticism:0.1008")
    gate = dict(zip(EXPERTS, gate_from_options(LoadedRun(args), args)[0].tolist()))
    line = write_lines("f.jsonl", *verdicts(1))[0] | {"gate": gate, "traits": 5}
    append_feedback("g.jsonl", line)
    assert read_feedback("g.jsonl") == [line]


@pytest.mark.parametrize("change, why", [
    ({"query": " "}, "query is ' ', expected some text"), ({"similarity": {}}, "similarity is {}, expected a cosine"),
    ({"similarity": dict.fromkeys(EXPERTS, 1.5)}, "similarity is "),
    ({"gate": None}, "gate is None, expected ten weights"), ({"gate": [.1] * 10}, "gate is \\["),
    ({"gate": dict.fromkeys(EXPERTS, .2)}, "gate is .*, expected ten weights, which sum to 1"),
    ({"gate": dict.fromkeys(EXPERTS, .1) | {EXPERTS[0]: -.1, EXPERTS[1]: .3}}, "gate is "),
    ({"verdict": "fine"}, "verdict is 'fine', expected good or bad"), ({"verdict": None}, "verdict is None")])
def test_a_wrong_line_of_a_feedback_file_is_named_with_what_was_expected(here, change, why):
    lines = write_lines("f.jsonl", *verdicts(3))
    Path("f.jsonl").write_text("".join(json.dumps(line) + "\n" for line in (*lines[:2], lines[2] | change)))
    with pytest.raises(UserError, match=f"f.jsonl, line 3: {why}") as error:
        read_feedback("f.jsonl")
    assert "\n" not in str(error.value)


def test_feedback_writes_the_likes_that_user_reads_and_prints_them_with_standard_errors(run_folder, here, capsys):
    gates, good = verdicts(100)
    write_lines("f.jsonl", gates, good)
    out = said_by(capsys, f"feedback --run {run_folder} --file f.jsonl")
    b, errors, penalty = learn_likes(gates, good)
    for e, expert in enumerate(EXPERTS):
        star = " *" if abs(b[e]) > 2 * errors[e] else ""
        weight = softmax_gate(torch.tensor(b), 1.0)[e]
        assert f"{expert} " in out and f"{b[e]:+.3f} ± {errors[e]:.3f}{star}" in out and f" {weight:.3f}" in out
    assert f"penalty {penalty};" in out and "100 verdicts" in out and "do not tell" not in out
    read = LoadedRun(evaluation.Talk(run=str(run_folder), user="user.json")).likes
    assert torch.equal(read, torch.tensor(b).float()) and set(EXPERTS[e] for e in np.argsort(-b)[:2]) == {
        EXPERTS[2], EXPERTS[7]}


@pytest.mark.parametrize("n, good, strength, why", [
    (1, 1, 0, "they are fewer than ten"), (40, 1, 0, "no pole is two standard errors from 0"),
    (40, 0, 0, "no pole is two standard errors from 0"),
    (9, None, 50, "they are fewer than ten"), (40, None, 0, "no pole is two standard errors from 0")])
def test_verdicts_that_do_not_tell_are_said_not_to(run_folder, here, capsys, n, good, strength, why):
    gates, judged = verdicts(n, strength=strength)
    write_lines("f.jsonl", gates, judged if good is None else np.full(n, good))
    out = said_by(capsys, f"feedback --run {run_folder} --file f.jsonl")
    assert f"These verdicts do not tell yet: {why}.\n\nuser.json is for" in out and max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize("argv, why", [
    ("--file none.jsonl", "none.jsonl: No such file"), ("--file empty.jsonl", "empty.jsonl: no verdicts in it"),
    ("--file f.jsonl --out old.json", "old.json exists already; --overwrite"),
    ("--file f.jsonl --out other --overwrite", "other: expected another file than f.jsonl, with a name that ends in"),
    ("--file f.jsonl --out f.jsonl --overwrite", "f.jsonl: expected another file than f.jsonl, with a name that ends"),
    ("--file f.json --out ./f.json --overwrite", "f.json: expected another file than f.json, with a name that ends")])
def test_a_fit_that_cannot_be_is_refused_and_loses_nothing(run_folder, here, argv, why):
    for name in ("f.jsonl", "f.json"):
        write_lines(name, *verdicts(3))
    Path("empty.jsonl").write_text("\n"), Path("old.json").write_text("mine")
    before = {path: path.read_bytes() for path in here.iterdir()}
    with pytest.raises(UserError, match=why):
        evaluation.main(["feedback", "--run", str(run_folder), *argv.split()])
    assert {path: path.read_bytes() for path in here.iterdir()} == before
