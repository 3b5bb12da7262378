"""openai/sparse_autoencoder: ``<n>.pt``, a state and the activation's name; ``decoder.weight`` (D, M)."""

from pathlib import Path
from typing import Any

import torch

from fastsparse.formats._autoencoder import autoencoder, of_linear_layers
from fastsparse.formats._format import Format
from fastsparse.formats._place import Asked, Place
from fastsparse.formats._tensors import dictionary, from_dictionary
from fastsparse.nn import ReLUSAE, SparseAutoencoder, TopKSAE

_OTHERS = ("ae.pt", "ae_*.pt", "*.sae.pt")
# How often latents were active, in steps rather than tokens, and how strongly.
_STATISTICS = {
    "stats_last_nonzero": torch.int64, "latents_activation_frequency": torch.float32,
    "latents_mean_square": torch.float32,
}  # fmt: skip


def _recognises(place: Place) -> bool:
    return place.holds("*.pt") and not place.holds(*_OTHERS)


def _load(place: Place, asked: Asked) -> SparseAutoencoder:
    path = place.one("*.pt")
    found = dictionary(path)
    activation, of_activation = found.pop("activation", None), found.pop("activation_state_dict", {})
    tensors = from_dictionary(path, found)
    parts = of_linear_layers(tensors, b_enc="latent_bias", b_dec="pre_bias")
    for name, dtype in _STATISTICS.items():
        if name in tensors:
            tensors.take(name, "M", dtypes=(dtype,))
    tensors.finish()
    if activation not in (None, "ReLU", "TopK"):
        raise ValueError(f"{path}: activation must be ReLU or TopK, got {activation!r}")
    if activation == "TopK" and not asked.normalized:
        raise ValueError(
            f"{path}: activation must be ReLU, got TopK, whose tokens are each brought to mean 0 and "
            "standard deviation 1; normalized=True takes it as it is, for activations that you normalise"
        )
    if activation == "TopK":
        return autoencoder(TopKSAE, path, asked.dtype, k=_k(path, of_activation), **parts)
    if activation is None and asked.k is not None:  # as its training code keeps them
        return autoencoder(TopKSAE, path, asked.dtype, k=asked.k, **parts)
    return autoencoder(ReLUSAE, path, asked.dtype, l1=0.0, **parts)


def _k(path: Path, of_activation: Any) -> int:
    if not isinstance(of_activation, dict) or type(of_activation.get("k")) is not int:
        raise ValueError(f"{path}: activation_state_dict must say k, of type int, got {of_activation!r:.80}")
    after = of_activation.get("postact_fn", "ReLU")
    if after != "ReLU":
        raise ValueError(f"{path}: activation_state_dict's postact_fn must be ReLU, got {after!r}")
    return of_activation["k"]


openai = Format("<n>.pt", _recognises, _load)
