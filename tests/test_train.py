"""Laws of training: what a step computes, what it changes, and that a stopped and resumed run is the same run."""
import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import train
from lora import add_experts, expert_layers
from model import Config, Transformer, pad
from router import Router, contrastive_loss, query_ids
from support import checkpoints, compile
from support.chat import Chat
from support.files import UserError
from support.records import messages_of
from support.rows import Row, batches, make_rows, micro_batches, n_tokens, rehearsed
from test_chat import TEMPLATES, make_folder
from train import Stage, evaluation_loss, learning_rate_factor, row_losses, token_losses

CONFIG = Config(97, 32, 2, 4, 2, 8, 48, 1e-5, 1e4, tied=True)
STAGES = pytest.mark.parametrize("name", ["warmup", "router", "joint"])


def settings(**changes):
    s = dict(steps=6, batch=6, lr=1e-2, router_lr=1e-2, tokens=64, clip=0.5, lam=0.1, contrastive_tau=0.07, seed=0,
             joint_gate="learned", rehearse=0.5, frozen_layers=0, dtype="float32",
             lr_warmup=0.2, save_every=100, keep=2, log_every=1, recompute=False)
    return SimpleNamespace(**s | changes)


def base(dtype=torch.float32, random_B=False):
    torch.manual_seed(1)
    model = Transformer(CONFIG)
    add_experts(model, rank=2, alpha=4)
    for layer in expert_layers(model).values():
        if random_B:
            torch.nn.init.normal_(layer.B, std=0.1)
    return model.to(dtype)


def router():
    torch.manual_seed(2)
    return Router(Transformer(CONFIG))


def new_stage(name, s=None, dtype=torch.float32, random_B=False):
    """A stage with the models that it needs."""
    return Stage(name, base(dtype, random_B) if name != "router" else None,
                 router().to(dtype) if name != "warmup" else None, s or settings())


def some_rows(n, seed=0, experts=range(10)):
    """n rows of random tokens. Each has one active pole, drawn from `experts`."""
    rng, rows = np.random.default_rng(seed), []
    for i in range(n):
        expert = int(rng.choice(list(experts)))
        length = int(rng.integers(4, 24))
        rows.append(Row(f"r{i}", F.one_hot(torch.tensor(expert), 10).float(),
                            rng.integers(0, 97, length).astype(np.int32), int(rng.integers(1, length)),
                            rng.integers(0, 97, int(rng.integers(1, 12))).astype(np.int32), expert))
    return rows


def mixed_rows(n, seed=0):
    """Rows as the router and joint stages have them: none is assigned to an expert."""
    rows = some_rows(n, seed)
    for row in rows:
        row.expert = None
    return rows


def supervised_tokens(rows):
    return sum(n_tokens(row) - row.n_prompt for row in rows)


def snapshot(tensors):
    return [t.detach().clone() for t in tensors]


# ----------------------------------------------------------------------------------------------------------------------
# Rows

RECORDS = [{"id": "a", "query": "  I am sad. \n", "response": " Why? ", "traits": {"openness": 1}},
           {"id": "b", "query": "Hello", "response": "I don't know.", "traits": {"neuroticism": -1},
            "history": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "\n Hello there"}]},
           {"id": "c", "query": "<|im_end|>", "response": "Hello", "traits": {"extraversion": 1}},
           {"id": "d", "query": "Hello", "response": "Be kind.", "traits": {"extraversion": 1}}]


@pytest.mark.parametrize("kind", TEMPLATES)
def test_a_row_holds_what_base_and_encoder_read(kind, tmp_path):
    """Prompt and reply are in the base's chat format, the reply is supervised, and the query is what the router reads.
    Records longer than the limit are left out and counted."""
    chat = Chat.from_dir(make_folder(tmp_path, kind))
    rows, n_long = make_rows(RECORDS, chat, chat.tokenizer)
    assert n_long == 0
    for record, row in zip(RECORDS, rows, strict=True):
        ids, supervised = chat.example(messages_of(record), record["response"])
        assert row.ids.tolist() == ids and row.ids.dtype == np.int32
        assert supervised == [False] * row.n_prompt + [True] * (len(ids) - row.n_prompt)
        assert row.query.tolist() == query_ids(chat.tokenizer, record["query"], record.get("history"))
    lengths = [len(row.ids) for row in rows]
    for limit in (max(lengths), max(lengths) - 1):
        some, n_long = make_rows(RECORDS, chat, None, limit)
        assert [len(row.ids) for row in some] == [n for n in lengths if n <= limit] and n_long == 4 - len(some)


