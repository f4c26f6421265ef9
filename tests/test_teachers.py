"""Laws of the teachers' replies and files: what is made of a reply, what a server may do, and that hours of failures,
kills and second starts lose nothing and do nothing twice. The servers run in this process.
"""
import contextlib
import email.utils
import hashlib
import http.client
import http.server
import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

import synth
from lora import TRAITS
from support import output
from support import server as server_module
from support.files import UserError
from support.records import check_record, read_records
from support.replies import QueryRejected, Reply, RequestFailed, read_pole
from synth import PROMPTS, Synthesis

ROOT = Path(synth.__file__).resolve().parent
POLED = {"openness": {"pole": "high", "cue": "ideas"}, "neuroticism": -1, "agreeableness": 0}
GOOD = {"situation": "They wait.", "traits": POLED, "response": "Wait with me."}
TRAITS_OF_GOOD = {"openness": 1, "neuroticism": -1}


def lines(path):
    path = Path(path)
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def ids(path):
    return [entry["id"] for entry in lines(path)]


def write(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows),
                    encoding="utf-8")
    return path


# ----------------------------------------------------------------------------------------------------------------------
# Reading replies

def outcome(text, cut_off=False, query="What now?"):
    """The record, or the rejected entry, from one reply to the joint prompt."""
    synthesis = Synthesis({"id": 1, "query": query}, "joint", 0, "test")
    synthesis.tell(Reply(text, cut_off))
    return synthesis.outcome


def good_with(**changes):
    return json.dumps(GOOD | changes, ensure_ascii=False)


