"""A run folder: presets, the paths of models and data, config.json, and the decision to start, continue or refuse.

config.json holds the settings of a run and fingerprints of its models and data. A command with other settings is
refused; the message says what differs. Paths inside the run folder are stored relative to it, so that a run can be
moved.
"""
import hashlib
import itertools
import json
import os
import shutil
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from lora import add_experts, load_experts
from model import Transformer
from router import Router, load_router
from support.checkpoints import checkpoint_files, read_log
from support.command import pick_device, pick_dtype
from support.files import UserError, atomic, check_settings, read_bytes, read_json, shorten
from support.records import SPLITS, load_data, record_lines, write_records
from synth import template_records

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

VERSION = 4  # of the run folder's format
STAGES = ("warmup", "router", "joint")

# What each preset is made of, and each stage's sizes: optimiser steps, rows a step, learning rates (all ours). base,
# encoder and data: the first folder or file that is there. records: how many the template teacher writes for each
# split. tokens: the most that a micro-batch holds, padding included. device None: a GPU if there is one.
PRESETS = {
    "paper": dict(
        device="cuda", base=("weights/Llama-3.1-8B-Instruct",), encoder=("weights/Qwen2.5-0.5B",),
        data=("data/personafuse.jsonl", "data/personacot.jsonl"), records=(20000, 1000, 1000), tokens=8192,
        eval_records=500,
        warmup=dict(steps=3000, batch=64, lr=2e-4), router=dict(steps=2300, batch=128, router_lr=2e-5, frozen_layers=0),
        joint=dict(steps=1500, batch=64, lr=1e-4, router_lr=1e-5, frozen_layers=0)),
    "small": dict(
        device=None, base=("weights/SmolLM2-135M-Instruct",),
        encoder=("weights/Qwen2.5-0.5B", "weights/Qwen2.5-Coder-0.5B-Instruct"),
        data=("data/personacot.jsonl",), records=(8000, 400, 400), tokens=2048, eval_records=100,
        warmup=dict(steps=100, batch=20, lr=1e-3), router=dict(steps=200, batch=16, router_lr=1e-4, frozen_layers=12),
        joint=dict(steps=40, batch=16, lr=5e-4, router_lr=2e-5, frozen_layers=12)),
    "tiny": dict(
        device="cpu", base=(), encoder=(), data=(), records=(8000, 400, 600), tokens=4096, eval_records=200,
        pretrain=dict(steps=450, batch=20, lr=4e-3),
        warmup=dict(steps=100, batch=16, lr=1e-2), router=dict(steps=300, batch=40, router_lr=2e-3, frozen_layers=0),
        joint=dict(steps=100, batch=16, lr=5e-3, router_lr=5e-4, frozen_layers=0)),
}
DOWNLOADS = {
    "Llama-3.1-8B-Instruct": "hf auth login && hf download meta-llama/Llama-3.1-8B-Instruct --exclude \"original/*\"",
    "Qwen2.5-0.5B": "hf download Qwen/Qwen2.5-0.5B",
    "SmolLM2-135M-Instruct": "hf download HuggingFaceTB/SmolLM2-135M-Instruct",
}


# ----------------------------------------------------------------------------------------------------------------------
# A run's models and data

