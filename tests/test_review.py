"""Laws of looking at the data: synth.py report, split and review."""
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
from support.records import SPLITS, normalise_query, load_data, read_records, split_records, write_records
from support.review import krippendorff_alpha
from synth import template_records


def record(number, traits=None, **changes):
    return {"id": f"r{number}", "query": f"What now, number {number}?", "response": f"Wait for {number}.",
            "traits": {"openness": 1} if traits is None else traits} | changes


def reported(capsys, *argv):
    status = synth.main(["report", *map(str, argv), "--json"])
    said = capsys.readouterr()
    return json.loads(said.out), status or 0, said.err


# ----------------------------------------------------------------------------------------------------------------------
# report

def test_a_report_counts_what_is_there(tmp_path, capsys):
    cot = {"situation": "one two three", "traits": {"openness": {"pole": "high", "cue": " What  now"}}}
    teacher = {"name": "http:m", "calls": 2, "tokens_read": 10, "tokens_written": 5}
    records = [record(0, cot=cot, domain="work", teacher=teacher), record(1, {"openness": 1, "neuroticism": -1},
                                                                          domain="work"),
               record(2, {}, query=" what NOW, number 1? ", culture="Finnish"), record(3,
                                                                                       response="A  WORD of openness."),
               record(4, response="a word of openness.", cot=cot | {"traits": {"openness": {"pole": "low",
                                                                                            "cue": "no such"}}})]
    write_records(tmp_path / "o.jsonl", records)
    write_records(tmp_path / "o.rejected.jsonl", [
        {"id": "a", "reason": "all-zero vector: none", "teacher": teacher}, {"id": "b", "reason": "server: 500"},
        {"id": "b", "reason": "it is empty"}, {"id": "r0", "reason": "done since"}])
    found, status, said = reported(capsys, tmp_path / "o.jsonl")
    assert found["records"] == 5 and found["all_zero"] == 1 and found["rejected"] == {"all-zero vector": 1,
                                                                                      "it is empty": 1}
    assert found["all_zero_share"] == pytest.approx(2 / 6) and status == 1 and "33.3% of the trait vectors" in said
    assert found["poles"] == dict.fromkeys(EXPERTS, 0) | {"high_openness": 0.8, "low_neuroticism": 0.2}
    assert found["active_poles"] == {"0": 1, "1": 3, "2": 1}
    both = found["together"]
    assert both["high_openness"]["low_neuroticism"] == both["low_neuroticism"]["high_openness"] == 1
    assert both["high_openness"]["high_openness"] == 4 and both["low_openness"]["high_openness"] == 0
    assert (found["duplicate_queries"], found["duplicate_responses"]) == (1, 1) and found["naming_traits"] == ["r3",
                                                                                                               "r4"]
    assert found["words"]["situation"] == {"5 %": 3, "median": 3, "95 %": 3, "longest": 3}
    assert found["words"]["response"]["longest"] == 4 and found["words"]["query"]["median"] == 4
    assert found["cues"]["high_openness"] == [["what now", 1]] and found["cues"]["low_openness"] == [["no such", 1]]
    assert found["cues_quoted"] == 0.5 and found["teachers"] == {"http:m": 2} and found["calls"] == 4
    assert (found["tokens_read"], found["tokens_written"]) == (20, 10)
    assert found["domain"] == {"work": {"records": 2, "all_zero": 0, "poles": dict.fromkeys(EXPERTS, 0) | {
        "high_openness": 1, "low_neuroticism": 0.5}}}
    assert found["culture"]["Finnish"] == {"records": 1, "all_zero": 1, "poles": dict.fromkeys(EXPERTS, 0)}


def test_a_report_of_other_peoples_records_ends_in_no_traceback(tmp_path, capsys):
    teachers = [{"name": ["m"], "calls": "many"}, {"tokens_read": None, "calls": 2}, "m"]
    write_records(tmp_path / "r.jsonl", [record(i, teacher=teacher) for i, teacher in enumerate(teachers)])
    found, status, _ = reported(capsys, tmp_path / "r.jsonl")
    assert not status and found["calls"] == 2 and found["teachers"] == {"['m']": 1, "?": 1}


