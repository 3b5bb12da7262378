"""Triton's batch_topk_encode where the op tests don't lead: over many blocks of tokens."""

import pytest
import torch
from backends import missing, running
from oracle import integers
from test_batch_topk_encode import assert_same_as_reference

BACKENDS = [name for name in ("triton-interpreted", "triton-gpu") if missing(name) is None]
N, M = 70, 600

if not BACKENDS:
    pytest.skip(f"Triton's kernels: {missing('triton-interpreted')}", allow_module_level=True)

from fastsparse.kernels import batch_topk_encode as kernel  # noqa: E402


@pytest.fixture(params=BACKENDS, autouse=True)
def backend(request, monkeypatch):
    """Runs a test in blocks of 16 tokens."""
    monkeypatch.setattr(kernel, "_MOST_SCORES", 16 * M)
    with running(request.param):
        yield request.param


@pytest.mark.parametrize("total", [1, 300, 16 * M, 16 * M + 1, N * 400])
@pytest.mark.parametrize("masked", [False, True])
def test_ties_over_blocks(total, masked):
    x, weight, bias = integers(N, 3, seed=1), integers(M, 3, seed=2), integers(M, seed=3)
    scale, mask = integers(M, seed=4), torch.arange(M) % 3 > 0 if masked else None
    for activation in ("none", "abs"):
        assert_same_as_reference(x, weight, bias, total=total, activation=activation, scale=scale, mask=mask)


@pytest.mark.parametrize("direction", [1, 0, -1])
def test_rising_and_falling_rows(direction):
    x, weight = direction * torch.arange(N).float().unsqueeze(1), integers(M, 1, seed=1)
    x[40] = torch.nan
    code = assert_same_as_reference(x, weight, total=M + 100)
    assert code.code.row_counts()[40] == M
