"""Laws of the training: what a step computes, what it moves, and that stopping and going on change nothing."""
import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save
from torch.nn import functional as F

import train
from support import checkpoints
from support import compile
from support import rows as batching
from lora import EXPERTS, add_experts, expert_layers
from model import Config, Transformer, pad
from router import Router, contrastive_loss, query_ids
from support.chat import Chat
from support.checkpoints import rewind_log, states
from support.files import UserError
from support.records import messages_of
from support.rows import Row, batches, n_tokens, make_rows, micro_batches
from train import Stage, fit, evaluation_loss, row_losses, schedule, token_losses
from test_chat import TEMPLATES, make_folder

CONFIG = Config(97, 32, 2, 4, 2, 8, 48, 1e-5, 1e4, tied=True)


def settings(**changes):
    s = dict(steps=6, batch=6, lr=1e-2, router_lr=1e-2, tokens=64, clip=0.5, lam=0.1, contrastive_tau=0.07, seed=0,
             joint_gate="learned", lr_warmup=0.2, save_every=100, keep=2, log_every=1, recompute=False)
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


def some_rows(n, seed=0, experts=range(10)):
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(n):
        expert = int(rng.choice(list(experts)))
        length = int(rng.integers(4, 24))
        rows.append(Row(f"r{i}", F.one_hot(torch.tensor(expert), 10).float(),
                            rng.integers(0, 97, length).astype(np.int32), int(rng.integers(1, length)),
                            rng.integers(0, 97, int(rng.integers(1, 12))).astype(np.int32), expert))
    return rows


def state(task):
    return [p.detach().clone() for p in task.parameters()]


# ----------------------------------------------------------------------------------------------------------------------
# Tokens, and the file that they are kept in

RECORDS = [{"id": "a", "query": "  I am sad. \n", "response": " Why? ", "traits": {"openness": 1}},
           {"id": "b", "query": "Hello", "response": "I don't know.", "traits": {"neuroticism": -1},
            "history": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "\n Hello there"}]},
           {"id": "c", "query": "<|im_end|>", "response": "Hello", "traits": {"extraversion": 1}},
           {"id": "d", "query": "Hello", "response": "Be kind.", "traits": {"extraversion": 1}}]


def contents(rows):
    return [(row.id, row.active.tolist(), row.ids is not None and (row.ids.dtype, row.ids.tolist()), row.prompt,
             row.query is not None and (row.query.dtype, row.query.tolist())) for row in rows]


@pytest.fixture
def asked(monkeypatch):
    """The batches of texts that a tokenizer was asked for."""
    found, plain = [], batching.Ahead.encode_all
    monkeypatch.setattr(batching.Ahead, "encode_all", lambda self: (found.append(list(self.known)), plain(self))[1])
    return found


@pytest.mark.parametrize("kind", TEMPLATES)
@pytest.mark.parametrize("some", [1, 3, 4096])
def test_records_are_encoded_as_one_by_one(kind, some, tmp_path, monkeypatch):
    chat = Chat.from_dir(make_folder(tmp_path, kind))
    monkeypatch.setattr(batching, "AT_ONCE", some)
    rows, long = make_rows(RECORDS, chat, chat.tokenizer)
    assert long == 0
    for record, row in zip(RECORDS, rows, strict=True):
        ids, supervised = chat.example(messages_of(record), record["response"])
        assert row.ids.tolist() == ids and row.ids.dtype == np.int32
        assert supervised == [False] * row.prompt + [True] * (len(ids) - row.prompt)
        assert row.query.tolist() == query_ids(chat.tokenizer, record["query"], record.get("history"))


def test_tokens_are_made_once_and_kept_make_no_difference(tmp_path, asked):
    chat = Chat.from_dir(make_folder(tmp_path / "model", "llama"))
    plain = contents(make_rows(RECORDS, chat, chat.tokenizer)[0])
    assert len(asked) == 2 and not (tmp_path / "tokens").exists()  # without a folder nothing is written
    assert contents(make_rows(RECORDS, chat, chat.tokenizer, None, tmp_path / "tokens")[0]) == plain
    assert len(asked) == 4
    kept = make_rows(RECORDS, chat, chat.tokenizer, None, tmp_path / "tokens")[0]
    assert contents(kept) == plain and len(asked) == 4
    # a limit is no part of what is kept; nor is what one stage needs of what another needs
    lengths = [len(row.ids) for row in kept]
    for limit in (max(lengths), max(lengths) - 1):
        rows, long = make_rows(RECORDS, chat, None, limit, tmp_path / "tokens")
        assert [len(row.ids) for row in rows] == [n for n in lengths if n <= limit] and long == 4 - len(rows)
    assert [row[4] for row in contents(make_rows(RECORDS, None, chat.tokenizer, None, tmp_path / "tokens")[0])] \
        == [row[4] for row in plain] and len(asked) == 4


