"""Laws of files of records and of queries: what is read, what is refused, how records are split."""
import json
import re

import pytest

from lora import TRAITS
from support.files import UserError, read_table
from support.records import SPLITS, check_record, load_data, normalise_query, read_queries, read_records, \
    split_records, write_records


def record(number=0, **changes):
    return {"id": f"r{number}", "query": f"What now, number {number}?", "response": "Wait.",
            "traits": {"openness": 1}} | changes


def without(key, **changes):
    return {k: v for k, v in record(**changes).items() if k != key}


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


# ----------------------------------------------------------------------------------------------------------------------
# Records

def test_written_records_are_read_unchanged_with_unknown_fields_in_their_order(tmp_path):
    records = [record(0, zeta=[1, {"b": None}], history=[{"role": "user", "content": "Hi"}], culture="日本"),
               {"later": 1.5, **record(1, traits={"neuroticism": -1, "openness": 0}), "alpha": "ü\u2028\u0085 \"q\"\n"}]
    write_records(tmp_path / "new" / "r.jsonl", records)
    found = read_records(tmp_path / "new" / "r.jsonl")
    assert found == records and [list(r) for r in found] == [list(r) for r in records]
    write_records(tmp_path / "again.jsonl", found)
    assert (tmp_path / "again.jsonl").read_bytes() == (tmp_path / "new" / "r.jsonl").read_bytes()


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    file = tmp_path / "r.jsonl"
    write_records(file, [record()])
    with pytest.raises(TypeError):
        write_records(file, [record(1), record(2, odd={1, 2})])  # JSON has no sets
    assert file.read_bytes() == lines(record())


@pytest.mark.parametrize("text", [
    b"\xef\xbb\xbf" + lines(record(), record(1)), lines(record(), record(1)).replace(b"\n", b"\r\n"),
    b"\n  \n" + lines(record()) + b"\r\n\t\n" + lines(record(1)) + b"\n", lines(record(), record(1)).rstrip()],
    ids=["byte order mark", "CRLF", "blank lines", "no newline at the end"])
def test_records_are_read_whatever_the_editor_made_of_the_lines(tmp_path, text):
    (tmp_path / "r.jsonl").write_bytes(text)
    assert read_records(tmp_path / "r.jsonl") == [record(), record(1)]


NO_TRAIT = "expected -1, 0 or 1"
REFUSED = {  # a line, and what the message says about it
    "torn line": (b'{"id": "r1", "query": "What', "not JSON.*torn"),
    "not UTF-8": ('{"id": "r1", "query": "Où"}'.encode("latin-1"), "not UTF-8"),
    "a list": (b'["id"]', "found a list, expected a JSON object"),
    **{f"no {key}": (without(key, number=1), f"no '{key}'") for key in ("id", "query", "response", "traits")},
    "empty query": (record(1, query=" \n"), "query is ' .n', expected some text"),
    "query a number": (record(1, query=3), "query is 3, expected some text"),
    "empty response": (record(1, response=""), "response is '', expected some text"),
    "response null": (record(1, response=None), "response is None, expected some text"),
    "id a list": (record(1, id=["r1"]), "id is"), "id true": (record(1, id=True), "id is True"),
    "id null": (record(1, id=None), "id is None"),
    "half a surrogate pair": (record(1, query="x \ud800"), "query|UTF-8"),
    "unknown trait": (record(1, traits={"openess": 1}), "unknown trait 'openess', expected one of openness"),
    **{f"value {value}": (record(1, traits={"openness": value}), re.escape(f"openness is {value!r}, {NO_TRAIT}"))
       for value in (2, True, 0.5, "1", None, [1])},
    "traits a list": (record(1, traits=["openness"]), "traits is .*expected an object"),
    **{f"history {value}": (record(1, history=value), "history is .*expected a list")
       for value in ("Hi", ["Hi"], [{"role": "user"}], [{"role": "bot", "content": ""}])},
    "same id": (record(0, query="Another?"), "id 'r0' is on line 2 already"),
    "same id of another type": (record(1, id=7), "id 7 is on line 3 already"),
}


@pytest.mark.parametrize("line, why", REFUSED.values(), ids=REFUSED)
def test_a_line_that_is_no_record_is_refused_by_file_and_line(tmp_path, line, why):
    """Blank lines count."""
    line = line if isinstance(line, bytes) else json.dumps(line).encode()
    text = b"\n" + lines(record(), record(id="7", query="?")) + line + b"\n" + lines(record(2))
    (tmp_path / "some.jsonl").write_bytes(text)
    with pytest.raises(UserError, match=rf"some\.jsonl, line 4: .*{why}") as error:
        read_records(tmp_path / "some.jsonl")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", [b"", b"\xef\xbb\xbf\n \r\n", None], ids=["empty", "blank", "missing"])
def test_a_file_without_records_is_refused_by_name(tmp_path, text):
    if text is not None:
        (tmp_path / "none.jsonl").write_bytes(text)
    with pytest.raises(UserError, match=r"none\.jsonl: (no records|No such file)"):
        read_records(tmp_path / "none.jsonl")


