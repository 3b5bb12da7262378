"""fastsparse's own: ``config.json``, the model's class and options, and ``model.safetensors``, its state."""

from inspect import isabstract
from pathlib import Path

import torch

from fastsparse import nn
from fastsparse.formats._config import Config
from fastsparse.formats._format import Format, write
from fastsparse.formats._place import Asked, Place
from fastsparse.formats._tensors import from_safetensors
from fastsparse.nn import Model

VERSION = 1
_WEIGHTS, _CONFIG = "model.safetensors", "config.json"
MODELS = {
    name: kind
    for name, kind in ((name, getattr(nn, name)) for name in nn.__all__)
    if isinstance(kind, type) and issubclass(kind, Model) and not isabstract(kind)
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
def _load(place: Place, asked: Asked) -> Model:
    config, tensors = Config(place.folder / _CONFIG), from_safetensors(place.one(_WEIGHTS))
    config.only("format", "fastsparse")
    config.only("version", VERSION)
    kind = MODELS[config.only("model", *MODELS)]
    options = config.get("options", dict)
    try:  # without memory for it: it may claim sizes that the file hasn't
        model = kind(**options, device="meta", generator=torch.Generator())
    except (TypeError, ValueError) as error:
        raise ValueError(f"{config.path}: options must be those of {kind.__name__}: {error}") from error
    atoms = next(name for name, _ in model.named_parameters() if name.endswith("W_dec"))
    model.to(tensors.take(atoms, *model.get_parameter(atoms).shape).dtype)
    wide = {  # buffers that keep their dtype when a model's is changed
        f"{prefix}.{name}".lstrip(".")
        for prefix, part in model.named_modules()
        for name in getattr(part, "_wide", ())
    }
    state = {}
    for name, own in model.state_dict().items():
        dtypes = (own.dtype, torch.float32, torch.float64) if name in wide else (own.dtype,)
        state[name] = tensors.take(name, *own.shape, dtypes=dtypes)
    model.load_state_dict(state, assign=True)
    tensors.finish()
    return model if asked.dtype is None else model.to(asked.dtype)


def _save(model: Model, folder: Path) -> None:
    name = type(model).__name__
    if MODELS.get(name) is not type(model):
        raise ValueError(f"save: model must be one of {', '.join(MODELS)}, got {name}")
    told = {"format": "fastsparse", "version": VERSION, "model": name, "options": model.options()}
    write(folder, _WEIGHTS, model.state_dict(), _CONFIG, told)


fastsparse = Format("config.json (of fastsparse) and model.safetensors", _recognises, _load, _save)
