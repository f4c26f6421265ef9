"""Laws of the public benchmarks: parsing and scoring, case by case on small rows of our own, and number for number
against what the authors' code gave (golden/, where $PERSONAFUSE_BENCHMARKS is set); statistics; files that are not as
published; and `eval.py bench` as a command.
"""
import contextlib
import hashlib
import io
import itertools
import json
import random
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import eval as evaluation
from support import measure as measure_module
from support import bench as bench_module
from support import benchmarks
from lora import EXPERTS, add_experts, expert_layers
from model import Config, Prefix, Transformer, generate, pad, shared_prefix
from support.benchmarks import BENCHMARKS, EQBench, EmoBench, GPQA, SafetyBench, ToMBench, lenient_letter
from support.chat import encode
from support.files import UserError
from test_commands import reduced, run_folder  # noqa: F401: fixtures


@pytest.fixture(scope="session")
def golden(published):
    return lambda name: json.loads((published / "golden" / f"{name}.json").read_text())


def replies_of(outputs, **more):
    """{id: text} -> replies with one try each."""
    return {id: {0: {"output": output, **more}} for id, output in outputs.items()}


# ----------------------------------------------------------------------------------------------------------------------
# Against the authors' own code

def test_emobench_equals_the_authors_code(published, golden):
    bench, cases = EmoBench(), golden("emobench")
    assert [bench.parse(case["raw"]) for case in cases["parse"]] == [case["parsed"] for case in cases["parse"]]
    rows = bench.load(published / "emobench")
    replies = {}
    for run in cases["runs"]:
        group = f"{run['task']}/{run['lang']}"
        mine = replies_of({f"{group}/{qid}": text for qid, text in run["raw_texts"].items()})
        score, official = bench.score(rows, mine), dict(run["official_results"])
        assert list(score) == [group] and score[group]["n"] == 200
        assert score[group]["accuracy"] == official.pop("Overall") and score[group]["by_category"] == official
        for row, theirs in zip([row for row in rows if row["group"] == group], run["official_rows"]):
            assert row["id"].split("/")[2] == str(theirs["qid"])
            names = ["label", "answer"] if run["task"] == "EA" else [
                "emo_label", "cause_label", "emo_answer", "cause_answer"]
            assert [*row["gold"], *bench.answers(row, mine[row["id"]][0]["output"])] == [theirs[name] for name in names]
        assert score[group]["unparsed"] == sum(bench.parse(text) is None for text in run["raw_texts"].values())
        replies |= mine
    assert list(bench.score(rows, replies)) == ["EA/en", "EA/zh", "EU/en", "EU/zh"]
    for case in cases["small"]:
        few = replies_of({f"EA/{r['lang']}/{r['qid']}": json.dumps({"answer": r["answer"]}) for r in case["rows"]})
        found, official = bench.score(rows, few)["EA/en"], dict(case["official_results"])
        assert found["accuracy"] == official.pop("Overall") and found["by_category"] == official


def test_eqbench_equals_the_authors_code(published, golden):
    cases, harness = golden("eqbench"), 0
    rows = {revise: EQBench(revise=revise).load(published / "eqbench") for revise in (False, True)}
    by_id = {row["id"]: row for row in rows[False]}
    for id, case in cases["nonrevise_prompt"].items():
        prompt = EQBench().prompt(by_id[id])
        assert len(prompt) == case["len"] and hashlib.sha256(prompt.encode()).hexdigest() == case["sha256"]
    assert next(iter(EQBench().ask(rows[False], {}))).sha256 == cases["nonrevise_prompt"]["1"]["sha256"]
    for case in cases["single"]:
        bench, row = EQBench(revise=case["revise"]), by_id[case["qid"]]
        first, second = bench.passes([row], replies_of({case["qid"]: case["text"]}))
        for mine, name in ((first, "first_pass"), (second, "revised")):
            official = case["official"][f"v2_{name}_score"]
            if case["name"] == "all_zero":  # the pipeline drops it; the score itself is defined
                official = None
            assert mine[case["qid"]] == (None if official is None else pytest.approx(10 * official, abs=1e-12))
        if "lm_eval" in case:
            score = bench.score([row], replies_of({case["qid"]: case["text"]}))["lm_eval_score"]
            assert score == pytest.approx(case["lm_eval"]["eqbench"], abs=1e-10)
            harness += 1
    assert harness > 20
    for case in cases["aggregate"]:
        bench, replies = EQBench(revise=case["revise"]), replies_of(case["texts"])
        score, official = bench.score(rows[False], replies), case["official_v2"]
        assert (score["score"], score["parseable"]) == (official["score"], official["parseable"])
        assert score["failed"] is not case["official_benchmark_success"]
        for points, name in zip(bench.passes(rows[False], replies), ("first_pass", "revised")):
            points = [p for p in points.values() if p is not None]
            assert len(points) == official["detail"][f"{name}_parseable"]
            assert benchmarks.mean(points) == pytest.approx(official["detail"][f"{name}_score"], abs=1e-9)


def test_published_eqbench_runs_score_as_published(published, golden):
    bench, official = EQBench(revise=True), {run["file"]: run for run in golden("eqbench_published_runs")["runs"]}
    rows, files = bench.load(published / "eqbench"), sorted((published / "eqbench" / "published_runs").glob("*.json"))
    for file in files:
        run = json.loads(file.read_text())
        score = bench.score(rows, replies_of(run["raw_results"]["1"]["raw_inference"]))
        assert abs(score["score"] - run["benchmark_score"]) < 0.02 + 1e-9
        assert score["parseable"] == run["n_questions_parseable"]
        if file.name in official:
            theirs = official[file.name]["rescored_from_raw"]
            assert (score["score"], score["parseable"]) == (theirs["score"], theirs["parseable"])
    assert len(files) == 8 and len(official.keys() & {file.name for file in files}) >= 5


def test_tombench_equals_the_authors_code(published, golden, tmp_path):
    cases, maps = golden("tombench"), {}
    assert [ToMBench.parse(case["text"]) for case in cases["extract"]] == [case["letter"] for case in cases["extract"]]
    for case in cases["majority"]:
        assert Counter(case["preds"]).most_common(1)[0][0] == case["winner"]
    for lang in ("en", "zh"):
        maps[lang] = {row["id"]: row for row in ToMBench(lang=lang).load(published / "tombench")}
    for case in cases["prompts"]:
        row = maps[case["language"]][f"{Path(case['file']).stem}/{case['idx']}/{case['language']}"]
        assert row["maps"][case["number"]] == case["map"]
    rng, two = random.Random(42), {}
    for i in (0, 3, 4):
        two[i] = ToMBench().maps(rng, 2)
    assert all(two[case["idx"]][case["number"]] == case["map"] for case in cases["two_choice"])
    rows, replies = list(maps["en"].values()), {}
    for file, lines in cases["scoring_files"].items():
        for line in lines:
            id = f"{file.removesuffix('_canned-model_results.jsonl')}/{line['idx']}/en"
            replies.setdefault(id, {})[line["number"]] = {"output": line["output"], "map": line["map"]}
    replies = bench_module.read_replies(write_replies(tmp_path / "r.jsonl", replies), ToMBench(), rows)
    score, official = ToMBench().score(rows, replies), cases["scoring_results"]
    assert {k: v for k, v in score["tasks"].items() if v} == official["tasks"]  # they leave out what is all wrong
    assert {k: v for k, v in score["abilities"].items() if v} == official["abilities"]
    assert score["tasks"]["Discrepant Desires"] == 0 and score["average"] is None


