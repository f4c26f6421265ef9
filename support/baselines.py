"""Simpler methods than PersonaFuse, for `eval.py experiment baselines`: how well do they do on the same records?

- `base_alone`: the frozen base as it is, with an instruction in the system message, and with activation steering.
- `warmup_experts`: the experts after warm-up, without joint training, mixed by an untrained or by the trained router.
- One LoRA of the same size is in support/experiments.py, because it is trained.

Both functions return {method: nats (N,)}, the loss of every test reply summed over its tokens. What a method leaves
open is chosen on validation. Arguments: splits {name: what load_split returns}, and cosines {name: (N, E)}, the trained
router's scores of these records.
"""
from contextlib import contextmanager
from itertools import product

import numpy as np
import torch

from lora import EXPERTS
from model import gate_of_positions, pad
from router import gates_for_rule, softmax_gate
from support.measure import load_run
from support.rows import make_rows
from train import evaluation_loss


# ----------------------------------------------------------------------------------------------------------------------
# The base, instructed or steered to answer in the manner of some poles

def predict_poles(splits, cosines):
    """Returns the poles that the router predicts for every query, {name: (N, E) of 0/1}.

    They are the pole with the highest cosine and all others above a threshold. The threshold has the best F1 on
    validation.
    """
    def above(name, threshold):
        highest = cosines[name].max(-1, keepdim=True).values
        return ((cosines[name] >= threshold) | (cosines[name] == highest)).float()

    def f1(threshold):
        predicted, active = above("validation", threshold), splits["validation"].active
        return 2 * (predicted * active).sum() / (predicted.sum() + active.sum())

    best = max(np.arange(-0.5, 1, 0.05), key=f1)
    return {name: above(name, best) for name in splits}


def with_instruction(record, poles):
    """Returns the record with a system message that names the active poles. poles: (E,) of 0/1."""
    manner = " and ".join(EXPERTS[e].replace("_", " ") for e in poles.nonzero()[:, 0])
    system = {"role": "system", "content": f"Answer as someone of {manner}."}
    return {**record, "history": [system, *(record.get("history") or [])]}


@torch.no_grad()
def reply_states(model, rows):
    """Returns the hidden state after every block, averaged over each row's reply: (N, layers, D), fp32, on the CPU."""
    outputs, states = [], []
    hooks = [block.register_forward_hook(lambda block, args, output: outputs.append(output))
             for block in model.model.layers]
    try:
        for row in rows:
            outputs.clear()
            ids, _ = pad([row.ids], model.device)
            model.hidden(ids)
            states.append(torch.stack([x[0, row.n_prompt:].float().mean(0).cpu() for x in outputs]))  # (layers, D)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(states)


def steering_vectors(model, split):
    """Returns a vector for each block and pole, (layers, E, D): the mean state of replies in the pole's manner minus
    the mean state of all other replies."""
    states, active = reply_states(model, split.rows), split.active                        # (N, layers, D), (N, E)
    contrast = active / active.sum(0).clamp(min=1) - (1 - active) / (1 - active).sum(0).clamp(min=1)
    return torch.einsum("ne,nld->led", contrast, states)


@contextmanager
def steered(model, layer, vectors):
    """Activation steering: in this context, every hidden state after block `layer` is shifted by gate @ vectors.

    gate: (B, E), the one that the model is called with. vectors: (E, D). The model's experts must be untrained (B = 0),
    so that the gate changes nothing else.
    """
    vectors = vectors.to(model.device, model.dtype)

    def move(block, given, named, out):
        x, _, gate = given[:3]
        if "positions" in named:  # the last block computes only some positions when a loss asks for them
            gate = gate_of_positions(gate, named["positions"], x.shape[1])
        return out + (gate.to(out.dtype) @ vectors)[:, None]
    hook = model.model.layers[layer].register_forward_hook(move, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def base_alone(args, splits, cosines):
    """Measures the base as it is, with an instruction, and steered. The poles are the labels or the router's."""
    opened, test = load_run(args, args.run, "warmup"), splits["test"]
    base, nats = opened.setup.load_base(), {}  # its experts are untrained and add nothing
    poles = {"labels": {name: split.active for name, split in splits.items()},
             "router": predict_poles(splits, cosines)}
    nats["base"] = evaluation_loss(base, test.rows, None, args.tokens)[0]
    for source, active in poles.items():
        records = [with_instruction(record, of_record) for record, of_record in zip(test.records, active["test"])]
        nats[f"instruction, {source}"] = evaluation_loss(
            base, make_rows(records, opened.chat)[0], None, args.tokens)[0]

    vectors = steering_vectors(base, splits["train"])
    layers = sorted({len(vectors) // 4, len(vectors) // 2, 3 * len(vectors) // 4})
    for source, active in poles.items():
        def steer(name, layer, strength):
            gates = gates_for_rule("labels", active[name])
            with steered(base, layer, strength * vectors[layer]):
                return evaluation_loss(base, splits[name].rows, gates, args.tokens)[0]
        layer, strength = min(product(layers, (0.5, 1, 2, 4)), key=lambda choice: steer("validation", *choice).sum())
        nats[f"steering, {source} (block {layer}, x{strength:g})"] = steer("test", layer, strength)
    return nats


# ----------------------------------------------------------------------------------------------------------------------
# Warm-up experts without joint training

@torch.no_grad()
def prototype_cosines(router, splits):
    """Returns the scores of an untrained router, {name: (N, E)}.

    A score is the cosine between a query's state in the public encoder and the mean state of a pole's training queries.
    The mean state of all training queries is subtracted from both.
    """
    h = {name: torch.cat([router.embed(*pad([row.query], router.encoder.device)) for row in split.rows])
         for name, split in splits.items()}
    mean = h["train"].mean(0)
    router.expert_embeddings.copy_(splits["train"].active.T.to(mean) @ (h["train"] - mean))
    return {name: router.similarity(h[name] - mean).cpu() for name in splits}


def warmup_experts(args, splits, cosines, taus):
    """Measures the warm-up experts under the untrained and under the trained router, each at its best τ of `taus`."""
    opened, nats = load_run(args, args.run, "warmup"), {}
    prototype = prototype_cosines(opened.setup.load_router(), splits)
    for router, scores in (("prototype", prototype), ("trained", cosines)):
        def routed(name, tau):
            return evaluation_loss(opened.model, splits[name].rows, softmax_gate(scores[name], tau), args.tokens)[0]
        tau = min(taus, key=lambda tau: routed("validation", tau).sum())
        nats[f"warm-up experts, {router} router (tau {tau:g})"] = routed("test", tau)
    return nats