@pytest.mark.parametrize("what", ["a query", "a reply", "a history", "order", "fewer", "tokenizer", "dates", "system",
                                  "library", "code"])
def test_other_texts_tokenizers_or_formats_are_tokenised_anew(what, tmp_path, asked, monkeypatch):
    kind, records = "chatml", [dict(record) for record in RECORDS]
    make_rows(records, Chat.from_dir(make_folder(tmp_path / "was", kind)), None, None, tmp_path / "tokens")
    chat = Chat.from_dir(make_folder(tmp_path / "now", {"system": "chatml with a default"}.get(what, kind)))
    if what == "a query":
        records[2]["query"] += "!"
    elif what == "a reply":
        records[0]["response"] = "Because."
    elif what == "a history":
        records[1]["history"] = RECORDS[1]["history"][:1]
    elif what == "order":
        records.reverse()
    elif what == "fewer":
        records.pop()
    elif what == "tokenizer":
        chat.tokenizer.add_tokens(["sad"])
    elif what == "dates":
        chat.dates = True
    elif what == "library":
        monkeypatch.setattr(batching.tokenizers, "__version__", "0.0")
    elif what == "code":
        monkeypatch.setattr(batching, "encode", lambda tokenizer, text: tokenizer.encode(text).ids)
    new = contents(make_rows(records, chat, None, None, tmp_path / "tokens")[0])
    assert len(asked) == 2 and new == contents(make_rows(records, chat)[0])
    make_rows(records, chat, None, None, tmp_path / "tokens")
    assert len(asked) == 3  # the new ones are kept


@pytest.mark.parametrize("torn", ["cut", "empty", "another byte", "no tokens"])
def test_a_torn_file_of_tokens_is_made_anew_in_silence(torn, tmp_path, asked, capsys):
    chat, file = Chat.from_dir(make_folder(tmp_path / "model", "llama")), tmp_path / "tokens" / "base.safetensors"
    plain = contents(make_rows(RECORDS, chat, None, None, file.parent)[0])
    whole = file.read_bytes()
    if torn == "a folder":
        file.unlink()
        file.mkdir()
    else:
        file.write_bytes({"cut": whole[:-1], "empty": b"", "another byte": whole[:-1] + bytes([whole[-1] ^ 1]),
                          "no tokens": save({"x": torch.ones(1)})}[torn])
    assert contents(make_rows(RECORDS, chat, None, None, file.parent)[0]) == plain
    assert contents(make_rows(RECORDS, chat, None, None, file.parent)[0]) == plain
    assert len(asked) == 2 and capsys.readouterr() == ("", "")


# ----------------------------------------------------------------------------------------------------------------------
# Losses

@pytest.mark.parametrize("chunk", [1, 3, None])
@pytest.mark.parametrize("trains", [False, True])
def test_token_losses_and_their_gradient_are_those_of_the_plain_cross_entropy(chunk, trains):
    model = base().double().requires_grad_(trains)
    h, t = torch.randn(10, 32, requires_grad=True, dtype=torch.float64), torch.randint(0, 97, (10,))
    weight = torch.rand(10, dtype=torch.float64)  # every position counts for itself
    ours = token_losses(model, h, t, chunk)
    plain = F.cross_entropy(model.head(h), t, reduction="none")
    assert torch.allclose(ours, plain, atol=1e-12) and ours.shape == (10,)
    wanted = [h, model.head_weight] if trains else [h]
    ours, plain = (torch.autograd.grad((loss * weight).sum(), wanted, retain_graph=True) for loss in (ours, plain))
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(ours, plain))


