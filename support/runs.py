"""A run: presets, where its models, data and results are, what it was begun with, its log and its checkpoints.

What is notable:
- a run folder remembers what it was begun with: arguments, and fingerprints of models and data. What differs is refused
- a checkpoint is one file, written under another name and renamed: nobody ever sees half of one
- config.json names what is inside the run folder relative to it, so a run can be moved

train.py makes runs; eval.py and what stands on it opens them.
"""
import hashlib
import json
import os
import shutil
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from lora import add_experts, load_experts
from model import Transformer
from router import Router, load_router
from support.checkpoints import REPLACED, rewind_log, states
from support.command import MOST, pick_device, pick_dtype
from support.files import UserError, atomic, open_safetensors, read_bytes, read_json, remove, shorten, weight_files
from support.records import SPLITS, load_data, record_lines, write_records
from synth import template_records

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


VERSION = 2  # of the run folder's format
STAGES = ("warmup", "router", "joint")
# What each preset is made of, and each stage's sizes: optimiser steps, rows a step, learning rates (all ours). "tokens"
# is the most that a micro-batch holds, padding included.
PRESETS = {
    "paper": dict(
        base=("weights/Llama-3.1-8B-Instruct",), encoder=("weights/Qwen2.5-0.5B",), data="data/personafuse.jsonl",
        tokens=8192, eval_records=500,
        warmup=dict(steps=3000, batch=64, lr=2e-4), router=dict(steps=2300, batch=128, router_lr=2e-5),
        joint=dict(steps=1500, batch=64, lr=1e-4, router_lr=1e-5)),
    "small": dict(
        base=("weights/SmolLM2-135M-Instruct",),
        encoder=("weights/Qwen2.5-0.5B", "weights/Qwen2.5-Coder-0.5B-Instruct"), data=None, records=(8000, 400, 400),
        tokens=2048, eval_records=100,
        warmup=dict(steps=100, batch=20, lr=1e-3), router=dict(steps=60, batch=16, router_lr=5e-5),
        joint=dict(steps=40, batch=16, lr=5e-4, router_lr=2e-5)),
    "tiny": dict(
        base=(), encoder=(), data=None, records=(8000, 400, 600), tokens=4096, eval_records=200,
        pretrain=dict(steps=200, batch=20, lr=4e-3),
        warmup=dict(steps=100, batch=16, lr=1e-2), router=dict(steps=100, batch=40, router_lr=2e-3),
        joint=dict(steps=60, batch=16, lr=5e-3, router_lr=5e-4)),
}
DOWNLOADS = {
    "Llama-3.1-8B-Instruct": "hf auth login && hf download meta-llama/Llama-3.1-8B-Instruct --exclude \"original/*\"",
    "Qwen2.5-0.5B": "hf download Qwen/Qwen2.5-0.5B",
    "SmolLM2-135M-Instruct": "hf download HuggingFaceTB/SmolLM2-135M-Instruct",
}


# ----------------------------------------------------------------------------------------------------------------------
# A run: its folder, models and data

@dataclass
class Setup:
    """Where a run's models, data and results are, and how to load them. eval.py makes it from the run's config.json."""
    run: Path
    preset: str
    base: str | None
    encoder: str | None
    data: str | None
    device: torch.device
    dtype: torch.dtype
    seed: int
    tau: float
    rank: int
    alpha: float
    tokens: int
    eval_records: int

    RUN = "{run}/"  # how config.json writes paths inside the run folder, so that a run can be moved
    AGREE = ("preset", "base", "encoder", "data", "seed", "rank", "alpha")  # must be the same for all stages of a run

    @staticmethod
    def inside(path, run):
        """A path as config.json has it -> as it is now that the run folder is `run`."""
        return f"{run}/{path.removeprefix(Setup.RUN)}" if path and path.startswith(Setup.RUN) else path

    def relative(self, path):
        """The reverse of `inside`."""
        return Setup.RUN + path.removeprefix(f"{self.run}/") if path and path.startswith(f"{self.run}/") else path

    def load_base(self, experts=None):
        """The frozen base with ten experts, fresh ones from the seed or those saved in the folder `experts`."""
        model = Transformer.from_pretrained(self.base, self.dtype, self.device)
        if self.rank > model.config.dim:
            raise UserError(f"--rank is {self.rank}, expected at most the base's width, {model.config.dim}")
        torch.manual_seed(self.seed)
        add_experts(model, rank=self.rank, alpha=self.alpha)
        if experts is not None:
            load_experts(model, experts)
        return model

    def load_router(self, folder=None):
        """The router, fp32, from the public encoder or as saved in `folder`."""
        encoder = Transformer.from_pretrained(self.encoder, torch.float32, self.device)
        torch.manual_seed(self.seed)
        router = Router(encoder, self.tau)
        if folder is not None:
            load_router(router, folder)
        return router

    def load_data(self, need_response=True):
        """{split: records}. The template teacher's are made where they are missing or torn: same seed, same text."""
        if Path(self.data) == self.run / "data":
            counts = PRESETS[self.preset]["records"]
            try:
                torn = [len(records) for records in load_data(self.data)[0].values()] != list(counts)
            except UserError:
                torn = True
            for name, count in zip(SPLITS, counts) if torn else ():
                file, records = self.run / "data" / f"{name}.jsonl", template_records(name, count, self.seed)
                if file.exists() and not record_lines(records).startswith(read_bytes(file)):
                    raise UserError(f"{file}: neither the template teacher's records of seed {self.seed} nor a part of "
                                    "them. Remove it to have them made again; records of your own go in with --data")
                write_records(file, records)
        splits, zero = load_data(self.data, self.seed, need_response)
        if zero:
            print(f"{self.data}: left out {zero} records whose traits are all zero")
        return splits

    def stage_folder(self, part):
        """Where the latest experts ("experts") or router ("router") of this run are, or None."""
        first = "warmup" if part == "experts" else "router"
        return next((self.run / s / part for s in ("joint", first) if (self.run / s / part).is_dir()), None)


