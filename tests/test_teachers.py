"""Laws of the teachers that are language models: which queries they get, what is made of their replies, and that hours
of faults, kills and second starts lose nothing and do nothing twice. The servers are here, on this machine.
"""
import contextlib
import email.utils
import hashlib
import http.server
import json
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import model as model_module
import synth
from support import output
from support import replies as replies_module
from support import server as server_module
from lora import TRAITS
from model import Transformer
from support.chat import Chat
from support.command import parse
from support.files import UserError
from support.records import check_record, read_queries, read_records
from support.replies import Reply, read_pole
from support.tiny import make_tiny
from synth import Query

ROOT = Path(synth.__file__).resolve().parent
POLED = {"openness": {"pole": "high", "cue": "ideas"}, "neuroticism": -1, "agreeableness": 0}
GOOD = {"situation": "They wait.", "traits": POLED, "response": "Wait with me."}
TRAITS_OF_GOOD = {"openness": 1, "neuroticism": -1}


def lines(path):
    path = Path(path)
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def write(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows),
                    encoding="utf-8")
    return path


# ----------------------------------------------------------------------------------------------------------------------
# Queries

def test_queries_are_read_from_three_kinds_of_files_and_an_id_is_the_same_wherever_the_query_stands(tmp_path):
    asked = ["What now?", "Où est-il, =2+3?", 'She said "go", and\tleft']
    (tmp_path / "q.txt").write_bytes("\ufeff{}\r\n\n  {}\n{}".format(*asked).encode())
    write(tmp_path / "q.jsonl", *({"query": q} for q in asked))
    (tmp_path / "q.csv").write_text('query,domain\nWhat now?,work\n"Où est-il, =2+3?",\n'
                                    '"She said ""go"", and\tleft",\n,\n')
    found = {kind: read_queries(tmp_path / f"q.{kind}")[0] for kind in ("txt", "jsonl", "csv")}
    for kind in found:
        assert [item["query"] for item in found[kind]] == asked
        assert [item["id"] for item in found[kind]] == [item["id"] for item in found["txt"]]
    assert len({item["id"] for item in found["txt"]}) == 3 and found["csv"][0]["domain"] == "work"
    assert "domain" not in found["csv"][1]
    assert read_queries(write(tmp_path / "r.txt", *asked[::-1]))[0][::-1] == found["txt"]


@pytest.mark.parametrize("mark", ",;\t")
def test_a_table_may_come_from_any_spreadsheet(tmp_path, mark):
    (tmp_path / "q.csv").write_bytes(f'\ufeffid{mark}query \r\n7{mark}"a\r\nb{mark}"\r\n'.encode())
    assert read_queries(tmp_path / "q.csv")[0] == [{"id": "7", "query": f"a\r\nb{mark}"}]


def test_given_ids_and_other_fields_are_kept_but_not_what_the_teacher_is_to_write(tmp_path):
    item = {"id": 7, "query": "Hi", "history": [{"role": "user", "content": "Oh"}], "topic": [1, {"x": None}],
            "reason": "r"}
    file = write(tmp_path / "q.jsonl", item | {"response": "", "traits": "x", "cot": 3})
    assert read_queries(file) == ([item], 0)


def test_duplicates_are_dropped_and_counted_and_another_history_is_another_query(tmp_path):
    said = [{"role": "assistant", "content": "Tea?"}]
    rows = [{"query": "Yes  please"}, {"id": "x", "query": " yes\nPLEASE "}, {"query": "Yes please", "history": said},
            {"query": "yes please", "history": said}, {"query": "no"}]
    items, dropped = read_queries(write(tmp_path / "q.jsonl", *rows))
    assert [item["query"] for item in items] == ["Yes  please", "Yes please", "no"] and dropped == 2
    assert len({item["id"] for item in items}) == 3


@pytest.mark.parametrize("name, text, why", [
    ("q.jsonl", '{"query": "a"}\n{"query": " "}\n', "line 2: query is ' '"),
    ("q.jsonl", '{"query": "a"}\n{"text": "b"}\n', "line 2: no 'query'"), ("q.jsonl", "[1]\n", "line 1: found a list"),
    ("q.jsonl", '{"query": "a"}\n{"que', "line 2: not JSON"), ("q.jsonl", "\n", "no queries in it"),
    ("q.jsonl", '{"id": 1, "query": "a"}\n{"id": "1", "query": "b"}\n', "line 2: id '1' stands on line 1 already"),
    ("q.jsonl", '{"id": [1], "query": "a"}\n', "line 1: id is"),
    ("q.jsonl", '{"query": "a", "history": "b"}\n', "line 1: history"), ("q.txt", "\n \n", "no queries in it"),
    ("q.csv", "text\na\n", "0 columns named 'query', expected one; the names found are 'text'"),
    ("q.csv", "query,query\na,b\n", "2 columns named 'query'"),
    ("q.csv", "query\na,b\n", "row 2: 2 cells under 1 names"),
    ("q.csv", 'query\n"a\n', "not a table"), ("q.csv", "", "not a table"), ("q.csv", "query,id\n,7\n", "no 'query'"),
    ("q.txt", b"\xff\n", "not UTF-8"), ("q.csv", b"query\n\xff\n", "not UTF-8"), ("q.doc", "a", ".txt, .jsonl or .csv"),
])
def test_what_is_no_file_of_queries_is_refused_in_one_line(tmp_path, name, text, why):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=re.escape(why)) as error:
        read_queries(tmp_path / name)
    assert name in str(error.value) and "\n" not in str(error.value)


# ----------------------------------------------------------------------------------------------------------------------
# Reading replies

def joint(text, cut=False, query="What now?", retries=0):
    """A record (or a rejected entry) from one reply to the joint prompt."""
    asked = Query({"id": 1, "query": query}, "joint", retries, "test")
    asked.tell(Reply(text, cut))
    return asked.outcome


WRITTEN = {  # what models write and mean GOOD by
    "plain": json.dumps(GOOD),
    "in a fence": "Sure!\n```json\n" + json.dumps(GOOD, indent=2) + "\n```\nLet me know {if} it helps.",
    "thought aloud": "I think {this} is it: " + json.dumps(GOOD) + " — {",
    "twice the same": json.dumps(GOOD) + "\n" + json.dumps(GOOD),
    "single quotes": str(GOOD),
    "commas too many": json.dumps(GOOD).replace("}", ",}"),
    "bare words": '{situation: "They wait.", traits: {openness: {pole: high, cue: "ideas"}, neuroticism: low, '
                  'agreeableness: null}, response: "Wait with me."}',
    "words": json.dumps(GOOD | {"traits": {"Openness": {"pole": "High", "cue": "ideas"}, "neuroticism": "low pole",
                                           "agreeableness": "neither"}}),
    "signs": json.dumps(GOOD | {"traits": {"openness": {"pole": "+1", "cue": "ideas"}, "neuroticism": "−1"}}),
    "plus one": '{"situation": "They wait.", "traits": {"openness": {"pole": +1, "cue": "ideas"}, "neuroticism": -1.0},'
                '"response": "Wait with me."}',
    "a list": json.dumps(GOOD | {"traits": [{"trait": "openness", "pole": "high", "cue": "ideas"},
                                            {"trait": "neuroticism", "value": -1}]}),
    "capitals": json.dumps({"Situation": "They wait.", "Traits": POLED, "RESPONSE ": " Wait with me.\n"}),
    "line breaks in a text": '{"situation": "They wait.",\n"traits": {"openness": {"pole": "high",\n"cue": "ideas\n"},'
                             '"neuroticism": -1},\n\n"response": "Wait with me."\n}',
}


