"""Reading model folders: config.json and safetensors, checked before they are used.

`Transformer.from_pretrained` calls read_model_config, weight_files, find_tensors and load_tensors, in this order. The
experts and the router are read with read_tensors, and PEFT's settings with check_adapter. Each problem is a UserError
that names the file, what was found and what was expected. Pickled weights are never read, because they can run code.
"""
import os
import re
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from support.files import UserError, check_settings, read_json, shorten
from support.int8 import quantise

MODEL_CONFIG = {  # what config.json may say for model.Transformer to compute the same as the published model
    "model_type": ("llama", "qwen2"),  # Llama 3 and SmolLM2; Qwen2 and Qwen2.5
    "vocab_size": (int,), "hidden_size": (int,), "intermediate_size": (int,), "num_hidden_layers": (int,),
    "num_attention_heads": (int,), "num_key_value_heads": (int, None), "head_dim": (int, None),
    "rms_norm_eps": (float,), "max_position_embeddings": (int, None), "tie_word_embeddings": (True, False, None),
    "rope_scaling": (dict, None), "rope_parameters": (dict, None),
    "hidden_act": ("silu", None), "mlp_bias": (False, None),  # the feed-forward layers are SwiGLU without bias
    "use_sliding_window": (False, None)}                      # attention reaches every earlier token
LLAMA_CONFIG = {"attention_bias": (False, None)}              # True would put a bias on o_proj, too
ROPE = {"rope_theta": (float,), "rope_type": ("default", "llama3")}
LLAMA_3_ROPE = dict.fromkeys(
    ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), (float,))
QUANTISED = ("quantization_config", "quantization", "compression_config")  # keys of transformers, MLX, older tools


def read_model_config(path):
    """Read and check config.json of a model folder. UserError names the key, what was found and what was expected.

    Returns the object with rope_theta and rope_scaling at top level; rope_scaling is None or has rope_type "llama3" and
    the keys of LLAMA_3_ROPE. num_key_value_heads, head_dim and tie_word_embeddings get their defaults if they are
    absent or null; max_position_embeddings is then None.
    """
    file = Path(path) / "config.json"
    config = read_json(file)
    check_settings(file, config, MODEL_CONFIG)
    if config["model_type"] == "llama":
        check_settings(file, config, LLAMA_CONFIG)
    for key in QUANTISED:
        if found := config.get(key):
            method = isinstance(found, dict) and found.get("quant_method") or found
            raise UserError(f"{file}: {key} is {shorten(method)}, expected weights that are not quantised. Take the "
                            "model that this one was made from, or write it again with transformers: from_pretrained, "
                            "dequantize, save_pretrained")
    rope = rope_settings(file, config)
    scaled = rope["rope_type"] == "llama3"
    check_settings(file, rope, ROPE | LLAMA_3_ROPE if scaled else ROPE)
    if scaled and rope["low_freq_factor"] >= rope["high_freq_factor"]:
        raise UserError(f"{file}: low_freq_factor is {rope['low_freq_factor']}, expected less than high_freq_factor "
                        f"({rope['high_freq_factor']})")

    dim, heads, layers = (config[key] for key in ("hidden_size", "num_attention_heads", "num_hidden_layers"))
    kv_heads, head_dim = config.get("num_key_value_heads") or heads, config.get("head_dim") or dim // heads
    if heads % kv_heads or head_dim < 2 or head_dim % 2:
        raise UserError(f"{file}: {heads} query heads share {kv_heads} key/value heads of width {head_dim}, expected "
                        "the same number of query heads for each and an even width")
    widest = max(config["vocab_size"], dim, config["intermediate_size"], heads * head_dim)
    if layers > 1024 or widest >= 2**30:  # too much to lay out, which comes before a weight is looked for
        raise UserError(f"{file}: {layers:,} layers with matrices of up to {widest:,} rows, expected at most 1024 "
                        "layers and fewer than 2^30 rows")
    return config | {
        "num_key_value_heads": kv_heads, "head_dim": head_dim, "rope_theta": float(rope["rope_theta"]),
        "rope_scaling": {key: rope[key] for key in ("rope_type", *LLAMA_3_ROPE)} if scaled else None,
        "tie_word_embeddings": bool(config.get("tie_word_embeddings")),
        "max_position_embeddings": config.get("max_position_embeddings")}