# ----------------------------------------------------------------------------------------------------------------------
# Losses

@pytest.mark.parametrize("chunk", [1, 3, None])
@pytest.mark.parametrize("trains", [False, True], ids=["frozen head", "trained head"])
def test_token_losses_and_gradients_are_those_of_cross_entropy(chunk, trains):
    model = base().double().requires_grad_(trains)
    hidden = torch.randn(10, 32, requires_grad=True, dtype=torch.float64)
    targets, weight = torch.randint(0, 97, (10,)), torch.rand(10, dtype=torch.float64)
    ours = token_losses(model, hidden, targets, chunk)
    plain = F.cross_entropy(model.head(hidden), targets, reduction="none")
    assert torch.allclose(ours, plain, atol=1e-12) and ours.shape == (10,)
    inputs = [hidden, model.head_weight] if trains else [hidden]
    ours, plain = (torch.autograd.grad((loss * weight).sum(), inputs, retain_graph=True) for loss in (ours, plain))
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(ours, plain))


@pytest.mark.parametrize("chunk, n, size", [(50, 1000, 50), (None, 10_000, 4096)])  # 4096 x 4096 x 4 bytes: 64 MiB
def test_only_one_chunk_of_logits_is_in_memory(chunk, n, size):
    model = Transformer(Config(4096, 32, 1, 2, 1, 16, 48, 1e-5, 1e4)).requires_grad_(False)
    hidden, targets = torch.randn(n, 32, requires_grad=True), torch.randint(0, 4096, (n,))
    with torch.profiler.profile(profile_memory=True) as profile:
        token_losses(model, hidden, targets, chunk).sum().backward()
    largest = max(e.cpu_memory_usage for e in profile.events())
    assert size * 4096 * 4 <= largest < 1.5 * size * 4096 * 4, largest


def test_the_loss_of_a_row_is_the_summed_cross_entropy_of_its_reply():
    """Tokens prompt … len − 1 are predicted, each from the position before it."""
    model, rows = base(random_B=True), some_rows(5)
    gate = torch.rand(5, 10).softmax(-1)
    losses = row_losses(model, rows, gate)
    for i, row in enumerate(rows):
        ids = torch.tensor(row.ids).long()
        logits = model(ids[None], gate[i:i + 1])[0]
        expected = F.cross_entropy(logits[row.n_prompt - 1:-1], ids[row.n_prompt:], reduction="sum")
        assert abs(losses[i] - expected) < 1e-4


def test_a_step_is_the_token_mean_over_all_its_rows_however_it_is_cut():
    """Micro-batches of any size give the gradient of one batch. A mean of micro-batch means would not."""
    rows, found = mixed_rows(12), []
    assert [len(list(micro_batches(rows, tokens))) > 3 for tokens in (24, 64, 10_000)] == [True, True, False]
    for tokens in (24, 64, 10_000):
        stage = new_stage("joint", settings(tokens=tokens, clip=1e9), random_B=True)
        stage.optimizer.step = lambda: found.append([p.grad.clone() for p in stage.parameters()])
        found.append(stage.step(rows)["loss"])
    language, contrastive, _ = new_stage("joint", random_B=True).losses(rows, {None: supervised_tokens(rows)})
    expected = language + 0.1 * contrastive / len(rows)
    for gradient, loss in zip(found[::2], found[1::2]):
        assert abs(loss - expected) < 1e-5
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(gradient, found[0]))


def test_the_joint_loss_is_the_language_loss_plus_lambda_times_the_contrastive_loss():
    rows, stage = mixed_rows(6), new_stage("joint", settings(lam=0.7), random_B=True)
    n = supervised_tokens(rows)
    language, contrastive, gate = stage.losses(rows, {None: n})
    ids, lengths = pad([row.query for row in rows])
    similarity = stage.router.similarity(stage.router.embed(ids, lengths))
    expected = row_losses(stage.model, rows, gate).sum() / n + 0.7 * contrastive_loss(
        similarity, torch.stack([row.active for row in rows]))
    assert torch.allclose(language + 0.7 * contrastive / 6, expected, atol=1e-5)
    assert abs(stage.step(rows)["loss"] - expected.item()) < 1e-5


