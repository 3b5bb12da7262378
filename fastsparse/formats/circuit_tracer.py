"""circuit-tracer's per-layer transcoders: ``layer_<n>.safetensors``, both matrices (M, D), not centred.

What one returns is the output of the layer's MLP for the input of that: its loss against its own input means
nothing. Cross-layer transcoders (``W_enc_<n>.safetensors``, ``W_dec_<n>.safetensors``) are refused.
"""

from fastsparse.formats._autoencoder import autoencoder, of_plain, with_thresholds
from fastsparse.formats._config import NO_SKIP
from fastsparse.formats._format import Format
from fastsparse.formats._place import Asked, Place
from fastsparse.formats._tensors import from_safetensors
from fastsparse.nn import ReLUSAE, SparseAutoencoder

_WEIGHTS = "layer_*.safetensors"
_CROSS = ("W_enc_*.safetensors", "W_dec_*.safetensors")
_THRESHOLD, _SKIP = "activation_function.threshold", "W_skip"


def _recognises(place: Place) -> bool:
    return place.holds(_WEIGHTS, *_CROSS)


def _load(place: Place, asked: Asked) -> SparseAutoencoder:
    if place.holds(*_CROSS):
        raise ValueError(
            f"{place.file or place.folder}: must be a transcoder of one layer, got a cross-layer transcoder, "
            "whose latents write to several"
        )
    tensors = from_safetensors(place.one(_WEIGHTS))
    if _SKIP in tensors:
        raise ValueError(f"{tensors.path}: must not hold {_SKIP}: {NO_SKIP}")
    parts = of_plain(
        W_enc=tensors.take("W_enc", "M", "D"),
        b_enc=tensors.take("b_enc", "M"),
        W_dec=tensors.take("W_dec", "M", "D"),
        b_dec=tensors.take("b_dec", "D"),
    )
    threshold = tensors.take(_THRESHOLD, "M") if _THRESHOLD in tensors else None
    tensors.finish()
    if threshold is None:
        return autoencoder(ReLUSAE, tensors.path, asked.dtype, l1=0.0, **parts)
    return with_thresholds(tensors.path, asked.dtype, threshold, rectified=False, **parts)


circuit_tracer = Format("layer_<n>.safetensors", _recognises, _load)
