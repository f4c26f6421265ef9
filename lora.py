"""Ten LoRA experts beside every frozen linear layer, mixed by a gate, as one matrix product.

What is notable:
- the experts of a layer are two stacked tensors, A (E, r, in) and B (E, r, out); there is no loop over experts and no
  tensor of size tokens × experts × width, and expert e is one contiguous block of each
- with a gate w the layer computes  W x + (α/r) Σ_e w_e B_e A_e x; with gate None it is the frozen layer, bitwise
- the gate is an argument: held as state, together with activation checkpointing, it would give wrong gradients silently
- experts are saved as standard PEFT adapter folders, one each: `peft` loads any of them on the model of `transformers`

Shapes: B rows, T tokens, E experts, r rank.
"""
import json
from pathlib import Path

from safetensors.torch import save_file
import torch
from torch import nn

from model import Linear, linear
from support.files import UserError, atomic, read_json, read_tensors, shorten


TRAITS = ("openness", "conscientiousness", "extraversion", "agreeableness", "neuroticism")
EXPERTS = tuple(f"{pole}_{trait}" for trait in TRAITS for pole in ("high", "low"))  # trait t: high 2t, low 2t + 1
SHORT_NAMES = tuple(f"{e.split('_')[1][0].upper()}{'+' if e.startswith('high') else '-'}" for e in EXPERTS)  # O+ O- C+ …
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # all seven, as in the source


class ExpertLinear(Linear):
    """A frozen linear layer with E low-rank experts beside it. Takes over the layer's weight, under the same name."""

    def __init__(self, linear, n_experts, rank, alpha):
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.scale = alpha / rank  # α/r of one expert: 16/8 = 2, whatever the number of experts
        device = linear.weight.device
        self.A = nn.Parameter(torch.empty(n_experts, rank, self.in_features, device=device))   # fp32, whatever W is
        self.B = nn.Parameter(torch.zeros(n_experts, rank, self.out_features, device=device))  # transposed: see forward
        # every expert starts as LoRA does: B = 0, A uniform in ±1/√in (kaiming with a = √5, fan_in = in and not r)
        nn.init.uniform_(self.A, -self.in_features ** -0.5, self.in_features ** -0.5)

    def forward(self, x, gate=None):
        """x (B, T, in), gate (B, E) or None -> (B, T, out).

        With E = 2, r = 2 and a row's gate (w0, w1), A x has the entries  e0r0 e0r1 e1r0 e1r1  and they are to be
        multiplied by  w0 w0 w1 w1  (repeat_interleave), not by  w0 w1 w0 w1  (repeat). Seen as (E, r), it is a
        plain broadcast of the gate over r.
        """
        if gate is None:
            return linear(x, self.weight, self.bias)
        n_experts, rank, _ = self.A.shape
        A, B = self.A.flatten(0, 1).to(x.dtype), self.B.flatten(0, 1).to(x.dtype)  # (E·r, in), (E·r, out)
        h = linear(x, A).view(*x.shape[:-1], n_experts, rank)                      # (B, T, E, r)
        h = h * gate.to(x.dtype).view(-1, 1, n_experts, 1)
        y = linear(x.flatten(0, 1), self.weight, self.bias)                        # (B·T, out)
        # y += α/r · h @ B, with no tensor between. y is no view of another tensor: autograd would copy its gradient
        y.addmm_(h.view(-1, n_experts * rank), B, alpha=self.scale)
        return y.view(*x.shape[:-1], -1)                                           # (B, T, out)


def expert_layers(model):
    """{name: ExpertLinear} of a model, in the model's order. ValueError if there are none."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, ExpertLinear)}
    if not layers:
        raise ValueError("this model has no experts: call lora.add_experts(model) first")
    return layers


def add_experts(model, n_experts=len(EXPERTS), rank=8, alpha=16):
    """Freeze everything in `model` and put experts beside its linear layers (all but the head).

    Returns the trainable parameters: A and B of every layer, in the model's order, fp32 on the model's device. A is
    drawn from torch's global generator. rank 8 and alpha 16 are the source's. ValueError if there are experts already.
    """
    if any(isinstance(module, ExpertLinear) for module in model.modules()):
        raise ValueError("this model has experts already")
    model.requires_grad_(False)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if name in TARGETS and isinstance(child, Linear):
                setattr(parent, name, ExpertLinear(child, n_experts, rank, alpha))
    return [tensor for layer in expert_layers(model).values() for tensor in (layer.A, layer.B)]


# ----------------------------------------------------------------------------------------------------------------------
# PEFT folders: adapter_config.json and adapter_model.safetensors, keys base_model.model.<layer>.lora_{A,B}.weight

def write_adapter(folder, rank, alpha, base, tensors):
    """One PEFT adapter: tensors {layer name: (A (r, in), B (out, r))}, written atomically. PEFT scales by alpha / r."""
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base), "r": rank,
                "lora_alpha": alpha, "target_modules": list(TARGETS), "lora_dropout": 0.0, "bias": "none",
                "fan_in_fan_out": False, "use_rslora": False, "use_dora": False, "inference_mode": True}
    state = {f"base_model.model.{name}.lora_{ab}.weight": tensor.detach().float().cpu().contiguous()
             for name, pair in tensors.items() for ab, tensor in zip("AB", pair)}
    with atomic(folder) as part:
        part.mkdir()
        (part / "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n")
        save_file(state, part / "adapter_model.safetensors", metadata={"format": "pt"})


def save_experts(model, folder, base=""):
    """Write the ten experts to `folder`/<expert name>/, each a standard PEFT adapter; `base` is noted as their base."""
    layers = expert_layers(model)
    some = next(iter(layers.values()))
    n_experts, rank, _ = some.A.shape
    if n_experts != len(EXPERTS):
        raise ValueError(f"{n_experts} experts, but names for {len(EXPERTS)}")
    for e, expert in enumerate(EXPERTS):
        write_adapter(Path(folder) / expert, rank, some.scale * rank, base,
                      {name: (layer.A[e], layer.B[e].T) for name, layer in layers.items()})


def adapter_shape(folder):
    """(rank, alpha) that the experts saved in `folder` have, from the first one's adapter_config.json."""
    file = Path(folder) / EXPERTS[0] / "adapter_config.json"
    settings = read_json(file)
    rank, alpha = settings.get("r"), settings.get("lora_alpha")
    if type(rank) is not int or type(alpha) not in (int, float) or not 1 <= rank < 2**16 or not 0 < alpha < 2**31:
        raise UserError(f"{file}: r is {shorten(rank)} and lora_alpha {shorten(alpha)}, expected positive numbers")
    return rank, alpha


