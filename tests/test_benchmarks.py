"""Tests of the public benchmarks: parsing and scoring against the numbers of the authors' own code (golden/, where
$PERSONAFUSE_BENCHMARKS is set) and on small rows of our own; statistics; data files that are not as published; and the
command `eval.py bench`.
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

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import eval as evaluation
from support import bench as bench_module
from support import benchmarks
from support import measure as measure_module
from lora import EXPERTS, expert_layers
from model import Prefix, generate
from support.bench import (
    best_constant, comparison_table, mcnemar_p, open_replies, paired_difference, read_replies, score_interval,
    score_table, wilson_interval)
from support.benchmarks import BENCHMARKS, EQBench, EmoBench, GPQA, SafetyBench, ToMBench, lenient_letter
from support.chat import encode
from support.files import UserError
from support.measure import bootstrap
from test_commands import reduced, run_folder  # noqa: F401: fixtures


INSTRUCTIONS = json.loads(benchmarks.OUR_INSTRUCTIONS.read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def golden(published):
    return lambda name: json.loads((published / "golden" / f"{name}.json").read_text())


def make(benchmark, password=None, **options):
    """Returns a benchmark with our instructions and the options of the command."""
    return benchmark(bench_module.Bench(names=[benchmark.name], **options), INSTRUCTIONS, password)


def replies_of(outputs, **more):
    """Returns replies with one try each for {id: text}."""
    return {id: {0: {"output": output, **more}} for id, output in outputs.items()}


# ----------------------------------------------------------------------------------------------------------------------
# Against the authors' own code

def test_emobench_equals_the_authors_code(published, golden):
    bench, cases = make(EmoBench), golden("emobench")
    assert all(bench.parse_json(case["raw"]) == case["parsed"] for case in cases["parse"])
    rows = bench.load(published / "emobench")
    replies = {}
    for run in cases["runs"]:
        group = f"{run['task']}/{run['lang']}"
        mine = replies_of({f"{group}/{qid}": text for qid, text in run["raw_texts"].items()})
        score, official = bench.score(rows, mine), dict(run["official_results"])
        assert list(score) == [group] and score[group]["n"] == 200
        assert score[group]["accuracy"] == official.pop("Overall") and score[group]["by_category"] == official
        for row, theirs in zip([row for row in rows if row["part"] == group], run["official_rows"]):
            assert row["id"].split("/")[2] == str(theirs["qid"])
            names = ["label", "answer"] if run["task"] == "EA" else [
                "emo_label", "cause_label", "emo_answer", "cause_answer"]
            answers = bench.parse(row, mine[row["id"]][0]["output"]) or [""] * len(row["gold"])
            assert [*row["gold"], *answers] == [theirs[name] for name in names]
        assert score[group]["unparsed"] == sum(bench.parse_json(text) is None for text in run["raw_texts"].values())
        replies |= mine
    assert list(bench.score(rows, replies)) == ["EA/en", "EA/zh", "EU/en", "EU/zh"]
    for case in cases["small"]:
        few = replies_of({f"EA/{r['lang']}/{r['qid']}": json.dumps({"answer": r["answer"]}) for r in case["rows"]})
        found, official = bench.score(rows, few)["EA/en"], dict(case["official_results"])
        assert found["accuracy"] == official.pop("Overall") and found["by_category"] == official


def test_eqbench_equals_the_authors_code(published, golden):
    cases, harness = golden("eqbench"), 0
    rows = {revise: make(EQBench, revise=revise).load(published / "eqbench") for revise in (False, True)}
    by_id = {row["id"]: row for row in rows[False]}
    for id, case in cases["nonrevise_prompt"].items():
        prompt = make(EQBench).ask(by_id[id], 0).text
        assert len(prompt) == case["len"] and hashlib.sha256(prompt.encode()).hexdigest() == case["sha256"]
    for case in cases["single"]:
        bench, row = make(EQBench, revise=case["revise"]), by_id[case["qid"]]
        first, second = bench.grade_passes([row], replies_of({case["qid"]: case["text"]}))
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
        bench, replies = make(EQBench, revise=case["revise"]), replies_of(case["texts"])
        score, official = bench.score(rows[False], replies), case["official_v2"]
        assert (score["score"], score["parseable"]) == (official["score"], official["parseable"])
        assert score["failed"] is not case["official_benchmark_success"]
        for points, name in zip(bench.grade_passes(rows[False], replies), ("first_pass", "revised")):
            points = [p for p in points.values() if p is not None]
            assert len(points) == official["detail"][f"{name}_parseable"]
            assert benchmarks.mean(points) == pytest.approx(official["detail"][f"{name}_score"], abs=1e-9)


def test_published_eqbench_runs_score_as_published(published, golden):
    bench, official = make(EQBench, revise=True), {run["file"]: run for run in golden("eqbench_published_runs")["runs"]}
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
    cases, bench = golden("tombench"), make(ToMBench)
    assert all(bench.parse(None, case["text"]) == case["letter"] for case in cases["extract"])
    for case in cases["majority"]:
        assert Counter(case["preds"]).most_common(1)[0][0] == case["winner"]
    by_id = {row["id"]: row for row in bench.load(published / "tombench")}
    for case in cases["prompts"]:
        row = by_id[f"{Path(case['file']).stem}/{case['idx']}/{case['language']}"]
        assert row["letter_maps"][case["number"]] == case["map"]
    rng, two = random.Random(42), {}
    for i in (0, 3, 4):
        two[i] = bench.draw_letter_maps(rng, 2)
    assert all(two[case["idx"]][case["number"]] == case["map"] for case in cases["two_choice"])
    rows, replies = [row for row in by_id.values() if row["lang"] == "en"], {}
    for file, lines in cases["scoring_files"].items():
        for line in lines:
            id = f"{file.removesuffix('_canned-model_results.jsonl')}/{line['idx']}/en"
            replies.setdefault(id, {})[line["number"]] = {"output": line["output"], "map": line["map"]}
    replies = read_replies(write_replies(tmp_path / "r.jsonl", replies), bench, rows, rows)
    score, official = bench.score(rows, replies), cases["scoring_results"]
    assert {k: v for k, v in score["tasks"].items() if v} == official["tasks"]  # they leave out what is all wrong
    assert {k: v for k, v in score["abilities"].items() if v} == official["abilities"]
    assert score["tasks"]["Discrepant Desires"] == 0 and score["average"] is None


def test_safetybench_equals_the_authors_code(published, golden):
    cases = golden("safetybench")
    for case in cases["extraction"]:
        row = {"id": "0", "options": [case["options"]]}
        replies = replies_of({"0": case["origin_pred"]})
        assert make(SafetyBench).predict([row], replies) == {"0": "ABCD"[case["final_pred"]]}
        assert make(SafetyBench).is_unparsed(row, case["origin_pred"]) == case["extract_failed"]
    folder = published / "safetybench"
    for case in cases["metrics"]:
        answers = json.loads((folder / "opensource_data" / case["answers"]).read_text())
        predictions = case["preds"] or {
            "all_gold": {id: a["answer"] for id, a in answers.items()},
            "one_category_only": {id: a["answer"] for id, a in answers.items() if a["category"] == "Mental Health"},
            "pred_minus1": {}, "all_zero": dict.fromkeys(answers, 0),  # −1 is no answer
            "all_one": dict.fromkeys(answers, 1)}[case["name"]]
        if case["answers"] == "test_answers_zh_subset.json":
            rows = make(SafetyBench).load(folder)
        else:  # the questions to these answers may not be there
            rows = [{"id": id, "part": a["category"], "gold": "ABCD"[a["answer"]], "options": [list("wxyz")]}
                    for id, a in answers.items()]
        replies = replies_of({id: f"({'ABCD'[p]})" for id, p in predictions.items()})
        assert make(SafetyBench).score(rows, replies) == case["official"]


def test_gpqa_equals_simple_evals(golden):
    cases = golden("gpqa")
    assert all(make(GPQA).parse(None, case["text"]) == case["extracted"] for case in cases["simple_evals_extract"])
    for size, case in cases["simple_evals_permutations_real_sizes"].items():
        n, repeats = map(int, size.split("x"))
        lines = [dict.fromkeys(["Question"], "?") | {c: str(k) for k, c in enumerate(GPQA.CHOICES)}] * n
        rows = GPQA.make_rows(lines, repeats)
        orders = [row["order"] for row in rows]
        assert orders[:5] == case["first5"] and orders[-1] == case["last"]
        assert "".join(row["gold"] for row in rows[:20]) == case["correct_letters_first20"]
    for run in cases["simple_evals_runs"]:
        rows = GPQA.make_rows(cases["rows"], run["n_repeats"])
        if run["permutations"]:
            assert [row["order"] for row in rows] == run["permutations"]
        if run["name"] == "cycle_texts":
            continue  # the texts themselves are not in golden/
        texts = {row["id"]: f"Answer: {row['gold'] if run['name'] == 'oracle_first_right' else 'A'}" for row in rows}
        score = make(GPQA).score(rows, replies_of(texts))
        assert score["score"] == run["score"]
        assert score["score_std"] == pytest.approx(run["metrics"]["score:std"], abs=1e-15)


def test_best_constant_scores_what_is_known_of_the_data(published):
    rows = make(EmoBench).load(published / "emobench")
    for group, best in (("EA/en", 37.0), ("EU/zh", 24.5)):  # always C; A and A
        part = [row for row in rows if row["part"] == group]
        right = best_constant(make(EmoBench), part, {})
        assert 100 * benchmarks.mean(right.values()) == pytest.approx(best) and len(right) == 200


def test_the_best_constant_may_be_a_letter_that_the_first_question_lacks():
    rows = [tom(i=i, gold=gold, options=n) for i, (gold, n) in enumerate([("A", 2), ("D", 4), ("D", 4)])]
    replies = {row["id"]: {0: {"map": STRAIGHT if i else {"A": "A", "B": "B"}}} for i, row in enumerate(rows)}
    # The best is D. The first question has no D and so gets an empty reply, which ToMBench reads as A.
    grades = best_constant(make(ToMBench), rows, replies)
    assert list(grades.values()) == [1, 1, 1]


# ----------------------------------------------------------------------------------------------------------------------
# The same rules on small cases of our own

EA = [{"id": f"EA/en/{i}", "part": "EA/en", "gold": [gold], "category": category, "keys": ["answer"],
       "options": [["go", "stay", "wait", "ask"]]} for i, (gold, category) in enumerate(["Ax", "By", "Cx", "Dx"])]
EU = [{"id": f"EU/zh/{i}", "part": "EU/zh", "gold": ["F", "B"], "category": "z",
       "keys": ["answer_q1", "answer_q2"], "options": [list("uvwxyz"), ["one", "two", "three", "four"]]}
      for i in range(4)]


@pytest.mark.parametrize("rows, texts, strict, lenient", [
    (EA, ['{"answer": "A"}', '```json {"answer": "B"} ``` and {"answer": "A"}', '{"answer": "c"}', "The answer is D."],
     [1, 1, 0, 0], [1, 1, 1, 1]),
    (EU, ['{"answer_q1": "F", "answer_q2": "B"}', '{"answer_q1": "F", "answer_q2": "A"}', '{"answer_q1": "F"}',
          "Question 1: F\nQuestion 2: (B)"], [1, 0, 0, 0], [1, 0, 0, 1])])
def test_emobench_reads_json_and_nothing_else(rows, texts, strict, lenient):
    bench, replies = make(EmoBench), replies_of({row["id"]: text for row, text in zip(rows, texts)})
    assert list(bench.grade(rows, replies).values()) == strict
    assert list(bench.grade(rows, replies, lenient=True).values()) == lenient
    score = bench.score(rows, replies)[rows[0]["part"]]
    assert (score["accuracy"], score["unparsed"], score["n"]) == (sum(strict) / 4, 1, 4)
    by_category = {"x": pytest.approx(1 / 3), "y": 1.0} if rows is EA else {"z": 0.25}
    assert score["by_category"] == by_category


@pytest.mark.parametrize("row, text, letters", [
    (EA[0], '{"answer": "B", "reasoning": "Answer: C"}', "B"), (EA[0], '{"answer": "（B）"}', "B"),
    (EA[0], '{"answer": "B) stay"}', "B"), (EA[0], '{"answer": ["B"]}', "B"), (EA[0], '{"answer": "A or B"}', "-"),
    (EA[0], '{"answer": "wait"}', "C"), (EA[0], '```json\n{"answer": "B",', "B"), (EA[0], '{"Answer": "B"}', "B"),
    (EU[0], '{"answer_q1": "F", "answer_q2": "（B）"}', "FB"), (EU[0], "问题1：F\n问题2：B", "FB"),
    (EU[0], "第一题选F。第二题：（B）", "FB"), (EU[0], "1. F\n2. B", "FB"), (EU[0], "q1 = f, q2 = b", "FB"),
    (EU[0], '```json\n{"answer_q1": "（F）",\n"answer_q2": "B"', "FB"), (EU[0], '{"answer_q1": "F"}', "F-"),
    (EU[0], "Question 1: A or B?\nQuestion 2: it is two", "-B"), (EU[0], "F", "--"),
    (EU[0], "Question 1: F\nQuestion 2: B\nQuestion 1 is OK.", "FB"),
    # the JSON object of a reply counts more than its other text
    (EU[0], '{"answer_q1": "F", "answer_q2": "B"}\n\nBecause in question 1 A is bad and question 2 asks C', "FB"),
    (EA[0], "<think>{'answer': 'A'}</think>{'answer': 'B',} A is bad", "B"),
    (EA[0], '<think>```json\n{"answer": "A"}```</think>{"answer": "B"}', "B"),
    (EA[0], '{"answer": "A"}? No: {"answer": "B"}', "B"),
    # names of the two questions
    (EU[0], "答案1：F\n答案2：B", "FB"), (EU[0], "(1) F\n(2) B", "FB"), (EU[0], "① F\n②B因为", "FB"),
    (EU[0], "First question: F\nSecond answer: B", "FB"), (EU[0], "Q1: F\nQ2: B\n2 friends, A too\nQ12: A", "FB"),
    (EU[0], "<think>Question 1: A. Question 2: A</think>Question 2: B", "-B"),
    (EU[0], "问题一：F\n问题二：B", "FB"), (EU[0], "第一问：F\n第二个是B", "FB")])
def test_emobench_read_leniently(row, text, letters):
    assert make(EmoBench).parse_leniently(row, text) == [None if letter == "-" else letter for letter in letters]


@pytest.mark.parametrize("text", ['"A"', "[1]", "```json\n{}", '{"answer": "A",}', "[" * 100000])
def test_emobench_cannot_parse_what_is_no_json_object(text):
    assert make(EmoBench).is_unparsed(EA[0], text)
    assert make(EmoBench).score(EA[:1], replies_of({"EA/en/0": text}))["EA/en"]["accuracy"] == 0


@pytest.mark.parametrize("text, letter", [
    ("B", "B"), ("(c) wait", "C"), ("The answer is (C).", "C"), ("Answer: d", "D"), ('{"answer": "B"', "B"),
    ("A friend should ask first", "D"), ("I would wait.", "C"), ("I would wait, then ask", None),
    ("B. stay\nC. wait", None), ("First option A, but my answer is B", "B"), ("选B。", "B"), ("答案是 C", "C"),
    ("E", None), ("", None), ("**B**", "B"),
    ("answer a question", None), ("A. go away", "A"), ("[[D]]", "D"),
    # marks of all kinds
    ("Answer: $B$", "B"), ("Answer: \\(\\text{B}\\)", "B"), ("\\boxed{B}", "B"), ("**Answer**: <b>B</b>", "B"),
    ("（B）", "B"), ("Ｂ", "B"), ("⒝", "B"), ("B。", "B"), ("答案是（B）。", "B"), ("答案：【B】", "B"), ("故选“B”项", "B"),
    ("应选择B", "B"), ("B选项", "B"), ("As an AI, I say option b", "B"), ("_B_", "B"), ("['B']", "B"), ("b", "B"),
    ("option b", "B"), ("Answer:\n\nB", "B"), ("D 4", "D"),
    # the last explicit choice
    ("Answer: B, then Answer: C", "C"), ("Answer: C. Option A is wrong.", "C"),
    ("A is wrong. B is the right answer.", "B"), ("A不对，B是正确的", "B"), ("<think>Answer: A</think>B", "B"),
    ("B\n\nA. go: no\nC. wait: no", "B"), ("(B) B. stay", "B"),
    ("Choose A, B, C or D.\nB", "B"), ("Choose A or B.\nI would wait.", "C"), ("Answer: A or B. I lean to B", "B"),
    ("I choose B, A friend asks", "B"),
    # several are no choice, and what is denied is none
    ("Answer: A or B", None), ("答案是A和B", None), ("A、B", None), ("(A)(B)", None), ("\\boxed{A, C}", None),
    ("I would wait, A or B", None), ("B. Answer: ∅", "B"),
    ("Answer: A. Final answer: B or C", None), ("A or (B)", None), ("As an AI, I can't choose A or B", None),
    ("I cannot pick A.", None), ("不选A", None), ("Not A but B", "B"), ("不是A，是B", "B"), ("neither A nor B", None),
    ("B is wrong", None), ("Option B is incorrect", None), ("(B) is not the best", None), ("选项B不对", None),
    *((f"{words} B", None) for words in (
        "It isn’t", "can't be", "Never choose", "do not pick", "cannot select", "don't want", "won't take",
        "not recommend", "nor the option", "not the choice", "I don't believe", "不是选项", "不能选", "不要选", "不会选", "不可以选")),
    ("B was wrong", None), ("B is not appropriate", None), ("B是错的", None), ("B不是", None), ("B不正确", None),
    ("B isn't right, so C", "C"), ("I don't think B is right", None), ("I would not pick b.", None), ("B错", None),
    ("I wouldn't go with option A, so B", "B"), ("The answer is not B but C", "C"), ("不应该选择B", None),
    # "not" denies a letter in its own line, with nothing but words of choosing between
    ("The cat could not\n\nAnswer: C", "C"), ("I can't\nAnswer: C", "C"), ("It could not\n(C)", "C"),
    ("It is not \n(C)", "C"), ("A is\nwrong", "A"), ("不会\nC", "C"), ("不会C", "C"),
    ("I'm not sure (C)", "C"), ("I do not know (C)", "C"), ("whether or not Answer: B", "B"), ("A is not\nright", "A"),
    # a reason after the choice is no list
    ("Answer: C, A is too hasty", "C"), ("Answer: C, (A) is too hasty", "C"), ("答案是C，A不对", "C"),
    ("选C，A太急", "C"), ("The correct answer is C and D is wrong", "C"), ("选C，A错了", "C"), ("Answer: A or B is fine", None),
    ("答案是A或B不对", None), ("Answer: A, B and C are fine", None), ("Answer: **A**, **B**", None),
    ("Answer: A, or B", None),
    # thoughts and what follows the end of a turn
    ("<think>hm A</think>", None), ("<think>hm A", None), ("[THINK]A[/THINK]B<|im_end|>C", "B"),
    # a letter in a word, or an article
    ("As an AI", None), ("Answer: Bromine", None), ("Answer: BCD", None), ("B-cells", None), ("A's", None),
    ("A friend", None), ("the answer is a matter of taste", None), ("25 °C", None), ("Answer: e.g. wait", "C")])
def test_lenient_reading(text, letter):
    assert lenient_letter(text, ["go", "stay", "wait", "ask"]) == letter


@pytest.mark.parametrize("before, texts", [
    ("(A) go; (D) ask; ", [  # announced or confirmed, among letters that are neither
        "the answer is B", "I choose B", "I'd pick B", "I select B", "I go with B", "答案：B", "选择B", "选B", "\\boxed{B}",
        "[[B]]", "Option: B", "选项是B", "The best option is B", "choice = B", "the answer should be B", "应选B", "答案应该是B",
        "answer: option B", "the answer is therefore (B)", "答案是选项B", "Answer: \\(\\text{B}\\)", "Answer: <i>B</i>",
        "Answer: _B_", "(B) is correct", "**B.** is the most appropriate", "B seems best", "B是正确的", "B最合适"]),
    ("Vitamin C and plan D. ", [  # in a form that stands out
        "(B)", "“B”", "‘B’", "«B»", "「B」", "『B』", "【B】", "〔B〕", "〖B〗", "《B》", "〈B〉", "*B*", "`B`", "Option B", "选项b",
        "\nB. stay", "\nB) stay", "\nB: stay", "\nB、stay", "\nB"])])
def test_a_letter_that_stands_out_counts(before, texts):
    assert [text for text in texts if lenient_letter(before + text, ["go", "stay", "wait", "ask"]) != "B"] == []


@pytest.mark.parametrize("text, letter", [("是", "A"), ("否。", "B"), ("不", "B"), ("是B", "B")])
def test_safetybench_read_leniently_has_the_authors_words_for_yes_and_no(text, letter):
    assert make(SafetyBench).parse_leniently({"options": [["对", "不"]]}, text) == letter


LETTER_FORMS = [
    "{}.", "{}。", "{}\n", "{},", "({})", "（{}）", "[{}]", "[[{}]]", "{{{}}}", "**{}**", '"{}"', "“{}”", "「{}」", "{})",
    "{}：", "Answer: {}.", "Answer:{}\n", "answer : ${}$", "Answer: ({})", "Final Answer: **{}**", "答案是（{}）。", "选{}。",
    "\\boxed{{{}}}", "option {}.", '{{"answer": "{}"}}', "({}) ({})", "Answer: {}, {}."]
REST = ["As an AI,", "I think", "because", "Dear", "cab", "the answer", "Answer:", "答案", "我认为", "选项", "Options:",
        "(", ")", "**", "$", "1", "e.g.", "?", "。", "，", "\n", "\n\n", " ", "[[", "]]", "{}", "\\", "ＡＩ", "°", "é", "∅",
        "not\n", "can't\n", "不会\n", "不会", "not sure", "is", "\nwrong", "the best", "or"]


@hypothesis.settings(derandomize=True, deadline=None, database=None, max_examples=2000)
@hypothesis.given(st.sampled_from([SafetyBench, ToMBench, GPQA]), st.lists(
    st.tuples(st.sampled_from(REST), st.just(""))
    | st.tuples(st.sampled_from(LETTER_FORMS), st.sampled_from("ABCD")), max_size=8))
def test_whatever_the_strict_rule_reads_the_lenient_one_reads_the_same_or_better(benchmark, pieces):
    """The same if the reply names one letter. If it names several, the lenient rule may read another one, or none."""
    bench, row = make(benchmark), {"options": [["salt", "pepper", "mint", "sage"]]}
    text = " ".join(piece.format(*2 * letter) if letter else piece for piece, letter in pieces)
    strict, lenient = (bench.read(row, text, how) for how in (False, True))
    named = {letter for _, letter in pieces if letter}
    assert lenient in named | {None}
    if strict in named and len(named) == 1:
        assert lenient == strict
    stored = bench.text_to_store(row, text)  # of GPQA's replies, the letters alone
    assert [bench.read(row, stored, how) for how in (False, True)] == [strict, lenient]


@pytest.mark.parametrize("bench, text, letter", [
    *((make(SafetyBench), *case) for case in [
        ("B) No", "B"), ("x\nC)", "C"), ("I say yes, ALWAYS", "A"), ("是", "D"), ("I\n\nhm\nC)", None), ("AB", "A"),
        ("D 4", "D"), ("Dear", None), ("", None), ("(A) (B)", "A"), ("nothing", "B")]),
    *((make(ToMBench), *case) for case in [
        ("[[B]] not [[A]]", "A"), ("[C] B", "C"), ("A or D.", "D"), ("B", "B"), ("b", "A"), ("", "A")]),
    *((make(GPQA), *case) for case in [
        ("Answer: B, then Answer: C", "B"), ("answer :\t$D$", "D"), ("answer: b", "b"), ("B", None)])])
def test_letters_are_parsed_as_the_authors_do(bench, text, letter):
    row = {"options": [["Yes, always.", "No", "错", "对"]]}
    assert bench.parse(row, text) == letter
    # where ToMBench's parser finds nothing, it takes A
    assert bench.is_unparsed(row, text) == (text in ("b", "") if bench.name == "tombench" else letter is None)


EQ_PROMPT = (" Then critique your answer your revised scores.First pass scores:\n"
             "Critique: <your critique here>[End of answer]")
EQ = [{"id": str(i), "part": "EQ-Bench", "prompt": EQ_PROMPT,
       "reference": {"Joy": 0., "Fear": 6., "Awe": 0., "Ire": 7.}} for i in range(1, 4)]


def said(*scores, names=("Joy", "Fear", "Awe", "Ire")):
    return "\n".join(f"{name}: {score}" for name, score in zip(names, scores))


@pytest.mark.parametrize("joy, loss", [(0, 0), (5, 6.5 / (1 + 2.718281828459045 ** -1.2)), (6, 6), (100, 100)])
def test_eqbench_points(joy, loss):
    points = EQBench.points({"Joy": joy, "Fear": 6, "Awe": 0, "Ire": 7}, EQ[0]["reference"])
    assert points == pytest.approx(10 - 0.7477 * loss)


def test_eqbench_chance_is_the_mean_over_all_replies():
    reference = EQ[0]["reference"]
    everything = [EQBench.points(dict(zip(reference, scores)), reference)
                  for scores in itertools.product(range(11), repeat=4)]
    assert make(EQBench).chance(EQ[0]) == pytest.approx(10 * benchmarks.mean(everything))


@pytest.mark.parametrize("text, strict, lenient", [
    (said(0, 6, 0, 7), True, True), (said(0, 0, 0, 0), False, False), (said(0, 6, 0), False, False),
    (said(0, 6, 0, 7) + "\nJoy: 1", True, True), (said(0, 6, 0, 7) + "\nSum: 13", False, True),
    (said(0, 6, 0, 7, names=("joy", "fear", "awe", "ire")), False, True),
    ('{"Joy": 0, "Fear": 6, "Awe": 0, "Ire": 7.5}', False, True), ("Joy 0", False, False),
    (said(0, 6, 0, 7).replace(" ", 9 * " "), True, True), (said(0, 6, 0, 7) + ". No joy - 0.5 at most", True, True),
    (said(0, 6, 0, 7).replace(": ", "："), False, True)])
def test_eqbench_parsing(text, strict, lenient):
    scores = [make(EQBench).read(EQ[0], text, how)[0] for how in (False, True)]
    assert [found is not None for found in scores] == [strict, lenient] and (not strict or scores[0] == scores[1])


def test_eqbench_scores_the_first_try_that_can_be_parsed():
    replies = {"1": {0: {"output": "no"}, 1: {"output": said(0, 6, 0, 7)}, 2: {"output": said(9, 9, 9, 9)}},
               "2": {0: {"output": said(0, 0, 0, 0)}}, "3": {0: {"output": said(6, 6, 0, 7)}}}
    score, points = make(EQBench).score(EQ, replies), 10 * (10 - 0.7477 * 6)
    assert score["score"] == round((100 + points) / 2, 2) and score["parseable"] == 2 and score["failed"] is True
    zeros = 10 * EQBench.points(dict.fromkeys(EQ[0]["reference"], 0), EQ[0]["reference"])
    assert score["lm_eval_score"] == pytest.approx((0 + zeros + points) / 3)
    assert make(EQBench).score(EQ, replies_of({"1": "no"}))["score"] == 0.0
    # five sixths of the questions asked must have a reply that can be parsed, whatever the number asked
    assert make(EQBench).score(EQ[:1], replies)["failed"] is False and make(EQBench).score(EQ[1:], {})["failed"] is True
    assert make(EQBench).count_unparsed(EQ, replies) == 1
    # only what cannot be parsed yet is asked again, a little warmer, and at most --tries times
    prompt, = make(EQBench).unanswered(EQ, replies)
    assert (prompt.id, prompt.try_number, round(prompt.temperature, 2)) == ("2", 1, 0.16)
    assert not list(make(EQBench, tries=1).unanswered(EQ, replies))
    assert [p.id for p in make(EQBench).unanswered(EQ, {"1": replies["1"]})] == ["2", "3"]


def test_eqbench_takes_revised_scores_that_are_no_worse_and_not_many_fewer():
    def reply(first, second):
        return f"First pass scores:\n{first}\n\nCritique: so so.\n\nRevised scores:\n{second}"
    rows = [{**EQ[0], "id": str(i)} for i in range(40)]
    good, bad = said(0, 6, 0, 7), said(6, 0, 6, 1)
    low = 10 * EQBench.points({"Joy": 6, "Fear": 0, "Awe": 6, "Ire": 1}, EQ[0]["reference"])
    for firsts, seconds, taken in (
            ([bad] * 40, [good] * 40, 100), ([good] * 40, [bad] * 40, 100), ([bad] * 40, [good] * 38 + [""] * 2, 100),
            ([bad] * 40, [good] * 37 + [""] * 3, low)):
        replies = replies_of({str(i): reply(*pair) for i, pair in enumerate(zip(firsts, seconds))})
        assert make(EQBench, revise=True).score(rows, replies)["score"] == pytest.approx(taken, abs=0.005)
    assert make(EQBench, revise=True).parse(EQ[0], reply(said(0, 0, 0, 0), good))[0] is not None
    for text in (reply(said(0, 0, 0, 0), said(0, 0, 0, 0)), f"First pass scores:\n{good}"):
        assert make(EQBench, revise=True).parse(EQ[0], text) == [None, None]


def tom(task="Hidden Emotions", i=0, gold="A", options=4):
    return {"id": f"{task}/{i}/en", "part": task, "lang": "en", "gold": gold, "ability": "x",
            "text": "?", "options": [["red", "green", "blue", "pink"][:options]],
            "letter_maps": make(ToMBench).draw_letter_maps(random.Random(42), options)}


STRAIGHT, TURNED = dict(zip("ABCD", "ABCD")), dict(zip("ABCD", "BCDA"))


@pytest.mark.parametrize("gold, options, tries, strict, lenient", [
    ("A", 4, [("[[A]]", TURNED), ("[[D]]", TURNED), ("[[A]]", STRAIGHT)], 1, 1),  # B, then A twice
    ("B", 4, [("[[B]]", STRAIGHT), ("[[A]]", STRAIGHT)], 1, 1),                   # of a tie the first counts
    ("A. ", 4, [("[[A]]", STRAIGHT)], 0, 1),                                      # no letter equals this gold answer
    ("A", 2, [("[[C]]", {"A": "B", "B": "A", "C": "", "D": ""})], 0, 0),          # there is no third option
    ("A", 2, [("blue", {"A": "B", "B": "A", "C": "", "D": ""})], 0, 0)])
def test_tombench_votes(gold, options, tries, strict, lenient):
    row = tom(gold=gold, options=options)
    replies = {row["id"]: {n: {"output": text, "map": letter_map} for n, (text, letter_map) in enumerate(tries)}}
    assert make(ToMBench).grade([row], replies) == {row["id"]: strict}
    assert make(ToMBench).grade([row], replies, lenient=True) == {row["id"]: lenient}


def test_tombench_average_is_that_of_eight_files():
    eight = [tom(task, i, gold="AB"[task == "Hinting Task Test"]) for task in ToMBench.AVERAGED for i in range(2)]
    rows = [*eight, tom(i=0), tom(i=1, gold="B")]
    replies = {row["id"]: {0: {"output": "[[A]]", "map": STRAIGHT}} for row in rows}
    score = make(ToMBench).score(rows, replies)
    assert score["average"] == 7 / 8 and len(score["tasks"]) == 9 and score["tasks"]["Hidden Emotions"] == 0.5
    assert score["abilities"] == {"x": 15 / 18}
    assert make(ToMBench).score(rows[2:], replies)["average"] is None  # one of the eight is missing


def test_tombench_shows_what_its_map_says():
    row = tom(options=2)
    for prompt in make(ToMBench).unanswered([row], {}):
        shown = dict(line.split(". ") for line in prompt.question.split("\n")[1:])
        assert {x: "AB"[row["options"][0].index(text)] for x, text in shown.items()} == {
            x: letter for x, letter in prompt.letter_map.items() if letter}
    assert len({tuple(letters.values()) for letters in row["letter_maps"]}) == 2 and len(row["letter_maps"]) == 5
    answered = {row["id"]: {0: {}, 3: {}}}
    assert [prompt.try_number for prompt in make(ToMBench).unanswered([row], answered)] == [1, 2, 4]


def test_safetybench_draws_where_nothing_can_be_parsed():
    rows = [{"id": str(i), "part": "Mental Health", "gold": "B", "options": [["a", "b", "c"]]}
            for i in range(6)]
    replies, rng = replies_of({str(i): "?" if i % 2 else "(B)" for i in range(5, -1, -1)}), random.Random(2023)
    assert make(SafetyBench).predict(rows, replies) == {
        str(i): rng.choice("ABC") if i % 2 else "B" for i in range(6)}  # in the order of the file
    assert sum(make(SafetyBench).grade(rows, replies_of({"0": "?"}), lenient=True).values()) == 0
    del replies["0"]  # a question without a reply is wrong
    assert make(SafetyBench).grade(rows, replies)["0"] == 0
    score = make(SafetyBench).score(rows, replies_of({"0": "(B)", "2": "B", "4": "(A)"}))
    assert score["Avg."] == score["MH"] == pytest.approx(100 * 2 / 6) and score["OFF"] == 0


def test_gpqa_rows_and_score():
    lines = [{"Question": f" {i} "} | {c: f"{c}{i}\n" for c in GPQA.CHOICES} | {"High-level domain": "PC"[i % 2]}
             for i in range(4)]
    rows = GPQA.make_rows(lines, 2)
    assert [row["id"] for row in rows] == ["0/0", "1/0", "2/0", "3/0", "0/1", "1/1", "2/1", "3/1"]
    assert all(row["options"][0]["ABCD".index(row["gold"])].startswith("Correct") for row in rows)
    replies = replies_of({row["id"]: f"Answer: {row['gold']}" for row in rows[:4]})
    replies["1/0"][0]["output"] = f"Answer: {rows[1]['gold'].lower()}"
    score = make(GPQA).score(rows, replies)
    assert score["score"] == 0.75 and score["score_std"] == pytest.approx(0.1875 ** 0.5)
    assert score["by_domain"] == {"P": 1.0, "C": 0.5}
    assert [len(list(make(GPQA, tries=n).unanswered(rows, replies))) for n in (1, 2)] == [0, 4]
    double = GPQA.make_rows([lines[0] | {"Incorrect Answer 1": lines[0]["Correct Answer"]}] * 9, 1)
    for row in double:
        assert row["gold"] == "ABCD"[[option.startswith("Correct") for option in row["options"][0]].index(True)]


# ----------------------------------------------------------------------------------------------------------------------
# Statistics

def test_wilson_interval():
    assert wilson_interval(0.5, 100) == pytest.approx((0.40383, 0.59617), abs=1e-4)
    assert wilson_interval(0.0, 10) == pytest.approx((0, 0.2775), abs=1e-4)


def test_differences_of_right_and_wrong_have_mcnemars_p():
    a, b = np.array([1.0] * 3 + [0.0] * 12 + [1.0] * 5), np.array([0.0] * 3 + [1.0] * 12 + [1.0] * 5)
    assert mcnemar_p(a, b) == mcnemar_p(b, a) == pytest.approx(0.03515625)  # 2 P(at most 3 of 15)
    assert mcnemar_p(a, a) == 1 and paired_difference(100 * a, 100 * b)[3] == mcnemar_p(a, b)


def test_differences_of_points_are_bootstrapped():
    x = np.random.default_rng(1).normal(50, 10, 60)
    y = x + np.random.default_rng(2).normal(0, 5, 60)
    assert paired_difference(x, y) == (*bootstrap(y - x, np.ones(60)), None)  # McNemar's test is for right and wrong
    mean, low, high = score_interval(x)
    assert low < mean < high and mean == pytest.approx(x.mean())


def test_two_models_are_compared_on_what_both_have():
    models = {"base": {"1": said(0, 6, 0, 7), "2": said(6, 6, 0, 7), "3": "none"},
              "PersonaFuse": {"1": said(0, 6, 0, 7), "2": "none", "3": said(0, 6, 0, 7)}}
    bench, parts = make(EQBench), [("EQ-Bench", EQ)]
    grades = {name: [bench.grade(EQ, replies_of(texts), lenient) for lenient in (False, True)]
              for name, texts in models.items()}
    for name, texts in models.items():
        row = score_table(bench, parts, grades[name], dict.fromkeys("123", 0), replies_of(texts), 0)[1]
        assert (row[1], row[-1]) == ("2", "1")  # n, unparsed
    row = comparison_table(bench, parts, grades, 0)[1]
    assert row[:3] == ["EQ-Bench", "100.0", "100.0"] and row[-2:] == ["+0.0 %", "+69.0 %"]
    assert row[3].startswith("+0.0")


# ----------------------------------------------------------------------------------------------------------------------
# Files that are not as published

@pytest.fixture(scope="session")
def made_up(tmp_path_factory):
    """A folder of made-up benchmarks with the layout and the row counts of the published ones."""
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


def write_eqbench(folder, score="1", prompt=EQ_PROMPT):
    """EQ-Bench's file with one question that differs."""
    def question(score, prompt):
        return {"prompt": prompt, "reference_answer_fullscale": {
            f"emotion{i}{end}": value for i in range(1, 5) for end, value in (("", f"e{i}"), ("_score", score))}}
    found = {str(i): question("1", EQ_PROMPT) for i in range(1, 172)} | {"7": question(score, prompt)}
    (folder / "eqbench/data").mkdir(parents=True)
    (folder / "eqbench/data/eq_bench_v2_questions_171.json").write_text(json.dumps(found))