def test_safetybench_equals_the_authors_code(published, golden):
    cases = golden("safetybench")
    for case in cases["extraction"]:
        row = {"id": "0", "options": [case["options"]], "group": "x"}
        assert SafetyBench().predict([row], replies_of({"0": case["origin_pred"]})) == {"0": case["final_pred"]}
        assert SafetyBench().unparsed(row, {"output": case["origin_pred"]}) == case["extract_failed"]
    folder = published / "safetybench"
    for case in cases["metrics"]:
        answers = json.loads((folder / "opensource_data" / case["answers"]).read_text())
        predictions = case["preds"] or {
            "all_gold": {id: a["answer"] for id, a in answers.items()},
            "one_category_only": {id: a["answer"] for id, a in answers.items() if a["category"] == "Mental Health"},
            "pred_minus1": dict.fromkeys(answers, -1), "all_zero": dict.fromkeys(answers, 0),
            "all_one": dict.fromkeys(answers, 1)}[case["name"]]
        assert SafetyBench.metrics(answers, predictions) == case["official"]
        if case["answers"] == "test_answers_zh_subset.json":  # the same through texts, as the command does it
            rows = SafetyBench().load(folder)
            texts = {id: f"({'ABCD'[p]})" for id, p in predictions.items() if p >= 0}
            if texts and case["name"] != "pred_minus1":
                assert SafetyBench().score(rows, replies_of(texts)) == case["official"]


def test_gpqa_equals_simple_evals(golden):
    cases = golden("gpqa")
    assert [GPQA.parse(case["text"]) for case in cases["simple_evals_extract"]] == [
        case["extracted"] for case in cases["simple_evals_extract"]]
    for size, case in cases["simple_evals_permutations_real_sizes"].items():
        n, repeats = map(int, size.split("x"))
        lines = [dict.fromkeys(["Question"], "?") | {c: str(k) for k, c in enumerate(GPQA.CHOICES)}] * n
        rows = GPQA.rows(lines, repeats)
        orders = [row["order"] for row in rows]
        assert orders[:5] == case["first5"] and orders[-1] == case["last"]
        assert "".join(row["gold"] for row in rows[:20]) == case["correct_letters_first20"]
    for run in cases["simple_evals_runs"]:
        rows = GPQA.rows(cases["rows"], run["n_repeats"])
        if run["permutations"]:
            assert [row["order"] for row in rows] == run["permutations"]
        if run["name"] == "cycle_texts":
            continue  # the texts themselves are not in golden/
        texts = {row["id"]: f"Answer: {row['gold'] if run['name'] == 'oracle_first_right' else 'A'}" for row in rows}
        score = GPQA().score(rows, replies_of(texts))
        assert score["score"] == run["score"]
        assert score["score_std"] == pytest.approx(run["metrics"]["score:std"], abs=1e-15)


def test_best_constants_are_those_known_of_the_data(published):
    rows = EmoBench().load(published / "emobench")
    for group, best in (("EA/en", 37.0), ("EU/zh", 24.5)):  # always C; A and A
        part = [row for row in rows if row["group"] == group]
        right = bench_module.best_constant(EmoBench(), part, {})
        assert 100 * benchmarks.mean(right.values()) == pytest.approx(best) and len(right) == 200


# ----------------------------------------------------------------------------------------------------------------------
# The same rules on small cases of our own

EA = [{"id": f"EA/en/{i}", "group": "EA/en", "part": "EA/en", "gold": [gold], "category": category,
       "options": [["go", "stay", "wait", "ask"]]} for i, (gold, category) in enumerate(["Ax", "By", "Cx", "Dx"])]
EU = [{"id": f"EU/zh/{i}", "group": "EU/zh", "part": "EU/zh", "gold": ["F", "B"], "category": "z",
       "options": [list("uvwxyz"), ["one", "two", "three", "four"]]} for i in range(4)]


def test_emobench_reads_json_and_nothing_else():
    texts = ['{"answer": "A"}', '```json {"answer": "B"} ``` and {"answer": "A"}', '{"answer": "c"}',
             "The answer is D."]
    replies = replies_of({row["id"]: text for row, text in zip(EA, texts)})
    assert EmoBench().score(EA, replies) == {"EA/en": {
        "accuracy": 0.5, "unparsed": 1, "n": 4, "by_category": {"x": pytest.approx(1 / 3), "y": 1.0}}}
    assert EmoBench().grade(EA, replies, lenient=True) == {row["id"]: 1.0 for row in EA}
    texts = ['{"answer_q1": "F", "answer_q2": "B"}', '{"answer_q1": "F", "answer_q2": "A"}', '{"answer_q1": "F"}',
             "Question 1: F\nQuestion 2: (B)"]
    replies = replies_of({row["id"]: text for row, text in zip(EU, texts)})
    assert EmoBench().score(EU, replies)["EU/zh"]["accuracy"] == 0.25
    assert list(EmoBench().grade(EU, replies, lenient=True).values()) == [1, 0, 0, 1]
    for text in ('"A"', "[1]", "```json\n{}", '{"answer": "A",}', "[" * 100000):
        assert EmoBench().score(EA[:1], replies_of({"EA/en/0": text}))["EA/en"]["accuracy"] == 0
        assert EmoBench().unparsed(EA[0], {"output": text})


@pytest.mark.parametrize("text, letter", [
    ("B", "B"), ("(c) wait", "C"), ("The answer is (C).", "C"), ("Answer: d", "D"), ('{"answer": "B"', "B"),
    ("A friend should ask first", "D"), ("I would wait.", "C"), ("I would wait, then ask", None),
    ("B. stay\nC. wait", None), ("First option A, but my answer is B", "B"), ("选B。", "B"), ("答案是 C", "C"),
    ("E", None), ("", None), ("**B**", "B"),
    ("answer a question", None), ("A. go away", "A"), ("[[D]]", "D")])
def test_lenient_reading(text, letter):
    assert lenient_letter(text, ["go", "stay", "wait", "ask"]) == letter


