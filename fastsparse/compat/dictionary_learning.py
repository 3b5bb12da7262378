"""Our ops under dictionary_learning: its TopK, BatchTopK, Matryoshka and JumpReLU, and their trainers.

A token with fewer than k positive pre-activations has picks of value 0: there we take the largest of the
others, the library any. So latents that its TopK trainer counts as fired may be other ones; codes are not.

Trainers that are made after ``apply(relayout=True, fused_adam=True)`` are faster still: by the layout of
linear layers, see :func:`relayout_`, which does so by itself; and by PyTorch's fused kernel in the place of
its loop, under the same Adam.
"""

from collections import namedtuple
from functools import partial
from importlib import import_module

import torch
from torch import Tensor, nn
from torch.nn.modules import module as modules

from fastsparse.codes import code_of, codes_to_dense, decode_from_dense, fired, preactivations, why_untagged
from fastsparse.compat._layouts import keep_
from fastsparse.compat._library import Library, RefusedError, Site
from fastsparse.compat._optimizers import fuse_
from fastsparse.compat._refusals import refuse_unless_alike, refuse_unless_sparse
from fastsparse.functional import (
    Ragged,
    TopK,
    batch_topk_encode,
    jump,
    sddmm,
    sparse_decode,
    threshold_encode,
    topk_encode,
)
from fastsparse.functional._tensors import autocast, flat
from fastsparse.nn._levels import by_prefix

_TRAINER = "dictionary_learning.trainers.trainer"
_TOP_K = "dictionary_learning.trainers.top_k"
_BATCH = "dictionary_learning.trainers.batch_top_k"
_NESTED = "dictionary_learning.trainers.matryoshka_batch_top_k"
_JUMP = "dictionary_learning.trainers.jumprelu"
_DICTIONARY = "dictionary_learning.dictionary"

_Log = namedtuple("LossLog", ["x", "x_hat", "f", "losses"])
_JumpLog = namedtuple("LossLog", ["x", "recon", "f", "losses"])


def relayout_(module: nn.Module) -> nn.Module:
    """Keep the weights of a dictionary's linear layers in memory as our ops do: latent by latent.

    Shapes and values stay; state dicts hold them as ever, and they lie so again when one is loaded. Gradients
    then come out as the weights lie, which nobody has to transpose. It has to be done before the optimiser's
    first step.

    Args:
        module: with an ``encoder`` and a ``decoder`` of ``nn.Linear``.

    Returns:
        The module.

    Raises:
        TypeError: it has none.
    """
    if not _has_linear_layers(module):
        raise TypeError(
            f"relayout_: module must have an nn.Linear as encoder and as decoder, got {type(module).__name__}"
        )
    keep_(module.encoder, "weight", transposed=False)
    keep_(module.decoder, "weight", transposed=True)
    return module


def _has_linear_layers(module: nn.Module) -> bool:
    return all(isinstance(getattr(module, name, None), nn.Linear) for name in ("encoder", "decoder"))


# Encoders.


def _encode_topk(original, self, x, return_topk=False, use_threshold=False):
    if use_threshold:
        if return_topk:
            raise RefusedError("use_threshold and return_topk")
        source, M = _source(self, x)
        return _above_one(source, self.threshold, M)
    code, source = _topk_code(self, x)
    acts = codes_to_dense(code, len(source[1]))
    return (acts, *code, _rectified(source)) if return_topk else acts


def _encode_batch(source_of, original, self, x, return_active=False, use_threshold=True):
    source, last = source_of(self, x)
    if return_active:
        _refuse_unless_rows(x)
    if use_threshold:
        acts = _above_one(source, self.threshold, last)
    else:
        code = _batch_code(self, source, last)
        acts = codes_to_dense(code, len(source[1]), leading=x.shape[:-1])
    return (acts, fired(acts, acts.shape[-1]), _rectified(source)) if return_active else acts


def _source(self, x) -> tuple[tuple, int]:
    """What pre-activations are made of, and the latent from which on they are off."""
    weight, bias = _linear(self.encoder)
    LIBRARY.refuse_unless_worth(x, len(weight), float(self.k))
    return _cast(x - self.b_dec, weight, bias), len(weight)


