"""What one does with a trained run: ask it, talk to it, take it elsewhere. Commands of eval.py.

    python eval.py ask --run runs/small "How do I tell her?"             # gate, the base's reply, PersonaFuse's reply
    python eval.py ask --run runs/small --file asked.txt --json          # one JSON object a line
    python eval.py chat --run runs/small                                 # a conversation; /help lists what it knows
    python eval.py export --run runs/small --as mixture --persona O+,E-:0.5 --out open   # also: experts, merged
"""
import json
import shutil
import sys
import typing
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file

from batches import messages_of
from eval import ByHand, Measured, by_hand
from lora import EXPERTS, SHORT, export_mixture, merged_tensors, save_experts
from model import UserError, atomic, generate, open_safetensors, read_json, weight_files
from router import bars, persona_gate
from synth import read_queries, write_records
from train import answer


# ----------------------------------------------------------------------------------------------------------------------
# What ask and chat share

@dataclass(kw_only=True)
class Talk(ByHand):
    max_new_tokens: int = 200
    """Longest reply."""
    temperature: float = 0.0
    """Of sampling; 0 takes the most probable token every time."""
    top_p: float = 1.0
    """Sample from the smallest set of tokens with this much probability."""


def check_text(query):
    """UserError for what is no text, or none at all."""
    if not query.strip():
        raise UserError("an empty query: say what to ask")
    if any("\ud800" <= char <= "\udfff" for char in query):  # how Python shows stray bytes
        raise UserError("the query is not UTF-8 text: check the terminal's encoding")


# ----------------------------------------------------------------------------------------------------------------------
# ask

@dataclass(kw_only=True)
class Ask(Talk):
    queries: list[str] = field(default_factory=list)
    """What to ask; several are answered in turn."""
    file: str | None = None
    """Queries from a file instead: .txt (one a line), .jsonl (query, perhaps id and history) or .csv."""
    json: bool = False
    """Print only JSON, one object a line: id, query, gate, base and reply."""


def ask(args):
    """The gate as bars, the base's reply and PersonaFuse's reply to each query."""
    if bool(args.queries) == bool(args.file):
        raise UserError("ask needs queries, as words or with --file FILE" + " and not both" * bool(args.file))
    for query in args.queries:
        check_text(query)
    records = read_queries(args.file)[0] if args.file else [
        {"id": str(i), "query": query} for i, query in enumerate(args.queries)]
    run = Measured(args)
    hand = by_hand(run, args)
    gates = run.gates(records) if hand is None else hand.expand(len(records), -1)
    for record, gate in zip(records, gates):
        base, reply = (answer(run.model, run.chat, [record], one, args.max_new_tokens, temperature=args.temperature,
                              top_p=args.top_p, generator=torch.Generator().manual_seed(args.seed))[0]
                       for one in (None, gate[None]))
        if args.json:
            weights = dict(zip(EXPERTS, gate.tolist()))
            print(json.dumps({"id": record["id"], "query": record["query"], "gate": weights, "base": base,
                              "reply": reply}, ensure_ascii=False), flush=True)
        else:
            print(f"\n{record['query']}\n\n{bars(gate)}\n\nbase:        {printable(base)}\n\n"
                  f"PersonaFuse: {printable(reply)}", flush=True)


def printable(text):
    """A model's words without what a terminal would take for commands."""
    return "".join(c for c in text if c.isprintable() or c in "\n\t")


# ----------------------------------------------------------------------------------------------------------------------
# chat

HELP = """/persona O+,E-:0.5  set the gate by hand      /router     the router sets it again
/base               the last message's reply without experts, beside the conversation
/reset              begin anew                /save FILE  the conversation, as queries (.jsonl)
/help               this                      /quit       or Ctrl-D"""


