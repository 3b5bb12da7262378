"""The screens of GPU kernels survive the worst that they assume of tensor cores' sums, and no more than that.

The products of bf16, which here are CPUs', get errors of just the size that is assumed, each against the
truth: down for the latents that are to be found, up for all others.
"""

import ctypes
import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from backends import GPU_BACKENDS, leave_out, missing, running
from knobs import turned
from oracle import assert_topk, random
from test_matching_pursuit import assert_same_bits
from test_topk_encode import DATA

import fastsparse

UNITS = [1.0, 1.75, 3.0]  # of D 2^-24 |x| |w|
N, D, M = 12, 64, 2048


def signs(keys: torch.Tensor, k: int) -> torch.Tensor:
    """What makes the k largest of every row smaller, and all others larger."""
    return torch.ones_like(keys).scatter_(1, keys.topk(k).indices, -1.0)


class Cuda:
    """The CUDA kernels, emulated."""

    name = "cuda-emulated-screened"

    @contextmanager
    def assuming(self, unit: float) -> Iterator[None]:
        with turned(GPU_BACKENDS["cuda-emulated"].library(), accumulation=int(4 * unit)):
            yield

    @contextmanager
    def spoiling(self, error: Callable) -> Iterator[None]:
        """Adds error(a, b) to every a @ b.T of the kernels' own."""

        def mm(a, b, *, out):
            return out.copy_(torch.mm(a, b) + error(a, b.T))

        library = torch.library.Library("aten", "IMPL")
        try:
            library.impl("mm.out", mm, "CPU")
            yield
        finally:
            library._destroy()


