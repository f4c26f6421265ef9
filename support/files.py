"""Files that are checked when read and whole when written: JSON, JSON lines, CSV and safetensors; the error that users see.
"""
import csv
import io
import json
import os
import shutil
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import safe_open, SafetensorError
import torch


class UserError(Exception):
    """Something that the person at the keyboard can mend. The commands print it as one line and exit with status 2."""


def shorten(value, length=80):
    """A value as messages show it: its beginning, if it is long."""
    text = repr(value)
    return text if len(text) <= length else text[:length] + "…"


def read_json(path, kind=dict):
    """The object (or list: kind) in a JSON file. UserError if it is missing, is not JSON, or is not of that kind."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(value, kind):
        expected = "object" if kind is dict else "list"
        raise UserError(f"{path}: found a {type(value).__name__}, expected a JSON {expected}")
    return value


def read_bytes(path):
    """A file's bytes, without a byte order mark."""
    try:
        return Path(path).read_bytes().removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None


def read_lines(path):
    """(line number, value) of every line of a .jsonl file that is not blank. UserError names file and line."""
    for number, line in enumerate(read_bytes(path).split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line.decode("utf-8"))
        except UnicodeDecodeError:
            raise UserError(f"{path}, line {number}: not UTF-8; save the file as UTF-8") from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {number}: not JSON ({error}); a torn line? mend or remove it") from None


def read_table(path, columns):
    """[(row number in the spreadsheet, {column: text})] of a .csv file with comma, semicolon or tab between the cells.
    UserError if one of `columns` is missing or the file is no table."""
    try:
        text = read_bytes(path).decode("utf-8")
        separator = max(",;\t", key=text.partition("\n")[0].count)
        header, *rows = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8; save it as CSV with the encoding UTF-8") from None
    except (ValueError, csv.Error) as error:
        raise UserError(f"{path}: not a table ({error}), expected CSV with the columns' names on top") from None
    header, table = [name.strip() for name in header], []
    for name in columns:
        if header.count(name) != 1:
            raise UserError(f"{path}: {header.count(name)} columns named {name!r}, expected one; the names found are "
                            f"{', '.join(header)[:200]!r}")
    for number, row in enumerate(rows, 2):
        if any(cell.strip() for cell in row[len(header):]):
            raise UserError(f"{path}, row {number}: {len(row)} cells under {len(header)} names")
        if any(cell.strip() for cell in row):
            table.append((number, dict(zip(header, row))))
    return table


@contextmanager
def atomic(path):
    """Yield a temporary name beside `path` to write a file or a folder to; rename it when the block ends well.

    Nobody ever sees half a file under its final name, and what was there before stays until the new one is whole.
    UserError if it cannot be written: a full disk, a folder that may only be read.
    """
    path = Path(path)
    part, old = (path.with_name(path.name + end) for end in (".~part", ".~old"))  # no names that a person gives
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if old.exists() and not path.exists():  # a kill came between the two renames below
            os.replace(old, path)
        remove(part, old)
        yield part
        if path.is_dir():
            if not part.is_dir():
                remove(part)
                raise UserError(f"{path} is a folder, expected a file to write: move it away, or give another name")
            os.replace(path, old)  # a folder cannot be renamed onto one that has files in it
        os.replace(part, path)
    except (OSError, SafetensorError) as error:
        remove(part)  # on a full disk, what was written of it is in the way
        why = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be written ({why}); what was there before is kept. Is the disk full, or may "
                        "this folder only be read?") from None
    shutil.rmtree(old, ignore_errors=True)


def remove(*paths):
    """Remove files and folders, where they are there."""
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with suppress(OSError):
                path.unlink()


def weight_files(path):
    """The safetensors files of a model folder -> the tensor names to take from each (None: all of them)."""
    path = Path(path)
    single, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if single.exists():
        return {single: None}
    if not index.exists():
        pickles = sorted(p.name for p in path.glob("*") if p.suffix in (".bin", ".pt", ".pth"))
        if pickles:
            raise UserError(f"{path}: found only pickled weights ({pickles[0]}), which can run code when read, so they "
                            "are not; download the model's safetensors files, or convert with safetensors' own script")
        raise UserError(f"{path}: no model.safetensors and no model.safetensors.index.json")
    files = {}
    where = read_json(index).get("weight_map")
    for name, file in where.items() if isinstance(where, dict) else ():
        if not isinstance(file, str) or Path(file).name != file or "\0" in file:
            raise UserError(f"{index}: {name} is said to be in {shorten(file)}, expected the name of a file in this "
                            "folder")
        files.setdefault(path / file, []).append(name)
    if not files:
        raise UserError(f"{index}: no weight_map")
    for file in files:
        if not os.path.isfile(file):
            raise UserError(f"{file}: no such file, but {index.name} lists it: download the missing part again")
    return files


@contextmanager
def open_safetensors(file, device="cpu"):
    """An open safetensors file; what the format's own checks find becomes a UserError that names the file."""
    try:
        with safe_open(str(file), framework="pt", device=device) as tensors:
            yield tensors
    except FileNotFoundError:
        raise UserError(f"{file}: no such file; make or download it again") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: not a whole safetensors file ({error}); download or make it again") from None


def read_tensors(file, shapes, whose):
    """The tensors of a safetensors file, {name: tensor}. UserError unless names and shapes are those of `shapes`,
    {name: shape}, and all values are finite floats; `whose` is what another shape suggests."""
    with open_safetensors(file) as tensors:
        found = {name: tensors.get_tensor(name) for name in tensors.keys()}
    for name in sorted(found.keys() ^ shapes.keys()):
        raise UserError(f"{file}: {'unexpected' if name in found else 'missing'} tensor {name}")
    for name, shape in shapes.items():
        tensor = found[name]
        if tuple(tensor.shape) != tuple(shape):
            raise UserError(f"{file}: {name} is {tuple(tensor.shape)}, expected {tuple(shape)}: {whose}")
        if not tensor.is_floating_point() or not all_finite(tensor.float()):
            raise UserError(f"{file}: {name} ({str(tensor.dtype)[6:]}) is not all finite floats: a training that went "
                            "wrong, or a broken copy")
    return found


def all_finite(tensor):
    """Whether no value is NaN or infinite; without a copy."""
    tensor = tensor.detach()
    # A sum is finite of finite values only, and takes half as long as the extremes. It can overflow: then they decide
    return bool(tensor.sum().isfinite()) or bool(torch.stack(torch.aminmax(tensor)).isfinite().all())


def human_readable_size(n):
    """Bytes in words."""
    return f"{n / 2**30:.1f} GiB" if n >= 2**29 else f"{n / 2**20:.1f} MiB"
