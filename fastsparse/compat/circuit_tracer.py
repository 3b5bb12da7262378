"""Our ops under circuit-tracer: the transcoders that it traces by, of one layer each and cross-layer.

Their weights are (M, D), as ours are. What is encoded sparsely never is dense: of the activations by ReLU,
JumpReLU and TopK the entries alone are made. Gradients are the library's; where its ReLU is followed by a
change in place, so that it raises when it is differentiated, they are those of the function.
"""

from collections.abc import Callable
from importlib import import_module
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastsparse._validation import DTYPES
from fastsparse.codes import codes_to_dense, decode_from_dense, why_untagged
from fastsparse.compat._coo import offsets_of, ragged
from fastsparse.compat._library import Library, RefusedError, Site
from fastsparse.compat._refusals import (
    refuse_hooks,
    refuse_unless_alike,
    refuse_unless_plain,
    refuse_unless_sparse,
)
from fastsparse.functional import Ragged, jump, sparse_decode, spmm, threshold_encode, topk_encode
from fastsparse.functional._tensors import flat
from fastsparse.nn._elementwise import _at

_COALESCED = {"is_coalesced": True, "check_invariants": False}

_FUNCTIONS = "circuit_tracer.transcoder.activation_functions"
_SINGLE = "circuit_tracer.transcoder.single_layer_transcoder"
_CROSS = "circuit_tracer.transcoder.cross_layer_transcoder"
_CLASSES = ((_SINGLE, "SingleLayerTranscoder"), (_CROSS, "CrossLayerTranscoder"))


# Transcoders of one layer.


def _encode(original: Callable, self: Any, input_acts: Tensor, apply_activation_function: bool = True):
    if not apply_activation_function:
        raise RefusedError("pre-activations are asked for")
    weight = _check(self, input_acts)
    x = input_acts.to(weight.dtype)
    code = _code(flat(x), weight, self.b_enc, self.activation_function, _threshold(self), dense=True)
    return codes_to_dense(code, len(weight), leading=x.shape[:-1])


def _encode_sparse(original: Callable, self: Any, input_acts: Tensor, zero_positions: slice = slice(0, 1)):
    weight = _check(self, input_acts, dims=2)
    x = input_acts.to(weight.dtype)
    kept = _kept(x, zero_positions)
    code = _code(x[kept], weight, self.b_enc, self.activation_function, _threshold(self))
    rows, indices, values = _nonzero(code)
    places = torch.stack((kept[rows], indices))
    acts = torch.sparse_coo_tensor(places, values, (len(x), len(weight)), **_COALESCED)
    return acts, weight[indices]


def _decode(original: Callable, self: Any, acts: Tensor, input_acts: Tensor | None = None):
    why = why_untagged(acts) if isinstance(acts, Tensor) else "not made of a code"
    if why is not None:
        raise RefusedError(f"activations: {why}")
    _check_decoding(self, acts, input_acts)
    weight = self.W_dec
    refuse_unless_alike(acts, weight)
    decoded = decode_from_dense(acts, weight) + self.b_dec
    return decoded if self.W_skip is None else decoded + self.compute_skip(input_acts)


def _decode_sparse(original: Callable, self: Any, sparse_acts: Tensor, input_acts: Tensor | None = None):
    _check_coo(sparse_acts, dims=2)
    _check_decoding(self, sparse_acts, input_acts)
    values, indices, offsets = ragged(sparse_acts)
    atoms = self._get_decoder_vectors(indices.cpu())
    if self.lazy_decoder:  # all that has been read of it
        weight, places = atoms, torch.arange(len(indices), device=indices.device)
    else:
        weight, places = self.W_dec.to(self.dtype), indices
    decoded = sparse_decode(values, places, weight, None, offsets)
    if self.W_skip is not None:
        decoded = decoded + self.compute_skip(input_acts)
    return decoded + self.b_dec, atoms * values[:, None]


# Cross-layer transcoders.


def _encode_layer(
    original: Callable, self: Any, x: Tensor, layer_id: int, apply_activation_function: bool = True
):
    if not apply_activation_function:
        raise RefusedError("pre-activations are asked for")
    weight = _check(self, x, layer=layer_id)
    bias, function = self.b_enc[layer_id], self.activation_function
    # Without a gradient of the threshold: it has none there.
    code = _code(flat(x), weight, bias, function, _threshold(self, layer_id))
    return codes_to_dense(code, len(weight), leading=x.shape[:-1])


