"""Laws of synth.py report, split and review: what they print and write, and what they refuse."""
import csv
import io
import json
import math
import random
import re

import numpy as np
import pytest

import synth
from support import review
from lora import EXPERTS, TRAITS
from router import active_experts
from support.files import UserError
from support.records import SPLITS, load_data, normalise_query, read_records, split_records, write_records
from support.review import krippendorff_alpha
from synth import template_records


def record(number, traits=None, **changes):
    return {"id": f"r{number}", "query": f"What now, number {number}?", "response": f"Wait for {number}.",
            "traits": {"openness": 1} if traits is None else traits} | changes


def reported(capsys, file):
    """(JSON, exit status, what is said on standard error) of a report."""
    status = synth.main(["report", str(file), "--json"])
    said = capsys.readouterr()
    return json.loads(said.out), status or 0, said.err


# ----------------------------------------------------------------------------------------------------------------------
# report

def test_a_report_counts_what_is_there(tmp_path, capsys):
    teacher = {"name": "http:m", "calls": 2, "tokens_read": 10, "tokens_written": 5}

    def cot(pole, cue):
        return {"situation": "one two three", "traits": {"openness": {"pole": pole, "cue": cue}}}
    write_records(tmp_path / "o.jsonl", [
        record(0, cot=cot("high", " What  now"), domain="work", teacher=teacher),
        record(1, {"openness": 1, "neuroticism": -1}, domain="work"),
        record(2, {}, query=" what NOW, number 1? ", culture="Finnish"),
        record(3, response="A  WORD of openness."),
        record(4, response="a word of openness.", cot=cot("low", "no such"))])
    write_records(tmp_path / "o.rejected.jsonl", [
        {"id": "a", "reason": "all-zero vector: none", "teacher": teacher}, {"id": "b", "reason": "server: 500"},
        {"id": "b", "reason": "it is empty"}, {"id": "r0", "reason": "done since"}])
    found, status, said = reported(capsys, tmp_path / "o.jsonl")
    assert status == 1 and "33.3% of the trait vectors" in said
    assert found["all_zero_share"] == pytest.approx(2 / 6)
    words = found["words"]
    assert words["situation"] == {"5 %": 3, "median": 3, "95 %": 3, "longest": 3}
    assert words["response"]["longest"] == 4 and words["query"]["median"] == 4
    assert found["cues"]["high_openness"] == [["what now", 1]] and found["cues"]["low_openness"] == [["no such", 1]]
    none = dict.fromkeys(EXPERTS, 0)
    wanted = {
        "records": 5, "all_zero": 1, "rejected": {"all-zero vector": 1, "it is empty": 1},
        "poles": none | {"high_openness": 0.8, "low_neuroticism": 0.2}, "active_poles": {"0": 1, "1": 3, "2": 1},
        "duplicate_queries": 1, "duplicate_responses": 1, "naming_traits": ["r3", "r4"], "cues_quoted": 0.5,
        "teachers": {"http:m": 2}, "calls": 4, "tokens_read": 20, "tokens_written": 10,
        "domain": {"work": {"records": 2, "all_zero": 0, "poles": none | {"high_openness": 1, "low_neuroticism": 0.5}}},
        "culture": {"Finnish": {"records": 1, "all_zero": 1, "poles": none}}}
    assert {key: found[key] for key in wanted} == wanted


def test_records_from_elsewhere_are_reported_whatever_their_extra_fields_hold(tmp_path, capsys):
    teachers = [{"name": ["m"], "calls": "many"}, {"tokens_read": None, "calls": 2}, "m"]
    cots = [5, {"traits": [1], "situation": 5}, {"traits": {"openness": 1, "humour": {"pole": "high", "cue": "ha"}}}]
    write_records(tmp_path / "r.jsonl", [record(i, teacher=teachers[i], cot=cots[i]) for i in range(3)])
    found, status, _ = reported(capsys, tmp_path / "r.jsonl")
    assert not status and found["calls"] == 2 and found["teachers"] == {"['m']": 1, "?": 1}
    assert "situation" not in found["words"] and found["cues_quoted"] is None


@pytest.mark.parametrize("kept", [5, "high", {"openness": "high"}, [1]])
def test_labels_kept_by_a_review_are_checked_as_labels_are(tmp_path, kept):
    write_records(tmp_path / "r.jsonl", [record(0, teacher_traits=kept)])
    with pytest.raises(UserError, match="r.jsonl, line 1: teacher_traits"):
        read_records(tmp_path / "r.jsonl")


