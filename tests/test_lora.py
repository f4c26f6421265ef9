"""Laws of lora.py: what the experts compute, what trains, and what their files hold.

The references are a plain model with the weights W + (α/r) Σ_e w_e B_e A_e written out, and `peft` on the model of
`transformers`. Every parameter is random, norms, biases and B too, so that a missing term changes the result: at these
sizes one expert moves the logits by about as much as they are large. 1e-5 allows for fp32 sums in another order.
"""
import json
import shutil
from dataclasses import fields, replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

import lora
from harness import in_8_bits, our_step, peak, rows_of, saved_bytes
from lora import EXPERTS, TARGETS, ExpertLinear, add_experts, expert_layers, export_mixture, load_experts
from lora import merged_tensors, save_experts
from model import CONFIGS, Config, Linear, Transformer
from support.files import UserError

SMALL = Config(vocab_size=96, dim=64, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=32, hidden_dim=80, norm_eps=1e-5,
               rope_theta=1e4)
SCALE = 2.0  # α/r of the default experts, 16/8
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
FAMILIES = pytest.mark.parametrize("changes", [{}, {"tied": True, "qkv_bias": True}], ids=["llama", "qwen"])
LOADED_AS = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # the dtypes that a base is loaded as


@pytest.fixture(autouse=True)
def seed():
    """A is drawn from the global generator, which must not depend on the tests that ran before."""
    torch.manual_seed(0)


