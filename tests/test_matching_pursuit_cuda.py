"""matching_pursuit in CUDA C++ where its blocks, its threads, its bound or its memory show."""

import pytest
import torch
from backends import GPU_BACKENDS, missing, running
from knobs import turn, turned
from oracle import integers, random
from test_matching_pursuit import assert_same_bits, pursue

import fastsparse

BACKENDS = [name for name, gpu in GPU_BACKENDS.items() if gpu.library is not None and not missing(name)]
N, D, M, k = 5, 20, 700, 6


@pytest.fixture(params=[name + mode for name in BACKENDS for mode in ("", "-screened")])
def plan(request):
    """Sets how many threads a block has, rows are taken at a time, bytes of shared memory there are."""
    with running(request.param):
        library = GPU_BACKENDS[request.param.removesuffix("-screened")].library()
        with turned(library, threads=0, rows=0, shared_bytes=0):
            names = ("threads", "rows", "shared_bytes")
            yield lambda *sizes: turn(library, **dict(zip(names, sizes, strict=True)))


def problem(*, dtype=torch.float32, rows=N):
    return random(rows, D, seed=1, dtype=dtype), random(M, D, seed=2, dtype=dtype)


@pytest.mark.parametrize(
    ("dtype", "threads"),
    [(torch.float32, 32), (torch.float32, 512), (torch.float64, 96), (torch.bfloat16, 512)],
    ids=str,
)
def test_steps_depend_on_neither_method_nor_memory_nor_blocks(plan, dtype, threads):
    x, dictionary = problem(dtype=dtype)
    plan(threads, 0, 0)
    right = pursue(x, dictionary, k=k, method="gram")
    for rows, shared_bytes, method in ((2, 0, "gram"), (0, 1, "gram"), (3, 0, "direct")):
        plan(threads, rows, shared_bytes)
        assert_same_bits([pursue(x, dictionary, k=k, method=method), right])


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("method", ["direct", "gram"])
def test_products_on_tensor_cores_change_no_bit(name, method):
    x, dictionary = problem(rows=30)
    found = []
    for mode in ("", "-screened"):
        with running(name + mode):
            found.append(fastsparse.matching_pursuit(x, dictionary, k=12, method=method))
    assert_same_bits(found)


@pytest.mark.parametrize("method", ["direct", "gram"])
@pytest.mark.parametrize("twins", [2, 200, 400])
def test_equal_atoms(plan, method, twins):
    """More of them than are scored again one by one: all of the row's are; the first one is taken."""
    plan(64, 0, 0)
    x, dictionary = problem()
    dictionary[100 : 100 + twins] = 5 * dictionary[100]
    x += dictionary[100]
    indices = pursue(x, dictionary, k=k, method=method).indices
    assert (indices[:, 0] == 100).all()
    assert not ((indices > 100) & (indices < 100 + twins)).any()


@pytest.mark.parametrize("method", ["direct", "gram"])
def test_the_best_atom_where_others_are_within_rounding_of_it(plan, method):
    """Scores 1 + m 2^-20, all of them exact in the atoms, in no other way told apart than by exact scores."""
    plan(64, 0, 0)
    dictionary = torch.zeros(600, D)
    dictionary[:, 0] = 1
    best = torch.randperm(600, generator=torch.Generator().manual_seed(0))
    dictionary[:, 1] = best * 2.0**-20
    x = torch.zeros(N, D)
    x[:, :2] = 1
    indices = fastsparse.matching_pursuit(x, dictionary, k=1, method=method).indices
    assert (indices[:, 0] == best.argmax()).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_long_pursuit(plan, dtype):
    """The bound grows from step to step, and begins anew when it says nothing any more."""
    plan(32, 0, 0)
    x, dictionary = problem(dtype=dtype, rows=2)
    long = pursue(x, dictionary, k=300, method="gram")
    assert (long.residual.norm(dim=1) < 1e-6 * x.norm(dim=1)).all()


def test_rows_end_each_on_its_own(plan):
    x, dictionary = integers(9, 4, seed=1), torch.eye(4).repeat(40, 1)
    x[2], x[5, 1], x[7, 2] = 0, torch.nan, torch.inf
    plan(0, 0, 0)
    right = fastsparse.matching_pursuit(x, dictionary, k=6, method="direct")
    assert torch.equal(
        right.values[[0, 1, 3, 4, 6, 8]].count_nonzero(dim=1), x[[0, 1, 3, 4, 6, 8]].count_nonzero(1)
    )
    for rows, shared_bytes, method in ((0, 0, "gram"), (4, 1, "gram"), (4, 0, "direct")):
        plan(0, rows, shared_bytes)
        assert_same_bits([fastsparse.matching_pursuit(x, dictionary, k=6, method=method), right])
