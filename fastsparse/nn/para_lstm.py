"""The LSTM of ParaRNN as a module."""

from typing import ClassVar

from torch import Tensor

from fastsparse.functional import lstm_recurrence
from fastsparse.nn.para_rnn import ParaRNN


class ParaLSTM(ParaRNN):
    """An LSTM whose recurrence doesn't mix channels, so that its time steps can be solved for in parallel.

    Its input gate is one less its forget gate, and gates look at c through peepholes. Per layer and channel,
    x being the layer's inputs::

        f = sigmoid(weight_hh[0] * h + peephole[0] * c + weight_ih[0] @ x + bias[0])
        g = tanh(weight_hh[2] * h + weight_ih[2] @ x + bias[2])
        c = f * c + (1 - f) * g
        o = sigmoid(weight_hh[1] * h + peephole[1] * c + weight_ih[1] @ x + bias[1])
        h = o * tanh(c)

    Args:
        input_size, ..., generator: as in :class:`ParaGRU`.

    Attributes:
        weight_ih_l0, ...: (3, H, D / num_heads), of forget gate, output gate and candidate.
        weight_hh_l0, ...: (3, H); peephole_l0, ...: (2, H), of forget and output gate; bias_l0, ...: (3, H).

    Raises:
        TypeError, ValueError: as :class:`ParaGRU`.

    Example:
        >>> import torch
        >>> from fastsparse.nn import ParaLSTM
        >>> lstm = ParaLSTM(16, 32)
        >>> output, (h, c) = lstm(torch.randn(4, 100, 16))
        >>> output.shape, h.shape, c.shape
        (torch.Size([4, 100, 32]), torch.Size([1, 4, 32]), torch.Size([1, 4, 32]))

    Source: Danieli et al. 2025, arXiv 2510.21450, section 3.
    """

    states = 2
    recurrent: ClassVar[dict[str, int]] = {"weight_hh": 3, "peephole": 2}
    gates, order = ("f", "o", "z"), ("f", "z", "o")

    def _recur(self, u: Tensor, layer: int, start, cu_seqlens: Tensor | None):
        return lstm_recurrence(u, *self._weights(layer), start, cu_seqlens=cu_seqlens, solver=self.solver)
