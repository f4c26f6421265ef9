"""Laws of what one does with a trained run: eval.py ask, chat and export."""
import json
import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import eval as evaluation
import lora
import router
from support import chat as chat_module
from support import measure
from support import runs
from lora import EXPERTS, SHORT_NAMES, add_experts, expert_layers, merged
from model import Transformer, generate
from router import persona_gate
from support.chat import Chat
from support.files import UserError
from support.records import read_queries
from synth import template_records
from test_commands import RUN, copy, here, reduced, run_folder  # noqa: F401 (fixtures)

ROOT = Path(evaluation.__file__).resolve().parent


@pytest.fixture
def run(run_folder):  # noqa: F811
    """The run, as a path that is good from everywhere: its config.json names its models inside it."""
    return run_folder


def note(folder):
    """The run takes its changed base for the one that it was begun with."""
    config = json.loads((folder / "config.json").read_text())
    config["content"]["base"] = runs.fingerprint(folder / "models" / "base")
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture
def strong(run_folder, here):  # noqa: F811
    """A copy of the run whose models say something: after a few steps all replies are full stops, and B near zero."""
    folder = copy(run_folder, here)
    torch.manual_seed(0)
    file = folder / "models" / "base" / "model.safetensors"
    save_file({name: t if t.dim() < 2 else 0.2 * torch.randn_like(t) for name, t in load_file(file).items()}, file,
              metadata={"format": "pt"})
    note(folder)
    for file in sorted((folder / "joint" / "experts").glob("*/adapter_model.safetensors")):
        state = {name: t if "lora_A" in name else 0.1 * torch.randn_like(t) for name, t in load_file(file).items()}
        save_file(state, file, metadata={"format": "pt"})
    return folder


def says(capsys, *argv):
    evaluation.main([*map(str, argv)])
    return capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------------------------
# ask

def test_ask_reads_files_and_prints_json_with_the_same_replies(strong, capsys, tmp_path):
    """Nothing but JSON on standard output; ids and histories of the file count."""
    queries = [{"id": "a", "query": "My boss is furious."},
               {"id": 7, "query": "And now?", "history": [{"role": "user", "content": "He left."},
                                                          {"role": "assistant", "content": "Oh no."}]}]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps(q) + "\n" for q in queries))
    rows = [json.loads(line) for line in says(capsys, "ask", "--run", strong, "--max-new-tokens", 9, "--json", "--file",
                                              tmp_path / "asked.jsonl").splitlines()]
    assert [row["id"] for row in rows] == ["a", 7] and [row["query"] for row in rows] == [q["query"] for q in queries]
    m = measure.LoadedRun(evaluation.Ask(queries=["x"], run=str(strong)))
    for row, query in zip(rows, queries):
        gate = m.gates([query])
        assert list(row["gate"]) == list(EXPERTS) and torch.allclose(torch.tensor([*row["gate"].values()]), gate[0])
        prompt = m.chat.prompt([*query.get("history", []), {"role": "user", "content": query["query"]}])
        assert [row["base"], row["reply"]] == [
            m.chat.text(generate(m.model, [prompt], g, 9, stops=m.chat.stops)[0]) for g in (None, gate)]
    out = says(capsys, "ask", "--run", strong, "--max-new-tokens", 9, queries[0]["query"])
    base, reply = (evaluation.printable(rows[0][key]) for key in ("base", "reply"))
    assert f"base:        {base}\n\nPersonaFuse: {reply}" in out
    assert rows[0]["base"] != rows[0]["reply"]


@pytest.mark.parametrize("argv, why", [
    ([], "ask needs queries, as words or with --file FILE"), (["--file", "f.txt", "Hello?"], "and not both"),
    (["--file", "none.txt"], "none.txt: No such file"), (["--file", "f.pdf"], "expected queries in a .txt")])
def test_ask_wants_queries_from_one_place(run, argv, why):
    with pytest.raises(UserError, match=why):
        evaluation.main(["ask", "--run", str(run), *argv])


def test_what_a_model_writes_does_not_command_the_terminal():
    assert evaluation.printable("a\x1b[2Jb\n\tc\x07é\u202e") == "a[2Jb\n\tcé"


# ----------------------------------------------------------------------------------------------------------------------
# chat

