"""threshold_encode in CUDA C++ where its blocks, its parts or too little room show, each from little work."""

import ctypes

import pytest
import torch
from backends import GPU_BACKENDS, missing, running
from knobs import turned
from oracle import integers

import fastsparse

BACKENDS = [name for name, gpu in GPU_BACKENDS.items() if gpu.library is not None and not missing(name)]
N, D, M = 40, 3, 2777


@pytest.fixture(params=BACKENDS)
def library(request) -> ctypes.CDLL:
    with running(request.param):
        yield GPU_BACKENDS[request.param].library()


@pytest.fixture(params=["whole", "cut"])
def blocks(request, library):
    """Calls in one block, and in blocks of 7 tokens and 512 latents."""
    with turned(library, **({"rows": 7, "bytes": 1} if request.param == "cut" else {})):
        yield


def assert_same_as_reference(x, weight, bias=None, **options) -> None:
    """On integers, of which every order of summation gives the same score."""
    code = fastsparse.threshold_encode(x, weight, bias, **options)
    with fastsparse.use_backend("reference"):
        right = fastsparse.threshold_encode(x, weight, bias, **options)
    torch.testing.assert_close(tuple(code), tuple(right), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(
    "threshold", [9.0, -torch.inf, torch.inf]
)  # a few pass; more than are expected; none
def test_every_block_and_stripe(blocks, dtype, threshold):
    x, weight = integers(N, D, seed=1, dtype=dtype), integers(M, D, seed=2, dtype=dtype)
    x[[3, 20]] = torch.nan
    assert_same_as_reference(x, weight, threshold=threshold)
    bias, bounds = integers(M, seed=3, dtype=dtype), threshold + integers(M, seed=4)
    options = {"activation": "abs", "latent_mask": torch.arange(M) % 5 > 1}
    assert_same_as_reference(x, weight, bias, threshold=bounds, **options)
    for tokens, room in ((x[:9], 9 * M), (x[:1], M + 5)):
        assert_same_as_reference(tokens, weight, threshold=threshold, max_entries=room)


def test_many_parts_of_few_rows(library):
    x, weight = integers(3, 1, seed=1), integers(20000, 1, seed=2)
    assert_same_as_reference(x, weight, threshold=5.0)
    with turned(library, bytes=1):
        assert_same_as_reference(x, weight, threshold=5.0)


@pytest.mark.parametrize("room", [0, 1, 100])
def test_too_little_room(blocks, room):
    x, weight = integers(N, D, seed=1), integers(M, D, seed=2)
    with pytest.raises(RuntimeError, match=rf"number of entries \(\d+\), got max_entries={room}"):
        fastsparse.threshold_encode(x, weight, threshold=9.0, max_entries=room)


@pytest.mark.skipif("cuda-emulated" not in BACKENDS, reason="only the emulator can be told that it captures")
@pytest.mark.parametrize("room", [0, 1, 100])
def test_too_little_room_in_a_graph_leaves_nan(room):
    """A graph can't raise, and what reads the code must find all of it within bounds."""
    x, weight = integers(9, D, seed=1), integers(M, D, seed=2)
    with running("cuda-emulated"):
        right = fastsparse.threshold_encode(x, weight, threshold=9.0).offsets
        with turned(GPU_BACKENDS["cuda-emulated"].library(), capturing=1):
            values, indices, offsets = fastsparse.threshold_encode(x, weight, threshold=9.0, max_entries=room)
    assert values.shape == indices.shape == (room,)
    assert values.isnan().all()
    assert not indices.any()
    assert torch.equal(offsets, right.clamp(max=room))