def _nested_source(self, x) -> tuple[tuple, int]:
    weight, last = self.W_enc.T, int(self.group_indices[self.active_groups])
    LIBRARY.refuse_unless_worth(x, len(weight), float(self.k))
    _refuse_autocast(x)
    # It takes the second dimension for the latents'.
    if x.dim() != 2 and (x.dim() < 2 or last < len(weight) or last < x.shape[1]):
        raise RefusedError("x is not (N, D)")
    return _cast(x - self.b_dec, weight, self.b_enc), last


def _topk_code(self, x) -> tuple[TopK, tuple]:
    source, _ = _source(self, x)
    k = int(self.k)
    if k < 1:
        raise RefusedError("k < 1")
    with _as_it_is(x):
        return topk_encode(*source, k=k), source


def _batch_code(self, source: tuple, last: int) -> Ragged:
    x, weight, _ = source
    total = int(self.k) * len(x)
    if total < 1 or x.dim() < 2:
        raise RefusedError("no batch")
    with _as_it_is(x):
        return _below(batch_topk_encode(*source, total=total).code, last, len(weight))


def _rectified(source: tuple) -> Tensor:
    with _as_it_is(source[0]):
        return preactivations(*source, relu=True)


_encode_linear, _encode_nested = partial(_encode_batch, _source), partial(_encode_batch, _nested_source)


def _encode_jump(original, self, x, output_pre_jump=False):
    weight, bias = self.W_enc.T, self.b_enc
    LIBRARY.refuse_unless_worth(x, len(weight))
    _refuse_autocast(x)
    source = _cast(x - self.b_dec if self.apply_b_dec_to_input else x, weight, bias)
    code = _above(source, self.threshold.detach().clamp(min=0))
    acts = _dense(code, source)
    return (acts, preactivations(*source)) if output_pre_jump else acts


def _above_one(source: tuple, threshold: Tensor, last: int) -> Tensor:
    """Activations above 0 and one threshold, of latents below the last."""
    x, weight, _ = source
    M = len(weight)
    with _as_it_is(x):
        code = _above(source, threshold.detach().clamp(min=0).expand(M))
        return _dense(_below(code, last, M), source)


def _above(source: tuple, bounds: Tensor, margin: float = 0.0) -> Ragged:
    """The scores above bounds (M,), unless they are too many."""
    x, weight, bias = source
    refuse_unless_sparse(flat(x), weight, bias, bounds - margin)
    return threshold_encode(x, weight, bias, threshold=bounds, margin=margin)


def _dense(code: Ragged, source: tuple) -> Tensor:
    x, weight, _ = source
    return codes_to_dense(code._replace(values=code.values.to(x.dtype)), len(weight), leading=x.shape[:-1])


def _below(code: Ragged, last: int, M: int) -> Ragged:
    if last >= M:
        return code
    return code._replace(values=code.values.masked_fill(code.indices >= last, 0))


# Decoders.


def _decode(atoms_of, original, self, x):
    LIBRARY.refuse_unless_worth(x, self.activation_dim)
    _refuse_unless_coded(x)
    atoms = atoms_of(self)
    refuse_unless_alike(x, atoms)
    return decode_from_dense(x, atoms) + self.b_dec


def _atoms(dictionary: nn.Module) -> Tensor:
    """(M, D) of a decoder of nn.Linear: copied once, or each op would, forward and backward."""
    weight, bias = _linear(dictionary.decoder)
    if bias is not None:
        raise RefusedError("the decoder has a bias")
    return weight.T.contiguous()


def _plain_atoms(dictionary: nn.Module) -> Tensor:
    return dictionary.W_dec


_decode_linear, _decode_plain = partial(_decode, _atoms), partial(_decode, _plain_atoms)


# Trainers.


def _auxiliary_loss(atoms_of, original, self, residual_BD, post_relu_acts_BF):
    dead = self.num_tokens_since_fired >= self.dead_feature_threshold
    count = int(dead.sum())
    if count == 0:
        return original(self, residual_BD, post_relu_acts_BF)
    k = min(self.top_k_aux, count)
    LIBRARY.refuse_unless_worth(residual_BD, len(dead), k)
    atoms = atoms_of(self.ae)
    refuse_unless_alike(post_relu_acts_BF, atoms)
    acts, indices = torch.where(dead[None], post_relu_acts_BF, -torch.inf).topk(k, sorted=False)
    residual = residual_BD.float()
    error = (residual - sparse_decode(acts, indices, atoms).float()).square().sum(dim=-1).mean()
    spread = (residual - residual_BD.mean(dim=0).float()).square().sum(dim=-1).mean()
    self.dead_features, self.pre_norm_auxk_loss = count, error
    return (error / spread).nan_to_num(0.0)


