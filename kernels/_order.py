"""Keys as integers of the same order, and the k-th largest of many of them."""

import torch
import triton
import triton.language as tl
from torch import Tensor

UNSET = tl.constexpr(-(2**31))  # below the order of every key
LARGEST = tl.constexpr(2**31 - 1)  # the order of NaN
INFINITE = 0x7F800000  # the order of infinity


@triton.jit
def order_of(key):
    """Keys as integers of the same order: NaN the largest, both zeros equal."""
    bits = tl.where(key == 0, 0.0, key).to(tl.int32, bitcast=True)
    return tl.where(key != key, LARGEST, bits ^ ((bits >> 31) & 0x7FFFFFFF))


@triton.jit
def key_at(order):
    """The key of an order; NaN for an unset bound, to which no key compares."""
    return (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def kth_largest(orders, k, DIGIT: tl.constexpr):
    """Of every row of orders (R, C >= k) the k-th largest: DIGIT bits at a time, from the highest down."""
    found = tl.full((orders.shape[0],), UNSET, tl.int32)
    digits = tl.arange(0, 1 << DIGIT)
    for step in range(32 // DIGIT):
        wanted = found[:, None] + (digits << (32 - DIGIT * (step + 1)))[None, :]
        reaching = tl.sum((orders[:, :, None] >= wanted[:, None, :]).to(tl.int32), axis=1)
        digit = tl.sum((reaching >= k).to(tl.int32), axis=1) - 1
        found += digit << (32 - DIGIT * (step + 1))
    return found


def orders_of(keys: Tensor) -> Tensor:
    """:func:`order_of` of fp32 keys on the host: for what PyTorch sorts."""
    bits = keys.masked_fill(keys == 0, 0.0).view(torch.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).masked_fill(keys.isnan(), LARGEST.value)


def keys_at(orders: Tensor) -> Tensor:
    """:func:`key_at` on the host."""
    return (orders ^ ((orders >> 31) & 0x7FFFFFFF)).view(torch.float32)