@torch.no_grad()
def randomise(model, seed):
    """Give every parameter random values, of a size that keeps activations near 1."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.named_parameters():
        noise = torch.randn(tensor.shape, generator=generator)
        tensor.copy_(noise / tensor.shape[1] ** 0.5 if tensor.ndim == 2 else
                     0.5 * noise if name.endswith("bias") else 1 + 0.2 * noise)
    return model


def make_base(dtype=torch.float32, seed=0, **changes):
    return randomise(Transformer(replace(SMALL, **changes)), seed).to(dtype)


@torch.no_grad()
def random_B(model, seed=1):
    """Give every B random values, as if it had been trained: with B = 0 the experts do nothing."""
    generator = torch.Generator().manual_seed(seed)
    for layer in expert_layers(model).values():
        layer.B.copy_(0.1 * torch.randn(layer.B.shape, generator=generator))
    return model


def make_model(dtype=torch.float32, seed=0, n_experts=10, rank=8, alpha=16, **changes):
    """Returns a base with experts whose B is random. With fp64 the experts are fp64 too."""
    model = make_base(torch.float32, seed, **changes)
    add_experts(model, n_experts, rank, alpha)
    return random_B(model, seed + 1).to(dtype)


def make_layer(n_in=24, n_out=40, n_experts=10, rank=4, alpha=8, bias=True, dtype=torch.float32):
    layer = ExpertLinear(Linear(n_in, n_out, bias=bias).requires_grad_(False), n_experts, rank, alpha)
    torch.nn.init.normal_(layer.B)
    return layer.to(dtype)


def make_gate(rows=None, n_experts=10, seed=3, dtype=torch.float32):
    """Returns uneven weights that sum to 1: (rows, E), each row another gate, or one gate (E,)."""
    noise = torch.randn(rows or 1, n_experts, generator=torch.Generator().manual_seed(seed))
    gate = (1.5 * noise).softmax(-1).to(dtype)
    return gate if rows else gate[0]


def make_ids(rows=2, length=12):
    return torch.randint(0, SMALL.vocab_size, (rows, length), generator=torch.Generator().manual_seed(5))


def snapshot(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def changed(model, before):
    """Returns the names of the tensors that are not bitwise what the snapshot holds."""
    now = model.state_dict()
    assert now.keys() == before.keys()
    return {name for name in now if not torch.equal(now[name], before[name])}


def expert_names(model):
    return {f"{name}.{matrix}" for name in expert_layers(model) for matrix in "AB"}


def plain_model(model, state):
    plain = Transformer(model.config).to(model.dtype)
    plain.load_state_dict(state)
    return plain


@torch.no_grad()
def written_out(model, gate):
    """Returns the plain model with the weights W + (α/r) Σ_e w_e B_e A_e, the sum taken expert by expert."""
    state = {name: tensor for name, tensor in snapshot(model).items() if name not in expert_names(model)}
    for name, layer in expert_layers(model).items():
        state[f"{name}.weight"] += sum(SCALE * w * layer.B[e].T @ layer.A[e] for e, w in enumerate(gate))
    return plain_model(model, state)


def error(one, other):
    return (one - other).abs().max().item()


# ----------------------------------------------------------------------------------------------------------------------
# What trains, and how it starts

def test_experts_are_ordered_by_trait_and_high_comes_before_low():
    assert EXPERTS == (
        "high_openness", "low_openness", "high_conscientiousness", "low_conscientiousness", "high_extraversion",
        "low_extraversion", "high_agreeableness", "low_agreeableness", "high_neuroticism", "low_neuroticism")


@LOADED_AS
@FAMILIES
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
    assert all(tensor.dtype == (torch.float32 if tensor.requires_grad else dtype) for tensor in model.parameters())
    assert set(model.state_dict()) == public | expert_names(model)


@pytest.mark.parametrize("n_experts, parameters", [(1, 20_971_520), (10, 209_715_200)])
def test_rank_8_experts_of_the_8B_have_the_published_number_of_parameters(n_experts, parameters):
    with torch.device("meta"):
        model = Transformer(CONFIGS["Llama-3.1-8B"])
    trainable = add_experts(model, n_experts)
    assert sum(tensor.numel() for tensor in trainable) == parameters
    assert all(tensor.is_meta for tensor in trainable)  # nothing was allocated


def test_experts_cannot_be_added_twice():
    model = make_model()
    before = snapshot(model)
    with pytest.raises(ValueError, match="already"):
        add_experts(model)
    assert not changed(model, before)


def test_A_starts_uniform_within_one_over_root_in_and_B_starts_at_zero():
    """fan_in is the layer's input width, not the rank. Each A has at least 5,000 values, so the extremes are close to
    the bound."""
    model = make_base()
    add_experts(model)
    for layer in expert_layers(model).values():
        bound = layer.in_features ** -0.5
        assert 0.98 * bound < layer.A.max() <= bound and 0.98 * bound < -layer.A.min() <= bound
        assert layer.A.std().item() == pytest.approx(bound / 3 ** 0.5, rel=0.05)
        assert len({tuple(expert.flatten().tolist()) for expert in layer.A}) == len(EXPERTS)  # all different
        assert torch.count_nonzero(layer.B) == 0


# ----------------------------------------------------------------------------------------------------------------------
# What the experts compute

@LOADED_AS
@FAMILIES
def test_without_a_gate_the_model_is_bitwise_the_base(changes, dtype):
    model, ids = make_base(dtype, **changes), make_ids()
    base = model(ids)
    add_experts(model)
    assert torch.equal(model(ids), base)
    assert error(model(ids, make_gate(2)), base) == 0  # B is still 0
    random_B(model)
    assert torch.equal(model(ids), base)
    assert error(model(ids, make_gate(2)), base) > 0.1


@pytest.mark.parametrize("use", [
    lambda model, folder: model(make_ids(), make_gate(2)), save_experts, load_experts,
    lambda model, folder: export_mixture(model, make_gate(), folder),
    lambda model, folder: dict(merged_tensors(model, make_gate()))],
    ids=["forward", "save_experts", "load_experts", "export_mixture", "merged_tensors"])
def test_a_model_without_experts_refuses_a_gate_and_has_nothing_to_save_load_or_merge(use, tmp_path):
    with pytest.raises(ValueError, match="no experts"):
        use(make_base(), tmp_path / "experts")
    assert not (tmp_path / "experts").exists()


@torch.no_grad()
def test_the_gate_is_repeated_within_an_expert_not_across_experts():
    """The example of ExpertLinear.forward, E = 2 and r = 2: weights 2 and 3 multiply A x by 2 2 3 3, not by 2 3 2 3."""
    layer = ExpertLinear(Linear(4, 4, bias=False), n_experts=2, rank=2, alpha=2)
    layer.weight.zero_()
    layer.A.copy_(torch.eye(4).view(2, 2, 4))  # A x = x
    layer.B.copy_(torch.eye(4).view(2, 2, 4))
    y = layer(torch.tensor([[[1.0, 10.0, 100.0, 1000.0]]]), torch.tensor([[2.0, 3.0]]))
    assert y.tolist() == [[[2.0, 20.0, 300.0, 3000.0]]]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("n_experts, rank, alpha", [(10, 4, 8), (1, 2, 16), (3, 8, 16), (3, 8, 4)])
def test_a_layer_equals_a_loop_over_experts_scaled_by_alpha_over_the_rank_of_one(n_experts, rank, alpha, bias, dtype):
    layer = make_layer(n_experts=n_experts, rank=rank, alpha=alpha, bias=bias, dtype=dtype)
    x, gate = torch.randn(3, 7, 24, dtype=dtype), make_gate(3, n_experts, dtype=dtype)
    expected = F.linear(x, layer.weight, layer.bias)
    for row in range(3):
        for e in range(n_experts):
            expected[row] += alpha / rank * gate[row, e] * (x[row] @ layer.A[e].T) @ layer.B[e]
    assert error(layer(x, gate), expected) <= TOLERANCE[dtype] * expected.abs().max()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("gate", [make_gate(), torch.eye(10)[0], torch.eye(10)[7]], ids=["mixture", "first", "eighth"])
@FAMILIES
@torch.no_grad()
def test_a_mixture_and_a_single_expert_equal_the_weights_written_out_and_merged(changes, gate, dtype):
    """Every linear layer is compared by itself, too: norms compute in fp32 and would round small fp64 errors away."""
    model, gate, ids = make_model(dtype, **changes), gate.to(dtype), make_ids()
    gates, logits = gate.expand(2, -1), model(ids, gate.expand(2, -1))
    for plain in (written_out(model, gate), plain_model(model, dict(merged_tensors(model, gate)))):
        for name, layer in expert_layers(model).items():
            x = torch.randn(2, 5, layer.in_features, dtype=dtype)
            assert error(layer(x, gates), plain.get_submodule(name)(x)) <= TOLERANCE[dtype], name
        assert error(logits, plain(ids)) <= TOLERANCE[dtype]
    assert error(logits, model(ids)) > 0.1  # the experts do something


def test_rows_under_different_gates_equal_the_rows_alone():
    """Not bitwise: matrix products of another shape sum in another order."""
    model, ids, gate = make_model(), make_ids(rows=4), make_gate(4)
    together = model(ids, gate)
    for row in range(4):
        assert error(together[row], model(ids[row:row + 1], gate[row:row + 1])[0]) <= 1e-5
    assert error(together, model(ids, gate.roll(1, 0))) > 0.1  # the gates make a difference


# ----------------------------------------------------------------------------------------------------------------------
# Gradients

def test_gradients_of_x_gate_A_and_B_equal_finite_differences():
    layer = make_layer(n_in=3, n_out=4, n_experts=3, rank=2, dtype=torch.float64)
    inputs = [t.detach().clone().requires_grad_() for t in (
        torch.randn(2, 3, 3, dtype=torch.float64), make_gate(2, 3, dtype=torch.float64), layer.A, layer.B)]
    assert torch.autograd.gradcheck(
        lambda x, gate, A, B: torch.func.functional_call(layer, {"A": A, "B": B}, (x, gate)), inputs)


def test_an_expert_learns_from_the_rows_that_weigh_it_and_from_no_other():
    """This lets warm-up train ten experts in one run. Experts of weight 0 get a gradient of exactly 0."""
    model, ids = make_model(), make_ids(rows=3)
    gate = torch.zeros(3, 10)
    gate[[0, 2], 4], gate[1, [0, 7]] = 1, 0.5
    model(ids, gate).square().mean(-1).sum().backward()
    together = {name: tensor.grad.clone() for name, tensor in model.named_parameters() if tensor.requires_grad}
    for grad in together.values():
        assert [e for e in range(10) if torch.count_nonzero(grad[e])] == [0, 4, 7]
    model.zero_grad()
    model(ids[[0, 2]], gate[[0, 2]]).square().mean(-1).sum().backward()
    for name, grad in together.items():
        alone = model.get_parameter(name).grad[4]
        assert error(grad[4], alone) <= 1e-4 * alone.abs().max()


def test_the_gradient_of_the_gate_is_zero_as_long_as_every_B_is():
    model, ids = make_base(), make_ids()
    add_experts(model)
    for trained in (False, True):
        gate = make_gate(2).requires_grad_()
        model(ids, gate).square().sum().backward()
        assert torch.count_nonzero(gate.grad) == (gate.numel() if trained else 0)
        random_B(model)


@pytest.mark.parametrize("learned", [True, False], ids=["learned gates", "fixed gates"])
def test_recomputed_layers_get_the_same_gradients_each_forward_under_its_own_gate(learned):
    """Two forwards under two gates, then one backward. A gate stored on a module would be the second one in both.

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
    assert calls == [2, 4]  # with recomputation, the backward pass runs the layers a second time
    for kept, recomputed in zip(*grads):
        assert error(kept, recomputed) <= 1e-6 * kept.abs().max()


