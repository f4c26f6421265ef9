"""What the command lines of synth.py, train.py and eval.py share: options, one-line errors, device and dtype.

What is notable:
- a program's options are the fields of a dataclass: a field gives name, type and default, and the sentence under it is
  the help text
- a user's mistake is raised as UserError. The program then prints one line on standard error, with exit status 2
"""
import argparse
import ast
import inspect
import io
import os
import sys
import textwrap
import typing
from contextlib import suppress
from dataclasses import fields, MISSING
from functools import cache
from pathlib import Path

import torch

from support.files import UserError


# ----------------------------------------------------------------------------------------------------------------------
# Options from a dataclass

@cache
def field_help(cls):
    """Returns {field: the sentence under it} of a dataclass and its parents, read from their source code."""
    sentences = {}
    for parent in cls.__mro__[-2::-1]:  # from the oldest parent on; the last of __mro__ is object
        body = ast.parse(textwrap.dedent(inspect.getsource(parent))).body[0].body
        sentences |= {field.target.id: " ".join(sentence.value.value.split()) for field, sentence in zip(body, body[1:])
                      if isinstance(field, ast.AnnAssign) and isinstance(sentence, ast.Expr)}
    return sentences


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are UserErrors: one line, without the usage."""

    def error(self, message):
        raise UserError(f"{message}; see python {self.prog} --help")


def for_users(doc):
    """Returns a docstring as --help shows it: 79 columns, without the paragraphs for readers of the code."""
    parts = [part.strip("\n") for part in inspect.cleandoc(doc).split("\n\n")
             if not part.startswith(("What is notable", "Shapes:"))]
    return "\n\n".join("\n".join(textwrap.fill(line, 79, subsequent_indent=" " * 8) for line in part.split("\n"))
                       if part.startswith(" ") else textwrap.fill(part, 79) for part in parts)


def parse(cls, argv=None, description=None, prog=None):
    """Returns the dataclass `cls` filled from the command line. UserError for an invalid option or value."""
    parser = Parser(description=for_users(description or ""), allow_abbrev=False, prog=prog,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    add_fields(parser, cls)
    return check_numbers(cls(**vars(parser.parse_args(argv))))


def add_fields(parser, cls):
    """Add an option for each field of the dataclass `cls`.

    It is --name VALUE; a bool is a switch, and a list takes several values. A field without a default is a positional
    argument that takes one word or more, and a field with a default_factory one that takes any number.
    """
    types, sentences = typing.get_type_hints(cls), field_help(cls)
    for field in fields(cls):
        kind, sentence = types[field.name], sentences[field.name].replace("%", "%%")  # argparse formats with %
        if field.default is MISSING:
            parser.add_argument(field.name, nargs="+" if field.default_factory is MISSING else "*",
                                metavar="FILE" if field.name.startswith("file") else "TEXT", help=sentence)
            continue
        if type(None) in typing.get_args(kind):  # "int | None": None means that the option was not given
            kind = typing.get_args(kind)[0]
        option = {"default": field.default, "help": sentence}
        if field.default is not False and field.default not in (None, ()):  # 0 is shown, although 0 == False
            option["help"] += f" (default: {field.default})"
        if kind is bool:  # one without a default has an opposite, --no-NAME
            option["action"] = argparse.BooleanOptionalAction if field.default is None else "store_true"
        elif typing.get_origin(kind) is typing.Literal:
            option["choices"] = typing.get_args(kind)
        elif typing.get_origin(kind) is list:
            option.update(nargs="+", metavar="TEXT")
        else:
            option.update(type=kind, metavar={int: "N", float: "X", str: "TEXT"}[kind])
        parser.add_argument("--" + field.name.rstrip("_").replace("_", "-"), dest=field.name, **option)


MAY_BE_0 = "seed", "lam", "rehearse", "frozen_layers", "lr_warmup", "temperature", "replies", "retries"
LOWEST = dict.fromkeys(MAY_BE_0, 0)  # of the others: 1, or above 0
HIGHEST = {"rehearse": 1, "lr_warmup": 1, "top_p": 1, "batch": 2**16, "rank": 2**16, "workers": 2**12}
LARGEST = 2**31  # of the other numbers, so that sizes computed from them do not overflow


def check_numbers(args):
    """Returns `args` if every number in it is in its range, else raises UserError. NaN is in no range."""
    for key, value in vars(args).items():
        if type(value) in (int, float):
            low, high = LOWEST.get(key, 1 if type(value) is int else 1e-9), HIGHEST.get(key, LARGEST)
            if not low <= value <= high:
                limit = f" to {high:,}" if key in HIGHEST or value > high else " on"
                raise UserError(f"--{key.replace('_', '-')} is {value}, expected a number from {low:g}{limit}")
    return args


# ----------------------------------------------------------------------------------------------------------------------
# Errors in one line

def fail(message):
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    sys.exit(2)


def run_command(main):
    """Run a program's main() and exit with the status that it returns. A user's error is one line and status 2."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # the shell closed it: `… >&-`
            setattr(sys, name, open(os.devnull, mode))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # print a number for a character that the terminal lacks
            stream.reconfigure(errors="backslashreplace")
    try:
        status = main()
        sys.stdout.flush()  # here, so that a broken pipe is noticed below
        sys.exit(status)
    except UserError as error:
        fail(error)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the program that read our output has ended: `… | head`
        with suppress(OSError, ValueError):  # Python's last flush would fail again, so the rest goes nowhere
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:  # the disk is full, or a folder may not be read
        fail(f"{error.filename or 'a file'}: {error.strerror or error}")
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        # the CPU's allocator raises a plain RuntimeError when memory is full, and CUDA sometimes another kind
        full = isinstance(error, (torch.OutOfMemoryError, MemoryError))
        if not full and not any(words in str(error) for words in ("can't allocate memory", "out of memory")):
            raise
        fail(f"memory is full ({' '.join(str(error).split())[:150]}): lower --tokens or --batch, use --dtype bfloat16 "
             "(half the memory of float32) or --int8, or choose a smaller model or a larger device")


# ----------------------------------------------------------------------------------------------------------------------
# Device and dtype

def pick_device(name=None):
    """Returns the torch.device named cpu, cuda or cuda:N. Without a name, returns a GPU if there is one, else the CPU.

    UserError for another name, and for a GPU that this machine does not have.
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name!r}: expected cpu, cuda or cuda:N")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda needs a CUDA GPU and a PyTorch built for it; --device cpu needs neither, but is "
                        "slow")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: this machine has {torch.cuda.device_count()} GPUs, numbered from 0")
    return device


def pick_dtype(name, device):
    """Returns the dtype named float32 or bfloat16. Without a name, returns bfloat16 on a GPU and float32 on a CPU.

    UserError if the GPU has no bfloat16.
    """
    if device.type == "cuda" and name != "float32" and not torch.cuda.is_bf16_supported(
            including_emulation=False):
        raise UserError(f"{torch.cuda.get_device_name(device)} has no bfloat16: use --dtype float32")
    return getattr(torch, name or ("bfloat16" if device.type == "cuda" else "float32"))
