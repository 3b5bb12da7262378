"""The largest eligible entries of every row where each row has a mask of its own."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fastsparse.functional import TopK

_SPREADS = 5  # of the number of eligible ones among so many: how far above k it is hoped to be


def masked_topk(
    encode: Callable[[int], TopK],
    eligible: Callable[[Tensor], Tensor],
    k: int,
    num_latents: int,
    share: float,
) -> TopK:
    """The k largest of every row's eligible latents, exactly, of the largest of all of them.

    So many are fetched that k should be eligible. Where a row has fewer, and its smallest one fetched is
    positive, there may be more behind it, and more are fetched for all.

    Args:
        encode: of a number of latents, that many of every row, largest first, none negative.
        eligible: of indices (N, c), a bool.
        k: how many.
        num_latents: M.
        share: of how many latents it is expected that they are eligible.

    Returns:
        ``(values, indices)`` (N, k); value 0 where no more are eligible.
    """
    spread = _SPREADS * math.sqrt(k * (1 - share))
    fetched = min(num_latents, math.ceil((k + spread) / share))
    while True:
        code = encode(fetched)
        mine = eligible(code.indices)
        lacking = (mine.sum(dim=1) < k) & (code.values[:, -1] > 0)
        if fetched == num_latents or not bool(lacking.any()):
            break
        fetched = min(num_latents, 2 * fetched)
    places = (~mine).to(torch.uint8).argsort(dim=1, stable=True)[:, :k]
    values = torch.where(mine, code.values, 0).gather(1, places)
    return TopK(values, code.indices.gather(1, places))
