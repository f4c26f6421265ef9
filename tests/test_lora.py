"""Laws of lora.py: what the experts compute, what trains, and what their files hold.

The references are live: a plain dense model with W + 2 B A written out, and `peft` on the model of `transformers`.
Every parameter is random (norms, biases and B too), so that no term can go missing unseen: at these sizes one expert
moves the logits by about as much as they are large. 1e-5 is the rounding of fp32 sums taken in another order.
"""
import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

import lora
from lora import EXPERTS, ExpertLinear, TARGETS, add_experts, expert_layers, export_mixture, load_experts, save_experts
from model import CONFIGS, Config, Linear, Transformer
from support.files import UserError

SMALL = Config(vocab_size=96, dim=64, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=32, hidden_dim=80, norm_eps=1e-5,
               rope_theta=1e4)
SCALE = 2.0  # α/r of the default experts, 16/8
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


@pytest.fixture(autouse=True)
def seed():
    """What is drawn from the global generator, such as A, does not depend on which tests ran before."""
    torch.manual_seed(0)


@torch.no_grad()
def randomise(model, seed):
    """Random values for every parameter, of the size that keeps activations near 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.named_parameters():
        noise = torch.randn(tensor.shape, generator=generator)
        tensor.copy_(noise / tensor.shape[1] ** 0.5 if tensor.ndim == 2 else
                     0.5 * noise if name.endswith("bias") else 1 + 0.2 * noise)
    return model


def make_base(dtype=torch.float32, seed=0, **changes):
    return randomise(Transformer(replace(SMALL, **changes)), seed).to(dtype)


@torch.no_grad()
def random_B(model, seed=1, size=0.1):
    """B as if the experts had been trained: with B = 0 they do nothing, and nothing could be seen of them."""
    generator = torch.Generator().manual_seed(seed)
    for layer in expert_layers(model).values():
        layer.B.copy_(size * torch.randn(layer.B.shape, generator=generator))
    return model


def make_model(dtype=torch.float32, seed=0, n_experts=10, rank=8, alpha=16, **changes):
    """A base with experts beside it whose B is random. A model made as fp64 has fp64 experts too."""
    model = make_base(torch.float32, seed, **changes)
    add_experts(model, n_experts, rank, alpha)
    return random_B(model, seed + 1).to(dtype)


def make_layer(n_in=24, n_out=40, n_experts=10, rank=4, bias=True, dtype=torch.float32):
    layer = ExpertLinear(Linear(n_in, n_out, bias=bias).requires_grad_(False), n_experts, rank, 2 * rank)
    torch.nn.init.normal_(layer.B)
    return layer.to(dtype)


def make_gate(rows=None, n_experts=10, seed=3, dtype=torch.float32):
    """Uneven weights that sum to 1, another row for each row of the batch; without `rows`, one gate (E,)."""
    noise = torch.randn(rows or 1, n_experts, generator=torch.Generator().manual_seed(seed))
    gate = (1.5 * noise).softmax(-1).to(dtype)
    return gate if rows else gate[0]


def make_ids(rows=2, length=12, seed=5):
    return torch.randint(0, SMALL.vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed))


def one_hot(e, rows=1, dtype=torch.float32):
    return F.one_hot(torch.full((rows,), e), len(EXPERTS)).to(dtype)


def snapshot(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_unchanged(model, before):
    now = model.state_dict()
    assert now.keys() == before.keys()
    assert [name for name in now if not torch.equal(now[name], before[name])] == []


def base_state(model):
    return {name: tensor for name, tensor in snapshot(model).items() if not name.endswith((".A", ".B"))}


@torch.no_grad()
def dense(model, gate):
    """A plain Transformer with the weights W + (α/r) Σ_e w_e B_e A_e, the sum over experts spelled out."""
    state = base_state(model)
    for name, layer in expert_layers(model).items():
        state[f"{name}.weight"] += sum(SCALE * w * layer.B[e].T @ layer.A[e] for e, w in enumerate(gate))
    return plain_model(model, state)


def plain_model(model, state):
    plain = Transformer(model.config).to(model.dtype)
    plain.load_state_dict(state)
    return plain


def error(one, other):
    return (one - other).abs().max().item()


@torch.no_grad()
def assert_same_function(model, gate, plain):
    """The model under one gate (E,) computes what the plain one does: every linear layer by itself, then the logits.

    The logits alone would not do in fp64: norms compute in fp32 whatever they are given, and round small errors away.
    """
    tolerance, ids, gates = TOLERANCE[model.dtype], make_ids(), gate.expand(2, -1)
    for name, layer in expert_layers(model).items():
        x = torch.randn(2, 5, layer.in_features, dtype=model.dtype, generator=torch.Generator().manual_seed(4))
        assert error(layer(x, gates), plain.get_submodule(name)(x)) <= tolerance, name
    assert error(model(ids, gates), plain(ids)) <= tolerance
    assert error(model(ids), plain(ids)) > 0.1  # experts that did nothing would pass too


# ----------------------------------------------------------------------------------------------------------------------
# What trains, and how it starts

def test_experts_stand_trait_by_trait_high_before_low():
    assert EXPERTS == (
        "high_openness", "low_openness", "high_conscientiousness", "low_conscientiousness", "high_extraversion",
        "low_extraversion", "high_agreeableness", "low_agreeableness", "high_neuroticism", "low_neuroticism")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changes", [{}, {"tied": True, "qkv_bias": True}], ids=["llama", "qwen"])
def test_only_A_and_B_train_and_they_are_what_is_returned(changes, dtype):
    model = make_base(dtype, **changes)
    public = set(model.state_dict())
    returned = add_experts(model, rank=4)
    layers = expert_layers(model)
    assert set(layers) == {f"model.layers.{i}.{part}.{name}" for i in range(SMALL.n_layers) for name in TARGETS
                           for part in (["self_attn"] if name in ("q_proj", "k_proj", "v_proj", "o_proj") else ["mlp"])}
    own = [id(tensor) for layer in layers.values() for tensor in (layer.A, layer.B)]
    assert [id(tensor) for tensor in returned] == own
    assert {id(tensor) for tensor in model.parameters() if tensor.requires_grad} == set(own)
    assert all(tensor.dtype == torch.float32 for tensor in returned)
    assert all(tensor.dtype == dtype for tensor in model.parameters() if not tensor.requires_grad)
    assert set(model.state_dict()) - public == {f"{name}.{ab}" for name in layers for ab in "AB"}
    assert public <= set(model.state_dict())


@pytest.mark.parametrize("n_experts, parameters", [(1, 20_971_520), (10, 209_715_200)])
def test_rank_8_experts_of_the_8B_have_the_published_number_of_parameters(n_experts, parameters):
    with torch.device("meta"):
        model = Transformer(CONFIGS["Llama-3.1-8B"])
    trainable = add_experts(model, n_experts)
    assert sum(tensor.numel() for tensor in trainable) == parameters
    assert all(tensor.is_meta for tensor in trainable)  # nothing was allocated for this arithmetic


def test_experts_cannot_be_added_twice():
    model = make_model()
    before = snapshot(model)
    with pytest.raises(ValueError, match="already"):
        add_experts(model)
    assert_unchanged(model, before)


def test_A_starts_within_one_over_root_in_and_differs_between_experts_and_B_starts_at_zero():
    """fan_in is the layer's input width, not the rank; 5,000 draws and more reach beyond 0.98 of the range."""
    model = make_base()
    add_experts(model)
    for layer in expert_layers(model).values():
        bound = layer.in_features ** -0.5
        assert 0.98 * bound < layer.A.max() <= bound and 0.98 * bound < -layer.A.min() <= bound
        assert layer.A.std().item() == pytest.approx(bound / 3 ** 0.5, rel=0.05)
        assert len({tuple(expert.flatten().tolist()) for expert in layer.A}) == len(EXPERTS)
        assert torch.count_nonzero(layer.B) == 0


