"""What concerns the process and not the method: torchrun's processes, and how malloc treats freed memory.
"""
import ctypes
import os
from contextlib import suppress

import torch
import torch.distributed as dist
# PyTorch's optimisers import this module. Were it after the group is made, its functions would keep the group as a
# default value, whose threads outlive destroy_process_group then: they may abort the process while Python ends.
import torch.distributed.nn  # noqa: F401

from support.files import UserError


def rank_and_world_size():
    """(number of this process, how many there are) of those that torchrun started; (0, 1) alone."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def join_process_group(setup, settings):
    """Join the processes that torchrun started, each with a GPU of its own -> the number of this one, 0 if alone."""
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if world_size == 1:
        return 0
    for stage, s in settings.items():
        if s["batch"] < world_size:
            raise UserError(f"{world_size} processes share {s['batch']} rows of a {stage} step: give a larger --batch")
    if setup.device.type == "cuda":
        setup.device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(setup.device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if setup.device.type == "cuda" else "gloo")
    return rank_and_world_size()[0]


def all_reduce_sum(tensors):
    """Sum each tensor over all processes, in place."""
    for work in [dist.all_reduce(tensor, async_op=True) for tensor in tensors]:
        work.wait()


def any_process_wants_to_stop(stop, world_size):
    """Whether any of `world_size` processes was asked to stop: all of them end after the same step."""
    flag = torch.tensor(float(stop()))
    if world_size > 1:
        all_reduce_sum([flag])
    return flag.item() > 0


def keep_freed_memory():
    """Have glibc's malloc keep what is freed. As a rule it hands memory back to the system, and the next step, which
    needs as much, gets it page by page: in one with 512 tokens of SmolLM2 a hundred thousand pages, 4 % of its time on
    two virtual cores. Other C libraries go on as they do."""
    with suppress(AttributeError, TypeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: what is free at the heap's end stays, up to 2 GiB
        mallopt(-3, 2**25)      # M_MMAP_THRESHOLD: less than 32 MiB, glibc's maximum, comes from the heap
