"""The assertions that the op tests rest on: they accept the reference and reject the least mistake."""

import pytest
import torch
from oracle import (
    DTYPES,
    LAYOUTS,
    assert_pursuit,
    assert_topk,
    assert_within,
    clear_rows,
    laid_out,
    random,
)
from test_sparse_products import PRODUCTS

from fastsparse import reference


@pytest.fixture
def problem():
    return random(5, 8, seed=1), random(30, 8, seed=2), random(30, seed=3)


def test_topk_accepts_the_reference(problem):
    assert_topk(reference.topk_encode(*problem, 4), *problem, k=4)


def _swap_two(values, indices):
    values[2, [0, 1]], indices[2, [0, 1]] = values[2, [1, 0]], indices[2, [1, 0]]


def _next_best(values, indices):
    # Of five, drop the fourth: the fifth stands in its place.
    values[3, 3], indices[3, 3] = values[3, 4], indices[3, 4]


def _repeat(values, indices):
    values[1, 1], indices[1, 1] = values[1, 0], indices[1, 0]


def _nudge(values, indices):
    values[4, 0] *= 1 + 1e-5


def _wrong_index(values, indices):
    indices[0, 0] = 29 if indices[0, 0] != 29 else 28


def _out_of_range(values, indices):
    indices[0, 0] = 30


@pytest.mark.parametrize("spoil", [_swap_two, _next_best, _repeat, _nudge, _wrong_index, _out_of_range])
def test_topk_rejects(problem, spoil):
    values, indices = reference.topk_encode(*problem, 5, "none")
    spoil(values, indices)
    with pytest.raises(AssertionError):
        assert_topk(
            (values[:, :4].contiguous(), indices[:, :4].contiguous()), *problem, k=4, activation="none"
        )


def test_topk_rejects_nan_after_a_number():
    x, weight = torch.ones(1, 1), torch.tensor([[1.0], [torch.nan], [2.0]])
    right = torch.tensor([[torch.nan, 2.0]]), torch.tensor([[1, 2]])
    assert_topk(right, x, weight, k=2)
    wrong = torch.tensor([[2.0, torch.nan]]), torch.tensor([[2, 1]])
    with pytest.raises(AssertionError):
        assert_topk(wrong, x, weight, k=2)
    without = torch.tensor([[2.0, 1.0]]), torch.tensor([[2, 0]])
    with pytest.raises(AssertionError):
        assert_topk(without, x, weight, k=2)


def test_products_reject_an_error_of_one_part_in_a_hundred_thousand():
    for product in PRODUCTS:
        made = product.make(5, 4, 30, 8)
        out = product.verify(*made)
        largest = out.abs().argmax()
        out.view(-1)[largest] *= 1 + 1e-5
        with pytest.raises(AssertionError):
            product.check(out, *made)


@pytest.mark.parametrize(
    ("got", "exact"), [(torch.nan, 1.0), (1.0, torch.nan), (torch.inf, 1.0), (1.0, torch.inf)]
)
def test_non_finite_values_are_compared_exactly(got, exact):
    with pytest.raises(AssertionError):
        assert_within(torch.tensor([got]), torch.tensor([exact]), torch.tensor([0.1], dtype=torch.float64))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(3, 5), (7,), (0, 4)])
def test_layouts_hold_the_same_values(layout, shape):
    if layout == "transposed" and len(shape) == 1:
        return
    tensor = random(*shape, seed=1)
    again = laid_out(tensor, layout)
    assert torch.equal(again, tensor)
    if tensor.numel() and layout in ("transposed", "strided"):
        assert not again.is_contiguous()
    if tensor.numel() and layout == "misaligned":
        assert again.data_ptr() % 8 == 4