class Terminal:
    """A program in a terminal of its own."""

    def __init__(self, *argv):
        self.master, slave = pty.openpty()
        self.process = subprocess.Popen([sys.executable, *map(str, argv)], stdin=slave, stdout=slave, stderr=slave,
                                        start_new_session=True, env=os.environ | {"TERM": "dumb"})
        os.close(slave)
        self.seen = ""

    def until(self, pattern, seconds=60):
        """Read until the pattern has come -> what was read up to its end."""
        deadline = time.monotonic() + seconds
        while not (found := re.search(pattern, self.seen)):
            ready = select.select([self.master], [], [], max(0, deadline - time.monotonic()))[0]
            assert ready, f"waited for {pattern!r}, saw {self.seen!r}"
            try:
                self.seen += os.read(self.master, 65536).decode("utf-8", "replace").replace("\r\n", "\n")
            except OSError:  # Linux's way of saying that the other end is closed
                assert not pattern, f"ended before {pattern!r}, saw {self.seen!r}"
        head, self.seen = self.seen[:found.end()], self.seen[found.end():]
        return head

    def say(self, line):
        os.write(self.master, line.encode() + b"\n")
        return self.until(r"\n> ")

    def close(self):
        os.write(self.master, b"\x04")
        return self.process.wait(30)


def test_a_conversation_in_a_terminal(strong, tmp_path):
    """Every turn is routed anew, over the whole conversation; the gate stands in one line of at most 80 columns before
    the reply; the reply is what generate gives for that conversation under that gate."""
    m = measure.LoadedRun(evaluation.Talk(run=str(strong)))
    talk = Terminal(ROOT / "eval.py", "chat", "--run", strong, "--max-new-tokens", 12)
    try:
        talk.until("/help lists the commands.*\n\n> ")
        turns = []

        def expected(query, gate=None, base=False):
            messages = [{"role": role, "content": turn[i]} for turn in turns
                        for i, role in enumerate(("user", "assistant"))]
            gate = m.gates([{"id": "0", "query": query, "history": messages}]) if gate is None else gate
            prompt = m.chat.prompt([*messages, {"role": "user", "content": query}])
            ids = generate(m.model, [prompt], None if base else gate, 12, stops=m.chat.stops)[0]
            line = " ".join(f"{name}{w:.2f}".replace("0.", ".") for name, w in zip(SHORT_NAMES, gate[0].tolist()))
            return m.chat.text(ids), line

        for query, hand in (("My boss is furious.", None), ("And my sister too.", None), ("Why?", "O+,E-:0.5")):
            if hand:
                talk.say(f"/persona {hand}")
            out = talk.say(query)
            text, line = expected(query, persona_gate(hand, 1.0)[None] if hand else None)
            assert f"{'by hand' if hand else 'router'}  {line}\n\n{evaluation.printable(text)}\n\n> " in out
            assert max(map(len, out.splitlines()[1:3])) <= 80
            turns.append((query, text))
        asked = turns.pop()
        text, _ = expected(asked[0], base=True)
        assert f"base\n\n{evaluation.printable(text)}\n" in talk.say("/base")
        turns.append(asked)
        assert "turns" in talk.say(f"/save {tmp_path / 'said.jsonl'}")
        assert "is there already" in talk.say(f"/save {tmp_path / 'said.jsonl'}")
        assert "ends in .jsonl" in talk.say(f"/save {tmp_path / 'said.txt'}")
        assert "/nothing is not known" in talk.say("/nothing") and "/persona" in talk.say("/help")
        assert "expected a letter of OCEAN" in talk.say("/persona X+")
        talk.say("/reset")
        talk.say("/router")
        turns.clear()
        text, line = expected("Hello again.")
        assert f"router  {line}\n\n{evaluation.printable(text)}\n\n> " in talk.say("Hello again.")
        assert "there is none yet" in (talk.say("/reset"), talk.say("/base"))[1]
        assert talk.close() == 0
    finally:
        talk.process.kill()
    items, _ = read_queries(tmp_path / "said.jsonl")
    saved = [json.loads(line) for line in (tmp_path / "said.jsonl").read_text().splitlines()]
    assert all(list(turn["gate"]) == list(EXPERTS) for turn in saved)
    assert saved[1]["response"] == items[2]["history"][3]["content"]
    assert [item["query"] for item in items] == ["My boss is furious.", "And my sister too.", "Why?"]
    assert [len(item.get("history", [])) for item in items] == [0, 2, 4]
    assert items[2]["history"][1]["content"] == items[1]["history"][1]["content"]