@pytest.mark.parametrize("kept", [5, "high", {"openness": "high"}, [1]])
def test_labels_kept_by_a_review_are_checked_as_labels_are(tmp_path, kept):
    write_records(tmp_path / "r.jsonl", [record(0, teacher_traits=kept)])
    with pytest.raises(UserError, match="r.jsonl, line 1: teacher_traits is "):
        read_records(tmp_path / "r.jsonl")


@pytest.mark.parametrize("zeros, warned, status", [(2, False, 0), (3, True, 0), (20, True, 0), (21, True, 1), (100,
                                                                                                               True,
                                                                                                               1)])
def test_all_zero_vectors_warn_above_2_percent_and_fail_above_20(tmp_path, capsys, zeros, warned, status):
    write_records(tmp_path / "o.jsonl", [record(i, {"openness": 0} if i < zeros else None) for i in range(100)])
    warning = f"warning: {zeros}.0% of the trait vectors are all zero, the source's sign of a synthesis that has failed"
    _, found, said = reported(capsys, tmp_path / "o.jsonl")
    assert found == status and (said.startswith(warning) and said.count("\n") == 1 if warned else said == "")


def test_a_report_for_people_fits_a_terminal(tmp_path, capsys):
    records = template_records("train", 300) + [record(1, domain="a domain with a long name " * 3, culture="日本")]
    write_records(tmp_path / "o.jsonl", records)
    assert not synth.main(["report", str(tmp_path / "o.jsonl")])
    lines = capsys.readouterr().out.splitlines()[1:]
    assert max(map(len, lines)) <= 80 and not any("\r" in line for line in lines)
    text = "\n".join(lines)
    for part in ("301 records", *EXPERTS, "work", "日本", "a domain with a long na…", "all-zero vectors", "median", "O+"):
        assert part in text
    for expert in EXPERTS:  # the shares are those of the records
        share = sum(active_experts(r["traits"])[EXPERTS.index(expert)].item() for r in records) / len(records)
        assert re.search(rf"{expert} +{share:.1%}", text)


@pytest.mark.parametrize("text, named", [("Your Openness shows", True), ("you're an extrovert", True), ("introverted",
                                                                                                        True),
                                         ("so neurotic", True), ("Be conscientious", True), ("highly agreeable", True),
                                         ("stay open and warm", False), ("I agree", False), ("extra overs", False)])
def test_naming_a_trait_outright(text, named):
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
    with pytest.raises(UserError, match="train.jsonl is there already"):
        synth.main(["split", str(tmp_path / "o.jsonl")])
    assert (tmp_path / "o" / "test.jsonl").read_bytes() == before
    assert not synth.main(["split", str(tmp_path / "o.jsonl"), "--overwrite", "--out", str(tmp_path / "o")])
    assert (tmp_path / "o" / "test.jsonl").read_bytes() != before


def test_domains_held_out_are_in_the_test_split_alone_with_their_queries_wherever_these_stand(tmp_path):
    records = [record(i, domain=("work", "family", "health")[i % 3]) for i in range(300)]
    records.append(record("twin", domain="work", query="WHAT now, number 2?"))  # number 2 is of health
    write_records(tmp_path / "o.jsonl", records)
    assert not synth.main(["split", str(tmp_path / "o.jsonl"), "--out", str(tmp_path / "x"), "--hold-out", "health",
                           "family"])
    parts = {name: read_records(tmp_path / "x" / f"{name}.jsonl") for name in SPLITS}
    for name in SPLITS[:2]:
        assert {r["domain"] for r in parts[name]} == {"work"}
    assert {"health", "family"} <= {r["domain"] for r in parts["test"]} and "rtwin" in {r["id"] for r in parts["test"]}
    assert sorted(r["id"] for part in parts.values() for r in part) == sorted(r["id"] for r in records)
    with pytest.raises(UserError, match="no record is of the domain 'travel'; there are family, health, work"):
        synth.main(["split", str(tmp_path / "o.jsonl"), "--hold-out", "health", "travel", "--out", str(tmp_path / "y")])
    with pytest.raises(UserError, match="too few records: none with an active trait for train"):
        synth.main(["split", str(tmp_path / "o.jsonl"), "--hold-out", "work", "family", "health", "--out",
                    str(tmp_path / "y")])
    assert not (tmp_path / "y").exists()


