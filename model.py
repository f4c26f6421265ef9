"""The decoder: Llama 3.1 and Qwen2.5 as one Transformer, with its loader and its generation.

What is notable:
- One class serves both families. Qwen2.5 is Llama with a bias on q, k and v; Llama 3.2 and SmolLM2 need nothing more.
- Parameters have the names of the public checkpoints, so that loading is one strict `load_state_dict`.
- Operations are in the order of `transformers`, so that fp32 logits equal the reference's to the last bit.
- Padding is always on the right. A causal model never sees what follows a token, so training needs no mask.
- The experts' gate is an argument, passed from `forward` to every linear layer. No module stores it.

The order: Config, Transformer and its parts, loading, then generation with Prefill, Cache and Prefix. Chat formats are
in support/chat.py. To try it after `python train.py --preset tiny`:

    python -c "import model; print(model.Transformer.from_pretrained('runs/tiny/models/base'))"

Shapes: B rows, T tokens, S tokens in the cache, D width, H query heads, K key/value heads, d head width, V vocabulary,
E experts.
"""
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from support.files import UserError
from support.int8 import Int8Product
from support.matmul import linear
from support.weights import find_tensors, load_tensors, read_model_config, weight_files


# ----------------------------------------------------------------------------------------------------------------------
# Configuration

@dataclass(frozen=True)
class Config:
    """The shape of a decoder.

    `from_dir` reads each field from its own key of config.json, except that qkv_bias follows from model_type. If
    config.json does not say otherwise, n_kv_heads is n_heads and head_dim is dim // n_heads.
    """
    vocab_size: int
    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    hidden_dim: int
    norm_eps: float
    rope_theta: float
    rope_scaling: dict | None = None  # None or Llama 3.1's, see LLAMA_3 below
    qkv_bias: bool = False
    tied: bool = False                # the head is the embedding matrix

    @classmethod
    def from_dir(cls, path):
        """Read config.json of a model folder. UserError names a key whose value this decoder cannot follow."""
        found = read_model_config(path)
        return cls(
            vocab_size=found["vocab_size"], dim=found["hidden_size"], n_layers=found["num_hidden_layers"],
            n_heads=found["num_attention_heads"], n_kv_heads=found["num_key_value_heads"], head_dim=found["head_dim"],
            hidden_dim=found["intermediate_size"], norm_eps=found["rms_norm_eps"], rope_theta=found["rope_theta"],
            rope_scaling=found["rope_scaling"], qkv_bias=found["model_type"] == "qwen2",
            tied=found["tie_word_embeddings"])


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

class Linear(nn.Linear):
    """A linear layer whose forward accepts the experts' gate, so that lora.ExpertLinear can take its place.

    weight_scale: None, or after `set_int8` the scales (out,) of the weight, which is then int8 and does not train
    (support/int8.py). A cast of the model would round the scales: load it with the dtype instead.
    """

    def __init__(self, in_features, out_features, bias=True, device=None):
        super().__init__(in_features, out_features, bias, device)
        self.register_parameter("weight_scale", None)

    def set_int8(self, q, s):
        """Take a weight in 8 bits and its scales, as `quantise` returns them, in place of the full weight."""
        self.weight, self.weight_scale = nn.Parameter(q, requires_grad=False), nn.Parameter(s, requires_grad=False)

    def product(self, x):
        """W x, and the bias where there is one: (…, in) -> (…, out). `linear` is F.linear, or on some CPUs a faster
        equivalent of it (support/matmul.py)."""
        if self.weight_scale is None:
            return linear(x, self.weight, self.bias)
        y = Int8Product.apply(x, self.weight, self.weight_scale)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def forward(self, x, gate=None):
        if gate is not None:
            raise ValueError("a gate was given but this model has no experts: call lora.add_experts(model) first")
        return self.product(x)