@pytest.mark.parametrize("zeros, warned, status", [(2, False, 0), (3, True, 0), (20, True, 0), (21, True, 1),
                                                   (100, True, 1)])
def test_all_zero_vectors_warn_above_2_percent_and_fail_above_20(tmp_path, capsys, zeros, warned, status):
    write_records(tmp_path / "o.jsonl", [record(i, {"openness": 0} if i < zeros else None) for i in range(100)])
    _, found, said = reported(capsys, tmp_path / "o.jsonl")
    assert found == status and said.count("\n") == warned
    assert said.startswith(f"warning: {zeros}.0% of the trait vectors are all zero") == warned


def test_a_report_for_people_fits_a_terminal(tmp_path, capsys):
    records = template_records("train", 300) + [record(1, domain="a domain with a long name " * 3, culture="日本")]
    write_records(tmp_path / "o.jsonl", records)
    write_records(tmp_path / "o.rejected.jsonl", [
        {"id": "a", "reason": "a long reason " * 9, "teacher": {"name": "m" * 99}}])
    assert not synth.main(["report", str(tmp_path / "o.jsonl")])
    lines = capsys.readouterr().out.splitlines()[1:]
    assert max(map(len, lines)) <= 80
    text = "\n".join(lines)
    for part in ("301 records", *EXPERTS, "work", "日本", "a domain wit", "a long reason", "mmm", "all-zero vectors",
                 "median", "O+"):
        assert part in text
    for e, expert in enumerate(EXPERTS):  # the shares are those of the records
        share = sum(active_experts(r["traits"])[e].item() for r in records) / len(records)
        assert re.search(rf"{expert} +{share:.1%}", text)


@pytest.mark.parametrize("text, named", [
    ("Your Openness shows", True), ("you're an extrovert", True), ("introverted", True), ("so neurotic", True),
    ("Be conscientious", True), ("highly agreeable", True), ("stay open and warm", False), ("I agree", False),
    ("extra overs", False)])
def test_responses_that_name_a_trait_are_found(text, named):
    assert bool(review.NAMED.search(text)) == named


# ----------------------------------------------------------------------------------------------------------------------
# split

def test_a_split_is_by_query_and_the_one_that_training_makes(tmp_path, capsys):
    records = [r for i in range(150) for r in (record(i), record(f"{i}b", query=f"  what NOW, number {i}? "))]
    write_records(tmp_path / "o.jsonl", records)
    assert not synth.main(["split", str(tmp_path / "o.jsonl"), "--seed", "3"])
    parts = {name: read_records(tmp_path / "o" / f"{name}.jsonl") for name in SPLITS}
    assert parts == split_records(records, 3) == load_data(tmp_path / "o.jsonl", 3)[0]
    queries = [{normalise_query(r["query"]) for r in part} for part in parts.values()]
    assert sum(map(len, queries)) == 150 and "train.jsonl" in capsys.readouterr().out
    before = (tmp_path / "o" / "test.jsonl").read_bytes()
    with pytest.raises(UserError, match="train.jsonl exists already; --overwrite"):
        synth.main(["split", str(tmp_path / "o.jsonl")])
    assert (tmp_path / "o" / "test.jsonl").read_bytes() == before
    assert not synth.main(["split", str(tmp_path / "o.jsonl"), "--overwrite", "--out", str(tmp_path / "o")])
    assert (tmp_path / "o" / "test.jsonl").read_bytes() != before


def test_domains_held_out_are_only_in_the_test_split_with_all_records_of_their_queries(tmp_path):
    records = [record(i, domain=("work", "family", "health")[i % 3]) for i in range(300)]
    records[0].pop("domain")  # a record without a domain is of none, and not of a domain "None"
    records.append(record("twin", domain="work", query="WHAT now, number 2?"))  # number 2 is of health
    write_records(tmp_path / "o.jsonl", records)

    def split(out, *domains):
        return synth.main(["split", str(tmp_path / "o.jsonl"), "--out", str(tmp_path / out), "--hold-out", *domains])
    assert not split("x", "health", "family")
    parts = {name: read_records(tmp_path / "x" / f"{name}.jsonl") for name in SPLITS}
    for name in SPLITS[:2]:
        assert {r["domain"] for r in parts[name] if "domain" in r} == {"work"}
    assert {"health", "family"} <= {r.get("domain") for r in parts["test"]}
    assert "rtwin" in {r["id"] for r in parts["test"]}
    assert sorted(r["id"] for part in parts.values() for r in part) == sorted(r["id"] for r in records)
    for domains, why in ((["health", "travel"], "domain 'travel'; the records' domains are family, health, work"),
                         (["None"], "no record is of the domain 'None'"),
                         (["work", "family", "health"], "too few records: none with an active trait for validation")):
        with pytest.raises(UserError, match=why):
            split("y", *domains)
    assert not (tmp_path / "y").exists()


