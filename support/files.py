"""Reading files with checks and writing them safely: JSON, JSON lines and CSV. support/weights.py reads model folders.

Whatever is wrong with a file that a user supplied ends in a UserError, which names the file, what was found and what
was expected. Files are written under a temporary name and then renamed, so that a crash never leaves half a file.
"""
import csv
import io
import json
import os
import shutil
import stat
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError


class UserError(Exception):
    """A problem that the user can solve. Commands print it, in one line if there is one problem, and exit with status
    2."""


def shorten(value, length=80):
    """repr(value) for an error message; of a long one only the beginning."""
    text = repr(value)
    return text if len(text) <= length else text[:length] + "…"


def read_json(path, kind=dict):
    """The value in a JSON file. UserError if the file is missing, is not JSON, or its value is not a `kind` (dict or
    list)."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(value, kind):
        expected = "object" if kind is dict else "list"
        raise UserError(f"{path}: found a {type(value).__name__}, expected a JSON {expected}")
    return value


def check_settings(file, settings, expected):
    """Check values that were read from a JSON file against a table {key: (what is allowed, …)}.

    Allowed is a value; dict for any object; str for any text that can name a file; int or float for a positive number
    below 2^40. An absent key counts as None. UserError names the file, the key, what was found and what was expected.
    """
    kinds = {int: "a positive whole number", float: "a positive number", dict: "an object", str: "a text"}
    for key, allowed in expected.items():
        value = settings.get(key)
        if not any(matches(value, one) for one in allowed):
            names = [kinds[one] if one in kinds else repr(one) for one in allowed if one is not None]
            raise UserError(f"{file}: {key} is {shorten(value)}, expected {' or '.join(names)}")


def matches(value, allowed):
    """Whether a JSON value is of a kind, or equals a value, that `check_settings` allows."""
    if allowed in (int, float):
        return type(value) in (int, allowed) and 0 < value < 2**40
    if allowed is str:
        return type(value) is str and value != "" and "\0" not in value
    return type(value) is allowed or value == allowed and isinstance(value, bool) == isinstance(allowed, bool)


def read_bytes(path):
    """The bytes of a file, without a byte order mark. UserError if it cannot be read."""
    try:
        return Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None


def read_lines(path, parse=json.loads):
    """Yield (line number, parse(line)) for every line of a file that is not blank. UserError names file and line."""
    for number, line in enumerate(read_bytes(path).split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            yield number, parse(line.decode("utf-8"))
        except UnicodeDecodeError:
            raise UserError(f"{path}, line {number}: not UTF-8; save the file as UTF-8") from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number}: not JSON ({error}); a torn line? Correct or remove it") from None


def read_table(path, columns):
    """Read a .csv file with commas, semicolons or tabs between the cells.

    Returns [(row number as a spreadsheet shows it, {column: text})]. UserError if the file is not a table or does not
    have each of `columns` exactly once.
    """
    try:
        text = read_bytes(path).decode("utf-8")
        separator = max(",;\t", key=text.partition("\n")[0].count)
        header, *rows = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8; save it as CSV with the encoding UTF-8") from None
    except (ValueError, csv.Error) as error:
        raise UserError(f"{path}: not a table ({error}), expected CSV with column names in the first row") from None
    header, table = [name.strip() for name in header], []
    for name in columns:
        if header.count(name) != 1:
            raise UserError(f"{path}: {header.count(name)} columns named {name!r}, expected one; the names found are "
                            f"{', '.join(header)[:200]!r}")
    for number, row in enumerate(rows, 2):
        if any(cell.strip() for cell in row[len(header):]):
            raise UserError(f"{path}, row {number}: {len(row)} cells under {len(header)} names")
        if any(cell.strip() for cell in row):
            table.append((number, dict(zip(header, row + [""] * len(header)))))  # a short row has empty cells
    return table


@contextmanager
def atomic(path):
    """Yield a temporary name beside `path` to write a file or folder to; rename it to `path` when the block succeeds.

    No half-written file is ever seen under its final name, and the old file stays until the new one is complete. Files
    get the mode that the umask gives to new ones: safetensors writes 0600, which other users' programs could not read.
    UserError if writing fails, for example because the disk is full or the folder is read-only.
    """
    path = Path(path)
    part, old = (path.with_name(path.name + end) for end in (".~part", ".~old"))  # unlike any name a user would choose
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if old.exists() and not path.exists():  # the process was killed between the two renames below
            os.replace(old, path)
        remove(part, old)
        part.touch()
        mode = stat.S_IMODE(part.stat().st_mode)
        part.unlink()
        yield part
        for file in [part] if part.is_file() else part.rglob("*"):
            if file.is_file():  # on the disk before it is renamed: a power cut must not leave an empty file
                with open(file, "rb+") as written:
                    os.fsync(written.fileno())
                if stat.S_IMODE(file.stat().st_mode) != mode:
                    file.chmod(mode)
        if path.is_dir():
            if not part.is_dir():
                remove(part)
                raise UserError(f"{path} is a folder, expected a file to write: move it away, or give another name")
            os.replace(path, old)  # a folder cannot be renamed onto one that contains files
        os.replace(part, path)
    except (OSError, SafetensorError) as error:
        remove(part)  # it would only take room on a full disk
        if old.exists() and not path.exists():  # the second rename failed: undo the first
            with suppress(OSError):
                os.replace(old, path)
        why = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be written ({why}); what was there before is kept. Is the disk full, or the "
                        "folder read-only?") from None
    shutil.rmtree(old, ignore_errors=True)


def remove(*paths):
    """Remove files and folders, if they exist."""
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with suppress(OSError):
                path.unlink()


def human_readable_size(n):
    """A number of bytes as text: GiB from half a GiB on, else MiB."""
    return f"{n / 2**30:.1f} GiB" if n >= 2**29 else f"{n / 2**20:.1f} MiB"