class RMSNorm(nn.Module):
    """x / rms(x) · weight. As in the reference, the mean is in fp32 (or wider) and the last product in x's dtype."""

    def __init__(self, dim, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x):  # (…, D)
        y = x.to(torch.promote_types(x.dtype, torch.float32))
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * y.to(x.dtype)


def rope_frequencies(config, device=None):
    """The angle by which each pair of dimensions turns per position, (d/2,), fp32: theta^(−2i/d), or Llama 3.1's.

    Scaling divides the frequency by `factor` where the wavelength is above original/low_freq_factor, keeps it where the
    wavelength is below original/high_freq_factor, and blends linearly in between. The frequencies are computed from the
    config each time, because a cast of the model would round a buffer.
    """
    steps = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device)
    inv_freq = 1.0 / (config.rope_theta ** (steps / config.head_dim))  # (d/2,)
    if config.rope_scaling is None:
        return inv_freq
    factor, low, high, original = (config.rope_scaling[key] for key in (
        "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"))
    wavelength = 2 * torch.pi / inv_freq
    blend = (original / wavelength - low) / (high - low)  # 0 at the longest blended wavelength, 1 at the shortest
    blended = (1 - blend) * inv_freq / factor + blend * inv_freq
    scaled = torch.where(wavelength > original / low, inv_freq / factor, blended)
    return torch.where(wavelength < original / high, inv_freq, scaled)


def rotate(x, cos, sin):
    """Rotate each pair (x_i, x_{i+d/2}) by its angle: the "half" layout of the public checkpoints.

    With d = 4 the pairs are (0, 2) and (1, 3), not (0, 1) and (2, 3):
        [x0, x1, x2, x3]  ->  [x0, x1, x2, x3] · cos + [−x2, −x3, x0, x1] · sin
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

    def forward(self, x, rope, gate=None, cache=None, layer=0, mask=None):
        """x (B, T, D); rope: cos and sin, (1 or B, 1, T, d); mask: None for causal attention among the T tokens, or as
        from a cache's `advance`. Returns (B, T, D)."""
        B, T, _ = x.shape
        d = self.config.head_dim
        q = rotate(self.q_proj(x, gate).view(B, T, -1, d).transpose(1, 2), *rope)  # (B, H, T, d)
        k = rotate(self.k_proj(x, gate).view(B, T, -1, d).transpose(1, 2), *rope)  # (B, K, T, d)
        v = self.v_proj(x, gate).view(B, T, -1, d).transpose(1, 2)                 # (B, K, T, d)
        if cache is not None:
            k, v = cache.update(layer, k, v)                                       # (B, K, S, d)
        if mask is None:  # whole sequences: in training, and for prompts
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        elif T > 1:  # tokens after a shared prefix
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        else:
            # One new token a row. The H/K query heads that share a key/value head are passed as if they were H/K tokens
            # of one head, so that keys and values need not be repeated for each of them.
            q = q.view(B, self.config.n_kv_heads, -1, d)                           # (B, K, H/K, d)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).view(B, -1, 1, d)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1), gate)              # (B, T, D)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) · up(x)). `gate_proj` is the name in the checkpoints; it is not the experts' gate."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = Linear(config.dim, config.hidden_dim, bias=False)
        self.up_proj = Linear(config.dim, config.hidden_dim, bias=False)
        self.down_proj = Linear(config.hidden_dim, config.dim, bias=False)

    def forward(self, x, gate=None):  # (B, T, D)
        return self.down_proj(F.silu(self.gate_proj(x, gate)) * self.up_proj(x, gate), gate)