@LOADED_AS
def test_a_training_step_changes_the_experts_and_not_one_bit_of_the_base(dtype):
    model = make_base(dtype)
    trainable = add_experts(model)
    random_B(model)
    before = snapshot(model)
    optimiser = torch.optim.AdamW(trainable, lr=1e-2)
    model(make_ids(), make_gate(2)).float().square().mean().backward()
    assert all(t.grad is None for t in model.parameters() if not t.requires_grad)
    optimiser.step()
    assert changed(model, before) == expert_names(model)


def test_experts_save_at_most_three_numbers_per_token_expert_and_rank_for_the_backward_pass():
    """A x before and after the gate are 2·T·E·r numbers, and the gate is small. (T, E, out) would be 32 times as much.

    x, the gate and the parameters exist anyway and are not counted.
    """
    rows, tokens, experts, rank, width = 2, 64, 10, 4, 256
    layer = make_layer(width, width, experts, rank)
    x, gate = torch.randn(rows, tokens, width, requires_grad=True), make_gate(rows).requires_grad_()
    given = x, gate, *layer.parameters()
    assert saved_bytes(given, lambda: layer(x)) == 0
    assert 0 < saved_bytes(given, lambda: layer(x, gate)) <= 3 * rows * tokens * experts * rank * 4


# ----------------------------------------------------------------------------------------------------------------------
# Beside weights in 8 bits