@pytest.mark.parametrize("chunk, n, size", [(50, 1000, 50), (None, 10_000, 4096)])  # 4096 x 4096 x 4 bytes: 64 MiB
def test_no_more_than_a_chunk_of_logits_exists_at_once(chunk, n, size):
    model = Transformer(Config(4096, 32, 1, 2, 1, 16, 48, 1e-5, 1e4)).requires_grad_(False)
    h, t = torch.randn(n, 32, requires_grad=True), torch.randint(0, 4096, (n,))
    with torch.profiler.profile(profile_memory=True) as seen:
        token_losses(model, h, t, chunk).sum().backward()
    largest = max(e.cpu_memory_usage for e in seen.events())
    assert size * 4096 * 4 <= largest < 1.5 * size * 4096 * 4, largest


def test_row_loss_counts_the_reply_and_nothing_else():
    """Changing a prompt token's target role changes nothing: the loss is that of predicting tokens prompt … end."""
    model, rows = base(random_B=True), some_rows(5)
    gate = torch.rand(5, 10).softmax(-1)
    found = row_losses(model, rows, gate)
    for i, row in enumerate(rows):
        logits = model(torch.tensor(row.ids)[None].long(), gate[i:i + 1])[0]
        wanted = sum(F.cross_entropy(logits[t - 1], torch.tensor(int(row.ids[t]))) for t in range(row.prompt, len(row.ids)))
        assert abs(found[i] - wanted) < 1e-4


def test_a_step_is_the_token_mean_of_all_its_rows_however_it_is_cut():
    """Micro-batches of any size give the gradient of one batch; a mean of micro-batch means would not."""
    rows, grads = some_rows(12), []
    for tokens in (24, 64, 10_000):
        task = Stage("joint", base(random_B=True), router(), settings(tokens=tokens, clip=1e9))
        seen = {}
        task.optimizer.step = lambda: seen.update(grads=[p.grad.clone() for p in task.parameters()])
        report = task.step(rows)
        grads.append((report["loss"], seen["grads"]))
    n = sum(n_tokens(row) - row.prompt for row in rows)
    task = Stage("joint", base(random_B=True), router(), settings())
    language, contrast, _ = task.losses(rows, {row.expert: n for row in rows})
    whole = language + 0.1 * contrast / len(rows)
    assert len(list(micro_batches(rows, 24))) > 3 and len(list(micro_batches(rows, 10_000))) == 1
    # rows carry an expert here, so each expert's tokens are counted apart: give them all to one
    for row in rows:
        row.expert = None
    task = Stage("joint", base(random_B=True), router(), settings(tokens=24, clip=1e9))
    assert abs(task.step(rows)["loss"] - whole.item()) < 1e-5
    for loss, g in grads[1:]:
        assert abs(loss - grads[0][0]) < 1e-5
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(g, grads[0][1]))


def test_joint_loss_is_language_plus_lambda_times_contrastive():
    rows = some_rows(6)
    for row in rows:
        row.expert = None
    task = Stage("joint", base(random_B=True), router(), settings(lam=0.7))
    n = sum(n_tokens(row) - row.prompt for row in rows)
    language, contrast, gate = task.losses(rows, {None: n})
    plain = row_losses(task.model, rows, gate).sum() / n
    ids, lengths = pad([row.query for row in rows])
    s = task.router.similarity(task.router.embed(ids, lengths))
    wanted = plain + 0.7 * contrastive_loss(s, torch.stack([row.active for row in rows]))
    assert torch.allclose(language + 0.7 * contrast / 6, wanted, atol=1e-5)
    assert abs(task.step(rows)["loss"] - wanted.item()) < 1e-5


def test_the_fair_control_trains_experts_under_a_uniform_gate():
    """With joint_gate=uniform the language loss does not depend on the router, and the router still learns."""
    rows, model = some_rows(6), base(random_B=True)
    losses = []
    for seed in (0, 1):
        r = router()
        torch.manual_seed(seed)
        torch.nn.init.normal_(r.expert_embeddings)
        task = Stage("joint", model, r, settings(joint_gate="uniform"))
        losses.append(task.losses(rows, {row.expert: 10 for row in rows})[0].item())
    assert losses[0] == losses[1]
    before = r.expert_embeddings.detach().clone()
    task.step(rows)
    assert not torch.equal(before, r.expert_embeddings)


# ----------------------------------------------------------------------------------------------------------------------
# What a step moves

