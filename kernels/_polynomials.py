"""Polynomial activations, and their gradients: a program goes through the columns of a block of rows twice.

Once for the sums of each row, once for what is made of them, the second time out of a cache: so memory is
read once and written once, 8 bytes an element forward and 12 backward in fp32. PolyNorm's powers are divided
by their root mean squares; PolyReLU is of relu(x). What comes to the weights is summed up by programs, whose
rows follow from the shape, and these in one order.
"""

import torch
import triton
import triton.language as tl
from fastsparse.kernels._launch import OPTIONS, accumulator, with_unit_stride
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
COLUMNS, ELEMENTS = 1024, 2048  # of a block at most: 16 elements a thread
NEEDED = 4  # sums of a program: of the three weights, and of the bias


@triton.jit
def _base(x, NORMED: tl.constexpr):
    return x if NORMED else tl.where(x <= 0, 0.0, x)


@triton.jit
def _coefficients(weight, ACCUMULATOR: tl.constexpr):
    cube, square, linear = tl.load(weight), tl.load(weight + 1), tl.load(weight + 2)
    return cube.to(ACCUMULATOR), square.to(ACCUMULATOR), linear.to(ACCUMULATOR)


@triton.jit
def _inverse_root(squares, D, EPS: tl.constexpr):
    return 1.0 / tl.sqrt(squares / D + EPS)