@pytest.mark.parametrize("command", ["report", "split", "review"])
@pytest.mark.parametrize("second", "ab")  # the same file twice would double every record
def test_files_that_share_an_id_are_not_put_together(tmp_path, command, second):
    for name in "ab":
        write_records(tmp_path / f"{name}.jsonl", [record(i) for i in range(50)])
    with pytest.raises(UserError, match=f"{second}.jsonl: id 'r0' is in .*a.jsonl too"):
        synth.main([command, str(tmp_path / "a.jsonl"), str(tmp_path / f"{second}.jsonl")])


# ----------------------------------------------------------------------------------------------------------------------
# review

def rows(path):
    return list(csv.DictReader(io.StringIO(path.read_bytes().decode("utf-8-sig"))))


def fill(table, path, label, mark=","):
    """Write a copy of a review's table that label(row, trait) has filled in."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        found = rows(table)
        sheet = csv.DictWriter(file, found[0], delimiter=mark)
        sheet.writeheader()
        sheet.writerows(row | {trait: label(row, trait) for trait in TRAITS} for row in found)
    return str(path)


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """o.jsonl and a sample of it to label, review.csv, in the working directory; and the records by id."""
    monkeypatch.chdir(tmp_path)
    records = [record(i, {TRAITS[i % 5]: 1 if i % 2 else -1} if i % 40 else {}) for i in range(400)]
    write_records("o.jsonl", records)
    assert not synth.main("review o.jsonl --sample 44 --out review.csv".split())
    return tmp_path, {r["id"]: r for r in records}


def test_a_sample_takes_from_each_pole_alike_and_hides_the_labels(drawn):
    folder, records = drawn
    table = rows(folder / "review.csv")
    assert len({row["id"] for row in table}) == 44 and list(table[0]) == ["id", "query", "response", *TRAITS]
    active = [active_experts(records[row["id"]]["traits"]) for row in table]
    assert sum(active).tolist() == [4] * 10 and all(row[trait] == "" for row in table for trait in TRAITS)
    assert all(row[key] == records[row["id"]][key] for row in table for key in ("query", "response"))
    order = [poles.argmax().item() for poles in active]
    assert order != sorted(order) and order[:11] != order[11:22]  # the order gives no label away
    synth.main("review o.jsonl --sample 44 --out again.csv".split())
    assert rows(folder / "again.csv") == table  # the seed fixes the sample
    synth.main("review o.jsonl --sample 999 --seed 1 --out all.csv".split())
    assert len(rows(folder / "all.csv")) == 400


def test_a_rare_pole_is_taken_whole_and_the_rest_filled_up():
    records = [record(i, {"openness": 1}) for i in range(90)] + [record(i, {"neuroticism": -1}) for i in range(90, 93)]
    sample = review.stratified_sample(records, 21, 0)
    assert len({r["id"] for r in sample}) == len(sample) == 21
    assert sum("neuroticism" in r["traits"] for r in sample) == 3
    assert len(review.stratified_sample(records, 5, 0)) == 5


def test_no_cell_of_a_spreadsheet_is_a_formula_and_all_text_is_shown(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    history = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "=3"}]
    write_records("o.jsonl", [record(0, query="=HYPERLINK(1)", response="+1\n\"q\", ü"),
                              record(1, query="@x", response="-y"), record(2, id="=2", culture="日本", history=history)])
    synth.main("review o.jsonl --sample 3".split())
    table = {row["id"]: row for row in rows(tmp_path / "o.review.csv")}
    assert not any(text[:1] in "=+-@" for row in table.values() for text in row.values() if text)
    assert table["r0"]["query"] == "'=HYPERLINK(1)" and table["r0"]["response"] == "'+1\n\"q\", ü"
    assert table["'=2"]["history"] == "user: Hi\nassistant: =3" and table["'=2"]["culture"] == "日本"
    assert (tmp_path / "o.review.csv").read_bytes().startswith(b"\xef\xbb\xbf")
    filled = fill(tmp_path / "o.review.csv", tmp_path / "a.csv", lambda row, trait: "1")
    assert not synth.main(["review", "o.jsonl", "--import", filled])
    assert all(set(r["traits"].values()) == {1} for r in read_records("o.corrected.jsonl"))


def test_agreement_and_a_corrected_file_that_keeps_the_originals(drawn, capsys):
    """Annotator a agrees with the teacher; b and c find openness everywhere; b gives no label for conscientiousness."""
    folder, records = drawn

    def teachers(row, trait):
        return {1: "high", -1: "−1", 0: " 0"}[records[row["id"]]["traits"].get(trait, 0)]

    def open_everywhere(row, trait):
        return "1" if trait == "openness" else teachers(row, trait)
    a, b, c = (fill(folder / "review.csv", folder / name, label, mark) for name, label, mark in (
        ("a.csv", teachers, ";"),
        ("b.csv", lambda row, trait: "" if trait == "conscientiousness" else open_everywhere(row, trait), ","),
        ("c.csv", open_everywhere, ",")))
    before = (folder / "o.jsonl").read_bytes()
    assert not synth.main(["review", "o.jsonl", "--out", "fixed.jsonl", "--import", a, b, c])
    said, fixed = capsys.readouterr().out, {r["id"]: r for r in read_records("fixed.jsonl")}
    changed = {row["id"] for row in rows(folder / "review.csv") if records[row["id"]]["traits"].get("openness", 0) != 1}
    assert set(fixed) == set(records) and (folder / "o.jsonl").read_bytes() == before
    for key, r in records.items():
        assert fixed[key] == r | ({"traits": r["traits"] | {"openness": 1}, "teacher_traits": {
            "openness": r["traits"].get("openness", 0)}} if key in changed else {})
    assert f"{len(changed)} labels changed" in said and re.search(rf"openness +{len(changed)}\n", said)
    table = [line.split() for line in said.splitlines() if " with " in line]
    alphas = {" ".join(words[:-5]): words[-5:] for words in table}
    assert alphas["a.csv with teacher"] == ["1.000"] * 5 and alphas["annotators with each other"][2:] == ["1.000"] * 3
    assert float(alphas["c.csv with teacher"][0]) < 0.1 and alphas["b.csv with teacher"][1] == "–"
    # correcting again keeps the first original, and one annotator against one teacher changes it back
    assert not synth.main(["review", "fixed.jsonl", "--out", "back.jsonl", "--import", a])
    for key, r in ((r["id"], r) for r in read_records("back.jsonl") if r["id"] in changed):
        own = records[key]["traits"].get("openness", 0)
        assert r["traits"]["openness"] == own and r["teacher_traits"] == {"openness": own}
    assert re.search(r"a\.csv with teacher( +1\.000){5}\n", capsys.readouterr().out)  # against the teacher's own labels


def test_a_sheet_is_read_back_whatever_its_ids_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_records("o.jsonl", [record(i, id=id) for i, id in enumerate((" a ", "", "=1", "'x"))])
    assert not synth.main("review o.jsonl --sample 4 --out o.csv".split())
    assert not synth.main(["review", "o.jsonl", "--import", fill(tmp_path / "o.csv", "a.csv", lambda row, trait: "1")])
    assert all(set(r["traits"].values()) == {1} for r in read_records("o.corrected.jsonl"))


def test_without_a_majority_the_teachers_label_stays(drawn):
    folder, records = drawn
    tables = [fill(folder / "review.csv", folder / f"{n}.csv", lambda row, trait: n) for n in ("1", "-1", "0")]
    for some in (tables[:2], tables):
        synth.main(["review", "o.jsonl", "--overwrite", "--import", *some])
        assert read_records("o.corrected.jsonl") == list(records.values())


@pytest.mark.parametrize("change, why", [
    (lambda t: t.replace(",,,,,", ",2,,,,", 1), "row 2, column openness: '2', expected 1, 0, -1 or nothing"),
    (lambda t: t.replace(",,,,,", ",,,,maybe,"), "row 2, column agreeableness: 'maybe'"),
    (lambda t: t.replace("\nr", "\nx", 1), "row 2: id 'x.*' is not in the records"),
    (lambda t: t + t.splitlines(True)[1], "row 46: id 'r.*' is there twice"),
    (lambda t: t.replace("openness", "open", 1), "0 columns named 'openness'"),
    (lambda t: t.encode("utf-16"), "not UTF-8")], ids=["2", "maybe", "unknown", "twice", "column", "utf-16"])
def test_every_cell_is_checked_and_nothing_is_written(drawn, change, why):
    folder, _ = drawn
    text = change((folder / "review.csv").read_bytes().decode("utf-8-sig").replace("\r\n", "\n"))
    (folder / "a.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=why) as error:
        synth.main("review o.jsonl --import a.csv".split())
    assert "\n" not in str(error.value) and not (folder / "o.corrected.jsonl").exists()


@pytest.mark.parametrize("argv, why", [
    ("review", "required: FILE"), ("report", "required: FILE"), ("split", "required: FILE"),
    ("review o.jsonl --out x.jsonl", "expected a file named .csv"), ("review o.jsonl --sample 0", "--sample is 0"),
    ("review o.jsonl --out review.csv", "review.csv exists already; --overwrite"),
    ("review o.jsonl --import review.csv --out review.csv", "review.csv exists already; --overwrite"),
    ("review o.jsonl --import review.csv review.csv", "given twice"),
    ("review o.jsonl --import", "expected at least one argument"), ("review none.jsonl", "none.jsonl: No such file"),
    ("report o.jsonl --jsn", "unrecognized arguments: --jsn; see python synth.py report --help")])
def test_commands_that_make_no_sense_are_refused_and_write_nothing(drawn, argv, why):
    folder, _ = drawn
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(UserError, match=re.escape(why)) as error:
        synth.main(argv.split())
    assert "\n" not in str(error.value) and {file.name: file.read_bytes() for file in folder.iterdir()} == before


# ----------------------------------------------------------------------------------------------------------------------
# Krippendorff's alpha

NAN = math.nan


@pytest.mark.parametrize("ratings, alpha", [([[-1, 0, 1, 0], [-1, 1, 1, 0]], 0.79),
                                            ([[1, -1, 1], [1, -1, NAN], [0, NAN, NAN]], 0.8)])
def test_alpha_by_hand(ratings, alpha):
    """First: two annotators, four units, (−1, −1), (0, 1), (1, 1), (0, 0).
    Coincidences: o(−1,−1) = 2, o(0,1) = o(1,0) = 1, o(1,1) = 2, o(0,0) = 2; n = 2, 3, 3 (for −1, 0, 1), together 8.
    Distances: δ(0,1) = (3 + 3 − 3)² = 9; δ(−1,0) = (2 + 3 − 2.5)² = 6.25; δ(−1,1) = (2 + 3 + 3 − 2.5)² = 30.25.
    Observed 2·1·9 = 18; expected 2·(2·3·6.25 + 2·3·30.25 + 3·3·9) / 7 = 600/7.  α = 1 − 18·7/600 = 0.79.

    Second: three annotators, units (1, 1, 0), (−1, −1, –), (1, –, –). The last cannot be compared and does not count.
    The first gives each of its six ordered pairs weight 1/2: o(1,1) = 1, o(1,0) = o(0,1) = 1; the second o(−1,−1) = 2.
    n = 2 (−1), 1 (0), 2 (1), together 5. δ(0,1) = (1 + 2 − 1.5)² = 2.25 = δ(−1,0), δ(−1,1) = (2 + 1 + 2 − 2)² = 9.
    Observed 2·2.25 = 4.5; expected 2·(2·1·2.25 + 1·2·2.25 + 2·2·9) / 4 = 22.5.  α = 1 − 4.5/22.5 = 0.8."""
    assert krippendorff_alpha(ratings) == pytest.approx(alpha, abs=1e-12)


def test_alpha_of_full_agreement_chance_and_nothing():
    rng = np.random.default_rng(0)
    one = rng.integers(-1, 2, 20_000)
    assert krippendorff_alpha([one, one]) == 1 and abs(krippendorff_alpha([one, rng.integers(-1, 2, 20_000)])) < 0.03
    assert krippendorff_alpha([one, -one]) < -0.3
    for nothing in ([[1, 1], [1, 1]], [[1, NAN], [NAN, 0]], [[NAN], [NAN]], [[1], [NAN]], [[], []]):
        assert math.isnan(krippendorff_alpha(nothing))


def test_alpha_equals_the_package():
    package = pytest.importorskip("krippendorff", reason="the reference, in requirements-dev.txt, is not here")
    rng = random.Random(0)
    for trial in range(60):
        annotators, units = rng.randrange(2, 5), rng.randrange(3, 40)
        truth = [rng.choice((-1, 0, 1)) for _ in range(units)]
        ratings = [[NAN if rng.random() < 0.2 else t if rng.random() < 0.6 else rng.choice((-1, 0, 1)) for t in truth]
                   for _ in range(annotators)]
        ours = krippendorff_alpha(ratings)
        if not math.isnan(ours):
            theirs = package.alpha(reliability_data=ratings, level_of_measurement="ordinal", value_domain=[-1, 0, 1])
            assert ours == pytest.approx(theirs, abs=1e-9), trial
