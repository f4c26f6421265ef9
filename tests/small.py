"""Models of a few thousand parameters, forty records and a run of twelve steps on them, for tests of whole commands.

Run as a script, this file is a server that trains in processes of its own; test_killed.py uses it.
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
from lora import EXPERTS
from model import Config, Transformer
from support import checkpoints, command
from support.records import write_records

CHAT_TOKENS = {"llama": ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
               "qwen2": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]}


def write_model(folder, family="llama", seed=0):
    """Write a model folder. Each byte is a token; the chat tokens come after the 256 bytes."""
    folder.mkdir(parents=True)
    letters, special = sorted(pre_tokenizers.ByteLevel.alphabet()), CHAT_TOKENS[family]
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"model_type": family, "hidden_act": "silu", "tie_word_embeddings": family == "llama", "vocab_size": 264,
              "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
              "num_key_value_heads": 1, "head_dim": 8, "rms_norm_eps": 1e-5, "rope_theta": 1e4,
              "max_position_embeddings": 200, "eos_token_id": 255 + len(special)}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": special[-1], "chat_template": ""}))
    torch.manual_seed(seed)
    state = Transformer(Config.from_dir(folder)).state_dict()
    save_file({name: t.contiguous() for name, t in state.items()}, folder / "model.safetensors")


def records(n=40):
    """n records. Each pole is active in turn, alone in one record and with another pole in the next."""
    def traits(i):
        poles = [i % 10] if i % 20 < 10 else [i % 10, (i + 2) % 10]
        return {EXPERTS[e].split("_")[1]: 1 - 2 * (e % 2) for e in poles}
    return [{"id": f"r{i}", "query": f"What now, {i}?", "response": f"Wait {'so ' * (i % 4)}{i}.", "traits": traits(i)}
            for i in range(n)]


def make(folder):
    """Write base/, encoder/ and data/ to `folder`."""
    write_model(folder / "base")
    write_model(folder / "encoder", "qwen2", 1)
    for split, n in (("train", 40), ("validation", 4), ("test", 8)):
        write_records(folder / "data" / f"{split}.jsonl", records(n))


TRAIN = ["--preset", "tiny", "--base", "base", "--encoder", "encoder", "--data", "data", "--run", "run", "--steps", "4",
         "--batch", "4", "--tokens", "150", "--rank", "2", "--save-every", "2", "--keep", "2", "--eval-records", "4"]


def run_quietly(program, *argv):
    """Run a program as its command line does. Returns (exit status, standard output, standard error)."""
    out, err, name = io.StringIO(), io.StringIO(), sys.argv[0]
    try:
        sys.argv[0] = f"{program.__name__}.py"
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            command.run_command(lambda: program.main(list(argv)))
    except SystemExit as exit:
        return exit.code or 0, out.getvalue(), err.getvalue()
    finally:
        sys.argv[0] = name


def contents(folder):
    """{name: bytes} of every file below a folder."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def slow_save_file(half=None):
    """A save_file that writes 1,000 bytes at a time, so that a kill can come between two writes. It kills this process
    in the middle of the file whose name begins with `half`."""
    def write(tensors, file, metadata=None):
        data = save(tensors, metadata)
        with open(file, "wb", buffering=0) as out:
            for at in range(0, len(data), 1000):
                if half and file.name.startswith(half) and 2 * at > len(data):
                    os.kill(os.getpid(), signal.SIGKILL)
                out.write(data[at:at + 1000])
    return write


def kill_at(event, number):
    """Send this process the signal `number` at its event-th call or return of a Python or C function.

    Returns a list with the number of events so far.
    """
    count = [0]

    def profile(*_):
        count[0] += 1
        if count[0] == event:
            os.kill(os.getpid(), number)
    sys.setprofile(profile)
    return count


def serve():
    """Train once for each line on standard input, {"cwd", "argv"} and optionally {"event", "number", "slow", "half"}.

    Each training runs in a forked process, since starting Python would take two seconds. The answer is a line with its
    exit status, how many events it had, and what it wrote on standard error.
    """
    torch.set_num_threads(1)
    p = torch.nn.Parameter(torch.zeros(1))
    p.grad = torch.zeros(1)
    torch.optim.AdamW([p], fused=True).step()  # imports what torch imports late, once for all forked processes
    for line in sys.stdin:
        job = json.loads(line)
        os.chdir(job["cwd"])
        Path("answer").write_text("{}")
        if not (child := os.fork()):
            status = 1
            try:
                train.print_results = lambda setup: None
                if job.get("slow"):
                    checkpoints.save_file = slow_save_file(job.get("half"))
                count = kill_at(job["event"], job.get("number", signal.SIGKILL)) if "event" in job else [0]
                status, _, err = run_quietly(train, *job["argv"])
                sys.setprofile(None)
                Path("answer").write_text(json.dumps({"events": count[0], "err": err}))
            finally:
                os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(json.dumps({"status": status, **json.loads(Path("answer").read_text())}), flush=True)


if __name__ == "__main__":
    serve()
