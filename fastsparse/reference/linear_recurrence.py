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
