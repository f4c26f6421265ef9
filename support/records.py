"""Files of records and of queries: reading with a check of every line, writing, splitting by query.
"""
import hashlib
import json
from pathlib import Path

from router import active_experts
from support.files import UserError, atomic, read_bytes, read_lines, read_table


SPLITS = ("train", "validation", "test")


def check_record(record, need_response=True):
    """What is wrong with a record, in words, or None."""
    if not isinstance(record, dict):
        return f"found a {type(record).__name__}, expected a JSON object"
    for key in ("id", "query", "response", "traits"):
        if key not in record and (need_response or key != "response"):
            return f"no {key!r}; a record needs id, query, response and traits"
    for key in ("query", "response"):
        text = record.get(key, "-")
        if not isinstance(text, str) or not text.strip():
            return f"{key} is {text!r}, expected some text"
    try:
        json.dumps(record, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        return "too many brackets within brackets"
    except UnicodeEncodeError:
        return "half of a surrogate pair (\\ud800 to \\udfff), which is no text"
    if not isinstance(record["id"], (str, int)) or isinstance(record["id"], bool):
        return f"id is {record['id']!r}, expected a string"
    if not isinstance(record["traits"], dict):
        return f"traits is {record['traits']!r}, expected an object such as {{\"openness\": 1}}"
    try:
        active_experts(record["traits"])
    except (TypeError, ValueError) as error:
        return f"traits: {error}"
    history = record.get("history") or []
    if not isinstance(history, list) or not all(
            isinstance(turn, dict) and turn.get("role") in ("system", "user", "assistant")
            and isinstance(turn.get("content"), str) for turn in history):
        return "history: expected a list of {\"role\": \"system\" | \"user\" | \"assistant\", \"content\": text}"
    kept = record.get("teacher_traits") or {}  # what a review has changed
    if not isinstance(kept, dict) or any(label not in (-1, 0, 1) for label in kept.values()):
        return f"teacher_traits is {kept!r}, expected an object such as traits"
    return None


def read_records(path, need_response=True):
    """The records of a .jsonl file, checked. UserError names file and line. The router stage needs no responses."""
    records, lines = [], {}
    for number, record in read_lines(path):
        problem = check_record(record, need_response)
        if problem is None and str(record["id"]) in lines:
            problem = f"id {record['id']!r} stands on line {lines[str(record['id'])]} already"
        if problem:
            raise UserError(f"{path}, line {number}: {problem}")
        lines[str(record["id"])] = number
        records.append(record)
    if not records:
        raise UserError(f"{path}: no records in it, expected one JSON object a line")
    return records


def record_lines(records):
    """Records as the bytes of a .jsonl file."""
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()


def write_records(path, records):
    """Write records to a .jsonl file, all or nothing."""
    with atomic(path) as part:
        part.write_bytes(record_lines(records))


def normalise_query(text):
    """Text by which two queries are the same: case and white space do not count."""
    return " ".join(text.lower().split())


def split_records(records, seed=0):
    """80 / 10 / 10 by a hash of the query (case and white space folded): two records of one query never part."""
    splits = {name: [] for name in SPLITS}
    for record in records:
        tenth = hashlib.sha256(f"{seed}:{normalise_query(record['query'])}".encode()).digest()[0] * 10 // 256
        splits[SPLITS[max(0, tenth - 7)]].append(record)
    return splits


def load_data(path, seed=0, need_response=True):
    """`--data`: a .jsonl file, split by query, or a folder with train, validation and test -> {split: records}.

    Records whose traits are all zero are left out; the second result says how many there were.
    """
    path = Path(path)
    if path.is_dir():
        splits = {name: read_records(path / f"{name}.jsonl", need_response) for name in SPLITS}
    else:
        splits = split_records(read_records(path, need_response), seed)
    active = {name: [r for r in records if any(r["traits"].values())] for name, records in splits.items()}
    for name, records in active.items():
        if not records:
            raise UserError(f"{path}: no records with an active trait for {name}; expected at least one in each of "
                            f"{', '.join(SPLITS)}")
    return active, sum(map(len, splits.values())) - sum(map(len, active.values()))


def read_queries(path):
    """Queries of a .txt (one a line), .jsonl or .csv file -> ([{"id", "query", all else that was there}], duplicates).

    A given id is kept, else it is a hash of the query (and its history): the same file gives the same ids. Queries that
    differ in case and white space only are one; the first is kept. UserError names file and line.
    """
    kind = Path(path).suffix.lower()
    if kind == ".jsonl":
        rows = read_lines(path)
    elif kind == ".csv":
        rows = [(number, {k: v for k, v in row.items() if v.strip()}) for number, row in read_table(path, ["query"])]
    elif kind == ".txt":
        try:
            lines = read_bytes(path).decode("utf-8").split("\n")
        except UnicodeDecodeError:
            raise UserError(f"{path}: not UTF-8; save the file as UTF-8") from None
        rows = [(number, {"query": line.strip()}) for number, line in enumerate(lines, 1) if line.strip()]
    else:
        raise UserError(f"{path}: expected queries in a .txt, .jsonl or .csv file")
    items, seen, lines, duplicates = [], set(), {}, 0
    for number, row in rows:
        if isinstance(row, dict):  # what the teacher is to write is not taken from elsewhere
            row = {k: v for k, v in row.items() if k not in ("response", "traits", "cot")}
            row["id"] = "" if row.get("id") is None else row["id"]
            problem = check_record(row | {"traits": {}}, need_response=False)
        else:
            problem = check_record(row)
        if problem:
            raise UserError(f"{path}, line {number}: {problem.partition(';')[0]}")
        key = normalise_query(row["query"]) + (json.dumps(row["history"]) if row.get("history") else "")
        if key in seen:
            duplicates += 1
            continue
        seen.add(key)
        if row["id"] == "":
            row["id"] = "q-" + hashlib.sha256(key.encode()).hexdigest()[:16]
        if str(row["id"]) in lines:
            raise UserError(f"{path}, line {number}: id {row['id']!r} stands on line {lines[str(row['id'])]} already, "
                            "with another query")
        lines[str(row["id"])] = number
        items.append({"id": row["id"]} | row)
    if not items:
        raise UserError(f"{path}: no queries in it")
    return items, duplicates


def messages_of(record):
    return [*(record.get("history") or []), {"role": "user", "content": record["query"]}]