@FAMILIES
@pytest.mark.parametrize("recompute", [False, True])
def test_beside_weights_in_8_bits_A_B_and_the_gate_learn_as_beside_the_rounded_weights(recompute, changes):
    found, model = [], in_8_bits(make_model(torch.float64, **changes))
    model.recompute = recompute
    for _ in range(2):
        gate = make_gate(2, dtype=torch.float64).requires_grad_()
        logits = model(make_ids(), gate)
        logits.square().mean().backward()
        found.append([logits, gate.grad, *(t.grad for t in model.parameters() if t.requires_grad)])
        model.zero_grad()
        for layer in expert_layers(model).values():
            if layer.weight_scale is not None:
                layer.weight = torch.nn.Parameter(layer.weight * layer.weight_scale.double()[:, None], False)
                layer.weight_scale = None
    assert model.dtype == layer.weight.dtype == torch.float64 and len(found[0]) == 2 + 2 * 2 * 7
    for one, other in zip(*found):
        assert error(one, other) <= 1e-12 * other.abs().max() and other.any()


def kept_for_backward(model, gate):
    """The numbers of elements of all tensors that a forward pass keeps for the backward pass, without parameters."""
    own, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, set()

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept.update([tensor.numel(), tensor.untyped_storage().nbytes() // tensor.element_size()])
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model.hidden(make_ids(3, 11), gate).square().mean()
    loss.backward()
    return kept


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_beside_weights_in_8_bits_nothing_of_a_weights_size_is_kept_for_backward(dtype, compiled):
    """Not by torch.compile either, which keeps what two casts of a weight share if they are written alike."""
    if compiled and not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("torch.compile needs a C++ compiler")
    model = in_8_bits(make_base(dtype))
    add_experts(model, rank=3)  # with a rank of 8, all A of a layer together have the size of a weight
    sizes = {layer.weight.numel() for layer in expert_layers(random_B(model)).values()}
    if compiled:
        torch.compiler.reset()
        for block in model.model.layers:
            block.compile(dynamic=True, fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        kept = kept_for_backward(model, make_gate(3).requires_grad_())
    assert kept and not kept & sizes
    assert all(layer.A.grad.any() and layer.B.grad.any() for layer in expert_layers(model).values())


@pytest.mark.slow
def test_a_step_at_the_8Bs_width_needs_one_dense_weight_more_and_half_the_memory_for_the_base():
    """Two layers, recomputed, base in bf16. The largest weight is 14,336 x 4,096."""
    peaks, sizes = [], []
    for int8 in (False, True):
        with torch.device("meta"):
            model = Transformer(replace(CONFIGS["Llama-3.1-8B"], n_layers=2, vocab_size=512)).to(torch.bfloat16)
        model = randomise(model.to_empty(device="cpu"), 0)
        if int8:
            in_8_bits(model)
        sizes.append(sum(p.nbytes for p in model.parameters()))
        experts, model.recompute = add_experts(model), True
        run = our_step(model, rows_of(model.config, 1, 64), torch.optim.AdamW(experts, fused=True), make_gate(1))
        with torch.autocast("cpu", torch.bfloat16):
            run()
            peaks.append(peak(run, torch.device("cpu"))[0])
        del run, experts, model
    assert sizes[1] < 0.51 * sizes[0]
    assert peaks[1] <= peaks[0] + 2 * 14336 * 4096 + 2**24, peaks


# ----------------------------------------------------------------------------------------------------------------------
# Against peft on the model of transformers

@pytest.fixture(scope="module", params=["llama", "qwen2"])
def reference(request, tmp_path_factory):
    """The model of `transformers` with ten experts that `peft` loaded from our folder, and our model with the same.

    logits(name) are the reference's with that adapter active.
    """
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    folder = tmp_path_factory.mktemp(request.param)
    make_config, make, tied = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM, False),
        "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM, True)}[request.param]
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


def test_a_one_hot_gate_equals_peft_with_the_folder_of_that_expert(reference):
    for e, expert in enumerate(EXPERTS):
        logits = reference.ours(make_ids(), torch.eye(10)[[e, e]])
        assert error(logits, reference.logits(expert)) <= 1e-5, expert
        assert error(logits, reference.base) > 0.1
    with reference.peft.disable_adapter():
        assert error(reference.logits(EXPERTS[0]), reference.base) <= 1e-5


def test_the_mixture_equals_the_weighted_combination_of_peft_and_the_exported_adapter(reference, tmp_path):
    gate = make_gate()
    mixed = reference.ours(make_ids(), gate.expand(2, -1))
    reference.peft.add_weighted_adapter(list(EXPERTS), gate.tolist(), "combined", combination_type="cat")
    export_mixture(reference.ours, gate, tmp_path / "mixture")
    reference.peft.load_adapter(tmp_path / "mixture", adapter_name="exported")
    for name in ("combined", "exported"):
        assert error(mixed, reference.logits(name)) <= 1e-5
    assert json.loads((tmp_path / "mixture" / "adapter_config.json").read_text())["r"] == 80


@torch.no_grad()
def test_mixing_A_and_B_apart_would_be_another_model():
    """The example of export_mixture. Two experts, A = B = 1 and A = B = −1, both map x to x, and so does their mixture.
    But the means of A and of B are 0."""
    layer = ExpertLinear(Linear(1, 1, bias=False), n_experts=2, rank=1, alpha=1)
    layer.weight.zero_()
    for matrix in (layer.A, layer.B):
        matrix.copy_(torch.tensor([1.0, -1.0]).view(2, 1, 1))
    for gate in ([1.0, 0.0], [0.0, 1.0], [0.5, 0.5]):
        assert layer(torch.tensor([[[7.0]]]), torch.tensor([gate])).item() == 7.0
    assert layer.A.mean() * layer.B.mean() == 0


def test_a_folder_that_peft_wrote_loads_bitwise(reference, tmp_path):
    reference.peft.save_pretrained(tmp_path, selected_adapters=list(EXPERTS))  # each into a folder of its name
    model = Transformer.from_pretrained(reference.folder / "base", dtype=torch.float32)
    add_experts(model)
    load_experts(model, tmp_path)
    assert not changed(model, snapshot(reference.ours))


@torch.no_grad()
def train_with_peft(folder, start, out):
    """Save ten equal experts: an adapter on the base in `folder`, which PEFT starts in the way `start` and a step
    changes. Returns PEFT's logits with it. PEFT converts the kinds that change the base, which doubles r and alpha.
    """
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    settings = peft.LoraConfig(r=8, lora_alpha=16, target_modules=list(TARGETS), init_lora_weights=start,
                               lora_dropout=0.5, task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, settings).eval()
    model.peft_config["default"].init_lora_weights = True  # else PEFT would change the base when it reads this again
    model.save_pretrained(out / "start")
    model.peft_config["default"].init_lora_weights = start
    for name, p in model.named_parameters():
        if ".lora_" in name:
            p.add_(0.1 * torch.randn(p.shape))
    logits = model(make_ids()).logits
    model.save_pretrained(out / "trained")
    if str(start).startswith(("pissa", "olora")):
        model.save_pretrained(out / "converted", path_initial_model_for_weight_conversion=str(out / "start"))
    for kind in ("trained", "converted"):
        for expert in EXPERTS if (out / kind).is_dir() else ():
            shutil.copytree(out / kind, out / f"{kind} experts" / expert)
    return logits


@pytest.mark.filterwarnings("ignore")  # PEFT warns of the kinds that change the base
@pytest.mark.parametrize("start, converted", [
    (True, False), (False, False), ("gaussian", False), ("eva", False), ("orthogonal", False), ("mica", False),
    ("pissa", True), ("pissa_niter_4", True), ("olora", True)])
def test_an_adapter_is_what_peft_computes_however_it_was_started_or_refused_until_converted(
        start, converted, reference, tmp_path):
    wanted = train_with_peft(reference.folder / "base", start, tmp_path)
    ours = Transformer.from_pretrained(reference.folder / "base", dtype=torch.float32)
    add_experts(ours, rank=16 if converted else 8, alpha=32 if converted else 16)
    if converted:
        with pytest.raises(UserError, match=f"init_lora_weights is '{start}', expected True or .*weight_conversion"):
            other = Transformer.from_pretrained(reference.folder / "base", dtype=torch.float32)
            add_experts(other)
            load_experts(other, tmp_path / "trained experts")
    load_experts(ours, tmp_path / ("converted experts" if converted else "trained experts"))
    one = torch.eye(10)[[4, 4]]
    assert error(ours(make_ids(), one), wanted) <= 2e-5 and error(ours(make_ids(), one), reference.base) > 0.1


# ----------------------------------------------------------------------------------------------------------------------
# Files

@LOADED_AS
def test_saved_experts_load_bitwise_and_saving_again_replaces_them(dtype, tmp_path):
    model, other = (make_base(dtype) for _ in range(2))
    for one in (model, other):
        add_experts(one, rank=7, alpha=29)  # (29/7)·7 is not 29 in floating point
    for seed in (1, 9):
        save_experts(random_B(model, seed), tmp_path / "experts", base="a base")
        load_experts(other, tmp_path / "experts")
        assert not changed(other, snapshot(model))
    assert lora.adapter_shape(tmp_path / "experts") == (7, 29)
    assert sorted(path.name for path in (tmp_path / "experts").iterdir()) == sorted(EXPERTS)
    for expert in EXPERTS:
        config = json.loads((tmp_path / "experts" / expert / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == "a base"
        assert {path.name for path in (tmp_path / "experts" / expert).iterdir()} == {
            "adapter_config.json", "adapter_model.safetensors"}


@pytest.mark.parametrize("use", [save_experts, load_experts])
def test_only_ten_experts_have_names_to_be_saved_and_loaded_under(use, tmp_path):
    save_experts(make_model(n_layers=1), tmp_path)
    model = make_model(n_experts=3, n_layers=1)
    before = snapshot(model)
    with pytest.raises(ValueError, match="3 experts"):
        use(model, tmp_path)
    assert not changed(model, before)


def settings(name, **changes):
    """Returns a function that changes settings in a folder's JSON file."""
    def change(folder):
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | changes))
    return change


def tensors(name, edit):
    """Returns a function that changes the tensors in a folder's safetensors file: edit({name: tensor})."""
    def change(folder):
        state = load_file(folder / name)
        edit(state)
        (folder / name).unlink()
        save_file(state, folder / name)
    return change


def cut(name, part):
    """Returns a function that keeps only the beginning of a folder's file."""
    def change(folder):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:int(part * len(content))])
    return change


