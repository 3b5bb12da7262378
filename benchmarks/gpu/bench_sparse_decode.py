"""``sparse_decode``, forward and backward: against ``F.embedding_bag``, atomics and the gathers' floor."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

import fastsparse
from benchmarks.bars import Bar
from benchmarks.bench_sparse_decode import by_rows, d_values, d_weight
from benchmarks.cases import OURS
from benchmarks.gpu import baselines, sparse
from benchmarks.gpu.ceilings import gather_floor
from benchmarks.gpu.lab import Job, Lab, no_bars, on_backend, share_bar
from benchmarks.harness import Contender
from benchmarks.shapes import Shape
from fastsparse import reference

FORWARD = 0.7  # of the floor at least, at the headline shapes in bf16


def jobs(lab: Lab, ceilings: dict[str, float]) -> Iterator[Job]:
    for shape, kind, dtype, priority in sparse.wanted():
        for direction, run in (("forward", forward), ("backward", _backward)):
            name = f"{shape.name}, {kind}, {dtype}, {direction}"
            promised = direction == "forward" and shape.headline and dtype == "bf16"
            bars = partial(_bars, name, shape) if promised else no_bars
            run = partial(run, lab, ceilings, name, shape, kind, dtype)
            yield Job(priority, "sparse_decode", name, run, bars)


def _bars(name: str, shape: Shape, case: dict[str, Any]) -> list[Bar]:
    return [share_bar(f"sparse_decode, {name} ({shape}): over the gathers' floor", case, FORWARD)]


def forward(
    lab: Lab,
    ceilings: dict[str, float],
    name: str,
    full: Shape,
    kind: str,
    dtype: str,
    *,
    alone: bool = False,
) -> dict[str, Any]:
    """Measure one problem; ``alone`` without others."""
    shape = lab.shape(full)
    values, indices, weight, _ = sparse.problem(shape, kind, dtype, lab.device)
    right = by_rows(reference.spmm, shape, values.float(), indices, weight.float())
    check = sparse.checked(dtype, ("out", right))
    contenders = lab.ours(partial(fastsparse.sparse_decode, values, indices, weight), check)
    if not alone:
        contenders += [
            Contender(who, partial(decode, values, indices, weight), check)
            for who, decode in others().items()
        ]
    with torch.no_grad():
        least = floor(ceilings, values, indices, weight, out=1)
        return sparse.case(lab, name, full, kind, dtype, contenders, least)


def _backward(
    lab: Lab, ceilings: dict[str, float], name: str, full: Shape, kind: str, dtype: str
) -> dict[str, Any]:
    shape = lab.shape(full)
    values, indices, weight, grad = sparse.problem(shape, kind, dtype, lab.device)
    check = sparse.checked(
        dtype,
        ("d_values", d_values(shape, grad.float(), weight.float(), indices)),
        ("d_weight", d_weight(shape, values.float(), indices, grad.float())),
    )
    entrants = [(OURS, fastsparse.sparse_decode, None)]
    entrants += [(f"{OURS}, {name}", fastsparse.sparse_decode, name) for name in lab.backends]
    entrants += [(who, decode, None) for who, decode in others().items()]
    contenders = [
        Contender(who, _Backward(decode, values, indices, weight, grad, backend), check)
        for who, decode, backend in entrants
    ]
    # Scores gather rows of the weight, the weight's gradient those of the output's.
    both = 2 * floor(ceilings, values, indices, weight, out=0)
    written = weight.numel() * weight.element_size() / ceilings["copy"]
    return sparse.case(lab, name, full, kind, dtype, contenders, max(both, written))


class _Backward:
    """One contender's backward, again and again over one forward, which runs at the first call."""

    def __init__(
        self,
        decode: Callable[..., Tensor],
        values: Tensor,
        indices: Tensor,
        weight: Tensor,
        grad: Tensor,
        backend: str | None,
    ) -> None:
        self.decode, self.indices, self.grad, self.backend = decode, indices, grad, backend
        self.leaves = values.detach().requires_grad_(), weight.detach().requires_grad_()
        self.out: Tensor | None = None

    def __call__(self) -> tuple[Tensor, ...]:
        return self._run() if self.backend is None else on_backend(self.backend, self._run)

    def _run(self) -> tuple[Tensor, ...]:
        if self.out is None:
            self.out = self.decode(self.leaves[0], self.indices, self.leaves[1])
        return torch.autograd.grad(self.out, self.leaves, self.grad, retain_graph=True)


def others() -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    return {"torch": baselines.torch_decode, baselines.ATOMICS: baselines.atomic_decode}


def floor(ceilings: dict[str, float], values: Tensor, indices: Tensor, weight: Tensor, *, out: int) -> float:
    """The least time of gathering an atom for every entry, ``out`` results of (N, D) being written."""
    (N, k), D, size = indices.shape, weight.shape[1], weight.element_size()
    moved = (int(indices.unique().numel()) * D + out * N * D + N * k) * size + 8 * N * k
    return gather_floor(ceilings, N * k * D * size, moved)
