"""Our ops under llamascopium (Language-Model-SAEs): its autoencoder, and the product of its Triton kernel.

Norms of atoms, by which pre-activations are scaled when latents are chosen, cancel afterwards: they are used
for that alone, and their gradients, which are 0 but for rounding, aren't computed. ``hidden_pre`` is computed
when it is read. ``W_E`` is (D, M) there, so that its gradient lies across ours.
"""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from fastsparse._validation import DTYPES
from fastsparse.codes import code_of, codes_to_dense, decode_tagged, preactivations, why_untagged
from fastsparse.compat._coo import ragged
from fastsparse.compat._library import Library, RefusedError, Site
from fastsparse.compat._refusals import (
    refuse_hooks,
    refuse_unless_alike,
    refuse_unless_plain,
    refuse_unless_sparse,
)
from fastsparse.functional import (
    Ragged,
    batch_topk_encode,
    jump,
    sparse_decode,
    threshold_encode,
    topk_encode,
)
from fastsparse.functional._tensors import flat
from fastsparse.nn._elementwise import _at

_SAE = "llamascopium.models.sae"
_KERNELS = "llamascopium.kernels.entrypoints"
# What `act_fn` becomes: functions within one of the library's, by their names.
_RELU, _TOP_K, _BATCH = "<lambda>", "topk_activation", "batch_topk"
_FACTORY = "SparseDictionary.activation_function_factory.<locals>."


# The autoencoder.


def _encode(original: Callable, self: Any, x: Tensor, return_hidden_pre: bool = False, **kwargs):
    kind = _check_encoder(self, x)
    x, weight, bias = x.to(self.W_E.dtype), self.W_E.T, self.b_E
    norms = _norms(self) if self.cfg.sparsity_include_decoder_norm else None
    if kind == _TOP_K:
        code = topk_encode(x, weight, bias, k=self.current_k, latent_scale=norms)
    elif kind == _BATCH:
        total = self.current_k * flat(x).shape[0]
        code = batch_topk_encode(x, weight, bias, total=total, latent_scale=norms).code
    else:
        code = _above(flat(x), weight, bias, norms, None if kind == _RELU else self.activation_function)
    code = code._replace(values=code.values.to(x.dtype))
    acts = self.hook_feature_acts(codes_to_dense(code, len(weight), leading=x.shape[:-1]))
    if not return_hidden_pre:
        return acts
    with torch.autocast(x.device.type, enabled=False):
        return acts, preactivations(x, weight, bias)


def _norms(self: Any) -> Tensor:
    norms = self.decoder_norm().detach()
    if not bool((norms > 0).all()):  # what the library makes of such an atom is NaN
        raise RefusedError("an atom of norm 0")
    return norms


def _above(x: Tensor, weight: Tensor, bias: Tensor, norms: Tensor | None, jumps: Any) -> Ragged:
    """The positive activations of tokens (N, D), those by JumpReLU with gradients for its thresholds."""
    if jumps is None:
        bounds = torch.zeros(len(weight), dtype=x.dtype, device=x.device)
        refuse_unless_sparse(x, weight, bias, bounds)
        return threshold_encode(x, weight, bias, threshold=bounds)
    threshold, window = jumps.get_jumprelu_threshold(), jumps.jumprelu_threshold_window
    in_band = threshold.requires_grad and torch.is_grad_enabled()
    if not window > 0:
        if in_band:
            raise RefusedError("a window that isn't above 0")
        window = 1.0
    # From where on an activation or a gradient is; some less, for what is rounded before it is compared.
    bounds = (threshold.detach() - (window / 2 if in_band else 0)).clamp(min=0)
    bounds = bounds * (1 - 4 * torch.finfo(x.dtype).eps)
    bounds = bounds if norms is None else bounds / norms
    refuse_unless_sparse(x, weight, bias, bounds)
    code = threshold_encode(x, weight, bias, threshold=bounds)
    values, scale = code.values.to(x.dtype), None if norms is None else norms[code.indices]
    values = values if scale is None else values * scale
    values, _ = jump(values, _at(threshold, code), window)
    return code._replace(values=values if scale is None else values / scale)


def _decode(original: Callable, self: Any, feature_acts: Tensor, **kwargs):
    why = why_untagged(feature_acts) if isinstance(feature_acts, Tensor) else "not made of a code"
    if why is not None:
        raise RefusedError(f"activations: {why}")
    if self.cfg.use_triton_kernel:
        raise RefusedError("its Triton kernel is asked for")
    _check_parameters(self, feature_acts, self.W_D)
    LIBRARY.refuse_unless_worth(feature_acts, self.W_D.shape[1])
    refuse_unless_alike(feature_acts, self.W_D)
    decoded = decode_tagged(feature_acts, code_of(feature_acts), self.W_D)
    decoded = decoded + self.b_D if self.cfg.use_decoder_bias else decoded
    return self.hook_reconstructed(decoded)


