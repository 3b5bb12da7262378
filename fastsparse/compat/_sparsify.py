"""What sparsify and clt-training share: the name by which they are imported, and how they compute."""

import inspect
from importlib import import_module

import torch
from torch import Tensor

from fastsparse.compat._library import Library, RefusedError
from fastsparse.compat._refusals import refuse_unless_alike
from fastsparse.functional import sparse_decode, spmm, spmm_t
from fastsparse.functional._tensors import autocast

_LIBRARIES = {False: ("eai-sparsify", "sparsify"), True: ("clt-training", "clt_training")}


class OneOfTwo(Library):
    """One of the two that are imported as sparsify: clt-training's encoder may be asked for fp8."""

    def __init__(self, *args, is_clt_training: bool, **options) -> None:
        super().__init__(*args, **options)
        self.is_clt_training = is_clt_training

    def is_imported(self) -> bool:
        return super().is_imported() and _is_clt_training() is self.is_clt_training

    def _check_version(self, force: bool) -> None:
        found = _is_clt_training()
        if found is not None and found is not self.is_clt_training:
            (right, _), (other, adapter) = _LIBRARIES[self.is_clt_training], _LIBRARIES[found]
            raise RuntimeError(
                f"sparsify: what is imported as sparsify must be {right}, got {other}, which "
                f"fastsparse.compat.{adapter} serves"
            )
        super()._check_version(force)


def _is_clt_training() -> bool | None:
    """Which of them it is; None where it is neither."""
    try:
        encoder = import_module("sparsify.fused_encoder").fused_encoder
    except (ImportError, AttributeError):
        return None
    return "use_fp8" in inspect.signature(encoder).parameters


def as_multiplied(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """What a product takes by autocast, apart from the graph."""
    return autocast(*(tensor if tensor is None else tensor.detach() for tensor in tensors))


def chosen_gradients(
    needs: tuple[bool, ...], grad: Tensor, indices: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Of x, weight and bias, by that of chosen pre-activations (N, k): in the precision of the weight."""
    needs_x, needs_weight, needs_bias = needs
    grad, M = grad.type_as(weight), weight.shape[0]
    d_x = spmm(grad, indices, weight) if needs_x else None
    d_weight = spmm_t(grad, indices, x.type_as(weight), M) if needs_weight else None
    d_bias = None
    if needs_bias:
        d_bias = spmm_t(grad, indices, grad.new_ones(len(x), 1), M)[:, 0].type_as(bias)
    return d_x, d_weight, d_bias


def check_activation(activation: str, known: tuple[str, ...], k: int, num_latents: int) -> None:
    """Refuse what has no k largest, of all latents or one of each group."""
    if activation not in known:
        raise RefusedError("activation is unknown")
    if k < 1:
        raise RefusedError("k < 1")
    if activation == "groupmax" and num_latents % k:
        raise RefusedError("groups of different sizes")


def decode(indices: Tensor, acts: Tensor, atoms: Tensor) -> Tensor:
    """(N, D): codes (N, k) by atoms (M, D)."""
    if indices.dim() != 2 or indices.shape != acts.shape:
        raise RefusedError("acts and indices are not (N, k)")
    with torch.autocast(acts.device.type, enabled=False):  # which leaves an embedding bag alone
        refuse_unless_alike(acts, atoms)
        return sparse_decode(acts, indices, atoms)
