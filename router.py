"""The router: a small language model reads the query, and its last hidden state is compared with ten expert embeddings.

    query ──► Qwen2.5-0.5B ──► h        s_e = cos(h, v_e)        gate = softmax(s / τ)

What is notable:
- the encoder is model.Transformer, padded on the right; h is the state of each row's last real token (pooling: ours)
- cosine, softmax and the contrastive loss run in fp32 whatever surrounds them; the rows of a gate always sum to 1
- gates that people or labels set are similarity vectors put through the same softmax, so that they stay in the family

The theory is Trait Activation: a situation carries cues that call for certain traits, here for poles of the Big Five.

Shapes: B rows, T tokens, D encoder width, E = 10 experts.
"""
import json
from pathlib import Path

import numpy as np
from safetensors.torch import save_file
import torch
from torch import nn
from torch.nn import functional as F

from lora import EXPERTS, TRAITS
from model import last_positions
from support.chat import encode
from support.files import UserError, atomic, read_json, read_tensors, shorten


MAX_QUERY_TOKENS = 512  # ours: the router reads the end of what is longer


# ----------------------------------------------------------------------------------------------------------------------
# Traits and gates

def active_experts(traits):
    """{trait: −1 | 0 | 1} -> (10,) of 0/1 in the order of EXPERTS: 1 the high pole, −1 the low pole, 0 neither.

    {"openness": 1, "extraversion": -1}  ->  [1, 0,  0, 0,  0, 1,  0, 0,  0, 0]
    ValueError for an unknown trait or another value.
    """
    active = [0.0] * len(EXPERTS)
    for trait, value in traits.items():
        if trait not in TRAITS:
            raise ValueError(f"unknown trait {trait!r}, expected one of {', '.join(TRAITS)}")
        if isinstance(value, bool) or value not in (-1, 0, 1):
            raise ValueError(f"{trait} is {value!r}, expected -1, 0 or 1")
        if value:
            active[2 * TRAITS.index(trait) + (value < 0)] = 1.0
    return torch.tensor(active)


def softmax_gate(similarity, temperature):
    """softmax(s / τ) over the experts, (…, E) -> (…, E). For cosines at τ = 1 no weight passes e/(e + 9/e) = 0.451."""
    return (similarity / temperature).softmax(-1)


def oracle_gate(active, temperature):
    """The gate that labels ask for: similarity +1 for active poles and −1 for the others, (…, E) -> (…, E)."""
    return softmax_gate(2 * active.float() - 1, temperature)


def persona_gate(text, temperature):
    """A persona such as "O+,E-:0.5" -> (E,): +x for the pole asked for, −x for its opposite, through the same softmax.

    The letter is the trait's first, the sign its pole, the number after the colon the strength x in (0, 1], else 1.
    """
    similarity = torch.zeros(len(EXPERTS))
    for part in text.split(","):
        name, colon, strength = part.strip().partition(":")
        trait = next((t for t, known in enumerate(TRAITS) if known[0].upper() == name[:1].upper()), None)
        try:
            x = float(strength) if colon else 1.0
        except ValueError:
            x = 0.0
        if trait is None or name[1:] not in ("+", "-") or not 0 < x <= 1:
            raise UserError(f"persona {part.strip()!r}: expected a letter of OCEAN, + or -, and perhaps a strength of "
                            "at most 1 after a colon, with commas between, such as O+,E-:0.5")
        if similarity[2 * trait] != 0:
            raise UserError(f"persona {text!r}: {TRAITS[trait]} is named twice")
        similarity[2 * trait] = x if name[1] == "+" else -x
        similarity[2 * trait + 1] = -similarity[2 * trait]
    return softmax_gate(similarity, temperature)


def raw_gate(text):
    """`--gate` -> (1, E). UserError unless it is ten weights, or names with weights, from 0 up that sum to 1."""
    parts = [part.strip() for part in text.split(",")]
    named = dict(part.partition(":")[::2] for part in parts)
    try:
        if set(named) <= set(EXPERTS) and len(named) == len(parts):
            weights = [float(named[e] or 1) if e in named else 0.0 for e in EXPERTS]
        else:
            weights = [float(part) for part in parts]
    except ValueError:
        weights = []
    if len(weights) != len(EXPERTS) or not all(0 <= w <= 1 for w in weights) or abs(sum(weights) - 1) > 1e-3:
        raise UserError(f"--gate {text!r}: expected ten weights from 0 up that sum to 1, in the order "
                        f"{', '.join(EXPERTS)}, or some of these names with weights, such as high_openness:0.7,"
                        "low_neuroticism:0.3")
    return torch.tensor([weights])


GATE_RULES = {  # gate rules: what each one is, in words for the tables
    "base": "no experts at all", "uniform": "0.1 for each", "random": "drawn from Dirichlet(1) for each query",
    "shuffled": "the router's gate of another query", "learned": "the router's gate",
    "oracle": "softmax of +1 for active poles, -1 for others", "labels": "1/k for each of k active poles"}


def gates_for_rule(rule, active, similarity=None, tau=1.0, seed=0):
    """Gates for a rule of RULES: active (N, E), similarity (N, E) -> (N, E), or None for the base alone."""
    n, n_experts = active.shape
    rng = np.random.default_rng(seed)
    if rule == "base":
        return None
    if rule == "uniform":
        return torch.full((n, n_experts), 1 / n_experts)
    if rule == "random":
        return torch.tensor(rng.dirichlet(np.ones(n_experts), n), dtype=torch.float32)
    if rule == "oracle":
        return oracle_gate(active, tau)
    if rule == "labels":
        return active / active.sum(-1, keepdim=True)
    learned = softmax_gate(similarity, tau)
    if rule == "learned":
        return learned
    if rule == "shuffled":  # along one random cycle through all queries: nobody keeps their own
        cycle = torch.tensor(rng.permutation(n))
        shuffled = torch.empty_like(learned)
        shuffled[cycle] = learned[cycle.roll(1)]
        return shuffled
    raise ValueError(f"unknown gate rule {rule!r}, expected one of {', '.join(GATE_RULES)}")


