"""A teacher behind a server that speaks OpenAI's chat completions.

It is not in synth.py because sockets, retries and keys teach nothing about Persona-CoT. Several threads each take a
query through its steps, one request at a time. The main thread saves the finished records. Whatever a server answers is
read in one place, `read_answer`.
"""
import email.utils
import http.client
import itertools
import json
import os
import queue
import random
import re
import ssl
import sys
import threading
import time
import urllib.parse

from tqdm import tqdm

from support.files import UserError
from support.replies import QueryRejected, Reply, RequestFailed
from support.tables import printable


LONGEST_ANSWER = 8_000_000  # bytes of an HTTP answer that are read
MOST_REFUSED = 100  # refused queries that end the run, if the server has written no reply yet


class HttpTeacher:
    """Any server that speaks OpenAI's chat completions, with `workers` requests in flight.

    The key goes to the host of --url and nowhere else: redirects are not followed and proxies are not used. It is
    removed from everything that the server sends, before any of it is printed or written to a file.
    """

    def __init__(self, args):
        try:
            url = urllib.parse.urlsplit(args.url)
            self.host, self.port = url.hostname, url.port
            (self.host or "").encode("idna")  # as a connection does: an empty or overlong label is a ValueError
        except ValueError:
            self.host = None
        if not self.host or url.scheme not in ("http", "https") or "@" in url.netloc or url.query or url.fragment \
                or not re.fullmatch(r"[!-~]+", args.url):  # visible ASCII
            raise UserError("--url: expected the base of the server's addresses, such as http://localhost:8080/v1, "
                            "without user name, key or query")
        self.path = url.path.rstrip("/") + "/chat/completions"
        self.address = f"{url.scheme}://{url.netloc}{self.path}"
        # HTTPSConnection verifies the server's certificate
        self.new_connection = http.client.HTTPConnection if url.scheme == "http" else http.client.HTTPSConnection
        self.key = os.environ.get(args.key_env, "").strip() if args.key_env else ""
        if args.key_env and not re.fullmatch(r"[!-~]+", self.key):
            raise UserError(f"the environment variable {args.key_env} (--key-env) holds no key")
        self.body = {"model": args.model, "max_tokens": args.max_new_tokens}
        if args.temperature is not None:
            self.body["temperature"] = args.temperature
        self.name, self.args = f"http:{args.model}", args
        self.connected = False     # whether the server has ever been reached
        self.answered = False      # whether it has ever written a reply
        self.refused = 0           # how many queries it has refused
        self.remedies = []         # changes to every request, because the server refuses it otherwise
        self.not_before = 0.0      # when the next request may start, in the seconds of time.monotonic
        self.gap = 0.0             # seconds between the starts of two requests
        self.slowed = 0.0          # when the gap last grew
        self.pace = threading.Lock()  # for the three above
        self.stop = threading.Event()
        self.finished = queue.SimpleQueue()  # outcomes and errors; after self.stop also None

    def run(self, queries, save):
        """Take every query (an iterator of Synthesis) to its outcome, and save([outcome]) each one in this thread.

        After an error or Ctrl-C, workers stop waiting and ask nothing more, and finished outcomes are saved.
        """
        todo, unsaved = queue.SimpleQueue(), 0

        def work():
            try:
                while (query := todo.get()) is not None:
                    self.converse(query)
                    self.finished.put(query.outcome)
            except BaseException as error:
                self.finished.put(error)

        for _ in range(self.args.workers):  # daemons end with the program, whatever they are waiting for
            threading.Thread(target=work, daemon=True).start()
        try:
            while True:
                # `unsaved` queries wait, are in progress, or are finished but not saved. A kill loses at most these
                for query in itertools.islice(queries, 2 * self.args.workers - unsaved):
                    todo.put(query)
                    unsaved += 1
                if not unsaved:
                    return
                outcome = self.finished.get()
                if isinstance(outcome, BaseException):
                    raise outcome
                save([outcome])
                unsaved -= 1
        finally:
            self.stop.set()
            for _ in range(self.args.workers):
                todo.put(None)
            left = [self.finished.get() for _ in range(self.finished.qsize())]
            save([outcome for outcome in left if isinstance(outcome, dict)])

    def converse(self, query):
        """Make all requests of one query, with a wait after each that failed. If self.stop is set first, it has no outcome."""
        failures = 0  # in a row
        while not query.outcome and self.wait_for_turn():
            began = time.monotonic()
            try:
                reply = self.request(query.question.messages)
                self.answered = True
            except RequestFailed as failure:
                reply = failure
            except QueryRejected as refusal:
                reply = refusal
                self.refused += 1
                if self.refused >= MOST_REFUSED and not self.answered:
                    raise UserError(f"{self.address} refused the first {self.refused} queries: {refusal}") from None
            except UserError as error:
                raise UserError(f"query {query.item['id']!r}: {error}") from None
            failures = failures + 1 if isinstance(reply, RequestFailed) else 0
            query.tell(reply)
            if failures and query.outcome and not self.connected:
                raise UserError(f"{self.args.url}: {reply}; is the server running, and is this its address?")
            self.set_pace(reply if failures else None, began)
            if failures and not query.outcome and reply.wait is None:
                self.stop.wait(min(60.0, self.args.backoff * 2 ** (failures - 1)) * random.uniform(0.5, 1))

    def wait_for_turn(self):
        """Wait until the next request may start. Returns False after self.stop."""
        while not self.stop.is_set():
            with self.pace:
                now = time.monotonic()
                wait = self.not_before - now
                if wait <= 0:
                    self.not_before = now + self.gap
                    return True
            self.stop.wait(wait)
        return False

    def set_pace(self, failure, began):
        """After a request that began at `began`: let all workers wait as long as the server asks for, and start fewer
        requests in the same time if it is busy. failure: a RequestFailed, or None.

        The gap between two starts doubles, at most to the wait asked for or a second, and shrinks by 5 % with each
        answer (ours). Requests that began before it last doubled do not count again.
        """
        with self.pace:
            if failure is None:
                self.gap *= 0.95
                return
            now, wait = time.monotonic(), failure.wait or 0.0
            if now + wait - max(now, self.not_before) > 60:
                tqdm.write(f"{self.address} asks to wait {wait:.0f} s: {failure}", file=sys.stderr)  # above the bar
            self.not_before = max(self.not_before, now + wait)
            if (failure.busy or wait) and began >= self.slowed:
                self.gap = max(self.gap, min(max(2 * self.gap, 0.01), wait or 1.0))
                self.slowed = now

    def request(self, messages):
        """Returns the Reply to one chat completion.

        RequestFailed if the request may succeed later; QueryRejected if it never will; UserError if none ever will.
        """
        body = self.body | {"messages": messages}
        for change in self.remedies:
            body = change(body)
        try:
            return read_answer(*self.post(json.dumps(body)), self.key)
        except (UserError, RequestFailed, QueryRejected) as fault:
            for refusal, told, change in REMEDIES:
                if re.search(refusal, getattr(fault, "said", ""), re.I) and change(body) != body:
                    if change not in self.remedies:
                        self.remedies.append(change)
                        tqdm.write(f"{fault}; from now on requests go {told}", file=sys.stderr)
                    return self.request(messages)
            if isinstance(fault, UserError):
                raise UserError(f"{self.address} answered {fault}") from None
            raise
        except ssl.SSLCertVerificationError as error:
            raise UserError(f"{self.host}: its certificate is not valid ({error.verify_message})") from None
        except TimeoutError:
            raise RequestFailed("no reply in time (--timeout)") from None
        except (OSError, http.client.HTTPException) as error:
            raise RequestFailed(f"connection: {one_line(str(error) or type(error).__name__, self.key)}") from None

    def post(self, content):
        """Send one request. Returns (status, headers, body) of the answer.

        Connecting may take up to --timeout. Whatever remains of it then limits the wait for each piece of the headers
        and the time for the whole body, so that only a server that is slow to connect or sends its headers in many
        pieces takes longer.
        """
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        deadline = time.monotonic() + self.args.timeout
        connection = self.new_connection(self.host, self.port, timeout=self.args.timeout)
        try:
            connection.connect()
            self.connected = True
            sock = connection.sock
            sock.settimeout(seconds_until(deadline))
            connection.request("POST", self.path, content, headers)
            answer = connection.getresponse()
            body = bytearray()
            while True:
                if not answer.isclosed():  # from Python 3.13 on, read1 closes the socket after the last part
                    sock.settimeout(seconds_until(deadline))
                part = answer.read1(65536)
                if not part:
                    return answer.status, answer.headers, bytes(body)
                body += part
                if len(body) > LONGEST_ANSWER:
                    raise RequestFailed("the reply is longer than 8 MB")
        finally:
            connection.close()


