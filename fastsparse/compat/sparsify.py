"""Our ops under EleutherAI's sparsify (eai-sparsify): encoder, decoder, and so AuxK, Multi-TopK, transcoders.

What is kept of it: gradients pass picks of value 0 as if they had no ReLU, and none reaches an encoder by the
pre-activations that AuxK and Multi-TopK read. A token with fewer than k positive pre-activations has zero
picks: there we take the largest of the others, the library any.
"""

from importlib import import_module

import torch

from fastsparse.codes import preactivations
from fastsparse.compat._library import RefusedError, Site
from fastsparse.compat._refusals import refuse_unless_alike
from fastsparse.compat._sparsify import OneOfTwo, as_multiplied, check_activation, chosen_gradients, decode
from fastsparse.functional import topk_encode


class _FusedEncoder(torch.autograd.Function):
    """The k largest pre-activations and their ReLU, whose gradient is taken to be that of the identity."""

    @staticmethod
    def forward(ctx, x, weight, bias, k, groups, known):
        ctx.set_materialize_grads(False)
        cast = as_multiplied(x, weight, bias)
        with torch.autocast(x.device.type, enabled=False):
            code = topk_encode(*cast, k=max(k, known), groups=groups)
            pre = preactivations(*cast, relu=True)
        values, indices = code
        if known:
            pre.known = code
            values, indices = (part[..., :k].contiguous() for part in code)
        ctx.mark_non_differentiable(indices)
        ctx.save_for_backward(x, weight, bias, indices)
        return values, indices, pre

    @staticmethod
    def backward(ctx, grad, *_):
        x, weight, bias, indices = ctx.saved_tensors
        grad = weight.new_zeros(indices.shape) if grad is None else grad
        return *chosen_gradients(ctx.needs_input_grad[:3], grad, indices, x, weight, bias), None, None, None


def _fused_encoder(original, input, weight, bias, k, activation, known=0):
    """The pre-activations will be asked for their ``known`` largest, which then cost no second product."""
    M = weight.shape[0]
    LIBRARY.refuse_unless_worth(input, M, k)
    check_activation(activation, ("topk", "groupmax"), k, M)
    refuse_unless_alike(input, weight, bias)
    tracked = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (input, weight, bias)
    )
    if input.dim() != 2 and (tracked or activation == "groupmax"):
        raise RefusedError("input is not (N, D)")
    if activation == "groupmax":
        found = _FusedEncoder.apply(input, weight, bias, 1, k, 0)
    else:
        found = _FusedEncoder.apply(input, weight, bias, k, 1, known if known <= M // 4 else 0)
    return import_module("sparsify.fused_encoder").EncoderOutput(*found)


def _decoder_impl(original, top_indices, top_acts, W_dec):
    if len(top_acts) * W_dec.numel() < LIBRARY.least_work:
        raise RefusedError("little work")
    return decode(top_indices, top_acts, W_dec.mT)


def _encode(original, self, x):
    cfg = self.cfg
    centered = x if cfg.transcode else x - self.b_dec
    weight, bias = self.encoder.weight, self.encoder.bias
    known = 4 * cfg.k if cfg.multi_topk else 0
    return _fused_encoder(None, centered, weight, bias, cfg.k, cfg.activation, known)


def _decode(original, self, top_acts, top_indices):
    if self.W_dec is None:
        raise RefusedError("no decoder")
    return _decoder_impl(None, top_indices, top_acts.to(self.dtype), self.W_dec.mT) + self.b_dec


LIBRARY = OneOfTwo(
    "sparsify",
    "eai-sparsify",
    ("1.3", "1.4"),
    (
        Site("sparsify.fused_encoder", "fused_encoder", "4c8563ed729eefe5", _fused_encoder),
        # Whichever of these two it has chosen is its decoder_impl.
        Site("sparsify.utils", "eager_decode", "b39c2f6061b97397", _decoder_impl),
        Site("sparsify.utils", "triton_decode", "92cfa55a247b88d6", _decoder_impl),
        Site("sparsify.sparse_coder", "SparseCoder.encode", "19761babbb904741", _encode),
        Site("sparsify.sparse_coder", "SparseCoder.decode", "972f61487742a33a", _decode),
    ),
    is_clt_training=False,
)
apply, undo, status, convert = LIBRARY.apply, LIBRARY.undo, LIBRARY.status, LIBRARY.convert