class Triton:
    """Triton's kernels, interpreted. A tile is told by its program."""

    name = "triton-interpreted"

    @contextmanager
    def assuming(self, unit: float) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module("topk_encode"), "screening", True)
            patch.setattr(module("_tensor_cores"), "accumulation", unit)
            yield

    @contextmanager
    def spoiling(self, error: Callable) -> Iterator[None]:
        from triton.runtime.interpreter import InterpreterBuilder

        encoder, dot = module("topk_encode")._Encoder, InterpreterBuilder.create_dot
        launch, errors, tokens = encoder._score, None, 0

        def score(self, of, atoms, *rest):
            nonlocal errors, tokens
            tokens, matrix = of.count, atoms.matrix[: atoms.count]
            # One step along D: the whole error is its.
            assert of.matrix.shape[1] == D or of.terms is None
            errors = None if of.terms is None else error(of.matrix.float(), matrix.float())
            launch(self, of, atoms, *rest)

        def create_dot(builder, a, b, *rest):
            out = dot(builder, a, b, *rest)
            if errors is not None:
                (height, width), program = out.data.shape, builder.grid_idx[0]
                down, across = program % -(-tokens // height), program // -(-tokens // height)
                part = errors[down * height :, across * width :][:height, :width].numpy()
                out.data[: part.shape[0], : part.shape[1]] += part
            return out

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(encoder, "_score", score)
            patch.setattr(InterpreterBuilder, "create_dot", create_dot)
            yield


def module(name: str):
    return importlib.import_module(f"fastsparse.kernels.{name}")


@pytest.fixture(params=[Cuda, Triton], ids=lambda kind: kind.__name__)
def machine(request):
    name = request.param.name
    if (reason := missing(name.removesuffix("-screened"))) is not None:
        leave_out(reason)
    with running(name):
        yield request.param()


def encode(machine, x, weight, bias=None, *, k, assumed, actual, **options):
    """topk_encode on sums that are off by ``actual`` units."""
    keys = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    away = signs(keys, k)
    if options.get("activation") == "abs":
        away = signs(keys.abs(), k) * keys.sign()
    error = actual * D * 2.0**-24 * away

    def of_product(a, b):
        assert len(a) == N, "a product has all tokens"
        assert len(b) == M, "and all latents"
        size = a.double().norm(dim=1).unsqueeze(1) * b.double().norm(dim=1)
        return (error * size).nan_to_num(0, 0, 0).float()

    with machine.assuming(assumed), machine.spoiling(of_product):
        return fastsparse.topk_encode(x, weight, bias, k=k, **options)


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("data", DATA)
def test_worst_sums_change_no_code(machine, data, unit):
    x, weight, bias = DATA[data](random(N, D, seed=1), random(M, D, seed=2), random(M, seed=3))
    for activation in ("none", "abs"):
        options = {"k": 16, "activation": activation}
        code = encode(machine, x, weight, bias, **options, assumed=unit, actual=unit)
        assert_topk(code, x, weight, bias, **options)


def hairbreadth() -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and latents, exact in bf16, whose scores fall by 2^-13 from one to the next.

    That is a fourth of what 3 D 2^-24 |x| |w| come to, and sums of theirs are exact in whatever order.
    """
    x, weight = random(N, D, seed=1).sign(), random(1, D, seed=2).sign().repeat(M, 1)
    places = torch.arange(M).flip(0)
    x[:, -2:] = 1
    weight[:, -2], weight[:, -1] = places // 128 * 2.0**-6, places % 128 * 2.0**-13
    assert torch.equal(weight, weight.bfloat16().float())
    return x, weight


def finds_hairbreadth(machine, **errors) -> bool:
    code = encode(machine, *hairbreadth(), k=2, activation="none", **errors)
    return code.indices.tolist() == [[0, 1]] * N


@pytest.mark.parametrize("unit", UNITS)
def test_worst_sums_where_scores_are_a_hairbreadth_apart(machine, unit):
    assert finds_hairbreadth(machine, assumed=unit, actual=unit)


@pytest.mark.parametrize(("assumed", "actual"), [(0.0, 3.0), (1.0, 4.0), (1.75, 7.0), (3.0, 12.0)])
def test_worse_sums_than_assumed_are_not_survived(machine, assumed, actual):
    assert not finds_hairbreadth(machine, assumed=assumed, actual=actual)


def pursue(cuda: Cuda, method: str, *, assumed: float, actual: float):
    """Two steps among a few atoms that are close together, on sums that are off by ``actual`` units."""
    base, part = random(1, D, seed=1), D
    x, dictionary = base + 0.1 * random(N, D, seed=2), base + 2.0**-13 * random(100, D, seed=3)

    def of_product(a, b):
        # High and low part of what is multiplied, see Split.
        a, b = a[:, :part].double() + a[:, part : 2 * part], b[:, :part].double() + b[:, 2 * part :]
        keys = a @ b.T
        size = a.norm(dim=1).unsqueeze(1) * b.norm(dim=1)
        return (actual * 3 * D * 2.0**-24 * size * signs(keys.abs(), 1) * keys.sign()).float()

    with cuda.assuming(assumed), cuda.spoiling(of_product):
        return fastsparse.matching_pursuit(x, dictionary, k=2, method=method)


@pytest.mark.parametrize("method", ["direct", "gram"])
def test_worst_sums_change_no_pursuit(method):
    if (reason := missing("cuda-emulated")) is not None:
        leave_out(reason)
    with running(Cuda.name):
        found = {
            (assumed, actual): pursue(Cuda(), method, assumed=assumed, actual=actual)
            for assumed, actual in ((1.0, 0.0), *((unit, unit) for unit in UNITS), (1.0, 16.0))
        }
        worse = found.pop((1.0, 16.0))
        assert_same_bits(found.values())
        assert not torch.equal(worse.indices, found[1.0, 0.0].indices), "nothing was put to the test"


def test_both_languages_assume_the_same(monkeypatch):
    if (reason := missing("cuda-emulated")) is not None:
        leave_out(reason)
    of_cuda = GPU_BACKENDS["cuda-emulated"].library().fastsparse_cuda_accumulation
    of_cuda.argtypes, of_cuda.restype = [ctypes.c_int], ctypes.c_int
    for major in range(7, 14):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, major=major: (major, 0))
        assert module("_tensor_cores").accumulation_unit(torch.device("cuda")) == of_cuda(major) / 4


def on_tensor_cores(x: torch.Tensor, w: torch.Tensor, L: int, F: int) -> torch.Tensor:
    """Sums over D of x w (B, D), fp64 numbers that bf16 holds, as tensor cores add: see accumulation_unit."""

    def exponent(numbers):
        return torch.frexp(numbers).exponent.double().masked_fill(numbers == 0, -500)

    def cut(numbers, unit):
        return (numbers / unit).trunc() * unit

    total = torch.zeros(len(x), 1, dtype=torch.float64)
    for some, others in zip(x.split(L, dim=1), w.split(L, dim=1), strict=True):
        # Two factors in [1, 2) each, the product is left in [1, 4).
        largest = torch.cat((exponent(total), exponent(some) + exponent(others) - 1), 1).amax(1, keepdim=True)
        terms = cut(torch.cat((total, some * others), 1), 2.0 ** (largest - 1 - F))
        total = terms.sum(dim=1, keepdim=True)
        total = cut(total, 2.0 ** (exponent(total) - 24))
    return total[:, 0]


@pytest.mark.parametrize("D", [1, 7, 16, 100, 2048])
@pytest.mark.parametrize(("unit", "L", "F"), [(1, 16, 25), (1, 8, 25), (1.75, 8, 24), (3, 8, 23), (3, 4, 23)])
def test_sums_are_as_good_as_assumed(unit, L, F, D):
    x, w = (random(40, D, seed=seed).bfloat16().double() for seed in (1, 2))
    w[10:20] = x[10:20]  # nothing cancels
    w[20:30] = w[20:30].abs() * x[20:30].sign() * 2.0 ** (torch.arange(D) % 9)
    w[30:, D // 2 :] = -w[30:, : D - D // 2]  # all of it does
    x[30:, D // 2 :] = x[30:, : D - D // 2]
    error = (on_tensor_cores(x, w, L, F) - (x * w).sum(dim=1)).abs()
    size = x.norm(dim=1) * w.norm(dim=1) * 2.0**-24
    assert (error <= (unit * D + 3) * size).all()
    if D == 2048:
        assert (error > D / 64 * size).any(), "sums that round would do as well"
