"""Speed and memory, beside what a user would otherwise take: `transformers` and `peft`, with the same weights.

Every table comes from interleaved runs (A B A B …) in one process: absolute times are noise, ratios of neighbours are
not. Shown are each one's median, the ratio to the first of its table (median over the rounds, and the middle half of
them in brackets), and what this machine can do at most: matrix products and memory bandwidth, measured on the spot.

    python tests/bench.py step                       # random weights of SmolLM2-135M's shape
    python tests/bench.py generate --weights weights/SmolLM2-135M-Instruct
    python tests/bench.py gpu                        # what wants a GPU, at the 8B's shape

pytest does not collect this file.
"""
import argparse
import gc
import os
import statistics
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
warnings.filterwarnings("ignore")

import torch

from lora import EXPERTS, TARGETS, add_experts, expert_layers, merged
from model import CONFIGS, Config, Transformer, generate
from train import Example, row_losses


# ----------------------------------------------------------------------------------------------------------------------
# The harness

def wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleaved(runs, rounds, device=torch.device("cpu")):
    """{name: function} -> {name: seconds of each round}; one round to warm up, then all in turn, `rounds` times."""
    times = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            gc.collect()
            wait(device)
            began = time.perf_counter()
            run()
            wait(device)
            if turn:
                times[name].append(time.perf_counter() - began)
    return times


def table(title, times, extra=None):
    """Print medians, and ratios of neighbours to the first name."""
    first = next(iter(times.values()))
    print(f"\n{title}\n\n  {'':<44}{'median':>10}   ratio to the first [middle half]")
    for name, found in times.items():
        ratios = sorted(t / f for t, f in zip(found, first))
        q = len(ratios) // 4
        print(f"  {name:<44}{statistics.median(found) * 1e3:>7.0f} ms   {statistics.median(ratios):.2f} "
              f"[{ratios[q]:.2f}, {ratios[-1 - q]:.2f}]" + (f"   {extra[name]}" if extra and name in extra else ""))
    sys.stdout.flush()