def gate_of_positions(gate, positions, T):
    """The gate of each position: that of the row it is in. gate (B, E); positions (N,) among B rows of T tokens,
    counted row by row. Returns (N, E). A gate for all rows, (1, E) or None, is returned as it is."""
    return gate if gate is None or len(gate) == 1 else gate[positions // T]


class Block(nn.Module):
    """One layer: attention, then the MLP, each on normalised input and added to x."""

    def __init__(self, config):
        super().__init__()
        self.input_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, rope, gate=None, cache=None, layer=0, mask=None, positions=None):
        """As Attention.forward. positions (N,): None, or the only positions to return, as (N, 1, D)."""
        x = x + self.self_attn(self.input_layernorm(x), rope, gate, cache, layer, mask)
        if positions is not None:
            # In the last layer only the wanted positions go through the MLP, which is most of a layer's work. Each
            # becomes a row of its own with T = 1, because a gate belongs to a row and positions are from several rows.
            gate = gate_of_positions(gate, positions, x.shape[1])  # (N, E)
            x = x.flatten(0, 1)[positions].unsqueeze(1)            # (N, 1, D)
        return x + self.mlp(self.post_attention_layernorm(x), gate)


class Transformer(nn.Module):
    """The decoder: embedding, blocks, norm and head.

    recompute: gradient checkpointing: the backward pass recomputes each layer from its input, which saves memory and
    costs time. Training sets it.
    context: the most tokens that the model can read and write. `from_pretrained` sets it to max_position_embeddings of
    config.json; it is None if that is absent, and for a model that was not loaded.
    compiled_step: None, or the decoding step that `compile_decoding` of support/compile.py sets for `generate`.
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.recompute, self.context, self.compiled_step = False, None, None
        self.model = nn.Module()  # so that parameters' names start with "model.", as in the checkpoints
        embedding = torch.empty(config.vocab_size, config.dim)
        if not embedding.is_meta:  # on the meta device, normal_ would import torch.compile: a second at every start
            nn.init.normal_(embedding, std=0.02)
        self.model.embed_tokens = nn.Embedding(config.vocab_size, config.dim, _weight=embedding)
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

    def hidden(self, ids, gate=None, cache=None, positions=None):
        """Last hidden states, after the final norm: ids (B, T) -> (B, T, D), or (N, D) with `positions`.

        gate: (B, E), one weight per row and expert, or (1, E) for all rows, or None for exactly the base model, bit for
        bit.
        cache: None, if ids are whole sequences and nothing is stored; else a Prefill, a Cache or a Prefix (see
        Generation, below).
        positions: (N,), the wanted positions among all B·T, counted row by row; see `last_positions`. None for all.
        """
        x = self.model.embed_tokens(ids)  # (B, T, D)
        T = ids.shape[1]
        options = {}
        if cache is None:
            position_ids = torch.arange(T, device=ids.device)[None]  # (1, T)
        else:
            position_ids, options["mask"] = cache.advance(T)         # (1 or B, T)
            options["cache"] = cache
        angles = position_ids[..., None].float() * rope_frequencies(self.config, ids.device)  # (1 or B, T, d/2)
        angles = torch.cat((angles, angles), dim=-1)[:, None]  # (1 or B, 1, T, d)
        rope = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        for i, block in enumerate(self.model.layers):
            if cache is not None:  # only a cache needs the number; torch.compile would compile a layer for each number
                options["layer"] = i
            if positions is not None and i == len(self.model.layers) - 1:
                options["positions"] = positions
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(block, x, rope, gate, use_reentrant=False, **options)
            else:
                x = block(x, rope, gate, **options)
        if positions is not None:
            x = x[:, 0]  # the last layer returned (N, 1, D)
        return self.model.norm(x)

    def head(self, hidden):
        """Logits for hidden states: (…, D) -> (…, V)."""
        return linear(hidden, self.head_weight)

    def forward(self, ids, gate=None):
        """Logits for every position: ids (B, T) -> (B, T, V). Training and generation call `hidden` and `head` instead
        and compute logits only where they are needed."""
        return self.head(self.hidden(ids, gate))

    @classmethod
    def from_pretrained(cls, path, dtype=torch.bfloat16, device="cpu", head=True, int8=False):
        """Load a published model folder (config.json and safetensors, one file or shards) as `dtype` on `device`.

        head: False if only `hidden` will be used. The folder, and then the model, may lack the head.
        int8: keep the weights of the blocks' linear layers in 8 bits. Each is quantised when it is read, so that memory
        never holds the full weights. Embedding, norms, biases and head stay in `dtype`.
        UserError names the file and the tensor that is missing, unexpected, of another shape or not finite; names and
        shapes are checked before anything is loaded.
        """
        config = Config.from_dir(path)
        with torch.device("meta"):  # names and shapes only: takes no memory
            model = cls(config)
        model.context = read_model_config(path)["max_position_embeddings"]
        shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        if config.tied:  # some files store the tied head a second time
            shapes["lm_head.weight"] = shapes["model.embed_tokens.weight"]
        files = find_tensors(weight_files(path), shapes, "config.json describes another model",
                             optional=["lm_head.weight"] if config.tied or not head else [])
        layers = {name: module for name, module in model.named_modules() if isinstance(module, Linear)} if int8 else {}
        state = load_tensors(files, dtype, device, {f"{name}.weight" for name in layers})
        for name, layer in layers.items():  # so that load_state_dict finds int8 parameters with scales to replace
            layer.set_int8(state[f"{name}.weight"], state[f"{name}.weight_scale"])
        if config.tied:
            embedding = state["model.embed_tokens.weight"]
            if not torch.equal(state.pop("lm_head.weight", embedding), embedding):
                raise UserError(f"{path}: config.json says tie_word_embeddings, but lm_head.weight is not the "
                                "embedding")
        elif "lm_head.weight" not in state:
            model.lm_head = None
        model.load_state_dict(state, strict=True, assign=True)  # assign: the loaded tensors become the parameters
        return model


def last_positions(ids, lengths):
    """The position of each row's last token, for `hidden`: ids (B, T), lengths (B,) -> (B,)."""
    return torch.arange(len(ids), device=ids.device) * ids.shape[1] + lengths - 1