_auxiliary_linear = partial(_auxiliary_loss, _atoms)
_auxiliary_plain = partial(_auxiliary_loss, _plain_atoms)


def _update_threshold(original, self, f):
    if f.dim() > 1:
        LIBRARY.refuse_unless_worth(f, self.ae.activation_dim)
        _refuse_unless_coded(f)
        f = code_of(f).values  # all others are 0, which it leaves out
    return original(self, f)


def _topk_loss(original, self, x, step=None, logging=False):
    ae = self.ae
    _refuse_unless_ours(ae.encode, ae.decode)
    _refuse_unless_rows(x)
    refuse_unless_alike(ae.encoder.weight, *_linear(ae.decoder))
    code, source = _topk_code(ae, x)
    atoms = _atoms(ae)
    if step > self.threshold_start_step:
        self.update_threshold(code.values)
    x_hat = sparse_decode(*code, atoms) + ae.b_dec
    self.effective_l0 = code.indices.shape[1]
    _count_tokens(self, len(x), code.indices.flatten())
    error = x - x_hat
    l2_loss = error.square().sum(dim=-1).mean()
    auxk_loss = self.get_auxiliary_loss(error.detach(), _rectified(source)) if self.auxk_alpha > 0 else 0
    return _total(self, x, x_hat, code, l2_loss, auxk_loss, logging)


def _batch_loss(original, self, x, step=None, logging=False):
    ae = self.ae
    _refuse_unless_ours(ae.encode, ae.decode, self.update_threshold)
    _refuse_unless_rows(x)
    refuse_unless_alike(ae.encoder.weight, *_linear(ae.decoder))
    source, last = _source(ae, x)
    code, atoms = _batch_code(ae, source, last), _atoms(ae)
    if step > self.threshold_start_step:
        self.update_threshold(code.values)
    x_hat = sparse_decode(code.values, code.indices, atoms, None, code.offsets) + ae.b_dec
    self.effective_l0 = self.k
    _count_tokens(self, len(x), fired(code, len(atoms)))
    error = x - x_hat
    l2_loss = error.square().sum(dim=-1).mean()
    auxk_loss = self.get_auxiliary_loss(error.detach(), _rectified(source))
    return _total(self, x, x_hat, code, l2_loss, auxk_loss, logging)


def _nested_loss(original, self, x, step=None, logging=False):
    ae = self.ae
    _refuse_unless_ours(ae.encode, self.update_threshold)
    _refuse_unless_rows(x)
    prefixes = [int(last) for last in ae.group_indices[1 : ae.active_groups + 1]]
    if not prefixes:
        raise RefusedError("no active group")
    source, last = _nested_source(ae, x)
    refuse_unless_alike(source[0], ae.W_dec)
    code = _batch_code(ae, source, last)
    if step > self.threshold_start_step:
        self.update_threshold(code.values)
    levels = by_prefix(code, prefixes, ae.W_dec, ae.b_dec)
    weights = self.group_weights[: len(levels)]
    losses = torch.stack(
        [(x - level).square().sum(dim=-1).mean() * w for level, w in zip(levels, weights, strict=True)]
    )
    self.effective_l0 = self.k
    _count_tokens(self, len(x), fired(code, len(ae.W_dec)))
    auxk_loss = self.get_auxiliary_loss((x - levels[-1]).detach(), _rectified(source))
    told = {"min_l2_loss": losses.min(), "max_l2_loss": losses.max()}
    return _total(self, x, levels[-1], code, losses.mean(), auxk_loss, logging, **told)


def _total(self, x, x_hat, code, l2_loss, auxk_loss, logging, **told):
    """The loss, or what is told of it: only then are activations made dense."""
    loss = l2_loss + self.auxk_alpha * auxk_loss
    if not logging:
        return loss
    told = {"l2_loss": l2_loss, "auxk_loss": auxk_loss, "loss": loss, **told}
    f = codes_to_dense(code, self.ae.dict_size)
    return _Log(x, x_hat, f, {name: value.item() for name, value in told.items()})


