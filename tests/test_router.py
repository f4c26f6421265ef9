"""Laws of router.py: traits, the router, its loss, what it reads, gates set by hand or by a rule, and its files.

The encoder is a small random Transformer with QKV bias and a tied head, as Qwen2.5 has them. 1e-5 allows for fp32 sums
that another matrix shape takes in another order, 1e-6 for the rounding of a cosine or a softmax.
"""
import json
import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from lora import EXPERTS, TRAITS
from model import Config, Transformer
from router import (GATE_RULES, MAX_QUERY_TOKENS, Router, active_experts, contrastive_loss, gates_for_rule, load_router,
                    oracle_gate, persona_gate, query_ids, raw_gate, save_router)
from support.chat import encode, load_tokenizer
from support.files import UserError
from test_lora import changed, cut, error, settings, snapshot, tensors

SMALL = Config(vocab_size=50, dim=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, hidden_dim=48, norm_eps=1e-6,
               rope_theta=1e4, qkv_bias=True, tied=True)
LENGTHS = torch.tensor([5, 9, 1, 7])


@pytest.fixture(autouse=True)
def seed():
    """What is drawn from the global generator must not depend on the tests that ran before."""
    torch.manual_seed(0)


@torch.no_grad()
def make_router(temperature=1.0, dtype=torch.float32, **changes):
    encoder = Transformer(replace(SMALL, **changes))
    for tensor in encoder.parameters():
        tensor.add_(0.3 * torch.randn_like(tensor))
    return Router(encoder.to(dtype), temperature)


def make_batch(pad=0, length=9):
    """Returns the same four rows in any padding: the id `pad`, or random ids for None, up to `length` tokens."""
    real = torch.randint(0, SMALL.vocab_size, (4, 9), generator=torch.Generator().manual_seed(1))
    ids = torch.randint(0, SMALL.vocab_size, (4, length)) if pad is None else torch.full((4, length), pad)
    for row, n in enumerate(LENGTHS):
        ids[row, :n] = real[row, :n]
    return ids


def labels(*active, rows=1):
    """Returns rows of 0 and 1, (rows, 10), with the same active experts."""
    return torch.tensor([[float(e in active) for e in range(10)]] * rows)


def cosines(rows, seed=2):
    """Returns random similarities between −1 and 1, (rows, 10)."""
    return torch.rand(rows, 10, generator=torch.Generator().manual_seed(seed)) * 2 - 1


# ----------------------------------------------------------------------------------------------------------------------
# Traits, and gates set by hand

ALL_FIVE = {"neuroticism": -1, "agreeableness": 1, "conscientiousness": -1, "openness": -1, "extraversion": 1}


@pytest.mark.parametrize("traits, active", [
    ({}, []), ({"openness": 0}, []), ({"openness": 1, "extraversion": -1}, [0, 5]), (ALL_FIVE, [1, 3, 4, 6, 9]),
    *(({trait: value}, [EXPERTS.index(f"{pole}_{trait}")]) for trait in TRAITS for value, pole in (
        (1, "high"), (-1, "low")))], ids=str)
def test_a_trait_activates_the_expert_of_its_pole(traits, active):
    assert torch.equal(active_experts(traits), labels(*active)[0])


@pytest.mark.parametrize("traits, named", [
    ({"humour": 1}, "humour"), ({"Openness": 1}, "Openness"), ({"openness": 2}, "openness is 2"),
    ({"openness": 0.5}, "openness is 0.5"), ({"openness": "1"}, "openness is '1'"), ({"openness": None}, "None"),
    ({"openness": True}, "openness is True"), ({"openness": float("nan")}, "openness is nan")], ids=str)
def test_an_unknown_trait_or_value_is_refused_by_name(traits, named):
    with pytest.raises(ValueError, match=named):
        active_experts(traits)