# ----------------------------------------------------------------------------------------------------------------------
# What the experts compute

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("qkv_bias", [False, True])
def test_without_a_gate_the_model_is_bitwise_the_base(qkv_bias, dtype):
    model, ids = make_base(dtype, qkv_bias=qkv_bias), make_ids()
    base = model(ids)
    add_experts(model)
    assert torch.equal(model(ids), base)
    assert error(model(ids, make_gate(2)), base) == 0  # B is still 0
    random_B(model)
    assert torch.equal(model(ids), base)
    assert error(model(ids, make_gate(2)), base) > 0.1


def test_a_gate_without_experts_is_refused():
    with pytest.raises(ValueError, match="no experts"):
        make_base()(make_ids(), make_gate(2))


@pytest.mark.parametrize("use", [lambda model, folder: save_experts(model, folder), load_experts,
                                 lambda model, folder: export_mixture(model, make_gate(), folder),
                                 lambda model, folder: lora.merged(model, make_gate())],
                         ids=["save_experts", "load_experts", "export_mixture", "merged"])
def test_a_model_without_experts_has_nothing_to_save_load_or_merge(use, tmp_path):
    with pytest.raises(ValueError, match="no experts"):
        use(make_base(), tmp_path / "experts")
    assert not (tmp_path / "experts").exists()


