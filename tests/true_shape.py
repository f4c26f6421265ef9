"""The 8B's true shape on a CPU: random weights are written to disk, loaded, trained, asked and exported.

    python tests/true_shape.py FOLDER --tokenizer weights/Llama-3.1-8B-Instruct --encoder weights/Qwen2.5-0.5B

For a person, on a machine with 24 GB of memory that does nothing else. Each part is a process of its own; its peak
memory counts mapped files. FOLDER/base may stay for the next run. A step has ten short rows, one for each expert. The
encoder's layers are frozen, because the joint stage would not fit otherwise. --layers 2 takes a few minutes.
"""
import argparse
import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from harness import alone, published
from small import records
import eval
import train
from model import CONFIGS, Config, Transformer
from support.command import Parser, for_users, run_command
from support.files import UserError, atomic, human_readable_size
from support.records import write_records


def write_base(folder, config, tokenizer):
    """Write a model folder of four shards, one after the other, so that memory holds one of them."""
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in Transformer(config).state_dict().items()}
    where = {}
    with atomic(folder) as part:
        part.mkdir()
        for number, names in enumerate(np.array_split(list(shapes), 4), 1):
            file = f"model-{number:05}-of-00004.safetensors"
            where |= dict.fromkeys(names.tolist(), file)
            save_file({name: torch.ones(shapes[name], dtype=torch.bfloat16) if "norm" in name else
                       torch.randn(shapes[name], dtype=torch.bfloat16).mul_(0.02) for name in names.tolist()},
                      part / file, metadata={"format": "pt"})
        (part / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
        (part / "config.json").write_text(json.dumps(published(config)))
        for file in tokenizer.glob("tokenizer*.json"):
            shutil.copyfile(file, part / file.name)


def bytes_of(model):
    return sum(p.nbytes for p in model.parameters())


def part(what, function, *given, measure=None):
    result, seconds, most = alone(function, *given, measure=measure)
    print(f"  {what}: {seconds:,.0f} s, peak {most / 1e9:.2f} GB", flush=True)
    return result


def main():
    parser = Parser(description=for_users(__doc__), formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where base, records, run and export are written")
    parser.add_argument("--tokenizer", type=Path, required=True, help="a folder with Llama 3.1's tokenizer")
    parser.add_argument("--encoder", required=True, help="the persona encoder's model folder")
    parser.add_argument("--layers", type=int, default=32, help="fewer layers than the 8B's 32")
    parser.add_argument("--int8", action="store_true", help="load, train and ask with the base in 8 bits; no export")
    args = parser.parse_args()
    config, base, run, out = replace(CONFIGS["Llama-3.1-8B"], n_layers=args.layers), *(
        args.folder / name for name in ("base", "run", "export"))
    with torch.device("meta"):
        size = 2 * sum(p.numel() for p in Transformer(config).parameters())
    args.folder.mkdir(parents=True, exist_ok=True)
    for file in args.folder.iterdir():
        if file != base:
            raise UserError(f"{file} is there already: give a new folder, or one that holds nothing but base/")
    # the base, its export, two stages' experts with checkpoints (four times as much), two routers
    need = size * ((not base.exists()) + (not args.int8)) + 8 * args.layers * 26.3e6 + 6e9
    free = shutil.disk_usage(args.folder).free
    if need > free:
        free, need = map(human_readable_size, (free, need))
        raise UserError(f"{args.folder}: its disk has {free} free, and this needs {need}: nothing was done")

    if not base.exists():
        part(f"writing {size / 1e9:.2f} GB", write_base, base, config, args.tokenizer)
    if Config.from_dir(base) != config:
        raise UserError(f"{base} has another shape: remove it")
    load = partial(Transformer.from_pretrained, int8=args.int8)
    loaded = part("loading", load, base, torch.bfloat16, measure=bytes_of)
    promised = loaded + 2 * config.vocab_size * config.dim if args.int8 else 1.02 * loaded  # int8: one tensor more
    print(f"    the loaded model has {loaded / 1e9:.2f} GB; a peak of {promised / 1e9:.2f} is promised", flush=True)
    for split in ("train", "validation", "test"):
        write_records(args.folder / "data" / f"{split}.jsonl", records(10))
    frozen = ["--frozen-layers", str(Config.from_dir(args.encoder).n_layers)]
    command = ["--run", str(run), "--base", str(base), "--encoder", args.encoder, "--data", str(args.folder / "data"),
               *"--preset paper --device cpu --dtype bfloat16 --recompute --steps 1 --batch 10".split(),
               *["--int8"] * args.int8]
    for stage, more in (("router", frozen), ("warmup", []), ("joint", frozen)):
        part(f"a step of {stage}", partial(train.main, show_results=False), [*command, "--stage", stage, *more])
    opened = ["--run", str(run), "--device", "cpu"]
    part("eight tokens of the base and eight of the mixture", eval.main,
         ["ask", *opened, "--dtype", "bfloat16", "--max-new-tokens", "8", "What should I do on Sunday?"])
    if not args.int8:
        part("exporting the mixture, merged", eval.main,
             ["export", *opened, "--as", "merged", "--persona", "O+", "--out", str(out)])
        print(f"    {len([*out.glob('*.safetensors')])} merged files")
    print(f"{args.folder} can be removed")


if __name__ == "__main__":
    run_command(main)