def resolve(args, stages):
    """The Setup that the arguments ask for. One UserError names everything that is missing, and how to get it."""
    preset, problems = PRESETS[args.preset], []
    run = Path(f"runs/{args.preset}" if args.run is None else args.run)

    def model_folder(given, choices, role):
        if args.preset == "tiny" and given is None:
            return str(run / "models" / role)
        folder = next((f for f in ((given,) if given else choices) if Path(f).is_dir()), given or choices[0])
        name = Path(folder).name
        if not Path(folder).is_dir():
            how = f": {DOWNLOADS[name]} --local-dir {folder}" if name in DOWNLOADS else ""
            problems.append(f"{folder}, the {role}'s model folder{how}")
        elif not given and folder != choices[0]:
            print(f"{choices[0]} is not here; the encoder is {folder}, of the same shape")
        return folder

    base = model_folder(args.base, preset["base"], "base") if set(stages) & {"warmup", "joint"} else None
    encoder = model_folder(args.encoder, preset["encoder"], "encoder") if set(stages) & {"router", "joint"} else None
    data = args.data or preset["data"] or str(run / "data")
    if not Path(data).exists() and data != str(run / "data"):
        problems.append(f"{data}, the training records: python synth.py --teacher template --out {data} --count 20000")
    device = dtype = None
    try:
        device = pick_device(args.device or {"paper": "cuda", "tiny": "cpu"}.get(args.preset))
        dtype = pick_dtype(args.dtype, device)
    except UserError as error:
        problems.append(str(error))
    if problems:
        what = args.stage if args.stage != "all" else "stages"
        raise UserError(f"preset {args.preset}, {what}: missing\n" + "".join(f"  - {p}\n" for p in problems)
                        + "python train.py --preset tiny --stage all runs without any of it")
    return Setup(run, args.preset, base, encoder, data, device, dtype, args.seed, args.tau, args.rank,
                 args.alpha, args.tokens or preset["tokens"], args.eval_records or preset["eval_records"])


def stage_settings(args, stage, dtype=None):
    """What a stage trains with: the command line's values, else the preset's. dtype: the base's."""
    s = PRESETS[args.preset][stage] | {"tokens": PRESETS[args.preset]["tokens"]}
    s |= {k: v for k in ("steps", "batch", "lr", "router_lr", "tokens")
          if (v := getattr(args, k)) is not None and k in s}
    for key in ("seed", "clip", "lr_warmup", "save_every", "keep", "log_every", "recompute", "compile"):
        s[key] = getattr(args, key)
    if stage in ("warmup", "joint"):
        s["dtype"] = str(dtype).removeprefix("torch.")
    if stage in ("router", "joint"):
        s["contrastive_tau"] = args.contrastive_tau
    if stage == "joint":
        s |= {"lam": args.lam, "tau": args.tau, "joint_gate": args.joint_gate}
    return s


# ----------------------------------------------------------------------------------------------------------------------
# Begin, continue or refuse