@pytest.mark.parametrize("text", WRITTEN.values(), ids=WRITTEN)
def test_what_models_really_write_is_read(text):
    record = joint(text)
    assert check_record(record) is None and record["response"] == "Wait with me."
    assert record["traits"] == TRAITS_OF_GOOD and record["cot"]["situation"] == "They wait."
    assert record["cot"]["traits"] == {"openness": {"pole": "high", "cue": "ideas"},
                                       "neuroticism": {"pole": "low", "cue": ""}}


def test_texts_keep_their_apostrophes_quotes_escapes_and_pictures():
    said = "It's the parents' and \"hers\", a\\b,\n\t\U0001f600 – don't: [1, 2]"
    for text in (json.dumps(GOOD | {"response": said}), json.dumps(GOOD | {"response": said}, ensure_ascii=False)):
        assert joint(text)["response"] == said
    assert joint("{'situation': 'a', 'traits': {'openness': 1}, 'response': 'It's the boys' and don't'}")[
        "response"] == "It's the boys' and don't"
    assert joint('{"situation": "a", "traits": {"openness": 1}, "response": "So "no" it is."}')[
        "response"] == 'So "no" it is.'
    assert joint(r'{"situation": "a", "traits": {"openness": 1}, "response": "x \ud83d y"}')["response"] == "x \ufffd y"


REFUSED = {  # what could be read in two ways or not at all, and the complaint
    "nothing": ("", "no JSON object"), "prose": ("High openness, low neuroticism.", "no JSON object"),
    "torn": (json.dumps(GOOD)[:-30], "not complete"), "torn in a mark": (json.dumps(GOOD)[:20], "not complete"),
    "two that differ": (json.dumps(GOOD) + json.dumps(GOOD | {"response": "No."}), "several JSON objects"),
    "a key twice": ('{"situation": "a", "traits": {"openness": 1, "openness": -1}, "response": "b"}', "twice"),
    "half": (json.dumps(GOOD | {"traits": {"openness": 0.5}}), "openness is '0.5'"),
    "medium": (json.dumps(GOOD | {"traits": {"openness": "medium"}}), "openness is 'medium'"),
    "both poles": (json.dumps(GOOD | {"traits": {"openness": "high or low"}}),
                   "expected the pole high, low or neither"),
    "the form itself": (json.dumps(GOOD | {"traits": {"openness": {"pole": "high | low"}}}), "expected the pole"),
    "yes": (json.dumps(GOOD | {"traits": {"openness": True}}), "expected the pole"),
    "no pole": (json.dumps(GOOD | {"traits": {"openness": {"cue": "high"}}}), "expected the pole"),
    "pole and value differ": (json.dumps(GOOD | {"traits": {"openness": {"pole": "high", "value": -1}}}),
                              "expected the"),
    "unknown trait": (json.dumps(GOOD | {"traits": {"openess": 1}}), "'openess' is not one of the traits"),
    "a list of numbers": (json.dumps(GOOD | {"traits": [1, 0, 0, 0, -1]}), "expected an object"),
    "a trait twice": (json.dumps(GOOD | {"traits": [{"trait": "openness", "pole": 1}] * 2}), "twice"),
    "all zero": (json.dumps(GOOD | {"traits": dict.fromkeys(TRAITS, 0)}), "all-zero vector"),
    "no traits": (json.dumps({k: v for k, v in GOOD.items() if k != "traits"}), "traits is 'None'"),
    "no response": (json.dumps(GOOD | {"response": " "}), "response is ' '"),
    "null": ('{"situation": null, "traits": {"openness": 1}, "response": "b"}', "situation is 'None'"),
    "another script": (json.dumps(GOOD | {"response": "请等一下。"}, ensure_ascii=False), "wrong language.*Cjk.*Latin"),
    "deep": ('{"situation": ' + "[" * 100_000, "longer than 50,000"), "deep too": ("{" * 9000, "JSON"),
    "deeply nested": ('{"situation":' * 3000, "nested too deeply"), "quotes": ('{"' * 20_000, "JSON"),
    "a megabyte": ("x" * 1_000_000, "longer than 50,000"), "zeros": ("\0" * 1000, "no JSON object"),
}


@pytest.mark.parametrize("text, why", REFUSED.values(), ids=REFUSED)
def test_what_is_ambiguous_or_broken_is_refused_with_its_reason_and_its_text(text, why):
    began = time.perf_counter()
    entry = joint(text)
    assert re.search(why, entry["reason"]), entry["reason"]
    assert entry["raw"] == text[:50_000] and "response" not in entry and len(entry["reason"]) < 300
    assert time.perf_counter() - began < 5


def test_nothing_in_a_reply_is_executed(tmp_path):
    code = f"__import__('pathlib').Path({str(tmp_path / 'x')!r}).touch()"
    joint(f"{{'situation': {code}, 'traits': {{'openness': 1}}, 'response': 'a'}}"), joint(code)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("query, fine", [("Переведи: hello, friend", True), ("2 + 2?", True), ("日本語で、おねがい", True),
                                         ("Hello, friend", False), ("Привет", False)])
def test_a_response_has_a_script_of_its_query(query, fine):
    assert ("response" in joint(json.dumps(GOOD | {"response": "好的，请稍等。"}, ensure_ascii=False), query=query)) == (
        fine and "日" in query or query == "2 + 2?")
    assert ("response" in joint(json.dumps(GOOD), query=query)) == (query not in ("Привет", "日本語で、おねがい"))


def test_poles_as_people_and_models_write_them():
    for value in (1, "1", "+1", "+", " High ", "high pole", 1.0, "1.0"):
        assert read_pole(value) == 1
    for value in (-1, "-1", "−1", "LOW", "-", -1.0):
        assert read_pole(value) == -1
    for value in (0, "0", "neither", "None", "neutral", None, 0.0):
        assert read_pole(value) == 0
    for value in (2, "highest", "hi", True, False, "", 0.5, [], {}, "1 or 0", "not high", float("nan")):
        assert read_pole(value) is None


# ----------------------------------------------------------------------------------------------------------------------
# The steps

def separate(*replies, retries=0, **item):
    """What a query has become after these replies, and all the questions that were asked on the way."""
    query, asked = Query({"id": 1, "query": "What now?"} | item, "separate", retries, "test"), []
    for reply in replies:
        asked.append(query.ask[0])
        query.tell(reply if isinstance(reply, replies_module.Fault) else
                   Reply(*([reply] if isinstance(reply, str) else reply)))
    return query, asked