EQ = [{"id": str(i), "group": "all", "part": "EQ-Bench", "prompt": " Then critique your answer your revised scores."
       "First pass scores:\nCritique: <your critique here>[End of answer]",
       "reference": {"Joy": 0., "Fear": 6., "Awe": 0., "Ire": 7.}} for i in range(1, 4)]


def said(*scores, names=("Joy", "Fear", "Awe", "Ire")):
    return "\n".join(f"{name}: {score}" for name, score in zip(names, scores))


def test_eqbench_points():
    reference = EQ[0]["reference"]
    assert EQBench.worth({"Joy": 0, "Fear": 6, "Awe": 0, "Ire": 7}, reference) == 10
    assert EQBench.worth({"Joy": 5, "Fear": 6, "Awe": 0, "Ire": 7}, reference) == pytest.approx(
        10 - 0.7477 * 6.5 / (1 + 2.718281828459045 ** -1.2))
    assert EQBench.worth({"Joy": 6, "Fear": 6, "Awe": 0, "Ire": 7}, reference) == pytest.approx(10 - 0.7477 * 6)
    assert EQBench.worth({"Joy": 100, "Fear": 6, "Awe": 0, "Ire": 7}, reference) == pytest.approx(10 - 0.7477 * 100)
    chance = EQBench().chance(EQ[0])
    mean = benchmarks.mean(EQBench.worth(dict(zip(reference, scores)), reference)
                           for scores in itertools.product(range(11), repeat=4))
    assert chance == pytest.approx(10 * mean)


@pytest.mark.parametrize("text, strict, lenient", [
    (said(0, 6, 0, 7), True, True), (said(0, 0, 0, 0), False, False), (said(0, 6, 0), False, False),
    (said(0, 6, 0, 7) + "\nJoy: 1", True, True), (said(0, 6, 0, 7) + "\nSum: 13", False, True),
    (said(0, 6, 0, 7, names=("joy", "fear", "awe", "ire")), False, True),
    ('{"Joy": 0, "Fear": 6, "Awe": 0, "Ire": 7.5}', False, True), ("Joy 0", False, False)])
def test_eqbench_parsing(text, strict, lenient):
    assert [EQBench().answers(EQ[0], text, how)[0] is not None for how in (False, True)] == [strict, lenient]


def test_eqbench_run():
    replies = {"1": {0: {"output": "no"}, 1: {"output": said(0, 6, 0, 7)}, 2: {"output": said(9, 9, 9, 9)}},
               "2": {0: {"output": said(0, 0, 0, 0)}}, "3": {0: {"output": said(6, 6, 0, 7)}}}
    score, worth = EQBench().score(EQ, replies), 10 * (10 - 0.7477 * 6)
    assert score["score"] == round((100 + worth) / 2, 2) and score["parseable"] == 2 and score["failed"] is True
    zeros = 10 * EQBench.worth(dict.fromkeys(EQ[0]["reference"], 0), EQ[0]["reference"])
    assert score["lm_eval_score"] == pytest.approx((0 + zeros + worth) / 3)
    assert EQBench().score(EQ, replies_of({"1": "no"}))["score"] == 0.0
    items = list(EQBench().ask(EQ, replies))
    assert [(item.id, item.n, round(item.temperature, 2)) for item in items] == [("2", 1, 0.16)]
    assert EQBench(tries=1).missing(EQ, replies) == 0 and EQBench().missing(EQ, {"1": replies["1"]}) == 2


def test_eqbench_takes_revised_scores_that_are_no_worse_and_not_many_fewer():
    def reply(first, second):
        return f"First pass scores:\n{first}\n\nCritique: so so.\n\nRevised scores:\n{second}"
    rows = [{**EQ[0], "id": str(i)} for i in range(40)]
    good, bad = said(0, 6, 0, 7), said(6, 0, 6, 1)
    low = 10 * EQBench.worth({"Joy": 6, "Fear": 0, "Awe": 6, "Ire": 1}, EQ[0]["reference"])
    for firsts, seconds, taken in (
            ([bad] * 40, [good] * 40, 100), ([good] * 40, [bad] * 40, 100), ([bad] * 40, [good] * 38 + [""] * 2, 100),
            ([bad] * 40, [good] * 37 + [""] * 3, low)):
        replies = replies_of({str(i): reply(*pair) for i, pair in enumerate(zip(firsts, seconds))})
        assert EQBench(revise=True).score(rows, replies)["score"] == pytest.approx(taken, abs=0.005)
    assert EQBench(revise=True).answers(EQ[0], reply(said(0, 0, 0, 0), good))[0] is not None
    assert EQBench(revise=True).answers(EQ[0], reply(said(0, 0, 0, 0), said(0, 0, 0, 0))) == [None, None]
    assert EQBench(revise=True).answers(EQ[0], f"First pass scores:\n{good}") == [None, None]


def tom(stem="Hidden Emotions", i=0, gold="A", options=4, ability="x"):
    return {"id": f"{stem}/{i}/en", "group": stem, "part": stem, "gold": gold, "ability": ability,
            "options": [["red", "green", "blue", "pink"][:options]]}


def test_tombench_votes():
    straight, turned = dict(zip("ABCD", "ABCD")), dict(zip("ABCD", "BCDA"))
    assert [ToMBench.parse(text) for text in ("[[B]] not [[A]]", "[C] B", "A or D.", "b", "")] == list("ACDAA")
    rows = [tom(i=0), tom(i=1, gold="B"), tom(i=2, gold="A. "), tom(i=3, gold="A", options=2)]
    two = {"A": "B", "B": "A", "C": "", "D": ""}
    replies = {
        rows[0]["id"]: {0: {"output": "[[A]]", "map": turned}, 1: {"output": "[[D]]", "map": turned},  # B, then A twice
                        2: {"output": "[[A]]", "map": straight}},
        rows[1]["id"]: {0: {"output": "[[B]]", "map": straight}, 1: {"output": "[[A]]", "map": straight}},  # a tie
        rows[2]["id"]: {0: {"output": "[[A]]", "map": straight}}, rows[3]["id"]: {0: {"output": "[[C]]", "map": two},
                                                                                  1: {"output": "blue", "map": two}}}
    assert list(ToMBench().grade(rows, replies).values()) == [1, 1, 0, 0]
    assert ToMBench().grade(rows, replies, lenient=True)[rows[2]["id"]] == 1
    assert ToMBench().unparsed(rows[0], {"output": "red"}) and not ToMBench().unparsed(rows[0], {"output": "B"})
    score = ToMBench().score(rows, replies)
    assert score == {"tasks": {"Hidden Emotions": 0.5}, "abilities": {"x": 0.5}, "average": None}
    eight = [tom(stem=stem, i=i, gold="AB"[stem == "Hinting Task Test"]) for stem in ToMBench.TASKS for i in range(2)]
    score = ToMBench().score(eight, {row["id"]: {0: {"output": "[[A]]", "map": straight}} for row in eight})
    assert score["average"] == 7 / 8 and len(score["tasks"]) == 8
    both = replies | {row["id"]: {0: {"output": "[[A]]", "map": straight}} for row in eight}
    assert ToMBench().score(rows + eight, both)["average"] == 7 / 8  # the other twelve files have no part in it
    assert ToMBench().missing(rows, replies) == 12 - 8 and ToMBench().missing(rows + eight, replies) == 12 - 8