SPOILT = EXPERTS[6]  # not the first: the experts read before it must not have been filled in either
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TENSOR = "base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"


def other_model(**changes):
    """Returns a function that saves another model's experts over all ten."""
    return lambda folder: save_experts(make_model(**({"n_layers": 1} | changes)), folder.parent)


# Fields of PEFT's LoraConfig, with values that are not their defaults: those that leave the adapter as it is, and those
# under which PEFT computes something else, or may.
HARMLESS = {
    "task_type": "CAUSAL_LM", "auto_mapping": {"parent_library": "x"}, "peft_version": "9", "revision": "main",
    "base_model_name_or_path": "elsewhere", "inference_mode": False, "runtime_config": {"ephemeral_gpu_offload": True},
    "lora_dropout": 0.5, "ensure_weight_tying": True, "layers_pattern": "layers", "megatron_core": "megatron.core",
    "qalora_group_size": 32, "loftq_config": {"loftq_bits": 4}, "eva_config": {"rho": 2.0},
    "corda_config": {"corda_method": "ipm"}, "lora_ga_config": {"scale": "unit"}}
HARMFUL = {
    "exclude_modules": ["lm_head"], "modules_to_save": ["lm_head"], "layers_to_transform": [0],
    "megatron_config": {"width": 64}, "trainable_token_indices": [5], "velora_config": {"num_groups": 64},
    "alora_invocation_tokens": [1, 2], "use_qalora": True, "monteclora_config": {"num_samples": 8},
    "layer_replication": [[0, 1]], "lora_bias": True, "target_parameters": ["weight"], "use_bdlora": {"nblocks": 2},
    "arrow_config": {"top_k": 3}, "kasa_config": {"beta": 1e-4}, "use_dora": True, "use_rslora": True,
    "fan_in_fan_out": True, "bias": "lora_only", "rank_pattern": {"q_proj": 4}, "alpha_pattern": {"q_proj": 4},
    "peft_type": "ADALORA", "r": 9, "lora_alpha": 17, "target_modules": ["q_proj"], "init_lora_weights": "pissa",
    "a_field_of_a_later_peft": 0.5}