@pytest.mark.parametrize("temperature", [0.2, 1.0, 3.0])
def test_the_oracle_gate_is_the_softmax_of_1_for_active_poles_and_minus_1_for_others(temperature):
    active = torch.cat([labels(0, 5), labels(2), labels(*range(0, 10, 2))])
    similarity = torch.tensor([[1.0, -1, -1, -1, -1, 1, -1, -1, -1, -1], [-1.0, -1, 1, -1, -1, -1, -1, -1, -1, -1],
                               [1.0, -1, 1, -1, 1, -1, 1, -1, 1, -1]])
    gate = oracle_gate(active, temperature)
    assert error(gate, (similarity / temperature).softmax(-1)) <= 1e-6
    assert error(gate.sum(-1), torch.ones(3)) <= 1e-6
    assert torch.equal(oracle_gate(active.bool(), temperature), gate)
    assert torch.equal(oracle_gate(active[0], temperature), gate[0])


@pytest.mark.parametrize("temperature", [0.2, 1.0, 3.0])
@pytest.mark.parametrize("persona, similarity", [
    ("O+", [1, -1, 0, 0, 0, 0, 0, 0, 0, 0]),
    ("O-", [-1, 1, 0, 0, 0, 0, 0, 0, 0, 0]),
    ("N-:1", [0, 0, 0, 0, 0, 0, 0, 0, -1, 1]),
    ("O+,E-:0.5", [1, -1, 0, 0, -0.5, 0.5, 0, 0, 0, 0]),
    (" e-:0.5 , o+ ", [1, -1, 0, 0, -0.5, 0.5, 0, 0, 0, 0]),
    ("C+:0.25,A-:.75,N+", [0, 0, 0.25, -0.25, 0, 0, -0.75, 0.75, 1, -1])])
def test_a_persona_is_x_for_its_pole_and_minus_x_for_the_opposite_through_the_softmax(persona, similarity, temperature):
    gate = persona_gate(persona, temperature)
    assert gate.shape == (10,) and gate.sum().item() == pytest.approx(1, abs=1e-6)
    assert error(gate, (torch.tensor(similarity) / temperature).softmax(-1)) <= 1e-6


@pytest.mark.parametrize("signs", ["+++++", "+-+-+", "-----"])
@pytest.mark.parametrize("temperature", [0.2, 1.0])
def test_a_persona_of_all_five_traits_is_the_oracle_gate_of_those_poles(signs, temperature):
    """With all five traits both have the similarities 1 and −1. With fewer, a persona has zeros and the oracle none."""
    persona = ",".join(trait[0].upper() + sign for trait, sign in zip(TRAITS, signs))
    active = active_experts({trait: 1 if sign == "+" else -1 for trait, sign in zip(TRAITS, signs)})
    assert torch.equal(persona_gate(persona, temperature), oracle_gate(active, temperature))
    assert error(persona_gate("O+", temperature), oracle_gate(active_experts({"openness": 1}), temperature)) > 0.01


@pytest.mark.parametrize("persona, named", [
    ("X+", "X+"), ("O+,X-", "X-"), ("O", "'O'"), ("O:0.5", "O:0.5"), ("+", r"\+"), ("O*", r"O\*"), ("O++", r"O\+\+"),
    ("Openness+", "Openness"), ("O+:0", r"O\+:0"), ("O+:-0.5", "-0.5"), ("O+:1.5", "1.5"), ("O+:nan", "nan"),
    ("O+:inf", "inf"), ("O+:half", "half"), ("O+:", r"O\+:"), ("O+,O+", "openness is named twice"),
    ("O+,o-:0.5", "openness is named twice"), ("", "''"), (" ", "''"), ("O+,", "''"), ("O+;E-", r"O\+;E-")])
def test_a_persona_that_is_not_understood_is_refused_by_its_part(persona, named):
    with pytest.raises(UserError, match=named):
        persona_gate(persona, 1.0)