# ----------------------------------------------------------------------------------------------------------------------
# What is changed where a server refuses a request

def rename_limit(body):
    return {"max_completion_tokens" if name == "max_tokens" else name: value for name, value in body.items()}


def drop_temperature(body):
    return {name: value for name, value in body.items() if name != "temperature"}


def merge_system(body):
    first, *rest = body["messages"]
    if first["role"] != "system":
        return body
    merged = rest[0] | {"content": f"{first['content']}\n\n{rest[0]['content']}"}
    return body | {"messages": [merged, *rest[1:]]}


REMEDIES = (  # (a refusal in the server's words, what is sent instead, the function that changes the request)
    (r"use \W{0,3}max_completion_tokens|max_completion_tokens\W{0,3} instead",
     "with max_completion_tokens instead of max_tokens", rename_limit),
    (r"temperature.*(support|permitted|recogni|unknown|deprecated)|(support|permitted|recogni|unknown).*temperature",
     "without --temperature", drop_temperature),
    (r"system.{0,20}role|role.{0,40}\bsystem|roles must alternate"
     r"|(system|developer) (message|prompt|instruction).{0,40}(not|n't|unsupported)",
     "with the system's text in the first message", merge_system))


# ----------------------------------------------------------------------------------------------------------------------
# What a server answers

