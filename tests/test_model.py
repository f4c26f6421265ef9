"""The decoder, its generation and its loader.

- Parity: fp32 logits and gradients equal those of `transformers` on four small shapes with random parameters.
- Mutants: each classic mistake, made on purpose, must show in the same comparison.
- Parts: RoPE, RMSNorm, padding, recomputation, bf16, weights in 8 bits, some positions only.
- Generation: cached equals uncached, a batch equals its rows one by one, a shared prefix changes nothing, sampling
  follows the probabilities.
- Loading: both styles of config.json, shards, dtypes, memory, and one clear error for every broken folder.

`transformers` is optional: without it the tests that need it are skipped.
"""
import copy
import functools
import io
import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

import model as M
from support import chat as chat_module
from support import compile
from support import matmul, weights as weights_module
from harness import SMALL, STRETCHED, in_8_bits, published, randomise
from lora import add_experts
from model import CONFIGS, Config, Transformer
from support.files import UserError, atomic
from support.int8 import quantise

T = 512
TINY = Config(40, 16, 2, 4, 2, 8, 24, 1e-5, 1e4)
each_family = pytest.mark.parametrize("name", SMALL)


# ----------------------------------------------------------------------------------------------------------------------
# Helpers

def newer_style(found):
    """The same with RoPE's settings inside rope_parameters, as newer tools write it."""
    found = dict(found)
    theta, scaling = found.pop("rope_theta"), found.pop("rope_scaling", None)
    return found | {"rope_parameters": {"rope_theta": theta, "rope_type": "default"} | (scaling or {})}


def difference(ours, reference):
    return (ours.float() - reference.float()).abs()


def assert_near(ours, reference, tolerance, what):
    d = difference(ours, reference)
    assert d.max() <= tolerance, f"{what}: the largest difference is {d.max():.3g}, the mean {d.mean():.3g}"


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def write_model(path, config=TINY, shards=1, seed=0):
    """Write a model folder with random weights. Returns its state dict."""
    state = {name: p.detach().clone() for name, p in randomise(Transformer(config), seed).named_parameters()}
    write_json(path / "config.json", published(config))
    if shards == 1:
        save_file(state, path / "model.safetensors")
        return state
    files = [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    where = {name: files[i % shards] for i, name in enumerate(state)}
    for file in files:
        save_file({name: state[name] for name in state if where[name] == file}, path / file)
    write_json(path / "model.safetensors.index.json", {"metadata": {}, "weight_map": where})
    return state


def load(path, dtype=torch.float32):
    return Transformer.from_pretrained(path, dtype=dtype)


def random_ids(config, rows, tokens, seed=1):
    return torch.randint(config.vocab_size, (rows, tokens), generator=torch.Generator().manual_seed(seed))


def random_prompts(config, lengths, seed=2):
    return [random_ids(config, 1, n, seed + i)[0].tolist() for i, n in enumerate(lengths)]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """A function: name -> the transformers model of that shape, its folder, some ids and its logits for them."""
    transformers = pytest.importorskip("transformers")

    @functools.cache
    def make(name):
        path = tmp_path_factory.mktemp(name)
        write_json(path / "config.json", published(SMALL[name]))
        theirs = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(path))
        randomise(theirs.eval()).save_pretrained(path)  # overwrites config.json in the style of that version
        ids = random_ids(SMALL[name], 1, T)
        with torch.no_grad():
            return SimpleNamespace(path=path, model=theirs, ids=ids, logits=theirs(ids).logits)

    return make


@pytest.fixture(scope="module")
def ours():
    """A function: name -> our model of that shape with random weights. Tests share it and must not change it."""
    return functools.cache(lambda name: randomise(Transformer(SMALL[name])).eval().requires_grad_(False))


# ----------------------------------------------------------------------------------------------------------------------
# Parity, and mutants that must break it

@pytest.mark.parametrize("name", ["Llama-3.1", "Llama-3.2"])
def test_all_branches_of_the_rope_scaling_act_in_the_parity_test(name):
    """There are frequencies that are kept, blended and slowed, and T is long enough for each change to be visible."""
    config = SMALL[name]
    ratio = M.rope_frequencies(replace(config, rope_scaling=None)) / M.rope_frequencies(config)
    factor = config.rope_scaling["factor"]
    kept, slowed = ratio == 1, torch.isclose(ratio, torch.tensor(factor))
    blended = (ratio > 1.01) & (ratio < factor - 0.01)
    assert kept.any() and blended.any() and slowed.any() and (kept | blended | slowed).all()
    turned = T * (M.rope_frequencies(replace(config, rope_scaling=None)) - M.rope_frequencies(config))
    assert turned[blended].max() > 1 and turned[slowed].max() > 1  # radians


def grouping(our):
    """Query head i reads key/value head i % K, not i // (H/K): the mistake of repeat for repeat_interleave. With H = 4
    and K = 2, moving the query heads into the order 0, 2, 1, 3 does the same."""
    c = our.config
    order = torch.arange(c.n_heads).view(-1, c.n_kv_heads).T.flatten()
    for block in our.model.layers:
        a = block.self_attn
        for p in (a.q_proj.weight, a.q_proj.bias):
            if p is not None:
                p.copy_(p.unflatten(0, (c.n_heads, -1))[order].flatten(0, 1))
        a.o_proj.weight.copy_(a.o_proj.weight.unflatten(1, (c.n_heads, -1))[:, order].flatten(1))


