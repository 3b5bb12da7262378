"""BatchTopK encoding on a GPU: topk_encode's product, and a pool of the largest scores so far.

Tokens are scored some at a time, of all latents, by the product that Triton has for topk_encode; PyTorch
selects: what is selected from pool and scores is the next pool. Both are in the order of tokens and latents,
so that the first of equals stand first, and what is left in the end is the code. All shapes are known
beforehand: nothing waits for the device.

Every score is written and read a few times, 4 bytes each, which is less than the product takes where D is
some hundreds and more; the memory is that of 2^24 scores, and of the pool.
"""

import torch
from fastsparse.kernels._order import UNSET, keys_at, orders_of
from fastsparse.kernels._topk_lists import BLOCK, Lists
from fastsparse.kernels._topk_product import Atoms, Tokens
from fastsparse.kernels.topk_encode import _MOST_SCORES, _Encoder
from torch import Tensor

from fastsparse._options import ACTIVATIONS, option_at

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class _BatchEncoder(_Encoder):
    """One call; latents are counted by their positions among the eligible ones."""

    def __init__(self, x, weight, bias, total, activation, latent_scale, latent_mask) -> None:
        super().__init__(x, weight, bias, 1, activation, latent_scale, latent_mask)
        self.total = total

    def run(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x, total = self.x, self.total
        orders = x.new_full((total,), UNSET.value, dtype=torch.int32)
        places = x.new_zeros(total, dtype=torch.int64)  # n M + m
        scores = x.new_zeros(total, dtype=torch.float32)
        step = max(1, _MOST_SCORES // self.M)
        for first in range(0, self.N, step):
            found = self._scores_of(first, min(step, self.N - first))
            theirs = torch.cat((orders, self._orders(found).flatten()))
            chosen = _largest(theirs, total)
            orders = theirs[chosen]
            there, new = chosen < total, (chosen - total).clamp_min(0)
            kept = chosen.clamp_max(total - 1)
            places = torch.where(there, places[kept], first * self.M + new)
            scores = torch.where(there, scores[kept], found.flatten()[new])
        positions = places % self.M
        values = scores.to(x.dtype)
        if self.relu:
            values = values.masked_fill(values <= 0, 0.0)
        bounds = torch.arange(self.N + 1, device=x.device) * self.M
        return (
            values,
            positions if self.order is None else self.order[positions],
            torch.searchsorted(places, bounds),
            keys_at(orders.amin()),
        )

    def _scores_of(self, first: int, count: int) -> Tensor:
        """(count, M) exact scores of some tokens."""
        tokens = Tokens(self.x[first : first + count], count)
        scratch = self._scores(count, -(-self.M // BLOCK) * BLOCK)
        atoms = Atoms(self.weight, 0, self.M, None, self.order)
        self._score(tokens, atoms, scratch, Lists(count, 0, self.x.device).bounds)
        return scratch[0][:, : self.M]

    def _orders(self, scores: Tensor) -> Tensor:
        """The orders of their keys; unset where a position isn't that of an eligible latent."""
        keys = scores if self.scale is None else scores * self.scale
        orders = orders_of(keys.abs() if self.absolute else keys)
        if self.order is None:
            return orders
        positions = torch.arange(self.M, device=scores.device)
        return orders.masked_fill(positions >= self.live_latents, UNSET.value)


def _largest(orders: Tensor, count: int) -> Tensor:
    """Where the largest of them are, ascending; of equals the first."""
    least = orders.topk(count, sorted=False).values.amin()
    above, equal = orders > least, orders == least
    left = count - above.sum(dtype=torch.int32)
    kept = above | (equal & (equal.cumsum(0, dtype=torch.int32) <= left))
    wanted = torch.arange(1, count + 1, device=orders.device, dtype=torch.int32)
    return torch.searchsorted(kept.cumsum(0, dtype=torch.int32), wanted)


def batch_topk_encode(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    total: int,
    activation: int,
    latent_scale: Tensor | None,
    latent_mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x (N, D), weight (M, D), bias and latent_scale (M,), latent_mask (M,) bool."""
    chosen = option_at("batch_topk_encode", "activation", activation, ACTIVATIONS)
    return _BatchEncoder(x, weight, bias, total, chosen, latent_scale, latent_mask).run()