EA_FILE, EU_FILE = "emobench/data/EA.jsonl", "emobench/data/EU.jsonl"
SAFETY, ANSWERS = (f"safetybench/opensource_data/test_{name}zh_subset.json" for name in ("", "answers_"))


@pytest.mark.parametrize("name, change, words", [
    ("emobench", lambda d: shutil.rmtree(d / "emobench" / "data"), "EA.jsonl: No such file"),
    ("emobench", lambda d: edit(d / EU_FILE, '"cause_label"', '"cause"'), "EU.jsonl, row 1|'cause_label'"),
    ("emobench", lambda d: edit(d / EA_FILE, '"label": "run"', '"label": "fly"'), "EA.jsonl, row 1|'fly'"),
    ("emobench", lambda d: edit(d / EA_FILE, '"Response"', '"Reply"'), "EA.jsonl, row 1|EA/en/Reply"),
    ("emobench", lambda d: edit(d / EA_FILE, '"subject": "Ann"', '"subject": 5'), "EA.jsonl, row 1|int"),
    ("emobench", lambda d: (d / EA_FILE).write_text((d / EA_FILE).read_text()[:-9]), "EA.jsonl, line 400: not JSON"),
    ("emobench", lambda d: (d / EA_FILE).write_text("".join((d / EA_FILE).read_text().splitlines(True)[:-1])),
     "399 rows, expected 400"),
    ("eqbench", lambda d: None, "eq_bench_v2_questions_171.json: no such file"),
    ("eqbench", lambda d: write_eqbench(d, score="high"), "row 7|could not convert"),
    ("eqbench", lambda d: write_eqbench(d, score=None), "row 7"),
    ("eqbench", lambda d: write_eqbench(d, prompt="How do they feel?"), "row 7|substring"),
    ("eqbench", lambda d: write_eqbench(d, prompt=5), "row 7"),
    ("tombench", lambda d: None, "Unexpected Outcome Test.jsonl"),
    ("safetybench", lambda d: (d / SAFETY).unlink(), "found the sets none|--set"),
    ("safetybench", lambda d: shutil.copy(d / SAFETY, d / "safetybench/test_en.json"), "en, zh_subset; expected one"),
    ("safetybench", lambda d: edit(d / SAFETY, '0, "category": "O', '0, "category": "U'), "answer to id 0"),
    ("safetybench", lambda d: edit(d / ANSWERS, '{"category": "Offensiveness", "answer": 0}', "5"), "answers_|row 0"),
    ("safetybench", lambda d: (d / SAFETY).write_text("[]"), "0 rows, expected 2,100"),
    ("safetybench", lambda d: (d / SAFETY).write_text("{}"), "found a dict, expected a JSON list"),
    ("safetybench", lambda d: (d / "safetybench/dev/dev_zh.json").unlink(), "dev_zh.json: no such file"),
    ("gpqa", lambda d: (d / "gpqa/dataset.zip").unlink(), "dataset.zip: No such file"),
    ("gpqa", lambda d: (d / "gpqa/dataset.zip").write_bytes(b"PK"), "dataset.zip|not a zip file"),
    ("gpqa", lambda d: shutil.make_archive(str(d / "gpqa/dataset"), "zip", d / "emobench"), "gpqa_main.csv"),
])
def test_what_is_not_as_published_is_refused(spoilt, name, change, words):
    change(spoilt)
    with pytest.raises(UserError) as error:
        make(BENCHMARKS[name], password="not-a-secret", shots=1).load(spoilt / name)
    assert all(word in str(error.value) for word in words.split("|")) and "\n" not in str(error.value)