def _jump_loss(original, self, x, step, logging=False, **_):
    ae = self.ae
    if type(ae) is not import_module(_DICTIONARY).JumpReluAutoEncoder:
        raise RefusedError("the dictionary is not a JumpReluAutoEncoder")
    _refuse_unless_ours(ae.decode)
    LIBRARY.refuse_unless_worth(x, ae.dict_size)
    _refuse_autocast(x)
    _refuse_unless_rows(x)
    M, N, threshold = ae.dict_size, len(x), ae.threshold
    bandwidth = torch.tensor(self.bandwidth).item()  # as the library rounds it
    x = x.to(ae.W_enc.dtype)
    if x.dtype not in (torch.float32, torch.float64):
        raise RefusedError("half precision")
    source = _cast(x, ae.W_enc.T, ae.b_enc)
    refuse_unless_alike(x, threshold, ae.W_dec)
    if not 0 < bandwidth < torch.inf:
        raise RefusedError("no bandwidth")
    code = _above(source, threshold.detach(), margin=bandwidth / 2)

    # Each entry's threshold, by an op whose gradient is summed up in a fixed order.
    at = sddmm(x.new_ones(N, 1), threshold.unsqueeze(1), code.indices, code.offsets)
    values, _ = jump(code.values, at, bandwidth)
    recon = sparse_decode(values, code.indices, ae.W_dec, ae.b_dec, code.offsets)
    recon_loss = (x - recon).square().sum(dim=-1).mean()
    # L0 counts activations, not scores, above thresholds. Zeros count too where a threshold is near them or
    # below: those of scores that aren't entries by their number alone.
    _, counted = jump(values.detach(), at, bandwidth)
    _, counted_zero = jump(torch.zeros_like(threshold), threshold, bandwidth)
    zeros = N - torch.bincount(code.indices, minlength=M)
    l0 = (counted.sum() + (counted_zero * zeros).sum()) / N
    penalty = self.sparsity_coefficient * (l0 / self.target_l0 - 1).square() * self.sparsity_warmup_fn(step)
    loss = recon_loss + penalty

    with torch.no_grad():
        _count_tokens(self, N, values.new_zeros(M).index_add(0, code.indices, values) > 0)
        self.dead_features = (self.num_tokens_since_fired > self.dead_feature_threshold).sum().item()
    if not logging:
        return loss
    f = codes_to_dense(code._replace(values=values), M)
    return _JumpLog(x, recon, f, {"l2_loss": recon_loss.item(), "loss": loss.item()})


@torch.no_grad()
def _project(original, W_dec_DF, W_dec_DF_grad, activation_dim, d_sae):
    """The library takes a product of matrices for each latent."""
    _refuse_unless_columns(W_dec_DF, activation_dim, d_sae)
    if W_dec_DF_grad is None or W_dec_DF_grad.shape != W_dec_DF.shape:
        raise RefusedError("no gradient of this shape")
    along = (W_dec_DF_grad * W_dec_DF).sum(dim=0)
    return W_dec_DF_grad.addcmul_(W_dec_DF, along / (_norms(W_dec_DF) + 1e-6).square(), value=-1)


@torch.no_grad()
def _normalize(original, W_dec_DF, activation_dim, d_sae):
    _refuse_unless_columns(W_dec_DF, activation_dim, d_sae)
    W_dec_DF.data /= _norms(W_dec_DF) + torch.finfo(W_dec_DF.dtype).eps
    return W_dec_DF.data


def _norms(columns: Tensor) -> Tensor:
    """PyTorch's own are slow across rows, where sums are not."""
    columns = columns.detach()
    if columns.stride(0) == 1:
        return torch.linalg.vector_norm(columns, dim=0)
    return columns.square().sum(dim=0).sqrt()


def _refuse_unless_columns(weight: Tensor, D: int, M: int) -> None:
    if weight.shape != (D, M):
        raise RefusedError("the decoder is not (D, M)")
    if weight.dtype not in (torch.float32, torch.float64):
        raise RefusedError("half precision")


def _make_trainer(original, self, *args, **kwargs) -> None:
    """By what :func:`apply` was asked for: its optimiser has no state yet."""
    original(self, *args, **kwargs)
    if "relayout" in LIBRARY.chosen and _has_linear_layers(self.ae):
        relayout_(self.ae)
    if "fused_adam" in LIBRARY.chosen:
        fuse_(self.optimizer)


def _count_tokens(trainer, count: int, active: Tensor) -> None:
    trainer.num_tokens_since_fired += count
    trainer.num_tokens_since_fired[active] = 0


# What is refused.