def pad(rows, device="cpu"):
    """Pad rows (lists or arrays of ids) with 0 on the right. Returns ids (B, T) and lengths (B,) on the device."""
    lengths = [len(row) for row in rows]
    ids = np.zeros((len(rows), max(lengths)), dtype=np.int64)  # row by row, NumPy is several times faster than torch
    for line, row in zip(ids, rows):
        line[:len(row)] = row
    return to_device(ids, device), to_device(lengths, device)


def to_device(values, device):
    """Numbers as a tensor on the device. A copy to a GPU is made from pinned memory, so that the CPU does not wait for
    it and prepares the next step while the GPU computes."""
    values = torch.as_tensor(values)
    if torch.device(device).type == "cuda" and values.device.type == "cpu":
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device)


# ----------------------------------------------------------------------------------------------------------------------
# Generation

# A cache, as `Transformer.hidden` takes it, stores the new tokens' keys and values, or adds earlier tokens' to them, or
# both. Each pass calls its two methods:
# - advance(n_new), once, begins a pass over n_new tokens a row. It returns their positions, (1 or B, n_new), for RoPE,
#   and the attention mask, which all layers share: numbers that are added to the scores (Cache), or True where a token
#   may attend (Prefix). The mask is None for causal attention among the new tokens alone.
# - update(layer, k, v), in each layer, takes the new tokens' keys and values, (B, K, n_new, d). It returns the keys and
#   values to attend to, (B, K, S, d).
#
# There are three kinds. The first pass of `generate` has a Prefill, which stores the prompts' keys and values. Each
# later pass has a Cache, which adds one token a row to them. If all prompts begin with the same tokens, the keys and
# values of these tokens are computed once, before the first pass, and held in a Prefix.

class Prefill:
    """The first pass of generation: reads whole prompts, padded on the right, and stores their keys and values.

    k, v: memory for each layer, (B, K, size, d), as from `zero_keys_and_values`; it is written to from its beginning.
    prefix: None, or a Prefix that all rows begin with. The pass then computes only what follows it, and the prefix's
    keys and values are copied in front of each row's.
    """

    def __init__(self, k, v, prefix=None):
        self.k, self.v, self.prefix = k, v, prefix

    def advance(self, n_new):
        if self.prefix is not None:
            return self.prefix.advance(n_new)
        return torch.arange(n_new, device=self.k[0].device)[None], None

    def update(self, layer, k, v):
        if self.prefix is not None:
            k, v = self.prefix.update(layer, k, v)
        self.k[layer][:, :, :k.shape[2]] = k
        self.v[layer][:, :, :v.shape[2]] = v
        return k, v


