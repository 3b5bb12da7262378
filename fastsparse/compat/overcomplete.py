"""overcomplete: its TopK, BatchTopK and matching pursuit autoencoders, its dictionaries, and its monitoring.

Encoders are served that are one product, a bias and a ReLU: the default ``"linear"`` one, and those that
``tied()`` and ``untied()`` make. ``OMPSAE`` isn't: its codes are refitted by projected gradients, which none
of our ops does.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastsparse._transforms import is_traced
from fastsparse.codes import code_of, codes_to_dense, decode_from_dense, fired, preactivations, why_untagged
from fastsparse.compat._library import Library, RefusedError, Site
from fastsparse.compat._refusals import refuse_hooks
from fastsparse.functional import (
    BatchTopK,
    Ragged,
    TopK,
    batch_topk_encode,
    matching_pursuit,
    threshold_encode,
    topk_encode,
)

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
NARROW = (torch.bfloat16, torch.float16)
TIES = 16  # entries of a batch that are looked at beyond its top_k, at first
SMALLEST = 1e-2  # a norm that the library's l2 normalisation, which adds 1e-8 to it, still brings to 1


# What can be served.


class _Product(NamedTuple):
    """An encoder that is the ReLU of one product: what it is of, and how many latents it has."""

    weight: Callable[[], Tensor]  # it may normalise a dictionary: called when nothing can be refused any more
    bias: Tensor | None
    num_latents: int


def _product(sae: nn.Module, x: Any) -> _Product:
    from overcomplete.sae.modules import MLPEncoder, TieableEncoder

    encoder = sae.encoder
    if type(encoder) is MLPEncoder:
        refuse_hooks(encoder.modules())
        found = _of_linear(encoder)
        _check_input(x, found.weight(), found.weight().shape[1], leading=1)
        return found
    if type(encoder) is not TieableEncoder:
        raise RefusedError("an encoder of another class")
    refuse_hooks([encoder])
    if encoder.bias is not None and isinstance(x, Tensor) and torch.is_autocast_enabled(x.device.type):
        raise RefusedError("autocast, and a bias that it leaves out")
    tied = encoder.tied_to
    if tied is None:
        M, D = encoder.weight.shape
        _check_input(x, encoder.weight, D)
        return _Product(lambda: encoder.weight, encoder.bias, M)
    if tied.training != sae.training:
        raise RefusedError("tied to a dictionary in another mode")
    _check_input(x, _held(tied), tied.in_dimensions)
    return _Product(tied.get_dictionary, encoder.bias, tied.nb_concepts)


def _of_linear(encoder: nn.Module) -> _Product:
    if len(encoder.mlp_blocks) or [type(part) for part in encoder.final_block] != [nn.Linear, nn.Identity]:
        raise RefusedError("an encoder of blocks or with a norm")
    activation = encoder.final_activation
    if type(activation) is not nn.ReLU or activation.inplace:
        raise RefusedError("an activation other than ReLU")
    linear = encoder.final_block[0]
    return _Product(lambda: linear.weight, linear.bias, linear.weight.shape[0])


def _held(dictionary: nn.Module) -> Tensor:
    """Of the dtype and on the device of the dictionary that it will give."""
    if dictionary.training:
        return next(dictionary.parameters())
    if dictionary._fused_dictionary is None:
        raise RefusedError("a dictionary that is not initialized")
    return dictionary._fused_dictionary


def _check_input(x: Any, weight: Tensor, D: int, leading: int | None = None) -> None:
    """Refuse what our ops don't take, and what the library has its own errors for."""
    if type(x) not in (Tensor, nn.Parameter):
        raise RefusedError("x is no plain tensor")
    if is_traced() or torch.jit.is_tracing():
        raise RefusedError("tracing")
    if torch._C._functorch.maybe_current_level() is not None or torch.autograd.forward_ad._current_level >= 0:
        raise RefusedError("torch.func, or forward differentiation")
    if x.dim() < 2 or (leading is not None and x.dim() != leading + 1) or x.shape[-1] != D:
        raise RefusedError("the shape of x")
    if x.dtype not in DTYPES or x.device != weight.device:
        raise RefusedError("the dtype or device of x")
    if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
        raise RefusedError("x and the weights differ in dtype")