def test_with_a_uniform_joint_gate_the_language_loss_does_not_depend_on_the_router_which_still_learns():
    rows, model, losses = mixed_rows(6), base(random_B=True), []
    for seed in (0, 1):
        r = router()
        torch.manual_seed(seed)
        torch.nn.init.normal_(r.expert_embeddings)
        stage = Stage("joint", model, r, settings(joint_gate="uniform"))
        losses.append(stage.losses(rows, {None: 10})[0].item())
    assert losses[0] == losses[1]
    before = r.expert_embeddings.detach().clone()
    stage.step(rows)
    assert not torch.equal(before, r.expert_embeddings)


def test_a_rehearsed_row_of_the_joint_stage_goes_through_one_expert_alone():
    rows, stage = mixed_rows(6), new_stage("joint", random_B=True)
    rows[1].expert, rows[4].expert = 3, 8
    gates = new_stage("joint", random_B=True).losses(rows, {None: 10})[2].detach().clone()
    gates[1], gates[4] = torch.eye(10)[3], torch.eye(10)[8]
    language, _, routed = stage.losses(rows, {None: supervised_tokens(rows)})
    expected = row_losses(stage.model, rows, gates).sum() / supervised_tokens(rows)  # one mean over all rows' tokens
    assert torch.allclose(language, expected, atol=1e-5) and not torch.allclose(routed, gates)
    for row, expert in zip(rows, range(6)):
        row.expert = expert
    stage.losses(rows, {None: 10})[0].backward()
    assert not stage.router.expert_embeddings.grad.any()  # these rows teach the router by its own loss only


def test_rehearsal_draws_its_share_of_rows_and_one_of_their_poles_from_the_generator():
    rows = mixed_rows(2000)
    for row in rows:
        row.active = torch.zeros(10).scatter(0, torch.tensor([2, 7]), 1.0)
    found, again = (rehearsed(rows, 0.25, np.random.default_rng(0)) for _ in range(2))
    experts = [row.expert for row in found]
    assert experts == [row.expert for row in again] != [row.expert for row in rehearsed(rows, 0.25,
                                                                                        np.random.default_rng(1))]
    assert all(abs(experts.count(pole) - 250) < 60 for pole in (2, 7)) and set(experts) == {None, 2, 7}
    assert all(row.expert is None for row in rows)
    rng, untouched = np.random.default_rng(0), np.random.default_rng(0)
    assert rehearsed(rows, 0, rng) is rows and rng.random() == untouched.random()  # the order stays the source's


# ----------------------------------------------------------------------------------------------------------------------
# What a step changes

def test_warm_up_of_all_experts_together_equals_warm_up_of_each_alone():
    """Mathematically they are equal. In fp64 they agree to 1e-10 over eight steps, in which experts are sometimes
    absent and gradients are clipped. In fp32 they differ more, since matrix products add in another order."""
    steps = [some_rows(6, seed, (0, 3, 7)) for seed in range(8)]
    steps[2] = [row for row in steps[2] if row.expert != 3]
    steps[0] = [row for row in steps[0] if row.expert != 7]

    def run(experts):
        stage = new_stage("warmup", settings(clip=0.05), torch.float64)
        for i, rows in enumerate(steps):
            mine = [row for row in rows if row.expert in experts]
            if mine:
                stage.step(mine, learning_rate_factor(i, 8, 0.2))
        return snapshot(stage.expert_tensors())

    together, alone = run((0, 3, 7)), {expert: run((expert,)) for expert in (0, 3, 7)}
    for i, start in enumerate(snapshot(new_stage("warmup", dtype=torch.float64).expert_tensors())):
        assert all((together[i][e] - alone[e][i][e]).abs().max() < 1e-10 for e in alone)
        assert torch.equal(together[i][1], start[1])  # an expert without any row has not moved
        assert not torch.equal(together[i][3], start[3])


def test_an_expert_absent_from_a_step_does_not_move_and_counts_no_step():
    stage = new_stage("warmup")
    stage.step(some_rows(6, 0, (2, 5)))
    before = snapshot(stage.expert_tensors())
    stage.step(some_rows(6, 1, (2,)))
    assert all(torch.equal(a[5], b[5]) for a, b in zip(before, stage.expert_tensors()))
    counts = {expert: stage.optimizer.state[view]["step"].item() for expert, _, view in stage.views
              if view in stage.optimizer.state}
    assert counts == {2: 2, 5: 1}


