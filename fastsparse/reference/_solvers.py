"""Three ways to the states h_t = f(h_{t-1}, u_t): step by step, and two in parallel over time, certified.

The loop is the definition. Newton's method and multiple shooting guess all states, or some, and correct them
until the correction, which to first order is what the guess is off by, is at rounding level. A channel of a
sequence where that doesn't happen gets the loop's answer: no solver decides what comes out, only how fast.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastsparse._options import MOST_SPREAD, NEWTON_PASSES, SHOOTING_PASSES, SMALL
from fastsparse._transforms import may_branch_on
from fastsparse.reference.linear_recurrence import compose, multiply, scan, stacked, transposed

CHUNK = 64


class Map(NamedTuple):
    """What takes a state to the next, whose channels don't mix, on any leading dimensions.

    ``step(h, u)`` is the next state, of the shape of h: (..., H), or (..., 2, H) for pairs of states.
    ``jacobian(h, u)`` is its derivative in h: (..., H), or (..., 2, 2, H), [i, j] being that of i in j.
    """

    step: Callable[[Tensor, Tensor], Tensor]
    jacobian: Callable[[Tensor, Tensor], Tensor]


def solve(f: Map, u: Tensor, start: Tensor, solver: str) -> tuple[Tensor, Tensor]:
    """u (S, T, 3, H), start (S, ..., H); returns states (S, T, ..., H) and passes (S, H) int32.

    Passes: how many it took to certify a channel's states; 0 where none were needed, -1 where it failed and
    the loop stepped in. All derivatives are the loop's: solvers change how states are found, not which.
    """
    passes = torch.zeros(u.shape[0], u.shape[-1], dtype=torch.int32, device=u.device)
    if solver in ("auto", "sequential") or u.shape[1] == 0:
        return sequential(f, u, start), passes
    with torch.no_grad():
        h, passes = (newton if solver == "newton" else shooting)(f, u, start)
    redo = passes < 0
    if torch.is_grad_enabled() or not may_branch_on(redo) or bool(redo.any()):
        loop = sequential(f, u, start)
        h = torch.where(over_time(redo, h), loop, h)
        h = loop + (h - loop).detach().nan_to_num(0.0, 0.0, 0.0)  # infinite states differ by NaN
    return h, passes


def sequential(f: Map, u: Tensor, start: Tensor) -> Tensor:
    """The definition: one step after the other."""
    h, states = start, []
    for t in range(u.shape[1]):
        h = f.step(h, u[:, t])
        states.append(h)
    return stacked(states, start.unsqueeze(1)[:, :0])


def newton(f: Map, u: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """Newton's method for all states of a sequence at once (Danieli et al. 2025, arXiv 2510.21450).

    What the states are off by, d_t = J_t d_{t-1} + f(h_{t-1}) - h_t, is a linear recurrence. It is solved,
    and added, until it is small in every state of a channel: what is then left is of second order in it, and
    what rounding makes of states that are not yet the loop's, which must not spread.
    """
    zeros = torch.zeros_like(start).unsqueeze(1).expand(-1, u.shape[1] - 1, *start.shape[1:])
    h = f.step(torch.cat((start.unsqueeze(1), zeros), dim=1), u)
    passes = _untried(u)
    for attempt in range(1, NEWTON_PASSES + 1):
        before = torch.cat((start.unsqueeze(1), h[:, :-1]), dim=1)
        J = f.jacobian(before, u)
        d = scan(J, f.step(before, u) - h)
        todo = passes < 0
        h = torch.where(over_time(todo, h), h + d, h)
        passes = torch.where(todo & small(d, h) & steady(J, start), attempt, passes)
        if may_branch_on(passes) and not (passes < 0).any():
            break
    return h, passes


def shooting(f: Map, u: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """Multiple shooting (Keller 1968): time in chunks, which all run at once, each from a guess.

    Along with its states each chunk carries their derivative P in its start. Where a chunk's end misses the
    next one's start, by m, the starts are off by D_j = P_{j-1} D_{j-1} + m_j, a linear recurrence over
    chunks. The states of a chunk are off by P D, which certifies them where it is small, as D must be. Where
    it isn't negligible they are run once more, from corrected starts.

    Chunks that fit together are a sequence of states, rounded elsewhere than the loop's. Where rounding
    errors spread that may be another sequence: such a channel is not certified.
    """
    S, T, H = u.shape[0], u.shape[1], u.shape[-1]
    chunks = -(-T // CHUNK)
    rest = u.new_zeros(S, chunks * CHUNK - T, *u.shape[2:])
    u = torch.cat((u, rest), dim=1).view(S, chunks, CHUNK, *u.shape[2:])
    inside = torch.arange(chunks * CHUNK, device=u.device).view(chunks, CHUNK) < T
    guess = start.unsqueeze(1).expand(-1, chunks, *start.shape[1:])
    starts = torch.cat((guess[:, :1], f.step(torch.zeros_like(guess[:, 1:]), u[:, :-1, -1])), dim=1)
    block = start.dim() > 2
    one = torch.eye(2, dtype=u.dtype, device=u.device).unsqueeze(-1) if block else u.new_ones(())
    unity = one.expand(S, chunks, *((2, 2) if block else ()), H)
    answer, passes = None, _untried(u)
    once_more = passes > 0
    for attempt in range(1, SHOOTING_PASSES + 1):
        h, P, states, tangents, steps = starts, unity, [], [], []
        for t in range(CHUNK):
            J, h = f.jacobian(h, u[:, :, t]), f.step(h, u[:, :, t])
            P = compose(J, P, block)
            states.append(h)
            tangents.append(P)
            steps.append(J)
        states, tangents, J = (torch.stack(each, dim=2) for each in (states, tangents, steps))
        missed = torch.cat((torch.zeros_like(h[:, :1]), h[:, :-1] - starts[:, 1:]), dim=1)
        D = scan(P.roll(1, dims=1), missed)
        off = multiply(tangents, D.unsqueeze(2).expand_as(states))
        off = torch.where(inside.view(chunks, CHUNK, *(1,) * (off.dim() - 3)), off, 0.0)
        todo = passes < 0
        answer = states if answer is None else torch.where(over_time(todo, states), states, answer)
        certain = small(off, states) & small(D, starts) & steady(J.flatten(1, 2)[:, :T], start)
        fine = attempt == SHOOTING_PASSES or once_more | small(16 * off, states) & small(16 * D, starts)
        passes = torch.where(todo & certain & fine, attempt, passes)
        if may_branch_on(passes) and not (passes < 0).any():
            break
        starts, once_more = starts + D, certain
    return answer.flatten(1, 2)[:, :T].contiguous(), passes


def steady(J: Tensor, start: Tensor) -> Tensor:
    """Whether rounding errors spread but little in steps whose derivatives are J (S, T, ..., H): (S, H).

    If each step added an error of variance 1 to every state, independent of all others, their covariance
    would be V_t = J_t V_{t-1} J_t^T + 1. That is in units of a step's rounding, an eps or so beside 1, or
    beside what is remembered of a start that is more. It goes from step to step: a chunk that squeezes what
    it starts with may yet stretch what is rounded inside.

    It bounds errors that aren't independent, too. Of size 1, they add up to L_t[c] in the direction c,
    |c| = 1, where L_t[c] <= 1 + L_{t-1}[J_t^T c]. With q = c^T V_t c, which is q - 1 of J_t^T c a step
    before, and m the most that q is anywhere, L_t[c] <= 2 sqrt(m q) goes on from step to step, as
    1 + 2 sqrt(m (q - 1)) <= 1 + (2 - 1 / q) sqrt(m q) and q <= sqrt(m q). So L <= 2 m: 2^13 errors at worst,
    where 64 are their deviation.
    """
    block = J.dim() > start.dim() + 1
    one = torch.eye(2, dtype=J.dtype, device=J.device).unsqueeze(-1) if block else J.new_ones(())
    V, reach = one.expand_as(J), 1
    while reach < J.shape[1]:  # as in scan
        later = J[:, reach:]
        carried = compose(compose(later, V[:, :-reach], block), transposed(later, start.unsqueeze(1)), block)
        V = torch.cat((V[:, :reach], carried + V[:, reach:]), dim=1)
        J = torch.cat((J[:, :reach], compose(later, J[:, :-reach], block)), dim=1)
        reach *= 2
    variance = V[:, :, 0, 0] + V[:, :, 1, 1] if block else V
    unit = (start[:, 0] if block else start).abs().clamp_min(1)
    return unit**2 * variance.amax(dim=1) <= MOST_SPREAD  # NaN is not


def small(d: Tensor, h: Tensor) -> Tensor:
    """Whether all corrections d of a channel are at rounding level, beside its states h or 1: (S, H).

    A state is itself off by a few roundings, each carried on by slow gates for some dozens of steps.
    """
    within = d.abs() <= SMALL * torch.finfo(h.dtype).eps * h.abs().clamp_min(1)  # NaN is not
    within = within & d.isfinite()  # nor infinity, beside a state that it made infinite
    return within.flatten(1, -2).all(dim=1)


def over_time(channels: Tensor, h: Tensor) -> Tensor:
    """(S, H) as (S, 1, ..., H), to go with states."""
    return channels.view(channels.shape[0], *(1,) * (h.dim() - 2), channels.shape[1])


def _untried(u: Tensor) -> Tensor:
    return torch.full((u.shape[0], u.shape[-1]), -1, dtype=torch.int32, device=u.device)
