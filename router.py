"""The router: a small language model reads the query and decides how much each of the ten experts contributes.

    query ──► Qwen2.5-0.5B ──► h        s_e = cos(h, v_e)        gate = softmax(s / τ)

v_e is a learned embedding of expert e. The theory behind it is Trait Activation: a situation carries cues that call for
certain traits, here for poles of the Big Five.

What is notable:
- the encoder is model.Transformer; h is the mean of the hidden states of the tokens that it reads. This pooling is our
  choice: with it the router finds the poles of a stranger's messages far better than with the last token's state
- cosine, softmax and contrastive loss run in fp32, under bf16 autocast too
- a persona, and the oracle's gate made from labels, are similarity vectors that go through the same softmax at the
  same τ. Such gates resemble those of the joint stage. `--gate` (raw_gate) and the rules "labels", "uniform" and
  "random" of GATE_RULES give the weights themselves, without a softmax

Read it from the top: traits, the router and its loss, gates that do not come from the router, files.

Shapes: B rows, T tokens, D encoder width, E = 10 experts.
"""
import json
from pathlib import Path

import numpy as np
from safetensors.torch import save_file
import torch
from torch import nn
from torch.nn import functional as F

from lora import EXPERTS, SHORT_NAMES, TRAITS
from model import to_device
from support.chat import encode
from support.files import UserError, atomic, read_json, shorten
from support.weights import read_tensors


MAX_QUERY_TOKENS = 512  # our choice: of a longer query, the router reads the end
DECAY = 0.5  # our choice (docs/results.md, turns); see decaying_mean


def active_experts(traits):
    """Returns which experts a trait vector {trait: −1, 0 or 1} calls for: (10,) of 0 and 1, in the order of EXPERTS.

    1 calls for the high pole, −1 for the low pole, 0 for neither:
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


# ----------------------------------------------------------------------------------------------------------------------
# The router

def query_ids(tokenizer, query, history=()):
    """Returns the ids of one text that the router reads, in training and evaluation: at most the last MAX_QUERY_TOKENS.

    A query alone is read as it is. With a history, each turn is a line "User: …" or "Assistant: …", the query last. So
    records with labels are read; for a reply, each message is read alone (`LoadedRun.chat_similarity`).
    """
    if history:
        turns = [*history, {"role": "user", "content": query}]
        query = "\n".join(f"{turn['role'].capitalize()}: {turn['content']}" for turn in turns)
    return encode(tokenizer, query)[-MAX_QUERY_TOKENS:] or encode(tokenizer, " ")  # the encoder needs a token


def softmax_gate(similarity, temperature):
    """Returns softmax(s / τ) over the experts, (…, E), for similarities (…, E).

    At τ = 1, no weight of ten cosines can exceed e / (e + 9/e) = 0.451: one cosine is then 1 and the other nine are −1.
    Real cosines lie closer together, so that the gate is nearly uniform. One of 0.8 among nine of 0 has weight 0.198.
    """
    return (similarity / temperature).softmax(-1)


def decaying_mean(similarity):
    """Returns the similarities that set a chat's gate, (…, E), from those of its T messages, oldest first, (T, …, E).

    Each message counts DECAY times as much as the next: a new subject moves the gate, "And then?" leaves it.
    """
    weights = DECAY ** torch.arange(len(similarity) - 1.0, -1, -1)
    return torch.tensordot(weights / weights.sum(), similarity, 1)


class Router(nn.Module):
    """The encoder (a Transformer) and ten expert embeddings. `temperature` is the gate's τ."""

    def __init__(self, encoder, temperature=1.0):
        super().__init__()
        self.encoder, self.temperature = encoder, temperature
        # Only their directions matter. Short vectors turn faster, since AdamW's steps do not depend on their length.
        start = 0.02 * torch.randn(len(EXPERTS), encoder.config.dim)
        self.expert_embeddings = nn.Parameter(start.to(encoder.device))

    def embed(self, ids, lengths):
        """Returns h (B, D), the mean of the hidden states of each row's tokens. ids: (B, T), padded on the right;
        lengths: (B,).

        The encoder is causal, so no token sees the padding after it, and the padding may be any ids.
        """
        states = self.encoder.hidden(ids)                                                  # (B, T, D)
        is_token = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]        # (B, T)
        return ((states.float() * is_token[..., None]).sum(1) / lengths[:, None]).to(states.dtype)

    def similarity(self, h):
        """Returns the cosines of h (B, D) with the expert embeddings, (B, E), fp32."""
        with torch.autocast(h.device.type, enabled=False):
            return F.normalize(h.float(), dim=-1) @ F.normalize(self.expert_embeddings.float(), dim=-1).T

    def gate(self, similarity):
        """Returns the gate for cosines (B, E): (B, E), where every row sums to 1."""
        return softmax_gate(similarity, self.temperature)

    def forward(self, ids, lengths):
        """Returns the gate (B, E), fp32, for ids (B, T), padded on the right, and lengths (B,)."""
        return self.gate(self.similarity(self.embed(ids, lengths)))