WRITTEN = {  # how models write GOOD
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
def test_replies_as_models_write_them_are_read(text):
    record = outcome(text)
    assert check_record(record) is None and record["response"] == "Wait with me."
    assert record["traits"] == TRAITS_OF_GOOD and record["cot"]["situation"] == "They wait."
    assert record["cot"]["traits"] == {"openness": {"pole": "high", "cue": "ideas"},
                                       "neuroticism": {"pole": "low", "cue": ""}}


SAID = "It's the parents' and \"hers\", a\\b,\n\t\U0001f600 – don't: [1, 2]"
SHORT = '{"situation": "a", "traits": {"openness": 1}, "response": '


@pytest.mark.parametrize("text, response", [
    (good_with(response=SAID), SAID), (json.dumps(GOOD | {"response": SAID}), SAID),
    (SHORT.replace('"', "'") + "'It's the boys' and don't'}", "It's the boys' and don't"),
    (SHORT + '"So "no" it is."}', 'So "no" it is.'), (SHORT + r'"x \ud83d y"}', "x \ufffd y")])
def test_texts_keep_their_apostrophes_quotes_escapes_and_emojis(text, response):
    assert outcome(text)["response"] == response


REFUSED = {  # replies that can be read in two ways or not at all, and the complaint
    "nothing": ("", "no JSON object"), "prose": ("High openness, low neuroticism.", "no JSON object"),
    "torn": (json.dumps(GOOD)[:-30], "not complete"), "torn in a mark": (json.dumps(GOOD)[:20], "not complete"),
    "no colon": ('{"situation" "a"}', "JSON"), "wrong bracket": (json.dumps(GOOD)[:-1] + "]", "JSON"),
    "two that differ": (good_with() + good_with(response="No."), "several JSON objects"),
    "a key twice": ('{"situation": "a", "traits": {"openness": 1, "openness": -1}, "response": "b"}', "twice"),
    **{f"pole {pole}": (good_with(traits={"openness": pole}), "openness is .*expected the pole high, low or neither")
       for pole in (0.5, "medium", "high or low", {"pole": "high | low"}, True, {"cue": "high"},
                    {"pole": "high", "value": -1})},
    "unknown trait": (good_with(traits={"openess": 1}), "'openess' is not one of the traits"),
    "a list of numbers": (good_with(traits=[1, 0, 0, 0, -1]), "expected an object"),
    "a trait twice": (good_with(traits=[{"trait": "openness", "pole": pole} for pole in (1, -1)]), "twice"),
    "all zero": (good_with(traits=dict.fromkeys(TRAITS, 0)), "all-zero vector"),
    "no traits": (json.dumps({k: v for k, v in GOOD.items() if k != "traits"}), "traits is 'None'"),
    "empty response": (good_with(response=" "), "response is empty"),
    "null": (good_with(situation=None), "situation is 'None'"),
    "curly quotes": (re.sub('"(.*?)"', r"“\1”", good_with()), "curly quotes"),
    "a curly value": (good_with().replace('"They wait."', "“They wait.”"), "curly quotes"),
    "another script": (good_with(response="请等一下。"), "wrong language.*Cjk.*Latin"),
    "deep": ('{"situation": ' + "[" * 100_000, "longer than 50,000"), "deep too": ("{" * 9000, "JSON"),
    "deeply nested": ('{"situation":' * 3000, "nested too deeply"), "quotes": ('{"' * 20_000, "JSON"),
    "a megabyte": ("x" * 1_000_000, "longer than 50,000"), "zeros": ("\0" * 1000, "no JSON object"),
}


@pytest.mark.parametrize("text, why", REFUSED.values(), ids=REFUSED)
def test_an_ambiguous_or_broken_reply_is_refused_with_its_reason_and_its_text(text, why):
    began = time.perf_counter()
    entry = outcome(text)
    assert re.search(why, entry["reason"]), entry["reason"]
    assert entry["raw"] == text[:50_000] and "response" not in entry and len(entry["reason"]) < 300
    assert time.perf_counter() - began < 5


def test_whole_json_may_be_followed_by_a_text_that_is_cut_off():
    assert "response" in outcome(json.dumps(GOOD) + " And so", cut_off=True)
    assert "briefer" in outcome(json.dumps(GOOD)[:-9], cut_off=True)["reason"]


DRAFT = good_with(response="No.", traits={"openness": "low"})
THOUGHTS = {  # family: what stands before and after a thought
    "Qwen3": ("<think>\n", "\n</think>\n\n"), "the prompt opens it": ("", "</think>"), "Kimi": ("◁think▷", "◁/think▷"),
    "Magistral": ("[THINK]", "[/THINK]"), "Seed": ("<seed:think>", "</seed:think>"),
    "capitals": ("<Thinking>", "</Thinking>"), "Gemma": ("<|channel>thought\n", "<channel|>"),
    "Command A": ("<|START_THINKING|>", "<|END_THINKING|><|START_RESPONSE|>"),
    "Hunyuan": ("<think>", "</think>\n<answer>"), "twice": ("<think>a</think>No.<think>", "</think>"),
    "Harmony": ("<|channel|>analysis<|message|>",
                "<|end|><|start|>assistant<|channel|>final <|constrain|>json<|message|>"),
    "Harmony after its header": ("<|start|>assistant<|channel|>analysis<|message|>",
                                 "<|end|><|start|>assistant<|channel|>final<|message|>"),
    "Harmony without its tokens": ("analysis", "assistantfinal"), "none": None,
}
ENDS = ["", "<|im_end|>", "<|eot_id|>\n", "</s>", "<end_of_turn>", "<|endoftext|>", "<｜end▁of▁sentence｜>",
        "<|return|>", "<|END_OF_TURN_TOKEN|>", "<turn|>", "<|user|>", "<eos>", "</answer>", "[INST]",
        "<|start_header_id|>user<|end_header_id|>\n\nAnd?", "<|im_end|>\n<|im_start|>user\nAnd?<|im_end|>\n"
        f"<|im_start|>assistant\n<think>Hm.</think>{DRAFT}"]


@pytest.mark.parametrize("family", THOUGHTS)
def test_a_reply_is_what_stands_after_the_last_thought_and_before_the_first_end_of_a_turn(family):
    """As plain text and as JSON; the thought drafts another answer. A thought without an end leaves no reply."""
    opening, closing = THOUGHTS[family] or ("", "")
    thought = f"{opening}{DRAFT}, hm: a < b{closing}" if THOUGHTS[family] else ""
    for end in ENDS:
        assert Reply(f"{thought}Wait.{end}").text.strip() == "Wait."
        record = outcome(thought + good_with() + end)
        assert record["response"] == "Wait with me." and record["traits"] == TRAITS_OF_GOOD
        assert "response" in outcome(thought + good_with() + end, cut_off=True)
    for end in (ENDS[0], ENDS[-1]) if opening not in ("", "analysis") else ():
        entry = outcome(thought.removesuffix(closing) + end)
        assert "cut off before the reply began (--max-new-tokens)" in entry["reason"] and DRAFT in entry["raw"]


@pytest.mark.parametrize("text", ["a < b and b > c", "<b>Wait.</b>", "[Sigh] I think so.", "f <|> g", "a|>b", "End."])
def test_marks_that_belong_to_a_text_stay(text):
    assert (Reply(text).text, Reply(text).cut_off) == (text, False)


@pytest.mark.parametrize("header", [
    "<|im_start|>assistant\n", "<|start_header_id|>assistant<|end_header_id|>\n\n", "<start_of_turn>model\n",
    "<|start|>assistant<|channel|>final<|message|>", "<|start|>assistant<|message|>", "<|assistant|>\n",
    "<｜Assistant｜>", "<|begin_of_text|>", "<|begin_of_box|>", "<|im_start|>assistant<|im_sep|>", "<s>", "<bos>",
    "<｜begin▁of▁sentence｜>",
    "<|header_start|>assistant<|header_end|>\n\n", "<|start_of_role|>assistant<|end_of_role|>", "<|startoftext|>",
    "<|im_assistant|>assistant<|im_middle|>", "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>", "<|turn>model\n", " [/INST] "])
def test_the_header_of_its_own_turn_is_not_part_of_a_reply(header):
    for before in ("", "<s>", "<think>Hm.</think>\n\n"):
        assert Reply(f"{before}{header}Wait.<|end_of_box|><|im_end|>").text.strip() == "Wait."
    assert Reply(f"<|im_end|>{header}No.").text == ""
    if "<|start|>" not in header:  # in Harmony it may also begin another part of the same turn
        assert Reply(f"Wait.{header}No.").text.strip() == "Wait." and Reply(f"<think>{header}</think>No.").text == ""


@pytest.mark.parametrize("text", ["<|user|>\nHi", "<|im_start|>user\nHi", "<start_of_turn>user\nHi", "[INST] Hi",
                                  "</s>Hi"])
def test_another_turn_is_no_reply(text):
    assert Reply(text).text == ""


def test_a_text_that_ended_before_the_limit_on_tokens_is_whole():
    assert not Reply("Wait.<|im_end|>\n<|im_start|>user\nAnd?", cut_off=True).cut_off


def test_nothing_in_a_reply_is_executed(tmp_path):
    code = f"__import__('pathlib').Path({str(tmp_path / 'x')!r}).touch()"
    outcome(f"{{'situation': {code}, 'traits': {{'openness': 1}}, 'response': 'a'}}"), outcome(code)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("query, chinese, english", [  # which responses are taken
    ("Переведи: hello, friend", False, True), ("2 + 2?", True, True), ("日本語で、おねがい", True, False),
    ("Hello, friend", False, True), ("Привет", False, False)])
def test_a_response_has_a_script_of_its_query(query, chinese, english):
    assert ("response" in outcome(good_with(response="好的，请稍等。"), query=query)) == chinese
    assert ("response" in outcome(good_with(), query=query)) == english


@pytest.mark.parametrize("response", ["𝐖𝐚𝐢𝐭 𝑤𝑖𝑡ℎ 𝕞𝕖.", "Ｗａｉｔ ｗｉｔｈ ｍｅ．", "Ⓦait"])
def test_letters_in_another_form_are_of_the_same_script(response):
    assert "response" in outcome(good_with(response=response))
    assert "response" in outcome(good_with(), query=response)
    assert "response" in outcome(good_with(response="ｵﾁｬｦ ﾉﾐﾏｼｮｳ"), query="お茶をのみますか")


def test_the_history_counts_for_the_language():
    said = [{"role": "user", "content": "我今天很累。"}, {"role": "assistant", "content": "早点休息。"}]
    for history, found in ((said, True), ([], False)):
        query = Synthesis({"id": 1, "query": "OK???", "history": history}, "joint", 0, "test")
        query.tell(Reply(good_with(response="好的，请稍等。")))
        assert ("response" in query.outcome) == found


@pytest.mark.parametrize("pole, written", [
    (1, (1, "1", "+1", "+", " High ", "high pole", 1.0, "1.0")), (-1, (-1, "-1", "−1", "LOW", "-", -1.0)),
    (0, (0, "0", "neither", "None", "neutral", None, 0.0)),
    (None, (2, "highest", "hi", True, False, "", 0.5, [], {}, "1 or 0", "not high", float("nan")))])
def test_poles_as_people_and_models_write_them(pole, written):
    assert [read_pole(value) for value in written] == [pole] * len(written)


# ----------------------------------------------------------------------------------------------------------------------
# A server on this machine

def reply(content, finish="stop", usage=(7, 3)):
    usage = dict(zip(("prompt_tokens", "completion_tokens"), usage))
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": content}, "finish_reason": finish}],
                       "usage": usage}).encode()


