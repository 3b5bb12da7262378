"""A few of the calls of `make fuzz`, and what it says when one goes wrong."""

import pytest
from backends import GPU_BACKENDS, backend_names
from fuzz import OPS, fuzz

import fastsparse
from fastsparse.ops._library import OPS as RECORDS


def test_every_op_with_kernels_is_called():
    kernels = {op for op, record in RECORDS.items() if record.kernels and not op.endswith("_backward")}
    lacking = ", ".join(sorted(kernels - OPS.keys()))
    assert not lacking, f"{lacking}: tests/test_<op>.py must have a random_call(draw)"


@pytest.mark.parametrize("name", backend_names(screened=True))
def test_random_calls(name):
    said = []
    calls = 3 if name.removesuffix("-screened") in GPU_BACKENDS else 6
    report = fuzz(range(calls), backends=[name], say=said.append)
    assert not report.failed, "\n".join(said)
    assert sum(report.calls.values()) + report.left_out == calls


def test_a_wrong_answer_is_found_and_had_again(monkeypatch):
    right, said = fastsparse.topk_encode, []

    def wrong(*arguments, **options):
        values, indices = right(*arguments, **options)
        return values, indices.roll(1, dims=1)

    monkeypatch.setattr(fastsparse, "topk_encode", wrong)
    report = fuzz(range(100, 104), backends=["reference"], ops=["topk_encode"], say=said.append)
    assert report.failed
    seed = report.failed[0]
    assert f"make fuzz SEED={seed} CALLS=1 OP=topk_encode BACKEND=reference" in said[0]
    alone = []
    assert fuzz([seed], backends=["reference"], ops=["topk_encode"], say=alone.append).failed == [seed]
    assert alone[0] == said[0]
