"""dictionary_learning: ``ae.pt``, a state that torch.save wrote, and the trainer's ``config.json``."""

import torch

from fastsparse.formats._autoencoder import autoencoder, jump_relu, of_linear_layers, of_plain
from fastsparse.formats._config import Config
from fastsparse.formats._format import Format
from fastsparse.formats._place import Asked, Place
from fastsparse.formats._tensors import Tensors, dictionary, from_dictionary
from fastsparse.nn import BatchTopKSAE, GatedSAE, ReLUSAE, SparseAutoencoder, TopKSAE

_WEIGHTS = ("ae.pt", "ae_*.pt")  # the latter of a training step, in a folder of their own below
_INTEGERS = (torch.int32, torch.int64)


def _recognises(place: Place) -> bool:
    return place.holds(*_WEIGHTS)


def _load(place: Place, asked: Asked) -> SparseAutoencoder:
    path = place.one(*_WEIGHTS)
    home = place.folder.parent if place.folder.name == "checkpoints" else place.folder
    trainer = Config(home / "config.json").part("trainer")
    load = _CLASSES[trainer.only("dict_class", *_CLASSES)]
    tensors = from_dictionary(path, dictionary(path))
    sizes = {"D": trainer.get("activation_dim", int, 0), "M": trainer.get("dict_size", int, 0)}
    tensors.expect(**{symbol: size for symbol, size in sizes.items() if size})
    return load(tensors, trainer, asked)


def _topk(tensors: Tensors, trainer: Config, asked: Asked) -> SparseAutoencoder:
    """Its decoder is (D, M); its threshold is for those who ask for it, as here."""
    parts = of_linear_layers(tensors)
    state, k = _threshold(tensors), _k(tensors, trainer)
    tensors.finish()
    kind = TopKSAE if trainer.get("dict_class", str) == "AutoEncoderTopK" else BatchTopKSAE
    return autoencoder(kind, tensors.path, asked.dtype, state=state, k=k, **parts)


def _matryoshka(tensors: Tensors, trainer: Config, asked: Asked) -> SparseAutoencoder:
    parts = {
        "W_enc": tensors.take("W_enc", "D", "M").T,
        "b_enc": tensors.take("b_enc", "M"),
        "W_dec": tensors.take("W_dec", "M", "D"),
        "b_dec": tensors.take("b_dec", "D"),
    }
    sizes = tensors.take("group_sizes", "G", dtypes=_INTEGERS)
    M = len(parts["b_enc"])
    if sizes.sum() != M:
        raise ValueError(f"{tensors.path}: group_sizes must add up to M = {M}, got {sizes.tolist()}")
    options = {"k": _k(tensors, trainer), "prefixes": sizes.cumsum(0)[:-1].tolist()}
    options["prefix_weights"] = trainer.get("group_weights", list, None)
    state = _threshold(tensors)
    tensors.finish()
    return autoencoder(BatchTopKSAE, tensors.path, asked.dtype, state=state, **options, **parts)


def _jump_relu(tensors: Tensors, trainer: Config, asked: Asked) -> SparseAutoencoder:
    return jump_relu(tensors, asked.dtype)


def _gated(tensors: Tensors, trainer: Config, asked: Asked) -> SparseAutoencoder:
    parts = of_linear_layers(tensors, b_enc="gate_bias", b_dec="decoder_bias")
    state = {"r_mag": tensors.take("r_mag", "M"), "b_mag": tensors.take("mag_bias", "M")}
    tensors.finish()
    return autoencoder(GatedSAE, tensors.path, asked.dtype, state=state, l1=0.0, **parts)


def _relu(tensors: Tensors, trainer: Config, asked: Asked) -> SparseAutoencoder:
    """Centred by its bias, but for the newer one, whose decoder has it."""
    newer = trainer.get("dict_class", str) == "AutoEncoderNew"
    parts = of_linear_layers(tensors, b_dec="decoder.bias" if newer else "bias")
    tensors.finish()
    parts = of_plain(**parts) if newer else parts
    return autoencoder(ReLUSAE, tensors.path, asked.dtype, l1=0.0, **parts)


def _k(tensors: Tensors, trainer: Config) -> int:
    """Said twice, but for files that are older than the second."""
    told = trainer.get("k", int)
    if "k" in tensors and (found := int(tensors.take("k", dtypes=_INTEGERS))) != told:
        raise trainer.wrong("k", f"as in {tensors.path.name}, {found}")
    return told


def _threshold(tensors: Tensors) -> dict[str, torch.Tensor]:
    """Below 0 it was never followed, which is 0 here."""
    return {"threshold": tensors.take("threshold").clamp_min(0)} if "threshold" in tensors else {}


_CLASSES = {
    "AutoEncoderTopK": _topk, "BatchTopKSAE": _topk, "MatryoshkaBatchTopKSAE": _matryoshka,
    "JumpReluAutoEncoder": _jump_relu, "GatedAutoEncoder": _gated, "AutoEncoder": _relu,
    "AutoEncoderNew": _relu,
}  # fmt: skip

dictionary_learning = Format("config.json and ae.pt", _recognises, _load)
