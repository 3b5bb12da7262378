"""Jumps: activations that are zero up to a threshold, and how a gradient reaches the threshold."""

import torch
from torch import Tensor

from fastsparse._transforms import is_differentiated
from fastsparse._validation import check_alike, check_flag, check_float, check_positive

__all__ = ["jump"]


def jump(
    values: Tensor, threshold: Tensor, bandwidth: float, *, ste_to_input: bool = False
) -> tuple[Tensor, Tensor]:
    """Keep what is above its threshold: ``activation = values * gate``, ``gate = (values > threshold)``.

    Neither has a derivative by the threshold that a sample could show. A straight-through estimate takes its
    place, whose mean over samples is the derivative of the mean. With h the bandwidth, and K = 1 where
    ``|values - threshold| < h / 2``, else 0::

        d activation / d values = gate        d activation / d threshold = -(threshold / h) K
        d gate / d values = 0                 d gate / d threshold = -K / h

    At its threshold a value is off, and at ``h / 2`` from it outside of the band. NaN is on, so that it
    surfaces. Second derivatives hold gate and K constant.

    Args:
        values: any shape; fp32, bf16, fp16 or fp64. Not rectified: what lies below a threshold counts.
        threshold: of a shape that broadcasts to that of ``values``; the dtype of ``values``.
        bandwidth: h, finite and above 0, in the unit of ``values``.
        ste_to_input: whether ``values`` get what the thresholds get, with the sign changed, beside their own.

    Returns:
        ``(activation, gate)``, both of the shape and dtype of ``values``; differentiable in values and
        threshold.

    Raises:
        TypeError: an argument is not a tensor, or of an unsupported dtype.
        ValueError: shapes, dtypes or devices don't match, or bandwidth is not finite and above 0.

    Example:
        >>> import torch, fastsparse
        >>> values = torch.tensor([0.5, 1.5, 3.0])
        >>> threshold = torch.ones(3, requires_grad=True)
        >>> activation, gate = fastsparse.jump(values, threshold, bandwidth=2.0)
        >>> activation.tolist(), gate.tolist()
        ([0.0, 1.5, 3.0], [0.0, 1.0, 1.0])
        >>> torch.autograd.grad(gate.sum(), threshold)[0].tolist()
        [-0.5, -0.5, -0.0]

    Source: Rajamanoharan et al. 2024, "Jumping Ahead: Improving Reconstruction Fidelity with JumpReLU Sparse
    Autoencoders", arXiv 2407.14435, equations 11 and 12; ``ste_to_input`` as in Anthropic's circuits update
    of January 2025.
    """
    check_float("jump", "values", values)
    check_float("jump", "threshold", threshold)
    check_alike("jump", (("values", values), ("threshold", threshold)))
    check_positive("jump", "bandwidth", bandwidth)
    check_flag("jump", "ste_to_input", ste_to_input)
    try:
        at_values = threshold.expand_as(values)
    except RuntimeError:
        raise ValueError(
            f"jump: threshold must broadcast to the shape of values {tuple(values.shape)}, "
            f"got shape {tuple(threshold.shape)}"
        ) from None
    if not is_differentiated(values, threshold):  # PyTorch's way around a function takes thrice its time
        return _Jump.forward(values, at_values, bandwidth, ste_to_input)
    return _Jump.apply(values, at_values, bandwidth, ste_to_input)


class _Jump(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(
        values: Tensor, threshold: Tensor, bandwidth: float, ste_to_input: bool
    ) -> tuple[Tensor, Tensor]:
        off = values <= threshold  # NaN is not
        return values.masked_fill(off, 0), (~off).to(values.dtype)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        values, threshold, ctx.bandwidth, ctx.ste_to_input = inputs
        ctx.save_for_backward(values, threshold)
        ctx.save_for_forward(values, threshold)

    @staticmethod
    def backward(ctx, d_activation: Tensor, d_gate: Tensor):
        values, threshold = ctx.saved_tensors
        through = d_activation.masked_fill(values <= threshold, 0)
        slope = _in_band(threshold * d_activation + d_gate, values, threshold, ctx.bandwidth)
        return through + slope if ctx.ste_to_input else through, -slope, None, None

    @staticmethod
    def jvp(ctx, t_values: Tensor, t_threshold: Tensor, *_):
        values, threshold = ctx.saved_tensors
        nearer = t_values - t_threshold if ctx.ste_to_input else -t_threshold
        slope = _in_band(nearer, values, threshold, ctx.bandwidth)
        return t_values.masked_fill(values <= threshold, 0) + threshold * slope, slope


def _in_band(change: Tensor, values: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    """``K change / h``: zero outside, whatever the change is there, as where a threshold is infinite."""
    return torch.where((values - threshold).abs() < bandwidth / 2, change / bandwidth, 0)