def _encode_layers_sparse(original: Callable, self: Any, x: Tensor, zero_positions: slice = slice(0, 1)):
    if not isinstance(x, Tensor) or x.dim() != 3 or len(x) != self.n_layers:
        raise RefusedError("the shape of the input")
    places, values, encoders = [], [], []
    kept = _kept(x[0], zero_positions)
    for layer, tokens in enumerate(x):
        weight = _check(self, tokens, dims=2, layer=layer)
        threshold = _threshold(self, layer)
        code = _code(tokens[kept], weight, self.b_enc[layer], self.activation_function, threshold)
        rows, indices, found = _nonzero(code)
        places.append(torch.stack((torch.full_like(rows, layer), kept[rows], indices)))
        values.append(found)
        encoders.append(weight[indices])
    size = *x.shape[:2], self.d_transcoder
    acts = torch.sparse_coo_tensor(torch.cat(places, dim=1), torch.cat(values), size, **_COALESCED)
    return acts, torch.cat(encoders)


def _decode_layers(original: Callable, self: Any, features: Tensor, input_acts: Tensor | None = None):
    """One product for the latents of a layer and all that they write to: their atoms, side by side."""
    if isinstance(features, Tensor) and not features.is_sparse:
        features = features.to_sparse()  # as there
    _check_coo(features, dims=3)
    _check_decoding(self, features, input_acts)
    layers, rows, indices = features.indices()
    if len(features) != self.n_layers or not len(rows):
        raise RefusedError("no active latents, or another number of layers")
    N, D = int(rows.max()) + 1, self.d_model  # as there: up to the last position with an active latent
    written: list[list[Tensor]] = [[] for _ in range(self.n_layers)]
    bounds = offsets_of(layers, self.n_layers).tolist()
    for layer, (first, last) in enumerate(pairwise(bounds)):
        if first == last:
            continue
        its, values = indices[first:last], features.values()[first:last]
        if self.lazy_decoder:
            its, places = its.unique(return_inverse=True)
            weight = self._get_decoder_vectors(layer, its.cpu())
        else:
            weight, places = self.W_dec[layer].to(self.dtype), its
        decoded = sparse_decode(values, places, weight.flatten(1), None, offsets_of(rows[first:last], N))
        for target, part in enumerate(decoded.unflatten(1, (-1, D)).unbind(1), start=layer):
            written[target].append(part)
    nothing = features.values().new_zeros(N, D)
    decoded = torch.stack([sum(parts[1:], parts[0]) if parts else nothing for parts in written])
    return _finished(self, decoded, input_acts)


def _reconstruct(
    original: Callable, self: Any, pos_ids: Tensor, layer_ids: Tensor, decoder_vectors: Tensor,
    input_acts: Tensor | None = None,
):  # fmt: skip
    """The sums of vectors of one place, added up in a fixed order."""
    _check_decoding(self, decoder_vectors, input_acts)
    if not len(pos_ids) or decoder_vectors.dim() != 2:
        raise RefusedError("no active latents")
    N = int(pos_ids.max()) + 1
    ordered, order = (layer_ids * N + pos_ids).sort(stable=True)
    ones = decoder_vectors.new_ones(len(order))
    sums = spmm(ones, order, decoder_vectors, offsets_of(ordered, N * self.n_layers))
    return _finished(self, sums.unflatten(0, (self.n_layers, N)), input_acts)


def _finished(self: Any, decoded: Tensor, input_acts: Tensor | None) -> Tensor:
    decoded = decoded + self.b_dec[:, None]
    return decoded if self.W_skip is None else decoded + input_acts @ self.W_skip


# What both are made of.


def _code(
    x: Tensor, weight: Tensor, bias: Tensor, function: Any, threshold: Tensor | None, dense: bool = False
) -> Ragged:
    """The activations of tokens (N, D), of the dtype that they have, which is the weight's.

    Where they are to be made dense, those that are 0 may get gradients that reach the thresholds: then what
    lies in the band about these is part of the code.
    """
    M = len(weight)
    refuse_unless_alike(x, weight, bias, threshold)
    if _is_topk(function):
        return Ragged.from_topk(topk_encode(x, weight, bias, k=function.k, activation="none"))
    if threshold is None:
        bounds = torch.zeros(M, dtype=x.dtype, device=x.device)
    else:
        in_band = dense and threshold.requires_grad and torch.is_grad_enabled()
        bounds = threshold.detach() - (function.bandwidth / 2 if in_band else 0)
    refuse_unless_sparse(x, weight, bias, bounds)
    code = threshold_encode(x, weight, bias, threshold=bounds)
    values = code.values.to(x.dtype)  # rounded before they are compared, as there
    if threshold is not None:
        values, _ = jump(values, _at(threshold, code), function.bandwidth)
    return code._replace(values=values)


def _nonzero(code: Ragged) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, latents and values of the entries that aren't 0: what ``to_sparse`` finds."""
    found = (code.values.detach() != 0).nonzero()[:, 0]
    return code.rows()[found], code.indices[found], code.values[found]


def _kept(x: Tensor, zero_positions: Any) -> Tensor:
    """Which rows aren't made 0."""
    if type(zero_positions) is not slice:
        raise RefusedError("positions that aren't a slice")
    kept = torch.ones(len(x), dtype=torch.bool, device=x.device)
    kept[zero_positions] = False
    if not bool(kept.any()):
        raise RefusedError("little work")
    return kept.nonzero()[:, 0]


