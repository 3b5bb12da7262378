"""What encoders return: sparse codes, of as many entries in every row or of as many as there are."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsparse import ops
from fastsparse._transforms import largest
from fastsparse._validation import check_count, check_range
from fastsparse.reference._ragged import rows_of

__all__ = ["BatchTopK", "Ragged", "TopK"]


class TopK(NamedTuple):
    """A sparse code of as many entries in every row, largest first.

    Attributes:
        values: (..., k), the dtype of the encoder's input.
        indices: (..., k) int64, which latents.

    Example:
        >>> import torch, fastsparse
        >>> code = fastsparse.TopK(torch.tensor([[2.0, 1.0]]), torch.tensor([[3, 0]]))
        >>> code.to_dense(4).tolist(), fastsparse.Ragged.from_topk(code).indices.tolist()
        ([[1.0, 0.0, 0.0, 2.0]], [0, 3])
    """

    values: Tensor
    indices: Tensor

    def row_counts(self) -> Tensor:
        """(...) int64, how many entries every row has: k."""
        return self.indices.new_full(self.indices.shape[:-1], self.indices.shape[-1])

    def to_dense(self, num_latents: int) -> Tensor:
        """(..., M) with M = num_latents, as :meth:`Ragged.to_dense`."""
        dense = _in_range("to_dense", self, num_latents).to_dense(num_latents)
        return dense.reshape(*self.indices.shape[:-1], num_latents)

    def to_sparse_coo(self, num_latents: int) -> Tensor:
        """(N, M) of the N rows that the leading dimensions make, as :meth:`Ragged.to_sparse_coo`."""
        return _in_range("to_sparse_coo", self, num_latents).to_sparse_coo(num_latents)

    def to_sparse_csr(self, num_latents: int) -> Tensor:
        """(N, M) of the N rows that the leading dimensions make, as :meth:`Ragged.to_sparse_csr`."""
        return _in_range("to_sparse_csr", self, num_latents).to_sparse_csr(num_latents)

    def to_padded(self, k: int) -> "TopK":
        """The same of k entries a row, value 0 and index 0 in what is added, as :meth:`Ragged.to_padded`."""
        k, width = check_count("to_padded", "k", k, 0), self.indices.shape[-1]
        if k < width:
            raise _too_long(width, k)
        return TopK(*(F.pad(part, (0, k - width)) for part in self))


class Ragged(NamedTuple):
    """A sparse code of any number of entries in every row: compressed sparse rows.

    The rows are the tokens: the leading dimensions of the encoder's input, flattened. Behind the last row may
    be padding, of value 0 and index 0, where the encoder was told how many entries to make room for.

    Attributes:
        values: (E,).
        indices: (E,) int64, which latents, ascending in every row.
        offsets: (N + 1,) int64: entries ``offsets[n]`` up to ``offsets[n + 1]`` are those of row n.

    Example:
        >>> import torch, fastsparse
        >>> x = torch.tensor([[3.0, 5.0, -1.0], [0.5, 0.0, 2.0]])
        >>> code = fastsparse.threshold_encode(x, torch.eye(3), threshold=1.0)
        >>> code.row_counts().tolist(), code.to_dense(3).tolist()
        ([2, 1], [[3.0, 5.0, 0.0], [0.0, 0.0, 2.0]])
        >>> code.to_padded(2).indices.tolist()
        [[0, 1], [2, 0]]
    """

    values: Tensor
    indices: Tensor
    offsets: Tensor

    @classmethod
    def from_topk(cls, code: TopK) -> "Ragged":
        """The same entries, the latents of every row in ascending order."""
        k = code.indices.shape[-1]
        N = code.indices.shape[:-1].numel()
        indices, order = code.indices.reshape(N, k).sort(dim=1, stable=True)
        values = code.values.reshape(N, k).gather(1, order)
        offsets = torch.arange(N + 1, device=indices.device) * k
        return cls(values.reshape(N * k), indices.reshape(N * k), offsets)

    def rows(self) -> Tensor:
        """(E,) int64, the row of every entry; N for padding."""
        return rows_of(self.offsets, self.indices.shape[0])

    def row_counts(self) -> Tensor:
        """(N,) int64, how many entries every row has."""
        return self.offsets.diff()

    def to_dense(self, num_latents: int) -> Tensor:
        """(N, M) with M = num_latents: every entry at its place, those of one place added, else 0.

        As the next two differentiable in the values, the sums carried in fp32 (fp64 for fp64).

        Raises:
            TypeError, ValueError: num_latents is not an int, or negative.
            IndexError: an index is outside [0, M).
        """
        M = check_count("to_dense", "num_latents", num_latents, 0)
        code, N = summed("to_dense", self, M), self.offsets.shape[0] - 1
        dense = code.values.new_zeros(N + 1, M)  # a row for the padding, unless there can be no entries
        return dense.index_put((code.rows(), code.indices), code.values)[:N] if M else dense[:N]

    def to_sparse_coo(self, num_latents: int) -> Tensor:
        """(N, M) of layout ``torch.sparse_coo``, coalesced. Raises as :meth:`to_dense`."""
        M = check_count("to_sparse_coo", "num_latents", num_latents, 0)
        code = cut(summed("to_sparse_coo", self, M))
        places, size = torch.stack((code.rows(), code.indices)), (self.offsets.shape[0] - 1, M)
        return torch.sparse_coo_tensor(places, code.values, size, is_coalesced=True, check_invariants=False)

    def to_sparse_csr(self, num_latents: int) -> Tensor:
        """(N, M) of layout ``torch.sparse_csr``, columns ascending in a row. Raises as :meth:`to_dense`."""
        M = check_count("to_sparse_csr", "num_latents", num_latents, 0)
        values, indices, offsets = cut(summed("to_sparse_csr", self, M))
        size = self.offsets.shape[0] - 1, M
        return torch.sparse_csr_tensor(offsets, indices, values, size, check_invariants=False)

    def to_padded(self, k: int) -> TopK:
        """The same of k entries a row, in the order that they have, value 0 and index 0 in free places.

        Where that can't be raised, as in a graph, values of rows that are longer are NaN.

        Raises:
            TypeError, ValueError: k is not an int, or less than a row's entries.
        """
        k = check_count("to_padded", "k", k, 0)
        counts, N = self.row_counts(), self.offsets.shape[0] - 1
        if (most := largest(counts)) is not None and most > k:
            raise _too_long(most, k)
        rows = self.rows()
        column = torch.arange(rows.shape[0], device=rows.device) - self.offsets[rows]
        to = torch.where((rows < N) & (column < k), rows * k + column, N * k)  # the last for what is left
        values, indices = (
            part.new_zeros(N * k + 1).index_put((to,), part)[: N * k].reshape(N, k)
            for part in (self.values, self.indices)
        )
        return TopK(values.masked_fill((counts > k).unsqueeze(1), torch.nan), indices)


class BatchTopK(NamedTuple):
    """A sparse code of the largest entries of a whole batch, as :class:`Ragged`, and the least of them.

    Attributes:
        values: (E,), the dtype of the encoder's input.
        indices: (E,) int64, which latents, ascending in every row.
        offsets: (N + 1,) int64: entries ``offsets[n]`` up to ``offsets[n + 1]`` are those of row n.
        threshold: scalar, in the type that sums are carried in: the least score that was selected, as it was
            compared: scaled, and without its sign where that didn't count.
    """

    values: Tensor
    indices: Tensor
    offsets: Tensor
    threshold: Tensor

    @property
    def code(self) -> Ragged:
        """The code alone."""
        return Ragged(self.values, self.indices, self.offsets)


def _in_range(op: str, code: TopK, num_latents: int) -> Ragged:
    """The entries, whose indices are looked at before they lose their places."""
    check_range(op, code.indices, check_count(op, "num_latents", num_latents, 0))
    return Ragged.from_topk(code)


def summed(op: str, code: Ragged, M: int) -> Ragged:
    """Latents ascending in every row and each once, its values added; what becomes free is padding.

    In a fixed order, for which PyTorch's own sums by index give no word, and without a look at the data.
    """
    check_range(op, code.indices, M)
    rows, entries = code.rows(), code.indices.shape[0]
    keys, order = (rows * M + code.indices).sort(stable=True)
    begins = F.pad(keys.diff() != 0, (1, 0), value=True)[:entries]
    sums = F.pad(begins.cumsum(0), (1, 0))  # how many begin before each entry
    bounds = torch.searchsorted(sums[1:], torch.arange(1, entries + 2, device=keys.device))
    latents, one = code.indices[order], code.values.new_ones(1, 1)
    values = ops.spmm(code.values[order], torch.zeros_like(latents), one, bounds)[:, 0]
    offsets = sums[code.offsets]
    rest = torch.arange(entries, device=keys.device) >= offsets[-1]
    indices = F.pad(latents, (0, 1))[bounds[:-1]]
    return Ragged(values.masked_fill(rest, 0), indices.masked_fill(rest, 0), offsets)


def cut(code: Ragged) -> Ragged:
    """Without its padding."""
    entries = int(code.offsets[-1])
    return Ragged(code.values[:entries], code.indices[:entries], code.offsets)


def _too_long(most: int, k: int) -> ValueError:
    return ValueError(
        f"to_padded: k must be at least the number of entries of the longest row ({most}), got k={k}"
    )
