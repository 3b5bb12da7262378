"""Gemma Scope, of Gemma 2: ``params.npz``. JumpReLU, not centred, ``W_enc`` (D, M)."""

from fastsparse.formats._autoencoder import of_plain, with_thresholds
from fastsparse.formats._format import Format
from fastsparse.formats._place import Asked, Place
from fastsparse.formats._tensors import from_npz
from fastsparse.nn import SparseAutoencoder

_WEIGHTS = "params.npz"


def _recognises(place: Place) -> bool:
    return place.holds(_WEIGHTS)


def _load(place: Place, asked: Asked) -> SparseAutoencoder:
    tensors = from_npz(place.one(_WEIGHTS))
    parts = of_plain(
        W_enc=tensors.take("W_enc", "D", "M").T,
        b_enc=tensors.take("b_enc", "M"),
        W_dec=tensors.take("W_dec", "M", "D"),
        b_dec=tensors.take("b_dec", "D"),
    )
    threshold = tensors.take("threshold", "M")
    tensors.finish()
    return with_thresholds(tensors.path, asked.dtype, threshold, **parts)


gemma_scope = Format("params.npz", _recognises, _load)
