"""The product with a weight matrix: F.linear, and a faster way to decode on AMD CPUs.

`linear` gives what F.linear gives, up to rounding. When a model writes a reply, each step multiplies one row of numbers
with every weight matrix, and the time goes into reading the weights. On AMD CPUs the matrix library leaves such a
product to one thread, on Intel CPUs it uses all of them. On AMD, `linear` therefore cuts the weight into blocks, which
the threads share.

Measured: decoding SmolLM2-135M at batch 1 takes 0.71 [0.66, 0.78] of the time with F.linear on two AMD EPYC cores
(7 interleaved pairs of 24 tokens, FEW_ROWS 16 against 0). On an Intel CPU blocks take twice as long as F.linear.
`python tests/bench.py generate` measures decoding on this machine.
"""
import torch
from torch.nn import functional as F

ON_AMD = "AMD" in getattr(torch.cpu, "get_capabilities", dict)().get("cpu_name", "")
FEW_ROWS = 16 if ON_AMD else 0  # products of more rows are left to F.linear; from 32 rows on blocks gain nothing
BLOCKS = 8                      # more blocks are not faster


def linear(x, weight, bias=None):
    """F.linear: x (…, in), weight (out, in), bias (out) or None. Returns (…, out). On an AMD CPU,
    without gradients, at most FEW_ROWS rows of fp32 are multiplied with a large weight block by block."""
    if (torch.is_grad_enabled() or x.device.type != "cpu" or x.dtype != torch.float32 or weight.numel() < 2**18
            or len(weight) % BLOCKS or x.numel() > FEW_ROWS * x.shape[-1]):
        # x's size is compared last: a layer that torch.compile has compiled would otherwise be bound to this size
        return F.linear(x, weight, bias)
    out, width = weight.shape
    rows = x.numel() // width
    y = torch.bmm(weight.view(BLOCKS, -1, width), x.reshape(rows, width).T.expand(BLOCKS, -1, -1))  # (8, out/8, rows)
    y = y.view(out, rows).T.reshape(*x.shape[:-1], out)
    return y if bias is None else y + bias