def test_a_conversation_through_a_pipe_has_no_prompts_and_goes_on_after_errors(strong):
    talk = subprocess.run([sys.executable, ROOT / "eval.py", "chat", "--run", strong, "--max-new-tokens", "4",
                           "--persona", "O+"], input=b"/base\n\n\xff\xfe\nHello\n/quit\nnever\n", capture_output=True)
    out, err = talk.stdout.decode(), talk.stderr.decode()
    assert talk.returncode == 0 and out.startswith("by hand  O+.25 ") and out.count("by hand") == 1 and "> " not in out
    assert "there is none yet" in err and "UTF-8" in err and "Traceback" not in err


def test_a_reply_is_streamed_and_can_be_stopped(run, monkeypatch, capsys):
    """Pieces come as soon as they are known, whole characters only; Ctrl-C keeps what was said."""
    talk = evaluation.Conversation(measure.LoadedRun(evaluation.Talk(run=str(run))), evaluation.Talk(run=str(run)))
    ids = chat_module.encode(talk.chat.tokenizer, "Ä bé — 猫 now")
    pieces = []

    def generate(model, prompts, gate, n, temperature, top_p, stops, generator, each):
        for token in ids:
            each(0, token)
            pieces.append(capsys.readouterr().out.removeprefix(head))
        raise KeyboardInterrupt

    head = ""
    monkeypatch.setattr(evaluation, "generate", generate)
    text = talk.say({"query": "Hello"}, None)
    assert text == "Ä bé — 猫 now" == "".join(pieces) and not any("\ufffd" in piece for piece in pieces)
    assert sum(map(bool, pieces)) > 4 and capsys.readouterr().out == " [stopped]\n\n"


def test_generate_hands_over_each_id_as_it_comes(run):
    m, seen = measure.LoadedRun(evaluation.Talk(run=str(run))), [[], [], []]
    prompts = [m.chat.prompt([{"role": "user", "content": text}]) for text in ("Hi", "Help me now", "No")]
    found = generate(m.model, prompts, None, 7, each=lambda row, token: seen[row].append(token))
    assert seen == found


# ----------------------------------------------------------------------------------------------------------------------
# export