class Conversation:
    """Turns of a chat. Each turn has a gate of its own, so what earlier turns left in the cache, made under another
    gate, is of no use: the whole conversation is read again."""

    def __init__(self, run, args):
        self.run, self.args, self.hand, self.turns = run, args, by_hand(run, args), []
        self.model, self.chat = run.model, run.chat
        if self.hand is None:
            run.router  # loaded now, and not at the first message
        self.generator = torch.Generator().manual_seed(args.seed)

    def record(self, query, turns):
        history = [{"role": role, "content": turn[key]} for turn in turns
                   for role, key in (("user", "query"), ("assistant", "response"))]
        return {"query": query} | ({"history": history} if history else {})

    def say(self, record, gate):
        """Stream a reply to standard output -> its text. Ctrl-C ends it early."""
        ids, shown = [], 0

        def stream(_, token):
            nonlocal shown
            ids.append(token)
            text = self.chat.text(ids)
            if not text.endswith("\ufffd"):  # else a character of which some bytes are still to come
                print(printable(text[shown:]), end="", flush=True)
                shown = len(text)
        try:
            generate(self.model, [self.chat.prompt(messages_of(record))], gate, self.args.max_new_tokens,
                     self.args.temperature, self.args.top_p, self.chat.stops, self.generator, stream)
        except KeyboardInterrupt:
            print(" [stopped]", end="")
        text = self.chat.text(ids)
        print(printable(text[shown:]) + "\n")
        return text

    def reply(self, query):
        """Route, show the gate in a line, answer."""
        check_text(query)
        record = self.record(query, self.turns)
        gate = self.run.gates([record | {"id": "0"}]) if self.hand is None else self.hand
        weights = " ".join(name + f"{weight:.2f}".lstrip("0") for name, weight in zip(SHORT, gate[0].tolist()))
        print(f"{'router' if self.hand is None else 'by hand'}  {weights}\n", flush=True)
        text = self.say(record, gate)
        self.turns.append({"query": query, "response": text, "gate": dict(zip(EXPERTS, gate[0].tolist()))})

    def command(self, line):
        name, _, rest = line.partition(" ")
        if name == "/persona" and rest.strip():
            self.hand = persona_gate(rest.strip(), self.run.setup.tau)[None]
        elif name == "/router":
            self.run.router  # first: where there is none, the gate stays
            self.hand = None
        elif name == "/base":
            if not self.turns:
                raise UserError("/base answers the last message again, and there is none yet")
            print("base\n")
            self.say(self.record(self.turns[-1]["query"], self.turns[:-1]), None)
        elif name == "/reset":
            self.turns = []
        elif name == "/save" and rest.strip():
            self.save(Path(rest.strip()))
        elif name == "/help":
            print(HELP + "\n")
        else:
            raise UserError(f"{line.split()[0]} is not known, or lacks what should follow it; /help lists all. A "
                            "message that begins with / needs a space before it")

    def save(self, path):
        if not self.turns:
            raise UserError("nothing said yet, so nothing to save")
        if path.suffix != ".jsonl" or path.exists():
            raise UserError(f"{path} " + ("is there already: give another name" if path.exists() else
                                          "is no name for a file of queries, expected one that ends in .jsonl"))
        write_records(path, [{"id": str(i)} | self.record(turn["query"], self.turns[:i]) | turn
                             for i, turn in enumerate(self.turns)])
        print(f"{path}: {len(self.turns)} turns\n")


def chat(args):
    """A conversation in the terminal. Each turn is routed anew; /help lists the commands."""
    talk = Conversation(Measured(args), args)
    if sys.stdin.isatty():
        try:
            import readline
            readline.set_auto_history(True)  # and the arrow keys, in input() below
        except ImportError:
            pass
        print(f"{talk.run.setup.run}: /help lists the commands, Ctrl-D ends\n")
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
            if line.strip() == "/quit":
                return
            if line.startswith("/"):
                talk.command(line)
            elif line.strip():
                talk.reply(line.strip())
        except EOFError:
            return
        except UnicodeDecodeError:
            print("not UTF-8 text: check the terminal's encoding\n", file=sys.stderr)
        except UserError as error:  # what was said so far is worth more than an end
            print(f"{error}\n", file=sys.stderr)


# ----------------------------------------------------------------------------------------------------------------------
# export

