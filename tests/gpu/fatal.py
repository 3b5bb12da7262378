"""A pytest plugin of suite.py: what was collected, when the time ends, and a worker whose device has failed.

After a fault on the device nothing more can be run in a process: pytest-xdist then blames the test, and gives
the rest to another worker.
"""

import json
import os
import signal
from pathlib import Path

import pytest
import torch

WORKER = "PYTEST_XDIST_WORKER" in os.environ


def pytest_configure() -> None:
    """An interrupt is said again each second until it is heeded: where a callback swallows it, it is lost."""
    if not WORKER:
        signal.signal(signal.SIGINT, _interrupt)
        signal.signal(signal.SIGALRM, _interrupt)


def _interrupt(*_) -> None:
    signal.alarm(1)
    raise KeyboardInterrupt


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish() -> None:
    if not WORKER:
        signal.alarm(0)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # what was done is being written down


def pytest_xdist_node_collection_finished(ids) -> None:
    """In the process that distributes the tests."""
    Path(os.environ["FASTSPARSE_COLLECTED"]).write_text(json.dumps(ids))


@pytest.hookimpl(trylast=True)
def pytest_runtest_logreport(report) -> None:
    if report.failed and WORKER and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            os._exit(1)
