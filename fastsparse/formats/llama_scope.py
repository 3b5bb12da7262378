"""Llama Scope: ``hyperparams.json`` and ``checkpoints/final.safetensors``, ``decoder.weight`` (D, M).

Its scores are of activations that are scaled to a norm of sqrt(D) on average over the data set, and are
compared, times the norms of the atoms, with one threshold for all, in the unit of the activations.

Source: He et al. 2024, "Llama Scope", arXiv 2410.20526, section 2; the functions that its library applies to
a file that it loads, github.com/OpenMOSS/Language-Model-SAEs of November 2024.
"""

import math
from pathlib import Path

import torch

from fastsparse.formats._autoencoder import autoencoder, of_plain, with_thresholds, with_unit_atoms
from fastsparse.formats._config import NO_TRANSCODER, Config
from fastsparse.formats._format import Format
from fastsparse.formats._place import Asked, Place
from fastsparse.formats._tensors import from_safetensors
from fastsparse.nn import ReLUSAE, SparseAutoencoder, TopKSAE

_WEIGHTS = ("sae_weights.safetensors", "checkpoints/final.safetensors", "final.safetensors")


def _config(place: Place) -> Path:
    home = place.folder.parent if place.folder.name == "checkpoints" else place.folder
    return home / "hyperparams.json"


def _recognises(place: Place) -> bool:
    return place.holds(*_WEIGHTS) and _config(place).is_file()


def _load(place: Place, asked: Asked) -> SparseAutoencoder:
    config, tensors = Config(_config(place)), from_safetensors(place.one(*_WEIGHTS))
    D = config.get("d_model", int)
    tensors.expect(D=D, M=config.get("d_sae", int, 0) or D * config.get("expansion_factor", int))
    scale = _check(config, D, asked)
    biased = config.get("use_decoder_bias", bool, True)
    parts = {
        "W_enc": tensors.take("encoder.weight", "M", "D"),
        "b_enc": tensors.take("encoder.bias", "M"),
        "W_dec": tensors.take("decoder.weight", "D", "M").T,
    }
    parts["b_dec"] = tensors.take("decoder.bias", "D") if biased else parts["b_enc"].new_zeros(D)
    tensors.finish()
    if scale != 1:  # of x: the same of both biases, and the unit of values is the activations'
        parts |= {name: parts[name].double() / scale for name in ("b_enc", "b_dec")}
    if not config.get("apply_decoder_bias_to_pre_encoder", bool, True):
        parts = of_plain(**parts)
    if config.get("sparsity_include_decoder_norm", bool, True):
        parts |= with_unit_atoms(tensors.path, **parts)
    activation, threshold = _activation(config)
    if activation == "relu":
        return autoencoder(ReLUSAE, config.path, asked.dtype, l1=0.0, **parts)
    if activation == "topk":
        return autoencoder(TopKSAE, config.path, asked.dtype, k=config.get("top_k", int), **parts)
    thresholds = torch.full_like(parts["b_enc"], threshold, dtype=torch.float64)
    return with_thresholds(config.path, asked.dtype, thresholds, rectified=False, **parts)


def _activation(config: Config) -> tuple[str, float]:
    """A TopK that has a threshold is used by that."""
    found = config.only("act_fn", "jumprelu", "topk", "relu")
    threshold = config.get("jump_relu_threshold", float, 0.0)
    return ("jumprelu" if found == "topk" and threshold > 0 else found), threshold


def _check(config: Config, D: int, asked: Asked) -> float:
    """What can't be said here, and what activations are multiplied by."""
    config.only("use_glu_encoder", False, default=False, why="scores are gated by no second product here")
    inside = config.get("hook_point_in", str, "")
    config.only("hook_point_out", inside, default=inside, why=NO_TRANSCODER)
    modes = ("dataset-wise", "inference") + asked.normalized * ("token-wise", "batch-wise")
    why = "only one scale of all tokens can be folded; normalized=True is for activations that you scale"
    if config.only("norm_activation", *modes, why=why) != "dataset-wise":
        return 1.0
    norms = config.part("dataset_average_activation_norm")
    norm = norms.get("in", float)
    if not (math.isfinite(norm) and norm > 0):
        raise norms.wrong("in", "finite and above 0")
    norms.only("out", norm, default=norm, why="one factor scales input and output of an autoencoder")
    return math.sqrt(D) / norm


llama_scope = Format("hyperparams.json and checkpoints/final.safetensors", _recognises, _load)
