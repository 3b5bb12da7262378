"""fastsparse's own: ``config.json``, the model's class and options, and ``model.safetensors``, its state."""

from inspect import isabstract
from pathlib import Path

import torch

from fastsparse import nn
from fastsparse.formats._config import Config
from fastsparse.formats._format import Format, write
from fastsparse.formats._place import Asked, Place
from fastsparse.formats._tensors import from_safetensors
from fastsparse.nn import SparseAutoencoder

VERSION = 1
_WEIGHTS, _CONFIG = "model.safetensors", "config.json"
MODELS = {
    name: kind
    for name, kind in ((name, getattr(nn, name)) for name in nn.__all__)
    if isinstance(kind, type) and issubclass(kind, SparseAutoencoder) and not isabstract(kind)
}


def _recognises(place: Place) -> bool:
    """Other libraries use these names too."""
    path = place.folder / _CONFIG
    if not (place.holds(_WEIGHTS) and path.is_file()):
        return False
    try:
        return Config(path).get("format", str, "") == "fastsparse"
    except ValueError:
        return True  # is explained when it is loaded


@torch.no_grad()
def _load(place: Place, asked: Asked) -> SparseAutoencoder:
    config, tensors = Config(place.folder / _CONFIG), from_safetensors(place.one(_WEIGHTS))
    config.only("format", "fastsparse")
    config.only("version", VERSION)
    kind = MODELS[config.only("model", *MODELS)]
    told = config.part("options")
    tensors.expect(M=told.get("num_latents", int), D=told.get("d_model", int))
    ranks = told.get("ranks", list, [])
    tensors.take("b_dec", "D")  # whose sizes are right before there is a model of them
    atoms = tensors.take("W_dec", "M", "R1" if ranks else "D")
    options = config.get("options", dict)
    try:
        model = kind(**options, device="cpu", dtype=atoms.dtype, generator=torch.Generator())
    except (TypeError, ValueError) as error:
        raise ValueError(f"{config.path}: options must be those of {kind.__name__}: {error}") from error
    wide = getattr(model, "_wide", ())  # buffers that keep their dtype when a model's is changed
    for name, own in model.state_dict().items():
        dtypes = (own.dtype, torch.float32, torch.float64) if name in wide else (own.dtype,)
        tensor = tensors.take(name, *own.shape, dtypes=dtypes)
        if tensor.dtype == own.dtype:
            own.copy_(tensor)
        else:
            setattr(model, name, tensor)
    tensors.finish()
    return model if asked.dtype is None else model.to(asked.dtype)


def _save(model: SparseAutoencoder, folder: Path) -> None:
    name = type(model).__name__
    if MODELS.get(name) is not type(model):
        raise ValueError(f"save: model must be one of {', '.join(MODELS)}, got {name}")
    told = {"format": "fastsparse", "version": VERSION, "model": name, "options": model.options()}
    write(folder, _WEIGHTS, model.state_dict(), _CONFIG, told)


fastsparse = Format("config.json (of fastsparse) and model.safetensors", _recognises, _load, _save)