def rope_settings(file, config):
    """Returns RoPE's settings, {"rope_theta", "rope_type", …}. UserError if two places in config.json disagree.

    Both styles are read: published models have rope_theta and rope_scaling at top level, newer tools write both inside
    rope_parameters.
    """
    blocks = {"the top level": {"rope_theta": config.get("rope_theta")}}
    for place in ("rope_scaling", "rope_parameters"):
        if block := config.get(place):  # "type" is an older name
            blocks[place] = block | {"rope_type": block.get("rope_type") or block.get("type") or "default"}
            if nested := [key for key, value in block.items() if isinstance(value, dict)]:
                raise UserError(f"{file}: {place} has {shorten(nested[0])}, RoPE of some layers; expected one for all")
    rope, said_by = {"rope_type": "default"}, {}
    for place, block in blocks.items():
        for key in ROPE | LLAMA_3_ROPE:
            if (value := block.get(key)) is None:
                continue
            if key in said_by and value != rope[key]:
                raise UserError(f"{file}: {key} is {shorten(rope[key])} in {said_by[key]}, but {shorten(value)} in "
                                f"{place} (a rope_type that is absent is 'default'). Remove what is wrong")
            rope[key], said_by[key] = value, place
    return rope


# ----------------------------------------------------------------------------------------------------------------------
# Safetensors

def weight_files(path):
    """Find the safetensors files of a model folder. Returns {file: names of the tensors to take from it}; the names are
    None for all tensors."""
    path = Path(path)
    single, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if single.exists():
        return {single: None}
    if not index.exists():
        raise no_such_file(single)
    files = {}
    weight_map = read_json(index).get("weight_map")
    for name, file in weight_map.items() if isinstance(weight_map, dict) else ():
        if not isinstance(file, str) or Path(file).name != file or "\0" in file:
            raise UserError(f"{index}: {name} is said to be in {shorten(file)}, expected the name of a file in this "
                            "folder")
        files.setdefault(path / file, []).append(name)
    if not files:
        raise UserError(f"{index}: no weight_map")
    for file in files:
        if not os.path.lexists(file):  # open_safetensors says what is wrong with one that is there
            raise UserError(f"{file}: no such file, but {index.name} lists it: download the missing part again")
    return files


def no_such_file(file):
    """Returns the UserError for a safetensors file that is missing. It names the pickle that is there instead."""
    pickles = sorted(p.name for p in Path(file).parent.glob("*")
                     if p.suffix in (".bin", ".pt", ".pth") and re.match(".*model|consolidated", p.name))
    if pickles:
        return UserError(f"{Path(file).parent}: found only pickled weights ({pickles[0]}), which can run code when "
                         "read. Download safetensors files, or make them where you trust the pickle: from_pretrained "
                         "and save_pretrained of transformers, or of peft for an adapter")
    return UserError(f"{file}: no such file; make or download it again")


@contextmanager
def open_safetensors(file, device="cpu"):
    """Open a safetensors file. UserError if it is missing, may not be read or is damaged."""
    try:
        open(file, "rb").close()  # safe_open says of every file that it cannot open that there is none
    except FileNotFoundError:
        raise no_such_file(file) from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror or error})") from None
    try:
        with safe_open(str(file), framework="pt", device=device) as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: not a whole safetensors file ({error}); download or make it again") from None


def find_tensors(files, shapes, hint, optional=()):
    """Check names, shapes and dtypes of all tensors without reading their values.

    files: {file: names or None}, as from `weight_files`. shapes: {name: expected shape}; a name that is also in
    `optional` may be absent. Returns {name: (file, name in the file)}. RoPE's frequencies are passed over, because they
    follow from config.json. UserError names the tensor that is missing, unexpected, of another shape or quantised;
    `hint` ends the message: what this suggests.
    """
    found = {}
    for file, names in files.items():
        with open_safetensors(file) as tensors:
            stored = set(tensors.keys())
            for name in sorted(stored) if names is None else names:
                if name not in stored:
                    raise UserError(f"{file}: the index says that {name} is here, but it is not")
                if name.endswith("rotary_emb.inv_freq"):
                    continue
                tensor = tensors.get_slice(name)
                ours = name if name in shapes else f"model.{name}"  # a model saved without its head has no prefix
                shape, dtype = tuple(tensor.get_shape()), tensor.get_dtype()
                if dtype not in ("BF16", "F16", "F32", "F64"):
                    raise UserError(f"{file}: {name} is {dtype}, expected floats, not quantised weights")
                if ours not in shapes or ours in found:
                    raise UserError(f"{file}: unexpected tensor {name}: {hint}")
                if shape != tuple(shapes[ours]):
                    raise UserError(f"{file}: {name} is {shape}, expected {tuple(shapes[ours])}: {hint}")
                found[ours] = file, name
    missing = sorted(shapes.keys() - found.keys() - set(optional))
    if missing:
        where = file if len(files) == 1 else file.parent
        raise UserError(f"{where}: {len(missing)} tensor(s) missing, the first is {missing[0]}: {hint}")
    return found


