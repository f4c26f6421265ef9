"""Weights in 8 bits: how --int8 rounds a frozen weight, and the product with it."""
import torch


def quantise(weight):
    """Round a weight W (out, in) to 8 bits. Returns q (out, in), int8, and each row's scale s (out,), fp32: W ≈ s q.

    The largest absolute value of a row becomes 127 or −127, and no weight moves by more than half of its row's step s.
    """
    q = torch.empty_like(weight, dtype=torch.int8)
    s = torch.empty(len(weight), dtype=torch.float32, device=weight.device)
    # Some rows at a time: fp32 copies of a whole weight would be the peak of memory while a model is loaded. On a CPU
    # few rows: large copies, freed between weights that stay, fragment memory. With 256 rows, the 8B took 1.2 GB more.
    n = max(1, (2**16 if weight.device.type == "cpu" else 2**22) // weight.shape[1])
    for w_rows, q_rows, s_rows in zip(weight.split(n), q.split(n), s.split(n)):
        s_rows.copy_(w_rows.abs().amax(1).float() / 127)
        s_rows.clamp_(min=torch.finfo(torch.float32).tiny)  # a row of zeros must not be divided by zero
        q_rows.copy_((w_rows / s_rows[:, None]).round_())
    return q, s


class Int8Product(torch.autograd.Function):
    """The product with a frozen weight in 8 bits: F.linear(x, s[:, None] * q).

    Forward and backward each cast q to x's dtype, which rounds nothing, and drop the copy: only q and s are kept for
    backward. The scales multiply the product, not the weights: that is less work when few rows are multiplied, and about
    as accurate (docs/results.md).
    """

    @staticmethod
    def forward(ctx, x, q, s):  # (…, in), (out, in), (out,)
        ctx.save_for_backward(q, s)
        # q.T is cast here and q in backward. Were both written alike, torch.compile would cast once, and keep the copy
        # until backward.
        return (x @ q.T.to(x.dtype)).mul_(s)  # (…, out); mul_ computes in fp32 and rounds to the product's dtype

    @staticmethod
    def backward(ctx, upstream):  # (…, out)
        q, s = ctx.saved_tensors
        # upstream * s would be a tensor in fp32
        return upstream.clone().mul_(s) @ q.to(upstream.dtype), None, None
