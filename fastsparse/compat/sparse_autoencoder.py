"""Our ops under openai/sparse_autoencoder: its sparse products, its training code, and the published models.

It has no releases: what is served are the functions of commit 4965b94. ``TritonDecoderAutograd`` computes by
three products, which are ours wherever the library has imported them. On CPUs, where its Triton kernels don't
run, they make it work at all; and on one device, where its selection stops at what it would ask the others.
Where Triton or wandb isn't installed, the published models are served alone.

AuxK takes the largest pre-activations of dead latents and zeros of others. Which others is arbitrary, there
and here; those that are dead and not above 0 may be among them.
"""

from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from fastsparse.codes import codes_to_dense, decode_from_dense, fired, preactivations, why_untagged
from fastsparse.compat._library import Library, RefusedError, Site
from fastsparse.compat._products import by_columns, product_sites
from fastsparse.compat._refusals import refuse_hooks, refuse_unless_alike, refuse_unless_plain
from fastsparse.functional import TopK, topk_encode

FIRED = 1e-3  # a latent that is above it for a token isn't dead
_KERNELS, _TRAIN, _MODEL = (f"sparse_autoencoder.{name}" for name in ("kernels", "train", "model"))


# The training code.


class _Chosen(torch.autograd.Function):
    """Pre-activations that have been chosen, k of all latents and maybe some of the dead.

    As there, x gets no gradient; the bias gets its in fp32 at least, the weight in the dtype of the values.
    """

    @staticmethod
    def forward(ctx, x, pre_bias, weight, bias, values, indices, aux_values, aux_indices):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, pre_bias, weight, indices, aux_indices)
        return values, aux_values

    @staticmethod
    def backward(ctx, *grads):
        x, pre_bias, weight, *chosen = ctx.saved_tensors
        pairs = [(grad, part) for grad, part in zip(grads, chosen, strict=True) if grad is not None]
        if not pairs:
            return (None,) * 8
        grad, indices = (torch.cat(parts, dim=1) for parts in zip(*pairs, strict=True))
        _, needs_pre_bias, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        d_pre_bias = d_weight = d_bias = None
        if needs_pre_bias or needs_bias:
            wide = grad.to(torch.promote_types(grad.dtype, torch.float32))
            d_bias = by_columns(indices, wide, wide.new_ones(len(x), 1), len(weight))[:, 0]
        if needs_pre_bias:
            with torch.autocast(x.device.type, enabled=False):
                d_pre_bias = -(d_bias.to(weight.dtype) @ weight)
        if needs_weight:
            d_weight = by_columns(indices, grad, x - pre_bias, len(weight))
        return None, d_pre_bias, d_weight, d_bias if needs_bias else None, None, None, None, None


def _forward(original, self, x):
    _refuse_ranks(self.comms.sh_comm)
    weight, bias, pre_bias, auxk = self.encoder.weight, self.latent_bias, self.pre_bias, self.auxk
    refuse_unless_plain(x, weight, bias, pre_bias)
    M = weight.shape[0]
    LIBRARY.refuse_unless_worth(x, M, self.k, gpu_only=True)
    if x.dim() != 2:
        raise RefusedError("x is not (N, D)")
    if self.k < 1 or (auxk is not None and not 1 <= auxk <= M):
        raise RefusedError("k or auxk is out of range")
    if auxk is not None and not _is_own_mask(self.auxk_mask_fn):
        raise RefusedError("an auxk_mask_fn of others")
    with torch.no_grad():
        centered = x - pre_bias
        refuse_unless_alike(centered, weight, bias)
        code = topk_encode(centered, weight, bias, k=self.k, activation="none")
        self.stats_last_nonzero.masked_fill_(fired(TopK(code.values > FIRED, code.indices), M), 0).add_(1)
        aux = (None, None) if auxk is None else _of_dead(self, centered, code.values.dtype)
    values, aux_values = _Chosen.apply(x, pre_bias, weight, bias, *code, *aux)
    aux_values = aux_values if aux_values is None else aux_values.relu()
    recons = self.decode_sparse(code.indices, values.relu())
    return recons, {"auxk_inds": aux[1], "auxk_vals": aux_values}