def test_warm_up_of_ten_together_equals_each_apart():
    """Exact in mathematics; in fp64 to 1e-10 over eight steps, with experts that are absent from some steps and with
    gradients that are clipped. In fp32 it would not be bitwise: matrix products add up in another order."""
    steps = [some_rows(6, seed, (0, 3, 7)) for seed in range(8)]
    steps[2] = [row for row in steps[2] if row.expert != 3] or some_rows(4, 50, (0, 7))
    steps[0] = [row for row in steps[0] if row.expert != 7]

    def run(experts):
        task = Stage("warmup", base(torch.float64), s=settings(clip=0.05))
        for i, rows in enumerate(steps):
            mine = [row for row in rows if row.expert in experts]
            if mine:
                task.step(mine, schedule(i, 8, 0.2))
        return [tensor.detach().clone() for tensor in task.expert_tensors()]

    together, start = run((0, 3, 7)), [t.detach().clone() for t in Stage("warmup", base(torch.float64),
                                                                       s=settings()).expert_tensors()]
    for expert in (0, 3, 7):
        alone = run((expert,))
        for a, b in zip(together, alone):
            assert (a[expert] - b[expert]).abs().max() < 1e-10
    for a, b in zip(together, start):
        assert torch.equal(a[1], b[1])  # an expert without any row has not moved
        assert not torch.equal(a[3], b[3])


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("recompute", [False, True])
def test_compiled_layers_train_alike_and_are_not_compiled_again_for_other_lengths(recompute):
    """A step or two compile; then any number of rows, of any length, finds what it needs. The whole optimiser step is
    compared, in fp64, so that only the order of sums can differ."""
    from torch._dynamo.utils import counters  # here, since it takes seconds
    torch.compiler.reset()
    counters.clear()
    tasks = [Stage("joint", base(random_B=True).double(), router().double(), settings(tokens=10_000)) for _ in range(2)]
    for part in (tasks[1].model, tasks[1].router.encoder):
        part.recompute = recompute
        compile.compile_layers(part)
    try:
        for seed, n in enumerate((6, 3, 2, 9, 5, 12)):
            rows = some_rows(n, seed)
            for row in rows:
                row.expert = None
            plain, compiled = (task.step(rows) for task in tasks)
            torch.compiler.set_stance("fail_on_recompile")
            assert compiled["loss"].item() == pytest.approx(plain["loss"].item(), rel=1e-6), n
        assert counters["stats"]["unique_graphs"] >= 2, counters  # a decoder's layer and an encoder's
        apart = max((a - b).abs().max() for a, b in zip(*map(state, tasks)))
        assert apart < 1e-6, apart  # the router's cosines are fp32
    finally:
        torch.compiler.set_stance("default")


def test_compile_without_a_compiler_is_refused(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="C\\+\\+ compiler"):
        compile.compile_layers(base())


def test_an_expert_absent_from_a_step_does_not_move():
    """Neither by momentum nor by anything else, and its own count of steps stands still."""
    task = Stage("warmup", base(), s=settings())
    task.step(some_rows(6, 0, (2, 5)))
    before = [t.detach().clone() for t in task.expert_tensors()]
    task.step(some_rows(6, 1, (2,)))
    for a, b in zip(before, task.expert_tensors()):
        assert torch.equal(a[5], b[5])
    counts = {expert: task.optimizer.state[view]["step"].item() for expert, _, view in task.views
              if view in task.optimizer.state}
    assert counts == {2: 2, 5: 1}


def test_warm_up_clips_each_expert_by_its_own_norm():
    task = Stage("warmup", base(random_B=True), s=settings(clip=1e-3))
    seen = {}
    task.optimizer.step = lambda: seen.update(
        {e: [v.grad.clone() for x, _, v in task.views if x == e and v.grad is not None] for e in range(10)})
    task.step(some_rows(8, 0, (1, 4)))
    for expert in (1, 4):
        assert abs(torch.cat([g.flatten() for g in seen[expert]]).norm() - 1e-3) < 1e-5
    assert not any(seen[e] for e in range(10) if e not in (1, 4))