def test_three_steps_each_see_what_came_before_and_all_is_kept():
    query, asked = separate(("They wait.", False, 10, 3), (json.dumps(POLED), False, 20, 4), ("Wait.", False, 30, 5),
                            domain="work", culture="Finnish", history=[{"role": "user", "content": "Earlier I slept."}])
    record = query.outcome
    assert check_record(record) is None and record["domain"] == "work" and record["culture"] == "Finnish"
    assert (record["response"], record["traits"]) == ("Wait.", TRAITS_OF_GOOD)
    assert record["cot"] == {"situation": "They wait.", "traits": {"openness": {"pole": "high", "cue": "ideas"},
                                                                   "neuroticism": {"pole": "low", "cue": ""}}}
    assert record["teacher"] == {"name": "test", "steps": "separate", "calls": 3, "tokens_read": 60,
                                 "tokens_written": 12}
    texts = [messages[-1]["content"] for messages in asked]
    for text in texts:
        assert "What now?" in text and "Finnish" in text and "Earlier I slept." in text and "$" not in text
    assert "They wait." not in texts[0] and "They wait." in texts[1] and "They wait." in texts[2]
    for expert, manner in synth.MANNERS.items():
        assert manner in texts[1] and (manner in texts[2]) == (expert in ("high_openness", "low_neuroticism"))
    assert not any(trait in texts[2].lower() for trait in TRAITS)  # the answer is not to name them


def test_a_query_with_dollars_braces_and_backslashes_reaches_the_teacher_as_it_is():
    odd = 'Costs $message $$5 {x} \\1 """ %s'
    assert odd in separate("a", query=odd)[1][0][-1]["content"]
    assert odd in Query({"id": 1, "query": odd}, "joint", 0, "t").ask[0][-1]["content"]


def test_a_teacher_that_wraps_a_step_in_json_or_names_it_is_understood():
    query, _ = separate('```json\n{"situation": "They wait."}\n```', json.dumps({"situation": "x", "traits": POLED}),
                        '**Response:** "Wait, "')
    assert query.outcome["cot"]["situation"] == "They wait." and query.outcome["response"] == "Wait,"
    assert separate("a", json.dumps(POLED), 'He said "wait"')[0].outcome["response"] == 'He said "wait"'
    assert "JSON" in separate('{"situation": "They')[0].outcome["reason"]


@pytest.mark.parametrize("bad, why", [(("They w", True), "cut off"), ("", "empty"), (" \n", "empty"), ('""', "empty"),
                                      ("```\n\n```", "empty")])
def test_a_text_that_is_empty_or_cut_off_is_not_taken(bad, why):
    assert why in separate(bad)[0].outcome["reason"]
    assert why in separate("a", json.dumps(POLED), bad)[0].outcome["reason"]


def test_json_that_is_whole_may_be_followed_by_a_cut_off_text_and_is_else_asked_for_more_briefly():
    assert "response" in joint(json.dumps(GOOD) + " And so", cut=True)
    assert "briefer" in joint(json.dumps(GOOD)[:-9], cut=True)["reason"]


def test_a_retry_has_the_complaint_and_the_reply_and_each_reply_has_its_own_budget():
    wrong = json.dumps({"openness": "medium"})
    fault = replies_module.Fault("server: 500")
    query, asked = separate("They wait.", wrong, fault, json.dumps(POLED), "", "Wait.", retries=2)
    assert query.outcome["response"] == "Wait." and query.outcome["teacher"]["calls"] == 6
    assert [m["role"] for m in asked[2]] == ["system", "user", "assistant", "user"]
    assert asked[2][:2] == asked[1] and asked[2][2]["content"] == wrong
    assert "'medium', expected" in asked[2][3]["content"]
    assert asked[3] == asked[2]  # after a fault of the network the same is asked again
    query, asked = separate("They wait.", wrong, replies_module.Fault("server: 500"), wrong, retries=2)
    assert "expected the pole" in query.outcome["reason"] and query.outcome["raw"] == wrong
    assert separate(replies_module.Fault("a"), replies_module.Fault("b"), retries=1)[0].outcome["reason"] == "b"


def test_fields_of_a_query_cannot_pass_for_an_outcome():
    """A query file may have any field; what decides is whether there is a response."""
    query, _ = separate("a", json.dumps(POLED), "Wait.", reason="why", teacher="me")
    assert query.outcome["reason"] == "why" and query.outcome["teacher"]["name"] == "test"


# ----------------------------------------------------------------------------------------------------------------------
# A server on this machine

def reply(content, finish="stop", usage=(7, 3)):
    usage = dict(zip(("prompt_tokens", "completion_tokens"), usage))
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": content}, "finish_reason": finish}],
                       "usage": usage}).encode()


class Server(http.server.ThreadingHTTPServer):
    """Answers chat completions by `script(number of the query, attempt) -> (status, body, headers)`, or None to hang
    up, or "hang" to say nothing until the end."""
    daemon_threads, request_queue_size = True, 128

    def __init__(self, script):
        super().__init__(("127.0.0.1", 0), Handler)
        self.script, self.lock, self.asked, self.bodies, self.headers = script, threading.Lock(), Counter(), [], []
        self.closing, self.flying, self.most, self.waiting = threading.Event(), 0, 0, None
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, *_):  # a client that was killed or went away
        pass


class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        server, body = self.server, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        number = int((re.search(r"number (\d+)", body["messages"][1]["content"]) or [0, 0])[1])
        with server.lock:
            server.asked[number] += 1
            attempt = server.asked[number]
            server.bodies.append((self.path, body))
            server.headers.append(dict(self.headers))
            server.flying += 1
            server.most = max(server.most, server.flying)
        if server.waiting:  # until that many are in flight
            server.waiting.wait(10)
        answer = server.script(number, attempt)
        with server.lock:
            server.flying -= 1
        if answer == "hang":
            server.closing.wait(30)
        elif answer:
            status, body, headers = (*answer, {})[:3]
            self.send_response(status)
            for name, value in ({"Content-Length": len(body)} | headers).items():
                self.send_header(name, str(value))
            self.end_headers()
            self.wfile.write(body)
        self.close_connection = True

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def serving(script):
    server = Server(script)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield server
    finally:
        server.closing.set()
        server.shutdown()
        server.server_close()


def good(number, attempt):
    return 200, reply(json.dumps(GOOD | {"response": f"Wait for {number}."}))


def http_command(server, queries, out, *more):
    return ["--teacher", "http", "--url", server.url, "--model", "m", "--steps", "joint", "--queries", str(queries),
            "--out", str(out), "--backoff", "0.001", "--timeout", "2", *map(str, more)]


@pytest.fixture
def asked(tmp_path):
    return write(tmp_path / "q.jsonl", *({"id": f"q{i}", "query": f"What now, number {i}?"} for i in range(12)))


