"""A run's log and its checkpoints.
"""
import json
import os
import shutil

from safetensors.torch import save_file
import torch

from lora import EXPERTS, TARGETS
from model import Config, Transformer
from support.files import UserError, atomic, all_finite, human_readable_size, open_safetensors, remove, shorten


REPLACED = "replaced"  # where what --overwrite replaces is kept until the first checkpoint of what replaces it


class Stopped(Exception):
    """Ctrl-C or SIGTERM came; the step was finished and saved."""


def append(log, entry):
    """One more line of log.jsonl, in one write: a kill comes before it or after it."""
    line = json.dumps(entry).encode() + b"\n"
    try:
        if log.write(line) < len(line):  # the disk took a part of it
            raise OSError("no space left on the disk")
    except OSError as error:
        raise UserError(f"{log.name}: cannot be written ({error.strerror or error}); the last checkpoint is kept. Free "
                        "some space, then --resume goes on") from None


def read_log(run):
    """[(line, entry)] of log.jsonl; a torn line, or one that is no entry, is passed over."""
    found, file = [], run / "log.jsonl"
    for line in file.read_bytes().splitlines() if file.exists() else []:
        try:
            entry = json.loads(line)
            whole = isinstance(entry["stage"], str) and isinstance(entry["step"], int)
        except (ValueError, LookupError, TypeError, RecursionError):
            continue
        found += [(line, entry)] if whole else []
    return found


def rewind_log(run, stage, done):
    """log.jsonl, open for appending, without this stage's lines after step `done` (or a torn last one)."""
    lines = [line + b"\n" for line, entry in read_log(run) if entry["stage"] != stage or entry["step"] <= done]
    file = run / "log.jsonl"
    with atomic(file) as part:
        part.write_bytes(b"".join(lines))
    return open(file, "ab", buffering=0)


def states(run, stage):
    """This stage's checkpoints, oldest first."""
    return sorted((run / "state").glob(f"{stage}-*.safetensors"))


def save_state(task, step, s, run):
    """Everything that resuming needs in one file: parameters, moments, step counts. The last s.keep of them stay."""
    tensors = {}
    for i, p in enumerate(task.parameters()):
        if not all_finite(p):
            raise UserError(f"{task.stage}, step {step}: a parameter is NaN or infinite, so nothing is saved over the "
                            "last good checkpoint. Try a lower --lr or --router-lr with --overwrite")
        tensors[f"{i}.value"] = p.detach().contiguous()
        for name, value in task.optimizer.state.get(p, {}).items():  # empty for an expert that has not trained yet
            tensors[f"{i}.{name}"] = value
    with atomic(run / "state" / f"{task.stage}-{step:07d}.safetensors") as part:
        save_file(tensors, part, metadata={"step": str(step)})
        with open(part, "rb") as file:
            os.fsync(file.fileno())
    for old in states(run, task.stage)[:-s.keep]:
        old.unlink()
    if task.stage != "pretrain":  # tiny's base; what trains on it can still fail
        remove(run / REPLACED)


@torch.no_grad()
def restore(task, run):
    """Fill parameters and optimiser from the last checkpoint -> the step it was made after; 0 without one."""
    files = states(run, task.stage)
    if task.rank == 0:
        remove(*(run / "state").glob(f"{task.stage}-*.~part"))  # what a kill has left of one
    if not files:
        return 0
    try:
        return restore_from(files[-1], task)
    except UserError as error:
        before = f"remove it, and --resume goes on from {files[-2].name}" if len(files) > 1 else \
            "remove it, and --resume begins this stage anew"
        raise UserError(f"{error}; {before}") from None


def restore_from(file, task):
    """Fill parameters and optimiser from one checkpoint -> its step. All is checked before anything is changed."""
    with open_safetensors(file) as tensors:
        found, step = set(tensors.keys()), (tensors.metadata() or {}).get("step", "")
        if not step.isascii() or not step.isdigit() or file.stem != f"{task.stage}-{int(step):07d}":
            raise UserError(f"{file}: step is {shorten(step)}, expected the one in the file's name")
        values, moments = [], []
        for i, p in enumerate(task.parameters()):
            names = [f"{i}.value", *([f"{i}.exp_avg", f"{i}.exp_avg_sq"] if f"{i}.step" in found else [])]
            if any(name not in found or tensors.get_slice(name).get_shape() != list(p.shape) for name in names):
                raise UserError(f"{file}: does not fit this run's models; use --overwrite to train anew")
            value, *rest = (tensors.get_tensor(name) for name in names)
            count = [tensors.get_tensor(f"{i}.step")] if rest else []
            if not all(t.is_floating_point() and all_finite(t) for t in (value, *rest, *count)) or count and count[0].dim():
                raise UserError(f"{file}: parameter {i} of it is not all finite floats")
            values.append(value)
            kinds = zip(("step", "exp_avg", "exp_avg_sq"), (*count, *rest))
            moments.append({name: t.to(p.device) for name, t in kinds})
    for p, value, state in zip(task.parameters(), values, moments):
        p.copy_(value)
        if state:
            task.optimizer.state[p] = state
    return int(step)


def room_for(setup, stage, s):
    """Bytes that a stage's checkpoints and its result will take, about, from the shapes alone."""
    trained = 0
    with torch.device("meta"):
        if stage != "router":
            layers = Transformer(Config.from_dir(setup.base)).named_modules()
            trained += sum(setup.rank * len(EXPERTS) * (layer.in_features + layer.out_features)
                           for name, layer in layers if name.rpartition(".")[2] in TARGETS)
        if stage != "warmup":
            trained += sum(p.numel() for p in Transformer(Config.from_dir(setup.encoder)).parameters())
    return 4 * trained * (3 * min(s["keep"], -(-s["steps"] // s["save_every"])) + 1)


def check_room(task, s, run, later=0):
    """UserError, before training, where the disk has no room for this stage's checkpoints and its result, and for the
    `later` bytes of the stages after it."""
    trained = 4 * sum(p.numel() for p in task.parameters())
    have, there = shutil.disk_usage(run).free, len(states(run, task.stage))
    checkpoints = max(1, min(s.keep + 1, -(-s.steps // s.save_every)) - there)  # the oldest goes last
    need = 3 * trained * checkpoints + trained
    if need + later > have:
        raise UserError(f"{run}: its disk has {human_readable_size(have)} free, and {task.stage} needs {human_readable_size(need)} more: "
                        f"{checkpoints} checkpoint(s) of {human_readable_size(3 * trained)} and its result"
                        + (f"; the stages after it about {human_readable_size(later)}" if later else "")
                        + ". Free some, lower --keep, or give a --run on another disk")
