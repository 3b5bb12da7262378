"""Autoencoders on disk, in fastsparse's own layout and in those that others publish.

:func:`load` and :func:`save` are the whole interface; models have them as ``from_pretrained`` and
``save_pretrained``. docs/formats.md says what becomes of what a file holds, and what is refused.
"""

from pathlib import Path

import torch

from fastsparse._exports import of_modules
from fastsparse._validation import DTYPES, named
from fastsparse.formats._format import Format
from fastsparse.formats._place import Asked, Place
from fastsparse.nn import Model, SparseAutoencoder

__all__ = ["FORMATS", "load", "save"]

FORMATS: dict[str, Format] = of_modules(__name__, __path__)


def load(
    path: str | Path,
    *,
    format: str | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    k: int | None = None,
    normalized: bool = False,
) -> Model:
    """Load an autoencoder that somebody published, or that :func:`save` wrote.

    Its codes and reconstructions are those of the library that it comes from. What was folded for that, and
    what is not taken over, docs/formats.md says of each format. Thresholds that are loaded are not trained,
    and penalties, whose unit is another, have weight 0.

    Args:
        path: a file, or the folder that holds it. No network is asked for it.
        format: one of :data:`FORMATS`; default: which the names of the files say.
        dtype: of the parameters; default: the file's, but at least float32 where something was folded.
        device: where to put it; default: the CPU.
        k: how many latents describe a token, for files that don't say it.
        normalized: whether you normalise activations as the file says that they must be, and undo it
            afterwards: what can't be folded into the parameters is refused otherwise.

    Returns:
        One of the classes in :mod:`fastsparse.nn`, in evaluation mode.

    Raises:
        FileNotFoundError: there is no such file, or one that belongs to it is missing.
        OSError: a file can't be read.
        TypeError: dtype is none that models have.
        ValueError: the format is unknown or not the only one, a file is damaged, a tensor or an option isn't
            what it must be, or the model can't be said here; the message names the file and what it was.

    Example:
        >>> import tempfile, torch
        >>> from fastsparse import formats
        >>> from fastsparse.nn import TopKSAE
        >>> sae = TopKSAE(d_model=8, num_latents=32, k=4)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     formats.save(sae, folder, format="sparsify")
        ...     again = formats.load(folder)
        >>> type(again).__name__, torch.equal(again.W_enc, sae.W_enc)
        ('TopKSAE', True)
    """
    if dtype is not None and dtype not in DTYPES:
        raise TypeError(f"load: dtype must be float32, bfloat16, float16, float64 or None, got {dtype!r}")
    path = Path(path)
    place = Place.of(path)
    chosen = _recognised(path, place) if format is None else _named(format, FORMATS)
    model = chosen.load(place, Asked(dtype, k, normalized))
    if k is not None and getattr(model, "k", None) != k:
        wanted = f" or {model.k}" if hasattr(model, "k") else ""
        raise ValueError(f"load: k must be left out{wanted} of {path}, got {k}")
    return model.to(device or "cpu").eval()


def save(model: Model, path: str | Path, format: str = "fastsparse") -> None:
    """Save an autoencoder.

    In fastsparse's own format all of it comes back, bit for bit. In another one its function does, and its
    parameters bit for bit; what only training needs is not kept.

    Args:
        model: one of the classes in :mod:`fastsparse.nn`.
        path: a folder, which is made; a model of the same format there is replaced.
        format: ``"fastsparse"``, ``"saelens"`` or ``"sparsify"``.

    Raises:
        ModuleNotFoundError: safetensors is not installed.
        OSError: the folder can't be written to; what was there before is untouched.
        RuntimeError: a BatchTopKSAE has no threshold yet, which another format needs.
        TypeError: model is none of ours.
        ValueError: the format is unknown or can't say what the model does, or the folder holds files of
            another format.

    Example:
        >>> import tempfile
        >>> from fastsparse import formats
        >>> from fastsparse.nn import TopKSAE
        >>> sae = TopKSAE(d_model=8, num_latents=32, k=4)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     formats.save(sae, folder)
        ...     TopKSAE.from_pretrained(folder).k
        4
    """
    if not isinstance(model, Model):
        raise TypeError(f"save: model must be a fastsparse.nn.Model, got {named(model)}")
    chosen = _named(format, {name: found for name, found in FORMATS.items() if found.save})
    folder = Path(path)
    if folder.is_dir():
        others = [name for name, found in FORMATS.items() if found is not chosen]
        if held := [name for name in others if FORMATS[name].recognises(Place(folder, None))]:
            raise ValueError(f"save: {folder} must hold no files of another format, it holds {_listed(held)}")
    if format != "fastsparse":
        if not isinstance(model, SparseAutoencoder):
            raise ValueError(f"save: model must be an autoencoder in {format}, got {named(model)}")
        if model.decoder != "linear":
            raise ValueError(f"save: decoder must be 'linear' in {format}, got {model.decoder!r}")
    chosen.save(model, folder)


def _recognised(path: Path, place: Place) -> Format:
    found = [name for name, about in FORMATS.items() if about.recognises(place)]
    if len(found) > 1:
        raise ValueError(f"{path}: must be of one format, it is of {_listed(found)}: say which by format=")
    if not found:
        raise ValueError(
            f"{path}: must be of a known format, its folder holds {place.listing()}; known are "
            f"{_listed(FORMATS)}"
        )
    return FORMATS[found[0]]


def _named(format: str, known: dict[str, Format]) -> Format:
    if format not in known:
        raise ValueError(f"format must be one of {', '.join(known)}, got {format!r}")
    return known[format]


def _listed(names: list[str] | dict[str, Format]) -> str:
    return ", ".join(f"{name} ({FORMATS[name].files})" for name in names)
