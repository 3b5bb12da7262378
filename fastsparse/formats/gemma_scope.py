"""Gemma Scope, of Gemma 2: ``params.npz``. JumpReLU, not centred, ``W_enc`` (D, M)."""

from fastsparse.formats._autoencoder import jump_relu
from fastsparse.formats._format import Format
from fastsparse.formats._place import Asked, Place
from fastsparse.formats._tensors import from_npz
from fastsparse.nn import SparseAutoencoder

_WEIGHTS = "params.npz"


def _recognises(place: Place) -> bool:
    return place.holds(_WEIGHTS)


def _load(place: Place, asked: Asked) -> SparseAutoencoder:
    return jump_relu(from_npz(place.one(_WEIGHTS)), asked.dtype)


gemma_scope = Format("params.npz", _recognises, _load)