def test_the_gate_is_repeated_within_an_expert_not_across_experts():
    """ExpertLinear.forward's example, E = 2 and r = 2: gate (2, 3) multiplies A x by 2 2 3 3, not by 2 3 2 3."""
    layer = ExpertLinear(Linear(4, 4, bias=False), n_experts=2, rank=2, alpha=2)
    with torch.no_grad():
        layer.weight.zero_()
        layer.A.copy_(torch.eye(4).view(2, 2, 4))  # A x = x: its entries are e0r0 e0r1 e1r0 e1r1
        layer.B.copy_(torch.eye(4).view(2, 2, 4))
    y = layer(torch.tensor([[[1.0, 10.0, 100.0, 1000.0]]]), torch.tensor([[2.0, 3.0]]))
    assert y.tolist() == [[[2.0, 20.0, 300.0, 3000.0]]]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("bias", [False, True])
def test_the_stacked_product_equals_a_loop_over_experts(bias, dtype):
    layer = make_layer(bias=bias, dtype=dtype)
    x, gate = torch.randn(3, 7, 24, dtype=dtype), make_gate(3, dtype=dtype)
    expected = F.linear(x, layer.weight, layer.bias)
    for row in range(3):
        for e in range(10):
            expected[row] += SCALE * gate[row, e] * (x[row] @ layer.A[e].T) @ layer.B[e]
    assert error(layer(x, gate), expected) <= TOLERANCE[dtype]


@pytest.mark.parametrize("rank, alpha", [(2, 16), (8, 16), (8, 4)])
@pytest.mark.parametrize("n_experts", [1, 3])
def test_an_update_is_scaled_by_alpha_over_the_rank_of_one_expert(n_experts, rank, alpha):
    layer = ExpertLinear(Linear(5, 6, bias=False), n_experts, rank, alpha)
    torch.nn.init.normal_(layer.B)
    x, gate = torch.randn(1, 4, 5), make_gate(1, n_experts)
    update = sum(gate[0, e] * layer.B[e].T @ layer.A[e] for e in range(n_experts)) * alpha / rank
    assert error(layer(x, gate), x @ (layer.weight + update).T) <= 1e-5


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("e", [0, 7])
@torch.no_grad()
def test_a_one_hot_gate_is_that_expert_alone(e, dtype):
    model = make_model(dtype)
    plain = base_state(model)
    for name, layer in expert_layers(model).items():
        plain[f"{name}.weight"] += SCALE * layer.B[e].T @ layer.A[e]
    assert_same_function(model, one_hot(e, dtype=dtype)[0], plain_model(model, plain))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("changes", [{}, {"tied": True, "qkv_bias": True}], ids=["llama", "qwen"])
