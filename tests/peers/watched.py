"""A pytest plugin for the libraries' own tests: writes down what became of each, and of our ops under them.

``run.py`` calls it. It is told by FASTSPARSE_PEERS_LIBRARY of which library the tests are, by
FASTSPARSE_PEERS_APPLY=1 to put our ops under it, and by FASTSPARSE_PEERS_OUTPUT where to write.
"""

import json
import os
import random
import sys
import time
from importlib import import_module
from pathlib import Path

import pytest
import torch

LIBRARY = os.environ.get("FASTSPARSE_PEERS_LIBRARY", "")
APPLY = os.environ.get("FASTSPARSE_PEERS_APPLY") == "1"
# Of pytest's phases the worst counts: a test that passes and can't be taken down is an error.
WORSE = ("passed", "xpassed", "skipped", "xfailed", "failed", "error")

tests: dict[str, dict] = {}


def _make_importable() -> None:
    """On a machine without a GPU and with what .venv-peers has."""
    if LIBRARY == "sparsify" and not torch.cuda.is_available():
        os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # its documented switch, read at import
    if LIBRARY == "overcomplete":
        from benchmarks.peers.overcomplete import stand_in_for_the_package

        stand_in_for_the_package()
    if LIBRARY == "dictionary_learning":
        from benchmarks.peers import dictionary_learning

        dictionary_learning._stand_in_for_nnsight()


def pytest_configure(config) -> None:
    _make_importable()
    if APPLY:
        import_module(LIBRARY)
        import_module(f"fastsparse.compat.{LIBRARY}").apply(least_work=0)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item) -> None:
    """Tests that don't seed what they draw draw the same in both runs."""
    random.seed(0)
    torch.manual_seed(0)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(0)


def pytest_runtest_logreport(report) -> None:
    expected = hasattr(report, "wasxfail")
    outcome = report.outcome
    if outcome == "failed" and report.when != "call":
        outcome = "error"
    if expected:
        outcome = "xfailed" if report.skipped else "xpassed"
    _note(report.nodeid, outcome)


def pytest_collectreport(report) -> None:
    if report.failed:
        _note(report.nodeid, "error")
    elif report.skipped:
        _note(report.nodeid, "skipped")


def _note(name: str, outcome: str) -> None:
    test = tests.setdefault(name, {"outcome": outcome, "seconds": 0.0})
    test["outcome"] = max(test["outcome"], outcome, key=WORSE.index)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """Seconds of processors, which count the same where others use them too."""
    began = time.process_time()
    result = yield
    tests[item.nodeid]["seconds"] = time.process_time() - began
    return result


def pytest_sessionfinish() -> None:
    run = {"tests": tests, "served": {}, "refused": [], "applied": False}
    if APPLY:
        status = import_module(f"fastsparse.compat.{LIBRARY}").status()
        refused = [[site, why, count] for (site, why), count in sorted(status.refused.items())]
        run |= {"served": dict(status.served), "refused": refused, "applied": status.applied}
    Path(os.environ["FASTSPARSE_PEERS_OUTPUT"]).write_text(json.dumps(run, indent=1))