def ceiling(device, dtype):
    """This machine's rate of matrix products (FLOP/s) and its memory bandwidth (B/s), the best of ten."""
    n = 2048 if device.type == "cpu" else 8192
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    big = torch.ones((1 << 28) // 4 if device.type == "cpu" else 1 << 30, device=device)
    products = interleaved({"mm": lambda: a @ b, "sum": lambda: big.sum()}, 10, device)
    return 2 * n ** 3 / min(products["mm"]), big.nbytes / min(products["sum"])


# ----------------------------------------------------------------------------------------------------------------------
# The same weights, ours and theirs

def reference(config):
    """A `transformers` model of this shape."""
    import transformers
    shape = dict(vocab_size=config.vocab_size, hidden_size=config.dim, intermediate_size=config.hidden_dim,
                 num_hidden_layers=config.n_layers, num_attention_heads=config.n_heads,
                 num_key_value_heads=config.n_kv_heads, head_dim=config.head_dim, rms_norm_eps=config.norm_eps,
                 rope_theta=config.rope_theta, tie_word_embeddings=config.tied, max_position_embeddings=8192)
    kind = "Qwen2" if config.qkv_bias else "Llama"
    settings = getattr(transformers, kind + "Config")(**shape)
    return getattr(transformers, kind + "ForCausalLM")(settings)


def pair(args):
    """(our model, theirs) with the same weights, random of the shape --shape, or those in --weights."""
    config = Config.from_dir(args.weights) if args.weights else CONFIGS[args.shape]
    if args.layers:
        config = replace(config, n_layers=args.layers)
    torch.manual_seed(0)
    ours = Transformer.from_pretrained(args.weights, args.dtype, args.device) if args.weights else \
        Transformer(config).to(args.device, args.dtype)
    theirs = reference(replace(config, rope_scaling=None)).to(args.device, args.dtype)
    theirs.load_state_dict(ours.state_dict(), strict=False)
    theirs.tie_weights()
    theirs.generation_config.eos_token_id = theirs.generation_config.pad_token_id = None
    return ours, theirs


def with_experts(model, n_experts=10, rank=8):
    """Experts beside every layer, with B as if it had been trained -> the trainable parameters."""
    parameters = add_experts(model, n_experts, rank, 2 * rank)
    for layer in expert_layers(model).values():
        torch.nn.init.normal_(layer.B, std=0.01)
    return parameters


def gates(n, device, n_experts=10):
    return torch.randn(n, n_experts, device=device).softmax(-1)


# ----------------------------------------------------------------------------------------------------------------------
# step

def step(args):
    """A training step: forward, loss, backward, optimiser."""
    import peft
    ours, theirs = pair(args)
    rows, length = 4, 129  # 4 × 128 = 512 supervised tokens
    ids = torch.randint(ours.config.vocab_size, (rows, length), device=args.device)
    optimizer = torch.optim.AdamW(with_experts(ours), fused=True)
    gate = gates(rows, args.device).requires_grad_()
    settings = peft.LoraConfig(r=8, lora_alpha=16, target_modules=list(TARGETS))
    theirs = peft.get_peft_model(theirs, settings, EXPERTS[0])
    for prompt, share in ((1, "all"), (43 * 2, "a third")):
        batch = [Example(str(i), None, row.numpy(), prompt) for i, row in enumerate(ids.cpu())]
        labels = ids.clone()
        labels[:, :prompt] = -100

        def step_ours():
            loss = row_losses(ours, batch, gate).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        def step_theirs(names):
            trained = [p for p in theirs.parameters() if p.requires_grad]
            adam = torch.optim.AdamW(trained, fused=True)

            def run():
                theirs.base_model.set_adapter(names)
                loss = theirs(input_ids=ids, labels=labels).loss
                loss.backward()
                adam.step()
                adam.zero_grad()
            return run

        runs = {"peft, one adapter": step_theirs(EXPERTS[0]), "PersonaFuse, ten experts": step_ours}
        table(f"Training step, {rows} x {length} tokens, {share} of them supervised", interleaved(runs, args.rounds))
    for name in EXPERTS[1:]:
        theirs.add_adapter(name, settings)
    theirs.base_model.set_adapter(list(EXPERTS))
    runs = {"peft, ten adapters": step_theirs(list(EXPERTS)), "PersonaFuse, ten experts": step_ours}
    table("The same, beside ten adapters", interleaved(runs, max(3, args.rounds // 2)))


# ----------------------------------------------------------------------------------------------------------------------
# generate

def decode(args):
    """Greedy generation, and what experts cost in it."""
    ours, theirs = pair(args)
    base = Transformer(ours.config).to(args.device, args.dtype)
    base.load_state_dict(ours.state_dict())
    with_experts(ours)
    new = 64
    for rows in (1, 16):
        ids = torch.randint(3, ours.config.vocab_size, (rows, 64), device=args.device)
        prompts, gate = ids.tolist(), gates(rows, args.device)
        mask = torch.ones_like(ids)
        runs = {"PersonaFuse, no experts": lambda: generate(ours, prompts, None, new),
                "transformers.generate": lambda: theirs.generate(
                    ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False),
                f"PersonaFuse, {rows} gate(s)": lambda: generate(ours, prompts, gate, new)}
        if rows == 1:
            base.load_state_dict(merged(ours, gate[0]))
            runs["PersonaFuse, merged for one gate"] = lambda: generate(base, prompts, None, new)
        table(f"Generation, {rows} x 64 tokens of prompt, {new} new ones", interleaved(runs, args.rounds))


COMMANDS = {"step": step, "generate": decode}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=[*COMMANDS])
    parser.add_argument("--weights", help="a model folder; else random weights")
    parser.add_argument("--shape", default="SmolLM2-135M", choices=CONFIGS)
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--rounds", type=int, default=10)
    args = parser.parse_args()
    args.device, args.dtype = torch.device("cpu"), torch.float32
    rate, bandwidth = ceiling(args.device, args.dtype)
    print(f"{args.device}, {torch.get_num_threads()} threads, {args.dtype}: at most {rate / 1e9:.0f} GFLOP/s in matrix "
          f"products, {bandwidth / 1e9:.1f} GB/s from memory")
    COMMANDS[args.what](args)


if __name__ == "__main__":
    main()