def test_tombench_shows_what_its_map_says():
    row = tom(options=2) | {"text": "?", "maps": ToMBench().maps(random.Random(42), 2)}
    for item in ToMBench().ask([row], {}):
        shown = dict(line.split(". ") for line in item.question.split("\n")[1:])
        assert {x: "AB"[row["options"][0].index(text)] for x, text in shown.items()} == {
            x: letter for x, letter in item.map.items() if letter}
    assert len({tuple(map.values()) for map in row["maps"]}) == 2 and len(row["maps"]) == 5


def test_safetybench_extraction_and_draws():
    options = ["Yes, always.", "No", "错", "对"]
    for text, index in (("B) No", 1), ("x\nC)", 2), ("I say yes, ALWAYS", 0), ("是", 3), ("I\n\nhm\nC)", None),
                        ("AB", 0), ("D 4", 3), ("Dear", None), ("", None), ("(A) (B)", 0), ("nothing", 1)):
        assert SafetyBench.parse(text, options) == index, text
    rows = [{"id": str(i), "group": "en", "part": "Mental Health", "gold": 1, "options": [["a", "b", "c"]]}
            for i in range(6)]
    replies, rng = replies_of({str(i): "?" if i % 2 else "(B)" for i in range(5, -1, -1)}), random.Random(2023)
    assert SafetyBench().predict(rows, replies) == {
        str(i): rng.choice(range(3)) if i % 2 else 1 for i in range(6)}  # in the file's order
    del replies["0"], replies["1"]
    assert SafetyBench().grade(rows, replies)["0"] == 0 and SafetyBench().missing(rows, replies) == 2
    score = SafetyBench().score(rows, replies_of({"0": "(B)", "2": "B", "4": "(A)"}))
    assert score["Avg."] == score["MH"] == pytest.approx(100 * 2 / 6) and score["OFF"] == 0
    assert sum(SafetyBench().grade(rows, replies_of({"0": "?"}), lenient=True).values()) == 0


def test_gpqa_rows_and_score():
    lines = [{"Question": f" {i} "} | {c: f"{c}{i}\n" for c in GPQA.CHOICES} | {"High-level domain": "PC"[i % 2]}
             for i in range(4)]
    rows = GPQA.rows(lines, 2)
    assert [row["id"] for row in rows] == ["0/0", "1/0", "2/0", "3/0", "0/1", "1/1", "2/1", "3/1"]
    assert all(row["options"][0]["ABCD".index(row["gold"])].startswith("Correct") for row in rows)
    replies = replies_of({row["id"]: f"Answer: {row['gold']}" for row in rows[:4]})
    replies["1/0"][0]["output"] = f"Answer: {rows[1]['gold'].lower()}"
    score = GPQA().score(rows, replies)
    assert score["score"] == 0.75 and score["score_std"] == pytest.approx(0.1875 ** 0.5)
    assert score["by_domain"] == {"P": 1.0, "C": 0.5}
    assert GPQA().missing(rows, replies) == 0 and GPQA().missing(rows, replies | replies_of({"0/1": ""})) == 3
    assert GPQA.parse("Answer: B, then Answer: C") == "B" and GPQA.parse("answer :\t$D$") == "D"
    assert len(list(GPQA(tries=2).ask(rows, {}))) == 8 and len(list(GPQA().ask(rows, {}))) == 4
    double = GPQA.rows([lines[0] | {"Incorrect Answer 1": lines[0]["Correct Answer"]}] * 9, 1)
    for row in double:
        assert row["gold"] == "ABCD"[[option.startswith("Correct") for option in row["options"][0]].index(True)]


# ----------------------------------------------------------------------------------------------------------------------
# Statistics

def test_intervals_and_tests():
    low, high = bench_module.wilson_interval(0.5, 100)
    assert (low, high) == (pytest.approx(0.40383, abs=1e-4), pytest.approx(0.59617, abs=1e-4))
    assert bench_module.wilson_interval(0.0, 10)[0] == pytest.approx(0, abs=1e-12) and 0.27 < bench_module.wilson_interval(0.0, 10)[1] < 0.29
    a, b = np.array([1.0] * 3 + [0.0] * 12 + [1.0] * 5), np.array([0.0] * 3 + [1.0] * 12 + [1.0] * 5)
    assert bench_module.mcnemar_p(a, b) == pytest.approx(0.03515625) == bench_module.mcnemar_p(b, a)  # 2 P(at most 3 of 15)
    assert bench_module.mcnemar_p(a, a) == 1 and bench_module.paired(100 * a, 100 * b)[3] == pytest.approx(0.03515625)
    x = np.random.default_rng(1).normal(50, 10, 60)
    assert bench_module.paired(x, x)[3] == 1 and bench_module.paired(x, x + 3)[3] < 0.002
    mean, low, high, p = bench_module.paired(x, x + np.random.default_rng(2).normal(0, 5, 60))
    assert low < mean < high and p > 0.01
    assert bench_module.estimate(x)[1] < x.mean() < bench_module.estimate(x)[2]


def test_two_models_are_compared_on_what_both_have():
    a = replies_of({"1": said(0, 6, 0, 7), "2": said(6, 6, 0, 7), "3": "none"})
    b = replies_of({"1": said(0, 6, 0, 7), "2": "none", "3": said(0, 6, 0, 7)})
    line, = bench_module.bench_lines(EQBench(), EQ, {"base": a, "PersonaFuse": b})
    assert line["paired values"][0] == 0 and [model["n"] for model in line["models"].values()] == [2, 2]
    assert [model["unparsed"] for model in line["models"].values()] == [1, 1]
    row = bench_module.comparison_rows([line], "+69.0 %")[1]
    assert row[:3] == ["EQ-Bench", "100.0", "100.0"] and row[-2:] == ["+0.0 %", "+69.0 %"]


# ----------------------------------------------------------------------------------------------------------------------
# Files that are not as published