def gate_statistics(gates):
    """Gates (N, E) -> mean entropy in nats (log 10 = 2.303 is uniform), mean largest weight, mean weight per expert."""
    return {"entropy": -(gates * gates.clamp(min=1e-30).log()).sum(-1).mean().item(),
            "top1": gates.max(-1).values.mean().item(), "usage": [round(u, 5) for u in gates.mean(0).tolist()]}


def format_gate(gate, width=16):
    """A gate (E,) as five lines of text, one a trait, bars relative to the largest weight."""
    top, lines = max(gate.tolist()), []
    for t in range(0, len(EXPERTS), 2):
        halves = [f"{EXPERTS[e].split('_')[0]:>6} {'█' * round(width * gate[e].item() / top):<{width}} {gate[e]:.2f}"
                  for e in (t, t + 1)]
        lines.append(f"  {EXPERTS[t].split('_', 1)[1]:<17}" + " ".join(halves))
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------------------------------
# The model

class Router(nn.Module):
    """Encoder, ten expert embeddings, cosine, softmax. `encoder` is a Transformer; temperature is the gate's τ."""

    def __init__(self, encoder, temperature=1.0):
        super().__init__()
        self.encoder, self.temperature = encoder, temperature
        self.expert_embeddings = nn.Parameter(torch.randn(len(EXPERTS), encoder.config.dim).to(encoder.device))

    def embed(self, ids, lengths):
        """ids (B, T), padded on the right with anything, lengths (B,) -> h (B, D), the last real token's state."""
        return self.encoder.hidden(ids, at=last_positions(ids, lengths))

    def similarity(self, h):
        """h (B, D) -> cosines (B, E), fp32."""
        with torch.autocast(h.device.type, enabled=False):
            return F.normalize(h.float(), dim=-1) @ F.normalize(self.expert_embeddings.float(), dim=-1).T

    def forward(self, ids, lengths):
        """-> gate (B, E), fp32; every row sums to 1."""
        return self.gate(self.similarity(self.embed(ids, lengths)))

    def gate(self, similarity):
        """Cosines (B, E) -> gate (B, E)."""
        return softmax_gate(similarity, self.temperature)


def contrastive_loss(similarity, active, temperature=0.07):
    """Multi-positive InfoNCE (form and temperature ours): similarity (B, E), active (B, E) of 0/1 -> scalar, fp32.

    With c = s / τ_c, positives P and negatives N of a row:
        L = mean over p in P of  −log( e^{c_p} / (e^{c_p} + Σ_{n in N} e^{c_n}) )  =  softplus( logsumexp_N(c) − c_p )
    Positives do not compete with each other. Mean over rows. ValueError for a row without an active expert.
    """
    if not active.any(-1).all():
        raise ValueError("a row has no active expert: records whose traits are all zero are not trained on")
    c = similarity.float() / temperature
    positive = active.to(c.device).bool()
    negatives = c.masked_fill(positive, -torch.inf).logsumexp(-1, keepdim=True)  # (B, 1)
    losses = F.softplus(negatives - c).masked_fill(~positive, 0)                 # (B, E)
    return (losses.sum(-1) / positive.sum(-1)).mean()


def query_ids(tokenizer, query, history=()):
    """What the router reads -> ids: the raw query, or with a history lines "User: …" and "Assistant: …"; its last 512
    tokens. One function for training and evaluation."""
    if history:
        turns = [*history, {"role": "user", "content": query}]
        query = "\n".join(f"{turn['role'].capitalize()}: {turn['content']}" for turn in turns)
    return encode(tokenizer, query)[-MAX_QUERY_TOKENS:] or encode(tokenizer, " ")  # nothing to read is read as a space


# ----------------------------------------------------------------------------------------------------------------------
# Files: config.json and model.safetensors, the encoder's tensors under their public names and expert_embeddings

def save_router(router, folder, **facts):
    """Write the router to `folder`, atomically. `facts` (JSON values) are noted in its config.json."""
    state = {name.removeprefix("encoder."): tensor.detach().cpu().contiguous()
             for name, tensor in router.state_dict().items()}
    settings = {"temperature": router.temperature, "experts": EXPERTS, "dim": router.encoder.config.dim, **facts}
    with atomic(folder) as part:
        part.mkdir()
        (part / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
        save_file(state, part / "model.safetensors", metadata={"format": "pt"})


@torch.no_grad()
def load_router(router, folder):
    """Fill a Router from `folder`; its temperature stays the caller's. UserError names what is missing or differs."""
    settings = read_json(Path(folder) / "config.json")
    if settings.get("experts") != list(EXPERTS):
        raise UserError(f"{folder}: the router's experts are {shorten(settings.get('experts'), 300)}, expected "
                        f"{list(EXPERTS)}")
    own = {name.removeprefix("encoder."): tensor for name, tensor in router.state_dict().items()}
    state = read_tensors(Path(folder) / "model.safetensors", {name: tensor.shape for name, tensor in own.items()},
                         "another encoder's?")
    for name, tensor in own.items():
        tensor.copy_(state[name])