def interleaved(x, cos, sin):
    """The other RoPE layout: pairs (0, 1), (2, 3), … instead of (0, d/2), (1, d/2 + 1), …"""
    cos, sin = (t[..., :t.shape[-1] // 2] for t in (cos, sin))
    a, b = x[..., ::2], x[..., 1::2]
    return torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)


def set_config(our, **changes):
    for module in our.modules():
        if hasattr(module, "config"):
            module.config = replace(module.config, **changes)


def no_bias(our):
    for name, p in our.named_parameters():
        if name.endswith("bias"):
            p.zero_()


def swap(our, first, second):
    for block in our.model.layers:
        a, b = block.get_parameter(first), block.get_parameter(second)
        a.data, b.data = b.data, a.data


def ten_times_eps(our):
    for module in our.modules():
        if isinstance(module, M.RMSNorm):
            module.eps *= 10


rotate = M.rotate
MUTANTS = {  # name: how to break (our model, monkeypatch)
    "no RoPE scaling": lambda our, patch: set_config(our, rope_scaling=None),
    "theta 1e4": lambda our, patch: set_config(our, rope_theta=1e4),
    "interleaved RoPE": lambda our, patch: patch.setattr(M, "rotate", interleaved),
    "RoPE sign": lambda our, patch: patch.setattr(M, "rotate", lambda x, cos, sin: rotate(x, cos, -sin)),
    "repeat, not repeat_interleave": lambda our, patch: grouping(our),
    "no QKV bias": lambda our, patch: no_bias(our),
    "gate and up swapped": lambda our, patch: swap(our, "mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "norms swapped": lambda our, patch: swap(our, "input_layernorm.weight", "post_attention_layernorm.weight"),
    "ten times eps": lambda our, patch: ten_times_eps(our),
}
APPLIES = {"no RoPE scaling": lambda config: config.rope_scaling, "no QKV bias": lambda config: config.qkv_bias}


@pytest.mark.parametrize("name, mutant", [
    (name, mutant) for mutant in [None, *MUTANTS] for name, config in SMALL.items()
    if APPLIES.get(mutant, lambda config: True)(config)])
@torch.no_grad()
def test_logits_equal_the_references_to_the_last_bit_and_no_classic_mistake_goes_unnoticed(
        name, mutant, reference, monkeypatch):
    """Exactly equal, since the same operations are done in the same order on the same shapes. The folder that the
    reference saved goes through our loader. mutant None is the unchanged model."""
    there = reference(name)
    assert Config.from_dir(there.path) == SMALL[name]
    our = load(there.path)
    if mutant:
        MUTANTS[mutant](our, monkeypatch)
    largest = difference(our(there.ids), there.logits).max().item()
    assert largest > 1e-3 if mutant else largest == 0, f"{mutant or 'unchanged'}: largest difference {largest:.3g}"


def test_the_other_rope_layout_is_a_rotation_too():
    """The mutant is the classic mistake and not just noise: it keeps lengths and turns nothing at position 0."""
    x, angles = torch.randn(3, 8), torch.randn(3, 4).repeat(1, 2)
    torch.testing.assert_close(interleaved(x, angles.cos(), angles.sin()).norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(interleaved(x, torch.ones(3, 8), torch.zeros(3, 8)), x)


@pytest.mark.parametrize("name", ["Llama-3.1", "Qwen2.5"])
def test_gradients_equal_the_references(name, reference):
    """For every parameter, to 1e-6 of its largest entry: a few roundings of fp32, because the backward pass may sum in
    another order."""
    there = reference(name)
    our, grads = load(there.path), []
    for model, logits_of in ((our, our), (there.model, lambda ids: there.model(ids).logits)):
        model.zero_grad()
        F.cross_entropy(logits_of(there.ids)[:, :-1].flatten(0, 1), there.ids[:, 1:].flatten()).backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    assert grads[0].keys() == grads[1].keys()
    for key, expected in grads[1].items():
        assert expected.abs().max() > 0, key
        assert_near(grads[0][key], expected, 1e-6 * expected.abs().max(), key)


@each_family
@torch.no_grad()
def test_bf16_error_is_no_larger_than_the_references(name, reference):
    """Each is compared with fp32: two correct bf16 models may differ from each other by more than each of them errs.
    The reference is loaded as bf16, because a cast would round its RoPE frequencies."""
    from transformers import AutoModelForCausalLM
    there = reference(name)
    theirs = difference(AutoModelForCausalLM.from_pretrained(there.path, dtype=torch.bfloat16)(there.ids).logits,
                        there.logits)
    our = difference(load(there.path, torch.bfloat16)(there.ids), there.logits)
    assert theirs.mean() > 0
    assert our.max() <= 1.25 * theirs.max(), f"largest error {our.max():.3g}, the reference's {theirs.max():.3g}"
    assert our.mean() <= 1.25 * theirs.mean(), f"mean error {our.mean():.3g}, the reference's {theirs.mean():.3g}"


# ----------------------------------------------------------------------------------------------------------------------
# Parts apart

@pytest.mark.parametrize("config", [*SMALL.values(), *CONFIGS.values()], ids=[*SMALL, *CONFIGS])
def test_rope_frequencies_equal_the_references(config, tmp_path):
    transformers = pytest.importorskip("transformers")
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
    write_json(tmp_path / "config.json", published(config))
    theirs = LlamaRotaryEmbedding(transformers.AutoConfig.from_pretrained(tmp_path)).inv_freq
    assert_near(M.rope_frequencies(config), theirs, 0.0, "inv_freq")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_equals_the_references(dtype):
    pytest.importorskip("transformers")
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    x = torch.randn(3, 5, 48).to(dtype)
    norms = [norm(48, 1e-3).to(dtype) for norm in (M.RMSNorm, LlamaRMSNorm)]
    for norm in norms:
        norm.weight.data = torch.linspace(-1, 2, 48, dtype=dtype)
    assert torch.equal(norms[0](x), norms[1](x)) and norms[0](x).dtype == dtype


def test_rms_norm_is_its_formula_and_keeps_the_precision_of_fp64():
    """x / √(mean of squares + eps) · weight. A mean in fp32 would leave an error of 1e-7."""
    x, norm = torch.randn(3, 48, dtype=torch.float64), M.RMSNorm(48, 1e-3).double()
    norm.weight.data = torch.linspace(-1, 2, 48, dtype=torch.float64)
    expected = norm.weight * x / (x.square().mean(-1, keepdim=True) + 1e-3).sqrt()
    torch.testing.assert_close(norm(x), expected, rtol=1e-12, atol=1e-14)


def test_rotate_pairs_the_two_halves():
    """The worked example of its docstring: [x0, x1, x2, x3] · cos + [−x2, −x3, x0, x1] · sin."""
    x, cos, sin = torch.tensor([1.0, 2, 3, 4]), torch.tensor([10.0, 20, 10, 20]), torch.tensor([100.0, 200, 100, 200])
    assert M.rotate(x, cos, sin).tolist() == [10 - 300, 40 - 800, 30 + 100, 80 + 400]


def test_attention_scores_depend_on_the_distance_only():
    angles = torch.arange(40.0)[:, None] * M.rope_frequencies(SMALL["Llama-3.1"]).repeat(2)
    q, k = (M.rotate(torch.randn(32), angles.cos(), angles.sin()) for _ in range(2))
    scores = q @ k.T
    torch.testing.assert_close(scores[5:, 5:], scores[:-5, :-5], rtol=1e-4, atol=1e-4)
    assert (scores[0] - scores[0, 0]).abs().max() > 0.1


@each_family
def test_no_token_sees_what_follows_it_and_every_token_sees_what_went_before(name, ours):
    ids = random_ids(SMALL[name], 1, 24)
    other = ids.clone()
    other[0, 10] = (ids[0, 10] + 1) % SMALL[name].vocab_size
    d = difference(ours(name)(ids), ours(name)(other))[0].amax(-1)
    assert (d[:10] == 0).all() and (d[10:] > 0).all()


@each_family
def test_padding_on_the_right_changes_nothing(name, ours):
    """Bitwise for other pad ids; to 1e-5 for more padding, because matrix products of other shapes sum in another
    order."""
    our, lengths = ours(name), [40, 7, 23, 1]
    prompts = random_prompts(our.config, lengths)
    ids, found = M.pad(prompts)
    real = torch.arange(40) < found[:, None]
    assert found.tolist() == lengths and ids[real].tolist() == sum(prompts, [])
    padded = our(ids)
    noise = torch.where(real, ids, random_ids(our.config, 4, 40, seed=9))
    assert (noise != ids).any()
    assert torch.equal(our(noise)[real], padded[real])
    assert_near(our(F.pad(ids, (0, 30)))[:, :40][real], padded[real], 1e-5, "thirty more")
    for row, prompt in enumerate(prompts):
        assert_near(our(torch.tensor([prompt]))[0], padded[row, :len(prompt)], 1e-5, f"row {row} alone")


def test_recomputing_gives_the_same_loss_and_gradients_and_keeps_less():
    """Bitwise, since the same operations run again on the same inputs."""
    ids, found = random_ids(SMALL["Qwen2.5"], 2, 64), []
    for recompute in (False, True):
        our, kept = randomise(Transformer(SMALL["Qwen2.5"])), []
        our.recompute = recompute
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.numel()), t)[1], lambda t: t):
            loss = our(ids).square().mean()
        loss.backward()
        found.append((loss, sum(kept), {name: p.grad for name, p in our.named_parameters()}))
    (loss, kept, grads), (loss_again, kept_again, grads_again) = found
    assert torch.equal(loss, loss_again) and kept_again < kept / 3
    for name in grads:
        assert grads[name].abs().max() > 0 and torch.equal(grads[name], grads_again[name]), name


def test_hidden_then_head_is_forward(ours):
    """Training and generation call hidden and head, because they need the logits of few positions."""
    our, ids = ours("SmolLM2"), random_ids(SMALL["SmolLM2"], 2, 9)
    assert our.hidden(ids).shape == (2, 9, our.config.dim)
    assert torch.equal(our.head(our.hidden(ids)), our(ids))


