"""``fastsparse::poly_norm``, and its gradient, an op of its own: it makes all of x again."""

from torch import Tensor

from fastsparse import reference
from fastsparse.ops._library import register, register_backward, total
from fastsparse.ops._polynomials import BACKWARD_FORM, FORM, SOURCE, gradients, moved_by_parameters
from fastsparse.reference._precision import accumulate
from fastsparse.reference.poly_norm import powers


def _setup_context(ctx, inputs, output) -> None:
    x, weight, _, ctx.eps = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx, d_y: Tensor):
    return *gradients(ctx, poly_norm_backward, *ctx.saved_tensors, ctx.eps, d_y), None


def _jvp(inputs, y: Tensor, tangents) -> Tensor:
    """As the gradient, but that in s_p it is the row's tangents that meet: mean_d(y_p p s_p x^(p-1) t_x)."""
    x, weight, _, eps = inputs
    t_x, t_weight, t_bias, _ = tangents
    t_y = moved_by_parameters(poly_norm, x, t_weight, t_bias, eps)
    if t_x is None:
        return t_y
    found = []
    for a, (power, slope) in zip(accumulate(weight), powers(accumulate(x), eps), strict=True):
        moved = slope * accumulate(t_x)
        found.append(a * (moved - power * (power * moved).mean(dim=-1, keepdim=True)))
    return total(sum(found).to(y.dtype), t_y)


poly_norm = register(
    "poly_norm(Tensor x, Tensor weight, Tensor bias, float eps) -> Tensor",
    FORM,
    reference=reference.poly_norm,
    setup_context=_setup_context,
    backward=_backward,
    jvp=_jvp,
    source=SOURCE,
)


# d_y in any strides. An output that isn't needed is empty, of shape (0,).
poly_norm_backward = register_backward(
    "poly_norm_backward(Tensor x, Tensor weight, float eps, Tensor d_y, bool needs_x, bool needs_parameters) "
    "-> (Tensor d_x, Tensor d_weight, Tensor d_bias)",
    BACKWARD_FORM,
    reference=reference.poly_norm_backward,
    source=SOURCE,
)
