"""The GRU of ParaRNN as a module."""

from typing import ClassVar

from torch import Tensor

from fastsparse.functional import gru_recurrence
from fastsparse.nn.para_rnn import ParaRNN


class ParaGRU(ParaRNN):
    """A GRU whose recurrence doesn't mix channels, so that its time steps can be solved for in parallel.

    Per layer and channel, x being the layer's inputs::

        z = sigmoid(weight_hh[0] * h + weight_ih[0] @ x + bias[0])
        r = sigmoid(weight_hh[1] * h + weight_ih[1] @ x + bias[1])
        n = tanh(weight_hh[2] * h * r + weight_ih[2] @ x + bias[2])
        h = (1 - z) * h + z * n

    It is used like ``nn.GRU``, with these differences: batches come first unless told otherwise and are never
    left out, sequences of many lengths go by ``cu_seqlens`` instead of a ``PackedSequence``, the initial
    state is called ``state``, and there is one direction.

    Args:
        input_size: D, the width of the inputs.
        hidden_size: H, the number of channels.
        num_layers: how many layers; each takes the one before as its inputs.
        bias: whether gates have one.
        batch_first: inputs and outputs are (B, T, ...); False for (T, B, ...).
        dropout: the probability of dropping an input of a layer after the first, in training.
        num_heads: inputs and channels fall into as many groups, and channels see inputs of their own group.
        solver: see :func:`fastsparse.gru_recurrence`.
        device, dtype: of the parameters.
        generator: source of the initial weights, on the parameters' device; default: PyTorch's global one.

    Attributes:
        weight_ih_l0, ...: (3, H, D / num_heads), of update gate, reset gate and candidate.
        weight_hh_l0, ...: (3, H); bias_l0, ...: (3, H).

    Raises:
        TypeError, ValueError: a size is not a positive integer, num_heads doesn't divide D and H, dropout is
            no probability, or the solver is unknown.

    Example:
        >>> import torch
        >>> from fastsparse.nn import ParaGRU
        >>> gru = ParaGRU(16, 32, num_layers=2)
        >>> output, state = gru(torch.randn(4, 100, 16))
        >>> output.shape, state.shape
        (torch.Size([4, 100, 32]), torch.Size([2, 4, 32]))
        >>> output, state = gru.step(torch.randn(4, 16), state)

    Source: Danieli et al. 2025, "ParaRNN: Unlocking Parallel Training of Nonlinear RNNs for Large Language
    Models", arXiv 2510.21450, section 3.
    """

    states = 1
    recurrent: ClassVar[dict[str, int]] = {"weight_hh": 3}
    gates = order = ("z", "r", "n")

    def _recur(self, u: Tensor, layer: int, start, cu_seqlens: Tensor | None):
        h0 = None if start is None else start[0]
        return (gru_recurrence(u, *self._weights(layer), h0, cu_seqlens=cu_seqlens, solver=self.solver),)
