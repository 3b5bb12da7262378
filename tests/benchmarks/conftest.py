"""The benchmarks are not installed: they are imported from the repository."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))


@pytest.fixture(scope="module")
def small():
    """Few shapes, and so small that their figures mean nothing."""
    from benchmarks import bench_gated_recurrence, bench_recurrence_length, shapes

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shapes, "ALL", (replace(shapes.HEADLINE[0], name="small", N=8),))
        patch.setattr(shapes, "LONG_RECURRENCES", shapes.LONG_RECURRENCES[1:])
        patch.setattr(bench_gated_recurrence, "STEPS", (8, 33))
        patch.setattr(bench_recurrence_length, "LENGTHS", (5, 9))
        yield
