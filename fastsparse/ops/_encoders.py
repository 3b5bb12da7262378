"""Gradients that encoders share: through the entries that they selected, and no others."""

from torch import Tensor

from fastsparse import ops
from fastsparse.ops._library import total


def gradients(grad: Tensor, x: Tensor, weight: Tensor, indices: Tensor, offsets: Tensor | None, needs):
    """Of the scores at indices to x, weight and bias, each if it is needed, else None."""
    needs_x, needs_weight, needs_bias = needs
    num_latents = weight.shape[0]
    d_x = ops.spmm(grad, indices, weight, offsets) if needs_x else None
    d_weight = ops.spmm_t(grad, indices, x, num_latents, offsets) if needs_weight else None
    d_bias = None
    if needs_bias:
        d_bias = ops.spmm_t(grad, indices, grad.new_ones(x.shape[0], 1), num_latents, offsets)[:, 0]
    return d_x, d_weight, d_bias


def tangent(tangents, x: Tensor, weight: Tensor, indices: Tensor, offsets: Tensor | None) -> Tensor | None:
    """Of the scores at indices, where x, weight and bias have tangents, each or None."""
    t_x, t_weight, t_bias = tangents
    ones = x.new_ones(x.shape[0], 1)
    return total(
        None if t_x is None else ops.sddmm(t_x, weight, indices, offsets),
        None if t_weight is None else ops.sddmm(x, t_weight, indices, offsets),
        None if t_bias is None else ops.sddmm(ones, t_bias.unsqueeze(1), indices, offsets),
    )