def _of_dead(self, centered: Tensor, dtype: torch.dtype) -> TopK:
    """The auxk largest of the dead latents, and where there aren't so many zeros of latents by turns."""
    weight, N = self.encoder.weight, len(centered)
    M = weight.shape[0]
    # What it makes of a row of ones: in a copy of the module it asks the one that was copied.
    dead = self.auxk_mask_fn(centered.new_ones(1, M))[0] != 0
    k = min(self.auxk, int(dead.sum()))
    by_turns = torch.arange(N * (self.auxk - k), device=centered.device).reshape(N, self.auxk - k) % M
    zeros = torch.zeros(by_turns.shape, dtype=dtype, device=centered.device)
    if not k:
        return TopK(zeros, by_turns)
    values, indices = topk_encode(
        centered, weight, self.latent_bias, k=k, activation="none", latent_mask=dead
    )
    return TopK(torch.cat((values, zeros), dim=1), torch.cat((indices, by_turns), dim=1))


def _is_own_mask(function: Any) -> bool:
    """Whether it is the one that FastAutoencoder makes, which only ever sets latents to 0."""
    own = "FastAutoencoder.__init__.<locals>.auxk_mask_fn"
    return getattr(function, "__qualname__", "") == own and function.__module__ == _TRAIN


def _sharded_topk(original, x, k, sh_comm, capacity_factor=None):
    _refuse_ranks(sh_comm)
    if capacity_factor is not None and capacity_factor < 1:
        raise RefusedError("capacity_factor < 1")
    values, indices = torch.topk(x, k=k, dim=-1)
    return indices, values


def _refuse_ranks(comm: Any) -> None:
    if comm is not None and comm.size() > 1:
        raise RefusedError("latents on more than one rank")


# The published models.


def _encode_pre_act(original, self, x, latent_slice=slice(None)):
    """Nobody computes them where a TopK alone will ask."""
    if not isinstance(self.activation, import_module(_MODEL).TopK):
        raise RefusedError("an activation other than TopK")
    if latent_slice != slice(None):
        raise RefusedError("some latents")
    weight, bias = self.encoder.weight, self.latent_bias
    refuse_unless_plain(x, weight, bias)
    LIBRARY.refuse_unless_worth(x, weight.shape[0], self.activation.k)
    centered = x - self.pre_bias
    refuse_unless_alike(centered, weight, bias)
    return preactivations(centered, weight, bias)


def _topk(original, self, x):
    M = x.shape[-1]
    if self.k > M / 4:
        raise RefusedError("k > M / 4")
    if type(self.postact_fn) not in (nn.ReLU, nn.Identity):
        raise RefusedError("a postact_fn other than ReLU and Identity")
    values, indices = torch.topk(x, k=self.k, dim=-1)
    return codes_to_dense(TopK(self.postact_fn(values), indices), M)


def _decode(original, self, latents, info=None):
    LIBRARY.refuse_unless_worth(latents, self.pre_bias.shape[0])
    if why := why_untagged(latents):
        raise RefusedError(f"latents: {why}")
    if self.normalize and info is None:
        raise RefusedError("no info")
    atoms = _atoms(self.decoder)
    refuse_unless_alike(latents, atoms)
    recons = decode_from_dense(latents, atoms) + self.pre_bias
    return recons * info["std"] + info["mu"] if self.normalize else recons


def _atoms(decoder: nn.Module) -> Tensor:
    """(M, D): copied once where they are stored (D, M), or each op would, forward and backward."""
    if type(decoder) not in (nn.Linear, import_module(_MODEL).TiedTranspose) or decoder.bias is not None:
        raise RefusedError("a decoder of another class, or with a bias")
    refuse_hooks([decoder])
    return decoder.weight.T.contiguous()


LIBRARY = Library(
    "sparse_autoencoder",
    None,
    None,
    (
        *product_sites(_KERNELS, ("4171c7d304a7c86b", "59c1f83c46313daf", "1bc09c734424e94b"), optional=True),
        Site(_TRAIN, "sharded_topk", "cfe11791cad188ed", _sharded_topk, optional=True),
        Site(_TRAIN, "FastAutoencoder.forward", "08864304a4b8a652", _forward, optional=True),
        Site(_MODEL, "Autoencoder.encode_pre_act", "c5079ec22ff35d91", _encode_pre_act),
        Site(_MODEL, "Autoencoder.decode", "8f8650756b09fea3", _decode),
        Site(_MODEL, "TopK.forward", "8d41a5be2cab0ffc", _topk),
    ),
    repository="https://github.com/openai/sparse_autoencoder",
)
apply, undo, status, convert = LIBRARY.apply, LIBRARY.undo, LIBRARY.status, LIBRARY.convert
