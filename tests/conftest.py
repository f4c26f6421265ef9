"""Shared by all tests: where the modules are, what `slow` means, and the optional real weights.

`python -m pytest` leaves out what is marked slow; `python -m pytest -m slow` runs just that. Real checkpoints are found
through $PERSONAFUSE_WEIGHTS, the public benchmarks' data through $PERSONAFUSE_BENCHMARKS; without them, tests that need
them skip and say so. Nothing here uses the network.
"""
import os
import sys
from pathlib import Path

import pytest
import torch

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


torch.set_num_threads(1)  # tests are small: a second thread would only wait for the first


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes minutes; run with -m slow")
    if not config.option.markexpr:
        config.option.markexpr = "not slow"


@pytest.fixture(scope="session")
def weights():
    """The folder with SmolLM2-135M-Instruct, Qwen2.5-Coder-0.5B-Instruct and Llama-3.1-tokenizer."""
    path = os.environ.get("PERSONAFUSE_WEIGHTS")
    if not path:
        pytest.skip("real weights are not here: set PERSONAFUSE_WEIGHTS to the folder that holds their model folders")
    return Path(path)