@torch.no_grad()
def load_experts(model, folder):
    """Fill the model's experts from `folder`/<expert name>/. All is checked before anything is changed.

    UserError names the file and the setting or tensor that differs: rank, alpha, targets, shapes, kinds of LoRA that
    are not plain (rsLoRA, DoRA, biases), an expert that is missing.
    """
    layers = expert_layers(model)
    some = next(iter(layers.values()))
    (n_experts, rank, _), found = some.A.shape, []
    if n_experts != len(EXPERTS):
        raise ValueError(f"{n_experts} experts, but names for {len(EXPERTS)}")
    expected = {"peft_type": "LORA", "r": rank, "lora_alpha": some.scale * rank, "bias": "none", "use_rslora": False,
                "use_dora": False, "fan_in_fan_out": False, "rank_pattern": {}, "alpha_pattern": {}}
    for expert in EXPERTS:
        file = Path(folder) / expert / "adapter_config.json"
        settings = read_json(file)
        for key, value in expected.items():
            given = settings.get(key, 8 if key in ("r", "lora_alpha") else value)  # 8: PEFT's own default
            if given not in (value, None if value in (False, {}) else value):
                raise UserError(f"{file}: {key} is {shorten(given)}, expected {value!r}")
        targets = settings.get("target_modules")
        if not isinstance(targets, list) or sorted(map(str, targets)) != sorted(TARGETS):
            raise UserError(f"{file}: target_modules is {shorten(targets)}, expected {sorted(TARGETS)}")
        file = file.with_name("adapter_model.safetensors")
        shapes = {f"base_model.model.{name}.lora_{ab}.weight": shape for name, layer in layers.items()
                  for ab, shape in (("A", (rank, layer.in_features)), ("B", (layer.out_features, rank)))}
        found.append(read_tensors(file, shapes, "another base's?"))
    for e, state in enumerate(found):
        for name, layer in layers.items():
            layer.A[e] = state[f"base_model.model.{name}.lora_A.weight"]
            layer.B[e] = state[f"base_model.model.{name}.lora_B.weight"].T


def one_gate(model, gate):
    """A single gate, given as (E,) or (1, E), as (E,) on the CPU. ValueError for another shape."""
    n_experts = next(iter(expert_layers(model).values())).A.shape[0]
    gate = torch.as_tensor(gate).detach().cpu()
    if gate.shape not in ((n_experts,), (1, n_experts)):
        raise ValueError(f"the gate has shape {tuple(gate.shape)}, expected one weight for each of {n_experts} experts")
    return gate.flatten()


@torch.no_grad()
def export_mixture(model, gate, folder, base=""):
    """Write one PEFT adapter of rank E·r that equals the mixture for this gate (E,): the gate goes into B.

    Stacked, not averaged: mixing A and B apart and multiplying afterwards would add the cross terms A_i B_j.
    """
    gate, layers = one_gate(model, gate), expert_layers(model)
    tensors = {name: (layer.A.flatten(0, 1), (layer.B * gate.to(layer.B)[:, None, None]).flatten(0, 1).T)
               for name, layer in layers.items()}
    rank = next(iter(tensors.values()))[0].shape[0]
    scale = next(iter(layers.values())).scale
    write_adapter(folder, rank, scale * rank, base, tensors)


@torch.no_grad()
def merged_tensors(model, gate):
    """Yield (public name, tensor), one after the other, with the mixture for this gate (E,) in the dense weights.

    W + (α/r) Σ_e w_e B_e A_e, computed in fp32 (or wider) and rounded to W's dtype once. The changed weights are new
    tensors; the model is left as it is.
    """
    gate, layers = one_gate(model, gate), {f"{name}.weight": layer for name, layer in expert_layers(model).items()}
    for name, tensor in model.state_dict().items():
        if name in layers:
            layer = layers[name]
            B = layer.B * (gate.to(layer.B) * layer.scale)[:, None, None]  # (E, r, out)
            update = B.flatten(0, 1).T @ layer.A.flatten(0, 1)             # (out, in)
            yield name, (tensor.to(update.dtype) + update).to(tensor.dtype)
        elif not name.endswith((".A", ".B")):
            yield name, tensor


def merged(model, gate):
    """The tensors of merged_tensors as a state dict."""
    return dict(merged_tensors(model, gate))
