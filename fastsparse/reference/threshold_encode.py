"""Encoding by thresholds: every pre-activation that isn't at most its latent's threshold."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastsparse._transforms import largest
from fastsparse.reference._ragged import offsets_of
from fastsparse.reference.topk_encode import score


def threshold_encode(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    threshold: Tensor,
    absolute: bool = False,
    latent_mask: Tensor | None = None,
    max_entries: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """x (N, D), weight (M, D), bias and threshold (M,), latent_mask (M,) bool.

    Returns values (E,) in the type of the sums, indices (E,), ascending in a row, and offsets (N + 1,). With
    max_entries E is that, and zeros fill the places behind the last row; where more came out and no error
    could be raised, all values are NaN.
    """
    scores = score(x, weight, bias)
    keys = scores.detach().abs() if absolute else scores.detach()
    found = ~(keys <= threshold)  # NaN is not at most anything: it surfaces
    if latent_mask is not None:
        found = found & latent_mask
    offsets = offsets_of(found.sum(dim=1))
    if max_entries is None:
        rows, latents = found.nonzero(as_tuple=True)  # in the order of (n, m)
        return scores[rows, latents], latents.clone(), offsets
    if (entries := largest(offsets[-1])) is not None and entries > max_entries:
        raise RuntimeError(
            f"threshold_encode: max_entries must be at least the number of entries ({entries}), "
            f"got max_entries={max_entries}"
        )
    N, M = scores.shape
    room = min(max_entries, N * M)  # in a form that needs no look at how many were found
    places = (~found).reshape(N * M).to(torch.uint8).sort(stable=True).indices[:room]
    real = torch.arange(room, device=x.device) < offsets[-1]
    values = scores.reshape(N * M)[places].masked_fill(~real, 0)
    values = values.masked_fill(offsets[-1] > max_entries, torch.nan)  # where nothing could be raised
    indices = (places % max(1, M)).masked_fill(~real, 0)
    values, indices = (F.pad(part, (0, max_entries - room)) for part in (values, indices))
    return values, indices, offsets.clamp(max=max_entries)