def test_the_router_needs_no_responses_but_one_that_is_there_is_checked(tmp_path):
    (tmp_path / "r.jsonl").write_bytes(lines(without("response"), record(1)))
    assert len(read_records(tmp_path / "r.jsonl", need_response=False)) == 2
    assert "expected some text" in check_record(record(response="  "), required=("id", "query", "traits"))


# ----------------------------------------------------------------------------------------------------------------------
# Splits

def test_two_records_of_one_query_never_part():
    """Case and white space do not make another query: a test query that was trained on would measure memory."""
    twins = [[record(i), record(i, query=f"  WHAT now,\t number {i}? \n")] for i in range(300)]
    where = {}
    for name, records in split_records([r for pair in twins for r in pair]).items():
        for r in records:
            where.setdefault(normalise_query(r["query"]), set()).add(name)
    assert len(where) == 300 and all(len(names) == 1 for names in where.values())


def test_splits_are_fixed_by_the_seed_and_about_eighty_ten_ten():
    records = [record(i) for i in range(5000)]
    splits = split_records(records, 3)
    assert list(splits) == list(SPLITS) and splits == split_records(records, 3) != split_records(records, 4)
    assert sorted(r["id"] for part in splits.values() for r in part) == sorted(r["id"] for r in records)
    for name, share in zip(SPLITS, (0.8, 0.1, 0.1)):
        assert abs(len(splits[name]) / 5000 - share) < 0.02
    # no record's split depends on the others
    assert split_records(records[:50], 3)["test"] == [r for r in splits["test"] if r in records[:50]]


def test_data_are_a_folder_of_three_files_or_one_file_split_by_query(tmp_path):
    for i, name in enumerate(SPLITS):
        write_records(tmp_path / f"{name}.jsonl", [record(10 * i), record(10 * i + 1)])
    splits, zero = load_data(tmp_path)
    assert [[r["id"] for r in splits[name]] for name in SPLITS] == [["r0", "r1"], ["r10", "r11"], ["r20", "r21"]]
    assert zero == 0
    many = [record(i) for i in range(200)]
    write_records(tmp_path / "all.jsonl", many)
    assert load_data(tmp_path / "all.jsonl", 5) == (split_records(many, 5), 0)


def test_a_record_that_names_its_split_is_in_it(tmp_path):
    many = [record(i) | ({"split": SPLITS[i % 3]} if i < 30 else {}) for i in range(200)]
    splits, free = split_records(many), split_records([{k: v for k, v in r.items() if k != "split"} for r in many])
    for i, name in enumerate(SPLITS):
        assert [r["id"] for r in splits[name]] == [
            r["id"] for r in many if (r["split"] if "split" in r else None) == name
            or "split" not in r and r["id"] in {other["id"] for other in free[name]}]
    assert "split is 'dev', expected one of train, validation, test" in check_record(record(split="dev"))
    write_records(tmp_path / "test_only.jsonl", [record(i, split="test") for i in range(3)])
    assert len(load_data(tmp_path / "test_only.jsonl", needed=["test"])[0]["test"]) == 3  # enough to measure on
    with pytest.raises(UserError, match="no records with an active trait for train"):
        load_data(tmp_path / "test_only.jsonl")


def test_records_whose_traits_are_all_zero_are_left_out_and_counted(tmp_path):
    zeros = [record(1000, traits={}), record(1001, traits={"openness": 0}),
             record(1002, traits=dict.fromkeys(TRAITS, 0))]
    many = [record(i, traits={"openness": 0, "neuroticism": -1}) for i in range(200)]
    write_records(tmp_path / "all.jsonl", [*many[:100], *zeros, *many[100:]])
    splits, zero = load_data(tmp_path / "all.jsonl")
    assert zero == 3 and sorted(r["id"] for part in splits.values() for r in part) == sorted(r["id"] for r in many)


@pytest.mark.parametrize("bad", SPLITS)
def test_a_split_without_records_to_use_is_an_error_that_names_it(tmp_path, bad):
    for name in SPLITS:
        write_records(tmp_path / f"{name}.jsonl", [record(traits={} if name == bad else {"openness": 1})])
    with pytest.raises(UserError, match=f"no records with an active trait for {bad}; .*train, validation, test"):
        load_data(tmp_path)
    (tmp_path / f"{bad}.jsonl").unlink()
    with pytest.raises(UserError, match=rf"{bad}\.jsonl: No such file"):
        load_data(tmp_path)


# ----------------------------------------------------------------------------------------------------------------------
# Queries

