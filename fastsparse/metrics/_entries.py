"""The entries of a code of any kind, checked, one for each token and latent that has a value."""

from typing import NamedTuple

import torch
from torch import Tensor

from fastsparse._validation import named
from fastsparse.functional import BatchTopK, Pursuit, Ragged, TopK
from fastsparse.functional.codes import cut, summed


class Entries(NamedTuple):
    """Those that are not 0, ordered by token, then by latent.

    Attributes:
        tokens: (E,) int64.
        latents: (E,) int64.
        values: (E,) float32, or float64 for such codes; values of one token and latent added up.
        num_tokens: N, the leading dimensions flattened.
    """

    tokens: Tensor
    latents: Tensor
    values: Tensor
    num_tokens: int


def entries_of(op: str, code: TopK | Ragged | BatchTopK | Pursuit, num_latents: int) -> Entries:
    """Raises TypeError for what is no code, IndexError for latents that there are none of."""
    if isinstance(code, BatchTopK):
        code = code.code
    if isinstance(code, Pursuit):
        code = TopK(code.values, code.indices)
    if not isinstance(code, TopK | Ragged):
        raise TypeError(f"{op}: code must be a TopK, Ragged, BatchTopK or Pursuit, got {named(code)}")
    wide = torch.promote_types(code.values.dtype, torch.float32)
    code = code._replace(values=code.values.detach().to(wide))
    ragged = Ragged.from_topk(code) if isinstance(code, TopK) else code
    ragged = cut(summed(op, ragged, num_latents))
    there = ragged.values != 0  # NaN is
    num_tokens = len(ragged.offsets) - 1
    return Entries(ragged.rows()[there], ragged.indices[there], ragged.values[there], num_tokens)