REFUSALS = {  # what is wrong: how it comes about, and what the message names
    "rank": (settings(CONFIG, r=4), [SPOILT, CONFIG, "r is 4", "expected 8"]),
    "alpha": (settings(CONFIG, lora_alpha=32), [SPOILT, CONFIG, "lora_alpha is 32", "expected 16"]),
    "no alpha": (settings(CONFIG, lora_alpha=None), [SPOILT, CONFIG, "lora_alpha is 8"]),  # the default of PEFT
    "fewer targets": (settings(CONFIG, target_modules=["q_proj", "v_proj"]), [SPOILT, CONFIG, "target_modules"]),
    "no targets": (settings(CONFIG, target_modules=None), [SPOILT, CONFIG, "target_modules"]),
    "a pattern": (settings(CONFIG, target_modules="all-linear"), [SPOILT, CONFIG, "target_modules is 'all-linear'"]),
    "DoRA": (settings(CONFIG, use_dora=True), [SPOILT, CONFIG, "use_dora is True"]),
    "rsLoRA": (settings(CONFIG, use_rslora=True), [SPOILT, CONFIG, "use_rslora is True"]),
    "transposed": (settings(CONFIG, fan_in_fan_out=True), [SPOILT, CONFIG, "fan_in_fan_out is True"]),
    "biases": (settings(CONFIG, bias="all"), [SPOILT, CONFIG, "bias is 'all'"]),
    "another kind": (settings(CONFIG, peft_type="LOHA"), [SPOILT, CONFIG, "peft_type is 'LOHA'"]),
    "no kind": (settings(CONFIG, peft_type=""), [SPOILT, CONFIG, "peft_type is ''"]),
    "layer 0": (settings(CONFIG, layers_to_transform=0), [SPOILT, CONFIG, "layers_to_transform is 0", "without"]),
    "ranks by layer": (settings(CONFIG, rank_pattern={"q_proj": 4}), [SPOILT, CONFIG, "rank_pattern"]),
    "alphas by layer": (settings(CONFIG, alpha_pattern={"q_proj": 4}), [SPOILT, CONFIG, "alpha_pattern"]),
    "another run's rank": (other_model(rank=4, alpha=8), [EXPERTS[0], CONFIG, "r is 4", "expected 8"]),
    "another run's alpha": (other_model(alpha=8), [EXPERTS[0], CONFIG, "lora_alpha is 8", "expected 16"]),
    "another base's width": (other_model(hidden_dim=72), [EXPERTS[0], WEIGHTS, "_proj.lora_", "72", "80"]),
    "another base's depth": (other_model(n_layers=2), [EXPERTS[0], WEIGHTS, "unexpected", "model.layers.1."]),
    "a tensor's shape": (tensors(WEIGHTS, lambda state: state.update({TENSOR: state[TENSOR].T.contiguous()})),
                         [SPOILT, WEIGHTS, TENSOR, "(8, 80)", "(80, 8)"]),
    "a missing tensor": (tensors(WEIGHTS, lambda state: state.pop(TENSOR)), [SPOILT, WEIGHTS, "missing", TENSOR]),
    "an extra tensor": (tensors(WEIGHTS, lambda state: state.update({"lm_head.weight": torch.zeros(1)})),
                        [SPOILT, WEIGHTS, "unexpected", "lm_head.weight"]),
    "a missing expert": (shutil.rmtree, [SPOILT, CONFIG, "no such file"]),
    "a missing file": (lambda folder: (folder / WEIGHTS).unlink(), [SPOILT, WEIGHTS]),
    "half of the tensors": (cut(WEIGHTS, 0.5), [SPOILT, WEIGHTS]),
    "an empty file": (cut(WEIGHTS, 0), [SPOILT, WEIGHTS]),
    "half of the settings": (cut(CONFIG, 0.5), [SPOILT, CONFIG, "JSON"]),
    "only a pickle": (lambda folder: (folder / WEIGHTS).rename(folder / "adapter_model.bin"),
                      [SPOILT, "pickled weights (adapter_model.bin)", "save_pretrained", "peft"]),
    "a folder instead of tensors": (lambda folder: [(folder / WEIGHTS).unlink(), (folder / WEIGHTS).mkdir()],
                                    [SPOILT, WEIGHTS, "cannot be read"]),
} | {f"{key} set": (settings(CONFIG, **{key: value}), [SPOILT, CONFIG, f"{key} is {value!r}", "expected"])
     for key, value in HARMFUL.items()
} | {f"start {start}": (settings(CONFIG, init_lora_weights=start),
                       [SPOILT, CONFIG, f"init_lora_weights is '{start}'", "weight_conversion"])
     for start in ("pissa_niter_16", "olora", "corda", "loftq", "lora_ga", "a later one")}