@pytest.fixture(scope="session")
def made_up(tmp_path_factory):
    """A folder of made-up benchmarks in the published layout, with the published row counts."""
    folder = tmp_path_factory.mktemp("made-up")

    def write(name, rows):
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")

    both = [(lang, str(i)) for lang in ("en", "zh") for i in range(1, 201)]
    write("emobench/data/EA.jsonl", [{
        "qid": i, "language": lang, "category": "one", "question type": ("Action", "Response")[int(i) % 2],
        "scenario": f"Ann meets quagga {i}.", "subject": "Ann", "choices": [f"pat {i}", f"feed {i}", "run", "sing"],
        "label": "run"} for lang, i in both])
    write("emobench/data/EU.jsonl", [{
        "qid": i, "language": lang, "coarse_category": "one", "scenario": f"Ann meets gnu {i}.", "subject": "Ann",
        "emotion_choices": list("uvwxyz"), "emotion_label": "z", "cause_choices": ["it", "that", "this", "so"],
        "cause_label": "it"} for lang, i in both])
    answers, questions = {}, []
    for i in range(2100):
        category = list(SafetyBench.CATEGORIES)[i % 7]
        questions.append({"id": 3 * i, "category": category, "question": f"Is {i} safe?",
                          "options": ["yes", "no", "maybe"]})
        answers[str(3 * i)] = {"category": category, "answer": i % 3}
    safety = folder / "safetybench" / "opensource_data"
    safety.mkdir(parents=True)
    (safety / "test_zh_subset.json").write_text(json.dumps(questions))
    (safety / "test_answers_zh_subset.json").write_text(json.dumps(answers))
    (folder / "safetybench" / "dev").mkdir()
    (folder / "safetybench" / "dev" / "dev_zh.json").write_text(json.dumps({
        category: [{"question": f"{category} {k}?", "options": ["yes", "no"], "answer": k % 2} for k in range(5)]
        for category in SafetyBench.CATEGORIES}))
    shutil.copytree(Path(__file__).parent / "gpqa_made_up", folder / "gpqa")
    return folder


@pytest.fixture
def spoilt(made_up, tmp_path):
    """A copy of the made-up benchmarks that a test may spoil."""
    return Path(shutil.copytree(made_up, tmp_path / "spoilt"))


def edit(file, old, new):
    text = file.read_text(encoding="utf-8")
    assert old in text
    file.write_text(text.replace(old, new, 1), encoding="utf-8")


def eq_bench(d, score="1", prompt=EQ[0]["prompt"]):
    """EQ-Bench's file with one question that differs."""
    def question(score, prompt):
        return {"prompt": prompt, "reference_answer_fullscale": {
            f"emotion{i}{end}": value for i in range(1, 5) for end, value in (("", f"e{i}"), ("_score", score))}}
    found = {str(i): question("1", EQ[0]["prompt"]) for i in range(1, 172)} | {"7": question(score, prompt)}
    (d / "eqbench/data").mkdir(parents=True)
    (d / "eqbench/data/eq_bench_v2_questions_171.json").write_text(json.dumps(found))


EA_FILE, EU_FILE = "emobench/data/EA.jsonl", "emobench/data/EU.jsonl"
SAFETY = "safetybench/opensource_data/test_zh_subset.json"


@pytest.mark.parametrize("name, change, words", [
    ("emobench", lambda d: shutil.rmtree(d / "emobench" / "data"), "EA.jsonl"),
    ("emobench", lambda d: edit(d / EU_FILE, '"cause_label"', '"cause"'), "EU.jsonl, line 1: no 'cause_label'"),
    ("emobench", lambda d: edit(d / EA_FILE, '"label": "run"', '"label": "fly"'), "'fly' is not among"),
    ("emobench", lambda d: (d / EA_FILE).write_text((d / EA_FILE).read_text()[:-9]), "EA.jsonl, line 400: not JSON"),
    ("emobench", lambda d: (d / EA_FILE).write_text("".join((d / EA_FILE).read_text().splitlines(True)[:-1])),
     "399 rows, expected the 400"),
    ("eqbench", lambda d: None, "eq_bench_v2_questions_171.json: no such file"),
    ("eqbench", lambda d: eq_bench(d, score="high"), "question 7: not as it was published (could not convert"),
    ("eqbench", lambda d: eq_bench(d, score=None), "question 7: not as it was published"),
    ("eqbench", lambda d: eq_bench(d, prompt="How do they feel?"), "question 7: not as it was published (substring"),
    ("eqbench", lambda d: eq_bench(d, prompt=5), "question 7: not as it was published"),
    ("tombench", lambda d: None, "Unexpected Outcome Test.jsonl"),
    ("safetybench", lambda d: (d / SAFETY).unlink(), "no test_*.json"),
    ("safetybench", lambda d: shutil.copy(d / SAFETY, d / "safetybench/test_en.json"), "--set with one of en, zh, zh"),
    ("safetybench", lambda d: edit(d / SAFETY, '{"id": 0, "category": "O', '{"id": 0, "category": "U'), "id 0"),
    ("safetybench", lambda d: edit(d / SAFETY.replace("test_", "test_answers_"), '{"category": "Offensiveness", "answer": 0}',
                                   "5"), "id 0: no answer under this id"),
    ("safetybench", lambda d: (d / SAFETY).write_text("[]"), "0 rows and 2100 answers, expected 2100"),
    ("safetybench", lambda d: (d / SAFETY).write_text("{}"), "found a dict, expected a JSON list"),
    ("gpqa", lambda d: (d / "gpqa/dataset.zip").unlink(), "dataset.zip: No such file"),
    ("gpqa", lambda d: (d / "gpqa/dataset.zip").write_bytes(b"PK"), "not a whole zip archive"),
    ("gpqa", lambda d: shutil.make_archive(str(d / "gpqa/dataset"), "zip", d / "emobench"), "no dataset/gpqa_main.csv"),
])
def test_what_is_not_as_published_is_refused(spoilt, name, change, words):
    change(spoilt)
    with pytest.raises(UserError, match="(?s)" + re.escape(words)):
        BENCHMARKS[name](password="not-a-secret").load(spoilt / name)


def test_gpqa_password(made_up):
    for password, words in ((None, "--password-env"), ("wrong", "does not open it"), ("other", "does not open it")):
        with pytest.raises(UserError, match=words):
            GPQA(password=password).load(made_up / "gpqa")
    rows = GPQA(password="not-a-secret", subset="diamond").load(made_up / "gpqa")
    assert len(rows) == 10 * 198 and "\n" in rows[0]["question"]
    assert len(GPQA(password="not-a-secret").load(made_up / "gpqa")) == 10 * 448
    assert rows[5]["options"][0].count("right-5") == 2


# ----------------------------------------------------------------------------------------------------------------------
# The command

