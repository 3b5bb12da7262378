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


def pytest_configure(config) -> None:
    """Heed the interrupt that says that the time is up: a shell's background jobs ignore it."""
    if not hasattr(config, "workerinput"):
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_xdist_node_collection_finished(ids) -> None:
    """In the process that distributes the tests."""
    Path(os.environ["FASTSPARSE_COLLECTED"]).write_text(json.dumps(ids))


@pytest.hookimpl(trylast=True)
def pytest_runtest_logreport(report) -> None:
    if report.failed and "PYTEST_XDIST_WORKER" in os.environ and torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            os._exit(1)
