"""The decoder: Llama 3.1 and Qwen2.5 in one Transformer, its loader, its generation and its chat formats.

What is notable:
- one class for both families: Qwen2.5 is Llama plus a bias on q, k and v; Llama 3.2 and SmolLM2 come along for free
- parameters carry the names of the public checkpoints, so that loading is one strict `load_state_dict`
- the operations stand in the reference's order, so that fp32 logits equal those of `transformers` to the last bit
- padding is on the right, always: a causal model never sees what follows a token, so no mask is needed
- the experts' gate is an argument that travels from `forward` to every linear layer, never state on a module

Read it from the top: Config, Transformer and its parts, the loader, generation, Chat. To try it:

    python -c "import model; print(model.Config.from_dir('weights/SmolLM2-135M-Instruct'))"

Shapes: B rows, T tokens, S tokens in the cache, D width, H query heads, K key/value heads, d head width, V vocabulary,
E experts.
"""
import functools
import importlib.util
import json
import math
import os
import re
import shutil
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


class UserError(Exception):
    """Something that the person at the keyboard can mend. The commands print it as one line and exit with status 2."""


# ----------------------------------------------------------------------------------------------------------------------
# Files

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


# ----------------------------------------------------------------------------------------------------------------------
# Configuration

def short(value, length=80):
    """A value as messages show it: its beginning, if it is long."""
    text = repr(value)
    return text if len(text) <= length else text[:length] + "…"


LARGEST = 2**40  # no size of a model, and no theta, comes near; larger ones would overflow


@dataclass(frozen=True)
class Config:
    """The shape of a decoder. Each field is read from config.json by itself; none is inferred from another."""
    vocab_size: int
    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    hidden_dim: int
    norm_eps: float
    rope_theta: float
    rope_scaling: dict | None = None  # Llama 3.1's: rope_type, factor, low_freq_factor, high_freq_factor, original_…
    qkv_bias: bool = False
    tied: bool = False                # the head is the embedding matrix

    @classmethod
    def from_dir(cls, path):
        """Read config.json of a model folder, in the published style (rope_theta and rope_scaling at top level) or in
        the newer one (both inside rope_parameters). UserError for what this decoder does not do."""
        file = Path(path) / "config.json"
        found = read_json(file)

        def need(key, kind, default=None):
            value = found.get(key)
            value = default if value is None else value
            if isinstance(value, bool) or not isinstance(value, kind) or not 0 < value < LARGEST:
                raise UserError(f"{file}: {key} is {short(value)}, expected a positive number")
            return value

        def refuse(key, allowed, why):
            if found.get(key, allowed[0]) not in allowed:
                raise UserError(f"{file}: {key} is {short(found[key])}, expected {allowed[0]!r}: {why}")

        family = found.get("model_type")
        if family not in ("llama", "qwen2"):
            raise UserError(f"{file}: model_type is {short(family)}, expected 'llama' (Llama 3, SmolLM2) or 'qwen2' "
                            "(Qwen2)")
        refuse("hidden_act", ("silu",), "the feed-forward layer here is SwiGLU")
        refuse("mlp_bias", (False, None), "the feed-forward layers here have no bias")
        refuse("attention_bias", (False, None) if family == "llama" else (True, False, None), "o_proj here has no bias")
        refuse("use_sliding_window", (False, None), "attention here is over all that came before")
        refuse("tie_word_embeddings", (False, True, None), "the head is the embedding or it is not")
        for key in ("rope_parameters", "rope_scaling"):
            if not isinstance(found.get(key) or {}, dict):
                raise UserError(f"{file}: {key} is {short(found[key])}, expected an object or null")

        rope = dict(found.get("rope_parameters") or {})
        theta = rope.pop("rope_theta", None) or found.get("rope_theta")
        scaling = rope or dict(found.get("rope_scaling") or {})
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        numbers = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        if kind not in ("default", "llama3"):
            raise UserError(f"{file}: RoPE scaling is {short(kind)}, expected 'llama3' or none")
        if kind == "llama3" and not (all(isinstance(scaling.get(n), (int, float)) and 0 < scaling[n] < LARGEST
                                         for n in numbers) and scaling[numbers[1]] < scaling[numbers[2]]):
            raise UserError(f"{file}: RoPE scaling 'llama3' needs the positive numbers {', '.join(numbers)}, the "
                            f"second below the third; found {short(scaling)}")
        found["rope_theta"] = theta

        heads, dim = need("num_attention_heads", int), need("hidden_size", int)
        config = cls(
            vocab_size=need("vocab_size", int), dim=dim, n_layers=need("num_hidden_layers", int), n_heads=heads,
            n_kv_heads=need("num_key_value_heads", int, default=heads),
            head_dim=need("head_dim", int, default=dim // heads),
            hidden_dim=need("intermediate_size", int), norm_eps=need("rms_norm_eps", float),
            rope_theta=float(need("rope_theta", (int, float))),
            rope_scaling={"rope_type": kind} | {n: scaling[n] for n in numbers} if kind == "llama3" else None,
            qkv_bias=family == "qwen2", tied=found.get("tie_word_embeddings") is True)
        if config.n_layers > 1024:  # each would be laid out before the weights could show that they are not there
            raise UserError(f"{file}: num_hidden_layers is {config.n_layers}, expected at most 1024")
        if heads % config.n_kv_heads or config.head_dim % 2:
            raise UserError(f"{file}: {heads} query heads over {config.n_kv_heads} key/value heads of width "
                            f"{config.head_dim}; expected a whole number of groups and an even width")
        return config


LLAMA_3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
           "original_max_position_embeddings": 8192}