class Cache:
    """Each later pass of generation: one new token a row (n_new = 1). Rows may have different lengths.

    Row b writes its token at position lengths[b], over any padding that is stored there, and attends to nothing beyond.

    k, v: a tensor (B, K, size, d) for each layer, filled by a Prefill. lengths (B,): the number of tokens stored in
    each row. longest: at least the largest of the lengths, as a Python number.
    """

    def __init__(self, k, v, lengths, longest):
        self.k, self.v, self.lengths, self.longest = k, v, lengths, longest
        self.rows = torch.arange(len(lengths), device=lengths.device)
        self.write_at = None  # (B,): the position of each row's new token, set by `advance`

    def advance(self, n_new):
        self.write_at = self.lengths
        self.lengths = self.lengths + 1
        self.longest = self.longest + 1
        position_ids = self.write_at[:, None]  # (B, 1)
        beyond = torch.arange(self.longest, device=position_ids.device) > position_ids  # (B, S)
        mask = self.k[0].new_zeros(beyond.shape).masked_fill(beyond, -torch.inf)  # added to the attention scores
        return position_ids, mask[:, None, None]  # (B, 1), (B, 1, 1, S)

    def update(self, layer, k, v):
        self.k[layer][self.rows, :, self.write_at] = k[:, :, 0]
        self.v[layer][self.rows, :, self.write_at] = v[:, :, 0]
        return self.k[layer][:, :, :self.longest], self.v[layer][:, :, :self.longest]

    def keep(self, rows):
        """Drop all rows but these (indices)."""
        self.k = [k[rows] for k in self.k]
        self.v = [v[rows] for v in self.v]
        self.lengths = self.lengths[rows]
        self.rows = self.rows[:len(rows)]


class Prefix:
    """The keys and values of tokens that many prompts begin with, computed once. A pass over what follows them does not
    change it.

    k, v: a tensor (1, K, P, d) for each layer, where P is the number of tokens.
    """

    def __init__(self, k, v):
        self.k, self.v, self.length = k, v, k[0].shape[2]

    @classmethod
    @torch.no_grad()
    def compute(cls, model, ids, gate=None):
        """The Prefix of these tokens: a list of at least one id. gate: (1, E) or None. All rows that follow must have
        the same gate, because another gate gives the same tokens other keys and values."""
        k, v = zero_keys_and_values(model, 1, len(ids))
        model.hidden(torch.tensor([ids], device=model.device), gate, Prefill(k, v))
        return cls(k, v)

    def advance(self, n_new):
        position_ids = torch.arange(self.length + n_new, device=self.k[0].device)
        new = position_ids[self.length:]
        return new[None], position_ids <= new[:, None]  # (1, n_new), (n_new, P + n_new): True where a token may attend

    def update(self, layer, k, v):
        before_k = self.k[layer].expand(len(k), -1, -1, -1)  # (B, K, P, d)
        before_v = self.v[layer].expand(len(v), -1, -1, -1)
        return torch.cat((before_k, k), 2), torch.cat((before_v, v), 2)


def zero_keys_and_values(model, rows, size):
    """Memory for the keys and values of this many rows and tokens a row. Returns k and v, each a list of tensors
    (rows, K, size, d), one for each layer."""
    shape = (rows, model.config.n_kv_heads, size, model.config.head_dim)

    # torch.empty could hold NaN. NaN + (−inf) is NaN, so the mask would not hide it.
    def zeros():
        return [torch.zeros(shape, dtype=model.dtype, device=model.device) for _ in model.model.layers]
    return zeros(), zeros()


