"""The assertions that the op tests rest on: they accept the reference and reject the least mistake."""

import pytest
import torch
from oracle import (
    LAYOUTS,
    assert_sddmm,
    assert_spmm,
    assert_spmm_t,
    assert_topk,
    assert_within,
    laid_out,
    random,
    random_indices,
)

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
    x, weight, values, indices = (
        random(5, 8, seed=1), random(30, 8, seed=2), random(5, 4, seed=3), random_indices(5, 4, 30, seed=4)
    )  # fmt: skip
    cases = (
        (assert_spmm, reference.spmm(values, indices, weight), (values, indices, weight)),
        (assert_sddmm, reference.sddmm(x, weight, indices), (x, weight, indices)),
        (assert_spmm_t, reference.spmm_t(values, indices, x, 30), (values, indices, x, 30)),
    )
    for check, out, inputs in cases:
        check(out, *inputs)
        largest = out.abs().argmax()
        out.view(-1)[largest] *= 1 + 1e-5
        with pytest.raises(AssertionError):
            check(out, *inputs)


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
