"""A run's log and its checkpoints. A checkpoint is complete as soon as it has its final name; the last line of the log
may be cut off by a crash."""
import json
import math
import shutil
import sys

import torch
from safetensors.torch import save_file

from lora import EXPERTS
from model import Config, Linear, Transformer
from support.files import UserError, atomic, human_readable_size, remove, shorten
from support.weights import all_finite, open_safetensors


class Stopped(Exception):
    """Ctrl-C or SIGTERM came; the step was finished and saved."""


# ----------------------------------------------------------------------------------------------------------------------
# log.jsonl: one JSON object a step

def append_to_log(log, entry):
    """Add one line in a single write. If a crash cuts it all the same, read_log leaves it out."""
    line = json.dumps(entry).encode() + b"\n"
    try:
        if log.write(line) < len(line):
            raise OSError("no space left on the disk")
    except OSError as error:
        raise UserError(f"{log.name}: cannot be written ({error.strerror or error}); the last checkpoint is kept. Free "
                        "some space, then --resume goes on") from None


def read_log(run):
    """[(line, entry)] of a run's log. A line that a crash has cut off, or that is no entry, is left out."""
    found, file = [], run / "log.jsonl"
    for line in file.read_bytes().splitlines() if file.exists() else []:
        try:
            entry = json.loads(line)
            if isinstance(entry["stage"], str) and isinstance(entry["step"], int):
                found.append((line, entry))
        except (ValueError, LookupError, TypeError, RecursionError):
            continue
    return found


def rewind_log(run, stage_name, step):
    """Remove a stage's lines after this step, and a line that was cut off."""
    lines = [line + b"\n" for line, entry in read_log(run) if entry["stage"] != stage_name or entry["step"] <= step]
    with atomic(run / "log.jsonl") as part:
        part.write_bytes(b"".join(lines))


def open_log(run, stage_name, step):
    """The log, open for appending after this step of a stage. Says how many lines of it a crash has lost."""
    rewind_log(run, stage_name, step)
    lost = step - len({entry["step"] for _, entry in read_log(run) if entry["stage"] == stage_name})
    if lost:
        print(f"{stage_name}: {run}/log.jsonl lacks {lost} of the {step} steps that are done; a crash or "
              "an edit has lost them", file=sys.stderr)
    return open(run / "log.jsonl", "ab", buffering=0)


def check_finite(entry, record_ids, run):
    """UserError if a step's loss or gradient norm is NaN or infinite. The last checkpoint is from before that step."""
    bad = next((key for key in ("loss", "grad_norm") if not math.isfinite(entry[key])), None)
    if bad:
        kept = checkpoint_files(run, entry["stage"])[-1:]
        ids = ", ".join(id if id.isprintable() else repr(id) for id in record_ids)
        raise UserError(f"{entry['stage']}, step {entry['step']}: the {bad} is {entry[bad]}, so training ends here; "
                        f"{kept[0] if kept else 'no checkpoint'} is kept. Try a lower --lr or --router-lr with "
                        f"--overwrite, or look at this step's records: {ids}")


# ----------------------------------------------------------------------------------------------------------------------
# state/<stage>-<step>.safetensors

def checkpoint_files(run, stage_name):
    """A stage's checkpoints, the oldest first."""
    return sorted((run / "state").glob(f"{stage_name}-*.safetensors"))


def save_checkpoint(run, stage, step, keep):
    """Write everything that resuming needs to one file: parameters, moments and step counts. The last `keep` stay."""
    tensors = {}
    for i, p in enumerate(stage.parameters()):
        if not all_finite(p):
            raise UserError(f"{stage.name}, step {step}: a parameter is NaN or infinite, so no checkpoint is written. "
                            "Try a lower --lr or --router-lr with --overwrite")
        tensors[f"{i}.value"] = p.detach().contiguous()
        for name, value in stage.optimizer.state.get(p, {}).items():  # empty for an expert that has had no rows yet
            tensors[f"{i}.{name}"] = value
    with atomic(run / "state" / f"{stage.name}-{step:07d}.safetensors") as part:
        save_file(tensors, part, metadata={"step": str(step)})
    for old in checkpoint_files(run, stage.name)[:-keep]:
        old.unlink()