def test_two_files_with_one_id_are_not_put_together(tmp_path):
    for name in "ab":
        write_records(tmp_path / f"{name}.jsonl", [record(i) for i in range(50)])
    with pytest.raises(UserError, match="b.jsonl: id 'r0' stands in .*a.jsonl too"):
        synth.main(["split", str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")])


# ----------------------------------------------------------------------------------------------------------------------
# review

def rows(path):
    return list(csv.DictReader(io.StringIO(path.read_bytes().decode("utf-8-sig"))))


def fill(table, path, label, mark=","):
    """A copy of a review's table, filled in by label(row, trait)."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        found = rows(table)
        sheet = csv.DictWriter(file, found[0], delimiter=mark)
        sheet.writeheader()
        sheet.writerows(row | {trait: label(row, trait) for trait in TRAITS} for row in found)
    return str(path)


@pytest.fixture
def drawn(tmp_path):
    records = [record(i, {TRAITS[i % 5]: 1 if i % 2 else -1} if i % 40 else {}) for i in range(400)]
    write_records(tmp_path / "o.jsonl", records)
    assert not synth.main(["review", str(tmp_path / "o.jsonl"), "--sample", "44", "--out",
                           str(tmp_path / "review.csv")])
    return tmp_path, {r["id"]: r for r in records}


def test_a_sample_takes_from_each_pole_alike_and_hides_the_labels(drawn):
    folder, records = drawn
    table = rows(folder / "review.csv")
    assert len({row["id"] for row in table}) == 44 and list(table[0]) == ["id", "query", "response", *TRAITS, "comment"]
    counts = sum(active_experts(records[row["id"]]["traits"]) for row in table)
    assert counts.tolist() == [4] * 10 and all(row[trait] == "" for row in table for trait in TRAITS)
    assert all((row["query"], row["response"]) == (records[row["id"]]["query"],
                                                   records[row["id"]]["response"]) for row in table)
    order = [active_experts(records[row["id"]]["traits"]).argmax().item() for row in table]
    assert order != sorted(order) and order[:11] != order[11:22]  # the place says nothing
    synth.main(["review", str(folder / "o.jsonl"), "--sample", "44", "--out", str(folder / "again.csv"),
                "--show-labels"])
    again = rows(folder / "again.csv")
    assert [row["id"] for row in again] == [row["id"] for row in table]
    assert all(int(row[f"teacher_{t}"]) == records[row["id"]]["traits"].get(t, 0) for row in again for t in TRAITS)
    synth.main(["review", str(folder / "o.jsonl"), "--sample", "999", "--seed", "1", "--out", str(folder / "all.csv")])
    assert len(rows(folder / "all.csv")) == 400
    with pytest.raises(UserError, match="review.csv is there already, perhaps filled in"):
        synth.main(["review", str(folder / "o.jsonl"), "--out", str(folder / "review.csv")])


@pytest.mark.parametrize("argv, why", [
    ("mine.records.jsonl --out mine.csv", "mine.records.jsonl, the records to draw from, would be replaced"),
    ("mine.records.jsonl --out mine.csv --overwrite", "mine.records.jsonl, the records to draw from, would be replaced"),
    ("link.jsonl --out ../{}/mine.csv --overwrite", "mine.records.jsonl, the records to draw from, would be replaced"),
    ("mine.records.jsonl --out filled.csv", "filled.csv is there already, perhaps filled in"),
    ("o.jsonl --out mine.csv", "mine.records.jsonl is there already; --overwrite replaces it, another --out")])
def test_a_sample_replaces_no_records_unasked(drawn, monkeypatch, argv, why):
    folder, _ = drawn
    monkeypatch.chdir(folder)
    (folder / "mine.records.jsonl").write_bytes((folder / "o.jsonl").read_bytes())
    (folder / "link.jsonl").symlink_to("mine.records.jsonl")
    (folder / "filled.csv").write_text("filled in")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(UserError, match=re.escape(why)) as error:
        synth.main(["review", *argv.format(folder.name).split(), "--sample", "5"])
    assert "\n" not in str(error.value) and {file.name: file.read_bytes() for file in folder.iterdir()} == before
    synth.main("review o.jsonl --out mine.csv --sample 5 --overwrite".split())
    assert len(read_records(folder / "mine.records.jsonl")) == 5


def test_a_rare_pole_is_taken_whole_and_the_rest_filled_up():
    records = [record(i, {"openness": 1}) for i in range(90)] + [record(i, {"neuroticism": -1}) for i in range(90, 93)]
    sample = review.stratified(records, 21, 0)
    assert len({r["id"] for r in sample}) == len(sample) == 21
    assert sum("neuroticism" in r["traits"] for r in sample) == 3 and len(review.stratified(records, 5, 0)) == 5


def test_no_cell_of_a_spreadsheet_is_a_formula_and_all_text_is_shown(tmp_path):
    odd = [record(0, query="=HYPERLINK(1)", response="+1\n\"q\", ü"), record(1, query="@x", response="-y"),
           record(2, id="=2", culture="日本", history=[{"role": "user", "content": "Hi"}, {"role": "assistant",
                                                                                         "content": "=3"}])]
    write_records(tmp_path / "o.jsonl", odd)
    synth.main(["review", str(tmp_path / "o.jsonl"), "--sample", "3"])
    table = {row["id"]: row for row in rows(tmp_path / "o.review.csv")}
    assert not any(text[:1] in "=+-@" for row in table.values() for text in row.values() if text)
    assert table["r0"]["query"] == "'=HYPERLINK(1)" and table["r0"]["response"] == "'+1\n\"q\", ü"
    assert table["'=2"]["history"] == "user: Hi\nassistant: =3" and table["'=2"]["culture"] == "日本"
    assert (tmp_path / "o.review.csv").read_bytes().startswith(b"\xef\xbb\xbf")
    filled = fill(tmp_path / "o.review.csv", tmp_path / "a.csv", lambda row, trait: "1")
    assert not synth.main(["review", str(tmp_path / "o.jsonl"), "--import", filled])
    assert all(set(r["traits"].values()) == {1} for r in read_records(tmp_path / "o.corrected.jsonl"))


@pytest.mark.parametrize("named", [True, False])
def test_agreement_and_a_corrected_file_that_keeps_the_originals(drawn, capsys, named):
    """a agrees with the teacher; b and c find openness everywhere; b leaves conscientiousness out. Without FILE, the
    sample beside the first table is what is corrected."""
    folder, records = drawn

    def teachers(row, trait):
        return {1: "high", -1: "−1", 0: " 0"}[records[row["id"]]["traits"].get(trait, 0)]
    tables = [fill(folder / "review.csv", folder / "a.csv", teachers, ";"), *(fill(
        folder / "review.csv", folder / f"{name}.csv", lambda row, trait: "1" if trait == "openness" else
        "" if trait == "conscientiousness" and name == "b" else teachers(row, trait)) for name in "bc")]
    before, out = (folder / "o.jsonl").read_bytes(), folder / "fixed.jsonl"
    write_records(folder / "a.records.jsonl", [record("of another sample")])
    assert not synth.main(["review", *([str(folder / "o.jsonl")] if named else []), "--out", str(out), "--import",
                           *tables])
    said, fixed = capsys.readouterr().out, {r["id"]: r for r in read_records(out)}
    ids, changed = {row["id"] for row in rows(folder / "review.csv")}, set()
    assert set(fixed) == (set(records) if named else ids) and (folder / "o.jsonl").read_bytes() == before
    for key, r in fixed.items():
        was = records[key]["traits"].get("openness", 0)
        if key in ids and was != 1:
            changed.add(key)
            assert r["traits"]["openness"] == 1 and r["teacher_traits"] == {"openness": was}
            assert {t: v for t, v in r["traits"].items() if t != "openness"} == {
                t: v for t, v in records[key]["traits"].items() if t != "openness"}
        else:
            assert r == records[key]
    assert f"{len(changed)} labels changed" in said and re.search(rf"{len(changed)}  openness", said)
    alphas = {line[:37].strip(): line[37:].split() for line in said.splitlines() if " with " in line[:39]}
    assert alphas["a.csv with teacher"] == ["1.000"] * 5 and alphas["b.csv with teacher"][1] == "–"
    assert float(alphas["c.csv with teacher"][0]) < 0.1 and alphas["annotators with each other"][2:] == ["1.000"] * 3
    # correcting again keeps the first original, and one annotator against one teacher changes it back
    assert not synth.main(["review", str(out), "--out", str(folder / "back.jsonl"), "--import", tables[0]])
    back = {r["id"]: r for r in read_records(folder / "back.jsonl")}
    for key in changed:
        assert back[key]["traits"]["openness"] == records[key]["traits"].get("openness", 0)
        assert back[key]["teacher_traits"] == {"openness": records[key]["traits"].get("openness", 0)}
    assert re.search(r"a\.csv with teacher( +1\.000){5}\n", capsys.readouterr().out)  # the teacher's own labels


def test_without_a_majority_the_teachers_label_stays(drawn):
    folder, records = drawn
    tables = [fill(folder / "review.csv", folder / f"{value}.csv", lambda row, trait: value) for value in ("1", "-1",
                                                                                                           "0")]
    for some in (tables[:2], tables):
        synth.main(["review", str(folder / "o.jsonl"), "--overwrite", "--import", *some])
        assert read_records(folder / "o.corrected.jsonl") == list(records.values())


@pytest.mark.parametrize("change, why", [
    (lambda t: t.replace(",,,,,", ",2,,,,", 1), "row 2, column openness: '2', expected 1, 0, -1 or nothing"),
    (lambda t: t.replace(",,,,,", ",,,,maybe,"), "column agreeableness: 'maybe'.*; row 3, .*; and 39 more"),
    (lambda t: t.replace("\nr", "\nx", 1), "row 2: id 'x.*' is no record's"),
    (lambda t: t + t.splitlines(True)[1], "row 46: id 'r.*' stands there twice"),
    (lambda t: t.replace("openness", "open", 1), "0 columns named 'openness'"),
    (lambda t: t.encode("utf-16"), "not UTF-8")], ids=["2", "many", "unknown", "twice", "column", "utf-16"])
def test_every_cell_is_checked_and_nothing_is_written(drawn, change, why):
    folder, _ = drawn
    text = change((folder / "review.csv").read_bytes().decode("utf-8-sig").replace("\r\n", "\n"))
    (folder / "a.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=why) as error:
        synth.main(["review", str(folder / "o.jsonl"), "--import", str(folder / "a.csv")])
    assert "\n" not in str(error.value) and not (folder / "o.corrected.jsonl").exists()


@pytest.mark.parametrize("argv, why", [
    ("review", "one file of records, found 0"), ("review a.jsonl b.jsonl", "found 2"),
    ("review o.jsonl --out x.jsonl", "expected a file named .csv"), ("review o.jsonl --sample 0", "--sample is 0"),
    ("review --import review.csv review.csv", "given twice"), ("review --import", "expected at least one argument"),
    ("review none.jsonl", "none.jsonl: No such file"), ("report", "required: FILE"), ("split", "required: FILE"),
    ("report o.jsonl --jsn", "unrecognized arguments: --jsn; see python synth.py report --help")])
def test_commands_that_make_no_sense_are_refused(drawn, monkeypatch, argv, why):
    monkeypatch.chdir(drawn[0])
    with pytest.raises(UserError, match=re.escape(why)):
        synth.main(argv.split())


def test_a_table_without_its_sample_beside_it_needs_the_records_named(drawn):
    folder, _ = drawn
    (folder / "review.records.jsonl").unlink()
    with pytest.raises(UserError, match="no .records.jsonl with all of its ids; name the records"):
        synth.main(["review", "--import", str(folder / "review.csv")])


# ----------------------------------------------------------------------------------------------------------------------
# Krippendorff's alpha

def test_alpha_by_hand():
    """Two annotators, four units: (−1, −1), (0, 1), (1, 1), (0, 0).
    Coincidences: o(−1,−1) = 2, o(0,1) = o(1,0) = 1, o(1,1) = 2, o(0,0) = 2; n = 2, 3, 3 (for −1, 0, 1), together 8.
    Distances: δ(0,1) = (3 + 3 − 3)² = 9; δ(−1,0) = (2 + 3 − 2.5)² = 6.25; δ(−1,1) = (2 + 3 + 3 − 2.5)² = 30.25.
    Observed 2·1·9 = 18; expected 2·(2·3·6.25 + 2·3·30.25 + 3·3·9) / 7 = 600/7.  α = 1 − 18·7/600 = 0.79."""
    assert krippendorff_alpha([[-1, 0, 1, 0], [-1, 1, 1, 0]]) == pytest.approx(0.79, abs=1e-12)


def test_alpha_by_hand_with_a_missing_cell():
    """Three annotators, units (1, 1, 0), (−1, −1, –), (1, –, –): the last has nothing to compare and does not count.
    The first gives each of its six ordered pairs weight 1/2: o(1,1) = 1, o(1,0) = o(0,1) = 1; the second o(−1,−1) = 2.
    n = 2 (−1), 1 (0), 2 (1), together 5. δ(0,1) = (1 + 2 − 1.5)² = 2.25 = δ(−1,0), δ(−1,1) = (2 + 1 + 2 − 2)² = 9.
    Observed 2·2.25 = 4.5; expected 2·(2·1·2.25 + 1·2·2.25 + 2·2·9) / 4 = 22.5.  α = 1 − 4.5/22.5 = 0.8."""
    nan = math.nan
    assert krippendorff_alpha([[1, -1, 1], [1, -1, nan], [0, nan, nan]]) == pytest.approx(0.8, abs=1e-12)


def test_alpha_of_full_agreement_chance_and_nothing():
    rng, nan = np.random.default_rng(0), math.nan
    one = rng.integers(-1, 2, 20_000)
    assert krippendorff_alpha([one, one]) == 1 and abs(krippendorff_alpha([one, rng.integers(-1, 2, 20_000)])) < 0.03
    assert krippendorff_alpha([one, -one]) < -0.3
    for nothing in ([[1, 1], [1, 1]], [[1, nan], [nan, 0]], [[nan], [nan]], [[1], [nan]], [[], []]):
        assert math.isnan(krippendorff_alpha(nothing))


def test_alpha_equals_the_package():
    package = pytest.importorskip("krippendorff", reason="the reference, in requirements-dev.txt, is not here")
    rng = random.Random(0)
    for trial in range(60):
        n, m = rng.randrange(2, 5), rng.randrange(3, 40)
        truth = [rng.choice((-1, 0, 1)) for _ in range(m)]
        ratings = [[math.nan if rng.random() < 0.2 else t if rng.random() < 0.6 else rng.choice((-1, 0,
                                                                                                 1)) for t in truth]
                   for _ in range(n)]
        ours = krippendorff_alpha(ratings)
        if not math.isnan(ours):
            theirs = package.alpha(reliability_data=ratings, level_of_measurement="ordinal", value_domain=[-1, 0, 1])
            assert ours == pytest.approx(theirs, abs=1e-9), trial