def test_warm_up_clips_the_gradient_of_each_expert_by_its_own_norm():
    stage, gradients = new_stage("warmup", settings(clip=1e-3), random_B=True), {}
    stage.optimizer.step = lambda: gradients.update(
        {e: [view.grad.flatten() for x, _, view in stage.views if x == e and view.grad is not None] for e in range(10)})
    stage.step(some_rows(8, 0, (1, 4)))
    for expert in range(10):
        norm = torch.cat([torch.zeros(1), *gradients[expert]]).norm()
        assert abs(norm - (1e-3 if expert in (1, 4) else 0)) < 1e-5


@STAGES
@pytest.mark.parametrize("frozen_layers", [0, 1, 2])
def test_a_step_changes_what_its_stage_trains_and_leaves_everything_else_bitwise(name, frozen_layers):
    stage = new_stage(name, settings(frozen_layers=frozen_layers), random_B=True)
    trained = {id(t) for t in (stage.expert_tensors() if stage.model else [])}
    frozen = [f"layers.{i}." for i in range(frozen_layers)] + ["embed_tokens"] * (frozen_layers > 0)
    trained |= {id(p) for key, p in (stage.router.named_parameters() if stage.router else [])
                if not any(part in key for part in frozen)}
    parameters = [(key, p) for part in (stage.model, stage.router) if part for key, p in part.named_parameters()]
    before = snapshot(p for _, p in parameters)
    stage.step(some_rows(40))
    for (key, p), was in zip(parameters, before):
        unused = key.endswith("lm_head.weight")
        assert torch.equal(p, was) == (id(p) not in trained or unused), key
    in_optimizer = {p.untyped_storage().data_ptr() for p in stage.parameters()}
    assert in_optimizer == {p.untyped_storage().data_ptr() for _, p in parameters if id(p) in trained}


@STAGES
def test_bfloat16_trains_float32_weights_under_autocast_with_and_without_recomputation(name):
    """These are a GPU's precisions, on a CPU. Without autocast, the router stage would have the loss of fp32."""
    def train(dtype, recompute=False):
        stage = new_stage(name, settings(lr=1e-3, router_lr=1e-3, dtype=str(dtype).removeprefix("torch.")))
        experts = set(stage.expert_tensors()) if stage.model else set()
        for p in stage.model.parameters() if stage.model else ():
            if p not in experts:
                p.data = p.data.to(dtype)  # the frozen base
        for decoder in (stage.model, stage.router and stage.router.encoder):
            if decoder is not None:
                decoder.recompute = recompute
        losses = [stage.step(rows)["loss"].item() for _ in range(8)]
        assert {p.dtype for p in stage.parameters()} == {torch.float32}
        return losses, snapshot(stage.parameters())
    rows = mixed_rows(6) if name != "warmup" else some_rows(6)
    losses, weights = train(torch.bfloat16)
    expected, _ = train(torch.float32)
    assert losses[-1] < losses[0]
    assert 0 < abs(losses[0] - expected[0]) < 0.01 * expected[0]
    again, same_weights = train(torch.bfloat16, recompute=True)
    assert again == losses and all(map(torch.equal, same_weights, weights))


@STAGES
def test_a_step_does_not_wait_for_the_device(name, monkeypatch):
    """Every .item() or the like would make the CPU wait for a GPU. Only the log needs numbers, where it is written."""
    stage = new_stage(name)
    with monkeypatch.context() as patch:
        for method in ("item", "tolist", "cpu", "numpy", "nonzero", "__float__"):
            patch.setattr(torch.Tensor, method, lambda *_, method=method: pytest.fail(f"{method} was called"))
        metrics = stage.step(some_rows(20))
    assert math.isfinite(train.metrics_to_floats(metrics)["loss"])


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("recompute", [False, True])
def test_compiled_layers_train_alike_and_are_not_compiled_again_for_other_lengths(recompute):
    """The first step compiles; then any number of rows of any length needs no other compilation. Parameters are
    compared in fp64, where only the order of sums can differ."""
    from torch._dynamo.utils import counters  # here, since it takes seconds
    torch.compiler.reset()
    counters.clear()
    stages = [new_stage("joint", settings(tokens=10_000), torch.float64, random_B=True) for _ in range(2)]
    for part in (stages[1].model, stages[1].router.encoder):
        part.recompute = recompute
        compile.compile_layers(part)
    try:
        for seed, n in enumerate((6, 3, 2, 9, 5, 12)):
            plain, compiled = (stage.step(mixed_rows(n, seed)) for stage in stages)
            torch.compiler.set_stance("fail_on_recompile")
            assert compiled["loss"].item() == pytest.approx(plain["loss"].item(), rel=1e-6), n
        assert counters["stats"]["unique_graphs"] >= 2, counters  # a layer of the base and one of the encoder
        difference = max((a - b).abs().max() for a, b in zip(*(stage.parameters() for stage in stages)))
        assert difference < 1e-6, difference  # the router's cosines are fp32
    finally:
        torch.compiler.set_stance("default")