def _whole(name: str, k: Any) -> int:
    if type(k) is not int or k < 1:
        raise RefusedError(f"{name} is no whole number above 0")
    return k


# Encoders.


def _topk(original, self, x):
    k, product = _whole("top_k", self.top_k), _product(self, x)
    LIBRARY.refuse_unless_worth(x, product.num_latents, k)
    weight = product.weight()
    code = topk_encode(x, weight, product.bias, k=k)
    return preactivations(x, weight, product.bias), codes_to_dense(code, weight.shape[0])


def _batch_topk(original, self, x):
    total, product = _whole("top_k", self.top_k), _product(self, x)
    if x.dim() != 2 or not x.shape[0]:
        raise RefusedError("the shape of x")
    LIBRARY.refuse_unless_worth(x, product.num_latents, total / max(1, x.shape[0]) if self.training else None)
    if not self.training:
        code, weight = _above(x, product, self.running_threshold)
        return preactivations(x, weight, product.bias), codes_to_dense(code, weight.shape[0])
    weight = product.weight()
    code, threshold = _largest(x, weight, product.bias, total)
    pre_codes, codes = preactivations(x, weight, product.bias), codes_to_dense(code, weight.shape[0])
    before, kept = self.running_threshold, self.threshold_momentum
    self.running_threshold = threshold if before is None else kept * before + (1 - kept) * threshold
    return pre_codes, codes