def test_a_query_has_the_same_id_in_every_kind_of_file_and_in_every_order(tmp_path):
    asked = ["What now?", "Où est-il, =2+3?", 'She said "go", and\tleft']
    (tmp_path / "q.txt").write_bytes("\ufeff{}\r\n\n  {}\n{}".format(*asked).encode())
    (tmp_path / "q.jsonl").write_bytes(lines(*({"query": query} for query in asked)))
    (tmp_path / "q.csv").write_text('query,domain\nWhat now?,work\n"Où est-il, =2+3?",\n'
                                    '"She said ""go"", and\tleft",\n,\n')
    (tmp_path / "r.txt").write_text("\n".join(asked[::-1]))
    found = {kind: read_queries(tmp_path / f"q.{kind}")[0] for kind in ("txt", "jsonl", "csv")}
    for items in (*found.values(), read_queries(tmp_path / "r.txt")[0][::-1]):
        assert [(item["id"], item["query"]) for item in items] == [(q["id"], q["query"]) for q in found["txt"]]
        assert [item["query"] for item in items] == asked
    assert len({item["id"] for item in found["txt"]}) == 3
    assert found["csv"][0]["domain"] == "work" and "domain" not in found["csv"][1]


@pytest.mark.parametrize("mark", ",;\t")
def test_a_table_may_come_from_any_spreadsheet(tmp_path, mark):
    (tmp_path / "q.csv").write_bytes(f'\ufeffid{mark}query \r\n7{mark}"a\r\nb{mark}"\r\n'.encode())
    assert read_queries(tmp_path / "q.csv")[0] == [{"id": "7", "query": f"a\r\nb{mark}"}]


def test_given_ids_and_other_fields_are_kept_but_not_those_that_the_teacher_writes(tmp_path):
    item = {"id": 7, "query": "Hi", "history": [{"role": "user", "content": "Oh"}], "topic": [1, {"x": None}],
            "reason": "r"}
    written = {"response": "", "traits": "x", "teacher_traits": {"openness": 1}, "cot": 3, "teacher": {"name": "old"},
               "neutral": "a", "manner": {}}
    (tmp_path / "q.jsonl").write_bytes(lines(item | written))
    assert read_queries(tmp_path / "q.jsonl") == ([item], 0)


def test_duplicates_are_dropped_and_counted_and_another_history_or_culture_makes_another_query(tmp_path):
    said = [{"role": "assistant", "content": "Tea?"}]
    (tmp_path / "q.jsonl").write_bytes(lines(
        {"query": "Yes  please"}, {"id": "x", "query": " yes\nPLEASE "}, {"query": "Yes please", "history": said},
        {"query": "yes please", "history": said}, {"query": "no"}, {"query": "no", "culture": "Finnish"},
        {"query": "No", "culture": "日本"}, {"query": "NO", "culture": "Finnish", "domain": "work"}))
    items, duplicates = read_queries(tmp_path / "q.jsonl")
    assert [(item["query"], item.get("culture")) for item in items] == [
        ("Yes  please", None), ("Yes please", None), ("no", None), ("no", "Finnish"), ("No", "日本")]
    assert duplicates == 3 and len({item["id"] for item in items}) == 5


@pytest.mark.parametrize("name, text, why", [
    ("q.jsonl", '{"query": "a"}\n{"query": " "}\n', "line 2: query is ' '"),
    ("q.jsonl", '{"query": "a"}\n{"text": "b"}\n', "line 2: no 'query'"), ("q.jsonl", "[1]\n", "line 1: found a list"),
    ("q.jsonl", '{"query": "a"}\n{"que', "line 2: not JSON"), ("q.jsonl", "\n", "no queries in it"),
    ("q.jsonl", '{"id": 1, "query": "a"}\n{"id": "1", "query": "b"}\n', "line 2: id '1' is on line 1 already"),
    ("q.jsonl", '{"id": [1], "query": "a"}\n', "line 1: id is"),
    ("q.jsonl", '{"query": "a", "history": "b"}\n', "line 1: history"), ("q.txt", "\n \n", "no queries in it"),
    ("q.csv", "text\na\n", "0 columns named 'query'"), ("q.csv", "query,query\na,b\n", "2 columns named 'query'"),
    ("q.csv", "query\na,b\n", "row 2: 2 cells under 1 names"), ("q.csv", 'query\n"a\n', "not a table"),
    ("q.csv", "", "not a table"), ("q.csv", "query,id\n,7\n", "line 2: no 'query'"),
    ("q.txt", b"\xff\n", "not UTF-8"), ("q.csv", b"query\n\xff\n", "not UTF-8"), ("q.doc", "a", ".txt, .jsonl or .csv"),
])
def test_a_file_that_holds_no_queries_is_refused_in_one_line(tmp_path, name, text, why):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=re.escape(why)) as error:
        read_queries(tmp_path / name)
    assert name in str(error.value) and "\n" not in str(error.value)


def test_a_short_row_of_a_table_has_empty_cells(tmp_path):
    """So that a column that was asked for is there in every row, wherever it stands."""
    (tmp_path / "t.csv").write_text("query,id\nWhat now?\nWhy?,7\n")
    assert read_table(tmp_path / "t.csv", ["id"]) == [(2, {"query": "What now?", "id": ""}),
                                                      (3, {"query": "Why?", "id": "7"})]
