"""What the command lines of synth.py, train.py and eval.py share: options, errors in one line, the device.

What is notable:
- a program's options are the fields of a dataclass: name, type and default from the field, the help from the sentence
  under it
- whatever a user can do wrong ends in a UserError: one line on standard error, exit status 2, no traceback
"""
import argparse
import ast
import inspect
import io
import os
import sys
import textwrap
import typing
from dataclasses import fields, MISSING
from functools import cache
from pathlib import Path

import torch

from support.files import UserError


@cache
def field_help(cls):
    """{field: the sentence under it} of a dataclass and those it inherits from, read from their source."""
    found = {}
    for parent in cls.__mro__[-2::-1]:  # object has none
        body = ast.parse(textwrap.dedent(inspect.getsource(parent))).body[0].body
        found |= {a.target.id: " ".join(b.value.value.split()) for a, b in zip(body, body[1:])
                  if isinstance(a, ast.AnnAssign) and isinstance(b, ast.Expr)}
    return found


class Parser(argparse.ArgumentParser):
    def error(self, message):  # one line, without the usage
        raise UserError(f"{message}; see python {self.prog} --help")


def for_users(doc):
    """A program's docstring as --help shows it: without what is for readers of its code, in lines of a terminal."""
    parts = [part.strip("\n") for part in doc.split("\n\n") if not part.startswith(("What is notable", "Shapes:"))]
    return "\n\n".join("\n".join(textwrap.fill(line, 79, subsequent_indent=" " * 8) for line in part.split("\n"))
                       if part.startswith(" ") else textwrap.fill(part, 79) for part in parts)


def parse(cls, argv=None, description=None, prog=None):
    """Fill the dataclass `cls` from the command line: --name VALUE for each field, a switch for each bool, several
    values for a list; a field without a default is a list of plain words, perhaps empty if it has a default_factory."""
    parser = Parser(description=for_users(description or ""), allow_abbrev=False, prog=prog,
                    formatter_class=argparse.HelpFormatter if prog else argparse.RawDescriptionHelpFormatter)
    add_fields(parser, cls)
    return check_numbers(cls(**vars(parser.parse_args(argv))))


MOST = {"lr_warmup": 1, "top_p": 1, "batch": 2**16, "rank": 2**16, "workers": 2**12}  # beyond them memory would end


def check_numbers(args):
    """UserError for a number out of its range: NaN, infinite, negative, or 0 where 0 makes no sense -> args."""
    for key, value in vars(args).items():
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            low = 0 if key in ("seed", "lam", "lr_warmup", "temperature", "replies", "retries") else \
                1 if isinstance(value, int) else 1e-9
            high = MOST.get(key, 2**31)
            if not low <= value <= high:
                raise UserError(f"--{key.replace('_', '-')} is {value}, expected a number from {low:g} to {high:g}")
    return args


def add_fields(parser, cls):
    hints, sentences = typing.get_type_hints(cls), field_help(cls)
    for one in fields(cls):
        kind, sentence = hints[one.name], sentences[one.name]
        if one.default is MISSING:
            parser.add_argument(one.name, nargs="+" if one.default_factory is MISSING else "*",
                                metavar="FILE" if one.name.startswith("file") else "TEXT", help=sentence)
            continue
        if type(None) in typing.get_args(kind):  # "int | None": None stands for the preset's value
            kind = typing.get_args(kind)[0]
        option = {"default": one.default, "help": sentence.replace("%", "%%")}
        if one.default is not False and one.default not in (None, ()):  # 0 is shown, though it equals False
            option["help"] += f" (default: {one.default})"
        if kind is bool:
            option["action"] = "store_true"
        elif typing.get_origin(kind) is typing.Literal:
            option["choices"] = typing.get_args(kind)
        elif typing.get_origin(kind) is list:
            option.update(nargs="+", metavar="TEXT")
        else:
            option.update(type=kind, metavar={int: "N", float: "X", str: "TEXT"}[kind])
        parser.add_argument("--" + one.name.rstrip("_").replace("_", "-"), dest=one.name, **option)


def fail(message):
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    sys.exit(2)


def run_command(main):
    """Run a program's main(); an error of the user's becomes one line on standard error and exit status 2."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by who started us: `… >&-`
            setattr(sys, name, open(os.devnull, mode))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that lacks a character shows its number
            stream.reconfigure(errors="backslashreplace")
    try:
        sys.exit(main())
    except UserError as error:
        fail(error)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of a pipe has gone: `… | head`
        sys.stderr.close()
        sys.exit(141)
    except OSError as error:  # a disk that is full, a folder that may not be read
        fail(f"{error.filename or 'a file'}: {error.strerror or error}")
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if type(error) is RuntimeError and "can't allocate memory" not in str(error):  # a CPU's is no class of its own
            raise
        fail(f"memory is full ({' '.join(str(error).split())[:150]}): lower --tokens, or take a smaller model, a "
             "device with more memory or --dtype bfloat16, which takes half of float32")


def pick_device(name=None):
    """cpu, cuda or cuda:N -> torch.device; None takes a GPU if there is one."""
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name!r}: expected cpu, cuda or cuda:N")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda needs a CUDA GPU and a PyTorch built for it; --device cpu does without, slowly")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: there are {torch.cuda.device_count()} GPUs here, counted from 0")
    return device


def pick_dtype(name, device):
    """The base's dtype: as named, else bfloat16 on a GPU and float32 on a CPU."""
    if device.type == "cuda" and name != "float32" and not torch.cuda.is_bf16_supported():
        raise UserError(f"{torch.cuda.get_device_name(device)} has no bfloat16: use --dtype float32")
    return getattr(torch, name or ("bfloat16" if device.type == "cuda" else "float32"))
