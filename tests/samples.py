"""Samples of every op: what users call, as functions of tensors, and the calls of ops that follow.

What tests the surroundings of an op (PyTorch's machinery, GPUs, sanitizers) takes its calls from here, small
enough to be differentiated numerically or large enough for many blocks.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from oracle import random
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastsparse
from fastsparse import backend
from fastsparse.ops._library import OPS


class Sizes(NamedTuple):
    """N tokens, which are B sequences of T steps in H channels; D, M, k; and more than k of the latents."""

    N: int
    D: int
    M: int
    k: int
    many: int
    T: int
    H: int

    @property
    def E(self) -> int:
        """Entries of a ragged code; a property, which PyTorch 2.10 can't compile."""
        return self.N * self.k


SMALL = Sizes(N=5, D=4, M=11, k=3, many=11, T=2, H=4)
LARGE = Sizes(N=65, D=72, M=1030, k=9, many=300, T=40, H=40)

SHAPES = {
    "entries": "E", "x": "ND", "weight": "MD", "bias": "M", "offset": "D", "values": "Nk",
    "a": "NTH", "b": "NTH", "blocks": "NT22H", "pairs": "NT2H", "h0": "NH", "c0": "NH",
    "coefficients": "3", "constant": "1",
    "u": "NT3H", "gates": "3H", "peephole": "2H", "h0s": "3H", "c0s": "3H",  # of three sequences
}  # fmt: skip


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _bounds(sizes: Sizes, seed: int) -> Tensor:
    """Of three sequences that lie end to end in all steps of all rows; some may be empty."""
    steps = sizes.N * sizes.T
    return torch.tensor([0, steps // (3 + seed), steps - steps // (2 + seed), steps])


def _offsets(sizes: Sizes, seed: int) -> Tensor:
    """Rows of very different length, some of them empty, which take up all entries."""
    weights = ((torch.arange(sizes.N) * 7 + seed) % 5) ** 3
    bounds = F.pad(weights.cumsum(0), (1, 0)) * (sizes.N * sizes.k) // weights.sum().clamp(min=1)
    bounds[sizes.N :] = sizes.N * sizes.k
    return bounds


# What no gradient reaches. Those of SMALL samples can be traced, whatever the number of tokens.
CONSTANTS: dict[str, Callable[[Sizes, int], Tensor]] = {
    "indices": lambda s, seed: (torch.arange(s.N).unsqueeze(1) * (7 + seed) + torch.arange(s.k)) % s.M,
    # By Zipf's law: a few latents are in most rows.
    "hot": lambda s, seed: (
        (s.M ** torch.rand(s.N, s.k, generator=_generator(seed), dtype=torch.float64))
        .long()
        .clamp(max=s.M - 1)
    ),
    "mask": lambda s, seed: torch.arange(s.M) % (4 + seed) != 1,
    "scale": lambda s, seed: torch.linspace(-1 - seed, 2, s.M),
    "bounds": _bounds,
    "thresholds": lambda s, seed: torch.linspace(-0.5, 3 + seed, s.M),
    "latents": lambda s, seed: (torch.arange(s.N * s.k) * (5 + seed)) % s.M,
    "offsets": lambda s, seed: _offsets(s, seed),
}


@dataclass(frozen=True)
class Sample:
    """One call.

    Attributes:
        call: takes the sizes and the tensors; returns a tensor or several.
        names: of the tensors, by which they are made.
        core: whether it goes through all of PyTorch's machinery, on every backend.
        ragged: whether it takes or makes a code whose rows can't be regrouped as its tokens are.
        counted: whether shapes tell how much comes out.
    """

    call: Callable[..., Tensor | tuple[Tensor, ...]]
    names: tuple[str, ...]
    core: bool = False
    ragged: bool = False
    counted: bool = True

    @property
    def inputs(self) -> tuple[str, ...]:
        """The names of what has a gradient."""
        return tuple(name for name in self.names if name not in CONSTANTS)

    def run(self, sizes: Sizes, made: Sequence[Tensor]) -> tuple[Tensor, ...]:
        out = self.call(sizes, *made)
        return tuple(out) if isinstance(out, tuple) else (out,)

    def make(self, sizes: Sizes, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
        """The tensors; another seed gives other numbers, other latents, another mask."""
        return [make(name, sizes, dtype=dtype, seed=seed + i) for i, name in enumerate(self.names)]

    def __call__(self, *inputs: Tensor) -> Tensor:
        """The differentiable outputs in one tensor, of the inputs alone; SMALL but for the tokens."""
        given = dict(zip(self.inputs, inputs, strict=True))
        first = inputs[0]
        sizes = SMALL._replace(N=first.shape[0] // (SMALL.k if "entries" in given else 1))
        made = [
            given[name] if name in given else make(name, sizes, dtype=first.dtype).to(first.device)
            for name in self.names
        ]
        outs = [out for out in self.run(sizes, made) if out.is_floating_point()]
        return outs[0] if len(outs) == 1 else torch.cat([out.flatten(1) for out in outs], dim=1)


def make(name: str, sizes: Sizes, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """A tensor by its name."""
    if name in CONSTANTS:
        constant = CONSTANTS[name](sizes, seed)
        return constant.to(dtype) if constant.is_floating_point() else constant
    shape = [int(size) if size.isdecimal() else getattr(sizes, size) for size in SHAPES[name]]
    scale = 0.4 if name in ("a", "blocks") else 1.0  # else states outgrow all types
    return random(*shape, seed=seed, dtype=dtype, scale=scale)


def tensors(*names: str, dtype: torch.dtype = torch.float32, tokens: int = SMALL.N) -> list[Tensor]:
    """Small tensors by their names, that want a gradient."""
    sizes = SMALL._replace(N=tokens)
    return [make(name, sizes, dtype=dtype, seed=i).requires_grad_() for i, name in enumerate(names)]


def _end_to_end(tensor: Tensor) -> Tensor:
    """Rows (B, T, ...) as sequences in one (1, B T, ...)."""
    return tensor.flatten(0, 1).unsqueeze(0)


SAMPLES = {
    "topk_encode": Sample(
        lambda s, x, weight, bias: fastsparse.topk_encode(x, weight, bias, k=s.k),
        ("x", "weight", "bias"),
        core=True,
    ),
    "topk_encode, abs, scaled": Sample(
        lambda s, x, weight, scale: fastsparse.topk_encode(
            x, weight, k=s.k, activation="abs", latent_scale=scale
        ),
        ("x", "weight", "scale"),
        core=True,
    ),
    "topk_encode, many, scaled, masked": Sample(
        lambda s, x, weight, bias, scale, mask: fastsparse.topk_encode(
            x, weight, bias, k=s.many * 2 // 3, activation="none", latent_scale=scale, latent_mask=mask
        ),
        ("x", "weight", "bias", "scale", "mask"),
    ),
    "topk_encode, many": Sample(
        lambda s, x, weight: fastsparse.topk_encode(x, weight, k=s.many, activation="none"), ("x", "weight")
    ),
    "topk_encode, groups": Sample(
        lambda s, x, weight, bias: fastsparse.topk_encode(
            x, weight[: s.M // 2 * 2], bias[: s.M // 2 * 2], k=min(s.k, s.M // 2), groups=2
        ),
        ("x", "weight", "bias"),
        core=True,
    ),
    "topk_encode, groups, masked": Sample(  # two thirds of each are eligible, or the one that there is
        lambda s, x, weight, mask: fastsparse.topk_encode(
            x,
            weight[: s.M // 2 * 2],
            k=max(1, min(s.k, s.M // 2 * 2 // 3)),
            activation="none",
            latent_mask=mask[: s.M // 2 * 2] | (s.M < 4),
            groups=2,
        ),
        ("x", "weight", "mask"),
    ),
    "sparse_decode": Sample(
        lambda s, values, indices, weight, offset: fastsparse.sparse_decode(values, indices, weight, offset),
        ("values", "indices", "weight", "offset"),
        core=True,
    ),
    "spmm": Sample(
        lambda s, values, indices, weight: fastsparse.spmm(values, indices, weight),
        ("values", "indices", "weight"),
        core=True,
    ),
    "sddmm": Sample(
        lambda s, x, weight, indices: fastsparse.sddmm(x, weight, indices),
        ("x", "weight", "indices"),
        core=True,
    ),
    "spmm_t": Sample(
        lambda s, values, indices, x: fastsparse.spmm_t(values, indices, x, s.M),
        ("values", "indices", "x"),
        core=True,
    ),
    "batch_topk_encode": Sample(  # .code, which PyTorch 2.10 can't compile: the threshold has no gradient
        lambda s, x, weight, bias: fastsparse.batch_topk_encode(x, weight, bias, total=s.N * s.k)[:3],
        ("x", "weight", "bias"),
        core=True,
        ragged=True,
    ),
    "batch_topk_encode, abs, scaled, masked": Sample(
        lambda s, x, weight, scale, mask: fastsparse.batch_topk_encode(
            x,
            weight,
            total=max(1, s.N * s.k * 2 // 3),
            activation="abs",
            latent_scale=scale,
            latent_mask=mask,
        ),
        ("x", "weight", "scale", "mask"),
        ragged=True,
    ),
    "threshold_encode": Sample(
        lambda s, x, weight, bias, thresholds: fastsparse.threshold_encode(
            x, weight, bias, threshold=thresholds, max_entries=s.N * s.M
        ),
        ("x", "weight", "bias", "thresholds"),
        core=True,
        ragged=True,
    ),
    "threshold_encode, abs, masked": Sample(
        lambda s, x, weight, mask: fastsparse.threshold_encode(
            x, weight, threshold=2.0, margin=0.5, activation="abs", latent_mask=mask
        ),
        ("x", "weight", "mask"),
        ragged=True,
        counted=False,
    ),
    "sparse_decode, ragged": Sample(
        lambda s, entries, latents, weight, offset, offsets: fastsparse.sparse_decode(
            entries, latents, weight, offset, offsets
        ),
        ("entries", "latents", "weight", "offset", "offsets"),
        ragged=True,
    ),
    "spmm, ragged": Sample(
        lambda s, entries, latents, weight, offsets: fastsparse.spmm(entries, latents, weight, offsets),
        ("entries", "latents", "weight", "offsets"),
        core=True,
        ragged=True,
    ),
    "sddmm, ragged": Sample(
        lambda s, x, weight, latents, offsets: fastsparse.sddmm(x, weight, latents, offsets),
        ("x", "weight", "latents", "offsets"),
        core=True,
        ragged=True,
    ),
    "spmm_t, ragged": Sample(
        lambda s, entries, latents, x, offsets: fastsparse.spmm_t(entries, latents, x, s.M, offsets),
        ("entries", "latents", "x", "offsets"),
        core=True,
        ragged=True,
    ),
    "spmm_t, hot latents": Sample(
        lambda s, values, hot, x: fastsparse.spmm_t(values, hot, x, s.M), ("values", "hot", "x")
    ),
    "spmm_t, one column": Sample(
        lambda s, values, hot, x: fastsparse.spmm_t(values, hot, x[:, :1], s.M), ("values", "hot", "x")
    ),
    "matching_pursuit": Sample(
        lambda s, x, weight: fastsparse.matching_pursuit(x, weight, k=s.k, coalesce=True)[::2],
        ("x", "weight"),
        core=True,
    ),
    "matching_pursuit, direct": Sample(
        lambda s, x, weight: fastsparse.matching_pursuit(x, weight, k=s.k, method="direct"), ("x", "weight")
    ),
    "matching_pursuit, gram, nonnegative": Sample(
        lambda s, x, weight: fastsparse.matching_pursuit(
            x, weight, k=s.k, tol=0.1, nonnegative=True, method="gram"
        ),
        ("x", "weight"),
        core=True,
    ),
    "matching_pursuit, normalized, values alone": Sample(
        lambda s, x, weight: fastsparse.matching_pursuit(
            x.detach(), torch.nn.functional.normalize(weight, dim=1), k=s.k, normalized=True
        )[0],
        ("x", "weight"),
    ),
    "matching_pursuit_step": Sample(
        lambda s, x, weight: fastsparse.matching_pursuit_step(x, weight)[2], ("x", "weight"), core=True
    ),
    "matching_pursuit_step, nonnegative": Sample(
        lambda s, x, weight: fastsparse.matching_pursuit_step(x, weight, nonnegative=True), ("x", "weight")
    ),
    "linear_recurrence": Sample(
        lambda s, a, b, h0: fastsparse.linear_recurrence(a, b, h0), ("a", "b", "h0"), core=True
    ),
    "linear_recurrence, pairs, reverse": Sample(
        lambda s, a, b: fastsparse.linear_recurrence(a, b, reverse=True), ("blocks", "pairs"), core=True
    ),
    "linear_recurrence, packed": Sample(
        lambda s, a, b, h0, bounds: fastsparse.linear_recurrence(
            _end_to_end(a), _end_to_end(b), h0, cu_seqlens=bounds, reverse=True
        ),
        ("a", "b", "h0s", "bounds"),
    ),
    "linear_recurrence, long": Sample(  # few channels: time is cut up among blocks
        lambda s, a, b: fastsparse.linear_recurrence(_end_to_end(a)[..., :3], _end_to_end(b)[..., :3]),
        ("a", "b"),
    ),
    "poly_norm": Sample(
        lambda s, x, coefficients, constant: fastsparse.poly_norm(x, coefficients, constant),
        ("x", "coefficients", "constant"),
        core=True,
    ),
    "poly_relu": Sample(
        lambda s, x, coefficients, constant: fastsparse.poly_relu(x, coefficients, constant),
        ("x", "coefficients", "constant"),
        core=True,
    ),
    "gru_recurrence": Sample(
        lambda s, u, gates, h0: fastsparse.gru_recurrence(u, gates, h0), ("u", "gates", "h0"), core=True
    ),
    "lstm_recurrence": Sample(
        lambda s, u, gates, peephole, h0, c0: fastsparse.lstm_recurrence(u, gates, peephole, (h0, c0)),
        ("u", "gates", "peephole", "h0", "c0"),
        core=True,
    ),
}
for _solver in ("sequential", "newton", "shooting"):
    SAMPLES[f"gru_recurrence, {_solver}"] = Sample(
        lambda s, u, gates, solver=_solver: fastsparse.gru_recurrence(u, gates, solver=solver),
        ("u", "gates"),
    )
    SAMPLES[f"lstm_recurrence, {_solver}"] = Sample(
        lambda s, u, gates, peephole, solver=_solver: fastsparse.lstm_recurrence(
            u, gates, peephole, solver=solver
        )[0],
        ("u", "gates", "peephole"),
    )
    SAMPLES[f"gru_recurrence, {_solver}, packed"] = Sample(
        lambda s, u, gates, h0, bounds, solver=_solver: fastsparse.gru_recurrence(
            _end_to_end(u), gates, h0, cu_seqlens=bounds, solver=solver
        ),
        ("u", "gates", "h0s", "bounds"),
    )
    SAMPLES[f"lstm_recurrence, {_solver}, packed"] = Sample(
        lambda s, u, gates, peephole, h0, c0, bounds, solver=_solver: fastsparse.lstm_recurrence(
            _end_to_end(u), gates, peephole, (h0, c0), cu_seqlens=bounds, solver=solver
        )[1],
        ("u", "gates", "peephole", "h0s", "c0s", "bounds"),
    )
CORE = {name: sample for name, sample in SAMPLES.items() if sample.core}


class _Recorder(TorchDispatchMode):
    """Keeps every call of an op of fastsparse."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, tuple]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "fastsparse":
            self.calls.append((function._schema.name.split("::")[1], args))
        return function(*args, **(kwargs or {}))


def recorded(
    sample: Sample, sizes: Sizes = SMALL, *, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> list[tuple[str, list]]:
    """The calls of registered ops, by name and arguments, that a sample and its gradient make."""
    made = [tensor.to(device) for tensor in sample.make(sizes, dtype=dtype)]
    for name, tensor in zip(sample.names, made, strict=True):
        tensor.requires_grad_(name not in CONSTANTS)
    with _no_backend_named(), _Recorder() as recorder:
        outs = [out for out in sample.run(sizes, made) if out.is_floating_point() and out.requires_grad]
        upstream = [random(*out.shape, seed=i, dtype=dtype).to(device) for i, out in enumerate(outs)]
        wanted = [tensor for tensor in made if tensor.requires_grad]
        torch.autograd.grad(outs, wanted, upstream, allow_unused=True)
    return [(op, [_bare(value) for value in arguments]) for op, arguments in recorder.calls]


@contextmanager
def _no_backend_named() -> Iterator[None]:
    """Else the reference would go around the ops."""
    named, backend._requested = backend._requested, None
    try:
        yield
    finally:
        backend._requested = named


def _bare(value):
    return value.detach() if isinstance(value, Tensor) else value


@cache
def calls(sizes: Sizes = SMALL, *, dtype: torch.dtype = torch.float32) -> dict[str, list[list]]:
    """By op, arguments of it that differ in what is absent and in its options."""
    found: dict[str, dict] = {op: {} for op in OPS}
    for sample in SAMPLES.values():
        for op, arguments in recorded(sample, sizes, dtype=dtype):
            kind = tuple(value.dim() if isinstance(value, Tensor) else value for value in arguments)
            found[op].setdefault(kind, arguments)
    return {op: list(kinds.values()) for op, kinds in found.items()}


# ---- how large a call is ----


def _steps(u, *_):
    return 64 * len(u) * max(32, u.shape[1]) * max(32, u.shape[-1])


def _solved(u, *_):
    return u.shape[1] * max(20_000, 64 * u.shape[0] * max(32, u.shape[-1]))


# By op, in multiply-adds, in blocks as kernels take them: what is slow without a GPU. Others are small.
WORK: dict[str, Callable[..., int]] = {
    "topk_encode": lambda x, weight, *_: len(x) * max(256, len(weight)) * max(32, x.shape[1]),
    "batch_topk_encode": lambda x, weight, *_: len(x) * max(256, len(weight)) * max(32, x.shape[1]),
    "threshold_encode": lambda x, weight, *_: len(x) * max(256, len(weight)) * max(32, x.shape[1]),
    "spmm": lambda values, indices, weight, *_: indices.numel() * max(32, weight.shape[1]),
    "sddmm": lambda x, weight, indices, *_: indices.numel() * max(32, x.shape[1]),
    "spmm_t": lambda values, indices, x, *_: indices.numel() * max(32, x.shape[1]),
    "matching_pursuit": lambda x, dictionary, k, *_: (
        len(x) * k * (4 * max(256, len(dictionary)) + 16 * max(32, x.shape[1]))
    ),
    "matching_pursuit_step": lambda x, dictionary, *_: (
        len(x) * (4 * max(256, len(dictionary)) + 16 * max(32, x.shape[1]))
    ),
    "matching_pursuit_backward": lambda values, indices, residual, *_: (
        indices.numel() * max(32, residual.shape[1])
    ),
    "linear_recurrence": _steps,
    "linear_recurrence_backward": _steps,
    "gru_recurrence": _solved,
    "lstm_recurrence": _solved,
    "gru_recurrence_backward": _steps,
    "lstm_recurrence_backward": _steps,
}


def work(op: str, arguments: tuple) -> int:
    return WORK[op](*arguments) if op in WORK else 0
