"""How much memory the ops take, and what happens where there is none."""

from collections.abc import Callable

import pytest
import torch
from oracle import random
from test_sparse_products import PRODUCTS, SDDMM, SPMM, SPMM_T

import fastsparse

N, D, M, k = 8192, 512, 65536, 32


def encode_inputs(device, dtype):
    return random(N, D, seed=1, dtype=dtype).to(device), random(M, D, seed=2, dtype=dtype).to(device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_encode_never_makes_the_matrix(cuda, backend, dtype):
    x, weight = encode_inputs(cuda, dtype)
    fastsparse.topk_encode(x, weight, k=k)  # Triton tunes at the first call
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    fastsparse.topk_encode(x, weight, k=k)
    torch.cuda.synchronize()
    growth = torch.cuda.max_memory_allocated() - before
    assert growth < 0.1 * N * M * dtype.itemsize, f"{growth / 2**20:.0f} MiB"


@pytest.fixture
def cap():
    """Allows this process no more memory than it holds, and a little."""

    def allow(spare: int) -> None:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + spare) / total)

    yield allow
    torch.cuda.set_per_process_memory_fraction(1.0)


def calls(device: torch.device) -> dict[str, Callable[[], tuple[torch.Tensor, ...]]]:
    """A call of every op that needs more than 100 MiB beside its inputs, which are there already."""
    x, weight = encode_inputs(device, torch.float32)
    tall, wide = ((8 * N, 2), (N, 4096))
    indices = {shape: torch.randint(0, M, shape, device=device) for shape in (tall, wide)}
    values = random(*tall, seed=3).to(device)
    return {
        "topk_encode": lambda: tuple(fastsparse.topk_encode(x, weight, k=k)),
        "matching_pursuit_step": lambda: fastsparse.matching_pursuit_step(x, weight),
        SPMM.name: lambda: (SPMM(values, indices[tall], weight),),
        SDDMM.name: lambda: (SDDMM(x, weight, indices[wide]),),
        SPMM_T.name: lambda: (SPMM_T(values[:N], indices[tall][:N], x, M),),
    }


@pytest.mark.parametrize(
    "op", ["topk_encode", "matching_pursuit_step", *(product.name for product in PRODUCTS)]
)
def test_out_of_memory_is_pytorchs_and_leaves_the_next_call_alone(cuda, backend, op, cap):
    call = calls(cuda)[op]
    expected = call()
    cap(4 << 20)
    with pytest.raises(torch.OutOfMemoryError):
        call()
    torch.cuda.set_per_process_memory_fraction(1.0)
    assert all(torch.equal(a, b) for a, b in zip(call(), expected, strict=True))


def test_out_of_memory_for_an_output_that_fits_nowhere(cuda, backend):
    values, indices, x = (
        tensor.to(cuda) for tensor in (torch.ones(2, 1), torch.zeros(2, 1).long(), torch.ones(2, 64))
    )
    with pytest.raises(torch.OutOfMemoryError):
        fastsparse.spmm_t(values, indices, x, 1 << 40)
    assert fastsparse.spmm_t(values, indices, x, 1)[0, 0].item() == 2
