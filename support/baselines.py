"""Simpler methods than PersonaFuse, for `eval.py experiment baselines`: what can be had without training experts?

Three of them work on the frozen base: an instruction in the system message, activation steering, and nothing at all.
The fourth mixes the warm-up experts by a router that was never trained. `base_alone` and `warmup_experts` return
{method: nats (N,)}, the loss of every test reply summed over its tokens. Open choices are made on validation.
"""
from contextlib import contextmanager
from itertools import product

import numpy as np
import torch

from lora import EXPERTS
from model import gate_of_positions, pad
from router import gates_for_rule, softmax_gate
from support.measure import load_run
from support.rows import make_rows, micro_batches
from train import evaluation_loss


# ----------------------------------------------------------------------------------------------------------------------
# The base, told or pushed to answer in the manner of some poles

def named_poles(cases, cosines):
    """Returns the poles that the router names for every query, {split: (N, E) of 0/1}: its first choice and all others
    above one threshold, that with the best F1 on validation. cases, cosines: {split: cases} and {split: (N, E)}."""
    def above(split, threshold):
        first = cosines[split].max(-1, keepdim=True).values
        return ((cosines[split] >= threshold) | (cosines[split] == first)).float()

    def f1(threshold):
        named, active = above("validation", threshold), cases["validation"].active
        return 2 * (named * active).sum() / (named.sum() + active.sum())

    best = max(np.arange(-0.5, 1, 0.05), key=f1)
    return {split: above(split, best) for split in cases}


def with_instruction(record, poles):
    """Returns the record with a system message that names the poles (E,) of 0/1."""
    manner = " and ".join(EXPERTS[e].replace("_", " ") for e in poles.nonzero()[:, 0])
    system = {"role": "system", "content": f"Answer as someone of {manner}."}
    return {**record, "history": [system, *(record.get("history") or [])]}


@torch.no_grad()
def reply_states(model, rows, tokens):
    """Returns the mean hidden state over each row's reply after every block: (N, layers, D), fp32, on the CPU."""
    kept, found, order = [], [None] * len(rows), {id(row): i for i, row in enumerate(rows)}
    hooks = [block.register_forward_hook(lambda block, given, out: kept.append(out)) for block in model.model.layers]
    try:
        for group in micro_batches(rows, tokens):
            kept.clear()
            ids, lengths = pad([row.ids for row in group], model.device)
            model.hidden(ids)
            for b, row in enumerate(group):
                found[order[id(row)]] = torch.stack([x[b, row.prompt:lengths[b]].float().mean(0).cpu() for x in kept])
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(found)


def steering_vectors(model, cases, tokens):
    """Returns a vector per block and pole, (layers, E, D): the mean state of replies in the pole's manner minus the
    mean state of all other replies."""
    states, active = reply_states(model, cases.rows, tokens), cases.active                # (N, layers, D), (N, E)
    contrast = active / active.sum(0).clamp(min=1) - (1 - active) / (1 - active).sum(0).clamp(min=1)
    return torch.einsum("ne,nld->led", contrast, states)


@contextmanager
def steered(model, layer, vectors):
    """Activation steering: every state after block `layer` moves by gate @ vectors, (B, E) @ (E, D).

    The gate is the one handed to the model. Its experts must be untrained (B = 0), so that they ignore the gate.
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


def base_alone(args, cases, cosines):
    """The base as it is, with an instruction, and steered; the poles come from the labels or from the router."""
    opened, test = load_run(args, args.run, "warmup"), cases["test"]
    base, found = opened.setup.load_base(), {}  # with untrained experts, which add nothing
    poles = {"labels": {split: c.active for split, c in cases.items()}, "router": named_poles(cases, cosines)}
    found["base"] = evaluation_loss(base, test.rows, None, args.tokens)[0]
    for source, active in poles.items():
        records = [with_instruction(record, one) for record, one in zip(test.records, active["test"])]
        found[f"instruction, {source}"] = evaluation_loss(
            base, make_rows(records, opened.chat)[0], None, args.tokens)[0]

    vectors = steering_vectors(base, cases["train"], args.tokens)
    layers = sorted({len(vectors) // 4, len(vectors) // 2, 3 * len(vectors) // 4})
    for source, active in poles.items():
        def steer(split, layer, strength):
            gates = gates_for_rule("labels", active[split])
            with steered(base, layer, strength * vectors[layer]):
                return evaluation_loss(base, cases[split].rows, gates, args.tokens)[0]
        layer, strength = min(product(layers, (0.5, 1, 2, 4)), key=lambda choice: steer("validation", *choice).sum())
        found[f"steering, {source} (block {layer}, x{strength:g})"] = steer("test", layer, strength)
    return found


# ----------------------------------------------------------------------------------------------------------------------
# Warm-up experts without joint training

@torch.no_grad()
def prototype_cosines(router, cases):
    """Returns the scores of a router that was never trained, {split: (N, E)}: the cosine between a query's state in the
    public encoder and each pole's mean state. The mean state of all training queries is subtracted from both."""
    h = {split: torch.cat([router.embed(*pad([row.query], router.encoder.device)) for row in c.rows])
         for split, c in cases.items()}
    mean = h["train"].mean(0)
    router.expert_embeddings.copy_(cases["train"].active.T.to(mean) @ (h["train"] - mean))
    return {split: router.similarity(h[split] - mean).cpu() for split in cases}


def warmup_experts(args, cases, cosines, taus):
    """Warm-up experts under the untrained prototype router and under the trained router, each at its best τ."""
    opened, found = load_run(args, args.run, "warmup"), {}
    prototype = prototype_cosines(opened.setup.load_router(), cases)
    for name, scores in (("prototype", prototype), ("trained", cosines)):
        def routed(split, tau):
            return evaluation_loss(opened.model, cases[split].rows, softmax_gate(scores[split], tau), args.tokens)[0]
        tau = min(taus, key=lambda tau: routed("validation", tau).sum())
        found[f"warm-up experts, {name} router (tau {tau:g})"] = routed("test", tau)
    return found