@dataclass
class Setup:
    """Where a run's models, data and results are, and how to load them."""
    run: Path
    preset: str
    base: str | None
    encoder: str | None
    data: str | None
    device: torch.device
    dtype: torch.dtype | None  # the base's; None, in an export, for each tensor's own
    seed: int
    tau: float
    rank: int
    alpha: float
    tokens: int
    eval_records: int
    int8: bool | None = None   # the base's linear layers in 8 bits; None for stages that need no base

    INSIDE = "{run}/"  # what a path inside the run folder begins with in config.json
    SHARED = ("preset", "base", "encoder", "data", "seed", "rank", "alpha", "int8")  # the same for all stages of a run

    @staticmethod
    def restore_path(path, run):
        """A path stored in config.json, with {run}/ replaced by the run folder."""
        return f"{run}/{path.removeprefix(Setup.INSIDE)}" if path and path.startswith(Setup.INSIDE) else path

    def stored_path(self, path):
        """The reverse of `restore_path`."""
        inside = path and path.startswith(f"{self.run}/")
        return Setup.INSIDE + path.removeprefix(f"{self.run}/") if inside else path

    def shared(self):
        """The settings that all stages of a run share, as config.json stores them."""
        settings = {key: getattr(self, key) for key in Setup.SHARED}
        return settings | {key: self.stored_path(settings[key]) for key in ("base", "encoder", "data")}

    def load_base(self, experts=None):
        """The frozen base with ten experts: fresh ones drawn from the seed, or those saved in the folder `experts`."""
        model = Transformer.from_pretrained(self.base, self.dtype, self.device, int8=bool(self.int8))
        if self.rank > model.config.dim:
            raise UserError(f"--rank is {self.rank}, expected at most the base's width, {model.config.dim}")
        torch.manual_seed(self.seed)
        add_experts(model, rank=self.rank, alpha=self.alpha)
        if experts is not None:
            load_experts(model, experts)
        return model

    def load_router(self, folder=None):
        """The router in fp32, from the public encoder or as saved in `folder`."""
        encoder = Transformer.from_pretrained(self.encoder, torch.float32, self.device, head=False)
        torch.manual_seed(self.seed)
        router = Router(encoder, self.tau)
        if folder is not None:
            load_router(router, folder)
        return router

    def load_data(self, need_response=True, needed=SPLITS):
        """{split: records} that have an active trait. UserError if a split that is `needed` has none."""
        self.write_template_data()
        splits, zero = load_data(self.data, self.seed, need_response, needed)
        if zero:
            print(f"{self.data}: left out {zero} records whose traits are all zero")
        return splits

    def write_template_data(self):
        """Write the template teacher's records, if the run takes these and they are missing or incomplete."""
        if Path(self.data) != self.run / "data":
            return
        counts = PRESETS[self.preset]["records"]
        with suppress(UserError):  # missing or cut off
            if [len(records) for records in load_data(self.data)[0].values()] == list(counts):
                return
        for name, count in zip(SPLITS, counts):
            file, records = self.run / "data" / f"{name}.jsonl", template_records(name, count, self.seed)
            if file.exists() and not record_lines(records).startswith(read_bytes(file)):
                raise UserError(f"{file}: neither the template teacher's records of seed {self.seed} nor a part of "
                                "them. Remove it to have them made again; records of your own go in with --data")
            write_records(file, records)

    def stage_folder(self, part):
        """Where the latest "experts" or "router" of this run are, or None."""
        first = "warmup" if part == "experts" else "router"
        return next((self.run / s / part for s in ("joint", first) if (self.run / s / part).is_dir()), None)


