"""The two files that a synthesis writes: records, and the queries that were rejected.

A synthesis runs for hours. Finished queries are appended at once. After Ctrl-C or a kill the same command continues; it
repeats only the queries whose outcome was not saved yet.
"""
import json
import re
from collections import Counter
from pathlib import Path

from support.files import UserError, read_lines
from support.records import read_records, record_lines, write_records

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


class RecordWriter:
    """FILE.jsonl for records and FILE.rejected.jsonl beside it. Both are appended to, one line for each query.

    Opening them locks FILE.jsonl (the operating system unlocks it when the process ends), repairs a last line that was
    cut off, and reads which queries are done. While rejected queries are tried again, a query may be in both files, or
    twice in the second. `tidy` removes the superfluous entries: a record replaces a rejection, and a later rejection an
    earlier one.
    """

    def __init__(self, out):
        if fcntl is None:
            raise UserError("--teacher local and http need the file locks of Linux or macOS")
        self.out, self.rejected_file = Path(out), Path(out).with_suffix(".rejected.jsonl")
        self.out.parent.mkdir(parents=True, exist_ok=True)
        try:
            self.lock = open(self.out, "ab")
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            repair_last_line(self.out)
            repair_last_line(self.rejected_file)
        except BlockingIOError:
            raise UserError(f"{out}: another process is writing to it; wait for it, or give another --out") from None
        except OSError as error:
            raise UserError(f"{error.filename or out}: {error.strerror or error}") from None
        self.done = {str(r["id"]) for r in read_records(self.out)} if self.out.stat().st_size else set()
        self.tidy()

    def tidy(self):
        self.rejected = read_rejected(self.rejected_file, self.done)
        if self.rejected_file.exists() and len(self.rejected) < len(self.rejected_file.read_bytes().splitlines()):
            write_records(self.rejected_file, self.rejected.values())

    def add(self, outcomes):
        """Append outcomes: those with a response are records, the others are rejected.

        A kill can cut a line; then repair_last_line removes it at the next start.
        """
        records = {str(outcome["id"]): outcome for outcome in outcomes if "response" in outcome}
        rejected = {str(outcome["id"]): outcome for outcome in outcomes if "response" not in outcome}
        for path, entries in ((self.out, records), (self.rejected_file, rejected)):
            if not entries:
                continue
            try:
                with open(path, "ab") as file:
                    file.write(record_lines(entries.values()))
            except OSError as error:
                raise UserError(f"{path}: {error.strerror or error}; all earlier outcomes are saved") from None
        self.done |= records.keys()
        self.rejected |= rejected

    def close(self):
        self.tidy()
        self.lock.close()


def reasons(entries):
    """Returns {reason: number of entries} of a rejected file. Of each reason, the part before its colon counts, and of
    one that begins "server:", also the part after it, up to the next colon."""
    return Counter(re.match("(server: )?[^:]*", entry["reason"])[0][:80] for entry in entries)


def read_rejected(path, done):
    """Returns {id: its last entry} of a rejected file, without the ids in `done`. {} if there is no such file."""
    entries = {}
    for number, entry in read_lines(path) if path.exists() else ():
        if not isinstance(entry, dict) or "id" not in entry or not isinstance(entry.get("reason"), str):
            raise UserError(f"{path}, line {number}: no entry of a rejected file, which has an id and a reason")
        entries[str(entry["id"])] = entry
    return {key: entry for key, entry in entries.items() if key not in done}


def repair_last_line(path):
    """Make a .jsonl file end with a whole line. A last line that a kill or a power cut left incomplete is removed, and
    a message says so. UserError, and no change, if the last line is no JSON object at all."""
    data = path.read_bytes() if path.exists() else b""
    last = data[data.rfind(b"\n") + 1:]
    if not last:
        return
    with open(path, "r+b") as file:
        try:
            json.loads(last)
            file.seek(0, 2)
            file.write(b"\n")
        except (ValueError, RecursionError):
            if last.strip(b"\0")[:1] not in (b"{", b""):  # a power cut may leave zeros
                raise UserError(f"{path}: its last line is no JSON object; is this a file of records?") from None
            file.truncate(len(data) - len(last))
            print(f"{path}: the last line was cut off, so it is removed and its query repeated")
