"""Qwen-Scope: ``layer<n>.sae.pt``. TopK, not centred, ``W_enc`` (M, D) and ``W_dec`` (D, M).

How many latents stands in the name of what is published alone, as in ``SAE-Res-Qwen3-8B-Base-W64K-L0_50``.
Its values are not rectified, as these are here: the same, as long as k scores are positive.
"""

import re
from pathlib import Path

from fastsparse.formats._autoencoder import autoencoder, of_plain
from fastsparse.formats._format import Format
from fastsparse.formats._place import Asked, Place
from fastsparse.formats._tensors import dictionary, from_dictionary
from fastsparse.nn import SparseAutoencoder, TopKSAE

_WEIGHTS = "*.sae.pt"


def _recognises(place: Place) -> bool:
    return place.holds(_WEIGHTS)


def _load(place: Place, asked: Asked) -> SparseAutoencoder:
    path = place.one(_WEIGHTS)
    k = _k(path) if asked.k is None else asked.k
    tensors = from_dictionary(path, dictionary(path))
    parts = of_plain(
        W_enc=tensors.take("W_enc", "M", "D"),
        b_enc=tensors.take("b_enc", "M"),
        W_dec=tensors.take("W_dec", "D", "M").T,
        b_dec=tensors.take("b_dec", "D"),
    )
    tensors.finish()
    return autoencoder(TopKSAE, path, asked.dtype, k=k, **parts)


def _k(path: Path) -> int:
    """By the innermost folder that says it."""
    for folder in path.absolute().parents:
        if found := re.search(r"-L0_(\d+)$", folder.name):
            return int(found[1])
    raise ValueError(f"{path}: k must be given, as neither the file says it nor a folder named *-L0_<k>")


qwen_scope = Format("layer<n>.sae.pt", _recognises, _load)
