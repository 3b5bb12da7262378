"""Pre-activations that nobody has computed: whatever is done with them, the answers are the dense ones."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from oracle import random
from torch import Tensor

from fastsparse.codes import preactivations
from fastsparse.codes.preactivations import Preactivations

N, D, M = 7, 6, 64
DEAD = torch.arange(M) % 3 == 0


class Case:
    """The same pre-activations twice: lazy, and dense."""

    def __init__(self, *leading: int, biased: bool = True, scaled: bool = True, relu: bool = False) -> None:
        self.x = random(*leading or (N,), D, seed=1).double().requires_grad_()
        self.weight = random(M, D, seed=2).double().requires_grad_()
        self.bias = random(M, seed=3).double().requires_grad_() if biased else None
        self.scale = random(M, seed=4).double().abs().requires_grad_() if scaled else None
        self.relu = relu

    @property
    def leaves(self) -> list[Tensor]:
        return [leaf for leaf in (self.x, self.weight, self.bias, self.scale) if leaf is not None]

    def lazy(self) -> Tensor:
        return preactivations(self.x, self.weight, self.bias, scale=self.scale, relu=self.relu)

    def dense(self) -> Tensor:
        found = F.linear(self.x, self.weight, self.bias)
        found = found if self.scale is None else found * self.scale
        return found.relu() if self.relu else found


every_case = pytest.mark.parametrize(
    "options",
    [{}, {"biased": False}, {"scaled": False}, {"relu": True}, {"relu": True, "scaled": False}],
    ids=str,
)


def assert_same(case: Case, use) -> Preactivations:
    """What `use` makes of either, and its gradients."""
    lazy, dense = case.lazy(), case.dense()
    found, right = use(lazy), use(dense)
    torch.testing.assert_close(found, right)
    assert type(found) is torch.Tensor
    upstream = random(right.numel(), seed=9).double().reshape(right.shape)
    mine, theirs = (torch.autograd.grad(one, case.leaves, upstream) for one in (found, right))
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other)
    return lazy


READS = {
    "sum": lambda pre: pre.sum(),
    "times": lambda pre: 2 * pre,
    "matmul": lambda pre: pre @ torch.ones(M, 2, dtype=pre.dtype),
    "index": lambda pre: pre[..., [3, 9]],
    "view": lambda pre: pre.view(-1),
    "where": lambda pre: torch.where(pre > 0, pre, 0.0),
    "where of another fill": lambda pre: torch.where(DEAD, pre, 0.0),
    "topk of many": lambda pre: pre.topk(M // 2).values,
    "topk of another dimension": lambda pre: pre.topk(2, dim=0).values,
    "least": lambda pre: pre.topk(2, largest=False).values,
    "in place": lambda pre: pre.clone().mul_(2),
    "concatenated": lambda pre: torch.cat((pre, pre)),
    "relu": lambda pre: pre.relu(),
    "detached and not": lambda pre: pre * pre.detach(),
}


@every_case
@pytest.mark.parametrize("use", READS.values(), ids=READS)
def test_whatever_reads_them(options, use):
    assert assert_same(Case(**options), use).computed is not None


LARGEST = {
    "topk": lambda pre: pre.topk(5).values,
    "unsorted": lambda pre: torch.topk(pre, 5, dim=-1, sorted=False).values.sort().values,
    "by the last dimension": lambda pre: pre.topk(torch.tensor(5), dim=pre.dim() - 1)[0],
    "of the dead": lambda pre: torch.where(DEAD[None], pre, -torch.inf).topk(4).values,
    "of neighbours": lambda pre: pre[..., 3:43].topk(5).values,
    "of the dead, flat mask": lambda pre: torch.where(DEAD, pre, -torch.inf).topk(4, sorted=True).values,
}


@every_case
@pytest.mark.parametrize("use", LARGEST.values(), ids=LARGEST)
@pytest.mark.parametrize("leading", [(), (2, 3), (1, 2, 1, 3)])
def test_the_largest_are_not_computed_from_all(options, use, leading):
    if options.get("relu"):
        leading = (*leading, 40)  # so that 0 is the largest of few rows: its picks are another's
    case = Case(*leading, **options)
    if options.get("relu"):
        case.bias = None if case.bias is None else (case.bias.detach() + 3).requires_grad_()
    assert assert_same(case, use).computed is None


def test_indices():
    case = Case(scaled=False)
    found, right = case.lazy().topk(5), case.dense().topk(5)
    assert torch.equal(found.indices, right.indices)
    found = torch.where(DEAD, case.lazy(), -torch.inf).topk(5)
    assert DEAD[found.indices].all()


def test_too_few_dead_latents_are_as_torch_has_them():
    few = torch.arange(M) < 3
    case = Case()
    lazy = case.lazy()
    found = torch.where(few, lazy, -torch.inf).topk(5)
    right = torch.where(few, case.dense(), -torch.inf).topk(5)
    torch.testing.assert_close(found.values, right.values)
    assert found.values.isinf().sum() == 2 * N


def test_masked_ones_can_be_read():
    assert_same(Case(), lambda pre: torch.where(DEAD, pre, -torch.inf)[:, DEAD])


def test_zeros_like_needs_no_data():
    lazy = Case().lazy()
    zeros = torch.zeros_like(lazy)
    assert zeros.shape == (N, M)
    assert not zeros.any()
    assert torch.zeros_like(lazy, dtype=torch.int32).dtype == torch.int32
    assert lazy.new_tensor(0.0).dtype == lazy.dtype
    assert (lazy.shape, lazy.dim(), lazy.dtype, lazy.device.type) == ((N, M), 2, torch.float64, "cpu")
    assert lazy.requires_grad
    assert lazy.computed is None


def test_a_function_of_ones_own():
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, tensor):
            return tensor * 2

        @staticmethod
        def backward(ctx, grad):
            return grad * 2

    assert_same(Case(), Doubled.apply)


def test_changed_in_place():
    case = Case()
    lazy, dense = case.lazy(), case.dense()
    lazy.mul_(2)
    lazy[:, 0] = 9
    right = dense * 2
    right[:, 0] = 9
    torch.testing.assert_close(lazy.topk(3).values, right.topk(3).values)
    for one, other in zip(
        *(torch.autograd.grad(one.square().sum(), case.leaves) for one in (lazy, right)), strict=True
    ):
        torch.testing.assert_close(one, other)


def test_hooks_and_retained_gradients():
    case, seen = Case(), []
    lazy = case.lazy()
    lazy.register_hook(seen.append)
    lazy.retain_grad()
    lazy.sum().backward()
    assert torch.equal(seen[0], torch.ones(N, M, dtype=torch.float64))
    assert torch.equal(lazy.grad, seen[0])


@pytest.mark.parametrize("name", ["x", "weight", "bias", "scale"])
def test_a_source_that_has_changed(name):
    case = Case()
    late, early = case.lazy(), case.lazy()
    early.sum()
    with torch.no_grad():
        getattr(case, name).mul_(2)
    message = f"preactivations: {name} has been changed in place"
    for use in (
        lambda: late.sum(),
        lambda: late.topk(2),
        lambda: torch.where(DEAD, late, -torch.inf).topk(2),
    ):
        with pytest.raises(RuntimeError, match=message):
            use()
    early.sum()  # was computed in time


def test_copies():
    case = Case()
    with torch.no_grad():
        lazy, right = case.lazy(), case.dense()
    for other in (copy.deepcopy(lazy), pickle.loads(pickle.dumps(lazy)), lazy.detach(), lazy.clone()):
        assert type(other) is torch.Tensor
        torch.testing.assert_close(other, right)
    assert lazy.tolist() == right.tolist()
    assert (lazy.numpy() == right.numpy()).all()
    assert repr(lazy).startswith("tensor(")


def test_no_grad_inference_and_autocast():
    case = Case()
    with torch.no_grad():
        assert not case.lazy().requires_grad
    with torch.inference_mode():
        torch.testing.assert_close(case.lazy().topk(3).values, case.dense().topk(3).values)
        torch.testing.assert_close(case.lazy() + 0, case.dense())
    x, weight = random(N, D, seed=1), random(M, D, seed=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lazy = preactivations(x, weight)
        assert lazy.dtype == torch.bfloat16
    assert torch.equal(lazy + 0, F.linear(x.bfloat16(), weight.bfloat16()))


def test_second_derivatives_are_refused_where_they_would_be_wrong():
    case = Case()
    (first,) = torch.autograd.grad(case.lazy().square().sum(), case.x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        first.sum().backward()