def contrastive_loss(similarity, active, temperature=0.07):
    """Multi-positive InfoNCE: pulls h towards the embeddings of active experts and pushes it away from the others.

    similarity: (B, E), active: (B, E) of 0 and 1. Returns a scalar in fp32, the mean over rows of

        mean over p in P of  −log( e^{c_p} / (e^{c_p} + Σ_{n in N} e^{c_n}) )      c = s / τ_c

    where P are the row's active experts and N the others. So an active expert competes with the inactive ones but not
    with another active one. The paper gives neither the form nor τ_c; both are our choice. ValueError for a row
    without an active expert.
    """
    if not active.any(-1).all():
        raise ValueError("a row has no active expert: records whose traits are all zero are not trained on")
    c = similarity.float() / temperature
    positive = to_device(active, c.device).bool()
    negatives = c.masked_fill(positive, -torch.inf).logsumexp(-1, keepdim=True)  # (B, 1): log Σ_n e^{c_n}
    # −log( e^c / (e^c + e^n) ) = log(1 + e^{n − c}) = softplus(n − c), which does not overflow
    losses = F.softplus(negatives - c).masked_fill(~positive, 0)                 # (B, E)
    return (losses.sum(-1) / positive.sum(-1)).mean()


# ----------------------------------------------------------------------------------------------------------------------
# Gates that do not come from the router: from labels, from a person, and for comparisons

def oracle_gate(active, temperature):
    """Returns the gate that labels ask for, (…, E): similarity 1 for active experts (…, E) and −1 for the others."""
    return softmax_gate(2 * active.float() - 1, temperature)


def persona_gate(text, temperature):
    """Returns the gate (E,) of a persona such as "O+,E-:0.5".

    A part is a trait's first letter, the sign of the pole and, after a colon, a strength x in (0, 1], by default 1.
    The pole has similarity x and its opposite −x; traits that are not named have 0:
        "O+,E-:0.5"  ->  softmax([1, −1,  0, 0,  −0.5, 0.5,  0, 0,  0, 0] / τ)
    UserError for anything else.
    """
    similarity = torch.zeros(len(EXPERTS))
    for part in text.split(","):
        name, colon, strength = part.strip().partition(":")
        try:
            expert, x = SHORT_NAMES.index(name.upper()), float(strength) if colon else 1.0
        except ValueError:
            x = 0.0
        if not 0 < x <= 1:
            raise UserError(f"persona {part.strip()!r}: expected a letter of OCEAN, + or -, and perhaps a strength of "
                            "at most 1 after a colon, with commas between, such as O+,E-:0.5")
        if similarity[expert] != 0:
            raise UserError(f"persona {text!r}: {TRAITS[expert // 2]} is named twice")
        similarity[expert], similarity[expert ^ 1] = x, -x  # 2t ^ 1 is 2t + 1 and back: the other pole
    return softmax_gate(similarity, temperature)