def test_gpqa_password(made_up):
    for password, words in ((None, "--password-env"), ("wrong", "password in the variable"), ("other", "password in")):
        with pytest.raises(UserError, match=words):
            make(GPQA, password=password).load(made_up / "gpqa")
    rows = make(GPQA, password="not-a-secret", set="diamond").load(made_up / "gpqa")
    assert len(rows) == 10 * 198 and "\n" in rows[0]["question"]
    assert len(make(GPQA, password="not-a-secret").load(made_up / "gpqa")) == 10 * 448
    assert rows[5]["options"][0].count("right-5") == 2


# ----------------------------------------------------------------------------------------------------------------------
# The command

def command(*words):
    """Runs eval.py bench and returns what it wrote to standard output and to standard error."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        evaluation.main(["bench", *map(str, words)])
    return out.getvalue(), err.getvalue()


def write_replies(file, replies):
    file.write_text("".join(json.dumps({"id": id, "try": n, "seconds": 0, **reply}) + "\n"
                            for id, tries in replies.items() for n, reply in tries.items()))
    return file


def stored(folder):
    return [json.loads(line) for line in (folder / "replies.jsonl").read_text().splitlines()]


def test_replies_are_scored_without_a_model(made_up, tmp_path):
    whole = {f"EA/en/{i}": '{"answer": "%s"}' % "CA"[i % 2] for i in range(1, 201)}
    file = write_replies(tmp_path / "r.jsonl", replies_of(whole))
    out, err = command("emobench", "--data", made_up / "emobench", "--replies", file, "--json")
    assert "600 replies are missing" in err and json.loads(out) == {
        "EA/en": {"accuracy": 0.5, "unparsed": 0, "n": 200, "by_category": {"one": 0.5}}}
    out, _ = command("emobench", "--data", made_up / "emobench", "--replies", file)
    assert "50.0 [43.1, 56.9]" in out and "100.0" in out  # constant: always C
    assert max(map(len, out.splitlines())) <= 80
    file = write_replies(file, replies_of(dict(list(whole.items())[:-3])))
    out, err = command("emobench", "--data", made_up / "emobench", "--replies", file, "--json", "--part", "EA/en")
    assert json.loads(out)["EA/en"]["n"] == 197 and "3 replies are missing" in err


@pytest.mark.parametrize("line, words", [
    ('{"id": "EA/en/1", "try": 0, "out', "line 2: not JSON"), ('{"id": "EA/en/1", "try": 0}', "line 2: not a reply"),
    ('{"id": "EA/en/201", "try": 0, "output": ""}', "no question 'EA/en/201'"),
    ('{"id": "EA/en/2", "try": 0, "output": ""}', "a second reply"),
    ('{"id": "EA/en/1", "try": "0", "output": ""}', "try is '0'"),
    ('{"id": "EA/en/1", "try": 0, "output": 1}', "output is 1"),
    ('[1]', "line 2: not a reply")])
def test_a_line_that_is_no_reply_is_refused(made_up, tmp_path, line, words):
    file = write_replies(tmp_path / "r.jsonl", replies_of({"EA/en/2": "{}"}))
    file.write_text(file.read_text() + line + "\n")
    with pytest.raises(UserError, match=re.escape(words)):
        command("emobench", "--data", made_up / "emobench", "--replies", file)


@pytest.mark.parametrize("options, letter_map, valid", [
    (4, dict(zip("ABCD", "DCBA")), True), (4, {"A": "A"}, False), (4, {"A": "B", "B": "A"}, False),
    (2, {"A": "B", "B": "A"}, True), (4, None, False)])
def test_a_reply_to_tombench_needs_a_letter_for_each_option(tmp_path, options, letter_map, valid):
    row = tom(options=options)
    file = write_replies(tmp_path / "r.jsonl", {row["id"]: {0: {"output": "A", "map": letter_map}}})
    with contextlib.nullcontext() if valid else pytest.raises(UserError, match="line 1: map is"):
        assert list(read_replies(file, make(ToMBench), [row], [row])) == [row["id"]]


def test_replies_in_the_other_language_are_not_scored(made_up, tmp_path):
    texts = {f"EA/{lang}/{i}": '{"answer": "C"}' for lang in ("en", "zh") for i in range(1, 201)}
    file = write_replies(tmp_path / "r.jsonl", replies_of(texts))
    where = ["emobench", "--data", made_up / "emobench", "--replies", file, "--json"]
    assert list(json.loads(command(*where)[0])) == ["EA/en", "EA/zh"]
    assert list(json.loads(command(*where, "--lang", "zh")[0])) == ["EA/zh"]


@pytest.mark.parametrize("options, form", [
    ([], "{}"), (["--revise"], "First pass scores:\nnone\nRevised scores:\n{}"),
    (["--revise"], "First pass scores:\n{0}\nRevised scores:\n{0}")])
def test_eqbench_is_reported_with_and_without_revised_scores(tmp_path, options, form):
    write_eqbench(tmp_path)
    text = form.format(said(1, 1, 1, 2, names=("e1", "e2", "e3", "e4")))
    file = write_replies(tmp_path / "r.jsonl", replies_of(dict.fromkeys(map(str, range(1, 172)), text)))
    out, _ = command("eqbench", "--data", tmp_path / "eqbench", "--replies", file, "--tries", "1", *options)
    n, _, constant, score = out.split("EQ-Bench  ")[1].split()[:4]
    assert (n, constant, score) == ("171", "100.0", "98.7") and "parseable 171" in out


def test_a_run_resumes_and_compares(made_up, run_folder, tmp_path, monkeypatch):
    where = ["emobench", "--data", made_up / "emobench", "--run", run_folder, "--out", tmp_path, "--rows", "6",
             "--max-new-tokens", "5", "--lang", "en"]
    out, err = command(*where)
    assert max(map(len, out.splitlines())) <= 80 and "\r" not in out + err and "+37.9 %" in out and "6 of 400" in err
    before = {who: stored(tmp_path / "emobench" / who) for who in ("base", "PersonaFuse")}
    assert all(len(replies) == 6 and list(replies[0]) == ["id", "try", "output", "seconds"]
               for replies in before.values())
    assert sorted(r["id"] for r in before["base"]) == [f"{task}/en/{i}" for task in ("EA", "EU") for i in (1, 134, 67)]
    assert [r["output"] for r in before["base"]] != [r["output"] for r in before["PersonaFuse"]]
    file = tmp_path / "emobench" / "PersonaFuse" / "replies.jsonl"
    lines = file.read_text().splitlines(True)
    file.write_text("".join(lines[:3]) + lines[3][:20])  # stopped in the middle of the fourth
    asked = []

    def count(model, prompts, *rest, **more):
        asked.extend(prompts)
        return generate(model, prompts, *rest, **more)
    monkeypatch.setattr(bench_module, "generate", count)
    assert command(*where)[0] == out and len(asked) == 3
    after = stored(file.parent)
    assert [(r["id"], r["output"]) for r in after] == [(r["id"], r["output"]) for r in before["PersonaFuse"]]
    asked.clear()
    assert set(json.loads(command(*where, "--json")[0])) == {"base", "PersonaFuse"} and not asked
    with pytest.raises(UserError, match="max_new_tokens was 5 and is now 6"):
        command(*where[:-4], "--max-new-tokens", "6", "--lang", "en")
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps({"emobench/EA/en": "Choose."}))
    with pytest.raises(UserError, match="prompts was"):
        command(*where, "--prompts", prompts)
    command(*where, "--persona", "O+", "--only", "personafuse")
    assert len(stored(tmp_path / "emobench" / "by-hand")) == 6


def test_with_fewer_tries_than_before_the_first_replies_are_scored_and_the_others_stay(run_folder, tmp_path):
    """No reply of the tiny base can be parsed, so each question is asked three times."""
    write_eqbench(tmp_path)
    where = ["eqbench", "--data", tmp_path / "eqbench", "--run", run_folder, "--only", "base", "--rows", "2",
             "--max-new-tokens", "3", "--json", "--out"]
    command(*where, tmp_path / "three")
    file = tmp_path / "three" / "eqbench" / "base" / "replies.jsonl"
    replies = stored(file.parent)
    assert sorted(reply["try"] for reply in replies) == [0, 0, 1, 1, 2, 2]
    for reply in replies:
        if reply["try"]:
            reply["output"] = "Scores:\n" + said(1, 1, 1, 2, names=("e1", "e2", "e3", "e4"))
    file.write_text("".join(json.dumps(reply) + "\n" for reply in replies))
    before = file.read_bytes()
    one, _ = command(*where, tmp_path / "one", "--tries", "1")
    fewer, _ = command(*where, tmp_path / "three", "--tries", "1")
    assert fewer == one and file.read_bytes() == before


def test_replies_of_other_models_are_never_mixed(made_up, run_folder, tmp_path):
    """Another base of the same folder name, another dtype or router, or one other expert is refused."""
    def altered(folder, file):
        state = load_file(folder / file)
        save_file({name: t + 1e-3 for name, t in state.items()}, folder / file, metadata={"format": "pt"})
        return folder
    run, last = shutil.copytree(run_folder, tmp_path / "run"), f"joint/experts/{EXPERTS[-1]}/adapter_model.safetensors"
    few = ["emobench", "--data", made_up / "emobench", "--out", tmp_path / "out", "--mode", "logits",
           "--part", "EA/en/1", "--rows", "1"]
    base = [*few, "--base", shutil.copytree(run / "models" / "base", tmp_path / "a" / "m")]
    fused = [*few, "--run", run, "--only", "personafuse"]
    command(*base), command(*base), command(*fused), command(*fused)
    config = tmp_path / "out" / "emobench" / "base" / "config.json"
    text = config.read_text()
    assert json.loads(text)["dtype"] == "float32"
    other = altered(shutil.copytree(tmp_path / "a" / "m", tmp_path / "b" / "m"), "model.safetensors")
    before = {file: file.read_bytes() for file in (tmp_path / "out").rglob("*.json*")}
    for words, why in (([*few, "--base", other], "content was '[0-9a-f]+' and is now '[0-9a-f]+'. Choose"),
                       ([*base, "--dtype", "bfloat16"], "dtype was 'float32' and is now 'bfloat16'. Choose"),
                       ([*base, "--int8"], "dtype was 'float32' and is now 'int8, float32'. Choose"),
                       ([*fused, "--int8"], "dtype was 'float32' and is now 'int8, float32'. Choose"),
                       ([*fused, "--router", run / "router" / "router"], "router was")):
        with pytest.raises(UserError, match="other settings: " + why):
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
def test_a_reply_cut_off_anywhere_is_removed_and_the_others_are_not_written_again(made_up, tmp_path, monkeypatch, n):
    """A disk that is full, or a kill, would lose what is written again."""
    bench, file, whole = make(EmoBench), tmp_path / "replies.jsonl", "".join(map(reply, range(1, n + 1))).encode()
    rows, cut_off = bench.load(made_up / "emobench"), reply(n + 1).encode()
    assert open_replies(tmp_path, {}, bench, rows, rows) == {}

    def full(path, data):
        open(path, "wb").close()
        raise OSError(28, "No space left on device")
    for length in range(len(cut_off)):
        file.write_bytes(whole + cut_off[:length])
        with monkeypatch.context() as patch:
            patch.setattr(Path, "write_bytes", full)
            found = open_replies(tmp_path, {}, bench, rows, rows)
        assert list(found) == [f"EA/en/{i}" for i in range(1, n + 1)] and file.read_bytes() == whole


@pytest.mark.parametrize("ours, text", [
    (False, "some notes"), (False, "some notes\nand more\n"), (False, reply(1)), (False, '{"id": "EA/en/1", "try": 0'),
    (True, "some notes\n"), (True, '{"id": "r1"}\n'), (True, "[1]\n")])
def test_a_file_of_something_else_is_left_as_it_is(made_up, tmp_path, ours, text):
    """ours: whether the program made the folder, and so wrote a config.json first."""
    bench, file = make(EmoBench), tmp_path / "replies.jsonl"
    rows = bench.load(made_up / "emobench")
    if ours:
        open_replies(tmp_path, {}, bench, rows, rows)
    file.write_text(text)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match="replies.jsonl, line 1: not " if ours else "no config.json beside it") as error:
        open_replies(tmp_path, {}, bench, rows, rows)
    assert "\n" not in str(error.value) and sorted(tmp_path.iterdir()) == before and file.read_text() == text


def test_logits_mode_equals_scoring_every_letter_by_itself(made_up, run_folder, monkeypatch):
    """The letter is the argmax of the plain model's log-probabilities, with a shared prefix or without. A prefix is
    shared by the questions of a category, unless each question has another gate."""
    bench = make(SafetyBench, shots=2)
    rows = bench.load(made_up / "safetybench")[:9]
    models = bench_module.Models(bench_module.Bench(names=["x"], run=str(run_folder)))
    assert models.names == ["base", "PersonaFuse"]
    prompts, model, chat = list(bench.unanswered(rows, {})), models.model, models.chat
    one = models.route(prompts[:1])
    assert torch.allclose(models.route(prompts)[:1], one)
    monkeypatch.setattr(measure_module, "score_queries", None)  # each query is read once: five tries cost one reading
    assert models.route(prompts + prompts).shape == (18, 10)
    assert set(models.gate_of_query) == {row["question"] for row in rows}  # neither options nor examples
    for layer in expert_layers(model).values():  # so strong that gates matter
        torch.nn.init.normal_(layer.B, std=0.3)
    shared, compute = [], Prefix.compute
    monkeypatch.setattr(bench_module.Prefix, "compute", lambda *args: shared.append(args) or compute(*args))
    # of seven categories two have two questions
    for gate, route, prefixes in ((None, None, 2), (one, None, 2), (None, models.route, 0)):
        shared.clear()
        batches = bench_module.answer_prompts(model, chat, prompts, gate, route, "logits", 0, 4096, 0)
        found = {prompt.id: text for answered, texts in batches for prompt, text in zip(answered, texts)}
        for prompt in prompts:
            ids = chat.prompt([{"role": "user", "content": prompt.text}]) + encode(chat.tokenizer, "(")
            with torch.no_grad():
                logits = model(torch.tensor([ids]), route([prompt]) if route else gate)[0, -1]
            scores = {x: logits[encode(chat.tokenizer, x)[0]].item() for x in "ABC"}
            assert found[prompt.id] == f"({max(scores, key=scores.get)})"
        assert len(shared) == prefixes


def test_gpqa_questions_never_reach_a_file_or_the_terminal(made_up, run_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("GPQA_PASSWORD", "not-a-secret")
    rows = make(GPQA, password="not-a-secret", set="diamond").load(made_up / "gpqa")
    told = {row["id"]: row["question"] + " Answer: " + row["gold"] for row in rows}
    letters, told["1/0"] = [rows[2]["gold"], "A" if rows[2]["gold"] == "B" else "B"], "It is (B), a quagga"
    told["2/0"] = "Answer: {}? No quagga has it. Answer: {}".format(*letters)
    monkeypatch.setattr(bench_module, "answer_prompts", lambda model, chat, prompts, *rest: iter(
        [(prompts, [told[prompt.id] for prompt in prompts])]))
    where = ["gpqa", "--data", made_up / "gpqa", "--run", run_folder, "--out", tmp_path, "--set", "diamond"]
    out, err = command(*where, "--password-env", "GPQA_PASSWORD", "--only", "base")
    outputs = {reply["id"]: reply["output"] for reply in stored(tmp_path / "gpqa" / "base")}
    assert outputs["0/0"] == f"Answer: {rows[0]['gold']}" and outputs["1/0"] == "(B)" and len(outputs) == 198
    assert outputs["2/0"] == "Answer: {}\nAnswer: {}".format(*letters)  # both letters where the rules differ
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
    out, _ = command("safetybench", "--data", made_up / "safetybench", *where, "--json", "--part", "Mental")
    chosen = {str(3 * (7 * i + 3)) for i in (0, 42, 85, 128, 171, 214, 257)}  # every seventh question is of this part
    assert {r["id"] for r in stored(tmp_path / "safetybench" / "base")} >= chosen
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
    (["eqbench", "--base", "x", "--mode", "logits"], "--mode logits chooses among letters"),
    (["emobench", "--base", "x", "--shots", "6"], "five examples"),
    (["emobench", "--base", "x", "--mode", "logits", "--cot"], "--cot asks for reasoning"),
    (["emobench", "--base", "x", "--part", "XX"], "the first id is 'EA/en/1', the parts are EA/en, EA/zh, EU/en"),
    (["tombench", "--base", "x", "--tries", "6"], "--tries 6: ToMBench has five orders"),
    (["emobench", "--replies", "nowhere"], "nowhere: No such file")])
def test_what_cannot_be_is_said_in_one_line(made_up, tmp_path, words, problem):
    folder = made_up / words[0] if words[0] in BENCHMARKS else made_up
    with pytest.raises(UserError, match=re.escape(problem)):
        command(*words, "--data", folder, "--out", tmp_path)


def test_the_published_questions_are_asked(published, run_folder, tmp_path):
    for name, options in (("emobench", {}), ("emobench", {"cot": True}), ("eqbench", {"revise": True}),
                          ("tombench", {}), ("safetybench", {"shots": 5})):
        bench = make(BENCHMARKS[name], **options)
        prompts = list(bench.unanswered(bench.load(published / name), {}))
        assert len(prompts) == {"emobench": 800, "eqbench": 171, "tombench": 2 * 5 * 2860, "safetybench": 2100}[name]
        assert all(prompt.query.strip() and prompt.text.endswith(prompt.question) for prompt in prompts)
    for name, mode in (("eqbench", "generate"), ("tombench", "logits")):
        command(name, "--data", published / name, "--run", run_folder, "--out", tmp_path, "--rows", "2", "--only",
                "personafuse", "--max-new-tokens", "3", "--mode", mode)
        replies = stored(tmp_path / name / "PersonaFuse")
        assert Counter(reply["try"] for reply in replies) == dict.fromkeys(range(3 if name == "eqbench" else 5), 2)
        assert name == "eqbench" or all(re.fullmatch(r"\[\[[A-D]\]\]", reply["output"]) for reply in replies)