PASSING = 408, 409, 425, 429  # as are all from 500 on: the same request may be accepted later
REFUSES_ALL = 401, 402, 403, 404, 405, 407, 410
ABOUT_ALL = re.compile(r"model\b[^.]{0,80}(not[ _](found|exist|supported)|n.t exist|unknown)|model_not_"
                       r"|(no|unknown|invalid|not a valid)[ _]model|credit balance"
                       r"|\b(invalid|incorrect|missing|no|wrong)\b.{0,20}\bapi[ _-]?key"
                       r"|\bapi[ _-]?key[ :]*(\w+ ){0,3}(not|invalid|missing|expired)\b", re.I)
ABOUT_THIS = re.compile(r"moderat|flagged|safety|polic(y|ies)|content[ _]*(filter|manag)"
                        r"|context[ _](length|size|window)", re.I)
WHOLE = ("", "stop", "stop_sequence", "eos", "eos_token", "eot", "end", "end_turn", "complete", "completed", "finished",
         "done")  # names of the end of a turn in finish_reason
CUT_OFF = "length", "max_tokens", "max_output_tokens", "model_length", "token_limit"
FILTERED = re.compile(r"filter|safety|refus|sensitive|prohibited|recitation|blocklist|moderat")


def read_answer(status, headers, body, key=""):
    """Returns the Reply in a server's answer. `key` is removed from all texts.

    A fault has one of three consequences: RequestFailed, ask again; QueryRejected, the server refuses this query;
    UserError, it would refuse every query.
    """
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        found = None
    found = found[0] if isinstance(found, list) and found else found  # Gemini puts an error into a list
    found = found if isinstance(found, dict) else {}
    choices = found.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}
    text, message = body[:2000].decode("utf-8", "replace"), choice.get("message")
    error = found.get("error") or choice.get("error") or (found if "message" in found and not choice else None)
    if error or not 200 <= status < 300:
        raise read_error(status, headers, error or found or text, key)
    no_completion = RequestFailed(f"not a chat completion: {one_line(text, key)!r}")
    if not isinstance(message, dict):
        raise no_completion
    content, refusal = message.get("content"), message.get("refusal")
    if isinstance(content, (list, dict)):  # parts, some of which are thoughts
        parts = [part if isinstance(part, dict) else {"text": part}
                 for part in (content if isinstance(content, list) else [content])]
        content = "".join(part["text"] for part in parts if isinstance(part.get("text"), str)
                          and part.get("type", "text") in ("text", "output_text"))
        refusal = refusal or " ".join(str(part["refusal"]) for part in parts if part.get("refusal"))
    content = content or ""
    finish = without_key(str(choice.get("finish_reason") or ""), key).lower()
    if not isinstance(content, str):
        raise no_completion
    if refusal and not content:
        raise QueryRejected(f"the teacher refused: {one_line(str(refusal), key)}")
    if finish in CUT_OFF and not content.strip():
        raise QueryRejected("the limit on tokens was spent on thoughts before the reply began; raise --max-new-tokens")
    if finish not in WHOLE + CUT_OFF:
        fault = QueryRejected if FILTERED.search(finish) else RequestFailed
        raise fault(f"server: the reply is not whole, finish_reason {one_line(finish, key)[:40]}")
    usage = found.get("usage") if isinstance(found.get("usage"), dict) else {}
    counts = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
    return Reply(without_key(content, key), finish in CUT_OFF, *(n if type(n) is int else 0 for n in counts))


