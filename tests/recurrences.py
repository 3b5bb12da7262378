"""What the tests of recurrences hold answers to: loops in fp64, and what fp32 may be off by.

The bound follows the recurrence: what a step rounds, and what the steps before were off by, times how much
the step amplifies it. Doubled, for what is of second order. Where it is large, as it becomes in chaos,
anything goes, but each step must be right (assert_follows).
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from oracle import assert_within, random
from torch import Tensor

import fastsparse

HOPELESS = 1e-2


@dataclass(frozen=True)
class Textbook:
    """A gated recurrence, written out.

    Attributes:
        name: the public function.
        states: how many a channel has.
        weights: how many rows each of the weights has.
        step: the next states, from states (..., H), u (..., 3, H) and weights.
        rounding: what fp32 may be off by after it, in units of eps.
    """

    name: str
    states: int
    weights: tuple[int, ...]
    step: Callable[..., tuple[Tensor, ...]]
    rounding: Callable[..., tuple[Tensor, ...]]

    def run(self, u, weights, state=None, **options) -> tuple[Tensor, ...]:
        """The public function; its outputs as a tuple."""
        if self.name == "gru_recurrence":
            out = fastsparse.gru_recurrence(u, *weights, *(state or ()), **options)
        else:
            out = fastsparse.lstm_recurrence(u, *weights, state, **options)
        return out if isinstance(out, tuple) else (out,)

    def problem(self, B, T, H, *, S=None, scale=0.5, seed=1, dtype=torch.float32):
        """u (B, T, 3, H), weights of a scale, and states (S, H)."""
        u = random(B, T, 3, H, seed=seed, dtype=dtype)
        weights = tuple(
            random(rows, H, seed=seed + 10 + i, dtype=dtype, scale=scale)
            for i, rows in enumerate(self.weights)
        )
        state = tuple(
            random(S or B, H, seed=seed + 20 + i, dtype=dtype, scale=0.5) for i in range(self.states)
        )
        return u, weights, state


def gru_step(states, u, weights):
    (h,), (w_z, w_r, w_n), (u_z, u_r, u_n) = states, weights[0], u.unbind(-2)
    z = 1 / (1 + torch.exp(-(w_z * h + u_z)))
    r = 1 / (1 + torch.exp(-(w_r * h + u_r)))
    return (h + z * (torch.tanh(u_n + w_n * h * r) - h),)


def gru_rounding(states, u, weights):
    (h,), (w_z, w_r, w_n), (u_z, u_r, u_n) = states, weights[0], u.unbind(-2)
    z, r = torch.sigmoid(w_z * h + u_z), torch.sigmoid(w_r * h + u_r)
    n = torch.tanh(w_n * h * r + u_n)
    of_z = 4 + 2 * z * (1 - z) * ((w_z * h).abs() + u_z.abs())
    of_r = 4 + 2 * r * (1 - r) * ((w_r * h).abs() + u_r.abs())
    of_n = 4 + (1 - n * n) * ((w_n * h).abs() * (2 + of_r) + 2 * u_n.abs())
    return (2 * (1 + h.abs()) + (n - h).abs() * of_z + z * of_n,)


def lstm_step(states, u, weights):
    (h, c), ((w_f, w_o, w_g), (p_f, p_o)), (u_f, u_o, u_g) = states, weights, u.unbind(-2)
    f = 1 / (1 + torch.exp(-(w_f * h + p_f * c + u_f)))
    g = torch.tanh(w_g * h + u_g)
    c = g + f * (c - g)
    return torch.tanh(c) / (1 + torch.exp(-(w_o * h + p_o * c + u_o))), c


def lstm_rounding(states, u, weights):
    (h, c), ((w_f, w_o, w_g), (p_f, p_o)), (u_f, u_o, u_g) = states, weights, u.unbind(-2)
    f = torch.sigmoid(w_f * h + p_f * c + u_f)
    g = torch.tanh(w_g * h + u_g)
    of_f = 4 + 2 * f * (1 - f) * ((w_f * h).abs() + (p_f * c).abs() + u_f.abs())
    of_g = 4 + 2 * (1 - g * g) * ((w_g * h).abs() + u_g.abs())
    of_c = 2 * (1 + c.abs()) + (c - g).abs() * of_f + (1 - f) * of_g
    c = f * c + (1 - f) * g
    o = torch.sigmoid(w_o * h + p_o * c + u_o)
    of_o = 4 + o * (1 - o) * (2 * ((w_o * h).abs() + (p_o * c).abs() + u_o.abs()) + p_o.abs() * of_c)
    return 4 + of_o + (1 - torch.tanh(c) ** 2) * of_c, of_c


GRU = Textbook("gru_recurrence", 1, (3,), gru_step, gru_rounding)
LSTM = Textbook("lstm_recurrence", 2, (3, 2), lstm_step, lstm_rounding)
CELLS = {cell.name: cell for cell in (GRU, LSTM)}


def spans(B: int, T: int, cu_seqlens: Tensor | None) -> list[tuple[int, slice]]:
    """Where each sequence lies: its row, and its steps."""
    if cu_seqlens is None:
        return [(b, slice(0, T)) for b in range(B)]
    bounds = cu_seqlens.tolist()
    return [(0, slice(*pair)) for pair in pairwise(bounds)]


def textbook(cell: Textbook, u, weights, state=None, cu_seqlens=None) -> tuple[Tensor, ...]:
    """The states in the inputs' own precision, sequence by sequence, step by step."""
    B, T, _, H = u.shape
    outs = [u.new_zeros(B, T, H) for _ in range(cell.states)]
    for s, (row, steps) in enumerate(spans(B, T, cu_seqlens)):
        now = tuple(u.new_zeros(H) if state is None else part[s] for part in state or outs)
        found = []
        for t in range(steps.start, steps.stop):
            now = cell.step(now, u[row, t], weights)
            found.append(now)
        for i in range(cell.states if found else 0):
            mask = torch.zeros(B, T, 1, dtype=torch.bool)
            mask[row, steps] = True
            part = torch.stack([states[i] for states in found])
            outs[i] = torch.where(
                mask, torch.nn.functional.pad(part, (0, 0, steps.start, T - steps.stop)), outs[i]
            )
    return tuple(outs)