def _threshold(self: Any, layer: int | None = None) -> Tensor | None:
    """(M,) of a JumpReLU, of one layer, there without a gradient; None of other functions."""
    function = self.activation_function
    if type(function) is not import_module(_FUNCTIONS).JumpReLU:
        return None
    threshold = function.threshold
    return threshold if layer is None else threshold.detach()[layer, 0]


def _is_topk(function: Any) -> bool:
    return type(function) is import_module(_FUNCTIONS).TopK


# What is refused.


def _check(self: Any, x: Any, dims: int | None = None, layer: int | None = None) -> Tensor:
    """Refuse what our ops don't take, and what the library has its own errors for; the weight (M, D)."""
    _check_call(self, x)
    M, function = self.d_transcoder, self.activation_function
    if x.dim() < 2 or x.dim() != (dims or x.dim()) or x.shape[-1] != self.d_model:
        raise RefusedError("the shape of the input")
    _check_function(function, M, None if layer is None else self.n_layers)
    LIBRARY.refuse_unless_worth(x, M, function.k if _is_topk(function) else None)
    weight = self.W_enc if layer is None else self._get_encoder_weights(layer)
    if (layer is not None and x.dtype != weight.dtype) or weight.dtype not in DTYPES:
        raise RefusedError("dtypes differ, or our ops don't take one")
    if x.device != weight.device or weight.device != self.b_enc.device:
        raise RefusedError("devices differ")
    return weight


def _check_function(function: Any, M: int, num_layers: int | None) -> None:
    known = import_module(_FUNCTIONS)
    if function in (F.relu, torch.relu):
        return
    if type(function) not in (known.JumpReLU, known.TopK) and not (
        type(function) is nn.ReLU and not function.inplace
    ):
        raise RefusedError("an activation function that isn't known")
    refuse_hooks([function])
    if type(function) is known.TopK and (type(function.k) is not int or function.k < 1):
        raise RefusedError("k below 1, or no whole number")
    if type(function) is known.JumpReLU:
        if function.threshold.shape != ((M,) if num_layers is None else (num_layers, 1, M)):
            raise RefusedError("thresholds that aren't one a latent")
        if not 0 < function.bandwidth < float("inf"):
            raise RefusedError("a bandwidth that isn't above 0")


def _check_decoding(self: Any, acts: Tensor, input_acts: Tensor | None) -> None:
    _check_call(self, acts)
    if self.W_skip is not None and input_acts is None:
        raise RefusedError("a skip connection without its input")
    LIBRARY.refuse_unless_worth(acts, self.d_model)
    if acts.dtype != self.dtype or acts.dtype not in DTYPES or acts.device != self.b_dec.device:
        raise RefusedError("activations of another dtype or on another device")


def _check_call(self: Any, *tensors: Any) -> None:
    refuse_unless_plain(*tensors)
    if any(torch.is_autocast_enabled(tensor.device.type) for tensor in tensors):
        raise RefusedError("autocast")
    if (type(self).__module__, type(self).__name__) not in _CLASSES:
        raise RefusedError("a subclass, which may have methods of its own")


def _check_coo(acts: Any, dims: int) -> None:
    if not isinstance(acts, Tensor) or acts.layout is not torch.sparse_coo or acts.dim() != dims:
        raise RefusedError("activations that aren't sparse, or of another shape")
    if acts.sparse_dim() != dims or not acts.is_coalesced():
        raise RefusedError("activations that aren't coalesced")


LIBRARY = Library(
    "circuit_tracer",
    "circuit-tracer",
    ("0.5", "0.6"),
    (
        Site(_SINGLE, "SingleLayerTranscoder.encode", "750acc0d240d548e", _encode),
        Site(_SINGLE, "SingleLayerTranscoder.decode", "db70a11210a56788", _decode),
        Site(_SINGLE, "SingleLayerTranscoder.encode_sparse", "a5e18f247dcea545", _encode_sparse),
        Site(_SINGLE, "SingleLayerTranscoder.decode_sparse", "3d348f8e9cc561a8", _decode_sparse),
        Site(_CROSS, "CrossLayerTranscoder.encode_layer", "7efcf132d4c6c4ca", _encode_layer),
        Site(_CROSS, "CrossLayerTranscoder.encode_sparse", "d0151b8505aadb69", _encode_layers_sparse),
        Site(_CROSS, "CrossLayerTranscoder.decode", "8432a76e88f732fe", _decode_layers),
        Site(_CROSS, "CrossLayerTranscoder.compute_reconstruction", "3e49f1bd9e92a17b", _reconstruct),
    ),
)
apply, undo, status, convert = LIBRARY.apply, LIBRARY.undo, LIBRARY.status, LIBRARY.convert