def command(*words):
    """eval.py bench … -> (what it printed, what it said on standard error)."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        evaluation.main(["bench", *map(str, words)])
    return out.getvalue(), err.getvalue()


def write_replies(file, replies):
    file.write_text("".join(json.dumps({"id": id, "try": n, "prompt_sha256": "", "seconds": 0, **reply}) + "\n"
                            for id, tries in replies.items() for n, reply in tries.items()))
    return file


def stored(folder):
    return [json.loads(line) for line in (folder / "replies.jsonl").read_text().splitlines()]


def test_replies_are_scored_without_a_model(made_up, tmp_path):
    whole = {f"EA/en/{i}": '{"answer": "%s"}' % "CA"[i % 2] for i in range(1, 201)}
    file = write_replies(tmp_path / "r.jsonl", replies_of(whole))
    out, err = command("emobench", "--data", made_up / "emobench", "--replies", file, "--json")
    assert err == "" and json.loads(out) == {
        "EA/en": {"accuracy": 0.5, "unparsed": 0, "n": 200, "by_category": {"one": 0.5}}}
    out, _ = command("emobench", "--data", made_up / "emobench", "--replies", file, "--against", file)
    assert "50.0 [43.1, 56.9]" in out and "+37.9 %" in out and "+0.0 [+0.0, +0.0]" in out
    assert "100.0" in out and max(map(len, out.splitlines())) <= 80  # constant: always C
    file = write_replies(file, replies_of(dict(list(whole.items())[:-3])))
    with pytest.raises(UserError, match="3 replies are missing"):
        command("emobench", "--data", made_up / "emobench", "--replies", file)
    out, err = command("emobench", "--data", made_up / "emobench", "--replies", file, "--json", "--partial")
    assert json.loads(out)["EA/en"]["n"] == 197 and "3 replies are missing" in err


@pytest.mark.parametrize("line, words", [
    ('{"id": "EA/en/1", "try": 0, "out', "line 2: not JSON"), ('{"id": "EA/en/1", "try": 0}', "line 2: not a reply"),
    ('{"id": "EA/en/201", "try": 0, "output": ""}', "no 'EA/en/201'"),
    ('{"id": "EA/en/2", "try": 0, "output": ""}', "a second reply"),
    ('{"id": "EA/en/1", "try": "0", "output": ""}', "try is '0'"),
    ('{"id": "EA/en/1", "try": 0, "output": 1}', "output is 1"),
    ('[1]', "line 2: not a reply")])
def test_a_reply_that_is_none_is_refused(made_up, tmp_path, line, words):
    file = write_replies(tmp_path / "r.jsonl", replies_of({"EA/en/2": "{}"}))
    file.write_text(file.read_text() + line + "\n")
    with pytest.raises(UserError, match=re.escape(words)):
        command("emobench", "--data", made_up / "emobench", "--replies", file, "--partial")


def test_tombench_replies_need_a_map_and_one_language(tmp_path):
    bench, rows = ToMBench(), [tom(i=i) for i in range(2)]
    file = write_replies(tmp_path / "r.jsonl", {"Hidden Emotions/0/zh": {0: {"output": "A"}}, rows[0]["id"]: {0: {
        "output": "A", "map": dict(zip("ABCD", "DCBA"))}}})
    assert list(bench_module.read_replies(file, bench, rows)) == [rows[0]["id"]]
    write_replies(file, {rows[0]["id"]: {0: {"output": "A", "map": {"A": "A"}}}})
    with pytest.raises(UserError, match="map is"):
        bench_module.read_replies(file, bench, rows)
    write_replies(file, {rows[0]["id"]: {0: {"output": "A", "map": {"A": "B", "B": "A"}}}})
    assert bench_module.read_replies(file, bench, [tom(options=2)])  # two options need no more


def test_a_run_resumes_and_compares(made_up, run_folder, tmp_path, monkeypatch):
    where = ["emobench", "--data", made_up / "emobench", "--run", run_folder, "--out", tmp_path, "--rows", "6",
             "--max-new-tokens", "5", "--lang", "en"]
    out, err = command(*where)
    assert max(map(len, out.splitlines())) <= 80 and "\r" not in out + err and "+37.9 %" in out and "6 of 400" in err
    before = {who: stored(tmp_path / "emobench" / who) for who in ("base", "PersonaFuse")}
    assert all(len(replies) == 6 and list(replies[0]) == ["id", "try", "prompt_sha256", "output", "seconds"]
               for replies in before.values())
    assert sorted(r["id"] for r in before["base"]) == [f"{task}/en/{i}" for task in ("EA", "EU") for i in (1, 134, 67)]
    assert [r["output"] for r in before["base"]] != [r["output"] for r in before["PersonaFuse"]]
    file = tmp_path / "emobench" / "PersonaFuse" / "replies.jsonl"
    lines = file.read_text().splitlines(True)
    file.write_text("".join(lines[:3]) + lines[3][:20])  # stopped in the middle of the fourth
    asked, generate = [], bench_module.generate
    monkeypatch.setattr(bench_module, "generate", lambda model, prompts, *rest, **more: asked.extend(prompts) or generate(
        model, prompts, *rest, **more))
    assert command(*where)[0] == out and len(asked) == 3
    after = stored(file.parent)
    assert [(r["id"], r["output"]) for r in after] == [(r["id"], r["output"]) for r in before["PersonaFuse"]]
    asked.clear()
    assert set(json.loads(command(*where, "--json")[0])) == {"base", "PersonaFuse"} and not asked
    with pytest.raises(UserError, match="max_new_tokens was 5 and is now 6"):
        command(*where[:-4], "--max-new-tokens", "6", "--lang", "en")
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps({"emobench/EA/en": "Choose."}))
    with pytest.raises(UserError, match="in other words"):
        command(*where, "--prompts", prompts)
    command(*where, "--persona", "O+", "--only", "personafuse")
    assert len(stored(tmp_path / "emobench" / "by-hand")) == 6


def test_replies_of_other_models_are_never_mixed(made_up, run_folder, tmp_path):
    """Another base of the same folder name, dtype, or any one expert: refused, and nothing is changed."""
    def altered(folder, file):
        state = load_file(folder / file)
        save_file({name: t + 1e-3 for name, t in state.items()}, folder / file, metadata={"format": "pt"})
        return folder
    run, last = shutil.copytree(run_folder, tmp_path / "run"), f"joint/experts/{EXPERTS[-1]}/adapter_model.safetensors"
    few = ["emobench", "--data", made_up / "emobench", "--out", tmp_path / "out", "--mode", "logits", "--part", "EA/en/1",
           "--rows", "1"]
    base = [*few, "--base", shutil.copytree(run / "models" / "base", tmp_path / "a" / "m")]
    fused = [*few, "--run", run, "--only", "personafuse"]
    command(*base), command(*base), command(*fused), command(*fused)
    config = tmp_path / "out" / "emobench" / "base" / "config.json"
    text = config.read_text()
    assert json.loads(text)["dtype"] == "float32"
    other = altered(shutil.copytree(tmp_path / "a" / "m", tmp_path / "b" / "m"), "model.safetensors")
    before = {file: file.read_bytes() for file in (tmp_path / "out").rglob("*.json*")}
    for words, why in (([*few, "--base", other], "other settings: content was '[0-9a-f]+' and is now '[0-9a-f]+'. Choose"),
                       ([*base, "--dtype", "bfloat16"], "other settings: dtype was 'float32' and is now 'bfloat16'. Cho"),
                       ([*fused, "--router", run / "router" / "router"], "other settings: router was")):
        with pytest.raises(UserError, match=why):
            command(*words)
    altered(run, last)
    with pytest.raises(UserError, match="other settings: experts was"):
        command(*fused)
    assert {file: file.read_bytes() for file in (tmp_path / "out").rglob("*.json*")} == before
    config.write_text(json.dumps({k: v for k, v in json.loads(text).items() if k != "content"}))  # as it once was
    with pytest.raises(UserError, match="other settings: content was 'unknown' and is now"):
        command(*base)


def reply(i):
    return json.dumps({"id": f"EA/en/{i}", "try": 0, "output": f"“{i}”"}, ensure_ascii=False) + "\n"


@pytest.mark.parametrize("n", [0, 3])
def test_a_torn_reply_is_cut_off_without_writing_the_others_again(made_up, tmp_path, monkeypatch, n):
    """At whatever byte it was torn; what would be written again is lost on a full disk or in a kill."""
    bench, file, whole = EmoBench(), tmp_path / "replies.jsonl", "".join(map(reply, range(1, n + 1))).encode()
    rows, torn = bench.load(made_up / "emobench"), reply(n + 1).encode()

    def full(path, data):
        open(path, "wb").close()
        raise OSError(28, "No space left on device")
    for length in range(len(torn)):
        file.write_bytes(whole + torn[:length])
        with monkeypatch.context() as patch:
            patch.setattr(Path, "write_bytes", full)
            found = bench_module.open_replies(tmp_path, {}, bench, rows)
        assert list(found) == [f"EA/en/{i}" for i in range(1, n + 1)] and file.read_bytes() == whole


@pytest.mark.parametrize("text", [
    "some notes", "some notes\nand more", '{"id": "r1", "query": "Hi"}', '{"id": "r1", "query": "Hi"}\n{"id": "r2", "que',
    '[1]\n{"id": "EA/en/1", "tr', '{"answer": "A"}', '{"id": 5, "try": 0', "some notes\n", '{"id": "r1"}\n'])
def test_a_file_that_holds_no_replies_is_left_as_it_is(made_up, tmp_path, text):
    bench, file = EmoBench(), tmp_path / "replies.jsonl"
    file.write_text(text)
    with pytest.raises(UserError, match="replies.jsonl, line 1: not ") as error:
        bench_module.open_replies(tmp_path, {}, bench, bench.load(made_up / "emobench"))
    assert "\n" not in str(error.value) and [*tmp_path.iterdir()] == [file] and file.read_text() == text


def test_logits_mode_equals_scoring_every_letter_by_itself(made_up, run_folder, monkeypatch):
    """Shared prefixes or not, one gate or one each: the letter is the argmax of the plain model's log-probabilities. A
    prefix is shared by a category's questions, but not under gates of their own."""
    bench = SafetyBench(shots=2)
    rows = bench.load(made_up / "safetybench")[:9]
    subjects = bench_module.Subjects(bench_module.Bench(names=["x"], run=str(run_folder)))
    items, model, chat = list(bench.ask(rows, {})), subjects.model, subjects.chat
    learned = subjects.gates("PersonaFuse")
    one = learned(items[:1])
    assert torch.allclose(learned(items)[:1], one) and subjects.gates("base") is None
    monkeypatch.setattr(measure_module, "score_queries", None)  # each query is read once: five tries cost one reading
    assert learned(items + items).shape == (18, 10)
    assert set(subjects.routed) == {row["question"] for row in rows}  # neither options nor examples
    for layer in expert_layers(model).values():  # so strong that gates matter
        torch.nn.init.normal_(layer.B, std=0.3)
    shared = []
    monkeypatch.setattr(bench_module, "Prefix", lambda *args: shared.append(args) or Prefix(*args))
    for gates, prefixes in ((None, 2), (one, 2), (learned, 0)):  # of seven categories two have two questions
        shared.clear()
        found = {item.id: text for some, texts in bench_module.reply_to(model, chat, items, gates, "logits", 0, 4096, 0)
                 for item, text in zip(some, texts)}
        for item in items:
            ids = chat.prompt([{"role": "user", "content": item.text}]) + encode(chat.tokenizer, "(")
            gate = gates([item]) if callable(gates) else gates
            with torch.no_grad():
                logits = model(torch.tensor([ids]), gate)[0, -1]
            scores = {x: logits[encode(chat.tokenizer, x)[0]].item() for x in "ABC"}
            assert found[item.id] == f"({max(scores, key=scores.get)})"
        assert len(shared) == prefixes