def assert_states(cell: Textbook, outs, u, weights, state=None, cu_seqlens=None) -> None:
    """The states are the textbook's, to within what rounding can do on the way."""
    dtype = u.dtype
    u, weights = u.double(), tuple(weight.double() for weight in weights)
    state = None if state is None else tuple(part.double() for part in state)
    exact = textbook(cell, u, weights, state, cu_seqlens)
    unit = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    errors = [torch.zeros_like(part) for part in exact]
    for s, (row, steps) in enumerate(spans(*u.shape[:2], cu_seqlens)):
        if steps.stop == steps.start:
            continue
        firsts = [
            u.new_zeros(1, u.shape[-1]) if state is None else state[i][s : s + 1] for i in range(cell.states)
        ]
        before = [
            torch.cat((first, part[row, steps]))[:-1].requires_grad_()
            for first, part in zip(firsts, exact, strict=True)
        ]
        after = cell.step(before, u[row, steps], weights)
        J = [torch.autograd.grad(part.sum(), before, retain_graph=True) for part in after]
        with torch.no_grad():
            rounding = cell.rounding(before, u[row, steps], weights)
            off = [torch.zeros(u.shape[-1], dtype=torch.float64)] * cell.states
            for t in range(steps.stop - steps.start):
                off = [
                    sum(J[i][j][t].abs() * off[j] for j in range(cell.states)) + unit * rounding[i][t]
                    for i in range(cell.states)
                ]
                for error, part in zip(errors, off, strict=True):
                    error[row, steps.start + t] = part
    for out, part, error in zip(outs, exact, errors, strict=True):
        error = 2 * error.nan_to_num(torch.inf)
        assert out.dtype == dtype
        assert out.is_contiguous()
        assert_within(out, part, error.masked_fill(error > HOPELESS, torch.inf))


def assert_follows(cell: Textbook, outs, u, weights, state) -> None:
    """Each state is what a step makes of the one before, up to rounding and what a certificate allows.

    This holds in chaos too, where all that can be asked of a sequence is that its steps are right.
    """
    unit = torch.finfo(u.dtype).eps
    u, *rest = (part.double() for part in (u, *weights, *state, *outs))
    weights, state, outs = rest[: len(weights)], rest[len(weights) : -cell.states], rest[-cell.states :]
    before = [torch.cat((part.unsqueeze(1), out), 1)[:, :-1] for part, out in zip(state, outs, strict=True)]
    rounding = cell.rounding(before, u, weights)
    for out, part, error in zip(outs, cell.step(before, u, weights), rounding, strict=True):
        assert ((out - part).abs() <= unit * (2 * error + 64 * out.abs().clamp_min(1))).all()


def spread(cell: Textbook, outs, u, weights, state) -> Tensor:
    """(B, H): the largest variance along the states, were every step to add an error of variance 1 to each.

    Of pairs the sum of both. In fp64, step by step, which is what certificates take from scans in parts.
    """
    u, *rest = (part.double() for part in (u, *weights, *state, *outs))
    weights, state, outs = rest[: len(weights)], rest[len(weights) : -cell.states], rest[-cell.states :]
    before = [torch.cat((part.unsqueeze(1), out), 1)[:, :-1] for part, out in zip(state, outs, strict=True)]
    before = [part.requires_grad_() for part in before]
    J = [
        torch.stack(torch.autograd.grad(part.sum(), before, retain_graph=True), -1)
        for part in cell.step(before, u, weights)
    ]
    J = torch.stack(J, -2)
    V, largest, one = torch.zeros_like(J[:, 0]), u.new_zeros(len(u), u.shape[-1]), torch.eye(cell.states)
    for t in range(u.shape[1]):
        V = J[:, t] @ V @ J[:, t].mT + one
        largest = largest.maximum(V.diagonal(dim1=-2, dim2=-1).sum(-1))
    return largest


def assert_same_states(outs, others) -> None:
    """Two solvers' states are one, to within a certificate each; NaN and infinities stand in one place.

    Not in chaos, where a last digit that was rounded otherwise changes all.
    """
    for out, other in zip(outs, others, strict=True):
        own = torch.float64 if out.dtype == torch.float64 else torch.float32
        slack = 64 * torch.finfo(own).eps + (torch.finfo(out.dtype).eps if out.dtype != own else 0)
        torch.testing.assert_close(out, other, rtol=slack, atol=slack, equal_nan=True)


def laid_out_apart(tensor: Tensor) -> Tensor:
    """The same values with time and channels swapped in memory, poison between elements, off any boundary."""
    swapped = tensor.transpose(-1, 0)
    store = tensor.new_full([2 * size + 3 for size in swapped.shape], torch.nan)
    view = store[tuple(slice(1, 1 + 2 * size, 2) for size in swapped.shape)]
    return view.copy_(swapped).transpose(-1, 0)
