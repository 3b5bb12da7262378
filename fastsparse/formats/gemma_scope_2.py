"""Gemma Scope 2, of Gemma 3: ``params.safetensors``. JumpReLU, not centred, ``w_enc`` (D, M)."""

from fastsparse.formats._autoencoder import jump_relu
from fastsparse.formats._config import NO_SKIP, NO_TRANSCODER, Config
from fastsparse.formats._format import Format
from fastsparse.formats._place import Asked, Place
from fastsparse.formats._tensors import from_safetensors
from fastsparse.nn import SparseAutoencoder

_WEIGHTS = "params.safetensors"
_SKIP = "affine_skip_connection"


def _recognises(place: Place) -> bool:
    return place.holds(_WEIGHTS)


def _load(place: Place, asked: Asked) -> SparseAutoencoder:
    tensors = from_safetensors(place.one(_WEIGHTS))
    if (place.folder / "config.json").is_file():  # not everything that is published has one
        _check(Config(place.folder / "config.json"))
    if _SKIP in tensors:
        raise ValueError(f"{tensors.path}: must not hold {_SKIP}: {NO_SKIP}")
    return jump_relu(tensors, asked.dtype, W_enc="w_enc", W_dec="w_dec")


def _check(config: Config) -> None:
    config.only("architecture", "jump_relu", default="jump_relu")
    config.only("affine_connection", False, default=False, why=NO_SKIP)
    if "hf_hook_point_out" in config:
        config.only("hf_hook_point_out", config.get("hf_hook_point_in", str), why=NO_TRANSCODER)


gemma_scope_2 = Format("params.safetensors", _recognises, _load)