def make_setup(args, stages):
    """The Setup that the arguments ask for. One UserError names everything that is missing and how to get it."""
    preset, problems = PRESETS[args.preset], []
    run = Path(f"runs/{args.preset}" if args.run is None else args.run)
    if run.name in ("", ".."):  # --overwrite renames the folder, so it needs a name
        run = run.resolve()

    def model_folder(given, choices, role):
        if args.preset == "tiny" and given is None:
            return str(run / "models" / role)
        choices = (given,) if given else choices
        present = [folder for folder in choices if Path(folder).is_dir()]
        folder = present[0] if present else choices[0]
        name = Path(folder).name
        if not present:
            how = f": {DOWNLOADS[name]} --local-dir {folder}" if name in DOWNLOADS else ""
            problems.append(f"{folder}, the {role}'s model folder{how}")
        elif folder != choices[0]:
            print(f"{choices[0]} is not here; the encoder is {folder}, of the same shape")
        return folder

    base = model_folder(args.base, preset["base"], "base") if set(stages) & {"warmup", "joint"} else None
    encoder = model_folder(args.encoder, preset["encoder"], "encoder") if set(stages) & {"router", "joint"} else None
    choices = (args.data,) if args.data else preset["data"]
    if args.data == "template" or not choices:
        data = str(run / "data")  # the template teacher's records; write_template_data writes them
    else:
        data = next((file for file in choices if Path(file).exists()), choices[0])
        if not Path(data).exists():
            problems.append(f"{data}, the training records; --data template takes the template teacher's")
        elif data != choices[0]:
            print(f"{choices[0]} is not here; the records are {data}")
    device = dtype = None
    try:
        device = pick_device(args.device or preset["device"])
        dtype = pick_dtype(args.dtype, device)
    except UserError as error:
        problems.append(str(error))
    if problems:
        what = args.stage if args.stage != "all" else "stages"
        raise UserError(f"preset {args.preset}, {what}: missing\n" + "".join(f"  - {p}\n" for p in problems)
                        + "python train.py --preset tiny --stage all runs without any of it")
    return Setup(run, args.preset, base, encoder, data, device, dtype, args.seed, args.tau, args.rank,
                 args.alpha, args.tokens or preset["tokens"], args.eval_records or preset["eval_records"],
                 args.int8 if base else None)


def stage_settings(args, stage, dtype=torch.float32):
    """The settings of one stage: the command line's values, else the preset's. dtype: the base's; bfloat16
    also means autocast."""
    s = PRESETS[args.preset][stage] | {"tokens": PRESETS[args.preset]["tokens"],
                                       "dtype": str(dtype).removeprefix("torch.")}
    for key in ("steps", "batch", "lr", "router_lr", "tokens", "frozen_layers"):
        if key in s and getattr(args, key) is not None:
            s[key] = getattr(args, key)
    for key in ("seed", "clip", "lr_warmup", "save_every", "keep", "log_every", "recompute", "compile"):
        s[key] = getattr(args, key)
    if stage in ("router", "joint"):
        s["contrastive_tau"] = args.contrastive_tau
    if stage == "joint":
        s |= {"lam": args.lam, "tau": args.tau, "joint_gate": args.joint_gate, "rehearse": args.rehearse}
    return s


# ----------------------------------------------------------------------------------------------------------------------
# config.json

# What config.json may hold under setup, for check_settings: {key: allowed values}
SETUP_VALUES = {"preset": (*PRESETS,), "base": (str, None), "encoder": (str, None), "data": (str,), "seed": (0, int),
                "rank": (int,), "alpha": (float,), "int8": (True, False, None)}


def read_run(run):
    """A run folder's config.json, {"version", "setup", "fingerprints", "stages"}. UserError for another format, and for
    a setup, names of stages or a τ that train.py never writes."""
    file = Path(run) / "config.json"
    config = read_json(file)
    if "version" not in config:
        raise UserError(f"{file}: not a run's, it has no version; give --run a folder that train.py made")
    if config["version"] != VERSION:
        raise UserError(f"{file}: version is {shorten(config['version'])}, expected {VERSION}: another version of this "
                        "program made the run. Give another --run")
    check_settings(file, config, dict.fromkeys(("setup", "fingerprints", "stages"), (dict,)))
    check_settings(file, config["setup"], SETUP_VALUES)
    unknown = (config["setup"].keys() - SETUP_VALUES.keys()) | (config["stages"].keys() - set(STAGES))
    if unknown:
        raise UserError(f"{file}: {min(unknown)!r} is no setting or stage of a run. Was the file edited?")
    # a run from before --int8 has its base in full
    config["setup"].setdefault("int8", False if config["setup"].get("base") else None)
    check_settings(file, config["stages"], dict.fromkeys(config["stages"], (dict,)))
    for settings in config["stages"].values():
        check_settings(file, settings, {"tau": (float, None)})
    return config


def write_config(run, config):
    with atomic(run / "config.json") as part:
        part.write_text(json.dumps(config, indent=2) + "\n")


MAY_CHANGE = ("save_every", "keep", "log_every", "recompute")  # they change no result


