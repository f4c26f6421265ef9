"""Ten LoRA experts beside every frozen linear layer but the head, mixed by a gate.

With one weight w_e per expert, a layer computes  y = W x + (α/r) Σ_e w_e B_e A_e x, plus a bias where it has one.

What is notable:
- the experts of a layer are two tensors, A (E, r, in) and B (E, r, out), and their sum is two matrix products: no loop
  over experts, and no tensor of size tokens × experts × width
- without a gate, a layer computes bitwise what the frozen layer computes
- the gate is an argument of `forward`. If modules stored it, activation checkpointing would recompute a layer with
  whatever gate is stored by then, and the gradients would be wrong without any error
- an expert is saved as a standard PEFT adapter folder, which `peft` loads on the model of `transformers`

Read it from the top: the layer, adding experts to a model, PEFT folders, merging one gate into the dense weights.

Shapes: N rows (B is LoRA's matrix here), T tokens, E experts, r rank.
"""
import json
from pathlib import Path

from safetensors.torch import save_file
import torch
from torch import nn

from model import Linear
from support.files import UserError, atomic, read_json, shorten
from support.matmul import linear
from support.weights import check_adapter, read_tensors


TRAITS = ("openness", "conscientiousness", "extraversion", "agreeableness", "neuroticism")
EXPERTS = tuple(f"{pole}_{trait}" for trait in TRAITS for pole in ("high", "low"))  # trait t: high is 2t, low is 2t + 1
SHORT_NAMES = tuple(f"{trait[0].upper()}{sign}" for trait in TRAITS for sign in "+-")  # O+ O- C+ C- …, the same order
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # all seven, as in the paper


# ----------------------------------------------------------------------------------------------------------------------
# The layer

class ExpertLinear(Linear):
    """A frozen linear layer with E LoRA experts beside it. It keeps the layer's own weight, full or in 8 bits, under the
    same name."""

    def __init__(self, frozen, n_experts, rank, alpha):
        super().__init__(frozen.in_features, frozen.out_features, bias=frozen.bias is not None, device="meta")
        self.weight, self.bias, self.weight_scale = frozen.weight, frozen.bias, frozen.weight_scale
        self.rank, self.alpha = rank, float(alpha)
        self.scale = alpha / rank  # r is the rank of one expert, not of all: 16/8 = 2, not 16/80
        device, bound = frozen.weight.device, self.in_features ** -0.5
        # A and B are fp32, whatever dtype W has. B is stored transposed, (r, out), so that flattening (E, r) is free.
        # LoRA's usual start: B is 0, and A is uniform in ±1/√in. For one expert that is kaiming_uniform_ with a = √5,
        # but kaiming_uniform_ would take r·in as the fan_in of this 3-D tensor. A is drawn on the CPU, so that a seed
        # gives the same experts on every device; on "meta" there is nothing to draw.
        A = torch.empty(n_experts, rank, self.in_features, device=device if device.type == "meta" else "cpu")
        self.A = nn.Parameter(nn.init.uniform_(A, -bound, bound).to(device))
        self.B = nn.Parameter(torch.zeros(n_experts, rank, self.out_features, device=device))

    def forward(self, x, gate=None):
        """Returns W x + (α/r) Σ_e w_e B_e A_e x (and the layer's bias), (N, T, out).

        x: (N, T, in). gate: (N, E), the weights w of each row's experts, or (1, E) for all rows; None leaves the
        experts out.
        """
        if gate is None:
            return self.product(x)
        n_experts, rank, _ = self.A.shape
        A, B = self.A.flatten(0, 1).to(x.dtype), self.B.flatten(0, 1).to(x.dtype)  # (E·r, in), (E·r, out)
        # One product gives A_e x for all experts. Then each expert's r numbers are multiplied by that expert's weight.
        # With E = 2, r = 2 and the weights 2 and 3:
        #     A x                   1   10  100  1000    the first two numbers are expert 0's, the others expert 1's
        #     is multiplied by      2    2    3     3    repeat_interleave, here as a broadcast over r
        #     and not by            2    3    2     3    repeat
        h = linear(x, A).view(*x.shape[:-1], n_experts, rank)                      # (N, T, E, r)
        h = h * gate.to(x.dtype).view(-1, 1, n_experts, 1)
        y = self.product(x.flatten(0, 1))                                          # (N·T, out)
        # y += α/r · h B. This product also sums over the experts. addmm_ adds it in place, so no second tensor of y's
        # size is made. x was flattened first because y must not be a view: autograd copies the gradient of a view that
        # is changed in place.
        y.addmm_(h.view(-1, n_experts * rank), B, alpha=self.scale)
        return y.view(*x.shape[:-1], -1)                                           # (N, T, out)