def ids(path):
    return [entry["id"] for entry in lines(path)]


def test_a_server_makes_records_with_many_requests_in_flight(asked, tmp_path, capsys):
    out = tmp_path / "new" / "o.jsonl"
    with serving(good) as server:
        server.waiting = threading.Barrier(4)  # passes only when four requests are there together
        assert not synth.main(http_command(server, asked, out, "--workers", 4, "--max-new-tokens", 99))
    records = {record["id"]: record for record in read_records(out)}
    assert set(records) == set(ids(asked)) and server.most == 4 and not (tmp_path / "new" / "o.rejected.jsonl").exists()
    for i in range(12):
        assert records[f"q{i}"]["response"] == f"Wait for {i}." and records[f"q{i}"]["traits"] == TRAITS_OF_GOOD
        assert records[f"q{i}"]["teacher"] == {"name": "http:m", "steps": "joint", "calls": 1, "tokens_read": 7,
                                               "tokens_written": 3}
    assert {path for path, _ in server.bodies} == {"/v1/chat/completions"}
    assert all(set(body) == {"model", "messages", "max_tokens"} and body["model"] == "m" and body["max_tokens"] == 99
               for _, body in server.bodies)
    assert not any("Authorization" in headers for headers in server.headers)
    said = capsys.readouterr().out
    assert "12 queries, 0 duplicates dropped; 0 are done, 12 to do" in said and "12 records, 12 of them new" in said
    before = out.read_bytes()
    with serving(lambda *_: pytest.fail("nothing is left to ask")) as server:
        assert not synth.main(http_command(server, asked, out))
    assert out.read_bytes() == before and not server.bodies and "12 are done, 0 to do" in capsys.readouterr().out


def test_the_temperature_is_sent_if_it_is_given(asked, tmp_path):
    with serving(good) as server:
        synth.main(http_command(server, asked, tmp_path / "o.jsonl", "--temperature", 0.5))
    assert all(body["temperature"] == 0.5 for _, body in server.bodies)


KEY = "sk-very/secret+123"


def test_the_key_goes_into_its_header_and_nowhere_else(asked, tmp_path, capfd, monkeypatch):
    """Not to the terminal, to no file, also when the server repeats it, plainly or spelt in JSON's escapes."""
    monkeypatch.setenv("MY_KEY", KEY)
    shown = {0: (500, f"bad key {KEY}".encode()), 1: (200, reply(f"I know {KEY}")), 2: (200, f"<{KEY}>".encode()),
             3: (200, reply(json.dumps(GOOD | {"response": f"Your key is {KEY}"})).replace(b"s", b"\\u0073")
                 .replace(b"me\\u0073\\u0073age", b"message").replace(b"u\\u0073age", b"usage")),
             4: (429, json.dumps({"error": {"message": f"limit of {KEY}"}}).encode())}
    with serving(lambda number, attempt: shown.get(number) or good(number, attempt)) as server:
        assert not synth.main(http_command(server, asked, tmp_path / "o.jsonl", "--key-env", "MY_KEY", "--retries", 1))
    assert {headers["Authorization"] for headers in server.headers} == {f"Bearer {KEY}"}
    assert KEY not in "".join(json.dumps(body) for _, body in server.bodies)
    assert len(ids(tmp_path / "o.rejected.jsonl")) == 4 and len(ids(tmp_path / "o.jsonl")) == 8
    assert "[key]" in next(r["response"] for r in lines(tmp_path / "o.jsonl") if r["id"] == "q3")
    with serving(lambda *_: (401, f"no such key: {KEY}".encode())) as server:
        with pytest.raises(UserError, match=r"401 Unauthorized: no such key: \[key\]"):
            synth.main(http_command(server, asked, tmp_path / "p.jsonl", "--key-env", "MY_KEY"))
    text = "".join(capfd.readouterr()) + "".join(p.read_text() for p in tmp_path.glob("*") if p != asked)
    assert KEY not in text and KEY.split("/")[1] not in text


@pytest.mark.parametrize("key", [None, "", "two words", "line\nfeed", "ü"])
def test_a_key_that_is_none_is_refused_without_showing_it(asked, tmp_path, monkeypatch, key):
    monkeypatch.delenv("MY_KEY", raising=False)
    if key is not None:
        monkeypatch.setenv("MY_KEY", key)
    with serving(good) as server, pytest.raises(UserError, match="MY_KEY .*holds no key") as error:
        synth.main(http_command(server, asked, tmp_path / "o.jsonl", "--key-env", "MY_KEY"))
    assert not server.bodies and (not key or key not in str(error.value))


def test_a_redirect_is_not_followed_and_the_key_stays(asked, tmp_path, monkeypatch):
    monkeypatch.setenv("MY_KEY", KEY)
    with serving(good) as other:
        with serving(lambda *_: (307, b"", {"Location": other.url + "/chat/completions"})) as server:
            with pytest.raises(UserError, match=r"307, redirects to http://127.*give that as --url"):
                synth.main(http_command(server, asked, tmp_path / "o.jsonl", "--key-env", "MY_KEY"))
    assert not other.bodies


def test_no_proxy_of_the_environment_gets_the_key(asked, tmp_path, monkeypatch):
    with serving(good) as proxy, serving(good) as server:
        for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
            monkeypatch.setenv(name, proxy.url)
        assert not synth.main(http_command(server, asked, tmp_path / "o.jsonl"))
    assert not proxy.bodies and len(server.bodies) == 12


@pytest.mark.parametrize("status, body, why", [
    (400, b'{"error": {"message": "no model m\\u001b[31m here", "code": 1}}', "400 Bad Request: no model m"),
    (404, b'{"error": "not found here"}', "404 Not Found: not found here"), (413, b"too\nlong", "413 .*: too long"),
    (403, b'{"detail": "blocked"}', "403 Forbidden: .*blocked"), (402, b"", "402 Payment Required")])
def test_what_the_server_will_never_accept_ends_the_run_in_its_own_words(asked, tmp_path, status, body, why):
    def script(number, attempt):
        return good(number, attempt) if number < 7 else (status, body)
    why = rf"query 'q7': 127\.0\.0\.1 answered {why}"
    with serving(script) as server, pytest.raises(UserError, match=why) as error:
        synth.main(http_command(server, asked, tmp_path / "o.jsonl", "--workers", 1))
    assert str(error.value).isprintable() and sum(server.asked.values()) == 8  # one such answer is enough
    assert ids(tmp_path / "o.jsonl") == [f"q{i}" for i in range(7)]  # what was finished is saved
    assert not (tmp_path / "o.rejected.jsonl").exists()