def read_error(status, headers, error, key):
    """Returns the exception for an answer that holds no reply: "server: 429 Too Many Requests, quota: You have …".

    Its attribute `said` is the server's complaint. Other faults have none, because they may quote the model.
    """
    entry = error if isinstance(error, dict) else {"message": error}
    if status < 300 and re.fullmatch("[45][0-9][0-9]", str(entry.get("code"))):  # the status stands in the body
        status = int(entry["code"])
    name = next((name for name in (entry.get("code"), entry.get("type"))
                 if isinstance(name, str) and re.fullmatch(r"[a-zA-Z][\w.-]*", name)), None)
    words = entry.get("message") or entry.get("detail") or error
    if 300 <= status < 400:
        words = f"it redirects to {headers.get('Location')}; if you trust that address, give it as --url"
    about = f"{status} {http.client.responses.get(status, '')}".strip() if status >= 300 else None
    said = one_line(": ".join(filter(None, [", ".join(filter(None, [about, name])), str(words)])), key)
    every = ABOUT_ALL.search(said)
    this = ABOUT_THIS.search(said) and not (status == 404 and every)  # a model may be named after moderation
    if status in PASSING or status >= 500:
        fault = RequestFailed(f"server: {said}", retry_after(headers.get("Retry-After")), status == 429)
    elif 300 <= status < 400 or not this and (status in REFUSES_ALL or every):
        fault = UserError(said)
    else:
        fault = (RequestFailed if status < 300 and not this else QueryRejected)(f"server: {said}")
    fault.said = said
    return fault


def without_key(text, key):
    return text.replace(key, "[key]") if key else text


def one_line(text, key):
    """Returns text from the server as one line that is safe to print in a terminal."""
    return printable(" ".join(without_key(text, key).split()))[:300]


def seconds_until(deadline):
    """Returns how long a socket may still wait. TimeoutError if the deadline, by time.monotonic, has passed."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def retry_after(text):
    """Returns the seconds that a Retry-After header asks to wait, from 0.05 to 3600. It holds a number or a date.

    None if it asks for no wait, or is not understood.
    """
    try:
        number = re.fullmatch(r"\s*\d+(\.\d*)?\s*", text or "")
        wait = float(text) if number else email.utils.parsedate_to_datetime(text).timestamp() - time.time()
        return min(3600.0, max(0.05, wait)) if wait > 0 else None
    except (TypeError, ValueError, OverflowError):
        return None
