"""topk_encode's screen of fp32: copies in bf16, brackets around exact keys, exact scores of survivors.

Brackets. With x = x~ + dx, w = w~ + dw, in bf16 and what that leaves, X = |x~|, W = |w~| and
g = (D + 4) 2^-24, by Cauchy-Schwarz
  |x.w - x~.w~|               <= |dx| W + (X + |dx|) |dw|
  the product's accumulation  <= p X W with p = (a D + 8) 2^-24, see _tensor_cores.py
  the exact score's own       <= g (X + |dx|) (W + |dw|)
which sums to A W + B |dw| with A = |dx| (1 + g) + (p + g) X and B = (X + |dx|)(1 + g). The bias's rounding is
relative to it; that of score + bias and of the product with a scale are the 4 in g. Inf and NaN in any of
these widen the bracket to everything, and so do norms beyond MOST_NORM: no sum of the product, nor what scale
and bias make of it, leaves fp32's range otherwise, on whatever way to a finite score. Squares may underflow,
for which 2^-125 each makes up: rows as small as that stay undecided.
"""

import triton
import triton.language as tl
from fastsparse.kernels._order import order_of

MOST_NORM = tl.constexpr(2.0**63)  # whose square is a quarter of the largest number


@triton.jit
def round_rows(
    source,
    order,
    scale,
    bias,
    rounded,
    terms,
    row_stride,
    D,
    padded,
    count,
    accumulation,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Rows in bf16, padded with zeros, and their terms: A, B of tokens; W, |dw| and the rest of latents."""
    position = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = position < count
    row = position
    if order is not None:
        row = tl.load(order + position, mask=inside, other=0)
    near = tl.zeros((ROWS, BLOCK), tl.float32)
    far = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, padded, BLOCK):
        d = start + tl.arange(0, BLOCK)
        at = source + row[:, None] * row_stride + d[None, :]
        exact = tl.load(at, mask=inside[:, None] & (d < D)[None, :], other=0.0)
        short = exact.to(tl.bfloat16)
        to = rounded + position[:, None] * padded + d[None, :]
        tl.store(to, short, mask=inside[:, None] & (d < padded)[None, :])
        kept = short.to(tl.float32)
        near += kept * kept
        far += (exact - kept) * (exact - kept)
    slack = 1.001 + D * 2.0**-23
    norm = tl.sqrt(tl.sum(near, axis=1) + D * 2.0**-125) * slack
    residual = tl.sqrt(tl.sum(far, axis=1) + D * 2.0**-125) * slack
    if TOKENS:
        g, p = (D + 4) * 2.0**-24, (accumulation * D + 8) * 2.0**-24
        norm = tl.where(norm <= MOST_NORM, norm, float("inf"))
        tl.store(terms + position, 1.001 * (residual * (1 + g) + (p + g) * norm), mask=inside)
        tl.store(terms + count + position, 1.001 * (norm + residual) * (1 + g), mask=inside)
    else:
        rest = tl.zeros_like(norm) + D * 2.0**-125
        tame = norm <= MOST_NORM
        if bias is not None:
            offset = tl.abs(tl.load(bias + position, mask=inside, other=0.0))
            rest += 2.0**-20 * offset
            tame = tame & (offset <= MOST_NORM * MOST_NORM)
        if scale is not None:
            factor = tl.abs(tl.load(scale + position, mask=inside, other=0.0))
            norm *= factor
            residual *= factor
            rest *= factor
            tame = tame & (norm <= MOST_NORM)
        rest = tl.where(tame, rest, float("inf"))
        tl.store(terms + position, norm, mask=inside)
        tl.store(terms + count + position, residual, mask=inside)
        tl.store(terms + 2 * count + position, rest + 2.0**-125, mask=inside)


@triton.jit
def error_of(near, far, norm, residual, rest):
    """How far exact keys (N, M) may lie from a screen's, by its terms."""
    return near[:, None] * norm[None, :] + (far[:, None] * residual[None, :] + rest[None, :])


@triton.jit
def refine(
    x,
    weight,
    bias,
    scale,
    order,
    firsts,
    seconds,
    positions,
    counts,
    D,
    x_row,
    weight_row,
    ABSOLUTE: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CAPACITY: tl.constexpr,
):
    """Exact keys and scores of a row's candidates, in place of their bounds; SPLIT programs share a row."""
    row = tl.program_id(0) // SPLIT
    held = tl.load(counts + row)
    d = tl.arange(0, BLOCK_D)
    for start in range(tl.program_id(0) % SPLIT * BLOCK_K, held, SPLIT * BLOCK_K):
        slot = start + tl.arange(0, BLOCK_K)
        real = slot < held
        position = tl.load(positions + row * CAPACITY + slot, mask=real, other=0)
        latent = position.to(tl.int64)
        if order is not None:
            latent = tl.load(order + position, mask=real, other=0)
        sums = tl.zeros((BLOCK_K, BLOCK_D), tl.float32)
        for done in range(0, D, BLOCK_D):
            inside = d < D - done
            token = tl.load(x + row.to(tl.int64) * x_row + done + d, mask=inside, other=0.0)
            atoms = weight + latent[:, None] * weight_row + (done + d)[None, :]
            sums += token[None, :] * tl.load(atoms, mask=real[:, None] & inside[None, :], other=0.0)
        score = tl.sum(sums, axis=1)
        if bias is not None:
            score += tl.load(bias + position, mask=real, other=0.0)
        key = score
        if scale is not None:
            key *= tl.load(scale + position, mask=real, other=0.0)
        if ABSOLUTE:
            key = tl.abs(key)
        tl.store(firsts + row * CAPACITY + slot, order_of(key), mask=real)
        tl.store(seconds + row * CAPACITY + slot, score.to(tl.int32, bitcast=True), mask=real)
