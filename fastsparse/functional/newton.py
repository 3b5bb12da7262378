"""Newton's method on a recurrence of the user's own: no op, as it takes a function, but made of one."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import disable_saved_tensors_hooks, saved_tensors_hooks

from fastsparse import reference
from fastsparse._validation import (
    check_count,
    check_device,
    check_shape,
    check_tensor,
    check_tolerance,
    named,
)
from fastsparse.backend import wants_reference
from fastsparse.ops.linear_recurrence import linear_recurrence, linear_recurrence_backward

__all__ = ["NewtonInfo", "newton_recurrence"]

JACOBIANS = ("diagonal", "block")
NEAR = 1e-2  # corrections from which Newton's method finds the rest of the way undamped
Step = Callable[[Tensor, Tensor], Tensor]


class NewtonInfo(NamedTuple):
    """How the states of every channel were found by :func:`newton_recurrence`.

    Attributes:
        iterations: (B, H) int32, how many were run.
        residual: (B, H), the largest ``|step(h[t - 1], x[t]) - h[t]|`` over time of what is returned.
        converged: (B, H) bool; False where the states come from steps one by one.
    """

    iterations: Tensor
    residual: Tensor
    converged: Tensor


def newton_recurrence(
    step: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    h0: Tensor,
    *,
    jacobian: str = "diagonal",
    max_iter: int = 20,
    tol: float | None = None,
    damping: float = 0.0,
) -> tuple[Tensor, NewtonInfo]:
    """Run a recurrence of your own, ``h[t] = step(h[t - 1], x[t])``, all time steps at once.

    Newton's method corrects all states of a sequence by a linear recurrence, until the correction, which to
    first order is what they are off by, is below ``tol``. Where that doesn't happen, steps are taken one by
    one: what comes out is the recurrence. The gradient is that of the implicit function: however many
    iterations there were, what is kept for it is one evaluation of ``step`` over all time and its derivative
    in h. Second derivatives are the reference's alone. The host waits for the result, so that CUDA graphs
    can't hold it, and ``torch.compile`` only with a graph break.

    Args:
        step: from states h (B, T', H) and inputs (B, T', ...) to the next states, for any number T' of time
            steps at once, which it must not mix, nor sequences, nor channels; checked on the first eight, and
            for a gradient on all. It must not write into h. Gradients also reach the tensors that it holds.
        x: (B, T, ...) inputs, of any dtype.
        h0: (B, H), fp32 or fp64, the state before the first step.
        jacobian: ``"diagonal"``: each state depends on itself alone. ``"block"``: channels are pairs of
            states, (B, T', 2, H) and h0 (B, 2, H), which depend on each other, like those of an LSTM.
        max_iter: how many iterations at most.
        tol: the correction, beside the state or 1, at which a channel has converged. Default: 32 eps.
        damping: in [0, 1), the part of the derivative to leave out as long as corrections are large. For
            recurrences on which Newton's method overshoots.

    Returns:
        ``(h, NewtonInfo)``, h being (B, T, H), or (B, T, 2, H).

    Raises:
        TypeError: an argument is not a tensor, or of an unsupported dtype.
        ValueError: shapes or devices don't match, max_iter < 1, tol or damping is out of range, or step mixes
            what it must keep apart, or returns something else than states.
        RuntimeError: a backend was named that can't serve this call.
        NotImplementedError: by second derivatives outside of the reference.

    Example:
        >>> import torch, fastsparse
        >>> decay = torch.full((4,), 0.5, requires_grad=True)
        >>> x = torch.randn(2, 100, 4)
        >>> h, info = fastsparse.newton_recurrence(
        ...     lambda h, x: torch.tanh(decay * h + x), x, torch.zeros(2, 4)
        ... )
        >>> h.shape, bool(info.converged.all())
        (torch.Size([2, 100, 4]), True)
        >>> h.sum().backward()

    Source: Lim et al. 2024, "Parallelizing non-linear sequential models over the sequence length", arXiv
    2309.12252; Danieli et al. 2025, arXiv 2510.21450.
    """
    op = "newton_recurrence"
    if not callable(step):
        raise TypeError(f"{op}: step must be a function of states and inputs, got {named(step)}")
    if jacobian not in JACOBIANS:
        raise ValueError(f"{op}: jacobian must be one of {', '.join(JACOBIANS)}, got {jacobian!r}")
    check_tensor(op, "x", x)
    if x.dim() < 2:
        raise ValueError(f"{op}: x must have shape (B, T, ...), got shape {tuple(x.shape)}")
    if jacobian == "block":
        check_shape(op, "h0", h0, "(B, 2, H)", (None, 2, None))
    else:
        check_shape(op, "h0", h0, "(B, H)", (None, None))
    if h0.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{op}: h0 must be float32 or float64, to converge in, got {str(h0.dtype)[6:]}")
    if h0.shape[0] != x.shape[0]:
        raise ValueError(
            f"{op}: h0 and x must have one batch size, got shapes {tuple(h0.shape)} and {tuple(x.shape)}"
        )
    check_device(op, "h0", h0, "x", x)
    max_iter = check_count(op, "max_iter", max_iter, 1)
    tol = 32 * torch.finfo(h0.dtype).eps if tol is None else tol
    check_tolerance(op, "tol", tol)
    check_tolerance(op, "damping", damping)
    if damping >= 1:
        raise ValueError(f"{op}: damping must be less than 1, got damping={damping}")
    h, *info = _run(step, x, h0, max_iter, tol, damping)
    return h, NewtonInfo(*info)


@torch._disable_dynamo  # torch.compiler.disable, which would import the compiler here
def _run(
    step: Step, x: Tensor, h0: Tensor, max_iter: int, tol: float, damping: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x (B, T, ...), h0 (B, H) or, for pairs of states, (B, 2, H).

    Returns h (B, T, H) or (B, T, 2, H), and of every channel, (B, H): iterations, residual, converged.
    ``torch.compile`` leaves it as it is: what it goes on with depends on what it finds.
    """
    check_step(step, x, h0)
    if wants_reference(h0):
        h = reference.newton_recurrence(step, x, h0)
        channels = h0.new_zeros(h0.shape[0], h0.shape[-1])
        return h, channels.int(), channels, channels.bool()
    with torch.no_grad(), forward_ad._set_fwd_grad_enabled(False):
        h, iterations, converged = _solve(step, x, h0, max_iter, tol, damping)
    before = _before(h, h0)
    ahead = step(before, x)  # the states h again: residual, and the way back to x and all that step holds
    residual = (ahead.detach() - h).abs().flatten(1, -2)
    residual = residual.amax(dim=1) if residual.shape[1] else torch.zeros_like(iterations, dtype=h.dtype)
    # A level of torch.func that differentiates may lie below the one that shows.
    transformed = torch._C._are_functorch_transforms_active()
    if transformed or ahead.requires_grad or forward_ad.unpack_dual(ahead).tangent is not None:
        with torch.no_grad(), forward_ad._set_fwd_grad_enabled(False):
            J = check_apart(step, before.detach(), x.detach())
        h = _Implicit.apply(ahead, h, J)
    return h, iterations, residual, converged


def _solve(
    step: Step, x: Tensor, h0: Tensor, max_iter: int, tol: float, damping: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The states, and of each channel how many iterations certified them, and whether any did.

    What the states are off by, d_t = J_t d_{t-1} + step(h_{t-1}, x_t) - h_t, is a linear recurrence. Added
    until it is small in every state of a channel, it leaves an error of second order in it. Damping shrinks J
    until d is near to that; undamped from there, d means what was said, and converges as fast. Channels where
    that fails are taken from the loop. It runs the whole batch, of which the step may hold tensors.
    """
    B, T, H = h0.shape[0], x.shape[1], h0.shape[-1]
    iterations = torch.zeros(B, H, dtype=torch.int32, device=h0.device)
    converged = torch.full((B, H), T == 0 or B == 0, device=h0.device)
    settled = torch.full_like(converged, not damping)
    h = h0.new_zeros(B, T, *h0.shape[1:])
    if T == 0 or B == 0:
        return h, iterations, converged
    h = step(_before(h, h0), x)
    for _ in range(max_iter):
        ahead, J = derivative(step, _before(h, h0), x)
        if damping:
            J = J * _over_time(torch.where(settled, 1.0, 1 - damping).to(J.dtype), J)
        d = linear_recurrence(J.contiguous(), ahead - h, None, False, None)
        h = torch.where(_over_time(converged, h), h, h + d)
        iterations += ~converged
        converged = converged | (_small(d, h, tol) & settled)
        settled = settled | _small(d, h, NEAR)
        if converged.all():
            return h, iterations, converged
    loop = reference.newton_recurrence(step, x, h0)
    return torch.where(_over_time(converged, h), h, loop), iterations, converged


def derivative(step: Step, h: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """The next states, and their derivative in h: of h's shape, or of pairs (B, T, 2, 2, H).

    It sums over what enters a state, or its pair: all there is, as :func:`check_apart` sees.
    """
    ahead, pull = _pullback(step, h, x)
    if h.dim() == 3:
        return ahead, pull(torch.ones_like(ahead))
    unit = torch.eye(2, dtype=h.dtype, device=h.device).unsqueeze(-1)
    return ahead, torch.stack([pull(row.expand_as(ahead)) for row in unit], dim=-3)


def check_step(step: Step, x: Tensor, h0: Tensor) -> None:
    """The function takes time steps together and mixes nothing, as a sample of up to eight steps shows.

    See :func:`check_apart`; and they must come to the same as one by one, as inputs could be mixed, too.
    """
    with torch.no_grad():
        x, h0 = x[:, :8].detach(), h0.detach()
        if x.shape[1] == 0 or h0.numel() == 0:
            return
        like = h0.unsqueeze(1)
        first = step(like.clone(), x[:, :1])  # a step that writes into its states must not do so in h0
        if not isinstance(first, Tensor) or first.shape != like.shape or first.dtype != like.dtype:
            got = f"{tuple(first.shape)} {first.dtype}" if isinstance(first, Tensor) else type(first).__name__
            raise ValueError(
                "newton_recurrence: step must return states like those it is given, "
                f"of shape {tuple(like.shape)} {like.dtype}, got {got}"
            )
        states = reference.newton_recurrence(step, x, h0.clone())
        before = _before(states, h0)
        ahead = step(before.clone(), x)
        if ahead.shape != states.shape:
            raise ValueError(
                "newton_recurrence: step must work on any number of time steps at once: "
                f"it made {tuple(ahead.shape)} of states {tuple(before.shape)}"
            )
        check_apart(step, before, x)
        off = (ahead - states).abs().nan_to_num(0.0, 0.0, 0.0)
        # Products of more rows may be summed in another order.
        if (off > 2**10 * torch.finfo(off.dtype).eps * states.abs().clamp_min(1)).any():
            raise ValueError(
                "newton_recurrence: step must make the same of time steps at once as of each alone, "
                f"got what is off by up to {off.max().item():g}"
            )


def check_apart(step: Step, h: Tensor, x: Tensor) -> Tensor:
    """The derivative of :func:`derivative`, if that is all there is: if the function mixes nothing.

    It is held against random signs, which a mixture of channels, sequences or steps can't withstand.
    """
    _, pull = _pullback(step, h, x)
    _, J = derivative(step, h, x)
    signs = torch.randint(0, 2, h.shape, generator=torch.Generator().manual_seed(0)).mul_(2).sub_(1).to(h)
    apart = J * signs if h.dim() == 3 else (J * signs.unsqueeze(-2)).sum(-3)
    off = (pull(signs) - apart).abs().nan_to_num(0.0, 0.0, 0.0)
    # Signs are exact; sums of two, in a pair, are not.
    if off.numel() and off.max() > 64 * torch.finfo(h.dtype).eps * J.abs().nan_to_num(0.0, 0.0, 0.0).max():
        form = "each state from its own" if h.dim() == 3 else "each pair of states from its own"
        raise ValueError(
            f"newton_recurrence: step must make {form} alone, as jacobian promises, got one that mixes "
            "channels, sequences or time steps"
        )
    return J


def _pullback(step: Step, h: Tensor, x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The next states, and the function that takes a gradient of theirs back to h, and to h alone.

    ``torch.func`` can't work under hooks for saved tensors, like those of ``torch.utils.checkpoint``. Plain
    autograd can, and under hooks of its own leaves nothing to those; but it takes no tensors of inference
    mode, nor of ``torch.func``'s transforms.
    """
    if not _saves_through_hooks():
        ahead, pull = torch.func.vjp(lambda h: step(h, x), h)
        return ahead, lambda d_ahead: pull(d_ahead)[0]
    with torch.enable_grad(), saved_tensors_hooks(lambda saved: saved, lambda saved: saved):
        h = h.detach().requires_grad_()
        ahead = step(h, x)

    def pull(d_ahead: Tensor) -> Tensor:
        if not ahead.requires_grad:  # an h that isn't looked at
            return torch.zeros_like(h)
        return torch.autograd.grad(ahead, h, d_ahead, retain_graph=True, materialize_grads=True)[0]

    return ahead.detach(), pull


def _saves_through_hooks() -> bool:
    """Whether hooks for saved tensors are set: only then do they refuse to be disabled."""
    try:
        with disable_saved_tensors_hooks("newton_recurrence only asks"):
            return False
    except RuntimeError:
        return True


class _Implicit(torch.autograd.Function):
    """The states h, whose gradient goes back to ``ahead``, one step from each of them (implicit function)."""

    @staticmethod
    def forward(ahead: Tensor, h: Tensor, J: Tensor) -> Tensor:
        return h.clone()

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ahead, _, J = inputs
        ctx.save_for_backward(ahead, J)
        ctx.save_for_forward(ahead, J)

    @staticmethod
    def backward(ctx, d_h: Tensor):
        ahead, J = ctx.saved_tensors
        _, through, _ = linear_recurrence_backward(J, None, False, None, ahead, d_h, False, True, False)
        return _Last.apply(through, ahead), None, None

    @staticmethod
    def jvp(ctx, t_ahead: Tensor, *_):
        ahead, J = ctx.saved_tensors
        return _Last.apply(linear_recurrence(J, t_ahead, None, False, None), ahead)


class _Last(torch.autograd.Function):
    """A derivative that depends on ``ahead`` in ways that aren't followed: a second one is refused."""

    @staticmethod
    def forward(gradient: Tensor, ahead: Tensor) -> Tensor:
        return gradient.clone()

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        pass

    @staticmethod
    def backward(ctx, *_):
        raise NotImplementedError(
            'newton_recurrence: second derivatives must be taken inside fastsparse.use_backend("reference")'
        )

    jvp = backward


def _small(d: Tensor, h: Tensor, tol: float) -> Tensor:
    """Whether the corrections of a channel are, beside its states or 1: (B, H). NaN is not, nor infinity."""
    within = (d.abs() <= tol * h.abs().clamp_min(1)) & d.isfinite()
    return within.flatten(1, -2).all(dim=1)


def _before(h: Tensor, h0: Tensor) -> Tensor:
    """The state that each step starts from."""
    return torch.cat((h0.unsqueeze(1), h), dim=1)[:, : h.shape[1]]


def _over_time(channels: Tensor, h: Tensor) -> Tensor:
    """(B, H) as (B, 1, ..., H), to go with states."""
    return channels.view(channels.shape[0], *(1,) * (h.dim() - 2), channels.shape[1])
