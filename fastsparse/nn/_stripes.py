"""Dense codes without their (N, M) matrix: latents in stripes, each made again when its gradient is due.

Plain matrix products. It takes (N, 1024) of memory, and one product more than keeping everything would.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise, zip_longest
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastsparse.functional._linear import linear
from fastsparse.functional._tensors import autocast

_WIDTH = 1024  # latents a stripe: enough for products to run at full speed


class Activated(NamedTuple):
    """What a model makes of scores, each in the scores' shape.

    Attributes:
        values: of the code.
        costs: what is summed up for every token.
        gates: a second code, which trains no decoder.
    """

    values: Tensor
    costs: tuple[Tensor, ...]
    gates: Tensor | None = None


class Striped(NamedTuple):
    """What came of N tokens, in the type that sums are carried in.

    Attributes:
        levels: (N, D) each: reconstructions by the latents below each prefix, without ``b_dec``.
        costs: (N,) each.
        gated: (N, D) by the gates, if there are any.
        fired: (M,) int64, in how many tokens each latent had a nonzero value.
        num_entries: scalar int64, how many scores are above their bounds.
    """

    levels: Sequence[Tensor]
    costs: Sequence[Tensor]
    gated: Tensor | None
    fired: Tensor
    num_entries: Tensor


def in_stripes(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, bounds: Tensor, terms: Sequence[Tensor],
    activate: Callable[..., Activated], prefixes: Sequence[int],
) -> Striped:  # fmt: skip
    """Describe tokens (N, D) by all latents.

    Args:
        x, W_enc, b_enc, W_dec: as in a linear encoder, and its decoder.
        bounds: (M,), what scores of entries exceed.
        terms: (M,) each, what a latent's activation depends on.
        activate: makes of scores (N, S), and of the S latents' terms, their activations.
        prefixes: ascending, the last of them M; the sums are cut there.
    """
    x, W_enc, b_enc, W_dec = autocast(x, W_enc, b_enc, W_dec)
    wide = torch.promote_types(x.dtype, torch.float32)

    def stripe(x: Tensor, encoder: Tensor, bias: Tensor, decoder: Tensor, bounds: Tensor, *terms: Tensor):
        with torch.autocast(x.device.type, enabled=False):
            scores = linear(x.to(wide), encoder.to(wide), bias.to(wide))
            values, costs, gates = activate(scores, *terms)
            values, decoder = values.to(x.dtype).to(wide), decoder.to(wide)
            gated = None if gates is None else linear(gates.to(x.dtype).to(wide), decoder.detach().T)
            entries = (~(scores.detach() <= bounds)).sum()
            fired = (values.detach().abs() > 0).sum(dim=0)  # not NaN
            return fired, (linear(values, decoder.T), gated, entries, *(cost.sum(dim=1) for cost in costs))

    sizes = [size for below, to in pairwise((0, *prefixes)) for size in _sizes(to - below)]
    # split, whose gradient is put together once: that of each slice would be as large as the matrix
    parts = zip(*(tensor.split(sizes) for tensor in (W_enc, b_enc, W_dec, bounds, *terms)), strict=True)
    end, levels, fired, sums = 0, [], [], []
    for size, part in zip(sizes, parts, strict=True):
        counts, found = checkpoint(stripe, x, *part, use_reentrant=False, preserve_rng_state=False)
        fired.append(counts)
        sums = [_plus(so_far, more) for so_far, more in zip_longest(sums, found)]
        end += size
        if end in prefixes:
            levels.append(sums[0])
    _, gated, num_entries, *costs = sums
    return Striped(levels, costs, gated, torch.cat(fired), num_entries)


def _sizes(latents: int) -> list[int]:
    """Of stripes that hold so many latents, as equal as they can be."""
    count = -(-latents // _WIDTH)
    return [latents * (i + 1) // count - latents * i // count for i in range(count)]


def _plus(so_far: Tensor | None, more: Tensor | None) -> Tensor | None:
    return more if so_far is None or more is None else so_far + more
