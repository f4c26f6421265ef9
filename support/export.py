"""Write a whole model folder in which the mixture under one gate is merged into the weights (eval.py export)."""
import json
import shutil
from collections import Counter
from pathlib import Path

from safetensors.torch import save_file

from lora import merged_tensors
from support.files import atomic, read_json


def write_merged(model, gate, base, out, shard_bytes):
    """Write the base's folder `base` again as `out`, with the mixture under `gate` in its weights.

    The weights are cut into files of at most `shard_bytes`. A file's tensors are merged just before it is written, so
    memory holds one such file beside the model. Each tensor has the dtype that it has in the model. Tokenizer, chat
    template, generation settings and licence are copied.
    """
    shards, sizes = [{}], Counter()  # {tensor name: bytes} of each file; {dtype: number of weights}
    for name, tensor in model.state_dict().items():
        if not name.endswith((".A", ".B")):
            if shards[-1] and sum(shards[-1].values()) + tensor.nbytes > shard_bytes:
                shards.append({})
            shards[-1][name] = tensor.nbytes
            sizes[tensor.dtype] += tensor.numel()
    files = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        files = ["model.safetensors"]

    tensors = merged_tensors(model, gate)  # a generator, in the same order as `shards`: nothing is computed yet
    with atomic(out) as part:
        part.mkdir()
        for file, shard in zip(files, shards):
            state = {name: tensor.cpu().contiguous() for name, tensor in (next(tensors) for _ in shard)}
            save_file(state, part / file, metadata={"format": "pt"})
            del state  # before the next file's tensors are made
        if len(shards) > 1:
            index = {"metadata": {"total_size": sum(sum(shard.values()) for shard in shards)},
                     "weight_map": {name: file for file, shard in zip(files, shards) for name in shard}}
            (part / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
        for file in sorted(Path(base).iterdir()):
            wanted = file.suffix in (".json", ".jinja", ".txt", ".model") or "LICENSE" in file.name
            if wanted and file.is_file() and not file.name.endswith(".index.json"):
                shutil.copyfile(file, part / file.name)
        dtype = sizes.most_common(1)[0][0]  # where a base has several, that of most of its weights
        settings = read_json(Path(base) / "config.json") | {"torch_dtype": str(dtype).removeprefix("torch.")}
        settings.pop("dtype", None)  # the newer name of torch_dtype, which transformers would prefer
        (part / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
