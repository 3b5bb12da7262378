"""Linear recurrences h_t = a_t h_{t-1} + b_t, of single channels, or of pairs that 2x2 blocks couple."""

import torch
from torch import Tensor

from fastsparse.reference._precision import accumulate
from fastsparse.reference._sequences import Sequences


def linear_recurrence(
    a: Tensor,
    b: Tensor,
    h0: Tensor | None = None,
    reverse: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """a (B, T, H), b (B, T, H), h0 (S, H): h_t = a_t h_{t-1} + b_t for every channel; returns h (B, T, H).

    Blocks: a (B, T, 2, 2, H), b (B, T, 2, H), h0 (S, 2, H): h_t[i] = sum_j a_t[i, j] h_{t-1}[j] + b_t[i].
    S = B sequences, or those of ``cu_seqlens`` (S + 1,). Without h0 the first a of a sequence isn't read.
    With ``reverse`` it is h_{t+1} that enters h_t, and a sequence's last step is its first. The state is
    carried in fp32 (fp64 for fp64 inputs), and rounded where it is stored.
    """
    sequences = Sequences(cu_seqlens, b.shape[1], reverse)
    rows_a, rows_b = sequences.split(accumulate(a)), sequences.split(accumulate(b))
    h, states = None if h0 is None else accumulate(h0), []
    for t in range(rows_b.shape[1]):
        h = rows_b[:, t] if h is None else multiply(rows_a[:, t], h) + rows_b[:, t]
        states.append(h)
    return sequences.join(stacked(states, rows_b)).to(b.dtype)


def linear_recurrence_backward(
    a: Tensor,
    h0: Tensor | None,
    reverse: bool,
    cu_seqlens: Tensor | None,
    h: Tensor,
    d_h: Tensor,
    needs_a: bool,
    needs_b: bool,
    needs_h0: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient of :func:`linear_recurrence`, from the states h that it returned: d_a, d_b, d_h0.

    What reaches a state in all is lambda_t = d_h_t + a_{t+1}^T lambda_{t+1}; then d_b = lambda,
    d_a_t = lambda_t h_{t-1}^T, d_h0 = a_1^T lambda_1. Without h0 a sequence's first a isn't read, and its
    gradient is 0. What isn't needed comes out empty, of shape (0,).
    """
    sequences = Sequences(cu_seqlens, h.shape[1], reverse)
    factors, states, d_states = (sequences.split(accumulate(tensor)) for tensor in (a, h, d_h))
    through = adjoint(factors, d_states)
    d_a, d_b, d_h0 = (h.new_empty(0) for _ in range(3))
    if needs_a:
        start = torch.zeros_like(states[:, :1]) if h0 is None else accumulate(h0).unsqueeze(1)
        before = torch.cat((start, states), dim=1)[:, : states.shape[1]]
        products = through.unsqueeze(-2) * before.unsqueeze(-3) if h.dim() == 4 else through * before
        if h0 is None:
            products[:, :1] = 0
        d_a = sequences.join(products).to(a.dtype)
    if needs_b:
        d_b = sequences.join(through).to(h.dtype)
    if needs_h0:
        first = multiply(transposed(factors, states), through)[:, :1]
        d_h0 = first.sum(dim=1).to(h.dtype)  # zeros where there is no step
    return d_a, d_b, d_h0


def stacked(states: list[Tensor], empty: Tensor) -> Tensor:
    """States (S, ...) as (S, T, ...), or a copy of ``empty``, if T = 0."""
    return torch.stack(states, dim=1) if states else empty.clone(memory_format=torch.contiguous_format)


def multiply(a: Tensor, h: Tensor) -> Tensor:
    """a h: a (..., H) times h (..., H), or blocks a (..., 2, 2, H) times h (..., 2, H)."""
    return a * h if a.dim() == h.dim() else (a * h.unsqueeze(-3)).sum(-2)


def compose(later: Tensor, earlier: Tensor, block: bool) -> Tensor:
    """The factor of both steps: the product, of blocks (..., 2, 2, H) the matrix product."""
    return (later.unsqueeze(-2) * earlier.unsqueeze(-4)).sum(-3) if block else later * earlier


def scan(a: Tensor, b: Tensor) -> Tensor:
    """The same from a state of zeros in log2(T) passes over all steps at once: what runs in parallel.

    Two neighbouring steps (a, b), (a', b') are one, (a' a, a' b + b'). Each pass joins what reaches back 2^i
    steps with what ends before it (Hillis & Steele 1986; for recurrences Blelloch 1990, section 1.4).
    """
    block, reach, T = a.dim() > b.dim(), 1, b.shape[1]
    while reach < T:
        joined = multiply(a[:, reach:], b[:, :-reach]) + b[:, reach:]
        b = torch.cat((b[:, :reach], joined), dim=1)
        a = torch.cat((a[:, :reach], compose(a[:, reach:], a[:, :-reach], block)), dim=1)
        reach *= 2
    return b


def transposed(a: Tensor, like: Tensor) -> Tensor:
    """The factors by which gradients go back: blocks (..., 2, 2, H) transposed, others as they are."""
    return a.transpose(-3, -2) if a.dim() > like.dim() else a


def adjoint(jacobian: Tensor, d_h: Tensor) -> Tensor:
    """lambda_t = d_h_t + J_{t+1}^T lambda_{t+1}, along rows (S, T, ...): what reaches each state in all."""
    return linear_recurrence(transposed(jacobian, d_h).roll(-1, dims=1), d_h, reverse=True)
