"""``sparse_decode``, forward and backward, and the products that its gradients are made of, alone.

Against ``F.embedding_bag`` with weights and a dense gradient, which is what sparsify's decoder is on a CPU,
and what people write for the others; on a GPU also against atomics. Those of ragged codes, whose rows are as
uneven as BatchTopK's, against our own at a fixed k, with as many entries.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, lru_cache, partial
from typing import Any

import torch
from torch import Tensor

import fastsparse
from benchmarks import baselines, data, shapes
from benchmarks.bars import Bar, share_bar, speed_bars
from benchmarks.cases import matrix_bytes
from benchmarks.ceilings import Work
from benchmarks.checks import BLOCK, close_all
from benchmarks.harness import Contender
from benchmarks.lab import DTYPES, Job, Lab
from benchmarks.shapes import KINDS, Given, Shape, each, grid
from fastsparse import reference

# Relative to the norm of the answer: fp32 sums in any order; in bf16 the rounding of what is stored.
TOLERANCE = {"fp32": 1e-5, "bf16": 1e-2}
BIAS = "bias gradient"
RAGGED, FIXED = "ragged", "fixed k"
EVEN = 1.15  # times as long as at a fixed k a ragged code may take
FORWARD = 0.7  # of the gathers' floor at least, at a GPU's headline shapes in bf16


@dataclass(frozen=True)
class Problem:
    """A code (N, k) and both dense sides: weight (M, D), and x (N, D), which is also what comes back.

    Or a ragged one (N k,) with offsets (N + 1,).
    """

    values: Tensor
    indices: Tensor
    weight: Tensor
    x: Tensor
    offsets: Tensor | None = None

    @staticmethod
    @lru_cache(maxsize=1)
    def of(shape: Shape, kind: str, dtype: str, device: torch.device) -> "Problem":
        values, indices = data.code(shape, kind)
        dense = data.dictionary(shape, "gaussian"), data.normal(shape.N, shape.D, 40)
        values, weight, x = (tensor.to(device, DTYPES[dtype]) for tensor in (values, *dense))
        return Problem(values, indices.to(device), weight, x)

    def ones(self) -> "Problem":
        """With (N, 1) in the place of x: the gradient of a bias."""
        return replace(self, x=self.x.new_ones(len(self.x), 1))

    def ragged(self, shape: Shape) -> "Problem":
        """With the same entries in rows of other lengths."""
        offsets = data.offsets(shape).to(self.x.device)
        return replace(self, values=self.values.flatten(), indices=self.indices.flatten(), offsets=offsets)

    @property
    def rows(self) -> dict[str, Tensor]:
        """What a call is told of them."""
        return {} if self.offsets is None else {"offsets": self.offsets}

    def work(self, written: float, gathers: int = 1, read: float = 0.0) -> Work:
        """Every entry gathers a row, so many times; ``written`` and ``read`` numbers cross memory once."""
        entries, D, size = self.indices.numel(), self.x.shape[1], self.weight.element_size()
        moved = (written + (read or int(self.indices.unique().numel()) * D) + entries) * size + 8 * entries
        return Work(moved, 2.0 * gathers * entries * D, gathered=gathers * entries * D * size)


Call = Callable[[], Any]


@dataclass(frozen=True)
class Product:
    """One thing to measure.

    Attributes:
        op: what users call, and the result file that it belongs to.
        others: what others call, by name.
        call: makes of one of these and a problem what is timed.
        expected: the right answer, in fp32, of each output by name.
        work: what must be done at least.
        direction: what cases are called beside their problem.
        late: how much less important it is than others.
    """

    op: str
    others: dict[str, Callable[..., Tensor]]
    call: Callable[[Callable[..., Tensor], Problem], Call]
    expected: Callable[[Problem], dict[str, Tensor]]
    work: Callable[[Problem], Work]
    direction: str = ""
    late: int = 0


def decoded(decode: Callable[..., Tensor], p: Problem) -> Call:
    return partial(decode, p.values, p.indices, p.weight, **p.rows)


def differentiated(decode: Callable[..., Tensor], p: Problem) -> Call:
    """A decoder's backward, again and again over one forward, which runs at the first call."""
    leaves = p.values.detach().requires_grad_(), p.weight.detach().requires_grad_()

    @cache
    def out() -> Tensor:
        with torch.enable_grad():
            return decode(leaves[0], p.indices, leaves[1], **p.rows)

    return lambda: torch.autograd.grad(out(), leaves, p.x, retain_graph=True)


def sampled(sddmm: Callable[..., Tensor], p: Problem) -> Call:
    return partial(sddmm, p.x, p.weight, p.indices, **p.rows)