class Server(http.server.ThreadingHTTPServer):
    """Answers chat completions with script(number of the query, attempt): (status, body, headers), None to hang up, or
    "hang" to say nothing until the end of the test."""
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
        number = int((re.search(r"number (\d+)", json.dumps(body["messages"])) or [0, 0])[1])
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


@pytest.fixture
def out(tmp_path):
    return tmp_path / "o.jsonl"


def rejected(out):
    return lines(out.with_suffix(".rejected.jsonl"))


def test_a_server_makes_records_with_many_requests_in_flight(asked, tmp_path, capsys):
    out = tmp_path / "new" / "o.jsonl"
    with serving(good) as server:
        server.waiting = threading.Barrier(4)  # passes when four requests are there together
        assert not synth.main(http_command(server, asked, out, "--workers", 4, "--max-new-tokens", 99))
    records = {record["id"]: record for record in read_records(out)}
    assert set(records) == set(ids(asked)) and server.most == 4
    assert [file.name for file in out.parent.iterdir()] == ["o.jsonl"]  # nothing was rejected
    for i in range(12):
        assert records[f"q{i}"]["response"] == f"Wait for {i}." and records[f"q{i}"]["traits"] == TRAITS_OF_GOOD
        assert records[f"q{i}"]["teacher"] == {"name": "http:m", "steps": "joint", "calls": 1, "tokens_read": 7,
                                               "tokens_written": 3}
    assert {path for path, _ in server.bodies} == {"/v1/chat/completions"}
    assert all(set(body) == {"model", "messages", "max_tokens"} and body["model"] == "m" and body["max_tokens"] == 99
               for _, body in server.bodies)
    assert not any("Authorization" in headers for headers in server.headers)
    said = capsys.readouterr().out
    assert "12 queries, 0 duplicates dropped; 0 are done or rejected, 12 to do" in said
    assert "12 records, 12 of them new" in said
    before = out.read_bytes()
    with serving(good) as server:
        assert not synth.main(http_command(server, asked, out))
    assert out.read_bytes() == before and not server.bodies
    assert "12 are done or rejected, 0 to do" in capsys.readouterr().out


def test_the_temperature_is_sent_if_it_is_given(asked, out):
    with serving(good) as server:
        synth.main(http_command(server, asked, out, "--temperature", 0.5))
    assert all(body["temperature"] == 0.5 for _, body in server.bodies)


# ----------------------------------------------------------------------------------------------------------------------
# The key

KEY = "sk-very/secret+123"


def test_the_key_goes_into_its_header_and_nowhere_else(asked, out, tmp_path, capfd, monkeypatch):
    """Not to the terminal and to no file, even if the server repeats it, plainly or in JSON's escapes."""
    monkeypatch.setenv("MY_KEY", KEY)
    shown = {0: (500, f"bad key {KEY}".encode()), 1: (200, reply(f"I know {KEY}")), 2: (200, f"<{KEY}>".encode()),
             3: (200, reply(json.dumps(GOOD | {"response": f"Your key is {KEY}"})).replace(b"sk-", b"\\u0073k-")),
             4: (429, json.dumps({"error": {"message": f"limit of {KEY}"}}).encode())}
    with serving(lambda number, attempt: shown.get(number) or good(number, attempt)) as server:
        assert not synth.main(http_command(server, asked, out, "--key-env", "MY_KEY", "--retries", 1))
    assert {headers["Authorization"] for headers in server.headers} == {f"Bearer {KEY}"}
    assert KEY not in "".join(json.dumps(body) for _, body in server.bodies)
    assert len(rejected(out)) == 4 and len(ids(out)) == 8
    assert "[key]" in next(r["response"] for r in lines(out) if r["id"] == "q3")
    with serving(lambda *_: (401, f"no such key: {KEY}".encode())) as server:
        with pytest.raises(UserError, match=r"401 Unauthorized: no such key: \[key\]"):
            synth.main(http_command(server, asked, tmp_path / "p.jsonl", "--key-env", "MY_KEY"))
    text = "".join(capfd.readouterr()) + "".join(p.read_text() for p in tmp_path.glob("*") if p != asked)
    assert KEY not in text and KEY.split("/")[1] not in text


@pytest.mark.parametrize("status, answer", [
    (200, {"choices": [{"message": {"content": "a"}, "finish_reason": "sk-Echoed"}]}),
    (200, {"choices": [{"message": {"content": None, "refusal": "sk-Echoed"}}]}), (200, {"choices": "sk-Echoed"}),
    (500, {"error": {"code": "sk-Echoed", "message": "sk-Echoed"}}), (401, {"error": "sk-Echoed"})])
def test_no_fault_shows_the_key_in_any_case_of_letters(status, answer):
    with pytest.raises((RequestFailed, QueryRejected, UserError)) as fault:
        server_module.read_answer(status, {}, json.dumps(answer).encode(), "sk-Echoed")
    assert "echoed" not in str(fault.value).lower()


@pytest.mark.parametrize("key", [None, "", "two words", "line\nfeed", "ü"])
def test_a_variable_without_a_key_is_refused_and_not_shown(asked, out, monkeypatch, key):
    monkeypatch.delenv("MY_KEY", raising=False)
    if key is not None:
        monkeypatch.setenv("MY_KEY", key)
    with serving(good) as server, pytest.raises(UserError, match="MY_KEY .*holds no key") as error:
        synth.main(http_command(server, asked, out, "--key-env", "MY_KEY"))
    assert not server.bodies and (not key or key not in str(error.value))


def test_the_key_goes_neither_to_where_the_server_redirects_nor_to_a_proxy(asked, out, monkeypatch):
    monkeypatch.setenv("MY_KEY", KEY)
    with serving(good) as other, serving(lambda *_: (307, b"", {"Location": other.url})) as server:
        with pytest.raises(UserError, match=r"307.*redirects to http://127.*give it as --url"):
            synth.main(http_command(server, asked, out, "--key-env", "MY_KEY"))
    assert not other.bodies
    with serving(good) as proxy, serving(good) as server:
        for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
            monkeypatch.setenv(name, proxy.url)
        assert not synth.main(http_command(server, asked, out, "--key-env", "MY_KEY"))
    assert not proxy.bodies and len(server.bodies) == 12


