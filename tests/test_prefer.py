"""Laws of eval.py prefer: what a sheet shows and hides, what is read from it, and what is reported."""
import csv
import io
import math
import re
from collections import Counter

import numpy as np
import pytest
import torch

import eval as evaluation
from router import persona_gate
from support import prefer
from support.files import UserError, read_lines
from support.measure import LoadedRun
from support.prefer import QUALITIES, compare
from support.records import write_records
from support.review import krippendorff_alpha
from test_commands import here, reduced, run_folder  # noqa: F401 (fixtures)
from train import generate_replies

MESSAGES = [{"id": i, "query": f"What now, {i}?", "domain": ("work", "family")[i % 2],
             **({"culture": "日本"} if i % 3 == 0 else {})} for i in range(24)]
MESSAGES[1] |= {"query": "=HYPERLINK(1)"}
MESSAGES[4] |= {"domain": ""}  # as good as none
MESSAGES[2] |= {"history": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho\nho"}]}


def rows(path):
    return list(csv.DictReader(io.StringIO(path.read_bytes().decode("utf-8-sig"))))


def key_of(path):
    """What was compared, and the rows of a key."""
    compared, *keyed = (line for _, line in read_lines(path))
    return compared, keyed


def command(run, *words):
    return evaluation.main(["prefer", "--run", str(run), *words])


def reported(capsys, run, *words):
    capsys.readouterr()
    assert not command(run, "--import", *map(str, words))
    return capsys.readouterr().out


@pytest.fixture
def said(monkeypatch):
    """Replies are made without a model: they name the message, and whether a gate was given."""
    def replies(model, chat, records, gates=None, max_new_tokens=80):
        return [f"{'=base' if gates is None else '+mixed'} to\r\n{record['query']}" for record in records]
    monkeypatch.setattr(prefer, "generate_replies", replies)


@pytest.fixture
def sheet(run_folder, here, said):  # noqa: F811
    """sheet.csv for MESSAGES in the working directory."""
    write_records(here / "messages.jsonl", MESSAGES)
    assert not command(run_folder, "--file", "messages.jsonl", "--out", "sheet.csv")
    return here / "sheet.csv"


def fill(sheet, path, answers, mark=",", order=lambda table: table):
    """Write a copy of a sheet that a judge has filled in: answers(row) returns cells."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, rows(sheet)[0], delimiter=mark)
        table.writeheader()
        table.writerows(row | answers(row) for row in order(rows(sheet)))
    return path


def is_mixed(row, side):
    return "+mixed" in row[f"reply {side}"]


def judge(seed, likes=0.8, blank=0.1):
    """A judge who prefers PersonaFuse's reply with probability `likes`, judges by the texts alone and leaves cells
    empty. The same message gets the same answer whatever the order of the replies."""
    def answers(row):
        rng = np.random.default_rng([seed, *row["message"].encode()])
        side, other = "AB" if is_mixed(row, "A") else "BA"
        cells = {"better": side if (x := rng.random()) < likes else other if x < 0.9 else "tie"}
        for quality in QUALITIES:
            cells |= {f"{quality} {side}": str(rng.integers(2, 6)), f"{quality} {other}": str(rng.integers(1, 5))}
        return {column: "" if rng.random() < blank else text for column, text in cells.items()}
    return answers


# ----------------------------------------------------------------------------------------------------------------------
# The sheet

@pytest.mark.parametrize("options, mine, other", [
    ([], "router", "the base"), (["--against", "O+,E-"], "router", "O+,E-"),
    (["--persona", "N+", "--against", "N-:0.5"], "N+", "N-:0.5"),
    (["--gate", "high_openness"], "high_openness", "the base")])
def test_a_sheet_has_both_replies_and_the_key_says_whose_they_are(
        run_folder, here, capsys, options, mine, other):  # noqa: F811
    write_records(here / "m.jsonl", MESSAGES[:10])
    command(run_folder, "--file", "m.jsonl", "--max-new-tokens", "4", *options)
    said = capsys.readouterr().out
    assert "m.prefer.csv: 10 messages" in said and "m.prefer.key.jsonl" in said
    run = LoadedRun(evaluation.Prefer(run=str(run_folder)))
    gates = {"router": run.gates(MESSAGES[:10]), "the base": [None] * 10,
             "high_openness": torch.eye(10)[:1].expand(10, -1)}
    wanted = []
    for name in (mine, other):
        found = gates[name] if name in gates else persona_gate(name, 1.0).expand(10, -1)
        wanted.append([generate_replies(run.model, run.chat, [record], gate if gate is None else gate[None], 4)[0]
                       for record, gate in zip(MESSAGES, found)])
    compared, keyed = key_of(here / "m.prefer.key.jsonl")
    assert compared == {"PersonaFuse": f"experts after joint, gate: {mine}", "other": other, "tau": 1.0}
    for record, row, shown, *replies in zip(MESSAGES, keyed, rows(here / "m.prefer.csv"), *wanted, strict=False):
        side = row["side"]
        assert [row[f"reply {side}"], row[f"reply {'BA'['AB'.index(side)]}"]] == replies
        assert {field: row[field] for field in ("id", "domain", "culture")} == {
            field: record.get(field) for field in ("id", "domain", "culture")}
        assert all(shown[column].removeprefix("'") == row[column] for column in prefer.TEXTS)
        assert list(shown) == ["id", *prefer.TEXTS, *prefer.COLUMNS] and not any(shown[c] for c in prefer.COLUMNS)


def test_a_message_is_shown_with_what_was_said_before(sheet):
    assert [row["message"] for row in rows(sheet)][:3] == [
        "What now, 0?", "'=HYPERLINK(1)", "user: Hi\nassistant: Ho\nho\nuser: What now, 2?"]


def test_no_cell_of_a_sheet_is_a_formula(sheet):
    assert not any(text[:1] in "=+-@" for row in rows(sheet) for text in row.values() if text)
    assert {row["reply A"][:7] for row in rows(sheet)} == {"'=base ", "'+mixed"}


def test_nothing_in_a_sheet_but_the_coin_depends_on_whose_a_reply_is(run_folder, here, said, monkeypatch):  # noqa: F811
    """Where both replies are the same, sheets are the same whatever the coin, but for the hash of the key in the ids.
    The coin is fair, it has no memory, and the seed is all that it depends on."""
    write_records(here / "m.jsonl", [{"id": i, "query": f"{i}?"} for i in range(2000)])
    with monkeypatch.context() as patch:
        patch.setattr(prefer, "generate_replies", lambda model, chat, records, *_: [r["query"] for r in records])
        for seed in "01":
            command(run_folder, "--file", "m.jsonl", "--out", f"{seed}.csv", "--seed", seed)
    texts = [re.sub(r"k[0-9a-f]{8}-", "", (here / f"{seed}.csv").read_text("utf-8-sig")) for seed in "01"]
    coins = [[row["side"] for row in key_of(here / f"{seed}.key.jsonl")[1]] for seed in "01"]
    assert texts[0] == texts[1] and coins[0] != coins[1]
    for coin in coins:
        for counts in (Counter(coin), Counter(a == b for a, b in zip(coin, coin[1:]))):
            assert len(counts) == 2 and all(abs(n - 1000) < 100 for n in counts.values())  # 4.5 standard deviations
    command(run_folder, "--file", "m.jsonl", "--out", "mixed.csv")
    assert [row["side"] for row in key_of(here / "mixed.key.jsonl")[1]] == coins[0]
    assert [("B", "A")[is_mixed(row, "A")] for row in rows(here / "mixed.csv")] == coins[0]


@pytest.mark.parametrize("asking", ["prefer", "ask --max-new-tokens 1"])
def test_messages_that_are_there_twice_are_counted(run_folder, here, said, capsys, asking):  # noqa: F811
    (here / "m.txt").write_text("Hi there\nhi  THERE\nHo\n")
    assert not evaluation.main([*asking.split(), "--run", str(run_folder), "--file", "m.txt"])
    assert capsys.readouterr().err.startswith("m.txt: duplicates dropped: 1\n")


@pytest.mark.parametrize("name", ["sheet.csv", "sheet.key.jsonl"])
def test_a_sheet_or_key_that_exists_is_never_overwritten(sheet, run_folder, name):  # noqa: F811
    for other in {"sheet.csv", "sheet.key.jsonl"} - {name}:
        (sheet.parent / other).unlink()
    (sheet.parent / name).write_text("filled in")
    with pytest.raises(UserError, match=f"{name} exists already: give another name with --out"):
        command(run_folder, "--file", "messages.jsonl", "--out", "sheet.csv")
    assert (sheet.parent / name).read_text() == "filled in" and len([*sheet.parent.glob("sheet*")]) == 1


# ----------------------------------------------------------------------------------------------------------------------
# The report

def test_the_order_of_the_replies_changes_nothing(sheet, run_folder, capsys):  # noqa: F811
    """Sheets of two seeds; the judges look at the replies only. Half of the rows have the other order."""
    found = []
    for seed in "01":
        command(run_folder, "--file", "messages.jsonl", "--out", f"seed{seed}.csv", "--seed", seed)
        found.append(reported(capsys, run_folder, *(
            fill(sheet.parent / f"seed{seed}.csv", sheet.parent / f"{n}of{seed}.csv", judge(n)) for n in range(3))))
    one, other = (rows(sheet.parent / f"seed{seed}.csv") for seed in "01")
    assert 4 < sum(a["reply A"] != b["reply A"] for a, b in zip(one, other)) < 20
    assert found[0] == found[1]


def test_sheets_are_read_as_spreadsheet_programs_write_them(sheet, run_folder, capsys):  # noqa: F811
    def rough(row):
        changed = {column: row[column].removeprefix("'").replace("\r\n", "\n") for column in prefer.TEXTS}
        return changed | judge(1)(row) | {"better": f" {judge(1)(row)['better'].swapcase()} "}
    plain = fill(sheet, sheet.parent / "plain.csv", judge(1))
    other = fill(sheet, sheet.parent / "other.csv", rough, ";", lambda table: table[::-1])
    assert reported(capsys, run_folder, plain) == reported(capsys, run_folder, other)


def test_every_number_of_a_report_by_hand(sheet, run_folder, capsys):  # noqa: F811
    """Of messages 0 to 19, judge a prefers PersonaFuse in 0 to 11, has ties in 12 to 15 and prefers the base in 16 to
    19. Judge b has no verdict on 0 to 3, prefers the base in 4 to 7, which makes ties of them, and agrees on the rest.
    So there are 8 wins (0 to 3 by a alone, and 8 to 11), 8 ties and 4 losses. Messages 20 to 23 have ratings only."""
    number = {row["id"]: n for n, row in enumerate(rows(sheet))}

    def verdicts(ups, downs):
        def answers(row):
            n, (side, other) = number[row["id"]], "AB" if is_mixed(row, "A") else "BA"
            better = side if n in ups else other if n in downs else "tie" if n < 20 and ups[0] <= n else ""
            return {"better": better, f"engagement {side}": "5", f"engagement {other}": "23"[n % 2],
                    f"authenticity {side}": "1"}  # without the other's, there is no difference
        return answers
    a = fill(sheet, sheet.parent / "a.csv", verdicts(range(12), range(16, 20)))
    b = fill(sheet, sheet.parent / "b.csv", verdicts(range(8, 12), [4, 5, 6, 7, *range(16, 20)]))
    out = reported(capsys, run_folder, a, b)
    p = 2 * sum(math.comb(12, k) for k in range(5)) / 2**12  # 8 wins, 4 losses
    assert re.search(rf"^  all +20 +8 +8 +4 +60\.0 \[4\d\.\d, 7\d\.\d\] +{p:.2g}$", out, re.M)
    assert re.search(r"^  domain family +10 +4 +4 +2 +60\.0 \[.+\] +0\.69$", out, re.M)  # 2 (1 + 6 + 15) / 64
    assert re.search(r"^  culture 日本 +7 +3 +3 +1 +64\.3 +0\.62$", out, re.M)  # 0 3 9 | 6 12 15 | 18; of few no interval
    assert re.findall(r"^  (?:domain|culture) *(\S*) +\d", out, re.M)[:3] == ["family", "work", "日本"]
    table = out.split("Ratings")[1]
    assert re.search(r"^  all +\+2\.50 \[\+2\.\d\d, \+2\.\d\d\] +– +–$", table, re.M)
    assert re.search(r"^  domain family +\+2\.00 \[\+2\.00, \+2\.00\] +– +–$", table, re.M)
    alone = reported(capsys, run_folder, a)
    assert re.search(r"judges:\s1,", alone) and "alpha" not in alone
    assert re.search(r"^  all +20 +12 +4 +4 +70\.0 \[", alone, re.M)
    assert re.search(r"^  domain family +10 +6 +2 +2 ", alone, re.M)


def answers(better, *ratings):
    """Answers (J, N, 4) of verdicts (J, N) and of up to three ratings, each (J, N) or one number."""
    ratings = [np.broadcast_to(rating, np.shape(better)) for rating in (*ratings, *[np.nan] * 3)][:3]
    return np.stack([np.asarray(better, float), *ratings], -1)


@pytest.mark.parametrize("judges, verdicts, trials", [(1, (-1, 1), 400), (2, (-1, 0, 1), 80)])
def test_the_interval_of_judges_who_toss_coins_covers_a_half_in_95_of_100(judges, verdicts, trials):
    """And that of the difference of their ratings covers 0."""
    rng, covered = np.random.default_rng(0), []
    for trial in range(trials):
        ratings = [rng.integers(-4, 5, (judges, 60))] * ("0" in str(verdicts))
        (*_, rate, _), differences, _ = compare(answers(rng.choice(verdicts, (judges, 60)), *ratings), trial)
        intervals = [re.search(r"\[(.+), (.+)\]", cell) for cell in (rate, *differences) if cell != "–"]
        covered.append([float(found[1]) <= middle <= float(found[2]) for found, middle in zip(intervals, (50, 0))])
    assert np.shape(covered) == (trials, 1 + ("0" in str(verdicts)))
    assert ((0.9 <= np.mean(covered, 0)) & (np.mean(covered, 0) <= 0.99)).all(), np.mean(covered, 0)


def test_judges_who_agree_have_an_alpha_of_1_even_if_they_always_prefer_the_same():
    always, rng = np.ones((2, 30)), np.random.default_rng(0)
    assert compare(answers(always, 2, 2, 2))[2] == [1.0] * 4
    assert abs(compare(answers(rng.integers(-1, 2, (2, 4000))))[2][0]) < 0.05
    assert compare(answers([[1] * 30, [-1] * 30]))[2][0] < -0.9
    x = rng.integers(-1, 2, (3, 30))
    assert compare(answers(x))[2][0] == krippendorff_alpha(np.concatenate([-x, x], 1))  # the order does not matter


def test_nothing_is_made_of_nothing_and_little_of_little():
    assert compare(answers(np.full((2, 5), np.nan))) == ([0, 0, 0, 0, "–", "1"], ["–"] * 3, ["–"] * 4)
    assert compare(answers([[1.0] * 9], 1, 1, 1))[:2] == ([9, 9, 0, 0, "100.0", "0.0039"], ["+1.00"] * 3)
    assert compare(answers([[1.0] * 10]))[0][4] == "100.0 [72.2, 100.0]"  # Wilson's, where no score is a tie


# ----------------------------------------------------------------------------------------------------------------------
# What is refused

def table(change):
    """A function that makes change(the table's rows) to the text of a sheet."""
    def changed(text):
        cells, file = list(csv.reader(io.StringIO(text, newline=""))), io.StringIO(newline="")
        csv.writer(file).writerows(change(cells) or cells)
        return file.getvalue()
    return changed


def replies_swapped(cells):
    cells[1][2:4] = cells[1][3:1:-1]


@pytest.mark.parametrize("change, why", [
    (lambda t: t.replace(",A,", ",C,", 1), "row 2, column better: 'C', expected A, B, tie or nothing"),
    (lambda t: t.replace(",A,3,", ",A,6,", 1), "row 2, column engagement A: '6', expected 1, 2, 3, 4, 5 or nothing"),
    (lambda t: t.replace(",A,3,", ",A,good,", 1), "row 2, column engagement A: 'good'"),
    (lambda t: t.replace("What now, 3", "What then, 3", 1), r"row 5, column message: 'What then, 3\?', expected the"),
    (table(replies_swapped), "row 2, column reply A: .* expected the text that was written there"),
    (table(lambda cells: [*cells, cells[1]]), "row 26: id 'k.*-1' is there twice"),
    (table(lambda cells: cells[:-1]), "a.csv: 1 of 24 rows are missing, and 23 are filled in; expected all rows"),
    (lambda t: t.replace(",A,3,", ",,,"), "a.csv: 0 of 24 rows are missing, and 0 are filled in"),
    (lambda t: re.sub(r"k\w{8}-2\b", "k-2", t), "row 3: id 'k-2' is not in .*sheet.key.jsonl"),
    (lambda t: re.sub(r"k\w{8}-1\b", "k-1", t), "a.csv: its first id is 'k-1', and no .key.jsonl in its folder"),
    (table(lambda cells: cells[:1]), "a.csv: its first id is '', and no"),
    (lambda t: t.replace("reply A", "reply", 1), "a.csv: 0 columns named 'reply A'"),
    (lambda t: t.replace("authenticity B", "authenticity A", 1), "a.csv: 2 columns named 'authenticity A'"),
    (lambda t: t.replace("id", "ID", 1), "a.csv: 0 columns named 'id'")], ids=[
        "verdict", "6", "good", "message", "swapped replies", "twice", "row missing", "empty", "id", "first id",
        "no rows", "column", "column twice", "no id"])
def test_every_cell_of_a_sheet_is_checked(sheet, run_folder, change, why):  # noqa: F811
    a = fill(sheet, sheet.parent / "a.csv", lambda row: {"better": "A", "engagement A": "3"})
    text = a.read_bytes().decode()
    assert change(text) != text
    a.write_bytes(change(text).encode())
    with pytest.raises(UserError, match=why) as error:
        command(run_folder, "--import", str(a))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("damage", [
    lambda key: key.unlink(), lambda key: key.write_bytes(key.read_bytes()[:-9]), lambda key: key.write_bytes(b""),
    lambda key: key.write_text(key.read_text(encoding="utf-8").replace('"side": "A"', '"side": "B"', 1),
                               encoding="utf-8"),
    lambda key: key.rename(key.with_name("elsewhere"))], ids=["gone", "torn", "empty", "edited", "renamed"])
def test_a_key_that_is_missing_or_edited_is_said_in_one_line(sheet, run_folder, damage):  # noqa: F811
    a = fill(sheet, sheet.parent / "a.csv", judge(0))
    damage(sheet.parent / "sheet.key.jsonl")
    with pytest.raises(UserError, match=r"a.csv: its first id is 'k\w{8}-1', and no .key.jsonl in its folder") as error:
        command(run_folder, "--import", str(a))
    assert "\n" not in str(error.value)


def test_sheets_of_two_keys_are_not_put_together(sheet, run_folder, capsys):  # noqa: F811
    command(run_folder, "--file", "messages.jsonl", "--out", "second.csv", "--seed", "1")
    a, b = (fill(sheet.parent / f"{name}.csv", sheet.parent / f"by-{name}.csv", judge(0))
            for name in ("sheet", "second"))
    with pytest.raises(UserError, match=r"by-second.csv, row 2: id 'k\w{8}-1' is not in .*sheet.key.jsonl"):
        command(run_folder, "--import", str(a), str(b))
    assert reported(capsys, run_folder, a) and reported(capsys, run_folder, b)  # each alone finds its own key


@pytest.mark.parametrize("argv, why", [
    ("", "give messages with --file or, with --import, the sheets"),
    ("--file messages.jsonl --import sheet.csv", "give messages with --file or, with --import, the sheets"),
    ("--import sheet.csv --out a.csv --against O+", "leave --against and --out out"),
    ("--file messages.jsonl --out sheet.txt", "--out is sheet.txt, expected a file named .csv"),
    ("--file messages.jsonl --out .", "--out is ., expected a file named .csv"),
    ("--file .", "expected queries in a .txt"),
    ("--file none.jsonl", "none.jsonl: No such file"), ("--import none.csv", "none.csv: No such file"),
    ("--import sheet.csv ./sheet.csv", "a table is given twice"),
    ("--file messages.jsonl --against X+", "persona 'X+': expected a letter of OCEAN"),
    ("--file messages.jsonl --persona O+ --gate 1", "--persona and --gate both set the gate"),
    ("--file messages.jsonl --run none", "none: no config.json")])
def test_what_makes_no_sense_is_refused_and_writes_nothing(sheet, run_folder, argv, why):  # noqa: F811
    before = {file.name: file.read_bytes() for file in sheet.parent.iterdir()}
    with pytest.raises(UserError, match=re.escape(why)) as error:
        command(run_folder, *argv.split())
    assert "\n" not in str(error.value)
    assert {file.name: file.read_bytes() for file in sheet.parent.iterdir()} == before