def _decode_coo(original: Callable, self: Any, feature_acts: Tensor):
    """In fp32, whatever the dtypes are, as there."""
    _check_parameters(self, feature_acts, self.W_D)
    if feature_acts.layout is not torch.sparse_coo or not feature_acts.is_coalesced():
        raise RefusedError("activations that aren't sparse, or not coalesced")
    if feature_acts.sparse_dim() != 2 or feature_acts.shape[1] != self.W_D.shape[0]:
        raise RefusedError("the shape of the activations")
    if torch.is_autocast_enabled(feature_acts.device.type):
        raise RefusedError("autocast")
    LIBRARY.refuse_unless_worth(feature_acts, self.W_D.shape[1])
    values, indices, offsets = ragged(feature_acts)
    decoded = sparse_decode(values.float(), indices, self.W_D.float(), None, offsets)
    decoded = decoded + self.b_D if self.cfg.use_decoder_bias else decoded
    return decoded.to(self.cfg.dtype)


# The product by a kernel.


def _spmm(original: Callable, feature_acts: Tensor, decoder_weight: Tensor):
    """``feature_acts @ decoder_weight``, the gradient of the activations at those alone that aren't 0."""
    refuse_unless_plain(feature_acts, decoder_weight)
    if feature_acts.layout is not torch.strided or feature_acts.dim() != 2:
        raise RefusedError("activations that aren't a dense matrix")
    if decoder_weight.dim() != 2 or len(decoder_weight) != feature_acts.shape[1]:
        raise RefusedError("the decoder is not (M, D)")
    if torch.is_autocast_enabled(feature_acts.device.type):
        raise RefusedError("autocast")
    LIBRARY.refuse_unless_worth(feature_acts, decoder_weight.shape[1])
    refuse_unless_alike(feature_acts, decoder_weight)
    values, indices, offsets = ragged(feature_acts.to_sparse())
    return sparse_decode(values, indices, decoder_weight, None, offsets)


# What is refused.


def _check_encoder(self: Any, x: Any) -> str:
    """Refuse what our ops don't take; what kind of activation it is."""
    from transformer_lens.hook_points import HookPoint

    _check_parameters(self, x, self.W_E, self.b_E, self.W_D)
    if self.cfg.use_glu_encoder:
        raise RefusedError("a gated encoder")
    refuse_hooks([self.hook_hidden_pre])
    if type(self.hook_hidden_pre) is not HookPoint:
        raise RefusedError("hook points that aren't known")
    kind = _kind(self)
    D, M = self.W_E.shape
    if not 2 <= x.dim() <= (3 if kind == _BATCH else x.dim()) or x.shape[-1] != D:
        raise RefusedError("the shape of the input")
    k = self.current_k if kind in (_TOP_K, _BATCH) else None
    if k is not None and (type(k) is not int or k < 1):
        raise RefusedError("k below 1, or no whole number")
    LIBRARY.refuse_unless_worth(x, M, k)
    dtype = self.W_E.dtype
    if dtype not in DTYPES or not dtype == self.b_E.dtype == self.W_D.dtype:
        raise RefusedError("parameters of several dtypes, or of one that our ops don't take")
    if torch.is_autocast_enabled(x.device.type) and dtype not in (torch.float32, torch.float64):
        raise RefusedError("autocast of parameters of half precision")
    return kind


def _kind(self: Any) -> str:
    """Of the activation function, which is the autoencoder's own, as it was made."""
    from llamascopium.activation_functions import JumpReLU

    function = self.activation_function
    if type(function) is JumpReLU:
        refuse_hooks([function])
        if function.log_jumprelu_threshold.shape != self.b_E.shape or function.dtype != self.b_E.dtype:
            raise RefusedError("thresholds that aren't one a latent, of its dtype")
        refuse_unless_plain(function.log_jumprelu_threshold)
        return "JumpReLU"
    kind = getattr(function, "__qualname__", "").removeprefix(_FACTORY)
    if getattr(function, "__module__", None) != "llamascopium.models.sparse_dictionary" or kind not in (
        _RELU, _TOP_K, _BATCH,
    ):  # fmt: skip
        raise RefusedError("an activation function that isn't known")
    held = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    if kind != _RELU and held["self"].cell_contents is not self:  # as of a copy
        raise RefusedError("the activation function of another autoencoder")
    return kind


def _check_parameters(self: Any, x: Any, *parameters: Tensor) -> None:
    if self.device_mesh is not None:
        raise RefusedError("DTensor")
    refuse_unless_plain(x, *parameters)
    if any(parameter.device != x.device for parameter in parameters):
        raise RefusedError("devices differ")


_SITES = [
    Site(_SAE, "SparseAutoEncoder.encode", "00e2f2220b11d2aa", _encode),
    Site(_SAE, "SparseAutoEncoder.decode", "bbb31131e7ea8157", _decode),
    Site(_SAE, "SparseAutoEncoder.decode_coo", "a38df4354a1f4574", _decode_coo),
]
if find_spec("triton") is not None:  # which its kernels are imported with
    _SITES.append(Site(_KERNELS, "decode_with_triton_spmm_kernel", "f829866775307cad", _spmm))

LIBRARY = Library("llamascopium", "llamascopium", ("2.0", "2.1"), _SITES)
apply, undo, status, convert = LIBRARY.apply, LIBRARY.undo, LIBRARY.status, LIBRARY.convert