@pytest.mark.parametrize("case", REFUSALS)
def test_experts_that_do_not_fit_are_refused_by_name_and_nothing_is_changed(case, tmp_path):
    spoil, named = REFUSALS[case]
    save_experts(make_model(seed=2, n_layers=1), tmp_path)
    spoil(tmp_path / SPOILT)
    model = make_model(n_layers=1)
    before = snapshot(model)
    with pytest.raises(UserError) as refusal:
        load_experts(model, tmp_path)
    assert all(part in str(refusal.value) for part in named), refusal.value
    assert not changed(model, before)


def test_settings_that_leave_an_adapter_as_it_is_or_are_empty_are_taken(tmp_path):
    saved, model = make_model(seed=2, n_layers=1), make_model(n_layers=1)
    save_experts(saved, tmp_path)
    for value in (None, False, [], {}, ""):
        empty = {key: value for key in HARMFUL if key not in ("r", "lora_alpha", "target_modules", "peft_type")}
        settings(CONFIG, **HARMLESS, **empty)(tmp_path / SPOILT)
        random_B(model)
        load_experts(model, tmp_path)
        assert not changed(model, snapshot(model) | {name: saved.state_dict()[name] for name in expert_names(model)})


def test_the_tables_have_every_field_of_peft():
    """Fails when a newer PEFT has a field that nobody has looked at. load_experts refuses such a field if it is set."""
    peft = pytest.importorskip("peft")
    assert {field.name for field in fields(peft.LoraConfig)} <= HARMLESS.keys() | HARMFUL.keys()
    assert not HARMLESS.keys() & HARMFUL.keys()