def shared_prefix(prompts):
    """The length of the prompts' longest common prefix; at least one id of each prompt is left."""
    # the first and the last prompt in sorted order: what these two share, all share
    first, last = min(prompts), max(prompts)
    longest = min(map(len, prompts)) - 1
    return next((i for i in range(longest) if first[i] != last[i]), longest)


def sample(logits, temperature, top_p, u):
    """One token a row: logits (B, V) and uniform numbers u (B,) -> (B,). Temperature 0 takes the largest logit."""
    if temperature < torch.finfo(torch.float32).tiny:  # 0, or too small to divide by
        return logits.argmax(-1)
    logits = logits.float() - logits.max(-1, keepdim=True).values  # at most 0, so that no quotient is +infinite
    p, ids = (logits / temperature).softmax(-1).sort(-1, descending=True)
    before = p.cumsum(-1) - p  # mass of the more probable tokens
    p = p.masked_fill(before >= top_p, 0)  # keep the smallest set of tokens whose mass reaches top_p
    mass = p.cumsum(-1)
    # the drawn token is the first whose mass reaches u times the whole; its index is the number of tokens below that
    choice = (mass < u[:, None].to(mass) * mass[:, -1:]).sum(-1, keepdim=True)
    return ids.gather(-1, choice.clamp(max=logits.shape[-1] - 1))[:, 0]


LONG_PREFIX = 32  # tokens; a pass over a shorter prefix costs more than it saves


@torch.inference_mode()  # 5 to 10 % faster than no_grad: a token is some thousand small operations
def generate(model, prompts, gate=None, max_new_tokens=256, temperature=0.0, top_p=1.0, stops=(), generator=None,
             each=None):
    """Continue prompts of different lengths: B lists of ids -> B lists of new ids. A stop id is part of its reply.

    gate: (B, E), one per row, or (1, E) for all rows, or None. stops: ids that end their row. temperature: 0 is greedy;
    otherwise tokens are drawn with `generator`, a torch.Generator on the CPU (None: the global one). each: called with
    (row, id) as soon as an id is known.

    Up to rounding, a batch gives the same greedy tokens as its rows one by one. A beginning of at least LONG_PREFIX
    tokens that all prompts share is computed once, unless the gate is (B, E). A row also ends when prompt and reply
    fill the model's context. UserError for a prompt that leaves no room in it.
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
    prefix = Prefix.compute(model, prompts[0][:shared], gate) if shared else None
    ids, lengths = pad([prompt[shared:] for prompt in prompts], model.device)
    if gate is not None:
        # one row per prompt, so that ended rows can be dropped; a copy, because a compiled step cannot take a view
        gate = gate.expand(len(prompts), -1).clone()
    compiled = model.compiled_step
    memory = zero_keys_and_values if compiled is None else compiled.memory  # a compiled step is bound to its own memory
    cache = Cache(*memory(model, len(prompts), max(sizes) + max_new_tokens), lengths + shared, max(sizes))
    replies, rows = [[] for _ in prompts], list(range(len(prompts)))  # rows[i]: whose reply row i of the batch is

    def ended(row):
        reply = replies[row]
        return bool(reply) and (reply[-1] in stops or sizes[row] + len(reply) >= context)

    for step in range(max_new_tokens):
        if step == 0:
            h = model.hidden(ids, gate, Prefill(cache.k, cache.v, prefix), last_positions(ids, lengths))
            logits = model.head(h)  # (B, V)
        elif compiled is None:
            logits = model.head(model.hidden(ids, gate, cache)[:, 0])
        else:
            logits = compiled(ids, gate, cache)
        # one number for every prompt, ended or not, so that a row's draws do not depend on when others end
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
        if len(alive) < len(rows) and compiled is None:  # a compiled step keeps its number of rows
            cache.keep(alive)
            ids, rows = ids[alive], [rows[i] for i in alive]
            gate = None if gate is None else gate[alive]
    return replies
