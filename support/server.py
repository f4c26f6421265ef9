"""A teacher behind a server that speaks OpenAI's chat completions.

It is not in synth.py because sockets, retries and keys teach nothing about Persona-CoT. Several threads each take a
query through its steps, one request at a time. The main thread saves the finished records.
"""
import email.utils
import http.client
import json
import os
import queue
import random
import re
import ssl
import threading
import time
import urllib.parse

from support.files import UserError
from support.replies import Reply, RequestFailed


LONGEST_ANSWER = 8_000_000  # bytes of an HTTP answer that are read
WORKER_ENDED = object()


class HttpTeacher:
    """Any server that speaks OpenAI's chat completions, with `workers` requests in flight.

    The key goes to the host of --url and nowhere else: redirects are not followed and proxies are not used. It is
    removed from everything that the server sends, before any of it is printed or written to a file.
    """

    def __init__(self, args):
        try:
            url = urllib.parse.urlsplit(args.url)
            self.host, self.port = url.hostname, url.port
        except ValueError:
            self.host = None
        if not self.host or url.scheme not in ("http", "https") or "@" in url.netloc or url.query or url.fragment \
                or not re.fullmatch(r"[!-~]+", args.url):  # visible ASCII
            raise UserError("--url: expected the base of the server's addresses, such as http://localhost:8080/v1, "
                            "without user name, key or query")
        self.path = url.path.rstrip("/") + "/chat/completions"
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
        self.not_before = 0.0      # when the server wants the next request, in the seconds of time.monotonic
        self.stop = threading.Event()
        self.finished = queue.SimpleQueue()  # outcomes, errors, and WORKER_ENDED from each worker

    def run(self, queries, save):
        """Take every query (an iterator of Synthesis) to its outcome, and save([outcome]) each one in this thread.

        After an error or Ctrl-C, workers stop waiting and ask nothing more, and all finished outcomes are saved.
        """
        lock = threading.Lock()
        # The number of queries that may be in progress or finished but not saved. A kill loses at most these
        unsaved = threading.Semaphore(2 * self.args.workers)

        def work():
            try:
                while True:
                    unsaved.acquire()
                    with lock:
                        query = next(queries, None)
                    if query is None or self.stop.is_set():
                        return self.finished.put(WORKER_ENDED)
                    self.converse(query)
                    if query.outcome:
                        self.finished.put(query.outcome)
            except BaseException as error:
                self.finished.put(error)

        running = self.args.workers
        for _ in range(running):  # daemons end with the program, whatever they are waiting for
            threading.Thread(target=work, daemon=True).start()
        try:
            while running:
                outcome = self.finished.get()
                if outcome is WORKER_ENDED:
                    running -= 1
                elif isinstance(outcome, BaseException):
                    raise outcome
                else:
                    save([outcome])
                    unsaved.release()
        finally:
            self.stop.set()
            unsaved.release(self.args.workers)
            left = [self.finished.get() for _ in range(self.finished.qsize())]
            save([outcome for outcome in left if isinstance(outcome, dict)])

    def converse(self, query):
        """Make all requests of one query, with a wait after each that failed. After self.stop, it has no outcome."""
        failures = 0  # in a row
        while not query.outcome and not self.stop.wait(max(0.0, self.not_before - time.monotonic())):
            try:
                reply, failures = self.request(query.question.messages), 0
            except RequestFailed as failure:
                reply, failures = failure, failures + 1
            except UserError as error:
                raise UserError(f"query {query.item['id']!r}: {error}") from None
            query.tell(reply)
            if failures and query.outcome and not self.connected:
                raise UserError(f"{self.args.url}: {reply}; is the server running, and is this its address?")
            if failures and not query.outcome:
                if reply.wait is not None:  # all workers wait as long as the server asks for
                    self.not_before = max(self.not_before, time.monotonic() + reply.wait)
                else:
                    self.stop.wait(min(60.0, self.args.backoff * 2 ** (failures - 1)) * random.uniform(0.5, 1))

    def request(self, messages):
        """Returns the Reply to one chat completion.

        RequestFailed if the request may succeed later; UserError if the server will never accept it.
        """
        try:
            return self.read_answer(*self.post(json.dumps(self.body | {"messages": messages})))
        except ssl.SSLCertVerificationError as error:
            raise UserError(f"{self.host}: its certificate is not valid ({error.verify_message})") from None
        except TimeoutError:
            raise RequestFailed("no reply in time (--timeout)") from None
        except (OSError, http.client.HTTPException) as error:
            raise RequestFailed(f"connection: {self.one_line(str(error) or type(error).__name__)}") from None

    def post(self, content):
        """Send one request. Returns (status, headers, body) of the answer.

        Connecting may take up to --timeout. Whatever remains of it then limits the wait for each piece of the headers
        and the time for the whole body, so that only a server that sends its headers in many pieces takes longer.
        """
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        deadline = time.monotonic() + self.args.timeout
        connection = self.new_connection(self.host, self.port, timeout=self.args.timeout)
        try:
            connection.connect()
            self.connected, sock = True, connection.sock
            sock.settimeout(seconds_until(deadline))
            connection.request("POST", self.path, content, headers)
            answer, body = connection.getresponse(), bytearray()
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

    def read_answer(self, status, headers, body):
        """Returns the Reply in an answer of the server. Raises RequestFailed or UserError as `request` does."""
        try:
            found = json.loads(body)
        except (ValueError, RecursionError):
            found = None
        text = body[:2000].decode("utf-8", "replace")
        if status != 200:
            error = found.get("error", found) if isinstance(found, dict) else None
            error = error.get("message", error) if isinstance(error, dict) else error
            if 300 <= status < 400:
                error = f"it redirects to {headers.get('Location')}; if you trust that address, give it as --url"
            said = self.one_line(f"{status} {http.client.responses.get(status, '')}: {error or text}")
            if status == 429 or status >= 500:
                raise RequestFailed(f"server: {said}", retry_after(headers.get("Retry-After")))
            raise UserError(f"{self.host} answered {said}")
        try:
            choice, usage = found["choices"][0], found.get("usage") or {}
            counts = [usage.get(key) for key in ("prompt_tokens", "completion_tokens")]
            return Reply(self.without_key(str(choice["message"]["content"] or "")),
                         choice.get("finish_reason") == "length",
                         *(n if type(n) is int else 0 for n in counts))
        except (LookupError, TypeError, AttributeError):
            raise RequestFailed(f"not a chat completion: {self.one_line(text)!r}") from None

    def without_key(self, text):
        return text.replace(self.key, "[key]") if self.key else text

    def one_line(self, text):
        """Returns text from the server as one line that is safe to print in a terminal."""
        return "".join(c if c.isprintable() else " " for c in " ".join(self.without_key(text).split()))[:300]


def seconds_until(deadline):
    """Returns how long a socket may still wait. TimeoutError if the deadline, by time.monotonic, has passed."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def retry_after(text):
    """Returns the seconds that a Retry-After header asks to wait, at most an hour, or None if it is not understood.

    The header holds a number of seconds or a date.
    """
    try:
        if re.fullmatch(r"\s*\d+(\.\d*)?\s*", text or ""):
            return min(3600.0, float(text))
        return min(3600.0, max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time()))
    except (TypeError, ValueError, OverflowError):
        return None