def raw_gate(text):
    """Returns the gate (1, E) that `--gate` spells out: ten weights, or some experts' names with weights.

    A name alone has weight 1. UserError unless the weights are 0 or more and sum to 1.
    """
    parts = [part.strip() for part in text.split(",")]
    named = dict(part.partition(":")[::2] for part in parts)  # {"high_openness": "0.7"}
    try:
        if named.keys() <= set(EXPERTS) and len(named) == len(parts):
            weights = [float(named.get(expert, "0") or "1") for expert in EXPERTS]
        else:
            weights = [float(part) for part in parts]
    except ValueError:
        weights = []
    if len(weights) != len(EXPERTS) or not all(0 <= w <= 1 for w in weights) or abs(sum(weights) - 1) > 1e-3:
        raise UserError(f"--gate {text!r}: expected ten weights from 0 up that sum to 1, in the order "
                        f"{', '.join(EXPERTS)}, or some of these names with weights, such as "
                        "high_openness:0.7,low_neuroticism:0.3")
    return torch.tensor([weights])


GATE_RULES = {  # the rules of gates_for_rule, as tables of results describe them
    "base": "no experts at all",
    "uniform": "0.1 for each",
    "random": "drawn from Dirichlet(1) for each query",
    "shuffled": "the router's gate of another query",
    "learned": "the router's gate",
    "oracle": "softmax of +1 for active poles, -1 for others",
    "labels": "1/k for each of k active poles",
}


def gates_for_rule(rule, active, similarity=None, tau=1.0, seed=0):
    """Returns the gates (N, E) of N queries under a rule of GATE_RULES, or None for the base model alone.

    active: (N, E) of 0 and 1, the labels. similarity: (N, E), the router's cosines, for "learned" and "shuffled".
    """
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
    if rule == "learned":
        return softmax_gate(similarity, tau)
    if rule == "shuffled":  # pass the gates on along one random cycle through all queries: no query keeps its own
        learned, cycle = softmax_gate(similarity, tau), torch.tensor(rng.permutation(n))
        shuffled = torch.empty_like(learned)
        shuffled[cycle] = learned[cycle.roll(1)]
        return shuffled
    raise ValueError(f"unknown gate rule {rule!r}, expected one of {', '.join(GATE_RULES)}")


def gate_statistics(gates):
    """Returns the log's figures for gates (N, E): the mean entropy in nats (a uniform gate's is log 10 = 2.303), the
    mean largest weight, and each expert's mean weight."""
    return {"entropy": -(gates * gates.clamp(min=1e-30).log()).sum(-1).mean().item(),
            "top1": gates.max(-1).values.mean().item(), "usage": [round(u, 5) for u in gates.mean(0).tolist()]}


# ----------------------------------------------------------------------------------------------------------------------
# Files: config.json, and model.safetensors with expert_embeddings and the encoder's tensors, named as in its checkpoint

def tensors_to_save(router):
    """Returns {name in model.safetensors: tensor}. The tensors share the router's memory."""
    return {name.removeprefix("encoder."): tensor for name, tensor in router.state_dict().items()}


def save_router(router, folder, **more_settings):
    """Write the router to `folder`, atomically. `more_settings` (JSON values) are added to its config.json."""
    state = {name: tensor.cpu().contiguous() for name, tensor in tensors_to_save(router).items()}
    settings = {"temperature": router.temperature, "experts": EXPERTS, "dim": router.encoder.config.dim,
                "pooling": "mean", **more_settings}
    with atomic(folder) as part:
        part.mkdir()
        (part / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
        save_file(state, part / "model.safetensors", metadata={"format": "pt"})


@torch.no_grad()
def load_router(router, folder):
    """Fill a Router from `folder`, but keep its temperature. Everything is checked before the router is changed.

    UserError names the file and what differs in it: the experts, the pooling, or a tensor's name or shape.
    """
    folder, own = Path(folder), tensors_to_save(router)
    settings = read_json(folder / "config.json")
    for key, expected in (("experts", list(EXPERTS)), ("pooling", "mean")):
        if settings.get(key) != expected:
            raise UserError(f"{folder / 'config.json'}: {key} is {shorten(settings.get(key), 300)}, expected "
                            f"{expected}: another version of this program trained the router")
    state = read_tensors(folder / "model.safetensors", {name: tensor.shape for name, tensor in own.items()},
                         "was this router made for another encoder?")
    for name, tensor in own.items():
        tensor.copy_(state[name])
