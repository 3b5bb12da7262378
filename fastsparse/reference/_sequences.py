"""The sequences of a batch: of one length, one a row, or of many lengths, packed end to end into one row."""

import torch
from torch import Tensor

from fastsparse._transforms import may_branch_on


class Sequences:
    """Turns (B, T, ...) into one row a sequence, whose steps run in the order of the recurrence, and back.

    Without ``cu_seqlens`` the rows are the sequences already. With it B is 1, and sequence s has the steps
    from ``cu_seqlens[s]`` to before ``cu_seqlens[s + 1]``. Its row is as long as the longest, by zeros.
    """

    def __init__(self, cu_seqlens: Tensor | None, T: int, reverse: bool = False) -> None:
        self.packed, self.reverse = cu_seqlens is not None, reverse
        if cu_seqlens is None:
            return
        bounds, step = cu_seqlens.long(), torch.arange(T, device=cu_seqlens.device)
        lengths = bounds.diff().unsqueeze(1)  # (S, 1)
        unknown = not may_branch_on(lengths)
        longest = T if unknown or not lengths.numel() else int(lengths.max())
        place = step[:longest] if unknown else torch.arange(longest, device=step.device)
        first = bounds[:-1].unsqueeze(1)
        self._used = place < lengths
        self._from = (first + lengths - 1 - place if reverse else first + place).where(self._used, 0)
        self._row = torch.searchsorted(bounds, step, right=True) - 1
        self._place = bounds[self._row + 1] - 1 - step if reverse else step - bounds[self._row]

    def split(self, batch: Tensor) -> Tensor:
        """(B, T, ...) to (S, longest, ...)."""
        if not self.packed:
            return batch.flip(1) if self.reverse else batch
        used = self._used.view(*self._used.shape, *(1,) * (batch.dim() - 2))
        return torch.where(used, batch[0, self._from], 0.0)

    def join(self, rows: Tensor) -> Tensor:
        """(S, longest, ...) to (B, T, ...)."""
        if not self.packed:
            return rows.flip(1) if self.reverse else rows
        return rows[self._row, self._place].unsqueeze(0)
