from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.checks import BatchTopKOracle, PursuitOracle, TopKOracle, close, energy_error
from benchmarks.harness import WrongAnswer
from fastsparse import reference

N, D, M, K = 40, 48, 256, 8


def refused(message: str, check: Callable[..., str], *answer: Any) -> None:
    with pytest.raises(WrongAnswer, match=message):
        check(*answer)


@pytest.fixture
def problem():
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*shape, generator=generator) for shape in ((N, D), (M, D), (M,)))
    return x, weight, bias


@pytest.fixture
def oracle(problem):
    return TopKOracle.of(*problem, K)


@pytest.fixture
def answer(problem):
    return reference.topk_encode(*problem, K)


def test_the_oracle_is_the_reference(problem, oracle):
    values, indices = reference.topk_encode(*problem, K + 1, "none")
    torch.testing.assert_close(oracle.scores, values)
    assert torch.equal(oracle.indices, indices)


def test_the_oracle_in_blocks_is_the_oracle(problem, oracle, monkeypatch):
    monkeypatch.setattr("benchmarks.checks.BLOCK", 600)
    blocked = TopKOracle.of(*problem, K)
    torch.testing.assert_close(blocked.scores, oracle.scores)
    torch.testing.assert_close(blocked.tolerance, oracle.tolerance)
    assert torch.equal(blocked.indices, oracle.indices)


def test_the_reference_passes_in_any_order(problem, oracle, answer):
    assert f"{N} index sets" in oracle.check(answer)
    order = torch.randperm(K)
    oracle.check((answer[0][:, order], answer[1][:, order]))
    TopKOracle.of(*problem, M).check(reference.topk_encode(*problem, M))


def changed(tensor: torch.Tensor, place: tuple[int, int], value: float) -> torch.Tensor:
    out = tensor.clone()
    out[place] = value
    return out


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda v, i: (v * 1.001, i), "values differ"),
        (lambda v, i: (changed(v, (3, 2), float("nan")), i), "values differ"),
        (lambda v, i: (v, changed(i, (3, 2), int(i[3, 1]))), "twice"),
        (lambda v, i: (v, changed(i, (3, 2), M)), "indices must be in"),
        (lambda v, i: (v, i.roll(1, 0)), "miss a latent"),
        (lambda v, i: (v, i.roll(1, 1)), "another latent"),
        (lambda v, i: (v[:, :-1], i[:, :-1]), "shapes"),
        (lambda v, i: (v, i[:, :-1]), "shapes"),
    ],
)
def test_a_wrong_answer_is_refused(oracle, answer, spoil, message):
    with pytest.raises(WrongAnswer, match=message):
        oracle.check(spoil(*answer))


def test_one_wrong_latent_is_refused(oracle, answer):
    values, indices = answer
    absent = next(m for m in range(M) if m not in oracle.indices[5])
    refused("1 rows miss", oracle.check, (values, changed(indices, (5, 0), absent)))


def test_a_tie_may_fall_either_way(problem):
    x, weight, bias = problem
    twins = torch.cat([weight, weight]), torch.cat([bias, bias])
    oracle = TopKOracle.of(x, *twins, 1)
    values, indices = reference.topk_encode(x, *twins, 1)
    oracle.check((values, indices))
    oracle.check((values, indices + M))
    refused("another latent", oracle.check, (values, changed(indices, (7, 0), (int(indices[7, 0]) + 1) % M)))


def test_bf16_scores_need_bf16_tolerance(problem):
    x, weight, bias = (tensor.bfloat16() for tensor in problem)
    oracle = TopKOracle.of(x, weight, bias, K)
    rounded = torch.topk(torch.relu(torch.nn.functional.linear(x, weight, bias)), K)
    with pytest.raises(WrongAnswer):
        oracle.check(rounded)
    oracle.check(rounded, selected=2**-8, stored=2**-8)
    exact = reference.topk_encode(x, weight, bias, K)  # exact selection, values rounded at the end
    oracle.check(exact, stored=2**-8)


def test_the_largest_of_a_batch(problem, monkeypatch):
    right = reference.batch_topk_encode(*problem, N * K)
    for block in (1 << 25, 600):
        monkeypatch.setattr("benchmarks.checks.BLOCK", block)
        oracle = BatchTopKOracle.of(*problem, N * K)
        assert f"{N * K} of {N * K} clear of rounding" in oracle.check_code(right)
        values, indices, offsets, threshold = right
        rows = torch.arange(N).repeat_interleave(offsets.diff())
        dense = torch.zeros(N, M).index_put((rows, indices), values)
        oracle.check_dense(dense)
        refused("values differ", oracle.check_code, (values * 1.001, indices, offsets, threshold))
        refused("there must be 320 entries", oracle.check_dense, dense.masked_fill(dense == dense.max(), 0))
        refused("among the largest are missing", oracle.check_dense, dense.roll(1, 0))
        refused("places must ascend", oracle.check_code, (values, indices.flip(0), offsets, threshold))


def test_close_measures_the_relative_error():
    expected = torch.tensor([3.0, 4.0])
    close("a", expected * (1 + 1e-6), expected, 1e-5)
    refused("relative error", close, "a", expected * 1.1, expected, 1e-2)
    refused("relative error nan", close, "a", expected * float("nan"), expected, 1e-2)
    refused("shape", close, "a", expected[:1], expected, 1e-2)


