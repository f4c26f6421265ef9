"""Shared by all tests: the import path, the mark `slow`, and where real weights and benchmark data are.

`python -m pytest` leaves out the tests marked slow; `python -m pytest -m slow` runs only those. $PERSONAFUSE_WEIGHTS
names the folder with real checkpoints, $PERSONAFUSE_BENCHMARKS that with the public benchmarks' data. Tests that need
them are skipped if they are not set. No test uses the network.
"""
import os
import signal
import sys
from pathlib import Path

import pytest
import torch

# The tests are small. A second thread, here or in a process that a test starts, would only wait for the first.
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")
torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a process that a shell starts in the background ignores it
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes minutes; run with -m slow")
    if not config.option.markexpr:
        config.option.markexpr = "not slow"


def folder_named_by(variable, what):
    """The folder that an environment variable names. Skips the test if the variable is not set."""
    if not os.environ.get(variable):
        pytest.skip(f"{what} are not here: set {variable} to the folder that holds them")
    return Path(os.environ[variable])


@pytest.fixture(scope="session")
def weights():
    """The folder with SmolLM2-135M-Instruct, Qwen2.5-Coder-0.5B-Instruct and Llama-3.1-tokenizer."""
    return folder_named_by("PERSONAFUSE_WEIGHTS", "real weights")


@pytest.fixture(scope="session")
def published():
    """The folder that holds emobench/ eqbench/ tombench/ safetybench/ gpqa/ as published, and golden/."""
    return folder_named_by("PERSONAFUSE_BENCHMARKS", "the benchmarks' data")