def _largest(x: Tensor, weight: Tensor, bias: Tensor | None, top_k: int) -> tuple[Ragged, Tensor]:
    """The top_k largest of a batch, what equals the last of them, and this.

    The library keeps all that come to its threshold. Where tokens occur twice, or numbers are narrow, that
    may be any number: some more are selected, until one is less.
    """
    all_of_them = x.shape[0] * weight.shape[0]
    more = TIES
    while True:
        total = min(top_k + more, all_of_them)
        code = batch_topk_encode(x, weight, bias, total=total)
        values = code.values.detach()
        threshold, least = (values.kthvalue(place).values for place in (total - top_k + 1, 1))
        # What isn't selected is at most the least, and of no account where that is 0.
        if total == all_of_them or not threshold > 0 or least < threshold:
            return _at_least(threshold, code), threshold
        more = max(2 * more, top_k // 8 if values.dtype in NARROW else 0)


def _above(x: Tensor, product: _Product, threshold: Any) -> tuple[Ragged, Tensor]:
    """All that come to a threshold, and the weight that they are of."""
    if type(threshold) is not Tensor or threshold.dim():
        raise RefusedError("no running threshold")
    if x.dtype != torch.float64 and torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
    else:
        dtype = x.dtype
    threshold = threshold.detach().to(dtype)  # as the library compares
    if not threshold > 0:
        raise RefusedError("a running threshold that is not above 0")
    weight = product.weight()
    # Some less, because scores are rounded before they are compared.
    bound = float(threshold) * (1 - 2 * torch.finfo(dtype).eps)
    values, indices, offsets = threshold_encode(x, weight, product.bias, threshold=bound)
    if values.shape[0] > x.shape[0] * weight.shape[0] / 4:
        raise RefusedError("k > M / 4")
    return _at_least(threshold, Ragged(values.to(dtype), indices, offsets)), weight


def _at_least(threshold: Tensor, code: Ragged | BatchTopK) -> Ragged:
    """Those below it made 0, by the library's own product, which also says the dtype and what NaN becomes."""
    return Ragged(code.values * (code.values >= threshold).float(), code.indices, code.offsets)


def _pursuit(original, self, x):
    from overcomplete.sae.base import SAE
    from overcomplete.sae.dictionary import DictionaryLayer

    k, dictionary = _whole("k", self.k), self.dictionary
    if self.dropout is not None:
        raise RefusedError("dropout")
    if type(dictionary) is not DictionaryLayer or type(self).get_dictionary is not SAE.get_dictionary:
        raise RefusedError("a dictionary of another class")
    held = _held(dictionary)
    M, D = held.shape
    _check_input(x, held, D, leading=1)
    if torch.is_autocast_enabled(x.device.type):
        raise RefusedError("autocast")
    if x.dtype in NARROW:
        raise RefusedError("the dtype or device of x")
    if self.nb_concepts != M or torch.device(self.device).type != x.device.type:
        raise RefusedError("a dictionary that isn't the autoencoder's")
    LIBRARY.refuse_unless_worth(x, M, k)
    if not _is_unit(dictionary):
        raise RefusedError("atoms of another norm than 1")
    atoms = self.get_dictionary()
    values, indices, residual = matching_pursuit(x, atoms, k=k, nonnegative=True, normalized=True)
    if _has_stopped(x, values):
        return _step_by_step(x, atoms, k)
    return residual, codes_to_dense(TopK(values, indices), M)


def _is_unit(dictionary: nn.Module) -> bool:
    """Whether all atoms will have norm 1: then the library, which divides by no norms, pursues as we do."""
    from overcomplete.sae.dictionary import normalize_l2

    with torch.no_grad():
        norms = torch.linalg.vector_norm(_held(dictionary), dim=1)
        if not dictionary.training:
            return bool(((norms - 1).abs() < 1e-5).all())
        unscaled = dictionary.normalization is normalize_l2 and bool(dictionary.multiplier == 0)
        return unscaled and bool((norms > SMALLEST).all())


def _has_stopped(x: Tensor, values: Tensor) -> bool:
    """Whether a row ended early that the library goes on with, by negative coefficients or their gradient."""
    stopped = (values.detach() == 0).any(dim=1)
    return bool(stopped.any()) and (x.requires_grad or bool((x.detach()[stopped] != 0).any()))


def _step_by_step(x: Tensor, atoms: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Matching pursuit that takes the largest coefficient of whatever sign."""
    codes = x.new_zeros(x.shape[0], atoms.shape[0])
    for _ in range(k):
        values, indices = (x @ atoms.T).max(dim=1, keepdim=True)
        codes = codes.scatter_add(1, indices, values)
        x = x - values * atoms[indices[:, 0]]
    return x, codes


# What takes codes.


def _decode(original, self, z):
    _check_tag(z)
    dictionary = self.get_dictionary()
    if z.dtype != dictionary.dtype and not torch.is_autocast_enabled(z.device.type):
        return torch.matmul(z, dictionary)  # which says what is wrong
    return decode_from_dense(z, dictionary)


def _track(original, self, z):
    _check_tag(z)
    self.alive_features |= fired(z, z.shape[-1])


def _l0(original, x, dims=None, threshold=1e-6):
    """How often each latent is at least so large: the mean over tokens."""
    _check_tag(x)
    if x.dim() != 2 or type(dims) is not int or dims or not threshold > 0:
        raise RefusedError("other than a mean over tokens")
    code = code_of(x)
    if isinstance(code, TopK) and bool((code.indices.sort(dim=1).values.diff(dim=1) == 0).any()):
        raise RefusedError("latents that occur more than once in a row")
    counts = torch.zeros(x.shape[1], device=x.device)
    large = (code.values.detach().abs() >= threshold).float().reshape(-1)
    return counts.index_add_(0, code.indices.reshape(-1), large) / x.shape[0]


def _check_tag(z: Any) -> None:
    why = why_untagged(z) if isinstance(z, Tensor) else "not made of a code"
    if why is not None:
        raise RefusedError(why)


LIBRARY = Library(
    "overcomplete",
    "overcomplete",
    ("0.3", "0.4"),
    (
        Site("overcomplete.sae.topk_sae", "TopKSAE.encode", "4a12934088e0d43b", _topk),
        Site("overcomplete.sae.batchtopk_sae", "BatchTopKSAE.encode", "1a1622ca5f025116", _batch_topk),
        Site("overcomplete.sae.mp_sae", "MpSAE.encode", "17b375eca9af9080", _pursuit),
        Site("overcomplete.sae.dictionary", "DictionaryLayer.forward", "d3eef49a263cefb5", _decode),
        Site(
            "overcomplete.sae.archetypal_dictionary",
            "RelaxedArchetypalDictionary.forward",
            "d3eef49a263cefb5",
            _decode,
        ),
        Site("overcomplete.sae.trackers", "DeadCodeTracker.update", "02494a18da39ecf0", _track),
        Site("overcomplete.metrics", "l0_eps", "755d89b76820fdd1", _l0),
    ),
)
apply, undo, status, convert = LIBRARY.apply, LIBRARY.undo, LIBRARY.status, LIBRARY.convert