def differences(was, now):
    """What differs between two dicts of settings, as text. None means "not given" and agrees with anything."""
    return "; ".join(f"{k} was {was.get(k)!r} and is now {v!r}" for k, v in now.items()
                     if k not in MAY_CHANGE and None not in (was.get(k), v) and was.get(k) != v)


def fingerprint(path):
    """A short hash of a model folder (configuration, tokenizer, weights) or of records (a file or a folder of splits).

    Of a safetensors file it reads the size and the first and last MiB: the names and shapes of all tensors and a part
    of their values.
    """
    path, digest = Path(path), hashlib.sha256()
    if (path / "config.json").exists():
        names = "config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
        files = [path / name for name in names if (path / name).exists()] + sorted(path.glob("*.safetensors"))
    else:
        files = [path / f"{split}.jsonl" for split in SPLITS] if path.is_dir() else [path]
    for file in files:
        digest.update(f"{file.name}\n".encode())
        if file.suffix != ".safetensors":
            digest.update(read_bytes(file))
            continue
        with open(file, "rb") as weights:
            size = weights.seek(0, os.SEEK_END)
            digest.update(str(size).encode())
            for at in (0, max(0, size - 2**20)):
                weights.seek(at)
                digest.update(weights.read(2**20))
    return digest.hexdigest()[:16]


def check_fingerprints(setup):
    """UserError if the models or data are not those that the run was started with. Fingerprints of models and data that
    are used for the first time are added to config.json."""
    found = read_run(setup.run)
    paths = {key: path for key in ("base", "encoder", "data") if (path := getattr(setup, key)) and Path(path).exists()}
    now = {key: fingerprint(path) for key, path in paths.items()}
    for key in now.keys() & found["fingerprints"].keys():
        differ = differences({key: found["fingerprints"][key]}, {key: now[key]})
        if differ:
            raise UserError(f"{paths[key]}: not the {key} that {setup.run} was started with: its content has changed "
                            f"(fingerprint of {differ}). Restore what was there, or give another --run")
    if found["fingerprints"] | now != found["fingerprints"]:
        write_config(setup.run, found | {"fingerprints": found["fingerprints"] | now})


# ----------------------------------------------------------------------------------------------------------------------
# Start, continue or refuse

