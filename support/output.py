"""What a teacher writes, on disk as soon as it is known: records in one file, rejected queries in another.
"""
import json
from collections import Counter
from pathlib import Path

from support.files import UserError, read_lines
from support.records import read_records, write_records

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


class RecordWriter:
    """FILE.jsonl for records and FILE.rejected.jsonl beside it, both append-only, a line a query, flushed.

    Opening takes a lock of the operating system, which ends with the process, mends a torn last line and finds what is
    done. A query that is tried again may stand in both files, or twice in the second, until `close` (or the next
    opening) has cleared up: a record counts more than a rejection, a later rejection more than an earlier one.
    """

    def __init__(self, out):
        if fcntl is None:
            raise UserError("--teacher local and http need the file locks of Linux or macOS")
        self.out, self.rejected = Path(out), Path(out).with_suffix(".rejected.jsonl")
        self.out.parent.mkdir(parents=True, exist_ok=True)
        try:
            self.file = open(self.out, "ab")
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            repair_last_line(self.out), repair_last_line(self.rejected)
        except BlockingIOError:
            raise UserError(f"{out}: another process is writing to it; wait for it, or give another --out") from None
        except OSError as error:
            raise UserError(f"{error.filename or out}: {error.strerror or error}") from None
        self.done = {str(r["id"]) for r in read_records(self.out)} if self.out.stat().st_size else set()
        self.refused = {}
        self.clear_up()

    def clear_up(self):
        self.refused = read_rejected(self.rejected, self.done)
        if self.rejected.exists() and len(self.refused) < len(self.rejected.read_bytes().splitlines()):
            write_records(self.rejected, self.refused.values())

    def add(self, outcomes):
        """Append what is finished: one write for each file, so that an interruption comes before it or after it."""
        try:
            for path in (self.out, self.rejected):
                text = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in outcomes
                               if ("response" in one) == (path == self.out))
                if text:
                    with open(path, "ab") as file:
                        file.write(text.encode("utf-8", "replace"))
        except OSError as error:
            raise UserError(f"{path}: {error.strerror or error}; what was finished before is saved") from None
        self.done |= {str(o["id"]) for o in outcomes if "response" in o}
        self.refused |= {str(o["id"]): o for o in outcomes if "response" not in o}

    def close(self):
        self.clear_up()
        self.file.close()


def reasons(entries):
    """How many entries of a rejected file have each reason, by what stands before its colon."""
    return Counter(entry["reason"].partition(":")[0][:60] for entry in entries)


def read_rejected(path, done):
    """The entries of a rejected file, {id: the last one}, without those that are done by now; {} without a file."""
    entries = {}
    for number, entry in read_lines(path) if path.exists() else ():
        if not isinstance(entry, dict) or "id" not in entry or not isinstance(entry.get("reason"), str):
            raise UserError(f"{path}, line {number}: no entry of a rejected file")
        entries[str(entry["id"])] = entry
    return {key: entry for key, entry in entries.items() if key not in done}


def repair_last_line(path):
    """Make a .jsonl file end with a whole line: what a kill or a power cut left of a last one is removed, and told."""
    data = path.read_bytes() if path.exists() else b""
    if data and not data.endswith(b"\n"):
        start = data.rfind(b"\n") + 1
        try:
            json.loads(data[start:])
            end = b"\n"
        except (ValueError, RecursionError):
            if data[start:].strip(b"\0")[:1] not in (b"{", b""):
                raise UserError(f"{path}: its last line is no JSON object; is this a file of records?") from None
            end = b""
            print(f"{path}: the last line was torn and is removed; its query is done again")
        with open(path, "r+b") as file:
            file.truncate(len(data) if end else start)
            file.seek(0, 2)
            file.write(end)