def test_the_mixture_equals_dense_weights_written_out_and_merged(changes, dtype):
    model, gate = make_model(dtype, **changes), make_gate(dtype=dtype)
    assert_same_function(model, gate, dense(model, gate))
    assert_same_function(model, gate, plain_model(model, lora.merged(model, gate)))


def test_rows_with_gates_of_their_own_equal_the_rows_alone():
    """<= 1e-5 and not bitwise: matrix products of another shape sum in another order."""
    model, ids, gate = make_model(), make_ids(rows=4), make_gate(4)
    together = model(ids, gate)
    for row in range(4):
        assert error(together[row], model(ids[row:row + 1], gate[row:row + 1])[0]) <= 1e-5
    assert error(together, model(ids, gate.roll(1, 0))) > 0.1  # the gates differ enough to be told apart


# ----------------------------------------------------------------------------------------------------------------------
# Gradients

def test_gradients_of_x_gate_A_and_B_equal_finite_differences():
    layer = make_layer(n_in=3, n_out=4, n_experts=3, rank=2, dtype=torch.float64)
    inputs = [t.detach().clone().requires_grad_() for t in (
        torch.randn(2, 3, 3, dtype=torch.float64), make_gate(2, 3, dtype=torch.float64), layer.A, layer.B)]
    assert torch.autograd.gradcheck(
        lambda x, gate, A, B: torch.func.functional_call(layer, {"A": A, "B": B}, (x, gate)), inputs)


def test_experts_of_weight_zero_get_exactly_zero_gradient():
    model = make_model()
    gate = torch.tensor([0.5, 0, 0.2, 0, 0, 0.3, 0, 0, 0, 0]).expand(2, -1)
    model(make_ids(), gate).square().sum().backward()
    for layer in expert_layers(model).values():
        for grad in (layer.A.grad, layer.B.grad):
            assert [e for e in range(10) if torch.count_nonzero(grad[e])] == [0, 2, 5]


def test_an_expert_learns_from_the_rows_that_weigh_it_only():
    """What lets warm-up train ten experts in one run: the gradient of each is that of its own rows alone."""
    model, ids = make_model(), make_ids(rows=3)
    gate = torch.cat([one_hot(4), one_hot(1), one_hot(4)])
    model(ids, gate).square().mean(-1).sum().backward()
    together = {name: layer.A.grad.clone() for name, layer in expert_layers(model).items()}
    model.zero_grad()
    model(ids[[0, 2]], gate[[0, 2]]).square().mean(-1).sum().backward()
    for name, layer in expert_layers(model).items():
        grad = layer.A.grad[4]
        assert error(together[name][4], grad) <= 1e-4 * grad.abs().max()


def test_the_gates_gradient_is_zero_as_long_as_all_B_are_and_not_after():
    model, ids = make_base(), make_ids()
    add_experts(model)
    for trained in (False, True):
        gate = make_gate(2).requires_grad_()
        model(ids, gate).square().sum().backward()
        assert torch.count_nonzero(gate.grad) == (gate.numel() if trained else 0)
        random_B(model)


