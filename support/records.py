"""Files of records and files of queries: every line is checked when it is read. Also the split by query.

The top of synth.py describes a record.
"""
import hashlib
import json
import sys
from pathlib import Path

from lora import EXPERTS
from router import active_experts
from support.files import UserError, atomic, read_lines, read_table, shorten


SPLITS = ("train", "validation", "test")
REQUIRED_FIELDS = ("id", "query", "response", "traits")
# A teacher writes these. They are dropped from a record that is used as a query, so that the new record is all new
TEACHER_FIELDS = ("response", "traits", "teacher_traits", "cot", "teacher", "neutral", "manner")


def is_text(value):
    return isinstance(value, str) and bool(value.strip())


def is_history(value):
    return value is None or isinstance(value, list) and all(
        isinstance(turn, dict) and turn.get("role") in ("system", "user", "assistant")
        and isinstance(turn.get("content"), str) for turn in value)


def is_for_each_expert(value, low, high):
    """Whether a JSON value is an object with a number from low to high for each expert's name."""
    return isinstance(value, dict) and value.keys() == set(EXPERTS) and all(
        type(number) in (int, float) and low <= number <= high for number in value.values())


FIELDS = {  # field: (whether a value is valid, what is expected)
    "id": (lambda value: type(value) in (str, int), "a string or a whole number"),
    "query": (is_text, "some text"),
    "response": (is_text, "some text"),
    "traits": (lambda value: isinstance(value, dict), 'an object such as {"openness": 1}'),
    "teacher_traits": (lambda value: value is None or isinstance(value, dict), "an object as in traits"),
    "history": (is_history, 'a list of {"role": "system" | "user" | "assistant", "content": text}'),
    "split": (lambda value: value in (*SPLITS, None), f"one of {', '.join(SPLITS)}"),
}


def check_record(record, required=REQUIRED_FIELDS, fields=FIELDS):
    """Returns what is wrong with a record, in words, or None if it is valid. fields: a table like FIELDS."""
    if not isinstance(record, dict):
        return f"found a {type(record).__name__}, expected a JSON object"
    for key in required:
        if key not in record:
            return f"no {key!r}, expected {', '.join(required)}"
    for key, (valid, expected) in fields.items():
        if key in record and not valid(record[key]):
            return f"{key} is {shorten(record[key])}, expected {expected}"
    for key in {"traits", "teacher_traits"} & fields.keys():
        try:
            active_experts(record.get(key) or {})
        except (TypeError, ValueError) as error:
            return f"{key}: {error}"
    try:
        json.dumps(record, ensure_ascii=False).encode("utf-8")
    except (RecursionError, UnicodeEncodeError) as error:  # JSON can spell half of a surrogate pair, UTF-8 cannot
        return f"cannot be written as JSON in UTF-8 ({error})"
    return None


def read_records(path, need_response=True):
    """Returns the checked records of a .jsonl file. UserError names file and line.

    The router stage needs no responses; one that is there is checked all the same.
    """
    required = REQUIRED_FIELDS if need_response else ("id", "query", "traits")
    records, line_of_id = [], {}
    for number, record in read_lines(path):
        problem = check_record(record, required) or check_id(record["id"], number, line_of_id)
        if problem:
            raise UserError(f"{path}, line {number}: {problem}")
        records.append(record)
    if not records:
        raise UserError(f"{path}: no records in it, expected one JSON object on each line")
    return records


def check_id(id, number, line_of_id):
    """Returns what is wrong with an id that an earlier line has, or None. line_of_id, {id: line}, gets new ids."""
    first = line_of_id.setdefault(str(id), number)
    return None if first == number else f"id {id!r} is on line {first} already"


def record_lines(records):
    """Returns records as the bytes of a .jsonl file. "?" replaces half a surrogate pair, which UTF-8 cannot hold."""
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode("utf-8", "replace")


def write_records(path, records):
    """Write records to a .jsonl file, all of them or none."""
    with atomic(path) as part:
        part.write_bytes(record_lines(records))


def refuse_to_replace(path, overwrite):
    """UserError if `path` exists, unless --overwrite was given."""
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists already; --overwrite replaces it, --out gives another name")