def expert_layers(model):
    """Returns {name: ExpertLinear} in the model's order. ValueError if the model has no experts."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, ExpertLinear)}
    if not layers:
        raise ValueError("this model has no experts: call lora.add_experts(model) first")
    return layers


def add_experts(model, n_experts=len(EXPERTS), rank=8, alpha=16):
    """Freeze everything in `model` and put experts beside its linear layers, all but the head.

    Returns the trainable parameters: A and B of every layer, in the model's order, fp32, on the model's device. A is
    drawn from torch's global generator on the CPU. Rank 8 and alpha 16 are the paper's. ValueError if there are experts
    already.
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
# PEFT folders: adapter_config.json and adapter_model.safetensors

def tensor_name(layer, matrix):
    """Returns the name that PEFT gives to matrix "A" or "B" of a layer."""
    return f"base_model.model.{layer}.lora_{matrix}.weight"


def write_adapter(folder, rank, alpha, base, tensors):
    """Write one PEFT adapter, atomically. tensors: {layer name: (A (r, in), B (out, r))}; PEFT scales by alpha / r."""
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base), "r": rank,
                "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,  # readers in Go and C++ want an integer
                "target_modules": list(TARGETS), "lora_dropout": 0.0, "bias": "none",
                "fan_in_fan_out": False, "use_rslora": False, "use_dora": False, "inference_mode": True}
    state = {tensor_name(layer, matrix): tensor.detach().float().cpu().contiguous()
             for layer, pair in tensors.items() for matrix, tensor in zip("AB", pair)}
    with atomic(folder) as part:
        part.mkdir()
        (part / "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n")
        save_file(state, part / "adapter_model.safetensors", metadata={"format": "pt"})


def adapter_shape(folder):
    """Returns (rank, alpha) of the experts saved in `folder`, as the first one's adapter_config.json gives them."""
    file = Path(folder) / EXPERTS[0] / "adapter_config.json"
    settings = read_json(file)
    rank, alpha = settings.get("r"), settings.get("lora_alpha")
    if type(rank) is not int or type(alpha) not in (int, float) or not 1 <= rank < 2**16 or not 0 < alpha < 2**31:
        raise UserError(f"{file}: r is {shorten(rank)} and lora_alpha {shorten(alpha)}, expected positive numbers")
    return rank, alpha


def named_experts(model):
    """Returns ({name: ExpertLinear}, rank, alpha). ValueError unless the model has one expert for each of EXPERTS."""
    layers = expert_layers(model)
    first = next(iter(layers.values()))  # the layers differ in width only
    n_experts = len(first.A)
    if n_experts != len(EXPERTS):
        raise ValueError(f"the model has {n_experts} experts, expected {len(EXPERTS)}, one for each name")
    return layers, first.rank, first.alpha


def save_experts(model, folder, base=""):
    """Write the ten experts to `folder`/<expert name>/, a PEFT adapter each. `base` is noted as their base model."""
    layers, rank, alpha = named_experts(model)
    for e, expert in enumerate(EXPERTS):
        write_adapter(Path(folder) / expert, rank, alpha, base,
                      {name: (layer.A[e], layer.B[e].T) for name, layer in layers.items()})


