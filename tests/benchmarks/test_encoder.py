"""topk_encode from within: what a screen's lists hold, and other sizes of blocks, tried without a GPU."""

import pytest
import torch
from backends import GPU_BACKENDS, leave_out, missing, running
from oracle import random

import fastsparse
from benchmarks import encoder
from benchmarks.harness import Contender
from fastsparse import backend

N, D, k = 9, 32, 5
LATENTS = {"cuda": 4200, "triton": 1200}  # two lists a token; more than what one holds
KERNELS = {"cuda": "cuda-emulated", "triton": "triton-interpreted"}


@pytest.fixture(params=KERNELS)
def name(request, monkeypatch):
    """A backend by its name, which for this test runs without a GPU."""
    if reason := missing(KERNELS[request.param]):
        leave_out(reason)
    monkeypatch.setattr(encoder, "on_backend", lambda name, run: run())
    if request.param == "cuda":
        monkeypatch.setattr(backend._cuda, "library", GPU_BACKENDS["cuda-emulated"].library())
    with running(KERNELS[request.param]):
        yield request.param


@pytest.fixture
def encode(name):
    x, weight = random(N, D, seed=1), random(LATENTS[name], D, seed=2)
    x[4, 3] = torch.inf  # which no screen decides
    return lambda: fastsparse.topk_encode(x, weight, k=k)


def test_candidates_are_counted_where_a_screen_is(name, encode, monkeypatch):
    monkeypatch.setattr(encoder, "DEVICE", "cpu")
    M = LATENTS[name]
    assert encoder.candidates(name, encode, N, M) == {}
    if name == "cuda":
        with encoder.turned(backend._cuda.library, screening=1, rows=4):
            found = encoder.candidates(name, encode, N, M)
    else:
        from fastsparse.kernels import topk_encode

        monkeypatch.setattr(topk_encode, "screening", True)
        found = encoder.candidates(name, encode, N, M)
    assert found["undecided"] == 1
    assert k <= found["candidates"] < M / 8


def test_blocks_of_other_sizes_give_the_same_answer(name, encode):
    values, indices = encode()
    ways = list(encoder.by_blocks(name, encode, str))
    assert len({way.name for way in ways}) == len(ways) > 5
    assert all(isinstance(way, Contender) and way.name.startswith(f"fastsparse, {name}, ") for way in ways)
    for way in ways:
        found = way.run()
        assert torch.equal(found[1], indices)
        torch.testing.assert_close(found[0], values, equal_nan=True)
