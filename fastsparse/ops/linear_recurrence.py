"""``fastsparse::linear_recurrence``, and its gradient, an op that has one too: made of the two again."""

import torch
from torch import Tensor

from fastsparse import reference
from fastsparse.ops._library import register, total
from fastsparse.reference.linear_recurrence import multiply, transposed


def _setup_context(ctx, inputs, output) -> None:
    a, _, h0, ctx.reverse, cu_seqlens = inputs
    ctx.save_for_backward(a, h0, cu_seqlens, output)


def _backward(ctx, d_h: Tensor):
    a, h0, cu_seqlens, h = ctx.saved_tensors
    wanted = ctx.needs_input_grad[:3]
    found = linear_recurrence_backward(a, h0, ctx.reverse, cu_seqlens, h, d_h, *wanted)
    return *(grad if needed else None for grad, needed in zip(found, wanted, strict=True)), None, None


def _jvp(inputs, h: Tensor, tangents) -> Tensor:
    """The recurrence of the tangents: what a_t, b_t and h0 move the states by, carried on by a."""
    a, b, h0, reverse, cu_seqlens = inputs
    t_a, t_b, t_h0, *_ = tangents
    moved = None if t_a is None else multiply(t_a, First(h, cu_seqlens, reverse).before(h, h0))
    moved = total(t_b, moved)
    return linear_recurrence(a, torch.zeros_like(b) if moved is None else moved, t_h0, reverse, cu_seqlens)


# a and b (B, T, H) and h0 (S, H), or blocks: a (B, T, 2, 2, H), b (B, T, 2, H), h0 (S, 2, H). S is B, or one
# less than there are cu_seqlens, int64.
linear_recurrence = register(
    "linear_recurrence(Tensor a, Tensor b, Tensor? h0, bool reverse, Tensor? cu_seqlens) -> Tensor",
    "a (B, T, H), b (B, T, H), h0 (S, H)?, cu_seqlens (S + 1) int64? -> (B, T, H) | "
    "a (B, T, 2, 2, H), b (B, T, 2, H), h0 (S, 2, H)?, cu_seqlens (S + 1) int64? -> (B, T, 2, H)",
    reference=reference.linear_recurrence,
    setup_context=_setup_context,
    backward=_backward,
    jvp=_jvp,
)


def _keep_for_second(ctx, inputs, output) -> None:
    a, h0, ctx.reverse, cu_seqlens, h, d_h, *needs = inputs
    ctx.mark_non_differentiable(*(part for part, needed in zip(output, needs, strict=True) if not needed))
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(a, h0, cu_seqlens, h, d_h)


def _second(ctx, g_a: Tensor | None, g_b: Tensor | None, g_h0: Tensor | None):
    """What reaches a, h0, h and d_h from the gradients of d_a, d_b and d_h0.

    With l_t = d_h_t + a_{t+1}^T l_{t+1} these are d_a_t = l_t h_{t-1}^T, d_b = l and d_h0 = a_1^T l_1. So
    d_h gets r_t = a_t r_{t-1} + g_b_t + g_a_t h_{t-1}, from r_0 = g_h0: the recurrence itself. a_t gets
    l_t r_{t-1}^T, as if r had been the states, and h_{t-1} gets g_a_t^T l_t.
    """
    a, h0, cu_seqlens, h, d_h = ctx.saved_tensors
    needs_a, needs_h0, _, _, needs_h, _, *_ = ctx.needs_input_grad
    first = First(h, cu_seqlens, ctx.reverse)
    terms = torch.zeros_like(d_h) if g_b is None else g_b
    if g_a is not None:
        terms = terms + multiply(g_a, first.before(h, h0))
    r = linear_recurrence(a, terms, g_h0, ctx.reverse, cu_seqlens)
    needs_through = g_a is not None and (needs_h or needs_h0)
    needs = needs_a, needs_through, False
    to_a, through, _ = linear_recurrence_backward(a, g_h0, ctx.reverse, cu_seqlens, r, d_h, *needs)
    to_h = to_h0 = None
    if needs_through:
        to_before = multiply(transposed(g_a, through), through)
        to_h = First(h, cu_seqlens, not ctx.reverse).before(to_before, None)  # before in the other direction
        to_h0 = first.take(to_before) if needs_h0 else None
    return to_a if needs_a else None, to_h0, None, None, to_h, r, None, None, None