@pytest.mark.parametrize("later", [(200, reply(json.dumps(GOOD))), (500, b""), (429, b"", {"Retry-After": "60"})])
def test_after_an_answer_that_ends_the_run_nobody_waits_or_asks_anything_more(asked, tmp_path, later):
    gate = threading.Event()

    def script(number, attempt):
        return (401, b"no") if number == 0 else gate.wait(10) and later
    with serving(script) as server:
        with pytest.raises(UserError, match="401"):
            synth.main(http_command(server, asked, tmp_path / "o.jsonl", "--workers", 3, "--backoff", 60))
        gate.set()
        until(lambda: not any("(work)" in thread.name for thread in threading.enumerate()), seconds=20)
        assert set(server.asked) <= {0, 1, 2} and max(server.asked.values()) == 1


def test_a_server_that_is_not_there_is_no_reason_to_reject_every_query(asked, tmp_path):
    with serving(good) as server:
        pass
    with pytest.raises(UserError, match="[Rr]efused.*is the server running"):
        synth.main(http_command(server, asked, tmp_path / "o.jsonl", "--retries", 1))
    assert not ids(tmp_path / "o.jsonl") and not ids(tmp_path / "o.rejected.jsonl")


FAULTS = {  # what a server may do instead, and the reason that the rejected file gives
    "hangs up": (None, "connection: "), "hangs": ("hang", r"no reply in time \(--timeout\)"),
    "429": ((429, b"slow"), "server: 429 Too Many Requests: slow"), "500": ((500, b""), "server: 500"),
    "503": ((503, b'{"error": {"message": "loading"}}'), "server: 503 Service Unavailable: loading"),
    "half a body": ((200, reply("x" * 99)[:50], {"Content-Length": 150}), "not a chat completion|connection"),
    "no completion": ((200, b'{"choices": []}'), "not a chat completion"), "a page": ((200, b"<p>"), "not a chat"),
    "a list": ((200, b"[]"), "not a chat completion"), "deep": ((200, b"[" * 100_000), "not a chat completion"),
    "no content": ((200, reply(None)), "no JSON object"), 
    "torn JSON": ((200, reply('{"situation": "a')), "not complete"),
    "cut off": ((200, reply('{"situation": "a', "length")), "cut off; be briefer"),
    "empty": ((200, reply("")), "no JSON object"), "another language": ((200, reply("Подождите.")), "no JSON object"),
    "all zero": ((200, reply(json.dumps(GOOD | {"traits": {}}))), "all-zero vector"),
    "not HTTP": ((99999, b""), "connection: |not a chat|server"), "8 MB": ((200, b" " * 8_200_000), "longer than 8 MB"),
}


@pytest.mark.parametrize("fault, why", FAULTS.values(), ids=FAULTS)
def test_a_fault_is_tried_again_and_a_query_that_has_only_faults_is_rejected_with_the_reason(tmp_path, fault, why):
    """One budget for all kinds. Query 1 is answered at the last attempt that it has, query 2 never."""
    asked = write(tmp_path / "q.txt", "What now, number 1?", "And number 2?")

    def script(number, attempt):
        return good(number, attempt) if (number, attempt) == (1, 3) else fault if attempt != 2 else (500, b"")
    with serving(script) as server:
        assert not synth.main(http_command(server, asked, tmp_path / "o.jsonl", "--retries", 2, "--timeout",
                                           0.3 if fault == "hang" else 5))
    (record,), (entry,) = lines(tmp_path / "o.jsonl"), lines(tmp_path / "o.rejected.jsonl")
    assert "number 1" in record["query"] and record["teacher"]["calls"] == 3 and server.asked == {1: 3, 2: 3}
    assert "number 2" in entry["query"] and re.search(why, entry["reason"]), entry["reason"]