@pytest.mark.parametrize("with_gate", [False, True])
@pytest.mark.parametrize("after", ["nothing", "a prefix", "recompute"])
def test_some_positions_equal_the_same_among_all_and_the_last_mlp_computes_no_others(with_gate, after):
    """States and gradients; each position has the gate of its own row."""
    our, ids = Transformer(SMALL["SmolLM2"]), random_ids(SMALL["SmolLM2"], 3, 9)
    positions = torch.tensor([0, 8, 9, 20, 26, 20])
    our.recompute, gate = after == "recompute", None
    with torch.no_grad():
        trained = add_experts(randomise(our)) if with_gate else list(randomise(our).parameters())
        our.double()
        for B in trained[1::2] * with_gate:
            B.normal_(std=0.1)
    if with_gate:
        gate = torch.rand(1 if after == "a prefix" else 3, 10).double().requires_grad_()  # one for all, or one a row
    cache = M.Prefix.compute(our, [5, 6, 7], gate) if after == "a prefix" else None
    seen = [[] for _ in our.model.layers]
    for shapes, layer in zip(seen, our.model.layers):
        layer.mlp.register_forward_pre_hook(lambda _, inputs, shapes=shapes: shapes.append(tuple(inputs[0].shape)))
    wanted = [*trained, gate] if with_gate else trained
    found = []
    for h in (our.hidden(ids, gate, cache).flatten(0, 1)[positions], our.hidden(ids, gate, cache, positions)):
        found.append((h, *torch.autograd.grad((h * torch.arange(6 * our.config.dim).view(6, -1)).sum(), wanted)))
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-6) and b.abs().max() > 1e-3 for a, b in zip(*found))
    D = our.config.dim
    assert all(set(shapes) == {(3, 9, D)} for shapes in seen[:-1]) and set(seen[-1]) == {(3, 9, D), (6, 1, D)}


def test_a_gate_without_experts_is_an_error(ours):
    """Ignoring it would pass the base model's answers off as the experts'."""
    with pytest.raises(ValueError, match="experts"):
        ours("Qwen2.5")(random_ids(SMALL["Qwen2.5"], 1, 3), gate=torch.full((1, 10), 0.1))


# ----------------------------------------------------------------------------------------------------------------------
# Weights in 8 bits

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_no_weight_moves_by_more_than_half_a_step_of_its_row(dtype):
    """Also in rows of zeros, of the smallest and of the largest numbers. 1e-5 allows for fp32's own rounding."""
    weight = torch.randn(700, 48).to(dtype)
    weight[[3, 600]], weight[[4, 601]] = 0, torch.finfo(dtype).tiny
    weight[[5, 602]] *= 1e4 if dtype == torch.float16 else 5e37
    q, s = quantise(weight)
    assert (q.dtype, q.shape, s.dtype, s.shape) == (torch.int8, weight.shape, torch.float32, (700,))
    step = s.double()[:, None]
    assert ((q * step - weight.double()).abs() <= (0.5 + 1e-5) * step).all() and step.isfinite().all()
    ordinary = weight.abs().amax(1) > 1e-3
    assert ordinary.sum() == 696 and (q[ordinary].abs().amax(1) == 127).all() and q.min() == -127
    assert not q[[3, 600]].any()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 2**-7)])
@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_in_8_bits_multiplies_by_the_rounded_weight_and_passes_the_gradient_on(bias, dtype, tolerance):
    """Errors are shares of the sum of absolute terms. Without a bias, bf16 rounds each output twice and no weight: then
    no output is off by more than twice half a step of bf16, even where large terms cancel."""
    layer, x = in_8_bits(M.Linear(48, 300, bias=bias).to(dtype)), torch.randn(2, 5, 48, dtype=dtype).requires_grad_()
    weight = layer.weight * layer.weight_scale.double()[:, None]
    y, b = layer(x), layer.bias.double() if bias else torch.zeros(())
    upstream = torch.randn_like(y)
    grad, = torch.autograd.grad(y, x, upstream)
    exact, terms = x.double() @ weight.T + b, x.double().abs() @ weight.abs().T + b.abs()
    assert y.dtype == grad.dtype == dtype and y.shape == (2, 5, 300)
    assert ((y - exact).abs() <= tolerance * terms).all()
    assert ((grad - upstream.double() @ weight).abs() <= tolerance * (upstream.double().abs() @ weight.abs())).all()
    if not bias:
        assert ((y - exact).abs() <= 1.01 * torch.finfo(dtype).eps * exact.abs() + 1e-6 * terms).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_autocast_gives_a_layer_in_8_bits_the_dtypes_of_the_full_one(bias, dtype):
    full, x = M.Linear(48, 300, bias=bias), torch.randn(2, 5, 48).to(dtype).requires_grad_()
    found = []
    for layer in (full, in_8_bits(copy.deepcopy(full))):
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        found.append((y, *torch.autograd.grad(y, x, torch.ones_like(y))))
    for one, other, expected in zip(*found, (torch.bfloat16, dtype)):
        assert one.dtype == other.dtype == expected
        assert_near(one, other, 0.05 * one.abs().max(), "the full layer and that in 8 bits")


# ----------------------------------------------------------------------------------------------------------------------
# Generation

@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (16, 1), (3, 5), (17, 1)])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("few", [0, 16])  # on an Intel and on an AMD CPU
def test_a_product_in_blocks_equals_the_product(shape, bias, few, monkeypatch):
    monkeypatch.setattr(matmul, "FEW_ROWS", few)
    x, weight, b = torch.randn(*shape, 512), torch.randn(768, 512), torch.randn(768) if bias else None
    wanted = F.linear(x.double(), weight.double(), None if b is None else b.double())
    with torch.no_grad():
        found, whole = matmul.linear(x, weight, b), F.linear(x, weight, b)
    assert few or torch.equal(found, whole)
    assert found.shape == wanted.shape and (found - wanted).abs().max() < 2e-4  # |sum of 512| is about 23, fp32
    assert matmul.linear(x, weight.requires_grad_(), b).requires_grad


LENGTHS = [17, 3, 40, 1, 9]
N_NEW = 16


def loop(our, prompt, n):
    """Greedy continuation with a full forward pass for every token. Returns ids and logits (n, V)."""
    ids, logits = list(prompt), []
    for _ in range(n):
        logits.append(our(torch.tensor([ids]))[0, -1])
        ids.append(logits[-1].argmax().item())
    return ids[len(prompt):], torch.stack(logits)


def cut(reply, stops):
    """A reply up to and including its first stop."""
    return next((reply[:i + 1] for i, token in enumerate(reply) if token in stops), reply)


@pytest.fixture(scope="module")
def free(ours):
    """A function: name -> our model, prompts of different lengths, and their greedy replies without stops."""
    @functools.cache
    def make(name):
        prompts = random_prompts(SMALL[name], LENGTHS)
        return ours(name), prompts, M.generate(ours(name), prompts, max_new_tokens=N_NEW)
    return make


def watch(our, monkeypatch):
    """Record (rows, gate) of every step in the list that is returned. The model has no experts, so it gets no gate."""
    steps, hidden = [], our.hidden

    def watched(ids, gate, cache, positions=None):
        steps.append((len(ids), gate))
        return hidden(ids, None, cache, positions)

    monkeypatch.setattr(our, "hidden", watched)
    return steps


def early_stops(replies):
    """Two stop ids that end some rows at different steps, and others not at all."""
    stops = {replies[1][2], replies[3][6]}
    lengths = [len(cut(reply, stops)) for reply in replies]
    assert len(set(lengths)) >= 3 and max(lengths) == N_NEW > min(lengths), lengths
    return stops


@each_family
@pytest.mark.parametrize("stopping", [False, True])
def test_greedy_ids_equal_the_references_generate(name, stopping, reference):
    there = reference(name)
    our, prompts = load(there.path), random_prompts(SMALL[name], LENGTHS)
    stops = early_stops(M.generate(our, prompts, max_new_tokens=N_NEW)) if stopping else ()
    from transformers import GenerationConfig
    settings = GenerationConfig(max_new_tokens=N_NEW, do_sample=False, pad_token_id=0, eos_token_id=[*stops] or None)
    expected = [there.model.generate(torch.tensor([prompt]), generation_config=settings)[0, len(prompt):].tolist()
                for prompt in prompts]
    assert M.generate(our, prompts, max_new_tokens=N_NEW, stops=stops) == expected