@pytest.mark.parametrize("url", ["localhost:80/v1", "ftp://x/v1", "http:///v1", "http://me:pw@host/v1",
                                 "http://host/v1?key=1", "http://[::1/v1", "http://host/v 1", "http://host/é",
                                 "http://host:port/v1", "http://a..b/v1", f"http://{'a' * 64}.b/v1"])
def test_an_invalid_address_is_refused(asked, out, url):
    with pytest.raises(UserError, match="--url: expected the base"):
        synth.main(http_command(SimpleNamespace(url=url), asked, out))


# ----------------------------------------------------------------------------------------------------------------------
# What a server may do instead

@pytest.mark.parametrize("status, body, why", [
    (400, b'{"error": {"message": "no model m\\u001b[31m here", "code": 1}}', "400 Bad Request: no model m"),
    (404, b'{"error": "not found here"}', "404 Not Found: not found here"),
    (403, b'{"detail": "blocked"}', "403 Forbidden: .*blocked"), (402, b"", "402 Payment Required"),
    (401, b'{"error": {"message": "wrong key", "code": "bad_key"}}', "401 Unauthorized, bad_key: wrong key"),
    (400, b'[{"error": {"message": "API key not valid", "code": 400}}]', "400 Bad Request: API key not valid"),
    (400, b'{"error": {"message": "x is not a valid model ID"}}', "400 Bad Request: x is"),
    (400, b'{"message": "Model Not Exist", "type": "bad"}', "400 Bad Request, bad: Model Not Exist"),
    (200, b'{"error": {"message": "who are you?", "code": 401}}', "401 Unauthorized: who are you"),
    (422, b'{"error": {"message": "The model `m` does not exist."}}', "422 .*: The model `m` does not exist"),
    (404, b'{"error": {"message": "The model `omni-moderation` does not exist"}}', "404 .*: The model `omni-"),
    (400, b"You sent no API key", "400 .*: You"), (400, b"API key expired", "400 .*: API"),
    (400, "مدل می\u200cخواهم: no model m".encode(), "400 Bad Request: مدل می\u200cخواهم: no")])
def test_what_would_refuse_every_query_ends_the_run_in_the_servers_words(asked, out, status, body, why):
    def script(number, attempt):
        return good(number, attempt) if number < 7 else (status, body)
    why = rf"query 'q7': http://127\.0\.0\.1:\d+/v1/chat/completions answered {why}"
    with serving(script) as server, pytest.raises(UserError, match=why) as error:
        synth.main(http_command(server, asked, out, "--workers", 1))
    assert str(error.value).replace("\u200c", "").isprintable()
    assert sum(server.asked.values()) == 8  # one such answer is enough
    assert ids(out) == [f"q{i}" for i in range(7)] and not rejected(out)  # what was finished is saved


@pytest.mark.parametrize("later", [(200, reply(json.dumps(GOOD))), (500, b""), (429, b"", {"Retry-After": "60"})])
def test_after_an_answer_that_ends_the_run_no_worker_waits_or_asks_anything_more(asked, out, later):
    gate = threading.Event()

    def script(number, attempt):
        return (401, b"no") if number == 0 else gate.wait(10) and later
    with serving(script) as server:
        with pytest.raises(UserError, match="401"):
            synth.main(http_command(server, asked, out, "--workers", 3, "--backoff", 60))
        gate.set()
        until(no_workers, seconds=20)
        assert set(server.asked) <= {0, 1, 2} and max(server.asked.values()) == 1


def complaint(message, **more):
    return json.dumps({"error": {"message": message} | more}).encode()


def answer(finish="stop", **message):
    return json.dumps({"choices": [{"message": message, "finish_reason": finish}]}).encode()


SPENT = "the limit on tokens was spent on thoughts .*--max-new-tokens"
ONE_QUERY = {  # an answer that refuses this query, and the reason in the rejected file
    "filtered prompt": ((400, complaint("too harsh", code="content_filter")),
                        "server: 400 Bad Request, content_filter: too harsh"),
    "too long": ((400, complaint("This model's maximum context length is 99 tokens. It does not exist beyond.")),
                 "server: 400 Bad Request: This model's maximum"),
    "flagged": ((403, complaint("Your input was flagged by moderation", code=403)), "server: 403 Forbidden: Your"),
    **{words: ((400, complaint(words)), f"server: 400 Bad Request: {words}") for words in (
        "The prompt asks how to steal an API key",
        "The prompt mentions how to steal an API key, which our policy forbids")},
    "against a policy": ((403, b"This is against our policies"), "server: 403 Forbidden: This is"),
    "too large": ((413, b"too\nlong"), "server: 413 .*: too long"), "odd": ((422, b"{}"), "server: 422 "),
    "filtered, in the body": ((200, complaint("no", code="content_filter")), "server: content_filter: no"),
    "too long, in the body": ((200, complaint("no", code=400)), "server: 400 Bad Request: no"),
    **{name: ((200, reply(json.dumps(GOOD), name)), f"server: the reply is not whole, finish_reason {name.lower()}")
       for name in ("content_filter", "SAFETY", "refusal", "sensitive")},
    "refused": ((200, answer(content=None, refusal="I will\nnot.")), "the teacher refused: I will not."),
    **{f"refused: {words}": ((200, answer(content=None, refusal=words)), f"the teacher refused: {words}")
       for words in ("The system role forbids it.", "Such a temperature is not supported.")},
    "refused, in parts": ((200, answer(content=[{"type": "refusal", "refusal": "No."}])), "the teacher refused: No."),
    "null, cut off": ((200, answer("length", content=None, reasoning_content="Hm.")), SPENT),
    "no content, cut off": ((200, answer("max_tokens", reasoning="Hm.")), SPENT),
    "empty, cut off": ((200, answer("length", content="")), SPENT),
}