@pytest.mark.parametrize("stage", ["warmup", "router", "joint"])
def test_a_step_moves_what_its_stage_trains_and_leaves_the_rest_bitwise(stage):
    model = None if stage == "router" else base(random_B=True)
    r = None if stage == "warmup" else router()
    task = Stage(stage, model, r, settings())
    trained = {id(t) for part in (model and task.expert_tensors(), r and list(r.parameters())) if part for t in part}
    everything = [(name, p) for m in (model, r) if m for name, p in m.named_parameters()]
    before = [p.detach().clone() for _, p in everything]
    task.step(some_rows(40))
    for (name, p), was in zip(everything, before):
        unused = name.endswith("lm_head.weight")
        assert torch.equal(p, was) == (id(p) not in trained or unused), name
    held = {p.untyped_storage().data_ptr() for p in task.parameters()}
    assert held == {p.untyped_storage().data_ptr() for _, p in everything if id(p) in trained}


def test_the_router_stage_needs_neither_base_nor_responses():
    rows = some_rows(6)
    for row in rows:
        row.ids = None
    assert math.isfinite(Stage("router", None, router(), settings()).step(rows)["loss"])


@pytest.mark.parametrize("stage", ["warmup", "router", "joint"])
def test_a_step_asks_the_device_for_no_number(stage, monkeypatch):
    """On a GPU each would have to be waited for; the log asks, where it is written."""
    task = Stage(stage, None if stage == "router" else base(), None if stage == "warmup" else router(), settings())
    with monkeypatch.context() as patch:
        for name in ("item", "tolist", "cpu", "numpy", "nonzero", "__float__"):
            patch.setattr(torch.Tensor, name, lambda self, *a, name=name: pytest.fail(f"{name} of a {self.shape} tensor"))
        report = task.step(some_rows(20))
    assert math.isfinite(train.metrics_to_floats(report)["loss"])


def test_a_loss_that_is_not_finite_ends_training_and_saves_nothing(tmp_path):
    model = base(random_B=True)
    # behind the attention: some of its kernels take scores that are NaN for masked ones, and their gradients alone are NaN
    [*expert_layers(model).values()][-1].weight.data[0, 0] = torch.nan
    s = SimpleNamespace(**vars(settings()) | dict(steps=3, batch=3, seed=0, lr_warmup=0, log_every=1, save_every=1, keep=2))
    with pytest.raises(UserError, match="step 1: the loss is nan.*r0"):
        fit(Stage("warmup", model, s=s), some_rows(3), s, tmp_path)
    assert not list(tmp_path.glob("state/*")) and not (tmp_path / "log.jsonl").read_text()


# ----------------------------------------------------------------------------------------------------------------------
# Order

def lengths_like_queries(n=700):
    """Real queries' lengths in tokens are about log-normal: median 70, a tail of several hundred."""
    return np.random.default_rng(0).lognormal(4.3, 0.7, n).clip(5, 512).astype(int).tolist()


@pytest.mark.parametrize("batch, tokens", [(16, 2048), (128, 8192)])
def test_padding_stays_below_five_percent(batch, tokens):
    """Also where a step holds a fifth of all rows, so that they cannot be alike: it is cut into more pieces then."""
    lengths, real, padded = lengths_like_queries(), 0, 0
    order = batches(lengths, batch, 0)
    for _ in range(100):
        rows = [Row("", None, query=np.zeros(lengths[i])) for i in next(order)]
        for group in micro_batches(rows, tokens):
            sizes = [n_tokens(row) for row in group]
            real, padded = real + sum(sizes), padded + max(sizes) * len(sizes)
    assert 1 - real / padded < 0.05


def test_an_epoch_has_every_row_once_and_batches_come_in_no_order_of_length():
    lengths = lengths_like_queries(640)
    order = batches(lengths, 16, 0)
    epoch = [next(order) for _ in range(40)]
    assert sorted(i for batch in epoch for i in batch) == list(range(640))
    means = [np.mean([lengths[i] for i in batch]) for batch in epoch]
    assert abs(np.corrcoef(range(40), means)[0, 1]) < 0.5
    again, other = batches(lengths, 16, 0), batches(lengths, 16, 1)
    assert epoch == [next(again) for _ in range(40)] != [next(other) for _ in range(40)]


def test_batches_serve_fewer_rows_than_a_batch():
    order = batches([5, 7, 9], 8, 0)
    assert all(len(next(order)) == 8 for _ in range(5))


