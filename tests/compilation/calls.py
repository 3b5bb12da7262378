"""What Triton's kernels are compiled for: calls of every op, of tensors without memory."""

from collections.abc import Iterator
from importlib import import_module
from typing import Any, NamedTuple

import torch

from fastsparse._options import ACTIVATIONS, METHODS, SOLVERS

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64


class Call(NamedTuple):
    """An op's arguments, and whether every configuration that the clock may choose is wanted or the first."""

    op: str
    label: str
    arguments: tuple[Any, ...]
    every: bool = False

    def __call__(self) -> None:
        from fastsparse.kernels import _launch

        kernel = import_module(f"fastsparse.kernels.{self.op}")
        kernel.capturing = lambda: True  # in a graph no number is asked for, which these tensors lack
        _launch._chosen.clear()
        _launch._time = lambda launch, configuration: launch(configuration) or 0.0
        torch.cuda.is_current_stream_capturing = lambda: not self.every  # where no clock chooses
        getattr(kernel, self.op)(*self.arguments)


def calls() -> Iterator[tuple[str, str, Call]]:
    """Of every call the op, a label, and what to call."""
    for family in (sparse_products, encoders, batches, pursuits, thresholds, recurrences, polynomials):
        for call in family():
            yield call.op, call.label, call


def empty(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def sparse_products(N: int = 8192, M: int = 65536, k: int = 32) -> Iterator[Call]:
    """Rows that are aligned and that aren't, of every accumulator; ragged codes too."""
    indices, latents, offsets = empty(torch.int64, N, k), empty(torch.int64, N * k), empty(torch.int64, N + 1)
    for label, D, dtype in (
        ("bf16", 4096, BF16),
        ("bf16, D = 1001", 1001, BF16),
        ("fp32", 768, FP32),
        ("fp64", 768, FP64),
        ("fp32, D = 1", 1, FP32),
    ):
        x, weight, values = empty(dtype, N, D), empty(dtype, M, D), empty(dtype, N, k)
        yield Call("spmm", label, (values, indices, weight, None), label == "bf16")
        yield Call("sddmm", label, (x, weight, indices, None), label == "bf16")
        yield Call("spmm_t", label, (values, indices, x, M, None), label == "bf16")
        ragged, entries = f"ragged, {label}", empty(dtype, N * k)
        yield Call("spmm", ragged, (entries, latents, weight, offsets), label == "bf16")
        yield Call("sddmm", ragged, (x, weight, latents, offsets), label == "bf16")
        yield Call("spmm_t", ragged, (entries, latents, x, M, offsets))
        few = 256 if label == "bf16" else 32  # two chunks of them, or one
        code = (part[:few] for part in (values, indices, x))
        backward = (*code, weight, values[:few], x[:few], False, True, True)
        yield Call("matching_pursuit_backward", label, backward)


def encoders() -> Iterator[Call]:
    """Products of every tile, plain and screened; lists of both lengths, longer ones being sorted."""
    for label, dtype, N, D, M, k, options in (
        ("bf16", BF16, 8192, 4096, 131072, 64, False),
        ("bf16, options", BF16, 8192, 4096, 131072, 64, True),
        ("bf16, any D", BF16, 8192, 1001, 32768, 1024, True),
        ("bf16, few tokens", BF16, 16, 4096, 32768, 1024, False),
        ("bf16, few tokens, any D", BF16, 64, 1001, 32768, 32, True),
        ("bf16, large k", BF16, 8192, 768, 32768, 2048, False),
        ("fp32", FP32, 8192, 768, 32768, 32, False),
        ("fp32, options", FP32, 8192, 768, 32768, 128, True),
        ("fp32, any D", FP32, 8192, 1001, 32768, 32, True),
        ("fp32, few tokens", FP32, 64, 768, 32768, 32, True),
        ("fp32, unscreened", FP32, 32, 768, 32768, 32, False),
    ):
        matrices = empty(dtype, N, D), empty(dtype, M, D), empty(dtype, M)
        scale, mask = (empty(dtype, M), empty(torch.bool, M)) if options else (None, None)
        activation = ACTIVATIONS.index("abs" if options else "relu")
        yield Call("topk_encode", label, (*matrices, k, activation, scale, mask, 1), True)


def batches(M: int = 32768) -> Iterator[Call]:
    """Products of every tile, for a pool of the whole batch."""
    for label, dtype, N, D, options in (
        ("bf16", BF16, 8192, 4096, False),
        ("bf16, options", BF16, 8192, 4096, True),
        ("bf16, few tokens, any D", BF16, 64, 1001, True),
        ("fp32", FP32, 8192, 768, False),
        ("fp32, options, any D", FP32, 8192, 1001, True),
    ):
        latents = empty(dtype, M, D), empty(dtype, M)
        scale, mask = (empty(dtype, M), empty(torch.bool, M)) if options else (None, None)
        arguments = (empty(dtype, N, D), *latents, 32 * N, ACTIVATIONS.index("abs" if options else "relu"))
        yield Call("batch_topk_encode", label, (*arguments, scale, mask), True)


def pursuits(N: int = 2048, M: int = 16384, k: int = 32) -> Iterator[Call]:
    for D in (768, 1001, 4096):
        matrices = empty(FP32, N, D), empty(FP32, M, D)
        for method in ("direct", "gram"):
            arguments = (*matrices, k, 0.1, False, False, METHODS.index(method))
            yield Call("matching_pursuit", f"{method}, D = {D}", arguments)
        yield Call("matching_pursuit_step", f"D = {D}", matrices)


def thresholds(M: int = 32768) -> Iterator[Call]:
    """Products of every tile; rows of several parts, and of many where tokens are few."""
    for label, dtype, N, D, options in (
        ("bf16", BF16, 8192, 4096, False),
        ("bf16, options", BF16, 8192, 4096, True),
        ("bf16, few tokens, any D", BF16, 64, 1001, True),
        ("fp32", FP32, 8192, 768, False),
        ("fp32, options, any D", FP32, 8192, 1001, True),
    ):
        latents = empty(dtype, M, D), empty(dtype, M), empty(FP32, M)
        mask = empty(torch.bool, M) if options else None
        yield Call("threshold_encode", label, (empty(dtype, N, D), *latents, options, mask, 32 * N), True)


def recurrences(B: int = 8, T: int = 2048, S: int = 5) -> Iterator[Call]:
    """Sequences of one length, and where H isn't aligned and backwards of many."""
    for label, dtype, H in (("fp32", FP32, 1024), ("bf16", BF16, 1024), ("fp32, H = 1001", FP32, 1001)):
        u, weight, peephole = empty(dtype, B, T, 3, H), empty(dtype, 3, H), empty(dtype, 2, H)
        start, bounds = empty(dtype, B, H), None
        if H == 1001:
            u, start, bounds = u.reshape(1, B * T, 3, H), empty(dtype, S, H), empty(torch.int64, S + 1)
        for place, solver in enumerate(SOLVERS):
            if solver != "auto":
                gru, lstm = (u, weight, start, bounds), (u, weight, peephole, start, start, bounds)
                yield Call("gru_recurrence", label, (*gru, place))
                yield Call("lstm_recurrence", label, (*lstm, place))
    bounds, needs = empty(torch.int64, S + 1), (True, True, True)
    for label, dtype in (("fp32", FP32), ("bf16", BF16)):
        H = 1024
        u, weight, peephole = empty(dtype, 1, T, 3, H), empty(dtype, 3, H), empty(dtype, 2, H)
        states, start = empty(dtype, 1, T, H), empty(dtype, S, H)
        gru = (u, weight, start, bounds, states, states, *needs)
        yield Call("gru_recurrence_backward", label, gru)
        lstm = (u, weight, peephole, start, start, bounds, states, states, states, states, *needs)
        yield Call("lstm_recurrence_backward", label, lstm)
        pairs = empty(dtype, 1, T, 2, 2, H), empty(dtype, 1, T, 2, H), empty(dtype, S, 2, H)
        for kind, (a, b, h0) in (("channels", (states, states, start)), ("pairs", pairs)):
            yield Call("linear_recurrence", f"{kind}, {label}", (a, b, h0, True, bounds))
            backward = (a, h0, False, bounds, b, b, *needs)
            yield Call("linear_recurrence_backward", f"{kind}, {label}", backward)


def polynomials(N: int = 8192) -> Iterator[Call]:
    """Rows that are aligned and that aren't, of every accumulator; narrow ones too."""
    for label, D, dtype in (
        ("fp32", 2048, FP32),
        ("bf16", 2048, BF16),
        ("bf16, D = 1001", 1001, BF16),
        ("fp64", 768, FP64),
        ("fp32, D = 1", 1, FP32),
    ):
        x, weight, bias = empty(dtype, N, D), empty(dtype, 3), empty(dtype, 1)
        yield Call("poly_norm", label, (x, weight, bias, 1e-6))
        yield Call("poly_norm_backward", label, (x, weight, 1e-6, x, True, True))
        yield Call("poly_relu", label, (x, weight, bias))
        yield Call("poly_relu_backward", label, (x, weight, x, True, True))