@pytest.mark.parametrize("refusal, why", ONE_QUERY.values(), ids=ONE_QUERY)
@pytest.mark.parametrize("workers", [1, 8])
def test_a_query_that_the_server_refuses_is_rejected_in_its_words_and_the_rest_goes_on(
        asked, out, workers, refusal, why):
    with serving(lambda n, a: refusal if n in (0, 7) else good(n, a)) as server:
        assert not synth.main(http_command(server, asked, out, "--workers", workers))
    assert {entry["id"] for entry in rejected(out)} == {"q0", "q7"} and len(ids(out)) == 10
    assert all(re.match(why, entry["reason"]) for entry in rejected(out)), rejected(out)
    assert set(server.asked.values()) == {1}  # the same request would be refused again


def test_a_server_that_refuses_every_query_from_the_first_on_ends_the_run(asked, out, monkeypatch):
    monkeypatch.setattr(server_module, "MOST_REFUSED", 5)
    with serving(lambda *_: (400, b"max_tokens is too large")) as server:
        with pytest.raises(UserError, match="refused the first 5 queries: server: 400 Bad Request: max_tokens is"):
            synth.main(http_command(server, asked, out, "--workers", 1))
    with serving(lambda n, a: (400, b"no") if n else good(n, a)) as server:
        assert not synth.main(http_command(server, asked, out, "--workers", 1, "--retry-rejected"))
    assert ids(out) == ["q0"] and len(rejected(out)) == 11


REMEDIED = {  # the server's words, how a request must be for it to be answered, and what is told
    "max_tokens": ("Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' "
                   "instead.", lambda body: body.get("max_completion_tokens") == 9 and "max_tokens" not in body,
                   "with max_completion_tokens"),
    "temperature": ("Unsupported value: 'temperature' does not support 0.5 with this model. Only the default (1) value "
                    "is supported.", lambda body: "temperature" not in body, "without --temperature"),
    "temperature, too": ("`temperature` is deprecated", lambda body: "temperature" not in body, "without --temp"),
    **{words: (words, lambda body: [turn["role"] for turn in body["messages"]] == ["user"]
               and body["messages"][0]["content"].startswith(PROMPTS["system"].template + "\n\n"), "first message")
       for words in ("System role not supported", "Developer instruction is not enabled for gemma",
                     "Conversation roles must alternate user/assistant/user/assistant/...",
                     "'messages[0].role' does not support 'system' with this model.",
                     "Invalid request: model google/gemma-2-9b-it: System role not supported")},
    "temperature, for a model": ("For this model, 'temperature' is not supported",
                                 lambda body: "temperature" not in body, "without --temperature"),
    "max_tokens, for a model": ("Model o3 : max_tokens is not supported, use max_completion_tokens instead",
                                lambda body: "max_completion_tokens" in body, "with max_completion_tokens"),
}


@pytest.mark.parametrize("status", [400, 404, 500])
@pytest.mark.parametrize("words, accepted, told", REMEDIED.values(), ids=REMEDIED)
def test_a_server_is_asked_once_more_in_the_way_that_it_names_and_so_are_all_further_requests(
        asked, out, capsys, status, words, accepted, told):
    with serving(lambda n, a: good(n, a) if accepted(server.bodies[-1][1]) else (status, complaint(words))) as server:
        assert not synth.main(http_command(server, asked, out, "--workers", 1, "--retries", 0, "--max-new-tokens", 9,
                                           "--temperature", 0.5))
    assert len(ids(out)) == 12 and server.asked == {i: 1 + (i == 0) for i in range(12)}
    assert capsys.readouterr().err.count(told) == 1


@pytest.mark.parametrize("last", ["max_tokens", "temperature", "System role not supported"])
def test_several_remedies_add_up_and_a_refusal_that_they_do_not_change_is_a_refusal(asked, out, last):
    refusals = {name: (words, accepted) for name, (words, accepted, _) in REMEDIED.items()}

    def script(number, attempt):
        body = server.bodies[-1][1]
        return next(((400, complaint(words)) for words, accepted in refusals.values() if not accepted(body)),
                    good(number, attempt) if number else (400, complaint(REMEDIED[last][0])))
    with serving(script) as server:
        assert not synth.main(http_command(server, asked, out, "--workers", 1, "--retries", 0, "--max-new-tokens", 9,
                                           "--temperature", 0.5))
    assert len(ids(out)) == 11 and len(rejected(out)) == 1 and sum(server.asked.values()) == 12 + 3


def test_a_content_in_parts_is_their_texts_without_the_thoughts(asked, out):
    parts = ["{", {"type": "thinking", "thinking": [{"type": "text", "text": "Hm."}]},
             {"type": "text", "text": json.dumps(GOOD)[1:9]}, {"type": "reasoning", "text": "Hm."},
             {"type": "output_text", "text": json.dumps(GOOD)[9:]}]
    with serving(lambda *_: (200, answer(content=parts))) as server:
        assert not synth.main(http_command(server, asked, out, "--retries", 0))
    assert len(ids(out)) == 12 and lines(out)[0]["cot"]["situation"] == "They wait."


ODD = (None, True, 7, "", "x", "\ud83d", [], {}, [None], [[]], ["x"], {"text": 3}, [{"text": []}], {"message": {}},
       "9" * 999)


def test_whatever_a_server_sends_is_a_reply_or_one_of_three_faults():
    """Odd values at every place of an answer, with every kind of status."""
    def mutants(value):
        yield from ODD
        for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
            for odd in mutants(value[key]):
                copy = value.copy()
                copy[key] = odd
                yield copy
    choice = {"message": {"content": [{"type": "text", "text": "a"}], "refusal": None}, "finish_reason": "stop"}
    error, seen = {"message": "a", "code": 400, "type": "c"}, Counter()
    for whole in ({"choices": [choice], "usage": {"prompt_tokens": 1, "completion_tokens": 2}},
                  {"choices": [choice | {"error": error}]}, {"error": error}):
        for found in mutants(whole):
            for status in (200, 204, 302, 400, 404, 429, 500, 999):
                try:
                    reply = server_module.read_answer(status, {}, json.dumps(found).encode())
                    seen[type(reply)] += 1
                    assert isinstance(reply.text, str)
                    assert type(reply.tokens_read) is type(reply.tokens_written) is int
                except (RequestFailed, QueryRejected, UserError) as fault:
                    seen[type(fault)] += 1
                    assert str(fault).isprintable() and len(str(fault)) < 400
    assert set(seen) == {Reply, RequestFailed, QueryRejected, UserError} and min(seen.values()) > 5


