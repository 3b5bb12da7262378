"""Autoencoders of tensors that others trained, and what is folded into those."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from fastsparse._validation import UNIT_NORM_TOLERANCE
from fastsparse.formats._tensors import Tensors
from fastsparse.nn import JumpReLUSAE, SparseAutoencoder

_ROWS = 4096  # of a matrix that are carried in fp64 at once


@torch.no_grad()
def autoencoder(
    kind: type[SparseAutoencoder],
    path: Path,
    dtype: torch.dtype | None,
    *,
    W_enc: Tensor,
    b_enc: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    state: Mapping[str, Tensor] | None = None,
    unit_norm: bool | None = None,
    **options,
) -> SparseAutoencoder:
    """A model of the kind, of ``W_enc (x - b_dec) + b_enc``.

    Args:
        kind: of model.
        path: of the file, for messages.
        dtype: of the parameters; None for that of the matrices, at least fp32 where something else is wider,
            as what was folded is.
        W_enc, W_dec: (M, D); b_enc: (M,); b_dec: (D,).
        state: other parameters and buffers of the model.
        unit_norm: whether training is to keep atoms at norm 1; None: if they have it.
        options: of the model.

    Raises:
        ValueError: the options don't fit.
    """
    M, D = W_dec.shape
    values = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec, **(state or {})}
    dtype = dtype or _dtype_of(values)
    if unit_norm is None:
        unit_norm = _have_unit_norm(W_dec.to(dtype))
    where = {"device": "cpu", "dtype": dtype, "generator": torch.Generator()}  # of atoms that are replaced
    try:
        model = kind(D, M, unit_norm=unit_norm, **options, **where)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error
    for name, value in values.items():
        getattr(model, name).copy_(value)
    return model


def with_thresholds(
    path: Path, dtype: torch.dtype | None, threshold: Tensor, *, rectified: bool = True, **parts: Tensor
) -> SparseAutoencoder:
    """A model of the scores above thresholds (M,), which stay as they are.

    Args:
        path, dtype, parts: as of :func:`autoencoder`.
        threshold: (M,).
        rectified: whether scores below 0 are never kept, whatever their threshold.
    """
    if rectified:
        threshold = threshold.clamp_min(0)
    state = {"raw_threshold": threshold}
    return autoencoder(JumpReLUSAE, path, dtype, state=state, learn_threshold=False, **parts)


def jump_relu(
    tensors: Tensors, dtype: torch.dtype | None, *, W_enc: str = "W_enc", W_dec: str = "W_dec"
) -> SparseAutoencoder:
    """A model of thresholds whose file holds nothing else, not centred: its ``W_enc`` is (D, M)."""
    parts = of_plain(
        W_enc=tensors.take(W_enc, "D", "M").T,
        b_enc=tensors.take("b_enc", "M"),
        W_dec=tensors.take(W_dec, "M", "D"),
        b_dec=tensors.take("b_dec", "D"),
    )
    threshold = tensors.take("threshold", "M")
    tensors.finish()
    return with_thresholds(tensors.path, dtype, threshold, **parts)


def of_linear_layers(
    tensors: Tensors, *, b_enc: str = "encoder.bias", b_dec: str = "b_dec"
) -> dict[str, Tensor]:
    """Parts that two linear layers hold, with biases by other names: the decoder's weight is (D, M)."""
    return {
        "W_enc": tensors.take("encoder.weight", "M", "D"),
        "b_enc": tensors.take(b_enc, "M"),
        "W_dec": tensors.take("decoder.weight", "D", "M").T,
        "b_dec": tensors.take(b_dec, "D"),
    }


def of_plain(**parts: Tensor) -> dict[str, Tensor]:
    """Parts that give of ``x - b_dec`` the scores that these give of ``x``: ``b_enc`` takes up the rest."""
    if parts["b_dec"].any():
        parts["b_enc"] = parts["b_enc"] + shift(parts["W_enc"], parts["b_dec"])
    return parts


def shift(W_enc: Tensor, b_dec: Tensor) -> Tensor:
    """``W_enc b_dec`` (M,) in fp64."""
    return torch.cat([rows.double() @ b_dec.double() for rows in W_enc.split(_ROWS)])


def with_unit_atoms(path: Path, **parts: Tensor) -> dict[str, Tensor]:
    """``W_enc``, ``b_enc`` and ``W_dec`` of the same function, atoms of norm 1, the norms in the scores.

    Raises:
        ValueError: an atom is zero.
    """
    norms = torch.linalg.vector_norm(parts["W_dec"], dim=1, dtype=torch.float64)
    if not norms.all():
        latent = int((norms == 0).nonzero()[0])
        raise ValueError(f"{path}: atoms whose norms scale their scores must not be zero, {latent} is")
    column = norms.unsqueeze(1)
    scaled = {"W_enc": parts["W_enc"] * column, "W_dec": parts["W_dec"] / column}
    wide = {name: torch.promote_types(parts[name].dtype, torch.float32) for name in scaled}
    return {
        "b_enc": parts["b_enc"] * norms,
        **{name: matrix.to(wide[name]) for name, matrix in scaled.items()},
    }


def _dtype_of(values: Mapping[str, Tensor]) -> torch.dtype:
    """That of the matrices, unless another value is wider; thresholds have a dtype of their own."""
    found = torch.promote_types(values["W_enc"].dtype, values["W_dec"].dtype)
    others = (value.dtype for name, value in values.items() if "threshold" not in name)
    if any(torch.promote_types(found, dtype) != found for dtype in others):
        return torch.promote_types(found, torch.float32)
    return found


def _have_unit_norm(atoms: Tensor) -> bool:
    wide = torch.promote_types(atoms.dtype, torch.float32)
    norms = torch.linalg.vector_norm(atoms, dim=1, dtype=wide)
    return bool(((norms - 1).abs() <= UNIT_NORM_TOLERANCE[atoms.dtype]).all())