CONFIGS = {  # the published shapes, one line a model: vocab, dim, layers, heads, kv heads, d, hidden, eps, theta
    "Llama-3.1-8B": Config(128256, 4096, 32, 32, 8, 128, 14336, 1e-5, 5e5, LLAMA_3),
    "Llama-3.2-1B": Config(128256, 2048, 16, 32, 8, 64, 8192, 1e-5, 5e5, LLAMA_3 | {"factor": 32.0}, tied=True),
    "Qwen2.5-0.5B": Config(151936, 896, 24, 14, 2, 64, 4864, 1e-6, 1e6, qkv_bias=True, tied=True),
    "SmolLM2-135M": Config(49152, 576, 30, 9, 3, 64, 1536, 1e-5, 1e5, tied=True),
}


# ----------------------------------------------------------------------------------------------------------------------
# The model

# Measured: on AMD's processors BLAS leaves a product with one row to one thread, on Intel's to all
AMD = "AMD" in getattr(torch.cpu, "get_capabilities", dict)().get("cpu_name", "")
FEW_ROWS, BLOCKS = 16 if AMD else 0, 8  # from 32 rows on there is nothing to gain, and more blocks gain no more


def linear(x, weight, bias=None):
    """F.linear: x (…, in), weight (out, in) -> (…, out).

    A few rows on an AMD CPU (decoding) are multiplied block by block of the weight, each block by a thread, which takes
    half as long with two; on an Intel CPU it would take twice as long. See tests/bench.py generate.
    """
    if (torch.is_grad_enabled() or x.device.type != "cpu" or x.dtype != torch.float32 or weight.numel() < 2**18
            or len(weight) % BLOCKS or x.numel() > FEW_ROWS * x.shape[-1]):  # last: else a compiled block is bound to it
        return F.linear(x, weight, bias)
    out, width = weight.shape
    rows = x.numel() // width
    y = torch.bmm(weight.view(BLOCKS, -1, width), x.reshape(rows, width).T.expand(BLOCKS, -1, -1))  # (8, out/8, rows)
    y = y.view(out, rows).T.reshape(*x.shape[:-1], out)
    return y if bias is None else y + bias


class Linear(nn.Linear):
    """A linear layer that is handed the gate and has no experts to spend it on. lora.ExpertLinear takes its place."""

    def reset_parameters(self):
        if not self.weight.is_meta:  # to draw nothing takes a tenth of a second a model
            super().reset_parameters()

    def forward(self, x, gate=None):
        if gate is not None:
            raise ValueError("a gate was given but this model has no experts: call lora.add_experts(model) first")
        return linear(x, self.weight, self.bias)


class RMSNorm(nn.Module):
    """x / rms(x) · weight; the mean in fp32 at least, the product in x's dtype, as the reference has it."""

    def __init__(self, dim, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x):  # (…, D)
        y = x.to(torch.promote_types(x.dtype, torch.float32))
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * y.to(x.dtype)


def rope_frequencies(config, device=None):
    """Angle per position of each pair of dimensions, (d/2,), fp32: theta^(−2i/d), stretched as Llama 3.1 does it.

    Wavelengths above original/low_freq_factor are slowed down by `factor`, those below original/high_freq_factor stay,
    and the ones between are blended linearly. Computed from the config every time: a buffer would be rounded by a cast.
    """
    steps = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device)
    inv_freq = 1.0 / (config.rope_theta ** (steps / config.head_dim))  # (d/2,)
    if config.rope_scaling is None:
        return inv_freq
    factor, low, high, original = (config.rope_scaling[k] for k in (
        "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"))
    wavelength = 2 * torch.pi / inv_freq
    blend = (original / wavelength - low) / (high - low)  # 0 at the long end, 1 at the short end
    slowed = torch.where(wavelength > original / low, inv_freq / factor, inv_freq)
    between = (wavelength <= original / low) & (wavelength >= original / high)
    return torch.where(between, (1 - blend) * slowed / factor + blend * slowed, slowed)