@triton.jit
def _forward(
    x,
    weight,
    bias,
    y,
    N,
    D,
    x_row,
    EPS: tl.constexpr,
    NORMED: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = (tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]
    x += row * x_row
    y += row * D
    cube, square, linear = _coefficients(weight, ACCUMULATOR)
    if NORMED:
        of_cube = tl.zeros((BLOCK_N,), ACCUMULATOR)
        of_square, of_linear = of_cube, of_cube
        for first in tl.range(0, D, BLOCK_D):
            column = (first + tl.arange(0, BLOCK_D))[None, :]
            power = tl.load(x + column, mask=(row < N) & (column < D), other=0.0).to(ACCUMULATOR)
            power2 = power * power
            power3 = power2 * power
            of_cube += tl.sum(power3 * power3, axis=1)
            of_square += tl.sum(power2 * power2, axis=1)
            of_linear += tl.sum(power2, axis=1)
        cube *= _inverse_root(of_cube, D, EPS)[:, None]
        square *= _inverse_root(of_square, D, EPS)[:, None]
        linear *= _inverse_root(of_linear, D, EPS)[:, None]
    constant = tl.load(bias).to(ACCUMULATOR)
    for first in tl.range(0, D, BLOCK_D):
        column = (first + tl.arange(0, BLOCK_D))[None, :]
        inside = (row < N) & (column < D)
        power = _base(tl.load(x + column, mask=inside, other=0.0).to(ACCUMULATOR), NORMED)
        power2 = power * power
        value = cube * (power2 * power) + square * power2 + linear * power + constant
        tl.store(y + column, value.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    x,
    weight,
    d_y,
    d_x,
    sums,
    N,
    D,
    x_row,
    d_y_row,
    EPS: tl.constexpr,
    NORMED: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = (tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]
    x += row * x_row
    d_y += row * d_y_row
    cube, square, linear = _coefficients(weight, ACCUMULATOR)
    none = tl.zeros((BLOCK_N,), ACCUMULATOR)
    of_cube, of_square, of_linear, to_cube, to_square, to_linear, to_bias = (none,) * 7
    if NORMED or sums is not None:
        for first in tl.range(0, D, BLOCK_D):
            column = (first + tl.arange(0, BLOCK_D))[None, :]
            inside = (row < N) & (column < D)
            power = _base(tl.load(x + column, mask=inside, other=0.0).to(ACCUMULATOR), NORMED)
            g = tl.load(d_y + column, mask=inside, other=0.0).to(ACCUMULATOR)
            power2 = power * power
            power3 = power2 * power
            if NORMED:
                of_cube += tl.sum(power3 * power3, axis=1)
                of_square += tl.sum(power2 * power2, axis=1)
                of_linear += tl.sum(power2, axis=1)
            to_cube += tl.sum(power3 * g, axis=1)
            to_square += tl.sum(power2 * g, axis=1)
            to_linear += tl.sum(power * g, axis=1)
            to_bias += tl.sum(g, axis=1)
    if NORMED:
        of_cube, of_square = _inverse_root(of_cube, D, EPS), _inverse_root(of_square, D, EPS)
        of_linear = _inverse_root(of_linear, D, EPS)
        # Rows that there aren't: 0, where 1 / sqrt(0) is infinity.
        there = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N) < N
        to_cube = tl.where(there, of_cube * to_cube, 0.0)
        to_square = tl.where(there, of_square * to_square, 0.0)
        to_linear = tl.where(there, of_linear * to_linear, 0.0)
        cube, square, linear = (
            cube * of_cube[:, None],
            square * of_square[:, None],
            linear * of_linear[:, None],
        )
    if sums is not None:
        sums += tl.program_id(0).to(tl.int64) * 4
        tl.store(sums, tl.sum(to_cube, axis=0))
        tl.store(sums + 1, tl.sum(to_square, axis=0))
        tl.store(sums + 2, tl.sum(to_linear, axis=0))
        tl.store(sums + 3, tl.sum(to_bias, axis=0))
    if d_x is not None:
        d_x += row * D
        back_cube = (of_cube * (to_cube / D))[:, None]
        back_square = (of_square * (to_square / D))[:, None]
        back_linear = (of_linear * (to_linear / D))[:, None]
        for first in tl.range(0, D, BLOCK_D):
            column = (first + tl.arange(0, BLOCK_D))[None, :]
            inside = (row < N) & (column < D)
            power = tl.load(x + column, mask=inside, other=0.0).to(ACCUMULATOR)
            g = tl.load(d_y + column, mask=inside, other=0.0).to(ACCUMULATOR)
            power2 = power * power
            if NORMED:
                value = (3 * cube) * power2 * (g - back_cube * (power2 * power))
                value += (2 * square) * power * (g - back_square * power2)
                value += linear * (g - back_linear * power)
            else:
                value = ((3 * cube) * power2 + (2 * square) * power + linear) * g
                value = tl.where(power <= 0, 0.0, value)
            tl.store(d_x + column, value.to(d_x.dtype.element_ty), mask=inside)


def blocks_of(D: int, dtype: torch.dtype) -> dict[str, object]:
    """All columns up to a limit, and then rows."""
    columns = min(triton.next_power_of_2(max(D, 1)), COLUMNS)
    return {"BLOCK_N": ELEMENTS // columns, "BLOCK_D": columns, "ACCUMULATOR": accumulator(dtype)}


def forward(x: Tensor, weight: Tensor, bias: Tensor, eps: float | None) -> Tensor:
    """y (N, D); ``eps`` None: of relu(x), and not divided."""
    N, D = x.shape
    y = x.new_empty(N, D)
    if y.numel():
        x, blocks = with_unit_stride(x), blocks_of(D, x.dtype)
        grid = (triton.cdiv(N, blocks["BLOCK_N"]),)
        options = {"EPS": eps or 0.0, "NORMED": eps is not None}
        parameters = weight.contiguous(), bias.contiguous()
        _forward[grid](x, *parameters, y, N, D, x.stride(0), **options, **blocks, **OPTIONS)
    return y


def backward(
    x: Tensor, weight: Tensor, eps: float | None, d_y: Tensor, needs_x: bool, needs_parameters: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """d_x, d_weight and d_bias, empty where they aren't needed."""
    (N, D), blocks = x.shape, blocks_of(x.shape[1], x.dtype)
    programs = triton.cdiv(N, blocks["BLOCK_N"]) if x.numel() else 0
    d_x = x.new_empty(N, D) if needs_x else None
    wide = torch.promote_types(x.dtype, torch.float32)
    sums = x.new_empty(programs, NEEDED, dtype=wide) if needs_parameters else None
    if programs and (needs_x or needs_parameters):
        x, d_y = with_unit_stride(x), with_unit_stride(d_y)
        rows = x.stride(0), d_y.stride(0)
        options = {"EPS": eps or 0.0, "NORMED": eps is not None}
        _backward[(programs,)](
            x, weight.contiguous(), d_y, d_x, sums, N, D, *rows, **options, **blocks, **OPTIONS
        )
    nothing = x.new_empty(0)
    if not needs_parameters:
        return d_x if needs_x else nothing, nothing.clone(), nothing.clone()
    to_weight, to_bias = sums.sum(dim=0, dtype=torch.float64).to(x.dtype).split((3, 1))
    return d_x if needs_x else nothing, to_weight.clone(), to_bias.clone()