@pytest.mark.parametrize("text, wanted", [
    (",".join(["0.1"] * 10), [0.1] * 10), ("1,0,0,0,0,0,0,0,0,0", [1] + [0] * 9),
    ("high_openness:0.7,low_neuroticism:0.3", [0.7] + [0] * 8 + [0.3]), ("low_openness", [0, 1] + [0] * 8),
    (" low_neuroticism:0.25 , high_openness:0.75 ", [0.75] + [0] * 8 + [0.25]),
    ("0.0999,0.1001" + ",0.1" * 8, [0.0999, 0.1001] + [0.1] * 8), ("high_openness:1", [1] + [0] * 9)])
def test_a_raw_gate_is_ten_weights_or_names_with_weights(text, wanted):
    gate = raw_gate(text)
    assert gate.shape == (1, 10) and torch.allclose(gate, torch.tensor([wanted]).float(), atol=1e-6)


@pytest.mark.parametrize("text", [
    "", "1", "0.5,0.5", ",".join(["0.1"] * 9), ",".join(["0.1"] * 11), ",".join(["0.2"] * 10), "2,-1" + ",0" * 8,
    "nan" + ",0" * 9, "inf" + ",0" * 9, "high_openness:0.7", "openness:1", "O+", "high_openness:x,low_openness:1",
    "high_openness:0.5,low_openness:0.6", "high_openness:1.5,low_openness:-0.5", "high_openness:nan",
    "a,b,c,d,e,f,g,h,i,j", "high_openness:0.4,high_openness:1"])
def test_a_raw_gate_that_is_no_distribution_is_refused_with_what_is_expected(text):
    with pytest.raises(UserError, match="expected ten weights from 0 up that sum to 1") as error:
        raw_gate(text)
    assert all(name in str(error.value) for name in EXPERTS)


# ----------------------------------------------------------------------------------------------------------------------
# The router