def summed(spmm_t: Callable[..., Tensor], p: Problem) -> Call:
    return partial(spmm_t, p.values, p.indices, p.x, len(p.weight), **p.rows)


DECODE = {"torch": baselines.torch_decode, baselines.ATOMICS: baselines.atomic("decode")}
SCORES = {"torch": baselines.gather_scores, baselines.ATOMICS: baselines.atomic("score")}
SUMS = {"torch": baselines.index_add, baselines.ATOMICS: baselines.atomic("scatter")}
PRODUCTS = (
    Product(
        "sparse_decode", DECODE, decoded,
        lambda p: {"out": decode(p)}, lambda p: p.work(p.x.numel()), "forward",
    ),
    Product(
        "sparse_decode", DECODE, differentiated,
        lambda p: {"d_values": scores(p), "d_weight": d_weight(p)},
        lambda p: p.work(p.weight.numel() + p.x.numel() + p.indices.numel(), gathers=2), "backward",
    ),
    Product(
        "sddmm", SCORES, sampled, lambda p: {"out": scores(p)}, lambda p: p.work(p.x.numel()), late=1,
    ),
    Product(
        "spmm_t", SUMS, summed, lambda p: {"out": d_weight(p)},
        lambda p: p.work(p.weight.numel(), read=p.x.numel()), late=1,
    ),
    Product(
        "spmm_t", SUMS, lambda spmm_t, p: summed(spmm_t, p.ones()), lambda p: {"out": d_weight(p.ones())},
        lambda p: p.ones().work(len(p.weight), read=len(p.x)), BIAS, late=3,
    ),
)  # fmt: skip


def jobs(lab: Lab) -> Iterator[Job]:
    for given in wanted(lab):
        shape = given.shape
        for product in PRODUCTS:
            if _asked(lab, product, given):
                # The weight, the expected gradient and a contender's, and room; what a gather makes.
                need = 4 * matrix_bytes((shape.M, shape.D)) + 2 * matrix_bytes((shape.N * shape.k, shape.D))
                run, bars = partial(case, lab, product, given), partial(promised, lab, product, given)
                late = replace(given, priority=given.priority + product.late)
                yield Job(product.op, given.name(product.direction), late, run, bars, need)
            if _asked_ragged(lab, product, given):
                run, bars = partial(ragged, lab, product, given), partial(even, lab, product, given)
                late = replace(given, priority=given.priority + product.late + 1)
                yield Job(product.op, _ragged_name(product, given), late, run, bars, need)
        if shape.headline and given.kind == shape.kinds[-1] and not lab.gpu:
            yield _reproducible(shape)


def wanted(lab: Lab) -> Iterator[Given]:
    if lab.choice:
        yield from grid(lab.shapes(shapes.GRID))
    elif lab.gpu:
        headline, training = lab.shapes(shapes.GPU_HEADLINE), lab.shapes(shapes.GPU_TRAINING)
        yield from each(1, headline, "bf16", kinds=KINDS)
        yield from each(3, headline, "fp32")
        yield Given(training[0], "fp32", "correlated", 4)
        yield Given(training[1], "bf16", "correlated", 4)
        yield Given(training[3], "fp32", "correlated", 6)
        yield from each(6, lab.shapes(shapes.GPU_FEW_TOKENS)[:1], "bf16")
    elif not lab.peers:
        for shape in lab.shapes(shapes.ALL):
            yield from each(0, [shape], "fp32", kinds=shape.kinds)


def _asked(lab: Lab, product: Product, given: Given) -> bool:
    if product.direction == BIAS:
        at_headline = given.shape.name == shapes.GPU_HEADLINE[0].name
        return lab.gpu and at_headline and (given.kind, given.dtype) == ("correlated", "bf16")
    if lab.choice:
        return product.direction != "backward"
    return lab.gpu or product.op == "sparse_decode" or given.shape.headline


def _asked_ragged(lab: Lab, product: Product, given: Given) -> bool:
    plain = given.kind == KINDS[0] and given.dtype == ("bf16" if lab.gpu else "fp32")
    some = given.shape.headline and given.shape.N > 1
    return some and plain and product.direction != BIAS and not lab.choice


def _ragged_name(product: Product, given: Given) -> str:
    return given.name(", ".join(filter(None, (product.direction, RAGGED))))