@pytest.mark.parametrize("finish", [None, "", "stop", "STOP", "eos", "end_turn", "stop_sequence", "eos_token"])
@pytest.mark.parametrize("status", [200, 201, 203])
def test_every_name_of_the_end_of_a_turn_ends_a_whole_reply(asked, out, finish, status):
    with serving(lambda *_: (status, reply(json.dumps(GOOD), finish))) as server:
        assert not synth.main(http_command(server, asked, out, "--retries", 0))
    assert len(ids(out)) == 12


def test_the_summary_names_each_kind_of_refusal(asked, out, capsys):
    kinds = [(429, complaint("You have no more", code="insufficient_quota")), (503, complaint("Loading", code=503)),
             (502, b"<p>"), (400, complaint("bad", code="content_filter"))]
    with serving(lambda n, a: kinds[n % 4]) as server:
        assert not synth.main(http_command(server, asked, out, "--retries", 0))
    said = capsys.readouterr().out
    for kind in ("429 Too Many Requests, insufficient_quota", "503 Service Unavailable", "502 Bad Gateway",
                 "400 Bad Request, content_filter"):
        assert re.search(rf" 3  server: {kind}\n", said), said


def test_a_server_that_is_not_there_is_an_error_and_no_query_is_rejected(asked, out):
    with serving(good) as server:
        pass
    with pytest.raises(UserError, match="[Rr]efused.*is the server running"):
        synth.main(http_command(server, asked, out, "--retries", 1))
    assert not ids(out) and not rejected(out)


FAILURES = {  # an answer, and the reason in the rejected file
    "hangs up": (None, "connection: "), "hangs": ("hang", r"no reply in time \(--timeout\)"),
    "429": ((429, b"slow"), "server: 429 Too Many Requests: slow"), "500": ((500, b""), "server: 500"),
    "529": ((529, complaint("busy", type="overloaded_error")), "^server: 529, overloaded_error: busy"),
    "prose that names a remedy": ((200, b"Our system has the role of a guard"), "not a chat completion"),
    "503": ((503, b'{"error": {"message": "loading"}}'), "server: 503 Service Unavailable: loading"),
    "half a body": ((200, reply("x" * 99)[:50], {"Content-Length": 150}), "not a chat completion|connection"),
    "no completion": ((200, b'{"choices": []}'), "not a chat completion"), "a page": ((200, b"<p>"), "not a chat"),
    "a list": ((200, b"[]"), "not a chat completion"), "deep": ((200, b"[" * 100_000), "not a chat completion"),
    "no content": ((200, reply(None)), "no JSON object"),
    "torn JSON": ((200, reply('{"situation": "a')), "not complete"),
    "cut off": ((200, reply('{"situation": "a', "length")), "cut off; be briefer"),
    "cut off, too": ((200, reply('{"situation": "a', "max_tokens")), "cut off; be briefer"),
    **{finish: ((200, reply(json.dumps(GOOD), finish)), f"server: the reply is not whole, finish_reason {finish}")
       for finish in ("error", "abort", "tool_calls")},
    **{str(status): ((status, b"later"), f"server: {status} .*: later") for status in (408, 409, 425)},
    "an error": ((200, b'{"error": {"message": "loading"}}'), "^server: loading"),
    "an error with its code": ((200, complaint("slow", code=502)), "^server: 502 Bad Gateway: slow"),
    "an error as text": ((200, b'{"error": "no\\nslot"}'), "^server: no slot"),
    "an error alone": ((200, b'{"object": "error", "message": "busy", "code": 50001}'), "^server: busy"),
    "an error beside a choice": ((200, json.dumps({"choices": [{"error": {"message": "torn", "code": 504}, "message": {
        "content": json.dumps(GOOD)}}]}).encode()), "^server: 504 Gateway Timeout: torn"),
    "an unclosed thought": ((200, reply("<think>" + json.dumps(GOOD))), "cut off before the reply began"),
    "empty": ((200, reply("")), "no JSON object"), "another language": ((200, reply("Подождите.")), "no JSON object"),
    "all zero": ((200, reply(json.dumps(GOOD | {"traits": {}}))), "all-zero vector"),
    "not HTTP": ((99999, b""), "connection: |not a chat|server"), "8 MB": ((200, b" " * 8_200_000), "longer than 8 MB"),
}


@pytest.mark.parametrize("failure, why", FAILURES.values(), ids=FAILURES)
def test_a_failure_is_tried_again_and_a_query_that_only_fails_is_rejected_with_the_reason(tmp_path, out, failure, why):
    """All kinds count alike. Query 1 is answered at its last attempt, query 2 never."""
    asked = write(tmp_path / "q.txt", "What now, number 1?", "And number 2?")

    def script(number, attempt):
        return good(number, attempt) if (number, attempt) == (1, 3) else failure if attempt != 2 else (500, b"")
    with serving(script) as server:
        assert not synth.main(http_command(server, asked, out, "--retries", 2, "--timeout",
                                           0.3 if failure == "hang" else 5))
    (record,), (entry,) = lines(out), rejected(out)
    assert "number 1" in record["query"] and record["teacher"]["calls"] == 3 and server.asked == {1: 3, 2: 3}
    assert "number 2" in entry["query"] and re.search(why, entry["reason"]), entry["reason"]


def test_the_timeout_holds_for_a_server_that_sends_a_byte_now_and_then(tmp_path, out):
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
        assert not synth.main(http_command(server, asked, out, "--retries", 0, "--timeout", 0.3))
        assert time.monotonic() - began < 5
    assert "no reply in time" in rejected(out)[0]["reason"]