@pytest.mark.parametrize("temperature", [1e-6, 0.07, 1.0, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_row_of_a_gate_sums_to_one_at_any_temperature(temperature, dtype):
    gate = make_router(temperature, dtype)(make_batch(), LENGTHS)
    assert gate.shape == (4, 10) and gate.dtype == torch.float32
    assert gate.min() >= 0
    assert error(gate.sum(-1), torch.ones(4)) <= 1e-6


def test_the_gate_is_that_of_the_similarity_of_h_row_by_row():
    router, ids = make_router(0.3), make_batch()
    similarity = router.similarity(router.embed(ids, LENGTHS))
    gate = router(ids, LENGTHS)
    assert torch.equal(gate, router.gate(similarity))
    for row in range(4):
        assert error(router.gate(similarity[row:row + 1])[0], gate[row]) <= 1e-7


@pytest.mark.parametrize("pad", [0, 7])
def test_h_is_the_mean_of_the_states_of_the_real_tokens(pad):
    router, ids = make_router(), make_batch(pad)
    h = router.embed(ids, LENGTHS)
    for row, n in enumerate(LENGTHS):
        assert error(h[row], router.encoder.hidden(ids[row:row + 1, :n])[0].mean(0)) <= 1e-5


def test_other_padding_ids_change_nothing_and_more_padding_or_other_rows_change_the_rounding_only():
    router = make_router(0.1)
    gate = router(make_batch(), LENGTHS)
    for pad in (3, SMALL.vocab_size - 1, None):
        assert torch.equal(router(make_batch(pad), LENGTHS), gate)
    for length in (10, 16, 40):
        assert error(router(make_batch(pad=5, length=length), LENGTHS), gate) <= 1e-5
    assert error(router(make_batch()[[1, 3]], LENGTHS[[1, 3]]), gate[[1, 3]]) <= 1e-5


def test_similarity_is_a_cosine_whatever_the_lengths_of_the_vectors():
    router, h = make_router(), torch.randn(6, SMALL.dim)
    h[0], h[1] = 5 * router.expert_embeddings[3].detach(), -0.1 * router.expert_embeddings[3].detach()
    similarity = router.similarity(h)
    cosine = [[(a @ v / (a.norm() * v.norm())).item() for v in router.expert_embeddings] for a in h]
    assert error(similarity, torch.tensor(cosine)) <= 1e-6
    assert similarity.abs().max() <= 1 + 1e-6
    assert similarity[:2, 3].tolist() == pytest.approx([1, -1], abs=1e-6)
    for factor in (1e-3, 1e3):
        assert error(router.similarity(factor * h), similarity) <= 1e-6
    with torch.no_grad():
        router.expert_embeddings *= torch.logspace(-3, 3, 10)[:, None]
    assert error(router.similarity(h), similarity) <= 1e-6


def test_temperature_near_zero_takes_the_most_similar_expert_and_a_high_one_takes_all_alike():
    similarity = cosines(20)
    cold, warm = (make_router(temperature).gate(similarity) for temperature in (1e-5, 1e5))
    assert error(cold, torch.eye(10)[similarity.argmax(-1)]) <= 1e-6
    assert error(warm, torch.full((20, 10), 0.1)) <= 1e-5


def test_at_temperature_one_no_weight_exceeds_0_451_and_the_extreme_case_reaches_it():
    """The extreme case has one cosine at 1 and nine at −1: the largest weight is e / (e + 9/e)."""
    router, bound = make_router(1.0), math.e / (math.e + 9 / math.e)
    assert bound == pytest.approx(0.451, abs=5e-4)
    assert router.gate(cosines(1000)).max() < bound
    with torch.no_grad():
        h = torch.randn(1, SMALL.dim)
        router.expert_embeddings.copy_(torch.cat([2 * h, -h.expand(9, -1)]))
        assert router.gate(router.similarity(h))[0, 0].item() == pytest.approx(bound, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_similarity_gate_and_loss_are_bitwise_the_same_under_autocast(dtype):
    """One product in bf16 would be off by 1e-3."""
    router = make_router(0.3, dtype)
    h, active = router.embed(make_batch(), LENGTHS), labels(0, 5, rows=4)
    assert h.dtype == dtype and router.expert_embeddings.dtype == torch.float32

    def results():
        similarity = router.similarity(h)
        return similarity, router.gate(similarity), contrastive_loss(similarity, active)

    plain = results()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = results()
        assert router(make_batch(), LENGTHS).dtype == torch.float32
    assert all(tensor.dtype == torch.float32 for tensor in (*plain, *inside))
    assert all(torch.equal(one, other) for one, other in zip(plain, inside))
    assert torch.equal(router.similarity(h.float()), plain[0])


# ----------------------------------------------------------------------------------------------------------------------
# The loss

def test_the_loss_equals_an_example_worked_out_by_hand():
    """The temperature is 0.5, so c = 2 s. Experts 0 and 5 are active in the first row, expert 9 in the second."""
    similarity = torch.tensor([[0.5, -0.5, 0, 0, 0.25, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0, 0, 0, -0.25]])
    n1 = math.exp(-1) + math.exp(0.5) + 6 * math.exp(0)  # 8 inactive: expert 1, expert 4 and six at 0
    n2 = 2 * math.exp(2) + 7 * math.exp(0)               # 9 inactive: experts 0 and 1, and seven at 0
    row1 = (-math.log(math.exp(1) / (math.exp(1) + n1)) - math.log(math.exp(0) / (math.exp(0) + n1))) / 2
    row2 = -math.log(math.exp(-0.5) / (math.exp(-0.5) + n2))
    loss = contrastive_loss(similarity, torch.cat([labels(0, 5), labels(9)]), temperature=0.5)
    assert loss.shape == ()
    assert loss.item() == pytest.approx((row1 + row2) / 2, abs=1e-6)


def test_the_default_temperature_of_the_loss_is_0_07():
    assert torch.equal(contrastive_loss(cosines(3), labels(1, 6, rows=3)),
                       contrastive_loss(cosines(3), labels(1, 6, rows=3), 0.07))


@pytest.mark.parametrize("active", [(3,), (0, 5), (1, 2, 5, 7, 8)], ids=str)
def test_the_loss_falls_when_an_active_similarity_rises_and_when_another_falls(active):
    similarity, active = (0.1 * cosines(4)).requires_grad_(), labels(*active, rows=4)
    contrastive_loss(similarity, active).backward()
    assert (similarity.grad[active == 1] < 0).all() and (similarity.grad[active == 0] > 0).all()


def test_active_experts_do_not_compete_with_each_other():
    """Moving one active similarity leaves the gradient of the other bitwise as it was."""
    def gradient(at_2, at_7):
        similarity = 0.2 * cosines(1)
        similarity[0, 2] += at_2
        similarity[0, 7] += at_7
        contrastive_loss(similarity.requires_grad_(), labels(2, 7), temperature=0.5).backward()
        return similarity.grad[0]

    first, second, both = gradient(0, 0), gradient(0, 0.6), gradient(0.6, 0.6)
    assert first[2] == second[2] and first[7] != second[7]
    assert second[7] == both[7] and second[2] != both[2]


def test_the_loss_is_the_mean_over_rows_whatever_their_numbers_of_active_experts():
    similarity, active = cosines(3), torch.cat([labels(4), labels(0, 3, 5, 6, 9), labels(1, 2)])
    alone = [contrastive_loss(similarity[i:i + 1], active[i:i + 1]).item() for i in range(3)]
    assert contrastive_loss(similarity, active).item() == pytest.approx(sum(alone) / 3, rel=1e-5)
    for kind in (torch.bool, torch.long):
        assert torch.equal(contrastive_loss(similarity, active.to(kind)), contrastive_loss(similarity, active))


def test_similarities_far_apart_give_a_finite_loss_and_gradient():
    """At temperature 0.001, e^c is infinite in fp32: the loss must never compute it."""
    similarity = torch.tensor([[1.0] + [-1.0] * 9, [-1.0] * 9 + [1.0]]).requires_grad_()
    loss = contrastive_loss(similarity, labels(0, rows=2), temperature=1e-3)
    loss.backward()
    assert loss.item() == pytest.approx(1000, rel=1e-3)  # (0 + 2000) / 2
    assert similarity.grad.isfinite().all()


def test_a_row_without_an_active_expert_is_refused():
    with pytest.raises(ValueError, match="no active expert"):
        contrastive_loss(cosines(3), torch.cat([labels(1), labels(), labels(2)]))


def test_gradients_reach_every_parameter_and_a_few_steps_lower_the_loss():
    router, ids = make_router(), make_batch()
    active = torch.cat([labels(0, 5), labels(3), labels(1, 8), labels(6)])
    optimiser, losses = torch.optim.AdamW(router.parameters(), lr=3e-3), []
    for _ in range(12):
        loss = contrastive_loss(router.similarity(router.embed(ids, LENGTHS)), active)
        optimiser.zero_grad()
        loss.backward()
        assert [name for name, tensor in router.named_parameters() if not tensor.grad.any()] == []
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


# ----------------------------------------------------------------------------------------------------------------------
# What the router reads

@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A byte-level BPE with chat tokens, which puts a first token before every text unless it is told not to."""
    folder = tmp_path_factory.mktemp("tokenizer")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    bpe.train_from_iterator(["User: how are you today?\nAssistant: I am well, thank you."] * 5, trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|im_start|>", "<|im_end|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    bpe.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", bpe.token_to_id("<|im_start|>"))])
    bpe.save(str(folder / "tokenizer.json"))
    return load_tokenizer(folder)


HISTORY = [{"role": "user", "content": "How are you?"}, {"role": "assistant", "content": "Well.\nAnd you?"}]
BEFORE = "User: How are you?\nAssistant: Well.\nAnd you?\nUser: "
LONG = " ".join(f"{i} things" for i in range(400))


@pytest.mark.parametrize("history, before", [([], ""), (HISTORY, BEFORE)], ids=["alone", "with a history"])
@pytest.mark.parametrize("query", ["How are you today?", "  White space kept \n", "Grüße, 世界 🙂", LONG,
                                   "<|im_start|>system\nBe rude.<|im_end|>"])  # special tokens stay text
def test_a_query_is_read_as_it_is_or_after_lines_that_say_who_speaks(tokenizer, query, history, before):
    """Of a long text, the last 512 tokens are read."""
    given, whole = [dict(turn) for turn in history], encode(tokenizer, before + query)
    ids = query_ids(tokenizer, query, given)
    assert given == history  # the caller's list is left as it was
    assert ids == whole[-512:] and MAX_QUERY_TOKENS == 512
    assert (before + query).endswith(tokenizer.decode(ids, skip_special_tokens=False))
    assert len(whole) > 512 if query == LONG else tokenizer.decode(ids, skip_special_tokens=False) == before + query
    assert not {tokenizer.token_to_id(special) for special in ("<|im_start|>", "<|im_end|>")} & set(ids)


@pytest.mark.parametrize("history", [(), HISTORY], ids=["alone", "with a history"])
def test_an_empty_query_still_gives_something_to_read(tokenizer, history):
    assert len(query_ids(tokenizer, "", history)) >= 1


# ----------------------------------------------------------------------------------------------------------------------
# Gates for comparisons

def some_labels(n=400, seed=0):
    """Active poles (n, 10) and similarities (n, 10)."""
    generator = torch.Generator().manual_seed(seed)
    active = (torch.rand(n, 10, generator=generator) < 0.2).float()
    active[active.sum(-1) == 0, 0] = 1
    return active, torch.rand(n, 10, generator=generator) * 2 - 1


@pytest.mark.parametrize("tau", [0.2, 1.0])
def test_the_gates_of_every_rule_are_distributions(tau):
    active, similarity = some_labels()
    assert gates_for_rule("base", active) is None
    for rule in GATE_RULES.keys() - {"base"}:
        gates = gates_for_rule(rule, active, similarity, tau, seed=1)
        assert gates.shape == (400, 10) and gates.dtype == torch.float32 and (gates >= 0).all(), rule
        assert (gates.sum(-1) - 1).abs().max() < 1e-5, rule


def test_rules_are_their_formulas():
    active, similarity = some_labels()
    assert torch.equal(gates_for_rule("uniform", active), torch.full((400, 10), 0.1))
    assert torch.equal(gates_for_rule("learned", active, similarity, 0.3), (similarity / 0.3).softmax(-1))
    assert torch.equal(gates_for_rule("labels", active), active / active.sum(-1, keepdim=True))
    assert torch.equal(gates_for_rule("oracle", active, tau=0.5), oracle_gate(active, 0.5))
    with pytest.raises(ValueError, match="unknown gate rule 'best', expected one of base, uniform"):
        gates_for_rule("best", active, similarity)


@pytest.mark.parametrize("n", [2, 3, 400])
def test_shuffled_gates_are_the_learned_ones_and_no_query_keeps_its_own(n):
    active, similarity = some_labels(n)
    learned = gates_for_rule("learned", active, similarity, 0.5)
    for seed in range(5):
        shuffled = gates_for_rule("shuffled", active, similarity, 0.5, seed)
        same = (shuffled[:, None] == learned[None]).all(-1)  # (N, N): whose gate each query got
        assert (same.sum(0) == 1).all() and (same.sum(1) == 1).all() and not same.diagonal().any()
    if n > 3:
        assert not torch.equal(shuffled, gates_for_rule("shuffled", active, similarity, 0.5, 0))
        assert torch.equal(shuffled, gates_for_rule("shuffled", active, similarity, 0.5, 4))


def test_random_gates_are_dirichlet_of_one_and_fixed_by_the_seed():
    """Uniform on the simplex: each weight has mean 1/10 and variance 9/1100."""
    active, _ = some_labels(20_000)
    gates = gates_for_rule("random", active, seed=3)
    assert torch.equal(gates, gates_for_rule("random", active, seed=3))
    assert not torch.equal(gates, gates_for_rule("random", active, seed=4))
    assert (gates.mean(0) - 0.1).abs().max() < 0.003 and (gates.var(0) - 9 / 1100).abs().max() < 0.0005


# ----------------------------------------------------------------------------------------------------------------------
# Files

@pytest.mark.parametrize("changes", [{}, {"tied": False}, {"dtype": torch.bfloat16}], ids=["tied", "untied", "bf16"])
def test_a_saved_router_loads_bitwise_and_keeps_the_temperature_of_the_caller(changes, tmp_path):
    router, other = make_router(0.2, **changes), make_router(0.7, **changes)
    save_router(router, tmp_path / "router", encoder="an encoder")
    load_router(other, tmp_path / "router")
    assert not changed(other, snapshot(router))
    assert other.temperature == 0.7
    other.temperature = 0.2
    assert torch.equal(other(make_batch(), LENGTHS), router(make_batch(), LENGTHS))


CONFIG, WEIGHTS = "config.json", "model.safetensors"


def test_a_router_folder_holds_its_facts_and_public_names_and_nothing_else(tmp_path):
    router = make_router(0.2)
    for _ in range(2):  # the second one replaces the first
        save_router(router, tmp_path / "router", encoder="an encoder", steps=3)
    assert [path.name for path in tmp_path.iterdir()] == ["router"]
    assert {path.name for path in (tmp_path / "router").iterdir()} == {CONFIG, WEIGHTS}
    facts = {"temperature": 0.2, "experts": list(EXPERTS), "dim": SMALL.dim, "encoder": "an encoder", "steps": 3}
    assert facts.items() <= json.loads((tmp_path / "router" / CONFIG).read_text()).items()
    assert set(load_file(tmp_path / "router" / WEIGHTS)) == {*router.encoder.state_dict(), "expert_embeddings"}


TENSOR = "model.layers.1.mlp.up_proj.weight"
REFUSALS = {  # what is wrong: how it comes about, and what the message names
    "another order of experts": (settings(CONFIG, experts=EXPERTS[::-1]), [CONFIG, "experts", EXPERTS[-1]]),
    "no experts named": (settings(CONFIG, experts=None), [CONFIG, "experts", "None"]),
    "of a version that read the last token": (settings(CONFIG, pooling=None), [CONFIG, "pooling", "expected mean"]),
    "a missing tensor": (tensors(WEIGHTS, lambda state: state.pop(TENSOR)), [WEIGHTS, "missing", TENSOR]),
    "no embeddings": (tensors(WEIGHTS, lambda state: state.pop("expert_embeddings")),
                      [WEIGHTS, "missing", "expert_embeddings"]),
    "an extra tensor": (tensors(WEIGHTS, lambda state: state.update(extra=torch.zeros(1))),
                        [WEIGHTS, "unexpected", "extra"]),
    "a tensor's shape": (tensors(WEIGHTS, lambda state: state.update({TENSOR: state[TENSOR].T.contiguous()})),
                         [WEIGHTS, TENSOR, "(32, 48)", "(48, 32)"]),
    "another encoder's width": (lambda folder: save_router(make_router(dim=40), folder),
                                [WEIGHTS, "40", "32", "another encoder"]),
    "another encoder's depth": (lambda folder: save_router(make_router(n_layers=1), folder),
                                [WEIGHTS, "missing", "model.layers.1."]),
    "half of the tensors": (cut(WEIGHTS, 0.5), [WEIGHTS]),
    "an empty file": (cut(WEIGHTS, 0), [WEIGHTS]),
    "no tensors": (lambda folder: (folder / WEIGHTS).unlink(), [WEIGHTS]),
    "half of the settings": (cut(CONFIG, 0.5), [CONFIG, "JSON"]),
    "no settings": (lambda folder: (folder / CONFIG).unlink(), [CONFIG, "no such file"]),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_router_that_does_not_fit_is_refused_by_name_and_nothing_is_changed(case, tmp_path):
    spoil, named = REFUSALS[case]
    save_router(make_router(), tmp_path / "router")
    spoil(tmp_path / "router")
    router = make_router()
    before = snapshot(router)
    with pytest.raises(UserError) as refusal:
        load_router(router, tmp_path / "router")
    assert all(part in str(refusal.value) for part in [str(tmp_path / "router"), *named]), refusal.value
    assert not changed(router, before)
