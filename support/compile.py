"""torch.compile for training (the layers) and for generation (the decoding step). Optional.

Results are the same up to rounding.

As written, a layer or a step starts many small operations, each of which takes longer to start than to compute. The
compiler fuses them. Compiling takes a minute or more, when a layer or a step is first used.
"""
import importlib.util
import os
import shutil

import torch

from model import Cache, zero_keys_and_values
from support.files import UserError

# The keys and values of a compiled step have room for a multiple of this many tokens. On a GPU, each size needs another
# CUDA graph, so few sizes are better.
ROOM = 256


def check_compiler(device):
    """UserError if torch.compile has no compiler to call."""
    if device.type == "cuda" and not importlib.util.find_spec("triton"):
        raise UserError("--compile needs Triton on a GPU: pip install triton, or leave --compile out")
    where, language, variable, *names = "CPU", "C++", "CXX", "g++", "clang++"
    if device.type == "cuda":  # Triton starts its kernels through a module that it compiles
        where, language, variable, *names = "GPU", "C", "CC", "gcc", "clang"
    if not any(map(shutil.which, [os.environ.get(variable, ""), *names])):
        raise UserError(f"--compile needs a {language} compiler on a {where}, and there is neither "
                        f"{' nor '.join(names)}: install one, or leave --compile out")


class CompiledStep:
    """One decoding step of `generate`, compiled as a whole; on a GPU it becomes a CUDA graph.

    It is compiled for one row and for several, whatever their number, each with and without a gate.
    """

    def __init__(self, model):
        def decode(ids, gate, k, v, lengths):
            """The step as a function of tensors only: ids (B, 1), gate (B, E) or None, each layer's keys and values,
            which it extends, and lengths (B,). Returns logits (B, V)."""
            # the largest `longest` possible: the step reads all memory, of which the mask hides what no row has written
            cache = Cache(k, v, lengths, longest=k[0].shape[2] - 1)
            return model.head(model.hidden(ids, gate, cache)[:, 0])

        mode = "reduce-overhead" if model.device.type == "cuda" else "default"
        self.decode = torch.compile(decode, fullgraph=True, dynamic=True, mode=mode)
        self.kept = {}  # {(rows, size): (k, v)}, the memory of the last call

    def memory(self, model, rows, size):
        """As zero_keys_and_values, for at least `size` tokens. The next call with the same rows and size gets the same
        tensors, because a CUDA graph is bound to its memory."""
        size = -(-size // ROOM) * ROOM
        if (rows, size) not in self.kept:
            self.kept.clear()  # first, so that there is never memory for two
            self.kept[rows, size] = zero_keys_and_values(model, rows, size)
            for tensors in self.kept[rows, size]:
                for tensor in tensors:
                    torch._dynamo.mark_static_address(tensor, guard=False)  # the graph must not copy it
                    torch._dynamo.mark_static(tensor, (1, 3))  # heads and width never vary, rows and size may
        return self.kept[rows, size]

    def __call__(self, ids, gate, cache):
        """Logits (B, V) of the next token: ids (B, 1), gate (B, E) or None, and the cache, which is extended."""
        logits = self.decode(ids, gate, cache.k, cache.v, cache.lengths)
        cache.lengths = cache.lengths + 1
        return logits


def compile_decoding(model):
    """Make `generate` use a compiled step for this model. UserError if there is no compiler."""
    check_compiler(model.device)
    model.compiled_step = CompiledStep(model)


def compile_layers(model):
    """Compile a model's layers for training, without graph breaks and for any number of rows and tokens.

    The last layer is left out: it gets `positions`, unlike the others, and would be compiled for itself alone. PyTorch
    compiles once more for the first batch of a single row. UserError if there is no compiler.
    """
    check_compiler(model.device)
    for block in model.model.layers[:-1]:
        block.compile(dynamic=True, fullgraph=True)