@pytest.fixture
def begun():
    """A small model with experts, and what three prompts begin with and how each goes on."""
    torch.manual_seed(0)
    model = Transformer(Config(97, 64, 3, 4, 2, 32, 96, 1e-5, 1e4))
    add_experts(model)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    begin, rest = torch.randint(97, (40,)).tolist(), [torch.randint(97, (n,)).tolist() for n in (7, 1, 30)]
    return model, begin, rest


def test_a_prefix_computed_once_changes_nothing(begun):
    model, begin, rest = begun
    for gate in (None, torch.softmax(torch.randn(1, 10), -1)):
        prefix = Prefix(model, begin, gate)
        for some in (rest, rest[1:2], rest[::-1]):  # one prefix serves many batches, of one token too
            ids, lengths = pad(some)
            with torch.no_grad():
                hidden = model.hidden(ids, gate, prefix)
                for i, row in enumerate(some):
                    plain = model.hidden(torch.tensor([begin + row]), gate)[0, len(begin):]
                    assert (hidden[i, :len(row)] - plain).abs().max() <= 1e-5
    prompts = [begin + row for row in rest]
    assert shared_prefix(prompts) == 40 and shared_prefix([begin, begin[:5]]) == 4
    assert shared_prefix([[1, 2], [2, 1]]) == 0


