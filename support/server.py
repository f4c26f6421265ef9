"""A teacher behind a server that speaks OpenAI's chat completions.
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
from support.replies import Fault, Reply


class Http:
    """Any server that speaks OpenAI's chat completions, with `workers` requests in flight.

    The key goes to the host of --url and nowhere else: redirects are not followed and proxies not used. Whatever the
    server sends is scrubbed of it before it can be printed or written.
    """

    def __init__(self, args):
        try:
            url = urllib.parse.urlsplit(args.url)
            self.host, self.port = url.hostname, url.port
        except ValueError:
            self.host = None
        if not self.host or url.scheme not in ("http", "https") or "@" in url.netloc or url.query or url.fragment \
                or not args.url.isascii() or not args.url.isprintable() or " " in args.url:
            raise UserError("--url: expected the base of the server's addresses, such as http://localhost:8080/v1, "
                            "without user name, key or query")
        self.tls = ssl.create_default_context() if url.scheme == "https" else None
        self.path = url.path.rstrip("/") + "/chat/completions"
        self.key = os.environ.get(args.key_env, "").strip() if args.key_env else ""
        if args.key_env and not (self.key.isascii() and self.key.isprintable() and self.key and " " not in self.key):
            raise UserError(f"the environment variable {args.key_env} (--key-env) holds no key")
        self.body = {"model": args.model, "max_tokens": args.max_new_tokens}
        self.body |= {} if args.temperature is None else {"temperature": args.temperature}
        self.name, self.args, self.reached, self.not_before = f"http:{args.model}", args, False, 0.0
        self.finished, self.over = queue.SimpleQueue(), threading.Event()

    def outcomes(self, queries):
        running, lock = self.args.workers, threading.Lock()
        room = threading.Semaphore(2 * running)  # for what is asked or not yet written: all that a kill can lose

        def work():  # daemons: they end with the program, whatever they wait for
            try:
                while True:
                    room.acquire()
                    with lock:
                        query = next(queries, None)
                    if query is None or self.over.is_set():
                        return self.finished.put(None)
                    self.drive(query)
                    self.finished.put(query.outcome)
            except BaseException as error:
                self.finished.put(error)

        for _ in range(running):
            threading.Thread(target=work, daemon=True).start()
        try:
            while running:
                outcome = self.finished.get()
                running -= outcome is None
                if isinstance(outcome, BaseException):
                    raise outcome
                if outcome:
                    yield [outcome]
                    room.release()
        finally:  # after an error or Ctrl-C nobody waits any longer or asks again
            self.over.set()
            room.release(self.args.workers)

    def left(self):
        outcomes = []
        while not self.finished.empty():
            outcomes.append(self.finished.get())
        return [outcome for outcome in outcomes if isinstance(outcome, dict)]

    def drive(self, query):
        """All requests of one query, with waits that double after every fault in a row, or as the server asks."""
        faults = 0
        while not query.outcome and not self.over.wait(max(0.0, self.not_before - time.monotonic())):
            try:
                reply, faults = self.request(query.ask[0]), 0
            except Fault as fault:
                reply, faults = fault, faults + 1
            except UserError as error:
                raise UserError(f"query {query.item['id']!r}: {error}") from None
            query.tell(reply)
            if isinstance(reply, Fault) and not query.outcome:
                if reply.wait is not None:  # for everybody: the server has said when
                    self.not_before = max(self.not_before, time.monotonic() + reply.wait)
                else:
                    self.over.wait(min(60.0, self.args.backoff * 2 ** (faults - 1)) * random.uniform(0.5, 1))
            if isinstance(reply, Fault) and query.outcome and not self.reached:
                raise UserError(f"{self.args.url}: {reply}; is the server running, and is this its address?")

    def request(self, messages):
        """One chat completion -> Reply. Fault for what may pass; UserError with the server's message for what won't."""
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        headers |= {"Authorization": f"Bearer {self.key}"} if self.key else {}
        deadline, body = time.monotonic() + self.args.timeout, bytearray()
        where = {"host": self.host, "port": self.port, "timeout": self.args.timeout}
        connection = http.client.HTTPSConnection(**where, context=self.tls) if self.tls \
            else http.client.HTTPConnection(**where)
        try:
            connection.connect()
            self.reached, plug = True, connection.sock
            connection.request("POST", self.path, json.dumps(self.body | {"messages": messages}), headers)
            response = connection.getresponse()
            while (left := deadline - time.monotonic()) > 0 and len(body) < 8_000_000:
                plug.settimeout(left)  # of the whole request: a server that sends a byte a minute is none
                part = response.read1(65536)
                if not part:
                    break
                body += part
            else:
                raise Fault("the reply is longer than 8 MB" if left > 0 else "no reply in time (--timeout)")
        except ssl.SSLCertVerificationError as error:
            raise UserError(f"{self.host}: its certificate is not valid ({error.verify_message})") from None
        except TimeoutError:
            raise Fault("no reply in time (--timeout)") from None
        except (OSError, http.client.HTTPException) as error:
            raise Fault(f"connection: {self.clean(str(error) or type(error).__name__)}") from None
        finally:
            connection.close()
        try:
            found = json.loads(body)
        except (ValueError, RecursionError):
            found = None
        if response.status != 200:
            raise self.refusal(response, found, body)
        try:
            choice, usage = found["choices"][0], found.get("usage") or {}
            counts = [usage.get(key) for key in ("prompt_tokens", "completion_tokens")]
            return Reply(self.scrub(str(choice["message"]["content"] or "")), choice.get("finish_reason") == "length",
                         *(n if type(n) is int else 0 for n in counts))
        except (LookupError, TypeError, AttributeError):
            raise Fault(f"not a chat completion: {self.clean(body[:2000].decode('utf-8', 'replace'))!r}") from None

    def refusal(self, response, found, body):
        """What a status other than 200 means: a Fault for 429 and 5xx, else a UserError."""
        said = found.get("error", found) if isinstance(found, dict) else None
        said = said.get("message", said) if isinstance(said, dict) else said
        said = f"{response.status} {response.reason}: {said or body[:2000].decode('utf-8', 'replace')}"
        if response.status == 429 or response.status >= 500:
            return Fault(f"server: {self.clean(said)}", retry_after(response.headers.get("Retry-After")))
        if response.status < 400:
            where = response.headers.get("Location")
            said = f"{response.status}, redirects to {where}; if you trust it, give that as --url"
        return UserError(f"{self.host} answered {self.clean(said)}")

    def scrub(self, text):
        return text.replace(self.key, "[key]") if self.key else text

    def clean(self, text):
        """A server's words, fit for one line of a terminal."""
        return "".join(c if c.isprintable() else " " for c in " ".join(self.scrub(text).split()))[:300]


def retry_after(text):
    """Seconds to wait as a Retry-After header has them, in seconds or as a date -> 0 to 3600, or None."""
    try:
        if not re.fullmatch(r"\d{1,9}(\.\d*)?", (text or "").strip()):
            return min(3600.0, max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time()))
        return min(3600.0, float(text))
    except (TypeError, ValueError, OverflowError):
        return None