@pytest.mark.parametrize("learned", [True, False], ids=["learned gates", "fixed gates"])
def test_recomputed_layers_get_the_same_gradients_each_forward_with_its_own_gate(learned):
    """Two gates, two forwards, then one backward: a gate kept on a module would be the second one in both.

    Under fixed gates (warm-up) no input of a layer needs a gradient: reentrant checkpointing would give none at all.
    """
    model, ids, entered = make_model(), make_ids(rows=4), []
    layers = expert_layers(model).values()
    next(iter(layers)).register_forward_hook(lambda *_: entered.append(1))
    grads, calls = [], []
    for model.recompute in (False, True):
        entered.clear()
        gates = [make_gate(2, seed=seed).requires_grad_(learned) for seed in (3, 4)]
        sum(model(part, gate).square().mean() for part, gate in zip(ids.split(2), gates)).backward()
        assert all(layer.A.grad.any() and layer.B.grad.any() for layer in layers)
        trained = [*(gates if learned else []), *(t for layer in layers for t in (layer.A, layer.B))]
        grads.append([tensor.grad.clone() for tensor in trained])
        calls.append(len(entered))
        model.zero_grad()
    assert calls == [2, 4]  # the second time, layers did run again in the backward pass
    for kept, again in zip(*grads):
        assert error(kept, again) <= 1e-6 * kept.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_training_step_changes_the_experts_and_not_one_bit_of_the_base(dtype):
    model = make_base(dtype)
    trainable = add_experts(model)
    random_B(model)
    before = snapshot(model)
    optimiser = torch.optim.AdamW(trainable, lr=1e-2)
    held = [id(t) for group in optimiser.param_groups for t in group["params"]]
    assert sorted(held) == sorted(id(t) for t in model.parameters() if t.requires_grad)
    model(make_ids(), make_gate(2)).float().square().mean().backward()
    assert all(t.grad is None for t in model.parameters() if not t.requires_grad)
    optimiser.step()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {f"{name}.{ab}" for name in expert_layers(model) for ab in "AB"}


def test_experts_keep_no_more_than_three_numbers_per_token_expert_and_rank_for_the_backward_pass():
    """A x before and after the gate are 2·T·E·r, the gate itself is small change; [T, E, out] would be 32 times that.

    x, the gate and the parameters are there anyhow and are not counted; one storage counts once.
    """
    rows, tokens, experts, rank, width = 2, 64, 10, 4, 256
    layer = make_layer(width, width, experts, rank)
    x, gate = torch.randn(rows, tokens, width, requires_grad=True), make_gate(rows).requires_grad_()

    def kept(gate):
        saved = {}
        with torch.autograd.graph.saved_tensors_hooks(
                lambda t: saved.update({t.untyped_storage().data_ptr(): t.untyped_storage()}) or t, lambda t: t):
            y = layer(x, gate)
        there = {t.untyped_storage().data_ptr() for t in (x, gate, *layer.parameters()) if t is not None}
        return y, sum(storage.nbytes() for pointer, storage in saved.items() if pointer not in there)

    (y, frozen), (z, mixed) = kept(None), kept(gate)  # y and z stay alive: no storage's address is used twice
    assert frozen == 0
    assert 0 < mixed - frozen <= 3 * rows * tokens * experts * rank * 4


# ----------------------------------------------------------------------------------------------------------------------
# Against peft on the model of transformers

