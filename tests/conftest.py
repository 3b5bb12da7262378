"""Fixtures of the whole suite."""

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

# Before anything imports Triton, which asks once.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pairs
from backends import backend_names, running

# Processes that share the machine share its processors too. A test of threads sets how many it wants.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    torch.set_num_threads(max(1, torch.get_num_threads() // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])))

# The same examples every time: a failure on one machine is a failure on all.
# The backend fixture holds for every example of a test, as it should.
settings.register_profile(
    "fastsparse",
    deadline=None,
    derandomize=True,
    max_examples=40,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("fastsparse")


def pytest_addoption(parser):
    parser.addoption(
        "--exhaustive", action="store_true", help="run every combination of parameters, not every pair"
    )


@pytest.hookimpl(trylast=True)  # after what -k leaves
def pytest_collection_modifyitems(config, items):
    if not config.getoption("exhaustive"):
        items[:], left_out = pairs.of_items(items)
        config.hook.pytest_deselected(items=left_out)


@pytest.fixture(params=backend_names())
def backend(request) -> str:
    """Runs the test once on every backend that can run here, compiled ones at every instruction-set level."""
    with running(request.param):
        yield request.param


@pytest.fixture
def threads():
    """Restores the number of threads that the test sets."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