def rotate(x, cos, sin):
    """Rotate each pair (x_i, x_{i+d/2}) by its angle: the "half" layout of the public checkpoints.

    With d = 4 the pairs are (0, 2) and (1, 3), not (0, 1) and (2, 3):
        [a, b, c, d]  ->  [a, b, c, d] · cos + [−c, −d, a, b] · sin
    """
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class Attention(nn.Module):
    """Causal attention in which H query heads share K key/value heads: query head i reads key/value head i // (H/K)."""

    def __init__(self, config):
        super().__init__()
        self.config = c = config
        self.q_proj = Linear(c.dim, c.n_heads * c.head_dim, bias=c.qkv_bias)
        self.k_proj = Linear(c.dim, c.n_kv_heads * c.head_dim, bias=c.qkv_bias)
        self.v_proj = Linear(c.dim, c.n_kv_heads * c.head_dim, bias=c.qkv_bias)
        self.o_proj = Linear(c.n_heads * c.head_dim, c.dim, bias=False)

    def forward(self, x, rope, gate=None, cache=None, layer=0):  # x (B, T, D); rope: cos and sin, (1 or B, 1, T, d)
        B, T, _ = x.shape
        d = self.config.head_dim
        q = rotate(self.q_proj(x, gate).view(B, T, -1, d).transpose(1, 2), *rope)  # (B, H, T, d)
        k = rotate(self.k_proj(x, gate).view(B, T, -1, d).transpose(1, 2), *rope)  # (B, K, T, d)
        v = self.v_proj(x, gate).view(B, T, -1, d).transpose(1, 2)                 # (B, K, T, d)
        if cache is not None:
            k, v = cache.update(layer, k, v)                                       # (B, K, S, d)
        if cache is None or cache.mask is None:  # whole sequences: training and prefill
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        elif T > 1:  # what follows a shared prefix
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=cache.mask, enable_gqa=True)
        else:  # one new token a row; the H/K query heads of a group stand where tokens would: (B, K, H/K, d)
            q = q.view(B, self.config.n_kv_heads, -1, d)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=cache.mask).view(B, -1, 1, d)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1), gate)              # (B, T, D)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) · up(x)). `gate_proj` is the checkpoints' name; it has nothing to do with our gate."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = Linear(config.dim, config.hidden_dim, bias=False)
        self.up_proj = Linear(config.dim, config.hidden_dim, bias=False)
        self.down_proj = Linear(config.hidden_dim, config.dim, bias=False)

    def forward(self, x, gate=None):  # (B, T, D)
        return self.down_proj(F.silu(self.gate_proj(x, gate)) * self.up_proj(x, gate), gate)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.input_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, rope, gate=None, cache=None, layer=0, at=None):
        x = x + self.self_attn(self.input_layernorm(x), rope, gate, cache, layer)
        if at is not None:  # of the last layer, the only one to get it, no more is needed: three quarters of its work
            x, gate = x.flatten(0, 1)[at][:, None], gate_at(gate, at, x.shape[1])  # (N, 1, D), (N, E)
        return x + self.mlp(self.post_attention_layernorm(x), gate)


