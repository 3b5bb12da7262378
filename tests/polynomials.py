"""The polynomial activations in fp64, written out, and what rounding may make of them.

With u the rounding of one operation a mean of D squares of powers is off by at most (D + 8) u of itself, its
inverse root by half as much and two roundings more; what the terms of a sum are off by goes into the sum. A
bound is infinite where a power, or a sum of such, may leave the type that sums are carried in.
"""

import torch
from oracle import assert_within, finite, random, sum_error
from torch import Tensor

POWERS = (3, 2, 1)


def problem(N: int, D: int, *, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> list[Tensor]:
    """x, weight, bias and what comes back to y."""
    x, d_y = random(N, D, seed=1, dtype=dtype, scale=scale), random(N, D, seed=4, dtype=dtype)
    return [x, random(3, seed=2, dtype=dtype), random(1, seed=3, dtype=dtype), d_y]


class Terms:
    """Of each power what is weighted, s_p x^p, and its derivative as long as s_p stays as it is.

    ``eps`` None: of relu(x), and s_p = 1.

    Attributes:
        most: beyond which a sum may overflow.
        unit: how far off they may be, relatively.
        unsafe: (N, D), where more may happen.
        least: (N, D), beside ``unit``: what powers may lose that underflow.
    """

    def __init__(self, x: Tensor, eps: float | None) -> None:
        info = torch.finfo(torch.float64 if x.dtype == torch.float64 else torch.float32)
        self.most, self.unit = info.max / 4, (12 if eps is None else x.shape[-1] / 2 + 24) * info.eps
        x = x.double()
        base = torch.where(x <= 0, 0.0, x) if eps is None else x
        above = 1.0 if eps is not None else torch.where(x <= 0, 0.0, 1.0)
        self.unsafe = (finite(base**3) > self.most) & x.isfinite()
        self.powers, self.slopes, self.least = [], [], torch.full_like(x, info.tiny)
        for p in POWERS:
            scale = torch.ones_like(x[..., :1])
            if eps is not None:
                squares = (x**p).square()
                mean = squares.mean(dim=-1, keepdim=True) + eps
                scale = mean**-0.5
                lost = (squares.sum(dim=-1, keepdim=True) > self.most) | (mean * info.eps < info.tiny)
                self.unsafe |= lost & x.isfinite().all(dim=-1, keepdim=True)
            self.powers.append(scale * base**p)
            self.slopes.append(p * scale * base ** (p - 1) * above)
            self.least += 64 * info.tiny * finite(scale)

    def bound(self, size: Tensor, factor: Tensor) -> Tensor:
        """Of a sum of terms of so much in all, each a multiple of a power by at most a factor."""
        error = 8 * self.unit * size + self.least * (1 + factor)
        return torch.where(self.unsafe | (size > self.most), torch.inf, error)


def assert_forward(y: Tensor, x: Tensor, weight: Tensor, bias: Tensor, eps: float | None) -> None:
    terms, a, b = Terms(x, eps), weight.double(), bias.double()
    parts = [a_p * power for a_p, power in zip(a, terms.powers, strict=True)]
    assert y.dtype == x.dtype
    assert y.is_contiguous()
    assert_within(y, sum(parts) + b, terms.bound(sum(map(finite, parts)) + finite(b), finite(a).max()))


def assert_gradients(found, x: Tensor, weight: Tensor, d_y: Tensor, eps: float | None) -> None:
    """d_x, d_weight and d_bias."""
    terms, a, g = Terms(x, eps), weight.double(), d_y.double()
    exact, size, sums = torch.zeros_like(g), torch.zeros_like(g), []
    for p, a_p, power, slope in zip(POWERS, a, terms.powers, terms.slopes, strict=True):
        back, most = g, finite(g)
        if eps is not None:
            back = g - power * (g * power).mean(dim=-1, keepdim=True)
            most = most + finite(power) * finite(g * power).mean(dim=-1, keepdim=True)
        exact += a_p * slope * back
        size += finite(a_p * slope) * most
        sums.append(g * power)
        # What underflows may be 0, and 0 times infinity is NaN.
        small = (power.abs() < terms.least) | ((a_p * slope).abs() < terms.least)
        terms.unsafe |= (g.isinf() & small).any(dim=-1, keepdim=True)
        over = finite(g * x.double() ** p).sum(dim=-1, keepdim=True) > terms.most  # as kernels sum it up
        terms.unsafe |= over
    if eps is None:
        slopes = zip(a, terms.slopes, strict=True)
        exact = torch.where(x <= 0, 0.0, sum(a_p * slope for a_p, slope in slopes) * g)
    d_x, d_weight, d_bias = found
    factor = finite(a).max() * (1 + finite(g).max() if g.numel() else 1)
    assert_within(d_x, exact, terms.bound(size, factor))
    count = g.numel() + 2 * x.shape[-1] + 64
    rounding = sum_error(count, torch.stack([finite(part).sum() for part in sums]), x.dtype)
    lost = (terms.least * finite(g)).sum()
    rounding = torch.where(terms.unsafe.any(), torch.inf, rounding + lost)
    assert_within(d_weight, torch.stack([part.sum() for part in sums]), rounding)
    assert_within(d_bias, g.sum().reshape(1), sum_error(count, finite(g).sum().reshape(1), x.dtype))
