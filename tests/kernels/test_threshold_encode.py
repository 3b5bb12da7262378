"""Triton's threshold_encode where the op tests don't lead: stripes, parts, row blocks, too little room."""

import pytest
import torch
from backends import missing, running
from oracle import integers
from test_threshold_encode_cuda import assert_same_as_reference

import fastsparse

BACKENDS = [name for name in ("triton-interpreted", "triton-gpu") if missing(name) is None]
M = 2100  # two stripes of two parts and a part of one
TOKENS = 70  # two row blocks of 32 and a part

if not BACKENDS:
    pytest.skip(f"Triton's kernels: {missing('triton-interpreted')}", allow_module_level=True)

from fastsparse.kernels import threshold_encode as kernel  # noqa: E402


@pytest.fixture(params=BACKENDS, autouse=True)
def backend(request, monkeypatch):
    """Runs a test on Triton's kernels with limits so low that small shapes reach every path."""
    monkeypatch.setattr(kernel, "_MOST_TOKENS", 32)
    monkeypatch.setattr(kernel, "_PART", 512)
    monkeypatch.setattr(kernel, "_LEAST_SCORES", 32 * 1024)
    monkeypatch.setattr(kernel, "_MOST_SCORES", 32 * 1024)
    monkeypatch.setattr(kernel, "_LEAST_ROOM", 64)
    with running(request.param):
        yield request.param


@pytest.mark.parametrize(
    ("dtype", "threshold"), [(torch.float32, 9.0), (torch.bfloat16, -torch.inf)], ids=str
)
def test_stripes_parts_and_row_blocks(dtype, threshold):
    """Some pass, or more than are expected: these are found twice."""
    x, weight = integers(TOKENS, 3, seed=1, dtype=dtype), integers(M, 3, seed=2, dtype=dtype)
    x[[3, 40]] = torch.nan
    assert_same_as_reference(x, weight, threshold=threshold)
    bias, bounds = integers(M, seed=3, dtype=dtype), threshold + integers(M, seed=4)
    assert_same_as_reference(x[:33], weight, bias, threshold=bounds, activation="abs", max_entries=33 * M + 9)


@pytest.mark.parametrize("eligible", [0, 6, 1100])
@pytest.mark.parametrize("last", [False, True])
def test_stripes_behind_the_eligible_are_skipped(eligible, last):
    mask = torch.arange(M) < eligible
    mask = mask.flip(0) if last else mask
    x, weight, bias = integers(40, 3, seed=1), integers(M, 3, seed=2), integers(M, seed=3)
    assert_same_as_reference(x, weight, bias, threshold=5.0, latent_mask=mask)


@pytest.mark.parametrize("room", [0, 100])
def test_overflow_in_a_graph_leaves_nan(monkeypatch, room):
    x, weight = integers(40, 3, seed=1), integers(M, 3, seed=2)
    right = fastsparse.threshold_encode(x, weight, threshold=9.0)
    refusal = rf"number of entries \({len(right.values)}\), got max_entries={room}"
    with pytest.raises(RuntimeError, match=refusal):
        fastsparse.threshold_encode(x, weight, threshold=9.0, max_entries=room)
    monkeypatch.setattr(kernel, "capturing", lambda: True)
    values, indices, offsets = fastsparse.threshold_encode(x, weight, threshold=9.0, max_entries=room)
    assert values.shape == indices.shape == (room,)
    assert values.isnan().all()
    assert not indices.any()
    assert torch.equal(offsets, right.offsets.clamp(max=room))
