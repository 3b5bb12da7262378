"""Sparse products of ragged codes on GPUs: where kernels cut them, padding, offsets that nobody checked."""

import pytest
import torch
from backends import GPU_BACKENDS, missing, running
from oracle import integers
from torch import Tensor

import fastsparse
from fastsparse import reference

BACKENDS = [name for name in GPU_BACKENDS if not missing(name)]
NAMES = ("spmm", "sddmm", "spmm_t")
every_product = pytest.mark.parametrize("name", NAMES)


def arguments(name: str, counts: list[int], padding: int, M: int, D: int, dtype=torch.float32) -> list:
    """Of a code whose tokens have so many entries; what its padding touches is infinite, or NaN."""
    ends = torch.tensor(counts, dtype=torch.int64).cumsum(0)
    live, N = sum(counts), len(counts)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), ends])
    values, indices = integers(live + padding, seed=1, dtype=dtype), torch.zeros(live + padding).long()
    indices[:live] = torch.randint(1, M, (live,), generator=torch.Generator().manual_seed(2))
    values[live:] = torch.nan
    x, weight = integers(N, D, seed=3, dtype=dtype), integers(M, D, seed=4, dtype=dtype)
    weight[0] = torch.inf
    made = {
        "spmm": (values, indices, weight),
        "sddmm": (x, weight, indices),
        "spmm_t": (values, indices, x, M),
    }
    return [*made[name], offsets]


# Tokens that end at, before and after the places where kernels cut them; a token that has everything, which
# is also a latent that has; tokens without entries at the ends and between; none at all.
COUNTS = {
    "whole pieces": [0, 1, 255, 256, 257, 0, 511, 512, 0, 513, 768, 0],
    "few": [3, 0, 0, 9, 1, 0, 31, 2],
    "all in one": [0, 0, 1500, 0],
    "one": [1],
    "only padding": [0, 0, 0],
    "no token": [],
}


@every_product
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("padding", [0, 5, 700])
@pytest.mark.parametrize(("M", "D"), [(2, 1), (300, 1), (2, 4), (40, 33), (300, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_tokens_of_any_length(backend, name, counts, padding, M, D, dtype):
    made = arguments(name, COUNTS[counts], padding, M, D, dtype)
    with running(backend):
        out = getattr(fastsparse, name)(*made)
    assert torch.equal(out, getattr(reference, name)(*made))


@every_product
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("offsets", "says"),
    [
        ([1, 3, 9], "begin at 0, got 1"),
        ([0, 7, 6], r"not decrease, got 6 after 7 at 2"),
        ([0, 3, 10], r"end at the number of entries \(9\), got 10; what lies behind"),
        ([0, 3, 8], r"end at the number of entries \(9\), got 8; what lies behind"),
    ],
    ids=str,
)
def test_offsets_that_are_none(backend, name, offsets, says):
    *made, _ = arguments(name, [3, 6], 0, 5, 4)
    with running(backend), pytest.raises(ValueError, match=f"^{name}: offsets must {says}"):
        getattr(fastsparse, name)(*made, torch.tensor(offsets))


@every_product
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "triton-interpreted"])  # it checks
@pytest.mark.parametrize("D", [1, 4])
def test_offsets_that_nobody_checked_lead_nowhere_outside(backend, name, D):
    """A GPU takes them on trust: emulators raise where memory that isn't the kernel's is touched."""
    *made, right = arguments(name, [3, 0, 1497], 0, 5, D)

    def run(*offsets: int) -> Tensor:
        return GPU_BACKENDS[backend].run(name, *made, torch.tensor(offsets))

    assert torch.equal(run(-(2**40), 3, 3, 2**40), run(*right.tolist()))
    run(1490, 20, -1, 3000)