class Transformer(nn.Module):
    """The decoder. `recompute = True` trades time for memory: layers keep only their input for the backward pass."""

    def __init__(self, config):
        super().__init__()
        self.config, self.recompute = config, False
        self.context = None  # most tokens that it can read and write, where the model folder says so
        self.decode = self.kept = None  # a compiled decoding step and its cache's memory, see compile_decoding
        self.model = nn.Module()  # the public names start with "model."
        table = torch.empty(config.vocab_size, config.dim)
        if not table.is_meta:  # on the meta device, drawing numbers would import half of PyTorch's compiler: 2 s
            nn.init.normal_(table, std=0.02)
        self.model.embed_tokens = nn.Embedding(config.vocab_size, config.dim, _weight=table)
        self.model.layers = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.model.norm = RMSNorm(config.dim, config.norm_eps)
        if not config.tied:
            self.lm_head = nn.Linear(config.dim, config.vocab_size, bias=False)

    @property
    def device(self):
        return self.model.embed_tokens.weight.device

    @property
    def dtype(self):
        return self.model.embed_tokens.weight.dtype

    @property
    def head_weight(self):
        return (self.model.embed_tokens if self.config.tied else self.lm_head).weight  # (V, D)

    def hidden(self, ids, gate=None, cache=None, at=None):
        """Last hidden states, after the final norm: ids (B, T) -> (B, T, D).

        at: (N,), which of the B·T positions, counted row by row, are wanted (`last_positions`, for example): -> (N, D).
        gate: (B, E), one weight per row and expert, or (1, E) for all rows, or None for the base model alone (bitwise,
        whatever the experts).
        cache: a Cache (filled by the first call, extended by one token a row by every later one, T = 1) or a Prefix
        (any T tokens that follow it; itself unchanged).
        """
        x = self.model.embed_tokens(ids)  # (B, T, D)
        T = ids.shape[1]
        positions = torch.arange(T, device=ids.device)[None] if cache is None else cache.advance(T)  # (1 or B, T)
        angles = positions[..., None].float() * rope_frequencies(self.config, ids.device)  # (1 or B, T, d/2)
        angles = torch.cat((angles, angles), dim=-1)[:, None]  # (1 or B, 1, T, d)
        rope = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        for i, block in enumerate(self.model.layers):
            if at is not None and i == len(self.model.layers) - 1:
                block = functools.partial(block, at=at)
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, rope, gate, use_reentrant=False)
            elif cache is None:  # without the layer's number, which a compiled block would be compiled anew for
                x = block(x, rope, gate)
            else:
                x = block(x, rope, gate, cache, i)
        return self.model.norm(x if at is None else x[:, 0])

    def head(self, hidden):
        """Logits for hidden states: (…, D) -> (…, V)."""
        return linear(hidden, self.head_weight)

    def forward(self, ids, gate=None):
        """Logits for every position: ids (B, T) -> (B, T, V). Training and generation call `hidden` and `head` instead
        and compute logits only where they are needed."""
        return self.head(self.hidden(ids, gate))

    @classmethod
    def from_pretrained(cls, path, dtype=torch.bfloat16, device="cpu"):
        """Load a published model folder (config.json and safetensors, one file or shards) as `dtype` on `device`.

        The model is laid out on the meta device (no memory), the files are mapped rather than read, and every tensor is
        cast and moved as it is taken out, so that host memory peaks at little more than the result.
        UserError names the file and tensor that is missing, unexpected or of another shape.
        """
        config = Config.from_dir(path)
        try:
            with torch.device("meta"):
                model = cls(config)
        except (RuntimeError, TypeError, OverflowError) as error:  # sizes whose product is beyond 64 bits
            why = short(str(error).partition("\n")[0])
            raise UserError(f"{path}/config.json: no model of this shape can be made ({why})") from None
        model.context = context_length(path)
        expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        where, state = {}, {}  # all is checked before anything is loaded
        for file, names in weight_files(path).items():
            with open_safetensors(file) as tensors:
                there = set(tensors.keys())
                for name in sorted(there) if names is None else names:
                    if name not in there:
                        raise UserError(f"{file}: the index says that {name} is here, but it is not")
                    found = tensors.get_slice(name)
                    shape, kind = tuple(found.get_shape()), found.get_dtype()
                    if config.tied and name == "lm_head.weight":  # some files store the tied head a second time
                        expected.setdefault(name, expected["model.embed_tokens.weight"])
                    if name not in expected:
                        raise UserError(f"{file}: unexpected tensor {name}: config.json describes a model without it")
                    if shape != expected[name]:
                        raise UserError(f"{file}: {name} is {shape}, expected {expected[name]} from config.json")
                    if kind not in ("BF16", "F16", "F32", "F64"):
                        raise UserError(f"{file}: {name} is {kind}, expected floats, not quantised weights")
                    where[name] = file
        missing = sorted(expected.keys() - where.keys())
        if missing:
            raise UserError(f"{path}: {len(missing)} tensor(s) missing, the first is {missing[0]}")
        names = list(where)[::-1]
        while names:
            file, taken = where[names[-1]], 0
            with open_safetensors(file, str(device)) as tensors:  # mapped anew: what a cast has read is given back
                while names and where[names[-1]] == file and taken < 2**26:
                    name = names.pop()
                    found = tensors.get_tensor(name)
                    state[name], taken = found.to(dtype), taken + found.nbytes
                    # a cast to a wider type makes no infinities; reading half the bytes is faster
                    if not finite(min(state[name], found, key=torch.Tensor.element_size)):
                        raise UserError(f"{file}: {name} has values that are NaN or infinite as {str(dtype)[6:]}: a "
                                        "training that went wrong, or a broken download")
        head = state.pop("lm_head.weight", None) if config.tied else None
        if head is not None and not torch.equal(head, state["model.embed_tokens.weight"]):
            raise UserError(f"{path}: config.json says tie_word_embeddings, but lm_head.weight is not the embedding")
        model.load_state_dict(state, strict=True, assign=True)
        return model


def finite(tensor):
    """Whether no value is NaN or infinite; without a copy."""
    tensor = tensor.detach()
    # A sum is finite of finite values only, and takes half as long as the extremes. It can overflow: then they decide
    return bool(tensor.sum().isfinite()) or bool(torch.stack(torch.aminmax(tensor)).isfinite().all())