def _linear(layer: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a layer that does nothing else with them."""
    if type(layer) is not nn.Linear or "forward" in vars(layer):
        raise RefusedError("a layer is not an nn.Linear")
    hooks = layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks
    if any(hooks) or modules._has_any_global_hook():
        raise RefusedError("hooks")
    return layer.weight, layer.bias


def _cast(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple:
    """As autocast wants them: once, for all that is made of them."""
    refuse_unless_alike(x, weight, bias)
    return autocast(x, weight, bias)


def _as_it_is(x: Tensor) -> torch.autocast:
    return torch.autocast(x.device.type, enabled=False)


def _refuse_unless_coded(activations: Tensor) -> None:
    if why := why_untagged(activations):
        raise RefusedError(f"activations: {why}")


def _refuse_unless_rows(x: Tensor) -> None:
    if x.dim() != 2:
        raise RefusedError("x is not (N, D)")


def _refuse_autocast(x: Tensor) -> None:
    """Where biases are added to products by themselves, in their own precision."""
    if torch.is_autocast_enabled(x.device.type):
        raise RefusedError("autocast")


def _refuse_unless_ours(*methods) -> None:
    """Where others have a say in what a trainer's loss would not call."""
    if not all(getattr(method, "_fastsparse", False) for method in methods):
        raise RefusedError("methods of others")


_TRAINERS = (
    Site(_TOP_K, "TopKTrainer.__init__", "b0343a4f24e4190a", _make_trainer),
    Site(_BATCH, "BatchTopKTrainer.__init__", "b2bf346a203dc516", _make_trainer),
    Site(_NESTED, "MatryoshkaBatchTopKTrainer.__init__", "05ebabf461e39df6", _make_trainer),
    Site(_JUMP, "JumpReluTrainer.__init__", "7281f5cb2f9530f5", _make_trainer),
)
LIBRARY = Library(
    "dictionary_learning",
    "dictionary-learning",
    ("0.1", "0.2"),
    (
        Site(_TRAINER, "set_decoder_norm_to_unit_norm", "192c4dd8c1477c0c", _normalize),
        Site(_TRAINER, "remove_gradient_parallel_to_decoder_directions", "d50b830871432ce5", _project),
        Site(_TOP_K, "AutoEncoderTopK.encode", "93d277ec616c78a2", _encode_topk),
        Site(_TOP_K, "AutoEncoderTopK.decode", "ce2add4514559139", _decode_linear),
        Site(_TOP_K, "TopKTrainer.get_auxiliary_loss", "63a3395b3c09f56d", _auxiliary_linear),
        Site(_TOP_K, "TopKTrainer.loss", "771132450591e58c", _topk_loss),
        Site(_BATCH, "BatchTopKSAE.encode", "9cf2e47d47da02ab", _encode_linear),
        Site(_BATCH, "BatchTopKSAE.decode", "ce2add4514559139", _decode_linear),
        Site(_BATCH, "BatchTopKTrainer.get_auxiliary_loss", "efe3c5907bcc5aa4", _auxiliary_linear),
        Site(_BATCH, "BatchTopKTrainer.update_threshold", "191aee7469121790", _update_threshold),
        Site(_BATCH, "BatchTopKTrainer.loss", "39f80d4561a78c06", _batch_loss),
        Site(_NESTED, "MatryoshkaBatchTopKSAE.encode", "acf6bb89cff51dc6", _encode_nested),
        Site(_NESTED, "MatryoshkaBatchTopKSAE.decode", "56b1be51a4f1a3f3", _decode_plain),
        Site(
            _NESTED, "MatryoshkaBatchTopKTrainer.get_auxiliary_loss", "1111f7bce7e7c3c0", _auxiliary_plain
        ),
        Site(_NESTED, "MatryoshkaBatchTopKTrainer.update_threshold", "191aee7469121790", _update_threshold),
        Site(_NESTED, "MatryoshkaBatchTopKTrainer.loss", "8295aa14cc72abdf", _nested_loss),
        Site(_DICTIONARY, "JumpReluAutoEncoder.encode", "959e346ca7cbbb5b", _encode_jump),
        Site(_DICTIONARY, "JumpReluAutoEncoder.decode", "3bc146f0fb7b9891", _decode_plain),
        Site(_JUMP, "JumpReluTrainer.loss", "a50b595f0682204b", _jump_loss),
    ),
    {"relayout": _TRAINERS, "fused_adam": _TRAINERS},
)  # fmt: skip
apply, undo, status, convert = LIBRARY.apply, LIBRARY.undo, LIBRARY.status, LIBRARY.convert