def _jvp_backward(inputs, output, tangents) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The tangents of d_a, d_b and d_h0, with l and r_0 as in :func:`_second`.

    l' solves what l does, from d_h'_t + a'_{t+1}^T l_{t+1}. The products follow: d_a_t' = l'_t h_{t-1}^T +
    l_t h'_{t-1}^T and d_h0' = a_1^T l'_1 + a'_1^T l_1.
    """
    a, h0, reverse, cu_seqlens, h, d_h, *needs = inputs
    t_a, t_h0, _, _, t_h, t_d_h, *_ = tangents
    first = First(h, cu_seqlens, reverse)

    def adjoint(d_h, h0, h, *needs):
        return linear_recurrence_backward(a, h0, reverse, cu_seqlens, h, d_h, *needs)

    _, through, _ = adjoint(d_h, h0, h, False, True, False)
    moved = torch.zeros_like(d_h) if t_d_h is None else t_d_h
    if t_a is not None:
        back = multiply(transposed(t_a, through), through)
        moved = moved + First(h, cu_seqlens, not reverse).before(back, None)
    t_to_a, t_through, t_to_h0 = adjoint(moved, h0, h, needs[0], True, needs[2])
    if needs[0] and (t_h is not None or t_h0 is not None):
        before = first.before(torch.zeros_like(h) if t_h is None else t_h, t_h0)
        t_to_a = t_to_a + (through.unsqueeze(-2) * before.unsqueeze(-3) if h.dim() == 4 else through * before)
    if needs[2] and t_a is not None:
        t_to_h0 = t_to_h0 + first.take(back)
    found = t_to_a, t_through, t_to_h0
    return tuple(tangent if needed else None for tangent, needed in zip(found, needs, strict=True))


class First:
    """The step at which each sequence begins, by shapes that don't depend on the lengths."""

    def __init__(self, h: Tensor, cu_seqlens: Tensor | None, reverse: bool) -> None:
        self._cu_seqlens, self._reverse, self._T = cu_seqlens, reverse, h.shape[1]

    def before(self, h: Tensor, h0: Tensor | None) -> Tensor:
        """The state that each step starts from: h0, or zeros, at the first ones."""
        if self._T == 0:
            return h
        if self._cu_seqlens is None:
            start = torch.zeros_like(h[:, :1]) if h0 is None else h0.unsqueeze(1)
            return torch.cat((h[:, 1:], start) if self._reverse else (start, h[:, :-1]), dim=1)
        steps, bounds = torch.arange(self._T, device=h.device), self._cu_seqlens
        row = torch.searchsorted(bounds, steps, right=True) - 1
        is_first = steps == (bounds[row + 1] - 1 if self._reverse else bounds[row])
        start = h.new_zeros(()) if h0 is None else h0[row].unsqueeze(0)
        shape = -1, *(1,) * (h.dim() - 2)
        return torch.where(is_first.view(shape), start, h.roll(-1 if self._reverse else 1, 1))

    def take(self, values: Tensor) -> Tensor:
        """(S, ...), the values at the first steps; zeros for sequences that have none."""
        if self._cu_seqlens is None:
            if self._T == 0:
                return values.new_zeros(values.shape[0], *values.shape[2:])
            return values[:, -1 if self._reverse else 0]
        bounds = self._cu_seqlens
        shape = -1, *(1,) * (values.dim() - 2)
        if self._T == 0:
            return values.new_zeros(bounds.shape[0] - 1, *values.shape[2:])
        steps = (bounds[1:] - 1 if self._reverse else bounds[:-1]).clamp(0, self._T - 1)
        return torch.where((bounds.diff() > 0).view(shape), values[0, steps], 0.0)


# h as linear_recurrence returned it, d_h in any strides. An output that isn't needed is empty, of shape (0,).
linear_recurrence_backward = register(
    "linear_recurrence_backward(Tensor a, Tensor? h0, bool reverse, Tensor? cu_seqlens, Tensor h, "
    "Tensor d_h, bool needs_a, bool needs_b, bool needs_h0) -> (Tensor d_a, Tensor d_b, Tensor d_h0)",
    "a (B, T, H), h0 (S, H)?, cu_seqlens (S + 1) int64?, h (B, T, H), d_h (B, T, H) "
    "-> d_a (B, T, H) if needs_a, d_b (B, T, H) if needs_b, d_h0 (S, H) if needs_h0 | "
    "a (B, T, 2, 2, H), h0 (S, 2, H)?, cu_seqlens (S + 1) int64?, h (B, T, 2, H), d_h (B, T, 2, H) "
    "-> d_a (B, T, 2, 2, H) if needs_a, d_b (B, T, 2, H) if needs_b, d_h0 (S, 2, H) if needs_h0",
    reference=reference.linear_recurrence_backward,
    setup_context=_keep_for_second,
    backward=_second,
    jvp=_jvp_backward,
)