@torch.no_grad()
def load_experts(model, folder):
    """Fill the model's experts from `folder`/<expert name>/. Everything is checked before the model is changed.

    UserError names the file and what differs in it: rank, alpha, a tensor's name or shape, or a setting under which
    PEFT computes something else than ExpertLinear does. ValueError unless the model has ten experts.
    """
    layers, rank, alpha = named_experts(model)
    shapes = {}
    for name, layer in layers.items():
        shapes[tensor_name(name, "A")] = rank, layer.in_features
        shapes[tensor_name(name, "B")] = layer.out_features, rank
    states = []
    for expert in EXPERTS:
        check_adapter(Path(folder) / expert / "adapter_config.json",
                      {"r": rank, "lora_alpha": alpha, "target_modules": sorted(TARGETS)})
        states.append(read_tensors(Path(folder) / expert / "adapter_model.safetensors", shapes,
                                   "was this adapter made for another base model?"))
    for e, state in enumerate(states):
        for name, layer in layers.items():
            layer.A[e] = state[tensor_name(name, "A")]
            layer.B[e] = state[tensor_name(name, "B")].T


# ----------------------------------------------------------------------------------------------------------------------
# The mixture under one fixed gate: as one PEFT adapter, or merged into the dense weights

def one_gate(model, gate):
    """Returns a gate given as (E,) or (1, E), a tensor or a list, as a tensor (E,). ValueError for another shape."""
    n_experts = next(iter(expert_layers(model).values())).A.shape[0]
    gate = torch.as_tensor(gate).detach()
    if gate.shape not in ((n_experts,), (1, n_experts)):
        raise ValueError(f"the gate has shape {tuple(gate.shape)}, expected one weight for each of {n_experts} experts")
    return gate.flatten()


@torch.no_grad()
def export_mixture(model, gate, folder, base=""):
    """Write one PEFT adapter of rank E·r that equals the mixture under this gate, (E,). The gate is multiplied into B.

    The experts are stacked, not averaged: Σ_e w_e B_e A_e is not (Σ_e w_e B_e)(Σ_e w_e A_e), which has terms B_i A_j of
    two different experts. Example: one expert has A = B = 1, another A = B = −1. Each maps x to x, and so does their
    mean Σ_e ½ B_e A_e. But the mean of A is 0, and so is the mean of B.
    """
    gate, layers = one_gate(model, gate), expert_layers(model)
    tensors = {}
    for name, layer in layers.items():
        B = layer.B * gate.to(layer.B)[:, None, None]             # (E, r, out)
        tensors[name] = layer.A.flatten(0, 1), B.flatten(0, 1).T  # (E·r, in), (out, E·r)
    n_experts, first = len(gate), next(iter(layers.values()))     # the layers differ in width only
    # alpha grows with the rank, so that PEFT's scale stays α/r
    write_adapter(folder, n_experts * first.rank, n_experts * first.alpha, base, tensors)


@torch.no_grad()
def merged_tensors(model, gate):
    """Yield (name in the checkpoint, tensor) of the dense model that equals the mixture under this gate, (E,).

    The weights W + (α/r) Σ_e w_e B_e A_e are new tensors, computed in fp32 or wider and rounded to W's dtype once. The
    model stays as it is. ValueError for weights in 8 bits.
    """
    gate = one_gate(model, gate)
    layers = {f"{name}.weight": layer for name, layer in expert_layers(model).items()}
    if any(layer.weight_scale is not None for layer in layers.values()):
        raise ValueError("this model's weights are in 8 bits: load the full weights to merge experts into them")
    for name, tensor in model.state_dict().items():
        if name in layers:
            layer = layers[name]
            B = layer.B * (gate.to(layer.B) * layer.scale)[:, None, None]  # (E, r, out)
            update = B.flatten(0, 1).T @ layer.A.flatten(0, 1)             # (out, in)
            yield name, (tensor + update).to(tensor.dtype)  # the sum has the wider dtype of the two
        elif not name.endswith((".A", ".B")):
            yield name, tensor