@contextmanager
def lock(run):
    """Keep a run folder to this process: a second one that trains in it would write over the first one's files."""
    folder = None
    if fcntl is not None:  # without such locks, on Windows, it goes unnoticed
        folder = os.open(run, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(folder)
            raise UserError(f"{run}: another process trains here; wait for it, or give another --run") from None
        except OSError:  # a file system without them
            pass
    try:
        yield
    finally:
        if folder is not None:
            os.close(folder)


HARMLESS = ("save_every", "keep", "log_every", "recompute")  # may change from one part of a run to the next


def differences(was, now):
    """What differs between two dicts of settings, in words; None is "not given", and agrees with anything."""
    return "; ".join(f"{k} was {was.get(k)!r} and is now {v!r}" for k, v in now.items()
                     if k not in HARMLESS and None not in (was.get(k), v) and was.get(k) != v)


def is_path(value):
    return isinstance(value, str) and value != "" and "\0" not in value


KINDS = {  # what the setup in a run's config.json holds
    "preset": lambda v: isinstance(v, str) and v in PRESETS, "data": is_path,
    "base": lambda v: v is None or is_path(v), "encoder": lambda v: v is None or is_path(v),
    "seed": lambda v: type(v) is int and 0 <= v <= 2**31, "rank": lambda v: type(v) is int and 1 <= v <= MOST["rank"],
    "alpha": lambda v: type(v) in (int, float) and 0 < v <= 2**31}


def read_run(run):
    """A run folder's config.json -> dict. UserError for what another version, or a hand, has made of it."""
    file = Path(run) / "config.json"
    found = read_json(file)
    if "version" not in found:
        raise UserError(f"{file}: not a run's, it has no version; give --run a folder that train.py made")
    if found["version"] != VERSION or not all(isinstance(found.get(k), dict) for k in ("setup", "stages")):
        raise UserError(f"{file}: format {shorten(found['version'])}, expected {VERSION}: made by another version")
    setup, stages = found["setup"], found["stages"]
    for key in sorted(setup.keys() | KINDS):
        if key not in KINDS or not KINDS[key](setup.get(key)):
            raise UserError(f"{file}: {key} of setup is {shorten(setup.get(key))}, which no run has. Was it edited?")
    for stage, settings in stages.items():
        tau = settings.get("tau", 1.0) if isinstance(settings, dict) else None
        if stage not in STAGES or type(tau) not in (int, float) or not 1e-9 <= tau <= 2**31:
            raise UserError(f"{file}: stage {shorten(stage)} is {shorten(settings)}, which no run has. Was it edited?")
    if not isinstance(found.get("content", {}), dict):
        raise UserError(f"{file}: content is {shorten(found['content'])}, expected an object")
    return found


def fingerprint(path):
    """What a model folder or data hold, as a short text: a hash of config.json, tokenizer, chat template and a
    sample of every tensor (the same for one file and for shards); or of the records."""
    path, digest = Path(path), hashlib.sha256()
    if not (path / "config.json").exists():
        for file in [path / f"{split}.jsonl" for split in SPLITS] if path.is_dir() else [path]:
            digest.update(hashlib.sha256(read_bytes(file)).digest())
        return digest.hexdigest()[:16]
    digest.update(json.dumps(read_json(path / "config.json"), sort_keys=True).encode())
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (path / name).exists():
            digest.update(hashlib.sha256(read_bytes(path / name)).digest())
    samples = {}
    for file, names in weight_files(path).items():
        with open_safetensors(file) as tensors:
            for name in set(tensors.keys()) & set(tensors.keys() if names is None else names):
                part = tensors.get_slice(name)
                shape = part.get_shape()
                values = part[shape[0] // 2:shape[0] // 2 + 1] if shape else torch.zeros(0)  # the row in the middle
                samples[name] = f"{name}{shape}".encode() + values.contiguous().view(torch.uint8).numpy().tobytes()
    for name in sorted(samples):
        digest.update(samples[name])
    return digest.hexdigest()[:16]


def same_content(setup, was, inside):
    """What config.json holds of fingerprints, and those of what the run takes from outside its folder; or of what is
    inside, which the run makes from the seed -> both. UserError if what is there is not what was."""
    paths = {key: path for key in ("base", "encoder", "data") if (path := getattr(setup, key))}
    found = {key: fingerprint(path) for key, path in paths.items() if path.startswith(f"{setup.run}/") == inside}
    for key in found.keys() & was.keys():
        if found[key] != was[key]:
            raise UserError(f"{paths[key]}: not the {key} that {setup.run} was begun with: what is in it has changed "
                            f"(its fingerprint was {shorten(was[key])}, now {found[key]!r}). Put back what was there, or "
                            "give another --run")
    return was | found


def note_content(setup):
    """The same for models and data inside the run folder, once they are made; config.json takes a note of them."""
    found = read_run(setup.run)
    noted = same_content(setup, found.get("content", {}), inside=True)
    if noted != found.get("content"):
        write_config(setup.run, found | {"content": noted})


def write_config(run, config):
    with atomic(run / "config.json") as part:
        part.write_text(json.dumps(config, indent=2) + "\n")


def open_run(setup, settings, args):
    """Begin, continue or refuse a run folder; write its config.json -> the stages that are still to be trained."""
    run, file = setup.run, setup.run / "config.json"
    own = {k: getattr(setup, k) for k in Setup.AGREE}
    own |= {k: setup.relative(own[k]) for k in ("base", "encoder", "data")}
    if "joint" in settings and (args.overwrite or not (run / "joint").is_dir()):
        for stage in ("warmup", "router"):
            if stage not in settings and not (run / stage).is_dir():
                raise UserError(f"{run}: the joint stage starts from warmup and router, and {stage} is not done here: "
                                f"python train.py --preset {setup.preset} --stage {stage} --run {run} first")
    if not file.exists():
        if args.resume:
            raise UserError(f"{run}: no config.json, so there is no run to resume; without --resume one is begun here")
        if run.exists() and (not run.is_dir() or any(run.iterdir())):
            raise UserError(f"{run} is there already and holds no run: choose another --run, or remove it")
        found = {"version": VERSION, "setup": own, "stages": {}, "content": same_content(setup, {}, inside=False)}
    else:
        found = read_run(run)
        # later stages were built on the first one that is trained anew
        anew = STAGES[STAGES.index(next(iter(settings))):] if args.overwrite else ()
        found["stages"] = {stage: was for stage, was in found["stages"].items() if stage not in anew}
        differ = differences(found["setup"], own) if found["stages"] or not args.overwrite else ""
        if differ:
            raise UserError(f"{run} was begun with other arguments: {differ}. Give the same or another --run")
        was = found.get("content", {}) if found["stages"] or not args.overwrite else {}
        found["content"] = same_content(setup, was, inside=False)
        found["setup"] = own if not found["stages"] and args.overwrite else found["setup"] | {
            k: v for k, v in own.items() if v is not None}
    begun = [stage for stage in settings if stage in found["stages"]]
    for stage in begun:
        differ = differences(found["stages"][stage], settings[stage])
        if differ:
            raise UserError(f"{run}: {stage} was begun with other settings: {differ}. Give the same to go on with "
                            "--resume, or --overwrite to train anew")
    to_do = [stage for stage in settings if not (run / stage).is_dir()]
    if begun and to_do and not args.resume:
        raise UserError(f"{run} holds a run (begun: {', '.join(begun)}; not done: {', '.join(to_do)}): --resume goes "
                        "on with it, --overwrite trains anew")
    if args.overwrite and file.exists():
        set_aside(run, anew if found["stages"] else (*anew, "pretrain", "models", "data", "tokens"))
    try:
        write_config(run, found | {"stages": found["stages"] | settings})
    except UserError:
        put_back(run)
        raise
    return remaining(setup, settings)


def unbegin(run, stages, config):
    """Leave a run as it was, if an error came before anything of it was saved: config is what config.json held."""
    if any(states(run, stage) or (run / stage).exists() for stage in stages):
        return
    if (run / REPLACED).exists():
        return put_back(run)
    logged = (run / "log.jsonl").is_file() and (run / "log.jsonl").stat().st_size
    if config is not None:
        with atomic(run / "config.json") as part:
            part.write_bytes(config)
    elif not logged and {path.name for path in run.iterdir()} <= {"config.json", "log.jsonl", "state", "tokens"}:
        remove(run)


def remaining(setup, settings):
    """Take what the run folder's config.json says of models -> the stages that are still to be trained."""
    found = read_run(setup.run)["setup"]  # the closing may need what another stage was given
    setup.base, setup.encoder = (Setup.inside(found[k], setup.run) for k in ("base", "encoder"))
    return [stage for stage in settings if not (setup.run / stage).is_dir()]


def set_aside(run, names):
    """Move stages' (or other) folders and checkpoints to replaced/, and their lines out of the log."""
    aside = run / REPLACED
    put_back(run)  # where a kill came before the first checkpoint
    (aside / "state").mkdir(parents=True)
    for name in ("config.json", "log.jsonl"):
        if (run / name).is_file():
            shutil.copy2(run / name, aside)
    for name in names:
        for path in (run / name, *states(run, name)):
            if path.exists():
                os.replace(path, aside / path.relative_to(run))
        if (run / "log.jsonl").exists():
            rewind_log(run, name, 0).close()


def put_back(run):
    """The reverse of set_aside, where it was done."""
    aside = run / REPLACED
    for path in [*aside.glob("state/*"), *(path for path in aside.glob("*") if path.name != "state")]:
        there = run / path.relative_to(aside)
        remove(there)
        os.replace(path, there)
    remove(aside, *(run / "state").glob("*.~part") if aside.exists() else ())
