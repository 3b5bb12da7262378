"""Random calls of every op, on every backend, held against the oracle: `make fuzz`.

Everything about a call follows from its seed: op, backend, shape, dtype, layout, numbers, options, threads
and the mode of the floating-point unit. So what fails is had again by its seed.

    python tests/fuzz.py --minutes 10 --seed 1000 --op topk_encode --backend cpu-avx2
"""

import argparse
import math
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

if not torch.cuda.is_available():  # before anything imports Triton, which asks once
    os.environ.setdefault("TRITON_INTERPRET", "1")

from backends import GPU_BACKENDS, backend_names, running
from float_modes import FLOAT_MODES, ORDINARY, current_mode, float_mode
from oracle import (
    DTYPES,
    LAYOUTS,
    assert_pursuit,
    assert_spmm,
    assert_spmm_t,
    assert_topk,
    flushing,
    laid_out,
)
from recurrences import CELLS, Textbook, assert_follows, assert_same_states, assert_states
from test_linear_recurrence import assert_gradient, assert_recurrence, gradient
from test_sparse_products import PRODUCTS, Product
from torch import Tensor

import fastsparse
from fastsparse.ops._library import OPS as RECORDS

# Of numbers: what a matrix of them is like.
FAMILIES = (
    "gaussian",
    "ties",  # small integers, whose sums are exact
    "zeros",
    "subnormal",
    "tiny",  # whose products are subnormal
    "huge",  # whose sums overflow
    "mixed",  # rows of all sizes
    "not finite",
    "duplicates",  # rows that are all but the same
)
BOUNDARIES = (4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


class Draw(random.Random):
    """What a call is made of, drawn from its seed."""

    def __init__(self, seed: int, backends: Iterable[str], ops: Iterable[str]) -> None:
        super().__init__(seed)
        self.generator = torch.Generator().manual_seed(seed)
        who = random.Random(f"who {seed}")  # of its own, so that the call is the same where both are given
        self.backend, self.op = who.choice(tuple(backends)), who.choice(tuple(ops))
        self.said: dict[str, object] = {"backend": self.backend, "op": self.op}
        slow = self.backend.removesuffix("-screened") in GPU_BACKENDS
        self.most = 400 if slow else 5000  # of a size
        self.work = 1e5 if slow else 2e6  # of the oracle, in multiplications
        self.dtype = self.choose("dtype", DTYPES)
        odd = self.random() < 0.3 and self.backend.startswith("cpu")
        self.mode = self.say("mode", self.choice(FLOAT_MODES) if odd else ORDINARY)
        # The library's products in other threads have the mode that these were made in.
        self.threads = self.say("threads", 1 if odd else self.randint(1, 3))

    def say(self, name: str, value):
        """Remember a choice for the description of the call."""
        self.said[name] = value
        return value

    def choose(self, name: str, values: Iterable):
        return self.say(name, self.choice(tuple(values)))

    def flag(self, name: str, chance: float = 0.5) -> bool:
        return self.say(name, self.random() < chance)

    def size(self, name: str, most: float) -> int:
        """From 1 on, often next to the size of a block."""
        most = max(1, int(min(most, self.most)))
        near = [b + e for b in BOUNDARIES for e in (-1, 0, 1) if b + e <= most] or [1]
        kind = self.random()
        size = self.choice(near) if kind < 0.4 else self.randint(1, min(most, 40 if kind < 0.8 else most))
        return self.say(name, size)

    def gaussian(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=self.generator)

    def numbers(self, name: str, *shape: int, family: str | None = None) -> Tensor:
        """Of the call's dtype, in some layout."""
        family = family or self.choose(f"{name} are", FAMILIES)
        info = torch.finfo(self.dtype)
        sums = torch.finfo(torch.float64 if self.dtype == torch.float64 else torch.float32)
        values, rows = self.gaussian(*shape), (shape[0], *[1] * (len(shape) - 1))
        if family == "ties":
            values = self.integers(-2, 3, *shape).double()
        elif family == "zeros":
            values *= self.integers(0, 2, *rows)  # with signs
        elif family == "subnormal":
            values *= info.tiny * 0.1
        elif family == "tiny":
            values *= max(sums.tiny**0.5, info.tiny)
        elif family == "huge":
            values *= info.max / 10 ** self.randint(1, 3)
        elif family == "mixed":
            low, high = math.log2(info.tiny * info.eps), math.log2(info.max) / 2
            values *= 2.0 ** (low + (high - low) * torch.rand(rows, generator=self.generator).double())
        elif family == "not finite":
            bad = torch.tensor([torch.nan, torch.inf, -torch.inf]).double()[self.integers(0, 3, *shape)]
            rare = torch.rand(shape, generator=self.generator) < self.choice((0.3, 0.02, 0.002))
            values = torch.where(rare, bad, values)
        elif family == "duplicates":
            values = values[self.integers(0, min(3, len(values)), len(values))] * (1 + values.sign() * 1e-7)
        values = values.to(self.dtype)
        layout = self.choose(f"{name}' layout", LAYOUTS) if len(shape) <= 2 else "contiguous"
        return laid_out(values, layout)

    def code(self, M: int, *shape: int) -> Tensor:
        """Indices, any of which may come again, or a few all the time."""
        hot = self.choose("hot", (M, M, min(M, 3)))
        return laid_out(self.integers(0, hot, *shape), self.choose("indices' layout", LAYOUTS))

    def bounds(self, T: int) -> Tensor:
        """Of sequences that fill T steps."""
        inner = self.integers(0, T + 1, self.randint(0, 5))
        return torch.cat((torch.tensor([0]), inner.sort().values, torch.tensor([T])))

    def run(self, call: Callable):
        """What the call returns, in its mode; the same bits a second time."""
        with float_mode(self.mode):
            found = call()
            again = call() if self.random() < 0.2 else found
            assert current_mode() == self.mode, "the caller's mode was not given back"
        for one, other in zip(_tensors(found), _tensors(again), strict=True):
            assert torch.equal(_bits(one), _bits(other)), "a second call gave other bits"
        return found

    def flushed(self, *tensors: Tensor) -> list[Tensor]:
        """What sums make of their arguments in the call's mode."""
        if "flushed" not in self.mode or self.dtype == torch.float16:
            return list(tensors)
        tiny = torch.finfo(torch.float64 if self.dtype == torch.float64 else torch.float32).tiny
        return [torch.where(tensor.double().abs() < tiny, 0, tensor) for tensor in tensors]

    def oracle(self):
        """In which the sums' oracle allows for the call's mode."""
        return flushing() if "flushed" in self.mode else nullcontext()

    def __str__(self) -> str:
        return ", ".join(f"{name} {value}" for name, value in self.said.items())


def _tensors(found) -> tuple[Tensor, ...]:
    return (found,) if isinstance(found, Tensor) else tuple(found)


def _bits(tensor: Tensor) -> Tensor:
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.view(integers[tensor.itemsize]) if tensor.is_floating_point() else tensor


# ---- the ops: each draws a call, checks it, and returns how many rows it was ----


def topk_encode(draw: Draw) -> int:
    groups = draw.choose("groups", (1, 1, 1, 2, 5))
    size = draw.size("latents of each", draw.most / groups)
    M = groups * size
    D = draw.size("D", 1200)
    N = draw.size("N", draw.work / (M * D) ** 0.5 / 20)
    x, weight = draw.numbers("x", N, D), draw.numbers("weight", M, D)
    bias = draw.numbers("bias", M) if draw.flag("biased") else None
    scale = draw.numbers("scales", M) if draw.flag("scaled", 0.3) else None
    mask = None
    if draw.flag("masked", 0.3):
        mask = torch.rand(M, generator=draw.generator) < draw.choice((0.1, 0.9))
        mask[draw.randrange(size) :: size] = True
    eligible = size if mask is None else int(mask.view(groups, size).sum(dim=1).min())
    k = draw.size("k", eligible)
    options = {"k": k, "activation": draw.choose("activation", ("relu", "none", "abs"))}
    vectors = {"latent_scale": scale, "latent_mask": mask}
    call = options | vectors | {"groups": groups}
    code = draw.run(lambda: fastsparse.topk_encode(x, weight, bias, **call))
    parts = [part.split(k, dim=1) for part in code]
    for g, (values, indices) in enumerate(zip(*parts, strict=True)):
        its = slice(g * size, (g + 1) * size)
        of_bias, *of_others = (None if v is None else v[its] for v in (bias, *vectors.values()))
        found = values.contiguous(), (indices - g * size).contiguous()
        assert_topk(found, x, weight[its], of_bias, **options, **dict(zip(vectors, of_others, strict=True)))
    # The reference's gradient is that of the whole product, in which 0 times NaN is NaN.
    sparse = draw.backend != "reference" or "not finite" not in draw.said.values()
    if draw.flag("differentiated", 0.3) and sparse:
        _differentiate(draw, code, x, weight, bias, call)
    if all(draw.said.get(f"{name} are", "ties") == "ties" for name in ("x", "weight", "bias", "scales")):
        keys = x.double() @ weight.double().T + (0 if bias is None else bias.double())
        keys = keys * (1 if scale is None else scale.double())
        keys = keys.abs() if options["activation"] == "abs" else keys
        keys = keys if mask is None else keys.masked_fill(~mask, -torch.inf)
        order = keys.view(N, groups, size).sort(dim=2, descending=True, stable=True).indices[:, :, :k]
        assert torch.equal(code[1], (order + torch.arange(groups).view(-1, 1) * size).flatten(1))
    return N


def _differentiate(draw: Draw, code, x: Tensor, weight: Tensor, bias: Tensor | None, options: dict) -> None:
    """The gradients are sparse products of the code that came out."""
    values, indices = code
    d_values = draw.gaussian(*values.shape).to(draw.dtype) * (values != 0)
    ones = torch.ones(len(x), 1, dtype=draw.dtype)
    leaves = [tensor.detach().requires_grad_() for tensor in (x, weight, bias) if tensor is not None]

    def gradients():
        again, _ = fastsparse.topk_encode(*leaves, *[None] * (3 - len(leaves)), **options)
        return torch.autograd.grad(again, leaves, d_values)

    found = draw.run(gradients)
    d_values, x, weight = draw.flushed(d_values, x, weight)
    with draw.oracle():
        assert_spmm(found[0], d_values, indices, weight)
        assert_spmm_t(found[1], d_values, indices, x, len(weight))
        if bias is not None:
            assert_spmm_t(found[2][:, None], d_values, indices, ones, len(weight))


def _multiply(draw: Draw, product: Product) -> int:
    M, k, D = (
        draw.size("M", 3000),
        draw.size("k", 70),
        draw.size("D", 1200 if "weight" in product.takes else 400),
    )
    N = draw.size("N", draw.work / (k * D))
    ragged = draw.flag("ragged")
    code = (N * k,) if ragged else (N, k)
    shapes = {"values": code, "x": (N, D), "weight": (M, D)}
    made = [
        M if name == "M" else draw.code(M, *code) if name == "indices" else draw.numbers(name, *shapes[name])
        for name in product.takes
    ]
    if ragged:  # rows end anywhere, or most of them at the first entries
        ends = torch.rand(N, generator=draw.generator).pow(draw.choose("skew", (1, 8))) * (N * k + 1)
        ends[-1] = N * k
        made.append(F.pad(ends.long().sort().values, (1, 0)))
    out = draw.run(lambda: product(*made))
    for place in product.dense:
        (made[place],) = draw.flushed(made[place])
    with draw.oracle():
        product.check(out, *made)
    return N


def _pursued(draw: Draw) -> tuple[Tensor, Tensor, dict]:
    M, D = draw.size("M", 1500), draw.size("D", 600)
    N = draw.size("N", draw.work / (M * D) ** 0.5 / 40)
    dictionary = draw.numbers("atoms", M, D)
    options = {"nonnegative": draw.flag("nonnegative"), "normalized": False}
    if draw.said["atoms are"] in ("gaussian", "duplicates") and draw.flag("normalized"):
        options["normalized"] = True
        dictionary = (dictionary.double() / dictionary.double().norm(dim=1, keepdim=True)).to(draw.dtype)
    return draw.numbers("x", N, D), dictionary, options


def matching_pursuit(draw: Draw) -> int:
    x, dictionary, options = _pursued(draw)
    options["k"] = draw.size("k", 12)
    if draw.flag("tolerant", 0.3):
        options["tol"] = float(x.double().norm(dim=1).nan_to_num(1, 1, 1).median()) * draw.random()
    method = draw.choose("method", ("auto", "direct", "gram"))
    found = draw.run(lambda: fastsparse.matching_pursuit(x, dictionary, method=method, **options))
    assert_pursuit(found, x, dictionary, **options)
    return len(x)


def matching_pursuit_step(draw: Draw) -> int:
    x, dictionary, options = _pursued(draw)
    value, index, residual = draw.run(lambda: fastsparse.matching_pursuit_step(x, dictionary, **options))
    assert_pursuit((value[:, None], index[:, None], residual), x, dictionary, k=1, **options)
    return len(x)


def linear_recurrence(draw: Draw) -> int:
    pairs, packed, reverse = draw.flag("pairs"), draw.flag("packed", 0.3), draw.flag("reverse")
    T, H = draw.size("T", 200), draw.size("H", 150)
    B = 1 if packed else draw.size("B", 4)
    bounds = draw.bounds(T) if packed else None
    S = len(bounds) - 1 if packed else B
    families = ("gaussian",) if "flushed" in draw.mode else ("gaussian", "ties", "zeros", "tiny")
    a, b, h0, d_h = (
        draw.numbers(name, *shape, family=draw.choose(f"{name} are", families))
        for name, shape in (
            ("a", (B, T, *(2, 2) * pairs, H)),
            ("b", (B, T, *(2,) * pairs, H)),
            ("h0", (S, *(2,) * pairs, H)),
            ("d_h", (B, T, *(2,) * pairs, H)),
        )
    )
    a = a * draw.choose("decay", (0.3, 0.7, 1))
    h0 = h0 if draw.flag("started") else None
    h = draw.run(lambda: fastsparse.linear_recurrence(a, b, h0, reverse=reverse, cu_seqlens=bounds))
    assert_recurrence(h, a, b, h0, reverse, bounds)
    if h.isfinite().all():
        found = draw.run(lambda: gradient(a, h0, h, d_h, reverse, bounds))
        assert_gradient(found, a, h0, h, d_h, reverse, bounds)
    return B * T


def _gated(draw: Draw, cell: Textbook) -> int:
    packed, scale = draw.flag("packed", 0.3), draw.choose("scale", (0.1, 0.5, 1, 3, 10, 50))
    T, H = draw.size("T", 600), draw.size("H", 40)
    B = 1 if packed else draw.size("B", 4)
    bounds = draw.bounds(T) if packed else None
    S = len(bounds) - 1 if packed else B
    u = draw.numbers("u", B, T, 3, H, family="gaussian") * draw.choose("of size", (0, 0.1, 1, 5))
    weights = [scale * draw.numbers("weights", rows, H, family="gaussian") for rows in cell.weights]
    state = [draw.numbers("state", S, H, family="gaussian") for _ in range(cell.states)]
    solver = draw.choose("solver", ("auto", "sequential", "newton", "shooting"))
    outs = draw.run(lambda: cell.run(u, weights, state, cu_seqlens=bounds, solver=solver))
    assert all(out.isfinite().all() for out in outs)
    if scale <= 1:
        assert_same_states(
            outs, draw.run(lambda: cell.run(u, weights, state, cu_seqlens=bounds, solver="sequential"))
        )
        assert_states(cell, outs, u, weights, state, bounds)
    elif not packed and draw.dtype in (torch.float32, torch.float64):
        assert_follows(cell, outs, u, weights, state)
    return B * T


OPS: dict[str, Callable[[Draw], int]] = {
    op.__name__: op for op in (topk_encode, matching_pursuit, matching_pursuit_step, linear_recurrence)
}
OPS |= {product.name: lambda draw, product=product: _multiply(draw, product) for product in PRODUCTS}
OPS |= {name: lambda draw, cell=cell: _gated(draw, cell) for name, cell in CELLS.items()}
for _op in sorted(RECORDS.keys() - OPS.keys()):  # whose call stands with its tests
    if Path(__file__).with_name(f"test_{_op}.py").exists():
        _tests = import_module(f"test_{_op}")
        if hasattr(_tests, "random_call"):
            OPS[_op] = _tests.random_call


# ---- many calls ----


@dataclass
class Report:
    """Calls and rows by op, how many a backend doesn't serve, and the seeds that failed."""

    calls: Counter = field(default_factory=Counter)
    rows: Counter = field(default_factory=Counter)
    left_out: int = 0
    failed: list[int] = field(default_factory=list)

    def __str__(self) -> str:
        ops = ", ".join(f"{op} {calls:,}" for op, calls in sorted(self.calls.items()))
        calls, rows = sum(self.calls.values()), sum(self.rows.values())
        return (
            f"{calls:,} calls, {rows:,} rows, {len(self.failed)} failed, {self.left_out:,} left out ({ops})"
        )


def fuzz(
    seeds: Iterable[int],
    *,
    backends: Iterable[str] | None = None,
    ops: Iterable[str] = OPS,
    say=print,
    verbose=False,
) -> Report:
    """Make the calls of some seeds; `say` what fails, and how it is had again."""
    backends, ops, report = tuple(backends or backend_names(screened=True)), tuple(ops), Report()
    threads, said = torch.get_num_threads(), time.monotonic()
    try:
        for seed in seeds:
            draw = Draw(seed, backends, ops)
            torch.set_num_threads(draw.threads)
            if verbose:
                say(f"seed {seed}: {draw}")
            try:
                with running(draw.backend):
                    rows = OPS[draw.op](draw)
            except pytest.skip.Exception:
                report.left_out += 1
                continue
            except Exception as error:
                report.failed.append(seed)
                again = f"make fuzz SEED={seed} CALLS=1 OP={draw.op} BACKEND={draw.backend}"
                say(f"seed {seed}: {draw}\n  {type(error).__name__}: {error}\n  again: {again}")
                rows = 0
            report.calls[draw.op] += 1
            report.rows[draw.op] += rows
            if time.monotonic() - said > 30:
                said = time.monotonic()
                say(f"up to seed {seed}: {report}")
    finally:
        torch.set_num_threads(threads)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10, help="how long, unless --calls says how many")
    parser.add_argument("--calls", type=int)
    parser.add_argument("--seed", type=int, help="of the first call, on which others follow; else the time")
    parser.add_argument("--op", choices=OPS, help="only this one")
    parser.add_argument("--backend", choices=backend_names(screened=True), help="only this one")
    parser.add_argument(
        "--verbose", action="store_true", help="say what is called before it is, and may crash"
    )
    told = parser.parse_args()
    first = told.seed if told.seed is not None else int(time.time()) * 1000
    end = time.monotonic() + 60 * told.minutes

    def seeds():
        seed = first
        while seed < first + told.calls if told.calls else time.monotonic() < end:
            yield seed
            seed += 1

    print(f"seeds from {first} on", flush=True)
    report = fuzz(
        seeds(),
        backends=[told.backend] if told.backend else None,
        ops=[told.op] if told.op else OPS,
        say=lambda line: print(line, flush=True),
        verbose=told.verbose,
    )
    print(report)
    sys.exit(bool(report.failed))


if __name__ == "__main__":
    main()
