"""torch.compile for training steps and for decoding: optional, the results stay the same.
"""
import importlib.util
import os
import shutil

import torch

from model import Cache
from support.files import UserError


def check_compiler(device):
    """UserError if torch.compile finds nothing to compile with."""
    if device.type == "cuda" and not importlib.util.find_spec("triton"):
        raise UserError("--compile needs Triton on a GPU: pip install triton, or leave --compile out")
    if device.type != "cuda" and not any(map(shutil.which, [os.environ.get("CXX", ""), "g++", "clang++"])):
        raise UserError("--compile needs a C++ compiler on a CPU, and there is neither g++ nor clang++: install one, "
                        "or leave --compile out")




def compile_decoding(model):
    """Let torch.compile have a decoding step whole, for `generate`; on a GPU it becomes a CUDA graph. By itself a step
    is some thousand small operations, which take longer to start than to compute. The first step compiles, which takes
    minutes, once for one row and once for several, whatever their number, and anew with a gate or without one."""
    check_compiler(model.device)

    def decode(ids, gate, k, v, lengths):
        """A step as a function of tensors: ids (B, 1), gate (B, E) or None, each layer's keys and values, which it
        extends, and the rows' lengths (B,) -> logits (B, V)."""
        cache = Cache(k, v, lengths, k[0].shape[2] - 1, prefill=False)
        return model.head(model.hidden(ids, gate, cache)[:, 0])

    mode = "reduce-overhead" if model.device.type == "cuda" else "default"
    model.decode, model.kept = torch.compile(decode, fullgraph=True, dynamic=True, mode=mode), {}


def compile_layers(model):
    """Let torch.compile have the layers of a model, without graph breaks and for sizes of all kinds at once: all but the
    last, which is unlike the others and would be compiled for itself alone. The first step compiles, and the first
    batch of a single row, for which PyTorch always makes a graph of its own."""
    check_compiler(model.device)
    for block in model.model.layers[:-1]:
        block.compile(dynamic=True, fullgraph=True)
