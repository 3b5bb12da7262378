"""One call of every op, as functions of tensors, for tests of what surrounds the numbers."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from oracle import random
from torch import Tensor

import fastsparse

N, D, M, k = 65, 72, 1030, 9
S, T, H = 4, 300, 40  # of recurrences
SHAPES = {"x": (N, D), "weight": (M, D), "bias": (M,), "scale": (M,), "values": (N, k)}
SHAPES |= {"u": (S, T, 3, H), "recurrent": (3, H), "peephole": (2, H), "h0": (S, H), "cell0": (S, H)}
SHAPES |= {"states": (S, T, H), "upstream": (S, T, H), "blocks": (S, T, 2, 2, H), "pairs": (S, T, 2, H)}


@dataclass(frozen=True)
class Problem:
    """One call.

    Attributes:
        call: takes the tensors; returns a tensor or several.
        names: of the tensors, by which :func:`tensors` makes them.
    """

    call: Callable[..., Tensor | tuple[Tensor, ...]]
    names: tuple[str, ...]

    def __call__(self, inputs: list[Tensor]) -> tuple[Tensor, ...]:
        out = self.call(*inputs)
        return tuple(out) if isinstance(out, tuple) else (out,)

    def tensors(
        self, device: torch.device, dtype: torch.dtype = torch.float32, seed: int = 0
    ) -> list[Tensor]:
        return [make(name, dtype, seed).to(device) for name in self.names]


def make(name: str, dtype: torch.dtype, seed: int) -> Tensor:
    """A tensor by name; another seed gives other numbers, other latents and another mask."""
    if name == "indices":
        return torch.randint(0, M, (N, k), generator=torch.Generator().manual_seed(seed))
    if name == "hot":  # indices by Zipf's law: a few latents are in most rows
        uniform = torch.rand(N, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return (M**uniform).long().clamp_(max=M - 1)
    if name == "mask":
        return torch.rand(M, generator=torch.Generator().manual_seed(seed)) < 0.7
    if name == "bounds":  # of S sequences in T steps, some of them may be empty
        inner = torch.randint(0, T + 1, (S - 1,), generator=torch.Generator().manual_seed(seed))
        return torch.cat((torch.tensor([0]), inner.sort().values, torch.tensor([T])))
    scale = 0.4 if name == "blocks" else 1.0  # else states of pairs outgrow all types
    return random(*SHAPES[name], seed=seed + len(name), dtype=dtype, scale=scale)


def gradients(call: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
    """Of what a call returns, from ones."""
    leaves = [value.detach().requires_grad_() for value in inputs]
    return torch.autograd.grad(call(*leaves).sum(), leaves)


SOLVERS = ("sequential", "newton", "shooting")
PROBLEMS = {
    "topk_encode": Problem(
        lambda x, weight, bias: fastsparse.topk_encode(x, weight, bias, k=k), ("x", "weight", "bias")
    ),
    "topk_encode, abs, scaled, masked": Problem(
        lambda x, weight, bias, scale, mask: fastsparse.topk_encode(
            x, weight, bias, k=k, activation="abs", latent_scale=scale, latent_mask=mask
        ),
        ("x", "weight", "bias", "scale", "mask"),
    ),
    "topk_encode, many": Problem(
        lambda x, weight: fastsparse.topk_encode(x, weight, k=300, activation="none"), ("x", "weight")
    ),
    "matching_pursuit, direct": Problem(
        lambda x, weight: fastsparse.matching_pursuit(x, weight, k=k, method="direct"), ("x", "weight")
    ),
    "matching_pursuit, gram": Problem(
        lambda x, weight: fastsparse.matching_pursuit(
            x, weight, k=k, tol=1.0, nonnegative=True, method="gram"
        ),
        ("x", "weight"),
    ),
    "matching_pursuit_step": Problem(fastsparse.matching_pursuit_step, ("x", "weight")),
    "matching_pursuit_backward": Problem(
        lambda values, indices, x, weight: torch.ops.fastsparse.matching_pursuit_backward.default(
            values, indices, x, weight, values, x, False, True, True
        ),
        ("values", "hot", "x", "weight"),
    ),
    "spmm": Problem(fastsparse.spmm, ("values", "indices", "weight")),
    "sddmm": Problem(fastsparse.sddmm, ("x", "weight", "indices")),
    "spmm_t": Problem(
        lambda values, indices, x: fastsparse.spmm_t(values, indices, x, M), ("values", "indices", "x")
    ),
    "spmm_t, hot latents": Problem(
        lambda values, indices, x: fastsparse.spmm_t(values, indices, x, M), ("values", "hot", "x")
    ),
    "spmm_t, one column": Problem(
        lambda values, indices, x: fastsparse.spmm_t(values, indices, x[:, :1], M), ("values", "hot", "x")
    ),
    "linear_recurrence": Problem(
        lambda a, b, h0: fastsparse.linear_recurrence(a.tanh(), b, h0), ("states", "upstream", "h0")
    ),
    "linear_recurrence, pairs, reverse": Problem(
        lambda a, b: fastsparse.linear_recurrence(a, b, reverse=True), ("blocks", "pairs")
    ),
    "linear_recurrence, packed": Problem(
        lambda a, b, bounds: fastsparse.linear_recurrence(a[:1].tanh(), b[:1], cu_seqlens=bounds),
        ("states", "upstream", "bounds"),
    ),
    "linear_recurrence, long": Problem(  # few channels: time is cut up among blocks
        lambda a, b: fastsparse.linear_recurrence(
            a.tanh().reshape(1, -1, H)[..., :3], b.reshape(1, -1, H)[..., :3]
        ),
        ("states", "upstream"),
    ),
    **{
        f"gru_recurrence, {solver}": Problem(
            lambda u, weight, h0, solver=solver: fastsparse.gru_recurrence(u, weight, h0, solver=solver),
            ("u", "recurrent", "h0"),
        )
        for solver in SOLVERS
    },
    **{
        f"lstm_recurrence, {solver}": Problem(
            lambda u, weight, peephole, h0, c0, solver=solver: fastsparse.lstm_recurrence(
                u, weight, peephole, (h0, c0), solver=solver
            ),
            ("u", "recurrent", "peephole", "h0", "cell0"),
        )
        for solver in SOLVERS
    },
    **{
        f"gru_recurrence, {solver}, packed": Problem(
            lambda u, weight, h0, bounds, solver=solver: fastsparse.gru_recurrence(
                u[:1], weight, h0, cu_seqlens=bounds, solver=solver
            ),
            ("u", "recurrent", "h0", "bounds"),
        )
        for solver in SOLVERS
    },
    **{
        f"lstm_recurrence, {solver}, packed": Problem(
            lambda u, weight, peephole, h0, c0, bounds, solver=solver: fastsparse.lstm_recurrence(
                u[:1], weight, peephole, (h0, c0), cu_seqlens=bounds, solver=solver
            ),
            ("u", "recurrent", "peephole", "h0", "cell0", "bounds"),
        )
        for solver in SOLVERS
    },
    "linear_recurrence_backward": Problem(
        lambda a, h0, h, d_h: torch.ops.fastsparse.linear_recurrence_backward.default(
            a.tanh(), h0, False, None, h, d_h, True, True, True
        ),
        ("states", "h0", "states", "upstream"),
    ),
    "linear_recurrence_backward, pairs, reverse": Problem(
        lambda a, h: torch.ops.fastsparse.linear_recurrence_backward.default(
            a, None, True, None, h, h.cos(), True, True, False
        ),
        ("blocks", "pairs"),
    ),
    "linear_recurrence_backward, packed": Problem(
        lambda a, h0, bounds, h, d_h: torch.ops.fastsparse.linear_recurrence_backward.default(
            a[:1].tanh(), h0, False, bounds, h[:1], d_h[:1], True, True, True
        ),
        ("states", "h0", "bounds", "states", "upstream"),
    ),
    "gru_recurrence_backward": Problem(
        lambda u, weight, h0, h, d_h: torch.ops.fastsparse.gru_recurrence_backward.default(
            u, weight, h0, None, h, d_h, True, True, True
        ),
        ("u", "recurrent", "h0", "states", "upstream"),
    ),
    "lstm_recurrence_backward": Problem(
        lambda u, weight, peephole, h0, c0, h, d_h: torch.ops.fastsparse.lstm_recurrence_backward.default(
            u, weight, peephole, h0, c0, None, h, h.tanh(), d_h, None, True, True, True
        ),
        ("u", "recurrent", "peephole", "h0", "cell0", "states", "upstream"),
    ),
    "gru_recurrence_backward, packed": Problem(
        lambda u, weight, h0, bounds, h, d_h: torch.ops.fastsparse.gru_recurrence_backward.default(
            u[:1], weight, h0, bounds, h[:1], d_h[:1], True, True, True
        ),
        ("u", "recurrent", "h0", "bounds", "states", "upstream"),
    ),
    "lstm_recurrence_backward, packed": Problem(
        lambda u, weight, peephole, h0, c0, bounds, h, d_h: (
            torch.ops.fastsparse.lstm_recurrence_backward.default(
                u[:1], weight, peephole, h0, c0, bounds, h[:1], h[:1].tanh(), d_h[:1], None, True, True, True
            )
        ),
        ("u", "recurrent", "peephole", "h0", "cell0", "bounds", "states", "upstream"),
    ),
    "linear_recurrence, packed, gradients": Problem(
        lambda a, b, h0, bounds: gradients(
            lambda a, b, h0: fastsparse.linear_recurrence(a[:1].tanh(), b[:1], h0, cu_seqlens=bounds),
            a,
            b,
            h0,
        ),
        ("states", "upstream", "h0", "bounds"),
    ),
}


def autoencoder(x: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor) -> Tensor:
    """A whole TopK autoencoder's loss."""
    code = fastsparse.topk_encode(x - b_dec, W_enc, b_enc, k=k)
    return (fastsparse.sparse_decode(*code, W_dec, b_dec) - x).square().mean()


def parameters(device: torch.device, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """W_enc, b_enc, W_dec, b_dec as leaves."""
    shapes = ((M, D), (M,), (M, D), (D,))
    return [
        random(*shape, seed=i, dtype=dtype, scale=0.1).to(device).requires_grad_()
        for i, shape in enumerate(shapes)
    ]


def same(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> bool:
    """Equal bit for bit."""
    return all(
        torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(got, expected, strict=True)
    )