@dataclass(kw_only=True)
class Export(ByHand):
    as_: typing.Literal["experts", "mixture", "merged"] = "experts"
    """experts: ten PEFT adapters. mixture: one PEFT adapter of ten times the rank that equals the mixture under one
    gate. merged: a whole model folder with the mixture under one gate in its weights."""
    out: str | None = None
    """The folder to write."""
    query: str | None = None
    """Take the router's gate for this query."""
    shard_gb: float = 5.0
    """merged: most gigabytes of a file."""


def export(args):
    """Write the run for other software: PEFT adapters, or a model folder for transformers, vLLM or llama.cpp."""
    ways = [key for key in ("gate", "persona", "query") if getattr(args, key)]
    if len(ways) != (args.as_ != "experts"):
        raise UserError(f"--as {args.as_} takes " + ("no gate" if args.as_ == "experts" else "one gate, by --gate, "
                        "--persona or --query") + f"; found {' and '.join('--' + way for way in ways) or 'none'}")
    if not args.out:
        raise UserError("--out is missing: where should the export go?")
    out = Path(args.out)
    if out.exists():
        raise UserError(f"{out} is there already: give another name, or remove it")
    run = Measured(args)
    if args.as_ == "merged" and not args.dtype:  # as the base is stored, whatever it is computed in here
        run.setup.dtype = stored_dtype(run.setup.base)
    if args.query:
        check_text(args.query)
    gate = run.gates([{"id": "0", "query": args.query}]) if args.query else by_hand(run, args)
    if args.as_ == "experts":
        with atomic(out) as part:
            save_experts(run.model, part, run.setup.base)
    elif args.as_ == "mixture":
        export_mixture(run.model, gate, out, run.setup.base)
    else:
        write_model(run, gate, out, args.shard_gb * 1e9)
    print(f"{out}: {args.as_}, {sum(f.stat().st_size for f in out.rglob('*') if f.is_file()) / 1e6:,.0f} MB"
          + ("" if gate is None else f", for the gate\n{bars(gate[0])}"))


def stored_dtype(folder):
    """The dtype of a model folder's first tensor, as safetensors names it -> torch's."""
    file, names = next(iter(weight_files(folder).items()))
    with open_safetensors(file) as tensors:
        kind = tensors.get_slice(names[0] if names else next(iter(tensors.keys()))).get_dtype()
    return {"F32": torch.float32, "F16": torch.float16}.get(kind, torch.bfloat16)


def write_model(run, gate, out, most):
    """A model folder with dense weights for one gate. Tensors are merged as their shard is written: beside the model
    there is never more than one shard in memory."""
    base, total, shards = Path(run.setup.base), 0, [{}]
    for name, tensor in run.model.state_dict().items():
        if not name.endswith((".A", ".B")):
            if shards[-1] and sum(shards[-1].values()) + tensor.nbytes > most:
                shards.append({})
            shards[-1][name] = tensor.nbytes
            total += tensor.nbytes
    files = ["model.safetensors"] if len(shards) == 1 else [
        f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    tensors = merged_tensors(run.model, gate)
    with atomic(out) as part:
        part.mkdir()
        for file, shard in zip(files, shards):
            state = {name: tensor.cpu().contiguous() for name, tensor in (next(tensors) for _ in shard)}
            save_file(state, part / file, metadata={"format": "pt"})
            del state
        if len(shards) > 1:
            where = {name: file for file, shard in zip(files, shards) for name in shard}
            (part / "model.safetensors.index.json").write_text(
                json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=2) + "\n")
        for file in sorted(base.iterdir()):  # tokenizer, chat template, generation settings, licence
            if file.is_file() and (file.suffix in (".json", ".jinja", ".txt", ".model") or "LICENSE" in file.name) \
                    and not file.name.endswith(".index.json"):
                shutil.copyfile(file, part / file.name)
        settings = read_json(base / "config.json") | {"torch_dtype": str(run.setup.dtype).removeprefix("torch.")}
        (part / "config.json").write_text(json.dumps(settings, indent=2) + "\n")


COMMANDS = {"ask": (Ask, ask), "chat": (Talk, chat), "export": (Export, export)}