def case(lab: Lab, product: Product, given: Given) -> dict[str, Any]:
    p = Problem.of(given.shape, given.kind, given.dtype, lab.device)
    check = partial(close_all, product.expected(p), TOLERANCE[given.dtype])
    contenders = lab.ours(product.call(getattr(fastsparse, product.op), p), check)
    if not lab.choice:
        others = product.others if lab.gpu else {"torch": product.others["torch"]}
        contenders += [Contender(who, product.call(other, p), check) for who, other in others.items()]
    with torch.no_grad():
        return lab.measure(given.shape, contenders, product.work(p))


def ragged(lab: Lab, product: Product, given: Given) -> dict[str, Any]:
    """A product with a ragged code, beside the same op at a fixed k."""
    p, op = Problem.of(given.shape, given.kind, given.dtype, lab.device), getattr(fastsparse, product.op)
    uneven, tolerance = p.ragged(given.shape), TOLERANCE[given.dtype]
    check = partial(close_all, product.expected(uneven), tolerance)
    contenders = lab.ours(product.call(op, uneven), check)
    check = partial(close_all, product.expected(p), tolerance)
    contenders.append(Contender(FIXED, product.call(op, p), check))
    with torch.no_grad():
        return lab.measure(given.shape, contenders, product.work(p))


def even(lab: Lab, product: Product, given: Given, case: dict[str, Any]) -> list[Bar]:
    where = f"{product.op}, {given.shape.name} ({given.shape}), {_ragged_name(product, given)}"
    return speed_bars(where, {FIXED: 1 / EVEN}, case)


def promised(lab: Lab, product: Product, given: Given, case: dict[str, Any]) -> list[Bar]:
    shape, dtype = given.shape, given.dtype
    if product.op != "sparse_decode" or lab.choice:
        return []
    name = given.name(product.direction).removeprefix(f"{shape.name}, ")
    where = f"sparse_decode, {shape.name} ({shape}), {name}"
    if not lab.gpu:
        return speed_bars(where, {"torch": 1.0}, case, relation=">")
    if product.direction != "forward" or not shape.headline or dtype != "bf16":
        return []
    return [share_bar(f"{where}: over the gathers' floor", case, FORWARD)]


def _reproducible(shape: Shape) -> Job:
    """``spmm_t`` at several numbers of threads: how many elements differ in any bit."""
    before = torch.get_num_threads()
    counts = sorted({1, 2, 3, before})
    name = f"{shape.name}, correlated, spmm_t at {', '.join(map(str, counts))} threads"

    def run() -> dict[str, Any]:
        p, outs = Problem.of(shape, "correlated", "fp32", torch.device("cpu")), []
        try:
            for threads in counts:
                torch.set_num_threads(threads)
                outs.append(fastsparse.spmm_t(p.values, p.indices, p.x, shape.M).view(torch.int32))
        finally:
            torch.set_num_threads(before)
        differing = sum(int((out != outs[0]).sum()) for out in outs)
        return {"contenders": {}, "ratios": {}, "differing": differing}

    def bars(case: dict[str, Any]) -> list[Bar]:
        what = f"sparse_decode, {name}: elements that differ"
        return [Bar(what, "<=", 0, case.get("differing"), unit="elements")]

    return Job("sparse_decode", name, Given(shape, kind="correlated"), run, bars)


# The right answers, in blocks of rows whose (rows, k, D) intermediate in the reference stays small.


def blocks(p: Problem) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor | None]]:
    """values, indices, x and offsets of some rows after the others."""
    size = max(1, BLOCK * len(p.x) // (p.indices.numel() * p.x.shape[1]))
    for begin in range(0, len(p.x), size):
        rows = entries = slice(begin, begin + size)
        offsets = None
        if p.offsets is not None:
            offsets = p.offsets[begin : begin + size + 1]
            entries, offsets = slice(int(offsets[0]), int(offsets[-1])), offsets - offsets[0]
        yield p.values[entries].float(), p.indices[entries], p.x[rows].float(), offsets


def decode(p: Problem) -> Tensor:
    weight = p.weight.float()
    return torch.cat(
        [reference.spmm(values, indices, weight, offsets) for values, indices, _, offsets in blocks(p)]
    )


def scores(p: Problem) -> Tensor:
    weight = p.weight.float()
    return torch.cat([reference.sddmm(x, weight, indices, offsets) for _, indices, x, offsets in blocks(p)])


def d_weight(p: Problem) -> Tensor:
    """``reference.spmm_t`` summed over row blocks, touching only the latents that a block holds."""
    out = p.x.new_zeros(len(p.weight), p.x.shape[1], dtype=torch.float32)
    for values, indices, x, offsets in blocks(p):
        latents, which = indices.unique(return_inverse=True)
        out.index_add_(0, latents, reference.spmm_t(values, which, x, len(latents), offsets))
    return out
