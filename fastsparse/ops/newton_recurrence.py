"""Newton's method on a recurrence of the user's own: made of an op; itself none, as it takes a function."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import disable_saved_tensors_hooks, saved_tensors_hooks

from fastsparse import reference
from fastsparse.backend import wants_reference
from fastsparse.ops.linear_recurrence import linear_recurrence, linear_recurrence_backward

NEAR = 1e-2  # corrections from which Newton's method finds the rest of the way undamped
Step = Callable[[Tensor, Tensor], Tensor]


@torch._disable_dynamo  # torch.compiler.disable, which would import the compiler here
def newton_recurrence(
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