def context_length(path):
    """max_position_embeddings of a model folder's config.json, or None where it is not said."""
    found = read_json(Path(path) / "config.json").get("max_position_embeddings")
    if found is not None and (type(found) is not int or found < 1):
        raise UserError(f"{path}/config.json: max_position_embeddings is {short(found)}, expected a positive number")
    return found


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
            raise UserError(f"{index}: {name} is said to be in {short(file)}, expected the name of a file in this "
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
        if not tensor.is_floating_point() or not finite(tensor.float()):
            raise UserError(f"{file}: {name} ({str(tensor.dtype)[6:]}) is not all finite floats: a training that went "
                            "wrong, or a broken copy")
    return found


# ----------------------------------------------------------------------------------------------------------------------
# Generation

class Cache:
    """Keys and values, a tensor (B, K, size, d) for each layer, with every row at a position of its own.

    The first pass stores whole right-padded prompts, or what follows the `prefix` that they share. After it, row b
    writes its next token at its own length, over the padding that stood there, and sees nothing beyond it.
    """

    def __init__(self, k, v, lengths, longest, prefill=None, prefix=None):
        self.k, self.v, self.lengths = k, v, lengths  # lengths: (B,) tokens stored per row
        self.longest, self.prefill, self.prefix, self.mask = longest, prefill, prefix, None

    @classmethod
    def empty(cls, config, lengths, size, dtype, device, prefix=None, kept=None):
        """kept: a dict in which the memory stays, for the next cache of this shape: a CUDA graph is bound to it."""
        shape = (len(lengths), config.n_kv_heads, size, config.head_dim)
        if kept and shape in kept:
            k, v = kept[shape]
        else:
            k, v = ([torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.n_layers)]
                    for _ in range(2))  # no NaN under the mask
        if kept is not None and shape not in kept:
            kept.clear()
            kept[shape] = k, v
            for tensor in (*k, *v):
                torch._dynamo.mark_static_address(tensor, guard=False)  # a graph is not to copy it
                torch._dynamo.mark_static(tensor, (1, 3))  # only rows and room vary
        return cls(k, v, torch.tensor(lengths, device=device), max(lengths), prefix=prefix)

    def advance(self, tokens):
        """The positions of the tokens that come now, (1 or B, T). Called once a pass, before any layer."""
        device = self.lengths.device
        self.prefill = self.prefill is None  # the first pass only
        if self.prefill:
            if self.prefix is None:
                return torch.arange(tokens, device=device)[None]
            positions = self.prefix.advance(tokens)
            self.mask = self.prefix.mask
            return positions
        positions, self.lengths, self.longest = self.lengths[:, None], self.lengths + 1, self.longest + 1
        # once for all layers: where each row writes, and what is added to its scores, (B, 1, 1, S)
        self.at = torch.arange(len(positions), device=device), positions[:, 0]  # (B,), (B,)
        beyond = torch.arange(self.longest, device=device) > positions
        self.mask = self.k[0].new_zeros(beyond.shape).masked_fill(beyond, -torch.inf)[:, None, None]
        return positions

    def update(self, layer, k, v):
        """Store k and v (B, K, T, d) of one layer; return the keys and values to attend to, (B, K, T or S, d)."""
        if self.prefill:
            k, v = (k, v) if self.prefix is None else self.prefix.update(layer, k, v)
            self.k[layer][:, :, :k.shape[2]], self.v[layer][:, :, :v.shape[2]] = k, v
            return k, v
        rows, at = self.at
        self.k[layer][rows, :, at], self.v[layer][rows, :, at] = k[:, :, 0], v[:, :, 0]
        return self.k[layer][:, :, :self.longest], self.v[layer][:, :, :self.longest]

    def keep(self, rows):
        """Go on with these rows only (indices into the current ones)."""
        self.k, self.v = ([tensor[rows] for tensor in kept] for kept in (self.k, self.v))
        self.lengths = self.lengths[rows]


class Prefix:
    """What many prompts begin with, computed once: a cache for `hidden` with the keys and values of these tokens.

    ids: list of at least one id. gate: (1, E) or None, the same for all rows that will follow: under gates of their own
    the same tokens have other keys and values. Calls of model.hidden(rest, gate, prefix) leave it as it is.
    """

    @torch.no_grad()
    def __init__(self, model, ids, gate=None):
        self.kv, self.length, self.mask, self.device = [], 0, None, model.device  # kv: (k, v) a layer, (1, K, P, d)
        model.hidden(torch.tensor([ids], device=self.device), gate, self)
        self.length = len(ids)

    def advance(self, tokens):
        at = torch.arange(self.length + tokens, device=self.device)
        self.mask = at <= at[self.length:, None] if self.length else None  # (T, P + T): prefix, and what came before
        return at[None, self.length:]

    def update(self, layer, k, v):
        if not self.length:
            self.kv.append((k, v))
            return k, v
        return tuple(torch.cat((old.expand(len(new), -1, -1, -1), new), 2) for old, new in zip(self.kv[layer], (k, v)))


