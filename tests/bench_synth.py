"""Throughput of model.generate against transformers.generate: the same weights, prompts and greedy tokens, batch 16.

    python tests/bench_synth.py --weights FOLDER/SmolLM2-135M-Instruct                # replies of equal length
    python tests/bench_synth.py --weights FOLDER/SmolLM2-135M-Instruct --natural      # each ends where it ends

The two take turns, A B A B, after a warm-up of both; the table has medians and the fastest and slowest run. Tokens are
those of the replies, up to each one's end. fp32 on a CPU, bf16 on a GPU.
"""
import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from transformers import AutoModelForCausalLM

from model import Chat, Transformer, generate
from synth import pick_device, pick_dtype, template_records


def throughput(folder, batch=16, steps=64, rounds=3, natural=False, device=None):
    """-> {"ours" | "transformers": seconds of each round}, tokens of the replies, how many of the replies are equal."""
    device = pick_device(device)
    dtype = pick_dtype(None, device)
    ours, chat = Transformer.from_pretrained(folder, dtype, device), Chat.from_dir(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
    stops = sorted(chat.stops)
    prompts = [chat.prompt([{"role": "user", "content": r["query"]}]) for r in template_records("train", batch)]
    width = max(map(len, prompts))
    ids = torch.tensor([[stops[0]] * (width - len(p)) + p for p in prompts], device=device)  # padded on the left
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)

    def run_ours(steps):
        return generate(ours, prompts, None, steps, stops=chat.stops if natural else ())

    def run_theirs(steps):
        out = theirs.generate(input_ids=ids, attention_mask=mask, max_new_tokens=steps, do_sample=False,
                              min_new_tokens=None if natural else steps, eos_token_id=stops, pad_token_id=stops[0])
        replies = out[:, width:].tolist()
        ends = [next((i + 1 for i, t in enumerate(r) if natural and t in chat.stops), len(r)) for r in replies]
        return [r[:end] for r, end in zip(replies, ends)]
    seconds, replies = {"ours": [], "transformers": []}, {}
    with torch.no_grad():
        for name, run in (("ours", run_ours), ("transformers", run_theirs)):
            run(2)
        for _ in range(rounds):
            for name, run in (("ours", run_ours), ("transformers", run_theirs)):
                began = time.perf_counter()
                replies[name] = run(steps)  # lists of numbers: the device has finished
                seconds[name].append(time.perf_counter() - began)
                print(f"{name}: {seconds[name][-1]:.2f} s", file=sys.stderr, flush=True)
    same = sum(a == b for a, b in zip(replies["ours"], replies["transformers"]))
    return seconds, sum(map(len, replies["ours"])), same, [len(r) for r in replies["ours"]]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", required=True, help="a model folder")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=64, help="most tokens of a reply")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--natural", action="store_true", help="replies end where they end")
    parser.add_argument("--device")
    args = parser.parse_args()
    seconds, tokens, same, lengths = throughput(args.weights, args.batch, args.steps, args.rounds, args.natural,
                                                args.device)
    print(f"{Path(args.weights).name}, batch {args.batch}, {torch.get_num_threads()} threads, {args.rounds} rounds; "
          f"{tokens} tokens, lengths {min(lengths)} to {max(lengths)}; {same} of {args.batch} replies equal")
    for name, found in seconds.items():
        middle = statistics.median(found)
        print(f"  {name:<14}{tokens / middle:>8.1f} tokens/s   {middle:.2f} s [{min(found):.2f}, {max(found):.2f}]")
    ours, theirs = (statistics.median(found) for found in seconds.values())
    print(f"  {theirs / ours:.2f} times as fast")


if __name__ == "__main__":
    main()