def logits_of(folder, ids, adapter=None):
    """What transformers (and peft) make of an export."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if adapter:
        theirs = pytest.importorskip("peft").PeftModel.from_pretrained(theirs, adapter)
    with torch.no_grad():
        return theirs.eval()(ids).logits


@pytest.fixture
def ids():
    return torch.randint(5, 300, (2, 20), generator=torch.Generator().manual_seed(0))


def ours(run, ids, gate):
    m = measure.LoadedRun(evaluation.Talk(run=str(run)))
    with torch.no_grad():
        return m.model(ids, gate), m.setup.base


def test_exported_experts_are_what_peft_computes(strong, ids, here, capsys):  # noqa: F811
    says(capsys, "export", "--run", strong, "--out", "out")
    assert sorted(p.name for p in Path("out").iterdir()) == sorted(EXPERTS)
    for e in (0, 7):
        wanted, base = ours(strong, ids, torch.eye(10)[[e, e]])
        assert (logits_of(base, ids, f"out/{EXPERTS[e]}") - wanted).abs().max() <= 1e-4
    assert json.loads(Path("out/high_openness/adapter_config.json").read_text())["base_model_name_or_path"] == base


@pytest.mark.parametrize("how", [["--persona", "O+,E-:0.5"], ["--gate", "high_openness:0.7,low_neuroticism:0.3"],
                                 ["--query", "My boss is furious."]])
@pytest.mark.parametrize("kind", ["mixture", "merged"])
def test_a_mixture_or_merged_weights_are_what_others_compute(strong, ids, here, capsys, kind, how):  # noqa: F811
    out = says(capsys, "export", "--run", strong, "--as", kind, *how, "--out", "out", "--shard-gb", 0.001)
    asked = json.loads(says(capsys, "ask", "--run", strong, "--max-new-tokens", 1, "--json", *(
        how[1:] if how[0] == "--query" else [*how, "Hello"])))
    gate = torch.tensor([[*asked["gate"].values()]])
    wanted, base = ours(strong, ids, gate.expand(2, -1))
    found = logits_of(base, ids, "out") if kind == "mixture" else logits_of("out", ids)
    assert (found - wanted).abs().max() <= 1e-4 and (wanted - ours(strong, ids, None)[0]).abs().max() > 0.1
    assert router.format_gate(gate[0]) in out
    if kind == "mixture":
        assert json.loads(Path("out/adapter_config.json").read_text())["r"] == 80


def test_merged_is_a_whole_model_folder_in_shards(strong, here, capsys):  # noqa: F811
    """Shards keep to the size asked for, the index names every tensor once, nothing of the base's folder is lost."""
    how = ["--persona", "A+"]
    says(capsys, "export", "--run", strong, "--as", "merged", *how, "--out", "many", "--shard-gb", 0.001)
    says(capsys, "export", "--run", strong, "--as", "merged", *how, "--out", "one")
    m = measure.LoadedRun(evaluation.Talk(run=str(strong)))
    whole, found = merged(m.model, persona_gate("A+", 1.0)), {}
    index = json.loads(Path("many/model.safetensors.index.json").read_text())
    for file in sorted(Path("many").glob("*.safetensors")):
        state = load_file(file)
        assert len(state) == 1 or sum(t.nbytes for t in state.values()) <= 1e6
        assert {index["weight_map"][name] for name in state} == {file.name}
        found |= state
    assert re.fullmatch(r"model-00001-of-000\d\d.safetensors", min(index["weight_map"].values()))
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in found.values())
    for state in (found, load_file("one/model.safetensors")):
        assert state.keys() == whole.keys() and all(torch.equal(state[n], whole[n]) for n in whole)
    for file in Path(m.setup.base).iterdir():
        assert (Path("one") / file.name).exists()
        if file.name.startswith("tokenizer"):
            assert file.read_bytes() == (Path("many") / file.name).read_bytes()
    config = json.loads(Path("one/config.json").read_text())
    assert config.pop("torch_dtype") == "float32"
    assert config.items() <= json.loads((Path(m.setup.base) / "config.json").read_text()).items()
    own = Transformer.from_pretrained("many", torch.float32), Chat.from_dir("many")
    assert torch.equal(own[0].head_weight, whole["model.embed_tokens.weight"]) and own[1].stops == m.chat.stops


def test_merged_keeps_one_shard_beside_the_model(strong, here, monkeypatch):  # noqa: F811
    """Tensors are made when their shard is written, not before."""
    order, made, save = [], lora.merged_tensors, evaluation.save_file

    def tensors(model, gate):
        for name, tensor in made(model, gate):
            order.append("make")
            yield name, tensor

    monkeypatch.setattr(evaluation, "merged_tensors", tensors)
    monkeypatch.setattr(evaluation, "save_file", lambda state, *a, **k: order.append(len(state)) or save(state, *a, **k))
    evaluation.main(["export", "--run", str(strong), "--as", "merged", "--persona", "A+", "--out", "many",
                     "--shard-gb", "0.001"])
    at = 0
    while at < len(order):
        n = next(i for i in range(at, len(order)) if order[i] != "make")
        assert order[n] == n - at
        at = n + 1


def test_merged_is_rounded_once_to_the_dtype_asked_for(strong, here, capsys):  # noqa: F811
    """fp32 experts onto the weights of the dtype; without --dtype, that of the base's own file."""
    says(capsys, "export", "--run", strong, "--as", "merged", "--persona", "A+", "--out", "b", "--dtype", "bfloat16")
    m = measure.LoadedRun(evaluation.Talk(run=str(strong), dtype="bfloat16"))
    wanted = merged(m.model, persona_gate("A+", 1.0))
    state = load_file("b/model.safetensors")
    assert all(t.dtype == torch.bfloat16 and torch.equal(t, wanted[n]) for n, t in state.items())
    assert json.loads(Path("b/config.json").read_text())["torch_dtype"] == "bfloat16"
    file = Path(m.setup.base) / "model.safetensors"
    save_file({n: t.half() for n, t in load_file(file).items()}, file, metadata={"format": "pt"})
    note(strong)
    says(capsys, "export", "--run", strong, "--as", "merged", "--persona", "A+", "--out", "h")
    assert {t.dtype for t in load_file("h/model.safetensors").values()} == {torch.float16}


