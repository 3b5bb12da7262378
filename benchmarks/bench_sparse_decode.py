"""``sparse_decode``, forward and backward: against ``F.embedding_bag`` with weights and a dense gradient."""

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastsparse
from benchmarks import data, shapes
from benchmarks.bars import Bar, speed_bar
from benchmarks.cases import OURS, Options, matrix_bytes, run_case, short_of_memory, skipped
from benchmarks.ceilings import Work
from benchmarks.checks import BLOCK, close
from benchmarks.harness import Contender, WrongAnswer
from benchmarks.shapes import Shape
from fastsparse import reference

DIRECTIONS = ("forward", "backward")
TOLERANCE = (
    1e-5  # relative to the norm of the answer: fp32 sums of k products, or of a latent's, in any order
)


def run(options: Options) -> Iterator[tuple[dict[str, Any], list[Bar]]]:
    if options.peers:  # sparsify's decoder on a CPU is this very embedding_bag
        return
    for shape in options.shapes(shapes.ALL):
        kinds = data.KINDS if shape.correlated else data.KINDS[:1]
        # The weight, the expected gradient and a contender's, and room.
        if (shortage := short_of_memory(4 * matrix_bytes((shape.M, shape.D)))) is not None:
            for kind, direction in itertools.product(kinds, DIRECTIONS):
                case = skipped(f"{shape.name}, {kind}, {direction}", shape, shortage, data=kind, dtype="fp32")
                yield case, [_bar(shape, kind, direction, case)]
            continue
        weight = data.dictionary(shape, "gaussian")
        for kind in kinds:
            values, indices = data.code(shape, kind)
            for direction, measure in zip(DIRECTIONS, (_forward, _backward), strict=True):
                case = measure(shape, kind, values, indices, weight, options)
                yield case, [_bar(shape, kind, direction, case)]
        if shape.headline:
            yield _reproducible(shape, options)


def torch_decode(values: Tensor, indices: Tensor, weight: Tensor) -> Tensor:
    """What people write today."""
    return F.embedding_bag(indices, weight, mode="sum", per_sample_weights=values)


DECODERS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    OURS: fastsparse.sparse_decode,
    "torch": torch_decode,
}


def _forward(
    shape: Shape, kind: str, values: Tensor, indices: Tensor, weight: Tensor, options: Options
) -> dict[str, Any]:
    expected = by_rows(reference.spmm, shape, values, indices, weight)
    contenders = [
        Contender(name, partial(decode, values, indices, weight), partial(_close, ("out",), (expected,)))
        for name, decode in DECODERS.items()
    ]
    touched = int(indices.unique().numel())
    work = Work(
        2 * shape.N * shape.k * shape.D,
        matrix_bytes((touched, shape.D), (shape.N, shape.D), (shape.N, shape.k)) + 8 * shape.N * shape.k,
    )
    with torch.no_grad():
        return run_case(
            f"{shape.name}, {kind}, forward", shape, contenders, options, work=work, data=kind, dtype="fp32"
        )


def _backward(
    shape: Shape, kind: str, values: Tensor, indices: Tensor, weight: Tensor, options: Options
) -> dict[str, Any]:
    grad = data.normal(shape.N, shape.D, 40)
    expected = (d_values(shape, grad, weight, indices), d_weight(shape, values, indices, grad))
    contenders = []
    for name, decode in DECODERS.items():
        leaves = values.clone().requires_grad_(), weight.detach().requires_grad_()
        out = decode(leaves[0], indices, leaves[1])
        backward = partial(torch.autograd.grad, out, leaves, grad, retain_graph=True)
        contenders.append(Contender(name, backward, partial(_close, ("d_values", "d_weight"), expected)))
    touched = int(indices.unique().numel())
    work = Work(
        4 * shape.N * shape.k * shape.D,
        matrix_bytes((touched, shape.D), (shape.M, shape.D), (shape.N, shape.D), (shape.N, 2 * shape.k))
        + 8 * shape.N * shape.k,
    )
    return run_case(
        f"{shape.name}, {kind}, backward", shape, contenders, options,
        work=work, data=kind, dtype="fp32",
    )  # fmt: skip


def _reproducible(shape: Shape, options: Options) -> tuple[dict[str, Any], list[Bar]]:
    """``spmm_t`` at several numbers of threads: how many elements differ in any bit."""
    values, indices = data.code(shape, "correlated")
    x = data.tokens(shape, "gaussian")
    before, outs = torch.get_num_threads(), {}
    try:
        for threads in sorted({1, 2, 3, before}):
            torch.set_num_threads(threads)
            outs[threads] = fastsparse.spmm_t(values, indices, x, shape.M)
    finally:
        torch.set_num_threads(before)
    first = next(iter(outs.values()))
    differing = sum(int((out.view(torch.int32) != first.view(torch.int32)).sum()) for out in outs.values())
    name = f"{shape.name}, correlated, spmm_t at {', '.join(map(str, outs))} threads"
    case = run_case(name, shape, [], options, data="correlated", dtype="fp32") | {"differing": differing}
    return case, [Bar(f"sparse_decode, {name}: elements that differ", "<=", 0, differing, unit="elements")]


def _bar(shape: Shape, kind: str, direction: str, case: dict[str, Any]) -> Bar:
    name = f"sparse_decode, {shape.name} ({shape}), {kind}, {direction}: against embedding_bag"
    return speed_bar(name, case, "torch", 1.0, relation=">")


def _close(names: tuple[str, ...], expected: tuple[Tensor, ...], answer: Any) -> str:
    got = (answer,) if isinstance(answer, Tensor) else answer
    if len(got) != len(expected):
        raise WrongAnswer(f"{len(expected)} tensors expected, got {len(got)}")
    return ", ".join(close(*pair, TOLERANCE) for pair in zip(names, got, expected, strict=True))


def _rows(shape: Shape) -> int:
    """Rows whose (rows, k, D) intermediate in the reference stays small."""
    return max(1, BLOCK // (shape.k * shape.D))


def by_rows(
    op: Callable[..., Tensor], shape: Shape, values: Tensor, indices: Tensor, weight: Tensor
) -> Tensor:
    size = _rows(shape)
    return torch.cat(
        [op(*part, weight) for part in zip(values.split(size), indices.split(size), strict=True)]
    )


def d_values(shape: Shape, grad: Tensor, weight: Tensor, indices: Tensor) -> Tensor:
    size = _rows(shape)
    parts = zip(grad.split(size), indices.split(size), strict=True)
    return torch.cat([reference.sddmm(rows, weight, which) for rows, which in parts])


def d_weight(shape: Shape, values: Tensor, indices: Tensor, grad: Tensor) -> Tensor:
    """``reference.spmm_t`` summed over row blocks, touching only the latents that a block holds."""
    out, size = torch.zeros(shape.M, shape.D, device=grad.device), _rows(shape)
    for block in zip(values.split(size), indices.split(size), grad.split(size), strict=True):
        latents, which = block[1].unique(return_inverse=True)
        out.index_add_(0, latents, reference.spmm_t(block[0], which, block[2], len(latents)))
    return out