def test_compile_without_a_compiler_is_refused(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="C\\+\\+ compiler"):
        compile.compile_layers(base())


# ----------------------------------------------------------------------------------------------------------------------
# The order of the data, and the schedule

def lengths_like_queries(n=700):
    """Lengths of real queries in tokens are about log-normal: median 70, a tail of several hundred."""
    return np.random.default_rng(0).lognormal(4.3, 0.7, n).clip(5, 512).astype(int).tolist()


@pytest.mark.parametrize("batch, tokens", [(16, 2048), (128, 8192)])
def test_less_than_five_percent_of_the_tokens_are_padding(batch, tokens):
    """In the second case a step holds a fifth of all rows. Their lengths differ more, so it is cut into more parts."""
    lengths, real, padded = lengths_like_queries(), 0, 0
    order = batches(lengths, batch, 0)
    for _ in range(100):
        rows = [Row("", None, query=np.zeros(lengths[i])) for i in next(order)]
        for group in micro_batches(rows, tokens):
            sizes = [n_tokens(row) for row in group]
            real, padded = real + sum(sizes), padded + max(sizes) * len(sizes)
    assert 1 - real / padded < 0.05


def test_an_epoch_has_every_row_once_and_its_batches_are_not_ordered_by_length():
    lengths = lengths_like_queries(640)
    order = batches(lengths, 16, 0)
    epoch = [next(order) for _ in range(40)]
    assert sorted(i for batch in epoch for i in batch) == list(range(640))
    means = [np.mean([lengths[i] for i in batch]) for batch in epoch]
    assert abs(np.corrcoef(range(40), means)[0, 1]) < 0.5
    again, other = batches(lengths, 16, 0), batches(lengths, 16, 1)
    assert epoch == [next(again) for _ in range(40)] != [next(other) for _ in range(40)]
    assert len(next(batches([5, 7, 9], 8, 0))) == 8  # a batch may be larger than the data


@pytest.mark.parametrize("tokens", [1, 30, 100, 10_000])
def test_micro_batches_hold_every_row_once_and_at_most_so_many_tokens(tokens):
    rows = some_rows(40)
    groups = list(micro_batches(rows, tokens))
    assert sorted(row.id for group in groups for row in group) == sorted(row.id for row in rows)
    assert all(len(group) == 1 or len(group) * max(map(n_tokens, group)) <= tokens for group in groups)


def test_the_learning_rate_rises_linearly_and_falls_to_zero():
    factors = [learning_rate_factor(i, 100, 0.1) for i in range(100)]
    assert np.allclose(factors[:10], np.arange(1, 11) / 10) and factors[10] == 1
    assert all(a > b for a, b in zip(factors[10:], factors[11:])) and 0 < factors[-1] < 1e-3


# ----------------------------------------------------------------------------------------------------------------------
# The log; resumed runs are in test_commands.py and test_killed.py, checkpoints that do not fit in test_broken.py

def test_resuming_removes_from_the_log_what_came_after_the_checkpoint(tmp_path):
    """Steps that were logged but not saved are computed again and are in the log once. A torn last line is removed."""
    (tmp_path / "log.jsonl").write_text(
        '{"stage": "warmup", "step": 1}\n{"stage": "router", "step": 7}\n'
        '{"stage": "warmup", "step": 2}\n{"stage": "war')
    checkpoints.rewind_log(tmp_path, "warmup", 1)
    assert [json.loads(line)["step"] for line in open(tmp_path / "log.jsonl")] == [1, 7]


# ----------------------------------------------------------------------------------------------------------------------
# Evaluation loss

def test_the_evaluation_loss_is_the_training_loss_of_each_row_in_the_rows_order():
    model, rows = base(random_B=True), some_rows(20)
    gates = torch.rand(20, 10).softmax(-1)
    nats, counts = evaluation_loss(model, rows, gates, tokens=40)
    for i in (0, 7, 19):
        assert abs(nats[i] - row_losses(model, [rows[i]], gates[i:i + 1]).item()) < 1e-4
    assert counts.tolist() == [len(row.ids) - row.n_prompt for row in rows]
    assert np.allclose(evaluation_loss(model, rows, None)[0], row_losses(model, rows).detach().numpy(), atol=1e-4)
