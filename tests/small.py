"""Models of a few thousand parameters, forty records and a run of twelve steps on them, for laws about whole commands.

As a script, it is a server that starts training in processes of its own: see test_killed.py.
"""
import contextlib
import io
import json
import os
import signal
import sys
from pathlib import Path

import torch
from safetensors.torch import save, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train
from support import command
from support import records as records_module
from support import checkpoints
from lora import EXPERTS
from model import Config, Transformer

CHAT = {"llama": ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        "qwen2": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]}


def write_model(folder, family="llama", seed=0, **changes):
    """A model folder: a byte is a token, and after the 256 bytes come the chat tokens."""
    folder.mkdir(parents=True)
    letters, special = sorted(pre_tokenizers.ByteLevel.alphabet()), CHAT[family]
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"model_type": family, "hidden_act": "silu", "tie_word_embeddings": family == "llama", "vocab_size": 264,
              "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
              "num_key_value_heads": 1, "head_dim": 8, "rms_norm_eps": 1e-5, "rope_theta": 1e4,
              "max_position_embeddings": 200, "eos_token_id": 255 + len(special)} | changes
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": special[-1], "chat_template": ""}))
    torch.manual_seed(seed)
    state = Transformer(Config.from_dir(folder)).state_dict()
    save_file({name: t.contiguous() for name, t in state.items()}, folder / "model.safetensors")


def records(n=40):
    """Every pole is called for in turn, by one record alone and by one together with another."""
    def traits(i):
        poles = [i % 10] if i % 20 < 10 else [i % 10, (i + 2) % 10]
        return {EXPERTS[e].split("_")[1]: 1 - 2 * (e % 2) for e in poles}
    return [{"id": f"r{i}", "query": f"What now, {i}?", "response": f"Wait {'so ' * (i % 4)}{i}.", "traits": traits(i)}
            for i in range(n)]


def make(folder):
    """base/, encoder/ and data/ in `folder`."""
    write_model(folder / "base")
    write_model(folder / "encoder", "qwen2", 1)
    for split, n in (("train", 40), ("validation", 4), ("test", 8)):
        records_module.write_records(folder / "data" / f"{split}.jsonl", records(n))


TRAIN = ["--preset", "tiny", "--base", "base", "--encoder", "encoder", "--data", "data", "--run", "run", "--steps", "4",
         "--batch", "4", "--tokens", "150", "--rank", "2", "--save-every", "2", "--keep", "2", "--eval-records", "4"]


def run_quietly(program, *argv):
    """A program as its command line runs it -> (exit status, what it printed, what it said on standard error)."""
    out, err, name = io.StringIO(), io.StringIO(), sys.argv[0]
    try:
        sys.argv[0] = f"{program.__name__}.py"
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            command.run_command(lambda: program.main(list(argv)))
    except SystemExit as left:
        return left.code or 0, out.getvalue(), err.getvalue()
    finally:
        sys.argv[0] = name


def contents(folder):
    """{name: bytes} of every file below a folder."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def slowly(half=None):
    """save_file in many small writes, so that there is time to be killed between two of them; of the file whose name
    begins so, in the middle."""
    def write(tensors, file, metadata=None):
        data = save(tensors, metadata)
        with open(file, "wb", buffering=0) as out:
            for at in range(0, len(data), 1000):
                if half and file.name.startswith(half) and 2 * at > len(data):
                    os.kill(os.getpid(), signal.SIGKILL)
                out.write(data[at:at + 1000])
    return write


def dies_at(event, number):
    """End this process by `number` at its event-th call or return of a function, Python's own and C's alike: every
    moment is one of these. Returns the list that counts."""
    count = [0]

    def look(*_):
        count[0] += 1
        if count[0] == event:
            os.kill(os.getpid(), number)
    sys.setprofile(look)
    return count


def serve():
    """For each line on standard input {cwd, argv, event, number, slow, half}: train in a forked process (a start of
    Python would take two seconds each time) and answer with its status, how many events it saw, and what it said."""
    torch.set_num_threads(1)
    p = torch.nn.Parameter(torch.zeros(1))
    p.grad = torch.zeros(1)
    torch.optim.AdamW([p], fused=True).step()  # imports what torch imports late, once for all children
    for line in sys.stdin:
        job = json.loads(line)
        os.chdir(job["cwd"])
        Path("said").write_text("")
        if not (child := os.fork()):
            status = 1
            try:
                train.print_results = lambda setup: None
                if job.get("slow"):
                    checkpoints.save_file = slowly(job.get("half"))
                count = dies_at(job["event"], job.get("number", signal.SIGKILL)) if "event" in job else [0]
                status, _, said = run_quietly(train, *job["argv"])
                sys.setprofile(None)
                Path("said").write_text(json.dumps({"events": count[0], "err": said}))
            finally:
                os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(json.dumps({"status": status, **json.loads(Path("said").read_text() or "{}")}), flush=True)


if __name__ == "__main__":
    serve()