def normalise_query(text):
    """Returns the text by which queries are compared: case and white space do not count."""
    return " ".join(text.lower().split())


def split_records(records, seed=0):
    """Returns {split: records}. The field "split" of a record decides, where there is one. Others are split 80/10/10 by
    a hash of the query, so that records of one query stay together."""
    splits = {name: [] for name in SPLITS}
    for record in records:
        tenth = hashlib.sha256(f"{seed}:{normalise_query(record['query'])}".encode()).digest()[0] * 10 // 256
        splits[record.get("split") or SPLITS[max(0, tenth - 7)]].append(record)  # tenths 0 to 7: train; 8; 9
    return splits


def load_data(path, seed=0, need_response=True, needed=SPLITS):
    """Read `--data`: a .jsonl file, which `split_records` divides, or a folder with train, validation and test.jsonl.

    Returns {split: records} and how many records were left out because all their traits are zero. A folder must hold
    all three files. UserError if one of the splits `needed` has no record with an active trait.
    """
    path = Path(path)
    if path.is_dir():
        splits = {name: read_records(path / f"{name}.jsonl", need_response) for name in SPLITS}
    else:
        splits = split_records(read_records(path, need_response), seed)
    active = {name: [r for r in records if any(r["traits"].values())] for name, records in splits.items()}
    for name in needed:
        if not active[name]:
            raise UserError(f"{path}: no records with an active trait for {name}; expected at least one for "
                            f"{', '.join(needed)}")
    return active, sum(map(len, splits.values())) - sum(map(len, active.values()))


def queries_to_answer(path):
    """Returns the queries of `read_queries`, and says on stderr how many duplicates it dropped."""
    queries, duplicates = read_queries(path)
    if duplicates:
        print(f"{path}: duplicates dropped: {duplicates}", file=sys.stderr)
    return queries


def read_queries(path):
    """Read queries from a .txt file (one on each line), a .jsonl or a .csv file. UserError names file and line.

    Returns ([{"id", "query", and the other fields of the file except TEACHER_FIELDS}], number of duplicates). Queries
    that differ only in case and white space are duplicates, unless their history or culture differs, which the teacher
    also sees. The first one is kept. A query without an id gets a hash of query, history and culture as its id, so the
    same query has the same id in every file.
    """
    queries, known, line_of_id, duplicates = [], set(), {}, 0
    for number, query in query_rows(Path(path)):
        if isinstance(query, dict):
            query = {field: value for field, value in query.items() if field not in TEACHER_FIELDS}
            if query.get("id") in (None, ""):
                query.pop("id", None)
        problem = check_record(query, required=("query",))
        if problem:
            raise UserError(f"{path}, line {number}: {problem}")
        key = normalise_query(query["query"])
        key += "".join(json.dumps(query[field]) for field in ("history", "culture") if query.get(field))
        if key in known:
            duplicates += 1
            continue
        known.add(key)
        query = {"id": "q-" + hashlib.sha256(key.encode()).hexdigest()[:16]} | query
        problem = check_id(query["id"], number, line_of_id)
        if problem:
            raise UserError(f"{path}, line {number}: {problem}, with another query")
        queries.append(query)
    if not queries:
        raise UserError(f"{path}: no queries in it")
    return queries, duplicates


def query_rows(path):
    """Returns (line number, {field: value}) for each query of a .txt, .jsonl or .csv file."""
    kind = path.suffix.lower()
    if kind == ".jsonl":
        return read_lines(path)
    if kind == ".csv":  # an empty cell is a field that is not there
        return [(number, {k: v for k, v in row.items() if v.strip()}) for number, row in read_table(path, ["query"])]
    if kind != ".txt":
        raise UserError(f"{path}: expected queries in a .txt, .jsonl or .csv file")
    return [(number, {"query": line}) for number, line in read_lines(path, str.strip) if line]


def messages_of(record):
    """Returns the conversation up to and including the query, as the chat format takes it."""
    return [*(record.get("history") or []), {"role": "user", "content": record["query"]}]
