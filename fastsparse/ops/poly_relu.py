"""``fastsparse::poly_relu``, and its gradient, an op of its own: it keeps x alone."""

from torch import Tensor

from fastsparse import reference
from fastsparse.ops._library import register, register_backward, total
from fastsparse.ops._polynomials import BACKWARD_FORM, FORM, SOURCE, gradients, moved_by_parameters
from fastsparse.reference._precision import accumulate
from fastsparse.reference.poly_relu import moved


def _setup_context(ctx, inputs, output) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx, d_y: Tensor):
    return gradients(ctx, poly_relu_backward, *ctx.saved_tensors, d_y)


def _jvp(inputs, y: Tensor, tangents) -> Tensor:
    x, weight, _ = inputs
    t_x, t_weight, t_bias = tangents
    t_y = moved_by_parameters(poly_relu, x, t_weight, t_bias)
    if t_x is None:
        return t_y
    return total(moved(accumulate(x), accumulate(weight), accumulate(t_x)).to(y.dtype), t_y)


poly_relu = register(
    "poly_relu(Tensor x, Tensor weight, Tensor bias) -> Tensor",
    FORM,
    reference=reference.poly_relu,
    setup_context=_setup_context,
    backward=_backward,
    jvp=_jvp,
    source=SOURCE,
)


# d_y in any strides. An output that isn't needed is empty, of shape (0,).
poly_relu_backward = register_backward(
    "poly_relu_backward(Tensor x, Tensor weight, Tensor d_y, bool needs_x, bool needs_parameters) "
    "-> (Tensor d_x, Tensor d_weight, Tensor d_bias)",
    BACKWARD_FORM,
    reference=reference.poly_relu_backward,
    source=SOURCE,
)