@pytest.fixture(scope="module", params=["llama", "qwen2"])
def reference(request, tmp_path_factory):
    """The model of `transformers` with all ten experts loaded by `peft` from our folder, and ours beside it.

    logits(name) are the reference's with that adapter active.
    """
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    folder = tmp_path_factory.mktemp(request.param)
    kinds = {"llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM, False),
             "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM, True)}
    make_config, make, tied = kinds[request.param]
    theirs = make(make_config(
        vocab_size=SMALL.vocab_size, hidden_size=SMALL.dim, num_hidden_layers=SMALL.n_layers, head_dim=SMALL.head_dim,
        num_attention_heads=SMALL.n_heads, num_key_value_heads=SMALL.n_kv_heads, intermediate_size=SMALL.hidden_dim,
        rms_norm_eps=SMALL.norm_eps, tie_word_embeddings=tied)).float().eval()
    randomise(theirs, seed=7).save_pretrained(folder / "base")
    ours = Transformer.from_pretrained(folder / "base", dtype=torch.float32)
    assert ours.config.qkv_bias == tied
    add_experts(ours)
    save_experts(random_B(ours), folder / "experts", base=folder / "base")
    theirs = peft.PeftModel.from_pretrained(theirs, folder / "experts" / EXPERTS[0], adapter_name=EXPERTS[0]).eval()
    for expert in EXPERTS[1:]:
        theirs.load_adapter(folder / "experts" / expert, adapter_name=expert)

    @torch.no_grad()
    def logits(adapter):
        theirs.set_adapter(adapter)
        return theirs(make_ids()).logits

    return SimpleNamespace(peft=theirs, ours=ours, folder=folder, logits=logits, base=ours(make_ids()))


def test_a_one_hot_gate_equals_peft_with_that_experts_folder(reference):
    logits = {expert: reference.ours(make_ids(), one_hot(e, 2)) for e, expert in enumerate(EXPERTS)}
    assert {expert: e for expert in EXPERTS if (e := error(logits[expert], reference.logits(expert))) > 1e-5} == {}
    assert all(error(logits[expert], reference.base) > 0.1 for expert in EXPERTS)
    with reference.peft.disable_adapter():
        assert error(reference.logits(EXPERTS[0]), reference.base) <= 1e-5


def test_the_mixture_equals_pefts_own_weighted_combination_and_the_exported_adapter(reference, tmp_path):
    gate = make_gate()
    mixed = reference.ours(make_ids(), gate.expand(2, -1))
    reference.peft.add_weighted_adapter(list(EXPERTS), gate.tolist(), "combined", combination_type="cat")
    assert error(mixed, reference.logits("combined")) <= 1e-5
    export_mixture(reference.ours, gate, tmp_path / "mixture")
    reference.peft.load_adapter(tmp_path / "mixture", adapter_name="exported")
    assert error(mixed, reference.logits("exported")) <= 1e-5
    assert json.loads((tmp_path / "mixture" / "adapter_config.json").read_text())["r"] == 80


def test_mixing_A_and_B_apart_would_be_another_model_than_the_exported_one(reference, tmp_path):
    """(Σ w B)(Σ w A) has the cross terms B_i A_j; here the error is relative to what the mixture changes."""
    gate = make_gate()
    apart = {name: tuple(torch.einsum("e,erx->rx", gate, t.detach()) for t in (layer.A, layer.B))
             for name, layer in expert_layers(reference.ours).items()}
    lora.write_adapter(tmp_path / "apart", 8, 16, "", {name: (A, B.T) for name, (A, B) in apart.items()})
    export_mixture(reference.ours, gate, tmp_path / "whole")
    mixed = reference.ours(make_ids(), gate.expand(2, -1))

    def relative_error(name):
        reference.peft.load_adapter(tmp_path / name, adapter_name=name)
        return ((reference.logits(name) - mixed).norm() / (mixed - reference.base).norm()).item()

    assert relative_error("whole") < 1e-5
    assert relative_error("apart") > 0.5


def test_a_folder_that_peft_wrote_loads_bitwise(reference, tmp_path):
    reference.peft.save_pretrained(tmp_path, selected_adapters=list(EXPERTS))  # each into a folder of its name
    model = Transformer.from_pretrained(reference.folder / "base", dtype=torch.float32)
    add_experts(model)
    load_experts(model, tmp_path)
    assert_unchanged(model, snapshot(reference.ours))


# ----------------------------------------------------------------------------------------------------------------------
# Files

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saved_experts_load_bitwise_whatever_the_bases_dtype(dtype, tmp_path):
    model, other = (make_base(dtype) for _ in range(2))
    add_experts(model, rank=4, alpha=6)
    save_experts(random_B(model), tmp_path / "experts", base="a base")
    add_experts(other, rank=4, alpha=6)
    load_experts(other, tmp_path / "experts")
    assert_unchanged(other, snapshot(model))
    assert lora.adapter_shape(tmp_path / "experts") == (4, 6)
    assert sorted(path.name for path in (tmp_path / "experts").iterdir()) == sorted(EXPERTS)
    for expert in EXPERTS:
        settings = json.loads((tmp_path / "experts" / expert / "adapter_config.json").read_text())
        assert settings["base_model_name_or_path"] == "a base"
        assert {path.name for path in (tmp_path / "experts" / expert).iterdir()} == {
            "adapter_config.json", "adapter_model.safetensors"}


def test_saving_again_replaces_what_was_there(tmp_path):
    model = make_model(n_layers=1)
    save_experts(model, tmp_path)
    save_experts(random_B(model, seed=9), tmp_path)
    other = make_model(n_layers=1)
    load_experts(other, tmp_path)
    assert_unchanged(other, snapshot(model))


@pytest.mark.parametrize("use", [save_experts, load_experts])
def test_only_ten_experts_have_names_to_be_saved_and_loaded_under(use, tmp_path):
    save_experts(make_model(n_layers=1), tmp_path)
    model = make_model(n_experts=3, n_layers=1)
    before = snapshot(model)
    with pytest.raises(ValueError, match="3 experts"):
        use(model, tmp_path)
    assert_unchanged(model, before)


BROKEN = EXPERTS[6]  # not the first: an expert read before it must not have been filled either
TENSOR = "base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"


def setting(key, value):
    """A change of one key in the broken expert's adapter_config.json."""
    def change(folder):
        file = folder / BROKEN / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    return change


def tensors(edit):
    """A change of the broken expert's tensors, as a dict that `edit` changes."""
    def change(folder):
        file = folder / BROKEN / "adapter_model.safetensors"
        state = load_file(file)
        edit(state)
        file.unlink()
        save_file(state, file)
    return change


def cut(name, part):
    def change(folder):
        file = folder / BROKEN / name
        file.write_bytes(file.read_bytes()[:int(part * file.stat().st_size)])
    return change


def other_model(**changes):
    return lambda folder: save_experts(make_model(**({"n_layers": 1} | changes)), folder)


REFUSALS = {
    "rank, as a setting": (setting("r", 4), ["adapter_config.json", "r is 4", "expected 8"]),
    "alpha": (setting("lora_alpha", 32), ["adapter_config.json", "lora_alpha is 32", "expected 16"]),
    "rank, of another run": (other_model(rank=4, alpha=8), ["adapter_config.json", "r is 4", "expected 8"]),
    "alpha, of another run": (other_model(alpha=8), ["adapter_config.json", "lora_alpha is 8", "expected 16"]),
    "fewer targets": (setting("target_modules", ["q_proj", "v_proj"]), ["adapter_config.json", "target_modules"]),
    "targets by a pattern": (setting("target_modules", "all-linear"), ["adapter_config.json", "target_modules"]),
    "DoRA": (setting("use_dora", True), ["adapter_config.json", "use_dora"]),
    "rsLoRA": (setting("use_rslora", True), ["adapter_config.json", "use_rslora"]),
    "biases": (setting("bias", "all"), ["adapter_config.json", "bias is 'all'"]),
    "another kind": (setting("peft_type", "LOHA"), ["adapter_config.json", "peft_type is 'LOHA'"]),
    "ranks by layer": (setting("rank_pattern", {"q_proj": 4}), ["adapter_config.json", "rank_pattern"]),
    "alphas by layer": (setting("alpha_pattern", {"q_proj": 4}), ["adapter_config.json", "alpha_pattern"]),
    "another base's width": (other_model(hidden_dim=72), ["adapter_model.safetensors", "gate_proj.lora_B", "(72, 8)"]),
    "another base's depth": (other_model(n_layers=2), ["adapter_model.safetensors", "unexpected", "model.layers.1."]),
    "a tensor turned": (tensors(lambda state: state.update({TENSOR: state[TENSOR].T.contiguous()})),
                        ["adapter_model.safetensors", TENSOR, "(8, 80)", "(80, 8)"]),
    "a missing tensor": (tensors(lambda state: state.pop(TENSOR)), ["adapter_model.safetensors", "missing", TENSOR]),
    "an extra tensor": (tensors(lambda state: state.update({"lm_head.weight": torch.zeros(1)})),
                        ["adapter_model.safetensors", "unexpected", "lm_head.weight"]),
    "a missing expert": (lambda folder: shutil.rmtree(folder / BROKEN), ["adapter_config.json", "no such file"]),
    "missing tensors": (lambda folder: (folder / BROKEN / "adapter_model.safetensors").unlink(),
                        ["adapter_model.safetensors"]),
    "half of the tensors' file": (cut("adapter_model.safetensors", 0.5), ["adapter_model.safetensors"]),
    "an empty tensors' file": (cut("adapter_model.safetensors", 0), ["adapter_model.safetensors"]),
    "half of the settings": (cut("adapter_config.json", 0.5), ["adapter_config.json", "JSON"]),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_experts_that_do_not_fit_are_refused_by_name_and_nothing_is_changed(case, tmp_path):
    spoil, named = REFUSALS[case]
    save_experts(make_model(seed=2, n_layers=1), tmp_path)
    spoil(tmp_path)
    model = make_model(n_layers=1)
    before = snapshot(model)
    with pytest.raises(UserError) as refusal:
        load_experts(model, tmp_path)
    of_another = case.startswith("another base") or "another run" in case  # then every expert is wrong, the first first
    assert all(part in str(refusal.value) for part in [EXPERTS[0] if of_another else BROKEN, *named]), refusal.value
    assert_unchanged(model, before)


@pytest.mark.parametrize("changes", [{}, {"tied": True, "qkv_bias": True}], ids=["llama", "qwen"])
def test_merged_weights_are_new_tensors_under_the_public_names(changes):
    model, gate = make_model(**changes), make_gate()
    before = snapshot(model)
    state = lora.merged(model, gate)
    assert state.keys() == Transformer(model.config).state_dict().keys()
    targets = {f"{name}.weight" for name in expert_layers(model)}
    assert {name for name in state if not torch.equal(state[name], before[name])} == targets
    for name in targets:
        state[name].zero_()
    assert_unchanged(model, before)


def test_merged_weights_of_a_bf16_base_are_rounded_once():
    """Rounded once, no weight is further than half a step of bf16 from the exact sum. 1e-6 allows for the fp32 sums."""
    model = make_base(torch.bfloat16)
    add_experts(model)
    random_B(model)
    gate, state = make_gate(), snapshot(model)
    result = lora.merged(model, gate)
    double = {name: SimpleNamespace(A=layer.A.double(), B=layer.B.double())
              for name, layer in expert_layers(model).items()}
    for name, layer in double.items():
        exact = state[f"{name}.weight"].double() + sum(
            SCALE * w * layer.B[e].T @ layer.A[e] for e, w in enumerate(gate.double()))
        _, exponent = torch.frexp(exact)  # |exact| in [2^(k-1), 2^k): the step is 2^(k-8)
        merged = result[f"{name}.weight"]
        assert merged.dtype == torch.bfloat16
        assert ((merged.double() - exact).abs() <= torch.exp2(exponent.double() - 9) + 1e-6).all()


@pytest.mark.parametrize("gate", [make_gate(), make_gate(1), make_gate().tolist(), make_gate(dtype=torch.float64)],
                         ids=["(E,)", "(1, E)", "a list", "fp64"])
def test_a_single_gate_may_come_with_or_without_its_row(gate):
    flat = lora.one_gate(make_model(), gate)
    assert flat.shape == (10,) and not flat.requires_grad
    assert torch.equal(flat.float(), make_gate())


@pytest.mark.parametrize("shape", [(), (9,), (11,), (2, 10), (10, 1), (2, 5)], ids=str)
def test_a_gate_of_another_shape_is_no_single_gate(shape, tmp_path):
    """(2, 5) has ten numbers too, and (10, 1) may be the first column of a batch of ten gates."""
    model, gate = make_model(n_layers=1), torch.full(shape, 0.1)
    for use in (lora.one_gate, lora.merged, lambda *given: export_mixture(*given, tmp_path / "mixture")):
        with pytest.raises(ValueError, match="shape"):
            use(model, gate)
    assert not (tmp_path / "mixture").exists()
