"""batch_topk_encode in CUDA C++ where its blocks and the pool's room show, each from little work."""

import pytest
import torch
from backends import GPU_BACKENDS, missing, running
from knobs import turned
from oracle import integers
from test_batch_topk_encode import assert_same_as_reference

import fastsparse

BACKENDS = [name for name, gpu in GPU_BACKENDS.items() if gpu.library is not None and not missing(name)]
N, M = 40, 2777


@pytest.fixture(params=BACKENDS)
def library(request):
    with running(request.param):
        yield GPU_BACKENDS[request.param].library()


@pytest.fixture(params=["whole", "cut"])
def blocks(request, library):
    """Calls in one block with room for all, and in blocks of 7 tokens and 512 latents with none to spare."""
    with turned(library, **({"rows": 7, "bytes": 1} if request.param == "cut" else {})):
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("total", [1, 600, 5000, N * M])
def test_every_block_and_stripe(blocks, dtype, total):
    x, weight = integers(N, 3, seed=1, dtype=dtype), integers(M, 3, seed=2, dtype=dtype)
    assert_same_as_reference(x, weight, total=total)
    bias, scale, mask = (
        integers(M, seed=3, dtype=dtype),
        integers(M, seed=4, dtype=dtype),
        torch.arange(M) % 5 > 1,
    )
    total = min(total, N * int(mask.sum()))
    assert_same_as_reference(x, weight, bias, total=total, activation="abs", scale=scale, mask=mask)
    x[[3, 20]] = torch.nan
    weight[700] = -torch.inf
    assert_same_as_reference(x, weight, bias, total=total, activation="relu", mask=mask)


@pytest.mark.parametrize("key", [0.0, -0.0, 1.0, -1.0, torch.inf, -torch.inf, torch.nan])
def test_all_of_one_key(blocks, key):
    """Ranks that differ in the place alone: the pool overflows with ties at every stripe."""
    x, weight = torch.full((N, 1), key), torch.ones(M, 1)
    for total in (1, 1000, 30 * M + 1):
        assert_same_as_reference(x, weight, total=total)


@pytest.mark.parametrize("direction", [1, -1])
def test_keys_apart_in_their_last_bits(blocks, direction):
    """Rising, everything beats the bound that came before; falling, nothing does. The last digit decides."""
    weight = (1 + direction * 2.0**-23 * torch.arange(M)).unsqueeze(1)
    for total in (1, 100, 3000):
        assert_same_as_reference(torch.ones(9, 1), weight, total=total)
        assert_same_as_reference(-torch.ones(9, 1, dtype=torch.float64), weight.double(), total=total)


def test_few_rows_in_many_parts(library):
    x, weight = integers(3, 1, seed=1), integers(20000, 1, seed=2)
    assert_same_as_reference(x, weight, total=70)
    with turned(library, bytes=1):
        assert_same_as_reference(x, weight, total=70)


@pytest.mark.skipif("cuda-emulated" not in BACKENDS, reason="only the emulator can be told that it captures")
def test_too_few_eligible_latents_in_a_graph():
    """A graph can't raise: what there is comes out, and zeros within bounds behind it."""
    x, weight, mask = integers(4, 3, seed=1), integers(50, 3, seed=2), torch.arange(50) < 5
    with running("cuda-emulated"), turned(GPU_BACKENDS["cuda-emulated"].library(), capturing=1):
        right = fastsparse.batch_topk_encode(x, weight, total=20, activation="none", latent_mask=mask)
        found = torch.ops.fastsparse_cuda.batch_topk_encode(x, weight, None, 30, 1, None, mask)
    values, indices, offsets, _ = found
    assert torch.equal(values[:20], right.values)
    assert torch.equal(indices[:20], right.indices)
    assert not values[20:].any()
    assert (indices[20:] == 49).all()
    assert offsets.tolist() == [0, 5, 10, 15, 30]
