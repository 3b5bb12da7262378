"""What ops of polynomials have in common: their gradient goes to x, to the weights, and to the bias."""

from collections.abc import Callable

from torch import Tensor

FORM = "x (N, D), weight (3), bias (1) -> (N, D)"
BACKWARD_FORM = (
    "x (N, D), weight (3), d_y (N, D) "
    "-> d_x (N, D) if needs_x, d_weight (3) if needs_parameters, d_bias (1) if needs_parameters"
)
SOURCE = "csrc/polynomial_ops.h"  # of all of them, and of their gradients


def gradients(ctx, backward: Callable, *arguments) -> tuple[Tensor | None, ...]:
    """What reaches x, weight and bias, None where it isn't needed."""
    wanted = ctx.needs_input_grad[:3]
    found = backward(*arguments, wanted[0], any(wanted[1:]))
    return tuple(grad if needed else None for grad, needed in zip(found, wanted, strict=True))


def moved_by_parameters(op: Callable, x: Tensor, t_weight: Tensor | None, t_bias: Tensor | None, *options):
    """The output's tangent from those of weight and bias, in which it is linear; None where there is none."""
    if t_weight is None and t_bias is None:
        return None
    t_weight = x.new_zeros(3) if t_weight is None else t_weight
    return op(x, t_weight, x.new_zeros(1) if t_bias is None else t_bias, *options)
