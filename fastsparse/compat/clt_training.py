"""Our ops under EleutherAI's clt-training, which is imported as sparsify: encoder, decoder, sparse products.

It has no releases: what is served are the functions of commit cf9821f. Its BatchTopK keeps at most 4 k
latents of a token, as here; fp8 is its own. A token with fewer than k positive pre-activations has zero
picks, without a gradient: there we take the largest of the others, the library any. On CPUs, where its
backward's kernels don't run, it trains by ours.
"""

from importlib import import_module

import torch

from fastsparse.compat._library import RefusedError, Site
from fastsparse.compat._products import product_sites
from fastsparse.compat._refusals import refuse_unless_alike, refuse_unless_plain
from fastsparse.compat._sparsify import OneOfTwo, as_multiplied, check_activation, chosen_gradients, decode
from fastsparse.functional import topk_encode

MORE = 4  # times k latents of a token are what BatchTopK chooses from


class _FusedEncoder(torch.autograd.Function):
    """The k largest pre-activations and their ReLU, with gradients in the precision of the weights."""

    @staticmethod
    def forward(ctx, x, weight, bias, k, groups):
        ctx.set_materialize_grads(False)
        cast = as_multiplied(x, weight, bias)
        with torch.autocast(x.device.type, enabled=False):
            values, indices = topk_encode(*cast, k=k, groups=groups)
        ctx.mark_non_differentiable(indices)
        ctx.save_for_backward(x, weight, bias, values, indices)
        return values, indices

    @staticmethod
    def backward(ctx, grad, _):
        if grad is None:
            return (None,) * 5
        x, weight, bias, values, indices = ctx.saved_tensors
        grad = grad.masked_fill(~(values > 0), 0)
        return *chosen_gradients(ctx.needs_input_grad[:3], grad, indices, x, weight, bias), None, None


def _fused_encoder(original, input, weight, bias, k, activation, use_fp8=False):
    refuse_unless_plain(input, weight, *(() if bias is None else (bias,)))
    if use_fp8:
        raise RefusedError("fp8")
    M = weight.shape[0]
    check_activation(activation, ("topk", "groupmax", "batchtopk"), k, M)
    LIBRARY.refuse_unless_worth(input, M, MORE * k if activation == "batchtopk" else k, gpu_only=True)
    refuse_unless_alike(input, weight, bias)
    if input.dim() != 2:
        raise RefusedError("input is not (N, D)")
    if activation == "batchtopk":
        values, indices = _batch_topk(input, weight, bias, k)
    elif activation == "groupmax":
        values, indices = _FusedEncoder.apply(input, weight, bias, 1, k)
    else:
        values, indices = _FusedEncoder.apply(input, weight, bias, k, 1)
    return import_module("sparsify.fused_encoder").EncoderOutput(values, indices)


def _batch_topk(x, weight, bias, k):
    """The N k largest of a batch among the 4 k largest of each token, and what equals the last of them."""
    if not len(x):
        raise RefusedError("no batch")
    values, indices = _FusedEncoder.apply(x, weight, bias, MORE * k, 1)
    least = values.detach().flatten().topk(k * len(x), sorted=False).values.min()
    return values.masked_fill(values < least, 0), indices


def _decoder_impl(original, top_indices, top_acts, W_dec):
    refuse_unless_plain(top_indices, top_acts, W_dec)
    LIBRARY.refuse_unless_worth(W_dec, len(top_acts), gpu_only=True)
    return decode(top_indices, top_acts, W_dec)


def _encode(original, self, x):
    cfg, x = self.cfg, self.normalize_input(x)
    centered = x if cfg.transcode else x - self.b_dec
    weight, bias = self.encoder.weight, self.encoder.bias
    return _fused_encoder(None, centered, weight, bias, cfg.k, cfg.activation, cfg.use_fp8)


def _decode(original, self, top_acts, top_indices, index=0):
    W_dec = self.W_decs[index] if hasattr(self, "W_decs") else self.W_dec
    b_dec = self.b_decs[index] if hasattr(self, "b_decs") else self.b_dec
    if W_dec is None:
        raise RefusedError("no decoder")
    return _decoder_impl(None, top_indices, top_acts.to(self.dtype), W_dec) + b_dec


LIBRARY = OneOfTwo(
    "sparsify",
    None,
    None,
    (
        Site("sparsify.fused_encoder", "fused_encoder", "76cfbdf5c38ddffd", _fused_encoder),
        Site("sparsify.utils", "decoder_impl", "a15a7821d31a6809", _decoder_impl),
        Site("sparsify.sparse_coder", "SparseCoder.encode", "cb8c82b420d7b08a", _encode),
        Site("sparsify.sparse_coder", "SparseCoder.decode", "214d8c671fdb3af5", _decode),
        *product_sites("sparsify.kernels", ("4171c7d304a7c86b", "b9fda7efde30faad", "1bc09c734424e94b")),
    ),
    repository="https://github.com/EleutherAI/clt-training",
    is_clt_training=True,
)
apply, undo, status, convert = LIBRARY.apply, LIBRARY.undo, LIBRARY.status, LIBRARY.convert
