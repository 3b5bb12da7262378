"""SAELens: ``cfg.json`` and ``sae_weights.safetensors``, whose ``W_enc`` is (D, M)."""

from pathlib import Path
from typing import Any

from torch import Tensor

from fastsparse.formats._autoencoder import autoencoder, of_plain, shift, with_thresholds, with_unit_atoms
from fastsparse.formats._config import Config
from fastsparse.formats._format import Format, write
from fastsparse.formats._place import Asked, Place
from fastsparse.formats._tensors import Tensors, from_safetensors
from fastsparse.nn import BatchTopKSAE, GatedSAE, JumpReLUSAE, ReLUSAE, SparseAutoencoder, TopKSAE

_WEIGHTS, _CONFIG = "sae_weights.safetensors", "cfg.json"
_BATCHES = ("batchtopk", "matryoshka_batchtopk")  # of training: what is published of these is a jumprelu
_TOPK = ("topk", "abstopk", *_BATCHES)
_ARCHITECTURES = ("standard", "jumprelu", "gated", *_TOPK)
_VERSION = "6.0.0"  # before which configurations were others


def _recognises(place: Place) -> bool:
    return place.holds(_WEIGHTS) and (place.folder / _CONFIG).is_file()


def _load(place: Place, asked: Asked) -> SparseAutoencoder:
    config, tensors = Config(place.folder / _CONFIG), from_safetensors(place.one(_WEIGHTS))
    tensors.expect(D=config.get("d_in", int), M=config.get("d_sae", int))
    architecture = _architecture(config)
    _check(config, tensors, asked)
    parts = {"W_enc": tensors.take("W_enc", "D", "M").T, "W_dec": tensors.take("W_dec", "M", "D")}
    parts["b_dec"] = tensors.take("b_dec", "D")
    centered = config.get("apply_b_dec_to_input", bool, True)
    if architecture == "gated":
        return _gated(config, tensors, asked, parts, centered)
    parts["b_enc"] = tensors.take("b_enc", "M")
    parts = parts if centered else of_plain(**parts)
    if architecture == "jumprelu":
        old = "log_threshold" in tensors
        threshold = tensors.take("log_threshold", "M").exp() if old else tensors.take("threshold", "M")
        tensors.finish()
        return with_thresholds(config.path, asked.dtype, threshold, **parts)
    if architecture == "standard":
        tensors.finish()
        return autoencoder(ReLUSAE, config.path, asked.dtype, l1=0.0, **parts)
    if config.get("rescale_acts_by_decoder_norm", bool, False):
        parts |= with_unit_atoms(tensors.path, **parts)
    if architecture in _BATCHES:
        state = {"threshold": tensors.take("topk_threshold")}
        tensors.finish()
        options = {"k": config.get("k", float), "prefixes": _widths(config)}
        return autoencoder(BatchTopKSAE, config.path, asked.dtype, state=state, **options, **parts)
    tensors.finish()
    options = {"k": _k(config), "activation": "abs" if architecture == "abstopk" else "relu"}
    return autoencoder(TopKSAE, config.path, asked.dtype, **options, **parts)


def _architecture(config: Config) -> str:
    """Before version 6 a TopK autoencoder was a standard one with another activation."""
    found = config.only("architecture", *_ARCHITECTURES, default="standard")
    name = "activation_fn" if "activation_fn" in config else "activation_fn_str"
    if found in ("standard", "topk") and config.only(name, "relu", "topk", default="relu") == "topk":
        return "topk"
    config.only(name, "relu", default="relu")
    return found


def _k(config: Config) -> int:
    return config.get("k", int) if "k" in config else config.part("activation_fn_kwargs").get("k", int)


def _widths(config: Config) -> list[int]:
    """Of the levels but the last, which is all latents."""
    widths = config.get("matryoshka_widths", list, [])
    return [width for width in widths if width != config.get("d_sae", int)]


def _check(config: Config, tensors: Tensors, asked: Asked) -> None:
    """What would change the function, and isn't there to be read or can't be said here."""
    if not asked.normalized:
        config.only(
            "normalize_activations", "none", False, default="none",
            why="the autoencoder is of activations that are normalised; normalized=True takes it as it is, "
            "for activations that you normalise",
        )  # fmt: skip
    config.only("reshape_activations", "none", "hook_z", default="none")
    config.only("finetuning_scaling_factor", False, default=False)
    if "scaling_factor" in tensors and (tensors.take("scaling_factor", "M") != 1).any():
        raise ValueError(f"{tensors.path}: scaling_factor must be 1 of every latent, or absent, got others")


def _gated(
    config: Config, tensors: Tensors, asked: Asked, parts: dict[str, Tensor], centered: bool
) -> SparseAutoencoder:
    """Its magnitudes have a bias too, which sees scores as ``r_mag`` scales them."""
    b_enc, r_mag, b_mag = (tensors.take(name, "M") for name in ("b_gate", "r_mag", "b_mag"))
    tensors.finish()
    if not centered and parts["b_dec"].any():
        moved = shift(parts["W_enc"], parts["b_dec"])
        b_enc, b_mag = b_enc + moved, b_mag + r_mag.double().exp() * moved
    state = {"r_mag": r_mag, "b_mag": b_mag}
    return autoencoder(GatedSAE, config.path, asked.dtype, state=state, l1=0.0, b_enc=b_enc, **parts)


def _save(model: SparseAutoencoder, folder: Path) -> None:
    if isinstance(model, BatchTopKSAE):  # as its own are published
        model = model.export_threshold()
    told, more = _described(model)
    tensors = {"W_enc": model.W_enc.T, "W_dec": model.W_dec, "b_dec": model.b_dec, **more}
    told |= {
        "d_in": model.d_model, "d_sae": model.num_latents, "dtype": str(model.W_dec.dtype)[6:],
        "device": "cpu", "apply_b_dec_to_input": True, "normalize_activations": "none",
        "reshape_activations": "none", "metadata": {"sae_lens_version": _VERSION},
    }  # fmt: skip
    write(folder, _WEIGHTS, tensors, _CONFIG, told)


def _described(model: SparseAutoencoder) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The options and the tensors of one architecture."""
    if isinstance(model, GatedSAE):
        more = {"b_gate": model.b_enc, "r_mag": model.r_mag, "b_mag": model.b_mag}
        return {"architecture": "gated"}, more
    if isinstance(model, ReLUSAE):
        return {"architecture": "standard"}, {"b_enc": model.b_enc}
    if isinstance(model, JumpReLUSAE):
        if (model.threshold < 0).any():
            raise ValueError("save: thresholds must be at least 0 in saelens, which keeps no score below 0")
        return {"architecture": "jumprelu"}, {"b_enc": model.b_enc, "threshold": model.threshold}
    if isinstance(model, TopKSAE):
        if model.groups > 1:
            raise ValueError(f"save: groups must be 1 in saelens, got {model.groups}")
        architecture = "abstopk" if model.activation == "abs" else "topk"
        told = {"architecture": architecture, "k": model.k, "rescale_acts_by_decoder_norm": False}
        return told, {"b_enc": model.b_enc}
    raise ValueError(f"save: saelens has no place for a {type(model).__name__}")


saelens = Format("cfg.json and sae_weights.safetensors", _recognises, _load, _save)
