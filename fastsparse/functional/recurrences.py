"""Recurrences, whole sequences at a time: linear ones, and the diagonal GRU and LSTM."""

from typing import NamedTuple

from torch import Tensor

from fastsparse import ops
from fastsparse._options import SOLVERS, position_of
from fastsparse._validation import (
    check_alike,
    check_cu_seqlens,
    check_flag,
    check_float,
    check_shape,
    check_tensor,
    named,
)
from fastsparse.functional._tensors import autocast

__all__ = ["SolverInfo", "gru_recurrence", "linear_recurrence", "lstm_recurrence"]


class SolverInfo(NamedTuple):
    """How the states of every channel were found. They are the sequential recurrence's in any case.

    Attributes:
        passes: (S, H) int32, how many times a parallel solver went through the sequence; 0 where none did, -1
            where it gave up.
        converged: (S, H) bool; False where a parallel solver gave up, and steps were taken one by one.
    """

    passes: Tensor
    converged: Tensor


def linear_recurrence(
    a: Tensor,
    b: Tensor,
    h0: Tensor | None = None,
    *,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Run ``h[t] = a[t] * h[t - 1] + b[t]`` along time, for single channels or for coupled pairs of them.

    The state is carried in fp32 (fp64 for fp64 inputs) and rounded to the dtype where it is stored.

    Args:
        a: (B, T, H) factors; fp32, bf16, fp16 or fp64. For pairs (B, T, 2, 2, H): ``a[:, t, i, j]`` is what
            of state j goes into state i. The first step's are not read without ``h0``.
        b: (B, T, H), or for pairs (B, T, 2, H); the dtype of ``a``.
        h0: (B, H), or (B, 2, H), the state before the first step; zeros if None.
        reverse: run from the last step to the first.
        cu_seqlens: (S + 1,) int32 or int64, for S sequences of different lengths that lie one after the other
            in the T steps of B = 1: sequence s has the steps from ``cu_seqlens[s]`` to before
            ``cu_seqlens[s + 1]``, and a state of its own; h0 is then (S, H) or (S, 2, H).

    Returns:
        h, of the shape of ``b``. Gradients reach a, b and h0.

    Raises:
        TypeError: an argument is not a tensor, or of an unsupported dtype.
        ValueError: shapes, dtypes or devices don't match, or cu_seqlens don't go from 0 to T.
        RuntimeError: a backend was named that can't serve this call.

    Example:
        >>> import torch, fastsparse
        >>> a, b = torch.tensor([[[0.5], [0.5], [2.0]]]), torch.tensor([[[1.0], [1.0], [0.0]]])
        >>> fastsparse.linear_recurrence(a, b).flatten().tolist()
        [1.0, 1.5, 3.0]

    Source: Blelloch 1990, "Prefix sums and their applications", section 1.4.
    """
    a, b, h0 = autocast(a, b, h0)
    op = "linear_recurrence"
    check_float(op, "b", b)
    check_float(op, "a", a)
    if b.dim() == 4:
        check_shape(op, "b", b, "(B, T, 2, H)", (None, None, 2, None))
        B, T, _, H = b.shape
        check_shape(op, "a", a, "(B, T, 2, 2, H)", (B, T, 2, 2, H))
    else:
        check_shape(op, "b", b, "(B, T, H), or for pairs (B, T, 2, H)", (None, None, None))
        check_shape(op, "a", a, "(B, T, H)", b.shape)
    check_flag(op, "reverse", reverse)
    cu_seqlens = _check_sequences(op, "b", b, cu_seqlens)
    _check_state(op, "h0", h0, b, cu_seqlens, pairs=b.dim() == 4)
    check_alike(op, (("b", b), ("a", a), ("h0", h0)))
    return ops.linear_recurrence(a, b, h0, reverse, cu_seqlens)


def gru_recurrence(
    u: Tensor,
    weight: Tensor,
    h0: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    solver: str = "auto",
    return_info: bool = False,
) -> Tensor | tuple[Tensor, SolverInfo]:
    """Run a GRU along time whose recurrence doesn't mix channels, from its pre-activations.

    With ``w = weight`` and everything but time left out, from h to the next h::

        z = sigmoid(w[0] * h + u[0])
        r = sigmoid(w[1] * h + u[1])
        n = tanh(w[2] * h * r + u[2])
        h = (1 - z) * h + z * n

    What comes out is this recurrence, step by step, whichever solver is used: the parallel ones check their
    result, and channels of sequences where it isn't certain get theirs step by step. NaN and infinities stay
    in their sequence and channel.

    Args:
        u: (B, T, 3, H), the inputs' share of update gate, reset gate and candidate, in this order, bias
            included: a product that the caller takes. fp32, bf16, fp16 or fp64. The state is carried in fp32
            (fp64 for fp64) and rounded to the dtype where it is stored.
        weight: (3, H), the dtype of ``u``.
        h0: (B, H), the dtype of ``u``, the state before the first step; zeros if None.
        cu_seqlens: (S + 1,) int32 or int64, for S sequences of different lengths that lie one after the other
            in the T steps of B = 1; see :func:`linear_recurrence`. h0 is then (S, H).
        solver: ``"sequential"`` takes step by step, all channels at once. ``"newton"`` corrects all states
            of a sequence at once, by linear recurrences. ``"shooting"`` runs chunks of time at once, and
            corrects what they start from. ``"auto"`` takes what is fastest.
        return_info: also return how the states were found.

    Returns:
        h (B, T, H), each state after its step: ``h[:, -1]`` is the last. Gradients reach u, weight and h0.
        With ``return_info`` ``(h, SolverInfo)``.

    Raises:
        TypeError: an argument is not a tensor, or of an unsupported dtype.
        ValueError: shapes, dtypes or devices don't match, cu_seqlens don't go from 0 to T, or the solver is
            unknown.
        RuntimeError: a backend was named that can't serve this call.
        NotImplementedError: by second derivatives, which the reference has and the kernels have not.

    Example:
        >>> import torch, fastsparse
        >>> u = torch.randn(2, 100, 3, 8)
        >>> h = fastsparse.gru_recurrence(u, torch.randn(3, 8))
        >>> h.shape
        torch.Size([2, 100, 8])

    Source: Danieli et al. 2025, "ParaRNN: Unlocking Parallel Training of Nonlinear RNNs for Large Language
    Models", arXiv 2510.21450, section 3.
    """
    op = "gru_recurrence"
    u, weight, h0 = autocast(u, weight, h0)
    cu_seqlens, chosen = _check_cell(op, u, weight, cu_seqlens, solver, return_info)
    _check_state(op, "h0", h0, u, cu_seqlens)
    check_alike(op, (("u", u), ("weight", weight), ("h0", h0)))
    h, passes = ops.gru_recurrence(u, weight, h0, cu_seqlens, chosen)
    return (h, SolverInfo(passes, passes >= 0)) if return_info else h


def lstm_recurrence(
    u: Tensor,
    weight: Tensor,
    peephole: Tensor,
    state0: tuple[Tensor, Tensor] | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    solver: str = "auto",
    return_info: bool = False,
) -> tuple[Tensor, Tensor] | tuple[Tensor, Tensor, SolverInfo]:
    """Run an LSTM along time whose recurrence doesn't mix channels, from its pre-activations.

    Its input gate is one less its forget gate, and gates look at c through peepholes. With ``w = weight``,
    ``p = peephole`` and everything but time left out, from (h, c) to the next::

        f = sigmoid(w[0] * h + p[0] * c + u[0])
        g = tanh(w[2] * h + u[2])
        c = f * c + (1 - f) * g
        o = sigmoid(w[1] * h + p[1] * c + u[1])
        h = o * tanh(c)

    Args:
        u: (B, T, 3, H), the inputs' share of forget gate, output gate and candidate, in this order.
        weight: (3, H), the dtype of ``u``, of the same three.
        peephole: (2, H), the dtype of ``u``, of forget and output gate.
        state0: ``(h0, c0)``, each (B, H), the dtype of ``u``, before the first step; zeros if None.
        cu_seqlens, solver, return_info: as in :func:`gru_recurrence`, and so are precision and certainty.

    Returns:
        ``(h, c)``, both (B, T, H), after each step. Gradients reach u, weight, peephole and state0. With
        ``return_info`` ``(h, c, SolverInfo)``.

    Raises:
        TypeError, ValueError, RuntimeError, NotImplementedError: as :func:`gru_recurrence`.

    Example:
        >>> import torch, fastsparse
        >>> u = torch.randn(2, 100, 3, 8)
        >>> h, c = fastsparse.lstm_recurrence(u, torch.randn(3, 8), torch.randn(2, 8))
        >>> h.shape, c.shape
        (torch.Size([2, 100, 8]), torch.Size([2, 100, 8]))

    Source: Danieli et al. 2025, arXiv 2510.21450, section 3; the peepholes are those of Gers & Schmidhuber
    2000, "Recurrent nets that time and count".
    """
    op = "lstm_recurrence"
    if state0 is not None and (not isinstance(state0, (tuple, list)) or len(state0) != 2):
        raise TypeError(f"{op}: state0 must be a pair (h0, c0), got {named(state0)}")
    u, weight, peephole, h0, c0 = autocast(u, weight, peephole, *(state0 or (None, None)))
    cu_seqlens, chosen = _check_cell(op, u, weight, cu_seqlens, solver, return_info)
    check_shape(op, "peephole", peephole, "(2, H)", (2, u.shape[-1]))
    states = {} if state0 is None else {"state0[0]": h0, "state0[1]": c0}
    for name, state in states.items():
        check_tensor(op, name, state)
        _check_state(op, name, state, u, cu_seqlens)
    check_alike(op, (("u", u), ("weight", weight), ("peephole", peephole), *states.items()))
    h, c, passes = ops.lstm_recurrence(u, weight, peephole, h0, c0, cu_seqlens, chosen)
    return (h, c, SolverInfo(passes, passes >= 0)) if return_info else (h, c)


def _check_cell(
    op: str, u: Tensor, weight: Tensor, cu_seqlens: Tensor | None, solver: str, return_info: bool
) -> tuple[Tensor | None, int]:
    """What the GRU and the LSTM have in common; cu_seqlens and the solver as ops take them."""
    check_shape(op, "u", u, "(B, T, 3, H)", (None, None, 3, None))
    check_shape(op, "weight", weight, "(3, H)", (3, u.shape[-1]))
    chosen = position_of(op, "solver", solver, SOLVERS)
    check_flag(op, "return_info", return_info)
    return _check_sequences(op, "u", u, cu_seqlens), chosen


def _check_sequences(op: str, name: str, batch: Tensor, cu_seqlens: Tensor | None) -> Tensor | None:
    """cu_seqlens as ops take them, int64."""
    if cu_seqlens is None:
        return None
    check_cu_seqlens(op, cu_seqlens, name, batch)
    return cu_seqlens.long()


def _check_state(
    op: str, name: str, state: Tensor | None, batch: Tensor, cu_seqlens: Tensor | None, pairs: bool = False
) -> None:
    """A state for every sequence, (S, H) or (S, 2, H)."""
    if state is None:
        return
    S, symbol = (batch.shape[0], "B") if cu_seqlens is None else (cu_seqlens.shape[0] - 1, "S")
    form, shape = (
        (f"({symbol}, 2, H)", (S, 2, batch.shape[-1])) if pairs else (f"({symbol}, H)", (S, batch.shape[-1]))
    )
    check_shape(op, name, state, form, shape)