@pytest.fixture
def pursuit_problem(problem):
    x, dictionary, _ = problem
    return x, dictionary / torch.linalg.vector_norm(dictionary, dim=1, keepdim=True)


@pytest.fixture
def pursuit_oracle(pursuit_problem):
    return PursuitOracle.of(*pursuit_problem, K, nonnegative=True)


@pytest.fixture
def pursuit(pursuit_problem):
    return reference.matching_pursuit(*pursuit_problem, K, nonnegative=True, normalized=True)


def merged(values: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    return torch.zeros(len(values), M).scatter_add_(1, indices, values)


@pytest.mark.parametrize("nonnegative", [True, False])
def test_the_pursuit_oracle_is_the_reference_in_fp64(pursuit_problem, nonnegative):
    x, dictionary = (tensor.double() for tensor in pursuit_problem)
    oracle = PursuitOracle.of(*pursuit_problem, K, nonnegative=nonnegative)
    values, indices, residual = reference.matching_pursuit(x, dictionary, K, 0.0, nonnegative, True)
    torch.testing.assert_close(oracle.values, values)
    assert torch.equal(oracle.indices, indices)
    torch.testing.assert_close(oracle.residual, residual)
    assert oracle.clear.float().mean() > 0.8


def test_the_pursuit_of_the_reference_passes(pursuit_oracle, pursuit):
    clear = int(pursuit_oracle.check(pursuit).split()[0])
    assert clear > 0.98 * N * K
    assert "rows clear of rounding" in pursuit_oracle.check_codes(merged(*pursuit[:2]))
    assert energy_error(pursuit_oracle.x, pursuit[0], pursuit[2]) < 1e-6


def test_a_pursuit_may_stop_where_nothing_is_left(pursuit_problem):
    x = pursuit_problem[0].abs()
    eye = torch.eye(D)
    oracle = PursuitOracle.of(x, eye, D + 3, nonnegative=True)
    oracle.check(reference.matching_pursuit(x, eye, D + 3, nonnegative=True, normalized=True))
    values, indices, residual = reference.matching_pursuit(x, eye, 3, nonnegative=True, normalized=True)
    empty = torch.zeros(N, D)
    refused(
        "left out a better atom",
        oracle.check,
        (torch.cat([values, empty], 1), torch.cat([indices, empty.long()], 1), residual),
    )


def turned(v: torch.Tensor, i: torch.Tensor, r: torch.Tensor, other: int) -> tuple:
    """Another atom in the place of one: by its own value, and what it leaves."""
    return v, changed(i, (3, 2), other), r


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda v, i, r: (v * 1.0001, i, r), "not its atom's"),
        (lambda v, i, r: (changed(v, (3, 2), float("nan")), i, r), "not its atom's"),
        (lambda v, i, r: turned(v, i, r, 7), "left out a better atom"),
        (lambda v, i, r: (v.roll(1, 1), i.roll(1, 1), r), "left out a better atom"),
        (lambda v, i, r: turned(v, i, r, M), "indices must be in"),
        (lambda v, i, r: (v, i, r * 1.0001), "residual is off"),
        (lambda v, i, r: (v, i, changed(r, (3, 2), float("nan"))), "residual is off"),
        (lambda v, i, r: (v[:, 1:], i[:, 1:], r), "shapes"),
    ],
)
def test_a_wrong_pursuit_is_refused(pursuit_oracle, pursuit, spoil, message):
    with pytest.raises(WrongAnswer, match=message):
        pursuit_oracle.check(spoil(*pursuit))


def test_wrong_codes_are_refused(pursuit_oracle, pursuit):
    codes = merged(*pursuit[:2])
    row = int(pursuit_oracle.clear.nonzero()[0])
    refused("codes differ", pursuit_oracle.check_codes, codes * 1.0001)
    refused("codes differ", pursuit_oracle.check_codes, changed(codes, (row, 0), float(codes[row, 0]) + 1e-3))
    refused("shapes", pursuit_oracle.check_codes, codes[:, 1:])


def test_orthogonal_codes_are_told_from_others(pursuit_problem):
    """Of orthogonal matching pursuit by its definition: the best atom, then least squares by all of them."""
    x, dictionary = pursuit_problem
    oracle = PursuitOracle.of(x, dictionary, K, nonnegative=False)
    codes = torch.zeros(N, M)
    for n in range(N):
        atoms, left = [], x[n]
        for _ in range(K):
            atoms.append(int((dictionary @ left).abs().argmax()))
            fit = torch.linalg.lstsq(dictionary[atoms].T, x[n].unsqueeze(1)).solution[:, 0]
            left = x[n] - fit @ dictionary[atoms]
        codes[n, atoms] = fit
    assert "of the energy" in oracle.check_orthogonal(codes)
    row = int(oracle.clear.nonzero()[0])
    first = int(oracle.indices[row, 0])
    refused("product of", oracle.check_orthogonal, codes * 1.001)
    refused("must hold", oracle.check_orthogonal, changed(codes, (row, first), 0.0))
    refused("miss their first", oracle.check_orthogonal, codes.roll(1, 0))
    atoms = oracle.indices[:, :1] + torch.arange(K) * (M // K)  # the best one and others that have no merit
    fit = torch.linalg.lstsq(dictionary[atoms % M].mT, x.unsqueeze(2)).solution[:, :, 0]
    refused("times the energy", oracle.check_orthogonal, torch.zeros(N, M).scatter_(1, atoms % M, fit))
