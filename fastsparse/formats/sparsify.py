"""EleutherAI's sparsify: ``cfg.json`` and ``sae.safetensors``, both matrices (M, D)."""

from pathlib import Path

from fastsparse.formats._autoencoder import autoencoder
from fastsparse.formats._config import NO_SKIP, NO_TRANSCODER, Config
from fastsparse.formats._format import Format, write
from fastsparse.formats._place import Asked, Place
from fastsparse.formats._tensors import from_safetensors
from fastsparse.nn import SparseAutoencoder, TopKSAE

_WEIGHTS, _CONFIG = "sae.safetensors", "cfg.json"
_MULTI = 4  # times as many latents as k, which Multi-TopK reconstructs by too,
_MULTI_WEIGHT = 1 / 8  # and that part's weight


def _recognises(place: Place) -> bool:
    return place.holds(_WEIGHTS) and (place.folder / _CONFIG).is_file()


def _load(place: Place, asked: Asked) -> SparseAutoencoder:
    config, tensors = Config(place.folder / _CONFIG), from_safetensors(place.one(_WEIGHTS))
    for name, why in (
        ("transcode", NO_TRANSCODER),
        ("skip_connection", NO_SKIP),
        ("signed", "values below 0 are not kept here beside ones above"),
    ):
        config.only(name, False, default=False, why=why)
    D, k = config.get("d_in", int), config.get("k", int)
    tensors.expect(D=D, M=config.get("num_latents", int, 0) or D * config.get("expansion_factor", int))
    options = {"k": k, "unit_norm": config.get("normalize_decoder", bool, True)}
    if config.only("activation", "topk", "groupmax", default="topk") == "groupmax":
        config.only("multi_topk", False, default=False, why="groups have no budgets here")
        options |= {"k": 1, "groups": k}
    elif config.get("multi_topk", bool, False):
        options |= {"budgets": (k, _MULTI * k), "budget_weights": (1.0, _MULTI_WEIGHT)}
    parts = {
        "W_enc": tensors.take("encoder.weight", "M", "D"),
        "b_enc": tensors.take("encoder.bias", "M"),
        "W_dec": tensors.take("W_dec", "M", "D"),
        "b_dec": tensors.take("b_dec", "D"),
    }
    tensors.finish()
    return autoencoder(TopKSAE, config.path, asked.dtype, **options, **parts)


def _save(model: SparseAutoencoder, folder: Path) -> None:
    if not isinstance(model, TopKSAE):
        raise ValueError(f"save: sparsify has no place for a {type(model).__name__}, only for a TopKSAE")
    if model.activation != "relu":
        raise ValueError(f"save: activation must be 'relu' in sparsify, got {model.activation!r}")
    if model.groups > 1 and model.k > 1:
        raise ValueError(f"save: k must be 1 of each of several groups in sparsify, got {model.k}")
    k, M, D = model.k * model.groups, model.num_latents, model.d_model
    told = {
        "activation": "topk" if model.groups == 1 else "groupmax", "expansion_factor": max(1, M // D),
        "normalize_decoder": model.unit_norm, "num_latents": M, "k": k,
        "multi_topk": model.budgets == (k, _MULTI * k), "skip_connection": False, "transcode": False,
        "d_in": D,
    }  # fmt: skip
    tensors = {"encoder.weight": model.W_enc, "encoder.bias": model.b_enc}
    tensors |= {"W_dec": model.W_dec, "b_dec": model.b_dec}
    write(folder, _WEIGHTS, tensors, _CONFIG, told)


sparsify = Format("cfg.json and sae.safetensors", _recognises, _load, _save)