@each_family
def test_a_batch_gives_its_rows_one_by_one(name, free):
    our, prompts, replies = free(name)
    assert [M.generate(our, [p], max_new_tokens=N_NEW)[0] for p in prompts] == replies
    assert len({tuple(reply) for reply in replies}) == len(replies)  # equal rows would hide a mix-up


@each_family
def test_cached_equals_uncached(name, free, monkeypatch):
    """Ids exactly; logits of each step to 1e-5, because matrix products of other shapes sum in another order."""
    our, prompts, replies = free(name)
    steps, head = [], our.head
    monkeypatch.setattr(our, "head", lambda hidden: steps.append(head(hidden)) or steps[-1])
    assert M.generate(our, prompts, max_new_tokens=N_NEW) == replies
    monkeypatch.undo()
    for row, prompt in enumerate(prompts):
        ids, logits = loop(our, prompt, N_NEW)
        assert ids == replies[row]
        assert_near(torch.stack([step[row] for step in steps]), logits, 1e-5, f"row {row}")


@each_family
def test_stops_end_their_own_row_and_leave_the_others_alone(name, free, monkeypatch):
    """A reply ends with its stop id. Then its row leaves the batch, and each remaining row keeps its own gate. `each`
    is called with every id of every reply."""
    our, prompts, replies = free(name)
    stops = early_stops(replies)
    expected = [cut(reply, stops) for reply in replies]
    steps = watch(our, monkeypatch)
    gate, handed_over = torch.arange(len(prompts))[:, None], [[] for _ in prompts]
    assert M.generate(our, prompts, gate, max_new_tokens=N_NEW, stops=stops,
                      each=lambda row, token: handed_over[row].append(token)) == expected == handed_over
    assert len(steps) == N_NEW
    for step, (rows, used) in enumerate(steps):
        alive = [row for row, reply in enumerate(expected) if len(reply) > step]
        assert rows == len(alive) and used.flatten().tolist() == alive


def test_generation_ends_with_its_last_row_and_writes_no_more_than_it_may(free):
    our, prompts, replies = free("Llama-3.1")
    any_token = range(our.config.vocab_size)
    assert M.generate(our, prompts, max_new_tokens=1000, stops=any_token) == [reply[:1] for reply in replies]
    assert M.generate(our, prompts, max_new_tokens=0) == [[] for _ in prompts]


def test_one_gate_serves_all_rows(free, monkeypatch):
    our, prompts, replies = free("Llama-3.1")
    steps = watch(our, monkeypatch)
    assert M.generate(our, prompts, torch.arange(10)[None], max_new_tokens=N_NEW) == replies
    assert all(used.tolist() == [[*range(10)]] * rows for rows, used in steps)


@pytest.fixture
def begun():
    """A small model with experts, the ids that three prompts begin with, and how each of them goes on."""
    model = Transformer(Config(97, 64, 3, 4, 2, 32, 96, 1e-5, 1e4))
    add_experts(model)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.2)
    begin, *rest = random_prompts(model.config, [40, 7, 1, 30])
    return model, begin, rest


@pytest.mark.parametrize("with_gate", [False, True])
@torch.no_grad()
def test_a_prefix_computed_once_changes_nothing(with_gate, begun):
    """One prefix serves many batches. The second batch adds a single token."""
    model, begin, rest = begun
    gate = torch.softmax(torch.randn(1, 10), -1) if with_gate else None
    prefix = M.Prefix.compute(model, begin, gate)
    for batch in (rest, rest[1:2], rest[::-1]):
        hidden = model.hidden(M.pad(batch)[0], gate, prefix)
        for i, row in enumerate(batch):
            whole = model.hidden(torch.tensor([begin + row]), gate)[0, len(begin):]
            assert_near(hidden[i, :len(row)], whole, 1e-5, f"row {i}")


@pytest.mark.parametrize("prompts, length", [
    ([[1, 2, 3, 4], [1, 2, 3, 5, 6], [1, 2, 7]], 2), ([[1, 2], [2, 1]], 0), ([[1, 2, 3], [1, 2]], 1), ([[1], [1]], 0)])
def test_a_shared_prefix_is_as_long_as_can_be_and_leaves_an_id_of_each_prompt(prompts, length):
    assert M.shared_prefix(prompts) == length


@torch.no_grad()
def test_generation_computes_a_long_beginning_once(begun, monkeypatch):
    """The logits of every step are those of each prompt alone, to 1e-4. Prompts with different gates share nothing, and
    a short beginning is not shared either."""
    model, begin, rest = begun
    gates, shapes, hidden, head = torch.softmax(torch.randn(3, 10), -1), [], model.hidden, model.head
    steps = []
    monkeypatch.setattr(model, "hidden", lambda ids, *more: shapes.append(tuple(ids.shape)) or hidden(ids, *more))
    monkeypatch.setattr(model, "head", lambda h: steps.append(head(h)) or steps[-1])
    for ends, gate, first in ((rest, None, [(1, 40), (3, 30)]), (rest, gates[:1], [(1, 40), (3, 30)]),
                              (rest, gates, [(3, 70)]), (rest[1:2], None, [(1, 41)]),
                              ([[5], [6]], gates[:1], [(1, 40), (2, 1)])):
        prompts = [begin + row for row in ends]
        shapes.clear()
        steps.clear()
        found = M.generate(model, prompts, gate, 8)
        assert shapes[:len(first)] == first and len(shapes) == len(first) + 7
        for i, prompt in enumerate(prompts):
            whole = head(hidden(torch.tensor([prompt + found[i]]), None if gate is None else gate[i % len(gate)][None]))
            assert_near(torch.stack([step[i] for step in steps]), whole[0, len(prompt) - 1:-1], 1e-4, f"row {i}")
    shapes.clear()
    M.generate(model, [begin[:M.LONG_PREFIX - 1] + row for row in rest], None, 1)
    assert shapes == [(3, 61)]


