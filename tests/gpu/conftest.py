"""Fixtures of the tests that need a GPU: every one of them is marked ``gpu`` and skipped where there is none.

With REHEARSE_GPU_TESTS=1 those that need nothing of CUDA but its tensors run on CPU tensors and our CPU
backends instead: a trial of the tests themselves.
"""

import os
from pathlib import Path

import pytest
import torch

import fastsparse

REHEARSAL = os.environ.get("REHEARSE_GPU_TESTS") == "1"
HERE = Path(__file__).parent


def pytest_collection_modifyitems(items) -> None:
    for item in items:
        if HERE in item.path.parents and item.path.name not in ("test_first.py", "test_suite.py"):
            item.add_marker(pytest.mark.gpu)


@pytest.fixture
def device():
    """The device of the test's tensors; the test answers for every fault that it left on it."""
    if REHEARSAL:
        yield torch.device("cpu")
        return
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    yield torch.device("cuda", torch.cuda.current_device())
    torch.cuda.synchronize()


@pytest.fixture
def cuda(device):
    """The same where it must be a CUDA device: the memory that earlier tests held is given back."""
    if device.type != "cuda":
        pytest.skip("can't be rehearsed on a CPU")
    torch.cuda.empty_cache()
    return device


def require(described: fastsparse.Backend) -> None:
    """Skips the test where a backend can't run, or fails it where CUDA is insisted on, as suite.py does."""
    if not described.available:
        (pytest.fail if os.environ.get("FASTSPARSE_CUDA") == "1" else pytest.skip)(str(described))


@pytest.fixture(params=["reference", "cpu"] if REHEARSAL else ["triton", "cuda"])
def backend(request, device):
    """Runs the test once on each backend for GPUs."""
    require(fastsparse.backends()[request.param])
    with fastsparse.use_backend(request.param):
        yield request.param