@contextmanager
def lock(run):
    """Keep other processes from training in this run folder. UserError if one does already."""
    if fcntl is None:  # Windows has no such locks: a second process goes unnoticed
        yield
        return
    folder = os.open(run, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{run}: another process trains here; wait for it, or give another --run") from None
        except OSError:
            pass  # some file systems have no locks
        yield
    finally:
        os.close(folder)


def has_begun(run, stage):
    """Whether anything of a stage was saved or logged."""
    return bool((run / stage).exists() or checkpoint_files(run, stage)
                or any(entry["stage"] == stage for _, entry in read_log(run)))


def open_run(setup, settings, args, locks):
    """Start, continue or refuse a run, and write its config.json. Returns the stages still to be trained.

    settings: {stage: settings} of the stages asked for. locks: an ExitStack that keeps the lock on the folder.
    Settings are checked before anything is written or moved; models and data are checked later, by check_fingerprints.
    """
    run, prepared = setup.run, setup.run.with_name(setup.run.name + ".~part")
    if not run.exists() and (prepared / "config.json").exists():  # killed between the two renames of move_aside
        os.replace(prepared, run)
    if args.resume and not (run / "config.json").exists():
        raise UserError(f"{run}: no config.json, so there is no run to resume; without --resume one is started here")
    if not (run / "config.json").exists() and run.exists() and (
            not run.is_dir() or any(path.name != "config.json.~part" for path in run.iterdir())):
        raise UserError(f"{run} is there already and holds no run: choose another --run, or remove it")
    if [*settings] == ["joint"] and (args.overwrite or not (run / "joint").is_dir()):
        for stage in unfinished_stages(run, ("warmup", "router")):
            raise UserError(f"{run}: joint starts from the results of warmup and router, and {stage} is not done here: "
                            f"python train.py --preset {setup.preset} --stage {stage} --run {run} first")
    run.mkdir(parents=True, exist_ok=True)
    locks.enter_context(lock(run))

    # The settings to compare with: those of the stages that have begun and stay. --overwrite keeps only the stages
    # before the first one asked for; without it, all stay. If no stage stays, the old settings count only while models
    # or data made with them are still used: --overwrite makes these again, too.
    config = read_run(run) if (run / "config.json").exists() else {}
    begun_before = [stage for stage in config.get("stages", {}) if has_begun(run, stage)]
    if config and not {"warmup", "joint"} & {*begun_before}:  # what belongs to the base may still change
        config["setup"] |= dict.fromkeys(("base", "rank", "alpha", "int8"))
        config["fingerprints"].pop("base", None)
    kept = STAGES[:STAGES.index(next(iter(settings)))] if args.overwrite else STAGES
    stages = {stage: s for stage, s in config.get("stages", {}).items() if stage in kept and stage in begun_before}
    started_before = bool(config)
    if not stages and (args.overwrite or not any((run / name).exists() for name in ("models", "data"))):
        config = {}
    shared = setup.shared()
    differ = differences(config.get("setup", {}), shared)
    if differ:
        raise UserError(f"{run} was started with other settings: {differ}. Give the same or another --run")
    for stage in settings:
        differ = differences(stages.get(stage, {}), settings[stage])
        if differ:
            raise UserError(f"{run}: {stage} was started with other settings: {differ}. Give the same to go on with "
                            "--resume, or --overwrite to start again")
    to_do = [*settings] if args.overwrite else unfinished_stages(run, settings)
    begun = [stage for stage in settings if stage in stages]
    if begun and to_do and not args.resume:
        raise UserError(f"{run} holds a run (begun: {', '.join(begun)}; not done: {', '.join(to_do)}): --resume goes "
                        "on with it, --overwrite starts again")

    given = {key: value for key, value in shared.items() if value is not None}
    config = {"version": VERSION, "setup": config.get("setup", shared) | given,
              "fingerprints": config.get("fingerprints", {}), "stages": stages | settings}
    if args.overwrite and started_before:
        move_aside(run, prepared, [*stages, "models", "data"] if stages else [], config, locks)
    else:
        write_config(run, config)
    complete_setup(setup)
    return to_do


def unfinished_stages(run, settings):
    return [stage for stage in settings if not (run / stage).is_dir()]


def complete_setup(setup):
    """Take from config.json the models that other stages were given, and whether the base is in 8 bits: the closing
    table may need them."""
    found = read_run(setup.run)["setup"]
    setup.base, setup.encoder = (Setup.restore_path(found[key], setup.run) for key in ("base", "encoder"))
    setup.int8 = found["int8"]


def move_aside(run, prepared, kept, config, locks):
    """Rename the run folder to RUN.replaced-N, with everything in it. The new run folder gets copies of the stages and
    folders in `kept`, and `config`. It is made as `prepared`, and complete before anything is renamed: if the process is
    killed between the two renames, the next `open_run` does the second."""
    aside = next(path for n in itertools.count(1) if not (path := Path(f"{run}.replaced-{n}")).exists())
    with atomic(prepared) as new:
        new.mkdir()
        locks.enter_context(lock(new))  # a lock stays with its folder when that is renamed
        for file in [file for name in kept for file in (*(run / name).rglob("*"), *checkpoint_files(run, name))]:
            if file.is_file():
                copy = new / file.relative_to(run)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, copy)
        kept_stages = {*kept, "pretrain"} if kept else set()
        lines = [line + b"\n" for line, entry in read_log(run) if entry["stage"] in kept_stages]
        (new / "log.jsonl").write_bytes(b"".join(lines))
        write_config(new, config)
    os.replace(run, aside)
    os.replace(prepared, run)
    print(f"{run}: the earlier run is now in {aside}")