def load_latest_checkpoint(run, stage):
    """Fill parameters and optimiser from the last checkpoint. Returns its step, or 0 where there is none."""
    files = checkpoint_files(run, stage.name)
    if stage.rank == 0:
        remove(*(run / "state").glob(f"{stage.name}-*.~part"))  # what a kill has left of a checkpoint
    if not files:
        return 0
    try:
        return load_checkpoint(files[-1], stage)
    except UserError as error:
        way_out = f"--resume goes on from {files[-2].name}" if len(files) > 1 else "--resume starts this stage again"
        raise UserError(f"{error}; remove this file, and {way_out}; or give --overwrite") from None


@torch.no_grad()
def load_checkpoint(file, stage):
    """Fill parameters and optimiser from one checkpoint. Everything is checked before anything is changed."""
    with open_safetensors(file) as tensors:
        names, step = set(tensors.keys()), (tensors.metadata() or {}).get("step", "")
        if not step.isascii() or not step.isdigit() or file.stem != f"{stage.name}-{int(step):07d}":
            raise UserError(f"{file}: step is {shorten(step)}, expected the one in the file's name")
        values, states = [], []
        for i, p in enumerate(stage.parameters()):
            shapes = {"value": list(p.shape)}
            if f"{i}.step" in names:
                shapes |= {"exp_avg": list(p.shape), "exp_avg_sq": list(p.shape), "step": []}
            if any(f"{i}.{key}" not in names or tensors.get_slice(f"{i}.{key}").get_shape() != shape
                   for key, shape in shapes.items()):
                raise UserError(f"{file}: parameter {i} does not fit this run's models")
            state = {key: tensors.get_tensor(f"{i}.{key}") for key in shapes}
            if not all(t.is_floating_point() and all_finite(t) for t in state.values()):
                raise UserError(f"{file}: parameter {i} has values that are no finite floats")
            values.append(state.pop("value"))
            states.append({key: t.to(p.device) for key, t in state.items()})  # fused AdamW wants "step" there, too
    for p, value, state in zip(stage.parameters(), values, states):
        p.copy_(value)
        if state:
            stage.optimizer.state[p] = state
    return int(step)


# ----------------------------------------------------------------------------------------------------------------------
# Room on the disk

def trained_parameters(setup, stage):
    """How many parameters a stage trains, from the models' config.json alone; without the ten v_e, which are few."""
    n = 0
    with torch.device("meta"):  # shapes only: takes no memory
        if stage != "router":
            layers = Transformer(Config.from_dir(setup.base)).modules()
            widths = sum(layer.in_features + layer.out_features for layer in layers if isinstance(layer, Linear))
            n += setup.rank * len(EXPERTS) * widths
        if stage != "warmup":
            n += sum(p.numel() for p in Transformer(Config.from_dir(setup.encoder)).parameters())
    return n


def disk_space_needed(setup, settings):
    """Bytes that checkpoints and results of these stages, {stage: settings}, will add to the run folder at most."""
    most = kept = 0
    for stage, s in settings.items():
        result = 4 * trained_parameters(setup, stage)
        checkpoint = 3 * result  # values and two moments
        there, written = len(checkpoint_files(setup.run, stage)), math.ceil(s["steps"] / s["save_every"])
        at_once = max(1, min(s["keep"] + 1, written) - there)  # the oldest is removed after the newest is written
        most = max(most, kept + at_once * checkpoint + result)
        kept += max(0, min(s["keep"], written) - there) * checkpoint + result
    return most


def check_disk_space(setup, settings):
    """UserError, before training, if the disk has no room for the checkpoints and results of these stages."""
    need, free = disk_space_needed(setup, settings), shutil.disk_usage(setup.run).free
    if need > free:
        raise UserError(f"{setup.run}: its disk has {human_readable_size(free)} free, and checkpoints and results of "
                        f"{', '.join(settings)} need {human_readable_size(need)}. Free some space, lower --keep, or "
                        "give a --run on another disk")