def gate_at(gate, at, tokens):
    """A gate for each of the positions `at` (N,) of rows of that many tokens: (B, E) -> (N, E). What is for all rows,
    (1, E) or None, stays."""
    return gate if gate is None or len(gate) == 1 else gate[at // tokens]


def last_positions(ids, lengths):
    """The last position of each of B rows (B, T) of these lengths (B,), as `hidden` wants them: (B,)."""
    return torch.arange(len(ids), device=ids.device) * ids.shape[1] + lengths - 1


def shared_prefix(prompts):
    """How many ids all prompts begin with; at least one of each is left over."""
    first, last, n = min(prompts), max(prompts), min(map(len, prompts)) - 1
    return next((i for i in range(n) if first[i] != last[i]), n)


def pad(rows, device="cpu"):
    """Lists (or arrays) of ids -> (ids (B, T) filled up with 0 on the right, lengths (B,))."""
    lengths = [len(row) for row in rows]
    ids = np.zeros((len(rows), max(lengths)), dtype=np.int64)  # by numpy: a tensor a row takes several times as long
    for line, row in zip(ids, rows):
        line[:len(row)] = row
    return send(ids, device), send(lengths, device)


def send(values, device):
    """Numbers -> a tensor on the device. To a GPU from pinned memory, so that the next step is laid out while the
    last one computes."""
    values = torch.as_tensor(values)
    return values.pin_memory().to(device, non_blocking=True) if torch.device(device).type == "cuda" else \
        values.to(device)


def sample(logits, temperature, top_p, u):
    """One token a row: logits (B, V) and uniform numbers u (B,) -> (B,). Temperature 0 takes the largest logit."""
    if temperature == 0:
        return logits.argmax(-1)
    p, tokens = (logits.float() / temperature).softmax(-1).sort(-1, descending=True)
    before = p.cumsum(-1) - p  # mass of the more probable tokens
    p = p.masked_fill(before >= top_p, 0)  # the smallest set of tokens whose mass reaches top_p
    mass = p.cumsum(-1)
    choice = (mass < u[:, None].to(mass) * mass[:, -1:]).sum(-1, keepdim=True)
    return tokens.gather(-1, choice.clamp(max=logits.shape[-1] - 1))[:, 0]


LONG_PREFIX = 32  # tokens: fewer are not worth a pass of their own
ROOM = 256  # a compiled step's cache has a multiple of this: on a GPU a graph is recorded for every size


def check_compiler(device):
    """UserError if torch.compile finds nothing to compile with."""
    if device.type == "cuda" and not importlib.util.find_spec("triton"):
        raise UserError("--compile needs Triton on a GPU: pip install triton, or leave --compile out")
    if device.type != "cuda" and not any(map(shutil.which, [os.environ.get("CXX", ""), "g++", "clang++"])):
        raise UserError("--compile needs a C++ compiler on a CPU, and there is neither g++ nor clang++: install one, "
                        "or leave --compile out")


def compile_decoding(model):
    """Let torch.compile have a decoding step whole, for `generate`; on a GPU it becomes a CUDA graph. By itself a step
    is some thousand small operations, which take longer to start than to compute. The first step compiles, which takes
    minutes, once for one row and once for several, whatever their number, and anew with a gate or without one."""
    check_compiler(model.device)

    def decode(ids, gate, k, v, lengths):
        """A step as a function of tensors: ids (B, 1), gate (B, E) or None, each layer's keys and values, which it
        extends, and the rows' lengths (B,) -> logits (B, V)."""
        cache = Cache(k, v, lengths, k[0].shape[2] - 1, prefill=False)
        return model.head(model.hidden(ids, gate, cache)[:, 0])

    mode = "reduce-overhead" if model.device.type == "cuda" else "default"
    model.decode, model.kept = torch.compile(decode, fullgraph=True, dynamic=True, mode=mode), {}


@torch.inference_mode()  # a twentieth to a tenth faster than no_grad: a token is some thousand small operations
def generate(model, prompts, gate=None, max_new_tokens=256, temperature=0.0, top_p=1.0, stops=(), generator=None,
             each=None):
    """Continue prompts of different lengths: B lists of ids -> B lists of new ids, the stop id last where one came.

    gate: (B, E), one per row, or (1, E) for all, or None. stops: ids, any of which ends its row. temperature 0 is
    greedy; else tokens are drawn from `generator` (a torch.Generator on the CPU, None: the global one). `each` is
    called with (row, id) as soon as an id is known.
    A batch gives the same greedy tokens as its rows one by one. What all prompts begin with is computed once, unless
    rows have gates of their own. Finished rows leave the batch, unless the step is compiled. A row ends with the
    model's context, too; UserError for a prompt that leaves no room in it.
    """
    if not prompts or not all(prompts):
        raise ValueError(f"generate needs prompts of at least one token; lengths are {[len(p) for p in prompts]}")
    sizes, context = [len(prompt) for prompt in prompts], model.context or math.inf
    if max(sizes) >= context:
        raise UserError(f"a prompt has {max(sizes):,} tokens, and the model can read and write {context:,} in all: "
                        "shorten it")
    max_new_tokens = min(max_new_tokens, context - min(sizes))
    gate = None if gate is None else gate.to(model.device)
    shared = shared_prefix(prompts) if len(prompts) > 1 and (gate is None or len(gate) == 1) else 0
    shared = shared if shared >= LONG_PREFIX else 0
    prefix = Prefix(model, prompts[0][:shared], gate) if shared else None
    gate = None if gate is None else gate.expand(len(prompts), -1).clone()  # no view: a compiled step looks at its base
    compiled, room = model.decode is not None, max(sizes) + max_new_tokens
    cache = Cache.empty(model.config, sizes, -(-room // ROOM) * ROOM if compiled else room, model.dtype, model.device,
                        prefix, model.kept)
    ids, lengths = pad([prompt[shared:] for prompt in prompts], model.device)
    replies, rows = [[] for _ in prompts], list(range(len(prompts)))  # rows[i]: whose reply row i of the batch is

    def ended(row):
        reply = replies[row]
        return bool(reply) and (reply[-1] in stops or sizes[row] + len(reply) >= context)

    for step in range(max_new_tokens):
        if step == 0:
            logits = model.head(model.hidden(ids, gate, cache, last_positions(ids, lengths)))  # (B, V)
        elif compiled:
            logits = model.decode(ids, gate, cache.k, cache.v, cache.lengths)
            cache.lengths = cache.lengths + 1
        else:
            logits = model.head(model.hidden(ids, gate, cache)[:, 0])
        # numbers are drawn for every prompt, so that what one row gets does not depend on when others end
        u = torch.rand(len(prompts), generator=generator)[rows].to(logits.device) if temperature else None
        ids = sample(logits, temperature, top_p, u)[:, None]  # (B, 1)
        for row, token in zip(rows, ids[:, 0].tolist()):
            if not ended(row):
                replies[row].append(token)
                if each is not None:
                    each(row, token)
        alive = [i for i, row in enumerate(rows) if not ended(row)]
        if not alive:
            break
        if len(alive) < len(rows) and not compiled:  # a compiled step is bound to its number of rows
            cache.keep(alive)
            ids, gate, rows = ids[alive], None if gate is None else gate[alive], [rows[i] for i in alive]
    return replies


# ----------------------------------------------------------------------------------------------------------------------
# Chat formats

def load_tokenizer(path):
    """tokenizer.json of a model folder, set so that special tokens in a user's text stay text."""
    file = Path(path) / "tokenizer.json"
    if not file.exists():
        raise UserError(f"{file}: no such file; download the tokenizer's files beside the weights")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # the library raises plain Exception, and its panics are not even that
        raise UserError(f"{file}: not a tokenizer ({short(str(error), 300)})") from None
    check_ids(tokenizer, file)
    tokenizer.encode_special_tokens = True  # "<|eot_id|>" typed by someone is nine characters, not the end of a turn
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def check_ids(tokenizer, file):
    """UserError if the model beside a tokenizer, where there is one, is not that tokenizer's."""
    config = file.with_name("config.json")
    size = read_json(config).get("vocab_size") if config.exists() else None
    if type(size) is not int:  # nothing to compare with
        return
    token, largest = max(tokenizer.get_vocab().items(), key=lambda pair: pair[1], default=("", -1))
    if largest >= size:
        raise UserError(f"{file}: {token!r} has the id {largest}, but config.json says {size} tokens (vocab_size): is "
                        "this another model's tokenizer?")
    special = tokenizer.get_added_tokens_decoder()
    for eos in end_ids(config):
        if eos not in special:
            raise UserError(f"{file}: {eos}, eos_token_id of config.json, is {tokenizer.id_to_token(eos)!r} here and "
                            "no special token: is this another model's tokenizer?")


def end_ids(file):
    """eos_token_id of a JSON file as a set of numbers: none, one or several are given."""
    eos = read_json(file).get("eos_token_id")
    eos = [] if eos is None else eos if isinstance(eos, list) else [eos]
    if not all(type(e) is int and 0 <= e < 2**31 for e in eos):
        raise UserError(f"{file}: eos_token_id is {short(eos)}, expected a number or a list of numbers")
    return set(eos)


def encode(tokenizer, text):
    """Text -> ids, with no bos added (Llama's tokenizer would add one by itself)."""
    return tokenizer.encode(text, add_special_tokens=False).ids


class Chat:
    """Messages to ids and back, in the Llama 3.1 format or in ChatML (Qwen2.5, SmolLM2), whichever the tokenizer knows.

    Texts are encoded as characters and special tokens are put between them by number, so that no text can open or close
    a turn. messages: [{"role": "system" | "user" | "assistant", "content": str}, …].
    """

    DATES = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"

    def __init__(self, tokenizer, template="", stops=()):
        """template: the folder's chat template, searched for facts (default system message, date block), never run."""
        self.tokenizer, special = tokenizer, tokenizer.token_to_id
        self.llama = special("<|start_header_id|>") is not None
        if self.llama:
            self.bos, self.end = special("<|begin_of_text|>"), special("<|eot_id|>")
            # <|eom_id|> is Llama 3.1's name for what the tokenizer of Llama 3 still calls reserved_special_token_4
            others = "<|end_of_text|>", "<|eom_id|>", "<|reserved_special_token_4|>"
        else:
            self.bos, self.end, others = None, special("<|im_end|>"), ("<|endoftext|>",)
        if self.end is None or self.llama and self.bos is None or not self.llama and special("<|im_start|>") is None:
            raise UserError("the tokenizer has neither Llama 3's chat tokens (<|start_header_id|>, <|eot_id|>, "
                            "<|begin_of_text|>) nor ChatML's (<|im_start|>, <|im_end|>): take an instruct model's")
        self.stops = {self.end, *stops} | {special(name) for name in others} - {None}
        self.dates = self.llama and "Cutting Knowledge Date" in template
        default = re.search(r"<\|im_start\|>system(?:\n|\\n)([^'\"{}]*?)<\|im_end\|>", template)
        self.default_system = default.group(1) if default else None

    @classmethod
    def from_dir(cls, path):
        """Needs the tokenizer's files only; eos ids of config.json and generation_config.json are stops too."""
        path = Path(path)
        settings = read_json(path / "tokenizer_config.json") if (path / "tokenizer_config.json").exists() else {}
        template = settings.get("chat_template") or ""
        if isinstance(template, list):  # several templates by name
            template = next((t.get("template") for t in template if isinstance(t, dict) and t.get("name") == "default"),
                            "")
        if (path / "chat_template.jinja").exists():
            try:
                template = (path / "chat_template.jinja").read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(f"{path / 'chat_template.jinja'}: not readable as text ({error})") from None
        if not isinstance(template, str):
            raise UserError(f"{path / 'tokenizer_config.json'}: chat_template is {short(template)}, expected text")
        files = [path / name for name in ("config.json", "generation_config.json") if (path / name).exists()]
        stops = set().union(*map(end_ids, files))
        try:
            return cls(load_tokenizer(path), template, stops)
        except UserError as error:
            raise UserError(str(error) if str(path) in str(error) else f"{path}: {error}") from None

    def turn(self, role, text=""):
        """A message as ids, without its end; without a text, what comes before one."""
        special = self.tokenizer.token_to_id
        if self.llama:
            return [special("<|start_header_id|>"), *encode(self.tokenizer, role), special("<|end_header_id|>"),
                    *encode(self.tokenizer, "\n\n" + text)]
        # ROLE\nTEXT is one piece: cut at the newline, a text that starts with white space would get other ids
        return [special("<|im_start|>"), *encode(self.tokenizer, f"{role}\n{text}")]

    def prompt(self, messages):
        """messages -> ids up to the point where the assistant's reply begins."""
        messages = [(m["role"], m["content"].strip() if self.llama else m["content"]) for m in messages]
        if self.dates:  # the published 3.1 template always opens with a system message that starts with two dates
            system = messages.pop(0)[1] if messages and messages[0][0] == "system" else ""
            messages.insert(0, ("system", self.DATES + system))
        elif self.default_system is not None and (not messages or messages[0][0] != "system"):
            messages.insert(0, ("system", self.default_system))
        ids, between = ([self.bos], []) if self.llama else ([], encode(self.tokenizer, "\n"))
        for role, text in messages:
            ids += [*self.turn(role, text), self.end, *between]
        return ids + self.turn("assistant")

    def example(self, messages, response):
        """-> (ids, supervised): prompt and response as one row; supervised[i] is True where id i is the assistant's,
        the end of its turn included. The response is stripped and encoded apart, as it will be when generated."""
        prompt, reply = self.prompt(messages), [*encode(self.tokenizer, response.strip()), self.end]
        return prompt + reply, [False] * len(prompt) + [True] * len(reply)

    def text(self, ids):
        """ids -> text without special tokens."""
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()