@pytest.fixture
def pursued():
    """Six steps on nine tokens, which can be taken up to any of them, and what they were made from."""
    x, dictionary = random(9, 12, seed=1), random(30, 12, seed=2)
    return x, dictionary, reference.matching_pursuit(x, dictionary, 6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("nonnegative", [False, True])
def test_pursuit_accepts_the_reference(pursued, dtype, nonnegative):
    x, dictionary = (tensor.to(dtype) for tensor in pursued[:2])
    for tol in (0.0, 1.0):
        pursuit = reference.matching_pursuit(x, dictionary, 20, tol, nonnegative)
        assert_pursuit(pursuit, x, dictionary, k=20, tol=tol, nonnegative=nonnegative)


def _another_order(values, indices, residual, dictionary):
    values[2, :2], indices[2, :2] = values[2, :2].flip(0), indices[2, :2].flip(0)


def _not_the_best(values, indices, residual, dictionary):
    # Without the second step, all of whose followers are as greedy as they were but for it.
    step = values[3, 1] * dictionary[indices[3, 1]]
    values[3, 1:5], indices[3, 1:5] = values[3, 2:].clone(), indices[3, 2:].clone()
    residual[3] += step


def _coefficient(values, indices, residual, dictionary):
    residual[4] -= 1e-5 * values[4, 0] * dictionary[indices[4, 0]]
    values[4, 0] *= 1 + 1e-5


def _residual(values, indices, residual, dictionary):
    residual[5, 3] += 2e-6


def _residual_not_updated(values, indices, residual, dictionary):
    residual[5] += values[5, 4] * dictionary[indices[5, 4]]


def _stopped_early(values, indices, residual, dictionary):
    residual[6] += values[6, 4] * dictionary[indices[6, 4]]
    values[6, 4] = indices[6, 4] = 0


def _wrong_atom(values, indices, residual, dictionary):
    indices[0, 0] = 29 if indices[0, 0] != 29 else 28


def _out_of_bounds(values, indices, residual, dictionary):
    indices[0, 0] = 30


@pytest.mark.parametrize(
    "spoil",
    [
        _another_order,
        _not_the_best,
        _coefficient,
        _residual,
        _residual_not_updated,
        _stopped_early,
        _wrong_atom,
        _out_of_bounds,
    ],
)
def test_pursuit_rejects(pursued, spoil):
    x, dictionary, (values, indices, residual) = pursued
    residual += values[:, 5:] * dictionary[indices[:, 5]]  # the sixth step is in reserve
    values, indices = values.clone(), indices.clone()
    assert_pursuit((values[:, :5].contiguous(), indices[:, :5].contiguous(), residual), x, dictionary, k=5)
    spoil(values, indices, residual, dictionary)
    spoilt = values[:, :5].contiguous(), indices[:, :5].contiguous(), residual
    with pytest.raises(AssertionError):
        assert_pursuit(spoilt, x, dictionary, k=5)


def test_pursuit_rejects_wrong_stops(pursued):
    x, dictionary, pursuit = pursued
    lengths = pursuit[2].norm(dim=1)
    assert_pursuit(pursuit, x, dictionary, k=6, tol=0.5 * lengths.min().item())
    with pytest.raises(AssertionError):  # it should have stopped
        assert_pursuit(pursuit, x, dictionary, k=6, tol=2 * lengths.max().item())
    stopped = reference.matching_pursuit(x, dictionary, 6, 2.0)
    assert (stopped[0] == 0).any()
    with pytest.raises(AssertionError):  # it should have gone on
        assert_pursuit(stopped, x, dictionary, k=6, tol=1.0)
    unused = (stopped[0] == 0).nonzero()[-1]
    stopped[1][unused[0], unused[1]] = 3
    with pytest.raises(AssertionError, match="an unused slot holds an index"):
        assert_pursuit(stopped, x, dictionary, k=6, tol=2.0)
    signed = reference.matching_pursuit(x, dictionary, 6)
    assert (signed[0] < 0).any()
    with pytest.raises(AssertionError):
        assert_pursuit(signed, x, dictionary, k=6, nonnegative=True)
    with pytest.raises(AssertionError):  # of atoms that are longer than 1
        assert_pursuit(signed, x, dictionary, k=6, normalized=True)


def test_clear_rows_are_those_without_a_close_second():
    dictionary = torch.eye(4) * torch.tensor([1.0, 1.0, 2.0, 1.0]).unsqueeze(1)
    x = torch.tensor([[5.0, 3, 2, 1], [5, 5 + 1e-6, 2, 1], [5, 3, 3, 1], [5, 0, 0, 0]])
    indices, clear = clear_rows(x, dictionary, k=2, nonnegative=False, normalized=False)
    assert clear.tolist() == [True, False, False, False]
    assert indices[0].tolist() == [0, 1]