@pytest.mark.parametrize("tokens", [1, 30, 100, 10_000])
def test_micro_batches_hold_every_row_once_within_the_budget(tokens):
    rows = some_rows(40)
    groups = list(micro_batches(rows, tokens))
    assert sorted(row.id for group in groups for row in group) == sorted(row.id for row in rows)
    assert all(len(group) == 1 or len(group) * max(map(n_tokens, group)) <= tokens for group in groups)


def test_schedule_rises_in_a_line_and_falls_to_zero():
    factors = [schedule(i, 100, 0.1) for i in range(100)]
    assert np.allclose(factors[:10], np.arange(1, 11) / 10) and factors[10] == 1
    assert all(a > b for a, b in zip(factors[10:], factors[11:])) and 0 < factors[-1] < 1e-3


# ----------------------------------------------------------------------------------------------------------------------
# Stopping and going on

@pytest.mark.parametrize("stage", ["warmup", "router", "joint"])
def test_stopped_and_resumed_is_bitwise_the_same_as_never_stopped(stage, tmp_path):
    rows, s = some_rows(30), settings(steps=9)

    def new():
        return Stage(stage, None if stage == "router" else base(), None if stage == "warmup" else router(), s)

    whole = new()
    fit(whole, rows, s, tmp_path / "whole")
    for _ in range(2):
        with pytest.raises(checkpoints.Stopped, match="saved"):
            steps = iter(range(100))
            fit(new(), rows, s, tmp_path / "parts", stop=lambda: next(steps) == 2)
    last = new()
    fit(last, rows, s, tmp_path / "parts")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), last.parameters()))
    logs = [[json.loads(line) for line in open(tmp_path / run / "log.jsonl")] for run in ("whole", "parts")]
    assert [entry["step"] for entry in logs[1]] == list(range(1, 10))
    for a, b in zip(*logs):
        assert a | {"tokens_per_s": 0} == b | {"tokens_per_s": 0}
    assert set(logs[0][0]) >= {"step", "stage", "loss", "grad_norm", "lr", "tokens_per_s"}
    assert ("entropy" in logs[0][0]) == (stage != "warmup")


@pytest.mark.parametrize("changes", [dict(save_every=1), dict(save_every=4, keep=1), dict(log_every=5)])
def test_how_often_is_saved_or_logged_changes_nothing(changes, tmp_path):
    results = []
    for name, s in (("a", settings()), ("b", settings(**changes))):
        task = Stage("joint", base(), router(), s)
        fit(task, some_rows(20), s, tmp_path / name)
        results.append(state(task))
    assert all(torch.equal(a, b) for a, b in zip(*results))
    assert len(states(tmp_path / "b", "joint")) <= settings(**changes).keep


def test_the_log_is_rewound_to_the_checkpoint(tmp_path):
    """Steps that were logged but not saved are done again and stand in the log once; a torn last line goes."""
    (tmp_path / "log.jsonl").write_text(
        '{"stage": "warmup", "step": 1}\n{"stage": "router", "step": 7}\n{"stage": "warmup", "step": 2}\n{"stage": "war')
    rewind_log(tmp_path, "warmup", 1).close()
    assert [json.loads(line)["step"] for line in open(tmp_path / "log.jsonl")] == [1, 7]


def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path):
    s = settings(steps=2)
    fit(Stage("router", None, router(), s), some_rows(10), s, tmp_path)
    torch.manual_seed(0)
    other = Router(Transformer(Config(97, 16, 1, 2, 2, 8, 24, 1e-5, 1e4, tied=True)))
    with pytest.raises(UserError, match="does not fit"):
        fit(Stage("router", None, other, s), some_rows(10), s, tmp_path)


# ----------------------------------------------------------------------------------------------------------------------
# Held-out loss

def test_held_out_loss_is_the_training_loss_per_row_in_the_rows_order():
    model, rows = base(random_B=True), some_rows(20)
    gates = torch.rand(20, 10).softmax(-1)
    nats, counts = evaluation_loss(model, rows, gates, tokens=40)
    for i in (0, 7, 19):
        assert abs(nats[i] - row_losses(model, [rows[i]], gates[i:i + 1]).item()) < 1e-4
    assert counts.tolist() == [len(row.ids) - row.prompt for row in rows]
    assert np.allclose(evaluation_loss(model, rows, None)[0], row_losses(model, rows).detach().numpy(), atol=1e-4)
    assert len(EXPERTS) == gates.shape[1]