def test_the_time_that_connecting_took_is_not_waited_again(tmp_path, out, monkeypatch):
    """Connecting takes 59 seconds of a clock that only the teacher sees. The rest of --timeout 60 is one second."""
    now = [1000.0]

    class Connection(http.client.HTTPConnection):
        def connect(self):
            super().connect()
            now[0] += 59
    monkeypatch.setattr(http.client, "HTTPConnection", Connection)
    monkeypatch.setattr(server_module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    asked = write(tmp_path / "q.txt", "What now?")
    with serving(lambda *_: "hang") as server:
        began = time.monotonic()
        assert not synth.main(http_command(server, asked, out, "--retries", 0, "--timeout", 60))
        assert time.monotonic() - began < 20
    assert "no reply in time" in rejected(out)[0]["reason"]


def test_an_answer_may_close_the_socket_with_its_last_part(asked, out, monkeypatch):
    """As Python does from 3.13 on."""
    class Response(http.client.HTTPResponse):
        def read1(self, n=-1):
            part = super().read1(n)
            if self.length == 0 and not self.isclosed():
                self._close_conn()
            return part
    monkeypatch.setattr(http.client.HTTPConnection, "response_class", Response)
    with serving(good) as server:
        assert not synth.main(http_command(server, asked, out, "--retries", 0))
    assert len(ids(out)) == 12 and not rejected(out)


def test_waits_double_and_retry_after_comes_first(tmp_path, out, monkeypatch, capsys):
    """Nothing waits in this test: waiting only moves a clock, and only the workers of this run use that clock."""
    now, slept = [1000.0], []

    class Stop(threading.Event):
        def wait(self, seconds):
            if seconds > 0:
                slept.append(seconds)
                now[0] += seconds
            return self.is_set()

    class Teacher(server_module.HttpTeacher):
        def __init__(self, args):
            super().__init__(args)
            self.stop = Stop()
    monkeypatch.setattr(synth, "HttpTeacher", Teacher)
    monkeypatch.setattr(server_module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(server_module, "random", SimpleNamespace(uniform=lambda low, high: high))
    plan = iter([(500, b""), (502, b""), (429, b"", {"Retry-After": "7"}), (503, b""), (429, b"", {"Retry-After": "0"}),
                 (500, b""), *[(500, b"")] * 8, (429, b"", {"Retry-After": "120"})])
    asked = write(tmp_path / "q.txt", "What now?")
    with serving(lambda *_: next(plan, good(0, 0))) as server:
        assert not synth.main([*http_command(server, asked, out, "--retries", 20, "--workers", 1, "--timeout", 1e6),
                               "--backoff", "1.5"])
    assert slept == [1.5, 3, 7, 12, 24, 48, 60, 60, 60, 60, 60, 60, 60, 60, 120] and ids(out)
    said = capsys.readouterr().err
    assert re.findall(r"http://127.*/v1/chat/completions asks to wait (\d+) s: server: 429", said) == ["120"]


@pytest.mark.parametrize("text, seconds", [
    ("3", 3), (" 1.5 ", 1.5), ("99999", 3600), ("9" * 400, 3600), ("-1", None), ("soon", None), ("nan", None),
    ("", None), (None, None), ("0", None), ("0.0", None), ("0.001", 0.05), ("Wed, 21 Oct 2015 07:28:00 GMT", None)])
def test_retry_after_is_a_number_of_seconds_or_a_date_up_to_an_hour(text, seconds):
    assert server_module.retry_after(text) == seconds
    assert 50 < server_module.retry_after(email.utils.formatdate(time.time() + 60, usegmt=True)) <= 61


def test_an_honest_limit_rejects_nothing_and_is_seldom_exceeded(tmp_path, out):
    """Three requests in a twentieth of a second, and the server says when to come back. Eight workers, no retries."""
    taken = []

    def script(number, attempt):
        with lock:
            now = time.monotonic()
            taken[:] = [began for began in taken if began > now - 0.05]
            if len(taken) == 3:
                return 429, b"", {"Retry-After": "0.05"}
            taken.append(now)
        return good(number, attempt)
    lock, asked = threading.Lock(), write(tmp_path / "q.txt", *(f"What now, number {i}?" for i in range(60)))
    with serving(script) as server:
        assert not synth.main(http_command(server, asked, out, "--retries", 0))
    assert len(ids(out)) == 60 and not rejected(out) and sum(server.asked.values()) - 60 < 60


def test_after_a_429_requests_start_further_apart_and_with_each_answer_closer_again(monkeypatch):
    """Requests that were under way together count once. The gap is at most the wait asked for, or a second."""
    now = [100.0]
    monkeypatch.setattr(server_module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    teacher = server_module.HttpTeacher(synth.Args("http", url="http://x", model="m"))
    teacher.stop = SimpleNamespace(is_set=lambda: False, wait=lambda seconds: now.__setitem__(0, now[0] + seconds))

    def gaps(failure, began, times=1):
        for _ in range(times):
            teacher.set_pace(failure, began)
        return teacher.gap
    busy, slow = RequestFailed("server: 429", busy=True), RequestFailed("server: 503", wait=0.03)
    assert gaps(RequestFailed("server: 500"), 99, 5) == 0 and gaps(busy, 99, 8) == 0.01
    now[0] = 101
    assert gaps(slow, 100.5, 8) == 0.02
    now[0] = 102
    assert gaps(slow, 101.5) == 0.03 and gaps(busy, 103, 9) == 1.0 and gaps(slow, 104) == 1.0
    began = [teacher.wait_for_turn() and now[0] for _ in range(3)]
    assert began == pytest.approx([102.03, 103.03, 104.03])
    assert 0.5 < gaps(None, 105, 10) < 1 and gaps(None, 106, 1000) < 1e-9


# ----------------------------------------------------------------------------------------------------------------------
# Nothing lost, nothing twice

def test_a_second_start_does_what_is_left_and_rejected_queries_wait_for_retry_rejected(asked, out, tmp_path, capsys):
    with serving(lambda n, a: good(n, a) if n % 3 else (500, b"")) as server:
        few = write(tmp_path / "few.jsonl", *lines(asked)[:6])
        assert not synth.main(http_command(server, few, out, "--retries", 0))
        assert sorted(ids(out)) == ["q1", "q2", "q4", "q5"] and {e["id"] for e in rejected(out)} == {"q0", "q3"}
        assert not synth.main(http_command(server, asked, out, "--retries", 0))
        assert server.asked == {i: 1 for i in range(12)} and len(rejected(out)) == 4
    assert "4 rejected, which --retry-rejected tries again" in capsys.readouterr().out
    with serving(lambda n, a: good(n, a) if n != 9 else (503, b"later")) as server:
        assert not synth.main(http_command(server, asked, out, "--retries", 0)) and not server.asked
        assert not synth.main(http_command(server, asked, out, "--retries", 0, "--retry-rejected"))
        assert server.asked == {0: 1, 3: 1, 6: 1, 9: 1}
    assert sorted(ids(out)) == sorted(set(ids(asked)) - {"q9"})
    assert [(e["id"], e["reason"]) for e in rejected(out)] == [("q9", "server: 503 Service Unavailable: later")]


RECORD = {"id": "q4", "query": "a", "response": "b", "traits": {"openness": 1}}
ENTRY = {"id": "q4", "query": "a", "reason": "b"}


@pytest.mark.parametrize("file, whole", [("o.jsonl", RECORD), ("o.rejected.jsonl", ENTRY)])
@pytest.mark.parametrize("left", [b'{"id": "q5", "query": "Wh', b'{"id": "q5"', b"{", b"\0\0\0",
                                  '{"id": "ü'.encode()[:-1]])
def test_a_last_line_that_was_cut_off_is_removed_and_its_query_done_again(asked, tmp_path, file, whole, left, capsys):
    (tmp_path / file).write_bytes(json.dumps(whole).encode() + b"\n" + left)
    with serving(good) as server:
        assert not synth.main(http_command(server, asked, tmp_path / "o.jsonl"))
    assert "q4" in ids(tmp_path / file) and server.asked[5] == 1 and server.asked[4] == 0
    assert sorted(ids(tmp_path / "o.jsonl") + ids(tmp_path / "o.rejected.jsonl")) == sorted(ids(asked))
    assert f"{file}: the last line was cut off" in capsys.readouterr().out


def test_a_whole_last_line_without_its_end_is_kept(asked, out):
    out.write_text(json.dumps(RECORD))
    with serving(good) as server:
        assert not synth.main(http_command(server, asked, out))
    assert lines(out)[0] == RECORD and not server.asked[4] and len(ids(out)) == 12


@pytest.mark.parametrize("name, text, why", [
    ("o.jsonl", '{"id": 1, "qu\n{"id": 2}\n', "o.jsonl, line 1: not JSON"), ("o.jsonl", "my notes", "no JSON object"),
    ("o.jsonl", '{"id": 1, "query": "a"}\n', "line 1: no 'response'"),
    ("o.rejected.jsonl", "[]\n", "no entry of a rejected file")])
def test_files_that_hold_something_else_are_left_alone(asked, tmp_path, name, text, why):
    (tmp_path / name).write_text(text)
    with serving(good) as server, pytest.raises(UserError, match=why):
        synth.main(http_command(server, asked, tmp_path / "o.jsonl"))
    assert (tmp_path / name).read_text() == text and not server.bodies


def test_a_query_in_both_files_counts_as_done_once(asked, out):
    """A kill during --retry-rejected leaves such files. The record counts, and the later of two rejections."""
    write(out, RECORD)
    write(out.with_suffix(".rejected.jsonl"), ENTRY, ENTRY | {"id": "q5", "reason": "x"}, ENTRY | {"id": "q5"})
    with serving(good) as server:
        assert not synth.main(http_command(server, asked, out))
    assert len(server.asked) == 10 and rejected(out) == [ENTRY | {"id": "q5"}]


def start(server, queries, out, *more):
    return subprocess.Popen([sys.executable, ROOT / "synth.py", *http_command(server, queries, out, *more)],
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def until(true, process=None, seconds=60):
    """Wait until true(); fail after so many seconds, or if the process ends before."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline and (process is None or process.poll() is None), "it did not come to that"
        threading.Event().wait(0.02)


def no_workers():
    return not any("(work)" in thread.name for thread in threading.enumerate())


def test_two_processes_on_one_file_refuse_each_other_and_ctrl_c_keeps_what_is_finished(asked, tmp_path):
    """Ctrl-C ends the process within two seconds, while a request hangs that would take 60. The best of three counts,
    because a busy machine takes longer to end any process."""
    took = []
    while len(took) < 3 and min(took, default=2) >= 2:
        out = tmp_path / f"o{len(took)}.jsonl"
        with serving(lambda n, a: good(n, a) if n < 8 else "hang") as server:
            process = start(server, asked, out, "--timeout", 60)
            until(lambda: len(lines(out)) == 8, process)
            before = out.read_bytes()
            with pytest.raises(UserError, match="another process is writing to it"):
                synth.main(http_command(server, asked, out))
            began = time.monotonic()
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=30)
            took.append(time.monotonic() - began)
        assert process.returncode == 130 and "are saved" in said and "Trace" not in said
        assert out.read_bytes() == before and sorted(ids(out)) == [f"q{i}" for i in range(8)]
    assert min(took) < 2, took
    with serving(good) as server:  # the lock went with the process
        assert not synth.main(http_command(server, asked, out))
    assert sorted(ids(out)) == sorted(ids(asked)) and len(server.asked) == 4


def test_at_ctrl_c_everything_that_workers_have_finished_is_written(asked, out, monkeypatch):
    add, made = output.RecordWriter.add, []

    class Teacher(server_module.HttpTeacher):
        def __init__(self, args):
            super().__init__(args)
            made.append(self)

    def interrupted(writer, outcomes):
        add(writer, outcomes)
        if len(ids(out)) == 1:
            until(lambda: made[0].finished.qsize() == 11)  # the other outcomes
            raise KeyboardInterrupt
    monkeypatch.setattr(synth, "HttpTeacher", Teacher)
    monkeypatch.setattr(output.RecordWriter, "add", interrupted)
    with serving(good) as server:
        assert synth.main(http_command(server, asked, out, "--workers", 12)) == 130
    assert sorted(ids(out)) == sorted(ids(asked))


def test_no_more_is_asked_than_two_for_each_worker_ahead_of_what_is_written(asked, out, monkeypatch):
    """For example while a disk is slow: a kill loses no more than that."""
    add, written = output.RecordWriter.add, []

    def slow(writer, outcomes):
        until(lambda: sum(server.asked.values()) >= len(written) + 6)
        assert sum(server.asked.values()) == len(written) + 6
        if len(written) == 4:
            raise KeyboardInterrupt
        add(writer, outcomes)
        written.extend(outcomes)
    with serving(good) as server, monkeypatch.context() as patched:
        patched.setattr(output.RecordWriter, "add", slow)
        assert synth.main(http_command(server, asked, out, "--workers", 3)) == 130
        until(no_workers, seconds=20)
        assert sum(server.asked.values()) == 4 + 6


KINDS = [None, "hang", (429, b"", {"Retry-After": "0"}), (500, b"oops"), (200, reply('{"situation": "They')),
         (200, reply("")), (200, reply(json.dumps(GOOD | {"response": "Подождите."}))),
         (200, reply(json.dumps(GOOD | {"traits": {}})))]


@pytest.mark.parametrize("count", [500, pytest.param(2000, marks=pytest.mark.slow)])
def test_with_30_percent_failures_and_three_kills_every_query_ends_in_one_place_once(tmp_path, count):
    def script(number, attempt):  # query and attempt decide which replies are faulty
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
