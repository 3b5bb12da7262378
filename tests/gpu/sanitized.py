"""Every CUDA C++ op on small problems, its answers checked: what compute-sanitizer watches.

With ``--planted`` instead one read far out of bounds, by an index that nobody checks: a sanitizer that
doesn't report it doesn't work here.
"""

import sys

import torch

import fastsparse
from fastsparse import reference

# N, D, M, k around warps, packets and blocks; the last one with latents hot enough to be split.
SHAPES = ((1, 8, 40, 3), (33, 40, 530, 7), (5, 257, 1100, 33), (300, 12, 4, 4))
# B, T, H of recurrences: a thread a channel's chunk, and time in segments.
RECURRENCES = ((3, 1, 5), (3, 70, 37), (1, 1500, 3))
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2, torch.float64: 1e-10}


def main(arguments: list[str]) -> int:
    device = torch.device("cuda")
    with fastsparse.use_backend("cuda"):
        if arguments == ["--planted"]:
            outside = torch.full((1, 1), 1 << 24, device=device)
            fastsparse.spmm(torch.ones(1, 1, device=device), outside, torch.ones(2, 32, device=device))
            torch.cuda.synchronize()
            return 0
        for shape in SHAPES:
            for dtype in TOLERANCE:
                check(*shape, dtype, device)
        for shape in RECURRENCES:
            for dtype in TOLERANCE:
                check_recurrences(*shape, dtype, device)
    return 0


def check(N: int, D: int, M: int, k: int, dtype: torch.dtype, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(N)
    x, weight, values = (
        torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
        for shape in ((N, D), (M, D), (N, k))
    )
    indices = torch.randint(0, M, (N, k), generator=generator)
    x_, weight_, values_, indices_ = (tensor.to(device) for tensor in (x, weight, values, indices))
    mask = torch.arange(M, device=device) < max(k, M - 3)
    got = fastsparse.topk_encode(x_, weight_, k=k, latent_mask=mask)
    right = reference.topk_encode(x, weight, None, k, latent_mask=mask.cpu())
    close("topk_encode", got.values, right[0], dtype)
    close("spmm", fastsparse.spmm(values_, indices_, weight_), reference.spmm(values, indices, weight), dtype)
    close("sddmm", fastsparse.sddmm(x_, weight_, indices_), reference.sddmm(x, weight, indices), dtype)
    lengths = reference.matching_pursuit(x, weight, k)[2].double().norm(dim=1)
    for method in ("direct", "gram"):
        left = fastsparse.matching_pursuit(x_, weight_, k=k, method=method).residual
        close(f"matching_pursuit, {method}", left.double().norm(dim=1), lengths, dtype)
    value, _, left = fastsparse.matching_pursuit_step(x_, weight_)
    right = reference.matching_pursuit_step(x, weight)
    close("matching_pursuit_step", value, right[0], dtype)
    close("matching_pursuit_step", left, right[2], dtype)
    for columns in (D, 1):
        out = fastsparse.spmm_t(values_, indices_, x_[:, :columns], M)
        close("spmm_t", out, reference.spmm_t(values, indices, x[:, :columns], M), dtype)


def check_recurrences(B: int, T: int, H: int, dtype: torch.dtype, device: torch.device) -> None:
    """Sequences of one length, and one row of three, the middle one empty; every output is asked for."""
    needs = True, True, True
    for bounds in (None, torch.tensor([0, T // 3, T // 3, T])):
        rows, S = (B, B) if bounds is None else (1, 3)
        shapes = (rows, T, 3, H), (3, H), (2, H), (S, H), (S, H), (rows, T, H), (rows, T, H)
        generator = torch.Generator().manual_seed(T)
        u, weight, peephole, h0, c0, h, d_h = (
            torch.randn(*shape, generator=generator, dtype=torch.float64).mul(0.5).to(dtype)
            for shape in shapes
        )
        gru, lstm = (u, weight, h0), (u, weight, peephole, h0, c0)
        calls = [
            ("gru_recurrence_backward", (*gru, bounds, h, d_h, *needs)),
            *(
                ("lstm_recurrence_backward", (*lstm, bounds, h, h.tanh(), *d_states, *needs))
                for d_states in ((d_h, None), (None, d_h))
            ),
            *(("linear_recurrence", (h, d_h, h0, reverse, bounds)) for reverse in (False, True)),
            *(
                ("linear_recurrence_backward", (h, h0, reverse, bounds, d_h, u[:, :, 0], *needs))
                for reverse in (False, True)
            ),
        ]
        for solver in ("sequential", "newton", "shooting"):
            calls += [
                ("gru_recurrence", (*gru, bounds, solver)),
                ("lstm_recurrence", (*lstm, bounds, solver)),
            ]
        for op, arguments in calls:
            there = (value.to(device) if isinstance(value, torch.Tensor) else value for value in arguments)
            found = getattr(torch.ops.fastsparse, op).default(*there)
            solver = arguments[-1] if isinstance(arguments[-1], str) else None
            if solver:  # not the passes, which are its own
                right = getattr(reference, op)(*arguments[:-1])[:-1]
                found = found[:-1]
            else:
                right = getattr(reference, op)(*arguments)
            pairs = [(found, right)] if op == "linear_recurrence" else zip(found, right, strict=True)
            for mine, theirs in pairs:
                close(f"{op}, {solver}, {'one length' if bounds is None else 'packed'}", mine, theirs, dtype)


def close(op: str, got: torch.Tensor, right: torch.Tensor, dtype: torch.dtype) -> None:
    distance = (got.cpu().double() - right.double()).norm() / right.double().norm().clamp_min(1e-30)
    if not distance <= TOLERANCE[dtype]:
        raise SystemExit(f"{op}, {dtype}: relative error {distance:.3g}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