def load_tensors(found, dtype=None, device="cpu", to_quantise=()):
    """Load the tensors that `find_tensors` has found as `dtype` (None: as stored) on `device`.

    to_quantise: names of the tensors to keep in 8 bits. Their scales get the name NAME_scale.
    Returns {name: tensor}. UserError for values that are NaN or infinite. Files are mapped into memory, not read whole,
    and mapped again after every 64 MiB, which frees the part that has been converted: host memory peaks at little more
    than the result.
    """
    tensors, names = {}, list(found)
    while names:
        file, size = found[names[0]][0], 0
        with open_safetensors(file, str(device)) as opened:
            while names and found[names[0]][0] == file and size < 2**26:
                name = names.pop(0)
                stored = opened.get_tensor(found[name][1])
                if name in to_quantise:
                    # int8 holds no NaN and no infinity, but the scale of a row that has one is then not finite either
                    tensors[name], checked = quantise(stored)
                    tensors[f"{name}_scale"] = checked
                else:
                    # On a CPU, without a cast, `stored` is a view of the mapped file. It would keep the file mapped,
                    # and with it all pages that were read for quantised tensors. Hence the copy.
                    copy = bool(to_quantise) and stored.device.type == "cpu"
                    checked = tensors[name] = stored.to(dtype or stored.dtype, copy=copy)
                size += stored.nbytes
                # whichever has fewer bytes is faster to check: a cast to a wider dtype makes no infinite values
                if not all_finite(min(checked, stored, key=lambda tensor: tensor.nbytes)):
                    raise UserError(f"{file}: {name} has values that are NaN or infinite as "
                                    f"{str(checked.dtype)[6:]}: the training diverged, or the file is damaged")
    return tensors


def read_tensors(file, shapes, hint):
    """The tensors of one safetensors file, {name: tensor}, checked as in `find_tensors` and `load_tensors`."""
    return load_tensors(find_tensors({Path(file): None}, shapes, hint))


def all_finite(tensor):
    """Whether no value is NaN or infinite. Makes no copy of the tensor."""
    tensor = tensor.detach()
    # One NaN or infinity makes the sum NaN or infinite, and the sum takes half as long as minimum and maximum. A sum of
    # finite values can overflow, too: then minimum and maximum decide.
    return bool(tensor.sum().isfinite()) or bool(torch.stack(torch.aminmax(tensor)).isfinite().all())


# ----------------------------------------------------------------------------------------------------------------------
# adapter_config.json of PEFT

PEFT_DEFAULTS = {"r": 8, "lora_alpha": 8, "target_modules": None}  # where the file leaves them out
# All fields of LoraConfig, PEFT 0.21, that leave a trained adapter as it is: where it comes from, how it was trained,
# and details of what another field switches on.
PEFT_HARMLESS = """task_type auto_mapping peft_version base_model_name_or_path revision inference_mode runtime_config
    lora_dropout ensure_weight_tying layers_pattern megatron_core qalora_group_size loftq_config eva_config corda_config
    lora_ga_config""".split()
# Fields that may be set, and to what. These ways to initialise A and B leave the base's weights as they are; PiSSA,
# OLoRA, CorDA, LoftQ and LoRA-GA change them.
PEFT_ALLOWED = {"peft_type": ["LORA"], "bias": ["none"],
                "init_lora_weights": [True, "gaussian", "eva", "orthogonal", "mica"]}


def check_adapter(file, expected):
    """Check an adapter_config.json: is this plain LoRA on the plain base, which lora.ExpertLinear computes?

    expected: what r, lora_alpha and target_modules (sorted) have to be. Any other field is harmless, allowed or empty;
    so one that a later PEFT adds is refused if it is set. UserError names the field, what was found and what was
    expected.
    """
    allowed = PEFT_ALLOWED | {key: [value] for key, value in expected.items()}
    settings = {key: value for key, value in read_json(file).items() if value is not None}
    for key, value in (PEFT_DEFAULTS | settings).items():
        if isinstance(value, list):  # PEFT writes target_modules in any order
            value = sorted(value, key=str)
        empty = value in ("", [], {}) or value is False  # not 0, which may be the number of a layer
        may_be_empty = key not in (*expected, "peft_type")
        if key in PEFT_HARMLESS or value in allowed.get(key, []) or empty and may_be_empty:
            continue
        names = " or ".join(map(repr, allowed.get(key, ["nothing"])))
        way_out = "" if key in expected else ": this is not plain LoRA on an unchanged base. " + (
            "PEFT can make that of it: save_pretrained with path_initial_model_for_weight_conversion"
            if key == "init_lora_weights" else "Train it again without")
        raise UserError(f"{file}: {key} is {shorten(value)}, expected {names}{way_out}")