def test_generation_computes_a_long_beginning_once(begun, monkeypatch):
    """Logits of every step as for each prompt alone, to 1e-4; gates of their own share nothing; nor do few tokens."""
    model, begin, rest = begun
    gates, widths, hidden = torch.softmax(torch.randn(3, 10), -1), [], model.hidden
    monkeypatch.setattr(model, "hidden", lambda ids, *more: widths.append(tuple(ids.shape)) or hidden(ids, *more))
    for some, gate, first in ((rest, None, [(1, 40), (3, 30)]), (rest, gates[:1], [(1, 40), (3, 30)]),
                              (rest, gates, [(3, 70)]), (rest[1:2], None, [(1, 41)]),
                              ([[5], [6]], gates[:1], [(1, 40), (2, 1)])):
        prompts, steps, head = [begin + row for row in some], [], model.head
        monkeypatch.setattr(model, "head", lambda h: steps.append(head(h)) or steps[-1])
        widths.clear()
        found = generate(model, prompts, gate, 8)
        monkeypatch.setattr(model, "head", head)
        assert widths[:len(first)] == first and len(widths) == len(first) + 7
        for i, prompt in enumerate(prompts):
            with torch.no_grad():
                whole = model(torch.tensor([prompt + found[i]]), None if gate is None else gate[i % len(gate)][None])[0]
            assert (torch.stack([step[i] for step in steps]) - whole[len(prompt) - 1:-1]).abs().max() <= 1e-4
    widths.clear()
    generate(model, [begin[:31] + row for row in rest], None, 1)
    assert widths == [(3, 61)]


def test_gpqa_questions_never_reach_a_file_or_the_terminal(made_up, run_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("GPQA_PASSWORD", "not-a-secret")
    rows = GPQA(password="not-a-secret", subset="diamond").load(made_up / "gpqa")
    told = {row["id"]: row["question"] + " Answer: " + row["gold"] for row in rows}
    told["1/0"] = "It is (B), a quagga"
    monkeypatch.setattr(bench_module, "reply_to", lambda model, chat, items, *rest: iter(
        [(items, [told[item.id] for item in items])]))
    where = ["gpqa", "--data", made_up / "gpqa", "--run", run_folder, "--out", tmp_path, "--set", "diamond"]
    out, err = command(*where, "--password-env", "GPQA_PASSWORD", "--only", "base")
    outputs = {reply["id"]: reply["output"] for reply in stored(tmp_path / "gpqa" / "base")}
    assert outputs["0/0"] == f"Answer: {rows[0]['gold']}" and outputs["1/0"] == "(B)" and len(outputs) == 198
    assert "score 0.99" in out
    text = out + err + "".join(file.read_text() for file in tmp_path.rglob("*") if file.is_file())
    assert "quagga" not in text and "right-" not in text and "not-a-secret" not in text
    for words in (where, [*where, "--password-env", "NOT_SET_ANYWHERE"]):
        with pytest.raises(UserError, match="--password-env"):
            command(*words)


def test_all_runs_what_is_there_and_writes_one_table(made_up, run_folder, tmp_path):
    where = ["--run", run_folder, "--out", tmp_path, "--rows", "7"]
    out, err = command("all", "--data", made_up, *where, "--max-new-tokens", "4")
    table = (tmp_path / "bench.md").read_text()
    assert table in out and "gpqa is left out" in err and "quagga" not in out
    head, rule, *lines = table.splitlines()
    assert head == "| benchmark | part | base | PersonaFuse | difference [95 %] | p | relative | reported |"
    assert {line.split(" | ")[0] for line in lines} == {"| EmoBench", "| SafetyBench"}
    assert all(line.count("|") == head.count("|") for line in (rule, *lines)) and "+1.7 %" in table
    assert not json.loads((tmp_path / "safetybench" / "base" / "config.json").read_text())["mode"] == "generate"
    out, _ = command("safetybench", "--data", made_up / "safetybench", *where, "--json")
    assert list(json.loads(out)["base"]) == ["Avg.", "OFF", "UB", "PH", "MH", "IA", "EM", "PP"]


def test_a_base_needs_no_run(made_up, run_folder, tmp_path):
    base = run_folder / "models" / "base"
    out, _ = command("emobench", "--data", made_up / "emobench", "--base", base, "--out", tmp_path, "--rows", "4",
                     "--mode", "logits")
    replies = [json.loads(reply["output"]) for reply in stored(tmp_path / "emobench" / "base")]
    assert {tuple(reply) for reply in replies} == {("answer",), ("answer_q1", "answer_q2")} and "EmoBench, base" in out
    base = shutil.copytree(base, tmp_path / "base")
    (base / "config.json").unlink()
    with pytest.raises(UserError, match="base/config.json: no such file"):
        command("emobench", "--data", made_up / "emobench", "--base", base, "--out", tmp_path / "new")


@pytest.mark.parametrize("words, problem", [
    (["nothing"], "expected the name of a benchmark"), (["emobench"], "which model?"),
    (["emobench", "--replies", "x", "--run", "y"], "--replies scores"),
    (["emobench", "--base", "x", "--only", "personafuse"], "which model?"),
    (["eqbench", "--base", "x", "--mode", "logits"], "no such file"),
    (["emobench", "--base", "x", "--shots", "6"], "five examples"),
    (["emobench", "--base", "x", "--mode", "logits", "--cot"], "--cot asks for reasoning"),
    (["emobench", "--base", "x", "--part", "XX"], "the first is 'EA/en/1'"),
    (["emobench", "--replies", "nowhere"], "nowhere: No such file")])
def test_what_cannot_be_is_said_in_one_line(made_up, tmp_path, words, problem):
    folder = made_up / words[0] if words[0] in BENCHMARKS else made_up
    with pytest.raises(UserError, match=re.escape(problem)):
        command(*words, "--data", folder, "--out", tmp_path)


def test_the_published_questions_are_asked(published, run_folder, tmp_path):
    for name, options in (("emobench", {}), ("emobench", {"cot": True}), ("eqbench", {"revise": True}),
                          ("tombench", {"lang": "zh"}), ("safetybench", {"shots": 5})):
        bench = BENCHMARKS[name](**options)
        items = list(bench.ask(bench.load(published / name), {}))
        assert len(items) == {"emobench": 800, "eqbench": 171, "tombench": 5 * 2860, "safetybench": 2100}[name]
        assert all(item.query.strip() and item.text.endswith(item.question) for item in items)
    for name, mode in (("eqbench", "generate"), ("tombench", "logits")):
        command(name, "--data", published / name, "--run", run_folder, "--out", tmp_path, "--rows", "2", "--only",
                "personafuse", "--max-new-tokens", "3", "--mode", mode)
        replies = stored(tmp_path / name / "PersonaFuse")
        assert Counter(reply["try"] for reply in replies) == dict.fromkeys(range(3 if name == "eqbench" else 5), 2)
        assert name == "eqbench" or all(re.fullmatch(r"\[\[[A-D]\]\]", reply["output"]) for reply in replies)