def test_a_server_that_sends_a_byte_now_and_then_is_not_waited_for_for_ever(tmp_path):
    class Slow(Handler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.end_headers()
            while not self.server.closing.wait(0.05):
                self.wfile.write(b" ")
    asked = write(tmp_path / "q.txt", "What now?")
    with serving(good) as server:
        server.RequestHandlerClass, began = Slow, time.monotonic()
        assert not synth.main(http_command(server, asked, tmp_path / "o.jsonl", "--retries", 0, "--timeout", 0.3))
        assert time.monotonic() - began < 5
    assert "no reply in time" in lines(tmp_path / "o.rejected.jsonl")[0]["reason"]


def test_waits_double_and_retry_after_comes_first(tmp_path, monkeypatch):
    """No test waits: time is a number here that waiting moves on, for this run's workers only."""
    now, slept = [1000.0], []

    class Over(threading.Event):
        def wait(self, seconds):
            if seconds > 0:
                slept.append(seconds)
                now[0] += seconds
            return self.is_set()

    class Http(server_module.Http):
        def __init__(self, args):
            super().__init__(args)
            self.over = Over()
    monkeypatch.setattr(synth, "Http", Http)
    monkeypatch.setattr(server_module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(server_module, "random", SimpleNamespace(uniform=lambda low, high: high))
    plan = iter([(500, b""), (502, b""), (429, b"", {"Retry-After": "7"}), (503, b""), (429, b"", {"Retry-After": "0"}),
                 (500, b""), *[(500, b"")] * 8])
    asked = write(tmp_path / "q.txt", "What now?")
    with serving(lambda *_: next(plan, good(0, 0))) as server:
        command = http_command(server, asked, tmp_path / "o.jsonl", "--retries", 20, "--workers", 1, "--timeout", 1e6)
        assert not synth.main([*command, "--backoff", "1.5"])
    assert slept == [1.5, 3, 7, 12, 48, 60, 60, 60, 60, 60, 60, 60, 60] and ids(tmp_path / "o.jsonl")


@pytest.mark.parametrize("text, seconds", [
    ("3", 3), ("0", 0), (" 1.5 ", 1.5), ("99999", 3600), ("-1", None), ("soon", None), ("nan", None), ("", None),
    (None, None), ("9" * 400, None)])
def test_retry_after_is_seconds_or_a_date(text, seconds):
    assert server_module.retry_after(text) == seconds


def test_retry_after_as_a_date():
    assert 50 < server_module.retry_after(email.utils.formatdate(time.time() + 60, usegmt=True)) <= 61
    assert server_module.retry_after(email.utils.formatdate(time.time() - 60, usegmt=True)) == 0


@pytest.mark.parametrize("url", ["localhost:80/v1", "ftp://x/v1", "http:///v1", "http://me:pw@host/v1",
                                 "http://host/v1?key=1", "http://[::1/v1", "http://host/v 1", "http://host/é",
                                 "http://host:port/v1"])
def test_an_address_that_is_none_is_refused(asked, tmp_path, url):
    with pytest.raises(UserError, match="--url: expected the base"):
        synth.main(["--teacher", "http", "--url", url, "--model", "m", "--queries", str(asked), "--out",
                    str(tmp_path / "o.jsonl")])


def test_an_invalid_certificate_is_an_error_and_nothing_is_sent(asked, tmp_path, monkeypatch):
    """The client's own connection, with a handshake that fails as one does for a certificate nobody has signed."""
    def connect(self):
        assert self._context.verify_mode == server_module.ssl.CERT_REQUIRED and self._context.check_hostname
        error = server_module.ssl.SSLCertVerificationError("x")
        error.verify_message = "self-signed certificate"
        raise error
    monkeypatch.setattr(server_module.http.client.HTTPSConnection, "connect", connect)
    with pytest.raises(UserError, match="certificate is not valid .self-signed"):
        synth.main(["--teacher", "http", "--url", "https://localhost:1/v1", "--model", "m", "--queries", str(asked),
                    "--out", str(tmp_path / "o.jsonl")])


# ----------------------------------------------------------------------------------------------------------------------
# Nothing lost, nothing twice

def test_a_second_start_does_what_is_left_and_a_rejected_query_is_done_until_it_is_retried(asked, tmp_path, capsys):
    out, bad = tmp_path / "o.jsonl", tmp_path / "o.rejected.jsonl"
    with serving(lambda n, a: good(n, a) if n % 3 else (500, b"")) as server:
        few = write(tmp_path / "few.jsonl", *lines(asked)[:6])
        assert not synth.main(http_command(server, few, out, "--retries", 0))
        assert sorted(ids(out)) == ["q1", "q2", "q4", "q5"] and sorted(ids(bad)) == ["q0", "q3"]
        assert not synth.main(http_command(server, asked, out, "--retries", 0))
        assert server.asked == {i: 1 for i in range(12)} and len(ids(bad)) == 4
    assert "4 rejected, which --retry-rejected tries again" in capsys.readouterr().out
    with serving(lambda n, a: good(n, a) if n != 9 else (503, b"later")) as server:
        assert not synth.main(http_command(server, asked, out, "--retries", 0))
        assert not server.asked
        assert not synth.main(http_command(server, asked, out, "--retries", 0, "--retry-rejected"))
        assert server.asked == {0: 1, 3: 1, 6: 1, 9: 1}
    assert sorted(ids(out)) == sorted(set(ids(asked)) - {"q9"}) and ids(bad) == ["q9"]
    assert lines(bad)[0]["reason"] == "server: 503 Service Unavailable: later"


@pytest.mark.parametrize("file", ["o.jsonl", "o.rejected.jsonl"])
@pytest.mark.parametrize("left", [b'{"id": "q5", "query": "Wh', b'{"id": "q5"', b"{", b"\0\0\0",
                                  '{"id": "ü'.encode()[:-1]])
def test_a_torn_last_line_is_removed_and_its_query_done_again(asked, tmp_path, file, left, capsys):
    whole = {"o.jsonl": {"id": "q4", "query": "a", "response": "b", "traits": {"openness": 1}},
             "o.rejected.jsonl": {"id": "q4", "query": "a", "reason": "b"}}[file]
    (tmp_path / file).write_bytes(json.dumps(whole).encode() + b"\n" + left)
    with serving(good) as server:
        assert not synth.main(http_command(server, asked, tmp_path / "o.jsonl"))
    assert "q4" in ids(tmp_path / file) and server.asked[5] == 1 and server.asked[4] == 0
    assert sorted(ids(tmp_path / "o.jsonl") + ids(tmp_path / "o.rejected.jsonl")) == sorted(ids(asked))
    assert f"{file}: the last line was torn" in capsys.readouterr().out


def test_a_whole_last_line_without_its_end_is_kept(asked, tmp_path):
    record = {"id": "q4", "query": "a", "response": "b", "traits": {"openness": 1}}
    (tmp_path / "o.jsonl").write_text(json.dumps(record))
    with serving(good) as server:
        assert not synth.main(http_command(server, asked, tmp_path / "o.jsonl"))
    assert lines(tmp_path / "o.jsonl")[0] == record and not server.asked[4] and len(ids(tmp_path / "o.jsonl")) == 12


@pytest.mark.parametrize("name, text, why", [
    ("o.jsonl", '{"id": 1, "qu\n{"id": 2}\n', "o.jsonl, line 1: not JSON"), ("o.jsonl", "my notes", "no JSON object"),
    ("o.jsonl", '{"id": 1, "query": "a"}\n', "line 1: no 'response'"),
    ("o.rejected.jsonl", "[]\n", "no entry of a rejected file")])
def test_files_that_are_something_else_are_left_alone(asked, tmp_path, name, text, why):
    (tmp_path / name).write_text(text)
    with serving(good) as server, pytest.raises(UserError, match=why):
        synth.main(http_command(server, asked, tmp_path / "o.jsonl"))
    assert (tmp_path / name).read_text() == text and not server.bodies


def test_a_query_in_both_files_counts_as_done_once(asked, tmp_path):
    """What a kill in the middle of --retry-rejected leaves: the record counts, and the later of two rejections."""
    record = {"id": "q4", "query": "a", "response": "b", "traits": {"openness": 1}}
    write(tmp_path / "o.jsonl", record)
    write(tmp_path / "o.rejected.jsonl", *({"id": key, "query": "a", "reason": why} for key, why in (
        ("q4", "x"), ("q5", "x"), ("q5", "y"))))
    with serving(good) as server:
        assert not synth.main(http_command(server, asked, tmp_path / "o.jsonl"))
    assert len(server.asked) == 10
    assert [(e["id"], e["reason"]) for e in lines(tmp_path / "o.rejected.jsonl")] == [("q5", "y")]


def start(server, queries, out, *more):
    return subprocess.Popen([sys.executable, ROOT / "synth.py", *http_command(server, queries, out, *more)],
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def until(true, process=None, seconds=60):
    """Look again and again, with a deadline."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline and (process is None or process.poll() is None), "it did not come to that"
        threading.Event().wait(0.02)


def test_two_processes_on_one_file_refuse_each_other_and_ctrl_c_keeps_what_is_finished(asked, tmp_path):
    out = tmp_path / "o.jsonl"
    with serving(lambda n, a: good(n, a) if n < 8 else "hang") as server:
        process = start(server, asked, out, "--timeout", 60)
        until(lambda: len(lines(out)) == 8, process)
        before = out.read_bytes()
        with pytest.raises(UserError, match="another process is writing to it"):
            synth.main(http_command(server, asked, out))
        assert out.read_bytes() == before
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=30)  # the request that hangs would take 60
        assert process.returncode == 130 and "is saved" in said and "Trace" not in said
    assert sorted(ids(out)) == [f"q{i}" for i in range(8)]
    with serving(good) as server:  # the lock went with the process
        assert not synth.main(http_command(server, asked, out))
    assert sorted(ids(out)) == sorted(ids(asked)) and len(server.asked) == 4


def test_ctrl_c_ends_within_two_seconds_with_everything_finished_on_disk(asked, tmp_path):
    """While a request hangs. The best of three, since a busy machine takes longer to end any process."""
    took = []
    while len(took) < 3 and min(took, default=2) >= 2:
        out = tmp_path / f"o{len(took)}.jsonl"
        with serving(lambda n, a: good(n, a) if n < 8 else "hang") as server:
            process = start(server, asked, out, "--timeout", 60)
            until(lambda: len(lines(out)) == 8, process)
            began = time.monotonic()
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=30)
            took.append(time.monotonic() - began)
        assert process.returncode == 130 and "is saved" in said and "Trace" not in said and len(ids(out)) == 8
    assert min(took) < 2, took


def test_what_is_finished_when_ctrl_c_comes_is_written_though_nobody_had_fetched_it(asked, tmp_path, monkeypatch):
    whole, made = output.RecordWriter.add, []

    class Http(server_module.Http):
        def __init__(self, args):
            super().__init__(args)
            made.append(self)

    def add(sink, outcomes):
        whole(sink, outcomes)
        if len(ids(tmp_path / "o.jsonl")) == 1:
            until(lambda: made[0].finished.qsize() == 11 + 12)  # the others, and twelve workers' good-byes
            raise KeyboardInterrupt
    monkeypatch.setattr(synth, "Http", Http)
    monkeypatch.setattr(output.RecordWriter, "add", add)
    with serving(good) as server:
        assert synth.main(http_command(server, asked, tmp_path / "o.jsonl", "--workers", 12)) == 130
    assert sorted(ids(tmp_path / "o.jsonl")) == sorted(ids(asked))


def test_no_more_is_asked_than_two_for_each_worker_ahead_of_what_is_written(asked, tmp_path, monkeypatch):
    """Such as while a disk is slow: a kill loses no more than that."""
    whole, written = output.RecordWriter.add, []

    def add(sink, outcomes):
        until(lambda: sum(server.asked.values()) >= len(written) + 6)
        assert sum(server.asked.values()) == len(written) + 6
        if len(written) == 4:
            raise KeyboardInterrupt
        whole(sink, outcomes)
        written.extend(outcomes)
    with serving(good) as server, monkeypatch.context() as patched:
        patched.setattr(output.RecordWriter, "add", add)
        with pytest.raises(KeyboardInterrupt):  # the second, of what is left
            synth.main(http_command(server, asked, tmp_path / "o.jsonl", "--workers", 3))
        until(lambda: not any("(work)" in thread.name for thread in threading.enumerate()), seconds=20)
        assert sum(server.asked.values()) == 4 + 6


KINDS = [None, "hang", (429, b"", {"Retry-After": "0"}), (500, b"oops"), (200, reply('{"situation": "They')),
         (200, reply("")), (200, reply(json.dumps(GOOD | {"response": "Подождите."}))),
         (200, reply(json.dumps(GOOD | {"traits": {}})))]


@pytest.mark.parametrize("count", [500, pytest.param(2000, marks=pytest.mark.slow)])
def test_with_faults_in_30_percent_and_three_kills_every_query_ends_in_one_place_once(tmp_path, count):
    def script(number, attempt):  # which replies are faulty is fixed by the query and the attempt
        draw = int.from_bytes(hashlib.sha256(f"{number} {attempt}".encode()).digest()[:4]) / 2**32
        faulty[number, attempt] = draw < 0.3
        return KINDS[int(draw / 0.3 * len(KINDS))] if draw < 0.3 else good(number, attempt)
    asked = write(tmp_path / "q.txt", *(f"What now, number {i}?" for i in range(count)))
    out, bad, faulty = tmp_path / "o.jsonl", tmp_path / "o.rejected.jsonl", {}
    more = "--workers", 24, "--retries", 1, "--timeout", 0.3
    with serving(script) as server:
        for kill in (1, 2, 3):
            process, size = start(server, asked, out, *more), count * kill // 4
            until(lambda: len(lines_whole(out)) + len(lines_whole(bad)) > size, process)
            process.kill()
            process.communicate()
        process = start(server, asked, out, *more)
        said, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    records, rejected = read_records(out), lines(bad)
    assert sorted(r["query"] for r in records + rejected) == sorted(asked.read_text().splitlines())
    assert len({r["id"] for r in records + rejected}) == count and 0.02 < len(rejected) / count < 0.25
    assert all(r["response"] == f"Wait for {re.search(r'[0-9]+', r['query'])[0]}." for r in records)
    reasons = Counter(entry["reason"].split(":")[0].split(" (")[0] for entry in rejected)
    assert all(reasons) and len(reasons) >= 5 and 0.2 < sum(faulty.values()) / len(faulty) < 0.4
    assert sum(server.asked.values()) < 1.6 * count + 3 * 24 * 2  # what was done was not asked again
    assert f"{len(records)} records" in said and f"{len(rejected)} rejected" in said


def lines_whole(path):
    return path.read_bytes().split(b"\n")[:-1] if path.exists() else []


# ----------------------------------------------------------------------------------------------------------------------
# A model folder as the teacher

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Qwen-shaped model of under a million parameters, as initialised: what it says is noise."""
    folder = tmp_path_factory.mktemp("local") / "tiny-qwen"
    make_tiny("encoder", folder, synth.template_records("train", 50), 0, None)
    model, chat = Transformer.from_pretrained(folder, torch.float32), Chat.from_dir(folder)
    return folder, model, chat


def local_command(folder, queries, out, *more):
    return ["--teacher", "local", "--model", str(folder), "--queries", str(queries), "--out", str(out), "--device",
            "cpu",
            *map(str, more)]


def test_a_model_folder_writes_in_batches_of_neighbours_in_length_and_finished_records_leave(folder, asked, tmp_path,
                                                                                            monkeypatch):
    """The model's words are put into its mouth; all else is real. Every third query's first reply can't be read."""
    folder, _, chat = folder
    batches, tried = [], Counter()

    def says(model, prompts, gate, limit, temperature, stops, generator):
        assert (gate, limit, temperature) == (None, 77, 0.25) and stops == chat.stops
        batches.append([len(prompt) for prompt in prompts])
        replies = []
        for prompt in prompts:
            number = int(re.search(r"number (\d+)", chat.text(prompt))[1])
            tried[number] += 1
            text = json.dumps(GOOD | {"response": f"Wait for {number}."})
            text = "no" if number % 3 == 0 and tried[number] == 1 else text
            replies.append([*chat.tokenizer.encode(text, add_special_tokens=False).ids, chat.end])
        return replies
    monkeypatch.setattr(synth, "generate", says)
    long = [item | {"query": item["query"] + " So?" * (7 * i % 12)} for i, item in enumerate(lines(asked))]
    queries, out = write(tmp_path / "long.jsonl", *long), tmp_path / "o.jsonl"
    assert not synth.main(local_command(folder, queries, out, "--steps", "joint", "--batch", 4, "--max-new-tokens", 77,
                                        "--temperature", 0.25))
    records = {record["id"]: record for record in read_records(out)}
    assert set(records) == set(ids(asked)) and all(records[f"q{i}"]["response"] == f"Wait for {i}." for i in range(12))
    assert records["q1"]["teacher"]["name"] == "local:tiny-qwen" and records["q3"]["teacher"]["calls"] == 2
    assert records["q1"]["teacher"]["tokens_written"] == len(chat.tokenizer.encode(
        json.dumps(GOOD | {"response": "Wait for 1."}), add_special_tokens=False).ids) + 1
    assert [len(batch) for batch in batches] == [4, 4, 4, 3, 1]  # 12 and 4 again: full ones as long as there are rows
    assert all(batch == sorted(batch, reverse=True) for batch in batches)
    assert all(max(b) - min(b) < max(map(max, batches)) - min(map(min, batches)) for b in batches)


@pytest.mark.parametrize("asked_for", [False, True])
def test_a_local_teacher_decodes_compiled_where_it_is_asked_to(asked_for, folder, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda step, **how: step)  # which takes a minute
    teacher = synth.Local(parse(synth.Args, local_command(folder[0], "q", "o", *["--compile"] * asked_for)))
    assert (teacher.model.decode is not None) == asked_for


def test_a_choice_is_the_most_probable_whole_reply(folder):
    """Against each choice's log-probability, token by token, from the whole model's logits."""
    folder, _, chat = folder
    teacher, seen = synth.Local(parse(synth.Args, local_command(folder, "q", "o"))), set()
    with torch.no_grad():
        for p in teacher.model.parameters():
            p.mul_(6 if p.dim() == 2 else 1)  # as initialised, every next token is about as likely as any other
    for i in range(12):
        messages = [{"role": "user", "content": f"{'So ' * i}what, number {i}?"}]
        prompt, scores = chat.prompt(messages), {}
        for word in ("high", "low", "neither", "a", "b", "c", "no idea where"):
            row = prompt + chat.tokenizer.encode(word, add_special_tokens=False).ids + [chat.end]
            logs = teacher.model(torch.tensor([row])).log_softmax(-1)[0]
            scores[word] = sum(logs[t, row[t + 1]].item() for t in range(len(prompt) - 1, len(row) - 1))
        words = list(scores)
        while len(words) > 1:
            best = max(words, key=scores.get)
            assert teacher.choose(messages, tuple(words)) == best
            seen.add(best)
            words.remove(best)
    assert len(seen) > 3


def test_scored_traits_never_fail_to_parse(folder, asked, tmp_path, monkeypatch):
    folder, _, chat = folder
    wait = [*chat.tokenizer.encode("wait").ids, chat.end]
    monkeypatch.setattr(synth, "generate", lambda model, prompts, *_, **__: [wait for _ in prompts])
    out = tmp_path / "o.jsonl"
    turn = iter("high low neither neither high".split() * 11 + ["neither"] * 5)
    monkeypatch.setattr(synth.Local, "choose", lambda self, messages, choices: next(turn))
    assert not synth.main(local_command(folder, asked, out, "--steps", "score", "--batch", 1, "--retries", 0))
    for record in read_records(out):
        assert record["traits"] == {"openness": 1, "conscientiousness": -1, "neuroticism": 1}
        assert record["cot"]["traits"]["conscientiousness"] == {"pole": "low", "cue": ""}
        assert record["response"] == "wait"
        assert record["teacher"]["calls"] == 7
    (entry,) = lines(tmp_path / "o.rejected.jsonl")
    assert entry["reason"].startswith("all-zero vector") and len(ids(out)) == 11


def test_a_query_too_long_to_be_scored_is_rejected():
    query = Query({"id": 1, "query": "What now?"}, "score", 0, "test")
    query.tell(Reply("They wait."))
    assert query.ask[1] == ("high", "low", "neither")
    query.tell(replies_module.Fault("the prompt has 9,000 tokens, more than 8,192"))
    assert query.outcome["reason"].startswith("the prompt has") and query.outcome["teacher"]["calls"] == 2


@pytest.mark.parametrize("by", ["memory", "the model's context"])
def test_noise_is_rejected_and_prompts_that_are_too_long_are_not_read(folder, asked, tmp_path, monkeypatch, by):
    if by == "memory":
        monkeypatch.setattr(synth.Local, "MOST_TOKENS", 800)
    else:
        folder = [shutil.copytree(folder[0], tmp_path / "model")]
        config = json.loads((folder[0] / "config.json").read_text())
        (folder[0] / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 801}))
    queries = write(tmp_path / "long.jsonl", {"id": "long", "query": "So " * 900}, *lines(asked)[:2])
    assert not synth.main(local_command(folder[0], queries, tmp_path / "o.jsonl", "--max-new-tokens", 3, "--retries",
                                        1))
    reasons = {entry["id"]: entry["reason"] for entry in lines(tmp_path / "o.rejected.jsonl")}
    assert re.fullmatch(r"the prompt has [\d,]+ tokens, more than 800", reasons.pop("long"))
    assert reasons == dict.fromkeys(("q0", "q1"), "it was cut off; be briefer") and not ids(tmp_path / "o.jsonl")


def test_ctrl_c_between_two_tokens_keeps_the_batches_before(folder, asked, tmp_path, monkeypatch, capsys):
    whole, calls = model_module.generate, []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return whole(*args, **kwargs)
    monkeypatch.setattr(synth, "generate", interrupted)
    command = local_command(folder[0], asked, tmp_path / "o.jsonl", "--max-new-tokens", 2, "--retries", 0, "--batch", 2)
    assert synth.main(command) == 130 and len(ids(tmp_path / "o.rejected.jsonl")) == 4
    assert not synth.main(command) and sorted(ids(tmp_path / "o.rejected.jsonl")) == sorted(ids(asked))
    assert "4 are done, 8 to do" in capsys.readouterr().out


@pytest.mark.parametrize("argv, why", [
    ("--teacher http --out o.jsonl", "--teacher http needs --queries"), ("--teacher http", "--out is missing"),
    ("--teacher http --out o.jsonl --queries q.txt --model m", "--teacher http needs --url: http: the base"),
    ("--teacher local --out o.jsonl --queries q.txt", "--teacher local needs --model"),
    ("--teacher local --out o.jsonl --queries q.txt --model m --url x", "--url has no meaning for --teacher local"),
    ("--teacher http --out o.jsonl --queries q.txt --model m --url http://x/v1 --compile",
     "--compile has no meaning for --teacher http"),
    ("--out o.jsonl --queries q.txt", "--queries has no meaning for --teacher template"),
    ("--teacher local --out o --queries q.txt --model m", "--out is o, expected a file named .jsonl"),
    ("--teacher local --out o.jsonl --queries q.txt --model m --overwrite", "is never replaced"),
    ("--teacher http --out o.jsonl --queries q.txt --model m --url http://x --steps score", "so --teacher local"),
    ("--teacher local --out o.jsonl --queries nowhere.txt --model m", "nowhere.txt: No such file"),
    ("--teacher http --workers 0", "--workers is 0"), ("--teacher http --retries -1", "--retries is -1"),
    ("--teacher http --timeout nan", "--timeout is nan"), ("--teacher other", "invalid choice")])
def test_arguments_that_do_not_go_together_are_refused_and_nothing_is_made(tmp_path, monkeypatch, argv, why):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=re.escape(why)) as error:
        synth.main(argv.split())
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())