# ----------------------------------------------------------------------------------------------------------------------
# One gate merged

@FAMILIES
def test_merged_weights_are_new_tensors_under_the_public_names(changes):
    model, gate = make_model(**changes), make_gate()
    before = snapshot(model)
    state = dict(merged_tensors(model, gate))
    assert state.keys() == Transformer(model.config).state_dict().keys()
    targets = {f"{name}.weight" for name in expert_layers(model)}
    assert {name for name in state if not torch.equal(state[name], before[name])} == targets
    for name in targets:
        state[name].zero_()
    assert not changed(model, before)


def test_merged_weights_of_a_bf16_base_are_rounded_once():
    """Then no weight is further than half a step of bf16 from the exact sum. 1e-6 allows for the fp32 sums."""
    model, gate = make_base(torch.bfloat16), make_gate()
    add_experts(model)
    state = dict(merged_tensors(random_B(model), gate))
    for name, layer in expert_layers(model).items():
        exact = layer.weight.double() + sum(
            SCALE * w * layer.B[e].double().T @ layer.A[e].double() for e, w in enumerate(gate.double()))
        _, exponent = torch.frexp(exact)  # |exact| in [2^(k-1), 2^k): the step is 2^(k-8)
        merged = state[f"{name}.weight"]
        assert merged.dtype == torch.bfloat16
        assert ((merged.double() - exact).abs() <= torch.exp2(exponent.double() - 9) + 1e-6).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_merging_experts_that_do_nothing_keeps_every_bit(dtype):
    """Each tensor has its own dtype, and fp64 is not rounded on the way."""
    model = make_base(dtype)
    for p in model.parameters():
        p.data *= 1 + 2**-40  # no fp32 number
    model.model.norm.float()
    before = snapshot(model)
    add_experts(model)
    state = dict(merged_tensors(model, make_gate()))
    assert all(t.dtype == before[n].dtype and torch.equal(t, before[n]) for n, t in state.items())
    assert state["model.norm.weight"].dtype == torch.float32


def test_experts_are_not_merged_into_weights_in_8_bits():
    with pytest.raises(ValueError, match="load the full weights to merge"):
        dict(merged_tensors(in_8_bits(make_model()), make_gate()))


@pytest.mark.parametrize("gate", [make_gate(), make_gate(1), make_gate().tolist(), make_gate(dtype=torch.float64)],
                         ids=["(E,)", "(1, E)", "a list", "fp64"])
def test_one_gate_may_be_given_with_or_without_a_batch_dimension(gate):
    flat = lora.one_gate(make_model(), gate)
    assert flat.shape == (10,) and not flat.requires_grad
    assert torch.equal(flat.float(), make_gate())


@pytest.mark.parametrize("shape", [(), (9,), (11,), (2, 10), (10, 1), (2, 5)], ids=str)
def test_a_gate_of_another_shape_is_refused(shape, tmp_path):
    """(2, 5) has ten numbers too, and (10, 1) may be the first column of a batch of ten gates."""
    model, gate = make_model(n_layers=1), torch.full(shape, 0.1)
    for use in (lambda: dict(merged_tensors(model, gate)), lambda: export_mixture(model, gate, tmp_path / "mixture")):
        with pytest.raises(ValueError, match="shape"):
            use()
    assert not (tmp_path / "mixture").exists()