@pytest.mark.parametrize("argv, why", [
    (["--out", "x", "--persona", "O+"], "--as experts takes no gate; found --persona"),
    (["--out", "x", "--as", "mixture"], "--as mixture takes one gate, by --gate, --persona or --query; found none"),
    (["--out", "x", "--as", "merged", "--persona", "O+", "--query", "Hi"], "found --persona and --query"),
    (["--as", "merged", "--persona", "O+"], "--out is missing"), (["--out", "there"], "there is there already"),
    (["--out", "x", "--as", "merged", "--query", " "], "an empty query"), (["--as", "gguf"], "invalid choice")])
def test_an_export_that_cannot_be_is_refused_and_nothing_is_written(run, here, argv, why):  # noqa: F811
    (here / "there").mkdir()
    with pytest.raises(UserError, match=re.escape(why)):
        evaluation.main(["export", "--run", str(run), *argv])
    assert [*here.iterdir()] == [here / "there"] and not [*Path("there").iterdir()]


# ----------------------------------------------------------------------------------------------------------------------
# import

def test_experts_that_peft_wrote_and_a_router_of_another_run_are_taken(strong, run, ids, here, capsys):  # noqa: F811
    """Experts saved by peft itself, and the router of the stage before: the gate is that router's, the reply theirs."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    base = measure.LoadedRun(evaluation.Talk(run=str(strong))).setup.base
    theirs = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(base),
                                            strong / "joint" / "experts" / EXPERTS[0], adapter_name=EXPERTS[0])
    for expert in EXPERTS[1:]:
        theirs.load_adapter(strong / "joint" / "experts" / expert, adapter_name=expert)
    theirs.save_pretrained("elsewhere")
    query, common = "My boss is furious.", ["--max-new-tokens", 9, "--json"]
    wanted = json.loads(says(capsys, "ask", "--run", strong, *common, query))
    shutil.rmtree(strong / "joint" / "experts")
    found = json.loads(says(capsys, "ask", "--run", strong, "--experts", "elsewhere", *common, query))
    assert found["reply"] == wanted["reply"] != found["base"]
    found = json.loads(says(capsys, "ask", "--run", run, "--router", run / "router" / "router", *common, query))
    before = json.loads(says(capsys, "ask", "--run", run, "--stage", "warmup", *common, query))
    assert found["gate"] == before["gate"] != wanted["gate"]
    shutil.rmtree(Path("elsewhere") / EXPERTS[3])
    with pytest.raises(UserError, match=EXPERTS[3]):
        evaluation.main(["ask", "--run", str(strong), "--experts", "elsewhere", query])


# ----------------------------------------------------------------------------------------------------------------------
# Real weights

@pytest.mark.slow
def test_a_merged_bf16_export_keeps_the_greedy_reply(tmp_path, weights):
    """Until a token whose rival is within what rounding the weights to bf16 makes of the logits."""
    folder, gate = weights / "SmolLM2-135M-Instruct", persona_gate("A+,N-", 0.5)[None]
    model, chat = Transformer.from_pretrained(folder, torch.bfloat16), Chat.from_dir(folder)
    add_experts(model)
    torch.manual_seed(0)
    for layer in expert_layers(model).values():
        torch.nn.init.normal_(layer.B, std=0.005)
    exact, rounded = (Transformer.from_pretrained(folder, torch.float32) for _ in range(2))
    rounded.load_state_dict({n: t.float() for n, t in merged(model, gate).items()})
    exact.load_state_dict(merged(model.float(), gate))
    prompts = [chat.prompt([{"role": "user", "content": r["query"]}]) for r in template_records("test", 8)]
    same = 0
    for prompt, a, b in zip(prompts, *(generate(m, prompts, None, 24) for m in (exact, rounded))):
        at = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), None)
        same += at is None
        if at is not None:
            with torch.no_grad():
                one, two = (m(torch.tensor([prompt + a[:at]]))[0, -1] for m in (exact, rounded))
            assert one[a[at]] - one[b[at]] <= 2 * (one - two).abs().max() <= 1
    assert same >= 2