@pytest.mark.parametrize("compiler", ["none", pytest.param("inductor", marks=[pytest.mark.slow, pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile needs a C++ compiler")])])
def test_a_compiled_step_writes_the_same_and_is_not_compiled_again_for_other_sizes(compiler, monkeypatch):
    """With stops, gates, sampling and a shared prefix. Afterwards other numbers of rows and a cache of another size use
    what is compiled already. "none" runs the same step without a compiler."""
    monkeypatch.setattr(compile, "ROOM", 64)
    torch.compiler.reset()
    torch.manual_seed(0)
    our = randomise(Transformer(SMALL["Llama-3.1"])).eval()
    for tensor in add_experts(our):
        torch.nn.init.normal_(tensor, std=0.05)
    prompts = random_prompts(our.config, LENGTHS)
    gate = torch.rand(len(prompts), 10).softmax(-1)
    shared = [prompts[0] + prompts[0] * M.LONG_PREFIX + p for p in prompts]
    stops = early_stops(M.generate(our, prompts, gate, max_new_tokens=N_NEW))
    first = [(prompts, gate, N_NEW), (prompts, None, N_NEW), (prompts[:1], gate[:1], N_NEW)]
    later = [(prompts[:3], gate[:3], 70), (shared, gate[:1], N_NEW), (prompts[1:2], gate[1:2], 70), (prompts, gate, 5)]

    def written(calls):
        return [[M.generate(our, *call, stops=s) for s in ((), stops)]
                + [draw(our, call[0], gate=call[1], temperature=1.0)] for call in calls]
    plain, calls = (written(first), written(later)), []
    if compiler == "none":
        monkeypatch.setattr(torch, "compile", lambda step, **how: lambda ids, *rest: (
            calls.append(len(ids)), step(ids, *rest))[1])
    compile.compile_decoding(our)
    assert written(first) == plain[0]
    # two calls without stops and with them: rows that have ended stay in the batch
    assert compiler != "none" or calls[:2 * (N_NEW - 1)] == [len(prompts)] * 2 * (N_NEW - 1)
    torch.compiler.set_stance("fail_on_recompile")
    try:
        assert written(later) == plain[1]
    finally:
        torch.compiler.set_stance("default")
    assert [*our.compiled_step.kept] == [(len(prompts), 64)]  # of the last call only


@pytest.mark.parametrize("prompts", [[], [[]], [[1], []]])
def test_an_empty_prompt_is_an_error(prompts, ours):
    with pytest.raises(ValueError, match="prompts"):
        M.generate(ours("Llama-3.1"), prompts)


def draw(our, prompts, seed=3, **options):
    return M.generate(our, prompts, max_new_tokens=N_NEW, generator=torch.Generator().manual_seed(seed), **options)


def test_sampling_is_reproducible_from_its_generator_alone(free):
    our, prompts, replies = free("Llama-3.1")
    state = torch.get_rng_state()
    drawn = draw(our, prompts, temperature=1.0)
    assert torch.equal(torch.get_rng_state(), state)  # training draws from the global generator, which is untouched
    assert draw(our, prompts, temperature=1.0) == drawn
    assert draw(our, prompts, seed=4, temperature=1.0) != drawn and drawn != replies


def test_what_a_row_draws_does_not_depend_on_when_others_end(free):
    our, prompts, _ = free("Llama-3.1")
    drawn = draw(our, prompts, temperature=1.0)
    stops = early_stops(drawn)
    assert draw(our, prompts, temperature=1.0, stops=stops) == [cut(reply, stops) for reply in drawn]


@pytest.mark.parametrize("options", [*({"temperature": t} for t in (1e-5, 2e-38, 1e-38, 1e-45, 1e-300, 5e-324)),
                                     {"temperature": 1.0, "top_p": 1e-6}], ids=str)
def test_the_limits_of_sampling_are_greedy(options, free):
    our, prompts, replies = free("Qwen2.5")
    assert draw(our, prompts, **options) == replies


@pytest.mark.parametrize("temperature", [1e-30, 1e-36, 2e-38, 1e-38, 1e-45, 5e-324])
@pytest.mark.parametrize("largest", [1.0, 50.0, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_temperature_is_too_small_for_any_logits(temperature, largest, dtype):
    """Quotients beyond fp32's range would be infinite, and their probabilities NaN."""
    logits = torch.tensor([[-1.0, 0.5, 1.0, 0.0], [1.0, -1.0, -0.5, 0.5]], dtype=dtype) * largest
    for u in (0.0, 0.5, 1 - 2**-24):
        assert M.sample(logits, temperature, 1.0, torch.full((2,), u)).tolist() == [2, 0]


P = torch.tensor([0.1, 0.3, 0.05, 0.4, 0.15])  # in falling order: tokens 3, 1, 4, 0, 2; sums 0.4, 0.7, 0.85, 0.95, 1


def frequencies(p, temperature=1.0, top_p=1.0, n=2000):
    """The share of each token among n evenly spaced u, which replace random numbers."""
    u = (torch.arange(n) + 0.5) / n
    return M.sample(p.log().expand(n, -1), temperature, top_p, u).bincount(minlength=len(p)) / n


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_sampling_follows_the_probabilities_to_the_power_of_the_inverse_temperature(temperature):
    """To 1e-3, since the grid has 2,000 steps."""
    powers = P ** (1 / temperature)
    assert frequencies(P, temperature).tolist() == pytest.approx((powers / powers.sum()).tolist(), abs=1e-3)


@pytest.mark.parametrize("top_p, kept", [
    (0.39, [3]), (0.41, [3, 1]), (0.69, [3, 1]), (0.71, [3, 1, 4]), (0.86, [3, 1, 4, 0]), (0.96, [3, 1, 4, 0, 2]),
    (1.0, [3, 1, 4, 0, 2])])
def test_the_nucleus_is_the_smallest_set_whose_mass_reaches_top_p(top_p, kept):
    """Within it, the proportions stay. A mass equal to top_p has reached it."""
    expected = torch.zeros(5).index_copy(0, torch.tensor(kept), P[kept] / P[kept].sum())
    assert frequencies(P, top_p=top_p).tolist() == pytest.approx(expected.tolist(), abs=1e-3)
    assert (frequencies(torch.full((4,), 0.25), top_p=0.5) > 0).sum() == 2


def test_each_row_is_drawn_by_its_own_number_from_tokens_that_are_there():
    """Also at both ends of the unit interval."""
    u = torch.tensor([0.0, 1 - 2**-24])
    assert M.sample(P.log().expand(2, -1), 1.0, 1.0, u).tolist() == [3, 2]
    assert M.sample(P.log().expand(2, -1), 1.0, 0.6, u).tolist() == [3, 1]
    logits = torch.stack([P.log(), P.flip(0).log()])
    assert M.sample(logits, 1.0, 1.0, torch.tensor([0.5, 0.99])).tolist() == [1, 2]
    assert M.sample(logits, 0.0, 1.0, None).tolist() == [3, 1]


# ----------------------------------------------------------------------------------------------------------------------
# Configuration

LLAMA_31 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192}
LLAMA = {"architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0, "hidden_act": "silu",
         "mlp_bias": False, "model_type": "llama", "rms_norm_eps": 1e-05, "torch_dtype": "bfloat16", "use_cache": True}
PUBLISHED = {  # the models' own config.json, without keys that say nothing about the shape
    "Llama-3.1-8B": LLAMA | {
        "hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 131072, "num_attention_heads": 32,
        "num_hidden_layers": 32, "num_key_value_heads": 8, "rope_scaling": LLAMA_31, "rope_theta": 500000.0,
        "tie_word_embeddings": False, "vocab_size": 128256},
    "Llama-3.2-1B": LLAMA | {
        "head_dim": 64, "hidden_size": 2048, "intermediate_size": 8192, "max_position_embeddings": 131072,
        "num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8, "rope_theta": 500000.0,
        "rope_scaling": LLAMA_31 | {"factor": 32.0}, "tie_word_embeddings": True, "vocab_size": 128256},
    "Qwen2.5-0.5B": {
        "architectures": ["Qwen2ForCausalLM"], "hidden_act": "silu", "hidden_size": 896, "intermediate_size": 4864,
        "max_position_embeddings": 32768, "max_window_layers": 24, "model_type": "qwen2", "num_attention_heads": 14,
        "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
        "sliding_window": 32768, "tie_word_embeddings": True, "use_mrope": False, "use_sliding_window": False,
        "vocab_size": 151936},
    "SmolLM2-135M": LLAMA | {
        "hidden_size": 576, "intermediate_size": 1536, "is_llama_config": True, "max_position_embeddings": 8192,
        "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3, "rope_interleaved": False,
        "rope_scaling": None, "rope_theta": 100000, "tie_word_embeddings": True, "vocab_size": 49152},
}


@pytest.mark.parametrize("style", [dict, newer_style])
@pytest.mark.parametrize("name", [*PUBLISHED, *SMALL])
def test_config_json_is_read_in_both_styles(name, style, tmp_path):
    """The published ones give the published shapes, and any Config comes back as it was."""
    write_json(tmp_path / "config.json", style(PUBLISHED[name] if name in PUBLISHED else published(SMALL[name])))
    assert Config.from_dir(tmp_path) == (CONFIGS | SMALL)[name]


@pytest.mark.parametrize("key, field, default", [
    ("head_dim", "head_dim", 96 // 4), ("num_key_value_heads", "n_kv_heads", 4),
    ("tie_word_embeddings", "tied", False)])
@pytest.mark.parametrize("absent", [True, False], ids=["absent", "null"])
def test_keys_that_may_be_absent_have_their_published_default(key, field, default, absent, tmp_path):
    found = published(SMALL["Llama-3.1"]) | {key: None}
    if absent:
        del found[key]
    write_json(tmp_path / "config.json", found)
    assert Config.from_dir(tmp_path) == replace(SMALL["Llama-3.1"], **{field: default})


@pytest.mark.parametrize("name", SMALL)
def test_rope_may_be_said_in_both_styles_if_they_agree(name, tmp_path):
    old = published(SMALL[name])
    write_json(tmp_path / "config.json", old | newer_style(old))
    assert Config.from_dir(tmp_path) == SMALL[name]


@pytest.mark.parametrize("old, new, named", [  # what the old style and rope_parameters say; what the message names
    ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, {}, ["rope_type", "yarn", "default"]),
    ({"rope_scaling": {"rope_type": "default"}}, LLAMA_31, ["rope_type", "default", "llama3"]),
    ({"rope_scaling": {"factor": 4.0}}, LLAMA_31, ["default", "llama3"]),
    ({"rope_scaling": LLAMA_31}, LLAMA_31 | {"factor": 32.0}, ["factor", "8.0", "32.0"]),
    ({"rope_scaling": {"rope_theta": 2e4}}, {}, ["rope_theta", "20000.0", "10000.0"]),
    ({"rope_theta": 5e5}, {}, ["rope_theta", "500000.0", "10000.0"])])
def test_rope_said_twice_and_differently_is_refused(old, new, named, tmp_path):
    write_json(tmp_path / "config.json", newer_style(published(TINY) | {"rope_scaling": new}) | old)
    with pytest.raises(UserError) as error:
        Config.from_dir(tmp_path)
    message = str(error.value)
    assert message.startswith(f"{tmp_path / 'config.json'}: ") and "\n" not in message, message
    assert all(word in message for word in [*named, *old, "rope_parameters"]), message


def test_the_llama_shape_has_the_published_number_of_parameters():
    with torch.device("meta"):
        llama = Transformer(CONFIGS["Llama-3.1-8B"])
    assert sum(p.numel() for p in llama.parameters()) == 8_030_261_248


# ----------------------------------------------------------------------------------------------------------------------
# The loader

def same_state(our, state, dtype=torch.float32):
    found = our.state_dict()
    return found.keys() == state.keys() and all(
        found[name].dtype == dtype and torch.equal(found[name], state[name].to(dtype)) for name in state)


def test_shards_equal_one_file(tmp_path):
    one, shards = write_model(tmp_path / "one"), write_model(tmp_path / "shards", shards=3)
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) == 3 and not (one.keys() ^ shards.keys())
    assert same_state(load(tmp_path / "one"), one) and same_state(load(tmp_path / "shards"), one)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16, None])
def test_tensors_come_as_the_dtype_asked_for_which_is_bf16_unless_said_and_can_be_trained(stored, wanted, tmp_path):
    state = {name: t.to(stored) for name, t in write_model(tmp_path).items()}
    save_file(state, tmp_path / "model.safetensors")
    our, wanted = load(tmp_path, wanted) if wanted else Transformer.from_pretrained(tmp_path), wanted or torch.bfloat16
    assert same_state(our, state, wanted) and our.dtype == wanted and our.device.type == "cpu"
    assert all(p.requires_grad and not p.is_meta for p in our.parameters())


@pytest.mark.parametrize("name", ["Llama-3.1", "Qwen2.5"])
@pytest.mark.parametrize("stored, wanted", [(torch.bfloat16, torch.bfloat16), (torch.float32, torch.bfloat16),
                                            (torch.bfloat16, torch.float32)])
def test_loading_in_8_bits_rounds_the_seven_layers_of_each_block_and_nothing_else(name, stored, wanted, tmp_path):
    """It rounds what the file holds, whatever dtype the rest gets."""
    state = {name: t.to(stored) for name, t in write_model(tmp_path, SMALL[name]).items()}
    save_file(state, tmp_path / "model.safetensors")
    found = Transformer.from_pretrained(tmp_path, wanted, int8=True).state_dict()
    layers = {name for name in state if name.endswith("_proj.weight")}
    assert len(layers) == 2 * 7 and found.keys() == state.keys() | {f"{name}_scale" for name in layers}
    for name, tensor in state.items():
        if name in layers:
            assert all(map(torch.equal, (found[name], found[f"{name}_scale"]), quantise(tensor))), name
        else:
            assert found[name].dtype == wanted and torch.equal(found[name], tensor.to(wanted)), name


def test_the_8B_takes_16_06_GB_in_bf16_and_9_09_in_8_bits():
    with torch.device("meta"):
        model = Transformer(CONFIGS["Llama-3.1-8B"]).to(torch.bfloat16)
        sizes = [sum(p.nbytes for p in model.parameters())]
        for layer in model.modules():
            if isinstance(layer, M.Linear):
                layer.set_int8(torch.empty_like(layer.weight, dtype=torch.int8), torch.empty(layer.out_features))
        sizes.append(sum(p.nbytes for p in model.parameters()))
    assert [round(size / 1e9, 2) for size in sizes] == [16.06, 9.09]


def test_training_a_loaded_model_leaves_its_files_alone(tmp_path):
    """Files are mapped into memory: writing to a parameter must not write to the file."""
    state, before = write_model(tmp_path), (tmp_path / "model.safetensors").read_bytes()
    with torch.no_grad():
        for p in load(tmp_path).parameters():
            p.zero_()
    assert (tmp_path / "model.safetensors").read_bytes() == before and same_state(load(tmp_path), state)


@pytest.mark.parametrize("shards", [1, 2])
def test_a_tied_head_may_be_stored_a_second_time(shards, tmp_path):
    state = write_model(tmp_path, replace(TINY, tied=True), shards)
    assert "lm_head.weight" not in state
    file = sorted(tmp_path.glob("*.safetensors"))[-1]
    save_file(load_file(file) | {"lm_head.weight": state["model.embed_tokens.weight"].clone()}, file)
    if shards > 1:
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        index["weight_map"]["lm_head.weight"] = file.name
        write_json(tmp_path / "model.safetensors.index.json", index)
    assert same_state(load(tmp_path), state)


FREQUENCIES = {f"model.{place}rotary_emb.inv_freq": torch.ones(4) for place in ("", "layers.0.self_attn.")}


@pytest.mark.parametrize("shards", [1, 2])
def test_stored_frequencies_are_passed_over(shards, tmp_path):
    state = write_model(tmp_path, shards=shards)
    file = sorted(tmp_path.glob("*.safetensors"))[-1]
    save_file(load_file(file) | FREQUENCIES, file)
    if shards > 1:
        edit_json(INDEX, lambda index: index["weight_map"].update(dict.fromkeys(FREQUENCIES, file.name)))(tmp_path)
    assert same_state(load(tmp_path), state)


@pytest.mark.parametrize("short", [False, True], ids=["full names", "names without model."])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_model_whose_head_is_not_used_may_lack_it_and_the_prefix_of_its_names(short, tied, tmp_path):
    """As an encoder that was saved alone. Its hidden states are those of the whole model."""
    write_model(tmp_path, replace(TINY, tied=tied))
    whole = load(tmp_path)

    def without_head(state):
        state.pop("lm_head.weight", None)
        for name in list(state) if short else ():
            state[name.removeprefix("model.")] = state.pop(name)
    edit_state(without_head)(tmp_path)
    ours = Transformer.from_pretrained(tmp_path, torch.float32, head=False)
    ids = random_ids(TINY, 2, 5)
    assert torch.equal(ours.hidden(ids), whole.hidden(ids))
    assert not any("lm_head" in name for name in ours.state_dict())
    if tied:
        assert torch.equal(load(tmp_path)(ids), whole(ids))
    else:
        with pytest.raises(UserError, match="1 tensor.s. missing, the first is lm_head.weight"):
            load(tmp_path)


@pytest.mark.parametrize("head, tied", [(False, False), (False, True), (True, True)])
def test_models_that_transformers_saved_without_a_head_load(head, tied, tmp_path):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.Qwen2Model(transformers.Qwen2Config(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=24, tie_word_embeddings=tied)).eval()
    randomise(theirs).save_pretrained(tmp_path)
    ids = random_ids(TINY, 2, 5)
    with torch.no_grad():
        assert_near(Transformer.from_pretrained(tmp_path, torch.float32, head=head).hidden(ids),
                    theirs(ids).last_hidden_state, 0, "hidden states")


@pytest.mark.parametrize("dtype, largest", [(torch.float32, 3e38), (torch.bfloat16, 3e38), (torch.float16, 6e4),
                                            (torch.float64, 1e308)])
def test_values_are_finite_even_where_their_sum_is_not(dtype, largest):
    large = torch.full((3, 100), largest, dtype=dtype)
    assert weights_module.all_finite(large) and weights_module.all_finite(torch.zeros(0, 3, dtype=dtype))
    for bad in ([math.nan], [math.inf], [-math.inf], [math.inf, -math.inf]):
        large[2, 98:98 + len(bad)] = torch.tensor(bad, dtype=dtype)
        assert not weights_module.all_finite(large) and not weights_module.all_finite(large[2, 98:])


FILE, INDEX, SHARD = "model.safetensors", "model.safetensors.index.json", "model-00002-of-00002.safetensors"
NORM, HEAD, Q = "model.norm.weight", "lm_head.weight", "model.layers.1.self_attn.q_proj.weight"


def edit_state(change):
    """Damage: change(state) in the one file."""
    def damage(path):
        state = load_file(path / FILE)
        change(state)
        save_file(state, path / FILE)
    return damage


def edit_json(name, change):
    """Damage: change(object) in a JSON file."""
    def damage(path):
        value = json.loads((path / name).read_text())
        change(value)
        write_json(path / name, value)
    return damage


def edit_config(**changes):
    return edit_json("config.json", lambda found: found.update(changes))


def edit_bytes(change, name=FILE):
    return lambda path: (path / name).write_bytes(change((path / name).read_bytes()))


MISTAKES = {  # name: (damage(folder), what the message names[, shards]); more damage to files is in test_broken.py
    "missing tensor": (edit_state(lambda s: s.pop(Q)), [Q]),
    "missing bias": (edit_config(model_type="qwen2"), ["model.layers.0.self_attn.k_proj.bias"]),
    "missing head": (edit_state(lambda s: s.pop(HEAD)), [HEAD]),
    "unexpected tensor": (edit_state(lambda s: s.update({"model.extra": torch.ones(1)})), [FILE, "model.extra"]),
    "unexpected bias": (edit_state(lambda s: s.update({Q.replace("weight", "bias"): torch.ones(32)})),
                        [FILE, Q.replace("weight", "bias")]),
    "unexpected layer": (edit_config(num_hidden_layers=1), [FILE, "model.layers.1."]),
    "mis-shaped tensor": (edit_state(lambda s: s.update({NORM: torch.ones(17)})), [FILE, NORM, "(17,)", "(16,)"]),
    "transposed tensor": (edit_state(lambda s: s.update({HEAD: s[HEAD].T.contiguous()})),
                          [FILE, HEAD, "(16, 40)", "(40, 16)"]),
    "int8 tensor": (edit_state(lambda s: s.update({Q: s[Q].to(torch.int8)})), [FILE, Q, "I8"]),
    "tied but different": (edit_config(tie_word_embeddings=True), [HEAD, "tie_word_embeddings"]),
    "a page of HTML": (edit_bytes(lambda raw: b"<!DOCTYPE html><title>404</title>"), [FILE]),
    "tensor not in its shard": (edit_json(INDEX, lambda index: index["weight_map"].update({"model.x": SHARD})),
                                [SHARD, "model.x"], 2),
    "tensor not in the index": (edit_json(INDEX, lambda index: index["weight_map"].pop(NORM)), [NORM], 2),
    "index points nowhere": (edit_json(INDEX, lambda index: index["weight_map"].update({NORM: 7})), [INDEX, NORM], 2),
    "index without a map": (edit_json(INDEX, lambda index: index.pop("weight_map")), [INDEX], 2),
    "index is not JSON": (edit_bytes(lambda raw: raw[:-5], INDEX), [INDEX], 2),
    "no weights": (lambda path: (path / FILE).unlink(), [FILE]),
    "no prefix and no head": (edit_state(lambda s: [s.pop(HEAD), s.update({NORM[6:]: s.pop(NORM)})]), [HEAD]),
    "a tensor under both names": (edit_state(lambda s: s.update({NORM[6:]: s[NORM].clone()})),
                                  [FILE, "unexpected tensor norm.weight"]),
    "packed integers": (edit_state(lambda s: s.update({Q[:-6] + "g_idx": torch.ones(16, dtype=torch.int32)})),
                        [FILE, "g_idx is I32", "quantised"]),
    "a folder instead of weights": (lambda path: [(path / FILE).unlink(), (path / FILE).mkdir()],
                                    [FILE, "cannot be read (Is a directory)"]),
    "a config.json that links to itself": (
        lambda path: [(path / "config.json").unlink(), (path / "config.json").symlink_to("config.json")],
        ["config.json", "cannot be read (Too many levels"]),
    "only a pickle": (lambda path: (path / FILE).rename(path / "pytorch_model-00001-of-00001.bin"),
                      ["pickled weights (pytorch_model-00001-of-00001.bin)", "save_pretrained"]),
    "no config.json": (lambda path: (path / "config.json").unlink(), ["config.json"]),
    "config.json is a list": (lambda path: write_json(path / "config.json", []), ["config.json", "list"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_broken_folder_is_an_error_of_one_line_that_names_the_cause(mistake, tmp_path):
    damage, named, *shards = MISTAKES[mistake]
    path = tmp_path / "some-model"
    write_model(path, shards=shards[0] if shards else 1)
    load(path)  # it is complete before the damage
    damage(path)
    with pytest.raises(UserError) as error:
        load(path)
    message = str(error.value)
    assert str(path) in message and "\n" not in message, message
    assert all(name in message.replace(str(path), "") for name in named), message


@pytest.mark.parametrize("name", [FILE, "config.json"])
def test_a_file_that_may_not_be_read_is_told_as_such(name, tmp_path, monkeypatch):
    """Root may read everything, so the system's answer is made up here."""
    write_model(tmp_path)

    def refuse(path, *args, **kwargs):
        if str(path).endswith(name):
            raise PermissionError(13, "Permission denied", str(path))
        return io.open(path, *args, **kwargs)
    monkeypatch.setattr("builtins.open", refuse)
    monkeypatch.setattr("pathlib.Path.read_text", lambda path, **options: refuse(path, **options).read())
    with pytest.raises(UserError, match=f"{name}: cannot be read .Permission denied.$"):
        load(tmp_path)


YARN = {"rope_type": "yarn", "factor": 4.0}


@pytest.mark.parametrize("key, value, named", [
    ("model_type", "mamba", "model_type is 'mamba'"), ("model_type", None, "model_type is None"),
    ("hidden_size", None, "hidden_size is None"), ("rope_theta", None, "rope_theta is None"),
    ("num_hidden_layers", "two", "num_hidden_layers is 'two'"), ("num_hidden_layers", 0, "num_hidden_layers is 0"),
    ("num_hidden_layers", 2000, "2,000 layers"), ("rms_norm_eps", True, "rms_norm_eps is True"),
    ("num_key_value_heads", 3, "4 query heads share 3"), ("num_attention_heads", 2**31, "2^30 rows"),
    ("head_dim", 7, "width 7"), ("hidden_act", "gelu", "hidden_act is 'gelu'"), ("mlp_bias", True, "mlp_bias is True"),
    ("attention_bias", True, "attention_bias is True"), ("use_sliding_window", True, "use_sliding_window is True"),
    ("tie_word_embeddings", 1, "tie_word_embeddings is 1"), ("max_position_embeddings", 0, "_embeddings is 0"),
    ("rope_scaling", YARN, "rope_type is 'yarn'"), ("rope_scaling", {"type": "yarn"}, "rope_type is 'yarn'"),
    ("rope_parameters", {"rope_theta": 1e4} | YARN, "rope_type is 'yarn'"), ("rope_scaling", "llama3", "is 'llama3'"),
    ("rope_scaling", {"rope_type": "llama3", "factor": 8.0}, "low_freq_factor is None"),
    ("rope_scaling", LLAMA_31 | {"low_freq_factor": 4.0}, "low_freq_factor is 4.0"),
    *(("quantization_config", {"quant_method": kind, "bits": 4}, f"quantization_config is '{kind}', expected weights")
      for kind in ("gptq", "awq", "bitsandbytes", "fp8", "compressed-tensors", "hqq", "aqlm", "torchao", "bitnet")),
    ("quantization_config", {"load_in_4bit": True}, "quantization_config is {'load_in_4bit': True}, expected weights"),
    ("quantization", {"group_size": 64, "bits": 4}, "quantization is {'group_size': 64"),
    ("compression_config", {"format": "int-quantized"}, "compression_config is {'format'")])
def test_a_config_that_the_decoder_cannot_follow_is_an_error_that_names_key_and_value(key, value, named, tmp_path):
    write_json(tmp_path / "config.json", published(TINY) | {key: value})
    with pytest.raises(UserError) as error:
        Config.from_dir(tmp_path)
    message = str(error.value)
    assert message.startswith(f"{tmp_path / 'config.json'}: ") and named in message and "\n" not in message, message


PEAK = """
import os, resource, sys, torch, model
torch.set_num_threads(1)
model.Transformer.from_pretrained(sys.argv[1])  # imports what torch imports late, once for both children
for dtype, int8 in ((torch.bfloat16, False), (torch.float32, False), (torch.bfloat16, True)):
    if os.fork() == 0:  # a child has a peak of memory of its own, that of loading alone
        for path in sys.argv[1:]:  # a tiny model first: memory that libraries need on their first use does not count
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            our = model.Transformer.from_pretrained(path, dtype=dtype, int8=int8)
            for p in our.parameters():
                p.detach().flatten()[::1024].float().sum().item()  # touches every page
        size = sum(p.numel() * p.element_size() for p in our.parameters())
        print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024, size, flush=True)
        os._exit(0)
    assert os.wait()[1] == 0
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss has other units elsewhere")
def test_loading_needs_little_more_memory_than_the_result(tmp_path):
    """At most 1.2 times the weights as loaded, plus 16 MiB that the allocator rounds up; in 8 bits at most
    128 MiB more than the weights, of which 64 to 72 are the part of the file that is mapped at a time. The file of 200
    MB is a header and a hole, which takes no room on the disk, reads as zeros, and takes memory like data."""
    config = Config(4096, 1024, 6, 8, 8, 128, 4096, 1e-5, 1e4)
    with torch.device("meta"):
        shapes = {name: list(p.shape) for name, p in Transformer(config).named_parameters()}
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    header = json.dumps(header).encode()
    tiny, path = tmp_path / "tiny", tmp_path / "large"
    write_model(tiny)
    write_json(path / "config.json", published(config))
    with open(path / FILE, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + end)
    done = subprocess.run([sys.executable, "-c", PEAK, tiny, path], capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": os.path.dirname(M.__file__)})
    assert done.returncode == 0, done.stderr
    peaks = [[int(number) for number in line.split()] for line in done.stdout.splitlines()]
    *full, (peak, size) = peaks
    assert [size for _, size in full] == [end, 2 * end] and 200e6 < end < 1.9 * size
    assert 0.9 * size < peak < size + 2**27, f"int8: {peak / 2**20:.0f} MiB for {size / 2**20:.0f} MiB"
    for (peak, size), dtype in zip(full, ("bf16", "fp32")):
        assert 0.9 * size < peak < 1.2 * size + 2**24, f"{dtype}: {peak / 2**20:.0f} MiB for {size / 2**20:.0f} MiB"


# ----------------------------------------------------------------------------------------------------------------------
# Files

def test_an_atomic_write_is_all_or_nothing(tmp_path):
    file = tmp_path / "new" / "result.json"
    for text in ("first", "second"):
        with atomic(file) as part:
            assert part.parent == file.parent and part != file
            part.write_text(text)
        assert file.read_text() == text
    with pytest.raises(RuntimeError), atomic(file) as part:
        part.write_text("half of the th")
        raise RuntimeError
    assert file.read_text() == "second"
    with atomic(file) as part:  # leftovers of the failure do not matter
        part.write_text("third")
    assert file.read_text() == "third" and [p.name for p in file.parent.iterdir()] == [file.name]


def test_an_atomic_write_replaces_a_whole_folder(tmp_path):
    for name in ("first", "second"):
        with atomic(tmp_path / "folder") as part:
            part.mkdir()
            (part / name).touch()
    assert [p.name for p in tmp_path.rglob("*")] == ["folder", "second"]


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_an_atomic_write_gives_files_the_mode_of_the_umask(tmp_path, umask, mode):
    """Also those that safetensors writes, with the mode 0600 of its own."""
    before = os.umask(umask)
    try:
        with atomic(tmp_path / "folder") as part:
            (part / "inner").mkdir(parents=True)
            for file in (part / "a.safetensors", part / "inner" / "b.safetensors"):
                save_file({"x": torch.ones(1)}, file)
        for _ in range(2):
            with atomic(tmp_path / "c.safetensors") as part:
                save_file({"x": torch.ones(1)}, part)
    finally:
        os.umask(before)
    assert {p.stat().st_mode & 0o777 for p in tmp_path.rglob("*.safetensors")} == {mode}


# ----------------------------------------------------------------------------------------------------------------------
# Real weights

QUESTIONS = [
    "What is the capital of Portugal?",
    "My sister stopped talking to me after our father's funeral. How do I reach out to her?",
    "Write a Python function that reverses the words of a sentence.",
    "List three differences between a frog and a toad.",
    "I have a job interview tomorrow and I can't sleep. Any advice?",
    "Translate 'good morning, my friend' into Spanish, French and German.",
    "If a train leaves at 14:35 and the trip takes 2 hours and 50 minutes, when does it arrive?",
    "Explain to a ten-year-old why the sky is blue.",
    "Tell me a very short story about a lighthouse keeper who was afraid of the dark.",
    "A colleague takes credit for my work in front of the whole team, every single week; what would you say to them?",
]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SmolLM2-135M-Instruct", "Qwen2.5-Coder-0.5B-Instruct"])
@torch.no_grad()
def test_real_weights_equal_the_reference(name, weights):
    """Logits of ten prompts to the last bit, and 40 greedy tokens: ours in one batch, the reference's one by one."""
    transformers = pytest.importorskip("transformers")
    our, chat = load(weights / name), chat_module.Chat.from_dir(weights / name)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(weights / name, dtype=torch.float32)
    prompts = [chat.prompt([{"role": "user", "content": question}]) for question in QUESTIONS]
    settings = transformers.GenerationConfig(max_new_tokens=40, do_sample=False, pad_token_id=0,
                                             eos_token_id=sorted(chat.stops))
    replies = M.generate(our, prompts, max_new_tokens=40, stops=chat.stops)
    for prompt, reply in zip(prompts, replies):
        ids = torch.tensor([prompt])
        assert_near(our(ids), theirs(ids).logits, 0.0, name)
        assert theirs.generate(ids, generation_config=settings)[0, len(prompt):].tolist() == reply, chat.text(reply)
