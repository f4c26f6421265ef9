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
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from support.files import UserError, all_finite, open_safetensors, read_json, shorten, weight_files


# ----------------------------------------------------------------------------------------------------------------------
# Configuration

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
                raise UserError(f"{file}: {key} is {shorten(value)}, expected a positive number")
            return value

        def refuse(key, allowed, why):
            if found.get(key, allowed[0]) not in allowed:
                raise UserError(f"{file}: {key} is {shorten(found[key])}, expected {allowed[0]!r}: {why}")

        family = found.get("model_type")
        if family not in ("llama", "qwen2"):
            raise UserError(f"{file}: model_type is {shorten(family)}, expected 'llama' (Llama 3, SmolLM2) or 'qwen2' "
                            "(Qwen2)")
        refuse("hidden_act", ("silu",), "the feed-forward layer here is SwiGLU")
        refuse("mlp_bias", (False, None), "the feed-forward layers here have no bias")
        refuse("attention_bias", (False, None) if family == "llama" else (True, False, None), "o_proj here has no bias")
        refuse("use_sliding_window", (False, None), "attention here is over all that came before")
        refuse("tie_word_embeddings", (False, True, None), "the head is the embedding or it is not")
        for key in ("rope_parameters", "rope_scaling"):
            if not isinstance(found.get(key) or {}, dict):
                raise UserError(f"{file}: {key} is {shorten(found[key])}, expected an object or null")

        rope = dict(found.get("rope_parameters") or {})
        theta = rope.pop("rope_theta", None) or found.get("rope_theta")
        scaling = rope or dict(found.get("rope_scaling") or {})
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        numbers = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
        if kind not in ("default", "llama3"):
            raise UserError(f"{file}: RoPE scaling is {shorten(kind)}, expected 'llama3' or none")
        if kind == "llama3" and not (all(isinstance(scaling.get(n), (int, float)) and 0 < scaling[n] < LARGEST
                                         for n in numbers) and scaling[numbers[1]] < scaling[numbers[2]]):
            raise UserError(f"{file}: RoPE scaling 'llama3' needs the positive numbers {', '.join(numbers)}, the "
                            f"second below the third; found {shorten(scaling)}")
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


def context_length(path):
    """max_position_embeddings of a model folder's config.json, or None where it is not said."""
    found = read_json(Path(path) / "config.json").get("max_position_embeddings")
    if found is not None and (type(found) is not int or found < 1):
        raise UserError(f"{path}/config.json: max_position_embeddings is {shorten(found)}, expected a positive number")
    return found


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
            why = shorten(str(error).partition("\n")[0])
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
                    if not all_finite(min(state[name], found, key=torch.Tensor.element_size)):
                        raise UserError(f"{file}: {name} has values that are NaN or infinite as {str(dtype)[6:]}: a "
                                        "training that went wrong, or a broken download")
        head = state.pop("lm_head.weight", None) if config.tied else None
        if head is not None and not torch.equal(head, state["model.embed_tokens.weight"]):
            raise UserError(f"{path}: config.json says tie_word_embeddings, but lm_head.weight is not the embedding")
        model.load_state_dict(state, strict=True, assign=True)
        return model


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
    return to_device(ids, device), to_device(lengths, device)


def to_device(values, device):
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


ROOM = 256  # a compiled step's cache has a multiple of this: on a GPU a graph is recorded for every size
LONG_PREFIX = 32  # tokens: fewer are not worth a pass of their own


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
