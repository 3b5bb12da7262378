"""``fastsparse::linear_recurrence``. Its gradient is the same recurrence against time, and a product."""

import torch
from torch import Tensor

from fastsparse import reference
from fastsparse.ops._library import register


def _fake(a, b, h0, reverse, cu_seqlens):
    return b.new_empty(b.shape)


def _setup_context(ctx, inputs, output) -> None:
    a, _, h0, ctx.reverse, cu_seqlens = inputs
    ctx.save_for_backward(a, h0, cu_seqlens, output)


def _backward(ctx, d_h: Tensor):
    """l_t = d_h_t + a_{t+1}^T l_{t+1}, and then d_b = l, d_a_t = l_t h_{t-1}^T, d_h0 = a_1^T l_1.

    In reverse t + 1 is the step before in memory. It doesn't matter which factor of a neighbour is shifted
    into a sequence: of one without h0 the first factor isn't read.
    """
    a, h0, cu_seqlens, h = ctx.saved_tensors
    block = a.dim() > h.dim()
    shift = 1 if ctx.reverse else -1
    a_t = a.transpose(2, 3) if block else a
    through = linear_recurrence(a_t.roll(shift, 1), d_h, None, not ctx.reverse, cu_seqlens)
    d_a = d_h0 = None
    first = _First(h, cu_seqlens, ctx.reverse)
    if ctx.needs_input_grad[0]:
        before = first.before(h, h0)
        d_a = through.unsqueeze(3) * before.unsqueeze(2) if block else through * before
    if h0 is not None and ctx.needs_input_grad[2]:
        ends_a, ends = first.take(a_t), first.take(through)
        d_h0 = (ends_a * ends.unsqueeze(1)).sum(2) if block else ends_a * ends
    return d_a, through if ctx.needs_input_grad[1] else None, d_h0, None, None


class _First:
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


# a and b (B, T, H) and h0 (S, H), or blocks: a (B, T, 2, 2, H), b (B, T, 2, H), h0 (S, 2, H). S is B, or one
# less than there are cu_seqlens, int64.
linear_recurrence = register(
    "linear_recurrence(Tensor a, Tensor b, Tensor? h0, bool reverse, Tensor? cu_seqlens) -> Tensor",
    reference=reference.linear_recurrence,
    fake=_fake,
    setup_context=_setup_context,
    backward=_backward,
)
