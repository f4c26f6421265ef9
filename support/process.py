"""Process-level code: torchrun's process group, signals that stop training, and a setting of malloc."""
import ctypes
import os
import signal
import threading
from contextlib import contextmanager, suppress

import torch
import torch.distributed as dist
# PyTorch's optimisers import this module. If it were imported after the process group is made, its functions would
# hold the group as a default value. The group's threads would then outlive destroy_process_group and could abort the
# process.
import torch.distributed.nn  # noqa: F401

from support.files import UserError


def rank_and_world_size():
    """(rank, world size) under torchrun, else (0, 1)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def join_process_group(device, batch_sizes):
    """Join the processes that torchrun started. Returns this process's device; without torchrun that is `device`.

    batch_sizes: {stage: rows of a step}. UserError where a step has fewer rows than there are processes.
    """
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if world_size == 1:
        return device
    for stage, rows in batch_sizes.items():
        if rows < world_size:
            raise UserError(f"--batch of {stage} is {rows}, but there are {world_size} processes, and each needs at "
                            "least one row of a step")
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return device


def all_reduce_sum(tensors):
    """Sum each tensor over all processes, in place."""
    for work in [dist.all_reduce(tensor, async_op=True) for tensor in tensors]:
        work.wait()


def any_process_wants_to_stop(stop):
    """Whether `stop()` is true in any process, so that all processes end after the same step."""
    flag = torch.tensor(float(stop()))
    if rank_and_world_size()[1] > 1:
        all_reduce_sum([flag])
    return flag.item() > 0


@contextmanager
def stop_on_signal():
    """Yield a threading.Event that Ctrl-C (SIGINT) or SIGTERM sets. Training then finishes its step, saves and ends.

    A second signal ends the process at once. Under torchrun it does not, because torchrun always sends two.
    """
    stop, numbers = threading.Event(), (signal.SIGINT, signal.SIGTERM)
    previous = {number: signal.getsignal(number) for number in numbers}

    def restore():
        for number in numbers:
            signal.signal(number, previous[number])

    def ask_to_stop(*_):
        stop.set()
        if "TORCHELASTIC_RUN_ID" not in os.environ:  # torchrun sets it, also for one process
            restore()

    for number in numbers:
        signal.signal(number, ask_to_stop)
    try:
        yield stop
    finally:
        restore()


def keep_freed_memory():
    """Make glibc's malloc keep freed memory instead of handing it back to the system. Other C libraries do not change.

    A training step needs as much memory as the one before it. Handed back, this memory returns page by page: a step of
    512 tokens of SmolLM2 takes 100,000 page faults, 4 % of its time on two virtual cores.
    """
    with suppress(AttributeError, TypeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: up to 2 GiB of free memory stay at the heap's end
        mallopt(-3, 2**25)      # M_MMAP_THRESHOLD: blocks below 32 MiB (glibc's maximum) come from the heap
